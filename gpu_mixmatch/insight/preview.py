"""The preview of a builder's next batch: views, guesses and mixed pairs in one picture."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gpu_mixmatch._extras import need
from gpu_mixmatch._validation import as_flag, as_integer, came, check_images_alike, check_kind
from gpu_mixmatch.augment.base import complete, float_images
from gpu_mixmatch.insight.canvas import DPI, MOST_NAMED, ROW_PITCH, TO_HEADS, TO_ROWS, WIDTH, Page
from gpu_mixmatch.insight.next_step import next_step, next_views
from gpu_mixmatch.insight.page import draw_guesses, draw_heading, draw_pairs, place_views
from gpu_mixmatch.insight.page_of_views import (
    draw_heading_of_views,
    draw_labelled,
    draw_views,
    place_weak_and_strong,
)
from gpu_mixmatch.methods.consistency import Consistency
from gpu_mixmatch.methods.mixmatch import MixMatch
from gpu_mixmatch.types import MixMatchBatch

MOST_PREVIEWED = 1000  # rows of a picture


def draw_preview(
    mixmatch: MixMatch | Consistency,
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
    one_pass: bool = False,
) -> Path:
    """Draw the batch that ``mixmatch`` would build next, and how it is made, as a PNG.

    The builder itself makes the batch. The picture is drawn only if the views, guesses and pairs
    that it shows give that batch again. The builder's step, what it has learnt of guesses, the
    model's buffers and torch's generators are left as they were, so that training goes on as
    without a preview.

    Of `MixMatch` it shows views, guesses and mixed pairs; of `FixMatch` and its kin weak and strong
    views, guesses, targets and their weights.

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
        one_pass: Whether the model guesses on all views at once, as where the loss guesses.

    Returns:
        ``path``.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``rows`` or ``class_names`` do not fit, or the builder refuses the batch.
        RuntimeError: If the batch is not what its parts give, for instance because the engine
            does not draw the same for the same (seed, step).
    """
    need("matplotlib", "a preview")
    import matplotlib.style
    from matplotlib.figure import Figure

    kinds = (MixMatch, Consistency)
    check_kind("mixmatch", mixmatch, kinds, "a builder such as MixMatch or FixMatch")
    if as_flag("one_pass", one_pass) and isinstance(mixmatch, MixMatch):
        raise ValueError("one_pass must be False for MixMatch, which guesses first, got True")
    check_kind("model", model, nn.Module, "an nn.Module")
    check_kind("path", path, (str, PathLike), "a path")
    path = Path(path)
    if not path.name:
        raise ValueError(f"path must name a file, got {str(path)!r}")
    rows = as_integer("rows", rows, least=1, most=MOST_PREVIEWED)
    class_names = as_class_names(class_names, mixmatch.num_classes)
    check_images_alike(x, u)
    if class_names is None:
        prefix = "" if mixmatch.num_classes <= MOST_NAMED else "class "
        class_names = [f"{prefix}{number}" for number in range(mixmatch.num_classes)]
    names = [name if len(name) <= 14 else f"{name[:13]}…" for name in map(str, class_names)]
    layout = complete(next(iter(mixmatch.engines.values()))).layout
    # a user's own style may be dark, and names of classes may hold dollar signs
    style = matplotlib.style.context(["default", {"text.parse_math": False}])
    section = TO_HEADS + TO_ROWS + 0.35

    def page_of(first: int, second: int, pitch: float) -> tuple[Page, tuple[float, float]]:
        """A page with room for so many rows in each of its two sections, and where these begin."""
        tops = 1.25, 1.25 + section + pitch * first
        height = tops[1] + TO_HEADS + TO_ROWS + ROW_PITCH * second + 0.1
        return Page(Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")), tops

    if isinstance(mixmatch, Consistency):
        views = next_views(mixmatch, x, y, u, model, ids_x, ids_u, one_pass=one_pass)
        shown_u, shown_x = min(rows, len(views.guesses)), min(rows, views.num_labelled)
        path.parent.mkdir(parents=True, exist_ok=True)
        with style:
            originals = float_images(u[:shown_u], layout)
            places = place_weak_and_strong(mixmatch, views, originals)
            page, (top, next_top) = page_of(shown_u, shown_x, places.pitch)
            draw_heading_of_views(page, mixmatch, views)
            draw_views(page, mixmatch, originals, views, places, names, top=top)
            images = float_images(x[:shown_x], layout)
            draw_labelled(page, mixmatch, images, views, names, top=next_top)
            page.figure.savefig(path, format="png")
        return path
    step = next_step(mixmatch, x, y, u, model, ids_x, ids_u)
    path.parent.mkdir(parents=True, exist_ok=True)
    with style:
        guess_rows = min(rows, len(step.means))
        mixed_rows = _rows_to_show(step.batch, rows)
        originals = float_images(u[:guess_rows], layout)
        places = place_views(mixmatch, step, originals)
        page, (top, next_top) = page_of(guess_rows, len(mixed_rows), places.pitch)
        draw_heading(page, mixmatch, step)
        draw_guesses(page, mixmatch, originals, step, places, names, top=top)
        draw_pairs(page, mixmatch, step, mixed_rows, names, top=next_top)
        page.figure.savefig(path, format="png")
    return path


def as_class_names(class_names: Any, num_classes: int | None = None) -> Sequence[str] | None:
    """Return names of L classes, or None; L is not looked at where it is None.

    Raises:
        TypeError: If they are no names.
        ValueError: If they are not L.
    """
    if class_names is None:
        return None
    if not isinstance(class_names, Sequence) or isinstance(class_names, str | bytes):
        raise TypeError(f"class_names must be a list of names, got {came(class_names)}")
    if num_classes is not None and len(class_names) != num_classes:
        raise ValueError(
            f"class_names must hold num_classes = {num_classes} names, got {len(class_names)}"
        )
    return class_names


def _rows_to_show(batch: MixMatchBatch, rows: int) -> list[int]:
    """Choose rows of X', then as many of U'; in each, from small λ' to large."""
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
