"""The compiled loops of chains: a view is bytes in the cache until its last step.

A view is planes of ``pitch`` bytes each: its pixels, one behind the other, then at least one byte
that is 0 and stays 0, which is read for what lies outside. As in `loops` nothing is checked here,
and places are unsigned. Every result is to the last bit that of `eager.chain`: a product is rounded
before anything is added to it, so nothing here may be compiled with ``fastmath``.
"""

from typing import NamedTuple

import numpy as np
from numpy import uint64 as place

from gpu_mixmatch.impl.numba.loops import blur_plane, compiled
from gpu_mixmatch.impl.tables import Kind

_NOTHING, _WARP, _, _COLOR, _CONTRAST, _SHARPNESS, _AUTOCONTRAST, _EQUALIZE, _HUE = map(int, Kind)
# What tables of bytes do, in numbers: a loop over bytes that are looked up is not vectorised.
BRIGHTNESS, MASK, INVERT = range(len(Kind), len(Kind) + 3)
_LUMA_AT_ONCE = 2**12  # pixels: the sum of as many fits into an int32
_WEIGHTS = 2**11  # the unit of a weight between two pixels, as `eager.cut` has it
_ZERO, _ONE, _MOST = np.float32(0), np.float32(1), np.float32(255)


class Program(NamedTuple):
    """What all views of a batch have in common.

    Attributes:
        channels: C.
        height: Of the images, like the next.
        width: See there.
        view_height: Of the views, like the next.
        view_width: See there.
        padding: Pixels that images are padded by.
        pitch: Bytes of a plane.
        marks: 1 where pixels that lie outside become 0 at the end, else 0.
        resizes: Whether what is cut out is resized.
        first_slot: The column of `ChainParams.chain` that is the first slot.
        slots: The number of slots.
        cutout: The column of a cutout's centre; -1 for none.
        shares: Whether its side is a share of the width, in 2^-16.
        together: Whether a pixel's values lie together in what is written.
    """

    channels: int
    height: int
    width: int
    view_height: int
    view_width: int
    padding: int
    pitch: int
    marks: int
    resizes: bool
    first_slot: int
    slots: int
    cutout: int
    shares: bool
    together: bool


