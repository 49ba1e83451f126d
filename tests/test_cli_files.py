"""Files of a person's own, good and bad, through the command line."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gpu_mixmatch.cli import app
from gpu_mixmatch.data.images import file_list
from tests.image_files import broken_images, encode, tile, write_folder
from tests.skips import skip_without

RUNNER = CliRunner()


def run(*arguments):
    result = RUNNER.invoke(app.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def folder(tmp_path):
    for part, count in (("labelled", 3), ("unlabelled", 4), ("test", 2)):
        write_folder(tmp_path / "images" / part, count, "jpg")
    return tmp_path / "images"


def test_check_images_of_a_folder_without_images_ends_with_2_and_says_so(tmp_path):
    (tmp_path / "notes.txt").touch()
    result = RUNNER.invoke(app.app, ["check-images", str(tmp_path), "--list", str(tmp_path / "l")])
    assert result.exit_code == 2
    assert f"one image, got none in {tmp_path}. Suffixes that are read: .bmp, " in result.output
    assert "left out: files that are no images: 1" in result.output
    assert not (tmp_path / "l").exists()


def test_check_images_shows_bad_files_and_writes_a_list_whatever_their_names_are(tmp_path, folder):
    images = folder / "labelled" / "cat"
    for name in ("bad\t.jpg", "bad\x1b[31m.jpg", os.fsdecode(b"bad\xff.jpg")):
        (images / name).write_bytes(b"x")
    (images / "a\tb.jpg").write_bytes((images / "000.jpg").read_bytes())
    path = tmp_path / "good.txt"
    arguments = ["check-images", str(folder / "labelled"), "--list", str(path)]
    result = RUNNER.invoke(app.app, arguments)
    assert result.exit_code == 1
    for name in (r"bad\t.jpg", r"bad\x1b[31m.jpg", r"bad\udcff.jpg"):
        assert f"{images}/{name}: it is no JPEG" in result.output
    assert "10 images decode, 3 do not" in result.output
    assert rf"it lacks 1 good images, whose names have a tab or a line end: {images}/a\tb.jpg" in (
        result.output
    )
    assert len(file_list(path, labelled=True)) == 9


@pytest.mark.parametrize("decoder", ["pil", "dali"])
def test_check_images_judges_by_the_decoder_that_is_chosen(folder, decoder):
    if decoder == "dali":
        skip_without("nvidia.dali")
    png = encode(tile(), "PNG")[:-12]  # Pillow does without the last chunk
    (folder / "labelled" / "cat" / "cut.png").write_bytes(png)
    arguments = ["check-images", str(folder / "labelled"), "--decoder", decoder]
    result = RUNNER.invoke(app.app, arguments)
    assert result.exit_code == (decoder == "dali")
    assert ("cut.png: it is" in result.output) == (decoder == "dali")


@pytest.mark.filterwarnings("ignore::gpu_mixmatch.data.index.LeftOutWarning")
def test_check_images_passes_over_pipes(tmp_path, folder):
    os.mkfifo(folder / "labelled" / "cat" / "pipe.jpg")
    result = RUNNER.invoke(app.app, ["check-images", str(folder / "labelled")])
    assert result.exit_code == 0
    assert "left out: pipes, sockets and devices: 1" in result.output


@pytest.fixture
def damaged(folder):
    """The folder with a bad file in each part, and a hidden one."""
    bad = [folder / part / "cat" / "001.jpg" for part in ("labelled", "unlabelled", "test")]
    for path, content in zip(bad, broken_images().values(), strict=False):
        path.write_bytes(content)
    (folder / "labelled" / "cat" / "._000.jpg").touch()
    return folder, [str(path) for path in bad]


SHORT = ("--steps", "2", "--batch-size", "4", "--size", "16")


@pytest.mark.filterwarnings("ignore::gpu_mixmatch.data.index.LeftOutWarning")
@pytest.mark.parametrize("loader", ["resident", "dataloader", "dali"])
def test_train_skips_what_does_not_decode_by_every_loader(tmp_path, damaged, loader):
    if loader == "dali":
        skip_without("nvidia.dali")
    root, bad = damaged
    out = tmp_path / "run"
    arguments = ("--dataset", "folder", "--root", str(root), "--loader", loader, "--workers", "0")
    output = run("train", "--out", str(out), *arguments, *SHORT, "--on-error", "skip")
    assert "left out: hidden or system entries: 1" in output
    assert "skipped.txt (3 files)" in output
    lines = (out / "skipped.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == bad
    if loader != "resident":
        return
    more = ("--resume", "--steps", "3")
    output = run("train", "--out", str(out), *arguments, *SHORT, *more, "--on-error", "skip")
    assert "going on after step 2 of 3" in output


@pytest.mark.parametrize("loader", ["resident", "dataloader", "dali"])
def test_train_ends_in_one_line_that_names_the_file_and_leaves_nothing(tmp_path, damaged, loader):
    if loader == "dali":
        skip_without("nvidia.dali")
    root, bad = damaged
    for path in (bad[0], bad[2]):
        Path(path).unlink()
    arguments = ("--dataset", "folder", "--root", str(root), "--loader", loader, "--workers", "1")
    more = ("--batch-size", "12")
    out = str(tmp_path / "run")
    result = RUNNER.invoke(app.app, ["train", "--out", out, *arguments, *SHORT, *more])
    assert result.exit_code == 2
    (line,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert f"{bad[1]}" in line
    assert "train --on-error skip" in line
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_train_reads_what_a_list_of_check_images_names(tmp_path, damaged):
    root, _ = damaged
    path = tmp_path / "good.txt"
    assert RUNNER.invoke(app.app, ["check-images", str(root), "--list", str(path)]).exit_code == 1
    arguments = ("--dataset", "folder", "--root", str(root), *SHORT, "--list")
    run("train", "--out", str(tmp_path / "run"), *arguments, str(path))
    path.write_text("")
    result = RUNNER.invoke(app.app, ["train", "--out", str(tmp_path / "x"), *arguments, str(path)])
    assert result.exit_code == 2
    assert "--list must name images of" in result.output
    digits = ["train", "--out", str(tmp_path / "x"), "--on-error", "skip"]
    result = RUNNER.invoke(app.app, digits)
    assert result.exit_code == 2
    assert "--on-error must be 'raise' and --list None for a data set that is no" in result.output
