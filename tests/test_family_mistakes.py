"""What ports of these methods got wrong is right here. A comment in each test says what it was."""

import copy

import pytest
import torch
from torch import nn

from gpu_mixmatch import (
    UDA,
    ConsistencyLoss,
    DistributionAlignment,
    FixMatch,
    FlexMatch,
    MeanTeacher,
    SoftMatch,
    SoftThreshold,
    _unchecked,
    functional,
)
from gpu_mixmatch.methods import thresholds
from gpu_mixmatch.types import Weighting
from tests import oracle
from tests.factories import ConstantNet, ConvNet
from tests.family import (
    ADAPTIVE,
    ENGINES,
    NUM_CLASSES,
    SAMPLES,
    WEAK,
    B,
    M,
    buffers_of,
    data_of,
    labelled_batch,
    net,
)
from tests.no_sync import NoExport, NoSync, look_at_nothing
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


# of numpy, in Triton's interpreter
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
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


# The gradient


@pytest.mark.parametrize("order", ["first", "one pass"])
@pytest.mark.parametrize("with_teacher", [True, False])
def test_meanteachers_consistency_has_a_gradient_of_the_student_alone(with_teacher, order):
    # USB takes the student's logits from the teacher's pass, LAMDA detaches them: no gradient
    student, teacher = net(), net()
    teacher.dense.weight.data.mul_(0.5)
    method = MeanTeacher(WEAK, NUM_CLASSES, teacher=teacher if with_teacher else None)
    x, y, u, _ = data_of()
    batch = method(x, y, u, student if order == "first" else None)
    logits = student(batch.inputs)
    output = ConsistencyLoss(50.0, loss_u="mse")(logits, batch)
    output.loss_u.backward()
    assert teacher.dense.weight.grad is None

    twin = copy.deepcopy(student)
    strong = batch.inputs[B : B + M]
    weak = MeanTeacher(WEAK, NUM_CLASSES)(x, y, u).inputs[B + M :]
    with torch.no_grad():
        targets = (teacher if with_teacher else student)(weak).softmax(dim=1)
    (twin(strong).softmax(dim=1) - targets).square().mean().backward()
    assert twin.dense.weight.grad.abs().max() > 0.01
    torch.testing.assert_close(student.dense.weight.grad, twin.dense.weight.grad)


@pytest.mark.parametrize("method", ["FixMatch", *ADAPTIVE])
def test_no_gradient_flows_through_the_guess_of_one_pass(method):
    builder = ADAPTIVE.get(method, lambda: FixMatch(*ENGINES, threshold=0.3))()
    x, y, u, ids_u = data_of()
    batch = builder(x, y, u, ids_u=ids_u)
    logits = net()(batch.inputs).detach().requires_grad_()
    output = ConsistencyLoss(lambda_fair=float("Free" in method))(logits, batch)
    output.loss.backward()
    strong, weak = logits.grad[B : B + M], logits.grad[B + M :]
    assert not weak.any()
    assert strong.any() == (output.kept > 0)
    assert output.kept > 0 or method in ("window", "momentum")


@pytest.mark.parametrize("order", ["first", "one pass"])
def test_one_pass_is_one_and_a_guess_before_it_moves_no_statistics(order):
    # three passes move running statistics three times, by rows of other kinds
    model = nn.Sequential(nn.BatchNorm2d(3), net())
    x, y, u, _ = data_of()
    batch = FixMatch(*ENGINES)(x, y, u, model if order == "first" else None)
    assert model[0].num_batches_tracked == 0
    ConsistencyLoss()(model(batch.inputs), batch)
    assert model[0].num_batches_tracked == 1
    assert len(batch.inputs) == (B + M if order == "first" else B + 2 * M)
    mean = 0.1 * batch.inputs.mean(dim=(0, 2, 3))
    torch.testing.assert_close(model[0].running_mean, mean, rtol=1e-4, atol=1e-6)


def test_a_guess_by_batch_statistics_is_of_the_weak_views_alone():
    model = ConvNet(NUM_CLASSES)
    x, y, u, _ = data_of()
    builder = FixMatch(*ENGINES, threshold=None, temperature=1.0)
    batch = builder(x, y, u, model)
    weak = FixMatch(*ENGINES)(x, y, u).inputs[B + M :]
    with torch.no_grad():
        expected = copy.deepcopy(model).train()(weak).softmax(dim=1)
    torch.testing.assert_close(batch.targets[B:], expected)


# Temperatures and thresholds

# probabilities of 0.75, 0.1, 0.1, 0.05
UNSURE = [2.708, 0.693, 0.693, 0.0]


def guess_of(builder, logits):
    x, y, u, ids_u = data_of()
    batch = builder(x, y, u, ConstantNet(logits), ids_u=ids_u)
    return batch.targets[-1].double().numpy(), float(batch.weights[-1])


