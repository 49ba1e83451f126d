"""Triton's kernels equal the eager implementation: on a GPU, else in Triton's interpreter.

The interpreter takes a few milliseconds a tile and operation, so that cases cover every pair of
values of their parameters instead of every combination.
"""

import importlib
import itertools
import math
import random

import pytest
import torch
from torch import nn

from gpu_mixmatch import MixMatch, MixMatchLoss, WeakAugment, _unchecked, functional, sampling
from gpu_mixmatch._keys import CountedKey
from gpu_mixmatch.impl import eager, library
from gpu_mixmatch.types import (
    AugmentParams,
    AugmentPolicy,
    DrawPlan,
    Geometry,
    MixUpParams,
    Scaling,
)
from tests import oracle
from tests.skips import skip_without
from tests.tolerances import KERNEL_TOLERANCES

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
FORMATS = {False: torch.contiguous_format, True: torch.channels_last}
HALVES = [torch.float16, torch.bfloat16]
FLOATS = [torch.float32, *HALVES]

skip_without("triton")
kernels = importlib.import_module("gpu_mixmatch.impl.triton")
launching = importlib.import_module("gpu_mixmatch.impl.triton.launch")
losing = importlib.import_module("gpu_mixmatch.impl.triton.mixmatch_loss")
drawing = importlib.import_module("gpu_mixmatch.impl.triton.draw")


def pairwise(fits=lambda case: True, **options):
    """Cases that hold every pair of values that fits, found greedily among random ones."""
    chance = random.Random(0)
    names = list(options)

    def pairs(case):
        return set(itertools.combinations(zip(names, map(str, case), strict=True), 2))

    tried = [tuple(chance.choice(options[name]) for name in names) for _ in range(4000)]
    tried = [case for case in dict.fromkeys(tried) if fits(dict(zip(names, case, strict=True)))]
    missing = set().union(*map(pairs, tried))
    cases = []
    while missing:
        best = max(tried, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        cases.append(pytest.param(*best, id="-".join(str(value) for value in best)))
    return pytest.mark.parametrize(names, cases)


def close(result, expected, dtype=None):
    """Compare with what float64 or float32 gave, by the tolerance of the dtype."""
    tolerance = KERNEL_TOLERANCES[dtype or result.dtype]
    torch.testing.assert_close(
        result.cpu().double(),
        torch.as_tensor(expected).cpu().double(),
        rtol=tolerance,
        atol=tolerance,
        equal_nan=True,
    )


def nan(shape, dtype=torch.float32, channels_last=False):
    """What a kernel leaves out stays NaN."""
    return torch.full(shape, math.nan, dtype=dtype, device=DEVICE).contiguous(
        memory_format=FORMATS[channels_last]
    )


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch):
    """Outputs start as NaN, or as no index at all."""
    empty = torch.empty

    def filled(*shape, **options):
        tensor = empty(*shape, **options)
        return tensor.fill_(math.nan if tensor.is_floating_point() else 0x7BADBAD)

    for module in (functional, library, losing):
        fake = type(torch)("torch")
        fake.__dict__.update(torch.__dict__)
        fake.empty = filled
        monkeypatch.setattr(module, "torch", fake)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(count, channels, height, width, dtype=torch.uint8, seed=0):
    shape = (count, channels, height, width)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(seed))
    return (pixels if dtype == torch.uint8 else (pixels.float() / 255).to(dtype)).to(DEVICE)


def random_logits(*shape, dtype=torch.float32, seed=0):
    values = torch.randn(*shape, dtype=torch.float64, generator=generator(seed))
    return (2 * values).to(dtype).to(DEVICE)


def random_targets(*shape, seed=1):
    return random_logits(*shape, seed=seed).double().softmax(dim=-1).float()


def on_device(params):
    return type(params)(*(field.to(DEVICE) for field in params))


def mixup_params(num_rows, seed=0):
    index = torch.randperm(num_rows, generator=generator(seed))
    lam = 0.5 + torch.rand(num_rows, generator=generator(seed)) / 2
    return on_device(MixUpParams(lam, index))


# Draws

POLICIES = {
    "all": AugmentPolicy(4, (2, 9), 0.5, (0.25, 3.0)),
    "shift": AugmentPolicy(12, flip=0.3),
    "none": None,
}
SIZES = [(1, 1, 1), (3, 5, 2), (7, 64, 3), (64, 64, 2), (2, 1, 4), (0, 5, 2), (5, 0, 2), (0, 1, 1)]
FAR_IDS = [0, 1, 2**32 - 1, 2**32, 2**32 + 7, 5 * 2**32 + 3, 2**63 - 1]


def draw(seed, step, ids_x, ids_u, key=None, **switches):
    return functional.draw_batch(
        seed,
        torch.tensor(step),
        *(ids if isinstance(ids, int) else ids.to(DEVICE) for ids in (ids_x, ids_u)),
        DrawPlan(**switches),
        device=DEVICE,
        key=key,
        impl="triton",
    )


