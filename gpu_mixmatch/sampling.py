"""All randomness of the package: pure functions of (seed, step, sample id, view, purpose).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the seed
as key and the counter (sample id low, sample id high, step, view·256 + purpose). The draws are a
few hundred integers a batch: numpy makes them on the host in a fraction of a millisecond, and
`pack` and `to_device` send all of them in one copy.
"""

import sys
from collections.abc import Iterator, Sequence
from enum import IntEnum
from functools import lru_cache
from math import isqrt
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.polynomial import Chebyshev, Polynomial
from numpy.typing import NDArray
from torch import Tensor

from gpu_mixmatch.types import AugmentParams, AugmentPolicy, LamMode, MixMode, MixUpParams

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


_MASK = np.uint64(0xFFFF_FFFF)
_SHIFT32 = np.uint64(32)
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

    References:
        Salmon et al. 2011; Random123's known-answer vectors hold it in the tests.
    """
    key = np.array([seed & 0xFFFF_FFFF, seed >> 32], dtype=np.uint64)
    keys = ((key + _ROUNDS * _WEYL) & _MASK).astype(np.uint32)[:, :, None]  # [10, 2, 1]
    even, odd = counter[0::2].astype(np.uint32), counter[1::2].astype(np.uint32)
    for round_key in keys:
        halves = np.multiply(even, _MULTIPLIERS, dtype=np.uint64).view(np.uint32)[::-1]
        even = halves[:, _HIGH::2] ^ odd
        even ^= round_key
        odd = halves[:, 1 - _HIGH :: 2]
    return np.stack([even[0], odd[0], even[1], odd[1]]).astype(np.uint64)


def draw_augment(
    seed: int,
    step: int,
    ids: Tensor | int,
    views: int | Sequence[int],
    *,
    padding: int = 0,
    zoom_px: tuple[int, int] = (0, 0),
    flip: float = 0.0,
    blur_sigma: tuple[float, float] | None = None,
) -> AugmentParams:
    """Draw the augmentation of some views of some images.

    A sample's draw depends on its id and the view, never on the batch that it sits in.

    Args:
        seed: The key, 0 ≤ seed < 2^63.
        step: The training step, 0 ≤ step < 2^32.
        ids: Sample ids, ``[M]`` int64; an integer M stands for 0 .. M - 1.
        views: The views to draw: 0 is the labelled one, 1..K the unlabelled ones.
        padding: Pixels of padding; offsets are uniform on 0 .. 2·padding.
        zoom_px: Least and most pixels to cut per side, inclusive.
        flip: Probability of a mirror image.
        blur_sigma: Least and greatest standard deviation of the blur in pixels; None is no blur.

    Returns:
        Parameters of V·M rows on the CPU, view-major: all images of the first view come first.

    Raises:
        ValueError: If the seed, the step or the ids are out of range.
    """
    rows = _rows([(ids, views)])
    policy = AugmentPolicy(padding, zoom_px, flip, blur_sigma)
    words = _draw_words(seed, step, 1, _augment_requests(rows, policy))
    return AugmentParams(*map(torch.from_numpy, _of_step(_augment_arrays(words, policy), 0)))


def draw_mixup(
    seed: int,
    step: int,
    ids_x: Tensor | int,
    ids_u: Tensor | int,
    *,
    num_augmentations: int = 2,
    alpha: float = 0.75,
    lam: LamMode = "sample",
    mix: MixMode = "all",
) -> MixUpParams:
    """Draw λ' and the partner of every row of W = [x; u_1; ..; u_K].

    λ' = max(λ, 1 - λ) with λ ~ Beta(α, α) comes from one uniform through the quantile function.
    The partners are a keyed bijection of the positions, computed without sorting.

    Args:
        seed: The key, 0 ≤ seed < 2^63.
        step: The training step, 0 ≤ step < 2^32.
        ids_x: Labelled sample ids, ``[B]`` int64; an integer B stands for 0 .. B - 1.
        ids_u: Unlabelled sample ids, ``[M]`` int64; an integer M stands for 0 .. M - 1.
        num_augmentations: K.
        alpha: The Beta parameter α, in [0.05, 1000].
        lam: "sample" draws one λ per row (the paper), "batch" one for all rows.
        mix: Which rows meet: "all" (the paper), X with X and U with U ("separate"), only one of
            the two parts within itself ("labelled", "unlabelled"), or "none". Rows that are not
            mixed have λ' = 1 and themselves as partner.

    Returns:
        λ' and partners of N = B + K·M rows, on the CPU.

    Raises:
        ValueError: If the seed, the step, the ids or α are out of range.

    References:
        Berthelot et al. 2019, eq. 8-9 and Algorithm 1 line 12. For the bijection: Black and Rogaway
        2002 (generalised Feistel network with cycle walking); Mitchell et al. 2021.
    """
    _, mixup = draw_batch(
        seed,
        step,
        ids_x,
        ids_u,
        num_augmentations=num_augmentations,
        policy=None,
        alpha=alpha,
        lam=lam,
        mix=mix,
    )
    return mixup


def draw_batch(
    seed: int,
    step: int,
    ids_x: Tensor | int,
    ids_u: Tensor | int,
    *,
    num_augmentations: int = 2,
    policy: AugmentPolicy | None = None,
    alpha: float = 0.75,
    lam: LamMode = "sample",
    mix: MixMode = "none",
) -> tuple[AugmentParams | None, MixUpParams]:
    """Draw all that a batch needs in one pass: `draw_augment` of W, if asked for, and `draw_mixup`.

    The labelled images are view 0, the unlabelled ones views 1..K.

    Returns:
        Parameters of N = B + K·M rows, on the CPU; None where there is no policy.
    """
    for name, choice, kind in (("lam", lam, LamMode), ("mix", mix, MixMode)):
        if choice not in get_args(kind):
            raise ValueError(f"{name} must be one of {list(get_args(kind))}, got {choice!r}")
    rows = _rows([(ids_x, 0), (ids_u, range(1, num_augmentations + 1))])
    switches = (_length(ids_x), policy, alpha, lam, mix)
    if isinstance(ids_x, int) and isinstance(ids_u, int):
        check_key(seed, step)
        ahead = max(1, min(16, 1536 // max(len(rows.low), 1)))  # arrays of at most 128 KiB
        block, number = divmod(step, ahead)
        arrays = _drawn_ahead(seed, block * ahead, ahead, rows, *switches)
    else:
        number, arrays = 0, _batch_arrays(seed, step, 1, rows, *switches)
    augment, mixup = arrays
    return (
        AugmentParams(*map(torch.from_numpy, _of_step(augment, number))) if augment else None,
        MixUpParams(*map(torch.from_numpy, _of_step(mixup, number))),
    )


def epoch_order(seed: int, epoch: int, length: int, *, view: int = 0) -> Tensor:
    """Return the order in which an epoch visits a data set, a keyed permutation.

    Args:
        seed: The key, 0 ≤ seed < 2^63.
        epoch: The epoch's number, 0 ≤ epoch < 2^32.
        length: Number of samples.
        view: 0 for the labelled stream, 1 for the unlabelled one, so that they differ.

    Returns:
        Indices, ``[length]`` int64, on the CPU.
    """
    if length < 0:
        raise ValueError(f"length must be at least 0, got {length}")
    if not 0 <= epoch < 2**32:
        raise ValueError(f"epoch must be an integer in [0, 2**32), got {epoch}")
    words = _draw_words(seed, epoch, 1, [(_shuffle_rows(length, view), Purpose.EPOCH)])
    return torch.from_numpy(_bijection(next(words), length)[0])


def to_device(packed: Tensor, device: torch.device) -> Tensor:
    """Send packed draws to ``device`` in one copy of 44 bytes a row; a CPU gets them as is."""
    if device.type == "cuda":
        packed = packed.pin_memory()
    return packed.to(device, non_blocking=True)


def pack(augment: AugmentParams | None, mixup: MixUpParams) -> Tensor:
    """Put a batch's draws into one tensor of 4-byte words, ``[11·N]`` or ``[3·N]`` int32."""
    tensors = [mixup.index, mixup.lam, *(augment or ())]  # int64 first: it stays aligned
    return torch.cat([tensor.contiguous().view(-1).view(torch.int32) for tensor in tensors])


