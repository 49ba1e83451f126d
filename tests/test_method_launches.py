"""Launches of batches that weigh guesses: of kernels where they are launched, and of torch."""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_mixmatch import (
    UDA,
    ConsistencyLoss,
    DistributionAlignment,
    FixMatch,
    FlexMatch,
    FreeMatch,
    MeanTeacher,
    RandAugment,
    ReMixMatch,
    SoftMatch,
    WeakAugment,
)
from tests.no_sync import look_at_nothing
from tests.skips import skip_without
from tests.test_launches import INTERPRETED, Model, cuda_work, needs_cuda

skip_without("triton")

NUM_CLASSES, B, M = 10, 8, 56  # one to seven
VIEWS = ["draw", "chain"]
STATISTICS = ["guess_statistics", "update_averages"]
LABELS = {
    "fixmatch": ["consistency_targets"],
    "uda": ["consistency_targets"],
    "aligned": ["guess_statistics", "update_window", "consistency_targets"],
    "softmatch": [*STATISTICS, "consistency_targets"],
    "freematch": [*STATISTICS, "consistency_targets"],
    "flexmatch": ["consistency_targets", "confident_classes", "update_labels"],
    "mean teacher": ["consistency_targets"],
}
FAIRNESS = ["gt", "div", "where", "sum", "div"]  # of a row of classes, in plain torch


def method_of(kind, device=INTERPRETED):
    weak = WeakAugment(padding=4, impl="triton")
    engines = weak, RandAugment.fixmatch(weak), NUM_CLASSES
    options = {"impl": "triton"}
    if kind == "aligned":
        options["alignment"] = DistributionAlignment(window=4)
    if kind == "flexmatch":
        options["num_unlabelled"] = 1000
    if kind == "mean teacher":
        return MeanTeacher(weak, NUM_CLASSES, **options).to(device)
    kinds = {"fixmatch": FixMatch, "uda": UDA, "aligned": FixMatch, "softmatch": SoftMatch}
    kinds |= {"freematch": FreeMatch, "flexmatch": FlexMatch, "remixmatch": ReMixMatch}
    if kind == "remixmatch":
        options["num_strong"] = 2
    return kinds[kind](*engines, **options).to(device)


def data(device=INTERPRETED, b=B, m=M):
    x, u = (torch.zeros(n, 3, 32, 32, dtype=torch.uint8, device=device) for n in (b, m))
    return x, torch.zeros(b, dtype=torch.int64, device=device), u


class TorchWork(TorchDispatchMode):
    """Names what torch itself would launch: no views, no allocations, nothing of 0-d tensors."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args)
                   if isinstance(leaf, torch.Tensor) and leaf.dim() > 0]  # fmt: skip
        # a CPU's ids are looked at, a device's are not
        if tensors and not function.is_view and "empty" not in name and name != "aminmax":
            self.names.append(name)
        return result


@pytest.fixture
def counted(monkeypatch):
    """Returns what a call launches: names of kernels, and of torch's operations."""
    look_at_nothing(monkeypatch)
    launch = importlib.import_module("gpu_mixmatch.impl.triton.launch")
    launched = []
    monkeypatch.setattr(launch, "run", lambda kernel, *_, **__: launched.append(kernel.__name__))

    def counted(function):
        launched.clear()
        with TorchWork() as work:
            result = function()
        return result, [name.removesuffix("_kernel") for name in launched], work.names

    return counted


@pytest.mark.parametrize("kind", LABELS)
def test_a_batch_takes_its_views_and_one_to_three_launches_in_either_order(kind, counted):
    method, batch, ids = method_of(kind), data(), torch.arange(M)
    method(*batch, Model(), ids_u=ids)  # makes the constants
    views = VIEWS if kind != "mean teacher" else ["draw", "augment"]
    beside = FAIRNESS if kind == "freematch" else []

    built, kernels, others = counted(lambda: method(*batch, Model(), ids_u=ids))
    assert kernels == [*views, *LABELS[kind]]
    assert len(kernels) <= 5
    assert others == beside
    assert len(built.inputs) == B + M

    built, kernels, others = counted(lambda: method(*batch, ids_u=ids))
    assert (kernels, others) == (views, [])
    assert len(built.inputs) == B + 2 * M
    logits = torch.zeros(len(built.inputs), NUM_CLASSES, device=INTERPRETED)
    _, kernels, others = counted(lambda: built.complete(logits))
    assert kernels == LABELS[kind]
    assert others == beside


def test_views_that_are_mixed_take_six_launches_and_three_copies(counted):
    method, batch = method_of("remixmatch"), data(m=B)
    method(*batch, Model())
    _, kernels, others = counted(lambda: method(*batch, Model()))
    alignment = ["guess_statistics", "update_window", "consistency_targets"]
    assert kernels == [*VIEWS, *alignment, "mixup"]
    assert sorted(others) == ["cat", "clone", "copy_"]


@pytest.mark.parametrize("guess_first", [True, False])
def test_the_loss_takes_one_launch_forward_and_one_backward(guess_first, counted):
    method, batch = method_of("fixmatch"), data()
    built = method(*batch, Model() if guess_first else None)
    logits = torch.zeros(len(built.inputs), NUM_CLASSES, device=INTERPRETED, requires_grad=True)
    criterion = ConsistencyLoss(impl="triton")
    output, kernels, _ = counted(lambda: criterion(logits, built))
    assert kernels == ([] if guess_first else LABELS["fixmatch"]) + ["consistency_loss"]
    _, kernels, _ = counted(output.loss.backward)
    assert kernels == ["consistency_loss_backward"]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kind", [kind for kind in LABELS if kind != "freematch"])
def test_the_profiler_counts_the_same_launches(kind):
    method, batch, ids = method_of(kind), data(b=64, m=448), torch.arange(448, device="cuda")
    work = cuda_work(lambda: method(*batch, Model(), ids_u=ids))
    assert work["kernel"] == 2 + len(LABELS[kind])
