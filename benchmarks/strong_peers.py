"""Strong views, colour jitter and resized crops as others make them.

A peer builds the views of a batch, normalised float32 ``[B + K·M, C, H, W]`` on the device, as in
`benchmarks.peers`. Pillow follows our own draws, made beforehand, and must equal our views; the
others draw for themselves.
"""

import importlib
import warnings
from collections.abc import Callable
from itertools import count, cycle
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Skipped, need
from benchmarks.peers import MEAN, NUM_VIEWS, STD, BuildViews, Images
from gpu_mixmatch._chain import columns, entries
from gpu_mixmatch.augment.keyed import KeyedAugment
from gpu_mixmatch.impl.eager.cut import regions_of
from gpu_mixmatch.types import Draws

RAND_AUGMENT, JITTER, CROP = "RandAugment", "colour jitter", "resized crop, flip"
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
SHIFTS = 8  # the size over this is the padding
STRENGTHS = (0.4, 0.4, 0.4, 0.1)  # of brightness, contrast, saturation and hue
_STEPS = 8  # whose draws are made beforehand
_THROUGH_IMAGE_OPS = ("autocontrast", "equalize", "invert", "posterize", "solarize")

Effects = Literal["RandAugment", "colour jitter", "resized crop, flip"]


class StrongPeer(NamedTuple):
    """Someone else's way to build such views.

    Attributes:
        name: As tables show it.
        make: ``(images, effects, engine, size, threads)`` to a callable that builds views of a
            size; raises `Skipped`. ``engine`` is ours for these effects.
        effects: Which it has.
        note: What it does not do equally.
        exact: Whether its views are ours.
    """

    name: str
    make: Callable[[Images, Effects, KeyedAugment, int, int], BuildViews]
    effects: tuple[Effects, ...]
    note: str
    exact: bool = False


def draws_of(engine: KeyedAugment, images: Images, step: int) -> Draws:
    """A batch's augmentations, x as view 0 and u as the next."""
    return engine.draw_batch(0, step, len(images.x), len(images.u), NUM_VIEWS)


# Pillow


def pillow_operation(picture: Any, name: str, magnitude: float) -> Any:
    """One operation on an RGB image, as FixMatch's code calls Pillow."""
    from PIL import Image, ImageEnhance, ImageOps

    if name == "identity":
        return picture
    if name in _THROUGH_IMAGE_OPS:
        level = {"posterize": [int(magnitude)], "solarize": [magnitude]}.get(name, [])
        return getattr(ImageOps, name)(picture, *level)
    if name in ("brightness", "color", "contrast", "sharpness"):
        return getattr(ImageEnhance, name.capitalize())(picture).enhance(magnitude)
    if name == "hue":
        hue, saturation, value = picture.convert("HSV").split()
        turned = np.asarray(hue) + np.uint8(int(magnitude * 255) % 256)
        return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")
    if name == "rotate":
        return picture.rotate(magnitude)
    matrix = {
        "shear_x": (1, magnitude, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, magnitude, 1, 0),
        "translate_x": (1, 0, magnitude, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, magnitude),
    }[name]
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix)


class _Program(NamedTuple):
    """What is done for a row."""

    top: int
    left: int
    flip: int
    operations: list[tuple[str, float]]
    cutout: list[int]  # first and last line and column; empty for none


def _programs(engine: KeyedAugment, images: Images, step: int, size: int) -> list[_Program]:
    draws: Any = draws_of(engine, images, step)
    chain = engine.geometry.chain
    assert chain is not None
    listed, of_columns = entries(chain), columns(None, chain)
    found = []
    for row in range(images.num_rows):
        drawn = draws.chain[row].tolist()
        cutout = []
        for place in drawn[of_columns.cutout][:2]:
            first = (place * size >> 24) - drawn[-1] // 2
            cutout += [max(first, 0), first + drawn[-1]]
        found.append(
            _Program(
                *(int(draw[row]) for draw in draws[:3]),
                [listed[entry] for entry in drawn[of_columns.slots] if entry],
                cutout,
            )
        )
    return found


