"""ResidentLoader: the batches of SemiSupervisedLoader, by gathers and nothing else."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Subset, TensorDataset

from gpu_mixmatch.data import resident
from gpu_mixmatch.data.loader import SemiSupervisedLoader
from gpu_mixmatch.data.resident import ResidentLoader
from gpu_mixmatch.types import SemiSupervisedBatch
from tests.batches import assert_mixmatch_takes, assert_same_loaded, take
from tests.factories import random_images, random_labels

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

IMAGES = random_images(30, (3, 5, 4))
OTHERS = random_images(41, (3, 5, 4), seed=1)
LABELS = random_labels(30, 10)
SPLIT = [3, 17, 4, 28, 9]


def resident_of(batch_size=4, **options):
    return ResidentLoader(IMAGES, LABELS, batch_size, **options)


@pytest.mark.parametrize("options", [{}, {"ratio": 7, "seed": 7}, {"steps_per_epoch": 13}], ids=str)
@pytest.mark.parametrize("ranks", [{}, {"rank": 1, "world_size": 3}], ids=str)
@pytest.mark.parametrize("indices", [None, SPLIT])
@pytest.mark.parametrize("others", [None, OTHERS], ids=["same images", "other images"])
def test_batches_are_those_of_the_other_loader(others, indices, ranks, options):
    labelled = TensorDataset(IMAGES, LABELS)
    semi = SemiSupervisedLoader(
        labelled if indices is None else Subset(labelled, indices),
        IMAGES if others is None else others,
        4,
        **ranks,
        **options,
    )
    loader = resident_of(labelled_indices=indices, unlabelled=others, **ranks, **options)
    assert len(loader) == len(semi)
    assert_same_loaded(take(loader, 30), take(semi, 30))


def test_a_ratio_that_takes_images_twice_is_refused():
    with pytest.raises(ValueError, match=r"at most 7 for batch_size = 4, since .* 30"):
        resident_of(ratio=8)
    assert len(next(iter(resident_of(40))).u) == 40  # a batch that is too large by itself repeats


@pytest.mark.parametrize("stop", [0, 3, resident._STEPS_AT_ONCE, resident._STEPS_AT_ONCE + 9])
def test_state_goes_from_one_loader_to_the_other(stop):
    loader = resident_of(seed=4, steps_per_epoch=100)
    expected = take(resident_of(seed=4, steps_per_epoch=100), stop + 5)[stop:]
    take(loader, stop)
    assert loader.state_dict().items() >= {"seed": 4, "step": stop}.items()
    semi = SemiSupervisedLoader(TensorDataset(IMAGES, LABELS), IMAGES, 4, steps_per_epoch=100)
    semi.load_state_dict(loader.state_dict())
    assert_same_loaded(take(semi, 5), expected)
    again = resident_of()
    again.load_state_dict(semi.state_dict())
    assert_same_loaded(take(again, 2), take(semi, 2))


def test_images_and_labels_are_open():
    loader = resident_of(labelled_indices=SPLIT)
    assert torch.equal(loader.images, IMAGES)
    assert torch.equal(loader.labels, LABELS)
    assert loader.unlabelled is loader.images
    batch = next(iter(loader))
    chosen = torch.tensor(SPLIT)[batch.ids_x]
    assert torch.equal(batch.x, loader.images[chosen])
    assert torch.equal(batch.y, loader.labels[chosen])
    assert torch.equal(batch.u, loader.unlabelled[batch.ids_u])
    assert repr(loader).startswith("ResidentLoader(5 labelled, 30 unlabelled, batch_size=4")


def test_epochs_follow_each_other_and_set_epoch_moves():
    loader = resident_of()
    expected = take(resident_of(), 3 * 7)
    assert len(loader) == 7
    assert_same_loaded(list(loader) + list(loader), expected[:14])
    assert loader.epoch == 2
    loader.set_epoch(1)
    assert_same_loaded(list(loader), expected[7:14])


@pytest.mark.parametrize(
    "kind", ["array", "read-only array", "grey", "NHWC", "int32 labels", "list"]
)
def test_other_kinds_of_data_give_the_same_batches(kind):
    images, labels = IMAGES, LABELS
    if kind == "array":
        images, labels = images.numpy(), labels.numpy()
    elif kind == "read-only array":
        images = images.numpy().copy()
        images.setflags(write=False)
    elif kind == "grey":
        images = images[:, 0]
    elif kind == "NHWC":
        images = images.permute(0, 2, 3, 1).contiguous()
    elif kind == "int32 labels":
        labels = labels.int()
    else:
        labels = labels.tolist()
    loader = ResidentLoader(images, labels, 4)
    for batch, expected in zip(loader, resident_of(), strict=True):
        x, u = expected.x, expected.u
        if kind == "grey":
            x, u = x[:, :1], u[:, :1]
        elif kind == "NHWC":
            x, u = x.permute(0, 2, 3, 1), u.permute(0, 2, 3, 1)
        assert_same_loaded([batch], [expected._replace(x=x, u=u)])


def test_soft_labels_are_kept():
    labels = torch.rand(30, 10, generator=torch.Generator().manual_seed(0))
    batch = next(iter(ResidentLoader(IMAGES, labels, 4)))
    assert torch.equal(batch.y, labels[batch.ids_x])


class Operations(TorchDispatchMode):
    """Notes every operation that is not a view."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("indices", [None, SPLIT])
