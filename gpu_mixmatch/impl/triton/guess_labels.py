"""Targets of a batch in one launch: reads labels and K rows of logits, writes a row of targets.

Labelled rows are one-hot, smoothed; unlabelled ones softmax, mean over the views, sharpening. All
K views of an image get the same row. With ``mixup`` each row is blended with its partner's.
"""

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from gpu_mixmatch.impl.triton.launch import blocks, launch
from gpu_mixmatch.impl.triton.rows import image_of, inverse
from gpu_mixmatch.types import MOST_CLASSES, MixUpParams

# the logarithm of no probability; finite, so that no NaN comes of it
_NOTHING = tl.constexpr(-1e30)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def known_labels(
    row, cls, mask, y_ptr, stride_y, stride_y_class, smoothing, num_classes,
    SOFT_LABELS: tl.constexpr,
):  # fmt: skip
    """Smoothed labels of rows of x, ``[ROWS, CLASSES]``; ``mask`` holds where there are any."""
    row = tl.where(mask, row, 0).to(tl.int64)
    if SOFT_LABELS:
        at = row * stride_y + cls * tl.cast(stride_y_class, tl.int64)
        known = tl.load(y_ptr + at, mask=mask & (cls < num_classes), other=0.0).to(tl.float32)
    else:
        known = (tl.load(y_ptr + row * stride_y, mask=mask, other=-1) == cls).to(tl.float32)
    return known + smoothing * (1.0 / num_classes - known)


@triton.jit
def _with_view(most, total, at, cls, mask, num_classes):
    """Add a view's probabilities to a sum that is ``total`` · 2^``most``, in log space."""
    logits = tl.load(at, mask=mask, other=0.0).to(total.dtype)
    logits = tl.where(cls < num_classes, logits, float("-inf"))
    largest = tl.maximum(tl.max(logits, axis=1), -3e38)[:, None]  # finite where all are -inf
    logits = (logits - largest) * _LOG2_E
    log_probs = logits - tl.log2(tl.sum(tl.exp2(logits), axis=1))[:, None]
    highest = tl.maximum(most, log_probs)
    return highest, total * tl.exp2(most - highest) + tl.exp2(log_probs - highest)


@triton.jit
def _sharpened(most, total, sharpness):
    """Softmax of ``sharpness`` · log of the sum over views; the mean has the same one."""
    log_sum = most + tl.log2(total)
    above = log_sum - tl.max(log_sum, axis=1)[:, None]
    powers = tl.exp2(above * sharpness)
    return (powers / tl.sum(powers, axis=1)[:, None]).to(tl.float32)


# A batch of another size must not be another kernel: its counts may be 1 or divisible by 16, and
# labels and draws, slices often, may begin anywhere. The other strides are the layout's.
_NUMBERS = ["stride_view", "num_x", "num_u", "inverse_u", "num_rows"]


