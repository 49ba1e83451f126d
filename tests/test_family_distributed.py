"""Two processes learn of guesses what one does of the same global batch, to the last bit."""

import pytest
import torch
from torch import nn

from gpu_mixmatch import (
    ConsistencyLoss,
    DistributionAlignment,
    FlexMatch,
    FreeMatch,
    FreeThreshold,
    SoftMatch,
    SoftThreshold,
)
from tests.factories import random_images, random_labels
from tests.family import ADAPTIVE, ENGINES, IMAGE, NUM_CLASSES, SAMPLES, B, M, buffers_of
from tests.test_distributed import torchrun, write_script

STEPS = 4
METHODS = {
    **ADAPTIVE,
    # whose thresholds move far enough in a few steps
    "SoftMatch": lambda: SoftMatch(*ENGINES, threshold=SoftThreshold(0.5)),
    "FreeMatch": lambda: FreeMatch(*ENGINES, threshold=FreeThreshold(0.2)),
    "FlexMatch, aligned": lambda: FlexMatch(
        *ENGINES, num_unlabelled=SAMPLES, threshold=0.6, alignment=DistributionAlignment(2)
    ),
}


class Pixels(nn.Module):
    """Logits that are pixels: what it says of a row is the same in any batch, to the last bit."""

    def forward(self, images):
        return 4 * images[:, 0, 2, :NUM_CLASSES]


def data_of(step):
    """x, y, u, ids_x and ids_u of a global batch; some images are met on both ranks."""
    x, u = random_images(2 * B, IMAGE, seed=2 * step), random_images(2 * M, IMAGE, seed=99 + step)
    generator = torch.Generator().manual_seed(step)
    ids_x = torch.randint(2**40, (2 * B,), generator=generator)
    ids_u = torch.randint(SAMPLES, (2 * M,), generator=generator)
    ids_u[M + 1] = ids_u[1]
    return x, random_labels(2 * B, NUM_CLASSES, seed=step), u, ids_x, ids_u


def learnt(method, order, rank=None):
    """State, targets, weights and loss after each step, of one process or one of two."""
    builder, model, found = METHODS[method](), Pixels(), []
    for step in range(STEPS):
        x, y, u, ids_x, ids_u = (
            part if rank is None else part.chunk(2)[rank] for part in data_of(step)
        )
        batch = builder(x, y, u, model if order == "first" else None, ids_x=ids_x, ids_u=ids_u)
        logits, batch = batch.complete(model(batch.inputs))
        loss = ConsistencyLoss(lambda_fair=float(isinstance(builder, FreeMatch)))(logits, batch)
        state = [buffer.clone() for buffer in buffers_of(builder)]
        rows = {"targets": batch.targets, "weights": batch.weights, "inputs": batch.inputs}
        found.append({"state": state, **rows, "loss": loss.loss})
    return found


RANKS = """
    import os
    import sys
    from pathlib import Path

    import torch

    from gpu_mixmatch.recipes.distributed import process_group, rank
    from tests.test_family_distributed import METHODS, learnt

    with process_group("cpu"):
        found = {
            f"{method}, {order}": learnt(method, order, rank())
            for method in METHODS for order in ("first", "one pass")
        }
        torch.save(found, Path(sys.argv[1]) / f"found-{rank()}.pt")
    os._exit(0)  # torch's threads have been seen to abort an interpreter that was ending
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two ranks has learnt."""
    folder = tmp_path_factory.mktemp("family")
    code, printed = torchrun(write_script(folder / "ranks.py", RANKS), folder)
    assert code == 0, printed[-4000:]
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("order", ["first", "one pass"])
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_learn_what_one_does(found, method, order):
    ranks = [part[f"{method}, {order}"] for part in found]
    whole = learnt(method, order)
    for step, expected in enumerate(whole):
        for rank in range(2):
            mine = ranks[rank][step]
            for buffer, theirs in zip(mine["state"], expected["state"], strict=True):
                assert torch.equal(buffer, theirs)
            for name in ("inputs", "targets", "weights"):
                of_rank = expected[name].split([2 * B, 2 * M])
                assert torch.equal(mine[name], torch.cat([p.chunk(2)[rank] for p in of_rank])), name
    states = [torch.cat([part.flatten().double() for part in step["state"]]) for step in whole]
    assert not torch.equal(states[0], states[-1])
    if method in ("SoftMatch", "FreeMatch", "FlexMatch", "window"):
        assert len({float(step["weights"][2 * B :].sum()) for step in whole}) > 1


def test_an_image_on_both_ranks_has_the_class_of_the_last(found):
    met = 0
    for step, (batch, mine) in enumerate(
        zip(learnt("FlexMatch", "first"), found[0]["FlexMatch, first"], strict=True)
    ):
        image = int(data_of(step)[-1][1])
        guesses = batch["targets"][2 * B :].argmax(dim=1)
        places = (data_of(step)[-1] == image).nonzero().flatten()
        met += int(guesses[places].unique().numel() > 1)
        assert torch.equal(mine["state"][0], batch["state"][0])
    assert met  # else ranks do not disagree, and any order would do
