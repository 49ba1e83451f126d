"""What the order of guess and training pass costs: ``python -m benchmarks.orders [--quick]``.

A training step of FixMatch, B labelled and 7·B unlabelled images, whose weak views are guessed on
in the pass that is trained (the reference) or before it, without gradients. Both make the same
views. Memory is the most that torch holds at once during a step, beside the weights and what the
optimiser keeps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.augment import make_images
from benchmarks.common import Contender, Row, Settings, Tell, cpu_threads, main, timed_rows
from benchmarks.peers import Images
from benchmarks.scaling import peak_bytes
from gpu_mixmatch import ConsistencyLoss, FixMatch, RandAugment, WeakAugment
from gpu_mixmatch.recipes.models import build_model

RATIO = 7  # unlabelled images per labelled one, as the paper has it
CLASSES = 10
ORDERS = {"guess in the loss, one pass": False, "guess first": True}


class Case(NamedTuple):
    """A network and its images."""

    model: str
    size: int
    batch: int


CASES = (Case("cnn", 28, 64), Case("wrn-28-2", 32, 8))


def training_step(case: Case, images: Images, *, first: bool) -> Callable[[], Any]:
    """Return a call that trains one step."""
    device = images.x.device
    weak = WeakAugment(case.size // 8)
    fixmatch = FixMatch(weak, RandAugment.fixmatch(weak, cutout=case.size // 2), CLASSES)
    fixmatch = fixmatch.to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = build_model(case.model, CLASSES, 3).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, nesterov=True)
    criterion = ConsistencyLoss()
    y = torch.arange(len(images.x), device=device) % CLASSES

    def step() -> Any:
        batch = fixmatch(images.x, y, images.u, model if first else None)
        output = criterion(model(batch.inputs), batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        return batch

    return step


def check_rows(batch: Any, case: Case, *, first: bool) -> None:
    """Raise if a step did not train on x, strong views and, in one pass, weak views."""
    wanted = case.batch * (1 + RATIO if first else 1 + 2 * RATIO)
    if len(batch.inputs) != wanted:
        raise ValueError(f"a step must pass {wanted} rows, got {len(batch.inputs)}")


def run(settings: Settings, tell: Tell) -> list[Row]:
    """Check and time both orders."""
    rows: list[Row] = []
    threads = settings.threads[-1]
    cases = [case._replace(batch=2) for case in CASES] if settings.quick else list(CASES)
    for case in cases:
        tell(case.model)
        images = make_images(case.size, case.batch * RATIO, settings.device)
        images = images._replace(x=images.x[: case.batch].contiguous())
        contenders = []
        with cpu_threads(threads):
            for name, first in ORDERS.items():
                step = training_step(case, images, first=first)
                check_rows(step(), case, first=first)
                held = peak_bytes(step, settings.device)
                extras = {"peak_mb": round(held / 1e6, 1)}
                contenders.append(Contender(name, step, extras=extras))
            title = f"{case.model}, {case.size} px, {case.batch} + {case.batch * RATIO} images"
            rows += timed_rows(title, contenders, settings, threads, size=case.size)
    return rows


if __name__ == "__main__":
    main("orders", run, __doc__)
