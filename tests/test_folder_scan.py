"""image_folder takes each real image of a folder once, and says what it left out."""

import os
import socket
import unicodedata

import pytest
import torch

from gpu_mixmatch.data.images import image_folder, open_images
from gpu_mixmatch.data.index import FOUND_BEFORE, HIDDEN, NOT_REGULAR, OTHER_FILES, LeftOutWarning

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def put(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"content of {name}".encode("utf-8", "surrogateescape"))


def places(index, root):
    return [path.removeprefix(f"{root}/") for path in index.paths]


@pytest.mark.parametrize(
    "hidden",
    [
        *(".ipynb_checkpoints/0.png", "__MACOSX/a/0.png", ".git/0.png", "@eaDir/0.png"),
        *("$RECYCLE.BIN/0.png", "System Volume Information/0.png", "lost+found/0.png"),
        *(
            "a/._0.png",
            "a/.0.png",
            "a/Thumbs.db",
            "a/__macosx/0.png",
            ".DS_Store",
            "b/deep/.x/1.png",
        ),
    ],
)
def test_hidden_and_system_entries_are_neither_classes_nor_images(tmp_path, hidden):
    put(tmp_path, "a/0.png", "b/0.png", hidden)
    index = image_folder(tmp_path, labelled=True)  # in silence: a warning would be an error
    assert places(index, tmp_path) == ["a/0.png", "b/0.png"]
    assert index.classes == ("a", "b")
    assert index.labels.tolist() == [0, 1]
    assert index.left_out == {HIDDEN: 1}


def test_a_hidden_root_is_looked_into(tmp_path):
    put(tmp_path, ".cache/a/0.png")
    assert len(image_folder(tmp_path / ".cache", labelled=True)) == 1


@pytest.mark.filterwarnings("ignore::gpu_mixmatch.data.index.LeftOutWarning")
@pytest.mark.parametrize("others", [[], ["b/0.gif", "b/1.avif"], ["b/notes.txt"], ["b/.0.png"]])
def test_a_class_without_an_image_is_refused_with_what_was_left_out(tmp_path, others):
    put(tmp_path, "a/0.png", "c/0.png", *others)
    (tmp_path / "b").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=r"in every class folder, got none in b in") as error:
        image_folder(tmp_path, labelled=True)
    assert ".jfif, .jpe, .jpeg, .jpg, .png" in str(error.value)
    assert ("images in .gif: 1" in str(error.value)) == ("b/0.gif" in others)
    index = image_folder(tmp_path)
    assert len(index) == 2
    assert index.labels is None  # or c would be numbered 1 in a list
    assert index.classes == ()


def test_a_class_of_empty_files_is_refused(tmp_path):
    put(tmp_path, "a/0.png")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "0.png").touch()
    with pytest.raises(ValueError, match=r"an image that is not empty .* got none in b"):
        image_folder(tmp_path, labelled=True)


def test_images_that_are_not_read_are_counted_and_warned_of(tmp_path):
    put(tmp_path, "a/0.png", "a/1.GIF", "a/2.heic", "a/3.gif", "a/list.csv", "a/README")
    with pytest.warns(LeftOutWarning, match=r"left out images in .gif: 2, images in .heic: 1\. "):
        index = image_folder(tmp_path)
    expected = {"images in .gif": 2, "images in .heic": 1, OTHER_FILES: 2}
    assert index.left_out == expected


@pytest.mark.parametrize(
    "suffix", ["JPG", "Jpeg", "jfif", "JPE", "png", "WebP", "bmp", "TIF", "tiff"]
)
def test_suffixes_are_read_in_any_case(tmp_path, suffix):
    put(tmp_path, f"a/0.{suffix}")
    assert image_folder(tmp_path, labelled=True).labels.tolist() == [0]


@pytest.mark.filterwarnings("ignore::gpu_mixmatch.data.index.LeftOutWarning")
def test_loops_of_linked_folders_end(tmp_path):
    put(tmp_path, "a/deep/0.png", "b/0.png")
    for link, target in (("a/up", ".."), ("a/deep/self", "."), ("b/other", "../a")):
        (tmp_path / link).symlink_to(target)
    (tmp_path / "b" / "endless.png").symlink_to("endless.png")
    (tmp_path / "a" / "endless").symlink_to("endless")
    index = image_folder(tmp_path, labelled=True)
    assert places(index, tmp_path) == ["a/deep/0.png", "b/0.png", "b/endless.png"]
    assert index.left_out == {FOUND_BEFORE: 3, OTHER_FILES: 1}
    with pytest.raises(OSError, match="symbolic links"):
        index.read(2)


def test_a_link_to_a_folder_above_does_not_bring_in_its_other_folders(tmp_path):
    put(tmp_path, "data/unlabelled/0.png", "data/test/a/1.png", "2.png")
    for link, target in (("up", ".."), ("far", "../..")):
        (tmp_path / "data" / "unlabelled" / link).symlink_to(target)
    with pytest.warns(LeftOutWarning, match=f"{FOUND_BEFORE}: 2"):
        index = image_folder(tmp_path / "data" / "unlabelled")
    assert places(index, tmp_path) == ["data/unlabelled/0.png"]


def test_a_file_of_several_paths_is_taken_once_by_its_own(tmp_path):
    put(tmp_path, "a/1.png", "a/2.png")
    (tmp_path / "a" / "0.png").symlink_to("1.png")
    os.link(tmp_path / "a" / "2.png", tmp_path / "a" / "3.png")
    with pytest.warns(LeftOutWarning, match=f"{FOUND_BEFORE}: 2"):
        index = image_folder(tmp_path, labelled=True)
    assert places(index, tmp_path) == ["a/1.png", "a/2.png"]


