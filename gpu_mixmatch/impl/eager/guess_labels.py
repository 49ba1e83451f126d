"""Guessed labels, and the targets of a whole batch."""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_mixmatch.impl.constants import constant
from gpu_mixmatch.impl.eager.mixup import blend
from gpu_mixmatch.types import MixUpParams


def sharpen(probs: Tensor, temperature: float) -> Tensor:
    # p^(1/T) / Σ p^(1/T) = softmax(log p / T): no power to underflow
    return F.softmax(wide(probs).log() / temperature, dim=-1).to(probs.dtype)


def guess_labels(logits: Tensor, temperature: float, out: Tensor) -> None:
    # Σ_k softmax, not its mean: the factor 1/K cancels in the sharpening
    log_sum = reduce(torch.logaddexp, F.log_softmax(wide(logits), dim=-1).unbind())
    out.copy_(F.softmax(log_sum / temperature, dim=-1))


def batch_targets(
    y: Tensor,
    logits: Tensor,
    temperature: float,
    label_smoothing: float,
    mixup: MixUpParams | None,
    out: Tensor,
) -> None:
    num_views, num_images, num_classes = logits.shape
    targets = torch.empty_like(out) if mixup else out
    known, guessed = targets[: len(y)], targets[len(y) :]
    label_targets(y, label_smoothing, known)
    guess_labels(logits, temperature, guessed.view(num_views, num_images, num_classes))
    if mixup:
        blend(targets, mixup, out)


def label_targets(y: Tensor, label_smoothing: float, out: Tensor) -> None:
    """Labels as distributions, ``[B, L]``."""
    num_classes = out.shape[1]
    if y.dim() == 1:
        torch.eq(y[:, None], _classes(num_classes, y.device), out=out)
    else:
        out.copy_(y)
    if label_smoothing:
        out.mul_(1 - label_smoothing).add_(label_smoothing / num_classes)


def one_hot(classes: Tensor, num_classes: int) -> Tensor:
    """Whether a row is of a class, ``[..., L]`` bool; a class out of range is none."""
    return classes[..., None] == _classes(num_classes, classes.device)


def wide(tensor: Tensor) -> Tensor:
    """At least float32: half precisions are widened, float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@constant
def _classes(num_classes: int, device: torch.device) -> Tensor:
    return torch.arange(num_classes).to(device)
