"""Measure the engines and the loaders side by side on a CPU, for README's table.

``OMP_NUM_THREADS=1 python -m benchmarks.engines`` checks that contenders agree, then times them in
turns, and writes medians and quartiles to ``benchmarks/results/0.1.0/engines--cpu-2c.json``;
``--quick`` does a little of it, and writes only where ``--out`` says.
``python -m benchmarks.report`` puts the table into README.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import nvidia.dali.experimental.dynamic as ndd
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import gpu_mixmatch
from benchmarks.tiles import photographs
from gpu_mixmatch import DaliLoader, ResidentLoader, SemiSupervisedLoader, WeakAugment
from gpu_mixmatch.augment.kornia_replay import to_kornia
from gpu_mixmatch.data.datasets import ImageFiles
from gpu_mixmatch.data.images import open_images
from gpu_mixmatch.recipes.choices import make_augment

RESULT = Path(__file__).parent / "results" / "0.1.0" / "engines--cpu-2c.json"
SIZES = {32: 64, 96: 64, 224: 16}  # labelled images of a batch by their size in pixels
NUM_VIEWS = 2
NUM_WORKERS = 2  # processes per data set, and threads of DALI that decode
WARM_UP = 6  # batches that loaders may have fetched ahead
BYTES_IN_MEMORY = 60_000_000  # of the images in memory: more than the caches hold
NUM_FILES = 96
LARGEST_DIFFERENCE = 3.0  # in grey levels, mean over pixels, between PIL's and DALI's resizing


class Contender(NamedTuple):
    """What is measured.

    Attributes:
        key: Its name in the JSON.
        label: Its name in the table.
        when: When to take it.
        images: Images, or views, of a batch.
        batch: Builds or fetches a batch.
    """

    key: str
    label: str
    when: str
    images: int
    batch: Callable[[], Any]


def engines(size: int, batch_size: int) -> list[Contender]:
    """The engines on one batch of uint8 images, checked against each other."""
    generator = torch.Generator().manual_seed(size)
    x, u = torch.randint(
        256, (2, batch_size, 3, size, size), dtype=torch.uint8, generator=generator
    )
    weak = WeakAugment(padding=size // 8)
    every = {name: make_augment(name, weak, size, size) for name in ("weak", "dali", "kornia")}
    draws = weak.draw_batch(0, 0, batch_size, batch_size, NUM_VIEWS)
    views = weak.build(x, u, draws, NUM_VIEWS)
    torch.testing.assert_close(
        every["dali"].build(x, u, draws, NUM_VIEWS), views, rtol=0, atol=1e-4
    )
    replay = to_kornia(weak).apply((x, u), draws)  # the engine draws for itself
    torch.testing.assert_close(replay, views, rtol=0, atol=1e-4)

    def build(engine: Any) -> Callable[[], Tensor]:
        steps = itertools.count()

        def batch() -> Tensor:
            drawn = engine.draw_batch(0, next(steps), batch_size, batch_size, NUM_VIEWS)
            return engine.build(x, u, drawn, NUM_VIEWS)

        return batch

    when = {
        "weak": ("`WeakAugment`", "shift, zoom, flip, blur, normalise: the default"),
        "dali": ("`DaliAugment`", "the same views, computed by DALI"),
        "kornia": ("`KorniaAugment`", "any other augmentation: colour, erasing, RandAugment"),
    }
    return [
        Contender(name, *when[name], (1 + NUM_VIEWS) * batch_size, build(engine))
        for name, engine in every.items()
    ]


def loaders(size: int, batch_size: int, folder: Path) -> list[Contender]:
    """The loaders, of images in memory and of JPEG files, checked against each other."""
    count = BYTES_IN_MEMORY // (3 * size * size)
    generator = torch.Generator().manual_seed(size)
    shape = (count, 3, size, size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    whole = TensorDataset(images, torch.arange(count) % 10)
    files = write_jpegs(folder, size)
    labelled = ImageFiles(files, size)
    fields: dict[str, Any] = {"steps_per_epoch": 1_000_000}
    resident = ResidentLoader(*whole.tensors, batch_size, **fields)
    in_memory = {
        workers: SemiSupervisedLoader(whole, whole, batch_size, num_workers=workers, **fields)
        for workers in (0, NUM_WORKERS)
    }
    from_files = {
        workers: SemiSupervisedLoader(labelled, labelled, batch_size, num_workers=workers, **fields)
        for workers in (0, NUM_WORKERS)
    }
    dali = DaliLoader(files, files, batch_size, size, num_threads=NUM_WORKERS, **fields)
    workers = f"{NUM_WORKERS} + {NUM_WORKERS} workers"
    tensors, jpeg = "`SemiSupervisedLoader`, tensors", "`SemiSupervisedLoader`, JPEG by PIL"
    every = [
        ("resident", "`ResidentLoader`", "images that fit into memory", resident),
        ("memory-0", tensors, "tensors among other data sets", in_memory[0]),
        ("memory-2", f"{tensors}, {workers}", "not this: workers cost", in_memory[NUM_WORKERS]),
        ("files-0", jpeg, "any map-style data set", from_files[0]),
        ("files-2", f"{jpeg}, {workers}", "with cores to spare", from_files[NUM_WORKERS]),
        (
            "dali-loader",
            f"`DaliLoader`, JPEG, {NUM_WORKERS} threads",
            "folders, tars, TFRecord; a GPU that decodes",
            dali,
        ),
    ]
    batches = {key: iter(loader) for key, _, _, loader in every}
    check_loaders({key: next(iterator) for key, iterator in batches.items()})

    def fetch(iterator: Iterator[Any]) -> Callable[[], Any]:
        return lambda: next(iterator)

    return [
        Contender(key, label, when, 2 * batch_size, fetch(batches[key]))
        for key, label, when, _ in every
    ]


def check_loaders(batches: dict[str, Any]) -> None:
    """Raise unless the first batches are the same, of files up to the way of resizing."""
    for key in ("memory-0", "memory-2"):
        for mine, theirs in zip(batches[key], batches["resident"], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    for key in ("files-2", "dali-loader"):
        first = batches["files-0"]
        torch.testing.assert_close(batches[key].ids_u, first.ids_u)
        torch.testing.assert_close(batches[key].y, first.y)
        difference = (batches[key].u.float() - first.u.float()).abs().mean()
        if difference > LARGEST_DIFFERENCE:
            raise RuntimeError(f"{key} must give PIL's images, got a difference of {difference}")


def write_jpegs(folder: Path, size: int) -> Any:
    """Cut crops of a quarter more than ``size`` out of photographs; return their index."""
    from PIL import Image

    side = size * 5 // 4
    generator = np.random.default_rng(size)
    for number in range(NUM_FILES):
        name, photograph = list(photographs().items())[number % 6]
        top, left = (generator.integers(length - side + 1) for length in photograph.shape[:2])
        crop = np.ascontiguousarray(photograph[top : top + side, left : left + side])
        path = folder / str(size) / name / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(crop).save(path, quality=90)
    return open_images(folder / str(size), labelled=True)


def rates(contenders: list[Contender], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Time contenders in turns; return thousand images per second of each round."""
    steps = {}
    for contender in contenders:
        for _ in range(WARM_UP):
            contender.batch()
        took = timed(contender, 2) / 2
        steps[contender.key] = max(3, round(seconds / took))
    result: dict[str, list[float]] = {contender.key: [] for contender in contenders}
    for _ in range(rounds):
        for contender in contenders:
            for _ in range(WARM_UP):
                contender.batch()
            number = steps[contender.key]
            rate = number * contender.images / timed(contender, number) / 1000
            result[contender.key].append(rate)
    return result


