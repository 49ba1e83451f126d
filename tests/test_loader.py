"""SemiSupervisedLoader: keyed order, exact resumption, sharding, and errors instead of hangs."""

import gc
import math
import multiprocessing
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from gpu_mixmatch.data.collate import collate
from gpu_mixmatch.data.loader import SemiSupervisedLoader
from gpu_mixmatch.data.order import BatchOrder
from gpu_mixmatch.data.upload import Upload
from gpu_mixmatch.sampling import epoch_order
from tests.batches import assert_mixmatch_takes, assert_same_loaded, take
from tests.skips import skip_without

# workers are forked from a process that has threads, of which Python 3.12 and later warn
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LABELLED, UNLABELLED = 7, 23


def image_of(index):
    """An image 4 x 5 that tells its index."""
    return np.full((3, 4, 5), index, dtype=np.uint8)


class Images(Dataset):
    """Images that tell their index, which is noted when they are fetched in this process."""

    def __init__(self, length, labels=True, first=0):
        self.length = length
        self.labels = labels
        self.first = first
        self.fetched = []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.fetched.append(index)
        image = image_of(self.first + index)
        return (image, index % 3) if self.labels else image


class Failing(Images):
    """Fails at one index."""

    def __init__(self, length, bad, error):
        super().__init__(length)
        self.bad = bad
        self.error = error

    def __getitem__(self, index):
        if index == self.bad:
            raise self.error
        return super().__getitem__(index)


class Slow(Images):
    """Takes for ever."""

    def __getitem__(self, index):
        time.sleep(60)
        return super().__getitem__(index)


class NoCuda(Images):
    """Fails if CUDA is touched where it is fetched."""

    def __getitem__(self, index):
        def refuse(*args, **kwargs):
            raise AssertionError("a worker must not touch CUDA")

        torch.cuda._lazy_init = refuse
        torch.Tensor.pin_memory = refuse
        return super().__getitem__(index)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())

    def __len__(self):
        return 3


def loader_of(labelled=LABELLED, unlabelled=UNLABELLED, batch_size=4, **options):
    return SemiSupervisedLoader(
        Images(labelled), Images(unlabelled, labels=False, first=100), batch_size, **options
    )


