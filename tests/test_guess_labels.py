"""guess_labels: the sharpened mean of softmax outputs over the K views."""

import pytest
import torch

from gpu_mixmatch.functional import guess_labels, sharpen
from tests import oracle

# Largest absolute error of a guessed probability: the arithmetic is float32 whatever comes in.
ERROR = 2e-6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random_logits(num_views, num_images, num_classes, dtype=torch.float32, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (num_views, num_images, num_classes)
    return (scale * torch.randn(shape, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 2), (1, 5, 10), (2, 3, 7), (3, 1, 10), (4, 9, 101), (2, 4, 1)], ids=str
)
@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_guess_equals_the_oracle(shape, temperature, dtype):
    logits = random_logits(*shape, dtype)
    guesses = guess_labels(logits, temperature)
    assert guesses.shape == shape[1:]
    assert guesses.dtype == torch.float32
    expected = torch.from_numpy(oracle.guess_labels(logits.double().numpy(), temperature))
    torch.testing.assert_close(guesses.double(), expected, rtol=0, atol=ERROR / temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("num_views", [1, 2, 3])
def test_guess_from_huge_logits_is_finite_and_sums_to_one(num_views, temperature, dtype):
    signs = torch.where(random_logits(num_views, 40, 10) > 0, 1e4, -1e4)
    logits = (signs + random_logits(num_views, 40, 10, scale=100.0, seed=1)).to(dtype)
    guesses = guess_labels(logits, temperature)
    assert guesses.isfinite().all()
    torch.testing.assert_close(guesses.sum(dim=1), torch.ones(40), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_guess_from_half_precision_does_not_underflow(dtype):
    # Σ p^(1/T) of ten nearly equal classes at T = 0.01 is about 1e-99: 0 in float32
    logits = torch.zeros(2, 1, 10, dtype=dtype)
    logits[:, 0, 4] = 0.125
    probs = logits.softmax(dim=-1).mean(dim=0)
    assert (probs ** (1 / 0.01)).sum() == 0
    expected = torch.from_numpy(oracle.guess_labels(logits.double().numpy(), 0.01))
    assert expected[0, 4] > 0.99
    torch.testing.assert_close(
        guess_labels(logits, 0.01).double(), expected, rtol=0, atol=ERROR / 0.01
    )


@pytest.mark.parametrize("num_views", [2, 3, 5])
def test_guess_is_invariant_to_view_order(num_views):
    logits = random_logits(num_views, 6, 10)
    reordered = logits[torch.randperm(num_views, generator=torch.Generator().manual_seed(2))]
    for order in (reordered, logits.flip(0)):
        torch.testing.assert_close(
            guess_labels(order, 0.5), guess_labels(logits, 0.5), rtol=0, atol=ERROR
        )


def test_guess_of_one_view_is_its_sharpened_softmax():
    logits = random_logits(1, 5, 7)
    torch.testing.assert_close(
        guess_labels(logits, 0.5), sharpen(logits[0].softmax(dim=-1), 0.5), rtol=0, atol=ERROR
    )


@pytest.mark.parametrize("num_views", [1, 2, 4])
def test_guess_at_temperature_one_is_the_mean_of_softmaxes(num_views):
    logits = random_logits(num_views, 5, 7)
    torch.testing.assert_close(
        guess_labels(logits, 1.0), logits.softmax(dim=-1).mean(dim=0), rtol=0, atol=ERROR
    )


def test_guess_averages_probabilities_and_not_logits():
    # One certain view and one that knows nothing: the mean of probabilities is (3/4, 1/4) and its
    # square 9 : 1; the mean of logits would stay certain.
    logits = torch.tensor([[[50.0, -50.0]], [[0.0, 0.0]]])
    torch.testing.assert_close(
        guess_labels(logits, 0.5), torch.tensor([[0.9, 0.1]]), rtol=0, atol=ERROR
    )


def test_guess_of_repeated_views_is_that_of_one():
    logits = random_logits(1, 4, 5)
    torch.testing.assert_close(
        guess_labels(logits.repeat(4, 1, 1), 0.5), guess_labels(logits, 0.5), rtol=0, atol=ERROR
    )


def test_guess_of_an_image_does_not_depend_on_the_others():
    logits = random_logits(2, 6, 5)
    alone = torch.cat([guess_labels(logits[:, i : i + 1], 0.5) for i in range(6)])
    torch.testing.assert_close(guess_labels(logits, 0.5), alone, rtol=0, atol=ERROR)


def test_guess_does_not_change_when_a_constant_is_added_to_logits():
    logits = random_logits(2, 6, 5)
    shift = torch.tensor([3.0, -7.0]).view(2, 1, 1)
    torch.testing.assert_close(
        guess_labels(logits + shift, 0.5), guess_labels(logits, 0.5), rtol=0, atol=5 * ERROR
    )


def test_guess_lets_no_gradient_through():
    logits = random_logits(2, 3, 4).requires_grad_()
    guesses = guess_labels(logits, 0.5)
    assert not guesses.requires_grad
    (guesses.sum() + 0 * logits.sum()).backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_guess_of_no_images_is_no_rows():
    assert guess_labels(torch.empty(2, 0, 10), 0.5).shape == (0, 10)


def test_guess_with_impossible_classes_leaves_them_at_zero():
    logits = random_logits(2, 3, 5)
    logits[:, :, 1] = -torch.inf
    guesses = guess_labels(logits, 0.5)
    assert torch.equal(guesses[:, 1], torch.zeros(3))
    torch.testing.assert_close(guesses.sum(dim=1), torch.ones(3), rtol=0, atol=ERROR)


def test_guess_of_a_strided_view_equals_that_of_its_copy():
    logits = random_logits(4, 6, 5)[::2, 1:, ::2]
    assert torch.equal(guess_labels(logits, 0.5), guess_labels(logits.clone(), 0.5))


def test_guess_is_float32_under_autocast():
    logits = random_logits(2, 6, 10, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        guesses = guess_labels(logits, 0.5)
    assert guesses.dtype == torch.float32
    assert torch.equal(guesses, guess_labels(logits, 0.5))
