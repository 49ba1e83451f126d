"""Nothing on the hot path reads a value back from the device, which would wait for it."""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_mixmatch import (
    ICT,
    ColorJitter,
    ConsistencyLoss,
    MixMatch,
    MixMatchBatch,
    MixMatchLoss,
    MixUpParams,
    RandAugment,
    ReMixMatch,
    ReMixMatchLoss,
    WeakAugment,
    _validation,
    functional,
    interleaved_forward,
    sampling,
)
from tests.factories import ConvNet, random_data
from tests.no_sync import NoExport, NoSync, aten, look_at_nothing

# Numba's loops are for a CPU's own memory
pytestmark = pytest.mark.usefixtures("without_numba")


@pytest.fixture(autouse=True)
def no_look_at_draws(monkeypatch):
    """Draws and views on a CPU are looked at, those on a device are not."""
    look_at_nothing(monkeypatch, but=("check_classes", "check_distributions"))


NUM_CLASSES = 5


@contextlib.contextmanager
def no_reads():
    """For operations, to which everything comes from the device."""
    with NoExport(), NoSync() as mode:
        yield
    assert mode.calls > 0


def net():
    return ConvNet(NUM_CLASSES)


def data(device="cpu"):
    return random_data(num_classes=NUM_CLASSES, device=device)


POLICIES = {
    "weak": {"padding": 2},
    "zeros": {"padding": 2, "padding_mode": "zeros"},
    "edge, bfloat16, channels_last": {
        "padding": 2,
        "padding_mode": "edge",
        "dtype": torch.bfloat16,
        "channels_last": True,
    },
    "zoom": {"padding": 0, "zoom_px": (0, 3)},
    "blog": {"padding": 0, "zoom_px": (0, 3), "blur_sigma": (0.0, 1.0)},
}


# The modes themselves


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.sum().item(),
        lambda t: t.abs().tolist(),
        lambda t: t.abs().cpu(),
        lambda t: t.abs().numpy(),
        lambda t: bool(t.any()),
        lambda t: int(t.argmax()),
        lambda t: t.nonzero(),
        lambda t: torch.where(t > 0),
        lambda t: t[t > 0],
        lambda t: t.masked_select(t > 0),
        lambda t: torch.equal(t, t),
        lambda t: t.unique(),
        lambda t: t.index_put((t > 0,), torch.tensor(1.0)),
        lambda t: t.repeat_interleave(torch.ones(3, dtype=torch.int64)),
    ],
)
def test_a_read_is_noticed(read):
    tensor = torch.tensor([1.0, -1.0, 2.0])
    with no_reads(), pytest.raises(AssertionError, match="waits for the device"):
        read(tensor)


def test_the_host_may_read_its_own():
    step = torch.tensor(3)
    with NoSync(step):
        assert int(step) == 3


# The operations


@pytest.mark.parametrize("policy", POLICIES)
def test_augment_reads_nothing_back(policy):
    engine = WeakAugment(**POLICIES[policy])
    x, _, u = data()
    draws = engine.draw_batch(0, 0, 4, 6, 2)
    engine.build(x, u, draws, 2)  # makes the constants of the policy, once and on the host
    with no_reads():
        views = engine.build(x, u, draws, 2)
        engine.normalize(x)
    assert views.shape == (16, 3, 12, 12)


