"""Compare runs over seeds: the paper's ablation, and MixMatch with supervised training."""

import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpu_mixmatch.data.datasets import load_dataset
from gpu_mixmatch.recipes.run_log import write_atomically
from gpu_mixmatch.recipes.train import Summary, TrainConfig, train


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
# Berthelot et al. 2019, table 4, in its order; ICT, its last row, is another algorithm
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
)


class Result(NamedTuple):
    """A row's test errors in percent, one per seed, after the last step."""

    row: Row
    errors: list[float]

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
    on_run: Callable[[Row, int], None] | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> list[Result]:
    """Train every row with every seed on the same data set.

    Args:
        config: What the rows have in common.
        rows: What differs.
        seeds: Seeds of weights, labelled subset, order and draws.
        on_run: Called before each run.
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
    data = load_dataset(config.dataset, config.root, config.size)
    results = []
    for row in rows:
        errors = []
        for seed in seeds:
            if on_run:
                on_run(row, seed)
            changes = {**row.changes, "seed": seed}
            changes["builder"] = {**config.builder, **row.changes.get("builder", {})}
            run = dataclasses.replace(config, **changes)
            summary: Summary = train(run, data=data, on_step=on_step)
            errors.append(summary.error)
        results.append(Result(row, errors))
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
    results: Sequence[Result], config: TrainConfig, seeds: Sequence[int], command: str, path: Path
) -> Path:
    """Write results as JSON, with the command and the versions that produced them."""
    from gpu_mixmatch import __version__

    common = dataclasses.asdict(config)
    for name in ("seed", "supervised", "root"):
        del common[name]
    content = {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "device": _device_name(config.device),
        "versions": {
            "gpu_mixmatch": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "config": common,
        "seeds": list(seeds),
        "rows": [
            {
                "key": result.row.key,
                "label": result.row.label,
                "errors": result.errors,
                "mean": round(result.mean, 3),
                "deviation": round(result.deviation, 3),
                "paper": result.row.paper,
            }
            for result in results
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
    return path


def draw_bars(
    results: Sequence[Result], title: str, path: Path, *, with_paper: bool = False
) -> Path:
    """Draw errors as bars, and the paper's own beside them if asked for."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "gpu-mixmatch[cli]"') from error
    figure = Figure(figsize=(12 if with_paper else 7.5, 1.6 + 0.42 * len(results)))
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if with_paper else 1, sharey=True, squeeze=False)[0]
    places = range(len(results))
    labels = [result.row.label for result in results]

    means = [result.mean for result in results]
    ours = panels[0]
    deviations = [result.deviation for result in results]
    ours.barh(places, means, xerr=deviations, height=0.6, color="#4477aa", ecolor="#222222")
    for place, result in enumerate(results):
        ours.plot(result.errors, [place] * len(result.errors), "k.", ms=4)
        end = max(result.mean + result.deviation, *result.errors)
        ours.annotate(
            f"{result.mean:.2f}",
            (end, place),
            textcoords="offset points",
            xytext=(6, 0),
            va="center",
        )
    ours.set_title(title)
    ours.set_yticks(list(places), labels)
    ours.invert_yaxis()
    if with_paper:
        theirs = panels[1]
        for offset, column, label, color in (
            (-0.2, 0, "250 labels", "#cc6677"),
            (0.2, 1, "4000 labels", "#ddcc77"),
        ):
            values = [(r.row.paper or (0.0, 0.0))[column] for r in results]
            bars = theirs.barh(
                [place + offset for place in places], values, height=0.38, label=label, color=color
            )
            theirs.bar_label(bars, fmt=lambda value: f"{value:.2f}" if value else "", padding=4)
        theirs.set_title("paper, CIFAR-10, WRN-28-2, one split")
        theirs.legend(loc="lower right")
    for panel in panels:
        panel.set_xlabel("test error in %")
        panel.margins(x=0.16)
        panel.set_xlim(left=0)
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)
    figure.savefig(path, dpi=110)
    return path


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''}"
