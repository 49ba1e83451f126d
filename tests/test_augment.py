"""WeakAugment and functional.augment: padding, slicing, F.interpolate, conv2d, and the oracle."""

import inspect
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d, interpolate, pad

from gpu_mixmatch import WeakAugment, as_augment, functional
from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch.augment import CallableAugment
from gpu_mixmatch.augment.base import Augment
from gpu_mixmatch.types import AugmentParams, AugmentPolicy, Geometry, Scaling
from tests.factories import random_images
from tests.params import oracle_rows, still_params
from tests.tolerances import TOLERANCES

pytestmark = pytest.mark.usefixtures("each_cpu_impl")

NAN = float("nan")
F_PAD_MODE = {"reflect": "reflect", "zeros": "constant", "edge": "replicate"}
FORMATS = {False: torch.contiguous_format, True: torch.channels_last}
PLAIN = {"mean": 0.0, "std": 1.0}
# every option at once, for images of at least 7 px
EVERYTHING = {
    "padding": 3,
    "zoom_px": (0, 3),
    "flip": 0.5,
    "blur_sigma": (0.0, 1.2),
    "mean": (0.5, 0.4, 0.45),
    "std": (0.25, 0.3, 0.27),
}
SHAPES = [(3, 32, 32), (1, 28, 28), (3, 9, 7), (4, 5, 13), (1, 8, 5), (3, 5, 5), (2, 6, 9)]

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def rows_of(params, rows):
    return AugmentParams(*(field[rows] for field in params))


def to_unit(images):
    return images.float() * torch.tensor(1 / 255)


def shifted(images, params, padding, mode):
    """Pad and slice each image, with torch's own padding, in float32."""
    padded = pad(images.float(), [padding] * 4, mode=F_PAD_MODE[mode])
    height, width = images.shape[-2:]
    corners = zip(params.top.tolist(), params.left.tolist(), strict=True)
    rows = [
        padded[row, :, top : top + height, left : left + width]
        for row, (top, left) in enumerate(corners)
    ]
    return torch.stack(rows) if rows else padded[:, :, :height, :width]


def zoomed(image, cuts):
    """Cut (top, bottom, left, right) off [C, H, W] and resize back, with torch's interpolation."""
    height, width = image.shape[-2:]
    top, bottom, left, right = cuts
    top, left = min(top, height - 1), min(left, width - 1)
    cut = image[None, :, top : max(height - bottom, top + 1), left : max(width - right, left + 1)]
    return interpolate(
        cut, size=(height, width), mode="bilinear", align_corners=False, antialias=False
    )[0]


def blurred(image, sigma, radius):
    """Convolve [C, H, W] with the sampled Gaussian, by torch's padding and convolution."""
    if sigma == 0:
        return image
    distance = torch.arange(-radius, radius + 1, dtype=torch.float64)
    taps = torch.exp(-(distance**2) / (2 * sigma**2))
    taps /= taps.sum()
    kernel = (taps[:, None] * taps)[None, None]
    planes = pad(image.double()[:, None], [radius] * 4, mode="reflect")
    return conv2d(planes, kernel)[:, 0].float()


def worst(result, expected):
    return float((result.double() - expected.double()).abs().max()) if len(expected) else 0.0


# Shift and flip


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", ["reflect", "zeros", "edge"])
@pytest.mark.parametrize(
    ("shape", "source"),
    [(shape, source) for shape in SHAPES for source in ("NCHW", "NHWC", "NCHW strided")],
    ids=str,
)
def test_shift_equals_padding_and_slicing_exactly(shape, mode, source, channels_last):
    images = random_images(9, shape)
    given = {
        "NCHW": images,
        "NHWC": images.permute(0, 2, 3, 1).contiguous(),
        "NCHW strided": images.contiguous(memory_format=torch.channels_last),
    }[source]
    augment = WeakAugment(
        4, mode, flip=0.0, channels_last=channels_last, layout=source[:4], **PLAIN
    )
    params = augment.draw(0, 1, 9, 1)
    params = params._replace(  # among them the corners of the padded image
        top=torch.tensor([0, 8, *params.top[2:]], dtype=torch.int32),
        left=torch.tensor([8, 0, *params.left[2:]], dtype=torch.int32),
    )
    views = augment.apply(given, params)
    assert torch.equal(views, to_unit(shifted(images, params, 4, mode)))
    assert views.is_contiguous(memory_format=FORMATS[channels_last])


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("mode", ["reflect", "zeros", "edge"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flip_mirrors_the_shifted_window_exactly(shape, mode, channels_last):
    images = random_images(6, shape)
    augment = WeakAugment(4, mode, flip=1.0, channels_last=channels_last, **PLAIN)
    params = augment.draw(0, 1, 6, 1)
    assert params.flip.all()
    params.flip[::3] = 0
    expected = to_unit(shifted(images, params, 4, mode))
    expected[params.flip > 0] = expected[params.flip > 0].flip(-1)
    assert torch.equal(augment.apply(images, params), expected)


@pytest.mark.parametrize(("padding", "size"), [(0, 1), (0, 2), (1, 2), (4, 5), (12, 13)])
def test_the_greatest_padding_that_reflects_is_one_less_than_the_image(padding, size):
    images = random_images(20, (3, size, size + 1))
    augment = WeakAugment(padding, flip=0.0, layout="NCHW", **PLAIN)
    params = augment.draw(0, 0, 20, 0)
    views = augment.apply(images, params)
    assert torch.equal(views, to_unit(shifted(images, params, padding, "reflect")))


@pytest.mark.parametrize("mode", ["zeros", "edge"])
def test_padding_may_exceed_the_image_where_nothing_is_reflected(mode):
    images = random_images(40, (3, 5, 2))
    augment = WeakAugment(9, mode, flip=0.0, layout="NCHW", **PLAIN)
    params = augment.draw(0, 0, 40, 0)
    assert torch.equal(augment.apply(images, params), to_unit(shifted(images, params, 9, mode)))


def test_zeros_padding_is_black_before_it_is_normalised():
    images = torch.full((1, 3, 5, 5), 255, dtype=torch.uint8)
    augment = WeakAugment(2, "zeros", flip=0.0)
    view = augment.apply(images, still_params(1, top=[0], left=[4]))
    assert (view[:, :, :2] == -1).all()
    assert (view[:, :, :, 3:] == -1).all()
    assert (view[:, :, 2:, :3] == 1).all()


# Zoom


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 9, 13), (4, 7, 5), (2, 12, 8)], ids=str)
def test_zoom_equals_interpolation_of_the_cut(shape, channels_last):
    images = random_images(16, shape)
    most = (min(shape[1:]) - 1) // 2
    augment = WeakAugment(0, zoom_px=(0, most), flip=0.0, channels_last=channels_last, **PLAIN)
    params = augment.draw(0, 0, 16, 0)
    assert params.zoom.amax() == most
    expected = torch.stack(
        [zoomed(i, c) for i, c in zip(to_unit(images), params.zoom.tolist(), strict=True)]
    )
    assert worst(augment.apply(images, params), expected) < 1e-5


