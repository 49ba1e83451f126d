"""Write the documents' result tables and the plots from the JSON under ``benchmarks/results``.

``python -m benchmarks.report`` rewrites what stands between the markers
``<!-- results: NAME -->`` and ``<!-- /results -->`` in README, in this folder's and in ``docs``,
and draws a PNG beside each file of results that has a plot. With ``--check`` it only says whether
the documents equal the results, and exits with 1 if not. ``--draw FOLDER`` only draws, beside the
results in that folder. ``--collect FOLDER`` first takes over what the package's own commands wrote
to ``FOLDER/NAME/``.

NAME is that of a file, NAME--MACHINE.json; or ``speed``, the few rows of ``augment`` that README
shows, and ``strong-speed``, its row of ``strong``; or ``kernels-each``, ``kernels-goals`` and
``kernels-model``, further tables of ``kernels``; or ``methods``, all comparisons of methods in one
table; or ``machines``, what was measured where, and what was not.
"""

import argparse
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import schema
from benchmarks.common import RESULTS, ROOT, Row
from benchmarks.drawings import DRAWINGS, HEADLINES, draw_all
from benchmarks.tables import (
    TABLES,
    Content,
    Tables,
    kernel_goals,
    kernel_table,
    methods_table,
    model_table,
    number,
    pivot,
    place,
    strong_speed,
    threads,
)
from gpu_mixmatch._machine import machine

MARKED = re.compile(
    r"(<!-- results: (?P<name>[\w-]+) -->\n)(?P<old>.*?)(<!-- /results -->)", re.DOTALL
)
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted(ROOT.glob("docs/*.md")))
DOCUMENTS = tuple(path for path in PAGES if path.exists() and MARKED.search(path.read_text()))
SPEED_EFFECTS = "shift, flip"
FURTHER: dict[str, tuple[str, Callable[[Content], Tables]]] = {  # of which suite
    "kernels-each": ("kernels", kernel_table),
    "kernels-goals": ("kernels", kernel_goals),
    "kernels-model": ("kernels", model_table),
    "strong-speed": ("strong", strong_speed),
}
NO_GPU = "Nothing has been measured on a GPU yet."


def part(content: Content, file: Path, folder: Path = ROOT) -> str:
    """What a document shows of a file of results: tables, plot, notes, and where they come from.

    Args:
        content: The results.
        file: Where they lie.
        folder: That of the document, from which it links to the plot.

    Raises:
        ValueError: If the results are quick ones.
    """
    if content["quick"]:
        raise ValueError(f"{file.name} must not be of --quick, whose times are no measurements")
    suite = content["suite"]
    shown = content | {"rows": _of_those_that_ran(content["rows"])}
    parts = _titled(TABLES[suite](shown))
    if suite in DRAWINGS and suite not in schema.TRAINED:
        picture = Path(os.path.relpath(file.with_suffix(".png"), folder)).as_posix()
        parts.append(f"![{HEADLINES[suite](content)}]({picture})\n")
    if suite in ("augment", "strong", "batch", "loader"):
        parts += _notes([row for row in content["rows"] if "goal" not in row])
    bold = " The fastest of a column is bold." if suite in schema.SUITES[1:] else ""
    return "\n".join([*parts, _source(content, content["rows"], bold)])


def _titled(tables: Tables) -> list[str]:
    return [f"{title}\n\n{table}" if title else table for title, table in tables]


def speed(folder: Path = RESULTS) -> str:
    """README's table: views of a few contenders at the greatest number of threads, medians."""
    parts = []
    for file in sorted(folder.glob("augment--*.json")):
        content = schema.load(file)
        rows = [row for row in content["rows"] if row["effects"] == SPEED_EFFECTS]
        rows = [row for row in rows if row["threads"] == max(content["threads"])]
        impl = "triton" if content["gpu"] else "numba"
        names = {
            f"ours, {impl}, reused buffers": f"`WeakAugment`, {impl.capitalize()}, reused buffers",
            "ours, eager": "`WeakAugment`, plain torch",
            "DALI, dynamic mode (DaliAugment)": "`DaliAugment`",
            "Kornia, one call": "Kornia itself, in one call",
        }
        chosen = [
            row | {"contender": shown}
            for name, shown in names.items()
            for row in rows
            if row["contender"] == name and "skipped" not in row
        ]
        table = pivot(
            chosen,
            lambda row: f"{row['size']} px",
            lambda row: number(row["num_rows"] / row["median_ms"]),
            f"thousand views/s: {SPEED_EFFECTS}, normalise",
        )
        parts.append(f"{table}\n{_source(content, chosen, brief=True)}")
    return "\n".join(parts)


def methods(folder: Path = RESULTS) -> str:
    """The methods beside each other, with the errors of every comparison of them."""
    files = sorted(folder.glob("*-compare--*.json"))
    if not files:
        raise FileNotFoundError(f"no results *-compare--*.json in {folder}")
    contents = {}
    for file in files:
        content = schema.load(file)
        config = content["config"]
        contents[f"{config['dataset']}, {config['labels']} labels"] = content
    sources = "\n".join(_source(content, content["rows"]) for content in contents.values())
    return f"{methods_table(contents)}\n{sources}"


def machines(folder: Path = RESULTS) -> str:
    """What the results in a folder were measured on, and whether there is a GPU among it."""
    contents = [schema.load(file) for file in sorted(folder.glob("*--*.json"))]
    timed = [content for content in contents if content["suite"] in schema.SUITES]
    places = "; ".join(dict.fromkeys(map(place, timed))) or "nothing"
    missing = "" if any(content["gpu"] for content in timed) else f" {NO_GPU}"
    return f"Measured on: {places}.{missing}\n"


