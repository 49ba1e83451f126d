"""Zoom, a resized cut and blur: one linear map per axis, as matrices."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_mixmatch.impl.constants import constant
from gpu_mixmatch.impl.eager.cut import Regions
from gpu_mixmatch.types import LEAST_SIGMA


def axis_matrices(
    regions: Regions | None,
    sigma: Tensor,
    radius: int,
    in_size: tuple[int, int],
    out_size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Factors of the columns and of the rows of each view, ``[R, H', H]`` and ``[R, W', W]``."""
    height, width = out_size
    if regions is None:
        down = _blur_matrix(sigma, radius, height)
        return down, (down if height == width else _blur_matrix(sigma, radius, width))
    top, left, tall, wide = regions
    down = _zoom_matrix(top, tall, in_size[0], height)
    across = _zoom_matrix(left, wide, in_size[1], width)
    if radius:
        down = torch.bmm(_blur_matrix(sigma, radius, height), down)
        across = torch.bmm(_blur_matrix(sigma, radius, width), across)
    return down, across


def _zoom_matrix(before: Tensor, kept: Tensor, in_size: int, size: int) -> Tensor:
    """Take ``kept`` pixels behind ``before`` and resize them, bilinear, ``[R, size, in_size]``.

    Half-pixel centres without antialiasing, as ``F.interpolate(align_corners=False)``: the weight
    of a source pixel falls linearly with its distance from the position read.
    """
    pixels = torch.arange(max(size, in_size), dtype=torch.float32, device=before.device)
    grid, pixels = pixels[:size], pixels[:in_size]
    kept = kept.float()[:, None]
    # (grid + 1/2) · kept / size - 1/2, with whole numbers as far as they go
    read = (((2 * grid + 1) * kept - size) / (2 * size)).clamp_min(0).minimum(kept - 1)
    read = read + before.float()[:, None]
    distance = torch.sub(read[:, :, None], pixels).abs_()
    return distance.neg_().add_(1).clamp_min_(0)


def _blur_matrix(sigma: Tensor, radius: int, size: int) -> Tensor:
    """Convolve an axis with the sampled Gaussian, reflecting at the ends, ``[R, n, n]``."""
    taps = gaussian(sigma, radius)
    return torch.mm(taps, _reflected_taps(size, radius, sigma.device)).view(-1, size, size)


def gaussian(sigma: Tensor, radius: int) -> Tensor:
    """exp(-d² / 2σ²) at d = -radius .. radius, normalised, ``[R, 2·radius + 1]``."""
    variance = sigma.clamp_min(LEAST_SIGMA).square()[:, None]
    return F.softmax(_half_squares(radius, sigma.device) / variance, dim=1)


@constant
def _half_squares(radius: int, device: torch.device) -> Tensor:
    distance = torch.arange(-radius, radius + 1, dtype=torch.float32, device="cpu")
    return (-0.5 * distance.square()).to(device)


@constant
def _reflected_taps(size: int, radius: int, device: torch.device) -> Tensor:
    """1 where tap d of output i reads input j, ``[2·radius + 1, n·n]``."""
    taps = torch.arange(-radius, radius + 1, device="cpu")[:, None]
    position = torch.arange(size, device="cpu") + taps  # [taps, n]
    period = max(2 * (size - 1), 1)
    position = position.remainder(period)
    position = torch.minimum(position, period - position).clamp_max(size - 1)
    return F.one_hot(position, size).float().flatten(1).to(device)
