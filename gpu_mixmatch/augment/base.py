"""Engines: what a method asks of one, and what engines share."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from gpu_mixmatch import functional, sampling
from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch._validation import (
    as_flag,
    as_number,
    came,
    check_image_dtype,
    check_layout,
    check_pixels,
    image_layout,
)
from gpu_mixmatch.types import AugmentPolicy, Impl, Layout, MixUpParams, Scaling

# Targets of all rows: mixed by the draws that are given, or unmixed for None.
MakeTargets = Callable[[MixUpParams | None], Tensor]


class Views(Protocol):
    """The views of a batch, as far as they are built: enough to guess on, and to mix."""

    @property
    def unlabelled(self) -> Tensor:
        """The views of u, which the model guesses on, ``[K·M, C, H, W]``, view-major."""

    @property
    def mixes_unlabelled(self) -> bool:
        """Whether `mix` reads what `unlabelled` gave: a model may have written into it."""

    def copy(self) -> "Views":
        """Return the same views in memory of their own, as far as `mix` reads them."""

    def mix(
        self, params: MixUpParams, make_targets: MakeTargets, out: Tensor | None, impl: Impl
    ) -> tuple[Tensor, Tensor]:
        """Blend each row with its partner.

        Args:
            params: λ' and partners of the N rows.
            make_targets: Gives the targets of all rows, mixed or not.
            out: Where to write the inputs, ``[N, C, H, W]``; None allocates.
            impl: Implementation of `functional.mixup`.

        Returns:
            Mixed inputs and mixed targets ``[N, L]``.
        """


class BuiltViews(NamedTuple):
    """W itself: every view of the batch in one buffer.

    Attributes:
        images: x once, then u K times, view-major, ``[B + K·M, C, H, W]``.
        num_labelled: B.
    """

    images: Tensor
    num_labelled: int

    @property
    def unlabelled(self) -> Tensor:
        """The views of u; see `Views`."""
        return self.images[self.num_labelled :]

    @property
    def mixes_unlabelled(self) -> bool:
        """True: they lie in the buffer that is mixed; see `Views`."""
        return True

    def copy(self) -> "BuiltViews":
        """Copy the buffer; see `Views`."""
        return self._replace(images=self.images.clone())

    def mix(
        self, params: MixUpParams, make_targets: MakeTargets, out: Tensor | None, impl: Impl
    ) -> tuple[Tensor, Tensor]:
        """Blend rows and targets in one pass; see `Views`."""
        return functional.mixup(self.images, make_targets(None), params, out=out, impl=impl)


@runtime_checkable
class Augment(Protocol):
    """An augmentation engine: it draws for a batch, then builds all views of it.

    `draw_batch` and `build` are what an engine must have. The rest has a default for whoever
    inherits from this class, and `complete` gives it to other objects.
    """

    @property
    def policy(self) -> AugmentPolicy | None:
        """What the draws are drawn from where they are an `AugmentParams`; else None."""
        return None

    @property
    def drawn_by_builder(self) -> bool:
        """Whether the builder may draw by ``policy`` in place of `draw_batch`.

        It then does so in one pass with MixUp's draws, and where the images are.
        """
        return False

    @property
    def layout(self) -> Layout | None:
        """What the axes of the images that it gets are; None tells it by their shape."""
        return None

    @property
    def normalisation(self) -> tuple[Sequence[float], Sequence[float]] | None:
        """Mean and std of the views in [0, 1] units, one or one per channel; None if unknown."""
        return None

    @property
    def normalize(self) -> Callable[[Tensor], Tensor] | None:
        """Makes of images what views are, without augmenting, for evaluation; None if unknown."""
        return None

    def draw_batch(
        self,
        seed: int,
        step: int,
        ids_x: Tensor | int,
        ids_u: Tensor | int,
        num_augmentations: int,
    ) -> Any:
        """Draw for x once, as view 0, and for u as views 1..K, on the CPU.

        Args:
            seed: The key, 0 ≤ seed < 2^63.
            step: The training step, 0 ≤ step < 2^32.
            ids_x: Sample ids of x, ``[B]`` int64; an integer B stands for 0 .. B - 1.
            ids_u: Sample ids of u, ``[M]`` int64, likewise.
            num_augmentations: K.

        Returns:
            Whatever `build` takes.
        """

    def build(
        self,
        x: Tensor,
        u: Tensor,
        draws: Any,
        num_augmentations: int,
        workspace: Workspace | None = None,
    ) -> Tensor:
        """Build W.

        Args:
            x: Labelled images, ``[B, C, H, W]`` or ``[B, H, W, C]``, uint8 or floats in [0, 1], at
                which `MixMatch` has looked.
            u: Unlabelled images, like x; M of them.
            draws: Of `draw_batch`, or an `AugmentParams` on the images' device.
            num_augmentations: K.
            workspace: Memory that outlives the call; None allocates.

        Returns:
            x once, then u K times, view-major, ``[B + K·M, C, H, W]`` floating point.
        """

    def views(
        self,
        x: Tensor,
        u: Tensor,
        draws: Any,
        num_augmentations: int,
        workspace: Workspace | None = None,
    ) -> Views:
        """Build what a method needs of the views; arguments as for `build`."""
        return BuiltViews(self.build(x, u, draws, num_augmentations, workspace), x.shape[0])


class _Completed(Augment):
    """An engine that has `draw_batch` and `build`, and of the rest what it happens to have."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    @property
    def policy(self) -> AugmentPolicy | None:
        policy: AugmentPolicy | None = getattr(self.engine, "policy", None)
        return policy

    @property
    def drawn_by_builder(self) -> bool:
        return self.policy is not None

    @property
    def layout(self) -> Layout | None:
        layout: Layout | None = getattr(self.engine, "layout", None)
        return layout

    @property
    def normalisation(self) -> tuple[Sequence[float], Sequence[float]] | None:
        mean, std = getattr(self.engine, "mean", None), getattr(self.engine, "std", None)
        return None if mean is None or std is None else (mean, std)

    @property
    def normalize(self) -> Callable[[Tensor], Tensor] | None:
        normalize: Callable[[Tensor], Tensor] | None = getattr(self.engine, "normalize", None)
        return normalize

    def draw_batch(self, *args: Any, **options: Any) -> Any:
        return self.engine.draw_batch(*args, **options)

    def build(self, *args: Any, **options: Any) -> Tensor:
        images: Tensor = self.engine.build(*args, **options)
        return images


def complete(engine: Any) -> Augment:
    """Return an engine with all that `Augment` names; what it lacks has the default."""
    if Augment in type(engine).__mro__:  # isinstance would look at every member
        found: Augment = engine
        return found
    return engine if isinstance(engine, Augment) else _Completed(engine)


class DrawsForeign(Augment):
    """What engines share that draw from global generators, by position in the batch."""

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


class NormalizedViews(nn.Module, Augment):
    """What engines share: the mean and std of their views, their dtype and memory format.

    Mean and std are Python's numbers. What is made of them is float32 wherever the module is and
    whatever it is cast to, so that ``.half()``, ``.to(torch.bfloat16)`` or a trainer's precision
    change no view.

    Args:
        mean: Of a channel, or of each, in [0, 1] units; subtracted.
        std: Of a channel, or of each, in [0, 1] units; divided by.
        dtype: Of the views: float32, float16 or bfloat16.
        channels_last: Memory format of the views.
        layout: Of the images, "NCHW" or "NHWC"; None tells it by their shape.

    Raises:
        TypeError: If a field is of the wrong kind.
        ValueError: If a field is out of its range.
    """

    # of the class: a property of `Augment` would hide what an instance has
    layout: Layout | None = None

    def __init__(
        self,
        mean: float | Sequence[float],
        std: float | Sequence[float],
        dtype: torch.dtype,
        channels_last: bool,
        layout: Layout | None = None,
    ) -> None:
        super().__init__()
        check_image_dtype(dtype)
        check_layout(layout)
        self.mean = _per_channel("mean", mean)
        self.std = _per_channel("std", std)
        if len({1, len(self.mean), len(self.std)}) > 2:
            raise ValueError(
                f"mean and std must have one value or one per channel, got {mean} and {std}"
            )
        self.dtype = dtype
        self.channels_last = as_flag("channels_last", channels_last)
        self.layout = layout
        # plain attributes: buffers would be cast
        self._scalings = self._made_scalings(torch.device("cpu"))

    @property
    def normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and std; see `Augment`."""
        return self.mean, self.std

    def normalize(self, images: Tensor) -> Tensor:
        """Convert and normalise without augmenting, as evaluation needs it.

        Args:
            images: ``[M, C, H, W]`` or ``[M, H, W, C]``, uint8 or floats in [0, 1].

        Returns:
            ``[M, C, H, W]`` in the engine's dtype and memory format.

        Raises:
            TypeError: If they are no tensor.
            ValueError: If they are no images, or, on a CPU, floats far outside [0, 1].
        """
        nhwc, _ = image_layout("images", images, self.layout)
        check_pixels("images", images)
        return self.normalize_nchw(images.permute(0, 3, 1, 2) if nhwc else images)

    def normalize_nchw(self, images: Tensor) -> Tensor:
        """`normalize` of images that are known to be NCHW, of any number of channels and range."""
        scale, bias = self.scaling_of(images, images.shape[1])
        if isinstance(scale, Tensor) and isinstance(bias, Tensor):
            scale, bias = scale[:, None, None], bias[:, None, None]
        values = (images.float() * scale).add_(bias)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return values.to(self.dtype).contiguous(memory_format=layout)

    def scaling_of(self, images: Tensor, channels: int) -> Scaling:
        """Return the factor and the addend that normalise ``images``.

        Raises:
            ValueError: If mean and std are of another number of channels.
        """
        if len(self.mean) == len(self.std) == 1:  # numbers: nothing to broadcast
            (mean,), (std,) = self.mean, self.std
            return Scaling(1 / (255 * std if images.dtype == torch.uint8 else std), -mean / std)
        wanted = max(len(self.mean), len(self.std))
        if wanted != channels:
            raise ValueError(
                f"images must have {wanted} channels like mean and std, got {channels}"
            )
        return self._scalings[images.dtype == torch.uint8]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow to another device; a cast changes nothing, since all is made of numbers anew."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        scale = self._scalings[0].scale
        assert isinstance(scale, Tensor)
        with torch.no_grad():
            self._scalings = self._made_scalings(fn(torch.empty(0, device=scale.device)).device)
        return self

    def _made_scalings(self, device: torch.device) -> tuple[Scaling, Scaling]:
        """Factors and addends of floats and of bytes."""
        floats, of_bytes = (_scaling(self.mean, self.std, unit, device) for unit in (1, 255))
        return floats, of_bytes


def _scaling(
    mean: tuple[float, ...], std: tuple[float, ...], unit: int, device: torch.device
) -> Scaling:
    """Factor and addend per channel, float32 on ``device``, whatever torch's defaults are."""
    channels = max(len(mean), len(std))
    means, stds = (
        torch.tensor(values, dtype=torch.float32, device="cpu") for values in (mean, std)
    )
    scale, bias = 1 / (unit * stds), -means / stds
    return Scaling(*(factor.expand(channels).contiguous().to(device) for factor in (scale, bias)))


def float_images(images: Tensor, layout: Layout | None = None, name: str = "images") -> Tensor:
    """Return images as NCHW floats in [0, 1]: uint8 divided by 255, floats as they are."""
    nhwc, _ = image_layout(name, images, layout)
    images = images.permute(0, 3, 1, 2) if nhwc else images
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def _per_channel(name: str, values: float | Sequence[float]) -> tuple[float, ...]:
    if not isinstance(values, Sequence | np.ndarray) or isinstance(values, str | bytes):
        return (_unit(name, values),)
    if getattr(values, "ndim", 1) != 1:
        raise ValueError(f"{name} must be a number or one per channel, got {came(values)}")
    channels = tuple(_unit(f"{name}[{place}]", value) for place, value in enumerate(values))
    if not channels:
        raise ValueError(f"{name} must be a number or one per channel, got {came(values)}")
    return channels


def _unit(name: str, value: object) -> float:
    """Return a mean or std in [0, 1] units: images are in [0, 1], so that 1 is the most of both."""
    number = as_number(name, value)
    is_std = name.startswith("std")
    if number > 1:
        raise ValueError(
            f"{name} must be at most 1, for images in [0, 1], got {value}: divide it by 255 if it "
            f"is of images in 0 .. 255, {number / 255:.4g}"
        )
    if number < 0 or (is_std and number == 0):
        raise ValueError(f"{name} must be {'above' if is_std else 'at least'} 0, got {value}")
    return number
