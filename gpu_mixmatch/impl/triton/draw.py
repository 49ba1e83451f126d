"""All draws of a batch in one launch: reads the key and the ids, writes 44 bytes a row.

The same Philox counters, integers and float64 arithmetic as `gpu_mixmatch.sampling`, one row (a
view of an image) per lane.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_mixmatch import _streams, sampling
from gpu_mixmatch.impl.constants import constant
from gpu_mixmatch.impl.triton.launch import blocks, launch
from gpu_mixmatch.types import AugmentPolicy, DrawPlan

_BLOCK = 32
_SHIFT = tl.constexpr(int(sampling.Purpose.SHIFT))
_ZOOM = tl.constexpr(int(sampling.Purpose.ZOOM))
_LAM = tl.constexpr(int(sampling.Purpose.LAM))
_SHUFFLE = tl.constexpr(int(sampling.Purpose.SHUFFLE))


@triton.jit
def _encrypt(position, num_rows, num_columns, num_rounds, most_rounds, view, seed, step):
    """Send each position through the Feistel network of `sampling.shuffle.bijection`."""
    row = position // num_columns
    column = position % num_columns
    purpose = view * 256 + _SHUFFLE
    for block in range(most_rounds // 4):
        high = tl.zeros_like(position) + block
        active = block * 4 < num_rounds
        word, _, _, _ = tl.philox(seed, column, high, step, purpose)
        moved = (row + tl.umulhi(word, num_rows.to(tl.uint32)).to(tl.int32)) % num_rows
        row = tl.where(active, moved, row)
        _, word, _, _ = tl.philox(seed, row, high, step, purpose)
        moved = (column + tl.umulhi(word, num_columns.to(tl.uint32)).to(tl.int32)) % num_columns
        column = tl.where(active, moved, column)
        _, _, word, _ = tl.philox(seed, column, high, step, purpose)
        moved = (row + tl.umulhi(word, num_rows.to(tl.uint32)).to(tl.int32)) % num_rows
        row = tl.where(active, moved, row)
        _, _, _, word = tl.philox(seed, row, high, step, purpose)
        moved = (column + tl.umulhi(word, num_columns.to(tl.uint32)).to(tl.int32)) % num_columns
        column = tl.where(active, moved, column)
    return row * num_columns + column


@triton.jit
def _folded_beta(word, beta_ptr, DEGREE: tl.constexpr, OF_POWER: tl.constexpr):
    """λ' from a word, through the quantile of `sampling.folded_beta_quantile`, in float64."""
    alpha = tl.load(beta_ptr)
    scale = tl.load(beta_ptr + 1)
    shift = tl.load(beta_ptr + 2)
    one = tl.full(word.shape, 1.0, tl.float64)
    log2_tail = tl.log2(one - (word >> 8).to(tl.float64) * (1.0 / (1 << 24)))
    power = tl.exp2(log2_tail / alpha)
    if OF_POWER:
        variable = power
    else:
        variable = tl.sqrt(one - log2_tail)
    variable = variable * scale + shift
    ratio = tl.zeros_like(one) + tl.load(beta_ptr + 3 + DEGREE)
    for number in tl.static_range(DEGREE):
        ratio = ratio * variable + tl.load(beta_ptr + 2 + DEGREE - number)
    return tl.minimum(tl.maximum(one - power * ratio, 0.5), 1.0).to(tl.float32)


