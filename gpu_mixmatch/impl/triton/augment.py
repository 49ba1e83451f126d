"""Every view of a batch in one launch: reads a byte, writes a value.

`resample` has what is weighed between pixels: zoom, resized cuts and blur.

A program builds a tile of lines: an output line is a row of pixels (NCHW) or of pixels with their
channels (channels_last), so that what belongs to a line or to a column is computed once. With
``mixup`` it also builds the partner's tile and blends the two: no view is read back.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch.impl.triton import chain, packed
from gpu_mixmatch.impl.triton.launch import blocks, launch
from gpu_mixmatch.impl.triton.resample import resample
from gpu_mixmatch.impl.triton.rows import (
    by_pixels,
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


class _Images(NamedTuple):
    """A batch of images in a kernel; strides are None where images lie without gaps."""

    ptr: Any
    count: Any
    stride_image: Any
    stride_channel: Any
    stride_line: Any
    stride_pixel: Any


@triton.jit
def _tile(
    row,
    down,
    across,
    channel,
    mask,
    x,
    u,
    inverse_u,
    draws_ptr,
    pitch,
    chain_ptr,
    CHANNELS: tl.constexpr,
    IN_HEIGHT: tl.constexpr,
    IN_WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BY_PIXELS: tl.constexpr,
    PADDING: tl.constexpr,
    MODE: tl.constexpr,
):
    """Pixels of a view, float32: ``down`` ``[LINES, 1]`` by ``across`` ``[1, COLUMNS]``."""
    from_x, place = image_of(row, x.count, u.count, inverse_u)
    image_ptr = u.ptr
    if from_x:
        image_ptr = x.ptr
    top, left, flip = drawn(draws_ptr, pitch, row, chain_ptr, IN_HEIGHT, IN_WIDTH, HEIGHT, WIDTH)
    line, line_inside = padded(down, top, IN_HEIGHT, PADDING, MODE)
    pixel = tl.where(flip, WIDTH - 1 - across, across)
    pixel, pixel_inside = padded(pixel, left, IN_WIDTH, PADDING, MODE)
    if x.stride_image is None:
        image_ptr += place.to(tl.int64) * (CHANNELS * IN_HEIGHT * IN_WIDTH)
        if BY_PIXELS:
            pixel_ptr = image_ptr + line * (IN_WIDTH * CHANNELS) + (pixel * CHANNELS + channel)
        else:
            pixel_ptr = image_ptr + (channel * (IN_HEIGHT * IN_WIDTH) + line * IN_WIDTH) + pixel
    else:
        stride_image = tl.where(from_x, x.stride_image, u.stride_image).to(tl.int64)
        stride_channel = tl.where(from_x, x.stride_channel, u.stride_channel).to(tl.int64)
        stride_line = tl.where(from_x, x.stride_line, u.stride_line).to(tl.int64)
        stride_pixel = tl.where(from_x, x.stride_pixel, u.stride_pixel).to(tl.int64)
        image_ptr += place * stride_image + channel * stride_channel
        pixel_ptr = image_ptr + line * stride_line + pixel * stride_pixel
    if MODE == "zeros":
        mask = mask & line_inside & pixel_inside
    return tl.load(pixel_ptr, mask=mask, other=0).to(tl.float32)


@triton.jit
def _line_and_column(
    program,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The tile of a program: its row, pixels, channels, memory offsets in the row, and mask."""
    NUM_LINES: tl.constexpr = HEIGHT if CHANNELS_LAST else CHANNELS * HEIGHT
    NUM_COLUMNS: tl.constexpr = WIDTH * CHANNELS if CHANNELS_LAST else WIDTH
    TILES_DOWN: tl.constexpr = (NUM_LINES + LINES - 1) // LINES
    TILES_ACROSS: tl.constexpr = (NUM_COLUMNS + COLUMNS - 1) // COLUMNS
    row = program // (TILES_DOWN * TILES_ACROSS)
    tile = program % (TILES_DOWN * TILES_ACROSS)
    line = (tile // TILES_ACROSS * LINES + tl.arange(0, LINES))[:, None]
    column = (tile % TILES_ACROSS * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (line < NUM_LINES) & (column < NUM_COLUMNS)
    if CHANNELS_LAST:
        down, across, channel = line, column // CHANNELS, column % CHANNELS
    else:
        down, across, channel = line % HEIGHT, column, line // HEIGHT
    return row, down, across, channel, line * NUM_COLUMNS + column, mask


# A batch of another size must not be another kernel: its counts may be 1 or divisible by 16, and
# its images and draws, slices often, may begin anywhere. Strides within an image are its layout's.
_NUMBERS = ["num_x", "num_u", "inverse_u", "stride_x_image", "stride_u_image", "pitch"]
_ANYWHERE = ["x_ptr", "u_ptr", "draws_ptr", "chain_ptr", "lam_ptr", "index_ptr", "scale", "bias"]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_ANYWHERE)
def augment_kernel(
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
    draws_ptr,
    pitch,
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
    PER_CHANNEL: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    x = _Images(x_ptr, num_x, stride_x_image, stride_x_channel, stride_x_line, stride_x_pixel)
    u = _Images(u_ptr, num_u, stride_u_image, stride_u_channel, stride_u_line, stride_u_pixel)
    row, down, across, channel, offs, mask = _line_and_column(
        tl.program_id(0), CHANNELS, HEIGHT, WIDTH, CHANNELS_LAST, LINES, COLUMNS
    )
    value = _tile(
        row, down, across, channel, mask, x, u, inverse_u, draws_ptr, pitch, chain_ptr,
        CHANNELS, IN_HEIGHT, IN_WIDTH, HEIGHT, WIDTH, BY_PIXELS, PADDING, MODE,
    )  # fmt: skip
    if index_ptr is not None:
        # the rest is linear and per pixel, so that both rows can be blended before it
        partner = _tile(
            tl.load(index_ptr + row).to(tl.int32),
            down, across, channel, mask, x, u, inverse_u, draws_ptr, pitch, chain_ptr,
            CHANNELS, IN_HEIGHT, IN_WIDTH, HEIGHT, WIDTH, BY_PIXELS, PADDING, MODE,
        )  # fmt: skip
        value = partner + tl.load(lam_ptr + row) * (value - partner)
    value = normalised(value, channel, scale, bias, PER_CHANNEL, CHANNELS)
    out_ptr += row.to(tl.int64) * (CHANNELS * HEIGHT * WIDTH)
    tl.store(out_ptr + offs, value.to(out_ptr.dtype.element_ty), mask=mask)


def augment(
    sources: tuple[Tensor, ...],
    params: Draws,
    geometry: Geometry,
    scaling: Scaling,
    *,
    channels_last_in: bool,
    out: Tensor,
    workspace: Workspace | None,
    mixup: MixUpParams | None = None,
) -> None:
    if geometry.chain:
        chain.augment(
            sources,
            params,
            geometry,
            scaling,
            channels_last_in=channels_last_in,
            out=out,
            workspace=workspace,
            mixup=mixup,
        )
        return
    first, last = sources[0], sources[-1]
    in_height, in_width = first.shape[1:3] if channels_last_in else first.shape[2:]
    pixels_in = by_pixels(sources, channels_last_in)
    in_words = pixels_in is not None and packed.fits(first.dtype, in_width, out, pixels_in)
    cut = cut_kind(geometry)
    if in_words and not (geometry.blur_radius or cut == 2 or (cut == 3 and mixup)):
        packed.augment(
            sources,
            params,
            geometry,
            scaling,
            in_size=(in_height, in_width),
            by_pixels=bool(pixels_in),
            out=out,
            mixup=mixup,
        )
        return
    if cut > 1 or geometry.blur_radius:
        resample(
            sources,
            params,
            geometry,
            scaling,
            channels_last_in=channels_last_in,
            out=out,
            workspace=workspace,
            mixup=mixup,
        )
        return
    num_rows, channels, height, width = out.shape
    channels_last = not out.is_contiguous()
    num_lines, num_columns = (
        (height, width * channels) if channels_last else (channels * height, width)
    )
    columns = _columns(num_columns)
    # small images need many programs to fill the device, large ones few instructions per value. The
    # number of images does not enter: a smaller batch would be another kernel
    lines = (1024 if channels * height * width < 2**14 else 4096) // columns
    programs = num_rows * blocks(num_lines, lines) * blocks(num_columns, columns)
    draws, pitch, _ = packed_draws(params)
    scale, bias, per_channel = normalisation(scaling, channels, out.device)
    launch(
        augment_kernel,
        programs,
        out.device,
        out,
        first,
        last,
        len(first) if len(sources) > 1 else 0,
        len(last),
        inverse(len(last)),
        *(_NO_STRIDES if pixels_in is not None else _strides((first, last), channels_last_in)),
        draws,
        pitch,
        cut_draws(params, geometry),
        mixup.lam if mixup else None,
        mixup.index if mixup else None,
        scale,
        bias,
        CHANNELS=channels,
        IN_HEIGHT=in_height,
        IN_WIDTH=in_width,
        HEIGHT=height,
        WIDTH=width,
        BY_PIXELS=bool(pixels_in),
        CHANNELS_LAST=channels_last,
        PADDING=geometry.padding,
        MODE=geometry.padding_mode,
        PER_CHANNEL=per_channel,
        LINES=lines,
        COLUMNS=columns,
        num_warps=4,
    )


_NO_STRIDES = (None,) * 8


def _strides(sources: tuple[Tensor, Tensor], channels_last_in: bool) -> list[int]:
    """Of images, channels, lines and pixels, for both sources."""
    if channels_last_in:
        sources = (sources[0].permute(0, 3, 1, 2), sources[1].permute(0, 3, 1, 2))
    return [stride for source in sources for stride in source.stride()]


@lru_cache(maxsize=64)
def _columns(length: int) -> int:
    """Width of a tile: the widest that wastes an eighth of its lanes at most, else the best."""
    padded = {size: blocks(length, size) * size for size in (256, 128, 64, 32, 16)}
    for size, cost in padded.items():
        if cost * 8 <= length * 9:
            return size
    return min(padded, key=lambda size: padded[size])
