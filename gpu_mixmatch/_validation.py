"""Every check of arguments and its text, once.

A message names the argument, what is wanted and what came.
"""

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from gpu_mixmatch.types import (
    SUM_TOLERANCE,
    AugmentParams,
    DrawPlan,
    Geometry,
    LamMode,
    MixMode,
    MixUpParams,
    PaddingMode,
    Scaling,
)

IMAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def came(value: object) -> str:
    """Say what came in place of what was wanted: a tensor by its shape, else value and type."""
    if isinstance(value, Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, Tensor) else "numpy array"
        return f"a {kind} {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], Tensor):
        return f"a {type(value).__name__} of one tensor; unpack it, as in (u,) = batch"
    text = repr(value)
    text = text if len(text) <= 80 else f"{text[:77]}..."
    return f"{text} of type {type(value).__name__}"


def as_integer(name: str, value: Any, *, least: int = 0, most: int | None = None) -> int:
    """Return a whole number as an ``int``: Python's, numpy's, or whatever ``operator.index`` takes.

    Raises:
        TypeError: If it is none; booleans, floats and tensors are not.
        ValueError: If it is not in ``least .. most``.
    """
    if type(value) is not int:
        try:
            if isinstance(value, bool | np.bool_ | Tensor):
                raise TypeError
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name} must be an integer, got {came(value)}") from None
    if value < least or (most is not None and value > most):
        wanted = f"at least {least}" if most is None else f"in {least} .. {most}"
        raise ValueError(f"{name} must be {wanted}, got {value}")
    return int(value)


def as_number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """Return a finite real number as a ``float``: Python's or numpy's.

    Raises:
        TypeError: If it is none; booleans, texts and tensors are not.
        ValueError: If it is not finite, or not within the limits that are given.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {came(value)}")
    try:
        number = float(value)
    except OverflowError:  # an integer of more than 308 digits
        number = math.inf
    fits = math.isfinite(number) and least <= number <= most
    fits = fits and (above is None or number > above) and (below is None or number < below)
    if not fits:
        limits = _interval(least, most, above, below)
        raise ValueError(f"{name} must be {limits or 'finite'}, got {value}")
    return number


def _interval(least: float, most: float, above: float | None, below: float | None) -> str:
    low = f"({above:g}" if above is not None else f"[{least:g}"
    high = f"{below:g})" if below is not None else f"{most:g}]"
    if (below is not None or math.isfinite(most)) and low != "[-inf":
        return f"in {low}, {high}"
    if above is not None:
        return f"above {above:g} and finite"
    if math.isfinite(least):
        return f"at least {least:g} and finite"
    return ""


def as_flag(name: str, value: Any) -> bool:
    """Return a switch as a ``bool``.

    Raises:
        TypeError: If it is neither True nor False.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {came(value)}")
    return bool(value)


def check_tensor(name: str, value: Any) -> None:
    """Raise a TypeError if ``value`` is no tensor; says how to make one where that is plain."""
    if not isinstance(value, Tensor):
        hint = "; torch.from_numpy makes one" if isinstance(value, np.ndarray) else ""
        raise TypeError(f"{name} must be a tensor, got {came(value)}{hint}")


def image_layout(name: str, images: Tensor) -> tuple[bool, tuple[int, int, int]]:
    """Tell whether ``images`` are NHWC, and their channels, height and width.

    Raises:
        ValueError: If they are not a batch of images of a supported dtype.
    """
    if images.dim() != 4:
        raise ValueError(f"{name} must be [M, C, H, W] or [M, H, W, C], got {list(images.shape)}")
    if images.dtype != torch.uint8 and images.dtype not in IMAGE_DTYPES:
        raise ValueError(
            f"{name} must be uint8 or one of {dtype_names(IMAGE_DTYPES)}, "
            f"got {dtype_name(images.dtype)}"
        )
    _, second, third, fourth = images.shape
    nhwc = second not in (1, 3, 4) and fourth in (1, 3, 4)
    return nhwc, ((fourth, second, third) if nhwc else (second, third, fourth))


def check_padding(padding: int, padding_mode: PaddingMode) -> None:
    """Raise a ValueError if ``padding`` is negative or ``padding_mode`` is unknown."""
    check_choice("padding_mode", padding_mode, PaddingMode)
    if padding < 0:
        raise ValueError(f"padding must be at least 0, got {padding}")


