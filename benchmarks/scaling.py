"""Cost and memory of a batch as it grows: ``python -m benchmarks.scaling [--quick]``.

From 64 + 64 images of 32 px, K = 2 and 10 classes, one number at a time: the batch size, the image
size, K, the classes. Images lie on the device, the model's forward pass is replaced by fixed
logits, and buffers are fresh. Memory is the most that torch holds at once during a call, beside
what it held before.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.augment import make_images, policy_for, weak
from benchmarks.common import (
    Contender,
    Row,
    Settings,
    Skipped,
    Tell,
    cpu_threads,
    implementations,
    main,
    skipped_row,
    timed_rows,
)
from benchmarks.peers import NUM_VIEWS, Images, kornia_module, yu1ut_step
from gpu_mixmatch import MixMatch
from gpu_mixmatch._timing import fixed_logits


class Point(NamedTuple):
    """Shapes of a batch."""

    batch: int = 64
    size: int = 32
    num_views: int = NUM_VIEWS
    classes: int = 10


SWEEPS: dict[str, tuple[int, ...]] = {
    "batch": (16, 32, 64, 128, 256, 512),
    "size": (16, 32, 64, 96, 224),
    "num_views": (1, 2, 4, 8),
    "classes": (10, 100, 1000),
}
TITLES = {
    "batch": "batch size",
    "size": "image size",
    "num_views": "views per image",
    "classes": "classes",
}


def our_batch(point: Point, images: Images, impl: str) -> Callable[[], Any]:
    """Build a batch by us."""
    device = images.x.device
    mixmatch = MixMatch(
        weak(policy_for("shift, flip", point.size), impl),
        point.classes,
        num_augmentations=point.num_views,
        impl=impl,  # type: ignore[arg-type]
    ).to(device)
    y = torch.arange(point.batch, device=device) % point.classes
    guess = fixed_logits(point.num_views * point.batch, point.classes, device)
    return lambda: mixmatch(images.x, y, images.u, guess)


def kornia_batch(point: Point, images: Images) -> Callable[[], Any]:
    """Build a batch by Kornia in one call, and the guess and mix of YU1ut's loop."""
    module = kornia_module(point.size, policy_for("shift, flip", point.size))
    device = images.x.device
    y = torch.arange(point.batch, device=device) % point.classes
    guess = fixed_logits(point.batch, point.classes, device)
    generator = np.random.default_rng(0)
    step = partial(yu1ut_step, generator=generator, num_classes=point.classes)

    def call() -> Any:
        views = module(torch.cat([images.x, *[images.u] * NUM_VIEWS]).float() / 255)
        x, *rest = views.split(point.batch)
        return step(x, y, rest, guess)

    return call


def check_batch(point: Point, call: Callable[[], Any]) -> None:
    """Raise if a batch does not have the shapes of its point, or targets do not sum to one."""
    batch = call()
    inputs = batch.inputs if isinstance(batch.inputs, Tensor) else torch.cat(batch.inputs)
    rows = point.batch * (1 + point.num_views)
    if inputs.shape != (rows, 3, point.size, point.size):
        raise ValueError(f"inputs must have {rows} rows of {point}, got {list(inputs.shape)}")
    torch.testing.assert_close(batch.targets.sum(dim=1), torch.ones_like(batch.targets[:, 0]))


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that torch holds at once during a call, beside what it held before."""
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def points(settings: Settings) -> list[tuple[str, Point]]:
    """The sweeps' points with the name of what grows."""
    if settings.quick:
        return [(name, Point(8)._replace(**{name: 8})) for name in SWEEPS]
    return [
        (name, Point()._replace(**{name: value}))
        for name, values in SWEEPS.items()
        for value in values
    ]


def run(settings: Settings, tell: Tell) -> list[Row]:
    """Check and time all points."""
    rows: list[Row] = []
    threads = settings.threads[-1]
    if not settings.quick:
        settings = Settings(settings.device, threads=(threads,), rounds=5, block_seconds=0.05)
    with cpu_threads(threads), torch.random.fork_rng(devices=[]):
        for sweep, point in points(settings):
            tell(f"{TITLES[sweep]}: {getattr(point, sweep)}")
            rows += _timed_point(settings, sweep, point, threads)
    return rows


def _timed_point(settings: Settings, sweep: str, point: Point, threads: int) -> list[Row]:
    images = make_images(point.size, point.batch, settings.device)
    calls = {
        f"ours, {impl}": our_batch(point, images, impl) for impl in implementations(settings.device)
    }
    case = f"{TITLES[sweep]}: {getattr(point, sweep)}"
    fields: Row = {"sweep": sweep, "at": getattr(point, sweep), "size": point.size}
    fields |= {"batch": point.batch, "num_views": point.num_views, "classes": point.classes}
    fields["num_rows"] = point.batch * (1 + point.num_views)
    skipped = []
    if sweep in ("batch", "size"):  # the peers' loop knows two views
        try:
            calls["Kornia loop"] = kornia_batch(point, images)
        except Skipped as reason:
            skipped.append(skipped_row(case, "Kornia loop", threads, str(reason)) | fields)
    contenders = []
    for name, call in calls.items():
        check_batch(point, call)
        note = "guess and mix as YU1ut's loop" if name.startswith("Kornia") else ""
        extras = {"peak_mb": round(peak_bytes(call, settings.device) / 1e6, 3)}
        contenders.append(Contender(name, call, note, extras))
    return timed_rows(case, contenders, settings, threads, **fields) + skipped


if __name__ == "__main__":
    main("scaling", run, __doc__)
