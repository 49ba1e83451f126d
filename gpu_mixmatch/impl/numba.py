"""Augmentation and MixUp compiled for CPUs by Numba; what is not here is eager's.

Eager makes a pass over memory per operation. Here every view is written once, from bytes that are
in the cache. Compiled loops hold no lock of the interpreter, so that plain threads share the rows.

Places in memory are unsigned: the compiler then knows that none is negative, and vectorises.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch.impl import eager
from gpu_mixmatch.impl.eager import (
    batch_targets,
    draw_batch,
    guess_labels,
    mixmatch_loss,
    mixmatch_loss_backward,
)
from gpu_mixmatch.types import AugmentParams, MixUpParams, PaddingMode

__all__ = [
    "augment",
    "batch_targets",
    "draw_batch",
    "guess_labels",
    "mixmatch_loss",
    "mixmatch_loss_backward",
    "mixup",
]

# Values that are worth a thread: to wake one takes as long as to move some of these.
_LEAST_PER_THREAD = 2**19
# What zoom and blur of a value cost, in values that are only moved.
_FILTER_COST = 8
# A tap below this share of the kernel changes no bit of a float32.
_LEAST_TAP = 1e-8
# Values of a pass over lines that are blurred: with what they are read from they stay in cache.
_VALUES_AT_ONCE = 2**11


def _compiled(function: Callable[..., Any], fastmath: Any = False) -> Any:
    options = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to keep it in: every process compiles anew
        return njit(**options)(function)


class _Shape(NamedTuple):
    """Of images as lines of ``width`` pixels of ``values``: C planes of 1, or 1 plane of C."""

    planes: int
    height: int
    width: int
    values: int
    padding: int
    repeat: int  # pixels that image and mirror image share: reflection does not repeat the edge
    fill: int  # what lies beyond the image: 0 its reflection, 1 its edge, 2 zeros

    @property
    def pitch(self) -> int:
        """Values of a widened line: padding, mirror image, (2 paddings), image, padding."""
        between = 0 if self.repeat else 2 * self.padding
        return (2 * (self.width + self.padding) - self.repeat + between) * self.values


class _Task(NamedTuple):
    """What the loops read, as numpy's arrays."""

    images: tuple[Any, ...]  # flat, in the order of _Shape
    draws: tuple[Any, ...]  # the fields of AugmentParams
    factors: tuple[Any, ...]  # scale and bias per plane, or per value of a line
    tables: tuple[Any, ...]  # of _line_tables
    shape: _Shape


@_compiled
def _widen(wide, to, source, at, num_lines, shape, pitch):
    """Write lines of ``source`` as [padding, mirror image, (2 paddings), image, padding]."""
    values = np.uint64(shape.values)
    length = np.uint64(shape.width) * values
    padding = np.uint64(shape.padding) * values
    last = length - values  # where the last pixel begins
    mirror_at, image_at = padding, np.uint64(pitch) - padding - length
    for line in range(num_lines):
        mine = np.uint64(at) + np.uint64(line) * length
        start = np.uint64(to) + np.uint64(line) * np.uint64(pitch)
        if values == 1:
            for value in range(length):
                wide[start + mirror_at + value] = source[mine + last - value]
        else:
            for pixel in range(np.uint64(0), length, values):
                for value in range(values):
                    wide[start + mirror_at + pixel + value] = source[mine + last - pixel + value]
        for value in range(length):
            wide[start + image_at + value] = source[mine + value]
    if padding == 0:
        return
    for line in range(num_lines):
        mirror = np.uint64(to) + np.uint64(line) * np.uint64(pitch) + mirror_at
        image = mirror - mirror_at + image_at
        if shape.fill == 0:
            for value in range(padding):
                wide[mirror - padding + value] = wide[image + last - padding + value]
                wide[image + length + value] = wide[mirror + values + value]
        elif shape.fill == 1:
            for pixel in range(np.uint64(0), padding, values):
                for value in range(values):
                    first_value, last_value = wide[image + value], wide[image + last + value]
                    wide[mirror - padding + pixel + value] = last_value
                    wide[mirror + length + pixel + value] = first_value
                    wide[image - padding + pixel + value] = first_value
                    wide[image + length + pixel + value] = last_value
        else:
            for value in range(padding):
                wide[mirror - padding + value] = 0
                wide[mirror + length + value] = 0
                wide[image - padding + value] = 0
                wide[image + length + value] = 0