def check_plan(plan: DrawPlan) -> None:
    """Raise a ValueError if a word of the plan is unknown."""
    check_choice("lam", plan.lam, LamMode)
    check_choice("mix", plan.mix, MixMode)


def check_choice(name: str, choice: object, kind: Any) -> None:
    """Raise a ValueError if ``choice`` is none of the words of a Literal."""
    if choice not in get_args(kind):
        raise ValueError(f"{name} must be one of {list(get_args(kind))}, got {choice!r}")


def check_labels(y: Tensor, num_classes: int) -> None:
    """Raise if ``y`` are not labels. On a device their values cannot be looked at without waiting.

    There a label out of range gives a row of zeros, which `MixMatchBatch.check` finds.

    Args:
        y: Integer labels, ``[B]``, or soft labels, ``[B, L]``.
        num_classes: L.

    Raises:
        ValueError: If labels are out of range, of the wrong shape, or do not sum to one.
    """
    hard = y.dim() == 1 and not y.is_floating_point()
    if not hard and not (y.dim() == 2 and y.shape[1] == num_classes and y.is_floating_point()):
        raise ValueError(
            f"y must be integer labels [B] or soft labels [B, L] with L = {num_classes}, "
            f"got {list(y.shape)} {dtype_name(y.dtype)}"
        )
    if y.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if hard:
        check_classes(y, num_classes)
    else:
        check_distributions(y.float())


def check_classes(y: Tensor, num_classes: int) -> None:
    if len(y) == 0:
        return
    least, most = (int(value) for value in y.aminmax())
    if least < 0 or most >= num_classes:
        raise ValueError(
            f"y must be labels in 0 .. {num_classes - 1} (num_classes = {num_classes}), "
            f"got {least if least < 0 else most}"
        )


def check_distributions(targets: Tensor) -> None:
    sums = targets.sum(dim=1)
    fine = ((sums - 1).abs() <= SUM_TOLERANCE) & (targets >= 0).all(dim=1)
    if not fine.all():
        row = int((~fine).nonzero()[0])
        raise ValueError(
            "y must be soft labels that are not negative and sum to 1 in every row, got row "
            f"{row} with the sum {float(sums[row]):.4g} and the least entry "
            f"{float(targets[row].min()):.4g}"
        )


def check_mixup(params: MixUpParams, length: int, like_name: str) -> None:
    for name, tensor, dtype in zip(
        ("lam", "index"), params, (torch.float32, torch.int64), strict=True
    ):
        if tuple(tensor.shape) != (length,) or tensor.dtype != dtype:
            raise ValueError(
                f"params.{name} must be [N] {dtype_name(dtype)} with N = {length} like "
                f"{like_name}, got {list(tensor.shape)} {dtype_name(tensor.dtype)}"
            )


def check_batch_logits(logits: Tensor) -> tuple[int, int, int]:
    """Raise if ``logits`` are not ``[K, M, L]`` floats with K at least 1; return K, M and L."""
    if logits.dim() != 3 or len(logits) < 1:
        raise ValueError(f"logits must be [K, M, L] with K >= 1, got {list(logits.shape)}")
    check_float("logits", logits)
    num_views, num_images, num_classes = logits.shape
    return num_views, num_images, num_classes


def check_mixup_rows(
    inputs: Tensor, targets: Tensor, params: MixUpParams, out: Tensor | None
) -> None:
    """Raise if rows, targets, draws and the output of a MixUp do not fit each other."""
    length = len(inputs)
    check_float("inputs", inputs)
    if targets.dim() != 2 or len(targets) != length:
        raise ValueError(
            f"targets must be [N, L] with N = {length} like inputs, got {list(targets.shape)}"
        )
    if targets.dtype != torch.float32:
        raise ValueError(f"targets must be float32, got {dtype_name(targets.dtype)}")
    check_mixup(params, length, "inputs")
    check_device("targets", targets, "inputs", inputs)
    check_device("params.index", params.index, "inputs", inputs)
    check_dense("inputs", inputs)
    check_dense("targets", targets)
    if out is not None:
        check_like("out", out, "inputs", inputs)
        check_device("out", out, "inputs", inputs)


