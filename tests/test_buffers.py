"""Memory that a CUDA graph or a backward pass still needs is neither freed nor changed in silence.

Where there is no GPU, graphs are recorded (tests/recorded_graphs.py), and causes are shown by
version counters, weak references and counted allocations. The tests marked ``gpu`` show the same on
a device.
"""

import copy
import gc
import importlib
import pickle
import weakref

import pytest
import torch
from torch import nn

from benchmarks.launch_counter import DEVICE as FAKE
from gpu_mixmatch import MixMatch, MixMatchLoss, WeakAugment, _streams, capture, functional
from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch.impl.constants import constant
from gpu_mixmatch.types import Geometry, MixUpParams, Scaling
from tests.batches import assert_same_mixed
from tests.factories import ConvNet, LinearNet, random_data, random_images
from tests.params import still_params
from tests.recorded_graphs import record_graphs
from tests.skips import skip_without

NUM_CLASSES = 5
SHAPE = (3, 8, 8)
CUDA = torch.cuda.is_available()
IMPLS = ["eager", "triton"] if CUDA else ["eager", "numba", "triton"]
DEVICE = "cuda" if CUDA else "cpu"
each_impl = pytest.mark.parametrize("impl", IMPLS)
on_a_cpu = pytest.mark.skipif(CUDA, reason="kernels run on CUDA here, without the interpreter")
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


def data(b=4, m=6, device=DEVICE, seed=0):
    return random_data(b, m, SHAPE, num_classes=NUM_CLASSES, device=device, seed=seed)


def builder(impl="eager", device=DEVICE, policy=None, **switches):
    augment = WeakAugment(**{"padding": 2, "impl": impl, **(policy or {})})
    return MixMatch(augment, NUM_CLASSES, impl=impl, seed=2**40 + 7, **switches).to(device)


def net(device=DEVICE):
    return ConvNet(NUM_CLASSES).to(device)


# A captured graph


@pytest.fixture
def captured(monkeypatch):
    """Captures a builder on the CPU."""
    if CUDA:
        pytest.skip("a real graph is captured here")
    builders = []
    record_graphs(monkeypatch, lambda: [mixmatch.step for mixmatch in builders])

    def captured(mixmatch, model, batch=None):
        builders.append(mixmatch)
        return capture(mixmatch, model, *(batch or data()))

    return captured


@pytest.mark.parametrize(
    ("impl", "policy", "switches"),
    [
        ("eager", {}, {}),
        ("eager", {"zoom_px": (0, 2)}, {"guess_bn": "update", "lam": "batch"}),
        ("eager", {"channels_last": True}, {"guess_forward": "separate", "mix": "separate"}),
        ("triton", {}, {"mix": "none", "num_augmentations": 1}),
        (
            "triton",
            {"blur_sigma": (0.0, 0.3)},
            {"mix": "none", "num_augmentations": 1, "guess_bn": "eval"},
        ),
    ],
    ids=["shift", "zoom", "channels_last", "kernels", "blur"],
)
def test_a_smaller_batch_neither_frees_nor_changes_what_a_graph_writes_to(
    captured, impl, policy, switches
):
    if impl == "triton":
        skip_without("triton")
    model, twin = net(), net()
    mine = builder(impl, policy=policy, reuse_buffers=True, **switches)
    theirs = builder(impl, policy=policy, **switches)
    build = captured(mine, model, data(2, 2))
    assert int(mine.step) == 0
    for step, sizes in enumerate([(2, 2), (1, 2), (2, 2)]):
        x, y, u = data(*sizes, seed=step)
        ids = {"ids_x": torch.arange(sizes[0]) * 7} if step == 2 else {}
        batch, expected = build(x, y, u, **ids), theirs(x, y, u, twin, **ids)
        torch.testing.assert_close(batch.inputs, expected.inputs)
        torch.testing.assert_close(batch.targets, expected.targets)
        assert torch.equal(batch.params.index, expected.params.index)
        assert batch.step == expected.step
        gc.collect()
    for buffer, other in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, other)


def test_a_captured_builder_s_own_buffers_are_not_those_of_the_graph(captured):
    mixmatch = builder(reuse_buffers=True)
    mixmatch(*data(), net())
    own = [weakref.ref(t) for w in mixmatch._workspaces for t in w._buffers.values()]
    build = captured(mixmatch, net())
    replayed = build(*data()).inputs.clone()
    assert all(ref() is not None for ref in own)
    held = build._batch.inputs.data_ptr()
    assert held not in [ref().data_ptr() for ref in own]
    mixmatch(*data(seed=1), net())  # the same shape, without the graph
    assert torch.equal(build._batch.inputs, replayed)


