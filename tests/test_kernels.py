"""Compiled for four architectures, which needs no GPU: registers, widths, instructions, bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import costs, sass, schema
from benchmarks.budgets import BUDGETS, batches_of, budgets, goal_rows, kernels_of
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


def results_of(folder, *arguments):
    result = run(*arguments, "--out", str(folder))
    assert result.returncode == 0, result.stderr
    (file,) = folder.glob("*.json")
    return {**schema.load(file), "text": result.stdout}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """All that is known of the kernels on sm_90."""
    return results_of(tmp_path_factory.mktemp("kernels"), "--arch", "90")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Registers and spills on the other architectures."""
    folder = tmp_path_factory.mktemp("resources")
    return results_of(folder, "--resources", "--arch", "80", "89", "100")


def found(report, name):
    rows = [row for row in kernels_of(report["rows"]) if row["kernel"] == name]
    assert rows
    return rows


def batches(report, effects):
    rows = [row for row in batches_of(report["rows"]) if row["effects"] == effects]
    assert len(rows) == 4
    return rows


def test_every_kernel_is_compiled_for_every_architecture(report, elsewhere):
    compiled = {(row["kernel"], row["arch"]) for row in kernels_of(report["rows"])}
    compiled |= {(row["kernel"], row["arch"]) for row in kernels_of(elsewhere["rows"])}
    names = {
        "draw_kernel",
        "augment_kernel",
        "packed_kernel",
        "weights_kernel",
        "resample_kernel",
        "chain_kernel",
        "event_kernel",
        "guess_labels_kernel",
        "mixup_kernel",
        "mixmatch_loss_kernel",
        "mixmatch_loss_backward_kernel",
    }
    assert compiled == {(name, arch) for name in names for arch in (80, 89, 90, 100)}


def test_no_kernel_spills_or_touches_local_memory(report, elsewhere):
    for row in kernels_of(report["rows"] + elsewhere["rows"]):
        assert (row["stack"], row["local"]) == (0, 0), row
        assert row.get("local_accesses", 0) == 0, row
        assert 0 < row["registers"] <= 255, row


# Budgets


def test_kernels_stay_within_their_budgets_of_instructions(report):
    """What a change costs shows here at once; `python -m benchmarks.kernels --budgets` refills."""
    written = json.loads(BUDGETS.read_text())
    skip_where_counts_differ(report, written)
    counted = {
        (f"{row['regime']}, {row['effects']}", row["contender"]): row["instructions"]
        for row in kernels_of(report["rows"])
    }
    allowed = {
        (case, kernel): most
        for case, kernels in written["most"].items()
        for kernel, most in kernels.items()
    }
    assert counted.keys() == allowed.keys(), "every kernel has a budget, and no other has"
    over = {key: (counted[key], allowed[key]) for key in counted if counted[key] > allowed[key]}
    assert not over, f"more instructions than the budget: {over}"
    wide = {
        key: (counted[key], allowed[key]) for key in counted if allowed[key] > budget(counted[key])
    }
    assert not wide, f"a budget far above what is counted holds nothing: {wide}"


def budget(counted):
    """The most that a budget may be."""
    return 1.15 * counted


def skip_where_counts_differ(report, written):
    versions = [of["triton"].split(".")[:2] for of in (report["versions"], written)]
    if versions[0] != versions[1]:
        pytest.skip(f"budgets are those of Triton {written['triton']}, which compiles otherwise")


def test_budgets_are_refilled_from_what_was_counted(report):
    for case, kernels in budgets(report["rows"]).items():
        for kernel, most in kernels.items():
            (count,) = (
                row["instructions"]
                for row in kernels_of(report["rows"])
                if (f"{row['regime']}, {row['effects']}", row["contender"]) == (case, kernel)
            )
            assert count <= most <= budget(count)


