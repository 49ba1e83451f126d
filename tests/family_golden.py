"""FixMatch's draws and batches, as every version gives them: ``python -m tests.family_golden``.

`tests.golden` says what is held by digests and what by values.
"""

import json
from pathlib import Path

import torch

from gpu_mixmatch import FixMatch, RandAugment, WeakAugment, sampling
from gpu_mixmatch.types import DrawPlan
from tests.golden import digest, samples

FILE = Path(__file__).with_suffix(".json")
IMPLS = ("eager", "numba")
NUM_CLASSES, IDS_X, IDS_U = 3, (5, 2**33 + 1, 0), (7, 1, 2**40, 4)


def engines(impl="auto"):
    """A weak and a strong one, of which views are one product and one sum per value."""
    weak = WeakAugment(2, mean=(0.4, 0.5, 0.45), std=(0.3, 0.25, 0.2), impl=impl)
    return weak, RandAugment.fixmatch(weak, cutout=4)


def draws():
    """Digests of a batch's draws, by what the plan has."""
    ids_x, ids_u = torch.tensor(IDS_X), torch.tensor(IDS_U)
    policy = engines()[1].policy
    found = {}
    for num_strong in (1, 2):
        for weak_x in (True, False):
            plan = DrawPlan(num_strong + 1, policy, mix="none", weak_x=weak_x, weak_views=1)
            params, mixup = sampling.draw_batch(7, 3, ids_x, ids_u, plan)
            name = f"{num_strong} strong, x {'weak' if weak_x else 'strong'}"
            found[name] = digest(*params, *mixup)
    return found


def _images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 12, 10), dtype=torch.uint8, generator=generator)


def _model(images):
    return torch.stack([12 * part.mean(dim=(1, 2, 3)) for part in images.split(4, 2)], 1)


def batch(impl, order, num_strong=2):
    """The second batch of a builder, with its targets."""
    fixmatch = FixMatch(
        *(*engines(impl), NUM_CLASSES),
        num_strong=num_strong,
        threshold=0.5,
        temperature=0.5,
        seed=11,
        impl=impl,
    )
    x, y, u = _images(3, 0), torch.arange(3) % NUM_CLASSES, _images(4, 1)
    ids = {"ids_x": torch.tensor(IDS_X), "ids_u": torch.tensor(IDS_U)}
    for _ in range(2):
        built = fixmatch(x, y, u, _model if order == "first" else None, **ids)
    inputs = built.inputs
    return inputs, built.complete(_model(inputs))[1]


def batches():
    """What is held of a batch, by implementation and order."""
    found = {}
    for impl in IMPLS:
        for order in ("first", "one pass"):
            inputs, labelled = batch(impl, order)
            found[f"{impl}, {order}"] = {
                "inputs": digest(inputs),
                "targets": samples(labelled.targets, 33),
                "weights": labelled.weights.tolist(),
            }
    return found


def main():
    """Record."""
    FILE.write_text(json.dumps({"draws": draws(), "batches": batches()}, indent=1) + "\n")
    print(f"wrote {FILE.name}")


if __name__ == "__main__":
    main()
