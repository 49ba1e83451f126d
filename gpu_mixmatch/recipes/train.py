"""The loop behind ``gpu-mixmatch train``: what a run depends on, its steps, and its checkpoints.

Every batch is a function of (seed, step), and of what a method has learnt of its guesses. A
checkpoint therefore holds two integers of the loader and no generator, and a run that is killed at
any moment and resumed ends with the same weights to the last bit. It also says what it was taken
of, the data and every number that a preset gave, so that a run goes on under the same ones or not
at all. In a process group every rank takes its part of each batch; rank 0 alone writes.
"""

import dataclasses
import hashlib
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset

from gpu_mixmatch._generators import seeded_generators
from gpu_mixmatch._ranks import positions, rank, world_size
from gpu_mixmatch._validation import as_flag, as_integer, as_number, came
from gpu_mixmatch._version import __version__
from gpu_mixmatch.data.datasets import FolderData, ImageFiles, load_dataset
from gpu_mixmatch.data.folder import OnError
from gpu_mixmatch.data.formats.common import ImageData
from gpu_mixmatch.insight.guesses import (
    OVERCONFIDENT,
    GuessQuality,
    GuessWatch,
    overconfidence,
)
from gpu_mixmatch.methods.base import BatchBuilder
from gpu_mixmatch.methods.mixmatch import MixMatch
from gpu_mixmatch.recipes import distributed
from gpu_mixmatch.recipes.checkpoint import (
    FORMAT,
    check_optimizer,
    check_state,
    check_weights,
    check_writable,
    read_checkpoint,
)
from gpu_mixmatch.recipes.choices import (
    AUGMENTS,
    GUESSES,
    LOADERS,
    METHODS,
    PRESET_NAMES,
    WITH_TEACHER,
    choose_builder,
    choose_decay,
    choose_filters,
    choose_guess,
    choose_preset,
    choose_weight,
    make_augment,
    make_builder,
    make_loader,
    make_weak,
    name_of_weight,
)
from gpu_mixmatch.recipes.models import build_model, fill_statistics_in, kernel_parameters
from gpu_mixmatch.recipes.run_log import MetricsLog, check_tools
from gpu_mixmatch.types import SemiSupervisedBatch


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on.

    A checkpoint holds it with `resolved` numbers, and resumes under one that gives the same steps;
    see `resumed`.

    Attributes:
        dataset: A name that `load_dataset` knows.
        root: Folder of its files; None for digits.
        size: Height and width that the images of a folder are brought to, in pixels.
        labels: Number of labelled images, balanced over the classes; None takes all there are.
        steps: Length of the run in batches.
        batch_size: B, labelled images of a step, of each process.
        model: A name that `build_model` knows. Its BatchNorm's running statistics move by at
            least 10 / steps a step, so that a short run fills them; see `fill_statistics_in`.
        filters: Channels of the network's first stage; None takes the preset's for "wrn-28-2",
            135 for CIFAR-100 and else 32, and for "cnn" its own.
        method: A name of `METHODS`.
        ratio: μ, unlabelled images per labelled one; None takes the preset's.
        guess: "first", or by the "loss", of the same forward pass; None is as the method's
            reference does it.
        preset: "paper", or for MixMatch "yu1ut" or "usb"; "fast" is the paper's with one joint
            guess and one forward pass over the whole batch, and with one optimiser for all methods;
            see `choose_preset`.
        augment: Engine of the preset's augmentation; see `make_augment`.
        loader: What the batches come from; see `make_loader`.
        num_workers: Processes of the loader "dataloader", for each of its two data sets; 0 fetches
            in the training process.
        seed: Of the initial weights, the labelled subset, the order and all draws.
        device: Where to train, as torch names it; "cuda" is the GPU of each process.
        sync_batchnorm: Take BatchNorm's statistics over the batches of all processes; on CUDA.
        supervised: Train on the labelled images alone, augmented but not mixed; of the method
            nothing is taken but its optimiser and averages.
        lr: Learning rate; None takes the preset's.
        lambda_u: λ_U; None takes the preset's, and less in a run of under 32,768 steps where the
            loss is a squared error; see `choose_weight`.
        rampup_steps: Of λ_U; None takes the preset's, and at most half of the run.
        ema_decay: Of the evaluated weights; None takes the preset's, and at most 1 - 10 / steps,
            so that a short run forgets its start.
        ema_teacher: Let the averaged model guess, as it does for "mean_teacher" and "ict" anyway.
        builder: Keyword arguments of the method that replace the preset's.
        eval_every: Steps between evaluations; 0 takes a twentieth of the run.
        planned_steps: Length that BatchNorm's momentum and a default of ``lambda_u``,
            ``rampup_steps`` and ``ema_decay`` are for; None takes ``steps``. A run that is
            resumed with more steps keeps its first length here.
        on_error: What becomes of a folder's files that do not decode: "raise" stops at the first,
            "skip" finds all of them before the first step and leaves them out.
        list_path: List of a folder's files that may be read, as `check_images` writes it; None
            takes all.
    """

    dataset: str = "digits"
    root: str | None = None
    size: int = 32
    labels: int | None = 40
    steps: int = 800
    batch_size: int = 64
    model: str = "cnn"
    filters: int | None = None
    method: str = "mixmatch"
    ratio: int | None = None
    guess: str | None = None
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
    planned_steps: int | None = None
    on_error: OnError = "raise"
    list_path: str | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("size", 1),
            ("labels", 1),
            ("steps", 1),
            ("batch_size", 1),
            ("ratio", 1),
            ("filters", 1),
            ("num_workers", 0),
            ("seed", 0),
            ("rampup_steps", 0),
            ("eval_every", 0),
            ("planned_steps", 1),
        ):
            self._keep(name, as_integer, least=least)
        for name, below in (("lr", None), ("lambda_u", None), ("ema_decay", 1.0)):
            self._keep(name, as_number, least=0.0, below=below)
        for name, choices in (
            ("method", [*METHODS]),
            ("guess", [*GUESSES, None]),
            ("preset", [*PRESET_NAMES]),
            ("augment", [*AUGMENTS]),
            ("loader", [*LOADERS]),
            ("on_error", [*get_args(OnError)]),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in ("sync_batchnorm", "supervised", "ema_teacher"):
            as_flag(name, getattr(self, name))
        if self.sync_batchnorm and torch.device(self.device).type != "cuda":
            raise ValueError(
                "sync_batchnorm must be off where torch's SyncBatchNorm does not run, which is "
                f"anywhere but on CUDA, got device {self.device!r}"
            )

    def load(self, progress: Callable[[int, int], None] | None = None) -> ImageData | FolderData:
        """Load the data set, as `load_dataset` does for the decoder of the loader.

        Args:
            progress: Called with the number of images decoded so far and of all, where those that
                do not decode are left out.
        """
        return load_dataset(
            self.dataset,
            self.root,
            self.size,
            on_error=self.on_error,
            list_path=self.list_path,
            decoder="dali" if self.loader == "dali" else "pil",
            progress=progress,
        )

    def _keep(self, name: str, convert: Callable[..., Any], **limits: Any) -> None:
        """Check a number if there is one, and keep it as Python's own, which files can hold."""
        value = getattr(self, name)
        if value is not None:
            object.__setattr__(self, name, convert(name, value, **limits))


