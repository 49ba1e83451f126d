"""What the kernels compile to, and what they are predicted to cost: facts that need no GPU.

``python -m benchmarks.kernels`` lets `MixMatch` and the loss launch all their kernels on CPU
tensors, with the launch replaced, compiles what they would have run, counts the instructions that
are executed and the bytes that are moved, and predicts times by the model of `benchmarks.costs`.
ptxas and cuobjdump come with Triton; neither a GPU nor a driver is needed, and nothing is run.

``--resources`` only compiles, for registers and spills; ``--read FILE`` takes results in place of
compiling; ``--against FILE`` shows earlier results beside the new ones; ``--budgets`` writes what
the tests allow. The rows do not depend on the machine that compiled.
"""

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import costs, sass, schema
from benchmarks.budgets import (
    BUDGETS,
    batches_of,
    goal_rows,
    kernels_of,
    mixing_rows,
    rounded,
    write_budgets,
)
from benchmarks.common import RESULTS, Row, Settings, header
from benchmarks.launches import (
    BATCH_SIZE,
    EFFECTS,
    NUM_AUGMENTATIONS,
    OPERATIONS,
    REGIMES,
    Launch,
    Regime,
    launches_of,
    least,
    moved,
    traffic,
)

ARCHS = (80, 89, 90, 100)
_DRAWN = ("chain_ptr", "records_ptr")  # which operations a row has, which decides what is executed
LAST_SIZES = (1, 2, 15, 16, 17, 64)  # what the last batch of an epoch may hold

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


class Compiled(NamedTuple):
    """A launch's kernel for an architecture, and what its programs execute."""

    machine: sass.Machine
    routes: list[sass.Route]
    executed: costs.Count
    layouts: list[costs.Layout]
    warps: int
    shared: int


def compiled(launch: Launch, arch: int, *, is_here: bool = False) -> Compiled:
    """Compile a kernel as its launch would, and follow its programs.

    Args:
        launch: What to compile.
        arch: For which architecture.
        is_here: Whether that is the current device's, whose driver then stays.

    Raises:
        ValueError: If data decides over a loop or an exit, of which `costs.ASSUMED` says nothing.
    """
    kernel = _warmed_up(launch, None if is_here else arch)
    machine = sass.disassembled(kernel.asm["cubin"])
    given = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.options
    memory = [
        (tensor.data_ptr(), tensor.cpu().reshape(-1).view(torch.uint8).numpy())
        for name, tensor in launch.named.items()
        if name in _DRAWN and isinstance(tensor, Tensor)
    ]
    arguments = [
        argument.data_ptr() if isinstance(argument, Tensor) else argument
        for argument in _of_the_launch(kernel.src.signature.items(), given)
    ]
    bank = sass.constants(kernel.asm["ptx"], arguments, launch.programs, arch)
    layouts = byte_loads(kernel.asm["ttgir"])
    try:
        routes = sass.trace(machine, bank, launch.programs, costs.ASSUMED.get(launch.name), memory)
    except ValueError as error:
        raise ValueError(f"{launch.name}, sm_{arch}: {error}; see costs.ASSUMED") from error
    count = costs.counted(machine, routes, layouts)
    metadata = kernel.metadata
    return Compiled(machine, routes, count, layouts, metadata.num_warps, metadata.shared)


def _warmed_up(launch: Launch, arch: int | None) -> Any:
    """Triton's compiled kernel of a launch."""
    if arch is not None:
        from triton.runtime import driver

        driver.set_active(Device(arch))
    return launch.kernel.warmup(*launch.arguments, grid=(launch.programs,), **launch.options)


def _of_the_launch(signature: Iterable[tuple[Any, Any]], given: Any) -> Iterator[Any]:
    """The arguments that a kernel was not specialised on, those of tuples one by one."""
    for key, kind in signature:
        if isinstance(kind, tuple):
            yield from _of_the_launch(enumerate(kind), given[key])
        elif kind != "constexpr":
            yield given[key]


def predicted(
    launch: Launch, found: Compiled, gpu: costs.Gpu, overhead_us: float = costs.OVERHEAD_US
) -> costs.Prediction:
    """Predict the time of a launch on a GPU."""
    return costs.predicted(
        found.machine,
        found.routes,
        found.executed,
        gpu,
        programs=launch.programs,
        warps=found.warps,
        shared=found.shared,
        overhead_us=overhead_us,
        **traffic(launch)._asdict(),
    )


