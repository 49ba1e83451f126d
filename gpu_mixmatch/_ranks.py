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
    """Return whether there is a process group."""
    return distributed.is_available() and distributed.is_initialized()


def rank_and_world_size(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return what is given or, for None, what torch.distributed says.

    Raises:
        ValueError: If one of them alone is given, or the rank is out of range.
    """
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank and world_size must be given together, got {rank} and {world_size}")
    if rank is None or world_size is None:
        if not is_initialized():
            return 0, 1
        return distributed.get_rank(), distributed.get_world_size()
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0 .. world_size - 1 = {world_size - 1}, got {rank}")
    return rank, world_size


def positions(length: int) -> Tensor:
    """Positions in the global batch, ``[length]`` int64: the ids of samples that have none."""
    first = rank() * length
    return torch.arange(first, first + length)


def ids_or_positions(name: str, ids: Tensor | None, length: int) -> Tensor | int:
    """The ids given, or positions in the global batch: an integer stands for them on rank 0.

    Raises:
        ValueError: If the ids are not ``[length]`` int64.
    """
    if ids is not None:
        if tuple(ids.shape) != (length,) or ids.dtype != torch.int64:
            raise ValueError(
                f"{name} must be [{length}] int64, one per image, got {list(ids.shape)} {ids.dtype}"
            )
        return ids
    return positions(length) if is_initialized() else length