def endless(seed, length, count, view):
    """The first indices of the permutations of all epochs, one after the other."""
    epochs = range(-(count // -length))
    orders = [epoch_order(seed, epoch, length, view=view) for epoch in epochs]
    return torch.cat(orders)[:count]


# What is in a batch


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("ratio", [1, 3])
def test_images_labels_and_ids_belong_together(ratio, num_workers):
    loader = loader_of(ratio=ratio, num_workers=num_workers)
    for batch in take(loader, 2 * len(loader)):
        assert list(batch.x.shape) == [4, 3, 4, 5]
        assert list(batch.u.shape) == [4 * ratio, 3, 4, 5]
        assert batch.x.dtype == batch.u.dtype == torch.uint8
        assert batch.y.dtype == batch.ids_x.dtype == batch.ids_u.dtype == torch.int64
        assert torch.equal(batch.x[:, 0, 0, 0], batch.ids_x.to(torch.uint8))
        assert torch.equal(batch.u[:, 2, 3, 4], (100 + batch.ids_u).to(torch.uint8))
        assert torch.equal(batch.y, batch.ids_x % 3)


def test_order_is_epoch_order_with_views_0_and_1():
    batches = take(loader_of(seed=5, ratio=2), 12)
    ids_x = torch.cat([batch.ids_x for batch in batches])
    ids_u = torch.cat([batch.ids_u for batch in batches])
    assert torch.equal(ids_x, endless(5, LABELLED, 12 * 4, view=0))
    assert torch.equal(ids_u, endless(5, UNLABELLED, 12 * 8, view=1))


def test_the_unlabelled_data_set_sets_the_epoch():
    assert len(loader_of()) == 23 // 4
    assert len(loader_of(ratio=2)) == 23 // 8
    assert len(list(loader_of(ratio=2))) == 2
    assert len(loader_of(unlabelled=3)) == 1


def test_steps_per_epoch_sets_the_epoch_and_changes_no_batch():
    loader = loader_of(steps_per_epoch=9)
    assert len(loader) == len(list(loader)) == 9
    assert loader.epoch == 1
    short = loader_of(steps_per_epoch=2)
    assert_same_loaded(take(loader_of(steps_per_epoch=9), 12), take(short, 12))
    assert short.epoch == 6


def test_every_unlabelled_image_is_seen_once_per_pass():
    seen = torch.cat([batch.ids_u for batch in take(loader_of(), 23)])
    for start in range(0, 4 * 23, 23):
        assert sorted(seen[start : start + 23].tolist()) == list(range(23))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_labelled_set_smaller_than_a_batch_repeats_within_it(num_workers):
    for batch in loader_of(labelled=2, batch_size=5, num_workers=num_workers):
        assert len(batch.x) == 5
        assert {2, 3} >= set(torch.bincount(batch.ids_x, minlength=2).tolist())


def test_an_unlabelled_set_smaller_than_a_batch_repeats_within_it():
    (batch,) = loader_of(unlabelled=2)
    assert sorted(batch.ids_u.tolist()) == [0, 0, 1, 1]


def test_another_seed_gives_another_order():
    one, other = (torch.cat([b.ids_u for b in loader_of(seed=seed)]) for seed in (0, 1))
    assert not torch.equal(one, other)


def test_on_the_cpu_nothing_is_copied():
    kept = []

    def keep(samples):
        kept.append(collate(samples))
        return kept[-1]

    (batch, *_) = loader_of(collate_fn=keep)
    assert {batch.x.data_ptr(), batch.u.data_ptr()} <= {
        (images[0] if isinstance(images, list) else images).data_ptr() for images in kept
    }


def test_ids_are_memory_of_their_own():
    loader = loader_of()
    (first, *_) = loader
    first.ids_x.fill_(-1)
    first.ids_u.fill_(-1)
    again = loader_of()
    assert all((batch.ids_x >= 0).all() and (batch.ids_u >= 0).all() for batch in again)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    take(loader_of(num_workers=1), 3)
    take(loader_of(), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_go_into_mixmatch():
    for batch in loader_of():
        assert_mixmatch_takes(batch, num_classes=3)


# Data sets


IMAGES = np.stack([image_of(index) for index in range(UNLABELLED)])
LABELS = np.arange(LABELLED, dtype=np.int32) % 3


def pil_rows(count, labels):
    image = skip_without("PIL.Image")
    images = [image.fromarray(IMAGES[index].transpose(1, 2, 0)) for index in range(count)]
    return [(i, n % 3) for n, i in enumerate(images)] if labels else images


def hugging_face(count, labels, image="image", label="label"):
    datasets = pytest.importorskip("datasets", reason="needs Hugging Face's datasets")
    rows = {image: [i for i, _ in pil_rows(count, True)]}
    features = {image: datasets.Image()}
    if labels:
        rows |= {label: [n % 3 for n in range(count)], "name": [f"{n}.png" for n in range(count)]}
        features |= {label: datasets.ClassLabel(num_classes=3), "name": datasets.Value("string")}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


PAIRS = {
    "tensor data sets": lambda: (
        TensorDataset(torch.from_numpy(IMAGES[:LABELLED]), torch.from_numpy(LABELS)),
        TensorDataset(torch.from_numpy(IMAGES)),
    ),
    "tensor data set and tensor": lambda: (
        TensorDataset(torch.from_numpy(IMAGES[:LABELLED]), torch.from_numpy(LABELS)),
        torch.from_numpy(IMAGES),
    ),
    "subset and array": lambda: (
        Subset(TensorDataset(torch.from_numpy(IMAGES), torch.arange(UNLABELLED) % 3), range(7)),
        IMAGES,
    ),
    "lists": lambda: (
        [(IMAGES[n], n % 3) for n in range(LABELLED)],
        [(IMAGES[n], None, f"{n}.png") for n in range(UNLABELLED)],
    ),
    "dicts": lambda: (
        [{"image": IMAGES[n], "label": n % 3} for n in range(LABELLED)],
        [{"image": IMAGES[n], "path": f"{n}.png"} for n in range(UNLABELLED)],
    ),
    "PIL": lambda: (pil_rows(LABELLED, True), pil_rows(UNLABELLED, False)),
    "DataLoaders of PIL": lambda: (
        DataLoader(pil_rows(LABELLED, True)),
        DataLoader(pil_rows(UNLABELLED, False)),
    ),
    "Hugging Face": lambda: (hugging_face(LABELLED, True), hugging_face(UNLABELLED, False)),
    "Hugging Face with labels on both": lambda: (
        hugging_face(LABELLED, True),
        hugging_face(UNLABELLED, True),
    ),
    "Hugging Face as torch": lambda: (
        hugging_face(LABELLED, True).with_format("torch"),
        hugging_face(UNLABELLED, True).with_format("torch"),
    ),
    "DataLoaders": lambda: (
        DataLoader([(IMAGES[n], n % 3) for n in range(LABELLED)], batch_size=3, shuffle=True),
        DataLoader(list(IMAGES), batch_size=2, drop_last=True),
    ),
}


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind", PAIRS)
def test_every_kind_of_data_set_gives_the_same_batches(kind, num_workers):
    labelled, unlabelled = PAIRS[kind]()
    loader = SemiSupervisedLoader(labelled, unlabelled, 4, num_workers=num_workers)
    expected = SemiSupervisedLoader(Images(LABELLED), Images(UNLABELLED), 4)
    assert_same_loaded(list(loader), list(expected))


def test_fields_of_dicts_can_have_other_names():
    loader = SemiSupervisedLoader(
        hugging_face(LABELLED, True, "img", "fine_label"),
        hugging_face(UNLABELLED, False, "img"),
        4,
        image="img",
        label="fine_label",
    )
    assert_same_loaded(
        list(loader), list(SemiSupervisedLoader(Images(LABELLED), Images(UNLABELLED), 4))
    )


def test_grey_tensors_get_a_channel_axis():
    images = torch.from_numpy(IMAGES[:, 0])
    loader = SemiSupervisedLoader(TensorDataset(images, torch.arange(23)), images, 4)
    batch = next(iter(loader))
    assert torch.equal(batch.x, images[batch.ids_x][:, None])
    assert torch.equal(batch.u, images[batch.ids_u][:, None])


def test_read_only_arrays_are_taken():
    images = IMAGES.copy()
    images.setflags(write=False)
    loader = SemiSupervisedLoader(Images(LABELLED), images, 4)
    batch = next(iter(loader))
    assert torch.equal(batch.u[:, 0, 0, 0], batch.ids_u.to(torch.uint8))


def test_whole_tensors_are_gathered_and_not_stacked(monkeypatch):
    calls = []
    monkeypatch.setattr(TensorDataset, "__getitem__", lambda *a: calls.append(a))
    labelled = TensorDataset(torch.from_numpy(IMAGES), torch.arange(23))
    assert len(list(SemiSupervisedLoader(labelled, torch.from_numpy(IMAGES), 4))) == 5
    assert not calls


class Batched(Images):
    def __getitem__(self, index):
        raise AssertionError("fetched one by one")

    def __getitems__(self, indices):
        return [(image_of(index), index % 3) for index in indices]


def test_a_data_set_that_fetches_batches_is_asked_for_batches():
    loader = SemiSupervisedLoader(Batched(LABELLED), Batched(UNLABELLED), 4)
    expected = SemiSupervisedLoader(Images(LABELLED), Images(UNLABELLED), 4)
    assert_same_loaded(list(loader), list(expected))


def inverted(samples):
    x, y = collate(samples)
    return 255 - x, y


def test_a_data_loader_brings_its_settings():
    def mark(worker_id):
        torch.marked = True

    labelled = DataLoader(
        Images(LABELLED),
        batch_size=2,
        collate_fn=inverted,
        num_workers=1,
        timeout=50,
        prefetch_factor=3,
        worker_init_fn=mark,
        multiprocessing_context="fork",
    )
    unlabelled = Images(UNLABELLED)
    loader = SemiSupervisedLoader(labelled, unlabelled, 4, timeout=70)
    mine, other = loader._loaders
    assert (mine.num_workers, mine.timeout, mine.prefetch_factor) == (1, 50, 3)
    assert mine.worker_init_fn is mark
    assert mine.multiprocessing_context.get_start_method() == "fork"
    assert mine.persistent_workers
    assert (other.num_workers, other.timeout) == (0, 0)
    batch = next(iter(loader))
    assert torch.equal(255 - batch.x[:, 0, 0, 0], batch.ids_x.to(torch.uint8))
    assert torch.equal(batch.u[:, 0, 0, 0], batch.ids_u.to(torch.uint8))


def test_proxies_are_those_of_the_unlabelled_data_set():
    unlabelled = torch.from_numpy(IMAGES)
    loader = SemiSupervisedLoader(Images(LABELLED), unlabelled, 4, ratio=2, seed=1)
    assert loader.dataset is unlabelled
    batches = [batch.ids_u for batch in loader_of(ratio=2, seed=1)]
    assert type(loader.batch_sampler) is BatchSampler
    assert list(loader.batch_sampler) == [batch.tolist() for batch in batches]
    assert len(loader.batch_sampler) == len(loader) == 2
    assert loader.batch_sampler.batch_size == 8
    assert loader.batch_sampler.drop_last
    assert loader.batch_sampler.sampler is loader.sampler
    assert list(loader.sampler) == torch.cat(batches).tolist()
    assert len(loader.sampler) == 16
    loader.sampler.set_epoch(3)
    assert loader.epoch == 3
    assert "23 unlabelled, batch_size=4, ratio=2" in repr(loader)


# Epochs and state


@pytest.mark.parametrize("num_workers", [0, 2])
def test_epochs_follow_each_other(num_workers):
    loader = loader_of(num_workers=num_workers)
    two = list(loader) + list(loader)
    assert loader.epoch == 2
    assert loader.state_dict().items() >= {"seed": 0, "step": 10}.items()
    assert_same_loaded(two, take(loader_of(), 10))


def test_an_epoch_left_early_is_gone_on_with():
    loader = loader_of(num_workers=1)
    first = take(loader, 3)
    rest = list(loader)
    assert len(rest) == 2
    assert_same_loaded(first + rest, list(loader_of()))


@pytest.mark.parametrize("workers", [(0, 0), (2, 1), (1, 0), (0, 2)])
@pytest.mark.parametrize("stop", [0, 2, 5, 8])
def test_a_resumed_run_gives_the_batches_that_the_first_would_have(stop, workers):
    before, after = workers
    first = loader_of(seed=9, num_workers=before)
    take(first, stop)
    state = first.state_dict()
    assert state.items() >= {"seed": 9, "step": stop}.items()
    second = loader_of(seed=0, num_workers=after)
    second.load_state_dict(state)
    assert_same_loaded(take(second, 6), take(loader_of(seed=9), stop + 6)[stop:])


def test_state_counts_batches_handed_out_and_not_those_fetched_ahead():
    loader = loader_of(num_workers=2)
    for number, _ in enumerate(loader):
        assert loader.state_dict()["step"] == number + 1


def test_a_resumed_run_fetches_nothing_that_it_skips():
    labelled, unlabelled = Images(LABELLED), Images(UNLABELLED)
    loader = SemiSupervisedLoader(labelled, unlabelled, 4)
    loader.load_state_dict({**loader.state_dict(), "step": 3})
    (batch, *_) = loader
    assert labelled.fetched[:4] == batch.ids_x.tolist()
    assert unlabelled.fetched[:4] == batch.ids_u.tolist()
    assert len(unlabelled.fetched) == 2 * 4


def test_set_epoch_goes_to_its_beginning_and_stays_where_it_is_inside():
    loader = loader_of()
    expected = take(loader_of(), 15)
    loader.set_epoch(2)
    assert_same_loaded(take(loader, 3), expected[10:13])
    loader.set_epoch(2)
    assert_same_loaded(list(loader), expected[13:])
    loader.set_epoch(0)
    assert_same_loaded(list(loader), expected[:5])


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    "interrupt",
    [
        lambda loader: iter(loader),
        lambda loader: loader.set_epoch(3),
        lambda loader: loader.load_state_dict({**loader.state_dict(), "step": 1}),
    ],
    ids=["iter", "set_epoch", "load_state_dict"],
)
def test_an_iterator_ends_with_an_error_when_another_takes_over(interrupt, num_workers):
    loader = loader_of(num_workers=num_workers)
    iterator = iter(loader)
    next(iterator)
    interrupt(loader)
    with pytest.raises(RuntimeError, match="this iterator has ended"):
        next(iterator)
    step = loader.state_dict()["step"]
    assert_same_loaded(take(loader, 2), take(loader_of(), step + 2)[step:])


# Ranks


@pytest.mark.parametrize(("labelled", "unlabelled"), [(7, 23), (2, 3), (50, 24)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_make_up_the_batch_of_one_process(world_size, labelled, unlabelled):
    ratio = 1 if unlabelled < 4 else 2  # a greater one may not take samples twice
    sizes = {"labelled": labelled, "unlabelled": unlabelled, "ratio": ratio}
    whole = loader_of(batch_size=2 * world_size, **sizes)
    ranks = [
        loader_of(batch_size=2, rank=rank, world_size=world_size, **sizes)
        for rank in range(world_size)
    ]
    assert {len(loader) for loader in ranks} == {len(whole)}
    shards = [take(loader, 9) for loader in ranks]
    for together, *parts in zip(take(whole, 9), *shards, strict=True):
        for name, expected in together._asdict().items():
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), expected), name


DISTRIBUTED = """
import sys, torch
from torch import distributed
from gpu_mixmatch.data.loader import SemiSupervisedLoader

rank = int(sys.argv[1])
distributed.init_process_group("gloo", f"file://{sys.argv[2]}", rank=rank, world_size=2)
images = torch.zeros(23, 3, 4, 4, dtype=torch.uint8)
data = torch.utils.data.TensorDataset(images, torch.arange(23))
loader = SemiSupervisedLoader(data, images, 2)
print([batch.ids_x.tolist() + batch.ids_u.tolist() for batch in loader])
distributed.destroy_process_group()
"""


def test_ranks_are_those_of_torch_distributed(tmp_path):
    command = [sys.executable, "-c", DISTRIBUTED]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, line in enumerate(printed):
        expected = loader_of(labelled=23, batch_size=2, rank=rank, world_size=2)
        ids = [batch.ids_x.tolist() + batch.ids_u.tolist() for batch in expected]
        assert line.decode().strip() == str(ids)


# Workers


def test_workers_persist_and_end_with_the_loader():
    loader = loader_of(num_workers=1)
    list(loader)
    first = {child.pid for child in multiprocessing.active_children()}
    list(loader)
    take(loader, 2)
    assert {child.pid for child in multiprocessing.active_children()} == first
    assert len(first) == 2
    del loader
    gc.collect()
    assert not first & {child.pid for child in multiprocessing.active_children()}


def test_workers_do_not_touch_cuda():
    loader = SemiSupervisedLoader(NoCuda(LABELLED), NoCuda(UNLABELLED), 4, num_workers=1)
    assert_same_loaded(
        list(loader), list(SemiSupervisedLoader(Images(LABELLED), Images(UNLABELLED), 4))
    )


@pytest.mark.parametrize("stalled", ["labelled", "unlabelled"])
def test_a_timeout_says_which_side_stalled(stalled):
    data = {"labelled": Images(LABELLED), "unlabelled": Images(UNLABELLED)}
    data[stalled] = Slow(len(data[stalled]))
    loader = SemiSupervisedLoader(**data, batch_size=4, num_workers=1, timeout=2)
    start = time.perf_counter()
    with pytest.raises(TimeoutError, match=f"the {stalled} batch of step . did not come within"):
        list(loader)
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("side", ["labelled", "unlabelled"])
def test_an_error_of_a_data_set_says_which_side_and_step_it_is_of(side, num_workers):
    data = {"labelled": Images(LABELLED), "unlabelled": Images(UNLABELLED)}
    order = BatchOrder(LABELLED, UNLABELLED, 4)
    indices = order.indices_x if side == "labelled" else order.indices_u
    bad = int(indices(1)[0, 2])
    data[side] = Failing(len(data[side]), bad, OSError("no such picture"))
    loader = SemiSupervisedLoader(**data, batch_size=4, num_workers=num_workers)
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(OSError, match="no such picture") as caught:
        next(iterator)
    assert caught.value.__notes__ == [f"while the {side} batch of step 1 was fetched"]
    assert loader.state_dict()["step"] == 1
    with pytest.raises(OSError, match="no such picture"):  # a new iterator begins at this batch
        next(iter(loader))


def test_a_dead_worker_is_reported_with_what_was_waited_for():
    def dead():
        raise RuntimeError("DataLoader worker (pid(s) 17) exited unexpectedly")
        yield

    source = loader_of()._sources[1]
    with pytest.raises(
        RuntimeError, match=r"died while the unlabelled batch of step 3 .*pid\(s\) 17"
    ):
        source.next_batch(dead(), 3, 4)


KILLED = """
import os, signal, sys, time
import numpy as np
from gpu_mixmatch.data.loader import SemiSupervisedLoader

class Deadly:
    def __init__(self, flag):
        self.flag = flag
    def __len__(self):
        return 40
    def __getitem__(self, index):
        if index == 11 and not os.path.exists(self.flag):
            open(self.flag, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return np.full((4, 4, 3), index, dtype=np.uint8), index

harmless = [Deadly(os.devnull)[index] for index in range(40)]
data = {"labelled": harmless, "unlabelled": harmless}
data[sys.argv[1]] = Deadly(sys.argv[2])
loader = SemiSupervisedLoader(**data, batch_size=4, num_workers=1)
started = time.perf_counter()
try:
    for batch in loader:
        time.sleep(0.01)
except RuntimeError as error:
    print("RuntimeError after", time.perf_counter() - started, "s:", error)
step = loader.state_dict()["step"]
print("then", step + sum(1 for batch in loader), "batches")
"""


@pytest.mark.parametrize("side", ["labelled", "unlabelled"])
def test_a_killed_worker_gives_an_error_in_seconds_and_the_loader_can_go_on(side, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), side, str(tmp_path / "flag")],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stderr
    error, rest = run.stdout.strip().split("\nthen ")
    assert "worker" in error
    assert float(error.split("after ")[1].split(" s")[0]) < 30
    assert rest == "10 batches"


# Errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, r"batch_size must be in 1 \.\. 2\*\*24, got 0"),
        ({"ratio": 0.5}, TypeError, "ratio must be an integer, got 0.5"),
        ({"ratio": 0}, ValueError, r"ratio must be in 1 \.\. 2\*\*24, got 0"),
        (
            {"ratio": 7},
            ValueError,
            r"ratio must be at most 5 for batch_size = 4, since there are 23",
        ),
        ({"ratio": 2**70}, ValueError, r"ratio must be in 1 \.\. 2\*\*24, got"),
        ({"batch_size": 2**20, "ratio": 2**5}, ValueError, r"ratio · batch_size must be at most"),
        ({"steps_per_epoch": 0}, ValueError, "steps_per_epoch must be in 1 .*, got 0"),
        ({"seed": -1}, ValueError, "seed must be in 0 .* got -1"),
        ({"rank": 0}, ValueError, "rank and world_size must be given together, got 0 and None"),
        ({"rank": 2, "world_size": 2}, ValueError, "rank must be in 0 .. world_size - 1 = 1"),
        ({"labelled": []}, ValueError, "length of the labelled data set must be .* got 0"),
        ({"unlabelled": []}, ValueError, "length of the unlabelled data set must be .* got 0"),
        (
            {"labelled": (IMAGES, LABELS)},
            TypeError,
            "labelled must be a map-style data set.* got tuple; tensors go into TensorDataset",
        ),
        ({"labelled": {"train": []}}, TypeError, "got dict; .* of a dict of splits one is chosen"),
        ({"unlabelled": Stream()}, TypeError, "unlabelled must be a map-style .* got Stream"),
        ({"unlabelled": iter([])}, TypeError, "unlabelled must be .* got list_iterator"),
        (
            {"unlabelled": DataLoader(Stream())},
            TypeError,
            "unlabelled must be a map-style .* got Stream",
        ),
        (
            {"labelled": DataLoader(IMAGES, sampler=WeightedRandomSampler([1.0] * 23, 23))},
            ValueError,
            "labelled must be a DataLoader with .* no sampler .* got WeightedRandomSampler",
        ),
        (
            {
                "labelled": DataLoader(
                    IMAGES, batch_sampler=BatchSampler(SequentialSampler(IMAGES), 2, False)
                ),
                "unlabelled": DataLoader(IMAGES, batch_size=None),
            },
            ValueError,
            "unlabelled must be a DataLoader with batch_size .* got SequentialSampler and NoneType",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    arguments = {
        "labelled": Images(7),
        "unlabelled": Images(23),
        "batch_size": 4,
        **arguments,
    }
    with pytest.raises(error, match=message):
        SemiSupervisedLoader(**arguments)


def short(samples):
    return collate(samples[1:])


@pytest.mark.parametrize(
    ("labelled", "unlabelled", "options", "message"),
    [
        (list(IMAGES), IMAGES, {}, r"labelled samples must be \(image, label\) or dicts, got"),
        (
            [{"img": IMAGES[0], "label": 0}],
            IMAGES,
            {},
            r"labelled samples must have a field 'image', got \['img', 'label'\]: .* image=",
        ),
        ([{"image": IMAGES[0], "y": 0}], IMAGES, {}, r"a field 'label', got .* label=\"...\""),
        (
            [(IMAGES[0], "cat")],
            IMAGES,
            {},
            r"labelled labels must be numbers, got a list of \['str'",
        ),
        ([("a.png", 0)], IMAGES, {}, r"labelled images must be \[n, C, H, W\] .* got a list of"),
        ([(np.zeros(12), 0)], IMAGES, {}, r"images must be .* got a tensor \[4, 12\] float64"),
        (
            Images(7),
            [IMAGES[0], IMAGES[0][:, 1:]],
            {},
            r"samples\[[0-9]\] must be an array \[3, ., 5\] uint8 .* got an array \[3, ., 5\]",
        ),
        (Images(7), Images(23), {"collate_fn": short}, "collate_fn must keep all samples, got 3"),
    ],
    ids=[
        "no label",
        "other image name",
        "other label name",
        "label is text",
        "image is text",
        "image is flat",
        "sizes differ",
        "collate drops",
    ],
)
def test_wrong_samples_are_named(labelled, unlabelled, options, message):
    loader = SemiSupervisedLoader(labelled, unlabelled, 4, **options)
    with pytest.raises(ValueError, match=message):
        list(loader)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"epoch": 1}, ValueError, "state must be of a loader, with seed, step, .* got seed, step"),
        *(
            ({"step": step}, error, rf"state\['step'\] must be {wanted}")
            for step, error, wanted in (
                (-1, ValueError, r"in 0 \.\. 2\*\*32 - 1, got -1"),
                (1.5, TypeError, "an integer, got 1.5"),
                (math.nan, TypeError, "an integer, got nan"),
                (True, TypeError, "an integer, got True"),
                ("1", TypeError, "an integer, got '1'"),
            )
        ),
        ({"seed": 2**63}, ValueError, r"state\['seed'\] must be in 0 \.\. "),
        ({"num_unlabelled": 22}, ValueError, "with num_unlabelled = 23 as here, got 22"),
        ({"num_labelled": 1}, ValueError, "with num_labelled = 7 as here, got 1"),
        ({"labelled_per_step": 8}, ValueError, "with labelled_per_step = 4 as here, got 8"),
    ],
)
def test_a_state_of_something_else_is_refused(changes, error, message):
    loader = loader_of()
    take(loader, 2)
    before = loader.state_dict()
    with pytest.raises(error, match=message):
        loader.load_state_dict({**before, **changes})
    assert loader.state_dict() == before


