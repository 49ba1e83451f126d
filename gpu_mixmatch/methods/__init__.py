"""The methods: each builds batches from the same stages."""

from gpu_mixmatch.methods.alignment import DistributionAlignment
from gpu_mixmatch.methods.consistency import Consistency
from gpu_mixmatch.methods.fixmatch import UDA, FixMatch, FlexMatch, FreeMatch, SoftMatch
from gpu_mixmatch.methods.ict import ICT
from gpu_mixmatch.methods.mean_teacher import MeanTeacher
from gpu_mixmatch.methods.mixmatch import MixMatch
from gpu_mixmatch.methods.passes import interleaved_forward
from gpu_mixmatch.methods.remixmatch import ReMixMatch
from gpu_mixmatch.methods.thresholds import (
    FixedThreshold,
    FlexThreshold,
    FreeThreshold,
    SoftThreshold,
)

__all__ = [
    "ICT",
    "UDA",
    "Consistency",
    "DistributionAlignment",
    "FixMatch",
    "FixedThreshold",
    "FlexMatch",
    "FlexThreshold",
    "FreeMatch",
    "FreeThreshold",
    "MeanTeacher",
    "MixMatch",
    "ReMixMatch",
    "SoftMatch",
    "SoftThreshold",
    "interleaved_forward",
]
