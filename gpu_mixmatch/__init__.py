"""MixMatch batches for PyTorch, built where the model is.

Importing the package loads torch and numpy only.
"""

from gpu_mixmatch import functional, presets, sampling
from gpu_mixmatch._version import __version__
from gpu_mixmatch.augment import (
    Augment,
    ColorJitter,
    DaliAugment,
    KorniaAugment,
    RandAugment,
    WeakAugment,
    as_augment,
)
from gpu_mixmatch.capture import capture
from gpu_mixmatch.data import (
    DaliLoader,
    ImageFiles,
    Indexed,
    ResidentLoader,
    SemiSupervisedLoader,
    check_images,
    collate,
)
from gpu_mixmatch.losses import MixMatchLoss
from gpu_mixmatch.methods.mixmatch import MixMatch
from gpu_mixmatch.methods.passes import interleaved_forward
from gpu_mixmatch.types import (
    AugmentParams,
    ChainParams,
    LossOutput,
    MixMatchBatch,
    MixUpParams,
    SemiSupervisedBatch,
)

__all__ = [
    "Augment",
    "AugmentParams",
    "ChainParams",
    "ColorJitter",
    "DaliAugment",
    "DaliLoader",
    "ImageFiles",
    "Indexed",
    "KorniaAugment",
    "LossOutput",
    "MixMatch",
    "MixMatchBatch",
    "MixMatchLoss",
    "MixUpParams",
    "RandAugment",
    "ResidentLoader",
    "SemiSupervisedBatch",
    "SemiSupervisedLoader",
    "WeakAugment",
    "__version__",
    "as_augment",
    "capture",
    "check_images",
    "collate",
    "functional",
    "interleaved_forward",
    "presets",
    "sampling",
]
