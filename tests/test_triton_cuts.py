"""Random crops in Triton's kernels, resized or not, against eager: on a GPU, else interpreted."""

import importlib

import pytest
import torch

from gpu_mixmatch import MixMatch, WeakAugment, functional
from gpu_mixmatch.types import MixUpParams, Scaling
from tests.skips import skip_without
from tests.tolerances import KERNEL_TOLERANCES

skip_without("triton")
launching = importlib.import_module("gpu_mixmatch.impl.triton.launch")
packed = importlib.import_module("gpu_mixmatch.impl.triton.packed")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
CPU = torch.device("cpu")
FORMATS = {False: torch.contiguous_format, True: torch.channels_last}


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that run."""
    names = []
    run = launching.run

    def named(kernel, *args, **options):
        names.append(kernel.__name__)
        run(kernel, *args, **options)

    monkeypatch.setattr(launching, "run", named)
    return names


def images_of(count, height, width, channels=3, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(count)
    shape = (count, channels, height, width)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return images if dtype == torch.uint8 else (images / 255).to(dtype)


def on(device, tensors):
    return type(tensors)(*(tensor.to(device) for tensor in tensors))


def results(engine, sources, num_rows, mixup=None, layout="NCHW"):
    """Views of the kernels and of eager."""
    params = engine.draw(3, 1, num_rows)
    unit = 1 / 127.5 if sources[0].dtype == torch.uint8 else 2.0
    of_channels = torch.tensor([0.9, 0.8, 1.0])
    found = []
    for impl, device in (("triton", DEVICE), ("eager", CPU)):
        images = tuple(
            (source.permute(0, 2, 3, 1).contiguous() if layout == "NHWC" else source).to(device)
            for source in sources
        )
        views = functional.augment(
            images if len(images) > 1 else images[0],
            on(device, params),
            engine.geometry,
            Scaling((unit * of_channels).to(device), -of_channels.to(device)),
            dtype=engine.dtype,
            channels_last=engine.channels_last,
            mixup=on(device, mixup) if mixup else None,
            layout=layout,
            impl=impl,
        )
        assert views.is_contiguous(memory_format=FORMATS[engine.channels_last])
        found.append(views.cpu())
    return found


# A plain crop


@pytest.mark.parametrize("in_words", [False, True])
@pytest.mark.parametrize(
    ("policy", "size", "layout"),
    [
        ({"size": (8, 12), "padding": 0}, (12, 16), "NCHW"),
        ({"size": 8, "padding": 3, "channels_last": True}, (9, 20), "NHWC"),
        ({"size": (5, 8), "padding": 2, "padding_mode": "zeros"}, (5, 12), "NHWC"),
        ({"size": 12, "padding": 9, "padding_mode": "edge"}, (14, 16), "NCHW"),
    ],
)
def test_a_crop_has_the_bits_of_eager_s(monkeypatch, launched, in_words, policy, size, layout):
    monkeypatch.setattr(packed, "_LEAST_VALUES", 0 if in_words else 2**31)
    views, expected = results(
        WeakAugment(**policy), [images_of(1, *size), images_of(2, *size)], 5, layout=layout
    )
    assert launched == ["packed_kernel" if in_words else "augment_kernel"]
    assert torch.equal(views, expected)


@pytest.mark.parametrize(("in_words", "dtype"), [(True, torch.uint8), (False, torch.float16)])
def test_crops_are_mixed_in_the_same_launch(monkeypatch, launched, in_words, dtype):
    monkeypatch.setattr(packed, "_LEAST_VALUES", 0)
    mixup = MixUpParams(torch.tensor([0.6, 1.0, 0.75]), torch.tensor([2, 1, 0]))
    images = images_of(3, 11, 12, dtype=dtype)
    views, expected = results(WeakAugment(padding=1, size=8), [images], 3, mixup)
    assert launched == ["packed_kernel" if in_words else "augment_kernel"]
    tolerance = KERNEL_TOLERANCES[torch.float32]
    torch.testing.assert_close(views, expected, rtol=tolerance, atol=tolerance)


# Crops that are resized or blurred


RESIZED = {
    "smaller": ({"size": (12, 18), "area": (0.1, 1)}, (40, 28), torch.uint8),
    "larger": ({"size": (20, 34), "area": (0.1, 1), "padding_mode": "edge"}, (10, 13), torch.uint8),
    "of its image's size": ({"area": (0.3, 0.9), "padding_mode": "zeros"}, (17, 9), torch.uint8),
    "many times smaller": ({"size": 9, "area": (0.01, 1)}, (66, 88), torch.uint8),
    "blurred": ({"size": 12, "area": (0.1, 1), "blur_sigma": (0, 1)}, (28, 20), torch.uint8),
    "not resized but blurred": ({"size": (8, 9), "blur_sigma": (0, 1)}, (12, 16), torch.uint8),
    "of floats": ({"size": 8, "area": (0.2, 1)}, (14, 15), torch.float32),
    "of halves": ({"size": 8, "area": (0.2, 1), "dtype": torch.float16}, (9, 14), torch.float16),
    "channels last": ({"size": 9, "area": (0.2, 1), "channels_last": True}, (9, 16), torch.uint8),
}


@pytest.mark.parametrize("case", RESIZED)
def test_resized_and_blurred_crops_equal_eager_s(launched, case):
    policy, size, dtype = RESIZED[case]
    engine = WeakAugment(padding=2, **policy)
    layout = "NHWC" if case == "channels last" else "NCHW"
    views, expected = results(engine, [images_of(2, *size, dtype=dtype)], 2, layout=layout)
    assert launched == ["weights_kernel", "resample_kernel"]
    tolerance = KERNEL_TOLERANCES[engine.dtype]
    torch.testing.assert_close(views, expected, rtol=tolerance, atol=tolerance)


def test_the_batches_of_crops_equal_eager_s(launched):
    x, u = images_of(2, 20, 24), images_of(3, 20, 24)
    batches = []
    for impl, device in (("triton", DEVICE), ("eager", CPU)):
        engine = WeakAugment(padding=0, size=16, area=(0.08, 1), impl=impl)
        mixmatch = MixMatch(engine, 3, seed=2, impl=impl).to(device)
        y = torch.arange(2, device=device)
        batches.append(mixmatch(x.to(device), y, u.to(device), lambda images: images[:, :, 0, 0]))
    kernels = ["draw", "weights", "resample", "guess_labels", "mixup"]
    assert launched == [f"{name}_kernel" for name in kernels]
    tolerance = KERNEL_TOLERANCES[torch.float32]
    torch.testing.assert_close(
        *(batch.inputs.cpu() for batch in batches), rtol=tolerance, atol=tolerance
    )
