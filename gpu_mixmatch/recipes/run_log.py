"""What a run writes: its configuration, metrics, checkpoint, TensorBoard's events and curves."""

import json
from pathlib import Path
from typing import Any

from gpu_mixmatch._extras import need
from gpu_mixmatch.recipes import plots
from gpu_mixmatch.recipes.checkpoint import write_atomically, write_checkpoint


class MetricsLog:
    """Write a run's files: each evaluation as it comes, and the curves at the end.

    Args:
        out: Folder of the run; made if it does not exist.
        config: What ``config.json`` says.
        metrics: Of all evaluations so far; the list itself is kept, and each `write` reads it.
        step: The step that the run goes on from.
        tested_on: "test" or "labelled", the images that errors are measured on.

    Raises:
        ImportError: If TensorBoard is not installed.
    """

    def __init__(
        self,
        out: Path,
        config: dict[str, Any],
        metrics: list[dict[str, float]],
        step: int,
        tested_on: str,
    ) -> None:
        need("tensorboard", "the log of a run")
        from torch.utils.tensorboard import SummaryWriter

        self.out = out
        self.metrics = metrics  # the checkpoint holds them too, so that the two agree
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        self._write_metrics()
        self.writer = SummaryWriter(str(out), purge_step=step + 1)
        self.tested_on = tested_on

    def write(self, state: dict[str, Any]) -> None:
        """Write the latest metrics, then the checkpoint that they belong to."""
        latest = self.metrics[-1]
        step = int(latest["step"])
        for name, value in latest.items():
            if name != "step":
                self.writer.add_scalar(name, value, step)
        self._write_metrics()
        write_checkpoint(state, self.out / "checkpoint.pt")

    def close(self) -> None:
        """Finish the events and draw the curves."""
        self.writer.close()
        draw_curves({self.out.name: self.metrics}, self.out / "curves.png", self.tested_on)

    def _write_metrics(self) -> None:
        lines = "".join(json.dumps(entry) + "\n" for entry in self.metrics)
        write_atomically(self.out / "metrics.jsonl", lines.encode())


def draw_curves(
    runs: dict[str, list[dict[str, float]]], path: Path, tested_on: str = "test"
) -> Path:
    """Draw error and losses over the steps of some runs as a PNG."""
    ends = [f"{metrics[-1]['error']:.2f} %" for metrics in runs.values()]
    headline = f"{tested_on.capitalize()} error after the last step: {', '.join(ends)}"
    with plots.picture(path, 11, 4.4, headline) as figure:
        left, right = figure.subplots(1, 2)
        losses = [("loss_x", "cross-entropy on X'"), ("loss_u", "squared error on U'")]
        for name, metrics in runs.items():
            steps = [entry["step"] for entry in metrics]
            left.plot(steps, [entry["error"] for entry in metrics], marker="o", ms=3, label=name)
            for key, label in losses if "loss_x" in metrics[0] else [("loss", "cross-entropy")]:
                right.plot(steps, [entry[key] for entry in metrics], marker="o", ms=3, label=label)
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
