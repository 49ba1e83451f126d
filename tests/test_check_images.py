"""check_images names what does not decode; the sources of DaliLoader say what they miss."""

import tarfile

import numpy as np
import pytest
import torch

from gpu_mixmatch.data.check import check_images
from gpu_mixmatch.data.dali import DaliLoader
from gpu_mixmatch.data.images import file_list, image_folder, open_images, tfrecords, web_dataset
from tests import image_files
from tests.image_files import encode, tile
from tests.skips import skip_without

skip_without("nvidia.dali")


@pytest.fixture
def mixed(tmp_path):
    """A folder of good and broken files; the names of both."""
    good, broken = image_files.unusual_images(), image_files.broken_images()
    for name, content in {**good, **broken, "notes.txt": b"no image"}.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path, sorted(good), sorted(broken)


@pytest.mark.parametrize("decoder", ["pil", "dali"])
def test_every_broken_file_is_found_and_no_other(mixed, decoder):
    root, good, broken = mixed
    checked = check_images(root, decoder=decoder)
    assert checked.good == [str(root / name) for name in good]
    assert sorted(checked.bad) == [str(root / name) for name in broken]


@pytest.mark.parametrize("decoder", ["pil", "dali"])
def test_reasons_tell_kinds_of_damage_apart(mixed, decoder):
    root, *_ = mixed
    bad = check_images(root, decoder=decoder).bad
    reasons = {path.rpartition("/")[2]: why for path, why in bad.items()}
    assert reasons["empty.jpg"] == "the file is empty"
    assert reasons["text.jpg"] == "it is no JPEG, PNG, WebP, BMP or TIFF"
    for name in ("truncated.jpg", "header_only.jpg", "truncated.png", "truncated.webp"):
        assert "damaged" in reasons[name]


def test_a_file_that_cannot_be_read_is_bad(tmp_path):
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "good.jpg").write_bytes(encode(tile()))
    checked = check_images(tmp_path)
    assert checked.good == [str(tmp_path / "good.jpg")]
    assert "No such file" in checked.bad[str(tmp_path / "gone.jpg")]


def test_progress_rises_to_the_number_of_images(tmp_path):
    image_files.write_folder(tmp_path / "images", 7)
    calls = []
    check_images(tmp_path / "images", progress=lambda done, total: calls.append((done, total)))
    assert calls == [(8, 21), (16, 21), (21, 21)]


def test_an_empty_folder_has_neither_good_nor_bad(tmp_path):
    assert check_images(tmp_path) == ([], {}, {}, [])


def test_the_list_of_good_images_is_what_a_loader_reads(tmp_path):
    root = tmp_path / "images"
    written = image_files.write_folder(root, 3)
    broken = root / "cat" / "broken one.png"
    broken.write_bytes(image_files.broken_images()["truncated.png"])
    (root / "china" / "a b  é.png").write_bytes(encode(tile("china", 9), "PNG"))
    checked = check_images(root, tmp_path / "good.txt")
    assert list(checked.bad) == [str(broken)]

    index = file_list(tmp_path / "good.txt", labelled=True)
    folder = image_folder(root, labelled=True)
    kept = [number for number, path in enumerate(folder.paths) if path != str(broken)]
    assert list(index.paths) == [folder.paths[number] for number in kept] == checked.good
    assert torch.equal(index.labels, folder.labels[kept])
    assert list(file_list(tmp_path / "good.txt").paths) == checked.good
    with DaliLoader(tmp_path / "good.txt", tmp_path / "good.txt", 2, 32) as loader:
        assert sum(len(batch.u) for batch in loader) == len(written) + 1


def test_a_list_may_move_with_its_images(tmp_path):
    image_files.write_folder(tmp_path / "before", 1)
    check_images(tmp_path / "before", tmp_path / "before" / "good.txt")
    (tmp_path / "before").rename(tmp_path / "after")
    index = file_list(tmp_path / "after" / "good.txt")
    assert [len(index.read(number)) > 0 for number in range(3)] == [True] * 3


def test_a_list_of_images_without_classes_has_no_labels(mixed, tmp_path_factory):
    root, good, _ = mixed
    path = tmp_path_factory.mktemp("elsewhere") / "good.txt"
    check_images(root, path)
    assert path.read_text().splitlines() == [str(root / name) for name in good]


