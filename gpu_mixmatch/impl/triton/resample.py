"""Zoom, resized cuts and blur: two small matrix products a tile, reads a byte, writes a value.

Padding, shift, zoom, cuts, flip and blur move and weigh the pixels of one axis at a time: a view is
``down · image · acrossᵀ`` with a banded matrix per axis. `weights_kernel` writes the bands once per
view, `resample_kernel` multiplies them by the images of all channels. A band is as wide as a tile's
sources, so that blur costs no more than zoom, and reflection costs nothing.

Products run at the rate of half precision, yet lose nothing that the result could hold. A byte
widened to 16 bits *is* the float16 of byte · 2^-24, exactly, without an instruction. A weight is
one float16, or two that sum to it, where the result has more digits than bfloat16; what is between
the products likewise. Sums are float32. Images of floats are multiplied in float32.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch.impl.tables import root_of_area
from gpu_mixmatch.impl.triton.launch import blocks, launch
from gpu_mixmatch.impl.triton.mixup import blend
from gpu_mixmatch.impl.triton.rows import (
    cut_draws,
    cut_kind,
    cut_out,
    image_of,
    inverse,
    normalisation,
    normalised,
    packed_draws,
)
from gpu_mixmatch.types import LEAST_SIGMA, Draws, Geometry, MixUpParams, Scaling

_LEAST_SIGMA = tl.constexpr(LEAST_SIGMA)
# Weights and what is between the products stay clear of float16's smallest numbers: a weight of 1
# is 2^15, hence a pixel is byte · 2^(15 - 24) in between and byte · 2^(15 - 24 + 15) at the end.
_OF_ONE = tl.constexpr(2.0**15)
_OF_BYTE = tl.constexpr(2.0**-6)

# Draws and images may begin anywhere, and a batch of another size is no other kernel.
_DRAWS = ["pitch", "to_zoom"]
_NUMBERS = ["num_x", "num_u", "inverse_u", "stride_x_image", "stride_u_image"]
_ANYWHERE = ["x_ptr", "u_ptr", "scale", "bias"]


# Weights


class _Axis(NamedTuple):
    """What moves the pixels of one axis of a view, in a kernel: whole numbers as float32.

    Attributes:
        in_size: Pixels of the image.
        size: Pixels of the view.
        slope: By how much a pixel further on reads further, in units of 1 / (2 · size).
        start: Where the first pixel reads, in these units.
        most: Where the last source is read, in these units.
        unit: 1 / (2 · size).
        shift: Where the window, or what is cut out of it, begins in the image.
    """

    in_size: Any
    size: Any
    slope: Any
    start: Any
    most: Any
    unit: Any
    shift: Any


@triton.jit
def _axis(in_size, size, shift, flip, before, kept, RESIZED: tl.constexpr):
    direction = tl.where(flip > 0, -1, 1)
    start = tl.where(flip > 0, size - 1, 0)
    slope, most = direction.to(tl.float32), 0.0
    if RESIZED:
        # (position + 1/2) · kept / size - 1/2
        slope = (2 * direction * kept).to(tl.float32)
        start = (2 * start + 1) * kept - size
        most = ((kept - 1) * 2 * size).to(tl.float32)
    shift += before
    width = size.to(tl.float32)
    unit = 1.0 / (2.0 * width)
    return _Axis(
        in_size.to(tl.float32), width, slope, start.to(tl.float32), most, unit, shift.to(tl.float32)
    )


@triton.jit
def _padded(position, weight, size, MODE: tl.constexpr):
    """Where a pixel of the padded image lies in the image, and its weight, 0 for black."""
    if MODE == "reflect":
        position = (size - 1.0) - tl.abs((size - 1.0) - tl.abs(position))
    elif MODE == "edge":
        position = tl.minimum(tl.maximum(position, 0.0), size - 1.0)
    else:
        weight = tl.where((position >= 0.0) & (position < size), weight, 0.0)
    return position, weight


@triton.jit
def _read(position, axis, MODE: tl.constexpr, RESIZED: tl.constexpr):
    """The two sources of pixels before blur, and their weights."""
    read = position.to(tl.float32) * axis.slope + axis.start
    distance = tl.zeros_like(read)
    if RESIZED:
        units = tl.minimum(tl.maximum(read, 0.0), axis.most)
        # half a unit keeps whole pixels on the right side of rounding
        read = tl.floor((units + 0.5) * axis.unit)
        distance = (units - read * (2.0 * axis.size)) * axis.unit
    first, of_first = _padded(read + axis.shift, 1.0 - distance, axis.in_size, MODE)
    second, of_second = _padded(read + (axis.shift + 1.0), distance, axis.in_size, MODE)
    return first, of_first, second, of_second


@triton.jit
def _tap(distance, falloff, RADIUS: tl.constexpr):
    """A weight of the Gaussian, unnormalised."""
    weight = tl.exp2(falloff * (distance * distance))
    return tl.where(tl.abs(distance) <= RADIUS, weight, 0.0)


@triton.jit
def _taps(start, position, falloff, size, TILE: tl.constexpr, RADIUS: tl.constexpr, NEAR):
    """Weights of pixels ``[P]`` in a tile of blurred ones: a Gaussian and its reflections."""
    end = size - 1.0
    place = tl.minimum((start + tl.arange(0, TILE)).to(tl.float32), end)[:, None]
    position = position.to(tl.float32)[None, :]
    weight = _tap(position - place, falloff, RADIUS)
    if (start < RADIUS) | (start + (TILE + RADIUS) > size):
        between = (position > 0.0) & (position < end)  # the ends are their own reflections
        if NEAR:
            reflected = _tap(position + place, falloff, RADIUS)
            reflected += _tap((end - position) + (end - place), falloff, RADIUS)
            weight += tl.where(between, reflected, 0.0)
        else:
            # pixels further out repeat with this period, forwards and backwards in turn
            period = tl.maximum(2.0 * end, 1.0)
            periods = tl.ceil(RADIUS / period).to(tl.int32)
            weight = tl.zeros_like(weight)
            for turn in tl.range(-periods, periods + 2, num_stages=1):
                offset = turn * period
                reflected = _tap(offset - position - place, falloff, RADIUS)
                weight += _tap(offset + position - place, falloff, RADIUS)
                weight += tl.where(between, reflected, 0.0)
        weight = tl.where(position <= end, weight, 0.0)
    return weight


@triton.jit
def _in_halves(value):
    """Two float16 that sum to a float32, to 22 digits."""
    high = value.to(tl.float16)
    return high, (value - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _gathered(weights, source, sources, total):
    """Add the weights ``[T, P]`` of pixels to those of their sources, a product by ones."""
    ones = tl.where(sources[:, None] == source[None, :], 1.0, 0.0).to(tl.float16).trans()
    high, low = _in_halves(weights)
    return tl.dot(high, ones, tl.dot(low, ones, total))


@triton.jit(do_not_specialize=_DRAWS, do_not_specialize_on_alignment=["draws_ptr", "chain_ptr"])
def weights_kernel(
    table_ptr,
    first_ptr,
    draws_ptr,
    pitch,
    to_zoom,
    chain_ptr,
    IN_HEIGHT: tl.constexpr,
    IN_WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    MOVES: tl.constexpr,
    PADDING: tl.constexpr,
    MODE: tl.constexpr,
    CUT: tl.constexpr,
    ROOT: tl.constexpr,
    RADIUS: tl.constexpr,
    TILE: tl.constexpr,
    SOURCES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    POSITIONS: tl.constexpr,
    POSITIONS_AT_ONCE: tl.constexpr,
    PARTS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """The weights of one tile of lines or of columns of a view, and the first of its sources.

    CUT is a `cut_kind`. Without MOVES images are views already, and only blurred.
    """
    RESIZED: tl.constexpr = CUT >= 2
    DOWN: tl.constexpr = (HEIGHT + TILE - 1) // TILE
    ACROSS: tl.constexpr = (WIDTH + TILE - 1) // TILE
    # nearly all blurs reach less far than an image: then no pixel is reflected twice
    NEAR: tl.constexpr = RADIUS < HEIGHT - 1 and RADIUS < WIDTH - 1
    REACH: tl.constexpr = triton.next_power_of_2(2 * RADIUS + 1)
    row = tl.program_id(0) // (DOWN + ACROSS)
    tile = tl.program_id(0) % (DOWN + ACROSS)
    first_ptr += row.to(tl.int64) * (DOWN + ACROSS) + tile
    table_ptr += (row.to(tl.int64) * (DOWN + ACROSS) + tile) * (PARTS * TILE * SOURCES)
    cuts_ptr = draws_ptr + to_zoom + row.to(tl.int64) * 4
    draws_ptr += row
    is_down = tile < DOWN
    size = tl.where(is_down, HEIGHT, WIDTH)
    start = (tile - tl.where(is_down, 0, DOWN)) * TILE
    in_size = tl.where(is_down, IN_HEIGHT, IN_WIDTH)
    shift, flip, before, kept = 0 * start, 0 * start, 0, in_size
    if MOVES:
        shift = tl.load(draws_ptr + tl.where(is_down, 0, pitch)) - PADDING
        flip = tl.where(is_down, 0, tl.load(draws_ptr + 2 * pitch))
    if CUT == 3:
        cuts_ptr += tl.where(is_down, 0, 2)
        before = tl.minimum(tl.load(cuts_ptr), in_size - 1)  # at least one pixel is left
        kept = in_size - before - tl.minimum(tl.load(cuts_ptr + 1), in_size - 1 - before)
    elif CUT > 0:
        top, left, tall, wide = cut_out(
            chain_ptr + row.to(tl.int64) * 4, IN_HEIGHT, IN_WIDTH, HEIGHT, WIDTH, CUT == 2, ROOT
        )
        before, kept = tl.where(is_down, top, left), tl.where(is_down, tall, wide)
    axis = _axis(in_size, size, shift, flip, before, kept, RESIZED)
    falloff, share = 0.0, _OF_ONE
    if RADIUS > 0:
        sigma = tl.load(draws_ptr + 7 * pitch).to(tl.float32, bitcast=True)
        sigma = tl.maximum(sigma, _LEAST_SIGMA)
        falloff = -0.7213475204444817 / (sigma * sigma)  # of exp2: -1/2 · log2(e)
        distance = (tl.arange(0, REACH) - RADIUS).to(tl.float32)
        share = _OF_ONE / tl.sum(_tap(distance, falloff, RADIUS), axis=0)

    # the pixels before blur that a tile is made of; reflection folds them back into these
    lowest = tl.maximum(start - RADIUS, 0)
    highest = tl.minimum(start + (TILE - 1 + RADIUS), size - 1)
    least = in_size.to(tl.float32)
    for behind in tl.range(0, POSITIONS, POSITIONS_AT_ONCE, num_stages=1):
        position = tl.minimum(lowest + behind + tl.arange(0, POSITIONS_AT_ONCE), highest)
        read = _read(position, axis, MODE, RESIZED)
        nearest = tl.minimum(read[0], read[2]) if RESIZED else read[0]
        least = tl.minimum(least, tl.min(nearest, axis=0))
    first = least.to(tl.int32)
    if WORDS:
        first = first // 4 * 4
    first = tl.maximum(tl.minimum(first, in_size - SOURCES), 0)
    tl.store(first_ptr, first)

    column = tl.arange(0, AT_ONCE)
    source = column
    if WORDS:  # the order in which masks take bytes out of words
        source = column // 16 * 16 + column // 2 % 4 * 4 + column % 2 * 2 + column // 8 % 2
        source = tl.where(is_down, column, source)
    in_tile = tl.arange(0, TILE)
    for behind in tl.range(0, SOURCES, AT_ONCE, num_stages=1):
        sources = (first + behind + source).to(tl.float32)
        weight = tl.zeros([TILE, AT_ONCE], tl.float32)
        if RADIUS == 0:
            read = _read(start + in_tile, axis, MODE, RESIZED)
            of_first, of_second = (read[1] * share)[:, None], (read[3] * share)[:, None]
            weight = tl.where(sources[None, :] == read[0][:, None], of_first, 0.0)
            if RESIZED:
                weight += tl.where(sources[None, :] == read[2][:, None], of_second, 0.0)
        else:
            for further in tl.range(0, POSITIONS, POSITIONS_AT_ONCE, num_stages=1):
                position = lowest + further + tl.arange(0, POSITIONS_AT_ONCE)
                taps = _taps(start, position, falloff, axis.size, TILE, RADIUS, NEAR)
                read = _read(position, axis, MODE, RESIZED)
                shares = (read[1] * share)[None, :]
                weight = _gathered(taps * shares, read[0], sources, weight)
                if RESIZED:
                    shares = (read[3] * share)[None, :]
                    weight = _gathered(taps * shares, read[2], sources, weight)
        at = in_tile[:, None] * (PARTS * SOURCES) + (behind + column)[None, :]
        if table_ptr.dtype.element_ty == tl.float16:
            high, low = _in_halves(weight)
            tl.store(table_ptr + at, high)
            if PARTS == 2:
                tl.store(table_ptr + at + SOURCES, low)
        else:
            tl.store(table_ptr + at, weight / _OF_ONE)


# Products


class _Image(NamedTuple):
    """An image in a kernel."""

    ptr: Any
    stride_channel: Any
    stride_line: Any
    stride_pixel: Any


@triton.jit
def _half(bits):
    """The lowest 16 bits, or the byte, as they are: a byte is byte · 2^-24."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _of_words(words):
    """Four bytes each of words ``[LINES, S / 4]``, as ``[LINES, S]`` float16.

    Bytes 0 and 2, and bytes 1 and 3, stay together in a register, as do the registers that a thread
    of the product holds: sources come in the order of the weights.
    """
    LINES: tl.constexpr = words.shape[0]
    FOURS: tl.constexpr = words.shape[1] // 4
    even = words & 0x00FF00FF
    odd = (words >> 8) & 0x00FF00FF
    front = tl.join(_half(even), _half(odd))
    back = tl.join(_half(even >> 16), _half(odd >> 16))
    pixels = tl.reshape(tl.join(front, back), [LINES, FOURS, 4, 2, 2])
    return tl.reshape(tl.permute(pixels, [0, 1, 3, 2, 4]), [LINES, FOURS * 16])


