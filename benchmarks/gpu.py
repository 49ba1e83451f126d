"""All that wants a CUDA device, in one command: ``python -m benchmarks.gpu``, or ``make gpu``.

First what the device does beside what was predicted of it, `benchmarks.facts`, on one
page. Then the hazards that only a device shows: graphs, streams and memory that others need;
the tests marked ``gpu``, the kernels' tests on the real device, compute-sanitizer where it is
installed, all suites with ``--device cuda``, Nsight Compute and the plots. Each part has a time
limit, so that all fit in nine minutes; a part that fails does not stop the others. Results go to
the folder that ``$OUT`` names, or to that of this version's results; a table sums up at the end,
and the exit code is 1 if a part failed.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import schema
from benchmarks.common import RESULTS, ROOT, commit
from gpu_mixmatch._machine import header, machine

SECONDS = 540.0  # for everything
FACTS_SECONDS = 90.0  # no part of the facts begins later
SUITE_SECONDS = {
    "ops": 50,
    "augment": 40,
    "strong": 70,  # some of it goes image by image
    "batch": 35,
    "loader": 25,
    "scaling": 20,
}
HAZARD_TESTS = ("test_buffers", "test_capture")  # what a device alone shows, and corrupts
KERNEL_TESTS = (
    "test_triton",
    "test_packed",
    "test_resample",
    "test_triton_chain",
    "test_ops",
    "test_capture",
    "test_launches",
)
COUNTERS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "launch__registers_per_thread",
)
KEPT = 20_000  # characters of a part's output, from its end


class Part(NamedTuple):
    """A command of the run.

    Attributes:
        name: As the summary shows it.
        command: Program and arguments; a program that is not installed skips the part.
        seconds: Its time limit.
        environment: Variables to add.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: Mapping[str, str] = {}


class Outcome(NamedTuple):
    """How a part ended.

    Attributes:
        name: Of the part.
        state: "passed", "failed", "out of time" or "skipped".
        seconds: How long it took.
        detail: The exit code, or why it was skipped.
        output: The end of what it printed.
    """

    name: str
    state: str
    seconds: float
    detail: str
    output: str


