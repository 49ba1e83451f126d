"""KorniaAugment, and to_kornia: the real Kornia, beside our own arithmetic."""

import random
import sys

import kornia.augmentation as K
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d

from gpu_mixmatch import MixMatch, WeakAugment, as_augment, functional
from gpu_mixmatch.augment.base import Augment
from gpu_mixmatch.augment.kornia import KorniaAugment
from gpu_mixmatch.augment.kornia_replay import to_kornia
from tests.factories import PooledNet, random_images

HALF = {"mean": 0.5, "std": 0.5}
PLAIN = {"mean": 0.0, "std": 1.0}
NUM_CLASSES = 4
FORMATS = {False: torch.contiguous_format, True: torch.channels_last}
# Largest difference between Kornia and functional.augment in float32, the bound of the issue.
REPLAY_ERROR = 1e-5
# Absolute, for values in [-1, 1] through a crop, a flip and a blur in half precision.
HALF_ERROR = {torch.float16: 4e-3, torch.bfloat16: 3e-2}

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Modules are made anew for every test: they remember what they drew last.
WEAK = {
    "AugmentationSequential": lambda: K.AugmentationSequential(
        K.RandomCrop((8, 8), padding=2, padding_mode="reflect"),
        K.RandomHorizontalFlip(),
        K.RandomGaussianBlur((3, 3), (0.1, 2.0), p=1.0),
        data_keys=["input"],
    ),
    "nn.Sequential": lambda: nn.Sequential(
        K.RandomCrop((8, 8), padding=2, padding_mode="reflect"), K.RandomHorizontalFlip()
    ),
    "RandomErasing": lambda: K.RandomErasing(p=1.0),
    "RandomGaussianNoise": lambda: K.RandomGaussianNoise(p=1.0),
    "RandomElasticTransform": lambda: K.RandomElasticTransform((3, 3), p=1.0),
    "smaller": lambda: K.RandomCrop((5, 6)),
}
COLOUR = {
    "ColorJiggle": lambda: K.ColorJiggle(0.2, 0.2, 0.2, 0.1, p=1.0),
    "RandAugment": lambda: K.auto.RandAugment(2, 10),
    "TrivialAugment": lambda: K.auto.TrivialAugment(),
    "ImageSequential": lambda: K.ImageSequential(
        K.ColorJitter(0.2, 0.2, 0.2, 0.1, p=1.0), K.RandomAffine(20.0, p=1.0), random_apply=True
    ),
}
MODULES = {**WEAK, **COLOUR}
SIZES = {"smaller": (5, 6)}

every_module = pytest.mark.parametrize("name", MODULES)


