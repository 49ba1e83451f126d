"""What a GPU does, beside what was predicted of it: ``python -m benchmarks.facts``.

First what the model assumes: an empty kernel in a graph, the bandwidth of copies from the DRAM and
within the L2. Then each kernel of each regime and policy, in a graph and between events, beside its
prediction; the same from images that begin one byte off; rows and warps of a program; and how far
resampled views lie from plain ones. All is written to ``facts--MACHINE.json``, and a page beside it
says what was missed by more than 1.5 times and which assumption that tests.

A kernel runs over and over on the same data, so that what fits is in the L2: as the model has it.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import costs, schema
from benchmarks.augment import draws_of, make_images, weak
from benchmarks.budgets import rounded
from benchmarks.common import RESULTS, Row, Settings, header
from benchmarks.launches import CPU, EFFECTS, REGIMES, Launch, Regime, launches_of
from benchmarks.tables import markdown
from gpu_mixmatch._timing import Timing, in_turns
from gpu_mixmatch.types import AugmentPolicy

MISSED = 1.5  # times, either way
IN_GRAPH = 100  # empty kernels of a graph
REPEATS = 20  # of a kernel in a graph
SECONDS = 90.0
LARGE_BYTES = 2**30  # of a copy
ERROR_SIZE = 224  # of the images whose views are compared

Timer = Callable[[Callable[[], Any], int], Timing]
Predict = Callable[[Launch, costs.Gpu, float], costs.Prediction]

NOTHING = "Nothing was measured."

TESTS = {
    "overhead": "the microseconds that any kernel takes in a graph; see the empty kernel",
    "issue": "that schedulers issue in 80 % of the clocks, and the clock itself",
    "alu": "the rate of integer and logic instructions",
    "fma": "the rate of multiply-adds",
    "xu": "the rate of special functions and conversions",
    "convert": "the rate of conversions",
    "fp64": "the rate of doubles",
    "tensor": "the rate of matrix instructions",
    "L1": "that the L1 looks up two tags a clock, that shared memory has no conflicts, and which "
    "sectors a warp touches",
    "L2": "the L2's bandwidth; see the copy within it",
    "DRAM": "the bandwidth of a copy, and what the L2 keeps; see the copy",
    "latency": "the clocks of loads, and that a warp waits for each operand in turn",
}


class Facts(NamedTuple):
    """What is needed to measure, so that a test can put functions in place of a GPU.

    Attributes:
        device: Where kernels run.
        gpu: Its model.
        timer: Takes a call and how often a graph holds it; returns milliseconds per call.
        predict: Predicts a launch on a GPU, with the microseconds of any kernel.
        ends: When no further part may begin, by `time.perf_counter`.
    """

    device: torch.device
    gpu: costs.Gpu
    timer: Timer
    predict: Predict
    ends: float = math.inf


def graph_timer(device: torch.device) -> Timer:
    """Return a timer that captures calls in a graph and replays it between events."""

    def timed(call: Callable[[], Any], repeats: int) -> Timing:
        call()  # compiles
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                call()
        timing = in_turns({"": graph.replay}, device, rounds=7, block_seconds=0.01)[""]
        low, median, high = (value / repeats for value in timing[:3])
        return Timing(low, median, high, timing.blocks)

    return timed


def predict_here(launch: Launch, gpu: costs.Gpu, overhead_us: float) -> costs.Prediction:
    """Predict a launch from what Triton compiles for the current device."""
    from benchmarks import kernels

    return kernels.predicted(
        launch, kernels.compiled(launch, gpu.arch, is_here=True), gpu, overhead_us
    )


def measured(facts: Facts, tell: Callable[[str], None] = lambda _: None) -> list[Row]:
    """Rows of all parts; those for which no time is left are skipped."""
    rows = list(constant_rows(facts))
    overhead_us, gpu = learned(rows, facts.gpu)
    parts: dict[str, Callable[[], Iterable[Row]]] = {}
    for regime in REGIMES:
        for effects in EFFECTS:
            parts[f"{regime}, {effects}"] = partial(
                kernel_rows, facts, regime, effects, gpu, overhead_us
            )
    for regime in REGIMES[1:]:
        parts[f"one byte off: {regime}"] = partial(shifted_rows, facts, regime)
    for regime in (REGIMES[0], *REGIMES[2:]):
        parts[f"rows and warps: {regime}"] = partial(knob_rows, facts, regime)
    parts["errors"] = partial(error_rows, facts)
    for name, part in parts.items():
        tell(name)
        if time.perf_counter() > facts.ends:
            rows.append(_row(name, "all", skipped="no time was left"))
            continue
        try:
            rows += part()
        except Exception as error:  # the next part may tell what this one cannot
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            rows.append(_row(name, "all", skipped=reason))
    return rows


def _row(case: str, contender: str, **fields: Any) -> Row:
    return {"case": case, "contender": contender, "threads": 1, "note": "", **fields}


def _times(timing: Timing) -> Row:
    return {name: rounded(v) if name != "blocks" else v for name, v in timing._asdict().items()}


# What the model assumes

CONSTANTS = "what the model assumes"
EMPTY, FROM_DRAM, IN_L2 = "empty kernel", "copy, DRAM", "copy, L2"


def constant_rows(facts: Facts) -> Iterator[Row]:
    """An empty kernel, and copies of much more and of less than the L2 holds."""
    timing = facts.timer(_empty(facts.device), IN_GRAPH)
    yield _row(CONSTANTS, EMPTY, **_times(timing), assumed_us=costs.OVERHEAD_US)
    # source and target together are a quarter of the L2
    for name, num_bytes, assumed in (
        (FROM_DRAM, LARGE_BYTES if facts.device.type == "cuda" else 2**20, facts.gpu.dram),
        (IN_L2, facts.gpu.l2_mb * 2**20 // 8, facts.gpu.l2),
    ):
        source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=facts.device)
        target = torch.empty_like(source)
        timing = facts.timer(partial(target.copy_, source), 4)
        # without what any kernel takes, which for few bytes is most
        seconds = max(timing.median_ms / 1e3 - (name == IN_L2) * costs.OVERHEAD_US / 1e6, 1e-9)
        rate = rounded(2 * num_bytes / seconds / 1e9)
        yield _row(CONSTANTS, name, **_times(timing), gb_per_s=rate, assumed_gb_per_s=assumed)


def learned(rows: Iterable[Row], gpu: costs.Gpu) -> tuple[float, costs.Gpu]:
    """The microseconds of any kernel, and the GPU with the bandwidths that were measured."""
    by_name = {row["contender"]: row for row in rows if row["case"] == CONSTANTS}
    return (
        1e3 * by_name[EMPTY]["median_ms"],
        gpu._replace(dram=by_name[FROM_DRAM]["gb_per_s"], l2=by_name[IN_L2]["gb_per_s"]),
    )


def _empty(device: torch.device) -> Callable[[], Any]:
    """Return what launches a kernel that does nothing."""
    if device.type != "cuda":
        return lambda: None
    kernel = _empty_kernel()
    return lambda: kernel[(1,)](num_warps=1)


@cache
def _empty_kernel() -> Any:
    import triton

    @triton.jit  # type: ignore[untyped-decorator]
    def empty_kernel():  # type: ignore[no-untyped-def]
        pass

    return empty_kernel


# Kernels


def kernel_rows(
    facts: Facts, regime: Regime, effects: str, gpu: costs.Gpu, overhead_us: float
) -> list[Row]:
    """Each launch of a batch beside its prediction, also by the constants that were measured."""
    launches, of_loss = launches_of(regime, effects, device=facts.device)
    rows = []
    for name, launch in _named(launches + (of_loss if effects == "shift" else [])):
        timing = facts.timer(partial(_run, launch), REPEATS)
        prediction = facts.predict(launch, facts.gpu, costs.OVERHEAD_US)
        again = facts.predict(launch, gpu, overhead_us)
        rows.append(
            _row(
                f"{regime}, {effects}",
                name,
                **_times(timing),
                predicted_us=rounded(prediction.us),
                bound=prediction.bound,
                ratio=rounded(1e3 * timing.median_ms / prediction.us),
                again_us=rounded(again.us),
                again_bound=again.bound,
                again_ratio=rounded(1e3 * timing.median_ms / again.us),
            )
        )
    return rows


def _named(launches: Iterable[Launch]) -> Iterator[tuple[str, Launch]]:
    """Launches with what tells them apart."""
    seen: dict[str, int] = {}
    for launch in launches:
        name = launch.name + (", mixing" if launch.mixes else "")
        seen[name] = seen.get(name, 0) + 1
        yield name + (f" ({seen[name]})" if seen[name] > 1 else ""), launch


def _run(launch: Launch) -> None:
    from gpu_mixmatch.impl.triton import launch as launching

    launching.run(launch.kernel, launch.programs, *launch.arguments, **launch.options)


def shifted_rows(facts: Facts, regime: Regime) -> list[Row]:
    """Launches of views from aligned images, and from those that begin one byte later."""
    rows = []
    for start in (0, 1):
        launches, _ = launches_of(regime, "shift", start=start, device=facts.device)
        for name, launch in _named(launches):
            if "x_ptr" in launch.named:
                timing = facts.timer(partial(_run, launch), REPEATS)
                where = "one byte off" if start else "aligned"
                mixes = "mixing" if launch.mixes else "views"
                rows.append(
                    _row(f"one byte off: {regime}", f"{mixes}, {where}", **_times(timing))
                    | {"note": name}
                )
    return rows


def knob_rows(facts: Facts, regime: Regime) -> list[Row]:
    """The guess with other rows, and the resampling with other warps to a program."""
    launches, _ = launches_of(regime, "zoom and blur", device=facts.device)
    rows = []
    for name, launch in _named(launches):
        options = launch.options
        variants: dict[str, Launch] = {}
        if launch.name == "guess_labels_kernel" and "ROWS" in options:
            lanes = options["ROWS"] * launch.programs
            for count in (1, 2, 4, 8, 16):
                programs = -(lanes // -count)
                other = options | {"ROWS": count}
                variants[f"{count} rows"] = launch._replace(programs=programs, options=other)
        elif "resample" in launch.name:
            for warps in (2, 4, 8):
                other = options | {"num_warps": warps}
                variants[f"{warps} warps"] = launch._replace(options=other)
        for knob, variant in variants.items():
            is_used = variant.options == options
            timing = facts.timer(partial(_run, variant), REPEATS)
            rows.append(
                _row(f"rows and warps: {regime}", f"{name}, {knob}", **_times(timing))
                | {"note": "as it is" if is_used else ""}
            )
    return rows


def error_rows(facts: Facts) -> list[Row]:
    """How far views on the device lie from plain ones in float32, in units of the last place."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for effects in ("zoom", "zoom and blur"):
            views, plain = _views(facts, effects, dtype)
            unit = torch.finfo(dtype).eps * 2 ** plain.abs().clamp_min(2**-10).log2().floor()
            error = (views.double() - plain.double()).abs()
            rows.append(
                _row(
                    "errors",
                    f"{effects}, {str(dtype).removeprefix('torch.')}",
                    largest=rounded(float(error.max())),
                    of_range=rounded(float(error.max() / (plain.max() - plain.min()))),
                    last_places=rounded(float((error / unit).max())),
                )
            )
    return rows


