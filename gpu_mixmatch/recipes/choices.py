"""What the names on the command line mean: presets, networks, engines and loaders."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from gpu_mixmatch import presets
from gpu_mixmatch.augment import DaliAugment, KorniaAugment, RandAugment, WeakAugment
from gpu_mixmatch.augment.base import Augment
from gpu_mixmatch.data import DaliLoader, KeyedLoader, ResidentLoader, SemiSupervisedLoader
from gpu_mixmatch.data.datasets import ImageFiles

PRESETS = {"paper": presets.paper, "yu1ut": presets.yu1ut, "usb": presets.usb}
PRESET_NAMES = ("fast", *PRESETS)
AUGMENTS = ("weak", "strong", "kornia", "dali")
_FIXMATCH_SIDE = 32  # pixels of the images that FixMatch's cutout and translations are for
FULL_WEIGHT_STEPS = 32_768  # twice the paper's ramp of λ_U
LOADERS = ("resident", "dataloader", "dali")


def choose_preset(name: str, dataset: str) -> presets.Preset:
    """Return a preset by its name; a folder of photographs has CIFAR-10's settings.

    "fast" is the paper's, with one joint guess. A run with it also trains in one forward pass over
    the whole batch, in place of the paper's interleaved ones.
    """
    dataset = "cifar10" if dataset == "folder" else dataset
    if name == "fast":
        preset = presets.paper(dataset)
        return preset._replace(name="fast", builder={**preset.builder, "guess_forward": "joint"})
    return PRESETS[name](dataset)


def choose_filters(model: str, filters: int | None, preset: presets.Preset) -> int | None:
    """Return the channels of a network's first stage: ``filters``, or if None the preset's.

    A preset has them for the paper's network "wrn-28-2": 135 for CIFAR-100, else 32. Another
    network keeps its own, which is None.
    """
    if filters is None and model == "wrn-28-2":
        return preset.filters
    return filters


def choose_weight(preset: presets.Preset, steps: int) -> tuple[float, int]:
    """Return λ_U and the length of its ramp for a run of so many steps.

    In a run of `FULL_WEIGHT_STEPS` or more both are the preset's. A shorter one ramps over its
    first half, and λ_U is the preset's times the cube root of the share of `FULL_WEIGHT_STEPS`
    that it takes: 0.29 of it at 800 steps, a half at 4,096. A short run reaches the end of its
    ramp while many guesses are wrong still, and the full weight would teach them; a weight in
    proportion to the steps would be too weak to teach anything.
    """
    lambda_u = preset.loss["lambda_u"] * min(1.0, steps / FULL_WEIGHT_STEPS) ** (1 / 3)
    return lambda_u, min(preset.loss["rampup_steps"], steps // 2)


def make_weak(dataset: str, preset: presets.Preset, size: int) -> WeakAugment:
    """Return the preset's augmentation; images of a folder shift by an eighth of their size.

    The paper does so at 32 px (CIFAR-10) and at 96 px (STL-10).
    """
    fields = {"padding": size // 8} if dataset == "folder" else {}
    return preset.augment(channels_last=True, **fields)


def make_augment(name: str, weak: WeakAugment, height: int, width: int) -> Augment:
    """Return the engine ``name`` that does what ``weak`` says: shift, flip, normalise.

    - "weak" is ``weak`` itself.
    - "strong" has FixMatch's operations and a cutout between the two; see `make_strong`.
    - "dali" runs it through DALI's operators, with the same draws: the same views.
    - "kornia" has the same policy as Kornia's RandomCrop and RandomHorizontalFlip, which draw for
      themselves: other views of the same distribution.

    Raises:
        ImportError: If the engine is not installed.
    """
    if name == "weak":
        return weak
    if name == "strong":
        return make_strong(weak, height, width)
    if name == "dali":
        return DaliAugment(weak)
    return KorniaAugment.shift_and_flip(weak, height, width)


def make_strong(weak: WeakAugment, height: int, width: int) -> RandAugment:
    """Return FixMatch's RandAugment behind ``weak``, for images of a size.

    FixMatch's cutout of 16 pixels and its translations of up to 9 are for images of 32. Larger
    images get the same pixels. Where a side is smaller they are shares: the cutout has half of the
    smaller side, and translations go up to 9/32 of each, in whole pixels cut towards 0. Digits of
    8 pixels would otherwise be hidden or moved away as a whole.
    """
    least = min(height, width)
    if least >= _FIXMATCH_SIDE:
        return RandAugment.fixmatch(weak)
    ops: dict[str, Sequence[float]] = {}
    for name, magnitudes in RandAugment.fixmatch(weak).chain.ops:
        if name.startswith("translate"):
            ops[f"{name}_rel"] = [pixels / _FIXMATCH_SIDE for pixels in magnitudes]
        else:
            ops[name] = magnitudes
    return RandAugment.fixmatch(weak, ops=ops, cutout=least // 2)


def make_loader(
    name: str,
    labelled: TensorDataset | ImageFiles,
    unlabelled: TensorDataset | ImageFiles,
    batch_size: int,
    *,
    steps_per_epoch: int,
    seed: int,
    device: torch.device,
    num_workers: int,
) -> KeyedLoader:
    """Return the loader ``name``.

    - "resident" keeps all images on the device, those of a folder decoded.
    - "dataloader" fetches them in worker processes; its batches are the same.
    - "dali" decodes the files of a folder; its order is the same, its pixels are DALI's.

    Args:
        name: One of `LOADERS`.
        labelled: Images with labels.
        unlabelled: Images.
        batch_size: Labelled images of a batch, and as many unlabelled ones.
        steps_per_epoch: Batches of an epoch.
        seed: Of the order.
        device: Where batches lie.
        num_workers: Processes of "dataloader", for each of the two data sets.

    Raises:
        ImportError: If "dali" is wanted and not installed.
        ValueError: If "dali" is wanted and the images are in memory.
    """
    order: dict[str, Any] = {"steps_per_epoch": steps_per_epoch, "seed": seed}
    if name == "dataloader":
        return SemiSupervisedLoader(
            labelled, unlabelled, batch_size, device=device, num_workers=num_workers, **order
        )
    if name == "resident":
        x, y = _in_memory(labelled)
        u, *_ = _in_memory(unlabelled)
        return ResidentLoader(x, y, batch_size, unlabelled=u, device=device, **order)
    if not isinstance(labelled, ImageFiles) or not isinstance(unlabelled, ImageFiles):
        raise ValueError(
            "loader must be 'resident' or 'dataloader' for images in memory, since 'dali' decodes "
            "files of --dataset folder, got 'dali'"
        )
    return DaliLoader(
        labelled.index,
        unlabelled.index,
        batch_size,
        labelled.size,
        device_id=device.index if device.type == "cuda" else None,
        **order,
    )


def _in_memory(dataset: TensorDataset | ImageFiles) -> tuple[Tensor, ...]:
    if isinstance(dataset, TensorDataset):
        return dataset.tensors
    images = dataset.load()
    labels = dataset.index.labels
    return (images,) if labels is None else (images, labels)
