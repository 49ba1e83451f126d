"""The doctor tells what can run and why not, imports nothing for it, and never fails itself."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tomllib
import warnings
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpu_mixmatch.cli import doctor
from gpu_mixmatch.cli.doctor import Finding, examine, report

ROOT = Path(__file__).parents[1]
OPTIONAL = ("torchvision", "PIL", "scikit-learn", "matplotlib", "tensorboard", "typer", "rich")
MODULES = {"kornia": "kornia", "DALI": "nvidia", "PIL": "PIL", "scikit-learn": "sklearn"}


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
    assert {"impl eager", "impl triton", "kornia", "DALI", "numpy", *OPTIONAL} <= {*names}
    assert names[-1] == "CPU threads"
    for finding in findings:
        assert finding.detail
        assert not (finding.usable and finding.remedy)


def test_what_is_always_there_is_usable_with_its_version() -> None:
    assert found("torch") == ("torch", True, found("torch").detail, None)
    assert torch.__version__ in found("torch").detail
    assert found("numpy").usable
    assert importlib.metadata.version("numpy") in found("numpy").detail
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
    assert "its kernels run on CUDA devices" in finding.detail
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
    assert found("impl numba").remedy == 'pip install "gpu-mixmatch[cpu]"'


@pytest.mark.usefixtures("without_numba")
def test_triton_kernels_are_reported_once_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = SimpleNamespace(__name__="gpu_mixmatch.impl.triton")
    monkeypatch.setattr(doctor, "implementation", lambda impl, device: kernels)
    finding = found("impl triton")
    assert finding.usable
    assert 'impl="auto" runs triton' in finding.detail


@pytest.mark.parametrize("engine", [False, True])
def test_kornia_is_usable_only_with_the_engine(
    monkeypatch: pytest.MonkeyPatch, engine: bool
) -> None:
    pretend(monkeypatch, kornia="0.9.1", **({"gpu_mixmatch.augment.kornia": ""} if engine else {}))
    if not engine:
        hide(monkeypatch, "gpu_mixmatch.augment.kornia")
    finding = found("kornia")
    assert finding.usable == engine
    assert finding.remedy is None
    assert "0.9.1" in finding.detail
    assert ("later version" in finding.detail) != engine


def test_a_missing_kornia_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "kornia")
    finding = found("kornia")
    assert not finding.usable
    assert "not installed" in finding.detail
    assert finding.remedy == "pip install kornia"


@pytest.mark.parametrize(
    ("cuda", "extra"), [("12.8", "dali-cu12"), ("13.0", "dali"), (None, "dali")]
)
def test_the_remedy_for_dali_fits_torchs_cuda(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, extra: str
) -> None:
    hide(monkeypatch, "nvidia")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    finding = found("DALI")
    assert not finding.usable
    assert finding.remedy == f'pip install "gpu-mixmatch[{extra}]"'
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extra in project["optional-dependencies"]


@pytest.mark.parametrize("installed", [True, False])
def test_dali_is_looked_for_beside_the_other_packages_of_nvidia(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, installed: bool
) -> None:
    folder = tmp_path / "nvidia" / ("dali" if installed else "cublas")
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    pretend(monkeypatch, folder.parent, **{"nvidia-dali-cuda120": "2.5.0"})
    finding = found("DALI")
    assert ("2.5.0 (nvidia-dali-cuda120)" in finding.detail) == installed
    assert ("not installed" in finding.detail) != installed


@pytest.mark.parametrize("name", [*OPTIONAL, "numpy"])
def test_a_missing_package_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    hide(monkeypatch, MODULES.get(name, name))
    finding = found(name)
    assert not finding.usable
    assert finding.detail.startswith("not installed; for ")
    assert (finding.remedy or "").startswith("pip install ")
    in_extra = name not in ("torchvision", "PIL", "numpy")
    assert ('"gpu-mixmatch[cli]"' in (finding.remedy or "")) == in_extra


def test_a_package_without_metadata_is_of_unknown_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert found("numpy").usable
    assert "unknown version" in found("numpy").detail


def test_a_bare_folder_of_a_packages_name_is_not_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if importlib.util.find_spec("torchvision") is not None:
        pytest.skip("torchvision is installed, so that a folder cannot be taken for it")
    (tmp_path / "torchvision").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not found("torchvision").usable


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
    report(findings)


@pytest.mark.usefixtures("no_kernels_here")
@pytest.mark.parametrize("blocked", ["kornia", "matplotlib", "rich", "numba", "triton"])
def test_a_module_that_python_refuses_to_find_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, blocked: str
) -> None:
    monkeypatch.setitem(sys.modules, blocked, None)
    name = f"impl {blocked}" if blocked in ("numba", "triton") else blocked
    assert not found(name).usable
    assert "not installed" in found(name).detail


def test_the_report_marks_every_finding_and_indents_remedies() -> None:
    long = "word " * 40
    text = report(
        [
            Finding("torch", True, "2.13.0", None),
            Finding("CUDA device", False, "no driver", "install one"),
            Finding("DALI", False, long, None),
        ]
    )
    lines = text.splitlines()
    assert lines[:3] == [
        "ok  torch        2.13.0",
        "no  CUDA device  no driver",
        "                 -> install one",
    ]
    assert lines[3].startswith("no  DALI         word")
    assert len(lines) > 4
    assert all(line.startswith(" " * 17) for line in lines[4:])
    assert max(map(len, lines)) <= 100
    assert " ".join(" ".join(lines[3:]).split()[2:]) == long.strip()


def test_the_report_of_this_machine_is_plain_ascii_of_100_columns() -> None:
    findings = examine()
    text = report(findings)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 100
    marks = [line[:2] for line in text.splitlines() if not line.startswith(" ")]
    assert marks == ["ok" if finding.usable else "no" for finding in findings]
    assert report([]) == ""


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
    for module in ("triton", "torchvision", "PIL", "sklearn", "tensorboard", "typer", "rich"):
        assert f"'{module}'" not in fresh["new"]