def test_a_zoom_that_cuts_nothing_leaves_the_image():
    images = random_images(3, (3, 9, 7))
    augment = WeakAugment(0, zoom_px=(0, 3), **PLAIN)
    assert worst(augment.apply(images, still_params(3)), to_unit(images)) < 1e-6


@pytest.mark.parametrize(
    "cuts",
    [
        (5, 5, 0, 0),  # more than the height: the row after the cut is left
        (7, 0, 0, 0),
        (0, 7, 0, 7),
        (7, 7, 7, 7),
        (0, 16, 0, 16),
    ],
)
def test_a_zoom_leaves_at_least_one_pixel(cuts):
    images = random_images(1, (3, 8, 8))
    augment = WeakAugment(0, zoom_px=(0, 16), flip=0.0, **PLAIN)
    view = augment.apply(images, still_params(1, zoom=[cuts]))
    assert worst(view[0], zoomed(to_unit(images[0]), cuts)) < 1e-5


@pytest.mark.parametrize("cuts", [(8, 0, 0, 0), (10, 3, 0, 0), (0, 0, 16, 16), (16, 16, 16, 16)])
def test_a_zoom_past_the_far_edge_still_shows_the_image(cuts):
    images = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    augment = WeakAugment(0, zoom_px=(0, 16), flip=0.0, **PLAIN)
    view = augment.apply(images, still_params(1, zoom=[cuts]))
    assert worst(view, torch.ones(1, 3, 8, 8)) < 1e-6


@pytest.mark.parametrize("size", [4, 8, 16, 32, 96])
def test_zoom_and_blur_keep_a_plain_image_plain(size):
    images = torch.full((40, 3, size, size), 102, dtype=torch.uint8)
    augment = WeakAugment.blog(layout="NCHW", **PLAIN)
    views = augment.apply(images, augment.draw(0, 0, 40, 1))
    assert worst(views, torch.full((1,), 0.4)) < 2e-6


# Blur


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "sigma"),
    [((3, 32, 32), 3.0), ((1, 13, 9), 1.3), ((4, 7, 11), 2.0), ((2, 5, 5), 0.4)],
    ids=str,
)
def test_blur_equals_convolution_with_the_sampled_gaussian(shape, sigma, channels_last):
    images = random_images(8, shape)
    augment = WeakAugment(
        0, flip=0.0, blur_sigma=(0.0, sigma), channels_last=channels_last, **PLAIN
    )
    radius = math.ceil(3 * sigma)
    assert augment.blur_radius == radius
    params = augment.draw(0, 0, 8, 0)
    params.sigma[:3] = torch.tensor([sigma, 0.1, 0.0])
    expected = torch.stack(
        [blurred(i, s, radius) for i, s in zip(to_unit(images), params.sigma.tolist(), strict=True)]
    )
    assert worst(augment.apply(images, params), expected) < 1e-5


def test_a_sigma_of_zero_leaves_the_image():
    images = random_images(4, (3, 9, 7))
    augment = WeakAugment(0, flip=0.0, blur_sigma=(0.0, 3.0), **PLAIN)
    assert torch.equal(augment.apply(images, still_params(4)), to_unit(images))


def test_a_blur_wider_than_the_image_reflects_again_and_again():
    images = random_images(3, (1, 2, 3))
    augment = WeakAugment(0, flip=0.0, blur_sigma=(0.0, 3.0), layout="NCHW", **PLAIN)
    params = still_params(3, sigma=[3.0, 1.0, 0.5])
    expected = oracle_rows(images, params, augment)
    assert worst(augment.apply(images, params), expected) < TOLERANCES[torch.float32]


# The order of steps


