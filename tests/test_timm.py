"""timm's models and torchvision's v2 transforms fit by their shape, without glue.

Where timm or torchvision cannot be imported, modules of the same shape stand in for them, and the
tests of the real ones are skipped.
"""

import importlib
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gpu_mixmatch import MixMatch, MixMatchLoss, SemiSupervisedLoader
from gpu_mixmatch.data.datasets import load_dataset
from tests.factories import random_images

STEPS = 250  # of the run that learns


def imported(name):
    """The module, or None; torchvision beside another build of torch fails with a RuntimeError."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError):
        return None


timm = imported("timm")
v2 = imported("torchvision.transforms.v2")
needs_timm = pytest.mark.skipif(timm is None, reason="timm cannot be imported here")
needs_v2 = pytest.mark.skipif(v2 is None, reason="torchvision cannot be imported here")


class BatchNormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: the layer calls F.batch_norm itself, then an activation."""

    def forward(self, x):
        tracked = not self.training or self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if tracked else (None, None)
        use_batch = self.training or mean is None
        x = F.batch_norm(x, mean, var, self.weight, self.bias, use_batch, self.momentum, self.eps)
        return F.relu(x)


class LikeTimm(nn.Module):
    """Features, pooling and a classifier, as timm's models are made."""

    def __init__(self, in_chans, num_classes):
        super().__init__()
        self.num_classes = num_classes
        widths = (in_chans, 32, 64, 64)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), BatchNormAct(o))
                for i, o in pairwise(widths)
            )
        )
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward_features(self, x):
        for block in self.blocks:
            x = F.max_pool2d(block(x), 2)
        return x

    def forward_head(self, x):
        return self.fc(x.mean(dim=(2, 3)))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


class LikeRandomCrop(nn.Module):
    """As a v2 transform: one draw from torch's generator for all the images of a call."""

    def __init__(self, size, padding):
        super().__init__()
        self.size = size
        self.padding = padding

    def forward(self, *inputs):
        (images,) = inputs
        top, left = torch.randint(0, 2 * self.padding + 1, (2,)).tolist()
        padded = F.pad(images, [self.padding] * 4)
        return padded[..., top : top + self.size, left : left + self.size]


class LikeNormalize(nn.Module):
    def forward(self, *inputs):
        return (inputs[0] - 0.5) / 0.5


def transform_of(kind, size=8, padding=1):
    if kind == "like v2":
        return nn.Sequential(LikeRandomCrop(size, padding), LikeNormalize())
    crop = v2.RandomCrop(size, padding=padding)
    return v2.Compose([crop, v2.Normalize([0.5], [0.5])])


def model_of(kind):
    torch.manual_seed(1)
    if kind == "like timm":
        return LikeTimm(1, 10)
    return timm.models.convmixer.ConvMixer(
        dim=48, depth=3, kernel_size=3, patch_size=1, in_chans=1, num_classes=10
    )


transforms = pytest.mark.parametrize("transform", ["like v2", pytest.param("v2", marks=needs_v2)])


def noise(length, seed, size=8, channels=1):
    return random_images(length, (channels, size, size), seed=seed)


def running_statistics(model):
    return [buffer.clone() for name, buffer in model.named_buffers() if "running" in name]


@pytest.mark.parametrize(
    "name",
    [
        "like timm",
        pytest.param("test_resnet", marks=needs_timm),
        pytest.param("test_efficientnet", marks=needs_timm),  # has BatchNormAct2d
    ],
)
def test_a_guess_leaves_running_statistics_and_the_mode_alone(name):
    torch.manual_seed(0)
    model = LikeTimm(1, 10)
    if name != "like timm":
        model = timm.create_model(name, num_classes=10, in_chans=1)
    before = running_statistics(model.eval())
    assert before
    x, u = noise(6, 1, 64), noise(6, 2, 64)
    mixmatch = MixMatch(transform_of("like v2", 64), 10, mix="none")
    batch = mixmatch(x, torch.arange(6), u, model)
    assert not any(module.training for module in model.modules())
    for one, other in zip(before, running_statistics(model), strict=True):
        assert torch.equal(one, other)

    # and it was made from batch statistics
    with torch.no_grad():
        logits = model.train()(batch.inputs_u).view(2, 6, 10)
    guess = logits.softmax(-1).mean(0) ** 2
    guess = (guess / guess.sum(1, keepdim=True)).repeat(2, 1)
    torch.testing.assert_close(batch.targets_u, guess, rtol=1e-4, atol=1e-5)


