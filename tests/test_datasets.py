"""Data sets are read from files in their original formats, and damaged files are named."""

import codecs
import gzip
import io
import os
import pickle
import random
import re
import struct
import sys
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gpu_mixmatch.data.datasets import load_dataset
from gpu_mixmatch.data.formats import cifar as cifar_format
from gpu_mixmatch.data.formats.common import split_labels
from gpu_mixmatch.data.formats.mnist import read_idx
from gpu_mixmatch.sampling import split_order
from tests.skips import skip_without

Bytes = NDArray[np.uint8]

IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def random_bytes(*shape: int, seed: int = 0, high: int = 256) -> Bytes:
    return np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint8)


def idx_bytes(values: Bytes) -> bytes:
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return header + values.tobytes()


def mnist_values() -> dict[str, Bytes]:
    return {
        IDX_FILES[0]: random_bytes(5, 6, 7, seed=1),
        IDX_FILES[1]: np.array([0, 9, 3, 3, 1], dtype=np.uint8),
        IDX_FILES[2]: random_bytes(2, 6, 7, seed=2),
        IDX_FILES[3]: np.array([8, 0], dtype=np.uint8),
    }


def write_mnist(folder: Path, *, compressed: bool = False) -> dict[str, Bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    values = mnist_values()
    for name, array in values.items():
        content = idx_bytes(array)
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return values


class Python2Pickler(pickle._Pickler):
    """Write bytes and text alike as Python 2's `str`, as the original CIFAR files have them."""

    def save_str(self, value: bytes | str) -> None:
        encoded = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(encoded)) + encoded)
        self.memoize(value)

    dispatch = {**pickle._Pickler.dispatch, bytes: save_str, str: save_str}  # noqa: RUF012


def python2_pickle(value: object) -> bytes:
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(value)
    return stream.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def python3_pickle(value: object) -> bytes:
    return pickle.dumps(value, protocol=2)


