"""Triton's kernels draw and apply chains as numpy and eager do, to the last bit."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

from gpu_mixmatch import ColorJitter, MixMatch, RandAugment, WeakAugment, functional, sampling
from gpu_mixmatch._chain import entries
from gpu_mixmatch.types import Chain, ChainParams, DrawPlan, Geometry, MixUpParams, Op, Scaling
from tests.skips import skip_without
from tests.tolerances import KERNEL_TOLERANCES

skip_without("triton")
triton = importlib.import_module("triton")
chaining = importlib.import_module("gpu_mixmatch.impl.triton.chain")
launching = importlib.import_module("gpu_mixmatch.impl.triton.launch")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
IN_WHOLE = Scaling(1.0, 0.0)
WEAK = WeakAugment(3)
POLICIES = {
    "fixmatch": RandAugment.fixmatch(WEAK),
    "usb after a crop": RandAugment.usb(WeakAugment.imagenet()),
    "jitter": ColorJitter(WEAK, gray=0.3, prob=0.8),
    "two of four": ColorJitter(WeakAugment(size=9), hue=0, contrast=0),
    "crop": WeakAugment(size=8),
    "resized crop": WeakAugment.imagenet(size=24),
    "no slot": RandAugment(num_ops=0),
    "no side": RandAugment(cutout=(0.0, 0.0), num_ops=1),
}
IDS = {
    "positions": (3, 37),
    "ids": (torch.arange(5) * 2**33 + 7, torch.arange(37) + 2**32 - 3),
}


def images_of(count, height, width, channels=3, seed=0):
    """Coarse patches with some noise, of less than all brightnesses."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.rand(count, channels, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(patches, (height, width), mode="bilinear")
    noise = torch.rand(count, channels, height, width, generator=generator)
    return (20 + 180 * smooth + 30 * noise).to(torch.uint8)


# Draws


def drawn(plan, ids, key=None, seed=7, step=2**31 + 5):
    return functional.draw_batch(
        seed,
        torch.tensor(step),
        *(part if isinstance(part, int) else part.to(DEVICE) for part in ids),
        plan,
        device=DEVICE,
        key=key,
        impl="triton",
    )


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_draws_equal_those_of_the_host(policy, ids):
    plan = DrawPlan(2, POLICIES[policy].policy)
    (params, mixup), (expected, of_host) = (
        drawn(plan, IDS[ids]),
        sampling.draw_batch(7, 2**31 + 5, *IDS[ids], plan),
    )
    for name in ("top", "left", "flip", "zoom", "chain"):
        assert torch.equal(getattr(params, name).cpu(), getattr(expected, name)), name
    assert torch.equal(mixup.index.cpu(), of_host.index)


def test_a_key_on_the_device_draws_what_the_host_s_key_draws():
    plan = DrawPlan(2, POLICIES["usb after a crop"].policy)
    key = torch.tensor([2**63 - 1, 2**32 - 1], device=DEVICE)
    params, _ = drawn(plan, (3, 5), key, seed=0, step=0)
    expected, _ = sampling.draw_batch(2**63 - 1, 2**32 - 1, 3, 5, plan)
    assert torch.equal(params.chain.cpu(), expected.chain)


# Operations


def applied(images, params, geometry, scaling=IN_WHOLE, **options):
    """What the kernels and what eager make of images."""
    on_device = sampling.augment_to_device(params, DEVICE)
    scaling = Scaling(*(f.to(DEVICE) if isinstance(f, torch.Tensor) else f for f in scaling))
    by_kernels = functional.augment(
        images.to(DEVICE), on_device, geometry, scaling, impl="triton", **options
    )
    scaling = Scaling(*(f.cpu() if isinstance(f, torch.Tensor) else f for f in scaling))
    by_eager = functional.augment(images, params, geometry, scaling, impl="eager", **options)
    return by_kernels.cpu(), by_eager


def programs_of(chain, slots):
    """Draws that hold the entries of rows."""
    still = sampling.draw_augment(0, 0, len(slots), 0)
    return ChainParams(*still, torch.tensor(slots, dtype=torch.int32))


