"""ReMixMatch and ICT learn digits from 40 labels in 100 steps: short runs, far from their best."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gpu_mixmatch import (
    ICT,
    ConsistencyLoss,
    RandAugment,
    ReMixMatch,
    ReMixMatchLoss,
    ResidentLoader,
    WeakAugment,
)
from gpu_mixmatch.data.datasets import load_dataset

STEPS = 100
# Shifts and turns by a fifth: FixMatch's operations, by up to 9 pixels, leave little of 8.
SMALL = {"rotate": [-10, 10], "shear_x": [-0.1, 0.1], "brightness": [0.8, 1.2]}


class Net(nn.Module):
    """A convolution and a hidden layer, with logits of classes and, if asked for, of turns."""

    def __init__(self, with_turns):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(16 * 64, 32), nn.ReLU()),
        )
        self.classes = nn.Linear(32, 10)
        self.turns = nn.Linear(32, 4) if with_turns else None

    def forward(self, images):
        features = self.features(images)
        logits = self.classes(features)
        return logits if self.turns is None else (logits, self.turns(features))


def error_after(make, criterion, *, with_turns=False):
    """The error on test images after the run, in percent; ``make`` gives the builder."""
    data = load_dataset("digits", None, 8)
    labelled, unlabelled = data.split(40, 0)
    loader = ResidentLoader(
        *labelled.tensors, 32, unlabelled=unlabelled.tensors[0], steps_per_epoch=STEPS, seed=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net(with_turns)
    average = get_ema_multi_avg_fn(0.9)
    teacher = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    weak = WeakAugment.digits()
    builder = make(weak, teacher)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for x, y, u, ids_x, ids_u in loader:
        batch = builder(x, y, u, model, ids_x=ids_x, ids_u=ids_u)
        loss = criterion(model(batch.inputs), batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update_parameters(model)
    model.eval()
    output = model(weak.normalize(data.test_images))
    logits = output[0] if with_turns else output
    return 100 * (logits.argmax(dim=1) != data.test_labels).float().mean().item()


@pytest.mark.parametrize("rotation", [False, True])
def test_remixmatch_learns(rotation):
    error = error_after(
        lambda weak, _: ReMixMatch(
            *(weak, RandAugment(weak, 1, SMALL, cutout=0), 10), num_strong=1, rotation=rotation
        ),
        ReMixMatchLoss(lambda_rot=0.5 * rotation, rampup_steps=STEPS // 2),
        with_turns=rotation,
    )
    assert error < 45


@pytest.mark.parametrize("preset", [ICT.reference, ICT.fixmatch], ids=["reference", "fixmatch"])
def test_ict_learns(preset):
    error = error_after(
        lambda weak, teacher: preset(weak, 10, teacher=teacher),
        ConsistencyLoss(10.0, STEPS // 2, loss_u="mse"),
    )
    assert error < 35
