"""Looks at what comes from outside: the unit of images, and what a model takes for logits."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu_mixmatch._validation import check_pixel_range, check_pixels
from gpu_mixmatch.types import SUM_TOLERANCE

_PROBABILITIES = (
    "model returns rows that are not negative and sum to one: probabilities, where logits are "
    "wanted. Their softmax is nearly uniform, so that all guesses are alike. Leave out the model's "
    "last softmax, or pass logits_getter=lambda output: output.log()"
)


class Looks:
    """What a builder has seen of images and logits, without waiting for a device.

    On a CPU every batch is looked at. On a device the first one is: its extremes are copied to the
    host behind it, and judged by the first later call that finds them there.
    """

    def __init__(self) -> None:
        self.seen: set[str] = set()  # what was looked at on a device, or warned of
        self._pending: list[tuple[Tensor, torch.cuda.Event, Callable[[list[float]], None]]] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy has seen the same, and does not wait for events of this one."""
        return {"seen": set(self.seen), "_pending": []}

    def images(self, name: str, images: Tensor) -> None:
        """Look at the range of images.

        Raises:
            ValueError: If floats lie far outside of [0, 1].
        """
        if not images.is_floating_point() or torch.compiler.is_compiling():
            return
        check_pixels(name, images)

        def judge(extremes: list[float]) -> None:
            check_pixel_range(f"{name} of the first batch", *extremes)

        self._later(name, images, lambda: torch.stack(images.detach().aminmax()), judge)

    def logits(self, logits: Tensor) -> None:
        """Look whether logits are probabilities; warn once if they are."""
        if torch.compiler.is_compiling():
            return
        if logits.device.type == "cpu":
            if "logits" not in self.seen and _are_probabilities(logits):
                self._warn([0.0, 0.0])
            return
        self._later("logits", logits, lambda: _signs(logits), self._warn)

    def difference(self, one: Tensor, other: Tensor, judge: Callable[[bool], None]) -> None:
        """Tell ``judge`` whether values differ, on a CPU now and on CUDA in a later call."""
        if one.device.type != "cuda":
            judge(_differ(one, other))
            return
        self._later(
            "difference",
            one,
            lambda: (one != other).any()[None],
            lambda differs: judge(bool(differs[0])),
        )

    def judge(self) -> None:
        """Judge what has arrived from a device since the last call.

        Raises:
            ValueError: If images of the first batch lie far outside of [0, 1].
        """
        if torch.compiler.is_compiling():
            return
        # while a graph is captured, events must not be asked
        while self._pending and not torch.cuda.is_current_stream_capturing():
            if not self._pending[0][1].query():  # type: ignore[no-untyped-call]
                return
            extremes, _, judge = self._pending.pop(0)
            judge(extremes.tolist())

    def _warn(self, signs: list[float]) -> None:
        low, miss = signs
        if low >= 0 and miss <= SUM_TOLERANCE:
            self.seen.add("logits")
            warnings.warn(_PROBABILITIES, UserWarning, stacklevel=2)

    def _later(
        self,
        name: str,
        tensor: Tensor,
        extremes: Callable[[], Tensor],
        judge: Callable[[list[float]], None],
    ) -> None:
        """Send what is to be judged to the host, once for each name, behind the kernels so far."""
        if tensor.device.type != "cuda" or name in self.seen:
            return
        if torch.cuda.is_current_stream_capturing():
            return
        self.seen.add(name)
        with torch.no_grad():
            values = extremes().float()
            # a copy to pinned memory does not wait
            host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(torch.cuda.current_stream(tensor.device))
        self._pending.append((host, arrived, judge))


def _differ(one: Tensor, other: Tensor) -> bool:
    return one.device.type == "cpu" and not torch.equal(one, other)


def _signs(logits: Tensor) -> Tensor:
    """The least value, and how far the sum of a row is from one at most."""
    rows = logits.detach().float()
    return torch.stack([rows.amin(), (rows.sum(dim=-1) - 1).abs().amax()])


def _are_probabilities(logits: Tensor) -> bool:
    rows = logits.detach()
    if not rows.numel() or not float(rows.amin()) >= 0:  # of logits some are negative
        return False
    miss = float((rows.float().sum(dim=-1) - 1).abs().amax())
    return math.isfinite(miss) and miss <= SUM_TOLERANCE
