"""The work of the package as others do it: wrapped where it is a library, else re-expressed here.

A peer builds the views of a batch, one of each labelled and K of each unlabelled image, normalised
float32 ``[B + K·M, C, H, W]`` on the device. Images lie ready as the peer likes them: what it does
once per data set is not timed. The loops build a MixMatch batch from views.
"""

import importlib
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

from benchmarks.common import Skipped, need
from gpu_mixmatch.types import AugmentPolicy

MEAN = STD = 0.5
NUM_VIEWS = 2

BuildViews = Callable[[], Tensor]


class Images(NamedTuple):
    """A batch before augmentation: x ``[B, C, H, W]`` and u ``[M, C, H, W]`` uint8, on a device."""

    x: Tensor
    u: Tensor

    @property
    def size(self) -> int:
        """Height and width."""
        return self.x.shape[-1]

    @property
    def num_rows(self) -> int:
        """N = B + K·M."""
        return len(self.x) + NUM_VIEWS * len(self.u)

    def sources(self) -> list[Tensor]:
        """The source of every view, on the CPU, view-major."""
        x, u = self.x.cpu(), self.u.cpu()
        return [*x, *list(u) * NUM_VIEWS]


class Peer(NamedTuple):
    """Someone else's way to build views.

    Attributes:
        name: As tables show it.
        make: ``(images, policy, threads)`` to a callable that builds views; raises `Skipped`.
        note: What it does not do equally.
        draws: Once per "sample" or per "batch".
        last_offset: Whether crops reach the last offset.
        blurs: Whether it has a blur.
        tolerance: Of a blurred view, in normalised units; above 0.01 where it rounds to bytes.
    """

    name: str
    make: Callable[[Images, AugmentPolicy, int], BuildViews]
    note: str
    draws: Literal["sample", "batch"] = "sample"
    last_offset: bool = True
    blurs: bool = True
    tolerance: float = 1e-3


def blur_radius(policy: AugmentPolicy) -> int:
    """Reach of a blur in pixels, as `WeakAugment` has it; 0 where there is none."""
    return math.ceil(3 * policy.blur_sigma[1]) if policy.blur_sigma else 0


# Kornia


def kornia_module(size: int, policy: AugmentPolicy) -> Any:
    """Return the policy as an AugmentationSequential."""
    need("kornia", 'pip install "kornia>=0.9,<1"')
    import kornia.augmentation as K

    steps = [
        K.RandomCrop((size, size), padding=policy.padding, padding_mode="reflect"),
        K.RandomHorizontalFlip(p=policy.flip),
    ]
    if policy.blur_sigma:
        width = 2 * blur_radius(policy) + 1
        steps.append(K.RandomGaussianBlur((width, width), policy.blur_sigma, p=1.0))
    return K.AugmentationSequential(*steps, K.Normalize((MEAN,) * 3, (STD,) * 3))


def kornia_one_call(images: Images, policy: AugmentPolicy, threads: int) -> BuildViews:
    """All views in one call of an AugmentationSequential."""
    module = kornia_module(images.size, policy)
    x, u = images
    return lambda: module(torch.cat([x, *[u] * NUM_VIEWS]).float() / 255)


def kornia_k_calls(images: Images, policy: AugmentPolicy, threads: int) -> BuildViews:
    """One call for x and one for each view of u."""
    module = kornia_module(images.size, policy)
    parts = [images.x, *[images.u] * NUM_VIEWS]
    return lambda: torch.cat([module(part.float() / 255) for part in parts])


# DALI


