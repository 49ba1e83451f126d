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
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.launch_counter import DEVICE as FAKE
from gpu_mixmatch import (
    MixMatch,
    MixMatchLoss,
    ResidentLoader,
    WeakAugment,
    _streams,
    capture,
    functional,
)
from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch.impl.constants import constant
from gpu_mixmatch.types import Geometry, MixUpParams, Scaling
from tests.batches import assert_same_mixed
from tests.factories import ConvNet, LinearNet, random_data, random_images
from tests.no_sync import look_at_nothing
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
    for step, sizes in enumerate([(2, 2), (1, 1), (2, 2)]):
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
        assert build.inputs.x.grad_fn is None


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


def test_a_replay_that_failed_after_its_draw_is_done_again(captured, monkeypatch):
    mixmatch = builder()
    build, twin = captured(mixmatch, net()), builder()
    replay = build._graph.replay

    def broken():
        replay()
        raise RuntimeError("lost")

    with monkeypatch.context() as patch:
        patch.setattr(build._graph, "replay", broken)
        with pytest.raises(RuntimeError, match="lost"):
            build(*data())
    for _ in range(2):
        assert_same_mixed(build(*data()), twin(*data(), net()))


class Outside(TorchDispatchMode):
    """Takes down what a call does beside the graph: copies and launches, not views."""

    def __init__(self, mixmatch):
        super().__init__()
        self.host = mixmatch.step.data_ptr()
        self.done = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        read = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if not function.is_view and any(tensor.data_ptr() != self.host for tensor in read):
            self.done.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_beside_the_graph_there_are_only_copies_of_what_is_not_there(captured, monkeypatch):
    look_at_nothing(monkeypatch)
    mixmatch = builder()
    build = captured(mixmatch, net())
    monkeypatch.setattr(build._graph, "replay", lambda: None)
    x, y, u = data(seed=3)
    ids = {"ids_x": torch.arange(4) + 5, "ids_u": torch.arange(6) * 3}
    held = build.inputs._asdict()
    held_ids = {name: held[name] for name in ids}

    def outside(*args, **ids):
        with Outside(mixmatch) as work:
            build(*args, **ids)
        return work.done

    assert outside(x, y, u) == ["copy_"] * 3
    assert outside(x, y, u, **ids) == ["copy_"] * 5
    assert outside(x, y, build.inputs.u, **ids) == ["copy_"] * 4
    assert outside(*build.inputs[:3], **held_ids) == []
    assert outside() == []
    assert torch.equal(build.inputs.ids_u, ids["ids_u"])
    assert outside(*build.inputs[:3]) == ["copy_"] * 2  # the positions again
    assert outside(*build.inputs[:3]) == []
    build.inputs.ids_u.copy_(ids["ids_u"])
    assert outside() == []
    assert outside(*build.inputs[:3]) == ["copy_"]
    assert torch.equal(build.inputs.ids_u, torch.arange(6))
    mixmatch.step.fill_(7)
    assert outside() == ["fill_"] * 2  # seed and step
    assert outside() == []
    with pytest.raises(TypeError, match="x, y and u must be given, all of them or none"):
        build(x)


def test_a_batch_that_is_written_into_the_inputs_is_the_one_that_is_built(captured):
    build, twin, model = captured(builder(), net()), builder(), net()
    for step in range(3):
        x, y, u = data(seed=step)
        ids = {"ids_x": torch.arange(4) + 5, "ids_u": torch.arange(6) * 3}
        for held, new in zip(build.inputs, (x, y, u, *ids.values()), strict=True):
            held.copy_(new)
        assert_same_mixed(build(), twin(x, y, u, model, **ids))
    assert_same_mixed(build(*build.inputs[:3]), twin(x, y, u, model))
    with torch.inference_mode():  # writes are counted there, too
        build.inputs.ids_x.add_(1)
    twin.step, build.mixmatch.step = torch.tensor(1), torch.tensor(1)
    assert_same_mixed(build(x, y, u), twin(x, y, u, model))


