"""WeakAugment: shift-crop, zoom-crop or random crop, flip, blur and normalise."""

import math
from collections.abc import Sequence
from typing import Any, Self

import torch

from gpu_mixmatch._validation import as_aspect, as_policy, check_choice
from gpu_mixmatch.augment.keyed import KeyedAugment
from gpu_mixmatch.types import AugmentPolicy, Cut, Geometry, Impl, Layout, PaddingMode


class WeakAugment(KeyedAugment):
    """The weak augmentation of semi-supervised learning, all views of a batch in one buffer.

    In this order: pad and cut a window of the image's size (shift), cut ``zoom_px`` per side and
    resize back (zoom), or cut out a part of another size, mirror (flip), blur, normalise. Drawing
    and applying are separate, and a sample's draws depend on (seed, step, sample id, view) alone.

    Images are NCHW or NHWC, uint8 in 0..255 or floating point in [0, 1]. Without ``layout`` their
    shape tells which, where it leaves no doubt. ``[M, s, .., ..]`` with s of 1 to 4 is NCHW.
    ``[M, H, W, C]`` with C of 1 to 4 is NHWC if the images are square, or, with 3 or 4 channels, at
    least 16 pixels high and wide. More channels are NCHW if the images are square, or have more
    rows and columns than channels. All other shapes, such as ``[M, 3, 4, 4]``, ``[M, 2, 128, 1]``
    or ``[M, 32, 32, 5]``, raise, and want ``layout``.

    On a CPU floats that lie outside of -0.5 .. 1.5 raise: they are in 0..255 or normalised already.
    The margin lets bicubic resizing pass, which overshoots by up to 0.45.

    Args:
        padding: Pixels of padding; the window is shifted by -padding .. padding.
        padding_mode: "reflect" (the reference), "zeros" (black) or "edge".
        zoom_px: Least and most pixels to cut off each side, drawn per side. At least one pixel
            is left of small images.
        flip: Probability of a mirror image.
        blur_sigma: Least and greatest standard deviation of a Gaussian blur in pixels, drawn per
            view; None is no blur. The kernel reaches ceil(3 · greatest) pixels and reflects.
        size: Height and width of the views in pixels, or one number for both: a part of that size
            is cut out at a random place, or, with an ``area``, resized to it. None keeps the size.
        area: Least and most of an image's area that is cut out and resized, drawn uniformly, in
            2^-24; None cuts without resizing. What would stick out of an image, in one of seven
            draws of the usual (0.08, 1), is cut at its border; torchvision draws up to ten times.
        aspect: Least and greatest width over height of what is cut out; its logarithm is uniform on
            1024 levels.
        mean: Of a channel, or of each, in [0, 1] units; subtracted.
        std: Of a channel, or of each, in [0, 1] units; divided by.
        dtype: Of the views: float32, float16 or bfloat16.
        channels_last: Memory format of the views.
        layout: Of the images, "NCHW" or "NHWC"; None tells it by their shape.
        impl: Implementation of `functional.augment`.

    Raises:
        TypeError: If a field is of the wrong kind.
        ValueError: If a field is out of its range.

    References:
        Berthelot et al. 2019, section 4: flip and shift by 4 px for CIFAR, pixels in [-1, 1].
    """

    def __init__(
        self,
        padding: int = 4,
        padding_mode: PaddingMode = "reflect",
        zoom_px: tuple[int, int] = (0, 0),
        flip: float = 0.5,
        blur_sigma: tuple[float, float] | None = None,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        layout: Layout | None = None,
        impl: Impl = "auto",
        size: int | tuple[int, int] | None = None,
        area: tuple[float, float] | None = None,
        aspect: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> None:
        super().__init__(mean, std, dtype, channels_last, layout, impl)
        check_choice("padding_mode", padding_mode, PaddingMode)
        cut = None
        if size is not None or area is not None:
            both = size if size is None or isinstance(size, list | tuple) else (size, size)
            cut = Cut(both, area, aspect)
        policy = as_policy(padding, zoom_px, flip, blur_sigma, cut)
        self.padding, self.zoom_px, self.flip, self.blur_sigma = policy[:4]
        self.size, self.area, self.aspect = policy.cut or Cut(None, None, as_aspect(aspect))
        self.padding_mode = padding_mode

    @property
    def policy(self) -> AugmentPolicy:
        """What is drawn."""
        return AugmentPolicy(self.padding, self.zoom_px, self.flip, self.blur_sigma, self.cut)

    @property
    def cut(self) -> Cut | None:
        """What is cut out of the window; None is all of it."""
        if self.size is None and self.area is None:
            return None
        return Cut(self.size, self.area, self.aspect)

    @property
    def geometry(self) -> Geometry:
        """What all views have in common."""
        zoom = self.zoom_px[1] > 0
        return Geometry(self.padding, self.padding_mode, zoom, self.blur_radius, self.cut)

    @property
    def blur_radius(self) -> int:
        """Reach of the blur's kernel in pixels; 0 where there is no blur."""
        return math.ceil(3 * self.blur_sigma[1]) if self.blur_sigma else 0

    def extra_repr(self) -> str:
        """Show every field."""
        names = (
            "padding",
            "padding_mode",
            "zoom_px",
            "flip",
            "blur_sigma",
            "mean",
            "std",
            "dtype",
            "channels_last",
            "layout",
            "size",
            "area",
            "aspect",
            "impl",
        )
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    @classmethod
    def cifar10(cls, **fields: Any) -> Self:
        """Shift by 4 with reflection and flip, pixels in [-1, 1]: the paper's for CIFAR-10."""
        return cls(**{"padding": 4, "flip": 0.5, **fields})

    @classmethod
    def cifar100(cls, **fields: Any) -> Self:
        """The paper's for CIFAR-100, the same as for CIFAR-10."""
        return cls.cifar10(**fields)

    @classmethod
    def svhn(cls, **fields: Any) -> Self:
        """Shift by 4 and no flip, since digits have a left and a right: the paper's for SVHN."""
        return cls(**{"padding": 4, "flip": 0.0, **fields})

    @classmethod
    def stl10(cls, **fields: Any) -> Self:
        """Shift by 12 and flip: the paper's for STL-10 at 96 px."""
        return cls(**{"padding": 12, "flip": 0.5, **fields})

    @classmethod
    def fashion_mnist(cls, **fields: Any) -> Self:
        """Shift by 3 and flip for 28 px clothes; ours, the paper has none."""
        return cls(**{"padding": 3, "flip": 0.5, **fields})

    @classmethod
    def digits(cls, **fields: Any) -> Self:
        """Shift by 1 with black borders and no flip for 8 px digits; ours, the paper has none."""
        return cls(**{"padding": 1, "padding_mode": "zeros", "flip": 0.0, **fields})

    @classmethod
    def imagenet(cls, size: int | tuple[int, int] = 224, **fields: Any) -> Self:
        """Cut out 8 to 100 % of the area, resize to ``size`` and flip; ImageNet's mean and std.

        As torchvision's RandomResizedCrop without antialiasing. `normalize` takes the centre.
        """
        usual = {"padding": 0, "flip": 0.5, "size": size, "area": (0.08, 1.0)}
        colors = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        return cls(**{**usual, **colors, **fields})

    @classmethod
    def blog(cls, **fields: Any) -> Self:
        """Zoom by 0..16 px per side, flip, blur by 0..3 px: a blog post's, not the paper's."""
        return cls(
            **{"padding": 0, "zoom_px": (0, 16), "flip": 0.5, "blur_sigma": (0.0, 3.0), **fields}
        )


def check_uncut(weak: WeakAugment) -> None:
    """Raise a ValueError if views are not of the images' own size, for engines that cannot cut."""
    if weak.cut is not None:
        raise ValueError(
            f"weak must have neither size nor area here, got size={weak.size} and area={weak.area}"
        )
