"""CountedKey: seed and step on a device, where every draw counts the step on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class CountedKey:
    """A key that counts itself on, so that replays of a CUDA graph need nothing from the host.

    Each program of a draw has a word for the step, which it alone reads and writes: none has to
    know whether the others have read theirs. The host knows what the words hold as long as all
    draws are told to it, and writes only where something else is wanted.

    Args:
        device: Where the draws are made.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._words: Tensor | None = None
        self._there: tuple[int, int] | None = None  # None: not known

    def words(self, num_programs: int) -> Tensor:
        """The seed, then the step of each program, ``[1 + num_programs]`` int64 on the device.

        Raises:
            ValueError: If an earlier draw had another number of programs.
        """
        if self._words is None:
            self._words = torch.zeros(1 + num_programs, dtype=torch.int64, device=self._device)
        if len(self._words) != 1 + num_programs:
            raise ValueError(
                f"a counted key must serve draws of one size, of {len(self._words) - 1} programs, "
                f"got one of {num_programs}"
            )
        return self._words

    def send(self, seed: int, step: int) -> None:
        """Let the next draw be that of ``seed`` and ``step``, if it is not so by itself.

        The launches that write take the numbers along: no host memory is read later.
        """
        if self._there == (seed, step):
            return
        self._there = None
        if self._words is not None:
            self._words[0].fill_(seed)
            self._words[1:].fill_(step)
            self._there = seed, step

    @contextmanager
    def one_draw(self) -> Iterator[None]:
        """Within it a draw is made; if it fails, nobody knows whether the step was counted on."""
        there, self._there = self._there, None
        yield
        if there is not None:
            seed, step = there
            self._there = seed, step + 1
