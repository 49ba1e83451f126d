"""The house: imports point down only, heavy packages stay where they belong; docs/architecture.md.

All imports count: those of functions, and those for type checkers.
"""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gpu_mixmatch"
FILES = sorted(PACKAGE.rglob("*.py"))
# What stands on a floor may import what stands below, and its neighbours in no circle.
FLOORS = (
    {
        *("types", "_buffers", "_extras", "_generators", "_keys", "_machine", "_ranks", "_streams"),
        *("_timing", "_validation", "_version", "_writes"),
    },
    {"sampling"},
    {"impl"},
    {"functional", "_unchecked"},
    {"augment"},
    {"data", "methods", "losses", "presets", "capture"},
    {"recipes", "integrations", "insight", "cli"},
)
# The files that may import a heavy package, in functions only: at the moment of use.
HEAVY = {
    "kornia": ("augment/kornia.py", "augment/kornia_replay.py"),
    "nvidia": ("augment/dali.py", "data/dali.py"),
    "triton": ("impl/triton/",),
    "numba": ("impl/numba/",),
    "lightning": ("integrations/lightning.py",),
    "pytorch_lightning": ("integrations/lightning.py",),
    "transformers": ("integrations/transformers.py",),
    "accelerate": (),
    "torchvision": (),
}
# A kernel needs its decorator and a trainer's glue its base class; these modules are themselves
# only imported at the moment of use, or by the user.
HEAVY_AT_MODULE_LEVEL = ("impl/triton/", "impl/numba/", "integrations/")

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: name_of(path))


def name_of(path):
    """A file as it stands below the package: "impl/eager/draw.py"."""
    return path.relative_to(PACKAGE).as_posix()


def floor_of(path):
    """The floor of a file by what stands directly under the package; None for its __init__."""
    component = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if component == "__init__":
        return None
    found = [number for number, floor in enumerate(FLOORS) if component in floor]
    assert len(found) == 1, f"{component} must stand on one floor of FLOORS"
    return found[0]


def imports_of(path):
    """Every import of a file: dotted name, names taken from it, and whether a function holds it."""
    folder = path.relative_to(ROOT).parent.parts
    found = []

    def visit(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, [], inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = folder[: len(folder) - child.level + 1] if child.level else ()
                name = ".".join([*base, *([child.module] if child.module else [])])
                found.append((name, [alias.name for alias in child.names], inside))
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                visit(child, inside or function)

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


def file_of(module):
    """The file of a module of ours, or None: it may be a name that a module holds."""
    place = ROOT.joinpath(*module.split("."))
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file():
            return path
    return None


@cache
def targets_of(path):
    """The files of ours that a file imports. ``from package import name`` is the name's own file,
    where it has one, else that of the package."""
    found = set()
    for module, names, _ in imports_of(path):
        if module.split(".")[0] != "gpu_mixmatch":
            continue
        for name in names or [None]:
            target = file_of(f"{module}.{name}") if name else None
            found.add(target or file_of(module))
    return found - {path}


def test_the_rules_see_what_they_judge():
    assert {name_of(path) for path in targets_of(PACKAGE / "functional.py")} >= {"types.py"}
    assert "sampling/draws.py" in map(name_of, targets_of(PACKAGE / "_unchecked.py"))
    assert any("augment" in name_of(path) for path in targets_of(PACKAGE / "presets.py"))
    components = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert set().union(*FLOORS) == components - {"__init__"}


@each_file
def test_imports_point_down_only(path):
    mine = floor_of(path)
    for target in targets_of(path):
        theirs = floor_of(target)
        if mine is None:  # the package's names come from anywhere below the last floor
            assert theirs is None or theirs < len(FLOORS) - 1, name_of(target)
        elif theirs is None:
            raise AssertionError(f"{name_of(path)} imports the whole package")
        else:
            assert theirs <= mine, f"{name_of(path)} imports {name_of(target)}"


def circle_among(graph):
    """Nodes of a graph, by what each leads to, that lie on circles or between them."""
    left = dict(graph)
    while left:
        leaves = {node for node, below in left.items() if not below & left.keys()}
        if not leaves:
            return set(left)
        left = {node: below - leaves for node, below in left.items() if node not in leaves}
    return set()


def test_imports_between_files_form_no_circle():
    graph = {path: targets_of(path) for path in FILES}
    assert not circle_among(graph), sorted(map(name_of, circle_among(graph)))
    assert circle_among({1: {2}, 2: {3}, 3: {2}}) == {1, 2, 3}  # it would be found


def test_imports_between_components_form_no_circle():
    graph = {}
    for path in FILES:
        mine = path.relative_to(PACKAGE).parts[0]
        theirs = {target.relative_to(PACKAGE).parts[0] for target in targets_of(path)}
        graph.setdefault(mine, set()).update(theirs - {mine, "__init__.py"})
    assert not circle_among(graph)


def test_methods_know_nothing_of_capture_and_implementations_nothing_of_each_other():
    for path in FILES:
        targets = set(map(name_of, targets_of(path)))
        if name_of(path).startswith("methods/"):
            assert "capture.py" not in targets, name_of(path)
        for room, allowed in (("eager", ()), ("triton", ()), ("numba", ("eager",))):
            if name_of(path).startswith(f"impl/{room}/"):  # what Numba does not compile is eager's
                rooms = {name.split("/")[1] for name in targets if name.count("/") == 2}
                others = rooms & {"eager", "triton", "numba"} - {room, *allowed}
                assert not others, f"{name_of(path)} imports impl/{others}"


def test_the_process_group_is_asked_in_one_file():
    # training joins and leaves it, and reduces over it
    allowed = {"_ranks.py", "recipes/distributed.py"}
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if name_of(path) not in allowed:
            assert "torch.distributed.get" not in text, name_of(path)
            assert "distributed.is_initialized" not in text, name_of(path)


@each_file
def test_heavy_packages_are_imported_where_they_belong_and_at_the_moment_of_use(path):
    name = name_of(path)
    for module, _, inside in imports_of(path):
        heavy = module.split(".")[0]
        if heavy not in HEAVY:
            continue
        assert name.startswith(HEAVY[heavy]), f"{name} imports {module}"
        assert inside or name.startswith(HEAVY_AT_MODULE_LEVEL), f"{name} imports {module} at once"


def test_benchmarks_import_nothing_of_the_tests():
    for path in (ROOT / "benchmarks").glob("*.py"):
        for module, _, _ in imports_of(path):
            assert module.split(".")[0] != "tests", path.name


def test_importing_the_package_loads_torch_and_numpy_and_nothing_more():
    code = (
        "import sys, torch, numpy\n"
        "before = set(sys.modules)\n"
        "import gpu_mixmatch\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    foreign = set(result.stdout.split()) - set(sys.stdlib_module_names) - {"torch", "numpy"}
    assert foreign == {"gpu_mixmatch"}
