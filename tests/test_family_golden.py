"""FixMatch's draws and batches are those of its first version; see `tests.family_golden`."""

import json

import pytest
import torch

from tests import family_golden
from tests.test_golden import same_rounding

RECORDED = json.loads(family_golden.FILE.read_text())


def test_draws_are_those_that_were_recorded():
    found = family_golden.draws()
    assert found == RECORDED["draws"]
    assert len(set(found.values())) == len(found)


@same_rounding
def test_batches_are_those_that_were_recorded():
    pytest.importorskip("numba")
    found = family_golden.batches()
    assert found.keys() == RECORDED["batches"].keys()
    for name, recorded in RECORDED["batches"].items():
        assert found[name]["inputs"] == recorded["inputs"], f"{name} moved by a bit or more"
        assert found[name]["weights"] == recorded["weights"]
        mine, theirs = (torch.tensor(part["targets"]) for part in (found[name], recorded))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6)


def test_implementations_give_one_batch_to_the_last_bit():
    for order in ("first", "one pass"):
        one, other = (RECORDED["batches"][f"{impl}, {order}"] for impl in family_golden.IMPLS)
        assert one == other
    weights = RECORDED["batches"]["eager, first"]["weights"]
    assert 0 < sum(weights[3:]) < len(weights[3:])