@_compiled
def _column(row, left, flip, shape, pitch):
    """Where in a widened line the window of a view begins."""
    if flip[row]:
        return (2 * shape.padding - left[row]) * shape.values
    return pitch - (2 * shape.padding + shape.width - left[row]) * shape.values


@_compiled
def _write_views(
    out, row, num_views, source, wide, draws, factors, tables, shape, pitch, first, last
):
    """Write all views of images ``first`` .. ``last`` - 1, image by image.

    View k of image m is row ``row + k·M + m`` of ``out``. ``wide`` holds one image and a line of
    zeros.
    """
    top, left, flip, _, _ = draws
    lines = tables[0]
    scale, bias = factors
    length = np.uint64(shape.width * shape.values)
    image_lines = shape.planes * shape.height
    num_images = len(source) // max(image_lines * shape.width * shape.values, 1)
    zeros = np.uint64(image_lines * pitch)
    for image in range(first, last):
        at = image * image_lines * shape.width * shape.values
        _widen(wide, 0, source, at, image_lines, shape, pitch)
        for view in range(num_views):
            mine = row + view * num_images + image
            column = _column(mine, left, flip, shape, pitch)
            for plane in range(shape.planes):
                factor, addend = scale[plane, 0], bias[plane, 0]
                for line in range(shape.height):
                    to = np.uint64((mine * shape.planes + plane) * shape.height + line) * length
                    read = lines[top[mine] + line]
                    start = zeros
                    if read >= 0:
                        start = np.uint64((plane * shape.height + read) * pitch + column)
                    if scale.shape[1] == 1:
                        for value in range(length):
                            out[to + value] = np.float32(wide[start + value]) * factor + addend
                    else:
                        for value in range(length):
                            pixel = np.float32(wide[start + value])
                            out[to + value] = pixel * scale[plane, value] + bias[plane, value]


@_compiled
def _mix_views(
    out, num_x, num_u, wide, draws, lam, index, factors, tables, shape, pitch, first, last
):
    """Write the blends of views ``first`` .. ``last`` - 1 with their partners, from bytes.

    ``wide`` holds all images, x before u, and a line of zeros.
    """
    top, left, flip, _, _ = draws
    lines = tables[0]
    scale, bias = factors
    length = np.uint64(shape.width * shape.values)
    image_lines = shape.planes * shape.height
    zeros = np.uint64((num_x + num_u) * image_lines * pitch)
    for mine in range(first, last):
        partner, weight = index[mine], lam[mine]
        my_image = mine if mine < num_x else num_x + (mine - num_x) % num_u
        their_image = partner if partner < num_x else num_x + (partner - num_x) % num_u
        my_column = _column(mine, left, flip, shape, pitch)
        their_column = _column(partner, left, flip, shape, pitch)
        for plane in range(shape.planes):
            factor, addend = scale[plane, 0], bias[plane, 0]
            my_factor = weight * factor
            their_factor = factor - my_factor
            for line in range(shape.height):
                to = np.uint64((mine * shape.planes + plane) * shape.height + line) * length
                read = lines[top[mine] + line]
                my_start = their_start = zeros
                if read >= 0:
                    my_line = my_image * image_lines + plane * shape.height + read
                    my_start = np.uint64(my_line * pitch + my_column)
                read = lines[top[partner] + line]
                if read >= 0:
                    their_line = their_image * image_lines + plane * shape.height + read
                    their_start = np.uint64(their_line * pitch + their_column)
                if scale.shape[1] == 1:
                    for value in range(length):
                        theirs = np.float32(wide[their_start + value]) * their_factor + addend
                        out[to + value] = np.float32(wide[my_start + value]) * my_factor + theirs
                else:
                    for value in range(length):
                        theirs = np.float32(wide[their_start + value])
                        mixed = theirs + weight * (np.float32(wide[my_start + value]) - theirs)
                        out[to + value] = mixed * scale[plane, value] + bias[plane, value]


