"""The operations as ``torch.library`` ops: what ``torch.compile`` and export see of them.

An op serves every device: the eager implementation a CPU, Triton's kernels CUDA, or what ``impl``
asks for. Arguments are flat, and validated already by `gpu_mixmatch.functional`, which calls the
implementations directly outside of compilation: the detour costs more than a kernel launch. Where
an op writes into its arguments, its fake implementation has nothing to do.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from gpu_mixmatch import sampling
from gpu_mixmatch.impl import implementation
from gpu_mixmatch.types import AugmentParams, AugmentPolicy, Impl, MixUpParams, PaddingMode


@torch.library.custom_op("gpu_mixmatch::draw_batch", mutates_args=())
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
    device: torch.device,
    impl: str,
) -> Tensor:
    """All draws of a batch in one tensor, as `sampling.unpack` reads it."""
    return _backend(impl, device).draw_batch(  # type: ignore[no-any-return]
        (seed, int(step)),
        num_x if ids_x is None else ids_x,
        num_u if ids_u is None else ids_u,
        num_augmentations=num_augmentations,
        policy=policy_of(policy),
        alpha=alpha,
        lam=lam,
        mix=mix,
        device=device,
    )


@draw_batch.register_fake
def _(
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
    device: torch.device,
    impl: str,
) -> Tensor:
    words = sampling.words_per_row(with_augment=policy is not None)
    return torch.empty(
        words * (num_x + num_augmentations * num_u), dtype=torch.int32, device=device
    )


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


@torch.library.custom_op("gpu_mixmatch::augment", mutates_args=("out",))
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
    _backend(impl, out.device).augment(
        tuple(sources),
        AugmentParams(*params),
        *(per_channel or (scale, bias)),
        padding=padding,
        padding_mode=cast(PaddingMode, padding_mode),
        zoom=zoom,
        blur_radius=blur_radius,
        channels_last_in=channels_last_in,
        out=out,
        workspace=None,
        mixup=_mixup_params(mixup),
    )


@torch.library.custom_op("gpu_mixmatch::guess_labels", mutates_args=())
def guess_labels(logits: Tensor, temperature: float, impl: str) -> Tensor:
    """Guessed distributions of unlabelled images."""
    return _backend(impl, logits.device).guess_labels(  # type: ignore[no-any-return]
        logits, temperature
    )


@guess_labels.register_fake
def _(logits: Tensor, temperature: float, impl: str) -> Tensor:
    return logits.new_empty(logits.shape[1:], dtype=torch.float32)


@torch.library.custom_op("gpu_mixmatch::batch_targets", mutates_args=("out",))
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
    _backend(impl, out.device).batch_targets(
        y, logits, temperature, label_smoothing, _mixup_params(mixup), out
    )


@torch.library.custom_op("gpu_mixmatch::mixup", mutates_args=("out", "mixed_targets"))
def mixup(
    inputs: Tensor,
    targets: Tensor,
    lam: Tensor,
    index: Tensor,
    order: Tensor | None,
    out: Tensor,
    mixed_targets: Tensor,
    impl: str,
) -> None:
    """Rows blended with their partners."""
    params = MixUpParams(lam, index)
    _backend(impl, out.device).mixup(inputs, targets, params, out, mixed_targets, order)


for _op in (augment, batch_targets, mixup):
    _op.register_fake(lambda *args: None)  # outputs are arguments


@torch.library.custom_op("gpu_mixmatch::mixmatch_loss", mutates_args=())
def mixmatch_loss(
    logits: Tensor, targets: Tensor, num_labelled: int, weight_u: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its two parts."""
    backend = _backend(impl, logits.device)
    loss, loss_x, loss_u = backend.mixmatch_loss(logits, targets, num_labelled, weight_u)[:3]
    return loss, loss_x, loss_u


@mixmatch_loss.register_fake
def _(
    logits: Tensor, targets: Tensor, num_labelled: int, weight_u: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    loss, loss_x, loss_u = (logits.new_empty((), dtype=wide) for _ in range(3))
    return loss, loss_x, loss_u


@torch.library.custom_op("gpu_mixmatch::mixmatch_loss_backward", mutates_args=())
def mixmatch_loss_backward(
    grad_loss: Tensor | None,
    grad_x: Tensor | None,
    grad_u: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    num_labelled: int,
    weight_u: Tensor,
    impl: str,
) -> Tensor:
    """Gradient of the logits; a gradient that is None is zero."""
    return _backend(impl, logits.device).mixmatch_loss_backward(  # type: ignore[no-any-return]
        (grad_loss, grad_x, grad_u), logits, targets, num_labelled, weight_u
    )


@mixmatch_loss_backward.register_fake
def _(
    grad_loss: Tensor | None,
    grad_x: Tensor | None,
    grad_u: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    num_labelled: int,
    weight_u: Tensor,
    impl: str,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, num_labelled, weight_u, impl = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, weight_u)
    ctx.num_labelled, ctx.impl = num_labelled, impl


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, targets, weight_u = ctx.saved_tensors
    grad = mixmatch_loss_backward(*grads, logits, targets, ctx.num_labelled, weight_u, ctx.impl)
    return grad, None, None, None, None


mixmatch_loss.register_autograd(_differentiate, setup_context=_keep)


def _backend(impl: str, device: torch.device) -> ModuleType:
    return implementation(cast(Impl, impl), device)


def _mixup_params(tensors: Sequence[Tensor]) -> MixUpParams | None:
    return MixUpParams(*tensors) if tensors else None
