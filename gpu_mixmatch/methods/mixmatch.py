"""MixMatch: the batch builder, Algorithm 1 of the paper from top to bottom."""

from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from gpu_mixmatch import functional, sampling
from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch._ranks import positions
from gpu_mixmatch._validation import check_labels, check_least, check_not_empty
from gpu_mixmatch.augment import WeakAugment, as_augment
from gpu_mixmatch.capture import CapturedMixMatch
from gpu_mixmatch.impl import asks_for_triton, eager, implementation
from gpu_mixmatch.methods.passes import GuessBatchNorm, GuessForward, Model, get_logits, guess_mode
from gpu_mixmatch.types import (
    AugmentParams,
    AugmentPolicy,
    Impl,
    LamMode,
    MixMatchBatch,
    MixMode,
    MixUpParams,
)


class MixMatch(nn.Module):
    """Build MixMatch batches: augment, guess, sharpen, shuffle, MixUp.

    Defaults are the paper's Algorithm 1 with the reference code's λ per row and its guess from
    batch statistics. Every random choice is a function of (seed, step, sample id, view): the same
    seed gives the same batches on any device, and ``state_dict`` is two integers.

    Args:
        augment: An engine such as `WeakAugment`, or any callable from float images to float images.
        num_classes: L.
        num_augmentations: K, views per unlabelled image.
        temperature: T of the sharpening.
        alpha: α of Beta(α, α).
        lam: "sample" draws λ per row (the paper and its code), "batch" one per step (YU1ut, USB).
        mix: "all" mixes every row with any other; the paper's ablation mixes X with X and U with
            U ("separate"), only one part within itself ("labelled", "unlabelled"), or "none".
        guess_bn: BatchNorm while guessing. "batch" uses batch statistics and leaves the running
            ones alone (the reference), "update" lets them move (YU1ut), "eval" uses running ones.
        guess_forward: "joint" guesses all K·M views in one pass, "separate" in K passes, as the
            reference does, so that BatchNorm sees one view at a time.
        teacher: The model that guesses, for instance an EMA copy; None is the model of the call.
            It is not registered: it is neither moved nor saved with this module.
        label_smoothing: Share of the uniform distribution in labelled targets, in [0, 1).
        logits_getter: Takes the logits out of what the model returns; None if it returns them.
        reuse_buffers: Write inputs into two alternating buffers: a batch is overwritten two calls
            later. On a CPU this saves the page faults of fresh memory.
        seed: The key of all draws, 0 ≤ seed < 2^63.
        impl: Implementation of the operations on tensors.

    Attributes:
        step: Number of batches built, a 0-d int64 tensor on the CPU; the draws of the next batch
            depend on it.

    Raises:
        ValueError: If an argument is out of its range.

    References:
        Berthelot et al., "MixMatch: A Holistic Approach to Semi-Supervised Learning", NeurIPS 2019,
        Algorithm 1; google-research/mixmatch.
    """

    def __init__(
        self,
        augment: Any,
        num_classes: int,
        *,
        num_augmentations: int = 2,
        temperature: float = 0.5,
        alpha: float = 0.75,
        lam: LamMode = "sample",
        mix: MixMode = "all",
        guess_bn: GuessBatchNorm = "batch",
        guess_forward: GuessForward = "joint",
        teacher: nn.Module | None = None,
        label_smoothing: float = 0.0,
        logits_getter: Callable[[Any], Tensor] | None = None,
        reuse_buffers: bool = False,
        seed: int = 0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_least("num_classes", num_classes, 1)
        check_least("num_augmentations", num_augmentations, 1)
        for name, value in (("temperature", temperature), ("alpha", alpha)):
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        for name, choice, kind in (
            ("lam", lam, LamMode),
            ("mix", mix, MixMode),
            ("guess_bn", guess_bn, GuessBatchNorm),
            ("guess_forward", guess_forward, GuessForward),
        ):
            if choice not in get_args(kind):
                raise ValueError(f"{name} must be one of {list(get_args(kind))}, got {choice!r}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed must be an integer in [0, 2**63), got {seed}")
        sampling.folded_beta_quantile(alpha)  # raises now if α is out of range
        self.augment = as_augment(augment)
        self.num_classes = num_classes
        self.num_augmentations = num_augmentations
        self.temperature = temperature
        self.alpha = alpha
        self.lam = lam
        self.mix = mix
        self.guess_bn = guess_bn
        self.guess_forward = guess_forward
        self.label_smoothing = label_smoothing
        self.logits_getter = logits_getter
        self.seed = seed
        self.impl = impl
        self.step = torch.zeros((), dtype=torch.int64)
        self._teacher = (teacher,)  # a tuple hides the module from registration
        self._workspaces = (Workspace(), Workspace()) if reuse_buffers else None
        # follows .to(device); holds nothing
        self.register_buffer("_anchor", torch.empty(0), persistent=False)
        self._key: Tensor | None = None  # seed and step on the device, in `build_keyed` alone
        implementation(impl, self.device)  # raises now if it cannot be met

    @property
    def device(self) -> torch.device:
        """Where batches are built."""
        anchor: Tensor = self._anchor  # type: ignore[assignment]
        return anchor.device

    @property
    def runs_kernels(self) -> bool:
        """Whether Triton's kernels run."""
        running = implementation(self.impl, self.device)
        return asks_for_triton(self.impl, self.device) and running is not eager

    @property
    def teacher(self) -> nn.Module | None:
        """The model that guesses, or None where the model of the call does."""
        return self._teacher[0]

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        u: Tensor,
        model: Model,
        *,
        ids_x: Tensor | None = None,
        ids_u: Tensor | None = None,
    ) -> MixMatchBatch:
        """Build the batch of the next step.

        Args:
            x: Labelled images, ``[B, C, H, W]`` or ``[B, H, W, C]``, uint8 or float in [0, 1], on
                the CPU or on this module's device.
            y: Labels, ``[B]`` integers or ``[B, L]`` distributions.
            u: Unlabelled images, like x; M of them, which may differ from B.
            model: Maps ``[n, C, H, W]`` to logits ``[n, L]``. Its mode and its BatchNorm are left
                as they came, and no gradient flows through the guess.
            ids_x: Sample ids of x, ``[B]`` int64; None takes positions in the global batch. With a
                data set's own indices the draws do not depend on batch size, order or world size.
            ids_u: Sample ids of u, ``[M]`` int64.

        Returns:
            The mixed batch of N = B + K·M rows.

        Raises:
            ValueError: If images, labels, ids or the model's logits do not fit each other.
        """
        check_not_empty(x, u)
        if x.shape[1:] != u.shape[1:] or x.dtype != u.dtype:
            raise ValueError(
                "x and u must have the same channels, height, width and dtype, got "
                f"{list(x.shape)} {x.dtype} and {list(u.shape)} {u.dtype}"
            )
        x, u = self._moved("x", x), self._moved("u", u)
        y = self._labels(y, len(x))
        ids = _ids("ids_x", ids_x, len(x)), _ids("ids_u", ids_u, len(u))
        engine = self.augment
        draws, mixup = self._draw(ids, getattr(engine, "policy", None))
        scratch = self._workspaces[0] if self._workspaces else None
        if isinstance(engine, WeakAugment) and draws and engine.mixes_bytes(x, len(mixup.lam)):
            # W is not needed: the guess reads the views of u, and MixUp the images
            draws_u = AugmentParams(*(draw[len(x) :] for draw in draws))
            views = engine.apply(u, draws_u, workspace=scratch)
            logits = self._guess_logits(views, model)
            with torch.no_grad():
                targets = self._targets(y, logits, mixup)
                out = self._output((len(mixup.lam), *views.shape[1:]), views)
                inputs = engine.apply((x, u), draws, mixup=mixup, out=out, workspace=scratch)
            return self._finish(inputs, targets, len(x), mixup)
        foreign = draws or engine.draw_batch(
            self.seed, int(self.step), *ids, self.num_augmentations
        )
        images = engine.build(x, u, foreign, self.num_augmentations, scratch)
        return self._mix(images, y, model, mixup)

    def from_views(
        self,
        x: Tensor,
        y: Tensor,
        views: Tensor | Sequence[Tensor],
        model: Model,
        *,
        ids_x: Tensor | None = None,
        ids_u: Tensor | None = None,
    ) -> MixMatchBatch:
        """Build the batch of the next step from images that a pipeline has augmented already.

        Args:
            x: Augmented labelled images, ``[B, C, H, W]``, floating point.
            y: Labels, ``[B]`` integers or ``[B, L]`` distributions.
            views: The K views of the unlabelled images, ``[K, M, C, H, W]`` or K tensors.
            model: As for `forward`.
            ids_x: As for `forward`; they key λ.
            ids_u: As for `forward`.

        Returns:
            The mixed batch of N = B + K·M rows.

        Raises:
            ValueError: If there are not K views, or shapes or dtypes differ.
        """
        if len(views) != self.num_augmentations:
            raise ValueError(
                f"views must hold num_augmentations = {self.num_augmentations} views, "
                f"got {len(views)}"
            )
        check_not_empty(x, views[0])
        for view in views:
            if view.shape != views[0].shape or view.shape[1:] != x.shape[1:]:
                raise ValueError(
                    f"views must each be [M, C, H, W] with {list(x.shape[1:])} like x, "
                    f"got {[list(view.shape) for view in views]}"
                )
            if view.dtype != x.dtype or not x.is_floating_point():
                raise ValueError(
                    f"x and views must be of one floating point dtype, got {x.dtype} and "
                    f"{view.dtype}"
                )
        images = torch.cat([self._moved("x", x), *(self._moved("views", view) for view in views)])
        ids = _ids("ids_x", ids_x, len(x)), _ids("ids_u", ids_u, len(views[0]))
        _, mixup = self._draw(ids, None)
        return self._mix(images, self._labels(y, len(x)), model, mixup)

    def capture(self, model: Model, x: Tensor, y: Tensor, u: Tensor) -> CapturedMixMatch:
        """Capture the whole builder, the guess's forward pass included, as one CUDA graph.

        Args:
            model: As for `forward`.
            x: A batch like those to come, ``[B, C, H, W]`` or ``[B, H, W, C]``.
            y: Its labels.
            u: Its unlabelled images.

        Returns:
            A callable ``(x, y, u, *, ids_x, ids_u) -> MixMatchBatch`` in place of
            ``mixmatch(x, y, u, model)``: it counts this builder's step on, and equals the eager
            call of every step. What it returns is overwritten by its next call.

        Raises:
            RuntimeError: If this module is not on a CUDA device, or has no kernels there.
            TypeError: If the engine draws on the host.
        """
        return CapturedMixMatch(self, model, x, y, u)

    def build_keyed(
        self,
        key: Tensor,
        x: Tensor,
        y: Tensor,
        u: Tensor,
        model: Model,
        *,
        ids_x: Tensor | None = None,
        ids_u: Tensor | None = None,
    ) -> MixMatchBatch:
        """Build a batch from a seed and a step that lie on the device, as a graph must.

        Args:
            key: Seed and step, ``[2]`` int64, on this module's device.
            x, y, u, model, ids_x, ids_u: As for `forward`.

        Returns:
            As `forward` with that seed and step; this module's own ones are not read. Its ``step``
            is that of this module, which is counted on.
        """
        self._key = key
        try:
            batch: MixMatchBatch = self(x, y, u, model, ids_x=ids_x, ids_u=ids_u)
        finally:
            self._key = None
        return batch

    def _draw(
        self, ids: tuple[Tensor | int, Tensor | int], policy: AugmentPolicy | None
    ) -> tuple[AugmentParams | None, MixUpParams]:
        return functional.draw_batch(
            self.seed,
            self.step,
            *ids,
            num_augmentations=self.num_augmentations,
            policy=policy,
            alpha=self.alpha,
            lam=self.lam,
            mix=self.mix,
            device=self.device,
            key=self._key,
            impl=self.impl,
        )

    def _mix(self, images: Tensor, y: Tensor, model: Model, params: MixUpParams) -> MixMatchBatch:
        logits = self._guess_logits(images[len(y) :], model)
        with torch.no_grad():
            inputs, targets = functional.mixup(
                images,
                self._targets(y, logits, None),
                params,
                out=self._output(images.shape, images),
                impl=self.impl,
            )
        return self._finish(inputs, targets, len(y), params)

    def _targets(self, y: Tensor, logits: Tensor, mixup: MixUpParams | None) -> Tensor:
        return functional.batch_targets(
            y,
            logits,
            self.temperature,
            label_smoothing=self.label_smoothing,
            mixup=mixup,
            impl=self.impl,
        )

    def _finish(
        self, inputs: Tensor, targets: Tensor, num_labelled: int, params: MixUpParams
    ) -> MixMatchBatch:
        step = self.step.clone()
        self.step += 1
        return MixMatchBatch(inputs, targets, num_labelled, step, params)

    def _guess_logits(self, views: Tensor, model: Model) -> Tensor:
        """Logits of all views, ``[K, M, L]``, without gradients."""
        guesser = model if self.teacher is None else self.teacher
        passes = 1 if self.guess_forward == "joint" else self.num_augmentations
        with torch.no_grad(), guess_mode(guesser, self.guess_bn):
            parts = [get_logits(guesser(part), self.logits_getter) for part in views.chunk(passes)]
            logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        if tuple(logits.shape) != (len(views), self.num_classes):
            raise ValueError(
                f"model must return logits [{len(views)}, {self.num_classes}] "
                f"(num_classes = {self.num_classes}), got {list(logits.shape)}"
            )
        return logits.view(self.num_augmentations, -1, self.num_classes)

    def _labels(self, y: Tensor, length: int) -> Tensor:
        if y.dim() == 0 or len(y) != length:
            came = len(y) if y.dim() else "a single number"
            raise ValueError(f"y must have a label per image of x, {length}, got {came}")
        check_labels(y, self.num_classes)
        return self._moved("y", y)

    def _moved(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.device == self.device:
            return tensor
        if tensor.device.type == "cpu":
            return tensor.to(self.device, non_blocking=True)
        raise ValueError(
            f"{name} must be on the CPU or on {self.device} like this module, got it on "
            f"{tensor.device}; move the module with .to({str(tensor.device)!r})"
        )

    def _output(self, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
        if self._workspaces is None:
            return None
        workspace = self._workspaces[int(self.step) % 2]
        if like.is_contiguous():
            return workspace.empty("inputs", tuple(shape), like.dtype, like.device)
        order = (shape[0], *shape[2:], shape[1])
        buffer = workspace.empty("inputs", order, like.dtype, like.device)
        return buffer.permute(0, 3, 1, 2)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[prefix + "seed"] = torch.tensor(self.seed, dtype=torch.int64)
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
        for key in state_dict.keys() - mine:
            first = key.removeprefix(prefix).split(".", 1)
            if key.startswith(prefix) and (len(first) == 1 or first[0] not in self._modules):
                unexpected_keys.append(key)
        if prefix + "seed" in state_dict:
            self.seed = int(state_dict[prefix + "seed"])
        if prefix + "step" in state_dict:
            self.step = torch.tensor(int(state_dict[prefix + "step"]), dtype=torch.int64)

    def extra_repr(self) -> str:
        """Show every switch, the step and the implementation that runs."""
        names = (
            "num_classes",
            "num_augmentations",
            "temperature",
            "alpha",
            "lam",
            "mix",
            "guess_bn",
            "guess_forward",
            "label_smoothing",
            "seed",
        )
        shown = [f"{name}={getattr(self, name)!r}" for name in names]
        if self.teacher is not None:
            shown.append(f"teacher={type(self.teacher).__name__}")
        if self._workspaces:
            shown.append("reuse_buffers=True")
        if not isinstance(self.augment, nn.Module):
            shown.append(f"augment={self.augment!r}")
        running = implementation(self.impl, self.device).__name__.rsplit(".", 1)[-1]
        shown += [f"step={int(self.step)}", f"impl={self.impl!r} -> {running} on {self.device}"]
        return ", ".join(shown)


def _ids(name: str, ids: Tensor | None, length: int) -> Tensor | int:
    """The ids given, or positions in the global batch: an integer stands for them on rank 0."""
    if ids is not None:
        if tuple(ids.shape) != (length,) or ids.dtype != torch.int64:
            raise ValueError(
                f"{name} must be [{length}] int64, one per image, got {list(ids.shape)} {ids.dtype}"
            )
        return ids
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return positions(length)
    return length
