"""The benchmarks: what they check before they time, what they write, and what is shown of it."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import (
    augment,
    batch,
    claims,
    common,
    costs,
    drawings,
    facts,
    gpu,
    launches,
    learning,
    loader,
    ops,
    orders,
    peers,
    report,
    scaling,
    schema,
    strong,
    strong_peers,
    tables,
)
from benchmarks.common import Contender, Settings, Skipped
from benchmarks.report import ROOT
from gpu_mixmatch import MixMatch, MixMatchLoss, WeakAugment, _timing
from gpu_mixmatch._machine import machine
from gpu_mixmatch.cli import bench
from gpu_mixmatch.data.datasets import load_dataset
from gpu_mixmatch.recipes import ablate, plots
from gpu_mixmatch.recipes.train import TrainConfig
from gpu_mixmatch.types import AugmentParams, AugmentPolicy
from tests.test_launches import EAGER

CPU = torch.device("cpu")
QUICK = common.quick_settings(CPU)
SUITES = {
    "ops": ops.run,
    "augment": augment.run,
    "strong": strong.run,
    "batch": batch.run,
    "loader": loader.run,
    "scaling": scaling.run,
}
# the compiler's own import warns
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def content_of(suite, rows, settings=QUICK):
    return common.header(suite, settings, rows)


def row_of(contender="ours", case="case", **fields):
    times = {"low_ms": 1.0, "median_ms": 2.0, "high_ms": 3.0, "blocks": 3}
    return {"case": case, "contender": contender, "threads": 1, "note": "", **times, **fields}


def trained_row(errors=(1.0,)):
    row = {"case": "digits", "contender": "MixMatch", "threads": 1, "note": ""}
    return {
        **row,
        "key": "full",
        "errors": list(errors),
        "mean": 1.0,
        "deviation": 0.0,
        "paper": None,
    }


# Results


def test_committed_results_fit_the_schema_and_are_no_quick_ones():
    paths = sorted(common.RESULTS.glob("*.json"))
    suites = {schema.load(path)["suite"] for path in paths}
    assert suites >= {*schema.SUITES, *schema.TRAINED}
    for path in paths:
        content = schema.load(path)
        assert not content["quick"], path.name
        assert path.stem.endswith(f"{content['suite']}--{content['machine']}")
        assert {row["threads"] for row in content["rows"]} <= set(content["threads"])
        assert content["versions"]["gpu_mixmatch"] == path.parent.name


def test_results_come_back_as_they_were_written(tmp_path):
    content = content_of("ops", [row_of(), common.skipped_row("case", "theirs", 1, "not there")])
    schema.dump(content, tmp_path / "folder" / "ops.json")
    assert schema.load(tmp_path / "folder" / "ops.json") == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"suite": "speed"}, "suite must be one of"),
        ({"cores": "two"}, "cores must be int, got 'two'"),
        ({"gpu": 3}, "gpu must be str or null"),
        ({"versions": {}}, "versions.gpu_mixmatch must be"),
        ({"cpu": "unknown"}, "cpu must be known where something is timed"),
        ({"date": "yesterday"}, "date must be YYYY-MM-DD, got 'yesterday'"),
        ({"suite": "demo"}, "config must be dict, got None"),
        ({"suite": "demo", "config": {}, "seeds": []}, r"seeds must be list, got \[\]"),
        (
            {"suite": "demo", "config": {}, "seeds": [0]},
            r"rows\[0\] must have \['dev",
        ),
        (
            {"suite": "demo", "config": {}, "seeds": [0, 1], "rows": [trained_row()]},
            "errors must have one error per seed",
        ),
        ({"rows": []}, "at least one row"),
        ({"rows": [row_of(), row_of()]}, r"rows\[1\] must be the only one"),
        ({"rows": [row_of(low_ms=2.5)]}, "low_ms <= median_ms <= high_ms"),
        ({"rows": [row_of(low_ms=0.0)]}, "0 < low_ms"),
        ({"rows": [row_of(rate=float("nan"))]}, "must be finite, got nan"),
        ({"rows": [row_of(blocks=0)]}, "blocks must be at least 1"),
        ({"rows": [row_of(skipped="why")]}, "timed or skipped, got both"),
        ({"rows": [common.skipped_row("case", "a", 1, "")]}, "skipped must be a reason"),
        ({"rows": [{"case": "a", "contender": "b", "threads": 1, "note": ""}]}, "another number"),
        ({"rows": [row_of(contender=None)]}, "contender must be str"),
    ],
)
def test_the_schema_says_what_is_wrong(change, message):
    content = content_of("ops", [row_of()])
    schema.check(content)
    with pytest.raises(ValueError, match=message):
        schema.check(content | change)


def test_errors_are_percentages():
    content = content_of("demo", [trained_row(errors=[120.0])]) | {"config": {}, "seeds": [0]}
    with pytest.raises(ValueError, match=r"errors must be percentages, got \[120.0\]"):
        schema.check(content)


def test_early_demos_may_lack_what_was_not_recorded():
    content = content_of("demo", [trained_row()]) | {"config": {}, "seeds": [0]}
    unknown = dict.fromkeys(schema.VERSIONS, "unknown")
    schema.check(content | {"cpu": "unknown", "commit": "unknown", "versions": unknown})


@pytest.mark.parametrize("suite", schema.TRAINED)
def test_what_the_package_saves_fits_the_schema(suite, tmp_path):
    results = [
        ablate.Result(ablate.FULL, [1.0, 2.0]),
        ablate.Result(ablate.SUPERVISED, [8.0, 9.0]),
    ]
    config = TrainConfig(labels=40)
    path = ablate.save_results(results, config, [0, 1], "gpu-mixmatch", tmp_path / f"{suite}.json")
    content = schema.load(path)
    assert content["suite"] == suite
    assert content["threads"] == [torch.get_num_threads()]
    assert [row["contender"] for row in content["rows"]] == ["MixMatch", "supervised only"]
    assert [row["errors"] for row in content["rows"]] == [[1.0, 2.0], [8.0, 9.0]]
    assert content["rows"][0]["case"] == "digits, 40 labels"
    assert content["rows"][0]["paper"] == [11.8, 6.0]


@pytest.mark.parametrize("name", ["commit", "date", "cpu", "machine", "threads", "quick"])
def test_the_schema_wants_every_field(name):
    content = content_of("ops", [row_of()])
    del content[name]
    with pytest.raises(ValueError, match=f"{name} must be"):
        schema.check(content)


def test_a_file_with_nan_is_refused(tmp_path):
    text = json.dumps(content_of("ops", [row_of(rate=1.5)])).replace("1.5", "NaN")
    (tmp_path / "ops.json").write_text(text)
    with pytest.raises(ValueError, match=r"ops\.json: numbers must be finite, got NaN"):
        schema.load(tmp_path / "ops.json")


# Timing


def test_calls_take_turns_there_and_back():
    order = []
    calls = {name: lambda name=name: (order.append(name), time.sleep(0.002)) for name in ("a", "b")}
    timings = _timing.in_turns(calls, rounds=3, block_seconds=0.0)
    warm_up = ["a"] * 4 + ["b"] * 4
    assert order == [*warm_up, "a", "b", "b", "a", "a", "b"]
    for timing in timings.values():
        assert timing.blocks == 3
        assert 2 <= timing.low_ms <= timing.median_ms <= timing.high_ms


def test_a_block_is_as_long_as_it_is_asked_to_be():
    counts = []
    calls = {"a": lambda: time.sleep(0.001)}
    before = {"a": lambda: counts.append(0)}
    timing = _timing.in_turns(calls, rounds=2, calls_per_block=5, before_block=before)["a"]
    assert timing.blocks == 2
    assert len(counts) == 3  # the warm-up is one block, too
    assert 1 <= timing.median_ms < 5  # per call


def test_no_round_begins_when_time_is_up():
    calls = {"a": lambda: time.sleep(0.02)}
    timing = _timing.in_turns(calls, rounds=100, calls_per_block=1, most_seconds=0.1)["a"]
    assert 1 <= timing.blocks <= 6
    assert _timing.in_turns(calls, calls_per_block=1, most_seconds=0.0)["a"].blocks == 1


def test_what_comes_before_a_block_is_not_timed():
    slow = Contender("slow", lambda: None, before_block=lambda: time.sleep(0.05))
    settings = Settings(CPU, rounds=2, block_seconds=0.0)
    timing = common.time_contenders([slow], settings)["slow"]
    assert timing.high_ms < 25


def test_quartiles_of_one_time_are_that_time():
    assert _timing.quartiles([2.0]) == (2.0, 2.0, 2.0, 1)
    assert _timing.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0, 5)


def test_times_are_per_call_and_rates_per_second():
    contender = Contender("a", lambda: time.sleep(0.004), "a note", {"extra": 1})
    settings = Settings(CPU, rounds=2, block_seconds=0.02)
    (row,) = common.timed_rows("case", [contender], settings, 1, num_rows=12)
    assert 4 <= row["median_ms"] < 15
    assert row["views_per_s"] == pytest.approx(12e3 / row["median_ms"], rel=1e-3)
    assert (row["note"], row["extra"], row["case"]) == ("a note", 1, "case")


def test_threads_are_set_and_put_back():
    before = torch.get_num_threads()
    with common.cpu_threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == before


def test_what_is_missing_is_skipped_with_a_reason():
    with pytest.raises(Skipped, match=r"no_such_peer is not installed \(see benchmarks/req"):
        common.need("no_such_peer")
    common.need("torch")


def test_the_interpreter_is_no_contender():
    assert common.implementations(CPU)[0] == "eager"
    assert "triton" not in common.implementations(CPU)


# Peers


@pytest.mark.parametrize("name", ["shift, flip", "shift, flip, blur"])
@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_peers_draw_the_views_of_the_policy(peer, name):
    policy = augment.policy_for(name, augment.CHECKED_AT)
    if policy.blur_sigma and not peer.blurs:
        pytest.skip("it has no blur")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            augment.check_peer(peer, CPU, policy)
        except Skipped as reason:
            pytest.skip(str(reason))


def kornia_params(recorded):
    """Kornia's draws as ours: the corner of the crop in the padded image, and the flip."""
    crop, flip, _ = (item.data for item in recorded)
    rows = len(crop["src"])
    return AugmentParams(
        top=crop["src"][:, 0, 1].int(),
        left=crop["src"][:, 0, 0].int(),
        flip=flip["batch_prob"].int(),
        zoom=torch.zeros(rows, 4, dtype=torch.int32),
        sigma=torch.zeros(rows),
    )


