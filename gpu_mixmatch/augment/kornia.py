"""KorniaAugment: any Kornia augmentation as an engine; KorniaReplay: Kornia with our draws."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Self

import torch
from torch import Tensor, nn

from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch._extras import need
from gpu_mixmatch._generators import seeded_generators
from gpu_mixmatch._validation import (
    MOST_PADDING,
    as_integer,
    came,
    check_kind,
    check_pixels,
    image_layout,
)
from gpu_mixmatch.augment.base import DrawsForeign, NormalizedViews, float_images
from gpu_mixmatch.augment.weak import WeakAugment, check_uncut
from gpu_mixmatch.types import Layout

PADDING_MODES = {"reflect": "reflect", "zeros": "constant", "edge": "replicate"}


class KorniaAugment(DrawsForeign, NormalizedViews):
    """Any Kornia augmentation or container, called once for all views of a batch.

    The module gets x once and u K times, one after the other, as one batch ``[B + K·M, C, H, W]``
    in [0, 1] and in ``dtype``; what it returns is normalised. It may change the size of the images.

    Kornia draws from torch's global generators. They, numpy's and ``random``'s are seeded for the
    call from (seed, step) and put back afterwards, so that a run resumes exactly. But Kornia draws
    by position: other batch sizes, another order, device or version of Kornia give other views, and
    sample ids do not key them. The first id of x and that of u enter the seed, so that the ranks of
    a distributed run, whose batches begin with different positions or images, do not draw alike.

    What Kornia draws once per call, all views share: ``same_on_batch=True``, or the operations
    that RandAugment chooses.

    Args:
        module: For instance ``kornia.augmentation.AugmentationSequential(...)`` or an
            ``nn.Sequential``. It moves with this engine, but is not saved with it: no gradient
            flows through it, and its buffers are settings.
        mean: Of a channel, or of each, in [0, 1] units; subtracted after the module.
        std: Of a channel, or of each, in [0, 1] units; divided by after the module.
        dtype: Of the views, and of the images that the module gets: float32, float16 or bfloat16.
        channels_last: Memory format of the views.
        layout: Of the images, "NCHW" or "NHWC"; None tells it by their shape, which must then leave
            no doubt: see `WeakAugment`. The module gets NCHW.

    Raises:
        ImportError: If Kornia is missing.
        TypeError: If ``module`` is not an ``nn.Module``, or a field is of the wrong kind.
        ValueError: If it takes more than images, or blends images of a batch; if a field is out of
            its range.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        mean: float | Sequence[float],
        std: float | Sequence[float],
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        layout: Layout | None = None,
    ) -> None:
        super().__init__(mean, std, dtype, channels_last, layout)
        _check_module(module)
        # a tuple hides it from state_dict, to which RandAugment alone would add dozens of entries
        self._module = (module,)

    @classmethod
    def shift_and_flip(cls, weak: WeakAugment, height: int, width: int) -> Self:
        """Return Kornia's RandomCrop and RandomHorizontalFlip with those settings.

        They draw for themselves: other views than its own, of the same distribution.

        Args:
            weak: Its padding, flip, mean, std, dtype and memory format are taken.
            height: Of the images, in pixels.
            width: Of the images, in pixels.

        Raises:
            TypeError: If an argument is of the wrong kind.
            ValueError: If it zooms or blurs, or a size is out of its range.
        """
        check_kind("weak", weak, WeakAugment, "a WeakAugment such as WeakAugment.cifar10()")
        check_uncut(weak)
        height = as_integer("height", height, least=1, most=MOST_PADDING)
        width = as_integer("width", width, least=1, most=MOST_PADDING)
        if weak.zoom_px[1] or weak.blur_radius:
            raise ValueError(
                f"weak must neither zoom nor blur, got zoom_px={weak.zoom_px} and "
                f"blur_sigma={weak.blur_sigma}"
            )
        augmentation = kornia_augmentation()
        mode = PADDING_MODES[weak.padding_mode]
        module = augmentation.AugmentationSequential(
            augmentation.RandomCrop((height, width), padding=weak.padding, padding_mode=mode),
            augmentation.RandomHorizontalFlip(p=weak.flip),
        )
        return cls(
            module,
            mean=weak.mean,
            std=weak.std,
            dtype=weak.dtype,
            channels_last=weak.channels_last,
            layout=weak.layout,
        )

    @property
    def module(self) -> nn.Module:
        """The Kornia module."""
        return self._module[0]

    def build(
        self,
        x: Tensor,
        u: Tensor,
        draws: int,
        num_augmentations: int,
        workspace: Workspace | None = None,
    ) -> Tensor:
        """Call the module on x and K times u at once; see `Augment`. Kornia allocates by itself.

        Raises:
            TypeError: If the module does not return one floating point tensor.
            ValueError: If it does not return an image for each that it got.
        """
        image_layout("x", x, self.layout)
        images = float_images(torch.cat([x, *[u] * num_augmentations]), self.layout)
        # strides too must not matter: torch.rand_like fills in the order of memory
        images = images.to(self.dtype).contiguous()
        without_autocast = torch.autocast(images.device.type, enabled=False)
        with torch.no_grad(), without_autocast, seeded_generators(draws):
            views = self.module(images)
        if not isinstance(views, Tensor) or not views.is_floating_point():
            came = f"{views.dtype}" if isinstance(views, Tensor) else type(views).__name__
            raise TypeError(f"module must return one floating point tensor, got {came}")
        if views.dim() != 4 or len(views) != len(images):
            raise ValueError(
                f"module must return [{len(images)}, C, H, W] for images {list(images.shape)}, "
                f"got {list(views.shape)}"
            )
        return self.normalize_nchw(views)

    def forward(self, images: Tensor, seed: int, step: int) -> Tensor:
        """Draw and apply one view of a batch, as training without unlabelled images needs it."""
        image_layout("images", images, self.layout)
        check_pixels("images", images)
        return self.build(images, images[:0], self.draw_batch(seed, step, len(images), 0, 0), 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        """Show every field."""
        names = ("mean", "std", "dtype", "channels_last", "layout")
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{self.module!r}, {fields}"


def kornia_augmentation() -> ModuleType:
    """Import ``kornia.augmentation`` at the moment of use."""
    return need("kornia.augmentation", "a Kornia engine")


def _check_module(module: Any) -> None:
    augmentation = kornia_augmentation()
    if not isinstance(module, nn.Module):
        raise TypeError(
            "module must be an nn.Module such as kornia.augmentation.RandomHorizontalFlip(), got "
            f"{came(module)}; MixMatch takes a plain function as it is"
        )
    if isinstance(module, augmentation.AugmentationSequential):
        keys = [key.name.lower() for key in module.data_keys or ()]
        if keys not in (["input"], ["image"]):  # two names of one key
            raise ValueError(f"module must have data_keys=['input'], images alone, got {keys}")
    for part in module.modules():
        if isinstance(part, augmentation.MixAugmentationBaseV2) and not isinstance(
            part, augmentation.RandomJigsaw
        ):
            raise ValueError(
                f"module must augment each image by itself, got {type(part).__name__}, which "
                "blends labelled and unlabelled images while their labels stay; MixMatch mixes "
                "images and labels afterwards"
            )
