"""What adaptive methods keep of guesses, one launch each: sums of a batch, and what they move.

Sums are whole numbers, so that programs may add them in any order: each adds its rows to memory
that is 0, by atomics, and the one that finishes last moves them to the output. Against another
softmax, which rounds otherwise, a sum may differ by 2^-24 or two per row.
"""

import triton
import triton.language as tl
from torch import Tensor, int64

from gpu_mixmatch.impl.triton.classes import largest, probabilities, shifted_logits
from gpu_mixmatch.impl.triton.guess_labels import row_tile
from gpu_mixmatch.impl.triton.launch import blocks, launch
from gpu_mixmatch.impl.triton.zeros import zeros

_UNIT = tl.constexpr(2.0**32)
_FLOOR = tl.constexpr(1e-6)  # of both sides of an alignment's quotient

# Sums


@triton.jit
def _whole(values, mask):
    """Values in 2^-32; what is not a number is none of them."""
    return tl.where(mask & (values == values), values * _UNIT, 0.0).to(tl.int64)


@triton.jit
def _add(sums_ptr, cls, values, num_classes):
    """Add up rows of whole numbers, ``[ROWS, CLASSES]``; most are 0 where they are counts."""
    values = tl.sum(values, axis=0)
    tl.atomic_add(sums_ptr + cls, values, mask=(cls < num_classes) & (values != 0), sem="relaxed")