def test_batches_that_a_loader_gathers_into_the_inputs_equal_the_eager_calls(captured):
    x, y, _ = data(b=32)
    loader, others = (ResidentLoader(x, y, 4, ratio=2) for _ in range(2))
    build, twin, model = None, builder(), net()
    for mine, theirs in zip(loader, others, strict=True):
        if build is None:
            build = captured(builder(), model, mine[:3])
            loader.gather_into(build.inputs)
        batch = build(*mine[:3], ids_u=mine.ids_u)
        assert_same_mixed(batch, twin(*theirs[:3], model, ids_u=theirs.ids_u))
    assert mine.x is build.inputs.x


def test_two_captures_of_a_builder_share_its_step_and_follow_what_is_set(captured):
    mixmatch, twin, model = builder(), builder(), net()
    builds = [captured(mixmatch, model), captured(mixmatch, model, data(2, 3))]

    def same(build, sizes):
        x, y, u = data(*sizes, seed=int(twin.step))
        assert_same_mixed(build(x, y, u), twin(x, y, u, model))

    for number in (0, 1, 1, 0, 0):
        same(builds[number], ((4, 6), (2, 3))[number])
    same(builds[0], (1, 2))  # of neither's shape
    same(builds[0], (4, 6))
    for changed in (mixmatch, twin):
        changed.load_state_dict({"seed": torch.tensor(8), "step": torch.tensor(2**32 - 5)})
    same(builds[0], (4, 6))
    same(builds[1], (2, 3))
    mixmatch.seed = twin.seed = 5
    mixmatch.step += 1
    twin.step += 1
    same(builds[0], (4, 6))


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


# Version counters


def losses_of(mixmatch, model, steps):
    """The loss of each step, before any backward pass."""
    criterion = MixMatchLoss(impl="eager")
    losses = []
    for step in range(steps):
        batch = mixmatch(*data(2, 2, seed=step), model)
        losses.append(criterion(model(batch.inputs), batch).loss)
    return losses


@each_impl
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_backward_that_comes_after_its_inputs_were_overwritten_raises(impl, channels_last):
    switches = {"mix": "none", "num_augmentations": 1, "reuse_buffers": True}
    policy = {"channels_last": channels_last}
    model = net()
    first, second, third = losses_of(builder(impl, policy=policy, **switches), model, 3)
    second.backward()
    third.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "triton" or CUDA])
def test_gradients_accumulated_in_time_are_those_of_fresh_buffers(impl):
    switches = {"mix": "none", "num_augmentations": 1}
    gradients = []
    for reuse_buffers in (False, True):
        model = net()
        mixmatch = builder(impl, reuse_buffers=reuse_buffers, **switches)
        for _ in range(2):
            for loss in losses_of(mixmatch, model, 2):  # two buffers, two losses
                loss.backward()
        gradients.append([weight.grad for weight in model.parameters()])
    for fresh, reused in zip(*gradients, strict=True):
        torch.testing.assert_close(reused, fresh)


@each_impl
def test_writes_to_an_out_of_the_user_s_are_counted(impl):
    images = random_images(2, SHAPE).to(DEVICE)
    params = type(still_params(2))(*(field.to(DEVICE) for field in still_params(2)))
    rows, targets = torch.rand(2, *SHAPE, device=DEVICE), torch.rand(2, 3, device=DEVICE)
    mixed = MixUpParams(torch.ones(2, device=DEVICE), torch.arange(2, device=DEVICE))

    def augment(out):
        scaling = Scaling(1.0, 0.0)
        return functional.augment(images, params, Geometry(), scaling, out=out, impl=impl)

    def mixup(out):
        return functional.mixup(rows, targets, mixed, out=out, impl=impl)[0]

    for write in (augment, mixup):
        out = torch.zeros(2, *SHAPE, device=DEVICE)
        weight = torch.ones((), device=DEVICE, requires_grad=True)
        loss = (weight * out).sum()
        assert write(out) is out
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        with torch.inference_mode():  # such a tensor has no counter
            uncounted = torch.zeros(2, *SHAPE, device=DEVICE)
            assert torch.equal(write(uncounted), out)


