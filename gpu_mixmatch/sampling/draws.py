"""What a batch needs: draws of augmentations, of MixUp and of an epoch's order.

The draws are a few hundred integers a batch: numpy makes them on the host in a fraction of a
millisecond.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_mixmatch._validation import (
    MOST_SAMPLES,
    MOST_STEP,
    MOST_VIEW,
    as_ids,
    as_integer,
    as_pair,
    as_plan,
    as_policy,
    as_views,
    check_rows,
)
from gpu_mixmatch.sampling.beta import folded_beta
from gpu_mixmatch.sampling.chain import chain_columns, chain_requests, clear_chain
from gpu_mixmatch.sampling.philox import (
    Purpose,
    Rows,
    Words,
    below,
    check_key,
    draw_words,
    num_ids,
    position_rows,
    rows_of,
    uniform,
)
from gpu_mixmatch.sampling.shuffle import bijection, shuffle_rows, shuffled_parts
from gpu_mixmatch.types import (
    AugmentParams,
    AugmentPolicy,
    Chain,
    ChainParams,
    Cut,
    DrawPlan,
    Draws,
    LamMode,
    MixMode,
    MixUpParams,
)


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
    cut: Cut | None = None,
    chain: Chain | None = None,
) -> Draws:
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
        cut: What is cut out of the window; None is all of it.
        chain: The operations that follow; None is none.

    Returns:
        Parameters of V·M rows on the CPU, view-major: all images of the first view come first. They
        are `ChainParams` where there is a cut or a chain, else `AugmentParams`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the seed, the step, the ids or a field of the policy are out of range.
    """
    check_key(seed, step)
    ids, views = as_ids("ids", ids), as_views(views)
    check_rows("ids", num_ids(ids) * len(views))
    policy = as_policy(padding, zoom_px, flip, blur_sigma, cut, chain)
    rows = rows_of([(ids, views)])
    words = draw_words(seed, step, 1, _augment_requests(rows, policy))
    return _params(_of_step(_augment_arrays(words, policy), 0))


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
        TypeError: If an argument is of the wrong kind.
        ValueError: If the seed, the step, the ids, K or α are out of range, or a word is unknown.

    References:
        Berthelot et al. 2019, eq. 8-9 and Algorithm 1 line 12. For the bijection: Black and Rogaway
        2002 (generalised Feistel network with cycle walking); Mitchell et al. 2021.
    """
    plan = DrawPlan(num_augmentations, None, alpha, lam, mix)
    _, mixup = draw_batch(seed, step, ids_x, ids_u, plan)
    return mixup


def draw_batch(
    seed: int, step: int, ids_x: Tensor | int, ids_u: Tensor | int, plan: DrawPlan
) -> tuple[Draws | None, MixUpParams]:
    """Draw all that a batch needs in one pass: `draw_augment` of W, if asked for, and `draw_mixup`.

    The labelled images are view 0, the unlabelled ones views 1..K.

    Args:
        seed: The key, 0 ≤ seed < 2^63.
        step: The training step, 0 ≤ step < 2^32.
        ids_x: Labelled sample ids, ``[B]`` int64; an integer B stands for 0 .. B - 1.
        ids_u: Unlabelled sample ids, ``[M]`` int64; an integer M stands for 0 .. M - 1.
        plan: What is drawn.

    Returns:
        Parameters of N = B + K·M rows, on the CPU; None where the plan has no policy.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the seed, the step, the ids or the plan are out of range.
    """
    check_key(seed, step)
    seed, step, plan = int(seed), int(step), as_plan(plan)
    ids_x, ids_u = as_ids("ids_x", ids_x), as_ids("ids_u", ids_u)
    check_rows("ids_x and ids_u", num_ids(ids_x) + plan.num_augmentations * num_ids(ids_u))
    return drawn_batch(seed, step, ids_x, ids_u, plan)


def drawn_batch(
    seed: int, step: int, ids_x: Tensor | int, ids_u: Tensor | int, plan: DrawPlan
) -> tuple[Draws | None, MixUpParams]:
    """`draw_batch` of arguments that are known to be right."""
    rows = rows_of([(ids_x, 0), (ids_u, range(1, plan.num_augmentations + 1))])
    num_labelled = num_ids(ids_x)
    if isinstance(ids_x, int) and isinstance(ids_u, int):
        ahead = max(1, min(16, 1536 // max(len(rows.low), 1)))  # arrays of at most 128 KiB
        block, number = divmod(step, ahead)
        arrays = _drawn_ahead(seed, block * ahead, ahead, rows, num_labelled, plan)
    else:
        number, arrays = 0, _batch_arrays(seed, step, 1, rows, num_labelled, plan)
    augment, mixup = arrays
    return (
        _params(_of_step(augment, number)) if augment else None,
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

    Raises:
        TypeError: If an argument is no integer.
        ValueError: If an argument is out of its range.
    """
    epoch = as_integer("epoch", epoch, most=MOST_STEP)
    length = as_integer("length", length, most=MOST_SAMPLES)
    view = as_integer("view", view, most=MOST_VIEW)
    check_key(seed, epoch)
    return epoch_orders(int(seed), epoch, 1, length, view)[0]


