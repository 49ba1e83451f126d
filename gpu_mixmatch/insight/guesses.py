"""GuessWatch: how sure a builder's guesses are, and how many are right."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gpu_mixmatch.methods.mixmatch import MixMatch


class GuessQuality(NamedTuple):
    """How good the guessed labels of some steps were.

    Attributes:
        confidence: Mean of the largest class probability of a guess, before sharpening.
        accuracy: Share of guesses whose most probable class is the true one, in [0, 1]; None where
            the truth is not known.
        num_guesses: Number of images that were guessed.
    """

    confidence: float
    accuracy: float | None
    num_guesses: int


class GuessWatch:
    """Watch what a builder guesses; only `read` waits for the device.

    The guess is read off the builder's own passes, so that only a softmax is computed twice. Each
    step leaves a few small tensors on the device, until the next `read`.

    Args:
        mixmatch: The builder.
        truth: The true labels of the whole unlabelled data set, ``[n]`` integers, by sample id;
            the builder must then be given ``ids_u``. They are compared, and never trained with.

    Attributes:
        paused: Whether calls of the builder are left out.

    Raises:
        ValueError: If ``truth`` is not ``[n]`` integers; in a step, if ``ids_u`` is missing.
    """

    def __init__(self, mixmatch: MixMatch, truth: Tensor | None = None) -> None:
        if truth is not None and (truth.dim() != 1 or truth.is_floating_point()):
            raise ValueError(f"truth must be [n] integers, got {list(truth.shape)} {truth.dtype}")
        self.mixmatch = mixmatch
        self.truth = None if truth is None else truth.cpu()
        self._confidences: list[Tensor] = []  # [M] of each step, on the device
        self._guesses: list[Tensor] = []  # [M] int64, likewise
        self._ids: list[Tensor] = []  # [M] int64, as they were given
        self._guess: tuple[Tensor, Tensor] | None = None  # of the step under way, both [M]
        self._guess_hook: RemovableHandle | None = None
        self.paused = False
        self._handles: list[RemovableHandle] = [
            mixmatch.register_forward_pre_hook(self._before, with_kwargs=True),
            # also after an error, so that the model is left as it came
            mixmatch.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def read(self) -> GuessQuality | None:
        """Return the quality of all guesses since the last call, or None if there were none.

        Only this call waits for the device.
        """
        if not self._guesses:
            return None
        confidence = torch.cat(self._confidences).mean().item()
        guesses = torch.cat(self._guesses).cpu()
        accuracy = None
        if self.truth is not None:
            truth = self.truth[torch.cat([ids.cpu() for ids in self._ids])]
            accuracy = (guesses == truth).double().mean().item()
        for values in (self._confidences, self._guesses, self._ids):
            values.clear()
        return GuessQuality(confidence, accuracy, len(guesses))

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def _before(self, mixmatch: nn.Module, args: Any, kwargs: Any) -> None:
        if self.paused:
            return
        call = call_arguments(args, kwargs)
        if self.truth is not None:
            if call.get("ids_u") is None:
                raise ValueError(
                    "ids_u must be passed to the builder where the truth is known: "
                    "mixmatch(x, y, u, model, ids_u=ids_u)"
                )
            self._ids.append(call["ids_u"].clone())  # a loader may use that memory again
        self._guess_hook = self.mixmatch.register_guess_hook(self._look)

    def _look(self, logits: Tensor) -> None:
        probs = logits.float().softmax(dim=-1).mean(dim=0)  # [M, L]
        confidence, guess = probs.max(dim=-1)
        self._guess = confidence, guess

    def _after(self, mixmatch: nn.Module, args: Any, kwargs: Any, batch: Any) -> None:
        if self.paused:
            return
        if self._guess_hook is not None:
            self._guess_hook.remove()
        guess, self._guess = self._guess, None
        if batch is None or guess is None:  # an error is on its way to the caller
            del self._ids[len(self._guesses) :]
            return
        self._confidences.append(guess[0])
        self._guesses.append(guess[1])


_SIGNATURE = inspect.signature(MixMatch.forward)


def call_arguments(args: Any, kwargs: Any) -> dict[str, Any]:
    """Return what `MixMatch.forward` was called with, by name."""
    call = dict(_SIGNATURE.bind(None, *args, **kwargs).arguments)
    del call["self"]
    return call
