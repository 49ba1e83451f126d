"""What each part needs, and how to install it."""

from importlib import import_module
from typing import Any


def import_dali(name: str) -> Any:
    """Import a module of DALI by its name below ``nvidia.dali``, at the moment of use.

    Raises:
        ImportError: If DALI is not installed; the message says how to install it.
    """
    try:
        return import_module(f"nvidia.dali.{name}")
    except ImportError as error:
        raise ImportError(
            'NVIDIA DALI is needed here: pip install "gpu-mixmatch[dali]", or '
            '"gpu-mixmatch[dali-cu12]" for CUDA 12'
        ) from error


def install_hint(part: str) -> str:
    """Say how to install a part."""
    return f"Install it (pip install {part})"