def pillow(
    images: Images, effects: Effects, engine: KeyedAugment, size: int, threads: int
) -> BuildViews:
    """Crop and flip by numpy's indices, operations by Pillow, the rest by numpy, row by row."""
    need("PIL", "pip install pillow")
    from PIL import Image

    arrays = [np.ascontiguousarray(row.permute(1, 2, 0).numpy()) for row in images.sources()]
    steps = cycle([_programs(engine, images, step, size) for step in range(_STEPS)])
    padding = engine.geometry.padding
    padded = np.pad(np.arange(size), padding, mode="reflect")
    scale, bias = (np.float32(factor) for factor in (1 / (255 * STD), -MEAN / STD))
    device = images.x.device

    def build() -> Tensor:
        views = np.empty((len(arrays), 3, size, size), np.float32)
        for view, array, program in zip(views, arrays, next(steps), strict=True):
            top, left, flip, operations, cutout = program
            lines, places = padded[top : top + size], padded[left : left + size]
            places = places[::-1] if flip else places
            shifted = array if padding == 0 and not flip else array[lines[:, None], places]
            picture = Image.fromarray(shifted)
            for operation in operations:
                picture = pillow_operation(picture, *operation)
            np.multiply(np.asarray(picture).transpose(2, 0, 1), scale, out=view)
            view += bias
            if cutout:
                view[:, cutout[0] : cutout[1], cutout[2] : cutout[3]] = 0
        return torch.from_numpy(views).to(device)

    return build


def pillow_alone(
    images: Images, effects: Effects, engine: KeyedAugment, size: int, threads: int
) -> BuildViews:
    """The same operations on images that Pillow has already; they stay Pillow's."""
    need("PIL", "pip install pillow")
    from PIL import Image

    pictures = [Image.fromarray(row.permute(1, 2, 0).numpy()) for row in images.sources()]
    steps = cycle([_programs(engine, images, step, size) for step in range(_STEPS)])

    def build() -> Any:
        made = []
        for picture, program in zip(pictures, next(steps), strict=True):
            changed = picture
            for operation in program.operations:
                changed = pillow_operation(changed, *operation)
            made.append(changed)
        return made

    return build


def interpolated(
    images: Images, effects: Effects, engine: KeyedAugment, size: int, threads: int
) -> BuildViews:
    """``F.interpolate`` of each cut, by our draws."""
    images_of = torch.stack(images.sources()).to(images.x.device)
    whole = images.x.shape[-2:]
    steps = []
    for step in range(_STEPS):
        draws = draws_of(engine, images, step)
        still = draws._replace(flip=torch.zeros_like(draws.flip))
        regions = regions_of(still, engine.geometry, (whole[0], whole[1]), (size, size))
        assert regions is not None
        steps.append((torch.stack(regions, 1).tolist(), draws.flip.tolist()))
    turn = cycle(steps)

    def build() -> Tensor:
        regions, flips = next(turn)
        views = torch.empty(images.num_rows, 3, size, size, device=images.x.device)
        for row, ((top, left, tall, wide), flip) in enumerate(zip(regions, flips, strict=True)):
            cut = images_of[row : row + 1, :, top : top + tall, left : left + wide]
            view = F.interpolate(cut.float(), (size, size), mode="bilinear")[0]
            views[row] = view.flip(2) if flip else view
        return views.mul_(1 / (255 * STD)).sub_(MEAN / STD)

    return build


# Kornia


def _kornia_module(effects: Effects, engine: KeyedAugment, size: int) -> Any:
    need("kornia", 'pip install "kornia>=0.9,<1"')
    import kornia.augmentation as K
    from kornia.augmentation.auto import RandAugment

    flip, normalize = K.RandomHorizontalFlip(p=0.5), K.Normalize((MEAN,) * 3, (STD,) * 3)
    if effects == JITTER:
        return torch.nn.Sequential(K.ColorJitter(*STRENGTHS, p=1.0), normalize)
    if effects == CROP:
        crop = K.RandomResizedCrop((size, size), AREA, ASPECT, align_corners=False)
        return torch.nn.Sequential(crop, flip, normalize)
    padding = engine.geometry.padding
    share = (16 / size) ** 2
    return torch.nn.Sequential(
        K.RandomCrop((size, size), padding=padding, padding_mode="reflect"),
        flip,
        RandAugment(n=2, m=9),
        K.RandomErasing((share, share), (1.0, 1.0), value=MEAN, p=1.0),
        normalize,
    )


