"""mixup: λ'·row + (1 - λ')·partner, for images and targets alike."""

import pytest
import torch

from gpu_mixmatch import sampling
from gpu_mixmatch.functional import mixup
from gpu_mixmatch.types import MixUpParams
from tests import oracle

pytestmark = pytest.mark.usefixtures("each_cpu_impl")

# Largest error of a mixed value in [-1, 1] against float64, by dtype: rounding the result.
ERROR = {torch.float32: 5e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}
DTYPES = list(ERROR)
SHAPES = [
    (0, 3, 4, 4),
    (1, 3, 5, 7),
    (2, 1, 1, 1),
    (5, 1, 7, 3),
    (6, 3, 8, 8),
    (7, 2, 1, 5),
    (3, 11),
    (4, 3, 2, 5, 3),
]
IMAGE_SHAPES = [shape for shape in SHAPES if len(shape) == 4]


def random_batch(shape, dtype=torch.float32, num_classes=5, seed=0):
    """Images in [-1, 1], soft targets, and λ' in [0.5, 1] with any partners."""
    generator = torch.Generator().manual_seed(seed)
    inputs = (2 * torch.rand(shape, generator=generator) - 1).to(dtype)
    targets = torch.randn(shape[0], num_classes, generator=generator).softmax(dim=1)
    lam = 0.5 + 0.5 * torch.rand(shape[0], generator=generator)
    index = torch.randperm(shape[0], generator=generator)
    return inputs, targets, MixUpParams(lam, index)


