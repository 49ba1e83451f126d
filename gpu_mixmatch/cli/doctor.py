"""What this machine and this environment can run, and why not, without importing any of it."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from gpu_mixmatch._extras import PACKAGES, Package, install_hint
from gpu_mixmatch.impl import implementation, resolve_impl

__all__ = ["Finding", "Verdict", "conclude", "examine", "is_optional"]

_BY_MODULE = {package.module: package for package in PACKAGES}
_OWN_FINDINGS = ("torch", "numba", "triton")  # modules of which more is said than a version
# what one may want to do, the findings that it takes, and whether everyone needs it
_PURPOSES = (
    (
        "MixMatch in a training loop",
        ("torch", "impl eager", "impl numba", "NumPy", "Kornia"),
        True,
    ),
    (
        "gpu-mixmatch train, demo, ablate and preview",
        ("Typer", "Rich", "TensorBoard", "matplotlib", "scikit-learn", "Pillow"),
        True,
    ),
    ("a GPU", ("CUDA device", "impl triton"), False),
    ("DALI", ("NVIDIA DALI",), False),
    ("Lightning", ("Lightning",), False),
    ("Accelerate", ("Accelerate",), False),
    ("the Hugging Face Trainer", ("transformers", "Accelerate"), False),
)


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


class Verdict(NamedTuple):
    """Whether one is ready to do something.

    Attributes:
        purpose: What for.
        missing: Names of the findings that stand in the way; none if one is ready.
        optional: Whether one may well do without it.
    """

    purpose: str
    missing: tuple[str, ...]
    optional: bool

    def __str__(self) -> str:
        found = f"no, needs {', '.join(self.missing)}" if self.missing else "yes"
        optional = " (optional)" if self.optional and self.missing else ""
        return f"ready for {self.purpose}: {found}{optional}"


def conclude(findings: Sequence[Finding]) -> list[Verdict]:
    """Say what one is ready for."""
    usable = {_kind(finding) for finding in findings if finding.usable}
    return [
        Verdict(purpose, tuple(name for name in names if name not in usable), not needed)
        for purpose, names, needed in _PURPOSES
    ]


def is_optional(finding: Finding) -> bool:
    """Tell whether nothing that everyone needs takes this."""
    return not any(needed and _kind(finding) in names for _, names, needed in _PURPOSES)


def _kind(finding: Finding) -> str:
    """The name of a finding, without the number of a device."""
    return "CUDA device" if finding.name.startswith("CUDA device") else finding.name


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
        *(
            (package.name, functools.partial(_package, package))
            for package in PACKAGES
            if package.module not in _OWN_FINDINGS
        ),
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


def _numba() -> Finding:
    package = _BY_MODULE["numba"]
    version = _version(package)
    if version is None:
        detail = f"not installed; for {package.purpose}"
        return Finding("impl numba", False, detail, install_hint("numba"))
    return Finding("impl numba", True, f'numba {version}: impl="auto" runs it on the CPU', None)


def _triton() -> Finding:
    version = _version(_BY_MODULE["triton"])
    installed = f"triton {version} is installed" if version else "triton is not installed"
    device = _device()
    auto = f'impl="auto" runs {_runs_for_auto(device)} on {device}'
    try:
        implementation("triton", device)
    except RuntimeError as error:
        why = str(error).split(". ")[0]
        remedy = install_hint("triton") if device.type == "cuda" and version is None else None
        return Finding("impl triton", False, f"{why}; {auto}; {installed}", remedy)
    return Finding("impl triton", True, f"{auto}; {installed}", None)


def _runs_for_auto(device: torch.device) -> str:
    """Name the implementation that ``impl="auto"`` means on ``device``; Numba is not imported."""
    return resolve_impl("auto", device)


def _package(package: Package) -> Finding:
    version = _version(package)
    if version is not None:
        return Finding(package.name, True, f"{version}, for {package.purpose}", None)
    detail = f"not installed; for {package.purpose}"
    if package.module == "nvidia.dali" and sys.platform != "linux":
        return Finding(package.name, False, f"{detail}; it is for Linux only", None)
    return Finding(package.name, False, detail, install_hint(package.module))


def _threads() -> Finding:
    cores = os.cpu_count()
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    detail = (
        f"torch uses {torch.get_num_threads()}; this process may use {allowed} of {cores} cores"
    )
    return Finding("CPU threads", True, detail, None)


def _version(package: Package) -> str | None:
    """Return the version of what is installed, or None if its module is not there."""
    if not _is_found(package.module):
        return None
    for distribution in package.distributions.values():
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        return version if len(package.distributions) == 1 else f"{version} ({distribution})"
    return "an unknown version"


def _is_found(module: str) -> bool:
    parent, _, child = module.rpartition(".")
    try:
        spec = importlib.util.find_spec(parent or module)
    except (ImportError, ValueError):
        return False
    if spec is None:
        return False
    if parent:  # looking for the whole name would import the parent, which other packages share
        folders = spec.submodule_search_locations or ()
        return any((Path(folder) / child / "__init__.py").is_file() for folder in folders)
    return spec.origin is not None  # a bare folder of that name has no origin