def test_kornia_builds_our_views_of_its_own_draws():
    x, u = augment.make_images(32, 64, CPU)
    module = peers.kornia_module(32, augment.policy_for("shift, flip", 32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        views = module(torch.cat([x, *[u] * peers.NUM_VIEWS]).float() / 255)
    params = kornia_params(module._params)
    assert 0 < int(params.flip.sum()) < len(views)
    assert len(params.top.unique()) == 9
    same = WeakAugment.cifar10().apply((x, u), params)
    torch.testing.assert_close(views, same, atol=1e-5, rtol=0)


def changed(peer, change):
    """A peer whose views are changed."""

    def make(images, policy, threads):
        build = peer.make(images, policy, threads)
        return lambda: change(build())

    return peer._replace(make=make)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda views: views * 2, "is no view of its image"),
        (lambda views: views.roll(1, dims=0), "is no view of its image"),
        (lambda views: views.flip(2), "is no view of its image"),
        (lambda views: views[:100], "must be float32 rows"),
        (lambda views: views.half(), "must be float32 rows"),
    ],
)
def test_wrong_views_of_a_peer_are_found(change, message):
    policy = augment.policy_for("shift, flip", 32)
    peer = next(peer for peer in peers.PEERS if peer.name.startswith("USB"))
    with pytest.raises(ValueError, match=message):
        augment.check_peer(changed(peer, change), CPU, policy)


def test_uneven_draws_of_a_peer_are_found():
    policy = augment.policy_for("shift, flip", 32)
    yu1ut = next(peer for peer in peers.PEERS if not peer.last_offset)
    with pytest.raises(ValueError, match="evenly from 9 values"):  # it never draws the last one
        augment.check_peer(yu1ut._replace(last_offset=True), CPU, policy)
    with pytest.raises(ValueError, match="must share their draw"):
        augment.check_peer(yu1ut._replace(draws="batch"), CPU, policy)
    still = policy._replace(flip=0.0)
    kornia = peers.PEERS[0]._replace(make=lambda i, p, t: peers.kornia_one_call(i, still, t))
    with torch.random.fork_rng(), pytest.raises(ValueError, match="flip must be drawn evenly"):
        augment.check_peer(kornia, CPU, policy)