def test_steps_come_in_the_order_shift_zoom_flip_blur_normalise():
    images = random_images(1, (3, 12, 10))
    augment = WeakAugment(4, "zeros", zoom_px=(0, 5), blur_sigma=(0.0, 1.5), mean=0.4, std=0.2)
    draws = still_params(1, top=[1], left=[7], flip=[1], zoom=[(3, 0, 4, 1)], sigma=[1.1])
    shift = lambda image: shifted(image[None], draws, 4, "zeros")[0]  # noqa: E731
    zoom = lambda image: zoomed(image, (3, 0, 4, 1))  # noqa: E731
    flip = lambda image: image.flip(-1)  # noqa: E731
    blur = lambda image: blurred(image, draws.sigma.item(), 5)  # noqa: E731
    normalise = lambda image: (image / 255 - 0.4) / 0.2  # noqa: E731

    def composed(*steps):
        image = images[0].float()
        for step in steps:
            image = step(image)
        return image

    view = augment.apply(images, draws)[0]
    assert worst(view, composed(shift, zoom, flip, blur, normalise)) < 1e-5
    for other in (  # the pairs that do not commute
        (zoom, shift, flip, blur, normalise),
        (shift, flip, zoom, blur, normalise),
        (flip, shift, zoom, blur, normalise),
        (shift, blur, zoom, flip, normalise),
        (blur, shift, zoom, flip, normalise),
        (normalise, shift, zoom, flip, blur),
    ):
        assert worst(view, composed(*other)) > 0.1


# The oracle


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize(
    ("shape", "mode"),
    [((3, 7, 9), "reflect"), ((1, 11, 7), "zeros"), ((4, 8, 8), "edge"), ((2, 7, 7), "reflect")],
)
def test_everything_equals_the_oracle(shape, mode, rows, channels_last, dtype):
    channels = shape[0]
    fields = {**EVERYTHING, "mean": (0.5, 0.4, 0.45, 0.6)[:channels]}
    fields["std"] = (0.25, 0.3, 0.27, 0.5)[:channels]
    augment = WeakAugment(padding_mode=mode, dtype=dtype, channels_last=channels_last, **fields)
    images = random_images(rows, shape)
    params = augment.draw(1, 2, rows, 1)
    views = augment.apply(images, params)
    assert views.dtype == dtype
    assert views.shape == images.shape
    assert views.is_contiguous(memory_format=FORMATS[channels_last])
    assert worst(views, oracle_rows(images, params, augment)) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_float_images_of_any_dtype_equal_the_oracle(dtype):
    augment = WeakAugment(**EVERYTHING)
    images = (random_images(4, (3, 9, 8)).float() / 255).to(dtype)
    params = augment.draw(1, 2, 4, 1)
    expected = oracle_rows(images, params, augment)
    assert worst(augment.apply(images, params), expected) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("fields", [{"padding": 4}, EVERYTHING], ids=["shift", "everything"])
def test_bytes_and_unit_floats_give_the_same_views(fields):
    augment = WeakAugment(**fields)
    images = random_images(6, (3, 9, 11))
    params = augment.draw(0, 0, 6, 0)
    views = augment.apply(images.float() / 255, params)
    assert worst(views, augment.apply(images, params)) < TOLERANCES[torch.float32]


def test_nhwc_images_give_the_views_of_nchw_images():
    fields = {**EVERYTHING, "mean": 0.4, "std": 0.3}
    augment = WeakAugment(**fields)
    for shape in ((3, 9, 11), (3, 9, 9), (4, 16, 18), (1, 7, 7), (5, 9, 11)):
        images = random_images(6, shape)
        params = augment.draw(0, 0, 6, 0)
        nhwc = images.permute(0, 2, 3, 1).contiguous()
        views = augment.apply(images, params)
        told = WeakAugment(**fields, layout="NHWC")
        assert torch.equal(told.apply(nhwc, params), views)
        if shape not in ((3, 9, 11), (5, 9, 11)):  # whose shape leaves a doubt
            assert torch.equal(augment.apply(nhwc, params), views)


@pytest.mark.parametrize(
    "shape",
    [
        (2, 128, 1),  # signals, or grey pictures of 2 rows
        (1, 128, 2),
        (12, 9, 3),  # patches of many channels, or pictures of 12 x 9 pixels
        (5, 4, 4),
        (3, 4, 4),
        (4, 4, 3),
        (3, 3, 3),
        (1, 1, 1),
        (64, 128, 1),
        (32, 32, 5),  # NHWC of many channels
        (32, 48, 5),
        (8, 8, 8),
        (240, 320, 2),
    ],
    ids=str,
)
def test_a_shape_that_leaves_a_doubt_wants_a_layout(shape):
    images = torch.zeros(2, *shape, dtype=torch.uint8)
    first, second, third = shape
    calls = {
        "normalize": lambda layout: WeakAugment(0, layout=layout).normalize(images),
        "forward": lambda layout: WeakAugment(0, layout=layout)(images, 0, 0),
        "functional": lambda layout: functional.augment(
            images, still_params(2), Geometry(), Scaling(1.0, 0.0), layout=layout
        ),
        "callable": lambda layout: as_augment(lambda x: x, layout).build(images, images, 0, 0),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=r'layout .* give the engine layout="NCHW" or'):
            call(None)
        assert call("NCHW").shape[1:] == shape
        assert call("NHWC").shape[1:] == (third, first, second)


@pytest.mark.parametrize(
    "shape",
    [(3, 32, 32), (1, 28, 28), (4, 5, 7), (2, 9, 5), (5, 32, 48), (12, 9, 9), (2, 224, 224)],
    ids=str,
)
def test_channels_that_come_first_are_known_by_the_shape(shape):
    images = torch.zeros(2, *shape, dtype=torch.uint8)
    assert WeakAugment(0).normalize(images).shape[1:] == shape


def test_an_unknown_layout_is_refused():
    for make in (lambda: WeakAugment(layout="HWC"), lambda: as_augment(lambda x: x, "HWC")):
        with pytest.raises(ValueError, match=r"layout must be one of .*, got 'HWC'"):
            make()
    with pytest.raises(ValueError, match="layout must be None for an engine"):
        as_augment(WeakAugment(), "NCHW")


