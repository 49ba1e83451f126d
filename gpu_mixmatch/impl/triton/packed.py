"""Shift, crop, flip and zoom of large uint8 images in words of bytes: writes a value of each byte.

A thread holds `PIXELS` pixels with their channels of each of `LINES` lines. What it needs of a line
lies in words of four bytes: four pixels of a plane (NCHW), or the channels of a pixel (NHWC). Such
four bytes may begin anywhere, but two aligned words hold them. One permutation of bytes takes them
out of the two in the order of the view, whatever flip and padding make of it; where the bytes lie
is settled once for all lines and planes. A zoomed pixel lies between two of two lines: four pixels
and their neighbours span five at most, so that the same two words hold both.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_mixmatch.impl.triton.launch import blocks, launch
from gpu_mixmatch.impl.triton.rows import (
    cut_draws,
    cut_kind,
    drawn,
    image_of,
    inverse,
    normalisation,
    normalised,
    packed_draws,
    padded,
)
from gpu_mixmatch.types import Draws, Geometry, MixUpParams, Scaling

# Whether bytes are permuted by NVIDIA's instruction; the interpreter and other GPUs do without.
_PERMUTES = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)

_BIAS = tl.constexpr(2.0**23)


class _Rows(NamedTuple):
    """What rows are made of, in a kernel: images and draws."""

    x_ptr: Any
    u_ptr: Any
    num_x: Any
    num_u: Any
    inverse_u: Any
    draws_ptr: Any
    pitch: Any
    to_zoom: Any
    chain_ptr: Any


@triton.jit
def _permuted(low, high, selector):
    """Four of the eight bytes of two words, each chosen by four bits of the selector."""
    if _PERMUTES:
        word = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [low, high, selector],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    else:
        both = (high.to(tl.uint64) << 32) | low
        word = (both >> ((selector & 7) * 8)) & 0xFF
        for k in tl.static_range(1, 4):
            word |= ((both >> ((selector >> 4 * k & 7) * 8)) & 0xFF) << 8 * k
        word = word.to(tl.uint32)
    return word


@triton.jit
def _biased(word, BYTE: tl.constexpr):
    """A byte of a word as 2^23 + byte, float32: the differences of such numbers are exact."""
    if _PERMUTES:  # of 2^23 the upper three bytes, and then the byte
        bits = _permuted(0x4B000000, word, 0x3004 + BYTE)
    else:
        bits = ((word >> 8 * BYTE) & 0xFF) | 0x4B000000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _between(position, before, after, SIZE: tl.constexpr, ZOOM: tl.constexpr):
    """The pixels that a zoomed one lies between, and how far it is from the first."""
    if ZOOM:
        before = tl.minimum(before, SIZE - 1)  # at least one pixel is left
        kept = SIZE - before - tl.minimum(after, SIZE - 1 - before)
        # (position + 1/2) · kept / SIZE - 1/2, in units of 1 / (2 · SIZE)
        units = (2 * position + 1) * kept - SIZE
        units = tl.minimum(tl.maximum(units, 0), (kept - 1) * (2 * SIZE)).to(tl.float32)
        # half a unit keeps whole pixels on the right side of rounding
        whole = tl.floor((units + 0.5) * (0.5 / SIZE))
        distance = (units - whole * (2.0 * SIZE)) * (0.5 / SIZE)
        first = whole.to(tl.int32)
        first += before
        second = tl.minimum(first + 1, SIZE - 1)
    else:
        first, second, distance = position, position, 0.0
    return first, second, distance


@triton.jit
def _column(
    pixel,
    across,
    IN_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDING: tl.constexpr,
    MODE: tl.constexpr,
    ZOOM: tl.constexpr,
):
    """The columns that a pixel lies between, whether they are in the image, and the distance."""
    left, flip, before, after = across
    pixel = tl.where(flip, WIDTH - 1 - pixel, pixel)
    first, second, distance = _between(pixel, before, after, WIDTH, ZOOM)
    first, in_first = padded(first, left, IN_WIDTH, PADDING, MODE)
    if ZOOM:
        second, in_second = padded(second, left, IN_WIDTH, PADDING, MODE)
    else:
        second, in_second = first, in_first
    return first, in_first, second, in_second, distance


@triton.jit
def _kept(in_a, in_b, in_c, in_d):
    """A mask of the bytes of a word."""
    keep = tl.where(in_a, 0xFF, 0) | tl.where(in_b, 0xFF00, 0)
    return keep | tl.where(in_c, 0xFF0000, 0) | tl.where(in_d, -0x1000000, 0)


@triton.jit
def _of_plane(
    pixel,
    across,
    begin,
    last,
    IN_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDING: tl.constexpr,
    MODE: tl.constexpr,
    ZOOM: tl.constexpr,
):
    """Where four pixels of a plane lie in a line that begins at byte ``begin`` of its first word.

    Returns the first of the two words that hold them, ``last`` at most; selectors of their bytes
    and of their neighbours', each with a mask of those that are within the image; and distances.
    """
    a, in_a, a_next, in_a_next, a_distance = _column(
        pixel, across, IN_WIDTH, WIDTH, PADDING, MODE, ZOOM
    )
    b, in_b, b_next, in_b_next, b_distance = _column(
        pixel + 1, across, IN_WIDTH, WIDTH, PADDING, MODE, ZOOM
    )
    c, in_c, c_next, in_c_next, c_distance = _column(
        pixel + 2, across, IN_WIDTH, WIDTH, PADDING, MODE, ZOOM
    )
    d, in_d, d_next, in_d_next, d_distance = _column(
        pixel + 3, across, IN_WIDTH, WIDTH, PADDING, MODE, ZOOM
    )
    # padding folds an interval into one that is no longer: all of them lie in two words
    least = tl.minimum(tl.minimum(a, b), tl.minimum(c, d))
    if ZOOM:
        of_next = tl.minimum(tl.minimum(a_next, b_next), tl.minimum(c_next, d_next))
        least = tl.minimum(least, of_next)
    first = tl.minimum((begin + least) >> 2, last)
    behind = 0x1111 * (4 * first - begin)
    selector = a + 16 * b + 256 * c + 4096 * d - behind
    keep = _kept(in_a, in_b, in_c, in_d)
    selector_next, keep_next = selector, keep
    if ZOOM:
        selector_next = a_next + 16 * b_next + 256 * c_next + 4096 * d_next - behind
        keep_next = _kept(in_a_next, in_b_next, in_c_next, in_d_next)
    distances = (a_distance, b_distance, c_distance, d_distance)
    return first, selector, keep, selector_next, keep_next, distances


@triton.jit
def _of_pixel(
    column,
    inside,
    begin,
    last,
    CHANNELS: tl.constexpr,
):
    """Where the channels of a pixel lie: the first of two words, a selector and a mask."""
    byte = begin + CHANNELS * column
    first = tl.minimum(byte >> 2, last)
    return first, 0x3210 + 0x1111 * (byte - 4 * first), tl.where(inside, -1, 0)


@triton.jit
def _word(low, high, selector, keep, line_inside, MODE: tl.constexpr):
    word = _permuted(low, high, selector)
    if MODE == "zeros":
        word &= tl.where(line_inside, keep, 0)
    return word


@triton.jit
def _words(
    row,
    down,
    pixel,
    plane,
    rows,
    CHANNELS: tl.constexpr,
    IN_HEIGHT: tl.constexpr,
    IN_WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BY_PIXELS: tl.constexpr,
    PADDING: tl.constexpr,
    MODE: tl.constexpr,
    ZOOM: tl.constexpr,
    PLANES: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """The bytes of a view in its order, as a tuple of words ``[LINES, ITEMS]``.

    With zoom each word is followed by its neighbours' and by both of the next line. Distances come
    with them: those across of each pixel, and down.
    """
    from_x, place = image_of(row, rows.num_x, rows.num_u, rows.inverse_u)
    image = tl.where(from_x, rows.x_ptr.to(tl.int64), rows.u_ptr.to(tl.int64))
    image += (place.to(tl.int64) * CHANNELS + plane) * (IN_HEIGHT * IN_WIDTH)
    # Images may begin anywhere. Their first and last words may hold bytes of others, too; those lie
    # in the same page of memory, so that they can be read, and no selector chooses them.
    begin = (image & 3).to(tl.int32)
    image_ptr = (image - begin).to(tl.pointer_type(tl.uint32))
    top, left, flip = drawn(
        rows.draws_ptr, rows.pitch, row, rows.chain_ptr, IN_HEIGHT, IN_WIDTH, HEIGHT, WIDTH
    )
    above, below, before, after = 0, 0, 0, 0
    if ZOOM:
        cuts_ptr = rows.draws_ptr + rows.to_zoom + row.to(tl.int64) * 4
        above, below = tl.load(cuts_ptr), tl.load(cuts_ptr + 1)
        before, after = tl.load(cuts_ptr + 2), tl.load(cuts_ptr + 3)
    across = (left, flip, before, after)
    line, next_line, down_distance = _between(down, above, below, HEIGHT, ZOOM)
    line, line_inside = padded(line, top, IN_HEIGHT, PADDING, MODE)
    next_line, next_inside = padded(next_line, top, IN_HEIGHT, PADDING, MODE)
    PITCH: tl.constexpr = IN_WIDTH * (CHANNELS if BY_PIXELS else 1)
    PLANE: tl.constexpr = IN_HEIGHT * IN_WIDTH // 4
    last = ((begin + PITCH - 1) >> 2) - 1  # so that the second word holds bytes of the line, too
    line_ptr = image_ptr + line * (PITCH // 4)
    next_ptr = image_ptr + next_line * (PITCH // 4)
    words = tl.tuple(())
    distances = tl.tuple(())
    for k in tl.static_range(PIXELS if BY_PIXELS else PIXELS // 4):
        if BY_PIXELS:
            column, inside, beside, beside_inside, distance = _column(
                pixel + k, across, IN_WIDTH, WIDTH, PADDING, MODE, ZOOM
            )
            distances += (distance,)
            at, selector, keep = _of_pixel(column, inside, begin, last, CHANNELS)
            word = _word(
                tl.load(line_ptr + at),
                tl.load(line_ptr + at + 1),
                selector,
                keep,
                line_inside,
                MODE,
            )
            if ZOOM:
                low, high = tl.load(next_ptr + at), tl.load(next_ptr + at + 1)
                below_word = _word(low, high, selector, keep, next_inside, MODE)
                at, selector, keep = _of_pixel(beside, beside_inside, begin, last, CHANNELS)
                low, high = tl.load(line_ptr + at), tl.load(line_ptr + at + 1)
                beside_word = _word(low, high, selector, keep, line_inside, MODE)
                low, high = tl.load(next_ptr + at), tl.load(next_ptr + at + 1)
                corner = _word(low, high, selector, keep, next_inside, MODE)
                words += (word, beside_word, below_word, corner)
            else:
                words += (word,)
        else:
            at, selector, keep, selector_next, keep_next, of_four = _of_plane(
                pixel + 4 * k, across, begin, last, IN_WIDTH, WIDTH, PADDING, MODE, ZOOM
            )
            distances += of_four
            for c in tl.static_range(PLANES):
                low = tl.load(line_ptr + at + c * PLANE)
                high = tl.load(line_ptr + at + (c * PLANE + 1))
                word = _word(low, high, selector, keep, line_inside, MODE)
                if ZOOM:
                    beside_word = _word(low, high, selector_next, keep_next, line_inside, MODE)
                    low = tl.load(next_ptr + at + c * PLANE)
                    high = tl.load(next_ptr + at + (c * PLANE + 1))
                    below_word = _word(low, high, selector, keep, next_inside, MODE)
                    corner = _word(low, high, selector_next, keep_next, next_inside, MODE)
                    words += (word, beside_word, below_word, corner)
                else:
                    words += (word,)
    return words, distances, down_distance


@triton.jit
def _value(
    words,
    partner_words,
    lam,
    distances,
    down_distance,
    PART: tl.constexpr,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    BY_PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PLANES: tl.constexpr,
    PIXELS: tl.constexpr,
    MIXES: tl.constexpr,
    ZOOM: tl.constexpr,
):
    """Value ``K`` of the ``PART``-th store, and its channel."""
    PLACE: tl.constexpr = PART * PIXELS + K
    CHANNEL: tl.constexpr = PLACE % CHANNELS if CHANNELS_LAST else PART
    PIXEL: tl.constexpr = PLACE // CHANNELS if CHANNELS_LAST else K
    GROUP: tl.constexpr = PIXEL if BY_PIXELS else PIXEL // 4 * PLANES + CHANNEL
    WORD: tl.constexpr = GROUP * 4 if ZOOM else GROUP
    BYTE: tl.constexpr = CHANNEL if BY_PIXELS else PIXEL % 4
    value = _biased(words[WORD], BYTE)
    if MIXES:
        partner = _biased(partner_words[WORD], BYTE)
        value = (partner - _BIAS) + lam * (value - partner)
    elif ZOOM:
        beside, below = _biased(words[WORD + 1], BYTE), _biased(words[WORD + 2], BYTE)
        corner = _biased(words[WORD + 3], BYTE)
        value = (value - _BIAS) + distances[PIXEL] * (beside - value)
        below = (below - _BIAS) + distances[PIXEL] * (corner - below)
        value += down_distance * (below - value)
    else:
        value -= _BIAS
    return CHANNEL, value


@triton.jit
def _joined(values, COUNT: tl.constexpr):
    """Four or eight tiles side by side along a new axis."""
    if COUNT == 8:
        even = tl.join(tl.join(values[0], values[4]), tl.join(values[2], values[6]))
        odd = tl.join(tl.join(values[1], values[5]), tl.join(values[3], values[7]))
    else:
        even, odd = tl.join(values[0], values[2]), tl.join(values[1], values[3])
    return tl.reshape(tl.join(even, odd), [values[0].shape[0], values[0].shape[1], COUNT])


@triton.jit(
    do_not_specialize=["num_x", "num_u", "inverse_u", "pitch", "to_zoom"],
    do_not_specialize_on_alignment=[
        *("x_ptr", "u_ptr", "draws_ptr", "chain_ptr", "lam_ptr", "index_ptr", "scale", "bias"),
    ],
)
def packed_kernel(
    out_ptr,
    x_ptr,
    u_ptr,
    num_x,
    num_u,
    inverse_u,
    draws_ptr,
    pitch,
    to_zoom,
    chain_ptr,
    lam_ptr,
    index_ptr,
    scale,
    bias,
    CHANNELS: tl.constexpr,
    IN_HEIGHT: tl.constexpr,
    IN_WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BY_PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PADDING: tl.constexpr,
    MODE: tl.constexpr,
    ZOOM: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    PLANES: tl.constexpr,
    PIXELS: tl.constexpr,
    LINES: tl.constexpr,
    ITEMS: tl.constexpr,
):
    GROUPS: tl.constexpr = WIDTH // PIXELS
    BANDS: tl.constexpr = (HEIGHT + LINES - 1) // LINES
    TILES: tl.constexpr = (BANDS * GROUPS + ITEMS - 1) // ITEMS
    PARTS: tl.constexpr = CHANNELS // PLANES * TILES
    row = tl.program_id(0) // PARTS
    plane = tl.program_id(0) % PARTS // TILES * PLANES
    item = tl.program_id(0) % TILES * ITEMS + tl.arange(0, ITEMS)[None, :]
    line = item // GROUPS * LINES + tl.arange(0, LINES)[:, None]
    pixel = item % GROUPS * PIXELS
    down = tl.minimum(line, HEIGHT - 1)
    rows = _Rows(x_ptr, u_ptr, num_x, num_u, inverse_u, draws_ptr, pitch, to_zoom, chain_ptr)
    MIXES: tl.constexpr = index_ptr is not None
    lam, partner = 1.0, row
    if MIXES:
        lam, partner = tl.load(lam_ptr + row), tl.load(index_ptr + row).to(tl.int32)
    words, distances, down_distance = _words(
        row, down, pixel, plane, rows,
        CHANNELS, IN_HEIGHT, IN_WIDTH, HEIGHT, WIDTH,
        BY_PIXELS, PADDING, MODE, ZOOM, PLANES, PIXELS,
    )  # fmt: skip
    partner_words = words
    if MIXES:
        partner_words, _, _ = _words(
            partner, down, pixel, plane, rows,
            CHANNELS, IN_HEIGHT, IN_WIDTH, HEIGHT, WIDTH,
            BY_PIXELS, PADDING, MODE, ZOOM, PLANES, PIXELS,
        )  # fmt: skip
    if CHANNELS_LAST:
        at = (line * WIDTH + pixel) * CHANNELS
    else:
        at = plane * (HEIGHT * WIDTH) + line * WIDTH + pixel
    out_ptr += row.to(tl.int64) * (CHANNELS * HEIGHT * WIDTH)
    STEP: tl.constexpr = PIXELS if CHANNELS_LAST else HEIGHT * WIDTH
    for part in tl.static_range(PLANES):
        values = tl.tuple(())
        for k in tl.static_range(PIXELS):
            channel, value = _value(
                words, partner_words, lam, distances, down_distance, part, k,
                CHANNELS, BY_PIXELS, CHANNELS_LAST, PLANES, PIXELS, MIXES, ZOOM,
            )  # fmt: skip
            value = normalised(value, plane + channel, scale, bias, PER_CHANNEL, CHANNELS)
            values += (value.to(out_ptr.dtype.element_ty),)
        joined = _joined(values, PIXELS)
        to = at[:, :, None] + (part * STEP + tl.arange(0, PIXELS))
        tl.store(out_ptr + to, joined, mask=line[:, :, None] < HEIGHT)


_LEAST_VALUES = 2**13  # of an image: below it launches decide, and short chains win
_MOST_CHANNELS = 4  # of a pixel that a thread holds
_MOST_HELD = 48  # values of a thread; more of them take registers from other threads
_ITEMS = 128


def fits(dtype: torch.dtype, in_width: int, out: Tensor, by_pixels: bool) -> bool:
    """Whether `augment` here should make ``out`` of images of a dtype and width without gaps.

    Neither the number of images nor where they begin enters: a batch that differs in these alone
    must not compile another kernel.
    """
    _, channels, height, width = out.shape
    any_channels = out.is_contiguous() and not by_pixels
    return (
        dtype == torch.uint8
        and channels * height * width >= _LEAST_VALUES
        and width % 4 == in_width % 4 == 0
        and in_width >= 8  # two words
        and (any_channels or channels <= _MOST_CHANNELS)
    )


def augment(
    sources: tuple[Tensor, ...],
    params: Draws,
    geometry: Geometry,
    scaling: Scaling,
    *,
    in_size: tuple[int, int],
    by_pixels: bool,
    out: Tensor,
    mixup: MixUpParams | None,
) -> None:
    """Shift, crop, flip, zoom, scale and, asked and without zoom, mix images that `fits` fits.

    Args:
        sources, params, geometry, scaling, out, mixup: As for the implementation's ``augment``.
        in_size: Height and width of the images.
        by_pixels: Whether memory holds the images pixel by pixel, not plane by plane.
    """
    num_rows, channels, height, width = out.shape
    first, last = sources[0], sources[-1]
    draws, pitch, to_zoom = packed_draws(params)
    scale, bias, per_channel = normalisation(scaling, channels, out.device)
    # 16 bytes of a line, if lines are so long
    pixels = 8 if out.itemsize == 2 and width % 8 == 0 else 4
    planes = max(n for n in range(1, _MOST_CHANNELS + 1) if channels % n == 0)
    zoom = cut_kind(geometry) == 3
    most = _MOST_HELD // 2 if zoom else _MOST_HELD
    lines = 2 ** (max(most // (pixels * planes), 1).bit_length() - 1)
    tiles = blocks(blocks(height, lines) * (width // pixels), _ITEMS)
    launch(
        packed_kernel,
        num_rows * (channels // planes) * tiles,
        out.device,
        out,
        first,
        last,
        len(first) if len(sources) > 1 else 0,
        len(last),
        inverse(len(last)),
        draws,
        pitch,
        to_zoom,
        cut_draws(params, geometry),
        mixup.lam if mixup else None,
        mixup.index if mixup else None,
        scale,
        bias,
        CHANNELS=channels,
        IN_HEIGHT=in_size[0],
        IN_WIDTH=in_size[1],
        HEIGHT=height,
        WIDTH=width,
        BY_PIXELS=by_pixels,
        CHANNELS_LAST=not out.is_contiguous(),
        PADDING=geometry.padding,
        MODE=geometry.padding_mode,
        ZOOM=zoom,
        PER_CHANNEL=per_channel,
        PLANES=planes,
        PIXELS=pixels,
        LINES=lines,
        ITEMS=_ITEMS,
        num_warps=4,
    )