_WORDS = (2, 1, 1, 1, 1, 4, 1)  # per row: index, lam, then the fields of AugmentParams


def words_per_row(*, with_augment: bool) -> int:
    """Length of packed draws in words, per row."""
    return sum(_WORDS if with_augment else _WORDS[:2])


def unpack(
    packed: Tensor, num_rows: int, *, with_augment: bool
) -> tuple[AugmentParams | None, MixUpParams]:
    """View the words of N rows as draws, as `pack` put them."""
    words = _WORDS if with_augment else _WORDS[:2]
    index, lam, *rest = torch.split(packed, [size * num_rows for size in words])
    mixup = MixUpParams(lam.view(torch.float32), index.view(torch.int64))
    if not with_augment:
        return None, mixup
    top, left, flip, zoom, sigma = rest
    return AugmentParams(top, left, flip, zoom.view(num_rows, 4), sigma.view(torch.float32)), mixup


def augment_to_device(params: AugmentParams, device: torch.device) -> AugmentParams:
    """Send the draws of an augmentation alone to ``device``."""
    return AugmentParams(*(tensor.to(device, non_blocking=True) for tensor in params))


def generator_seed(seed: int, step: int) -> int:
    """Return a 64-bit seed for a foreign generator, a function of (seed, step)."""
    (words,) = _draw_words(seed, step, 1, [(_position_rows(((1, (0,)),)), Purpose.FOREIGN)])
    return int(words[0, 0, 0]) | int(words[1, 0, 0]) << 32


