"""The random generators that a process has one of each: seeded for a while, then put back."""

import contextlib
import os
import random
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch

_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # a thread that held it in the parent is not in the child
    os.register_at_fork(after_in_child=_renew_lock)


@contextlib.contextmanager
def kept_generators(devices: Sequence[int] = ()) -> Iterator[None]:
    """Put the global generators of torch, numpy and ``random`` back at the end.

    Threads enter one at a time, and a thread may enter again: what one draws inside, no other that
    draws inside disturbs. Whoever draws outside meanwhile cannot be held off.

    Args:
        devices: Numbers of the CUDA devices whose generators are kept beside the CPU's.
    """
    with _lock, torch.random.fork_rng(devices=devices):
        # the generator itself too, which may be of another kind than the one that takes a seed
        numpy_bits = np.random.get_bit_generator()  # type: ignore[attr-defined]
        numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
        python_state = random.getstate()
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_bit_generator(numpy_bits)  # type: ignore[attr-defined]
            np.random.set_state(numpy_state)  # noqa: NPY002


@contextlib.contextmanager
def seeded_generators(seed: int) -> Iterator[None]:
    """Seed the global generators for a while: torch's (CPU, CUDA in use), numpy's, ``random``'s.

    See `kept_generators` for threads. Generators that code owns itself (``torch.Generator``,
    ``numpy.random.default_rng``, ``random.Random``) are not among them.
    """
    # torch.manual_seed would also leave a seed to devices that are not in use yet
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count() if in_use else 0)
    with kept_generators(devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        np.random.set_bit_generator(np.random.MT19937(seed))  # type: ignore[attr-defined]
        random.seed(seed)
        yield
