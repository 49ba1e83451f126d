"""Draws are Philox words, pure functions of (seed, step, id, view), with the right distributions.

The seeds are fixed, so that a p-value is a number and not a chance: it is asked to exceed 1e-4.
"""

import importlib
import random
from collections import Counter
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from scipy import special, stats

from gpu_mixmatch import sampling
from gpu_mixmatch.types import AugmentParams, AugmentPolicy, DrawPlan, MixUpParams

LEAST_P = 1e-4
shuffle_module = importlib.import_module("gpu_mixmatch.sampling.shuffle")
philox_module = importlib.import_module("gpu_mixmatch.sampling.philox")
POLICY = {"padding": 4, "zoom_px": (0, 16), "flip": 0.5, "blur_sigma": (0.25, 3.0)}
ALPHAS = (0.5, 0.75, 1.0, 2.0, 16.0)
MILLION = 10**6
FAR_IDS = [0, 1, 2**32 - 1, 2**32, 2**32 + 7, 5 * 2**32 + 3, 2**63 - 1]

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


# Philox, from the paper's definition in Python integers

MASK = 2**32 - 1


def slow_philox(counter, key):
    """Ten rounds of: multiply two words, swap halves and lanes, xor; the key grows by Weyl."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & MASK,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def slow_words(seed, step, sample_id, view, purpose):
    """Return the block of the counter (id low, id high, step, view·256 + purpose)."""
    counter = (sample_id & MASK, sample_id >> 32, step, view * 256 + purpose)
    return slow_philox(counter, (seed & MASK, seed >> 32))


def fast_words(counter, key):
    words = sampling.philox(np.array(counter, dtype=np.uint64)[:, None], key[0] | key[1] << 32)
    return tuple(int(word) for word in words[:, 0])


# Random123-1.14, tests/kat_vectors, philox4x32 10
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (MASK, MASK, MASK, MASK),
        (MASK, MASK),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def augment_params(ids=1, views=1, seed=3, step=5, **policy):
    return sampling.draw_augment(seed, step, ids, views, **(policy or POLICY))


def rows_of(params, rows):
    return type(params)(*(field[rows] for field in params))


def joined(*parts):
    return type(parts[0])(*map(torch.cat, zip(*parts, strict=True)))


def assert_same(left, right):
    for name, one, other in zip(type(left)._fields, left, right, strict=True):
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name


def whole_rows(params):
    """Every field of an AugmentParams in one array [R, 8]."""
    columns = [params.top, params.left, params.flip, *params.zoom.unbind(1), params.sigma]
    return torch.stack([column.double() for column in columns], dim=1).numpy()


def p_uniform(values, cells):
    counts = np.bincount(np.asarray(values).astype(np.int64), minlength=cells)
    assert len(counts) == cells, "a value lies outside its cells"
    return stats.chisquare(counts).pvalue


def lam_of(alpha, length=MILLION, seed=11, step=0):
    ids = torch.arange(length)
    draws = sampling.draw_mixup(seed, step, ids, 0, num_augmentations=1, alpha=alpha)
    return draws.lam


# Philox


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(counter, key, answer):
    assert fast_words(counter, key) == answer
    assert slow_philox(counter, key) == answer


def test_philox_equals_the_definition_on_random_counters_in_one_call():
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 2**32, (4, 500), dtype=np.uint64)
    key = (0x9E3779B9, 0x7FFF0001)
    fast = sampling.philox(counters, key[0] | key[1] << 32)
    slow = [slow_philox(map(int, column), key) for column in counters.T]
    np.testing.assert_array_equal(fast, np.array(slow, dtype=np.uint64).T)


@pytest.mark.parametrize("view", [0, 1, 3])
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (2**32 + 5, 77), (2**63 - 1, 2**32 - 1)])
def test_augment_draws_are_predicted_by_the_counter_layout(seed, step, view):
    params = sampling.draw_augment(seed, step, torch.tensor(FAR_IDS), view, **POLICY)
    for row, sample_id in enumerate(FAR_IDS):
        top, left, flip, sigma = slow_words(seed, step, sample_id, view, 0)
        sides = slow_words(seed, step, sample_id, view, 1)
        assert int(params.top[row]) == (top * 9) >> 32
        assert int(params.left[row]) == (left * 9) >> 32
        assert int(params.flip[row]) == ((flip >> 8) * 2**-24 < 0.5)
        assert params.zoom[row].tolist() == [(side * 17) >> 32 for side in sides]
        assert float(params.sigma[row]) == pytest.approx(
            0.25 + 2.75 * (sigma >> 8) * 2**-24, abs=3e-7
        )


def test_lam_is_predicted_by_the_counter_layout():
    ids_x, ids_u = torch.tensor(FAR_IDS), torch.tensor(FAR_IDS[::-1])
    draws = sampling.draw_mixup(2**40 + 1, 9, ids_x, ids_u, num_augmentations=2, alpha=0.75)
    rows = [(i, 0) for i in FAR_IDS] + [(i, view) for view in (1, 2) for i in FAR_IDS[::-1]]
    words = np.array([slow_words(2**40 + 1, 9, i, view, 2)[0] for i, view in rows])
    tail = 1 - (words >> 8) * 2.0**-24
    np.testing.assert_allclose(
        draws.lam.double(), 1 - special.betaincinv(0.75, 0.75, tail / 2), atol=1e-6, rtol=0
    )


def test_generator_seeds_are_64_bit_words_of_seed_and_step():
    low, high, *_ = slow_words(2**35 + 1, 4, 0, 0, 5)
    assert sampling.generator_seed(2**35 + 1, 4) == low | high << 32
    seeds = {sampling.generator_seed(seed, step) for seed in range(20) for step in range(20)}
    assert len(seeds) == 400


# What a draw depends on


def test_augment_draws_do_not_depend_on_batch_size():
    few, many = augment_params(8, (0, 1, 2)), augment_params(64, (0, 1, 2))
    rows = torch.cat([torch.arange(8) + 64 * view for view in range(3)])
    assert_same(few, rows_of(many, rows))


def test_lam_does_not_depend_on_batch_size():
    few = sampling.draw_mixup(3, 5, 8, 8).lam
    many = sampling.draw_mixup(3, 5, 64, 64).lam
    assert torch.equal(few, torch.cat([many[:8], many[64:72], many[128:136]]))


def test_draws_follow_their_ids_in_any_order():
    ids = torch.tensor(FAR_IDS)
    order = torch.tensor([4, 2, 6, 0, 3, 1, 5])
    assert_same(augment_params(ids[order]), rows_of(augment_params(ids), order))
    lam = sampling.draw_mixup(3, 5, ids, ids, num_augmentations=1).lam
    shuffled = sampling.draw_mixup(3, 5, ids[order], ids[order], num_augmentations=1).lam
    assert torch.equal(shuffled, lam[torch.cat([order, order + 7])])


def test_positions_are_the_ids_that_an_integer_stands_for():
    assert_same(augment_params(9, (1, 2)), augment_params(torch.arange(9), (1, 2)))
    assert_same(
        sampling.draw_mixup(1, 2, 5, 7), sampling.draw_mixup(1, 2, torch.arange(5), torch.arange(7))
    )
    assert_same(sampling.draw_mixup(1, 2, 5, torch.arange(7)), sampling.draw_mixup(1, 2, 5, 7))


def test_views_drawn_together_equal_views_drawn_one_by_one():
    ids = torch.tensor(FAR_IDS)
    together = augment_params(ids, (2, 0, 5))
    assert_same(together, joined(*(augment_params(ids, view) for view in (2, 0, 5))))


@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize(("len_x", "len_u", "views"), [(5, 3, 2), (1, 4, 1), (0, 3, 3), (3, 0, 2)])
def test_batch_draws_equal_the_draws_of_their_parts(len_x, len_u, views, as_tensors):
    ids_x = torch.arange(len_x) + 10 if as_tensors else len_x
    ids_u = torch.arange(len_u) + 90 if as_tensors else len_u
    batch, mixup = sampling.draw_batch(3, 5, ids_x, ids_u, DrawPlan(views, AugmentPolicy(**POLICY)))
    x = augment_params(ids_x, 0)
    u = augment_params(ids_u, range(1, views + 1))
    assert_same(batch, joined(x, u))
    assert len(batch.top) == len_x + views * len_u
    alone = sampling.draw_mixup(3, 5, ids_x, ids_u, num_augmentations=views, mix="all")
    assert_same(mixup, alone)


@pytest.mark.parametrize("change", ["seed", "step", "view", "id", "high id"])
def test_another_key_gives_other_draws_of_every_kind(change):
    ids = torch.arange(256)
    arguments = {"seed": 3, "step": 5, "ids": ids, "views": 1}
    other = {
        "seed": {"seed": 3 + 2**32},
        "step": {"step": 6},
        "view": {"views": 2},
        "id": {"ids": ids + 256},
        "high id": {"ids": ids + 2**32},
    }[change]
    one = augment_params(**arguments)
    two = augment_params(**{**arguments, **other})
    for name, left, right in zip(AugmentParams._fields, one, two, strict=True):
        # 256 flips agree by half, and 9 offsets by a ninth
        assert (left == right).float().mean() < 0.7, name


@pytest.mark.parametrize("change", ["seed", "step", "id"])
def test_another_key_gives_another_lam_and_another_shuffle(change):
    one = sampling.draw_mixup(3, 5, 64, 64)
    seed, step, first = {"seed": (4, 5, 0), "step": (3, 6, 0), "id": (3, 5, 64)}[change]
    ids = torch.arange(first, first + 64)
    two = sampling.draw_mixup(seed, step, ids, ids)
    assert (one.lam == two.lam).float().mean() < 0.05
    if change == "id":  # partners are keyed by position: they do not read ids
        assert torch.equal(one.index, two.index)
    else:
        assert (one.index == two.index).float().mean() < 0.05


def test_an_image_in_both_sets_is_never_drawn_alike():
    ids = torch.arange(2000)
    params, mixup = sampling.draw_batch(3, 5, ids, ids, DrawPlan(3, AugmentPolicy(**POLICY)))
    parts = whole_rows(params).reshape(4, 2000, 8)
    for one, other in combinations(range(4), 2):
        assert not (parts[one] == parts[other]).all(axis=1).any()
    lam = mixup.lam.view(4, 2000)
    for one, other in combinations(range(4), 2):
        # λ' rounds to 1 for some: equal values are chance, and rare
        assert (lam[one] == lam[other]).float().mean() < 0.01


def test_global_generators_are_neither_read_nor_moved():
    def draw_everything():
        return (
            *augment_params(16, (0, 1)),
            *sampling.draw_batch(0, 1, 4, 4, DrawPlan(policy=AugmentPolicy(**POLICY), mix="none"))[
                0
            ],
            *sampling.draw_mixup(0, 1, 4, 4),
            sampling.epoch_order(0, 1, 100),
            torch.tensor(sampling.generator_seed(0, 1) >> 1),
        )

    def states():
        return torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002

    before = states()
    first = draw_everything()
    after = states()
    assert torch.equal(before[0], after[0])
    np.testing.assert_array_equal(before[1], after[1])
    assert before[2] == after[2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        second = draw_everything()
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


# Distributions of the augmentation


@pytest.mark.parametrize("padding", [1, 4, 12])
def test_offsets_are_uniform_and_reach_both_ends(padding):
    params = augment_params(30_000, 1, padding=padding)
    cells = 2 * padding + 1
    for offsets in (params.top, params.left):
        assert offsets.dtype == torch.int32
        assert int(offsets.min()) == 0
        assert int(offsets.max()) == 2 * padding  # YU1ut's crop never draws the last offset
        assert p_uniform(offsets, cells) > LEAST_P
    assert p_uniform(params.top * cells + params.left, cells**2) > LEAST_P


def test_without_padding_every_offset_is_zero():
    params = augment_params(100, 1, padding=0, flip=0.5)
    assert not params.top.any()
    assert not params.left.any()


@pytest.mark.parametrize("axis", ["view", "step", "seed", "id"])
def test_offsets_of_neighbouring_keys_are_independent(axis):
    ids = torch.arange(30_000)
    one = augment_params(ids, 1, seed=3, step=5, padding=4).top
    two = augment_params(
        ids + (1 if axis == "id" else 0),
        2 if axis == "view" else 1,
        seed=4 if axis == "seed" else 3,
        step=6 if axis == "step" else 5,
        padding=4,
    ).left
    assert p_uniform(one * 9 + two, 81) > LEAST_P


@pytest.mark.parametrize("flip", [0.1, 0.5, 0.9])
def test_flips_come_with_their_probability(flip):
    flips = augment_params(30_000, 1, padding=4, flip=flip).flip
    assert flips.dtype == torch.int32
    assert set(flips.tolist()) == {0, 1}
    assert stats.binomtest(int(flips.sum()), 30_000, flip).pvalue > LEAST_P


def test_flips_of_probability_0_and_1_are_certain():
    assert int(augment_params(30_000, 1, flip=0.0).flip.sum()) == 0
    assert int(augment_params(30_000, 1, flip=1.0).flip.sum()) == 30_000


def test_flips_are_independent_of_the_offsets():
    params = augment_params(30_000, 1, padding=4, flip=0.5)
    assert p_uniform(params.flip * 9 + params.top, 18) > LEAST_P
    assert p_uniform(params.flip * 9 + params.left, 18) > LEAST_P


@pytest.mark.parametrize("limits", [(0, 16), (2, 5), (0, 1), (3, 3)])
def test_cuts_are_uniform_on_each_side_and_reach_both_ends(limits):
    least, most = limits
    cuts = augment_params(30_000, 1, zoom_px=limits).zoom
    assert cuts.dtype == torch.int32
    assert cuts.shape == (30_000, 4)
    for side in cuts.unbind(1):
        assert (int(side.min()), int(side.max())) == limits
        if most > least:
            assert p_uniform(side - least, most - least + 1) > LEAST_P


def test_cuts_of_two_sides_are_independent():
    cuts = augment_params(30_000, 1, zoom_px=(0, 6)).zoom
    for one, other in combinations(range(4), 2):
        assert p_uniform(cuts[:, one] * 7 + cuts[:, other], 49) > LEAST_P


def test_without_a_zoom_nothing_is_cut():
    assert not augment_params(100, 1, padding=4, zoom_px=(0, 0)).zoom.any()


@pytest.mark.parametrize("limits", [(0.0, 3.0), (0.5, 0.75), (2.0, 2.0)])
def test_sigmas_are_uniform_between_their_ends(limits):
    low, high = limits
    sigma = augment_params(30_000, 1, blur_sigma=limits).sigma
    assert sigma.dtype == torch.float32
    assert low <= float(sigma.min()) <= float(sigma.max()) <= high
    if high > low:
        uniform = stats.uniform(low, high - low)
        assert stats.kstest(sigma.double().numpy(), uniform.cdf).pvalue > LEAST_P


def test_without_a_blur_sigma_is_zero():
    assert not augment_params(100, 1, padding=4, blur_sigma=None).sigma.any()


# λ'


def folded_beta_cdf(values, alpha):
    """F(v) = 2 I_v(α, α) - 1 = 1 - 2 I_(1-v)(α, α), the second form exact near 1."""
    return 1 - 2 * special.betainc(alpha, alpha, 1 - np.asarray(values, dtype=np.float64))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_lam_follows_the_folded_beta_distribution(alpha):
    lam = lam_of(alpha).double().numpy()
    assert stats.kstest(lam, folded_beta_cdf, args=(alpha,)).pvalue > LEAST_P


@pytest.mark.parametrize("alpha", [0.1, 0.25])
def test_lam_below_one_follows_the_folded_beta_distribution_for_small_alphas(alpha):
    # half-way between two float32 numbers, so that rounding moves no value across it
    edge = 1 - 17.5 * 2.0**-24
    lam = lam_of(alpha).double().numpy()
    below = lam[lam < edge]
    mass = folded_beta_cdf(edge, alpha)
    spread = np.sqrt(mass * (1 - mass) / MILLION)
    assert abs(len(below) / MILLION - mass) < stats.norm.isf(LEAST_P / 2) * spread
    conditional = stats.kstest(below, lambda values: folded_beta_cdf(values, alpha) / mass)
    assert conditional.pvalue > LEAST_P


@pytest.mark.parametrize(
    ("alpha", "mean", "deviation"),
    [(0.25, 0.881, 0.146), (0.5, 0.818, 0.154), (0.75, 0.778, 0.150), (1.0, 0.750, 0.144)],
)
def test_lam_has_the_moments_of_max_lam_and_its_complement(alpha, mean, deviation):
    lam = lam_of(alpha, seed=12).double()
    # the table is rounded to 5e-4; a mean of a million strays by 1.5e-4
    assert float(lam.mean()) == pytest.approx(mean, abs=0.0011)
    assert float(lam.std()) == pytest.approx(deviation, abs=0.0011)


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.25, *ALPHAS, 1000.0])
def test_lam_is_the_quantile_to_a_millionth_at_every_word(alpha, monkeypatch):
    rng = np.random.default_rng(0)
    ends = [0, 255, 256, 2**31 - 1, 2**31, 2**32 - 257, 2**32 - 256, 2**32 - 1]
    near_ends = [2**bit for bit in range(32)] + [2**32 - 2**bit for bit in range(32)]
    words = np.array([*ends, *near_ends, *rng.integers(0, 2**32, 20_000)], dtype=np.uint64)
    philox = sampling.philox

    def philox_with_chosen_words(counter, seed):
        drawn = philox(counter, seed)
        drawn[0, counter[3] & np.uint64(0xFF) == sampling.Purpose.LAM] = words
        return drawn

    monkeypatch.setattr(philox_module, "philox", philox_with_chosen_words)
    ids = torch.arange(len(words))
    lam = sampling.draw_mixup(0, 0, ids, 0, num_augmentations=1, alpha=alpha).lam.double().numpy()
    tail = 1 - (words >> np.uint64(8)) * 2.0**-24
    expected = 1 - special.betaincinv(alpha, alpha, tail / 2)
    np.testing.assert_allclose(lam, expected, atol=1e-6, rtol=0)
    assert lam[0] == 0.5
    assert (lam >= 0.5).all()
    assert (lam <= 1).all()


@pytest.mark.parametrize("alpha", [0.1, 0.75, 16.0])
def test_lam_is_float32_in_half_to_one(alpha):
    lam = lam_of(alpha, length=100_000)
    assert lam.dtype == torch.float32
    assert 0.5 <= float(lam.min()) <= float(lam.max()) <= 1


def test_lam_of_two_parts_of_a_batch_are_uncorrelated():
    lam = sampling.draw_mixup(3, 5, 20_000, 20_000).lam.view(3, -1).numpy()
    for one, other in combinations(range(3), 2):
        assert stats.pearsonr(lam[one], lam[other]).pvalue > LEAST_P


def test_lam_of_a_batch_is_one_value_that_changes_with_the_step():
    steps = [sampling.draw_mixup(3, step, 8, 8, lam="batch").lam for step in range(50)]
    assert all(len(lam.unique()) == 1 for lam in steps)
    assert len(torch.stack(steps)[:, 0].unique()) == 50


def test_lam_of_a_batch_follows_the_folded_beta_distribution():
    values = [float(sampling.draw_mixup(3, s, 2, 2, lam="batch").lam[0]) for s in range(3000)]
    assert stats.kstest(values, folded_beta_cdf, args=(0.75,)).pvalue > LEAST_P


@pytest.mark.parametrize("alpha", [-0.75, 0.0, 0.049, 1001.0, float("nan"), float("inf")])
def test_an_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha must be in \[0\.05, 1000\], got"):
        sampling.draw_mixup(0, 0, 4, 4, alpha=alpha)


# The shuffle


def is_permutation(order):
    return order.dtype == torch.int64 and torch.equal(order.sort().values, torch.arange(len(order)))


def test_orders_are_permutations_of_every_length():
    broken = [n for n in range(2001) if not is_permutation(sampling.epoch_order(7, n, n))]
    assert broken == []


@pytest.mark.parametrize("length", [10_007, 65_536, 1_000_003])
def test_orders_of_large_data_sets_are_permutations(length):
    order = sampling.epoch_order(7, 1, length)
    assert is_permutation(order)
    assert int((order == torch.arange(length)).sum()) < 10  # Poisson(1) of fixed points


def orders_at_once(seed, length, epochs):
    """Orders of epochs 0, 1, .., drawn in one pass."""
    request = (shuffle_module.shuffle_rows(length, 0), sampling.Purpose.EPOCH)
    (words,) = philox_module.draw_words(seed, 0, epochs, [request])
    return list(map(tuple, shuffle_module.bijection(words, length).tolist()))


@pytest.mark.parametrize(
    ("length", "draws"), [(2, 4_000), (3, 4_000), (4, 8_000), (5, 24_000), (6, 24_000)]
)
def test_orders_of_a_few_are_uniform_over_all_orders(length, draws):
    orders = orders_at_once(1, length, draws)
    for epoch in (0, 1, draws - 1):
        assert orders[epoch] == tuple(sampling.epoch_order(1, epoch, length).tolist())
    counts = Counter(orders)
    observed = [counts[order] for order in permutations(range(length))]
    assert sum(observed) == draws
    assert stats.chisquare(observed).pvalue > LEAST_P


def parity(order):
    """Return 1 for an odd permutation, 0 for an even one: its length less its cycles."""
    seen, cycles = [False] * len(order), 0
    for start in range(len(order)):
        if not seen[start]:
            cycles += 1
            while not seen[start]:
                seen[start], start = True, order[start]
    return (len(order) - cycles) % 2


@pytest.mark.parametrize("length", range(2, 31))
def test_orders_are_odd_half_of_the_time(length):
    odd = sum(parity(sampling.epoch_order(1, e, length).tolist()) for e in range(300))
    assert stats.binomtest(odd, 300, 0.5).pvalue > LEAST_P


@pytest.mark.parametrize("length", [12, 16, 17, 30])
def test_every_position_meets_every_partner_equally_often(length):
    draws = 4_000
    orders = np.stack([sampling.epoch_order(2, e, length).numpy() for e in range(draws)])
    counts = np.stack([np.bincount(column, minlength=length) for column in orders.T])
    # a table whose rows and columns are all fixed sums
    statistic = ((counts - draws / length) ** 2).sum() / (draws / length) * (length - 1) / length
    assert stats.chi2.sf(statistic, (length - 1) ** 2) > LEAST_P


@pytest.fixture(scope="module")
def partners():
    """Partners of 1000 consecutive steps at the usual batch of 64 + 2·64, [1000, 192]."""
    return np.stack([sampling.draw_mixup(3, step, 64, 64).index.numpy() for step in range(1000)])


def mean_correlation(left, right):
    """The mean over steps of Pearson's r between rows, in standard errors, and the mean of r²."""
    left = left - left.mean(axis=1, keepdims=True)
    right = right - right.mean(axis=1, keepdims=True)
    r = (left * right).sum(axis=1) / np.sqrt((left**2).sum(axis=1) * (right**2).sum(axis=1))
    return r.mean() * np.sqrt(len(r) * (left.shape[1] - 1)), (r**2).mean()


