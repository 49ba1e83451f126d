"""CallableAugment: how a plain callable becomes an engine."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch._validation import came, check_callable, check_layout
from gpu_mixmatch.augment.base import DrawsForeign, float_images, seeded_generators
from gpu_mixmatch.types import Layout


class CallableAugment(DrawsForeign):
    """Any function or module that maps float images to float images of any one size.

    It gets NCHW float32 images in [0, 1], x once and u once per view, and normalises them itself
    if it should. Whatever it draws from torch's global generators becomes a function of
    (seed, step) and of the first ids, by which ranks differ; the generators are left as they were.

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
        """Call the function on x, then K times on u, under a generator of that seed."""
        # copies, for a function that writes in place
        sources = [
            float_images(images, self.layout).clone() for images in (x, *[u] * num_augmentations)
        ]
        with seeded_generators(draws):
            views = [self.function(source) for source in sources]
        for source, view in zip(sources, views, strict=True):
            if not isinstance(view, Tensor) or not view.is_floating_point():
                raise TypeError(f"augment must return a floating point tensor, got {came(view)}")
            if view.dim() != 4 or len(view) != len(source):
                raise ValueError(
                    f"augment must return [{len(source)}, C, H, W] for images "
                    f"{list(source.shape)}, got {list(view.shape)}"
                )
        return torch.cat(views)

    def __repr__(self) -> str:
        return f"CallableAugment({self.function!r})"


def as_augment(augment: Any, layout: Layout | None = None) -> Any:
    """Return ``augment`` if it is an engine, or a plain callable as one.

    An engine has the methods ``draw_batch`` and ``build`` of `Augment`.

    Args:
        augment: An engine or a callable.
        layout: Of the images that a callable is to get as NCHW; see `CallableAugment`.

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
        "augment must be an engine such as WeakAugment.cifar10(), or a callable that maps float "
        f"images to float images, got {came(augment)}"
    )
