"""One picture of what the builder does: views, guessed and sharpened labels, mixed pairs."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gpu_mixmatch import functional, presets, sampling
from gpu_mixmatch.augment import DaliAugment, as_augment
from gpu_mixmatch.augment.weak import float_images
from gpu_mixmatch.builder import MixMatch, get_logits
from gpu_mixmatch.data.datasets import FolderData, ImageData, split_labels
from gpu_mixmatch.recipes.wideresnet import build_model
from gpu_mixmatch.types import AugmentParams, MixMatchBatch, MixUpParams

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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

MOST_NAMED = 12  # classes whose names fit on an axis
MOST_VIEWS = 6

DPI = 115
WIDTH = 13.0  # inches, like every length below
MARGIN = 0.4
CELL = 1.3  # side of an image
GAP = 0.95  # between images, where a factor stands between them
SPAN = 3 * CELL + 2 * GAP  # of a row of images
PITCH = CELL + 0.55  # from row to row: an image and three lines of caption
HEAD = 0.8  # from a section's top to the heads of its columns
BODY = 0.28  # from there to the first row
BARS = (7.45, 10.2)  # left of them stand the names of the classes
BARS_WIDTH = 2.4
CAPTION = 0.16  # from an image to the baseline of its caption
LINE = 0.14  # from there to the next
CHARACTER = 0.07  # width of one in a caption, on average

INK, GREY, FIRST, SECOND, GUESS, SHARP = (
    "#1a1a1a",
    "#5f6368",
    "#1f77b4",
    "#d9730d",
    "#9aa0a6",
    "#1a7f5a",
)


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
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('a preview needs matplotlib: pip install "gpu-mixmatch[cli]"') from error
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
        page = _Page(Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white"))
        _draw_heading(page, mixmatch, step)
        _draw_guesses(page, mixmatch, float_images(u[:guess_rows]), step, names, top=tops[0])
        _draw_pairs(page, mixmatch, step, mixed_rows, names, top=tops[1])
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


class _Step(NamedTuple):
    """What the builder's next step makes, and what it makes it of.

    Attributes:
        images: W, ``[N, C, H, W]``.
        targets: Targets of W, ``[N, L]``.
        means: Mean over the K views of the model's softmaxes, ``[M, L]``.
        draws: What the engine drew.
        batch: The batch that the builder returned.
    """

    images: Tensor
    targets: Tensor
    means: Tensor
    draws: Any
    batch: MixMatchBatch


def _next_step(
    mixmatch: MixMatch,
    x: Tensor,
    y: Tensor,
    u: Tensor,
    model: nn.Module,
    ids_x: Tensor | None,
    ids_u: Tensor | None,
) -> _Step:
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
    return _Step(
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


class _Page:
    """A figure on which lengths are inches from the top left."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.width, self.height = map(float, figure.get_size_inches())

    def text(self, left: float, top: float, text: str, size: float = 8.5, **style: Any) -> None:
        """Write one line, its baseline beginning there unless ``style`` says otherwise."""
        style = {"color": INK, "va": "baseline", **style}
        self.figure.text(left / self.width, 1 - top / self.height, text, fontsize=size, **style)

    def section(self, top: float, title: str, text: str) -> None:
        """Rule off what is above, and say what follows."""
        from matplotlib.lines import Line2D

        ends = [MARGIN / self.width, 1 - MARGIN / self.width]
        y = 1 - (top - 0.17) / self.height
        self.figure.add_artist(Line2D(ends, [y, y], color="#dadce0", linewidth=1))
        self.text(MARGIN, top + 0.15, title, 13, weight="bold")
        self.text(MARGIN, top + 0.4, text, 9.5, color=GREY)

    def head(
        self,
        left: float,
        baseline: float,
        text: str,
        *,
        color: str = INK,
        ha: str = "left",
        note: bool = False,
    ) -> None:
        """Head a column; a note stands small and grey and ends at ``left``."""
        if note:
            self.text(left, baseline, text, 8, color=GREY, ha="right", va="baseline")
        else:
            self.text(left, baseline, text, 9.5, color=color, ha=ha, va="baseline", weight="bold")

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Place axes by their upper left corner."""
        bottom = self.height - top - height
        return self.figure.add_axes(
            (
                left / self.width,
                bottom / self.height,
                width / self.width,
                height / self.height,
            )
        )

    def picture(
        self, image: Tensor, left: float, top: float, side: float, caption: str, color: str = GREY
    ) -> None:
        """Show ``image``, ``[C, H, W]`` in [0, 1], in a square of ``side``."""
        pixels = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
        small = max(image.shape[1:]) <= CELL * DPI
        axes = self.axes(left, top, side, side)
        axes.imshow(
            pixels.permute(1, 2, 0).numpy(), interpolation="nearest" if small else "antialiased"
        )
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=color, linewidth=1 if color == GREY else 2.5)
        for number, line in enumerate(caption.splitlines()):
            self.text(left, top + side + CAPTION + number * LINE, line, 8)

    def bars(
        self,
        parts: Sequence[tuple[Tensor, str]],
        left: float,
        top: float,
        names: Sequence[str] | None,
        *,
        scale: bool,
        height: float = CELL,
    ) -> None:
        """Stack distributions ``[L]``, one colour each, as horizontal bars, class 0 at the top."""
        axes = self.axes(left, top, BARS_WIDTH, height)
        num_classes = len(parts[0][0])
        start = torch.zeros(num_classes)
        for values, color in parts:
            ends = start + values
            if num_classes <= MOST_NAMED:
                axes.barh(range(num_classes), values.numpy(), 0.75, start.numpy(), color=color)
            else:  # lines of a point at least: one of 1000 classes is still seen
                thickness = max(1.0, 72 * height / num_classes)
                axes.hlines(range(num_classes), start.numpy(), ends.numpy(), color, lw=thickness)
            start = ends
        axes.set(xlim=(0, 1.001), ylim=(num_classes - 0.4, -0.6), xticks=(0, 0.5, 1))
        axes.xaxis.tick_top()
        axes.set_xticklabels(["0", "0.5", "1"] if scale else [])
        if names is None:
            axes.set_yticks([])
        elif num_classes <= MOST_NAMED:
            axes.set_yticks(range(num_classes), names)
        else:
            marks = [0, num_classes // 2, num_classes - 1]
            axes.set_yticks(marks, [f"class {number}" for number in marks])
        axes.tick_params(length=0, labelsize=7.5 if num_classes > 10 else 8, labelcolor=GREY)
        axes.grid(axis="x", color="#e8eaed", linewidth=0.8)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set(visible=side in ("left",), color=GREY)


def _draw_heading(page: _Page, mixmatch: MixMatch, step: _Step) -> None:
    batch, views = step.batch, mixmatch.num_augmentations
    page.text(MARGIN, 0.5, "How MixMatch makes its next batch", 16, weight="bold")
    facts = [
        f"{batch.num_labelled} labelled + {views} × {len(step.means)} unlabelled = "
        f"{len(batch.inputs)} rows",
        f"K = {views}",
        f"T = {mixmatch.temperature:g}",
        f"α = {mixmatch.alpha:g}",
        f"seed {mixmatch.seed}, step {int(batch.step)}",
        f"views by {type(mixmatch.augment).__name__}",
    ]
    facts += [f"mix = {mixmatch.mix}"] if mixmatch.mix != "all" else []
    facts += [] if _normalisation(mixmatch.augment) else ["contrast stretched image by image"]
    page.text(MARGIN, 0.8, "   ·   ".join(facts), 10, color=GREY)


def _draw_guesses(
    page: _Page,
    mixmatch: MixMatch,
    originals: Tensor,
    step: _Step,
    names: Sequence[str],
    *,
    top: float,
) -> None:
    views, temperature = mixmatch.num_augmentations, mixmatch.temperature
    num_labelled, num_unlabelled = step.batch.num_labelled, len(step.means)
    means = "mean of the model's softmaxes over its views" if views > 1 else "model's softmax on it"
    effect = (
        "more certain" if temperature < 1 else "less certain" if temperature > 1 else "no other"
    )
    few = f" ({MOST_VIEWS} are shown)" if views > MOST_VIEWS else ""
    page.section(
        top,
        "1   Augment, guess, sharpen",
        f"Each unlabelled image is augmented {_times(views)}{few}. The {means} is its guessed "
        f"label; sharpening with T = {temperature:g} makes it {effect}.",
    )
    columns = min(views, MOST_VIEWS) + 1
    gap = min(GAP, max(0.12, (SPAN - CELL * columns) / (columns - 1)))
    side = min(CELL, (SPAN - gap * (columns - 1)) / columns)
    lefts = [MARGIN + number * (side + gap) for number in range(columns)]
    head, body = top + HEAD, top + HEAD + BODY
    page.head(lefts[0], head, "original")
    for number, left in enumerate(lefts[1:], 1):
        page.head(left, head, f"view {number}")
    page.head(BARS[0], head, "mean of softmaxes" if views > 1 else "softmax")
    page.head(BARS[1], head, "sharpened guess")
    for left in BARS:
        page.head(left + BARS_WIDTH, head, "probability", note=True)

    for number in range(len(originals)):
        y = body + number * PITCH
        original = originals[number].float().clamp(0, 1).cpu()
        page.picture(original, lefts[0], y, side, f"unlabelled {number}")
        if gap >= 0.5:
            page.text(lefts[0] + side + gap / 2, y + side / 2, "→", 18, ha="center", va="center",
                      color=GREY)  # fmt: skip
        for view, left in enumerate(lefts[1:]):
            row = num_labelled + view * num_unlabelled + number
            drawn = _drawn(step.draws, row, mixmatch.augment) if columns <= 5 else ""
            width = int((side + gap) / CHARACTER) - 1
            lines = 3 + int((CELL - side) / LINE)
            caption = textwrap.wrap(drawn, width, max_lines=lines, placeholder=" …")
            page.picture(_shown(step.images[row], mixmatch.augment), left, y, side,
                         "\n".join(caption))  # fmt: skip
        sharpened = step.targets[num_labelled + number]
        scale = number == 0
        page.bars([(step.means[number], GUESS)], BARS[0], y, names, scale=scale)
        page.bars([(sharpened, SHARP)], BARS[1], y, None, scale=scale)
        for left, values in zip(BARS, (step.means[number], sharpened), strict=True):
            page.text(left, y + CELL + CAPTION, f"largest: {_largest(values, names)}", 8)


def _draw_pairs(
    page: _Page,
    mixmatch: MixMatch,
    step: _Step,
    rows: Sequence[int],
    names: Sequence[str],
    *,
    top: float,
) -> None:
    lam, index = step.batch.params
    lefts = [MARGIN + number * (CELL + GAP) for number in range(3)]
    middles = [left + CELL + GAP / 2 for left in lefts]
    span = (
        "λ' is one for all rows."
        if mixmatch.lam == "batch"
        else "Rows of X', then of U', each from small λ' to large."
    )
    page.section(
        top,
        "2   MixUp",
        "Each row is blended with a partner from the shuffled batch: λ' · row + (1 − λ') · "
        f"partner, images and targets alike. {span}",
    )
    head, body = top + HEAD, top + HEAD + BODY
    page.head(lefts[0], head, "row", color=FIRST)
    page.head(middles[0], head, "λ'", color=FIRST, ha="center")
    page.head(lefts[1], head, "its partner", color=SECOND)
    page.head(middles[1], head, "1 − λ'", color=SECOND, ha="center")
    page.head(lefts[2], head, "mixed image")
    page.head(BARS[0], head, "mixed target")
    page.head(BARS[0] + BARS_WIDTH, head, "probability", note=True)
    page.head(BARS[1], head, "its two largest classes")

    for number, row in enumerate(rows):
        y = body + number * PITCH
        partner, weight = int(index[row]), float(lam[row])
        for left, source, color in ((lefts[0], row, FIRST), (lefts[1], partner, SECOND)):
            image = _shown(step.images[source], mixmatch.augment)
            page.picture(image, left, y, CELL, _origin(step, source, names), color)
        part = "X'" if row < step.batch.num_labelled else "U'"
        mixed = _shown(step.batch.inputs[row], mixmatch.augment)
        page.picture(mixed, lefts[2], y, CELL, f"row {row} of the batch, in {part}", INK)
        for middle, factor, sign, color in (
            (middles[0], weight, "+", FIRST),
            (middles[1], 1 - weight, "=", SECOND),
        ):
            page.text(middle, y + 0.6, f"× {factor:.2f}", 13, ha="center", color=color)
            page.text(middle, y + 0.88, sign, 15, ha="center", color=GREY)
        target = step.batch.targets[row]
        own = weight * step.targets[row]
        parts = [(own, FIRST), ((target - own).clamp_min(0), SECOND)]
        page.bars(parts, BARS[0], y, names, scale=number == 0)
        values, labels = target.topk(min(2, len(target)))
        for line, (value, label) in enumerate(zip(values.tolist(), labels.tolist(), strict=True)):
            page.text(BARS[1], y + 0.57 + 0.3 * line, f"{value:.2f}", 13, weight="bold")
            page.text(BARS[1] + 0.55, y + 0.57 + 0.3 * line, names[label], 13)


def _shown(image: Tensor, augment: Any) -> Tensor:
    """Undo the normalisation of ``image``, ``[C, H, W]``, or stretch it to [0, 1] if unknown."""
    normalisation = _normalisation(augment)
    if normalisation is None:
        low, high = image.min(), image.max()
        return (image - low) / (high - low).clamp_min(1e-12)
    mean, std = (torch.as_tensor(values).float().cpu().view(-1, 1, 1) for values in normalisation)
    return (image * std + mean).clamp(0, 1)


def _policy(augment: Any) -> Any:
    """The engine itself, or the one whose policy it runs."""
    return augment.weak if isinstance(augment, DaliAugment) else augment


def _normalisation(augment: Any) -> tuple[Any, Any] | None:
    augment = _policy(augment)
    mean, std = getattr(augment, "mean", None), getattr(augment, "std", None)
    return None if mean is None or std is None else (mean, std)


def _drawn(draws: Any, row: int, augment: Any) -> str:
    """Say in a few words what was drawn for a view, as far as the engine's draws tell."""
    if not isinstance(draws, AugmentParams):
        return ""
    words = []
    padding = getattr(_policy(augment), "padding", 0)
    down, right = padding - int(draws.top[row]), padding - int(draws.left[row])
    if padding:
        moves = [f"{'↓' if down > 0 else '↑'}{abs(down)}"] if down else []
        moves += [f"{'→' if right > 0 else '←'}{abs(right)}"] if right else []
        words.append(f"moved {' '.join(moves)} px" if moves else "not moved")
    words += ["mirrored"] if int(draws.flip[row]) else []
    cut = draws.zoom[row].tolist()
    words += [f"cut {' '.join(map(str, cut))} px"] if any(cut) else []
    words += [f"blur {float(draws.sigma[row]):.1f} px"] if float(draws.sigma[row]) else []
    # a no-break space keeps each of them on one line
    return ", ".join(word.replace(" ", "\N{NO-BREAK SPACE}") for word in words)


def _origin(step: _Step, row: int, names: Sequence[str]) -> str:
    """Say which image a row of W is, and what its target is before mixing."""
    target = step.targets[row]
    if row < step.batch.num_labelled:
        certain = float(target.max()) == 1
        label = names[int(target.argmax())] if certain else _largest(target, names)
        return f"labelled {row}\nlabel: {label}"
    view, number = divmod(row - step.batch.num_labelled, len(step.means))
    return f"unlabelled {number}, view {view + 1}\nguess: {_largest(target, names)}"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _largest(values: Tensor, names: Sequence[str]) -> str:
    label = int(values.argmax())
    return f"{names[label]} ({float(values[label]):.2f})"
