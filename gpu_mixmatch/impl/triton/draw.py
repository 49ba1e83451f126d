"""All draws of a batch in one launch: reads the key and the ids, writes 44 bytes a row.

Where there is a cut or a chain, as many columns of 4 bytes as it has come on top.

The same Philox counters, integers and float64 arithmetic as `gpu_mixmatch.sampling`, one row (a
view of an image) per lane.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_mixmatch import _streams, sampling
from gpu_mixmatch._chain import columns, entries, runs, slots_of
from gpu_mixmatch._keys import CountedKey
from gpu_mixmatch.impl.constants import constant
from gpu_mixmatch.impl.triton.launch import blocks, launch
from gpu_mixmatch.impl.triton.rows import divided, inverse
from gpu_mixmatch.sampling.chain import NUM_ASPECTS, area_limits, aspect_factors, shuffles
from gpu_mixmatch.sampling.draws import strong_rows
from gpu_mixmatch.types import AugmentPolicy, Chain, Cut, DrawPlan

_BLOCK = 32
_SHIFT = tl.constexpr(int(sampling.Purpose.SHIFT))
_ZOOM = tl.constexpr(int(sampling.Purpose.ZOOM))
_LAM = tl.constexpr(int(sampling.Purpose.LAM))
_SHUFFLE = tl.constexpr(int(sampling.Purpose.SHUFFLE))
_CUT = tl.constexpr(int(sampling.Purpose.CUT))
_CUTOUT = tl.constexpr(int(sampling.Purpose.CUTOUT))
_LEVELS = tl.constexpr(int(sampling.Purpose.LEVELS))
_ORDER = tl.constexpr(int(sampling.Purpose.ORDER))
_SLOT = tl.constexpr(int(sampling.Purpose.SLOT))
_NUM_ASPECTS = tl.constexpr(NUM_ASPECTS)


@triton.jit
def _moved(place, word, size):
    """Add a random number below ``size`` to a place below it, modulo ``size``."""
    place += tl.umulhi(word, size.to(tl.uint32)).to(tl.int32)
    return tl.where(place >= size, place - size, place)


@triton.jit
def _encrypt(row, column, num_rows, num_columns, num_rounds, view, seed, step, BLOCK: tl.constexpr):
    """Send each cell of a grid through the Feistel network of `sampling.shuffle.bijection`."""
    lane = tl.arange(0, BLOCK)
    purpose = tl.zeros([BLOCK], tl.int32) + (view * 256 + _SHUFFLE)
    for block in range(num_rounds // 4):
        high = tl.zeros([BLOCK], tl.int32) + block
        if tl.maximum(num_rows, num_columns) <= BLOCK:
            # a lane draws for the row and the column of its number: all four rounds at once
            words = tl.philox(seed, lane, high, step, purpose)
            row = _moved(row, tl.gather(words[0], column, axis=0), num_rows)
            column = _moved(column, tl.gather(words[1], row, axis=0), num_columns)
            row = _moved(row, tl.gather(words[2], column, axis=0), num_rows)
            column = _moved(column, tl.gather(words[3], row, axis=0), num_columns)
        else:
            row = _moved(row, tl.philox(seed, column, high, step, purpose)[0], num_rows)
            column = _moved(column, tl.philox(seed, row, high, step, purpose)[1], num_columns)
            row = _moved(row, tl.philox(seed, column, high, step, purpose)[2], num_rows)
            column = _moved(column, tl.philox(seed, row, high, step, purpose)[3], num_columns)
    return row, column


@triton.jit
def _shuffle(
    index_ptr, start, length, block, view, num_rows, num_columns, inverse_columns, num_rounds,
    seed, step, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the partners of a block of rows of a part; without rounds each row is its own."""
    place = block * BLOCK + tl.arange(0, BLOCK)
    mask = place < length
    row, column = divided(tl.where(mask, place, 0), num_columns, inverse_columns)
    row, column = _encrypt(row, column, num_rows, num_columns, num_rounds, view, seed, step, BLOCK)
    outside = row * num_columns + column >= length
    while tl.max(outside.to(tl.int32), axis=0) > 0:  # cycle walking
        walked = _encrypt(row, column, num_rows, num_columns, num_rounds, view, seed, step, BLOCK)
        row, column = tl.where(outside, walked[0], row), tl.where(outside, walked[1], column)
        outside = row * num_columns + column >= length
    partner = start + row * num_columns + column
    tl.store(index_ptr + start + place, partner.to(tl.int64), mask=mask)


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
def _counters(row, mask, ids_x_ptr, ids_u_ptr, num_x, num_u, inverse_u):
    """Low and high word of each row's sample id, and its view · 256: x is view 0, u 1..K."""
    labelled = row < num_x
    view, position = divided(tl.maximum(row - num_x, 0), num_u, inverse_u)
    position = tl.where(labelled, row, position)
    view = tl.where(labelled, 0, 1 + view)
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
    cuts_ptr = zoom_ptr + row.to(tl.int64) * 4
    tl.store(cuts_ptr, least + tl.umulhi(word_0, bound).to(tl.int32), mask=mask)
    tl.store(cuts_ptr + 1, least + tl.umulhi(word_1, bound).to(tl.int32), mask=mask)
    tl.store(cuts_ptr + 2, least + tl.umulhi(word_2, bound).to(tl.int32), mask=mask)
    tl.store(cuts_ptr + 3, least + tl.umulhi(word_3, bound).to(tl.int32), mask=mask)