@triton.jit(
    do_not_specialize=["num_x", "num_u"],
    do_not_specialize_on_alignment=["out_ptr", "logits_ptr", "y_ptr"],
)
def guess_statistics_kernel(
    out_ptr,
    sums_ptr,
    logits_ptr,
    y_ptr,
    stride_row,
    stride_class,
    stride_y,
    stride_y_class,
    num_x,
    num_u,
    num_classes,
    SOFT_LABELS: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    SUMS: tl.constexpr,
):
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # among guesses and among labels
    row = place.to(tl.int64)[:, None]
    classes = tl.arange(0, CLASSES)
    cls = classes[None, :]
    guessed = row < num_u
    at = tl.where(guessed, row, 0) * stride_row + cls * tl.cast(stride_class, tl.int64)
    probs = probabilities(shifted_logits(logits_ptr + at, cls, guessed, num_classes))
    confidence, label = largest(probs, cls, num_classes)
    of_rows = _whole(confidence, place < num_u)
    tl.atomic_add(sums_ptr + 1, tl.sum(of_rows, axis=0), sem="relaxed")
    of_rows = _whole(confidence * confidence, place < num_u)
    tl.atomic_add(sums_ptr + 2, tl.sum(of_rows, axis=0), sem="relaxed")
    _add(sums_ptr + 3, classes, _whole(probs, guessed), num_classes)
    is_number = (confidence == confidence)[:, None]
    counts = (guessed & is_number & (cls == label[:, None])).to(tl.int64)
    _add(sums_ptr + 3 + num_classes, classes, counts, num_classes)
    labelled = row < num_x
    row = tl.where(labelled, row, 0)
    if SOFT_LABELS:
        at = y_ptr + row * stride_y + cls * tl.cast(stride_y_class, tl.int64)
        known = tl.load(at, mask=labelled & (cls < num_classes), other=0.0).to(tl.float32)
    else:
        known = (tl.load(y_ptr + row * stride_y, mask=labelled, other=-1) == cls).to(tl.float32)
    _add(sums_ptr + 3 + 2 * num_classes, classes, _whole(known, labelled), num_classes)

    tl.debug_barrier()  # every thread has added before this program arrives
    arrived = tl.atomic_add(sums_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == tl.num_programs(0) - 1:
        tl.store(out_ptr, tl.cast(num_u, tl.int64))
        tl.store(out_ptr + 1, tl.cast(num_x, tl.int64))
        for start in range(0, 2 + 3 * num_classes, SUMS):
            offs = start + tl.arange(0, SUMS)
            present = offs < 2 + 3 * num_classes
            none = tl.zeros([SUMS], tl.int64)
            sums = tl.atomic_xchg(sums_ptr + 1 + offs, none, mask=present, sem="relaxed")
            tl.store(out_ptr + 2 + offs, sums, mask=present)
        tl.store(sums_ptr, tl.cast(0, tl.int64))


def guess_statistics(logits: Tensor, y: Tensor, out: Tensor) -> None:
    num_u, num_classes = logits.shape
    classes, rows, num_warps = _tall_tile(num_classes)
    soft = y.dim() == 2
    launch(
        guess_statistics_kernel,
        max(blocks(max(num_u, len(y)), rows), 1),
        logits.device,
        out,
        zeros(logits.device, 3 + 3 * num_classes, int64),
        logits,
        y,
        *logits.stride(),
        y.stride(0),
        y.stride(1) if soft else 0,
        len(y),
        num_u,
        num_classes,
        SOFT_LABELS=soft,
        ROWS=rows,
        CLASSES=classes,
        SUMS=256,
        num_warps=num_warps,
    )


def _tall_tile(num_classes: int) -> tuple[int, int, int]:
    """Columns, rows and warps of a tile of which a column is added up: 512 values or more."""
    columns, _, num_warps = row_tile(num_classes)
    rows = max(1, 512 // columns)
    return columns, rows, max(num_warps, 4)


# Averages, in float64 and rounded as torch does it: nothing is fused


@triton.jit
def _count(sums_ptr):
    return tl.maximum(tl.load(sums_ptr), 1).to(tl.float64)


@triton.jit
def _mean_of(sums_ptr, known, count):
    """Sums of classes, in 2^-32, over the number of rows."""
    return tl.load(sums_ptr, mask=known, other=0).to(tl.float64) / (_UNIT * count)


@triton.jit
def _moved(before, mean, MOMENTUM: tl.constexpr):
    REST: tl.constexpr = 1.0 - MOMENTUM
    # a number beside a float64 may be cut to a float32, a full one is not
    momentum, rest = tl.full([1], MOMENTUM, tl.float64), tl.full([1], REST, tl.float64)
    return (momentum * before.to(tl.float64) + rest * mean).to(tl.float32)


@triton.jit
def _factors(wanted, guessed):
    """What aligns guesses of a mean to one that is wanted."""
    floor = tl.full([1], _FLOOR, tl.float64)
    return ((wanted.to(tl.float64) + floor) / (guessed.to(tl.float64) + floor)).to(tl.float32)


# Several processes add up their sums, which may lie in what they exchange.
_STATE = ["out_ptr", "sums_ptr", "averages_ptr", "target_ptr"]
_WINDOW = ["out_ptr", "sums_ptr", "window_ptr", "position_ptr", "labels_ptr"]


@triton.jit(do_not_specialize_on_alignment=_STATE)
def update_averages_kernel(
    out_ptr,
    averages_ptr,
    sums_ptr,
    target_ptr,
    num_classes,
    MOMENTUM: tl.constexpr,
    CLASSES: tl.constexpr,
):
    program = tl.program_id(0)
    cls = program * CLASSES + tl.arange(0, CLASSES)
    known = cls < num_classes
    num_u, num_x = _count(sums_ptr), _count(sums_ptr + 1)
    probs_ptr = averages_ptr + 2 + cls
    counts_ptr, labels_ptr = probs_ptr + num_classes, probs_ptr + 2 * num_classes
    of_class_ptr = sums_ptr + 4 + cls
    means = _mean_of(of_class_ptr, known, num_u)
    probs = _moved(tl.load(probs_ptr, mask=known, other=0.0), means, MOMENTUM)
    means = tl.load(of_class_ptr + num_classes, mask=known, other=0).to(tl.float64) / num_u
    counts = _moved(tl.load(counts_ptr, mask=known, other=0.0), means, MOMENTUM)
    means = _mean_of(of_class_ptr + 2 * num_classes, known, num_x)
    labels = _moved(tl.load(labels_ptr, mask=known, other=0.0), means, MOMENTUM)
    # the first two averages: of the largest probability, by the first program
    first = tl.arange(0, 2)
    total = tl.load(sums_ptr + 2).to(tl.float64) / _UNIT
    square = tl.load(sums_ptr + 3).to(tl.float64) / _UNIT
    mean = total / num_u
    variance = tl.maximum((square - total * mean) / tl.maximum(num_u - 1.0, 1.0), 0.0)
    confidence = _moved(
        tl.load(averages_ptr + first), tl.where(first == 0, mean, variance), MOMENTUM
    )

    tl.debug_barrier()  # what is overwritten was read by every thread that has it
    tl.store(averages_ptr + first, confidence, mask=(first >= 0) & (program == 0))
    tl.store(probs_ptr, probs, mask=known)
    tl.store(counts_ptr, counts, mask=known)
    tl.store(labels_ptr, labels, mask=known)
    if out_ptr is not None:
        wanted = labels
        if target_ptr is not None:
            wanted = tl.load(target_ptr + cls, mask=known, other=0.0)
        tl.store(out_ptr + cls, _factors(wanted, probs), mask=known)


def update_averages(
    sums: Tensor, averages: Tensor, momentum: float, target: Tensor | None, out: Tensor | None
) -> None:
    num_classes = (len(averages) - 2) // 3
    launch(
        update_averages_kernel,
        blocks(num_classes, 128),
        averages.device,
        out,
        averages,
        sums,
        target,
        num_classes,
        MOMENTUM=float(momentum),
        CLASSES=128,
        num_warps=4,
        enable_fp_fusion=False,
    )


@triton.jit(do_not_specialize_on_alignment=_WINDOW)
def update_window_kernel(
    out_ptr,
    window_ptr,
    position_ptr,
    labels_ptr,
    sums_ptr,
    arrived_ptr,
    num_classes,
    LENGTH: tl.constexpr,
    MOMENTUM: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    cls = tl.program_id(0) * CLASSES + tl.arange(0, CLASSES)
    known = cls < num_classes
    position = tl.load(position_ptr)
    totals = tl.zeros([ROWS, CLASSES], tl.float64)
    for start in range(0, LENGTH, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        at = window_ptr + row * num_classes + cls[None, :]
        totals += tl.load(at, mask=(row < LENGTH) & known[None, :], other=0.0).to(tl.float64)
    labels = tl.load(labels_ptr + cls, mask=known, other=0.0)
    tl.store(out_ptr + cls, _factors(labels, tl.sum(totals, axis=0) / LENGTH), mask=known)
    means = _mean_of(sums_ptr + 4 + cls, known, _count(sums_ptr))
    of_labels = _mean_of(sums_ptr + 4 + 2 * num_classes + cls, known, _count(sums_ptr + 1))
    labels = _moved(labels, of_labels, MOMENTUM)

    tl.debug_barrier()  # what is overwritten was read by every thread
    tl.store(window_ptr + position * num_classes + cls, means.to(tl.float32), mask=known)
    tl.store(labels_ptr + cls, labels, mask=known)
    # the last program moves the position, which the others have read
    arrived = tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == tl.num_programs(0) - 1:
        tl.store(position_ptr, (position + 1) % LENGTH)
        tl.store(arrived_ptr, 0)


def update_window(
    sums: Tensor, window: Tensor, position: Tensor, labels: Tensor, momentum: float, out: Tensor
) -> None:
    length, num_classes = window.shape
    launch(
        update_window_kernel,
        blocks(num_classes, 32),
        window.device,
        out,
        window,
        position,
        labels,
        sums,
        zeros(window.device),
        num_classes,
        LENGTH=length,
        MOMENTUM=float(momentum),
        ROWS=32,
        CLASSES=32,
        num_warps=4,
        enable_fp_fusion=False,
    )


# Classes of samples


@triton.jit(do_not_specialize=["num_u"], do_not_specialize_on_alignment=["out_ptr", "logits_ptr"])
def confident_classes_kernel(
    out_ptr,
    logits_ptr,
    stride_row,
    stride_class,
    num_u,
    num_classes,
    threshold,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cls = tl.arange(0, CLASSES)[None, :]
    inside = place < num_u
    row = tl.where(inside, place, 0).to(tl.int64)[:, None]
    at = logits_ptr + row * stride_row + cls * tl.cast(stride_class, tl.int64)
    probs = probabilities(shifted_logits(at, cls, inside[:, None], num_classes))
    confidence, label = largest(probs, cls, num_classes)
    confident = confidence.to(tl.float32) > threshold
    tl.store(out_ptr + place, tl.where(confident, label, -1).to(tl.int64), mask=inside)


def confident_classes(logits: Tensor, threshold: float, out: Tensor) -> None:
    num_u, num_classes = logits.shape
    classes, rows, num_warps = row_tile(num_classes)
    launch(
        confident_classes_kernel,
        blocks(num_u, rows),
        logits.device,
        out,
        logits,
        *logits.stride(),
        num_u,
        num_classes,
        float(threshold),
        ROWS=rows,
        CLASSES=classes,
        num_warps=num_warps,
    )


@triton.jit(
    do_not_specialize=["num_u", "num_samples"],
    do_not_specialize_on_alignment=["table_ptr", "counts_ptr", "classes_ptr", "ids_ptr"],
)
def update_labels_kernel(
    table_ptr,
    counts_ptr,
    classes_ptr,
    ids_ptr,
    num_u,
    num_samples,
    num_classes,
    ROWS: tl.constexpr,
    LATER: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    ids = tl.load(ids_ptr + row, mask=row < num_u, other=-1)
    classes = tl.load(classes_ptr + row, mask=row < num_u, other=-1)
    counted = (classes >= 0) & (classes < num_classes) & (ids >= 0) & (ids < num_samples)
    superseded = tl.zeros([ROWS], tl.int32)
    for start in range(first, num_u, LATER):
        later = start + tl.arange(0, LATER)
        ids_2 = tl.load(ids_ptr + later, mask=later < num_u, other=-1)
        classes_2 = tl.load(classes_ptr + later, mask=later < num_u, other=-1)
        ids_2 = tl.where(classes_2 >= 0, ids_2, -1)
        same = (ids[:, None] == ids_2[None, :]) & (row[:, None] < later[None, :])
        superseded = tl.maximum(superseded, tl.max(same.to(tl.int32), axis=1))
    counted &= superseded == 0
    # no two rows that count have the same place
    place = tl.where(counted, ids, 0)
    before = tl.load(table_ptr + place, mask=counted, other=0).to(tl.int32)
    before = tl.where(before < 0, num_classes, before)
    one = tl.full([ROWS], 1, tl.int32)

    tl.debug_barrier()  # what is overwritten was read by every thread that has it
    tl.store(table_ptr + place, classes.to(tl.int16), mask=counted)
    tl.atomic_add(counts_ptr + before, -one, mask=counted, sem="relaxed")
    tl.atomic_add(counts_ptr + classes, one, mask=counted, sem="relaxed")


def update_labels(classes: Tensor, ids: Tensor, table: Tensor, counts: Tensor) -> None:
    launch(
        update_labels_kernel,
        blocks(len(ids), 32),
        table.device,
        table,
        counts,
        classes.contiguous(),
        ids.contiguous(),
        len(ids),
        len(table),
        len(counts) - 1,
        ROWS=32,
        LATER=64,
        num_warps=4,
    )
