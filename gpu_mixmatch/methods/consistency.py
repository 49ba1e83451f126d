"""Consistency: guess on weak views, train on strong ones; what FixMatch and its kin share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gpu_mixmatch import _ranks, _unchecked
from gpu_mixmatch._keys import CountedKey
from gpu_mixmatch._validation import (
    as_smoothing,
    as_temperature,
    check_device,
    check_float,
    check_same_images,
)
from gpu_mixmatch.methods.alignment import DistributionAlignment
from gpu_mixmatch.methods.base import as_ids_of_rows
from gpu_mixmatch.methods.passes import GuessBatchNorm, Model, check_model
from gpu_mixmatch.methods.thresholds import Threshold, as_threshold
from gpu_mixmatch.methods.weak_strong import WeakStrongBuilder
from gpu_mixmatch.types import ConsistencyBatch, Guess, Impl, Weighting


class Consistency(WeakStrongBuilder):
    """Build batches of weak and strong views, whose guesses are weighed and never mixed.

    Views → guess → targets and weights: `FixMatch`, `UDA`, `SoftMatch`, `FreeMatch`, `FlexMatch`
    and `MeanTeacher` are this class with defaults of their own.

    Guesses are made in either of two orders. ``builder(x, y, u)`` returns x, strong and weak views
    as one batch, and the loss labels the strong views by the logits of the weak ones: one pass of
    the model, in training mode, BatchNorm over all rows, as the reference runs it.
    ``builder(x, y, u, model)`` guesses first, without gradients, and returns x and strong views:
    a third less arithmetic and half the memory, and BatchNorm's statistics are of fewer rows.

    Args:
        weak: An engine such as `WeakAugment`, for x and for the views that are guessed on.
        strong: An engine such as `RandAugment`. If it is the weak one with a chain of operations,
            all views are drawn and built together.
        num_classes: L, at least 2.
        num_strong: S, strong views per unlabelled image.
        threshold: A number in (0, 1], an object such as `FreeThreshold()`, or None: every guess
            counts.
        temperature: T of the sharpening of guesses; None takes their class as a one-hot target.
        alignment: A `DistributionAlignment` of the guesses, before they are sharpened and weighed;
            None aligns nothing.
        guess_bn: BatchNorm while guessing first; see `BatchBuilder`, like the next six.
        teacher: See there. With one, every guess is made first, by it.
        label_smoothing: See there.
        logits_getter: See there.
        reuse_buffers: See there.
        seed: See there.
        impl: See there.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of its range.
    """

    switches = (*("num_classes", "num_strong", "temperature", "guess_bn", "label_smoothing"),)
    guesses_in_loss = True

    def __init__(
        self,
        weak: Any,
        strong: Any,
        num_classes: int,
        *,
        num_strong: int = 1,
        threshold: float | Threshold | None = 0.95,
        temperature: float | None = None,
        alignment: DistributionAlignment | None = None,
        guess_bn: GuessBatchNorm = "batch",
        teacher: nn.Module | None = None,
        label_smoothing: float = 0.0,
        logits_getter: Callable[[Any], Tensor] | None = None,
        reuse_buffers: bool = False,
        seed: int = 0,
        impl: Impl = "auto",
    ) -> None:
        threshold = as_threshold(threshold)
        if alignment is not None and threshold.aligns:
            raise ValueError(
                "alignment must be None for a threshold that aligns guesses itself, got "
                f"{alignment} beside {threshold}"
            )
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
        threshold.begin("threshold", self.num_classes)
        self.threshold = threshold
        self._finish()

    @property
    def learns(self) -> bool:
        """Whether guesses change what later ones weigh."""
        threshold = self.threshold
        return threshold.needs_sums or threshold.needs_ids or self.alignment is not None

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
    ) -> ConsistencyBatch:
        """Build the batch of the next step.

        Args:
            x: Labelled images, ``[B, C, H, W]`` or ``[B, H, W, C]``, uint8, on the CPU or on this
                module's device; or floats in [0, 1], for engines that take them.
            y: Labels, ``[B]`` integers or ``[B, L]`` distributions, a tensor or a numpy array.
            u: Unlabelled images, like x; M of them.
            model: Maps ``[n, C, H, W]`` to logits ``[n, L]``, to guess first. Its modes and buffers
                are left as they came. None leaves the guess to the loss.
            ids_x: Sample ids of x, ``[B]`` int64; None takes positions in the global batch.
            ids_u: Sample ids of u, ``[M]`` int64, which a `FlexThreshold` needs.
            key: Seed and step on this module's device; see `MixMatch.forward`.

        Returns:
            x and S·M strong views with their targets and weights; or these rows and M weak views,
            with a guess that is to be made.

        Raises:
            TypeError: If an argument is of the wrong kind.
            ValueError: If images, labels, ids or the model's logits do not fit each other.
        """
        if model is not None:
            check_model(model)
        x, y, u, ids = self._taken_in(x, y, u, (ids_x, ids_u), key)
        with torch.no_grad():
            images, _ = self._build(x, u, ids, key)
            remembered = self._ids_to_remember(ids_u, self.device)
            return self._batch(images, len(u), y, remembered, model)

    def from_views(
        self,
        x: Tensor,
        y: Tensor,
        weak: Tensor,
        strong: Tensor,
        model: Model | None = None,
        *,
        ids_u: Tensor | None = None,
    ) -> ConsistencyBatch:
        """Build the batch of the next step from images that a pipeline has augmented already.

        Args:
            x: Augmented labelled images, ``[B, C, H, W]``, floating point.
            y: Labels, ``[B]`` integers or ``[B, L]`` distributions.
            weak: Weak views of u, ``[M, C, H, W]``.
            strong: Its S strong views, ``[S, M, C, H, W]``, or ``[M, C, H, W]`` where S is 1.
            model: As for `forward`.
            ids_u: As for `forward`.

        Raises:
            TypeError: If an argument is of the wrong kind.
            ValueError: If shapes or dtypes do not fit each other.
        """
        strong = check_same_images(x, weak, strong, self.num_strong)
        self._looks.judge()
        if model is not None:
            check_model(model)
        device = self.device
        x, weak, strong = (
            self._moved(name, images, device)
            for name, images in (("x", x), ("weak", weak), ("strong", strong))
        )
        y = self._labels(y, len(x), device)
        as_ids_of_rows(None, ids_u, len(x), len(weak))
        with torch.no_grad():
            images = torch.cat((x, strong, weak))
            return self._batch(images, len(weak), y, self._ids_to_remember(ids_u, device), model)

    def _batch(
        self, images: Tensor, num_u: int, y: Tensor, ids: Tensor | None, model: Model | None
    ) -> ConsistencyBatch:
        """Guess, or leave it to the loss."""
        step = self.step.clone()
        guesser = model if self.teacher is None else self.teacher
        if guesser is None:
            guess = PendingGuess(self, y, ids)
            batch = ConsistencyBatch(images, y, None, len(y), step, num_u, guess=guess)
        else:
            rows = len(images) - num_u
            logits = self._guess_logits(images[rows:], guesser)[0]
            check_device("y", y, "logits", logits)
            made = self.label(y, logits, ids)
            batch = ConsistencyBatch(
                *(images[:rows], made.targets, made.weights, len(y), step), fairness=made.fairness
            )
        self.step.add_(1)
        return batch

    def label(self, y: Tensor, logits: Tensor, ids_u: Tensor | None = None) -> Guess:
        """Make targets and weights of x and all strong views; what is learnt of guesses moves on.

        Args:
            y: ``[B]`` integers or ``[B, L]`` distributions, on the logits' device.
            logits: Of the weak views, ``[M, L]``.
            ids_u: ``[M]`` int64, where the threshold remembers guesses by them.
        """
        sums = None
        if self.threshold.needs_sums or self.alignment is not None:
            sums = _ranks.summed(_unchecked.guess_statistics(logits, y, self.impl))
        ratio = None
        if self.alignment is not None:
            assert sums is not None
            ratio = self.alignment.ratio(sums, self.impl)
        temperature = 0.0 if self.temperature is None else as_temperature(self.temperature)
        base = Weighting(temperature, ratio=ratio)
        weighting = self.threshold.weighting(sums, base, self.impl)
        smoothing = as_smoothing(self.label_smoothing)
        targets, weights = _unchecked.consistency_targets(
            y, logits, weighting, smoothing, self.num_strong, self.impl
        )
        if self.threshold.needs_ids:
            assert ids_u is not None
            self.threshold.remember(logits, ids_u, self.impl)
        return Guess(targets, weights, self.threshold.fairness(self.num_classes))

    def _ids_to_remember(self, ids_u: Any, device: torch.device) -> Tensor | None:
        if not self.threshold.needs_ids:
            return None
        if ids_u is None:
            raise ValueError(
                "ids_u must be given where guesses are remembered by sample ids, got None: take "
                "them from the loader's batch"
            )
        ids = self.threshold.check_ids(ids_u)
        return self._moved("ids_u", ids, device)


class PendingGuess:
    """Labels a batch once its weak views have logits; see `ConsistencyBatch.complete`."""

    def __init__(self, builder: Consistency, y: Tensor, ids_u: Tensor | None) -> None:
        self.builder = builder
        self.y = y
        self.ids_u = ids_u
        self.was_made = False

    def __call__(self, logits: Tensor) -> Guess:
        """Make targets and weights of all rows from the logits of the weak views, ``[M, L]``.

        Raises:
            ValueError: If the logits are not of as many classes.
            RuntimeError: If it was made before, by a builder that learns of guesses.
        """
        if self.was_made and self.builder.learns:
            raise RuntimeError(
                "a guess must be made once, since thresholds and alignments take it in, got a "
                "second one for the same batch: keep `logits, batch = batch.complete(logits)` and "
                "give these to the loss"
            )
        check_float("logits", logits)
        with torch.no_grad():  # as a decorator it is nothing that a compiler can trace
            self.builder.look_at_guess(logits)
            check_device("y", self.y, "logits", logits)
            self.was_made = True
            return self.builder.label(self.y, logits, self.ids_u)
