"""The loss of weighed rows, one launch forward and one backward, as in `mixmatch_loss`.

Reads logits, targets and a weight per row, writes the gradient. Forward, each program adds up its
rows; the one that finishes last adds up the sums of all, in their order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_mixmatch.impl.triton.classes import log_softmax_rows, strides_of
from gpu_mixmatch.impl.triton.guess_labels import row_tile
from gpu_mixmatch.impl.triton.launch import blocks, launch
from gpu_mixmatch.impl.triton.zeros import zeros
from gpu_mixmatch.types import UnlabelledLoss

# Of x, u, v, rows that are kept, weights, and rows of x that do not know their label yet.
_NUM_SUMS = tl.constexpr(6)


@triton.jit
def _unknown(probs, targets, tsa_ptr, tsa, HAS_TSA: tl.constexpr):
    """1 for rows of x whose targets are not yet too probable, else 0, ``[ROWS]``."""
    right = tl.sum(probs * targets, axis=1)
    if HAS_TSA:
        if tsa_ptr is not None:
            tsa = tl.load(tsa_ptr)
        return (right <= tsa).to(right.dtype)
    return tl.full(right.shape, 1.0, right.dtype)


# A batch of another size must not be another kernel: its counts may be 1 or divisible by 16, and
# rows, slices often, may begin anywhere. Strides are given where rows do not lie one after the
# other, as no usual model has them.
_NUMBERS = [
    *("num_x", "end_u", "num_rows", "stride_weights"),
    *("stride_row", "stride_class", "stride_targets_row", "stride_targets_class"),
]
_ANYWHERE = ["logits_ptr", "targets_ptr", "weights_ptr", "weight_ptr", "tsa_ptr", "count_x_ptr"]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_ANYWHERE)
def consistency_loss_kernel(
    out_ptr,
    sums_ptr,
    arrived_ptr,
    count_x_ptr,
    logits_ptr,
    targets_ptr,
    weights_ptr,
    weight_ptr,
    tsa_ptr,
    stride_row,
    stride_class,
    stride_targets_row,
    stride_targets_class,
    stride_weights,
    num_x,
    end_u,
    num_rows,
    num_classes,
    weight,
    share_v,
    tsa,
    LOSS_U: tl.constexpr,
    HAS_TSA: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    SUMS: tl.constexpr,
):
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    row = program * ROWS + tl.arange(0, ROWS)
    cls = tl.arange(0, CLASSES)[None, :]
    mask = (row < num_rows)[:, None] & (cls < num_classes)
    log_probs, probs, targets = log_softmax_rows(
        row[:, None], cls, mask, logits_ptr, targets_ptr, stride_row, stride_class,
        stride_targets_row, stride_targets_class, num_classes,
    )  # fmt: skip
    weights = tl.load(weights_ptr + row.to(tl.int64) * stride_weights, mask=row < num_rows, other=0)
    cross_entropy = -tl.sum(targets * log_probs, axis=1)
    unknown = _unknown(probs, targets, tsa_ptr, tsa, HAS_TSA)
    of_rows = cross_entropy
    if LOSS_U == "kl":
        some = tl.where(targets > 0, targets, 1.0)  # 0 · log 0 = 0 = 1 · log 1
        of_rows += tl.sum(some * tl.log(some), axis=1)
    elif LOSS_U == "mse":
        missed = tl.where(cls < num_classes, probs - targets, 0.0)
        of_rows = tl.sum(missed * missed, axis=1) / num_classes
    in_x, in_u = row < num_x, (row >= num_x) & (row < end_u)
    in_v = (row >= end_u) & (row < num_rows)
    of_x = tl.where(in_x, weights * cross_entropy * unknown, 0.0)
    of_u = tl.where(in_u, weights * of_rows, 0.0)
    of_v = tl.where(in_v, weights * of_rows, 0.0)
    weights = tl.where(in_x, 0.0, weights)
    sums_ptr += program
    tl.store(sums_ptr, tl.sum(of_x, axis=0))
    tl.store(sums_ptr + num_programs, tl.sum(of_u, axis=0))
    tl.store(sums_ptr + 2 * num_programs, tl.sum(of_v, axis=0))
    tl.store(sums_ptr + 3 * num_programs, tl.sum((weights > 0).to(tl.float32), axis=0))
    tl.store(sums_ptr + 4 * num_programs, tl.sum(weights, axis=0))
    tl.store(sums_ptr + 5 * num_programs, tl.sum(tl.where(in_x, unknown, 0.0), axis=0))

    tl.debug_barrier()  # every thread's sums are written before this program arrives
    arrived = tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == num_programs - 1:
        sums_ptr -= program
        number = tl.arange(0, 8)
        at = sums_ptr + number.to(tl.int64)[:, None] * num_programs
        totals = tl.zeros([8, SUMS], sums_ptr.dtype.element_ty)
        for start in range(0, num_programs, SUMS):
            offs = (start + tl.arange(0, SUMS))[None, :]
            present = (number < _NUM_SUMS)[:, None] & (offs < num_programs)
            totals += tl.load(at + offs, mask=present, other=0.0, cache_modifier=".cg")
        totals = tl.sum(totals, axis=1)
        count_x = tl.sum(tl.where(number == 5, totals, 0.0), axis=0)
        of_parts = tl.where(number == 1, end_u - num_x, num_rows - num_x)
        of_parts = tl.where(number == 2, num_rows - end_u, of_parts).to(totals.dtype)
        means = totals / tl.maximum(tl.where(number == 0, count_x, of_parts), 1.0)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr)
        factors = tl.where(number == 1, weight, tl.where(number == 2, weight * share_v, 1.0))
        loss = tl.sum(tl.where(number < 3, factors * means, 0.0), axis=0)
        tl.store(out_ptr, loss)
        tl.store(out_ptr + 1 + number, means, mask=number < 5)
        if count_x_ptr is not None:
            tl.store(count_x_ptr, count_x)
        tl.store(arrived_ptr, 0)  # for the next launch


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["grads_ptr", *_ANYWHERE])
def consistency_loss_backward_kernel(
    grad_logits_ptr,
    grads_ptr,
    count_x_ptr,
    logits_ptr,
    targets_ptr,
    weights_ptr,
    weight_ptr,
    tsa_ptr,
    stride_row,
    stride_class,
    stride_targets_row,
    stride_targets_class,
    stride_weights,
    num_x,
    end_u,
    num_rows,
    num_classes,
    weight,
    share_v,
    tsa,
    LOSS_U: tl.constexpr,
    HAS_TSA: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cls = tl.arange(0, CLASSES)[None, :]
    mask = (row < num_rows)[:, None] & (cls < num_classes)
    _, probs, targets = log_softmax_rows(
        row[:, None], cls, mask, logits_ptr, targets_ptr, stride_row, stride_class,
        stride_targets_row, stride_targets_class, num_classes,
    )  # fmt: skip
    unknown = _unknown(probs, targets, tsa_ptr, tsa, HAS_TSA)
    grad = probs * tl.sum(targets, axis=1)[:, None] - targets
    if LOSS_U == "mse":
        missed = tl.where(cls < num_classes, probs - targets, 0.0)
        of_squares = probs * (missed - tl.sum(missed * probs, axis=1)[:, None])
        grad = tl.where((row < num_x)[:, None], grad, 2.0 / num_classes * of_squares)
    weights = tl.load(weights_ptr + row.to(tl.int64) * stride_weights, mask=row < num_rows, other=0)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr)
    weight *= tl.load(grads_ptr)
    grad_x = tl.load(grads_ptr) + tl.load(grads_ptr + 1)
    grad_u = weight + tl.load(grads_ptr + 2)
    grad_v = share_v * weight + tl.load(grads_ptr + 3)
    count_x = tl.maximum(num_x, 1).to(probs.dtype)
    if HAS_TSA:
        count_x = tl.maximum(tl.load(count_x_ptr), 1.0).to(probs.dtype)
    of_x = grad_x / count_x * unknown
    of_u = tl.where(
        row < end_u,
        grad_u / tl.maximum(end_u - num_x, 1).to(probs.dtype),
        grad_v / tl.maximum(num_rows - end_u, 1).to(probs.dtype),
    )
    factors = weights * tl.where(row < num_x, of_x, of_u)
    at = grad_logits_ptr + row.to(tl.int64)[:, None] * num_classes + cls
    grad = factors[:, None] * grad
    tl.store(at, grad.to(grad_logits_ptr.dtype.element_ty), mask=mask)


def consistency_loss(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    parts: tuple[int, int],
    weight_u: Tensor,
    share_v: float,
    loss_u: UnlabelledLoss,
    tsa: Tensor | None,
    out: Tensor,
    count_x: Tensor | None = None,
) -> None:
    classes, rows, num_warps = row_tile(logits.shape[1])
    programs = max(blocks(logits.shape[0], rows), 1)
    launch(
        consistency_loss_kernel,
        programs,
        logits.device,
        out,
        torch.empty((_NUM_SUMS.value, programs), dtype=out.dtype, device=logits.device),
        zeros(logits.device),  # where programs count themselves in
        count_x,
        *_arguments(logits, targets, weights, parts, weight_u, share_v, tsa),
        LOSS_U=loss_u,
        HAS_TSA=tsa is not None,
        ROWS=rows,
        CLASSES=classes,
        SUMS=128,
        num_warps=num_warps,
    )


def consistency_loss_backward(
    grads: Tensor,
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    parts: tuple[int, int],
    weight_u: Tensor,
    share_v: float,
    loss_u: UnlabelledLoss,
    tsa: Tensor | None,
    count_x: Tensor | None,
    out: Tensor,
) -> None:
    classes, rows, num_warps = row_tile(logits.shape[1])
    launch(
        consistency_loss_backward_kernel,
        blocks(logits.shape[0], rows),
        logits.device,
        out,
        grads,
        count_x,
        *_arguments(logits, targets, weights, parts, weight_u, share_v, tsa),
        LOSS_U=loss_u,
        HAS_TSA=tsa is not None,
        ROWS=rows,
        CLASSES=classes,
        num_warps=num_warps,
    )


def _arguments(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    parts: tuple[int, int],
    weight_u: Tensor,
    share_v: float,
    tsa: Tensor | None,
) -> tuple[object, ...]:
    weight_ptr, weight = _number(weight_u)
    tsa_ptr, most = (None, 0.0) if tsa is None else _number(tsa)
    return (
        logits,
        targets,
        weights,
        weight_ptr,
        tsa_ptr,
        *strides_of(logits),
        *strides_of(targets),
        weights.stride(0),
        *parts,
        *logits.shape,
        weight,
        float(share_v),
        most,
    )


def _number(tensor: Tensor) -> tuple[Tensor | None, float]:
    """A pointer or a number: what is on the device is not read back."""
    return (None, float(tensor)) if tensor.is_cpu else (tensor, 0.0)
