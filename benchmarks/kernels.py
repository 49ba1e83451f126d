"""What the kernels compile to and the bytes that they move: facts that need no GPU.

``python -m benchmarks.kernels [--arch 80 90 100] [--json FILE]`` lets `MixMatch` and the loss
launch all their kernels on CPU tensors, with the launch replaced, and compiles what they would have
run. ptxas and cuobjdump come with Triton; neither a GPU nor a driver is needed.

Bytes: each value that a launch reads or writes counts once for that launch, and a view's pixel once
for each view that is made of it. Caches do not enter.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from gpu_mixmatch import MixMatch, WeakAugment, functional, impl

NUM_AUGMENTATIONS = 2
BATCH_SIZE = 64
LAST_SIZES = (1, 2, 15, 16, 17, 64)  # what the last batch of an epoch may hold
EFFECTS: dict[str, dict[str, Any]] = {
    "shift": {"padding": 4},
    "zoom": {"padding": 4, "zoom_px": (0, 16)},
    "zoom and blur": {"padding": 4, "zoom_px": (0, 16), "blur_sigma": (0.0, 3.0)},
}


class Regime(NamedTuple):
    """A size of batches.

    Attributes:
        size: Height and width of the images in pixels.
        dtype: Of the views.
        channels_last: Their memory format.
        num_classes: L.
    """

    size: int
    dtype: torch.dtype
    channels_last: bool
    num_classes: int

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"{self.size} px {str(self.dtype).removeprefix('torch.')} {layout}"


REGIMES = (
    Regime(32, torch.float32, False, 10),
    Regime(96, torch.float32, False, 10),
    Regime(224, torch.float32, False, 1000),
    Regime(224, torch.bfloat16, True, 1000),
)


class Launch(NamedTuple):
    """A kernel that would have run, and with what."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__)

    @property
    def named(self) -> dict[str, Any]:
        """The arguments by name, those of named tuples by the names of their fields."""
        return named_arguments(self.kernel.arg_names, self.arguments)


def named_arguments(names: Iterable[str], arguments: Iterable[Any]) -> dict[str, Any]:
    """Arguments by name; a named tuple's fields stand for themselves, however deep they lie."""
    found: dict[str, Any] = {}
    for name, argument in zip(names, arguments, strict=False):
        fields = getattr(argument, "_fields", None)
        found |= named_arguments(fields, argument) if fields else {name: argument}
    return found


