"""The command line, through the entry point that a user calls."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from gpu_mixmatch import ICT, __version__
from gpu_mixmatch.cli import app, doctor, terminal
from gpu_mixmatch.data.images import file_list
from gpu_mixmatch.recipes import ablate
from gpu_mixmatch.recipes.train import Summary, TrainConfig, TrainRun, resolved
from tests.image_files import broken_images, write_folder

RUNNER = CliRunner()


def run(*arguments: str) -> str:
    result = RUNNER.invoke(app.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def refusal(*arguments: str, code: int = 2) -> str:
    """What a command says that ends with a code, in one line."""
    result = RUNNER.invoke(app.app, arguments, catch_exceptions=False)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    (line,) = result.stderr.splitlines()
    return line


def misuse(*arguments: str) -> str:
    """What Typer says of an option, without its frame and its line breaks."""
    result = RUNNER.invoke(app.app, arguments, catch_exceptions=False)
    assert result.exit_code == 2, result.output
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())


def logged(out: Path) -> list[dict[str, float]]:
    """The evaluations that a run logged."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def last_error(out: Path) -> float:
    """Error of the last evaluation that a run logged, in percent."""
    return logged(out)[-1]["error"]


def test_train_prints_the_error_that_it_logged(tmp_path):
    out = tmp_path / "run"
    output = run("train", "--out", str(out), "--steps", "4", "--batch-size", "8")
    assert f"\ntest error {last_error(out):.2f} %, median" in output


@pytest.mark.filterwarnings("ignore:step 1. guesses are")
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
    first, again = run(*arguments).splitlines(), run(*arguments, "--resume").splitlines()
    assert again == ["going on after step 4 of 4", *first[-3:]]


@pytest.fixture
def folder(tmp_path):
    for part, count in (("labelled", 3), ("unlabelled", 4), ("test", 2)):
        write_folder(tmp_path / "images" / part, count, "jpg")
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("loader", "augment"), [("resident", "kornia"), ("dataloader", "strong"), ("dali", "dali")]
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
    output = run("train", "--out", str(out), *arguments)
    assert f"There is no {folder}/test: errors are those on the labelled images.\n" in output
    assert f"\nlabelled error {last_error(out):.2f} %" in output
    assert "test error" not in output
    message = refusal("demo", *arguments, "--seeds", "0")
    assert message.startswith("error: --root must hold a folder test to compare on, got none in")


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
    arguments = ("check-images", str(folder / "labelled"), "--list", str(path))
    result = RUNNER.invoke(app.app, arguments)
    assert result.exit_code == 1
    assert "9 images decode, 6 do not" in result.stdout
    assert "Traceback" not in result.stderr
    reasons = dict(line.split(": ", 1) for line in result.stdout.splitlines() if ": " in line)
    assert {place.rpartition("/")[2] for place in reasons} == set(broken_images())
    assert reasons[f"{folder}/labelled/cat/empty.jpg"] == "the file is empty"
    assert sorted(file_list(path).paths) == sorted(map(str, folder.glob("labelled/*/???.jpg")))


def test_check_images_keeps_back_what_native_decoders_print(folder, capfd):
    for name, content in broken_images().items():
        (folder / "labelled" / "cat" / name).write_bytes(content)
    result = RUNNER.invoke(app.app, ["check-images", str(folder / "labelled" / "cat")])
    assert result.exit_code == 1
    assert capfd.readouterr().err == ""
    with terminal.quiet_decoders():
        os.write(2, b"[ERROR] invalid marker\n")
        print("of ours", file=sys.stderr)
    assert capfd.readouterr().err == "of ours\n"


def test_check_images_of_an_empty_folder_ends_with_2(tmp_path):
    message = refusal("check-images", str(tmp_path))
    assert message.startswith(f"error: folder must hold at least one image, got none in {tmp_path}")


