"""Tars, TFRecords and lists are held to their files, and say what they leave out."""

import io
import os
import tarfile
import warnings

import pytest

from gpu_mixmatch.data.images import file_list, open_images, tfrecords, web_dataset
from gpu_mixmatch.data.index import HIDDEN, OTHER_FILES, LeftOutWarning
from tests.image_files import feature, message, varint, write_tfrecord

# Tars


def write_members(path, *members, **options):
    """Write members, each a name and content or a TarInfo, to a tar."""
    with tarfile.open(path, "w", **options) as archive:
        for member in members:
            info, content = member if isinstance(member, tuple) else (member, b"")
            if isinstance(info, str):
                info = tarfile.TarInfo(info)
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def special(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def contents(index):
    return {
        index.name(number).rpartition(":")[2]: bytes(index.read(number))
        for number in range(len(index))
    }


def test_hidden_members_links_and_devices_of_a_tar_are_passed_over(tmp_path):
    path = write_members(
        tmp_path / "data.tar",
        special("./", tarfile.DIRTYPE),
        ("./a/1.jpg", b"first"),
        ("./a/._1.jpg", b"double"),
        ("__MACOSX/a/1.jpg", b"double"),
        (".cache/2.jpg", b"hidden"),
        ("a/1.txt", b"caption"),
        special("a/2.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        special("a/3.jpg", tarfile.LNKTYPE, "a/1.jpg"),
        special("a/4.jpg", tarfile.CHRTYPE),
        special("a/5.jpg", tarfile.FIFOTYPE),
    )
    with pytest.warns(LeftOutWarning, match="left out links, devices and sparse files: 4"):
        index = web_dataset([path])
    assert contents(index) == {"./a/1.jpg": b"first"}
    assert index.left_out == {HIDDEN: 3, OTHER_FILES: 1, "links, devices and sparse files": 4}


def test_names_that_lead_out_of_a_tar_are_only_names(tmp_path):
    path = write_members(tmp_path / "data.tar", ("/etc/x.jpg", b"one"), ("../../y.jpg", b"two"))
    assert contents(web_dataset([path])) == {"/etc/x.jpg": b"one", "../../y.jpg": b"two"}
    assert os.listdir(tmp_path) == ["data.tar"]


def test_a_second_image_of_a_sample_is_warned_of_with_the_number(tmp_path):
    names = [f"photo.2021.0{number}.jpg" for number in range(1, 5)]
    path = write_members(tmp_path / "data.tar", *((name, name.encode()) for name in names))
    with pytest.warns(LeftOutWarning, match=r"second images of a sample, .* first dot: 3\."):
        index = web_dataset([path])
    assert contents(index) == {names[0]: names[0].encode()}


def test_images_of_a_tar_that_are_not_read_are_warned_of(tmp_path):
    path = write_members(tmp_path / "data.tar", ("1.gif", b"x"), ("1.cls", b"3"), ("2.jpg", b"y"))
    with pytest.warns(LeftOutWarning, match="left out images in .gif: 1"):
        assert len(web_dataset([path])) == 1


def test_the_later_member_of_a_name_counts(tmp_path):
    path = write_members(tmp_path / "data.tar", ("a.jpg", b"old"), ("a.jpg", b"new"))
    with pytest.warns(LeftOutWarning, match="members that a later one replaces: 1"):
        assert contents(web_dataset([path])) == {"a.jpg": b"new"}


@pytest.mark.parametrize("kept", [511, 600, 1024, 1536, 2048, 2560, 3072])
def test_a_tar_that_is_cut_short_is_refused(tmp_path, kept):
    path = write_members(tmp_path / "cut.tar", *((f"{n}.jpg", b"x" * 600) for n in range(2)))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"whole tars that are not compressed, got .*cut\.tar: "):
        web_dataset([path])


def test_tars_that_were_joined_or_damaged_in_the_middle_are_refused(tmp_path):
    one, two = (
        write_members(tmp_path / f"{name}.tar", *((f"{name}{n}.jpg", b"x" * 10) for n in range(3)))
        for name in ("a", "b")
    )
    joined = tmp_path / "joined.tar"
    joined.write_bytes(one.read_bytes() + two.read_bytes())
    damaged = bytearray(one.read_bytes())
    damaged[1024 + 148 : 1024 + 156] = b"7777777\0"  # the second header's checksum
    one.write_bytes(damaged)
    for path in (joined, one):
        with pytest.raises(ValueError, match=r"it is damaged, or another tar was joined to it"):
            web_dataset([path])


@pytest.mark.parametrize("size", [-(10**9), -512, 2**40, 2**62])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, b"Z"])
def test_a_size_that_the_tar_does_not_have_is_refused(tmp_path, size, kind):
    member = tarfile.TarInfo("a.jpg")
    member.size, member.type = size, kind
    path = tmp_path / "data.tar"
    path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    with pytest.raises(ValueError, match=r"whole tars that are not compressed, got .*data\.tar: "):
        web_dataset([path])


@pytest.mark.parametrize("label", [b"", b"-1", b"1.5", b"9" * 19, b"1" * 10_000, "٣".encode()])
def test_a_label_of_a_tar_that_is_no_number_is_refused(tmp_path, label):
    path = write_members(tmp_path / "data.tar", ("a/1.jpg", b"x"), ("a/1.cls", label))
    with pytest.raises(ValueError, match=r"paths must hold an integer in a/1\.cls, got b'"):
        web_dataset([path], labelled=True)


def test_an_image_beyond_the_end_of_an_archive_is_not_read(tmp_path):
    path = write_members(tmp_path / "data.tar", ("a.jpg", b"x" * 600))
    index = web_dataset([path])
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(OSError, match="the archive has 1000 bytes, of which 1112 are wanted"):
        index.read(0)


