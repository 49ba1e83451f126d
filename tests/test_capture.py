"""capture: a CUDA graph that builds batches; what of it runs anywhere is tested here."""

from copy import deepcopy

import pytest
import torch

from gpu_mixmatch import ColorJitter, MixMatch, RandAugment, ResidentLoader, WeakAugment, capture
from gpu_mixmatch.capture import check_capturable, fits
from tests.batches import assert_same_mixed
from tests.factories import ConvNet, random_data

NUM_CLASSES = 5
INTERPRETED = "cuda" if torch.cuda.is_available() else "cpu"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def data(b=4, m=6, device="cpu", seed=0):
    return random_data(b, m, num_classes=NUM_CLASSES, device=device, seed=seed)


def net(device="cpu"):
    return ConvNet(NUM_CLASSES).to(device)


def builder(device="cpu", **switches):
    return MixMatch(
        WeakAugment(padding=2, impl="triton"),
        NUM_CLASSES,
        impl="triton",
        seed=2**61 + 7,
        **switches,
    ).to(device)


@pytest.mark.parametrize("with_ids", [False, True])
def test_a_key_on_the_device_builds_the_batch_of_its_step(with_ids):
    x, y, u = data(device=INTERPRETED)
    ids = {}
    if with_ids:
        ids = {"ids_x": torch.arange(4) + 2**40, "ids_u": torch.arange(6) * 3}
        ids = {name: value.to(INTERPRETED) for name, value in ids.items()}
    eager, keyed = builder(INTERPRETED), builder(INTERPRETED)
    eager.step, keyed.step = torch.tensor(11), torch.tensor(11)
    model = net(INTERPRETED)
    key = torch.tensor([eager.seed, 11], device=INTERPRETED)
    built = keyed(x, y, u, model, key=key, **ids)
    assert_same_mixed(built, eager(x, y, u, model, **ids))
    assert int(keyed.step) == 12
    other = torch.tensor([eager.seed, 12], device=INTERPRETED)
    again = keyed(x, y, u, model, key=other, **ids)
    assert not torch.equal(again.params.index, built.params.index)


def test_a_key_leaves_no_trace_after_a_failed_call():
    x, y, u = data(device=INTERPRETED)
    mixmatch = builder(INTERPRETED)
    key = torch.tensor([mixmatch.seed, 5], device=INTERPRETED)
    with pytest.raises(ValueError, match="model must return logits"):
        mixmatch(x, y, u, lambda images: images.flatten(1), key=key)
    batch = mixmatch(x, y, u, net(INTERPRETED))
    assert_same_mixed(batch, builder(INTERPRETED)(x, y, u, net(INTERPRETED)))


def test_capture_without_cuda_says_so():
    x, y, u = data()
    with pytest.raises(RuntimeError, match="capture needs CUDA, got a MixMatch on cpu"):
        capture(builder(), net(), x, y, u)


def test_capture_wants_kernels_and_draws_on_the_device(monkeypatch):
    cuda = property(lambda self: torch.device("cuda", 0))
    monkeypatch.setattr(MixMatch, "device", cuda)
    monkeypatch.setattr(MixMatch, "_prepare", lambda self: None)  # nothing is sent to that device
    with pytest.raises(RuntimeError, match="got impl='eager', which runs eager here"):
        check_capturable(MixMatch(WeakAugment(), NUM_CLASSES, impl="eager"))
    with pytest.raises(TypeError, match="such as WeakAugment, got CallableAugment"):
        check_capturable(MixMatch(lambda images: images, NUM_CLASSES, impl="triton"))
    check_capturable(builder())


