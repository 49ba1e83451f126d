"""The oracle against closed forms and cases worked by hand."""

import ast
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tests import oracle

PLAIN_POLICY = {
    "padding": 2,
    "padding_mode": "reflect",
    "blur_radius": 1,
    "mean": (0.5, 0.5),
    "std": (0.5, 0.5),
}


def params(top=2, left=2, flip=False, zoom=(0, 0, 0, 0), sigma=0.0):
    """Draws that leave an image padded by 2 as it is, unless told otherwise."""
    return {"top": top, "left": left, "flip": flip, "zoom": zoom, "sigma": sigma}


def random_image(seed, height=6, width=7):
    return np.random.default_rng(seed).integers(0, 256, (2, height, width)).astype(np.float64)


def entropy(probs):
    return -(probs * np.log(probs)).sum(axis=-1)


def test_oracle_imports_numpy_and_the_standard_library_only():
    tree = ast.parse(Path(oracle.__file__).read_text(encoding="utf-8"))
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add((node.module or ".").split(".")[0])
    assert modules == {"collections", "typing", "numpy"}


# Label guessing


def test_softmax_equals_a_worked_example_and_survives_huge_logits():
    assert_allclose(oracle.softmax([0.0, math.log(3.0)]), [0.25, 0.75], rtol=1e-15)
    assert_array_equal(oracle.softmax([[1e4, 0.0], [-1e4, -1e4]]), [[1.0, 0.0], [0.5, 0.5]])


def test_softmax_of_another_axis_is_that_of_the_transpose():
    logits = np.random.default_rng(0).normal(size=(3, 4))
    assert_array_equal(oracle.softmax(logits, axis=0), oracle.softmax(logits.T).T)


def test_log_softmax_is_the_log_of_softmax():
    logits = np.random.default_rng(1).normal(size=(3, 4))
    assert_allclose(np.exp(oracle.log_softmax(logits)), oracle.softmax(logits), rtol=1e-14)


def test_sharpen_equals_a_worked_example():
    # Squares 0.04, 0.09, 0.25 over their sum 0.38.
    expected = [4 / 38, 9 / 38, 25 / 38]
    assert_allclose(oracle.sharpen([0.2, 0.3, 0.5], 0.5), expected, rtol=1e-14)


def test_sharpen_at_temperature_one_is_the_identity():
    probs = oracle.softmax(np.random.default_rng(2).normal(size=(5, 4)))
    assert_allclose(oracle.sharpen(probs, 1.0), probs, rtol=1e-14)


def test_sharpen_lowers_the_entropy_as_the_temperature_falls():
    probs = oracle.softmax(np.random.default_rng(3).normal(size=(20, 5)))
    entropies = [entropy(oracle.sharpen(probs, t)) for t in (2.0, 1.0, 0.7, 0.5, 0.25)]
    assert all((after < before).all() for before, after in pairwise(entropies))


def test_guess_is_the_sharpened_mean_of_probabilities():
    # Softmax rows (1/4, 3/4) and (1/2, 1/2): mean (3/8, 5/8), squared and normalised (9, 25)/34.
    logits = [[[0.0, math.log(3.0)]], [[7.0, 7.0]]]
    assert_allclose(oracle.guess_labels(logits, 0.5), [[9 / 34, 25 / 34]], rtol=1e-14)