def check_loss(logits: Tensor, targets: Tensor, num_labelled: int) -> None:
    """Raise if logits, targets and the number of labelled rows do not fit each other."""
    check_float("logits", logits)
    if logits.dim() != 2 or logits.shape != targets.shape:
        raise ValueError(
            f"logits must be [N, L] = {list(targets.shape)} like targets, got {list(logits.shape)}"
        )
    if not 0 <= num_labelled <= len(logits):
        raise ValueError(f"num_labelled must be in 0 .. N = {len(logits)}, got {num_labelled}")
    check_device("targets", targets, "logits", logits)


def check_augment(
    sources: Sequence[Tensor],
    params: AugmentParams,
    geometry: Geometry,
    scaling: Scaling,
    dtype: torch.dtype,
    mixup: MixUpParams | None,
    out: Tensor | None,
) -> tuple[bool, tuple[int, int, int, int]]:
    """Raise if the arguments of an augmentation do not fit each other.

    Returns:
        Whether the sources are NHWC, and the shape of the views, R, C, H and W.
    """
    first = sources[0]
    nhwc, image_shape = image_layout("images", first)
    for image in sources[1:]:
        if image_layout("u", image) != (nhwc, image_shape) or image.dtype != first.dtype:
            raise ValueError(
                "x and u must have the same channels, height, width, layout and dtype, got "
                f"{list(first.shape)} {dtype_name(first.dtype)} and "
                f"{list(image.shape)} {dtype_name(image.dtype)}"
            )
        check_device("u", image, "x", first)
    channels, height, width = image_shape
    check_padding(geometry.padding, geometry.padding_mode)
    check_reflection(geometry.padding, geometry.padding_mode, height, width)
    if dtype not in IMAGE_DTYPES:
        raise ValueError(
            f"dtype must be one of {dtype_names(IMAGE_DTYPES)}, got {dtype_name(dtype)}"
        )
    check_device("params.top", params.top, "images", first)
    rows = params.top.shape[0]
    *once, last = (source.shape[0] for source in sources)
    if rows < sum(once) or (rows - sum(once)) % max(last, 1):
        raise ValueError(f"params must have a row per view of {[*once, last]} images, got {rows}")
    if last == 0 and rows > sum(once):
        raise ValueError(f"images must not be empty where params have rows, got {rows} rows")
    for name, factor in zip(("scale", "bias"), scaling, strict=True):
        if not isinstance(factor, Tensor):
            continue
        if tuple(factor.shape) != (channels,):
            raise ValueError(
                f"{name} must be [C] with C = {channels} like images, got {list(factor.shape)}"
            )
        check_device(name, factor, "images", first)
    shape = (rows, channels, height, width)
    if out is not None:
        if tuple(out.shape) != shape or out.dtype != dtype:
            raise ValueError(
                f"out must be {list(shape)} {dtype_name(dtype)}, "
                f"got {list(out.shape)} {dtype_name(out.dtype)}"
            )
        check_dense("out", out)
    if mixup is not None:
        check_mixup(mixup, rows, "params")
        check_device("mixup.index", mixup.index, "images", first)
    return nhwc, shape


def check_draws(params: AugmentParams, padding: int) -> None:
    """Raise if draws lead out of an image. On a device they cannot be looked at without waiting."""
    top, left, _, zoom, _ = params
    if top.device.type != "cpu" or torch.compiler.is_compiling() or len(top) == 0:
        return
    offsets = torch.stack([top, left])
    least, most = (int(value) for value in offsets.aminmax())
    least_cut = int(zoom.min())
    if least < 0 or most > 2 * padding or least_cut < 0:
        raise draws_error(2 * padding, least, most, least_cut)


def draws_error(limit: int, least: int, most: int, least_cut: int) -> ValueError:
    """Say that offsets or cuts lead out of an image."""
    return ValueError(
        f"params.top and params.left must be in 0 .. 2·padding = {limit} and params.zoom at "
        f"least 0, got offsets in {least} .. {most} and a cut of {least_cut}"
    )


