"""The operations as ``torch.library`` ops: what ``torch.compile``, export and autograd see of them.

Here alone the arguments are flat, as a schema wants them. Every op writes into its arguments, so
that one fake serves all, and serves every device: it runs what ``impl`` means where its tensors
are. Outside of compilation `gpu_mixmatch.functional` calls implementations directly: the detour
costs more than a kernel launch.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, cast, get_args

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
    Chain,
    ChainParams,
    Cut,
    DrawPlan,
    Draws,
    Geometry,
    Impl,
    LamMode,
    MixMode,
    MixUpParams,
    Op,
    OpName,
    PaddingMode,
    Scaling,
    UnlabelledLoss,
    Weighting,
    WeightRule,
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
        parts = (policy.cut, policy.chain) if policy else (None, None)
        flat = (num_augmentations, flat_policy(policy), flat_parts(*parts), *switches)
        draw_batch(seed, torch.as_tensor(step), *tensors, *counts, *flat, out, self.impl)
        if isinstance(key, CountedKey):  # what the op writes is in its schema: not the key
            key.words(1)[1:].add_(1)

    def prepare(self, plan: DrawPlan, device: torch.device) -> None:
        """See `Implementation.prepare`; ops make it themselves."""

    def augment(
        self,
        sources: tuple[Tensor, ...],
        params: Draws,
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
        moved = *geometry[:4], flat_parts(geometry.cut, geometry.chain)
        augment(sources, params, mixed, tensors, *numbers, *moved, channels_last_in, out, self.impl)

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

    def guess_statistics(self, logits: Tensor, y: Tensor, out: Tensor) -> None:
        """See `Implementation.guess_statistics`."""
        guess_statistics(logits, y, out, self.impl)

    def update_averages(
        self,
        sums: Tensor,
        averages: Tensor,
        momentum: float,
        target: Tensor | None,
        out: Tensor | None,
    ) -> None:
        """See `Implementation.update_averages`."""
        update_averages(sums, averages, momentum, target, out, self.impl)

    def update_window(
        self,
        sums: Tensor,
        window: Tensor,
        position: Tensor,
        labels: Tensor,
        momentum: float,
        out: Tensor,
    ) -> None:
        """See `Implementation.update_window`."""
        update_window(sums, window, position, labels, momentum, out, self.impl)

    def confident_classes(self, logits: Tensor, threshold: float, out: Tensor) -> None:
        """See `Implementation.confident_classes`."""
        confident_classes(logits, threshold, out, self.impl)

    def update_labels(self, classes: Tensor, ids: Tensor, table: Tensor, counts: Tensor) -> None:
        """See `Implementation.update_labels`."""
        update_labels(classes, ids, table, counts, self.impl)

    def consistency_targets(
        self,
        y: Tensor,
        logits: Tensor,
        weighting: Weighting,
        label_smoothing: float,
        out: tuple[Tensor, Tensor],
    ) -> None:
        """See `Implementation.consistency_targets`."""
        consistency_targets(y, logits, *weighting, label_smoothing, *out, self.impl)

    def consistency_loss(
        self,
        logits: Tensor,
        targets: Tensor,
        weights: Tensor,
        parts: tuple[int, int],
        weight_u: Tensor,
        share_v: float,
        loss_u: UnlabelledLoss,
        tsa: Tensor | None,
        out: Tensor,
        count_x: Tensor | None = None,
    ) -> None:
        """See `Implementation.consistency_loss`."""
        flat = logits, targets, weights, parts, weight_u, share_v, loss_u, tsa
        consistency_loss(*flat, out, count_x, self.impl)

    def consistency_loss_backward(
        self,
        grads: Tensor,
        logits: Tensor,
        targets: Tensor,
        weights: Tensor,
        parts: tuple[int, int],
        weight_u: Tensor,
        share_v: float,
        loss_u: UnlabelledLoss,
        tsa: Tensor | None,
        count_x: Tensor | None,
        out: Tensor,
    ) -> None:
        """See `Implementation.consistency_loss_backward`."""
        flat = logits, targets, weights, parts, weight_u, share_v, loss_u, tsa
        consistency_loss_backward(grads, *flat, count_x, out, self.impl)


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


class FusedConsistencyLoss(torch.autograd.Function):
    """The loss of weighed rows and its parts from one launch, their gradient from another."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        weights: Tensor,
        parts: tuple[int, int],
        weight_u: Tensor,
        share_v: float,
        loss_u: UnlabelledLoss,
        tsa: Tensor | None,
        impl: Impl,
    ) -> Tensor:
        """Compute what `Implementation.consistency_loss` writes, ``[6]``."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        empty = partial(torch.empty, dtype=dtype, device=logits.device)
        out, count_x = empty(6), None if tsa is None else empty(())
        ctx.save_for_backward(logits, targets, weights, weight_u, tsa, count_x)
        ctx.rest = parts, share_v, loss_u, impl
        backend(impl, logits.device).consistency_loss(
            logits, targets, weights, parts, weight_u, share_v, loss_u, tsa, out, count_x
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradient of the logits."""
        logits, targets, weights, weight_u, tsa, count_x = ctx.saved_tensors
        parts, share_v, loss_u, impl = ctx.rest
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        backend(impl, logits.device).consistency_loss_backward(
            *(grads.contiguous(), logits, targets, weights, parts, weight_u, share_v, loss_u, tsa),
            *(count_x, out),
        )
        return out, *[None] * 8


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
    cut_and_chain: Sequence[float],
    alpha: float,
    lam: str,
    mix: str,
    weak_x: bool,
    weak_views: int,
    out: Tensor,
    impl: str,
) -> None:
    """All draws of a batch; a step of two numbers is seed and step, on the device."""
    plan = DrawPlan(
        num_augmentations,
        policy_of(policy, cut_and_chain),
        alpha,
        cast(LamMode, lam),
        cast(MixMode, mix),
        weak_x,
        weak_views,
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
    cut_and_chain: Sequence[float],
    channels_last_in: bool,
    out: Tensor,
    impl: str,
) -> None:
    """Every view of every image; ``per_channel`` is empty, or scale and bias instead of numbers."""
    _running(impl, out).augment(
        tuple(sources),
        ChainParams(*params) if cut_and_chain else AugmentParams(*params),
        Geometry(
            padding, cast(PaddingMode, padding_mode), zoom, blur_radius, *parts_of(cut_and_chain)
        ),
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


@_writing("out")
def guess_statistics(logits: Tensor, y: Tensor, out: Tensor, impl: str) -> None:
    """Sums of guesses and labels in whole numbers."""
    _running(impl, out).guess_statistics(logits, y, out)


@_writing("averages", "out")
def update_averages(
    sums: Tensor,
    averages: Tensor,
    momentum: float,
    target: Tensor | None,
    out: Tensor | None,
    impl: str,
) -> None:
    """Averages of guesses, moved by a batch, and the factors of an alignment."""
    _running(impl, averages).update_averages(sums, averages, momentum, target, out)


@_writing("window", "position", "labels", "out")
def update_window(
    sums: Tensor,
    window: Tensor,
    position: Tensor,
    labels: Tensor,
    momentum: float,
    out: Tensor,
    impl: str,
) -> None:
    """Factors of an alignment; then the window takes a batch in."""
    _running(impl, out).update_window(sums, window, position, labels, momentum, out)


@_writing("out")
def confident_classes(logits: Tensor, threshold: float, out: Tensor, impl: str) -> None:
    """Classes of confident guesses."""
    _running(impl, out).confident_classes(logits, threshold, out)


@_writing("table", "counts")
def update_labels(classes: Tensor, ids: Tensor, table: Tensor, counts: Tensor, impl: str) -> None:
    """Classes of samples, by their ids."""
    _running(impl, table).update_labels(classes, ids, table, counts)


@_writing("targets", "weights")
def consistency_targets(
    y: Tensor,
    logits: Tensor,
    temperature: float,
    rule: str,
    threshold: float,
    state: Tensor | None,
    spread: float,
    ratio: Tensor | None,
    aligned_targets: bool,
    label_smoothing: float,
    targets: Tensor,
    weights: Tensor,
    impl: str,
) -> None:
    """Targets and weights of all rows."""
    weighting = Weighting(
        *(temperature, cast(WeightRule, rule), threshold, state, spread, ratio, aligned_targets)
    )
    out = targets, weights
    _running(impl, targets).consistency_targets(y, logits, weighting, label_smoothing, out)


@_writing("out", "count_x")
def consistency_loss(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    parts: Sequence[int],
    weight_u: Tensor,
    share_v: float,
    loss_u: str,
    tsa: Tensor | None,
    out: Tensor,
    count_x: Tensor | None,
    impl: str,
) -> None:
    """The loss of weighed rows and its parts."""
    kind = cast(UnlabelledLoss, loss_u)
    _running(impl, out).consistency_loss(
        *(logits, targets, weights, (parts[0], parts[1]), weight_u, share_v, kind, tsa),
        *(out, count_x),
    )


@_writing("out")
def consistency_loss_backward(
    grads: Tensor,
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    parts: Sequence[int],
    weight_u: Tensor,
    share_v: float,
    loss_u: str,
    tsa: Tensor | None,
    count_x: Tensor | None,
    out: Tensor,
    impl: str,
) -> None:
    """Gradient of the logits."""
    kind = cast(UnlabelledLoss, loss_u)
    _running(impl, out).consistency_loss_backward(
        *(grads, logits, targets, weights, (parts[0], parts[1]), weight_u, share_v, kind, tsa),
        *(count_x, out),
    )


def flat_policy(policy: AugmentPolicy | None) -> list[float] | None:
    """Put a policy into numbers, which is what an op takes."""
    if policy is None:
        return None
    padding, zoom_px, flip, blur_sigma = policy[:4]
    return [float(padding), *map(float, zoom_px), flip, *(blur_sigma or ())]


def policy_of(
    numbers: Sequence[float] | None, cut_and_chain: Sequence[float] = ()
) -> AugmentPolicy | None:
    """Undo `flat_policy` and `flat_parts`."""
    if numbers is None:
        return None
    padding, least, most, flip, *sigma = numbers
    blur_sigma = (sigma[0], sigma[1]) if sigma else None
    zoom_px = int(least), int(most)
    return AugmentPolicy(int(padding), zoom_px, flip, blur_sigma, *parts_of(cut_and_chain))


_OP_NAMES: tuple[OpName, ...] = get_args(OpName)
_OP_NUMBERS = {name: float(number) for number, name in enumerate(_OP_NAMES)}


def flat_parts(cut: Cut | None, chain: Chain | None) -> list[float]:
    """Put a cut and a chain into numbers, none for neither."""
    if cut is None and chain is None:
        return []
    numbers = [0.0]
    if cut is not None:
        height, width = cut.size or (0, 0)
        numbers = [1.0, float(height), float(width), *(cut.area or (0.0, 0.0)), *cut.aspect]
    if chain is None:
        return numbers
    fixed = isinstance(chain.cutout, int)
    numbers += [
        *(float(chain.num_slots), chain.prob, float(chain.shuffled), chain.gray),
        float(chain.outside == "mean"),
        *((float(chain.cutout),) * 2 if isinstance(chain.cutout, int) else chain.cutout),
        *(float(fixed), float(len(chain.cutout_color or ()))),
        *map(float, chain.cutout_color or ()),
    ]
    for name, magnitudes in chain.ops:
        numbers += [_OP_NUMBERS[name], float(len(magnitudes)), *magnitudes]
    return numbers


def parts_of(numbers: Sequence[float]) -> tuple[Cut | None, Chain | None]:
    """Undo `flat_parts`."""
    return _parts_of(tuple(numbers)) if numbers else (None, None)


@lru_cache(maxsize=32)
def _parts_of(numbers: tuple[float, ...]) -> tuple[Cut | None, Chain | None]:
    cut, chain = None, None
    has_cut, *left = numbers
    if has_cut:
        height, width, least, most, *aspect = left[:6]
        size = (int(height), int(width)) if height else None
        cut = Cut(size, (least, most) if most else None, (aspect[0], aspect[1]))
        left = left[6:]
    if left:
        num_slots, prob, shuffled, gray, mean, least, most, fixed, channels, *left = left
        color = tuple(map(int, left[: int(channels)]))
        left, ops = left[int(channels) :], []
        while left:
            number, count, *left = left
            ops.append(Op(_OP_NAMES[int(number)], tuple(left[: int(count)])))
            left = left[int(count) :]
        chain = Chain(
            *(tuple(ops), int(num_slots), prob, bool(shuffled), gray),
            *("mean" if mean else "black", int(least) if fixed else (least, most), color or None),
        )
    return cut, chain


def _running(impl: str, tensor: Tensor) -> Implementation:
    return implementation(cast(Impl, impl), tensor.device)


def _mixup_params(tensors: Sequence[Tensor]) -> MixUpParams | None:
    return MixUpParams(*tensors) if tensors else None
