"""The public operations: each validates its arguments, chooses an implementation and calls it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_args

import torch
from torch import Tensor

from gpu_mixmatch import sampling
from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch._validation import (
    IMAGE_DTYPES,
    check_dense,
    check_device,
    check_float,
    check_groups,
    check_labels,
    check_like,
    check_mixup,
    check_padding,
    check_temperature,
    dtype_name,
    dtype_names,
    image_layout,
)
from gpu_mixmatch.impl import asks_for_triton, eager, implementation
from gpu_mixmatch.impl import library as ops
from gpu_mixmatch.types import (
    AugmentParams,
    AugmentPolicy,
    Impl,
    LamMode,
    LossOutput,
    MixMode,
    MixUpParams,
    PaddingMode,
)


def draw_batch(
    seed: int,
    step: Tensor,
    ids_x: Tensor | int,
    ids_u: Tensor | int,
    *,
    num_augmentations: int = 2,
    policy: AugmentPolicy | None = None,
    alpha: float = 0.75,
    lam: LamMode = "sample",
    mix: MixMode = "all",
    device: torch.device,
    key: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[AugmentParams | None, MixUpParams]:
    """Draw all that a batch needs, on ``device``; see `sampling.draw_batch`.

    Args:
        seed: The key, 0 ≤ seed < 2^63.
        step: The training step, 0 ≤ step < 2^32, a 0-d tensor on the CPU.
        ids_x: Labelled sample ids, ``[B]`` int64; an integer B stands for 0 .. B - 1.
        ids_u: Unlabelled sample ids, ``[M]`` int64; an integer M stands for 0 .. M - 1.
        num_augmentations: K.
        policy: What an augmentation is drawn from; None draws none.
        alpha: The Beta parameter α, in [0.05, 1000].
        lam: "sample" or "batch".
        mix: Which rows meet.
        device: Where the draws are wanted.
        key: Seed and step as a tensor on ``device``, ``[2]`` int64, instead of ``seed`` and
            ``step``: for CUDA graphs, whose replays read them anew. Kernels only.

    Returns:
        Parameters of N = B + K·M rows, on ``device``; None where there is no policy.

    Raises:
        ValueError: If an argument is out of its range.
    """
    for name, choice, kind in (("lam", lam, LamMode), ("mix", mix, MixMode)):
        if choice not in get_args(kind):
            raise ValueError(f"{name} must be one of {list(get_args(kind))}, got {choice!r}")
    num_x, num_u = (ids if isinstance(ids, int) else len(ids) for ids in (ids_x, ids_u))
    switches: dict[str, Any] = {"alpha": alpha, "lam": lam, "mix": mix}
    if torch.compiler.is_compiling():
        ids = (None if isinstance(ids, int) else ids for ids in (ids_x, ids_u))
        packed = ops.draw_batch(
            seed,
            step,
            *ids,
            num_x,
            num_u,
            num_augmentations,
            ops.flat_policy(policy),
            *switches.values(),
            device,
            impl,
        )
    else:
        backend = implementation(impl, device)
        switches |= {"num_augmentations": num_augmentations, "policy": policy}
        if device.type == "cpu" and not asks_for_triton(impl, device):
            return sampling.draw_batch(seed, int(step), ids_x, ids_u, **switches)
        if key is None:
            sampling.check_key(seed, int(step))
        packed = backend.draw_batch(
            (seed, int(step)) if key is None else key, ids_x, ids_u, **switches, device=device
        )
    num_rows = num_x + num_augmentations * num_u
    return sampling.unpack(packed, num_rows, with_augment=policy is not None)


def sharpen(probs: Tensor, temperature: float) -> Tensor:
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
    check_temperature(temperature)
    check_float("probs", probs)
    return eager.sharpen(probs, temperature)


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
    check_temperature(temperature)
    if logits.dim() != 3 or len(logits) < 1:
        raise ValueError(f"logits must be [K, M, L] with K >= 1, got {list(logits.shape)}")
    check_float("logits", logits)
    if torch.compiler.is_compiling():
        compiled: Tensor = ops.guess_labels(logits.detach(), temperature, impl)
        return compiled
    backend = implementation(impl, logits.device)
    guess: Tensor = backend.guess_labels(logits.detach(), temperature)
    return guess


def batch_targets(
    y: Tensor,
    logits: Tensor,
    temperature: float,
    *,
    label_smoothing: float = 0.0,
    mixup: MixUpParams | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Write the targets of a whole batch: labels of x, then the guesses of u, once per view.

    Args:
        y: Labels, ``[B]`` integers or ``[B, L]`` distributions, as `check_labels` wants them.
        logits: Of the K views of M unlabelled images, ``[K, M, L]``, floating point.
        temperature: T > 0.
        label_smoothing: Share of the uniform distribution in the labelled rows, in [0, 1).
        mixup: λ' and partners of the N rows, to blend the targets by; None leaves them unmixed.

    Returns:
        Targets, ``[B + K·M, L]`` float32.

    Raises:
        ValueError: As for `guess_labels`, and if labels or logits do not fit each other.
    """
    check_temperature(temperature)
    if logits.dim() != 3 or len(logits) < 1:
        raise ValueError(f"logits must be [K, M, L] with K >= 1, got {list(logits.shape)}")
    check_float("logits", logits)
    num_views, num_images, num_classes = logits.shape
    check_labels(y, num_classes)
    check_device("y", y, "logits", logits)
    shape = (len(y) + num_views * num_images, num_classes)
    if mixup is not None:
        check_mixup(mixup, shape[0], "y and logits")
        check_device("mixup.index", mixup.index, "logits", logits)
    out = torch.empty(shape, dtype=torch.float32, device=logits.device)
    if torch.compiler.is_compiling():
        ops.batch_targets(
            y, logits.detach(), temperature, label_smoothing, list(mixup or ()), out, impl
        )
        return out
    backend = implementation(impl, logits.device)
    backend.batch_targets(y, logits.detach(), temperature, label_smoothing, mixup, out)
    return out