@pytest.mark.parametrize("temperature", [0.4, 0.8])
def test_udas_temperature_is_applied_to_the_target_and_not_to_the_mask(temperature):
    # USB never applied it; sharpened, 0.75 would pass for confident
    target, weight = guess_of(UDA(*ENGINES, temperature=temperature), UNSURE)
    probs = oracle.softmax(UNSURE)
    assert oracle.sharpen(probs, temperature).max() > 0.8 > probs.max()
    torch.testing.assert_close(target, oracle.sharpen(probs, temperature), rtol=0, atol=1e-5)
    assert weight == 0
    assert guess_of(UDA(*ENGINES, threshold=0.7, temperature=temperature), UNSURE)[1] == 1


def test_udas_loss_compares_the_sharpened_guess_with_the_prediction_as_it_is():
    # a port sharpened the prediction
    x, y, u, _ = data_of()
    builder = UDA(*ENGINES, threshold=0.7)
    batch = builder(x, y, u, ConstantNet(UNSURE))
    output = ConsistencyLoss(loss_u="kl")(torch.tensor(UNSURE).expand(B + M, -1), batch)
    target, probs = oracle.sharpen(oracle.softmax(UNSURE), 0.4), oracle.softmax(UNSURE)
    divergence = (target * (torch.tensor(target) / torch.tensor(probs)).log().numpy()).sum()
    assert float(output.loss_u) == pytest.approx(divergence, rel=1e-4)


@pytest.mark.parametrize("temperature", [None, 0.1, 0.5, 2.0])
def test_fixmatchs_temperature_does_not_move_the_threshold(temperature):
    # LAMDA and kek put it before: a threshold of 0.95 was one of 0.81
    for threshold, weight in ((0.74, 1), (0.76, 0)):
        builder = FixMatch(*ENGINES, threshold=threshold, temperature=temperature)
        assert guess_of(builder, UNSURE)[1] == weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("order", ["first", "one pass"])
def test_thresholds_compare_in_float32_under_autocast(dtype, order):
    # a probability of 0.9511 is 0.9492 in bfloat16, one of 0.9487 is 0.9487 or 0.9482 in float16
    values = {
        torch.bfloat16: (2.96875, 2.953125, 2.9375, 2.921875),
        torch.float16: (2.919921875, 2.91796875, 2.916015625, 2.9140625),
    }[dtype]
    logits = torch.tensor([[value, 0.0] for value in values]).to(dtype)
    probs, rounded = logits.double().softmax(dim=1)[:, 0], logits.softmax(dim=1)[:, 0].double()
    threshold = float((probs[1] + probs[2]) / 2)
    assert (probs >= threshold).tolist() == [True, True, False, False]
    assert ((rounded >= threshold) != (probs >= threshold)).any()
    x, y, u, _ = data_of()
    builder = FixMatch(WEAK, ENGINES[1], 2, threshold=threshold)
    rows = logits.repeat(8, 1)

    def model(images):
        return rows[: len(images)]

    with torch.autocast("cpu", dtype):
        batch = builder(x, y % 2, u[:4], model if order == "first" else None)
        if order == "one pass":
            batch = batch.complete(rows[torch.tensor([0] * (B + 4) + [0, 1, 2, 3])])[1]
    assert batch.weights[B:].tolist() == [1, 1, 0, 0]


# Labelled rows that are left out, and rows that count for nothing


def test_tsa_leaves_out_rows_that_know_their_label_and_divides_by_the_others(impl):
    # USB left out rows that are sure of anything, and divided by all
    logits = torch.tensor([[4.0, 0, 0], [4.0, 0, 0], [0.2, 0, 0], [0, 0, 0]])
    targets = torch.eye(3)[[0, 1, 0, 2]]  # known, sure and wrong, unsure; unlabelled
    weights, tsa = torch.ones(4), torch.tensor(0.6)
    loss_x = functional.consistency_loss(logits, targets, weights, 3, 1.0, tsa=tsa, impl=impl)[1]
    rows = -(logits.log_softmax(dim=1) * targets).sum(dim=1)
    torch.testing.assert_close(loss_x, rows[1:3].sum() / 2)
    known = functional.consistency_loss(logits[:1], targets[:1], weights[:1], 1, 1.0, tsa=tsa)
    assert known[1] == 0  # and not a quotient of nothing


@pytest.mark.parametrize("loss_u", ["ce", "kl", "mse"])
def test_masked_rows_stay_in_the_denominator(impl, loss_u):
    # a mean over the kept rows alone is another loss: five of six are masked
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    targets, weights = torch.eye(3)[[0, 1, 2, 0, 1, 2]], torch.zeros(6)
    weights[4] = 1
    options = {"loss_u": loss_u, "impl": impl}
    masked = functional.consistency_loss(logits, targets, weights, 0, 1.0, **options)
    alone = functional.consistency_loss(logits[4:5], targets[4:5], weights[4:5], 0, 1.0, **options)
    torch.testing.assert_close(masked[2], alone[2] / 6)
    assert (masked[4].item(), alone[4].item()) == (pytest.approx(1 / 6), 1)


