"""Zoom and blur in Triton's kernels, against the oracle and eager: on a GPU, else interpreted.

A tile is 16 or 32 pixels wide, so that images of 33 and more have tiles that are cut off.
"""

import importlib
import math

import pytest
import torch

from gpu_mixmatch import functional, sampling
from gpu_mixmatch.impl import library
from gpu_mixmatch.types import Geometry, MixUpParams, Scaling
from tests.params import oracle_rows, still_params
from tests.skips import skip_without
from tests.tolerances import KERNEL_TOLERANCES

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
FORMATS = {False: torch.contiguous_format, True: torch.channels_last}
TO_UNIT = Scaling(1 / 127.5, -1.0)

skip_without("triton")
launching = importlib.import_module("gpu_mixmatch.impl.triton.launch")
resampling = importlib.import_module("gpu_mixmatch.impl.triton.resample")


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch):
    """What a kernel leaves out stays NaN."""
    empty = torch.empty

    def filled(*shape, **options):
        tensor = empty(*shape, **options)
        return tensor.fill_(math.nan if tensor.is_floating_point() else 0x7BADBAD)

    for module in (functional, library):
        fake = type(torch)("torch")
        fake.__dict__.update(torch.__dict__)
        fake.empty = filled
        monkeypatch.setattr(module, "torch", fake)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(count, channels, height, width, seed=0):
    shape = (count, channels, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(seed)).to(DEVICE)


def drawn(num_rows, padding=0, zoom=0, sigma=0.0, seed=1):
    params = sampling.draw_augment(
        seed, 2, num_rows, 0, padding=padding, zoom_px=(0, zoom), flip=0.5, blur_sigma=(0.0, sigma)
    )
    return on_device(params)


def on_device(params):
    return type(params)(*(field.to(DEVICE) for field in params))


def mixup_params(num_rows):
    index = torch.randperm(num_rows, generator=generator(3))
    lam = 0.5 + torch.rand(num_rows, generator=generator(4)) / 2
    return on_device(MixUpParams(lam, index))


def augmented(images, params, geometry, scaling=TO_UNIT, impl="triton", **options):
    return functional.augment(images, params, geometry, scaling, impl=impl, **options)


def close(result, expected):
    tolerance = KERNEL_TOLERANCES[result.dtype]
    torch.testing.assert_close(
        result.cpu().double(), expected.cpu().double(), rtol=tolerance, atol=tolerance
    )


def laid_out(images, source, dtype):
    """The same pixels at other addresses, and what tells the layout."""
    if dtype != torch.uint8:
        images = (images.float() / 255).to(dtype)
    if source == "NHWC":
        return images.permute(0, 2, 3, 1).contiguous(), "NHWC"
    if source == "strided":  # every second channel, lines that are longer than they are wide
        return images.repeat(1, 2, 1, 2)[:, ::2, :, : images.shape[3]], "NCHW"
    if source == "turned":
        return images.mT.contiguous().mT, "NCHW"
    if source.startswith("odd"):
        behind = int(source[3:])
        memory = images.new_empty(images.numel() + behind)
        memory[behind:] = images.flatten()
        return memory[behind:].view(images.shape), "NCHW"
    return images, "NCHW"


