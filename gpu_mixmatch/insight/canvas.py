"""The page that a preview is drawn on: lengths in inches, text, pictures and bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NAMED = 12  # classes whose names fit on an axis
MOST_VIEWS = 6  # of an image, to be shown
MOST_CAPTIONED = 5  # images of a row that leave room for words below them
DPI = 115

# Lengths in inches
WIDTH = 13.0  # of the page
MARGIN = 0.4
IMAGE_SIDE = 1.3
IMAGE_GAP = 0.95  # between images, where a factor stands between them
ROW_WIDTH = 3 * IMAGE_SIDE + 2 * IMAGE_GAP  # of a row's images
ROW_PITCH = IMAGE_SIDE + 0.55  # from row to row, at least: an image and three lines of caption
TO_HEADS = 0.8  # from a section's top to the heads of its columns
TO_ROWS = 0.28  # from there to the first row
BARS_LEFT = (7.45, 10.2)  # of the two columns of bars; names of classes stand to the left
BARS_WIDTH = 2.4
TO_CAPTION = 0.16  # from an image to the baseline of its caption
LINE_HEIGHT = 0.14  # of a caption
CHARACTER_WIDTH = 0.07  # in a caption, on average

INK = "#1a1a1a"
GREY = "#5f6368"
ROW_COLOR = "#1f77b4"
PARTNER_COLOR = "#d9730d"
GUESS_COLOR = "#9aa0a6"
SHARPENED_COLOR = "#1a7f5a"


class Page:
    """A figure on which lengths are inches from the top left."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.width, self.height = map(float, figure.get_size_inches())

    def text(self, left: float, top: float, text: str, size: float = 8.5, **style: Any) -> None:
        """Write one line; its baseline begins there unless ``style`` says otherwise."""
        style = {"color": INK, "va": "baseline", **style}
        self.figure.text(left / self.width, 1 - top / self.height, text, fontsize=size, **style)

    def section(self, top: float, title: str, text: str) -> None:
        """Begin a section with a rule, a title and a line of text."""
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
        """Write the head of a column; a note is small and grey, and ends at ``left``."""
        if note:
            self.text(left, baseline, text, 8, color=GREY, ha="right", va="baseline")
        else:
            self.text(left, baseline, text, 9.5, color=color, ha=ha, va="baseline", weight="bold")

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Add axes, placed by their upper left corner."""
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
        small = max(image.shape[1:]) <= IMAGE_SIDE * DPI
        axes = self.axes(left, top, side, side)
        axes.imshow(
            pixels.permute(1, 2, 0).numpy(), interpolation="nearest" if small else "antialiased"
        )
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=color, linewidth=1 if color == GREY else 2.5)
        for number, line in enumerate(caption.splitlines()):
            self.text(left, top + side + TO_CAPTION + number * LINE_HEIGHT, line, 8)

    def bars(
        self,
        parts: Sequence[tuple[Tensor, str]],
        left: float,
        top: float,
        names: Sequence[str] | None,
        *,
        scale: bool,
        height: float = IMAGE_SIDE,
    ) -> None:
        """Stack distributions ``[L]``, one colour each, as horizontal bars, class 0 at the top."""
        axes = self.axes(left, top, BARS_WIDTH, height)
        num_classes = len(parts[0][0])
        start = torch.zeros(num_classes, dtype=torch.float32, device="cpu")
        for values, color in parts:
            ends = start + values
            if num_classes <= MOST_NAMED:
                axes.barh(range(num_classes), values.numpy(), 0.75, start.numpy(), color=color)
            else:  # at least a point wide, so that one of 1000 classes is still seen
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
            spine.set(visible=side == "left", color=GREY)
