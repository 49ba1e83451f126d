"""All draws of a batch in one tensor, so that one copy sends them."""

from typing import TypeVar

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
from gpu_mixmatch.types import (
    MOST_ROWS,
    MOST_SLOTS,
    AugmentParams,
    ChainParams,
    Draws,
    MixUpParams,
)

P = TypeVar("P", bound=Draws)
MOST_COLUMNS = 4 + MOST_SLOTS + 3


def pack(augment: Draws | None, mixup: MixUpParams) -> Tensor:
    """Put a batch's draws into one tensor of 4-byte words, ``[11·N]`` or ``[3·N]`` int32.

    The columns of a cut and a chain, where they are drawn, come last, N rows of them.

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


def words_per_row(*, with_augment: bool, chain_columns: int | None = None) -> int:
    """Length of packed draws in words, per row; see `unpack`."""
    return sum(_words(with_augment, chain_columns))


def _words(with_augment: bool, chain_columns: int | None) -> tuple[int, ...]:
    if not as_flag("with_augment", with_augment):
        return _WORDS[:2]
    if chain_columns is None:
        return _WORDS
    return *_WORDS, as_integer("chain_columns", chain_columns, most=MOST_COLUMNS)


def unpack(
    packed: Tensor, num_rows: int, *, with_augment: bool, chain_columns: int | None = None
) -> tuple[Draws | None, MixUpParams]:
    """View the words of N rows as draws, as `pack` put them.

    Args:
        packed: The words, int32.
        num_rows: N.
        with_augment: Whether there are draws of an augmentation.
        chain_columns: Columns of its `ChainParams`; None where they are `AugmentParams`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If there are not as many words as N rows have.
    """
    num_rows = as_integer("num_rows", num_rows, most=MOST_ROWS)
    words = _words(with_augment, chain_columns)
    wanted = num_rows * sum(words)
    check_tensor("packed", packed)
    if tuple(packed.shape) != (wanted,) or packed.dtype != torch.int32:
        raise ValueError(
            f"packed must be [{wanted}] int32 for num_rows = {num_rows}, got {came(packed)}"
        )
    return unpacked(packed, num_rows, with_augment=with_augment, chain_columns=chain_columns)


def unpacked(
    packed: Tensor, num_rows: int, *, with_augment: bool, chain_columns: int | None
) -> tuple[Draws | None, MixUpParams]:
    """`unpack` what is known to be packed draws of N rows."""
    words = _words(with_augment, chain_columns)
    index, lam, *rest = torch.split_with_sizes(packed, [size * num_rows for size in words])
    mixup = MixUpParams(lam.view(torch.float32), index.view(torch.int64))
    if not with_augment:
        return None, mixup
    top, left, flip, zoom, sigma = rest[:5]
    moved = top, left, flip, zoom.view(num_rows, 4), sigma.view(torch.float32)
    if chain_columns is None:
        return AugmentParams(*moved), mixup
    return ChainParams(*moved, rest[5].view(num_rows, chain_columns)), mixup


def augment_to_device(params: P, device: torch.device) -> P:
    """Send the draws of an augmentation alone to ``device``.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the draws do not fit each other.
    """
    check_params(params)
    device = as_device("device", device)
    kind: type[P] = type(params)
    return kind(*(tensor.to(device, non_blocking=True) for tensor in params))
