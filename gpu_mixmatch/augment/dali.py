"""DaliAugment: the policy of a `WeakAugment` through the operators of NVIDIA DALI."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch._extras import import_dali
from gpu_mixmatch._validation import (
    MOST_VIEW,
    as_integer,
    check_draws,
    check_kind,
    check_params,
    check_reflection,
    image_layout,
)
from gpu_mixmatch.augment.base import Augment
from gpu_mixmatch.augment.weak import WeakAugment, check_uncut
from gpu_mixmatch.types import LEAST_SIGMA, AugmentParams, AugmentPolicy, Layout

_DYNAMIC_MODE = "experimental.dynamic"
_OUT_OF_BOUNDS = {"reflect": "reflect_101", "zeros": "constant", "edge": "edge"}


class DaliAugment(Augment):
    """What a `WeakAugment` does, done by DALI's dynamic mode with our draws.

    DALI's own generator is keyed by the position in the batch. Here every draw is an argument per
    sample, so that a view depends on (seed, step, sample id, view) alone and equals the view of
    the `WeakAugment`: up to rounding where it is shifted, flipped and normalised, and to 1/50 of
    a grey level (of 255) where it is zoomed or blurred.

    Images enter DALI and views leave it without a copy, all views in one buffer. CPU tensors run
    DALI on the CPU, CUDA tensors on their GPU and torch's current stream. DALI wants the draws on
    the host, where they are made: the builder does not draw, since it would send them to the
    device first.

    Args:
        weak: Says what is drawn and how it is applied: padding, zoom, flip, blur, mean, std,
            dtype and memory format. Its ``impl`` plays no part.

    Raises:
        ImportError: If DALI is not installed.
        TypeError: If ``weak`` is not a `WeakAugment`.
    """

    def __init__(self, weak: WeakAugment) -> None:
        check_kind("weak", weak, WeakAugment, "a WeakAugment such as WeakAugment.cifar10()")
        check_uncut(weak)
        import_dali(_DYNAMIC_MODE)
        self.weak = weak

    @property
    def policy(self) -> AugmentPolicy:
        """What is drawn."""
        return self.weak.policy

    @property
    def layout(self) -> Layout | None:
        """What the axes of the images are; see `Augment`."""
        return self.weak.layout

    @property
    def normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and std; see `Augment`."""
        return self.weak.normalisation

    def normalize(self, images: Tensor) -> Tensor:
        """Convert and normalise without augmenting; see `WeakAugment.normalize`."""
        return self.weak.normalize(images)

    def draw_batch(
        self,
        seed: int,
        step: int,
        ids_x: Tensor | int,
        ids_u: Tensor | int,
        num_augmentations: int,
    ) -> AugmentParams:
        """Draw for x as view 0 and for u as views 1..K, on the CPU; see `Augment`."""
        draws = self.weak.draw_batch(seed, step, ids_x, ids_u, num_augmentations)
        assert isinstance(draws, AugmentParams)
        return draws

    def build(
        self,
        x: Tensor,
        u: Tensor,
        draws: AugmentParams,
        num_augmentations: int,
        workspace: Workspace | None = None,
    ) -> Tensor:
        """Return W: x once, then u K times, view-major; see `Augment`.

        Args:
            x: ``[B, C, H, W]`` or ``[B, H, W, C]``, uint8 or floating point. What DALI cannot read
                in place is copied first: images that are not dense, and half precision.
            u: ``[M, C, H, W]`` or ``[M, H, W, C]``, like x.
            draws: Of B + K·M rows; from a GPU they are fetched, which waits for it.
            num_augmentations: K.
            workspace: Not used: the result lies in memory of DALI, which the tensor holds.

        Returns:
            ``[B + K·M, C, H, W]`` in the dtype and memory format of ``weak``.

        Raises:
            ValueError: If x and u do not fit each other, the policy or the draws.
        """
        channels, height, width = _checked_shape(x, u, self.weak)
        num_augmentations = as_integer("num_augmentations", num_augmentations, most=MOST_VIEW)
        check_params(draws)
        num_rows = x.shape[0] + num_augmentations * u.shape[0]
        if draws.top.shape[0] != num_rows:
            raise ValueError(
                f"draws must have a row per view, B + K·M = {num_rows}, got {draws.top.shape[0]}"
            )
        if num_rows == 0:
            return torch.empty((0, channels, height, width), dtype=self.weak.dtype, device=x.device)
        nhwc, _ = image_layout("x", x, self.layout)
        # the channels of a pixel lie together in memory, or the shape says so
        channels_last = nhwc or not x.is_contiguous()
        (x, u) = (_dense(images, nhwc, channels_last) for images in (x, u))
        rows = [*x.unbind(), *u.unbind() * num_augmentations]
        ndd = import_dali(_DYNAMIC_MODE)
        with _context(x.device), ndd.EvalMode.sync_cpu:  # the default mode hops to a thread
            batch = ndd.as_batch(rows, layout="HWC" if channels_last else "CHW")
            views = self._views(ndd, batch, draws, (height, width)).torch(copy=False)
        views = views.permute(0, 3, 1, 2) if self.weak.channels_last else views
        return views.to(self.weak.dtype)  # type: ignore[no-any-return]

    def _views(self, ndd: Any, batch: Any, draws: AugmentParams, size: tuple[int, int]) -> Any:
        """Shift, zoom, blur, flip and normalise; blur and flip may change places."""
        weak = self.weak
        draws = AugmentParams(*(draw.cpu() for draw in draws))
        check_draws(draws, weak.padding)
        start, shape = _windows(draws, weak.padding, size)
        views = ndd.slice(
            batch,
            start=ndd.as_batch(start),
            shape=ndd.as_batch(shape),
            axes=[batch.layout.index("H"), batch.layout.index("W")],
            out_of_bounds_policy=_OUT_OF_BOUNDS[weak.padding_mode],
        )
        if weak.zoom_px[1] > 0:
            views = ndd.resize(views, size=list(size), dtype=ndd.float32)
        if weak.blur_radius:
            views = ndd.gaussian_blur(
                views,
                # DALI reads a sigma of 0 as "not given"; the least one blurs nothing
                sigma=ndd.as_batch(draws.sigma.clamp_min(LEAST_SIGMA)),
                window_size=2 * weak.blur_radius + 1,
                dtype=ndd.float32,
            )
        unit = 255.0 if batch.dtype == ndd.uint8 else 1.0
        return ndd.crop_mirror_normalize(
            views,
            mirror=ndd.as_batch(draws.flip),
            mean=[unit * value for value in weak.mean],
            std=[unit * value for value in weak.std],
            dtype=ndd.float16 if weak.dtype == torch.float16 else ndd.float32,  # has no bfloat16
            output_layout="HWC" if weak.channels_last else "CHW",
        )

    def __repr__(self) -> str:
        return f"DaliAugment({self.weak!r})"