def assert_equals_oracle(mixed, inputs, targets, params):
    expected = oracle.mixup(
        inputs.double().numpy(), targets.double().numpy(), params.lam.numpy(), params.index.numpy()
    )
    for result, reference in zip(mixed, expected, strict=True):
        torch.testing.assert_close(
            result.double(), torch.from_numpy(reference), rtol=0, atol=ERROR[result.dtype]
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mixup_equals_the_oracle(shape, dtype):
    inputs, targets, params = random_batch(shape, dtype)
    mixed_inputs, mixed_targets = mixup(inputs, targets, params)
    assert (mixed_inputs.shape, mixed_inputs.dtype) == (inputs.shape, dtype)
    assert (mixed_targets.shape, mixed_targets.dtype) == (targets.shape, torch.float32)
    assert_equals_oracle((mixed_inputs, mixed_targets), inputs, targets, params)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", IMAGE_SHAPES, ids=str)
def test_mixup_keeps_channels_last_and_its_values(shape, dtype):
    inputs, targets, params = random_batch(shape, dtype)
    last = inputs.contiguous(memory_format=torch.channels_last)
    mixed_inputs, mixed_targets = mixup(last, targets, params)
    assert mixed_inputs.stride() == last.stride()
    assert_equals_oracle((mixed_inputs, mixed_targets), inputs, targets, params)
    assert torch.equal(mixed_inputs, mixup(inputs, targets, params)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixup_of_many_chunks_equals_the_oracle(dtype):
    # more values than the eager implementation takes at once
    inputs, targets, params = random_batch((23, 3, 128, 128), dtype)
    mixed = mixup(inputs, targets, params)
    lam = params.lam.double().view(-1, 1, 1, 1)
    expected = lam * inputs.double() + (1 - lam) * inputs[params.index].double()
    torch.testing.assert_close(mixed[0].double(), expected, rtol=0, atol=ERROR[dtype])


@pytest.mark.parametrize("num_rows", [1, 2, 7, 64])
def test_mixup_targets_sum_to_one(num_rows):
    inputs, targets, params = random_batch((num_rows, 1, 2, 2))
    mixed_targets = mixup(inputs, targets, params)[1]
    torch.testing.assert_close(mixed_targets.sum(dim=1), torch.ones(num_rows), rtol=0, atol=1e-6)


def test_mixup_targets_of_equal_labels_sum_to_one():
    # an implementation that assigns λ' and 1 - λ' to one-hot rows loses one of them here
    targets = torch.nn.functional.one_hot(torch.tensor([2, 2, 0, 2]), 4).float()
    params = MixUpParams(torch.tensor([0.5, 0.7, 0.9, 0.6]), torch.tensor([1, 3, 2, 0]))
    mixed_targets = mixup(torch.zeros(4, 1), targets, params)[1]
    torch.testing.assert_close(mixed_targets, targets, rtol=0, atol=1e-6)


def test_mixup_weighs_the_row_itself_by_lam():
    inputs = torch.tensor([[1.0], [0.0]])
    params = MixUpParams(torch.tensor([0.75, 0.5]), torch.tensor([1, 0]))
    mixed_inputs, mixed_targets = mixup(inputs, torch.eye(2), params)
    assert torch.equal(mixed_inputs, torch.tensor([[0.75], [0.5]]))
    assert torch.equal(mixed_targets, torch.tensor([[0.75, 0.25], [0.5, 0.5]]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mixup_with_lam_one_is_the_identity(shape, dtype):
    inputs, targets, params = random_batch(shape, dtype)
    mixed = mixup(inputs, targets, params._replace(lam=torch.ones(shape[0])))
    assert torch.equal(mixed[0], inputs)
    assert torch.equal(mixed[1], targets)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixup_with_itself_is_the_identity(dtype):
    inputs, targets, params = random_batch((6, 3, 4, 4), dtype)
    mixed = mixup(inputs, targets, params._replace(index=torch.arange(6)))
    assert torch.equal(mixed[0], inputs)
    assert torch.equal(mixed[1], targets)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*IMAGE_SHAPES, (23, 3, 96, 96)], ids=str)
def test_mixup_writes_every_element_of_out(shape, dtype, channels_last):
    inputs, targets, params = random_batch(shape, dtype)
    if channels_last:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    out = torch.full_like(inputs, torch.nan)
    pointer = out.data_ptr()
    mixed_inputs, mixed_targets = mixup(inputs, targets, params, out=out)
    assert mixed_inputs is out
    assert mixed_inputs.data_ptr() == pointer
    assert not out.isnan().any()
    expected = mixup(inputs, targets, params)
    assert torch.equal(out, expected[0])
    assert torch.equal(mixed_targets, expected[1])


def test_mixup_does_not_write_to_its_arguments():
    inputs, targets, params = random_batch((6, 3, 4, 4))
    before = inputs.clone(), targets.clone(), params.lam.clone(), params.index.clone()
    mixup(inputs, targets, params)
    for tensor, copy in zip((inputs, targets, *params), before, strict=True):
        assert torch.equal(tensor, copy)


def test_mixup_results_share_no_memory_with_the_arguments():
    inputs, targets, params = random_batch((3, 1, 2, 2))
    mixed = mixup(inputs, targets, params._replace(lam=torch.ones(3)))
    mixed[0].fill_(torch.nan)
    mixed[1].fill_(torch.nan)
    assert not inputs.isnan().any()
    assert not targets.isnan().any()


def test_mixup_of_a_permuted_batch_is_the_permuted_result():
    inputs, targets, params = random_batch((7, 2, 3, 3))
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    place = order.argsort()  # where each old row went
    moved = MixUpParams(params.lam[order], place[params.index[order]])
    mixed = mixup(inputs, targets, params)
    permuted = mixup(inputs[order], targets[order], moved)
    assert torch.equal(permuted[0], mixed[0][order])
    assert torch.equal(permuted[1], mixed[1][order])


def test_mixup_leaves_nothing_out_of_the_range_of_its_inputs():
    inputs, targets, params = random_batch((64, 1, 8, 8))
    mixed = mixup(inputs, targets, params)[0]
    assert mixed.min() >= inputs.min()
    assert mixed.max() <= inputs.max()


def test_mixup_rows_stay_nearer_to_themselves_than_to_their_partners():
    inputs, targets, _ = random_batch((40, 3, 4, 4))
    params = sampling.draw_mixup(0, 0, 10, 15, num_augmentations=2)
    mixed = mixup(inputs, targets, params)[0]
    own = (mixed - inputs).square().sum(dim=(1, 2, 3))
    other = (mixed - inputs[params.index]).square().sum(dim=(1, 2, 3))
    assert (own <= other + 1e-5).all()


def test_mixup_of_half_precision_rounds_once():
    # In float16 arithmetic 1 - λ' and two products would each be rounded too.
    inputs, targets, params = random_batch((32, 3, 8, 8), torch.float16)
    lam = params.lam.double().view(-1, 1, 1, 1)
    exact = lam * inputs.double() + (1 - lam) * inputs[params.index].double()
    mixed = mixup(inputs, targets, params)[0]
    half_ulp = torch.finfo(torch.float16).eps / 2 * exact.abs().clamp_min(2.0**-14)
    assert ((mixed.double() - exact).abs() <= half_ulp + 1e-6).all()
