"""From uint8 in a DataLoader to the batch: ``python -m benchmarks.batch [--quick]``.

End to end, in one process: fetch, collate, send to the device, augment, guess, sharpen, shuffle,
mix. The guess's forward pass is replaced by fixed logits. Ours against the loops of
YU1ut/MixMatch-pytorch and of USB, re-expressed, and a loop with Kornia; page faults per batch;
launches and copies on a GPU (counted on a fake one where there is none); and the builder's share
of a training step of WRN-28-2.
"""

import contextlib
import gc
import resource
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from benchmarks.augment import policy_for, weak
from benchmarks.common import (
    Contender,
    Row,
    Settings,
    Skipped,
    Tell,
    cpu_threads,
    implementations,
    main,
    need,
    skipped_row,
    timed_rows,
)
from benchmarks.peers import (
    MEAN,
    NUM_VIEWS,
    STD,
    Mixed,
    kornia_module,
    usb_step,
    usb_view,
    yu1ut_step,
    yu1ut_view,
)
from gpu_mixmatch import (
    MixMatch,
    MixMatchLoss,
    ResidentLoader,
    SemiSupervisedLoader,
    capture,
    collate,
    functional,
)
from gpu_mixmatch._timing import fixed_logits, time_training_step
from gpu_mixmatch.recipes.models import build_model
from gpu_mixmatch.types import AugmentPolicy, MixUpParams

NUM_CLASSES = 10
ENDLESS = 10**9
ONE_LAMBDA = "one λ per batch"


class Data(NamedTuple):
    """A data set in memory: images ``[n, 3, S, S]`` uint8 and labels ``[n]``, on the CPU."""

    images: Tensor
    labels: Tensor


class Loop(NamedTuple):
    """A way to make batches.

    Attributes:
        name: As tables show it.
        make: ``(data, batch, policy, device)`` to a callable that makes the next batch.
        note: What it does not do equally.
        counted: Whether launches are counted on a fake device.
    """

    name: str
    make: Callable[[Data, int, AugmentPolicy, torch.device], Callable[[], Any]]
    note: str
    counted: bool = True


def make_data(size: int, length: int) -> Data:
    """Noise, with labels in turn."""
    generator = torch.Generator().manual_seed(0)
    shape = (length, 3, size, size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return Data(images, torch.arange(length) % NUM_CLASSES)


def first_logits(images: Tensor) -> Tensor:
    """A model without kernels of its own: a view of the images."""
    return images.flatten(1)[:, :NUM_CLASSES]


def guess_for(batch: int, device: torch.device) -> Callable[[Tensor], Any]:
    """The model that costs nothing; on a fake device one that holds no values."""
    return first_logits if device.type == "meta" else fixed_logits(2 * batch, NUM_CLASSES, device)


# Ours


def our_builder(policy: AugmentPolicy, impl: str, device: torch.device, *, reuse: bool) -> MixMatch:
    """The builder with the engine for a policy."""
    return MixMatch(
        weak(policy, impl),
        NUM_CLASSES,
        reuse_buffers=reuse,
        impl=impl,  # type: ignore[arg-type]
    ).to(device)


def ours_dataloader(
    impl: str, data: Data, batch: int, policy: AugmentPolicy, device: torch.device
) -> Callable[[], Any]:
    """Two plain DataLoaders with our ``collate``, then the builder."""
    mixmatch = our_builder(policy, impl, device, reuse=False)
    guess = guess_for(batch, device)
    batches = _batches(TensorDataset(*data), batch, collate)

    def call() -> Any:
        (x, y), (u, _) = next(batches)
        return mixmatch(x, y, u, guess)

    return call


def ours_loader(
    impl: str, data: Data, batch: int, policy: AugmentPolicy, device: torch.device
) -> Callable[[], Any]:
    """A SemiSupervisedLoader, then the builder with reused buffers."""
    dataset = TensorDataset(*data)
    loader = SemiSupervisedLoader(dataset, dataset, batch, steps_per_epoch=ENDLESS, device=device)
    return _from_loader(iter(loader), our_builder(policy, impl, device, reuse=True), batch)


def ours_resident(
    impl: str, data: Data, batch: int, policy: AugmentPolicy, device: torch.device
) -> Callable[[], Any]:
    """A ResidentLoader, then the builder with reused buffers."""
    loader = ResidentLoader(*data, batch, steps_per_epoch=ENDLESS, device=device)
    return _from_loader(iter(loader), our_builder(policy, impl, device, reuse=True), batch)


def ours_captured(
    impl: str, data: Data, batch: int, policy: AugmentPolicy, device: torch.device
) -> Callable[[], Any]:
    """A ResidentLoader, then the builder as a CUDA graph."""
    if device.type != "cuda":
        raise Skipped("CUDA graphs need a CUDA device")
    loader = ResidentLoader(*data, batch, steps_per_epoch=ENDLESS, device=device)
    batches = iter(loader)
    mixmatch = our_builder(policy, impl, device, reuse=False)
    captured = capture(mixmatch, guess_for(batch, device), *next(batches)[:3])
    loader.gather_into(captured.inputs)

    def call() -> Any:
        return captured(*next(batches)[:3])

    return call


def _from_loader(batches: Iterator[Any], mixmatch: MixMatch, batch: int) -> Callable[[], Any]:
    guess = guess_for(batch, mixmatch.device)

    def call() -> Any:
        x, y, u, *_ = next(batches)
        return mixmatch(x, y, u, guess)

    return call


# Theirs


class TwoViews(Dataset[Any]):
    """A data set whose samples are transformed image by image, ``views`` times."""

    def __init__(self, rows: list[Any], labels: list[int], transform: Any, views: int) -> None:
        self.rows = rows
        self.labels = labels
        self.transform = transform
        self.views = views

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        views = tuple(self.transform(self.rows[index]) for _ in range(self.views))
        return (views[0] if self.views == 1 else views), self.labels[index]


def yu1ut_loop(
    data: Data, batch: int, policy: AugmentPolicy, device: torch.device
) -> Callable[[], Mixed]:
    """Transforms in numpy per sample, DataLoader, guess and mix as YU1ut's ``train.py``."""
    rows = [(image.numpy().astype(np.float32) / 255 - MEAN) / STD for image in data.images]
    return _per_sample_loop(rows, data, yu1ut_view, yu1ut_step, batch, policy, device)


def usb_loop(
    data: Data, batch: int, policy: AugmentPolicy, device: torch.device
) -> Callable[[], Mixed]:
    """Transforms in PIL per sample, DataLoader, guess and mix as USB's ``mixmatch.py``."""
    need("PIL", "pip install pillow")
    from PIL import Image

    rows = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in data.images]
    return _per_sample_loop(rows, data, usb_view, usb_step, batch, policy, device)