def test_a_step_is_one_gather_of_each_tensor(indices):
    batches = iter(resident_of(labelled_indices=indices, steps_per_epoch=resident._STEPS_AT_ONCE))
    next(batches)
    with Operations() as operations:
        steps = len(list(batches))
    assert steps == resident._STEPS_AT_ONCE - 1
    assert operations.names == ["index_select"] * 3 * steps


def test_batches_are_gathered_into_tensors_that_are_there():
    expected = take(resident_of(ratio=2, steps_per_epoch=5), 5)
    loader = resident_of(ratio=2, steps_per_epoch=5)
    first = next(batches := iter(loader))
    held = SemiSupervisedBatch(*(torch.empty_like(tensor) for tensor in first))
    loader.gather_into(held)
    for wanted in expected[1:3]:
        with Operations() as operations:
            batch = next(batches)
        assert operations.names == ["index_select"] * 3
        assert all(tensor is there for tensor, there in zip(batch[:3], held[:3], strict=True))
        assert_same_loaded([batch], [wanted])
    loader.gather_into(None)
    kept = [next(batches), next(batches)]
    assert_same_loaded([first, *kept], [expected[0], *expected[3:]])


def test_tensors_that_are_not_like_a_batch_are_not_gathered_into():
    loader = resident_of()
    x, y, u, ids_x, ids_u = next(iter(loader))
    wrong = {
        r"inputs\.x must be \[4, 3, 5, 4\] uint8 on cpu .* \[3, 3, 5, 4\]": (x[:3], y, u),
        r"inputs\.y must be \[4\] int64 on cpu .* int32 on cpu": (x, y.int(), u),
        r"inputs\.u must be .* on cpu like a batch's, got .* on meta": (x, y, u.to("meta")),
    }
    for message, tensors in wrong.items():
        with pytest.raises(ValueError, match=message):
            loader.gather_into(SemiSupervisedBatch(*tensors, ids_x, ids_u))
    with pytest.raises(TypeError, match="inputs must be a SemiSupervisedBatch or None, got"):
        loader.gather_into((x, y, u))


def test_batches_go_into_mixmatch():
    for batch in resident_of():
        assert_mixmatch_takes(batch, num_classes=10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": IMAGES.float()}, r"images must be .* uint8, got \[30, 3, 5, 4\] float32"),
        ({"images": IMAGES[0, 0]}, r"images must be \[N, C, H, W\].* got \[5, 4\] uint8"),
        (
            {"labels": LABELS[:9]},
            r"labels must be \[N\] .* with N = 30 like images, got a tensor \[9\]",
        ),
        ({"unlabelled": OTHERS.int()}, r"unlabelled must be .* got \[41, 3, 5, 4\] int32"),
        (
            {"unlabelled": OTHERS[:, :, 1:]},
            r"unlabelled must be \[M, ...\] with \[3, 5, 4\] like images, got \[41, 3, 4, 4\]",
        ),
        ({"labelled_indices": [0, 30]}, r"labelled_indices must be in 0 .. 29, .* got 0 .. 30"),
        ({"labelled_indices": [-1, 3]}, r"labelled_indices must be in 0 .. 29, .* got -1 .. 3"),
        (
            {"labelled_indices": [0.5]},
            r"labelled_indices must be \[n\] integers, got a tensor \[1\]",
        ),
        ({"labelled_indices": np.ones(30, dtype=bool)}, r"labelled_indices must be \[n\] integers"),
        ({"labelled_indices": []}, "labelled"),
        ({"batch_size": 0}, r"batch_size must be in 1 \.\. 2\*\*24, got 0"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(arguments, message):
    arguments = {"images": IMAGES, "labels": LABELS, "batch_size": 4, **arguments}
    with pytest.raises(ValueError, match=message):
        ResidentLoader(**arguments)


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("indices", [None, SPLIT])
def test_batches_on_cuda_are_those_of_the_cpu_and_nothing_waits(indices):
    options = {"labelled_indices": indices, "unlabelled": OTHERS, "steps_per_epoch": 100}
    expected = list(resident_of(**options))
    loader = resident_of(device="cuda", **options)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = list(loader)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert all(batch.x.is_cuda and batch.y.is_cuda and batch.u.is_cuda for batch in batches)
    assert not any(batch.ids_x.is_cuda or batch.ids_u.is_cuda for batch in batches)
    on_cpu = [SemiSupervisedBatch(*(tensor.cpu() for tensor in batch)) for batch in batches]
    assert_same_loaded(on_cpu, expected)