def batch_seed(seed: int, step: int, ids_x: Tensor | int, ids_u: Tensor | int) -> int:
    """Return a 64-bit seed for a foreign generator that draws for a whole batch by position.

    The first ids of x and u enter it, so that the ranks of a distributed run, whose batches begin
    with different positions or images, do not draw alike; no other id does.
    """
    firsts = np.array([_first(ids_x), _first(ids_u)]).view(np.uint64)
    counter = np.concatenate([firsts & _MASK, firsts >> _SHIFT32])
    words = philox(counter[:, None], generator_seed(seed, step))
    return int(words[0, 0]) | int(words[1, 0]) << 32


def _first(ids: Tensor | int) -> int:
    """The first id; an integer M stands for 0 .. M - 1."""
    return 0 if isinstance(ids, int) or len(ids) == 0 else int(ids[0])


class _Rows:
    """Counter words of some rows, each ``[R]`` uint64: ids, low and high, and view · 256.

    Hashed by identity, so that what was drawn ahead is found by the rows that it was drawn for.
    """

    def __init__(self, low: Words, high: Words, view: Words) -> None:
        self.low = low
        self.high = high
        self.view = view


def _length(ids: Tensor | int) -> int:
    return ids if isinstance(ids, int) else len(ids)


def _rows(parts: list[tuple[Tensor | int, int | Sequence[int]]]) -> _Rows:
    if all(isinstance(ids, int) for ids, _ in parts):
        return _position_rows(
            tuple((ids, (v,) if isinstance(v, int) else tuple(v)) for ids, v in parts)
        )
    return _id_rows(
        [
            (torch.arange(ids) if isinstance(ids, int) else ids, (v,) if isinstance(v, int) else v)
            for ids, v in parts
        ]
    )


@lru_cache(maxsize=16)
def _position_rows(parts: tuple[tuple[int, tuple[int, ...]], ...]) -> _Rows:
    return _id_rows([(torch.arange(length), views) for length, views in parts])


