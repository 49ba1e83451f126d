"""Workspace: named buffers that outlive a call."""

import torch
from torch import Tensor


class Workspace:
    """Named buffers that outlive a call, so that steady state allocates nothing large.

    On a CPU the page faults of fresh outputs cost more than the arithmetic on them. A buffer is
    overwritten by the next call that asks for the same name.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def empty(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return the buffer ``name``, contiguous and unfilled, made anew if its kind differs."""
        buffer = self._buffers.get(name)
        if (
            buffer is None
            or buffer.shape != shape
            or buffer.dtype != dtype
            or buffer.device != device
        ):
            with torch.inference_mode(False):  # later calls may be outside of it
                buffer = torch.empty(shape, dtype=dtype, device=device)
            self._buffers[name] = buffer
        return buffer
