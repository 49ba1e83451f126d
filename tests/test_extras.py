"""One table says what each part needs: errors, the doctor and skipped tests speak from it."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from gpu_mixmatch import _extras
from gpu_mixmatch._extras import PACKAGES, import_dali, install_hint, missing_package, need
from tests.skips import skip_without

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOR_DEVELOPERS = {"test", "docs", "dev"}
# impl/__init__.py has the words of its own errors
OWN_WORDS = {"_extras.py"}


def distributions(requirements):
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}


def installs(extra):
    return distributions(
        PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    )


def test_no_other_file_says_how_to_install_something():
    package = ROOT / "gpu_mixmatch"
    texts = {
        path.relative_to(package).as_posix(): path.read_text() for path in package.rglob("*.py")
    }
    assert "pip install" in texts["_extras.py"]
    others = [name for name, text in texts.items() if "pip install" in text]
    assert set(others) <= OWN_WORDS


def test_every_extra_of_the_table_installs_what_the_table_says():
    for package in PACKAGES:
        for extra, distribution in package.distributions.items():
            if extra is not None:
                assert distribution in installs(extra), package.name


def test_the_table_has_whatever_the_project_asks_for():
    extras = PROJECT["optional-dependencies"].keys() - FOR_DEVELOPERS
    asked_for = set.union(*map(installs, ["", *extras]))
    known = {name for package in PACKAGES for name in package.distributions.values()}
    assert asked_for <= known


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_what_cannot_be_found_is_named_with_its_command(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package.module, None)
    with pytest.raises(ImportError) as error:
        need(package.module, "a preview")
    hint = install_hint(package.module)
    assert str(error.value) == f"a preview needs {package.name}: {hint}"


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("matplotlib.figure", 'pip install -e ".[cli]"'),
        ("lightning.pytorch", 'pip install -e ".[lightning]"'),
        ("kornia", "pip install -e ."),
        ("numba", "pip install -e ."),
        ("triton", "pip install triton"),
    ],
)
def test_the_command_works_in_a_checkout(module, command):
    assert install_hint(module) == command


def test_elsewhere_the_command_names_the_package_itself(monkeypatch, tmp_path):
    monkeypatch.setattr(_extras, "_ROOT", tmp_path)
    assert install_hint("matplotlib") == "pip install matplotlib"
    assert install_hint("sklearn") == "pip install scikit-learn"
    assert install_hint("numba") == "pip install numba"


@pytest.mark.parametrize(
    ("cuda", "extra"), [("12.8", "dali-cu12"), ("13.0", "dali"), (None, "dali")]
)
def test_dali_is_the_build_for_torchs_cuda(monkeypatch, cuda, extra):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setitem(sys.modules, "nvidia.dali.fn", None)
    message = f'this part needs NVIDIA DALI: pip install -e ".[{extra}]"'
    with pytest.raises(ImportError) as error:
        import_dali("fn")
    assert str(error.value) == message


def test_a_missing_parent_is_the_missing_package():
    error = ModuleNotFoundError("No module named 'nvidia'", name="nvidia")
    text = str(missing_package(error, "nvidia.dali.fn", "it"))
    assert text.startswith("it needs NVIDIA DALI: pip install")


def test_a_package_that_another_one_misses_is_the_one_that_is_named():
    error = ModuleNotFoundError("No module named 'accelerate'", name="accelerate")
    text = str(missing_package(error, "transformers", "MixMatchTrainer"))
    assert text == 'MixMatchTrainer needs Accelerate: pip install -e ".[accelerate]"'


def test_a_package_that_is_broken_is_told_with_its_reason(monkeypatch):
    def broken(name):
        raise ImportError("libfreetype.so.6: cannot open shared object file")

    monkeypatch.setattr(_extras, "import_module", broken)
    with pytest.raises(ImportError) as error:
        need("matplotlib", "drawing")
    assert str(error.value) == (
        "drawing needs matplotlib, which cannot be imported (libfreetype.so.6: cannot open shared "
        'object file): pip install -e ".[cli]"'
    )


def test_a_skipped_test_says_what_a_user_would_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(pytest.skip.Exception, match="it needs matplotlib: pip install -e"):
        skip_without("matplotlib")
    assert skip_without("torch") is torch
