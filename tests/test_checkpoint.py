"""A checkpoint is written whole or not at all; whatever lies in its place is refused by name."""

import copy
import io
import os
import pickle
import re
import resource
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gpu_mixmatch.recipes import checkpoint
from gpu_mixmatch.recipes.checkpoint import (
    check_state,
    check_writable,
    read_checkpoint,
    write_checkpoint,
)
from gpu_mixmatch.recipes.train import TrainConfig, TrainRun, resolved, resumed, train

CONFIG = TrainConfig(steps=4, eval_every=2, batch_size=8)


class Harm:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(CONFIG, folder)
    return folder


@pytest.fixture(scope="module")
def state(out):
    return read_checkpoint(out / "checkpoint.pt")


def saved(value, **options):
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def archive(method=zipfile.ZIP_STORED, name="a.txt"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as content:
        content.writestr(name, b"0" * 10_000)
    return file.getvalue()


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]


OF_SOMETHING_ELSE = {
    "empty": b"",
    "text": b"lr: 0.002\n",
    "utf16": "lr".encode("utf-16"),
    "pickle": pickle.dumps({"model": 1}),
    "zip": archive(),
    "bomb": archive(zipfile.ZIP_DEFLATED, "archive/data.pkl"),
    "no pickle": archive(name="archive/data.pkl"),
    "tensor": saved(torch.zeros(3)),
    "weights": saved({"conv.weight": torch.zeros(3)}),
    "old format": saved(torch.zeros(3), _use_new_zipfile_serialization=False),
    "version 0.1": saved({"config": {}, "model": {}, "step": 4}),
    "next version": saved({"config": {}, "model": {}, "format": 2}),
}


def refusal(path: Path) -> str:
    message = f"^{re.escape(str(path))} must be a checkpoint of gpu-mixmatch train, got "
    with pytest.raises(ValueError, match=message) as error:
        read_checkpoint(path)
    text = str(error.value)
    assert text.endswith("Take another copy of it, or begin anew in another folder")
    assert "\n" not in text
    return text


def test_a_checkpoint_is_read_as_it_was_written(out, state):
    run = TrainRun(CONFIG)
    run.load_state_dict(state)
    assert run.step == 4
    for name, value in run.state_dict()["model"].items():
        assert torch.equal(value, state["model"][name]), name


def test_a_checkpoint_says_what_it_was_taken_of(state):
    assert state["format"] == 1
    assert state["versions"]["torch"] == torch.__version__
    data = state["data"]
    assert data["classes"] == [str(number) for number in range(10)]
    assert (data["name"], data["num_classes"], data["image"]) == ("digits", 10, [1, 8, 8])
    assert (data["num_labelled"], data["num_unlabelled"], data["num_test"]) == (40, 1297, 500)
    assert len(bytes.fromhex(data["digest"])) == 32
    assert state["normalisation"] == {"mean": [0.5], "std": [0.5]}
    # numbers of the preset, and those of the length of the run
    config = state["config"]
    assert (config["lr"], config["rampup_steps"]) == (0.002, 2)
    assert config["lambda_u"] == pytest.approx(75 * (4 / 32_768) ** (1 / 3))
    assert config["builder"]["num_augmentations"] == 2


@pytest.mark.parametrize("kind", OF_SOMETHING_ELSE)
def test_a_file_of_something_else_is_refused_in_one_line(tmp_path, kind):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(OF_SOMETHING_ELSE[kind])
    refusal(path)


def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    path, harm = tmp_path / "checkpoint.pt", tmp_path / "harm"
    for value in (Harm(harm), {"config": {}, "model": Harm(harm)}):
        for content in (saved(value), pickle.dumps(value)):
            path.write_bytes(content)
            refusal(path)
    assert not harm.exists()