# of the preset, or derived from the number of steps, where a configuration has None
_RESOLVED = (
    *("planned_steps", "filters", "ratio", "guess"),
    *("lr", "lambda_u", "rampup_steps", "ema_decay"),
)
# what all runs did whose checkpoints do not say it
_FIRST = {"method": "mixmatch", "ratio": 1, "guess": "first"}
# what the weights after a step do not depend on, or by the data alone, whose digest is compared
_FREE = frozenset(("root", "steps", "num_workers", "device", "eval_every", "on_error", "list_path"))
_SAME_BATCHES = frozenset(("resident", "dataloader"))


def resolved(config: TrainConfig) -> TrainConfig:
    """Return a configuration with its preset's numbers in place of None."""
    preset = choose_preset(config.preset, config.dataset, config.method)
    planned = config.planned_steps or config.steps
    lambda_u, rampup_steps = choose_weight(preset, planned)
    settings = {
        "planned_steps": planned,
        "filters": choose_filters(config.model, None, preset),
        "ratio": preset.ratio,
        "guess": choose_guess(config.method, config.guess),
        "lr": preset.optimizer["lr"],
        "lambda_u": lambda_u,
        "rampup_steps": rampup_steps,
        "ema_decay": choose_decay(preset.ema_decay, planned),
    }
    own = {name: getattr(config, name) for name in _RESOLVED}
    settings |= {name: value for name, value in own.items() if value is not None}
    builder = {**choose_builder(preset, planned), **config.builder}
    return dataclasses.replace(config, **settings, builder=builder)


