"""The compiled loops. They check nothing: whoever calls them has looked at what they index by.

Places in memory are unsigned: the compiler then knows that none is negative, and vectorises.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numba import njit

# A tap below this share of the kernel changes no bit of a float32.
_LEAST_TAP = 1e-8


# Values of a pass over lines that are blurred: with what they are read from they stay in cache.
_VALUES_AT_ONCE = 2**11


def compiled(function: Callable[..., Any], fastmath: Any = False) -> Any:
    options = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to keep it in: every process compiles anew
        return njit(**options)(function)


class Shape(NamedTuple):
    """Of images as lines of ``width`` pixels of ``values``: C planes of 1, or 1 plane of C."""

    planes: int
    height: int
    width: int
    view_height: int
    view_width: int
    values: int
    padding: int
    repeat: int  # pixels that image and mirror image share: reflection does not repeat the edge
    fill: int  # what lies beyond the image: 0 its reflection, 1 its edge, 2 zeros

    @property
    def pitch(self) -> int:
        """Values of a widened line: padding, mirror image, (2 paddings), image, padding."""
        between = 0 if self.repeat else 2 * self.padding
        return (2 * (self.width + self.padding) - self.repeat + between) * self.values


@compiled
def widen(wide, to, source, at, num_lines, shape, pitch):
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


@compiled
def column_of(row, left, flip, shape, pitch):
    """Where in a widened line the window of a view begins."""
    if flip[row]:
        return (2 * shape.padding - left[row]) * shape.values
    return pitch - (2 * shape.padding + shape.width - left[row]) * shape.values


@compiled
def write_views(
    out, row, num_views, source, wide, draws, factors, tables, shape, pitch, first, last
):
    """Write all views of images ``first`` .. ``last`` - 1, image by image.

    View k of image m is row ``row + k·M + m`` of ``out``. ``wide`` holds one image and a line of
    zeros.
    """
    top, left, flip, _, _ = draws
    lines = tables[0]
    scale, bias = factors
    length = np.uint64(shape.view_width * shape.values)
    image_lines = shape.planes * shape.height
    num_images = len(source) // max(image_lines * shape.width * shape.values, 1)
    zeros = np.uint64(image_lines * pitch)
    for image in range(first, last):
        at = image * image_lines * shape.width * shape.values
        widen(wide, 0, source, at, image_lines, shape, pitch)
        for view in range(num_views):
            mine = row + view * num_images + image
            column = column_of(mine, left, flip, shape, pitch)
            for plane in range(shape.planes):
                factor, addend = scale[plane, 0], bias[plane, 0]
                for line in range(shape.view_height):
                    to = (
                        np.uint64((mine * shape.planes + plane) * shape.view_height + line) * length
                    )
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


@compiled
def mix_views(
    out, num_x, num_u, wide, draws, lam, index, factors, tables, shape, pitch, first, last
):
    """Write the blends of views ``first`` .. ``last`` - 1 with their partners, from bytes.

    ``wide`` holds all images, x before u, and a line of zeros.
    """
    top, left, flip, _, _ = draws
    lines = tables[0]
    scale, bias = factors
    length = np.uint64(shape.view_width * shape.values)
    image_lines = shape.planes * shape.height
    zeros = np.uint64((num_x + num_u) * image_lines * pitch)
    for mine in range(first, last):
        partner, weight = index[mine], lam[mine]
        my_image = mine if mine < num_x else num_x + (mine - num_x) % num_u
        their_image = partner if partner < num_x else num_x + (partner - num_x) % num_u
        my_column = column_of(mine, left, flip, shape, pitch)
        their_column = column_of(partner, left, flip, shape, pitch)
        for plane in range(shape.planes):
            factor, addend = scale[plane, 0], bias[plane, 0]
            my_factor = weight * factor
            their_factor = factor - my_factor
            for line in range(shape.view_height):
                to = np.uint64((mine * shape.planes + plane) * shape.view_height + line) * length
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


@compiled
def filter_views(
    out, row, num_views, source, wide, draws, regions, taps, factors, tables, shape, pitch, scratch,
    first, last,
):  # fmt: skip
    """Do what `write_views` does, with resizing and blur in between; for planes only.

    ``regions`` are what is cut out of each window and resized, none where all of it is kept.
    """
    top, left, flip, _, _ = draws
    lines, near_lines, near_columns = tables
    scale, bias = factors
    height, width = shape.view_height, shape.view_width
    image_lines = shape.planes * shape.height
    num_images = len(source) // max(image_lines * shape.width, 1)
    line_reads, column_reads = np.empty((2, height), np.int64), np.empty((2, width), np.int64)
    line_parts, column_parts = np.empty(height, np.float32), np.empty(width, np.float32)
    above, before, tall, long = 0, 0, height, width
    # without padding a window is the image, and mirroring it is reading its columns backwards
    is_image = shape.padding == 0
    read_from, step = (source, shape.width) if is_image else (wide, pitch)
    for image in range(first, last):
        at = image * image_lines * shape.width
        if not is_image:
            widen(wide, 0, source, at, image_lines, shape, pitch)
        for view in range(num_views):
            mine = row + view * num_images + image
            if len(regions):
                above, before, tall, long = regions[mine]
            column = at if is_image else column_of(mine, left, flip, shape, pitch)
            resized = tall != height or long != width
            _resize_reads(line_reads, line_parts, above, tall)
            _resize_reads(column_reads, column_parts, before, long)
            is_backwards = is_image and flip[mine] > 0
            begin = shape.width - before - long if is_backwards else before
            if is_backwards:
                for column_read in range(width):
                    column_reads[0, column_read] = shape.width - 1 - column_reads[0, column_read]
                    column_reads[1, column_read] = shape.width - 1 - column_reads[1, column_read]
            for line in range(height):  # from lines of the window to lines of the image
                line_reads[0, line] = lines[top[mine] + line_reads[0, line]]
                line_reads[1, line] = lines[top[mine] + line_reads[1, line]]
            for plane in range(shape.planes):
                start = plane * shape.height * step + column
                to = ((mine * shape.planes) + plane) * height * width
                written = out[to : to + height * width]
                _read_plane(
                    scratch, (taps.shape[1] - 1) * width, read_from, start, image_lines * pitch,
                    line_reads, line_parts, column_reads, column_parts, step, begin, long, resized,
                    is_backwards,
                )  # fmt: skip
                blur_plane(
                    written, scratch, taps[mine], near_lines, near_columns, height, width,
                    scale[plane, 0], bias[plane, 0],
                )  # fmt: skip


@compiled
def _resize_reads(reads, parts, start, kept):
    """The two pixels that each output pixel lies between, ``[2, n]``, and how far from the first.

    As `eager.filters` has it, of ``kept`` pixels behind ``start``.
    """
    size = len(parts)
    for pixel in range(size):
        read = np.float32((2 * pixel + 1) * kept - size) / np.float32(2 * size)
        read = min(max(read, np.float32(0)), np.float32(kept - 1)) + np.float32(start)
        parts[pixel] = read - np.float32(int(read))
        reads[0, pixel] = int(read)
        reads[1, pixel] = int(read) + (parts[pixel] > 0)


@compiled
def _read_plane(
    scratch, at, wide, start, zeros, line_reads, line_parts, column_reads, column_parts, pitch,
    before, kept, resized, is_backwards,
):  # fmt: skip
    """Write a plane of a view as floats at ``at`` of ``scratch``, from ``kept`` columns."""
    height, width = len(line_parts), np.uint64(len(column_parts))
    begin, end = np.uint64(before), np.uint64(before + kept)
    between = np.uint64(at) + np.uint64(height) * width  # a line behind the plane
    for line in range(height):
        to = np.uint64(at) + np.uint64(line) * width
        read = line_reads[0, line]
        upper = np.uint64(zeros if read < 0 else start + read * pitch)
        if is_backwards and not resized:
            for value in range(width):
                scratch[to + value] = wide[upper + end - np.uint64(1) - value]
            continue
        if not resized:
            for value in range(width):
                scratch[to + value] = wide[upper + begin + value]
            continue
        read = line_reads[1, line]
        lower = np.uint64(zeros if read < 0 else start + read * pitch)
        part = line_parts[line]
        for value in range(begin, end):
            above = np.float32(wide[upper + value])
            scratch[between + value] = above + part * (np.float32(wide[lower + value]) - above)
        for value in range(width):
            first = scratch[between + np.uint64(column_reads[0, value])]
            second = scratch[between + np.uint64(column_reads[1, value])]
            scratch[to + value] = first + column_parts[value] * (second - first)


@compiled
def blur_plane(out, scratch, taps, near_lines, near_columns, height, width, factor, addend):
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
    most_lines = lines_at_once(height, width)
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


@partial(compiled, fastmath={"contract"})
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


@compiled
def lie_within(values, most):
    for value in values:  # noqa: SIM110  # all() is no loop of Numba's
        if not (value >= 0 and value <= most):  # nor is NaN within
            return False
    return True


@compiled
def rows_lie_within(rows, most):
    for row in range(rows.shape[0]):
        for column in range(rows.shape[1]):
            if rows[row, column] < 0 or rows[row, column] > most[column]:
                return False
    return True


@compiled
def lines_at_once(height, width):
    return min(height, max(1, _VALUES_AT_ONCE // width))


@compiled
def mix_rows(out, rows, lam, index, first, last):
    """Write blends ``first`` .. ``last`` - 1 of ``[N, values]`` with their partners."""
    size = np.uint64(rows.shape[1])
    for row in range(first, last):
        partner, rest = index[row], np.float32(1) - lam[row]
        for value in range(size):
            mine = rows[row, value]  # which λ' = 1 leaves as it is
            out[row, value] = mine - rest * (mine - rows[partner, value])
