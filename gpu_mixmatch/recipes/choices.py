"""What the names on the command line mean: presets and engines."""

from gpu_mixmatch import presets
from gpu_mixmatch.augment import DaliAugment, KorniaAugment, WeakAugment
from gpu_mixmatch.augment.base import Augment

PRESETS = {"paper": presets.paper, "yu1ut": presets.yu1ut, "usb": presets.usb}


AUGMENTS = ("weak", "kornia", "dali")


LOADERS = ("resident", "dataloader", "dali")


def choose_preset(name: str, dataset: str) -> presets.Preset:
    """Return a preset by its name; a folder of photographs has CIFAR-10's settings."""
    preset = PRESETS.get(name, presets.paper)
    return preset("cifar10" if dataset == "folder" else dataset)


def make_weak(dataset: str, preset: presets.Preset, size: int) -> WeakAugment:
    """Return the preset's augmentation; images of a folder shift by an eighth of their size.

    That is what the paper does at 32 px (CIFAR-10) and at 96 px (STL-10).
    """
    fields = {"padding": size // 8} if dataset == "folder" else {}
    return preset.augment(channels_last=True, **fields)


def make_augment(name: str, weak: WeakAugment, height: int, width: int) -> Augment:
    """Return the engine ``name`` that does what ``weak`` says: shift, flip, normalise.

    - "weak" is ``weak`` itself.
    - "dali" runs it through DALI's operators, with the same draws: the same views.
    - "kornia" has the same policy as Kornia's RandomCrop and RandomHorizontalFlip, which draw for
      themselves: other views of the same distribution.

    Raises:
        ImportError: If the engine is not installed.
    """
    if name == "weak":
        return weak
    if name == "dali":
        return DaliAugment(weak)
    return KorniaAugment.shift_and_flip(weak, height, width)
