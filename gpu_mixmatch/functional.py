"""The public operations: each validates its arguments, chooses an implementation and calls it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor

from gpu_mixmatch.impl import eager
from gpu_mixmatch.types import (
    SUM_TOLERANCE,
    AugmentParams,
    Impl,
    LossOutput,
    MixUpParams,
    PaddingMode,
    Workspace,
)

IMAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def implementation(impl: Impl, device: torch.device) -> ModuleType:
    """Return the module whose functions run for ``impl`` on ``device``.

    Raises:
        ValueError: If ``impl`` is unknown.
        RuntimeError: If an implementation is asked for that this version does not have.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {list(get_args(Impl))}, got {impl!r}")
    if impl == "triton":
        raise RuntimeError(
            f'impl="triton" on {device} cannot be met: this version of gpu_mixmatch has no Triton '
            'kernels yet. Use impl="auto" or impl="eager", which also run on CUDA'
        )
    return eager


def sharpen(probs: Tensor, temperature: float, *, impl: Impl = "auto") -> Tensor:
    """Lower the entropy of distributions: p^(1/T), normalised.

    Works in log space in float32, so that nothing underflows at low temperatures.

    Args:
        probs: Distributions over the last axis, ``[..., L]``, floating point.
        temperature: T > 0; 1 leaves ``probs`` as they are, T → 0 gives one-hot rows.

    Returns:
        Sharpened distributions, shape and dtype of ``probs``.

    Raises:
        ValueError: If ``temperature`` is not positive or ``probs`` are not floating point.

    References:
        Berthelot et al. 2019, eq. 7.
    """
    _check_temperature(temperature)
    _check_float("probs", probs)
    result: Tensor = implementation(impl, probs.device).sharpen(probs, temperature)
    return result


def guess_labels(logits: Tensor, temperature: float, *, impl: Impl = "auto") -> Tensor:
    """Guess the labels of images from the model's logits on their K views.

    The mean is taken over **probabilities**, then sharpened. No gradient flows through the guess.

    Args:
        logits: One row per view and image, ``[K, M, L]``, floating point.
        temperature: T > 0.

    Returns:
        Guessed distributions, ``[M, L]`` float32.

    Raises:
        ValueError: If ``logits`` are not ``[K, M, L]`` with K ≥ 1, or ``temperature`` ≤ 0.

    References:
        Berthelot et al. 2019, eq. 6-7.
    """
    _check_temperature(temperature)
    if logits.dim() != 3 or len(logits) < 1:
        raise ValueError(f"logits must be [K, M, L] with K >= 1, got {list(logits.shape)}")
    _check_float("logits", logits)
    result: Tensor = implementation(impl, logits.device).guess_labels(logits.detach(), temperature)
    return result


