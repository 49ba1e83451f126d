"""The public operations: each validates its arguments, chooses an implementation and calls it."""

import torch
from torch import Tensor

from gpu_mixmatch import _unchecked
from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch._validation import (
    MOST_VIEW,
    as_device,
    as_flag,
    as_ids,
    as_integer,
    as_labels,
    as_number,
    as_plan,
    as_rampup,
    as_seed,
    as_smoothing,
    as_temperature,
    as_weighting,
    check_augment,
    check_batch_logits,
    check_choice,
    check_device,
    check_fairness,
    check_float,
    check_groups,
    check_key_tensor,
    check_kind,
    check_labels,
    check_loss,
    check_mixup,
    check_mixup_rows,
    check_no_grad,
    check_out,
    check_tensor,
    check_tsa,
    check_weights,
)
from gpu_mixmatch.impl import eager, resolve_impl
from gpu_mixmatch.impl.library import FusedConsistencyLoss, FusedLoss, backend
from gpu_mixmatch.types import (
    DrawPlan,
    Draws,
    Geometry,
    Impl,
    Layout,
    LossOutput,
    MixUpParams,
    Scaling,
    UnlabelledLoss,
    Weighting,
)


def draw_batch(
    seed: int,
    step: Tensor,
    ids_x: Tensor | int,
    ids_u: Tensor | int,
    plan: DrawPlan,
    *,
    device: torch.device,
    key: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Draws | None, MixUpParams]:
    """Draw all that a batch needs, on ``device``; see `sampling.draw_batch`.

    Args:
        seed: The key, 0 ≤ seed < 2^63.
        step: The training step, 0 ≤ step < 2^32, a 0-d tensor on the CPU.
        ids_x: Labelled sample ids, ``[B]`` int64; an integer B stands for 0 .. B - 1.
        ids_u: Unlabelled sample ids, ``[M]`` int64; an integer M stands for 0 .. M - 1.
        plan: What is drawn.
        device: Where the draws are wanted.
        key: Seed and step as a tensor on ``device``, ``[2]`` int64, instead of ``seed`` and
            ``step``: for CUDA graphs, whose replays read them anew. Kernels only.

    Returns:
        Parameters of N = B + K·M rows, on ``device``; None where there is no policy.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of its range.
        RuntimeError: If a CUDA graph is being captured and there is no ``key``, or ``impl`` cannot
            draw what the policy asks for.
    """
    device = as_device("device", device)
    if key is not None:
        check_key_tensor(key)
    check_choice("impl", impl, Impl)
    if not torch.compiler.is_compiling():  # else the op does it when it runs
        plan, seed = as_plan(plan), as_seed(seed)
        ids_x, ids_u = as_ids("ids_x", ids_x), as_ids("ids_u", ids_u)
    return _unchecked.draw_batch(seed, step, ids_x, ids_u, plan, device=device, key=key, impl=impl)


