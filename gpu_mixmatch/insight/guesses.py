"""GuessWatch: how sure a builder's guesses are, and how many are right."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gpu_mixmatch._validation import as_labels, came, check_kind, is_integer
from gpu_mixmatch.methods.mixmatch import MixMatch
from gpu_mixmatch.methods.passes import get_logits


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

    The guess is read off the model's own passes, so that only a softmax is computed twice. Each
    step leaves a few small tensors on the device, until the next `read`.

    Args:
        mixmatch: The builder.
        truth: The true labels of the whole unlabelled data set, ``[n]`` integers, a tensor or a
            numpy array, by sample id; the builder must then be given ``ids_u``. They are compared,
            and never trained with.

    Attributes:
        paused: Whether calls of the builder are left out.

    Raises:
        ValueError: If ``truth`` is not ``[n]`` integers; in a step, if ``ids_u`` is missing; in
            `read`, if ids lie beyond ``truth``.
        TypeError: If an argument is of the wrong kind; in a step, if the model that guesses is not
            an ``nn.Module``.
    """

    def __init__(self, mixmatch: MixMatch, truth: Tensor | None = None) -> None:
        check_kind("mixmatch", mixmatch, MixMatch, "a MixMatch")
        self.mixmatch = mixmatch
        self.truth = None if truth is None else as_truth(truth)
        self._confidences: list[Tensor] = []  # [M] of each step, on the device
        self._guesses: list[Tensor] = []  # [M] int64, likewise
        self._ids: list[Tensor] = []  # [M] int64, as they were given
        self._outputs: list[Any] = []  # of the model, in the step under way
        self._model_hook: RemovableHandle | None = None
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
            ids = torch.cat([ids.cpu() for ids in self._ids])
            if int(ids.min()) < 0 or int(ids.max()) >= len(self.truth):
                raise ValueError(
                    f"ids_u must be in 0 .. {len(self.truth) - 1}, the places in truth, got "
                    f"{int(ids.min())} .. {int(ids.max())}"
                )
            truth = self.truth[ids]
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
        guesser = call["model"] if self.mixmatch.teacher is None else self.mixmatch.teacher
        if not isinstance(guesser, nn.Module):
            raise TypeError(
                "model must be an nn.Module for its guesses to be watched, got "
                f"{type(guesser).__name__}"
            )
        if self.truth is not None:
            if call.get("ids_u") is None:
                raise ValueError(
                    "ids_u must be passed to the builder where the truth is known: "
                    "mixmatch(x, y, u, model, ids_u=ids_u)"
                )
            self._ids.append(as_labels("ids_u", call["ids_u"]))
        self._model_hook = guesser.register_forward_hook(
            lambda _module, _inputs, output: self._outputs.append(output)
        )

    def _after(self, mixmatch: nn.Module, args: Any, kwargs: Any, batch: Any) -> None:
        if self.paused:
            return
        if self._model_hook is not None:
            self._model_hook.remove()
        outputs, self._outputs = self._outputs, []
        if batch is None:  # an error is on its way to the caller
            del self._ids[len(self._guesses) :]
            return
        with torch.no_grad():
            logits = torch.cat([get_logits(o, self.mixmatch.logits_getter) for o in outputs])
            views = logits.float().view(self.mixmatch.num_augmentations, -1, logits.shape[-1])
            probs = views.softmax(dim=-1).mean(dim=0)  # [M, L]
            confidence, guess = probs.max(dim=-1)
        self._confidences.append(confidence)
        self._guesses.append(guess)


def as_truth(truth: Any) -> Tensor:
    """Return true labels as ``[n]`` integers on the CPU; see `GuessWatch`.

    Raises:
        TypeError: If they are neither a tensor nor a numpy array.
        ValueError: If they are not ``[n]`` integers.
    """
    labels = as_labels("truth", truth)
    if labels.dim() != 1 or not is_integer(labels.dtype) or labels.device.type == "meta":
        raise ValueError(f"truth must be [n] integers, got {came(labels)}")
    return labels.cpu()


_SIGNATURE = inspect.signature(MixMatch.forward)


def call_arguments(args: Any, kwargs: Any) -> dict[str, Any]:
    """Return what `MixMatch.forward` was called with, by name."""
    call = dict(_SIGNATURE.bind(None, *args, **kwargs).arguments)
    del call["self"]
    return call
