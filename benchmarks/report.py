"""Write the result tables of the READMEs from the JSON under ``benchmarks/results``, and the plots.

``python -m benchmarks.report`` rewrites what stands between the markers
``<!-- results: NAME -->`` and ``<!-- /results -->`` and draws a PNG beside the results of each
suite; with ``--check`` it only says whether the READMEs equal the results, and exits with 1 if not.
``NAME in brief`` shows the medians of a suite's first tables. ``--draw FOLDER`` only draws, beside
the results in that folder.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import schema

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "0.1.0"
MARKED = re.compile(
    r"(<!-- results: (?P<name>[\w-]+)(?P<brief> in brief)? -->\n)(.*?)(<!-- /results -->)",
    re.DOTALL,
)
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")


def speeds(content: dict[str, Any]) -> str:
    """Medians and quartiles of `benchmarks.engines` as a Markdown table."""
    heading = ["thousand images/s", "for", *content["columns"], "on a GPU"]
    lines = ["| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
    for row in content["rows"]:
        cells = [
            f"{cell['median']:.3g} ({cell['low']:.3g} to {cell['high']:.3g})"
            for cell in row["cells"]
        ]
        cells = [row["label"], row["when"], *cells, "not yet measured"]
        lines.append("| " + " | ".join(cells) + " |")
    versions = ", ".join(
        f"{name} {version}" for name, version in content["versions"].items() if name != "python"
    )
    lines += [
        "",
        f"`{content['command']}`: medians (and quartiles) of {content['rounds']} rounds in turns, "
        f"batches of {', '.join(content['batches'])} images, {content['device']}, "
        f"{content['date']}, {versions}.",
    ]
    return "\n".join(lines) + "\n"


def table(content: dict[str, Any]) -> str:
    """A comparison's rows as a Markdown table, with the command and versions below."""
    with_paper = any(row["paper"] for row in content["rows"])
    heading = ["test error in %", *(f"seed {seed}" for seed in content["seeds"])]
    if len(content["seeds"]) > 1:
        heading.append("mean ± sd")
    if with_paper and len(content["rows"]) > 2:
        heading.append("paper")
    lines = ["| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
    for row in content["rows"]:
        cells = [row["label"], *(f"{error:.2f}" for error in row["errors"])]
        if len(content["seeds"]) > 1:
            cells.append(f"{row['mean']:.2f} ± {row['deviation']:.2f}")
        if "paper" in heading:
            paper = row["paper"]
            cells.append(f"{paper[0]:.2f} / {paper[1]:.2f}" if paper else "")
        lines.append("| " + " | ".join(cells) + " |")
    config, versions = content["config"], content["versions"]
    labels = "all" if config["labels"] is None else config["labels"]
    lines += [
        "",
        f"`{content['command']}`: {labels} labels, {config['steps']} steps of "
        f"{config['batch_size']} + {config['batch_size']} images, model `{config['model']}`, "
        f"{content['device']}, {content['date']}, torch {versions['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def suite_part(
    content: dict[str, Any], file: Path, folder: Path = ROOT, *, brief: bool = False
) -> str:
    """The tables of a suite's results, its plot if it has one, the command and the versions.

    Args:
        content: The results.
        file: Where they lie.
        folder: That of the document, from which it links to the plot.
        brief: Whether to show medians alone, and of several tables the first.
    """
    if content["quick"]:
        raise ValueError(f"{file.name} must not be of --quick, whose times are no measurements")
    tables = SUITE_TABLES[content["suite"]](_medians_alone(content) if brief else content)
    if brief and content["suite"] != "augment":
        tables = tables[:1]
    parts = [title + "\n\n" + text for title, text in tables]
    if content["suite"] in PLOTS:
        picture = file.with_suffix(".png").relative_to(folder)
        parts.append(f"![{content['suite']} on {_machine(content)}]({picture})\n")
    if content["suite"] in ("augment", "batch", "loader"):
        parts += _notes(content["rows"], with_skipped=brief)
    versions = ", ".join(f"{name} {v}" for name, v in content["versions"].items() if v)
    bold = "" if content["suite"] == "ops" else " The fastest of a column is bold."
    parts.append(
        f"`{content['command']}`: medians, {_machine(content)}, {content['cores']} cores, "
        f"{content['date']}, {versions}.{bold}\n"
    )
    return "\n".join(parts)


def _medians_alone(content: dict[str, Any]) -> dict[str, Any]:
    """The results without quartiles, and without those who could not run."""
    rows = [
        {name: value for name, value in row.items() if name not in ("low_ms", "high_ms")}
        for row in content["rows"]
        if "skipped" not in row
    ]
    return content | {"rows": rows}


def _notes(rows: list[dict[str, Any]], *, with_skipped: bool) -> list[str]:
    """What contenders do not do equally, those of one note together; and who could not run."""
    parts = []
    starts = {"note": "What is not equal, or to be known:", "skipped": "Left out:"}
    for field, start in starts.items():
        if field == "skipped" and not with_skipped:
            continue
        names: dict[str, list[str]] = {}
        for row in rows:
            found = names.setdefault(row.get(field) or "", [])
            if row["contender"] not in found and not (field == "note" and "skipped" in row):
                found.append(row["contender"])
        lines = [f"- {' / '.join(of)}: {note}" for note, of in names.items() if note and of]
        if lines:
            parts.append("\n".join([start, "", *lines, ""]))
    return parts


def _machine(content: dict[str, Any]) -> str:
    return str(content["gpu"] or content["cpu"])


def pivot(
    rows: list[dict[str, Any]],
    column: Callable[[dict[str, Any]], str],
    cell: Callable[[dict[str, Any]], str],
    label: str,
    best: Callable[[dict[str, Any]], float] | None = None,
) -> str:
    """Rows as a Markdown table: contenders below each other, cases beside each other.

    Args:
        rows: Of one kind.
        column: The heading of a row's column.
        cell: What is shown of a row that was not skipped.
        label: The heading of the contenders.
        best: A row's rank, of which the least is bold; None marks none.
    """
    columns = list(dict.fromkeys(map(column, rows)))
    found = {(row["contender"], column(row)): row for row in rows}
    winners = set()
    for name in columns if best else ():
        ranked = [row for row in rows if column(row) == name and "skipped" not in row]
        # the bound is not a contender
        ranked = [row for row in ranked if row["contender"] not in ("copy_", "ideal loader")]
        if ranked:
            winners.add(id(min(ranked, key=best)))
    lines = ["| " + " | ".join([label, *columns]) + " |", "|---" * (len(columns) + 1) + "|"]
    for contender in dict.fromkeys(row["contender"] for row in rows):
        cells = []
        for name in columns:
            row = found.get((contender, name))
            if row is None:
                cells.append("")
            elif "skipped" in row:
                cells.append("skipped")
            else:
                cells.append(f"**{cell(row)}**" if id(row) in winners else cell(row))
        reasons = {r["skipped"] for r in rows if r["contender"] == contender and "skipped" in r}
        shown = f"{contender} ({'; '.join(sorted(reasons))})" if reasons else contender
        lines.append("| " + " | ".join([shown, *cells]) + " |")
    return "\n".join(lines) + "\n"


def _threads(row: dict[str, Any]) -> str:
    return f"{row['threads']} thread" + ("" if row["threads"] == 1 else "s")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _milliseconds(row: dict[str, Any]) -> float:
    return float(row["median_ms"])


def _thousand_views(row: dict[str, Any]) -> str:
    return _rate(row, row["views"])


def _rate(row: dict[str, Any], count: float) -> str:
    """How many a millisecond: the median, and the quartiles if they are shown."""
    median = _number(count / row["median_ms"])
    if "low_ms" not in row:
        return median
    return f"{median} ({_number(count / row['high_ms'])} to {_number(count / row['low_ms'])})"


def _of_quartiles(rows: list[dict[str, Any]]) -> str:
    return " (quartiles)" if any("low_ms" in row for row in rows) else ""


def _size_and_threads(row: dict[str, Any]) -> str:
    return f"{row['size']} px, {row['batch']} + {row['batch']}, {_threads(row)}"


def augment_tables(content: dict[str, Any]) -> list[tuple[str, str]]:
    """A table per policy."""
    rows = content["rows"]
    return [
        (
            f"Thousand views/s{_of_quartiles(rows)}: {policy}, normalise",
            pivot(
                [row for row in rows if row["policy"] == policy],
                _size_and_threads,
                _thousand_views,
                "views",
                _milliseconds,
            ),
        )
        for policy in dict.fromkeys(row["policy"] for row in rows)
    ]


def batch_tables(content: dict[str, Any]) -> list[tuple[str, str]]:
    """Rates, page faults, launches, and the share of a training step."""
    rows = content["rows"]
    timed = [row for row in rows if row["case"].startswith("batch")]
    measured = [row for row in timed if "faults_per_batch" in row]
    counted = [row for row in rows if row["case"].startswith("launches")]
    steps = [row for row in rows if row["case"].startswith("training step")]
    faults = [row for row in measured if row["threads"] == content["threads"][0]]
    parts = [
        (
            f"Thousand views/s{_of_quartiles(rows)}, from uint8 in a data set to the mixed batch",
            pivot(timed, _size_and_threads, _thousand_views, "batches", _milliseconds),
        )
    ]
    if faults:
        table = pivot(
            faults, _size_and_threads, lambda row: _number(row["faults_per_batch"]), "batches"
        )
        parts.append(("Minor page faults per batch", table))
    return [
        *parts,
        (
            "Launches and copies to the device per batch"
            + ("" if content["gpu"] else ", counted on a fake device"),
            pivot(counted, lambda row: row["case"].split(": ")[-1], _counts, "batches"),
        ),
        (
            f"The builder in a {steps[0]['case']}",
            pivot(
                steps,
                _threads,
                lambda row: f"{_number(row['median_ms'])} ms ({row['share_percent']:.3g} %)",
                "part",
            ),
        ),
    ]


def _counts(row: dict[str, Any]) -> str:
    waits = row.get("synchronisations", row.get("device_reads"))
    kind = "waits" if "synchronisations" in row else "reads of the device"
    return f"{row['launches']} launches, {row['copies_to_device']} copies, {waits} {kind}"


def loader_tables(content: dict[str, Any]) -> list[tuple[str, str]]:
    """Images per second by loader."""
    table = pivot(
        content["rows"],
        lambda row: row["case"],
        lambda row: _rate(row, 2e3 * row["batch"]),
        "loader",
        _milliseconds,
    )
    return [(f"Images/s{_of_quartiles(content['rows'])}, decoded and augmented", table)]


def scaling_tables(content: dict[str, Any]) -> list[tuple[str, str]]:
    """A table per sweep: time and memory."""
    rows = content["rows"]
    return [
        (
            f"Milliseconds (and MB) per batch by {title}, {_threads(rows[0])}",
            pivot(
                [row for row in rows if row["sweep"] == sweep],
                lambda row: str(row["at"]),
                lambda row: f"{_number(row['median_ms'])} ({_number(row['peak_mb'])})",
                title,
                _milliseconds,
            ),
        )
        for sweep, title in SWEEP_TITLES.items()
    ]


def ops_tables(content: dict[str, Any]) -> list[tuple[str, str]]:
    """Operations below each other, implementations beside each other; then the goals."""
    rows = [row for row in content["rows"] if row["threads"] == content["threads"][-1]]
    timed = [row for row in rows if "copy_percent" in row or "skipped" in row]
    names = list(dict.fromkeys(row["contender"] for row in timed))
    turned = [row | {"contender": row["case"], "column": row["contender"]} for row in timed]
    turned.sort(key=lambda row: names.index(row["column"]))
    parts = [
        (
            f"Microseconds (and the rate in % of a copy of as many bytes), {_threads(rows[0])}",
            pivot(
                turned,
                lambda row: row["column"],
                lambda row: f"{_number(1e3 * row['median_ms'])} ({row['copy_percent']:.3g})",
                "operation",
            ),
        )
    ]
    goals = [row for row in rows if "goal" in row]
    if goals:
        lines = ["| goal | measured | wanted | |", "|---|---|---|---|"]
        for row in goals:
            values = f"{_number(row['value'])} | {_number(row['goal'])} | {row['note']}"
            lines.append(f"| {row['contender']} | {values} |")
        parts.append(("Goals of the fused path", "\n".join(lines) + "\n"))
    return parts


SWEEP_TITLES = {
    "batch": "batch size",
    "size": "image size",
    "views": "views per image",
    "classes": "classes",
}
SUITE_TABLES: dict[str, Callable[[dict[str, Any]], list[tuple[str, str]]]] = {
    "augment": augment_tables,
    "batch": batch_tables,
    "loader": loader_tables,
    "scaling": scaling_tables,
    "ops": ops_tables,
}


# Plots: on a light ground of their own, so that they read on a dark page too

GROUND = "#ffffff"
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")


def draw_bars(content: dict[str, Any], path: Path) -> None:
    """Rates of contenders as horizontal bars, a panel per case, at the greatest thread count."""
    rows = [row for row in content["rows"] if "views_per_s" in row]
    most = max(row["threads"] for row in rows)
    rows = [row for row in rows if row["threads"] == most]
    by_case = {
        case: sorted(
            (row for row in rows if row["case"] == case), key=lambda row: row["views_per_s"]
        )
        for case in dict.fromkeys(row["case"] for row in rows)
    }
    figure, axes = _figure(len(by_case), max(map(len, by_case.values())))
    for axis, (case, ranked) in zip(axes, by_case.items(), strict=False):
        names = [row["contender"] for row in ranked]
        colours = [_colour(name) for name in names]
        rates = [row["views_per_s"] / 1e3 for row in ranked]
        axis.barh(names, rates, color=colours)
        for number, rate in enumerate(rates):
            axis.annotate(
                f" {_number(rate)}", (rate, number), va="center", fontsize=8, color="black"
            )
        axis.set_xlim(0, max(rates) * 1.15)
        axis.set_title(case, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.set_xlabel("thousand views/s; blue: this package", fontsize=8)
    _save(figure, axes[len(by_case) :], f"{_machine(content)}, {_threads(rows[0])}", path)


def draw_sweeps(content: dict[str, Any], path: Path) -> None:
    """Time against what grows, a panel per sweep."""
    from matplotlib.ticker import LogLocator, NullLocator

    rows = [row for row in content["rows"] if "median_ms" in row]
    figure, axes = _figure(len(SWEEP_TITLES), 8)
    for axis, (sweep, title) in zip(axes, SWEEP_TITLES.items(), strict=False):
        of_sweep = [row for row in rows if row["sweep"] == sweep]
        for number, name in enumerate(dict.fromkeys(row["contender"] for row in of_sweep)):
            line = [row for row in of_sweep if row["contender"] == name]
            colour = COLOURS[number % len(COLOURS)]
            places = [row["at"] for row in line]
            axis.plot(
                places, [row["median_ms"] for row in line], marker="o", color=colour, label=name
            )
            axis.fill_between(
                places,
                [row["low_ms"] for row in line],
                [row["high_ms"] for row in line],
                color=colour,
                alpha=0.2,
            )
        axis.set(xscale="log", yscale="log", xlabel=title, ylabel="ms per batch")
        measured_at = sorted({row["at"] for row in of_sweep})
        axis.set_xticks(measured_at, list(map(str, measured_at)))
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(lambda value, _: _number(value))
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    _save(figure, axes[len(SWEEP_TITLES) :], f"{_machine(content)}, {_threads(rows[0])}", path)


def _colour(name: str) -> str:
    """Blue is ours, orange is theirs, grey is a bound."""
    if name == "ideal loader":
        return "#999999"
    ours = ("ours", "SemiSupervisedLoader", "ResidentLoader", "DaliLoader")
    return COLOURS[0 if name.startswith(ours) else 1]


def _figure(panels: int, lines: int) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(2, panels)
    rows = -(-panels // columns)
    size = (7.0 * columns, rows * (1.0 + 0.26 * lines))
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False)
    figure.set_facecolor(GROUND)
    for axis in axes.flat:
        axis.set_facecolor(GROUND)
    return figure, list(axes.flat)


def _save(figure: Any, unused: list[Any], title: str, path: Path) -> None:
    from matplotlib import pyplot

    for axis in unused:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110, facecolor=GROUND, transparent=False)
    pyplot.close(figure)


PLOTS: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "augment": draw_bars,
    "batch": draw_bars,
    "loader": draw_bars,
    "scaling": draw_sweeps,
}


