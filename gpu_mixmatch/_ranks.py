"""This process among those of a distributed run: the one file that asks ``torch.distributed``."""

from typing import Any

import torch
from torch import Tensor, distributed

from gpu_mixmatch._validation import as_integer, as_labels


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
        TypeError: If one is no integer.
        ValueError: If one of them alone is given, or the rank is out of range.
    """
    if (rank is None) != (world_size is None):
        raise ValueError(f"rank and world_size must be given together, got {rank} and {world_size}")
    if rank is None or world_size is None:
        if not is_initialized():
            return 0, 1
        return distributed.get_rank(), distributed.get_world_size()
    world_size = as_integer("world_size", world_size, least=1, most=2**24)
    rank = as_integer("rank", rank, most=2**24)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0 .. world_size - 1 = {world_size - 1}, got {rank}")
    return rank, world_size


def positions(length: int) -> Tensor:
    """Positions in the global batch, ``[length]`` int64: the ids of samples that have none."""
    first = rank() * length
    return torch.arange(first, first + length, device="cpu")


def ids_or_positions(name: str, ids: Any, length: int) -> Tensor | int:
    """The ids given, or positions in the global batch: an integer stands for them on rank 0.

    Raises:
        TypeError: If the ids are neither a tensor nor a numpy array.
        ValueError: If the ids are not ``[length]`` int64.
    """
    if ids is not None:
        found = as_labels(name, ids)
        if tuple(found.shape) != (length,) or found.dtype != torch.int64:
            raise ValueError(
                f"{name} must be [{length}] int64, one per image, got {list(found.shape)} "
                f"{found.dtype}"
            )
        if found.device.type == "meta":
            raise ValueError(f"{name} must be on a device that holds values, got it on meta")
        return found
    return positions(length) if is_initialized() else length


def summed(sums: Tensor) -> Tensor:
    """Add up the tensors of all processes, in place; in a single one they are the sum."""
    if is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(sums)
    return sums


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, of as many each, in the order of their ranks."""
    if not is_initialized() or distributed.get_world_size() == 1:
        return rows
    out = rows.new_empty((distributed.get_world_size() * len(rows), *rows.shape[1:]))
    distributed.all_gather_into_tensor(out, rows.contiguous())
    return out
