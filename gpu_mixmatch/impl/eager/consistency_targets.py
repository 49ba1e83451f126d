"""Targets and weights of a batch whose guesses are thresholded or weighed."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_mixmatch.impl.eager.guess_labels import label_targets, one_hot, sharpen, wide
from gpu_mixmatch.types import Weighting


def consistency_targets(
    y: Tensor,
    logits: Tensor,
    weighting: Weighting,
    label_smoothing: float,
    out: tuple[Tensor, Tensor],
) -> None:
    targets, weights = out
    num_u, num_classes = logits.shape
    num_strong = (len(targets) - len(y)) // max(num_u, 1)
    known, guessed = targets[: len(y)], targets[len(y) :].view(num_strong, num_u, num_classes)
    label_targets(y, label_smoothing, known)
    probs = F.softmax(wide(logits), dim=-1)
    aligned = probs if weighting.ratio is None else align(probs, weighting.ratio)
    shown = aligned if weighting.aligned_targets else probs
    if weighting.temperature == 0:
        guessed.copy_(one_hot(shown.argmax(dim=-1), num_classes))
    else:
        guessed.copy_(sharpen(shown, weighting.temperature))
    weights[: len(y)] = 1
    weights[len(y) :].view(num_strong, num_u).copy_(confidence_weights(aligned, weighting))


def align(probs: Tensor, ratio: Tensor) -> Tensor:
    aligned = probs * ratio
    return aligned / aligned.sum(dim=-1, keepdim=True)


def confidence_weights(probs: Tensor, weighting: Weighting) -> Tensor:
    _, rule, threshold, state, spread, _, _ = weighting
    confidence, label = probs.max(dim=-1)
    if rule == "fixed":
        return (confidence >= threshold).float()
    assert state is not None
    if rule == "soft":
        mean, variance = state[:2]
        below = (confidence - mean).clamp(max=0)
        # of no variance: what lies at the mean weighs 1, what lies below 0
        width = (2 * variance / spread**2).clamp(min=torch.finfo(torch.float32).tiny)
        return torch.exp(-below.square() / width)
    if rule == "free":
        mean_probs = state[2 : 2 + probs.shape[1]]
        thresholds = state[0] * mean_probs / mean_probs.max()
    else:
        counts = state.float()
        learnt = counts[:-1] / counts.max().clamp(min=1)
        thresholds = threshold * learnt / (2 - learnt)
    return (confidence >= thresholds[label]).float()