def test_a_name_that_cannot_stand_in_a_list_is_left_out_of_it_and_told(tmp_path):
    for name in ("a\tb.jpg", "a\nb.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(encode(tile()))
    checked = check_images(tmp_path, tmp_path / "good.txt")
    assert len(checked.good) == 3
    assert checked.unlisted == [str(tmp_path / "a\tb.jpg"), str(tmp_path / "a\nb.jpg")]
    assert file_list(tmp_path / "good.txt").paths == [str(tmp_path / "c.jpg")]
    assert check_images(tmp_path).unlisted == []


# Sources


def test_a_folder_is_searched_at_any_depth_and_sorted(tmp_path):
    for name in ("b/2.jpg", "b/1.JPEG", "a/deep/er/3.webp", "a/x.txt", "a/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"content")
    index = image_folder(tmp_path, labelled=True)
    found = [path.removeprefix(f"{tmp_path}/") for path in index.paths]
    assert found == ["a/deep/er/3.webp", "b/1.JPEG", "b/2.jpg"]
    assert index.labels.tolist() == [0, 1, 1]
    assert index.classes == ("a", "b")


def test_a_list_takes_a_space_before_the_label_and_empty_lines(tmp_path):
    path = tmp_path / "list.txt"
    there = tmp_path / "there" / "c.jpg"
    there.parent.mkdir()
    for file in (tmp_path / "a b.jpg", there):
        file.touch()
    path.write_text(f"a b.jpg 3\n\n{there}\t0\r\n")
    index = file_list(path, labelled=True)
    assert index.paths == [str(tmp_path / "a b.jpg"), str(there)]
    assert index.labels.tolist() == [3, 0]


@pytest.mark.parametrize("line", ["a.jpg", "a.jpg\tcat", "a.jpg -1"])
def test_a_list_without_a_label_is_refused_where_labels_are_wanted(tmp_path, line):
    path = tmp_path / "list.txt"
    path.write_text(f"good.jpg\t1\n{line}\n")
    with pytest.raises(ValueError, match=r"its label, .* in every line, got line 2"):
        file_list(path, labelled=True)


def test_a_tar_groups_files_by_their_name_up_to_the_first_dot(tmp_path):
    path = tmp_path / "data.tar"
    files = {
        "a/1.cls": b" 4\n",
        "a/1.jpg": b"first",
        "a/1.json": b"{}",
        "b/1.seg.png": b"second",
        "b/1.cls": b"5",
    }
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            (tmp_path / "file").write_bytes(content)
            archive.add(tmp_path / "file", name)
    index = web_dataset([path], labelled=True)
    assert [index.read(number).tobytes() for number in (0, 1)] == [b"first", b"second"]
    assert index.labels.tolist() == [4, 5]
    assert index.name(1) == f"{path}:b/1.seg.png"


def test_a_tfrecord_gives_bytes_and_labels_by_the_names_of_features(tmp_path):
    path = tmp_path / "data-00000-of-00001"
    samples = [(b"x" * 300, 7), (b"", 0), (b"y", 123_456)]
    image_files.write_tfrecord(path, samples, "jpeg", "class")
    index = tfrecords([path], labelled=True, image_key="jpeg", label_key="class")
    assert [index.read(number).tobytes() for number in range(3)] == [c for c, _ in samples]
    assert index.labels.tolist() == [7, 0, 123_456]
    assert index.name(2) == f"{path}:record 2"


def test_damaged_archives_are_named(tmp_path):
    record, tar = tmp_path / "cut.tfrecord", tmp_path / "no.tar"
    image_files.write_tfrecord(record, [(b"x" * 300, 1)])
    record.write_bytes(record.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"whole TFRecord files, got .*cut.tfrecord"):
        open_images(record)
    with tarfile.open(tar, "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"tars that are not compressed, got .*no.tar"):
        open_images(tar)


def test_missing_labels_and_features_are_named(tmp_path):
    record, tar = tmp_path / "data.tfrecord", tmp_path / "data.tar"
    image_files.write_tfrecord(record, [(b"x", 1), (b"y", None)])
    image_files.write_tar(tar, [(b"x", "jpg", 1), (b"y", "jpg", None)])
    assert len(open_images(record)) == len(open_images([tar])) == 2
    with pytest.raises(
        ValueError, match=r"'image/class/label' in every record, got .* record 1 of"
    ):
        open_images(record, labelled=True)
    with pytest.raises(ValueError, match=r"an integer in sample0001\.cls, got None in .*data\.tar"):
        open_images(tar, labelled=True)


def test_sources_of_no_known_kind_are_refused(tmp_path):
    (tmp_path / "images.csv").write_text("")
    for source in (tmp_path / "images.csv", tmp_path / "none", [], ["a.tar", "b.tfrecord"]):
        with pytest.raises(ValueError, match=r"source must be a folder, a \.txt list, \.tar or"):
            open_images(source)
    with pytest.raises(ValueError, match="source must hold at least one image, got none in"):
        open_images(tmp_path)
    with pytest.raises(ValueError, match="root must be a folder, got"):
        check_images(tmp_path / "images.csv")


def test_an_index_reads_whole_files_and_is_passed_through(tmp_path):
    (tmp_path / "0.jpg").write_bytes(encode(tile()))
    index = open_images(str(tmp_path))
    assert open_images(index) is index
    assert np.array_equal(index.read(0), np.frombuffer(encode(tile()), dtype=np.uint8))
