"""How the model is run: for a guess, and on a mixed batch."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gpu_mixmatch import functional
from gpu_mixmatch._validation import (
    as_flag,
    as_length,
    check_batch,
    check_callable,
    check_choice,
    check_groups,
)
from gpu_mixmatch.types import MixMatchBatch

Model = nn.Module | Callable[[Tensor], Any]


GuessBatchNorm = Literal["batch", "update", "eval"]


GuessForward = Literal["joint", "separate"]


RunningStats = Literal["first", "all"]


def interleaved_forward(
    model: nn.Module,
    batch: MixMatchBatch,
    num_groups: int | None = None,
    *,
    swap: bool = True,
    running_stats: RunningStats = "first",
    logits_getter: Callable[[Any], Tensor] | None = None,
) -> Tensor:
    """Run the model on groups of rows that each hold a share of X', as the reference does.

    BatchNorm then normalises groups of about B rows, and its running statistics move once a step,
    from the first group, in which labelled and unlabelled rows meet. ``model(batch.inputs)`` in
    one pass is faster; BatchNorm then sees all N rows together.

    Args:
        model: Maps ``[n, C, H, W]`` to logits ``[n, L]``.
        batch: A batch of N rows.
        num_groups: Number of forward passes; None takes N // B, which is K + 1 for M = B, as in
            the reference.
        swap: Interleave the rows before. False passes X', then U' group by group (USB).
        running_stats: Which groups move BatchNorm's running statistics: the "first" (the
            reference, USB) or "all" (YU1ut).
        logits_getter: Takes the logits out of what the model returns; None if it returns them.

    Returns:
        Logits in batch order, ``[N, L]``.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``num_groups`` is not in 1 .. N, or ``running_stats`` is unknown.
    """
    check_model(model)
    check_batch(batch)
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
    inputs = functional.interleave(batch.inputs, num_groups) if swap else batch.inputs
    first, *others = inputs.tensor_split(num_groups)
    logits = [get_logits(model(first), logits_getter)]
    tracking = None if running_stats == "all" else False
    with batch_norm_flags(model, tracking=tracking):
        logits += [get_logits(model(group), logits_getter) for group in others]
    rows = torch.cat(logits)
    return functional.interleave(rows, num_groups) if swap else rows


def check_model(model: Any) -> None:
    """Raise a TypeError if ``model`` cannot be called on images."""
    check_callable("model", model, "an nn.Module or a function from images to logits")


def guess_mode(model: Model, guess_bn: GuessBatchNorm) -> contextlib.AbstractContextManager[None]:
    """Set the BatchNorm layers of ``model`` for a guess, and put them back afterwards.

    Args:
        model: Any module, of which other layers are left alone, or a function.
        guess_bn: "batch" normalises with batch statistics and leaves the running ones alone,
            "update" lets them move, "eval" normalises with the running ones.
    """
    if guess_bn == "batch":
        return batch_norm_flags(model, training=True, tracking=False)
    return batch_norm_flags(model, training=guess_bn == "update")


@contextlib.contextmanager
def batch_norm_flags(
    model: Model, *, training: bool | None = None, tracking: bool | None = None
) -> Iterator[None]:
    """Set flags of all BatchNorm layers for a while; None leaves a flag as it is.

    A layer in training mode that does not track normalises with batch statistics, and neither
    reads nor writes its running ones.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()  # a function has none
    layers = [module for module in modules if isinstance(module, _BatchNorm)]
    flags = [(layer.training, layer.track_running_stats) for layer in layers]
    try:
        for layer, (_, tracked) in zip(layers, flags, strict=True):
            layer.training = layer.training if training is None else training
            layer.track_running_stats = tracked and tracking is not False
        yield
    finally:
        for layer, (trained, tracked) in zip(layers, flags, strict=True):
            layer.training, layer.track_running_stats = trained, tracked


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
