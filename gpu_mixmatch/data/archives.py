"""Where the images of WebDataset tars and TFRecord files lie, found by headers alone."""

import mmap
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from gpu_mixmatch._validation import as_flag, as_text
from gpu_mixmatch.data.index import (
    HIDDEN,
    ImageIndex,
    PathLike,
    as_paths,
    is_passed_over,
    kind_of_file,
    regular_size,
    warn_of_left_out,
)

_SECOND_IMAGES = "second images of a sample, which is told by its name up to the first dot"
_MOST_DIGITS = 18  # of a label, so that it is an int64
_BYTES_LIST, _INT64_LIST = 1, 3  # fields of a tf.train.Feature


def web_dataset(
    paths: PathLike | Sequence[PathLike], *, labelled: bool = False, label_suffix: str = "cls"
) -> ImageIndex:
    """Find the images in WebDataset tars, which must not be compressed.

    A sample's files share their name up to the first dot; its image is the one with a suffix of
    `index.IMAGE_SUFFIXES`, and the first one if there are several. Only headers and labels are
    read, and nothing is extracted, so that a name such as ``../x.jpg`` is only a name. What
    `image_folder` passes over is passed over here, links and devices too; of two members of one
    name the later counts, as for tar. A warning names what looks like an image and is left out.

    Args:
        paths: The tars, or one.
        labelled: Whether to read labels.
        label_suffix: Suffix of the file that holds a sample's label, an integer in digits.

    Raises:
        OSError: If there is no such file.
        ValueError: If a file is no tar, is cut short or goes on after its end, or a label is wanted
            and missing.
    """
    labelled = as_flag("labelled", labelled)
    label_suffix = as_text("label_suffix", label_suffix)
    found: list[tuple[str, str, int, int]] = []
    labels: list[int] = []
    left_out: Counter[str] = Counter()
    for path in map(str, as_paths("paths", paths)):
        images: dict[str, tarfile.TarInfo] = {}
        digits: dict[str, bytes] = {}
        size = regular_size(path)
        try:
            with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    is_whole = member.isreg() and not member.issparse()
                    most = size - member.offset_data if is_whole else member.size
                    if not 0 <= member.size <= most:
                        raise tarfile.ReadError(
                            f"{member.name} claims {member.size} bytes, beyond the end"
                        )
                    folder, name = os.path.split(member.name)
                    stem, _, suffix = name.partition(".")
                    key = os.path.join(folder, stem)
                    if member.isdir():
                        continue
                    if any(map(is_passed_over, set(member.name.split("/")) - {".", ".."})):
                        left_out[HIDDEN] += 1
                    elif not is_whole:
                        left_out["links, devices and sparse files"] += 1
                    elif labelled and suffix == label_suffix:
                        content = archive.extractfile(member)
                        digits[key] = content.read(_MOST_DIGITS + 9).strip() if content else b""
                    elif reason := kind_of_file(name):
                        left_out[reason] += 1
                    elif key not in images or images[key].name == member.name:
                        left_out["members that a later one replaces"] += key in images
                        images[key] = member
                    else:
                        left_out[_SECOND_IMAGES] += 1
                _check_end(file, archive.offset, size)
        except Exception as error:  # tarfile trips over a damaged header by any exception
            raise ValueError(
                f"paths must be whole tars that are not compressed, got {path}: {error}"
            ) from error
        for key, member in images.items():
            found.append((path, member.name, member.offset_data, member.size))
            if labelled:
                text = digits.get(key, b"")
                if not (text.isdigit() and len(text) <= _MOST_DIGITS):
                    raise ValueError(
                        f"paths must hold an integer in {key}.{label_suffix}, got "
                        f"{digits.get(key)!r} in {path}"
                    )
                labels.append(int(text))
    left_out = +left_out
    warn_of_left_out([*map(str, as_paths("paths", paths))], left_out)
    return _archive_index(found, labels if labelled else None, left_out)


def _check_end(file: BinaryIO, start: int, size: int) -> None:
    """Raise if a tar does not end in two blocks of zeros, or goes on after them."""
    if size - start < 1024:
        raise tarfile.ReadError("it lacks the blocks of zeros at its end, so that it is cut short")
    file.seek(start)
    while content := file.read(1 << 20):
        if content.count(0) != len(content):
            raise tarfile.ReadError(
                f"after byte {start} it is damaged, or another tar was joined to it; give tars one "
                "by one"
            )


