"""KorniaReplay: a `WeakAugment` in Kornia's modules, which replay our draws: an oracle."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gpu_mixmatch import sampling
from gpu_mixmatch._validation import (
    MOST_PADDING,
    as_integer,
    check_kind,
    check_params,
    image_layout,
)
from gpu_mixmatch.augment.base import float_images
from gpu_mixmatch.augment.kornia import PADDING_MODES, kornia_augmentation
from gpu_mixmatch.augment.weak import WeakAugment, check_uncut
from gpu_mixmatch.types import LEAST_SIGMA, AugmentParams


class KorniaStep(NamedTuple):
    """One module of a policy, and what was drawn for it: ``module(images, params=params)``.

    Attributes:
        module: A Kornia augmentation.
        params: Its parameters by Kornia's names, of R rows each.
    """

    module: nn.Module
    params: dict[str, Tensor]


class KorniaReplay:
    """A `WeakAugment` in Kornia's modules: RandomCrop, RandomResizedCrop, flip, blur, Normalize.

    They do not draw, they replay the draws that are given to them. Nothing of the arithmetic is
    shared with `functional.augment`, so that each checks the other. Kornia crops image by image:
    this is an oracle, and not an engine to train with.

    Args:
        augment: The policy, with its mean and std, dtype and memory format.

    Raises:
        ImportError: If Kornia is missing.
        TypeError: If ``augment`` is not a `WeakAugment`.
    """

    def __init__(self, augment: WeakAugment) -> None:
        kornia_augmentation()
        check_kind("augment", augment, WeakAugment, "a WeakAugment such as WeakAugment.cifar10()")
        check_uncut(augment)
        self.augment = augment

    def steps(self, params: AugmentParams, height: int, width: int) -> list[KorniaStep]:
        """Translate draws into Kornia's modules and their parameters, in the order of the policy.

        Args:
            params: Draws of R rows.
            height: Of the images, in pixels.
            width: Of the images, in pixels.

        Returns:
            Shift, zoom, flip, blur and normalise; no shift, zoom or blur that the policy lacks.
        """
        augmentation = kornia_augmentation()
        check_params(params)
        height, width = (
            as_integer(name, value, least=1, most=MOST_PADDING)
            for name, value in (("height", height), ("width", width))
        )
        augment, size = self.augment, (height, width)
        whole = _boxes(*(torch.full_like(params.top, edge) for edge in (0, 0, height, width)))
        steps = []
        if augment.padding > 0:
            mode = PADDING_MODES[augment.padding_mode]
            crop = augmentation.RandomCrop(size, padding=augment.padding, padding_mode=mode)
            moved = whole + torch.stack([params.left, params.top], dim=1)[:, None]
            steps.append(KorniaStep(crop, {"src": moved, "dst": whole}))
        if augment.zoom_px[1] > 0:
            zoom = augmentation.RandomResizedCrop(size, align_corners=False)
            top, bottom, left, right = params.zoom.unbind(1)
            top, left = top.clamp_max(height - 1), left.clamp_max(width - 1)  # one pixel is left
            kept = (height - top - bottom).clamp_min(1), (width - left - right).clamp_min(1)
            steps.append(KorniaStep(zoom, {"src": _boxes(top, left, *kept), "dst": whole}))
        # below, p < 1 lets batch_prob choose the rows
        flip = augmentation.RandomHorizontalFlip(p=0.5)
        steps.append(KorniaStep(flip, {"batch_prob": params.flip.float()}))
        if augment.blur_radius > 0:
            blur = augmentation.RandomGaussianBlur(
                2 * augment.blur_radius + 1, augment.blur_sigma, p=0.5
            )
            blurred = params.sigma >= LEAST_SIGMA
            sigma = params.sigma.where(blurred, 1.0)  # Kornia refuses 0, also where it is not used
            steps.append(KorniaStep(blur, {"sigma": sigma, "batch_prob": blurred.float()}))
        normalize = augmentation.Normalize(augment.mean, augment.std)
        steps.append(KorniaStep(normalize, {"batch_prob": torch.ones_like(params.sigma)}))
        return steps

    def apply(self, images: Tensor | tuple[Tensor, Tensor], params: AugmentParams) -> Tensor:
        """Build the views that ``augment.apply(images, params)`` builds, by Kornia.

        Args:
            images: ``[M, C, H, W]`` or ``[M, H, W, C]``; a pair (x, u) draws x once and u as often
                as rows remain.
            params: Draws of R rows, view-major; sent to the images' device if they are not there.

        Returns:
            The views, ``[R, C, H, W]``, computed in float64, in the policy's dtype and memory
            format.

        Raises:
            ValueError: If rows and images do not fit, or the blur reaches across a whole image,
                which Kornia does not reflect more than once.
        """
        sources = images if isinstance(images, tuple) else (images,)
        if len(sources) not in (1, 2):
            raise ValueError(f"images must be a tensor or a pair (x, u), got {len(sources)}")
        for image in sources:
            image_layout("images", image, self.augment.layout)
        check_params(params)
        *once, last = sources
        rows = len(params.top) - sum(map(len, once))
        repeats = rows // len(last) if len(last) else 0
        if repeats < 0 or repeats * len(last) != rows:
            raise ValueError(
                f"params must have a row per view of {[*map(len, once), len(last)]} images, "
                f"got {len(params.top)}"
            )
        # float64, which no GPU rounds to TF32 in a convolution
        views = torch.cat([*once, last.repeat(repeats, 1, 1, 1)])
        views = float_images(views, self.augment.layout).double()
        params = sampling.augment_to_device(params, views.device)
        for module, values in self.steps(params, *views.shape[-2:]):
            views = module(views, params=values)
        layout = torch.channels_last if self.augment.channels_last else torch.contiguous_format
        return views.to(self.augment.dtype).contiguous(memory_format=layout)

    def __repr__(self) -> str:
        return f"KorniaReplay({self.augment!r})"


def to_kornia(weak: WeakAugment) -> KorniaReplay:
    """Express an engine by Kornia's modules, which replay draws: an oracle for its `apply`.

    ``to_kornia(weak).apply(images, params)`` equals ``weak.apply(images, params)`` to rounding.

    Raises:
        ImportError: If Kornia is missing.
        TypeError: If ``weak`` is not a `WeakAugment`.
    """
    check_kind("weak", weak, WeakAugment, "a WeakAugment such as WeakAugment.cifar10()")
    return KorniaReplay(weak)


def _boxes(top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Corners (x, y) of boxes, clockwise from the top left, inclusive: ``[R, 4, 2]`` float32."""
    bottom, right = top + height - 1, left + width - 1
    corners = ((left, top), (right, top), (right, bottom), (left, bottom))
    return torch.stack([torch.stack(corner, dim=1) for corner in corners], dim=1).float()