def wrong_rows(chain, slots, images):
    params = programs_of(chain, slots)
    by_kernels, by_eager = applied(images, params, Geometry(chain=chain))
    names = [[entries(chain)[entry] for entry in row] for row in slots]
    wrong = (by_kernels != by_eager).flatten(1).sum(1).tolist()
    return [(name, count) for name, count in zip(names, wrong, strict=True) if count]


def single_operations():
    """Each operation at its ends and in between, and where a rule has an end."""
    ops = [op for preset in ("usb", "uda") for op in getattr(RandAugment, preset)().chain.ops]
    some = [Op(name, values[:: max(len(values) // 2, 1)]) for name, values in ops]
    ends = (
        Op("rotate", (90.0, 180.0, -128.7)),
        Op("shear_x", (2.5, -0.004)),
        Op("translate_x", (-2.5, -1000.0)),
        Op("hue", (-0.5, -0.21, 0.0, 0.002, 0.1, 0.5)),
        *(Op(name, (0.0, 7.0)) for name in ("brightness", "color", "contrast", "sharpness")),
    )
    return Chain((*sorted(set(some)), *ends), num_slots=1)


@pytest.mark.parametrize("channels", [3, 1])
def test_each_operation_equals_eager_s(channels):
    chain = single_operations()
    if channels == 1:
        chain = chain._replace(ops=chain.ops[::3])
    slots = [[entry] for entry in range(1, len(entries(chain)))]
    assert not wrong_rows(chain, slots, images_of(len(slots), 20, 17, channels))


HARD = Chain(
    (
        *(Op(name) for name in ("autocontrast", "equalize")),
        *(Op(name, (1.9,)) for name in ("contrast", "sharpness", "color")),
        Op("solarize", (100.0,)),
        Op("rotate", (27.0,)),
        Op("shear_x", (-0.27,)),
        Op("translate_y", (5.0,)),
    ),
    num_slots=3,
    cutout=0,
)
NAMES = [name for name, _ in entries(HARD)]
PROGRAMS = (
    "sharpness sharpness sharpness",
    "sharpness sharpness rotate",
    "sharpness equalize contrast",
    "equalize sharpness autocontrast",
    "rotate sharpness shear_x",
    "rotate equalize rotate",
    "translate_y solarize rotate",
    "shear_x translate_y rotate",
    "contrast color equalize",
    "identity rotate contrast",
)


@pytest.mark.parametrize(("size", "most_in_one"), [((32, 32), 2048), ((33, 20), 0)])
def test_chains_of_operations_that_need_a_whole_view_equal_eager_s(monkeypatch, size, most_in_one):
    """By one program, and by launches that share a view out."""
    monkeypatch.setattr(chaining, "_MOST_IN_ONE", most_in_one)
    slots = [[NAMES.index(name) for name in program.split()] for program in PROGRAMS]
    assert not wrong_rows(HARD, slots, images_of(len(slots), *size))


def test_statistics_of_a_large_view_are_added_up_from_its_parts():
    programs = ("equalize sharpness autocontrast", "contrast rotate equalize")
    slots = [[NAMES.index(name) for name in program.split()] for program in programs]
    assert not wrong_rows(HARD, slots, images_of(2, 96, 99))


def test_as_many_slots_as_there_may_be_equal_eager_s():
    engine = RandAugment(WEAK, num_ops=16, prob=0.5, cutout=5)
    params = engine.draw(0, 0, 2)
    assert torch.equal(*applied(images_of(2, 16, 16), params, engine.geometry))


# Views


VIEWS = {
    "mean outside": (RandAugment.fixmatch(WEAK, cutout=4), {}),
    "black outside, painted": (RandAugment.usb(WeakAugment(2, "zeros")), {}),
    "zoom": (RandAugment.fixmatch(WeakAugment(2, zoom_px=(0, 3)), cutout=4), {}),
    "crop": (RandAugment.kekmodel(WeakAugment(2, "edge", size=9), cutout=3), {}),
    "resized crop": (RandAugment.fixmatch(WeakAugment.imagenet(size=(12, 15)), cutout=7), {}),
    "more than a tile": (RandAugment.fixmatch(WeakAugment.imagenet(size=(18, 129))), {"rows": 2}),
    "jitter": (ColorJitter(WEAK, gray=0.3), {}),
    "channels last": (RandAugment.fixmatch(WEAK, cutout=4), {"channels_last": True}),
    "half": (RandAugment.fixmatch(WEAK, cutout=4), {"dtype": torch.float16}),
    "nhwc": (RandAugment.usb(WEAK), {"layout": "NHWC"}),
}
BLURRED = {
    "outside and cut out": (RandAugment.fixmatch(WeakAugment(3, blur_sigma=(0, 1))), {}),
    "painted, channels last": (
        RandAugment.kekmodel(WeakAugment(2, blur_sigma=(0, 2), size=(9, 12)), cutout=3),
        {"channels_last": True},
    ),
    "outside, half": (
        RandAugment(WeakAugment(blur_sigma=(0, 1)), ops={"rotate": [30.0]}, cutout=0),
        {"dtype": torch.float16},
    ),
    "nothing hidden": (ColorJitter(WeakAugment(2, blur_sigma=(0, 1), zoom_px=(0, 3))), {}),
}


@pytest.mark.parametrize("case", VIEWS)
def test_views_equal_eager_s(case):
    engine, options = VIEWS[case]
    count = options.get("rows", 6)
    options = {name: value for name, value in options.items() if name != "rows"}
    images = images_of(count, 16, 18)
    images = images.permute(0, 2, 3, 1).contiguous() if "layout" in options else images
    scaling = Scaling(torch.tensor([1 / 60, 1 / 70, 1 / 80]), torch.tensor([-0.5, 0.1, 0.2]))
    params = engine.draw(1, 2, count)
    by_kernels, by_eager = applied(images, params, engine.geometry, scaling, **options)
    assert torch.equal(by_kernels, by_eager)
    assert by_kernels.stride() == by_eager.stride()


@pytest.mark.parametrize("case", BLURRED)
def test_views_are_blurred_between_operations_and_cutout_as_eager_s(case):
    engine, options = BLURRED[case]
    scaling = Scaling(torch.tensor([1 / 60, 1 / 70, 1 / 80]), torch.tensor([-0.5, 0.1, 0.2]))
    by_kernels, by_eager = applied(
        images_of(4, 16, 20), engine.draw(1, 2, 4), engine.geometry, scaling, **options
    )
    tolerance = KERNEL_TOLERANCES[by_eager.dtype]
    torch.testing.assert_close(by_kernels, by_eager, rtol=tolerance, atol=tolerance)
    assert by_kernels.stride() == by_eager.stride()


def test_x_and_u_of_other_strides_are_drawn_once_and_k_times():
    engine = RandAugment.fixmatch(WEAK, cutout=4)
    x, u = images_of(2, 12, 12), images_of(3, 14, 12)[:, :, 2:]
    params = sampling.augment_to_device(engine.draw(0, 0, 8), DEVICE)
    views = functional.augment(
        (x.to(DEVICE), u.to(DEVICE)), params, engine.geometry, IN_WHOLE, impl="triton"
    )
    images = torch.cat([x, u, u])
    expected = functional.augment(
        images, engine.draw(0, 0, 8), engine.geometry, IN_WHOLE, impl="eager"
    )
    assert torch.equal(views.cpu(), expected)


@pytest.mark.parametrize(("channels_last", "sigma"), [(False, None), (True, None), (True, (0, 1))])
def test_views_are_mixed_as_eager_mixes_them(channels_last, sigma):
    engine = RandAugment.fixmatch(WeakAugment(3, blur_sigma=sigma), cutout=4)
    mixup = MixUpParams(torch.tensor([0.6, 1.0, 0.75, 0.9]), torch.tensor([2, 1, 3, 0]))
    params = sampling.augment_to_device(engine.draw(0, 0, 4), DEVICE)
    results = [
        functional.augment(
            images_of(4, 12, 12).to(device),
            sampling.augment_to_device(params, device),
            engine.geometry,
            Scaling(1 / 255, -0.5),
            mixup=MixUpParams(*(part.to(device) for part in mixup)),
            channels_last=channels_last,
            impl=impl,
        ).cpu()
        for impl, device in (("triton", DEVICE), ("eager", torch.device("cpu")))
    ]
    tolerance = KERNEL_TOLERANCES[torch.float32]
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


# Launches


@pytest.mark.parametrize(
    ("engine", "size", "sigma", "of_views"),
    [
        (RandAugment.fixmatch, 32, None, ["chain"]),
        (ColorJitter, 32, None, ["chain"]),
        (RandAugment.fixmatch, 50, None, ["event", "event", "chain"]),
        (ColorJitter, 50, None, ["event", "chain"]),
        (RandAugment.fixmatch, 16, (0, 1), ["chain", "weights", "resample", "cover"]),
        (ColorJitter, 12, (0, 1), ["chain", "weights", "resample"]),
    ],
    ids=str,
)
def test_a_batch_launches_a_kernel_for_its_views_one_for_each_event_and_three_for_a_blur(
    monkeypatch, engine, size, sigma, of_views
):
    launched = []
    run = launching.run

    def counted(kernel, *args, **options):
        launched.append(kernel.__name__)
        return run(kernel, *args, **options)

    monkeypatch.setattr(launching, "run", counted)
    weak = {"blur_sigma": sigma}
    mixmatch = MixMatch(engine(WeakAugment(impl="triton", **weak)), 3, seed=2, impl="triton")
    mixmatch = mixmatch.to(DEVICE)
    x, u = images_of(2, size, size).to(DEVICE), images_of(2, size, size, seed=1).to(DEVICE)
    y = torch.arange(2, device=DEVICE)
    batch = mixmatch(x, y, u, lambda images: images[:, :, 0, 0])
    names = ["draw", *of_views, "guess_labels", "mixup"]
    assert launched == [f"{name}_kernel" for name in names]
    expected = MixMatch(engine(WeakAugment(impl="eager", **weak)), 3, seed=2, impl="eager")
    plain = expected(x.cpu(), y.cpu(), u.cpu(), lambda images: images[:, :, 0, 0])
    tolerance = KERNEL_TOLERANCES[torch.float32]
    torch.testing.assert_close(batch.inputs.cpu(), plain.inputs, rtol=tolerance, atol=tolerance)


def test_counts_are_left_at_zero_for_the_next_batch():
    from gpu_mixmatch._buffers import Workspace

    workspace = Workspace()
    slots = [[NAMES.index(name) for name in ("equalize", "contrast", "autocontrast")]]
    params = sampling.augment_to_device(programs_of(HARD, slots), DEVICE)
    images = images_of(1, 50, 50).to(DEVICE)  # four tiles
    views = [
        functional.augment(
            images, params, Geometry(chain=HARD), IN_WHOLE, workspace=workspace, impl="triton"
        ).clone()
        for _ in range(2)
    ]
    assert torch.equal(*views)
    assert not workspace.zeros("counts", (1, 769), torch.int32, DEVICE).any()


def test_images_that_do_not_fit_into_a_pixel_are_refused():
    ops = {"posterize": [4.0]}
    engine = RandAugment(WEAK, ops=ops, cutout=0)
    params = sampling.augment_to_device(engine.draw(0, 0, 2), DEVICE)
    with pytest.raises(RuntimeError, match=r'impl="triton" cannot run .* on images of 4 channels'):
        functional.augment(
            images_of(2, 12, 12, 4).to(DEVICE), params, engine.geometry, IN_WHOLE, impl="triton"
        )


# Machine code


@pytest.mark.slow
def test_kernels_of_chains_keep_their_branches_and_round_what_eager_rounds():
    """Compiled without a GPU; a product and a sum rounded as one would truncate to other bytes."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.chain_kernels", "--arch", "80", "90", "100"),
            *("--case", "fixmatch, 32 px", "fixmatch, 224 px", "blur, 96 px"),
            *("crop of 256 px", "resized crop of 256 px"),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert {row["arch"] for row in rows} == {80, 90, 100}
    versions = tuple(map(int, triton.__version__.split(".")[:2]))
    for row in rows:
        assert row["stack"] == row["local_accesses"] == 0, row
        assert row["variants"] == 1, row
        of_chain = row["kernel"] in ("draw_kernel", "event_kernel", "chain_kernel")
        if of_chain and versions >= (3, 8):  # before: right, but slower
            assert row["registers"] <= 128, row
            assert row["layout_conversions"] == 0, row
    for row in rows:
        if row["kernel"] == "chain_kernel":
            # three are part of a float64 division, of the tables that a view's own program makes
            assert row["ffma"] == (3 if row["shared"] else 0), row
            assert row["fmul"] > 0, row
            assert row["branches"] >= (40 if row["shared"] else 9), row