def test_a_backward_after_the_next_replay_raises_and_one_before_is_right(captured):
    model = net()
    build, twin = captured(builder(), model), builder()
    criterion = MixMatchLoss(impl="eager")
    for step in range(3):
        batch = build(*data(seed=step))
        criterion(model(batch.inputs), batch).loss.backward()
        mine = [weight.grad.clone() for weight in model.parameters()]
        model.zero_grad()
        batch = twin(*data(seed=step), model)
        criterion(model(batch.inputs), batch).loss.backward()
        for grad, weight in zip(mine, model.parameters(), strict=True):
            torch.testing.assert_close(grad, weight.grad)
        model.zero_grad()
    batch = build(*data())
    loss = model(batch.inputs).sum()
    of_targets = (model(batch.inputs.clone()).softmax(1) * batch.targets).sum()
    build(*data(seed=1))
    for late in (loss, of_targets):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            late.backward()


def test_what_a_user_does_to_a_batch_does_not_stay_in_the_graph(captured):
    build = captured(builder(), net())
    x, y, u = data()
    batch = build(x, y, u)
    batch.inputs.requires_grad_()
    assert not build(x, y, u).inputs.requires_grad
    floats = [images.float().div(255).requires_grad_() for images in (x, u)]
    build = captured(builder(), net(), (floats[0], y, floats[1]))
    for _ in range(2):
        batch = build(floats[0], y, floats[1])
        assert not batch.inputs.requires_grad
        assert build._x.grad_fn is None


def test_a_capture_serves_inference_mode_and_is_made_in_it(captured):
    model, twin = net(), builder()
    with torch.inference_mode():
        build = captured(builder(), model)
        batch = build(*data())
        torch.testing.assert_close(batch.inputs, twin(*data(), model).inputs)
    batch = build(*data(seed=1))
    torch.testing.assert_close(batch.inputs, twin(*data(seed=1), model).inputs)
    model(batch.inputs).sum().backward()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda mixmatch, model: mixmatch.to(FAKE), "builder was captured on .* and is on meta"),
        (lambda mixmatch, model: model.double(), "weight of the model is not where it was"),
        (lambda mixmatch, model: model.register_buffer("late", None), None),
        (
            lambda mixmatch, model: model.load_state_dict(net().state_dict(), assign=True),
            "weight of the model is not where it was",
        ),
        (
            lambda mixmatch, model: setattr(model, "dense", nn.Linear(4, NUM_CLASSES)),
            None,  # the old layer's weights are still there, and are what the graph reads
        ),
    ],
    ids=["builder moved", "model cast", "buffer added", "weights assigned", "layer replaced"],
)
def test_a_replay_refuses_what_is_no_longer_where_it_was(captured, change, words):
    mixmatch, model = builder(), net()
    build = captured(mixmatch, model)
    change(mixmatch, model)
    if words is None:
        build(*data())
        return
    with pytest.raises(RuntimeError, match=words):
        build(*data())
    assert int(mixmatch.step) == 0


def test_a_failed_call_of_a_captured_builder_changes_nothing(captured, monkeypatch):
    mixmatch = builder()
    build = captured(mixmatch, net())
    twin = builder()(*data(), net())
    with pytest.raises(ValueError, match=r"ids_u must be \[6\] int64"):
        build(*data(seed=3), ids_x=torch.arange(4) + 5, ids_u=torch.arange(5))
    with monkeypatch.context() as patch:
        patch.setattr(build, "_graph", None)
        with pytest.raises(AttributeError):
            build(*data(seed=3))
    assert int(mixmatch.step) == 0
    torch.testing.assert_close(build(*data()).inputs, twin.inputs)


def test_a_captured_builder_cannot_be_copied_and_says_so(captured):
    build = captured(builder(), net())
    for copied in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match="captured builder cannot be copied or pickled"):
            copied(build)


class WritesInPlace(nn.Module):
    """A net whose first operation works in place."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, images):
        return self.net(images.mul_(-0.5))


@pytest.mark.parametrize("policy", [{}, {"zoom_px": (0, 2)}], ids=["shift", "zoom"])
def test_a_replay_equals_the_eager_call_of_a_model_that_writes_in_place(captured, policy):
    build, twin = captured(builder(policy=policy), WritesInPlace()), builder(policy=policy)
    for step in range(2):
        batch = build(*data(seed=step))
        expected = twin(*data(seed=step), WritesInPlace())
        torch.testing.assert_close(batch.inputs, expected.inputs)
        torch.testing.assert_close(batch.targets, expected.targets)
