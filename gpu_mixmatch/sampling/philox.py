"""The counters and their words: Philox4x32-10, and what is read off its words.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, with the seed as key and the
counter (sample id low, sample id high, step, view·256 + purpose).
"""

import sys
from collections.abc import Iterator, Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_mixmatch._validation import MOST_SEED, MOST_STEP, as_ids, as_integer, came

Words = NDArray[np.uint64]  # 32-bit words, held in 64 bits so that products do not overflow


class Purpose(IntEnum):
    """What a Philox block is drawn for: the low byte of the counter's last word."""

    SHIFT = 0  # words: top, left, flip, sigma
    ZOOM = 1  # words: pixels off the top, bottom, left, right
    LAM = 2
    SHUFFLE = 3
    EPOCH = 4
    FOREIGN = 5  # the seed of an engine that has its own generator
    REGION = 6  # words: area, aspect ratio, top, left of a random resized crop
    CUT = 7  # words: area, aspect ratio, place down, place across of a view's own crop
    CUTOUT = 8  # words: centre down, centre across, side
    LEVELS = 9  # words: magnitudes of up to four operations that are shuffled
    ORDER = 10  # words: order of operations that are shuffled, whether at all, grayscale
    SLOT = 16  # words: operation, whether it is applied, magnitude; 17 .. 31 are the next slots'


MASK = np.uint64(0xFFFF_FFFF)


SHIFT32 = np.uint64(32)


_MULTIPLIERS = np.array([[0xD251_1F53], [0xCD9E_8D57]], dtype=np.uint64)


_WEYL = np.array([0x9E37_79B9, 0xBB67_AE85], dtype=np.uint64)


_ROUNDS = np.arange(10, dtype=np.uint64)[:, None]


_HIGH = 1 if sys.byteorder == "little" else 0  # where a 64-bit word keeps its high half


def philox(counter: Words, seed: int) -> Words:
    """Encrypt counters with Philox4x32-10.

    Args:
        counter: 32-bit words, ``[4, n]`` uint64.
        seed: The 64-bit key.

    Returns:
        Random 32-bit words, ``[4, n]`` uint64.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the seed is out of range, or the counters are not ``[4, n]``.

    References:
        Salmon et al. 2011; Random123's known-answer vectors hold it in the tests.
    """
    seed = as_integer("seed", seed, most=2**64 - 1)
    if not isinstance(counter, np.ndarray) or counter.dtype != np.uint64:
        raise TypeError(f"counter must be a numpy array of uint64, got {came(counter)}")
    if counter.ndim != 2 or len(counter) != 4:
        raise ValueError(f"counter must be [4, n], got {came(counter)}")
    return _encrypted(counter, seed)


def _encrypted(counter: Words, seed: int) -> Words:
    key = np.array([seed & 0xFFFF_FFFF, seed >> 32], dtype=np.uint64)
    keys = ((key + _ROUNDS * _WEYL) & MASK).astype(np.uint32)[:, :, None]  # [10, 2, 1]
    even, odd = counter[0::2].astype(np.uint32), counter[1::2].astype(np.uint32)
    for round_key in keys:
        halves = np.multiply(even, _MULTIPLIERS, dtype=np.uint64).view(np.uint32)[::-1]
        even = halves[:, _HIGH::2] ^ odd
        even ^= round_key
        odd = halves[:, 1 - _HIGH :: 2]
    return np.stack([even[0], odd[0], even[1], odd[1]]).astype(np.uint64)


def generator_seed(seed: int, step: int) -> int:
    """Return a 64-bit seed for a foreign generator, a function of (seed, step)."""
    check_key(seed, step)
    (words,) = draw_words(seed, step, 1, [(position_rows(((1, (0,)),)), Purpose.FOREIGN)])
    return int(words[0, 0, 0]) | int(words[1, 0, 0]) << 32


