"""Compare runs over seeds: the paper's ablation, MixMatch with supervised training, methods."""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpu_mixmatch._machine import header
from gpu_mixmatch.recipes import plots
from gpu_mixmatch.recipes.checkpoint import write_atomically
from gpu_mixmatch.recipes.train import DivergenceError, Summary, TrainConfig, TrainRun, train


class Row(NamedTuple):
    """One configuration of a comparison.

    Attributes:
        key: Its name on the command line.
        label: Its name in tables.
        changes: Fields of `TrainConfig` that differ from the common ones.
        paper: The paper's CIFAR-10 error at 250 and at 4000 labels in percent, if it has one.
    """

    key: str
    label: str
    changes: dict[str, Any]
    paper: tuple[float, float] | None = None


def _builder(**changes: Any) -> dict[str, Any]:
    return {"builder": changes}


SUPERVISED = Row("supervised", "supervised only", {"supervised": True})
FULL = Row("full", "MixMatch", {}, (11.80, 6.00))
# Berthelot et al. 2019, table 4, in its order
ABLATION = (
    FULL,
    Row("k1", "no averaging (K = 1)", _builder(num_augmentations=1), (17.09, 8.06)),
    Row("k3", "K = 3", _builder(num_augmentations=3), (11.55, 6.23)),
    Row("k4", "K = 4", _builder(num_augmentations=4), (12.45, 5.88)),
    Row("t1", "no sharpening (T = 1)", _builder(temperature=1.0), (27.83, 10.59)),
    Row("ema", "guess with the averaged model", {"ema_teacher": True}, (11.86, 6.47)),
    Row("none", "no MixUp", _builder(mix="none"), (39.11, 10.97)),
    Row("labelled", "MixUp on labelled only", _builder(mix="labelled"), (32.16, 9.22)),
    Row("unlabelled", "MixUp on unlabelled only", _builder(mix="unlabelled"), (12.35, 6.83)),
    Row("separate", "MixUp on each separately", _builder(mix="separate"), (12.26, 6.50)),
    # another method, which has no ports of MixMatch among its presets
    Row("ict", "ICT", {"method": "ict", "preset": "fast"}, (38.60, 6.81)),
)


class Result(NamedTuple):
    """A row's test errors in percent, one per seed, after the last step, and how its runs ended."""

    row: Row
    errors: list[float]
    summaries: Sequence[Summary] = ()

    @property
    def mean(self) -> float:
        """Mean over the seeds, in percent."""
        return statistics.fmean(self.errors)

    @property
    def deviation(self) -> float:
        """Sample standard deviation over the seeds, in percent; 0 for one seed."""
        return statistics.stdev(self.errors) if len(self.errors) > 1 else 0.0


