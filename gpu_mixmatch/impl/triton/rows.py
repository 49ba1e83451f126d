"""What kernels of views have in common: a row's image, its draws, and how it is normalised."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_mixmatch.types import ChainParams, Draws, Geometry, Scaling

_WORDS_BEFORE_SIGMA = 7  # of a row: top, left, flip and four of zoom
_FARTHEST = 2**28  # words between fields that kernels may count in int32


@triton.jit
def image_of(row, num_x, num_u, inverse_u):
    """Whether a row is made of x, and the place of its image there or in u, which has K views.

    The place in u is the remainder by ``num_u``.
    """
    from_x = row < num_x
    _, place = divided(tl.maximum(row - num_x, 0), num_u, inverse_u)
    return from_x, tl.where(from_x, row, place)


@triton.jit
def divided(number, by, inverse_by):
    """Quotient and remainder of a number below 2^31, through a product with the `inverse`.

    A division takes longer than all else before the first pixel is read.
    """
    quotient = tl.umulhi((number * 2).to(tl.uint32), inverse_by.to(tl.uint32)).to(tl.int32)
    remainder = number - quotient * by
    one_more = remainder >= by
    return tl.where(one_more, quotient + 1, quotient), tl.where(one_more, remainder - by, remainder)


def inverse(by: int) -> int:
    """What `divided` multiplies by: 2^31 / ``by``, or a little less, as an int32."""
    return (2**31 - 1) // max(by, 1)


def by_pixels(sources: tuple[Tensor, ...], channels_last_in: bool) -> bool | None:
    """Whether memory holds images pixel by pixel, not plane by plane; None if it has gaps."""
    if channels_last_in:
        sources = tuple(source.permute(0, 3, 1, 2) for source in sources)
    if all(source.is_contiguous() for source in sources):
        return False
    if all(source.is_contiguous(memory_format=torch.channels_last) for source in sources):
        return True
    return None


class PackedDraws(NamedTuple):
    """Where a kernel finds the draws of an augmentation.

    Attributes:
        draws: `AugmentParams.top`; the other fields lie behind it.
        pitch: Words from one field to the next: ``left`` is ``top + pitch``, ``flip`` is ``top + 2
            · pitch``, and ``sigma``, float32, is ``top + 7 · pitch``.
        to_zoom: Words from ``top`` to ``zoom``, of which a row has four.
    """

    draws: Tensor
    pitch: int
    to_zoom: int


def packed_draws(params: Draws) -> PackedDraws:
    """Find draws by one address, as `sampling.pack` lays them out; others are packed, in a launch.

    A slice of rows of packed draws is packed, too.
    """
    top, left, flip, zoom, sigma = params[:5]
    start = top.data_ptr()
    pitch, to_zoom = left.data_ptr() - start, zoom.data_ptr() - start
    if (
        flip.data_ptr() - start == 2 * pitch
        and sigma.data_ptr() - start == _WORDS_BEFORE_SIGMA * pitch
        and all(field.is_contiguous() for field in params[:5])
        and 0 <= pitch <= 4 * _FARTHEST
        and 0 <= to_zoom <= 16 * _FARTHEST
        and pitch % 4 == to_zoom % 4 == 0
    ):
        return PackedDraws(top, pitch // 4, to_zoom // 4)
    words = torch.cat([field.reshape(-1).view(torch.int32) for field in params[:5]])
    return PackedDraws(words, len(top), 3 * len(top))


def cut_kind(geometry: Geometry) -> int:
    """What windows are cut down to, as kernels are told it.

    0 is nothing, 1 as many pixels as a view has, 2 a part by its area, 3 what a zoom leaves.
    """
    if geometry.cut:
        return 2 if geometry.cut.area else 1
    return 3 if geometry.zoom else 0


def cut_draws(params: Draws, geometry: Geometry) -> Tensor | None:
    """What was drawn for a cut without a chain, four words a row; None where there is no cut."""
    if geometry.cut is None:
        return None
    assert isinstance(params, ChainParams)
    return params.chain.contiguous()


@triton.jit
def cut_out(
    chain_ptr, IN_HEIGHT: tl.constexpr, IN_WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BY_AREA: tl.constexpr, ROOT: tl.constexpr,
):  # fmt: skip
    """What a row's window is cut down to, before it is mirrored: top, left, height and width."""
    height, width = HEIGHT, WIDTH
    if BY_AREA:
        height = ((tl.load(chain_ptr).to(tl.int64) * ROOT + (1 << 23)) >> 24).to(tl.int32)
        width = ((tl.load(chain_ptr + 1).to(tl.int64) * ROOT + (1 << 23)) >> 24).to(tl.int32)
        height = tl.minimum(tl.maximum(height, 1), IN_HEIGHT)
        width = tl.minimum(tl.maximum(width, 1), IN_WIDTH)
    top = tl.load(chain_ptr + 2).to(tl.int64) * (IN_HEIGHT - height + 1)
    left = tl.load(chain_ptr + 3).to(tl.int64) * (IN_WIDTH - width + 1)
    return (top >> 24).to(tl.int32), (left >> 24).to(tl.int32), height, width


@triton.jit
def drawn(
    draws_ptr, pitch, row, chain_ptr, IN_HEIGHT: tl.constexpr, IN_WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The top and the left edge of a row's window, and whether it is flipped.

    Where ``chain_ptr`` is not None, they are those of what is cropped to the views' size.
    """
    top, left = tl.load(draws_ptr + row), tl.load(draws_ptr + pitch + row)
    if chain_ptr is not None:
        down, across, _, _ = cut_out(
            chain_ptr + row.to(tl.int64) * 4, IN_HEIGHT, IN_WIDTH, HEIGHT, WIDTH, False, 0
        )
        top += down
        left += across
    return top, left, tl.load(draws_ptr + 2 * pitch + row) > 0


@triton.jit
def padded(position, shift, SIZE: tl.constexpr, PADDING: tl.constexpr, MODE: tl.constexpr):
    """Where a pixel of the window is read in the image, and whether it lies there."""
    position += shift - PADDING
    inside = (position >= 0) & (position < SIZE)
    if MODE == "reflect":
        position = (SIZE - 1) - tl.abs((SIZE - 1) - tl.abs(position))
    else:
        position = tl.minimum(tl.maximum(position, 0), SIZE - 1)
    return position, inside


class Normalisation(NamedTuple):
    """value · scale + bias in a kernel: two numbers, or two tensors of a value per channel."""

    scale: Any
    bias: Any
    per_channel: bool


def normalisation(scaling: Scaling, channels: int, device: torch.device) -> Normalisation:
    """Return what `normalised` takes: numbers as they are, else both as contiguous ``[C]``."""
    if not any(isinstance(factor, Tensor) for factor in scaling):
        return Normalisation(scaling.scale, scaling.bias, per_channel=False)
    scale, bias = (_of_channels(factor, channels, device) for factor in scaling)
    return Normalisation(scale, bias, per_channel=True)


def _of_channels(factor: Tensor | float, channels: int, device: torch.device) -> Tensor:
    if isinstance(factor, Tensor):
        return factor.contiguous()
    return torch.full((channels,), factor, dtype=torch.float32, device=device)


@triton.jit
def normalised(value, channel, scale, bias, PER_CHANNEL: tl.constexpr, CHANNELS: tl.constexpr):
    """Scale and shift; ``channel`` is a number, or a tile that broadcasts to ``value``."""
    if PER_CHANNEL:
        known = channel < CHANNELS
        scale = tl.load(scale + channel, mask=known, other=0.0)
        bias = tl.load(bias + channel, mask=known, other=0.0)
    return value * scale + bias