def _id_rows(parts: Sequence[tuple[Tensor, Sequence[int]]]) -> _Rows:
    for ids, _ in parts:
        if ids.dim() != 1 or ids.dtype != torch.int64:
            raise ValueError(f"ids must be [M] int64, got {list(ids.shape)} {ids.dtype}")
    words = np.concatenate(
        [np.tile(ids.cpu().numpy().view(np.uint64), len(views)) for ids, views in parts]
    )
    view = np.concatenate(
        [np.repeat(np.array(views, dtype=np.uint64), len(ids)) for ids, views in parts]
    )
    view *= np.uint64(256)
    return _Rows(words & _MASK, words >> _SHIFT32, view)


Arrays = tuple[NDArray[Any], ...]  # of the fields of AugmentParams or MixUpParams, ``[S, R, ...]``


@lru_cache(maxsize=4)
def _drawn_ahead(
    seed: int, step: int, num_steps: int, rows: _Rows, *switches: Any
) -> tuple[Arrays | None, Arrays]:
    """Draw some steps at once: numpy's time goes into calls, not into a few hundred integers."""
    return _batch_arrays(seed, step, num_steps, rows, *switches)


def _batch_arrays(
    seed: int,
    step: int,
    num_steps: int,
    rows: _Rows,
    num_labelled: int,
    policy: AugmentPolicy | None,
    alpha: float,
    lam: LamMode,
    mix: MixMode,
) -> tuple[Arrays | None, Arrays]:
    num_rows = len(rows.low)
    lam_rows = _position_rows(((1, (0,)),)) if lam == "batch" else rows
    shuffled = shuffled_parts(num_rows, num_labelled, mix)
    requests = _augment_requests(rows, policy) if policy else []
    requests += [(lam_rows, Purpose.LAM)] if shuffled else []
    for view, start, stop in shuffled:
        requests.append((_shuffle_rows(stop - start, view), Purpose.SHUFFLE))
    words = _draw_words(seed, step, num_steps, requests)

    augment = _augment_arrays(words, policy) if policy else None
    weight = np.ones((num_steps, num_rows), dtype=np.float32)
    index = np.tile(np.arange(num_rows), (num_steps, 1))
    if shuffled:
        lams = _folded_beta(next(words)[0], alpha)
        for _, start, stop in shuffled:
            weight[:, start:stop] = lams if lam == "batch" else lams[:, start:stop]
            index[:, start:stop] = start + _bijection(next(words), stop - start)
    return augment, (weight, index)


def _of_step(arrays: Arrays, number: int) -> Arrays:
    """One step's part, copied: what is kept for later must not change."""
    return tuple(array[number].copy() for array in arrays)


