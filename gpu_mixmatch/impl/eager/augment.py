"""Augmentation: shift, zoom or cut, flip, a chain of operations, blur, value·scale + bias."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_mixmatch import _validation
from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch._chain import columns
from gpu_mixmatch.impl.constants import constant
from gpu_mixmatch.impl.eager.chain import run_slots
from gpu_mixmatch.impl.eager.cut import Regions, cropped, regions_of, resized_bytes
from gpu_mixmatch.impl.eager.filters import axis_matrices
from gpu_mixmatch.impl.eager.mixup import blend, dense_rows
from gpu_mixmatch.impl.tables import chain_tables
from gpu_mixmatch.types import (
    Chain,
    ChainParams,
    Draws,
    Geometry,
    MixUpParams,
    PaddingMode,
    Scaling,
)


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
    _validation.check_draws(params, geometry.padding)
    size, out_size = _size_of(sources[0], channels_last_in), _size_of(out, channels_last=False)
    windows = _shifted(sources, params, geometry, channels_last_in, (*out.shape[:2], *size))
    regions = regions_of(params, geometry, size, out_size)
    hidden = None
    if isinstance(params, ChainParams):
        _validation.check_chain_draws(params, geometry.cut, geometry.chain)
    if geometry.cut and geometry.cut.area is None and regions:
        windows, regions = cropped(windows, regions, out_size), None
    if geometry.chain and isinstance(params, ChainParams):
        windows, hidden = _chained(windows, params, geometry, regions, out_size)
        regions = None
    views = _filtered(windows.float(), params, geometry, regions, out_size)
    scale, bias = (
        factor.view(-1, 1, 1) if isinstance(factor, Tensor) else factor for factor in scaling
    )
    views.mul_(scale).add_(bias)
    if geometry.chain and hidden:
        outside, cut_out = hidden
        if geometry.chain.outside == "mean":
            views.masked_fill_(outside, 0.0)
        if cut_out is not None:
            color = _cutout_values(geometry.chain, scale, bias, views)
            views = torch.where(cut_out, color, views)
    if mixup is None:
        out.copy_(views)
    else:
        unmixed = torch.empty_like(out).copy_(views)
        blend(dense_rows(unmixed), mixup, dense_rows(out))


def _size_of(images: Tensor, channels_last: bool) -> tuple[int, int]:
    height, width = images.shape[1:3] if channels_last else images.shape[2:4]
    return height, width


def _filtered(
    windows: Tensor,
    params: Draws,
    geometry: Geometry,
    regions: Regions | None,
    out_size: tuple[int, int],
) -> Tensor:
    """Resize what is cut out of each window, and blur it."""
    if regions is None and not geometry.blur_radius:
        return windows
    num_rows, channels, height, width = windows.shape
    down, across = axis_matrices(
        regions, params.sigma, geometry.blur_radius, (height, width), out_size
    )
    # across · Xᵀ is [R, W', C·H], and its rows, as C lines of H, times downᵀ
    turned = torch.bmm(across, windows.view(num_rows, channels * height, width).mT)
    turned = torch.bmm(turned.view(num_rows, out_size[1] * channels, height), down.mT)
    return turned.view(num_rows, out_size[1], channels, out_size[0]).permute(0, 2, 3, 1)


def _chained(
    windows: Tensor,
    params: ChainParams,
    geometry: Geometry,
    regions: Regions | None,
    out_size: tuple[int, int],
) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    """Run a chain on bytes; return them, and where they are outside and cut out."""
    chain, (height, width) = geometry.chain, out_size
    assert chain is not None
    if regions:
        windows = resized_bytes(windows, regions, (height, width))
    _, of_slots, of_cutout = columns(geometry.cut, chain)
    tables = chain_tables(chain, height, width, windows.device)
    images, outside = run_slots(windows, params.chain[:, of_slots], tables)
    drawn = params.chain[:, of_cutout]
    return images, (outside, _cut_out(drawn, chain, height, width) if chain.cutout else None)


def _cut_out(drawn: Tensor, chain: Chain, height: int, width: int) -> Tensor:
    """Where each row's square lies, ``[R, 1, H, W]``; its centre is a pixel of the view."""
    down, across, side = drawn.long().unbind(1)
    if not isinstance(chain.cutout, int):
        side = (side * width) >> 16
    masks = []
    for place, size in ((down, height), (across, width)):
        first = ((place * size) >> 24) - side // 2
        position = torch.arange(size, device=drawn.device)
        masks.append((position >= first[:, None]) & (position < (first + side)[:, None]))
    return masks[0][:, None, :, None] & masks[1][:, None, None, :]


