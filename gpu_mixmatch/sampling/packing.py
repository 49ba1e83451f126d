"""All draws of a batch in one tensor, so that one copy sends them."""

import torch
from torch import Tensor

from gpu_mixmatch._validation import (
    as_device,
    as_flag,
    as_integer,
    as_length,
    came,
    check_mixup,
    check_params,
    check_tensor,
)
from gpu_mixmatch.types import MOST_ROWS, AugmentParams, MixUpParams


def pack(augment: AugmentParams | None, mixup: MixUpParams) -> Tensor:
    """Put a batch's draws into one tensor of 4-byte words, ``[11·N]`` or ``[3·N]`` int32.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the draws do not fit each other.
    """
    check_mixup(mixup, as_length("mixup.lam", getattr(mixup, "lam", mixup)), "lam", "mixup")
    if augment is not None and check_params(augment, "augment") != len(mixup.lam):
        raise ValueError(
            f"augment must have {len(mixup.lam)} rows like mixup, got {len(augment.top)}"
        )
    tensors = [mixup.index, mixup.lam, *(augment or ())]  # int64 first: it stays aligned
    return torch.cat([tensor.contiguous().view(-1).view(torch.int32) for tensor in tensors])


_WORDS = (2, 1, 1, 1, 1, 4, 1)  # per row: index, lam, then the fields of AugmentParams


def words_per_row(*, with_augment: bool) -> int:
    """Length of packed draws in words, per row."""
    with_augment = as_flag("with_augment", with_augment)
    return sum(_WORDS if with_augment else _WORDS[:2])


def unpack(
    packed: Tensor, num_rows: int, *, with_augment: bool
) -> tuple[AugmentParams | None, MixUpParams]:
    """View the words of N rows as draws, as `pack` put them.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If there are not as many words as N rows have.
    """
    num_rows = as_integer("num_rows", num_rows, most=MOST_ROWS)
    wanted = num_rows * words_per_row(with_augment=with_augment)
    check_tensor("packed", packed)
    if tuple(packed.shape) != (wanted,) or packed.dtype != torch.int32:
        raise ValueError(
            f"packed must be [{wanted}] int32 for num_rows = {num_rows}, got {came(packed)}"
        )
    return unpacked(packed, num_rows, with_augment=with_augment)


def unpacked(
    packed: Tensor, num_rows: int, *, with_augment: bool
) -> tuple[AugmentParams | None, MixUpParams]:
    """`unpack` what is known to be packed draws of N rows."""
    words = _WORDS if with_augment else _WORDS[:2]
    index, lam, *rest = torch.split_with_sizes(packed, [size * num_rows for size in words])
    mixup = MixUpParams(lam.view(torch.float32), index.view(torch.int64))
    if not with_augment:
        return None, mixup
    top, left, flip, zoom, sigma = rest
    return AugmentParams(top, left, flip, zoom.view(num_rows, 4), sigma.view(torch.float32)), mixup


def augment_to_device(params: AugmentParams, device: torch.device) -> AugmentParams:
    """Send the draws of an augmentation alone to ``device``.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the draws do not fit each other.
    """
    check_params(params)
    device = as_device("device", device)
    return AugmentParams(*(tensor.to(device, non_blocking=True) for tensor in params))