def test_the_numpy_sketch_does_what_our_zoom_flip_and_blur_do():
    generator = np.random.default_rng(0)
    array = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    crops = np.array([[0, 0, 0, 0], [3, 7, 16, 2], [16, 16, 16, 16], [0, 5, 1, 0]])
    flips, sigmas = [0, 1, 0, 1], [0.0, 0.8, 2.0, 1.5]
    still = torch.zeros(4, dtype=torch.int32)
    crop, flip = (torch.tensor(v, dtype=torch.int32) for v in (crops, flips))
    params = AugmentParams(still, still, flip, crop, torch.tensor(sigmas))
    weak = augment.weak(AugmentPolicy(0, (0, 16), 0.5, (0.0, 3.0)), "eager")
    source = torch.from_numpy(array).permute(2, 0, 1)[None]
    for row, expected in enumerate(weak.apply(source, params)):
        came = peers.sketch_view(array, crops[row], bool(flips[row]), sigmas[row])
        # it cuts the Gaussian at 3 sigma, and rounds to bytes
        torch.testing.assert_close(came, expected, atol=0.025, rtol=0)


def test_usb_views_are_windows_of_the_padded_image():
    picture = Image.fromarray(np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3))
    generator = np.random.default_rng(0)
    view = peers.usb_view(picture, generator=generator, padding=0)
    values = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    unflipped = (values / 255 - 0.5) / 0.5
    assert any(torch.allclose(view, each) for each in (unflipped, unflipped.flip(2)))


@pytest.mark.parametrize("step", [peers.yu1ut_step, peers.usb_step])
def test_peers_guess_and_mix_as_our_operations_do_with_one_lambda(step):
    batch.check_step(step)


def test_wrong_mixing_of_a_peer_is_found():
    def unfolded(*arguments):
        mixed = peers.usb_step(*arguments)
        return mixed._replace(lam=1 - mixed.lam)

    def unsharpened(*arguments):
        return peers.usb_step(*arguments, temperature=1.0)

    for step in (unfolded, unsharpened):
        with pytest.raises(AssertionError):
            batch.check_step(step)


# Suites


@pytest.fixture(scope="module")
def ran():
    """Results of every suite in its quick form, as they are asked for."""
    contents = {}

    def run(suite):
        if suite not in contents:
            contents[suite] = content_of(suite, SUITES[suite](QUICK, lambda _: None))
        return contents[suite]

    return run


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_writes_rows_that_fit_and_tables_that_show_them(suite, ran):
    content = ran(suite)
    schema.check(content)
    shown = "".join(text for _, text in tables.TABLES[suite](content))
    wanted = "case" if suite == "ops" else "contender"
    for row in content["rows"]:
        if suite != "ops" or "copy_percent" in row:
            assert row[wanted] in shown, row


def test_the_augment_suite_has_all_contenders(ran):
    rows = ran("augment")["rows"]
    names = {row["contender"] for row in rows}
    assert names >= {peer.name for peer in (*peers.PEERS, *peers.SKETCH_PEERS)}
    assert {"ours, eager", "ours, eager, reused buffers"} <= names
    kornia = [row for row in rows if row["contender"] == "Kornia, one call"]
    assert kornia
    assert all("median_ms" in row and row["note"] for row in kornia)


def test_the_strong_suite_has_all_contenders_and_its_goals(ran):
    rows = ran("strong")["rows"]
    assert {row["contender"] for row in rows} >= {peer.name for peer in strong.STRONG_PEERS}
    for effects in strong_peers.ALL:
        timed = {r["contender"] for r in rows if r.get("effects") == effects and "median_ms" in r}
        assert timed >= {"ours, eager, reused buffers", "Kornia, one call"}
    goals = {row["contender"]: row["goal"] for row in rows if "goal" in row}
    assert goals.pop("RandAugment, 32 px: times as fast as Kornia, one call") == 15
    assert any("channels_last" in name for name in goals)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda views: views + 1e-3, "not close"),
        (lambda views: views.flip(3), "not close"),
        (lambda views: views[:9], "must be float32"),
    ],
)
def test_wrong_strong_views_are_found(change, message):
    (pillow, *_) = strong.STRONG_PEERS
    images = augment.make_images(strong.CHECKED_AT, 4, CPU)
    strong.check_strong_peer(pillow, images, strong.RAND_AUGMENT)
    wrong = pillow._replace(make=lambda *args: lambda: change(pillow.make(*args)()))
    with pytest.raises((AssertionError, ValueError), match=message):
        strong.check_strong_peer(wrong, images, strong.RAND_AUGMENT)


def test_others_that_do_not_augment_are_found():
    peer = strong.STRONG_PEERS[3]._replace(
        make=lambda images, *_: lambda: torch.cat([images.x, images.u, images.u]) / 127.5 - 1
    )
    images = augment.make_images(strong.CHECKED_AT, 4, CPU)
    with pytest.raises(ValueError, match="two views of an image must differ"):
        strong.check_strong_peer(peer, images, strong.RAND_AUGMENT)


def test_counted_launches_are_those_of_the_tests(ran):
    counted = [row for row in ran("batch")["rows"] if row["case"].startswith("launches")]
    ours = [row for row in counted if row["contender"] == "ours, eager, DataLoader"]
    assert [row["launches"] for row in ours] == [EAGER["plain"][1], EAGER["blur"][1]]
    assert [row["copies_to_device"] for row in ours] == [4, 4]  # x, y, u and the draws
    theirs = {row["contender"]: row for row in counted if "blur" not in row["case"]}
    assert theirs["Kornia loop"]["launches"] > 50
    uint8, float32 = (theirs[name]["bytes_to_device"] for name in ("Kornia loop", "YU1ut's loop"))
    assert float32 > 5 * uint8  # K views as floats


def test_a_loop_that_reads_the_device_is_not_counted():
    scalar = torch.zeros((), device="meta")
    with pytest.raises(Skipped, match="it reads the device"):
        batch.device_work(lambda: scalar.item(), torch.device("meta"))


def test_the_builders_share_is_of_the_whole_step(ran):
    rows = [row for row in ran("batch")["rows"] if row["case"].startswith("training step")]
    (whole,) = (row for row in rows if row["contender"] == "whole step")
    assert whole["share_percent"] == 100
    for row in rows:
        expected = 100 * row["median_ms"] / whole["median_ms"]
        assert row["share_percent"] == pytest.approx(expected, abs=1e-3)


def test_arguments_of_kernels_are_read_by_name_however_deep_they_lie():
    class Rows(NamedTuple):
        x_ptr: int
        count: int

    class Source(NamedTuple):
        rows: Rows
        size: int

    named = launches.named_arguments(["seed", "source", "out_ptr"], [7, Source(Rows(1, 2), 3), 4])
    assert named == {"seed": 7, "x_ptr": 1, "count": 2, "size": 3, "out_ptr": 4}