class Recorder(nn.Module):
    """Adds its count of calls to the images, and keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.register_buffer("offset", torch.ones(1))

    def forward(self, images):
        self.seen.append(images.clone())
        return images + len(self.seen)


def images_of(count, seed, channels=3, height=8, width=8):
    return random_images(count, (channels, height, width), seed=seed)


def data_of(num_labelled=3, num_unlabelled=4, **shape):
    y = torch.arange(num_labelled) % NUM_CLASSES
    return images_of(num_labelled, 1, **shape), y, images_of(num_unlabelled, 2, **shape)


def engine_of(name, **fields):
    return KorniaAugment(MODULES[name](), **{**HALF, **fields})


def views_of(engine, x, u, seed=3, step=4, num_views=2, ids_x=None, ids_u=None):
    ids = len(x) if ids_x is None else ids_x, len(u) if ids_u is None else ids_u
    return engine.build(x, u, engine.draw_batch(seed, step, *ids, num_views), num_views)


def step_of(builder, model=None, **shape):
    x, y, u = data_of(**shape)
    return builder(x, y, u, model or PooledNet(NUM_CLASSES, x.shape[1]))


def worst(result, expected):
    assert result.shape == expected.shape
    return float((result.double() - expected.double()).abs().max()) if result.numel() else 0.0


def generators():
    """The state of every global generator on the CPU."""
    return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002


def assert_same_state(state, other):
    assert torch.equal(state[0], other[0])
    for mine, theirs in zip(state[1], other[1], strict=True):
        assert np.array_equal(mine, theirs)
    assert state[2] == other[2]


# What the module is given


@pytest.mark.parametrize("num_views", [1, 2, 3])
@pytest.mark.parametrize("nhwc", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_module_is_called_once_with_all_views_as_unit_floats(channels, nhwc, num_views):
    x, _, u = data_of(channels=channels, height=9)
    module = Recorder()
    engine = KorniaAugment(module, mean=0.25, std=0.5, layout="NHWC" if nhwc else "NCHW")
    given = [images.permute(0, 2, 3, 1).contiguous() if nhwc else images for images in (x, u)]
    views = views_of(engine, *given, num_views=num_views)
    (seen,) = module.seen
    assert seen.dtype == torch.float32
    assert seen.is_contiguous()
    assert torch.equal(seen, torch.cat([x, *[u] * num_views]).float() / 255)
    assert worst(views, (seen + 1 - 0.25) / 0.5) < 1e-6


def test_float_images_are_taken_as_they_are():
    x, _, u = data_of()
    module = Recorder()
    engine = KorniaAugment(module, **HALF)
    views_of(engine, x.float() / 200, u.float() / 200)
    assert torch.equal(module.seen[0], torch.cat([x, u, u]).float() / 200)


@every_module
def test_nhwc_images_give_the_views_of_nchw_ones(name):
    x, _, u = data_of()
    views = views_of(engine_of(name), x, u)
    nhwc = [images.permute(0, 2, 3, 1).contiguous() for images in (x, u)]
    strided = [images.contiguous(memory_format=torch.channels_last) for images in (x, u)]
    assert torch.equal(views_of(engine_of(name), *nhwc), views)
    assert torch.equal(views_of(engine_of(name), *strided), views)


def test_images_are_not_written_to_by_a_module_that_works_in_place():
    x, _, u = (part.float() / 255 if part.dim() > 1 else part for part in data_of())
    before = x.clone(), u.clone()

    class InPlace(nn.Module):
        def forward(self, images):
            return images.sub_(0.5)

    views = views_of(KorniaAugment(InPlace(), **PLAIN), x, u)
    assert torch.equal(x, before[0])
    assert torch.equal(u, before[1])
    assert torch.equal(views, torch.cat([before[0], before[1], before[1]]) - 0.5)


# What it returns


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@every_module
def test_the_memory_format_is_restored_and_changes_no_value(name, channels_last):
    x, _, u = data_of()
    views = views_of(engine_of(name, channels_last=channels_last), x, u)
    assert views.is_contiguous(memory_format=FORMATS[channels_last])
    assert views.is_contiguous() != channels_last
    assert torch.equal(views, views_of(engine_of(name), x, u))


@pytest.mark.parametrize("dtype", HALF_ERROR, ids=str)
@pytest.mark.parametrize("name", ["AugmentationSequential", "nn.Sequential", "smaller"])
def test_half_precision_is_kept_and_near_to_float32(name, dtype):
    x, _, u = data_of()
    views = views_of(engine_of(name, dtype=dtype), x, u)
    assert views.dtype == dtype
    assert worst(views, views_of(engine_of(name), x, u)) < HALF_ERROR[dtype]


@pytest.mark.parametrize("dtype", HALF_ERROR, ids=str)
@every_module
def test_the_module_runs_in_half_precision_and_gives_finite_views(name, dtype):
    x, _, u = data_of()
    engine = engine_of(name, dtype=dtype)
    dtypes = []
    engine.module.register_forward_pre_hook(lambda _, inputs: dtypes.append(inputs[0].dtype))
    views = views_of(engine, x, u)
    assert dtypes == [dtype]
    assert views.dtype == dtype
    assert views.isfinite().all()


def test_autocast_changes_nothing():
    x, _, u = data_of()
    views = views_of(engine_of("AugmentationSequential"), x, u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = views_of(engine_of("AugmentationSequential"), x, u)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, views)


def test_no_gradient_flows_through_a_module_with_parameters():
    x, _, u = data_of()
    module = nn.Conv2d(3, 3, 1)
    assert module(torch.rand(1, 3, 8, 8)).requires_grad
    assert not views_of(KorniaAugment(module, **HALF), x, u).requires_grad


@pytest.mark.parametrize("channels", [1, 3])
def test_mean_and_std_are_applied_per_channel_after_the_module(channels):
    mean, std = (0.1, 0.2, 0.3)[:channels], (0.5, 0.6, 0.7)[:channels]
    x, _, u = data_of(channels=channels)
    engine = KorniaAugment(K.RandomHorizontalFlip(p=1.0), mean=mean, std=std)
    unit = torch.cat([x, u, u]).float().flip(-1) / 255
    as_column = [torch.tensor(values)[:, None, None] for values in (mean, std)]
    assert worst(views_of(engine, x, u), (unit - as_column[0]) / as_column[1]) < 1e-6


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_ERROR], ids=str)
def test_evaluation_normalises_as_the_views_and_as_weak_augment_do(dtype, channels_last):
    fields = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    fields |= {"dtype": dtype, "channels_last": channels_last}
    x, _, u = data_of()
    engine = KorniaAugment(nn.Identity(), **fields)
    images = torch.cat([x, u])
    normal = engine.normalize(images)
    assert torch.equal(normal, WeakAugment(**fields).normalize(images))
    assert normal.is_contiguous(memory_format=FORMATS[channels_last])
    assert worst(normal, views_of(engine, x, u, num_views=1)) < HALF_ERROR.get(dtype, 1e-6)
    assert torch.equal(normal, engine.normalize(images.permute(0, 2, 3, 1).contiguous()))


def test_one_view_of_a_batch_is_the_labelled_part_without_unlabelled_images():
    x = images_of(5, 1)
    engine = engine_of("AugmentationSequential")
    alone = engine(x, 3, 4)
    assert torch.equal(alone, views_of(engine, x, x[:0], num_views=0))
    assert torch.equal(alone, engine(x, 3, 4))
    assert not torch.equal(alone, engine(x, 3, 5))


# Randomness


@every_module
def test_views_are_a_function_of_seed_and_step_whatever_the_global_state(name):
    x, _, u = data_of()
    state = generators()
    try:
        torch.default_generator.manual_seed(0)
        views = [views_of(engine_of(name), x, u, step=step) for step in range(4)]
        torch.default_generator.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        random.seed(1)
        engine = engine_of(name)  # one module for all steps, and backwards
        again = [views_of(engine, x, u, step=step) for step in reversed(range(4))]
    finally:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])  # noqa: NPY002
        random.setstate(state[2])
    for view, other in zip(views, reversed(again), strict=True):
        assert torch.equal(view, other)
    for step, view in enumerate(views[1:], 1):
        assert not torch.equal(view, views[step - 1])
    assert not torch.equal(views_of(engine, x, u, seed=4, step=0), views[0])


@every_module
def test_the_global_generators_are_left_as_they_were(name):
    x, _, u = data_of()
    state = generators()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        expected = torch.rand(6)
        torch.default_generator.manual_seed(0)
        first = torch.rand(3)
        views_of(engine_of(name), x, u)
        assert torch.equal(torch.cat([first, torch.rand(3)]), expected)
    assert_same_state(state, generators())


def test_a_module_that_raises_leaves_the_global_generators_as_they_were():
    class Fails(nn.Module):
        def forward(self, images):
            torch.rand(3)
            raise RuntimeError("no view today")

    x, _, u = data_of()
    state = generators()
    with pytest.raises(RuntimeError, match="no view today"):
        views_of(KorniaAugment(Fails(), **HALF), x, u)
    assert_same_state(state, generators())


@pytest.mark.parametrize("name", ["AugmentationSequential", "RandomErasing", "ColorJiggle"])
def test_every_row_is_drawn_for_itself(name):
    image = images_of(1, 1, height=24, width=24)  # large enough not to draw alike by chance
    views = views_of(engine_of(name), image.expand(4, -1, -1, -1), image.expand(4, -1, -1, -1))
    for row in range(1, len(views)):
        assert not torch.equal(views[row], views[row - 1])


def test_ranks_with_other_positions_do_not_draw_alike():
    x, _, u = data_of()
    engine = engine_of("AugmentationSequential")
    first = views_of(engine, x, u)
    positions = torch.arange(len(x)), torch.arange(len(u))
    assert torch.equal(first, views_of(engine, x, u, ids_x=positions[0], ids_u=positions[1]))
    seeds = {
        engine.draw_batch(3, 4, positions[0] + rank * len(x), positions[1] + rank * len(u), 2)
        for rank in range(64)
    }
    assert len(seeds) == 64
    second = views_of(engine, x, u, ids_x=positions[0] + len(x), ids_u=positions[1] + len(u))
    assert not torch.equal(first, second)


def test_the_first_id_of_x_and_that_of_u_enter_and_no_other():
    engine = engine_of("RandomErasing")

    def drawn(x, u, step=0):
        return engine.draw_batch(7, step, torch.tensor(x), torch.tensor(u), 2)

    seeds = [
        drawn(*ids)
        for ids in (
            ([0, 1], [0, 1]),
            ([1, 0], [0, 1]),
            ([0, 1], [1, 0]),
            ([1, 0], [1, 0]),
            ([2**32, 1], [0, 1]),
            ([0, 1], [2**63 - 1, 1]),
        )
    ]
    assert len({*seeds, drawn([0, 1], [0, 1], step=1)}) == len(seeds) + 1
    assert drawn([0, 5], [0, 6, 7]) == seeds[0] == engine.draw_batch(7, 0, 9, 0, 1)
    assert all(0 <= seed < 2**64 for seed in seeds)


# In the builder


@pytest.mark.parametrize("num_views", [1, 2, 3])
@every_module
def test_mixmatch_mixes_what_the_engine_builds(name, num_views):
    builder = MixMatch(engine_of(name), NUM_CLASSES, num_augmentations=num_views, seed=3)
    x, y, u = data_of()
    batch = builder(x, y, u, PooledNet(NUM_CLASSES))
    views = views_of(engine_of(name), x, u, step=0, num_views=num_views)
    expected, _ = functional.mixup(views, torch.zeros(len(views), 1), batch.params)
    assert torch.equal(batch.inputs, expected)
    assert batch.inputs.shape == (3 + 4 * num_views, 3, *SIZES.get(name, (8, 8)))
    batch.check()


@pytest.mark.parametrize("name", WEAK)
def test_mixmatch_takes_images_of_one_channel(name):
    x, _, u = data_of(channels=1)
    batch = step_of(MixMatch(engine_of(name), NUM_CLASSES, seed=3), channels=1)
    views = views_of(engine_of(name), x, u, step=0)
    expected, _ = functional.mixup(views, torch.zeros(len(views), 1), batch.params)
    assert torch.equal(batch.inputs, expected)
    assert batch.inputs.shape == (11, 1, *SIZES.get(name, (8, 8)))


@every_module
def test_a_run_that_resumes_at_a_step_builds_the_same_batches(name):
    builder = MixMatch(engine_of(name), NUM_CLASSES, seed=5)
    step_of(builder)
    state = builder.state_dict()
    assert set(state) == {"seed", "step"}
    expected = [step_of(builder) for _ in range(2)]

    resumed = MixMatch(engine_of(name), NUM_CLASSES)
    resumed.load_state_dict(state, strict=True)
    torch.rand(5)  # wherever the global generator is
    for batch in expected:
        again = step_of(resumed)
        assert torch.equal(again.inputs, batch.inputs)
        assert torch.equal(again.targets, batch.targets)
        assert int(again.step) == int(batch.step)
    assert not torch.equal(expected[0].inputs, expected[1].inputs)


@pytest.mark.parametrize("dtype", HALF_ERROR, ids=str)
def test_batches_keep_half_precision_and_the_memory_format(dtype):
    engine = engine_of("AugmentationSequential", dtype=dtype, channels_last=True)
    batch = step_of(MixMatch(engine, NUM_CLASSES, reuse_buffers=True))
    assert batch.inputs.dtype == dtype
    assert batch.inputs.is_contiguous(memory_format=torch.channels_last)
    plain = step_of(MixMatch(engine_of("AugmentationSequential"), NUM_CLASSES))
    assert worst(batch.inputs, plain.inputs) < 2 * HALF_ERROR[dtype]


def test_the_module_moves_with_the_builder_but_is_not_saved():
    module = Recorder()
    builder = MixMatch(KorniaAugment(module, **HALF), NUM_CLASSES)
    builder.to(torch.float64)
    assert module.offset.dtype == torch.float64
    assert builder.augment.to("meta") is builder.augment
    assert module.offset.device.type == "meta"
    assert list(builder.parameters()) == []
    assert builder.augment.state_dict() == {}


def brighten(images):
    return images * 1.5 + torch.rand(len(images), 1, 1, 1)


@pytest.mark.parametrize(
    ("function", "size"),
    [
        (brighten, (8, 8)),
        (nn.Dropout(0.3), (8, 8)),
        (lambda images: avg_pool2d(images, 2), (4, 4)),
        (K.RandomHorizontalFlip(), (8, 8)),
        (K.AugmentationSequential(K.RandomCrop((6, 7)), K.RandomErasing(p=1.0)), (6, 7)),
        (nn.Sequential(K.ColorJiggle(0.2), nn.AvgPool2d((1, 2))), (8, 4)),
    ],
    ids=["function", "module", "lambda", "flip", "container", "mixed"],
)
def test_mixmatch_takes_plain_functions_and_modules_from_floats_to_floats(function, size):
    builder = MixMatch(function, NUM_CLASSES, seed=3)
    x, y, u = data_of()
    batch = builder(x, y, u, PooledNet(NUM_CLASSES))
    assert set(builder.state_dict()) == {"seed", "step"}
    views = views_of(as_augment(function), x, u, step=0)
    expected, _ = functional.mixup(views, torch.zeros(len(views), 1), batch.params)
    assert torch.equal(batch.inputs, expected)
    assert batch.inputs.shape == (11, 3, *size)
    batch.check()
    resumed = MixMatch(function, NUM_CLASSES, seed=3)
    assert torch.equal(resumed(x, y, u, PooledNet(NUM_CLASSES)).inputs, batch.inputs)


# Errors and manners


def test_it_is_an_engine_and_shows_its_module_and_fields():
    engine = KorniaAugment(K.RandomHorizontalFlip(p=0.25), mean=(0.1, 0.2, 0.3), std=0.5)
    assert isinstance(engine, Augment)
    assert as_augment(engine) is engine
    for part in ("KorniaAugment(RandomHorizontalFlip(p=0.25", "mean=(0.1, 0.2, 0.3), std=(0.5,)"):
        assert part in repr(engine)
    assert "dtype=torch.float32, channels_last=False" in repr(engine)


class Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, images):
        return self.value(images)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (lambda images: [images, images], TypeError, "one floating point tensor, got list"),
        (lambda images: (images, None), TypeError, "one floating point tensor, got tuple"),
        (lambda images: {"input": images}, TypeError, "one floating point tensor, got dict"),
        (lambda images: images.byte(), TypeError, "one floating point tensor, got torch.uint8"),
        (lambda images: images[1:], ValueError, r"\[11, C, H, W\] .* got \[10, 3, 8, 8\]"),
        (lambda images: images[:, 0], ValueError, r"\[11, C, H, W\] .* got \[11, 8, 8\]"),
        (lambda images: images[:, :2], ValueError, "3 channels like mean and std, got 2"),
    ],
)
def test_what_the_module_returns_is_checked(value, error, message):
    x, _, u = data_of()
    engine = KorniaAugment(Returns(value), mean=(0.1, 0.2, 0.3), std=0.5)
    with pytest.raises(error, match=message):
        views_of(engine, x, u)


@pytest.mark.parametrize("module", ["RandAugment", None, torch.flip, K.RandomHorizontalFlip])
def test_what_is_not_a_module_is_refused(module):
    with pytest.raises(TypeError, match=r"module must be an nn.Module such as .* got"):
        KorniaAugment(module, **HALF)


@pytest.mark.parametrize("keys", [["input", "mask"], None], ids=str)
def test_a_container_of_more_than_images_is_refused(keys):
    module = K.AugmentationSequential(K.RandomHorizontalFlip(), data_keys=keys)
    with pytest.raises(ValueError, match=r"must have data_keys=\['input'\], images alone, got \["):
        KorniaAugment(module, **HALF)


@pytest.mark.parametrize("data_keys", [["input"], ["image"]])
def test_a_container_of_images_is_taken(data_keys):
    module = K.AugmentationSequential(K.RandomHorizontalFlip(p=1.0), data_keys=data_keys)
    x, _, u = data_of()
    expected = torch.cat([x, u, u]).float().flip(-1) / 255
    assert worst(views_of(KorniaAugment(module, **PLAIN), x, u), expected) < 1e-6


@pytest.mark.parametrize(
    "mix",
    [
        lambda: K.RandomMixUpV2(data_keys=["input", "class"]),
        lambda: K.RandomCutMixV2(data_keys=["input", "class"], use_correct_lambda=True),
        lambda: K.RandomMosaic((8, 8)),
    ],
    ids=["RandomMixUpV2", "RandomCutMixV2", "RandomMosaic"],
)
def test_modules_that_blend_images_of_a_batch_are_refused(mix):
    name = type(mix()).__name__
    for module in (mix(), nn.Sequential(K.RandomHorizontalFlip(), mix())):
        with pytest.raises(ValueError, match=f"augment each image by itself, got {name}"):
            KorniaAugment(module, **HALF)


def test_jigsaw_which_stays_within_each_image_is_taken():
    engine = KorniaAugment(K.RandomJigsaw((2, 2), p=1.0), **PLAIN)
    x, _, u = data_of()
    pixels = torch.cat([x, u, u]).float() / 255
    views = views_of(engine, x, u)
    assert not torch.equal(views, pixels)
    assert torch.equal(views.flatten(1).sort().values, pixels.flatten(1).sort().values)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"std": 0.0}, "std must be above 0"),
        ({"std": (0.5, 0.5)}, None),
        ({"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5)}, "one value or one per channel"),
        ({"mean": ()}, "mean must be a number or one per channel"),
        ({"dtype": torch.float64}, "dtype must be one of float32, float16, bfloat16, got float64"),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    if message is None:  # known once images come
        x, _, u = data_of()
        with pytest.raises(ValueError, match="2 channels like mean and std, got 3"):
            views_of(engine_of("smaller", **fields), x, u)
        return
    with pytest.raises(ValueError, match=message):
        engine_of("smaller", **fields)


def test_a_missing_kornia_is_named_with_how_to_install_it(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "kornia"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "kornia", None)
    for make in (lambda: KorniaAugment(nn.Identity(), **HALF), lambda: to_kornia(WeakAugment())):
        with pytest.raises(ImportError, match=r"needs Kornia: pip install -e \."):
            make()


# to_kornia: our draws, Kornia's arithmetic


POLICIES = {
    "shift": {"flip": 0.0},
    "shift, flip": {},
    "zoom, flip": {"padding": 0, "zoom_px": (0, 2)},
    "blur": {"padding": 0, "flip": 0.0, "blur_sigma": (0.0, 1.2)},
    "all": {"zoom_px": (1, 2), "blur_sigma": (0.3, 1.2)},
}
SHAPES = [(3, 32, 32), (1, 28, 28), (3, 9, 7), (4, 5, 13), (1, 8, 5), (2, 6, 9)]


def assert_replayed(augment, images, params):
    replayed = to_kornia(augment).apply(images, params)
    views = augment.apply(images, params)
    assert worst(replayed, views) <= REPLAY_ERROR
    assert replayed.is_contiguous(memory_format=FORMATS[augment.channels_last])
    return replayed


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", ["reflect", "zeros", "edge"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kornia_equals_our_arithmetic_on_our_draws(shape, mode, policy):
    statistics = {
        "mean": (0.5, 0.4, 0.45, 0.3)[: shape[0]],
        "std": (0.25, 0.3, 0.27, 0.2)[: shape[0]],
    }
    fields = {"padding": 3, "padding_mode": mode, **statistics, **POLICIES[policy]}
    augment = WeakAugment(**fields)
    images = images_of(6, 1, *shape)
    params = augment.draw(0, 1, 6, [1, 2])
    replayed = assert_replayed(augment, images, params)
    assert worst(replayed, augment.normalize(images).repeat(2, 1, 1, 1)) > 0.1


@pytest.mark.parametrize("zoom", [0, 16])
def test_kornia_equals_our_arithmetic_at_224_pixels(zoom):
    augment = WeakAugment(12, zoom_px=(0, zoom), blur_sigma=(0.0, 2.0))
    images, params = images_of(4, 1, height=224, width=200), augment.draw(0, 1, 4, 1)
    difference = worst(to_kornia(augment).apply(images, params), augment.apply(images, params))
    # a zoom reads at positions of up to 224, rounded by 2^-17 pixels in float32 more than once
    assert difference <= (8e-5 if zoom else REPLAY_ERROR)


@pytest.mark.parametrize("nhwc", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("source", ["uint8", "float"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_kornia_replays_the_rows_of_a_batch_in_any_layout(channels_last, source, nhwc):
    x, _, u = data_of()
    if source == "float":
        x, u = x.float() / 255, u.float() / 255
    if nhwc:
        x, u = (images.permute(0, 2, 3, 1).contiguous() for images in (x, u))
    augment = WeakAugment(2, blur_sigma=(0.0, 1.0), channels_last=channels_last)
    params = augment.draw_batch(0, 1, len(x), len(u), 3)
    assert_replayed(augment, (x, u), params)


PRESETS = ["cifar10", "cifar100", "svhn", "fashion_mnist", "digits", "blog"]


@pytest.mark.parametrize("preset", PRESETS)
def test_kornia_replays_the_presets(preset):
    augment = getattr(WeakAugment, preset)()
    assert_replayed(augment, images_of(8, 1, height=40, width=33), augment.draw(2, 3, 8, 1))


def test_kornia_replays_the_corners_of_what_can_be_drawn():
    augment = WeakAugment(
        5, "zeros", zoom_px=(0, 9), flip=0.0, blur_sigma=(0.0, 0.6), layout="NCHW"
    )
    images = images_of(6, 1, height=3, width=4)  # smaller than padding and cuts
    params = augment.draw(0, 0, 6, 1)
    params.top[:2], params.left[:2] = torch.tensor([0, 10]), torch.tensor([10, 0])
    params.zoom[:3] = torch.tensor([[9, 9, 9, 9], [0, 9, 0, 9], [0, 0, 0, 0]])
    params.sigma[:4] = torch.tensor([0.0, 1e-30, 0.009, 0.011])
    assert_replayed(augment, images, params)


@pytest.mark.parametrize("dtype", HALF_ERROR, ids=str)
def test_a_replay_has_the_dtype_of_the_policy(dtype):
    augment = WeakAugment(2, dtype=dtype, channels_last=True)
    images, params = images_of(4, 1), augment.draw(0, 0, 4, 1)
    replayed = to_kornia(augment).apply(images, params)
    assert replayed.dtype == dtype
    assert replayed.is_contiguous(memory_format=torch.channels_last)
    assert worst(replayed, augment.apply(images, params)) < HALF_ERROR[dtype]


@pytest.mark.parametrize(
    ("policy", "names"),
    [
        ({"padding": 0}, ["RandomHorizontalFlip", "Normalize"]),
        ({"padding": 1}, ["RandomCrop", "RandomHorizontalFlip", "Normalize"]),
        (
            {"padding": 1, "zoom_px": (0, 1), "blur_sigma": (0.0, 1.0)},
            [
                "RandomCrop",
                "RandomResizedCrop",
                "RandomHorizontalFlip",
                "RandomGaussianBlur",
                "Normalize",
            ],
        ),
    ],
    ids=["flip", "shift", "all"],
)
def test_the_steps_are_modules_of_kornia_in_the_order_of_the_policy(policy, names):
    augment = WeakAugment(**policy)
    images, params = images_of(4, 1), augment.draw(0, 0, 4, 1)
    steps = to_kornia(augment).steps(params, 8, 8)
    assert [type(step.module).__name__ for step in steps] == names
    assert all(type(step.module).__module__.startswith("kornia.") for step in steps)
    views = images.float() / 255
    for module, values in steps:
        views = module(views, params=values)
    assert worst(views, to_kornia(augment).apply(images, params)) < 4e-6


def test_a_replay_draws_nothing_and_changes_no_params():
    augment = WeakAugment(2, zoom_px=(0, 3), blur_sigma=(0.0, 1.0))
    params = augment.draw(0, 0, 4, 1)
    before = [field.clone() for field in params]
    state = generators()
    first = to_kornia(augment).apply(images_of(4, 1), params)
    assert_same_state(state, generators())
    assert all(map(torch.equal, params, before))
    assert torch.equal(first, to_kornia(augment).apply(images_of(4, 1), params))


def test_a_replay_of_no_rows_has_no_rows():
    augment = WeakAugment(2, zoom_px=(0, 3), blur_sigma=(0.0, 1.0))
    replayed = to_kornia(augment).apply(images_of(0, 1), augment.draw(0, 0, 0, 1))
    assert replayed.shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("rows", "counts"), [(5, (4,)), (2, (3, 4)), (8, (3, 4)), (0, (4, 4)), (4, (0,))]
)
def test_a_replay_refuses_rows_that_do_not_fit_the_images(rows, counts):
    augment = WeakAugment(2)
    images = tuple(images_of(count, 1) for count in counts)
    params = augment.draw(0, 0, rows, 1)
    with pytest.raises(ValueError, match=rf"a row per view of .* images, got {rows}"):
        to_kornia(augment).apply(images if len(images) > 1 else images[0], params)


def test_a_replay_refuses_a_blur_that_reaches_across_the_image():
    augment = WeakAugment(0, blur_sigma=(0.0, 3.0))
    params = augment.draw(0, 0, 2, 1)
    with pytest.raises(ValueError, match="RandomGaussianBlur cannot filter an image this small"):
        to_kornia(augment).apply(images_of(2, 1), params)


def test_a_replay_shows_its_policy():
    assert repr(to_kornia(WeakAugment(padding=7))).startswith("KorniaReplay(WeakAugment(padding=7")


# On a GPU


@pytest.mark.gpu
@needs_cuda
@every_module
def test_on_a_gpu_runs_resume_and_every_generator_is_left_as_it_was(name):
    builder = MixMatch(engine_of(name), NUM_CLASSES, seed=5).to("cuda")
    model = PooledNet(NUM_CLASSES).cuda()
    state = generators()
    on_gpu = [torch.cuda.get_rng_state(device) for device in range(torch.cuda.device_count())]
    expected = [step_of(builder, model) for _ in range(2)]
    assert expected[0].inputs.is_cuda
    resumed = MixMatch(engine_of(name), NUM_CLASSES, seed=5).to("cuda")
    for batch in expected:
        assert torch.equal(step_of(resumed, model).inputs, batch.inputs)
    assert not torch.equal(expected[0].inputs, expected[1].inputs)
    assert_same_state(state, generators())
    for device, mine in enumerate(on_gpu):
        assert torch.equal(mine, torch.cuda.get_rng_state(device))


@pytest.mark.gpu
@needs_cuda
@every_module
def test_on_a_gpu_views_do_not_depend_on_the_global_state(name):
    engine = engine_of(name).to("cuda")
    x, u = images_of(3, 1).cuda(), images_of(4, 2).cuda()
    views = views_of(engine, x, u)
    torch.rand(7)
    torch.rand(7, device="cuda")
    assert torch.equal(views_of(engine, x, u), views)


@pytest.mark.gpu
@needs_cuda
def test_on_a_gpu_a_module_that_draws_on_the_cpu_is_keyed_too():
    engine = KorniaAugment(Returns(lambda images: images + torch.rand(1).cuda()), **HALF)
    x, u = images_of(3, 1).cuda(), images_of(4, 2).cuda()
    views = views_of(engine, x, u)
    torch.rand(7)
    assert torch.equal(views_of(engine, x, u), views)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", HALF_ERROR, ids=str)
def test_on_a_gpu_half_precision_and_the_memory_format_are_kept(dtype):
    engine = engine_of("AugmentationSequential", dtype=dtype, channels_last=True).to("cuda")
    batch = step_of(MixMatch(engine, NUM_CLASSES).to("cuda"), PooledNet(NUM_CLASSES).cuda())
    assert batch.inputs.dtype == dtype
    assert batch.inputs.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("policy", POLICIES)
def test_on_a_gpu_kornia_equals_our_arithmetic_on_our_draws(policy):
    augment = WeakAugment(**{"padding": 3, **POLICIES[policy]}).to("cuda")
    assert_replayed(augment, images_of(6, 1).cuda(), augment.draw(0, 1, 6, [1, 2]))


def test_shift_and_flip_take_the_settings_of_a_policy():
    policy = WeakAugment.svhn(mean=0.2, std=0.3, channels_last=True)
    engine = KorniaAugment.shift_and_flip(policy, 8, 10)
    crop, flip = engine.module.children()
    assert (crop.flags["size"], crop.flags["padding"]) == ((8, 10), 4)
    assert crop.flags["padding_mode"] == "reflect"
    assert flip.p == 0.0
    assert (engine.mean, engine.std, engine.channels_last) == ((0.2,), (0.3,), True)
    with pytest.raises(ValueError, match="weak must neither zoom nor blur"):
        KorniaAugment.shift_and_flip(WeakAugment.blog(), 8, 8)
