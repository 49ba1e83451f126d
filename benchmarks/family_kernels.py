"""What the kernels of consistency methods compile to: facts that need no GPU, as JSON.

``python -m benchmarks.family_kernels`` lets the operations launch all their kernels on CPU tensors,
with the launch replaced, and compiles them.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks import sass
from benchmarks.kernels import ARCHS, LAST_SIZES, _warmed_up
from benchmarks.launches import BATCH_SIZE, Launch, recording
from gpu_mixmatch.types import UnlabelledLoss, Weighting, WeightRule

RATIO = 7  # unlabelled images to a labelled one
NUM_SAMPLES = 50_000
WINDOW = 128
NUM_CLASSES = (10, 100, 1000)


def launches_of(
    num_classes: int, num_x: int, num_u: int, start: int = 0, dtype: torch.dtype = torch.float32
) -> list[Launch]:
    """What all operations launch for a batch; tensors begin ``start`` values further on."""
    from gpu_mixmatch.impl import triton as kernels

    def sliced(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(start + torch.Size(shape).numel(), dtype=dtype)[start:].view(shape)

    rows = num_x + num_u
    y, ids, classes = (sliced(n, dtype=torch.int64) for n in (num_x, num_u, num_u))
    logits, all_logits = (sliced(n, num_classes, dtype=dtype) for n in (num_u, rows))
    sums = sliced(4 + 3 * num_classes, dtype=torch.int64)
    averages, labels, ratio = (sliced(n) for n in (2 + 3 * num_classes, num_classes, num_classes))
    counts = sliced(num_classes + 1, dtype=torch.int32)
    table = torch.zeros(NUM_SAMPLES, dtype=torch.int16)
    window, position = torch.zeros(WINDOW, num_classes), torch.zeros((), dtype=torch.int64)
    out = sliced(rows, num_classes), sliced(rows)
    weight, losses, count_x = sliced(1)[0], torch.zeros(6), torch.zeros(())
    gradient = torch.zeros(rows, num_classes, dtype=dtype)
    with recording() as launches:
        kernels.guess_statistics(logits, y, sums)
        kernels.update_averages(sums, averages, 0.999, None, None)
        kernels.update_averages(sums, averages, 0.999, labels, ratio)
        kernels.update_window(sums, window, position, labels, 0.999, ratio)
        kernels.confident_classes(logits, 0.95, classes)
        kernels.update_labels(classes, ids, table, counts)
        for rule in get_args(WeightRule):
            state = {"fixed": None, "flex": counts}.get(rule, averages)
            weighting = Weighting(0.0, rule, 0.95, state)
            kernels.consistency_targets(y, logits, weighting, 0.0, out)
        weighting = Weighting(0.5, "soft", 0.0, averages, 2.0, ratio)
        kernels.consistency_targets(y, logits, weighting, 0.0, out)
        for loss_u in get_args(UnlabelledLoss):
            tsa = weight if loss_u == "kl" else None  # as UDA has both
            arguments = (all_logits, *out, (num_x, rows), weight, 1.0, loss_u, tsa)
            kernels.consistency_loss(*arguments, losses, count_x)
            kernels.consistency_loss_backward(losses, *arguments, count_x, gradient)
    return launches


def rows_of(num_classes: int, arch: int) -> Iterator[dict[str, Any]]:
    """A row per kernel, with the number of them that batches of all sizes compile."""
    variants: dict[int, set[int]] = {}
    for number, (num_x, num_u) in enumerate(zip(LAST_SIZES, reversed(LAST_SIZES), strict=True)):
        for place, launch in enumerate(
            launches_of(num_classes, num_x, num_u, start=(1, 16)[number % 2])
        ):
            variants.setdefault(place, set()).add(id(_warmed_up(launch, arch)))
    for place, launch in enumerate(launches_of(num_classes, BATCH_SIZE, RATIO * BATCH_SIZE)):
        kernel = _warmed_up(launch, arch)
        machine = sass.disassembled(kernel.asm["cubin"])
        names = Counter(instruction.name for instruction in machine.code)
        switches = ("RULE", "HARD", "LOSS_U", "HAS_TSA")
        yield {
            "num_classes": num_classes,
            "arch": arch,
            "kernel": launch.name,
            "switches": {name: launch.options[name] for name in switches if name in launch.options},
            "programs": launch.programs,
            "warps": launch.options["num_warps"],
            "variants": len(variants[place]),
            **machine.resources._asdict(),
            "local_accesses": names["LDL"] + names["STL"],
            "instructions": len(machine.code),
            "dfma": names["DFMA"],
        }


def main() -> None:
    """Compile, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[*ARCHS], choices=ARCHS)
    parser.add_argument(
        "--classes", type=int, nargs="+", default=[*NUM_CLASSES], help="numbers of classes"
    )
    arguments = parser.parse_args()
    rows = [
        row
        for num_classes in arguments.classes
        for arch in arguments.arch
        for row in rows_of(num_classes, arch)
    ]
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