@triton.jit
def _sources(
    image,
    channel,
    line,
    column,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SOURCES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Pixels from a line and a column on, as the product wants them."""
    line += tl.arange(0, AT_ONCE)
    if SOURCES > HEIGHT:
        line = tl.minimum(line, HEIGHT - 1)  # whose weight is 0
    start = channel * image.stride_channel
    if WORDS:
        word = column // 4 + tl.arange(0, AT_ONCE // 4)
        if SOURCES > WIDTH:
            word = tl.minimum(word, WIDTH // 4 - 1)
        # all lines begin equally far behind the beginning of a word
        address = image.ptr.to(tl.int64) + start
        words_ptr = (address & -4).to(tl.pointer_type(tl.int32))
        words_ptr += (line * (image.stride_line // 4))[:, None] + word[None, :]
        behind = (address & 3).to(tl.int32) * 8
        words = tl.load(words_ptr)
        if behind > 0:
            low = words.to(tl.uint32, bitcast=True) >> behind.to(tl.uint32)
            words = low.to(tl.int32, bitcast=True) | (tl.load(words_ptr + 1) << (32 - behind))
        pixels = _of_words(words)
    else:
        column += tl.arange(0, AT_ONCE)
        if SOURCES > WIDTH:
            column = tl.minimum(column, WIDTH - 1)
        at = (line * image.stride_line)[:, None] + (column * image.stride_pixel)[None, :]
        pixels = tl.load(image.ptr + start + at)
        if image.ptr.dtype.element_ty == tl.uint8:
            pixels = _half(pixels)
        else:
            pixels = pixels.to(tl.float32)
    return pixels


@triton.jit
def _parts(pointers, held, SOURCES: tl.constexpr, AT_ONCE: tl.constexpr, PARTS: tl.constexpr):
    """Weights and what they lack, which is the same where there is one part, if not held."""
    if SOURCES == AT_ONCE and held is not None:
        parts = held
    else:
        high = tl.load(pointers)
        low = high
        if PARTS == 2:
            low = tl.load(pointers + SOURCES)
        parts = high, low
    return parts


@triton.jit
def _product(left, right, total):
    return tl.dot(left, right, total, input_precision="tf32x3")


@triton.jit
def _tile(
    image,
    channel,
    held,
    lines_ptr,
    columns_ptr,
    line,
    column,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    SOURCES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PARTS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """A tile of one channel, ``[TILE, TILE]`` float32, in units of a byte or of the images."""
    element = lines_ptr.dtype.element_ty
    down = tl.arange(0, AT_ONCE)[None, :]
    across = tl.arange(0, AT_ONCE)[:, None]
    value = tl.zeros([TILE, TILE], tl.float32)
    for below in tl.range(0, SOURCES, AT_ONCE, num_stages=1):
        blurred = tl.zeros([AT_ONCE, TILE], tl.float32)
        for beside in tl.range(0, SOURCES, AT_ONCE, num_stages=1):
            pixels = _sources(
                image, channel, line + below, column + beside,
                HEIGHT, WIDTH, SOURCES, AT_ONCE, WORDS,
            )  # fmt: skip
            weights = _parts(columns_ptr + beside + across, held[1], SOURCES, AT_ONCE, PARTS)
            blurred = _product(pixels, weights[0], blurred)
            if PARTS == 2:
                blurred = _product(pixels, weights[1], blurred)
        weights = _parts(lines_ptr + below + down, held[0], SOURCES, AT_ONCE, PARTS)
        high = blurred.to(element)
        if PARTS == 2:
            rest = (blurred - high.to(tl.float32)).to(element)
            value = _product(weights[0], rest, value)
            value = _product(weights[1], high, value)
        value = _product(weights[0], high, value)
    if element == tl.float16:
        value *= _OF_BYTE
    return value


@triton.jit
def _eight(value):
    """Every eighth column of a tile, whose columns are in the order of `_in_eights`."""
    DOWN: tl.constexpr = value.shape[0]
    value = tl.reshape(value, [DOWN, 2, 2, 4, 2])
    first, second = tl.split(tl.permute(value, [0, 3, 1, 2, 4]))
    even, odd = tl.split(first), tl.split(second)
    v0, v4 = tl.split(even[0])
    v2, v6 = tl.split(even[1])
    v1, v5 = tl.split(odd[0])
    v3, v7 = tl.split(odd[1])
    return v0, v1, v2, v3, v4, v5, v6, v7


@triton.jit
def _in_eights(place):
    """An order of 32 columns in which a thread of the product holds eight neighbours."""
    return place // 2 % 4 * 8 + place // 8 * 2 + place % 2


@triton.jit
def _joined(a, b, c, d, e, f, g, h):
    joined = tl.join(tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h)))
    return tl.reshape(joined, [a.shape[0], a.shape[1] * 8])


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_ANYWHERE)
def resample_kernel(
    out_ptr,
    x_ptr,
    u_ptr,
    num_x,
    num_u,
    inverse_u,
    stride_x_image,
    stride_x_channel,
    stride_x_line,
    stride_x_pixel,
    stride_u_image,
    stride_u_channel,
    stride_u_line,
    stride_u_pixel,
    table_ptr,
    first_ptr,
    scale,
    bias,
    CHANNELS: tl.constexpr,
    IN_HEIGHT: tl.constexpr,
    IN_WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    TILE: tl.constexpr,
    SOURCES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PARTS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """One tile of a view, all its channels: weights down, bytes, weights across."""
    DOWN: tl.constexpr = (HEIGHT + TILE - 1) // TILE
    ACROSS: tl.constexpr = (WIDTH + TILE - 1) // TILE
    VALUES: tl.constexpr = CHANNELS * HEIGHT * WIDTH
    row = tl.program_id(0) // (DOWN * ACROSS)
    tile_down = tl.program_id(0) % (DOWN * ACROSS) // ACROSS
    tile_across = tl.program_id(0) % ACROSS
    from_x, place = image_of(row, num_x, num_u, inverse_u)
    place = place.to(tl.int64)
    image_ptr = x_ptr if from_x else u_ptr
    if stride_x_image is None:
        IN_PLANE: tl.constexpr = IN_HEIGHT * IN_WIDTH
        image = _Image(image_ptr + place * (CHANNELS * IN_PLANE), IN_PLANE, IN_WIDTH, 1)
    else:
        stride_image = tl.where(from_x, stride_x_image, stride_u_image).to(tl.int64)
        image = _Image(
            image_ptr + place * stride_image,
            tl.where(from_x, stride_x_channel, stride_u_channel).to(tl.int64),
            tl.where(from_x, stride_x_line, stride_u_line).to(tl.int64),
            tl.where(from_x, stride_x_pixel, stride_u_pixel).to(tl.int64),
        )
    out_ptr += row.to(tl.int64) * VALUES
    table_ptr += row.to(tl.int64) * ((DOWN + ACROSS) * (TILE * PARTS * SOURCES))
    first_ptr += row.to(tl.int64) * (DOWN + ACROSS)
    line = tl.load(first_ptr + tile_down)
    column = tl.load(first_ptr + DOWN + tile_across)

    THREES: tl.constexpr = CHANNELS_LAST and CHANNELS == 3 and TILE == 32
    in_tile = tl.arange(0, TILE)
    down = (tile_down * TILE + in_tile)[:, None]
    across = (tile_across * TILE + (_in_eights(in_tile) if THREES else in_tile))[None, :]
    lines_ptr = table_ptr + down * (PARTS * SOURCES)
    columns_ptr = table_ptr + (DOWN * TILE + across) * (PARTS * SOURCES)
    element = out_ptr.dtype.element_ty
    held = None, None
    if SOURCES == AT_ONCE:  # for all channels
        source = tl.arange(0, SOURCES)
        held = (
            _parts(lines_ptr + source[None, :], None, SOURCES, AT_ONCE, PARTS),
            _parts(columns_ptr + source[:, None], None, SOURCES, AT_ONCE, PARTS),
        )
    if THREES:
        red = tl.zeros([TILE, TILE], element)
        green, blue = red, red
        for channel in tl.static_range(3):
            value = _tile(
                image, channel, held, lines_ptr, columns_ptr, line, column,
                IN_HEIGHT, IN_WIDTH, TILE, SOURCES, AT_ONCE, PARTS, WORDS,
            )  # fmt: skip
            value = normalised(value, channel, scale, bias, PER_CHANNEL, CHANNELS)
            red, green, blue = green, blue, value.to(element)
        r0, r1, r2, r3, r4, r5, r6, r7 = _eight(red)
        g0, g1, g2, g3, g4, g5, g6, g7 = _eight(green)
        b0, b1, b2, b3, b4, b5, b6, b7 = _eight(blue)
        # eight pixels are 24 values: three stores of 16 bytes in half precision
        at = (tile_across * (TILE * 3) + in_tile // 8 * 24 + in_tile % 8)[None, :]
        out_ptr += down * (WIDTH * 3) + at
        inside = (down < HEIGHT) & (at < WIDTH * 3)
        tl.store(out_ptr, _joined(r0, g0, b0, r1, g1, b1, r2, g2), mask=inside)
        inside = (down < HEIGHT) & (at + 8 < WIDTH * 3)
        tl.store(out_ptr + 8, _joined(b2, r3, g3, b3, r4, g4, b4, r5), mask=inside)
        inside = (down < HEIGHT) & (at + 16 < WIDTH * 3)
        tl.store(out_ptr + 16, _joined(g5, b5, r6, g6, b6, r7, g7, b7), mask=inside)
    else:
        # weights stay in registers for channels that follow each other without a loop
        TOGETHER: tl.constexpr = CHANNELS if CHANNELS <= 4 else 1
        for first_channel in tl.range(0, CHANNELS, TOGETHER, num_stages=1):
            for next_channel in tl.static_range(TOGETHER):
                channel = first_channel + next_channel
                value = _tile(
                    image, channel, held, lines_ptr, columns_ptr, line, column,
                    IN_HEIGHT, IN_WIDTH, TILE, SOURCES, AT_ONCE, PARTS, WORDS,
                )  # fmt: skip
                value = normalised(value, channel, scale, bias, PER_CHANNEL, CHANNELS)
                if CHANNELS_LAST:
                    at = (down * WIDTH + across) * CHANNELS + channel
                else:
                    at = channel * (HEIGHT * WIDTH) + down * WIDTH + across
                inside = (down < HEIGHT) & (across < WIDTH)
                tl.store(out_ptr + at, value.to(element), mask=inside)


# Launches


class _Shape(NamedTuple):
    """Sizes of a tile: outputs, sources, and pixels between zoom and blur; in all, and at once."""

    tile: int
    sources: int
    sources_at_once: int
    positions: int
    positions_at_once: int


@lru_cache(maxsize=64)
def _shape(
    in_size: tuple[int, int], size: tuple[int, int], cut: int, radius: int, words: bool
) -> _Shape:
    longest, longest_in = max(size), max(in_size)
    tile = 32 if longest > 16 else 16
    reach = tile + 2 * radius
    span = reach
    if cut >= 2:  # between pixels that lie at most this much further apart than those of the view
        stretch = zip(in_size if cut == 2 else size, size, strict=True)
        span = max(blocks((reach - 1) * most, out) for most, out in stretch) + 2
    # words may begin up to three pixels before the first. What is not read in words takes more
    # registers: fewer pixels at once
    sources = _in_products(min(span + 3 * words, longest_in), 64 if words else 32)
    return _Shape(tile, *sources, *_in_products(min(reach, longest), 64))


def _in_products(count: int, most: int) -> tuple[int, int]:
    """At least ``count`` terms of a sum, and how many of them one product takes."""
    if count <= most:
        size = max(16, triton.next_power_of_2(count))
        return size, size
    return blocks(count, 32) * 32, 32


def _is_of_words(images: Tensor) -> bool:
    """Whether all lines of ``[M, C, H, W]`` bytes begin equally far behind that of a word."""
    *outer, stride_pixel = images.stride()
    return stride_pixel == 1 and all(stride % 4 == 0 for stride in outer)


def resample(
    sources: tuple[Tensor, ...],
    params: Draws,
    geometry: Geometry,
    scaling: Scaling,
    *,
    channels_last_in: bool,
    out: Tensor,
    workspace: Workspace | None,
    mixup: MixUpParams | None = None,
    moves: bool = True,
) -> None:
    """Resize what is cut out of windows, and blur it.

    Args:
        sources, params, geometry, scaling, out, workspace, mixup: As for the implementation's
            ``augment``.
        channels_last_in: Likewise.
        moves: Whether rows are shifted and flipped; else sources are views already.
    """
    num_rows, channels, height, width = out.shape
    first, last = sources[0], sources[-1]
    num_x, num_u = (len(first) if len(sources) > 1 else 0), len(last)
    views = tuple(
        source.permute(0, 3, 1, 2) if channels_last_in else source for source in (first, last)
    )
    in_height, in_width = views[0].shape[2:]
    cut = cut_kind(geometry)
    plain = all(view.is_contiguous() for view in views)
    of_bytes = first.dtype == torch.uint8
    words = of_bytes and in_width % 4 == 0 and (plain or all(map(_is_of_words, views)))
    split = of_bytes and out.dtype != torch.bfloat16
    shape = _shape((in_height, in_width), (height, width), cut, geometry.blur_radius, words)
    parts = {"PARTS": 2 if split else 1, "WORDS": words}

    scratch = workspace or Workspace()
    tile = shape.tile
    tiles_down, tiles_across = blocks(height, tile), blocks(width, tile)
    tiles = tiles_down + tiles_across
    table = scratch.empty(
        "weights",
        (num_rows, tiles, tile, parts["PARTS"], shape.sources),
        torch.float16 if of_bytes else torch.float32,
        out.device,
    )
    starts = scratch.empty("starts", (num_rows, tiles), torch.int32, out.device)
    sizes = {
        "IN_HEIGHT": in_height,
        "IN_WIDTH": in_width,
        "HEIGHT": height,
        "WIDTH": width,
        "TILE": tile,
        "SOURCES": shape.sources,
        "AT_ONCE": shape.sources_at_once,
        **parts,
    }
    launch(
        weights_kernel,
        num_rows * tiles,
        out.device,
        table,
        starts,
        *packed_draws(params),
        cut_draws(params, geometry),
        MOVES=moves,
        PADDING=geometry.padding,
        MODE=geometry.padding_mode,
        CUT=cut,
        ROOT=root_of_area(in_height, in_width),
        RADIUS=geometry.blur_radius,
        POSITIONS=shape.positions,
        POSITIONS_AT_ONCE=shape.positions_at_once,
        **sizes,
        num_warps=2,
    )
    strides = (None,) * 8 if plain else (*views[0].stride(), *views[1].stride())
    scale, bias, per_channel = normalisation(scaling, channels, out.device)
    target = out
    if mixup:
        target = scratch.empty("unmixed", (num_rows, *out.shape[1:]), out.dtype, out.device)
    launch(
        resample_kernel,
        num_rows * tiles_down * tiles_across,
        out.device,
        target,
        first,
        last,
        num_x,
        num_u,
        inverse(num_u),
        *strides,
        table,
        starts,
        scale,
        bias,
        CHANNELS=channels,
        CHANNELS_LAST=not out.is_contiguous(),
        PER_CHANNEL=per_channel,
        **sizes,
        num_warps=2 if of_bytes else 4,
    )
    if mixup:
        blend(target, mixup, out)
