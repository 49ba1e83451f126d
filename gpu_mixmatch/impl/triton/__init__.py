"""The operations as fused Triton kernels, one file each, with the names of `impl.eager`."""

from gpu_mixmatch.impl.triton.augment import augment
from gpu_mixmatch.impl.triton.consistency_loss import (
    consistency_loss,
    consistency_loss_backward,
)
from gpu_mixmatch.impl.triton.consistency_targets import consistency_targets
from gpu_mixmatch.impl.triton.draw import draw_batch, prepare
from gpu_mixmatch.impl.triton.guess_labels import batch_targets, guess_labels
from gpu_mixmatch.impl.triton.guess_statistics import (
    confident_classes,
    guess_statistics,
    update_averages,
    update_labels,
    update_window,
)
from gpu_mixmatch.impl.triton.mixmatch_loss import mixmatch_loss, mixmatch_loss_backward
from gpu_mixmatch.impl.triton.mixup import mixup

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