@triton.jit
def _below(word, COUNT: tl.constexpr):
    """A number in 0 .. COUNT - 1 from a word."""
    return tl.umulhi(word, tl.full(word.shape, COUNT, tl.uint32)).to(tl.int32)


@triton.jit
def _entry(op, word, runs_ptr):
    """One of the entries of an operation: its first, and as many more as the word says."""
    count = tl.load(runs_ptr + op * 2 + 1).to(tl.uint32)
    return tl.load(runs_ptr + op * 2) + tl.umulhi(word, count).to(tl.int32)


@triton.jit
def _store_cut(
    chain_ptr, mask, words, aspects_ptr, LEAST_AREA: tl.constexpr, NUM_AREAS: tl.constexpr
):
    """Height and width in 2^-16 of the image's root area, then the place down and across."""
    height = tl.zeros(mask.shape, tl.int32)
    width = height
    if NUM_AREAS > 0:
        root = tl.sqrt((_below(words[0], NUM_AREAS) + LEAST_AREA).to(tl.float64))
        level = _below(words[1], _NUM_ASPECTS)
        height = tl.maximum((root * tl.load(aspects_ptr + level)).to(tl.int32), 1)
        width = tl.maximum((root * tl.load(aspects_ptr + _NUM_ASPECTS + level)).to(tl.int32), 1)
    tl.store(chain_ptr, height, mask=mask)
    tl.store(chain_ptr + 1, width, mask=mask)
    tl.store(chain_ptr + 2, (words[2] >> 8).to(tl.int32), mask=mask)
    tl.store(chain_ptr + 3, (words[3] >> 8).to(tl.int32), mask=mask)


@triton.jit
def _store_shuffled(
    slots_ptr, mask, strong, levels, words, runs_ptr, orders_ptr,
    NUM_SLOTS: tl.constexpr, NUM_ORDERS: tl.constexpr, APPLIED_BELOW: tl.constexpr,
    GRAY_BELOW: tl.constexpr, GRAY_ENTRY: tl.constexpr,
):  # fmt: skip
    """Every operation in an order of the row's own; then, perhaps, grayscale."""
    orders_ptr += _below(words[0], NUM_ORDERS) * NUM_SLOTS
    applied = strong & ((words[1] >> 8).to(tl.int32) < APPLIED_BELOW)
    for slot in tl.static_range(NUM_SLOTS):
        op = tl.load(orders_ptr + slot)
        word = levels[0]
        for number in tl.static_range(1, NUM_SLOTS):
            word = tl.where(op == number, levels[number], word)
        tl.store(slots_ptr + slot, tl.where(applied, _entry(op, word, runs_ptr), 0), mask=mask)
    if GRAY_BELOW > 0:
        gray = strong & ((words[2] >> 8).to(tl.int32) < GRAY_BELOW)
        tl.store(slots_ptr + NUM_SLOTS, tl.where(gray, GRAY_ENTRY, 0), mask=mask)