def test_partners_do_not_correlate_with_positions(partners):
    positions = np.broadcast_to(np.arange(192.0), partners.shape)
    errors, square = mean_correlation(positions, partners)
    assert abs(errors) < 4
    # r² of a random permutation has mean 1/(n - 1), and strays by sqrt(2/1000) of that
    assert square * 191 == pytest.approx(1, abs=4 * np.sqrt(2 / 1000))


def test_partners_do_not_correlate_with_those_of_the_step_before(partners):
    errors, square = mean_correlation(partners[:-1], partners[1:])
    assert abs(errors) < 4
    assert square * 191 == pytest.approx(1, abs=4 * np.sqrt(2 / 1000))
    agreements = (partners[:-1] == partners[1:]).sum(axis=1)
    assert agreements.mean() == pytest.approx(1, abs=4 / np.sqrt(999))


def test_rows_meet_themselves_as_often_as_in_a_random_permutation(partners):
    fixed = (partners == np.arange(192)).sum(axis=1)
    assert fixed.mean() == pytest.approx(1, abs=4 / np.sqrt(1000))
    observed = np.bincount(np.minimum(fixed, 4), minlength=5)
    expected = stats.poisson(1).pmf(np.arange(4))
    expected = 1000 * np.append(expected, 1 - expected.sum())
    assert stats.chisquare(observed, expected).pvalue > LEAST_P