def compare(
    config: TrainConfig,
    rows: Sequence[Row],
    seeds: Sequence[int],
    *,
    out: Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
    on_run: Callable[[Row, int], None] | None = None,
    on_start: Callable[[TrainRun], None] | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> list[Result]:
    """Train every row with every seed on the same data set.

    Args:
        config: What the rows have in common.
        rows: What differs.
        seeds: Seeds of weights, labelled subset, order and draws.
        out: Folder of the runs, each in one of its own, ROW-SEED. A run that is there goes on from
            its checkpoint, or is taken as it is if it has ended; its configuration and data must be
            the same. None writes nothing.
        clock: What seconds are read from.
        on_run: Called before each run.
        on_start: Called before the first step of each run.
        on_step: Called after each step of each run.

    Returns:
        A result per row, in order.

    Raises:
        ValueError: If there are no rows or no seeds.
    """
    if not rows or not seeds:
        raise ValueError(
            f"rows and seeds must not be empty, got {len(rows)} rows and {len(seeds)} seeds"
        )
    data = config.load()
    results = []
    for row in rows:
        summaries = []
        for seed in seeds:
            if on_run:
                on_run(row, seed)
            changes = {**row.changes, "seed": seed}
            changes["builder"] = {**config.builder, **row.changes.get("builder", {})}
            run = dataclasses.replace(config, **changes)
            folder = None if out is None else out / f"{row.key}-{seed}"
            try:
                summary = train(
                    run,
                    folder,
                    resume=True,
                    data=data,
                    clock=clock,
                    on_start=on_start,
                    on_step=on_step,
                )
            except (ValueError, DivergenceError) as error:
                error.add_note(f"{row.label}, seed {seed}")
                raise
            summaries.append(summary)
        results.append(Result(row, [summary.error for summary in summaries], summaries))
    return results


def choose_rows(keys: str | None) -> list[Row]:
    """Return rows of the ablation by their keys, comma-separated; None returns all of them.

    Raises:
        ValueError: If a key is unknown.
    """
    by_key = {row.key: row for row in (*ABLATION, SUPERVISED)}
    if keys is None:
        return list(ABLATION)
    wanted = [key.strip() for key in keys.split(",")]
    unknown = [key for key in wanted if key not in by_key]
    if unknown:
        raise ValueError(f"rows must be among {list(by_key)}, got {unknown}")
    return [by_key[key] for key in wanted]


def save_results(
    results: Sequence[Result],
    config: TrainConfig,
    seeds: Sequence[int],
    command: str,
    path: Path,
    more: Callable[[Result], dict[str, Any]] = lambda result: {},
) -> Path:
    """Write results as JSON, with the command, the machine and the versions.

    The form is that of all results of the project: a header, and rows that name their case and
    contender.

    Args:
        results: What `compare` returned.
        config: What it was given.
        seeds: What it was given, too.
        command: That led here.
        path: "demo.json", "ablation.json" or "compare.json" in a folder: its stem is the name of
            the suite.
        more: Returns what else is said of a result.
    """
    common = dataclasses.asdict(config)
    for name in ("seed", "supervised", "root"):
        del common[name]
    threads = torch.get_num_threads()
    labels = "all" if config.labels is None else config.labels
    content = {
        **header(path.stem, command, torch.device(config.device), [threads]),
        "config": common,
        "seeds": list(seeds),
        "rows": [
            {
                "case": f"{config.dataset}, {labels} labels",
                "contender": result.row.label,
                "threads": threads,
                "note": "",
                "key": result.row.key,
                "errors": result.errors,
                "mean": round(result.mean, 3),
                "deviation": round(result.deviation, 3),
                "paper": result.row.paper,
                **more(result),
            }
            for result in results
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
    write_atomically(path, (text + "\n").encode())
    return path


def headline(results: Sequence[Result]) -> str:
    """Say what a comparison found: MixMatch, and what is furthest from it."""
    by_key = {result.row.key: result for result in results}
    full = by_key.get(FULL.key)
    others = [result for result in results if result is not full]
    if full is None or not others:
        return ", ".join(f"{result.row.label}: {result.mean:.2f} %" for result in results)
    if len(others) == 1:
        (other,) = others
        return f"Test error: MixMatch {full.mean:.2f} %, {other.row.label} {other.mean:.2f} %"
    worst = max(others, key=lambda result: result.mean)
    found = f"MixMatch {full.mean:.2f} %, the worst row {worst.mean:.2f} %: {worst.row.label}"
    return f"Test error: {found}"


def draw_bars(
    results: Sequence[Result], title: str, path: Path, *, with_paper: bool = False
) -> Path:
    """Draw errors as bars, and the paper's own beside them if asked for."""
    width, height = (12.0 if with_paper else 8.0), 1.8 + 0.42 * len(results)
    with plots.picture(path, width, height, headline(results)) as figure:
        panels = figure.subplots(1, 2 if with_paper else 1, sharey=True, squeeze=False)[0]
        _draw_ours(panels[0], results)
        several = any(len(result.errors) > 1 for result in results)
        panels[0].set_title(f"{title}: mean ± sd, and each seed" if several else title)
        if with_paper:
            _draw_papers(panels[1], results)
        for panel in panels:
            panel.set_xlabel("test error in %")
            panel.margins(x=0.16)
            panel.set_xlim(left=0)
            panel.grid(axis="x")
    return path


def _draw_ours(panel: Any, results: Sequence[Result]) -> None:
    for place, result in enumerate(results):
        colour = plots.THEIRS if result.row.key == SUPERVISED.key else plots.OURS
        panel.barh(place, result.mean, height=0.6, color=colour)
        if result.deviation:
            panel.errorbar(result.mean, place, xerr=result.deviation, ecolor=plots.INK)
        panel.plot(
            result.errors, [place] * len(result.errors), "o", ms=4, mfc="white", mec=plots.INK
        )
        panel.annotate(
            f"{result.mean:.2f}",
            (max(result.mean + result.deviation, *result.errors), place),
            textcoords="offset points",
            xytext=(6, 0),
            va="center",
        )
    panel.set_yticks(range(len(results)), [result.row.label for result in results])
    panel.invert_yaxis()


def _draw_papers(panel: Any, results: Sequence[Result]) -> None:
    for offset, column, label, colour in (
        (-0.2, 0, "250 labels", plots.THEIRS),
        (0.2, 1, "4000 labels", plots.THIRD),
    ):
        values = [(result.row.paper or (0.0, 0.0))[column] for result in results]
        places = [place + offset for place in range(len(results))]
        bars = panel.barh(places, values, height=0.38, label=label, color=colour)
        panel.bar_label(bars, fmt=lambda value: f"{value:.2f}" if value else "", padding=4)
    panel.set_title("the paper's: CIFAR-10, WRN-28-2, one split")
    panel.legend(loc="upper right")
