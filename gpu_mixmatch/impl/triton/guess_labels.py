"""Targets of a batch in one launch: reads labels and K rows of logits, writes a row of targets.

Labelled rows are one-hot, smoothed; unlabelled ones softmax, mean over the views, sharpening. All
K views of an image get the same row. With ``mixup`` each row is blended with its partner's.
"""

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from gpu_mixmatch.impl.triton.launch import blocks, launch
from gpu_mixmatch.types import MOST_CLASSES, MixUpParams

# the logarithm of no probability; finite, so that no NaN comes of it
_NOTHING = tl.constexpr(-1e30)


@triton.jit
def _log_sum_exp(values):
    most = tl.maximum(tl.max(values, axis=1), -3e38)[:, None]  # finite where all are -inf
    return most + tl.log(tl.sum(tl.exp(values - most), axis=1))[:, None]


@triton.jit
def _targets(
    row,
    cls,
    mask,
    y_ptr,
    logits_ptr,
    stride_y,
    stride_y_class,
    stride_view,
    stride_image,
    stride_class,
    num_x,
    num_u,
    num_views,
    num_classes,
    temperature,
    smoothing,
    SOFT_LABELS: tl.constexpr,
):
    """Targets of rows ``row`` ``[ROWS, 1]`` of W, ``[ROWS, CLASSES]``."""
    WIDE: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    labelled = row < num_x
    image = tl.where(labelled, 0, (row - num_x) % tl.maximum(num_u, 1)).to(tl.int64)
    guessed = mask & (row >= num_x)
    log_sum = tl.full(mask.shape, _NOTHING, WIDE)
    # products that may not fit into int32
    stride_view = tl.cast(stride_view, tl.int64)
    stride_class = tl.cast(stride_class, tl.int64)
    for view in range(num_views):
        at = view * stride_view + image * stride_image + cls * stride_class
        logits = tl.load(logits_ptr + at, mask=guessed, other=0.0).to(WIDE)
        logits = tl.where(cls < num_classes, logits, float("-inf"))
        log_probs = logits - _log_sum_exp(logits)
        most = tl.maximum(tl.maximum(log_sum, log_probs), -3e38)
        log_sum = most + tl.log(tl.exp(log_sum - most) + tl.exp(log_probs - most))
    # the sum over views, not the mean: the factor cancels in the softmax
    log_sum = log_sum / temperature
    targets = tl.exp(log_sum - _log_sum_exp(log_sum)).to(tl.float32)
    if y_ptr is not None:
        label_mask = mask & labelled
        row = tl.where(labelled, row, 0).to(tl.int64)
        if SOFT_LABELS:
            at = row * stride_y + cls * tl.cast(stride_y_class, tl.int64)
            known = tl.load(y_ptr + at, mask=label_mask, other=0.0).to(tl.float32)
        else:
            label = tl.load(y_ptr + row * stride_y, mask=labelled, other=-1)
            known = (label == cls).to(tl.float32)
        known += smoothing * (1.0 / num_classes - known)
        targets = tl.where(labelled, known, targets)
    return targets


# A batch of another size must not be another kernel: its counts may be 1 or divisible by 16, and
# labels and draws, slices often, may begin anywhere. The other strides are the layout's.
_NUMBERS = ["stride_view", "num_x", "num_u", "num_rows"]


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
    num_views,
    num_rows,
    num_classes,
    temperature,
    smoothing,
    SOFT_LABELS: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    cls = tl.arange(0, CLASSES)[None, :]
    mask = (row < num_rows) & (cls < num_classes)
    targets = _targets(
        row, cls, mask, y_ptr, logits_ptr,
        stride_y, stride_y_class, stride_view, stride_image, stride_class,
        num_x, num_u, num_views, num_classes, temperature, smoothing, SOFT_LABELS,
    )  # fmt: skip
    if index_ptr is not None:
        inside = row < num_rows
        partner = tl.load(index_ptr + row, mask=inside, other=0).to(tl.int32)
        theirs = _targets(
            partner, cls, mask, y_ptr, logits_ptr,
            stride_y, stride_y_class, stride_view, stride_image, stride_class,
            num_x, num_u, num_views, num_classes, temperature, smoothing, SOFT_LABELS,
        )  # fmt: skip
        lam = tl.load(lam_ptr + row, mask=inside, other=1.0)
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
        num_views,
        num_rows,
        num_classes,
        temperature,
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
    rows = max(1, 128 // columns)  # twice as many would not fit into a warp's registers
    return columns, rows, min(max(rows * columns // 256, 1), 16)
