"""mixmatch_loss, linear_rampup and MixMatchLoss."""

import numpy as np
import pytest
import torch

from gpu_mixmatch import MixMatchBatch, MixMatchLoss, MixUpParams
from gpu_mixmatch.functional import linear_rampup, mixmatch_loss
from tests import oracle

# Largest relative error of a loss and absolute error of a gradient: float32 arithmetic.
LOSS_ERROR = 5e-6
GRAD_ERROR = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# rows, labelled rows, classes
SIZES = [(1, 1, 3), (1, 0, 3), (2, 1, 1), (5, 2, 7), (9, 3, 10), (12, 4, 101), (6, 6, 5), (6, 0, 5)]


def random_rows(num_rows, num_classes, dtype=torch.float32, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(num_rows, num_classes, generator=generator)).to(dtype)
    targets = torch.randn(num_rows, num_classes, generator=generator).softmax(dim=1)
    return logits, targets


def straightforward(logits, targets, num_labelled, weight_u):
    """Eq. 2-5 with a mean where the paper has one."""
    probs = logits.softmax(dim=1)
    loss_x = -(targets * probs.log())[:num_labelled].sum(dim=1).mean()
    loss_u = (targets - probs)[num_labelled:].square().mean()
    return loss_x + weight_u * loss_u


