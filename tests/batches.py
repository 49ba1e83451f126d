"""Batches of loaders and of the builder, taken and compared."""

import torch

from gpu_mixmatch.types import SemiSupervisedBatch


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