@pytest.mark.parametrize("lag", [1, 2, 12, 16, 64])
def test_neighbours_have_unrelated_partners(partners, lag):
    differences = (partners[:, lag:] - partners[:, :-lag]) % 192
    assert (differences != 0).all()
    assert p_uniform(differences.ravel() - 1, 191) > LEAST_P


def test_a_labelled_row_meets_unlabelled_rows_by_their_share(partners):
    labelled = (partners[:, :64] < 64).sum()
    assert abs(labelled / (1000 * 64) - 1 / 3) < 4 * np.sqrt(2 / 9 / (1000 * 64))


def test_epoch_orders_differ_by_epoch_seed_and_stream():
    order = sampling.epoch_order(1, 2, 1000)
    others = [
        sampling.epoch_order(1, 3, 1000),
        sampling.epoch_order(2, 2, 1000),
        sampling.epoch_order(1, 2, 1000, view=1),
        sampling.draw_mixup(1, 2, 1000, 0, num_augmentations=1).index,
    ]
    for other in others:
        assert (order == other).float().mean() < 0.02
    assert torch.equal(order, sampling.epoch_order(1, 2, 1000))


def test_labelled_and_unlabelled_orders_are_uncorrelated():
    labelled = np.stack([sampling.epoch_order(1, e, 192).numpy() for e in range(500)])
    unlabelled = np.stack([sampling.epoch_order(1, e, 192, view=1).numpy() for e in range(500)])
    errors, _ = mean_correlation(labelled, unlabelled)
    assert abs(errors) < 4
    assert (labelled == unlabelled).sum(axis=1).mean() == pytest.approx(1, abs=4 / np.sqrt(500))


