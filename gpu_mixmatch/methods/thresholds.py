"""What guesses weigh: by a fixed threshold, or by what was learnt of the guesses before."""

from numbers import Real
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from gpu_mixmatch import _ranks
from gpu_mixmatch._validation import (
    MOST_SAMPLES,
    as_flag,
    as_integer,
    as_labels,
    as_number,
    came,
    check_ids_of,
)
from gpu_mixmatch.impl.library import running
from gpu_mixmatch.methods.state import GuessState, unit_momentum
from gpu_mixmatch.types import Impl, Weighting


class Threshold(GuessState):
    """What gives a guess its weight in the loss.

    Attributes:
        needs_sums: Whether `weighting` reads the statistics of a batch.
        needs_ids: Whether it remembers guesses by sample ids.
        aligns: Whether it aligns guesses itself, so that no `DistributionAlignment` may.
    """

    needs_sums = False
    needs_ids = False
    aligns = False

    def weighting(self, sums: Tensor | None, base: Weighting, impl: Impl) -> Weighting:
        """Take in the statistics of a batch, and say how its guesses weigh.

        Args:
            sums: Of `guess_statistics`, over all processes; None where none are needed.
            base: With the temperature, and the factors of an alignment.
            impl: What runs.
        """
        raise NotImplementedError

    def remember(self, logits: Tensor, ids: Tensor, impl: Impl) -> None:
        """Take guesses in by their sample ids, after their weights were made."""

    def check_ids(self, ids: Any) -> Tensor:
        """Return sample ids by which guesses can be remembered."""
        return as_labels("ids_u", ids)

    def fairness(self, num_classes: int) -> Tensor | None:
        """What strong views should be predicted as, as a mean; None where that is no matter."""
        return None


class FixedThreshold(Threshold):
    """Guesses count whose confidence, the largest probability, is at least ``value``.

    Args:
        value: In (0, 1]; None lets every guess count.

    References:
        Sohn et al. 2020 (FixMatch), eq. 4.
    """

    def __init__(self, value: float | None = 0.95) -> None:
        super().__init__()
        self.value = None if value is None else as_number("threshold", value, above=0, most=1)

    def weighting(self, sums: Tensor | None, base: Weighting, impl: Impl) -> Weighting:
        """The same at every step; see `Threshold`."""
        return base._replace(rule="fixed", threshold=self.value or 0.0)

    def extra_repr(self) -> str:
        """Show the value."""
        return f"{self.value}"


class SoftThreshold(Threshold):
    """Guesses weigh 1 above the mean confidence, and less below it, by a Gaussian (SoftMatch).

    Mean μ and variance σ² of the confidence are averages over steps, this one's in them, of the
    guesses as they are; the weight is that of the guess aligned to uniform classes, the label that
    of the guess as it is. USB takes μ and σ² of aligned guesses instead.

    Args:
        momentum: Of the averages, which begin at 1/L and 1.
        spread: The deviation of the Gaussian is 1/spread of σ; at most 1000.
        uniform: Whether guesses are aligned for their weights.

    References:
        Chen et al. 2023 (SoftMatch), eq. 6-9.
    """

    needs_sums = True

    def __init__(
        self, momentum: float = 0.999, *, spread: float = 2.0, uniform: bool = True
    ) -> None:
        super().__init__()
        self.momentum = unit_momentum(momentum)
        self.spread = as_number("spread", spread, above=0, most=1000)
        self.uniform = as_flag("uniform", uniform)
        self.aligns = self.uniform

    def bind(self, num_classes: int) -> None:
        """Begin with no confidence, of a variance of 1; see `GuessState`."""
        averages = torch.full((2 + 3 * num_classes,), 1 / num_classes)
        averages[1] = 1
        self.keep("averages", averages)
        self.constant("wanted", torch.full((num_classes,), 1 / num_classes))

    def weighting(self, sums: Tensor | None, base: Weighting, impl: Impl) -> Weighting:
        """A Gaussian below the mean confidence; see `Threshold`."""
        assert sums is not None
        ratio = torch.empty_like(self.wanted) if self.uniform else None
        running(impl, sums.device).update_averages(
            sums, self.averages, self.momentum, self.wanted, ratio
        )
        shared = base._replace(rule="soft", state=self.averages, spread=self.spread)
        return shared._replace(ratio=ratio, aligned_targets=False) if self.uniform else shared

    def extra_repr(self) -> str:
        """Show the fields."""
        return f"momentum={self.momentum}, spread={self.spread}, uniform={self.uniform}"


