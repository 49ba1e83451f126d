"""Builders, data and batches of the methods that weigh guesses, for tests of any of them."""

import torch

from gpu_mixmatch import (
    UDA,
    DistributionAlignment,
    FixMatch,
    FlexMatch,
    FreeMatch,
    RandAugment,
    SoftMatch,
    WeakAugment,
)
from tests.factories import LinearNet, random_images, random_labels

IMAGE = (3, 6, 6)
NUM_CLASSES = 4
B, M, SAMPLES = 3, 6, 12
WEAK = WeakAugment(1)
ENGINES = WEAK, RandAugment.fixmatch(WEAK, cutout=2), NUM_CLASSES

ADAPTIVE = {
    "SoftMatch": lambda **options: SoftMatch(*ENGINES, **options),
    "FreeMatch": lambda **options: FreeMatch(*ENGINES, **options),
    "FlexMatch": lambda **options: FlexMatch(
        *ENGINES, num_unlabelled=SAMPLES, threshold=0.5, **options
    ),
    "window": lambda **options: UDA(*ENGINES, alignment=DistributionAlignment(3), **options),
    "momentum": lambda **options: FixMatch(
        *ENGINES, alignment=DistributionAlignment(momentum=0.9, target="uniform"), **options
    ),
    "FreeMatch, aligned": lambda **options: FreeMatch(
        *ENGINES, alignment=DistributionAlignment(2), **options
    ),
}


def net():
    return LinearNet(NUM_CLASSES, IMAGE)


def data_of(step=0):
    """x, y, u and ids_u of a step."""
    x, u = random_images(B, IMAGE, seed=2 * step), random_images(M, IMAGE, seed=2 * step + 1)
    ids_u = torch.randint(SAMPLES, (M,), generator=torch.Generator().manual_seed(step))
    return x, random_labels(B, NUM_CLASSES, seed=step), u, ids_u


def labelled_batch(builder, step=0, *, order="first", model=None):
    """The batch of a step, with its targets."""
    model = net() if model is None else model
    x, y, u, ids_u = data_of(step)
    batch = builder(x, y, u, model if order == "first" else None, ids_u=ids_u)
    with torch.no_grad():
        return batch.complete(model(batch.inputs))[1]


def buffers_of(builder):
    """All that a method has learnt of guesses."""
    parts = builder.threshold, builder.alignment
    return [buffer for part in parts if part is not None for buffer in part.buffers()]


def assert_equal_states(one, other):
    """Two builders have learnt the same, to the last bit."""
    ones, others = buffers_of(one), buffers_of(other)
    assert len(ones) == len(others) > 0
    for mine, theirs in zip(ones, others, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def assert_equal_batches(one, other):
    """Two batches with their targets are equal to the last bit."""
    assert torch.equal(one.inputs, other.inputs)
    assert torch.equal(one.targets, other.targets)
    assert torch.equal(one.weights, other.weights)
    assert (one.fairness is None) == (other.fairness is None)
    assert one.fairness is None or torch.equal(one.fairness, other.fairness)
    assert int(one.step) == int(other.step)
