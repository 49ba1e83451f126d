"""The operations in plain torch, on any device: the specification that the others are held to.

One file for each operation, by the name that it has in every implementation. Nothing here reads a
value back from the device or branches on one, so that all of it runs on CUDA without waiting.
"""

from gpu_mixmatch.impl.eager.augment import augment
from gpu_mixmatch.impl.eager.consistency_loss import (
    consistency_loss,
    consistency_loss_backward,
    consistency_losses,
    fairness_loss,
)
from gpu_mixmatch.impl.eager.consistency_targets import consistency_targets
from gpu_mixmatch.impl.eager.draw import draw_batch, prepare
from gpu_mixmatch.impl.eager.guess_labels import batch_targets, guess_labels, sharpen
from gpu_mixmatch.impl.eager.guess_statistics import (
    confident_classes,
    guess_statistics,
    update_averages,
    update_labels,
    update_window,
)
from gpu_mixmatch.impl.eager.interleave import interleave
from gpu_mixmatch.impl.eager.mixmatch_loss import (
    linear_rampup,
    mixmatch_loss,
    mixmatch_loss_backward,
    mixmatch_losses,
)
from gpu_mixmatch.impl.eager.mixup import mixup

__all__ = [
    "augment",
    "batch_targets",
    "confident_classes",
    "consistency_loss",
    "consistency_loss_backward",
    "consistency_losses",
    "consistency_targets",
    "draw_batch",
    "fairness_loss",
    "guess_labels",
    "guess_statistics",
    "interleave",
    "linear_rampup",
    "mixmatch_loss",
    "mixmatch_loss_backward",
    "mixmatch_losses",
    "mixup",
    "prepare",
    "sharpen",
    "update_averages",
    "update_labels",
    "update_window",
]