def parts(out: Path) -> list[Part]:
    """All parts, the most telling first: the last ones suffer when time runs out."""
    python = sys.executable
    tests = [f"tests/{name}.py" for name in KERNEL_TESTS if (ROOT / f"tests/{name}.py").exists()]
    hazards = [f"tests/{name}.py" for name in HAZARD_TESTS if (ROOT / f"tests/{name}.py").exists()]
    passed = [f"--ignore={path}" for path in hazards]
    xml = str(out / "gpu-tests.xml")
    run = [python, "-m", "pytest", "-p", "no:cacheprovider"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--target-processes", "all"]
    workload = [python, "-m", "benchmarks.gpu", "--workload"]
    no_cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # memory of its own for each tensor
    heaviest = ["--kernel-name", "regex:augment_kernel|packed_kernel|mixup_kernel"]
    # the first batch compiles and warms up
    heaviest += ["--launch-skip", "2", "--launch-count", "2"]
    return [
        Part(
            "facts",
            [python, "-m", "benchmarks.facts", "--seconds", str(FACTS_SECONDS), "--out", str(out)],
            FACTS_SECONDS + 20,
        ),
        Part("hazards", [*run, "-m", "gpu", *hazards], 35),
        Part("tests marked gpu", [*run, "-m", "gpu", f"--junitxml={xml}", *passed], 40),
        Part("kernel tests on the device", [*run, "-m", "not gpu", *tests], 45),
        Part("memcheck", [*sanitizer, "--tool", "memcheck", *workload, "short"], 20, no_cache),
        Part("racecheck", [*sanitizer, "--tool", "racecheck", *workload, "short"], 20),
        *(
            Part(
                f"suite {suite}",
                [python, "-m", f"benchmarks.{suite}", "--device", "cuda", "--out", str(out)],
                SUITE_SECONDS[suite],
            )
            for suite in schema.SUITES
        ),
        Part(
            "Nsight Compute",
            ["ncu", "--csv", "--metrics", ",".join(COUNTERS), *heaviest, *workload, "heavy"],
            20,
        ),
        Part("plots", [python, "-m", "benchmarks.report", "--draw", str(out)], 10),
    ]


def run_part(part: Part, seconds: float) -> Outcome:
    """Run a part for at most ``seconds``; what it started is ended with it."""
    if shutil.which(part.command[0]) is None:
        return Outcome(part.name, "skipped", 0.0, f"{part.command[0]} is not installed", "")
    if seconds < 1:
        return Outcome(part.name, "skipped", 0.0, "no time was left", "")
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env={**os.environ, **part.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, which can be ended whole
        )
        try:
            code = process.wait(seconds)
            state, detail = ("passed" if code == 0 else "failed"), f"exit code {code}"
        except subprocess.TimeoutExpired:
            state, detail = "out of time", f"ended after {seconds:.0f} s"
        finally:
            _end_group(process)
        output.seek(0)
        text = output.read().decode(errors="replace").replace(str(ROOT), ".")
    return Outcome(part.name, state, time.perf_counter() - start, detail, text[-KEPT:])


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(
    chosen: Sequence[Part], seconds: float, on_part: Callable[[Outcome], None]
) -> list[Outcome]:
    """Run parts one after the other, past those that fail, within ``seconds`` in all."""
    end = time.perf_counter() + seconds
    outcomes = []
    for part in chosen:
        left = end - time.perf_counter()
        outcomes.append(run_part(part, min(part.seconds, left)))
        on_part(outcomes[-1])
    return outcomes


def summarise(outcomes: Sequence[Outcome], path: Path, device: torch.device) -> int:
    """Write outcomes to ``path``, print a table of them, and return the exit code."""
    from rich.console import Console
    from rich.table import Table

    threads = torch.get_num_threads()
    rows = [
        {
            "case": "make gpu",
            "contender": outcome.name,
            "threads": threads,
            "note": outcome.detail,
            "state": outcome.state,
            "seconds": outcome.seconds,
            "output": outcome.output,
        }
        for outcome in outcomes
    ]
    command = "python -m benchmarks.gpu"
    content = header("gpu", command, device, [threads], commit=commit()) | {"rows": rows}
    schema.dump(content, path)
    table = Table(title=f"{content['machine']}: {path}", title_justify="left")
    for heading in ("part", "state", "s", "detail"):
        table.add_column(heading, justify="right" if heading == "s" else "left")
    for outcome in outcomes:
        table.add_row(outcome.name, outcome.state, f"{outcome.seconds:.0f}", outcome.detail)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return int(any(outcome.state in ("failed", "out of time") for outcome in outcomes))


def workload(kind: str) -> None:
    """Run the kernels a few times, for tools that watch them.

    Args:
        kind: "short" is small batches of every policy and the loss; "heavy" is two large batches.
    """
    from gpu_mixmatch import MixMatch, MixMatchLoss, WeakAugment

    size, batch = (32, 8) if kind == "short" else (224, 64)
    policies = [{"padding": 4, "zoom_px": (0, 8)}]
    if kind == "short":
        policies += [{"padding": 4}, {"padding": 4, "blur_sigma": (0.0, 3.0)}]
    x = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device="cuda")
    y = torch.arange(batch, device="cuda") % 10
    for policy in policies:
        mixmatch = MixMatch(WeakAugment(**policy, impl="triton"), 10, impl="triton").to("cuda")
        for _ in range(2):
            mixed = mixmatch(x, y, x, lambda images: images.flatten(1)[:, :10].float())
            logits = torch.zeros(len(mixed.inputs), 10, device="cuda", requires_grad=True)
            MixMatchLoss(impl="triton")(logits, mixed).loss.backward()
    torch.cuda.synchronize()


def main() -> int:
    """Run all parts on the CUDA device, or say that there is none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", choices=("short", "heavy"), help="only run the kernels")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"There is no CUDA device here (torch {torch.__version__}): nothing was run.")
        return 1
    if arguments.workload:
        workload(arguments.workload)
        return 0
    out = Path(os.environ.get("OUT") or RESULTS).resolve()
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda")

    def on_part(outcome: Outcome) -> None:
        print(f"{outcome.name}: {outcome.state}, {outcome.detail}", flush=True)
        if outcome.state in ("failed", "out of time"):
            print(outcome.output[-2000:], flush=True)

    outcomes = run_all(parts(out), SECONDS, on_part)
    path = out / f"gpu--{machine(device)}.json"
    return summarise(outcomes, path, device)


if __name__ == "__main__":
    sys.exit(main())