# Distribution alignment


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_guesses_are_aligned_before_they_are_sharpened(momentum):
    # the other order is another guess
    alignment = DistributionAlignment(2, momentum=momentum, target=(0.1, 0.2, 0.3, 0.4))
    builder = UDA(*ENGINES, alignment=alignment)
    first, _ = guess_of(builder, UNSURE)
    probs, wanted = oracle.softmax(UNSURE), torch.tensor([0.1, 0.2, 0.3, 0.4]).double().numpy()
    guessed = 0.25 if momentum is None else (probs + 0.25) / 2
    aligned = oracle.normalise_rows(probs * (wanted + 1e-6) / (guessed + 1e-6))
    torch.testing.assert_close(first, oracle.sharpen(aligned, 0.4), rtol=0, atol=1e-5)
    later = oracle.sharpen(probs, 0.4) * (wanted + 1e-6) / (guessed + 1e-6)
    assert abs(oracle.normalise_rows(later) - first).max() > 0.05


def test_the_window_begins_uniform_and_is_read_before_it_takes_a_batch_in():
    # a window of what there was so far undoes the first guess; USB's average has it in it
    alignment = DistributionAlignment(128, target="uniform")
    builder = FixMatch(*ENGINES, temperature=1.0, alignment=alignment)
    probs = oracle.softmax(UNSURE)
    for number in range(3):
        guess, _ = guess_of(builder, UNSURE)
        guessed = ((128 - number) / 4 + number * probs) / 128
        expected = oracle.normalise_rows(probs * (0.25 + 1e-6) / (guessed + 1e-6))
        torch.testing.assert_close(guess, expected, rtol=0, atol=1e-5)


def test_shares_of_labels_are_those_of_x_and_not_of_guesses():
    # comatch has no p_data, USB's are predictions
    alignment = DistributionAlignment(4)
    builder = FixMatch(*ENGINES, alignment=alignment)
    x, _, u, _ = data_of()
    builder(x, torch.tensor([2, 2, 1]), u, ConstantNet(UNSURE))
    expected = 0.999 * 0.25 + 0.001 * torch.tensor([0, 1, 2, 0]) / 3
    torch.testing.assert_close(alignment.labels, expected)


# FlexMatch


def test_flexmatch_remembers_what_is_above_a_fixed_threshold():
    # with the threshold of its class, which is lower, a class would count what it is not sure of
    builder = FlexMatch(*ENGINES, num_unlabelled=SAMPLES, threshold=0.9)
    _, weight = guess_of(builder, UNSURE)
    assert weight == 1  # nobody has a class, so that all thresholds are 0
    assert builder.threshold.classes.eq(-1).all()
    guess_of(builder, [9.0, 0, 0, 0])
    seen = data_of()[3]
    assert builder.threshold.classes[seen].eq(0).all()
    assert int(builder.threshold.counts[0]) == len(seen.unique())
    guess_of(builder, UNSURE)
    assert builder.threshold.classes[seen].eq(0).all()  # the last confident one stays


def test_flexmatch_reads_counts_of_earlier_steps():
    builder = FlexMatch(*ENGINES, num_unlabelled=3, threshold=0.9)
    x, y, u, _ = data_of()
    # before the first nobody has a class: unsure guesses pass until the step after a sure one
    for logit, weight in ((1.5, 1), (9.0, 1), (1.5, 0), (9.0, 1)):
        model = ConstantNet([logit, 0.0, 0.0, 0.0])
        batch = builder(x, y, u[:3], model, ids_u=torch.arange(3))
        assert batch.weights[B:].eq(weight).all()


@pytest.mark.usefixtures("without_numba")
@pytest.mark.parametrize("order", ["first", "one pass"])
@pytest.mark.parametrize("method", ["FixMatch", *ADAPTIVE])
def test_a_step_reads_nothing_back_from_the_device(method, order, monkeypatch):
    # USB counts FlexMatch's table on the host, and reads the thresholds of two others
    look_at_nothing(monkeypatch)
    monkeypatch.setattr(thresholds.FlexThreshold, "check_ids", lambda self, ids: ids)
    builder = ADAPTIVE.get(method, lambda: FixMatch(*ENGINES))()
    criterion = ConsistencyLoss(2.0, 5, tsa="exp", tsa_steps=9, lambda_fair=float("Free" in method))
    model = net()
    x, y, u, ids_u = data_of()
    views = x / 255, y, u / 255, (255 - u) / 255  # plain torch asks where the slots of chains are

    def step():
        batch = builder.from_views(*views, model if order == "first" else None, ids_u=ids_u)
        logits = model(batch.inputs)
        with NoExport():
            criterion(logits, batch).loss.backward()

    step()  # makes constants, once
    with NoSync(builder.step) as mode:
        step()
    assert mode.calls > 0
