"""KorniaAugment: any Kornia augmentation as an engine; KorniaReplay: Kornia with our draws."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from gpu_mixmatch import sampling
from gpu_mixmatch.augment.weak import NormalizedViews, WeakAugment, float_images
from gpu_mixmatch.types import AugmentParams, Workspace

# Below this the taps beside the centre are zero in float32: such a blur is none.
_LEAST_SIGMA = 0.01

_PADDING_MODES = {"reflect": "reflect", "zeros": "constant", "edge": "replicate"}


class KorniaAugment(NormalizedViews):
    """Any Kornia augmentation or container, called once for all views of a batch.

    The module gets x once and u K times, one after the other, as one batch ``[B + K·M, C, H, W]``
    in [0, 1] and in ``dtype``; what it returns is normalised. It may change the size of the images.

    Kornia draws from torch's global generators. They are seeded for the call from (seed, step) and
    put back afterwards, so that a run resumes exactly. But Kornia draws by position: other batch
    sizes, another order, device or version of Kornia give other views, and sample ids do not key
    them. The first id of x and that of u enter the seed, so that the ranks of a distributed run,
    whose batches begin with different positions or images, do not draw alike.

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

    Raises:
        ImportError: If Kornia is missing.
        TypeError: If ``module`` is not an ``nn.Module``.
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
    ) -> None:
        super().__init__(mean, std, dtype, channels_last)
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
            ValueError: If it zooms or blurs.
        """
        if weak.zoom_px[1] or weak.blur_radius:
            raise ValueError(
                f"weak must neither zoom nor blur, got zoom_px={weak.zoom_px} and "
                f"blur_sigma={weak.blur_sigma}"
            )
        augmentation = _kornia_augmentation()
        mode = _PADDING_MODES[weak.padding_mode]
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
        )

    @property
    def module(self) -> nn.Module:
        """The Kornia module."""
        return self._module[0]

    def draw_batch(
        self,
        seed: int,
        step: int,
        ids_x: Tensor | int,
        ids_u: Tensor | int,
        num_augmentations: int,
    ) -> int:
        """Return the seed of the call: of (seed, step) and the first ids of x and u."""
        return sampling.batch_seed(seed, step, ids_x, ids_u)

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
        images = float_images(torch.cat([x, *[u] * num_augmentations]))
        # strides too must not matter: torch.rand_like fills in the order of memory
        images = images.to(self.dtype).contiguous()
        without_autocast = torch.autocast(images.device.type, enabled=False)
        with torch.no_grad(), without_autocast, _seeded_generators(draws):
            views = self.module(images)
        if not isinstance(views, Tensor) or not views.is_floating_point():
            came = f"{views.dtype}" if isinstance(views, Tensor) else type(views).__name__
            raise TypeError(f"module must return one floating point tensor, got {came}")
        if views.dim() != 4 or len(views) != len(images):
            raise ValueError(
                f"module must return [{len(images)}, C, H, W] for images {list(images.shape)}, "
                f"got {list(views.shape)}"
            )
        return self._normalize_nchw(views)

    def forward(self, images: Tensor, seed: int, step: int) -> Tensor:
        """Draw and apply one view of a batch, as training without unlabelled images needs it."""
        return self.build(images, images[:0], self.draw_batch(seed, step, len(images), 0, 0), 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Show every field."""
        names = ("mean", "std", "dtype", "channels_last")
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{self.module!r}, {fields}"


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
    """

    def __init__(self, augment: WeakAugment) -> None:
        _kornia_augmentation()
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
        augmentation = _kornia_augmentation()
        augment, size = self.augment, (height, width)
        whole = _boxes(*(torch.full_like(params.top, edge) for edge in (0, 0, height, width)))
        steps = []
        if augment.padding > 0:
            mode = _PADDING_MODES[augment.padding_mode]
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
            blurred = params.sigma >= _LEAST_SIGMA
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
        *once, last = images if isinstance(images, tuple) else (images,)
        rows = len(params.top) - sum(map(len, once))
        repeats = rows // len(last) if len(last) else 0
        if repeats < 0 or repeats * len(last) != rows:
            raise ValueError(
                f"params must have a row per view of {[*map(len, once), len(last)]} images, "
                f"got {len(params.top)}"
            )
        # float64, which no GPU rounds to TF32 in a convolution
        views = float_images(torch.cat([*once, last.repeat(repeats, 1, 1, 1)])).double()
        params = sampling.augment_to_device(params, views.device)
        for module, values in self.steps(params, *views.shape[-2:]):
            views = module(views, params=values)
        layout = torch.channels_last if self.augment.channels_last else torch.contiguous_format
        return views.to(self.augment.dtype).contiguous(memory_format=layout)

    def __repr__(self) -> str:
        return f"KorniaReplay({self.augment!r})"


def _kornia_augmentation() -> ModuleType:
    try:
        import kornia.augmentation
    except ImportError as error:
        raise ImportError(
            'Kornia is missing: pip install "kornia>=0.9,<1" (it comes with gpu-mixmatch)'
        ) from error
    return kornia.augmentation


def _check_module(module: Any) -> None:
    augmentation = _kornia_augmentation()
    if not isinstance(module, nn.Module):
        raise TypeError(
            "module must be an nn.Module such as kornia.augmentation.RandomHorizontalFlip(), got "
            f"{module!r}; MixMatch takes a plain function as it is"
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


@contextlib.contextmanager
def _seeded_generators(seed: int) -> Iterator[None]:
    """Seed torch's global generators for a while, of the CPU and of all CUDA devices in use."""
    # torch.manual_seed would also leave a seed to devices that are not in use yet
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count() if in_use else 0)
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield


def _boxes(top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Corners (x, y) of boxes, clockwise from the top left, inclusive: ``[R, 4, 2]`` float32."""
    bottom, right = top + height - 1, left + width - 1
    corners = ((left, top), (right, top), (right, bottom), (left, bottom))
    return torch.stack([torch.stack(corner, dim=1) for corner in corners], dim=1).float()