def kernel_row(launch: Launch, gpu: costs.Gpu) -> Row:
    """What a launch compiles to, executes and is predicted to take."""
    found = compiled(launch, gpu.arch)
    prediction = predicted(launch, found, gpu)
    machine, count = found.machine, found.executed
    out = launch.named.get("out_ptr")
    of_images, per = False, 1.0
    if isinstance(out, Tensor) and out.dim() == 4:
        # lanes count whether they hold a value or not
        of_images, per = True, out.numel() / (32 * launch.programs * found.warps)
    return {
        "kernel": launch.name,
        "arch": gpu.arch,
        "gpu": gpu.name,
        "mixes": launch.mixes,
        "makes_views": of_images and "x_ptr" in launch.named,
        "programs": launch.programs,
        "warps": found.warps,
        **machine.resources._asdict(),
        "local_accesses": sum(i.name in ("LDL", "STL") for i in machine.code),
        "shared": found.shared,
        "load_bits": _widths("LDG", machine),
        "store_bits": _widths("STG", machine),
        "byte_loads": found.layouts,
        "moved": moved(launch),
        "per": "value" if of_images else "warp",
        "instructions": rounded(count.instructions / per),
        "lanes": 32 * round(count.instructions * found.warps * launch.programs),
        "pipes": {name: rounded(n / per) for name, n in sorted(count.pipes.items())},
        "loads": rounded(count.loads / per),
        "stores": rounded(count.stores / per),
        "resident": prediction.resident,
        "clocks": round(prediction.clocks),
        # what is far from binding would only fill the file
        "us_of": {
            name: rounded(us)
            for name, us in prediction.of.items()
            if us > 0.1 * max(prediction.of.values())
        },
        "bound": prediction.bound,
        "predicted_us": rounded(prediction.us),
    }


def resource_row(launch: Launch, arch: int) -> Row:
    """Registers and memory of a launch's kernel."""
    used = sass.resources(_warmed_up(launch, arch).asm["cubin"])
    return {"kernel": launch.name, "arch": arch, "mixes": launch.mixes, **used._asdict()}


def _widths(operation: str, machine: sass.Machine) -> dict[str, int]:
    """How many of an operation there are in the code, by the bits of a thread's access."""
    widths = Counter(8 * i.width for i in machine.code if i.name == operation)
    return {str(bits): number for bits, number in sorted(widths.items())}


def variants(regime: Regime, effects: str, arch: int) -> dict[str, int]:
    """How many kernels batches of all sizes and alignments compile, by the launch's place."""
    found: dict[str, set[int]] = {}
    for number, (num_x, num_u) in enumerate(zip(LAST_SIZES, reversed(LAST_SIZES), strict=True)):
        launches, of_loss = launches_of(regime, effects, num_x, num_u, start=(1, 16)[number % 2])
        for place, launch in enumerate(launches + of_loss):
            kernel = _warmed_up(launch, arch)
            found.setdefault(f"{place} {launch.name}", set()).add(id(kernel))
    return {place: len(kernels) for place, kernels in found.items()}


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


# The report

Tell = Callable[[str], None]


def run(archs: Iterable[int], tell: Tell) -> list[Row]:
    """Rows of all kernels of all regimes and policies, of batches, of other sizes, and of goals."""
    gpus = [costs.GPUS[arch] for arch in archs]
    rows: list[Row] = []
    for regime in REGIMES:
        for effects in (*EFFECTS, OPERATIONS):
            launches, of_loss = launches_of(regime, effects)
            tell(f"{regime}, {effects}, other sizes")
            rows.append(_size_row(regime, effects, gpus[0].arch))
            for gpu in gpus:
                tell(f"{regime}, {effects}, sm_{gpu.arch}")
                found = [kernel_row(launch, gpu) for launch in launches]
                rows += _labelled(found, regime, effects)
                rows.append(_batch_row(found, regime, effects, gpu))
                if effects == "shift":
                    rows += _labelled(
                        [kernel_row(launch, gpu) for launch in of_loss], regime, "loss"
                    )
    return rows + mixing_rows(rows) + goal_rows(rows) + [_model_row(gpu) for gpu in gpus]


