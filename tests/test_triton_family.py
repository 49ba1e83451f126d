"""Triton's kernels of consistency methods equal the eager operations; interpreted without a GPU."""

import importlib
import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from gpu_mixmatch import ColorJitter, RandAugment, WeakAugment, _streams, functional, sampling
from gpu_mixmatch.impl import eager
from gpu_mixmatch.impl.library import FusedConsistencyLoss
from gpu_mixmatch.types import DrawPlan, Weighting
from tests.no_sync import NoSync
from tests.skips import skip_without
from tests.tolerances import KERNEL_TOLERANCES

skip_without("triton")
kernels = importlib.import_module("gpu_mixmatch.impl.triton")
launching = importlib.import_module("gpu_mixmatch.impl.triton.launch")
losing = importlib.import_module("gpu_mixmatch.impl.triton.consistency_loss")
zeroing = importlib.import_module("gpu_mixmatch.impl.triton.zeros")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
UNIT = 2.0**32
BAD = 0x7BADBAD  # what a kernel leaves out stays this, or NaN


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def logits_of(*shape, dtype=torch.float32, seed=0, layout="contiguous"):
    values = 3 * torch.randn(*shape, dtype=torch.float64, generator=generator(seed))
    values = values.to(dtype).to(DEVICE)
    if layout == "transposed":
        return values.mT.contiguous().mT
    if layout == "every other":
        return values.repeat_interleave(2, dim=1)[:, ::2]
    return values


def labels_of(count, num_classes, kind="int64"):
    if kind == "soft":
        return logits_of(count, num_classes, seed=9).softmax(dim=1)
    y = torch.randint(0, num_classes, (count,), generator=generator(5))
    return y.to(DEVICE, getattr(torch, kind))


def nan(*shape, dtype=torch.float32):
    return torch.full(shape, math.nan, dtype=dtype, device=DEVICE)