# Which rows meet


def test_all_rows_meet_any_other(partners):
    draws = sampling.draw_mixup(3, 0, 64, 64, mix="all")
    assert is_permutation(draws.index)
    assert (draws.lam < 1).any()
    np.testing.assert_array_equal(draws.index, partners[0])


def test_separate_rows_meet_within_their_part():
    for step in range(50):
        draws = sampling.draw_mixup(3, step, 7, 5, num_augmentations=3, mix="separate")
        assert is_permutation(draws.index[:7])
        assert is_permutation(draws.index[7:] - 7)
    assert torch.equal(draws.lam, sampling.draw_mixup(3, 49, 7, 5, num_augmentations=3).lam)


def test_separate_parts_of_one_length_are_shuffled_apart():
    same = [
        torch.equal(index[:40], index[40:] - 40)
        for step in range(20)
        for index in [sampling.draw_mixup(3, step, 40, 40, num_augmentations=1, mix="separate")[1]]
    ]
    assert not any(same)


@pytest.mark.parametrize(
    ("mix", "mixed"),
    [("labelled", slice(0, 7)), ("unlabelled", slice(7, 22)), ("none", slice(0, 0))],
)
@pytest.mark.parametrize("lam", ["sample", "batch"])
def test_rows_that_are_not_mixed_keep_all_of_themselves(mix, mixed, lam):
    draws = sampling.draw_mixup(3, 5, 7, 5, num_augmentations=3, mix=mix, lam=lam)
    separate = sampling.draw_mixup(3, 5, 7, 5, num_augmentations=3, mix="separate", lam=lam)
    expected = MixUpParams(torch.ones(22), torch.arange(22))
    expected.lam[mixed] = separate.lam[mixed]
    expected.index[mixed] = separate.index[mixed]
    assert_same(draws, expected)
    assert is_permutation(draws.index)


