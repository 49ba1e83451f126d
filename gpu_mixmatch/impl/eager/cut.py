"""What is cut out of each window, and how it becomes a view of bytes."""

from typing import NamedTuple

import torch
from torch import Tensor

from gpu_mixmatch._chain import columns
from gpu_mixmatch.impl.tables import root_of_area
from gpu_mixmatch.types import Cut, Draws, Geometry

_WEIGHTS = 2**11  # the unit of a weight between two pixels: 255 · 2^22 fits into an int32


class Regions(NamedTuple):
    """What is cut out of each window, in pixels, each ``[R]``."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def regions_of(
    params: Draws, geometry: Geometry, size: tuple[int, int], out_size: tuple[int, int]
) -> Regions | None:
    """Find what a zoom or a cut leaves of the windows of a size; None is all of them.

    Windows are mirrored already, and so is what is cut out of them.
    """
    if geometry.cut:
        regions = _cut_regions(params, geometry.cut, size, out_size)
    elif geometry.zoom:
        regions = _zoom_regions(params.zoom, size)
    else:
        return None
    mirrored = size[1] - regions.left - regions.width
    return regions._replace(left=torch.where(params.flip > 0, mirrored, regions.left))


def _zoom_regions(zoom: Tensor, size: tuple[int, int]) -> Regions:
    """Cut pixels off each side; at least one is left."""
    top, bottom, left, right = zoom.unbind(1)
    height, width = size
    top, left = top.clamp_max(height - 1), left.clamp_max(width - 1)
    return Regions(
        top, left, (height - top - bottom).clamp_min(1), (width - left - right).clamp_min(1)
    )


def _cut_regions(
    params: Draws, cut: Cut, size: tuple[int, int], out_size: tuple[int, int]
) -> Regions:
    drawn = params[-1][:, columns(cut, None).cut].long()
    of_height, of_width, down, across = drawn.unbind(1)
    if cut.area is None:
        tall, wide = (torch.full_like(down, side) for side in out_size)
    else:
        # drawn in 2^-16 of the root of the area, which is held in 2^-8 of a pixel
        root = root_of_area(*size)
        tall, wide = (
            ((share * root + 2**23) >> 24).clamp(1, most)
            for share, most in zip((of_height, of_width), size, strict=True)
        )
    top, left = (
        (place * (most - side + 1)) >> 24
        for place, side, most in zip((down, across), (tall, wide), size, strict=True)
    )
    return Regions(top, left, tall, wide)


def cropped(images: Tensor, regions: Regions, out_size: tuple[int, int]) -> Tensor:
    """Cut out regions of the views' own size, ``[R, C, H', W']``."""
    lines, columns_ = (
        start.long()[:, None] + torch.arange(size, device=images.device)
        for start, size in zip((regions.top, regions.left), out_size, strict=True)
    )
    return _lines(_lines(images, lines, 2), columns_, 3)


def resized_bytes(images: Tensor, regions: Regions, out_size: tuple[int, int]) -> Tensor:
    """Cut out regions and resize them, bilinear, in whole numbers, ``[R, C, H', W']`` uint8.

    Half-pixel centres without antialiasing, as ``F.interpolate(align_corners=False)``, with weights
    in 1/2048: operations that follow see the same bytes on every device.
    """
    values = images
    for axis, start, kept in ((2, regions.top, regions.height), (3, regions.left, regions.width)):
        first, second, weight = _between(start.long(), kept.long(), out_size[axis - 2])
        weight = weight[:, None, :, None] if axis == 2 else weight[:, None, None, :]
        one, other = (_lines(values, place, axis).int() for place in (first, second))
        values = one * (_WEIGHTS - weight) + other * weight
    return ((values + 2**21) >> 22).to(torch.uint8)


def _between(start: Tensor, kept: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels that each one of a view lies between, and the second's weight, ``[R, size]``."""
    position = torch.arange(size, device=start.device)
    kept = kept[:, None]
    # (position + 1/2) · kept / size - 1/2, in 1/(2 · size)
    read = ((2 * position + 1) * kept - size).clamp_min(0).minimum(2 * size * (kept - 1))
    first = read // (2 * size)
    weight = ((read - first * (2 * size)) * _WEIGHTS + size) // (2 * size)
    second = (first + 1).minimum(kept - 1)
    return start[:, None] + first, start[:, None] + second, weight.int()


def _lines(images: Tensor, places: Tensor, axis: int) -> Tensor:
    """Take lines (axis 2) or columns (axis 3) of each image, ``[R, n]`` of them."""
    places = places[:, None, :, None] if axis == 2 else places[:, None, None, :]
    shape = list(images.shape)
    shape[axis] = places.shape[axis]
    return images.gather(axis, places.expand(shape))