@triton.jit
def _counters(row, mask, ids_x_ptr, ids_u_ptr, num_x, num_u):
    """Low and high word of each row's sample id, and its view · 256: x is view 0, u 1..K."""
    labelled = row < num_x
    unlabelled = tl.maximum(row - num_x, 0)
    position = tl.where(labelled, row, unlabelled % tl.maximum(num_u, 1))
    view = tl.where(labelled, 0, 1 + unlabelled // tl.maximum(num_u, 1))
    sample = position.to(tl.int64)
    if ids_x_ptr is not None:
        ids = tl.load(ids_x_ptr + position, mask=mask & labelled, other=0)
        sample = tl.where(labelled, ids, sample)
    if ids_u_ptr is not None:
        ids = tl.load(ids_u_ptr + position, mask=mask & (row >= num_x), other=0)
        sample = tl.where(labelled, sample, ids)
    return sample.to(tl.uint32), (sample >> 32).to(tl.uint32), view.to(tl.uint32) * 256


@triton.jit
def _store_cuts(
    zoom_ptr, row, mask, seed, low, high, step, purpose, least, count, HAS_ZOOM: tl.constexpr
):
    """Store the pixels that the zoom cuts off each side: ``least`` and up to ``count`` - 1 more."""
    if HAS_ZOOM:
        word_0, word_1, word_2, word_3 = tl.philox(seed, low, high, step, purpose + _ZOOM)
    else:
        word_0 = tl.zeros_like(low)
        word_1, word_2, word_3 = word_0, word_0, word_0
    bound = tl.zeros_like(low) + count.to(tl.uint32)
    cuts_ptr = zoom_ptr + row * 4
    tl.store(cuts_ptr, least + tl.umulhi(word_0, bound).to(tl.int32), mask=mask)
    tl.store(cuts_ptr + 1, least + tl.umulhi(word_1, bound).to(tl.int32), mask=mask)
    tl.store(cuts_ptr + 2, least + tl.umulhi(word_2, bound).to(tl.int32), mask=mask)
    tl.store(cuts_ptr + 3, least + tl.umulhi(word_3, bound).to(tl.int32), mask=mask)


# A batch of another size must not be another kernel: numbers may be 1 or divisible by 16, and the
# draws, which lie in one tensor, may begin anywhere.
_NUMBERS = [
    *("seed", "step", "num_x", "num_u", "num_rows", "boundary", "most_rounds"),
    *(f"{name}_{part}" for name in ("grid_rows", "grid_columns", "num_rounds") for part in (0, 1)),
    *("num_offsets", "least_zoom", "num_zooms", "flips_below"),
]
_ANYWHERE = [
    *("key_ptr", "ids_x_ptr", "ids_u_ptr", "index_ptr", "lam_ptr"),
    *("top_ptr", "left_ptr", "flip_ptr", "zoom_ptr", "sigma_ptr"),
]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_ANYWHERE)
def draw_kernel(
    key_ptr,
    seed,
    step,
    ids_x_ptr,
    ids_u_ptr,
    beta_ptr,
    index_ptr,
    lam_ptr,
    top_ptr,
    left_ptr,
    flip_ptr,
    zoom_ptr,
    sigma_ptr,
    num_x,
    num_u,
    num_rows,
    boundary,
    grid_rows_0,
    grid_columns_0,
    num_rounds_0,
    grid_rows_1,
    grid_columns_1,
    num_rounds_1,
    most_rounds,
    num_offsets,
    least_zoom,
    num_zooms,
    flips_below,
    least_sigma,
    sigma_range,
    MIXES: tl.constexpr,
    DEGREE: tl.constexpr,
    OF_POWER: tl.constexpr,
    LAM_PER_BATCH: tl.constexpr,
    HAS_POLICY: tl.constexpr,
    HAS_ZOOM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < num_rows
    if key_ptr is not None:
        seed = tl.load(key_ptr)
        step = tl.load(key_ptr + 1)
    seed = seed.to(tl.int64)
    step = tl.zeros([BLOCK], tl.int64) + step.to(tl.int64)
    step = step.to(tl.uint32)
    low, high, purpose = _counters(row, mask, ids_x_ptr, ids_u_ptr, num_x, num_u)

    if HAS_POLICY:
        words = tl.philox(seed, low, high, step, purpose + _SHIFT)
        bound = tl.zeros([BLOCK], tl.uint32) + num_offsets.to(tl.uint32)
        tl.store(top_ptr + row, tl.umulhi(words[0], bound).to(tl.int32), mask=mask)
        tl.store(left_ptr + row, tl.umulhi(words[1], bound).to(tl.int32), mask=mask)
        flipped = (words[2] >> 8).to(tl.int32) < flips_below
        tl.store(flip_ptr + row, flipped.to(tl.int32), mask=mask)
        uniform = (words[3] >> 8).to(tl.float32) * (1.0 / (1 << 24))
        tl.store(sigma_ptr + row, least_sigma + sigma_range * uniform, mask=mask)
        _store_cuts(
            zoom_ptr, row, mask, seed, low, high, step, purpose, least_zoom, num_zooms, HAS_ZOOM
        )

    # two parts of rows, each mixed within itself or, without rounds, not at all
    first = row < boundary
    num_rounds = tl.where(first, num_rounds_0, num_rounds_1)
    mixed = mask & (num_rounds > 0)
    index = row
    lam = tl.full([BLOCK], 1.0, tl.float32)
    if MIXES:
        if LAM_PER_BATCH:
            low = tl.zeros([BLOCK], tl.uint32)
            high, purpose = low, low
        words = tl.philox(seed, low, high, step, purpose + _LAM)
        lam = tl.where(mixed, _folded_beta(words[0], beta_ptr, DEGREE, OF_POWER), lam)
        start = tl.where(first, 0, boundary)
        length = tl.where(first, boundary, num_rows - boundary)
        grid_rows = tl.where(first, grid_rows_0, grid_rows_1)
        grid_columns = tl.where(first, grid_columns_0, grid_columns_1)
        part = tl.where(first, 0, 1)
        inside = tl.where(mixed, row - start, 0)
        inside = _encrypt(
            inside, grid_rows, grid_columns, num_rounds, most_rounds, part, seed, step
        )
        outside = mixed & (inside >= length)
        while tl.max(outside.to(tl.int32), axis=0) > 0:  # cycle walking
            walked = _encrypt(
                inside, grid_rows, grid_columns, num_rounds, most_rounds, part, seed, step
            )
            inside = tl.where(outside, walked, inside)
            outside = mixed & (inside >= length)
        index = tl.where(mixed, start + inside, row)
    tl.store(index_ptr + row, index.to(tl.int64), mask=mask)
    tl.store(lam_ptr + row, lam, mask=mask)


def draw_batch(
    key: Tensor | tuple[int, int | Tensor],
    ids_x: Tensor | int,
    ids_u: Tensor | int,
    plan: DrawPlan,
    out: Tensor,
) -> None:
    num_x, num_u = (ids if isinstance(ids, int) else len(ids) for ids in (ids_x, ids_u))
    num_rows, device = num_x + plan.num_augmentations * num_u, out.device
    augment, mixup = sampling.unpack(out, num_rows, with_augment=plan.policy is not None)
    parts = {
        start: (stop - start)
        for _, start, stop in sampling.shuffled_parts(num_rows, num_x, plan.mix)
    }
    boundary = num_rows if plan.mix == "all" else num_x
    grids = [
        sampling.shuffle_grid(parts[start]) if parts.get(start) else (1, 1, 0)
        for start in (0, boundary)
    ]
    degree, of_power, beta = _beta(plan.alpha, device)
    seed, step = (0, 0) if isinstance(key, Tensor) else key
    padding, (least_zoom, most_zoom), flip, sigmas = (plan.policy or AugmentPolicy())[:4]
    low, high = sigmas or (0.0, 0.0)
    launch(
        draw_kernel,
        blocks(num_rows, _BLOCK),
        device,
        key if isinstance(key, Tensor) else None,
        seed,
        int(step),
        *_on_device((ids_x, ids_u), device),
        beta,
        mixup.index,
        mixup.lam,
        *(augment or [None] * 5),
        num_x,
        num_u,
        num_rows,
        boundary,
        *grids[0],
        *grids[1],
        max(grids[0][2], grids[1][2]),
        2 * padding + 1,
        least_zoom if most_zoom else 0,
        most_zoom - least_zoom + 1,
        round(flip * 2**24),
        low,
        high - low,
        MIXES=plan.mix != "none",
        DEGREE=degree,
        OF_POWER=of_power,
        LAM_PER_BATCH=plan.lam == "batch",
        HAS_POLICY=plan.policy is not None,
        HAS_ZOOM=most_zoom > 0,
        BLOCK=_BLOCK,
        num_warps=1,
    )


def prepare(plan: DrawPlan, device: torch.device) -> None:
    _beta(plan.alpha, device)


@constant
def _beta(alpha: float, device: torch.device) -> tuple[int, bool, Tensor]:
    """The degree of the quantile's polynomial, its variable, and its numbers on the device."""
    quantile = sampling.folded_beta_quantile(alpha)
    numbers = [alpha, quantile.scale, quantile.shift, *quantile.coefficients]
    table = torch.tensor(numbers, dtype=torch.float64, device="cpu").to(device)
    return len(quantile.coefficients) - 1, quantile.of_power, table


def _on_device(ids: tuple[Tensor | int, ...], device: torch.device) -> list[Tensor | None]:
    """Ids where the kernel reads them: those that are on the host go there in one copy."""
    sent = [part for part in ids if not isinstance(part, int) and part.device != device]
    if sent:
        _streams.refuse_capture(
            device,
            f"ids_x and ids_u must be on {device} while a CUDA graph is captured: the graph would "
            "not read them from the host again. Fill tensors on the device before each replay",
        )
        # pinned, so that nothing waits; torch keeps pinned memory in a pool
        joined = torch.cat(sent)
        joined = joined.pin_memory() if device.type == "cuda" else joined
        sent = list(joined.to(device, non_blocking=True).split([len(part) for part in sent]))
    return [
        None
        if isinstance(part, int)
        else (part.contiguous() if part.device == device else sent.pop(0))
        for part in ids
    ]