def assert_draws_equal(drawn, expected):
    (augment, mixup), (augment_expected, mixup_expected) = drawn, expected
    assert (augment is None) == (augment_expected is None)
    if augment is not None:
        for name in ("top", "left", "flip", "zoom"):
            assert torch.equal(getattr(augment, name).cpu(), getattr(augment_expected, name)), name
        torch.testing.assert_close(augment.sigma.cpu(), augment_expected.sigma, rtol=3e-7, atol=0)
    assert torch.equal(mixup.index.cpu(), mixup_expected.index)
    torch.testing.assert_close(mixup.lam.cpu(), mixup_expected.lam, rtol=0, atol=2.5e-7)


@pairwise(
    mix=["all", "separate", "labelled", "unlabelled", "none"],
    lam=["sample", "batch"],
    alpha=[0.1, 0.75, 1.0, 2.0, 16.0],
    size=SIZES,
    policy=list(POLICIES),
    ids=["positions", "ids", "ids_u"],
)
def test_draws_equal_those_of_the_host(mix, lam, alpha, size, policy, ids):
    num_x, num_u, num_augmentations = size
    ids_x, ids_u = num_x, num_u
    if ids == "ids":
        ids_x = torch.randint(0, 2**62, (num_x,), generator=generator())
    if ids != "positions":
        ids_u = torch.randint(0, 2**62, (num_u,), generator=generator(1))
    switches = {
        "num_augmentations": num_augmentations,
        "policy": POLICIES[policy],
        "alpha": alpha,
        "lam": lam,
        "mix": mix,
    }
    drawn = draw(5, 77, ids_x, ids_u, **switches)
    assert_draws_equal(drawn, sampling.draw_batch(5, 77, ids_x, ids_u, DrawPlan(**switches)))


@pytest.mark.parametrize("step", [0, 1, 16, 2**31 - 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("seed", [0, 2**32 + 1, 2**63 - 1])
def test_draws_equal_those_of_the_host_at_any_seed_step_and_id(seed, step):
    ids = torch.tensor(FAR_IDS)
    switches = {"policy": POLICIES["all"], "mix": "separate"}
    expected = sampling.draw_batch(seed, step, ids, ids.flip(0), DrawPlan(**switches))
    assert_draws_equal(draw(seed, step, ids, ids.flip(0), **switches), expected)


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (1, 1), (2**63 - 1, 2**32 - 1)])
def test_a_key_on_the_device_draws_what_the_host_s_key_draws(seed, step):
    key = torch.tensor([seed, step], device=DEVICE)
    switches = {"policy": POLICIES["all"], "mix": "all"}
    by_key = draw(999, 999, 3, 5, key=key, **switches)
    assert_draws_equal(by_key, sampling.draw_batch(seed, step, 3, 5, DrawPlan(**switches)))


def test_a_key_of_the_user_s_is_read_and_a_counted_one_goes_on():
    switches = {"policy": POLICIES["all"], "mix": "separate"}
    key = torch.tensor([4, 6], device=DEVICE)
    for _ in range(2):
        draw(0, 0, 35, 3, key=key, **switches)
    assert key.tolist() == [4, 6]
    counted = CountedKey(DEVICE)
    plan = DrawPlan(**switches)
    ids = (35, 3, plan)
    arguments = {"device": DEVICE, "key": counted, "impl": "triton"}
    for seed, step in ((0, 0), (4, 6), (4, 7), (2**63 - 1, 2**32 - 1)):
        counted.send(seed, step)
        with counted.one_draw():
            drawn = _unchecked.draw_batch(0, torch.tensor(0), *ids, **arguments)
        assert_draws_equal(drawn, sampling.draw_batch(seed, step, *ids))
        words = counted.words(3 + 2 * 2)  # partners of 32, 3 and 6 rows, twice 41 rows
        assert words.tolist() == [seed, *[step + 1] * 7]
    with pytest.raises(ValueError, match="draws of one size, of 7 programs, got one of 3"):
        _unchecked.draw_batch(0, torch.tensor(0), 1, 0, plan, **arguments)


@pytest.mark.parametrize("mix", ["all", "separate"])
def test_rows_beyond_what_a_block_draws_at_once_meet_the_same_partners(monkeypatch, mix):
    # a grid of partners with more columns than a block has lanes is drawn round by round
    monkeypatch.setattr(drawing, "_BLOCK", 4)
    switches = {"policy": POLICIES["shift"], "mix": mix}
    expected = sampling.draw_batch(3, 8, 5, 13, DrawPlan(**switches))
    assert_draws_equal(draw(3, 8, 5, 13, **switches), expected)


def test_an_empty_batch_draws_nothing():
    augment, mixup = draw(0, 0, 0, 0, policy=POLICIES["all"])
    assert [len(field) for field in (*augment, *mixup)] == [0] * 7


# Augment


def augment_params(num_rows, height, width, padding, zoom, blur_radius, seed=3):
    params = sampling.draw_augment(
        seed,
        5,
        num_rows,
        0,
        padding=padding,
        zoom_px=(0, max(height, width)) if zoom else (0, 0),
        flip=0.5,
        blur_sigma=(0.0, blur_radius / 3) if blur_radius else None,
    )
    return on_device(params)


