"""The loop behind ``gpu-mixmatch train``: what a run depends on, its steps, and its checkpoints.

Every batch is a function of (seed, step). A checkpoint therefore holds two integers of the loader
and no generator, and a run that is killed at any moment and resumed ends with the same weights to
the last bit. In a process group every rank takes its part of each batch; rank 0 alone writes.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gpu_mixmatch._ranks import positions, rank, world_size
from gpu_mixmatch.data.datasets import FolderData, load_dataset
from gpu_mixmatch.data.formats.common import ImageData
from gpu_mixmatch.losses import MixMatchLoss
from gpu_mixmatch.methods.mixmatch import MixMatch
from gpu_mixmatch.recipes import distributed
from gpu_mixmatch.recipes.choices import (
    AUGMENTS,
    LOADERS,
    PRESET_NAMES,
    choose_filters,
    choose_preset,
    choose_weight,
    make_augment,
    make_loader,
    make_weak,
)
from gpu_mixmatch.recipes.models import build_model, fill_statistics_in, kernel_parameters
from gpu_mixmatch.recipes.run_log import MetricsLog
from gpu_mixmatch.types import SemiSupervisedBatch


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on; a checkpoint resumes only under an equal one.

    Attributes:
        dataset: A name that `load_dataset` knows.
        root: Folder of its files; None for digits.
        size: Height and width that the images of a folder are brought to, in pixels.
        labels: Number of labelled images, balanced over the classes; None takes all there are.
        steps: Length of the run in batches.
        batch_size: B, and M = B, of each process.
        model: A name that `build_model` knows. Its BatchNorm's running statistics move by at
            least 10 / steps a step, so that a short run fills them; see `fill_statistics_in`.
        filters: Channels of the network's first stage; None takes the preset's for "wrn-28-2",
            135 for CIFAR-100 and else 32, and for "cnn" its own.
        preset: "paper", "yu1ut" or "usb"; "fast" is the paper's with one joint guess and one
            forward pass over the whole batch.
        augment: Engine of the preset's augmentation; see `make_augment`.
        loader: What the batches come from; see `make_loader`.
        num_workers: Processes of the loader "dataloader", for each of its two data sets; 0 fetches
            in the training process.
        seed: Of the initial weights, the labelled subset, the order and all draws.
        device: Where to train, as torch names it; "cuda" is the GPU of each process.
        sync_batchnorm: Take BatchNorm's statistics over the batches of all processes; on CUDA.
        supervised: Train on the labelled images alone, augmented but not mixed.
        lr: Learning rate; None takes the preset's.
        lambda_u: λ_U; None takes the preset's, and less in a run of under 32,768 steps; see
            `choose_weight`.
        rampup_steps: Of λ_U; None takes the preset's, and at most half of the run.
        ema_decay: Of the evaluated weights; None takes the preset's, and at most 1 - 10 / steps,
            so that a short run forgets its start.
        ema_teacher: Let the averaged model guess.
        builder: Keyword arguments of `MixMatch` that replace the preset's.
        eval_every: Steps between evaluations; 0 takes a twentieth of the run.
    """

    dataset: str = "digits"
    root: str | None = None
    size: int = 32
    labels: int | None = 40
    steps: int = 800
    batch_size: int = 64
    model: str = "cnn"
    filters: int | None = None
    preset: str = "fast"
    augment: str = "weak"
    loader: str = "resident"
    num_workers: int = 2
    seed: int = 0
    device: str = "cpu"
    sync_batchnorm: bool = False
    supervised: bool = False
    lr: float | None = None
    lambda_u: float | None = None
    rampup_steps: int | None = None
    ema_decay: float | None = None
    ema_teacher: bool = False
    builder: dict[str, Any] = dataclasses.field(default_factory=dict)
    eval_every: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("size", 1),
            ("labels", 1),
            ("steps", 1),
            ("batch_size", 1),
            ("filters", 1),
            ("num_workers", 0),
            ("eval_every", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name, choices in (
            ("preset", [*PRESET_NAMES]),
            ("augment", [*AUGMENTS]),
            ("loader", [*LOADERS]),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.sync_batchnorm and torch.device(self.device).type != "cuda":
            raise ValueError(
                "sync_batchnorm must be off where torch's SyncBatchNorm does not run, which is "
                f"anywhere but on CUDA, got device {self.device!r}"
            )


class Summary(NamedTuple):
    """How a run ended.

    Attributes:
        error: Test error of the averaged weights after the last step, in percent; of a folder
            without test images, the error on the labelled ones.
        median_error: Median of the last 20 evaluations, as the paper reports, in percent.
        best_error: Lowest test error of all evaluations, in percent; chosen with the test set.
        seconds: Duration of the steps, without evaluations, in seconds.
    """

    error: float
    median_error: float
    best_error: float
    seconds: float


class TrainRun:
    """A run's parts: the model, builder, loss, optimizer and loader, and its step.

    In a process group all ranks hold the same model after every step; ``network`` is the model in
    DDP.

    Args:
        config: What to train.
        data: The data set, if it is loaded already.
    """

    def __init__(self, config: TrainConfig, data: ImageData | FolderData | None = None) -> None:
        data = data or load_dataset(config.dataset, config.root, config.size)
        self.config = config
        self.preset = choose_preset(config.preset, config.dataset)
        self.device = distributed.current_device(config.device)
        labelled, unlabelled = data.split(config.labels, config.seed)
        self.loader = make_loader(
            config.loader,
            labelled,
            unlabelled,
            config.batch_size,
            steps_per_epoch=config.steps,
            seed=config.seed,
            device=self.device,
            num_workers=config.num_workers,
        )
        self.test_images = data.test_images.to(self.device)
        self.test_labels = data.test_labels.to(self.device)
        has_test = not isinstance(data, FolderData) or data.has_test
        self.tested_on = "test" if has_test else "labelled"
        channels, height, width = data.test_images.shape[1:]
        model = self._new_model(data.num_classes, channels)
        self.model = model.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        average = get_ema_multi_avg_fn(self._ema_decay())  # type: ignore[no-untyped-call]
        self.ema = AveragedModel(self.model, multi_avg_fn=average)
        weak = make_weak(config.dataset, self.preset, height).to(self.device)
        self.normalize = weak.normalize
        self.augment = make_augment(config.augment, weak, height, width)
        self.mixmatch = MixMatch(
            self.augment,
            data.num_classes,
            teacher=self.ema if config.ema_teacher else None,
            seed=config.seed,
            **{**self.preset.builder, **config.builder},
        ).to(self.device)
        self.criterion = self._criterion()
        self.kernels = kernel_parameters(self.model)
        self.optimizer = self._optimizer()
        self.network = distributed.replicate(self.model, self.device)
        self.step = 0
        self.metrics: list[dict[str, float]] = []

    def _new_model(self, num_classes: int, channels: int) -> nn.Module:
        config = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            filters = choose_filters(config.model, config.filters, self.preset)
            model = build_model(config.model, num_classes, channels, filters)
        fill_statistics_in(model, config.steps)
        if config.sync_batchnorm:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return model

    def _ema_decay(self) -> float:
        if self.config.ema_decay is not None:
            return self.config.ema_decay
        return min(self.preset.ema_decay, max(0.0, 1 - 10 / self.config.steps))

    def _criterion(self) -> MixMatchLoss:
        config = self.config
        given = config.lambda_u, config.rampup_steps
        return MixMatchLoss(*choose_weight(self.preset, config.steps, *given))

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

    def train_step(self, batch: SemiSupervisedBatch) -> dict[str, Tensor]:
        """Take one step; return its losses, still on the device."""
        self.network.train()
        if self.config.supervised:
            losses = {"loss": self._supervised_loss(batch.x, batch.y.to(self.device))}
        else:
            mixed = self.mixmatch(batch.x, batch.y, batch.u, self.model)
            if self.preset.name == "fast":
                logits = self.network(mixed.inputs)
            else:
                logits = self.preset.forward(self.network, mixed)
            losses = self.criterion(logits, mixed)._asdict()
        self.optimizer.zero_grad()
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        with torch.no_grad():
            for kernel in self.kernels:
                kernel.mul_(1 - self.preset.optimizer.get("decay", 0.0))
        distributed.average_buffers(self.model)
        self.ema.update_parameters(self.model)
        self.step += 1
        return {name: value.detach() for name, value in losses.items()}

    def _supervised_loss(self, x: Tensor, y: Tensor) -> Tensor:
        draws = self.augment.draw_batch(self.config.seed, self.step, positions(len(x)), 0, 1)
        return F.cross_entropy(self.network(self.augment.build(x, x[:0], draws, 1)), y)

    @torch.no_grad()
    def test_error(self) -> float:
        """Return the error of the averaged weights on the test images, in percent."""
        self.ema.eval()
        wrong = torch.zeros((), dtype=torch.int64, device=self.device)
        images, labels = self.test_images, self.test_labels
        for start in range(0, len(images), 512):
            part = slice(start, start + 512)
            logits = self.ema(self.normalize(images[part]))
            wrong += (logits.argmax(dim=1) != labels[part]).sum()
        self.ema.train()  # a teacher guesses in the mode of the student
        return 100 * int(wrong) / len(images)

    def description(self) -> dict[str, Any]:
        """Return what ``config.json`` says: the configuration, and how large the network is."""
        return {
            **dataclasses.asdict(self.config),
            "filters": choose_filters(self.config.model, self.config.filters, self.preset),
            "num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs, as tensors and plain values."""
        return {
            "config": self._settings(),
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "mixmatch": dict(self.mixmatch.state_dict()),
            "loader": self.loader.state_dict(),
            "metrics": self.metrics,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint of the same configuration.

        Raises:
            ValueError: If it is of another configuration; the message lists what differs.
        """
        mine = self._settings()
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
        self.loader.load_state_dict(state["loader"])
        self.metrics = list(state["metrics"])

    def _settings(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self.config), "world_size": world_size()}


def train(
    config: TrainConfig,
    out: Path | None = None,
    *,
    resume: bool = False,
    data: ImageData | FolderData | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> Summary:
    """Train a classifier, evaluate it as it goes, and write what happened.

    In a process group every rank calls this alike, and rank 0 alone looks at ``out``.

    Args:
        config: What to train.
        out: Folder for ``checkpoint.pt``, ``metrics.jsonl``, TensorBoard's events, ``curves.png``
            and ``config.json``, which also says how large the network is; None writes nothing.
        resume: Continue from the checkpoint in ``out``, or begin if there is none yet.
        data: The data set, if it is loaded already.
        on_step: Called after each step with the number of steps taken and the latest metrics.

    Returns:
        How the run ended.

    Raises:
        ValueError: If ``out`` exists and ``resume`` is not asked for, or its checkpoint is of
            another configuration.
    """
    if out is not None and not resume and distributed.from_first_rank(out.exists):
        raise ValueError(
            f"out must be a folder that does not exist yet, got {out}; or use --resume"
        )
    run = TrainRun(config, data)
    if out is not None:
        _load_checkpoint(run, out / "checkpoint.pt")
    log = None
    if out is not None and rank() == 0:
        log = MetricsLog(out, run.description(), run.metrics, run.step, run.tested_on)
    metrics = run.metrics
    eval_every = config.eval_every or max(1, config.steps // 20)
    seconds = metrics[-1]["seconds"] if metrics else 0.0
    began = time.perf_counter()
    for batch in islice(run.loader, config.steps - run.step):
        losses = run.train_step(batch)
        if run.step % eval_every == 0 or run.step == config.steps:
            values = distributed.average_values(losses, run.device)  # waits for the device
            seconds += time.perf_counter() - began
            # every rank has the same weights and finds the same error
            metrics.append(
                {"step": run.step, "error": run.test_error(), "seconds": seconds, **values}
            )
            if log:
                log.write(run.state_dict())
            began = time.perf_counter()
        if on_step:
            on_step(run.step, metrics[-1] if metrics else {})
    errors = [entry["error"] for entry in metrics]
    if log:
        log.close()
    return Summary(errors[-1], statistics.median(errors[-20:]), min(errors), seconds)


def _load_checkpoint(run: TrainRun, path: Path) -> None:
    """Continue from a checkpoint if there is one; rank 0 reads it for all ranks."""

    def read() -> dict[str, Any] | None:
        if not path.exists():
            return None
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state

    state = distributed.from_first_rank(read)
    if state is not None:
        run.load_state_dict(state)
