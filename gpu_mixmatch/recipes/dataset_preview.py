"""The preview of a data set: the first batch of a run, guessed by a small network."""

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gpu_mixmatch import presets, sampling
from gpu_mixmatch._generators import seeded_generators
from gpu_mixmatch._validation import MOST_IMAGES, MOST_STEP, as_integer, as_seed, check_kind
from gpu_mixmatch.augment import as_augment
from gpu_mixmatch.data.datasets import FolderData
from gpu_mixmatch.data.formats.common import ImageData, split_labels
from gpu_mixmatch.insight.preview import MOST_PREVIEWED, draw_preview
from gpu_mixmatch.methods.mixmatch import MixMatch
from gpu_mixmatch.recipes.choices import choose_preset
from gpu_mixmatch.recipes.models import build_model

CLASS_NAMES = {
    "digits": tuple("0123456789"),
    "mnist": tuple("0123456789"),
    "svhn": tuple("0123456789"),
    "svhn-extra": tuple("0123456789"),
    "fashion-mnist": (
        "T-shirt/top",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    ),
    "cifar10": (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ),
}


def preview_dataset(
    dataset: ImageData | FolderData,
    out: str | Path,
    *,
    seed: int = 0,
    preset: presets.Preset | None = None,
    augment: Any = None,
    num_augmentations: int = 2,
    labels: int | None = 40,
    train_steps: int = 60,
    batch_size: int = 64,
    rows: int = 4,
) -> Path:
    """Draw the first batch of a run on ``dataset``, guessed by a small network.

    The network is first trained for some steps on the labelled images alone, since an untrained one
    guesses the same for every image. All runs on the CPU; the picture depends on nothing but the
    arguments.

    Args:
        dataset: The images.
        out: The PNG to write.
        seed: Of the split, the network and the builder.
        preset: Settings of the builder; None is the paper's for the data set, for a folder those
            for CIFAR-10.
        augment: An engine, as for `MixMatch`; None is the preset's.
        num_augmentations: K.
        labels: Number of labelled images; None takes all of a folder's.
        train_steps: Steps of supervised training; 0 guesses with an untrained network.
        batch_size: Images in the preview's batch, labelled and unlabelled each, at most.
        rows: Rows to show of each kind.

    Returns:
        ``out``.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If an argument is of the wrong kind.
        ValueError: If the data set has no preset, or an argument does not fit it.
    """
    check_kind("dataset", dataset, (ImageData, FolderData), "a data set of load_dataset")
    check_kind("out", out, (str, PathLike), "a path")
    seed = as_seed(seed)
    if preset is not None:
        check_kind("preset", preset, presets.Preset, "a Preset or None")
    if labels is not None:
        labels = as_integer("labels", labels, least=1)
    train_steps = as_integer("train_steps", train_steps, most=MOST_STEP)
    batch_size = as_integer("batch_size", batch_size, least=1, most=MOST_IMAGES)
    rows = as_integer("rows", rows, least=1, most=MOST_PREVIEWED)
    preset = preset or choose_preset("paper", dataset.name)
    builder = {**preset.builder, "num_augmentations": num_augmentations, "seed": seed}
    engine = preset.augment() if augment is None else augment
    mixmatch = MixMatch(engine, dataset.num_classes, **builder)

    x, y, u = _first_images(dataset, labels, seed, batch_size)
    names = CLASS_NAMES.get(dataset.name)
    if isinstance(dataset, FolderData):
        names = dataset.class_names
    ids_x = sampling.epoch_order(seed, 0, len(x))[:batch_size]
    with seeded_generators(seed):
        model = build_model("cnn", dataset.num_classes, x.shape[1])
        _train_on_labelled(model, engine, x, y, seed, train_steps)
    x, y = x[ids_x], y[ids_x]
    return draw_preview(mixmatch, x, y, u, model, out, class_names=names, rows=rows)


def _first_images(
    dataset: ImageData | FolderData, labels: int | None, seed: int, batch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return all labelled images, their labels, and a first batch of the other images."""
    if isinstance(dataset, FolderData):
        labelled, others = dataset.split(labels, seed)
        assert labelled.index.labels is not None  # load_dataset sees to it
        ids_u = sampling.epoch_order(seed, 0, len(others), view=1)[:batch_size]
        return labelled.load(), labelled.index.labels, others.load(ids_u.tolist())
    if labels is None:
        raise ValueError(f"labels must be a number for {dataset.name}, got None")
    images, targets = dataset.train_images, dataset.train_labels
    chosen = split_labels(targets, labels, seed, dataset.num_classes)
    is_unlabelled = torch.ones(len(targets), dtype=torch.bool, device="cpu")
    is_unlabelled[chosen] = False
    unlabelled = is_unlabelled.nonzero().flatten()
    ids_u = unlabelled[sampling.epoch_order(seed, 0, len(unlabelled), view=1)[:batch_size]]
    return images[chosen], targets[chosen], images[ids_u]


def _train_on_labelled(
    model: nn.Module, augment: Any, x: Tensor, y: Tensor, seed: int, steps: int, batch: int = 32
) -> None:
    """Train on augmented labelled images, each drawn twice a step."""
    engine = as_augment(augment)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    for step in range(steps):
        rows = torch.randint(len(x), (batch,), device="cpu")
        draws = engine.draw_batch(seed, step, rows, rows, 1)
        images = engine.build(x[rows], x[rows], draws, 1)
        loss = cross_entropy(model(images.float()), y[rows].repeat(2))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
