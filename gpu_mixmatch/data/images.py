"""Encoded images on disk: where each one lies, and its bytes."""

import mmap
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"))

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, eq=False)
class ImageIndex:
    """Where the images of a data set lie: whole files, or spans of archives.

    Attributes:
        paths: File of each image, N of them.
        spans: First byte and number of bytes, ``[N, 2]`` int64; None for whole files.
        keys: Name of each image within its archive; None for whole files.
        labels: ``[N]`` int64; None where there are none.
        classes: Names of the classes in the order of their labels, where they are known.
    """

    paths: Sequence[str]
    spans: NDArray[np.int64] | None = None
    keys: Sequence[str] | None = None
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, number: int) -> str:
        """Name an image in a message: its path and, in an archive, its key."""
        path = self.paths[number]
        return path if self.keys is None else f"{path}:{self.keys[number]}"

    def read(self, number: int) -> NDArray[np.uint8]:
        """Read the encoded bytes of an image."""
        with open(self.paths[number], "rb") as file:
            if self.spans is None:
                return np.frombuffer(file.read(), dtype=np.uint8)
            start, size = self.spans[number].tolist()
            file.seek(start)
            return np.frombuffer(file.read(size), dtype=np.uint8)


def open_images(
    source: ImageIndex | PathLike | Sequence[PathLike], *, labelled: bool = False
) -> ImageIndex:
    """Find the images of a folder, a list, tars or TFRecords; the name tells which it is.

    Args:
        source: A folder (`image_folder`), a ``.txt`` list (`file_list`), one or several ``.tar``
            (`web_dataset`) or ``.tfrecord`` files (`tfrecords`), or an index, returned as it is.
        labelled: Whether labels are wanted.

    Raises:
        ValueError: If the source is of no known kind, holds no image, or no labels that are wanted.
    """
    if isinstance(source, ImageIndex):
        index = source
    else:
        sources = [source] if isinstance(source, str | os.PathLike) else source
        paths = [Path(path) for path in sources]
        single = sources is not source
        suffixes = {path.suffix.lower() for path in paths}
        if single and paths[0].is_dir():
            index = image_folder(paths[0], labelled=labelled)
        elif single and suffixes == {".txt"}:
            index = file_list(paths[0], labelled=labelled)
        elif suffixes == {".tar"}:
            index = web_dataset(paths, labelled=labelled)
        elif suffixes and suffixes <= {".tfrecord", ".tfrecords"}:
            index = tfrecords(paths, labelled=labelled)
        else:
            raise ValueError(
                "source must be a folder, a .txt list, .tar or .tfrecord files, or what "
                f"image_folder, file_list, web_dataset or tfrecords returns, got {source!r}"
            )
    if len(index) == 0:
        raise ValueError(f"source must hold at least one image, got none in {source}")
    if labelled and index.labels is None:
        raise ValueError(f"source must have labels, got none in {source}")
    return index


