"""CallableAugment: how a plain callable becomes an engine."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch._generators import seeded_generators
from gpu_mixmatch.augment.base import DrawsForeign, float_images


class CallableAugment(DrawsForeign):
    """Any function or module that maps float images to float images of any one size.

    It gets NCHW float32 images in [0, 1], x once and u once per view, and normalises them itself
    if it should. Whatever it draws from the global generators of torch, numpy or ``random`` becomes
    a function of (seed, step) and of the first ids, by which ranks differ; they are left as they
    were. It may write into the images that it gets, and return the same memory every time.
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
                images = float_images(source).clone()  # for a function that writes in place
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


def _check_view(view: Any, wanted: torch.Size, views: Tensor | None) -> None:
    """Raise if ``view`` is not made of images ``wanted``, or is unlike the views before it."""
    if not isinstance(view, Tensor) or not view.is_floating_point():
        raise TypeError(f"augment must return a floating point tensor, got {_described(view)}")
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


def _described(value: Any) -> str:
    return (
        f"{value!r} of type {type(value).__name__}"
        if not isinstance(value, Tensor)
        else (f"a tensor {list(value.shape)} {value.dtype}")
    )
