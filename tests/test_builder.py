"""MixMatch: the whole builder against the oracle, its randomness, its state and its manners."""

import contextlib
import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm, one_hot

import gpu_mixmatch
from gpu_mixmatch import MixMatch, MixMatchBatch, WeakAugment, functional, sampling
from gpu_mixmatch.impl import implementation
from tests import oracle
from tests.batches import assert_same_mixed
from tests.factories import random_images, random_labels
from tests.params import oracle_draws, oracle_policy

pytestmark = pytest.mark.usefixtures("each_cpu_impl")

CHANNELS, HEIGHT, WIDTH = 3, 8, 7
NUM_CLASSES = 5
SEED = 11
# Largest absolute error against float64. Logits are sums of 168 pixels, and sharpening divides
# their error by T.
IMAGE_ERROR = 2e-5
TARGET_ERROR = 2e-5

PACKAGE = Path(gpu_mixmatch.__file__).parent
ROOT = PACKAGE.parent


class LinearModel(nn.Module):
    """A fixed linear map in float64; `in_numpy` is the same one for the oracle."""

    def __init__(self, channels=CHANNELS, height=HEIGHT, width=WIDTH, num_classes=NUM_CLASSES):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        size = channels * height * width
        weight = torch.randn(size, num_classes, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(weight * 3 / size**0.5)

    def forward(self, images):
        return images.double().flatten(1) @ self.weight

    def in_numpy(self, images):
        return images.reshape(len(images), -1) @ self.weight.detach().numpy()


class NormModel(nn.Module):
    """Linear, BatchNorm, dropout, linear: what a guess must not disturb."""

    def __init__(self, norm=nn.BatchNorm1d, momentum=0.1):
        super().__init__()
        generator = torch.Generator().manual_seed(6)
        size = CHANNELS * HEIGHT * WIDTH
        self.inner = nn.Linear(size, 6)
        self.norm = norm(6, momentum=momentum)
        self.drop = nn.Dropout(0.0)
        self.outer = nn.Linear(6, NUM_CLASSES)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
            self.norm.running_mean.copy_(torch.randn(6, generator=generator))
            self.norm.running_var.copy_(torch.rand(6, generator=generator) + 0.5)

    def forward(self, images):
        return self.outer(self.drop(self.norm(self.inner(images.flatten(1)))))

    def with_batch_statistics(self, images):
        """The same without the module's own BatchNorm."""
        rows = self.inner(images.flatten(1))
        rows = batch_norm(
            rows, None, None, self.norm.weight, self.norm.bias, training=True, eps=self.norm.eps
        )
        return self.outer(rows)


class RaisingModel(NormModel):
    def forward(self, images):
        self.norm(self.inner(images.flatten(1)))
        raise RuntimeError("out of memory")


def images_of(count, seed, *, nhwc=False, channels=CHANNELS):
    return random_images(count, (channels, HEIGHT, WIDTH), nhwc=nhwc, seed=seed)


def data_of(num_labelled=3, num_unlabelled=5, **layout):
    y = random_labels(num_labelled, NUM_CLASSES, seed=2)
    return images_of(num_labelled, 1, **layout), y, images_of(num_unlabelled, 3, **layout)


def engine_of(**fields):
    return WeakAugment(
        **{
            "padding": 2,
            "zoom_px": (0, 2),
            "blur_sigma": (0.0, 1.0),
            "mean": (0.4, 0.5, 0.6),
            "std": (0.2, 0.25, 0.3),
            **fields,
        }
    )


def builder_of(engine=None, **switches):
    return MixMatch(engine or engine_of(), NUM_CLASSES, **{"seed": SEED, **switches})


def oracle_batch(builder, x, targets_x, u, model, step=0):
    """`oracle.mixmatch` fed with the draws that the builder is to make."""
    engine, num_views = builder.augment, builder.num_augmentations
    draws = engine.draw_batch(builder.seed, step, len(x), len(u), num_views)
    rows = oracle_draws(draws)
    unlabelled = rows[len(x) :]
    mixup = sampling.draw_mixup(
        builder.seed,
        step,
        len(x),
        len(u),
        num_augmentations=num_views,
        alpha=builder.alpha,
        lam=builder.lam,
        mix=builder.mix,
    )
    return oracle.mixmatch(
        x.numpy(),
        targets_x,
        u.numpy(),
        model.in_numpy,
        rows[: len(x)],
        [unlabelled[view * len(u) : (view + 1) * len(u)] for view in range(num_views)],
        mixup.lam.double().numpy(),
        mixup.index.numpy(),
        builder.temperature,
        oracle_policy(engine, x.shape[1]),
        builder.mix,
    )


def assert_batch_equals(batch, expected, temperature=0.5):
    inputs, targets = map(torch.from_numpy, expected)
    torch.testing.assert_close(batch.inputs.double(), inputs, rtol=0, atol=IMAGE_ERROR)
    torch.testing.assert_close(
        batch.targets.double(), targets, rtol=0, atol=TARGET_ERROR / temperature
    )


def one_hot_of(y):
    return one_hot(y, NUM_CLASSES).double().numpy()


# Algorithm 1


@pytest.mark.parametrize("mix", ["all", "separate", "labelled", "unlabelled", "none"])
@pytest.mark.parametrize(("num_labelled", "num_unlabelled"), [(3, 5), (4, 2), (1, 1)])
@pytest.mark.parametrize("num_augmentations", [1, 2, 3, 4])
def test_batch_equals_the_oracle(num_augmentations, num_labelled, num_unlabelled, mix):
    x, y, u = data_of(num_labelled, num_unlabelled)
    builder = builder_of(num_augmentations=num_augmentations, mix=mix)
    model = LinearModel()
    for step in range(2):
        batch = builder(x, y, u, model)
        assert len(batch.inputs) == num_labelled + num_augmentations * num_unlabelled
        assert batch.num_labelled == num_labelled
        assert batch.step == step
        assert_batch_equals(batch, oracle_batch(builder, x, one_hot_of(y), u, model, step))


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("lam", ["sample", "batch"])
@pytest.mark.parametrize("alpha", [0.25, 0.75, 16.0])
def test_batch_equals_the_oracle_for_any_temperature_and_alpha(alpha, lam, temperature):
    x, y, u = data_of()
    builder = builder_of(temperature=temperature, alpha=alpha, lam=lam)
    model = LinearModel()
    batch = builder(x, y, u, model)
    assert_batch_equals(batch, oracle_batch(builder, x, one_hot_of(y), u, model), temperature)


@pytest.mark.parametrize("padding_mode", ["reflect", "zeros", "edge"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("nhwc", [False, True])
def test_batch_equals_the_oracle_for_both_layouts(nhwc, channels_last, padding_mode):
    x, y, u = data_of(nhwc=nhwc)
    layout = "NHWC" if nhwc else None
    engine = engine_of(padding_mode=padding_mode, channels_last=channels_last, layout=layout)
    builder = builder_of(engine)
    model = LinearModel()
    batch = builder(x, y, u, model)
    assert batch.inputs.shape == (13, CHANNELS, HEIGHT, WIDTH)
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    assert batch.inputs.is_contiguous(memory_format=wanted)
    planes = [t.permute(0, 3, 1, 2) if nhwc else t for t in (x, u)]
    assert_batch_equals(batch, oracle_batch(builder, planes[0], one_hot_of(y), planes[1], model))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("soft", [False, True])
def test_batch_equals_the_oracle_for_soft_and_smoothed_labels(soft, label_smoothing):
    x, y, u = data_of()
    targets = one_hot_of(y)
    if soft:
        y = torch.randn(3, NUM_CLASSES, generator=torch.Generator().manual_seed(4)).softmax(dim=1)
        targets = y.double().numpy()
    builder = builder_of(label_smoothing=label_smoothing)
    model = LinearModel()
    batch = builder(x, y, u, model)
    targets = oracle.smooth(targets, label_smoothing)
    assert_batch_equals(batch, oracle_batch(builder, x, targets, u, model))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_integer_labels_of_any_dtype_give_the_same_batch(dtype):
    x, y, u = data_of()
    batch = builder_of()(x, y.to(dtype), u, LinearModel())
    assert_same_mixed(batch, builder_of()(x, y, u, LinearModel()))


def test_float_images_in_zero_to_one_give_the_batch_of_their_bytes():
    x, y, u = data_of()
    batch = builder_of()(x / 255, y, u / 255, LinearModel())
    reference = builder_of()(x, y, u, LinearModel())
    torch.testing.assert_close(batch.inputs, reference.inputs, rtol=0, atol=IMAGE_ERROR)
    torch.testing.assert_close(batch.targets, reference.targets, rtol=0, atol=2 * TARGET_ERROR)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_views_give_float32_targets_near_the_oracle(dtype):
    x, y, u = data_of()
    builder = builder_of(engine_of(dtype=dtype))
    model = LinearModel()
    batch = builder(x, y, u, model)
    assert batch.inputs.dtype == dtype
    assert batch.targets.dtype == torch.float32
    inputs, targets = oracle_batch(builder, x, one_hot_of(y), u, model)
    # views of magnitude 4 are rounded once when made and once when mixed
    error = 4 * 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(batch.inputs.double(), torch.from_numpy(inputs), rtol=0, atol=error)
    torch.testing.assert_close(
        batch.targets.double(), torch.from_numpy(targets), rtol=0, atol=5 * error
    )


def test_rows_are_view_major():
    x, y, u = data_of()
    builder = builder_of(num_augmentations=3, mix="none")
    batch = builder(x, y, u, LinearModel())
    engine = builder.augment
    expected = [engine.apply(x, engine.draw(SEED, 0, 3, 0))]
    expected += [engine.apply(u, engine.draw(SEED, 0, 5, view)) for view in (1, 2, 3)]
    assert torch.equal(batch.inputs, torch.cat(expected))
    assert torch.equal(batch.targets_x, one_hot(y, NUM_CLASSES).float())
    first, second, third = batch.targets_u.split(5)
    assert torch.equal(first, second)
    assert torch.equal(first, third)


def test_views_of_one_image_differ():
    x, y, _ = data_of()
    batch = builder_of(mix="none")(x, y, x, LinearModel())
    labelled, first, second = batch.inputs.split(3)
    assert not torch.equal(labelled, first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("soft", [False, True])
def test_from_views_equals_forward_given_its_views(soft):
    x, y, u = data_of()
    if soft:
        y = one_hot(y, NUM_CLASSES).float()
    builder, other = builder_of(num_augmentations=3), builder_of(num_augmentations=3)
    model = NormModel()
    for step in range(3):
        draws = builder.augment.draw_batch(SEED, step, 3, 5, 3)
        views = builder.augment.build(x, u, draws, 3)
        given = views[3:].view(3, 5, CHANNELS, HEIGHT, WIDTH)
        stacked = step % 2 == 0
        batch = other.from_views(views[:3], y, given if stacked else list(given), model)
        assert_same_mixed(batch, builder(x, y, u, model))


def test_from_views_takes_ids_for_lambda():
    x, y, u = data_of()
    ids_x, ids_u = torch.tensor([7, 3, 9]), torch.tensor([40, 2, 2**40, 5, 0])
    batch = builder_of(num_augmentations=1).from_views(
        x / 255, y, [u / 255], LinearModel(), ids_x=ids_x, ids_u=ids_u
    )
    lam = sampling.draw_mixup(SEED, 0, ids_x, ids_u, num_augmentations=1).lam
    assert torch.equal(batch.params.lam, lam)


# The batch


def test_parts_of_a_batch_are_views_of_it():
    x, y, u = data_of()
    batch = builder_of()(x, y, u, LinearModel())
    for whole, first, second in (
        (batch.inputs, batch.inputs_x, batch.inputs_u),
        (batch.targets, batch.targets_x, batch.targets_u),
    ):
        assert (len(first), len(second)) == (3, 10)
        assert torch.equal(torch.cat([first, second]), whole)
        for part in (first, second):
            assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        assert first.data_ptr() == whole.data_ptr()
        assert second.data_ptr() == whole[3:].data_ptr()


@pytest.mark.parametrize("num_classes", [2, 5, 1000])
def test_check_passes_a_good_batch(num_classes):
    x, _, u = data_of()
    builder = MixMatch(engine_of(), num_classes, seed=SEED)
    model = LinearModel(num_classes=num_classes)
    builder(x, torch.zeros(3, dtype=torch.int64), u, model).check()


def test_check_names_the_rows_of_a_bad_batch():
    x, y, u = data_of()
    batch = builder_of(mix="none")(x, y, u, LinearModel())
    batch.targets[4] = torch.nan
    batch.targets[7, 0] += 0.5
    with pytest.raises(ValueError, match=r"got rows \[4, 7\] with sums \[nan, 1\.5\]"):
        batch.check()


def test_check_names_the_row_in_which_it_began():
    x, y, u = data_of()
    batch = builder_of()(x, y, u, LinearModel())
    targets = torch.full((13, NUM_CLASSES), 1 / NUM_CLASSES)
    targets[6] = torch.nan
    mixed = functional.mixup(batch.inputs, targets, batch.params)[1]
    with pytest.raises(ValueError, match=r"Bad before mixing: rows \[6\] "):
        batch._replace(targets=mixed).check()


@pytest.mark.parametrize("lam", [0.5, 0.9, 0.995, 1.0])
def test_check_names_the_row_of_zeros_in_which_it_began_whatever_lambda(lam):
    # a label out of range on a GPU is a row of zeros; its partner's sum is λ', which may be near 1
    x, y, u = data_of()
    batch = builder_of()(x, y, u, LinearModel())
    targets = torch.full((13, NUM_CLASSES), 1 / NUM_CLASSES)
    targets[1] = 0
    params = batch.params._replace(lam=torch.full((13,), lam))
    mixed = functional.mixup(batch.inputs, targets, params)[1]
    with pytest.raises(ValueError, match=r"Bad before mixing: rows \[1\] "):
        batch._replace(targets=mixed, params=params).check()


def test_check_names_every_row_in_which_it_began():
    # rows of zeros, and λ' that is often near 1: α = 0.1
    inputs, generator = torch.zeros(40, 1), torch.Generator().manual_seed(0)
    for step in range(200):
        params = sampling.draw_mixup(SEED, step, 10, 15, num_augmentations=2, alpha=0.1)
        origins = torch.randperm(40, generator=generator)[:4]
        targets = torch.full((40, NUM_CLASSES), 1 / NUM_CLASSES)
        targets[origins] = 0
        mixed = functional.mixup(inputs, targets, params)[1]
        batch = MixMatchBatch(inputs, mixed, 10, torch.tensor(step), params)
        with pytest.raises(ValueError, match="Bad before mixing: rows") as caught:
            batch.check()
        named = re.search(r"Bad before mixing: rows \[([\d, ]*)", str(caught.value)).group(1)
        named = set(map(int, filter(None, named.split(", "))))
        assert set(origins.tolist()) <= named or len(named) == 8  # no more than 8 are shown


# The model is left as it came


@contextlib.contextmanager
def left_as_it_came(model):
    """Fail if a mode, a flag or a hook of the model differs afterwards; statistics may move."""

    def shown():
        return [
            (name, module.training, getattr(module, "track_running_stats", None))
            for name, module in model.named_modules()
        ]

    before, gradients = shown(), [parameter.requires_grad for parameter in model.parameters()]
    yield
    assert shown() == before
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients


def norm_state(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "norm." in name}


def assert_same_state(state, other):
    assert state.keys() == other.keys()
    for name, value in state.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("guess_bn", ["batch", "update", "eval"])
@pytest.mark.parametrize("guess_forward", ["joint", "separate"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm])
@pytest.mark.parametrize("kind", [NormModel, RaisingModel])
def test_model_is_left_as_it_came(kind, norm, training, guess_forward, guess_bn):
    x, y, u = data_of()
    model = kind(norm).train(training)
    builder = builder_of(guess_bn=guess_bn, guess_forward=guess_forward)
    raises = (
        pytest.raises(RuntimeError, match="out of memory")
        if kind is RaisingModel
        else contextlib.nullcontext()
    )
    with left_as_it_came(model), raises:
        builder(x, y, u, model)


@pytest.mark.parametrize("guess_bn", ["batch", "update", "eval"])
def test_model_with_mixed_modes_is_left_as_it_came(guess_bn):
    x, y, u = data_of()
    model = NormModel().train()
    model.norm.eval()
    model.drop.eval()
    with left_as_it_came(model):
        builder_of(guess_bn=guess_bn)(x, y, u, model)
    model = NormModel().eval()
    model.norm.track_running_stats = False
    with left_as_it_came(model):
        builder_of(guess_bn=guess_bn)(x, y, u, model)


@pytest.mark.parametrize("guess_bn", ["batch", "update", "eval"])
def test_layers_other_than_batch_norm_keep_their_mode_during_the_guess(guess_bn):
    x, y, u = data_of()
    model = NormModel().train()
    model.drop.eval()
    seen = []
    model.register_forward_hook(lambda top, *_: seen.append((top.training, top.drop.training)))
    builder_of(guess_bn=guess_bn)(x, y, u, model)
    assert seen == [(True, False)]


# What the guess reads, and what it moves


def guess_of(builder, model, x, y, u):
    """Views [K, M, ...] and their guess, from a batch that is not mixed."""
    assert builder.mix == "none"
    batch = builder(x, y, u, model)
    views = batch.inputs_u.unflatten(0, (builder.num_augmentations, len(u)))
    return views, batch.targets_u[: len(u)]


def assert_guess(guess, logits):
    expected = torch.from_numpy(oracle.guess_labels(logits.detach().double().numpy(), 0.5))
    torch.testing.assert_close(guess.double(), expected, rtol=0, atol=TARGET_ERROR)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.SyncBatchNorm])
@pytest.mark.parametrize("guess_forward", ["joint", "separate"])
def test_guess_bn_batch_reads_batch_statistics_and_moves_nothing(guess_forward, norm, training):
    model = NormModel(norm).train(training)
    before = norm_state(model)
    builder = builder_of(mix="none", guess_bn="batch", guess_forward=guess_forward)
    views, guess = guess_of(builder, model, *data_of())
    assert_same_state(norm_state(model), before)
    if guess_forward == "joint":
        logits = model.with_batch_statistics(views.flatten(0, 1)).view(2, 5, NUM_CLASSES)
    else:
        logits = torch.stack([model.with_batch_statistics(view) for view in views])
    assert_guess(guess, logits)


@pytest.mark.parametrize("momentum", [0.1, 0.001, None])
@pytest.mark.parametrize("guess_forward", ["joint", "separate"])
def test_guess_bn_update_reads_batch_statistics_and_moves_the_running_ones(guess_forward, momentum):
    model = NormModel(momentum=momentum).train()
    mean, count = model.norm.running_mean.clone(), model.norm.num_batches_tracked.clone()
    builder = builder_of(mix="none", guess_bn="update", guess_forward=guess_forward)
    views, guess = guess_of(builder, model, *data_of())
    passes = [views.flatten(0, 1)] if guess_forward == "joint" else list(views)
    for number, part in enumerate(passes, 1):
        share = 1 / number if momentum is None else momentum
        mean = (1 - share) * mean + share * model.inner(part.flatten(1)).mean(dim=0)
    torch.testing.assert_close(model.norm.running_mean, mean, rtol=1e-4, atol=1e-5)
    assert model.norm.num_batches_tracked == count + len(passes)
    logits = torch.cat([model.with_batch_statistics(part) for part in passes])
    assert_guess(guess, logits.view(2, 5, NUM_CLASSES))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("guess_forward", ["joint", "separate"])
def test_guess_bn_eval_reads_running_statistics_and_moves_nothing(guess_forward, training):
    model = NormModel().train(training)
    before = norm_state(model)
    builder = builder_of(mix="none", guess_bn="eval", guess_forward=guess_forward)
    views, guess = guess_of(builder, model, *data_of())
    assert_same_state(norm_state(model), before)
    with torch.no_grad():
        logits = model.eval()(views.flatten(0, 1)).view(2, 5, NUM_CLASSES)
    assert_guess(guess, logits)


def test_guess_passes_see_all_views_together_or_one_at_a_time():
    x, y, u = data_of()
    for guess_forward, sizes in (("joint", [15]), ("separate", [5, 5, 5])):
        model = NormModel()
        seen = []
        model.register_forward_hook(lambda _, args, __, seen=seen: seen.append(len(args[0])))
        builder_of(guess_forward=guess_forward, num_augmentations=3)(x, y, u, model)
        assert seen == sizes


def test_joint_and_separate_guesses_agree_without_batch_norm_and_differ_with_it():
    x, y, u = data_of()

    def guesses(model):
        return [
            guess_of(builder_of(mix="none", guess_forward=forward), model, x, y, u)[1]
            for forward in ("joint", "separate")
        ]

    joint, separate = guesses(LinearModel())
    torch.testing.assert_close(joint, separate, rtol=0, atol=1e-6)
    joint, separate = guesses(NormModel())
    assert (joint - separate).abs().max() > 1e-3


# Who guesses


def test_teacher_guesses_instead_of_the_model():
    x, y, u = data_of()
    teacher = LinearModel()
    with torch.no_grad():
        teacher.weight.neg_()
    batch = builder_of(teacher=teacher)(x, y, u, RaisingModel())
    assert_same_mixed(batch, builder_of()(x, y, u, teacher))
    assert not torch.allclose(batch.targets, builder_of()(x, y, u, LinearModel()).targets)


def test_teacher_guesses_whatever_its_truth_value():
    class EmptyTeacher(LinearModel):
        def __len__(self):
            return 0

    x, y, u = data_of()
    batch = builder_of(teacher=EmptyTeacher())(x, y, u, RaisingModel())
    assert_same_mixed(batch, builder_of()(x, y, u, LinearModel()))


@pytest.mark.parametrize("guess_bn", ["batch", "update", "eval"])
def test_teacher_is_left_as_it_came_and_the_model_is_not_touched(guess_bn):
    x, y, u = data_of()
    teacher, model = NormModel().eval(), NormModel().train()
    before = norm_state(model)
    with left_as_it_came(teacher), left_as_it_came(model):
        builder_of(teacher=teacher, guess_bn=guess_bn)(x, y, u, model)
    assert_same_state(norm_state(model), before)


def test_teacher_is_not_registered():
    teacher = NormModel()
    builder = builder_of(teacher=teacher)
    assert builder.teacher is teacher
    assert list(builder.parameters()) == []
    assert not any(isinstance(module, NormModel) for module in builder.modules())
    assert list(builder.state_dict()) == ["seed", "step"]
    builder.eval()
    builder.to(torch.float64)
    assert teacher.training
    assert teacher.inner.weight.dtype == torch.float32


def test_logits_getter_takes_logits_out_of_what_the_model_returns():
    class DictModel(LinearModel):
        def forward(self, images):
            return {"loss": None, "logits": super().forward(images)}

    x, y, u = data_of()
    for guess_forward in ("joint", "separate"):
        batch = builder_of(
            logits_getter=lambda output: output["logits"], guess_forward=guess_forward
        )(x, y, u, DictModel())
        expected = builder_of(guess_forward=guess_forward)(x, y, u, LinearModel())
        assert_same_mixed(batch, expected)


@pytest.mark.parametrize("guess_bn", ["batch", "update", "eval"])
def test_model_may_be_a_plain_function(guess_bn):
    x, y, u = data_of()
    model = LinearModel()
    batch = builder_of(guess_bn=guess_bn)(x, y, u, lambda images: model(images))
    assert_same_mixed(batch, builder_of()(x, y, u, model))


def test_no_gradient_reaches_the_model_from_the_guess():
    x, y, u = data_of()
    model = NormModel()
    batch = builder_of()(x, y, u, model)
    assert not batch.targets.requires_grad
    assert not batch.inputs.requires_grad
    assert torch.is_grad_enabled()
    # a loss whose gradient to the logits is known: any other path to the weights would add to it
    logits = model(batch.inputs)
    (batch.targets * logits).sum().backward()
    through_batch = model.outer.bias.grad.clone()
    torch.testing.assert_close(through_batch, batch.targets.sum(dim=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guess_forward", ["joint", "separate"])
def test_guess_records_no_graph(guess_forward):
    x, y, u = data_of()
    model = NormModel()
    seen = []
    model.register_forward_hook(lambda *args: seen.append(args[2].requires_grad))
    builder_of(guess_forward=guess_forward)(x, y, u, model)
    assert not any(seen)
    assert seen


def test_images_that_require_gradients_give_a_batch_that_does_not():
    x, y, u = (t / 255 if t.dim() == 4 else t for t in data_of())
    batch = builder_of().from_views(x.requires_grad_(), y, [u, u.requires_grad_()], LinearModel())
    assert not batch.inputs.requires_grad


def test_builder_works_under_no_grad_and_inference_mode():
    x, y, u = data_of()
    expected = builder_of()(x, y, u, LinearModel())
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert_same_mixed(builder_of()(x, y, u, LinearModel()), expected)


PLAIN = {"zoom_px": (0, 0), "blur_sigma": None}


@pytest.mark.parametrize("policy", [PLAIN, {"blur_sigma": None}, {"zoom_px": (0, 0)}, {}], ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("enabled", [True, False])
def test_targets_are_float32_and_sum_to_one_whatever_autocast(enabled, label_smoothing, policy):
    x, y, u = data_of()
    builder = builder_of(engine_of(**policy), label_smoothing=label_smoothing)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        batch = builder(x, y, u, NormModel())
        assert torch.is_autocast_enabled("cpu") == enabled
    assert batch.inputs.dtype == torch.float32
    assert batch.targets.dtype == torch.float32
    torch.testing.assert_close(batch.targets.sum(dim=1), torch.ones(13), rtol=0, atol=1e-5)
    batch.check()


def test_model_guesses_under_the_autocast_of_the_caller():
    # only sharpening and targets must be float32: the model's forward passes are most of the work
    x, y, u = data_of()
    model = NormModel()
    seen = []
    model.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        builder_of(engine_of(**PLAIN))(x, y, u, model)
    assert seen == [torch.bfloat16]


def test_half_precision_views_meet_a_float32_model_under_autocast():
    x, y, u = data_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        engine = engine_of(dtype=torch.bfloat16, **PLAIN)
        batch = builder_of(engine)(x, y, u, NormModel())
    batch.check()


# One integer of state


def test_state_is_exactly_seed_and_step():
    x, y, u = data_of()
    builder = builder_of(teacher=NormModel(), reuse_buffers=True)
    for _ in range(3):
        builder(x, y, u, LinearModel())
    state = builder.state_dict()
    assert {name: (value.dtype, int(value)) for name, value in state.items()} == {
        "seed": (torch.int64, SEED),
        "step": (torch.int64, 3),
    }
    builder(x, y, u, LinearModel())
    assert int(state["step"]) == 3  # a copy, not a view of a counter that moves on


def test_builder_restored_at_a_step_makes_the_same_batches():
    x, y, u = data_of()
    model = LinearModel()
    builder = builder_of()
    batches = [builder(x, y, u, model) for _ in range(3)]
    state = copy.deepcopy(builder.state_dict())
    batches += [builder(x, y, u, model) for _ in range(2)]

    restored = builder_of(seed=999)
    assert restored.load_state_dict(state) == ([], [])
    assert (restored.seed, int(restored.step)) == (SEED, 3)
    for step in (3, 4):
        assert_same_mixed(restored(x, y, u, model), batches[step])
        assert batches[step].step == step


def test_state_survives_a_file(tmp_path):
    builder = builder_of(seed=2**63 - 1)
    builder.step += 2**31
    torch.save(builder.state_dict(), tmp_path / "state.pt")
    restored = builder_of()
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (restored.seed, int(restored.step)) == (2**63 - 1, 2**31)


class Trainer(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.model = NormModel()
        self.mixmatch = builder_of(seed=seed)


def test_state_loads_inside_a_parent_module():
    trainer = Trainer(SEED)
    x, y, u = data_of()
    trainer.mixmatch(x, y, u, trainer.model)
    state = trainer.state_dict()
    assert [name for name in state if "mixmatch" in name] == ["mixmatch.seed", "mixmatch.step"]
    restored = Trainer(0)
    assert restored.load_state_dict(state) == ([], [])
    assert (restored.mixmatch.seed, int(restored.mixmatch.step)) == (SEED, 1)


@pytest.mark.parametrize("key", ["seed", "step"])
def test_missing_state_is_reported(key):
    state = builder_of().state_dict()
    del state[key]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
        builder_of().load_state_dict(state)
    assert builder_of().load_state_dict(state, strict=False).missing_keys == [key]
    state = Trainer(SEED).state_dict()
    del state[f"mixmatch.{key}"]
    with pytest.raises(RuntimeError, match=f'Missing key.*"mixmatch.{key}"'):
        Trainer(0).load_state_dict(state)


def test_unexpected_state_is_reported():
    state = builder_of().state_dict()
    state["epoch"] = torch.tensor(1)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"epoch"'):
        builder_of().load_state_dict(state)
    restored = builder_of(seed=0)
    assert restored.load_state_dict(state, strict=False).unexpected_keys == ["epoch"]
    assert restored.seed == SEED
    state = Trainer(SEED).state_dict()
    state["mixmatch.epoch"] = torch.tensor(1)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"mixmatch\.epoch"'):
        Trainer(0).load_state_dict(state)


def test_state_of_an_engine_with_buffers_loads_again():
    class Engine(WeakAugment):
        def __init__(self):
            super().__init__(padding=1)
            self.register_buffer("gain", torch.ones(1))

    builder, restored = builder_of(Engine()), builder_of(Engine(), seed=0)
    assert restored.load_state_dict(builder.state_dict()) == ([], [])
    assert restored.seed == SEED


def test_batches_depend_on_the_seed_and_not_on_the_global_generators():
    x, y, u = data_of()
    model = LinearModel()
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.get_rng_state()
    batch = builder_of()(x, y, u, model)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert_same_mixed(builder_of()(x, y, u, model), batch)
    other = builder_of(seed=SEED + 1)(x, y, u, model)
    assert not torch.equal(other.inputs, batch.inputs)
    assert not torch.equal(other.params.lam, batch.params.lam)


def test_a_callable_that_draws_from_the_global_generator_is_keyed_by_the_seed():
    def augment(images):
        return images + torch.rand(len(images), 1, 1, 1)

    x, y, u = data_of()
    before = torch.get_rng_state()
    batches = [builder_of(augment, mix="none")(x, y, u, LinearModel()) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_mixed(*batches)
    builder = builder_of(augment, mix="none")
    first, second = (builder(x, y, u, LinearModel()) for _ in range(2))
    assert_same_mixed(first, batches[0])
    assert not torch.equal(first.inputs, second.inputs)
    assert not torch.equal(first.inputs[3:8], first.inputs[8:])  # two views of u


def test_every_step_draws_anew():
    x, y, u = data_of()
    builder = builder_of()
    first, second = builder(x, y, u, LinearModel()), builder(x, y, u, LinearModel())
    assert (first.step, second.step) == (0, 1)
    assert not torch.equal(first.params.lam, second.params.lam)
    assert not torch.equal(first.params.index, second.params.index)
    assert not torch.equal(first.inputs, second.inputs)


def test_a_permuted_batch_with_ids_gives_the_permuted_augmentation_and_lambda():
    x, y, u = data_of()
    ids_x, ids_u = torch.tensor([50, 7, 2**33]), torch.tensor([4, 3, 2, 1, 0])
    order_x, order_u = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 4, 0, 2])
    rows = torch.cat([order_x, 3 + order_u, 8 + order_u])
    model = LinearModel()
    for mix in ("none", "all"):
        batch = builder_of(mix=mix)(x, y, u, model, ids_x=ids_x, ids_u=ids_u)
        permuted = builder_of(mix=mix)(
            x[order_x],
            y[order_x],
            u[order_u],
            model,
            ids_x=ids_x[order_x],
            ids_u=ids_u[order_u],
        )
        assert torch.equal(permuted.params.lam, batch.params.lam[rows])
        if mix == "none":
            assert torch.equal(permuted.inputs, batch.inputs[rows])
            torch.testing.assert_close(permuted.targets, batch.targets[rows], rtol=0, atol=1e-6)


def test_an_image_with_its_id_is_augmented_alike_in_any_batch():
    x, y, u = data_of()
    ids = torch.tensor([9, 8, 7, 6, 5])
    whole = builder_of(mix="none")(x, y, u, LinearModel(), ids_u=ids).inputs_u
    part = builder_of(mix="none")(x, y, u[1:3], LinearModel(), ids_u=ids[1:3]).inputs_u
    assert torch.equal(part, torch.cat([whole[1:3], whole[6:8]]))


def test_ids_are_positions_by_default():
    x, y, u = data_of()
    batch = builder_of()(x, y, u, LinearModel(), ids_x=torch.arange(3), ids_u=torch.arange(5))
    assert_same_mixed(batch, builder_of()(x, y, u, LinearModel()))
    batch = builder_of()(x, y, u, LinearModel(), ids_u=torch.arange(5))
    assert_same_mixed(batch, builder_of()(x, y, u, LinearModel()))


def test_positions_go_on_from_rank_to_rank(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    x, y, u = data_of()
    batch = builder_of()(x, y, u, LinearModel())
    monkeypatch.undo()
    ids = {"ids_x": torch.arange(6, 9), "ids_u": torch.arange(10, 15)}
    assert_same_mixed(batch, builder_of()(x, y, u, LinearModel(), **ids))


def test_an_engine_of_the_users_gets_the_key_the_ids_and_its_own_draws_back():
    class Engine:
        calls = ()

        def draw_batch(self, seed, step, ids_x, ids_u, num_augmentations):
            self.calls += ((seed, step, ids_x, ids_u, num_augmentations),)
            return f"draws of step {step}"

        def build(self, x, u, draws, num_augmentations, workspace=None):
            assert draws == f"draws of step {len(self.calls) - 1}"
            return torch.cat([x, *[u] * num_augmentations]) / 255

    x, y, u = data_of()
    engine, ids_u = Engine(), torch.tensor([9, 8, 7, 6, 5])
    builder = builder_of(engine, mix="none")
    for _ in range(2):
        batch = builder(x, y, u, LinearModel(), ids_u=ids_u)
        assert torch.equal(batch.inputs, torch.cat([x, u, u]) / 255)
    assert [call[:2] for call in engine.calls] == [(SEED, 0), (SEED, 1)]
    assert all(call[2:] == (3, ids_u, 2) for call in engine.calls)


def test_a_call_that_raises_leaves_the_step():
    x, y, u = data_of()
    builder = builder_of()
    builder(x, y, u, LinearModel())
    with pytest.raises(RuntimeError, match="out of memory"):
        builder(x, y, u, RaisingModel())
    with pytest.raises(ValueError, match="num_classes = 5"):
        builder(x, y, u, LinearModel(num_classes=4))
    with pytest.raises(ValueError, match="y must be labels"):
        builder(x, y + NUM_CLASSES, u, LinearModel())
    assert int(builder.step) == 1
    reference = builder_of()
    reference(x, y, u, LinearModel())
    assert_same_mixed(builder(x, y, u, LinearModel()), reference(x, y, u, LinearModel()))


def test_a_batch_keeps_its_step_when_the_builder_moves_on():
    x, y, u = data_of()
    builder = builder_of()
    batch = builder(x, y, u, LinearModel())
    builder(x, y, u, LinearModel())
    assert (batch.step.dtype, batch.step.shape, int(batch.step)) == (torch.int64, (), 0)
    assert int(builder.step) == 2


def test_builder_does_not_write_to_its_arguments():
    x, y, u = data_of()
    copies = x.clone(), y.clone(), u.clone()
    builder = builder_of(reuse_buffers=True)
    for _ in range(3):
        builder(x, y, u, LinearModel())
    for tensor, saved in zip((x, y, u), copies, strict=True):
        assert torch.equal(tensor, saved)


# Buffers, copies and the repr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_reused_buffers_give_equal_results_and_alternate(channels, channels_last, dtype):
    x, y, u = data_of(channels=channels)
    engine = engine_of(mean=0.5, std=0.5, dtype=dtype, channels_last=channels_last)
    builder, reference = builder_of(engine, reuse_buffers=True), builder_of(engine)
    model = LinearModel(channels)
    pointers = []
    for _ in range(5):
        batch = builder(x, y, u, model)
        assert_same_mixed(batch, reference(x, y, u, model))
        pointers.append(batch.inputs.data_ptr())
    assert pointers[0] == pointers[2] == pointers[4]
    assert pointers[1] == pointers[3]
    assert pointers[0] != pointers[1]


def test_reused_buffers_leave_the_last_batch_alone():
    x, y, u = data_of()
    builder = builder_of(reuse_buffers=True)
    first = builder(x, y, u, LinearModel())
    saved = first.inputs.clone(), first.targets.clone()
    builder(x, y, u, LinearModel())
    assert torch.equal(first.inputs, saved[0])
    assert torch.equal(first.targets, saved[1])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("reuse_buffers", [False, True])
def test_a_batch_built_in_inference_mode_does_not_spoil_later_ones(reuse_buffers, mode):
    x, y, u = data_of()
    builder, reference = builder_of(reuse_buffers=reuse_buffers), builder_of()
    model = NormModel()
    with mode():
        for _ in range(2):
            assert_same_mixed(builder(x, y, u, model), reference(x, y, u, model))
    for _ in range(2):
        batch = builder(x, y, u, model)
        assert_same_mixed(batch, reference(x, y, u, model))
        model(batch.inputs).sum().backward()


def test_reused_buffers_follow_a_change_of_size():
    builder, reference = builder_of(reuse_buffers=True), builder_of()
    for sizes in ((3, 5), (3, 5), (2, 4), (3, 5)):
        x, y, u = data_of(*sizes)
        batch = builder(x, y, u, LinearModel())
        assert_same_mixed(batch, reference(x, y, u, LinearModel()))


def test_fresh_batches_share_no_memory():
    x, y, u = data_of()
    builder = builder_of(mix="none")
    first, second = builder(x, y, u, LinearModel()), builder(x, y, u, LinearModel())
    saved = second.inputs.clone()
    first.inputs.fill_(torch.nan)
    assert torch.equal(second.inputs, saved)


@pytest.mark.parametrize("reuse_buffers", [False, True])
def test_a_deep_copy_goes_on_by_itself(reuse_buffers):
    x, y, u = data_of()
    builder = builder_of(reuse_buffers=reuse_buffers)
    builder(x, y, u, LinearModel())
    twin = copy.deepcopy(builder)
    batch = twin(x, y, u, LinearModel())
    saved = batch.inputs.clone()
    assert (int(builder.step), int(twin.step)) == (1, 2)
    assert_same_mixed(builder(x, y, u, LinearModel()), batch)
    assert torch.equal(batch.inputs, saved)


SWITCHES = {
    "num_augmentations": 3,
    "temperature": 0.25,
    "alpha": 0.5,
    "lam": "batch",
    "mix": "separate",
    "guess_bn": "update",
    "guess_forward": "separate",
    "label_smoothing": 0.125,
    "reuse_buffers": True,
    "seed": 123,
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_repr_shows_every_switch(switch):
    value = SWITCHES[switch]
    assert f"{switch}={value!r}" in repr(builder_of(**{switch: value}))


def test_repr_shows_the_engine_the_step_the_teacher_and_the_implementation_that_runs():
    x, y, u = data_of()
    builder = builder_of(teacher=LinearModel())
    builder(x, y, u, LinearModel())
    shown = repr(builder)
    assert f"num_classes={NUM_CLASSES}" in shown
    assert "WeakAugment(padding=2" in shown
    assert "step=1" in shown
    assert "teacher=LinearModel" in shown
    running = implementation("auto", x.device).__name__.rsplit(".", 1)[-1]
    assert f"impl='auto' -> {running} on cpu" in shown
    assert "impl='eager' -> eager on cpu" in repr(builder_of(impl="eager"))

    def double(images):
        return images

    assert "augment=CallableAugment(<function" in repr(builder_of(double))
