"""Whether code of others wrote into a tensor that it was given."""

import torch
from torch import Tensor


def count_of_writes(tensor: Tensor) -> int | None:
    """How often a tensor was written to, or None where nobody counts.

    What goes past torch (``.data``, numpy, DLPack, a kernel of one's own) is not counted, nor what
    is written to tensors of inference mode. A traced program has no counts.
    """
    if torch.compiler.is_compiling() or tensor.is_inference():
        return None
    return tensor._version


def seen_to_differ(tensor: Tensor, other: Tensor) -> bool:
    """Whether values differ, where that can be told without waiting for a device."""
    return tensor.device.type == "cpu" and not torch.equal(tensor, other)
