"""What several processes add to a training loop; in a single one, each of these does nothing.

Every rank builds batches of its own rows, whose ids key its draws. DDP averages the gradients;
`average_buffers` averages BatchNorm's running statistics. After every step the ranks are equal to
the last bit, so that one checkpoint serves them all.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from gpu_mixmatch._ranks import is_initialized, is_launched, rank, world_size

T = TypeVar("T")


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the processes that ``torchrun`` started, and leave them at the end.

    Args:
        device: "cpu" joins through gloo, "cuda" through nccl, each rank with the GPU of its
            ``LOCAL_RANK``, which becomes the current one.

    Raises:
        ValueError: If one GPU is named for all, or there are fewer GPUs than processes.
    """
    if not is_launched():
        yield
        return
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(_gpu_of_rank(device))
        gpu = torch.device("cuda", torch.cuda.current_device())
        distributed.init_process_group("nccl", device_id=gpu)
    else:
        distributed.init_process_group("gloo")
    yield
    # not after an error: with a rank gone, leaving in good order can wait for it
    distributed.destroy_process_group()


def current_device(name: str) -> torch.device:
    """Return the device of that name; "cuda" is the current one, as `process_group` set it."""
    if name == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model in DDP, to train with; in a single process, return it as it is.

    Guess with the model itself: DDP adds nothing to a pass without gradients.
    """
    if not is_initialized():
        return model
    network = DistributedDataParallel(model, [device.index] if device.type == "cuda" else None)
    # `average_buffers` keeps them equal. The argument of this name is deprecated since torch 2.13;
    # its successor is not in 2.11
    network.broadcast_buffers = False
    return network


@torch.no_grad()
def average_buffers(model: nn.Module) -> None:
    """Give every rank the mean of the ranks' running statistics, in one all-reduce.

    DDP alone would broadcast rank 0's before every forward pass: three times a step where the
    forward is interleaved, and too late for a guess or a checkpoint that comes first.
    """
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if world_size() == 1 or not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    distributed.all_reduce(flat)
    flat /= world_size()
    parts = torch.split(flat, [buffer.numel() for buffer in buffers])
    for buffer, part in zip(buffers, parts, strict=True):
        buffer.copy_(part.view_as(buffer))


def average_values(values: Mapping[str, Tensor], device: torch.device) -> dict[str, float]:
    """Return the mean over the ranks of each 0-d tensor; waits for the device."""
    numbers = [float(value) for value in values.values()]
    if world_size() > 1:
        total = torch.tensor(numbers, dtype=torch.float64, device=device)
        distributed.all_reduce(total)
        numbers = (total / world_size()).tolist()
    return dict(zip(values, numbers, strict=True))


def from_first_rank(find: Callable[[], T]) -> T:
    """Return on every rank what ``find`` returns on rank 0, which alone looks at files.

    What it raises there is raised on every rank, so that none waits for one that has gone.
    `is_of_first_rank` tells such an error.
    """
    if world_size() == 1:
        return find()
    found: list[Any] = [None, None]
    if rank() == 0:
        try:
            found[0] = find()
        except Exception as error:
            found[1] = error
    distributed.broadcast_object_list(found)
    result, raised = found
    if raised is not None:
        raised.of_first_rank = rank() > 0
        raise raised
    return result  # type: ignore[no-any-return]


def is_of_first_rank(error: BaseException) -> bool:
    """Tell whether an error is one of rank 0, which says it, that was raised on another as well."""
    return getattr(error, "of_first_rank", False)


def _gpu_of_rank(device: str) -> int:
    if device != "cuda":
        raise ValueError(
            "device must be 'cuda' under torchrun, where each process has a GPU of its own, "
            f"got {device!r}"
        )
    gpu, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if gpu >= count:
        raise ValueError(
            f"--nproc-per-node must be at most {count}, the number of GPUs here, got "
            f"{os.environ['LOCAL_WORLD_SIZE']}"
        )
    return gpu