def test_check_images_of_no_folder_ends_with_2(tmp_path):
    assert refusal("check-images", str(tmp_path / "no")).startswith("error: root must be a folder")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dataset", "cifar10"), "--root must be a folder with "),
        (("--dataset", "folder"), "--root must be a folder with labelled/CLASS/"),
        (("--labels", "5"), "--labels must be at least num_classes = 10, got 5"),
        (("--steps", "0"), "--steps must be at least 1, got 0"),
        (("--batch-size", "0"), "--batch-size must be at least 1, got 0"),
        (("--workers", "-1"), "--workers must be at least 0, got -1"),
        (("--lambda-u", "nan"), "--lambda-u must be at least 0 and finite, got nan"),
        (("--loader", "dali"), "--loader must be 'resident' or 'dataloader' for images in memory"),
        (("--device", "tpu"), "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (("--device", "meta"), "--device must be usable here, got 'meta'"),
        (("--sync-batchnorm",), "--sync-batchnorm must be off where"),
    ],
)
def test_a_message_speaks_of_options_and_leaves_no_folder(tmp_path, arguments, message):
    out = tmp_path / "run"
    assert refusal("train", "--out", str(out), *arguments).startswith(f"error: {message}")
    assert not out.exists()


@pytest.mark.parametrize(
    ("option", "value", "names"),
    [
        ("--dataset", "imagenet", "digits, mnist, fashion-mnist, cifar10, cifar100, folder"),
        ("--model", "vgg", "wrn-28-2, cnn"),
        ("--preset", "best", "fast, paper, yu1ut, usb"),
        ("--augment", "imgaug", "weak, strong, kornia, dali"),
        ("--loader", "ffcv", "resident, dataloader, dali"),
    ],
)
def test_choices_are_listed_by_errors_and_by_help(option, value, names):
    message = misuse("train", "--out", "run", option, value)
    assert f"Invalid value for '{option}': must be one of {names}, got '{value}'" in message
    cells = re.sub(r"[│\s]", "", run("train", "--help"))
    assert f"[{names.replace(', ', '|')}]"[:18] in cells


def test_existing_folder_ends_in_one_line_and_code_2(tmp_path):
    message = refusal("train", "--out", str(tmp_path))
    assert message.startswith("error: --out must be a folder that does not exist yet, got ")


def test_a_path_is_printed_as_it_is(tmp_path, folder):
    root = tmp_path / "a [bold]b {c}"
    message = refusal(
        "train", "--out", str(tmp_path / "x"), "--dataset", "folder", "--root", str(root)
    )
    assert f"got {root}: a path that is no folder" in message
    folder.rename(root)
    (root / "test").rename(tmp_path / "elsewhere")
    out = tmp_path / "[red]run"
    arguments = ("--dataset", "folder", "--root", str(root), "--steps", "1", "--batch-size", "4")
    output = run("train", "--out", str(out), *arguments)
    assert f"There is no {root}/test:" in output
    assert output.endswith(f"wrote {out}/curves.png, metrics.jsonl and checkpoint.pt\n")


def test_train_prints_a_line_per_evaluation_where_there_is_no_terminal(tmp_path):
    arguments = ("train", "--out", str(tmp_path / "run"), "--steps", "4", "--batch-size", "8")
    lines = run(*arguments, "--eval-every", "2").splitlines()
    entries = logged(tmp_path / "run")
    assert len(lines) == 5
    seconds = 0.0
    for line, entry in zip(lines, entries, strict=False):
        rate = 2 / (entry["seconds"] - seconds)
        seconds = entry["seconds"]
        assert line == (
            f"step {entry['step']}/4  error {entry['error']:.2f} %  "
            f"guesses {entry['confidence']:.2f} sure  loss {entry['loss']:.4g}  {rate:.1f} steps/s"
        )


def test_a_batch_of_more_images_than_there_are_is_told(tmp_path, folder):
    arguments = ("--dataset", "folder", "--root", str(folder), "--steps", "1", "--size", "8")
    output = run("train", "--out", str(tmp_path / "run"), *arguments, "--batch-size", "30")
    assert "A step takes 30 unlabelled images and there are 12, so that each comes 2.5 " in output
    assert "a --batch-size of 12 takes each once" in output