@compiled
def run_views(
    out, row, num_views, source, strides, draws, regions, tables, taps, factors, program, scratch,
    first, last,
):  # fmt: skip
    """Write all views of images ``first`` .. ``last`` - 1, image by image.

    View k of image m is row ``row + k·M + m`` of ``out``. ``regions`` are what is cut out of each
    window as it is mirrored, none where all of it is kept.
    """
    top, left, flip, _, _, drawn = draws
    lines, columns, near_lines, near_columns, records, strengths, ends = tables
    scale, bias, paint = factors
    planes, floats = scratch
    channels, pitch = program.channels, program.pitch
    height, width = program.view_height, program.view_width
    count = height * width
    image_size = channels * program.height * program.width
    num_images = len(source) // max(image_size, 1)
    half = (channels + program.marks) * pitch
    here, there, whole = planes[:half], planes[half : 2 * half], planes[2 * half :]
    for plane in range(2 * (channels + program.marks)):
        planes[plane * pitch + count] = 0
    index, sums = np.empty(width, np.int32), np.empty(width, np.int16)
    table, counts = np.empty(256, np.uint8), np.empty((4, 256), np.int32)
    of_lines, of_columns = np.empty((3, height), np.int32), np.empty((3, width), np.int32)
    between, edges = np.empty(program.width, np.int32), np.empty((2, program.width), np.uint64)
    above, before, tall, long = 0, 0, height, width
    for image in range(first, last):
        for view in range(num_views):
            mine = row + view * num_images + image
            if len(regions):
                above, before, tall, long = regions[mine]
                before = program.width - before - long if flip[mine] else before
            resized = program.resizes and (tall != height or long != width)
            crop(
                whole if resized else here, program.height * program.width if resized else pitch,
                source, image * image_size, strides, lines, columns, top[mine] + above,
                left[mine] + before, flip[mine], tall, long, edges, program,
            )  # fmt: skip
            if resized:
                _weigh_reads(of_lines, tall)
                _weigh_reads(of_columns, long)
                resize(here, whole, between, of_lines, of_columns, long, program)
            marked = False
            for slot in range(program.first_slot, program.first_slot + program.slots):
                record = records[drawn[mine, slot]]
                strength = strengths[drawn[mine, slot]]
                kind = record[0]
                if kind == _NOTHING:
                    continue
                if kind == _WARP:
                    if program.marks and not marked:
                        for pixel in range(place(half - pitch), place(half - pitch + count)):
                            here[pixel] = 1
                        marked = True
                    moved = channels + marked
                    warp(there, here, record, index, height, width, pitch, moved)
                    here, there = there, here
                elif kind == BRIGHTNESS:
                    shade(here, np.int32(0), strength, count, pitch, channels)
                elif kind == MASK:
                    mask(here, np.uint8(record[2]), count, pitch, channels)
                elif kind == INVERT:
                    invert(here, record[2], count, pitch, channels)
                elif kind == _COLOR:
                    if channels == 3:
                        color(here, strength, count, pitch)
                elif kind == _CONTRAST:
                    contrast(here, strength, count, pitch, channels)
                elif kind == _SHARPNESS:
                    if height >= 3 and width >= 3:
                        sharpen(there, here, strength, sums, height, width, pitch, channels)
                        if marked:
                            for pixel in range(place(half - pitch), place(half)):
                                there[pixel] = here[pixel]
                        here, there = there, here
                elif kind == _AUTOCONTRAST:
                    autocontrast(here, table, count, pitch, channels)
                elif kind == _EQUALIZE:
                    equalize(here, table, counts, count, pitch, channels)
                elif channels == 3:
                    turn_hues(here, record[2], ends, count, pitch)
                if record[1]:
                    marked = False
            at = place(mine) * place(channels * count)
            if taps.shape[1] > 1:
                room = (taps.shape[1] - 1) * width
                for plane in range(channels):
                    from_plane = here[plane * pitch : plane * pitch + count]
                    for pixel in range(count):
                        floats[room + pixel] = from_plane[pixel]
                    to = (mine * channels + plane) * count
                    blur_plane(
                        out[to : to + count], floats, taps[mine], near_lines, near_columns, height,
                        width, scale[plane], bias[plane],
                    )  # fmt: skip
            else:
                write_planes(out, at, here, scale, bias, count, program)
            if marked:
                cover(out, at, here[half - pitch :], count, program)
            if program.cutout >= 0:
                side = np.int64(drawn[mine, program.cutout + 2])
                side = (side * width) >> 16 if program.shares else side
                upper = ((drawn[mine, program.cutout] * height) >> 24) - side // 2
                start = ((drawn[mine, program.cutout + 1] * width) >> 24) - side // 2
                area = (upper, upper + side, start, start + side)
                paint_over(out, at, area, paint, program)


# From an image to planes


@compiled
def crop(
    to, pitch, source, at, strides, lines, columns, above, before, mirrored, tall, long, edges,
    program,
):  # fmt: skip
    """Copy a window of a padded image of any layout, mirrored or not, to planes.

    ``lines`` and ``columns`` are those that the padded image repeats, -1 for zeros.
    """
    first = min(max(program.padding - before, 0), long)  # columns that lie in the image
    last = max(min(program.padding + program.width - before, long), first)
    inside = before + first - program.padding
    step, inner = place(strides[2]), place(last - first)
    outer = 0  # columns of the padding: where they go, and what they repeat
    for pixel in range(long):
        if not first <= pixel < last:
            edges[0, outer] = long - 1 - pixel if mirrored else pixel
            edges[1, outer] = max(columns[before + pixel], 0) * strides[2]
            outer += 1
    is_black = program.padding > 0 and columns[0] < 0
    for line in range(tall):
        read = lines[above + line]
        for plane in range(program.channels):
            mine = place(plane * pitch + line * long)
            if read < 0:
                for pixel in range(place(long)):
                    to[mine + pixel] = 0
                continue
            theirs = place(at + plane * strides[0] + read * strides[1])
            begin = theirs + place(inside) * step
            if mirrored:
                start = mine + place(long - last)
                end = begin + (inner - place(1)) * step
                if step == 1:
                    for pixel in range(inner):
                        to[start + pixel] = source[end - pixel]
                else:
                    for pixel in range(inner):
                        to[start + pixel] = source[end - pixel * step]
            elif step == 1:
                start = mine + place(first)
                for pixel in range(inner):
                    to[start + pixel] = source[begin + pixel]
            else:
                start = mine + place(first)
                for pixel in range(inner):
                    to[start + pixel] = source[begin + pixel * step]
            if is_black:
                for edge in range(place(outer)):
                    to[mine + edges[0, edge]] = 0
            else:
                for edge in range(place(outer)):
                    to[mine + edges[0, edge]] = source[theirs + edges[1, edge]]


