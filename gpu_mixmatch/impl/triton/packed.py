"""Shift and flip of large uint8 images, four bytes at a time: reads a byte, writes a value.

A thread holds `PIXELS` pixels with their channels of each of `LINES` lines. What it needs of a line
lies in words of four bytes: four pixels of a plane (NCHW), or the channels of a pixel (NHWC). Such
four bytes may begin anywhere, but two aligned words hold them. One permutation of bytes takes them
out of the two in the order of the view, whatever flip and padding make of it; where the bytes lie
is settled once for all lines and planes.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_mixmatch.impl.triton.launch import blocks, launch
from gpu_mixmatch.impl.triton.rows import (
    drawn,
    image_of,
    inverse,
    normalisation,
    normalised,
    packed_draws,
    padded,
)
from gpu_mixmatch.types import AugmentParams, Geometry, MixUpParams, Scaling

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
    if _PERMUTES:
        bits = _permuted(0x4B000000, word, 0x3004 + BYTE)
    else:
        bits = ((word >> 8 * BYTE) & 0xFF) | 0x4B000000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _columns(
    pixel,
    left,
    flip,
    begin,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BY_PIXELS: tl.constexpr,
    PADDING: tl.constexpr,
    MODE: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Where COUNT pixels from ``pixel`` on are read in a line that begins at byte ``begin``.

    For each word: the first of the two that hold it, counted from the line's; which of their
    bytes make it; and a mask of those within the image.
    """
    BYTES: tl.constexpr = CHANNELS * WIDTH if BY_PIXELS else WIDTH
    # the second word must hold a byte of the line, too: nothing is read that is another's
    last = (begin + BYTES - 1) // 4 - 1
    firsts, selectors, keeps, at = tl.tuple(()), tl.tuple(()), tl.tuple(()), tl.tuple(())
    keep = tl.zeros_like(pixel)
    for k in tl.static_range(COUNT):
        column = tl.where(flip, WIDTH - 1 - pixel - k, pixel + k)
        column, inside = padded(column, left, WIDTH, PADDING, MODE)
        if BY_PIXELS:
            byte = begin + CHANNELS * column
            first = tl.minimum(byte // 4, last)
            firsts += (first,)
            selectors += (0x3210 + 0x1111 * (byte - 4 * first),)
            keeps += (tl.where(inside, -1, 0),)
        else:
            at += (begin + column,)
            keep |= tl.where(inside, 0xFF << 8 * (k % 4), 0)
            if k % 4 == 3:  # folding keeps an interval an interval, so that two words suffice
                first = tl.minimum(tl.minimum(at[k], at[k - 1]), tl.minimum(at[k - 2], at[k - 3]))
                first = tl.minimum(first // 4, last)
                selector = at[k] - 4 * first
                for j in tl.static_range(1, 4):
                    selector = 16 * selector + at[k - j] - 4 * first
                firsts += (first,)
                selectors += (selector,)
                keeps += (keep,)
                keep = tl.zeros_like(pixel)
    return firsts, selectors, keeps


@triton.jit
def _words(
    row,
    down,
    pixel,
    plane,
    rows,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BY_PIXELS: tl.constexpr,
    PADDING: tl.constexpr,
    MODE: tl.constexpr,
    PLANES: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """The bytes of a thread's pixels in each line, ``[LINES, ITEMS]``: words in a tuple."""
    from_x, place = image_of(row, rows.num_x, rows.num_u, rows.inverse_u)
    image = tl.where(from_x, rows.x_ptr.to(tl.int64), rows.u_ptr.to(tl.int64))
    image += place.to(tl.int64) * (CHANNELS * HEIGHT * WIDTH) + plane * (HEIGHT * WIDTH)
    # Images may begin anywhere. The allocation that they lie in begins at a multiple of 4, so that
    # it holds all bytes of a word up to one that is theirs; and it is padded to such a multiple.
    begin = (image & 3).to(tl.int32)
    image_ptr = (image - begin).to(tl.pointer_type(tl.uint32))
    top, left, flip = drawn(rows.draws_ptr, rows.pitch, row)
    line, line_inside = padded(down, top, HEIGHT, PADDING, MODE)
    firsts, selectors, keeps = _columns(
        pixel, left, flip, begin, CHANNELS, WIDTH, BY_PIXELS, PADDING, MODE, PIXELS
    )
    PITCH: tl.constexpr = WIDTH * CHANNELS // 4 if BY_PIXELS else WIDTH // 4
    line_ptr = image_ptr + line * PITCH
    words = tl.tuple(())
    for c in tl.static_range(1 if BY_PIXELS else PLANES):
        for n in tl.static_range(len(firsts)):
            first_ptr = line_ptr + firsts[n]
            low = tl.load(first_ptr + c * (HEIGHT * WIDTH // 4))
            high = tl.load(first_ptr + (c * (HEIGHT * WIDTH // 4) + 1))
            word = _permuted(low, high, selectors[n])
            if MODE == "zeros":
                word &= tl.where(line_inside, keeps[n], 0)
            words += (word,)
    return words


@triton.jit
def _value(
    words,
    partner_words,
    lam,
    PART: tl.constexpr,
    K: tl.constexpr,
    CHANNELS: tl.constexpr,
    BY_PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PIXELS: tl.constexpr,
    MIXES: tl.constexpr,
):
    """Value ``K`` of the ``PART``-th store, and its channel."""
    PLACE: tl.constexpr = PART * PIXELS + K
    CHANNEL: tl.constexpr = PLACE % CHANNELS if CHANNELS_LAST else PART
    PIXEL: tl.constexpr = PLACE // CHANNELS if CHANNELS_LAST else K
    WORD: tl.constexpr = PIXEL if BY_PIXELS else CHANNEL * (PIXELS // 4) + PIXEL // 4
    BYTE: tl.constexpr = CHANNEL if BY_PIXELS else PIXEL % 4
    value = _biased(words[WORD], BYTE)
    if MIXES:
        partner = _biased(partner_words[WORD], BYTE)
        value = (partner - _BIAS) + lam * (value - partner)
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
    do_not_specialize=["num_x", "num_u", "inverse_u", "pitch"],
    do_not_specialize_on_alignment=[
        *("x_ptr", "u_ptr", "draws_ptr", "lam_ptr", "index_ptr", "scale", "bias"),
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
    lam_ptr,
    index_ptr,
    scale,
    bias,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BY_PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PADDING: tl.constexpr,
    MODE: tl.constexpr,
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
    rows = _Rows(x_ptr, u_ptr, num_x, num_u, inverse_u, draws_ptr, pitch)
    MIXES: tl.constexpr = index_ptr is not None
    lam, partner = 1.0, row
    if MIXES:
        lam, partner = tl.load(lam_ptr + row), tl.load(index_ptr + row).to(tl.int32)
    words = _words(
        row, down, pixel, plane, rows,
        CHANNELS, HEIGHT, WIDTH, BY_PIXELS, PADDING, MODE, PLANES, PIXELS,
    )  # fmt: skip
    partner_words = words
    if MIXES:
        partner_words = _words(
            partner, down, pixel, plane, rows,
            CHANNELS, HEIGHT, WIDTH, BY_PIXELS, PADDING, MODE, PLANES, PIXELS,
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
                words, partner_words, lam, part, k,
                CHANNELS, BY_PIXELS, CHANNELS_LAST, PIXELS, MIXES,
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


def fits(dtype: torch.dtype, out: Tensor, by_pixels: bool) -> bool:
    """Whether `augment` here should make ``out`` of images of a dtype that have no gaps.

    Neither the number of images nor where they begin enters: a batch that differs in these alone
    must not compile another kernel.
    """
    _, channels, height, width = out.shape
    any_channels = out.is_contiguous() and not by_pixels
    return (
        dtype == torch.uint8
        and channels * height * width >= _LEAST_VALUES
        and width % 4 == 0
        and width >= 8  # two words
        and (any_channels or channels <= _MOST_CHANNELS)
    )


def augment(
    sources: tuple[Tensor, ...],
    params: AugmentParams,
    geometry: Geometry,
    scaling: Scaling,
    *,
    by_pixels: bool,
    out: Tensor,
    mixup: MixUpParams | None,
) -> None:
    """Shift, flip, scale and, asked, mix images that `fits` fits.

    Args:
        sources, params, geometry, scaling, out, mixup: As for the implementation's ``augment``.
        by_pixels: Whether memory holds the images pixel by pixel, not plane by plane.
    """
    num_rows, channels, height, width = out.shape
    first, last = sources[0], sources[-1]
    draws, pitch, _ = packed_draws(params)
    scale, bias, per_channel = normalisation(scaling, channels, out.device)
    # 16 bytes of a line, if lines are so long
    pixels = 8 if out.itemsize == 2 and width % 8 == 0 else 4
    planes = max(n for n in range(1, _MOST_CHANNELS + 1) if channels % n == 0)
    lines = 2 ** ((_MOST_HELD // (pixels * planes)).bit_length() - 1)
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
        mixup.lam if mixup else None,
        mixup.index if mixup else None,
        scale,
        bias,
        CHANNELS=channels,
        HEIGHT=height,
        WIDTH=width,
        BY_PIXELS=by_pixels,
        CHANNELS_LAST=not out.is_contiguous(),
        PADDING=geometry.padding,
        MODE=geometry.padding_mode,
        PER_CHANNEL=per_channel,
        PLANES=planes,
        PIXELS=pixels,
        LINES=lines,
        ITEMS=_ITEMS,
        num_warps=4,
    )
