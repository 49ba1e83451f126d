"""One picture of what the builder does: views, guessed and sharpened labels, mixed pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gpu_mixmatch import functional, presets, sampling
from gpu_mixmatch._extras import need
from gpu_mixmatch.augment import as_augment
from gpu_mixmatch.augment.base import float_images
from gpu_mixmatch.data.datasets import FolderData
from gpu_mixmatch.data.formats.common import ImageData, split_labels
from gpu_mixmatch.insight.page import (
    BODY,
    DPI,
    HEAD,
    MOST_NAMED,
    PITCH,
    WIDTH,
    Page,
    Step,
    draw_guesses,
    draw_heading,
    draw_pairs,
)
from gpu_mixmatch.methods.mixmatch import MixMatch
from gpu_mixmatch.methods.passes import get_logits
from gpu_mixmatch.recipes.models import build_model
from gpu_mixmatch.types import AugmentParams, MixMatchBatch, MixUpParams

if TYPE_CHECKING:
    pass

__all__ = ["draw_preview", "preview"]

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


def draw_preview(
    mixmatch: MixMatch,
    x: Tensor,
    y: Tensor,
    u: Tensor,
    model: nn.Module,
    path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    rows: int = 4,
    ids_x: Tensor | None = None,
    ids_u: Tensor | None = None,
) -> Path:
    """Draw the batch that ``mixmatch`` would build next, and how it comes about, as a PNG.

    The builder itself makes the batch, and the picture is drawn only if the views, guesses and
    pairs that it shows give that batch again. The builder's step, the model's buffers and torch's
    generators are left as they were, so that training goes on as without a preview.

    Args:
        mixmatch: The builder.
        x: Labelled images, as for `MixMatch.forward`.
        y: Their labels.
        u: Unlabelled images.
        model: The model that guesses, unless the builder has a teacher.
        path: The file to write; folders are made.
        class_names: Names of the L classes; None shows their numbers.
        rows: Unlabelled images, and rows of the batch, to show.
        ids_x: Sample ids, as for `MixMatch.forward`.
        ids_u: Sample ids, as for `MixMatch.forward`.

    Returns:
        ``path``.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If ``rows`` or ``class_names`` do not fit, or the builder refuses the batch.
        RuntimeError: If the batch is not what its parts give, for instance because the engine
            does not draw the same for the same (seed, step).
    """
    need("matplotlib", "a preview")
    import matplotlib.style
    from matplotlib.figure import Figure

    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    if class_names is not None and len(class_names) != mixmatch.num_classes:
        raise ValueError(
            f"class_names must hold num_classes = {mixmatch.num_classes} names, "
            f"got {len(class_names)}"
        )
    if class_names is None:
        prefix = "" if mixmatch.num_classes <= MOST_NAMED else "class "
        class_names = [f"{prefix}{number}" for number in range(mixmatch.num_classes)]
    names = [name if len(name) <= 14 else f"{name[:13]}…" for name in map(str, class_names)]
    step = _next_step(mixmatch, x, y, u, model, ids_x, ids_u)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a user's own style may be dark, and names of classes may hold dollar signs
    with matplotlib.style.context(["default", {"text.parse_math": False}]):
        guess_rows = min(rows, len(step.means))
        mixed_rows = _rows_to_show(step.batch, rows)
        section = HEAD + BODY + 0.35
        tops = 1.25, 1.25 + section + PITCH * guess_rows
        height = tops[1] + HEAD + BODY + PITCH * len(mixed_rows) + 0.1
        page = Page(Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white"))
        draw_heading(page, mixmatch, step)
        draw_guesses(page, mixmatch, float_images(u[:guess_rows]), step, names, top=tops[0])
        draw_pairs(page, mixmatch, step, mixed_rows, names, top=tops[1])
        page.figure.savefig(path, format="png")
    return path


def preview(
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

    The network is trained for a moment on the labelled images alone, since the guesses of an
    untrained one are all alike. Everything is a function of the arguments, and runs on the CPU.

    Args:
        dataset: The images.
        out: The PNG to write.
        seed: Of the split, the network and the builder.
        preset: Settings of the builder; None is the paper's for the data set.
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
        ValueError: If the data set has no preset, or an argument does not fit it.
    """
    preset = preset or presets.paper(dataset.name)
    builder = {**preset.builder, "num_augmentations": num_augmentations, "seed": seed}
    engine = preset.augment() if augment is None else augment
    mixmatch = MixMatch(engine, dataset.num_classes, **builder)

    x, y, u = _first_images(dataset, labels, seed, batch_size)
    names = CLASS_NAMES.get(dataset.name)
    if isinstance(dataset, FolderData):
        names = dataset.class_names
    ids_x = sampling.epoch_order(seed, 0, len(x))[:batch_size]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed CUDA
        model = build_model("cnn", dataset.num_classes, x.shape[1])
        _train(model, engine, x, y, seed, train_steps)
    return draw_preview(
        mixmatch,
        x[ids_x],
        y[ids_x],
        u,
        model,
        out,
        class_names=names,
        rows=rows,
    )