@pytest.mark.parametrize(
    "engine",
    [
        RandAugment.uda(WeakAugment(2, blur_sigma=(0.0, 1.0)), cutout=4),
        RandAugment.kekmodel(WeakAugment.imagenet(8), cutout=4),
        ColorJitter(gray=0.5),
        WeakAugment.imagenet(8),
        WeakAugment(size=8),
    ],
    ids=["uda, blur", "kekmodel, resized", "jitter", "resized", "crop"],
)
def test_operations_and_cuts_read_nothing_back(engine):
    x, _, u = data()
    draws = engine.draw_batch(0, 0, 4, 6, 2)
    engine.build(x, u, draws, 2)  # makes the constants
    with no_reads():
        views = engine.build(x, u, draws, 2)
        engine.normalize(x)
    assert len(views) == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_guessing_reads_nothing_back(dtype):
    logits = torch.randn(2, 6, NUM_CLASSES).to(dtype)
    with no_reads():
        functional.guess_labels(logits, 0.5)
        functional.sharpen(logits.softmax(dim=-1), 0.5)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_mixup_reads_nothing_back(dtype, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    inputs = torch.randn(16, 3, 12, 12).to(dtype).contiguous(memory_format=layout)
    targets = torch.full((16, NUM_CLASSES), 1 / NUM_CLASSES)
    params = sampling.draw_mixup(0, 0, 4, 6)
    with no_reads():
        functional.mixup(inputs, targets, params)
        functional.mixup(inputs, targets, params, out=torch.empty_like(inputs))


def test_interleaving_reads_nothing_back():
    with no_reads():
        functional.interleave(torch.randn(16, 3), 3)


def batch_like():
    params = MixUpParams(torch.ones(16), torch.arange(16))
    targets = torch.full((16, NUM_CLASSES), 1 / NUM_CLASSES)
    return MixMatchBatch(torch.randn(16, 3, 12, 12), targets, 4, torch.tensor(5), params)


@pytest.mark.parametrize("rampup_steps", [0, 10])
def test_loss_reads_nothing_back(rampup_steps):
    batch = batch_like()
    logits = torch.randn(16, NUM_CLASSES, requires_grad=True)
    with no_reads():
        MixMatchLoss(75.0, rampup_steps)(logits, batch).loss.backward()
        functional.mixmatch_loss(logits, batch.targets, 4, torch.tensor(3.0)).loss.backward()


@pytest.mark.parametrize("running_stats", ["first", "all"])
@pytest.mark.parametrize("swap", [True, False])
def test_interleaved_forward_reads_nothing_back(swap, running_stats):
    batch = batch_like()
    with no_reads():
        interleaved_forward(net(), batch, swap=swap, running_stats=running_stats).sum().backward()


# Copies from the host: on a GPU, one of pageable memory waits. "meta" stands for the device.


class HostCopies(TorchDispatchMode):
    """List the shapes of what is sent from the host to the device."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        if packet in (aten._to_copy, aten.copy_, aten.copy):
            target, source = (
                (args[0], args[1]) if packet is not aten._to_copy else (result, args[0])
            )
            if source.device.type == "cpu" and target.device.type != "cpu":
                self.sent.append(list(source.shape))
        return result


def on_device(params):
    return type(params)(*(tensor.to("meta") for tensor in params))


def device_operations():
    rows = torch.empty(16, 3, 12, 12, device="meta")
    targets = torch.empty(16, NUM_CLASSES, device="meta")
    params = on_device(sampling.draw_mixup(0, 0, 4, 6))
    calls = {
        "guess_labels": lambda: functional.guess_labels(targets.view(2, 8, NUM_CLASSES), 0.5),
        "mixup": lambda: functional.mixup(rows, targets, params),
        "interleave": lambda: functional.interleave(rows, 3),
        "mixmatch_loss": lambda: functional.mixmatch_loss(targets, targets, 4, 75.0),
        "batch_targets": lambda: functional.batch_targets(
            torch.empty(4, dtype=torch.int64, device="meta"),
            targets[:12].view(2, 6, NUM_CLASSES),
            0.5,
            label_smoothing=0.1,
        ),
    }
    for name, policy in POLICIES.items():
        engine = WeakAugment(**policy).to("meta")
        draws = on_device(engine.draw_batch(0, 0, 4, 6, 2))
        x, _, u = data("meta")
        calls[f"augment, {name}"] = lambda e=engine, d=draws, x=x, u=u: e.build(x, u, d, 2)
    return calls


@pytest.mark.parametrize("operation", device_operations())
def test_operation_sends_its_constants_once(operation, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # knows no "meta"
    call = device_operations()[operation]
    call()
    with HostCopies() as copies:
        call()
    assert copies.sent == []


# The whole step


@pytest.fixture
def unchecked_labels(monkeypatch):
    """Labels on a device are not checked: skip the checks that the CPU makes."""
    monkeypatch.setattr(_validation, "check_classes", lambda *_: None)
    monkeypatch.setattr(_validation, "check_distributions", lambda *_: None)


def train_step(builder, criterion, model, x, y, u, **ids):
    batch = builder(x, y, u, model, **ids)
    output = criterion(model(batch.inputs.float()), batch)
    output.loss.backward()
    return batch, output


@pytest.mark.parametrize("guess_forward", ["joint", "separate"])
@pytest.mark.parametrize("guess_bn", ["batch", "update", "eval"])
@pytest.mark.parametrize("reuse_buffers", [False, True])
@pytest.mark.usefixtures("unchecked_labels")
def test_step_reads_nothing_back_for_any_guess(reuse_buffers, guess_bn, guess_forward):
    builder = MixMatch(
        WeakAugment(padding=2),
        NUM_CLASSES,
        guess_bn=guess_bn,
        guess_forward=guess_forward,
        reuse_buffers=reuse_buffers,
    )
    with NoSync(builder.step) as mode:
        train_step(builder, MixMatchLoss(), net(), *data())
    assert mode.calls > 0


@pytest.mark.parametrize("mix", ["all", "separate", "labelled", "unlabelled", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.usefixtures("unchecked_labels")
def test_step_reads_nothing_back_for_any_labels_and_mix(soft, label_smoothing, mix):
    x, y, u = data()
    y = nn.functional.one_hot(y, NUM_CLASSES).float() if soft else y
    builder = MixMatch(WeakAugment(), NUM_CLASSES, mix=mix, label_smoothing=label_smoothing)
    with NoSync(builder.step):
        train_step(builder, MixMatchLoss(), net(), x, y, u)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.usefixtures("unchecked_labels")
def test_step_reads_nothing_back_for_any_policy(policy):
    builder = MixMatch(WeakAugment(**POLICIES[policy]), NUM_CLASSES)
    model = net()
    for guard in (contextlib.nullcontext(), NoSync(builder.step)):  # first the constants
        with guard:
            train_step(builder, MixMatchLoss(), lambda images: model(images.float()), *data())


@pytest.mark.parametrize("preset", [ICT.reference, ICT.fixmatch], ids=["reference", "fixmatch"])
@pytest.mark.usefixtures("unchecked_labels")
def test_step_of_ict_reads_nothing_back(preset):
    builder = preset(WeakAugment(), NUM_CLASSES, teacher=net())
    with NoSync(builder.step):
        train_step(builder, ConsistencyLoss(loss_u="mse"), net(), *data())


class PairNet(ConvNet):
    def forward(self, images):
        logits = super().forward(images)
        return logits, logits[:, :4]


@pytest.mark.usefixtures("unchecked_labels")
def test_step_of_remixmatch_reads_nothing_back():
    weak = WeakAugment()
    builder = ReMixMatch(weak, weak, NUM_CLASSES, num_strong=1, rotation=True)
    with NoSync(builder.step):
        train_step(builder, ReMixMatchLoss(lambda_rot=0.5), PairNet(NUM_CLASSES), *data())


@pytest.mark.usefixtures("unchecked_labels")
def test_from_views_reads_nothing_back():
    builder = MixMatch(WeakAugment(), NUM_CLASSES)
    x, y, u = data()
    with NoSync(builder.step):
        builder.from_views(x / 255, y, [u / 255, u / 255], net())


def test_check_is_where_the_device_is_read():
    with NoSync(), pytest.raises(AssertionError, match="waits for the device"):
        batch_like().check()


# On a GPU


@contextlib.contextmanager
def synchronising_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_step_does_not_synchronise_on_a_gpu(policy, soft):
    builder = MixMatch(WeakAugment(**POLICIES[policy]), NUM_CLASSES).to("cuda")
    criterion, model = MixMatchLoss(), net().to("cuda")
    x, y, u = data("cuda")
    y = nn.functional.one_hot(y, NUM_CLASSES).float() if soft else y

    def guesser(images):
        return model(images.float())

    # constants are made once: the first call may wait
    batch, _ = train_step(builder, criterion, guesser, x, y, u)
    interleaved_forward(model, batch._replace(inputs=batch.inputs.float()))
    with synchronising_is_an_error():
        batch, output = train_step(builder, criterion, guesser, x, y, u)
        interleaved_forward(model, batch._replace(inputs=batch.inputs.float())).sum().backward()
    assert output.loss.isfinite()
    batch.check()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batch_of_host_images_does_not_synchronise_on_a_gpu():
    builder, model = MixMatch(WeakAugment(), NUM_CLASSES).to("cuda"), net().to("cuda")
    x, y, u = (tensor.pin_memory() for tensor in data())
    builder(x, y, u, model)
    with synchronising_is_an_error():
        batch = builder(x, y, u, model)
    batch.check()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_label_out_of_range_on_a_gpu_raises_nothing_until_check():
    builder, model = MixMatch(WeakAugment(), NUM_CLASSES, mix="none").to("cuda"), net().to("cuda")
    x, y, u = data("cuda")
    y[1] = NUM_CLASSES
    builder(x, y, u, model)
    with synchronising_is_an_error():
        batch = builder(x, y, u, model)
    with pytest.raises(ValueError, match=r"got rows \[1\] with sums \[0\.0\]"):
        batch.check()
