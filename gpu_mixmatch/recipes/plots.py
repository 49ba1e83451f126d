"""How all plots look: on no ground of their own, in middle tones, so that they read on any page."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpu_mixmatch._extras import need

INK = "#7d7d7d"  # as far from white as from a dark page
OURS = "#3f8fd2"
THEIRS = "#d9902f"
THIRD = "#4aa37c"
BOUND = "#a3a3a3"  # what no contender can pass
MANY = (OURS, THEIRS, THIRD, "#c2559d", "#8a6fd1", "#a9803b", "#d0524a", "#3aa6a6", "#7d9a2f")
_STYLE: Any = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.prop_cycle": f"cycler('color', {[OURS, THEIRS, THIRD]})",
    "grid.color": INK,
    "grid.alpha": 0.25,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
}


@contextmanager
def picture(path: Path, width: float, height: float, headline: str) -> Iterator[Any]:
    """Give a figure to draw on, with a headline, and write it as a PNG at the end.

    Args:
        path: The file.
        width, height: In inches.
        headline: What the picture shows, as a sentence would say it.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    need("matplotlib", "drawing")
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # type: ignore[union-attr, call-arg]
        figure.suptitle(headline, x=0.01, ha="left", fontsize=13, fontweight="bold")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