def test_a_gradient_asked_of_a_batch_is_not_asked_of_later_ones():
    mixmatch = builder("auto", reuse_buffers=True)
    mixmatch(*data(), net()).inputs.requires_grad_()
    mixmatch(*data(), net())
    assert not mixmatch(*data(), net()).inputs.requires_grad
    x, y, u = (t.float().requires_grad_() if t.dim() == 4 else t for t in data())
    batch = mixmatch((x / 255).detach().requires_grad_(), y, u / 255, net())
    assert not batch.inputs.requires_grad
    views = mixmatch._workspaces[0].empty("views", batch.inputs.shape, torch.float32, x.device)
    assert views.grad_fn is None


# Outputs and what is read


@pytest.mark.parametrize("name", ["inputs", "targets", "lam", "index"])
def test_mixup_refuses_an_out_that_shares_memory_with_what_it_reads(name):
    memory = torch.zeros(4096)
    size = 3 * 2 * 4 * 4
    out = memory[8 : 8 + size].view(3, 2, 4, 4)
    read = {
        "inputs": torch.rand(3, 2, 4, 4),
        "targets": torch.rand(3, 5),
        "lam": torch.ones(3),
        "index": torch.arange(3),
    }
    last = 8 + size - 1  # one value, or a half of one, in common
    shared = memory[last if last % 2 == 0 or name != "index" else last - 1 :]
    shared = shared.view(read[name].dtype) if name == "index" else shared
    read[name] = shared[: read[name].numel()].view(read[name].shape)
    params = MixUpParams(read["lam"], read["index"])
    with pytest.raises(ValueError, match=f"out must share no memory with {name}, which is read"):
        functional.mixup(read["inputs"], read["targets"], params, out=out)


@pytest.mark.parametrize("channels_last", [False, True])
def test_augment_refuses_an_out_that_shares_memory_with_what_it_reads(channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.rand(2, *SHAPE).contiguous(memory_format=layout)
    augment = WeakAugment(padding=1, channels_last=channels_last)
    params = augment.draw(0, 0, 2)
    with pytest.raises(ValueError, match="out must share no memory with images"):
        augment.apply(images, params, out=images)
    with pytest.raises(ValueError, match="out must share no memory with images"):
        augment.apply((images[:1], images[1:]), params, out=images)
    sigma = torch.zeros(2 * 3 * 8 * 8)
    out = sigma.view(2, *SHAPE) if not channels_last else sigma.view(2, 8, 8, 3).permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match="out must share no memory with sigma"):
        augment.apply(images, params._replace(sigma=sigma[-2:]), out=out)
    mixed = MixUpParams(sigma[:2], torch.arange(2))
    with pytest.raises(ValueError, match="out must share no memory with lam"):
        augment.apply(images, params, mixup=mixed, out=out)


def test_disjoint_parts_of_one_buffer_are_fine():
    memory = torch.rand(3, 2, *SHAPE)
    inputs, out, rest = memory
    saved = rest.clone()
    params = MixUpParams(torch.ones(2), torch.arange(2))
    assert functional.mixup(inputs, torch.rand(2, 3), params, out=out)[0] is out
    assert torch.equal(out, inputs)
    assert torch.equal(rest, saved)
    augment = WeakAugment(padding=0, flip=0.0, mean=0.0, std=1.0)
    augment.apply(inputs, augment.draw(0, 0, 2), out=rest)
    torch.testing.assert_close(rest, inputs)


def test_an_out_that_asks_for_a_gradient_or_overlaps_itself_is_refused():
    rows, targets = torch.rand(2, *SHAPE), torch.rand(2, 3)
    params = MixUpParams(torch.ones(2), torch.arange(2))
    out = torch.empty(2, *SHAPE, requires_grad=True)
    expanded = torch.empty(1, *SHAPE).expand(2, *SHAPE)
    augment = WeakAugment(padding=1)
    drawn = augment.draw(0, 0, 2)
    for write in (
        lambda out: functional.mixup(rows, targets, params, out=out),
        lambda out: augment.apply(rows, drawn, out=out),
    ):
        with pytest.raises(ValueError, match="out must not require a gradient"):
            write(out)
        with pytest.raises(ValueError, match=r"^out must be \S"):
            write(expanded)
        with pytest.raises(ValueError, match="out must be on cpu like i"):
            write(torch.empty(2, *SHAPE, device=FAKE))