@compiled
def _weigh_reads(reads, kept):
    """The pixels that each one of a view lies between, and the second's weight, ``[3, n]``."""
    size = reads.shape[1]
    for pixel in range(size):
        read = min(max((2 * pixel + 1) * kept - size, 0), 2 * size * (kept - 1))
        first = read // (2 * size)
        reads[0, pixel], reads[1, pixel] = first, min(first + 1, kept - 1)
        reads[2, pixel] = ((read - first * 2 * size) * _WEIGHTS + size) // (2 * size)


@compiled
def resize(to, source, between, of_lines, of_columns, long, program):
    """Resize planes of lines of ``long`` pixels, bilinear, in whole numbers."""
    height, width = program.view_height, place(program.view_width)
    for line in range(height):
        weight = of_lines[2, line]
        rest = np.int32(_WEIGHTS - weight)
        for plane in range(program.channels):
            begin = plane * program.height * program.width
            upper = place(begin + of_lines[0, line] * long)
            lower = place(begin + of_lines[1, line] * long)
            for pixel in range(place(long)):
                between[pixel] = source[upper + pixel] * rest + source[lower + pixel] * weight
            mine = place(plane * program.pitch) + place(line) * width
            for pixel in range(width):
                share = of_columns[2, pixel]
                value = between[place(of_columns[0, pixel])] * np.int32(_WEIGHTS - share)
                value += between[place(of_columns[1, pixel])] * share
                to[mine + pixel] = (value + 2**21) >> 22


# Operations


@compiled
def warp(to, source, record, index, height, width, pitch, planes):
    """Read each pixel where an affine map in 16.16 says; what lies outside is 0."""
    a0, a1, a2, a3, a4, a5 = record[2], record[3], record[4], record[5], record[6], record[7]
    long = place(width)
    if a0 == 65536 and a3 == 0:  # lines stay lines: a translation, a shear across
        for line in range(height):
            shift, read = (a1 * line + a2) >> 16, (a4 * line + a5) >> 16
            first, last = max(0, -shift), min(width, width - shift)
            if read < 0 or read >= height or first >= last:
                first = last = width
            for plane in range(planes):
                mine = place(plane * pitch + line * width)
                for pixel in range(place(first)):
                    to[mine + pixel] = 0
                start, begin = mine + place(first), place(plane * pitch + read * width)
                begin += place(first + shift)
                for pixel in range(place(last - first)):
                    to[start + pixel] = source[begin + pixel]
                for pixel in range(place(last), long):
                    to[mine + pixel] = 0
        return
    nowhere = np.int32(height * width)
    for line in range(height):
        across, down = np.int32(a1 * line + a2), np.int32(a4 * line + a5)
        for pixel in range(long):
            x = np.int32(across + np.int32(pixel) * np.int32(a0)) >> np.int32(16)
            y = np.int32(down + np.int32(pixel) * np.int32(a3)) >> np.int32(16)
            inside = (np.uint32(x) < np.uint32(width)) & (np.uint32(y) < np.uint32(height))
            index[pixel] = y * np.int32(width) + x if inside else nowhere
        for plane in range(planes):
            theirs = place(plane * pitch)
            mine = theirs + place(line) * long
            for pixel in range(long):
                to[mine + pixel] = source[theirs + place(np.uint32(index[pixel]))]


@compiled
def through_table(data, at, table, count):
    """Look every byte of a plane up."""
    for pixel in range(place(count)):
        data[at + pixel] = table[data[at + pixel]]


@compiled
def blended(first, second, factor):
    """Go from one byte to another, or beyond."""
    start = np.float32(first)
    value = start + factor * (np.float32(second) - start)
    return np.uint8(np.int32(min(max(value, _ZERO), _MOST)))


@compiled
def luma(red, green, blue):
    """How bright a pixel is."""
    bright = np.int32(red) * np.int32(19595) + np.int32(green) * np.int32(38470)
    return np.int32(bright + np.int32(blue) * np.int32(7471) + np.int32(32768)) >> np.int32(16)


@compiled
def color(data, factor, count, pitch):
    to_green, to_blue = place(pitch), place(2 * pitch)
    for pixel in range(place(count)):
        red, green, blue = data[pixel], data[to_green + pixel], data[to_blue + pixel]
        gray = np.int32(luma(red, green, blue))
        data[pixel] = blended(gray, red, factor)
        data[to_green + pixel] = blended(gray, green, factor)
        data[to_blue + pixel] = blended(gray, blue, factor)