def test_memory_formats_hold_the_same_values():
    images = random_images(6, (3, 9, 11))
    contiguous = WeakAugment(**EVERYTHING)
    channels_last = WeakAugment(**EVERYTHING, channels_last=True)
    params = contiguous.draw(0, 0, 6, 0)
    views = channels_last.apply(images, params)
    assert worst(views, contiguous.apply(images, params)) < TOLERANCES[torch.float32]


# One buffer


@pytest.mark.parametrize("mode", ["reflect", "zeros", "edge"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("everything", [False, True], ids=["shift", "everything"])
def test_every_element_of_out_is_written(everything, channels_last, dtype, mode):
    fields = EVERYTHING if everything else {"padding": 4}
    augment = WeakAugment(padding_mode=mode, dtype=dtype, channels_last=channels_last, **fields)
    x, u = random_images(5, (3, 9, 8)), random_images(3, (3, 9, 8), seed=1)
    params = augment.draw_batch(0, 0, 5, 3, 2)
    out = torch.empty(11, 3, 9, 8, dtype=dtype).to(memory_format=FORMATS[channels_last])
    out.fill_(NAN)
    views = augment.apply((x, u), params, out=out)
    assert views.data_ptr() == out.data_ptr()
    assert views.stride() == out.stride()
    assert not out.isnan().any()
    assert torch.equal(out, augment.apply((x, u), params))


def test_every_element_is_written_where_rows_take_more_than_one_chunk():
    augment = WeakAugment.cifar10(dtype=torch.float16)
    x, u = random_images(100, (3, 32, 32)), random_images(75, (3, 32, 32), seed=1)
    params = augment.draw_batch(0, 0, 100, 75, 3)
    out = torch.full((325, 3, 32, 32), NAN, dtype=torch.float16)
    augment.apply((x, u), params, out=out)
    assert not out.isnan().any()
    expected = torch.cat(
        [
            augment.apply(x, rows_of(params, slice(0, 100))),
            *[
                augment.apply(u, rows_of(params, slice(100 + 75 * k, 175 + 75 * k)))
                for k in range(3)
            ],
        ]
    )
    assert torch.equal(out, expected)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_x_and_the_views_of_u_are_parts_of_one_buffer(channels_last):
    augment = WeakAugment(channels_last=channels_last)
    views = augment.build(random_images(4), random_images(3), augment.draw_batch(0, 0, 4, 3, 2), 2)
    assert views.shape == (10, 3, 8, 8)
    assert views.untyped_storage().nbytes() == views.numel() * views.element_size()
    x, u = views[:4], views[4:]
    assert x.untyped_storage().data_ptr() == u.untyped_storage().data_ptr()
    assert x.is_contiguous(memory_format=FORMATS[channels_last])
    assert u.is_contiguous(memory_format=FORMATS[channels_last])


@pytest.mark.parametrize("fields", [{"padding": 4}, EVERYTHING], ids=["shift", "everything"])
@pytest.mark.parametrize(("len_x", "len_u", "views"), [(4, 3, 2), (1, 1, 1), (0, 3, 2), (3, 0, 2)])
def test_a_pair_equals_separate_calls(len_x, len_u, views, fields):
    augment = WeakAugment(**fields)
    x, u = random_images(len_x, (3, 9, 8)), random_images(len_u, (3, 9, 8), seed=1)
    params = augment.draw_batch(0, 0, len_x, len_u, views)
    parts = [augment.apply(x, rows_of(params, slice(0, len_x)))]
    for view in range(views):
        start = len_x + view * len_u
        parts.append(augment.apply(u, rows_of(params, slice(start, start + len_u))))
    expected = torch.cat(parts)
    assert worst(augment.apply((x, u), params), expected) < 1e-6
    if fields is not EVERYTHING:
        assert torch.equal(augment.apply((x, u), params), expected)


def test_one_image_fills_as_many_rows_as_were_drawn():
    augment = WeakAugment(4, flip=0.5, **PLAIN)
    images = random_images(3, (3, 9, 8))
    params = augment.draw(0, 0, 3, (1, 2, 3))
    views = augment.apply(images, params)
    expected = to_unit(shifted(images.repeat(3, 1, 1, 1), params, 4, "reflect"))
    expected[params.flip > 0] = expected[params.flip > 0].flip(-1)
    assert torch.equal(views, expected)


# Independence


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "fields",
    [
        {"padding": 4},
        {**EVERYTHING, "zoom_px": (0, 0)},
        {**EVERYTHING, "blur_sigma": None},
        EVERYTHING,
    ],
    ids=["shift", "blur", "zoom", "everything"],
)
@pytest.mark.parametrize("size", [9, 32])
def test_a_view_does_not_depend_on_the_batch_around_it(size, fields, channels_last):
    augment = WeakAugment(channels_last=channels_last, **fields)
    images = random_images(40, (3, size, size))
    ids = torch.arange(100, 140)
    views = augment.apply(images, augment.draw(0, 7, ids, 1))
    for row in (0, 17, 39):
        alone = augment.apply(images[row : row + 1], augment.draw(0, 7, ids[row : row + 1], 1))
        if augment.blur_radius:  # a matrix product may sum in another order for another batch
            assert worst(alone[0], views[row]) < 2e-6
        else:
            assert torch.equal(alone[0], views[row])


def test_images_are_left_as_they_were():
    augment = WeakAugment(**EVERYTHING)
    for images in (random_images(4), random_images(4).float() / 255):
        before = images.clone()
        augment.apply(images, augment.draw(0, 0, 4, 0))
        augment.normalize(images)
        assert torch.equal(images, before)


# Workspace


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_workspace_gives_the_same_views_in_the_same_memory(dtype, channels_last):
    augment = WeakAugment(**EVERYTHING, dtype=dtype, channels_last=channels_last)
    x, u = random_images(4, (3, 9, 8)), random_images(3, (3, 9, 8), seed=1)
    workspace = Workspace()
    first = augment.build(x, u, augment.draw_batch(0, 0, 4, 3, 2), 2, workspace)
    address, before = first.data_ptr(), first.clone()
    second = augment.build(x, u, augment.draw_batch(0, 1, 4, 3, 2), 2, workspace)
    assert second.data_ptr() == address
    assert torch.equal(before, augment.build(x, u, augment.draw_batch(0, 0, 4, 3, 2), 2))
    assert torch.equal(second, augment.build(x, u, augment.draw_batch(0, 1, 4, 3, 2), 2))
    assert not torch.equal(before, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_a_workspace_makes_no_buffer_anew_in_steady_state(channels_last, dtype, monkeypatch):
    augment = WeakAugment.cifar10(dtype=dtype, channels_last=channels_last)
    x, u = random_images(64, (3, 32, 32)), random_images(64, (3, 32, 32), seed=1)
    workspace = Workspace()
    handed_out = {}
    empty = Workspace.empty

    def recorded(self, name, shape, *rest):
        buffer = empty(self, name, shape, *rest)
        handed_out.setdefault(name, set()).add(buffer.untyped_storage().data_ptr())
        buffers.append(buffer)  # kept alive, so that no address is used twice
        return buffer

    monkeypatch.setattr(Workspace, "empty", recorded)
    buffers = []
    for step in range(3):
        augment.build(x, u, augment.draw_batch(0, step, 64, 64, 2), 2, workspace)
    assert {name: len(addresses) for name, addresses in handed_out.items()} == dict.fromkeys(
        handed_out, 1
    )


def test_a_workspace_serves_batches_of_changing_size():
    augment = WeakAugment(**EVERYTHING)
    workspace = Workspace()
    for step, (count, size) in enumerate([(8, 9), (3, 9), (3, 12), (8, 9)]):
        images = random_images(count, (3, size, size), seed=step)
        params = augment.draw(0, step, count, 0)
        views = augment.apply(images, params, workspace=workspace)
        assert torch.equal(views, augment.apply(images, params))


# The module


def test_forward_draws_and_applies_one_view():
    augment = WeakAugment(**EVERYTHING)
    images = random_images(5, (3, 9, 8))
    expected = augment.apply(images, augment.draw(3, 4, 5, 2))
    assert torch.equal(augment(images, 3, 4, view=2), expected)
    assert not torch.equal(augment(images, 3, 4), expected)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("nhwc", [False, True], ids=["NCHW", "NHWC"])
def test_normalize_equals_to_tensor_and_normalise(nhwc, channels_last, dtype):
    mean, std = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    layout = "NHWC" if nhwc else None
    augment = WeakAugment(
        mean=mean, std=std, dtype=dtype, channels_last=channels_last, layout=layout
    )
    images = random_images(5, (3, 9, 7))
    unit = images.double() / 255
    column = lambda values: torch.tensor(values, dtype=torch.float64)[:, None, None]  # noqa: E731
    expected = (unit - column(mean)) / column(std)
    for given in (images, images.float() / 255):
        given = given.permute(0, 2, 3, 1).contiguous() if nhwc else given
        values = augment.normalize(given)
        assert values.dtype == dtype
        assert values.is_contiguous(memory_format=FORMATS[channels_last])
        assert worst(values, expected) < TOLERANCES[dtype]


def test_normalize_is_augmentation_that_changes_nothing():
    augment = WeakAugment(padding=2, mean=(0.4, 0.5, 0.6), std=0.3)
    images = random_images(3)
    views = augment.apply(images, still_params(3, padding=2))
    assert torch.equal(augment.normalize(images), views)


def test_presets_have_the_values_of_the_paper():
    def fields(augment):
        return augment.padding, augment.padding_mode, augment.flip, augment.zoom_px

    assert fields(WeakAugment.cifar10()) == (4, "reflect", 0.5, (0, 0))
    assert fields(WeakAugment.cifar100()) == (4, "reflect", 0.5, (0, 0))
    assert fields(WeakAugment.svhn()) == (4, "reflect", 0.0, (0, 0))
    assert fields(WeakAugment.stl10()) == (12, "reflect", 0.5, (0, 0))
    for preset in ("cifar10", "cifar100", "svhn", "stl10", "fashion_mnist", "digits", "blog"):
        augment = getattr(WeakAugment, preset)()
        assert (augment.mean, augment.std) == ((0.5,), (0.5,))  # pixels in [-1, 1]
        assert (augment.blur_sigma is None) == (preset != "blog")
        extremes = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 5, 5)
        assert augment.normalize(extremes).unique().tolist() == [-1, 1]


def test_presets_for_digits_and_letters_do_not_mirror():
    for preset in ("svhn", "digits"):
        augment = getattr(WeakAugment, preset)()
        assert not augment.draw(0, 0, 1000, 1).flip.any()


def test_a_preset_takes_other_fields():
    augment = WeakAugment.stl10(padding=6, dtype=torch.bfloat16, mean=(0.1, 0.2, 0.3))
    assert (augment.padding, augment.flip, augment.dtype) == (6, 0.5, torch.bfloat16)
    assert augment.mean == (0.1, 0.2, 0.3)


def test_the_blog_preset_zooms_flips_and_blurs():
    augment = WeakAugment.blog()
    assert (augment.padding, augment.zoom_px, augment.flip) == (0, (0, 16), 0.5)
    assert augment.blur_sigma == (0.0, 3.0)
    assert augment.blur_radius == 9


@pytest.mark.parametrize("size", [32, 96])
def test_the_blog_preset_equals_interpolation_flip_and_convolution(size):
    augment = WeakAugment.blog()
    images = random_images(12, (3, size, size))
    params = augment.draw(0, 0, 12, 1)
    assert int(params.zoom.max()) > 12
    for row, view in enumerate(augment.apply(images, params)):
        image = zoomed(to_unit(images[row]), params.zoom[row].tolist())
        image = image.flip(-1) if params.flip[row] else image
        expected = blurred(image, float(params.sigma[row]), 9) * 2 - 1
        assert worst(view, expected) < 2e-5


def test_apply_of_a_module_still_visits_every_module():
    augment = WeakAugment()
    parent = nn.Sequential(augment, nn.Linear(2, 2))
    visited = []
    assert parent.apply(visited.append) is parent
    assert visited == [augment, parent[1], parent]
    assert augment.apply(visited.append) is augment
    assert visited[-1] is augment


def test_repr_shows_every_field():
    fields = {
        "padding": 7,
        "padding_mode": "edge",
        "zoom_px": (1, 2),
        "flip": 0.25,
        "blur_sigma": (0.5, 1.5),
        "mean": (0.125,),
        "std": (0.375,),
        "dtype": torch.bfloat16,
        "channels_last": True,
        "layout": "NHWC",
        "impl": "eager",
        "size": (5, 6),
        "area": None,
        "aspect": (0.5, 2.0),
    }
    assert fields.keys() == inspect.signature(WeakAugment).parameters.keys()
    for given in ({**fields, "zoom_px": (0, 0)}, {**fields, "size": None}):  # never both
        text = repr(WeakAugment(**given))
        for name, value in given.items():
            assert f"{name}={value!r}" in text


def test_there_is_no_state_to_save():
    augment = WeakAugment(mean=(0.1, 0.2, 0.3))
    assert augment.state_dict() == {}
    assert list(augment.parameters()) == []
    nn.Sequential(augment).load_state_dict({}, strict=True)


# Other engines


def test_an_engine_is_used_as_it_is():
    augment = WeakAugment()
    assert isinstance(augment, Augment)
    assert as_augment(augment) is augment
    engine = as_augment(torch.flip)
    assert isinstance(engine, CallableAugment)
    assert as_augment(engine) is engine


@pytest.mark.parametrize("nhwc", [False, True], ids=["NCHW", "NHWC"])
def test_a_callable_gets_unit_floats_and_builds_one_view_per_call(nhwc):
    x, u = random_images(4, (3, 9, 8)), random_images(3, (3, 9, 8), seed=1)
    seen = []

    def brighten(images):
        seen.append(images.clone())
        return images + len(seen)

    given = [images.permute(0, 2, 3, 1).contiguous() if nhwc else images for images in (x, u)]
    engine = as_augment(brighten, "NHWC" if nhwc else None)
    views = engine.build(*given, engine.draw_batch(0, 0, 4, 3, 2), 2)
    assert len(seen) == 3
    for got, expected in zip(seen, (x, u, u), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, expected.float() / 255)
    assert torch.equal(views, torch.cat([seen[0] + 1, seen[1] + 2, seen[2] + 3]))


def test_a_callable_that_writes_in_place_spoils_neither_images_nor_other_views():
    x, u = random_images(2).float() / 255, random_images(3).float() / 255
    before = x.clone(), u.clone()
    engine = as_augment(lambda images: images.sub_(0.5).div_(0.5))
    views = engine.build(x, u, engine.draw_batch(0, 0, 2, 3, 2), 2)
    assert torch.equal(x, before[0])
    assert torch.equal(u, before[1])
    assert worst(views, torch.cat([before[0], before[1], before[1]]) * 2 - 1) < 1e-6


def noise(images):
    return images + torch.rand_like(images)


def test_a_callable_is_reproducible_by_seed_and_step():
    x, u = random_images(4), random_images(3)
    engine = as_augment(noise)

    def build(seed, step):
        return engine.build(x, u, engine.draw_batch(seed, step, 4, 3, 2), 2)

    views = build(3, 4)
    torch.rand(7)  # wherever the global generator is
    assert torch.equal(build(3, 4), views)
    assert not torch.equal(build(3, 5), views)
    assert not torch.equal(build(4, 4), views)
    assert not torch.equal(views[4:7], views[7:])  # two views of u


def test_a_callable_leaves_the_global_generator_as_it_was():
    engine = as_augment(noise)
    x, u = random_images(4), random_images(3)
    state = torch.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = torch.rand(6)
        torch.manual_seed(0)
        first = torch.rand(3)
        engine.build(x, u, engine.draw_batch(0, 0, 4, 3, 2), 2)
        assert torch.equal(torch.cat([first, torch.rand(3)]), expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
@needs_cuda
def test_a_callable_on_the_cpu_leaves_the_generator_of_the_gpu_as_it_was():
    engine = as_augment(noise)
    state = torch.cuda.get_rng_state()
    engine.build(random_images(4), random_images(3), engine.draw_batch(0, 0, 4, 3, 2), 2)
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_a_callable_that_raises_leaves_the_global_generator_as_it_was():
    def fail(images):
        torch.rand(3)
        raise RuntimeError("no view today")

    engine = as_augment(fail)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no view today"):
        engine.build(random_images(4), random_images(3), engine.draw_batch(0, 0, 4, 3, 2), 2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda x: None, TypeError, "must return a floating point tensor, got None"),
        (
            lambda x: x.numpy(),
            TypeError,
            r"must return a floating point tensor, got a numpy array \[4",
        ),
        (lambda x: x.byte(), TypeError, r"got a tensor \[4, 3, 8, 8\] uint8"),
        (lambda x: x[0], ValueError, r"must return \[4, C, H, W\].*got \[3, 8, 8\]"),
        (lambda x: x[1:], ValueError, r"must return \[4, C, H, W\].*got \[3, 3, 8, 8\]"),
    ],
)
def test_what_a_callable_returns_is_checked(function, error, message):
    engine = as_augment(function)
    with pytest.raises(error, match=message):
        engine.build(random_images(4), random_images(3), engine.draw_batch(0, 0, 4, 3, 2), 2)


