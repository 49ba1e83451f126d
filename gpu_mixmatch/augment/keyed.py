"""KeyedAugment: engines whose draws are functions of (seed, step, sample id, view)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gpu_mixmatch import _unchecked, functional, sampling
from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch._validation import (
    MOST_VIEW,
    as_ids,
    as_integer,
    as_length,
    came,
    check_chain_images,
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
    view_size,
)
from gpu_mixmatch.augment.base import BuiltViews, MakeTargets, NormalizedViews, Views
from gpu_mixmatch.impl import resolve_impl
from gpu_mixmatch.types import (
    AugmentParams,
    AugmentPolicy,
    ChainParams,
    DrawPlan,
    Draws,
    Geometry,
    Impl,
    Layout,
    MixUpParams,
)

# Values of W that do not stay in a CPU's cache.
_LEAST_TO_MIX_BYTES = 2**21


class KeyedAugment(NormalizedViews):
    """What engines share that are a policy: drawn by `sampling`, applied by `functional.augment`.

    Args:
        mean: See `NormalizedViews`, like the next four.
        std: See there.
        dtype: See there.
        channels_last: See there.
        layout: See there.
        impl: Implementation of `functional.augment`.

    Raises:
        TypeError: If a field is of the wrong kind.
        ValueError: If a field is out of its range.
    """

    def __init__(
        self,
        mean: float | Sequence[float],
        std: float | Sequence[float],
        dtype: torch.dtype,
        channels_last: bool,
        layout: Layout | None,
        impl: Impl,
    ) -> None:
        super().__init__(mean, std, dtype, channels_last, layout)
        check_choice("impl", impl, Impl)
        self.impl = impl

    @property
    def policy(self) -> AugmentPolicy:
        """What is drawn."""
        raise NotImplementedError

    @property
    def geometry(self) -> Geometry:
        """What all views have in common."""
        raise NotImplementedError

    @property
    def drawn_by_builder(self) -> bool:
        """True: what is drawn is the policy's; see `Augment`."""
        return True

    def normalize(self, images: Tensor) -> Tensor:
        """Convert and normalise without augmenting; of a cut's size, the part at the centre.

        Args:
            images: ``[M, C, H, W]`` or ``[M, H, W, C]``, uint8 or floats in [0, 1].

        Returns:
            ``[M, C, H, W]`` in the engine's dtype and memory format, of the size of the views.

        Raises:
            TypeError: If they are no tensor.
            ValueError: If they are no images, are smaller than a view, or, on a CPU, hold floats
                far outside [0, 1].
        """
        cut = self.geometry.cut
        nhwc, (_, height, width) = image_layout("images", images, self.layout)
        check_pixels("images", images)
        images = images.permute(0, 3, 1, 2) if nhwc else images
        if cut and cut.size:
            tall, wide = cut.size
            if tall > height or wide > width:
                raise ValueError(
                    f"images must be at least as large as views, {tall} x {wide} pixels, since "
                    f"evaluation takes the centre, got {height} x {width}: resize them before"
                )
            top, left = (height - tall) // 2, (width - wide) // 2
            images = images[..., top : top + tall, left : left + wide]
        return self.normalize_nchw(images)

    def remixes_from_bytes(self, images: Tensor, num_rows: int) -> bool:
        """Whether mixing ``num_rows`` views anew from the images costs less than reading them back.

        It may where a view is one byte per value, without zoom and blur: in Triton's kernels, and
        in Numba's once the views of a batch do not stay in the cache.
        """
        geometry = self.geometry
        if geometry.zoom or geometry.blur_radius or geometry.cut or geometry.chain:
            return False
        running = resolve_impl(self.impl, images.device)
        if running == "numba":
            return num_rows * images.shape[1:].numel() >= _LEAST_TO_MIX_BYTES
        return running == "triton"

    def draw(
        self, seed: int, step: int, ids: Tensor | int, views: int | Sequence[int] = 0
    ) -> Draws:
        """Draw for some views of some images; see `sampling.draw_augment`. Stays on the CPU."""
        return sampling.draw_augment(seed, step, ids, views, **self.policy._asdict())

    def apply(  # type: ignore[override]
        self,
        images: Tensor | tuple[Tensor, Tensor],
        params: Draws | None = None,
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
        params: Draws,
        *,
        mixup: MixUpParams | None = None,
        out: Tensor | None = None,
        workspace: Workspace | None = None,
    ) -> Tensor:
        """`apply` without a look at the pixels, which the builder has looked at."""
        first = images[0] if isinstance(images, tuple) else images
        name = "x" if isinstance(images, tuple) else "images"
        geometry = self.geometry
        _, (channels, *size) = image_layout(name, first, self.layout)
        check_kind("params", params, (AugmentParams, ChainParams), "AugmentParams or ChainParams")
        check_tensor("params.top", params.top)
        if params.top.device != first.device:
            params = sampling.augment_to_device(params, first.device)
        if out is None and workspace is not None:
            shape = (params.top.shape[0], channels, *view_size(geometry.cut, *size))
            out = self._place(workspace, shape, first.device)
        return functional.augment(
            images,
            params,
            geometry,
            self.scaling_of(first, channels),
            dtype=self.dtype,
            channels_last=self.channels_last,
            mixup=mixup,
            layout=self.layout,
            out=out,
            workspace=workspace,
            impl=self.impl,
        )

    def forward(
        self,
        images: Tensor,
        seed: int = 0,
        step: int = 0,
        view: int = 0,
        *,
        ids: Tensor | None = None,
    ) -> Tensor:
        """Draw and apply one view of a batch.

        Args:
            images: ``[M, C, H, W]`` or ``[M, H, W, C]``.
            seed: The key, 0 ≤ seed < 2^63.
            step: The step, 0 ≤ step < 2^32: another one gives other views.
            view: The number of the view, 0 .. 2^16.
            ids: Sample ids, ``[M]`` int64, or a numpy array of integers; None takes positions in
                the batch.

        Returns:
            The views, ``[M, C, H, W]``.

        Raises:
            TypeError: If an argument is of the wrong kind.
            ValueError: If an argument is out of its range, or there is not an id per image.
        """
        count = as_length("images", images)
        view = as_integer("view", view, most=MOST_VIEW)
        if ids is None:
            return self.apply(images, self.draw(seed, step, count, view))
        if not isinstance(ids, Tensor | np.ndarray):
            raise TypeError(f"ids must be a tensor of {count} ids or None, got {came(ids)}")
        drawn = as_ids("ids", ids)
        if isinstance(drawn, Tensor) and len(drawn) != count:
            raise ValueError(f"ids must be [M] with M = {count} like images, got {len(drawn)}")
        return self.apply(images, self.draw(seed, step, drawn, view))

    def draw_batch(
        self,
        seed: int,
        step: int,
        ids_x: Tensor | int,
        ids_u: Tensor | int,
        num_augmentations: int,
    ) -> Draws:
        """Draw for x as view 0 and for u as views 1..K, on the CPU; see `Augment`."""
        plan = DrawPlan(num_augmentations, self.policy, mix="none")
        params, _ = sampling.draw_batch(seed, step, ids_x, ids_u, plan)
        assert params is not None
        return params

    def build(
        self,
        x: Tensor,
        u: Tensor,
        draws: Draws,
        num_augmentations: int,
        workspace: Workspace | None = None,
    ) -> Tensor:
        """Write W, x once and u K times, into one buffer; see `Augment`."""
        return self._applied((x, u), draws, workspace=workspace)

    def views(
        self,
        x: Tensor,
        u: Tensor,
        draws: Draws,
        num_augmentations: int,
        workspace: Workspace | None = None,
    ) -> Views:
        """Build W, or the views of u alone where mixing builds all rows anew; see `Augment`."""
        sources, geometry = (x, u), self.geometry
        nhwc, (channels, *size) = check_sources(sources, self.layout)
        check_kind("params", draws, (AugmentParams, ChainParams), "AugmentParams or ChainParams")
        check_tensor("params.top", draws.top)
        remixes = self.remixes_from_bytes(x, draws.top.shape[0])
        if not remixes and getattr(self.build, "__func__", None) is not KeyedAugment.build:
            return super().views(x, u, draws, num_augmentations, workspace)
        check_reflection(geometry.padding, geometry.padding_mode, *size)
        if draws.top.device != x.device:
            draws = sampling.augment_to_device(draws, x.device)
        check_draws_of(sources, draws, geometry)
        image_shape = (channels, *view_size(geometry.cut, *size))
        if geometry.chain:
            check_chain_images("x", x, geometry.chain, (draws.top.shape[0], *image_shape))
        check_no_grad(images=x, u=u)
        num_x = x.shape[0]
        write = partial(self._write, nhwc=nhwc, image_shape=image_shape, workspace=workspace)
        if not remixes:
            return _WholeViews(write(sources, draws), num_x)
        draws_u = type(draws)(*[draw[num_x:] for draw in draws])
        return _ViewsOfBytes(write((u,), draws_u), sources, draws, write)

    def _write(
        self,
        sources: tuple[Tensor, ...],
        draws: Draws,
        mixup: MixUpParams | None = None,
        out: Tensor | None = None,
        *,
        nhwc: bool,
        image_shape: tuple[int, int, int],
        workspace: Workspace | None,
    ) -> Tensor:
        """`_applied` of what is known to fit."""
        first = sources[0]
        shape = (draws.top.shape[0], *image_shape)
        if out is None and workspace is not None:
            out = self._place(workspace, shape, first.device)
        return _unchecked.augment(
            sources,
            draws,
            self.geometry,
            self.scaling_of(first, image_shape[0]),
            shape=shape,
            channels_last_in=nhwc,
            dtype=self.dtype,
            channels_last=self.channels_last,
            mixup=mixup,
            out=out,
            workspace=workspace,
            impl=self.impl,
        )

    def _place(
        self, workspace: Workspace, shape: tuple[int, int, int, int], device: torch.device
    ) -> Tensor:
        """Where views lie that outlive no batch, in the memory format of this engine."""
        if self.channels_last:
            rows, channels, height, width = shape
            order = (rows, height, width, channels)
            return workspace.empty("views", order, self.dtype, device).permute(0, 3, 1, 2)
        return workspace.empty("views", shape, self.dtype, device)


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
    draws: Draws
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
