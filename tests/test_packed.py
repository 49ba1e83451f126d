"""Words of four bytes give the bits that single bytes give: on a GPU, else in the interpreter."""

import importlib

import pytest
import torch

from gpu_mixmatch.impl import eager
from gpu_mixmatch.types import AugmentParams
from tests.skips import skip_without
from tests.test_triton import (
    DEVICE,
    FLOATS,
    augment_params,
    augmented,
    close,
    mixup_params,
    pairwise,
    random_images,
    rows_of,
)

skip_without("triton")
kernels = importlib.import_module("gpu_mixmatch.impl.triton")
launching = importlib.import_module("gpu_mixmatch.impl.triton.launch")
packed = importlib.import_module("gpu_mixmatch.impl.triton.packed")


@pytest.fixture
def by_words(monkeypatch):
    """Small images are taken too, in tiles of which there are several."""
    monkeypatch.setattr(packed, "_LEAST_VALUES", 0)
    monkeypatch.setattr(packed, "_ITEMS", 16)


def views(names, *arguments, **options):
    """Views by the kernel named, else the test fails."""
    launched = []
    run = launching.run

    def named(kernel, *args, **kwargs):
        launched.append(kernel.__name__)
        run(kernel, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "run", named)
        if names == ["augment_kernel"]:
            patch.setattr(packed, "_LEAST_VALUES", 2**31)
        result = augmented(kernels, *arguments, **options)
    assert launched == names
    return result


def beginning(images, start):
    """The same images from ``start`` bytes behind an aligned address."""
    memory = torch.zeros(start + images.numel(), dtype=torch.uint8, device=DEVICE)
    memory[start:] = images.flatten()
    return memory[start:].view(images.shape)


@pytest.mark.usefixtures("by_words")
@pairwise(
    lambda case: case["mode"] != "reflect" or case["padding"] < case["shape"][1],
    shape=[(3, 5, 16), (3, 9, 40), (1, 17, 12), (4, 6, 8), (2, 7, 28)],
    rows=[(1, 1, 2), (None, 2, 1), (0, 2, 1), (2, 0, 2)],
    mode=["reflect", "zeros", "edge"],
    padding=[1, 4, 18],
    mixed=[False, True],
    layout=["NCHW", "NHWC"],
    begin=[(0, 0), (1, 2), (2, 3), (3, 0)],
    dtype=FLOATS,
    channels_last=[False, True],
)
def test_words_and_bytes_give_the_same_views(
    shape, rows, mode, padding, mixed, layout, begin, dtype, channels_last
):
    once, images, _ = rows
    counts = (images,) if once is None else (once, images)
    sources = [random_images(count, *shape, seed=count) for count in counts]
    if layout == "NHWC":
        sources = [images.permute(0, 2, 3, 1).contiguous() for images in sources]
    sources = tuple(beginning(images, start) for images, start in zip(sources, begin, strict=False))
    num_rows = rows_of(rows)
    by_channel = torch.linspace(0.8, 1.0, shape[0], device=DEVICE)
    options = {
        "scale": by_channel / 127.5 if padding == 4 else 1 / 127.5,
        "bias": -by_channel if padding == 4 else -1.0,
        "padding": padding,
        "padding_mode": mode,
        "channels_last_in": layout == "NHWC",
        "mixup": mixup_params(num_rows) if mixed else None,
        "dtype": dtype,
        "channels_last": channels_last,
    }
    params = augment_params(num_rows, *shape[1:], padding, zoom=False, blur_radius=0)
    arguments = (sources, params, (num_rows, *shape))
    result = views(["packed_kernel"], *arguments, **options)
    assert torch.equal(result, views(["augment_kernel"], *arguments, **options))
    close(result, augmented(eager, *arguments, **{**options, "dtype": torch.float32}))