# shape, rows of x and images and views of u, mode, padding, zoom, radius, source, its dtype, dtype
# of the result, its layout
CASES = [
    ((3, 40, 36), (None, 2, 1), "reflect", 4, 12, 3, "plain", torch.uint8, torch.float32, True),
    ((3, 8, 40), (1, 1, 2), "zeros", 2, 0, 9, "odd1", torch.uint8, torch.float32, False),
    ((1, 33, 68), (None, 1, 2), "edge", 2, 40, 1, "odd3", torch.uint8, torch.float16, False),
    ((3, 36, 33), (1, 1, 1), "zeros", 0, 5, 0, "plain", torch.uint8, torch.bfloat16, True),
    ((4, 5, 9), (2, 0, 2), "edge", 3, 0, 2, "NHWC", torch.uint8, torch.float32, True),
    ((2, 24, 20), (0, 2, 1), "reflect", 2, 9, 2, "strided", torch.uint8, torch.float32, False),
    ((5, 16, 16), (None, 1, 1), "reflect", 0, 3, 0, "turned", torch.uint8, torch.float32, True),
    ((3, 17, 12), (1, 1, 1), "reflect", 2, 6, 2, "NHWC", torch.float32, torch.float32, False),
    ((1, 7, 34), (None, 2, 1), "zeros", 1, 4, 2, "strided", torch.float16, torch.float32, False),
    ((3, 12, 12), (None, 2, 1), "edge", 1, 3, 0, "odd1", torch.bfloat16, torch.bfloat16, True),
    ((3, 1, 1), (None, 2, 1), "edge", 2, 4, 3, "plain", torch.uint8, torch.float32, True),
    ((1, 4, 1), (None, 2, 1), "zeros", 1, 4, 2, "plain", torch.uint8, torch.float32, False),
]


@pytest.mark.parametrize(
    ("shape", "rows", "mode", "padding", "zoom", "radius", "source", "dtype_in", "dtype", "last"),
    CASES,
)
def test_views_equal_those_of_eager(
    shape, rows, mode, padding, zoom, radius, source, dtype_in, dtype, last
):
    once, images, views = rows
    counts = (images,) if once is None else (once, images)
    sources, layouts = zip(
        *(laid_out(random_images(n, *shape, seed=n), source, dtype_in) for n in counts),
        strict=True,
    )
    num_rows = (once or 0) + images * views
    params = drawn(num_rows, padding, zoom, radius / 3)
    by_channel = torch.linspace(0.8, 1.0, shape[0], device=DEVICE)
    unit = 1 / 127.5 if dtype_in == torch.uint8 else 2.0
    scaling = Scaling(unit * by_channel, -by_channel) if last else Scaling(unit, -1.0)
    whole = Geometry(padding, mode, zoom > 0, radius), scaling
    sources = sources if once is not None else sources[0]
    expected = augmented(sources, params, *whole, impl="eager", layout=layouts[0])
    result = augmented(sources, params, *whole, layout=layouts[0], dtype=dtype, channels_last=last)
    assert result.is_contiguous(memory_format=FORMATS[last])
    close(result, expected)


@pytest.mark.parametrize("mode", ["reflect", "zeros", "edge"])
@pytest.mark.parametrize(("height", "width", "radius"), [(5, 9, 20), (9, 36, 35)])
def test_a_blur_wider_than_the_image_reflects_again_and_again(height, width, radius, mode):
    images = random_images(2, 1, height, width)
    params = drawn(2, 2, 3, radius / 3)._replace(sigma=torch.tensor([radius / 3, 0.8]).to(DEVICE))
    geometry = Geometry(2, mode, True, radius)
    close(
        augmented(images, params, geometry, layout="NCHW"),
        augmented(images, params, geometry, layout="NCHW", impl="eager"),
    )


def test_a_blur_of_more_sources_than_a_product_takes_equals_eager():
    images = random_images(1, 1, 68, 66)
    params = drawn(1, 2, 4, 7.0)._replace(sigma=torch.tensor([6.0], device=DEVICE))
    geometry = Geometry(2, "reflect", True, 20)
    close(augmented(images, params, geometry), augmented(images, params, geometry, impl="eager"))


