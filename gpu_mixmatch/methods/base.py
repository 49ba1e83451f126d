"""BatchBuilder: what all methods share, from labels and draws to the guess and the state."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gpu_mixmatch import _streams, _unchecked
from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch._keys import CountedKey
from gpu_mixmatch._ranks import ids_or_positions
from gpu_mixmatch._validation import (
    MOST_SEED,
    MOST_STEP,
    as_flag,
    as_integer,
    as_labels,
    as_plan,
    as_seed,
    as_smoothing,
    came,
    check_callable,
    check_choice,
    check_images_alike,
    check_key_tensor,
    check_kind,
    check_labels,
    is_integer,
)
from gpu_mixmatch.impl import implementation, resolve_impl
from gpu_mixmatch.methods.looks import Looks
from gpu_mixmatch.methods.passes import (
    GuessBatchNorm,
    Model,
    check_model,
    get_logits,
    guess_mode,
)
from gpu_mixmatch.types import DrawPlan, Draws, Impl, MixUpParams


class BatchBuilder(nn.Module):
    """What methods share: they draw, build views, guess on some of them, and label rows.

    Every random choice is a function of (seed, step, sample id, view). ``state_dict`` is the seed
    and the step, and what an adaptive part of a method has learnt.

    Args:
        num_classes: L, at least 2.
        guess_bn: BatchNorm while guessing. "batch" uses batch statistics and leaves the running
            ones alone, "update" lets them move, "eval" uses running ones, which suits frozen
            layers. Other buffers of the model move with "update" only.
        teacher: The model that guesses, for instance an EMA copy; None is the model of the call.
            It is not registered: it is neither moved nor saved with this module.
        label_smoothing: Share of the uniform distribution in labelled targets, in [0, 1).
        logits_getter: Takes the logits out of what the model returns; None if it returns them.
        reuse_buffers: Write inputs into two alternating buffers: a batch is overwritten two calls
            later. On a CPU this saves the page faults of fresh memory. A backward pass that comes
            after that raises.
        seed: The key of all draws, 0 ≤ seed < 2^63.
        impl: Implementation of the operations on tensors.

    Attributes:
        step: Number of batches built, a 0-d int64 tensor on the CPU; the draws of the next batch
            depend on it.
        switches: Names of the attributes that say how a method differs from its defaults.
        guesses_in_loss: Whether batches may be built without a model: the loss then guesses, by the
            logits of the batch itself.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of its range.
    """

    switches: ClassVar[tuple[str, ...]] = ("num_classes",)
    guesses_in_loss: ClassVar[bool] = False

    def __init__(
        self,
        num_classes: int,
        *,
        guess_bn: GuessBatchNorm,
        teacher: nn.Module | None,
        label_smoothing: float,
        logits_getter: Callable[[Any], Tensor] | None,
        reuse_buffers: bool,
        seed: int,
        impl: Impl,
    ) -> None:
        super().__init__()
        if as_integer("num_classes", num_classes, least=1, most=2**31 - 1) == 1:
            raise ValueError(
                "num_classes must be at least 2, got 1: of one class nothing is learnt, since "
                "every target is 1. For two classes give the model two logits"
            )
        check_choice("guess_bn", guess_bn, GuessBatchNorm)
        if teacher is not None:
            check_kind("teacher", teacher, nn.Module, "an nn.Module or None")
        if logits_getter is not None:
            check_callable("logits_getter", logits_getter, "a function or None")
        check_choice("impl", impl, Impl)
        self.num_classes = int(num_classes)
        self.guess_bn = guess_bn
        self.label_smoothing = as_smoothing(label_smoothing)
        self.logits_getter = logits_getter
        self.seed = as_seed(seed)
        self.impl = impl
        with torch.inference_mode(False):  # batches may be built outside of it
            self.step = torch.zeros((), dtype=torch.int64, device="cpu")
        self._teacher = (teacher,)  # a tuple hides the module from registration
        reuse_buffers = as_flag("reuse_buffers", reuse_buffers)
        self._guess_hooks: OrderedDict[int, Callable[[Tensor], None]] = OrderedDict()
        # whether a guess was seen to write into its views; None before the first
        self._model_writes: bool | None = None
        self._workspaces = (Workspace(), Workspace()) if reuse_buffers else None
        self._looks = Looks()
        self._checked_plan = DrawPlan()
        # follows .to(device); holds nothing
        self.register_buffer("_device_anchor", torch.empty(0), persistent=False)

    def _finish(self) -> None:
        """Check what the rest of a constructor has set."""
        self._checked_plan = as_plan(self.plan)
        implementation(self.impl, self.device)  # raises now if it cannot run
        self._prepare()

    @property
    def plan(self) -> DrawPlan:
        """What is drawn for a batch, here and not by the engine."""
        raise NotImplementedError

    @property
    def engines(self) -> dict[str, Any]:
        """The engines, by the names of their arguments."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where batches are built."""
        anchor: Tensor = self._device_anchor  # type: ignore[assignment]
        return anchor.device

    @property
    def runs_kernels(self) -> bool:
        """Whether Triton's kernels run."""
        implementation(self.impl, self.device)  # which finds out whether it can be imported
        return resolve_impl(self.impl, self.device) == "triton"

    @property
    def teacher(self) -> nn.Module | None:
        """The model that guesses, or None where the model of the call does."""
        return self._teacher[0]

    def for_loss(self, outputs: Any) -> Any:
        """Take what the method's loss compares with a batch out of the model's outputs: the logits.

        Raises:
            TypeError: If there are none.
        """
        return get_logits(outputs, self.logits_getter)

    def register_guess_hook(self, hook: Callable[[Tensor], None]) -> RemovableHandle:
        """Call ``hook(logits)`` with the logits of all views, ``[K, M, L]``, of every guess.

        They may lie in memory of the model: a hook copies what it keeps, and writes nothing. It is
        called where no gradients are taken.

        Raises:
            TypeError: If ``hook`` cannot be called.
        """
        check_callable("hook", hook, "a function of the logits")
        handle = RemovableHandle(self._guess_hooks)
        self._guess_hooks[handle.id] = hook
        return handle

    def look_at(self, x: Tensor, u: Tensor) -> None:
        """Look at the range of images, on a CPU now, on CUDA once and later, without waiting.

        Raises:
            ValueError: If floats lie far outside of [0, 1].
        """
        self._looks.judge()
        self._looks.images("x", x)
        self._looks.images("u", u)

    def _taken_in(
        self,
        x: Tensor,
        y: Any,
        u: Tensor,
        ids: tuple[Tensor | None, Tensor | None],
        key: Tensor | CountedKey | None,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor | int, Tensor | int]]:
        """Check what a call was given: images and labels on this module's device, and ids."""
        check_images_alike(x, u)
        if key is None:  # what is built while a graph is captured is made of any images
            self.look_at(x, u)
        elif not isinstance(key, CountedKey):
            check_key_tensor(key)
        device = self.device
        x, u = self._moved("x", x, device), self._moved("u", u, device)
        y = self._labels(y, x.shape[0], device)
        return x, y, u, as_ids_of_rows(*ids, x.shape[0], u.shape[0])

    def _guesser(self, model: Model | None) -> Model:
        """The model that guesses, of a method that cannot leave it to the loss."""
        if model is not None:
            check_model(model)
        if self.teacher is not None:
            return self.teacher
        if model is None:
            raise TypeError(
                f"model must be given, since {type(self).__name__} guesses before it mixes, got "
                "None: pass the model to the call, or teacher= to the builder"
            )
        return model

    def _draw(
        self,
        plan: DrawPlan,
        ids: tuple[Tensor | int, Tensor | int],
        key: Tensor | CountedKey | None,
        device: torch.device,
    ) -> tuple[Draws | None, MixUpParams]:
        if plan != self._checked_plan:  # an attribute of this module or of its engine was set
            self._checked_plan = as_plan(plan)
        plan, seed = self._checked_plan, as_seed(self.seed)
        return _unchecked.draw_batch(
            seed, self.step, *ids, plan, device=device, key=key, impl=self.impl
        )

    def _keeps_views(self, views: Tensor) -> bool:
        if self._model_writes is None and views.is_cuda:
            # the warm-up has looked; a graph would copy for ever what is looked at once
            return not torch.cuda.is_current_stream_capturing()
        return self._model_writes is not False

    def _judge_model(self, writes: bool) -> None:
        """Take in whether the first guess wrote into its views past torch's count."""
        self._model_writes = self._model_writes or writes

    def _guess_logits(
        self, views: Tensor, model: Model, num_views: int = 1, passes: int = 1
    ) -> Tensor:
        """Logits of all views, ``[K, M, L]``."""
        guesser = model if self.teacher is None else self.teacher
        with guess_mode(guesser, self.guess_bn):
            parts: list[Tensor] = []
            for number, part in enumerate([views] if passes == 1 else views.chunk(passes), 1):
                logits = get_logits(guesser(part), self.logits_getter)
                # a model may return the same memory every time
                parts.append(logits if number == passes else logits.clone())
            logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        if len(logits) != len(views):
            raise ValueError(
                f"model must return logits [{len(views)}, {self.num_classes}] "
                f"(num_classes = {self.num_classes}), got {list(logits.shape)}"
            )
        return self.look_at_guess(logits, num_views)

    def look_at_guess(self, logits: Tensor, num_views: int = 1) -> Tensor:
        """Look at the logits of a guess, show them to the hooks, and return ``[K, M, L]``.

        Raises:
            ValueError: If they are not ``[K·M, L]``.
        """
        if logits.dim() != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"model must return logits [{len(logits)}, {self.num_classes}] "
                f"(num_classes = {self.num_classes}), got {list(logits.shape)}"
            )
        self._looks.logits(logits)
        logits = logits.detach().view(num_views, -1, self.num_classes)
        for hook in self._guess_hooks.values():
            hook(logits)
        return logits

    def _labels(self, y: Any, length: int, device: torch.device) -> Tensor:
        y = as_labels("y", y)
        if y.dim() == 0 or y.shape[0] != length:
            came = len(y) if y.dim() else "a single number"
            raise ValueError(f"y must have a label per image of x, {length}, got {came}")
        check_labels(y, self.num_classes)
        return self._moved("y", y, device)

    def _moved(self, name: str, tensor: Tensor, device: torch.device) -> Tensor:
        """A tensor on ``device``, which is this module's."""
        if tensor.device == device:
            return tensor
        if tensor.device.type == "cpu":
            _streams.refuse_capture(
                device,
                f"{name} must be on {device} while a CUDA graph is captured: the graph would "
                "not read it from the host again. Fill a tensor on the device before each replay",
            )
            return tensor.to(device, non_blocking=True)
        raise ValueError(
            f"{name} must be on the CPU or on {device} like this module, got it on "
            f"{tensor.device}; move the module with .to({str(tensor.device)!r})"
        )

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow to another device, with what a batch needs there and no buffers of the last."""
        super()._apply(function, recurse)  # type: ignore[no-untyped-call]
        if self._workspaces is not None:
            self._workspaces = (Workspace(), Workspace())
        self._prepare()
        return self

    def _prepare(self) -> None:
        """Make the constants of the draws now: a CUDA graph that needs them cannot."""
        try:
            running = implementation(self.impl, self.device)
        except RuntimeError:  # it cannot run there, and says so when a batch is built
            return
        running.prepare(self.plan, self.device)

    def _output(
        self, num_rows: int, like: Tensor, workspaces: tuple[Workspace, Workspace]
    ) -> Tensor:
        """Where the next inputs go, rows like some views: one of two buffers in turn."""
        workspace = workspaces[int(self.step) % 2]
        if like.is_contiguous():
            shape = (num_rows, *like.shape[1:])
            # an alias: whoever asks it for a gradient does not ask the buffer
            return workspace.empty("inputs", shape, like.dtype, like.device).detach()
        shape = (num_rows, *like.shape[2:], like.shape[1])
        return workspace.empty("inputs", shape, like.dtype, like.device).permute(0, 3, 1, 2)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[prefix + "seed"] = torch.tensor(self.seed, dtype=torch.int64, device="cpu")
        destination[prefix + "step"] = self.step.clone()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        mine = {prefix + "seed", prefix + "step"}
        missing_keys.extend(sorted(mine - state_dict.keys()))
        for key in sorted(state_dict.keys() - mine):
            first = key.removeprefix(prefix).split(".", 1)
            if key.startswith(prefix) and (len(first) == 1 or first[0] not in self._modules):
                unexpected_keys.append(key)
        try:
            seed, step = (
                _integer_of_state(prefix + name, state_dict.get(prefix + name, mine), most)
                for name, mine, most in (
                    ("seed", self.seed, MOST_SEED),
                    ("step", self.step, MOST_STEP),
                )
            )
        except (TypeError, ValueError) as error:  # the module raises them, together
            error_msgs.append(str(error))
            return
        self.seed = seed
        self.step = torch.tensor(step, dtype=torch.int64, device="cpu")

    def extra_repr(self) -> str:
        """Show every switch, the step and the implementation that runs."""
        shown = [f"{name}={getattr(self, name)!r}" for name in (*self.switches, "seed")]
        if self.teacher is not None:
            shown.append(f"teacher={type(self.teacher).__name__}")
        if self._workspaces:
            shown.append("reuse_buffers=True")
        for name, engine in self.engines.items():
            if not isinstance(engine, nn.Module):
                shown.append(f"{name}={engine!r}")
        implementation(self.impl, self.device)  # which finds out whether it can be imported
        running = resolve_impl(self.impl, self.device)
        shown += [f"step={int(self.step)}", f"impl={self.impl!r} -> {running} on {self.device}"]
        return ", ".join(shown)


def _integer_of_state(name: str, value: Any, most: int) -> int:
    if isinstance(value, Tensor):
        if value.numel() != 1 or not is_integer(value.dtype) or value.device.type == "meta":
            raise ValueError(f"{name} must be an integer, got {came(value)}")
        value = value.item()
    return as_integer(name, value, most=most)


def as_ids_of_rows(
    ids_x: Tensor | None, ids_u: Tensor | None, num_x: int, num_u: int
) -> tuple[Tensor | int, Tensor | int]:
    """Return the ids of both parts of a batch, or the positions that stand for them."""
    return ids_or_positions("ids_x", ids_x, num_x), ids_or_positions("ids_u", ids_u, num_u)