def dali_pipeline(images: Images, policy: AugmentPolicy, threads: int) -> BuildViews:
    """A pipeline with DALI's own generator, fed from memory."""
    need("nvidia.dali", 'pip install "gpu-mixmatch[dali]"')
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    device, size, padding = images.x.device, images.size, policy.padding
    on_gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=images.num_rows,
        num_threads=threads,
        device_id=(device.index or 0) if on_gpu else None,
        seed=1,
        prefetch_queue_depth=1,
    )
    with pipeline:
        views = fn.external_source(
            name="images",
            layout="HWC",
            dtype=types.UINT8,
            ndim=3,
            device="gpu" if on_gpu else "cpu",
        )
        offsets = [float(offset) for offset in range(-padding, padding + 1)]
        start = fn.cast(fn.random.uniform(values=offsets, shape=[2]), dtype=types.INT32)
        views = fn.slice(
            views,
            start=start,
            shape=np.array([size, size], dtype=np.int32),
            axes=(0, 1),
            out_of_bounds_policy="reflect_101",
        )
        if policy.blur_sigma:
            views = fn.gaussian_blur(
                views,
                sigma=fn.random.uniform(range=_range(policy.blur_sigma)),
                window_size=2 * blur_radius(policy) + 1,
                dtype=types.FLOAT,
            )
        views = fn.crop_mirror_normalize(
            views,
            mirror=fn.random.coin_flip(probability=policy.flip),
            mean=[255 * MEAN] * 3,
            std=[255 * STD] * 3,
            dtype=types.FLOAT,
            output_layout="CHW",
        )
        pipeline.set_outputs(views)
    pipeline.build()
    x, u = (part.permute(0, 2, 3, 1).contiguous() for part in images)

    def build() -> Tensor:
        rows = torch.cat([x, *[u] * NUM_VIEWS])
        pipeline.feed_input("images", rows if on_gpu else rows.numpy(), layout="HWC")
        (views,) = pipeline.run()
        return torch.from_dlpack(views.as_tensor())

    return build


def _range(limits: tuple[float, float]) -> list[float]:
    """What DALI draws from; it refuses an empty range."""
    low, high = limits
    return [low, high if high > low else low + 1e-6]


# torchvision


def _torchvision_transform(size: int, policy: AugmentPolicy) -> Any:
    need("torchvision")
    v2 = importlib.import_module("torchvision.transforms.v2")
    steps = [
        v2.RandomCrop(size, padding=policy.padding, padding_mode="reflect"),
        v2.RandomHorizontalFlip(policy.flip),
    ]
    if policy.blur_sigma:
        steps.append(v2.GaussianBlur(2 * blur_radius(policy) + 1, policy.blur_sigma))
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize([MEAN] * 3, [STD] * 3)]
    return v2.Compose(steps)


def torchvision_per_batch(images: Images, policy: AugmentPolicy, threads: int) -> BuildViews:
    """One call per batch: all its images get the same crop and flip."""
    transform = _torchvision_transform(images.size, policy)
    parts = [images.x, *[images.u] * NUM_VIEWS]
    return lambda: torch.cat([transform(part) for part in parts])


def torchvision_per_sample(images: Images, policy: AugmentPolicy, threads: int) -> BuildViews:
    """One call per image, as a data set makes it."""
    transform = _torchvision_transform(images.size, policy)
    return partial(_per_sample, transform, images.sources(), images.x.device)


# Image by image


def _per_sample(transform: Callable[[Any], Tensor], rows: list[Any], device: Any) -> Tensor:
    return torch.stack([transform(row) for row in rows]).to(device)


