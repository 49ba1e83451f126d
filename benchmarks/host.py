"""What a batch costs the host, without a GPU: ``python -m benchmarks.host [--against FOLDER]``.

CPU tensors stand for those of a device, a driver that does nothing for CUDA's, and of a launch the
last step alone is left out: what Triton compiled for the arguments is called, and does nothing. So
our checks, draws and views, the binding of arguments and the choice of the kernel are all timed, at
32 px with 64 + 2 x 64 views and a model that answers with the same logits. What only looks at
values on a CPU does not look. With ``--against`` the package in another checkout takes turns with
this one, each in a process of its own, on one thread.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
BATCH_SIZE, SIZE, NUM_CLASSES = 64, 32, 10
ARCH = 90
BUILDERS: dict[str, dict[str, Any]] = {
    "shift": {"padding": 4},
    "zoom and blur": {"padding": 4, "zoom_px": (0, 16), "blur_sigma": (0.0, 3.0)},
}
LAUNCHED, UNLAUNCHED = "batch", "batch, our part alone"
LAYERS = "batch, shift, a model of the layers of WRN-28-2"
LOSS = "loss, forward and backward"
NOW, BEFORE = "now", "before"
CASES = (
    *(f"{part}: {effects}" for effects in BUILDERS for part in (LAUNCHED, UNLAUNCHED)),
    LAYERS,
    LOSS,
)


# In the process of a checkout, whose package may be older than this file


class Driver:
    """What Triton asks CUDA's driver for, without one: a launch does nothing.

    Args:
        device: The number of the current device.
    """

    def __init__(self, device: int = 0) -> None:
        self.device = device
        self.utils = self

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Make what launches a kernel, given its arguments."""
        return lambda *arguments: None

    def get_current_device(self) -> int:
        """The number that was given."""
        return self.device

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_current_target(self) -> Any:
        """What is compiled for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", ARCH, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        """As much shared memory as any kernel wants."""
        return {"max_shared_mem": 2**20}

    def load_binary(self, *arguments: Any) -> tuple[int, int, int, int, int]:
        """Handles of a module and of its function, registers, spills and threads."""
        return 1, 1000 + self.device, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        """Nothing was loaded."""


class _Model(nn.Module):
    """Answers with the same logits, whatever layers it has."""

    def __init__(self, layers: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = layers
        self.logits = torch.zeros(2 * BATCH_SIZE, NUM_CLASSES)
        self.logits[:, 0] = -1.0

    def forward(self, views: Tensor) -> Tensor:
        return self.logits


def calls() -> dict[str, Callable[[], Any]]:
    """What is timed, by case, on the package that is found first."""
    from triton.runtime import driver

    from gpu_mixmatch import MixMatch, WeakAugment, _validation, functional, impl
    from gpu_mixmatch.impl import triton as kernels
    from gpu_mixmatch.impl.triton import launch
    from gpu_mixmatch.recipes.models import build_model

    driver.set_active(Driver())
    for name, answer in (("implementation", kernels), ("resolve_impl", "triton")):
        function = getattr(impl, name)
        for module in [m for key, m in sys.modules.items() if key.startswith("gpu_mixmatch")]:
            if getattr(module, name, None) is function:
                setattr(module, name, lambda *_, answer=answer: answer)
    _validation._is_seen = lambda tensor: False  # as on a device
    run = launch.run

    generator = torch.Generator().manual_seed(0)
    shape = (BATCH_SIZE, 3, SIZE, SIZE)
    x, u = (torch.randint(256, shape, dtype=torch.uint8, generator=generator) for _ in "xu")
    y = torch.arange(BATCH_SIZE) % NUM_CLASSES
    model, layered = _Model(), _Model(build_model("wrn-28-2", NUM_CLASSES, 3))

    def builder(effects: str, model: Callable[[Tensor], Any], run: Any) -> Callable[[], Any]:
        mixmatch = MixMatch(WeakAugment(**BUILDERS[effects]), NUM_CLASSES)
        mixmatch._looks.seen.add("logits")
        mixmatch._model_writes = False  # its first guess was looked at

        def call() -> Any:
            launch.run = run
            return mixmatch(x, y, u, model)

        return call

    logits = torch.randn(3 * BATCH_SIZE, NUM_CLASSES, generator=generator).requires_grad_()
    targets = torch.softmax(torch.randn(logits.shape, generator=generator), dim=1)

    def loss() -> None:
        launch.run = run
        functional.mixmatch_loss(logits, targets, BATCH_SIZE, 75.0).loss.backward()

    found = {}
    for effects in BUILDERS:
        found[f"{LAUNCHED}: {effects}"] = builder(effects, model, run)
        found[f"{UNLAUNCHED}: {effects}"] = builder(effects, model, lambda *_, **__: None)
    return found | {LAYERS: builder("shift", layered, run), LOSS: loss}


def serve() -> None:
    """Answer each line ``COUNT CASE`` with the seconds that so many calls take."""
    import time

    torch.set_num_threads(1)
    torch.empty(30 * 2**20, dtype=torch.uint8)  # glibc keeps freed memory then
    found = calls()
    print("ready", flush=True)
    for line in sys.stdin:
        count, case = line.rstrip("\n").split(" ", 1)
        call, repeats = found[case], range(int(count))
        began = time.perf_counter()
        for _ in repeats:
            call()
        print(time.perf_counter() - began, flush=True)


# In the process that asks


class Checkout:
    """The package of a checkout, in a process of its own.

    Args:
        folder: The root of the checkout.
    """

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        environment.pop("TRITON_INTERPRET", None)
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).resolve()), "--serve"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def seconds(self, case: str, count: int) -> float:
        """The seconds that some calls take."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count} {case}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of a checkout ended with {self._process.wait()}")
        return line


