"""Batches of loaders and of the builder, taken and compared."""

import torch
from torch.nn.functional import one_hot

from gpu_mixmatch import MixMatch, WeakAugment
from gpu_mixmatch.types import SemiSupervisedBatch
from tests.factories import LinearNet


def take(loader, count):
    """The next batches, over as many epochs as it takes."""
    batches = []
    while len(batches) < count:
        for batch in loader:
            batches.append(batch)
            if len(batches) == count:
                break
    return batches


def assert_same_loaded(ones, others):
    """Two lists of a loader's batches are equal to the last bit, dtypes and all."""
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        for name, left, right in zip(SemiSupervisedBatch._fields, one, other, strict=True):
            assert left.dtype == right.dtype, name
            assert torch.equal(left, right), name


def assert_same_mixed(batch, other):
    """Two batches of the builder are equal to the last bit."""
    assert torch.equal(batch.inputs, other.inputs)
    assert torch.equal(batch.targets, other.targets)
    assert torch.equal(batch.params.lam, other.params.lam)
    assert torch.equal(batch.params.index, other.params.index)
    assert batch.num_labelled == other.num_labelled
    assert batch.step == other.step


def assert_mixmatch_takes(loaded, num_classes):
    """A loader's batch comes out of the builder as it is where nothing is drawn and mixed."""
    still = WeakAugment(padding=0, flip=0.0, mean=0.0, std=1.0, layout="NCHW")
    model = LinearNet(num_classes, tuple(loaded.x.shape[1:]))
    x, y, u, ids_x, ids_u = loaded
    mixmatch = MixMatch(still, num_classes, mix="none")
    batch = mixmatch(x, y, u, model, ids_x=ids_x, ids_u=ids_u)
    torch.testing.assert_close(batch.inputs, torch.cat([x, u, u]) / 255, rtol=0, atol=1e-6)
    assert torch.equal(batch.targets_x, one_hot(y, num_classes).float())