@pytest.mark.parametrize("temperature", [0.3, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("num_views", [1, 2, 3])
def test_guess_equals_sharpen_of_the_mean_softmax(num_views, temperature):
    logits = np.random.default_rng(4).normal(size=(num_views, 6, 5))
    expected = oracle.sharpen(oracle.softmax(logits).mean(axis=0), temperature)
    assert_allclose(oracle.guess_labels(logits, temperature), expected, rtol=1e-12)


def test_guess_at_temperature_a_hundredth_is_right_where_powers_underflow():
    # 10 000 classes near 1e-4: every p^100 is 1e-400. One logit 0.01 above becomes e to 1.
    logits = np.zeros((2, 1, 10_000))
    logits[:, 0, 0] = 0.01
    guess = oracle.guess_labels(logits, 0.01)[0]
    assert_allclose(guess[0], math.e / (math.e + 9_999), rtol=1e-10)
    assert_allclose(guess[1:], 1 / (math.e + 9_999), rtol=1e-10)


def test_smoothing_moves_one_hot_rows_towards_uniform():
    smoothed = oracle.smooth([[0.0, 1.0, 0.0, 0.0]], 0.2)
    assert_allclose(smoothed, [[0.05, 0.85, 0.05, 0.05]], rtol=1e-14)
    assert_array_equal(oracle.smooth([[0.0, 1.0]], 0.0), [[0.0, 1.0]])
    assert_allclose(oracle.smooth([[0.0, 1.0]], 1.0), [[0.5, 0.5]])


# MixUp


def test_mixup_at_lambda_one_or_zero_is_the_identity():
    inputs, targets = np.arange(12.0).reshape(3, 2, 2), np.eye(3)
    for lam in (np.ones(3), np.zeros(3)):
        mixed, labels = oracle.mixup(inputs, targets, lam, [2, 0, 1])
        assert_array_equal(mixed, inputs)
        assert_array_equal(labels, targets)


def test_mixup_keeps_each_row_nearer_to_itself():
    # A lambda of 0.25 becomes 0.75; 0.9 stays; 0.5 is even.
    mixed, labels = oracle.mixup([[0.0], [8.0], [4.0]], np.eye(3), [0.25, 0.9, 0.5], [1, 2, 0])
    assert_allclose(mixed, [[2.0], [7.6], [2.0]], rtol=1e-14)
    assert_allclose(labels, [[0.75, 0.25, 0], [0, 0.9, 0.1], [0.5, 0, 0.5]], rtol=1e-14)


def test_mixup_of_equal_labels_leaves_them():
    targets = np.array([[0.0, 1.0], [0.0, 1.0]])
    _, labels = oracle.mixup(np.zeros((2, 1)), targets, [0.6, 0.7], [1, 0])
    assert_allclose(labels, targets, rtol=1e-15)


def interleave_lists(groups):
    """The reference's idea on equal lists: each is cut alike; part i of list 0 and list i swap."""
    count, size = len(groups), len(groups[0])
    lengths = [size // count] * count
    for i in range(size % count):
        lengths[count - 1 - i] += 1
    parts = [[] for _ in groups]
    for group, cut in zip(groups, parts, strict=True):
        rest = list(group)
        for length in lengths:
            cut.append(rest[:length])
            rest = rest[length:]
    for i in range(1, count):
        parts[0][i], parts[i][i] = parts[i][i], parts[0][i]
    return [[row for part in cut for row in part] for cut in parts]


@pytest.mark.parametrize("num_views", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [4, 5, 6, 7])
def test_interleave_of_equal_groups_is_the_references(batch, num_views):
    rows = np.arange((num_views + 1) * batch)
    expected = interleave_lists(rows.reshape(num_views + 1, batch).tolist())
    assert_array_equal(oracle.interleave(rows, num_views + 1), np.concatenate(expected))


def test_interleave_equals_two_worked_examples():
    # Two groups of 4: the second halves swap. Three groups of 4: slices 1, 1, 2 long.
    assert_array_equal(oracle.interleave(range(8), 2), [0, 1, 6, 7, 4, 5, 2, 3])
    expected = [0, 5, 10, 11, 4, 1, 6, 7, 8, 9, 2, 3]
    assert_array_equal(oracle.interleave(range(12), 3), expected)
    # Groups 0-2, 3-5, 6-7: n = 2, slices 0, 1, 1 long.
    assert_array_equal(oracle.interleave(range(8), 3), [3, 7, 2, 0, 4, 5, 6, 1])


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 4, 7, 10, 12, 23])
def test_interleave_is_its_own_inverse_and_a_permutation(num_rows, num_groups):
    rows = np.arange(2.0 * num_rows).reshape(num_rows, 2)
    once = oracle.interleave(rows, num_groups)
    assert_array_equal(np.sort(once, axis=0), rows)
    assert_array_equal(oracle.interleave(once, num_groups), rows)


@pytest.mark.parametrize("num_groups", [2, 3, 4, 5])
@pytest.mark.parametrize("num_rows", [25, 26, 29, 40])
def test_interleaved_group_zero_holds_a_share_of_each_and_each_holds_one_of_it(
    num_rows, num_groups
):
    origin = np.concatenate(
        [np.full(len(g), i) for i, g in enumerate(np.array_split(range(num_rows), num_groups))]
    )
    groups = np.array_split(oracle.interleave(origin, num_groups), num_groups)
    assert set(groups[0]) == set(range(num_groups))
    assert all(set(group) == {0, i} for i, group in enumerate(groups) if i > 0)


# Loss


def test_loss_equals_a_worked_example_of_two_classes():
    # Softmax rows: (1/4, 3/4), (1/2, 1/2), (1/4, 3/4).
    logits = [[0.0, math.log(3.0)], [5.0, 5.0], [0.0, math.log(3.0)]]
    targets = [[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]]
    loss, loss_x, loss_u = oracle.mixmatch_loss(logits, targets, num_labelled=1, weight_u=75.0)
    assert_allclose(loss_x, -math.log(0.75), rtol=1e-14)
    # (1/4 + 1/4 + 1/16 + 1/16) over 2 rows of 2 classes.
    assert_allclose(loss_u, 0.625 / 4, rtol=1e-14)
    assert_allclose(loss, -math.log(0.75) + 75 * 0.625 / 4, rtol=1e-14)


def test_cross_entropy_is_the_mean_over_rows_of_soft_targets():
    logits = [[0.0, math.log(3.0)], [1.0, 1.0]]
    targets = [[0.5, 0.5], [0.3, 0.7]]
    expected = (-0.5 * math.log(0.25) - 0.5 * math.log(0.75) + math.log(2)) / 2
    assert_allclose(oracle.cross_entropy(logits, targets), expected, rtol=1e-14)


def test_cross_entropy_survives_huge_logits():
    assert oracle.cross_entropy([[1e4, 0.0], [0.0, -1e4]], [[0.0, 1.0], [1.0, 0.0]]) == 5e3


def test_cross_entropy_takes_zero_times_log_zero_as_zero():
    assert oracle.cross_entropy([[0.0, 0.0, -math.inf]], [[0.5, 0.5, 0.0]]) == math.log(2)


def test_a_part_without_rows_adds_nothing_to_the_loss():
    logits, targets = np.zeros((2, 2)), np.eye(2)
    assert oracle.mixmatch_loss(logits, targets, 2, 9.0) == (math.log(2), math.log(2), 0.0)
    assert oracle.mixmatch_loss(logits, targets, 0, 8.0) == (2.0, 0.0, 0.25)


def test_rampup_is_linear_then_one():
    shares = [oracle.linear_rampup(step, 4) for step in (0, 1, 2, 4, 100)]
    assert shares == [0.0, 0.25, 0.5, 1.0, 1.0]
    assert oracle.linear_rampup(0, 0) == 1.0


# Augmentation


def test_reflect_index_of_four_walks_back_and_forth():
    walk = [oracle.reflect_index(i, 4) for i in range(-7, 11)]
    assert walk == [1, 0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2]
    assert [oracle.reflect_index(i, 1) for i in (-3, 0, 5)] == [0, 0, 0]
    assert [oracle.reflect_index(i, 2) for i in (-2, -1, 0, 1, 2, 3)] == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("padding", [0, 1, 3, 11])
@pytest.mark.parametrize(
    ("mode", "numpy_mode"), [("reflect", "reflect"), ("zeros", "constant"), ("edge", "edge")]
)
def test_shift_crop_is_a_window_of_the_padded_image(mode, numpy_mode, padding):
    image = random_image(5, 4, 5)
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)), mode=numpy_mode)
    for top in range(2 * padding + 1):
        left = 2 * padding - top // 2
        expected = padded[:, top : top + 4, left : left + 5]
        assert_array_equal(oracle.shift_crop(image, top, left, padding, mode), expected)