class Interrupted:
    """Sends this process a signal after some steps of a run."""

    def __init__(self, monkeypatch, number, after):
        self.number, self.after, step = number, after, TrainRun.train_step

        def train_step(run, batch):
            losses = step(run, batch)
            if run.step == self.after:
                signal.raise_signal(self.number)
            return losses

        monkeypatch.setattr(TrainRun, "train_step", train_step)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "sigterm"]
)
def test_a_run_that_is_stopped_says_where_and_how_to_go_on(tmp_path, monkeypatch, number, code):
    out = tmp_path / "a run"
    arguments = ("train", "--out", str(out), "--steps", "6", "--batch-size", "8")
    arguments += ("--eval-every", "2")
    monkeypatch.setattr(sys, "argv", ["gpu-mixmatch", *arguments])
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        Interrupted(patch, number, after=5)
        result = RUNNER.invoke(app.app, arguments)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert result.exit_code == code
    assert result.stdout.splitlines()[-1] == (
        f"stopped after step 4; {out}/checkpoint.pt is of step 4. Go on with: gpu-mixmatch train "
        f"--out '{out}' --steps 6 --batch-size 8 --eval-every 2 --resume"
    )
    assert run(*arguments, "--resume").startswith("going on after step 4 of 6\nstep 6/6  error ")


def test_a_run_that_is_stopped_at_its_start_leaves_nothing(tmp_path, monkeypatch):
    out = tmp_path / "run"
    Interrupted(monkeypatch, signal.SIGINT, after=1)
    arguments = ("train", "--out", str(out), "--steps", "6", "--eval-every", "2")
    result = RUNNER.invoke(app.app, arguments)
    assert "stopped after step 0, before the first checkpoint. Go on with: " in result.stdout
    assert not out.exists()