@_compiled
def _filter_views(
    out, row, num_views, source, wide, draws, taps, factors, tables, shape, pitch, scratch, first,
    last,
):  # fmt: skip
    """Do what `_write_views` does, with zoom and blur in between; for planes only."""
    top, left, flip, zoom, _ = draws
    lines, near_lines, near_columns = tables
    scale, bias = factors
    height, width = shape.height, shape.width
    image_lines = shape.planes * height
    num_images = len(source) // max(image_lines * width, 1)
    line_reads, column_reads = np.empty((2, height), np.int64), np.empty((2, width), np.int64)
    line_parts, column_parts = np.empty(height, np.float32), np.empty(width, np.float32)
    for image in range(first, last):
        _widen(wide, 0, source, image * image_lines * width, image_lines, shape, pitch)
        for view in range(num_views):
            mine = row + view * num_images + image
            column = _column(mine, left, flip, shape, pitch)
            _zoom_reads(line_reads, line_parts, zoom[mine, 0], zoom[mine, 1], False)
            _zoom_reads(column_reads, column_parts, zoom[mine, 2], zoom[mine, 3], flip[mine])
            zooms = zoom[mine].any()
            for line in range(height):  # from lines of the window to lines of the image
                line_reads[0, line] = lines[top[mine] + line_reads[0, line]]
                line_reads[1, line] = lines[top[mine] + line_reads[1, line]]
            for plane in range(shape.planes):
                start = plane * height * pitch + column
                to = ((mine * shape.planes) + plane) * height * width
                written = out[to : to + height * width]
                _read_plane(
                    scratch, (taps.shape[1] - 1) * width, wide, start, image_lines * pitch,
                    line_reads, line_parts, column_reads, column_parts, pitch, zooms,
                )  # fmt: skip
                _blur_plane(
                    written, scratch, taps[mine], near_lines, near_columns, height, width,
                    scale[plane, 0], bias[plane, 0],
                )  # fmt: skip


@_compiled
def _zoom_reads(reads, parts, before, after, mirrored):
    """The two pixels that each output pixel lies between, ``[2, n]``, and how far from the first.

    As `eager._zoom_matrix`, of an axis that has been mirrored already.
    """
    size = len(parts)
    before = min(before, size - 1)
    after = min(after, size - 1 - before)
    kept = size - before - after
    if mirrored:
        before = after
    for pixel in range(size):
        read = np.float32((2 * pixel + 1) * kept - size) / np.float32(2 * size)
        read = min(max(read, np.float32(0)), np.float32(kept - 1)) + np.float32(before)
        parts[pixel] = read - np.float32(int(read))
        reads[0, pixel] = int(read)
        reads[1, pixel] = int(read) + (parts[pixel] > 0)


@_compiled
def _read_plane(
    scratch, at, wide, start, zeros, line_reads, line_parts, column_reads, column_parts, pitch,
    zooms,
):  # fmt: skip
    """Write the window of a plane as floats, zoomed, at ``at`` of ``scratch``."""
    height, width = len(line_parts), np.uint64(len(column_parts))
    between = np.uint64(at) + np.uint64(height) * width  # a line behind the plane
    for line in range(height):
        to = np.uint64(at) + np.uint64(line) * width
        read = line_reads[0, line]
        upper = np.uint64(zeros if read < 0 else start + read * pitch)
        if not zooms:
            for value in range(width):
                scratch[to + value] = wide[upper + value]
            continue
        read = line_reads[1, line]
        lower = np.uint64(zeros if read < 0 else start + read * pitch)
        part = line_parts[line]
        for value in range(width):
            above = np.float32(wide[upper + value])
            scratch[between + value] = above + part * (np.float32(wide[lower + value]) - above)
        for value in range(width):
            before = scratch[between + np.uint64(column_reads[0, value])]
            after = scratch[between + np.uint64(column_reads[1, value])]
            scratch[to + value] = before + column_parts[value] * (after - before)


