"""Tensors that stay the same for the same arguments: made once for each device."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch

from gpu_mixmatch import _streams

P = ParamSpec("P")
T = TypeVar("T")


def constant(function: Callable[P, T]) -> Callable[P, T]:
    """Keep what ``function`` returns for the same arguments, as ordinary tensors.

    A `torch.device` among the arguments says where they are; there they are kept as long as the
    process runs. A CUDA graph reads them by their addresses, and kernels of another stream may
    still read them when they are no longer asked for: freed memory would have another owner. They
    are few, of the shapes and policies that a process uses. ``function`` makes them on the CPU and
    sends them: then they are filled for every stream when it returns.

    Raises:
        RuntimeError: If they would have to be made while a CUDA graph is captured.
    """
    made_outside: Callable[P, T] = torch.inference_mode(False)(function)
    on_host: Callable[P, T] = lru_cache(maxsize=32)(made_outside)  # type: ignore[assignment]
    on_devices: dict[tuple[Any, ...], T] = {}

    @wraps(function)
    def kept(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return made_outside(*args, **kwargs)
        device = next((arg for arg in args if isinstance(arg, torch.device)), None)
        if device is None or device.type == "cpu":
            return on_host(*args, **kwargs)
        key = (*args, *kwargs.items())
        if key not in on_devices:
            _streams.refuse_capture(
                device,
                f"a constant must be on {device} before a CUDA graph is captured: call what is "
                "captured once before, with the same shapes, as torch.cuda.graph wants it anyway",
            )
            on_devices[key] = made_outside(*args, **kwargs)
        return on_devices[key]

    return kept
