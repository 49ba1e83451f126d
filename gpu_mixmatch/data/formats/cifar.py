"""CIFAR-10 and CIFAR-100, binary or pickled, extracted or as the archive."""

import gzip
import io
import pickle
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from gpu_mixmatch.data.formats.common import (
    Batch,
    ImageData,
    check_labels,
    image_data,
    missing,
)


class _CifarLayout(NamedTuple):
    """The names of a version's files, and what reads one of them."""

    folder: str
    archive: str
    train_files: tuple[str, ...]
    test_file: str
    parse: Callable[[bytes, str], Batch]


# CIFAR's largest file has 155 MB, its archives unpack to 187 MB
_MOST_OF_A_FILE = 1 << 28
_MOST_OF_AN_ARCHIVE = 1 << 29


def _latin1(text: str, encoding: str) -> bytes:
    """What a pickle may ask of `codecs.encode`, which knows many other encodings."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the encoding {encoding!r}, refused")
    return text.encode("latin1")


# All that a pickled batch needs, so that it can run nothing else. `_reconstruct` has another name
# in numpy 1 than in numpy 2 and is taken from an array, which imports nothing private; `encode` is
# how Python 3 writes bytes in protocol 2.
_ALLOWED_GLOBALS = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("_codecs", "encode"): _latin1,
}


class _CifarUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in _ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"the global {module_name}.{global_name}, refused")
        return _ALLOWED_GLOBALS[module_name, global_name]


def _parse_binary(content: bytes, source: str, *, label_bytes: int, num_classes: int) -> Batch:
    record_size = label_bytes + 3072
    if not content or len(content) % record_size:
        raise ValueError(
            f"{source} must be a multiple of {record_size} bytes, one record per image, "
            f"got {len(content)}"
        )
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, record_size)
    # of CIFAR-100's two labels the fine one stands right before the pixels
    labels = check_labels(records[:, label_bytes - 1], num_classes, source)
    return records[:, label_bytes:].reshape(-1, 3, 32, 32), labels


def _parse_pickle(content: bytes, source: str, *, label_key: bytes, num_classes: int) -> Batch:
    stream = io.BytesIO(content)
    try:
        batch = _CifarUnpickler(stream, encoding="bytes").load()
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(
            f"{source} must be a CIFAR pickle of numpy arrays and plain values, "
            f"got {type(error).__name__}: {error}"
        ) from error
    trailing = len(content) - stream.tell()
    if trailing:
        raise ValueError(f"{source} must end with its pickle, got {trailing} bytes more")
    if not isinstance(batch, dict):
        raise ValueError(f"{source} must be a dict, got {type(batch).__name__}")
    if absent := {b"data", label_key} - batch.keys():
        raise ValueError(f"{source} must have the keys b'data' and {label_key!r}, got no {absent}")

    images, labels = batch[b"data"], batch[label_key]
    if isinstance(images, np.ndarray) and images.nbytes > len(content):
        raise ValueError(
            f"{source} must hold b'data' itself, got an array of {images.nbytes} bytes in a file "
            f"of {len(content)}"
        )
    if not isinstance(images, np.ndarray):
        raise ValueError(f"{source} must hold b'data' as an array, got {type(images).__name__}")
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072 or not len(images):
        raise ValueError(
            f"{source} must hold b'data' as [N, 3072] uint8, "
            f"got {list(images.shape)} {images.dtype}"
        )
    if not isinstance(labels, list) or any(type(label) is not int for label in labels):
        raise ValueError(f"{source} must hold {label_key!r} as a list of int, got other values")
    if len(labels) != len(images):
        raise ValueError(
            f"{source} must hold {len(images)} {label_key!r} like b'data', got {len(labels)}"
        )
    return images.reshape(-1, 3, 32, 32), check_labels(np.array(labels), num_classes, source)


_CIFAR10_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFAR_LAYOUTS = {
    "cifar10": (
        _CifarLayout(
            "cifar-10-batches-bin",
            "cifar-10-binary.tar.gz",
            tuple(f"{batch}.bin" for batch in _CIFAR10_BATCHES),
            "test_batch.bin",
            partial(_parse_binary, label_bytes=1, num_classes=10),
        ),
        _CifarLayout(
            "cifar-10-batches-py",
            "cifar-10-python.tar.gz",
            _CIFAR10_BATCHES,
            "test_batch",
            partial(_parse_pickle, label_key=b"labels", num_classes=10),
        ),
    ),
    "cifar100": (
        _CifarLayout(
            "cifar-100-binary",
            "cifar-100-binary.tar.gz",
            ("train.bin",),
            "test.bin",
            partial(_parse_binary, label_bytes=2, num_classes=100),
        ),
        _CifarLayout(
            "cifar-100-python",
            "cifar-100-python.tar.gz",
            ("train",),
            "test",
            partial(_parse_pickle, label_key=b"fine_labels", num_classes=100),
        ),
    ),
}
_CIFAR_CLASSES = {"cifar10": 10, "cifar100": 100}
CONTENTS = {
    name: " or ".join(f"{layout.folder}/ or {layout.archive}" for layout in layouts)
    for name, layouts in CIFAR_LAYOUTS.items()
}


def load_cifar(name: str, root: Path) -> ImageData:
    """Read the files of ``name`` below ``root``, or its archive there."""
    layout, place = _find_cifar(name, root)
    names = (*layout.train_files, layout.test_file)
    files = _folder_files(place, names) if place.is_dir() else _archive_files(place, layout, names)
    batches = {file: layout.parse(content, source) for file, source, content in files}
    absent = [file for file in names if file not in batches]
    if absent:
        raise missing(name, root, CONTENTS[name], f"no {', '.join(absent)} in {place}")
    images, labels = zip(*(batches[file] for file in layout.train_files), strict=True)
    train = np.concatenate(images), np.concatenate(labels)
    return image_data(name, _CIFAR_CLASSES[name], train, batches[layout.test_file])


def _find_cifar(name: str, root: Path) -> tuple[_CifarLayout, Path]:
    layouts = CIFAR_LAYOUTS[name]
    for layout in layouts:
        for folder in (root, root / layout.folder):
            if any((folder / file).is_file() for file in (*layout.train_files, layout.test_file)):
                return layout, folder
    for layout in layouts:
        if (root / layout.archive).is_file():
            return layout, root / layout.archive
    raise missing(name, root, CONTENTS[name])


def _folder_files(folder: Path, names: tuple[str, ...]) -> Iterator[tuple[str, str, bytes]]:
    for name in names:
        path = folder / name
        if path.is_file():
            if (size := path.stat().st_size) > _MOST_OF_A_FILE:
                raise ValueError(f"{path} must be a file of CIFAR, got {size} bytes")
            yield name, str(path), path.read_bytes()


class _Bounded(gzip.GzipFile):
    """A gzip file that unpacks to no more than any archive of CIFAR, whatever is asked of it."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0 or self.tell() + size > _MOST_OF_AN_ARCHIVE:
            raise tarfile.ReadError(f"it unpacks to more than {_MOST_OF_AN_ARCHIVE} bytes")
        return super().read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if offset > _MOST_OF_AN_ARCHIVE:
            raise tarfile.ReadError(f"it unpacks to more than {_MOST_OF_AN_ARCHIVE} bytes")
        return super().seek(offset, whence)


def _archive_files(
    path: Path, layout: _CifarLayout, names: tuple[str, ...]
) -> Iterator[tuple[str, str, bytes]]:
    wanted = {PurePosixPath(layout.folder, name): name for name in names}
    try:
        # one pass, in the archive's order: to seek back, gzip would begin again
        with _Bounded(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                if not 0 <= member.size <= _MOST_OF_A_FILE:
                    raise tarfile.ReadError(f"{member.name} claims {member.size} bytes")
                name = wanted.get(PurePosixPath(member.name))
                content = archive.extractfile(member) if name and member.isreg() else None
                if name and content:
                    yield name, f"{path}:{member.name}", content.read()
            # gzip checks its sum at the end of the stream, after the last member
            while stream.read(1 << 20):
                pass
    except Exception as error:  # tarfile trips over a damaged header by any exception
        raise ValueError(f"{path} must be a whole .tar.gz file, got: {error}") from error
