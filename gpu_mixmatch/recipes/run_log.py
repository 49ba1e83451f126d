"""What a run writes: its configuration, metrics, checkpoint, TensorBoard's events and curves."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu_mixmatch._extras import need
from gpu_mixmatch.recipes import plots
from gpu_mixmatch.recipes.checkpoint import (
    cannot_write,
    check_writable,
    write_atomically,
    write_checkpoint,
)


class MetricsLog:
    """Write a run's files: each evaluation as it comes, and the curves at the end.

    Whatever the end needs is looked for at once. The first file is written with the first
    evaluation, so that a run that fails at its start leaves nothing behind.

    Args:
        out: Folder of the run; made if it does not exist.
        config: What ``config.json`` says.
        metrics: Of all evaluations so far; the list itself is kept, and each `write` reads it.
        step: The step that the run goes on from.
        tested_on: "test" or "labelled", the images that errors are measured on.
        size: Bytes of a checkpoint. While it is written, the one before it is there as well.
        skipped: Files that were left out, and why, for ``skipped.txt``.

    Raises:
        ImportError: If TensorBoard or matplotlib is not installed.
        OSError: If ``out`` cannot be written to, or its disk is too full.
    """

    def __init__(
        self,
        out: Path,
        config: dict[str, Any],
        metrics: list[dict[str, float]],
        step: int,
        tested_on: str,
        size: int = 0,
        skipped: Mapping[str, str] | None = None,
    ) -> None:
        check_tools()
        check_writable(out, 2 * size)
        self.out = out
        self.config = config
        self.metrics = metrics  # the checkpoint holds them too, so that the two agree
        self.step = step
        self.tested_on = tested_on
        self.size = size
        self.skipped = skipped or {}
        self.writer: Any = None

    def write(self, state: dict[str, Any]) -> None:
        """Write the latest metrics, then the checkpoint that they belong to.

        Raises:
            OSError: If a file cannot be written; the message names it and the room on its disk.
        """
        self._begin()
        check_writable(self.out, self.size)
        latest = self.metrics[-1]
        step = int(latest["step"])
        try:
            for name, value in latest.items():
                if name != "step":
                    self.writer.add_scalar(name, value, step)
            self.writer.flush()
        except OSError as error:
            raise cannot_write(self.out / "events.out.tfevents", error) from error
        self._write_metrics()
        write_checkpoint(state, self.out / "checkpoint.pt")

    def close(self) -> None:
        """Finish the events and draw the curves."""
        self._begin()
        self.writer.close()
        draw_curves({self.out.name: self.metrics}, self.out / "curves.png", self.tested_on)

    def _begin(self) -> None:
        if self.writer is not None:
            return
        from torch.utils.tensorboard import SummaryWriter

        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self.out, error) from error
        text = json.dumps(self.config, indent=2, allow_nan=False)
        write_atomically(self.out / "config.json", (text + "\n").encode())
        self._write_metrics()
        if self.skipped:
            listed = "".join(f"{_in_line(name)}\t{why}\n" for name, why in self.skipped.items())
            content = listed.encode("utf-8", "surrogateescape")
            write_atomically(self.out / "skipped.txt", content)
        try:
            self.writer = SummaryWriter(str(self.out), purge_step=self.step + 1)
        except OSError as error:
            raise cannot_write(self.out / "events.out.tfevents", error) from error

    def _write_metrics(self) -> None:
        lines = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in self.metrics)
        write_atomically(self.out / "metrics.jsonl", lines.encode())


def _losses_of(metrics: Mapping[str, float]) -> dict[str, str]:
    """Return the parts of a loss among metrics, and how the curves call them."""
    if "loss_x" not in metrics:
        return {"loss": "cross-entropy"}
    if "loss_kl" in metrics:
        return {
            "loss_x": "cross-entropy on X'",
            "loss_u": "on the other mixed rows",
            "loss_kl": "on the un-mixed rows",
        }
    if "kept" in metrics:
        return {"loss_x": "cross-entropy on x", "loss_u": "loss of u"}
    return {"loss_x": "cross-entropy on X'", "loss_u": "squared error on U'"}


def _in_line(name: str) -> str:
    return name.translate({ord(character): repr(character)[1:-1] for character in "\t\r\n"})


def check_tools() -> None:
    """Raise an ImportError if what logs and draws a run is not installed."""
    need("tensorboard", "the log of a run")
    need("matplotlib.figure", "the curves of a run")


def draw_curves(
    runs: dict[str, list[dict[str, float]]], path: Path, tested_on: str = "test"
) -> Path:
    """Draw error and losses over the steps of some runs as a PNG."""
    ends = [f"{metrics[-1]['error']:.2f} %" for metrics in runs.values()]
    headline = f"{tested_on.capitalize()} error after the last step: {', '.join(ends)}"
    with plots.picture(path, 11, 4.4, headline) as figure:
        left, right = figure.subplots(1, 2)
        for name, metrics in runs.items():
            steps = [entry["step"] for entry in metrics]
            left.plot(steps, [entry["error"] for entry in metrics], marker="o", ms=3, label=name)
            for key, label in _losses_of(metrics[0]).items():
                values = [entry[key] for entry in metrics]
                if max(values) > 0:  # a part that is off has no place on a logarithmic axis
                    right.plot(steps, values, marker="o", ms=3, label=label)
            last = metrics[-1]
            left.annotate(
                f"{last['error']:.1f} %",
                (last["step"], last["error"]),
                textcoords="offset points",
                xytext=(-4, 8),
                ha="right",
            )
        left.set_title(f"averaged weights on the {tested_on} images")
        left.set(xlabel="step", ylabel=f"{tested_on} error in %")
        left.set_ylim(bottom=0)
        right.set_title("losses of the evaluated steps")
        right.set(xlabel="step", ylabel="loss", yscale="log")
        for axes in (left, right):
            axes.grid()
            axes.legend()
    return path
