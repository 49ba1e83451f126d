"""ReMixMatch and ICT by Triton's kernels equal those by plain torch; interpreted without a GPU."""

import importlib

import pytest
import torch

from gpu_mixmatch import ICT, ReMixMatch, ReMixMatchLoss, WeakAugment
from tests.factories import LinearNet, random_data
from tests.skips import skip_without

skip_without("triton")
launching = importlib.import_module("gpu_mixmatch.impl.triton.launch")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
SHAPE, NUM_CLASSES = (3, 6, 6), 4
ERROR = 2e-5


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that were launched."""
    names, run = [], launching.run

    def counted(kernel, programs, *arguments, **options):
        names.append(kernel.__name__)
        run(kernel, programs, *arguments, **options)

    monkeypatch.setattr(launching, "run", counted)
    return names


def data_of():
    return random_data(2, 4, SHAPE, num_classes=NUM_CLASSES, device=DEVICE)


def assert_near(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=ERROR)


def remixmatch(impl):
    weak = WeakAugment(1, impl=impl)
    switches = {"num_strong": 1, "rotation": True, "impl": impl}
    return ReMixMatch(weak, weak, NUM_CLASSES, **switches).to(DEVICE)


@pytest.mark.parametrize("preset", [ICT.reference, ICT.fixmatch], ids=["reference", "fixmatch"])
def test_batches_of_ict_equal_eager(preset, launches):
    x, y, u = data_of()
    teacher = LinearNet(NUM_CLASSES, SHAPE).to(DEVICE)
    batches = {}
    for impl in ("eager", "triton"):
        builder = preset(WeakAugment(1, impl=impl), NUM_CLASSES, teacher=teacher, impl=impl)
        builder = builder.to(DEVICE)
        for _ in range(2):
            launches.clear()
            batches[impl] = builder(x, y, u)
    assert len(launches) == 4  # draw, views of u, targets, mixed rows
    assert_near(batches["triton"].inputs, batches["eager"].inputs)
    assert_near(batches["triton"].targets, batches["eager"].targets)


def test_batches_of_remixmatch_and_their_loss_equal_eager(launches):
    x, y, u = data_of()
    model = LinearNet(NUM_CLASSES, SHAPE).to(DEVICE)
    found = {}
    for impl in ("eager", "triton"):
        builder, criterion = remixmatch(impl), ReMixMatchLoss(rampup_steps=2, impl=impl)
        for _ in range(2):
            launches.clear()
            batch = builder(x, y, u, model)
        of_builder = len(launches)
        launches.clear()
        logits = model(batch.inputs).detach().requires_grad_()
        output = criterion(logits, batch)
        output.loss.backward()
        found[impl] = batch, output, logits.grad
    assert of_builder == 6  # draw, all views, sums, the window, targets, mixed rows
    assert len(launches) == 2
    (one, one_loss, one_grad), (other, other_loss, other_grad) = found.values()
    assert_near(one.inputs, other.inputs)
    assert_near(one.targets, other.targets)
    assert torch.equal(one.weights, other.weights)
    assert torch.equal(one.rotations, other.rotations)
    assert_near(torch.stack(one_loss), torch.stack(other_loss))
    assert_near(one_grad, other_grad)
