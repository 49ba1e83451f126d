"""The operations of a chain on bytes, each to the last bit what Pillow makes of an image.

Images are ``[n, C, H, W]`` uint8, and ``records`` are the rows of `ChainTables.records` that they
are changed by, ``[n, 8]``. Products are rounded before they are added to: nothing here may fuse
the two.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gpu_mixmatch.impl.constants import constant
from gpu_mixmatch.impl.tables import ChainTables, Kind


def run_slots(images: Tensor, slots: Tensor, tables: ChainTables) -> tuple[Tensor, Tensor]:
    """Change each image by its entries, one slot after the other.

    Args:
        images: ``[R, C, H, W]`` uint8; written to.
        slots: Entries, ``[R, S]`` int32.
        tables: Of the chain, for the images' size.

    Returns:
        The images, and where a pixel is outside of what moved, ``[R, 1, H, W]`` bool.
    """
    outside = torch.zeros_like(images[:, :1], dtype=torch.bool)
    for entries in slots.unbind(1):
        records = tables.records.index_select(0, entries)
        for kind in Kind:
            if kind == Kind.NOTHING:
                continue
            rows = _rows(records, kind)
            if len(rows):
                mine, theirs = records[rows], (images[rows], outside[rows])
                changed = _changed(*theirs, mine, tables, kind)
                for whole, new, old in zip((images, outside), changed, theirs, strict=True):
                    whole[rows] = torch.where(_of_row(mine[:, 0] == kind), new, old)
    return images, outside


def _rows(records: Tensor, kind: Kind) -> Tensor:
    """The rows that hold a kind; on a device all of them, since to look there is to wait."""
    if records.device.type == "cpu":
        return (records[:, 0] == kind).nonzero().flatten()
    return torch.arange(len(records), device=records.device)


def _changed(
    images: Tensor, outside: Tensor, records: Tensor, tables: ChainTables, kind: Kind
) -> tuple[Tensor, Tensor]:
    """One kind of operation; and which pixels are outside after it."""
    if kind == Kind.WARP:
        return warp(images, outside, records)
    if kind == Kind.BYTES:
        rows = records[:, 2].clamp(0, len(tables.bytes) - 1)  # of other kinds it is no row
        images = through_tables(images, tables.bytes.index_select(0, rows)[:, None])
    elif kind == Kind.HUE:
        images = hue(images, records, tables.bytes)
    else:
        images = _OPERATIONS[kind](images, records[:, 2])
    return images, outside & _of_row(records[:, 1] == 0)


def warp(images: Tensor, outside: Tensor, records: Tensor) -> tuple[Tensor, Tensor]:
    """Read each pixel where an affine map in 16.16 says; what lies outside is 0."""
    num_rows, _, height, width = images.shape
    x, y = torch.arange(width, device=images.device), torch.arange(height, device=images.device)
    a0, a1, a2, a3, a4, a5 = records[:, 2:, None, None].long().unbind(1)
    across = (a0 * x + a1 * y[:, None] + a2) >> 16
    down = (a3 * x + a4 * y[:, None] + a5) >> 16
    inside = (across >= 0) & (across < width) & (down >= 0) & (down < height)
    place = torch.where(inside, down * width + across, 0).view(num_rows, 1, -1)
    inside = inside[:, None]

    def moved(planes: Tensor) -> Tensor:
        read = planes.flatten(2).gather(2, place.expand(-1, planes.shape[1], -1))
        return read.view(planes.shape)

    return moved(images) * inside, moved(outside) | ~inside


def through_tables(images: Tensor, tables: Tensor) -> Tensor:
    """Look every byte up in its row's table, or in its plane's, ``[n, 1 or C, 256]``."""
    bytes_of = images.flatten(2).long()
    looked_up = tables.expand(-1, images.shape[1], -1).gather(2, bytes_of)
    return looked_up.view(images.shape)


def blend(first: Tensor, second: Tensor, factor: Tensor) -> Tensor:
    """Go from one image to another, or beyond, and cut to bytes; both hold bytes, as int32."""
    product = (second - first).float() * factor.view(torch.float32)[:, None, None, None]
    return (first.float() + product).clamp(0, 255).to(torch.uint8)


def luma(images: Tensor) -> Tensor:
    """How bright each pixel is, ``[n, 1, H, W]`` int32."""
    if images.shape[1] == 1:
        return images.int()
    red, green, blue = images.int().unbind(1)
    bright: Tensor = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
    return bright[:, None]


def color(images: Tensor, factor: Tensor) -> Tensor:
    return blend(luma(images), images.int(), factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    count = images.shape[2] * images.shape[3]
    total = luma(images).sum(dim=(1, 2, 3), keepdim=True)  # int64
    mean = (2 * total + count) // (2 * count)
    return blend(mean.int(), images.int(), factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with a smooth image; pixels at an edge of the image have no neighbours and stay."""
    smooth = images.int()
    if min(images.shape[2:]) >= 3:
        lines = smooth[:, :, :-2] + smooth[:, :, 1:-1] + smooth[:, :, 2:]
        sums = lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:]
        inner = smooth[:, :, 1:-1, 1:-1]
        smooth = smooth.clone()
        smooth[:, :, 1:-1, 1:-1] = (sums + 4 * inner + 6) // 13
    return blend(smooth, images.int(), factor)


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to 0 .. 255, in float64."""
    planes = images.flatten(2)
    low, high = (end[..., None].double() for end in (planes.amin(2), planes.amax(2)))
    byte = torch.arange(256, dtype=torch.float64, device=images.device)
    # a number divided by a tensor is the number times 1/tensor, which rounds twice
    scale = byte[255] / (high - low).clamp_min(1)
    stretched = (byte * scale + -low * scale).clamp(0, 255).to(torch.uint8)
    return through_tables(images, torch.where(high > low, stretched, byte.to(torch.uint8)))


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Give each channel a flat histogram, as far as it goes."""
    planes = images.flatten(2).long()
    ones = torch.ones_like(planes)
    counts = planes.new_zeros(*planes.shape[:2], 256).scatter_add_(2, planes, ones)
    last = counts.gather(2, planes.amax(2, keepdim=True))
    step = (planes.shape[2] - last) // 255
    before = counts.cumsum(2) - counts
    flat = ((step // 2 + before) // step.clamp_min(1)).clamp_max(255)
    byte = torch.arange(256, device=images.device)
    return through_tables(images, torch.where(step > 0, flat, byte).to(torch.uint8))


def hue(images: Tensor, records: Tensor, byte_tables: Tensor) -> Tensor:
    """Turn the hues of Pillow's HSV images; all its roundings hold in whole numbers."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.int().unbind(1)
    value = images.amax(1).int()
    spread = value - images.amin(1).int()
    saturation = 255 * spread // value.clamp_min(1)
    # in sixths of the circle times the spread
    sixths = torch.where(green == value, 2 * spread + blue - red, 4 * spread + red - green)
    sixths = torch.where(red == value, green - blue, sixths)
    circle = 6 * spread.clamp_min(1)
    sixths = sixths.remainder(circle)
    turned = 255 * sixths // circle
    rows = records[:, 3].clamp(0, len(byte_tables) - 1)
    whole = byte_tables.index_select(0, rows).gather(1, turned.flatten(1).long())
    turned = torch.where(255 * sixths % circle == 0, whole.view(turned.shape).int(), turned)
    turned = (turned + records[:, 2, None, None]) & 255

    sector, part = 6 * turned // 255 % 6, 6 * turned % 255
    shades = [value]  # and falling, rising, least
    for share in (part, 255 - part, torch.full_like(part, 255)):
        shades.append((2 * value * (65025 - saturation * share) + 65025) // 130050)
    choices = _shades(images.device)[sector.long()].permute(0, 3, 1, 2)
    return torch.stack(shades, dim=1).gather(1, choices).to(torch.uint8)


@constant
def _shades(device: torch.device) -> Tensor:
    """Red, green and blue in each sixth of the circle: 0 value, 1 falling, 2 rising, 3 least."""
    shades = [(0, 2, 3), (1, 0, 3), (3, 0, 2), (3, 1, 0), (2, 3, 0), (0, 3, 1)]
    return torch.tensor(shades, device="cpu").to(device)


_OPERATIONS: dict[Kind, Callable[[Tensor, Tensor], Tensor]] = {
    Kind.COLOR: color,
    Kind.CONTRAST: contrast,
    Kind.SHARPNESS: sharpness,
    Kind.AUTOCONTRAST: autocontrast,
    Kind.EQUALIZE: equalize,
}


def _of_row(values: Tensor) -> Tensor:
    return values[:, None, None, None]
