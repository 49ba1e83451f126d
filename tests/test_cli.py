"""The command line, through the entry point that a user calls."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from gpu_mixmatch import cli
from gpu_mixmatch.recipes import ablate

RUNNER = CliRunner()


def run(*arguments: str) -> str:
    result = RUNNER.invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def run_main(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from gpu_mixmatch.cli import main; sys.argv[0] = 'gpu-mixmatch'; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )


def test_train_prints_the_error_that_it_logged(tmp_path):
    out = tmp_path / "run"
    output = run("train", "--out", str(out), "--steps", "4", "--batch-size", "8")
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"test error {last['error']:.2f} %" in output


def test_train_resumes_from_the_command_line(tmp_path):
    out = tmp_path / "run"
    arguments = ("train", "--out", str(out), "--steps", "4", "--batch-size", "8")
    assert run(*arguments).split("median")[0] == run(*arguments, "--resume").split("median")[0]


def test_existing_folder_ends_in_one_line_and_code_2(tmp_path):
    result = run_main("train", "--out", str(tmp_path))
    assert result.returncode == 2
    assert result.stderr.startswith("error: out must be a folder that does not exist yet")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dataset", "imagenet"), "imagenet"),
        (("--dataset", "cifar10"), "root"),
        (("--model", "vgg"), "vgg"),
        (("--preset", "best"), "preset must be one of"),
        (("--labels", "5"), "num_labels must be"),
        (("--steps", "0"), "steps must be at least 1, got 0"),
    ],
)
def test_bad_argument_is_named(tmp_path, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        run("train", "--out", str(tmp_path / "run"), *arguments)
    assert not (tmp_path / "run").exists()


def test_unusable_device_points_to_the_doctor(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("CUDA is usable here")
    with pytest.raises(ValueError, match=r"device must be usable here, got 'cuda'.*doctor"):
        run("train", "--out", str(tmp_path / "run"), "--device", "cuda")


def test_preview_writes_a_picture(tmp_path):
    path = tmp_path / "batch.png"
    run("preview", "--out", str(path), "--k", "3")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_doctor_shows_the_extra_to_install():
    output = run("doctor")
    assert "impl eager" in output
    assert "CUDA device" in output


def test_ablate_writes_rows_next_to_the_papers(tmp_path):
    out = tmp_path / "ablation"
    output = run(
        *("ablate", "--out", str(out), "--steps", "2", "--batch-size", "8"),
        *("--seeds", "0,1", "--rows", "full,k1,none"),
    )
    assert "17.09 / 8.06" in output
    content = json.loads((out / "ablation.json").read_text())
    assert [row["key"] for row in content["rows"]] == ["full", "k1", "none"]
    assert all(len(row["errors"]) == 2 for row in content["rows"])
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_demo_compares_supervised_training_with_mixmatch():
    output = run("demo", "--steps", "2", "--seeds", "0")
    assert "supervised only" in output
    assert "times the errors of supervised training" in " ".join(output.split())


@pytest.mark.parametrize("seeds", ["", "a", "1,,2"])
def test_seeds_must_be_integers(seeds):
    with pytest.raises(ValueError, match="seeds must be integers, comma-separated"):
        run("demo", "--seeds", seeds)


def test_unknown_ablation_row_is_named():
    with pytest.raises(ValueError, match=r"rows must be among .*'k1'.* got \['k9'\]"):
        ablate.choose_rows("full,k9")


def test_ablation_rows_change_what_they_say():
    changes = {row.key: row.changes for row in ablate.ABLATION}
    assert changes["full"] == {}
    assert [changes[f"k{k}"]["builder"]["num_augmentations"] for k in (1, 3, 4)] == [1, 3, 4]
    assert changes["t1"]["builder"] == {"temperature": 1.0}
    assert changes["ema"] == {"ema_teacher": True}
    for mix in ("none", "labelled", "unlabelled", "separate"):
        assert changes[mix]["builder"] == {"mix": mix}


def test_missing_extra_is_named():
    code = "import sys; sys.modules['typer'] = None\nimport gpu_mixmatch.cli"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert 'pip install "gpu-mixmatch[cli]"' in result.stderr
