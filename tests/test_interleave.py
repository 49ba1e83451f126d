"""interleave: groups of rows trade slices, so that the first holds a share of every one."""

import numpy as np
import pytest
import torch

from gpu_mixmatch.functional import interleave
from tests import oracle

SIZES = [(n, g) for n in (1, 2, 3, 5, 7, 12, 16, 33, 100) for g in (1, 2, 3, 4, 5, 8, n) if g <= n]


def reference_interleave(batches, batch):
    """The list algorithm of google-research/mixmatch, libml/layers.py, in numpy."""
    nu = len(batches) - 1
    groups = [batch // (nu + 1)] * (nu + 1)
    for x in range(batch - sum(groups)):
        groups[-x - 1] += 1
    offsets = [0]
    for group in groups:
        offsets.append(offsets[-1] + group)
    parts = [[v[offsets[p] : offsets[p + 1]] for p in range(nu + 1)] for v in batches]
    for i in range(1, nu + 1):
        parts[0][i], parts[i][i] = parts[i][i], parts[0][i]
    return [np.concatenate(v) for v in parts]


@pytest.mark.parametrize(("num_rows", "num_groups"), SIZES)
def test_interleave_is_its_own_inverse(num_rows, num_groups):
    rows = torch.arange(num_rows)
    assert torch.equal(interleave(interleave(rows, num_groups), num_groups), rows)


@pytest.mark.parametrize(("num_rows", "num_groups"), SIZES)
def test_interleave_is_a_permutation(num_rows, num_groups):
    rows = interleave(torch.arange(num_rows), num_groups)
    assert torch.equal(rows.sort().values, torch.arange(num_rows))


@pytest.mark.parametrize(("num_rows", "num_groups"), SIZES)
def test_interleave_equals_the_oracle(num_rows, num_groups):
    rows = np.random.default_rng(0).normal(size=(num_rows, 2, 3))
    result = interleave(torch.from_numpy(rows), num_groups)
    np.testing.assert_array_equal(result.numpy(), oracle.interleave(rows, num_groups))


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 64])
@pytest.mark.parametrize("num_augmentations", [1, 2, 3, 4])
def test_interleave_equals_the_reference_for_equal_groups(batch, num_augmentations):
    num_groups = num_augmentations + 1
    rows = np.arange(num_groups * batch)
    expected = np.concatenate(reference_interleave(np.split(rows, num_groups), batch))
    np.testing.assert_array_equal(interleave(torch.from_numpy(rows), num_groups).numpy(), expected)


@pytest.mark.parametrize(("num_rows", "num_groups"), [(n, g) for n, g in SIZES if n >= g * g])
def test_first_group_holds_rows_of_every_group(num_rows, num_groups):
    groups = torch.arange(num_rows).tensor_split(num_groups)
    first = interleave(torch.arange(num_rows), num_groups).tensor_split(num_groups)[0]
    shares = [torch.isin(first, group).sum().item() for group in groups]
    assert min(shares) >= 1
    # shares differ by the remainders of two divisions at most
    assert max(shares) - min(shares) <= 2


@pytest.mark.parametrize(("num_rows", "num_groups"), SIZES)
def test_interleave_leaves_a_row_in_its_group_or_trades_it_with_the_first(num_rows, num_groups):
    rows = torch.arange(num_rows)
    moved = interleave(rows, num_groups) != rows
    group_of = torch.cat(
        [torch.full_like(g, i) for i, g in enumerate(rows.tensor_split(num_groups))]
    )
    partners = interleave(rows, num_groups)[moved]
    assert ((group_of[moved] == 0) != (group_of[partners] == 0)).all()


def test_interleave_of_one_group_changes_nothing():
    rows = torch.arange(7)
    assert torch.equal(interleave(rows, 1), rows)


def test_interleave_of_three_groups_of_four_is_this():
    # widths 1, 1, 2: slice 1 trades with group 1, slice 2 with group 2
    expected = [0, 5, 10, 11, 4, 1, 6, 7, 8, 9, 2, 3]
    assert interleave(torch.arange(12), 3).tolist() == expected


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64], ids=str
)
@pytest.mark.parametrize("shape", [(6,), (7, 3), (9, 3, 4, 5)], ids=str)
def test_interleave_moves_whole_rows_of_any_dtype_and_shape(shape, dtype):
    rows = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    order = interleave(torch.arange(shape[0]), 3)
    result = interleave(rows, 3)
    assert result.dtype == dtype
    assert torch.equal(result, rows[order])


def test_interleave_keeps_channels_last():
    rows = torch.randn(6, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    result = interleave(rows, 3)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(result, interleave(rows.contiguous(), 3))


def test_interleave_of_no_rows_is_no_rows():
    assert interleave(torch.empty(0, 3), 1).shape == (0, 3)


def test_interleave_returns_fresh_memory():
    rows = torch.arange(6)
    for num_groups in (1, 3):
        interleave(rows, num_groups).fill_(-1)
        assert torch.equal(rows, torch.arange(6))
    # nor does it hand out what it keeps between calls
    assert torch.equal(interleave(interleave(rows, 3), 3), rows)


def test_interleave_passes_gradients_back_to_their_rows():
    rows = torch.randn(7, 2, requires_grad=True)
    weights = torch.arange(7.0)[:, None]
    (interleave(rows, 3) * weights).sum().backward()
    assert torch.equal(rows.grad, interleave(weights, 3).expand(7, 2))


def test_interleave_in_inference_mode_does_not_spoil_later_gradients():
    # what is kept between calls must not be an inference tensor: a size that no other test uses
    with torch.inference_mode():
        interleave(torch.randn(29, 2), 3)
    rows = torch.randn(29, 2, requires_grad=True)
    interleave(rows, 3).sum().backward()
    assert torch.equal(rows.grad, torch.ones(29, 2))
