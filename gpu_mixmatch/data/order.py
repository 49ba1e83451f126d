"""BatchOrder: which samples each step takes; KeyedLoader: what all loaders in that order share."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from gpu_mixmatch import sampling
from gpu_mixmatch._ranks import rank_and_world_size
from gpu_mixmatch._validation import (
    MOST_IMAGES,
    MOST_SAMPLES,
    MOST_SEED,
    MOST_STEP,
    as_integer,
    as_seed,
    came,
)
from gpu_mixmatch.sampling.draws import epoch_orders
from gpu_mixmatch.types import SemiSupervisedBatch

_VALUES_AT_ONCE = 2**16


class BatchOrder:
    """Which samples each step takes, and the step that comes next: all the state of a loader.

    Each data set is an endless stream: one keyed permutation of all its samples after the other,
    `sampling.epoch_order` with view 0 for the labelled and view 1 for the unlabelled one. A step
    takes the next world_size · batch_size labelled and ratio times as many unlabelled samples, and
    a rank its slice of them. A batch may reach into the next permutation, so that none is
    incomplete and no sample is left out; a data set smaller than a batch repeats within it, unless
    it is a ``ratio`` above 1 that makes it so.

    An epoch is a number of steps: ``steps_per_epoch``, or as many whole batches as the unlabelled
    data set has, at least one. What a step takes does not depend on it.

    Args:
        num_labelled: Samples of the labelled data set.
        num_unlabelled: Samples of the unlabelled data set.
        batch_size: B, labelled samples per step and rank.
        ratio: Unlabelled samples per labelled one in a step; M = ratio · B. FixMatch's μ is 7.
        steps_per_epoch: Steps in an epoch; None takes them from the unlabelled data set.
        seed: The key of the order, 0 ≤ seed < 2^63.
        rank: Of this process; None asks torch.distributed, where it is initialised.
        world_size: Number of processes, likewise.

    Attributes:
        step: Batches handed out since the beginning of training.
        generation: Of the iterator that may run. It grows where a new one begins or the step is
            set, which ends all older ones.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If a number is out of its range.
    """

    def __init__(
        self,
        num_labelled: int,
        num_unlabelled: int,
        batch_size: int,
        *,
        ratio: int = 1,
        steps_per_epoch: int | None = None,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self._asks_for_ranks = rank is None
        rank, world_size = rank_and_world_size(rank, world_size)
        self.num_labelled, self.num_unlabelled = (
            as_integer(f"the length of the {name} data set", length, least=1, most=MOST_SAMPLES)
            for name, length in (("labelled", num_labelled), ("unlabelled", num_unlabelled))
        )
        self.batch_size = as_integer("batch_size", batch_size, least=1, most=MOST_IMAGES)
        self.ratio = as_integer("ratio", ratio, least=1, most=MOST_IMAGES)
        if self.ratio * self.batch_size > MOST_IMAGES:
            raise ValueError(
                f"ratio · batch_size must be at most {MOST_IMAGES} images of a step and rank, got "
                f"{self.ratio} · {self.batch_size}"
            )
        if self.ratio > 1 and self.ratio * self.batch_size > self.num_unlabelled:
            raise ValueError(
                f"ratio must be at most {max(1, self.num_unlabelled // self.batch_size)} for "
                f"batch_size = {self.batch_size}, since there are {self.num_unlabelled} unlabelled "
                f"samples, got {self.ratio}: a step would take some of them twice"
            )
        if steps_per_epoch is None:
            per_step = self.ratio * self.batch_size * world_size
            steps_per_epoch = max(1, self.num_unlabelled // per_step)
        self.steps_per_epoch = as_integer(
            "steps_per_epoch", steps_per_epoch, least=1, most=MOST_STEP
        )
        self.seed = as_seed(seed)
        self.rank = rank
        self.world_size = world_size
        self.step = 0
        self.generation = 0

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self.step // self.steps_per_epoch

    def steps_left(self) -> range:
        """The steps from the next one to the end of its epoch.

        Raises:
            RuntimeError: If torch.distributed was initialised after the loader was made: all ranks
                would take the same samples.
        """
        now = rank_and_world_size(None, None)
        if self._asks_for_ranks and now != (self.rank, self.world_size) and now[1] > 1:
            raise RuntimeError(
                f"this loader was made for rank {self.rank} of {self.world_size}, got rank "
                f"{now[0]} of {now[1]}: make it after torch.distributed (Accelerator(), a "
                "Trainer) is initialised, or give rank and world_size"
            )
        return range(self.step, (self.epoch + 1) * self.steps_per_epoch)

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; in the midst of it already, stay there.

        Raises:
            TypeError: If ``epoch`` is no integer.
            ValueError: If ``epoch`` is out of its range.
        """
        epoch = as_integer("epoch", epoch, most=MOST_STEP // self.steps_per_epoch)
        if epoch != self.epoch:
            self.generation += 1
            self.step = epoch * self.steps_per_epoch

    def indices_x(self, step: int, num_steps: int = 1) -> Tensor:
        """Labelled samples of this rank in some steps, ``[num_steps, B]`` int64."""
        return self._indices(self.num_labelled, self.batch_size, step, num_steps, view=0)

    def indices_u(self, step: int, num_steps: int = 1) -> Tensor:
        """Unlabelled samples of this rank in some steps, ``[num_steps, M]`` int64."""
        size = self.ratio * self.batch_size
        return self._indices(self.num_unlabelled, size, step, num_steps, view=1)

    def _indices(self, length: int, size: int, step: int, num_steps: int, *, view: int) -> Tensor:
        step = as_integer("step", step, most=MOST_STEP)
        num_steps = as_integer("num_steps", num_steps, most=MOST_IMAGES)
        if self.world_size == 1:
            stream = _positions(self.seed, step * size, (step + num_steps) * size, length, view)
            return stream.view(num_steps, size)
        starts = (
            (number * self.world_size + self.rank) * size
            for number in range(step, step + num_steps)
        )
        return torch.stack(
            [_positions(self.seed, start, start + size, length, view) for start in starts]
        )


class KeyedLoader(ABC):
    """A loader whose batches are a function of (seed, step): what all loaders share.

    ``iter(loader)`` gives the batches from the current step to the end of its epoch. After a whole
    epoch that is the next one; after a loop that was left early it is the rest. The state counts
    the batches that were handed out, not those fetched ahead.
    """

    def __init__(self, order: BatchOrder) -> None:
        self.order = order

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch, the same on every rank."""
        return self.order.steps_per_epoch

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self.order.epoch

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; in the midst of it already, stay there.

        Epochs follow each other by themselves; this is for training loops that call it anyway.

        Raises:
            TypeError: If ``epoch`` is no integer.
            ValueError: If ``epoch`` is out of its range.
        """
        self.order.set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        """Return the position: the seed, the number of batches handed out, and what they are of.

        ``labelled_per_step`` and ``unlabelled_per_step`` count the samples that all ranks take.
        """
        return {"seed": self.order.seed, "step": self.order.step, **self._identity()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on after the last batch that was handed out when ``state`` was taken.

        A step is a place in the order only where lengths and samples per step are those of the
        state. ``num_workers``, the kind of loader and ``steps_per_epoch`` may differ, and as many
        processes as take the same samples together.

        Raises:
            TypeError: If ``state`` is no mapping, or an entry no integer.
            ValueError: If ``state`` is not of a loader, or of one whose steps take other samples;
                the loader stays where it was.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be what state_dict() gave, got {came(state)}")
        mine = self._identity()
        if set(state) != {"seed", "step", *mine}:
            raise ValueError(
                f"state must be of a loader, with {', '.join(['seed', 'step', *mine])}, got "
                f"{', '.join(map(str, state)) or 'nothing'}"
            )
        seed = as_integer("state['seed']", state["seed"], most=MOST_SEED)
        step = as_integer("state['step']", state["step"], most=MOST_STEP)
        theirs = {
            name: as_integer(f"state['{name}']", state[name], most=MOST_SEED) for name in mine
        }
        different = [
            f"{name} = {value} as here, got {theirs[name]}"
            for name, value in mine.items()
            if theirs[name] != value
        ]
        if different:
            raise ValueError(
                "state must be of a loader whose steps take the same samples, with "
                + "; ".join(different)
            )
        self.order.generation += 1
        self.order.seed, self.order.step = seed, step

    def _identity(self) -> dict[str, int]:
        order = self.order
        per_step = order.world_size * order.batch_size
        return {
            "num_labelled": order.num_labelled,
            "num_unlabelled": order.num_unlabelled,
            "labelled_per_step": per_step,
            "unlabelled_per_step": order.ratio * per_step,
        }

    def __iter__(self) -> Iterator[SemiSupervisedBatch]:
        self.order.generation += 1
        steps = self.order.steps_left()
        return self._hand_out(steps, self._batches(steps), self.order.generation)

    def _hand_out(
        self, steps: range, batches: Iterator[SemiSupervisedBatch], generation: int
    ) -> Iterator[SemiSupervisedBatch]:
        for step in steps:
            if generation != self.order.generation:
                raise RuntimeError(
                    "this iterator has ended: iter(loader), set_epoch or load_state_dict was "
                    "called after it was made. A loader is iterated once at a time"
                )
            batch = next(batches)
            self.order.step = step + 1
            yield batch

    @abstractmethod
    def _batches(self, steps: range) -> Iterator[SemiSupervisedBatch]:
        """Begin to fetch the batches of ``steps``, and return them one by one."""


def _positions(seed: int, start: int, stop: int, length: int, view: int) -> Tensor:
    """Return positions start .. stop - 1 of an endless row of permutations of 0 .. length - 1."""
    parts = []
    while start < stop:
        epoch, first = divmod(start, length)
        whole = (first + stop - start) // length
        if whole > 1:  # a batch of many epochs: as many of them at once as fit into a cache
            count = min(whole, max(1, _VALUES_AT_ONCE // length))
            part = epoch_orders(seed, epoch, count, length, view).view(-1)[first:]
        else:
            part = _permutation(seed, epoch, length, view)[first : first + stop - start]
        parts.append(part)
        start += len(part)
    return torch.cat(parts)  # copies even a single part: the permutation itself is kept


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int, view: int) -> Tensor:
    return sampling.epoch_order(seed, epoch, length, view=view)