def _windows(draws: AugmentParams, padding: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What is left of the shifted window after the zoom's cut, at least one pixel.

    Returns:
        Its corner in the image, negative in the padding, and its height and width, ``[R, 2]`` int32
        each.
    """
    limits = torch.tensor(size, dtype=torch.int32, device="cpu")
    before = torch.minimum(draws.zoom[:, 0::2], limits - 1)  # top, left
    after = torch.minimum(draws.zoom[:, 1::2], limits - 1 - before)
    start = torch.stack([draws.top, draws.left], dim=1) - padding + before
    return start, limits - before - after


def _checked_shape(x: Tensor, u: Tensor, weak: WeakAugment) -> tuple[int, int, int]:
    """Channels, height and width of the images."""
    layout, other = image_layout("x", x, weak.layout), image_layout("u", u, weak.layout)
    if layout != other or x.dtype != u.dtype or x.device != u.device:
        raise ValueError(
            "x and u must have the same channels, height, width, layout, dtype and device, got "
            f"{list(x.shape)} {x.dtype} on {x.device} and {list(u.shape)} {u.dtype} on {u.device}"
        )
    _, (channels, height, width) = layout
    wanted = max(len(weak.mean), len(weak.std))
    if wanted not in (1, channels):
        raise ValueError(f"x must have {wanted} channels like mean and std, got {channels}")
    check_reflection(weak.padding, weak.padding_mode, height, width)
    return channels, height, width


def _dense(images: Tensor, nhwc: bool, channels_last: bool) -> Tensor:
    """Images as DALI reads them, ``[M, H, W, C]`` or ``[M, C, H, W]``, in place if that can be."""
    if channels_last and not nhwc:
        images = images.permute(0, 2, 3, 1)
    images = images.float() if images.is_floating_point() else images
    return images.detach().contiguous()


def _context(device: torch.device) -> AbstractContextManager[Any]:
    if device.type == "cpu":
        return nullcontext()
    return _cuda_context(torch.cuda.current_stream(device))


@lru_cache(maxsize=8)
def _cuda_context(stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
    """A context that is used again: it holds the operators that DALI has set up."""
    context: AbstractContextManager[Any] = import_dali(_DYNAMIC_MODE).EvalContext(
        device_id=stream.device.index, cuda_stream=stream
    )
    return context