def test_other_commands_that_are_stopped_say_so(monkeypatch):
    monkeypatch.setattr(app.bench, "bench", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    assert refusal("bench", code=130) == "stopped"


def test_a_run_that_diverges_says_so_and_ends_with_3(tmp_path, monkeypatch):
    out, step = tmp_path / "run", TrainRun.train_step

    def train_step(run, batch):
        losses = step(run, batch)
        return {**losses, "loss": losses["loss"] * (torch.nan if run.step > 2 else 1)}

    monkeypatch.setattr(TrainRun, "train_step", train_step)
    arguments = ("train", "--out", str(out), "--steps", "6", "--batch-size", "8")
    message = refusal(*arguments, "--eval-every", "2", code=3)
    assert message.startswith("error: the run diverged: at step 4 losses or weights are not finite")
    assert f"The checkpoint of step 2 is in {out}. A lower learning rate, a lower --lam" in message
    assert [entry["step"] for entry in logged(out)] == [2]


def test_resuming_on_other_options_names_them(tmp_path):
    out = tmp_path / "run"
    arguments = ("train", "--out", str(out), "--steps", "1", "--batch-size", "4")
    run(*arguments)
    message = refusal(*arguments, "--resume", "--lambda-u", "10", "--seed", "2")
    weight = json.loads((out / "config.json").read_text())["lambda_u"]
    assert 0 < weight < 75
    assert message.endswith(
        f"got --lambda-u: {weight} in the checkpoint, 10.0 now; --seed: 0 in the checkpoint, 2 now"
    )
    (out / "checkpoint.pt").write_bytes(b"PK")
    message = refusal(*arguments, "--resume")
    assert message.startswith(f"error: {out}/checkpoint.pt must be a checkpoint of")


@pytest.mark.parametrize("module", ["matplotlib.figure", "tensorboard"])
def test_what_a_run_ends_with_is_looked_for_before_it_begins(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(TrainRun, "train_step", pytest.fail)
    message = refusal("train", "--out", str(tmp_path / "run"))
    assert "of a run needs" in message
    assert message.endswith('pip install -e ".[cli]"')
    if module == "matplotlib.figure":
        for command in ("demo", "ablate", "preview"):
            assert "needs matplotlib: " in refusal(command, "--out", str(tmp_path / "x"))


@pytest.mark.parametrize(
    "error", [EOFError("gone"), KeyError("x"), AttributeError("y"), TypeError("unsupported")]
)
def test_an_error_that_nobody_expected_is_called_a_bug(monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(app.bench, "bench", fails)
    result = RUNNER.invoke(app.app, ["bench"])
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: this is a bug of gpu-mixmatch, please report it")


def test_an_error_of_a_worker_is_its_own_last_line():
    text = (
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        'last):\n  File "a.py", line 1, in f\nValueError: a.png must be an image that decodes\n'
    )
    error = ValueError(text)
    error.add_note("while the labelled batch of step 3 was fetched")
    assert terminal.one_line(error) == (
        "a.png must be an image that decodes (while the labelled batch of step 3 was fetched)"
    )


def test_the_version_is_told():
    assert run("--version") == f"gpu-mixmatch {__version__}, torch {torch.__version__}\n"


def test_warnings_are_lines(monkeypatch):
    monkeypatch.setattr(app.bench, "bench", lambda *_, **__: warnings.warn("old", stacklevel=1))
    monkeypatch.setattr(app.bench, "as_text", str)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = RUNNER.invoke(app.app, ["bench"])
    assert result.stderr == "warning: old\n"


def test_unusable_device_points_to_the_doctor(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("CUDA is usable here")
    message = refusal("train", "--out", str(tmp_path / "run"), "--device", "cuda")
    assert message == "error: --device must be usable here, got 'cuda'; see gpu-mixmatch doctor"


@pytest.mark.parametrize("augment", ["weak", "strong", "kornia", "dali"])
def test_preview_writes_a_picture(tmp_path, augment):
    path = tmp_path / "batch.png"
    run("preview", "--out", str(path), "--k", "3", "--augment", augment)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_preview_takes_a_folder(tmp_path, folder):
    path = tmp_path / "batch.png"
    run("preview", "--out", str(path), "--dataset", "folder", "--root", str(folder))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_doctor_shows_every_finding_with_its_remedy_and_what_one_is_ready_for(monkeypatch):
    names = [name for _, names, needed in doctor._PURPOSES for name in names if needed]
    findings = [doctor.Finding(name, True, "version 1", None) for name in names]
    findings.append(doctor.Finding("Lightning", False, "none", 'pip install "package[extra]"'))
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    rows = [" ".join(re.findall(r"[^\s│┃]+", line)) for line in run("doctor").splitlines()]
    assert "ok torch version 1" in rows
    assert 'optional Lightning none pip install "package[extra]"' in rows
    assert "ready for MixMatch in a training loop: yes" in rows
    assert "ready for Lightning: no, needs Lightning (optional)" in rows

    findings[names.index("Pillow")] = doctor.Finding("Pillow", False, "not installed", "buy some")
    result = RUNNER.invoke(app.app, ["doctor"])
    assert result.exit_code == 1
    rows = [" ".join(re.findall(r"[^\s│┃]+", line)) for line in result.output.splitlines()]
    assert "no Pillow not installed buy some" in rows
    assert "ready for gpu-mixmatch train, demo, ablate and preview: no, needs Pillow" in rows


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
        *("train", "compare", "predict", "preview", "check-images"),
        *("ablate", "demo", "bench", "doctor"),
    ]


@pytest.mark.parametrize("seeds", ["", "a", "1,,2"])
def test_seeds_must_be_integers(seeds):
    message = refusal("demo", "--seeds", seeds)
    assert message == f"error: --seeds must be integers, comma-separated, got {seeds!r}"


def test_comparison_loads_images_at_the_size_of_the_config(folder, monkeypatch):
    shapes = []

    def train(config, folder, *, data, **_):
        assert folder is None
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
    ict = resolved(dataclasses.replace(TrainConfig(preset="usb"), **changes["ict"]))
    run = TrainRun(dataclasses.replace(ict, batch_size=4))
    assert isinstance(run.builder, ICT)
    assert run.builder.teacher is run.ema
    assert run.builder.partner == "reversed"
    assert run.criterion.loss_u == "mse"
    assert ablate.ABLATION[-1].paper == (38.60, 6.81)


def test_missing_extra_is_named():
    code = "import sys; sys.modules['typer'] = None\nimport gpu_mixmatch.cli.app"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert 'the command line needs Typer: pip install -e ".[cli]"' in result.stderr
