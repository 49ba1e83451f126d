"""What the suites share: contenders timed side by side, the machine's description, the table."""

import argparse
import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import schema
from gpu_mixmatch import __version__, _machine
from gpu_mixmatch._timing import Timing, in_turns
from gpu_mixmatch.impl import implementation

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / __version__

Row = dict[str, Any]
CASE_FIELDS = (
    "effects",
    "size",
    "batch",
    "num_rows",
    "sweep",
    "at",
    "num_views",
    "classes",
)  # what a case is; tables of it leave them out


class Skipped(Exception):  # noqa: N818 - it is no fault
    """A contender cannot run here; the message is the reason."""


@dataclass
class Contender:
    """One way to do a case's work.

    Attributes:
        name: As tables show it.
        call: Does the work once.
        note: What it does not do equally; "" where it does all.
        extras: Further fields of its row.
        before_block: Called before each block, outside of its time.
    """

    name: str
    call: Callable[[], Any]
    note: str = ""
    extras: Row = field(default_factory=dict)
    before_block: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Settings:
    """What the command line chose.

    Attributes:
        device: Where the work is done.
        quick: Few and short blocks, small cases: to see that all of it runs.
        threads: Numbers of CPU threads, each timed by itself.
        rounds: Blocks per contender.
        block_seconds: Length of a block, at least one call.
    """

    device: torch.device
    quick: bool = False
    threads: tuple[int, ...] = (1, 2)
    rounds: int = 7
    block_seconds: float = 0.1

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"


Tell = Callable[[str], None]
Suite = Callable[[Settings, Tell], list[Row]]


def quick_settings(device: torch.device) -> Settings:
    """Return settings that time little: function alone is looked at."""
    return Settings(device, quick=True, threads=(1,), rounds=2, block_seconds=0.002)


def time_contenders(contenders: Sequence[Contender], settings: Settings) -> dict[str, Timing]:
    """Time contenders in turns, as `gpu_mixmatch._timing` does it."""
    return in_turns(
        {contender.name: contender.call for contender in contenders},
        settings.device,
        rounds=settings.rounds,
        block_seconds=settings.block_seconds,
        before_block={
            contender.name: contender.before_block
            for contender in contenders
            if contender.before_block
        },
    )


def timed_rows(
    case: str, contenders: Sequence[Contender], settings: Settings, threads: int, **fields: Any
) -> list[Row]:
    """Time contenders, and return a row for each.

    Args:
        case: What the rows have in common.
        contenders: Those that can run here.
        settings: Of the command line.
        threads: Number of CPU threads that are set.
        fields: Further fields of all rows; ``num_rows`` also gives ``views_per_s``.
    """
    rows = []
    timings = time_contenders(contenders, settings)
    for contender in contenders:
        timing = timings[contender.name]
        row = {"case": case, "contender": contender.name, "threads": threads}
        row |= {"note": contender.note, **fields, **contender.extras}
        row |= {name: _rounded(value) for name, value in timing._asdict().items()}
        if "num_rows" in row:
            row["views_per_s"] = _rounded(1e3 * row["num_rows"] / timing.median_ms)
        rows.append(row)
    return rows


def skipped_row(case: str, contender: str, threads: int, reason: str, note: str = "") -> Row:
    """Return the row of a contender that cannot run here."""
    return {
        "case": case,
        "contender": contender,
        "threads": threads,
        "note": note,
        "skipped": reason,
    }


def goal_row(case: str, name: str, measured: Sequence[float], threads: int, goal: float) -> Row:
    """Return a row that says whether a goal is met.

    Args:
        case: What goals belong together.
        name: Of the goal, with its unit.
        measured: Lower quartile, median and upper quartile; the median counts.
        threads: Number of CPU threads.
        goal: The most where the unit is a time, else the least.
    """
    low, median, high = measured
    met = median <= goal if name.endswith((" us", " s")) else median >= goal
    return {
        "case": case,
        "contender": name,
        "threads": threads,
        "note": "met" if met else "not met",
        "value": _rounded(median),
        "quartiles": [_rounded(low), _rounded(high)],
        "goal": goal,
    }


