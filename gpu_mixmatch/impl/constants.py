"""Tensors that stay the same for the same arguments: made once for each device."""

from collections.abc import Callable
from functools import lru_cache
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def constant(function: Callable[P, T]) -> Callable[P, T]:
    """Keep what ``function`` returns for the same arguments, as ordinary tensors."""
    made_outside: Callable[P, T] = torch.inference_mode(False)(function)
    return lru_cache(maxsize=32)(made_outside)  # type: ignore[return-value]
