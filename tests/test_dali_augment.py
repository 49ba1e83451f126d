"""DaliAugment equals WeakAugment on the same draws, row by row, whatever batch a row is in."""

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpu_mixmatch import MixMatch, WeakAugment
from gpu_mixmatch.augment.base import Augment
from gpu_mixmatch.augment.dali import DaliAugment
from gpu_mixmatch.types import AugmentParams
from tests.factories import LinearNet, random_images
from tests.params import oracle_rows, still_params
from tests.skips import skip_without
from tests.tolerances import TOLERANCES

skip_without("nvidia.dali")

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# In grey levels of 255. Seen: 2e-5 without zoom and blur, 2e-4 with blur, and with zoom 1e-3 at
# 40 px to 8e-3 at 224 px, because DALI steps along a row in float32.
EXACT, BOUND = 1e-3, 0.02
PLAIN = {"mean": 0.0, "std": 1.0}
SHAPES = [(3, 32, 32), (1, 28, 28), (3, 9, 7), (4, 5, 13), (2, 6, 9), (3, 5, 5)]
SOURCES = {
    "NCHW": lambda images: images,
    "NHWC": lambda images: images.permute(0, 2, 3, 1).contiguous(),
    "channels_last": lambda images: images.contiguous(memory_format=torch.channels_last),
    "strided": lambda images: torch.stack([images, images], dim=-1)[..., 0],
    "float32": lambda images: images.float() / 255,
    "float16": lambda images: (images.float() / 255).half(),
    "bfloat16": lambda images: (images.float() / 255).bfloat16(),
}


def x_and_u(shape, source="NCHW", counts=(5, 4)):
    images = [random_images(count, shape, seed=seed) for seed, count in enumerate(counts)]
    return [SOURCES[source](part) for part in images]


def both(augment, x, u, step=0):
    """The views by DALI and by eager torch, of the same draws."""
    draws = augment.draw_batch(3, step, len(x), len(u), 2)
    return DaliAugment(augment).build(x, u, draws, 2), augment.build(x, u, draws, 2)


def grey_levels_apart(views, expected):
    return float((views.double() - expected.double()).abs().max()) * 255


# Equal to eager


@pytest.mark.parametrize("mode", ["reflect", "zeros", "edge"])
@pytest.mark.parametrize(
    ("shape", "source"),
    [(shape, source) for shape in SHAPES for source in SOURCES],
    ids=str,
)
def test_shift_flip_and_normalise_equal_eager(shape, source, mode):
    x, u = x_and_u(shape, source)
    layout = "NHWC" if source == "NHWC" else "NCHW"
    views, expected = both(WeakAugment(4, mode, layout=layout, **PLAIN), x, u)
    assert views.shape == expected.shape == (13, *shape)
    assert grey_levels_apart(views, expected) < EXACT


@pytest.mark.parametrize("mode", ["zeros", "edge"])
def test_padding_may_exceed_the_image_where_nothing_is_reflected(mode):
    x, u = x_and_u((3, 5, 2))
    views, expected = both(WeakAugment(9, mode, layout="NCHW", **PLAIN), x, u)
    assert grey_levels_apart(views, expected) < EXACT


def test_mean_and_std_per_channel_equal_eager():
    x, u = x_and_u((3, 12, 9))
    for mean, std in [
        ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25)),
        (0.5, (0.2, 0.3, 0.25)),
        ((0, 1, 0.5), 1),
    ]:
        views, expected = both(WeakAugment(2, mean=mean, std=std), x, u)
        assert (views - expected).abs().max() < TOLERANCES[torch.float32]


@pytest.mark.parametrize(
    "policy",
    [
        {"padding": 0, "zoom_px": (0, 7)},
        {"padding": 0, "zoom_px": (3, 3)},
        {"padding": 0, "blur_sigma": (0.0, 3.0)},
        {"padding": 0, "blur_sigma": (1.0, 8.0)},
        {"padding": 3, "zoom_px": (0, 5), "blur_sigma": (0.0, 2.0)},
        {"padding": 3, "zoom_px": (0, 5), "blur_sigma": (0.0, 2.0), "padding_mode": "zeros"},
    ],
    ids=str,
)
@pytest.mark.parametrize("source", ["NCHW", "NHWC", "float16"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 16, 23), (3, 70, 90)], ids=str)
def test_zoom_and_blur_are_within_a_fiftieth_of_a_grey_level(shape, source, policy):
    x, u = x_and_u(shape, source)
    layout = "NHWC" if source == "NHWC" else "NCHW"
    views, expected = both(WeakAugment(**policy, layout=layout, **PLAIN), x, u)
    assert grey_levels_apart(views, expected) < BOUND


def test_zoom_and_blur_are_within_that_bound_for_large_images_too():
    x, u = x_and_u((3, 224, 224), "NHWC", counts=(6, 3))
    augment = WeakAugment(8, zoom_px=(0, 30), blur_sigma=(0.0, 2.0), **PLAIN)
    assert grey_levels_apart(*both(augment, x, u)) < BOUND


