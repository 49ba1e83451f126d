"""Presets hold the published values, and each of them makes a step that trains."""

import math

import pytest
import torch

from gpu_mixmatch import (
    ICT,
    UDA,
    DistributionAlignment,
    FixMatch,
    FlexMatch,
    FreeMatch,
    MeanTeacher,
    MixMatch,
    MixMatchLoss,
    RandAugment,
    ReMixMatch,
    SoftMatch,
    presets,
)
from tests.factories import ConvNet, random_data

DATASETS = (
    "cifar10",
    "cifar100",
    "svhn",
    "svhn-extra",
    "stl10",
    "fashion-mnist",
    "mnist",
    "digits",
)
PRESETS = {"paper": presets.paper, "yu1ut": presets.yu1ut, "usb": presets.usb}
NUM_CLASSES = 10
METHODS = {
    "fixmatch": FixMatch,
    "uda": UDA,
    "softmatch": SoftMatch,
    "freematch": FreeMatch,
    "flexmatch": FlexMatch,
    "mean_teacher": MeanTeacher,
    "pi_model": MeanTeacher,
    "ict": ICT,
    "ict_reference": ICT,
    "remixmatch": ReMixMatch,
}
SGD = {"name": "sgd", "lr": 0.03, "momentum": 0.9, "nesterov": True, "cosine": 7 / 16}


@pytest.mark.parametrize(
    ("dataset", "lambda_u", "alpha", "filters"),
    [
        ("cifar10", 75.0, 0.75, 32),
        ("cifar100", 150.0, 0.75, 135),
        ("svhn", 250.0, 0.75, 32),
        ("svhn-extra", 250.0, 0.25, 32),
        ("stl10", 50.0, 0.75, 32),
    ],
)
def test_paper_has_the_weights_of_the_paper(dataset, lambda_u, alpha, filters):
    preset = presets.paper(dataset)
    assert preset.loss == {"lambda_u": lambda_u, "rampup_steps": 16_384}
    assert preset.builder["alpha"] == alpha
    assert preset.filters == filters


@pytest.mark.parametrize("dataset", DATASETS)
def test_paper_has_the_switches_of_the_reference(dataset):
    preset = presets.paper(dataset)
    assert preset.name == "paper"
    assert preset.dataset == dataset
    assert {name: value for name, value in preset.builder.items() if name != "alpha"} == {
        "num_augmentations": 2,
        "temperature": 0.5,
        "lam": "sample",
        "guess_bn": "batch",
        "guess_forward": "separate",
    }
    assert preset.interleaving == {"swap": True, "running_stats": "first"}
    assert preset.optimizer == {"name": "adam", "lr": 0.002, "decay": 4e-5}
    assert preset.ema_decay == 0.999


@pytest.mark.parametrize(
    ("dataset", "padding", "flip"),
    [
        ("cifar10", 4, 0.5),
        ("cifar100", 4, 0.5),
        ("svhn", 4, 0.0),
        ("svhn-extra", 4, 0.0),
        ("stl10", 12, 0.5),
    ],
)
@pytest.mark.parametrize("name", PRESETS)
def test_augmentation_is_that_of_the_paper(name, dataset, padding, flip):
    augment = PRESETS[name](dataset).augment()
    assert (augment.padding, augment.padding_mode, augment.flip) == (padding, "reflect", flip)
    assert (augment.zoom_px, augment.blur_sigma) == ((0, 0), None)
    assert set(augment.mean) == set(augment.std) == {0.5}  # pixels in [-1, 1]


def test_yu1ut_differs_from_the_paper_in_lambda_statistics_and_ramp():
    preset, paper = presets.yu1ut(), presets.paper()
    assert preset.name == "yu1ut"
    changed = {n: v for n, v in preset.builder.items() if v != paper.builder[n]}
    assert changed == {"lam": "batch", "guess_bn": "update"}
    assert preset.loss == {"lambda_u": 75.0, "rampup_steps": 1_048_576}
    assert preset.interleaving == {"swap": True, "running_stats": "all"}
    assert preset.optimizer["lr"] == 0.002


def test_usb_differs_from_the_paper_in_lambda_interleaving_and_optimiser():
    preset, paper = presets.usb(), presets.paper()
    assert preset.name == "usb"
    changed = {n: v for n, v in preset.builder.items() if v != paper.builder[n]}
    assert changed == {"lam": "batch", "alpha": 0.5}
    assert preset.loss == {"lambda_u": 100.0, "rampup_steps": 419_430}
    assert preset.interleaving == {"swap": False, "running_stats": "first"}
    assert preset.optimizer == {
        "name": "sgd",
        "lr": 0.03,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 5e-4,
    }


