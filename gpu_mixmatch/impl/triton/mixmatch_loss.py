"""The loss, one launch forward and one backward: reads logits and targets, writes the gradient.

Forward, each program sums its rows; the one that finishes last adds up the sums of all, in their
order, so that the result does not depend on timing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_mixmatch.impl.triton.classes import log_softmax_rows, strides_of
from gpu_mixmatch.impl.triton.guess_labels import row_tile
from gpu_mixmatch.impl.triton.launch import blocks, launch
from gpu_mixmatch.impl.triton.zeros import zeros


@triton.jit
def _means(num_labelled, num_rows, num_classes):
    """Of how many values the two parts of the loss are means, at least one."""
    unlabelled = (num_rows - num_labelled).to(tl.int64)
    return tl.maximum(num_labelled, 1), tl.maximum(unlabelled * num_classes, 1)


# A batch of another size must not be another kernel: its counts may be 1 or divisible by 16.
# Strides are given where rows do not lie one after the other, as no usual model has them.
_NUMBERS = [
    *("num_labelled", "num_rows"),
    *("stride_row", "stride_class", "stride_targets_row", "stride_targets_class"),
]
_GRADS = ["grad_loss_ptr", "grad_loss_x_ptr", "grad_loss_u_ptr"]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["weight_ptr"])
def mixmatch_loss_kernel(
    loss_ptr,
    loss_x_ptr,
    loss_u_ptr,
    sums_ptr,
    arrived_ptr,
    logits_ptr,
    targets_ptr,
    weight_ptr,
    stride_row,
    stride_class,
    stride_targets_row,
    stride_targets_class,
    num_labelled,
    num_rows,
    num_classes,
    weight,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    SUMS: tl.constexpr,
):
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    row = (program * ROWS + tl.arange(0, ROWS))[:, None]
    cls = tl.arange(0, CLASSES)[None, :]
    mask = (row < num_rows) & (cls < num_classes)
    log_probs, probs, targets = log_softmax_rows(
        row, cls, mask, logits_ptr, targets_ptr, stride_row, stride_class,
        stride_targets_row, stride_targets_class, num_classes,
    )  # fmt: skip
    labelled = row < num_labelled
    cross_entropy = tl.where(mask & labelled, -targets * log_probs, 0.0)
    squared = tl.where(mask & (row >= num_labelled), (probs - targets) * (probs - targets), 0.0)
    tl.store(sums_ptr + program, tl.sum(tl.sum(cross_entropy, axis=1), axis=0))
    tl.store(sums_ptr + num_programs + program, tl.sum(tl.sum(squared, axis=1), axis=0))

    tl.debug_barrier()  # every thread's sums are written before this program arrives
    arrived = tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == num_programs - 1:
        loss_x = tl.zeros([SUMS], sums_ptr.dtype.element_ty)
        loss_u = tl.zeros([SUMS], sums_ptr.dtype.element_ty)
        for start in range(0, num_programs, SUMS):
            offs = start + tl.arange(0, SUMS)
            present = offs < num_programs
            loss_x += tl.load(sums_ptr + offs, mask=present, other=0.0, cache_modifier=".cg")
            loss_u += tl.load(
                sums_ptr + num_programs + offs, mask=present, other=0.0, cache_modifier=".cg"
            )
        count_x, count_u = _means(num_labelled, num_rows, num_classes)
        mean_x = tl.sum(loss_x, axis=0) / count_x
        mean_u = tl.sum(loss_u, axis=0) / count_u
        if weight_ptr is not None:
            weight = tl.load(weight_ptr)
        tl.store(loss_ptr, mean_x + weight * mean_u)
        tl.store(loss_x_ptr, mean_x)
        tl.store(loss_u_ptr, mean_u)
        tl.store(arrived_ptr, 0)  # for the next launch


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["weight_ptr", *_GRADS])
def mixmatch_loss_backward_kernel(
    grad_logits_ptr,
    grad_loss_ptr,
    grad_loss_x_ptr,
    grad_loss_u_ptr,
    logits_ptr,
    targets_ptr,
    weight_ptr,
    stride_row,
    stride_class,
    stride_targets_row,
    stride_targets_class,
    num_labelled,
    num_rows,
    num_classes,
    weight,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    cls = tl.arange(0, CLASSES)[None, :]
    mask = (row < num_rows) & (cls < num_classes)
    _, probs, targets = log_softmax_rows(
        row, cls, mask, logits_ptr, targets_ptr, stride_row, stride_class,
        stride_targets_row, stride_targets_class, num_classes,
    )  # fmt: skip
    if weight_ptr is not None:
        weight = tl.load(weight_ptr)
    grad_x, grad_u = 0.0, 0.0
    if grad_loss_ptr is not None:
        grad_x += tl.load(grad_loss_ptr)
        grad_u += weight * tl.load(grad_loss_ptr)
    if grad_loss_x_ptr is not None:
        grad_x += tl.load(grad_loss_x_ptr)
    if grad_loss_u_ptr is not None:
        grad_u += tl.load(grad_loss_u_ptr)
    count_x, count_u = _means(num_labelled, num_rows, num_classes)
    of_x = probs * tl.sum(targets, axis=1)[:, None] - targets
    missed = tl.where(cls < num_classes, probs - targets, 0.0)
    of_u = probs * (missed - tl.sum(missed * probs, axis=1)[:, None])
    grad = tl.where(row < num_labelled, grad_x / count_x * of_x, 2.0 * grad_u / count_u * of_u)
    at = grad_logits_ptr + row.to(tl.int64) * num_classes + cls
    tl.store(at, grad.to(grad_logits_ptr.dtype.element_ty), mask=mask)


def mixmatch_loss(
    logits: Tensor,
    targets: Tensor,
    num_labelled: int,
    weight_u: Tensor,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    classes, rows, num_warps = row_tile(logits.shape[1])
    programs = max(blocks(logits.shape[0], rows), 1)
    sums = torch.empty((2, programs), dtype=out[0].dtype, device=logits.device)
    launch(
        mixmatch_loss_kernel,
        programs,
        logits.device,
        *out,
        sums,
        zeros(logits.device),  # where programs count themselves in
        *_arguments(logits, targets, num_labelled, weight_u),
        ROWS=rows,
        CLASSES=classes,
        SUMS=128,
        num_warps=num_warps,
    )


def mixmatch_loss_backward(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    logits: Tensor,
    targets: Tensor,
    num_labelled: int,
    weight_u: Tensor,
    out: Tensor,
) -> None:
    classes, rows, num_warps = row_tile(logits.shape[1])
    launch(
        mixmatch_loss_backward_kernel,
        blocks(logits.shape[0], rows),
        logits.device,
        out,
        *grads,
        *_arguments(logits, targets, num_labelled, weight_u),
        ROWS=rows,
        CLASSES=classes,
        num_warps=num_warps,
    )


def _arguments(
    logits: Tensor, targets: Tensor, num_labelled: int, weight_u: Tensor
) -> tuple[object, ...]:
    num_rows, num_classes = logits.shape
    on_host = weight_u.is_cpu  # a weight on the device is not read back
    return (
        logits,
        targets,
        None if on_host else weight_u,
        *strides_of(logits),
        *strides_of(targets),
        num_labelled,
        num_rows,
        num_classes,
        float(weight_u) if on_host else 0.0,
    )
