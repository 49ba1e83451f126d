"""This process among those of a distributed run: the one file that asks ``torch.distributed``."""

import torch
from torch import Tensor, distributed


def is_launched() -> bool:
    """Whether ``torchrun`` started this process."""
    return distributed.is_available() and distributed.is_torchelastic_launched()


def rank() -> int:
    """Return the number of this process among all, 0 in a single one."""
    return distributed.get_rank() if is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return distributed.get_world_size() if is_initialized() else 1


def is_initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def rank_and_world_size(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank and world_size must be given together, got {rank} and {world_size}")
    if rank is None or world_size is None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return 0, 1
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0 .. world_size - 1 = {world_size - 1}, got {rank}")
    return rank, world_size


def positions(length: int) -> Tensor:
    """Positions in the global batch, ``[length]`` int64: the ids of samples that have none."""
    first = 0
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        first = torch.distributed.get_rank() * length
    return torch.arange(first, first + length)
