"""Launches, copies and waits of a batch, counted without a GPU.

The eager path is counted on a fake device; the kernels where they are launched, as Triton's own
hook does not fire in its interpreter.
"""

import importlib
from collections import Counter

import pytest
import torch
from torch import nn

from benchmarks.launch_counter import DEVICE, LaunchCounter
from gpu_mixmatch import MixMatch, MixMatchLoss, WeakAugment, capture, sampling

NUM_CLASSES = 10
# docs/cuda.md states these
EAGER = {"plain": (15, 25), "blur": (22, 32), "zoom": (63, 73), "zeros": (16, 26)}
POLICIES = {
    "plain": {"padding": 4},
    "blur": {"padding": 4, "blur_sigma": (0.0, 3.0)},
    "zoom": {"padding": 4, "zoom_px": (0, 8)},
    "zeros": {"padding": 4, "padding_mode": "zeros"},
}
CUDA = torch.cuda.is_available()
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
INTERPRETED = "cuda" if CUDA else "cpu"


@pytest.fixture
def no_autocast(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # knows no "meta"


def data(device, size=32, b=64, m=64):
    x, u = (torch.zeros(n, 3, size, size, dtype=torch.uint8, device=device) for n in (b, m))
    return x, torch.zeros(b, dtype=torch.int64, device=device), u


class Model(nn.Module):
    """A view: it launches nothing of its own."""

    def forward(self, images):
        return images[:, 0, 0, :NUM_CLASSES]


# The counter


def test_the_counter_sees_launches_views_and_copies():
    rows = torch.empty(4, 6, device=DEVICE)
    with LaunchCounter() as counter:
        rows.view(2, 12).mT[:1].unsqueeze(0)
        torch.empty_like(rows)
        rows.add(1).mul_(2)
        rows[torch.empty(3, dtype=torch.int64, device=DEVICE)].logsumexp(dim=0)
        rows.copy_(torch.zeros(4, 6))
        rows.copy_(rows)
        torch.ones(5).to(DEVICE)
        torch.ones(5).add_(1)
    assert counter.launches == Counter(add=1, mul_=1, index=1, logsumexp=5, copy_=1)
    assert counter.total == 9
    assert counter.copies == [96, 20]


def test_a_read_of_the_fake_device_is_an_error():
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.empty(3, device=DEVICE).sum().item()


# The eager path


@pytest.mark.parametrize("policy", POLICIES)
def test_eager_stays_within_its_launches_and_sends_one_copy(policy, no_autocast):
    of_augment, of_builder = EAGER[policy]
    augment = WeakAugment(impl="eager", **POLICIES[policy])
    mixmatch = MixMatch(augment, NUM_CLASSES, impl="eager").to(DEVICE)
    x, y, u = data(DEVICE)
    mixmatch(x, y, u, Model())  # makes the constants
    with LaunchCounter() as counter:
        batch = mixmatch(x, y, u, Model())
    assert counter.total == of_builder, counter.launches
    assert counter.copies == [44 * 192]  # beside images that are there already
    assert batch.inputs.shape == (192, 3, 32, 32)

    params = sampling.augment_to_device(augment.draw(0, 0, 192), DEVICE)
    with LaunchCounter() as counter:
        mixmatch.augment.apply((x, u), params)
    assert counter.total == of_augment, counter.launches


# The kernels


@pytest.mark.parametrize(
    ("policy", "kernels"),
    [
        ("plain", ["draw", "augment", "guess_labels", "augment"]),
        ("zoom", ["draw", "weights", "resample", "guess_labels", "mixup"]),
        ("blur", ["draw", "weights", "resample", "guess_labels", "mixup"]),
    ],
)
def test_a_batch_takes_four_launches_and_five_with_zoom_or_blur(policy, kernels, monkeypatch):
    launch = importlib.import_module("gpu_mixmatch.impl.triton.launch")
    launched = []
    monkeypatch.setattr(launch, "run", lambda kernel, *_, **__: launched.append(kernel.__name__))
    augment = WeakAugment(impl="triton", **POLICIES[policy])
    mixmatch = MixMatch(augment, NUM_CLASSES, impl="triton").to(INTERPRETED)
    mixmatch(*data(INTERPRETED), Model())
    assert launched == [f"{kernel}_kernel" for kernel in kernels]


def test_the_loss_takes_one_launch_forward_and_one_backward(monkeypatch):
    launch = importlib.import_module("gpu_mixmatch.impl.triton.launch")
    launched = []
    monkeypatch.setattr(launch, "run", lambda kernel, *_, **__: launched.append(kernel.__name__))
    mixmatch = MixMatch(WeakAugment(impl="triton"), NUM_CLASSES, impl="triton").to(INTERPRETED)
    batch = mixmatch(*data(INTERPRETED), Model())
    logits = torch.zeros(192, NUM_CLASSES, device=INTERPRETED, requires_grad=True)
    launched.clear()
    loss = MixMatchLoss(impl="triton")(logits, batch).loss
    assert launched == ["mixmatch_loss_kernel"]
    loss.backward()
    assert launched == ["mixmatch_loss_kernel", "mixmatch_loss_backward_kernel"]


# On a GPU


def cuda_work(function):
    """Names of kernels and of memory operations that a call starts, by the profiler."""
    function()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return Counter(
        "memory" if event.name.startswith(("Memcpy", "Memset")) else "kernel" for event in events
    )


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(("policy", "kernels"), [("plain", 4), ("zoom", 5), ("blur", 5)])
def test_the_profiler_counts_the_same_launches(policy, kernels):
    mixmatch = MixMatch(WeakAugment(**POLICIES[policy]), NUM_CLASSES).to("cuda")
    batch = data("cuda")
    assert cuda_work(lambda: mixmatch(*batch, Model())) == Counter(kernel=kernels)


@pytest.mark.gpu
@needs_cuda
def test_the_profiler_counts_one_launch_of_the_loss_and_one_back():
    mixmatch = MixMatch(WeakAugment(), NUM_CLASSES).to("cuda")
    batch = mixmatch(*data("cuda"), Model())
    logits = torch.zeros(192, NUM_CLASSES, device="cuda", requires_grad=True)
    criterion = MixMatchLoss()
    assert cuda_work(lambda: criterion(logits, batch)) == Counter(kernel=1)
    grad = torch.ones((), device="cuda")
    loss = criterion(logits, batch).loss
    work = cuda_work(lambda: torch.autograd.grad(loss, logits, grad, retain_graph=True))
    assert work == Counter(kernel=1)


@pytest.mark.gpu
@needs_cuda
def test_a_captured_call_starts_nothing_beside_its_graph_and_waits_for_nothing():
    build = capture(MixMatch(WeakAugment(), NUM_CLASSES).to("cuda"), Model(), *data("cuda"))
    alone = cuda_work(build._graph.replay)
    assert alone == Counter(kernel=4)
    assert cuda_work(build) == alone
    assert cuda_work(lambda: build(*build.inputs[:3])) == alone
    on_host = data("cpu")
    assert cuda_work(lambda: build(*on_host)) == alone + Counter(memory=3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        build()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_waits_for_the_device(policy):
    mixmatch = MixMatch(WeakAugment(**POLICIES[policy]), NUM_CLASSES).to("cuda")
    criterion = MixMatchLoss()
    x, y, u = data("cuda")
    weight = torch.ones(NUM_CLASSES, device="cuda", requires_grad=True)

    def step():
        batch = mixmatch(x, y, u, Model())
        criterion(Model()(batch.inputs) * weight, batch).loss.backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_cuda
def test_memory_does_not_grow_over_a_thousand_steps():
    mixmatch = MixMatch(WeakAugment(), NUM_CLASSES).to("cuda")
    criterion = MixMatchLoss()
    batch = data("cuda")
    logits = torch.zeros(192, NUM_CLASSES, device="cuda", requires_grad=True)
    used = []
    for step in range(1000):
        criterion(logits, mixmatch(*batch, Model())).loss.backward()
        logits.grad = None
        if step in (10, 999):
            used.append(torch.cuda.memory_allocated())
    assert used[0] == used[1]
