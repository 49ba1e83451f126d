"""What engines draw from global generators is keyed, put back, and undisturbed by other threads."""

import multiprocessing
import random
import threading

import numpy as np
import pytest
import torch

from gpu_mixmatch import MixMatch
from gpu_mixmatch._generators import kept_generators, seeded_generators
from tests.batches import assert_same_mixed
from tests.factories import LinearNet, random_data

NUM_CLASSES = 4
SHAPE = (1, 5, 5)
MODEL = LinearNet(NUM_CLASSES, SHAPE)


def with_torch(images):
    return images + torch.rand_like(images)


def with_numpy(images):
    return images + torch.from_numpy(np.random.rand(*images.shape)).float()  # noqa: NPY002


def with_random(images):
    return images + torch.tensor([random.random() for _ in images])[:, None, None, None]


def all_of_them(images):
    return with_torch(with_numpy(with_random(images)))


def batch_of(function, seed=0, builder=None):
    data = random_data(4, 6, SHAPE, num_classes=NUM_CLASSES)
    return (builder or MixMatch(function, NUM_CLASSES, seed=seed))(*data, MODEL)


def drawn():
    """The next draws of every global generator."""
    return [torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.randn(), random.random()]  # noqa: NPY002


@pytest.fixture(autouse=True)
def generators_put_back():
    # not `kept_generators`, which would hold off the threads of a test
    states = torch.get_rng_state(), random.getstate(), np.random.get_bit_generator()
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
    yield
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_bit_generator(states[2])
    np.random.set_state(numpy_state)  # noqa: NPY002


@pytest.mark.parametrize("function", [with_torch, with_numpy, with_random])
def test_batch_is_a_function_of_seed_and_step_whatever_the_generators_hold(function):
    builder = MixMatch(function, NUM_CLASSES)
    first, second = batch_of(function, builder=builder), batch_of(function, builder=builder)
    drawn()
    again = MixMatch(function, NUM_CLASSES)
    assert_same_mixed(batch_of(function, builder=again), first)
    assert_same_mixed(batch_of(function, builder=again), second)
    assert not torch.equal(first.inputs, batch_of(function, seed=1).inputs)
    views = MixMatch(function, NUM_CLASSES, mix="none")
    _, _, u = random_data(4, 6, SHAPE, num_classes=NUM_CLASSES)
    noise = batch_of(function, builder=views).inputs_u - torch.cat([u, u]) / 255
    assert not torch.allclose(noise[:6], noise[6:])  # each view draws anew


def test_generators_go_on_as_if_nothing_had_been_drawn():
    np.random.randn()  # noqa: NPY002  # numpy keeps the second of a pair of normal draws for later
    with kept_generators():
        expected = drawn()
    batch_of(all_of_them)
    assert drawn() == expected


def test_generators_are_put_back_after_an_error():
    def failing(images):
        all_of_them(images)
        raise RuntimeError("out of memory")

    with kept_generators():
        expected = drawn()
    with pytest.raises(RuntimeError, match="out of memory"):
        batch_of(failing)
    assert drawn() == expected


def test_numpy_generator_of_another_kind_is_put_back():
    mine = np.random.PCG64(5)
    np.random.set_bit_generator(mine)
    with kept_generators():
        expected = drawn()
    batch_of(all_of_them)
    assert np.random.get_bit_generator() is mine
    assert drawn() == expected


def test_threads_do_not_disturb_each_other():
    def slow(images):
        for _ in range(20):  # so that threads take turns in the midst of it
            images = all_of_them(images)
        return images

    expected = {seed: batch_of(slow, seed) for seed in (0, 1, 2)}
    differing = []

    def build(seed):
        for _ in range(8):
            batch = batch_of(slow, seed)
            if not torch.equal(batch.inputs, expected[seed].inputs):
                differing.append(seed)

    threads = [threading.Thread(target=build, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not differing


def test_an_engine_within_an_engine_draws_as_alone():
    inner = []

    def outer(images):
        inner.append(batch_of(all_of_them, seed=3).inputs)
        return with_torch(images)

    batch = batch_of(outer, seed=1)
    assert torch.equal(inner[0], batch_of(all_of_them, seed=3).inputs)
    assert torch.equal(batch.inputs, batch_of(with_torch, seed=1).inputs)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_while_another_thread_draws_leaves_the_child_able_to_draw():
    inside, done = threading.Event(), threading.Event()

    def hold():
        with seeded_generators(0):
            inside.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait()
    try:
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        child = context.Process(target=_draw_in_child, args=(results,))
        child.start()
        assert results.get(timeout=20) == random.Random(7).random()
        child.join()
    finally:
        done.set()
        holder.join()


def _draw_in_child(results):
    with seeded_generators(7):
        results.put(random.random())
