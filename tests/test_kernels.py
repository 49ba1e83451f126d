"""Compiled for sm_80, sm_90 and sm_100, which needs no GPU: registers, widths, bytes moved."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.skips import skip_without

ROOT = Path(__file__).parent.parent
skip_without("triton")
pytestmark = pytest.mark.slow


def run(*arguments, **variables):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels", *arguments],
        cwd=ROOT,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    file = tmp_path_factory.mktemp("kernels") / "kernels.json"
    result = run("--arch", "80", "90", "100", "--json", str(file))
    assert result.returncode == 0, result.stderr
    return {**json.loads(file.read_text()), "text": result.stdout}


def kernels_of(report, name):
    found = [kernel for kernel in report["kernels"] if kernel["kernel"] == name]
    assert {kernel["arch"] for kernel in found} == {80, 90, 100}
    return found


def test_every_kernel_is_compiled_for_every_architecture(report):
    compiled = {(kernel["kernel"], kernel["arch"]) for kernel in report["kernels"]}
    names = {
        "draw_kernel",
        "augment_kernel",
        "blur_kernel",
        "guess_labels_kernel",
        "mixup_kernel",
        "mixmatch_loss_kernel",
        "mixmatch_loss_backward_kernel",
    }
    assert compiled == {(name, arch) for name in names for arch in (80, 90, 100)}


def test_no_kernel_spills_or_touches_local_memory(report):
    for kernel in report["kernels"]:
        used = [kernel[name] for name in ("stack", "local", "local_accesses")]
        assert used == [0, 0, 0], kernel
        assert 0 < kernel["registers"] < 255, kernel


def test_mixup_reads_and_writes_16_bytes_at_a_time(report):
    for kernel in kernels_of(report, "mixup_kernel"):
        # a tile of 2048 values, 16 per thread, two rows read and one written
        itemsize = 2 if "bfloat16" in kernel["regime"] else 4
        assert kernel["loads"]["128"] == 2 * itemsize
        assert kernel["stores"]["128"] == itemsize
        assert set(kernel["stores"]) == {"32", "128"}  # 32: targets, whatever their number


@pytest.mark.parametrize("name", ["augment_kernel", "blur_kernel"])
def test_views_are_written_16_bytes_at_a_time(report, name):
    for kernel in kernels_of(report, name):
        assert set(kernel["stores"]) == {"128"}, kernel


def test_blur_reads_16_bytes_at_a_time(report):
    for kernel in kernels_of(report, "blur_kernel"):
        assert kernel["loads"]["128"] > 0
        assert set(kernel["loads"]) <= {"32", "128"}  # 32: sigma


def test_shifted_bytes_are_read_by_neighbouring_threads(report):
    """A row may start at any byte, so that loads are bytes; a warp's bytes lie side by side.

    A thread holds 16 bytes of output, hence 4 or 8 pixels in a row, and the next thread the next
    ones: the byte loads of a warp fall into the same sectors, whichever way the row runs.
    """
    if tuple(map(int, report["triton"].split(".")[:2])) < (3, 8):
        pytest.skip("Triton 3.6 puts the threads of a byte load down the lines: right, but slower")
    for kernel in kernels_of(report, "augment_kernel"):
        assert kernel["loads"]["8"] > 0
        assert set(kernel["loads"]) == {"8", "32"}  # 32: the draws of a row
        assert kernel["byte_loads"], kernel
        for layout in kernel["byte_loads"]:
            assert layout["order"] == [1, 0]
            lines, columns = layout["sizePerThread"]
            assert (lines, columns) in ((1, 4), (1, 8))
            # the threads of a warp that are side by side cover at least one sector of 32 bytes
            assert layout["threadsPerWarp"][1] * columns >= 32


def test_a_batch_of_another_size_or_alignment_is_no_other_kernel(report):
    for regime in report["sizes"]:
        assert set(regime["variants"].values()) == {1}, regime
    names = {place.split()[1] for regime in report["sizes"] for place in regime["variants"]}
    assert names == {kernel["kernel"] for kernel in report["kernels"]}


def test_a_batch_without_zoom_and_blur_moves_little_more_than_the_least(report):
    batches = [batch for batch in report["batches"] if batch["effects"] == "shift"]
    assert len(batches) == 4
    for batch in batches:
        assert 1 <= batch["ratio"] <= 1.15, batch
        assert len(batch["launches"]) == 4


def test_bytes_are_those_of_a_count_by_hand(report):
    (batch,) = (
        batch
        for batch in report["batches"]
        if batch["regime"].startswith("32 px") and batch["effects"] == "zoom and blur"
    )
    values = 192 * 3 * 32 * 32
    images = values * 1 + values * 4  # augment: bytes to floats
    images += 2 * values * 4  # blur
    images += 3 * values * 4  # mixup: two rows read, one written
    targets = 64 * 8 + 128 * 10 * 4 + 192 * 10 * 4  # labels, logits
    targets += 3 * 192 * 10 * 4  # mixup
    # λ and partners are read by mixup once, sigma by blur; top, left, flip, crop, sigma by augment
    draws = 192 * (44 + 32 + 4 + 12)
    assert batch["moved"] - images - targets - draws in range(200)  # the table of the quantile


def test_the_report_names_every_batch_and_its_launches(report):
    assert "compiled, not run" in report["text"]
    for batch in report["batches"]:
        assert f"{batch['moved']:,}" in report["text"]


def test_the_interpreter_is_refused():
    result = run(TRITON_INTERPRET="1")
    assert result.returncode == 1
    assert "TRITON_INTERPRET must not be 1" in result.stderr