@pytest.mark.parametrize("value", ["cifar10", None, 4])
def test_neither_engine_nor_callable_is_refused(value):
    with pytest.raises(TypeError, match=f"augment must be an engine .* got {value!r}"):
        as_augment(value)


# Errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"padding_mode": "symmetric"}, r"padding_mode must be one of .*got 'symmetric'"),
        ({"padding": -1}, r"padding must be in 0 \.\. 32768, got -1"),
        ({"padding": 2**70}, r"padding must be in 0 \.\. 32768, got 1180591620717411303424"),
        ({"flip": 1.5}, r"flip must be in \[0, 1\], got 1.5"),
        ({"flip": -0.1}, r"flip must be in \[0, 1\], got -0.1"),
        ({"flip": NAN}, r"flip must be in \[0, 1\], got nan"),
        ({"zoom_px": (0, 2), "size": 4}, r"zoom_px must be \(0, 0\) where there is a size"),
        ({"zoom_px": (0, 2), "area": (0.5, 1)}, r"zoom_px must be \(0, 0\) where there is a size"),
        ({"zoom_px": (3, 1)}, r"zoom_px must be two integers, .*got \(3, 1\)"),
        ({"zoom_px": (-1, 1)}, r"zoom_px\[0\] must be in 0 \.\. 32768, got -1"),
        ({"blur_sigma": (-1, 1)}, r"blur_sigma\[0\] must be in \[0, 1000\], got -1"),
        ({"blur_sigma": (2.0, 1.0)}, r"blur_sigma must be two numbers, .*got \(2.0, 1.0\)"),
        ({"blur_sigma": (0, math.inf)}, r"blur_sigma\[1\] must be in \[0, 1000\], got inf"),
        ({"std": 0}, "std must be above 0, got 0"),
        ({"std": math.inf}, "std must be finite, got inf"),
        ({"std": (0.5, -0.5, 0.5)}, r"std\[1\] must be above 0, got -0.5"),
        ({"std": (58.4, 57.1, 57.4)}, r"std\[0\] must be at most 1, .*divide it by 255 .*0\.229"),
        ({"mean": (0.485, 116.3, 103.5)}, r"mean\[1\] must be at most 1, .*divide it by 255"),
        ({"mean": -0.1}, "mean must be at least 0, got -0.1"),
        ({"mean": NAN}, "mean must be finite, got nan"),
        ({"mean": ()}, r"mean must be a number or one per channel, got \(\)"),
        ({"mean": (0.1, 0.2), "std": (0.1, 0.2, 0.3)}, "mean and std must"),
        ({"dtype": torch.float64}, "dtype must be one of float32, float16, bfloat16, got float64"),
        ({"dtype": torch.uint8}, "dtype must be one of float32, float16, bfloat16, got uint8"),
    ],
    ids=str,
)
def test_a_field_out_of_range_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        WeakAugment(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"padding": 1.5}, "padding must be an integer, got 1.5 of type float"),
        ({"padding": True}, "padding must be an integer, got True of type bool"),
        ({"zoom_px": (0.5, 1)}, r"zoom_px\[0\] must be an integer, got 0.5"),
        ({"zoom_px": (1,)}, r"zoom_px must be two integers, least and most, got \(1,\)"),
        ({"blur_sigma": 1.0}, "blur_sigma must be two numbers, least and most, got 1.0"),
        ({"flip": "often"}, "flip must be a number, got 'often'"),
        ({"mean": "0.5"}, "mean must be a number, got '0.5'"),
        ({"mean": torch.tensor(0.5)}, "mean must be a number, got a tensor"),
        ({"dtype": "float16"}, "dtype must be a torch.dtype, got 'float16'"),
        ({"channels_last": 1}, "channels_last must be True or False, got 1"),
    ],
    ids=str,
)
def test_a_field_of_the_wrong_kind_is_refused(fields, message):
    with pytest.raises(TypeError, match=message):
        WeakAugment(**fields)


