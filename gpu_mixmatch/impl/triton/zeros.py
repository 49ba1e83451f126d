"""Memory that a kernel finds at 0 and leaves at 0, so that no launch has to clear it."""

from functools import lru_cache

import torch
from torch import Tensor

from gpu_mixmatch import _streams


def zeros(device: torch.device, length: int = 1, dtype: torch.dtype = torch.int32) -> Tensor:
    """Return what is 0 before a launch and has to be 0 behind it."""
    if _streams.is_capturing(device):
        # the graph's own, which every replay sets to zero: a kept one would be shared by graphs,
        # and one that is made here would be filled by this graph's replays alone
        return torch.zeros(length, dtype=dtype, device=device)
    return _kept_zeros(device, length, dtype, _streams.current_stream(device))


# What is evicted was only used in the stream that it was made in, so that it may be freed there.
@lru_cache(maxsize=64)
def _kept_zeros(device: torch.device, length: int, dtype: torch.dtype, stream: int) -> Tensor:
    """Memory that launches of one stream leave at 0 for the next."""
    with torch.inference_mode(False):
        return torch.zeros(length, dtype=dtype, device=device)
