"""MixMatch: Algorithm 1 of the paper as a batch builder."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpu_mixmatch import _unchecked, sampling
from gpu_mixmatch._keys import CountedKey
from gpu_mixmatch._validation import (
    as_plan,
    as_smoothing,
    as_temperature,
    check_choice,
    check_device,
    check_finite,
    check_kind,
    check_not_empty,
    check_tensor,
)
from gpu_mixmatch._writes import count_of_writes, share_memory
from gpu_mixmatch.augment import as_augment
from gpu_mixmatch.augment.base import Augment, BuiltViews, Views, complete
from gpu_mixmatch.methods.base import BatchBuilder, as_ids_of_rows
from gpu_mixmatch.methods.passes import GuessBatchNorm, GuessForward, Model, check_model
from gpu_mixmatch.types import DrawPlan, Impl, LamMode, MixMatchBatch, MixMode, MixUpParams


class MixMatch(BatchBuilder):
    """Build MixMatch batches: augment, guess, sharpen, shuffle, MixUp.

    Defaults are the paper's Algorithm 1 with the reference code's λ per row and its guess from
    batch statistics. Every random choice is a function of (seed, step, sample id, view): the same
    seed gives the same batches on any device, and ``state_dict`` is two integers.

    Args:
        augment: An engine such as `WeakAugment`, or any callable from float images to float images.
        num_classes: L, at least 2.
        num_augmentations: K, views per unlabelled image.
        temperature: T of the sharpening.
        alpha: α of Beta(α, α).
        lam: "sample" draws λ per row (the paper and its code), "batch" one per step (YU1ut, USB).
        mix: "all" mixes every row with any other; the paper's ablation mixes X with X and U with
            U ("separate"), only one part within itself ("labelled", "unlabelled"), or "none".
        guess_bn: BatchNorm while guessing. "batch" uses batch statistics and leaves the running
            ones alone (the reference), "update" lets them move (YU1ut), "eval" uses running ones,
            which suits frozen layers. Other buffers of the model move with "update" only.
        guess_forward: "joint" guesses all K·M views in one pass, "separate" in K passes, as the
            reference does, so that BatchNorm sees one view at a time.
        teacher: The model that guesses, for instance an EMA copy; None is the model of the call.
            It is not registered: it is neither moved nor saved with this module.
        label_smoothing: Share of the uniform distribution in labelled targets, in [0, 1).
        logits_getter: Takes the logits out of what the model returns; None if it returns them.
        reuse_buffers: Write inputs into two alternating buffers: a batch is overwritten two calls
            later. On a CPU this saves the page faults of fresh memory. A backward pass that comes
            after that raises.
        seed: The key of all draws, 0 ≤ seed < 2^63.
        impl: Implementation of the operations on tensors.

    Attributes:
        step: Number of batches built, a 0-d int64 tensor on the CPU; the draws of the next batch
            depend on it.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of its range.

    References:
        Berthelot et al., "MixMatch: A Holistic Approach to Semi-Supervised Learning", NeurIPS 2019,
        Algorithm 1; google-research/mixmatch.
    """

    switches = (
        *("num_classes", "num_augmentations", "temperature", "alpha", "lam", "mix", "guess_bn"),
        *("guess_forward", "label_smoothing"),
    )

    def __init__(
        self,
        augment: Any,
        num_classes: int,
        *,
        num_augmentations: int = 2,
        temperature: float = 0.5,
        alpha: float = 0.75,
        lam: LamMode = "sample",
        mix: MixMode = "all",
        guess_bn: GuessBatchNorm = "batch",
        guess_forward: GuessForward = "joint",
        teacher: nn.Module | None = None,
        label_smoothing: float = 0.0,
        logits_getter: Callable[[Any], Tensor] | None = None,
        reuse_buffers: bool = False,
        seed: int = 0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(
            num_classes,
            guess_bn=guess_bn,
            teacher=teacher,
            label_smoothing=label_smoothing,
            logits_getter=logits_getter,
            reuse_buffers=reuse_buffers,
            seed=seed,
            impl=impl,
        )
        plan = as_plan(DrawPlan(num_augmentations, None, alpha, lam, mix))
        check_choice("guess_forward", guess_forward, GuessForward)
        sampling.folded_beta_quantile(plan.alpha)  # takes a moment, once
        self.augment = as_augment(augment)
        self.num_augmentations = plan.num_augmentations
        self.temperature = as_temperature(temperature)
        self.alpha = plan.alpha
        self.lam = lam
        self.mix = mix
        self.guess_forward = guess_forward
        self._finish()

    @property
    def plan(self) -> DrawPlan:
        """What is drawn for a batch, here and not by the engine."""
        return self._plan_of(complete(self.augment))

    @property
    def engines(self) -> dict[str, Any]:
        """The engine, as "augment"."""
        return {"augment": self.augment}

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        u: Tensor,
        model: Model,
        *,
        ids_x: Tensor | None = None,
        ids_u: Tensor | None = None,
        key: Tensor | CountedKey | None = None,
    ) -> MixMatchBatch:
        """Build the batch of the next step.

        Args:
            x: Labelled images, ``[B, C, H, W]`` or ``[B, H, W, C]``, uint8 or float in [0, 1], on
                the CPU or on this module's device.
            y: Labels, ``[B]`` integers or ``[B, L]`` distributions, a tensor or a numpy array.
            u: Unlabelled images, like x; M of them, which may differ from B.
            model: Maps ``[n, C, H, W]`` to logits ``[n, L]``. Its modes and buffers are
                left as they came, and no gradient flows through the guess.
            ids_x: Sample ids of x, ``[B]`` int64, or a numpy array of integers; None takes
                positions in the global batch. With a data set's own indices the draws do not depend
                on batch size, order or world size.
            ids_u: Sample ids of u, ``[M]`` int64.
            key: Seed and step, ``[2]`` int64 on this module's device, to draw by in place of this
                module's own: a CUDA graph reads them anew, and writes nothing to them. Kernels
                only; see `capture`.

        Returns:
            The mixed batch of N = B + K·M rows.

        Raises:
            TypeError: If an argument is of the wrong kind.
            ValueError: If images, labels, ids or the model's logits do not fit each other, floats
                lie far outside of [0, 1], or a shape leaves the layout in doubt. On CUDA floats are
                looked at in the first batch alone, and nothing waits for it: a later call raises.

        Warns:
            UserWarning: Once, if the model's logits are probabilities; likewise.
        """
        check_model(model)
        x, y, u, ids = self._taken_in(x, y, u, (ids_x, ids_u), key)

        # Algorithm 1: whatever is random, then lines 3-6, the views of x and u; the rest is below
        engine = complete(self.augment)

        def draw() -> tuple[Any, MixUpParams]:
            draws, mixup = self._draw(self._plan_of(engine), ids, key, self.device)
            if draws is None:
                draws = engine.draw_batch(self.seed, int(self.step), *ids, self.num_augmentations)
            return draws, mixup

        def build(draws: Any) -> Views:
            scratch = self._workspaces[0] if self._workspaces else None
            before = count_of_writes(x), count_of_writes(u)
            views = engine.views(x, u, draws, self.num_augmentations, scratch)
            if (count_of_writes(x), count_of_writes(u)) != before:
                raise RuntimeError(
                    "augment must leave x and u as they came, since they are read again, got an "
                    f"engine that writes into them: {type(self.augment).__name__}.build must copy "
                    "what it changes"
                )
            # what the model writes into its views must not be written into the caller's images
            shown = views.unlabelled
            shared = share_memory(shown, x) or share_memory(shown, u)
            return views.copy() if shared else views

        draws, mixup = draw()
        with torch.no_grad():
            # an engine of the user's may have written into its draws: drawn again to build again,
            # but for those that a graph makes, which would be the next step's
            again = draw if not isinstance(key, CountedKey) else lambda: (draws, mixup)
            return self._guess_and_mix(build(draws), lambda: build(again()[0]), y, model, mixup)

    def from_views(
        self,
        x: Tensor,
        y: Tensor,
        views: Tensor | Sequence[Tensor],
        model: Model,
        *,
        ids_x: Tensor | None = None,
        ids_u: Tensor | None = None,
    ) -> MixMatchBatch:
        """Build the batch of the next step from images that a pipeline has augmented already.

        Args:
            x: Augmented labelled images, ``[B, C, H, W]``, floating point.
            y: Labels, ``[B]`` integers or ``[B, L]`` distributions.
            views: The K views of the unlabelled images, ``[K, M, C, H, W]`` or K tensors.
            model: As for `forward`.
            ids_x: As for `forward`; they key λ.
            ids_u: As for `forward`.

        Returns:
            The mixed batch of N = B + K·M rows.

        Raises:
            TypeError: If an argument is of the wrong kind.
            ValueError: If there are not K views, shapes or dtypes differ, or, on a CPU, images are
                not finite.
        """
        check_tensor("x", x)
        check_model(model)
        self._looks.judge()
        check_kind("views", views, (Tensor, list, tuple), "[K, M, C, H, W] or K tensors")
        if isinstance(views, Tensor) and views.dim() == 0:
            raise ValueError("views must be [K, M, C, H, W] or K tensors, got a single number")
        for number, view in enumerate(views):
            check_tensor(f"views[{number}]", view)
        if len(views) != self.num_augmentations:
            raise ValueError(
                f"views must hold num_augmentations = {self.num_augmentations} views, "
                f"got {len(views)}"
            )
        check_not_empty(x, views[0])
        for view in views:
            if view.shape != views[0].shape or view.shape[1:] != x.shape[1:]:
                raise ValueError(
                    f"views must each be [M, C, H, W] with {list(x.shape[1:])} like x, "
                    f"got {[list(view.shape) for view in views]}"
                )
            if view.dtype != x.dtype or not x.is_floating_point():
                raise ValueError(
                    f"x and views must be of one floating point dtype, got {x.dtype} and "
                    f"{view.dtype}"
                )
        if x.dim() != 4:
            raise ValueError(f"x must be [B, C, H, W], got {list(x.shape)}")
        check_finite("x", x)
        for view in views:
            check_finite("views", view)
        device = self.device
        sources = [
            self._moved("x", x, device),
            *(self._moved("views", view, device) for view in views),
        ]

        def build() -> Views:
            return BuiltViews(torch.cat(sources), len(x))

        y = self._labels(y, len(x), device)
        ids = as_ids_of_rows(ids_x, ids_u, len(x), len(views[0]))
        _, mixup = self._draw(self.plan._replace(policy=None), ids, None, device)
        with torch.no_grad():
            return self._guess_and_mix(build(), build, y, model, mixup)

    def _plan_of(self, engine: Augment) -> DrawPlan:
        policy = engine.policy if engine.drawn_by_builder else None
        return DrawPlan(self.num_augmentations, policy, self.alpha, self.lam, self.mix)

    def _guess_and_mix(
        self,
        views: Views,
        build_again: Callable[[], Views],
        y: Tensor,
        model: Model,
        mixup: MixUpParams,
    ) -> MixMatchBatch:
        """Lines 7-14 of Algorithm 1: guess, sharpen, label all rows, shuffle and mix them.

        Called without gradients: none flows through a batch.
        """
        views, logits = self._guess(views, build_again, model)  # line 7
        check_device("y", y, "logits", logits)

        def targets(params: MixUpParams | None) -> Tensor:  # lines 8, 10 and 11
            temperature = as_temperature(self.temperature)
            smoothing = as_smoothing(self.label_smoothing)
            return _unchecked.batch_targets(y, logits, temperature, smoothing, params, self.impl)

        workspaces = self._workspaces
        out = self._output(mixup.lam.shape[0], views.unlabelled, workspaces) if workspaces else None
        inputs, mixed_targets = views.mix(mixup, targets, out, self.impl)  # lines 12-14
        step = self.step.clone()
        self.step.add_(1)
        return MixMatchBatch(inputs, mixed_targets, y.shape[0], step, mixup)

    def _guess(
        self, views: Views, build_again: Callable[[], Views], model: Model
    ) -> tuple[Views, Tensor]:
        """Guess on the views; return them as they were before, whatever the model wrote into them.

        Guesses keep a copy until a first one was looked at, and if any was seen to write. Else
        tensors count what is written into them, and views that were changed are built again.
        """
        shown = views.unlabelled
        if not views.mixes_unlabelled:
            return views, self._logits_of_views(shown, model)
        count = count_of_writes(shown)
        kept = views.copy() if count is None or self._keeps_views(shown) else None
        logits = self._logits_of_views(shown, model)
        if count is not None and count_of_writes(shown) != count:
            self._model_writes = True
            if kept is None:
                # logits may lie in the views, which may be built again in the same memory
                logits, kept = logits.clone(), build_again()
        elif count is not None and kept is not None and self._model_writes is None:
            self._looks.difference(shown, kept.unlabelled, self._judge_model)
        return views if kept is None else kept, logits

    def _logits_of_views(self, views: Tensor, model: Model) -> Tensor:
        passes = 1 if self.guess_forward == "joint" else self.num_augmentations
        return self._guess_logits(views, model, self.num_augmentations, passes)
