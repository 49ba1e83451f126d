"""All draws of a batch in one tensor, so that one copy sends them."""

import torch
from torch import Tensor

from gpu_mixmatch.types import AugmentParams, MixUpParams


def pack(augment: AugmentParams | None, mixup: MixUpParams) -> Tensor:
    """Put a batch's draws into one tensor of 4-byte words, ``[11·N]`` or ``[3·N]`` int32."""
    tensors = [mixup.index, mixup.lam, *(augment or ())]  # int64 first: it stays aligned
    return torch.cat([tensor.contiguous().view(-1).view(torch.int32) for tensor in tensors])


_WORDS = (2, 1, 1, 1, 1, 4, 1)  # per row: index, lam, then the fields of AugmentParams


def words_per_row(*, with_augment: bool) -> int:
    """Length of packed draws in words, per row."""
    return sum(_WORDS if with_augment else _WORDS[:2])


def unpack(
    packed: Tensor, num_rows: int, *, with_augment: bool
) -> tuple[AugmentParams | None, MixUpParams]:
    """View the words of N rows as draws, as `pack` put them."""
    words = _WORDS if with_augment else _WORDS[:2]
    index, lam, *rest = torch.split(packed, [size * num_rows for size in words])
    mixup = MixUpParams(lam.view(torch.float32), index.view(torch.int64))
    if not with_augment:
        return None, mixup
    top, left, flip, zoom, sigma = rest
    return AugmentParams(top, left, flip, zoom.view(num_rows, 4), sigma.view(torch.float32)), mixup


def augment_to_device(params: AugmentParams, device: torch.device) -> AugmentParams:
    """Send the draws of an augmentation alone to ``device``."""
    return AugmentParams(*(tensor.to(device, non_blocking=True) for tensor in params))