def resumed(config: TrainConfig, theirs: Mapping[str, Any], step: int = 0) -> TrainConfig:
    """Return a configuration to continue a run under, with the run's numbers in place of None.

    More steps, another evaluation interval, number of workers, device or root, and "resident" for
    "dataloader", do not change what the steps do. A run that becomes longer keeps the ramp and the
    decay that it began with.

    Args:
        config: What is asked for.
        theirs: ``config`` of the checkpoint.
        step: Steps that the checkpoint has taken.

    Raises:
        ValueError: If something else differs, of which all is listed, or if ``steps`` is less than
            was taken.
    """
    theirs = {**_FIRST, **theirs}
    unset = {name: theirs[name] for name in _RESOLVED if name in theirs}
    unset = {name: value for name, value in unset.items() if getattr(config, name) is None}
    builder = {**theirs.get("builder", {}), **config.builder}
    config = dataclasses.replace(config, **unset, builder=builder)
    mine = {**dataclasses.asdict(config), "world_size": world_size()}
    names = sorted((mine.keys() | theirs.keys()) - _FREE)
    if {mine["loader"], theirs.get("loader")} <= _SAME_BATCHES:
        names.remove("loader")
    different = [
        f"{name}: {theirs.get(name)!r} in the checkpoint, {mine.get(name)!r} now"
        for name in names
        if theirs.get(name) != mine.get(name)
    ]
    if different:
        raise ValueError(
            "the checkpoint must be of the same configuration, got " + "; ".join(different)
        )
    if config.steps < step:
        raise ValueError(
            f"steps must be at least {step}, which the checkpoint has taken, got {config.steps}"
        )
    return config


class Summary(NamedTuple):
    """How a run ended.

    Attributes:
        error: Test error of the averaged weights after the last step, in percent; of a folder
            without test images, the error on the labelled ones.
        median_error: Median of the last 20 evaluations, as the paper reports, in percent.
        best_error: Lowest test error of all evaluations, in percent; chosen with the test set.
        seconds: Duration of the steps, without evaluations, in seconds.
        confidence: Mean confidence of the guesses between the last two evaluations; None where
            nothing is guessed. Far above 1 - error / 100 of held images, it is a bad sign.
        metrics: Of each evaluation: "step", "error", "seconds", and the parts of the loss.
    """

    error: float
    median_error: float
    best_error: float
    seconds: float
    confidence: float | None = None
    metrics: Sequence[Mapping[str, float]] = ()