def in_whole(scale, bias, padding=0, padding_mode="reflect", zoom=False, blur_radius=0):
    """Geometry and scaling of fields."""
    return Geometry(padding, padding_mode, zoom, blur_radius), Scaling(scale, bias)


def augmented(
    backend, sources, params, shape, *, dtype, channels_last, channels_last_in, mixup=None, **fields
):
    out = nan(shape, dtype, channels_last)
    backend.augment(
        sources,
        params,
        *in_whole(**fields),
        channels_last_in=channels_last_in,
        out=out,
        workspace=None,
        mixup=mixup,
    )
    return out


def not_too_slow(case):
    _, _, height, _ = (0, *case["shape"])
    num_rows = rows_of(case["rows"])
    tile = 1024  # a row takes one at least
    work = num_rows * max(math.prod(case["shape"]), tile) * (4 if case["zoom"] else 1)
    work *= (2 if case["mixed"] else 1) * (1 + 4 * case["blur_radius"])
    return work <= 140_000 and (case["mode"] != "reflect" or case["padding"] < height)


def rows_of(rows):
    once, images, views = rows
    return (once or 0) + images * views


@pairwise(
    not_too_slow,
    shape=[(3, 1, 1), (1, 3, 3), (4, 3, 31), (3, 31, 33), (1, 33, 31), (4, 32, 32), (1, 96, 96)],
    rows=[(None, 1, 1), (2, 1, 3), (None, 3, 2), (4, 30, 2), (1, 0, 2), (0, 0, 1)],
    mode=["reflect", "zeros", "edge"],
    padding=[0, 2],
    zoom=[False, True],
    blur_radius=[0, 2],
    mixed=[False, True],
    source=["NCHW", "NHWC", "strided"],
    dtype_in=[torch.uint8, *FLOATS],
    dtype_out=FLOATS,
    channels_last=[False, True],
    factors=["numbers", "per channel", "one of each"],
)
def test_augment_equals_eager(
    shape,
    rows,
    mode,
    padding,
    zoom,
    blur_radius,
    mixed,
    source,
    dtype_in,
    dtype_out,
    channels_last,
    factors,
):
    once, images, _ = rows
    counts = (images,) if once is None else (once, images)
    sources = tuple(
        random_images(count, *shape, dtype=dtype_in, seed=count + 1) for count in counts
    )
    if source == "NHWC":
        sources = tuple(images.permute(0, 2, 3, 1).contiguous() for images in sources)
    if source == "strided":
        sources = tuple(
            images.repeat(1, 2, 1, 1).permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)[:, ::2]
            for images in sources
        )
    num_rows = rows_of(rows)
    unit = 1 / 127.5 if dtype_in == torch.uint8 else 2.0
    by_channel = torch.linspace(0.8, 1.0, shape[0], device=DEVICE)
    scale, bias = {
        "numbers": (unit, -1.0),
        "per channel": (unit * by_channel, -by_channel),
        "one of each": (unit, torch.tensor([-1.0], device=DEVICE).expand(shape[0])),
    }[factors]
    params = augment_params(num_rows, *shape[1:], padding, zoom, blur_radius)
    options = {
        "scale": scale,
        "bias": bias,
        "padding": padding,
        "padding_mode": mode,
        "zoom": zoom,
        "blur_radius": blur_radius,
        "channels_last_in": source == "NHWC",
        "mixup": mixup_params(num_rows) if mixed else None,
    }
    size = (num_rows, *shape)
    expected = augmented(
        eager, sources, params, size, dtype=torch.float32, channels_last=False, **options
    )
    result = augmented(
        kernels, sources, params, size, dtype=dtype_out, channels_last=channels_last, **options
    )
    close(result, expected)


@pytest.mark.parametrize("backend", [eager, kernels], ids=["eager", "triton"])
@pytest.mark.parametrize("mode", ["reflect", "zeros", "edge"])
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 5, 9), (1, 8, 3)])
def test_augment_equals_the_oracle(channels, height, width, mode, backend):
    images = random_images(4, channels, height, width)
    params = augment_params(4, height, width, 2, zoom=False, blur_radius=2)
    crop = torch.tensor([[0, 0, 0, 0], [1, 2, 0, 1], [0, 1, 1, 1], [2, 1, 1, 0]])
    params = params._replace(zoom=crop.to(DEVICE, torch.int32))
    mean, std = [0.5, 0.4, 0.45][:channels], [0.5, 0.55, 0.6][:channels]
    result = augmented(
        backend,
        (images,),
        params,
        images.shape,
        dtype=torch.float32,
        channels_last=False,
        scale=1 / (255 * torch.tensor(std, device=DEVICE)),
        bias=-torch.tensor(mean, device=DEVICE) / torch.tensor(std, device=DEVICE),
        padding=2,
        padding_mode=mode,
        zoom=True,
        blur_radius=2,
        channels_last_in=False,
    )
    policy = {"padding": 2, "padding_mode": mode, "blur_radius": 2, "mean": mean, "std": std}
    for row in range(4):
        draws = {name: field[row].tolist() for name, field in params._asdict().items()}
        close(result[row], oracle.augment(images[row].cpu().numpy(), draws, policy))