def test_a_gradient_that_would_be_lost_is_refused():
    rows = torch.rand(2, *SHAPE, requires_grad=True)
    params = MixUpParams(torch.ones(2), torch.arange(2))
    augment = WeakAugment(padding=1)
    drawn = augment.draw(0, 0, 2)
    for name, call in (
        ("inputs", lambda: functional.mixup(rows, torch.rand(2, 3), params)),
        ("images", lambda: augment.apply(rows, drawn)),
    ):
        with pytest.raises(ValueError, match=f"{name} must not require a gradient"):
            call()
        with torch.no_grad():
            call()


# Workspaces


def test_streams_share_no_buffer_and_a_stream_keeps_its_own(monkeypatch):
    workspace, stream = Workspace(), 0
    monkeypatch.setattr(_streams, "current_stream", lambda device: stream)

    def buffer(size=4):
        return workspace.empty("views", (size,), torch.float32, torch.device("cpu")).data_ptr()

    first = buffer()
    stream = 7
    second = buffer()
    assert second != first
    stream = 0
    assert buffer() == first
    stream = 7
    assert buffer(5) not in (first, second)
    stream = 0
    assert buffer() == first


def test_what_is_captured_gets_memory_of_its_own(monkeypatch):
    workspace, capturing = Workspace(), False
    monkeypatch.setattr(_streams, "is_capturing", lambda device: capturing)
    of = ("views", (4,), torch.float32, torch.device("cpu"))
    kept = workspace.empty(*of)
    capturing = True
    one, other = workspace.empty(*of), workspace.empty(*of)
    assert len({kept.data_ptr(), one.data_ptr(), other.data_ptr()}) == 3
    gone = weakref.ref(one)
    del one
    assert gone() is None
    capturing = False
    assert workspace.empty(*of) is kept


def test_copies_and_pickles_of_a_builder_hold_no_buffers():
    mixmatch = builder("auto", "cpu", reuse_buffers=True)
    mixmatch(*data(device="cpu"), net("cpu"))
    size = len(pickle.dumps(builder("auto", "cpu", reuse_buffers=True)))
    assert len(pickle.dumps(mixmatch)) == size
    expected = copy.deepcopy(mixmatch)
    for twin in (copy.deepcopy(mixmatch), pickle.loads(pickle.dumps(mixmatch))):
        assert not any(workspace._buffers for workspace in twin._workspaces)
        twin(*data(device="cpu"), net("cpu"))
    batch = expected(*data(device="cpu", seed=1), net("cpu"))
    assert_same_mixed(mixmatch(*data(device="cpu", seed=1), net("cpu")), batch)


def test_a_builder_that_moves_leaves_no_buffers_behind():
    mixmatch = builder("auto", "cpu", reuse_buffers=True)
    mixmatch(*data(device="cpu"), net("cpu"))
    left = [weakref.ref(t) for w in mixmatch._workspaces for t in w._buffers.values()]
    assert left
    mixmatch.to(FAKE)
    gc.collect()
    assert [ref() for ref in left] == [None] * len(left)


def test_builders_that_share_an_engine_share_no_buffers():
    engine = WeakAugment(padding=2)
    one, other = (MixMatch(engine, NUM_CLASSES, reuse_buffers=True, seed=s) for s in (1, 2))
    batch = data(device="cpu")
    first = one(*batch, net("cpu"))
    saved = first.inputs.clone()
    for _ in range(2):
        other(*batch, net("cpu"))
    assert torch.equal(first.inputs, saved)


# Constants


@pytest.fixture
def kernels(monkeypatch):
    """Triton's kernels, launched on a fake device, where nothing runs."""
    skip_without("triton")
    if CUDA:
        pytest.skip("kernels run on CUDA here, without the interpreter")
    launch = importlib.import_module("gpu_mixmatch.impl.triton.launch")
    monkeypatch.setattr(launch, "run", lambda *_, **__: None)


