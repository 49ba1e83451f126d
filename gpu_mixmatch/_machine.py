"""What a file of results says of the machine and of the versions around its rows."""

import datetime
import importlib.metadata
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gpu_mixmatch._extras import PACKAGES
from gpu_mixmatch._version import __version__

UNKNOWN = "unknown"  # where a field was not, or cannot be, recorded


def header(
    suite: str,
    command: str,
    device: torch.device,
    threads: Sequence[int],
    *,
    commit: str = UNKNOWN,
    quick: bool = False,
) -> dict[str, Any]:
    """Describe what was run, where and with which versions; a file's rows come beside it.

    Args:
        suite: Whose results these are.
        command: As it was typed.
        device: Where the work was done.
        threads: Numbers of CPU threads that rows were made with.
        commit: Of the repository; an installed package does not know it.
        quick: Whether times are no measurements.
    """
    (dali,) = (package for package in PACKAGES if package.module == "nvidia.dali")
    return {
        "suite": suite,
        "command": command,
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "machine": machine(device),
        "cpu": _cpu_name(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cores": num_cores(),
        "threads": list(threads),
        "quick": quick,
        "device": str(device),
        "versions": {
            "gpu_mixmatch": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": _version("numpy"),
            "kornia": _version("kornia"),
            "dali": next(filter(None, map(_version, dali.distributions.values())), None),
            "triton": _version("triton"),
            "numba": _version("numba"),
        },
    }


def machine(device: torch.device) -> str:
    """Return a short name of the machine for file names: "cpu-2c", or the GPU's."""
    if device.type != "cuda":
        return f"cpu-{num_cores()}c"
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower())
    return name.strip("-")


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine() or UNKNOWN
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
