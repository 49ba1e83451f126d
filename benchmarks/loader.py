"""From files to views on the device: ``python -m benchmarks.loader [--quick] [--device cuda]``.

JPEG tiles of photographs (`benchmarks.tiles`), in a folder and in a WebDataset tar, are decoded at
32 px and augmented: one view of each labelled and two of each unlabelled image. The bound is an
ideal loader that hands out the same batch again and again. What loaders prefetch is drained before
a block is timed.
"""

import contextlib
import io
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks.common import (
    Contender,
    Row,
    Settings,
    Skipped,
    Tell,
    cpu_threads,
    main,
    need,
    skipped_row,
    timed_rows,
)
from benchmarks.peers import MEAN, NUM_VIEWS, STD, usb_view
from benchmarks.tiles import SIDE, write_tiles
from gpu_mixmatch import DaliLoader, ResidentLoader, SemiSupervisedLoader, WeakAugment
from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch.data.datasets import ImageFiles
from gpu_mixmatch.data.images import ImageIndex, image_folder, open_images

SIZE = 32
PADDING = 4
ENDLESS = 10**9
# between two decoders, in grey levels: DALI's and PIL's JPEG and resize differ by rounding
DECODERS_DIFFER = 3.0


class Sources(NamedTuple):
    """The labelled and the unlabelled images, in a folder and in tars."""

    labelled: ImageIndex
    unlabelled: ImageIndex
    labelled_tar: ImageIndex
    unlabelled_tar: ImageIndex


def make_sources(root: Path) -> Sources:
    """Write the tiles as folders and as tars."""
    need("skimage", "pip install scikit-image")
    need("sklearn", "pip install scikit-learn")
    write_tiles(root)
    folders = image_folder(root / "labelled", labelled=True), image_folder(root / "unlabelled")
    tars = []
    for index, name in zip(folders, ("labelled", "unlabelled"), strict=True):
        tars.append(root / f"{name}.tar")
        _write_tar(index, tars[-1])
    return Sources(*folders, open_images(tars[0], labelled=True), open_images(tars[1]))