def rendered(text: str, folder: Path = ROOT, results: Path = RESULTS) -> str:
    """A document that lies in ``folder``, with every marked part written anew.

    Raises:
        FileNotFoundError: If there are no results of a marker's name.
    """

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name == "machines":
            return match[1] + machines(results) + match[4]
        if name == "methods":
            return match[1] + methods(results) + match[4]
        wanted = "augment" if name == "speed" else FURTHER[name][0] if name in FURTHER else name
        files = sorted(results.glob(f"{wanted}--*.json"))
        if not files:
            raise FileNotFoundError(f"no results {wanted}--*.json in {results}")
        if name == "speed":
            return match[1] + speed(results) + match[4]
        if name in FURTHER:
            parts = FURTHER[name][1](schema.load(files[0]))
            return match[1] + "\n".join(_titled(parts)) + match[4]
        return match[1] + "\n".join(part(schema.load(f), f, folder) for f in files) + match[4]

    return MARKED.sub(fill, text)


def collect(folder: Path, results: Path = RESULTS) -> list[Path]:
    """Take over results of the package's own commands, named by folder and machine.

    Args:
        folder: Holds ``NAME/demo.json`` and the like, and ``NAME/preview.png``.
        results: Where ``NAME--MACHINE`` is written.
    """
    taken = []
    for file in sorted(folder.glob("*/*.json")):
        content = schema.load(file)
        taken.append(results / f"{file.parent.name}--{content['machine']}.json")
        schema.dump(content, taken[-1])
    for file in sorted(folder.glob("*/preview.png")):
        taken.append(results / f"{file.parent.name}--{machine(torch.device('cpu'))}.png")
        shutil.copyfile(file, taken[-1])
    return taken


def _of_those_that_ran(rows: list[Row]) -> list[Row]:
    """The rows of contenders that could run in one case at least."""
    able = {row["contender"] for row in rows if "skipped" not in row}
    return [row for row in rows if row["contender"] in able]


def _notes(rows: list[Row]) -> list[str]:
    """What contenders do not do equally, those of one note together; and who could not run."""
    parts = []
    starts = {"note": "Differences to keep in mind:", "skipped": "Left out:"}
    for field, start in starts.items():
        names: dict[str, list[str]] = {}
        for row in rows:
            found = names.setdefault(row.get(field) or "", [])
            if row["contender"] not in found and not (field == "note" and "skipped" in row):
                found.append(row["contender"])
        lines = [f"- {' / '.join(of)}: {note}" for note, of in names.items() if note and of]
        if lines:
            parts.append("\n".join([start, "", *lines, ""]))
    return parts


def _source(content: Content, rows: list[Row], remark: str = "", *, brief: bool = False) -> str:
    """The command that made results, and where, when and, unless brief, with what it ran."""
    versions = content["versions"]
    start = f"`{content['command']}`: "
    if content["suite"] in schema.TRAINED:
        config = content["config"]
        labels = "all" if config["labels"] is None else config["labels"]
        batch = f"{config['batch_size']} + {config['batch_size']} images"
        seconds = ""
        if content["suite"] == "compare":
            batch = f"{config['batch_size']} labelled images"
            seconds = f"seconds of the {'GPU' if content['gpu'] else 'CPU'}, "
        return (
            f"{start}{labels} labels, {config['steps']} steps of {batch}, {seconds}model "
            f"`{config['model']}`, {place(content)}, {threads(rows[0])}, {content['date']}, "
            f"torch {versions['torch']}.\n"
        )
    if content["suite"] == schema.LEARNING:
        steps = sorted({row["steps"] for row in content["rows"]})
        *others, last = [f"{count:,}" for count in steps]
        lengths = f"{', '.join(others)} or {last}" if others else last
        judged = "held-out training" if content["rows"][0]["on"] == "held" else "test"
        config = content["config"]
        batch = f"{config['batch_size']} + {config['batch_size'] * config.get('ratio', 1)}"
        return (
            f"{start}{lengths} steps of {batch} images, errors on {judged} images, model "
            f"`{config['model']}`, {place(content)}, {threads(rows[0])}, {content['date']}, "
            f"torch {versions['torch']}.\n"
        )
    if content["suite"] == "kernels":
        return (
            f"{start}predicted from machine code, nothing was run; {content['date']}, "
            f"triton {versions['triton']}, torch {versions['torch']}.\n"
        )
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    counts = sorted({row["threads"] for row in rows})
    of_threads = f", {threads(rows[0])}" if len(counts) == 1 else ""
    where = f"{place(content)}{of_threads}, {content['date']}"
    return f"{start}medians, {where}{'' if brief else f', {found}'}.{remark}\n"


def main() -> None:
    """Rewrite the documents, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if stale")
    parser.add_argument("--draw", type=Path, help="only draw the plots of this folder")
    parser.add_argument("--collect", type=Path, help="first take over the results in this folder")
    arguments = parser.parse_args()
    if arguments.draw:
        for picture in draw_all(arguments.draw):
            print(f"wrote {picture}")
        return
    if arguments.collect:
        collect(arguments.collect)
    for path in DOCUMENTS:
        before = path.read_text()
        after = rendered(before, path.parent)
        if not arguments.check:
            path.write_text(after)
        elif after != before:
            name = path.relative_to(ROOT)
            sys.exit(f"{name} is stale: run python -m benchmarks.report")
    if not arguments.check:
        draw_all(RESULTS)


if __name__ == "__main__":
    main()