def mixup(
    inputs: Tensor,
    targets: Tensor,
    params: MixUpParams,
    *,
    out: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Blend each row with its partner: λ'·row + (1 - λ')·row[index], images and targets alike.

    Args:
        inputs: Images of any layout, ``[N, ...]``, contiguous or channels_last, floating point.
        targets: Distributions, ``[N, L]`` float32.
        params: λ' ``[N]`` and partners ``[N]``, as `sampling.draw_mixup` gives them.
        out: Where to write the mixed images, like ``inputs`` and apart from it; None allocates.

    Returns:
        Mixed inputs and mixed targets, shapes, dtypes and layout of the arguments.

    Raises:
        ValueError: If the lengths, dtypes, devices or layouts of the arguments do not fit.

    References:
        Berthelot et al. 2019, eq. 8-11.
    """
    length = len(inputs)
    _check_float("inputs", inputs)
    if targets.dim() != 2 or len(targets) != length:
        raise ValueError(
            f"targets must be [N, L] with N = {length} like inputs, got {list(targets.shape)}"
        )
    if targets.dtype != torch.float32:
        raise ValueError(f"targets must be float32, got {_name(targets.dtype)}")
    for name, tensor, dtype in zip(
        ("lam", "index"), params, (torch.float32, torch.int64), strict=True
    ):
        if tuple(tensor.shape) != (length,) or tensor.dtype != dtype:
            raise ValueError(
                f"params.{name} must be [N] {_name(dtype)} with N = {length} like inputs, "
                f"got {list(tensor.shape)} {_name(tensor.dtype)}"
            )
    _check_device("targets", targets, "inputs", inputs)
    _check_device("params.index", params.index, "inputs", inputs)
    _check_dense("inputs", inputs)
    if out is not None:
        _check_like("out", out, "inputs", inputs)
    backend = implementation(impl, inputs.device)
    mixed: tuple[Tensor, Tensor] = backend.mixup(inputs, targets, params, out)
    return mixed


def interleave(rows: Tensor, num_groups: int, *, impl: Impl = "auto") -> Tensor:
    """Swap slices between groups of rows, so that the first group holds a share of every one.

    Rows are split into ``num_groups`` consecutive groups, as `torch.tensor_split` does. Slice i of
    group 0 changes places with slice i of group i. The operation is its own inverse.

    Args:
        rows: ``[N, ...]``, any dtype.
        num_groups: Number of groups, 1 .. N.

    Returns:
        The rows in the new order, shape of ``rows``.

    Raises:
        ValueError: If ``num_groups`` is not in 1 .. N.

    References:
        google-research/mixmatch, ``libml/layers.py::interleave``, which this equals for N = (K+1)·B
        and ``num_groups`` = K + 1.
    """
    if not 1 <= num_groups <= max(len(rows), 1):
        raise ValueError(f"num_groups must be in 1 .. N = {len(rows)}, got {num_groups}")
    result: Tensor = implementation(impl, rows.device).interleave(rows, num_groups)
    return result


def linear_rampup(step: Tensor | int, rampup_steps: int) -> Tensor:
    """Ramp from 0 to 1 over ``rampup_steps`` steps, then stay at 1.

    Args:
        step: The step, from 0, a 0-d tensor or an integer.
        rampup_steps: Length of the ramp in steps; 0 gives 1 from the start.

    Returns:
        The factor in [0, 1], 0-d float32, on the device of ``step``.

    Raises:
        ValueError: If ``rampup_steps`` is negative.
    """
    if rampup_steps < 0:
        raise ValueError(f"rampup_steps must be at least 0, got {rampup_steps}")
    return eager.linear_rampup(torch.as_tensor(step), rampup_steps)


def mixmatch_loss(
    logits: Tensor,
    targets: Tensor,
    num_labelled: int,
    weight_u: Tensor | float,
    *,
    impl: Impl = "auto",
) -> LossOutput:
    """Sum the cross-entropy on X' and the weighted squared error of probabilities on U'.

    L_U is the mean over **all** elements, images and classes, and compares softmax outputs, not
    logits. Gradients flow to ``logits`` only. The arithmetic is float32 whatever comes in.

    Args:
        logits: The model's outputs in batch order, ``[N, L]``, floating point.
        targets: Mixed targets, ``[N, L]``.
        num_labelled: B, the number of rows of X'.
        weight_u: λ_U, after its ramp.

    Returns:
        The loss and its parts, 0-d float32. A part without rows is 0.

    Raises:
        ValueError: If the shapes differ or ``num_labelled`` is out of range.

    References:
        Berthelot et al. 2019, eq. 2-5.
    """
    _check_float("logits", logits)
    if logits.dim() != 2 or logits.shape != targets.shape:
        raise ValueError(
            f"logits must be [N, L] = {list(targets.shape)} like targets, got {list(logits.shape)}"
        )
    if not 0 <= num_labelled <= len(logits):
        raise ValueError(f"num_labelled must be in 0 .. N = {len(logits)}, got {num_labelled}")
    _check_device("targets", targets, "logits", logits)
    weight = torch.as_tensor(weight_u, dtype=torch.float32).detach()
    backend = implementation(impl, logits.device)
    loss: LossOutput = backend.mixmatch_loss(logits, targets.detach(), num_labelled, weight)
    return loss


def augment(
    images: Tensor | tuple[Tensor, Tensor],
    params: AugmentParams,
    *,
    scale: Tensor | float,
    bias: Tensor | float,
    padding: int = 0,
    padding_mode: PaddingMode = "reflect",
    zoom: bool = False,
    blur_radius: int = 0,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    out: Tensor | None = None,
    workspace: Workspace | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Apply drawn parameters: shift-crop, zoom-crop, flip, blur, then value·scale + bias.

    Args:
        images: ``[M, C, H, W]`` or ``[M, H, W, C]``, uint8 or floating point; an NHWC tensor is
            known by its last axis of 1, 3 or 4 channels when the second is none of them. A pair
            (x, u) draws x once and u as often as rows remain.
        params: Draws of R rows, view-major, as `sampling.draw_augment` gives them.
        scale: Factor, a number or one per channel, ``[C]`` float32.
        bias: Addend, likewise.
        padding: Pixels that images are padded by before the crop.
        padding_mode: "reflect" (without the edge), "zeros" (black) or "edge".
        zoom: Whether to cut ``params.crop`` and resize back, bilinear.
        blur_radius: Radius of the sampled Gaussian in pixels; 0 is no blur.
        dtype: Of the result: float32, float16 or bfloat16. The arithmetic is float32.
        channels_last: Memory format of the result.
        out: Where to write; None allocates.
        workspace: Scratch memory that outlives the call; None allocates.

    Returns:
        The views, ``[R, C, H, W]``, in one buffer.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, or an image is too small for its
            reflection.
    """
    sources = images if isinstance(images, tuple) else (images,)
    layouts = [
        image_layout(name, image) for name, image in zip(("images", "u"), sources, strict=False)
    ]
    first, *others = layouts
    for image, other in zip(sources[1:], others, strict=True):
        if other != first or image.dtype != sources[0].dtype:
            raise ValueError(
                "x and u must have the same channels, height, width, layout and dtype, got "
                f"{list(sources[0].shape)} {_name(sources[0].dtype)} and "
                f"{list(image.shape)} {_name(image.dtype)}"
            )
        _check_device("u", image, "x", sources[0])
    nhwc, (channels, height, width) = first
    check_padding(padding, padding_mode)
    if padding_mode == "reflect" and padding >= min(height, width):
        raise ValueError(
            f"padding must be smaller than the image to reflect it, got padding = {padding} for "
            f"images of {height} x {width} pixels"
        )
    if dtype not in IMAGE_DTYPES:
        raise ValueError(f"dtype must be one of {_names(IMAGE_DTYPES)}, got {_name(dtype)}")
    _check_device("params.top", params.top, "images", sources[0])
    rows = params.top.shape[0]
    *once, last = (source.shape[0] for source in sources)
    if rows < sum(once) or (rows - sum(once)) % max(last, 1):
        raise ValueError(f"params must have a row per view of {[*once, last]} images, got {rows}")
    if last == 0 and rows > sum(once):
        raise ValueError(f"images must not be empty where params have rows, got {rows} rows")
    for name, factor in (("scale", scale), ("bias", bias)):
        if not isinstance(factor, Tensor):
            continue
        if tuple(factor.shape) != (channels,):
            raise ValueError(
                f"{name} must be [C] with C = {channels} like images, got {list(factor.shape)}"
            )
        _check_device(name, factor, "images", sources[0])
    shape = (rows, channels, height, width)
    if out is None:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        out = torch.empty(shape, dtype=dtype, device=sources[0].device, memory_format=layout)
    elif tuple(out.shape) != shape or out.dtype != dtype:
        raise ValueError(
            f"out must be {list(shape)} {_name(dtype)}, got {list(out.shape)} {_name(out.dtype)}"
        )
    _check_dense("out", out)
    backend = implementation(impl, out.device)
    with _without_autocast(out.device):
        result: Tensor = backend.augment(
            sources,
            params,
            scale,
            bias,
            padding=padding,
            padding_mode=padding_mode,
            zoom=zoom,
            blur_radius=blur_radius,
            channels_last_in=nhwc,
            out=out,
            workspace=workspace,
        )
    return result