@triton.jit
def _store_part(
    chain_ptr, part, row, mask, strong, seed, low, high, step, purpose, runs_ptr, orders_ptr,
    aspects_ptr,
    COLUMNS: tl.constexpr, PARTS: tl.constexpr, CUTS: tl.constexpr, LEAST_AREA: tl.constexpr,
    NUM_AREAS: tl.constexpr, NUM_OPS: tl.constexpr, NUM_SLOTS: tl.constexpr,
    NUM_ORDERS: tl.constexpr, APPLIED_BELOW: tl.constexpr, GRAY_BELOW: tl.constexpr,
    GRAY_ENTRY: tl.constexpr, LEAST_SIDE: tl.constexpr, NUM_SIDES: tl.constexpr,
):  # fmt: skip
    """Store what one part of a chain's draws is: the cut, a slot or all shuffled ones, a cutout."""
    chain_ptr += row.to(tl.int64) * COLUMNS
    if CUTS > 0 and part == 0:
        words = tl.philox(seed, low, high, step, purpose + _CUT)
        _store_cut(chain_ptr, mask, words, aspects_ptr, LEAST_AREA, NUM_AREAS)
    if NUM_SIDES > 0 and part == PARTS - 1:
        words = tl.philox(seed, low, high, step, purpose + _CUTOUT)
        last_ptr = chain_ptr + (COLUMNS - 3)
        tl.store(last_ptr, (words[0] >> 8).to(tl.int32), mask=mask)
        tl.store(last_ptr + 1, (words[1] >> 8).to(tl.int32), mask=mask)
        side = _below(words[2], NUM_SIDES) + LEAST_SIDE
        tl.store(last_ptr + 2, tl.where(strong, side, 0), mask=mask)
    slots_ptr = chain_ptr + 4 * CUTS
    if NUM_ORDERS > 0:
        if part == CUTS:
            levels = tl.philox(seed, low, high, step, purpose + _LEVELS)
            words = tl.philox(seed, low, high, step, purpose + _ORDER)
            _store_shuffled(
                slots_ptr, mask, strong, levels, words, runs_ptr, orders_ptr,
                NUM_SLOTS, NUM_ORDERS, APPLIED_BELOW, GRAY_BELOW, GRAY_ENTRY,
            )  # fmt: skip
    elif NUM_SLOTS > 0:
        slot = part - CUTS
        if (slot >= 0) & (slot < NUM_SLOTS):
            purpose += slot.to(tl.uint32) + _SLOT
            words = tl.philox(seed, low, high, step, purpose)
            entry = _entry(_below(words[0], NUM_OPS), words[2], runs_ptr)
            applied = strong & ((words[1] >> 8).to(tl.int32) < APPLIED_BELOW)
            tl.store(slots_ptr + slot, tl.where(applied, entry, 0), mask=mask)