def test_only_batches_of_the_captured_shape_and_dtype_fit():
    x, _, _ = data()
    assert fits(x, torch.empty_like(x))
    assert not fits(x[:3], x)
    assert not fits(x.float(), x)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize(
    "augment",
    [
        WeakAugment(padding=2),
        WeakAugment(padding=2, blur_sigma=(0.0, 1.0)),
        RandAugment.fixmatch(WeakAugment(padding=2), cutout=4),
        RandAugment.usb(WeakAugment.imagenet(8)),
        RandAugment.fixmatch(WeakAugment(padding=2, blur_sigma=(0.0, 1.0)), cutout=4),
        ColorJitter(gray=0.2),
        WeakAugment.imagenet(8),
    ],
    ids=["shift", "blur", "operations", "resized", "blurred operations", "jitter", "crop"],
)
@pytest.mark.parametrize("reuse_buffers", [False, True])
def test_every_replay_equals_the_eager_call_of_its_step(augment, reuse_buffers):
    def make():
        return MixMatch(deepcopy(augment), NUM_CLASSES, seed=3, reuse_buffers=reuse_buffers).to(
            "cuda"
        )

    model = net("cuda")
    eager, captured = make(), make()
    build = capture(captured, model, *data(device="cuda", seed=9))
    assert int(captured.step) == 0
    for step in range(4):
        x, y, u = data(device="cuda" if step % 2 else "cpu", seed=step)
        ids = {"ids_x": torch.arange(4) * 7} if step == 2 else {}
        torch.testing.assert_close(
            build(x, y, u, **ids).inputs, eager(x, y, u, model, **ids).inputs
        )
        assert int(captured.step) == step + 1
    x, y, u = data(b=3, m=5)  # a last, smaller batch
    torch.testing.assert_close(build(x, y, u).targets, eager(x, y, u, model).targets)
    captured.load_state_dict({"seed": torch.tensor(8), "step": torch.tensor(1)})
    eager.load_state_dict({"seed": torch.tensor(8), "step": torch.tensor(1)})
    x, y, u = data()
    assert torch.equal(build(x, y, u).params.index, eager(x, y, u, model).params.index)


@pytest.mark.gpu
@needs_cuda
def test_batches_that_a_loader_gathers_into_the_inputs_equal_the_eager_calls():
    x, y, _ = data(b=32)
    options = {"batch_size": 4, "ratio": 2, "device": "cuda"}
    loader, twin_loader = (ResidentLoader(x, y, **options) for _ in range(2))
    mixmatch, twin = (
        MixMatch(WeakAugment(padding=2), NUM_CLASSES, seed=3).to("cuda") for _ in range(2)
    )
    model, build = net("cuda"), None
    for mine, theirs in zip(loader, twin_loader, strict=True):
        if build is None:
            build = capture(mixmatch, model, *mine[:3])
            loader.gather_into(build.inputs)
        batch = build(*mine[:3], ids_u=mine.ids_u)
        expected = twin(*theirs[:3], model, ids_u=theirs.ids_u)
        torch.testing.assert_close(batch.inputs, expected.inputs)
        assert torch.equal(batch.params.index, expected.params.index)
    assert mine.x is build.inputs.x


@pytest.mark.gpu
@needs_cuda
def test_a_capture_leaves_the_model_and_the_step_alone():
    model = net("cuda")
    before = [buffer.clone() for buffer in model.buffers()]
    mixmatch = MixMatch(WeakAugment(padding=2), NUM_CLASSES, guess_bn="update").to("cuda")
    build = capture(mixmatch, model, *data(device="cuda"))
    assert int(mixmatch.step) == 0
    assert all(torch.equal(*pair) for pair in zip(before, model.buffers(), strict=True))
    build(*data(device="cuda"))
    assert not torch.equal(before[0], next(iter(model.buffers())))


@pytest.mark.gpu
@needs_cuda
def test_replays_follow_the_weights():
    model = net("cuda")
    mixmatch = MixMatch(WeakAugment(padding=2), NUM_CLASSES).to("cuda")
    twin = MixMatch(WeakAugment(padding=2), NUM_CLASSES).to("cuda")
    build = capture(mixmatch, model, *data(device="cuda"))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(-2.0)
    x, y, u = data(device="cuda", seed=4)
    torch.testing.assert_close(build(x, y, u).targets, twin(x, y, u, model).targets)
