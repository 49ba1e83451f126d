"""What ports of these methods got wrong is right here. A comment in each test says what it was."""

import pytest
import torch

from gpu_mixmatch import SoftMatch, SoftThreshold, _unchecked, functional
from gpu_mixmatch.types import Weighting
from tests.factories import ConstantNet
from tests.family import ADAPTIVE, ENGINES, B, buffers_of, data_of, labelled_batch, net
from tests.skips import skip_without


@pytest.fixture(params=["eager", "numba", "triton"])
def impl(request):
    if request.param != "eager":
        skip_without(request.param)
    return request.param


def weights_of(logits, impl="eager", **weighting):
    """Weights of guesses by an operation alone."""
    y = torch.tensor([0])
    return functional.consistency_targets(y, logits, Weighting(**weighting), impl=impl)[1][1:]


# Adaptive thresholds


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("num_u", [1, 4])
def test_softmatch_weighs_guesses_of_no_variance(num_u, momentum):
    # USB: the unbiased variance of one row is NaN, and so are all weights from then on
    builder = SoftMatch(*ENGINES, threshold=SoftThreshold(momentum, uniform=False))
    x, y, u, _ = data_of()
    for _ in range(3):
        batch = builder(x, y, u[:num_u], ConstantNet([3.0, 1.0, 0.0, 0.0]))
        assert torch.equal(batch.weights, torch.ones(B + num_u))
    assert builder.threshold.averages.isfinite().all()


def test_a_gaussian_of_no_variance_is_a_threshold_at_the_mean(impl):
    # a quotient of two zeros
    logits = torch.tensor([[2.0, 0, 0, 0], [3.0, 0, 0, 0], [8.0, 0, 0, 0]])
    state = torch.full((2 + 3 * 4,), 0.25)
    state[0], state[1] = logits[1].softmax(dim=0).max(), 0.0
    weights = weights_of(logits, impl, rule="soft", state=state)
    assert weights.tolist() == [0, 1, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_guess_that_is_not_a_number_adds_nothing_to_what_is_learnt(impl, value):
    # others never saw a finite threshold again; in whole numbers it would be any number
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    bad = logits.clone()
    bad[1, 2] = value
    y = torch.tensor([0, 2])
    sums, clean = (
        _unchecked.guess_statistics(values, y, impl) for values in (bad, logits[[0, 2, 3, 4]])
    )
    assert int(sums[0]) == 5
    assert (sums[1:] - clean[1:]).abs().max() <= 2**10  # a last bit of a softmax, in 2^-32


@pytest.mark.parametrize("method", ADAPTIVE)
def test_one_batch_of_bad_logits_spoils_no_state(method):
    builder = ADAPTIVE[method]()
    batch = labelled_batch(builder, 0, model=lambda images: net()(images) * float("nan"))
    assert not batch.weights[B:].nan_to_num().any()
    for buffer in buffers_of(builder):
        assert buffer.isfinite().all()
        assert buffer.abs().max() <= 20
    assert labelled_batch(builder, 1).weights.isfinite().all()