@pytest.mark.parametrize(("field", "value"), [("mix", "labeled"), ("lam", "row")])
def test_an_unknown_mode_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} must be one of .* got '{value}'"):
        sampling.draw_mixup(0, 0, 4, 4, **{field: value})


# Errors


def draw_calls(seed, step):
    return [
        lambda: sampling.draw_augment(seed, step, 4, 0, padding=4),
        lambda: sampling.draw_batch(seed, step, 4, 4, DrawPlan(policy=AugmentPolicy(**POLICY))),
        lambda: sampling.draw_mixup(seed, step, 4, 4),
        lambda: sampling.generator_seed(seed, step),
    ]


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_refused(seed):
    for call in [*draw_calls(seed, 0), lambda: sampling.epoch_order(seed, 0, 4)]:
        with pytest.raises(ValueError, match=rf"seed must be in 0 \.\. 2\*\*63 - 1, got {seed}"):
            call()


@pytest.mark.parametrize("step", [-1, 2**32])
def test_a_step_out_of_range_is_refused(step):
    for call in draw_calls(0, step):
        with pytest.raises(ValueError, match=rf"step must be in 0 \.\. 2\*\*32 - 1, got {step}"):
            call()


@pytest.mark.parametrize("epoch", [-1, 2**32])
def test_an_epoch_out_of_range_is_refused(epoch):
    with pytest.raises(ValueError, match=rf"epoch must be in 0 \.\. 2\*\*32 - 1, got {epoch}"):
        sampling.epoch_order(0, epoch, 4)