def launches_of(
    regime: Regime, effects: str, num_x: int = BATCH_SIZE, num_u: int = BATCH_SIZE, start: int = 0
) -> tuple[list[Launch], list[Launch]]:
    """What one batch launches, and what the loss launches, forward and backward.

    Images, labels and ids begin ``start`` values behind an aligned address.
    """

    def sliced(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(start + math.prod(shape), dtype=dtype)[start:].view(shape)

    x, u = (
        sliced(count, 3, regime.size, regime.size, dtype=torch.uint8) for count in (num_x, num_u)
    )
    y, ids_x, ids_u = (sliced(count, dtype=torch.int64).zero_() for count in (num_x, num_x, num_u))
    ids = {"ids_x": ids_x, "ids_u": ids_u} if start else {}

    def model(views: Tensor) -> Tensor:
        return torch.zeros(len(views), regime.num_classes, dtype=views.dtype)

    with recording() as launches:
        augment = WeakAugment(
            **EFFECTS[effects],
            dtype=regime.dtype,
            channels_last=regime.channels_last,
            impl="triton",
        )
        mixmatch = MixMatch(
            augment, regime.num_classes, num_augmentations=NUM_AUGMENTATIONS, impl="triton"
        )
        batch = mixmatch(x, y, u, model, **ids)
    with recording() as of_loss:
        logits = model(batch.inputs).requires_grad_()
        losses = functional.mixmatch_loss(logits, batch.targets, num_x, 75.0, impl="triton")
        losses.loss.backward()
    return launches, of_loss


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Take down what would be launched, and let the launchers have CPU tensors."""
    from gpu_mixmatch.impl import triton as kernels
    from gpu_mixmatch.impl.triton import launch

    launches: list[Launch] = []

    def take_down(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
        launches.append(Launch(kernel, programs, arguments, options))

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(launch, "run", take_down))
        for name, answer in (("implementation", kernels), ("resolve_impl", "triton")):
            for module in _holders(name):
                patches.enter_context(mock.patch.object(module, name, return_value=answer))
        yield launches


def _holders(name: str) -> list[ModuleType]:
    """The package's modules that look for their implementation by a function of this name."""
    function = getattr(impl, name, None)
    modules = [m for key, m in sys.modules.items() if key.startswith("gpu_mixmatch")]
    return [m for m in modules if function is not None and getattr(m, name, None) is function]


# Bytes


def moved(launch: Launch) -> int:
    """The bytes that a launch reads and writes."""
    named = launch.named
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    total = 0
    # the draw writes its partners; the others read them, and with each row its partner
    rows_per_row = 2 if launch.name != "draw_kernel" and "index_ptr" in tensors else 1
    for name, tensor in tensors.items():
        if name in ("x_ptr", "u_ptr"):
            continue
        read_in_pairs = name in ("inputs_ptr", "targets_ptr", "logits_ptr", "y_ptr")
        total += tensor.nbytes * (rows_per_row if read_in_pairs else 1)
    if "x_ptr" in tensors:
        total += tensors["out_ptr"].numel() * tensors["x_ptr"].itemsize * rows_per_row
    return total


def least(regime: Regime) -> int:
    """The bytes that no batch can do without.

    The views of u are made of bytes and written for the guess. Then each value of the batch is read
    as two bytes, its own and its partner's, and written; and so are logits and targets.
    """
    rows_u = NUM_AUGMENTATIONS * BATCH_SIZE
    rows = BATCH_SIZE + rows_u
    pixels, itemsize = 3 * regime.size**2, regime.dtype.itemsize
    views = rows_u * pixels * (1 + itemsize)
    mixed = rows * pixels * (2 + itemsize)
    return views + mixed + regime.num_classes * (rows_u * itemsize + rows * 4)


# Compilation


class Device:
    """What Triton asks its driver for while it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        """A number per architecture, since compiled kernels are kept by device."""
        return self.arch

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_current_target(self) -> Any:
        """The architecture."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def compile_launch(launch: Launch, arch: int) -> dict[str, Any]:
    """Compile a kernel as its launch would, and say what came of it."""
    from triton.runtime import driver

    driver.set_active(Device(arch))
    kernel = launch.kernel.warmup(*launch.arguments, grid=(launch.programs,), **launch.options)
    return {
        "kernel": launch.name,
        "arch": arch,
        "programs": launch.programs,
        "warps": launch.options["num_warps"],
        **looked_at(kernel.asm["cubin"]),
        "byte_loads": byte_loads(kernel.asm["ttgir"]),
    }


def variants(regime: Regime, effects: str, arch: int) -> dict[str, int]:
    """How many kernels batches of all sizes and alignments compile, by the launch's place."""
    from triton.runtime import driver

    driver.set_active(Device(arch))
    compiled: dict[str, set[int]] = {}
    for number, (num_x, num_u) in enumerate(zip(LAST_SIZES, reversed(LAST_SIZES), strict=True)):
        launches, of_loss = launches_of(regime, effects, num_x, num_u, start=(1, 16)[number % 2])
        for place, launch in enumerate(launches + of_loss):
            kernel = launch.kernel.warmup(
                *launch.arguments, grid=(launch.programs,), **launch.options
            )
            compiled.setdefault(f"{place} {launch.name}", set()).add(id(kernel))
    return {place: len(kernels) for place, kernels in compiled.items()}


@cache
def looked_at(cubin: bytes) -> dict[str, Any]:
    """Registers and memory of a kernel, and the widths of its accesses in bits."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        sass = _cuobjdump("-sass", "--dump-resource-usage", str(file))
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", sass)
    if numbers is None:
        raise RuntimeError(f"cuobjdump must tell the resources of a kernel, got {sass[:500]!r}")
    registers, stack, shared, local = map(int, numbers.groups())
    return {
        "registers": registers,
        "stack": stack,
        "shared": shared,
        "local": local,
        "local_accesses": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "loads": _widths("LDG", sass),
        "stores": _widths("STG", sass),
    }


def byte_loads(ttgir: str) -> list[dict[str, list[int]]]:
    """Layouts of the tiles that are loaded byte by byte: what a thread holds, and the order.

    The first axis of ``order`` is the one along which neighbouring threads are neighbours.
    """
    names = set(re.findall(r"tt\.load .*x!tt\.ptr<i8>, (#\w+)>", ttgir))
    layouts = []
    for name in sorted(names):
        definition = re.search(rf"^{name} = #ttg\.blocked<{{(.*?)}}>", ttgir, re.MULTILINE)
        if definition is None:
            raise RuntimeError(f"byte loads must have a blocked layout, got {name}")
        fields = re.findall(r"(\w+) = \[([\d, ]+)\]", definition[1])
        layouts.append({field: [int(n) for n in values.split(",")] for field, values in fields})
    return layouts


def _widths(operation: str, sass: str) -> dict[str, int]:
    widths: Counter[str] = Counter()
    for suffixes in re.findall(rf"\b{operation}((?:\.\w+)*)", sass):
        width = re.search(r"\.(?:[US]?(8|16|64|128))(?:\.|$)", suffixes)
        widths[width[1] if width else "32"] += 1
    return dict(sorted(widths.items(), key=lambda item: int(item[0])))


def _cuobjdump(*arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    result = subprocess.run([tool, *arguments], capture_output=True, text=True, check=True)
    return result.stdout


# The report


def measured(archs: list[int], progress: Callable[[str], None]) -> dict[str, Any]:
    """All kernels of all regimes, policies and architectures, and the bytes of a batch."""
    import triton

    kernels: list[dict[str, Any]] = []
    batches = []
    sizes = []
    for regime in REGIMES:
        for effects in EFFECTS:
            launches, of_loss = launches_of(regime, effects)
            labels = {"regime": str(regime), "effects": effects}
            total = sum(map(moved, launches))
            batches.append(
                {
                    **labels,
                    "launches": [launch.name for launch in launches],
                    "moved": total,
                    "least": least(regime),
                    "ratio": total / least(regime),
                }
            )
            sizes.append({**labels, "variants": variants(regime, effects, archs[0])})
            for arch in archs:
                progress(f"{regime}, {effects}, sm_{arch}")
                for launch in launches + (of_loss if effects == "shift" else []):
                    mixes = launch.named.get("index_ptr") is not None
                    found = compile_launch(launch, arch)
                    kernels.append({**labels, "mixes": mixes, "moved": moved(launch), **found})
    return {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": kernels,
        "batches": batches,
        "sizes": sizes,
    }


def in_columns(rows: list[list[Any]]) -> str:
    """Columns of text under their headings."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in texts
    ]
    return "\n".join(lines)