@pytest.mark.usefixtures("by_words")
@pytest.mark.parametrize(
    ("mode", "layout", "padding", "lefts"),
    [
        ("reflect", "NCHW", 7, range(15)),  # all that can be
        ("edge", "NCHW", 9, (0, 1, 3, 7, 9, 10, 14, 16, 18)),  # up to windows beside the image
        ("zeros", "NHWC", 9, (0, 1, 3, 7, 9, 10, 14, 16, 18)),
    ],
)
def test_shifts_and_flips_give_the_bytes_of_eager(mode, layout, padding, lefts):
    shape = (1 if layout == "NCHW" else 2, 8, 8)
    lefts = torch.tensor([*lefts, *lefts])
    flip = torch.arange(len(lefts)) >= len(lefts) // 2
    drawn = (lefts.flip(0), lefts, flip, torch.zeros(len(lefts), 4))
    params = AugmentParams(
        *(field.to(DEVICE, torch.int32) for field in drawn),
        sigma=torch.zeros(len(lefts), device=DEVICE),
    )
    images = random_images(len(lefts), *shape)
    if layout == "NHWC":
        images = images.permute(0, 2, 3, 1).contiguous()
    options = {
        "scale": 1.0,
        "bias": 0.0,
        "padding": padding,
        "padding_mode": mode,
        "channels_last_in": layout == "NHWC",
        "dtype": torch.float32,
        "channels_last": layout == "NHWC",
    }
    arguments = ((beginning(images, 1),), params, (len(lefts), *shape))
    result = views(["packed_kernel"], *arguments, **options)
    assert torch.equal(result, augmented(eager, *arguments, **options))


@pytest.mark.usefixtures("by_words")
@pytest.mark.parametrize("channels", [5, 6])
def test_planes_of_any_number_are_read_in_words(channels):
    images = random_images(2, channels, 6, 8)
    params = augment_params(2, 6, 8, 2, zoom=False, blur_radius=0)
    bias = torch.arange(channels, dtype=torch.float32, device=DEVICE)
    options = {"scale": 1.0, "bias": bias, "padding": 2, "channels_last_in": False}
    options |= {"dtype": torch.float32, "channels_last": False}
    result = views(["packed_kernel"], (images,), params, images.shape, **options)
    assert torch.equal(result, augmented(eager, (images,), params, images.shape, **options))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="looks at what the interpreter reads")
@pytest.mark.usefixtures("by_words")
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_only_aligned_words_that_hold_a_byte_of_the_images_are_read(layout, monkeypatch):
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    load, addresses = builder.create_masked_load, []

    def recorded(self, pointers, *rest):
        if str(pointers.get_element_ty()) == "uint32":
            addresses.append(torch.from_numpy(pointers.data.flatten().astype("int64")))
        return load(self, pointers, *rest)

    monkeypatch.setattr(builder, "create_masked_load", recorded)
    shape = (2, 6, 12)
    options = {"scale": 1.0, "bias": 0.0, "padding": 3, "dtype": torch.float32}
    options |= {"channels_last": False, "channels_last_in": layout == "NHWC"}
    params = augment_params(6, *shape[1:], 3, zoom=False, blur_radius=0)
    for begin in range(4):
        images = random_images(2, *shape)
        if layout == "NHWC":
            images = images.permute(0, 2, 3, 1).contiguous()
        images = beginning(images, begin)
        views(["packed_kernel"], (images,), params, (6, *shape), **options)
        words, start = torch.cat(addresses), images.data_ptr()
        assert set((words % 4).tolist()) == {0}
        assert start - 4 < words.min() <= start
        assert start + images.numel() - 4 <= words.max() < start + images.numel()
        addresses.clear()


# Which kernel runs


def launched(sources, shape, monkeypatch, *, channels_last=False, layout="NCHW", **fields):
    """The launches of a call, which do not run."""
    launches = []
    options = {"scale": 1.0, "bias": 0.0, "padding": 2, **fields}
    with monkeypatch.context() as patch:
        patch.setattr(
            launching, "run", lambda kernel, *_, **options: launches.append((kernel, options))
        )
        augmented(
            kernels,
            sources,
            augment_params(shape[0], *shape[2:], 2, zoom=False, blur_radius=0),
            shape,
            dtype=torch.float32,
            channels_last=channels_last,
            channels_last_in=layout == "NHWC",
            **options,
        )
    return launches


PACKED, BYTES = "packed_kernel", "augment_kernel"