def test_the_last_seed_and_step_are_allowed():
    for call in draw_calls(2**63 - 1, 2**32 - 1):
        call()


@pytest.mark.parametrize(
    ("ids", "got"),
    [
        (torch.arange(4, dtype=torch.int32), r"\[4\] int32"),
        (torch.arange(4.0), r"\[4\] float32"),
        (torch.arange(4)[:, None], r"\[4, 1\] int64"),
        (torch.tensor(4), r"\[\] int64"),
    ],
)
def test_ids_of_another_kind_are_refused(ids, got):
    for call in (
        lambda: sampling.draw_augment(0, 0, ids, 0),
        lambda: sampling.draw_batch(0, 0, 4, ids, DrawPlan(policy=AugmentPolicy(**POLICY))),
        lambda: sampling.draw_mixup(0, 0, ids, torch.arange(4)),
    ):
        with pytest.raises(ValueError, match=rf"ids(_x|_u)? must be \[M\] int64, got {got}"):
            call()


def test_a_negative_length_is_refused():
    with pytest.raises(ValueError, match=r"length must be in 0 \.\. 2\*\*40, got -1"):
        sampling.epoch_order(0, 0, -1)


# On the way to the device


def batch_draws(len_x=5, len_u=3):
    return sampling.draw_batch(0, 1, len_x, len_u, DrawPlan(policy=AugmentPolicy(**POLICY)))


