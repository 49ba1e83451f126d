"""How often a tensor was written to: whether code of others changed what it was given."""

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