class TrainRun:
    """A run's parts: the model, the method's builder, loss, optimizer and loader, and its step.

    In a process group all ranks hold the same model after every step; ``network`` is the model in
    DDP.

    Args:
        config: What to train.
        data: The data set, if it is loaded already.

    Attributes:
        config: What is trained, `resolved`.
        left_out: How many entries of a folder were passed over, by the reason.
        skipped: Files of a folder that do not decode and were left out, and why.
    """

    def __init__(self, config: TrainConfig, data: ImageData | FolderData | None = None) -> None:
        data = data or config.load()
        self.config = config = resolved(config)
        self.preset = choose_preset(config.preset, config.dataset, config.method)
        self.device = distributed.current_device(config.device)
        self._data = data
        self.left_out = data.left_out if isinstance(data, FolderData) else {}
        self.skipped = data.skipped if isinstance(data, FolderData) else {}
        labelled, unlabelled = self._parts = data.split(config.labels, config.seed)
        self.loader = make_loader(
            config.loader,
            labelled,
            unlabelled,
            config.batch_size,
            ratio=config.ratio or 1,
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
        average = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
        self.ema = AveragedModel(self.model, multi_avg_fn=average)
        weak = make_weak(config.dataset, self.preset, height).to(self.device)
        self.weak = weak
        self.normalize = weak.normalize
        self.augment = make_augment(config.augment, weak, height, width)
        has_teacher = config.ema_teacher or config.method in WITH_TEACHER
        self.builder = make_builder(
            self.preset,
            data.num_classes,
            self.augment,
            weak,
            (channels, height, width),
            len(unlabelled),
            teacher=self.ema if has_teacher else None,
            seed=config.seed,
            **config.builder,
        ).to(self.device)
        self.watch = _watch(self.builder) if not config.supervised else None
        weight = {name_of_weight(config.method): config.lambda_u}
        self.criterion = self.preset.criterion(**weight, rampup_steps=config.rampup_steps)
        self.kernels = kernel_parameters(self.model)
        self.optimizer = self._optimizer()
        self.network = distributed.replicate(self.model, self.device)
        self.step = 0
        self._set_lr(0)
        self.metrics: list[dict[str, float]] = []

    def _new_model(self, num_classes: int, channels: int) -> nn.Module:
        config = self.config
        with seeded_generators(config.seed):
            model = build_model(config.model, num_classes, channels, config.filters)
        assert config.planned_steps is not None  # resolved
        fill_statistics_in(model, config.planned_steps)
        if config.sync_batchnorm:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return model

    def _optimizer(self) -> torch.optim.Optimizer:
        settings, lr = self.preset.optimizer, self.config.lr
        assert lr is not None  # resolved
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

    def _set_lr(self, step: int) -> None:
        """Give the optimizer the learning rate of a step."""
        lr, planned = self.config.lr, self.config.planned_steps
        assert lr is not None  # resolved
        assert planned is not None
        for group in self.optimizer.param_groups:
            group["lr"] = lr * self.preset.lr_factor(step, planned)

    def train_step(self, batch: SemiSupervisedBatch) -> dict[str, Tensor]:
        """Take one step; return its losses, still on the device."""
        self.network.train()
        if self.config.supervised:
            losses = {"loss": self._supervised_loss(batch.x, batch.y.to(self.device))}
        else:
            guesser = self.model if self.config.guess == "first" else None
            # else rows are told apart by their places, so that copies of one image differ
            ids = {"ids_u": batch.ids_u} if self.config.method == "flexmatch" else {}
            built = self.builder(batch.x, batch.y, batch.u, guesser, **ids)
            losses = self.criterion(self.preset.forward(self.network, built), built)._asdict()
        self.optimizer.zero_grad()
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        with torch.no_grad():
            for kernel in self.kernels:
                kernel.mul_(1 - self.preset.optimizer.get("decay", 0.0))
        distributed.average_buffers(self.model)
        self.ema.update_parameters(self.model)
        self.step += 1
        self._set_lr(self.step)
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

    def confidence(self) -> dict[str, Tensor]:
        """Return the mean confidence of the guesses since the last call, if any; waits for them."""
        quality = self.watch.read() if self.watch else None
        return {"confidence": torch.tensor(quality.confidence)} if quality else {}

    def overconfidence(self) -> str | None:
        """Say that guesses are surer than the model is right, at the latest evaluation.

        It is said where the gap is above 0.1 and more than chance explains, which counts where
        there are fewer than about 100 test images. It is said of the second half of a run alone:
        before, averaged weights lag behind those that guess. It is not said of labelled images,
        since the model is trained on them; nor of other methods than MixMatch, of which it is not
        known what a gap means.
        """
        latest = self.metrics[-1]
        confidence, accuracy = latest.get("confidence", 0.0), 1 - latest["error"] / 100
        too_early = 2 * latest["step"] < self.config.steps
        most = max(accuracy + OVERCONFIDENT, _upper_bound(accuracy, len(self.test_labels)))
        known = self.config.method == "mixmatch" and self.tested_on == "test"
        if not known or too_early or confidence <= most:
            return None
        return overconfidence(confidence, accuracy, "test images")

    def is_finite(self, values: Mapping[str, float]) -> bool:
        """Tell whether numbers and all weights are finite; waits for the device."""
        if not all(map(math.isfinite, values.values())):
            return False
        weights = (*self.model.state_dict().values(), *self.ema.state_dict().values())
        return bool(torch.stack([value.isfinite().all() for value in weights]).all())

    def checkpoint_size(self) -> int:
        """Estimate the bytes of a checkpoint: the model, its average, and the optimizer's two."""
        total: int = sum(p.numel() * p.element_size() for p in self.model.parameters())
        return 4 * total

    def description(self) -> dict[str, Any]:
        """Return what ``config.json`` says: the configuration, and how large the network is."""
        return {
            **dataclasses.asdict(self.config),
            "num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
        }

    @cached_property
    def data(self) -> dict[str, Any]:
        """What the run is trained on: names, lengths, and a digest of all that orders it.

        ``digest`` is the SHA-256 of the ``digests`` of the parts. That of a part of a folder is
        over the names of its files, below the root, and their labels; that of a part in memory is
        over its images and labels.
        """
        data, (labelled, unlabelled) = self._data, self._parts
        names = data.class_names if isinstance(data, FolderData) else range(data.num_classes)
        digests = {
            "labelled": _digest(labelled, self.config.root),
            "unlabelled": _digest(unlabelled, self.config.root),
            "test": _digest(TensorDataset(data.test_images, data.test_labels), None),
        }
        return {
            "name": data.name,
            "num_classes": data.num_classes,
            "classes": [str(name) for name in names],
            "image": list(data.test_images.shape[1:]),
            "num_labelled": len(labelled),
            "num_unlabelled": len(unlabelled),
            "num_test": len(data.test_images),
            "digest": hashlib.sha256("".join(digests.values()).encode()).hexdigest(),
            "digests": digests,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs, and what it must be resumed on.

        These are tensors and plain values, which ``torch.load(weights_only=True)`` reads:

        - "format": 1; "versions": of "gpu_mixmatch" and "torch";
        - "config": the fields of `TrainConfig`, `resolved`, and "world_size";
        - "data": as `data`; "normalisation": "mean" and "std", a number per channel;
        - "step"; "model", "ema" (its network below "module."), "optimizer", "mixmatch", "loader":
          the states of these; that of the builder of any method is called "mixmatch";
        - "metrics": of each evaluation.
        """
        return {
            "format": FORMAT,
            "versions": {"gpu_mixmatch": __version__, "torch": str(torch.__version__)},
            "config": {**dataclasses.asdict(self.config), "world_size": world_size()},
            "data": self.data,
            "normalisation": self._normalisation(),
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "mixmatch": dict(self.builder.state_dict()),
            "loader": self.loader.state_dict(),
            "metrics": self.metrics,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint of the same data and of a configuration with the same steps.

        All is looked at before anything is changed.

        Raises:
            TypeError: If an entry is of the wrong kind.
            ValueError: If it is of other data or another configuration, of which the message lists
                what differs, or if its weights are not of this network.
        """
        check_state(state)
        resumed(self.config, state["config"], state["step"])
        self._check_data(state)
        weights = (("model", self.model), ("ema", self.ema), ("mixmatch", self.builder))
        for name, module in weights:
            check_weights(name, module.state_dict(), state[name], type(self.model).__name__)
        self._set_lr(state["step"])  # the checkpoint's optimizer has that of its next step
        try:
            check_optimizer(self.optimizer, state["optimizer"])
        except ValueError:
            self._set_lr(self.step)
            raise
        place = {"seed": self.config.seed, "step": state["step"]}
        for name, value in place.items():
            if state["loader"].get(name) != value:
                raise ValueError(
                    f"{name} of loader must be {value} as of the run, got "
                    f"{came(state['loader'].get(name))}"
                )
        version = state["versions"].get("torch")
        if version != torch.__version__:
            warnings.warn(
                f"the checkpoint is of torch {version} and this is {torch.__version__}: steps may "
                "be rounded otherwise",
                stacklevel=2,
            )
        self.loader.load_state_dict(state["loader"])
        self.step = state["step"]
        for name, module in weights:
            module.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.metrics = list(state["metrics"])

    def _normalisation(self) -> dict[str, list[float]]:
        channels = self.data["image"][0]
        numbers = {"mean": self.weak.mean, "std": self.weak.std}
        return {
            name: [float(value) for value in (values * channels if len(values) == 1 else values)]
            for name, values in numbers.items()
        }

    def _check_data(self, state: dict[str, Any]) -> None:
        """Raise a ValueError that says how the data of a checkpoint differ, if they do."""
        theirs, mine = (
            {**entry["data"], **entry["normalisation"]}
            for entry in (state, {"data": self.data, "normalisation": self._normalisation()})
        )
        if theirs == mine:
            return
        parts_of_theirs, parts = theirs.get("digests", {}), mine["digests"]
        found = []
        for name in mine:
            was: Any = theirs.get(name)
            now = mine[name]
            if name.startswith("digest") or was == now:
                continue
            if name == "classes" and set(was) != set(now):  # there may be very many
                was, now = sorted({*was} - {*now}), sorted({*now} - {*was})
            found.append(f"{name}: {was} in the checkpoint, {now} now")
        what = "names or labels of files" if isinstance(self._data, FolderData) else "images"
        found += [
            f"the {part} part has other {what}, or another order"
            for part in parts
            if parts_of_theirs.get(part) != parts[part] and f"num_{part}" not in " ".join(found)
        ]
        raise ValueError(
            "the data must be those that the checkpoint was trained on, got "
            + "; ".join(found or ["another digest"])
        )


class GuessConfidence:
    """How sure a builder's guesses are, whoever makes them; only `read` waits for the device.

    Args:
        builder: Of any method.
    """

    def __init__(self, builder: BatchBuilder) -> None:
        self._means: list[Tensor] = []
        self._num_guesses = 0
        builder.register_guess_hook(self._look)

    def read(self) -> GuessQuality | None:
        """Return the mean confidence since the last call, or None if nothing was guessed."""
        if not self._means:
            return None
        mean = torch.stack(self._means).mean().item()
        quality = GuessQuality(mean, None, self._num_guesses)
        self._means.clear()
        self._num_guesses = 0
        return quality

    def _look(self, logits: Tensor) -> None:
        self._num_guesses += logits.shape[1]
        self._means.append(logits.float().softmax(dim=-1).mean(dim=0).amax(dim=-1).mean())


def _watch(builder: BatchBuilder) -> GuessWatch | GuessConfidence:
    if isinstance(builder, MixMatch):
        return GuessWatch(builder)
    return GuessConfidence(builder)


def _digest(part: TensorDataset | ImageFiles, root: str | None) -> str:
    """Return the SHA-256 of the samples of a part and their order, files by their names."""
    found = hashlib.sha256(f"{len(part)}\n".encode())
    if isinstance(part, TensorDataset):
        for tensor in part.tensors:
            found.update(f"{list(tensor.shape)} {tensor.dtype}\n".encode())
            found.update(tensor.cpu().contiguous().numpy().data)
        return found.hexdigest()
    prefix = "" if root is None else str(Path(root).expanduser()) + os.sep
    for number in range(len(part)):
        name = part.index.name(number).removeprefix(prefix)
        found.update(name.encode("utf-8", "surrogateescape") + b"\0")
    if part.index.labels is not None:
        found.update(part.index.labels.numpy().data)
    return found.hexdigest()


def _upper_bound(accuracy: float, count: int) -> float:
    """Return what the true accuracy is at most, where ``accuracy`` of ``count`` images were right.

    It is the end of the interval of Agresti and Coull (1998), of 95 %.
    """
    share = (accuracy * count + 2) / (count + 4)
    return share + 2 * math.sqrt(share * (1 - share) / (count + 4))


class DivergenceError(RuntimeError):
    """Training has left the numbers that are finite.

    Attributes:
        step: The step at which it was found, at an evaluation; it began after the one before.
        values: The losses of that step.
    """

    def __init__(self, step: int, values: Mapping[str, float], last: str) -> None:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        super().__init__(
            f"the run diverged: at step {step} losses or weights are not finite ({shown}). "
            f"{last}. A lower learning rate, a lower lambda_u or a longer rampup_steps may help"
        )
        self.step = step
        self.values = dict(values)


def train(
    config: TrainConfig,
    out: Path | None = None,
    *,
    resume: bool = False,
    data: ImageData | FolderData | None = None,
    clock: Callable[[], float] = time.perf_counter,
    on_check: Callable[[int, int], None] | None = None,
    on_start: Callable[[TrainRun], None] | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> Summary:
    """Train a classifier, evaluate it as it goes, and write what happened.

    In a process group every rank calls this alike, and rank 0 alone looks at ``out``. The folder is
    made with the first evaluation: a run that fails before it leaves nothing behind.

    Args:
        config: What to train.
        out: Folder for ``checkpoint.pt``, ``metrics.jsonl``, TensorBoard's events, ``curves.png``
            and ``config.json``, which also says how large the network is, and ``skipped.txt`` with
            files that were left out; None writes nothing.
        resume: Continue from the checkpoint in ``out``, or begin if there is none yet; see
            `resumed` for what may differ.
        data: The data set, if it is loaded already.
        clock: What seconds are read from; ``time.process_time`` for those of a CPU that is shared.
        on_check: Called with the number of files decoded so far and of all, while those that do not
            decode are looked for.
        on_start: Called before the first step, when all that can be checked has been.
        on_step: Called after each step with the number of steps taken and the latest metrics.

    Returns:
        How the run ended.

    Warns:
        UserWarning: Once, if in the second half of the run guesses are surer than the model is
            right on test images, by more than 0.1.

    Raises:
        ValueError: If ``out`` exists and ``resume`` is not asked for, or its checkpoint is damaged,
            of other data, or of a configuration with other steps.
        DivergenceError: If a loss or a weight is not finite at an evaluation. The checkpoint of the
            one before stays.
        OSError: If something cannot be written; the message names it and the room on its disk.
        ImportError: If ``out`` needs a package that is not installed.
    """
    if out is not None:
        distributed.from_first_rank(lambda: _check_out(out, resume))
    state = None if out is None else _read_checkpoint(out / "checkpoint.pt")
    if state is not None:
        config = resumed(config, state["config"], state["step"])
    run = TrainRun(config, data or config.load(on_check))
    if state is not None:
        run.load_state_dict(state)
    log = None
    if out is not None and rank() == 0:
        log = MetricsLog(
            out,
            run.description(),
            run.metrics,
            run.step,
            run.tested_on,
            run.checkpoint_size(),
            run.skipped,
        )
    if on_start:
        on_start(run)
    metrics = run.metrics
    eval_every = config.eval_every or max(1, config.steps // 20)
    seconds = metrics[-1]["seconds"] if metrics else 0.0
    warned = False
    began = clock()
    for batch in islice(run.loader, config.steps - run.step):
        losses = run.train_step(batch)
        if run.step % eval_every == 0 or run.step == config.steps:
            # waits for the device
            values = distributed.average_values({**losses, **run.confidence()}, run.device)
            seconds += clock() - began
            if not run.is_finite(values):
                raise DivergenceError(run.step, values, _last_checkpoint(metrics, out))
            # every rank has the same weights and finds the same error
            metrics.append(
                {"step": run.step, "error": run.test_error(), "seconds": seconds, **values}
            )
            if log:
                log.write(run.state_dict())
            notice = run.overconfidence()
            if notice and not warned and rank() == 0:
                warnings.warn(f"step {run.step}: {notice}", UserWarning, stacklevel=2)
            warned = warned or notice is not None
            began = clock()
        if on_step:
            on_step(run.step, metrics[-1] if metrics else {})
    errors = [entry["error"] for entry in metrics]
    if log:
        log.close()
    return Summary(
        errors[-1],
        statistics.median(errors[-20:]),
        min(errors),
        seconds,
        metrics[-1].get("confidence"),
        metrics,
    )


def _check_out(out: Path, resume: bool) -> None:
    """Raise if a run cannot end well in a folder; before the data are loaded."""
    if out.exists() and not resume:
        raise ValueError(
            f"out must be a folder that does not exist yet, got {out}; or use --resume"
        )
    check_tools()
    check_writable(out)


def _read_checkpoint(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint if there is one; rank 0 does it for all ranks."""
    return distributed.from_first_rank(lambda: read_checkpoint(path) if path.exists() else None)


def _last_checkpoint(metrics: list[dict[str, float]], out: Path | None) -> str:
    if out is None or not metrics:
        return "Nothing was written" if out is None else "There is no checkpoint yet"
    return f"The checkpoint of step {int(metrics[-1]['step'])} is in {out}"