# A batch of another size must not be another kernel: numbers may be 1 or divisible by 16, and ids,
# slices often, may begin anywhere.
_NUMBERS = [
    *("seed", "step", "num_x", "num_u", "inverse_u", "num_rows", "boundary"),
    *(
        f"{name}_{part}"
        for name in ("grid_rows", "grid_columns", "inverse_columns", "num_rounds")
        for part in (0, 1)
    ),
    *("num_offsets", "least_zoom", "num_zooms", "flips_below", "first_strong", "past_strong"),
]
_ANYWHERE = ["key_ptr", "ids_x_ptr", "ids_u_ptr"]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_ANYWHERE)
def draw_kernel(
    out_ptr,
    key_ptr,
    seed,
    step,
    ids_x_ptr,
    ids_u_ptr,
    beta_ptr,
    runs_ptr,
    orders_ptr,
    aspects_ptr,
    num_x,
    num_u,
    inverse_u,
    num_rows,
    boundary,
    grid_rows_0,
    grid_columns_0,
    inverse_columns_0,
    num_rounds_0,
    grid_rows_1,
    grid_columns_1,
    inverse_columns_1,
    num_rounds_1,
    num_offsets,
    least_zoom,
    num_zooms,
    flips_below,
    first_strong,
    past_strong,
    least_sigma,
    sigma_range,
    MIXES: tl.constexpr,
    COUNTS: tl.constexpr,
    DEGREE: tl.constexpr,
    OF_POWER: tl.constexpr,
    LAM_PER_BATCH: tl.constexpr,
    HAS_POLICY: tl.constexpr,
    HAS_ZOOM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    CUTS: tl.constexpr,
    LEAST_AREA: tl.constexpr,
    NUM_AREAS: tl.constexpr,
    NUM_OPS: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    NUM_ORDERS: tl.constexpr,
    APPLIED_BELOW: tl.constexpr,
    GRAY_BELOW: tl.constexpr,
    GRAY_ENTRY: tl.constexpr,
    LEAST_SIDE: tl.constexpr,
    NUM_SIDES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program does one thing for a block of rows, so that all of them are done side by side.

    Partners, λ', what moves pixels, and each part of a chain.
    """
    program = tl.program_id(0)
    if key_ptr is not None:
        step_ptr = key_ptr + 1
        if COUNTS:
            step_ptr += program
        seed = tl.load(key_ptr)
        count = tl.load(step_ptr)
        step = count
    seed = seed.to(tl.int64)
    step = (tl.zeros([BLOCK], tl.int64) + step.to(tl.int64)).to(tl.uint32)
    pitch = num_rows.to(tl.int64)  # words from one field to the next

    # partners: two parts of rows, each mixed within itself or, without rounds, not at all
    blocks_0 = tl.cdiv(boundary, BLOCK)
    shuffles = blocks_0 + tl.cdiv(num_rows - boundary, BLOCK)
    if program < shuffles:
        index_ptr = out_ptr.to(tl.pointer_type(tl.int64), bitcast=True)
        first = program < blocks_0
        _shuffle(
            index_ptr,
            tl.where(first, 0, boundary),
            tl.where(first, boundary, num_rows - boundary),
            tl.where(first, program, program - blocks_0),
            tl.where(first, 0, 1),
            tl.where(first, grid_rows_0, grid_rows_1),
            tl.where(first, grid_columns_0, grid_columns_1),
            tl.where(first, inverse_columns_0, inverse_columns_1),
            tl.where(first, num_rounds_0, num_rounds_1),
            seed,
            step,
            BLOCK,
        )
    else:
        block = program - shuffles
        of_rows = tl.cdiv(num_rows, BLOCK)
        if block < of_rows:
            row = block * BLOCK + tl.arange(0, BLOCK)
            mask = row < num_rows
            lam = tl.full([BLOCK], 1.0, tl.float32)
            if MIXES:
                low = tl.zeros([BLOCK], tl.uint32)
                high, purpose = low, low
                if not LAM_PER_BATCH:
                    low, high, purpose = _counters(
                        row, mask, ids_x_ptr, ids_u_ptr, num_x, num_u, inverse_u
                    )
                words = tl.philox(seed, low, high, step, purpose + _LAM)
                mixed = tl.where(row < boundary, num_rounds_0, num_rounds_1) > 0
                lam = tl.where(mixed, _folded_beta(words[0], beta_ptr, DEGREE, OF_POWER), lam)
            tl.store(out_ptr + 2 * pitch + row, lam.to(tl.int32, bitcast=True), mask=mask)
        elif PARTS > 0 and block >= 2 * of_rows:
            number = block - 2 * of_rows
            row = number // PARTS * BLOCK + tl.arange(0, BLOCK)
            mask = row < num_rows
            strong = (row >= first_strong) & (row < past_strong)
            low, high, purpose = _counters(row, mask, ids_x_ptr, ids_u_ptr, num_x, num_u, inverse_u)
            _store_part(
                out_ptr + 11 * pitch, number % PARTS, row, mask, strong,
                seed, low, high, step, purpose, runs_ptr, orders_ptr, aspects_ptr,
                COLUMNS, PARTS, CUTS, LEAST_AREA, NUM_AREAS, NUM_OPS, NUM_SLOTS, NUM_ORDERS,
                APPLIED_BELOW, GRAY_BELOW, GRAY_ENTRY, LEAST_SIDE, NUM_SIDES,
            )  # fmt: skip
        elif HAS_POLICY:
            row = (block - of_rows) * BLOCK + tl.arange(0, BLOCK)
            mask = row < num_rows
            top_ptr = out_ptr + 3 * pitch
            low, high, purpose = _counters(row, mask, ids_x_ptr, ids_u_ptr, num_x, num_u, inverse_u)
            words = tl.philox(seed, low, high, step, purpose + _SHIFT)
            bound = tl.zeros([BLOCK], tl.uint32) + num_offsets.to(tl.uint32)
            tl.store(top_ptr + row, tl.umulhi(words[0], bound).to(tl.int32), mask=mask)
            tl.store(top_ptr + pitch + row, tl.umulhi(words[1], bound).to(tl.int32), mask=mask)
            flipped = (words[2] >> 8).to(tl.int32) < flips_below
            tl.store(top_ptr + 2 * pitch + row, flipped.to(tl.int32), mask=mask)
            uniform = (words[3] >> 8).to(tl.float32) * (1.0 / (1 << 24))
            sigma = least_sigma + sigma_range * uniform
            tl.store(top_ptr + 7 * pitch + row, sigma.to(tl.int32, bitcast=True), mask=mask)
            _store_cuts(
                top_ptr + 3 * pitch, row, mask, seed, low, high, step, purpose,
                least_zoom, num_zooms, HAS_ZOOM,
            )  # fmt: skip
    if COUNTS:  # each program's own word, which it has read
        tl.store(step_ptr, count + 1)


def draw_batch(
    key: Tensor | CountedKey | tuple[int, int | Tensor],
    ids_x: Tensor | int,
    ids_u: Tensor | int,
    plan: DrawPlan,
    out: Tensor,
) -> None:
    num_x, num_u = (ids if isinstance(ids, int) else len(ids) for ids in (ids_x, ids_u))
    num_rows, device = num_x + plan.num_augmentations * num_u, out.device
    lengths = {
        part: stop - start
        for part, start, stop in sampling.shuffled_parts(num_rows, num_x, plan.mix)
    }
    boundary = num_rows if plan.mix == "all" else num_x
    degree, of_power, beta = _beta(plan.alpha, device)
    padding, (least_zoom, most_zoom), flip, sigmas = (plan.policy or AugmentPolicy())[:4]
    low, high = sigmas or (0.0, 0.0)
    strong = strong_rows(num_rows, num_x, plan)
    shuffled = blocks(boundary, _BLOCK) + blocks(num_rows - boundary, _BLOCK)
    chain, tables = _NO_CHAIN, _ChainTables(None, None, None)
    if plan.policy and (plan.policy.cut or plan.policy.chain):
        chain = _chain_numbers(plan.policy.cut, plan.policy.chain)
        tables = _chain_tables(plan.policy.cut, plan.policy.chain, device)
    roles = 1 if plan.policy is None else 2 + chain["PARTS"]
    programs = shuffled + roles * blocks(num_rows, _BLOCK)
    on_device = key.words(programs) if isinstance(key, CountedKey) else key
    seed, step = (0, 0) if isinstance(on_device, Tensor) else on_device
    launch(
        draw_kernel,
        programs,
        device,
        out,
        on_device if isinstance(on_device, Tensor) else None,
        seed,
        int(step),
        *_on_device((ids_x, ids_u), device),
        beta,
        *tables,
        num_x,
        num_u,
        inverse(num_u),
        num_rows,
        boundary,
        *_grid(lengths.get(0, 0)),
        *_grid(lengths.get(1, 0)),
        2 * padding + 1,
        least_zoom if most_zoom else 0,
        most_zoom - least_zoom + 1,
        round(flip * 2**24),
        strong.start,
        strong.stop,
        low,
        high - low,
        MIXES=plan.mix != "none",
        COUNTS=isinstance(key, CountedKey),
        DEGREE=degree,
        OF_POWER=of_power,
        LAM_PER_BATCH=plan.lam == "batch",
        HAS_POLICY=plan.policy is not None,
        HAS_ZOOM=most_zoom > 0,
        **chain,
        BLOCK=_BLOCK,
        num_warps=1,
    )


def _grid(length: int) -> tuple[int, int, int, int]:
    """Rows, columns, the columns' inverse and rounds of what shuffles a part; none for no part."""
    rows, columns, rounds = sampling.shuffle_grid(length) if length else (1, 1, 0)
    return rows, columns, inverse(columns), rounds


def prepare(plan: DrawPlan, device: torch.device) -> None:
    _beta(plan.alpha, device)
    if plan.policy and (plan.policy.cut or plan.policy.chain):
        _chain_tables(plan.policy.cut, plan.policy.chain, device)


@lru_cache(maxsize=64)
def _chain_numbers(cut: Cut | None, chain: Chain | None) -> dict[str, int]:
    """What the kernel is compiled for: the layout of the columns, and bounds of numbers."""
    found = dict(_NO_CHAIN, COLUMNS=columns(cut, chain).total, CUTS=int(cut is not None))
    found["PARTS"] = found["CUTS"]
    if cut and cut.area:
        least, most = area_limits(cut.area)
        found.update(LEAST_AREA=least, NUM_AREAS=most - least + 1)
    if chain is None:
        return found
    slots = slots_of(chain) - (chain.gray > 0)
    found.update(NUM_OPS=len(chain.ops), NUM_SLOTS=slots, APPLIED_BELOW=round(chain.prob * 2**24))
    found["PARTS"] += 1 if chain.shuffled else slots
    if chain.shuffled:
        gray = round(chain.gray * 2**24) if chain.gray > 0 else 0
        found.update(NUM_ORDERS=len(shuffles(slots)), GRAY_BELOW=gray)
        found["GRAY_ENTRY"] = len(entries(chain)) - 1
    if chain.cutout:
        sides = chain.cutout
        least, most = (
            (sides, sides) if isinstance(sides, int) else (round(side * 2**16) for side in sides)
        )
        found.update(LEAST_SIDE=least, NUM_SIDES=most - least + 1)
        found["PARTS"] += 1
    return found


_NO_CHAIN = dict.fromkeys(
    (
        *("COLUMNS", "PARTS", "CUTS", "LEAST_AREA", "NUM_AREAS", "NUM_OPS", "NUM_SLOTS"),
        *("NUM_ORDERS", "APPLIED_BELOW", "GRAY_BELOW", "GRAY_ENTRY", "LEAST_SIDE", "NUM_SIDES"),
    ),
    0,
)


class _ChainTables(NamedTuple):
    """Entries of each operation; orders of operations; factors of aspects; None is not read."""

    runs: Tensor | None
    orders: Tensor | None
    aspects: Tensor | None


@constant
def _chain_tables(cut: Cut | None, chain: Chain | None, device: torch.device) -> _ChainTables:
    of_entries = orders = aspects = None
    if chain:
        of_entries = torch.tensor(runs(chain), dtype=torch.int32, device="cpu").to(device)
    if chain and chain.shuffled:
        orders = torch.from_numpy(shuffles(len(chain.ops))).int().to(device)
    if cut and cut.area:
        aspects = torch.from_numpy(aspect_factors(cut.aspect)).to(device)
    return _ChainTables(of_entries, orders, aspects)


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