def tfrecords(
    paths: PathLike | Sequence[PathLike],
    *,
    labelled: bool = False,
    image_key: str = "image/encoded",
    label_key: str = "image/class/label",
) -> ImageIndex:
    """Find the images in TFRecord files of ``tf.train.Example``, without TensorFlow.

    The files must not be compressed. Lengths are held to the file; checksums are not looked at.

    Args:
        paths: The files, or one.
        labelled: Whether to read labels.
        image_key: Feature that holds the encoded image.
        label_key: Feature that holds the label, an integer from 0, taken as it stands.

    Raises:
        OSError: If there is no such file.
        ValueError: If a file is cut short or no TFRecord, or a feature is missing or of the wrong
            kind.
    """
    labelled = as_flag("labelled", labelled)
    image_key, label_key = as_text("image_key", image_key), as_text("label_key", label_key)
    found: list[tuple[str, str, int, int]] = []
    labels: list[int] = []
    empty = 0
    for path in map(str, as_paths("paths", paths)):
        if regular_size(path) == 0:
            empty += 1
            continue
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer,
        ):
            for number, (start, stop) in enumerate(_records(buffer, path)):
                try:
                    features = dict(_features(buffer, start, stop))
                    if image_key in features:
                        found.append((path, f"record {number}", *features[image_key].span()))
                    if labelled and label_key in features:
                        labels.append(features[label_key].integer(buffer))
                except _DamagedError as error:
                    raise ValueError(
                        f"paths must hold a tf.train.Example in every record, with bytes in "
                        f"{image_key!r}{f' and an integer from 0 in {label_key!r}' * labelled}, "
                        f"got {error} in record {number} of {path}"
                    ) from error
                for key in (image_key, label_key) if labelled else (image_key,):
                    if key not in features:
                        raise ValueError(
                            f"paths must hold the feature {key!r} in every record, got "
                            f"{sorted(features)} in record {number} of {path}"
                        )
    left_out = {"empty files": empty} if empty else {}
    return _archive_index(found, labels if labelled else None, left_out)


class _DamagedError(Exception):
    """A record is not what it should be; the message says what it is."""


class _Value(NamedTuple):
    """The first value of a feature: its kind, a field of tf.train.Feature, and where it lies."""

    kind: int
    start: int
    stop: int

    def span(self) -> tuple[int, int]:
        """Return first byte and number of bytes of a value that is bytes."""
        if self.kind != _BYTES_LIST:
            raise _DamagedError("a list of numbers in place of bytes")
        return self.start, self.stop - self.start

    def integer(self, buffer: mmap.mmap) -> int:
        """Return a value that is an integer."""
        if self.kind != _INT64_LIST:
            raise _DamagedError("a label that is no integer")
        value, _ = _varint(buffer, self.start, self.stop)
        if value >= 2**63:
            raise _DamagedError(f"the label {value - 2**64}")
        return value


def _archive_index(
    found: list[tuple[str, str, int, int]],
    labels: list[int] | None,
    left_out: Mapping[str, int],
) -> ImageIndex:
    spans = np.array([place[2:] for place in found], dtype=np.int64).reshape(-1, 2)
    return ImageIndex(
        [path for path, *_ in found],
        spans,
        [key for _, key, *_ in found],
        None if labels is None else torch.tensor(labels, dtype=torch.int64),
        left_out=dict(left_out),
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


def _features(buffer: mmap.mmap, start: int, stop: int) -> Iterator[tuple[str, _Value]]:
    """Yield the name of each feature of an Example, and its first value."""
    for _, *example in _fields(buffer, start, stop):
        for _, *entry in _fields(buffer, *example):
            parts = {number: (first, last) for number, first, last in _fields(buffer, *entry)}
            if 1 in parts and 2 in parts:
                name = buffer[slice(*parts[1])].decode(errors="replace")
                for kind, *values in _fields(buffer, *parts[2]):
                    for _, first, last in _fields(buffer, *values):
                        yield name, _Value(kind, first, last)
                        break


def _fields(buffer: mmap.mmap, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, start and stop of each field of a protocol buffer message."""
    while start < stop:
        tag, start = _varint(buffer, start, stop)
        kind = tag & 7
        if kind == 2:  # bytes, text, messages and packed numbers
            size, start = _varint(buffer, start, stop)
        elif kind == 0:
            size = _varint(buffer, start, stop)[1] - start
        else:
            size = {1: 8, 5: 4}.get(kind, stop - start)
        if size > stop - start:
            raise _DamagedError(f"a field of {size} bytes where {stop - start} are left")
        yield tag >> 3, start, start + size
        start += size


def _varint(buffer: mmap.mmap, start: int, stop: int) -> tuple[int, int]:
    """Read an integer of 7 bits a byte, 64 in all; return it and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        if start >= stop:
            raise _DamagedError("an integer that is cut short")
        byte = buffer[start]
        start += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value % 2**64, start
    raise _DamagedError("an integer of more than 64 bits")