@pytest.mark.parametrize("channels_last", [False, True])
def test_mixing_while_augmenting_equals_augment_then_mixup(channels_last):
    x, u = random_images(2, 3, 9, 11), random_images(3, 3, 9, 11, seed=1)
    params = augment_params(8, 9, 11, 2, zoom=False, blur_radius=0)
    mixup = mixup_params(8)
    whole = in_whole(1 / 127.5, -1.0, padding=2)
    options = {"channels_last": channels_last, "impl": "triton"}
    mixed = functional.augment((x, u), params, *whole, mixup=mixup, **options)
    views = functional.augment((x, u), params, *whole, **options)
    expected, _ = functional.mixup(views, random_targets(8, 2), mixup, impl="triton")
    close(mixed, expected)
    assert mixed.is_contiguous(memory_format=FORMATS[channels_last])


def test_the_largest_zoom_leaves_one_pixel():
    images = random_images(2, 3, 7, 5)
    params = augment_params(2, 7, 5, 0, zoom=True, blur_radius=0)
    params = params._replace(zoom=torch.full((2, 4), 100, dtype=torch.int32, device=DEVICE))
    views = functional.augment(images, params, *in_whole(1.0, 0.0, zoom=True), impl="triton")
    assert torch.equal(views, images[:, :, -1:, -1:].float().expand_as(views))


# MixUp


@pairwise(
    lambda case: len(case["shape"]) == 3 or not case["channels_last"],
    shape=[(3, 1, 1), (1, 3, 3), (4, 31, 33), (3, 96, 96), (5,), ()],
    num_rows=[0, 1, 7, 64],
    num_classes=[2, 10, 100, 1000],
    dtype=FLOATS,
    channels_last=[False, True],
)
def test_mixup_equals_the_oracle_and_eager(shape, num_rows, num_classes, dtype, channels_last):
    num_rows = min(num_rows, 7) if shape == (3, 96, 96) else num_rows
    params = mixup_params(num_rows)
    inputs = random_logits(num_rows, *shape).clamp(-2, 2).to(dtype)
    inputs = inputs.contiguous(memory_format=FORMATS[channels_last])
    targets = random_targets(num_rows, num_classes)
    outs = []
    for backend in (eager, kernels):
        out, mixed_targets = torch.full_like(inputs, math.nan), nan(targets.shape)
        backend.mixup(inputs, targets, params, out, mixed_targets)
        outs.append((out, mixed_targets))
    (eager_out, eager_targets), (out, mixed_targets) = outs
    close(out, eager_out)
    close(mixed_targets, eager_targets)
    if num_rows * math.prod(shape) <= 1000:
        wide = inputs.cpu().double()
        arguments = (targets.cpu(), params.lam.cpu().double(), params.index.cpu())
        expected, expected_targets = oracle.mixup(wide, *arguments)
        close(out, expected)
        close(mixed_targets, expected_targets)


# Guesses and targets


def strided_logits(logits, layout):
    """The same values behind other strides."""
    if layout == "transposed":
        return logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    if layout == "every other":
        return logits.repeat_interleave(2, dim=2)[..., ::2]
    return logits


@pairwise(
    lambda case: case["num_images"] < 64 or case["num_classes"] < 1000,
    num_views=[1, 2, 5],
    num_images=[0, 1, 7, 64],
    num_classes=[2, 3, 10, 100, 1000],
    dtype=[*FLOATS, torch.float64],
    temperature=[0.25, 0.5, 1, 2.0],
    layout=["contiguous", "transposed", "every other"],
)
def test_guesses_equal_the_oracle(num_views, num_images, num_classes, dtype, temperature, layout):
    logits = random_logits(num_views, num_images, num_classes, dtype=dtype)
    guess = functional.guess_labels(strided_logits(logits, layout), temperature, impl="triton")
    assert guess.dtype == torch.float32
    expected = oracle.guess_labels(logits.cpu().double().numpy(), temperature)
    close(guess, expected)


# numpy, in the interpreter, warns of what is not a number
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_forbidden_classes_are_guessed_as_in_eager():
    logits = random_logits(2, 4, 5)
    logits[:, 0, 1:] = -math.inf  # both views allow one class
    logits[0, 1, :2] = -math.inf  # one view forbids two
    logits[:, 2, 3] = -math.inf
    logits[1, 3] = -math.inf  # a view that forbids all has no distribution
    guess = functional.guess_labels(logits, 0.5, impl="triton")
    close(guess, functional.guess_labels(logits, 0.5, impl="eager"))
    assert torch.equal(guess[0].cpu(), torch.eye(5)[0])
    assert guess[3].isnan().all()