def sharpen(probs: Tensor, temperature: float) -> Tensor:
    """Lower the entropy of distributions: p^(1/T), normalised.

    Works in log space in float32, so that nothing underflows at low temperatures.

    Args:
        probs: Distributions over the last axis, ``[..., L]``, floating point.
        temperature: T > 0; 1 leaves ``probs`` as they are, T → 0 gives one-hot rows.

    Returns:
        Sharpened distributions, shape and dtype of ``probs``.

    Raises:
        TypeError: If ``temperature`` is no number or ``probs`` are no tensor.
        ValueError: If ``temperature`` is not positive or ``probs`` are not floating point.

    References:
        Berthelot et al. 2019, eq. 7.
    """
    temperature = as_temperature(temperature)
    check_tensor("probs", probs)
    check_float("probs", probs)
    if probs.dim() == 0:
        raise ValueError("probs must be [..., L], got a single number")
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
        TypeError: If ``temperature`` is no number or ``logits`` are no tensor.
        ValueError: If ``logits`` are not ``[K, M, L]`` with K ≥ 1, or ``temperature`` is not
            positive.

    References:
        Berthelot et al. 2019, eq. 6-7.
    """
    temperature = as_temperature(temperature)
    check_batch_logits(logits)
    out = torch.empty(logits.shape[1:], dtype=torch.float32, device=logits.device)
    backend(impl, logits.device).guess_labels(logits.detach(), temperature, out)
    return out


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
        y: Labels, ``[B]`` integers or ``[B, L]`` distributions, a tensor or a numpy array.
        logits: Of the K views of M unlabelled images, ``[K, M, L]``, floating point.
        temperature: T > 0.
        label_smoothing: Share of the uniform distribution in the labelled rows, in [0, 1).
        mixup: λ' and partners of the N rows, to blend the targets by; None leaves them unmixed.

    Returns:
        Targets, ``[B + K·M, L]`` float32.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: As for `guess_labels`, and if labels or logits do not fit each other, or λ' and
            partners are out of range.
    """
    temperature, label_smoothing = as_temperature(temperature), as_smoothing(label_smoothing)
    num_views, num_images, num_classes = check_batch_logits(logits)
    y = as_labels("y", y)
    check_labels(y, num_classes)
    check_device("y", y, "logits", logits)
    if mixup is not None:
        check_mixup(mixup, len(y) + num_views * num_images, "y and logits", "mixup")
        check_device("mixup.index", mixup.index, "logits", logits)
    check_choice("impl", impl, Impl)
    return _unchecked.batch_targets(y, logits.detach(), temperature, label_smoothing, mixup, impl)


def mixup(
    inputs: Tensor,
    targets: Tensor,
    params: MixUpParams,
    *,
    out: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Blend each row with its partner: λ'·row + (1 - λ')·row[index], images and targets alike.

    No gradient flows through it.

    Args:
        inputs: Images of any layout, ``[N, ...]``, contiguous or channels_last, floating point.
        targets: Distributions, ``[N, L]`` float32.
        params: λ' ``[N]`` and partners ``[N]``, as `sampling.draw_mixup` gives them.
        out: Where to write the mixed images, like ``inputs``, in memory of its own; None allocates.
            A backward pass that still needs what was there raises, as after any in-place write.

    Returns:
        Mixed inputs and mixed targets, shapes, dtypes and layout of the arguments.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the lengths, dtypes, devices or layouts of the arguments do not fit, ``out``
            shares memory with one of them, a gradient is asked for, or, on a CPU, λ' or partners
            are out of range.

    References:
        Berthelot et al. 2019, eq. 8-11.
    """
    check_mixup_rows(inputs, targets, params, out)
    check_no_grad(inputs=inputs, targets=targets)
    if out is not None:
        check_out(out, inputs=inputs, targets=targets, **params._asdict())
    check_choice("impl", impl, Impl)
    return _unchecked.mixup(inputs, targets, params, out, impl)


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
        TypeError: If ``rows`` are no tensor or ``num_groups`` is no integer.
        ValueError: If ``num_groups`` is not in 1 .. N.

    References:
        google-research/mixmatch, ``libml/layers.py::interleave``, which this equals for N = (K+1)·B
        and ``num_groups`` = K + 1.
    """
    check_tensor("rows", rows)
    if rows.dim() == 0:
        raise ValueError("rows must be [N, ...], got a single number")
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
        TypeError: If an argument is no integer.
        ValueError: If an argument is negative.
    """
    return eager.linear_rampup(*as_rampup(step, rampup_steps))


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
        TypeError: If an argument is of the wrong kind.
        ValueError: If the shapes differ, or ``num_labelled`` or ``weight_u`` is out of range.

    References:
        Berthelot et al. 2019, eq. 2-5.
    """
    check_loss(logits, targets, num_labelled, weight_u)
    targets = targets.detach()
    weight = _as_weight(weight_u)
    if resolve_impl(impl, logits.device) != "triton":  # plain torch, which autograd sees through
        return eager.mixmatch_losses(logits, targets, num_labelled, weight)
    loss, loss_x, loss_u = FusedLoss.apply(  # type: ignore[no-untyped-call]
        logits, targets, num_labelled, weight, impl
    )
    return LossOutput(loss, loss_x, loss_u, weight)


