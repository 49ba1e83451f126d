"""The training job: learns, logs, and resumes to the last bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gpu_mixmatch.data.datasets import load_dataset
from gpu_mixmatch.recipes.train import (
    Job,
    TrainConfig,
    parameter_digest,
    stream,
    train,
)

SHORT = TrainConfig(steps=6, eval_every=2, batch_size=8)

# train in a process of its own, slowly enough to be killed between any two steps
SLOW_RUN = """
import sys, time, warnings
from pathlib import Path
import torch
from gpu_mixmatch.recipes.train import TrainConfig, train
torch.set_num_threads(1)
config = TrainConfig(steps=40, eval_every=3, batch_size=16)
train(config, Path(sys.argv[1]), resume=True, on_step=lambda step, metrics: time.sleep(0.02))
"""


def digest_of(out: Path) -> str:
    job = Job(TrainConfig(steps=40, eval_every=3, batch_size=16))
    job.load_state_dict(torch.load(out / "checkpoint.pt", weights_only=True))
    return parameter_digest(job.model) + parameter_digest(job.ema)


def run_in_process(out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SLOW_RUN, str(out)])


@pytest.mark.slow
def test_run_killed_at_any_moment_resumes_to_the_last_bit(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_in_process(whole).wait(timeout=120) == 0

    kills = 0
    for pause in (0.3, 0.7, 0.05):  # seconds after a checkpoint appeared or moved on
        process = run_in_process(killed)
        checkpoint = killed / "checkpoint.pt"
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns > before:
                break
            time.sleep(0.005)
        time.sleep(pause)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait(timeout=60)
    assert kills >= 1
    assert run_in_process(killed).wait(timeout=120) == 0

    assert digest_of(killed) == digest_of(whole)
    lines = {}
    for out in (whole, killed):
        entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        lines[out] = [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]
    assert lines[killed] == lines[whole]


def test_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    assert train(SHORT, out, resume=True).error == train(SHORT).error


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    out = tmp_path / "run"
    first = train(SHORT, out)
    before = (out / "metrics.jsonl").read_bytes()
    assert train(SHORT, out, resume=True) == first
    assert (out / "metrics.jsonl").read_bytes() == before


def test_run_does_not_depend_on_global_generators():
    torch.manual_seed(1)
    first = Job(SHORT)
    torch.manual_seed(2)
    second = Job(SHORT)
    for job in (first, second):
        torch.rand(3)
        job.train_step()
    assert parameter_digest(first.model) == parameter_digest(second.model)


def test_run_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    train(SHORT)
    assert torch.equal(torch.rand(4), expected)


def test_other_seed_gives_other_weights():
    digests = {parameter_digest(Job(TrainConfig(seed=seed)).model) for seed in range(3)}
    assert len(digests) == 3


def test_existing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"out must be a folder that does not exist yet"):
        train(SHORT, tmp_path)


def test_checkpoint_of_another_configuration_is_refused(tmp_path):
    out = tmp_path / "run"
    train(SHORT, out)
    other = TrainConfig(steps=8, eval_every=2, batch_size=8, seed=3)
    with pytest.raises(ValueError, match=r"seed: 0 in the checkpoint, 3 now; steps: 6 in the"):
        train(other, out, resume=True)


@pytest.mark.parametrize("changes", [{"steps": 0}, {"batch_size": 0}, {"labels": 0}])
def test_config_out_of_range_is_refused(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        TrainConfig(**changes)


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"preset must be one of .*'paper'.* got 'best'"):
        TrainConfig(preset="best")


def test_run_writes_what_it_says(tmp_path):
    out = tmp_path / "run"
    summary = train(SHORT, out)
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [2, 4, 6]
    assert entries[-1]["error"] == summary.error
    assert {"loss", "loss_x", "loss_u", "weight_u", "seconds"} <= entries[0].keys()
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list(out.glob("events.out.tfevents.*"))
    assert json.loads((out / "config.json").read_text())["steps"] == 6
    assert not list(out.glob("*.partial"))


def test_tensorboard_events_hold_the_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    summary = train(SHORT, out)
    events = EventAccumulator(str(out)).Reload()
    errors = events.Scalars("error")
    assert [event.step for event in errors] == [2, 4, 6]
    assert errors[-1].value == pytest.approx(summary.error)


def test_weight_ramps_over_half_of_a_short_run(tmp_path):
    out = tmp_path / "run"
    train(TrainConfig(steps=8, eval_every=1, batch_size=8, lambda_u=4.0), out)
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [entry["weight_u"] for entry in entries] == [0, 1, 2, 3, 4, 4, 4, 4]


@pytest.mark.parametrize("preset", ["fast", "paper", "yu1ut", "usb"])
def test_every_preset_trains(preset):
    summary = train(TrainConfig(steps=2, batch_size=8, preset=preset, eval_every=1))
    assert 0 <= summary.error <= 100


def test_wide_resnet_trains():
    assert 0 <= train(TrainConfig(steps=1, batch_size=4, model="wrn-28-2")).error <= 100


def test_teacher_changes_the_guess_and_is_not_saved_twice():
    config = TrainConfig(steps=4, batch_size=8, ema_teacher=True, ema_decay=0.5)
    job, plain = Job(config), Job(TrainConfig(steps=4, batch_size=8, ema_decay=0.5))
    for each in (job, plain):
        for _ in range(4):
            each.train_step()
    assert job.mixmatch.teacher is job.ema
    assert set(job.mixmatch.state_dict()) == {"seed", "step"}
    assert parameter_digest(job.model) != parameter_digest(plain.model)


def test_decay_shrinks_kernels_only():
    # a learning rate of zero leaves the decay alone at work
    job = Job(TrainConfig(steps=1, batch_size=8, supervised=True, lr=0.0))
    before = {name: value.detach().clone() for name, value in job.model.named_parameters()}
    kernels = {id(kernel) for kernel in job.kernels}
    job.train_step()
    for name, value in job.model.named_parameters():
        factor = 1 - 4e-5 if id(value) in kernels else 1.0
        torch.testing.assert_close(value.detach(), before[name] * factor, rtol=1e-7, atol=0)


def test_usb_decays_kernels_through_the_gradient():
    job = Job(TrainConfig(steps=1, batch_size=8, preset="usb"))
    decays = {
        id(parameter): group["weight_decay"]
        for group in job.optimizer.param_groups
        for parameter in group["params"]
    }
    kernels = {id(kernel) for kernel in job.kernels}
    assert len(decays) == len(list(job.model.parameters()))
    assert all(decay == (5e-4 if key in kernels else 0.0) for key, decay in decays.items())


def test_stream_is_cut_from_whole_epochs():
    batches = torch.cat([stream(0, step, 10, 4, view=1) for step in range(5)])
    assert sorted(batches[:10].tolist()) == list(range(10))
    assert sorted(batches[10:].tolist()) == list(range(10))
    assert batches[:10].tolist() != batches[10:].tolist()


def test_stream_serves_batches_longer_than_an_epoch():
    batch = stream(0, 3, 4, 10, view=0)
    assert len(batch) == 10
    assert torch.bincount(batch, minlength=4).min() >= 2


@pytest.mark.slow
def test_mixmatch_beats_supervised_training_by_far():
    data = load_dataset("digits")
    errors = {
        supervised: train(TrainConfig(supervised=supervised), data=data).error
        for supervised in (True, False)
    }
    assert errors[False] <= 0.4 * errors[True]


def test_checkpoint_survives_a_failing_write(tmp_path, monkeypatch):
    out = tmp_path / "run"
    train(SHORT, out)
    before = (out / "checkpoint.pt").read_bytes()

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    from gpu_mixmatch.recipes.train import MetricsLog

    job = Job(SHORT)
    with pytest.raises(OSError, match="disk full"):
        MetricsLog(out, job)
    assert (out / "checkpoint.pt").read_bytes() == before
