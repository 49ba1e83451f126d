"""What adaptive methods keep of guesses: sums of a batch in whole numbers, and what they move."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_mixmatch.impl.eager.guess_labels import one_hot, wide

UNIT = 2.0**32  # of sums of probabilities: in whole numbers they are the same in any order
FLOOR = 1e-6  # of both sides of an alignment's quotient


def guess_statistics(logits: Tensor, y: Tensor, out: Tensor) -> None:
    num_classes = logits.shape[1]
    probs = F.softmax(wide(logits), dim=-1)
    confidence, guessed = probs.max(dim=-1)
    of_y = y if y.dim() == 2 else one_hot(y, num_classes)
    out[0].fill_(len(logits))
    out[1].fill_(len(y))
    out[2] = _whole(confidence).sum()
    out[3] = _whole(confidence.square()).sum()
    sums, counts, labels = out[4:].view(3, num_classes)
    torch.sum(_whole(probs), dim=0, out=sums)
    torch.sum(one_hot(guessed, num_classes) & ~probs.isnan(), dim=0, out=counts)
    torch.sum(_whole(of_y.float()), dim=0, out=labels)


def update_averages(
    sums: Tensor, averages: Tensor, momentum: float, target: Tensor | None, out: Tensor | None
) -> None:
    num_u, num_x = sums[0].double().clamp(min=1), sums[1].double().clamp(min=1)
    confidence, square = sums[2].double() / UNIT, sums[3].double() / UNIT
    mean = confidence / num_u
    variance = ((square - confidence * mean) / (num_u - 1).clamp(min=1)).clamp(min=0)
    probs, counts, known = sums[4:].double().view(3, -1)
    of_classes = probs / (UNIT * num_u), counts / num_u, known / (UNIT * num_x)
    means = torch.cat((mean[None], variance[None], *of_classes))
    averages.copy_(momentum * averages.double() + (1 - momentum) * means)
    if out is not None:
        of_guesses, _, of_labels = averages[2:].double().view(3, -1)
        wanted = of_labels if target is None else target.double()
        out.copy_((wanted + FLOOR) / (of_guesses + FLOOR))


def update_window(
    sums: Tensor, window: Tensor, position: Tensor, labels: Tensor, momentum: float, out: Tensor
) -> None:
    num_u, num_x = sums[0].double().clamp(min=1), sums[1].double().clamp(min=1)
    probs, _, known = sums[4:].double().view(3, -1)
    out.copy_((labels.double() + FLOOR) / (window.double().mean(dim=0) + FLOOR))
    window.index_copy_(0, position[None], (probs / (UNIT * num_u)).float()[None])
    position.add_(1).remainder_(len(window))
    labels.copy_(momentum * labels.double() + (1 - momentum) * known / (UNIT * num_x))


def confident_classes(logits: Tensor, threshold: float, out: Tensor) -> None:
    confidence, guessed = F.softmax(wide(logits), dim=-1).max(dim=-1)
    out.copy_(torch.where(confidence > threshold, guessed, -1))


def update_labels(classes: Tensor, ids: Tensor, table: Tensor, counts: Tensor) -> None:
    counted = (classes >= 0) & (ids >= 0) & (ids < len(table))
    later = (ids[:, None] == ids) & counted  # [M, M]: the last of an id counts
    counted = counted & ~later.triu(diagonal=1).any(dim=1)
    before = table[torch.where(counted, ids, 0)].long().remainder(len(counts))  # -1: the last
    one = counted.int()
    counts.index_add_(0, before, -one)
    counts.index_add_(0, classes.clamp(min=0), one)
    # what does not count is written past the end
    longer = torch.cat((table, table[:1]))
    longer[torch.where(counted, ids, len(table))] = classes.to(table.dtype)
    table.copy_(longer[:-1])


def _whole(values: Tensor) -> Tensor:
    return (values.nan_to_num(nan=0.0) * UNIT).long()