def close(result, expected, dtype=None):
    tolerance = KERNEL_TOLERANCES[dtype or result.dtype]
    torch.testing.assert_close(
        result.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True
    )


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that were launched."""
    names, run = [], launching.run

    def counted(kernel, programs, *arguments, **options):
        names.append(kernel.__name__)
        run(kernel, programs, *arguments, **options)

    monkeypatch.setattr(launching, "run", counted)
    return names


# Draws: rows of a strong plan that stay weak


@pytest.mark.parametrize(
    "policy",
    [
        RandAugment.fixmatch(WeakAugment(3)),
        RandAugment.usb(WeakAugment(3)),
        ColorJitter(WeakAugment(3), gray=0.3),
    ],
    ids=["fixmatch", "usb", "jitter"],
)
@pytest.mark.parametrize(
    ("weak_x", "weak_views", "views"), [(True, 1, 2), (False, 1, 3), (True, 2, 2), (True, 0, 1)]
)
def test_weak_rows_are_drawn_without_operations_as_on_the_host(policy, weak_x, weak_views, views):
    plan = DrawPlan(views, policy.policy, mix="none", weak_x=weak_x, weak_views=weak_views)
    params, _ = functional.draw_batch(7, torch.tensor(3), 9, 14, plan, device=DEVICE, impl="triton")
    expected, _ = sampling.draw_batch(7, 3, 9, 14, plan)
    for name in ("top", "left", "flip", "zoom", "chain"):
        assert torch.equal(getattr(params, name).cpu(), getattr(expected, name)), name
    strong = sampling.strong_rows(9 + 14 * views, 9, plan)
    assert not expected.chain[: strong.start, :2].any()
    assert not expected.chain[strong.stop :, :2].any()


# Targets and weights


def weightings(num_classes, num_u):
    """Every rule, with and without alignment and temperature."""
    averages = torch.rand(2 + 3 * num_classes, generator=generator(3)) * 0.5 + 0.25
    counts = torch.randint(0, 9, (num_classes + 1,), generator=generator(4), dtype=torch.int32)
    ratio = (torch.rand(num_classes, generator=generator(6)) + 0.5).to(DEVICE)
    states = {
        "fixed": (0.8, None),
        "soft": (0.0, averages.to(DEVICE)),
        "free": (0.0, averages.to(DEVICE)),
        "flex": (0.95, counts.to(DEVICE)),
    }
    for (rule, (threshold, state)), temperature, aligned in itertools.product(
        states.items(), (0.0, 0.5), (None, True, False)
    ):
        factors = None if aligned is None else ratio
        yield Weighting(temperature, rule, threshold, state, 2.0, factors, bool(aligned))


@pytest.mark.parametrize(
    ("num_x", "num_u", "num_views", "num_classes", "labels", "dtype", "layout"),
    [
        (3, 5, 1, 2, "int64", torch.float32, "contiguous"),
        (0, 7, 2, 3, "int64", torch.float16, "transposed"),
        (4, 1, 3, 10, "soft", torch.bfloat16, "every other"),
        (1, 3, 1, 33, "uint8", torch.float64, "contiguous"),
    ],
)
def test_targets_and_weights_equal_eager(
    num_x, num_u, num_views, num_classes, labels, dtype, layout
):
    logits = logits_of(num_u, num_classes, dtype=dtype, layout=layout)
    y = labels_of(num_x, num_classes, labels)
    rows = num_x + num_views * num_u
    kept = set()
    for number, weighting in enumerate(weightings(num_classes, num_u)):
        smoothing = 0.1 * (number % 2)
        out, expected = ((nan(rows, num_classes), nan(rows)) for _ in range(2))
        kernels.consistency_targets(y, logits, weighting, smoothing, out)
        eager.consistency_targets(y, logits, weighting, smoothing, expected)
        for result, wanted in zip(out, expected, strict=True):
            close(result, wanted)
        kept |= set(out[1][num_x:].tolist()) if weighting.rule == "fixed" else set()
    assert num_u == 1 or kept == {0.0, 1.0}


# numpy, in the interpreter, warns of what is not a number
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_ties_and_guesses_that_are_not_numbers_are_labelled_as_in_eager():
    logits = torch.zeros(7, 3, device=DEVICE)
    logits[1] = torch.tensor([-1.0, 2.0, 2.0])  # the first of equals
    logits[2] = torch.tensor([-math.inf, -math.inf, 3.0])
    logits[3, 1] = math.nan
    logits[4] = -math.inf
    logits[5, 2] = math.inf
    logits[6] = torch.tensor([3e38, -3e38, 0.0])
    states = (None, torch.tensor([0.5, 1.0, *[0.3] * 9], device=DEVICE))
    ratio = torch.tensor([2.0, 1.0, 1.0], device=DEVICE)
    y = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    for temperature, rule, factors in itertools.product(
        (0.0, 0.5), ("fixed", "soft"), (None, ratio)
    ):
        weighting = Weighting(temperature, rule, 1.0, states[rule == "soft"], 2.0, factors)
        out, expected = ((nan(7, 3), nan(7)) for _ in range(2))
        kernels.consistency_targets(y, logits, weighting, 0.0, out)
        eager.consistency_targets(y, logits, weighting, 0.0, expected)
        for result, wanted in zip(out, expected, strict=True):
            close(result, wanted)


def test_a_threshold_is_compared_in_float32_and_reached_by_what_equals_it():
    for num_classes in (3, 5, 10, 100):  # 1 / L, of float32 rounded as torch does
        for dtype in (torch.bfloat16, torch.float32):
            logits = torch.zeros(2, num_classes, dtype=dtype, device=DEVICE)
            weights = nan(2)
            kernels.consistency_targets(
                labels_of(0, num_classes),
                logits,
                Weighting(threshold=1 / num_classes),
                0.0,
                (nan(2, num_classes), weights),
            )
            assert weights.tolist() == [1.0, 1.0]


def test_classes_that_nothing_was_learnt_of_have_no_threshold_in_flex():
    counts = torch.tensor([0, 4, 2, 1], dtype=torch.int32, device=DEVICE)
    logits = torch.eye(3, device=DEVICE)  # each class once, p = 0.58
    weights = nan(3)
    weighting = Weighting(0.0, "flex", 0.95, counts)
    kernels.consistency_targets(labels_of(0, 3), logits, weighting, 0.0, (nan(3, 3), weights))
    assert weights.tolist() == [1.0, 0.0, 1.0]  # 0, .95 and .95 · .5 / 1.5


# The loss


def losses_and_gradient(logits, *arguments, grads, impl):
    logits = logits.detach().requires_grad_()
    losses = FusedConsistencyLoss.apply(logits, *arguments, impl)
    (gradient,) = torch.autograd.grad(losses, logits, grads)
    return losses.detach(), gradient


@pytest.mark.parametrize(
    ("rows", "parts", "num_classes", "dtype", "layout"),
    [
        (9, (4, 9), 2, torch.float32, "contiguous"),
        (12, (3, 8), 3, torch.float16, "transposed"),
        (7, (0, 5), 10, torch.bfloat16, "every other"),
        (6, (6, 6), 33, torch.float64, "contiguous"),
        (5, (2, 2), 5, torch.float32, "contiguous"),
        (0, (0, 0), 3, torch.float32, "contiguous"),
    ],
)
@pytest.mark.parametrize("loss_u", ["ce", "kl", "mse"])
@pytest.mark.parametrize("tsa", [None, "host", "device"])
def test_the_loss_and_its_gradient_equal_eager(
    rows, parts, num_classes, dtype, layout, loss_u, tsa
):
    logits = logits_of(rows, num_classes, dtype=dtype, layout=layout)
    targets = logits_of(rows, num_classes, seed=1).softmax(dim=1)
    targets[::2] = (targets[::2] == targets[::2].amax(dim=1, keepdim=True)).float()
    weights = torch.rand(rows, generator=generator(2)).to(DEVICE)
    weights[1::3] = 0
    at = DEVICE if tsa == "device" else "cpu"
    arguments = (
        *(targets, weights, parts, torch.tensor(2.0, device=at), 0.5, loss_u),
        None if tsa is None else torch.tensor(0.3, device=at),
    )
    wide = torch.promote_types(dtype, torch.float32)
    grads = torch.tensor([1.0, 0.5, -1.5, 2.0, 7.0, 8.0], dtype=wide, device=DEVICE)
    results, gradient = losses_and_gradient(logits, *arguments, grads=grads, impl="triton")
    expected, wanted = losses_and_gradient(logits, *arguments, grads=grads, impl="eager")
    assert results.dtype == wide
    close(results, expected)
    close(gradient, wanted, dtype=dtype)
    assert not gradient[weights == 0].any()
    # eager's gradient is written by hand, too
    wide_logits = logits.double().requires_grad_()
    losses = eager.consistency_losses(wide_logits, targets.double(), weights, *arguments[2:])
    (by_autograd,) = torch.autograd.grad(losses, wide_logits, grads.double())
    close(gradient, by_autograd, dtype=dtype)


def test_no_row_of_x_or_u_that_counts_gives_a_loss_of_0():
    logits, targets = logits_of(6, 3), logits_of(6, 3, seed=1).softmax(dim=1)
    arguments = targets, torch.zeros(6, device=DEVICE), (2, 5), torch.tensor(3.0), 1.0, "ce"
    tsa = torch.tensor(0.0)
    grads = torch.ones(6, device=DEVICE)
    for known in (None, tsa):
        results, gradient = losses_and_gradient(
            logits, *arguments, known, grads=grads, impl="triton"
        )
        assert not results.any()
        assert not gradient.any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rows_of_weight_0_have_no_gradient_whatever_they_are():
    logits = logits_of(4, 3)
    logits[1:] = torch.tensor([3e38, -3e38, 1e38])
    targets = torch.eye(3, device=DEVICE)[[0, 1, 0, 2]]
    weights = torch.tensor([1.0, 0.0, 0.0, 0.0], device=DEVICE)
    for loss_u in ("ce", "kl", "mse"):
        out = nan(4, 3)
        kernels.consistency_loss_backward(
            *(torch.ones(6, device=DEVICE), logits, targets, weights, (1, 3)),
            *(torch.tensor(1.0), 1.0, loss_u, None, None, out),
        )
        assert out[0].any()
        assert (out[1:] == 0).all()


@pytest.mark.parametrize("rows_per_program", [1, 16, 256])
def test_the_loss_does_not_depend_on_the_number_of_programs(monkeypatch, rows_per_program):
    # more programs of one row than the last one adds up at once
    logits, targets = logits_of(131, 3), logits_of(131, 3, seed=1).softmax(dim=1)
    weights = torch.rand(131, generator=generator(2)).to(DEVICE)
    arguments = targets, weights, (40, 100), torch.tensor(2.0), 0.5, "ce", torch.tensor(0.3)
    expected, count, known = nan(6), nan(1)[0], nan(1)[0]
    eager.consistency_loss(logits, *arguments, expected, known)
    monkeypatch.setattr(losing, "row_tile", lambda num_classes: (4, rows_per_program, 1))
    for _ in range(min(rows_per_program, 2)):  # the last puts the counter of programs back to 0
        results = nan(6)
        kernels.consistency_loss(logits, *arguments, results, count)
        close(results, expected)
        assert 0 < float(count) == float(known) < 40


# Statistics


def statistics(logits, y, module=kernels):
    out = torch.full((4 + 3 * logits.shape[1],), BAD, dtype=torch.int64, device=DEVICE)
    module.guess_statistics(logits, y, out)
    return out


@pytest.mark.parametrize(
    ("num_x", "num_u", "num_classes", "labels", "dtype", "layout"),
    [
        (5, 3, 2, "int64", torch.float32, "contiguous"),
        (2, 70, 3, "soft", torch.bfloat16, "transposed"),
        (40, 35, 10, "int32", torch.float16, "every other"),
        (7, 9, 33, "uint8", torch.float64, "contiguous"),
        (0, 2, 300, "int64", torch.float32, "contiguous"),
        (2, 0, 3, "int64", torch.float32, "contiguous"),
        (0, 0, 3, "int64", torch.float32, "contiguous"),
    ],
)
def test_statistics_equal_eager_but_for_roundings_of_softmax(
    num_x, num_u, num_classes, labels, dtype, layout
):
    logits = logits_of(num_u, num_classes, dtype=dtype, layout=layout)
    logits[:1] = 0  # a tie
    y = labels_of(num_x, num_classes, labels)
    expected = statistics(logits, y, eager)
    for _ in range(2):  # the second finds what the first left
        sums = statistics(logits, y)
        exact = [0, 1, *range(4 + num_classes, 4 + 3 * num_classes)]
        assert torch.equal(sums[exact], expected[exact])
        assert (sums - expected).abs().max() <= 2 * 2**8 * max(num_u, 1)  # of 2^-24 a row


def test_statistics_of_parts_add_up_to_those_of_the_whole():
    logits, y = logits_of(90, 5), labels_of(30, 5)
    parts = statistics(logits[:33], y[:7]) + statistics(logits[33:], y[7:])
    assert torch.equal(statistics(logits, y), parts)
    order = torch.randperm(90, generator=generator()).to(DEVICE)
    assert torch.equal(statistics(logits, y), statistics(logits[order], y))


def test_memory_of_sums_is_that_of_a_graph_while_one_is_captured(monkeypatch):
    held = []
    monkeypatch.setattr(launching, "run", lambda _, __, *args, **___: held.append(args[1]))
    logits, y = logits_of(3, 4), labels_of(2, 4)
    statistics(logits, y)
    monkeypatch.setattr(_streams, "is_capturing", lambda device: True)
    statistics(logits, y)
    monkeypatch.setattr(_streams, "is_capturing", lambda device: False)
    statistics(logits, y)
    assert held[0] is held[2] is not held[1]
    assert held[1].shape == held[0].shape
    assert not any(sums.any() for sums in held)


@pytest.mark.parametrize("num_classes", [2, 10, 200])
@pytest.mark.parametrize("momentum", [0.999, 0.0, 1.0])
@pytest.mark.parametrize("given", [None, "factors", "target"])
def test_averages_are_those_of_eager_to_the_last_bit(num_classes, momentum, given):
    averages = torch.rand(2 + 3 * num_classes, generator=generator()).to(DEVICE)
    expected = averages.clone()
    target = torch.rand(num_classes, generator=generator(1)).to(DEVICE)
    target = target if given == "target" else None
    for num_u in (7, 1):
        sums = statistics(logits_of(num_u, num_classes), labels_of(3, num_classes), eager)
        out, factors = (None if given is None else nan(num_classes) for _ in range(2))
        kernels.update_averages(sums, averages, momentum, target, out)
        eager.update_averages(sums, expected, momentum, target, factors)
        assert torch.equal(averages, expected)
        assert given is None or torch.equal(out, factors)


@pytest.mark.parametrize(
    ("length", "num_classes", "momentum"), [(3, 2, 0.999), (1, 10, 1.0), (40, 70, 0.5)]
)
def test_windows_are_those_of_eager(length, num_classes, momentum):
    start = torch.full((length, num_classes), 1 / num_classes, device=DEVICE)
    known = torch.full((num_classes,), 1 / num_classes, device=DEVICE)
    ours, theirs = (
        (start.clone(), torch.tensor(length - 1, device=DEVICE), known.clone()) for _ in range(2)
    )
    for step in range(3):
        logits = logits_of(4, num_classes, seed=step)
        sums = statistics(logits, labels_of(3, num_classes), eager)
        out, expected = nan(num_classes), nan(num_classes)
        kernels.update_window(sums, *ours, momentum, out)
        eager.update_window(sums, *theirs, momentum, expected)
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)
        for result, wanted in zip(ours, theirs, strict=True):
            assert torch.equal(result, wanted)
        assert int(ours[1]) == step % length


# Classes of samples


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("num_u", "num_classes", "dtype", "layout"),
    [
        (0, 3, torch.float32, "contiguous"),
        (9, 2, torch.float16, "transposed"),
        (35, 10, torch.bfloat16, "every other"),
        (5, 33, torch.float64, "contiguous"),
    ],
)
def test_confident_classes_equal_eager(num_u, num_classes, dtype, layout):
    logits = logits_of(num_u, num_classes, dtype=dtype, layout=layout)
    logits[:1] = 0
    logits[1:2] = math.nan
    found = []
    for threshold in (0.0, 1 / num_classes, 0.6, 1.0):
        out, expected = (
            torch.full((num_u,), BAD, dtype=torch.int64, device=DEVICE) for _ in range(2)
        )
        kernels.confident_classes(logits, threshold, out)
        eager.confident_classes(logits, threshold, expected)
        assert torch.equal(out, expected)
        found += out.tolist()
    assert num_u == 0 or {-1, 0} < set(found)


@pytest.mark.parametrize(("num_u", "num_samples"), [(0, 4), (1, 1), (40, 200), (150, 30)])
def test_labels_of_samples_equal_eager_and_counts_are_those_of_the_table(num_u, num_samples):
    num_classes = 5
    table = torch.full((num_samples,), -1, dtype=torch.int16, device=DEVICE)
    counts = torch.tensor([0] * num_classes + [num_samples], dtype=torch.int32, device=DEVICE)
    expected = table.clone(), counts.clone()
    for step in range(3):
        chance = generator(step)
        ids = torch.randint(-3, num_samples + 3, (num_u,), generator=chance).to(DEVICE)
        classes = torch.randint(-1, num_classes, (num_u,), generator=chance).to(DEVICE)
        kernels.update_labels(classes, ids, table, counts)
        eager.update_labels(classes, ids, *expected)
        assert torch.equal(table, expected[0])
        assert torch.equal(counts, expected[1])
        assert torch.equal(counts, torch.bincount(table % (num_classes + 1), minlength=6).int())
    assert num_u < 2 or int(counts[-1]) < num_samples


def test_the_last_of_an_id_counts_wherever_it_lies():
    ids, classes = torch.arange(100, 300), torch.full((200,), 3)
    ids[[0, 31, 32, 150, 199]] = 5
    classes[[0, 31, 32, 150, 199]] = torch.tensor([0, 1, 2, 4, -1])  # the last is not confident
    table = torch.full((400,), -1, dtype=torch.int16, device=DEVICE)
    counts = torch.tensor([0] * 5 + [400], dtype=torch.int32, device=DEVICE)
    kernels.update_labels(classes.to(DEVICE), ids.to(DEVICE), table, counts)
    assert int(table[5]) == 4
    assert counts.tolist() == [0, 0, 0, 195, 1, 204]


# Launches


def test_each_operation_takes_one_launch(launches):
    logits, y = logits_of(4, 3), labels_of(2, 3)
    sums = statistics(logits, y)
    averages, factors = torch.rand(11, device=DEVICE), nan(3)
    kernels.update_averages(sums, averages, 0.9, None, factors)
    window, position = torch.rand(2, 3, device=DEVICE), torch.tensor(0, device=DEVICE)
    kernels.update_window(sums, window, position, torch.rand(3, device=DEVICE), 0.9, factors)
    classes = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    kernels.confident_classes(logits, 0.5, classes)
    table = torch.full((4,), -1, dtype=torch.int16, device=DEVICE)
    counts = torch.tensor([0, 0, 0, 4], dtype=torch.int32, device=DEVICE)
    kernels.update_labels(classes, torch.arange(4, device=DEVICE), table, counts)
    out = nan(6, 3), nan(6)
    kernels.consistency_targets(y, logits, Weighting(ratio=factors), 0.0, out)
    rows = logits_of(6, 3).requires_grad_()
    losses = FusedConsistencyLoss.apply(
        *(rows, *out, (2, 6), torch.tensor(1.0), 1.0, "ce", None, "triton")
    )
    losses[0].backward()
    assert launches == [
        "guess_statistics_kernel",
        "update_averages_kernel",
        "update_window_kernel",
        "confident_classes_kernel",
        "update_labels_kernel",
        "consistency_targets_kernel",
        "consistency_loss_kernel",
        "consistency_loss_backward_kernel",
    ]


def test_nothing_is_read_back_from_the_device(monkeypatch):
    monkeypatch.setattr(launching, "run", lambda *_, **__: None)
    logits, y, ids = logits_of(4, 3), labels_of(2, 3), torch.arange(4, device=DEVICE)
    sums, averages, counts = ids.new_zeros(13), nan(11), torch.zeros(4, dtype=torch.int32)
    table, out, factors = torch.zeros(9, dtype=torch.int16), (nan(6, 3), nan(6)), nan(3)
    weight, tsa = torch.tensor(1.0), torch.tensor(0.5)  # on the host, which may read them
    arguments = nan(6, 3), *out, (2, 6), weight, 1.0, "kl", tsa
    with NoSync(weight, tsa):
        kernels.guess_statistics(logits, y, sums)
        kernels.update_averages(sums, averages, 0.9, None, factors)
        kernels.update_window(sums, nan(2, 3), ids[0], nan(3), 0.9, factors)
        kernels.confident_classes(logits, 0.5, ids)
        kernels.update_labels(ids, ids, table, counts)
        kernels.consistency_targets(y, logits, Weighting(0.5, "soft", 0.0, averages), 0.1, out)
        kernels.consistency_loss(*arguments, nan(6), nan(1)[0])
        kernels.consistency_loss_backward(nan(6), *arguments, nan(1)[0], nan(6, 3))


# Machine code


@pytest.mark.slow
def test_kernels_do_not_spill_and_a_batch_of_another_size_is_no_other_kernel():
    """Compiled without a GPU."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.family_kernels"),
            *("--arch", "90", "--classes", "10"),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert len({row["kernel"] for row in rows}) == 8
    for row in rows:
        assert row["stack"] == row["local_accesses"] == 0, row
        assert row["variants"] == 1, row
        assert row["registers"] <= 96, row