def test_numbers_of_numpy_are_fields():
    augment = WeakAugment(
        np.int64(2), zoom_px=(np.uint8(0), np.int32(3)), flip=np.float32(0.5), mean=np.ones(3) / 2
    )
    assert augment.policy == AugmentPolicy(2, (0, 3), 0.5, None)
    assert augment.mean == (0.5, 0.5, 0.5)
    assert all(type(value) is float for value in augment.mean)


def apply_to(images, **fields):
    augment = WeakAugment(**fields)
    first = images[0] if isinstance(images, tuple) else images
    rows = len(first) + (len(images[1]) if isinstance(images, tuple) else 0)
    return augment.apply(images, still_params(rows, augment.padding))


@pytest.mark.parametrize(("height", "width"), [(4, 9), (9, 4), (1, 1)])
def test_an_image_too_small_to_reflect_is_refused(height, width):
    message = rf"padding = 4 for images of {height} x {width} pixels"
    with pytest.raises(ValueError, match=message):
        apply_to(random_images(2, (3, height, width)), padding=4, layout="NCHW")


@pytest.mark.parametrize(
    "u",
    [
        random_images(2, (1, 8, 8)),
        random_images(2, (3, 9, 8)),
        random_images(2, (3, 8, 9)),
        random_images(2, dtype=torch.float32),
        random_images(2).permute(0, 2, 3, 1).contiguous(),
    ],
    ids=["channels", "height", "width", "dtype", "layout"],
)
def test_x_and_u_of_different_kinds_are_refused(u):
    with pytest.raises(
        ValueError, match=r"x and u must have the same channels.*got \[2, 3, 8, 8\]"
    ):
        apply_to((random_images(2), u))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float64, torch.bool], ids=str)
