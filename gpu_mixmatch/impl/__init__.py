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


def asks_for_triton(impl: Impl, device: torch.device) -> bool:
    """Whether ``impl`` means Triton's kernels on ``device``; `torch.compile` can trace this.

    Raises:
        ValueError: If ``impl`` is unknown.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {list(get_args(Impl))}, got {impl!r}")
    return impl == "triton" or (impl == "auto" and device.type == "cuda" and _TRITON_INSTALLED)


@lru_cache(maxsize=64)
def implementation(impl: Impl, device: torch.device) -> ModuleType:
    """Return the module whose functions run for ``impl`` on ``device``.

    Raises:
        ValueError: If ``impl`` is unknown.
        RuntimeError: If ``impl`` is "triton" and its kernels cannot run there; says why.
    """
    if not asks_for_triton(impl, device):
        return eager
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f'impl="triton" on {device} cannot be met: its kernels run on CUDA devices, and '
            "elsewhere only in Triton's interpreter, for tests (TRITON_INTERPRET=1 in the "
            'environment of the process). Use impl="auto" or impl="eager", or a CUDA device'
        )
    try:
        return importlib.import_module("gpu_mixmatch.impl.triton")
    except ImportError as error:
        if impl == "auto":
            return eager
        raise RuntimeError(
            f'impl="triton" on {device} cannot be met: Triton cannot be imported ({error}). '
            'Install it (pip install triton), or use impl="auto" or impl="eager"'
        ) from error
