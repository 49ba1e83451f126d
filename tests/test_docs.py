"""The pages: their code runs, their tables are the results, and what they name exists."""

import re
import subprocess
import sys
from functools import cache

import pytest

from benchmarks.report import DOCUMENTS, ROOT, rendered

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
DOCS = [*PAGES, *(path for path in OTHERS if path.exists())]

BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
NEEDS = {  # beside what every page needs
    "data.md": ["nvidia.dali"],
    "engines.md": ["nvidia.dali"],
    "trainers.md": ["accelerate", "lightning", "transformers"],
}
SLOW = ("command-line.md", "trainers.md")


def name(path):
    return path.relative_to(ROOT).as_posix()


def page(path):
    return pytest.param(path, id=name(path), marks=pytest.mark.slow if path.name in SLOW else ())


def prose(text):
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


@cache
def tracked_files():
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):  # not a checkout
        listed = [name(path) for path in ROOT.rglob("*") if path.is_file()]
    return [ROOT / file for file in listed if (ROOT / file).is_file()]


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps its settings for the life of a process."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


# Code


# Lightning's own, of torch's private names
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")
# its advice on 21 batches of tensors in memory
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize("path", [page(path) for path in PAGES if BLOCK.search(path.read_text())])
def test_code_of_a_page_runs_from_top_to_bottom(path, tmp_path, monkeypatch, fresh_accelerate):
    for module in NEEDS.get(path.name, []):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": path.stem}
    for number, block in enumerate(BLOCK.findall(path.read_text()), start=1):
        try:
            exec(compile(block, f"{name(path)}, block {number}", "exec"), names)
        except Exception as error:
            error.add_note(f"in block {number} of {name(path)}:\n{block}")
            raise


@pytest.mark.parametrize("file", ["README.md", "docs/batch.md", "docs/methods.md", "docs/paper.md"])
def test_pages_of_the_builder_have_code(file):
    assert BLOCK.search((ROOT / file).read_text())


# Tables and numbers


def test_tables_equal_the_committed_results():
    for path in DOCUMENTS:
        text = path.read_text()
        assert rendered(text, path.parent) == text, name(path)


def test_every_page_with_a_table_of_results_is_rendered():
    marked = {path for path in DOCS if "<!-- results: " in path.read_text()}
    assert marked <= set(DOCUMENTS)


def test_versions_of_the_trainers_are_those_of_the_constraints():
    constraints = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    text = (ROOT / "docs" / "trainers.md").read_text()
    packages = "torch|lightning|accelerate|transformers|datasets"
    named = dict(re.findall(rf"\b({packages}) (\d+\.\d+\.\d+)", text))
    assert named == {package: constraints[package] for package in packages.split("|")}


# README


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 7_000


def test_readme_names_the_test_command_that_ci_runs():
    assert "<!-- test command -->\n    make test\n" in (ROOT / "README.md").read_text()


# What pages name


def anchors(path):
    """Ids that a renderer gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCS, ids=name)
def test_links_lead_to_files_and_headings_of_the_project(path):
    text = re.sub(r"`[^`\n]*`", "", prose(path.read_text()))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{target} does not exist"
        assert found.is_relative_to(ROOT), f"{target} is not in the project"
        assert not anchor or anchor in anchors(found), f"{target} is no heading there"


@pytest.mark.parametrize("path", DOCS, ids=name)
def test_files_modules_and_targets_that_are_named_exist(path):
    text = path.read_text()
    folders = "tests|examples|docs|benchmarks|gpu_mixmatch"
    for file in re.findall(rf"`((?:{folders})/[\w./-]*)`", text):
        assert "NAME" in file or (ROOT / file).exists(), file
    modules = r"python -m ((?:benchmarks|gpu_mixmatch)(?:\.[a-z_]+)*)(?![\w.])"
    for module in re.findall(modules, text):
        file = ROOT.joinpath(*module.split("."))
        assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), module
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:`|^    )make ([\w-]+)", text, re.MULTILINE):
        assert target in targets, f"make {target}"


@pytest.mark.parametrize("path", DOCS, ids=name)
def test_commands_and_their_options_exist(path):
    typer = pytest.importorskip("typer")
    from gpu_mixmatch.cli.app import app

    commands = typer.main.get_command(app).commands
    options = {
        command: {option for parameter in commands[command].params for option in parameter.opts}
        for command in commands
    }
    for command, rest in re.findall(r"gpu-mixmatch ([a-z][a-z-]*)([^`\n]*)", path.read_text()):
        assert command in commands, command
        for option in re.findall(r"--[a-z][a-z-]*", rest):
            assert option in options[command], f"{command} {option}"


def test_options_in_the_table_of_the_command_line_are_those_of_train():
    typer = pytest.importorskip("typer")
    from gpu_mixmatch.cli.app import app

    known = {
        option
        for parameter in typer.main.get_command(app).commands["train"].params
        for option in parameter.opts
    }
    text = (ROOT / "docs" / "command-line.md").read_text()
    (table,) = re.findall(r"## What can be chosen\n\n(.*?)\n\n", text, re.DOTALL)
    named = {option for row in table.splitlines() for option in re.findall(r"`(--[a-z-]+)", row)}
    assert {"--dataset", "--loader"} < named
    assert named <= known


def test_nothing_cites_a_document_that_is_not_here():
    files = tracked_files()
    here = {path.name for path in files}
    for path in files:
        if path.suffix not in (".py", ".md", ".toml", ".cff", ".yaml", "") or path.is_symlink():
            continue
        text = path.read_text()
        for cited in re.findall(r"\b[\w-]+\.md\b", text):
            assert cited in here, f"{name(path)} cites {cited}"
        # by a name in capitals and the number of a section
        cited = re.search(r"\b(?!RFC\b)[A-Z]{4,} (?:section |§ ?)\d", text)
        assert cited is None, f"{name(path)} cites {cited[0]}"