def test_shift_crop_refuses_an_unknown_mode():
    with pytest.raises(ValueError, match="circular"):
        oracle.shift_crop(random_image(6), 0, 0, 1, "circular")


def test_zoom_crop_of_nothing_is_the_identity():
    image = random_image(7)
    assert_array_equal(oracle.zoom_crop(image, 0, 0, 0, 0), image)


def test_zoom_crop_stretches_two_pixels_to_four():
    # Centres at -0.25 (held at 0), 0.25, 0.75 and 1.25 (held at the last pixel).
    row = np.array([[[9.0, 0.0, 4.0, 9.0]]])
    assert_allclose(oracle.zoom_crop(row, 0, 0, 1, 1), [[[0.0, 1.0, 3.0, 4.0]]], rtol=1e-14)
    column = row.transpose(0, 2, 1)
    assert_allclose(oracle.zoom_crop(column, 1, 1, 0, 0)[0, :, 0], [0.0, 1.0, 3.0, 4.0], rtol=1e-14)


def test_zoom_crop_takes_each_side_by_its_name():
    # What is kept is one pixel, stretched over all.
    image = np.arange(20.0).reshape(1, 4, 5)
    zoomed = oracle.zoom_crop(image, top=1, bottom=2, left=3, right=1)
    assert_array_equal(zoomed, np.full((1, 4, 5), image[0, 1, 3]))


