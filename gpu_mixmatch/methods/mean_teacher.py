"""MeanTeacher, and the Π-model, which is that without a teacher."""

from typing import Any

from torch import nn

from gpu_mixmatch.methods.consistency import Consistency


class MeanTeacher(Consistency):
    """Train one weak view towards what a teacher says of another.

    Both views are made by one engine, with draws of their own; targets are the teacher's
    probabilities, and every row counts. The loss is `ConsistencyLoss(lambda_u=50, loss_u="mse")`,
    its weight ramped over 0.4 of the run, as FixMatch's authors ran it as a baseline; the original
    has a weight of 100.

    Args:
        augment: Makes both views, and those of x.
        num_classes: See `Consistency`, like all others.
        teacher: An average of the model over steps, in the caller's hands; None is the model
            itself (Π-model).
        temperature: T; 1 leaves the teacher's probabilities as they are.
        threshold: Of the teacher's largest probability; None keeps every row.
        options: See `Consistency`.

    References:
        Tarvainen and Valpola 2017 (mean teachers); Laine and Aila 2017 (Π-model).
    """

    def __init__(
        self,
        augment: Any,
        num_classes: int,
        *,
        teacher: nn.Module | None = None,
        temperature: float = 1.0,
        threshold: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            *(augment, augment, num_classes),
            teacher=teacher,
            temperature=temperature,
            threshold=threshold,
            **options,
        )
