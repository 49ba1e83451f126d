"""The operations as ``torch.library`` ops: what ``torch.compile``, export and autograd see of them.

Here alone the arguments are flat, as a schema wants them. Every op writes into its arguments, so
that one fake serves all, and serves every device: it runs what ``impl`` means where its tensors
are. Outside of compilation `gpu_mixmatch.functional` calls implementations directly: the detour
costs more than a kernel launch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch._keys import CountedKey
from gpu_mixmatch._validation import check_choice
from gpu_mixmatch.impl import Implementation, implementation
from gpu_mixmatch.types import (
    AugmentParams,
    AugmentPolicy,
    DrawPlan,
    Geometry,
    Impl,
    LamMode,
    MixMode,
    MixUpParams,
    PaddingMode,
    Scaling,
)


class Traced:
    """An `Implementation` that a compiler can trace: each call is one op.

    Args:
        impl: What the ops run.
    """

    def __init__(self, impl: Impl) -> None:
        self.impl = impl

    def draw_batch(
        self,
        key: Tensor | CountedKey | tuple[int, int | Tensor],
        ids_x: Tensor | int,
        ids_u: Tensor | int,
        plan: DrawPlan,
        out: Tensor,
    ) -> None:
        """See `Implementation.draw_batch`; the step is a tensor, which is read when the op runs."""
        words = key.words(1) if isinstance(key, CountedKey) else key
        seed, step = (0, words) if isinstance(words, Tensor) else words
        tensors = (None if isinstance(ids, int) else ids for ids in (ids_x, ids_u))
        counts = (ids if isinstance(ids, int) else len(ids) for ids in (ids_x, ids_u))
        num_augmentations, policy, *switches = plan
        flat = (num_augmentations, flat_policy(policy), *switches)
        draw_batch(seed, torch.as_tensor(step), *tensors, *counts, *flat, out, self.impl)
        if isinstance(key, CountedKey):  # what the op writes is in its schema: not the key
            key.words(1)[1:].add_(1)

    def prepare(self, plan: DrawPlan, device: torch.device) -> None:
        """See `Implementation.prepare`; ops make it themselves."""

    def augment(
        self,
        sources: tuple[Tensor, ...],
        params: AugmentParams,
        geometry: Geometry,
        scaling: Scaling,
        *,
        channels_last_in: bool,
        out: Tensor,
        workspace: Workspace | None,
        mixup: MixUpParams | None = None,
    ) -> None:
        """See `Implementation.augment`."""
        if isinstance(scaling.scale, Tensor) or isinstance(scaling.bias, Tensor):
            numbers = (0.0, 0.0)
            tensors = [
                factor
                if isinstance(factor, Tensor)
                else torch.full(out.shape[1:2], factor, dtype=torch.float32, device=out.device)
                for factor in scaling
            ]
        else:
            numbers, tensors = (scaling.scale, scaling.bias), []
        mixed = list(mixup or ())
        augment(
            sources, params, mixed, tensors, *numbers, *geometry, channels_last_in, out, self.impl
        )

    def guess_labels(self, logits: Tensor, temperature: float, out: Tensor) -> None:
        """See `Implementation.guess_labels`."""
        guess_labels(logits, temperature, out, self.impl)

    def batch_targets(
        self,
        y: Tensor,
        logits: Tensor,
        temperature: float,
        label_smoothing: float,
        mixup: MixUpParams | None,
        out: Tensor,
    ) -> None:
        """See `Implementation.batch_targets`."""
        mixed = list(mixup or ())
        batch_targets(y, logits, temperature, label_smoothing, mixed, out, self.impl)

    def mixup(
        self,
        inputs: Tensor,
        targets: Tensor,
        params: MixUpParams,
        out: Tensor,
        mixed_targets: Tensor,
    ) -> None:
        """See `Implementation.mixup`."""
        mixup(inputs, targets, *params, out, mixed_targets, self.impl)

    def mixmatch_loss(
        self,
        logits: Tensor,
        targets: Tensor,
        num_labelled: int,
        weight_u: Tensor,
        out: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """See `Implementation.mixmatch_loss`."""
        mixmatch_loss(logits, targets, num_labelled, weight_u, *out, self.impl)

    def mixmatch_loss_backward(
        self,
        grads: tuple[Tensor | None, Tensor | None, Tensor | None],
        logits: Tensor,
        targets: Tensor,
        num_labelled: int,
        weight_u: Tensor,
        out: Tensor,
    ) -> None:
        """See `Implementation.mixmatch_loss_backward`."""
        mixmatch_loss_backward(*grads, logits, targets, num_labelled, weight_u, out, self.impl)


def backend(impl: Impl, device: torch.device) -> Implementation:
    """Return what runs ``impl`` on ``device``, here and now or in the graph that is traced."""
    check_choice("impl", impl, Impl)
    return running(impl, device)


def running(impl: Impl, device: torch.device) -> Implementation:
    """`backend` of a word that is known to be one."""
    return Traced(impl) if torch.compiler.is_compiling() else implementation(impl, device)


class FusedLoss(torch.autograd.Function):
    """The loss and its parts from one launch, their gradient from another."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, num_labelled: int, weight_u: Tensor, impl: Impl
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the loss, the cross-entropy on X' and the squared error on U', 0-d each."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, targets, weight_u)
        ctx.num_labelled, ctx.impl = num_labelled, impl
        dtype = torch.promote_types(logits.dtype, torch.float32)
        empty = partial(torch.empty, (), dtype=dtype, device=logits.device)
        loss, loss_x, loss_u = empty(), empty(), empty()
        out = loss, loss_x, loss_u
        backend(impl, logits.device).mixmatch_loss(logits, targets, num_labelled, weight_u, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the gradient of the logits; a gradient that is None is zero."""
        logits, targets, weight_u = ctx.saved_tensors
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        backend(ctx.impl, logits.device).mixmatch_loss_backward(
            cast(tuple[Tensor, Tensor, Tensor], grads),
            logits,
            targets,
            ctx.num_labelled,
            weight_u,
            out,
        )
        return out, None, None, None, None


# The schemas


def _writing(*outs: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as an op that writes the arguments ``outs`` and returns nothing."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        name = f"gpu_mixmatch::{function.__name__}"
        op = torch.library.custom_op(name, function, mutates_args=outs)
        op.register_fake(lambda *args: None)  # outputs are arguments
        return op

    return register


@_writing("out")
def draw_batch(
    seed: int,
    step: Tensor,
    ids_x: Tensor | None,
    ids_u: Tensor | None,
    num_x: int,
    num_u: int,
    num_augmentations: int,
    policy: Sequence[float] | None,
    alpha: float,
    lam: str,
    mix: str,
    out: Tensor,
    impl: str,
) -> None:
    """All draws of a batch; a step of two numbers is seed and step, on the device."""
    plan = DrawPlan(
        num_augmentations, policy_of(policy), alpha, cast(LamMode, lam), cast(MixMode, mix)
    )
    x, u = num_x if ids_x is None else ids_x, num_u if ids_u is None else ids_u
    key = step if step.dim() else (seed, int(step))
    _running(impl, out).draw_batch(key, x, u, plan, out)


@_writing("out")
def augment(
    sources: Sequence[Tensor],
    params: Sequence[Tensor],
    mixup: Sequence[Tensor],
    per_channel: Sequence[Tensor],
    scale: float,
    bias: float,
    padding: int,
    padding_mode: str,
    zoom: bool,
    blur_radius: int,
    channels_last_in: bool,
    out: Tensor,
    impl: str,
) -> None:
    """Every view of every image; ``per_channel`` is empty, or scale and bias instead of numbers."""
    _running(impl, out).augment(
        tuple(sources),
        AugmentParams(*params),
        Geometry(padding, cast(PaddingMode, padding_mode), zoom, blur_radius),
        Scaling(*(per_channel or (scale, bias))),
        channels_last_in=channels_last_in,
        out=out,
        workspace=None,
        mixup=_mixup_params(mixup),
    )


@_writing("out")
def guess_labels(logits: Tensor, temperature: float, out: Tensor, impl: str) -> None:
    """Guessed distributions of unlabelled images."""
    _running(impl, out).guess_labels(logits, temperature, out)


@_writing("out")
def batch_targets(
    y: Tensor,
    logits: Tensor,
    temperature: float,
    label_smoothing: float,
    mixup: Sequence[Tensor],
    out: Tensor,
    impl: str,
) -> None:
    """Targets of all rows of a batch, mixed if ``mixup`` is not empty."""
    _running(impl, out).batch_targets(
        y, logits, temperature, label_smoothing, _mixup_params(mixup), out
    )


@_writing("out", "mixed_targets")
def mixup(
    inputs: Tensor,
    targets: Tensor,
    lam: Tensor,
    index: Tensor,
    out: Tensor,
    mixed_targets: Tensor,
    impl: str,
) -> None:
    """Rows blended with their partners."""
    _running(impl, out).mixup(inputs, targets, MixUpParams(lam, index), out, mixed_targets)


@_writing("loss", "loss_x", "loss_u")
def mixmatch_loss(
    logits: Tensor,
    targets: Tensor,
    num_labelled: int,
    weight_u: Tensor,
    loss: Tensor,
    loss_x: Tensor,
    loss_u: Tensor,
    impl: str,
) -> None:
    """The loss and its two parts."""
    out = loss, loss_x, loss_u
    _running(impl, logits).mixmatch_loss(logits, targets, num_labelled, weight_u, out)


@_writing("out")
def mixmatch_loss_backward(
    grad_loss: Tensor | None,
    grad_x: Tensor | None,
    grad_u: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    num_labelled: int,
    weight_u: Tensor,
    out: Tensor,
    impl: str,
) -> None:
    """Gradient of the logits; a gradient that is None is zero."""
    grads = grad_loss, grad_x, grad_u
    _running(impl, out).mixmatch_loss_backward(grads, logits, targets, num_labelled, weight_u, out)


def flat_policy(policy: AugmentPolicy | None) -> list[float] | None:
    """Put a policy into numbers, which is what an op takes."""
    if policy is None:
        return None
    padding, zoom_px, flip, blur_sigma = policy
    return [float(padding), *map(float, zoom_px), flip, *(blur_sigma or ())]


def policy_of(numbers: Sequence[float] | None) -> AugmentPolicy | None:
    """Undo `flat_policy`."""
    if numbers is None:
        return None
    padding, least, most, flip, *sigma = numbers
    blur_sigma = (sigma[0], sigma[1]) if sigma else None
    return AugmentPolicy(int(padding), (int(least), int(most)), flip, blur_sigma)


def _running(impl: str, tensor: Tensor) -> Implementation:
    return implementation(cast(Impl, impl), tensor.device)


def _mixup_params(tensors: Sequence[Tensor]) -> MixUpParams | None:
    return MixUpParams(*tensors) if tensors else None