def check_reflection(padding: int, padding_mode: PaddingMode, height: int, width: int) -> None:
    """Raise a ValueError if an image is too small to be reflected into its padding."""
    if padding_mode == "reflect" and padding >= min(height, width):
        raise ValueError(
            f"padding must be smaller than the image to reflect it, got padding = {padding} for "
            f"images of {height} x {width} pixels"
        )


def check_groups(num_groups: int, length: int) -> None:
    if not 1 <= num_groups <= max(length, 1):
        raise ValueError(f"num_groups must be in 1 .. N = {length}, got {num_groups}")


def check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")


def check_float(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {dtype_name(tensor.dtype)}")


def check_device(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{name} must be on {like.device} like {like_name}, got it on {tensor.device}"
        )


def check_dense(name: str, tensor: Tensor) -> None:
    dense = tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    if not dense:
        raise ValueError(
            f"{name} must be contiguous or channels_last, got strides {list(tensor.stride())} for "
            f"{list(tensor.shape)}"
        )


def check_like(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    same_layout = all(
        mine == theirs
        for mine, theirs, size in zip(tensor.stride(), like.stride(), like.shape, strict=False)
        if size > 1
    )
    if tensor.shape != like.shape or tensor.dtype != like.dtype or not same_layout:
        raise ValueError(
            f"{name} must be {list(like.shape)} {dtype_name(like.dtype)} with strides "
            f"{list(like.stride())} like {like_name}, got {list(tensor.shape)} "
            f"{dtype_name(tensor.dtype)} with strides {list(tensor.stride())}"
        )


def check_no_grad(**tensors: Tensor) -> None:
    """Raise a ValueError if a gradient is asked for of what has none."""
    for name, tensor in tensors.items():
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} must not require a gradient, since none flows through this operation: "
                "detach it, or call this under torch.no_grad()"
            )


def check_out(out: Tensor, **read: object) -> None:
    """Raise if writing to ``out`` would change what is read while it is read, or break a gradient.

    Memory is compared as stretches from the first value to the last, so that disjoint parts of one
    buffer are fine. Costs a few microseconds, waits for nothing.

    Args:
        out: Dense, so that it does not overlap itself.
        read: What is read, by the names of the arguments; other things than tensors are passed
            over.

    Raises:
        ValueError: If ``out`` requires a gradient, or shares memory with a tensor that is read.
    """
    if out.requires_grad:
        raise ValueError("out must not require a gradient, since what it holds is overwritten")
    if torch.compiler.is_compiling() or out.device.type == "meta":  # no addresses
        return
    start, stop = _stretch(out)
    for name, tensor in read.items():
        if not isinstance(tensor, Tensor):
            continue
        first, last = _stretch(tensor)
        if first < stop and start < last:
            raise ValueError(
                f"out must share no memory with {name}, which is read while out is written; got "
                f"both in {min(stop, last) - max(start, first)} bytes"
            )


def _stretch(tensor: Tensor) -> tuple[int, int]:
    """The address of the first value and that behind the last; the same for no values."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    away = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return start, start + (away + 1) * tensor.element_size()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(map(dtype_name, dtypes))


def check_seed(seed: int) -> None:
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an integer in [0, 2**63), got {seed!r}")


def check_not_empty(x: Tensor, u: Tensor) -> None:
    for name, images in (("x", x), ("u", u)):
        if len(images) == 0:
            raise ValueError(f"{name} must hold at least one image, got {list(images.shape)}")


def check_images_alike(x: Tensor, u: Tensor) -> None:
    """Raise a ValueError if x or u is empty, or their images are not of one shape and dtype."""
    check_not_empty(x, u)
    if x.shape[1:] != u.shape[1:] or x.dtype != u.dtype:
        raise ValueError(
            "x and u must have the same channels, height, width and dtype, got "
            f"{list(x.shape)} {x.dtype} and {list(u.shape)} {u.dtype}"
        )


def check_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_range(name: str, limits: tuple[float, float], *, integer: bool) -> None:
    kind = "integers" if integer else "numbers"
    fits = len(limits) == 2 and 0 <= limits[0] <= limits[1] and math.isfinite(limits[1])
    if not fits or (integer and not all(isinstance(limit, int) for limit in limits)):
        raise ValueError(f"{name} must be two {kind}, 0 <= least <= most, got {limits}")
