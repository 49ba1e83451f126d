"""What this machine and this environment can run, and why not, without importing any of it."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from gpu_mixmatch.impl import implementation, resolve_impl

__all__ = ["Finding", "examine", "report"]

CLI = 'pip install "gpu-mixmatch[cli]"'
LATER = "comes with a later version of gpu_mixmatch"
DALI_DISTRIBUTIONS = ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110")


class _Package(NamedTuple):
    """A package that is used by a part of gpu_mixmatch, or only beside it."""

    name: str
    module: str
    distribution: str
    purpose: str
    remedy: str


_PACKAGES = (
    _Package("torchvision", "torchvision", "torchvision", "data sets of your own",
             "pip install torchvision"),
    _Package("PIL", "PIL", "pillow", "images that come as PIL objects", "pip install pillow"),
    _Package("scikit-learn", "sklearn", "scikit-learn", "the digits data set", CLI),
    _Package("matplotlib", "matplotlib", "matplotlib", "gpu-mixmatch preview", CLI),
    _Package("tensorboard", "tensorboard", "tensorboard", "curves of gpu-mixmatch train", CLI),
    _Package("typer", "typer", "typer", "the command line", CLI),
    _Package("rich", "rich", "rich", "tables of the command line", CLI),
    _Package("numpy", "numpy", "numpy", "all draws", 'pip install "numpy>=2.0"'),
)  # fmt: skip


class Finding(NamedTuple):
    """What was found out about one thing.

    Attributes:
        name: The thing.
        usable: Whether gpu_mixmatch can use it here and now.
        detail: Its version and kind, or why it cannot be used.
        remedy: What to do about it; None where nothing is to be done, or nothing can be.
    """

    name: str
    usable: bool
    detail: str
    remedy: str | None


def examine() -> list[Finding]:
    """Look at torch, the device, the implementations, the engines and the optional packages.

    Packages are looked up, not imported, and nothing that fails here raises.

    Returns:
        Findings in the order in which a person reads them: what everything rests on comes first.
    """
    findings: list[Finding] = []
    steps: list[tuple[str, Callable[[], Finding | list[Finding]]]] = [
        ("torch", _torch),
        ("CUDA device", _cuda_devices),
        ("impl eager", _eager),
        ("impl numba", _numba),
        ("impl triton", _triton),
        ("kornia", _kornia),
        ("DALI", _dali),
        *((package.name, functools.partial(_package, package)) for package in _PACKAGES),
        ("CPU threads", _threads),
    ]
    for name, look in steps:
        try:
            found = look()
        except Exception as error:  # a broken package may raise anything, and must be named
            reason = f"could not be examined: {type(error).__name__}: {error}"
            found = Finding(name, False, reason, None)
        findings += [found] if isinstance(found, Finding) else found
    return findings


def report(findings: Sequence[Finding]) -> str:
    """Lay findings out as text for a terminal.

    Args:
        findings: What `examine` returned.

    Returns:
        A line or more per finding, of at most 100 columns: "ok" or "no", the name, the detail; the
        remedy below.
    """
    width = max((len(finding.name) for finding in findings), default=0)
    lines = []
    for finding in findings:
        start = f"{'ok' if finding.usable else 'no'}  {finding.name:<{width}}  "
        lines += _wrapped(finding.detail, start, width + 6)
        if finding.remedy:
            lines += _wrapped(finding.remedy, " " * (width + 6) + "-> ", width + 9)
    return "\n".join(lines)


def _wrapped(text: str, start: str, indent: int) -> list[str]:
    return textwrap.wrap(
        text,
        100,
        initial_indent=start,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [start.rstrip()]


def _torch() -> Finding:
    return Finding("torch", True, f"{torch.__version__}, {_build()} build", None)


def _build() -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "CPU-only"


def _cuda_devices() -> Finding | list[Finding]:
    if _build() == "CPU-only":
        driver = "an NVIDIA driver is there" if _has_driver() else "no NVIDIA driver was found"
        return Finding(
            "CUDA device",
            False,
            f"this torch is a CPU-only build; {driver}",
            "on a machine with an NVIDIA GPU, install a CUDA build of torch: "
            "https://pytorch.org/get-started/locally",
        )
    with warnings.catch_warnings(record=True) as caught:  # torch warns of a driver too old
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return [_cuda_device(number) for number in range(torch.cuda.device_count())]
    reason = " ".join(str(warning.message) for warning in caught)
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        reason = reason or str(error)
    reason = reason.strip().splitlines()[0] if reason.strip() else "torch gives no reason"
    if not _has_driver() and not torch.version.hip:
        return Finding(
            "CUDA device",
            False,
            f"no driver: {reason}",
            "on a machine with an NVIDIA GPU, install its driver (https://www.nvidia.com/drivers); "
            "in a container, pass the GPU on (docker run --gpus all)",
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
    remedy = "see what nvidia-smi says; in a container, pass the GPU on (docker run --gpus all)"
    if visible is not None:
        remedy = "unset CUDA_VISIBLE_DEVICES, or name a device in it that nvidia-smi lists"
    return Finding("CUDA device", False, f"no device: {reason}{hidden}", remedy)


def _cuda_device(number: int) -> Finding:
    properties = torch.cuda.get_device_properties(number)
    detail = (
        f"{properties.name}, capability {properties.major}.{properties.minor}, "
        f"{properties.total_memory / 2**30:.1f} GiB"
    )
    built_for = torch.cuda.get_arch_list() if torch.version.cuda else []
    if built_for and not _runs_on((properties.major, properties.minor), built_for):
        return Finding(
            f"CUDA device {number}",
            False,
            f"{detail}; this torch was built for {', '.join(built_for)}, none of which runs on it",
            "install a build of torch for it: https://pytorch.org/get-started/locally",
        )
    return Finding(f"CUDA device {number}", True, detail, None)


def _runs_on(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Tell whether binaries (sm_86: for 8.6 to 8.9) or PTX (compute_90: from 9.0 on) fit."""
    for arch in built_for:
        kind, _, number = arch.partition("_")
        major, minor = divmod(int(number.rstrip("af")), 10)
        if (major, minor) <= capability and (kind == "compute" or major == capability[0]):
            return True
    return False