@compiled
def contrast(data, factor, count, pitch, channels):
    to_green, to_blue = place(pitch), place(2 * pitch)
    total = np.int64(0)
    for start in range(0, count, _LUMA_AT_ONCE):
        part = np.int32(0)
        stop = place(min(start + _LUMA_AT_ONCE, count))
        if channels == 3:
            for pixel in range(place(start), stop):
                part += luma(data[pixel], data[to_green + pixel], data[to_blue + pixel])
        else:
            for pixel in range(place(start), stop):
                part += np.int32(data[pixel])
        total += part
    mean = (2 * total + count) // (2 * count)
    shade(data, np.int32(mean), factor, count, pitch, channels)


@compiled
def shade(data, first, factor, count, pitch, channels):
    """Blend with one byte."""
    for plane in range(channels):
        at = place(plane * pitch)
        for pixel in range(place(count)):
            data[at + pixel] = blended(first, data[at + pixel], factor)


@compiled
def mask(data, kept, count, pitch, channels):
    """Keep some bits."""
    for plane in range(channels):
        at = place(plane * pitch)
        for pixel in range(place(count)):
            data[at + pixel] &= kept


@compiled
def invert(data, first, count, pitch, channels):
    """Invert the bytes from one on; 256 inverts none."""
    for plane in range(channels):
        at = place(plane * pitch)
        for pixel in range(place(count)):
            value = data[at + pixel]
            data[at + pixel] = value if value < first else np.uint8(255) - value


@compiled
def sharpen(to, data, factor, sums, height, width, pitch, channels):
    """Blend with a smooth image; pixels at an edge of the image stay."""
    long = place(width)
    for plane in range(channels):
        at = place(plane * pitch)
        end = at + place(height - 1) * long
        for pixel in range(long):
            to[at + pixel], to[end + pixel] = data[at + pixel], data[end + pixel]
        for line in range(1, height - 1):
            mine = at + place(line) * long
            above, below = mine - long, mine + long
            for pixel in range(long):
                upper, lower = np.int16(data[above + pixel]), np.int16(data[below + pixel])
                sums[pixel] = upper + np.int16(data[mine + pixel]) + lower
            to[mine], to[below - place(1)] = data[mine], data[below - place(1)]
            for pixel in range(place(1), long - place(1)):
                value = np.int32(data[mine + pixel])
                total = np.int32(sums[pixel - place(1)]) + np.int32(sums[pixel])
                total = np.int32(total + np.int32(sums[pixel + place(1)]) + np.int32(4) * value + 6)
                smooth = np.int32(total * np.int32(20165)) >> np.int32(18)  # total // 13
                to[mine + pixel] = blended(np.int32(smooth), value, factor)


@compiled
def autocontrast(data, table, count, pitch, channels):
    """Stretch each channel to 0 .. 255, in float64."""
    for plane in range(channels):
        at = place(plane * pitch)
        low, high = data[at], data[at]
        for pixel in range(place(count)):
            value = data[at + pixel]
            low = value if value < low else low
            high = value if value > high else high
        if high <= low:
            continue
        scale = 255.0 / (np.float64(high) - np.float64(low))
        offset = -np.float64(low) * scale
        for value in range(256):
            stretched = np.float64(value) * scale + offset
            table[value] = np.uint8(np.int32(min(max(stretched, 0.0), 255.0)))
        through_table(data, at, table, count)