def test_zoom_crop_of_a_ramp_is_a_ramp_away_from_the_borders():
    ramp = np.tile(np.arange(8.0), (1, 3, 1))
    zoomed = oracle.zoom_crop(ramp, 0, 0, 1, 2)[0, 0]
    # 5 pixels from value 1, over 8: the value at j is 1 + (j + 0.5) 5/8 - 0.5.
    assert_allclose(zoomed[1:7], 0.5 + (np.arange(1, 7) + 0.5) * 5 / 8, rtol=1e-14)
    assert_allclose(zoomed[[0, 7]], [1.0, 5.0], rtol=1e-14)


def test_flip_mirrors_columns_only_and_twice_is_the_identity():
    assert_array_equal(oracle.flip([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]), [[[3, 2, 1], [6, 5, 4]]])
    image = random_image(8)
    assert_array_equal(oracle.flip(oracle.flip(image)), image)


@pytest.mark.parametrize("sigma", [0.0, 0.1, 1.0, 3.0])
@pytest.mark.parametrize("radius", [0, 1, 4])
def test_gaussian_kernel_is_symmetric_and_sums_to_one(sigma, radius):
    kernel = oracle.gaussian_kernel(sigma, radius)
    assert kernel.shape == (2 * radius + 1,)
    assert_allclose(kernel.sum(), 1.0, rtol=1e-15)
    assert_array_equal(kernel, kernel[::-1])


def test_gaussian_kernel_equals_a_worked_example():
    side = math.exp(-0.125)
    expected = np.array([math.exp(-0.5), side, 1, side, math.exp(-0.5)])
    assert_allclose(oracle.gaussian_kernel(2.0, 2), expected / expected.sum(), rtol=1e-14)
    assert_array_equal(oracle.gaussian_kernel(0.0, 2), [0, 0, 1, 0, 0])