def test_claims_are_reported_as_met_or_not():
    rows = claims.run(QUICK, lambda _: None)
    schema.check(content_of("claims", rows))
    assert [row["contender"] for row in rows] == list(claims.GOALS)
    for row in rows:
        if "skipped" in row:
            continue
        less = row["contender"].endswith(" s")
        met = row["value"] <= row["goal"] if less else row["value"] >= row["goal"]
        assert row["note"] == ("met" if met else "not met")
        assert row["value"] > 0
    assert tables.goals_table([rows[-1]]).count("met") == 1


def test_operations_that_differ_are_not_timed():
    operation = ops.class_operations(4, 10, CPU)[1]
    ops.check_equal(operation, lambda: operation.call("eager"))
    with pytest.raises(AssertionError):
        ops.check_equal(operation, lambda: operation.call("eager") + 0.01)


def test_least_bytes_count_each_value_once():
    images = augment.make_images(8, 2, CPU)
    operations = {op.name: op for op in ops.image_operations(images, "shift, flip", torch.float32)}
    values = 6 * 3 * 8 * 8  # N = 2 + 2 · 2
    assert operations["augment"].least_bytes == values * (1 + 4)
    assert operations["augment, mixed"].least_bytes == values * (2 + 4)
    assert operations["mixup"].least_bytes == 3 * 4 * (values + 6 * 10)


def test_peak_memory_is_what_is_held_at_once():
    def call():
        first = torch.empty(2**20, dtype=torch.uint8)
        del first
        return torch.empty(2**20, dtype=torch.uint8), torch.empty(2**19, dtype=torch.uint8)

    assert scaling.peak_bytes(call, CPU) == 2**20 + 2**19


def test_a_suite_is_a_command_that_writes_its_results(tmp_path):
    command = [sys.executable, "-m", "benchmarks.scaling", "--quick", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.glob("scaling--cpu-*c.json")
    content = schema.load(path)
    assert content["quick"]
    assert content["gpu"] is None
    assert content["command"] == "python -m benchmarks.scaling --quick"  # no path of a machine
    assert "ours, eager" in result.stdout


def test_a_device_that_is_not_there_is_said_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["ops", "--device", "cuda"])
    with pytest.raises(SystemExit, match="needs a CUDA device, and there is none"):
        common.main("ops", ops.run, None)


# The report


def test_the_fastest_is_bold_whoever_it_is_and_skips_have_their_reason():
    rows = [
        row_of("ours", median_ms=2.0),
        row_of("theirs", median_ms=1.5),
        common.skipped_row("case", "absent", 1, "not installed"),
    ]
    text = tables.pivot(
        rows,
        lambda row: row["case"],
        lambda row: f"{row['median_ms']}",
        "who",
        lambda row: row["median_ms"],
    )
    assert text.splitlines() == [
        "| who | case |",
        "|---|---|",
        "| ours | 2.0 |",
        "| theirs | **1.5** |",
        "| absent (not installed) | skipped |",
    ]


def test_quick_results_are_not_published(ran):
    with pytest.raises(ValueError, match="must not be of --quick"):
        report.part(ran("scaling"), common.RESULTS / "scaling--here.json")


def test_a_suites_part_names_machine_versions_notes_and_plot(ran):
    content = ran("augment") | {"quick": False}
    file = common.RESULTS / "augment--here.json"
    text = report.part(content, file, ROOT / "docs")
    path = f"../benchmarks/results/{common.RESULTS.name}/augment--here.png"
    assert f"]({path})" in text
    assert f"torch {torch.__version__}" in text
    assert content["cpu"] in text
    assert "last offset never drawn" in text


def test_who_could_not_run_is_named_once_and_has_no_line():
    fields = {"effects": "shift, flip", "size": 32, "batch": 64, "num_rows": 192}
    rows = [row_of("ours", **fields), row_of("theirs", **fields)]
    rows.append(common.skipped_row("case", "absent", 1, "not installed") | fields)
    content = content_of("augment", rows) | {"quick": False}
    text = report.part(content, common.RESULTS / "augment--here.json")
    assert "| absent" not in text
    assert text.count("- absent: not installed\n") == 1


def speed_results(folder, **changes):
    rows = []
    for threads in (1, 2):
        for size in (32, 96):
            for number, name in enumerate(
                ("ours, numba, reused buffers", "ours, eager", "Kornia, one call", "imgaug"), 1
            ):
                row = row_of(name, f"{size} px", effects="shift, flip", size=size, batch=64)
                row |= {"threads": threads, "num_rows": 192}
                times = dict.fromkeys(("low_ms", "median_ms", "high_ms"), number / threads)
                rows.append(row | times)
    content = content_of("augment", rows) | {"threads": [1, 2], "quick": False} | changes
    schema.dump(content, folder / f"augment--{content['machine']}.json")
    return content


def test_readmes_table_has_the_medians_of_the_most_threads(tmp_path):
    content = speed_results(tmp_path)
    lines = report.speed(tmp_path).splitlines()
    assert lines[:5] == [
        "| thousand views/s: shift, flip, normalise | 32 px | 96 px |",
        "|---|---|---|",
        "| `WeakAugment`, Numba, reused buffers | 384 | 384 |",
        "| `WeakAugment`, plain torch | 192 | 192 |",
        "| Kornia itself, in one call | 128 | 128 |",
    ]
    assert len(lines) == 7
    assert ", 2 threads, " in lines[6]
    assert content["date"] in lines[6]


def test_readmes_row_of_strong_views_has_the_largest_images_and_the_most_threads():
    names = ("ours, numba, reused buffers", "Kornia, one call", "DALI, pipeline")
    rows = [
        row_of(name, f"{size} px", effects="RandAugment", size=size, num_rows=48)
        | {"threads": threads}
        | dict.fromkeys(("low_ms", "median_ms", "high_ms"), number * size / threads)
        for threads in (1, 2)
        for size in (32, 224)
        for number, name in enumerate(names, 1)
    ]
    skipped = common.skipped_row("224 px", "Pillow, image by image", 2, "not installed")
    rows.append(skipped | {"effects": "RandAugment", "size": 224, "num_rows": 48})
    rows.append(common.goal_row("goals", "times as fast", (1.0, 2.0, 3.0), 1, 1.5))
    content = content_of("strong", rows) | {"command": "python -m benchmarks.strong"}
    ((_, table),) = tables.strong_speed(content)
    assert table.splitlines() == [
        "| thousand views/s: RandAugment, 224 px | Numba, reused buffers | Kornia, one call |",
        "|---|---|---|",
        "| `python -m benchmarks.strong` | 0.429 | 0.214 |",
    ]