def test_what_is_no_state_is_refused():
    with pytest.raises(ValueError, match=r"state must be of a loader, with seed, .* got nothing"):
        loader_of().load_state_dict({})
    with pytest.raises(TypeError, match=r"state must be what state_dict\(\) gave, got None"):
        loader_of().load_state_dict(None)


def test_a_state_is_good_for_as_many_processes_as_take_the_same_samples():
    pair = [loader_of(batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    taken = [take(loader, 3) for loader in pair]
    single = loader_of()
    single.load_state_dict(pair[0].state_dict())
    expected = take(loader_of(), 5)
    assert_same_loaded(take(single, 2), expected[3:])
    for halves, whole in zip(zip(*taken, strict=True), expected, strict=False):
        assert torch.equal(torch.cat([half.ids_u for half in halves]), whole.ids_u)
    with pytest.raises(ValueError, match="unlabelled_per_step = 4 as here, got 8"):
        single.load_state_dict(loader_of(ratio=2).state_dict())


@pytest.mark.parametrize("name", ["seed", "step"])
@pytest.mark.parametrize("value", [-1, 2**70, 1.5, True, float("nan"), None, "3"])
def test_a_state_with_a_number_that_is_none_is_refused(name, value):
    loader = loader_of()
    before = loader.state_dict()
    error = ValueError if type(value) is int else TypeError
    with pytest.raises(error, match=rf"^state\['{name}'\] must be "):
        loader.load_state_dict({**before, name: value})
    assert loader.state_dict() == before


@pytest.mark.parametrize("epoch", [-1, 2**70, 1.5, True, float("nan"), None])
def test_an_epoch_that_is_none_is_refused(epoch):
    error = ValueError if type(epoch) is int else TypeError
    with pytest.raises(error, match=r"^epoch must be "):
        loader_of().set_epoch(epoch)


# The way to a device


class Lagging:
    """Stands in for torch.cuda: copies happen when the host waits for them, and not before."""

    def __init__(self):
        self.queued = []  # copies and events of the side stream, in order
        self.waits = []

    def run_until(self, event):
        while event in self.queued:
            done = self.queued.pop(0)
            if callable(done):
                done()

    def event(self):
        lagging = self

        class Event:
            def record(self, stream):
                lagging.queued.append(self)

            def synchronize(self):
                lagging.run_until(self)

        return Event()

    def current_stream(self, device):
        lagging = self

        class Current:
            def wait_event(self, event):
                lagging.waits.append(event)

        return Current()

    @contextmanager
    def stream(self, stream):
        yield

    def to(self, source, non_blocking):
        assert non_blocking
        target = torch.zeros_like(source)
        self.queued.append(lambda: target.copy_(source))
        target.record_stream = lambda stream: None
        return target


def test_no_buffer_is_filled_again_before_its_copy_is_done(monkeypatch):
    lagging = Lagging()
    buffers = []
    empty_like = torch.empty_like

    def pinned_like(tensor, pin_memory):
        assert pin_memory
        buffers.append(empty_like(tensor))
        return buffers[-1]

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "side")
    monkeypatch.setattr(torch.cuda, "Event", lagging.event)
    monkeypatch.setattr(torch.cuda, "stream", lagging.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lagging.current_stream)
    monkeypatch.setattr(torch, "empty_like", pinned_like)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda tensor, device, non_blocking: lagging.to(tensor, non_blocking)
    )
    upload = Upload(torch.device("cpu"))
    expected = take(loader_of(), 10)
    handed_out = []
    for epoch in (expected[:5], expected[5:]):
        for batch in upload(iter(epoch)):
            handed_out.append(batch)
            assert len(lagging.waits) == len(handed_out)
    while lagging.queued:
        lagging.run_until(lagging.queued[-1])
    assert_same_loaded(handed_out, expected)
    assert lagging.waits == upload.copied * 5
    assert len(buffers) == 2 * 3


