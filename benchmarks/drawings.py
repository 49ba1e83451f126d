"""Results as plots, a function per suite: each says in its title what it shows.

Units are those of the tables. Everything that this package offers has one colour, its engines that
call other libraries included.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import schema
from benchmarks.common import Row
from benchmarks.tables import BOUNDS, SWEEP_TITLES, Content, machine_name, number, threads
from gpu_mixmatch.recipes import ablate, compare, plots

OURS = ("ours", "SemiSupervisedLoader", "ResidentLoader", "DaliLoader")
OUR_ENGINES = ("WeakAugment", "DaliAugment", "KorniaAugment")
AXES = {
    "batch": "batch size (labelled images, and as many unlabelled)",
    "size": "image size in px",
    "num_views": "views per unlabelled image",
    "classes": "classes",
}

STYLES = ("o--", "s-", "^-.", "D:")  # of lines, which may share a colour

Rate = Callable[[Row], float]


def is_ours(contender: str) -> bool:
    """Whether a contender is a part of this package."""
    return contender.startswith(OURS) or any(engine in contender for engine in OUR_ENGINES)


def colour(contender: str) -> str:
    """That of this package, of others, or of a bound."""
    if contender in BOUNDS:
        return plots.BOUND
    return plots.OURS if is_ours(contender) else plots.THEIRS


def thousand_views(row: Row) -> float:
    """Thousand views per second, as in the tables."""
    return float(row["num_rows"] / row["median_ms"])


def images(row: Row) -> float:
    """Images per second, as in the table of loaders."""
    return float(2e3 * row["batch"] / row["median_ms"])


def lead(rows: list[Row], rate: Rate) -> float:
    """How many times as fast ours is as the fastest other, both at their best."""
    ours = [rate(row) for row in rows if is_ours(row["contender"])]
    theirs = [rate(row) for row in rows if not is_ours(row["contender"]) and not is_bound(row)]
    return max(ours) / max(theirs)


def is_bound(row: Row) -> bool:
    """Whether a row is no contender, but what none can pass."""
    return row["contender"] in BOUNDS


def timed_rows(content: Content) -> list[Row]:
    """The rows with a rate, at the greatest number of threads."""
    rows = [row for row in content["rows"] if "num_rows" in row and "median_ms" in row]
    most = max(row["threads"] for row in rows)
    return [row for row in rows if row["threads"] == most]


def by(rows: list[Row], field: str) -> dict[Any, list[Row]]:
    """Rows by the value of a field, in their order."""
    values = dict.fromkeys(row[field] for row in rows)
    return {value: [row for row in rows if row[field] == value] for value in values}


# Headlines


def _times(value: float) -> str:
    return f"{value:.1f}×" if value < 10 else f"{value:.0f}×"


def _leads_by_size(rows: list[Row]) -> str:
    leads = {size: _times(lead(found, thousand_views)) for size, found in by(rows, "size").items()}
    (first, factor), *others = leads.items()
    rest = "".join(f", {factor} at {size} px" for size, factor in others)
    return f"{factor} as fast as the best other at {first} px{rest}"


def augment_headline(content: Content) -> str:
    """How far ours is ahead with the first effects."""
    effects, rows = next(iter(by(timed_rows(content), "effects").items()))
    return f"Views, {effects.replace(', ', ' + ')}: {_leads_by_size(rows)}"


def strong_headline(content: Content) -> str:
    """How far ours is ahead with RandAugment."""
    effects, rows = next(iter(by(timed_rows(content), "effects").items()))
    return f"Views with {effects}: {_leads_by_size(rows)}"


def batch_headline(content: Content) -> str:
    """How far ours is ahead."""
    return f"Whole batches: {_leads_by_size(timed_rows(content))}"


def loader_headline(content: Content) -> str:
    """How far ours is ahead on files."""
    files = _from_files(timed_rows(content))
    return f"JPEG files to views: {_times(lead(files, images))} as fast as transforms per sample"


def scaling_headline(content: Content) -> str:
    """How far ours is ahead at the largest batch."""
    rows = [row for row in content["rows"] if row["sweep"] == "batch" and "median_ms" in row]
    size, largest = list(by(rows, "at").items())[-1]
    fastest = min(row["median_ms"] for row in largest if is_ours(row["contender"]))
    headline = f"A batch of {size} + {size} images in {number(fastest)} ms"
    if all(is_ours(row["contender"]) for row in largest):
        return headline
    return f"{headline}: {_times(lead(largest, thousand_views))} as fast as the Kornia loop"


def trained_headline(content: Content) -> str:
    """What was learnt."""
    return ablate.headline(_results(content))


# Plots


def draw_views(content: Content, path: Path) -> None:
    """Thousand views/s, a line of panels for each choice of effects, a panel for each size."""
    rows = timed_rows(content)
    groups = by(rows, "effects") if "effects" in rows[0] else {"": rows}
    columns = max(len(by(group, "size")) for group in groups.values())
    lines = [len(by(group, "contender")) for group in groups.values()]
    height = 0.8 + sum(0.75 + 0.27 * count for count in lines)
    headline = HEADLINES[content["suite"]](content)
    with plots.picture(path, 3.0 + 3.2 * columns, height, headline) as figure:
        grid = figure.subplots(
            len(groups), columns, squeeze=False, sharey="row", height_ratios=[2 + n for n in lines]
        )
        for axes, (effects, group) in zip(grid, groups.items(), strict=True):
            sizes = by(group, "size")
            # one order for the panels of a line: the names stand once
            first = sorted(next(iter(sizes.values())), key=thousand_views)
            names = [row["contender"] for row in first]
            for axis in axes[len(sizes) :]:
                axis.set_visible(False)
            for axis, (size, found) in zip(axes, sizes.items(), strict=False):
                _bars(axis, found, names, thousand_views)
                title = f"{size} px: {_times(lead(found, thousand_views))}"
                axis.set_title(f"{effects}, {title}" if effects else title)
                axis.set_xlabel("thousand views/s")
        _legend(figure, content, "; ×: times as fast as the best other")


def draw_strong_views(content: Content, path: Path) -> None:
    """As `draw_views`, without the variants of ours."""
    rows = content["rows"]
    compared = {row["effects"] for row in rows if row["contender"].startswith("ours")}
    draw_views(content | {"rows": [row for row in rows if row.get("effects") in compared]}, path)


def draw_loaders(content: Content, path: Path) -> None:
    """Images/s, from files in one panel and from memory in the other."""
    rows = timed_rows(content)
    files = _from_files(rows)
    memory = [row for row in rows if row not in files]
    lines = [len(files), len(memory)]
    height = 1.6 + 0.4 * sum(lines)
    with plots.picture(path, 10.5, height, HEADLINES["loader"](content)) as figure:
        axes = figure.subplots(2, 1, height_ratios=[2 + n for n in lines])
        titles = ("JPEG files, decoded and augmented", "images in memory, augmented")
        for axis, title, found in zip(axes, titles, (files, memory), strict=True):
            ranked = sorted(found, key=images)
            _bars(axis, ranked, [row["contender"] for row in ranked], images)
            axis.set_title(title)
            axis.set_xlabel("images/s")
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        _legend(figure, content)


def draw_sweeps(content: Content, path: Path) -> None:
    """Time against what grows, a panel per sweep."""
    from matplotlib.ticker import LogLocator, NullLocator

    rows = [row for row in content["rows"] if "median_ms" in row]
    with plots.picture(path, 11.0, 8.4, scaling_headline(content)) as figure:
        for axis, (sweep, found) in zip(
            figure.subplots(2, 2).flat, by(rows, "sweep").items(), strict=True
        ):
            for style, (name, line) in zip(STYLES, by(found, "contender").items(), strict=False):
                places, low, median, high = (
                    [row[field] for row in line]
                    for field in ("at", "low_ms", "median_ms", "high_ms")
                )
                axis.plot(places, median, style, ms=5, color=colour(name), label=name)
                axis.fill_between(places, low, high, color=colour(name), alpha=0.2, lw=0)
            axis.set(xscale="log", xlabel=AXES[sweep])
            axis.set(ylabel="milliseconds per batch", title=f"by {SWEEP_TITLES[sweep]}")
            measured_at = sorted({row["at"] for row in found})
            axis.set_xticks(measured_at, list(map(str, measured_at)))
            axis.set_xticks([], minor=True)
            times = [row["median_ms"] for row in found]
            if max(times) < 5 * min(times):
                axis.set_ylim(0, 1.3 * max(times))
            else:
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter(lambda value, _: number(value))
            axis.legend(loc="upper left")
            axis.grid()
        figure.supxlabel(f"{machine_name(content)}, {threads(rows[0])}", fontsize=9.5)


def draw_trained(content: Content, path: Path) -> None:
    """Test errors, and the paper's own beside them for an ablation."""
    config, seeds = content["config"], content["seeds"]
    title = f"{content['rows'][0]['case']}, {config['model']}, {len(seeds)} seed"
    title += "s" if len(seeds) > 1 else ""
    with_paper = content["suite"] == "ablation"
    ablate.draw_bars(_results(content), title, path, with_paper=with_paper)


