"""Methods are compared on equal terms, and a comparison goes on where it was."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from benchmarks import drawings, methods, report, schema, tables
from gpu_mixmatch.cli import app
from gpu_mixmatch.recipes import ablate, compare
from gpu_mixmatch.recipes.train import TrainConfig, TrainRun, train

RUNNER = CliRunner()
SHORT = TrainConfig(steps=4, batch_size=8, eval_every=2)
ROWS = compare.choose_methods("supervised,freematch")


def command(out, *options):
    arguments = ("compare", "--out", str(out), "--steps", "4", "--batch-size", "8", *options)
    return RUNNER.invoke(app.app, arguments, catch_exceptions=False)


def test_all_methods_and_supervised_training_are_compared_by_default():
    keys = [row.key for row in compare.choose_methods(None)]
    assert keys[0] == "supervised"
    assert set(keys[1:]) == set(compare.NAMES)
    changes = {row.key: row.changes for row in compare.ROWS}
    assert changes["uda"] == {"method": "uda"}
    assert changes["supervised"] == {"supervised": True}


def test_a_method_that_is_unknown_or_given_twice_is_named():
    with pytest.raises(ValueError, match=r"methods must be among .*'uda'.* got \['vat'\]"):
        compare.choose_methods("fixmatch, vat")
    with pytest.raises(ValueError, match=r"methods must each be given once, got \['uda', 'uda'\]"):
        compare.choose_methods("uda,uda")


def test_a_run_that_has_ended_is_taken_and_one_that_was_stopped_goes_on(tmp_path, monkeypatch):
    steps, train_step = [], TrainRun.train_step

    def counted(run, batch):
        steps.append(("supervised" if run.config.supervised else run.config.method, run.step))
        return train_step(run, batch)

    monkeypatch.setattr(TrainRun, "train_step", counted)
    alone = ablate.compare(SHORT, ROWS, [0])
    train(replace(SHORT, supervised=True), tmp_path / "supervised-0")
    stopped = replace(SHORT, method="freematch", steps=2, planned_steps=4)
    train(stopped, tmp_path / "freematch-0")
    steps.clear()
    results = ablate.compare(SHORT, ROWS, [0], out=tmp_path)
    assert steps == [("freematch", 2), ("freematch", 3)]
    assert [result.errors for result in results] == [result.errors for result in alone]


def test_runs_of_other_options_are_refused_with_their_names(tmp_path):
    ablate.compare(SHORT, ROWS[:1], [0], out=tmp_path)
    with pytest.raises(ValueError, match="batch_size: 8 in the checkpoint, 4 now") as caught:
        ablate.compare(replace(SHORT, batch_size=4), ROWS, [0], out=tmp_path)
    assert caught.value.__notes__ == ["supervised only, seed 0"]


def test_results_hold_the_curves_and_settings_of_every_row(tmp_path):
    results = ablate.compare(SHORT, ROWS, [0, 1])
    path = compare.save_comparison(results, SHORT, [0, 1], "a command", tmp_path / "compare.json")
    content = schema.load(path)
    assert content["suite"] == "compare"
    supervised, freematch = content["rows"]
    assert [row["key"] for row in content["rows"]] == ["supervised", "freematch"]
    for row, result in zip(content["rows"], results, strict=True):
        assert row["curves"]["steps"] == [2, 4]
        assert row["errors"] == pytest.approx(row["curves"]["errors"][-1], abs=1e-3)
        assert row["seconds"] == pytest.approx([s.seconds for s in result.summaries], abs=0.01)
    assert supervised["settings"] == {}
    assert "kept" not in supervised
    assert freematch["settings"]["ratio"] == 2
    assert freematch["settings"]["guess"] == "loss"
    last = [summary.metrics[-1]["kept"] for summary in results[1].summaries]
    assert freematch["kept"] == pytest.approx(sum(last) / 2, abs=1e-4)


def test_command_writes_a_table_a_chart_and_json_and_goes_on_with_more_seeds(tmp_path):
    out = tmp_path / "methods"
    options = ("--methods", "fixmatch", "--seeds")
    first = command(out, *options, "0")
    assert first.exit_code == 0, first.output
    assert "FixMatch, seed 0: error" in first.output
    content = json.loads((out / "compare.json").read_text())
    assert [row["contender"] for row in content["rows"]] == ["FixMatch"]
    more = command(out, *options, "0,1")
    assert "FixMatch, seed 0: 4 steps were taken before" in more.output
    assert "FixMatch, seed 1: error" in more.output
    after = json.loads((out / "compare.json").read_text())
    assert [len(row["errors"]) for row in after["rows"]] == [2]
    assert [row["errors"][0] for row in after["rows"]] == [r["errors"][0] for r in content["rows"]]
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    refused = command(out, *options, "0", "--ratio", "3")
    assert refused.exit_code == 2
    assert "got --ratio: 2 in the checkpoint, 3 now (FixMatch, seed 0)" in refused.stderr


def test_a_comparison_that_is_stopped_says_how_to_go_on(tmp_path, monkeypatch):
    def stops(run, batch):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainRun, "train_step", stops)
    result = command(tmp_path / "x", "--methods", "uda")
    assert result.exit_code == 130
    assert "stopped in UDA, seed 0. Go on with: gpu-mixmatch" in result.output


def test_headline_names_the_least_error_and_that_of_the_labels_alone():
    means = {"supervised only": 20.0, "UDA": 5.0, "FixMatch": 4.0}
    expected = "Least test error: FixMatch, 4.00 %; supervised only 20.00 %"
    assert compare.headline(means) == expected
    assert compare.headline({"supervised only": 2.0, "UDA": 5.0}) == (
        "Least test error: supervised only, 2.00 %"
    )


def test_results_of_several_sets_become_one_table_and_a_chart_each(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "SETS", {"digits": SHORT})
    monkeypatch.setattr(methods, "SEEDS", (0, 1))
    rows = compare.choose_methods("supervised,freematch")
    path = methods.train("digits", rows, "", tmp_path / "runs", tmp_path)
    content = schema.load(path)
    assert path.name == f"digits-compare--{content['machine']}.json"
    supervised, freematch = content["rows"]
    ((_, table),) = tables.compare_tables(content)
    error = f"{freematch['mean']:.2f} ± {freematch['deviation']:.2f}"
    assert f"| {error} | {freematch['kept']:.2f} |" in table
    whole = report.methods(tmp_path)
    assert whole.splitlines()[0].startswith("| method | augmentation | state")
    assert f"| {supervised['mean']:.2f} ± {supervised['deviation']:.2f} |" in whole
    if methods.kernels("freematch"):
        assert freematch["kernels"] == [2, 5]
        assert f"| FreeMatch | weak and strong | 2L + 1 averages | 2 + 5 | {error} |" in whole
    assert "4 steps of 8 labelled images, seconds of the CPU" in whole
    drawings.DRAWINGS["compare"](content, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_every_method_has_its_line_in_the_table():
    assert set(tables.METHODS) == set(compare.NAMES)
