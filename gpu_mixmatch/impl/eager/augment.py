"""Augmentation: shift, zoom, flip, blur, then value·scale + bias."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_mixmatch import _validation
from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch.impl.constants import constant
from gpu_mixmatch.impl.eager.filters import axis_matrices
from gpu_mixmatch.impl.eager.mixup import blend, dense_rows
from gpu_mixmatch.types import AugmentParams, Geometry, MixUpParams, PaddingMode, Scaling


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
    _validation.check_draws(params, geometry.padding)
    num_rows, channels, height, width = out.shape
    views = _shifted(sources, params, geometry, channels_last_in, out.shape).float()
    if geometry.zoom or geometry.blur_radius:
        down, across = axis_matrices(params, geometry, height, width)
        # across · Xᵀ is [R, W, C·H], and its rows, as C lines of H, times downᵀ
        turned = torch.bmm(across, views.view(num_rows, channels * height, width).mT)
        turned = torch.bmm(turned.view(num_rows, width * channels, height), down.mT)
        views = turned.view(num_rows, width, channels, height).permute(0, 2, 3, 1)
    scale, bias = (
        factor.view(-1, 1, 1) if isinstance(factor, Tensor) else factor for factor in scaling
    )
    views.mul_(scale).add_(bias)
    if mixup is None:
        out.copy_(views)
    else:
        unmixed = torch.empty_like(out).copy_(views)
        blend(dense_rows(unmixed), mixup, dense_rows(out))


def _shifted(
    sources: tuple[Tensor, ...],
    params: AugmentParams,
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