def test_the_next_batch_is_sent_before_this_one_is_handed_out(monkeypatch):
    sent = []

    class Recorded(Upload):
        def __init__(self):
            pass

        def _send(self, batch):
            sent.append(batch)
            return batch, None

        def _receive(self, batch, copied):
            return batch

    assert [(batch, len(sent)) for batch in Recorded()(iter("abc"))] == [
        ("a", 2),
        ("b", 3),
        ("c", 3),
    ]


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_on_cuda_are_those_of_the_cpu(num_workers):
    expected = take(loader_of(seed=2, ratio=3), 40)
    loader = loader_of(seed=2, ratio=3, num_workers=num_workers, device="cuda")
    weight = torch.rand(2000, 2000, device="cuda")
    for batch, wanted in zip(take(loader, 40), expected, strict=True):
        for _ in range(5):
            weight = (weight @ weight).clamp(0, 1)  # keeps the device behind the host
        assert batch.x.is_cuda
        assert batch.y.is_cuda
        assert batch.u.is_cuda
        assert not batch.ids_x.is_cuda
        for got, right in zip(batch, wanted, strict=True):
            assert torch.equal(got.cpu(), right)


@needs_cuda
@pytest.mark.gpu
def test_pinned_buffers_are_reused_on_cuda():
    loader = loader_of(device="cuda")
    take(loader, 3)
    buffers = [tensor.data_ptr() for slot in loader._upload.buffers for tensor in slot.values()]
    take(loader, 20)
    assert buffers == [t.data_ptr() for slot in loader._upload.buffers for t in slot.values()]
    assert all(t.is_pinned() for slot in loader._upload.buffers for t in slot.values())