def consistency_targets(
    y: Tensor,
    logits: Tensor,
    weighting: Weighting,
    *,
    num_strong: int = 1,
    label_smoothing: float = 0.0,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Make targets and weights of labelled rows and of the strong views of unlabelled images.

    The arithmetic is float32 whatever comes in, under autocast too. No gradient flows through it.

    Args:
        y: Labels, ``[B]`` integers or ``[B, L]`` distributions, a tensor or a numpy array.
        logits: Of one weak view of M unlabelled images, ``[M, L]``, floating point.
        weighting: What becomes of them.
        num_strong: S, strong views per image: each guess is written as often.
        label_smoothing: Share of the uniform distribution in the labelled rows, in [0, 1).

    Returns:
        Targets ``[B + S·M, L]`` and weights ``[B + S·M]``, float32.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If labels, logits and weighting do not fit each other.

    References:
        Sohn et al. 2020, eq. 4; Xie et al. 2020; Zhang et al. 2021; Chen et al. 2023; Wang et al.
        2023.
    """
    check_tensor("logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"logits must be [M, L], got {list(logits.shape)}")
    check_float("logits", logits)
    y = as_labels("y", y)
    check_labels(y, logits.shape[1])
    check_device("y", y, "logits", logits)
    weighting = as_weighting(weighting, logits)
    num_strong = as_integer("num_strong", num_strong, least=1, most=MOST_VIEW)
    smoothing = as_smoothing(label_smoothing)
    check_choice("impl", impl, Impl)
    return _unchecked.consistency_targets(
        y, logits.detach(), weighting, smoothing, num_strong, impl
    )


def consistency_loss(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    num_labelled: int,
    weight_u: Tensor | float,
    *,
    loss_u: UnlabelledLoss = "ce",
    tsa: Tensor | None = None,
    num_u: int | None = None,
    share_v: float = 0.0,
    impl: Impl = "auto",
) -> tuple[Tensor, ...]:
    """Sum the cross-entropy of labelled rows and the weighted loss of unlabelled ones.

    The loss of unlabelled rows is a mean over all of them, those of weight 0 among them. Gradients
    flow to ``logits`` only. The arithmetic is float32 whatever comes in.

    Args:
        logits: ``[N, L]``, floating point.
        targets: ``[N, L]``.
        weights: ``[N]``.
        num_labelled: B.
        weight_u: λ_U, after its ramp.
        loss_u: "ce", "kl" or "mse"; see `ConsistencyLoss`.
        tsa: A probability, 0-d: labelled rows whose label has a greater one are left out, and the
            mean is over the others; None keeps all.
        num_u: Unlabelled rows of a first part; None takes all. The others are a part v, with a mean
            of its own.
        share_v: Weight of part v as a share of λ_U.

    Returns:
        The loss, its parts x, u and v, the share of unlabelled rows whose weight is above 0, and
        their mean weight, 0-d float32. A part without rows is 0.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If shapes differ, or a number is out of its range.

    References:
        Sohn et al. 2020, eq. 3-4; Xie et al. 2020; Berthelot et al. 2020, eq. 2-5.
    """
    check_loss(logits, targets, num_labelled, weight_u)
    check_weights(weights, logits)
    rest = len(logits) - num_labelled
    num_u = rest if num_u is None else as_integer("num_u", num_u, most=rest)
    share_v = as_number("share_v", share_v, least=0)
    check_choice("loss_u", loss_u, UnlabelledLoss)
    check_choice("impl", impl, Impl)
    if tsa is not None:
        check_tsa(tsa, logits)
        tsa = tsa.detach().float()
    weight = _as_weight(weight_u)
    arguments = (
        *(logits, targets.detach(), weights.detach(), (num_labelled, num_labelled + num_u)),
        *(weight, share_v, loss_u, tsa),
    )
    if resolve_impl(impl, logits.device) != "triton":  # plain torch, which autograd sees through
        return eager.consistency_losses(*arguments).unbind()
    parts: Tensor = FusedConsistencyLoss.apply(*arguments, impl)  # type: ignore[no-untyped-call]
    return parts.unbind()


def fairness_loss(logits: Tensor, weights: Tensor, fairness: Tensor) -> Tensor:
    """Compare what rows of a weight above 0 are predicted as, on average, with what is fair.

    Σ fairness · log(h), where h is the mean prediction of these rows over their share of the
    argmax, normalised; without such rows 0. It is to be minimised.

    Args:
        logits: Of the strong views, ``[S·M, L]``, floating point.
        weights: Of them, ``[S·M]``.
        fairness: ``[L]``, as `ConsistencyBatch` has it.

    Returns:
        0-d float32.

    Raises:
        TypeError: If an argument is no tensor.
        ValueError: If the shapes do not fit each other.

    References:
        Wang et al. 2023, eq. 9-11.
    """
    check_tensor("logits", logits)
    check_float("logits", logits)
    check_weights(weights, logits)
    check_fairness(fairness, logits)
    return eager.fairness_loss(logits, weights.detach(), fairness.detach())


def _as_weight(weight_u: Tensor | float) -> Tensor:
    if isinstance(weight_u, Tensor):
        return weight_u.detach().float()
    return torch.tensor(weight_u, dtype=torch.float32, device="cpu")


def augment(
    images: Tensor | tuple[Tensor, Tensor],
    params: Draws,
    geometry: Geometry,
    scaling: Scaling,
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    mixup: MixUpParams | None = None,
    layout: Layout | None = None,
    out: Tensor | None = None,
    workspace: Workspace | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Apply drawn parameters: shift, zoom or cut, flip, a chain, blur, then value·scale + bias.

    A cutout of the chain comes after the blur. No gradient flows through it.

    Args:
        images: ``[M, C, H, W]`` or ``[M, H, W, C]``, uint8 or floating point. A pair (x, u) draws x
            once and u as often as rows remain.
        params: Draws of R rows, view-major, as `sampling.draw_augment` gives them.
        geometry: Padding, zoom and blur, which all rows have in common.
        scaling: Factor and addend, numbers or one per channel, ``[C]`` float32.
        dtype: Of the result: float32, float16 or bfloat16. The arithmetic is float32.
        channels_last: Memory format of the result.
        mixup: λ' and partners of the R rows, to blend the views by; None leaves them unmixed.
        layout: "NCHW" or "NHWC"; None tells it by the shape, which must then leave no doubt: see
            `WeakAugment`.
        out: Where to write, in memory of its own; None allocates. A backward pass that still needs
            what was there raises, as after any in-place write.
        workspace: Scratch memory that outlives the call; None allocates.

    Returns:
        The views, ``[R, C, H, W]``, in one buffer.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If shapes, dtypes or devices do not fit, the shape leaves the layout in doubt,
            an image is too small for its reflection or its cut, ``out`` shares memory with an
            argument, a gradient is asked for, images of a chain are not uint8, or, on a CPU, draws
            are out of range.
        RuntimeError: If ``impl`` cannot run what the geometry asks for.
    """
    sources = images if isinstance(images, tuple) else (images,)
    channels_last_in, shape = check_augment(
        sources, params, geometry, scaling, dtype, mixup, out, layout
    )
    channels_last = as_flag("channels_last", channels_last)
    scaling = Scaling(*(f if isinstance(f, Tensor) else float(f) for f in scaling))
    if workspace is not None:
        check_kind("workspace", workspace, Workspace, "a Workspace or None")
    check_no_grad(**dict(zip(("images", "u"), sources, strict=False)))
    if out is not None:
        read = dict(zip(("images", "u"), sources, strict=False)) | params._asdict()
        check_out(out, **read, **scaling._asdict(), **(mixup._asdict() if mixup else {}))
    check_choice("impl", impl, Impl)
    return _unchecked.augment(
        sources,
        params,
        geometry,
        scaling,
        shape=shape,
        channels_last_in=channels_last_in,
        dtype=dtype,
        channels_last=channels_last,
        mixup=mixup,
        out=out,
        workspace=workspace,
        impl=impl,
    )
