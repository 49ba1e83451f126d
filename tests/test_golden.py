"""Draws and batches are those of the first version, to the last bit; see `tests.golden`."""

import json
import platform

import pytest
import torch

from tests import golden

RECORDED = json.loads(golden.FILE.read_text())
# torch's lerp, which mixes in plain torch, is one rounding where the processor has FMA
same_rounding = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="recorded on x86-64"
)


def test_draws_are_those_that_were_recorded():
    assert golden.draws() == RECORDED["draws"]


def test_strong_views_are_those_that_were_recorded():
    assert golden.strong_views() == RECORDED["strong views"]


@same_rounding
def test_batches_are_those_that_were_recorded():
    found = golden.batches()
    assert found.keys() == RECORDED["batches"].keys()
    for name, recorded in RECORDED["batches"].items():
        for part in ("inputs", "targets"):
            mine, theirs = found[name][part], recorded[part]
            if isinstance(theirs, str):
                assert mine == theirs, f"{name}: {part} moved by a bit or more"
            else:
                tolerance = 1e-2 if "bfloat16" in name and part == "inputs" else 2e-6
                torch.testing.assert_close(
                    torch.tensor(mine), torch.tensor(theirs), rtol=tolerance, atol=tolerance
                )


def test_a_golden_digest_sees_one_bit():
    values = torch.arange(8, dtype=torch.float32)
    other = values.clone()
    other[3] = torch.nextafter(other[3], other[4])
    assert golden.digest(values) != golden.digest(other)
