"""What each part needs and how to install it: errors, the doctor and skipped tests read this."""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

_ROOT = Path(__file__).parents[1]


class Package(NamedTuple):
    """A package of others that a part of this one imports.

    Attributes:
        name: What people call it.
        module: What is imported.
        distributions: What is installed, by the extra of pyproject.toml that does it: "" is this
            package without extras, None is no extra. The first is the usual one.
        purpose: What it is for, in a few words.
    """

    name: str
    module: str
    distributions: dict[str | None, str]
    purpose: str


PACKAGES = (
    Package("torch", "torch", {"": "torch"}, "everything"),
    Package("NumPy", "numpy", {"": "numpy"}, "all draws on a CPU"),
    Package("Numba", "numba", {"": "numba"}, "batches on a CPU"),
    Package("Triton", "triton", {None: "triton"}, "batches on CUDA"),
    Package("Kornia", "kornia", {"": "kornia"}, "KorniaAugment"),
    Package(
        "NVIDIA DALI",
        "nvidia.dali",
        {"dali": "nvidia-dali-cuda130", "dali-cu12": "nvidia-dali-cuda120"},
        "DaliAugment, DaliLoader and check-images --decoder dali",
    ),
    Package("Lightning", "lightning", {"lightning": "lightning"}, "integrations.lightning"),
    Package(
        "transformers",
        "transformers",
        {"transformers": "transformers"},
        "integrations.transformers",
    ),
    Package("Accelerate", "accelerate", {"accelerate": "accelerate"}, "training with Accelerate"),
    Package("Typer", "typer", {"cli": "typer"}, "the command line"),
    Package("Rich", "rich", {"cli": "rich"}, "the command line"),
    Package("TensorBoard", "tensorboard", {"cli": "tensorboard"}, "logs of gpu-mixmatch train"),
    Package("matplotlib", "matplotlib", {"cli": "matplotlib"}, "previews and charts"),
    Package("scikit-learn", "sklearn", {"cli": "scikit-learn"}, "the digits data set"),
    Package("Pillow", "PIL", {"cli": "pillow"}, "folders of images and check-images"),
)


def need(module: str, user: str = "this part") -> ModuleType:
    """Import a module of a package of the table, at the moment of use.

    Args:
        module: Its full name.
        user: Who needs it, as the subject of the error: "a preview".

    Raises:
        ImportError: If it cannot be imported; the message says how to install it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise missing_package(error, module, user) from error


def import_dali(name: str) -> ModuleType:
    """Import a module of DALI by its name below ``nvidia.dali``; see `need`."""
    return need(f"nvidia.dali.{name}")


def missing_package(error: ImportError, module: str, user: str) -> ImportError:
    """Return the error that says who needs what, and how to install it.

    Args:
        error: What an import of ``module`` raised. Where it names another package of the table,
            that one is missing.
        module: A module of a package of the table.
        user: Who needs it, as the subject of the sentence.
    """
    absent = _packages_of(error.name or "") if isinstance(error, ModuleNotFoundError) else []
    (package,) = absent or _packages_of(module)
    reason = "" if absent else f", which cannot be imported ({error})"
    return ImportError(f"{user} needs {package.name}{reason}: {install_hint(package.module)}")


def install_hint(module: str) -> str:
    """Return the command that installs a package.

    In a checkout of this project that is an extra of it; elsewhere, where the command could not
    find it, it is the package itself.

    Args:
        module: A module of a package of the table.
    """
    (package,) = _packages_of(module)
    extra = next(iter(package.distributions))
    if "dali-cu12" in package.distributions and _is_built_for_cuda_12():
        extra = "dali-cu12"
    if extra is None or not (_ROOT / "pyproject.toml").is_file():
        return f"pip install {package.distributions[extra]}"
    return f'pip install -e ".[{extra}]"' if extra else "pip install -e ."


def _packages_of(module: str) -> list[Package]:
    """The package that a module, or something in it, belongs to; none outside the table."""
    names = [(package, f"{package.module}.") for package in PACKAGES]
    inside = f"{module}."
    return [
        package for package, name in names if inside.startswith(name) or name.startswith(inside)
    ]


def _is_built_for_cuda_12() -> bool:
    import torch

    return (torch.version.cuda or "").startswith("12.")