@pytest.mark.parametrize("name", ["yu1ut", "usb"])
def test_ports_have_one_setting_for_every_data_set(name):
    settings = [PRESETS[name](dataset) for dataset in DATASETS]
    for preset in settings:
        assert preset._replace(dataset="cifar10") == settings[0]


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("name", PRESETS)
def test_preset_makes_a_step_with_finite_gradients_and_its_own_statistics(name, dataset):
    preset = PRESETS[name](dataset)
    mixmatch = MixMatch(preset.augment(), NUM_CLASSES, **preset.builder)
    criterion = MixMatchLoss(**preset.loss)
    model = ConvNet(NUM_CLASSES)
    x, y, u = random_data(4, 4, (3, 32, 32), num_classes=NUM_CLASSES)
    for step in range(2):
        tracked = int(model.norm.num_batches_tracked)
        batch = mixmatch(x, y, u, model)
        logits = preset.forward(model, batch)
        assert logits.shape == (12, NUM_CLASSES)
        output = criterion(logits, batch)
        weight = preset.loss["lambda_u"] * step / preset.loss["rampup_steps"]
        assert output.weight_u.item() == pytest.approx(weight, rel=1e-6)
        model.zero_grad()
        output.loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        batch.check()
        # the paper and USB move BatchNorm's running statistics once a step, YU1ut five times
        moved = int(model.norm.num_batches_tracked) - tracked
        assert moved == (5 if name == "yu1ut" else 1)


def test_augment_fields_replace_those_of_the_data_set():
    augment = presets.paper("stl10").augment(flip=0.25, channels_last=True)
    assert (augment.padding, augment.flip, augment.channels_last) == (12, 0.25, True)


def test_default_data_set_is_cifar10():
    for preset in PRESETS.values():
        assert preset() == preset("cifar10")


def test_presets_do_not_share_their_settings():
    preset = presets.paper()
    preset.builder["alpha"] = 99.0
    preset.loss["lambda_u"] = 99.0
    for other in (presets.paper(), presets.yu1ut(), presets.usb()):
        assert other.builder["alpha"] != 99.0
        assert other.loss["lambda_u"] != 99.0


@pytest.mark.parametrize("dataset", ["imagenet", "CIFAR10", "cifar-10", ""])
@pytest.mark.parametrize("name", PRESETS)
def test_unknown_data_set_is_refused_with_the_choices(name, dataset):
    with pytest.raises(ValueError, match=rf"dataset must be one of .*'cifar10'.*, got '{dataset}'"):
        PRESETS[name](dataset)


@pytest.mark.parametrize(
    ("name", "ratio", "ema_decay", "loss"),
    [
        ("fixmatch", 7, 0.999, {"lambda_u": 1.0, "rampup_steps": 0}),
        ("uda", 7, 0.9999, {"lambda_u": 1.0, "rampup_steps": 0, "loss_u": "kl"}),
        ("softmatch", 7, 0.999, {"lambda_u": 1.0, "rampup_steps": 0}),
        ("freematch", 7, 0.999, {"lambda_u": 1.0, "rampup_steps": 0, "lambda_fair": 0.01}),
        ("flexmatch", 7, 0.999, {"lambda_u": 1.0, "rampup_steps": 0}),
        ("mean_teacher", 1, 0.999, {"lambda_u": 50.0, "rampup_steps": 419_430, "loss_u": "mse"}),
        ("pi_model", 1, 0.999, {"lambda_u": 10.0, "rampup_steps": 419_430, "loss_u": "mse"}),
        ("ict", 1, 0.999, {"lambda_u": 50.0, "rampup_steps": 419_430, "loss_u": "mse"}),
        ("ict_reference", 1, 0.999, {"lambda_u": 100.0, "rampup_steps": 262_144, "loss_u": "mse"}),
        (
            "remixmatch",
            1,
            0.999,
            {"lambda_mix": 1.5, "lambda_kl": 0.5, "lambda_rot": 0.5, "rampup_steps": 16_384},
        ),
    ],
)
def test_a_method_has_the_weights_of_its_code(name, ratio, ema_decay, loss):
    preset = getattr(presets, name)("cifar10")
    assert (preset.name, preset.ratio, preset.ema_decay) == (name, ratio, ema_decay)
    assert preset.loss == loss
    assert preset.filters == 32
    if name in ("ict", "remixmatch"):
        assert preset.optimizer == presets.paper().optimizer
    elif name != "ict_reference":
        assert preset.optimizer == {**SGD, "weight_decay": 5e-4}


