"""A keyed bijection of positions, without sorting: a Feistel network on a grid."""

from functools import lru_cache
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from gpu_mixmatch._validation import MOST_SAMPLES, as_integer, check_choice
from gpu_mixmatch.sampling.philox import SHIFT32, Rows, Words
from gpu_mixmatch.types import MixMode


def shuffled_parts(num_rows: int, num_labelled: int, mix: MixMode) -> list[tuple[int, int, int]]:
    """The parts within which rows are mixed: the shuffle's view, first row, row after the last.

    Raises:
        TypeError: If a number is no integer.
        ValueError: If a number is negative, or ``mix`` is unknown.
    """
    num_rows = as_integer("num_rows", num_rows)
    num_labelled = as_integer("num_labelled", num_labelled, most=num_rows)
    check_choice("mix", mix, MixMode)
    labelled, unlabelled = (0, 0, num_labelled), (1, num_labelled, num_rows)
    parts: dict[MixMode, list[tuple[int, int, int]]] = {
        "all": [(0, 0, num_rows)],
        "separate": [labelled, unlabelled],
        "labelled": [labelled],
        "unlabelled": [unlabelled],
        "none": [],
    }
    return parts[mix]


def shuffle_grid(length: int) -> tuple[int, int, int]:
    """Rows, columns and rounds of the Feistel network that permutes ``length`` positions.

    The grid has at least ``length`` cells, as tight as can be, and is no flatter than 4 to 1. One
    side is even: a round turns cycles of a side's length, and odd ones alone would make every
    permutation an even one. The sign of a permutation fades by half a round, so that short ones
    take 24 rounds to be uniform.

    Raises:
        TypeError: If ``length`` is no integer.
        ValueError: If ``length`` is out of its range.
    """
    return _grid(as_integer("length", length, most=MOST_SAMPLES))


@lru_cache(maxsize=64)
def _grid(length: int) -> tuple[int, int, int]:
    num_rounds = 24 if length <= 64 else 8
    if length <= 2:
        return 1, length, num_rounds
    root = isqrt(length)
    grids = [
        (narrow, wide)
        for narrow in range(max(2, root // 2), max(2, root) + 1)
        for wide in (-(length // -narrow), -(length // -narrow) + 1)
        if narrow % 2 == 0 or wide % 2 == 0
    ]
    narrow, wide = min(grids, key=lambda grid: (grid[0] * grid[1], grid[1]))
    return narrow, wide, num_rounds


def bijection(words: Words, length: int) -> NDArray[np.int64]:
    """Permute 0 .. length - 1: a Feistel network on a grid, its round functions drawn by Philox.

    Position = row · columns + column. A round adds a random function of the column to the row,
    modulo the rows, the next one a random function of the row to the column. What lands on a grid
    cell at or beyond ``length`` walks on until it is inside.

    Args:
        words: Of `shuffle_rows`, ``[4, S, blocks · values]``; round 4·block + i is word i.
        length: Number of positions.

    Returns:
        A permutation per step, ``[S, length]``.
    """
    num_steps = words.shape[1]
    start = np.tile(np.arange(length), (num_steps, 1))
    if length < 2:
        return start
    num_rows, num_columns, num_rounds = _grid(length)
    by_block = words.reshape(4, num_steps, num_rounds // 4, -1).transpose(2, 0, 1, 3)
    rounds = by_block.reshape(num_rounds, -1)
    # [rounds, S·values]: the round functions of each step as tables, one after the other
    bounds = np.tile(np.array([num_rows, num_columns], dtype=np.uint64), num_rounds // 2)
    tables = ((rounds * bounds[:, None]) >> SHIFT32).astype(np.int64)
    table_at = np.arange(num_steps)[:, None] * (tables.shape[1] // num_steps)

    def encrypt(position: NDArray[np.int64], at: NDArray[np.int64]) -> NDArray[np.int64]:
        row, column = np.divmod(position, num_columns)
        for to_row, to_column in zip(tables[0::2], tables[1::2], strict=True):
            row = (row + to_row[column + at]) % num_rows
            column = (column + to_column[row + at]) % num_columns
        return row * num_columns + column

    position = encrypt(start, table_at)
    while (outside := position >= length).any():
        at = np.broadcast_to(table_at, position.shape)[outside]
        position[outside] = encrypt(position[outside], at)
    return position


@lru_cache(maxsize=64)
def shuffle_rows(length: int, view: int) -> Rows:
    """Counters of a bijection's round functions: the value as id, the block of rounds above it."""
    num_rows, num_columns, num_rounds = _grid(length)
    values, blocks = max(num_rows, num_columns), num_rounds // 4
    low = np.tile(np.arange(values, dtype=np.uint64), blocks)
    high = np.repeat(np.arange(blocks, dtype=np.uint64), values)
    return Rows(low, high, np.full_like(low, view * 256))