def need(module: str, remedy: str = "see benchmarks/requirements-peers.txt") -> None:
    """Raise `Skipped` where a module is not installed, without importing it."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise Skipped(f"{module} is not installed ({remedy})")


def implementations(device: torch.device) -> list[str]:
    """Names of our implementations that can run on ``device``, the plain one first."""
    usable = ["eager"]
    for name in ("numba", "triton"):
        if name == "triton" and device.type != "cuda":
            continue  # its interpreter is for tests
        try:
            found = implementation(name, device)  # type: ignore[arg-type]
        except (ValueError, RuntimeError, ImportError):
            continue
        if found.__name__.rsplit(".", 1)[-1] == name:
            usable.append(name)
    return usable


def torch_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``torch.compile`` of a function.

    Raises:
        Skipped: If there is no compiler for it here.
    """
    if sys.platform != "win32" and not any(_is_found(name) for name in ("g++", "clang++", "c++")):
        raise Skipped("torch.compile needs a C++ compiler")
    return torch.compile(function, dynamic=False)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Set the number of threads of torch, and of OpenCV and DALI where they are loaded."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(count)
    if importlib.util.find_spec("nvidia") and "nvidia.dali" in sys.modules:
        importlib.import_module("nvidia.dali.experimental.dynamic").set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def settle_heap() -> None:
    """Make glibc keep freed memory, as it does after a training step: fairer to what allocates."""
    torch.empty(30 * 2**20, dtype=torch.uint8)


def header(suite: str, settings: Settings, rows: list[Row]) -> dict[str, Any]:
    """Describe the machine and the versions around a suite's rows."""
    described = _machine.header(
        suite,
        _command(suite, sys.argv[1:]),
        settings.device,
        settings.threads,
        commit=commit(),
        quick=settings.quick,
    )
    return described | {"rows": rows}


def main(suite: str, run: Suite, description: str | None) -> None:
    """Run a suite as the command line says: a progress bar, a table, a file of results."""
    arguments = _parser(description).parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--device {arguments.device} needs a CUDA device, and there is none")
    if arguments.quick:
        settings = quick_settings(device)
    elif device.type == "cuda":
        threads = (_machine.num_cores(),)
        settings = Settings(device, threads=threads, rounds=5, block_seconds=0.03)
    else:
        cores = _machine.num_cores()
        settings = Settings(device, threads=tuple(n for n in (1, 2) if n <= cores))
    settle_heap()
    rows = _with_progress(suite, run, settings)
    content = header(suite, settings, rows)
    _print_tables(content)
    # what --quick times is not for publishing
    folder = arguments.out or (ROOT / "runs" / "benchmarks" if arguments.quick else RESULTS)
    path = folder / f"{suite}--{content['machine']}.json"
    schema.dump(content, path)
    print(f"wrote {path}")


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="see that all of it runs")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help=f"folder of the JSON (default: {RESULTS.name})")
    return parser


def _with_progress(suite: str, run: Suite, settings: Settings) -> list[Row]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(suite), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[at]}"))
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(suite, total=None, at="")

        def tell(at: str) -> None:
            progress.update(task, at=at)

        return run(settings, tell)


def _print_tables(content: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    where = content["gpu"] or content["cpu"]
    console.print(f"{content['suite']} on {where}, torch {content['versions']['torch']}")
    rows = content["rows"]
    for case, threads in dict.fromkeys((row["case"], row["threads"]) for row in rows):
        table = Table(title=f"{case}, {threads} CPU threads", title_justify="left")
        for heading in ("", "ms", "quartiles", "further"):
            table.add_column(heading, justify="left" if heading in ("", "further") else "right")
        for row in rows:
            if (row["case"], row["threads"]) == (case, threads):
                table.add_row(*_cells(row))
        console.print(table)


def _cells(row: Row) -> tuple[str, str, str, str]:
    if "skipped" in row:
        return row["contender"], "skipped", "", row["skipped"]
    known = {"case", "contender", "threads", "note", *CASE_FIELDS, "blocks", *Timing._fields}
    further = [f"{key} {_short(value)}" for key, value in row.items() if key not in known]
    further += [row["note"]] if row["note"] else []
    if "median_ms" not in row:
        return row["contender"], "", "", ", ".join(further)
    spread = f"{_short(row['low_ms'])} .. {_short(row['high_ms'])}"
    return row["contender"], _short(row["median_ms"]), spread, ", ".join(further)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _rounded(value: float) -> float:
    """Four significant digits: more are noise."""
    return value if isinstance(value, int) else float(f"{value:.4g}")


def _command(suite: str, arguments: Sequence[str]) -> str:
    """The command that was given, without the folder: that is of this machine alone."""
    kept = list(arguments)
    if "--out" in kept:
        place = kept.index("--out")
        del kept[place : place + 2]
    return " ".join(["python -m", f"benchmarks.{suite}", *map(shlex.quote, kept)])


def commit(root: Path = ROOT) -> str:
    """The commit, with a mark where the package differs from it; "unknown" outside of git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "gpu_mixmatch", "benchmarks/*.py")
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return _machine.UNKNOWN


def _is_found(program: str) -> bool:
    from shutil import which

    return which(program) is not None