def test_a_sigma_of_zero_leaves_the_image_sharp():
    x, u = x_and_u((3, 16, 16))
    augment = WeakAugment(0, flip=0.0, blur_sigma=(0.0, 3.0), **PLAIN)
    views = DaliAugment(augment).build(x, u, still_params(9), 1)
    assert grey_levels_apart(views, torch.cat([x, u]) / 255) < EXACT


@pytest.mark.parametrize("flip", [0, 1])
def test_cuts_that_overlap_leave_the_pixel_that_the_oracle_leaves(flip):
    x = random_images(4, (3, 12, 10))
    crop = [[11, 3, 2, 9], [6, 6, 5, 5], [20, 20, 20, 20], [0, 12, 0, 10]]
    params = still_params(4, zoom=crop, flip=[flip] * 4)
    augment = WeakAugment(0, zoom_px=(0, 20), **PLAIN)
    views = DaliAugment(augment).build(x, x[:0], params, 1)
    assert grey_levels_apart(views, oracle_rows(x, params, augment)) < BOUND


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_views_have_the_dtype_and_memory_format_of_the_policy(dtype, channels_last):
    x, u = x_and_u((3, 16, 12))
    augment = WeakAugment(3, dtype=dtype, channels_last=channels_last)
    views, expected = both(augment, x, u)
    assert views.dtype == dtype
    assert views.stride() == expected.stride()
    assert (views.float() - expected.float()).abs().max() <= 2 * TOLERANCES[dtype]


# One row is one row


def test_a_view_does_not_depend_on_batch_size_or_order():
    augment = WeakAugment(3, zoom_px=(0, 3), blur_sigma=(0.0, 1.0))
    engine = DaliAugment(augment)
    images = random_images(12, (3, 16, 16))
    ids = torch.arange(100, 112)
    nothing, no_ids = images[:0], ids[:0]

    def views_of(rows):
        draws = engine.draw_batch(5, 7, no_ids, ids[rows], 2)
        return engine.build(nothing, images[rows], draws, 2).unflatten(0, (2, len(rows)))

    whole = views_of(torch.arange(12))
    for rows in (torch.tensor([3]), torch.randperm(12), torch.tensor([11, 0, 0, 5])):
        assert torch.equal(views_of(rows), whole[:, rows])


def test_views_are_view_major_with_x_first():
    x, u = x_and_u((3, 8, 8))
    engine = DaliAugment(WeakAugment(0, flip=0.0, **PLAIN))
    views = engine.build(x, u, still_params(17), 3)
    assert grey_levels_apart(views, torch.cat([x, u, u, u]) / 255) < EXACT


def test_zero_rows_give_zero_views():
    x, u = x_and_u((3, 8, 8), counts=(0, 0))
    views, expected = both(WeakAugment(2), x, u)
    assert views.shape == expected.shape == (0, 3, 8, 8)
    x, u = x_and_u((3, 8, 8), counts=(0, 3))
    assert torch.allclose(*both(WeakAugment(2), x, u), atol=1e-5)


class CountCopies(TorchDispatchMode):
    """Counts operations that write a tensor of at least as many values as an image has."""

    def __init__(self, least):
        super().__init__()
        self.least = least
        self.copies = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        held = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if is_tensor(leaf)}
        for leaf in tree_leaves(result):
            if is_tensor(leaf) and leaf.numel() >= self.least:
                fresh = leaf.untyped_storage().data_ptr() not in held
                self.copies += [str(func)] if fresh else []
        return result


def is_tensor(value):
    return isinstance(value, torch.Tensor)


