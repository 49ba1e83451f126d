"""The doctor tells what can run and why not, imports nothing for it, and never fails itself."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import warnings
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gpu_mixmatch.impl as implementations
from gpu_mixmatch._extras import PACKAGES, Package, install_hint
from gpu_mixmatch.cli import doctor
from gpu_mixmatch.cli.doctor import Finding, examine

ROOT = Path(__file__).parents[1]
NAMES = [package.name for package in PACKAGES if package.module not in doctor._OWN_FINDINGS]


def found(name: str) -> Finding:
    (finding,) = [finding for finding in examine() if finding.name == name]
    return finding


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in modules else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def pretend(monkeypatch: pytest.MonkeyPatch, folder: Path | None = None, **versions: str) -> None:
    """Let packages seem installed; ``nvidia`` is a namespace in ``folder``."""
    real_spec, real_version = importlib.util.find_spec, importlib.metadata.version

    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        if name == "nvidia":
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(folder)]
            return spec
        if name in versions:
            return ModuleSpec(name, None, origin=f"/site-packages/{name}/__init__.py")
        return real_spec(name, package)

    def version(name: str) -> str:
        if name not in versions and name.startswith("nvidia-dali") and folder:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name] if name in versions else real_version(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(importlib.metadata, "version", version)


def a_cuda_build(
    monkeypatch: pytest.MonkeyPatch, *, available: bool, driver: bool, error: str = "no reason"
) -> None:
    def init() -> None:
        raise RuntimeError(error)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(doctor, "_has_driver", lambda: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def a_device(monkeypatch: pytest.MonkeyPatch, major: int, minor: int, built_for: list[str]) -> None:
    properties = SimpleNamespace(name="H100", major=major, minor=minor, total_memory=80 * 2**30)
    a_cuda_build(monkeypatch, available=True, driver=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)


def test_findings_come_once_each_with_a_reason_and_no_needless_remedy() -> None:
    findings = examine()
    names = [finding.name for finding in findings]
    assert names[0] == "torch"
    assert names[1].startswith("CUDA device")
    assert len(names) == len(set(names))
    seen = {name.lower().removeprefix("impl ") for name in names}
    assert {"eager", *(package.name.lower() for package in PACKAGES)} <= seen
    assert names[-1] == "CPU threads"
    for finding in findings:
        assert finding.detail
        assert not (finding.usable and finding.remedy)


def test_what_is_always_there_is_usable_with_its_version() -> None:
    assert found("torch") == ("torch", True, found("torch").detail, None)
    assert torch.__version__ in found("torch").detail
    assert found("NumPy").usable
    assert importlib.metadata.version("numpy") in found("NumPy").detail
    assert found("impl eager").usable
    assert f"torch uses {torch.get_num_threads()};" in found("CPU threads").detail


@pytest.mark.parametrize(("cuda", "kind"), [(None, "CPU-only build"), ("12.8", "CUDA 12.8 build")])
def test_torch_names_its_build(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, kind: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    assert kind in found("torch").detail


@pytest.mark.parametrize("driver", [True, False])
def test_a_cpu_only_build_is_the_reason_why_there_is_no_cuda(
    monkeypatch: pytest.MonkeyPatch, driver: bool
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(doctor, "_has_driver", lambda: driver)
    finding = found("CUDA device")
    assert not finding.usable
    assert "CPU-only build" in finding.detail
    assert ("no NVIDIA driver" in finding.detail) != driver
    assert "pytorch.org" in (finding.remedy or "")


def test_a_missing_driver_is_the_reason_why_there_is_no_cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = "Found no NVIDIA driver on your system.\nAnd more."
    a_cuda_build(monkeypatch, available=False, driver=False, error=error)
    finding = found("CUDA device")
    assert not finding.usable
    assert finding.detail == "no driver: Found no NVIDIA driver on your system."
    assert "install its driver" in (finding.remedy or "")


@pytest.mark.parametrize("visible", [None, "", "7"])
def test_a_missing_device_is_the_reason_why_there_is_no_cuda(
    monkeypatch: pytest.MonkeyPatch, visible: str | None
) -> None:
    error = "No CUDA GPUs are available"
    a_cuda_build(monkeypatch, available=False, driver=True, error=error)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    finding = found("CUDA device")
    assert not finding.usable
    assert finding.detail.startswith("no device: No CUDA GPUs are available")
    assert ("CUDA_VISIBLE_DEVICES" in finding.detail) == (visible is not None)
    assert ("unset CUDA_VISIBLE_DEVICES" in (finding.remedy or "")) == (visible is not None)


def test_a_driver_too_old_is_told_in_torchs_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_available() -> bool:
        warnings.warn("CUDA initialization: The NVIDIA driver is too old", stacklevel=1)
        return False

    a_cuda_build(monkeypatch, available=False, driver=True, error="No CUDA GPUs are available")
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    assert "The NVIDIA driver is too old" in found("CUDA device").detail


@pytest.mark.parametrize(
    ("capability", "built_for", "usable"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_90"], True),
        ((7, 0), ["sm_75", "sm_80"], False),
        ((8, 0), ["sm_75", "sm_86"], False),
        ((12, 0), ["sm_80", "sm_90"], False),
        ((12, 0), ["sm_80", "compute_90"], True),
        ((9, 0), ["sm_90a"], True),
        ((9, 0), [], True),
    ],
)
def test_a_device_is_usable_if_this_torch_was_built_for_it(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    built_for: list[str],
    usable: bool,
) -> None:
    a_device(monkeypatch, *capability, built_for)
    finding = found("CUDA device 0")
    assert finding.usable == usable
    assert finding.detail.startswith(f"H100, capability {capability[0]}.{capability[1]}, 80.0 GiB")
    assert ("none of which runs on it" in finding.detail) != usable


@pytest.mark.usefixtures("no_kernels_here", "without_numba")
def test_triton_kernels_are_not_claimed_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    finding = found("impl triton")
    assert not finding.usable
    assert "its kernels need a CUDA device" in finding.detail
    assert 'impl="auto" runs eager' in finding.detail
    hide(monkeypatch, "triton")
    assert "triton is not installed" in found("impl triton").detail
    pretend(monkeypatch, triton="9.8.7")
    assert "triton 9.8.7 is installed" in found("impl triton").detail


def test_numba_is_reported_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, numba="9.8.7")
    assert found("impl numba") == Finding(
        "impl numba", True, 'numba 9.8.7: impl="auto" runs it on the CPU', None
    )
    hide(monkeypatch, "numba")
    assert found("impl numba").remedy == "pip install -e ."


def test_triton_kernels_are_reported_once_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "implementation", lambda impl, device: None)
    monkeypatch.setitem(implementations._installed, "triton", True)
    finding = found("impl triton")
    assert finding.usable
    assert 'impl="auto" runs triton on cuda' in finding.detail


def test_a_missing_kornia_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "kornia")
    assert found("Kornia") == Finding(
        "Kornia", False, "not installed; for KorniaAugment", "pip install -e ."
    )


def test_triton_is_offered_where_there_is_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_triton(impl: str, device: torch.device) -> None:
        if impl == "triton":
            raise RuntimeError("Triton cannot be imported. Install it")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "implementation", without_triton)
    monkeypatch.setitem(implementations._installed, "triton", False)
    pretend(monkeypatch, triton="9.8.7")
    assert found("impl triton").remedy is None
    hide(monkeypatch, "triton")
    assert found("impl triton").remedy == "pip install triton"
    assert 'impl="auto" runs eager on cuda' in found("impl triton").detail


@pytest.mark.parametrize(
    ("cuda", "extra"), [("12.8", "dali-cu12"), ("13.0", "dali"), (None, "dali")]
)
def test_the_remedy_for_dali_fits_torchs_cuda(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, extra: str
) -> None:
    hide(monkeypatch, "nvidia")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    finding = found("NVIDIA DALI")
    assert not finding.usable
    assert finding.remedy == f'pip install -e ".[{extra}]"'


def test_dali_is_not_offered_where_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "nvidia")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "for Linux only" in found("NVIDIA DALI").detail
    assert found("NVIDIA DALI").remedy is None


@pytest.mark.parametrize("installed", [True, False])
def test_dali_is_looked_for_beside_the_other_packages_of_nvidia(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, installed: bool
) -> None:
    folder = tmp_path / "nvidia" / ("dali" if installed else "cublas")
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    pretend(monkeypatch, folder.parent, **{"nvidia-dali-cuda120": "2.5.0"})
    finding = found("NVIDIA DALI")
    assert ("2.5.0 (nvidia-dali-cuda120)" in finding.detail) == installed
    assert ("not installed" in finding.detail) != installed


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_named_with_its_purpose_and_its_remedy(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (package,) = [package for package in PACKAGES if package.name == name]
    hide(monkeypatch, package.module.partition(".")[0])
    finding = found(name)
    assert not finding.usable
    assert finding.detail == f"not installed; for {package.purpose}"
    assert finding.remedy == install_hint(package.module)


def test_a_package_without_metadata_is_of_unknown_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert found("NumPy").usable
    assert "unknown version" in found("NumPy").detail


def test_a_bare_folder_of_a_packages_name_is_not_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = Package("nothing", "a_bare_folder", {"cli": "nothing"}, "nothing")
    monkeypatch.setattr(doctor, "PACKAGES", (package,))
    (tmp_path / "a_bare_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("a_bare_folder") is not None
    assert not found("nothing").usable


def broken(*_args: Any, **_options: Any) -> Any:
    raise OSError("broken\ninstallation")


@pytest.mark.parametrize(
    ("owner", "attribute"),
    [
        (importlib.util, "find_spec"),
        (importlib.metadata, "version"),
        (torch.cuda, "is_available"),
        (torch, "get_num_threads"),
        (doctor, "implementation"),
        (doctor, "_has_driver"),
    ],
)
def test_whatever_fails_is_a_finding_and_not_an_error(
    monkeypatch: pytest.MonkeyPatch, owner: Any, attribute: str
) -> None:
    names = [finding.name for finding in examine()]
    monkeypatch.setattr(owner, attribute, broken)
    findings = examine()
    assert [finding.name for finding in findings] == names
    reasons = [finding.detail for finding in findings if not finding.usable]
    if attribute != "_has_driver" or torch.version.cuda is None:
        assert any("could not be examined: OSError: broken" in reason for reason in reasons)
    assert "broken" not in "".join(finding.detail for finding in findings if finding.usable)


@pytest.mark.usefixtures("no_kernels_here")
@pytest.mark.parametrize("blocked", ["Kornia", "matplotlib", "Rich", "numba", "triton"])
def test_a_module_that_python_refuses_to_find_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, blocked: str
) -> None:
    monkeypatch.setitem(sys.modules, blocked.lower(), None)
    name = f"impl {blocked}" if blocked in ("numba", "triton") else blocked
    assert not found(name).usable
    assert "not installed" in found(name).detail


@pytest.fixture(scope="module")
def fresh() -> dict[str, str]:
    code = (
        "import sys, gpu_mixmatch.cli.doctor as doctor\n"
        "before = set(sys.modules)\n"
        "doctor.examine()\n"
        "print('new', sorted({name.split('.')[0] for name in set(sys.modules) - before}))\n"
        "print('loaded', [n for n in ('kornia', 'nvidia', 'matplotlib') if n in sys.modules])\n"
    )
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=environment,
    )
    return dict(line.split(" ", 1) for line in result.stdout.splitlines())


def test_the_doctor_imports_nothing_that_it_looks_for(fresh: dict[str, str]) -> None:
    assert fresh["loaded"] == "[]"
    for module in ("triton", "PIL", "sklearn", "tensorboard", "typer", "rich", "lightning"):
        assert f"'{module}'" not in fresh["new"]
