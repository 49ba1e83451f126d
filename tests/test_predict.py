"""From a run to answers: the loaded model is the one that was tested, and every file has a row."""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from gpu_mixmatch.cli import app
from gpu_mixmatch.data.datasets import load_dataset
from gpu_mixmatch.data.formats.common import ImageData
from gpu_mixmatch.data.images import image_folder
from gpu_mixmatch.recipes import load_model
from gpu_mixmatch.recipes.checkpoint import read_checkpoint, write_checkpoint
from gpu_mixmatch.recipes.models import MODEL_NAMES, build_model
from gpu_mixmatch.recipes.predict import Normalize, Prediction, predict
from gpu_mixmatch.recipes.train import TrainConfig, TrainRun, train
from tests.factories import random_images
from tests.image_files import CLASSES, broken_images, decode, encode, tile, write_parts

SIZE = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("folder"), labelled=4, unlabelled=6, test=5)


@pytest.fixture(scope="module")
def of_folder(folder, tmp_path_factory):
    """A run of some steps on them."""
    out = tmp_path_factory.mktemp("runs") / "folder"
    config = TrainConfig(
        "folder", str(folder), SIZE, labels=None, steps=12, batch_size=8, eval_every=6
    )
    train(config, out)
    return out


@pytest.fixture(scope="module")
def of_digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    train(TrainConfig(steps=40, batch_size=16, eval_every=20), out)
    return out


def saved(out: Path, config: TrainConfig, data: ImageData | None = None) -> TrainRun:
    """A run of one step under way, and its checkpoint."""
    run = TrainRun(config, data)
    run.train_step(next(iter(run.loader)))
    run.metrics.append({"step": 1, "error": 50.0, "seconds": 1.0})
    out.mkdir()
    write_checkpoint(run.state_dict(), out / "checkpoint.pt")
    return run


def rows_of(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.reader(file))


def command(*arguments: str | Path):
    return CliRunner().invoke(app.app, ["predict", *map(str, arguments)], catch_exceptions=False)


# The model


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"model": "wrn-28-2", "filters": 4},
        {"filters": 8, "supervised": True},
        {"preset": "usb", "augment": "kornia"},
        {"preset": "yu1ut", "ema_teacher": True},
    ],
    ids=str,
)
def test_model_of_a_run_under_way_is_the_one_that_was_tested(tmp_path, fields):
    shape = (3, 32, 32) if fields.get("model") == "wrn-28-2" else (1, 28, 28)
    name = "cifar10" if shape[0] == 3 else "fashion-mnist"
    images, labels = random_images(40, shape), torch.arange(40) % 10
    data = ImageData(images, labels, images[:8], labels[:8], 10, name)
    config = TrainConfig(name, labels=10, steps=5, batch_size=4, **fields)
    run = saved(tmp_path / "run", config, data)
    model, classes, normalize, *_ = loaded = load_model(tmp_path / "run")
    run.ema.eval()
    with torch.no_grad():
        expected = run.ema(run.normalize(data.test_images))
    assert torch.equal(normalize(data.test_images), run.normalize(data.test_images))
    torch.testing.assert_close(model(normalize(data.test_images)), expected)
    assert classes == tuple(run.data["classes"])
    assert len(classes) == 10
    assert (loaded.image, loaded.step) == (shape, 1)


def test_weights_of_a_loaded_model_are_the_averaged_ones(of_digits):
    state = read_checkpoint(of_digits / "checkpoint.pt")
    model = load_model(of_digits).model
    for name, value in model.state_dict().items():
        assert torch.equal(value, state["ema"][f"module.{name}"]), name
        # in torch's own order, which torch.export.save wants
        assert value.is_contiguous()
    assert not torch.equal(model.conv1.weight, state["model"]["conv1.weight"])


