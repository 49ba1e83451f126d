"""Draws of a cut and of a chain, as whole numbers that do not depend on the size of the images.

An integer in 0 .. n - 1 is the high half of a word times n. The one number with a fraction is the
root of an area, by a square root and one product in float64, both of which round in one way.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import permutations
from math import exp, log

import numpy as np
from numpy.typing import NDArray

from gpu_mixmatch._chain import columns, entries, runs
from gpu_mixmatch.sampling.philox import SHIFT32, Purpose, Rows, Words, below
from gpu_mixmatch.types import Chain, Cut

UNIT = 2**24  # of places and areas; 2^16 is the unit of sides
NUM_ASPECTS = 1024

Integers = NDArray[np.int32]


def chain_requests(rows: Rows, cut: Cut | None, chain: Chain | None) -> list[tuple[Rows, int]]:
    """Counters of the blocks that `chain_columns` reads, in its order."""
    purposes: list[int] = [Purpose.CUT] if cut else []
    if chain and chain.shuffled:
        purposes += [Purpose.LEVELS, Purpose.ORDER]
    elif chain:
        purposes += [Purpose.SLOT + number for number in range(chain.num_slots)]
    if chain and chain.cutout:
        purposes.append(Purpose.CUTOUT)
    return [(rows, purpose) for purpose in purposes]


def chain_columns(
    words: Iterator[Words], shape: tuple[int, ...], cut: Cut | None, chain: Chain | None
) -> Integers:
    """Read the columns of `ChainParams.chain` off the words, ``[S, R, W]``."""
    found: list[NDArray[np.generic]] = []
    if cut:
        found += _cut_columns(next(words), cut)
    if chain and chain.shuffled:
        found += _shuffled_slots(next(words), next(words), chain)
    elif chain:
        found += [_slot(next(words), chain) for _ in range(chain.num_slots)]
    if chain and chain.cutout:
        found += _cutout_columns(next(words), chain.cutout)
    if not found:
        return np.zeros((*shape, 0), dtype=np.int32)
    return np.stack([column.astype(np.int32) for column in found], axis=-1)


def clear_chain(found: Integers, cut: Cut | None, chain: Chain, strong: slice) -> None:
    """Empty the slots, and the cutout, of all rows but some; ``found`` are ``[S, R, W]``."""
    at = columns(cut, chain)
    for rows in (slice(0, strong.start), slice(strong.stop, None)):
        found[:, rows, at.slots] = 0
        if chain.cutout:
            found[:, rows, at.cutout.stop - 1] = 0


def _cut_columns(words: Words, cut: Cut) -> list[NDArray[np.generic]]:
    """Height and width in 2^-16 of the image's root area, then the place down and across."""
    area, aspect, down, across = words
    if cut.area is None:
        height = width = np.zeros_like(area)
    else:
        least, most = area_limits(cut.area)
        root = np.sqrt((below(area, most - least + 1) + np.uint64(least)).astype(np.float64))
        of_height, of_width = aspect_factors(cut.aspect)
        level = below(aspect, NUM_ASPECTS).astype(np.int64)
        height, width = (
            np.maximum((root * factors[level]).astype(np.int64), 1)
            for factors in (of_height, of_width)
        )
    return [height, width, down >> np.uint64(8), across >> np.uint64(8)]


def area_limits(area: tuple[float, float]) -> tuple[int, int]:
    """Least and greatest share of an image's area, in 2^-24."""
    least, most = (max(round(share * UNIT), 1) for share in area)
    return least, most


@lru_cache(maxsize=16)
def aspect_factors(aspect: tuple[float, float]) -> NDArray[np.float64]:
    """What the root of an area in 2^-24 times this is a height, or a width, in 2^-16.

    Of aspects whose logarithms are the middles of equal parts, ``[2, NUM_ASPECTS]``.
    """
    low, high = map(log, aspect)
    logs = [low + (high - low) * (level + 0.5) / NUM_ASPECTS for level in range(NUM_ASPECTS)]
    return np.array([[16 * exp(sign * value / 2) for value in logs] for sign in (-1, 1)])


def _slot(words: Words, chain: Chain) -> Words:
    """Operation, whether it is applied, and its magnitude: words 0, 1 and 2; word 3 is free."""
    op, applied, level, _ = words
    first, count = np.array(runs(chain), dtype=np.uint64).T
    op = below(op, len(chain.ops)).astype(np.int64)
    entry = first[op] + ((level * count[op]) >> SHIFT32)
    return np.where(_happens(applied, chain.prob), entry, np.uint64(0))


def _shuffled_slots(levels: Words, words: Words, chain: Chain) -> list[Words]:
    """Every operation by a word of its magnitude; then order, whether at all, and grayscale."""
    order, applied, gray, _ = words
    first, count = np.array(runs(chain), dtype=np.uint64).reshape(-1, 2).T
    of_op = [*first[:, None, None] + ((levels[: len(first)] * count[:, None, None]) >> SHIFT32)]
    orders = shuffles(len(chain.ops))
    places = orders[below(order, len(orders)).astype(np.int64)]
    happens = _happens(applied, chain.prob)
    slots = [
        np.where(happens, np.choose(places[..., slot], of_op), np.uint64(0))
        for slot in range(len(chain.ops))
    ]
    if chain.gray > 0:
        last = np.uint64(len(entries(chain)) - 1)
        slots.append(np.where(_happens(gray, chain.gray), last, np.uint64(0)))
    return slots


@lru_cache(maxsize=8)
def shuffles(count: int) -> NDArray[np.int64]:
    """All orders of ``count`` operations, ``[count!, count]``, as one counts."""
    return np.array(list(permutations(range(count))), dtype=np.int64).reshape(-1, count)


def _cutout_columns(words: Words, cutout: int | tuple[float, float]) -> list[NDArray[np.generic]]:
    """Where the centre lies, down and across, and the side, in pixels or in 2^-16 of the width."""
    down, across, size, _ = words
    if isinstance(cutout, int):
        side = np.full_like(size, cutout)
    else:
        least, most = (round(share * 2**16) for share in cutout)
        side = below(size, most - least + 1) + np.uint64(least)
    return [down >> np.uint64(8), across >> np.uint64(8), side]


def _happens(words: Words, probability: float) -> NDArray[np.bool_]:
    happens: NDArray[np.bool_] = (words >> np.uint64(8)) < np.uint64(round(probability * UNIT))
    return happens
