"""WeakStrongBuilder: what methods share that guess on weak views and train on strong ones."""

from typing import Any

import torch
from torch import Tensor

from gpu_mixmatch import _streams
from gpu_mixmatch._keys import CountedKey
from gpu_mixmatch._validation import MOST_VIEW, as_integer, as_temperature, check_kind
from gpu_mixmatch.augment import as_augment
from gpu_mixmatch.methods.alignment import DistributionAlignment
from gpu_mixmatch.methods.base import BatchBuilder
from gpu_mixmatch.methods.views import WeakAndStrong
from gpu_mixmatch.types import DrawPlan, MixUpParams


class WeakStrongBuilder(BatchBuilder):
    """Draw and build weak and strong views, by two engines or by one in their place.

    Args:
        weak: An engine.
        strong: Another, or the same.
        num_classes: L, at least 2.
        num_strong: S, strong views per unlabelled image.
        temperature: T of the sharpening of guesses; None takes their class as a one-hot target.
        alignment: Of the guesses; None aligns nothing.
        options: See `BatchBuilder`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of its range.
    """

    strong_x = False

    def __init__(
        self,
        weak: Any,
        strong: Any,
        num_classes: int,
        *,
        num_strong: int,
        temperature: float | None,
        alignment: DistributionAlignment | None,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, **options)
        self.num_strong = as_integer("num_strong", num_strong, least=1, most=MOST_VIEW - 1)
        self.temperature = None if temperature is None else as_temperature(temperature)
        self.weak = as_augment(weak, name="weak")
        self.strong = as_augment(strong, name="strong")
        if alignment is not None:
            check_kind(
                "alignment", alignment, DistributionAlignment, "a DistributionAlignment or None"
            )
            alignment.begin("alignment", self.num_classes)
        self.alignment = alignment

    @property
    def plan(self) -> DrawPlan:
        """What is drawn for a batch, here and not by two engines."""
        return self._views.plan

    @property
    def engines(self) -> dict[str, Any]:
        """The engines, as "weak" and "strong"."""
        return {"weak": self.weak, "strong": self.strong}

    @property
    def _views(self) -> WeakAndStrong:
        if not torch.compiler.is_compiling():  # else the constructor has looked
            self._check_engines()
        num_strong = as_integer("num_strong", self.num_strong, least=1, most=MOST_VIEW - 1)
        return WeakAndStrong(self.weak, self.strong, num_strong, self.strong_x)

    def _check_engines(self) -> None:
        """Raise where engines cannot be right for a method."""

    def _build(
        self, x: Tensor, u: Tensor, ids: tuple[Any, Any], key: Tensor | CountedKey | None
    ) -> tuple[Tensor, MixUpParams | None]:
        """All views: x, the strong ones, then the weak one; and what was drawn with them."""
        views = self._views
        joint = views.joint
        if joint is None:
            if key is not None:
                raise TypeError(
                    "key must be None for engines that draw on the host, got one; with a strong "
                    "engine that is the weak one with a chain the draws are made on the device"
                )
            _streams.refuse_capture(
                self.device,
                "a CUDA graph would repeat draws that are made on the host: make strong of weak, "
                "as RandAugment.fixmatch(weak)",
            )
            return views.by_two(x, u, ids, self.seed, int(self.step)), None
        draws, mixup = self._draw(self.plan, ids, key, self.device)
        assert draws is not None
        workspace = self._workspaces[int(self.step) % 2] if self._workspaces else None
        # an alias: whoever asks it for a gradient does not ask the buffer
        return joint.build(x, u, draws, self.num_strong + 1, workspace).detach(), mixup