def test_blur_leaves_a_constant_and_sigma_zero_leaves_anything():
    assert_allclose(oracle.blur(np.full((2, 5, 6), 7.0), 1.5, 3), 7.0, rtol=1e-14)
    image = random_image(9)
    assert_array_equal(oracle.blur(image, 0.0, 3), image)


def test_blur_of_a_point_is_the_outer_product_of_the_kernel():
    image = np.zeros((1, 7, 9))
    image[0, 3, 4] = 1.0
    kernel = oracle.gaussian_kernel(0.8, 2)
    expected = np.zeros((7, 9))
    expected[1:6, 2:7] = np.outer(kernel, kernel)
    assert_allclose(oracle.blur(image, 0.8, 2)[0], expected, atol=1e-16)


@pytest.mark.parametrize("radius", [2, 7])
def test_blur_is_a_convolution_of_the_reflected_image(radius):
    image = random_image(10, 4, 5)
    kernel = oracle.gaussian_kernel(1.3, radius)
    sides = (radius, radius)
    padded = np.pad(image, ((0, 0), sides, sides), mode="reflect")
    for channel in range(2):
        rows = np.array([np.convolve(row, kernel, "valid") for row in padded[channel]])
        expected = np.array([np.convolve(column, kernel, "valid") for column in rows.T]).T
        assert_allclose(oracle.blur(image, 1.3, radius)[channel], expected, rtol=1e-13)


def test_normalise_takes_pixels_to_minus_one_and_one():
    image = np.array([[[0.0, 255.0]], [[51.0, 255.0]]])
    expected = [[[-1.0, 1.0]], [[0.0, 3.2]]]
    assert_allclose(oracle.normalise(image, (0.5, 0.2), (0.5, 0.25)), expected, atol=1e-15)


def test_augment_with_nothing_drawn_only_normalises():
    image = random_image(11)
    expected = image / 127.5 - 1
    assert_allclose(oracle.augment(image, params(), PLAIN_POLICY), expected, atol=1e-15)


def test_augment_shifts_then_zooms_then_flips_then_blurs():
    image = random_image(12)
    drawn = params(top=0, left=3, flip=True, zoom=(1, 0, 2, 1), sigma=0.7)
    expected = oracle.shift_crop(image, 0, 3, 2, "reflect")
    expected = oracle.flip(oracle.zoom_crop(expected, 1, 0, 2, 1))
    expected = oracle.blur(expected, 0.7, 1) / 127.5 - 1
    assert_allclose(oracle.augment(image, drawn, PLAIN_POLICY), expected, atol=1e-14)


# Algorithm 1


class Batch:
    """Draws for B = 2 labelled and M = 3 unlabelled images, K = 2 views, L = 2 classes."""

    def __init__(self):
        rng = np.random.default_rng(13)
        self.x = rng.integers(0, 256, (2, 2, 4, 5))
        self.u = rng.integers(0, 256, (3, 2, 4, 5))
        self.y = np.array([[0.0, 1.0], [1.0, 0.0]])
        self.params_x = [params(top=1), params(left=4, flip=True)]
        self.params_u = [
            [params(left=k), params(flip=k == 1, sigma=1.0), params(zoom=(k, 1, 0, 1))]
            for k in range(2)
        ]
        self.lam = rng.uniform(size=8)
        self.index = np.array([5, 0, 7, 1, 2, 6, 4, 3])
        self.within_parts = np.array([1, 0, 7, 4, 2, 6, 3, 5])
        self.calls = []

        view_x = [
            oracle.augment(image, drawn, PLAIN_POLICY)
            for image, drawn in zip(self.x, self.params_x, strict=True)
        ]
        views_u = [
            oracle.augment(image, drawn, PLAIN_POLICY)
            for view in self.params_u
            for image, drawn in zip(self.u, view, strict=True)
        ]
        self.views = np.array(view_x + views_u)

    def model(self, images):
        self.calls.append(images)
        return np.stack([images.mean(axis=(1, 2, 3)), images[:, 0, 0, 0]], axis=1)

    def targets(self, temperature):
        probs = oracle.softmax(self.model(self.views[2:]))
        mean = (probs[:3] + probs[3:]) / 2
        guess = oracle.sharpen(mean, temperature)
        return np.concatenate([self.y, guess, guess])

    def mixmatch(self, temperature=0.5, **changed):
        draws = {"lam": self.lam, "index": self.index, **changed}
        return oracle.mixmatch(
            self.x,
            self.y,
            self.u,
            self.model,
            self.params_x,
            self.params_u,
            temperature=temperature,
            policy=PLAIN_POLICY,
            **draws,
        )