def albumentations(images: Images, policy: AugmentPolicy, threads: int) -> BuildViews:
    """A Compose on HWC arrays, image by image."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask for its newest version
    need("albumentations")
    try:
        import albumentations as A
        import cv2
        from albumentations.pytorch import ToTensorV2
    except ImportError as error:
        raise Skipped(f"albumentations does not import: {error}") from error
    cv2.setNumThreads(threads)
    size, padded = images.size, images.size + 2 * policy.padding
    border = cv2.BORDER_REFLECT_101
    steps = [
        A.PadIfNeeded(padded, padded, border_mode=border),
        A.RandomCrop(size, size),
        A.HorizontalFlip(p=policy.flip),
    ]
    if policy.blur_sigma:
        width = 2 * blur_radius(policy) + 1
        steps.append(
            A.GaussianBlur(blur_limit=(width, width), sigma_limit=policy.blur_sigma, p=1.0)
        )
    transform = A.Compose([*steps, A.Normalize([MEAN] * 3, [STD] * 3), ToTensorV2()])
    arrays = [np.ascontiguousarray(row.permute(1, 2, 0).numpy()) for row in images.sources()]
    return partial(
        _per_sample, lambda array: transform(image=array)["image"], arrays, images.x.device
    )


def yu1ut_numpy(images: Images, policy: AugmentPolicy, threads: int) -> BuildViews:
    """The transforms of YU1ut/MixMatch-pytorch, re-expressed, collated as its DataLoader does.

    The data set is normalised to float32 once, and padding, crop, flip and copy are numpy's.
    """
    generator = np.random.default_rng(0)
    rows = [(row.numpy().astype(np.float32) / 255 - MEAN) / STD for row in images.sources()]
    transform = partial(yu1ut_view, generator=generator, padding=policy.padding)
    device = images.x.device
    return lambda: default_collate([transform(row) for row in rows]).to(device)


def yu1ut_view(image: Any, *, generator: np.random.Generator, padding: int) -> Tensor:
    """Pad, crop and flip a normalised CHW array; the last offset is never drawn, as there."""
    size = image.shape[-1]
    margin = [(padding, padding)] * 2
    padded = np.pad(image, [(0, 0), *margin], mode="reflect")
    top, left = generator.integers(0, 2 * padding, 2)
    view = padded[:, top : top + size, left : left + size]
    if generator.random() < 0.5:
        view = view[:, :, ::-1]
    return torch.from_numpy(view.copy())


def usb_pil(images: Images, policy: AugmentPolicy, threads: int) -> BuildViews:
    """The weak augmentation of microsoft/Semi-supervised-learning, re-expressed in PIL."""
    need("PIL", "pip install pillow")
    from PIL import Image

    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(row.permute(1, 2, 0).numpy()) for row in images.sources()]
    transform = partial(usb_view, generator=generator, padding=policy.padding)
    device = images.x.device
    return lambda: default_collate([transform(picture) for picture in pictures]).to(device)


def usb_view(picture: Any, *, generator: np.random.Generator, padding: int) -> Tensor:
    """Pad, crop and flip a PIL image, then ToTensor and Normalize, as torchvision does them."""
    from PIL import Image

    size = picture.width
    margin = [(padding, padding)] * 2
    padded = Image.fromarray(np.pad(np.asarray(picture), [*margin, (0, 0)], mode="reflect"))
    top, left = (int(offset) for offset in generator.integers(0, 2 * padding + 1, 2))
    view = padded.crop((left, top, left + size, top + size))
    if generator.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    tensor = torch.from_numpy(np.array(view)).permute(2, 0, 1).contiguous().float().div(255)
    return tensor.sub_(MEAN).div_(STD)


# The sketch that this project grew from: zoom, flip, blur


def numpy_sketch(images: Images, policy: AugmentPolicy, threads: int) -> BuildViews:
    """The operations of the sketch's imgaug sequence in numpy and SciPy, image by image."""
    need("scipy", "pip install scipy")
    generator = np.random.default_rng(0)
    arrays = [np.ascontiguousarray(row.permute(1, 2, 0).numpy()) for row in images.sources()]
    least, most = policy.zoom_px
    low, high = policy.blur_sigma or (0.0, 0.0)

    def transform(array: Any) -> Tensor:
        crop = generator.integers(least, most + 1, 4)
        flip, sigma = generator.random() < policy.flip, generator.uniform(low, high)
        return sketch_view(array, crop, flip, sigma)

    return partial(_per_sample, transform, arrays, images.x.device)


