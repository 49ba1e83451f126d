"""The loss of a mixed batch, its gradient, and the ramp of its weight."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_mixmatch.impl.eager.guess_labels import wide
from gpu_mixmatch.types import LossOutput


def linear_rampup(step: Tensor, rampup_steps: int) -> Tensor:
    if rampup_steps == 0:
        return torch.ones_like(step, dtype=torch.float32)
    return (step.float() / rampup_steps).clamp(0.0, 1.0)


def mixmatch_losses(
    logits: Tensor, targets: Tensor, num_labelled: int, weight_u: Tensor
) -> LossOutput:
    """The loss as plain torch, which autograd and compilers see through."""
    log_probs = F.log_softmax(wide(logits[:num_labelled]), dim=-1)
    probs = F.softmax(wide(logits[num_labelled:]), dim=-1)
    targets_x, targets_u = targets[:num_labelled], targets[num_labelled:]
    loss_x = -(targets_x * log_probs).sum() / max(len(targets_x), 1)
    loss_u = (probs - targets_u).square().sum() / max(targets_u.numel(), 1)
    return LossOutput(loss_x + weight_u * loss_u, loss_x, loss_u, weight_u)


def mixmatch_loss(
    logits: Tensor,
    targets: Tensor,
    num_labelled: int,
    weight_u: Tensor,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    losses = mixmatch_losses(logits, targets, num_labelled, weight_u)
    for part, value in zip(out, losses[:3], strict=True):
        part.copy_(value)


def mixmatch_loss_backward(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    logits: Tensor,
    targets: Tensor,
    num_labelled: int,
    weight_u: Tensor,
    out: Tensor,
) -> None:
    grad_loss, grad_x, grad_u = (0.0 if grad is None else grad for grad in grads)
    probs = F.softmax(wide(logits), dim=-1)
    (probs_x, probs_u), (targets_x, targets_u) = (
        (rows[:num_labelled], rows[num_labelled:]) for rows in (probs, targets)
    )
    of_x = probs_x * targets_x.sum(dim=1, keepdim=True) - targets_x
    missed = probs_u - targets_u
    of_u = 2 * probs_u * (missed - (missed * probs_u).sum(dim=1, keepdim=True))
    out[:num_labelled] = of_x * ((grad_loss + grad_x) / max(len(targets_x), 1))
    out[num_labelled:] = of_u * ((weight_u * grad_loss + grad_u) / max(targets_u.numel(), 1))
