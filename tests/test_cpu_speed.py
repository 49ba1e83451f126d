"""What the package is for on a CPU: faster than Kornia, and no memory made anew in steady state."""

import gc
import resource
import statistics
import time

import kornia.augmentation as kornia
import numpy as np
import pytest
import torch
from torch import nn

from gpu_mixmatch import AugmentParams, MixMatch, WeakAugment
from gpu_mixmatch._buffers import Workspace
from tests import oracle
from tests.tolerances import TOLERANCES

BATCH, VIEWS = 64, 2
THREADS = 2
# Of what "auto" runs with Numba. Plain torch has shown 6.6 to 9 times on a shared machine, where
# ratios hold to about 30 %.
LEAST_RATIOS = {"numba": 7, "eager": 5}
ATTEMPTS = 6  # the machine has other tenants: the best attempt counts
BLOCKS, CALLS = 9, 50  # a block is long enough for caches to settle: throughput, not latency

# Not 0: the interpreter's arenas and the top of the heap still move by a page now and then, seen at
# up to 0.06 a call. A buffer made anew costs a fault per 4 KiB: 144 for the bytes of these views.
MOST_FAULTS_PER_CALL = 0.5


@pytest.fixture
def set_threads():
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, 3, 32, 32)
    x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    u = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return x, u


def our_builder(x, u, impl="auto"):
    augment, workspace, steps = WeakAugment.cifar10(impl=impl), Workspace(), iter(range(10**9))

    def build():
        draws = augment.draw_batch(0, next(steps), BATCH, BATCH, VIEWS)
        return draws, augment.build(x, u, draws, VIEWS, workspace)

    return build


def kornia_builder(x, u):
    sequence = kornia.AugmentationSequential(
        kornia.RandomCrop((32, 32), padding=4, padding_mode="reflect"),
        kornia.RandomHorizontalFlip(),
        kornia.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    )

    def build():
        views = sequence(torch.cat([x, *[u] * VIEWS]).float() / 255)
        return sequence._params, views

    return build


def kornia_params(recorded):
    """Kornia's draws as ours: the corner of the crop in the padded image, and the flip."""
    crop, flip, _ = (item.data for item in recorded)
    rows = len(crop["src"])
    return AugmentParams(
        top=crop["src"][:, 0, 1].int(),
        left=crop["src"][:, 0, 0].int(),
        flip=flip["batch_prob"].int(),
        zoom=torch.zeros(rows, 4, dtype=torch.int32),
        sigma=torch.zeros(rows),
    )


def test_kornia_does_the_same_work(images):
    x, u = images
    draws, views = our_builder(x, u)()
    sources = torch.cat([x, *[u] * VIEWS])
    policy = {"padding": 4, "padding_mode": "reflect", "blur_radius": 0}
    policy |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    for row in (0, 63, 64, 100, 191):
        params = {"top": int(draws.top[row]), "left": int(draws.left[row])}
        params |= {"flip": int(draws.flip[row]), "zoom": (0, 0, 0, 0), "sigma": 0.0}
        expected = oracle.augment(sources[row].numpy(), params, policy)
        np.testing.assert_allclose(views[row], expected, atol=TOLERANCES[torch.float32], rtol=0)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        recorded, kornia_views = kornia_builder(x, u)()
    params = kornia_params(recorded)
    assert 0 < int(params.flip.sum()) < len(sources)
    assert len(params.top.unique()) == 9
    same = WeakAugment.cifar10().apply((x, u), params)
    torch.testing.assert_close(kornia_views, same, atol=1e-5, rtol=0)


def cores_at_hand():
    """CPU seconds that a multiplication on all threads gets per second of the clock."""
    square = torch.ones(512, 512)
    square @ square  # wakes the threads
    clock, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - clock < 0.1:
        square @ square
    return (time.process_time() - cpu) / (time.perf_counter() - clock)


def is_busy():
    # threads that wait for each other are slowed many times over by one other busy process
    return cores_at_hand() < 0.85 * THREADS


def seconds_of(build):
    start = time.perf_counter()
    for _ in range(CALLS):
        build()
    return (time.perf_counter() - start) / CALLS


@pytest.mark.parametrize(("impl", "least_ratio"), LEAST_RATIOS.items())
def test_views_are_built_several_times_faster_than_by_kornia(
    images, set_threads, capsys, impl, least_ratio
):
    if impl == "numba":
        pytest.importorskip("numba")
    set_threads(THREADS)
    # as a training step does: freed memory then stays in the heap, and fresh views cost no faults.
    # Without it Kornia's are slower by a third, or not, by what ran before in this process
    torch.empty(30 * 2**20, dtype=torch.uint8)
    ours, theirs = our_builder(*images, impl=impl), kornia_builder(*images)
    undisturbed, best = 0, 0.0
    with torch.random.fork_rng(devices=[]):
        for _ in range(ATTEMPTS):
            if is_busy():
                time.sleep(1)
                continue
            seconds_of(theirs), seconds_of(ours)
            blocks = [(seconds_of(theirs), seconds_of(ours)) for _ in range(BLOCKS)]
            kornia_time, our_time = map(statistics.median, zip(*blocks, strict=True))
            best = max(best, kornia_time / our_time)
            undisturbed += not is_busy()
            with capsys.disabled():
                print(
                    f"\n{BATCH * (1 + VIEWS)} views of 3x32x32, {THREADS} threads: Kornia "
                    f"{kornia_time * 1e3:.2f} ms, {impl} {our_time * 1e3:.2f} ms, "
                    f"ratio {kornia_time / our_time:.1f}"
                )
            if best >= least_ratio:
                return
    if not undisturbed:
        pytest.skip(f"other processes keep the {THREADS} cores busy: nothing can be timed")
    assert best >= least_ratio


def faults_per_call(call, calls=200):
    """Fewest minor page faults a call, of a few attempts, after a warm-up."""
    for _ in range(50):
        call()
    gc.collect()
    attempts = []
    for _ in range(ATTEMPTS):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(calls):
            call()
        attempts.append((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls)
        if attempts[-1] <= MOST_FAULTS_PER_CALL:
            break
    return min(attempts)


@pytest.mark.usefixtures("each_cpu_impl")
def test_views_in_a_workspace_cause_no_page_faults(images, set_threads, capsys):
    set_threads(1)  # memory is the same, and other processes do not matter
    faults = faults_per_call(our_builder(*images))
    with capsys.disabled():
        print(f"\nviews in a workspace: {faults:.3f} page faults a call")
    assert faults <= MOST_FAULTS_PER_CALL


@pytest.mark.usefixtures("each_cpu_impl")
def test_batches_in_reused_buffers_cause_no_page_faults(images, set_threads, capsys):
    set_threads(1)
    x, u = images
    y = torch.arange(BATCH) % 10
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    mixmatch = MixMatch(WeakAugment.cifar10(), 10, reuse_buffers=True)

    def step():
        batch = mixmatch(x, y, u, model)
        with torch.no_grad():
            model(batch.inputs)

    faults = faults_per_call(step)
    with capsys.disabled():
        print(f"\nMixMatch with reuse_buffers: {faults:.3f} page faults a call")
    assert faults <= MOST_FAULTS_PER_CALL


def test_fresh_memory_causes_page_faults():
    def fresh():
        # more than the heap keeps, and touched: zeros may come from pages that nobody wrote
        return torch.empty(64 * 2**20, dtype=torch.uint8).fill_(1)

    assert faults_per_call(fresh, calls=5) > MOST_FAULTS_PER_CALL