def sketch_view(array: Any, crop: Sequence[int], flip: bool, sigma: float) -> Tensor:
    """Cut an HWC uint8 array, resize back, mirror and blur, rounding to bytes as imgaug does."""
    from scipy.ndimage import gaussian_filter1d

    top, bottom, left, right = (int(pixels) for pixels in crop)
    values = _resized(_resized(array.astype(np.float32), 0, top, bottom), 1, left, right)
    values = values[:, ::-1] if flip else values
    if sigma > 0.01:
        for axis in (0, 1):
            values = gaussian_filter1d(values, sigma, axis, mode="mirror", truncate=3.0)
    pixels = np.rint(values).clip(0, 255).astype(np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div(255).sub(MEAN).div(STD)


def _resized(values: Any, axis: int, before: int, after: int) -> Any:
    """Cut an axis and bring it back to its length: bilinear, half-pixel centres."""
    size = values.shape[axis]
    before = min(before, size - 1)
    kept = max(1, size - before - after)
    read = np.clip((np.arange(size, dtype=np.float32) + 0.5) * kept / size - 0.5, 0, kept - 1)
    first = read.astype(np.int64)
    second = np.minimum(first + 1, kept - 1)
    weight = (read - first).reshape([-1 if dim == axis else 1 for dim in range(values.ndim)])
    low, high = values.take(before + first, axis), values.take(before + second, axis)
    return low + (high - low) * weight.astype(np.float32)


def imgaug(images: Images, policy: AugmentPolicy, threads: int) -> BuildViews:
    """The sketch's own imgaug sequence."""
    need("imgaug")
    try:
        iaa = importlib.import_module("imgaug.augmenters")
    except Exception as error:  # on numpy 2 it fails with an AttributeError
        raise Skipped(f"imgaug does not import: {type(error).__name__}: {error}") from error
    sequence = iaa.Sequential(
        [
            iaa.Crop(px=policy.zoom_px),
            iaa.Fliplr(policy.flip),
            iaa.GaussianBlur(sigma=policy.blur_sigma),
        ]
    )
    arrays = np.stack([row.permute(1, 2, 0).numpy() for row in images.sources()])
    device = images.x.device

    def build() -> Tensor:
        views = torch.from_numpy(np.ascontiguousarray(sequence(images=arrays)))
        return views.permute(0, 3, 1, 2).float().div(255).sub(MEAN).div(STD).to(device)

    return build


PEERS = (
    Peer(
        "Kornia, one call",
        kornia_one_call,
        "float input; draws by position from torch's global generator",
    ),
    Peer(
        "Kornia, K + 1 calls",
        kornia_k_calls,
        "float input; draws by position from torch's global generator",
    ),
    Peer(
        "DALI, pipeline",
        dali_pipeline,
        "fed from memory; draws by position in the batch",
        tolerance=0.02,
    ),
    Peer(
        "torchvision v2, per batch",
        torchvision_per_batch,
        "one crop, flip and sigma for all images of a call",
        draws="batch",
        tolerance=0.02,
    ),
    Peer("torchvision v2, per sample", torchvision_per_sample, "", tolerance=0.02),
    Peer("albumentations", albumentations, "blur in fixed point, rounded to bytes", tolerance=0.03),
    Peer(
        "YU1ut's transforms (numpy)",
        yu1ut_numpy,
        "re-expressed; data set normalised beforehand, last offset never drawn, no blur",
        last_offset=False,
        blurs=False,
    ),
    Peer(
        "USB's transforms (PIL)",
        usb_pil,
        "re-expressed without torchvision; no blur",
        blurs=False,
    ),
)
SKETCH_PEERS = (
    Peer("imgaug", imgaug, "rounded to bytes", tolerance=0.03),
    Peer(
        "numpy sketch (imgaug's operations)",
        numpy_sketch,
        "re-expressed in numpy and SciPy, which are slower than imgaug's OpenCV; rounded to bytes",
        tolerance=0.03,
    ),
)


# Loops: from views to the batch


class Mixed(NamedTuple):
    """A peer's batch, and what it drew.

    Attributes:
        inputs: Mixed images, ``[N, C, H, W]`` in the order of W, or groups of them.
        targets: Mixed targets, ``[N, L]``.
        lam: λ' of the batch.
        index: The partners, ``[N]`` int64.
    """

    inputs: Tensor | list[Tensor]
    targets: Tensor
    lam: float
    index: Tensor


def yu1ut_step(
    x: Tensor,
    y: Tensor,
    views: Sequence[Tensor],
    model: Callable[[Tensor], Tensor],
    generator: np.random.Generator,
    *,
    num_classes: int = 10,
    temperature: float = 0.5,
    alpha: float = 0.75,
) -> Mixed:
    """Guess and mix as ``train.py`` of YU1ut/MixMatch-pytorch does, interleaving included.

    Takes two views, has one λ per batch, and interleaves by moving slices between the groups.
    """
    batch_size = len(x)
    targets_x = torch.zeros(batch_size, num_classes, device=x.device)
    targets_x = targets_x.scatter_(1, y.view(-1, 1), 1)
    with torch.no_grad():
        first, second = (torch.softmax(model(view), dim=1) for view in views)
        mean = (first + second) / 2
        powered = mean ** (1 / temperature)
        targets_u = (powered / powered.sum(dim=1, keepdim=True)).detach()
    inputs = torch.cat([x, *views], dim=0)
    targets = torch.cat([targets_x, targets_u, targets_u], dim=0)
    drawn = generator.beta(alpha, alpha)
    lam = max(drawn, 1 - drawn)
    index = torch.randperm(inputs.size(0))
    mixed = lam * inputs + (1 - lam) * inputs[index]
    mixed_targets = lam * targets + (1 - lam) * targets[index]
    groups = yu1ut_interleave(list(torch.split(mixed, batch_size)), batch_size)
    return Mixed(groups, mixed_targets, lam, index)


def yu1ut_interleave(groups: list[Tensor], batch_size: int) -> list[Tensor]:
    """Swap slices between group 0 and each other group."""
    others = len(groups) - 1
    size = batch_size // (others + 1)
    sizes = [size] * (others + 1)
    for number in range(batch_size - sum(sizes)):
        sizes[-number - 1] += 1
    slices = [list(torch.split(group, sizes)) for group in groups]
    for number in range(1, others + 1):
        slices[0][number], slices[number][number] = slices[number][number], slices[0][number]
    return [torch.cat(parts, dim=0) for parts in slices]


def usb_step(
    x: Tensor,
    y: Tensor,
    views: Sequence[Tensor],
    model: Callable[[Tensor], Tensor],
    generator: np.random.Generator,
    *,
    num_classes: int = 10,
    temperature: float = 0.5,
    alpha: float = 0.75,
) -> Mixed:
    """Guess and mix as ``mixmatch.py`` of microsoft/Semi-supervised-learning does.

    One λ per batch, groups in order, not interleaved.
    """
    with torch.no_grad():
        first, second = (F.softmax(model(view), dim=-1) for view in views)
        mean = (first + second) / 2
        sharpened = mean ** (1 / temperature)
        sharpened = (sharpened / sharpened.sum(dim=-1, keepdim=True)).detach()
    targets = torch.cat([F.one_hot(y, num_classes), sharpened, sharpened], dim=0)
    inputs = torch.cat([x, *views])
    drawn = generator.beta(alpha, alpha)
    lam = max(drawn, 1 - drawn)
    index = torch.randperm(len(inputs)).to(inputs.device)
    mixed = lam * inputs + (1 - lam) * inputs[index]
    mixed_targets = lam * targets + (1 - lam) * targets[index]
    return Mixed(list(torch.split(mixed, len(x))), mixed_targets, lam, index)
