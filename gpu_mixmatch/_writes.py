"""What code of others may have done to a tensor: how often it was written to, who shares it."""

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


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors may lie in the same memory; False in a traced program."""
    if torch.compiler.is_compiling():
        return False
    address = one.untyped_storage().data_ptr()
    return address != 0 and address == other.untyped_storage().data_ptr()
