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
from gpu_mixmatch.losses import ConsistencyLoss, MixMatchLoss
from gpu_mixmatch.methods import (
    UDA,
    Consistency,
    DistributionAlignment,
    FixedThreshold,
    FixMatch,
    FlexMatch,
    FlexThreshold,
    FreeMatch,
    FreeThreshold,
    MeanTeacher,
    MixMatch,
    SoftMatch,
    SoftThreshold,
    interleaved_forward,
)
from gpu_mixmatch.types import (
    AugmentParams,
    ChainParams,
    ConsistencyBatch,
    ConsistencyLossOutput,
    LossOutput,
    MixMatchBatch,
    MixUpParams,
    SemiSupervisedBatch,
)

__all__ = [
    "UDA",
    "Augment",
    "AugmentParams",
    "ChainParams",
    "ColorJitter",
    "Consistency",
    "ConsistencyBatch",
    "ConsistencyLoss",
    "ConsistencyLossOutput",
    "DaliAugment",
    "DaliLoader",
    "DistributionAlignment",
    "FixMatch",
    "FixedThreshold",
    "FlexMatch",
    "FlexThreshold",
    "FreeMatch",
    "FreeThreshold",
    "ImageFiles",
    "Indexed",
    "KorniaAugment",
    "LossOutput",
    "MeanTeacher",
    "MixMatch",
    "MixMatchBatch",
    "MixMatchLoss",
    "MixUpParams",
    "RandAugment",
    "ResidentLoader",
    "SemiSupervisedBatch",
    "SemiSupervisedLoader",
    "SoftMatch",
    "SoftThreshold",
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
