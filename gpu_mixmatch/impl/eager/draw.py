"""All draws of a batch: numpy makes them, one copy sends them."""

import torch
from torch import Tensor

from gpu_mixmatch import sampling
from gpu_mixmatch._keys import CountedKey
from gpu_mixmatch.types import DrawPlan


def draw_batch(
    key: Tensor | CountedKey | tuple[int, int | Tensor],
    ids_x: Tensor | int,
    ids_u: Tensor | int,
    plan: DrawPlan,
    out: Tensor,
) -> None:
    if not isinstance(key, tuple):
        raise TypeError("key must be seed and step where numpy draws, got a tensor on the device")
    seed, step = key
    drawn = sampling.pack(*sampling.draw_batch(seed, int(step), ids_x, ids_u, plan))
    pinned = drawn.pin_memory() if out.device.type == "cuda" else drawn
    out.copy_(pinned, non_blocking=True)


def prepare(plan: DrawPlan, device: torch.device) -> None:
    """Do nothing: what numpy draws from stays on the host."""
