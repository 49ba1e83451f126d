"""README's loop in plain PyTorch, alone and with what people add to it."""

import contextlib

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from gpu_mixmatch import MixMatch, MixMatchLoss, ResidentLoader, WeakAugment
from gpu_mixmatch.data.datasets import load_dataset
from gpu_mixmatch.recipes.models import build_model
from tests.factories import random_images, random_labels

NUM_CLASSES = 5


def new_model(num_classes=NUM_CLASSES, seed=0, channels=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model("cnn", num_classes, channels)


def data_loaders():
    """Two ordinary DataLoaders of uint8 images, the labelled one as long as the other."""
    images, labels = random_images(48, (1, 8, 8)), random_labels(48, NUM_CLASSES)
    return (
        DataLoader(TensorDataset(images, labels), batch_size=8),
        DataLoader(images.flip(0), batch_size=8),
    )


def train(
    model,
    *,
    guesser=None,
    teacher=None,
    context=contextlib.nullcontext,
    scaler=None,
    accumulate=1,
    after_step=lambda: None,
):
    """README's loop; returns the loss and the mixed batch of every step."""
    labelled, unlabelled = data_loaders()
    guesser = model if guesser is None else guesser
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    mixmatch = MixMatch(WeakAugment.digits(), num_classes=NUM_CLASSES, teacher=teacher, seed=0)
    criterion = MixMatchLoss(lambda_u=10.0, rampup_steps=4)
    steps = []
    for number, ((x, y), u) in enumerate(zip(labelled, unlabelled, strict=True)):
        with context():
            batch = mixmatch(x, y, u, guesser)
            loss = criterion(guesser(batch.inputs), batch).loss / accumulate
        (scaler.scale(loss) if scaler else loss).backward()
        if (number + 1) % accumulate == 0:
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            optimizer.zero_grad()
            after_step()
        steps.append((loss.detach(), batch))
    return steps


def weights_of(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def assert_near(model, other, *, share):
    """The two differ by less than ``share`` of the way that training went."""
    way = (weights_of(other) - weights_of(new_model())).norm()
    assert way > 0.05
    assert (weights_of(model) - weights_of(other)).norm() < share * way


def losses_of(steps):
    return torch.stack([loss for loss, _ in steps])


def test_the_loop_is_the_same_every_time():
    first, second = new_model(), new_model()
    losses, again = losses_of(train(first)), losses_of(train(second))
    assert torch.equal(losses, again)
    assert torch.equal(weights_of(first), weights_of(second))
    assert len(losses) == 6


# autocast


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


def test_autocast_trains_like_float32_to_the_precision_of_bfloat16():
    plain, mixed = new_model(), new_model()
    wanted, got = losses_of(train(plain)), losses_of(train(mixed, context=bfloat16))
    assert got.dtype == torch.float32
    assert not torch.equal(got, wanted)
    torch.testing.assert_close(got, wanted, rtol=0.02, atol=0)
    assert_near(mixed, plain, share=0.3)


def test_targets_are_float32_and_sum_to_one_under_autocast():
    for _, batch in train(new_model(), context=bfloat16):
        assert batch.targets.dtype == torch.float32
        torch.testing.assert_close(batch.targets.sum(dim=1), torch.ones(24), rtol=0, atol=1e-6)


def test_autocast_leaves_the_draws_and_the_images_as_they_are():
    plain, mixed = train(new_model()), train(new_model(), context=bfloat16)
    for (_, one), (_, other) in zip(plain, mixed, strict=True):
        assert torch.equal(one.params.lam, other.params.lam)
        assert torch.equal(one.params.index, other.params.index)
        assert torch.equal(one.inputs, other.inputs)


# GradScaler


def test_grad_scaler_changes_nothing_but_rounding():
    plain, scaled = new_model(), new_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    train(plain)
    train(scaled, scaler=scaler)
    assert scaler.get_scale() == 2.0**12  # two times three good steps
    torch.testing.assert_close(weights_of(scaled), weights_of(plain), rtol=0, atol=1e-6)


def test_grad_scaler_with_autocast_is_autocast_alone():
    plain, scaled = new_model(), new_model()
    train(plain, context=bfloat16)
    train(scaled, context=bfloat16, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    assert_near(scaled, plain, share=0.02)


def test_grad_scaler_skips_a_step_that_overflows_and_the_builder_goes_on():
    model = new_model()
    initial, scales, moved = weights_of(model).clone(), [], []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model.dense.bias.register_hook(lambda grad: grad / (0 if not scales else 1))  # once

    def note():
        scales.append(scaler.get_scale())
        moved.append(not torch.equal(weights_of(model), initial))

    steps = train(model, scaler=scaler, after_step=note)
    assert scales == [2.0**9] * 6
    assert not moved[0]
    assert moved[-1]
    assert [int(batch.step) for _, batch in steps] == [0, 1, 2, 3, 4, 5]


# torch.compile


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model_trains_as_the_model_itself(backend):
    torch._dynamo.reset()
    plain, inner = new_model(), new_model()
    compiled = torch.compile(inner, backend=backend)
    wanted = losses_of(train(plain))
    got = losses_of(train(inner, guesser=compiled))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(weights_of(inner), weights_of(plain), rtol=0, atol=1e-5)
    for (name, wanted), got in zip(
        plain.named_buffers(), [buffer for _, buffer in inner.named_buffers()], strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6, msg=name)
    torch._dynamo.reset()


# gradient accumulation


def test_accumulated_gradients_are_those_of_the_mean_loss():
    model, by_hand = new_model(), new_model()
    steps = train(model, accumulate=3)
    assert [int(batch.step) for _, batch in steps] == [0, 1, 2, 3, 4, 5]

    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05)
    mixmatch = MixMatch(WeakAugment.digits(), NUM_CLASSES, seed=0)
    criterion = MixMatchLoss(lambda_u=10.0, rampup_steps=4)
    pairs = list(zip(*data_loaders(), strict=True))
    for three in (pairs[:3], pairs[3:]):
        losses = []
        for (x, y), u in three:
            batch = mixmatch(x, y, u, by_hand)
            losses.append(criterion(by_hand(batch.inputs), batch).loss)
        torch.stack(losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(weights_of(model), weights_of(by_hand), rtol=0, atol=1e-6)
    assert not torch.equal(weights_of(model), weights_of(new_model()))


# channels_last


def test_channels_last_trains_as_the_contiguous_layout():
    generator = torch.Generator().manual_seed(3)
    colour = torch.randint(0, 256, (8, 8, 3, 8, 8), dtype=torch.uint8, generator=generator)
    y = torch.arange(8) % NUM_CLASSES

    def run(layout, channels_last):
        model = new_model(channels=3).to(memory_format=layout)
        mixmatch = MixMatch(WeakAugment(padding=1, channels_last=channels_last), NUM_CLASSES)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        criterion = MixMatchLoss(10.0, 0)
        for x, u in zip(colour[::2], colour[1::2], strict=True):
            batch = mixmatch(x, y, u, model)
            assert batch.inputs.is_contiguous(memory_format=layout)
            criterion(model(batch.inputs), batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, batch

    plain, wanted = run(torch.contiguous_format, False)
    last, got = run(torch.channels_last, True)
    torch.testing.assert_close(got.inputs, wanted.inputs, rtol=0, atol=0)
    torch.testing.assert_close(weights_of(last), weights_of(plain), rtol=0, atol=1e-4)
    assert last.conv2.weight.is_contiguous(memory_format=torch.channels_last)


# EMA


def ema_of(model, decay=0.5):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


def test_average_of_the_weights_is_the_teacher_where_it_is_asked_to_be():
    model = new_model()
    ema = ema_of(model)
    seen = []
    handle = ema.register_forward_hook(lambda module, *_: seen.append(torch.is_grad_enabled()))
    steps = train(model, teacher=ema, after_step=lambda: ema.update_parameters(model))
    handle.remove()
    assert seen == [False] * 6  # one guess a step, without gradients
    own = train(new_model())
    assert torch.equal(steps[0][1].targets, own[0][1].targets)  # the same weights to begin with
    assert not torch.equal(steps[-1][1].targets, own[-1][1].targets)


def test_guess_of_the_teacher_is_that_of_its_weights_at_that_step():
    model, by_hand = new_model(), new_model()
    ema, average = ema_of(model), ema_of(by_hand)
    train(model, teacher=ema, after_step=lambda: ema.update_parameters(model))

    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05)
    criterion = MixMatchLoss(lambda_u=10.0, rampup_steps=4)
    weights = weights_of(by_hand).clone()
    for step, ((x, y), u) in enumerate(zip(*data_loaders(), strict=True)):
        builder = MixMatch(WeakAugment.digits(), NUM_CLASSES, seed=0)
        builder.step += step
        batch = builder(x, y, u, average)  # as the model of the call
        criterion(by_hand(batch.inputs), batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(by_hand)
        weights = weights_of(by_hand) if step == 0 else (weights + weights_of(by_hand)) / 2
    assert torch.equal(weights_of(model), weights_of(by_hand))
    torch.testing.assert_close(weights_of(ema.module), weights, rtol=0, atol=1e-6)


# On digits


def error_on_digits(seed, *, supervised, steps=200):
    digits = load_dataset("digits")
    labelled, unlabelled = digits.split(40, seed)
    loader = ResidentLoader(
        *labelled.tensors,
        32,
        unlabelled=unlabelled.tensors[0],
        steps_per_epoch=steps,
        seed=seed,
    )
    augment = WeakAugment.digits()
    model = new_model(digits.num_classes, seed)
    ema = ema_of(model, 1 - 10 / steps)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    mixmatch = MixMatch(augment, digits.num_classes, seed=seed)
    criterion = MixMatchLoss(lambda_u=75.0, rampup_steps=steps // 2)
    for step, (x, y, u, _, _) in enumerate(loader):
        if supervised:
            loss = nn.functional.cross_entropy(model(augment(x, seed=seed, step=step)), y)
        else:
            batch = mixmatch(x, y, u, model)
            loss = criterion(model(batch.inputs), batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(model)
    ema.eval()
    with torch.no_grad():
        wrong = ema(augment.normalize(digits.test_images)).argmax(dim=1) != digits.test_labels
    return 100 * wrong.float().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_loop_learns_digits_with_half_the_error_of_supervised_only(seed):
    supervised = error_on_digits(seed, supervised=True)
    assert 4 < supervised < 15
    assert error_on_digits(seed, supervised=False) <= 0.5 * supervised


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_loop_with_autocast_and_grad_scaler_trains_on_a_gpu(dtype):
    model = new_model().to("cuda", memory_format=torch.channels_last)
    mixmatch = MixMatch(WeakAugment.digits(channels_last=True), NUM_CLASSES).to("cuda")
    criterion = MixMatchLoss(lambda_u=10.0, rampup_steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    before = weights_of(model).clone()
    for (x, y), u in zip(*data_loaders(), strict=True):
        with torch.autocast("cuda", dtype):
            batch = mixmatch(x, y, u, model)
            loss = criterion(model(batch.inputs), batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        batch.check()
    assert loss.isfinite()
    assert not torch.equal(weights_of(model), before)