def measured(
    folders: dict[str, Path], progress: Callable[[str], None], *, quick: bool
) -> list[dict[str, Any]]:
    """Rows of all cases, the checkouts in turns by blocks of calls.

    Args:
        folders: Roots of checkouts by the names of their rows, this one first.
        progress: Is told the case.
        quick: See that it runs, and time little.
    """
    from benchmarks.common import commit
    from gpu_mixmatch._timing import quartiles

    rounds, calls_per_block = (2, 5) if quick else (41, 100)
    checkouts = {name: Checkout(folder) for name, folder in folders.items()}
    notes = {name: f"commit {commit(folder)}" for name, folder in folders.items()}
    rows = []
    try:
        for case in CASES:
            progress(case)
            times: dict[str, list[float]] = {name: [] for name in checkouts}
            for checkout in checkouts.values():
                checkout.seconds(case, calls_per_block)  # compiles, and warms up
            for number in range(rounds):
                for name in checkouts if number % 2 == 0 else reversed(list(checkouts)):
                    seconds = checkouts[name].seconds(case, calls_per_block)
                    times[name].append(1e3 * seconds / calls_per_block)
            timings = {name: quartiles(values) for name, values in times.items()}
            for name, timing in timings.items():
                row = {"case": case, "contender": name, "threads": 1, "note": notes[name]}
                row |= {field: _rounded(value) for field, value in timing._asdict().items()}
                if name == NOW and BEFORE in timings:
                    share = 100 * timing.median_ms / timings[BEFORE].median_ms
                    row["share_percent"] = _rounded(share)
                rows.append(row)
    finally:
        for checkout in checkouts.values():
            checkout.close()
    return rows


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.4g}")


def main() -> None:
    """Time what is asked for, print it, and write the file of results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--against", type=Path, help="another checkout, to take turns with")
    parser.add_argument("--quick", action="store_true", help="see that all of it runs")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    from benchmarks import schema
    from benchmarks.common import commit
    from gpu_mixmatch import _machine

    folders = {NOW: ROOT}
    if arguments.against:
        folders[BEFORE] = arguments.against.resolve()
    rows = measured(folders, lambda case: print(case, file=sys.stderr), quick=arguments.quick)
    print(f"{'us on the host':50} {'':8} {'median':>8}  quartiles")
    for row in rows:
        low, median, high = (
            f"{1e3 * row[name]:.1f}" for name in ("low_ms", "median_ms", "high_ms")
        )
        share = f"{row['share_percent']:.1f} %" if "share_percent" in row else ""
        print(f"{row['case']:50} {row['contender']:8} {median:>8}  {low} to {high}  {share}")
    if arguments.json:
        content = _machine.header(
            "host",
            "python -m benchmarks.host" + (" --against FOLDER" if arguments.against else ""),
            torch.device("cpu"),
            (1,),
            commit=commit(),
            quick=arguments.quick,
        )
        schema.dump(content | {"rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
