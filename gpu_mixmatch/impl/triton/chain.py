"""Views of a chain of operations in one launch, or a few: a byte read, a value written.

A program builds a tile of pixels, all channels at once: a pixel is one int32, a byte per channel
and a bit for what lies outside. What a view's operations are is known to the program as a number,
so that it branches past all others. Warps are maps of places, composed backwards from the pixel
that is written; what changes bytes follows forwards.

Operations that need more than a pixel are events. The statistics of a view give a table of bytes,
and sharpness a whole image of pixels, which what follows reads. A program that holds a whole view
runs its events itself. Larger views have a launch for each event that one of them may have, at most
as many as there are slots: two for RandAugment, one for ColorJitter.

A blur follows in launches of its own: views are written as bytes, `resample` makes values of them,
and what is hidden, outside or cut out, is painted over those.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch._chain import columns, slots_of
from gpu_mixmatch.impl.tables import Kind, chain_tables, kind_of, kinds_of, root_of_area
from gpu_mixmatch.impl.triton.launch import blocks, launch
from gpu_mixmatch.impl.triton.mixup import blend
from gpu_mixmatch.impl.triton.resample import resample
from gpu_mixmatch.impl.triton.rows import (
    cut_kind,
    cut_out,
    image_of,
    inverse,
    normalisation,
    packed_draws,
    padded,
)
from gpu_mixmatch.types import Chain, ChainParams, Draws, Geometry, MixUpParams, Scaling

_WARP = tl.constexpr(int(Kind.WARP))
_BYTES = tl.constexpr(int(Kind.BYTES))
_COLOR = tl.constexpr(int(Kind.COLOR))
_CONTRAST = tl.constexpr(int(Kind.CONTRAST))
_SHARPNESS = tl.constexpr(int(Kind.SHARPNESS))
_AUTOCONTRAST = tl.constexpr(int(Kind.AUTOCONTRAST))
_EQUALIZE = tl.constexpr(int(Kind.EQUALIZE))
_HUE = tl.constexpr(int(Kind.HUE))
_EVENTS = (Kind.CONTRAST, Kind.SHARPNESS, Kind.AUTOCONTRAST, Kind.EQUALIZE)
# Bits of what a chain's entries are
_HAS_WARP = tl.constexpr(1 << Kind.WARP)
_HAS_COLOR = tl.constexpr(1 << Kind.COLOR)
_HAS_TABLE = tl.constexpr(
    1 << Kind.BYTES | 1 << Kind.CONTRAST | 1 << Kind.AUTOCONTRAST | 1 << Kind.EQUALIZE
)
_HAS_SHARPNESS = tl.constexpr(1 << Kind.SHARPNESS)
_HAS_HUE = tl.constexpr(1 << Kind.HUE)
_OUTSIDE = tl.constexpr(1 << 24)

_PIXELS = 1024  # of a tile
_MOST_IN_ONE = 2048  # pixels of a tile that may hold a whole view
_TILES = 4  # that a program runs an event on, at most: fewer counts to add up
# NVIDIA's assembler, if it may choose how few registers events have, takes 48 or 64 and spills some
_OF_EVENTS = {} if torch.version.hip else {"maxnreg": 255}
_MOST_SIZE = 2**14 - 1  # coordinates in 16.16 are int32
_MOST_CHANNELS = 3


class _View(NamedTuple):
    """What a program reads of a row: all scalars.

    Attributes:
        row: Its number.
        image_ptr: Its image.
        top, left, flip: As in `AugmentParams`.
        cut_top, cut_left, cut_height, cut_width: What is cut out of its window, before the flip.
        slots_ptr: Its entries.
        kinds: The `Kind` of each slot, four bits each.
    """

    row: Any
    image_ptr: Any
    top: Any
    left: Any
    flip: Any
    cut_top: Any
    cut_left: Any
    cut_height: Any
    cut_width: Any
    slots_ptr: Any
    kinds: Any


class _Memory(NamedTuple):
    """What is the same for all rows, or has a place for each."""

    records_ptr: Any
    bytes_ptr: Any
    made_ptr: Any
    stage_ptr: Any
    num_rows: Any


@triton.jit
def _view_of(
    row, x_ptr, u_ptr, num_x, num_u, inverse_u, stride_x, stride_u,
    draws_ptr, pitch, to_zoom, chain_ptr, records_ptr,
    IN_HEIGHT: tl.constexpr, IN_WIDTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    CUT: tl.constexpr, ROOT: tl.constexpr,
    SLOTS: tl.constexpr, FIRST_SLOT: tl.constexpr, DRAWN: tl.constexpr,
):  # fmt: skip
    """Read the draws of a row. CUT is a `cut_kind`."""
    from_x, place = image_of(row, num_x, num_u, inverse_u)
    image_ptr = u_ptr + place * stride_u.to(tl.int64)
    if from_x:
        image_ptr = x_ptr + place * stride_x.to(tl.int64)
    chain_ptr += row.to(tl.int64) * DRAWN
    slots_ptr = chain_ptr + FIRST_SLOT
    kinds = tl.zeros([], tl.int64)
    for slot in tl.static_range(SLOTS):
        kind = tl.load(records_ptr + tl.load(slots_ptr + slot) * 8)
        kinds |= kind.to(tl.int64) << (4 * slot)
    flip = tl.load(draws_ptr + 2 * pitch.to(tl.int64) + row)
    cut_top, cut_left, cut_height, cut_width = 0, 0, IN_HEIGHT, IN_WIDTH
    if CUT == 3:
        zoom_ptr = draws_ptr + to_zoom.to(tl.int64) + row * 4
        cut_top = tl.minimum(tl.load(zoom_ptr), IN_HEIGHT - 1)
        cut_left = tl.minimum(tl.load(zoom_ptr + 2), IN_WIDTH - 1)
        cut_height = tl.maximum(IN_HEIGHT - cut_top - tl.load(zoom_ptr + 1), 1)
        cut_width = tl.maximum(IN_WIDTH - cut_left - tl.load(zoom_ptr + 3), 1)
    elif CUT > 0:
        cut_top, cut_left, cut_height, cut_width = cut_out(
            chain_ptr, IN_HEIGHT, IN_WIDTH, HEIGHT, WIDTH, CUT == 2, ROOT
        )
    if CUT > 0 and flip > 0:  # windows are mirrored first, and what is cut out of them with them
        cut_left = IN_WIDTH - cut_left - cut_width
    return _View(
        row, image_ptr, tl.load(draws_ptr + row), tl.load(draws_ptr + pitch.to(tl.int64) + row),
        flip, cut_top, cut_left, cut_height, cut_width, slots_ptr, kinds,
    )  # fmt: skip


@triton.jit
def _tile(
    number, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr
):
    """Lines ``[LINES, 1]`` and columns ``[1, COLUMNS]`` of a tile, and where it is in the view.

    Neighbouring threads take neighbouring pixels. Triton, if it knew that pixels lie in a row,
    would give a thread four of them, for wide stores, and send each of them from one layout to
    another through shared memory. The grid has one axis: the number of a program along another is
    0, which the compiler does not know.
    """
    ACROSS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    down = (number // ACROSS * LINES + tl.arange(0, LINES))[:, None]
    across = (number % ACROSS * COLUMNS + tl.arange(0, COLUMNS)) ^ tl.program_id(1)
    across = across[None, :]
    if HEIGHT % LINES == 0 and WIDTH % COLUMNS == 0:
        mask = tl.full([LINES, COLUMNS], 1, tl.int1)
    else:
        mask = (down < HEIGHT) & (across < WIDTH)
    return down, across, mask


# Pixels of the image


@triton.jit
def _window(
    line, column, mask, view,
    IN_HEIGHT: tl.constexpr, IN_WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    STRIDE_CHANNEL: tl.constexpr, STRIDE_LINE: tl.constexpr, STRIDE_PIXEL: tl.constexpr,
    PADDING: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Pixels of the shifted, maybe mirrored image."""
    column = tl.where(view.flip > 0, (IN_WIDTH - 1) - column, column)
    line, line_inside = padded(line, view.top, IN_HEIGHT, PADDING, MODE)
    column, column_inside = padded(column, view.left, IN_WIDTH, PADDING, MODE)
    if MODE == "zeros":
        mask = mask & line_inside & column_inside
    ptr = view.image_ptr + line * STRIDE_LINE + column * STRIDE_PIXEL
    pixel = tl.load(ptr, mask=mask, other=0).to(tl.int32)
    for channel in tl.static_range(1, CHANNELS):
        byte = tl.load(ptr + channel * STRIDE_CHANNEL, mask=mask, other=0).to(tl.int32)
        pixel |= byte << (8 * channel)
    return pixel