def test_a_damaged_file_is_refused_in_one_line(tmp_path, out, state):
    whole = (out / "checkpoint.pt").read_bytes()
    path = tmp_path / "checkpoint.pt"
    length = len(whole)
    for size in (1, 4, 30, 5000, length // 2, length - 1):
        path.write_bytes(whole[:size])
        refusal(path)
    weight = whole.index(state["model"]["dense.weight"].numpy().tobytes())
    for place in (70, weight + 99):  # in the pickle, and in a weight
        path.write_bytes(flipped(whole, place))
        assert "a damaged one: the bytes of archive/data" in refusal(path)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.pt must be a checkpoint .* got no file"):
        read_checkpoint(tmp_path / "no.pt")
    assert "got a folder" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "got a pipe or device" in refusal(tmp_path / "pipe")


def with_nan(state):
    state["ema"]["module.conv1.weight"].fill_(torch.nan)


def set_in(*path, value):
    def change(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("metrics"), "metrics must be of type list, got None"),
        (set_in("step", value=-1), "step must be at least 0, got -1"),
        (set_in("step", value=True), "step must be of type int, got True"),
        (set_in("config", value=[1]), r"config must be of type dict, got \[1\]"),
        (set_in("config", "builder", value=3), "builder of config must be a plain value, got 3"),
        (set_in("metrics", 0, "error", value=torch.nan), "error of metrics must be finite"),
        (set_in("metrics", 0, value={}), "metrics must have step, error and seconds, got {}"),
        (set_in("data", "classes", value=["a"]), r"classes of data must be 10 names, got \['a'\]"),
        (set_in("data", "num_test", value=0), "num_test of data must be at least 1, got 0"),
        (set_in("normalisation", "mean", value=[]), "mean of normalisation must be 1 numbers"),
        (set_in("optimizer", value={}), "optimizer must have param_groups and state"),
        (set_in("model", "more", value=3), "model must hold tensors by name, got 'more'"),
        (set_in("model", "more", value=torch.zeros(1).expand(10**9)), r"model\.more must be as"),
        (with_nan, r"ema\.module\.conv1\.weight must be finite"),
    ],
)  # fmt: skip
def test_an_entry_of_another_kind_is_named(tmp_path, state, change, message):
    changed = copy.deepcopy(state)
    change(changed)
    path = tmp_path / "checkpoint.pt"
    torch.save(changed, path)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["model"].pop("conv1.weight"), "model must hold .* 1 entries are miss"),
        (set_in("ema", "more", value=torch.zeros(1)), "ema must .* 1 entries are of another"),
        (
            set_in("model", "conv1.weight", value=torch.zeros(2, 2)),
            r"'conv1\.weight' must be a tensor \[32, 1, 3, 3\] float32, got a tensor \[2, 2\]",
        ),
        (
            set_in("optimizer", "state", 0, "exp_avg", value=torch.zeros(5)),
            "optimizer must hold the state of Adam for .* parameters of these shapes",
        ),
        (
            set_in("model", "conv1.weight", value=torch.zeros(32, 1, 3, 3).double()),
            r"'conv1\.weight' must be a tensor \[32, 1, 3, 3\] float32, got .* float64",
        ),
        (set_in("optimizer", "param_groups", 0, "lr", value=5.0), "optimizer must hold the state"),
        (set_in("loader", "step", value=3), "step of loader must be 4 as of the run, got 3"),
        (set_in("loader", "seed", value=3), "seed of loader must be 0 as of the run, got 3"),
        (set_in("mixmatch", value={}), "mixmatch must hold .* 2 entries are missing"),
        (set_in("loader", "num_labelled", value=41), "num_labelled = 40 as here, got 41"),
    ],
)
def test_weights_of_another_network_leave_a_run_as_it_was(state, change, message):
    changed = copy.deepcopy(state)
    change(changed)
    run = TrainRun(CONFIG)
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(ValueError, match=message):
        run.load_state_dict(changed)
    assert run.step == run.loader.order.step == 0
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_checkpoint_of_another_torch_is_gone_on_with_a_warning(state):
    changed = {**state, "versions": {**state["versions"], "torch": "2.11.0"}}
    run = TrainRun(CONFIG)
    with pytest.warns(UserWarning, match=r"checkpoint is of torch 2\.11\.0 and this is"):
        run.load_state_dict(changed)
    assert run.step == 4


# What a run may go on with


