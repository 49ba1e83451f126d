"""What the documents point to is there: files, tests, and links between pages."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "benchmarks").glob("*.md"),
]
MAPS = [ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md", ROOT / "docs" / "decisions.md"]
FOLDERS = (ROOT, ROOT / "gpu_mixmatch")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def cited(text):
    """Files and ``file::test``s that stand in backticks; NAME and * stand for others."""
    words = re.findall(r"`([\w./:*-]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    files = r"(?:[\w.*-]+/)+[\w.*-]*|[\w*-]+\.(?:py|md|cff|toml|txt|json)"
    found = [word for word in words if re.fullmatch(rf"(?:{files})(?:::\w+)?", word)]
    return [word for word in found if "NAME" not in word]


def is_there(word):
    path, _, test = word.partition("::")
    if path.startswith("build/"):  # made, not committed
        return True
    files = [file for folder in FOLDERS for file in folder.glob(path)]
    if "/" not in path:  # in a table whose heading names the folder
        files += (ROOT / "gpu_mixmatch").rglob(path)
    return any(not test or f"\ndef {test}(" in file.read_text() for file in files)


@pytest.mark.parametrize("path", MAPS, ids=name_of)
def test_every_file_and_test_that_a_map_names_exists(path):
    words = cited(path.read_text())
    assert len(words) >= 5
    assert [word for word in words if not is_there(word)] == []


def test_what_does_not_exist_is_found():
    assert cited("`tests/test_x.py::test_y` and `a.py`, not `a.b` or `x`") == [
        "tests/test_x.py::test_y",
        "a.py",
    ]
    assert is_there("tests/test_references.py::test_what_does_not_exist_is_found")
    assert not is_there("tests/test_references.py::test_of_another_name")
    assert not is_there("tests/test_nothing.py")
    assert not is_there("impl/nothing.py")


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_link_between_documents_leads_to_a_file(path):
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []
