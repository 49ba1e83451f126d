"""WeakAugment: shift-crop, zoom-crop, flip, blur and normalise, with keyed draws."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from gpu_mixmatch import _unchecked, functional, sampling
from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch._validation import (
    as_length,
    as_policy,
    came,
    check_choice,
    check_draws_of,
    check_kind,
    check_no_grad,
    check_out,
    check_pixels,
    check_reflection,
    check_sources,
    check_tensor,
    image_layout,
)
from gpu_mixmatch.augment.base import BuiltViews, MakeTargets, NormalizedViews, Views
from gpu_mixmatch.impl import resolve_impl
from gpu_mixmatch.types import (
    AugmentParams,
    AugmentPolicy,
    DrawPlan,
    Geometry,
    Impl,
    Layout,
    MixUpParams,
    PaddingMode,
)

# Values of W that do not stay in a CPU's cache.
_LEAST_TO_MIX_BYTES = 2**21


class WeakAugment(NormalizedViews):
    """The weak augmentation of semi-supervised learning, all views of a batch in one buffer.

    In this order: pad and cut a window of the image's size (shift), cut ``zoom_px`` per side and
    resize back (zoom), mirror (flip), blur, normalise. Drawing and applying are separate, and a
    sample's draws depend on (seed, step, sample id, view) alone.

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
    ) -> None:
        super().__init__(mean, std, dtype, channels_last, layout)
        check_choice("padding_mode", padding_mode, PaddingMode)
        check_choice("impl", impl, Impl)
        policy = as_policy(padding, zoom_px, flip, blur_sigma)
        self.padding, self.zoom_px, self.flip, self.blur_sigma = policy
        self.padding_mode = padding_mode
        self.impl = impl

    @property
    def policy(self) -> AugmentPolicy:
        """What is drawn."""
        return AugmentPolicy(self.padding, self.zoom_px, self.flip, self.blur_sigma)

    @property
    def drawn_by_builder(self) -> bool:
        """True: what is drawn is the policy's; see `Augment`."""
        return True

    @property
    def geometry(self) -> Geometry:
        """What all views have in common."""
        zoom = self.zoom_px[1] > 0
        return Geometry(self.padding, self.padding_mode, zoom, self.blur_radius)

    @property
    def blur_radius(self) -> int:
        """Reach of the blur's kernel in pixels; 0 where there is no blur."""
        return math.ceil(3 * self.blur_sigma[1]) if self.blur_sigma else 0

    def remixes_from_bytes(self, images: Tensor, num_rows: int) -> bool:
        """Whether mixing ``num_rows`` views anew from the images costs less than reading them back.

        It may where a view is one byte per value, without zoom and blur: in Triton's kernels, and
        in Numba's once the views of a batch do not stay in the cache.
        """
        if self.zoom_px[1] or self.blur_radius:
            return False
        running = resolve_impl(self.impl, images.device)
        if running == "numba":
            return num_rows * images.shape[1:].numel() >= _LEAST_TO_MIX_BYTES
        return running == "triton"

    def draw(
        self, seed: int, step: int, ids: Tensor | int, views: int | Sequence[int] = 0
    ) -> AugmentParams:
        """Draw for some views of some images; see `sampling.draw_augment`. Stays on the CPU."""
        return sampling.draw_augment(
            seed,
            step,
            ids,
            views,
            padding=self.padding,
            zoom_px=self.zoom_px,
            flip=self.flip,
            blur_sigma=self.blur_sigma,
        )

    def apply(  # type: ignore[override]
        self,
        images: Tensor | tuple[Tensor, Tensor],
        params: AugmentParams | None = None,
        *,
        mixup: MixUpParams | None = None,
        out: Tensor | None = None,
        workspace: Workspace | None = None,
    ) -> Tensor:
        """Apply drawn parameters; see `functional.augment`.

        Args:
            images: ``[M, C, H, W]`` or ``[M, H, W, C]``; a pair (x, u) draws x once and u as often
                as rows remain.
            params: Draws of R rows, view-major; sent to the images' device if they are not there.
            mixup: λ' and partners of the R rows, to blend the views by; None leaves them unmixed.
            out: Where to write; None allocates.
            workspace: Memory for the result and for scratch that outlives the call.

        Returns:
            The views, ``[R, C, H, W]``.

        Raises:
            TypeError: If an argument is of the wrong kind.
            ValueError: If images and draws do not fit each other, the shape leaves the layout in
                doubt, or, on a CPU, floats lie far outside of [0, 1].
        """
        if params is None:  # nn.Module.apply(function), as a module that holds this one calls it
            function: Any = images
            if not callable(function) or isinstance(function, nn.Module | Tensor):
                raise TypeError(f"params must be AugmentParams, got {came(params)}")
            return super().apply(function)  # type: ignore[return-value]
        sources = images if isinstance(images, tuple) else (images,)
        for image in sources:
            check_tensor("images", image)
            check_pixels("images", image)
        return self._applied(images, params, mixup=mixup, out=out, workspace=workspace)

    def _applied(
        self,
        images: Tensor | tuple[Tensor, Tensor],
        params: AugmentParams,
        *,
        mixup: MixUpParams | None = None,
        out: Tensor | None = None,
        workspace: Workspace | None = None,
    ) -> Tensor:
        """`apply` without a look at the pixels, which the builder has looked at."""
        first = images[0] if isinstance(images, tuple) else images
        name = "x" if isinstance(images, tuple) else "images"
        _, image_shape = image_layout(name, first, self.layout)
        check_kind("params", params, AugmentParams, "AugmentParams")
        check_tensor("params.top", params.top)
        if params.top.device != first.device:
            params = sampling.augment_to_device(params, first.device)
        if out is None and workspace is not None:
            out = self._place(workspace, params.top.shape[0], image_shape, first.device)
        return functional.augment(
            images,
            params,
            self.geometry,
            self.scaling_of(first, image_shape[0]),
            dtype=self.dtype,
            channels_last=self.channels_last,
            mixup=mixup,
            layout=self.layout,
            out=out,
            workspace=workspace,
            impl=self.impl,
        )

    def forward(self, images: Tensor, seed: int, step: int, view: int = 0) -> Tensor:
        """Draw and apply one view of a batch, its positions being the sample ids."""
        return self.apply(images, self.draw(seed, step, as_length("images", images), view))

    def draw_batch(
        self,
        seed: int,
        step: int,
        ids_x: Tensor | int,
        ids_u: Tensor | int,
        num_augmentations: int,
    ) -> AugmentParams:
        """Draw for x as view 0 and for u as views 1..K, on the CPU; see `Augment`."""
        plan = DrawPlan(num_augmentations, self.policy, mix="none")
        params, _ = sampling.draw_batch(seed, step, ids_x, ids_u, plan)
        assert params is not None
        return params

    def build(
        self,
        x: Tensor,
        u: Tensor,
        draws: AugmentParams,
        num_augmentations: int,
        workspace: Workspace | None = None,
    ) -> Tensor:
        """Write W, x once and u K times, into one buffer; see `Augment`."""
        return self._applied((x, u), draws, workspace=workspace)

    def views(
        self,
        x: Tensor,
        u: Tensor,
        draws: AugmentParams,
        num_augmentations: int,
        workspace: Workspace | None = None,
    ) -> Views:
        """Build W, or the views of u alone where mixing builds all rows anew; see `Augment`."""
        sources = (x, u)
        nhwc, image_shape = check_sources(sources, self.layout)
        check_kind("params", draws, AugmentParams, "AugmentParams")
        check_tensor("params.top", draws.top)
        remixes = self.remixes_from_bytes(x, draws.top.shape[0])
        if not remixes and getattr(self.build, "__func__", None) is not WeakAugment.build:
            return super().views(x, u, draws, num_augmentations, workspace)
        check_reflection(self.padding, self.padding_mode, *image_shape[1:])
        if draws.top.device != x.device:
            draws = sampling.augment_to_device(draws, x.device)
        check_draws_of(sources, draws)
        check_no_grad(images=x, u=u)
        num_x = x.shape[0]
        write = partial(self._write, nhwc=nhwc, image_shape=image_shape, workspace=workspace)
        if not remixes:
            return _WholeViews(write(sources, draws), num_x)
        draws_u = AugmentParams(*[draw[num_x:] for draw in draws])
        return _ViewsOfBytes(write((u,), draws_u), sources, draws, write)

    def _write(
        self,
        sources: tuple[Tensor, ...],
        draws: AugmentParams,
        mixup: MixUpParams | None = None,
        out: Tensor | None = None,
        *,
        nhwc: bool,
        image_shape: tuple[int, int, int],
        workspace: Workspace | None,
    ) -> Tensor:
        """`_applied` of what is known to fit."""
        first, rows = sources[0], draws.top.shape[0]
        if out is None and workspace is not None:
            out = self._place(workspace, rows, image_shape, first.device)
        return _unchecked.augment(
            sources,
            draws,
            self.geometry,
            self.scaling_of(first, image_shape[0]),
            shape=(rows, *image_shape),
            channels_last_in=nhwc,
            dtype=self.dtype,
            channels_last=self.channels_last,
            mixup=mixup,
            out=out,
            workspace=workspace,
            impl=self.impl,
        )

    def _place(
        self,
        workspace: Workspace,
        rows: int,
        image_shape: tuple[int, int, int],
        device: torch.device,
    ) -> Tensor:
        """Where views lie that outlive no batch, in the memory format of this engine."""
        channels, height, width = image_shape
        if self.channels_last:
            shape = (rows, height, width, channels)
            return workspace.empty("views", shape, self.dtype, device).permute(0, 3, 1, 2)
        return workspace.empty("views", (rows, *image_shape), self.dtype, device)

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
    def blog(cls, **fields: Any) -> Self:
        """Zoom by 0..16 px per side, flip, blur by 0..3 px: a blog post's, not the paper's."""
        return cls(
            **{"padding": 0, "zoom_px": (0, 16), "flip": 0.5, "blur_sigma": (0.0, 3.0), **fields}
        )