def test_a_loader_made_before_the_process_group_is_refused(monkeypatch):
    loader = SemiSupervisedLoader(torch.zeros(8, 3, 4, 4, dtype=torch.uint8), torch.zeros(8), 2)
    given = SemiSupervisedLoader(
        torch.zeros(8, 3, 4, 4, dtype=torch.uint8), torch.zeros(8), 2, rank=0, world_size=1
    )
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="made for rank 0 of 1, got rank 1 of 2"):
        iter(loader)
    assert given.order.steps_left() == range(4)


@pytest.mark.parametrize("part", [0, 1])
def test_collate_fn_that_overwrites_the_labelled_part_is_refused(part):
    memory = torch.zeros(2, 3, 4, 5, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)

    def static(samples):
        batch = list(collate(samples))
        batch[part] = memory[part].copy_(batch[part])
        return batch

    images, labels = memory[0].repeat(2, 1, 1, 1), memory[1].repeat(2)
    datasets = [TensorDataset(images + value, labels) for value in (1, 9)]
    loader = SemiSupervisedLoader(*datasets, 2, collate_fn=static)
    with pytest.raises(ValueError, match=r"collate_fn must return memory of its own .* step 0"):
        next(iter(loader))
    copied = lambda samples: [field.clone() for field in static(samples)]  # noqa: E731
    for batch in SemiSupervisedLoader(*datasets, 2, collate_fn=copied):
        assert (batch.x == 1).all()
        assert (batch.u == 9).all()