def settings(config: TrainConfig) -> dict:
    return {**vars(resolved(config)), "world_size": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 40},
        {"eval_every": 1},
        {"num_workers": 7},
        {"root": "elsewhere"},
        {"device": "cuda"},
        {"loader": "dataloader"},
        {"lambda_u": resolved(CONFIG).lambda_u},
        {"builder": {"alpha": 0.75}},
    ],
)
def test_a_run_goes_on_under_what_gives_the_same_steps(changes):
    config = resumed(replace(CONFIG, **changes), settings(CONFIG), step=4)
    for name, value in changes.items():
        if name != "builder":
            assert getattr(config, name) == value
    for name in ("lr", "lambda_u", "rampup_steps", "ema_decay", "planned_steps", "builder"):
        assert getattr(config, name) == getattr(resolved(CONFIG), name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lambda_u": 10.0}, r"lambda_u: 3\.72\d* in the checkpoint, 10\.0 now"),
        ({"batch_size": 4}, "batch_size: 8 in the checkpoint, 4 now"),
        ({"rampup_steps": 9}, "rampup_steps: 2 in the checkpoint, 9 now"),
        ({"loader": "dali"}, "loader: 'resident' in the checkpoint, 'dali' now"),
        ({"supervised": True}, "supervised: False in the checkpoint, True now"),
        ({"builder": {"alpha": 0.5}}, r"builder: .*0\.75.* in the checkpoint, .*0\.5.* now"),
        ({"steps": 3}, "steps must be at least 4, which the checkpoint has taken, got 3"),
    ],
)
def test_a_run_does_not_go_on_under_what_gives_other_steps(changes, message):
    with pytest.raises(ValueError, match=message):
        resumed(replace(CONFIG, **changes), settings(CONFIG), step=4)


def test_a_longer_run_keeps_the_ramp_and_the_decay_of_the_first(tmp_path):
    train(CONFIG, tmp_path / "run")
    longer = replace(CONFIG, steps=8)
    train(longer, tmp_path / "run", resume=True)
    train(replace(longer, planned_steps=4), tmp_path / "straight")
    ends = [read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("run", "straight")]
    assert ends[0]["step"] == ends[1]["step"] == 8
    for name, value in ends[0]["ema"].items():
        assert torch.equal(value, ends[1]["ema"][name]), name
    with pytest.raises(ValueError, match="rampup_steps: 2 in the checkpoint, 4 now"):
        TrainRun(longer).load_state_dict(ends[0])


# Disks and folders


@pytest.fixture
def small_disk():
    """Lets no file grow beyond some kilobytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_names_file_and_disk_and_leaves_the_old_file(
    tmp_path, state, small_disk
):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"old")
    message = rf"^{path} cannot be written: File too large; its disk has \S+ of \S+ bytes free$"
    with pytest.raises(OSError, match=message):
        write_checkpoint(state, path)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_write_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace_file = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (calls.append("sync"), fsync(number))[1])
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("name"), replace_file(*names)))
    write_checkpoint({"step": 1}, tmp_path / "checkpoint.pt")
    assert calls == ["sync", "name", "sync"]  # the last one is the folder's


def test_checksums_are_written_whatever_torch_was_told(tmp_path, state):
    torch.serialization.set_crc32_options(False)
    try:
        write_checkpoint(state, tmp_path / "checkpoint.pt")
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    read_checkpoint(tmp_path / "checkpoint.pt")


def test_a_disk_too_full_for_a_run_is_told_before_its_first_step(tmp_path, monkeypatch):
    usage = SimpleNamespace(total=10**6, free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"disk with [\d,]+ bytes free, got 10,000 of 1,000,000"):
        train(CONFIG, tmp_path / "run", on_start=pytest.fail)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_to_is_told_before_the_data_are_loaded(
    tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setattr("gpu_mixmatch.recipes.train.load_dataset", pytest.fail)
    with pytest.raises(NotADirectoryError, match=r"got the file \S+/file in \S+/file/run"):
        train(CONFIG, tmp_path / "file" / "run")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(PermissionError, match=f"may be written to, got {tmp_path}"):
        check_writable(tmp_path / "a" / "b")


def test_state_is_checked_without_a_file(state):
    check_state(state)
    assert state["format"] == checkpoint.FORMAT
