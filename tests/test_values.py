"""Values from outside: units of images, kinds of logits, constants under casts, hand-made draws."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from gpu_mixmatch import MixMatch, WeakAugment, functional, sampling
from gpu_mixmatch.data.order import BatchOrder
from gpu_mixmatch.types import Geometry, MixUpParams, Scaling
from tests.batches import assert_same_mixed
from tests.factories import LinearNet, PooledNet, random_data, random_images

NUM_CLASSES = 5
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def net():
    return LinearNet(NUM_CLASSES)


def builder(augment=None, **switches):
    return MixMatch(augment or WeakAugment(padding=1), NUM_CLASSES, **switches)


def data(device="cpu"):
    return random_data(shape=(3, 8, 8), num_classes=NUM_CLASSES, device=device)


# The unit of images

ENGINES = {
    "WeakAugment": lambda: WeakAugment(padding=1),
    "callable": lambda: lambda images: images * 2 - 1,
}
UNITS = {
    "bytes": (lambda unit: unit * 255, r"values in 0 .. 255: .* divide them by 255$"),
    "16 bits": (lambda unit: unit * 65535, r"values in .* divide them by 65535$"),
    "normalised": (lambda unit: (unit - 0.45) / 0.22, r"if they are normalised already, .*engine"),
    "in -1 .. 1": (lambda unit: unit * 2 - 1, r"values in -1 .. 1: if they are normalised"),
    "with nan": (lambda unit: unit.index_fill(0, torch.tensor([1]), torch.nan), "values in nan"),
    "with inf": (lambda unit: unit.index_fill(0, torch.tensor([1]), torch.inf), r"values in .*inf"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("engine", ENGINES)
def test_floats_of_another_unit_are_refused_with_what_to_do(engine, unit, dtype):
    change, message = UNITS[unit]
    x, y, u = data()
    x, u = ((images.float() / 255).clamp(0, 1) for images in (x, u))
    x[0, 0, 0, :2] = u[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    good, bad = x.to(dtype), change(x).to(dtype)
    if dtype == torch.bfloat16:
        message = message.replace("65535", "6")  # which it rounds
    for name, given in (("x", (bad, y, u.to(dtype))), ("u", (good, y, change(u).to(dtype)))):
        with pytest.raises(ValueError, match=rf"^{name} must be uint8, or floats in \[0, 1\] .*"):
            builder(ENGINES[engine]())(*given, net())
    weak = WeakAugment(padding=1)
    params = weak.draw(0, 0, len(bad))
    calls = (
        weak.normalize,
        lambda images: weak(images, 0, 0),
        lambda images: weak.apply(images, params),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"^images must be uint8, or floats in \[0, 1\]"):
            call(bad)
    if dtype == torch.float32:
        with pytest.raises(ValueError, match=message):
            weak.normalize(bad)


def test_what_bicubic_resizing_overshoots_is_let_pass():
    corners = torch.zeros(2, 3, 16, 16)
    corners[:, :, ::2, ::2] = 1
    images = nn.functional.interpolate(corners, size=37, mode="bicubic")
    assert images.max() > 1.05
    assert images.min() < -0.05
    assert WeakAugment().normalize(images).isfinite().all()


def test_views_that_are_normalised_already_are_what_from_views_takes():
    x, y, u = (t if t.dtype == torch.int64 else t.float() - 100 for t in data())
    batch = builder(mix="none").from_views(x, y, [u, u], net())
    assert torch.equal(batch.inputs, torch.cat([x, u, u]))
    for name in ("x", "views"):
        bad = {"x": x.clone(), "views": [u, u.clone()]}
        (bad["x"] if name == "x" else bad["views"][1])[1, 0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match=f"^{name} must be finite, got"):
            builder().from_views(bad["x"], y, bad["views"], net())


def test_check_finds_pixels_that_are_not_finite_and_the_rows_that_they_come_from():
    x, y, u = data()
    x, u = x.float(), u.float()
    batch = builder(mix="none").from_views(x, y, [u, u], net())
    batch.check()
    batch.inputs[3, 0, 0, 0], batch.inputs[7, 1, 2, 3] = torch.nan, torch.inf
    with pytest.raises(ValueError, match=r"^inputs must be finite, .* in rows \[3, 7\]\. Bad"):
        batch.check()


def call_often(mixmatch, *arguments, calls=10_000):
    for _ in range(calls):
        mixmatch(*arguments)


@pytest.mark.gpu
@needs_cuda
def test_floats_of_another_unit_on_a_gpu_are_refused_by_a_later_call_and_nothing_waits():
    mixmatch, model = builder().to("cuda"), net().to("cuda")
    x, y, u = data("cuda")
    mixmatch(x, y, u, model)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mixmatch(x.float(), y, u.float(), model)
        with pytest.raises(ValueError, match=r"^x of the first batch must be uint8, or floats"):
            call_often(mixmatch, x.float(), y, u.float(), model)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Probabilities in place of logits


def probabilities(images):
    return net()(images).softmax(dim=-1)


def test_a_model_that_returns_probabilities_is_warned_of_once():
    mixmatch = builder()
    with pytest.warns(UserWarning, match=r"model returns rows that .* probabilities, where logits"):
        mixmatch(*data(), probabilities)
    mixmatch(*data(), probabilities)  # a second warning would be an error
    with pytest.warns(UserWarning, match="probabilities"):
        builder()(*data(), lambda images: probabilities(images).half())


@pytest.mark.parametrize(
    "logits",
    [
        lambda images: net()(images),
        lambda images: net()(images).log_softmax(dim=-1),
        lambda images: net()(images).relu(),
        lambda images: net()(images).sigmoid(),
        lambda images: torch.zeros(len(images), NUM_CLASSES),
    ],
    ids=["logits", "log-probabilities", "relu", "sigmoid", "zeros"],
)
def test_other_logits_are_taken_without_a_word(logits):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        builder()(*data(), logits).check()


@pytest.mark.gpu
@needs_cuda
def test_probabilities_on_a_gpu_are_warned_of_by_a_later_call():
    mixmatch, model = builder().to("cuda"), nn.Sequential(net(), nn.Softmax(-1)).to("cuda")
    with pytest.warns(UserWarning, match="probabilities, where logits"):
        call_often(mixmatch, *data("cuda"), model)


# Constants

CASTS = {
    "bfloat16": lambda module: module.to(torch.bfloat16),
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "copied": copy.deepcopy,
    "pickled": lambda module: pickle.loads(pickle.dumps(module)),
    "meta and back": lambda module: module.to("meta").to_empty(device="cpu"),
    "cast and back": lambda module: module.to(torch.bfloat16).float(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_views_are_the_same_whatever_the_builder_is_cast_to(cast):
    wanted = builder(WeakAugment(**IMAGENET))(*data(), net())
    cast_builder = CASTS[cast](builder(WeakAugment(**IMAGENET)))
    assert_same_mixed(cast_builder(*data(), net()), wanted)
    images = random_images(3)
    normal = CASTS[cast](WeakAugment(**IMAGENET)).normalize(images)
    assert torch.equal(normal, WeakAugment(**IMAGENET).normalize(images))
    assert normal.dtype == torch.float32


@pytest.mark.parametrize("impl", ["eager", "auto"])
@pytest.mark.parametrize("blurs", [False, True])
def test_defaults_of_torch_change_no_batch(blurs, impl):
    x, y, u = data()
    fields = {"blur_sigma": (0.0, 1.0), "zoom_px": (0, 2)} if blurs else {}

    def made():
        mixmatch = builder(WeakAugment(**IMAGENET, **fields, impl=impl), impl=impl)
        return mixmatch.to_empty(device="cpu") if mixmatch.device.type == "meta" else mixmatch

    wanted = made()(x, y, u, net())
    torch.set_default_dtype(torch.float64)
    try:
        model = net().float()
        assert_same_mixed(made()(x, y, u, model), made()(x, y, u, model))
        found = made()(x, y, u, model)
        ramp = functional.linear_rampup(3, 7)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.inputs.dtype == found.targets.dtype == ramp.dtype == torch.float32
    assert torch.equal(found.params.index, wanted.params.index)
    assert torch.equal(ramp, functional.linear_rampup(3, 7))
    model = net()
    with torch.device("meta"):
        mixmatch = made()
        assert mixmatch.step.device.type == "cpu"
        assert_same_mixed(mixmatch(x, y, u, model), wanted)
        assert mixmatch.state_dict()["step"].device.type == "cpu"
        mixmatch.load_state_dict({"seed": 3, "step": 5})
        assert mixmatch.step.device.type == "cpu"


# Numpy's labels and ids


def test_arrays_of_labels_and_ids_give_the_batch_of_tensors():
    x, y, u = data()
    ids = {"ids_x": torch.tensor([3, 1, 9, 7]), "ids_u": torch.arange(6) * 5}
    wanted = builder()(x, y, u, net(), **ids)
    read_only = y.numpy().astype(np.int32)
    read_only.setflags(write=False)
    for kind in (np.int64, np.int32, np.uint8, ">i8"):
        arrays = {name: value.numpy().astype(kind)[::1] for name, value in ids.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            batch = builder()(x, read_only.astype(kind), u, net(), **arrays)
            builder()(x, read_only, u, net())
        assert_same_mixed(batch, wanted)
    soft = nn.functional.one_hot(y, NUM_CLASSES).double().numpy()
    assert_same_mixed(builder()(x, soft, u, net(), **ids), wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"y": [0, 1, 2, 3]},
            r"y must be a tensor or a numpy array of numbers, got \[0, 1, 2, 3\]",
        ),
        ({"y": np.array(["a"] * 4)}, "y must be a tensor or a numpy array of numbers, got a numpy"),
        ({"u": [torch.zeros(6, 3, 8, 8)]}, r"u must be a tensor, got a list of one tensor; unpack"),
        ({"x": np.zeros((4, 3, 8, 8))}, r"x must be a tensor, .* torch.from_numpy makes one"),
        ({"ids_u": [1, 2, 3]}, "ids_u must be a tensor or a numpy array of numbers, got"),
        ({"model": None}, "model must be an nn.Module or a function .* got None"),
        ({"model": PooledNet}, "model must be an nn.Module or a function .* got the class PooledN"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_named_with_what_came(changes, message):
    x, y, u = data()
    with pytest.raises(TypeError, match=f"^{message}"):
        builder()(**{"x": x, "y": y, "u": u, "model": net(), **changes})


# Draws that are made by hand

BAD_DRAWS = {
    "one left for all": (lambda p: {"left": p.left[:1].clone()}, "params.left must be"),
    "one cut for all": (lambda p: {"zoom": p.zoom[:1].clone()}, "params.zoom must be"),
    "cuts as a vector": (lambda p: {"zoom": p.zoom[:, 0].clone()}, "params.zoom must be"),
    "no flip": (lambda p: {"flip": p.flip[:0].clone()}, "params.flip must be"),
    "one sigma": (lambda p: {"sigma": p.sigma[:1].clone()}, "params.sigma must be"),
    "far below": (lambda p: {"top": p.top + 10**6}, r"params.top and params.left must be in 0"),
    "far left": (lambda p: {"left": p.left - 10**6}, r"params.top and params.left must be in 0"),
    "negative cut": (
        lambda p: {"zoom": p.zoom - 9},
        r"params.zoom must be in 0 \.\. 32768, got -9",
    ),
    "cut of a million": (lambda p: {"zoom": p.zoom + 10**6}, "params.zoom must be in 0"),
    "flip of 2": (lambda p: {"flip": p.flip + 2}, r"params.flip must be 0 or 1, got 2"),
    "flip of -1": (lambda p: {"flip": p.flip - 5}, r"params.flip must be 0 or 1, got -5"),
    "sigma of nan": (lambda p: {"sigma": p.sigma * torch.nan}, "params.sigma must be at least 0"),
    "sigma below 0": (lambda p: {"sigma": p.sigma - 9}, "params.sigma must be at least 0"),
    "int64": (lambda p: {"top": p.top.long()}, r"params.top must be \[R\] int32"),
    "float": (lambda p: {"flip": p.flip.float()}, r"params.flip must be \[R\] int32"),
    "double": (lambda p: {"sigma": p.sigma.double()}, r"params.sigma must be \[R\] float32"),
    "no tensor": (lambda p: {"top": p.top.tolist()}, "params.top must be a tensor"),
}


@pytest.mark.parametrize("zooms", [False, True])
@pytest.mark.parametrize("kind", BAD_DRAWS)
@pytest.mark.usefixtures("each_cpu_impl")
def test_draws_that_lead_out_of_an_image_are_refused(kind, zooms):
    fields = {"zoom_px": (0, 2), "blur_sigma": (0.0, 1.0)} if zooms else {}
    engine = WeakAugment(padding=1, **fields)
    params = engine.draw(0, 0, 64)
    changes, message = BAD_DRAWS[kind]
    bad = params._replace(**changes(params))
    mixup = MixUpParams(torch.ones(64), torch.arange(64))
    for mixed in (None, mixup):
        with pytest.raises((TypeError, ValueError), match=message):
            engine.apply(random_images(64), bad, mixup=mixed)


BAD_MIXUP = {
    "partner above": (torch.ones(64), torch.arange(64) + 1),
    "partner far above": (torch.ones(64), torch.arange(64) * 2**40),
    "partner below": (torch.ones(64), torch.arange(64) - 1),
    "weight of 5.7": (torch.full((64,), 5.7), torch.arange(64)),
    "weight below 0": (torch.full((64,), -0.1), torch.arange(64)),
    "weight of nan": (torch.full((64,), torch.nan), torch.arange(64)),
}


@pytest.mark.parametrize("kind", BAD_MIXUP)
@pytest.mark.usefixtures("each_cpu_impl")
def test_partners_and_weights_out_of_range_are_refused(kind):
    params = MixUpParams(*BAD_MIXUP[kind])
    message = r"params.lam must be in \[0, 1\] and params.index in 0 .. N - 1 = 63, got"
    rows, targets = torch.rand(64, 3, 8, 8), torch.rand(64, 5)
    images, draws = random_images(64), sampling.draw_augment(0, 0, 64, 0, padding=1)
    calls = (
        lambda: functional.mixup(rows, targets, params),
        lambda: functional.mixup(rows.half(), targets, params),
        lambda: functional.augment(images, draws, Geometry(1), Scaling(1.0, 0.0), mixup=params),
        lambda: functional.batch_targets(
            torch.zeros(4).long(), torch.rand(2, 30, 5), 0.5, mixup=params
        ),
    )
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


# State and order


@pytest.mark.parametrize("name", ["seed", "step"])
@pytest.mark.parametrize(
    "value",
    [-1, 1.5, True, 2**70, float("nan"), torch.tensor(-1), torch.tensor(0.5), torch.ones(2).long()],
    ids=str,
)
def test_a_state_with_a_number_that_is_none_is_refused_and_changes_nothing(name, value):
    mixmatch = builder(seed=4)
    mixmatch(*data(), net())
    with pytest.raises(RuntimeError, match=f"{name} must be "):
        mixmatch.load_state_dict({**mixmatch.state_dict(), name: value})
    assert {key: int(number) for key, number in mixmatch.state_dict().items()} == {
        "seed": 4,
        "step": 1,
    }


@pytest.mark.parametrize(("length", "size"), [(3, 1000), (1, 50), (7, 7), (7, 13), (40, 100)])
def test_a_batch_of_many_epochs_is_one_permutation_after_the_other(length, size):
    order = BatchOrder(length, length, size, seed=5, rank=1, world_size=3)
    stream = torch.cat(
        [sampling.epoch_order(5, epoch, length) for epoch in range(9 * size // length + 1)]
    )
    wanted = stream[: 9 * size].view(3, 3, size)[:, 1]
    assert torch.equal(order.indices_x(0, 3), wanted)
    assert torch.equal(order.indices_x(2)[0], wanted[2])


def test_a_large_batch_of_a_small_data_set_takes_each_sample_as_often():
    order = BatchOrder(10, 10, 2**20, rank=1, world_size=2)
    counts = order.indices_u(0)[0].bincount(minlength=10)
    assert counts.sum() == 2**20
    assert (counts - 2**20 / 10).abs().max() < 2