def image_layout(name: str, images: Tensor) -> tuple[bool, tuple[int, int, int]]:
    """Tell whether ``images`` are NHWC, and their channels, height and width.

    Raises:
        ValueError: If they are not a batch of images of a supported dtype.
    """
    if images.dim() != 4:
        raise ValueError(f"{name} must be [M, C, H, W] or [M, H, W, C], got {list(images.shape)}")
    if images.dtype != torch.uint8 and images.dtype not in IMAGE_DTYPES:
        raise ValueError(
            f"{name} must be uint8 or one of {_names(IMAGE_DTYPES)}, got {_name(images.dtype)}"
        )
    _, second, third, fourth = images.shape
    nhwc = second not in (1, 3, 4) and fourth in (1, 3, 4)
    return nhwc, ((fourth, second, third) if nhwc else (second, third, fourth))


def check_padding(padding: int, padding_mode: PaddingMode) -> None:
    """Raise a ValueError if ``padding`` is negative or ``padding_mode`` is unknown."""
    if padding_mode not in get_args(PaddingMode):
        raise ValueError(
            f"padding_mode must be one of {list(get_args(PaddingMode))}, got {padding_mode!r}"
        )
    if padding < 0:
        raise ValueError(f"padding must be at least 0, got {padding}")


def one_hot_targets(y: Tensor, num_classes: int, label_smoothing: float = 0.0) -> Tensor:
    """Turn labels into distributions, smoothed towards the uniform one.

    Labels on the CPU are checked here; on a device that would wait for it, so a label out of range
    gives a row of zeros there, which `MixMatchBatch.check` finds.

    Args:
        y: Integer labels, ``[B]``, or soft labels, ``[B, L]``.
        num_classes: L.
        label_smoothing: Share of the uniform distribution, in [0, 1).

    Returns:
        Distributions, ``[B, L]`` float32.

    Raises:
        ValueError: If labels are out of range, of the wrong shape, or do not sum to one.
    """
    if y.dim() == 1 and not y.is_floating_point():
        if y.device.type == "cpu":
            _check_labels(y, num_classes)
        targets = (y[:, None] == torch.arange(num_classes, device=y.device)).float()
    elif y.dim() == 2 and y.shape[1] == num_classes and y.is_floating_point():
        targets = y.float()
        if y.device.type == "cpu":
            _check_distributions(targets)
    else:
        raise ValueError(
            f"y must be integer labels [B] or soft labels [B, L] with L = {num_classes}, "
            f"got {list(y.shape)} {_name(y.dtype)}"
        )
    if label_smoothing:
        targets = targets.lerp(torch.full_like(targets, 1 / num_classes), label_smoothing)
    return targets


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products stay in float32 where the caller's autocast would make them half precision."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _check_labels(y: Tensor, num_classes: int) -> None:
    wrong = (y < 0) | (y >= num_classes)
    if wrong.any():
        raise ValueError(
            f"y must be labels in 0 .. {num_classes - 1} (num_classes = {num_classes}), "
            f"got {int(y[wrong][0])}"
        )