class Cifar:
    """Files of a tiny CIFAR in both original versions, with the values that they hold."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.num_classes = {"cifar10": 10, "cifar100": 100}[name]
        short = {"cifar10": "cifar-10", "cifar100": "cifar-100"}[name]
        suffix = "-batches" if name == "cifar10" else ""
        self.folders = {
            "binary": f"{short}{suffix}-{'bin' if suffix else 'binary'}",
            "python": f"{short}{suffix}-{'py' if suffix else 'python'}",
        }
        self.archives = {version: f"{short}-{version}.tar.gz" for version in self.folders}
        if name == "cifar10":
            self.parts = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
        else:
            self.parts = ["train", "test"]
        self.images = {
            part: random_bytes(3, 3, 32, 32, seed=seed) for seed, part in enumerate(self.parts)
        }
        self.labels = {
            part: random_bytes(3, seed=50 + seed, high=self.num_classes)
            for seed, part in enumerate(self.parts)
        }

    def pickled(self, part: str) -> dict[bytes, Any]:
        label_key = b"labels" if self.name == "cifar10" else b"fine_labels"
        batch = {
            b"batch_label": b"a tiny batch",
            label_key: self.labels[part].tolist(),
            b"data": self.images[part].reshape(-1, 3072),
            b"filenames": [b"a.png", b"b.png", b"c.png"],
        }
        if self.name == "cifar100":
            batch[b"coarse_labels"] = [19, 0, 7]
        return batch

    def content(self, part: str, version: str) -> bytes:
        if version == "python":
            return python2_pickle(self.pickled(part))
        labels = self.labels[part][:, None]
        coarse = [np.full_like(labels, 19)] if self.name == "cifar100" else []
        return np.hstack([*coarse, labels, self.images[part].reshape(-1, 3072)]).tobytes()

    def file_name(self, part: str, version: str) -> str:
        return f"{part}.bin" if version == "binary" else part

    def write(self, root: Path, version: str) -> Path:
        folder = root / self.folders[version]
        folder.mkdir(parents=True)
        for part in self.parts:
            (folder / self.file_name(part, version)).write_bytes(self.content(part, version))
        return folder

    def write_archive(self, root: Path, version: str, prefix: str = "") -> Path:
        path = root / self.archives[version]
        with tarfile.open(path, "w:gz") as archive:
            # Archives are not in our order, and hold more than we read.
            for part in ("readme", *reversed(self.parts)):
                name = self.file_name(part, version)
                content = b"hello" if part == "readme" else self.content(part, version)
                member = tarfile.TarInfo(f"{prefix}{self.folders[version]}/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return path

    def check(self, root: Path) -> None:
        data = load_dataset(self.name, root)
        train = self.parts[:-1]
        images = np.concatenate([self.images[part] for part in train])
        labels = np.concatenate([self.labels[part] for part in train])
        np.testing.assert_array_equal(data.train_images.numpy(), images)
        np.testing.assert_array_equal(data.train_labels.numpy(), labels)
        np.testing.assert_array_equal(data.test_images.numpy(), self.images[self.parts[-1]])
        np.testing.assert_array_equal(data.test_labels.numpy(), self.labels[self.parts[-1]])
        assert (data.name, data.num_classes) == (self.name, self.num_classes)
        assert_contract(data)


def assert_contract(data: Any) -> None:
    for images, labels in (
        (data.train_images, data.train_labels),
        (data.test_images, data.test_labels),
    ):
        assert images.dtype == torch.uint8
        assert images.ndim == 4
        assert images.is_contiguous()
        assert labels.dtype == torch.int64
        assert labels.shape == images.shape[:1]


def message(*parts: object) -> str:
    """A pattern of literal parts with anything between them."""
    return ".*".join(re.escape(str(part)) for part in parts)


def test_unknown_name_lists_the_names() -> None:
    pattern = message(
        "name must be one of digits, mnist, fashion-mnist, cifar10, cifar100, folder, got 'x'"
    )
    with pytest.raises(ValueError, match=pattern):
        load_dataset("x")


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("mnist", "{train,t10k}-{images-idx3,labels-idx1}-ubyte, plain or .gz"),
        ("fashion-mnist", "{train,t10k}-{images-idx3,labels-idx1}-ubyte, plain or .gz"),
        ("cifar10", "cifar-10-batches-bin/ or cifar-10-binary.tar.gz or cifar-10-batches-py/"),
        ("cifar100", "cifar-100-binary/ or cifar-100-binary.tar.gz or cifar-100-python/"),
    ],
)
def test_missing_root_says_what_the_folder_holds(name: str, contents: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message("root must be a folder with", contents, "None")):
        load_dataset(name)
    with pytest.raises(FileNotFoundError, match=message(contents, tmp_path, "with nothing")):
        load_dataset(name, tmp_path)
    with pytest.raises(FileNotFoundError, match=message(contents, tmp_path / "no", "no folder")):
        load_dataset(name, tmp_path / "no")


def test_root_without_the_files_lists_what_it_holds(tmp_path: Path) -> None:
    for index in range(10):
        (tmp_path / f"photo{index}.jpg").touch()
    with pytest.raises(FileNotFoundError, match=message("photo0.jpg, photo1.jpg", "and 2 more")):
        load_dataset("cifar10", tmp_path)


def test_digits_are_every_row_of_load_digits_exactly_once() -> None:
    datasets = skip_without("sklearn.datasets")
    raw = datasets.load_digits()
    data = load_dataset("digits")
    assert_contract(data)
    assert data.train_images.shape == (1297, 1, 8, 8)
    assert data.test_images.shape == (500, 1, 8, 8)
    assert (data.name, data.num_classes) == ("digits", 10)

    def rows(images: Any, labels: Any) -> list[bytes]:
        return [
            image.tobytes() + bytes([label]) for image, label in zip(images, labels, strict=True)
        ]

    # Halves round up: 8 · 255 / 16 = 127.5.
    levels = np.array([(2 * value * 255 + 16) // 32 for value in range(17)], dtype=np.uint8)
    all_rows = rows(levels[raw.images.astype(int)], raw.target)
    # Every row of load_digits is unlike every other: equal multisets then mean disjoint parts.
    assert len(set(all_rows)) == 1797
    train = rows(data.train_images.numpy(), data.train_labels.tolist())
    test = rows(data.test_images.numpy(), data.test_labels.tolist())
    assert sorted(train + test) == sorted(all_rows)
    assert not set(train) & set(test)


def test_digits_test_rows_are_stratified_and_spread_over_the_file() -> None:
    datasets = skip_without("sklearn.datasets")
    target = datasets.load_digits().target
    data = load_dataset("digits")
    totals = np.bincount(target)
    in_test = np.bincount(data.test_labels.numpy())
    assert (np.abs(in_test - totals * 500 / 1797) < 1).all()

    raw = np.rint(datasets.load_digits().images * 255 / 16).astype(np.uint8)
    test = {image.tobytes() for image in data.test_images.numpy()}
    is_test = np.array([image.tobytes() in test for image in raw])
    for class_index in range(10):
        of_class = is_test[target == class_index]
        expected = np.arange(1, len(of_class) + 1) * of_class.mean()
        # Never more than one row ahead of or behind an even spread, so every writer is in both.
        assert (np.abs(of_class.cumsum() - expected) < 1).all()


def test_digits_ignore_global_random_states() -> None:
    skip_without("sklearn")
    splits = []
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        splits.append(load_dataset("digits"))
    assert torch.equal(splits[0].test_images, splits[1].test_images)
    assert torch.equal(splits[0].train_labels, splits[1].train_labels)


def test_digits_without_scikit_learn_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=message('needs scikit-learn: pip install -e ".[cli]"')):
        load_dataset("digits")


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 3, 5)])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_read_idx_returns_the_values_written(
    shape: tuple[int, ...], suffix: str, tmp_path: Path
) -> None:
    values = random_bytes(*shape)
    content = idx_bytes(values)
    path = tmp_path / f"values-ubyte{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    read = read_idx(path)
    np.testing.assert_array_equal(read, values)
    assert read.dtype == np.uint8
    assert read.flags.writeable
    np.testing.assert_array_equal(read_idx(str(path), dimensions=len(shape)), values)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"", "must begin with an IDX magic number (00 00 08 ..), got an empty file"),
        (b"\0\0\x08", "must begin with an IDX magic number (00 00 08 ..), got 00 00 08"),
        (b"\x89PNG\r\n", "must begin with an IDX magic number (00 00 08 ..), got 89 50 4e 47"),
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "must hold uint8 values (IDX type 08), got type 0d"),
        (b"\0\0\x08\0", "must have 1 to 3 dimension(s), got 0"),
        (b"\0\0\x08\xff" + bytes(2000), "must have 1 to 3 dimension(s), got 255"),
        (b"\0\0\x08\x03\0\0\0\x01\0\0", "must have a header of 16 bytes, got 10"),
        (b"\0\0\x08\x02\0\0\0\0\xff\xff\xff\xff", "must have sizes above 0, got [0, 4294967295]"),
    ],
)
def test_bad_idx_header_names_the_file(content: bytes, wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "bad-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path} {wanted}")):
        read_idx(path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("change", [-1, 1])
def test_truncated_or_overlong_idx_names_the_file(change: int, suffix: str, tmp_path: Path) -> None:
    content = idx_bytes(random_bytes(2, 3, 5))
    content = content[:change] if change < 0 else content + bytes(change)
    path = tmp_path / f"values-ubyte{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    pattern = re.escape(f"{path} must be 46 bytes for [2, 3, 5], got {46 + change}")
    with pytest.raises(ValueError, match=pattern):
        read_idx(path)


def test_idx_size_beyond_the_file_is_refused_before_it_is_allocated(tmp_path: Path) -> None:
    path = tmp_path / "huge-ubyte"
    path.write_bytes(b"\0\0\x08\x03" + b"\xff" * 12)
    with pytest.raises(ValueError, match=message(path, "must be", "got 16")):
        read_idx(path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_no_more_of_an_idx_file_is_read_than_its_header_says(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"bomb-ubyte{suffix}"
    content = idx_bytes(random_bytes(2, 3, 5)) + bytes(1 << 26)
    path.write_bytes(gzip.compress(content) if suffix else content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message(path, "must be 46 bytes for [2, 3, 5], got")):
            read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_gzip_that_cannot_hold_what_its_header_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "huge-ubyte.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\x03" + b"\xff" * 12))
    with pytest.raises(ValueError, match=message(path, "must be", "do not unpack to so many")):
        read_idx(path)


def test_a_pipe_in_the_place_of_a_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "values-ubyte")
    with pytest.raises(FileNotFoundError, match=message("no regular file", "values-ubyte")):
        read_idx(tmp_path / "values-ubyte")


def damage_flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "no checksum": lambda content: content[:-8],
    "flipped byte": damage_flip,
    "wrong checksum": lambda content: content[:-8] + bytes(8),
    "not gzip": lambda content: b"plain" + content,
    "trailing bytes": lambda content: content + b"more",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_corrupt_gzip_names_the_file(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "values-ubyte.gz"
    path.write_bytes(DAMAGES[damage](gzip.compress(idx_bytes(random_bytes(20, 5, 5)))))
    with pytest.raises(ValueError, match=re.escape(f"{path} must be a whole gzip file, got: ")):
        read_idx(path)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "."),
        ("mnist", "raw"),
        ("mnist", "MNIST/raw"),
        ("fashion-mnist", "."),
        ("fashion-mnist", "raw"),
        ("fashion-mnist", "FashionMNIST/raw"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_mnist_values_survive_every_layout(
    name: str, folder: str, compressed: bool, tmp_path: Path
) -> None:
    values = write_mnist(tmp_path / folder, compressed=compressed)
    data = load_dataset(name, str(tmp_path))
    np.testing.assert_array_equal(data.train_images[:, 0].numpy(), values[IDX_FILES[0]])
    np.testing.assert_array_equal(data.train_labels.numpy(), values[IDX_FILES[1]])
    np.testing.assert_array_equal(data.test_images[:, 0].numpy(), values[IDX_FILES[2]])
    np.testing.assert_array_equal(data.test_labels.numpy(), values[IDX_FILES[3]])
    assert data.train_images.shape == (5, 1, 6, 7)
    assert (data.name, data.num_classes) == (name, 10)
    assert_contract(data)


@pytest.mark.parametrize(
    ("name", "other"), [("mnist", "FashionMNIST/raw"), ("fashion-mnist", "MNIST/raw")]
)
def test_mnist_and_fashion_mnist_are_not_mistaken_for_each_other(
    name: str, other: str, tmp_path: Path
) -> None:
    write_mnist(tmp_path / other)
    with pytest.raises(FileNotFoundError, match=message("root must be a folder with", name)):
        load_dataset(name, tmp_path)


@pytest.mark.parametrize("absent", IDX_FILES)
def test_absent_mnist_file_is_named_and_not_taken_from_elsewhere(
    absent: str, tmp_path: Path
) -> None:
    write_mnist(tmp_path)
    write_mnist(tmp_path / "raw")
    (tmp_path / absent).unlink()
    with pytest.raises(FileNotFoundError, match=message(f"no {absent} or {absent}.gz", tmp_path)):
        load_dataset("mnist", tmp_path)


def test_mnist_images_and_labels_of_different_number_name_both_files(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / IDX_FILES[1]).write_bytes(idx_bytes(np.zeros(4, dtype=np.uint8)))
    pattern = message(
        f"{tmp_path / IDX_FILES[1]} must hold 5 labels like {tmp_path / IDX_FILES[0]}, got 4"
    )
    with pytest.raises(ValueError, match=pattern):
        load_dataset("mnist", tmp_path)


def test_mnist_labels_in_the_place_of_images_are_refused(tmp_path: Path) -> None:
    values = write_mnist(tmp_path)
    (tmp_path / IDX_FILES[2]).write_bytes(idx_bytes(values[IDX_FILES[3]]))
    pattern = re.escape(f"{tmp_path / IDX_FILES[2]} must have 3 dimension(s), got 1")
    with pytest.raises(ValueError, match=pattern):
        load_dataset("mnist", tmp_path)


def test_mnist_label_out_of_range_names_the_file(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / IDX_FILES[3]).write_bytes(idx_bytes(np.array([3, 10], dtype=np.uint8)))
    pattern = re.escape(f"{tmp_path / IDX_FILES[3]} must hold labels in [0, 10), got 3 to 10")
    with pytest.raises(ValueError, match=pattern):
        load_dataset("mnist", tmp_path)


def test_mnist_test_images_of_another_size_name_both_files(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / IDX_FILES[2]).write_bytes(idx_bytes(random_bytes(2, 7, 7)))
    pattern = message(tmp_path / IDX_FILES[2], "images of [6, 7] like", "got [7, 7]")
    with pytest.raises(ValueError, match=pattern):
        load_dataset("mnist", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("version", ["binary", "python"])
def test_cifar_values_survive_every_place(name: str, version: str, tmp_path: Path) -> None:
    cifar = Cifar(name)
    folder = cifar.write(tmp_path / "extracted", version)
    cifar.check(folder)
    cifar.check(folder.parent)
    cifar.write_archive(tmp_path, version)
    cifar.check(tmp_path)


def test_cifar_archive_with_dotted_members_is_read(tmp_path: Path) -> None:
    cifar = Cifar("cifar10")
    cifar.write_archive(tmp_path, "binary", prefix="./")
    cifar.check(tmp_path)


def test_python_3_pickles_of_cifar_are_read_too(tmp_path: Path) -> None:
    cifar = Cifar("cifar100")
    folder = cifar.write(tmp_path, "python")
    for part in cifar.parts:
        content = python3_pickle(cifar.pickled(part))
        assert b"_codecs" in content
        (folder / part).write_bytes(content)
    cifar.check(tmp_path)


def test_python_2_pickles_in_the_tests_are_like_the_originals() -> None:
    content = python2_pickle(Cifar("cifar10").pickled("test_batch"))
    assert content.startswith(b"\x80\x02}q")
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in content
    assert b"_codecs" not in content


def test_extracted_cifar_comes_before_the_archive(tmp_path: Path) -> None:
    cifar = Cifar("cifar100")
    cifar.write(tmp_path, "python")
    (tmp_path / cifar.archives["binary"]).write_bytes(b"never read")
    cifar.check(tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("version", ["binary", "python"])
def test_absent_cifar_batch_is_named(name: str, version: str, tmp_path: Path) -> None:
    cifar = Cifar(name)
    folder = cifar.write(tmp_path, version)
    absent = cifar.file_name(cifar.parts[0], version)
    (folder / absent).unlink()
    with pytest.raises(FileNotFoundError, match=message(tmp_path, f"no {absent} in {folder}")):
        load_dataset(name, tmp_path)


def test_batch_absent_from_the_archive_is_named(tmp_path: Path) -> None:
    cifar = Cifar("cifar10")
    cifar.parts.remove("data_batch_3")
    path = cifar.write_archive(tmp_path, "binary")
    with pytest.raises(FileNotFoundError, match=message(f"no data_batch_3.bin in {path}")):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_corrupt_archive_names_the_file(damage: str, tmp_path: Path) -> None:
    path = Cifar("cifar100").write_archive(tmp_path, "binary")
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    pattern = re.escape(f"{path} must be a whole .tar.gz file, got: ")
    with pytest.raises(ValueError, match=pattern):
        load_dataset("cifar100", tmp_path)


def test_gzip_that_is_no_archive_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(gzip.compress(b"no tar at all" * 100))
    pattern = re.escape(f"{path} must be a whole .tar.gz file, got: ")
    with pytest.raises(ValueError, match=pattern):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize("what", ["wanted file", "other file", "header", "end"])
def test_an_archive_that_unpacks_to_more_than_any_of_cifar_is_refused(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar_format, "_MOST_OF_AN_ARCHIVE", 1 << 20)
    monkeypatch.setattr(cifar_format, "_MOST_OF_A_FILE", 1 << 19)
    cifar = Cifar("cifar100")
    path = cifar.write_archive(tmp_path, "binary")
    size = {"wanted file": 1 << 19 | 1, "other file": 1 << 40, "header": 1 << 40, "end": 0}[what]
    member = tarfile.TarInfo({"wanted file": "cifar-100-binary/train.bin"}.get(what, "other"))
    member.size, member.type = size, tarfile.XHDTYPE if what == "header" else tarfile.REGTYPE
    with gzip.open(path) as stream:
        content = stream.read()
    if what == "end":
        content += bytes(1 << 21)
    else:
        content = member.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 21)
    path.write_bytes(gzip.compress(content))
    pattern = message(path, "must be a whole .tar.gz file, got:", "claims|unpacks to more than")
    with pytest.raises(ValueError, match=pattern.replace(r"\|", "|")):
        load_dataset("cifar100", tmp_path)


def test_a_file_larger_than_any_of_cifar_is_not_read(tmp_path: Path) -> None:
    path = Cifar("cifar100").write(tmp_path, "binary") / "train.bin"
    os.truncate(path, 1 << 40)
    with pytest.raises(ValueError, match=message(path, "must be a file of CIFAR, got 1099511")):
        load_dataset("cifar100", tmp_path)


@pytest.mark.parametrize(
    ("name", "record_size", "change"),
    [("cifar10", 3073, -1), ("cifar10", 3073, 1), ("cifar100", 3074, -1), ("cifar100", 3074, 1)],
)
def test_odd_sized_binary_batch_names_the_file(
    name: str, record_size: int, change: int, tmp_path: Path
) -> None:
    cifar = Cifar(name)
    path = cifar.write(tmp_path, "binary") / cifar.file_name(cifar.parts[-1], "binary")
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + bytes(change))
    pattern = message(
        f"{path} must be a multiple of {record_size} bytes", f"got {3 * record_size + change}"
    )
    with pytest.raises(ValueError, match=pattern):
        load_dataset(name, tmp_path)


def test_empty_binary_batch_names_the_file(tmp_path: Path) -> None:
    path = Cifar("cifar100").write(tmp_path, "binary") / "train.bin"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=message(path, "multiple of 3074 bytes", "got 0")):
        load_dataset("cifar100", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("version", ["binary", "python"])
def test_cifar_label_out_of_range_names_the_file(name: str, version: str, tmp_path: Path) -> None:
    cifar = Cifar(name)
    part = cifar.parts[0]
    cifar.labels[part] = np.array([1, 2, cifar.num_classes], dtype=np.uint8)
    path = cifar.write(tmp_path, version) / cifar.file_name(part, version)
    wanted = f"{path} must hold labels in [0, {cifar.num_classes}), got 1 to {cifar.num_classes}"
    with pytest.raises(ValueError, match=re.escape(wanted)):
        load_dataset(name, tmp_path)


def test_damaged_member_of_an_archive_is_named_with_its_archive(tmp_path: Path) -> None:
    cifar = Cifar("cifar10")
    cifar.labels["data_batch_2"] = np.array([1, 2, 200], dtype=np.uint8)
    path = cifar.write_archive(tmp_path, "binary")
    member = f"{path}:cifar-10-batches-bin/data_batch_2.bin"
    with pytest.raises(ValueError, match=re.escape(f"{member} must hold labels in [0, 10)")):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({b"data": None}, "must hold b'data' as an array, got NoneType"),
        (
            {b"data": np.zeros((3, 3072), dtype=np.float32)},
            "must hold b'data' as [N, 3072] uint8, got [3, 3072] float32",
        ),
        (
            {b"data": np.zeros((3, 3071), dtype=np.uint8)},
            "must hold b'data' as [N, 3072] uint8, got [3, 3071] uint8",
        ),
        (
            {b"data": np.zeros((0, 3072), dtype=np.uint8), b"labels": []},
            "must hold b'data' as [N, 3072] uint8, got [0, 3072] uint8",
        ),
        ({b"labels": [1, 2]}, "must hold 3 b'labels' like b'data', got 2"),
        ({b"labels": [1, 2, 0.5]}, "must hold b'labels' as a list of int, got other values"),
        ({b"labels": b"abc"}, "must hold b'labels' as a list of int, got other values"),
        ({b"labels": [1, 2, -1]}, "must hold labels in [0, 10), got -1 to 2"),
        (
            {b"labels": [1, 2, 2**70]},
            "must hold labels in [0, 10), got 1 to 1180591620717411303424",
        ),
    ],
)
def test_odd_pickled_batch_names_the_file(
    change: dict[bytes, Any], wanted: str, tmp_path: Path
) -> None:
    cifar = Cifar("cifar10")
    path = cifar.write(tmp_path, "python") / "data_batch_4"
    path.write_bytes(python2_pickle(cifar.pickled("data_batch_4") | change))
    with pytest.raises(ValueError, match=re.escape(f"{path} {wanted}")):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ([1, 2], "must be a dict, got list"),
        ({b"labels": [1]}, "must have the keys b'data' and b'labels', got no {b'data'}"),
        ({b"data": [1], 3: 4}, "must have the keys b'data' and b'labels', got no {b'labels'}"),
    ],
)
def test_pickle_of_something_else_names_the_file(
    value: object, wanted: str, tmp_path: Path
) -> None:
    path = Cifar("cifar10").write(tmp_path, "python") / "test_batch"
    path.write_bytes(python2_pickle(value))
    with pytest.raises(ValueError, match=re.escape(f"{path} {wanted}")):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize("kept", [0, 1, 40, 3000, -1])
def test_truncated_pickle_names_the_file(kept: int, tmp_path: Path) -> None:
    path = Cifar("cifar100").write(tmp_path, "python") / "train"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=message(f"{path} must be a CIFAR pickle", "got")):
        load_dataset("cifar100", tmp_path)


def test_bytes_after_a_pickle_name_the_file(tmp_path: Path) -> None:
    path = Cifar("cifar100").write(tmp_path, "python") / "train"
    path.write_bytes(path.read_bytes() + b"more")
    pattern = re.escape(f"{path} must end with its pickle, got 4 bytes more")
    with pytest.raises(ValueError, match=pattern):
        load_dataset("cifar100", tmp_path)


class Call:
    """Pickles as a call of any function: what a malicious file would hold."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("archived", [False, True])
