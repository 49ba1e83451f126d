"""GuessWatch: how sure a builder's guesses are, and how many are right."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gpu_mixmatch._validation import as_labels, as_number, came, check_kind, is_integer
from gpu_mixmatch.methods.base import BatchBuilder
from gpu_mixmatch.types import ConsistencyBatch, Guess

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
        return _gap(self, held_accuracy)


class WeighedGuessQuality(NamedTuple):
    """How good the guessed labels of some steps were, of a method that weighs guesses.

    Attributes:
        confidence: As in `GuessQuality`, before any alignment.
        accuracy: As in `GuessQuality`, of all guesses, kept or not.
        num_guesses: As in `GuessQuality`.
        kept: Share of the guesses whose weight is above 0.
        mean_weight: Mean weight of all guesses.
        kept_accuracy: Share of the kept guesses that are right; None where the truth is not known,
            or none was kept.
        of_classes: How many guesses were of each class, ``[L]`` int64.
        kept_of_classes: How many of them were kept, ``[L]`` int64.
        right_of_classes: How many of those are right, ``[L]`` int64; None where the truth is not
            known.
    """

    confidence: float
    accuracy: float | None
    num_guesses: int
    kept: float
    mean_weight: float
    kept_accuracy: float | None
    of_classes: Tensor
    kept_of_classes: Tensor
    right_of_classes: Tensor | None

    def gap(self, held_accuracy: float | None = None) -> float:
        """Return how far confidence lies above accuracy; see `GuessQuality.gap`."""
        return _gap(self, held_accuracy)


def _gap(quality: GuessQuality | WeighedGuessQuality, held_accuracy: Any) -> float:
    if held_accuracy is None and quality.accuracy is not None:
        return quality.confidence - quality.accuracy
    return quality.confidence - _as_accuracy(held_accuracy)


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

    The guess is read off the builder's own passes, or off the loss's, where the loss guesses, so
    that only a softmax is computed twice. Of guesses that are weighed it also counts those that are
    kept. Where the truth is known each step leaves a few small tensors, until the next `read`.

    Args:
        mixmatch: The builder, of any method.
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

    def __init__(self, mixmatch: BatchBuilder, truth: Tensor | None = None) -> None:
        check_kind("mixmatch", mixmatch, BatchBuilder, "a builder such as MixMatch or FixMatch")
        self.mixmatch = mixmatch
        self.truth = None if truth is None else as_truth(truth)
        # means so far, of the confidence and, of weighed guesses, of whether kept and of the weight
        self._means: Tensor | None = None
        self._classes: Tensor | None = None  # [2, L] guesses, and kept ones, of each class
        self._num_guesses = 0
        self._guesses: list[tuple[Tensor, Tensor | None]] = []  # classes, and whether kept, [M]
        self._ids: list[Tensor] = []  # [M] int64, as they were given
        self._warned = False
        self._guess: tuple[Tensor, Tensor] | None = None  # of the step under way, both [M]
        self._ids_u: Tensor | None = None  # likewise
        self._guess_hook: RemovableHandle | None = None
        self.paused = False
        self._handles: list[RemovableHandle] = [
            mixmatch.register_forward_pre_hook(self._before, with_kwargs=True),
            # also after an error, so that the model is left as it came
            mixmatch.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def read(self) -> GuessQuality | WeighedGuessQuality | None:
        """Return the quality of all guesses since the last call, or None if there were none.

        Only this call waits for the device.
        """
        if self._means is None:
            return None
        right = None
        if self.truth is not None:
            ids = torch.cat([ids.cpu() for ids in self._ids])
            if int(ids.min()) < 0 or int(ids.max()) >= len(self.truth):
                raise ValueError(
                    f"ids_u must be in 0 .. {len(self.truth) - 1}, the places in truth, got "
                    f"{int(ids.min())} .. {int(ids.max())}"
                )
            guessed = torch.cat([guesses for guesses, _ in self._guesses]).cpu()
            right = guessed == self.truth[ids]
        accuracy = None if right is None else right.double().mean().item()
        confidence, *means = (value.item() for value in self._means.cpu())
        quality: GuessQuality | WeighedGuessQuality
        if self._classes is None:
            quality = GuessQuality(confidence, accuracy, self._num_guesses)
        else:
            kept_accuracy = right_of_classes = None
            of_classes, kept_of_classes = self._classes.cpu()
            if right is not None:
                kept = torch.cat([kept for _, kept in self._guesses if kept is not None]).cpu()
                num_right = (right & kept).sum().item()
                kept_accuracy = num_right / int(kept.sum()) if kept.any() else None
                right_of_classes = torch.bincount(guessed[right & kept], minlength=len(of_classes))
            quality = WeighedGuessQuality(
                *(confidence, accuracy, self._num_guesses, means[0], means[1]),
                *(kept_accuracy, of_classes, kept_of_classes, right_of_classes),
            )
        self._means, self._classes, self._num_guesses = None, None, 0
        self._guesses.clear()
        self._ids.clear()
        return quality

    def compare(
        self, held_accuracy: float | None = None, *, most: float = OVERCONFIDENT
    ) -> GuessQuality | WeighedGuessQuality | None:
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
        if self.truth is not None:
            call = call_arguments(self.mixmatch, args, kwargs)
            if call.get("ids_u") is None:
                raise ValueError(
                    "ids_u must be passed to the builder where the truth is known: "
                    "mixmatch(x, y, u, model, ids_u=ids_u)"
                )
            # a copy: a loader may use that memory again
            self._ids_u = as_labels("ids_u", call["ids_u"]).clone()
        self._guess_hook = self.mixmatch.register_guess_hook(self._look)

    def _look(self, logits: Tensor) -> None:
        probs = logits.float().softmax(dim=-1).mean(dim=0)  # [M, L]
        confidence, guess = probs.max(dim=-1)
        self._guess = confidence, guess

    def _after(self, mixmatch: nn.Module, args: Any, kwargs: Any, batch: Any) -> Any:
        if self.paused:
            return None
        if self._guess_hook is not None:
            self._guess_hook.remove()
        guess, self._guess = self._guess, None
        ids, self._ids_u = self._ids_u, None
        if isinstance(batch, ConsistencyBatch) and batch.guess is not None:
            return batch._replace(guess=_WatchedGuess(self, batch.guess, ids))
        if batch is not None and guess is not None:  # else an error is on its way to the caller
            weights = batch.weights if isinstance(batch, ConsistencyBatch) else None
            self._take(guess, weights, ids)
        return None

    @torch.no_grad()
    def _take(
        self, guess: tuple[Tensor, Tensor], weights: Tensor | None, ids: Tensor | None
    ) -> None:
        """Take in the guesses of a step; weights are those of all its rows."""
        confidences, guesses = guess
        kept = None
        if weights is None:
            means = confidences.mean()[None]
        else:
            weights = weights[len(weights) - len(guesses) :]  # of the last strong views: of all
            kept = weights > 0
            means = torch.stack((confidences.mean(), kept.float().mean(), weights.mean()))
            counts = torch.stack((torch.ones_like(guesses), kept.long()))
            if self._classes is None:
                shape = 2, self.mixmatch.num_classes
                self._classes = torch.zeros(shape, dtype=torch.int64, device=guesses.device)
            self._classes.index_add_(1, guesses, counts)
        self._num_guesses += len(guesses)
        if self._means is not None:
            means = self._means.lerp(means, len(guesses) / self._num_guesses)
        self._means = means
        if ids is not None:
            self._guesses.append((guesses, kept))
            self._ids.append(ids)


class _WatchedGuess:
    """The guess of a batch that the loss makes, taken in by a watch when it is made."""

    def __init__(
        self, watch: GuessWatch, guess: Callable[[Tensor], Guess], ids: Tensor | None
    ) -> None:
        self.watch = watch
        self.guess = guess
        self.ids = ids

    def __call__(self, logits: Tensor) -> Guess:
        made = self.guess(logits)
        self.watch._look(logits[None])
        found, self.watch._guess = self.watch._guess, None
        assert found is not None
        self.watch._take(found, made.weights, self.ids)
        return made


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


def call_arguments(builder: BatchBuilder, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return what a builder was called with, by name."""
    return dict(inspect.signature(builder.forward).bind(*args, **kwargs).arguments)
