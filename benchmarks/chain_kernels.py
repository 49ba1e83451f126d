"""What the kernels of chains and of cuts compile to: facts that need no GPU, as JSON.

``python -m benchmarks.chain_kernels`` lets `functional.augment` and `functional.draw_batch` launch
all their kernels for some of them on CPU tensors, with the launch replaced, and compiles them. What
rows execute, by their draws, is for `benchmarks.kernels` to say; what is listed here is what must
hold for all code, and for more of them.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import sass
from benchmarks.kernels import ARCHS, LAST_SIZES, _warmed_up
from benchmarks.launches import BATCH_SIZE, CPU, NUM_AUGMENTATIONS, Launch, recording
from gpu_mixmatch import ColorJitter, RandAugment, WeakAugment, functional
from gpu_mixmatch.augment.keyed import KeyedAugment
from gpu_mixmatch.types import DrawPlan, Scaling

CASES: dict[str, tuple[Callable[[], KeyedAugment], int, torch.dtype, bool]] = {
    "fixmatch, 32 px": (RandAugment.fixmatch, 32, torch.float32, False),
    "usb, 32 px": (RandAugment.usb, 32, torch.float32, False),
    "jitter, 32 px": (ColorJitter, 32, torch.float32, False),
    "fixmatch, 224 px": (RandAugment.fixmatch, 224, torch.bfloat16, True),
    "fixmatch after a resized crop of 256 px": (
        lambda: RandAugment.fixmatch(WeakAugment.imagenet()),
        256,
        torch.bfloat16,
        True,
    ),
    "crop of 256 px": (
        lambda: WeakAugment(padding=0, size=224),
        256,
        torch.bfloat16,
        True,
    ),
    "resized crop of 256 px": (WeakAugment.imagenet, 256, torch.bfloat16, True),
    "jitter, 224 px": (ColorJitter, 224, torch.bfloat16, True),
    "blur, 96 px": (
        lambda: RandAugment.fixmatch(WeakAugment(blur_sigma=(0.1, 2.0))),
        96,
        torch.float32,
        False,
    ),
}


def launches_of(case: str, num_x: int, num_u: int, start: int = 0) -> list[Launch]:
    """What the draw and the views of a batch launch; images begin ``start`` bytes further on."""
    make, size, dtype, channels_last = CASES[case]
    engine = make()
    x, u = (
        torch.empty(start + count * 3 * size**2, dtype=torch.uint8)[start:].view(-1, 3, size, size)
        for count in (num_x, num_u)
    )
    plan = DrawPlan(NUM_AUGMENTATIONS, engine.policy)
    with recording() as launches:
        draws, _ = functional.draw_batch(
            0, torch.tensor(0), num_x, num_u, plan, device=CPU, impl="triton"
        )
        assert draws is not None
        functional.augment(
            (x, u),
            draws,
            engine.geometry,
            Scaling(1 / 127.5, -1.0),
            dtype=dtype,
            channels_last=channels_last,
            impl="triton",
        )
    return launches


def rows_of(case: str, arch: int) -> Iterator[dict[str, Any]]:
    """A row per kernel that a case compiles, with the number of them for batches of all sizes."""
    variants: dict[str, set[int]] = {}
    for number, (num_x, num_u) in enumerate(zip(LAST_SIZES, reversed(LAST_SIZES), strict=True)):
        for launch in launches_of(case, num_x, num_u, start=(1, 16)[number % 2]):
            variants.setdefault(launch.name, set()).add(id(_warmed_up(launch, arch)))
    seen: set[str] = set()
    for launch in launches_of(case, BATCH_SIZE, BATCH_SIZE):
        if launch.name in seen:
            continue
        seen.add(launch.name)
        kernel = _warmed_up(launch, arch)
        machine = sass.disassembled(kernel.asm["cubin"])
        names = Counter(instruction.name for instruction in machine.code)
        yield {
            "case": case,
            "arch": arch,
            "kernel": launch.name,
            "variants": len(variants[launch.name]),
            **machine.resources._asdict(),
            "local_accesses": names["LDL"] + names["STL"],
            "shared": kernel.metadata.shared,
            "layout_conversions": kernel.asm["ttgir"].count("ttg.convert_layout"),
            "instructions": len(machine.code),
            "branches": names["BRA"],
            "ffma": names["FFMA"] + names["FFMA2"],  # of sm_100: two at once
            "fmul": names["FMUL"] + names["FMUL2"],
        }


def main() -> None:
    """Compile, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[*ARCHS], choices=ARCHS)
    parser.add_argument("--case", nargs="+", default=[*CASES], choices=CASES)
    arguments = parser.parse_args()
    rows = [
        row for case in arguments.case for arch in arguments.arch for row in rows_of(case, arch)
    ]
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