def test_malicious_pickle_is_refused_and_not_run(
    protocol: int, archived: bool, tmp_path: Path
) -> None:
    proof = tmp_path / "proof"
    cifar = Cifar("cifar100")
    batch = {b"data": Call(os.system, f"touch {proof}"), b"fine_labels": []}
    content = pickle.dumps(batch, protocol=protocol)
    cifar.content = lambda part, version: content  # type: ignore[method-assign]
    if archived:
        source: object = f"{cifar.write_archive(tmp_path, 'python')}:cifar-100-python/test"
    else:
        source = cifar.write(tmp_path, "python") / "train"
    pattern = message(source, "must be a CIFAR pickle", f"the global {os.name}.system, refused")
    with pytest.raises(ValueError, match=pattern):
        load_dataset("cifar100", tmp_path)
    assert not proof.exists()

    # The file was a real one: what it asks for is done once it is trusted.
    pickle.loads(content, encoding="bytes")
    assert proof.exists()


def test_a_pickled_array_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    path = Cifar("cifar10").write(tmp_path, "python") / "data_batch_1"
    array = Call(np.ndarray, (1 << 20, 3072), np.dtype(np.uint8))  # 3 GB that nobody wrote
    path.write_bytes(pickle.dumps({b"data": array, b"labels": [0]}, protocol=2))
    pattern = message(path, "must hold b'data' itself, got an array of 3221225472 bytes")
    with pytest.raises(ValueError, match=pattern):
        load_dataset("cifar10", tmp_path)