def check_key(seed: int, step: int) -> None:
    """Raise a ValueError if ``seed`` is not in [0, 2^63), or ``step`` not in [0, 2^32)."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an integer in [0, 2**63), got {seed}")
    if not 0 <= step < 2**32:
        raise ValueError(f"step must be an integer in [0, 2**32), got {step}")


def _draw_words(
    seed: int, step: int, num_steps: int, requests: Sequence[tuple[_Rows, Purpose]]
) -> Iterator[Words]:
    """Encrypt the counters of all requests in one pass; words ``[4, S, R]`` of each in turn."""
    check_key(seed, step)
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


def _below(words: Words, bound: int) -> NDArray[Any]:
    """Integers in 0 .. bound - 1."""
    return (words * np.uint64(bound)) >> _SHIFT32


def _uniform(words: Words) -> NDArray[np.float32]:
    """Multiples of 2^-24 in [0, 1)."""
    uniform: NDArray[np.float32] = (words >> np.uint64(8)).astype(np.float32) * np.float32(2**-24)
    return uniform


def _augment_requests(rows: _Rows, policy: AugmentPolicy) -> list[tuple[_Rows, Purpose]]:
    zoom = [(rows, Purpose.ZOOM)] if policy.zoom_px[1] > 0 else []
    return [(rows, Purpose.SHIFT), *zoom]


def _augment_arrays(words: Iterator[Words], policy: AugmentPolicy) -> Arrays:
    top, left, flip, sigma = next(words)
    offsets = 2 * policy.padding + 1
    flipped = (flip >> np.uint64(8)) < np.uint64(round(policy.flip * 2**24))
    least, most = policy.zoom_px
    if most > 0:
        sides = _below(next(words), most - least + 1) + np.uint64(least)
        zoom = np.moveaxis(sides, 0, -1).astype(np.int32)
    else:
        zoom = np.zeros((*flip.shape, 4), dtype=np.int32)
    low, high = policy.blur_sigma or (0.0, 0.0)
    blur = np.float32(low) + np.float32(high - low) * _uniform(sigma)
    integers = (_below(top, offsets), _below(left, offsets), flipped)
    return *(array.astype(np.int32) for array in integers), zoom, blur


def shuffled_parts(num_rows: int, num_labelled: int, mix: MixMode) -> list[tuple[int, int, int]]:
    """The parts within which rows are mixed: the shuffle's view, first row, row after the last."""
    labelled, unlabelled = (0, 0, num_labelled), (1, num_labelled, num_rows)
    parts: dict[MixMode, list[tuple[int, int, int]]] = {
        "all": [(0, 0, num_rows)],
        "separate": [labelled, unlabelled],
        "labelled": [labelled],
        "unlabelled": [unlabelled],
        "none": [],
    }
    return parts[mix]


def _folded_beta(words: Words, alpha: float) -> NDArray[np.float32]:
    """λ' = max(λ, 1 - λ), λ ~ Beta(α, α), from one word each."""
    quantile = folded_beta_quantile(alpha)
    # 1 - u, exact in float64: the tail probability of λ'
    log2_tail = np.log2(1.0 - (words >> np.uint64(8)).astype(np.float64) * 2.0**-24)
    power = np.exp2(log2_tail / alpha)
    variable = power if quantile.of_power else np.sqrt(1.0 - log2_tail)
    variable = variable * quantile.scale + quantile.shift
    ratio = np.full_like(variable, quantile.coefficients[-1])
    for coefficient in quantile.coefficients[-2::-1]:
        ratio *= variable
        ratio += coefficient
    lam: NDArray[np.float32] = np.clip(1.0 - power * ratio, 0.5, 1.0).astype(np.float32)
    return lam


class FoldedBetaQuantile(NamedTuple):
    """λ' = 1 - w^(1/α) · p(x): the quantile of max(λ, 1 - λ) at 1 - w, in float64.

    Attributes:
        coefficients: Of the polynomial p, lowest power first.
        scale, shift: x = scale · y + shift lies in [-1, 1].
        of_power: y is w^(1/α) if true, else sqrt(1 - log2 w).
    """

    coefficients: tuple[float, ...]
    scale: float
    shift: float
    of_power: bool


