"""MixMatch batches for PyTorch, built where the model is.

Importing the package loads torch and numpy only.
"""

from gpu_mixmatch import functional, presets, sampling
from gpu_mixmatch.augment import Augment, WeakAugment, as_augment
from gpu_mixmatch.builder import MixMatch, interleaved_forward
from gpu_mixmatch.loss import MixMatchLoss
from gpu_mixmatch.types import AugmentParams, LossOutput, MixMatchBatch, MixUpParams

__version__ = "0.1.0"

__all__ = [
    "Augment",
    "AugmentParams",
    "LossOutput",
    "MixMatch",
    "MixMatchBatch",
    "MixMatchLoss",
    "MixUpParams",
    "WeakAugment",
    "as_augment",
    "functional",
    "interleaved_forward",
    "presets",
    "sampling",
]