def run_resources(archs: Iterable[int], tell: Tell) -> list[Row]:
    """Rows of registers and memory alone, each compiled kernel once."""
    rows: list[Row] = []
    for arch in archs:
        seen: set[int] = set()
        for regime in REGIMES:
            for effects in (*EFFECTS, OPERATIONS):
                tell(f"{regime}, {effects}, sm_{arch}")
                launches, of_loss = launches_of(regime, effects)
                found = []
                for launch in launches + (of_loss if effects == "shift" else []):
                    kernel = id(_warmed_up(launch, arch))
                    if kernel not in seen:
                        seen.add(kernel)
                        found.append(resource_row(launch, arch))
                rows += _labelled(found, regime, effects)
    return rows


def _labelled(found: list[Row], regime: Regime, effects: str) -> list[Row]:
    """Rows of kernels with what tells them apart: a kernel may be launched twice."""
    seen: Counter[str] = Counter()
    rows = []
    for row in found:
        label = row["kernel"] + (", mixing" if row["mixes"] else "")
        seen[label] += 1
        if seen[label] > 1:
            label += f" ({seen[label]})"
        case = {"case": f"{regime}, {effects}, sm_{row['arch']}", "contender": label}
        rows.append(
            {**case, "threads": 1, "note": "", "regime": str(regime), "effects": effects, **row}
        )
    return rows


def _batch_row(found: list[Row], regime: Regime, effects: str, gpu: costs.Gpu) -> Row:
    total = sum(row["moved"] for row in found)
    us = sum(row["predicted_us"] for row in found)
    values = (1 + NUM_AUGMENTATIONS) * BATCH_SIZE * 3 * regime.size**2
    floor_us = least(regime) / gpu.dram / 1e3
    return {
        "case": f"batch: {regime}, {effects}",
        "contender": gpu.name,
        "threads": 1,
        "note": "predicted, without the model's forward pass",
        "regime": str(regime),
        "effects": effects,
        "arch": gpu.arch,
        "launches": [row["kernel"] for row in found],
        "moved": total,
        "least": least(regime),
        "ratio": rounded(total / least(regime)),
        "instructions": rounded(sum(row["lanes"] for row in found) / values),
        "predicted_us": rounded(us),
        "floor_us": rounded(floor_us),
        "times_floor": rounded(us / floor_us),
    }


def _model_row(gpu: costs.Gpu) -> Row:
    """What the predictions take a GPU to be."""
    note = "assumed, from data sheets and from memory"
    return {"case": "model", "contender": gpu.name, "threads": 1, "note": note, **gpu._asdict()}


def _size_row(regime: Regime, effects: str, arch: int) -> Row:
    return {
        "case": f"other sizes: {regime}, {effects}",
        "contender": f"sm_{arch}",
        "threads": 1,
        "note": "kernels that batches of all sizes compile, by the launch's place",
        "regime": str(regime),
        "effects": effects,
        "variants": variants(regime, effects, arch),
    }


# Text


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
        *("regime", "effects", "kernel", "sm", "programs", "warps", "regs", "resident", "stack"),
        *("LDL+STL", "shared", "loads: bits x number", "stores", "bytes moved", "per"),
        *("instructions", "by pipe", "loads", "stores", "clocks", "us", "binds"),
    ]

    def pairs(numbers: dict[str, Any], between: str) -> str:
        return " ".join(f"{name}{between}{number}" for name, number in numbers.items())

    rows = [
        [
            *(row["regime"], row["effects"], row["contender"], row["arch"]),
            *(row["programs"], row["warps"], row["registers"], row["resident"], row["stack"]),
            *(row["local_accesses"], row["shared"]),
            *(pairs(row["load_bits"], "x"), pairs(row["store_bits"], "x"), f"{row['moved']:,}"),
            *(row["per"], row["instructions"], pairs(row["pipes"], " ")),
            *(row["loads"], row["stores"], row["clocks"], row["predicted_us"], row["bound"]),
        ]
        for row in kernels_of(content["rows"])
    ]
    batches = [
        [
            *(row["regime"], row["effects"], row["contender"], len(row["launches"])),
            *(f"{row['moved']:,}", f"{row['least']:,}", f"{row['ratio']:.3f}"),
            *(row["instructions"], row["predicted_us"], row["floor_us"]),
            f"{row['times_floor']:.1f}",
        ]
        for row in batches_of(content["rows"])
    ]
    of_batches = ["regime", "effects", "gpu", "launches", "bytes moved", "least", "ratio"]
    of_batches += ["instructions/value", "us", "floor us", "ratio"]
    goals = [
        [row["contender"], row["value"], row["goal"], row["note"]]
        for row in content["rows"]
        if "goal" in row
    ]
    mixing = [
        [
            row["case"].removeprefix("mixing: "),
            row["contender"],
            row["read_back_us"],
            row["anew_us"],
        ]
        for row in content["rows"]
        if "anew_us" in row
    ]
    of_mixing = ["MixUp of views", "gpu", "written and read back, us", "made anew, us at least"]
    versions = content["versions"]
    return (
        f"Triton {versions['triton']}, torch {versions['torch']}; compiled, not run: times are "
        f"predictions\n\n{in_columns([heading, *rows])}\n\n"
        f"A batch of {BATCH_SIZE} + {NUM_AUGMENTATIONS} x {BATCH_SIZE} views, without the model\n\n"
        f"{in_columns([of_batches, *batches])}\n\n"
        f"{in_columns([of_mixing, *mixing])}\n\n"
        f"{in_columns([['goal on sm_90', 'counted', 'at most', ''], *goals])}"
    )