@lru_cache(maxsize=16)
def folded_beta_quantile(alpha: float) -> FoldedBetaQuantile:
    """Fit the quantile of max(λ, 1 - λ), λ ~ Beta(α, α), for tail probabilities w in [2^-24, 1].

    With t = 1 - λ' = 1 / (1 + e^2y) the density of y is proportional to sech(y)^(2α), which is
    smooth for every α: Gauss-Legendre sums over short intervals give w(t), and t / w^(1/α) is
    analytic in w^(1/α) at 0. For α > 1 that power crowds near 1 and sqrt(1 - log2 w), in which a
    normal tail is nearly straight, serves instead.

    Raises:
        ValueError: If α is not in [0.05, 1000], or the fit misses by more than 1e-7.
    """
    if not 0.05 <= alpha <= 1000:
        raise ValueError(f"alpha must be in [0.05, 1000], got {alpha}")
    cells = 4000
    # beyond this end the mass is below e^-20 of the least tail that is drawn
    end = min((24 * np.log(2) + 20) / (2 * alpha) + 1, 12 / np.sqrt(alpha) + 37 / alpha)
    edges = end * np.linspace(0, 1, cells + 1) ** 2  # dense where λ' is near 0.5
    nodes, weights = np.polynomial.legendre.leggauss(8)
    half = np.diff(edges)[:, None] / 2
    points = edges[:-1, None] + half * (nodes + 1)
    log_sech = np.log(2.0) - points - np.log1p(np.exp(-2 * points))
    mass = (np.exp(2 * alpha * log_sech) * weights * half).sum(axis=1)
    tail = np.cumsum(mass[::-1])[::-1]
    log2_tail = np.log2(tail / tail[0])  # at edges[:-1]
    kept = log2_tail >= -24
    log2_tail, y = log2_tail[kept], edges[:-1][kept]

    power = np.exp2(log2_tail / alpha)
    small = np.exp(-2 * y) / (1 + np.exp(-2 * y))
    variable, limits = (power, (0.0, 1.0)) if alpha <= 1 else (np.sqrt(1 - log2_tail), (1.0, 5.0))
    fit = Chebyshev.fit(variable, small / power, deg=12 if alpha <= 1 else 18, domain=limits)
    polynomial = fit.convert(kind=Polynomial, domain=limits)
    error = np.abs(polynomial(variable) * power - small).max()
    if not error < 1e-7:
        raise ValueError(f"the quantile of Beta({alpha}, {alpha}) was fitted only to {error:.1e}")
    low, high = limits
    return FoldedBetaQuantile(
        tuple(map(float, polynomial.coef)),
        2 / (high - low),
        -(high + low) / (high - low),
        alpha <= 1,
    )


@lru_cache(maxsize=64)
def shuffle_grid(length: int) -> tuple[int, int, int]:
    """Rows, columns and rounds of the Feistel network that permutes ``length`` positions.

    The grid has at least ``length`` cells, as tight as can be, and is no flatter than 4 to 1. One
    side is even: a round turns cycles of a side's length, and odd ones alone would make every
    permutation an even one. The sign of a permutation fades by half a round, so that short ones
    take 24 rounds to be uniform.
    """
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


def _bijection(words: Words, length: int) -> NDArray[np.int64]:
    """Permute 0 .. length - 1: a Feistel network on a grid, its round functions drawn by Philox.

    Position = row · columns + column. A round adds a random function of the column to the row,
    modulo the rows, the next one a random function of the row to the column. What lands on a grid
    cell at or beyond ``length`` walks on until it is inside.

    Args:
        words: Of `_shuffle_rows`, ``[4, S, blocks · values]``; round 4·block + i is word i.
        length: Number of positions.

    Returns:
        A permutation per step, ``[S, length]``.
    """
    num_steps = words.shape[1]
    start = np.tile(np.arange(length), (num_steps, 1))
    if length < 2:
        return start
    num_rows, num_columns, num_rounds = shuffle_grid(length)
    by_block = words.reshape(4, num_steps, num_rounds // 4, -1).transpose(2, 0, 1, 3)
    rounds = by_block.reshape(num_rounds, -1)
    # [rounds, S·values]: the round functions of each step as tables, one after the other
    bounds = np.tile(np.array([num_rows, num_columns], dtype=np.uint64), num_rounds // 2)
    tables = ((rounds * bounds[:, None]) >> _SHIFT32).astype(np.int64)
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
def _shuffle_rows(length: int, view: int) -> _Rows:
    """Counters of a bijection's round functions: the value as id, the block of rounds above it."""
    num_rows, num_columns, num_rounds = shuffle_grid(length)
    values, blocks = max(num_rows, num_columns), num_rounds // 4
    low = np.tile(np.arange(values, dtype=np.uint64), blocks)
    high = np.repeat(np.arange(blocks, dtype=np.uint64), values)
    return _Rows(low, high, np.full_like(low, view * 256))
