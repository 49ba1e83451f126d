"""MixMatchLoss: cross-entropy and squared error, the latter with a weight that ramps up."""

from torch import Tensor, nn

from gpu_mixmatch import _streams, functional
from gpu_mixmatch._validation import (
    MOST_STEP,
    as_integer,
    as_number,
    check_batch,
    check_choice,
    check_tensor,
)
from gpu_mixmatch.types import Impl, LossOutput, MixMatchBatch


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