def test_images_of_another_dtype_are_refused(dtype):
    name = str(dtype).removeprefix("torch.")
    images = torch.zeros(2, 3, 8, 8, dtype=dtype)
    for call in (apply_to, WeakAugment().normalize):
        with pytest.raises(ValueError, match=f"images must be uint8 or one of .*got {name}"):
            call(images)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 3, 3, 8, 8), (8,)])
def test_images_that_are_no_batch_are_refused(shape):
    images = torch.zeros(shape, dtype=torch.uint8)
    message = r"images must be \[M, C, H, W\] or \[M, H, W, C\], got"
    for call in (apply_to, WeakAugment().normalize):
        with pytest.raises(ValueError, match=message):
            call(images)


@pytest.mark.parametrize(
    "fields",
    [
        {"mean": (0.5, 0.5)},
        {"std": (0.5, 0.5)},
        {"mean": (0.5, 0.5), "std": (0.5, 0.5)},
    ],
    ids=["mean", "std", "both"],
)
def test_images_with_other_channels_than_mean_and_std_are_refused(fields):
    message = "images must have 2 channels like mean and std, got 3"
    for call in (lambda i: apply_to(i, **fields), WeakAugment(**fields).normalize):
        with pytest.raises(ValueError, match=message):
            call(random_images(2))


