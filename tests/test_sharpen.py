"""sharpen: p^(1/T), normalised, without underflow."""

import numpy as np
import pytest
import torch

from gpu_mixmatch.functional import sharpen
from tests import oracle

# Largest absolute error of a probability, by the dtype that comes in and goes out.
ERROR = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3,
}
DTYPES = list(ERROR)
SHAPES = [(1, 1), (1, 10), (5, 3), (7, 101), (2, 3, 4), (6,)]


def distributions(shape, dtype=torch.float64, seed=0):
    """Rows that sum to one before they are rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (2 * logits).softmax(dim=-1).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [0.25, 0.5, 1.0, 2.0])
def test_sharpen_equals_the_oracle(shape, temperature, dtype):
    probs = distributions(shape, dtype)
    sharpened = sharpen(probs, temperature)
    assert sharpened.shape == probs.shape
    assert sharpened.dtype == dtype
    expected = torch.from_numpy(oracle.sharpen(probs.double().numpy(), temperature))
    torch.testing.assert_close(sharpened.double(), expected, rtol=0, atol=ERROR[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sharpen_at_temperature_one_is_the_identity(dtype):
    probs = distributions((6, 5), dtype)
    # rounded rows need not sum to one, and sharpening normalises them: half an ulp per entry
    torch.testing.assert_close(sharpen(probs, 1.0), probs, rtol=0, atol=2 * ERROR[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.5, 1.0, 10.0])
def test_sharpen_rows_sum_to_one(temperature, dtype):
    sharpened = sharpen(distributions((9, 17), dtype), temperature).double()
    torch.testing.assert_close(
        sharpened.sum(dim=-1), torch.ones(9, dtype=torch.float64), rtol=0, atol=17 * ERROR[dtype]
    )
    assert (sharpened >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_sharpen_does_not_underflow_at_low_temperatures(dtype):
    # 0.1^100 and 0.09^100 are 0 in float32 and below: dividing them gives 0 / 0
    probs = torch.full((1, 11), 0.09, dtype=torch.float64)
    probs[0, 3] = 0.1
    probs = probs.to(dtype)
    assert (probs ** (1 / 0.01)).sum() == 0
    expected = torch.from_numpy(oracle.sharpen(probs.double().numpy(), 0.01))
    torch.testing.assert_close(sharpen(probs, 0.01).double(), expected, rtol=0, atol=ERROR[dtype])
    assert expected[0, 3] > 0.99


def test_sharpen_lowers_the_entropy_and_keeps_the_order_of_classes():
    probs = distributions((20, 8))
    sharpened = sharpen(probs, 0.5)

    def entropy(rows):
        return -(rows * rows.log()).sum(dim=-1)

    assert (entropy(sharpened) < entropy(probs)).all()
    assert torch.equal(sharpened.argsort(dim=-1), probs.argsort(dim=-1))


def test_sharpen_tends_to_one_hot_rows():
    probs = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])
    torch.testing.assert_close(
        sharpen(probs, 0.01), torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]), rtol=0, atol=1e-6
    )


def test_sharpen_keeps_impossible_classes_impossible():
    probs = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.5, 0.5]])
    assert torch.equal(sharpen(probs, 0.5), probs)


def test_sharpen_keeps_ties():
    probs = torch.full((2, 4), 0.25, dtype=torch.float16)
    assert torch.equal(sharpen(probs, 0.01), probs)


@pytest.mark.parametrize("shape", [(0, 10), (3, 0, 4)], ids=str)
def test_sharpen_of_no_rows_is_no_rows(shape):
    assert sharpen(torch.empty(shape), 0.5).shape == shape


def test_sharpen_does_not_write_to_its_argument():
    probs = distributions((3, 4), torch.float32)
    before = probs.clone()
    sharpen(probs, 0.5)
    assert torch.equal(probs, before)


def test_sharpen_of_a_strided_view_equals_that_of_its_copy():
    probs = distributions((8, 6), torch.float32)
    view = probs[::2]
    assert torch.equal(sharpen(view, 0.5), sharpen(view.clone(), 0.5))


def test_sharpen_passes_gradients_to_probabilities():
    probs = distributions((3, 4)).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: sharpen(p, 0.5), probs)


def test_sharpen_with_float32_is_as_near_to_float64_as_rounding_allows():
    probs = distributions((200, 10), torch.float32, seed=3)
    expected = oracle.sharpen(probs.double().numpy(), 0.5)
    assert np.abs(sharpen(probs, 0.5).numpy() - expected).max() < 5e-7