@triton.jit
def _between(position, start, kept, SIZE: tl.constexpr):
    """The pixels that one of the view lies between, and the second's weight in 1/2048."""
    read = (2 * position + 1) * kept - SIZE
    read = tl.minimum(tl.maximum(read, 0), 2 * SIZE * (kept - 1))
    first = read // (2 * SIZE)
    weight = ((read - first * (2 * SIZE)) * 2048 + SIZE) // (2 * SIZE)
    return start + first, start + tl.minimum(first + 1, kept - 1), weight


@triton.jit
def _source(
    down, across, mask, view,
    IN_HEIGHT: tl.constexpr, IN_WIDTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, CUT: tl.constexpr,
    STRIDE_CHANNEL: tl.constexpr, STRIDE_LINE: tl.constexpr, STRIDE_PIXEL: tl.constexpr,
    PADDING: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Pixels of the view before the first slot, resized in whole numbers."""
    if CUT < 2:
        pixel = _window(
            down + view.cut_top, across + view.cut_left, mask, view, IN_HEIGHT, IN_WIDTH, CHANNELS,
            STRIDE_CHANNEL, STRIDE_LINE, STRIDE_PIXEL, PADDING, MODE,
        )  # fmt: skip
    else:
        line, next_line, weight_down = _between(down, view.cut_top, view.cut_height, HEIGHT)
        column, next_column, weight = _between(across, view.cut_left, view.cut_width, WIDTH)
        pixel = tl.zeros(mask.shape, tl.int32)
        sums = (pixel, pixel, pixel)
        for corner in tl.static_range(4):
            part = _window(
                next_line if corner > 1 else line, next_column if corner % 2 else column,
                mask, view, IN_HEIGHT, IN_WIDTH, CHANNELS,
                STRIDE_CHANNEL, STRIDE_LINE, STRIDE_PIXEL, PADDING, MODE,
            )  # fmt: skip
            share = weight_down if corner > 1 else 2048 - weight_down
            share *= weight if corner % 2 else 2048 - weight
            sums = (
                sums[0] + (part & 255) * share,
                sums[1] + ((part >> 8) & 255) * share,
                sums[2] + ((part >> 16) & 255) * share,
            )
        for channel in tl.static_range(CHANNELS):
            pixel |= ((sums[channel] + (1 << 21)) >> 22) << (8 * channel)
    return pixel


# What changes bytes


@triton.jit
def _blended(first, second, factor):
    """Go from one byte to another, or beyond: the product is rounded before it is added."""
    value = first.to(tl.float32) + factor * (second - first).to(tl.float32)
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)


@triton.jit
def _luma(pixel, CHANNELS: tl.constexpr):
    """How bright each pixel is."""
    bright = pixel & 255
    if CHANNELS == 3:
        bright = bright * 19595 + ((pixel >> 8) & 255) * 38470 + ((pixel >> 16) & 255) * 7471
        bright = (bright + 32768) >> 16
    return bright


@triton.jit
def _factor(record_ptr):
    return tl.load(record_ptr + 2).to(tl.float32, bitcast=True)


@triton.jit
def _turned(pixel, record_ptr, bytes_ptr, mask):
    """Turn the hues of Pillow's HSV images, in whole numbers."""
    red, green, blue = pixel & 255, (pixel >> 8) & 255, (pixel >> 16) & 255
    value = tl.maximum(tl.maximum(red, green), blue)
    spread = value - tl.minimum(tl.minimum(red, green), blue)
    saturation = 255 * spread // tl.maximum(value, 1)
    sixths = tl.where(green == value, 2 * spread + blue - red, 4 * spread + red - green)
    sixths = tl.where(red == value, green - blue, sixths)
    circle = 6 * tl.maximum(spread, 1)
    sixths = 255 * tl.where(sixths < 0, sixths + circle, sixths)
    turned = sixths // circle
    whole_ptr = bytes_ptr + tl.load(record_ptr + 3) * 256
    whole = tl.load(whole_ptr + turned, mask=mask, other=0).to(tl.int32)
    turned = tl.where(turned * circle == sixths, whole, turned)
    turned = (turned + tl.load(record_ptr + 2)) & 255

    sector = 6 * turned // 255
    part = 6 * turned - sector * 255
    saturation_part = saturation * part
    falling = (2 * value * (65025 - saturation_part) + 65025) // 130050
    rising = (2 * value * (65025 - 255 * saturation + saturation_part) + 65025) // 130050
    least = (2 * value * (65025 - 255 * saturation) + 65025) // 130050
    red = tl.where(sector == 1, falling, tl.where(sector == 4, rising, value))
    red = tl.where((sector == 2) | (sector == 3), least, red)
    green = tl.where((sector == 0) | (sector == 6), rising, tl.where(sector == 3, falling, value))
    green = tl.where((sector == 4) | (sector == 5), least, green)
    blue = tl.where(sector == 2, rising, tl.where(sector == 5, falling, value))
    blue = tl.where((sector < 2) | (sector == 6), least, blue)
    return red | (green << 8) | (blue << 16)


@triton.jit
def _changed(
    pixel, born, slot, kind, mask, view, memory,
    CHANNELS: tl.constexpr, SLOTS: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    """Pixels after a slot. Sharpness is none that is done here."""
    record_ptr = memory.records_ptr + tl.load(view.slots_ptr + slot) * 8
    if _HAS_WARP & KINDS and kind == _WARP:
        pixel = tl.where(born == slot, _OUTSIDE, pixel)
    if CHANNELS == 3:
        if _HAS_COLOR & KINDS and kind == _COLOR:
            factor, bright = _factor(record_ptr), _luma(pixel, CHANNELS)
            new = pixel & _OUTSIDE
            for channel in tl.static_range(CHANNELS):
                byte = (pixel >> (8 * channel)) & 255
                new |= _blended(bright, byte, factor) << (8 * channel)
            pixel = new
        if _HAS_HUE & KINDS and kind == _HUE:
            kept = pixel & _OUTSIDE
            pixel = _turned(pixel, record_ptr, memory.bytes_ptr, mask) | kept
    of_bytes = (kind == _BYTES) | (kind == _CONTRAST)
    of_bytes = of_bytes | (kind == _AUTOCONTRAST) | (kind == _EQUALIZE)
    if _HAS_TABLE & KINDS and of_bytes:
        table_ptr = memory.bytes_ptr + tl.load(record_ptr + 2) * 256
        step = 0
        if kind != _BYTES:
            place = view.row.to(tl.int64) * SLOTS + slot
            table_ptr = memory.made_ptr + place * (256 * CHANNELS)
            step = 256
        new = tl.where(tl.load(record_ptr + 1) == 0, pixel & _OUTSIDE, 0)
        for channel in tl.static_range(CHANNELS):
            byte_ptr = table_ptr + channel * step + ((pixel >> (8 * channel)) & 255)
            new |= tl.load(byte_ptr, mask=mask, other=0).to(tl.int32) << (8 * channel)
        pixel = new
    return pixel


@triton.jit
def _before(
    down, across, mask, view, memory, staged,
    IN_HEIGHT: tl.constexpr, IN_WIDTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, CUT: tl.constexpr,
    STRIDE_CHANNEL: tl.constexpr, STRIDE_LINE: tl.constexpr, STRIDE_PIXEL: tl.constexpr,
    PADDING: tl.constexpr, MODE: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    """Pixels of the view before its slots, or of the last one of ``staged`` stored images."""
    if _HAS_SHARPNESS & KINDS:
        if staged > 0:
            image = ((staged - 1) % 2) * memory.num_rows + view.row
            stage_ptr = memory.stage_ptr + image.to(tl.int64) * (HEIGHT * WIDTH)
            pixel = tl.load(stage_ptr + (down * WIDTH + across), mask=mask, other=0)
        else:
            pixel = _source(
                down, across, mask, view, IN_HEIGHT, IN_WIDTH, HEIGHT, WIDTH, CHANNELS, CUT,
                STRIDE_CHANNEL, STRIDE_LINE, STRIDE_PIXEL, PADDING, MODE,
            )  # fmt: skip
    else:
        pixel = _source(
            down, across, mask, view, IN_HEIGHT, IN_WIDTH, HEIGHT, WIDTH, CHANNELS, CUT,
            STRIDE_CHANNEL, STRIDE_LINE, STRIDE_PIXEL, PADDING, MODE,
        )  # fmt: skip
    return pixel


@triton.jit
def _kind(kinds, slot):
    return ((kinds >> (4 * slot)) & 15).to(tl.int32)


@triton.jit
def _moves(kinds, SLOTS: tl.constexpr):
    """Whether a warp is among the slots."""
    count = 0
    for slot in tl.static_range(SLOTS):
        count += (_kind(kinds, slot) == _WARP).to(tl.int32)
    return count > 0


@triton.jit
def _pixels(
    down, across, mask, view, memory, kinds, staged,
    IN_HEIGHT: tl.constexpr, IN_WIDTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, CUT: tl.constexpr,
    STRIDE_CHANNEL: tl.constexpr, STRIDE_LINE: tl.constexpr, STRIDE_PIXEL: tl.constexpr,
    PADDING: tl.constexpr, MODE: tl.constexpr, SLOTS: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    """Pixels after the slots that ``kinds`` has, from what comes before them; see `_before`.

    Where nothing moves, what belongs to a line or to a column is computed once.
    """
    born = tl.full(mask.shape, -1, tl.int32)  # the slot in which a pixel comes in from outside
    if _HAS_WARP & KINDS:
        if _moves(kinds, SLOTS):
            y, x = down + tl.zeros_like(born), across + tl.zeros_like(born)
            for turn in range(SLOTS):
                slot = SLOTS - 1 - turn
                if _kind(kinds, slot) == _WARP:
                    record_ptr = memory.records_ptr + tl.load(view.slots_ptr + slot) * 8
                    from_across = x * tl.load(record_ptr + 2) + y * tl.load(record_ptr + 3)
                    from_down = x * tl.load(record_ptr + 5) + y * tl.load(record_ptr + 6)
                    x = (from_across + tl.load(record_ptr + 4)) >> 16
                    y = (from_down + tl.load(record_ptr + 7)) >> 16
                    inside = (x >= 0) & (x < WIDTH) & (y >= 0) & (y < HEIGHT)
                    born = tl.where(inside | (born >= 0), born, slot)
            pixel = _before(
                y, x, mask & (born < 0), view, memory, staged,
                IN_HEIGHT, IN_WIDTH, HEIGHT, WIDTH, CHANNELS, CUT,
                STRIDE_CHANNEL, STRIDE_LINE, STRIDE_PIXEL, PADDING, MODE, KINDS,
            )  # fmt: skip
        else:
            pixel = _before(
                down, across, mask, view, memory, staged,
                IN_HEIGHT, IN_WIDTH, HEIGHT, WIDTH, CHANNELS, CUT,
                STRIDE_CHANNEL, STRIDE_LINE, STRIDE_PIXEL, PADDING, MODE, KINDS,
            )  # fmt: skip
    else:
        pixel = _before(
            down, across, mask, view, memory, staged,
            IN_HEIGHT, IN_WIDTH, HEIGHT, WIDTH, CHANNELS, CUT,
            STRIDE_CHANNEL, STRIDE_LINE, STRIDE_PIXEL, PADDING, MODE, KINDS,
        )  # fmt: skip
    for slot in range(SLOTS):
        kind = _kind(kinds, slot)
        if kind > 0:
            pixel = _changed(pixel, born, slot, kind, mask, view, memory, CHANNELS, SLOTS, KINDS)
    return pixel


# Events


@triton.jit
def _event(kinds, number, SLOTS: tl.constexpr):
    """An event of a row by its number.

    Its slot and kind, 0 where the row has fewer; which slots come before it and behind the last
    sharpness; and how many sharpnesses come before it.
    """
    count, found_slot, found_kind, first, staged = 0, SLOTS, 0, 0, 0
    for slot in tl.static_range(SLOTS):
        kind = _kind(kinds, slot)
        is_event = (kind >= _CONTRAST) & (kind <= _EQUALIZE)
        found = is_event & (count == number)
        found_slot = tl.where(found, slot, found_slot)
        found_kind = tl.where(found, kind, found_kind)
        before = (kind == _SHARPNESS) & (count < number)
        first = tl.where(before, slot + 1, first)
        staged += tl.where(before, 1, 0)
        count += tl.where(is_event, 1, 0)
    one = tl.full([], 1, tl.int64)
    # four bits of 16 slots fill 64: the first slots are a shift that may be of all of them
    before_it = tl.where(found_slot >= 16, -one, (one << (4 * tl.minimum(found_slot, 15))) - 1)
    behind = tl.where(first >= 16, 0 * one, -one << (4 * tl.minimum(first, 15)))
    return found_slot, found_kind, kinds & before_it & behind, staged


@triton.jit
def _sharpened(
    down, across, mask, view, memory, slot, kinds, staged,
    IN_HEIGHT: tl.constexpr, IN_WIDTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, CUT: tl.constexpr,
    STRIDE_CHANNEL: tl.constexpr, STRIDE_LINE: tl.constexpr, STRIDE_PIXEL: tl.constexpr,
    PADDING: tl.constexpr, MODE: tl.constexpr, SLOTS: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    """Pixels after sharpness: nine turns of all that comes before; those at an edge stay."""
    sums = tl.zeros(mask.shape, tl.int32)  # of red and, 16 bits above, of blue
    green_sums, centre = sums, sums
    for tap in range(9):
        pixel = _pixels(
            tl.minimum(tl.maximum(down + (tap // 3 - 1), 0), HEIGHT - 1),
            tl.minimum(tl.maximum(across + (tap % 3 - 1), 0), WIDTH - 1),
            mask, view, memory, kinds, staged,
            IN_HEIGHT, IN_WIDTH, HEIGHT, WIDTH, CHANNELS, CUT,
            STRIDE_CHANNEL, STRIDE_LINE, STRIDE_PIXEL, PADDING, MODE, SLOTS, KINDS,
        )  # fmt: skip
        sums += pixel & 0xFF00FF
        green_sums += (pixel >> 8) & 255
        centre = tl.where(tap == 4, pixel, centre)
    factor = _factor(memory.records_ptr + tl.load(view.slots_ptr + slot) * 8)
    new = centre & _OUTSIDE
    for channel in tl.static_range(CHANNELS):
        total = green_sums if channel == 1 else (sums >> (8 * channel)) & 0xFFFF
        byte = (centre >> (8 * channel)) & 255
        smooth = ((total + 4 * byte + 6) * 20165) >> 18  # // 13
        new |= _blended(smooth, byte, factor) << (8 * channel)
    inner = (down > 0) & (down < HEIGHT - 1) & (across > 0) & (across < WIDTH - 1)
    return tl.where(inner, new, centre)


@triton.jit
def _counted(pixel, mask, kind, CHANNELS: tl.constexpr):
    """Histograms of a tile: of each channel, or of how bright the pixels are, three times."""
    pixel, mask = tl.ravel(pixel), tl.ravel(mask)
    if kind == _CONTRAST:
        first = tl.histogram(_luma(pixel, CHANNELS), 256, mask=mask)
        second, third = first, first
    else:
        first = tl.histogram(pixel & 255, 256, mask=mask)
        second, third = first, first
        if CHANNELS > 1:
            second = tl.histogram((pixel >> 8) & 255, 256, mask=mask)
        if CHANNELS > 2:
            third = tl.histogram((pixel >> 16) & 255, 256, mask=mask)
    return first, second, third


@triton.jit
def _table(counts, kind, record_ptr, COUNT: tl.constexpr):
    """The table of bytes that a histogram gives."""
    byte = tl.arange(0, 256)
    table = byte
    if kind == _CONTRAST:
        total = tl.sum(counts.to(tl.int64) * byte, axis=0)
        mean = ((2 * total + COUNT) // (2 * COUNT)).to(tl.int32)
        table = _blended(mean + tl.zeros_like(byte), byte, _factor(record_ptr))
    else:
        high = tl.max(tl.where(counts > 0, byte, 0), axis=0)
        if kind == _EQUALIZE:
            last = tl.sum(tl.where(byte == high, counts, 0), axis=0)
            step = (COUNT - last) // 255
            before = tl.cumsum(counts, axis=0) - counts
            if step > 0:
                table = tl.minimum((step // 2 + before) // step, 255)
        else:
            low = tl.min(tl.where(counts > 0, byte, 255), axis=0)
            if high > low:
                scale = 255.0 / (high - low).to(tl.float64)
                value = byte.to(tl.float64) * scale + -low.to(tl.float64) * scale
                table = tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)
    return table.to(tl.uint8)


@triton.jit
def _store_tables(
    counts, kind, view, memory, slot,
    COUNT: tl.constexpr, CHANNELS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    record_ptr = memory.records_ptr + tl.load(view.slots_ptr + slot) * 8
    place = view.row.to(tl.int64) * SLOTS + slot
    table_ptr = memory.made_ptr + place * (256 * CHANNELS) + tl.arange(0, 256)
    for channel in tl.static_range(CHANNELS):
        tl.store(table_ptr + 256 * channel, _table(counts[channel], kind, record_ptr, COUNT))


# A batch of another size must not be another kernel: its counts may be 1 or divisible by 16, and
# its images and draws, slices often, may begin anywhere. Strides within an image are its layout's.
_NUMBERS = ["num_x", "num_u", "inverse_u", "num_rows", "stride_x", "stride_u", "pitch", "to_zoom"]
_ANYWHERE = ["x_ptr", "u_ptr", "draws_ptr", "chain_ptr", "scale", "bias"]


@triton.jit(do_not_specialize=[*_NUMBERS, "number"], do_not_specialize_on_alignment=_ANYWHERE)
def event_kernel(
    made_ptr, stage_ptr, counts_ptr, x_ptr, u_ptr, num_x, num_u, inverse_u, num_rows,
    stride_x, stride_u, draws_ptr, pitch, to_zoom, chain_ptr, records_ptr, bytes_ptr, number,
    IN_HEIGHT: tl.constexpr, IN_WIDTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, CUT: tl.constexpr, ROOT: tl.constexpr,
    STRIDE_CHANNEL: tl.constexpr, STRIDE_LINE: tl.constexpr, STRIDE_PIXEL: tl.constexpr,
    PADDING: tl.constexpr, MODE: tl.constexpr,
    SLOTS: tl.constexpr, FIRST_SLOT: tl.constexpr, DRAWN: tl.constexpr, KINDS: tl.constexpr,
    LINES: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Run the event of a number, where a row has as many, on a part of the row's view.

    Whichever program of a row adds its counts last makes the tables, and leaves zeros.
    """
    COUNT: tl.constexpr = HEIGHT * WIDTH
    DOWN: tl.constexpr = (HEIGHT + LINES - 1) // LINES
    ACROSS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    PARTS: tl.constexpr = (DOWN * ACROSS + TILES - 1) // TILES
    row = tl.program_id(0) // PARTS
    start = tl.program_id(0) % PARTS * TILES
    view = _view_of(
        row, x_ptr, u_ptr, num_x, num_u, inverse_u, stride_x, stride_u,
        draws_ptr, pitch, to_zoom, chain_ptr, records_ptr,
        IN_HEIGHT, IN_WIDTH, HEIGHT, WIDTH, CUT, ROOT, SLOTS, FIRST_SLOT, DRAWN,
    )  # fmt: skip
    memory = _Memory(records_ptr, bytes_ptr, made_ptr, stage_ptr, num_rows)
    slot, kind, kinds, staged = _event(view.kinds, number, SLOTS)
    if kind == _SHARPNESS:
        if _HAS_SHARPNESS & KINDS:
            image = (staged % 2) * num_rows + row
            for tile in range(TILES):
                down, across, mask = _tile(start + tile, HEIGHT, WIDTH, LINES, COLUMNS)
                mask = mask & (start + tile < DOWN * ACROSS)
                pixel = _sharpened(
                    down, across, mask, view, memory, slot, kinds, staged,
                    IN_HEIGHT, IN_WIDTH, HEIGHT, WIDTH, CHANNELS, CUT,
                    STRIDE_CHANNEL, STRIDE_LINE, STRIDE_PIXEL, PADDING, MODE, SLOTS, KINDS,
                )  # fmt: skip
                image_ptr = stage_ptr + image.to(tl.int64) * COUNT
                tl.store(image_ptr + (down * WIDTH + across), pixel, mask=mask)
    elif kind > 0:
        red = tl.zeros([256], tl.int32)
        green, blue = red, red
        for tile in range(TILES):
            down, across, mask = _tile(start + tile, HEIGHT, WIDTH, LINES, COLUMNS)
            mask = mask & (start + tile < DOWN * ACROSS)
            pixel = _pixels(
                down, across, mask, view, memory, kinds, staged,
                IN_HEIGHT, IN_WIDTH, HEIGHT, WIDTH, CHANNELS, CUT,
                STRIDE_CHANNEL, STRIDE_LINE, STRIDE_PIXEL, PADDING, MODE, SLOTS, KINDS,
            )  # fmt: skip
            counts = _counted(pixel, mask, kind, CHANNELS)
            red += counts[0]
            green += counts[1]
            blue += counts[2]
        counts_ptr += row.to(tl.int64) * (256 * CHANNELS + 1)
        sums_ptr = counts_ptr + 1 + tl.arange(0, 256)
        counts = (red, green, blue)
        for channel in tl.static_range(CHANNELS):
            count = counts[channel]
            tl.atomic_add(sums_ptr + 256 * channel, count, mask=count > 0, sem="relaxed")
        tl.debug_barrier()  # every thread's counts are added before this program arrives
        arrived = tl.atomic_add(counts_ptr, 1, sem="acq_rel", scope="gpu")
        if arrived == PARTS - 1:
            zeros = tl.zeros([256], tl.int32)
            red = tl.load(sums_ptr, cache_modifier=".cg")
            green, blue = red, red
            if CHANNELS > 1:
                green = tl.load(sums_ptr + 256, cache_modifier=".cg")
            if CHANNELS > 2:
                blue = tl.load(sums_ptr + 512, cache_modifier=".cg")
            for channel in tl.static_range(CHANNELS):
                tl.store(sums_ptr + 256 * channel, zeros)
            tl.store(counts_ptr, 0)  # for the next launch
            _store_tables((red, green, blue), kind, view, memory, slot, COUNT, CHANNELS, SLOTS)


@triton.jit
def _normalising(channel, scale, bias, PER_CHANNEL: tl.constexpr):
    """Scale and bias of a channel."""
    if PER_CHANNEL:
        scale, bias = tl.load(scale + channel), tl.load(bias + channel)
    return scale, bias


@triton.jit
def _painted(channel, scale, bias, COLOR: tl.constexpr):
    """The value of a channel that a cutout has."""
    value = 0.0
    if COLOR >= 0:
        value = tl.full([], (COLOR >> (8 * channel)) & 255, tl.float32) * scale + bias
    return value


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_ANYWHERE)
def chain_kernel(
    out_ptr, made_ptr, stage_ptr, x_ptr, u_ptr, num_x, num_u, inverse_u, num_rows,
    stride_x, stride_u, draws_ptr, pitch, to_zoom, chain_ptr, records_ptr, bytes_ptr, scale, bias,
    IN_HEIGHT: tl.constexpr, IN_WIDTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, CUT: tl.constexpr, ROOT: tl.constexpr,
    STRIDE_CHANNEL: tl.constexpr, STRIDE_LINE: tl.constexpr, STRIDE_PIXEL: tl.constexpr,
    PADDING: tl.constexpr, MODE: tl.constexpr,
    SLOTS: tl.constexpr, FIRST_SLOT: tl.constexpr, DRAWN: tl.constexpr, KINDS: tl.constexpr,
    EVENTS: tl.constexpr, CHANNELS_LAST: tl.constexpr, PER_CHANNEL: tl.constexpr,
    TO_MEAN: tl.constexpr, CUTOUT: tl.constexpr, COLOR: tl.constexpr,
    LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write a tile of a view; first, where the tile is all of it, run the view's events.

    A tile of bytes is written as planes: of each channel and, where a pixel may be hidden, one that
    says how: 0 not at all, 1 outside, 2 cut out.

    CUTOUT: 0 none, 1 with a side in pixels, 2 in 2^-16 of the width.
    """
    COUNT: tl.constexpr = HEIGHT * WIDTH
    DOWN: tl.constexpr = (HEIGHT + LINES - 1) // LINES
    ACROSS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    row = tl.program_id(0) // (DOWN * ACROSS)
    tile = tl.program_id(0) % (DOWN * ACROSS)
    down, across, mask = _tile(tile, HEIGHT, WIDTH, LINES, COLUMNS)
    view = _view_of(
        row, x_ptr, u_ptr, num_x, num_u, inverse_u, stride_x, stride_u,
        draws_ptr, pitch, to_zoom, chain_ptr, records_ptr,
        IN_HEIGHT, IN_WIDTH, HEIGHT, WIDTH, CUT, ROOT, SLOTS, FIRST_SLOT, DRAWN,
    )  # fmt: skip
    memory = _Memory(records_ptr, bytes_ptr, made_ptr, stage_ptr, num_rows)
    for number in range(EVENTS):
        slot, kind, kinds, staged = _event(view.kinds, number, SLOTS)
        if kind == _SHARPNESS:
            if _HAS_SHARPNESS & KINDS:
                pixel = _sharpened(
                    down, across, mask, view, memory, slot, kinds, staged,
                    IN_HEIGHT, IN_WIDTH, HEIGHT, WIDTH, CHANNELS, CUT,
                    STRIDE_CHANNEL, STRIDE_LINE, STRIDE_PIXEL, PADDING, MODE, SLOTS, KINDS,
                )  # fmt: skip
                image = (staged % 2) * num_rows + row
                image_ptr = stage_ptr + image.to(tl.int64) * COUNT
                tl.store(image_ptr + (down * WIDTH + across), pixel, mask=mask)
            tl.debug_barrier()  # what other threads stored is read next
        elif kind > 0:
            pixel = _pixels(
                down, across, mask, view, memory, kinds, staged,
                IN_HEIGHT, IN_WIDTH, HEIGHT, WIDTH, CHANNELS, CUT,
                STRIDE_CHANNEL, STRIDE_LINE, STRIDE_PIXEL, PADDING, MODE, SLOTS, KINDS,
            )  # fmt: skip
            counts = _counted(pixel, mask, kind, CHANNELS)
            _store_tables(counts, kind, view, memory, slot, COUNT, CHANNELS, SLOTS)
            tl.debug_barrier()
    _, _, kinds, staged = _event(view.kinds, SLOTS, SLOTS)
    pixel = _pixels(
        down, across, mask, view, memory, kinds, staged,
        IN_HEIGHT, IN_WIDTH, HEIGHT, WIDTH, CHANNELS, CUT,
        STRIDE_CHANNEL, STRIDE_LINE, STRIDE_PIXEL, PADDING, MODE, SLOTS, KINDS,
    )  # fmt: skip

    MOVES: tl.constexpr = TO_MEAN and (_HAS_WARP & KINDS) > 0
    hidden = tl.zeros_like(pixel)
    kept = mask
    if MOVES:
        kept = pixel < _OUTSIDE
        hidden = tl.where(kept, 0, 1)
    if CUTOUT > 0:
        cutout_ptr = chain_ptr + row.to(tl.int64) * DRAWN + (DRAWN - 3)
        side = tl.load(cutout_ptr + 2)
        if CUTOUT == 2:
            side = ((side.to(tl.int64) * WIDTH) >> 16).to(tl.int32)
        top = ((tl.load(cutout_ptr).to(tl.int64) * HEIGHT) >> 24).to(tl.int32) - side // 2
        left = ((tl.load(cutout_ptr + 1).to(tl.int64) * WIDTH) >> 24).to(tl.int32) - side // 2
        cut_out = (down >= top) & (down < top + side) & (across >= left) & (across < left + side)
        hidden = tl.where(cut_out, 2, hidden)
    offset = down * WIDTH + across
    if out_ptr.dtype.element_ty == tl.uint8:
        PLANES: tl.constexpr = CHANNELS + (1 if MOVES or CUTOUT > 0 else 0)
        out_ptr += row.to(tl.int64) * (PLANES * COUNT)
        for channel in tl.static_range(PLANES):
            plane = pixel >> (8 * channel) if channel < CHANNELS else hidden
            tl.store(out_ptr + (offset + channel * COUNT), (plane & 255).to(tl.uint8), mask=mask)
    else:
        out_ptr += row.to(tl.int64) * (CHANNELS * COUNT)
        for channel in tl.static_range(CHANNELS):
            of_scale, of_bias = _normalising(channel, scale, bias, PER_CHANNEL)
            value = ((pixel >> (8 * channel)) & 255).to(tl.float32) * of_scale + of_bias
            if MOVES:
                value = tl.where(kept, value, 0.0)
            if CUTOUT > 0:
                value = tl.where(cut_out, _painted(channel, of_scale, of_bias, COLOR), value)
            at = offset * CHANNELS + channel if CHANNELS_LAST else offset + channel * COUNT
            tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["scale", "bias"])
def cover_kernel(
    out_ptr, bytes_ptr, scale, bias,
    COUNT: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    PER_CHANNEL: tl.constexpr, COLOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Paint over values that are there what the last plane of a view's bytes says is hidden."""
    BLOCKS: tl.constexpr = (COUNT + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    place = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    bytes_ptr += row * ((CHANNELS + 1) * COUNT) + CHANNELS * COUNT
    hidden = tl.load(bytes_ptr + place, mask=place < COUNT, other=0)
    out_ptr += row * (CHANNELS * COUNT)
    for channel in tl.static_range(CHANNELS):
        of_scale, of_bias = _normalising(channel, scale, bias, PER_CHANNEL)
        value = tl.where(hidden == 2, _painted(channel, of_scale, of_bias, COLOR), 0.0)
        at = place * CHANNELS + channel if CHANNELS_LAST else place + channel * COUNT
        tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=hidden > 0)


def augment(
    sources: tuple[Tensor, ...],
    params: Draws,
    geometry: Geometry,
    scaling: Scaling,
    *,
    channels_last_in: bool,
    out: Tensor,
    workspace: Workspace | None,
    mixup: MixUpParams | None,
) -> None:
    """`impl.triton.augment` where there is a chain."""
    chain, cut = geometry.chain, geometry.cut
    assert chain is not None
    assert isinstance(params, ChainParams)
    num_rows, channels, height, width = out.shape
    device, scratch = out.device, workspace or Workspace()
    first, last = _alike(sources, channels_last_in)
    in_height, in_width = first.shape[2:]
    _check_sizes(channels, (height, width), (in_height, in_width))
    if num_rows == 0:
        return
    target = out
    # two rows of values are read as fast as two rows are built: see `mixing_rows` of benchmarks
    if mixup is not None:
        target = scratch.empty("unmixed", tuple(out.shape), out.dtype, device)
        target = target.as_strided(out.shape, out.stride())

    slots, count = slots_of(chain), height * width
    kinds = kinds_of(chain)
    events = _most_events(chain)
    lines, across = (triton.next_power_of_2(max(side, 8)) for side in (height, width))
    in_one = lines * across <= _MOST_IN_ONE
    if not in_one:
        across = min(across, 32)
        lines = _PIXELS // across
    tiles = blocks(height, lines) * blocks(width, across)
    tables = chain_tables(chain, height, width, device)
    made = stage = tables.bytes
    if events:
        made = scratch.empty("made", (num_rows, slots, 256 * channels), torch.uint8, device)
    if events and Kind.SHARPNESS in kinds:
        stage = scratch.empty("stage", (min(events, 2), num_rows, count), torch.int32, device)
    draws = packed_draws(params)
    of_slots = columns(cut, chain).slots
    num_u, num_x = last.shape[0], first.shape[0] if len(sources) > 1 else 0
    read = (
        *(first, last, num_x, num_u, inverse(num_u), num_rows, first.stride(0), last.stride(0)),
        *(*draws, params.chain.contiguous(), *tables),
    )
    shape = {
        "IN_HEIGHT": in_height,
        "IN_WIDTH": in_width,
        "HEIGHT": height,
        "WIDTH": width,
        "CHANNELS": channels,
        "CUT": cut_kind(geometry),
        "ROOT": root_of_area(in_height, in_width),
        "STRIDE_CHANNEL": first.stride(1),
        "STRIDE_LINE": first.stride(2),
        "STRIDE_PIXEL": first.stride(3),
        "PADDING": geometry.padding,
        "MODE": geometry.padding_mode,
        "SLOTS": slots,
        "FIRST_SLOT": of_slots.start,
        "DRAWN": params.chain.shape[1],
        "KINDS": sum(1 << kind for kind in kinds),
        "LINES": lines,
        "COLUMNS": across,
    }
    # a blend truncates otherwise where its product and sum are rounded as one
    compiled = {"enable_fp_fusion": False}
    if not in_one and events:
        counts = scratch.zeros("counts", (num_rows, 256 * channels + 1), torch.int32, device)
        parts = blocks(tiles, _TILES)
        for number in range(events):
            launch(
                event_kernel, num_rows * parts, device, made, stage, counts, *read, number,
                **shape, TILES=blocks(tiles, parts), num_warps=8, **compiled, **_OF_EVENTS,
            )  # fmt: skip
    scale, bias, per_channel = normalisation(scaling, channels, device)
    color = chain.cutout_color
    to_mean = chain.outside == "mean"
    hides = bool(chain.cutout) or (to_mean and Kind.WARP in kinds)
    written = target
    if geometry.blur_radius:
        planes = (num_rows, channels + hides, height, width)
        written = scratch.empty("bytes", planes, torch.uint8, device)
    of_values = {
        "CHANNELS_LAST": not out.is_contiguous(),
        "PER_CHANNEL": per_channel,
        "COLOR": -1 if color is None else _packed(color, channels),
    }
    launch(
        chain_kernel, num_rows * tiles, device,
        written, made, stage, *read, scale, bias,
        **shape,
        **of_values,
        EVENTS=events if in_one else 0,
        TO_MEAN=to_mean,
        CUTOUT=(1 if isinstance(chain.cutout, int) else 2) if chain.cutout else 0,
        num_warps=8 if in_one else 4,  # events need more registers than a thread has for 8 pixels
        **compiled,
    )  # fmt: skip
    if geometry.blur_radius:
        resample(
            (written[:, :channels],), params, Geometry(blur_radius=geometry.blur_radius), scaling,
            channels_last_in=False, out=target, workspace=scratch, moves=False,
        )  # fmt: skip
        if hides:
            launch(
                cover_kernel, num_rows * blocks(count, _PIXELS), device,
                target, written, scale, bias,
                **of_values, COUNT=count, CHANNELS=channels, BLOCK=_PIXELS, num_warps=4,
            )  # fmt: skip
    if mixup is not None:
        blend(target, mixup, out)


def _alike(sources: tuple[Tensor, ...], channels_last_in: bool) -> tuple[Tensor, Tensor]:
    """Images of x and of u, ``[M, C, H, W]`` by whatever strides, but by the same ones."""
    images = [s.permute(0, 3, 1, 2) if channels_last_in else s for s in sources]
    if images[0].stride()[1:] != images[-1].stride()[1:]:
        images = [image.contiguous() for image in images]
    return images[0], images[-1]


def _check_sizes(channels: int, size: tuple[int, int], in_size: tuple[int, int]) -> None:
    """Raise if pixels or places do not fit into 32 bits."""
    if channels > _MOST_CHANNELS:
        raise RuntimeError(
            f'impl="triton" cannot run operations drawn per view on images of {channels} channels, '
            f'at most on {_MOST_CHANNELS}: use impl="eager"'
        )
    if max(*size, *in_size) > _MOST_SIZE:
        raise RuntimeError(
            f'impl="triton" cannot run operations drawn per view on images of {in_size[0]} x '
            f'{in_size[1]} pixels, at most of {_MOST_SIZE} a side: use impl="eager"'
        )


@lru_cache(maxsize=64)
def _most_events(chain: Chain) -> int:
    """How many events a view may have: one for each slot that may hold one."""
    if chain.shuffled:
        return sum(kind_of(op.name) in _EVENTS for op in chain.ops)
    return chain.num_slots if kinds_of(chain) & set(_EVENTS) else 0


def _packed(color: tuple[int, ...], channels: int) -> int:
    """Bytes of a colour in one number."""
    each = color if len(color) == channels else color * channels
    return sum(byte << (8 * place) for place, byte in enumerate(each))