@pytest.fixture
def capturing(monkeypatch):
    """Sets whether a graph is being captured on any device."""
    state = {"on": False}
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # knows no "meta"
    monkeypatch.setattr(_streams, "is_capturing", lambda device: state["on"])
    return lambda on: state.update(on=on)


def test_a_builder_s_constants_are_there_before_a_graph_is_captured(kernels, capturing):
    model = LinearNet(NUM_CLASSES, SHAPE).to(FAKE)
    mixmatch = builder("triton", FAKE, alpha=0.731)
    x, y, u = (tensor.to(FAKE) for tensor in data(device="cpu"))
    key = torch.zeros(2, dtype=torch.int64, device=FAKE)
    capturing(True)
    assert mixmatch(x, y, u, model, key=key).inputs.shape == (16, *SHAPE)
    mixmatch.alpha = 0.732
    with pytest.raises(RuntimeError, match="a constant must be on meta before a CUDA graph"):
        mixmatch(x, y, u, model, key=key)
    capturing(False)
    mixmatch(x, y, u, model, key=key)
    capturing(True)
    mixmatch(x, y, u, model, key=key)


@pytest.mark.parametrize("operation", ["interleave", "batch_targets", "augment", "blur"])
def test_constants_of_plain_torch_are_refused_within_a_capture_and_kept_after_a_call(
    operation, capturing
):
    rows = torch.zeros(7, *SHAPE, device=FAKE)
    params = type(still_params(7))(*(field.to(FAKE) for field in still_params(7)))
    geometry = Geometry(padding=1, blur_radius=2 if operation == "blur" else 0)

    def call():
        if operation == "interleave":
            return functional.interleave(rows, 3)
        if operation == "batch_targets":
            y, logits = torch.zeros(3, dtype=torch.int64), torch.zeros(2, 4, 11)
            return functional.batch_targets(y.to(FAKE), logits.to(FAKE), 0.5)
        return functional.augment(rows, params, geometry, Scaling(1.0, 0.0))

    capturing(True)
    with pytest.raises(RuntimeError, match="call what is captured once before"):
        call()
    capturing(False)
    call()
    capturing(True)
    call()


def test_constants_on_a_device_live_as_long_as_the_process():
    made = []

    @constant
    def table(number, device):
        made.append(number)
        return torch.full((2,), number).to(device)

    kept = [weakref.ref(table(number, FAKE)) for number in range(100)]
    assert all(ref() is not None for ref in kept)
    assert all(table(number, FAKE) is ref() for number, ref in enumerate(kept))
    assert made == list(range(100))
    with torch.inference_mode():
        assert not table(100, FAKE).is_inference()


# What a graph would keep from the host


def test_a_graph_of_the_user_s_is_not_given_what_it_would_not_read_again(kernels, capturing):
    model = LinearNet(NUM_CLASSES, SHAPE).to(FAKE)
    mixmatch = builder("triton", FAKE)
    on_host = data(device="cpu")
    x, y, u = (tensor.to(FAKE) for tensor in on_host)
    key = torch.zeros(2, dtype=torch.int64, device=FAKE)
    mixmatch(x, y, u, model)
    capturing(True)
    with pytest.raises(RuntimeError, match="would draw the same batch in every replay"):
        mixmatch(x, y, u, model)
    for name, batch in (
        ("x", (on_host[0], y, u)),
        ("y", (x, on_host[1], u)),
        ("u", (x, y, on_host[2])),
    ):
        with pytest.raises(RuntimeError, match=f"^{name} must be on meta while a CUDA graph"):
            mixmatch(*batch, model, key=key)
    with pytest.raises(RuntimeError, match="ids_x and ids_u must be on meta while"):
        mixmatch(x, y, u, model, key=key, ids_u=torch.arange(6))
    batch = mixmatch(x, y, u, model, key=key)
    logits = model(batch.inputs)
    with pytest.raises(RuntimeError, match="would keep the weight of this step"):
        MixMatchLoss(impl="triton")(logits, batch)
    on_device = batch._replace(step=torch.zeros((), dtype=torch.int64, device=FAKE))
    MixMatchLoss(impl="triton")(logits, on_device)
    MixMatchLoss(rampup_steps=0, impl="triton")(logits, batch)