def _write_tar(index: ImageIndex, path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for number in range(len(index)):
            files = {"jpg": index.read(number).tobytes()}
            if index.labels is not None:
                files["cls"] = str(int(index.labels[number])).encode()
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


# Views


class PerSample(Dataset[Any]):
    """Images decoded and transformed one by one, as USB's data sets do."""

    def __init__(self, index: ImageIndex, views: int) -> None:
        self.images = ImageFiles(index, SIZE)
        self.views = views
        self.generator = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> list[Tensor]:
        image = self.images[number]
        image = image[0] if isinstance(image, tuple) else image
        view = partial(usb_view, image, generator=self.generator, padding=PADDING)
        return [view() for _ in range(self.views)]


def per_sample(
    sources: Sources, batch: int, workers: int, device: torch.device
) -> Callable[[], Tensor]:
    """Two DataLoaders over `PerSample`, their views concatenated and sent."""
    iterators = []
    for index, views in ((sources.labelled, 1), (sources.unlabelled, NUM_VIEWS)):
        dataset = PerSample(index, views)
        loader = DataLoader(
            dataset,
            batch,
            sampler=RandomSampler(dataset, replacement=True, num_samples=ENDLESS),
            num_workers=workers,
            pin_memory=device.type == "cuda",
        )
        iterators.append(iter(loader))

    def call() -> Tensor:
        (x,), views = map(next, iterators)
        return torch.cat([part.to(device, non_blocking=True) for part in (x, *views)])

    return call


def augmented(batches: Iterator[Any], device: torch.device) -> Callable[[], Tensor]:
    """Build the views of uint8 batches with our engine, into reused buffers."""
    augment = WeakAugment(PADDING, mean=MEAN, std=STD).to(device)
    workspace, steps = Workspace(), count()

    def call() -> Tensor:
        batch = next(batches)
        draws = augment.draw_batch(0, next(steps), len(batch.x), len(batch.u), NUM_VIEWS)
        return augment.build(batch.x, batch.u, draws, NUM_VIEWS, workspace)

    return call


def semi_supervised(
    labelled: ImageIndex, unlabelled: ImageIndex, batch: int, workers: int, device: torch.device
) -> SemiSupervisedLoader:
    """Our loader, whose workers decode by PIL."""
    return SemiSupervisedLoader(
        ImageFiles(labelled, SIZE),
        ImageFiles(unlabelled, SIZE),
        batch,
        steps_per_epoch=ENDLESS,
        num_workers=workers,
        device=device,
    )


def resident(sources: Sources, batch: int, device: torch.device) -> ResidentLoader:
    """Our loader of images that were decoded beforehand."""
    return ResidentLoader(
        ImageFiles(sources.labelled, SIZE).load(),
        sources.labelled.labels,
        batch,
        unlabelled=ImageFiles(sources.unlabelled, SIZE).load(),
        steps_per_epoch=ENDLESS,
        device=device,
    )


def dali(
    labelled: ImageIndex, unlabelled: ImageIndex, batch: int, device: torch.device
) -> DaliLoader:
    """Our loader that decodes by DALI."""
    need("nvidia.dali", 'pip install "gpu-mixmatch[dali]"')
    return DaliLoader(
        labelled,
        unlabelled,
        batch,
        SIZE,
        steps_per_epoch=ENDLESS,
        device_id=(device.index or 0) if device.type == "cuda" else None,
    )


# Checks


def check_loaders(sources: Sources, device: torch.device) -> None:
    """Raise if loaders differ in order, or in pixels by more than their decoders do."""
    batch = 8
    expected = next(iter(resident(sources, batch, device)))
    pairs = (
        (sources.labelled, sources.unlabelled),
        (sources.labelled_tar, sources.unlabelled_tar),
    )
    for pair in pairs:
        came = next(iter(semi_supervised(*pair, batch, 0, device)))
        for name in ("x", "y", "u"):
            torch.testing.assert_close(getattr(came, name), getattr(expected, name))
        with contextlib.suppress(Skipped), dali(*pair, batch, device) as loader:
            came = next(iter(loader))
            torch.testing.assert_close(came.y.to(device), expected.y)
            for name in ("x", "u"):
                theirs, ours = (getattr(b, name).float() for b in (came, expected))
                if not float((theirs - ours).abs().mean()) <= DECODERS_DIFFER:
                    raise ValueError(
                        f"DaliLoader: {name} must be within {DECODERS_DIFFER} grey levels"
                    )
    views = per_sample(sources, batch, 0, device)()
    if views.shape != (3 * batch, 3, SIZE, SIZE) or float(views.abs().max()) > 1.001:
        raise ValueError(f"per-sample views must be normalised rows, got {list(views.shape)}")


# Contenders


def contenders(
    sources: Sources,
    batch: int,
    workers: tuple[int, ...],
    device: torch.device,
    stack: contextlib.ExitStack,
) -> tuple[list[Contender], dict[str, str]]:
    """Return all loaders that can run here, and why the others cannot.

    Those with workers come first: they fork before DALI starts its threads.
    """
    found: list[Contender] = []
    missing: dict[str, str] = {}

    def add(name: str, call: Callable[[], Tensor], ahead: int, note: str) -> None:
        def drain() -> None:
            for _ in range(ahead):
                call()

        drain()  # starts the workers
        found.append(Contender(name, call, note, before_block=drain))

    for number in workers:
        ahead = 2 * number + 1
        loader = semi_supervised(sources.labelled, sources.unlabelled, batch, number, device)
        name = f"SemiSupervisedLoader, JPEG folder, {number} workers"
        add(name, augmented(iter(loader), device), ahead, "PIL decodes; our engine augments")
        name = f"DataLoader, per sample, {number} workers"
        note = "PIL decodes; USB's transforms (PIL), re-expressed, augment"
        add(name, per_sample(sources, batch, number, device), ahead, note)
    number = workers[-1]
    tars = sources.labelled_tar, sources.unlabelled_tar
    loader = semi_supervised(*tars, batch, number, device)
    name = f"SemiSupervisedLoader, WebDataset, {number} workers"
    add(name, augmented(iter(loader), device), 2 * number + 1, "PIL decodes; our engine augments")
    for name, pair in (
        ("DaliLoader, JPEG folder", (sources.labelled, sources.unlabelled)),
        ("DaliLoader, WebDataset", tars),
    ):
        try:
            dali_loader = stack.enter_context(dali(*pair, batch, device))
        except Skipped as reason:
            missing[name] = str(reason)
            continue
        note = "DALI decodes in 2 threads; our engine augments"
        add(name, augmented(iter(dali_loader), device), 4, note)
    in_memory = resident(sources, batch, device)
    note = "decoded beforehand; our engine augments"
    add("ResidentLoader", augmented(iter(in_memory), device), 0, note)
    same = repeat(next(iter(resident(sources, batch, device))))
    add("ideal loader", augmented(same, device), 0, "one batch, replayed; our engine augments")
    return found, missing


def run(settings: Settings, tell: Tell) -> list[Row]:
    """Write the tiles, check the loaders, and time them."""
    batch = 8 if settings.quick else 64
    workers = (0, 2) if settings.quick else (0, 2, 4)
    case = f"JPEG tiles of {SIDE} px at {SIZE} px, {batch} + {batch}"
    # beside workers on all cores, threads that wait for each other slow everything down
    threads = settings.threads[0]
    if not settings.quick:
        seconds = 0.2 if settings.is_cuda else 0.5
        settings = Settings(settings.device, threads=(threads,), rounds=5, block_seconds=seconds)
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.ExitStack() as stack,
        cpu_threads(threads),
        torch.random.fork_rng(devices=[]),
    ):
        tell("writing tiles")
        sources = make_sources(Path(folder))
        tell("checking")
        fields = {"size": SIZE, "batch": batch, "num_rows": (1 + NUM_VIEWS) * batch}
        found, missing = contenders(sources, batch, workers, settings.device, stack)
        check_loaders(sources, settings.device)
        tell(f"{len(found)} loaders")
        rows = timed_rows(case, found, settings, threads, **fields)
    for row in rows:
        row["images_per_s"] = round(1e3 * 2 * batch / row["median_ms"])
    return rows + [skipped_row(case, name, threads, why) for name, why in missing.items()]


if __name__ == "__main__":
    main("loader", run, __doc__)