class _WholeViews(BuiltViews):
    """W as this engine builds it: images that are known to fit what they are mixed with."""

    def mix(
        self, params: MixUpParams, make_targets: MakeTargets, out: Tensor | None, impl: Impl
    ) -> tuple[Tensor, Tensor]:
        """Blend rows and targets in one pass; see `Views`."""
        return _unchecked.mixup(self.images, make_targets(None), params, out, impl)


class _ViewsOfBytes(NamedTuple):
    """The views of u, and what it takes to build all rows anew while they are mixed.

    A view is made of one byte per value: two bytes are read faster than two written values.
    """

    unlabelled: Tensor
    images: tuple[Tensor, Tensor]
    draws: AugmentParams
    write: Callable[..., Tensor]

    @property
    def mixes_unlabelled(self) -> bool:
        """False: all rows are built anew; see `Views`."""
        return False

    def copy(self) -> "_ViewsOfBytes":
        """Return these views, of which mixing reads none; see `Views`."""
        return self

    def mix(
        self, params: MixUpParams, make_targets: MakeTargets, out: Tensor | None, impl: Impl
    ) -> tuple[Tensor, Tensor]:
        """Augment and blend in one pass; see `Views`."""
        x, u = self.images
        if out is not None:
            check_out(out, images=x, u=u)
        targets = make_targets(params)
        return self.write(self.images, self.draws, params, out), targets