def _per_sample_loop(
    rows: list[Any],
    data: Data,
    view: Callable[..., Tensor],
    step: Callable[..., Mixed],
    batch: int,
    policy: AugmentPolicy,
    device: torch.device,
) -> Callable[[], Mixed]:
    generator = np.random.default_rng(0)
    transform = partial(view, generator=generator, padding=policy.padding)
    labels = data.labels.tolist()
    labelled, unlabelled = (TwoViews(rows, labels, transform, views) for views in (1, NUM_VIEWS))
    loaders = _loader(labelled, batch, None), _loader(unlabelled, batch, None)
    batches = zip(*map(iter, loaders), strict=True)
    guess = guess_for(batch, device)

    def call() -> Mixed:
        (x, y), (views, _) = next(batches)
        sent = [view.to(device, non_blocking=True) for view in views]
        return step(x.to(device), y.to(device, non_blocking=True), sent, guess, generator)

    return call


def kornia_loop(
    data: Data, batch: int, policy: AugmentPolicy, device: torch.device
) -> Callable[[], Mixed]:
    """uint8 by torch's default collate, Kornia in one call, guess and mix as YU1ut's loop."""
    module = kornia_module(data.images.shape[-1], policy)
    generator = np.random.default_rng(0)
    batches = _batches(TensorDataset(*data), batch, None)
    guess = guess_for(batch, device)

    def call() -> Mixed:
        (x, y), (u, _) = next(batches)
        x, u = x.to(device), u.to(device)
        x, *views = module(torch.cat([x, *[u] * NUM_VIEWS]).float() / 255).split(batch)
        return yu1ut_step(x, y.to(device), views, guess, generator)

    return call


def _loader(dataset: Any, batch: int, collate_fn: Any) -> DataLoader[Any]:
    # with replacement: an epoch that does not end
    sampler = RandomSampler(dataset, replacement=True, num_samples=ENDLESS)
    return DataLoader(dataset, batch, sampler=sampler, collate_fn=collate_fn, drop_last=True)


def _batches(dataset: Any, batch: int, collate_fn: Any) -> Iterator[Any]:
    labelled, unlabelled = (iter(_loader(dataset, batch, collate_fn)) for _ in range(2))
    return zip(labelled, unlabelled, strict=True)


