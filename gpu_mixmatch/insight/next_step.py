"""What a builder's next step makes, taken apart, and checked against the batch itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_mixmatch import functional, sampling
from gpu_mixmatch._generators import kept_generators
from gpu_mixmatch._ranks import ids_or_positions
from gpu_mixmatch._validation import as_labels, check_kind
from gpu_mixmatch.augment.keyed import KeyedAugment
from gpu_mixmatch.methods.base import BatchBuilder
from gpu_mixmatch.methods.consistency import Consistency
from gpu_mixmatch.methods.layers import buffers_kept
from gpu_mixmatch.methods.mixmatch import MixMatch
from gpu_mixmatch.methods.passes import Model, get_logits, guess_mode, modules_of
from gpu_mixmatch.methods.state import GuessState
from gpu_mixmatch.types import (
    AugmentParams,
    ChainParams,
    ConsistencyBatch,
    Draws,
    MixMatchBatch,
    MixUpParams,
)


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


class NextViews(NamedTuple):
    """What the next step of a method without MixUp makes; all on the CPU.

    Attributes:
        images: x, the strong views of u, then its weak view, ``[B + (S + 1)·M, C, H, W]`` float32.
        targets: Of x and the strong views, ``[B + S·M, L]``.
        weights: Likewise, ``[B + S·M]``.
        guesses: The model's softmaxes on the weak views, ``[M, L]``.
        strong_draws: What was drawn for the strong views; None where the engine does not tell.
        weak_draws: What was drawn for the weak view, likewise.
        num_labelled: B.
        step: The step.
    """

    images: Tensor
    targets: Tensor
    weights: Tensor
    guesses: Tensor
    strong_draws: Draws | None
    weak_draws: Draws | None
    num_labelled: int
    step: int


def next_views(
    builder: Consistency,
    x: Tensor,
    y: Tensor,
    u: Tensor,
    model: Model,
    ids_x: Tensor | None,
    ids_u: Tensor | None,
    *,
    one_pass: bool = False,
) -> NextViews:
    """Let the builder make its next batch, and make the parts of that batch once more.

    Arguments are those of `Consistency.forward`; with ``one_pass`` the model guesses on all views
    at once, as where the loss guesses. What the builder has learnt of guesses, its step, the
    buffers of the model and torch's generators are left as they were.

    Raises:
        TypeError: If the builder's batches are of another kind.
        ValueError: If the builder refuses the batch, or logits are not finite.
        RuntimeError: If the parts do not give the batch.
    """
    step, device, views = int(builder.step), builder.device, builder._views
    y = as_labels("y", y)
    guesser = model if builder.teacher is None else builder.teacher
    guesses: list[Tensor] = []
    hook = builder.register_guess_hook(lambda logits: guesses.append(logits[0].clone()))
    try:
        with _left_unchanged(builder, guesser), torch.no_grad():
            first = not one_pass or builder.teacher is not None
            batch = builder(x, y, u, guesser if first else None, ids_x=ids_x, ids_u=ids_u)
            check_kind("mixmatch", batch, ConsistencyBatch, "a builder that does not mix its views")
            if not first:
                with guess_mode(guesser, "batch"):
                    logits = get_logits(guesser(batch.inputs), builder.logits_getter)
                _, batch = batch.complete(logits)
    finally:
        hook.remove()
    (logits,) = guesses
    if not bool(logits.isfinite().all()):
        raise ValueError("model must return finite logits, got NaN or infinity in a guess")
    ids = ids_or_positions("ids_x", ids_x, len(x)), ids_or_positions("ids_u", ids_u, len(u))
    with _left_unchanged(builder, guesser), torch.no_grad():
        images = views.by_two(x.to(device), u.to(device), ids, builder.seed, step)
        remembered = builder._ids_to_remember(ids_u, device)
        made = builder.label(y.to(device), logits, remembered)
    assert batch.weights is not None
    rows = len(batch.inputs)
    _check_same("inputs", batch.inputs, images[:rows])
    _check_same("targets", batch.targets, made.targets)
    _check_same("weights", batch.weights, made.weights)

    def draws(engine: Any, of: tuple[int, ...]) -> Draws | None:
        is_keyed = isinstance(engine, KeyedAugment)
        return engine.draw(builder.seed, step, ids[1], of) if is_keyed else None

    last = views.num_strong + 1
    return NextViews(
        images.float().cpu(),
        batch.targets.cpu(),
        batch.weights.cpu(),
        logits.float().softmax(dim=-1).cpu(),
        draws(views.strong, tuple(range(1, last))),
        draws(views.weak, (last,)),
        batch.num_labelled,
        step,
    )


@contextmanager
def _left_unchanged(builder: BatchBuilder, guesser: Model) -> Iterator[None]:
    """Put back the builder's step and state, the model's buffers and the generators at the end."""
    step = builder.step.clone()
    devices = [builder.device.index or 0] if builder.device.type == "cuda" else []
    learnt = [module for module in builder.modules() if isinstance(module, GuessState)]
    kept = buffers_kept([*modules_of(guesser), *learnt], of_batch_norm=True)
    try:
        with kept_generators(devices), kept:
            yield
    finally:
        builder.step = step


def _check_same(name: str, got: Tensor, wanted: Tensor) -> None:
    """Raise if the parts, made once more, do not give the batch."""
    scale = max(1.0, float(wanted.float().abs().max()))
    tolerance = max(1e-5, torch.finfo(got.dtype).eps) * scale
    if got.shape != wanted.shape or not bool(
        ((got.float() - wanted.float()).abs() <= tolerance).all()  # NaN is none of these
    ):
        raise RuntimeError(
            f"batch.{name} must be what its views and guesses give to {tolerance:.0e}, got others: "
            "an augmentation engine draws something else when it is called again for the same "
            "(seed, step)"
        )


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