def kornia(
    images: Images, effects: Effects, engine: KeyedAugment, size: int, threads: int
) -> BuildViews:
    """All views in one call."""
    module = _kornia_module(effects, engine, size)
    x, u = images
    return lambda: module(torch.cat([x, *[u] * NUM_VIEWS]).float() / 255)


def kornia_per_image(
    images: Images, effects: Effects, engine: KeyedAugment, size: int, threads: int
) -> BuildViews:
    """One call per view, so that each has operations of its own."""
    module = _kornia_module(effects, engine, size)
    device = images.x.device
    rows = [row.to(device)[None] for row in images.sources()]
    return lambda: torch.cat([module(row.float() / 255) for row in rows])


# DALI


def dali(
    images: Images, effects: Effects, engine: KeyedAugment, size: int, threads: int
) -> BuildViews:
    """A pipeline with DALI's own generator, fed from memory."""
    need("nvidia.dali", 'pip install "gpu-mixmatch[dali]"')
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.auto_aug import rand_augment

    device, padding = images.x.device, engine.geometry.padding
    on_gpu = device.type == "cuda"

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=images.num_rows,
        num_threads=threads,
        device_id=(device.index or 0) if on_gpu else None,
        seed=1,
        prefetch_queue_depth=1,
        enable_conditionals=True,
    )
    def pipeline() -> Any:
        views = fn.external_source(
            name="images",
            layout="HWC",
            dtype=types.UINT8,
            ndim=3,
            device="gpu" if on_gpu else "cpu",
        )
        if effects == JITTER:
            low, high = 1 - STRENGTHS[0], 1 + STRENGTHS[0]
            views = fn.color_twist(
                views,
                brightness=fn.random.uniform(range=[low, high]),
                contrast=fn.random.uniform(range=[low, high]),
                saturation=fn.random.uniform(range=[low, high]),
                hue=fn.random.uniform(range=[-360 * STRENGTHS[3], 360 * STRENGTHS[3]]),
            )
        elif effects == CROP:
            views = fn.random_resized_crop(
                views,
                size=[size, size],
                random_area=AREA,
                random_aspect_ratio=ASPECT,
                antialias=False,
            )
        else:
            offsets = [float(offset) for offset in range(-padding, padding + 1)]
            start = fn.cast(fn.random.uniform(values=offsets, shape=[2]), dtype=types.INT32)
            views = fn.slice(
                views,
                start=start,
                shape=np.array([size, size], dtype=np.int32),
                axes=(0, 1),
                out_of_bounds_policy="reflect_101",
            )
            views = rand_augment.rand_augment(views, n=2, m=9, shape=(size, size))
        mirror = 0 if effects == JITTER else fn.random.coin_flip(probability=0.5)
        return fn.crop_mirror_normalize(
            views,
            mirror=mirror,
            mean=[255 * MEAN] * 3,
            std=[255 * STD] * 3,
            dtype=types.FLOAT,
            output_layout="CHW",
        )

    with warnings.catch_warnings(record=True):  # its own RandAugment has old names of operators
        made = pipeline()
        made.build()
    x, u = (part.permute(0, 2, 3, 1).contiguous() for part in images)

    def build() -> Tensor:
        rows = torch.cat([x, *[u] * NUM_VIEWS])
        made.feed_input("images", rows if on_gpu else rows.numpy(), layout="HWC")
        (views,) = made.run()
        return torch.from_dlpack(views.as_tensor())

    return build


# torchvision and albumentations