def test_no_variant_of_ours_is_bold_where_nobody_else_is_beside_it():
    fields = {"effects": "variants", "size": 32, "batch": 64, "num_rows": 192}
    alone = tables.augment_tables(content_of("strong", [row_of("WeakAugment", **fields)]))
    assert "**" not in alone[0][1]
    compared = tables.augment_tables(content_of("strong", [row_of("ours, numba", **fields)]))
    assert "**96 (64 to 192)**" in compared[0][1]


def test_a_gpu_is_missing_until_a_file_of_one_is_there(tmp_path):
    content = speed_results(tmp_path)
    place = f"{content['cpu']}, {content['cores']} cores"
    assert report.machines(tmp_path) == f"Measured on: {place}. {report.NO_GPU}\n"
    speed_results(tmp_path, machine="a-gpu", gpu="A GPU")
    text = report.machines(tmp_path)
    assert report.NO_GPU not in text
    assert "A GPU" in text


def test_every_marked_part_is_written_anew(tmp_path):
    speed_results(tmp_path)
    document = "before\n<!-- results: {} -->\nstale\n<!-- /results -->\nafter\n"
    for name in ("speed", "machines", "augment"):
        text = report.rendered(document.format(name), tmp_path, tmp_path)
        assert text.startswith(f"before\n<!-- results: {name} -->\n")
        assert text.endswith("<!-- /results -->\nafter\n")
        assert "stale" not in text
    with pytest.raises(FileNotFoundError, match=r"no results loader--\*\.json in"):
        report.rendered(document.format("loader"), tmp_path, tmp_path)


def test_what_the_host_takes_stands_beside_what_another_checkout_took():
    times = {"low_ms": 0.1, "median_ms": 0.12, "high_ms": 0.2}
    rows = [
        row_of("now", "batch", **times, note="commit a") | {"share_percent": 60.0},
        row_of("before", "batch", **times | {"median_ms": 0.2}, note="commit b"),
    ]
    content = content_of("host", rows) | {"quick": False}
    schema.check(content)
    text = report.part(content, Path("host--cpu.json"))
    assert "| us on the host | now | before | share |" in text
    assert "| batch | 120 | 200 | 60 % |" in text
    assert "Now: commit a; before: commit b." in text
    alone = report.part(content | {"rows": [row_of("now", "batch", **times)]}, Path("host.json"))
    assert "| us on the host | now |\n" in alone


def test_results_of_the_packages_own_commands_are_collected_by_folder_and_machine(tmp_path):
    content = content_of("demo", [trained_row()]) | {"config": {}, "seeds": [0]}
    schema.dump(content, tmp_path / "digits-demo" / "demo.json")
    (tmp_path / "digits-preview").mkdir()
    (tmp_path / "digits-preview" / "preview.png").write_bytes(b"a picture")
    taken = report.collect(tmp_path, tmp_path / "out")
    names = [f"digits-demo--{content['machine']}.json", f"digits-preview--{machine(CPU)}.png"]
    assert [path.name for path in taken] == names
    assert schema.load(taken[0]) == content
    assert taken[1].read_bytes() == b"a picture"


# Plots


@pytest.mark.parametrize(
    ("contender", "ours"),
    [
        ("ours, numba", True),
        ("DALI, dynamic mode (DaliAugment)", True),
        ("ResidentLoader", True),
        ("DaliLoader, WebDataset", True),
        ("DALI, pipeline", False),
        ("Kornia, one call", False),
        ("DataLoader, per sample, 2 workers", False),
    ],
)
def test_all_that_the_package_offers_has_one_colour(contender, ours):
    assert drawings.is_ours(contender) == ours
    assert drawings.colour(contender) == (plots.OURS if ours else plots.THEIRS)
    assert drawings.colour("ideal loader") == plots.BOUND


def test_headlines_are_computed(tmp_path):
    content = speed_results(tmp_path)
    rows = [row for row in content["rows"] if row["contender"] != "imgaug"]
    headline = drawings.augment_headline(content | {"rows": rows})
    expected = "Views, shift + flip: 3.0× as fast as the best other at 32 px, 3.0× at 96 px"
    assert headline == expected
    results = [ablate.Result(ablate.FULL, [1.0, 2.0]), ablate.Result(ablate.SUPERVISED, [8.0])]
    assert ablate.headline(results) == "Test error: MixMatch 1.50 %, supervised only 8.00 %"
    results.append(ablate.Result(ablate.ABLATION[1], [9.0]))
    assert ablate.headline(results).endswith("the worst row 9.00 %: no averaging (K = 1)")
    assert ablate.headline(results[1:2]) == "supervised only: 8.00 %"


def luminance(colour):
    channels = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("ground", ["#ffffff", "#0d1117"])  # a light page, and a dark one
def test_text_of_plots_reads_on_light_and_dark_pages(ground):
    lighter, darker = sorted((luminance(plots.INK), luminance(ground)), reverse=True)
    assert (lighter + 0.05) / (darker + 0.05) >= 4


def test_plots_have_no_ground_and_something_on_it(ran, tmp_path):
    for suite in SUITES:
        schema.dump(ran(suite), tmp_path / f"{suite}--here.json")
    content = content_of("demo", [trained_row()]) | {"config": {"model": "cnn"}, "seeds": [0]}
    schema.dump(content, tmp_path / "digits-demo--here.json")
    drawn = drawings.draw_all(tmp_path)
    expected = ["augment", "batch", "digits-demo", "loader", "scaling", "strong"]
    assert [path.name for path in drawn] == [f"{name}--here.png" for name in expected]
    for path in drawn:
        pixels = np.array(Image.open(path).convert("RGBA")).reshape(-1, 4)
        assert (pixels[0] == [255, 255, 255, 0]).all()
        solid = {tuple(pixel) for pixel in pixels[pixels[:, 3] == 255][:, :3]}
        ours = tuple(int(plots.OURS[place : place + 2], 16) for place in (1, 3, 5))
        assert ours in solid


# One command for a CUDA machine


def python(code):
    return [sys.executable, "-c", code]