def batch_of(targets, num_labelled, step):
    length = len(targets)
    params = MixUpParams(torch.ones(length), torch.arange(length))
    return MixMatchBatch(
        torch.zeros(length, 1, 2, 2), targets, num_labelled, torch.tensor(step), params
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_rows", "num_labelled", "num_classes"), SIZES)
def test_loss_equals_the_oracle(num_rows, num_labelled, num_classes, dtype):
    logits, targets = random_rows(num_rows, num_classes, dtype)
    output = mixmatch_loss(logits, targets, num_labelled, 75.0)
    expected = oracle.mixmatch_loss(
        logits.double().numpy(), targets.double().numpy(), num_labelled, 75.0
    )
    for value, reference in zip(output[:3], expected, strict=True):
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(reference, rel=LOSS_ERROR, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_rows", "num_labelled"), [(2, 1), (9, 3), (12, 4)])
def test_gradients_equal_those_of_the_formula_in_float64(num_rows, num_labelled, dtype):
    logits, targets = random_rows(num_rows, 7, dtype)
    logits.requires_grad_()
    mixmatch_loss(logits, targets, num_labelled, 10.0).loss.backward()
    wide = logits.detach().double().requires_grad_()
    straightforward(wide, targets.double(), num_labelled, 10.0).backward()
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=1e-3, atol=GRAD_ERROR[dtype])


@pytest.mark.parametrize(
    ("num_rows", "num_labelled", "num_classes"), [(1, 1, 3), (1, 0, 3), (2, 1, 1), (5, 2, 4)]
)
def test_gradients_pass_gradcheck(num_rows, num_labelled, num_classes):
    logits, targets = random_rows(num_rows, num_classes, torch.float64)
    logits.requires_grad_()
    # a power of two, and targets as they are: the weight is kept in float32
    assert torch.autograd.gradcheck(
        lambda rows: mixmatch_loss(rows, targets.double(), num_labelled, 8.0)[:3], logits
    )


def test_loss_of_a_worked_example():
    # labelled: softmax (3/4, 1/4), target (1, 0); unlabelled: (1/2, 1/2) against (0.9, 0.1)
    logits = torch.tensor([[np.log(3.0), 0.0], [5.0, 5.0]])
    targets = torch.tensor([[1.0, 0.0], [0.9, 0.1]])
    output = mixmatch_loss(logits, targets, 1, 2.0)
    assert output.loss_x.item() == pytest.approx(np.log(4 / 3), rel=1e-6)
    assert output.loss_u.item() == pytest.approx(0.16, rel=1e-6)
    assert output.loss.item() == pytest.approx(np.log(4 / 3) + 0.32, rel=1e-6)
    assert output.weight_u.item() == 2.0


def test_squared_error_is_the_mean_over_images_and_classes():
    logits, targets = random_rows(6, 5)
    one = mixmatch_loss(logits, targets, 0, 1.0).loss_u
    twice = mixmatch_loss(logits.repeat(2, 1), targets.repeat(2, 1), 0, 1.0).loss_u
    torch.testing.assert_close(twice, one)
    # classes that no one believes in thin the mean out, as 1 / L demands
    padded = torch.nn.functional.pad(logits, (0, 5), value=-1e4)
    wider = mixmatch_loss(padded, torch.nn.functional.pad(targets, (0, 5)), 0, 1.0).loss_u
    torch.testing.assert_close(wider, one / 2)


def test_loss_of_targets_that_the_model_gives_is_their_entropy():
    logits, _ = random_rows(8, 5)
    probs = logits.softmax(dim=1)
    output = mixmatch_loss(logits, probs, 4, 1.0)
    assert output.loss_u.item() == pytest.approx(0, abs=1e-12)
    entropy = -(probs * probs.log())[:4].sum(dim=1).mean()
    torch.testing.assert_close(output.loss_x, entropy)


@pytest.mark.parametrize("num_labelled", [0, 4])
def test_a_part_without_rows_is_zero_with_zero_gradient(num_labelled):
    logits, targets = random_rows(4, 3)
    logits.requires_grad_()
    output = mixmatch_loss(logits, targets, num_labelled, 5.0)
    empty = output.loss_x if num_labelled == 0 else output.loss_u
    assert empty.item() == 0
    output.loss.backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().sum() > 0


def test_loss_without_any_rows_is_zero():
    output = mixmatch_loss(torch.empty(0, 3, requires_grad=True), torch.empty(0, 3), 0, 5.0)
    assert [value.item() for value in output] == [0, 0, 0, 5]
    output.loss.backward()


@pytest.mark.parametrize(
    "weight",
    [0.0, 3, 75.0, torch.tensor(75.0), torch.tensor(75.0, dtype=torch.float64), torch.tensor(7)],
    ids=repr,
)
def test_weight_may_be_a_number_or_a_tensor(weight):
    logits, targets = random_rows(6, 4)
    output = mixmatch_loss(logits, targets, 2, weight)
    assert output.weight_u.item() == float(weight)
    assert output.weight_u.dtype == torch.float32
    torch.testing.assert_close(output.loss, output.loss_x + float(weight) * output.loss_u)


def test_weight_zero_leaves_the_labelled_loss_and_its_gradient():
    logits, targets = random_rows(6, 4)
    logits.requires_grad_()
    output = mixmatch_loss(logits, targets, 2, 0.0)
    assert output.loss.item() == output.loss_x.item()
    output.loss.backward()
    assert torch.equal(logits.grad[2:], torch.zeros(4, 4))


def test_no_gradient_reaches_targets():
    logits, targets = random_rows(6, 4)
    logits.requires_grad_()
    targets.requires_grad_()
    mixmatch_loss(logits, targets, 2, 2.0).loss.backward()
    assert logits.grad is not None
    assert targets.grad is None


def test_no_gradient_reaches_the_weight():
    logits, targets = random_rows(6, 4)
    logits.requires_grad_()
    weight = torch.tensor(2.0, requires_grad=True)
    mixmatch_loss(logits, targets, 2, weight).loss.backward()
    assert weight.grad is None


def test_parts_can_be_logged_without_the_graph():
    logits, targets = random_rows(6, 4)
    logits.requires_grad_()
    output = mixmatch_loss(logits, targets, 2, 2.0)
    assert output.loss.requires_grad
    assert not output.weight_u.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_loss_of_huge_logits_is_finite(dtype):
    logits = torch.where(random_rows(12, 10)[0] > 0, 1e4, -1e4).to(dtype).requires_grad_()
    output = mixmatch_loss(logits, random_rows(12, 10)[1], 4, 75.0)
    assert output.loss.isfinite()
    output.loss.backward()
    assert logits.grad.isfinite().all()


def test_loss_is_float32_under_autocast():
    logits, targets = random_rows(9, 10, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = mixmatch_loss(logits, targets, 3, 75.0)
    assert output.loss.dtype == torch.float32
    assert torch.equal(output.loss, mixmatch_loss(logits, targets, 3, 75.0).loss)


@pytest.mark.parametrize("num_classes", [1000, 30_000])
def test_loss_of_many_classes_equals_the_oracle(num_classes):
    logits, targets = random_rows(4, num_classes)
    output = mixmatch_loss(logits, targets, 2, 75.0)
    expected = oracle.mixmatch_loss(logits.double().numpy(), targets.double().numpy(), 2, 75.0)
    for value, reference in zip(output[:3], expected, strict=True):
        assert value.item() == pytest.approx(reference, rel=1e-5)


# The ramp


@pytest.mark.parametrize("rampup_steps", [0, 1, 3, 16_384])
@pytest.mark.parametrize("step", [0, 1, 2, 3, 4, 8_192, 16_383, 16_384, 16_385, 2**31, 2**40])
def test_rampup_equals_the_oracle(step, rampup_steps):
    expected = oracle.linear_rampup(step, rampup_steps)
    for value in (
        linear_rampup(step, rampup_steps),
        linear_rampup(torch.tensor(step), rampup_steps),
    ):
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected, rel=1e-6)


def test_rampup_starts_at_zero_and_ends_at_one():
    assert linear_rampup(0, 100).item() == 0
    assert linear_rampup(50, 100).item() == 0.5
    assert linear_rampup(100, 100).item() == 1
    assert linear_rampup(10**9, 100).item() == 1


def test_rampup_of_no_steps_is_one_from_the_start():
    assert [linear_rampup(step, 0).item() for step in (0, 1, 10**6)] == [1, 1, 1]


def test_rampup_never_falls():
    values = [linear_rampup(step, 37).item() for step in range(50)]
    assert values == sorted(values)


# MixMatchLoss


@pytest.mark.parametrize(
    ("step", "weight"), [(0, 0.0), (1, 0.75), (50, 37.5), (100, 75.0), (1000, 75.0)]
)
def test_loss_follows_the_step_of_the_batch(step, weight):
    logits, targets = random_rows(9, 4)
    criterion = MixMatchLoss(lambda_u=75.0, rampup_steps=100)
    output = criterion(logits, batch_of(targets, 3, step))
    assert output.weight_u.item() == pytest.approx(weight, rel=1e-6)
    expected = mixmatch_loss(logits, targets, 3, weight)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.loss_x, expected.loss_x)
    torch.testing.assert_close(output.loss_u, expected.loss_u)