def test_goals_stand_beside_what_was_counted(report):
    goals = goal_rows(report["rows"])
    assert goals == [row for row in report["rows"] if row["case"] == "goals"]
    assert len(goals) >= 10
    for goal in goals:
        assert goal["note"] == ("met" if goal["value"] <= goal["goal"] else "not met")
        assert goal["contender"] in report["text"]


def test_goals_are_met(report):
    skip_where_counts_differ(report, json.loads(BUDGETS.read_text()))
    missed = {
        goal["contender"]: goal["value"]
        for goal in goal_rows(report["rows"])
        if goal["value"] > goal["goal"]
    }
    assert not missed


# The model


def test_counts_are_those_of_a_count_by_hand(report):
    """MixUp of 2048 values by 128 threads, each 16: two loads and a store of 16 bytes per four."""
    row = next(
        row
        for row in found(report, "mixup_kernel")
        if (row["regime"], row["effects"]) == ("224 px float32 contiguous", "zoom")
    )
    values = 3 * 224 * 224
    lanes = -(values // -2048) * 2048 / values  # a row's last program has less to do
    targets = 8 * 128 / values  # those of 1000 classes, in eight turns of a row's first program
    of_draws = 2 * 128 / 2048  # λ and the partner, of every thread
    assert row["loads"] == pytest.approx(lanes * (2 / 4 + of_draws) + 2 * targets, rel=5e-3)
    assert row["stores"] == pytest.approx(lanes / 4 + targets, rel=5e-3)
    assert row["pipes"]["fma"] == pytest.approx(lanes * 2 + 2 * targets, rel=5e-3)


def test_a_prediction_is_the_slowest_resource_and_the_overhead(report):
    for row in kernels_of(report["rows"]):
        largest = max(row["us_of"].values())
        assert row["predicted_us"] == pytest.approx(costs.OVERHEAD_US + largest, rel=1e-3)
        binds = max(row["us_of"], key=row["us_of"].get)
        assert row["bound"] == (binds if largest >= costs.OVERHEAD_US else "overhead")
        assert row["resident"] * row["warps"] <= 64
        assert sum(row["pipes"].values()) == pytest.approx(row["instructions"], rel=1e-2)


def test_a_batch_is_the_sum_of_its_launches(report):
    for batch in batches_of(report["rows"]):
        rows = [
            row
            for row in kernels_of(report["rows"])
            if (row["regime"], row["effects"]) == (batch["regime"], batch["effects"])
        ]
        assert batch["launches"] == [row["kernel"] for row in rows]
        assert batch["predicted_us"] == pytest.approx(
            sum(row["predicted_us"] for row in rows), 1e-3
        )
        assert batch["floor_us"] == pytest.approx(batch["least"] / costs.GPUS[90].dram / 1e3, 1e-3)


# Machine code by hand: what it says of loops, exits and programs

LISTING = """
 Function test_kernel:
  REG:16 STACK:0 SHARED:0 LOCAL:0
        /*0000*/                   S2R R0, SR_CTAID.X ;
        /*0010*/                   ULDC UR4, c[0x0][0x210] ;
        /*0020*/                   HFMA2.MMA R2, -RZ, RZ, 0, 0 ;
        /*0030*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0040*/                   FADD R4, R4, R5 ;
        /*0050*/                   ISETP.GE.AND P0, PT, R2, UR4, PT ;
        /*0060*/              @!P0 BRA 0x30 ;
        /*0070*/                   LOP3.LUT P1, RZ, R0, 0x3, RZ, 0xc0, !PT ;
        /*0080*/               @P1 EXIT ;
        /*0090*/                   LDG.E R6, desc[UR6][R8.64] ;
        /*00a0*/                   {data}
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0xc0;
"""


def routes_of(data="NOP ;", programs=100, trips=5, **assumed):
    machine = sass.parsed(LISTING.replace("{data}", data))
    bank = sass.constants(".visible .entry k(.param .u32 k_0)", [trips], programs, 90)
    return machine, sass.trace(machine, bank, programs, sass.Assumption(**assumed))


def test_loops_run_as_often_as_the_arguments_say_and_programs_part_where_they_differ():
    machine, routes = routes_of()
    by_share = {round(route.share, 2): route for route in routes}
    assert by_share.keys() == {0.25, 0.75}  # every fourth program goes on
    for share, length in ((0.75, 3 + 4 * 5 + 2), (0.25, 3 + 4 * 5 + 2 + 3)):
        assert len(by_share[share].steps) == length
    count = costs.counted(machine, routes)
    assert count.pipes["fma"] == pytest.approx(5 + 1)  # and the constant
    assert count.loads == pytest.approx(0.25)


def test_programs_part_by_what_they_read_where_that_is_known():
    lines = (
        "S2R R0, SR_CTAID.X ;",
        "LDC.64 R2, c[0x0][0x210] ;",
        "LEA R4, P0, R0, R2, 0x2 ;",
        "LEA.HI.X R5, R0, R3, RZ, 0x2, P0 ;",
        "LDG.E R6, desc[UR6][R4.64+0x4] ;",
        "ISETP.NE.AND P1, PT, R6, RZ, PT ;",
        # a predicate that is kept as a bit of a register
        "LOP3.LUT R7, R7, 0xfffffffd, RZ, 0xc0, !PT ;",
        "@P1 LOP3.LUT R7, R7, 0x2, RZ, 0xfc, !PT ;",
        "LOP3.LUT P2, RZ, R7, 0x2, RZ, 0xc0, !PT ;",
        "@!P2 EXIT ;",
        "EXIT ;",
    )
    code = "".join(f"  /*{16 * n:04x}*/ {line}\n" for n, line in enumerate(lines))
    machine = sass.parsed(LISTING.split("  /*")[0].rstrip(" ") + code)
    drawn = np.array([9, 0, 5, 0, 7, 0, 0, 0, 2], np.int32)
    start = 2**33 - 8  # the address of most of it needs a carry
    bank = sass.constants(".visible .entry k(.param .u64 k_0)", [start], 8, 90)
    with pytest.raises(ValueError, match="an exit depends on data"):
        sass.trace(machine, bank, 8)
    routes = sass.trace(machine, bank, 8, memory=[(start, drawn.view(np.uint8))])
    assert {len(route.steps): route.share for route in routes} == {11: 3 / 8, 10: 5 / 8}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("@P2 BRA 0x90 ;", "a loop ends by data"),
        ("@P2 EXIT ;", "an exit depends on data"),
    ],
)
def test_what_data_decides_is_refused_unless_it_is_assumed(data, message):
    with pytest.raises(ValueError, match=message):
        routes_of(data)
    machine, routes = routes_of(data, turns=3.0, goes_on=lambda programs: 1 / programs)
    count = costs.counted(machine, routes)
    assert count.loads == pytest.approx(0.25 * (3 if "BRA" in data else 1))
    exits = sum(
        route.share * times
        for route in routes
        for step, times in zip(route.steps, route.times, strict=True)
        if machine.code[step].address == 0xB0
    )
    assert exits == pytest.approx(0.25 * (0.01 if "EXIT" in data else 1))