def compared_headline(content: Content) -> str:
    """The method of the least error."""
    return compare.headline({row["contender"]: row["mean"] for row in content["rows"]})


def draw_compared(content: Content, path: Path) -> None:
    """Test errors of methods over steps and over seconds."""
    config = content["config"]
    title = f"{config['dataset']}, {config['labels']} labels, mean of {len(content['seeds'])} seeds"
    compare.draw_comparison(content["rows"], title, path)


def _results(content: Content) -> list[ablate.Result]:
    """The package's own form of the rows."""
    return [
        ablate.Result(ablate.Row(row["key"], row["contender"], {}, row["paper"]), row["errors"])
        for row in content["rows"]
    ]


def _from_files(rows: list[Row]) -> list[Row]:
    in_memory = ("ResidentLoader", *BOUNDS)
    return [row for row in rows if row["contender"] not in in_memory]


def _bars(axis: Any, rows: list[Row], names: list[str], rate: Rate) -> None:
    """A bar for each row, at the place of its contender among ``names``, with its rate."""
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(axis="y", length=0)
    for row in rows:
        axis.barh(names.index(row["contender"]), rate(row), color=colour(row["contender"]))
        axis.annotate(
            number(rate(row)),
            (rate(row), names.index(row["contender"])),
            textcoords="offset points",
            xytext=(4, 0),
            va="center",
            fontsize=9,
        )
    axis.set_xlim(0, max(map(rate, rows)) * 1.18)


