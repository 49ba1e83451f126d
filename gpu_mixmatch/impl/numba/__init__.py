"""The operations compiled for CPUs by Numba; what gains nothing by that is eager's.

Plain torch makes a pass over memory per operation, compiled loops one in all.
"""

from gpu_mixmatch.impl.eager import (
    batch_targets,
    confident_classes,
    consistency_loss,
    consistency_loss_backward,
    consistency_targets,
    draw_batch,
    guess_labels,
    guess_statistics,
    mixmatch_loss,
    mixmatch_loss_backward,
    prepare,
    update_averages,
    update_labels,
    update_window,
)
from gpu_mixmatch.impl.numba.augment import augment
from gpu_mixmatch.impl.numba.mixup import mixup

__all__ = [
    "augment",
    "batch_targets",
    "confident_classes",
    "consistency_loss",
    "consistency_loss_backward",
    "consistency_targets",
    "draw_batch",
    "guess_labels",
    "guess_statistics",
    "mixmatch_loss",
    "mixmatch_loss_backward",
    "mixup",
    "prepare",
    "update_averages",
    "update_labels",
    "update_window",
]
