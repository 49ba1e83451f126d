"""What stands on the page of a preview of weak and strong views: guesses, targets and weights."""

from collections.abc import Sequence

from torch import Tensor

from gpu_mixmatch.augment.base import complete
from gpu_mixmatch.insight.canvas import (
    BARS_LEFT,
    BARS_WIDTH,
    GREY,
    GUESS_COLOR,
    IMAGE_GAP,
    IMAGE_SIDE,
    MARGIN,
    MOST_VIEWS,
    PARTNER_COLOR,
    ROW_COLOR,
    ROW_PITCH,
    SHARPENED_COLOR,
    TO_CAPTION,
    TO_HEADS,
    TO_ROWS,
    Page,
)
from gpu_mixmatch.insight.captions import caption
from gpu_mixmatch.insight.next_step import NextViews
from gpu_mixmatch.insight.page import Views, displayable, largest_class, placed
from gpu_mixmatch.methods.consistency import Consistency


def draw_heading_of_views(page: Page, builder: Consistency, views: NextViews) -> None:
    """Write what kind of batch it is."""
    num_u, strong = len(views.guesses), builder.num_strong
    kept = int((views.weights[-num_u:] > 0).sum())
    page.text(MARGIN, 0.5, f"How {type(builder).__name__} makes its next batch", 16, weight="bold")
    target = "hard targets" if builder.temperature is None else f"T = {builder.temperature:g}"
    weak, strong_name = (type(engine).__name__ for engine in (builder.weak, builder.strong))
    facts = [
        f"{views.num_labelled} labelled + {strong} × {num_u} strong = {len(views.targets)} rows",
        f"{kept} of {num_u} guesses kept",
        target,
        f"seed {builder.seed}, step {views.step}",
        f"views by {weak}" if weak == strong_name else f"views by {weak} and {strong_name}",
    ]
    if complete(builder.weak).normalisation is None:
        facts.append("contrast stretched image by image")
    page.text(MARGIN, 0.8, "   ·   ".join(facts), 10, color=GREY)


def place_weak_and_strong(builder: Consistency, views: NextViews, originals: Tensor) -> Views:
    """Find room for images with their weak view and their strong ones, and for the captions."""
    sizes = originals.shape[-2:], views.images.shape[-2:]
    num_u = len(views.guesses)

    def caption_of(number: int, view: int, width: int) -> str:
        if view == 0:
            return caption(views.weak_draws, number, builder.weak, *sizes, width)
        row = (view - 1) * num_u + number
        return caption(views.strong_draws, row, builder.strong, *sizes, width)

    return placed(builder.num_strong + 1, len(originals), caption_of)


def draw_views(
    page: Page,
    builder: Consistency,
    originals: Tensor,
    views: NextViews,
    places: Views,
    names: Sequence[str],
    *,
    top: float,
) -> None:
    """Draw unlabelled images with their views, the guess, the target and its weight."""
    strong, num_u = builder.num_strong, len(views.guesses)
    page.section(
        top,
        "1   Guess on the weak view, train the strong ones",
        f"What counts, and how much, is said by {builder.threshold}. A guess that is left out "
        "stays in the mean, with weight 0.",
    )
    columns = min(strong + 1, MOST_VIEWS) + 1
    side, gap, pitch, captions = places
    lefts = [MARGIN + number * (side + gap) for number in range(columns)]
    head, body = top + TO_HEADS, top + TO_HEADS + TO_ROWS
    page.head(lefts[0], head, "original")
    page.head(lefts[1], head, "weak view", color=ROW_COLOR)
    for number, left in enumerate(lefts[2:], 1):
        text = "strong view" if strong == 1 else f"strong {number}"
        page.head(left, head, text, color=PARTNER_COLOR)
    _bar_heads(page, head, "softmax on the weak view", "target of the strong ones")
    last_strong = views.num_labelled + strong * num_u

    for number in range(len(originals)):
        y = body + number * pitch
        original = originals[number].float().clamp(0, 1).cpu()
        page.picture(original, lefts[0], y, side, f"unlabelled {number}")
        # in the order of the columns: the weak view stands behind the strong ones in the batch
        rows = [last_strong + number]
        rows += [views.num_labelled + view * num_u + number for view in range(columns - 2)]
        engines = [builder.weak] + [builder.strong] * (columns - 2)
        for view, (left, row, engine) in enumerate(zip(lefts[1:], rows, engines, strict=True)):
            color = PARTNER_COLOR if view else ROW_COLOR
            image = displayable(views.images[row], engine)
            page.picture(image, left, y, side, captions[number][view], color)
        row = views.num_labelled + number
        weight, target = float(views.weights[row]), views.targets[row]
        scale = number == 0
        page.bars([(views.guesses[number], GUESS_COLOR)], BARS_LEFT[0], y, names, scale=scale)
        page.bars([(target, SHARPENED_COLOR if weight else GUESS_COLOR)], BARS_LEFT[1], y, None,
                  scale=scale)  # fmt: skip
        below = y + IMAGE_SIDE + TO_CAPTION
        page.text(BARS_LEFT[0], below, f"largest: {largest_class(views.guesses[number], names)}", 8)
        said = f"weight {weight:.2f}" if weight else "left out: weight 0"
        page.text(BARS_LEFT[1], below, said, 8, weight="bold" if weight else "normal")


def draw_labelled(
    page: Page,
    builder: Consistency,
    originals: Tensor,
    views: NextViews,
    names: Sequence[str],
    *,
    top: float,
) -> None:
    """Draw labelled images with their view and target."""
    page.section(
        top,
        "2   Labelled images",
        "Each is augmented once, and counts with weight 1. "
        + ("Its view is a strong one." if builder.strong_x else "Its view is a weak one."),
    )
    head, body = top + TO_HEADS, top + TO_HEADS + TO_ROWS
    left = MARGIN + IMAGE_SIDE + IMAGE_GAP
    page.head(MARGIN, head, "original")
    page.head(left, head, "view", color=ROW_COLOR)
    page.head(BARS_LEFT[0], head, "target")
    page.head(BARS_LEFT[0] + BARS_WIDTH, head, "probability", note=True)
    engine = builder.strong if builder.strong_x else builder.weak
    for number in range(len(originals)):
        y = body + number * ROW_PITCH
        original = originals[number].float().clamp(0, 1).cpu()
        page.picture(original, MARGIN, y, IMAGE_SIDE, f"labelled {number}")
        view = displayable(views.images[number], engine)
        page.picture(view, left, y, IMAGE_SIDE, f"row {number} of the batch", ROW_COLOR)
        target = views.targets[number]
        page.bars([(target, SHARPENED_COLOR)], BARS_LEFT[0], y, names, scale=number == 0)
        below = y + IMAGE_SIDE + TO_CAPTION
        certain = float(target.max()) == 1
        label = names[int(target.argmax())] if certain else largest_class(target, names)
        page.text(BARS_LEFT[0], below, f"label: {label}", 8)


def _bar_heads(page: Page, head: float, first: str, second: str) -> None:
    for left, text in zip(BARS_LEFT, (first, second), strict=True):
        page.head(left, head, text)