def test_parts_run_on_past_failures_and_the_summary_tells(tmp_path, capsys):
    seen = []
    outcomes = gpu.run_all(
        [
            gpu.Part("good", python("import os; print(os.environ['WORD'])"), 20, {"WORD": "well"}),
            gpu.Part("bad", python("print('oh'); raise SystemExit(3)"), 20),
            gpu.Part("absent", ["no-such-tool"], 20),
            gpu.Part("last", python("print('done')"), 20),
        ],
        60,
        seen.append,
    )
    assert seen == outcomes
    assert [outcome.state for outcome in outcomes] == ["passed", "failed", "skipped", "passed"]
    assert [outcome.output.strip() for outcome in outcomes] == ["well", "oh", "", "done"]
    assert outcomes[1].detail == "exit code 3"
    assert outcomes[2].detail == "no-such-tool is not installed"

    path = tmp_path / "out" / "gpu--test.json"
    assert gpu.summarise(outcomes, path, CPU) == 1
    rows = schema.load(path)["rows"]
    assert [row["contender"] for row in rows] == ["good", "bad", "absent", "last"]
    assert [row["state"] for row in rows] == ["passed", "failed", "skipped", "passed"]
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("good", "failed", "exit code 3", "is not installed"))
    assert gpu.summarise([outcomes[0], outcomes[2]], path, CPU) == 0


def test_a_part_that_takes_too_long_is_ended_with_what_it_started(tmp_path):
    marker = tmp_path / "survived"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(marker)!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    slow, late = gpu.Part("slow", python(code), 1.5), gpu.Part("late", python("1"), 20)
    first, second = gpu.run_all([slow, late], 2.0, lambda _: None)
    assert (first.state, first.detail) == ("out of time", "ended after 2 s")
    assert (second.state, second.detail) == ("skipped", "no time was left")
    time.sleep(2.5)
    assert not marker.exists()


def test_all_parts_fit_in_nine_minutes(tmp_path):
    chosen = gpu.parts(tmp_path)
    assert sum(part.seconds for part in chosen) <= 9 * 60
    assert gpu.SECONDS <= 9 * 60
    names = [part.name for part in chosen]
    assert names[:2] == ["facts", "hazards"]
    assert chosen[0].seconds > facts.SECONDS
    assert any(argument.endswith("test_buffers.py") for argument in chosen[1].command)
    assert [f"suite {suite}" in names for suite in schema.SUITES] == [True] * len(schema.SUITES)
    for part in chosen:
        if part.name.startswith("suite"):
            assert [*part.command[-4:]] == ["--device", "cuda", "--out", str(tmp_path)]


def fake_facts(factor=1.0, **changes):
    """A GPU whose copies are as assumed and whose kernels take ``factor`` times the predictions."""

    def predict(launch, gpu, overhead_us):
        of = {"DRAM": 100 / gpu.dram, "issue": 0.5}
        return costs.Prediction(overhead_us + 1, "issue", of, 4, 100.0)

    def timer(call, repeats):
        if repeats == facts.IN_GRAPH:
            us = costs.OVERHEAD_US
        elif repeats == facts.REPEATS:
            us = factor * (costs.OVERHEAD_US + 1)
        else:  # a copy
            num_bytes = 2 * call.args[0].numel()
            rate = costs.GPUS[90].dram if num_bytes == 2**21 else costs.GPUS[90].l2
            us = num_bytes / rate / 1e3 + (num_bytes != 2**21) * costs.OVERHEAD_US
        return _timing.Timing(us / 1e3, us / 1e3, us / 1e3, 5)

    return facts.Facts(CPU, costs.GPUS[90], timer, predict)._replace(**changes)


@pytest.fixture
def few_facts(monkeypatch):
    """One regime, two policies, small images."""
    pytest.importorskip("triton")
    regime = launches.Regime(16, torch.float32, False, 10)
    monkeypatch.setattr(facts, "REGIMES", (regime, regime._replace(size=20)))
    policies = {name: launches.EFFECTS[name] for name in ("shift", "zoom and blur")}
    small = {"padding": 4, "zoom_px": (0, 8), "blur_sigma": (0.0, 1.0)}
    monkeypatch.setattr(facts, "EFFECTS", policies | {"zoom": small, "zoom and blur": small})
    monkeypatch.setattr(facts, "ERROR_SIZE", 16)
    monkeypatch.setattr(launches, "BATCH_SIZE", 2)


def test_facts_are_rows_beside_their_predictions_and_one_page(few_facts, tmp_path):
    rows = facts.measured(fake_facts(factor=2.0))
    content = content_of("facts", rows) | {"gpu": "NVIDIA H100"}
    json_file, page_file = facts.write(content, tmp_path)
    assert schema.load(json_file)["rows"] == rows
    timed = [row for row in rows if "ratio" in row]
    assert {row["contender"] for row in timed} >= {"draw_kernel", "mixmatch_loss_kernel"}
    assert all(row["ratio"] == row["again_ratio"] == 2.0 for row in timed)
    assert not [row for row in rows if "skipped" in row]
    errors = [row for row in rows if row["case"] == "errors"]
    assert len(errors) == 6
    assert all(
        row["of_range"] < (1e-4 if "float32" in row["contender"] else 1e-2) for row in errors
    )

    text = page_file.read_text()
    assert text.startswith("# NVIDIA H100 beside its predictions")
    assert "| empty kernel | 2.00 µs | 2.00 µs |" in text
    assert "| copy, DRAM | 3,000 GB/s | 3,000 GB/s |" in text
    assert f"Of {len(timed)} kernels {len(timed)} are missed" in text
    assert "- issue was to bind them. It tests that schedulers issue" in text
    assert text.count("2.00 times as long as predicted") == len(timed)
    assert "views, one byte off" in text
    assert "guess_labels_kernel, 4 rows" in text


def test_constants_that_differ_are_said_and_predicted_with_again(few_facts):
    """An empty kernel of 5 us makes all of 6 us what it should be."""

    def timer(call, repeats):
        timing = fake_facts(factor=2.0).timer(call, repeats)
        return timing if repeats != facts.IN_GRAPH else _timing.Timing(5e-3, 5e-3, 5e-3, 5)

    rows = facts.measured(fake_facts(timer=timer))
    timed = [row for row in rows if "ratio" in row]
    assert all((row["ratio"], row["again_ratio"]) == (2.0, 1.0) for row in timed)
    text = facts.page(content_of("facts", rows))
    assert "An empty kernel takes 2.50 times what is assumed." in text
    assert f"Of {len(timed)} kernels {len(timed)} are missed by more than 1.5 times, and 0" in text
    assert text.count("measured constants explain it") == len(timed)


def test_a_page_of_predictions_that_hold_names_no_miss(few_facts):
    text = facts.page(content_of("facts", facts.measured(fake_facts())))
    assert "## Missed by more than 1.5 times\n\nNone." in text
    assert "times what is assumed" not in text


