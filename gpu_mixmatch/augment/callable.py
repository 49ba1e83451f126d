"""CallableAugment: how a plain callable becomes an engine."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch._generators import seeded_generators
from gpu_mixmatch._validation import came, check_callable, check_layout
from gpu_mixmatch.augment.base import DrawsForeign, float_images
from gpu_mixmatch.types import Layout


class CallableAugment(DrawsForeign):
    """Any function or module that maps float images to float images of any one size.

    It gets NCHW float32 images in [0, 1], x once and u once per view, and normalises them itself
    if it should. Whatever it draws from the global generators of torch, numpy or ``random`` becomes
    a function of (seed, step) and of the first ids, by which ranks differ; they are left as they
    were. It may write into the images that it gets, and return the same memory every time.

    Args:
        function: Maps ``[n, C, H, W]`` floats in [0, 1] to floats ``[n, C', H', W']``.
        layout: Of the images that it is to get as NCHW, "NCHW" or "NHWC"; None tells it by their
            shape, which must then leave no doubt: see `WeakAugment`.

    Raises:
        TypeError: If ``function`` cannot be called.
        ValueError: If ``layout`` is unknown.
    """

    # of the class: a property of `Augment` would hide what an instance has
    layout: Layout | None = None

    def __init__(self, function: Callable[[Tensor], Tensor], layout: Layout | None = None) -> None:
        check_callable("function", function, "a function or module from images to images")
        check_layout(layout)
        self.function = function
        self.layout = layout

    def build(
        self,
        x: Tensor,
        u: Tensor,
        draws: int,
        num_augmentations: int,
        workspace: Workspace | None = None,
    ) -> Tensor:
        """Call the function on x, then K times on u, under generators of that seed.

        Raises:
            TypeError: If it does not return a floating point tensor.
            ValueError: If it does not return an image for each that it got, of one size and dtype.
        """
        sources = (x, *[u] * num_augmentations)
        ends = list(accumulate(map(len, sources)))
        with seeded_generators(draws):
            views: Tensor | None = None
            for source, end in zip(sources, ends, strict=True):
                # a copy, for a function that writes in place
                images = float_images(source, self.layout).clone()
                view = self.function(images)
                _check_view(view, images.shape, views)
                if views is None:
                    views = _empty_rows(ends[-1], view)
                # now, for a function that returns the same memory every time
                views[end - len(source) : end].copy_(view)
        assert views is not None
        return views

    def __repr__(self) -> str:
        return f"CallableAugment({self.function!r})"


def as_augment(augment: Any, layout: Layout | None = None, name: str = "augment") -> Any:
    """Return ``augment`` if it is an engine, or a plain callable as one.

    An engine has the methods ``draw_batch`` and ``build`` of `Augment`.

    Args:
        augment: An engine or a callable.
        layout: Of the images that a callable is to get as NCHW; see `CallableAugment`.
        name: What an error calls it.

    Raises:
        TypeError: If it is neither; a name is only for the command line.
        ValueError: If ``layout`` is unknown, or given for an engine, which has its own.
    """
    check_layout(layout)
    if not isinstance(augment, type):
        if all(callable(getattr(augment, name, None)) for name in ("draw_batch", "build")):
            if layout is not None:
                raise ValueError(
                    f"layout must be None for an engine, which has one, got {layout!r}"
                )
            return augment
        if callable(augment):
            return CallableAugment(augment, layout)
    raise TypeError(
        f"{name} must be an engine such as WeakAugment.cifar10(), or a callable that maps float "
        f"images to float images, got {came(augment)}"
    )


def _check_view(view: Any, wanted: torch.Size, views: Tensor | None) -> None:
    """Raise if ``view`` is not made of images ``wanted``, or is unlike the views before it."""
    if not isinstance(view, Tensor) or not view.is_floating_point():
        raise TypeError(f"augment must return a floating point tensor, got {came(view)}")
    if view.dim() != 4 or len(view) != wanted[0]:
        raise ValueError(
            f"augment must return [{wanted[0]}, C, H, W] for images {list(wanted)}, "
            f"got {list(view.shape)}"
        )
    if views is not None and (view.shape[1:], view.dtype) != (views.shape[1:], views.dtype):
        raise ValueError(
            f"augment must return images of one size and dtype, {list(views.shape[1:])} "
            f"{views.dtype} as for x, got {list(view.shape[1:])} {view.dtype}"
        )


def _empty_rows(num_rows: int, like: Tensor) -> Tensor:
    last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    return torch.empty(
        (num_rows, *like.shape[1:]),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
