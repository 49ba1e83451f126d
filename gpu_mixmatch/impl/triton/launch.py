"""How a kernel is launched: in one place, so that tests can count launches and look at them."""

from contextlib import nullcontext
from typing import Any

import torch

MOST_PROGRAMS = 2**31 - 1


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **options: Any) -> None:
    """Run ``programs`` programs of ``kernel`` on ``device``, in the current stream of it.

    Raises:
        ValueError: If there are more programs than a grid can have.
    """
    if programs == 0:
        return
    if programs > MOST_PROGRAMS:
        raise ValueError(
            f"inputs must need at most {MOST_PROGRAMS} programs of a kernel, got {programs}; "
            'split the batch, or use impl="eager"'
        )
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        run(kernel, programs, *args, **options)


def blocks(length: int, size: int) -> int:
    """Round ``length / size`` up. On the host Triton's own cdiv takes longer than a kernel."""
    return -(length // -size)


def run(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Run a kernel on the current device. Whoever counts launches puts a function in its place."""
    kernel[(programs,)](*args, **options)