def test_ids_on_the_host_are_sent_in_one_copy(kernels, monkeypatch):
    from benchmarks.launch_counter import LaunchCounter

    model = LinearNet(NUM_CLASSES, SHAPE).to(FAKE)
    mixmatch = builder("triton", FAKE)
    x, y, u = (tensor.to(FAKE) for tensor in data(device="cpu"))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # knows no "meta"
    with LaunchCounter() as counter:
        mixmatch(x, y, u, model, ids_x=torch.arange(4), ids_u=torch.arange(6))
    assert counter.copies == [8 * 10]


# The loss's counter


def test_the_loss_counts_in_memory_of_its_stream_or_of_its_graph(kernels, capturing, monkeypatch):
    module = importlib.import_module("gpu_mixmatch.impl.triton.zeros")
    device = torch.device("cpu")
    module._kept_zeros.cache_clear()
    counters, stream = [], 0
    launch = importlib.import_module("gpu_mixmatch.impl.triton.launch")
    monkeypatch.setattr(launch, "run", lambda _, __, *args, **___: counters.append(args[4]))
    monkeypatch.setattr(_streams, "current_stream", lambda device: stream)
    logits, targets = torch.zeros(6, 3, device=device), torch.rand(6, 3, device=device)

    def counter():
        functional.mixmatch_loss(logits, targets, 2, 75.0, impl="triton")
        assert int(counters[-1]) == 0
        return counters[-1]

    first = counter()
    capturing(True)
    graphs = [counter() for _ in range(2)]  # the first calls within a capture
    capturing(False)
    assert counter() is first
    stream = 5
    other = counter()
    assert len({t.data_ptr() for t in (first, other, *graphs)}) == 4
    module._kept_zeros.cache_clear()
    capturing(True)
    gone = weakref.ref(counter())
    counters.clear()
    assert gone() is None  # nothing of a graph is kept for others
    assert module._kept_zeros.cache_info().currsize == 0


# On a GPU


