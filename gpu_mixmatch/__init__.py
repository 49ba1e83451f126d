"""MixMatch batches for PyTorch, built where the model is.

Importing the package loads torch and numpy only.
"""

from gpu_mixmatch import sampling
from gpu_mixmatch.types import AugmentParams, LossOutput, MixMatchBatch, MixUpParams

__version__ = "0.1.0"

__all__ = ["AugmentParams", "LossOutput", "MixMatchBatch", "MixUpParams", "sampling"]
