"""The operations of `functional` on arguments that are known to fit: allocate, choose, call.

`functional` comes here when it has checked what a user gave. Builders and engines come here with
what they checked when they were made, or made themselves: on a GPU the checks take the host longer
than the kernels take the device.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from gpu_mixmatch import _streams
from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch._chain import num_columns
from gpu_mixmatch._keys import CountedKey
from gpu_mixmatch._validation import as_step, check_rows
from gpu_mixmatch.impl import resolve_impl
from gpu_mixmatch.impl.library import running
from gpu_mixmatch.sampling.draws import drawn_batch
from gpu_mixmatch.sampling.packing import unpacked, words_per_row
from gpu_mixmatch.types import DrawPlan, Draws, Geometry, Impl, MixUpParams, Scaling, Weighting


def draw_batch(
    seed: int,
    step: Tensor,
    ids_x: Tensor | int,
    ids_u: Tensor | int,
    plan: DrawPlan,
    *,
    device: torch.device,
    key: Tensor | CountedKey | None,
    impl: Impl,
) -> tuple[Draws | None, MixUpParams]:
    """See `functional.draw_batch`."""
    if key is None:
        _streams.refuse_capture(
            device,
            "a CUDA graph would draw the same batch in every replay, since seed and step come from "
            "the host: capture with gpu_mixmatch.capture, or pass key=, seed and step on the "
            "device, and fill it before each replay",
        )
    policy = plan.policy
    num_x, num_u = (ids if isinstance(ids, int) else ids.shape[0] for ids in (ids_x, ids_u))
    num_rows, has_policy = num_x + plan.num_augmentations * num_u, policy is not None
    check_rows("ids_x and ids_u", num_rows)
    number: Tensor | int = step
    if not torch.compiler.is_compiling():  # else the op reads it when it runs
        number = as_step(step)
        if device.type == "cpu" and resolve_impl(impl, device) != "triton":
            if key is not None:
                raise ValueError("key must be None where kernels do not draw, got a tensor")
            return drawn_batch(seed, number, ids_x, ids_u, plan)
    drawn = num_columns(policy)
    words = words_per_row(with_augment=has_policy, chain_columns=drawn)
    out = torch.empty(words * num_rows, dtype=torch.int32, device=device)
    seed_and_step = (seed, number) if key is None else key
    running(impl, device).draw_batch(seed_and_step, ids_x, ids_u, plan, out)
    return unpacked(out, num_rows, with_augment=has_policy, chain_columns=drawn)


def batch_targets(
    y: Tensor,
    logits: Tensor,
    temperature: float,
    label_smoothing: float,
    mixup: MixUpParams | None,
    impl: Impl,
) -> Tensor:
    """See `functional.batch_targets`."""
    num_views, num_images, num_classes = logits.shape
    device = logits.device
    shape = (y.shape[0] + num_views * num_images, num_classes)
    out = torch.empty(shape, dtype=torch.float32, device=device)
    running(impl, device).batch_targets(y, logits, temperature, label_smoothing, mixup, out)
    return out


def guess_statistics(logits: Tensor, y: Tensor, impl: Impl) -> Tensor:
    """See `Implementation.guess_statistics`."""
    out = torch.empty(4 + 3 * logits.shape[1], dtype=torch.int64, device=logits.device)
    running(impl, logits.device).guess_statistics(logits, y, out)
    return out


def consistency_targets(
    y: Tensor,
    logits: Tensor,
    weighting: Weighting,
    label_smoothing: float,
    num_strong: int,
    impl: Impl,
) -> tuple[Tensor, Tensor]:
    """See `functional.consistency_targets`."""
    num_u, num_classes = logits.shape
    rows, device = y.shape[0] + num_strong * num_u, logits.device
    targets = torch.empty((rows, num_classes), dtype=torch.float32, device=device)
    weights = torch.empty(rows, dtype=torch.float32, device=device)
    out = targets, weights
    running(impl, device).consistency_targets(y, logits, weighting, label_smoothing, out)
    return out


def mixup(
    inputs: Tensor, targets: Tensor, params: MixUpParams, out: Tensor | None, impl: Impl
) -> tuple[Tensor, Tensor]:
    """See `functional.mixup`."""
    mixed = torch.empty_like(inputs) if out is None else out
    mixed_targets = torch.empty_like(targets)
    running(impl, inputs.device).mixup(inputs, targets, params, mixed, mixed_targets)
    _count_write(out)
    return mixed, mixed_targets


def augment(
    sources: tuple[Tensor, ...],
    params: Draws,
    geometry: Geometry,
    scaling: Scaling,
    *,
    shape: tuple[int, int, int, int],
    channels_last_in: bool,
    dtype: torch.dtype,
    channels_last: bool,
    mixup: MixUpParams | None,
    out: Tensor | None,
    workspace: Workspace | None,
    impl: Impl,
) -> Tensor:
    """See `functional.augment`; ``shape`` is that of the views."""
    device = sources[0].device
    if out is None:
        order = torch.channels_last if channels_last else torch.contiguous_format
        views = torch.empty(shape, dtype=dtype, device=device, memory_format=order)
    else:
        views = out
    with _without_autocast(device):
        running(impl, device).augment(
            sources,
            params,
            geometry,
            scaling,
            channels_last_in=channels_last_in,
            out=views,
            workspace=workspace,
            mixup=mixup,
        )
    _count_write(out)
    return views


def _count_write(out: Tensor | None) -> None:
    """Tell autograd of a write by a kernel or a compiled loop, which it does not see."""
    if out is not None and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(out)


_UNCHANGED = nullcontext()


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products stay in float32 where the caller's autocast would make them half precision."""
    kind = device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return _UNCHANGED