def draw_all(folder: Path) -> list[Path]:
    """Draw a PNG beside each suite's results in a folder."""
    drawn = []
    for suite, draw in PLOTS.items():
        for file in sorted(folder.glob(f"{suite}--*.json")):
            drawn.append(file.with_suffix(".png"))
            draw(schema.load(file), drawn[-1])
    return drawn


def rendered(readme: str, folder: Path = ROOT) -> str:
    """A document that lies in ``folder``, with every marked part written anew."""

    def fill(match: re.Match[str]) -> str:
        files = sorted(RESULTS.glob(f"{match['name']}--*.json"))
        if not files:
            raise FileNotFoundError(f"no results {match['name']}--*.json in {RESULTS}")
        tables = []
        for file in files:
            content = json.loads(file.read_text())
            if "suite" in content:
                brief = match["brief"] is not None
                tables.append(suite_part(schema.load(file), file, folder, brief=brief))
            else:
                tables.append(speeds(content) if "columns" in content else table(content))
        return match[1] + "\n".join(tables) + match[5]

    return MARKED.sub(fill, readme)


def main() -> None:
    """Rewrite README, or check it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if stale")
    parser.add_argument("--draw", type=Path, help="only draw the plots of this folder")
    arguments = parser.parse_args()
    if arguments.draw:
        for picture in draw_all(arguments.draw):
            print(f"wrote {picture}")
        return
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