def test_facts_that_fail_or_come_too_late_do_not_stop_the_page(few_facts):
    def predict(launch, gpu, overhead_us):
        raise RuntimeError("no such instruction")

    rows = facts.measured(fake_facts(predict=predict))
    reasons = {row["skipped"] for row in rows if "skipped" in row}
    assert reasons == {"RuntimeError: no such instruction"}
    text = facts.page(content_of("facts", rows))
    assert "- 16 px float32 contiguous, shift: RuntimeError: no such instruction" in text
    assert "views, one byte off" in text  # what needs no prediction

    late = facts.measured(fake_facts(ends=0.0))
    assert [row["contender"] for row in late[:3]] == ["empty kernel", "copy, DRAM", "copy, L2"]
    assert {row["skipped"] for row in late[3:]} == {"no time was left"}
    schema.check(content_of("facts", late))


def test_devices_are_taken_for_what_they_tell():
    h200 = costs.gpu_of("NVIDIA H200", 90, 132, 50 * 2**20)
    assert (h200.dram, h200.l2_mb, h200.sms) == (4320, 50, 132)  # 4.8 TB/s, less a tenth
    assert h200.fp32 == costs.GPUS[90].fp32
    smaller = costs.gpu_of("NVIDIA H100 PCIe", 90, 114)
    assert (smaller.sms, smaller.dram) == (114, 1840)
    assert costs.gpu_of("NVIDIA H100 80GB HBM3", 90, 132).dram == costs.GPUS[90].dram
    with pytest.raises(ValueError, match=r"one of \[80, 89, 90, 100\], got Tesla T4, sm_75"):
        costs.gpu_of("Tesla T4", 75, 40)


def test_without_cuda_nothing_runs_and_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setattr(gpu, "run_all", lambda *_: pytest.fail("something was run"))
    assert gpu.main() == 1
    assert "There is no CUDA device here" in capsys.readouterr().out
    monkeypatch.setattr(facts, "measured", lambda *_: pytest.fail("something was measured"))
    monkeypatch.setattr(sys, "argv", ["facts"])
    assert facts.main() == 1
    assert "nothing was measured" in capsys.readouterr().out


# The user's own machine


def test_bench_ranks_engines_and_advises_the_cheapest():
    parts = []
    result = bench.bench(16, 4, 3, "cnn", on_part=parts.append)
    assert parts == ["setting up", "engines", "training steps of cnn"]
    able = [row for row in result.rows if row.build_ms is not None]
    names = [row.engine for row in able]
    assert {"weak, eager", "kornia"} <= set(names)
    assert able == sorted(able, key=lambda row: row.build_ms)
    for row in able:
        share = row.build_ms / (row.build_ms + result.model_ms)
        assert row.share == pytest.approx(share)
        assert row.images_per_second == pytest.approx(1e3 * 16 / row.build_ms)
    assert result.advice.startswith(f"Choose {names[0]}: ")
    triton = next(row for row in result.rows if row.engine == "weak, triton")
    assert triton.build_ms is None
    assert "CUDA" in triton.detail
    text = bench.as_text(result)
    assert all(row.engine in text and row.detail in text for row in result.rows)
    assert result.advice in text


def test_orders_of_guess_and_training_pass_their_rows_and_no_others():
    case = orders.Case("cnn", 16, 2)
    images = augment.make_images(16, 14, CPU)
    images = images._replace(x=images.x[:2])
    for first in (False, True):
        built = orders.training_step(case, images, first=first)()
        orders.check_rows(built, case, first=first)
        with pytest.raises(ValueError, match="a step must pass"):
            orders.check_rows(built, case, first=not first)
    rows = [row_of(order, "cnn", peak_mb=held) for order, held in (("one", 20.0), ("first", 10.0))]
    ((_, table),) = tables.orders_tables(content_of("orders", rows))
    assert table.splitlines()[2:] == ["| one | 500 (20) |", "| first | 500 (10) |"]


def test_bench_times_strong_views_by_each_implementation():
    result = bench.bench(32, 2, 2, "cnn", augment="strong")
    assert {row.engine for row in result.rows} >= {"strong, eager", "strong, triton"}
    assert all(row.engine.startswith("strong, ") for row in result.rows)
    assert "MixMatch(RandAugment.fixmatch(WeakAugment(padding=4)), ..." in result.advice
    mixmatch, detail = bench._builders("strong", 8, 2, CPU)[0]["strong, eager"]
    assert detail.startswith("MixMatch(make_strong(WeakAugment(padding=1), 8, 8), ...")
    assert mixmatch.augment.chain.cutout == 4


def test_bench_builds_what_it_says_to_choose():
    builders, _ = bench._builders("weak", 16, 2, CPU)
    x, u = augment.make_images(16, 4, CPU)
    guess = _timing.fixed_logits(8, bench.NUM_CLASSES, CPU)
    for mixmatch, detail in builders.values():
        result = mixmatch(x, torch.arange(4), u, guess)
        assert result.inputs.shape == (12, 3, 16, 16)
        assert detail.startswith("MixMatch(")
    (weak, _), (dali, _) = builders["weak, eager"], builders.get("dali", builders["weak, eager"])
    same = (m.from_views(x / 255, torch.arange(4), [u / 255] * 2, guess) for m in (weak, dali))
    first, second = same
    # the same mixing, whatever the engine
    torch.testing.assert_close(first.inputs, second.inputs, atol=4e-6, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be an integer of at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be an integer"),
        ({"num_augmentations": -1}, "num_augmentations must be an integer of at least 1"),
        ({"model": "resnet"}, "name must be one of"),
        ({"augment": "mild"}, r"augment must be one of \['weak', 'strong'\], got 'mild'"),
    ],
)
def test_bench_refuses_what_it_cannot_build(arguments, message):
    with pytest.raises(ValueError, match=message):
        bench.bench(**arguments)


def test_a_training_step_trains_the_model():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 10))
    before = model[1].weight.clone()
    mixmatch = MixMatch(WeakAugment(1), 10)
    x, u = augment.make_images(8, 4, CPU)
    timing = _timing.time_training_step(
        model, lambda model: mixmatch(x, torch.arange(4), u, model), MixMatchLoss(), CPU
    )
    assert timing.median_ms > 0
    assert not torch.equal(before, model[1].weight)
    assert int(mixmatch.step) == 1 + timing.blocks  # after one to warm up