def user_graph(function):
    """A graph of the user's own, warmed up as torch wants it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("policy", [{}, {"blur_sigma": (0.0, 1.0)}], ids=["shift", "blur"])
def test_a_graph_survives_smaller_batches_whose_memory_goes_to_others(policy):
    model = net()
    mixmatch = builder("auto", policy=policy, reuse_buffers=True)
    twin = builder("auto", policy=policy)
    build = capture(mixmatch, model, *data())
    for step in range(3):
        build(*data(3, 5, seed=step))
        twin(*data(3, 5, seed=step), model)
        torch.cuda.synchronize()
        # whatever was freed belongs to these now
        others = [torch.zeros(size, device="cuda") for size in (2**10, 2**12, 2**14, 2**16) * 8]
        batch, expected = build(*data(seed=step)), twin(*data(seed=step), model)
        torch.testing.assert_close(batch.inputs, expected.inputs)
        torch.testing.assert_close(batch.targets, expected.targets)
        assert not any(bool(other.any()) for other in others)


@pytest.mark.gpu
@needs_cuda
def test_a_backward_after_the_next_real_replay_raises():
    model = net()
    build = capture(builder("auto"), model, *data())
    first = model(build(*data()).inputs).sum()
    first.backward()
    late = model(build(*data(seed=1)).inputs).sum()
    build(*data(seed=2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


@pytest.mark.gpu
@needs_cuda
def test_the_loss_is_right_in_graphs_replayed_in_any_order_and_at_once():
    logits = torch.randn(2, 300, 10, device="cuda")
    targets = torch.randn(2, 300, 10, device="cuda").softmax(-1)

    def loss(number):
        return functional.mixmatch_loss(logits[number], targets[number], 100, 75.0).loss

    expected = [loss(number).clone() for number in range(2)]
    graphs = []
    for number in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # kernels are compiled by now
            graphs.append((graph, loss(number)))
    streams = [torch.cuda.Stream() for _ in graphs]
    for order in ((1,), (0, 1), (1, 0), (0, 1)):  # the second before the first was ever replayed
        for _, result in graphs:
            result.fill_(torch.nan)
        torch.cuda.synchronize()
        for number in order:
            with torch.cuda.stream(streams[number]):
                graphs[number][0].replay()
        torch.cuda.synchronize()
        for number in order:
            torch.testing.assert_close(graphs[number][1], expected[number])


@pytest.mark.gpu
@needs_cuda
def test_a_builder_s_key_drives_a_graph_of_the_user_s():
    model, mixmatch, twin = net(), builder("auto", alpha=0.61), builder("auto", alpha=0.61)
    x, y, u = data()
    key = torch.tensor([mixmatch.seed, 0], device="cuda")
    graph, batch = user_graph(lambda: mixmatch(x, y, u, model, key=key))
    for step in range(3):
        key[1].fill_(step)
        graph.replay()
        expected = twin(x, y, u, model)
        torch.testing.assert_close(batch.inputs, expected.inputs)
        assert torch.equal(batch.params.index, expected.params.index)


@pytest.mark.gpu
@needs_cuda
def test_a_graph_without_a_key_is_refused_with_words():
    model, mixmatch = net(), builder("auto")
    x, y, u = data()
    mixmatch(x, y, u, model)

    def captured():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.clone()  # a graph of nothing would be warned of
            mixmatch(x, y, u, model)

    with pytest.raises(RuntimeError, match="would draw the same batch in every replay"):
        captured()
    torch.cuda.synchronize()


@pytest.mark.gpu
@needs_cuda
def test_batches_built_on_two_streams_do_not_meet():
    model = LinearNet(NUM_CLASSES, (3, 64, 64)).cuda()
    policy = {"zoom_px": (0, 8)}
    mixmatch, twin = (builder("auto", policy=policy, reuse_buffers=r) for r in (True, False))
    x, y, u = random_data(64, 64, (3, 64, 64), num_classes=NUM_CLASSES, device="cuda")
    expected = [twin(x, y, u, model).inputs for _ in range(2)]
    mixmatch.step = torch.tensor(2)
    mixmatch(x, y, u, model)
    mixmatch.step = torch.tensor(0)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    built = []
    for stream in streams:
        with torch.cuda.stream(stream):
            built.append(mixmatch(x, y, u, model).inputs)
    torch.cuda.synchronize()
    for mine, theirs in zip(built, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("policy", [{}, {"zoom_px": (0, 2), "blur_sigma": (0.0, 1.0)}])
def test_last_batches_of_any_size_compile_nothing(policy):
    from gpu_mixmatch.impl.triton.augment import augment_kernel
    from gpu_mixmatch.impl.triton.draw import draw_kernel
    from gpu_mixmatch.impl.triton.guess_labels import guess_labels_kernel
    from gpu_mixmatch.impl.triton.mixmatch_loss import mixmatch_loss_kernel
    from gpu_mixmatch.impl.triton.mixup import mixup_kernel
    from gpu_mixmatch.impl.triton.resample import resample_kernel, weights_kernel

    kernels = (draw_kernel, augment_kernel, guess_labels_kernel, mixup_kernel)
    kernels += (weights_kernel, resample_kernel)
    model, mixmatch, criterion = net(), builder("auto", policy=policy), MixMatchLoss()
    device = torch.cuda.current_device()

    def compiled():
        return [len(k.device_caches[device][0]) for k in (*kernels, mixmatch_loss_kernel)]

    def step(b, m):
        batch = mixmatch(*data(b, m), model)
        criterion(model(batch.inputs), batch).loss.backward()

    step(64, 64)
    before = compiled()
    for sizes in ((1, 64), (2, 17), (15, 16), (16, 15), (17, 2), (64, 1)):
        step(*sizes)
    assert compiled() == before