@pytest.mark.parametrize("name", METHODS)
def test_cifar100_has_the_wider_network_and_the_decay_of_fixmatch(name):
    preset = getattr(presets, name)("cifar100")
    assert preset.filters == 128
    if preset.ratio == 7:
        assert preset.optimizer["weight_decay"] == 1e-3


def test_the_methods_have_the_switches_of_their_code():
    weak = presets.fixmatch("svhn").augment()
    assert (weak.padding, weak.flip) == (4, 0.0)

    def built(name, **more):
        return getattr(presets, name)("svhn").build(NUM_CLASSES, **more)

    fixmatch, uda = built("fixmatch"), built("uda")
    assert (fixmatch.threshold.value, fixmatch.temperature) == (0.95, None)
    assert fixmatch.strong.chain == RandAugment.fixmatch().chain
    assert fixmatch.plan.weak_views == 1  # one engine makes all views
    assert built("fixmatch", weak=weak).strong.weak is weak
    assert (uda.threshold.value, uda.temperature) == (0.8, 0.4)
    assert uda.strong.chain == RandAugment.uda().chain
    for name in ("softmatch", "freematch"):
        builder = built(name)
        assert builder.threshold.momentum == 0.999
        assert builder.strong.chain == RandAugment.usb().chain
        assert built(name, momentum=0.5).threshold.momentum == 0.5
    flexmatch = built("flexmatch", num_unlabelled=5)
    assert (flexmatch.threshold.value, flexmatch.threshold.num_unlabelled) == (0.95, 5)
    ict, reference = built("ict"), built("ict_reference")
    assert (ict.alpha, ict.lam, ict.mix, ict.partner, ict.blend) == (
        *(0.5, "sample", "unlabelled", "reversed", "probs"),
    )
    assert (reference.alpha, reference.lam, reference.blend) == (0.1, "batch", "logits")
    remixmatch = built("remixmatch")
    assert (remixmatch.num_strong, remixmatch.rotation) == (8, True)
    assert isinstance(remixmatch.alignment, DistributionAlignment)
    assert remixmatch.alignment.window == 128
    assert presets.remixmatch("stl10").builder["num_strong"] == 4
    colours = {
        name: presets.flexmatch(name).strong_augment().chain.cutout_color for name in DATASETS
    }
    assert colours["cifar10"] == (125, 123, 114)
    assert colours["mnist"] == colours["digits"] == colours["fashion-mnist"] == (123,)


@pytest.mark.parametrize("name", METHODS)
def test_preset_of_a_method_makes_a_step_with_finite_gradients(name):
    preset = getattr(presets, name)("cifar10")
    teacher = ConvNet(NUM_CLASSES, seed=1)
    more = {"num_unlabelled": 6} if name == "flexmatch" else {}
    if name in ("mean_teacher", "ict"):
        more["teacher"] = teacher
    if name == "remixmatch":
        more["rotation"] = False  # of the network here
    builder = preset.build(NUM_CLASSES, **more)
    assert type(builder) is METHODS[name]
    criterion = preset.criterion(**{"lambda_rot": 0.0} if name == "remixmatch" else {})
    model = ConvNet(NUM_CLASSES)
    x, y, u = random_data(3, 6, (3, 32, 32), num_classes=NUM_CLASSES)
    batch = builder(x, y, u, None if preset.ratio == 7 else model, ids_u=torch.arange(6))
    loss = criterion(preset.forward(model, batch), batch).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert sum(float(parameter.grad.abs().sum()) for parameter in model.parameters()) > 0


def test_learning_rate_falls_by_seven_sixteenths_of_pi_over_the_run():
    preset = presets.fixmatch()
    factors = [preset.lr_factor(step, 100) for step in (0, 50, 100, 150)]
    quarter = math.cos(7 * math.pi / 16)
    assert factors == pytest.approx([1.0, math.cos(7 * math.pi / 32), quarter, quarter])
    assert [presets.paper().lr_factor(step, 100) for step in (0, 50, 100)] == [1.0] * 3


def test_a_method_without_strong_views_has_no_engine_of_them():
    with pytest.raises(ValueError, match=r"method must have strong views, got 'pi_model'"):
        presets.pi_model().strong_augment()
    assert presets.fixmatch("digits").strong_augment().weak.flip == 0.0


@pytest.mark.parametrize("name", METHODS)
def test_methods_refuse_unknown_data_sets(name):
    with pytest.raises(ValueError, match=r"dataset must be one of .*, got 'imagenet'"):
        getattr(presets, name)("imagenet")
