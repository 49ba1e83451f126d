"""A training step of any method, as all trainers make it."""

from typing import Any

from torch import Tensor, nn

from gpu_mixmatch._validation import as_flag, came
from gpu_mixmatch.methods.base import BatchBuilder
from gpu_mixmatch.methods.passes import Model


def as_guess_first(guess_first: Any, method: BatchBuilder) -> bool:
    """Whether a step guesses before it builds; None is the order of the method's reference.

    Raises:
        TypeError: If it is no flag.
        ValueError: If the method must guess first and is not to.
    """
    if guess_first is None:
        return not method.guesses_in_loss
    first = as_flag("guess_first", guess_first)
    if not first and not method.guesses_in_loss:
        raise ValueError(
            f"guess_first must be True or None for {type(method).__name__}, whose batches are made "
            "of guesses, got False"
        )
    return first


def build(
    method: BatchBuilder, x: Tensor, y: Tensor, u: Tensor, model: Model | None, ids_u: Any
) -> Any:
    """Build the batch of a step; without a model the loss guesses."""
    guesser = () if model is None else (model,)
    # ids of u alone: where labelled images are few, one may be in a batch twice, and only
    # positions draw its copies apart
    return method(x, y, u, *guesser, ids_u=ids_u)


def check_criterion(criterion: Any) -> None:
    """Raise a TypeError if the loss is none of a batch."""
    if not isinstance(criterion, nn.Module):
        raise TypeError(
            "criterion must be a loss of batches such as MixMatchLoss or ConsistencyLoss, an "
            f"nn.Module, got {came(criterion)}"
        )