def compared(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Two files of results side by side: batches, then kernels, by case and GPU."""
    lines = [["batch", "gpu", "us before", "after", "", "bytes before", "after", "launches"]]
    old, new = (
        {(row["case"], row["contender"]): row for row in batches_of(content["rows"])}
        for content in (before, after)
    )
    for key in [*new, *(key for key in old if key not in new)]:
        lines.append([*key, *_side_by_side(old.get(key), new.get(key), "predicted_us")])
        lines[-1] += _side_by_side(old.get(key), new.get(key), "moved")[:2]
        lines[-1].append(
            " -> ".join(str(len(side[key]["launches"])) for side in (old, new) if key in side)
        )
    tables = [in_columns(lines)]
    lines = [["case", "kernel", "us before", "after", "", "instructions before", "after", "binds"]]
    old, new = (
        {(row["case"], row["contender"]): row for row in kernels_of(content["rows"])}
        for content in (before, after)
    )
    for key in sorted({*old, *new}, key=lambda key: (_case_order(key[0]), key[1])):
        lines.append([*key, *_side_by_side(old.get(key), new.get(key), "predicted_us")])
        lines[-1] += _side_by_side(old.get(key), new.get(key), "instructions")[:2]
        bounds = [side[key]["bound"] for side in (old, new) if key in side]
        lines[-1].append(" -> ".join(dict.fromkeys(bounds)))
    return "\n\n".join([*tables, in_columns(lines)])


def _case_order(case: str) -> tuple[str, int, int, str]:
    regime, effects, arch = case.split(", ")
    return arch, int(regime.split()[0]), len(effects), regime


def _side_by_side(old: Row | None, new: Row | None, field: str) -> list[str]:
    """Two numbers, and how many times less the second is."""
    cells = [f"{row[field]:,}" if row else "-" for row in (old, new)]
    return [*cells, f"{old[field] / new[field]:.2f}x" if old and new else ""]


def main() -> None:
    """Compile everything, or read results; print them, write them, compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", type=int, nargs="+", default=[*ARCHS], choices=ARCHS, help="architectures"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--name", default="kernels", help="of the JSON, NAME--MACHINE.json")
    parser.add_argument("--resources", action="store_true", help="only registers and spills")
    parser.add_argument("--read", type=Path, help="show these results, compile nothing")
    parser.add_argument("--against", type=Path, help="show earlier results beside the new ones")
    parser.add_argument("--budgets", action="store_true", help=f"write {BUDGETS.name}")
    arguments = parser.parse_args()
    if arguments.read:
        content = schema.load(arguments.read)
    else:
        if os.environ.get("TRITON_INTERPRET") == "1":
            sys.exit("TRITON_INTERPRET must not be 1: the interpreter compiles nothing. Unset it")
        make = run_resources if arguments.resources else run
        rows = make(arguments.arch, lambda line: print(line, file=sys.stderr, flush=True))
        content = header("kernels", Settings(torch.device("cpu"), threads=(1,)), rows)
        path = arguments.out / f"{arguments.name}--{content['machine']}.json"
        schema.dump(content, path)
        print(f"wrote {path}", file=sys.stderr)
    if arguments.budgets:
        write_budgets(content)
    if arguments.against:
        print(compared(schema.load(arguments.against), content))
    elif not arguments.resources:
        print(shown(content))


if __name__ == "__main__":
    main()