@pytest.mark.parametrize("source", ["NCHW", "NHWC", "channels_last", "float32"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_torch_copies_no_image_on_the_way_in_or_out(source, channels_last):
    x, u = x_and_u((3, 32, 32), source)
    engine = DaliAugment(WeakAugment(4, channels_last=channels_last))
    draws = engine.draw_batch(0, 0, len(x), len(u), 2)
    with CountCopies(least=32 * 32) as mode:
        engine.build(x, u, draws, 2)
    assert mode.copies == []
    with CountCopies(least=32 * 32) as mode:
        engine.build(x[:, ::2], u[:, ::2], draws, 2)
    assert mode.copies  # the count sees a copy where there must be one


def test_views_are_not_overwritten_by_the_next_batch():
    x, u = x_and_u((3, 16, 16))
    engine = DaliAugment(WeakAugment(4))
    results = [
        engine.build(x, u, engine.draw_batch(0, step, len(x), len(u), 2), 2) for step in range(6)
    ]
    kept = [result.clone() for result in results]
    for step in range(6, 12):
        engine.build(u, x, engine.draw_batch(0, step, len(u), len(x), 2), 2)
    assert all(map(torch.equal, results, kept))
    assert not torch.equal(results[0], results[1])


# With the builder


def test_the_builder_makes_the_batch_that_weak_augment_makes():
    augment = WeakAugment(4)
    x, u = x_and_u((3, 16, 16))
    y = torch.tensor([0, 1, 2, 3, 0])
    model = LinearNet(4, (3, 16, 16))
    engine = DaliAugment(augment)
    assert isinstance(engine, Augment)
    builders = [MixMatch(engine, 4, seed=5), MixMatch(augment, 4, seed=5)]
    ids = {"ids_x": torch.arange(50, 55), "ids_u": torch.arange(7, 11)}
    for options in ({}, ids):
        batch, expected = (builder(x, y, u, model, **options) for builder in builders)
        assert (batch.inputs - expected.inputs).abs().max() < 1e-5
        assert (batch.targets - expected.targets).abs().max() < 1e-5
        assert torch.equal(batch.params.index, expected.params.index)


def test_the_batch_does_not_depend_on_what_the_model_writes_into_its_views():
    x, u = x_and_u((3, 16, 16))
    y = torch.tensor([0, 1, 2, 3, 0])
    model = LinearNet(4, (3, 16, 16))
    builders = [MixMatch(DaliAugment(WeakAugment(4)), 4) for _ in range(2)]
    writing = lambda views: model(views.mul_(2)), lambda views: model(views * 2)
    for models in ((model, model), writing, writing):  # memory of DALI's, at first left alone
        batch, expected = (
            builder(x, y, u, guesser) for builder, guesser in zip(builders, models, strict=True)
        )
        assert torch.equal(batch.inputs, expected.inputs)
        assert torch.equal(batch.targets, expected.targets)


# Mistakes


def test_a_policy_that_is_no_weak_augment_is_refused():
    for policy in ("cifar10", WeakAugment, WeakAugment().policy):
        with pytest.raises(TypeError, match=r"weak must be a WeakAugment such as .* got"):
            DaliAugment(policy)


def test_images_that_do_not_fit_are_refused():
    x, u = x_and_u((3, 8, 8))
    engine = DaliAugment(WeakAugment(2, mean=(0.5, 0.5, 0.5)))
    draws = engine.draw_batch(0, 0, 5, 4, 2)
    for other in (u[:, :, :7], u.float(), u[:, :1]):
        with pytest.raises(ValueError, match=r"x and u must have the same .* got \[5, 3, 8, 8\]"):
            engine.build(x, other, draws, 2)
    with pytest.raises(ValueError, match="x must have 3 channels like mean and std, got 1"):
        engine.build(x[:, :1], u[:, :1], draws, 2)
    with pytest.raises(ValueError, match=r"draws must have a row per view, .* = 9, got 13"):
        engine.build(x, u, draws, 1)
    with pytest.raises(ValueError, match=r"padding must be smaller than the image .* padding = 8"):
        DaliAugment(WeakAugment(8)).build(x, u, draws, 2)


def test_without_dali_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali.experimental.dynamic", None)
    with pytest.raises(ImportError, match=r"needs NVIDIA DALI: pip install -e"):
        DaliAugment(WeakAugment())


def test_dali_is_imported_only_where_it_is_used():
    code = (
        "import gpu_mixmatch.augment.dali, gpu_mixmatch.data.dali, gpu_mixmatch.data.images, sys\n"
        "found = [name for name in sys.modules if name.startswith(('nvidia.dali', 'PIL'))]\n"
        "sys.exit(f'imported: {found}' if found else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_repr_shows_the_policy():
    assert repr(DaliAugment(WeakAugment(7))).startswith("DaliAugment(WeakAugment(padding=7,")


# CUDA


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("source", ["NCHW", "NHWC", "float16"])
@pytest.mark.parametrize(
    ("policy", "bound"),
    [
        ({"padding": 4}, EXACT),
        ({"padding": 4, "padding_mode": "zeros"}, EXACT),
        ({"padding": 3, "zoom_px": (0, 5), "blur_sigma": (0.0, 2.0)}, BOUND),
    ],
    ids=str,
)
def test_the_gpu_makes_the_views_of_the_cpu(policy, bound, source):
    x, u = x_and_u((3, 32, 32), source)
    augment = WeakAugment(**policy, **PLAIN)
    engine = DaliAugment(augment)
    draws = engine.draw_batch(0, 0, len(x), len(u), 2)
    expected = augment.build(x, u, draws, 2)
    views = engine.build(x.cuda(), u.cuda(), draws, 2)
    assert views.is_cuda
    assert grey_levels_apart(views.cpu(), expected) < bound
    on_device = AugmentParams(*(draw.cuda() for draw in draws))
    assert torch.equal(engine.build(x.cuda(), u.cuda(), on_device, 2), views)


@needs_cuda
@pytest.mark.gpu
def test_work_is_ordered_with_the_current_stream():
    engine = DaliAugment(WeakAugment(0, flip=0.0, **PLAIN))
    x = random_images(64, (3, 64, 64)).cuda()
    draws = still_params(64)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        late = x // 2  # written only after the sleep
        views = engine.build(late, late[:0], draws, 1) * 255
    torch.cuda.synchronize()
    assert (views - (x // 2)).abs().max() < 1e-3