class Exact:
    """A policy as the oracle reads it, to [-1, 1]."""

    padding, padding_mode, blur_radius, mean, std = 2, "reflect", 3, (0.5,), (0.5,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bytes_are_weighed_to_half_of_what_the_result_can_tell_apart(dtype, monkeypatch):
    """What is between bytes and rounding loses less than rounding, in the worst of images."""
    images = random_images(3, 1, 36, 40)
    images[1] = images[1] // 128 * 255
    images[2] = 255
    params = drawn(3, 2, 9, 1.0)._replace(sigma=torch.tensor([1.0, 0.4, 0.9]).to(DEVICE))
    exact = oracle_rows(images.cpu(), params, Exact)
    unrounded = torch.full(images.shape, math.nan, device=DEVICE)
    launch = resampling.launch

    def into_float32(kernel, programs, device, out, *arguments, **options):
        if kernel is resampling.resample_kernel:
            out = unrounded
        launch(kernel, programs, device, out, *arguments, **options)

    monkeypatch.setattr(resampling, "launch", into_float32)
    augmented(images, params, Geometry(2, "reflect", True, 3), dtype=dtype)
    error = (unrounded.cpu().double() - exact).abs().max()
    # half precision: half a unit in the last place at the end of the range, which is 1
    most = {torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2**-8}
    assert error <= most[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("radius", [0, 3])
def test_a_row_that_is_not_zoomed_and_not_blurred_is_exactly_the_shifted_one(radius, dtype):
    images = random_images(2, 3, 20, 36)
    draws = {"top": [1, 4], "left": [3, 0], "flip": [1, 0]}
    params = on_device(still_params(2, **draws))
    shifted = augmented(images, params, Geometry(2, "zeros"), dtype=dtype)
    resampled = augmented(images, params, Geometry(2, "zeros", True, radius), dtype=dtype)
    assert torch.equal(resampled, shifted)


def test_a_zoom_that_leaves_one_pixel_shows_it_alone():
    images = random_images(2, 1, 33, 20)
    params = on_device(still_params(2, zoom=[(100, 0, 100, 0), (7, 100, 9, 100)]))
    views = augmented(images, params, Geometry(zoom=True), Scaling(1.0, 0.0))
    for view, image, (line, column) in zip(views, images, ((32, 19), (7, 9)), strict=True):
        assert torch.equal(view, image[:, line, column, None, None].float().expand_as(view))


def test_no_byte_outside_of_the_images_decides_over_a_view():
    """Words may reach beyond an image by up to three bytes, whose weights are 0."""
    memory = random_images(3, 1, 36, 36).flatten()
    params = drawn(1, 0, 6, 0.6)
    inside = slice(36 * 36 + 1, 2 * 36 * 36 + 1)
    views = []
    for around in (0, 255):
        surrounded = torch.full_like(memory, around)
        surrounded[inside] = memory[inside]
        images = surrounded[inside].view(1, 1, 36, 36)
        views.append(augmented(images, params, Geometry(0, "reflect", True, 2)))
    assert torch.equal(*views)


# With MixUp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
def test_blurred_views_are_mixed_where_it_is_asked_for(dtype, last):
    x, u = random_images(1, 3, 12, 16), random_images(2, 3, 12, 16, seed=1)
    params, mixup = drawn(5, 2, 0, 0.7), mixup_params(5)
    geometry = Geometry(2, "reflect", False, 2)
    options = {"dtype": dtype, "channels_last": last}
    mixed = augmented((x, u), params, geometry, mixup=mixup, **options)
    views = augmented((x, u), params, geometry, **options)
    partners = views[mixup.index].double()
    lam = mixup.lam.double()[:, None, None, None]
    close(mixed, partners + lam * (views.double() - partners))
    assert mixed.is_contiguous(memory_format=FORMATS[last])
    assert not torch.equal(mixed, views)


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


@pytest.mark.parametrize("geometry", [Geometry(zoom=True), Geometry(blur_radius=2)])
def test_a_view_takes_two_launches_and_one_more_where_it_is_mixed(geometry, launches):
    images, params = random_images(2, 1, 8, 8), drawn(2)
    augmented(images, params, geometry)
    assert launches == ["weights_kernel", "resample_kernel"]
    launches.clear()
    augmented(images, params, geometry, mixup=mixup_params(2))
    assert launches == ["weights_kernel", "resample_kernel", "mixup_kernel"]


def test_no_rows_launch_nothing(launches):
    none = torch.zeros(0, 3, 8, 8, dtype=torch.uint8, device=DEVICE)
    for mixup in (None, mixup_params(0)):
        views = augmented(none, drawn(0), Geometry(zoom=True), mixup=mixup)
        assert views.shape == (0, 3, 8, 8)
    assert launches == []