def _torchvision_transform(effects: Effects, engine: KeyedAugment, size: int) -> Any:
    need("torchvision")
    try:
        v2 = importlib.import_module("torchvision.transforms.v2")
    except (ImportError, RuntimeError) as error:  # a build for another torch
        raise Skipped(f"torchvision does not import: {error}") from error
    flip = v2.RandomHorizontalFlip(0.5)
    steps = {
        JITTER: [v2.ColorJitter(*STRENGTHS)],
        CROP: [v2.RandomResizedCrop(size, AREA, ASPECT, antialias=False), flip],
        RAND_AUGMENT: [
            v2.RandomCrop(size, padding=engine.geometry.padding, padding_mode="reflect"),
            flip,
            v2.RandAugment(num_ops=2, magnitude=9),
        ],
    }[effects]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize([MEAN] * 3, [STD] * 3)]
    return v2.Compose(steps)


def torchvision_per_batch(
    images: Images, effects: Effects, engine: KeyedAugment, size: int, threads: int
) -> BuildViews:
    """One call for x and one for each view of u: one draw for all images of a call."""
    transform = _torchvision_transform(effects, engine, size)
    parts = [images.x, *[images.u] * NUM_VIEWS]
    return lambda: torch.cat([transform(part) for part in parts])


def torchvision_per_image(
    images: Images, effects: Effects, engine: KeyedAugment, size: int, threads: int
) -> BuildViews:
    """One call per view, as a data set makes it."""
    transform = _torchvision_transform(effects, engine, size)
    rows, device = images.sources(), images.x.device
    return lambda: torch.stack([transform(row) for row in rows]).to(device)


def albumentations(
    images: Images, effects: Effects, engine: KeyedAugment, size: int, threads: int
) -> BuildViews:
    """A Compose on HWC arrays, image by image."""
    need("albumentations")
    try:
        import albumentations as A
        from albumentations.pytorch import ToTensorV2
    except ImportError as error:
        raise Skipped(f"albumentations does not import: {error}") from error
    steps = [A.ColorJitter(*((1 - s, 1 + s) for s in STRENGTHS[:3]), hue=(-0.1, 0.1), p=1.0)]
    if effects == CROP:
        steps = [
            A.RandomResizedCrop(size=(size, size), scale=AREA, ratio=ASPECT),
            A.HorizontalFlip(p=0.5),
        ]
    transform = A.Compose([*steps, A.Normalize([MEAN] * 3, [STD] * 3), ToTensorV2()])
    arrays = [np.ascontiguousarray(row.permute(1, 2, 0).numpy()) for row in images.sources()]
    device = images.x.device
    return lambda: torch.stack([transform(image=array)["image"] for array in arrays]).to(device)


ALL: tuple[Effects, ...] = ("RandAugment", "colour jitter", "resized crop, flip")
ON_BYTES: tuple[Effects, ...] = ("RandAugment", "colour jitter")
STRONG_PEERS = (
    StrongPeer(
        "Pillow, image by image",
        pillow,
        ON_BYTES,
        "follows our draws, made beforehand; crop, cutout and floats by numpy",
        exact=True,
    ),
    StrongPeer(
        "Pillow's operations alone",
        pillow_alone,
        ON_BYTES,
        "no shift, flip, cutout and floats; draws made beforehand",
    ),
    StrongPeer(
        "F.interpolate, image by image", interpolated, (CROP,), "draws made beforehand", exact=True
    ),
    StrongPeer(
        "Kornia, one call",
        kornia,
        ALL,
        "in floats; RandAugment draws two operations for the whole batch, always applied",
    ),
    StrongPeer(
        "Kornia, image by image",
        kornia_per_image,
        ALL,
        "in floats; RandAugment's operations are always applied",
    ),
    StrongPeer(
        "DALI, pipeline",
        dali,
        ALL,
        "fed from memory; RandAugment's operations are always applied, no cutout; jitter in one "
        "order",
    ),
    StrongPeer(
        "torchvision v2, per batch",
        torchvision_per_batch,
        ALL,
        "one draw for all images of a call; no cutout",
    ),
    StrongPeer(
        "torchvision v2, image by image",
        torchvision_per_image,
        ALL,
        "RandAugment's operations are always applied, no cutout",
    ),
    StrongPeer("albumentations", albumentations, (JITTER, CROP), ""),
)


def counted(make: Callable[[int], Any]) -> Callable[[], Any]:
    """Return what calls ``make`` with the next step."""
    steps = count()
    return lambda: make(next(steps))
