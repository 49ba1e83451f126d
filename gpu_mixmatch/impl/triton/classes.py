"""What kernels of rows of logits have in common: probabilities, and the largest of them."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def shifted_logits(at, cls, inside, num_classes):
    """Rows of logits less their largest, ``[ROWS, CLASSES]``, float32 or wider."""
    WIDE: tl.constexpr = tl.float64 if at.dtype.element_ty == tl.float64 else tl.float32
    logits = tl.load(at, mask=inside & (cls < num_classes), other=0.0).to(WIDE)
    logits = tl.where(cls < num_classes, logits, float("-inf"))
    return logits - tl.max(logits, axis=1)[:, None]


@triton.jit
def probabilities(shifted):
    """Softmax of what `shifted_logits` returns; 0 where there is no class."""
    powers = tl.exp(shifted)
    return quotient(powers, tl.sum(powers, axis=1)[:, None])


@triton.jit
def quotient(value, by):
    """Divide and round as torch does: the default of float32 is not that exact."""
    value, by = tl.broadcast(value, by)
    if value.dtype == tl.float32:
        return tl.div_rn(value, by)
    return value / by


@triton.jit
def largest(probs, cls, num_classes):
    """The largest of each row of probabilities and its class, the first of equals.

    A row that is not a number has class 0, and is not above any threshold.
    """
    most = tl.max(probs, axis=1)
    first = tl.min(tl.where(probs >= most[:, None], cls, num_classes), axis=1)
    is_number = first < num_classes
    return tl.where(is_number, most, float("nan")), tl.where(is_number, first, 0)


@triton.jit
def _place(row, cls, stride_row, stride_class, num_classes):
    if stride_row is None:  # contiguous
        at = row * num_classes + cls
    else:
        at = row * stride_row + cls * stride_class
    return at


@triton.jit
def log_softmax_rows(
    row, cls, mask, logits_ptr, targets_ptr, stride_row, stride_class,
    stride_targets_row, stride_targets_class, num_classes,
):  # fmt: skip
    """Log-probabilities, probabilities and targets of some rows, ``[ROWS, CLASSES]``."""
    WIDE: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    row, cls = row.to(tl.int64), cls.to(tl.int64)
    at = _place(row, cls, stride_row, stride_class, num_classes)
    logits = tl.load(logits_ptr + at, mask=mask, other=0.0)
    logits = tl.where(cls < num_classes, logits.to(WIDE), float("-inf"))
    at = _place(row, cls, stride_targets_row, stride_targets_class, num_classes)
    targets = tl.load(targets_ptr + at, mask=mask, other=0.0).to(WIDE)
    logits -= tl.max(logits, axis=1)[:, None]
    log_probs = logits - tl.log(tl.sum(tl.exp(logits), axis=1))[:, None]
    # where there is no class: finite, so that its product with no target is 0
    return tl.where(cls < num_classes, log_probs, 0.0), tl.exp(log_probs), targets


def strides_of(rows: Tensor) -> tuple[int, ...] | tuple[None, None]:
    """Return what `log_softmax_rows` takes: no strides where rows lie one after the other."""
    return (None, None) if rows.is_contiguous() else rows.stride()
