"""The command line, through the entry point that a user calls."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gpu_mixmatch.cli import app, doctor
from gpu_mixmatch.data.images import file_list
from gpu_mixmatch.recipes import ablate
from gpu_mixmatch.recipes.train import Summary, TrainConfig
from tests.image_files import broken_images, write_folder

RUNNER = CliRunner()


def run(*arguments: str) -> str:
    result = RUNNER.invoke(app.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def run_main(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from gpu_mixmatch.cli.app import main; sys.argv[0] = 'gpu-mixmatch'; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )


def last_error(out: Path) -> float:
    """Error of the last evaluation that a run logged, in percent."""
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["error"]


def test_train_prints_the_error_that_it_logged(tmp_path):
    out = tmp_path / "run"
    output = run("train", "--out", str(out), "--steps", "4", "--batch-size", "8")
    assert f"\ntest error {last_error(out):.2f} %, median" in output


@pytest.mark.parametrize(("options", "filters"), [((), 32), (("--filters", "16"), 16)])
def test_train_says_how_wide_the_wide_resnet_is(tmp_path, options, filters):
    out = tmp_path / "run"
    arguments = ("train", "--out", str(out), "--steps", "1", "--batch-size", "4")
    output = run(*arguments, "--model", "wrn-28-2", *options)
    assert output.startswith(f"wrn-28-2 with {filters} filters in its first stage")
    assert json.loads((out / "config.json").read_text())["filters"] == filters


def test_train_resumes_from_the_command_line(tmp_path):
    out = tmp_path / "run"
    arguments = ("train", "--out", str(out), "--steps", "4", "--batch-size", "8")
    assert run(*arguments).split("median")[0] == run(*arguments, "--resume").split("median")[0]


@pytest.fixture
def folder(tmp_path):
    for part, count in (("labelled", 3), ("unlabelled", 4), ("test", 2)):
        write_folder(tmp_path / "images" / part, count, "jpg")
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("loader", "augment"), [("resident", "kornia"), ("dataloader", "weak"), ("dali", "dali")]
)
def test_train_reads_a_folder_through_every_loader(tmp_path, folder, loader, augment):
    out = tmp_path / "run"
    arguments = ("train", "--out", str(out), "--steps", "2", "--batch-size", "4", "--workers", "0")
    files = ("--dataset", "folder", "--root", str(folder), "--size", "16")
    output = run(*arguments, *files, "--loader", loader, "--augment", augment)
    assert f"\ntest error {last_error(out):.2f} %, median" in output
    config = json.loads((out / "config.json").read_text())
    expected = {"loader": loader, "augment": augment, "size": 16, "num_workers": 0, "labels": None}
    assert config.items() >= expected.items()


def test_folder_without_test_images_says_what_errors_are_of(tmp_path, folder):
    (folder / "test").rename(tmp_path / "elsewhere")
    arguments = ("--dataset", "folder", "--root", str(folder), "--steps", "2")
    out = tmp_path / "run"
    # a long path is broken anywhere
    output = "".join(run("train", "--out", str(out), *arguments).split())
    assert output.startswith(f"Thereisno{folder}/test:errorsarethoseonthelabelledimages.")
    assert f"labellederror{last_error(out):.2f}%" in output
    assert "testerror" not in output
    with pytest.raises(ValueError, match=r"root must hold a folder test to compare on"):
        run("demo", *arguments, "--seeds", "0")


def test_train_prints_how_sure_guesses_are_beside_the_accuracy(tmp_path, folder):
    arguments = ("train", "--steps", "2", "--batch-size", "4")
    files = ("--dataset", "folder", "--root", str(folder), "--size", "16")
    output = run(*arguments, *files, "--out", str(tmp_path / "tested"))
    entries = (tmp_path / "tested" / "metrics.jsonl").read_text().splitlines()
    for entry in map(json.loads, entries):
        line = f"error {entry['error']:.2f} %  guesses {entry['confidence']:.2f} sure  loss"
        assert line in output
        last = entry["confidence"], 1 - entry["error"] / 100
    assert f"\nguesses {last[0]:.2f} sure, test accuracy {last[1]:.2f}\n" in output
    assert "guesses" not in run(*arguments, "--supervised", "--out", str(tmp_path / "supervised"))
    (folder / "test").rename(tmp_path / "elsewhere")
    output = run(*arguments, *files, "--out", str(tmp_path / "untested"))
    assert re.search(r"labelled accuracy \d\.\d\d, which says little .* are trained on\n", output)


def test_digits_keep_forty_labels_by_default(tmp_path):
    out = tmp_path / "run"
    run("train", "--out", str(out), "--steps", "1", "--batch-size", "4")
    assert json.loads((out / "config.json").read_text())["labels"] == 40


def test_demo_takes_a_folder(folder):
    output = run(
        *("demo", "--dataset", "folder", "--root", str(folder)), *("--steps", "2", "--seeds", "0")
    )
    assert "folder, all labels" in output


def test_check_images_ends_with_0_if_all_decode(tmp_path, folder):
    path = tmp_path / "good.txt"
    output = run("check-images", str(folder / "labelled"), "--list", str(path))
    assert "9 images decode, 0 do not" in output
    assert len(file_list(path, labelled=True)) == 9


def test_check_images_lists_what_does_not_decode_and_ends_with_1(tmp_path, folder):
    for name, content in broken_images().items():
        (folder / "labelled" / "cat" / name).write_bytes(content)
    path = tmp_path / "good.txt"
    result = run_main("check-images", str(folder / "labelled"), "--list", str(path))
    assert result.returncode == 1
    assert "9 images decode, 6 do not" in result.stdout
    assert "Traceback" not in result.stderr
    reasons = dict(line.split(": ", 1) for line in result.stdout.splitlines() if ": " in line)
    assert {place.rpartition("/")[2] for place in reasons} == set(broken_images())
    assert reasons[f"{folder}/labelled/cat/empty.jpg"] == "the file is empty"
    assert sorted(file_list(path).paths) == sorted(map(str, folder.glob("labelled/*/???.jpg")))


def test_check_images_of_no_folder_ends_with_2(tmp_path):
    result = run_main("check-images", str(tmp_path / "no"))
    assert result.returncode == 2
    assert result.stderr.startswith("error: root must be a folder, got")


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
        (("--augment", "imgaug"), "augment must be one of"),
        (("--loader", "ffcv"), "loader must be one of"),
        (("--loader", "dali"), "loader must be 'resident' or 'dataloader' for images in memory"),
        (("--dataset", "folder"), "root must be a folder with labelled/CLASS/"),
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


@pytest.mark.parametrize("augment", ["weak", "kornia", "dali"])
def test_preview_writes_a_picture(tmp_path, augment):
    path = tmp_path / "batch.png"
    run("preview", "--out", str(path), "--k", "3", "--augment", augment)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_preview_takes_a_folder(tmp_path, folder):
    path = tmp_path / "batch.png"
    run("preview", "--out", str(path), "--dataset", "folder", "--root", str(folder))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_doctor_shows_every_finding_with_its_remedy(monkeypatch):
    findings = [
        doctor.Finding("engine good", True, "version 1", None),
        doctor.Finding("engine bad", False, "not installed", 'pip install "package[extra]"'),
    ]
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    rows = [" ".join(re.findall(r"[^\s│┃]+", line)) for line in run("doctor").splitlines()]
    assert "ok engine good version 1" in rows
    assert 'no engine bad not installed pip install "package[extra]"' in rows


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


def test_demo_prints_both_errors_and_their_ratio():
    output = run("demo", "--steps", "2", "--seeds", "0")
    results = ablate.compare(TrainConfig(steps=2), [ablate.SUPERVISED, ablate.FULL], [0])
    supervised, mixmatch = (result.mean for result in results)
    rows = [" ".join(re.findall(r"[^\s│┃]+", line)) for line in output.splitlines()]
    assert f"supervised only {supervised:.2f} {supervised:.2f} ± 0.00" in rows
    assert f"MixMatch {mixmatch:.2f} {mixmatch:.2f} ± 0.00" in rows
    assert f"MixMatch: {mixmatch / supervised:.2f} × the supervised error" in rows


def test_module_runs_the_command_line():
    command = [sys.executable, "-m", "gpu_mixmatch.cli", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    _, commands = result.stdout.split("Commands")
    names = re.findall(r"^│ ([a-z-]+) ", commands, re.MULTILINE)
    assert names == [
        *("train", "predict", "preview", "check-images"),
        *("ablate", "demo", "bench", "doctor"),
    ]


@pytest.mark.parametrize("seeds", ["", "a", "1,,2"])
def test_seeds_must_be_integers(seeds):
    with pytest.raises(ValueError, match="seeds must be integers, comma-separated"):
        run("demo", "--seeds", seeds)


def test_comparison_loads_images_at_the_size_of_the_config(folder, monkeypatch):
    shapes = []

    def train(config, *, data, on_step):
        shapes.append(tuple(data.test_images.shape))
        return Summary(error=1.0, median_error=2.0, best_error=0.5, seconds=0.0)

    monkeypatch.setattr(ablate, "train", train)
    config = TrainConfig("folder", root=str(folder), size=16, labels=None)
    (result,) = ablate.compare(config, [ablate.FULL], [1, 2])
    assert shapes == [(6, 3, 16, 16)] * 2
    assert result.errors == [1.0, 1.0]


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
    code = "import sys; sys.modules['typer'] = None\nimport gpu_mixmatch.cli.app"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert 'the command line needs Typer: pip install -e ".[cli]"' in result.stderr