def timed(contender: Contender, steps: int) -> float:
    """Seconds that some batches take."""
    began = time.perf_counter()
    for _ in range(steps):
        contender.batch()
    return time.perf_counter() - began


def measure(sizes: dict[int, int], rounds: int, seconds: float) -> dict[str, Any]:
    """Measure everything at every size; return what the JSON holds."""
    ndd.set_num_threads(torch.get_num_threads())
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size, batch_size in sizes.items():
            for contenders in (
                engines(size, batch_size),
                loaders(size, batch_size, Path(folder)),
            ):
                for key, values in rates(contenders, rounds, seconds).items():
                    contender = next(each for each in contenders if each.key == key)
                    row = {"key": key, "label": contender.label, "when": contender.when}
                    low, median, high = statistics.quantiles(values, n=4)
                    cell = {"median": median, "low": low, "high": high}
                    rounded = {name: float(f"{value:.4g}") for name, value in cell.items()}
                    rows.setdefault(key, {**row, "cells": []})["cells"].append(rounded)
    threads = torch.get_num_threads()
    return {
        "command": " ".join(["python -m benchmarks.engines", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "device": f"CPU, {os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''}",
        "versions": {
            "gpu_mixmatch": gpu_mixmatch.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("kornia", "nvidia-dali-cuda130", "pillow")},
        },
        "columns": [f"{size} px" for size in sizes],
        "batches": [f"{batch_size} + {batch_size}" for batch_size in sizes.values()],
        "rounds": rounds,
        "rows": list(rows.values()),
    }


def main() -> None:
    """Measure, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="32 px and three short rounds")
    parser.add_argument("--out", type=Path, help=f"the JSON to write; default: {RESULT.name}")
    arguments = parser.parse_args()
    if arguments.quick:
        result = measure({32: 64}, rounds=3, seconds=0.02)
    else:
        result = measure(SIZES, rounds=9, seconds=0.3)
    out = arguments.out or (None if arguments.quick else RESULT)
    text = json.dumps(result, indent=2) + "\n"
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
    for row in result["rows"]:
        cells = "  ".join(f"{cell['median']:8.4g}" for cell in row["cells"])
        print(f"{row['label']:60}{cells}")


if __name__ == "__main__":
    main()