@pairwise(
    lambda case: case["num_images"] + case["num_x"] < 64 or case["num_classes"] < 1000,
    num_x=[0, 1, 7, 64],
    num_images=[0, 1, 7, 33],
    num_views=[1, 2, 3],
    num_classes=[2, 10, 100, 1000],
    labels=["int64", "int32", "uint8", "float32", "float16", "transposed"],
    smoothing=[0.0, 0.1],
    mixed=[False, True],
    dtype=[torch.float32, torch.bfloat16, torch.float64],
)
def test_targets_equal_eager(
    num_x, num_images, num_views, num_classes, labels, smoothing, mixed, dtype
):
    logits = random_logits(num_views, num_images, num_classes, dtype=dtype)
    if labels in ("int64", "int32", "uint8"):
        y = torch.randint(0, min(num_classes, 255), (num_x,), generator=generator())
        y = y.to(DEVICE, getattr(torch, labels))
    else:
        y = random_targets(num_x, num_classes)
        y = y.to(torch.float16) if labels == "float16" else y
        y = y.T.contiguous().T if labels == "transposed" else y
    num_rows = num_x + num_views * num_images
    mixup = mixup_params(num_rows) if mixed else None
    expected, out = nan((num_rows, num_classes)), nan((num_rows, num_classes))
    eager.batch_targets(y, logits, 0.5, smoothing, mixup, expected)
    kernels.batch_targets(y, logits, 0.5, smoothing, mixup, out)
    close(out, expected)
    if labels != "float16":
        close(out.sum(dim=1), torch.ones(num_rows))


# The loss

GRADIENTS = {
    "loss": (1.0, None, None),
    "loss_x": (None, 1.0, None),
    "loss_u": (None, None, 1.0),
    "combination": (0.5, -1.5, 2.0),
}


def loss_and_gradient(logits, targets, num_labelled, weight, factors, impl):
    logits = logits.detach().requires_grad_()
    losses = functional.mixmatch_loss(logits, targets, num_labelled, weight, impl=impl)
    total = sum(
        factor * part
        for factor, part in zip(factors, losses[:3], strict=True)
        if factor is not None
    )
    (gradient,) = torch.autograd.grad(total, logits)
    return losses, gradient


@pairwise(
    lambda case: case["rows"][1] < 64 or case["num_classes"] < 1000,
    rows=[(0, 1), (1, 1), (3, 7), (0, 7), (7, 7), (21, 64), (100, 160), (0, 0)],
    num_classes=[2, 10, 100, 1000],
    dtype=[*FLOATS, torch.float64],
    gradient=list(GRADIENTS),
    weight=["float", "tensor on the CPU", "tensor on the device"],
    layout=["contiguous", "transposed"],
)
def test_the_loss_and_its_gradient_equal_the_oracle_and_autograd(
    rows, num_classes, dtype, gradient, weight, layout
):
    num_labelled, num_rows = rows
    logits = random_logits(num_rows, num_classes, dtype=dtype)
    logits = logits.T.contiguous().T if layout == "transposed" else logits
    targets = random_targets(num_rows, num_classes)
    weight = {
        "float": 3.0,
        "tensor on the CPU": torch.tensor(3.0),
        "tensor on the device": torch.tensor(3.0, device=DEVICE),
    }[weight]
    losses, grad = loss_and_gradient(
        logits, targets, num_labelled, weight, GRADIENTS[gradient], "triton"
    )
    expected = oracle.mixmatch_loss(
        logits.cpu().double().numpy(), targets.cpu().numpy(), num_labelled, 3.0
    )
    wide = torch.promote_types(dtype, torch.float32)
    for part, value in zip(losses[:3], expected, strict=True):
        assert part.dtype == wide
        close(part, torch.tensor(value, dtype=torch.float64))
    _, expected_grad = loss_and_gradient(
        logits.double(), targets.double(), num_labelled, 3.0, GRADIENTS[gradient], "eager"
    )
    assert grad.dtype == dtype
    close(grad, expected_grad)


# numpy, in the interpreter, warns of what is not a number
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("num_classes", [3, 4])  # with and without padding to a power of two
def test_logits_that_are_not_numbers_give_a_loss_that_is_not_a_number(num_classes):
    targets = random_targets(6, num_classes)
    for value in (math.nan, -math.inf, math.inf):
        logits = random_logits(6, num_classes)
        logits[[1, 4]] = value
        losses, grad = loss_and_gradient(logits, targets, 3, 1.0, GRADIENTS["loss"], "triton")
        assert all(part.isnan() for part in losses[:3])
        assert grad[[1, 4]].isnan().all()
        assert grad[[0, 2, 3, 5]].isfinite().all()


def test_the_gradient_goes_to_the_logits_only():
    targets = random_targets(4, 3).requires_grad_()
    weight = torch.tensor(2.0, device=DEVICE, requires_grad=True)
    logits = random_logits(4, 3).requires_grad_()
    functional.mixmatch_loss(logits, targets, 2, weight, impl="triton").loss.backward()
    assert logits.grad is not None
    assert targets.grad is None
    assert weight.grad is None


@pytest.mark.parametrize("rows_per_program", [1, 2, 16, 256])
def test_the_loss_does_not_depend_on_the_number_of_programs(monkeypatch, rows_per_program):
    # more programs of one row than the last one adds up at once
    logits, targets = random_logits(150, 3), random_targets(150, 3)
    expected = oracle.mixmatch_loss(logits.cpu().numpy(), targets.cpu().numpy(), 50, 3.0)
    monkeypatch.setattr(losing, "row_tile", lambda num_classes: (4, rows_per_program, 1))
    for _ in range(2):  # whoever finishes last puts the counter of programs back to 0
        losses = functional.mixmatch_loss(logits, targets, 50, 3.0, impl="triton")
        for part, value in zip(losses[:3], expected, strict=True):
            close(part, torch.tensor(value, dtype=torch.float64))


