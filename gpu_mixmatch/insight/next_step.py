"""What a builder's next step makes, taken apart, and checked against the batch itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_mixmatch import functional, sampling
from gpu_mixmatch._generators import kept_generators
from gpu_mixmatch._validation import as_labels
from gpu_mixmatch.methods.layers import buffers_kept
from gpu_mixmatch.methods.mixmatch import MixMatch
from gpu_mixmatch.methods.passes import Model, modules_of
from gpu_mixmatch.types import AugmentParams, ChainParams, MixMatchBatch, MixUpParams


class NextStep(NamedTuple):
    """What the builder's next step makes, and what it makes it from; all on the CPU.

    Attributes:
        images: W, the views before mixing, ``[N, C, H, W]`` float32.
        targets: Targets of W, ``[N, L]``.
        means: Mean over the K views of the model's softmaxes, ``[M, L]``.
        draws: What the engine drew.
        batch: The batch that the builder returned.
    """

    images: Tensor
    targets: Tensor
    means: Tensor
    draws: Any
    batch: MixMatchBatch


def next_step(
    mixmatch: MixMatch,
    x: Tensor,
    y: Tensor,
    u: Tensor,
    model: Model,
    ids_x: Tensor | None,
    ids_u: Tensor | None,
) -> NextStep:
    """Let the builder make its next batch, and make the parts of that batch once more.

    Arguments are those of `MixMatch.forward`. The builder's step, the buffers of the model that
    guesses and torch's generators are left as they were.

    Raises:
        ValueError: If the builder refuses the batch, or targets are not distributions.
        RuntimeError: If the parts, mixed, do not give the batch.
    """
    views, step = mixmatch.num_augmentations, int(mixmatch.step)
    y = as_labels("y", y)
    ids_x, ids_u = (
        None if ids is None else as_labels(name, ids)
        for name, ids in (("ids_x", ids_x), ("ids_u", ids_u))
    )
    guesser = model if mixmatch.teacher is None else mixmatch.teacher
    device = mixmatch.device
    guesses: list[Tensor] = []
    # the guess is read off the builder's own passes: a second one would draw other dropout masks
    hook = mixmatch.register_guess_hook(lambda logits: guesses.append(logits.clone()))
    try:
        with _left_unchanged(mixmatch, guesser):
            batch = mixmatch(x, y, u, model, ids_x=ids_x, ids_u=ids_u)
            ids = [len(x) if ids_x is None else ids_x, len(u) if ids_u is None else ids_u]
            draws = mixmatch.augment.draw_batch(mixmatch.seed, step, ids[0], ids[1], views)
            on_device = draws
            if isinstance(draws, AugmentParams | ChainParams):
                on_device = sampling.augment_to_device(draws, device)
            images = mixmatch.augment.build(x.to(device), u.to(device), on_device, views)
    finally:
        hook.remove()

    (logits,) = guesses
    targets = functional.batch_targets(
        y.to(device),
        logits,
        mixmatch.temperature,
        label_smoothing=mixmatch.label_smoothing,
        impl=mixmatch.impl,
    )
    batch.check()
    _check_mixed("inputs", batch.inputs, images, batch)
    _check_mixed("targets", batch.targets, targets, batch)
    return NextStep(
        images.float().cpu(),
        targets.cpu(),
        logits.float().softmax(dim=-1).mean(dim=0).cpu(),
        draws,
        batch._replace(
            inputs=batch.inputs.float().cpu(),
            targets=batch.targets.cpu(),
            params=MixUpParams(*(tensor.cpu() for tensor in batch.params)),
        ),
    )


@contextmanager
def _left_unchanged(mixmatch: MixMatch, guesser: Model) -> Iterator[None]:
    """Put back the builder's step, the model's buffers and the generators at the end."""
    step = mixmatch.step.clone()
    devices = [mixmatch.device.index or 0] if mixmatch.device.type == "cuda" else []
    try:
        with kept_generators(devices), buffers_kept(modules_of(guesser), of_batch_norm=True):
            yield
    finally:
        mixmatch.step = step


def _check_mixed(name: str, mixed: Tensor, rows: Tensor, batch: MixMatchBatch) -> None:
    """Raise if ``mixed`` is not ``rows`` mixed by the batch's own draws."""
    if mixed.shape != rows.shape:
        raise RuntimeError(f"batch.{name} must be {list(rows.shape)}, got {list(mixed.shape)}")
    flat, got = rows.float().flatten(1), mixed.float().flatten(1)
    lam = batch.params.lam[:, None]
    wanted = lam * flat + (1 - lam) * flat[batch.params.index]
    tolerance = max(1e-5, torch.finfo(mixed.dtype).eps) * max(1.0, float(flat.abs().max()))
    errors = (got - wanted).abs().amax(dim=1)
    wrong = ~(errors <= tolerance)  # also NaN
    if wrong.any():
        raise RuntimeError(
            f"batch.{name} must be λ'·W + (1 - λ')·W[index] to {tolerance:.0e}, got a difference "
            f"of {float(errors[wrong].max()):.3g} in {int(wrong.sum())} of {len(rows)} rows: the "
            "batch was mixed with other parameters than it carries, or the augmentation engine "
            "draws something else when it is called again for the same (seed, step)"
        )
