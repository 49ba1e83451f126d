"""DistributionAlignment: the mean guess of the last batches is moved to that of the labels."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from gpu_mixmatch._validation import as_integer, as_number, came
from gpu_mixmatch.impl.library import running
from gpu_mixmatch.methods.state import GuessState, unit_momentum
from gpu_mixmatch.types import Impl

Target = Literal["labels", "uniform"] | Sequence[float]


class DistributionAlignment(GuessState):
    """Multiply guesses by (wanted + 1e-6) / (guessed + 1e-6) of each class, and normalise them.

    What is guessed is the mean of the last ``window`` batches, uniform to begin with and without
    the batch at hand (ReMixMatch), or, with a momentum, an average that has the batch at hand in it
    (USB).

    Args:
        window: Number of batches.
        momentum: Of the average in place of a window, in [0, 1); None takes the window.
        target: What is wanted: "labels" is an average of the labelled rows' classes, uniform to
            begin with, with a momentum of 0.999 (ReMixMatch) or the one given; "uniform" is 1/L
            (USB); or a list of the classes' shares.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of its range.

    References:
        Berthelot et al. 2020 (ReMixMatch), section 3.1.
    """

    def __init__(
        self, window: int = 128, *, momentum: float | None = None, target: Target = "labels"
    ) -> None:
        super().__init__()
        self.window = as_integer("window", window, least=1, most=2**16)
        self.momentum = None if momentum is None else unit_momentum(momentum)
        self.target = _as_target(target)

    def bind(self, num_classes: int) -> None:
        """Make what is remembered, for L classes."""
        if not isinstance(self.target, str) and len(self.target) != num_classes:
            raise ValueError(
                f"target must have a share for each of {num_classes} classes, got "
                f"{len(self.target)}"
            )
        uniform = torch.full((num_classes,), 1 / num_classes)
        shares = uniform if isinstance(self.target, str) else torch.tensor(self.target)
        if self.momentum is not None:
            self.keep("averages", torch.full((2 + 3 * num_classes,), 1 / num_classes))
            self.constant("wanted", shares)
        else:
            self.keep("guesses", uniform.repeat(self.window, 1))
            self.keep("position", torch.zeros((), dtype=torch.int64))
            self.keep("labels", shares)

    def ratio(self, sums: Tensor, impl: Impl) -> Tensor:
        """Return the factors of the classes, ``[L]`` float32, and remember a batch.

        Args:
            sums: Of `guess_statistics`, over all processes.
            impl: What runs.
        """
        run = running(impl, sums.device)
        num_classes = (len(sums) - 4) // 3
        out = torch.empty(num_classes, dtype=torch.float32, device=sums.device)
        if self.momentum is not None:
            target = None if self.target == "labels" else self.wanted
            run.update_averages(sums, self.averages, self.momentum, target, out)
        else:
            momentum = 0.999 if self.target == "labels" else 1.0
            run.update_window(sums, self.guesses, self.position, self.labels, momentum, out)
        return out

    def extra_repr(self) -> str:
        """Show the fields."""
        how = f"window={self.window}" if self.momentum is None else f"momentum={self.momentum}"
        return f"{how}, target={self.target!r}"


def _as_target(target: Target) -> str | tuple[float, ...]:
    if isinstance(target, str):
        if target not in ("labels", "uniform"):
            raise ValueError(
                f"target must be 'labels', 'uniform' or a list of shares, got {target!r}"
            )
        return target
    if not isinstance(target, Sequence):
        raise TypeError(
            f"target must be 'labels', 'uniform' or a list of shares, got {came(target)}"
        )
    shares = tuple(
        as_number(f"target[{place}]", share, least=0, most=1) for place, share in enumerate(target)
    )
    if abs(sum(shares) - 1) > 1e-3:
        raise ValueError(f"target must sum to 1, got {sum(shares):.4g}")
    return shares
