"""How the model is run: for a guess, and on a mixed batch."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from gpu_mixmatch import functional
from gpu_mixmatch._validation import (
    as_flag,
    as_length,
    check_any_batch,
    check_callable,
    check_choice,
    check_groups,
)
from gpu_mixmatch.methods.layers import buffers_kept, check_guessable, norm_flags
from gpu_mixmatch.methods.state import GuessState
from gpu_mixmatch.types import ConsistencyBatch, MixMatchBatch, ReMixMatchBatch

Model = nn.Module | Callable[[Tensor], Any]


GuessBatchNorm = Literal["batch", "update", "eval"]


GuessForward = Literal["joint", "separate"]


RunningStats = Literal["first", "last", "all"]


@overload
def interleaved_forward(
    model: nn.Module,
    batch: MixMatchBatch | ConsistencyBatch,
    num_groups: int | None = None,
    *,
    swap: bool = True,
    running_stats: RunningStats = "first",
    logits_getter: Callable[[Any], Tensor] | None = None,
) -> Tensor: ...


@overload
def interleaved_forward(
    model: nn.Module,
    batch: ReMixMatchBatch,
    num_groups: int | None = None,
    *,
    swap: bool = True,
    running_stats: RunningStats = "first",
    logits_getter: Callable[[Any], Tensor | tuple[Tensor, Tensor]] | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def interleaved_forward(
    model: nn.Module,
    batch: MixMatchBatch | ConsistencyBatch | ReMixMatchBatch,
    num_groups: int | None = None,
    *,
    swap: bool = True,
    running_stats: RunningStats = "first",
    logits_getter: Callable[[Any], Any] | None = None,
) -> Any:
    """Run the model on groups of rows that each hold a share of X', as the reference does.

    BatchNorm then normalises groups of about B rows, and its running statistics move once a step,
    from the first group, in which labelled and unlabelled rows meet. ``model(batch.inputs)`` in
    one pass is faster; BatchNorm then sees all N rows together.

    Args:
        model: Maps ``[n, C, H, W]`` to logits ``[n, L]``.
        batch: A batch of N rows, of any method. Of ReMixMatch's, its reference interleaves the
            mixed rows alone and passes the others before; here all rows are.
        num_groups: Number of forward passes; None takes N // B, which is K + 1 for M = B, as in
            the reference.
        swap: Interleave the rows before. False passes X', then U' group by group (USB).
        running_stats: Which groups move BatchNorm's running statistics: the "first" (the
            reference, USB), the "last" (ReMixMatch's reference) or "all" (YU1ut).
        logits_getter: Takes the logits out of what the model returns, or ReMixMatch's pair of
            them; None if it returns these.

    Returns:
        Logits in batch order, ``[N, L]``; a pair of tensors where the model returns one for turned
        rows.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``num_groups`` is not in 1 .. N, or ``running_stats`` is unknown.
    """
    check_model(model)
    check_any_batch(batch)
    length = as_length("batch.inputs", batch.inputs)
    if num_groups is None:
        num_groups = max(1, length // max(batch.num_labelled, 1))
    if length == 0:
        raise ValueError(f"batch must have rows, got {list(batch.inputs.shape)}")
    check_groups(num_groups, length)
    check_choice("running_stats", running_stats, RunningStats)
    swap = as_flag("swap", swap)
    if logits_getter is not None:
        check_callable("logits_getter", logits_getter, "a function or None")
    # copies, either way: a model may write into what it is given
    inputs = functional.interleave(batch.inputs, num_groups) if swap else batch.inputs.clone()
    groups = inputs.tensor_split(num_groups)
    pairs = isinstance(batch, ReMixMatchBatch) and batch.rotations is not None
    parts: list[tuple[Tensor, ...]] = []

    def run(groups: tuple[Tensor, ...], kept: AbstractContextManager[Any]) -> None:
        with kept:
            for group in groups:
                if parts:  # a model may return the same memory every time
                    parts[-1] = tuple(logits.clone() for logits in parts[-1])
                output = model(group)
                output = logits_getter(output) if logits_getter else output
                found = output if pairs and isinstance(output, tuple) else (output,)
                parts.append(tuple(get_logits(logits, None) for logits in found))

    still = _statistics_kept(modules_of(model))
    split = {"first": 1, "last": num_groups - 1, "all": num_groups}[running_stats]
    run(groups[:split], still if running_stats == "last" else contextlib.nullcontext())
    run(groups[split:], still if running_stats == "first" else contextlib.nullcontext())
    joined = [torch.cat(logits) for logits in zip(*parts, strict=True)]
    joined = [functional.interleave(rows, num_groups) for rows in joined] if swap else joined
    return joined[0] if len(joined) == 1 else tuple(joined)


@contextlib.contextmanager
def _statistics_kept(modules: list[nn.Module]) -> Iterator[None]:
    """Normalise as the layers' modes say, and leave running statistics and buffers alone."""
    with norm_flags(modules, tracking=False), buffers_kept(modules):
        yield


def check_model(model: Any) -> None:
    """Raise a TypeError if ``model`` cannot be called on images."""
    check_callable("model", model, "an nn.Module or a function from images to logits")


@contextlib.contextmanager
def guess_mode(model: Model, guess_bn: GuessBatchNorm) -> Iterator[None]:
    """Set the normalisation layers of a model for a guess, and leave all as it came afterwards.

    Args:
        model: Any module, or a function.
        guess_bn: "batch" normalises with batch statistics and leaves every buffer of the model as
            it is, "update" lets them move, "eval" normalises with the running ones.

    Raises:
        ValueError: If a layer was traced or exported in the other mode; the message names it.
    """
    modules = modules_of(model)
    if not modules:
        yield
        return
    check_guessable(modules, guess_bn)
    tracking = False if guess_bn == "batch" else None
    flags = norm_flags(modules, training=guess_bn != "eval", tracking=tracking)
    with flags, buffers_kept([] if guess_bn == "update" else modules):
        yield


def modules_of(model: Model) -> list[nn.Module]:
    """Return all modules behind what is called, as far as they can be seen; a function has none.

    What a builder has learnt, where the model holds the builder, is no part of the model.
    """
    while isinstance(model, functools.partial):
        model = model.func
    owner = getattr(model, "__self__", model)  # of a bound method, such as model.forward
    if not isinstance(owner, nn.Module):
        return []
    # as owner.modules() does, in a third of the time
    found: dict[nn.Module, None] = {}
    left: list[nn.Module | None] = [owner]
    while left:
        module = left.pop()
        if module is not None and module not in found and not isinstance(module, GuessState):
            found[module] = None
            left.extend(reversed(module._modules.values()))
    return list(found)


def get_logits(output: Any, logits_getter: Callable[[Any], Tensor] | None) -> Tensor:
    """Take the logits out of a model's output.

    Raises:
        TypeError: If what is found is not a floating point tensor.
    """
    logits = logits_getter(output) if logits_getter else output
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(
            f"model must return a tensor of logits, got {type(logits).__name__}; pass "
            "logits_getter=lambda output: output.logits, or the like, to take them out"
        )
    return logits


def first_of_pair(output: Any, getter: Callable[[Any], Any] | None = None) -> Any:
    """Take logits out of what a model returns that may be a pair, with those of quarter turns."""
    found = getter(output) if getter else output
    return found[0] if isinstance(found, tuple) and found else found