def _views(facts: Facts, effects: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Views of a few images by the device's own implementation, and plain ones on the CPU."""
    settings = EFFECTS[effects]
    policy = AugmentPolicy(
        settings["padding"], settings["zoom_px"], 0.5, settings.get("blur_sigma")
    )
    found = []
    for device, impl, of in ((facts.device, "auto", dtype), (CPU, "eager", torch.float32)):
        engine = weak(policy, impl, of).to(device)
        images = make_images(ERROR_SIZE, 2, device)
        found.append(engine.apply((images.x, images.u), draws_of(engine, images, 0)).cpu())
    return found[0], found[1]


# The page


def page(content: dict[str, Any]) -> str:
    """What was measured, what was missed, and what that says of the model, as Markdown."""
    rows = content["rows"]
    constants = {row["contender"]: row for row in rows if row["case"] == CONSTANTS}
    kernels = [row for row in rows if "ratio" in row]
    versions = content["versions"]
    parts = [
        f"# {content['gpu'] or content['cpu']} beside its predictions",
        f"`{content['command']}`, {content['date']}, triton {versions['triton']}, "
        f"torch {versions['torch']}, commit {content['commit']}.",
        "## What the model assumes",
        _constants_table(constants),
        *_constants_remarks(constants, kernels),
        "## Kernels",
        "In a graph, between events, on the same data over and over. *Again* is the prediction by "
        "the constants that were measured.",
        _kernels_table(kernels),
        "## Missed by more than 1.5 times",
        _missed(kernels),
        "## Images that begin one byte off",
        "Large ones are read in aligned words wherever they begin, small ones byte by byte.",
        _plain_table([row for row in rows if row["case"].startswith("one byte off")]),
        "## Rows and warps of a program",
        _plain_table([row for row in rows if row["case"].startswith("rows and warps")]),
        "## Errors of resampling",
        _errors_table([row for row in rows if row["case"] == "errors"]),
    ]
    skipped = [row for row in rows if "skipped" in row]
    if skipped:
        lines = [f"- {row['case']}: {row['skipped']}" for row in skipped]
        parts += ["## Left out", "\n".join(lines)]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _constants_table(constants: dict[str, Row]) -> str:
    rows = []
    for name, row in constants.items():
        if name == EMPTY:
            cells = [f"{1e3 * row['median_ms']:.2f} µs", f"{row['assumed_us']:.2f} µs"]
        else:
            cells = [f"{row[field]:,.0f} GB/s" for field in ("gb_per_s", "assumed_gb_per_s")]
        rows.append([name, *cells])
    return markdown(["", "measured", "assumed"], rows)


def _constants_remarks(constants: dict[str, Row], kernels: list[Row]) -> list[str]:
    """What the constants say, and how much of the misses they explain."""
    remarks = []
    for name, row in constants.items():
        if name == EMPTY:
            factor, what = 1e3 * row["median_ms"] / row["assumed_us"], "An empty kernel takes"
        else:
            factor, what = row["gb_per_s"] / row["assumed_gb_per_s"], f"{name}: the rate is"
        if not 1 / 1.15 < factor < 1.15:
            remarks.append(f"{what} {factor:.2f} times what is assumed.")
    if kernels:
        first, then = (
            sum(is_missed(row[field]) for row in kernels) for field in ("ratio", "again_ratio")
        )
        mean = math.exp(sum(math.log(row["ratio"]) for row in kernels) / len(kernels))
        remarks.append(
            f"Of {len(kernels)} kernels {first} are missed by more than {MISSED} times, and {then} "
            f"with the constants that were measured. On average a kernel takes {mean:.2f} times "
            "what is predicted."
        )
    return remarks


def is_missed(ratio: float) -> bool:
    """Whether what was measured is far from what was predicted, either way."""
    return not 1 / MISSED <= ratio <= MISSED


def _kernels_table(kernels: list[Row]) -> str:
    heading = ["", "kernel", "measured µs", "predicted", "ratio", "again", "ratio", "binds"]
    rows = [
        [
            *(row["case"], row["contender"], f"{1e3 * row['median_ms']:.1f}"),
            f"{row['predicted_us']:.1f}",
            f"**{row['ratio']:.2f}**" if is_missed(row["ratio"]) else f"{row['ratio']:.2f}",
            *(f"{row['again_us']:.1f}", f"{row['again_ratio']:.2f}", row["bound"]),
        ]
        for row in kernels
    ]
    return markdown(heading, rows)


def _missed(rows: list[Row]) -> str:
    """The kernels that were missed, by what was to bind them, and what that tests."""
    missed: dict[str, list[Row]] = {}
    for row in rows:
        if is_missed(row["ratio"]):
            missed.setdefault(row["bound"], []).append(row)
    if not missed:
        return "None."
    lines = []
    for bound, found in sorted(missed.items(), key=lambda item: -len(item[1])):
        lines.append(f"- {bound} was to bind them. It tests {TESTS.get(bound, 'the model')}.")
        for row in sorted(found, key=lambda row: -abs(math.log(row["ratio"]))):
            explained = (
                "" if is_missed(row["again_ratio"]) else "; the measured constants explain it"
            )
            slower = f"{row['ratio']:.2f} times as long as predicted"
            lines.append(f"  - {row['case']}, {row['contender']}: {slower}{explained}")
    return "\n".join(lines)


def _plain_table(timed: list[Row]) -> str:
    rows = [
        [
            *(row["case"].split(": ", 1)[1], row["contender"]),
            *(f"{1e3 * row['median_ms']:.1f}", row["note"]),
        ]
        for row in timed
        if "median_ms" in row
    ]
    return markdown(["", "", "µs", ""], rows) if rows else NOTHING


def _errors_table(errors: list[Row]) -> str:
    fields = ("largest", "of_range", "last_places")
    rows = [
        [
            row["contender"],
            *(f"{row[field]:.2g}" for field in fields),
        ]
        for row in errors
        if "largest" in row
    ]
    heading = ["", "largest", "of the range", "units in the last place"]
    return markdown(heading, rows) if rows else NOTHING


def write(content: dict[str, Any], out: Path) -> list[Path]:
    """Write the rows and the page to a folder."""
    files = [out / f"facts--{content['machine']}.json", (out / "gpu").with_suffix(".md")]
    schema.dump(content, files[0])
    files[1].write_text(page(content))
    return files


def main() -> int:
    """Measure on the CUDA device, or say that there is none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="no part begins later")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"There is no CUDA device here (torch {torch.__version__}): nothing was measured.")
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    gpu = costs.gpu_of(
        properties.name,
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        getattr(properties, "L2_cache_size", 0),
    )
    ends = time.perf_counter() + arguments.seconds
    facts = Facts(device, gpu, graph_timer(device), predict_here, ends)
    rows = measured(facts, lambda part: print(part, file=sys.stderr, flush=True))
    content = header("facts", Settings(device, threads=(1,)), rows)
    files = write(content, arguments.out)
    print(page(content))
    print("\n".join(f"wrote {file}" for file in files), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