def _first_images(
    dataset: ImageData | FolderData, labels: int | None, seed: int, batch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """All labelled images, their labels, and the first unlabelled batch of other images."""
    if isinstance(dataset, FolderData):
        labelled, others = dataset.split(labels, seed)
        assert labelled.index.labels is not None  # load_dataset sees to it
        ids_u = sampling.epoch_order(seed, 0, len(others), view=1)[:batch_size]
        return labelled.load(), labelled.index.labels, others.load(ids_u.tolist())
    if labels is None:
        raise ValueError(f"labels must be a number for {dataset.name}, got None")
    images, targets = dataset.train_images, dataset.train_labels
    chosen = split_labels(targets, labels, seed, dataset.num_classes)
    is_unlabelled = torch.ones(len(targets), dtype=torch.bool)
    is_unlabelled[chosen] = False
    unlabelled = is_unlabelled.nonzero().flatten()
    ids_u = unlabelled[sampling.epoch_order(seed, 0, len(unlabelled), view=1)[:batch_size]]
    return images[chosen], targets[chosen], images[ids_u]


def _train(
    model: nn.Module, augment: Any, x: Tensor, y: Tensor, seed: int, steps: int, batch: int = 32
) -> None:
    """Train on augmented labelled images, each drawn twice a step."""
    engine = as_augment(augment)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    for step in range(steps):
        rows = torch.randint(len(x), (batch,))
        draws = engine.draw_batch(seed, step, rows, rows, 1)
        images = engine.build(x[rows], x[rows], draws, 1)
        loss = cross_entropy(model(images.float()), y[rows].repeat(2))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _next_step(
    mixmatch: MixMatch,
    x: Tensor,
    y: Tensor,
    u: Tensor,
    model: nn.Module,
    ids_x: Tensor | None,
    ids_u: Tensor | None,
) -> Step:
    views, step = mixmatch.num_augmentations, mixmatch.step.clone()
    guesser = model if mixmatch.teacher is None else mixmatch.teacher
    buffers = [(buffer, buffer.clone()) for buffer in guesser.buffers()]
    outputs: list[Tensor] = []
    # the guess is read off the builder's own passes: a second one would draw other dropout masks
    hook = guesser.register_forward_hook(
        lambda _module, _inputs, output: outputs.append(get_logits(output, mixmatch.logits_getter))
    )
    device = mixmatch.device
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            batch = mixmatch(x, y, u, model, ids_x=ids_x, ids_u=ids_u)
            ids = [len(x) if ids_x is None else ids_x, len(u) if ids_u is None else ids_u]
            draws = mixmatch.augment.draw_batch(mixmatch.seed, int(step), ids[0], ids[1], views)
            on_device = draws
            if isinstance(draws, AugmentParams):
                on_device = sampling.augment_to_device(draws, device)
            images = mixmatch.augment.build(x.to(device), u.to(device), on_device, views)
    finally:
        hook.remove()
        mixmatch.step = step
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)

    logits = torch.cat(outputs).view(views, len(u), mixmatch.num_classes)
    targets = functional.batch_targets(
        y.to(device),
        logits,
        mixmatch.temperature,
        label_smoothing=mixmatch.label_smoothing,
        impl=mixmatch.impl,
    )
    batch.check()
    _check_mixed("inputs", batch.inputs, images, batch)
    _check_mixed("targets", batch.targets, targets, batch)
    return Step(
        images.float().cpu(),
        targets.cpu(),
        logits.float().softmax(dim=-1).mean(dim=0).cpu(),
        draws,
        batch._replace(
            inputs=batch.inputs.float().cpu(),
            targets=batch.targets.cpu(),
            params=MixUpParams(*(tensor.cpu() for tensor in batch.params)),
        ),
    )


def _check_mixed(name: str, mixed: Tensor, rows: Tensor, batch: MixMatchBatch) -> None:
    """Raise if ``mixed`` is not what mixing ``rows`` by the batch's own draws gives."""
    if mixed.shape != rows.shape:
        raise RuntimeError(f"batch.{name} must be {list(rows.shape)}, got {list(mixed.shape)}")
    flat, got = rows.float().flatten(1), mixed.float().flatten(1)
    lam = batch.params.lam[:, None]
    wanted = lam * flat + (1 - lam) * flat[batch.params.index]
    tolerance = max(1e-5, torch.finfo(mixed.dtype).eps) * max(1.0, float(flat.abs().max()))
    errors = (got - wanted).abs().amax(dim=1)
    wrong = ~(errors <= tolerance)  # also NaN
    if wrong.any():
        raise RuntimeError(
            f"batch.{name} must be λ'·W + (1 - λ')·W[index] to {tolerance:.0e}, got a difference "
            f"of {float(errors[wrong].max()):.3g} in {int(wrong.sum())} of {len(rows)} rows: the "
            "batch was mixed with other parameters than it carries, or the augmentation engine "
            "draws something else when it is called again for the same (seed, step)"
        )


def _rows_to_show(batch: MixMatchBatch, rows: int) -> list[int]:
    """Choose rows of X', then as many of U', spread over the λ' of each, the smaller first."""
    num_labelled, length = batch.num_labelled, len(batch.inputs)
    count_x = min((rows + 1) // 2, num_labelled)
    count_u = min(rows - count_x, length - num_labelled)
    chosen = []
    for start, stop, count, offset in (
        (0, num_labelled, count_x, 0.3),
        (num_labelled, length, count_u, 0.6),
    ):
        order = batch.params.lam[start:stop].argsort(stable=True)
        places = [int((number + offset) / count * len(order)) for number in range(count)]
        chosen += [start + int(order[place]) for place in places]
    return chosen
