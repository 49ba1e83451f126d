"""One CUDA graph that builds a batch, the guess's forward pass included."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar, overload

import torch
from torch import Tensor, nn

from gpu_mixmatch._keys import CountedKey
from gpu_mixmatch._ranks import positions
from gpu_mixmatch._validation import as_labels, check_images_alike, check_kind, check_labels
from gpu_mixmatch._writes import count_of_writes
from gpu_mixmatch.methods.base import BatchBuilder
from gpu_mixmatch.methods.consistency import Consistency, PendingGuess
from gpu_mixmatch.methods.layers import buffers_kept
from gpu_mixmatch.methods.mixmatch import MixMatch
from gpu_mixmatch.methods.passes import Model, check_model, modules_of
from gpu_mixmatch.methods.state import GuessState
from gpu_mixmatch.types import ConsistencyBatch, MixMatchBatch, SemiSupervisedBatch

_WARM_UP = 3  # calls before the capture, as torch's own wrappers make them


_Batch = TypeVar("_Batch")


@overload
def capture(
    mixmatch: MixMatch, model: Model, x: Tensor, y: Tensor, u: Tensor
) -> "CapturedBuilder[MixMatchBatch]": ...


@overload
def capture(
    mixmatch: Consistency, model: Model | None, x: Tensor, y: Tensor, u: Tensor
) -> "CapturedBuilder[ConsistencyBatch]": ...


@overload
def capture(
    mixmatch: BatchBuilder, model: Model | None, x: Tensor, y: Tensor, u: Tensor
) -> "CapturedBuilder[Any]": ...


def capture(
    mixmatch: BatchBuilder, model: Model | None, x: Tensor, y: Tensor, u: Tensor
) -> "CapturedBuilder[Any]":
    """Capture a whole builder, the guess's forward pass included, as one CUDA graph.

    Args:
        mixmatch: The builder, of any method, on a CUDA device; its step goes on with every batch.
        model: As for `MixMatch.forward`, or None where the loss is to guess: the graph then builds
            the views alone. Its parameters and buffers must stay where they are, as optimisers
            leave them; its mode is that of the capture, and so is every setting of the builder but
            its seed and step. What a builder learns of guesses is in the graph.
        x: A batch like those to come, ``[B, C, H, W]`` or ``[B, H, W, C]``: shapes and dtypes
            count, values do not.
        y: Its labels.
        u: Its unlabelled images.

    Returns:
        A callable ``(x, y, u, *, ids_x, ids_u)`` in place of ``mixmatch(x, y, u, model)``, which
        returns that method's batch: it counts the builder's step on, and equals the eager call of
        every step. What it returns is overwritten by its next call; a backward pass that comes
        after that raises. Its ``inputs`` are the tensors that the graph reads.

    Raises:
        RuntimeError: If the builder is not on a CUDA device, or has no kernels there.
        TypeError: If the engine draws on the host, which a graph cannot repeat, or an argument is
            of the wrong kind.
        ValueError: If images or labels do not fit each other.
    """
    return CapturedBuilder(mixmatch, model, x, y, u)


class CapturedBuilder(Generic[_Batch]):
    """Builds batches of one shape by replaying a CUDA graph; see `capture`.

    Seed, step and ids are read from the device by every replay, so that it draws anew, and equals
    the eager call of that step. A replay counts the step on itself: beside it a call launches no
    kernel, and copies at most once what is not in ``inputs`` yet. Only where seed or step are not
    those that the last replay left (they were set, a state was loaded, a batch was built without
    the graph) are they written anew. A batch is overwritten by the next replay.

    All that a replay writes is memory of the graph, and what the builder learns of guesses: the
    builder's reused buffers are not in it, so that a batch of another shape, built without the
    graph, can neither free nor overwrite any of it.

    Attributes:
        inputs: What a replay reads, all on the device: x, y, u and their ids, at first positions.
            Whoever writes the next batch into them, in the stream of the calls, saves its copies.
    """

    def __init__(
        self, mixmatch: BatchBuilder, model: Model | None, x: Tensor, y: Tensor, u: Tensor
    ) -> None:
        check_kind("mixmatch", mixmatch, BatchBuilder, "a builder such as MixMatch or FixMatch")
        if model is not None or not mixmatch.guesses_in_loss:
            check_model(model)
        check_images_alike(x, u)
        y = as_labels("y", y)
        check_labels(y, mixmatch.num_classes)
        check_capturable(mixmatch)
        self.mixmatch = mixmatch
        self.model = model
        self._device = mixmatch.device
        # ordinary tensors, which later calls write to in any mode
        with torch.inference_mode(False), torch.no_grad():
            self._capture(x, y, u)

    def _capture(self, x: Tensor, y: Tensor, u: Tensor) -> None:
        mixmatch, device = self.mixmatch, self._device
        self._positions = [positions(len(images)).to(device) for images in (x, u)]
        self.inputs = SemiSupervisedBatch(
            *(torch.empty_like(tensor, device=device).copy_(tensor) for tensor in (x, y, u)),
            *(ids.clone() for ids in self._positions),
        )
        # how often ids had been written to when they were positions
        self._at_positions = [count_of_writes(ids) for ids in self.inputs[3:]]
        self._key = CountedKey(device)
        self._graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with _unchanged(mixmatch, self.model), torch.cuda.device(device):
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    self._build()
            torch.cuda.current_stream(device).wait_stream(side)
            # lazy ones have one by now
            self._places = _places("model", _modules_of_guesser(mixmatch, self.model))
            self._places += _places("builder", _states_of(mixmatch))
            with torch.cuda.graph(self._graph):
                self._batch = self._build()
        self._key.send(mixmatch.seed, int(mixmatch.step))  # warming up has counted it on

    @torch.no_grad()
    def __call__(
        self,
        x: Tensor | None = None,
        y: Tensor | None = None,
        u: Tensor | None = None,
        *,
        ids_x: Tensor | None = None,
        ids_u: Tensor | None = None,
    ) -> _Batch:
        """Build the batch of the next step.

        A batch of another shape or dtype, such as a last, smaller one, is built without the graph.

        Args:
            x, y, u: As for `MixMatch.forward`. What is one of ``inputs`` is not copied; without
                any argument the batch is made of ``inputs`` as they are, ids included.
            ids_x, ids_u: Sample ids, as for `MixMatch.forward`.

        Returns:
            The method's batch. Its tensors are overwritten by the next replay.

        Raises:
            TypeError: If an argument is of the wrong kind, or some of x, y and u are left out.
            ValueError: If labels or ids are none; see `MixMatch.forward`.
            RuntimeError: If builder or model are no longer where they were captured.
        """
        self._check_in_place()
        if x is None or y is None or u is None:
            if not (x is None and y is None and u is None):
                raise TypeError("x, y and u must be given, all of them or none, got some of them")
            x, y, u, *ids = self.inputs
            ids_x, ids_u = ids[0] if ids_x is None else ids_x, ids[1] if ids_u is None else ids_u
        check_images_alike(x, u)
        y = as_labels("y", y)
        given = list(zip((x, y, u), self.inputs, strict=False))
        if not all(fits(new, held) for new, held in given):
            return self._eager(x, y, u, ids_x=ids_x, ids_u=ids_u)
        self.mixmatch.look_at(x, u)
        check_labels(y, self.mixmatch.num_classes)
        ids_x = self._as_ids(0, "ids_x", ids_x)
        ids_u = self._as_ids(1, "ids_u", ids_u)
        if isinstance(self.mixmatch, Consistency):
            self.mixmatch.check_ids(ids_u)
        for new, held in given:
            _send(new, held)
        self._send_ids(0, ids_x)
        self._send_ids(1, ids_u)
        self._key.send(self.mixmatch.seed, int(self.mixmatch.step))
        with self._key.one_draw():
            self._graph.replay()
        batch: Any = self._batch
        # autograd does not see what a replay writes
        torch.autograd.graph.increment_version(_written(batch))
        step = self.mixmatch.step.clone()
        self.mixmatch.step += 1
        # aliases: whoever asks them for a gradient does not ask the graph's tensors
        aliases = {
            name: value.detach()
            for name, value in batch._asdict().items()
            if isinstance(value, Tensor)
        }
        batch = batch._replace(**{**aliases, "step": step})
        if isinstance(batch, ConsistencyBatch) and isinstance(batch.guess, PendingGuess):
            batch = batch._replace(guess=batch.guess.anew())
        handed_out: _Batch = batch
        return handed_out

    def __reduce__(self) -> NoReturn:
        raise TypeError("a captured builder cannot be copied or pickled: capture the builder anew")

    def _build(self) -> _Batch:
        x, y, u, ids_x, ids_u = self.inputs
        return self._eager(x, y, u, ids_x=ids_x, ids_u=ids_u, key=self._key)

    def _eager(self, x: Tensor, y: Tensor, u: Tensor, **options: Any) -> _Batch:
        guesser = () if self.model is None else (self.model,)
        batch: _Batch = self.mixmatch(x, y, u, *guesser, **options)
        return batch

    def _check_in_place(self) -> None:
        """Raise where a replay would read what is no longer used, or no longer there."""
        if self.mixmatch.device != self._device:
            raise RuntimeError(
                f"the builder was captured on {self._device} and is on {self.mixmatch.device} now: "
                "capture it again"
            )
        for place in self._places:
            tensor = place.holder.get(place.name)
            if tensor is not place.tensor or tensor.data_ptr() != place.address:
                raise RuntimeError(
                    f"{place.name} of the {place.owner} is not where it was when the graph was "
                    "captured: capture again after a model is moved, cast or given other parameters"
                )

    def _as_ids(self, number: int, name: str, ids: Any) -> Tensor | None:
        if ids is None:
            return None
        held, new = self.inputs[3 + number], as_labels(name, ids)
        if not fits(new, held):
            raise ValueError(
                f"{name} must be {list(held.shape)} int64, got {list(new.shape)} {new.dtype}"
            )
        return new

    def _send_ids(self, number: int, ids: Tensor | None) -> None:
        held = self.inputs[3 + number]
        if ids is not None:
            _send(ids, held)
        elif count_of_writes(held) != self._at_positions[number]:
            held.copy_(self._positions[number])
            self._at_positions[number] = count_of_writes(held)


def check_capturable(builder: BatchBuilder) -> None:
    """Raise if a builder cannot be captured; says why.

    Raises:
        RuntimeError: If it is not on a CUDA device, or has no kernels there.
        TypeError: If its engine draws on the host.
    """
    if builder.device.type != "cuda":
        raise RuntimeError(
            f"capture needs CUDA, got a {type(builder).__name__} on {builder.device}; move it with "
            ".to('cuda')"
        )
    if not builder.runs_kernels:
        raise RuntimeError(
            "capture needs the kernels, whose draws are made on the device: "
            f"got impl={builder.impl!r}, which runs eager here"
        )
    if builder.plan.policy is None:
        engines = [type(engine).__name__ for engine in builder.engines.values()]
        wanted = (
            "an engine whose draws are made on the device, such as WeakAugment"
            if len(engines) == 1
            else "a strong engine that is the weak one with a chain, as RandAugment.fixmatch(weak) "
            "makes it, so that all draws are made on the device"
        )
        raise TypeError(f"capture needs {wanted}, got {' and '.join(engines)}")


def fits(new: Tensor, old: Tensor) -> bool:
    """Whether a tensor can be copied into a captured input as it is."""
    return new.shape == old.shape and new.dtype == old.dtype


def _send(new: Tensor, held: Tensor) -> None:
    """Copy to where a graph reads, unless that is where it lies."""
    if new.data_ptr() != held.data_ptr() or new.stride() != held.stride():
        held.copy_(new, non_blocking=True)


class _Place(NamedTuple):
    """Where a graph reads a parameter or a buffer, of the model or of the builder."""

    owner: str
    holder: Mapping[str, Any]
    name: str
    tensor: Tensor
    address: int


def _places(owner: str, modules: list[nn.Module]) -> list[_Place]:
    return [
        _Place(owner, holder, name, tensor, tensor.data_ptr())
        for module in modules
        for holder in (module._parameters, module._buffers)
        for name, tensor in holder.items()
        # others, such as sharded ones, have no memory themselves
        if tensor is not None and type(tensor) in (Tensor, nn.Parameter)
    ]


def _modules_of_guesser(builder: BatchBuilder, model: Model | None) -> list[nn.Module]:
    guesser = model if builder.teacher is None else builder.teacher
    return [] if guesser is None else modules_of(guesser)


def _states_of(builder: BatchBuilder) -> list[nn.Module]:
    """What a builder learns of guesses."""
    return [module for module in builder.modules() if isinstance(module, GuessState)]


def _written(batch: tuple[Any, ...]) -> list[Tensor]:
    """All tensors of a batch but its step, which is on the host."""
    tensors = [
        value
        for part in batch
        for value in (part if isinstance(part, tuple) else (part,))
        if isinstance(value, Tensor)
    ]
    return [value for value in tensors if value.dim() > 0]


@contextlib.contextmanager
def _unchanged(mixmatch: BatchBuilder, model: Model | None) -> Iterator[None]:
    """Put step, model's buffers and what was learnt back: warming up and capturing builds no batch.

    The builder's own buffers are out of reach meanwhile: what is captured is the graph's.
    """
    modules = [*_modules_of_guesser(mixmatch, model), *_states_of(mixmatch)]
    step = mixmatch.step.clone()
    workspaces, mixmatch._workspaces = mixmatch._workspaces, None
    autocast = torch.is_autocast_enabled("cuda")
    # a cached cast of a weight would be captured once and never made again
    cast = torch.autocast("cuda", torch.get_autocast_dtype("cuda"), autocast, cache_enabled=False)
    try:
        with cast, buffers_kept(modules, of_batch_norm=True):
            yield
    finally:
        mixmatch.step, mixmatch._workspaces = step, workspaces