@_compiled
def _blur_plane(out, scratch, taps, near_lines, near_columns, height, width, factor, addend):
    """Blur a plane down and across, scale it and write it to ``out``, ``[H·W]``.

    Some lines at a time, which stay in the cache, each pass over all of them as one long line.
    ``scratch`` begins with the plane, behind room for ``len(taps) - 1`` lines.
    """
    radius = len(taps) - 1
    reach = radius
    while reach > 0 and taps[reach] < _LEAST_TAP:
        reach -= 1
    before = radius * width
    size, beyond = np.uint64(width), np.uint64(radius)
    if reach == 0:
        unblurred = scratch[before : before + height * width]
        for value in range(height * width):
            out[value] = unblurred[value] * factor + addend
        return
    for line in range(2 * radius):
        beyond_line = line if line < radius else height + line
        write = np.uint64(beyond_line) * size
        read = (beyond + near_lines[beyond_line]) * size
        for value in range(size):
            scratch[write + value] = scratch[read + value]
    most_lines = _lines_at_once(height, width)
    padded_width = width + 2 * radius
    rest = scratch[height * width + 2 * before :]
    sums, rest = rest[: most_lines * width], rest[most_lines * width :]
    padded, sums_across = rest[: most_lines * padded_width], rest[most_lines * padded_width :]
    for first in range(0, height, most_lines):
        num_lines = min(most_lines, height - first)
        begin = before + first * width
        _add_taps(sums, scratch, begin, width, num_lines * width, taps, reach)
        for line in range(num_lines):
            read, write = np.uint64(line * width), np.uint64(line * padded_width)
            for column in range(beyond):
                padded[write + column] = sums[read + near_columns[column]]
            for column in range(size):
                padded[write + beyond + column] = sums[read + column]
            for column in range(beyond + size, beyond + size + beyond):
                padded[write + column] = sums[read + near_columns[column]]
        length = num_lines * padded_width - 2 * radius
        _add_taps(sums_across, padded, radius, 1, length, taps, reach)
        for line in range(num_lines):
            read, write = np.uint64(line * padded_width), np.uint64((first + line) * width)
            for column in range(size):
                out[write + column] = sums_across[read + column] * factor + addend


@partial(_compiled, fastmath={"contract"})
def _add_taps(sums, values, begin, stride, length, taps, reach):
    """Write the sums of values around ``begin``, ``begin`` + 1, .., weighed by their distance."""
    middle = values[begin : begin + length]
    for value in range(length):
        sums[value] = taps[0] * middle[value]
    for distance in range(1, reach + 1):
        tap, away = taps[distance], distance * stride
        before = values[begin - away : begin - away + length]
        after = values[begin + away : begin + away + length]
        for value in range(length):
            sums[value] += tap * (before[value] + after[value])


@_compiled
def _lie_within(values, most):
    for value in values:  # noqa: SIM110  # all() is no loop of Numba's
        if value < 0 or value > most:
            return False
    return True


