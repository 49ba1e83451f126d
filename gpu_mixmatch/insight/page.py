"""What stands on the page of a preview: its heading, the guesses, and the mixed pairs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_mixmatch.augment.base import complete
from gpu_mixmatch.insight.canvas import (
    BARS_LEFT,
    BARS_WIDTH,
    CHARACTER_WIDTH,
    GREY,
    GUESS_COLOR,
    IMAGE_GAP,
    IMAGE_SIDE,
    INK,
    LINE_HEIGHT,
    MARGIN,
    MOST_CAPTIONED,
    MOST_VIEWS,
    PARTNER_COLOR,
    ROW_COLOR,
    ROW_PITCH,
    ROW_WIDTH,
    SHARPENED_COLOR,
    TO_CAPTION,
    TO_HEADS,
    TO_ROWS,
    Page,
)
from gpu_mixmatch.insight.captions import caption
from gpu_mixmatch.insight.next_step import NextStep
from gpu_mixmatch.methods.mixmatch import MixMatch


class Views(NamedTuple):
    """How the images of the first section stand.

    Attributes:
        side: Of an image, in inches.
        gap: Between images.
        pitch: From row to row.
        captions: Below the views, by image and view.
    """

    side: float
    gap: float
    pitch: float
    captions: list[list[str]]


def place_views(mixmatch: MixMatch, step: NextStep, originals: Tensor) -> Views:
    """Find room for images with their views, and for all that is written below these."""
    sizes = originals.shape[-2:], step.images.shape[-2:]

    def caption_of(number: int, view: int, width: int) -> str:
        row = step.batch.num_labelled + view * len(step.means) + number
        return caption(step.draws, row, mixmatch.augment, *sizes, width)

    return placed(mixmatch.num_augmentations, len(originals), caption_of)


def placed(views: int, images: int, caption_of: Callable[[int, int, int], str]) -> Views:
    """Find room for rows of an image with its views.

    Args:
        views: Of an image.
        images: How many there are.
        caption_of: Says what stands below a view, of image, view and the characters of a line.
    """
    columns = min(views, MOST_VIEWS) + 1
    gap = min(IMAGE_GAP, max(0.12, (ROW_WIDTH - IMAGE_SIDE * columns) / (columns - 1)))
    side = min(IMAGE_SIDE, (ROW_WIDTH - gap * (columns - 1)) / columns)
    width = int((side + gap - 0.06) / CHARACTER_WIDTH)
    captions = [[""] * views for _ in range(images)]
    if columns <= MOST_CAPTIONED:
        for number, of_image in enumerate(captions):
            for view in range(views):
                of_image[view] = caption_of(number, view, width)
    lines = max(text.count("\n") for of_image in captions for text in of_image)
    pitch = max(ROW_PITCH, side + TO_CAPTION + lines * LINE_HEIGHT + 0.11)
    return Views(side, gap, pitch, captions)


def draw_heading(page: Page, mixmatch: MixMatch, step: NextStep) -> None:
    """Write what kind of batch it is."""
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
    if complete(mixmatch.augment).normalisation is None:
        facts.append("contrast stretched image by image")
    page.text(MARGIN, 0.8, "   ·   ".join(facts), 10, color=GREY)


def draw_guesses(
    page: Page,
    mixmatch: MixMatch,
    originals: Tensor,
    step: NextStep,
    places: Views,
    names: Sequence[str],
    *,
    top: float,
) -> None:
    """Draw unlabelled images with their views, the guess, and the sharpened guess."""
    views, temperature = mixmatch.num_augmentations, mixmatch.temperature
    num_labelled, num_unlabelled = step.batch.num_labelled, len(step.means)
    means = "mean of the model's softmaxes over its views" if views > 1 else "model's softmax on it"
    effect = (
        "more certain" if temperature < 1 else "less certain" if temperature > 1 else "no other"
    )
    times = {1: "once", 2: "twice"}.get(views, f"{views} times")
    times += f" ({MOST_VIEWS} are shown)" if views > MOST_VIEWS else ""
    page.section(
        top,
        "1   Augment, guess, sharpen",
        f"Each unlabelled image is augmented {times}. The {means} is its guessed label; "
        f"sharpening with T = {temperature:g} makes it {effect}.",
    )
    side, gap, pitch, captions = places
    columns = min(views, MOST_VIEWS) + 1
    lefts = [MARGIN + number * (side + gap) for number in range(columns)]
    head, body = top + TO_HEADS, top + TO_HEADS + TO_ROWS
    page.head(lefts[0], head, "original")
    for number, left in enumerate(lefts[1:], 1):
        page.head(left, head, f"view {number}")
    page.head(BARS_LEFT[0], head, "mean of softmaxes" if views > 1 else "softmax")
    page.head(BARS_LEFT[1], head, "sharpened guess")
    for left in BARS_LEFT:
        page.head(left + BARS_WIDTH, head, "probability", note=True)

    for number in range(len(originals)):
        y = body + number * pitch
        original = originals[number].float().clamp(0, 1).cpu()
        page.picture(original, lefts[0], y, side, f"unlabelled {number}")
        if gap >= 0.5:
            page.text(lefts[0] + side + gap / 2, y + side / 2, "→", 18, ha="center", va="center",
                      color=GREY)  # fmt: skip
        for view, left in enumerate(lefts[1:]):
            row = num_labelled + view * num_unlabelled + number
            page.picture(displayable(step.images[row], mixmatch.augment), left, y, side,
                         captions[number][view])  # fmt: skip
        sharpened = step.targets[num_labelled + number]
        scale = number == 0
        page.bars([(step.means[number], GUESS_COLOR)], BARS_LEFT[0], y, names, scale=scale)
        page.bars([(sharpened, SHARPENED_COLOR)], BARS_LEFT[1], y, None, scale=scale)
        for left, values in zip(BARS_LEFT, (step.means[number], sharpened), strict=True):
            largest = f"largest: {largest_class(values, names)}"
            page.text(left, y + IMAGE_SIDE + TO_CAPTION, largest, 8)


def draw_pairs(
    page: Page,
    mixmatch: MixMatch,
    step: NextStep,
    rows: Sequence[int],
    names: Sequence[str],
    *,
    top: float,
) -> None:
    """Draw rows of the batch, the pairs that they are mixed from, and their targets."""
    lam, index = step.batch.params
    lefts = [MARGIN + number * (IMAGE_SIDE + IMAGE_GAP) for number in range(3)]
    middles = [left + IMAGE_SIDE + IMAGE_GAP / 2 for left in lefts]
    note = (
        "λ' is one for all rows."
        if mixmatch.lam == "batch"
        else "Rows of X', then of U', each from small λ' to large."
    )
    page.section(
        top,
        "2   MixUp",
        "Each row is blended with a partner from the shuffled batch: λ' · row + (1 − λ') · "
        f"partner, images and targets alike. {note}",
    )
    head, body = top + TO_HEADS, top + TO_HEADS + TO_ROWS
    page.head(lefts[0], head, "row", color=ROW_COLOR)
    page.head(middles[0], head, "λ'", color=ROW_COLOR, ha="center")
    page.head(lefts[1], head, "its partner", color=PARTNER_COLOR)
    page.head(middles[1], head, "1 − λ'", color=PARTNER_COLOR, ha="center")
    page.head(lefts[2], head, "mixed image")
    page.head(BARS_LEFT[0], head, "mixed target")
    page.head(BARS_LEFT[0] + BARS_WIDTH, head, "probability", note=True)
    page.head(BARS_LEFT[1], head, "its two largest classes")

    for number, row in enumerate(rows):
        y = body + number * ROW_PITCH
        partner, weight = int(index[row]), float(lam[row])
        for left, source, color in ((lefts[0], row, ROW_COLOR), (lefts[1], partner, PARTNER_COLOR)):
            image = displayable(step.images[source], mixmatch.augment)
            page.picture(image, left, y, IMAGE_SIDE, _row_caption(step, source, names), color)
        part = "X'" if row < step.batch.num_labelled else "U'"
        mixed = displayable(step.batch.inputs[row], mixmatch.augment)
        page.picture(mixed, lefts[2], y, IMAGE_SIDE, f"row {row} of the batch, in {part}", INK)
        for middle, factor, sign, color in (
            (middles[0], weight, "+", ROW_COLOR),
            (middles[1], 1 - weight, "=", PARTNER_COLOR),
        ):
            page.text(middle, y + 0.6, f"× {factor:.2f}", 13, ha="center", color=color)
            page.text(middle, y + 0.88, sign, 15, ha="center", color=GREY)
        target = step.batch.targets[row]
        own = weight * step.targets[row]
        parts = [(own, ROW_COLOR), ((target - own).clamp_min(0), PARTNER_COLOR)]
        page.bars(parts, BARS_LEFT[0], y, names, scale=number == 0)
        values, labels = target.topk(min(2, len(target)))
        for line, (value, label) in enumerate(zip(values.tolist(), labels.tolist(), strict=True)):
            page.text(BARS_LEFT[1], y + 0.57 + 0.3 * line, f"{value:.2f}", 13, weight="bold")
            page.text(BARS_LEFT[1] + 0.55, y + 0.57 + 0.3 * line, names[label], 13)


def displayable(image: Tensor, augment: Any) -> Tensor:
    """Undo the normalisation of ``image``, ``[C, H, W]``; if it is unknown, stretch to [0, 1]."""
    normalisation = complete(augment).normalisation
    if normalisation is None:
        low, high = image.min(), image.max()
        return (image - low) / (high - low).clamp_min(1e-12)
    mean, std = (torch.as_tensor(values).float().cpu().view(-1, 1, 1) for values in normalisation)
    return (image * std + mean).clamp(0, 1)


def _row_caption(step: NextStep, row: int, names: Sequence[str]) -> str:
    """Say which image a row of W is, and what its target was before mixing."""
    target = step.targets[row]
    if row < step.batch.num_labelled:
        certain = float(target.max()) == 1
        label = names[int(target.argmax())] if certain else largest_class(target, names)
        return f"labelled {row}\nlabel: {label}"
    view, number = divmod(row - step.batch.num_labelled, len(step.means))
    return f"unlabelled {number}, view {view + 1}\nguess: {largest_class(target, names)}"


def largest_class(values: Tensor, names: Sequence[str]) -> str:
    """Name the most probable class, and how probable it is."""
    label = int(values.argmax())
    return f"{names[label]} ({float(values[label]):.2f})"