@needs_timm
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext"])
def test_models_of_timm_train(name):
    fields = {"img_size": 64} if name == "test_vit" else {}
    model = timm.create_model(name, num_classes=10, **fields)
    mixmatch = MixMatch(transform_of("like v2", 64), 10)
    batch = mixmatch(noise(4, 1, 64, 3), torch.arange(4), noise(4, 2, 64, 3), model.train())
    output = MixMatchLoss(10.0, 0)(model(batch.inputs), batch)
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.get_classifier().weight.grad.abs().sum() > 0


@needs_timm
def test_the_average_of_timm_can_guess():
    model = model_of("timm")
    average = timm.utils.ModelEmaV3(model, decay=0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    x, y, u = noise(4, 1), torch.arange(4), noise(4, 2)
    build = {"augment": transform_of("like v2"), "num_classes": 10, "mix": "none"}
    mine = MixMatch(**build, teacher=average)(x, y, u, model)
    other = MixMatch(**build)(x, y, u, average.module)
    assert torch.equal(mine.targets, other.targets)
    assert not torch.equal(mine.targets, MixMatch(**build)(x, y, u, model).targets)


@transforms
def test_views_of_a_transform_are_a_function_of_seed_and_step(transform):
    x, y, u = noise(5, 1), torch.arange(5), noise(7, 2)
    model = model_of("like timm")

    def views(seed, step):
        mixmatch = MixMatch(transform_of(transform, padding=3), 10, mix="none", seed=seed)
        mixmatch.step.fill_(step)
        return mixmatch(x, y, u, model).inputs

    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = views(3, 4)
    assert torch.equal(torch.rand(3), expected)  # the generator was left alone
    assert torch.equal(views(3, 4), first)
    assert any(not torch.equal(views(3, step), first) for step in (5, 6))
    assert any(not torch.equal(views(seed, 4), first) for seed in (0, 1))
    assert not torch.equal(first[5:12], first[12:])  # the two views of u


@transforms
def test_a_transform_draws_once_per_call_and_per_image_where_images_are_stacked(transform):
    x, y = noise(1, 1).expand(16, -1, -1, -1), torch.zeros(16, dtype=torch.int64)
    crop = transform_of(transform, padding=3)

    def per_image(images):
        return torch.stack([crop(image) for image in images])

    model = model_of("like timm")
    together = MixMatch(crop, 10, mix="none")(x, y, x, model).inputs
    apart = MixMatch(per_image, 10, mix="none")(x, y, x, model).inputs
    assert len(together[:16].unique(dim=0)) == 1
    assert len(apart[:16].unique(dim=0)) > 4


@needs_v2
def test_other_transforms_of_torchvision_build_batches():
    images = noise(4, 1, 32, 3)
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(24, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
            v2.GaussianBlur(5),
            v2.RandomErasing(p=1.0),
            v2.Normalize([0.5] * 3, [0.25] * 3),
        ]
    )
    torch.manual_seed(0)
    model = LikeTimm(3, 10)
    builder, again = (MixMatch(transform, 10, mix="none") for _ in range(2))
    first, following = (builder(images, torch.arange(4), images, model).inputs for _ in range(2))
    assert list(first.shape) == [12, 3, 24, 24]
    assert len(torch.cat([first, following]).unique(dim=0)) == 24
    assert torch.equal(again(images, torch.arange(4), images, model).inputs, first)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "transform"),
    [("like timm", "like v2"), pytest.param("timm", "v2", marks=[needs_timm, needs_v2])],
)
def test_it_learns_digits_with_40_labels_at_half_the_error_of_labels_alone(kind, transform):
    data = load_dataset("digits")
    labelled, unlabelled = data.split(40, seed=1)
    crop = transform_of(transform)

    def augment(images):
        return torch.stack([crop(image) for image in images])

    errors = {}
    for supervised in (True, False):
        loader = SemiSupervisedLoader(labelled, unlabelled, 64, steps_per_epoch=STEPS)
        model = model_of(kind)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, STEPS)
        mixmatch = MixMatch(augment, 10, seed=1)
        criterion = MixMatchLoss(lambda_u=75.0, rampup_steps=STEPS // 2)
        for batch in loader:
            if supervised:
                loss = F.cross_entropy(model(augment(batch.x / 255)), batch.y)
            else:
                mixed = mixmatch(batch.x, batch.y, batch.u, model)
                loss = criterion(model(mixed.inputs), mixed).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            guessed = model((data.test_images / 255 - 0.5) / 0.5).argmax(dim=1)
        errors[supervised] = (guessed != data.test_labels).float().mean().item()
    assert errors[False] <= 0.5 * errors[True], errors
