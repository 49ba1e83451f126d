"""Threads for the compiled loops, which hold no lock of the interpreter."""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

# Values that are worth a thread: to wake one takes as long as to move some of these.
_LEAST_PER_THREAD = 2**19


def threads_for(num_values: int) -> int:
    return min(torch.get_num_threads(), max(1, num_values // _LEAST_PER_THREAD))


def in_threads(work: Callable[[int], None], num_threads: int) -> None:
    """Run parts 0 .. num_threads - 1 at once."""
    if num_threads == 1:
        work(0)
        return
    parts, errors = iter(range(num_threads)), []

    def run(_: object = None) -> None:
        try:
            for part in parts:  # whoever is free takes the next
                work(part)
        except BaseException as error:
            errors.append(error)

    team = _torch_team()
    if team is not None:
        team(_Callback(run), None, num_threads, 0)
    else:
        others = [_threads(os.getpid()).submit(run) for _ in range(num_threads - 1)]
        run()
        for other in others:
            other.result()
    if errors:
        raise errors[0]


_Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@lru_cache(maxsize=1)
def _torch_team() -> Any:
    """The entry to OpenMP's threads in torch's build for Linux, or None.

    Between two operations torch's threads keep their cores busy, waiting: others would have to
    share these.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        team = library.GOMP_parallel  # (task, its argument, number of threads, flags)
    except (OSError, AttributeError):
        return None
    team.argtypes = [_Callback, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    team.restype = None
    return team


@lru_cache(maxsize=1)
def _threads(process: int) -> ThreadPoolExecutor:
    """Threads of this process: those of a parent do not survive a fork."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="gpu_mixmatch")
