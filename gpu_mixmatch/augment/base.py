"""Augmentation engines: what `MixMatch` asks of one, and how a plain callable becomes one."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch._validation import IMAGE_DTYPES, image_layout


@runtime_checkable
class Augment(Protocol):
    """An augmentation engine: it draws for a batch, then builds all views of it in one buffer.

    An engine whose draws are an `AugmentParams` may have a ``policy``, an `AugmentPolicy`: the
    builder then draws for it, in one pass with MixUp's draws, and does not call ``draw_batch``.
    """

    def draw_batch(
        self,
        seed: int,
        step: int,
        ids_x: Tensor | int,
        ids_u: Tensor | int,
        num_augmentations: int,
    ) -> Any:
        """Draw for x once, as view 0, and for u as views 1..K, on the CPU."""

    def build(
        self,
        x: Tensor,
        u: Tensor,
        draws: Any,
        num_augmentations: int,
        workspace: Workspace | None = None,
    ) -> Tensor:
        """Return W: x once, then u K times, view-major, ``[B + K·M, C, H, W]``."""


class NormalizedViews(nn.Module):
    """What engines share: the mean and std of their views, their dtype and memory format.

    Args:
        mean: Of a channel, or of each, in [0, 1] units; subtracted.
        std: Of a channel, or of each, in [0, 1] units; divided by.
        dtype: Of the views: float32, float16 or bfloat16.
        channels_last: Memory format of the views.

    Raises:
        ValueError: If a field is out of its range.
    """

    scale: Tensor
    byte_scale: Tensor
    bias: Tensor

    def __init__(
        self,
        mean: float | Sequence[float],
        std: float | Sequence[float],
        dtype: torch.dtype,
        channels_last: bool,
    ) -> None:
        super().__init__()
        if dtype not in IMAGE_DTYPES:
            raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
        self.mean = _per_channel("mean", mean)
        self.std = _per_channel("std", std)
        if not all(value > 0 for value in self.std):
            raise ValueError(f"std must be above 0, got {std}")
        if len({1, len(self.mean), len(self.std)}) > 2:
            raise ValueError(
                f"mean and std must have one value or one per channel, got {mean} and {std}"
            )
        self.dtype = dtype
        self.channels_last = channels_last
        std_values = torch.tensor(self.std)
        self.register_buffer("scale", 1 / std_values, persistent=False)
        self.register_buffer("byte_scale", 1 / (255 * std_values), persistent=False)
        self.register_buffer("bias", -torch.tensor(self.mean) / std_values, persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        """Convert and normalise without augmenting, as evaluation needs it.

        Args:
            images: ``[M, C, H, W]`` or ``[M, H, W, C]``, uint8 or floating point.

        Returns:
            ``[M, C, H, W]`` in the engine's dtype and memory format.
        """
        nhwc, _ = image_layout("images", images)
        return self._normalize_nchw(images.permute(0, 3, 1, 2) if nhwc else images)

    def _normalize_nchw(self, images: Tensor) -> Tensor:
        scale, bias = self._scale_and_bias(images, images.shape[1])
        if isinstance(scale, Tensor) and isinstance(bias, Tensor):
            scale, bias = scale[:, None, None], bias[:, None, None]
        values = (images.float() * scale).add_(bias)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return values.to(self.dtype).contiguous(memory_format=layout)

    def _scale_and_bias(
        self, images: Tensor, channels: int
    ) -> tuple[Tensor, Tensor] | tuple[float, float]:
        if len(self.mean) == len(self.std) == 1:  # numbers: nothing to broadcast
            (mean,), (std,) = self.mean, self.std
            return 1 / (255 * std if images.dtype == torch.uint8 else std), -mean / std
        wanted = max(self.scale.shape[0], self.bias.shape[0])
        if wanted not in (1, channels):
            raise ValueError(
                f"images must have {wanted} channels like mean and std, got {channels}"
            )
        scale = self.byte_scale if images.dtype == torch.uint8 else self.scale
        return scale.float().expand(channels), self.bias.float().expand(channels)


def float_images(images: Tensor) -> Tensor:
    """Return images as NCHW floats in [0, 1]: uint8 divided by 255, floats as they are."""
    nhwc, _ = image_layout("images", images)
    images = images.permute(0, 3, 1, 2) if nhwc else images
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def _per_channel(name: str, values: float | Sequence[float]) -> tuple[float, ...]:
    channels = (values,) if isinstance(values, int | float) else tuple(values)
    if not channels:
        raise ValueError(f"{name} must be a number or one per channel, got {values}")
    return tuple(map(float, channels))
