"""Views of a batch by us and by others: ``python -m benchmarks.augment [--quick] [--device cuda]``.

The policy is the same for all: reflect shift-crop by an eighth of the size, flip, normalise, with
and without a Gaussian blur (sigma 0.1 .. 3); and zoom, flip and blur, as a blog post has it. x once
and u twice. First each contender is checked at 32 px: ours against the plain
implementation on the same draws, peers for drawing the right views evenly. Then they are timed.
"""

import contextlib
from collections.abc import Callable
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor

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
from benchmarks.peers import MEAN, NUM_VIEWS, PEERS, SKETCH_PEERS, STD, BuildViews, Images, Peer
from gpu_mixmatch import DaliAugment, WeakAugment, functional
from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch.types import AugmentParams, AugmentPolicy, DrawPlan, MixUpParams

BLUR = (0.1, 3.0)
EXACT = 2e-4  # of equal draws: a fiftieth of a grey level
CHECKED_AT = 32  # pixels
NOTE_DYNAMIC = "our draws as arguments per sample"


def policy_for(effects: str, size: int) -> AugmentPolicy:
    """Return the policy of some effects for images of a size."""
    if effects == "zoom, flip, blur":
        return AugmentPolicy(0, (0, 16), 0.5, (0.0, 3.0))
    return AugmentPolicy(size // 8, (0, 0), 0.5, BLUR if "blur" in effects else None)


def make_images(size: int, batch: int, device: torch.device, seed: int = 0) -> Images:
    """Noise: every window of it is unlike every other."""
    generator = torch.Generator().manual_seed(seed)
    x, u = (
        torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)
        for _ in range(2)
    )
    return Images(x.to(device), u.to(device))


def weak(policy: AugmentPolicy, impl: str, dtype: torch.dtype = torch.float32) -> WeakAugment:
    """Our engine for a policy."""
    return WeakAugment(
        policy.padding,
        zoom_px=policy.zoom_px,
        flip=policy.flip,
        blur_sigma=policy.blur_sigma,
        mean=MEAN,
        std=STD,
        dtype=dtype,
        impl=impl,  # type: ignore[arg-type]
    )


def draw_batch(
    images: Images,
    step: int,
    policy: AugmentPolicy | None,
    impl: str,
    mix: Literal["all", "none"] = "all",
) -> tuple[AugmentParams | None, MixUpParams]:
    """Draw a batch's augmentations, if there is a policy, and its mixing, where they are needed."""
    return functional.draw_batch(
        0,
        torch.tensor(step),
        len(images.x),
        len(images.u),
        DrawPlan(NUM_VIEWS, policy, mix=mix),
        device=images.x.device,
        impl=impl,  # type: ignore[arg-type]
    )


def draws_of(augment: WeakAugment, images: Images, step: int) -> AugmentParams:
    """Draw a batch's augmentations alone."""
    params, _ = draw_batch(images, step, augment.policy, augment.impl, "none")
    assert params is not None
    return params


def ours(
    images: Images, policy: AugmentPolicy, impl: str, *, reuse: bool
) -> Callable[[], tuple[AugmentParams, Tensor]]:
    """Return what draws and builds the views of the next step."""
    augment = weak(policy, impl).to(images.x.device)
    workspace, steps = (Workspace() if reuse else None), count()

    def build() -> tuple[AugmentParams, Tensor]:
        draws = draws_of(augment, images, next(steps))
        return draws, augment.build(*images, draws, NUM_VIEWS, workspace)

    return build


def dali_dynamic(
    images: Images, policy: AugmentPolicy
) -> Callable[[], tuple[AugmentParams, Tensor]]:
    """Return what draws by us and builds the views of the next step by DALI."""
    need("nvidia.dali", 'pip install "gpu-mixmatch[dali]"')
    engine, steps = DaliAugment(weak(policy, "eager")), count()

    def build() -> tuple[AugmentParams, Tensor]:
        draws = engine.draw_batch(0, next(steps), len(images.x), len(images.u), NUM_VIEWS)
        return draws, engine.build(*images, draws, NUM_VIEWS)

    return build


