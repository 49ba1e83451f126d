"""A trial, not part of the package: the augmentation's last pass compiled by Numba.

Eager gathers lines of bytes, then converts, scales and adds, then mixes, each a pass over memory.
Here one pass reads the bytes of a line, and of its partner's, and writes the normalised blend.
``pip install numba``, then ``python -m benchmarks.numba_trial`` compares the two, in turns.
"""

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from numba import njit
from torch import Tensor

from gpu_mixmatch import sampling
from gpu_mixmatch.impl import eager
from gpu_mixmatch.types import AugmentParams, MixUpParams, PaddingMode, Workspace

_UNMIXED = torch.empty(0), torch.empty(0, dtype=torch.int64)
_LEAST_PER_THREAD = 2**18  # values: to wake a thread takes as long as to write some of these


@njit(nogil=True, cache=True, error_model="numpy")
def _write_lines(out, wide, starts, lam, index, scale, bias, first, last):  # type: ignore[no-untyped-def]
    """Write rows first .. last - 1 of ``out``, ``[R, planes, H, L]`` flat, from lines of ``wide``.

    Places are unsigned: the compiler then knows that no index is negative, and vectorises.
    """
    _, num_planes, num_lines = starts.shape
    factors = scale.shape[1]
    length = np.uint64(len(out) // max(starts.size, 1))
    for row in range(first, last):
        for plane in range(num_planes):
            factor, addend = scale[plane, 0], bias[plane, 0]
            for line in range(num_lines):
                to = np.uint64((row * num_planes + plane) * num_lines + line) * length
                mine = np.uint64(starts[row, plane, line])
                if len(index) == 0 and factors == 1:
                    for value in range(length):
                        out[to + value] = np.float32(wide[mine + value]) * factor + addend
                elif len(index) == 0:
                    for value in range(length):
                        read = np.float32(wide[mine + value])
                        out[to + value] = read * scale[plane, value] + bias[plane, value]
                else:
                    theirs = np.uint64(starts[index[row], plane, line])
                    weight = lam[row]
                    if factors == 1:
                        for value in range(length):
                            read = np.float32(wide[theirs + value])
                            read += weight * (np.float32(wide[mine + value]) - read)
                            out[to + value] = read * factor + addend
                    else:
                        for value in range(length):
                            read = np.float32(wide[theirs + value])
                            read += weight * (np.float32(wide[mine + value]) - read)
                            out[to + value] = read * scale[plane, value] + bias[plane, value]


def augment(
    sources: tuple[Tensor, ...],
    params: AugmentParams,
    scale: Tensor | float,
    bias: Tensor | float,
    *,
    padding: int,
    padding_mode: PaddingMode,
    zoom: bool,
    blur_radius: int,
    channels_last_in: bool,
    out: Tensor,
    workspace: Workspace | None,
    mixup: MixUpParams | None = None,
) -> None:
    """Do what `impl.eager.augment` does, with the same arguments."""
    num_rows, channels, height, width = out.shape
    if zoom or blur_radius or num_rows == 0:  # matrix products, which torch has better
        eager.augment(
            sources,
            params,
            scale,
            bias,
            padding=padding,
            padding_mode=padding_mode,
            zoom=zoom,
            blur_radius=blur_radius,
            channels_last_in=channels_last_in,
            out=out,
            workspace=workspace,
            mixup=mixup,
        )
        return
    workspace = workspace or Workspace()
    channels_last = not out.is_contiguous()
    planes, values = (1, channels) if channels_last else (channels, 1)
    wide, starts = eager.line_windows(
        sources, params, height, width, planes, values, padding, padding_mode, channels_last_in,
        workspace,
    )  # fmt: skip
    if wide.dtype != torch.uint8:
        wide = wide.float()
    target = out.permute(0, 2, 3, 1) if channels_last else out
    if out.dtype != torch.float32:  # which numpy has not, or computes slowly
        target = workspace.empty("float views", tuple(target.shape), torch.float32, out.device)
    factors = [_per_value(factor, planes, width, values) for factor in (scale, bias)]
    mixed = (mixup.lam, mixup.index) if mixup else _UNMIXED
    arrays = [
        tensor.numpy() for tensor in (target.view(-1), wide.view(-1), starts, *mixed, *factors)
    ]
    num_threads = min(torch.get_num_threads(), max(1, out.numel() // _LEAST_PER_THREAD))
    edges = [num_rows * part // num_threads for part in range(num_threads + 1)]
    _in_threads(lambda part: _write_lines(*arrays, edges[part], edges[part + 1]), num_threads)
    if out.dtype != torch.float32:
        out.copy_(target.permute(0, 3, 1, 2) if channels_last else target)


def _per_value(factor: Tensor | float, planes: int, width: int, values: int) -> Tensor:
    """A factor per plane, ``[planes, 1]``, or per value of a line, ``[1, W·values]``."""
    if not isinstance(factor, Tensor):
        return torch.full((planes, 1 if values == 1 else width * values), factor)
    factor = factor.float()
    return factor[:, None].contiguous() if values == 1 else factor.repeat(width)[None]


def _in_threads(work: Callable[[int], None], num_threads: int) -> None:
    """Run parts 0 .. num_threads - 1 at once, the last one in this thread."""
    others = [_threads(os.getpid()).submit(work, part) for part in range(num_threads - 1)]
    work(num_threads - 1)
    for other in others:
        other.result()


@lru_cache(maxsize=1)
def _threads(process: int) -> ThreadPoolExecutor:
    """Threads of this process: those of a parent do not survive a fork."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="gpu_mixmatch")


def compare(size: int, batch_size: int, num_threads: int, rounds: int = 30) -> str:
    """Time views of u and mixed inputs, W and its mixing for eager; check that both are equal."""
    torch.set_num_threads(num_threads)
    generator = torch.Generator().manual_seed(0)
    x, u = (
        torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8, generator=generator)
        for _ in range(2)
    )
    draws = sampling.draw_augment(0, 0, 3 * batch_size, 0, padding=4, flip=0.5)
    of_u = AugmentParams(*(draw[batch_size:] for draw in draws))
    mixup = sampling.draw_mixup(0, 0, batch_size, batch_size)
    workspace, scratch = Workspace(), Workspace()
    views, mixed, other, guessed = (
        torch.empty(rows * batch_size, 3, size, size) for rows in (3, 3, 3, 2)
    )
    arguments = {"padding": 4, "padding_mode": "reflect", "zoom": False, "blur_radius": 0}
    arguments |= {"channels_last_in": False, "workspace": workspace}

    def by_eager() -> None:
        eager.augment((x, u), draws, 1 / 127.5, -1.0, **arguments, out=views)
        eager._blend(views.view(len(views), -1), mixup, mixed.view(len(views), -1))

    def by_numba() -> None:
        compiled = {**arguments, "workspace": scratch}
        augment((u,), of_u, 1 / 127.5, -1.0, **compiled, out=guessed)
        augment((x, u), draws, 1 / 127.5, -1.0, **compiled, out=other, mixup=mixup)

    seconds: dict[str, list[float]] = {"eager": [], "numba": []}
    for number in range(rounds + 3):
        for name, build in (("eager", by_eager), ("numba", by_numba)):
            start = time.perf_counter()
            build()
            if number >= 3:
                seconds[name].append(time.perf_counter() - start)
    torch.testing.assert_close(other, mixed, atol=4e-6, rtol=0)
    torch.testing.assert_close(guessed, views[batch_size:], atol=4e-6, rtol=0)
    times = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    return (
        f"{size} px, {batch_size} + {batch_size}, {num_threads} threads: eager "
        f"{times['eager']:.2f} ms, numba {times['numba']:.2f} ms, ratio "
        f"{times['eager'] / times['numba']:.2f}"
    )


if __name__ == "__main__":
    for threads in (1, 2):
        for size, batch_size in ((32, 64), (96, 64), (224, 16)):
            print(compare(size, batch_size, threads), flush=True)
