"""Workspace: named buffers that outlive a call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu_mixmatch import _streams


class Workspace:
    """Named buffers that outlive a call, so that steady state allocates nothing large.

    On a CPU the page faults of fresh outputs cost more than the arithmetic on them. A buffer is
    overwritten by the next call that asks for the same name in the same CUDA stream; streams share
    none. What is captured in a CUDA graph gets memory of the graph's own: a graph goes on writing
    to its addresses, whoever has the buffer by then.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def empty(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return the buffer ``name``, contiguous and unfilled, made anew if its kind differs."""
        return self._kept(name, shape, dtype, device, torch.empty)

    def zeros(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return the buffer ``name`` of zeros, which whoever writes to it leaves behind."""
        return self._kept(name, shape, dtype, device, torch.zeros)

    def _kept(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        make: Callable[..., Tensor],
    ) -> Tensor:
        if _streams.is_capturing(device):
            return make(shape, dtype=dtype, device=device)
        key = name, _streams.current_stream(device)
        buffer = self._buffers.get(key)
        if (
            buffer is None
            or buffer.shape != shape
            or buffer.dtype != dtype
            or buffer.device != device
        ):
            with torch.inference_mode(False):  # later calls may be outside of it
                buffer = make(shape, dtype=dtype, device=device)
            self._buffers[key] = buffer
        return buffer

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are empty: what is in a buffer is of no use after the call."""
        return {"_buffers": {}}
