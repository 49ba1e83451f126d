"""The losses of the methods, whose unlabelled part has a weight that ramps up."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpu_mixmatch import _streams, functional
from gpu_mixmatch._validation import (
    MOST_STEP,
    as_integer,
    as_number,
    check_batch,
    check_choice,
    check_consistency_batch,
    check_remixmatch_batch,
    check_tensor,
)
from gpu_mixmatch.types import (
    ConsistencyBatch,
    ConsistencyLossOutput,
    Impl,
    LossOutput,
    MixMatchBatch,
    ReMixMatchBatch,
    ReMixMatchLossOutput,
    UnlabelledLoss,
)

Tsa = Literal["linear", "exp", "log"]


class MixMatchLoss(nn.Module):
    """Cross-entropy on X' plus λ_U times the squared error of probabilities on U'.

    The weight ramps linearly from 0 with ``batch.step``, so that the loss itself has no state. The
    defaults are the reference's, for runs of a million steps. Choose both for your own:

    - *Length.* A run much shorter than the ramp never reaches λ_U: the default ramp is at 3.7 after
      800 steps. Ramp over half of a short run, and take less λ_U, since its guesses are wrong more
      often: ``gpu-mixmatch train`` takes 75 · (steps / 32,768)^(1/3), which is 22 at 800 steps.
    - *Classes.* The squared error is a mean over the L classes, so that one image is pulled to its
      guess with λ_U / L: 7.5 for λ_U = 75 and 10 classes. For the same pull take λ_U in proportion
      to L, 15 for two classes.
    - *Collapse.* If λ_U is too strong too early, guesses confirm each other whatever the labels
      say: ``loss_u`` falls and confidence rises, while ``loss_x`` stays near log L or above and
      most images get one class. Ramp more slowly, or lower λ_U.

    Args:
        lambda_u: λ_U at the end of its ramp.
        rampup_steps: Length of the ramp in steps; 0 gives the full weight from the start. The
            reference ramps over 1024 · 1024 images, 16 384 steps of 64.
        impl: Implementation of `functional.mixmatch_loss`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``lambda_u`` or ``rampup_steps`` is negative or not finite.

    References:
        Berthelot et al. 2019, eq. 2-5 and section 4.
    """

    def __init__(
        self, lambda_u: float = 75.0, rampup_steps: int = 16_384, *, impl: Impl = "auto"
    ) -> None:
        super().__init__()
        check_choice("impl", impl, Impl)
        self.lambda_u = as_number("lambda_u", lambda_u, least=0)
        self.rampup_steps = as_integer("rampup_steps", rampup_steps, most=MOST_STEP)
        self.impl = impl

    def forward(self, logits: Tensor, batch: MixMatchBatch) -> LossOutput:
        """Compare the model's logits with the batch's targets.

        Args:
            logits: ``model(batch.inputs)``, ``[N, L]``, in batch order.
            batch: The batch that they were computed for.

        Returns:
            The loss and its parts, 0-d float32.

        Raises:
            TypeError: If an argument is of the wrong kind.
            ValueError: If ``logits`` are not ``[N, L]``.
            RuntimeError: If a CUDA graph is being captured, which would keep this step's weight.
        """
        check_batch(batch)
        check_tensor("logits", logits)
        if self.rampup_steps and batch.step.device.type == "cpu":
            _streams.refuse_capture(
                logits.device,
                "a CUDA graph would keep the weight of this step, since batch.step is on the CPU: "
                "pass batch._replace(step=...) with a step on the device, which is filled before "
                "each replay, or rampup_steps=0",
            )
        weight_u = self.lambda_u * functional.linear_rampup(batch.step, self.rampup_steps)
        return functional.mixmatch_loss(
            logits, batch.targets, batch.num_labelled, weight_u, impl=self.impl
        )

    def extra_repr(self) -> str:
        """Show the fields."""
        return f"lambda_u={self.lambda_u}, rampup_steps={self.rampup_steps}"


class ConsistencyLoss(nn.Module):
    """Cross-entropy on x plus λ_U times the weighted loss of strong views, a mean over all of them.

    Rows of weight 0 stay in the denominator, as in the references. A batch that has its guess to be
    made is labelled here, by the logits of its weak views, without gradient; that moves what the
    method learns of guesses, so that it is to be called once for each such batch.

    Args:
        lambda_u: λ_U at the end of its ramp.
        rampup_steps: Length of its linear ramp in steps; 0 gives the full weight from the start.
        loss_u: "ce", cross-entropy (FixMatch); "kl", which is less by the targets' entropy and has
            the same gradient (UDA); "mse", squared error of probabilities, mean over the classes
            (MeanTeacher).
        tsa: Training signal annealing: labelled rows whose label is predicted with a probability
            above α(1 - 1/L) + 1/L are left out, for α = t ("linear"), exp(5(t - 1)) ("exp") or
            1 - exp(-5t) ("log") after a share t of ``tsa_steps``; the mean is over the others
            (UDA). None keeps all.
        tsa_steps: Length of the run in steps, where there is a ``tsa``.
        lambda_fair: Weight of FreeMatch's fairness loss: 0.01 in the paper's code, 0.001 in USB. It
            needs a `FreeMatch` batch.
        impl: Implementation of `functional.consistency_loss`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of its range.

    References:
        Sohn et al. 2020, eq. 3-4; Xie et al. 2020, section 3 and 3.2; Wang et al. 2023, eq. 9-11.
    """

    def __init__(
        self,
        lambda_u: float = 1.0,
        rampup_steps: int = 0,
        *,
        loss_u: UnlabelledLoss = "ce",
        tsa: Tsa | None = None,
        tsa_steps: int | None = None,
        lambda_fair: float = 0.0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_choice("impl", impl, Impl)
        check_choice("loss_u", loss_u, UnlabelledLoss)
        if tsa is not None:
            check_choice("tsa", tsa, Tsa)
        if (tsa is None) != (tsa_steps is None):
            raise ValueError(
                "tsa_steps must be given with tsa, the length of the run in steps, and only then, "
                f"got tsa={tsa!r} and tsa_steps={tsa_steps}"
            )
        self.lambda_u = as_number("lambda_u", lambda_u, least=0)
        self.rampup_steps = as_integer("rampup_steps", rampup_steps, most=MOST_STEP)
        self.loss_u = loss_u
        self.tsa = tsa
        self.tsa_steps = tsa_steps
        if tsa_steps is not None:
            self.tsa_steps = as_integer("tsa_steps", tsa_steps, least=1, most=MOST_STEP)
        self.lambda_fair = as_number("lambda_fair", lambda_fair, least=0)
        self.impl = impl

    def forward(self, logits: Tensor, batch: ConsistencyBatch) -> ConsistencyLossOutput:
        """Compare the model's logits with the batch's targets, which are made first if need be.

        Args:
            logits: ``model(batch.inputs)``, a row for each, ``[N, L]``.
            batch: The batch that they were computed for.

        Returns:
            The loss and its parts, 0-d float32.

        Raises:
            TypeError: If an argument is of the wrong kind.
            ValueError: If logits and batch do not fit each other, or there is no fairness in it.
            RuntimeError: If a CUDA graph is being captured, which would keep this step's weight.
        """
        check_consistency_batch(batch)
        check_tensor("logits", logits)
        if (self.rampup_steps or self.tsa) and batch.step.device.type == "cpu":
            _streams.refuse_capture(
                logits.device,
                "a CUDA graph would keep the weight of this step, since batch.step is on the CPU: "
                "pass batch._replace(step=...) with a step on the device, which is filled before "
                "each replay, or neither rampup_steps nor tsa",
            )
        logits, batch = batch.complete(logits)
        assert batch.weights is not None
        weight_u = self.lambda_u * functional.linear_rampup(batch.step, self.rampup_steps)
        loss, loss_x, loss_u, _, kept, mean_weight = functional.consistency_loss(
            logits,
            batch.targets,
            batch.weights,
            batch.num_labelled,
            weight_u,
            loss_u=self.loss_u,
            tsa=self._tsa_threshold(batch.step, logits.shape[1]),
            impl=self.impl,
        )
        loss_fair = torch.zeros_like(loss_x)
        if self.lambda_fair:
            if batch.fairness is None:
                raise ValueError(
                    "batch.fairness must be given for lambda_fair > 0, as FreeMatch gives it, got "
                    "None"
                )
            rows = slice(batch.num_labelled, None)
            loss_fair = functional.fairness_loss(logits[rows], batch.weights[rows], batch.fairness)
            loss = loss + self.lambda_fair * loss_fair
        shares = kept.detach(), mean_weight.detach()
        return ConsistencyLossOutput(loss, loss_x, loss_u, weight_u, loss_fair, *shares)

    def _tsa_threshold(self, step: Tensor, num_classes: int) -> Tensor | None:
        if self.tsa is None or self.tsa_steps is None:
            return None
        done = functional.linear_rampup(step, self.tsa_steps)
        if self.tsa == "exp":
            done = torch.exp(5 * (done - 1))
        elif self.tsa == "log":
            done = 1 - torch.exp(-5 * done)
        return done * (1 - 1 / num_classes) + 1 / num_classes

    def extra_repr(self) -> str:
        """Show the fields."""
        shown = [f"lambda_u={self.lambda_u}", f"rampup_steps={self.rampup_steps}"]
        shown += [f"loss_u={self.loss_u!r}"]
        shown += [f"tsa={self.tsa!r}, tsa_steps={self.tsa_steps}"] if self.tsa else []
        shown += [f"lambda_fair={self.lambda_fair}"] if self.lambda_fair else []
        return ", ".join(shown)


class ReMixMatchLoss(nn.Module):
    """Cross-entropy on X', on the other mixed rows, on un-mixed ones, and of what rows show.

    Weights but that of turned rows ramp linearly from 0 with ``batch.step``. The defaults are the
    reference's for CIFAR-10 but for the turned rows, which it weighs by 0.5, and by 2 (CIFAR-10,
    over a ramp of 131,072 steps) or 3 (SVHN) with 40 labels.

    Args:
        lambda_mix: Of the mixed rows of u, at the end of the ramp.
        lambda_kl: Of the un-mixed rows, at the end of the ramp: of the cross-entropy, whose
            gradient is that of the divergence.
        lambda_rot: Of the turned rows, without a ramp. Above 0 it needs
            ``ReMixMatch(rotation=True)`` and a model that returns a pair.
        rampup_steps: Length of the ramp in steps; 0 gives the full weights from the start.
        impl: Implementation of `functional.consistency_loss`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is negative or not finite.

    References:
        Berthelot et al. 2020 (ReMixMatch), eq. 2-5.
    """

    def __init__(
        self,
        lambda_mix: float = 1.5,
        lambda_kl: float = 0.5,
        lambda_rot: float = 0.0,
        rampup_steps: int = 16_384,
        *,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_choice("impl", impl, Impl)
        self.lambda_mix = as_number("lambda_mix", lambda_mix, least=0)
        self.lambda_kl = as_number("lambda_kl", lambda_kl, least=0)
        self.lambda_rot = as_number("lambda_rot", lambda_rot, least=0)
        self.rampup_steps = as_integer("rampup_steps", rampup_steps, most=MOST_STEP)
        self.impl = impl

    def forward(
        self, logits: Tensor | tuple[Tensor, Tensor], batch: ReMixMatchBatch
    ) -> ReMixMatchLossOutput:
        """Compare what the model returns with the batch's targets.

        Args:
            logits: ``model(batch.inputs)``, a row for each, ``[N, L]``; or a pair of these and of
                logits of the quarter turns, ``[N, 4]``.
            batch: The batch that they were computed for.

        Returns:
            The loss and its parts, 0-d float32.

        Raises:
            TypeError: If an argument is of the wrong kind, or there are no logits of turns where
                there is a ``lambda_rot``.
            ValueError: If logits and batch do not fit each other, or there are no turned rows.
            RuntimeError: If a CUDA graph is being captured, which would keep this step's weights.
        """
        check_remixmatch_batch(batch)
        if isinstance(logits, tuple) and len(logits) != 2:
            raise ValueError(
                "logits must be a tensor, or a pair with rotation logits, got a tuple of "
                f"{len(logits)}"
            )
        logits, of_turns = logits if isinstance(logits, tuple) else (logits, None)
        check_tensor("logits", logits)
        if logits.dim() != 2 or len(logits) != len(batch.inputs):
            raise ValueError(
                f"logits must be [{len(batch.inputs)}, L], a row for each of batch.inputs, "
                f"got {list(logits.shape)}"
            )
        if self.rampup_steps and batch.step.device.type == "cpu":
            _streams.refuse_capture(
                logits.device,
                "a CUDA graph would keep the weights of this step, since batch.step is on the CPU: "
                "pass batch._replace(step=...) with a step on the device, which is filled before "
                "each replay, or rampup_steps=0",
            )
        ramp = functional.linear_rampup(batch.step, self.rampup_steps)
        weight_u, weight_kl = self.lambda_mix * ramp, self.lambda_kl * ramp
        rows = len(batch.targets)
        loss, loss_x, loss_u, loss_kl, _, _ = functional.consistency_loss(
            logits if rows == len(logits) else logits[:rows],
            batch.targets,
            batch.weights,
            batch.num_labelled,
            weight_u,
            num_u=batch.num_mixed - batch.num_labelled,
            share_v=self.lambda_kl / self.lambda_mix if self.lambda_mix else 0.0,
            impl=self.impl,
        )
        if not self.lambda_mix:  # of which no weight is a share
            loss = loss + weight_kl * loss_kl
        loss_rot = torch.zeros_like(loss_x)
        if self.lambda_rot:
            loss_rot = self._loss_of_turns(of_turns, batch)
            loss = loss + self.lambda_rot * loss_rot
        return ReMixMatchLossOutput(loss, loss_x, loss_u, loss_kl, loss_rot, weight_u, weight_kl)

    def _loss_of_turns(self, logits: Tensor | None, batch: ReMixMatchBatch) -> Tensor:
        if batch.rotations is None:
            raise ValueError(
                "batch.rotations must be given for lambda_rot > 0, as ReMixMatch(rotation=True) "
                "gives them, got None"
            )
        if logits is None:
            raise TypeError(
                "model must return a pair for lambda_rot > 0, (logits [N, L], rotation logits "
                "[N, 4]), got logits alone: add a linear layer to 4 beside its last one"
            )
        check_tensor("rotation logits", logits)
        if tuple(logits.shape) != (len(batch.inputs), 4):
            raise ValueError(
                f"rotation logits must be [{len(batch.inputs)}, 4], a row for each of "
                f"batch.inputs, got {list(logits.shape)}"
            )
        return F.cross_entropy(logits[len(batch.targets) :].float(), batch.rotations)

    def extra_repr(self) -> str:
        """Show the fields."""
        return (
            f"lambda_mix={self.lambda_mix}, lambda_kl={self.lambda_kl}, "
            f"lambda_rot={self.lambda_rot}, rampup_steps={self.rampup_steps}"
        )
