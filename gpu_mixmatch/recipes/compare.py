"""Compare the methods at equal labels, steps, network and seeds: errors over steps and seconds."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_mixmatch.recipes import plots
from gpu_mixmatch.recipes.ablate import SUPERVISED, Result, Row, save_results
from gpu_mixmatch.recipes.train import TrainConfig, resolved

NAMES = {
    "mixmatch": "MixMatch",
    "remixmatch": "ReMixMatch",
    "fixmatch": "FixMatch",
    "uda": "UDA",
    "flexmatch": "FlexMatch",
    "freematch": "FreeMatch",
    "softmatch": "SoftMatch",
    "mean_teacher": "mean teachers",
    "pi_model": "Π-model",
    "ict": "ICT",
}
ROWS = (SUPERVISED, *(Row(key, name, {"method": key}) for key, name in NAMES.items()))
_DASHES = ("-", "--", "-.", ":")


def choose_methods(keys: str | None) -> list[Row]:
    """Return rows by their keys, comma-separated; None returns all, supervised training first.

    Raises:
        ValueError: If a key is unknown, or given twice.
    """
    by_key = {row.key: row for row in ROWS}
    if keys is None:
        return list(ROWS)
    wanted = [key.strip() for key in keys.split(",")]
    unknown = [key for key in wanted if key not in by_key]
    if unknown:
        raise ValueError(f"methods must be among {list(by_key)}, got {unknown}")
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"methods must each be given once, got {wanted}")
    return [by_key[key] for key in wanted]


def mean_seconds(result: Result) -> float:
    """Return the mean duration of a row's runs, without evaluations, in seconds."""
    return statistics.fmean(summary.seconds for summary in result.summaries)


def described(result: Result, config: TrainConfig) -> dict[str, Any]:
    """Return what a file of results says of a row beside its errors: its settings and curves.

    Lists of "curves" have an entry for each evaluation that all seeds have, and one in it for each
    seed; "kept", "mean_weight" and "confidence" are those of the last, a mean over the seeds.
    """
    run = resolved(dataclasses.replace(config, **result.row.changes))
    by_step = [{entry["step"]: entry for entry in summary.metrics} for summary in result.summaries]
    shared = [step for step in by_step[0] if all(step in entries for entries in by_step)]
    evaluations = [[entries[step] for entries in by_step] for step in shared]
    last = evaluations[-1]
    means = {
        name: round(statistics.fmean(entry[name] for entry in last), 4)
        for name in ("kept", "mean_weight", "confidence")
        if all(name in entry for entry in last)
    }
    settings = {
        name: getattr(run, name)
        for name in ("ratio", "guess", "lambda_u", "rampup_steps", "ema_decay", "builder")
    }
    return {
        "settings": {} if run.supervised else settings,
        "seconds": [round(summary.seconds, 2) for summary in result.summaries],
        **means,
        "curves": {
            "steps": [int(entries[0]["step"]) for entries in evaluations],
            "errors": [[round(entry["error"], 3) for entry in entries] for entries in evaluations],
            "seconds": [
                [round(entry["seconds"], 2) for entry in entries] for entries in evaluations
            ],
        },
    }


def save_comparison(
    results: Sequence[Result], config: TrainConfig, seeds: Sequence[int], command: str, path: Path
) -> Path:
    """Write results as JSON, in the form of `save_results` and with what `described` says."""
    return save_results(
        results, config, seeds, command, path, lambda result: described(result, config)
    )


def headline(means: dict[str, float]) -> str:
    """Say which row has the least error, and beside it supervised training.

    Args:
        means: Mean errors in percent by the names of the rows.
    """
    best = min(means, key=lambda name: means[name])
    text = f"Least test error: {best}, {means[best]:.2f} %"
    if SUPERVISED.label in means and best != SUPERVISED.label:
        text += f"; {SUPERVISED.label} {means[SUPERVISED.label]:.2f} %"
    return text


def draw_comparison(rows: Sequence[dict[str, Any]], title: str, path: Path) -> Path:
    """Draw test errors over steps and over seconds, a line per row: means over the seeds.

    Args:
        rows: As a file of results has them: "contender", "mean" and "curves".
        title: Of the data set and the runs.
        path: The PNG.
    """
    means = {row["contender"]: row["mean"] for row in rows}
    best = max(2 * min(means.values()), 1.25 * max(means.values()))
    with plots.picture(path, 12.0, 5.4, headline(means)) as figure:
        by_steps, by_seconds = panels = figure.subplots(1, 2, sharey=True)
        for number, row in enumerate(rows):
            curves = row["curves"]
            errors = [statistics.fmean(of_seeds) for of_seeds in curves["errors"]]
            seconds = [statistics.fmean(of_seeds) for of_seeds in curves["seconds"]]
            supervised = row.get("key") == SUPERVISED.key
            style: dict[str, Any] = {
                "color": plots.INK if supervised else plots.MANY[number % len(plots.MANY)],
                "linestyle": _DASHES[number // len(plots.MANY) % len(_DASHES)],
                "label": f"{row['contender']} {row['mean']:.2f} %",
            }
            by_steps.plot(curves["steps"], errors, **style)
            by_seconds.plot(seconds, errors, **style)
            by_seconds.plot(seconds[-1:], errors[-1:], "o", ms=4, color=style["color"])
        by_steps.set(title=title, xlabel="step", ylabel="test error in %")
        by_seconds.set(title="the same, by what they take", xlabel="seconds, without evaluations")
        for panel in panels:
            panel.set_ylim(0, min(100.0, best))
            panel.grid()
        by_seconds.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0)
    return path
