"""What all loops read: their share of the images, lines of padded ones, taps and room of a blur."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu_mixmatch.impl.eager.cut import Regions
from gpu_mixmatch.impl.eager.filters import gaussian
from gpu_mixmatch.impl.numba.loops import lines_at_once
from gpu_mixmatch.types import PaddingMode


def shares(
    counts: Sequence[int], num_rows: int, part: int, num_parts: int
) -> Iterator[tuple[int, int, int, tuple[int, int]]]:
    """Return what a part does of each source: first row, views per image, source, images."""
    row = 0
    for number, count in enumerate(counts):
        is_last = number == len(counts) - 1
        num_views = (num_rows - row) // max(count, 1) if is_last else 1
        share = count * part // num_parts, count * (part + 1) // num_parts
        yield row, num_views, number, share
        row += num_views * count


def stacked(regions: Regions | None) -> Any:
    """Put regions into one array, ``[R, 4]`` int64; ``[0, 4]`` where there are none."""
    if regions is None:
        return np.empty((0, 4), np.int64)
    return torch.stack(regions, dim=1).long().numpy()


def half_kernels(sigma: Tensor, radius: int) -> Tensor:
    """Taps at distance 0, 1, .. of each row's blur, ``[R, 1 + radius]``."""
    if radius == 0:
        return sigma.new_ones(len(sigma), 1)
    return gaussian(sigma, radius)[:, radius:].contiguous()


def blur_scratch(height: int, width: int, radius: int) -> int:
    """How many floats `loops.blur_plane` needs."""
    lines = int(lines_at_once(height, width))
    return (height + 2 * radius + lines) * width + 2 * lines * (width + 2 * radius)


@lru_cache(maxsize=32)
def line_tables(height: int, width: int, padding: int, padding_mode: PaddingMode) -> Any:
    """Lines and columns that a padded image repeats, ``[n + 2·padding]``, -1 for zeros."""
    tables = []
    for size in (height, width):
        line = np.arange(-padding, size + padding)
        if padding_mode == "reflect":
            line = _reflected(size, padding).astype(np.int64)
        elif padding_mode == "edge":
            line = line.clip(0, size - 1)
        else:
            line = np.where((line >= 0) & (line < size), line, -1)
        tables.append(line)
    return tuple(tables)


@lru_cache(maxsize=32)
def blur_tables(height: int, width: int, radius: int) -> Any:
    """Lines and columns of an axis that is reflected at both ends, ``[n + 2·radius]``."""
    return _reflected(height, radius), _reflected(width, radius)


def _reflected(size: int, beyond: int) -> Any:
    """The pixel that lies at -beyond .. size - 1 + beyond, the edge not repeated."""
    period = max(2 * (size - 1), 1)
    position = np.arange(-beyond, size + beyond) % period
    return np.minimum(position, period - position).clip(0, size - 1).astype(np.uint64)
