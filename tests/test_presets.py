"""Presets hold the published values, and each of them makes a step that trains."""

import pytest

from gpu_mixmatch import MixMatch, MixMatchLoss, presets
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