def test_the_loss_is_the_same_bits_every_time():
    logits, targets = random_logits(300, 10), random_targets(300, 10)
    first, *others = [
        torch.stack(functional.mixmatch_loss(logits, targets, 100, 75.0, impl="triton")[:3])
        for _ in range(3)
    ]
    for other in others:
        assert torch.equal(first, other)


# The builder


class Net(nn.Module):
    def __init__(self, channels=3, num_classes=5):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.dense = nn.Linear(4, num_classes)

    def forward(self, images):
        return self.dense(self.norm(self.conv(images.float())).mean(dim=(2, 3)))


POLICY_FIELDS = {
    "plain": {"padding": 2},
    "zeros": {"padding": 2, "padding_mode": "zeros", "mean": (0.4, 0.5, 0.6), "std": 0.5},
    "zoom": {"padding": 1, "zoom_px": (0, 3)},
    "blur": {"padding": 0, "blur_sigma": (0.0, 0.6)},
}
SMALL = (3, 8, 9)


def builder_data(labels="hard", shape=SMALL, num_x=3, num_u=4):
    x, u = random_images(num_x, *shape), random_images(num_u, *shape, seed=1)
    if labels == "soft":
        return x, random_targets(num_x, 5), u
    return x, torch.randint(0, 5, (num_x,), generator=generator()).to(DEVICE), u


def builders(policy="plain", dtype=torch.float32, channels_last=False, **switches):
    pair = []
    for impl in ("eager", "triton"):
        fields = {**POLICY_FIELDS[policy], "dtype": dtype, "channels_last": channels_last}
        augment = WeakAugment(**fields, impl=impl)
        pair.append(MixMatch(augment, 5, seed=11, impl=impl, **switches).to(DEVICE))
    return pair


@pairwise(
    policy=list(POLICY_FIELDS),
    mix=["all", "separate", "labelled", "unlabelled", "none"],
    labels=["hard", "soft"],
    smoothing=[0.0, 0.1],
    reuse=[False, True],
    channels_last=[False, True],
    dtype=FLOATS,
    source=["NCHW", "NHWC"],
)
def test_the_builder_equals_its_eager_form(
    policy, mix, labels, smoothing, reuse, channels_last, dtype, source
):
    torch.manual_seed(0)
    model = Net().to(DEVICE)
    x, y, u = builder_data(labels)
    if source == "NHWC":
        x, u = (images.permute(0, 2, 3, 1).contiguous() for images in (x, u))
    switches = {"mix": mix, "label_smoothing": smoothing, "reuse_buffers": reuse}
    plain, fused = builders(policy, dtype, channels_last, **switches)
    plain.augment.layout = fused.augment.layout = source
    for step in range(2):
        with torch.no_grad():
            expected, batch = plain(x, y, u, model), fused(x, y, u, model)
        assert int(batch.step) == step
        assert batch.inputs.dtype == dtype
        assert batch.inputs.is_contiguous(memory_format=FORMATS[channels_last])
        assert torch.equal(batch.params.index, expected.params.index)
        close(batch.params.lam, expected.params.lam)
        close(batch.inputs, expected.inputs)
        # the guess is a function of views that differ by a rounding of their dtype
        close(batch.targets, expected.targets, dtype=dtype)
    assert plain.state_dict() == fused.state_dict()


def test_ids_and_views_of_a_pipeline_give_the_batch_of_the_eager_form():
    torch.manual_seed(0)
    model = Net().to(DEVICE)
    _, y, _ = builder_data()
    x, views = random_logits(3, *SMALL), random_logits(2, 4, *SMALL, seed=2)
    ids_x, ids_u = torch.tensor([5, 2**40, 1]), torch.tensor([9, 8, 7, 2**33])
    plain, fused = builders()
    expected, batch = (
        builder.from_views(x, y, views, model, ids_x=ids_x, ids_u=ids_u)
        for builder in (plain, fused)
    )
    assert torch.equal(batch.params.index, expected.params.index)
    close(batch.inputs / 4, expected.inputs / 4)  # within -2 .. 2
    close(batch.targets, expected.targets)