def check_ours(build: Callable[[], Any], images: Images, policy: AugmentPolicy) -> None:
    """Raise if views are not those of the plain implementation on the same draws."""
    draws, views = build()
    device = images.x.device
    expected = weak(policy, "eager").to(device).apply(tuple(images), draws)
    torch.testing.assert_close(views.float(), expected, atol=EXACT, rtol=0)


def check_peer(peer: Peer, device: torch.device, policy: AugmentPolicy) -> None:
    """Raise if a peer's views are not views of the policy, drawn evenly.

    Each view must equal one of the (2·padding + 1)² crops of its image, mirrored or not; with a
    blur, its sigma is held still. Where a peer draws per sample, each offset must come up about
    equally often, and half of the views must be mirrored.
    """
    images = make_images(CHECKED_AT, 64, device, seed=1)
    still = policy._replace(blur_sigma=(1.0, 1.0) if policy.blur_sigma else None)
    views = peer.make(images, still, 1)().cpu()
    if views.shape != (images.num_rows, 3, CHECKED_AT, CHECKED_AT) or views.dtype != torch.float32:
        raise ValueError(f"{peer.name}: views must be float32 rows, got {list(views.shape)}")
    tolerance = peer.tolerance if policy.blur_sigma else 1e-4
    # blurred candidates cost more: every eighth view will do
    checked = range(0, images.num_rows, 8 if policy.blur_sigma else 1)
    found = []
    sources = images.sources()
    for row in checked:
        candidates, draws = _all_views(sources[row], still)
        distance = (candidates - views[row]).abs().amax(dim=(1, 2, 3))
        if not float(distance.min()) <= tolerance:
            raise ValueError(
                f"{peer.name}: view {row} is no view of its image: it differs from the nearest by "
                f"{float(distance.min()):.4f}, allowed are {tolerance}"
            )
        best = int(distance.argmin())
        found.append([int(field[best]) for field in (draws.top, draws.left, draws.flip)])
    _check_even(peer, torch.tensor(found), 2 * policy.padding + int(peer.last_offset))


def _all_views(source: Tensor, policy: AugmentPolicy) -> tuple[Tensor, AugmentParams]:
    """All that a policy can make of an image, and the draws."""
    offsets = torch.arange(2 * policy.padding + 1, dtype=torch.int32)
    top, left, flip = torch.cartesian_prod(offsets, offsets, torch.arange(2, dtype=torch.int32)).T
    count = len(top)
    sigma = torch.full((count,), policy.blur_sigma[0] if policy.blur_sigma else 0.0)
    draws = AugmentParams(top, left, flip, torch.zeros(count, 4, dtype=torch.int32), sigma)
    return weak(policy, "eager").apply(source[None], draws), draws


def _check_even(peer: Peer, draws: Tensor, num_offsets: int) -> None:
    """Raise if tops, lefts or flips ``[n, 3]`` are not evenly drawn."""
    if peer.draws == "batch":
        # x and each view of u are calls of their own
        if any(len(part.unique(dim=0)) != 1 for part in draws.chunk(1 + NUM_VIEWS)):
            raise ValueError(f"{peer.name}: images of a call must share their draw")
        return
    for name, values, bins in (
        ("top", draws[:, 0], num_offsets),
        ("left", draws[:, 1], num_offsets),
        ("flip", draws[:, 2], 2),
    ):
        counts = torch.bincount(values, minlength=bins).double()
        expected = len(values) / bins
        chi_square = float(((counts[:bins] - expected) ** 2 / expected).sum())
        # six standard deviations above the mean of chi-square
        most = bins - 1 + 6 * (2 * (bins - 1)) ** 0.5
        # where 16 are expected, none comes up once in ten million times
        missed = expected >= 16 and bool((counts == 0).any())
        if len(counts) > bins or missed or chi_square > most:
            raise ValueError(
                f"{peer.name}: {name} must be drawn evenly from {bins} values, got counts "
                f"{counts.int().tolist()}"
            )