def test_a_pickle_may_not_ask_for_other_encodings(tmp_path: Path) -> None:
    path = Cifar("cifar10").write(tmp_path, "python") / "data_batch_1"
    path.write_bytes(pickle.dumps({b"data": Call(codecs.encode, "text", "rot13")}, protocol=2))
    with pytest.raises(ValueError, match=message(path, "the encoding 'rot13', refused")):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("module_name", "global_name"),
    [
        ("builtins", "eval"),
        ("__builtin__", "eval"),
        ("numpy", "load"),
        ("numpy", "ndarray.tofile"),
        ("numpy.core.multiarray", "scalar"),
        ("_codecs", "lookup"),
        ("os", "system"),
    ],
)
def test_globals_beyond_the_few_of_cifar_are_refused(
    module_name: str, global_name: str, tmp_path: Path
) -> None:
    path = Cifar("cifar10").write(tmp_path, "python") / "data_batch_1"
    path.write_bytes(f"\x80\x02c{module_name}\n{global_name}\n.".encode("latin1"))
    pattern = message(path, f"the global {module_name}.{global_name}, refused")
    with pytest.raises(ValueError, match=pattern):
        load_dataset("cifar10", tmp_path)


def balanced_labels(per_class: int = 20, num_classes: int = 10) -> torch.Tensor:
    labels = torch.arange(num_classes).repeat(per_class)
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("num_labels", [10, 40, 47, 199, 200])
def test_split_is_balanced_distinct_and_sorted(num_labels: int) -> None:
    labels = balanced_labels()
    indices = split_labels(labels, num_labels, seed=3, num_classes=10)
    assert indices.dtype == torch.int64
    assert indices.shape == (num_labels,)
    assert (indices.diff() > 0).all()
    counts = labels[indices].bincount(minlength=10)
    assert counts.min() == num_labels // 10
    assert (counts - num_labels // 10 <= 1).all()


def test_split_depends_on_the_seed_alone() -> None:
    labels = balanced_labels()
    splits = []
    for global_seed in (0, 1):
        random.seed(global_seed)
        np.random.seed(global_seed)  # noqa: NPY002
        torch.manual_seed(global_seed)
        splits.append(split_labels(labels, 47, seed=3, num_classes=10))
    assert torch.equal(*splits)
    assert not torch.equal(splits[0], split_labels(labels, 47, seed=4, num_classes=10))


def test_split_orders_are_the_permutations_that_were_recorded() -> None:
    assert split_order(3, 12).tolist() == [6, 9, 8, 7, 11, 4, 0, 10, 1, 3, 2, 5]
    assert split_order(3, 10, 1).tolist() == [5, 0, 3, 2, 7, 6, 4, 8, 1, 9]
    assert split_order(2**62 + 1, 9).tolist() == [4, 0, 3, 1, 7, 2, 5, 8, 6]


def test_split_leaves_global_random_states_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    split_labels(balanced_labels(), 47, seed=3, num_classes=10)
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()


def test_remainder_of_a_split_goes_to_classes_drawn_with_the_seed() -> None:
    labels = balanced_labels()
    chosen = set()
    for seed in range(40):
        counts = labels[split_labels(labels, 11, seed, 10)].bincount(minlength=10)
        chosen.add(int(counts.argmax()))
    assert chosen == set(range(10))


def test_every_sample_is_chosen_by_some_seed() -> None:
    labels = balanced_labels(per_class=4)
    seen = torch.cat([split_labels(labels, 10, seed, 10) for seed in range(60)])
    assert len(seen.unique()) == 40


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32])
def test_split_takes_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    labels = balanced_labels()
    assert torch.equal(split_labels(labels.to(dtype), 47, 3, 10), split_labels(labels, 47, 3, 10))


