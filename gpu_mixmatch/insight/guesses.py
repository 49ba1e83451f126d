"""GuessWatch: how sure a builder's guesses are, and how many are right."""

import inspect
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gpu_mixmatch._validation import as_labels, as_number, came, check_kind, is_integer
from gpu_mixmatch.methods.mixmatch import MixMatch

OVERCONFIDENT = 0.1  # a gap above it went with sets where MixMatch loses to the labels alone


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

    def gap(self, held_accuracy: float | None = None) -> float:
        """Return how far confidence lies above accuracy; below 0 where it lies under it.

        Args:
            held_accuracy: Share of held images, which have labels and are not trained on, that the
                model gets right, in [0, 1]; None takes the guesses' own accuracy.

        Raises:
            ValueError: If ``held_accuracy`` is not in [0, 1], or is None where the truth is not
                known.
        """
        if held_accuracy is None and self.accuracy is not None:
            return self.confidence - self.accuracy
        return self.confidence - _as_accuracy(held_accuracy)


def overconfidence(confidence: float, accuracy: float, images: str) -> str:
    """Say that guesses are surer than the model is right on some images, and where to read on."""
    return (
        f"guesses are {confidence:.2f} sure on average, but the model gets {accuracy:.2f} of the "
        f"{images} right: MixMatch may be training on wrong guesses, and may lose to training on "
        "the labels alone; see docs/losing.md, when MixMatch loses"
    )


def _as_accuracy(held_accuracy: Any) -> float:
    if held_accuracy is None:
        raise ValueError(
            "held_accuracy must be given where the truth of the unlabelled images is not known, "
            "got None"
        )
    return as_number("held_accuracy", held_accuracy, least=0, most=1)


class GuessWatch:
    """Watch what a builder guesses; only `read` waits for the device.

    The guess is read off the builder's own passes, so that only a softmax is computed twice. Where
    the truth is known each step leaves two small tensors, until the next `read`.

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
        TypeError: If an argument is of the wrong kind.
    """

    def __init__(self, mixmatch: MixMatch, truth: Tensor | None = None) -> None:
        check_kind("mixmatch", mixmatch, MixMatch, "a MixMatch")
        self.mixmatch = mixmatch
        self.truth = None if truth is None else as_truth(truth)
        self._confidence: Tensor | None = None  # mean so far, 0-d, on the device
        self._num_guesses = 0
        self._guesses: list[Tensor] = []  # [M] int64 of each step, on the device
        self._ids: list[Tensor] = []  # [M] int64, as they were given
        self._warned = False
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
        if self._confidence is None:
            return None
        accuracy = None
        if self.truth is not None:
            ids = torch.cat([ids.cpu() for ids in self._ids])
            if int(ids.min()) < 0 or int(ids.max()) >= len(self.truth):
                raise ValueError(
                    f"ids_u must be in 0 .. {len(self.truth) - 1}, the places in truth, got "
                    f"{int(ids.min())} .. {int(ids.max())}"
                )
            truth = self.truth[ids]
            accuracy = (torch.cat(self._guesses).cpu() == truth).double().mean().item()
        quality = GuessQuality(self._confidence.item(), accuracy, self._num_guesses)
        self._confidence, self._num_guesses = None, 0
        self._guesses.clear()
        self._ids.clear()
        return quality

    def compare(
        self, held_accuracy: float | None = None, *, most: float = OVERCONFIDENT
    ) -> GuessQuality | None:
        """`read`, and warn once if guesses are surer than the model is right on held images.

        A gap of more than 0.1 tells the data sets where MixMatch loses to the labels alone from
        those where it wins. Early in training it says little.

        Args:
            held_accuracy: As for `GuessQuality.gap`.
            most: The gap to warn above.

        Returns:
            What `read` returns.

        Raises:
            ValueError: As `GuessQuality.gap`, or if ``most`` is not in [0, 1].
        """
        most = as_number("most", most, least=0, most=1)
        images = "unlabelled images"
        if held_accuracy is not None or self.truth is None:
            held_accuracy, images = _as_accuracy(held_accuracy), "held images"
        quality = self.read()
        if quality is None or self._warned or not quality.gap(held_accuracy) > most:
            return quality
        self._warned = True
        accuracy = quality.confidence - quality.gap(held_accuracy)
        text = overconfidence(quality.confidence, accuracy, images)
        warnings.warn(text, UserWarning, stacklevel=2)
        return quality

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
            # a copy: a loader may use that memory again
            self._ids.append(as_labels("ids_u", call["ids_u"]).clone())
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
        confidences, guesses = guess
        confidence = confidences.mean()
        self._num_guesses += len(guesses)
        if self._confidence is not None:
            weight = len(guesses) / self._num_guesses
            confidence = self._confidence.lerp(confidence, weight)
        self._confidence = confidence
        if self.truth is not None:
            self._guesses.append(guesses)


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