def _check_distributions(targets: Tensor) -> None:
    sums = targets.sum(dim=1)
    fine = ((sums - 1).abs() <= SUM_TOLERANCE) & (targets >= 0).all(dim=1)
    if not fine.all():
        row = int((~fine).nonzero()[0])
        raise ValueError(
            "y must be soft labels that are not negative and sum to 1 in every row, got row "
            f"{row} with the sum {float(sums[row]):.4g} and the least entry "
            f"{float(targets[row].min()):.4g}"
        )


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")


def _check_float(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {_name(tensor.dtype)}")


def _check_device(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{name} must be on {like.device} like {like_name}, got it on {tensor.device}"
        )


def _check_dense(name: str, tensor: Tensor) -> None:
    dense = tensor.is_contiguous() or (
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    if not dense:
        raise ValueError(
            f"{name} must be contiguous or channels_last, got strides {list(tensor.stride())} for "
            f"{list(tensor.shape)}"
        )


def _check_like(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    same_layout = all(
        mine == theirs
        for mine, theirs, size in zip(tensor.stride(), like.stride(), like.shape, strict=False)
        if size > 1
    )
    if tensor.shape != like.shape or tensor.dtype != like.dtype or not same_layout:
        raise ValueError(
            f"{name} must be {list(like.shape)} {_name(like.dtype)} with strides "
            f"{list(like.stride())} like {like_name}, got {list(tensor.shape)} "
            f"{_name(tensor.dtype)} with strides {list(tensor.stride())}"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(map(_name, dtypes))