@compiled
def equalize(data, table, counts, count, pitch, channels):
    """Give each channel a flat histogram, as far as it goes."""
    for plane in range(channels):
        at, quarter = place(plane * pitch), place(count // 4)
        for value in range(256):
            for part in range(4):
                counts[part, value] = 0
        for pixel in range(quarter):  # four at once: equal neighbours do not wait for each other
            counts[0, data[at + pixel]] += 1
            counts[1, data[at + quarter + pixel]] += 1
            counts[2, data[at + place(2) * quarter + pixel]] += 1
            counts[3, data[at + place(3) * quarter + pixel]] += 1
        for pixel in range(place(4) * quarter, place(count)):
            counts[0, data[at + pixel]] += 1
        last = 0
        for value in range(256):
            counts[0, value] += counts[1, value] + counts[2, value] + counts[3, value]
            last = counts[0, value] if counts[0, value] else last
        step = (count - last) // 255
        if step == 0:
            continue
        before = step // 2
        for value in range(256):
            table[value] = min(before // step, 255)
            before += counts[0, value]
        through_table(data, at, table, count)


@compiled
def turn_hues(data, turn, ends, count, pitch):
    """Turn the hues of Pillow's HSV images, by `eager.chain.hue`'s numbers as float32.

    These are whole and below 2^24. A quotient of such, rounded down, is that of whole numbers.
    ``ends`` are bits of the whole hues that lose one to Pillow's own floats: bytes, each read at a
    place of its own, would keep the loop from being vectorised.
    """
    first, second, third, fourth = ends[0], ends[1], ends[2], ends[3]
    to_green, to_blue = place(pitch), place(2 * pitch)
    two, four, six, whole_circle = np.float32(2), np.float32(4), np.float32(6), np.float32(65025)
    for pixel in range(place(count)):
        red, green = np.float32(data[pixel]), np.float32(data[to_green + pixel])
        blue = np.float32(data[to_blue + pixel])
        value = max(red, max(green, blue))
        spread = value - min(red, min(green, blue))
        saturation = np.float32(np.int32(_MOST * spread / max(value, _ONE)))
        sixths = two * spread + blue - red if green == value else four * spread + red - green
        sixths = green - blue if red == value else sixths
        circle = six * max(spread, _ONE)
        sixths = sixths + circle if sixths < _ZERO else sixths
        hue = np.int32(_MOST * sixths / circle)
        is_whole = np.float32(hue) * circle == _MOST * sixths
        low, high = (second, fourth) if hue & 64 else (first, third)
        lost = ((high if hue & 128 else low) >> np.uint64(hue & 63)) & np.uint64(1)
        hue = np.int32(hue + turn - (np.int32(lost) if is_whole else np.int32(0))) & np.int32(255)
        around = six * np.float32(hue)
        # how much of each channel's light the saturation takes, in 1/255
        share = min(max(np.float32(510) - abs(around - np.float32(765)), _ZERO), _MOST)
        light = value * (whole_circle - saturation * share)
        data[pixel] = np.uint8(np.int32((light + np.float32(32512)) / whole_circle))
        share = min(max(abs(around - np.float32(510)) - _MOST, _ZERO), _MOST)
        light = value * (whole_circle - saturation * share)
        data[to_green + pixel] = np.uint8(np.int32((light + np.float32(32512)) / whole_circle))
        share = min(max(abs(around - np.float32(1020)) - _MOST, _ZERO), _MOST)
        light = value * (whole_circle - saturation * share)
        data[to_blue + pixel] = np.uint8(np.int32((light + np.float32(32512)) / whole_circle))


# From planes to a view


@compiled
def write_planes(out, at, here, scale, bias, count, program):
    channels, pitch = place(program.channels), place(program.pitch)
    if not program.together:
        for plane in range(channels):
            mine, to = plane * pitch, at + plane * place(count)
            factor, addend = scale[plane], bias[plane]
            for pixel in range(place(count)):
                out[to + pixel] = np.float32(here[mine + pixel]) * factor + addend
    elif channels == 3:
        for pixel in range(place(count)):
            to = at + pixel * place(3)
            out[to] = np.float32(here[pixel]) * scale[0] + bias[0]
            out[to + place(1)] = np.float32(here[pitch + pixel]) * scale[1] + bias[1]
            out[to + place(2)] = np.float32(here[place(2) * pitch + pixel]) * scale[2] + bias[2]
    else:
        for plane in range(channels):
            mine, to = plane * pitch, at + plane
            for pixel in range(place(count)):
                value = np.float32(here[mine + pixel]) * scale[plane] + bias[plane]
                out[to + pixel * channels] = value


@compiled
def cover(out, at, seen, count, program):
    """Write 0 where pixels lie outside of what has moved."""
    channels = place(program.channels)
    step, jump = (channels, place(1)) if program.together else (place(1), place(count))
    for plane in range(channels):
        to = at + plane * jump
        for pixel in range(place(count)):
            if seen[pixel] == 0:
                out[to + pixel * step] = _ZERO


@compiled
def paint_over(out, at, area, paint, program):
    """Paint what lies in a view of a rectangle of lines and columns, the last ones left out."""
    channels, width = place(program.channels), place(program.view_width)
    jump = place(1) if program.together else place(program.view_height) * width
    step = channels if program.together else place(1)
    upper, lower, start, end = area
    for plane in range(channels):
        for line in range(max(upper, 0), min(lower, program.view_height)):
            to = at + plane * jump + place(line) * width * step
            for pixel in range(max(start, 0), min(end, program.view_width)):
                out[to + place(pixel) * step] = paint[plane]
