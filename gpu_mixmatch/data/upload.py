"""Upload: batches travel to a CUDA device one ahead of the training."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gpu_mixmatch.types import SemiSupervisedBatch


class Upload:
    """Send batches to a CUDA device, each while the training works on the one before.

    There are two sets of pinned buffers, used in turns. A set is filled again only after the event
    behind its last copy has passed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.copied = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self.buffers: list[dict[str, Tensor]] = [{}, {}]
        self.count = 0

    def __call__(self, batches: Iterator[SemiSupervisedBatch]) -> Iterator[SemiSupervisedBatch]:
        """Yield the batches on the device."""
        travelling = None
        for batch in batches:
            following = self._send(batch)
            if travelling:
                yield self._receive(*travelling)
            travelling = following
        if travelling:
            yield self._receive(*travelling)

    def _send(self, batch: SemiSupervisedBatch) -> tuple[SemiSupervisedBatch, torch.cuda.Event]:
        buffers, copied = self.buffers[self.count % 2], self.copied[self.count % 2]
        self.count += 1
        copied.synchronize()  # the host waits for the copy of two batches ago, not for kernels
        for name in ("x", "y", "u"):
            _fill(buffers, name, getattr(batch, name))
        with torch.cuda.stream(self.stream):
            on_device = {
                name: buffer.to(self.device, non_blocking=True) for name, buffer in buffers.items()
            }
            copied.record(self.stream)
        return batch._replace(**on_device), copied

    def _receive(self, batch: SemiSupervisedBatch, copied: torch.cuda.Event) -> SemiSupervisedBatch:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        for tensor in (batch.x, batch.y, batch.u):
            # the side stream owns this memory and must not reuse it before ``current`` is done
            tensor.record_stream(current)
        return batch


def _fill(buffers: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    """Copy ``tensor`` to the pinned buffer of its name; one of another shape is made anew."""
    buffer = buffers.get(name)
    if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
        with torch.inference_mode(False):  # later batches may be outside of it
            buffers[name] = buffer = torch.empty_like(tensor, pin_memory=True)
    buffer.copy_(tensor)