@_compiled
def _lines_at_once(height, width):
    return min(height, max(1, _VALUES_AT_ONCE // width))


@_compiled
def _mix_rows(out, rows, lam, index, first, last):
    """Write blends ``first`` .. ``last`` - 1 of ``[N, values]`` with their partners."""
    size = np.uint64(rows.shape[1])
    for row in range(first, last):
        partner, rest = index[row], np.float32(1) - lam[row]
        for value in range(size):
            mine = rows[row, value]  # which λ' = 1 leaves as it is
            out[row, value] = mine - rest * (mine - rows[partner, value])


def augment(
    sources: tuple[Tensor, ...],
    params: AugmentParams,
    scale: Tensor | float,
    bias: Tensor | float,
    *,
    padding: int,
    padding_mode: PaddingMode,
    zoom: bool,
    blur_radius: int,
    channels_last_in: bool,
    out: Tensor,
    workspace: Workspace | None,
    mixup: MixUpParams | None = None,
) -> None:
    """Do what `impl.eager.augment` does, with the same arguments."""
    if out.numel() == 0:
        return
    workspace = workspace or Workspace()
    num_rows, channels, height, width = out.shape
    channels_last = not out.is_contiguous()
    filters = zoom or blur_radius > 0
    # a filter runs along planes; where pixels are only moved, their values stay together
    values = channels if channels_last and not filters else 1
    shape = _Shape(
        channels // values,
        height,
        width,
        values,
        padding,
        repeat=1 if padding_mode == "reflect" else 0,
        fill=["reflect", "edge", "zeros"].index(padding_mode),
    )
    images = tuple(_lines_of(source, channels_last_in, values).numpy() for source in sources)
    factors = tuple(_per_value(factor, shape).numpy() for factor in (scale, bias))
    draws = tuple(draw.contiguous().numpy() for draw in params)
    _check_draws(draws, 2 * padding)
    taps = _half_kernels(params.sigma, blur_radius).numpy() if filters else None
    tables = _line_tables(height, width, padding, padding_mode, blur_radius)
    task = _Task(images, draws, factors, tables, shape)

    in_order = out.permute(0, 2, 3, 1) if channels_last else out
    direct = out.dtype == torch.float32 and channels_last == (values > 1)
    target = in_order.view(-1) if direct else _floats("views", out, workspace)
    if mixup is None:
        _write_all(task, target, taps, workspace)
    elif filters:
        views = _floats("unmixed", out, workspace)
        _write_all(task, views, taps, workspace)
        _blend(views.view(num_rows, -1), mixup, target.view(num_rows, -1))
    else:
        _mix_all(task, target, mixup, workspace)
    if not direct:
        written = target.view(num_rows, shape.planes, height, width, values)
        out.copy_(written.permute(0, 1, 4, 2, 3).flatten(1, 2))


def mixup(
    inputs: Tensor,
    targets: Tensor,
    params: MixUpParams,
    out: Tensor,
    mixed_targets: Tensor,
    order: Tensor | None = None,
) -> None:
    """Do what `impl.eager.mixup` does, with the same arguments."""
    if inputs.dtype != torch.float32 or order is not None or inputs.numel() == 0:
        eager.mixup(inputs, targets, params, out, mixed_targets, order)
        return
    _blend(eager._dense_rows(inputs), params, eager._dense_rows(out))
    _blend(targets, params, mixed_targets)


def _write_all(task: _Task, target: Tensor, taps: Any, workspace: Workspace) -> None:
    """Write every view of every image; a thread has a share of the images of every source."""
    images, draws, factors, tables, shape = task
    image_lines, pitch = shape.planes * shape.height, shape.pitch
    image_size = image_lines * shape.width * shape.values
    num_threads = _num_threads(target.numel() * (1 if taps is None else _FILTER_COST))
    dtype = torch.uint8 if images[0].dtype == np.uint8 else torch.float32
    # an image and a line of zeros for each thread
    widened = workspace.empty(
        "widened image", (num_threads, (image_lines + 1) * pitch), dtype, target.device
    )
    widened[:, image_lines * pitch :] = 0
    wide, out = widened.numpy(), target.numpy()
    counts = [len(source) // image_size for source in images]
    scratch: Any = None
    if taps is not None:
        reach = 2 * (taps.shape[1] - 1)
        lines = _lines_at_once(shape.height, shape.width)
        size = (shape.height + reach + 1 + lines) * shape.width + 2 * lines * (shape.width + reach)
        scratch = workspace.empty("plane", (num_threads, size), torch.float32, target.device)
        scratch = scratch.numpy()

    def work(part: int) -> None:
        row = 0
        for number, (source, count) in enumerate(zip(images, counts, strict=True), 1):
            is_last = number == len(images)
            num_views = (len(draws[0]) - row) // max(count, 1) if is_last else 1
            share = count * part // num_threads, count * (part + 1) // num_threads
            where = out, row, num_views, source, wide[part], draws
            if scratch is None:
                _write_views(*where, factors, tables, shape, pitch, *share)
            else:
                _filter_views(*where, taps, factors, tables, shape, pitch, scratch[part], *share)
            row += num_views * count

    _in_threads(work, num_threads)


def _mix_all(task: _Task, target: Tensor, mixup: MixUpParams, workspace: Workspace) -> None:
    """Widen all images, then write every blend of two views."""
    images, draws, factors, tables, shape = task
    pitch, num_rows = shape.pitch, len(draws[0])
    line = shape.width * shape.values
    num_lines = [len(source) // line for source in images]
    total = sum(num_lines)
    dtype = torch.uint8 if images[0].dtype == np.uint8 else torch.float32
    widened = workspace.empty("widened", ((total + 1) * pitch,), dtype, target.device)
    widened[total * pitch :] = 0
    wide, out = widened.numpy(), target.numpy()
    num_threads = _num_threads(target.numel())
    mixed = mixup.lam.contiguous().numpy(), mixup.index.contiguous().numpy()
    _check_partners(mixed[1])
    # a single source is drawn as often as there are rows
    num_x = 0 if len(images) == 1 else num_lines[0] // (shape.planes * shape.height)
    num_u = num_lines[-1] // (shape.planes * shape.height)

    def widen(part: int) -> None:
        before = 0
        for source, count in zip(images, num_lines, strict=True):
            first, last = count * part // num_threads, count * (part + 1) // num_threads
            start = (before + first) * pitch
            _widen(wide, start, source, first * line, last - first, shape, pitch)
            before += count

    def mix(part: int) -> None:
        share = num_rows * part // num_threads, num_rows * (part + 1) // num_threads
        _mix_views(out, num_x, num_u, wide, draws, *mixed, factors, tables, shape, pitch, *share)

    _in_threads(widen, num_threads)
    _in_threads(mix, num_threads)


def _blend(rows: Tensor, params: MixUpParams, out: Tensor) -> None:
    """Write λ'·row + (1 - λ')·row[index] of ``[N, values]`` float32."""
    num_threads = _num_threads(rows.numel())
    arrays = [tensor.detach().contiguous().numpy() for tensor in (rows, *params)]
    _check_partners(arrays[-1])
    written = out.numpy()

    def work(part: int) -> None:
        share = (len(rows) * edge // num_threads for edge in (part, part + 1))
        _mix_rows(written, *arrays, *share)

    _in_threads(work, num_threads)


def _check_draws(draws: tuple[Any, ...], most: int) -> None:
    """Raise before a compiled loop, which checks nothing, reads beyond an image."""
    top, left, _, zoom, _ = draws
    least_cut = zoom.min(initial=0)
    if not (_lie_within(top, most) and _lie_within(left, most) and least_cut >= 0):
        offsets = np.concatenate([top, left])
        raise ValueError(
            f"params.top and params.left must be in 0 .. 2·padding = {most} and params.zoom at "
            f"least 0, got offsets in {offsets.min()} .. {offsets.max()} and a cut of {least_cut}"
        )


def _check_partners(index: Any) -> None:
    if not _lie_within(index, len(index) - 1):
        raise ValueError(
            f"params.index must be in 0 .. N - 1 = {len(index) - 1}, got {index.min()} .. "
            f"{index.max()}"
        )


def _floats(name: str, like: Tensor, workspace: Workspace) -> Tensor:
    return workspace.empty(f"{name} as floats", (like.numel(),), torch.float32, like.device)


def _lines_of(source: Tensor, channels_last: bool, values: int) -> Tensor:
    """Images as lines of pixels, flat: NHWC where a pixel's values stay together, else NCHW."""
    if channels_last != (values > 1):
        source = source.permute(0, 2, 3, 1) if values > 1 else source.permute(0, 3, 1, 2)
    source = source if source.dtype == torch.uint8 else source.detach().float()
    return source.contiguous().view(-1)


def _per_value(factor: Tensor | float, shape: _Shape) -> Tensor:
    """A factor per plane, ``[planes, 1]``, or per value of a line, ``[1, W·values]``."""
    if not isinstance(factor, Tensor):
        return _filled(factor, shape.planes, shape.width * shape.values if shape.values > 1 else 1)
    factor = factor.float()
    return factor.repeat(shape.width)[None] if shape.values > 1 else factor[:, None].contiguous()


def _half_kernels(sigma: Tensor, radius: int) -> Tensor:
    """Taps at distance 0, 1, .. of each row's blur."""
    return eager._gaussian(sigma, radius)[:, radius:].contiguous()


@eager._constant
def _filled(value: float, *shape: int) -> Tensor:
    return torch.full(shape, value, dtype=torch.float32)


@lru_cache(maxsize=32)
def _line_tables(
    height: int, width: int, padding: int, padding_mode: PaddingMode, radius: int
) -> tuple[Any, Any, Any]:
    """Lines of the padded image, ``[H + 2·padding]``, -1 for zeros; lines and columns of a blur.

    The latter are those of an axis that is reflected at both ends, ``[n + 2·radius]``.
    """
    line = np.arange(-padding, height + padding)
    if padding_mode == "reflect":
        line = _reflected(height, padding).astype(np.int64)
    elif padding_mode == "edge":
        line = line.clip(0, height - 1)
    else:
        line = np.where((line >= 0) & (line < height), line, -1)
    return line, _reflected(height, radius), _reflected(width, radius)


def _reflected(size: int, beyond: int) -> Any:
    """The pixel that lies at -beyond .. size - 1 + beyond, the edge not repeated."""
    period = max(2 * (size - 1), 1)
    position = np.arange(-beyond, size + beyond) % period
    return np.minimum(position, period - position).clip(0, size - 1).astype(np.uint64)


def _num_threads(num_values: int) -> int:
    return min(torch.get_num_threads(), max(1, num_values // _LEAST_PER_THREAD))


def _in_threads(work: Callable[[int], None], num_threads: int) -> None:
    """Run parts 0 .. num_threads - 1 at once."""
    if num_threads == 1:
        work(0)
        return
    parts, errors = iter(range(num_threads)), []

    def run(_: object = None) -> None:
        try:
            for part in parts:  # whoever is free takes the next
                work(part)
        except BaseException as error:
            errors.append(error)

    team = _torch_team()
    if team is not None:
        team(_Callback(run), None, num_threads, 0)
    else:
        others = [_threads(os.getpid()).submit(run) for _ in range(num_threads - 1)]
        run()
        for other in others:
            other.result()
    if errors:
        raise errors[0]


_Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@lru_cache(maxsize=1)
def _torch_team() -> Any:
    """The entry to OpenMP's threads in torch's build for Linux, or None.

    Between two operations torch's threads keep their cores busy, waiting: others would have to
    share these.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        team = library.GOMP_parallel  # (task, its argument, number of threads, flags)
    except (OSError, AttributeError):
        return None
    team.argtypes = [_Callback, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    team.restype = None
    return team


@lru_cache(maxsize=1)
def _threads(process: int) -> ThreadPoolExecutor:
    """Threads of this process: those of a parent do not survive a fork."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="gpu_mixmatch")