@pytest.mark.parametrize(
    ("shape", "options", "wanted"),
    [
        ((3, 96, 96), {}, PACKED),
        ((3, 96, 96), {"channels_last": True}, PACKED),
        ((3, 96, 96), {"layout": "NHWC"}, PACKED),
        ((3, 96, 96), {"layout": "NHWC", "channels_last": True}, PACKED),
        ((2, 64, 64), {}, PACKED),
        ((3, 52, 52), {}, BYTES),  # 8112 values
        ((3, 96, 98), {}, BYTES),
        ((3, 700, 4), {}, BYTES),
        ((5, 64, 64), {}, PACKED),
        ((5, 64, 64), {"channels_last": True}, BYTES),
        ((5, 64, 64), {"layout": "NHWC"}, BYTES),
    ],
)
def test_the_layout_and_the_size_of_images_choose_the_kernel(shape, options, wanted, monkeypatch):
    channels, height, width = shape
    lying = (height, width, channels) if options.get("layout") == "NHWC" else shape
    images = torch.zeros(2, *lying, dtype=torch.uint8, device=DEVICE)
    ((kernel, _),) = launched((images,), (2, *shape), monkeypatch, **options)
    assert kernel.__name__ == wanted


def test_images_with_gaps_and_images_of_floats_are_read_one_by_one(monkeypatch):
    images = torch.zeros(2, 3, 96, 192, dtype=torch.uint8, device=DEVICE)
    whole = images[..., :96].contiguous()
    kinds = [(images[..., :96],), (whole, images[..., :96]), (whole.float(),)]
    for sources in kinds:
        num_rows = sum(map(len, sources))
        ((kernel, _),) = launched(sources, (num_rows, 3, 96, 96), monkeypatch)
        assert kernel.__name__ == BYTES


def test_images_in_the_other_memory_format_are_read_as_they_lie(monkeypatch):
    images = torch.zeros(2, 3, 96, 96, dtype=torch.uint8, device=DEVICE)
    images = images.contiguous(memory_format=torch.channels_last)
    ((kernel, options),) = launched((images,), images.shape, monkeypatch)
    assert (kernel.__name__, options["BY_PIXELS"]) == (PACKED, True)


def test_the_number_of_images_and_their_address_choose_nothing(monkeypatch):
    found = []
    for count, start in ((1, 0), (2, 1), (64, 3)):
        images = beginning(torch.zeros(count, 1, 64, 128, dtype=torch.uint8, device=DEVICE), start)
        ((kernel, options),) = launched((images,), images.shape, monkeypatch)
        found.append((kernel.__name__, options))
    assert found[0][0] == PACKED
    assert found[1:] == found[:1] * 2


@pytest.mark.usefixtures("by_words")
@pairwise(
    lambda case: case["mode"] != "reflect" or case["padding"] < case["shape"][1],
    shape=[(3, 5, 16), (1, 9, 28), (4, 6, 8)],
    mode=["reflect", "zeros", "edge"],
    padding=[0, 4, 9],
    layout=["NCHW", "NHWC"],
    begin=[0, 1, 3],
    dtype=FLOATS,
    channels_last=[False, True],
)
def test_words_zoom_as_eager_does(shape, mode, padding, layout, begin, dtype, channels_last):
    sources = (random_images(1, *shape), random_images(2, *shape, seed=2))
    if layout == "NHWC":
        sources = tuple(images.permute(0, 2, 3, 1).contiguous() for images in sources)
    sources = tuple(beginning(images, begin) for images in sources)
    options = {
        "scale": 1 / 127.5,
        "bias": torch.linspace(-1.0, 0.5, shape[0], device=DEVICE),
        "padding": padding,
        "padding_mode": mode,
        "zoom": True,
        "channels_last_in": layout == "NHWC",
        "dtype": dtype,
        "channels_last": channels_last,
    }
    params = augment_params(5, *shape[1:], padding, zoom=True, blur_radius=0)
    params.zoom[1:3] = 0  # as it is
    arguments = (sources, params, (5, *shape))
    result = views(["packed_kernel"], *arguments, **options)
    close(result, augmented(eager, *arguments, **{**options, "dtype": torch.float32}), dtype)
    shifted = views(["packed_kernel"], *arguments, **{**options, "zoom": False})
    assert torch.equal(result[1:3], shifted[1:3])  # to the bit
