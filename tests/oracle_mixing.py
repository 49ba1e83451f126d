"""ReMixMatch and ICT in numpy float64, written from the papers and from their authors' code.

ReMixMatch: Berthelot et al. 2020, arXiv 1911.09785. ICT: Verma et al. 2019, arXiv 1903.03825. Views
are given; plain loops, no speed.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tests.oracle import cross_entropy, mixup, sharpen, softmax

Array = NDArray[np.float64]


# ReMixMatch


class AlignedGuesses:
    """What ReMixMatch remembers: mean guesses of the last batches, and the mean label of late."""

    def __init__(self, num_classes: int, window: int = 128, momentum: float = 0.999) -> None:
        self.means = [np.full(num_classes, 1 / num_classes) for _ in range(window)]
        self.labels = np.full(num_classes, 1 / num_classes)
        self.momentum = momentum

    def guess(self, logits: ArrayLike, y: ArrayLike, temperature: float) -> Array:
        """Align the guesses of a batch, then sharpen them; then take the batch in."""
        probs, y = softmax(logits), np.asarray(y, dtype=np.float64)
        guessed = np.mean(self.means, axis=0)
        aligned = probs * (1e-6 + self.labels) / (1e-6 + guessed)
        aligned /= aligned.sum(axis=1, keepdims=True)
        self.means = [*self.means[1:], probs.mean(axis=0)]
        self.labels = self.momentum * self.labels + (1 - self.momentum) * y.mean(axis=0)
        return sharpen(aligned, temperature)


def rotate(image: ArrayLike, turns: int) -> Array:
    """Turn a square image [C, H, H] by so many quarters, counter-clockwise."""
    result = np.asarray(image, dtype=np.float64)
    for _ in range(turns):
        source, result = result, np.zeros_like(result)
        size = source.shape[1]
        for row in range(size):
            for column in range(size):
                result[:, row, column] = source[:, column, size - 1 - row]
    return result


def remixmatch(
    x: ArrayLike,
    y: ArrayLike,
    strong: ArrayLike,
    weak: ArrayLike,
    guesses: ArrayLike,
    lam: ArrayLike,
    index: ArrayLike,
) -> dict[str, Any]:
    """Build a batch of strong x [B, ...], y [B, L], strong [K, M, ...] and weak views [M, ...].

    guesses [M, L] are aligned and sharpened; lam and index have B + (K + 1) M entries. Returns the
    mixed rows and targets, the first strong view with its targets, and that view turned.
    """
    strong, weak = np.asarray(strong, dtype=np.float64), np.asarray(weak, dtype=np.float64)
    guesses = np.asarray(guesses, dtype=np.float64)
    inputs = np.concatenate([np.asarray(x, dtype=np.float64), *strong, weak])
    targets = np.concatenate([np.asarray(y, dtype=np.float64), *[guesses] * (len(strong) + 1)])
    mixed, mixed_targets = mixup(inputs, targets, lam, index)
    count = len(weak)
    rotations = [row * 4 // count for row in range(count)]
    return {
        "mixed": mixed,
        "mixed_targets": mixed_targets,
        "first": strong[0],
        "first_targets": guesses,
        "rotations": rotations,
        "turned": [rotate(strong[0, row], turns) for row, turns in enumerate(rotations)],
    }


def remixmatch_loss(
    logits: ArrayLike,
    targets: ArrayLike,
    num_labelled: int,
    num_mixed: int,
    ramp: float,
    weights: tuple[float, float, float] = (1.5, 0.5, 0.5),
    rotation_logits: ArrayLike | None = None,
    rotations: ArrayLike = (),
) -> tuple[float, float, float, float, float]:
    """Return the loss and its four parts: of X', the mixed rows of u, un-mixed ones, turned ones.

    Rows of logits and targets are the mixed ones, then the un-mixed ones.
    """
    logits, targets = np.asarray(logits, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    parts = [slice(num_labelled), slice(num_labelled, num_mixed), slice(num_mixed, None)]
    loss_x, loss_u, loss_kl = [cross_entropy(logits[part], targets[part]) for part in parts]
    loss_rot = 0.0
    if rotation_logits is not None:
        loss_rot = cross_entropy(rotation_logits, np.eye(4)[np.asarray(rotations)])
    of_mixed, of_plain, of_turned = weights
    loss = loss_x + ramp * (of_mixed * loss_u + of_plain * loss_kl) + of_turned * loss_rot
    return loss, loss_x, loss_u, loss_kl, loss_rot


# ICT


def ict_of_its_authors(
    x: ArrayLike,
    y: ArrayLike,
    u: ArrayLike,
    logits: ArrayLike,
    lam: tuple[float, float],
    index: tuple[ArrayLike, ArrayLike],
) -> tuple[Array, Array, Array, Array]:
    """Mix x and u, each in itself and by one lambda; the teacher's logits are mixed as u is.

    Returns the rows of x, their targets, the rows of u and theirs.
    """
    rows = []
    for images, targets, weight, partners in (
        (x, y, lam[0], index[0]),
        (u, logits, lam[1], index[1]),
    ):
        images, targets = np.asarray(images, dtype=np.float64), np.asarray(targets, np.float64)
        for values in (images, targets):
            other = np.stack([values[partner] for partner in np.asarray(partners)])
            rows.append(weight * values + (1 - weight) * other)
    return rows[0], rows[1], rows[2], softmax(rows[3])


def ict_of_fixmatch(
    x: ArrayLike, y: ArrayLike, u: ArrayLike, logits: ArrayLike, lam: ArrayLike
) -> tuple[Array, Array, Array, Array]:
    """Mix u with itself in reverse, a lambda per row, and the teacher's probabilities."""
    mixed, targets = mixup(u, softmax(logits), lam, np.arange(len(np.asarray(u)))[::-1])
    return np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64), mixed, targets
