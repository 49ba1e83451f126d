"""Every view of a batch in one launch: reads a byte, writes a value. `resample` has zoom and blur.

A program builds a tile of lines: an output line is a row of pixels (NCHW) or of pixels with their
channels (channels_last), so that what belongs to a line or to a column is computed once. With
``mixup`` it also builds the partner's tile and blends the two: no view is read back.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch.impl.triton import packed
from gpu_mixmatch.impl.triton.launch import blocks, launch
from gpu_mixmatch.impl.triton.resample import resample
from gpu_mixmatch.types import AugmentParams, Geometry, MixUpParams, Scaling


class _Images(NamedTuple):
    """A batch of images in a kernel."""

    ptr: Any
    count: Any
    stride_image: Any
    stride_channel: Any
    stride_line: Any
    stride_pixel: Any


class _Draws(NamedTuple):
    """Where a kernel finds the fields of `AugmentParams` that move pixels."""

    top_ptr: Any
    left_ptr: Any
    flip_ptr: Any


@triton.jit
def _padded(position, shift, SIZE: tl.constexpr, PADDING: tl.constexpr, MODE: tl.constexpr):
    """Where a pixel of the window lies in the image, and whether it does."""
    position += shift - PADDING
    inside = (position >= 0) & (position < SIZE)
    if MODE == "reflect":
        position = tl.abs(position)
        position = (SIZE - 1) - tl.abs((SIZE - 1) - position)
        inside = position >= 0
    elif MODE == "edge":
        position = tl.minimum(tl.maximum(position, 0), SIZE - 1)
        inside = position >= 0
    return position.to(tl.int64), inside


@triton.jit
def _pixels(pointers, mask, line_inside, pixel_inside, MODE: tl.constexpr):
    if MODE == "zeros":
        mask = mask & line_inside & pixel_inside
    return tl.load(pointers, mask=mask, other=0).to(tl.float32)


@triton.jit
def _tile(
    row,
    down,
    across,
    channel,
    mask,
    x,
    u,
    draws,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDING: tl.constexpr,
    MODE: tl.constexpr,
):
    """Pixels of a view, float32: ``down`` ``[LINES, 1]`` by ``across`` ``[1, COLUMNS]``."""
    from_x = row < x.count
    stride_image = tl.where(from_x, x.stride_image, u.stride_image).to(tl.int64)
    stride_channel = tl.where(from_x, x.stride_channel, u.stride_channel).to(tl.int64)
    stride_line = tl.where(from_x, x.stride_line, u.stride_line).to(tl.int64)
    stride_pixel = tl.where(from_x, x.stride_pixel, u.stride_pixel).to(tl.int64)
    image_ptr = u.ptr + ((row - x.count) % tl.maximum(u.count, 1)) * stride_image
    if from_x:
        image_ptr = x.ptr + row * stride_image
    top = tl.load(draws.top_ptr + row)
    left = tl.load(draws.left_ptr + row)
    across = tl.where(tl.load(draws.flip_ptr + row) > 0, WIDTH - 1 - across, across)
    line, line_inside = _padded(down, top, HEIGHT, PADDING, MODE)
    pixel, pixel_inside = _padded(across, left, WIDTH, PADDING, MODE)
    image_ptr += channel * stride_channel + line * stride_line
    pixel_at = pixel * stride_pixel
    return _pixels(image_ptr + pixel_at, mask, line_inside, pixel_inside, MODE)


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


@triton.jit
def _normalised(
    value,
    channel,
    mask,
    scale,
    bias,
    stride_scale,
    stride_bias,
    PER_CHANNEL: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    if PER_CHANNEL:
        known = channel < CHANNELS
        scale = tl.load(scale + channel * stride_scale, mask=known, other=0.0)
        bias = tl.load(bias + channel * stride_bias, mask=known, other=0.0)
    return value * scale + bias


# A batch of another size must not be another kernel: its counts may be 1 or divisible by 16, and
# its images and draws, slices often, may begin anywhere. Strides within an image are its layout's.
_NUMBERS = ["num_x", "num_u", "stride_x_image", "stride_u_image"]
_ANYWHERE = [
    *("x_ptr", "u_ptr", "top_ptr", "left_ptr", "flip_ptr"),
    *("lam_ptr", "index_ptr", "scale", "bias"),
]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_ANYWHERE)
def augment_kernel(
    out_ptr,
    x_ptr,
    u_ptr,
    num_x,
    num_u,
    stride_x_image,
    stride_x_channel,
    stride_x_line,
    stride_x_pixel,
    stride_u_image,
    stride_u_channel,
    stride_u_line,
    stride_u_pixel,
    top_ptr,
    left_ptr,
    flip_ptr,
    lam_ptr,
    index_ptr,
    scale,
    bias,
    stride_scale,
    stride_bias,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PADDING: tl.constexpr,
    MODE: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    x = _Images(x_ptr, num_x, stride_x_image, stride_x_channel, stride_x_line, stride_x_pixel)
    u = _Images(u_ptr, num_u, stride_u_image, stride_u_channel, stride_u_line, stride_u_pixel)
    draws = _Draws(top_ptr, left_ptr, flip_ptr)
    row, down, across, channel, offs, mask = _line_and_column(
        tl.program_id(0), CHANNELS, HEIGHT, WIDTH, CHANNELS_LAST, LINES, COLUMNS
    )
    out_ptr += row.to(tl.int64) * (CHANNELS * HEIGHT * WIDTH)
    value = _tile(
        row, down, across, channel, mask,
        x, u, draws, HEIGHT, WIDTH, PADDING, MODE,
    )  # fmt: skip
    if index_ptr is not None:
        # the rest is linear and per pixel, so that both rows can be blended before it
        partner = _tile(
            tl.load(index_ptr + row).to(tl.int32), down, across, channel, mask,
            x, u, draws, HEIGHT, WIDTH, PADDING, MODE,
        )  # fmt: skip
        value = partner + tl.load(lam_ptr + row) * (value - partner)
    value = _normalised(
        value, channel, mask, scale, bias, stride_scale, stride_bias, PER_CHANNEL, CHANNELS
    )
    tl.store(out_ptr + offs, value.to(out_ptr.dtype.element_ty), mask=mask)


def augment(
    sources: tuple[Tensor, ...],
    params: AugmentParams,
    geometry: Geometry,
    scaling: Scaling,
    *,
    channels_last_in: bool,
    out: Tensor,
    workspace: Workspace | None,
    mixup: MixUpParams | None = None,
) -> None:
    if geometry.zoom or geometry.blur_radius:
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
    if packed.fits(sources, channels_last_in, out):
        packed.augment(
            sources, params, geometry, scaling,
            channels_last_in=channels_last_in, out=out, mixup=mixup,
        )  # fmt: skip
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
    first, last = sources[0], sources[-1]
    strides = [
        tuple(source.permute(0, 3, 1, 2).stride() if channels_last_in else source.stride())
        for source in (first, last)
    ]
    per_channel = any(isinstance(factor, Tensor) for factor in scaling)
    if per_channel:
        scaling = Scaling(*(_of_channels(factor, channels, out.device) for factor in scaling))
    strides_of_scaling = (
        factor.stride(0) if isinstance(factor, Tensor) else 0 for factor in scaling
    )
    normalisation = (*scaling, *strides_of_scaling)
    shape = {
        "CHANNELS": channels,
        "HEIGHT": height,
        "WIDTH": width,
        "CHANNELS_LAST": channels_last,
        "PER_CHANNEL": per_channel,
        "LINES": lines,
        "COLUMNS": columns,
        "num_warps": 4,
    }
    launch(
        augment_kernel,
        programs,
        out.device,
        out,
        first,
        last,
        len(first) if len(sources) > 1 else 0,
        len(last),
        *strides[0],
        *strides[1],
        params.top,
        params.left,
        params.flip,
        mixup.lam if mixup else None,
        mixup.index if mixup else None,
        *normalisation,
        PADDING=geometry.padding,
        MODE=geometry.padding_mode,
        **shape,
    )


def _of_channels(factor: Tensor | float, channels: int, device: torch.device) -> Tensor:
    if isinstance(factor, Tensor):
        return factor
    return torch.full((channels,), factor, dtype=torch.float32, device=device)


@lru_cache(maxsize=64)
def _columns(length: int) -> int:
    """Width of a tile: the widest that wastes an eighth of its lanes at most, else the best."""
    padded = {size: blocks(length, size) * size for size in (256, 128, 64, 32, 16)}
    for size, cost in padded.items():
        if cost * 8 <= length * 9:
            return size
    return min(padded, key=lambda size: padded[size])