@pytest.mark.parametrize(
    ("labels", "num_labels", "num_classes", "wanted"),
    [
        (balanced_labels(), 9, 10, "num_labels must be at least num_classes = 10, got 9"),
        (balanced_labels(), 201, 10, "num_labels must be at most len(labels) = 200, got 201"),
        (torch.empty(0, dtype=torch.int64), 2, 2, "at most len(labels) = 0, got 2"),
        (balanced_labels(), 10, 0, "num_classes must be at least 1, got 0"),
        (balanced_labels(), 20, 9, "labels must be in [0, num_classes = 9), got 0 to 9"),
        (balanced_labels() - 1, 20, 10, "labels must be in [0, num_classes = 10), got -1 to 8"),
        (torch.zeros(4), 4, 1, "labels must be [N] integers, got [4] of torch.float32"),
        (torch.zeros(4, dtype=torch.bool), 4, 1, "got [4] of torch.bool"),
        (torch.zeros(4, 2, dtype=torch.int64), 4, 1, "[N] integers, got [4, 2] of torch.int64"),
        (
            torch.tensor([0, 0, 0, 0, 1, 2, 2, 2]),
            6,
            3,
            "labels must hold at least 2 samples of class 1 for num_labels = 6, got 1",
        ),
        (
            torch.tensor([0, 0, 2, 2]),
            3,
            3,
            "labels must hold at least 1 samples of class 1 for num_labels = 3, got 0",
        ),
    ],
)
def test_impossible_split_names_the_argument(
    labels: torch.Tensor, num_labels: int, num_classes: int, wanted: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(wanted)):
        split_labels(labels, num_labels, seed=0, num_classes=num_classes)