def _has_driver() -> bool:
    """Tell whether the driver's library is there, without starting it."""
    if Path("/proc/driver/nvidia/version").exists():
        return True
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _device() -> torch.device:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _eager() -> Finding:
    implementation("eager", _device())
    return Finding("impl eager", True, "plain torch, on the CPU and on CUDA", None)


def _triton() -> Finding:
    version = _version("triton", "triton")
    installed = f"triton {version} is installed" if version else "triton is not installed"
    device = _device()
    running = resolve_impl("auto", device)  # without importing it
    auto = f'impl="auto" runs {running} on {device}'
    try:
        implementation("triton", device)
    except RuntimeError as error:
        why = str(error).split(". ")[0]
        return Finding("impl triton", False, f"{why}; {auto}; {installed}", None)
    return Finding("impl triton", True, f"{auto}; {installed}", None)


def _numba() -> Finding:
    version = _version("numba", "numba")
    if version is None:
        detail = "not installed; for faster batches on the CPU"
        return Finding("impl numba", False, detail, 'pip install "gpu-mixmatch[cpu]"')
    return Finding("impl numba", True, f'numba {version}: impl="auto" runs it on the CPU', None)


def _kornia() -> Finding:
    version = _version("kornia", "kornia")
    if version is None:
        detail = _and_later("not installed; for KorniaAugment", "kornia")
        return Finding("kornia", False, detail, "pip install kornia")
    if not _is_found("gpu_mixmatch.augment.kornia"):
        return Finding("kornia", False, f"{version} is installed; the engine {LATER}", None)
    return Finding("kornia", True, f"{version}, for KorniaAugment", None)


def _dali() -> Finding:
    version = _dali_version()
    if version is None:
        extra = "dali-cu12" if (torch.version.cuda or "").startswith("12.") else "dali"
        detail = "not installed; for DaliAugment"
        remedy = f'pip install "gpu-mixmatch[{extra}]"'
        if sys.platform != "linux":
            return Finding("DALI", False, f"{detail}; DALI is for Linux only", None)
        return Finding("DALI", False, _and_later(detail, "dali"), remedy)
    if not _is_found("gpu_mixmatch.augment.dali"):
        return Finding("DALI", False, f"{version} is installed; the engine {LATER}", None)
    return Finding("DALI", True, f"{version}, for DaliAugment", None)


def _and_later(detail: str, engine: str) -> str:
    missing = not _is_found(f"gpu_mixmatch.augment.{engine}")
    return f"{detail}, which {LATER}" if missing else detail


def _dali_version() -> str | None:
    # to look for nvidia.dali would import its parent, which other packages share
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    if not any((Path(folder) / "dali" / "__init__.py").is_file() for folder in folders or ()):
        return None
    for distribution in DALI_DISTRIBUTIONS:
        try:
            return f"{importlib.metadata.version(distribution)} ({distribution})"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "an unknown version"


def _package(package: _Package) -> Finding:
    version = _version(package.module, package.distribution)
    if version is None:
        detail = f"not installed; for {package.purpose}"
        return Finding(package.name, False, detail, package.remedy)
    return Finding(package.name, True, f"{version}, for {package.purpose}", None)


def _threads() -> Finding:
    cores = os.cpu_count()
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    detail = (
        f"torch uses {torch.get_num_threads()}; this process may use {allowed} of {cores} cores"
    )
    return Finding("CPU threads", True, detail, None)


def _version(module: str, distribution: str) -> str | None:
    """Return the version of what is installed, or None if its module is not there."""
    if not _is_found(module):
        return None
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "an unknown version"


def _is_found(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None  # a bare folder of that name has no origin