class FreeThreshold(Threshold):
    """Guesses count from a threshold of their class on, which follows the guesses (FreeMatch).

    That of class c is the mean confidence times p̃(c) / max p̃, where p̃ is the mean guess: averages
    over steps, this one's in them, which begin uniform.

    Args:
        momentum: Of the averages.

    References:
        Wang et al. 2023 (FreeMatch), eq. 5-8.
    """

    needs_sums = True

    def __init__(self, momentum: float = 0.999) -> None:
        super().__init__()
        self.momentum = unit_momentum(momentum)

    def bind(self, num_classes: int) -> None:
        """Begin uniform; see `GuessState`."""
        self.keep("averages", torch.full((2 + 3 * num_classes,), 1 / num_classes))

    def weighting(self, sums: Tensor | None, base: Weighting, impl: Impl) -> Weighting:
        """Thresholds of the classes; see `Threshold`."""
        assert sums is not None
        run = running(impl, sums.device)
        run.update_averages(sums, self.averages, self.momentum, None, None)
        return base._replace(rule="free", state=self.averages)

    def fairness(self, num_classes: int) -> Tensor:
        """The mean guess over its share of the argmax, normalised."""
        mean, share = self.averages[2 : 2 + 2 * num_classes].view(2, num_classes)
        wanted = torch.where(share > 0, mean / share, 0.0)
        fair: Tensor = wanted / wanted.sum()
        return fair

    def extra_repr(self) -> str:
        """Show the momentum."""
        return f"momentum={self.momentum}"


class FlexThreshold(Threshold):
    """Guesses count from a threshold of their class on, lower for classes less learnt (FlexMatch).

    Of each unlabelled image the last confident class is remembered, by its sample id. A class that
    n images have is learnt by β = n over the largest such number, images without a class among
    them, and has the threshold value·β / (2 - β), from what earlier steps have left.

    Args:
        num_unlabelled: Sample ids are 0 .. num_unlabelled - 1.
        value: τ: of a guess that is remembered, above it, and of a class that is learnt.

    References:
        Zhang et al. 2021 (FlexMatch), eq. 5-7 and 10; TorchSSL.
    """

    needs_ids = True

    def __init__(self, num_unlabelled: int, value: float = 0.95) -> None:
        super().__init__()
        self.num_unlabelled = as_integer(
            "num_unlabelled", num_unlabelled, least=1, most=min(MOST_SAMPLES, 2**31 - 1)
        )
        self.value = as_number("threshold", value, above=0, most=1)

    def bind(self, num_classes: int) -> None:
        """Begin with no classes; see `GuessState`."""
        if num_classes > 2**15 - 1:
            raise ValueError(
                f"num_classes must be at most {2**15 - 1} for a FlexThreshold, which remembers "
                f"classes in 16 bits, got {num_classes}"
            )
        self.keep("classes", torch.full((self.num_unlabelled,), -1, dtype=torch.int16))
        counts = torch.zeros(num_classes + 1, dtype=torch.int32)
        counts[-1] = self.num_unlabelled
        self.constant("counts", counts)

    def check_ids(self, ids: Any) -> Tensor:
        """Return sample ids that are in the table; on a device they are not looked at."""
        found = as_labels("ids_u", ids)
        check_ids_of("ids_u", found, "num_unlabelled", self.num_unlabelled)
        return found

    def weighting(self, sums: Tensor | None, base: Weighting, impl: Impl) -> Weighting:
        """Thresholds of the classes, by earlier steps; see `Threshold`."""
        return base._replace(rule="flex", threshold=self.value, state=self.counts)

    def remember(self, logits: Tensor, ids: Tensor, impl: Impl) -> None:
        """Take in the confident classes of a batch, those of all processes; see `Threshold`."""
        run = running(impl, logits.device)
        classes = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        run.confident_classes(logits, self.value, classes)
        classes, ids = _ranks.gathered(classes), _ranks.gathered(ids.to(logits.device))
        run.update_labels(classes, ids, self.classes, self.counts)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **options: Any
    ) -> None:
        most, classes = len(self.counts) - 2, state_dict.get(prefix + "classes")
        if isinstance(classes, Tensor) and classes.numel():
            low, high = (int(value) for value in classes.aminmax())
            if low < -1 or high > most:
                *_, errors = args
                errors.append(
                    f"{prefix}classes must be in -1 .. num_classes - 1 = {most}, got {low} .. "
                    f"{high}: they are of another number of classes"
                )
                return
        super()._load_from_state_dict(state_dict, prefix, *args, **options)
        classes = self.classes.long().remainder(len(self.counts))
        self.counts.copy_(torch.bincount(classes, minlength=len(self.counts)))

    def extra_repr(self) -> str:
        """Show the fields."""
        return f"num_unlabelled={self.num_unlabelled}, value={self.value}"


def as_threshold(threshold: Any) -> Threshold:
    """Return a threshold: as it is, or a number or None as a `FixedThreshold`.

    Raises:
        TypeError: If it is none of these.
        ValueError: If the number is not in (0, 1].
    """
    if isinstance(threshold, Threshold):
        return threshold
    if isinstance(threshold, bool) or not isinstance(threshold, Real | NoneType):
        raise TypeError(
            "threshold must be a number in (0, 1], an object such as FreeThreshold(), or None, got "
            f"{came(threshold)}"
        )
    return FixedThreshold(threshold)  # type: ignore[arg-type]
