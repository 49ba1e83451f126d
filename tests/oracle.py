"""MixMatch (Berthelot et al. 2019) and its kin in numpy float64, written from the papers.

The ground truth of the tests: plain loops, no speed. Images are [C, H, W] with pixels in 0..255.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


# Label guessing


def log_softmax(logits: ArrayLike, axis: int = -1) -> Array:
    """Return log(exp(logits) / sum exp(logits)) along an axis, without overflow."""
    logits = np.asarray(logits, dtype=np.float64)
    shifted = logits - logits.max(axis=axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))


def softmax(logits: ArrayLike, axis: int = -1) -> Array:
    """Return exp(logits) / sum exp(logits) along an axis, without overflow."""
    logits = np.asarray(logits, dtype=np.float64)
    exponentials = np.exp(logits - logits.max(axis=axis, keepdims=True))
    return exponentials / exponentials.sum(axis=axis, keepdims=True)


def sharpen(probs: ArrayLike, temperature: float) -> Array:
    """Return p_i^(1/T) / sum_j p_j^(1/T) over the last axis (eq. 7, as written)."""
    powers = np.asarray(probs, dtype=np.float64) ** (1 / temperature)
    return powers / powers.sum(axis=-1, keepdims=True)


def guess_labels(logits: ArrayLike, temperature: float) -> Array:
    """Sharpen the mean over K views of the softmax, [K, M, L] -> [M, L] (eq. 6, then 7)."""
    log_probs = log_softmax(logits)
    # In logs, since p^(1/T) underflows at small T: the log of a sum over K, less log K.
    log_mean = np.logaddexp.reduce(log_probs, axis=0) - np.log(len(log_probs))
    return softmax(log_mean / temperature)


def smooth(targets: ArrayLike, smoothing: float) -> Array:
    """Move one-hot targets [B, L] towards the uniform 1/L by the share `smoothing`."""
    targets = np.asarray(targets, dtype=np.float64)
    return targets - smoothing * (targets - 1 / targets.shape[-1])


# MixUp


def mixup(
    inputs: ArrayLike, targets: ArrayLike, lam: ArrayLike, index: ArrayLike
) -> tuple[Array, Array]:
    """Mix row i of [N, ...] and [N, L] with row index[i], lam' = max(lam, 1 - lam) (eq. 8-11)."""
    inputs = np.asarray(inputs, dtype=np.float64)
    targets = np.asarray(targets, dtype=np.float64)
    lam = np.asarray(lam, dtype=np.float64)
    mixed_inputs = np.zeros_like(inputs)
    mixed_targets = np.zeros_like(targets)
    for i, partner in enumerate(np.asarray(index)):
        weight = max(lam[i], 1 - lam[i])
        mixed_inputs[i] = weight * inputs[i] + (1 - weight) * inputs[partner]
        mixed_targets[i] = weight * targets[i] + (1 - weight) * targets[partner]
    return mixed_inputs, mixed_targets


