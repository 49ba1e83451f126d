"""ReMixMatch: guess on a weak view, align and sharpen, then mix weak and strong views."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gpu_mixmatch import _ranks, _unchecked, sampling
from gpu_mixmatch._keys import CountedKey
from gpu_mixmatch._validation import as_flag, as_plan, check_choice, check_device
from gpu_mixmatch.impl.constants import constant
from gpu_mixmatch.methods.alignment import DistributionAlignment
from gpu_mixmatch.methods.passes import GuessBatchNorm, Model, first_of_pair, get_logits
from gpu_mixmatch.methods.weak_strong import WeakStrongBuilder
from gpu_mixmatch.types import DrawPlan, Impl, LamMode, MixUpParams, ReMixMatchBatch, Weighting

Window = Literal["window"]


class ReMixMatch(WeakStrongBuilder):
    """Build ReMixMatch batches: guess on a weak view, align, sharpen, MixUp with strong views.

    Defaults are the reference's, with a strong engine such as `RandAugment` for its CTAugment. x is
    augmented strongly, too. The guess is that of the weak view alone, for all views of an image.
    The reference can also label each view by another or take their mean: its author found the
    first to be worse, and both need gradients of no use, or more passes of the model.

    The loss is `ReMixMatchLoss`. With ``rotation`` the model returns a pair: logits, and for each
    row four logits of what it is turned by. ``model(batch.inputs)`` goes into the loss as it is.

    Args:
        weak: An engine such as `WeakAugment`, for the view that is guessed on.
        strong: An engine such as `RandAugment`. If it is the weak one with a chain of operations,
            all views are drawn and built together, with MixUp's draws.
        num_classes: L, at least 2.
        num_strong: S (the paper's K), strong views per unlabelled image: 8 in the paper, 4 for
            STL-10, 1 for 40 labels. A batch is mixed of B + (S + 1)·M rows.
        temperature: T of the sharpening.
        alignment: Of guesses, before they are sharpened; "window" is
            ``DistributionAlignment(window=128)``, None aligns nothing.
        alpha: α of Beta(α, α).
        lam: "sample" draws λ per row (the reference), "batch" one per step (USB).
        rotation: Whether the first strong view is turned, too, a quarter of its rows each by 0, 90,
            180 and 270 degrees, by their positions; views must be square.
        guess_bn: BatchNorm while guessing; see `BatchBuilder`, like the next six.
        teacher: See there.
        label_smoothing: See there.
        logits_getter: See there; with ``rotation`` it takes out the pair.
        reuse_buffers: See there.
        seed: See there.
        impl: See there.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of its range.

    References:
        Berthelot et al., "ReMixMatch: Semi-Supervised Learning with Distribution Alignment and
        Augmentation Anchoring", ICLR 2020, Algorithm 1; google-research/remixmatch.
    """

    switches = (
        *("num_classes", "num_strong", "temperature", "alpha", "lam", "rotation", "guess_bn"),
        "label_smoothing",
    )
    strong_x = True

    def __init__(
        self,
        weak: Any,
        strong: Any,
        num_classes: int,
        *,
        num_strong: int = 8,
        temperature: float = 0.5,
        alignment: DistributionAlignment | Window | None = "window",
        alpha: float = 0.75,
        lam: LamMode = "sample",
        rotation: bool = False,
        guess_bn: GuessBatchNorm = "batch",
        teacher: nn.Module | None = None,
        label_smoothing: float = 0.0,
        logits_getter: Callable[[Any], Tensor] | None = None,
        reuse_buffers: bool = False,
        seed: int = 0,
        impl: Impl = "auto",
    ) -> None:
        if isinstance(alignment, str):
            check_choice("alignment", alignment, Window)
            alignment = DistributionAlignment(window=128)
        rotation = as_flag("rotation", rotation)
        super().__init__(
            *(weak, strong, num_classes),
            num_strong=num_strong,
            temperature=temperature,
            alignment=alignment,
            guess_bn=guess_bn,
            teacher=teacher,
            label_smoothing=label_smoothing,
            logits_getter=logits_getter,
            reuse_buffers=reuse_buffers,
            seed=seed,
            impl=impl,
        )
        plan = as_plan(DrawPlan(alpha=alpha, lam=lam))
        sampling.folded_beta_quantile(plan.alpha)  # takes a moment, once
        self.alpha = plan.alpha
        self.lam = lam
        self.rotation = rotation
        self._pair_getter = logits_getter
        if rotation:  # the guess is of classes alone
            self.logits_getter = partial(first_of_pair, getter=logits_getter)
        self._finish()

    @property
    def plan(self) -> DrawPlan:
        """What is drawn for a batch, here and not by two engines."""
        return super().plan._replace(alpha=self.alpha, lam=self.lam, mix="all")

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        u: Tensor,
        model: Model | None = None,
        *,
        ids_x: Tensor | None = None,
        ids_u: Tensor | None = None,
        key: Tensor | CountedKey | None = None,
    ) -> ReMixMatchBatch:
        """Build the batch of the next step.

        Args:
            x: Labelled images, ``[B, C, H, W]`` or ``[B, H, W, C]``, uint8, on the CPU or on this
                module's device; or floats in [0, 1], for engines that take them.
            y: Labels, ``[B]`` integers or ``[B, L]`` distributions, a tensor or a numpy array.
            u: Unlabelled images, like x; M of them.
            model: Maps ``[n, C, H, W]`` to logits ``[n, L]``, or to a pair. Its modes and buffers
                are left as they came. None where there is a teacher.
            ids_x: Sample ids of x, ``[B]`` int64; None takes positions in the global batch.
            ids_u: Sample ids of u, ``[M]`` int64.
            key: Seed and step on this module's device; see `MixMatch.forward`.

        Returns:
            The batch of B + (S + 2)·M rows, and M more with ``rotation``.

        Raises:
            TypeError: If an argument is of the wrong kind, or there is nothing to guess with.
            ValueError: If images, labels, ids or the model's logits do not fit each other.
        """
        guesser = self._guesser(model)
        x, y, u, ids = self._taken_in(x, y, u, (ids_x, ids_u), key)
        with torch.no_grad():
            images, mixup = self._build(x, u, ids, key)
            if mixup is None:  # engines drew their views by themselves
                _, mixup = self._draw(self.plan, ids, None, self.device)
            return self._guess_and_mix(images, len(u), y, guesser, mixup)

    def for_loss(self, outputs: Any) -> Any:
        """Take the logits out of the model's outputs, and with ``rotation`` the pair.

        Raises:
            TypeError: If there are none.
        """
        if not self.rotation:
            return super().for_loss(outputs)
        found = outputs if self._pair_getter is None else self._pair_getter(outputs)
        if not isinstance(found, tuple):
            return get_logits(found, None)
        return tuple(get_logits(logits, None) for logits in found)

    def _guess_and_mix(
        self, images: Tensor, num_u: int, y: Tensor, guesser: Model, mixup: MixUpParams
    ) -> ReMixMatchBatch:
        """Label all views by the weak one, mix them, and add the rows that are not mixed."""
        num_x, num_mixed = len(y), len(images)
        if self.rotation and images.shape[2] != images.shape[3]:
            raise ValueError(
                "rotation must be off where views are not square, got views of "
                f"{images.shape[2]} x {images.shape[3]}"
            )
        # a copy: the model may write into what it is given, and the weak view is mixed
        logits = self._guess_logits(images[num_mixed - num_u :].clone(), guesser)[0]
        check_device("y", y, "logits", logits)
        targets, weights = self._label(y, logits)
        first = images[num_x : num_x + num_u]
        inputs = self._inputs(num_mixed + (2 if self.rotation else 1) * num_u, images)
        mixed, plain, turned = inputs.tensor_split((num_mixed, num_mixed + num_u))
        _, mixed_targets = _unchecked.mixup(images, targets[:num_mixed], mixup, mixed, self.impl)
        plain.copy_(first)
        rotations = None
        if self.rotation:
            rotations = _quarter_turns(num_u, self.device)
            _turn(first, turned)
        step = self.step.clone()
        self.step.add_(1)
        return ReMixMatchBatch(
            *(inputs, torch.cat((mixed_targets, targets[num_mixed:])), weights, num_x, num_mixed),
            *(step, mixup, rotations),
        )

    def _label(self, y: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Targets and weights of x, all views, and the un-mixed view; the window moves on."""
        ratio = None
        if self.alignment is not None:
            sums = _ranks.summed(_unchecked.guess_statistics(logits, y, self.impl))
            ratio = self.alignment.ratio(sums, self.impl)
        weighting = Weighting(self.temperature or 0.0, ratio=ratio)
        return _unchecked.consistency_targets(
            y, logits, weighting, self.label_smoothing, self.num_strong + 2, self.impl
        )

    def _inputs(self, num_rows: int, like: Tensor) -> Tensor:
        if self._workspaces is not None:
            return self._output(num_rows, like, self._workspaces)
        order = torch.contiguous_format if like.is_contiguous() else torch.channels_last
        shape = (num_rows, *like.shape[1:])
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=order)


def _turn(images: Tensor, out: Tensor) -> None:
    """Write images turned by their quarter turns."""
    bounds = [-(-quarter * len(images) // 4) for quarter in range(5)]
    for turns, (start, stop) in enumerate(pairwise(bounds)):
        out[start:stop] = torch.rot90(images[start:stop], turns, (2, 3))


@constant
def _quarter_turns(count: int, device: torch.device) -> Tensor:
    """How often each of some images is turned, by its position: a quarter of them each."""
    return (torch.arange(count) * 4 // max(count, 1)).to(device)