@triton.jit(
    do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["y_ptr", "lam_ptr", "index_ptr"]
)
def guess_labels_kernel(
    out_ptr,
    y_ptr,
    logits_ptr,
    lam_ptr,
    index_ptr,
    stride_y,
    stride_y_class,
    stride_view,
    stride_image,
    stride_class,
    num_x,
    num_u,
    inverse_u,
    num_views,
    num_rows,
    num_classes,
    sharpness,
    smoothing,
    SOFT_LABELS: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    WIDE: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    cls = tl.arange(0, CLASSES)[None, :]
    inside = row < num_rows
    mask = inside & (cls < num_classes)
    # products that may not fit into int32
    stride_view = tl.cast(stride_view, tl.int64)
    logits_ptr += cls * tl.cast(stride_class, tl.int64)
    most, total = tl.full([ROWS, CLASSES], _NOTHING, WIDE), tl.full([ROWS, CLASSES], 1.0, WIDE)
    # a row and its partner in one loop: neither waits for the other
    labelled, image = image_of(row, num_x, num_u, inverse_u)
    at, guessed = logits_ptr + image.to(tl.int64) * stride_image, mask & (row >= num_x)
    if index_ptr is not None:
        partner = tl.load(index_ptr + row, mask=inside, other=0).to(tl.int32)
        lam = tl.load(lam_ptr + row, mask=inside, other=1.0)
        labelled_2, image = image_of(partner, num_x, num_u, inverse_u)
        at_2, guessed_2 = logits_ptr + image.to(tl.int64) * stride_image, mask & (partner >= num_x)
        most_2, total_2 = most, total
    if y_ptr is not None:
        known = known_labels(
            row, cls, inside & labelled, y_ptr, stride_y, stride_y_class, smoothing, num_classes,
            SOFT_LABELS,
        )  # fmt: skip
        if index_ptr is not None:
            known_2 = known_labels(
                partner, cls, inside & labelled_2, y_ptr, stride_y, stride_y_class, smoothing,
                num_classes, SOFT_LABELS,
            )  # fmt: skip
    for view in range(num_views):
        offset = view * stride_view
        most, total = _with_view(most, total, at + offset, cls, guessed, num_classes)
        if index_ptr is not None:
            most_2, total_2 = _with_view(
                most_2, total_2, at_2 + offset, cls, guessed_2, num_classes
            )
    targets = _sharpened(most, total, sharpness)
    if y_ptr is not None:
        targets = tl.where(labelled, known, targets)
    if index_ptr is not None:
        theirs = _sharpened(most_2, total_2, sharpness)
        if y_ptr is not None:
            theirs = tl.where(labelled_2, known_2, theirs)
        targets = theirs + lam * (targets - theirs)
    tl.store(out_ptr + row.to(tl.int64) * num_classes + cls, targets, mask=mask)


def guess_labels(logits: Tensor, temperature: float, out: Tensor) -> None:
    _launch(None, logits, temperature, 0.0, None, out)


def batch_targets(
    y: Tensor,
    logits: Tensor,
    temperature: float,
    label_smoothing: float,
    mixup: MixUpParams | None,
    out: Tensor,
) -> None:
    _launch(y, logits, temperature, label_smoothing, mixup, out)


def _launch(
    y: Tensor | None,
    logits: Tensor,
    temperature: float,
    label_smoothing: float,
    mixup: MixUpParams | None,
    out: Tensor,
) -> None:
    num_rows, num_classes = out.shape
    num_views, num_images, _ = logits.shape
    classes, rows, num_warps = row_tile(num_classes)
    soft = y is not None and y.dim() == 2
    launch(
        guess_labels_kernel,
        blocks(num_rows, rows),
        out.device,
        out,
        y,
        logits,
        mixup.lam if mixup else None,
        mixup.index if mixup else None,
        0 if y is None else y.stride(0),
        y.stride(1) if y is not None and soft else 0,
        *logits.stride(),
        0 if y is None else len(y),
        num_images,
        inverse(num_images),
        num_views,
        num_rows,
        num_classes,
        min(1.0 / temperature, 3e38),
        label_smoothing,
        SOFT_LABELS=soft,
        ROWS=rows,
        CLASSES=classes,
        num_warps=num_warps,
    )


@lru_cache(maxsize=64)
def row_tile(num_classes: int) -> tuple[int, int, int]:
    """Columns, rows and warps of a tile that holds whole rows of classes.

    Raises:
        ValueError: If there are too many classes for one.
    """
    if num_classes > MOST_CLASSES:
        raise ValueError(
            f'logits must have at most {MOST_CLASSES} classes for impl="triton", '
            f'got {num_classes}; use impl="eager"'
        )
    columns = max(triton.next_power_of_2(num_classes), 2)
    # a lane has one value of few classes, four of many: what follows from each other is short
    rows = max(1, 32 // columns)
    return columns, rows, min(max(rows * columns // 128, 1), 16)