def interleave(rows: ArrayLike, num_groups: int) -> Array:
    """Swap slice i of group 0 with slice i of group i, for i = 1 .. num_groups - 1; self-inverse.

    Groups are those of np.array_split. The slices divide the first n rows of a group, n the
    smallest group's size, into num_groups parts, of which the last n % num_groups are one longer.
    """
    source = np.asarray(rows, dtype=np.float64)
    result = source.copy()
    num_rows = len(source)
    starts = [0]
    for group in range(num_groups):
        starts.append(starts[-1] + num_rows // num_groups + (group < num_rows % num_groups))
    smallest = num_rows // num_groups
    first_longer = num_groups - smallest % num_groups
    offsets = [0]
    for part in range(num_groups):
        offsets.append(offsets[-1] + smallest // num_groups + (part >= first_longer))
    for i in range(1, num_groups):
        for offset in range(offsets[i], offsets[i + 1]):
            result[offset] = source[starts[i] + offset]
            result[starts[i] + offset] = source[offset]
    return result


# Loss


def cross_entropy(logits: ArrayLike, targets: ArrayLike) -> float:
    """Return the mean over rows of H(target, softmax(logits)) (eq. 3); 0 for no rows."""
    log_probs = log_softmax(logits)
    targets = np.asarray(targets, dtype=np.float64)
    total = 0.0
    for row in range(targets.shape[0]):
        for label in range(targets.shape[1]):
            if targets[row, label] != 0:  # 0 log 0 is 0
                total -= targets[row, label] * log_probs[row, label]
    return float(total / max(targets.shape[0], 1))


def squared_error(logits: ArrayLike, targets: ArrayLike) -> float:
    """Return the mean over all elements of (target - softmax(logits))^2 (eq. 4); 0 for no rows."""
    squares = (np.asarray(targets, dtype=np.float64) - softmax(logits)) ** 2
    return float(squares.sum() / max(squares.size, 1))


def mixmatch_loss(
    logits: ArrayLike, targets: ArrayLike, num_labelled: int, weight_u: float
) -> tuple[float, float, float]:
    """Return (L, L_X, L_U), L = L_X + weight_u L_U (eq. 2-5); rows [:num_labelled] are X'."""
    logits = np.asarray(logits, dtype=np.float64)
    targets = np.asarray(targets, dtype=np.float64)
    loss_x = cross_entropy(logits[:num_labelled], targets[:num_labelled])
    loss_u = squared_error(logits[num_labelled:], targets[num_labelled:])
    return loss_x + weight_u * loss_u, loss_x, loss_u


def linear_rampup(step: float, rampup_steps: float) -> float:
    """Return the share of the loss weight at a step: 0 to 1 over rampup_steps, then 1."""
    if rampup_steps == 0:
        return 1.0
    return float(min(max(step / rampup_steps, 0.0), 1.0))


# Augmentation of one image


def reflect_index(i: int, n: int) -> int:
    """Reflect any integer into 0..n-1 without repeating the edge: period 2 (n - 1)."""
    if n == 1:
        return 0
    i = int(i) % (2 * (n - 1))
    return i if i < n else 2 * (n - 1) - i


def shift_crop(image: ArrayLike, top: int, left: int, padding: int, mode: str) -> Array:
    """Pad by `padding` (reflect, zeros or edge), then cut the [H, W] window at (top, left)."""
    image = np.asarray(image, dtype=np.float64)
    if mode not in ("reflect", "zeros", "edge"):
        raise ValueError(f"mode must be reflect, zeros or edge, got {mode!r}")
    _, height, width = image.shape
    result = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            i = row + int(top) - padding
            j = column + int(left) - padding
            if mode == "zeros" and not (0 <= i < height and 0 <= j < width):
                continue
            if mode == "reflect":
                i, j = reflect_index(i, height), reflect_index(j, width)
            elif mode == "edge":
                i, j = min(max(i, 0), height - 1), min(max(j, 0), width - 1)
            result[:, row, column] = image[:, i, j]
    return result


def source_position(i: int, size_in: int, size_out: int) -> tuple[int, int, float]:
    """Return the two source pixels of output pixel i and the second one's bilinear weight."""
    position = max((i + 0.5) * size_in / size_out - 0.5, 0.0)
    low = min(int(position), size_in - 1)
    high = min(low + 1, size_in - 1)
    return low, high, position - low


def zoom_crop(image: ArrayLike, top: int, bottom: int, left: int, right: int) -> Array:
    """Cut so many pixels off each side and resize back, bilinear with half-pixel centres."""
    image = np.asarray(image, dtype=np.float64)
    _, height, width = image.shape
    kept = image[:, int(top) : height - int(bottom), int(left) : width - int(right)]
    result = np.zeros_like(image)
    for row in range(height):
        i, i_next, down = source_position(row, kept.shape[1], height)
        for column in range(width):
            j, j_next, across = source_position(column, kept.shape[2], width)
            above = (1 - across) * kept[:, i, j] + across * kept[:, i, j_next]
            below = (1 - across) * kept[:, i_next, j] + across * kept[:, i_next, j_next]
            result[:, row, column] = (1 - down) * above + down * below
    return result


def flip(image: ArrayLike) -> Array:
    """Mirror the columns."""
    return np.asarray(image, dtype=np.float64)[:, :, ::-1].copy()


def gaussian_kernel(sigma: float, radius: int) -> Array:
    """Return exp(-k^2 / 2 sigma^2), k = -radius .. radius, divided by its sum; sigma 0: a delta."""
    offsets = np.arange(-radius, radius + 1, dtype=np.float64)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2) if sigma > 0 else (offsets == 0) * 1.0
    return weights / weights.sum()


def blur(image: ArrayLike, sigma: float, radius: int) -> Array:
    """Convolve rows, then columns, with the Gaussian kernel; borders reflect."""
    image = np.asarray(image, dtype=np.float64)
    _, height, width = image.shape
    kernel = gaussian_kernel(sigma, radius)
    vertical = np.zeros_like(image)
    for weight, offset in zip(kernel, range(-radius, radius + 1), strict=True):
        for row in range(height):
            vertical[:, row] += weight * image[:, reflect_index(row + offset, height)]
    result = np.zeros_like(image)
    for weight, offset in zip(kernel, range(-radius, radius + 1), strict=True):
        for column in range(width):
            source = reflect_index(column + offset, width)
            result[:, :, column] += weight * vertical[:, :, source]
    return result


def normalise(image: ArrayLike, mean: Sequence[float], std: Sequence[float]) -> Array:
    """Return (image / 255 - mean) / std, with a mean and a std per channel."""
    image = np.asarray(image, dtype=np.float64)
    result = np.zeros_like(image)
    for channel in range(image.shape[0]):
        result[channel] = (image[channel] / 255 - mean[channel]) / std[channel]
    return result


def augment(image: ArrayLike, params: Mapping[str, Any], policy: Mapping[str, Any]) -> Array:
    """Shift-crop, zoom-crop, flip, blur and normalise one image, in this order.

    params: top, left, flip, zoom = (top, bottom, left, right), sigma.
    policy: padding, padding_mode, blur_radius, mean, std.
    """
    result = shift_crop(
        image, params["top"], params["left"], policy["padding"], policy["padding_mode"]
    )
    result = zoom_crop(result, *params["zoom"])
    if params["flip"]:
        result = flip(result)
    result = blur(result, params["sigma"], policy["blur_radius"])
    return normalise(result, policy["mean"], policy["std"])


# Algorithm 1


def mixmatch(
    x: ArrayLike,
    y: ArrayLike,
    u: ArrayLike,
    model: Callable[[Array], ArrayLike],
    params_x: Sequence[Mapping[str, Any]],
    params_u: Sequence[Sequence[Mapping[str, Any]]],
    lam: ArrayLike,
    index: ArrayLike,
    temperature: float,
    policy: Mapping[str, Any],
    mix: str = "all",
) -> tuple[Array, Array]:
    """Build X' and U' from x [B, C, H, W], y [B, L], u [M, C, H, W] and all draws (Algorithm 1).

    Returns inputs [N, C, H, W] and targets [N, L], N = B + K M: first X', then U' view-major.
    params_x has B mappings, params_u K lists of M; lam and index have N entries.
    """
    x, u = np.asarray(x, dtype=np.float64), np.asarray(u, dtype=np.float64)
    y = np.asarray(y, dtype=np.float64)
    num_labelled, num_labels = y.shape
    num_views, num_unlabelled = len(params_u), len(u)
    rows = np.arange(num_labelled + num_views * num_unlabelled)
    index = np.asarray(index)

    # Lines 2-5: one augmentation of each x, K of each u.
    augmented_x = np.zeros_like(x)
    for b in range(num_labelled):
        augmented_x[b] = augment(x[b], params_x[b], policy)
    views = np.zeros((num_views, *u.shape))
    for k in range(num_views):
        for b in range(num_unlabelled):
            views[k, b] = augment(u[b], params_u[k][b], policy)
    stacked_views = views.reshape(num_views * num_unlabelled, *u.shape[1:])

    # Lines 7-8: one guess for all K views of an image.
    logits = np.asarray(model(stacked_views.copy()), dtype=np.float64)
    guesses = guess_labels(logits.reshape(num_views, num_unlabelled, num_labels), temperature)

    # Lines 10-12: X-hat, then U-hat; W is their shuffle by index.
    inputs = np.concatenate([augmented_x, stacked_views])
    targets = np.concatenate([y, *[guesses for _ in range(num_views)]])

    # Lines 13-14.
    mixed_inputs, mixed_targets = mixup(inputs, targets, lam, index)
    if mix == "separate" and not np.array_equal(rows < num_labelled, index < num_labelled):
        raise ValueError("mix='separate' needs an index that stays within X and within U")
    is_mixed = {
        "all": rows >= 0,
        "separate": rows >= 0,
        "labelled": rows < num_labelled,
        "unlabelled": rows >= num_labelled,
        "none": rows < 0,
    }[mix]
    for i in rows:
        if is_mixed[i]:
            inputs[i], targets[i] = mixed_inputs[i], mixed_targets[i]
    return inputs, targets


# Guesses that are weighed: distribution alignment


def normalise_rows(values: ArrayLike) -> Array:
    """Divide the rows of [M, L] by their sums."""
    values = np.asarray(values, dtype=np.float64)
    return values / values.sum(axis=-1, keepdims=True)


class WindowAlignment:
    """ReMixMatch's: p (1e-6 + p_data) / (1e-6 + p_model), normalised.

    p_model is the mean of the last batch means, uniform to begin with, before this batch is in it;
    p_data is given, or an average of the labels likewise.
    """

    def __init__(self, num_classes: int, window: int, target: ArrayLike | None = None) -> None:
        uniform = np.full(num_classes, 1 / num_classes)
        self.means = [uniform] * window
        self.known = target is not None
        self.labels = np.asarray(target, dtype=np.float64) if target is not None else uniform

    def __call__(self, probs: Array, labels: Array) -> Array:
        """Align probs [M, L], then take them and the labels [B, L] in."""
        guessed = np.mean(self.means, axis=0)
        aligned = normalise_rows(probs * (1e-6 + self.labels) / (1e-6 + guessed))
        self.means = [*self.means[1:], probs.mean(axis=0)]
        if not self.known:
            self.labels = 0.999 * self.labels + 0.001 * labels.mean(axis=0)
        return aligned


class MomentumAlignment:
    """USB's: p_model is an average over steps, this batch in it, and p_data one of the labels."""

    def __init__(self, num_classes: int, momentum: float, target: ArrayLike | None = None) -> None:
        self.momentum = momentum
        self.guessed = np.full(num_classes, 1 / num_classes)
        self.known = target is not None
        self.labels = np.array(self.guessed if target is None else target, dtype=np.float64)

    def __call__(self, probs: Array, labels: Array) -> Array:
        """Take probs [M, L] and labels [B, L] in, then align probs."""
        m = self.momentum
        self.guessed = m * self.guessed + (1 - m) * probs.mean(axis=0)
        if not self.known:
            self.labels = m * self.labels + (1 - m) * labels.mean(axis=0)
        return normalise_rows(probs * (1e-6 + self.labels) / (1e-6 + self.guessed))


# Guesses that are weighed: thresholds. `weigh` gives the weights of guesses as they are, p, whose
# alignment is q; `of_labels` is what they are labelled by.


class FixedThreshold:
    """FixMatch, eq. 4: 1 where the largest probability is at least tau."""

    def __init__(self, tau: float) -> None:
        self.tau = tau

    def weigh(self, p: Array, q: Array, ids: Sequence[int]) -> Array:
        """Return the weights, [M]."""
        return np.array([1.0 if max(row) >= self.tau else 0.0 for row in q])


class SoftThreshold:
    """SoftMatch, eq. 6-9: a Gaussian of how far the confidence lies below its mean.

    Mean and (unbiased) variance are averages over steps, of guesses as they are. What is weighed is
    the guess aligned to uniform classes by the average guess.
    """

    def __init__(self, num_classes: int, momentum: float = 0.999, spread: float = 2.0) -> None:
        self.momentum, self.spread = momentum, spread
        self.mean, self.variance = 1 / num_classes, 1.0
        self.guessed = np.full(num_classes, 1 / num_classes)

    def weigh(self, p: Array, q: Array, ids: Sequence[int]) -> Array:
        """Take guesses in, then return their weights, [M]."""
        m, confidence = self.momentum, p.max(axis=1)
        variance = np.var(confidence, ddof=1) if len(confidence) > 1 else 0.0
        self.mean = m * self.mean + (1 - m) * confidence.mean()
        self.variance = m * self.variance + (1 - m) * float(variance)
        self.guessed = m * self.guessed + (1 - m) * p.mean(axis=0)
        uniform = 1 / p.shape[1]
        aligned = normalise_rows(p * (uniform + 1e-6) / (self.guessed + 1e-6))
        weights = np.ones(len(p))
        for row, largest in enumerate(aligned.max(axis=1)):
            if largest < self.mean:
                scale = 2 * self.variance / self.spread**2
                weights[row] = np.exp(-((largest - self.mean) ** 2) / scale)
        return weights


class FreeThreshold:
    """FreeMatch, eq. 5-8: the mean confidence, times the mean guess of the class over the largest.

    All are averages over steps, this one's in them, of guesses as they are; they begin uniform.
    """

    def __init__(self, num_classes: int, momentum: float = 0.999) -> None:
        self.momentum, self.confidence = momentum, 1 / num_classes
        self.guessed = np.full(num_classes, 1 / num_classes)
        self.share = np.full(num_classes, 1 / num_classes)

    def weigh(self, p: Array, q: Array, ids: Sequence[int]) -> Array:
        """Take guesses in, then return their weights, [M]."""
        m, num_classes = self.momentum, p.shape[1]
        share = np.bincount(p.argmax(axis=1), minlength=num_classes) / len(p)
        self.confidence = m * self.confidence + (1 - m) * p.max(axis=1).mean()
        self.guessed = m * self.guessed + (1 - m) * p.mean(axis=0)
        self.share = m * self.share + (1 - m) * share
        thresholds = self.confidence * self.guessed / self.guessed.max()
        return np.array([1.0 if max(row) >= thresholds[row.argmax()] else 0.0 for row in q])

    def fairness(self) -> Array:
        """Return norm(p / h), [L], of eq. 10: a class that is never guessed has no part in it."""
        wanted = np.zeros_like(self.guessed)
        for c, share in enumerate(self.share):
            if share > 0:
                wanted[c] = self.guessed[c] / share
        return wanted / wanted.sum()


class FlexThreshold:
    """FlexMatch, eq. 5-7 and 10: tau times beta / (2 - beta), by how many images a class has.

    Images keep the class of their last guess above tau; weights read what earlier steps left.
    """

    def __init__(self, num_classes: int, num_unlabelled: int, tau: float) -> None:
        self.tau, self.num_classes = tau, num_classes
        self.classes = [-1] * num_unlabelled

    def counts(self) -> list[int]:
        """Return how many images each class has, and how many have none, [L + 1]."""
        return [self.classes.count(c) for c in (*range(self.num_classes), -1)]

    def weigh(self, p: Array, q: Array, ids: Sequence[int]) -> Array:
        """Return the weights, [M], then take guesses in by their ids."""
        counts = self.counts()
        weights = np.zeros(len(p))
        for row, probs in enumerate(q):
            beta = counts[probs.argmax()] / max(counts)
            weights[row] = float(probs.max() >= self.tau * beta / (2 - beta))
        for row, probs in enumerate(p):
            if probs.max() > self.tau:
                self.classes[ids[row]] = int(probs.argmax())
        return weights


def consistency_targets(
    y: ArrayLike,
    logits: ArrayLike,
    threshold: Any,
    temperature: float | None = None,
    alignment: Callable[[Array, Array], Array] | None = None,
    smoothing: float = 0.0,
    num_strong: int = 1,
    ids: Sequence[int] = (),
) -> tuple[Array, Array]:
    """Return targets [B + S M, L] and weights [B + S M] from labels [B, L] and weak logits [M, L].

    Guesses are aligned, then weighed as they are, then sharpened or made one-hot (None).
    """
    y = np.asarray(y, dtype=np.float64)
    probs = softmax(logits)
    aligned = probs if alignment is None else alignment(probs, y)
    weights = threshold.weigh(probs, aligned, ids)
    guesses = np.zeros_like(probs)
    for row, guess in enumerate(aligned):
        if temperature is None:
            guesses[row, guess.argmax()] = 1
        else:
            guesses[row] = softmax(np.log(guess) / temperature)
    targets = [smooth(y, smoothing), *[guesses] * num_strong]
    return np.concatenate(targets), np.concatenate([np.ones(len(y)), *[weights] * num_strong])


# Their loss


def tsa_threshold(kind: str, step: int, num_steps: int, num_classes: int) -> float:
    """Return what a labelled row may be sure of at a step (UDA, section 3.2)."""
    t = linear_rampup(step, num_steps)
    alpha = {"linear": t, "exp": np.exp((t - 1) * 5), "log": 1 - np.exp(-t * 5)}[kind]
    return float(alpha * (1 - 1 / num_classes) + 1 / num_classes)


def consistency_loss(
    logits: ArrayLike,
    targets: ArrayLike,
    weights: ArrayLike,
    num_labelled: int,
    weight_u: float,
    loss_u: str = "ce",
    tsa: float | None = None,
) -> tuple[float, float, float, float, float]:
    """Return (L, L_X, L_U, share of u's rows that count, their mean weight).

    L_U divides by all rows of u. L_X divides by the rows of x that do not know their label with
    more than a probability of `tsa`.
    """
    log_probs, targets = log_softmax(logits), np.asarray(targets, dtype=np.float64)
    weights = np.asarray(weights, dtype=np.float64)
    total_x, rows_x = 0.0, 0
    for row in range(num_labelled):
        if tsa is None or targets[row] @ np.exp(log_probs[row]) <= tsa:
            total_x -= targets[row] @ log_probs[row]
            rows_x += 1
    total_u, rows_u = 0.0, len(targets) - num_labelled
    for row in range(num_labelled, len(targets)):
        target = targets[row]
        of_row = -target @ log_probs[row]
        if loss_u == "kl":
            of_row += sum(p * np.log(p) for p in target if p > 0)
        elif loss_u == "mse":
            of_row = ((np.exp(log_probs[row]) - target) ** 2).mean()
        total_u += weights[row] * of_row
    loss_x, of_u = total_x / max(rows_x, 1), total_u / max(rows_u, 1)
    kept = (weights[num_labelled:] > 0).sum() / max(rows_u, 1)
    mean_weight = weights[num_labelled:].sum() / max(rows_u, 1)
    loss = loss_x + weight_u * of_u
    return float(loss), float(loss_x), float(of_u), float(kept), float(mean_weight)


def fairness_loss(logits: ArrayLike, weights: ArrayLike, fairness: ArrayLike) -> float:
    """Return FreeMatch's eq. 11 as its code minimises it; 0 where no strong view counts."""
    weights = np.asarray(weights)
    probs = softmax(logits)[weights > 0]
    if len(probs) == 0:
        return 0.0
    mean = probs.mean(axis=0)
    share = np.bincount(probs.argmax(axis=1), minlength=probs.shape[1]) / len(probs)
    of_class = np.zeros_like(mean)
    for c in range(len(mean)):
        if share[c] > 0:
            of_class[c] = mean[c] / share[c]
    of_class = of_class / of_class.sum()
    return float((np.asarray(fairness) * np.log(of_class + 1e-12)).sum())


def gradient(function: Callable[[Array], float], values: ArrayLike, width: float = 1e-6) -> Array:
    """Return the gradient of a function of an array by central differences."""
    values = np.array(values, dtype=np.float64)
    slopes = np.zeros_like(values)
    for place in np.ndindex(values.shape):
        ends = []
        for sign in (1, -1):
            moved = values.copy()
            moved[place] += sign * width
            ends.append(function(moved))
        slopes[place] = (ends[0] - ends[1]) / (2 * width)
    return slopes