def check_sketch(peer: Peer, device: torch.device, policy: AugmentPolicy) -> None:
    """Raise if the mean grey level of a sketch's views is not that of their images."""
    images = make_images(CHECKED_AT, 64, device, seed=1)
    views = peer.make(images, policy, 1)().cpu()
    expected = torch.stack(images.sources()).float().mean() / 255 / STD - MEAN / STD
    if views.shape[0] != images.num_rows or abs(float(views.mean() - expected)) > 0.03:
        raise ValueError(f"{peer.name}: views must keep the mean {float(expected):.3f}")


def contenders(
    images: Images, policy: AugmentPolicy, peers: tuple[Peer, ...], threads: int, case: str
) -> tuple[list[Contender], list[Row]]:
    """Return all that can run here, and the rows of what cannot."""
    device = images.x.device
    found: list[Contender] = []
    skipped: list[Row] = []
    for impl in implementations(device):
        for reuse in (False, True):
            name = f"ours, {impl}" + (", reused buffers" if reuse else "")
            found.append(Contender(name, ours(images, policy, impl, reuse=reuse)))

    def add(name: str, note: str, make: Callable[[], BuildViews]) -> None:
        try:
            found.append(Contender(name, make(), note))
        except Skipped as reason:
            skipped.append(skipped_row(case, name, threads, str(reason), note))

    dynamic: Any = lambda: dali_dynamic(images, policy)  # noqa: E731
    add("DALI, dynamic mode (DaliAugment)", NOTE_DYNAMIC, dynamic)
    for peer in peers:
        if peer.blurs or not policy.blur_sigma:
            add(peer.name, peer.note, lambda peer=peer: peer.make(images, policy, threads))
    return found, skipped


def check_all(device: torch.device, effects: str, peers: tuple[Peer, ...]) -> None:
    """Check whatever can run here for some effects."""
    policy = policy_for(effects, CHECKED_AT)
    images = make_images(CHECKED_AT, 8, device, seed=1)
    for impl in implementations(device):
        for reuse in (False, True):
            check_ours(ours(images, policy, impl, reuse=reuse), images, policy)
    with contextlib.suppress(Skipped):
        check_ours(dali_dynamic(images, policy), images, policy)
    check = check_sketch if peers is SKETCH_PEERS else check_peer
    for peer in peers:
        if peer.blurs or not policy.blur_sigma:
            with contextlib.suppress(Skipped):
                check(peer, device, policy)


def cases(settings: Settings) -> list[tuple[str, int, int, tuple[Peer, ...]]]:
    """Effects, size, images per part, and peers of each case."""
    if settings.quick:
        sizes = [(32, 8)]
    else:
        sizes = [(32, 64), (96, 64), (224, 64 if settings.is_cuda else 16)]
    plain = [
        (effects, size, batch, PEERS)
        for effects in ("shift, flip", "shift, flip, blur")
        for size, batch in sizes
    ]
    sketch = [("zoom, flip, blur", size, batch, SKETCH_PEERS) for size, batch in sizes[:2]]
    return plain + sketch


def run(settings: Settings, tell: Tell) -> list[Row]:
    """Check, then time all cases."""
    rows = []
    checked = set()
    for effects, size, batch, peers in cases(settings):
        if effects not in checked:
            tell(f"checking {effects}")
            with cpu_threads(1), torch.random.fork_rng(devices=[]):
                check_all(settings.device, effects, peers)
            checked.add(effects)
        case = f"{effects}, {size} px, {batch} + {batch}"
        for threads in settings.threads:
            tell(f"{case}, {threads} threads")
            with cpu_threads(threads), torch.random.fork_rng(devices=[]):
                images = make_images(size, batch, settings.device)
                found, skipped = contenders(images, policy_for(effects, size), peers, threads, case)
                fields = {
                    "effects": effects,
                    "size": size,
                    "batch": batch,
                    "num_rows": images.num_rows,
                }
                rows += timed_rows(case, found, settings, threads, **fields)
                rows += [row | fields for row in skipped]
    return rows


if __name__ == "__main__":
    main("augment", run, __doc__)