# TFRecords


def write_record(path, example, length=None):
    length = len(example) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + bytes(4) + example + bytes(4))
    return path


IMAGE, LABEL = message(1, message(1, b"image")), message(3, message(1, varint(3)))


def example(image=IMAGE, label=LABEL):
    features = feature("image/encoded", image) + feature("image/class/label", label)
    return message(1, features)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (example(image=message(3, message(1, varint(5)))), "a list of numbers in place of bytes"),
        (example(label=message(2, message(1, bytes(4)))), "a label that is no integer"),
        (example(label=message(1, message(1, b"cat"))), "a label that is no integer"),
        (example(label=message(3, message(1, varint(2**64 - 2)))), "the label -2"),
        (example(label=message(3, message(1, b""))), "an integer that is cut short"),
        (example(label=message(3, message(1, b"\xff" * 11))), "an integer of more than 64 bits"),
        (message(1, b"\x0a\xff\xff\x7f"), "a field of 2097151 bytes where 0 are left"),
        (b"\x0a" + b"\xff" * 40, "an integer of more than 64 bits"),
        (b"\x0a\xff", "an integer that is cut short"),
    ],
)
def test_a_record_that_is_no_example_is_named(tmp_path, content, found):
    path = write_record(tmp_path / "data.tfrecord", content)
    with pytest.raises(ValueError, match=rf"got {found} in record 0 of {path}"):
        tfrecords([path], labelled=True)


@pytest.mark.parametrize("length", [10**6, 2**63, 2**64 - 16, 2**64 - 1])
def test_a_length_beyond_the_file_is_refused(tmp_path, length):
    path = write_record(tmp_path / "data.tfrecord", example(), length)
    with pytest.raises(ValueError, match=r"whole TFRecord files, got .*data\.tfrecord"):
        tfrecords([path])


def test_no_damage_of_a_tfrecord_escapes_without_its_name(tmp_path):
    path = tmp_path / "data.tfrecord"
    write_tfrecord(path, [(b"content" * 3, 1), (b"more", 2)])
    whole = path.read_bytes()
    for place in range(len(whole)):
        byte = (0x00, 0x7F, 0xFF)[place % 3]
        path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
        try:
            index = tfrecords([path], labelled=True)
        except ValueError as error:
            assert "data.tfrecord" in str(error)  # noqa: PT017
        else:
            assert all(len(index.read(number)) < len(whole) for number in range(len(index)))


def test_an_empty_shard_is_counted(tmp_path):
    write_tfrecord(tmp_path / "a.tfrecord", [(b"x", 1)])
    (tmp_path / "b.tfrecord").touch()
    index = tfrecords([tmp_path / "a.tfrecord", tmp_path / "b.tfrecord"])
    assert (len(index), index.left_out) == (1, {"empty files": 1})


# Lists


@pytest.fixture
def files(tmp_path):
    for name in ("a.jpg", "b.jpg", "c d.jpg"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def listed(folder, text, **options):
    path = folder / "list.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    index = file_list(path, **options)
    names = [os.path.relpath(name, folder) for name in index.paths]
    return names if index.labels is None else list(zip(names, index.labels.tolist(), strict=True))


def test_a_list_may_begin_with_a_mark_and_end_lines_as_windows_does(files):
    text = "\ufeffa.jpg\t1\r\nb.jpg\t0\r\n\r\nc d.jpg\t2".encode()
    assert listed(files, text, labelled=True) == [("a.jpg", 1), ("b.jpg", 0), ("c d.jpg", 2)]
    assert listed(files, text) == ["a.jpg", "b.jpg", "c d.jpg"]


@pytest.mark.parametrize("missing", ["gone.jpg", ".", "pipe.jpg"])
def test_a_listed_file_that_is_not_there_is_named_with_its_line(files, missing):
    os.mkfifo(files / "pipe.jpg")
    with pytest.raises(ValueError, match=rf"got line 3 of .*list\.txt: '.*{missing}', and 1 more"):
        listed(files, f"a.jpg\n\n{missing}\ngone too.jpg\nb.jpg\n")


@pytest.mark.parametrize(
    "label", ["-1", "1.5", "cat", "", "1e3", "9" * 19, "9" * 10_000, "٣", "0x1"]
)
def test_a_label_that_is_no_integer_from_0_is_named_with_its_line(files, label):
    with pytest.raises(
        ValueError, match=r"its label, an integer from 0, in every line, got line 2"
    ):
        listed(files, f"a.jpg\t1\nb.jpg\t{label}\n", labelled=True)


def test_a_line_that_repeats_another_is_left_out_and_two_labels_are_refused(files):
    with pytest.warns(LeftOutWarning, match="lines that repeat another: 2"):
        assert listed(files, "a.jpg\t1\nb.jpg\t0\na.jpg\t1\na.jpg\t1\n", labelled=True) == [
            *(("a.jpg", 1), ("b.jpg", 0)),
        ]
    with pytest.raises(ValueError, match=r"one label, got 1 in line 1 and 2 in line 3"):
        listed(files, "a.jpg\t1\nb.jpg\t0\na.jpg\t2\n", labelled=True)


def test_a_list_that_is_no_text_is_refused(files):
    with pytest.raises(ValueError, match=r"a list in UTF-8, got .*list\.txt, which has bytes of 0"):
        listed(files, "a.jpg\n".encode("utf-16"))


@pytest.mark.parametrize("name", ["list.txt", "data.tar", "data.tfrecord"])
def test_a_source_that_is_a_pipe_is_not_opened(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(OSError, match=rf"it is no regular file: .*{name}"):
            open_images(tmp_path / name)
