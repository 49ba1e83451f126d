"""Every view of a batch in one launch, two with blur: reads a byte, writes a value.

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
from gpu_mixmatch.types import LEAST_SIGMA, AugmentParams, Geometry, MixUpParams, Scaling

_LEAST_SIGMA = tl.constexpr(LEAST_SIGMA)


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
    zoom_ptr: Any


@triton.jit
def _reflected(position, SIZE: tl.constexpr, REACH: tl.constexpr):
    """Reflect a position that is at most REACH outside of 0 .. SIZE - 1, without the edge."""
    PERIOD: tl.constexpr = 2 * (SIZE - 1) if SIZE > 1 else 1
    BEFORE: tl.constexpr = (REACH + PERIOD - 1) // PERIOD * PERIOD
    position = (position + BEFORE) % PERIOD
    return tl.minimum(tl.minimum(position, PERIOD - position), SIZE - 1)


@triton.jit
def _between(position, before, after, SIZE: tl.constexpr, ZOOM: tl.constexpr):
    """The pixels that a zoomed one lies between, and how far it is from the first."""
    if ZOOM:
        before = tl.minimum(before, SIZE - 1)  # at least one pixel is left
        after = tl.minimum(after, SIZE - 1 - before)
        kept = SIZE - before - after
        # (position + 1/2) · kept / SIZE - 1/2, in integers as far as they go
        read = ((2 * position + 1) * kept - SIZE).to(tl.float32) / (2 * SIZE)
        read = tl.minimum(tl.maximum(read, 0.0), (kept - 1).to(tl.float32))
        first = read.to(tl.int32)
        distance = read - first.to(tl.float32)
        first += before
        second = tl.minimum(first + 1, SIZE - 1)
    else:
        first, second, distance = position, position, 0.0
    return first, second, distance


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
    ZOOM: tl.constexpr,
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
    off_top, off_bottom, off_left, off_right = 0, 0, 0, 0
    if ZOOM:
        off_top = tl.load(draws.zoom_ptr + row * 4)
        off_bottom = tl.load(draws.zoom_ptr + row * 4 + 1)
        off_left = tl.load(draws.zoom_ptr + row * 4 + 2)
        off_right = tl.load(draws.zoom_ptr + row * 4 + 3)
    line, next_line, line_distance = _between(down, off_top, off_bottom, HEIGHT, ZOOM)
    pixel, next_pixel, pixel_distance = _between(across, off_left, off_right, WIDTH, ZOOM)

    line, line_inside = _padded(line, top, HEIGHT, PADDING, MODE)
    pixel, pixel_inside = _padded(pixel, left, WIDTH, PADDING, MODE)
    image_ptr += channel * stride_channel
    upper_ptr = image_ptr + line * stride_line
    pixel_at = pixel * stride_pixel
    value = _pixels(upper_ptr + pixel_at, mask, line_inside, pixel_inside, MODE)
    if ZOOM:
        next_line, next_line_inside = _padded(next_line, top, HEIGHT, PADDING, MODE)
        next_pixel, next_pixel_inside = _padded(next_pixel, left, WIDTH, PADDING, MODE)
        lower_ptr = image_ptr + next_line * stride_line
        next_at = next_pixel * stride_pixel
        beside = _pixels(upper_ptr + next_at, mask, line_inside, next_pixel_inside, MODE)
        below = _pixels(lower_ptr + pixel_at, mask, next_line_inside, pixel_inside, MODE)
        corner = _pixels(lower_ptr + next_at, mask, next_line_inside, next_pixel_inside, MODE)
        value += pixel_distance * (beside - value)
        below += pixel_distance * (corner - below)
        value += line_distance * (below - value)
    return value


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
    *("x_ptr", "u_ptr", "top_ptr", "left_ptr", "flip_ptr", "zoom_ptr", "sigma_ptr"),
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
    zoom_ptr,
    sigma_ptr,
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
    ZOOM: tl.constexpr,
    BLUR_RADIUS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    x = _Images(x_ptr, num_x, stride_x_image, stride_x_channel, stride_x_line, stride_x_pixel)
    u = _Images(u_ptr, num_u, stride_u_image, stride_u_channel, stride_u_line, stride_u_pixel)
    draws = _Draws(top_ptr, left_ptr, flip_ptr, zoom_ptr)
    row, down, across, channel, offs, mask = _line_and_column(
        tl.program_id(0), CHANNELS, HEIGHT, WIDTH, CHANNELS_LAST, LINES, COLUMNS
    )
    out_ptr += row.to(tl.int64) * (CHANNELS * HEIGHT * WIDTH)
    if BLUR_RADIUS > 0:  # across only, as float32: blur_kernel does the rest
        sigma = tl.maximum(tl.load(sigma_ptr + row), _LEAST_SIGMA)
        total = 0.0
        value = tl.zeros([LINES, COLUMNS], tl.float32)
        for tap in range(-BLUR_RADIUS, BLUR_RADIUS + 1):
            distance = tap / sigma
            weight = tl.exp(-0.5 * distance * distance)
            total += weight
            pixels = _tile(
                row, down, _reflected(across + tap, WIDTH, BLUR_RADIUS), channel, mask,
                x, u, draws, HEIGHT, WIDTH, PADDING, MODE, ZOOM,
            )  # fmt: skip
            value += weight * pixels
        tl.store(out_ptr + offs, value / total, mask=mask)
    else:
        value = _tile(
            row, down, across, channel, mask,
            x, u, draws, HEIGHT, WIDTH, PADDING, MODE, ZOOM,
        )  # fmt: skip
        if index_ptr is not None:
            # the rest is linear and per pixel, so that both rows can be blended before it
            partner = _tile(
                tl.load(index_ptr + row).to(tl.int32), down, across, channel, mask,
                x, u, draws, HEIGHT, WIDTH, PADDING, MODE, ZOOM,
            )  # fmt: skip
            value = partner + tl.load(lam_ptr + row) * (value - partner)
        value = _normalised(
            value, channel, mask, scale, bias, stride_scale, stride_bias, PER_CHANNEL, CHANNELS
        )
        tl.store(out_ptr + offs, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["sigma_ptr", "scale", "bias"])
def blur_kernel(
    out_ptr,
    across_ptr,
    sigma_ptr,
    scale,
    bias,
    stride_scale,
    stride_bias,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLUR_RADIUS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Blur what is blurred across already down its columns, then normalise."""
    row, down, _, channel, offs, mask = _line_and_column(
        tl.program_id(0), CHANNELS, HEIGHT, WIDTH, CHANNELS_LAST, LINES, COLUMNS
    )
    PITCH: tl.constexpr = WIDTH * CHANNELS if CHANNELS_LAST else WIDTH
    start = row.to(tl.int64) * (CHANNELS * HEIGHT * WIDTH)
    sigma = tl.maximum(tl.load(sigma_ptr + row), _LEAST_SIGMA)
    total = 0.0
    value = tl.zeros([LINES, COLUMNS], tl.float32)
    for tap in range(-BLUR_RADIUS, BLUR_RADIUS + 1):
        distance = tap / sigma
        weight = tl.exp(-0.5 * distance * distance)
        total += weight
        away = (_reflected(down + tap, HEIGHT, BLUR_RADIUS) - down) * PITCH
        value += weight * tl.load(across_ptr + start + offs + away, mask=mask, other=0.0)
    value = _normalised(
        value / total, channel, mask, scale, bias, stride_scale, stride_bias, PER_CHANNEL, CHANNELS
    )
    tl.store(out_ptr + start + offs, value.to(out_ptr.dtype.element_ty), mask=mask)


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
    padding, padding_mode, zoom, blur_radius = geometry
    if not (zoom or blur_radius) and packed.fits(sources, channels_last_in, out):
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
    # small images need many programs to fill the device, large ones few instructions per value;
    # zoom holds four pixels per value, and more of them do not fit into the registers. The number
    # of images does not enter: a smaller batch would be another kernel
    lines = (1024 if zoom or channels * height * width < 2**14 else 4096) // columns
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
        "BLUR_RADIUS": blur_radius,
        "PER_CHANNEL": per_channel,
        "LINES": lines,
        "COLUMNS": columns,
        "num_warps": 4,
    }
    target = out
    if blur_radius:
        scratch = workspace or Workspace()
        target = scratch.empty("across", tuple(out.shape), torch.float32, out.device)
    launch(
        augment_kernel,
        programs,
        out.device,
        target,
        first,
        last,
        len(first) if len(sources) > 1 else 0,
        len(last),
        *strides[0],
        *strides[1],
        params.top,
        params.left,
        params.flip,
        params.zoom,
        params.sigma,
        mixup.lam if mixup else None,
        mixup.index if mixup else None,
        *normalisation,
        PADDING=padding,
        MODE=padding_mode,
        ZOOM=zoom,
        **shape,
    )
    if blur_radius:
        launch(
            blur_kernel, programs, out.device, out, target, params.sigma, *normalisation, **shape
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
