"""Targets and weights of a batch in one launch: reads labels and a row of logits per image.

Labelled rows are one-hot, smoothed, of weight 1. A guess is made once and written for each strong
view. What its weight depends on, the averages or counts of all classes, each program reads whole.
"""

import triton
import triton.language as tl
from torch import Tensor

from gpu_mixmatch.impl.triton.classes import largest, probabilities, quotient, shifted_logits
from gpu_mixmatch.impl.triton.guess_labels import known_labels, row_tile
from gpu_mixmatch.impl.triton.launch import blocks, launch
from gpu_mixmatch.types import Weighting

_LOG2_E = tl.constexpr(1.4426950408889634)
_TINY = tl.constexpr(2.0**-126)


@triton.jit
def _weights(probs, cls, state_ptr, num_classes, threshold, variances, RULE: tl.constexpr):
    """Weights of rows of aligned guesses, ``[ROWS]``."""
    confidence, label = largest(probs, cls, num_classes)
    if RULE == "soft":
        below = tl.minimum(confidence - tl.load(state_ptr), 0.0)
        below = tl.where(confidence == confidence, below, confidence)
        # of no variance: what lies at the mean weighs 1, what lies below 0
        width = tl.maximum(2.0 * tl.load(state_ptr + 1) / variances, _TINY)
        return tl.exp(-below * below / width).to(tl.float32)
    if RULE == "fixed":
        least = threshold
    elif RULE == "free":
        mean_ptr = state_ptr + 2
        of_class = tl.load(mean_ptr + label) * tl.load(state_ptr)
        means = tl.load(mean_ptr + cls, mask=cls < num_classes, other=0.0)
        least = quotient(of_class, tl.max(means, axis=1))
    else:  # counts, the last that of no class
        counts = tl.load(state_ptr + cls, mask=cls < num_classes, other=0)
        most = tl.maximum(tl.max(counts, axis=1), tl.load(state_ptr + num_classes))
        most = tl.maximum(most, 1).to(tl.float32)
        learnt = quotient(tl.load(state_ptr + label).to(tl.float32), most)
        least = quotient(threshold * learnt, 2.0 - learnt)
    return (confidence.to(tl.float32) >= least).to(tl.float32)


# A batch of another size must not be another kernel: its counts may be 1 or divisible by 16, and
# what it reads and writes, slices often, may begin anywhere. The strides are the layout's.
_ANYWHERE = ["out_ptr", "weights_ptr", "y_ptr", "logits_ptr", "state_ptr", "ratio_ptr"]


@triton.jit(do_not_specialize=["num_x", "num_u"], do_not_specialize_on_alignment=_ANYWHERE)
def consistency_targets_kernel(
    out_ptr,
    weights_ptr,
    y_ptr,
    logits_ptr,
    state_ptr,
    ratio_ptr,
    stride_y,
    stride_y_class,
    stride_image,
    stride_class,
    num_x,
    num_u,
    num_views,
    num_classes,
    smoothing,
    sharpness,
    threshold,
    variances,
    SOFT_LABELS: tl.constexpr,
    HARD: tl.constexpr,
    ALIGNED_TARGETS: tl.constexpr,
    RULE: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = place[:, None]
    cls = tl.arange(0, CLASSES)[None, :]
    guessed = (row >= num_x) & (row < num_x + num_u)
    image = tl.where(guessed, row - num_x, 0).to(tl.int64)
    at = logits_ptr + image * stride_image + cls * tl.cast(stride_class, tl.int64)
    shifted = shifted_logits(at, cls, guessed, num_classes)
    probs = probabilities(shifted)
    aligned = probs
    if ratio_ptr is not None:
        ratio = tl.load(ratio_ptr + cls, mask=cls < num_classes, other=1.0)
        aligned = probs * ratio
        aligned = quotient(aligned, tl.sum(aligned, axis=1)[:, None])
    if HARD:
        _, label = largest(aligned if ALIGNED_TARGETS else probs, cls, num_classes)
        targets = (cls == label[:, None]).to(tl.float32)
    else:
        # p^(1/T) / Σ p^(1/T) by logarithms, in which no power underflows
        powers = shifted * _LOG2_E
        if ratio_ptr is not None and ALIGNED_TARGETS:
            powers += tl.log2(ratio)
            powers -= tl.max(powers, axis=1)[:, None]
        powers = tl.exp2(powers * sharpness)
        targets = quotient(powers, tl.sum(powers, axis=1)[:, None]).to(tl.float32)
    known = known_labels(
        row, cls, row < num_x, y_ptr, stride_y, stride_y_class, smoothing, num_classes, SOFT_LABELS
    )
    targets = tl.where(guessed, targets, known)
    weights = _weights(aligned, cls, state_ptr, num_classes, threshold, variances, RULE)
    weights = tl.where(place < num_x, 1.0, weights)
    for view in range(num_views):
        # x has one view
        stored = (place < num_x + num_u) & ((place >= num_x) | (view == 0))
        views_row = place + view * num_u
        tl.store(weights_ptr + views_row, weights, mask=stored)
        target_ptr = out_ptr + views_row.to(tl.int64)[:, None] * num_classes + cls
        tl.store(target_ptr, targets, mask=stored[:, None] & (cls < num_classes))


def consistency_targets(
    y: Tensor,
    logits: Tensor,
    weighting: Weighting,
    label_smoothing: float,
    out: tuple[Tensor, Tensor],
) -> None:
    temperature, rule, threshold, state, spread, ratio, aligned_targets = weighting
    num_u, num_classes = logits.shape
    soft = y.dim() == 2
    classes, rows, num_warps = row_tile(num_classes)
    launch(
        consistency_targets_kernel,
        blocks(len(y) + num_u, rows),
        logits.device,
        *out,
        y,
        logits,
        state,
        ratio,
        y.stride(0),
        y.stride(1) if soft else 0,
        *logits.stride(),
        len(y),
        num_u,
        (len(out[0]) - len(y)) // num_u if num_u else 1,
        num_classes,
        label_smoothing,
        min(1.0 / temperature, 3e38) if temperature else 0.0,
        float(threshold),
        float(spread**2),
        SOFT_LABELS=soft,
        HARD=temperature == 0,
        ALIGNED_TARGETS=aligned_targets,
        RULE=rule,
        ROWS=rows,
        CLASSES=classes,
        num_warps=num_warps,
    )
