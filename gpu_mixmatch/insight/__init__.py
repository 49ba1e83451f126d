"""Look into a builder while it trains: how good its guesses are, and pictures of its batches.

`GuessWatch` and `TensorBoardInsight` attach to the builder, of any method, so that they work in any
trainer. They see its calls, ``mixmatch(x, y, u, model)``, but neither ``from_views`` nor captured
graphs.
"""

from gpu_mixmatch.insight.guesses import GuessQuality, GuessWatch, WeighedGuessQuality
from gpu_mixmatch.insight.preview import draw_preview
from gpu_mixmatch.insight.tensorboard import TensorBoardInsight

__all__ = [
    "GuessQuality",
    "GuessWatch",
    "TensorBoardInsight",
    "WeighedGuessQuality",
    "draw_preview",
]