def test_links_to_what_lies_outside_are_followed_once(tmp_path):
    put(tmp_path, "outside/0.png", "outside/more/1.png", "alone.png", "root/b/0.png")
    for number in (1, 2):
        (tmp_path / "root" / "b" / f"link{number}").symlink_to(tmp_path / "outside")
        (tmp_path / "root" / "b" / f"file{number}.png").symlink_to(tmp_path / "alone.png")
    (tmp_path / "root" / "a").symlink_to(tmp_path / "outside" / "more")
    with pytest.warns(LeftOutWarning, match=f"{FOUND_BEFORE}: 3"):
        index = image_folder(tmp_path / "root", labelled=True)
    expected = ["a/1.png", "b/0.png", "b/file1.png", "b/link1/0.png"]
    assert places(index, tmp_path / "root") == expected
    assert index.labels.tolist() == [0, 1, 1, 1]


@pytest.mark.filterwarnings("ignore::gpu_mixmatch.data.index.LeftOutWarning")
def test_a_file_in_two_classes_is_refused_where_labels_are_wanted(tmp_path):
    put(tmp_path, "a/0.png", "b/0.png")
    os.link(tmp_path / "a" / "0.png", tmp_path / "b" / "1.png")
    with pytest.raises(ValueError, match=r"in one class, got a/0.png and b/1.png, which are one"):
        image_folder(tmp_path, labelled=True)
    assert len(image_folder(tmp_path)) == 2
    (tmp_path / "b" / "1.png").unlink()
    (tmp_path / "c").symlink_to("a")  # another name of a class
    with pytest.raises(ValueError, match=rf"got none in c in .*{FOUND_BEFORE}: 1"):
        image_folder(tmp_path, labelled=True)


def test_pipes_sockets_and_devices_are_passed_over_and_never_opened(tmp_path):
    put(tmp_path, "a/0.png")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "a" / "null.png").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tmp_path)  # the path of a socket must be short
        server.bind("a/socket.png")
        with pytest.warns(LeftOutWarning, match=f"{NOT_REGULAR}: 4"):
            index = image_folder(tmp_path, labelled=True)
    assert places(index, tmp_path) == ["a/0.png"]


def test_a_pipe_in_the_place_of_an_image_is_not_read(tmp_path):
    put(tmp_path, "0.png")
    index = image_folder(tmp_path)
    (tmp_path / "0.png").unlink()
    os.mkfifo(tmp_path / "0.png")
    with pytest.raises(OSError, match=r"it is no regular file: .*0\.png"):
        index.read(0)


def test_a_file_larger_than_any_image_is_not_read(tmp_path):
    with open(tmp_path / "0.png", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="1099511627776 bytes, more than any image"):
        image_folder(tmp_path).read(0)


def test_a_folder_that_cannot_be_looked_into_is_an_error(tmp_path, monkeypatch):
    put(tmp_path, "a/0.png", "b/0.png")
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError, match=rf"Permission denied: '{tmp_path}/b'"):
        image_folder(tmp_path)


def test_unicode_forms_of_a_class_meet(tmp_path):
    put(tmp_path, f"labelled/{COMPOSED}/0.png", f"test/{DECOMPOSED}/0.png")
    classes = {
        part: image_folder(tmp_path / part, labelled=True).classes for part in ("labelled", "test")
    }
    assert classes == {"labelled": (COMPOSED,), "test": (COMPOSED,)}


def test_two_classes_of_one_name_are_refused_and_both_named(tmp_path):
    put(tmp_path, f"{COMPOSED}/0.png", f"{DECOMPOSED}/0.png")
    with pytest.raises(ValueError, match=r"'cafe\\u0301' and 'caf\\xe9'"):
        image_folder(tmp_path, labelled=True)
    assert image_folder(tmp_path).labels is None


def test_names_that_differ_in_case_stay_apart(tmp_path):
    put(tmp_path, "Cat/0.png", "cat/0.png", "cat/0.PNG")
    index = image_folder(tmp_path, labelled=True)
    assert index.classes == ("Cat", "cat")
    assert index.labels.tolist() == [0, 1, 1]


def test_order_is_the_same_on_disks_of_either_unicode_form(tmp_path):
    put(tmp_path, *(f"one/{name}" for name in ("cafes.png", f"{COMPOSED}.png", "caff.png")))
    put(tmp_path, *(f"two/{name}" for name in ("cafes.png", f"{DECOMPOSED}.png", "caff.png")))
    one, two = (places(image_folder(tmp_path / part), tmp_path / part) for part in ("one", "two"))
    assert one == [unicodedata.normalize("NFC", name) for name in two]


def test_names_that_are_no_text_are_kept(tmp_path):
    name = os.fsdecode(b"a\xff/0\xfe.png")
    put(tmp_path, name)
    index = image_folder(tmp_path, labelled=True)
    assert index.classes == (os.fsdecode(b"a\xff"),)
    assert bytes(index.read(0)).startswith(b"content of a\xff")


def test_part_of_an_index_keeps_classes_and_places(tmp_path):
    put(tmp_path, "a/0.png", "b/0.png", "b/1.png")
    part = image_folder(tmp_path, labelled=True).take([2, 0])
    assert places(part, tmp_path) == ["b/1.png", "a/0.png"]
    assert torch.equal(part.labels, torch.tensor([1, 0]))
    assert part.classes == ("a", "b")


def test_an_empty_source_says_what_was_left_out(tmp_path):
    put(tmp_path, ".0.png", "notes.txt")
    with pytest.raises(ValueError, match=rf"got none in .*; left out {OTHER_FILES}: 1, {HIDDEN}"):
        open_images(tmp_path)