def epoch_orders(seed: int, epoch: int, count: int, length: int, view: int) -> Tensor:
    """Return the orders of ``count`` consecutive epochs, ``[count, length]``; see `epoch_order`."""
    words = draw_words(seed, epoch, count, [(shuffle_rows(length, view), Purpose.EPOCH)])
    return torch.from_numpy(bijection(next(words), length))


_SPLIT_VIEW = 65_535  # no stream of a loader has it


def split_order(seed: int, length: int, number: int = 0) -> Tensor:
    """Return one of the orders by which a data set is split, a keyed permutation.

    Its view is reserved: a split and an epoch of the same seed have nothing to do with each other.

    Args:
        seed: The key, 0 ≤ seed < 2^63.
        length: What is put in order, of this many.
        number: Which order, 0 ≤ number < 2^32: a split of labels takes 0 for the samples and 1 for
            the classes.

    Returns:
        Indices, ``[length]`` int64, on the CPU.
    """
    number = as_integer("number", number, most=MOST_STEP)
    return epoch_order(seed, number, length, view=_SPLIT_VIEW)


def draw_regions(
    seed: int,
    step: int,
    ids_x: Tensor,
    ids_u: Tensor,
    area: tuple[float, float],
    *,
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> NDArray[np.float32]:
    """Draw the window of a random resized crop for each image.

    The labelled images are view 0 and the unlabelled ones view 1: all views of an image share it.

    Args:
        seed: The key, 0 ≤ seed < 2^63.
        step: The training step, 0 ≤ step < 2^32.
        ids_x: Labelled sample ids, ``[B]`` int64.
        ids_u: Unlabelled sample ids, ``[M]`` int64.
        area: Least and most of the image's area that a window covers, in (0, 1].
        aspect: Least and greatest width over height; its logarithm is uniform.

    Returns:
        ``[B + M, 4]`` float32: the share of the area, the aspect ratio, and where the window lies
        between top and bottom and between left and right, from 0 to 1.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the seed, the step, the ids, the area or the aspect are out of range.
    """
    check_key(seed, step)
    rows = rows_of([(as_ids("ids_x", ids_x), 0), (as_ids("ids_u", ids_u), 1)])
    area = as_pair("area", area, above=0, most=1)
    aspect = as_pair("aspect", aspect, above=0, most=1000)
    (words,) = draw_words(seed, step, 1, [(rows, Purpose.REGION)])
    uniforms = (words[:, 0] >> np.uint64(8)) * 2.0**-24  # [4, B + M] float64
    limits = np.array([area, np.log(aspect), (0, 1), (0, 1)])
    regions = limits[:, :1] + (limits[:, 1:] - limits[:, :1]) * uniforms
    regions[1] = np.exp(regions[1])
    return np.ascontiguousarray(regions.T, dtype=np.float32)


Arrays = tuple[NDArray[Any], ...]  # of the fields of Draws or MixUpParams, ``[S, R, ...]``


def _batch_arrays(
    seed: int, step: int, num_steps: int, rows: Rows, num_labelled: int, plan: DrawPlan
) -> tuple[Arrays | None, Arrays]:
    """Draw some steps at once: numpy's time goes into calls, not into a few hundred integers."""
    policy, lam = plan.policy, plan.lam
    num_rows = len(rows.low)
    lam_rows = position_rows(((1, (0,)),)) if lam == "batch" else rows
    shuffled = shuffled_parts(num_rows, num_labelled, plan.mix)
    requests = _augment_requests(rows, policy) if policy else []
    requests += [(lam_rows, Purpose.LAM)] if shuffled else []
    for view, start, stop in shuffled:
        requests.append((shuffle_rows(stop - start, view), Purpose.SHUFFLE))
    words = draw_words(seed, step, num_steps, requests)

    augment = _augment_arrays(words, policy) if policy else None
    if augment and policy and policy.chain:
        strong = strong_rows(num_rows, num_labelled, plan)
        clear_chain(augment[-1], policy.cut, policy.chain, strong)
    weight = np.ones((num_steps, num_rows), dtype=np.float32)
    index = np.tile(np.arange(num_rows), (num_steps, 1))
    if shuffled:
        lams = folded_beta(next(words)[0], plan.alpha)
        for _, start, stop in shuffled:
            weight[:, start:stop] = lams if lam == "batch" else lams[:, start:stop]
            index[:, start:stop] = start + bijection(next(words), stop - start)
    return augment, (weight, index)


def strong_rows(num_rows: int, num_labelled: int, plan: DrawPlan) -> slice:
    """Return the rows of a batch that have the operations of its policy's chain."""
    first = num_labelled if plan.weak_x else 0
    num_u = (num_rows - num_labelled) // plan.num_augmentations
    return slice(first, max(num_rows - plan.weak_views * num_u, first))


_drawn_ahead = lru_cache(maxsize=4)(_batch_arrays)


def _of_step(arrays: Arrays, number: int) -> Arrays:
    """One step's part, copied: what is kept for later must not change."""
    return tuple(array[number].copy() for array in arrays)


def _params(arrays: Arrays) -> Draws:
    """One step's arrays as tensors."""
    kind = AugmentParams if len(arrays) == len(AugmentParams._fields) else ChainParams
    return kind(*map(torch.from_numpy, arrays))


def _augment_requests(rows: Rows, policy: AugmentPolicy) -> list[tuple[Rows, int]]:
    zoom = [(rows, Purpose.ZOOM)] if policy.zoom_px[1] > 0 else []
    return [(rows, Purpose.SHIFT), *zoom, *chain_requests(rows, policy.cut, policy.chain)]


def _augment_arrays(words: Iterator[Words], policy: AugmentPolicy) -> Arrays:
    top, left, flip, sigma = next(words)
    offsets = 2 * policy.padding + 1
    flipped = (flip >> np.uint64(8)) < np.uint64(round(policy.flip * 2**24))
    least, most = policy.zoom_px
    if most > 0:
        sides = below(next(words), most - least + 1) + np.uint64(least)
        zoom = np.moveaxis(sides, 0, -1).astype(np.int32)
    else:
        zoom = np.zeros((*flip.shape, 4), dtype=np.int32)
    low, high = policy.blur_sigma or (0.0, 0.0)
    blur = np.float32(low) + np.float32(high - low) * uniform(sigma)
    integers = (below(top, offsets), below(left, offsets), flipped)
    moved = *(array.astype(np.int32) for array in integers), zoom, blur
    if not policy.cut and not policy.chain:
        return moved
    return *moved, chain_columns(words, flip.shape, policy.cut, policy.chain)
