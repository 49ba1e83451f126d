"""A training run learns, logs, and resumes to the last bit."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import update_bn

from gpu_mixmatch import DaliAugment, KorniaAugment, RandAugment, WeakAugment
from gpu_mixmatch.data.datasets import load_dataset
from gpu_mixmatch.data.formats.common import ImageData
from gpu_mixmatch.insight import GuessWatch
from gpu_mixmatch.recipes import train as recipe
from gpu_mixmatch.recipes.checkpoint import read_checkpoint, write_checkpoint
from gpu_mixmatch.recipes.choices import (
    AUGMENTS,
    LOADERS,
    METHODS,
    PRESET_NAMES,
    make_augment,
    make_strong,
)
from gpu_mixmatch.recipes.models import SmallCNN, build_model, wideresnet28
from gpu_mixmatch.recipes.train import DivergenceError, TrainConfig, TrainRun, resolved, train
from tests import pillow
from tests.digest import parameter_digest
from tests.image_files import write_parts

SHORT = TrainConfig(steps=6, eval_every=2, batch_size=8)

# train in a process of its own, slowly enough to be killed between any two steps
SLOW_RUN = """
import json, sys, time
from pathlib import Path
import torch
from gpu_mixmatch.recipes.train import TrainConfig, train
torch.set_num_threads(1)
config = TrainConfig(**json.loads(sys.argv[2]))
train(config, Path(sys.argv[1]), resume=True, on_step=lambda step, metrics: time.sleep(0.02))
"""
SLOW = {"steps": 24, "eval_every": 3, "batch_size": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("folder"), labelled=4, unlabelled=8, test=3)


def of_folder(root: Path, **fields) -> TrainConfig:
    fields = {"steps": 6, "eval_every": 2, "batch_size": 8, "labels": None, **fields}
    return TrainConfig(dataset="folder", root=str(root), size=16, **fields)


def take_steps(run: TrainRun, count: int) -> TrainRun:
    for batch in islice(run.loader, count):
        run.train_step(batch)
    return run


def digest(run: TrainRun) -> str:
    return parameter_digest(run.model) + parameter_digest(run.ema)


def digest_of(out: Path, **fields) -> str:
    run = TrainRun(TrainConfig(**fields))
    run.load_state_dict(torch.load(out / "checkpoint.pt", weights_only=True))
    return digest(run)


def run_in_process(out: Path, **fields) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SLOW_RUN, str(out), json.dumps(fields)])


def kill_and_resume(out: Path, pauses: tuple[float, ...], **fields) -> int:
    """Kill a run so many seconds after a checkpoint appeared or moved on; then let it end."""
    kills = 0
    for pause in pauses:
        process = run_in_process(out, **fields)
        checkpoint = out / "checkpoint.pt"
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
    train(TrainConfig(**fields), out, resume=True)
    return kills


# after a few steps on 12 tiles
@pytest.mark.filterwarnings("ignore:step .* guesses are .* sure:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "loader", "augment", "pauses"),
    [
        ("mixmatch", "resident", "weak", (0.2, 0.05)),
        ("mixmatch", "dataloader", "kornia", (0.1,)),
        ("mixmatch", "dali", "dali", (0.1,)),
        ("freematch", "resident", "weak", (0.1,)),
        ("flexmatch", "resident", "weak", (0.1,)),
    ],
)
def test_run_killed_at_any_moment_resumes_to_the_last_bit(
    tmp_path, folder, method, loader, augment, pauses
):
    fields = {**SLOW, "method": method, "loader": loader, "augment": augment}
    if loader != "resident":
        fields |= {"dataset": "folder", "root": str(folder), "size": 16, "labels": None}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(TrainConfig(**fields), whole)
    assert kill_and_resume(killed, pauses, **fields) >= 1

    assert digest_of(killed, **fields) == digest_of(whole, **fields)
    lines = {}
    for out in (whole, killed):
        entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        lines[out] = [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]
    assert lines[killed] == lines[whole]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("supervised", [False, True])
def test_every_loader_and_engine_resumes_to_the_last_bit(folder, loader, augment, supervised):
    config = of_folder(folder, loader=loader, augment=augment, supervised=supervised, num_workers=0)
    whole = take_steps(TrainRun(config), 4)
    first, second = take_steps(TrainRun(config), 2), TrainRun(config)
    state = first.state_dict()
    second.load_state_dict(state)
    assert state["loader"].items() >= {"seed": 0, "step": 2}.items()
    assert digest(take_steps(second, 2)) == digest(whole)


def labelling(run: TrainRun) -> dict[str, torch.Tensor]:
    """What the builder has learnt of its guesses."""
    return {name: value.clone() for name, value in run.builder.state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_to_the_last_bit_with_what_it_has_learnt(tmp_path, method):
    config = replace(SHORT, method=method)
    if method == "flexmatch":  # so that a few steps have confident guesses
        config = replace(config, builder={"threshold": 0.2})
    whole = take_steps(TrainRun(config), 6)
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(take_steps(TrainRun(config), 4).state_dict(), path)
    state = read_checkpoint(path)
    run = TrainRun(config)
    run.load_state_dict(state)
    assert digest(take_steps(run, 2)) == digest(whole)
    learnt, begun = labelling(whole), labelling(TrainRun(config))
    assert learnt.keys() == begun.keys()
    assert all(torch.equal(value, learnt[name]) for name, value in labelling(run).items())
    moved = {name for name, value in learnt.items() if not torch.equal(value, begun[name])}
    assert moved == {
        "step",
        *{
            "softmatch": {"threshold.averages"},
            "freematch": {"threshold.averages"},
            "flexmatch": {"threshold.classes"},
            "remixmatch": {"alignment.guesses", "alignment.labels"},
        }.get(method, set()),
    }


def test_what_a_method_has_learnt_must_fit_the_checkpoint():
    state = TrainRun(replace(SHORT, method="flexmatch")).state_dict()
    state["mixmatch"]["threshold.classes"] = torch.zeros(5, dtype=torch.int16)
    with pytest.raises(ValueError, match=r"mixmatch must hold .*'threshold\.classes' must be"):
        TrainRun(replace(SHORT, method="flexmatch")).load_state_dict(state)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_and_says_what_it_keeps(method):
    summary = train(replace(SHORT, method=method))
    last = summary.metrics[-1]
    assert [entry["step"] for entry in summary.metrics] == [2, 4, 6]
    assert last["error"] == summary.error
    assert 0.1 <= summary.confidence <= 1
    weighs = method not in ("mixmatch", "remixmatch")
    assert ("kept" in last) is ("mean_weight" in last) is weighs
    if weighs:
        assert 0 <= last["mean_weight"] <= last["kept"] <= 1


@pytest.mark.parametrize("method", METHODS)
def test_methods_guess_as_their_references_do_and_may_be_told_otherwise(method):
    first = {"mixmatch", "remixmatch", "mean_teacher", "ict", "pi_model"}
    config = resolved(TrainConfig(method=method))
    assert config.guess == ("first" if method in first else "loss")
    if method in first - {"pi_model"}:
        with pytest.raises(ValueError, match=f"guess must be 'first' for the method {method}, .*"):
            TrainRun(TrainConfig(method=method, guess="loss"))
        return
    runs = [TrainRun(replace(SHORT, method=method, guess=guess)) for guess in ("first", "loss")]
    rows = []
    for run in runs:
        run.model.register_forward_pre_hook(lambda _, images: rows.append(len(images[0])))
        take_steps(run, 1)
    ratio = runs[0].config.ratio
    # x, strong and weak views: the weak ones before, or with the others
    assert rows == [8 * ratio, 8 * (1 + ratio), 8 * (1 + 2 * ratio)]


def test_a_teacher_is_the_average_of_the_model():
    for method in ("mean_teacher", "ict"):
        run = TrainRun(replace(SHORT, method=method))
        assert run.builder.teacher is run.ema
        assert set(run.builder.state_dict()) == {"seed", "step"}
    assert TrainRun(replace(SHORT, method="pi_model")).builder.teacher is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"method": "fixmatch"}, {"ratio": 2, "lambda_u": 1.0, "rampup_steps": 0, "lr": 0.002}),
        ({"method": "fixmatch", "ratio": 5}, {"ratio": 5}),
        ({"method": "fixmatch", "preset": "paper"}, {"ratio": 7, "lr": 0.03, "ema_decay": 0.98}),
        ({"method": "softmatch"}, {"builder": {"momentum": 0.98}}),
        ({"method": "softmatch", "steps": 20_000}, {"builder": {"momentum": 0.999}}),
        ({"method": "softmatch", "builder": {"momentum": 0.5}}, {"builder": {"momentum": 0.5}}),
        ({"method": "mean_teacher", "steps": 4096}, {"lambda_u": 25.0, "rampup_steps": 2048}),
        ({"method": "ict", "steps": 512}, {"lambda_u": 12.5, "rampup_steps": 256, "ratio": 1}),
        ({"method": "remixmatch"}, {"lambda_u": 1.5, "rampup_steps": 250, "ratio": 1}),
        ({}, {"ratio": 1, "rampup_steps": 250}),
    ],
)
def test_numbers_of_a_method_are_its_papers_or_follow_the_length_of_the_run(fields, expected):
    config = resolved(TrainConfig(**{"steps": 500, **fields}))
    for name, value in expected.items():
        wanted = value if isinstance(value, dict) else pytest.approx(value, rel=1e-4)
        assert getattr(config, name) == wanted, name


def test_remixmatch_has_a_short_window_and_few_views_in_a_short_run():
    builder = TrainRun(TrainConfig(steps=500, method="remixmatch")).builder
    assert (builder.num_strong, builder.alignment.window, builder.rotation) == (2, 50, False)
    builder = TrainRun(TrainConfig(steps=5000, method="remixmatch", preset="paper")).builder
    assert (builder.num_strong, builder.alignment.window) == (8, 128)


def test_strong_views_are_of_the_preset_and_fit_small_images():
    for preset, factory in (("fast", "fixmatch"), ("paper", "usb")):
        run = TrainRun(TrainConfig(method="softmatch", preset=preset))
        expected = make_strong(run.weak, 8, 8, factory, 1).chain
        assert run.builder.strong.chain == expected
        assert run.builder.strong.weak is run.weak


def test_learning_rate_of_a_papers_run_falls_and_is_resumed():
    config = TrainConfig(steps=6, batch_size=8, method="fixmatch", preset="paper", ratio=1)
    run = TrainRun(config)
    rates = []
    for batch in islice(run.loader, 3):
        rates += {group["lr"] for group in run.optimizer.param_groups}
        run.train_step(batch)
    angles = [7 / 16 * math.pi * step / 6 for step in range(3)]
    assert rates == pytest.approx([0.03 * math.cos(angle) for angle in angles])
    again = TrainRun(config)
    again.load_state_dict(run.state_dict())
    assert digest(take_steps(again, 3)) == digest(take_steps(TrainRun(config), 6))


def test_a_checkpoint_from_before_there_were_methods_goes_on():
    state = TrainRun(SHORT).state_dict()
    for name in ("method", "ratio", "guess"):
        del state["config"][name]
    run = TrainRun(SHORT)
    run.load_state_dict(state)
    other = TrainRun(replace(SHORT, method="fixmatch"))
    with pytest.raises(ValueError, match=r"method: 'mixmatch' in the checkpoint, 'fixmatch' now"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "vat"}, r"method must be one of \['mixmatch', .*\], got 'vat'"),
        ({"guess": "never"}, r"guess must be one of \['first', 'loss', None\], got 'never'"),
        ({"ratio": 0}, r"ratio must be at least 1, got 0"),
        ({"method": "uda", "preset": "yu1ut"}, r"preset must be 'fast' or 'paper' for .* uda, got"),
        ({"method": "uda", "augment": "strong"}, r"augment must be 'weak', 'kornia' or 'dali' for"),
    ],
)
def test_a_method_refuses_what_does_not_fit_it(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainRun(TrainConfig(**fields))


def test_batches_in_memory_and_from_workers_train_alike(folder):
    for config in (SHORT, of_folder(folder)):
        runs = [
            take_steps(TrainRun(replace(config, loader=loader, num_workers=workers)), 3)
            for loader, workers in (("resident", 0), ("dataloader", 0), ("dataloader", 2))
        ]
        assert len({digest(run) for run in runs}) == 1


def test_dali_takes_the_files_that_the_others_take(folder):
    batches = [
        next(iter(TrainRun(of_folder(folder, loader=loader, num_workers=0)).loader))
        for loader in ("dali", "dataloader")
    ]
    by_dali, by_pil = batches
    for name in ("y", "ids_x", "ids_u"):
        assert torch.equal(getattr(by_dali, name), getattr(by_pil, name))
    for mine, theirs in ((by_dali.x, by_pil.x), (by_dali.u, by_pil.u)):
        assert mine.shape == theirs.shape == (8, 3, 16, 16)
        assert (mine.float() - theirs.float()).abs().mean() < 3  # grey levels


def test_dali_engine_trains_as_the_weak_one(folder):
    # the views are equal to rounding, which a few steps of Adam magnify
    runs = [take_steps(TrainRun(of_folder(folder, augment=name)), 2) for name in ("weak", "dali")]
    weak, dali = (run.model.state_dict() for run in runs)
    for name, value in weak.items():
        torch.testing.assert_close(dali[name], value, rtol=1e-2, atol=1e-3)


def test_engines_have_the_policy_of_the_preset():
    weak = WeakAugment(padding=3, padding_mode="zeros", flip=0.25, mean=0.4, std=0.2)
    assert make_augment("weak", weak, 8, 8) is weak
    dali = make_augment("dali", weak, 8, 8)
    assert isinstance(dali, DaliAugment)
    assert dali.weak is weak
    kornia = make_augment("kornia", weak, 8, 8)
    assert isinstance(kornia, KorniaAugment)
    assert (kornia.mean, kornia.std) == (weak.mean, weak.std)
    # all that shifts of up to 3 px with black borders and mirror images can give, and no more
    image = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8)
    padded = torch.nn.functional.pad(image, (3, 3, 3, 3)) / 255
    shifted = padded.unfold(2, 8, 1).unfold(3, 8, 1).reshape(49, 64)
    mirrored = shifted.view(49, 8, 8).flip(2).reshape(49, 64)
    views = kornia.build(image.expand(4000, -1, -1, -1), image[:0], 5, 0) * 0.2 + 0.4
    nearest = torch.cdist(views.view(4000, 64), torch.cat([shifted, mirrored])).min(dim=1)
    assert nearest.values.max() < 1e-3
    counts = torch.bincount(nearest.indices, minlength=98)
    assert counts[:49].min() > 30  # about 61 are expected
    assert counts[49:].sum() / 4000 == pytest.approx(0.25, abs=0.03)


def test_a_strong_engine_is_fixmatchs_and_shrinks_with_images_below_its_32_pixels():
    weak = WeakAugment(padding=0, flip=0.0, mean=0.0, std=1.0)
    for size in ((32, 32), (33, 96)):
        strong = make_augment("strong", weak, *size)
        assert strong.weak is weak
        assert strong.chain == RandAugment.fixmatch().chain
    images = torch.full((3000, 1, 8, 12), 200, dtype=torch.uint8)
    strong = make_augment("strong", weak, 8, 12)
    hidden = RandAugment(weak, 0, cutout=strong.chain.cutout)(images) == 0
    assert int(hidden.flatten(1).sum(1).max()) == 4 * 4
    moved = {op.name: op.magnitudes for op in strong.chain.ops if op.name.startswith("translate")}
    assert set(moved) == {"translate_x_rel", "translate_y_rel"}
    for (name, magnitudes), axis in zip(moved.items(), (2, 1), strict=True):
        views = RandAugment(weak, 1, {name: magnitudes}, prob=1.0, cutout=0, outside="black")(
            images
        )
        kept = (views[:, 0] > 0).any(3 - axis).sum(1)
        side = images.shape[axis + 1]
        assert int(kept.min()) == side - side * 9 // 32
        assert int(kept.max()) == side
    # and what it does at its own size is what it does in shares of it
    ops = strong.chain.ops
    shares = RandAugment.fixmatch(weak, ops={op.name: op.magnitudes for op in ops})
    pictures = torch.from_numpy(pillow.pictures(100, 32, 32, 3, 0)).permute(0, 3, 1, 2)
    assert torch.equal(shares(pictures), RandAugment.fixmatch(weak)(pictures))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_strong_engine_takes_the_smallest_images(size):
    weak = WeakAugment(padding=0, layout="NCHW")
    images = torch.arange(4 * size * size, dtype=torch.uint8).view(4, 1, size, size)
    assert make_augment("strong", weak, size, size)(images).shape == images.shape


def test_evaluation_sees_images_as_without_operations():
    weak, strong = (TrainRun(replace(SHORT, augment=name)) for name in ("weak", "strong"))
    assert isinstance(strong.augment, RandAugment)
    images = weak.test_images[:5]
    assert torch.equal(strong.normalize(images), weak.normalize(images))
    assert strong.test_error() == weak.test_error()
    assert weak.state_dict()["normalisation"] == strong.state_dict()["normalisation"]


@pytest.mark.parametrize(("size", "padding"), [(32, 4), (96, 12), (7, 0)])
def test_images_of_a_folder_shift_by_an_eighth(folder, size, padding):
    run = TrainRun(replace(of_folder(folder), size=size))
    assert run.augment.padding == padding
    assert run.augment.flip == 0.5


def test_dali_refuses_images_in_memory():
    with pytest.raises(ValueError, match=r"loader must be 'resident' or 'dataloader' for images"):
        TrainRun(TrainConfig(loader="dali"))


def test_folder_without_test_images_is_tested_on_the_labelled_ones(tmp_path, folder):
    root = tmp_path / "folder"
    root.mkdir()
    for part in ("labelled", "unlabelled"):
        (root / part).symlink_to(folder / part)
    run = TrainRun(of_folder(root))
    assert run.tested_on == "labelled"
    assert torch.equal(run.test_images, load_dataset("folder", root, 16).labelled.load())
    assert TrainRun(of_folder(folder)).tested_on == "test"


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
    first = TrainRun(SHORT)
    torch.manual_seed(2)
    second = TrainRun(SHORT)
    for run in (first, second):
        torch.rand(3)
        take_steps(run, 1)
    assert parameter_digest(first.model) == parameter_digest(second.model)


def test_run_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    train(SHORT)
    assert torch.equal(torch.rand(4), expected)


def test_other_seed_gives_other_weights():
    digests = {parameter_digest(TrainRun(TrainConfig(seed=seed)).model) for seed in range(3)}
    assert len(digests) == 3


def test_existing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"out must be a folder that does not exist yet"):
        train(SHORT, tmp_path)


def test_checkpoint_of_another_configuration_is_refused(tmp_path):
    out = tmp_path / "run"
    train(SHORT, out)
    other = replace(SHORT, seed=3, batch_size=4)
    message = r"got batch_size: 8 in the checkpoint, 4 now; seed: 0 in the checkpoint, 3 now$"
    with pytest.raises(ValueError, match=message):
        train(other, out, resume=True)


@pytest.mark.parametrize("name", ["steps", "batch_size", "labels", "size", "filters"])
def test_number_out_of_range_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        TrainConfig(**{name: 0})


@pytest.mark.parametrize(
    ("name", "choice"), [("preset", "paper"), ("augment", "kornia"), ("loader", "resident")]
)
def test_unknown_choice_is_refused(name, choice):
    with pytest.raises(ValueError, match=rf"{name} must be one of .*'{choice}'.* got 'best'"):
        TrainConfig(**{name: "best"})


def test_run_writes_metrics_events_curves_and_its_configuration(tmp_path):
    out = tmp_path / "run"
    summary = train(SHORT, out)
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [2, 4, 6]
    assert entries[-1]["error"] == summary.error
    assert {"loss", "loss_x", "loss_u", "weight_u", "seconds"} <= entries[0].keys()
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list(out.glob("events.out.tfevents.*"))
    config = json.loads((out / "config.json").read_text())
    assert config == {**asdict(resolved(SHORT)), "num_parameters": 56_554}
    assert config["lambda_u"] == pytest.approx(75 * (6 / 32_768) ** (1 / 3))
    assert (config["rampup_steps"], config["ema_decay"]) == (3, 0.0)
    assert not list(out.glob("*.partial"))


WATCHED = TrainConfig(steps=40, batch_size=16, eval_every=10)


def test_run_that_is_surer_than_right_on_test_images_warns_once_in_its_second_half():
    data = load_dataset("digits")
    wrong = data._replace(test_labels=(data.test_labels + 5) % 10)
    text = (
        r"step \d+: guesses are 0\.\d\d sure .* gets 0\.\d\d of the test images right: .*losing\.md"
    )
    with pytest.warns(UserWarning, match=text) as caught:
        summary = train(WATCHED, data=wrong)
    assert len(caught) == 1
    assert int(str(caught[0].message).split(":")[0].split()[1]) >= 20
    assert caught[0].filename == __file__
    assert summary.confidence > 1 - summary.error / 100 + 0.1
    right = train(WATCHED, data=data)  # a warning would be an error
    assert right.confidence == summary.confidence  # what is tested on does not move the weights


@pytest.mark.parametrize(
    ("step", "confidence", "tested_on", "warns"),
    [
        (40, 0.81, "test", True),
        (20, 0.81, "test", True),
        (19, 0.81, "test", False),
        (40, 0.79, "test", False),
        (40, 0.81, "labelled", False),  # trained on
        (40, None, "test", False),
    ],
)
def test_gap_of_more_than_a_tenth_on_held_images_is_warned_of(step, confidence, tested_on, warns):
    run = TrainRun(WATCHED)  # 500 test images
    run.tested_on = tested_on
    run.metrics = [{"step": step, "error": 30.0}]
    if confidence is not None:
        run.metrics[0]["confidence"] = confidence
    assert bool(run.overconfidence()) is warns


@pytest.mark.parametrize(("count", "warns"), [(15, False), (40, False), (80, True), (500, True)])
def test_gap_that_chance_explains_on_few_test_images_is_not_warned_of(count, warns):
    data = load_dataset("digits")
    few = {"test_images": data.test_images[:count], "test_labels": data.test_labels[:count]}
    run = TrainRun(WATCHED, data._replace(**few))
    run.metrics = [{"step": 40, "error": 40.0, "confidence": 0.72}]
    assert bool(run.overconfidence()) is warns


def test_confidence_is_that_of_the_guesses_since_the_last_evaluation(tmp_path):
    out = tmp_path / "run"
    summary = train(SHORT, out)
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    run = TrainRun(SHORT)
    watch = GuessWatch(run.builder)
    for entry in entries:
        take_steps(run, 2)
        assert entry["confidence"] == pytest.approx(watch.read().confidence)
    assert summary.confidence == entries[-1]["confidence"]


def test_watching_the_guesses_does_not_move_the_weights():
    watched, plain = TrainRun(SHORT), TrainRun(SHORT)
    plain.watch.close()
    assert digest(take_steps(watched, 3)) == digest(take_steps(plain, 3))
    assert watched.confidence()
    assert not plain.confidence()


def test_supervised_run_has_no_confidence(tmp_path):
    out = tmp_path / "run"
    assert train(replace(SHORT, supervised=True), out).confidence is None
    assert "confidence" not in (out / "metrics.jsonl").read_text()


def test_tensorboard_events_hold_the_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    summary = train(SHORT, out)
    events = EventAccumulator(str(out)).Reload()
    errors = events.Scalars("error")
    assert [event.step for event in errors] == [2, 4, 6]
    assert errors[-1].value == pytest.approx(summary.error)
    assert events.Scalars("confidence")[-1].value == pytest.approx(summary.confidence)


def test_weight_ramps_over_half_of_a_short_run(tmp_path):
    out = tmp_path / "run"
    train(TrainConfig(steps=8, eval_every=1, batch_size=8, lambda_u=4.0), out)
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [entry["weight_u"] for entry in entries] == [0, 1, 2, 3, 4, 4, 4, 4]


@pytest.mark.parametrize(
    ("fields", "lambda_u", "rampup_steps"),
    [
        ({"steps": 512}, 75 / 4, 256),
        ({"steps": 4096}, 75 / 2, 2048),
        ({"steps": 32_767}, 75.0, 16_383),
        ({"steps": 32_768}, 75.0, 16_384),
        ({"steps": 1_048_576}, 75.0, 16_384),
        ({"steps": 512, "preset": "usb"}, 100 / 4, 256),
        ({"steps": 512, "lambda_u": 75.0}, 75.0, 256),
        ({"steps": 512, "rampup_steps": 0}, 75 / 4, 0),
        ({"steps": 4096, "planned_steps": 512}, 75 / 4, 256),
    ],
)
def test_weight_of_the_unlabelled_loss_follows_the_length_of_the_run(
    fields, lambda_u, rampup_steps
):
    criterion = TrainRun(TrainConfig(**fields)).criterion
    assert criterion.lambda_u == pytest.approx(lambda_u, rel=1e-4)
    assert criterion.rampup_steps == rampup_steps


@pytest.mark.parametrize(
    ("preset", "model"), [*((name, "cnn") for name in PRESET_NAMES), ("paper", "wrn-28-2")]
)
def test_a_step_of_every_preset_moves_every_kernel(preset, model):
    run = TrainRun(TrainConfig(steps=1, batch_size=4, preset=preset, model=model))
    before = [kernel.detach().clone() for kernel in run.kernels]
    take_steps(run, 1)
    assert all(kernel.isfinite().all() for kernel in run.kernels)
    assert not any(torch.equal(*pair) for pair in zip(run.kernels, before, strict=True))


def images_of(dataset: str, num_classes: int, channels: int = 3) -> ImageData:
    """An image of each class to train on, and one to test on."""
    images = torch.zeros(num_classes, channels, 32, 32, dtype=torch.uint8)
    labels = torch.arange(num_classes)
    return ImageData(images, labels, images[:1], labels[:1], num_classes, dataset)


def num_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("preset", "dataset", "num_classes", "filters"),
    [
        ("paper", "cifar100", 100, 135),
        ("fast", "cifar100", 100, 135),
        ("yu1ut", "cifar100", 100, 32),
        ("usb", "cifar100", 100, 32),
        ("paper", "cifar10", 10, 32),
        ("fast", "fashion-mnist", 10, 32),
        ("paper", "folder", 3, 32),
    ],
)
def test_wide_resnet_is_as_wide_as_the_preset_has_it(preset, dataset, num_classes, filters):
    config = TrainConfig(dataset=dataset, labels=None, model="wrn-28-2", preset=preset)
    run = TrainRun(config, images_of(dataset, num_classes))
    with torch.device("meta"):
        expected = wideresnet28(num_classes, filters=filters)
    assert num_parameters(run.model) == num_parameters(expected)
    assert run.description()["filters"] == filters
    assert run.description()["num_parameters"] == num_parameters(expected)


@pytest.mark.parametrize("preset", ["fast", "usb"])
@pytest.mark.parametrize("model", ["wrn-28-2", "cnn"])
def test_filters_of_the_config_replace_those_of_the_preset(preset, model):
    config = TrainConfig("cifar100", labels=None, model=model, preset=preset, filters=4)
    run = TrainRun(config, images_of("cifar100", 100))
    assert num_parameters(run.model) == num_parameters(build_model(model, 100, 3, 4))
    assert run.description()["filters"] == 4


@pytest.mark.parametrize(
    ("model", "steps", "planned", "momentum"),
    [
        ("wrn-28-2", 1, None, 1.0),
        ("wrn-28-2", 150, None, 10 / 150),
        ("wrn-28-2", 10_000, None, 0.001),
        ("wrn-28-2", 20_000, None, 0.001),
        ("wrn-28-2", 20_000, 150, 10 / 150),  # resumed with more steps
        ("cnn", 50, None, 0.2),
        ("cnn", 150, None, 0.1),
    ],
)
def test_batch_norm_of_a_run_moves_as_fast_as_its_length_asks(model, steps, planned, momentum):
    run = TrainRun(TrainConfig(model=model, filters=2, steps=steps, planned_steps=planned))
    norms = [module for module in run.model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {momentum}
    assert len(norms) == (25 if model == "wrn-28-2" else 3)


def test_short_run_is_evaluated_with_statistics_that_it_has_filled(monkeypatch):
    data = load_dataset("digits")
    fields = {"model": "wrn-28-2", "filters": 8, "steps": 40, "lr": 0.01}
    config = TrainConfig(labels=400, supervised=True, **fields)
    run = take_steps(TrainRun(config, data), 40)
    error = run.test_error()
    update_bn([run.normalize(images) for images in data.train_images.split(64)], run.ema)
    assert error == pytest.approx(run.test_error(), abs=1.5)

    monkeypatch.setattr(recipe, "fill_statistics_in", lambda model, steps: None)
    papers = take_steps(TrainRun(config, data), 40)
    assert papers.test_error() > error + 50


def test_small_cnn_is_the_same_under_every_preset():
    for preset in PRESET_NAMES:
        run = TrainRun(
            TrainConfig("cifar100", labels=None, preset=preset), images_of("cifar100", 100)
        )
        assert num_parameters(run.model) == num_parameters(SmallCNN(100, in_channels=3))
        assert run.description()["filters"] is None


def copy_of(folder: Path, root: Path) -> Path:
    return Path(shutil.copytree(folder, root))


def one_more_file(root: Path) -> None:
    shutil.copy(root / "unlabelled/cat/005.jpg", root / "unlabelled/cat/000a.jpg")


def one_less_label(root: Path) -> None:
    (root / "labelled/cat/003.jpg").unlink()


def another_class(root: Path) -> None:
    for part in ("labelled", "test"):
        (root / part / "cat").rename(root / part / "cats")


def another_name(root: Path) -> None:
    (root / "unlabelled/cat/000.jpg").rename(root / "unlabelled/cat/008.jpg")


def labels_exchanged(root: Path) -> None:
    for one, other in (("cat/000.jpg", "china/009.jpg"), ("china/000.jpg", "cat/009.jpg")):
        (root / "labelled" / one).rename(root / "labelled" / other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_more_file, r"num_unlabelled: 24 in the checkpoint, 25 now$"),
        (one_less_label, r"num_labelled: 12 in the checkpoint, 11 now$"),
        (another_class, r"classes: \['cat'\] in the checkpoint, \['cats'\] now; the labelled part"),
        (another_name, r"got the unlabelled part has other names or labels of files, or another"),
        (labels_exchanged, r"got the labelled part has other names or labels of files, or another"),
    ],
)
def test_a_run_goes_on_with_the_files_that_it_began_with_and_no_others(
    tmp_path, folder, change, message
):
    before = copy_of(folder, tmp_path / "before")
    state = TrainRun(of_folder(before)).state_dict()
    assert state["data"]["classes"] == ["astronaut", "cat", "china"]
    moved = copy_of(before, tmp_path / "moved")
    TrainRun(of_folder(moved)).load_state_dict(state)
    change(moved)
    run = TrainRun(of_folder(moved))
    with pytest.raises(ValueError, match=f"^the data must be those that .*{message}"):
        run.load_state_dict(state)
    assert run.step == 0


def test_a_run_goes_on_with_the_images_that_it_began_with_and_no_others():
    data = images_of("cifar10", 10)
    config = TrainConfig("cifar10", labels=None)
    state = TrainRun(config, data).state_dict()
    changed = data.train_images.clone()
    changed[3, 0, 0, 0] = 1
    run = TrainRun(config, data._replace(train_images=changed))
    with pytest.raises(ValueError, match=r"the labelled part has other images, .*; the unlabel"):
        run.load_state_dict(state)


def test_a_run_whose_weights_are_not_finite_ends_and_leaves_its_last_checkpoint(
    tmp_path, monkeypatch
):
    out, step = tmp_path / "run", TrainRun.train_step

    def train_step(run, batch):
        losses = step(run, batch)
        if run.step == 3:  # the losses of this step are finite still
            run.kernels[0].data[0] = torch.inf
        return losses if run.step < 4 else {name: torch.ones(()) for name in losses}

    monkeypatch.setattr(TrainRun, "train_step", train_step)
    with pytest.raises(DivergenceError, match=f"at step 4 .*checkpoint of step 2 is in {out}") as e:
        train(SHORT, out)
    assert (e.value.step, e.value.values["loss"]) == (4, 1.0)
    state = read_checkpoint(out / "checkpoint.pt")
    assert [entry["step"] for entry in state["metrics"]] == [2]
    with pytest.raises(DivergenceError, match="Nothing was written"):
        train(SHORT)


def test_numbers_of_a_configuration_are_pythons_own():
    config = TrainConfig(steps=np.int64(3), lambda_u=np.float32(0.5), seed=np.uint8(2))
    assert [type(value) for value in (config.steps, config.lambda_u, config.seed)] == [
        int,
        float,
        int,
    ]


@pytest.mark.parametrize(
    ("field", "error", "message"),
    [
        ({"steps": 1.5}, TypeError, "steps must be an integer, got 1.5"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"lr": torch.inf}, ValueError, "lr must be at least 0 and finite, got inf"),
        ({"ema_decay": 1.0}, ValueError, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"supervised": 1}, TypeError, "supervised must be True or False, got 1"),
    ],
)
def test_a_configuration_refuses_numbers_that_none_is_meant_by(field, error, message):
    with pytest.raises(error, match=message):
        TrainConfig(**field)


def test_teacher_changes_the_guess_and_is_not_saved_twice():
    config = TrainConfig(steps=4, batch_size=8, ema_teacher=True, ema_decay=0.5)
    run, plain = TrainRun(config), TrainRun(TrainConfig(steps=4, batch_size=8, ema_decay=0.5))
    for each in (run, plain):
        take_steps(each, 4)
    assert run.builder.teacher is run.ema
    assert set(run.builder.state_dict()) == {"seed", "step"}
    assert parameter_digest(run.model) != parameter_digest(plain.model)


def test_decay_shrinks_kernels_only():
    # a learning rate of zero leaves the decay alone at work
    run = TrainRun(TrainConfig(steps=1, batch_size=8, supervised=True, lr=0.0))
    before = {name: value.detach().clone() for name, value in run.model.named_parameters()}
    kernels = {id(kernel) for kernel in run.kernels}
    take_steps(run, 1)
    for name, value in run.model.named_parameters():
        factor = 1 - 4e-5 if id(value) in kernels else 1.0
        torch.testing.assert_close(value.detach(), before[name] * factor, rtol=1e-7, atol=0)


def test_usb_decays_kernels_through_the_gradient():
    run = TrainRun(TrainConfig(steps=1, batch_size=8, preset="usb"))
    decays = {
        id(parameter): group["weight_decay"]
        for group in run.optimizer.param_groups
        for parameter in group["params"]
    }
    kernels = {id(kernel) for kernel in run.kernels}
    assert len(decays) == len(list(run.model.parameters()))
    assert all(decay == (5e-4 if key in kernels else 0.0) for key, decay in decays.items())


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
        raise OSError("the disk has gone")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match=r"checkpoint\.pt cannot be written: the disk has gone; its"):
        write_checkpoint({"step": 1}, out / "checkpoint.pt")
    assert (out / "checkpoint.pt").read_bytes() == before
    assert not list(out.glob("*.partial"))
