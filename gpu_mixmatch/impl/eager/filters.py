"""Zoom and blur: one linear map per axis, as matrices."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_mixmatch.impl.constants import constant
from gpu_mixmatch.types import LEAST_SIGMA, AugmentParams, Geometry


def axis_matrices(
    params: AugmentParams, geometry: Geometry, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Factors of the columns and of the rows of each view, ``[R, H, H]`` and ``[R, W, W]``."""
    radius = geometry.blur_radius
    if not geometry.zoom:
        down = _blur_matrix(params.sigma, radius, height)
        return down, (down if height == width else _blur_matrix(params.sigma, radius, width))
    top, bottom, left, right = params.zoom.unbind(1)
    top, bottom = _cuts(top, bottom, height)
    left, right = _cuts(left, right, width)
    # the image is mirrored already, and so is what is cut off it
    flipped = params.flip > 0
    left, right = torch.where(flipped, right, left), torch.where(flipped, left, right)
    down, across = _zoom_matrix(top, bottom, height), _zoom_matrix(left, right, width)
    if radius:
        down = torch.bmm(_blur_matrix(params.sigma, radius, height), down)
        across = torch.bmm(_blur_matrix(params.sigma, radius, width), across)
    return down, across


def _cuts(before: Tensor, after: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Clamp what is cut off an axis: at least one pixel is left."""
    before = before.clamp_max(size - 1)
    return before, torch.minimum(after, size - 1 - before)


def _zoom_matrix(before: Tensor, after: Tensor, size: int) -> Tensor:
    """Cut ``before`` and ``after`` pixels off an axis and resize back, bilinear, ``[R, n, n]``.

    Half-pixel centres without antialiasing, as ``F.interpolate(align_corners=False)``: the weight
    of a source pixel falls linearly with its distance from the position read.
    """
    grid = torch.arange(size, dtype=torch.float32, device=before.device)
    kept = (size - before - after).float()[:, None]
    # (grid + 1/2) · kept / size - 1/2, with whole numbers as far as they go
    read = (((2 * grid + 1) * kept - size) / (2 * size)).clamp_min(0).minimum(kept - 1)
    read = read + before.float()[:, None]
    distance = torch.sub(read[:, :, None], grid).abs_()
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