def mixup(
    inputs: Tensor,
    targets: Tensor,
    params: MixUpParams,
    *,
    num_groups: int = 1,
    out: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Blend each row with its partner: λ'·row + (1 - λ')·row[index], images and targets alike.

    Args:
        inputs: Images of any layout, ``[N, ...]``, contiguous or channels_last, floating point.
        targets: Distributions, ``[N, L]`` float32.
        params: λ' ``[N]`` and partners ``[N]``, as `sampling.draw_mixup` gives them.
        num_groups: Write images in the order of `interleave` with as many groups; targets stay.
        out: Where to write the mixed images, like ``inputs`` and apart from it; None allocates.

    Returns:
        Mixed inputs and mixed targets, shapes, dtypes and layout of the arguments.

    Raises:
        ValueError: If the lengths, dtypes, devices or layouts of the arguments do not fit.

    References:
        Berthelot et al. 2019, eq. 8-11.
    """
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
    check_groups(num_groups, length)
    out = torch.empty_like(inputs) if out is None else out
    mixed_targets = torch.empty_like(targets)
    order = eager.interleave_index(length, num_groups, inputs.device) if num_groups > 1 else None
    if torch.compiler.is_compiling():
        ops.mixup(inputs, targets, *params, order, out, mixed_targets, impl)
    else:
        backend = implementation(impl, inputs.device)
        backend.mixup(inputs, targets, params, out, mixed_targets, order)
    return out, mixed_targets


def interleave(rows: Tensor, num_groups: int) -> Tensor:
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
    check_groups(num_groups, len(rows))
    return eager.interleave(rows, num_groups)


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
    check_float("logits", logits)
    if logits.dim() != 2 or logits.shape != targets.shape:
        raise ValueError(
            f"logits must be [N, L] = {list(targets.shape)} like targets, got {list(logits.shape)}"
        )
    if not 0 <= num_labelled <= len(logits):
        raise ValueError(f"num_labelled must be in 0 .. N = {len(logits)}, got {num_labelled}")
    check_device("targets", targets, "logits", logits)
    weight = torch.as_tensor(weight_u, dtype=torch.float32).detach()
    if not asks_for_triton(impl, logits.device):  # plain torch, which autograd sees through
        return eager.mixmatch_loss(logits, targets.detach(), num_labelled, weight)
    losses = ops.mixmatch_loss(logits, targets.detach(), num_labelled, weight, impl)
    loss, loss_x, loss_u = losses
    return LossOutput(loss, loss_x, loss_u, weight)


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
    mixup: MixUpParams | None = None,
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
        zoom: Whether to cut ``params.zoom`` and resize back, bilinear.
        blur_radius: Radius of the sampled Gaussian in pixels; 0 is no blur.
        dtype: Of the result: float32, float16 or bfloat16. The arithmetic is float32.
        channels_last: Memory format of the result.
        mixup: λ' and partners of the R rows, to blend the views by; None leaves them unmixed.
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
                f"{list(sources[0].shape)} {dtype_name(sources[0].dtype)} and "
                f"{list(image.shape)} {dtype_name(image.dtype)}"
            )
        check_device("u", image, "x", sources[0])
    nhwc, (channels, height, width) = first
    check_padding(padding, padding_mode)
    if padding_mode == "reflect" and padding >= min(height, width):
        raise ValueError(
            f"padding must be smaller than the image to reflect it, got padding = {padding} for "
            f"images of {height} x {width} pixels"
        )
    if dtype not in IMAGE_DTYPES:
        raise ValueError(
            f"dtype must be one of {dtype_names(IMAGE_DTYPES)}, got {dtype_name(dtype)}"
        )
    check_device("params.top", params.top, "images", sources[0])
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
        check_device(name, factor, "images", sources[0])
    shape = (rows, channels, height, width)
    if out is None:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        out = torch.empty(shape, dtype=dtype, device=sources[0].device, memory_format=layout)
    elif tuple(out.shape) != shape or out.dtype != dtype:
        raise ValueError(
            f"out must be {list(shape)} {dtype_name(dtype)}, "
            f"got {list(out.shape)} {dtype_name(out.dtype)}"
        )
    check_dense("out", out)
    if mixup is not None:
        check_mixup(mixup, rows, "params")
        check_device("mixup.index", mixup.index, "images", sources[0])
    if torch.compiler.is_compiling():
        factors = [
            factor if isinstance(factor, Tensor) else sources[0].new_full((channels,), factor)
            for factor in (scale, bias)
            if isinstance(scale, Tensor) or isinstance(bias, Tensor)
        ]
        ops.augment(
            sources,
            params,
            list(mixup or ()),
            factors,
            *((0.0, 0.0) if factors else (scale, bias)),
            padding,
            padding_mode,
            zoom,
            blur_radius,
            nhwc,
            out,
            impl,
        )
        return out
    backend = implementation(impl, out.device)
    with _without_autocast(out.device):
        backend.augment(
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
            mixup=mixup,
        )
    return out


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products stay in float32 where the caller's autocast would make them half precision."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
