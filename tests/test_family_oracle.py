"""Every method that weighs guesses against the oracle: views, targets, weights, state and loss."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn
from torch.nn.functional import one_hot

from gpu_mixmatch import (
    UDA,
    Consistency,
    ConsistencyLoss,
    DistributionAlignment,
    FixMatch,
    FlexMatch,
    FreeMatch,
    FreeThreshold,
    MeanTeacher,
    RandAugment,
    SoftMatch,
    SoftThreshold,
    WeakAugment,
    functional,
)
from gpu_mixmatch.impl import implementation
from gpu_mixmatch.types import Weighting
from tests import oracle
from tests.factories import random_images, random_labels
from tests.skips import skip_without

IMAGE = (3, 8, 7)
NUM_CLASSES = 5
B, M, SAMPLES = 3, 6, 4
SEED, STEPS = 11, 4
SHARES = (0.3, 0.1, 0.2, 0.25, 0.15)
# Largest absolute error against float64: of views, and of what is made of float32 logits
IMAGE_ERROR, ERROR = 2e-5, 2e-5


class LinearModel(nn.Module):
    """A fixed linear map; `in_numpy` is the same one for the oracle.

    Of an image that has moved out of sight, which is all zeros, the bias is left.
    """

    def __init__(self, scale=2.0, seed=5):
        super().__init__()
        generator, size = torch.Generator().manual_seed(seed), int(np.prod(IMAGE))
        weight = torch.randn(size, NUM_CLASSES, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(weight * scale / size**0.5)
        self.register_buffer("bias", torch.linspace(0.1, 0.5, NUM_CLASSES).double())

    def forward(self, images):
        return (images.double().flatten(1) @ self.weight + self.bias).float()

    def in_numpy(self, images):
        flat = images.double().flatten(1).numpy()
        return flat @ self.weight.detach().numpy() + self.bias.numpy()


class Method(NamedTuple):
    """A method, and what the oracle makes of it.

    Attributes:
        build: Makes the builder of two engines and options.
        threshold: Makes the oracle's threshold.
        temperature: Of the oracle; None is one-hot.
        alignment: Makes the oracle's alignment.
        loss: Options of `ConsistencyLoss`.
        state: The builder's state and the oracle's, in pairs.
    """

    build: Any
    threshold: Any
    temperature: float | None = None
    alignment: Any = None
    loss: dict = {}  # noqa: RUF012
    state: Any = lambda builder, threshold, alignment: []


def averages_of(builder, threshold, alignment):
    """Mean and variance of the confidence and the mean guess, or, with alignment, of the labels."""
    kept = builder.threshold.averages.double().numpy()
    if isinstance(threshold, oracle.SoftThreshold):
        return [(kept[:2], [threshold.mean, threshold.variance]), (kept[2:7], threshold.guessed)]
    means = np.concatenate([threshold.guessed, threshold.share])
    return [(kept[:1], [threshold.confidence]), (kept[2:12], means)]


def window_of(builder, threshold, alignment):
    kept = builder.alignment
    guesses = kept.guesses.roll(-int(kept.position), 0)
    return [(guesses, np.array(alignment.means)), (kept.labels, alignment.labels)]


def momentum_of(builder, threshold, alignment):
    kept = builder.alignment.averages
    of_labels = [] if alignment.known else [(kept[12:], alignment.labels)]
    return [(kept[2:7], alignment.guessed), *of_labels]


def table_of(builder, threshold, alignment):
    kept = builder.threshold
    return [(kept.classes, threshold.classes), (kept.counts, threshold.counts())]


METHODS = {
    "FixMatch": Method(
        lambda *engines, **options: FixMatch(*engines, NUM_CLASSES, threshold=0.7, **options),
        lambda: oracle.FixedThreshold(0.7),
    ),
    "FixMatch, sharpened": Method(
        lambda *engines, **options: FixMatch(
            *engines, NUM_CLASSES, threshold=0.7, temperature=0.5, **options
        ),
        lambda: oracle.FixedThreshold(0.7),
        temperature=0.5,
        loss={"lambda_u": 3.0, "rampup_steps": 3},
    ),
    "FixMatch, aligned by a window": Method(
        lambda *engines, **options: FixMatch(
            *engines, NUM_CLASSES, threshold=0.6, alignment=DistributionAlignment(3), **options
        ),
        lambda: oracle.FixedThreshold(0.6),
        alignment=lambda: oracle.WindowAlignment(NUM_CLASSES, 3),
        state=window_of,
    ),
    "UDA, aligned by a window to shares": Method(
        lambda *engines, **options: UDA(
            *engines, NUM_CLASSES, alignment=DistributionAlignment(2, target=SHARES), **options
        ),
        lambda: oracle.FixedThreshold(0.8),
        temperature=0.4,
        alignment=lambda: oracle.WindowAlignment(NUM_CLASSES, 2, SHARES),
        loss={"loss_u": "kl"},
        state=window_of,
    ),
    "FixMatch, aligned by momentum": Method(
        lambda *engines, **options: FixMatch(
            *(*engines, NUM_CLASSES),
            threshold=0.6,
            alignment=DistributionAlignment(momentum=0.9),
            **options,
        ),
        lambda: oracle.FixedThreshold(0.6),
        alignment=lambda: oracle.MomentumAlignment(NUM_CLASSES, 0.9),
        state=momentum_of,
    ),
    "FixMatch, aligned by momentum to uniform": Method(
        lambda *engines, **options: FixMatch(
            *(*engines, NUM_CLASSES),
            threshold=0.6,
            alignment=DistributionAlignment(momentum=0.8, target="uniform"),
            **options,
        ),
        lambda: oracle.FixedThreshold(0.6),
        alignment=lambda: oracle.MomentumAlignment(NUM_CLASSES, 0.8, [1 / NUM_CLASSES] * 5),
        state=momentum_of,
    ),
    "UDA": Method(
        lambda *engines, **options: UDA(*engines, NUM_CLASSES, **options),
        lambda: oracle.FixedThreshold(0.8),
        temperature=0.4,
        loss={"loss_u": "kl", "tsa": "exp", "tsa_steps": STEPS},
    ),
    "UDA, linear TSA": Method(
        lambda *engines, **options: UDA(
            *engines, NUM_CLASSES, temperature=0.7, threshold=0.5, **options
        ),
        lambda: oracle.FixedThreshold(0.5),
        temperature=0.7,
        loss={"tsa": "linear", "tsa_steps": STEPS},
    ),
    "UDA, logarithmic TSA": Method(
        lambda *engines, **options: UDA(*engines, NUM_CLASSES, **options),
        lambda: oracle.FixedThreshold(0.8),
        temperature=0.4,
        loss={"loss_u": "mse", "tsa": "log", "tsa_steps": 2 * STEPS},
    ),
    "SoftMatch": Method(
        lambda *engines, **options: SoftMatch(
            *engines, NUM_CLASSES, threshold=SoftThreshold(0.5, spread=1.5), **options
        ),
        lambda: oracle.SoftThreshold(NUM_CLASSES, 0.5, 1.5),
        state=averages_of,
    ),
    "FreeMatch": Method(
        lambda *engines, **options: FreeMatch(
            *engines, NUM_CLASSES, threshold=FreeThreshold(0.5), **options
        ),
        lambda: oracle.FreeThreshold(NUM_CLASSES, 0.5),
        loss={"lambda_fair": 0.3},
        state=averages_of,
    ),
    "FreeMatch, aligned by a window": Method(
        lambda *engines, **options: FreeMatch(
            *(*engines, NUM_CLASSES),
            threshold=FreeThreshold(0.1),
            alignment=DistributionAlignment(2),
            **options,
        ),
        lambda: oracle.FreeThreshold(NUM_CLASSES, 0.1),
        alignment=lambda: oracle.WindowAlignment(NUM_CLASSES, 2),
        loss={"lambda_fair": 0.1, "lambda_u": 0.5},
        state=lambda *parts: averages_of(*parts) + window_of(*parts),
    ),
    "FlexMatch": Method(
        lambda *engines, **options: FlexMatch(
            *engines, NUM_CLASSES, num_unlabelled=SAMPLES, threshold=0.7, **options
        ),
        lambda: oracle.FlexThreshold(NUM_CLASSES, SAMPLES, 0.7),
        state=table_of,
    ),
    "MeanTeacher": Method(
        lambda weak, strong, **options: MeanTeacher(
            weak, NUM_CLASSES, teacher=LinearModel(seed=6), **options
        ),
        lambda: oracle.FixedThreshold(0.0),
        temperature=1.0,
        loss={"lambda_u": 50.0, "rampup_steps": 5, "loss_u": "mse"},
    ),
    "Π-model": Method(
        lambda weak, strong, **options: MeanTeacher(weak, NUM_CLASSES, **options),
        lambda: oracle.FixedThreshold(0.0),
        temperature=1.0,
        loss={"lambda_u": 10.0, "loss_u": "mse"},
    ),
    "Consistency of no threshold and all views": Method(
        lambda *engines, **options: Consistency(
            *engines, NUM_CLASSES, threshold=None, temperature=0.9, **options
        ),
        lambda: oracle.FixedThreshold(0.0),
        temperature=0.9,
    ),
}


def engines_of(impl):
    weak = WeakAugment(2, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), impl=impl)
    return weak, RandAugment.fixmatch(weak, cutout=3)


def data_of(step, labels="hard"):
    x, u = random_images(B, IMAGE, seed=2 * step), random_images(M, IMAGE, seed=2 * step + 1)
    y = random_labels(B, NUM_CLASSES, seed=step)
    if labels == "soft":
        logits = torch.randn(B, NUM_CLASSES, generator=torch.Generator().manual_seed(step))
        y = logits.softmax(dim=1)
    generator = torch.Generator().manual_seed(step)
    ids_x = torch.randint(2**40, (B,), generator=generator)
    # some images are met again in later steps, some within one
    ids_u = torch.randint(SAMPLES, (M,), generator=generator)
    return x, y, u, ids_x, ids_u


def views_of(builder, step, x, u, ids_x, ids_u):
    """Each view by its engine alone, by the draws that the page of methods promises."""
    strong = range(1, builder.num_strong + 1)
    last = builder.num_strong + 1
    return [
        builder.weak.apply(x, builder.weak.draw(SEED, step, ids_x, 0)),
        builder.strong.apply(u, builder.strong.draw(SEED, step, ids_u, tuple(strong))),
        builder.weak.apply(u, builder.weak.draw(SEED, step, ids_u, last)),
    ]


def oracle_loss(logits, targets, weights, fairness, criterion, step):
    """The loss and its parts of logits in float64."""
    tsa = criterion.tsa and oracle.tsa_threshold(
        criterion.tsa, step, criterion.tsa_steps, NUM_CLASSES
    )
    weight_u = criterion.lambda_u * oracle.linear_rampup(step, criterion.rampup_steps)
    loss, *parts = oracle.consistency_loss(
        logits, targets, weights, B, weight_u, criterion.loss_u, tsa
    )
    fair = 0.0
    if criterion.lambda_fair:
        fair = oracle.fairness_loss(logits[B:], weights[B:], fairness)
    return loss + criterion.lambda_fair * fair, *parts, fair


def assert_equals_the_oracle(method, order, num_strong, labels, impl, num_steps=STEPS):
    method = METHODS[method]
    smoothing = 0.1 if labels == "smoothed" else 0.0
    engines = engines_of("eager" if impl == "triton" else impl)
    builder = method.build(
        *engines, num_strong=num_strong, label_smoothing=smoothing, seed=SEED, impl=impl
    )
    criterion, model = ConsistencyLoss(impl=impl, **method.loss), LinearModel()
    threshold = method.threshold()
    alignment = method.alignment and method.alignment()
    guesser = model if builder.teacher is None else builder.teacher
    guesses_first = order == "first" or builder.teacher is not None
    kept = []
    for step in range(num_steps):
        x, y, u, ids_x, ids_u = data_of(step, labels)
        first, strong, weak = views_of(builder, step, x, u, ids_x, ids_u)
        known = y.double() if labels == "soft" else one_hot(y, NUM_CLASSES).double()
        targets, weights = oracle.consistency_targets(
            known.numpy(),
            guesser.in_numpy(weak),
            threshold,
            method.temperature,
            alignment,
            smoothing,
            num_strong,
            ids_u.tolist(),
        )

        batch = builder(x, y, u, model if order == "first" else None, ids_x=ids_x, ids_u=ids_u)
        rows = [first, strong] if guesses_first else [first, strong, weak]
        assert torch.allclose(batch.inputs, torch.cat(rows), rtol=0, atol=IMAGE_ERROR)
        assert (batch.num_labelled, int(batch.step)) == (B, step)
        logits = model(batch.inputs).detach().requires_grad_()
        trained_on, labelled = batch.complete(logits)
        assert len(trained_on) == len(labelled.inputs) == B + num_strong * M
        assert labelled.num_weak == 0
        assert_allclose(labelled.targets, targets, rtol=0, atol=ERROR)
        assert_allclose(labelled.weights, weights, rtol=0, atol=ERROR)
        for mine, theirs in method.state(builder, threshold, alignment):
            assert_allclose(mine, theirs, rtol=0, atol=1e-6)

        fairness = threshold.fairness() if criterion.lambda_fair else None
        if fairness is not None:
            assert_allclose(labelled.fairness, fairness, rtol=0, atol=ERROR)
        output = criterion(trained_on, labelled)
        exact = logits.detach().double().numpy()[: B + num_strong * M]
        given = targets, weights, fairness, criterion, step
        loss, *parts = oracle_loss(exact, *given)
        assert_allclose(output.loss.item(), loss, rtol=1e-5, atol=ERROR)
        mine = (*output[1:3], output.kept, output.mean_weight, output.loss_fair)
        assert_allclose([part.item() for part in mine], parts, rtol=1e-5, atol=ERROR)
        kept += weights[B:].tolist()
    output.loss.backward()
    slopes = np.zeros(logits.shape)
    slopes[: len(exact)] = oracle.gradient(lambda at: oracle_loss(at, *given)[0], exact)
    assert_allclose(logits.grad, slopes, rtol=1e-4, atol=1e-5)
    assert int(builder.step) == num_steps
    return kept


@pytest.mark.parametrize(("num_strong", "labels"), [(1, "hard"), (2, "soft"), (2, "smoothed")])
@pytest.mark.parametrize("order", ["first", "one pass"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("each_cpu_impl")
def test_method_equals_the_oracle(method, order, num_strong, labels):
    kept = assert_equals_the_oracle(method, order, num_strong, labels, "auto")
    masks = getattr(METHODS[method].threshold(), "tau", 1) > 0
    assert min(kept) < max(kept) if masks else min(kept) == 1  # else no weight was tried


@pytest.mark.parametrize(
    "method",
    [
        *("FixMatch", "UDA", "SoftMatch", "FreeMatch, aligned by a window", "FlexMatch"),
        *("FixMatch, aligned by momentum", "MeanTeacher"),
    ],
)
def test_method_equals_the_oracle_in_kernels(method):
    skip_without("triton")
    assert_equals_the_oracle(method, "one pass", 2, "soft", "triton", num_steps=2)


# Weights of many guesses, of any state


@pytest.mark.parametrize("impl", ["eager", "numba", "triton"])
@pytest.mark.parametrize("unused", [0, 3, 9])
def test_flex_weights_of_many_guesses_equal_the_oracle(impl, unused):
    assert impl == "eager" or skip_without(impl)
    p = many_guesses()
    counts = [6, 1, 0, 3, 4, unused]  # images of each class, and of none
    flex = oracle.FlexThreshold(NUM_CLASSES, sum(counts), 0.95)
    flex.classes = [
        c for c, count in zip((*range(NUM_CLASSES), -1), counts, strict=True) for _ in range(count)
    ]
    assert flex.counts() == counts
    state = torch.tensor(counts, dtype=torch.int32)
    weights = weights_of(p, impl, rule="flex", threshold=0.95, state=state)
    assert_array_equal(weights, flex.weigh(p, p, [0] * len(p)))
    assert 0.1 < weights.mean() < 0.97


@pytest.mark.parametrize("impl", ["eager", "numba", "triton"])
@pytest.mark.parametrize("rule", ["soft", "free"])
def test_weights_of_many_guesses_equal_the_oracle_after_many_steps(impl, rule):
    assert impl == "eager" or skip_without(impl)
    kinds = {"soft": oracle.SoftThreshold, "free": oracle.FreeThreshold}
    threshold = kinds[rule](NUM_CLASSES, momentum=0.7)
    averages = torch.full((2 + 3 * NUM_CLASSES,), 1 / NUM_CLASSES)
    averages[1] = 1
    run = implementation(impl, torch.device("cpu"))
    for step in range(12):
        p = many_guesses(step, count=40 + step, skew=step % 3)
        expected = threshold.weigh(p, p, ())
        logits, y = torch.from_numpy(np.log(p)).float(), torch.tensor([step % NUM_CLASSES])
        sums = torch.empty(4 + 3 * NUM_CLASSES, dtype=torch.int64)
        run.guess_statistics(logits, y, sums)
        ratio = torch.empty(NUM_CLASSES) if rule == "soft" else None
        uniform = torch.full((NUM_CLASSES,), 1 / NUM_CLASSES)
        run.update_averages(sums, averages, 0.7, uniform, ratio)
        weights = weights_of(p, impl, rule=rule, state=averages, ratio=ratio)
        assert_allclose(weights, expected, rtol=0, atol=ERROR)
    assert 0.1 < weights.mean() < 0.99


def many_guesses(seed=0, count=96, skew=0):
    """Distributions [M, L] whose largest entries lie anywhere between 1/L and 1."""
    chance = np.random.default_rng(seed)
    logits = chance.normal(size=(count, NUM_CLASSES)) * chance.uniform(0.2, 5, size=(count, 1))
    logits[:, skew] += 0.5
    return oracle.softmax(logits)


def weights_of(p, impl, **weighting):
    logits = torch.from_numpy(np.log(p)).float()
    y = torch.tensor([0])
    return functional.consistency_targets(y, logits, Weighting(**weighting), impl=impl)[1][
        1:
    ].numpy()


# The oracle itself, by cases worked by hand


def test_oracles_window_reads_before_it_takes_in_and_begins_uniform():
    align = oracle.WindowAlignment(2, 2, (0.5, 0.5))
    probs = np.array([[0.9, 0.1], [0.7, 0.3]])
    assert_allclose(align(probs, probs), probs, rtol=1e-12)
    # (0.5, 0.5) and (0.8, 0.2): the mean is (0.65, 0.35)
    expected = oracle.normalise_rows(probs * (0.5 + 1e-6) / (np.array([0.65, 0.35]) + 1e-6))
    assert_allclose(align(probs, probs), expected, rtol=1e-12)
    align(probs, probs)
    assert_allclose(align.means, [[0.8, 0.2]] * 2, rtol=1e-12)


def test_oracles_momentum_takes_in_before_it_aligns():
    align = oracle.MomentumAlignment(2, 0.5)
    probs, labels = np.array([[0.9, 0.1]]), np.array([[1.0, 0.0]])
    expected = oracle.normalise_rows(probs * [0.75 / 0.7, 0.25 / 0.3])
    assert_allclose(align(probs, labels), expected, rtol=1e-5)


def test_oracles_gaussian_is_that_of_two_rows():
    soft = oracle.SoftThreshold(2, momentum=0.0, spread=2.0)
    p = np.array([[0.9, 0.1], [0.4, 0.6]])
    # the mean is 0.75, the variance 0.045; the aligned rows are (0.842, 0.158), (0.283, 0.717)
    weights = soft.weigh(p, p, ())
    low = 0.6 / 0.35 / (0.4 / 0.65 + 0.6 / 0.35)
    assert_allclose(weights, [1, np.exp(-((low - 0.75) ** 2) / (0.045 / 2))], rtol=1e-4)


def test_oracles_free_thresholds_are_those_of_two_classes():
    free = oracle.FreeThreshold(2, momentum=0.0)
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.38, 0.62]])
    # mean confidence 0.7733; mean guess (0.6933, 0.3067): thresholds 0.7733 and 0.342
    assert_array_equal(free.weigh(p, p, ()), [1, 1, 1])
    q = np.array([[0.77, 0.23], [0.78, 0.22], [0.4, 0.6]])
    assert_array_equal(free.weigh(p, q, ()), [0, 1, 1])
    fair = np.array([0.69333 / (2 / 3), 0.30667 / (1 / 3)])
    assert_allclose(free.fairness(), fair / fair.sum(), rtol=1e-4)


def test_oracles_flex_thresholds_are_those_of_earlier_steps():
    flex = oracle.FlexThreshold(2, num_unlabelled=3, tau=0.9)
    p = np.array([[0.95, 0.05], [0.6, 0.4]])
    # nobody has a class: beta is 0, and so is the threshold
    assert_array_equal(flex.weigh(p, p, [2, 0]), [1, 1])
    assert flex.classes == [-1, -1, 0]
    # class 0 has one image, two have none: beta 1/2, threshold 0.3
    assert_array_equal(flex.weigh(p, p, [1, 1]), [1, 1])
    # two and one: beta 1, threshold 0.9
    assert_array_equal(flex.weigh(p, p, [1, 1]), [1, 0])
    flex.weigh(np.array([[0.95, 0.05], [0.05, 0.95]]), p, [0, 0])
    assert flex.classes == [1, 0, 0]


def test_oracles_loss_of_three_rows_is_that_of_a_worked_example():
    logits, targets = np.log([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]), [[1, 0], [1, 0], [0.5, 0.5]]
    log = np.log
    ce = oracle.consistency_loss(logits, targets, [1, 0, 0.5], 1, 2.0)
    mean_u = -0.5 * (log(0.2) + log(0.8)) / 2 / 2
    assert_allclose(ce, [log(2) + 2 * mean_u, log(2), mean_u, 0.5, 0.25], rtol=1e-12)
    kl = oracle.consistency_loss(logits, targets, [1, 0, 0.5], 1, 2.0, "kl")
    assert_allclose(kl[2], mean_u - 0.5 * log(2) / 2, rtol=1e-12)
    mse = oracle.consistency_loss(logits, targets, [1, 1, 0.5], 1, 2.0, "mse")
    assert_allclose(mse[2], (0.01 + 0.5 * 0.09) / 2, rtol=1e-12)
    # the second labelled row is known too well
    tsa = oracle.consistency_loss(logits, targets, [1, 1, 1], 2, 0.0, tsa=0.8)
    assert_allclose(tsa[1], log(2), rtol=1e-12)
    assert oracle.consistency_loss(logits, targets, [1, 1, 1], 2, 0.0, tsa=0.4)[1] == 0


def test_oracles_tsa_ends_at_one_and_begins_at_a_guess():
    for kind, first, last in (("linear", 0, 1), ("exp", np.exp(-5), 1), ("log", 0, 1 - np.exp(-5))):
        ends = [oracle.tsa_threshold(kind, step, 8, 4) for step in (0, 8)]
        assert_allclose(ends, [first * 0.75 + 0.25, last * 0.75 + 0.25], rtol=1e-12)


def test_oracles_fairness_is_that_of_two_rows():
    logits = np.log([[0.9, 0.1], [0.3, 0.7], [0.5, 0.5]])
    # mean (0.6, 0.4) over shares of a half
    expected = 0.4 * np.log(0.6) + 0.6 * np.log(0.4)
    found = oracle.fairness_loss(logits, [1, 0.5, 0], [0.4, 0.6])
    assert_allclose(found, expected, rtol=1e-10)
    assert oracle.fairness_loss(logits, [0, 0, 0], [0.4, 0.6]) == 0


def test_oracles_gradient_is_that_of_a_square():
    values = np.array([[1.0, -2.0], [0.5, 3.0]])
    slopes = oracle.gradient(lambda at: float((at**2).sum()), values)
    assert_allclose(slopes, 2 * values, rtol=1e-6)
