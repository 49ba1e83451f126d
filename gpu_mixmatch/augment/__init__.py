"""Augmentation engines."""

from gpu_mixmatch.augment.base import Augment
from gpu_mixmatch.augment.callable import CallableAugment, as_augment
from gpu_mixmatch.augment.dali import DaliAugment
from gpu_mixmatch.augment.kornia import KorniaAugment
from gpu_mixmatch.augment.strong import ColorJitter, RandAugment
from gpu_mixmatch.augment.weak import WeakAugment

__all__ = [
    "Augment",
    "CallableAugment",
    "ColorJitter",
    "DaliAugment",
    "KorniaAugment",
    "RandAugment",
    "WeakAugment",
    "as_augment",
]
