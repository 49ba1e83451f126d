"""CUDA's current stream: which it is, and whether a graph is being captured on it."""

import torch


def current_stream(device: torch.device) -> int:
    """Return the handle of the current stream of ``device``; 0 where there is no other."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return 0
    return torch.cuda.current_stream(device).cuda_stream


def is_capturing(device: torch.device) -> bool:
    """Whether work on ``device`` goes into a CUDA graph instead of being done."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device, reason: str) -> None:
    """Raise where a CUDA graph would keep what it should read anew, or cannot be captured.

    Raises:
        RuntimeError: If a graph is being captured; ``reason`` says why and what to do.
    """
    if is_capturing(device):
        raise RuntimeError(reason)