# Launches


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that were launched."""
    names = []
    run = launching.run

    def counted(kernel, programs, *arguments, **options):
        names.append(kernel.__name__)
        run(kernel, programs, *arguments, **options)

    monkeypatch.setattr(launching, "run", counted)
    return names


RESAMPLED = ["draw_kernel", "weights_kernel", "resample_kernel", "guess_labels_kernel"]
RESAMPLED += ["mixup_kernel"]


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        ("plain", ["draw_kernel", "augment_kernel", "guess_labels_kernel", "augment_kernel"]),
        ("zoom", RESAMPLED),
        ("blur", RESAMPLED),
    ],
)
@pytest.mark.parametrize("mix", ["all", "none"])
def test_a_batch_takes_four_launches_and_one_more_with_zoom_or_blur(launches, policy, wanted, mix):
    _, fused = builders(policy, mix=mix)
    fused(*builder_data(), Net().to(DEVICE))
    assert launches == wanted


def test_the_loss_takes_one_launch_forward_and_one_backward(launches):
    logits, targets = random_logits(300, 10).requires_grad_(), random_targets(300, 10)
    loss = functional.mixmatch_loss(logits, targets, 100, 75.0, impl="triton").loss
    assert launches == ["mixmatch_loss_kernel"]
    loss.backward()
    assert launches == ["mixmatch_loss_kernel", "mixmatch_loss_backward_kernel"]


def test_nothing_is_launched_for_no_rows(launches):
    draw(0, 0, 0, 0)
    none = random_logits(0, 3, 4)
    functional.mixup(none, random_targets(0, 2), mixup_params(0), impl="triton")
    functional.guess_labels(random_logits(2, 0, 5), 0.5, impl="triton")
    assert launches == []


# Addresses beyond 2^31

FAR = 1_100_000_000  # two of these exceed int32, one does not


def far_apart(shape, strides, dtype=torch.uint8):
    """A view whose last elements lie beyond 2^31; only its own pages are ever touched."""
    reach = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    assert reach > 2**31
    return torch.empty(reach + 1, dtype=dtype, device=DEVICE).as_strided(shape, strides)


@pytest.mark.parametrize("stride", [FAR, 2**31 + 64])
@pytest.mark.parametrize("backend", [eager, kernels], ids=["eager", "triton"])
def test_images_further_apart_than_int32_are_read_rightly(backend, stride):
    near = random_images(3, 3, 8, 8)
    count = 3 if stride == FAR else 2
    images = far_apart((count, 3, 8, 8), (stride, 64, 8, 1))
    images.copy_(near[:count])
    params = augment_params(count, 8, 8, 2, zoom=False, blur_radius=0)
    options = {
        "scale": 1 / 127.5,
        "bias": -1.0,
        "padding": 2,
        "padding_mode": "reflect",
        "zoom": False,
        "blur_radius": 0,
        "channels_last_in": False,
        "dtype": torch.float32,
        "channels_last": False,
    }
    size = (count, 3, 8, 8)
    expected = augmented(eager, (near[:count],), params, size, **options)
    close(augmented(backend, (images,), params, size, **options), expected)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((3, 2, 4), (FAR, 4, 1)), ((1, 3, 4), (0, FAR, 1)), ((1, 2, 3), (0, 1, FAR))],
)
def test_logits_further_apart_than_int32_are_read_rightly(shape, strides):
    logits = far_apart(shape, strides, torch.float16)
    logits.copy_(random_logits(*shape))
    near = logits.clone(memory_format=torch.contiguous_format)
    close(
        functional.guess_labels(logits, 0.5, impl="triton"),
        functional.guess_labels(near, 0.5, impl="eager"),
    )
    rows, near_rows = logits[0], near[0]
    if max(strides[1:]) < FAR:
        return
    targets = random_targets(*rows.shape)
    losses, grad = loss_and_gradient(rows, targets, 1, 1.0, GRADIENTS["loss"], "triton")
    expected, expected_grad = loss_and_gradient(
        near_rows, targets, 1, 1.0, GRADIENTS["loss"], "eager"
    )
    close(losses.loss, expected.loss.detach())
    close(grad, expected_grad)


# Bad input


def test_tensors_on_different_devices_are_refused():
    images, params = random_images(2, 3, 8, 8), augment_params(2, 8, 8, 0, False, 0)
    logits, targets, mixup = random_logits(2, 3), random_targets(2, 3), mixup_params(2)
    far_params = AugmentParams(*(field.to("meta") for field in params))
    far_mixup = MixUpParams(*(field.to("meta") for field in mixup))
    plain, far = in_whole(1.0, 0.0), in_whole(torch.ones(3, device="meta"), 0.0)

    def augment(images, params, whole=plain, mixup=None):
        return functional.augment(images, params, *whole, mixup=mixup, impl="triton")

    calls = {
        "u": lambda: augment((images, images.to("meta")), params),
        "params.top": lambda: augment(images, far_params),
        "mixup.index": lambda: augment(images, params, mixup=far_mixup),
        "scale": lambda: augment(images, params, far),
        "targets": lambda: functional.mixup(logits, targets.to("meta"), mixup, impl="triton"),
        "params.index": lambda: functional.mixup(logits, targets, far_mixup, impl="triton"),
        "y": lambda: functional.batch_targets(
            torch.zeros(2, dtype=torch.int64, device="meta"), logits[None], 0.5, impl="triton"
        ),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"{name} must be on {DEVICE} like .* got it on meta"):
            call()
    with pytest.raises(ValueError, match=f"targets must be on {DEVICE} like logits"):
        functional.mixmatch_loss(logits, targets.to("meta"), 1, 1.0, impl="triton")


@pytest.mark.usefixtures("no_kernels_here")
def test_kernels_on_a_cpu_are_refused_without_the_interpreter():
    logits, targets = torch.zeros(2, 3), torch.zeros(2, 3)
    mixup = MixUpParams(torch.ones(2), torch.arange(2))
    y = torch.zeros(1, dtype=torch.int64)
    images = torch.zeros(2, 3, 8, 8)
    params = sampling.draw_augment(0, 0, 2, 0)
    calls = [
        lambda: functional.draw_batch(
            0, torch.tensor(0), 1, 1, DrawPlan(), device=torch.device("cpu"), impl="triton"
        ),
        lambda: functional.augment(images, params, *in_whole(1.0, 0.0), impl="triton"),
        lambda: functional.mixup(logits, targets, mixup, impl="triton"),
        lambda: functional.guess_labels(logits[None], 0.5, impl="triton"),
        lambda: functional.batch_targets(y, logits[None], 0.5, impl="triton"),
        lambda: functional.mixmatch_loss(logits, targets, 1, 1.0, impl="triton"),
        lambda: MixMatch(WeakAugment(), 5, impl="triton"),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match='impl="triton" cannot run on cpu: its kernels'):
            call()


def test_dtypes_that_kernels_do_not_know_are_refused():
    params = augment_params(2, 8, 8, 0, False, 0)
    plain = in_whole(1.0, 0.0)
    for images in (torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16"):
            functional.augment(
                images.to(DEVICE), params, *plain, dtype=torch.float64, impl="triton"
            )
    for dtype in (torch.int16, torch.float64, torch.float8_e4m3fn):
        images = torch.zeros(2, 3, 8, 8, device=DEVICE).to(dtype)
        with pytest.raises(ValueError, match="images must be uint8 or one of float32"):
            functional.augment(images, params, *plain, impl="triton")
    integers = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="inputs must be floating point, got int64"):
        functional.mixup(integers, random_targets(2, 3), mixup_params(2), impl="triton")
    with pytest.raises(ValueError, match="logits must be floating point, got int64"):
        functional.mixmatch_loss(integers, random_targets(2, 3), 1, 1.0, impl="triton")


def test_layouts_that_are_not_dense_are_refused():
    inputs, params = random_logits(2, 3, 8, 8), mixup_params(2)
    targets = random_targets(2, 4)
    with pytest.raises(ValueError, match="inputs must be contiguous or channels_last, got strides"):
        functional.mixup(inputs[..., ::2], targets, params, impl="triton")
    with pytest.raises(ValueError, match="targets must be contiguous or channels_last"):
        functional.mixup(inputs, targets.repeat(1, 2)[:, ::2], params, impl="triton")
    out = nan((2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"out must be .* with strides .* like inputs"):
        functional.mixup(
            inputs.contiguous(memory_format=torch.channels_last), targets, params, out=out
        )
    images, draws = random_images(2, 3, 8, 8), augment_params(2, 8, 8, 0, False, 0)
    strided = nan((2, 3, 8, 16))[..., ::2]
    with pytest.raises(ValueError, match="out must be contiguous or channels_last"):
        functional.augment(images, draws, *in_whole(1.0, 0.0), out=strided, impl="triton")


def test_more_programs_than_a_grid_can_have_are_refused(monkeypatch):
    monkeypatch.setattr(launching, "MOST_PROGRAMS", 3)
    inputs, targets = random_logits(4, 3), random_targets(4, 3)
    with pytest.raises(ValueError, match="at most 3 programs of a kernel, got 4; split the batch"):
        functional.mixup(inputs, targets, mixup_params(4), impl="triton")


def test_more_rows_than_int32_holds_are_refused():
    with pytest.raises(ValueError, match="a batch must have at most 1073741824 rows, got 3"):
        draw(0, 0, 2**30, 2**30)


def test_more_classes_than_a_tile_holds_are_refused():
    logits = torch.empty(1, 2, 2**16 + 1, device=DEVICE)
    y = torch.empty(0, dtype=torch.int64, device=DEVICE)
    calls = [
        lambda: functional.guess_labels(logits, 0.5, impl="triton"),
        lambda: functional.batch_targets(y, logits, 0.5, impl="triton"),
        lambda: functional.mixmatch_loss(logits[0], logits[0], 1, 1.0, impl="triton"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"at most 65536 classes .* got 65537; use impl="):
            call()


# On a GPU only


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("policy", POLICY_FIELDS)
def test_a_batch_and_its_loss_never_wait_for_the_device(policy):
    model = Net().to(DEVICE)
    _, fused = builders(policy)
    criterion = MixMatchLoss(75.0).to(DEVICE)
    data = builder_data()
    for guarded in (False, True):  # the first call compiles and makes constants
        torch.cuda.set_sync_debug_mode("error" if guarded else "default")
        try:
            batch = fused(*data, model)
            criterion(model(batch.inputs), batch).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_run_on_the_device_of_their_tensors():
    other = torch.device("cuda", 1)
    logits = random_logits(2, 3, 4).to(other)
    guess = functional.guess_labels(logits, 0.5, impl="triton")
    assert guess.device == other
    close(guess, functional.guess_labels(logits.cpu(), 0.5))
