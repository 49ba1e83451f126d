"""The loop behind ``gpu-mixmatch train``, written to be copied.

Every batch is a function of (seed, step), so that a checkpoint holds no loader and no generator: a
run that is killed at any moment and resumed ends with the same weights to the last bit.
"""

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gpu_mixmatch import presets, sampling
from gpu_mixmatch.augment import WeakAugment
from gpu_mixmatch.builder import MixMatch
from gpu_mixmatch.data.datasets import ImageData, load_dataset, split_labels
from gpu_mixmatch.loss import MixMatchLoss
from gpu_mixmatch.recipes.wideresnet import build_model, kernel_parameters

PRESETS = {"paper": presets.paper, "yu1ut": presets.yu1ut, "usb": presets.usb}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on; a checkpoint resumes only under an equal one.

    Attributes:
        dataset: A name that `load_dataset` knows.
        root: Folder of its files; None for digits.
        labels: Number of labelled images, balanced over the classes.
        steps: Length of the run in batches.
        batch_size: B, and M = B.
        model: A name that `build_model` knows.
        preset: "paper", "yu1ut" or "usb"; "fast" is the paper's with one joint guess and one
            forward pass over the whole batch.
        seed: Of the initial weights, the labelled subset, the order and all draws.
        device: Where to train, as torch names it.
        supervised: Train on the labelled images alone, augmented but not mixed.
        lr: Learning rate; None takes the preset's.
        lambda_u: λ_U; None takes the preset's.
        rampup_steps: Of λ_U; None takes the preset's, and at most half of the run.
        ema_decay: Of the evaluated weights; None takes the preset's, and at most 1 - 10 / steps,
            so that a short run forgets its start.
        ema_teacher: Let the averaged model guess.
        builder: Keyword arguments of `MixMatch` that replace the preset's.
        eval_every: Steps between evaluations; 0 takes a twentieth of the run.
    """

    dataset: str = "digits"
    root: str | None = None
    labels: int = 40
    steps: int = 800
    batch_size: int = 64
    model: str = "cnn"
    preset: str = "fast"
    seed: int = 0
    device: str = "cpu"
    supervised: bool = False
    lr: float | None = None
    lambda_u: float | None = None
    rampup_steps: int | None = None
    ema_decay: float | None = None
    ema_teacher: bool = False
    builder: dict[str, Any] = dataclasses.field(default_factory=dict)
    eval_every: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("labels", 1), ("eval_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.preset not in ("fast", *PRESETS):
            raise ValueError(f"preset must be one of {['fast', *PRESETS]}, got {self.preset!r}")


class Summary(NamedTuple):
    """How a run ended.

    Attributes:
        error: Test error of the averaged weights after the last step, in percent.
        median_error: Median of the last 20 evaluations, as the paper reports, in percent.
        best_error: Lowest test error of all evaluations, in percent; chosen with the test set.
        seconds: Duration of the steps, without evaluations, in seconds.
    """

    error: float
    median_error: float
    best_error: float
    seconds: float


class Job:
    """The parts of a run: what a checkpoint saves, and what a step needs."""

    def __init__(self, config: TrainConfig, data: ImageData | None = None) -> None:
        data = data or load_dataset(config.dataset, config.root)
        preset = PRESETS.get(config.preset, presets.paper)(config.dataset)
        self.config = config
        self.preset = preset
        self.device = torch.device(config.device)
        self.labelled = split_labels(
            data.train_labels, config.labels, config.seed, data.num_classes
        )
        self.data = data._replace(
            train_images=data.train_images.to(self.device),
            train_labels=data.train_labels.to(self.device),
            test_images=data.test_images.to(self.device),
            test_labels=data.test_labels.to(self.device),
        )
        channels = data.train_images.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = build_model(config.model, data.num_classes, channels)
        self.model = model.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        decay = config.ema_decay
        if decay is None:
            decay = min(preset.ema_decay, max(0.0, 1 - 10 / config.steps))
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self.ema = AveragedModel(self.model, multi_avg_fn=average)
        self.augment: WeakAugment = preset.augment(channels_last=True).to(self.device)
        builder = dict(preset.builder)
        if config.preset == "fast":
            builder["guess_forward"] = "joint"
        self.mixmatch = MixMatch(
            self.augment,
            data.num_classes,
            teacher=self.ema if config.ema_teacher else None,
            seed=config.seed,
            **{**builder, **config.builder},
        ).to(self.device)
        rampup_steps = config.rampup_steps
        if rampup_steps is None:
            rampup_steps = min(preset.loss["rampup_steps"], config.steps // 2)
        lambda_u = preset.loss["lambda_u"] if config.lambda_u is None else config.lambda_u
        self.criterion = MixMatchLoss(lambda_u, rampup_steps)
        self.kernels = kernel_parameters(self.model)
        self.optimizer = self._optimizer()
        self.step = 0

    def _optimizer(self) -> torch.optim.Optimizer:
        settings = self.preset.optimizer
        lr = settings["lr"] if self.config.lr is None else self.config.lr
        if settings["name"] == "adam":
            return torch.optim.Adam(self.model.parameters(), lr=lr)
        kernels = {id(kernel) for kernel in self.kernels}
        others = [p for p in self.model.parameters() if id(p) not in kernels]
        groups = [
            {"params": self.kernels, "weight_decay": settings["weight_decay"]},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.SGD(
            groups, lr=lr, momentum=settings["momentum"], nesterov=settings["nesterov"]
        )

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels at ``indices``."""
        indices = indices.to(self.device)
        return self.data.train_images[indices], self.data.train_labels[indices]

    def train_step(self) -> dict[str, Tensor]:
        """Take one step; return its losses, still on the device."""
        config, seed = self.config, self.config.seed
        x, y = self.batch(
            self.labelled[stream(seed, self.step, len(self.labelled), config.batch_size, view=0)]
        )
        self.model.train()
        if config.supervised:
            loss = F.cross_entropy(self.model(self.augment(x, seed, self.step)), y)
            losses = {"loss": loss}
        else:
            u, _ = self.batch(
                stream(seed, self.step, len(self.data.train_images), config.batch_size, view=1)
            )
            batch = self.mixmatch(x, y, u, self.model)
            if config.preset == "fast":
                logits = self.model(batch.inputs)
            else:
                logits = self.preset.forward(self.model, batch)
            losses = self.criterion(logits, batch)._asdict()
        self.optimizer.zero_grad()
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        with torch.no_grad():
            for kernel in self.kernels:
                kernel.mul_(1 - self.preset.optimizer.get("decay", 0.0))
        self.ema.update_parameters(self.model)
        self.step += 1
        return {name: value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def test_error(self) -> float:
        """Error of the averaged weights on the test set, in percent."""
        self.ema.eval()
        wrong = torch.zeros((), dtype=torch.int64, device=self.device)
        images, labels = self.data.test_images, self.data.test_labels
        for start in range(0, len(images), 512):
            part = slice(start, start + 512)
            logits = self.ema(self.augment.normalize(images[part]))
            wrong += (logits.argmax(dim=1) != labels[part]).sum()
        self.ema.train()  # a teacher guesses in the mode of the student
        return 100 * int(wrong) / len(images)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, of tensors and plain values."""
        return {
            "config": dataclasses.asdict(self.config),
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "mixmatch": dict(self.mixmatch.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint of the same configuration.

        Raises:
            ValueError: If it is of another configuration; the message lists what differs.
        """
        mine = dataclasses.asdict(self.config)
        theirs = state["config"]
        names = sorted(mine.keys() | theirs.keys())
        different = [
            f"{name}: {theirs.get(name)!r} in the checkpoint, {mine.get(name)!r} now"
            for name in names
            if theirs.get(name) != mine.get(name)
        ]
        if different:
            raise ValueError(
                "the checkpoint must be of the same configuration, got " + "; ".join(different)
            )
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.mixmatch.load_state_dict(state["mixmatch"])


def train(
    config: TrainConfig,
    out: Path | None = None,
    *,
    resume: bool = False,
    data: ImageData | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> Summary:
    """Train a classifier, evaluate it as it goes, and write what happened.

    Args:
        config: What to train.
        out: Folder for ``checkpoint.pt``, ``metrics.jsonl``, TensorBoard's events, ``curves.png``
            and ``config.json``; None writes nothing.
        resume: Continue from the checkpoint in ``out``, or begin if there is none yet.
        data: The data set, if it is loaded already.
        on_step: Called after each step with the number of steps taken and the latest metrics.

    Returns:
        How the run ended.

    Raises:
        ValueError: If ``out`` exists and ``resume`` is not asked for, or its checkpoint is of
            another configuration.
    """
    if out is not None and out.exists() and not resume:
        raise ValueError(
            f"out must be a folder that does not exist yet, got {out}; or use --resume"
        )
    job = Job(config, data)
    log = MetricsLog(out, job) if out is not None else None
    metrics: list[dict[str, float]] = log.metrics if log else []
    eval_every = config.eval_every or max(1, config.steps // 20)
    seconds = metrics[-1]["seconds"] if metrics else 0.0
    began = time.perf_counter()
    while job.step < config.steps:
        losses = job.train_step()
        if job.step % eval_every == 0 or job.step == config.steps:
            values = {name: float(value) for name, value in losses.items()}  # waits for the device
            seconds += time.perf_counter() - began
            metrics.append(
                {"step": job.step, "error": job.test_error(), "seconds": seconds, **values}
            )
            if log:
                log.write(job)
            began = time.perf_counter()
        if on_step:
            on_step(job.step, metrics[-1] if metrics else {})
    errors = [entry["error"] for entry in metrics]
    if log:
        log.close()
    return Summary(errors[-1], statistics.median(errors[-20:]), min(errors), seconds)


def stream(seed: int, step: int, length: int, batch_size: int, *, view: int) -> Tensor:
    """Indices of a step's batch in an endless stream of epochs, each in its keyed order.

    Args:
        seed: The key.
        step: The step; consecutive steps take consecutive batches of the stream.
        length: Number of samples in an epoch.
        batch_size: Samples per step; may exceed ``length``.
        view: 0 for the labelled stream, 1 for the unlabelled one.

    Returns:
        Indices, ``[batch_size]`` int64.
    """
    position = step * batch_size
    parts = []
    while batch_size > 0:
        epoch, start = divmod(position, length)
        part = _epoch_order(seed, epoch, length, view)[start : start + batch_size]
        parts.append(part)
        position += len(part)
        batch_size -= len(part)
    return torch.cat(parts)


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, length: int, view: int) -> Tensor:
    return sampling.epoch_order(seed, epoch, length, view=view)


class MetricsLog:
    """What a run writes: the metrics so far, a checkpoint, TensorBoard's events, the curves."""

    def __init__(self, out: Path, job: Job) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                'writing events needs TensorBoard: pip install "gpu-mixmatch[cli]"'
            ) from error
        self.out = out
        self.metrics: list[dict[str, float]] = []
        out.mkdir(parents=True, exist_ok=True)
        checkpoint = out / "checkpoint.pt"
        if checkpoint.exists():
            # the metrics travel in the checkpoint: the two cannot disagree
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            job.load_state_dict(state)
            self.metrics = state["metrics"]
        config = json.dumps(dataclasses.asdict(job.config), indent=2) + "\n"
        write_atomically(out / "config.json", config.encode())
        self._write_metrics()
        self.writer = SummaryWriter(str(out), purge_step=job.step + 1)

    def write(self, job: Job) -> None:
        """Write the latest metrics, then the checkpoint that they belong to."""
        latest = self.metrics[-1]
        for name, value in latest.items():
            if name != "step":
                self.writer.add_scalar(name, value, job.step)
        self._write_metrics()
        temporary = self.out / "checkpoint.pt.partial"
        torch.save({**job.state_dict(), "metrics": self.metrics}, temporary)
        os.replace(temporary, self.out / "checkpoint.pt")

    def close(self) -> None:
        """Finish the events and draw the curves."""
        self.writer.close()
        draw_curves({self.out.name: self.metrics}, self.out / "curves.png")

    def _write_metrics(self) -> None:
        lines = "".join(json.dumps(entry) + "\n" for entry in self.metrics)
        write_atomically(self.out / "metrics.jsonl", lines.encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old content or the new, never a part."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def draw_curves(runs: dict[str, list[dict[str, float]]], path: Path) -> Path:
    """Draw test error and losses over the steps of some runs as a PNG."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "gpu-mixmatch[cli]"') from error
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
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
    left.set(title="Test error of the averaged weights", xlabel="step", ylabel="error in %")
    left.set_ylim(bottom=0)
    right.set(title="Losses of the evaluated steps", xlabel="step", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    return path


def parameter_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, to compare runs to the last bit."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