def test_what_hides_behind_the_last_exit_is_no_loop_and_not_counted():
    _, routes = routes_of("@P2 BRA 0xc0 ;")
    assert all(0xC0 // 16 not in route.steps for route in routes)


def test_a_loop_that_waits_for_another_unit_counts_once():
    listing = LISTING.replace("LDG.E R6, desc[UR6][R8.64] ;", "NANOSLEEP 0x64 ;")
    machine = sass.parsed(listing.replace("{data}", "@P2 BRA 0x90 ;"))
    bank = sass.constants(".visible .entry k(.param .u32 k_0)", [5], 100, 90)
    routes = sass.trace(machine, bank, 100)
    assert {times for route in routes for times in route.times} == {1.0}


def test_widths_are_bytes_of_a_thread():
    for text, width in (
        ("LDG.E R6, desc[UR6][R8.64] ;", 4),
        ("LDG.E.U8 R6, desc[UR6][R8.64] ;", 1),
        ("STG.E.128 desc[UR6][R8.64], R4 ;", 16),
        ("LDSM.16.M88.4 R4, [R8] ;", 16),
        ("LDSM.16.MT88.2 R4, [R8] ;", 8),
    ):
        assert sass.Instruction(0, text.removesuffix(" ;")).width == width


def test_tensor_instructions_weigh_what_their_shape_says():
    listing = LISTING.replace("{data}", "HMMA.16816.F32 R4, R8, R12, R4 ;")
    machine = sass.parsed(listing)
    steps = [10, 10, 10]
    count = costs.counted(machine, [sass.Route(1.0, steps, [1.0] * 3)])
    assert (count.multiply_adds, count.grouped) == (3 * 16 * 8 * 16, 0)
    machine = sass.parsed(listing.replace("16816.F32", "1688.F32.TF32"))
    count = costs.counted(machine, [sass.Route(1.0, steps, [1.0] * 3)])
    assert count.multiply_adds == 3 * 2 * 16 * 8 * 8  # tf32 at half the rate
    shared = listing.replace("HMMA.16816.F32", "HGMMA.64x32x16.F32")
    count = costs.counted(sass.parsed(shared), [sass.Route(1.0, steps, [1.0] * 3)])
    assert (count.multiply_adds, count.grouped) == (0, 3 * 64 * 32 * 16 / 4)  # by four warps


# Widths and layouts


def test_mixup_reads_and_writes_16_bytes_at_a_time(report):
    for row in found(report, "mixup_kernel"):
        # a tile of 2048 values, 16 per thread, two rows read and one written
        itemsize = 2 if "bfloat16" in row["regime"] else 4
        assert row["load_bits"]["128"] == 2 * itemsize
        assert row["store_bits"]["128"] == itemsize
        assert set(row["store_bits"]) == {"32", "128"}  # 32: targets, whatever their number


@pytest.mark.parametrize("name", ["augment_kernel", "packed_kernel", "resample_kernel"])
def test_views_are_written_16_bytes_at_a_time(report, name):
    for row in found(report, name):
        assert set(row["store_bits"]) == {"128"}, row


def test_resampling_reads_words_of_bytes_and_weights_16_bytes_at_a_time(report):
    for row in found(report, "resample_kernel"):
        # 128: of 32 columns and of 32 lines, as float16, twice for float32; by 64 threads
        sources = 32 if row["regime"].startswith("32 px") else 64
        itemsize = 2 if "bfloat16" in row["regime"] else 4
        assert row["load_bits"]["128"] == 2 * 32 * sources * itemsize / 16 / 64
        # 32: words of three channels, twice for images that begin within one; where sources begin
        assert row["load_bits"]["32"] == 3 * 2 * sources**2 / 4 / 64 + 2
        assert set(row["load_bits"]) == {"32", "128"}


def test_shifted_bytes_are_read_by_neighbouring_threads(report):
    """A row may start at any byte, so that loads are bytes; a warp's bytes lie side by side.

    A thread holds 16 bytes of output, hence 4 or 8 pixels in a row, and the next thread the next
    ones: the byte loads of a warp fall into the same sectors, whichever way the row runs.
    """
    if tuple(map(int, report["versions"]["triton"].split(".")[:2])) < (3, 8):
        pytest.skip("Triton 3.6 puts the threads of a byte load down the lines: right, but slower")
    for row in found(report, "augment_kernel"):
        assert row["load_bits"]["8"] > 0
        assert set(row["load_bits"]) == {"8", "32"}  # 32: the draws of a row
        assert row["byte_loads"], row
        for layout in row["byte_loads"]:
            assert layout["order"] == [1, 0]
            lines, columns = layout["sizePerThread"]
            assert (lines, columns) in ((1, 4), (1, 8))
            # the threads of a warp that are side by side cover at least one sector of 32 bytes
            assert layout["threadsPerWarp"][1] * columns >= 32


def test_large_images_are_shifted_and_zoomed_in_words(report):
    for row in found(report, "packed_kernel"):
        zooms = row["effects"] == "zoom"
        # for every four values two words of each row, or of each of two lines; and a row's draws
        words = (24 if zooms else 48) // 4 * 2 * (2 if row["mixes"] or zooms else 1)
        assert set(row["load_bits"]) <= {"32", "64"}  # 64: which row is the partner
        assert words < row["load_bits"]["32"] <= words + 12, row
        assert zooms or row["shared"] == 0, row  # what a thread reads it writes


# Sizes and bytes


def test_a_batch_of_another_size_or_alignment_is_no_other_kernel(report):
    sizes = [row for row in report["rows"] if "variants" in row]
    assert len(sizes) == 16
    for row in sizes:
        assert set(row["variants"].values()) == {1}, row
    names = {place.split()[1] for row in sizes for place in row["variants"]}
    assert names == {row["kernel"] for row in kernels_of(report["rows"])}


def test_a_batch_without_zoom_and_blur_moves_little_more_than_the_least(report):
    for batch in batches(report, "shift"):
        assert 1 <= batch["ratio"] <= 1.15, batch
        assert len(batch["launches"]) == 4


def test_to_make_views_of_operations_anew_for_mixing_is_predicted_to_be_no_faster(report):
    rows = [row for row in report["rows"] if "anew_us" in row]
    assert len(rows) == 4
    for row in rows:
        assert row["read_back_us"] < 1.03 * row["anew_us"], row
        assert f"{row['anew_us']}" in report["text"]


def test_rows_without_an_event_leave_its_launch_at_once(report):
    """Of the rows 5 in 192 have two: most of the second launch is to read that there is none."""
    rows = found(report, "event_kernel")
    assert len(rows) == 6
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["instructions"] > 3 * second["instructions"]
        assert second["instructions"] < 300


def test_bytes_are_those_of_a_count_by_hand(report):
    (batch,) = (
        row for row in batches(report, "zoom and blur") if row["regime"].startswith("32 px")
    )
    values = 192 * 3 * 32 * 32
    images = values * 1 + values * 4  # bytes to floats
    images += 3 * values * 4  # mixup: two rows read, one written
    # of 32 lines and 32 columns 32 weights in two parts each, and where they begin; written, read
    images += 2 * 192 * 2 * (32 * 32 * 2 * 2 + 4)
    targets = 64 * 8 + 128 * 10 * 4 + 192 * 10 * 4  # labels, logits
    targets += 3 * 192 * 10 * 4  # mixup
    # λ and partners are read by mixup once; top, left, flip, zoom and sigma by the weights
    draws = 192 * (44 + 32 + 12)
    assert batch["moved"] - images - targets - draws in range(200)  # the table of the quantile


def test_the_report_names_every_batch_and_its_launches(report):
    assert "compiled, not run" in report["text"]
    for batch in batches_of(report["rows"]):
        assert f"{batch['moved']:,}" in report["text"]


def test_results_are_shown_beside_earlier_ones(report, tmp_path):
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    content = {key: value for key, value in report.items() if key != "text"}
    schema.dump(content, after)
    slower = [
        row | {"predicted_us": 2 * row["predicted_us"]} if "predicted_us" in row else row
        for row in content["rows"]
    ]
    schema.dump(content | {"rows": slower}, before)
    shown = run("--read", str(after), "--against", str(before))
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("2.00x") == len(batches_of(slower)) + len(kernels_of(slower))


def test_the_interpreter_is_refused():
    result = run(TRITON_INTERPRET="1")
    assert result.returncode == 1
    assert "TRITON_INTERPRET must not be 1" in result.stderr
