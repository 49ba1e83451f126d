"""Implementations of the operations, and the choice among them."""

import importlib
import os
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import get_args

import torch

from gpu_mixmatch.impl import eager
from gpu_mixmatch.types import Impl

_TRITON_INSTALLED = find_spec("triton") is not None
_NUMBA_INSTALLED = find_spec("numba") is not None


def asks_for_triton(impl: Impl, device: torch.device) -> bool:
    """Whether ``impl`` means Triton's kernels on ``device``; `torch.compile` can trace this.

    Raises:
        ValueError: If ``impl`` is unknown.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {list(get_args(Impl))}, got {impl!r}")
    return impl == "triton" or (impl == "auto" and device.type == "cuda" and _TRITON_INSTALLED)


def asks_for_numba(impl: Impl, device: torch.device) -> bool:
    """Whether ``impl`` means Numba's loops on ``device``; `torch.compile` can trace this."""
    return impl == "numba" or (impl == "auto" and device.type == "cpu" and _NUMBA_INSTALLED)


@lru_cache(maxsize=64)
def implementation(impl: Impl, device: torch.device) -> ModuleType:
    """Return the module whose functions run for ``impl`` on ``device``.

    Raises:
        ValueError: If ``impl`` is unknown.
        RuntimeError: If ``impl`` cannot be met there; says why.
    """
    if asks_for_triton(impl, device):
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                f'impl="triton" on {device} cannot be met: its kernels run on CUDA devices, and '
                "elsewhere only in Triton's interpreter, for tests (TRITON_INTERPRET=1 in the "
                'environment of the process). Use impl="auto" or impl="eager", or a CUDA device'
            )
        return _imported("triton", "pip install triton", impl, device)
    if impl == "numba" and device.type != "cpu":
        raise RuntimeError(
            f'impl="numba" on {device} cannot be met: it is compiled for CPUs. '
            'Use impl="auto", or leave this module on the CPU'
        )
    if asks_for_numba(impl, device):
        return _imported("numba", 'pip install "gpu-mixmatch[cpu]"', impl, device)
    return eager


def _imported(name: str, install: str, impl: Impl, device: torch.device) -> ModuleType:
    """Import an implementation, or eager in its place where nobody asked for it by name."""
    try:
        return importlib.import_module(f"gpu_mixmatch.impl.{name}")
    except ImportError as error:
        if impl == "auto":
            return eager
        raise RuntimeError(
            f'impl="{name}" on {device} cannot be met: {name.capitalize()} cannot be imported '
            f'({error}). Install it ({install}), or use impl="auto" or impl="eager"'
        ) from error