@pytest.mark.parametrize("len_x", [1, 2, 5])
@pytest.mark.parametrize("with_augment", [False, True])
def test_draws_survive_packing_into_one_copy(len_x, with_augment, monkeypatch):
    augment, mixup = batch_draws(len_x)
    augment = augment if with_augment else None
    copied = []

    def to(tensor, device, **_):
        copied.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "to", to)  # the copy, without another device
    packed = sampling.pack(augment, mixup).to("meta")
    there = sampling.unpack(packed, len(mixup.lam), with_augment=with_augment)
    assert [tensor.numel() * 4 for tensor in copied] == [
        len(mixup.lam) * (44 if with_augment else 12)
    ]
    assert_same(mixup, there[1])
    if with_augment:
        assert_same(augment, there[0])
    else:
        assert there[0] is None


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("len_x", [1, 64])
def test_draws_on_the_gpu_equal_those_on_the_cpu(len_x):
    augment, mixup = batch_draws(len_x, 64)
    packed = sampling.pack(augment, mixup).pin_memory().to("cuda", non_blocking=True)
    augment_there, mixup_there = sampling.unpack(packed, len(mixup.lam), with_augment=True)
    alone = sampling.augment_to_device(augment, torch.device("cuda"))
    for here, there in ((augment, augment_there), (augment, alone), (mixup, mixup_there)):
        assert all(field.device.type == "cuda" for field in there)
        assert_same(here, type(there)(*(field.cpu() for field in there)))