def batch_seed(seed: int, step: int, ids_x: Tensor | int, ids_u: Tensor | int) -> int:
    """Return a 64-bit seed for a foreign generator that draws for a whole batch by position.

    The first ids of x and u enter it, so that the ranks of a distributed run, whose batches begin
    with different positions or images, do not draw alike; no other id does.
    """
    ids_x, ids_u = as_ids("ids_x", ids_x), as_ids("ids_u", ids_u)
    firsts = np.array([_first(ids_x), _first(ids_u)]).view(np.uint64)
    counter = np.concatenate([firsts & MASK, firsts >> SHIFT32])
    words = philox(counter[:, None], generator_seed(seed, step))
    return int(words[0, 0]) | int(words[1, 0]) << 32


def _first(ids: Tensor | int) -> int:
    """The first id; an integer M stands for 0 .. M - 1."""
    return 0 if isinstance(ids, int) or len(ids) == 0 else int(ids[0])


class Rows:
    """Counter words of some rows, each ``[R]`` uint64: ids, low and high, and view · 256.

    Hashed by identity, so that what was drawn ahead is found by the rows that it was drawn for.
    """

    def __init__(self, low: Words, high: Words, view: Words) -> None:
        self.low = low
        self.high = high
        self.view = view


def num_ids(ids: Tensor | int) -> int:
    """Number of ids; an integer M stands for 0 .. M - 1."""
    return ids if isinstance(ids, int) else len(ids)


def rows_of(parts: list[tuple[Tensor | int, int | Sequence[int]]]) -> Rows:
    """Counter words of the views of some samples, view-major, the parts one after the other."""
    if all(isinstance(ids, int) for ids, _ in parts):
        return position_rows(
            tuple((ids, (v,) if isinstance(v, int) else tuple(v)) for ids, v in parts)
        )
    return _id_rows(
        [
            (
                torch.arange(ids, device="cpu") if isinstance(ids, int) else ids,
                (v,) if isinstance(v, int) else v,
            )
            for ids, v in parts
        ]
    )


@lru_cache(maxsize=16)
def position_rows(parts: tuple[tuple[int, tuple[int, ...]], ...]) -> Rows:
    """`rows_of` of positions, kept for the next call."""
    return _id_rows([(torch.arange(length, device="cpu"), views) for length, views in parts])


def _id_rows(parts: Sequence[tuple[Tensor, Sequence[int]]]) -> Rows:
    words = np.concatenate(
        [np.tile(ids.cpu().numpy().view(np.uint64), len(views)) for ids, views in parts]
    )
    view = np.concatenate(
        [np.repeat(np.array(views, dtype=np.uint64), len(ids)) for ids, views in parts]
    )
    view *= np.uint64(256)
    return Rows(words & MASK, words >> SHIFT32, view)


def check_key(seed: int, step: int) -> None:
    """Raise if ``seed`` is no integer in [0, 2^63), or ``step`` none in [0, 2^32).

    Raises:
        TypeError: If one is no integer.
        ValueError: If one is out of its range.
    """
    as_integer("seed", seed, most=MOST_SEED)
    as_integer("step", step, most=MOST_STEP)


def draw_words(
    seed: int, step: int, num_steps: int, requests: Sequence[tuple[Rows, int]]
) -> Iterator[Words]:
    """Encrypt the counters of all requests in one pass; words ``[4, S, R]`` of each in turn."""
    lengths = [len(rows.low) for rows, _ in requests]
    counter = np.empty((4, num_steps, sum(lengths)), dtype=np.uint64)
    counter[2] = np.arange(step, step + num_steps, dtype=np.uint64)[:, None]
    stops = np.cumsum(lengths).tolist()
    parts = [slice(stop - length, stop) for length, stop in zip(lengths, stops, strict=True)]
    for part, (rows, purpose) in zip(parts, requests, strict=True):
        counter[0, :, part] = rows.low
        counter[1, :, part] = rows.high
        counter[3, :, part] = rows.view + np.uint64(purpose)
    words = philox(counter.reshape(4, -1), seed).reshape(counter.shape)
    return iter([words[:, :, part] for part in parts])


def below(words: Words, bound: int) -> NDArray[Any]:
    """Integers in 0 .. bound - 1."""
    return (words * np.uint64(bound)) >> SHIFT32


def uniform(words: Words) -> NDArray[np.float32]:
    """Multiples of 2^-24 in [0, 1)."""
    uniform: NDArray[np.float32] = (words >> np.uint64(8)).astype(np.float32) * np.float32(2**-24)
    return uniform