def shown(content: dict[str, Any]) -> str:
    """The report as text."""
    heading = [
        *("regime", "effects", "kernel", "sm", "programs", "warps", "regs", "stack"),
        *("LDL+STL", "shared", "loads: bits x number", "stores", "bytes moved"),
    ]

    def accesses(widths: dict[str, int]) -> str:
        return " ".join(f"{width}x{number}" for width, number in widths.items())

    rows = [
        [
            *(found["regime"], found["effects"], found["kernel"], found["arch"]),
            *(found["programs"], found["warps"], found["registers"], found["stack"]),
            *(found["local_accesses"], found["shared"]),
            *(accesses(found["loads"]), accesses(found["stores"]), f"{found['moved']:,}"),
        ]
        for found in content["kernels"]
    ]
    traffic = [
        [
            *(batch["regime"], batch["effects"], len(batch["launches"])),
            *(f"{batch['moved']:,}", f"{batch['least']:,}", f"{batch['ratio']:.3f}"),
        ]
        for batch in content["batches"]
    ]
    traffic_heading = ["regime", "effects", "launches", "bytes moved", "least", "ratio"]
    return (
        f"Triton {content['triton']}, torch {content['torch']}; compiled, not run\n\n"
        f"{in_columns([heading, *rows])}\n\n"
        f"A batch of {BATCH_SIZE} + {NUM_AUGMENTATIONS} x {BATCH_SIZE} views, without the model\n\n"
        f"{in_columns([traffic_heading, *traffic])}"
    )


def main() -> None:
    """Compile everything, print the report, write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", type=int, nargs="+", default=[80, 90, 100], help="compute capabilities"
    )
    parser.add_argument("--json", type=Path, help="write the report to this file, too")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET must not be 1: the interpreter compiles nothing. Unset it")
    content = measured(arguments.arch, lambda line: print(line, file=sys.stderr, flush=True))
    print(shown(content))
    if arguments.json:
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