def test_mixmatch_with_nothing_mixed_or_sharpened_returns_views_and_mean_softmax():
    batch = Batch()
    inputs, targets = batch.mixmatch(temperature=1.0, lam=np.ones(8))
    assert_array_equal(inputs, batch.views)
    assert_allclose(targets, batch.targets(1.0), rtol=1e-14)


def test_mixmatch_calls_the_model_once_on_all_views_in_view_major_order():
    batch = Batch()
    batch.mixmatch()
    (images,) = batch.calls
    assert_array_equal(images, batch.views[2:])


def test_mixmatch_mixes_every_row_with_its_partner():
    batch = Batch()
    inputs, targets = batch.mixmatch()
    unmixed = batch.targets(0.5)
    for i, partner in enumerate(batch.index):
        weight = max(batch.lam[i], 1 - batch.lam[i])
        pair = weight * batch.views[i] + (1 - weight) * batch.views[partner]
        assert_allclose(inputs[i], pair, rtol=1e-13)
        pair = weight * unmixed[i] + (1 - weight) * unmixed[partner]
        assert_allclose(targets[i], pair, rtol=1e-13)
    assert_allclose(targets.sum(axis=1), 1.0, rtol=1e-14)


@pytest.mark.parametrize(
    ("mix", "mixed_rows"),
    [("labelled", range(2)), ("unlabelled", range(2, 8)), ("none", []), ("separate", range(8))],
)
def test_mixmatch_mixes_only_the_rows_of_its_mode(mix, mixed_rows):
    batch = Batch()
    inputs, targets = batch.mixmatch(mix=mix, index=batch.within_parts)
    all_inputs, all_targets = batch.mixmatch(index=batch.within_parts)
    plain_inputs, plain_targets = batch.mixmatch(lam=np.ones(8))
    for i in range(8):
        wanted = i in mixed_rows
        assert_array_equal(inputs[i], all_inputs[i] if wanted else plain_inputs[i])
        assert_array_equal(targets[i], all_targets[i] if wanted else plain_targets[i])
        assert not np.array_equal(all_inputs[i], plain_inputs[i])


def test_separate_mixing_refuses_a_partner_from_the_other_part():
    with pytest.raises(ValueError, match="stays within"):
        Batch().mixmatch(mix="separate")


def test_mixmatch_of_no_labelled_or_no_unlabelled_rows():
    batch = Batch()
    drawn = {"temperature": 0.5, "policy": PLAIN_POLICY}
    inputs, targets = oracle.mixmatch(
        batch.x,
        batch.y,
        batch.u[:0],
        batch.model,
        batch.params_x,
        [[], []],
        [0.5, 0.5],
        [1, 0],
        **drawn,
    )
    assert_allclose(inputs, np.tile(batch.views[:2].mean(axis=0), (2, 1, 1, 1)), atol=1e-14)
    assert_array_equal(targets, np.full((2, 2), 0.5))
    inputs, targets = oracle.mixmatch(
        batch.x[:0],
        batch.y[:0],
        batch.u,
        batch.model,
        [],
        batch.params_u,
        np.ones(6),
        range(6),
        **drawn,
    )
    assert_array_equal(inputs, batch.views[2:])
    assert_allclose(targets, batch.targets(0.5)[2:], rtol=1e-13)
