"""The loss of a batch whose rows are weighed, and its gradient."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_mixmatch.impl.eager.guess_labels import one_hot, wide
from gpu_mixmatch.types import UnlabelledLoss


def consistency_losses(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    parts: tuple[int, int],
    weight_u: Tensor,
    share_v: float,
    loss_u: UnlabelledLoss,
    tsa: Tensor | None,
) -> Tensor:
    """The loss and its parts as plain torch, which autograd and compilers see through, ``[6]``."""
    num_x, end_u = parts
    log_probs = F.log_softmax(wide(logits), dim=-1)
    cross_entropy = -(targets * log_probs).sum(dim=-1)
    of_x = weights[:num_x] * cross_entropy[:num_x]
    if tsa is None:
        mean_x = _mean(of_x)
    else:
        unknown = _unknown(log_probs[:num_x], targets[:num_x], tsa)
        mean_x = (of_x * unknown).sum() / unknown.sum().clamp(min=1)
    weights_u = weights[num_x:]
    if loss_u == "mse":
        missed = log_probs[num_x:].exp() - targets[num_x:]
        of_rows = missed.square().mean(dim=-1)
    else:
        of_rows = cross_entropy[num_x:]
        if loss_u == "kl":
            of_rows = of_rows + torch.xlogy(targets[num_x:], targets[num_x:]).sum(dim=-1)
    of_rows = weights_u * of_rows
    mean_u, mean_v = _mean(of_rows[: end_u - num_x]), _mean(of_rows[end_u - num_x :])
    loss = mean_x + weight_u.to(mean_x.device) * (mean_u + share_v * mean_v)
    kept, mean_weight = _mean((weights_u > 0).to(loss.dtype)), _mean(weights_u.to(loss.dtype))
    return torch.stack((loss, mean_x, mean_u, mean_v, kept, mean_weight))


def consistency_loss(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    parts: tuple[int, int],
    weight_u: Tensor,
    share_v: float,
    loss_u: UnlabelledLoss,
    tsa: Tensor | None,
    out: Tensor,
    count_x: Tensor | None = None,
) -> None:
    out.copy_(consistency_losses(logits, targets, weights, parts, weight_u, share_v, loss_u, tsa))
    if count_x is not None and tsa is None:
        count_x.fill_(parts[0])
    elif count_x is not None and tsa is not None:
        log_probs = F.log_softmax(wide(logits[: parts[0]]), dim=-1)
        torch.sum(_unknown(log_probs, targets[: parts[0]], tsa), dim=0, out=count_x)


def consistency_loss_backward(
    grads: Tensor,
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    parts: tuple[int, int],
    weight_u: Tensor,
    share_v: float,
    loss_u: UnlabelledLoss,
    tsa: Tensor | None,
    count_x: Tensor | None,
    out: Tensor,
) -> None:
    num_x, end_u = parts
    log_probs = F.log_softmax(wide(logits), dim=-1)
    probs = log_probs.exp()
    of_rows = probs * targets.sum(dim=-1, keepdim=True, dtype=probs.dtype) - targets
    factors = weights.to(probs.dtype).clone()
    grad_loss, grad_x, grad_u, grad_v = grads[:4].to(probs.dtype)
    if tsa is None:
        factors[:num_x] *= (grad_loss + grad_x) / max(num_x, 1)
    else:
        assert count_x is not None
        unknown = _unknown(log_probs[:num_x], targets[:num_x], tsa)
        factors[:num_x] *= unknown * (grad_loss + grad_x) / count_x.clamp(min=1)
    weight = weight_u.to(probs.device) * grad_loss
    factors[num_x:end_u] *= (weight + grad_u) / max(end_u - num_x, 1)
    factors[end_u:] *= (share_v * weight + grad_v) / max(len(logits) - end_u, 1)
    if loss_u == "mse":
        missed = probs[num_x:] - targets[num_x:]
        inner = (missed * probs[num_x:]).sum(dim=-1, keepdim=True)
        of_rows[num_x:] = 2 / logits.shape[1] * probs[num_x:] * (missed - inner)
    out.copy_(factors[:, None] * of_rows)


def fairness_loss(logits: Tensor, weights: Tensor, fairness: Tensor) -> Tensor:
    probs = F.softmax(wide(logits), dim=-1)
    kept = (weights > 0).to(probs.dtype)
    count = kept.sum().clamp(min=1)
    mean = (probs * kept[:, None]).sum(dim=0) / count
    share = (one_hot(probs.argmax(dim=-1), logits.shape[1]) * kept[:, None]).sum(dim=0) / count
    # a class that no row is of has no quotient
    of_class = torch.where(share > 0, mean / share.clamp(min=1e-12), 0.0)
    of_class = of_class / of_class.sum().clamp(min=1e-12)
    loss = (fairness * torch.log(of_class + 1e-12)).sum()
    return torch.where(kept.sum() > 0, loss, 0.0)


def _unknown(log_probs: Tensor, targets: Tensor, tsa: Tensor) -> Tensor:
    """1 for rows that are not yet known too well, else 0."""
    right = (log_probs.detach().exp() * targets).sum(dim=-1)
    return (right <= tsa.to(right.device)).to(right.dtype)


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(len(values), 1)