@pytest.mark.parametrize("rows", [1, 3, 5, 7])
def test_params_that_do_not_fit_the_images_are_refused(rows):
    augment = WeakAugment(0)
    with pytest.raises(ValueError, match=rf"params must have a row per view of .*got {rows}"):
        augment.apply((random_images(2), random_images(4)), still_params(rows))
    if rows % 4:
        with pytest.raises(ValueError, match=rf"params must have a row per view of .*got {rows}"):
            augment.apply(random_images(4), still_params(rows))


def test_params_without_images_are_refused():
    with pytest.raises(ValueError, match="images must not be empty where params have rows, got 3"):
        WeakAugment(0).apply(random_images(0), still_params(3))


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(3, 3, 8, 8),
        torch.empty(2, 3, 8, 9),
        torch.empty(2, 8, 8, 3),
        torch.empty(2, 3, 8, 8, dtype=torch.float16),
    ],
    ids=["rows", "width", "layout", "dtype"],
)
def test_an_out_of_another_kind_is_refused(out):
    with pytest.raises(ValueError, match=r"out must be \[2, 3, 8, 8\] float32, got"):
        WeakAugment(0).apply(random_images(2), still_params(2), out=out)


def test_an_out_that_is_not_dense_is_refused():
    out = torch.empty(2, 3, 8, 16)[..., ::2]
    with pytest.raises(ValueError, match="out must be"):
        WeakAugment(0).apply(random_images(2), still_params(2), out=out)


def plain_augment(images=None, **fields):
    images = random_images(2) if images is None else images
    scaling = Scaling(fields.pop("scale", torch.ones(3)), fields.pop("bias", torch.zeros(3)))
    moved = {name: fields.pop(name) for name in Geometry._fields if name in fields}
    return functional.augment(images, still_params(2), Geometry(**moved), scaling, **fields)


@pytest.mark.usefixtures("no_kernels_here")
@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"scale": torch.ones(2)}, ValueError, r"scale must be \[C\] with C = 3 .*got \[2\]"),
        ({"bias": torch.ones(1)}, ValueError, r"bias must be \[C\] with C = 3 .*got \[1\]"),
        ({"padding": -1}, ValueError, r"padding must be in 0 \.\. 32768, got -1"),
        ({"blur_radius": -1}, ValueError, r"blur_radius must be in 0 \.\. 3000, got -1"),
        ({"zoom": 1}, TypeError, "zoom must be True or False, got 1"),
        ({"padding_mode": "wrap"}, ValueError, "padding_mode must be one of .*got 'wrap'"),
        ({"dtype": torch.float64}, ValueError, "dtype must be one of .*got float64"),
        ({"impl": "x"}, ValueError, "impl must be one of .*got 'x'"),
        ({"impl": "triton"}, RuntimeError, 'impl="triton" cannot run on cpu'),
    ],
    ids=[
        "scale",
        "bias",
        "padding",
        "blur_radius",
        "zoom",
        "padding_mode",
        "dtype",
        "impl",
        "triton",
    ],
)
def test_arguments_that_do_not_fit_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        plain_augment(**fields)


@pytest.mark.usefixtures("no_kernels_here")
def test_an_implementation_that_is_missing_is_refused_by_the_module_too():
    augment = WeakAugment(0, impl="triton")
    with pytest.raises(RuntimeError, match='impl="triton" cannot run on cpu'):
        augment.apply(random_images(2), still_params(2))


def test_scale_and_bias_are_applied_per_channel():
    images = random_images(2)
    scale, bias = torch.tensor([1.0, 2.0, -0.5]), torch.tensor([0.0, 3.0, 7.0])
    expected = images.float() * scale[:, None, None] + bias[:, None, None]
    for channels_last in (False, True):
        views = plain_augment(images, scale=scale, bias=bias, channels_last=channels_last)
        assert torch.equal(views, expected)