def _cutout_values(
    chain: Chain, scale: Tensor | float, bias: Tensor | float, like: Tensor
) -> Tensor:
    """What a cutout is painted with, per channel: normalised bytes, or 0."""
    if chain.cutout_color is None:
        return like.new_zeros(1, 1, 1)
    return _color(chain.cutout_color, like.device).view(-1, 1, 1) * scale + bias


@constant
def _color(color: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(color, dtype=torch.float32, device="cpu").to(device)


def _shifted(
    sources: tuple[Tensor, ...],
    params: Draws,
    geometry: Geometry,
    channels_last_in: bool,
    shape: tuple[int, ...],
) -> Tensor:
    """Cut each row's window out of its padded image or of that one's mirror, ``[R, C, H, W]``.

    Images are widened once, each with its mirror image behind it: then a window is settled by where
    it begins, and all of them are one gather.
    """
    num_rows, channels, height, width = shape
    counts = tuple(source.shape[0] for source in sources)
    images = torch.cat([s.permute(0, 3, 1, 2) if channels_last_in else s for s in sources])
    if geometry.padding_mode == "zeros":  # a line and a column of black, which padding repeats
        images = F.pad(images, (0, 1, 0, 1))
    lines, columns = (
        _padded(size, geometry.padding, geometry.padding_mode, images.device)
        for size in (height, width)
    )
    padded = images.index_select(2, lines).index_select(3, columns)
    wide = torch.cat([padded, padded.flip(3)], dim=3).contiguous()

    _, _, tall, pitch = wide.shape
    starts = _image_starts(counts, num_rows, channels * tall * pitch, images.device)
    # left in the image, 2·padding - left in its mirror image
    column = params.left.sub(params.flip, alpha=2 * geometry.padding).abs_()
    starts = starts.add(params.top, alpha=pitch).add_(column)
    starts.add_(params.flip, alpha=pitch // 2)
    reach = (channels - 1) * tall * pitch + (height - 1) * pitch + width
    windows = wide.view(-1).as_strided(
        (max(wide.numel() - reach + 1, 0), channels, height, width), (1, tall * pitch, pitch, 1)
    )
    return windows.index_select(0, starts)


@constant
def _padded(size: int, padding: int, mode: PaddingMode, device: torch.device) -> Tensor:
    """The lines, or columns, that a padded image repeats, ``[size + 2·padding]`` int64."""
    position = torch.arange(-padding, size + padding, device="cpu")
    if mode == "reflect":
        position = (size - 1) - ((size - 1) - position.abs()).abs()
    elif mode == "edge":
        position = position.clamp(0, size - 1)
    else:  # the line of black behind the last
        position = position.where((position >= 0) & (position < size), size)
    return position.to(device)


@constant
def _image_starts(
    counts: tuple[int, ...], num_rows: int, image_size: int, device: torch.device
) -> Tensor:
    """Where the image of each row begins, ``[R]`` int64: x once, u as often as rows remain."""
    *once, last = counts
    first = sum(once)
    views = (num_rows - first) // max(last, 1)
    position = torch.arange(first + last, device="cpu")
    image = torch.cat([position[:first], position[first:].repeat(views)])
    return (image * image_size).to(device)
