"""What is said more than once about the package agrees: version, checks, description."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import gpu_mixmatch

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()


def recipe(target):
    """The commands of a target of the Makefile, as one would type them."""
    lines = MAKEFILE.split(f"\n{target}: ", 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    return [line.strip().removeprefix("$(RUN)/") for line in lines]


def described(text):
    """README as the package's description: what pyproject.toml makes of it."""
    hook = PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    for substitution in hook["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    return text


def test_the_changelogs_newest_release_is_this_version():
    headings = re.findall(r"^## \[(.+?)\](.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    version, date = headings[1]
    assert version == gpu_mixmatch.__version__
    assert re.fullmatch(r" - \d{4}-\d{2}-\d{2}", date)


def test_the_citation_is_of_this_version_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == gpu_mixmatch.__version__
    assert citation["license"] == PYPROJECT["project"]["license"]


def test_the_version_is_written_in_one_place():
    assert "version" not in PYPROJECT["project"]
    assert PYPROJECT["tool"]["hatch"]["version"] == {"path": "gpu_mixmatch/_version.py"}


def test_pre_commit_runs_the_commands_of_make_check():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (repository,) = config["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"] for hook in repository["hooks"]] == recipe("check")


def test_ci_runs_every_check():
    script = (ROOT / ".ci" / "run").read_text()
    for command in ("make check", "make docs", ".ci/package"):
        assert f"\n{command}\n" in script


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("see [pages](docs/data.md) and [it](#speed).", "see pages and it."),
        ("[paper](https://arxiv.org/abs/1905.02249)", "[paper](https://arxiv.org/abs/1905.02249)"),
        ("a\n\n![picture](benchmarks/x.png)\n\nb", "a\n\nb"),
        ('a\n\n<picture>\n<img src="x.png">\n</picture>\n\nb', "a\n\nb"),
        ("<!-- results: x -->\n| table |", "| table |"),
    ],
)
def test_a_description_has_no_picture_and_no_link_that_lies_beside_readme(text, wanted):
    assert described(text) == wanted


def test_the_description_keeps_the_code_of_readme():
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```.*?```", readme, re.DOTALL)
    assert len(blocks) > 0
    description = described(readme)
    assert all(block in description for block in blocks)
    assert not re.search(r"\]\((?!https?:)|<img|<picture", description)


def test_every_package_that_is_asked_for_has_a_tested_version():
    pins = (ROOT / "constraints.txt").read_text()
    project = PYPROJECT["project"]
    wanted = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.match(r"[\w-]+", line).group() for lines in wanted for line in lines}
    unpinned = {name for name in names if f"\n{name}==" not in pins}
    # DALI is tested as the build for CUDA 13
    assert unpinned <= {"gpu-mixmatch", "nvidia-dali-cuda120"}
