"""Strong views by us and by others: ``python -m benchmarks.strong [--quick] [--device cuda]``.

FixMatch's RandAugment behind a shift by an eighth of the size and a flip, with a cutout; colour
jitter; and resized crops. x once and u twice, normalised. First each contender is checked at a
small size: our loops against plain torch and Pillow against them, to the last bit, the others for
views that have the images' colours and differ. Then they are timed. Last come the goals: how many
times as fast as others our fastest path is to be, on one thread.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.augment import EXACT, make_images
from benchmarks.common import (
    Contender,
    Row,
    Settings,
    Skipped,
    Tell,
    cpu_threads,
    goal_row,
    implementations,
    main,
    skipped_row,
    timed_rows,
)
from benchmarks.peers import MEAN, NUM_VIEWS, STD, Images
from benchmarks.strong_peers import (
    AREA,
    ASPECT,
    CROP,
    JITTER,
    RAND_AUGMENT,
    SHIFTS,
    STRENGTHS,
    STRONG_PEERS,
    Effects,
    StrongPeer,
    counted,
    draws_of,
)
from gpu_mixmatch import ColorJitter, RandAugment, WeakAugment
from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch.augment.keyed import KeyedAugment

VARIANTS = "RandAugment's variants"
CHECKED_AT = 32  # pixels
# Times as fast as another on one thread, at least
GOALS: dict[tuple[str, int, str], float] = {
    (RAND_AUGMENT, 32, "Pillow, image by image"): 15,
    (RAND_AUGMENT, 32, "Pillow's operations alone"): 8,
    (RAND_AUGMENT, 32, "Kornia, one call"): 15,
    (RAND_AUGMENT, 32, "torchvision v2, image by image"): 100,
    (RAND_AUGMENT, 224, "Pillow, image by image"): 8,
    (RAND_AUGMENT, 224, "Pillow's operations alone"): 1.8,
    (RAND_AUGMENT, 224, "Kornia, one call"): 40,
    (RAND_AUGMENT, 224, "torchvision v2, image by image"): 12,
    (JITTER, 224, "Kornia, one call"): 30,
    (JITTER, 224, "torchvision v2, image by image"): 12,
    (CROP, 224, "F.interpolate, image by image"): 3.5,
}
# Rates of variants as shares of another's, on one thread, at least
SHARES: tuple[tuple[str, str, float], ...] = (
    ("every slot filled", RAND_AUGMENT, 1 / 1.5),
    ("outside is the mean", RAND_AUGMENT, 1 / 1.35),
    ("channels_last", RAND_AUGMENT, 1 / 1.8),
    (RAND_AUGMENT, "WeakAugment", 1 / 1.4),
)


def source_size(effects: str, size: int) -> int:
    """The size of the images that become views of a size: 256 for 224 in a resized crop."""
    return size * 8 // 7 if effects == CROP else size


def engine_of(effects: str, size: int, impl: str, **fields: Any) -> KeyedAugment:
    """Our engine for some effects; fields are `RandAugment`'s."""
    usual: dict[str, Any] = {"mean": MEAN, "std": STD, "impl": impl}
    if effects == CROP:
        return WeakAugment(0, size=size, area=AREA, aspect=ASPECT, **usual)
    if effects == JITTER:
        return ColorJitter(WeakAugment(0, flip=0.0, **usual), *STRENGTHS)
    return RandAugment.fixmatch(WeakAugment(size // SHIFTS, **usual), outside="black", **fields)


def ours(images: Images, engine: KeyedAugment, *, reuse: bool) -> Callable[[], Tensor]:
    """Return what draws and builds the views of the next step."""
    engine = engine.to(images.x.device)
    workspace = Workspace() if reuse else None

    def build(step: int) -> Tensor:
        return engine.build(*images, draws_of(engine, images, step), NUM_VIEWS, workspace)

    return counted(build)


def check_ours(images: Images, effects: str, impl: str) -> None:
    """Raise if views are not those of the plain implementation on the same draws."""
    engine, plain = (engine_of(effects, CHECKED_AT, name) for name in (impl, "eager"))
    found, wanted = (ours(images, one, reuse=True)() for one in (engine, plain))
    tolerance = EXACT if effects == CROP else 1e-6 if impl == "triton" else 0.0
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)


def check_strong_peer(peer: StrongPeer, images: Images, effects: Effects) -> None:
    """Raise if a peer's views are not ours, or, where it draws itself, no views of the images."""
    engine = engine_of(effects, CHECKED_AT, "eager")
    views = peer.make(images, effects, engine, CHECKED_AT, 1)()
    if isinstance(views, list):  # Pillow's own images
        return
    shape = (images.num_rows, 3, CHECKED_AT, CHECKED_AT)
    if views.shape != shape or views.dtype != torch.float32:
        raise ValueError(f"{peer.name}: views must be float32 {shape}, got {list(views.shape)}")
    if peer.exact:
        tolerance = EXACT if effects == CROP else 1e-6
        wanted = ours(images, engine, reuse=False)()
        torch.testing.assert_close(views, wanted, atol=tolerance, rtol=0)
        return
    low, high = float(views.min()), float(views.max())
    least, most = -MEAN / STD - 0.02, (1 - MEAN) / STD + 0.02
    if not least <= low < high <= most:
        raise ValueError(f"{peer.name}: values must be in {least} .. {most}, got {low} .. {high}")
    first, second = views[len(images.x) :].chunk(NUM_VIEWS)
    if bool((first == second).flatten(1).all(1).any()):
        raise ValueError(f"{peer.name}: two views of an image must differ")


def check_all(device: torch.device, effects: Effects) -> None:
    """Check whatever can run here."""
    images = make_images(source_size(effects, CHECKED_AT), 8, device, seed=1)
    for impl in implementations(device)[1:]:
        check_ours(images, effects, impl)
    for peer in STRONG_PEERS:
        if effects in peer.effects:
            with contextlib.suppress(Skipped):
                check_strong_peer(peer, images, effects)


def contenders(
    images: Images, effects: Effects, size: int, threads: int, case: str
) -> tuple[list[Contender], list[Row]]:
    """Return all that can run here, and the rows of what cannot."""
    found: list[Contender] = []
    skipped: list[Row] = []
    for impl in implementations(images.x.device):
        for reuse in (False, True):
            name = f"ours, {impl}" + (", reused buffers" if reuse else "")
            found.append(Contender(name, ours(images, engine_of(effects, size, impl), reuse=reuse)))
    for peer in STRONG_PEERS:
        if effects not in peer.effects:
            continue
        try:
            engine = engine_of(effects, size, "eager")
            call = peer.make(images, effects, engine, size, threads)
            found.append(Contender(peer.name, call, peer.note))
        except Skipped as reason:
            skipped.append(skipped_row(case, peer.name, threads, str(reason), peer.note))
    return found, skipped


def variants(images: Images, size: int) -> list[Contender]:
    """Our fastest path with other settings, `WeakAugment`, and a copy of as many values."""
    impl = implementations(images.x.device)[-1]
    weak: dict[str, Any] = {"mean": MEAN, "std": STD, "impl": impl, "padding": size // SHIFTS}
    engines: dict[str, KeyedAugment] = {
        RAND_AUGMENT: engine_of(RAND_AUGMENT, size, impl),
        "every slot filled": engine_of(RAND_AUGMENT, size, impl, prob=1.0),
        "outside is the mean": RandAugment.fixmatch(WeakAugment(**weak)),
        "channels_last": RandAugment.fixmatch(
            WeakAugment(**weak, channels_last=True), outside="black"
        ),
        "WeakAugment": WeakAugment(**weak),
    }
    found = [
        Contender(name, ours(images, engine, reuse=True), f"{impl}, reused buffers")
        for name, engine in engines.items()
    ]
    sources = torch.stack(images.sources()).to(images.x.device)
    out = torch.empty(sources.shape, device=images.x.device)
    note = "the views' bytes to float32, no draws"
    return [*found, Contender("copy_", lambda: out.copy_(sources), note)]


def goal_rows(rows: list[Row]) -> list[Row]:
    """What was measured on one thread beside what is wanted."""
    timed = {
        (row["effects"], row["size"], row["contender"]): row
        for row in rows
        if row["threads"] == 1 and "median_ms" in row
    }
    wanted = [
        ((effects, size, "ours, numba, reused buffers"), (effects, size, other), goal)
        for (effects, size, other), goal in GOALS.items()
    ]
    wanted += [
        ((VARIANTS, size, mine), (VARIANTS, size, other), goal)
        for size in (32, 224)
        for mine, other, goal in SHARES
    ]
    found = []
    for mine, theirs, goal in wanted:
        if mine not in timed or theirs not in timed:
            continue
        fast, slow = timed[mine], timed[theirs]
        effects, size, name = mine
        subject = f"{effects}, {size} px" + (f", {name}" if effects == VARIANTS else "")
        low, median, high = (
            slow[over] / fast[under]
            for over, under in (
                ("low_ms", "high_ms"),
                ("median_ms", "median_ms"),
                ("high_ms", "low_ms"),
            )
        )
        text = f"{subject}: times as fast as {theirs[2]}"
        found.append(goal_row("goals", text, (low, median, high), 1, round(goal, 2)))
    return found


def cases(settings: Settings) -> list[tuple[Effects, int, int]]:
    """Effects, size and images per part of each case."""
    if settings.quick:
        return [(RAND_AUGMENT, 32, 8), (JITTER, 32, 8), (CROP, 28, 8)]
    large = 64 if settings.is_cuda else 16
    small: list[tuple[Effects, int, int]] = [(RAND_AUGMENT, 32, 64), (RAND_AUGMENT, 224, large)]
    return [*small, (JITTER, 32, 64), (JITTER, 224, large), (CROP, 224, large)]


def run(settings: Settings, tell: Tell) -> list[Row]:
    """Check, then time all cases."""
    rows: list[Row] = []
    checked: set[str] = set()
    for effects, size, batch in cases(settings):
        if effects not in checked:
            tell(f"checking {effects}")
            with cpu_threads(1), torch.random.fork_rng(devices=[]):
                check_all(settings.device, effects)
            checked.add(effects)
        case = f"{effects}, {size} px, {batch} + {batch}"
        for threads in settings.threads:
            tell(f"{case}, {threads} threads")
            fields = {"effects": effects, "size": size, "batch": batch}
            with cpu_threads(threads), torch.random.fork_rng(devices=[]):
                images = make_images(source_size(effects, size), batch, settings.device)
                fields["num_rows"] = images.num_rows
                found, skipped = contenders(images, effects, size, threads, case)
                rows += timed_rows(case, found, settings, threads, **fields)
                rows += [row | fields for row in skipped]
                if effects == RAND_AUGMENT:
                    fields["effects"] = VARIANTS
                    rows += timed_rows(
                        f"{VARIANTS}, {size} px, {batch} + {batch}",
                        variants(images, size),
                        settings,
                        threads,
                        **fields,
                    )
    return rows + goal_rows(rows)


if __name__ == "__main__":
    main("strong", run, __doc__)
