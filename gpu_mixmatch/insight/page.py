"""The page that a preview is drawn on, and what stands on it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gpu_mixmatch.augment import DaliAugment
from gpu_mixmatch.methods.mixmatch import MixMatch
from gpu_mixmatch.types import AugmentParams, MixMatchBatch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


class Step(NamedTuple):
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


class Page:
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


def draw_heading(page: Page, mixmatch: MixMatch, step: Step) -> None:
    """Draw what kind of batch it is."""
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


def draw_guesses(
    page: Page,
    mixmatch: MixMatch,
    originals: Tensor,
    step: Step,
    names: Sequence[str],
    *,
    top: float,
) -> None:
    """Draw unlabelled images, their views, the guess and its sharpening."""
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


def draw_pairs(
    page: Page,
    mixmatch: MixMatch,
    step: Step,
    rows: Sequence[int],
    names: Sequence[str],
    *,
    top: float,
) -> None:
    """Draw rows of the batch, the pairs that they are mixed of, and their targets."""
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


def _origin(step: Step, row: int, names: Sequence[str]) -> str:
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
