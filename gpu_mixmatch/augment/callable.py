"""CallableAugment: how a plain callable becomes an engine."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch.augment.base import DrawsForeign, float_images, seeded_generators


class CallableAugment(DrawsForeign):
    """Any function or module that maps float images to float images of any one size.

    It gets NCHW float32 images in [0, 1], x once and u once per view, and normalises them itself
    if it should. Whatever it draws from torch's global generators becomes a function of
    (seed, step) and of the first ids, by which ranks differ; the generators are left as they were.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

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
        sources = [float_images(images).clone() for images in (x, *[u] * num_augmentations)]
        with seeded_generators(draws):
            views = [self.function(source) for source in sources]
        for source, view in zip(sources, views, strict=True):
            if not isinstance(view, Tensor) or not view.is_floating_point():
                raise TypeError(
                    f"augment must return a floating point tensor, got {_described(view)}"
                )
            if view.dim() != 4 or len(view) != len(source):
                raise ValueError(
                    f"augment must return [{len(source)}, C, H, W] for images "
                    f"{list(source.shape)}, got {list(view.shape)}"
                )
        return torch.cat(views)

    def __repr__(self) -> str:
        return f"CallableAugment({self.function!r})"


def as_augment(augment: Any) -> Any:
    """Return ``augment`` if it is an engine, or a plain callable as one.

    An engine has the methods ``draw_batch`` and ``build`` of `Augment`.

    Raises:
        TypeError: If it is neither; a name is only for the command line.
    """
    if not isinstance(augment, type):
        if all(callable(getattr(augment, name, None)) for name in ("draw_batch", "build")):
            return augment
        if callable(augment):
            return CallableAugment(augment)
    raise TypeError(
        "augment must be an engine such as WeakAugment.cifar10(), or a callable that maps float "
        f"images to float images, got {_described(augment)}"
    )


def _described(value: Any) -> str:
    return (
        f"{value!r} of type {type(value).__name__}"
        if not isinstance(value, Tensor)
        else (f"a tensor {list(value.shape)} {value.dtype}")
    )
