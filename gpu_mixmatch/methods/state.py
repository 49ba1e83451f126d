"""GuessState: what a method learns of guesses, in buffers that stay on the device."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from gpu_mixmatch._validation import as_number


class GuessState(nn.Module):
    """Part of a builder that remembers guesses: in buffers, which follow it and are saved.

    The buffers keep their dtypes, whatever the builder is cast to, and nothing reads them on the
    host.
    """

    def begin(self, name: str, num_classes: int) -> None:
        """Make what is remembered, for the one builder that has this as its argument ``name``.

        Raises:
            ValueError: If another builder has it: what both guess would meet in it.
        """
        if self._buffers:
            raise ValueError(
                f"{name} must be a new object for every method, since it remembers what one "
                f"guesses, got one that another has: {self}"
            )
        self.bind(num_classes)

    def bind(self, num_classes: int) -> None:
        """Make what is remembered, for L classes."""

    def keep(self, name: str, start: Tensor) -> None:
        """Remember a tensor, from ``start`` on."""
        with torch.inference_mode(False):
            self.register_buffer(name, _of_its_own(start))

    def constant(self, name: str, value: Tensor) -> None:
        """Hold a tensor that follows to other devices and is not saved."""
        with torch.inference_mode(False):
            self.register_buffer(name, _of_its_own(value), persistent=False)

    def __getattr__(self, name: str) -> Any:
        """Return a buffer; without this the type would be that of a module too."""
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


def _of_its_own(tensor: Tensor) -> Tensor:
    """A copy; floats are float32, whatever torch's default is."""
    return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)


def unit_momentum(momentum: float) -> float:
    """Return a momentum that is known to be in [0, 1)."""
    return as_number("momentum", momentum, least=0, below=1)