def test_loaded_model_is_plain_frozen_and_leaves_generators_alone(of_digits):
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    model = load_model(str(of_digits)).model
    assert torch.equal(torch.rand(4), expected)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any("module." in name for name in model.state_dict())


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_networks_export_with_any_number_of_images(name):
    model = build_model(name, 3, 1, 2).eval().requires_grad_(False)
    few, more = random_images(2, (1, 8, 8)) / 255, random_images(5, (1, 8, 8)) / 255
    batch = {"images": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(model, (few,), dynamic_shapes=batch).module()
    torch.testing.assert_close(exported(more), model(more))


def test_folder_and_checkpoint_of_a_run_load_alike(of_folder):
    first, second = load_model(of_folder), load_model(of_folder / "checkpoint.pt")
    assert first.classes == second.classes == CLASSES
    assert (first.image, first.step) == ((3, SIZE, SIZE), 12)
    for one, other in zip(
        first.model.state_dict().values(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("channels", [1, 3])
def test_normalize_takes_both_layouts_bytes_and_floats(channels):
    mean, std = [0.5, 0.4, 0.3][:channels], [0.2, 0.3, 0.4][:channels]
    normalize = Normalize(mean, std)
    images = random_images(5, (channels, 8, 9))
    expected = (images / 255 - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    for each in (images, images / 255):
        for batch in (each, each.permute(0, 2, 3, 1)):
            torch.testing.assert_close(normalize(batch).contiguous(), expected)
    narrow = images[:, :, :, :3]  # whose axes no shape tells apart
    torch.testing.assert_close(normalize(narrow).contiguous(), expected[:, :, :, :3])


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 1, 8, 8), ValueError, r"with C = 3 like those of the run, got \[2, 1, 8"),
        (torch.zeros(3, 8, 8), ValueError, r"images must be \[M, C, H, W\] .* got \[3, 8, 8\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), ValueError, "images must be uint8 or .*int64"),
        ([[0]], TypeError, "images must be a tensor"),
    ],
)
def test_images_that_the_model_does_not_take_are_refused(images, error, message):
    with pytest.raises(error, match=message):
        Normalize([0.5] * 3, [0.5] * 3)(images)


def change(path: Path, out: Path, **changes) -> Path:
    """A copy of a checkpoint in which entries are others."""
    state = read_checkpoint(path / "checkpoint.pt")
    for name, value in changes.items():
        state[name] = {**state[name], **value} if isinstance(value, dict) else value
    write_checkpoint(state, out)
    return out


def damaged(of_digits: Path, folder: Path) -> dict[str, Path]:
    whole = (of_digits / "checkpoint.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "text.pt").write_text("weights")
    torch.save({"model": {}, "config": {}}, folder / "old.pt")
    return {
        "cut": folder / "cut.pt",
        "text": folder / "text.pt",
        "old": folder / "old.pt",
        "network": change(of_digits, folder / "network.pt", config={"model": "vgg"}),
        "width": change(of_digits, folder / "width.pt", config={"filters": 16}),
        "huge": change(of_digits, folder / "huge.pt", config={"filters": 2**40}),
        "kind": change(of_digits, folder / "kind.pt", config={"filters": "wide"}),
        "std": change(of_digits, folder / "std.pt", normalisation={"std": [0.0]}),
    }


def test_run_that_is_none_is_refused_in_one_line_with_its_name(of_digits, tmp_path):
    for name, path in damaged(of_digits, tmp_path).items():
        with pytest.raises(ValueError, match=re.escape(str(path))) as refused:
            load_model(path)
        assert "\n" not in str(refused.value), name
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty/checkpoint\.pt must be a checkpoint"):
        load_model(tmp_path / "empty")
    with pytest.raises(TypeError, match="run must be a path, got 3 of type int"):
        load_model(3)
    with pytest.raises(ValueError, match="device must be as torch names it, got 'gpu'"):
        load_model(of_digits, device="gpu")


# A folder


@pytest.mark.parametrize("batch_size", [4, 64])
def test_labels_of_jpeg_files_are_those_of_the_model_called_by_hand(folder, of_folder, batch_size):
    answers = list(predict(of_folder, folder / "test", batch_size=batch_size))
    data = load_dataset("folder", folder, SIZE)  # the images that training decoded to test on
    model, classes, normalize, *_ = load_model(of_folder)
    probs = model(normalize(data.test_images)).softmax(1)
    files = [f"{name}/{number:03d}.jpg" for name in CLASSES for number in range(5)]
    assert [answer.file for answer in answers] == files
    assert [answer.label for answer in answers] == [classes[i] for i in probs.argmax(1)]
    confidences = torch.tensor([answer.confidence for answer in answers])
    torch.testing.assert_close(confidences, probs.amax(1))
    # which is what the run's own error says
    right = sum(answer.label == answer.file.split("/")[0] for answer in answers)
    last = json.loads((of_folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert 100 * (1 - right / len(files)) == pytest.approx(last["error"])


def test_png_files_of_digits_have_the_labels_of_their_tensors(of_digits, tmp_path):
    images = load_dataset("digits").test_images[:40]
    for number, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{number:02d}.png")
    Image.fromarray(images[0, 0].numpy()).convert("RGB").save(tmp_path / "40.png")
    model, classes, normalize, *_ = load_model(of_digits)
    probs = model(normalize(torch.cat([images, images[:1]]))).softmax(1)
    answers = list(predict(of_digits, tmp_path))
    assert [answer.label for answer in answers] == [classes[i] for i in probs.argmax(1)]
    assert torch.tensor([answer.confidence for answer in answers]).equal(probs.amax(1))
    assert len({answer.label for answer in answers}) > 3


def test_photographs_of_any_size_are_brought_to_a_grey_run(of_digits, folder):
    # the largest centred square, 32 of 40 pixels wide, resized and made grey
    path = folder / "test" / "cat" / "000.jpg"
    square = Image.fromarray(decode(path.read_bytes())).resize(
        (8, 8), Image.Resampling.BILINEAR, box=(4, 0, 36, 32)
    )
    model, _, normalize, *_ = load_model(of_digits)
    pixels = torch.tensor(list(square.convert("L").tobytes()), dtype=torch.uint8).view(1, 1, 8, 8)
    first = next(iter(predict(of_digits, folder / "test" / "cat")))
    assert first.confidence == pytest.approx(float(model(normalize(pixels)).softmax(1).max()))


def test_files_that_cannot_be_read_have_no_label_and_a_reason(of_folder, tmp_path):
    good = encode(tile())
    for name, content in {**broken_images(), "a.jpg": good, "z.jpg": good}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    expected = [*broken_images()]
    listed = [Path(path).name for path in image_folder(tmp_path).paths]
    expected += ["gone.png"] if "gone.png" in listed else []
    predictions = predict(of_folder, tmp_path, batch_size=2)  # with batches of none that is read
    answers = {answer.file: answer for answer in predictions}
    assert len(predictions) == len(answers) == len(listed)
    assert sorted(predictions.unreadable) == sorted(expected)
    for name in expected:
        assert answers[name] == Prediction(name, None, None)
        assert name in predictions.unreadable[name]
    assert answers["a.jpg"].label == answers["z.jpg"].label in CLASSES


# The command


def test_command_writes_every_file_whatever_it_is_called(of_folder, tmp_path):
    images, out = tmp_path / "images", tmp_path / "labels.csv"
    names = ['a,"b".jpg', "line\nend\r.jpg", "Füße 猫.jpg", "sub/deep/[bold]x.jpg", " =1+1.jpg"]
    if os.fsencode("é") == b"\xc3\xa9":
        names.append(os.fsdecode(b"latin \xe9.jpg"))
    for number, name in enumerate(names):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(encode(tile("cat", number)))
    result = command(of_folder, images, "--out", out, "--batch-size", "4")
    assert result.exit_code == 0, result.output
    head, *rows = rows_of(out)
    assert head == ["file", "label", "confidence"]
    answers = list(predict(of_folder, images))
    assert sorted(row[0] for row in rows) == sorted(names)
    for row, answer in zip(rows, answers, strict=True):
        assert row[:2] == [answer.file, answer.label]
        assert float(row[2]) == pytest.approx(answer.confidence, abs=1e-4)
    last = result.stdout.splitlines()[-1]
    assert f"{len(names)} images labelled, 0 not readable; " in last
    found = dict(re.findall(rf"({'|'.join(CLASSES)}) (\d+)", last))
    assert {label: int(count) for label, count in found.items()} == {
        label: [row[1] for row in rows].count(label) for label in {row[1] for row in rows}
    }
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["labels.csv"]


def test_command_lists_what_cannot_be_read_and_ends_with_1(of_folder, tmp_path):
    images, out = tmp_path / "images", tmp_path / "labels.csv"
    images.mkdir()
    (images / "good.jpg").write_bytes(encode(tile()))
    (images / "bad.jpg").write_bytes(b"")
    result = command(of_folder, images, "--out", out)
    assert result.exit_code == 1
    assert f"{images}/bad.jpg must be an image that decodes" in result.stderr
    assert "1 images labelled, 1 not readable" in result.stdout
    assert rows_of(out)[1] == ["bad.jpg", "", ""]
    assert rows_of(out)[2][0] == "good.jpg"


def test_command_refuses_before_it_begins_and_leaves_nothing_half_written(
    of_folder, folder, tmp_path, monkeypatch
):
    images, out = folder / "test", tmp_path / "labels.csv"
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine.csv").write_text("mine")
    for arguments, message in (
        ((images, "--out", tmp_path / "mine.csv"), "--out must be a file that does not exist yet"),
        ((tmp_path / "empty", "--out", out), "folder must hold at least one image, got none in"),
        ((tmp_path / "nowhere", "--out", out), "must be a folder, got"),
        ((images, "--out", out, "--batch-size", "0"), "--batch-size must be at least 1, got 0"),
        ((images, "--out", tmp_path / "no" / "labels.csv"), "labels.csv cannot be written: No "),
    ):
        result = command(of_folder, *arguments)
        assert result.exit_code == 2, message
        assert result.stderr.startswith("error: "), message
        assert message in result.stderr
        assert result.stderr.count("\n") == 1, message
    monkeypatch.setattr(torch.Tensor, "softmax", lambda *_, **__: 1 / 0)
    assert command(of_folder, images, "--out", out).exit_code == 1
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "mine.csv"}
    assert (tmp_path / "mine.csv").read_text() == "mine"


def test_run_is_only_its_checkpoint(of_folder, folder, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(of_folder / "checkpoint.pt", tmp_path / "run")
    here, there = (predict(run, folder / "test") for run in (of_folder, tmp_path / "run"))
    assert list(here) == list(there)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_labels_on_a_gpu_are_those_of_the_cpu(of_folder, folder):
    here = list(predict(of_folder, folder / "test"))
    there = list(predict(of_folder, folder / "test", device="cuda"))
    assert [answer[:2] for answer in there] == [answer[:2] for answer in here]
    for one, other in zip(here, there, strict=True):
        assert other.confidence == pytest.approx(one.confidence, abs=1e-3)
    model, _, normalize, *_ = load_model(of_folder, device="cuda")
    assert model(normalize(random_images(2, (3, SIZE, SIZE)))).device.type == "cuda"
