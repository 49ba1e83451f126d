"""What the documents promise about speed on a CPU: ``python -m benchmarks.claims [--quick]``.

Each claim is checked, then timed in turns with what it is compared to, and reported as met or not
met. Ratios are medians over medians; on a machine with other tenants they hold to about 30 %.
"""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from benchmarks.augment import check_ours, make_images, ours, policy_for
from benchmarks.common import (
    ROOT,
    Contender,
    Row,
    Settings,
    Skipped,
    Tell,
    cpu_threads,
    goal_row,
    implementations,
    main,
    need,
    skipped_row,
    time_contenders,
)
from benchmarks.peers import kornia_one_call
from gpu_mixmatch import collate
from gpu_mixmatch._timing import quartiles

CASE = "claims"
GOALS = {
    "views of 32 px, numba, times as fast as Kornia": 7.0,
    "collate of arrays, times as fast as ToTensor and default_collate": 5.0,
    "collate of tensors, times as fast as ToTensor and default_collate": 5.0,
    "collate of PIL images, times as fast as ToTensor and default_collate": 2.5,
    "import gpu_mixmatch beyond torch and numpy, s": 0.2,
    "gpu-mixmatch doctor's examination, s": 1.0,
}
VIEWS, *COLLATES, IMPORT, DOCTOR = GOALS
IMPORTED = "import time, numpy, torch\nbegan = time.perf_counter()\nimport gpu_mixmatch\n"
EXAMINED = (
    "import time\nfrom gpu_mixmatch.cli import doctor\nbegan = time.perf_counter()\n"
    "doctor.examine()\n"
)


def views_against_kornia(settings: Settings) -> list[float]:
    """How many times as fast as Kornia the default path builds views, into reused buffers."""
    if "numba" not in implementations(settings.device):
        raise Skipped("numba is not installed")
    need("kornia")
    batch = 8 if settings.quick else 64
    images, policy = make_images(32, batch, settings.device), policy_for("shift, flip", 32)
    build = ours(images, policy, "numba", reuse=True)
    check_ours(build, images, policy)
    theirs = kornia_one_call(images, policy, torch.get_num_threads())
    return ratios(theirs, build, settings)


def collate_against_torch(kind: str, settings: Settings) -> list[float]:
    """How many times as fast as torch's ``default_collate`` after ``ToTensor`` ours is."""
    generator = np.random.default_rng(0)
    arrays = generator.integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    images: list[Any] = list(arrays)
    if kind == "tensors":
        images = list(torch.from_numpy(arrays))
    elif kind == "PIL images":
        need("PIL", "pip install pillow")
        from PIL import Image

        images = [Image.fromarray(array) for array in arrays]
    rows = list(zip(images, range(64), strict=True))
    as_array: Callable[[Any], Any] = np.array if kind == "PIL images" else np.asarray

    def baseline() -> Any:
        return default_collate([(to_tensor(as_array(image)), label) for image, label in rows])

    (expected, labels), (x, y) = baseline(), collate(rows)
    x = x if kind == "PIL images" else x.permute(0, 3, 1, 2)
    torch.testing.assert_close(x.float() / 255, expected)
    torch.testing.assert_close(y, labels)
    return ratios(baseline, lambda: collate(rows), settings)


def to_tensor(array: Any) -> Tensor:
    """Turn an HWC array of bytes into a CHW tensor in [0, 1], as torchvision's ToTensor does."""
    return torch.from_numpy(array).permute(2, 0, 1).contiguous().float().div(255)


def ratios(theirs: Callable[[], Any], build: Callable[[], Any], settings: Settings) -> list[float]:
    """Time both in turns; return the quotient of the medians, and those of opposite quartiles."""
    timings = time_contenders([Contender("theirs", theirs), Contender("ours", build)], settings)
    slow, fast = timings["theirs"], timings["ours"]
    return [
        slow.low_ms / fast.high_ms,
        slow.median_ms / fast.median_ms,
        slow.high_ms / fast.low_ms,
    ]


def seconds_in_a_new_process(code: str, settings: Settings) -> list[float]:
    """Run code that sets ``began`` in fresh interpreters; return quartiles of the time since."""
    code += "print(time.perf_counter() - began)\n"
    seconds = []
    for _ in range(1 if settings.quick else 5):
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        seconds.append(float(result.stdout))
    return list(quartiles(seconds)[:3])


def run(settings: Settings, tell: Tell) -> list[Row]:
    """Check and time all claims."""
    threads = settings.threads[-1]
    measures: dict[str, Callable[[], list[float]]] = {
        VIEWS: lambda: views_against_kornia(settings),
        **{
            name: lambda kind=kind: collate_against_torch(kind, settings)
            for name, kind in zip(COLLATES, ("arrays", "tensors", "PIL images"), strict=True)
        },
        IMPORT: lambda: seconds_in_a_new_process(IMPORTED, settings),
        DOCTOR: lambda: seconds_in_a_new_process(EXAMINED, settings),
    }
    rows = []
    with cpu_threads(threads), torch.random.fork_rng(devices=[]):
        for name, measure in measures.items():
            tell(name)
            try:
                rows.append(goal_row(CASE, name, measure(), threads, GOALS[name]))
            except Skipped as reason:
                rows.append(skipped_row(CASE, name, threads, str(reason)))
    return rows


if __name__ == "__main__":
    main("claims", run, __doc__)