def _legend(figure: Any, content: Content, remark: str = "") -> None:
    from matplotlib.patches import Patch

    rows = timed_rows(content)
    handles = [
        Patch(color=plots.OURS, label="this package"),
        Patch(color=plots.THEIRS, label="others"),
    ]
    if any(is_bound(row) for row in rows):
        handles.append(Patch(color=plots.BOUND, label="bound"))
    title = f"medians, {machine_name(content)}, {threads(rows[0])}{remark}"
    figure.legend(handles=handles, loc="outside lower left", ncols=4, title=title, alignment="left")


HEADLINES: dict[str, Callable[[Content], str]] = {
    "augment": augment_headline,
    "strong": strong_headline,
    "batch": batch_headline,
    "loader": loader_headline,
    "scaling": scaling_headline,
    "demo": trained_headline,
    "ablation": trained_headline,
    "compare": compared_headline,
}
DRAWINGS: dict[str, Callable[[Content, Path], None]] = {
    "augment": draw_views,
    "strong": draw_strong_views,
    "batch": draw_views,
    "loader": draw_loaders,
    "scaling": draw_sweeps,
    "demo": draw_trained,
    "ablation": draw_trained,
    "compare": draw_compared,
}


def draw_all(folder: Path) -> list[Path]:
    """Draw a PNG beside each file of results in a folder whose suite has a plot."""
    drawn = []
    for file in sorted(folder.glob("*--*.json")):
        content = schema.load(file)
        if content["suite"] in DRAWINGS:
            drawn.append(file.with_suffix(".png"))
            DRAWINGS[content["suite"]](content, drawn[-1])
    return drawn