def loops(device: torch.device) -> list[Loop]:
    """All ways to make batches that are known for a device."""
    found = []
    for impl in implementations(device):
        found += [
            Loop(f"ours, {impl}, DataLoader", partial(ours_dataloader, impl), ""),
            Loop(
                f"ours, {impl}, SemiSupervisedLoader",
                partial(ours_loader, impl),
                "reused buffers",
                counted=False,  # its launches are those of the first
            ),
            Loop(
                f"ours, {impl}, ResidentLoader",
                partial(ours_resident, impl),
                "reused buffers",
                counted=False,
            ),
        ]
        if impl == "triton":
            found.append(
                Loop("ours, triton, captured", partial(ours_captured, impl), "one CUDA graph")
            )
    return [
        *found,
        Loop("Kornia loop", kornia_loop, f"one call; {ONE_LAMBDA}"),
        Loop("YU1ut's loop", yu1ut_loop, f"re-expressed; {ONE_LAMBDA}, last offset never drawn"),
        Loop("USB's loop", usb_loop, f"re-expressed; {ONE_LAMBDA}, groups not interleaved"),
    ]


# Checks


def check_step(step: Callable[..., Mixed]) -> None:
    """Raise if a peer's guess and mix are not our operations with one λ and its partners."""
    batch = 6
    generator = torch.Generator().manual_seed(0)
    x, *views = torch.randn(3, batch, 3, 8, 8, generator=generator)
    y = torch.arange(batch)
    guess = fixed_logits(batch, NUM_CLASSES, torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixed = step(x, y, views, guess, np.random.default_rng(0))
    logits = torch.stack([guess(view) for view in views])
    params = MixUpParams(torch.full((3 * batch,), mixed.lam), mixed.index)
    targets = functional.batch_targets(y, logits, 0.5)
    inputs, targets = functional.mixup(torch.cat([x, *views]), targets, params)
    came = torch.cat(list(mixed.inputs))
    if step is yu1ut_step:  # undo what it interleaves
        came = functional.interleave(came, 3)
    torch.testing.assert_close(came, inputs)
    torch.testing.assert_close(mixed.targets, targets.to(mixed.targets.dtype))
    if not 0.5 <= mixed.lam <= 1:
        raise ValueError(f"λ' must be in [0.5, 1], got {mixed.lam}")


def check_loop(loop: Loop, device: torch.device) -> None:
    """Raise if a loop's batch is not one: shapes, finite values, targets that sum to one."""
    batch, size = 6, 32
    policy = policy_for("shift, flip", size)
    result = loop.make(make_data(size, 2 * batch), batch, policy, device)()
    inputs = result.inputs if isinstance(result.inputs, Tensor) else torch.cat(result.inputs)
    if inputs.shape != (3 * batch, 3, size, size) or not bool(inputs.isfinite().all()):
        raise ValueError(f"{loop.name}: inputs must be finite rows, got {list(inputs.shape)}")
    if float(inputs.min()) < -1.001 or float(inputs.max()) > 1.001:
        raise ValueError(f"{loop.name}: inputs must be normalised to [-1, 1]")
    sums = result.targets.sum(dim=1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


# Numbers


def faults_per_call(call: Callable[[], Any], calls: int) -> float:
    """Minor page faults per call in steady state."""
    for _ in range(max(5, calls // 4)):
        call()
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls


def device_work(call: Callable[[], Any], device: torch.device) -> Row:
    """Launches, copies to the device and waits of one call.

    On a GPU by the profiler. On the fake device whatever reads a value raises, so that a loop that
    gets through reads none; copies within an operation, as for an index on the CPU, are not seen.

    Raises:
        Skipped: If it cannot be counted; the message says why.
    """
    if device.type == "cuda":
        return _profiled(call)
    from benchmarks.launch_counter import LaunchCounter

    # torch does not know autocast of the fake device
    with mock.patch.object(torch, "is_autocast_enabled", return_value=False):
        try:
            call()  # makes the constants
            with LaunchCounter() as counter:
                call()
        except (RuntimeError, NotImplementedError) as error:
            raise Skipped(f"it reads the device: {str(error).splitlines()[0]}") from error
    return {
        "launches": counter.total,
        "copies_to_device": len(counter.copies),
        "bytes_to_device": sum(counter.copies),
        "device_reads": 0,
    }


def _profiled(call: Callable[[], Any]) -> Row:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()  # a wait for the whole device, which is not counted below
    events = profile.events()
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    copies = [e for e in on_device if e.name.startswith("Memcpy HtoD")]
    kernels = [e for e in on_device if not e.name.startswith(("Memcpy", "Memset"))]
    waits = [e for e in events if e.name in ("cudaStreamSynchronize", "cudaEventSynchronize")]
    return {
        "launches": len(kernels),
        "copies_to_device": len(copies),
        "synchronisations": len(waits),
    }


def count_rows(settings: Settings, size: int, batch: int) -> list[Row]:
    """Count the launches of each loop, with and without blur."""
    device = settings.device if settings.is_cuda else torch.device("meta")
    rows = []
    for effects in ("shift, flip", "shift, flip, blur"):
        case = f"launches, {effects}, {size} px, {batch} + {batch}"
        # on the CPU: the kernels are counted by tests, where they are launched
        known = loops(device) if settings.is_cuda else loops(torch.device("cpu"))
        for loop in known:
            if not loop.counted or (not settings.is_cuda and "numba" in loop.name):
                continue
            if "blur" in effects and loop.name in ("YU1ut's loop", "USB's loop"):
                continue
            row: Row = {"case": case, "contender": loop.name, "threads": 1, "note": loop.note}
            try:
                policy = policy_for(effects, size)
                call = loop.make(make_data(size, 2 * batch), batch, policy, device)
                rows.append(row | device_work(call, device))
            except Skipped as reason:
                rows.append(skipped_row(case, loop.name, 1, str(reason), loop.note))
    return rows


def step_rows(settings: Settings) -> list[Row]:
    """Time whole training steps of WRN-28-2, and the builder's share of them."""
    size, batch, device = 32, 4 if settings.quick else 64, settings.device
    threads = settings.threads[-1]
    policy = policy_for("shift, flip", size)
    data = make_data(size, 2 * batch)
    x, u = data.images.to(device).chunk(2)
    y = data.labels[:batch].to(device)
    case = f"training step, WRN-28-2, {size} px, {batch} + {batch}"
    with cpu_threads(threads):
        rows = []
        for impl in implementations(device):
            mixmatch = our_builder(policy, impl, device, reuse=True)
            guess = guess_for(batch, device)
            builder = Contender(f"builder: ours, {impl}", lambda m=mixmatch, g=guess: m(x, y, u, g))
            rows += timed_rows(case, [builder], settings, threads)
        torch.manual_seed(0)
        model = build_model("wrn-28-2", NUM_CLASSES, 3)
        timing = time_training_step(
            model, lambda model: mixmatch(x, y, u, model), MixMatchLoss(), device
        )
    rows.append(
        {"case": case, "contender": "whole step", "threads": threads, "note": f"with {impl}"}
        | timing._asdict()
    )
    for row in rows:
        row["share_percent"] = round(100 * row["median_ms"] / timing.median_ms, 3)
    return rows


def cases(settings: Settings) -> list[tuple[int, int]]:
    """Size, and images per part, of each case."""
    if settings.quick:
        return [(32, 8)]
    return [(32, 64), (96, 64), (224, 64 if settings.is_cuda else 16)]


def run(settings: Settings, tell: Tell) -> list[Row]:
    """Check, time, count, and put it beside a training step."""
    rows = []
    device = settings.device
    with torch.random.fork_rng(devices=[]):
        tell("checking")
        for step in (yu1ut_step, usb_step):
            check_step(step)
        for loop in loops(device):
            with contextlib.suppress(Skipped):
                check_loop(loop, device)
        for size, batch in cases(settings):
            for threads in settings.threads:
                tell(f"{size} px, {threads} threads")
                with cpu_threads(threads):
                    rows += _timed_case(settings, size, batch, threads)
        tell("launches")
        rows += count_rows(settings, *cases(settings)[0])
        tell("training step of WRN-28-2")
        rows += step_rows(settings)
    return rows


def _timed_case(settings: Settings, size: int, batch: int, threads: int) -> list[Row]:
    case = f"batch, {size} px, {batch} + {batch}"
    data = make_data(size, 4 * batch)
    contenders, rows = [], []
    for loop in loops(settings.device):
        try:
            call = loop.make(data, batch, policy_for("shift, flip", size), settings.device)
        except Skipped as reason:
            rows.append(skipped_row(case, loop.name, threads, str(reason), loop.note))
            continue
        extras: Row = {}
        if not settings.is_cuda:  # there the host's memory is not what costs
            faults = faults_per_call(call, 4 if settings.quick else 30)
            extras["faults_per_batch"] = round(faults, 2)
        contenders.append(Contender(loop.name, call, loop.note, extras))
    fields = {"size": size, "batch": batch, "num_rows": (1 + NUM_VIEWS) * batch}
    return timed_rows(case, contenders, settings, threads, **fields) + rows


if __name__ == "__main__":
    main("batch", run, __doc__)
