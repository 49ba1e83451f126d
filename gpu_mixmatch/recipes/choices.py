"""What the names on the command line mean: presets, networks, engines and loaders."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from gpu_mixmatch import presets
from gpu_mixmatch.augment import DaliAugment, KorniaAugment, RandAugment, WeakAugment
from gpu_mixmatch.augment.base import Augment
from gpu_mixmatch.data import DaliLoader, KeyedLoader, ResidentLoader, SemiSupervisedLoader
from gpu_mixmatch.data.datasets import ImageFiles
from gpu_mixmatch.methods.base import BatchBuilder

PRESETS = {"paper": presets.paper, "yu1ut": presets.yu1ut, "usb": presets.usb}
PRESET_NAMES = ("fast", *PRESETS)
_OF_METHODS = {
    "fixmatch": presets.fixmatch,
    "uda": presets.uda,
    "softmatch": presets.softmatch,
    "freematch": presets.freematch,
    "flexmatch": presets.flexmatch,
    "mean_teacher": presets.mean_teacher,
    "pi_model": presets.pi_model,
    "ict": presets.ict,
    "remixmatch": presets.remixmatch,
}
METHODS = ("mixmatch", *_OF_METHODS)
WITH_TEACHER = ("mean_teacher", "ict")
_GUESS_FIRST = ("mixmatch", "remixmatch", *WITH_TEACHER)
GUESSES = ("first", "loss")
MOST_FAST_VIEWS = 2  # strong views of the unlabelled images of a step, per labelled image
AUGMENTS = ("weak", "strong", "kornia", "dali")
FIXMATCH_SIDE = 32  # pixels of the images that FixMatch's cutout and translations are for
FULL_WEIGHT_STEPS = 32_768  # twice the paper's ramp of λ_U
LOADERS = ("resident", "dataloader", "dali")


def choose_preset(name: str, dataset: str, method: str = "mixmatch") -> presets.Preset:
    """Return a preset by its name; a folder of photographs has CIFAR-10's settings.

    "fast" is the paper's, with one joint guess. A run with it also trains in one forward pass over
    the whole batch, in place of the paper's interleaved ones. Of another method than MixMatch it is
    the method's own, with the optimiser and the averages of MixMatch's paper, so that methods
    differ in nothing else, and with at most two unlabelled images, or two strong views of one, per
    labelled one: about the work of MixMatch. ReMixMatch's rotation is off, in "paper" too, since
    `build_model` makes no network with a second head.

    Raises:
        ValueError: If the method has no preset of that name.
    """
    dataset = "cifar10" if dataset == "folder" else dataset
    if method != "mixmatch":
        if name not in ("fast", "paper"):
            raise ValueError(
                f"preset must be 'fast' or 'paper' for the method {method}, got {name!r}, which "
                "is a port of MixMatch"
            )
        preset = _OF_METHODS[method](dataset)
        builder, loss = dict(preset.builder), dict(preset.loss)
        if method == "remixmatch":
            builder["rotation"], loss["lambda_rot"] = False, 0.0
        preset = preset._replace(builder=builder, loss=loss)
        if name == "paper":
            return preset
        if "num_strong" in builder:
            builder["num_strong"] = min(builder["num_strong"], MOST_FAST_VIEWS)
        shared = presets.paper(dataset)
        return preset._replace(
            name="fast",
            interleaving={},
            optimizer=shared.optimizer,
            ema_decay=shared.ema_decay,
            filters=shared.filters,
            ratio=min(preset.ratio, MOST_FAST_VIEWS),
            strong=preset.strong and "fixmatch",
        )
    if name == "fast":
        preset = presets.paper(dataset)
        builder = {**preset.builder, "guess_forward": "joint"}
        return preset._replace(name="fast", builder=builder, interleaving={})
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
    proportion to the steps would be too weak to teach anything. That is for losses that are squared
    errors. A cross-entropy keeps its λ_U, which is of the size of the labelled one's weight.
    """
    lambda_u, ramp = preset.loss[name_of_weight(preset.method)], preset.loss["rampup_steps"]
    if preset.method == "mixmatch" or preset.loss.get("loss_u") == "mse":
        lambda_u *= min(1.0, steps / FULL_WEIGHT_STEPS) ** (1 / 3)
    return lambda_u, min(ramp, steps // 2)


def name_of_weight(method: str) -> str:
    """Return the name that λ_U has as an argument of a method's loss."""
    return "lambda_mix" if method == "remixmatch" else "lambda_u"


def choose_decay(decay: float, steps: int) -> float:
    """Return the decay of an average over a run's steps: at most 1 - 10 / steps.

    So a short run forgets its start: less than e^-10 of it is left at the end.
    """
    return min(decay, max(0.0, 1 - 10 / steps))


def choose_builder(preset: presets.Preset, steps: int) -> dict[str, Any]:
    """Return the switches of a preset's method for a run of so many steps.

    Averages of guesses, which a threshold follows, have at most the decay of `choose_decay`, and a
    window of guesses is at most a tenth of the run.
    """
    builder = dict(preset.builder)
    if "window" in builder:
        builder["window"] = min(builder["window"], max(1, steps // 10))
    if "momentum" in builder:
        builder["momentum"] = choose_decay(builder["momentum"], steps)
    return builder


def choose_guess(method: str, guess: str | None) -> str:
    """Return when a method guesses: "first", or by the "loss", of the same pass.

    None is as the method's reference does it.

    Raises:
        ValueError: If it must guess first.
    """
    if guess == "loss" and method in _GUESS_FIRST:
        raise ValueError(
            f"guess must be 'first' for the method {method}, whose guesses are mixed or a "
            "teacher's, got 'loss'"
        )
    return guess or ("first" if method in (*_GUESS_FIRST, "pi_model") else "loss")


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


def make_strong(
    weak: WeakAugment, height: int, width: int, factory: str = "fixmatch", channels: int = 3
) -> RandAugment:
    """Return FixMatch's RandAugment behind ``weak``, or another's, for images of a size.

    FixMatch's cutout of 16 pixels and its translations of up to 9 are for images of 32. Larger
    images get the same pixels. Where a side is smaller they are shares: the cutout has half of the
    smaller side, and translations go up to 9/32 of each, in whole pixels cut towards 0. Digits of
    8 pixels would otherwise be hidden or moved away as a whole.

    Args:
        weak: What comes before.
        height: Of the images, in pixels.
        width: Likewise.
        factory: The name of that of `RandAugment`.
        channels: Of the images; USB's cutout has a colour where there are three.
    """
    colour = {"cutout_color": presets.USB_GREY} if factory == "usb" and channels == 1 else {}
    make = partial(getattr(RandAugment, factory), **colour)
    whole: RandAugment = make(weak)
    least = min(height, width)
    if least >= FIXMATCH_SIDE:
        return whole
    ops: dict[str, Sequence[float]] = {}
    for name, magnitudes in whole.chain.ops:
        if name in ("translate_x", "translate_y"):
            ops[f"{name}_rel"] = [pixels / FIXMATCH_SIDE for pixels in magnitudes]
        else:
            ops[name] = magnitudes
    cutout = {"cutout": least // 2} if isinstance(whole.chain.cutout, int) else {}
    scaled: RandAugment = make(weak, ops=ops, **cutout)
    return scaled


def make_builder(
    preset: presets.Preset,
    num_classes: int,
    engine: Augment,
    weak: WeakAugment,
    image: tuple[int, int, int],
    num_unlabelled: int,
    **options: Any,
) -> BatchBuilder:
    """Return the builder of a preset's method.

    Args:
        preset: Its method and strong views.
        num_classes: L.
        engine: Of all views, or of the weak ones where the method has strong ones.
        weak: What the strong ones have before them.
        image: Channels, height and width of the images.
        num_unlabelled: Unlabelled images.
        options: Switches of the method.

    Raises:
        ValueError: If a method with strong views would have no weak ones.
    """
    if preset.strong is None:
        return preset.build(num_classes, weak=engine, **options)
    if isinstance(engine, RandAugment):
        raise ValueError(
            f"augment must be 'weak', 'kornia' or 'dali' for the method {preset.method}, which has "
            "strong views beside the weak ones, got 'strong'"
        )
    if preset.method == "flexmatch":
        options["num_unlabelled"] = num_unlabelled
    channels, height, width = image
    strong = make_strong(weak, height, width, preset.strong, channels)
    return preset.build(num_classes, weak=engine, strong=strong, **options)


def make_loader(
    name: str,
    labelled: TensorDataset | ImageFiles,
    unlabelled: TensorDataset | ImageFiles,
    batch_size: int,
    *,
    ratio: int = 1,
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
        batch_size: Labelled images of a batch.
        ratio: Unlabelled images per labelled one.
        steps_per_epoch: Batches of an epoch.
        seed: Of the order.
        device: Where batches lie.
        num_workers: Processes of "dataloader", for each of the two data sets.

    Raises:
        ImportError: If "dali" is wanted and not installed.
        ValueError: If "dali" is wanted and the images are in memory.
    """
    order: dict[str, Any] = {"ratio": ratio, "steps_per_epoch": steps_per_epoch, "seed": seed}
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