def test_loss_without_a_ramp_has_full_weight_from_the_start():
    logits, targets = random_rows(9, 4)
    assert MixMatchLoss(250.0, 0)(logits, batch_of(targets, 3, 0)).weight_u.item() == 250


def test_defaults_are_those_of_the_reference():
    criterion = MixMatchLoss()
    assert (criterion.lambda_u, criterion.rampup_steps) == (75.0, 16_384)


def test_criterion_has_no_state_and_remembers_no_step():
    logits, targets = random_rows(9, 4)
    criterion = MixMatchLoss(75.0, 100)
    assert criterion.state_dict() == {}
    assert list(criterion.parameters()) == []
    weights = [criterion(logits, batch_of(targets, 3, step)).weight_u.item() for step in (90, 10)]
    assert weights == pytest.approx([67.5, 7.5])


def test_criterion_shows_its_fields():
    assert repr(MixMatchLoss(75.0, 100)) == "MixMatchLoss(lambda_u=75.0, rampup_steps=100)"


def test_criterion_takes_half_precision_logits_to_a_float32_loss():
    logits, targets = random_rows(9, 4, torch.bfloat16)
    logits.requires_grad_()
    output = MixMatchLoss(75.0, 0)(logits, batch_of(targets, 3, 0))
    assert output.loss.dtype == torch.float32
    output.loss.backward()
    assert logits.grad.dtype == torch.bfloat16