def image_folder(root: PathLike, *, labelled: bool = False) -> ImageIndex:
    """Find the images below a folder, at any depth, sorted by path.

    Where all of them lie in folders below it, the first such folder is the class of an image:
    labels number the sorted names of these folders.

    Args:
        root: The folder. Files whose suffix is not in `IMAGE_SUFFIXES` are passed over.
        labelled: Whether labels are wanted.

    Raises:
        ValueError: If ``root`` is no folder, or labels are wanted and an image lies in no class.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"root must be a folder, got {root}")
    places = sorted(
        Path(folder, file).relative_to(root).parts
        for folder, _, files in os.walk(root, followlinks=True)
        for file in files
        if Path(file).suffix.lower() in IMAGE_SUFFIXES
    )
    paths = [str(root.joinpath(*place)) for place in places]
    outside = next((place for place in places if len(place) == 1), None)
    if outside is None:
        classes = sorted({place[0] for place in places})
        numbers = {name: number for number, name in enumerate(classes)}
        labels = torch.tensor([numbers[place[0]] for place in places], dtype=torch.int64)
        return ImageIndex(paths, labels=labels, classes=tuple(classes))
    if labelled:
        raise ValueError(
            f"root must hold a folder of images per class, got the image {outside[0]} in {root}"
        )
    return ImageIndex(paths)


def file_list(path: PathLike, *, labelled: bool = False) -> ImageIndex:
    """Read a list of images: a path per line and, after a tab, its label.

    Args:
        path: A UTF-8 text file; relative paths in it begin at its folder.
        labelled: Whether a label is wanted. A space before it will then do, as in DALI's own lists.

    Raises:
        ValueError: If a label is wanted and missing.
    """
    path = Path(path)
    paths, labels = [], []
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        name, *label = line.rsplit("\t" if "\t" in line or not labelled else None, 1)
        if labelled:
            if not label or not label[0].isdecimal():
                raise ValueError(
                    f"path must list an image and its label in every line, got line {number} of "
                    f"{path}: {line!r}"
                )
            labels.append(int(label[0]))
        paths.append(os.path.join(path.parent, name))
    return ImageIndex(paths, labels=torch.tensor(labels, dtype=torch.int64) if labelled else None)


def web_dataset(
    paths: Sequence[PathLike], *, labelled: bool = False, label_suffix: str = "cls"
) -> ImageIndex:
    """Find the images in WebDataset tars, which must not be compressed.

    A sample's files share their name up to the first dot; its image is the one with a suffix of
    `IMAGE_SUFFIXES`. Only headers and labels are read.

    Args:
        paths: The tars.
        labelled: Whether to read labels.
        label_suffix: Suffix of the file that holds a sample's label, an integer in digits.

    Raises:
        ValueError: If a file is no tar, or a label is wanted and missing.
    """
    found: list[tuple[str, str, int, int]] = []
    labels: list[int] = []
    for path in map(str, paths):
        images: dict[str, tarfile.TarInfo] = {}
        digits: dict[str, bytes] = {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in filter(tarfile.TarInfo.isfile, archive):
                    folder, file = os.path.split(member.name)
                    stem, _, suffix = file.partition(".")
                    key = os.path.join(folder, stem)
                    if f".{suffix.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES:
                        images.setdefault(key, member)
                    elif labelled and suffix == label_suffix:
                        content = archive.extractfile(member)
                        digits[key] = content.read().strip() if content else b""
        except tarfile.TarError as error:
            raise ValueError(
                f"paths must be tars that are not compressed, got {path}: {error}"
            ) from error
        for key, member in images.items():
            found.append((path, member.name, member.offset_data, member.size))
            if labelled:
                if not digits.get(key, b"").isdigit():
                    raise ValueError(
                        f"paths must hold an integer in {key}.{label_suffix}, got "
                        f"{digits.get(key)!r} in {path}"
                    )
                labels.append(int(digits[key]))
    return _archive_index(found, labels if labelled else None)


def tfrecords(
    paths: Sequence[PathLike],
    *,
    labelled: bool = False,
    image_key: str = "image/encoded",
    label_key: str = "image/class/label",
) -> ImageIndex:
    """Find the images in TFRecord files of ``tf.train.Example``, without TensorFlow.

    Args:
        paths: The files.
        labelled: Whether to read labels.
        image_key: Feature that holds the encoded image.
        label_key: Feature that holds the label, an integer, taken as it stands.

    Raises:
        ValueError: If a file is cut short or no TFRecord, or a feature is missing.
    """
    found: list[tuple[str, str, int, int]] = []
    labels: list[int] = []
    for path in map(str, paths):
        if os.path.getsize(path) == 0:
            continue
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer,
        ):
            for number, (start, stop) in enumerate(_records(buffer, path)):
                features = dict(_features(buffer, start, stop))
                for key in (image_key, label_key) if labelled else (image_key,):
                    if key not in features:
                        raise ValueError(
                            f"paths must hold the feature {key!r} in every record, got "
                            f"{sorted(features)} in record {number} of {path}"
                        )
                first, last = features[image_key]
                found.append((path, f"record {number}", first, last - first))
                if labelled:
                    labels.append(_integer(buffer, *features[label_key]))
    return _archive_index(found, labels if labelled else None)


def _archive_index(found: list[tuple[str, str, int, int]], labels: list[int] | None) -> ImageIndex:
    spans = np.array([place[2:] for place in found], dtype=np.int64).reshape(-1, 2)
    return ImageIndex(
        [path for path, *_ in found],
        spans,
        [key for _, key, *_ in found],
        None if labels is None else torch.tensor(labels, dtype=torch.int64),
    )


def _records(buffer: mmap.mmap, path: str) -> Iterator[tuple[int, int]]:
    """Yield each record's span: 8 bytes of length and 4 of checksum precede it, 4 follow it."""
    start = 0
    while start < len(buffer):
        size = int.from_bytes(buffer[start : start + 8], "little")
        stop = start + 12 + size
        if stop + 4 > len(buffer):
            raise ValueError(
                f"paths must be whole TFRecord files, got {path}, in which a record at byte "
                f"{start} claims {size} bytes"
            )
        yield start + 12, stop
        start = stop + 4


def _features(buffer: mmap.mmap, start: int, stop: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the name of each feature of an Example, and the span of its first value."""
    for _, *example in _fields(buffer, start, stop):
        for _, *entry in _fields(buffer, *example):
            parts = {number: (first, last) for number, first, last in _fields(buffer, *entry)}
            if 1 in parts and 2 in parts:
                name = buffer[slice(*parts[1])].decode(errors="replace")
                for _, *values in _fields(buffer, *parts[2]):  # a list of bytes, floats or integers
                    for _, first, last in _fields(buffer, *values):
                        yield name, (first, last)
                        break


def _fields(buffer: mmap.mmap, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, start and stop of each field of a protocol buffer message."""
    while start < stop:
        tag, start = _varint(buffer, start)
        kind = tag & 7
        if kind == 2:  # bytes, text, messages and packed numbers
            size, start = _varint(buffer, start)
        elif kind == 0:
            size = _varint(buffer, start)[1] - start
        else:
            size = {1: 8, 5: 4}.get(kind, stop - start)
        yield tag >> 3, start, start + size
        start += size


def _varint(buffer: mmap.mmap, start: int) -> tuple[int, int]:
    """Read an integer of 7 bits a byte; return it and the place after it."""
    value = shift = 0
    while True:
        byte = buffer[start]
        start += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, start


def _integer(buffer: mmap.mmap, start: int, stop: int) -> int:
    """Read the first varint of a span."""
    return _varint(buffer, start)[0]