def test_importing_bench_loads_neither_engines_nor_benchmarks():
    code = (
        "import sys, gpu_mixmatch.cli.bench; "
        "print([n for n in ('kornia', 'nvidia.dali', 'rich', 'PIL', 'benchmarks', 'datasets') "
        "if n in sys.modules])"
    )
    result = subprocess.run(
        python(code), cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.strip() == "[]"


# On a GPU


@pytest.mark.gpu
@needs_cuda
def test_goals_are_measured_next_to_what_is_wanted():
    settings = replace(QUICK, device=torch.device("cuda"))
    rows = ops.goal_rows(settings, lambda _: None)
    assert {row["contender"] for row in rows} == set(ops.GOALS)
    for row in rows:
        assert row["value"] > 0
        assert row["goal"] == ops.GOALS[row["contender"]]
    schema.check(content_of("ops", rows))


@pytest.mark.gpu
@needs_cuda
def test_the_profiler_counts_our_loops_without_waits():
    device = torch.device("cuda")
    data, policy = batch.make_data(32, 16), augment.policy_for("shift, flip", 32)
    call = batch.ours_resident("triton", data, 8, policy, device)
    counted = batch.device_work(call, device)
    assert counted["synchronisations"] == 0
    assert 4 <= counted["launches"] <= 8  # the builder's four, and the loader's gathers


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kind", ["short", "heavy"])
def test_the_watched_kernels_run(kind):
    gpu.workload(kind)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("suite", ["augment", "scaling"])
def test_suites_run_on_the_device(suite):
    settings = replace(QUICK, device=torch.device("cuda"))
    content = content_of(suite, SUITES[suite](settings, lambda _: None), settings)
    schema.check(content)
    assert content["gpu"]
    assert any("triton" in row["contender"] for row in content["rows"])


# Learning


@pytest.fixture
def tiny_case(monkeypatch):
    """A case of 20 digits, half of them held out, whose runs take three steps."""
    data = load_dataset("digits")
    images, labels = data.train_images[:200], data.train_labels[:200]
    tiny = data._replace(train_images=images, train_labels=labels)
    case = learning.Case("digits", "digits", 10, 3, 20)
    monkeypatch.setitem(learning.CASES, "tiny", case)
    monkeypatch.setattr(learning, "_load", lambda case, fashion, work: tiny)
    return tiny


def test_images_held_out_to_choose_on_are_not_trained_on(tiny_case):
    data = learning.held_out(tiny_case, 20)
    assert (len(data.train_images), len(data.test_images)) == (180, 20)
    parts = torch.cat([data.train_images, data.test_images]).flatten(1)
    whole = tiny_case.train_images.flatten(1)
    assert torch.equal(parts.unique(dim=0, return_counts=True)[0], whole.unique(dim=0))
    for image, label in zip(data.test_images, data.test_labels, strict=True):
        (place,) = (tiny_case.train_images == image).all(dim=(1, 2, 3)).nonzero().flatten()
        assert tiny_case.train_labels[place] == label


def test_pooled_images_are_the_means_of_four_pixels():
    images = torch.tensor([[1, 2, 0, 0], [3, 5, 255, 255]], dtype=torch.uint8).view(1, 1, 2, 4)
    assert learning.pooled(images).tolist() == [[[[3, 128]]]]


def test_runs_that_have_ended_are_not_trained_again(tiny_case, tmp_path, monkeypatch):
    ours, theirs = learning.OURS, learning.YU1UT
    part = learning.Part({"tiny": ((0, 1), None)}, (ours, theirs), on="held")
    trials = [*part.trials("tiny", ours), *part.trials("tiny", theirs)]
    store = learning.Store(tmp_path / "runs.jsonl")
    learning.train(trials[:3], store, "", tell=lambda text: None)
    with pytest.raises(KeyError):
        learning.rows(part, store)
    trained = []
    real = learning.run
    monkeypatch.setattr(learning, "run", lambda *args: trained.append(args[0]) or real(*args))
    learning.train(trials, store, "", tell=lambda text: None)
    assert trained == trials[3:]

    path = learning.write("choice", learning.rows(part, store), tmp_path)
    content = schema.load(path)
    assert [row["contender"] for row in content["rows"]] == [ours.label, theirs.label]
    assert content["rows"][1]["errors"][1] == real(trials[3], tiny_case)["error"]
    assert [row["seeds"] for row in content["rows"]] == [[0, 1], [0, 1]]
    text = report.part(content, path)
    assert "| error in %: mean ± sd | digits (2 seeds) |" in text
    assert "3 steps of 64 + 64 images, errors on held-out training images" in text


@pytest.mark.parametrize(
    ("settings", "moves", "averages"),
    [
        ({}, {"kernels"}, False),
        ({"decay": "parameters"}, {"kernels", "scales"}, False),
        ({"decay": "state", "average_statistics": True}, {"kernels", "scales", "statistics"}, True),
    ],
)
def test_semantics_decay_and_average_what_they_say(tiny_case, settings, moves, averages):
    semantics = learning.Semantics(**settings)
    config = TrainConfig(steps=3, labels=10, lr=0.0, ema_decay=0.5)
    training = learning.LearningRun(config, tiny_case, semantics)
    norm = training.model.norm1
    before = norm.weight.clone(), training.model.conv1.weight.clone()
    training.train_step(next(iter(training.loader)))
    share = 1 - training.preset.optimizer["decay"]
    torch.testing.assert_close(training.model.conv1.weight, before[1] * share, rtol=1e-7, atol=0)
    decayed = before[0] * share if "scales" in moves else before[0]
    torch.testing.assert_close(norm.weight, decayed, rtol=1e-7, atol=0)
    kept = {kernel.data_ptr() for kernel in training.kernels}
    assert (norm.running_var.data_ptr() in kept) == ("statistics" in moves)
    norm.running_mean.add_(1.0)
    training.ema.update_parameters(training.model)
    same = torch.equal(training.ema.module.norm1.running_mean, norm.running_mean)
    assert same != averages


def test_a_table_of_guesses_compares_confidence_with_accuracy(tiny_case, tmp_path):
    part = learning.Part({"tiny": ((0,), None)}, (learning.OURS,))
    store = learning.Store(tmp_path / "runs.jsonl")
    (trial,) = part.trials("tiny", learning.OURS)
    store.append(trial, {"error": 40.0, "confidence": 0.75})
    content = schema.load(learning.write("guesses", learning.rows(part, store), tmp_path))
    ((_, errors), (_, guesses)) = tables.learning_tables(content)
    assert errors.splitlines()[-1] == "| defaults | 40.00 ± 0.00 |"
    assert guesses.splitlines()[-1] == "| defaults | 0.75 | 0.60 | +0.15 |"
    both = [*content["rows"], content["rows"][0] | {"case": "tiles"}]
    (_, (_, guesses)) = tables.learning_tables(content | {"rows": both})
    assert guesses.splitlines()[-2].startswith("| digits | 0.75 ")
