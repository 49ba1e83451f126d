"""FixMatch and the methods that change its mask: UDA, SoftMatch, FreeMatch and FlexMatch."""

from typing import Any

from gpu_mixmatch._validation import came, check_kind
from gpu_mixmatch.methods.consistency import Consistency
from gpu_mixmatch.methods.thresholds import FlexThreshold, FreeThreshold, SoftThreshold
from gpu_mixmatch.methods.views import builds_by_policy


class FixMatch(Consistency):
    """Train strong views towards the class that weak ones are confident of.

    Defaults are the reference's: one strong view, a one-hot target, and a weight of 1 where the
    largest probability is at least 0.95, else 0. The loss is `ConsistencyLoss(lambda_u=1)`; masked
    rows count in its mean.

    Arguments are those of `Consistency`.

    References:
        Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and
        Confidence", NeurIPS 2020; google-research/fixmatch.
    """

    def _check_engines(self) -> None:
        if self.strong is self.weak or _changes_little(self.strong):
            raise ValueError(
                "strong must change images more than weak does, as RandAugment.fixmatch(weak) "
                f"does, got {came(self.strong)}: a model that agrees with itself on weak views "
                "learns nothing from them"
            )


def _changes_little(engine: Any) -> bool:
    """Whether an engine is known to make weak views."""
    if not builds_by_policy(engine):
        return False
    chain = engine.policy.chain
    return chain is None or (
        not chain.gray
        and chain.cutout in (0, (0, 0))
        and (not chain.num_slots or not chain.prob or {op.name for op in chain.ops} == {"identity"})
    )


class UDA(FixMatch):
    """Train strong views towards sharpened guesses: FixMatch with T = 0.4 and a threshold of 0.8.

    The mask is of the guess before it is sharpened. The reference's loss is
    `ConsistencyLoss(loss_u="kl")`, with ``tsa`` where labels are few.

    Args:
        weak: See `Consistency`, like all others.
        strong: See there.
        num_classes: See there.
        temperature: T.
        threshold: Of the largest probability.
        options: See `Consistency`.

    References:
        Xie et al., "Unsupervised Data Augmentation for Consistency Training", NeurIPS 2020;
        google-research/uda.
    """

    def __init__(
        self,
        weak: Any,
        strong: Any,
        num_classes: int,
        *,
        temperature: float = 0.4,
        threshold: float = 0.8,
        **options: Any,
    ) -> None:
        super().__init__(
            weak, strong, num_classes, temperature=temperature, threshold=threshold, **options
        )


class SoftMatch(FixMatch):
    """FixMatch whose rows weigh by how confident they are among the guesses of late.

    Args:
        weak: See `Consistency`, like all others.
        strong: See there.
        num_classes: See there.
        threshold: What weighs guesses; None is `SoftThreshold()`.
        options: See `Consistency`.

    References:
        Chen et al., "SoftMatch: Addressing the Quantity-Quality Trade-off in Semi-supervised
        Learning", ICLR 2023.
    """

    def __init__(
        self,
        weak: Any,
        strong: Any,
        num_classes: int,
        *,
        threshold: SoftThreshold | None = None,
        **options: Any,
    ) -> None:
        threshold = SoftThreshold() if threshold is None else threshold
        check_kind("threshold", threshold, SoftThreshold, "a SoftThreshold or None")
        super().__init__(weak, strong, num_classes, threshold=threshold, **options)


class FreeMatch(FixMatch):
    """FixMatch whose thresholds, one per class, follow the guesses.

    Its loss has a second part, which keeps the classes of masked strong views apart:
    `ConsistencyLoss(lambda_fair=0.01)`.

    Args:
        weak: See `Consistency`, like all others.
        strong: See there.
        num_classes: See there.
        threshold: What weighs guesses; None is `FreeThreshold()`.
        options: See `Consistency`.

    References:
        Wang et al., "FreeMatch: Self-adaptive Thresholding for Semi-supervised Learning", ICLR
        2023.
    """

    def __init__(
        self,
        weak: Any,
        strong: Any,
        num_classes: int,
        *,
        threshold: FreeThreshold | None = None,
        **options: Any,
    ) -> None:
        threshold = FreeThreshold() if threshold is None else threshold
        check_kind("threshold", threshold, FreeThreshold, "a FreeThreshold or None")
        super().__init__(weak, strong, num_classes, threshold=threshold, **options)


class FlexMatch(FixMatch):
    """FixMatch whose thresholds are lower for the classes that are less learnt.

    Every call needs ``ids_u``, the sample ids that a loader gives.

    Args:
        weak: See `Consistency`, like all others.
        strong: See there.
        num_classes: See there.
        num_unlabelled: Unlabelled images there are: ids are below this.
        threshold: τ.
        options: See `Consistency`.

    References:
        Zhang et al., "FlexMatch: Boosting Semi-Supervised Learning with Curriculum Pseudo
        Labeling", NeurIPS 2021; TorchSSL.
    """

    def __init__(
        self,
        weak: Any,
        strong: Any,
        num_classes: int,
        *,
        num_unlabelled: int,
        threshold: float = 0.95,
        **options: Any,
    ) -> None:
        flex = FlexThreshold(num_unlabelled, threshold)
        super().__init__(weak, strong, num_classes, threshold=flex, **options)
