"""ImageIndex: where the encoded images of a data set lie, and their bytes."""

import os
import stat
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_mixmatch._validation import as_path

# JPEG by its four names, and the formats that both Pillow and DALI read; no GIF or AVIF, which DALI
# does not
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")
)
SUFFIXES_READ = ", ".join(sorted(IMAGE_SUFFIXES))

# Folders and files that systems and tools leave among people's images; and all that begin with "."
SYSTEM_NAMES = frozenset(
    (
        "__macosx",
        "__pycache__",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "@eadir",
        "@tmp",
        "#recycle",
        "#snapshot",
    )
)

# Suffixes of images that are not read: to leave one out is worth a warning
_OTHER_IMAGES = frozenset(
    (
        *(".gif", ".avif", ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".svg", ".ico", ".tga"),
        *(".psd", ".ppm", ".pgm", ".pbm", ".pnm", ".exr", ".hdr", ".dcm", ".dng", ".cr2", ".nef"),
        *(".arw", ".raw", ".eps", ".pcx", ".apng", ".mpo"),
    )
)

HIDDEN = "hidden or system entries"
OTHER_FILES = "files that are no images"
NOT_REGULAR = "pipes, sockets and devices"
FOUND_BEFORE = "other paths of the same files or folders"
_SAID_BY_COUNT_ALONE = frozenset((HIDDEN, OTHER_FILES))

_MAX_BYTES = 1 << 30  # more than the largest image that is read takes uncompressed

PathLike = str | os.PathLike[str]


class LeftOutWarning(UserWarning):
    """Something that looks like an image is left out of a data set."""


@dataclass(frozen=True, eq=False)
class ImageIndex:
    """Where the images of a data set lie: whole files, or spans of archives.

    Attributes:
        paths: File of each image, N of them.
        spans: First byte and number of bytes, ``[N, 2]`` int64; None for whole files.
        keys: Name of each image within its archive; None for whole files.
        labels: ``[N]`` int64; None where there are none.
        classes: Names of the classes in the order of their labels, where they are known.
        left_out: How many entries of the source are not among the images, by the reason.
    """

    paths: Sequence[str]
    spans: NDArray[np.int64] | None = None
    keys: Sequence[str] | None = None
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, number: int) -> str:
        """Name an image in a message: its path and, in an archive, its key."""
        path = self.paths[number]
        return path if self.keys is None else f"{path}:{self.keys[number]}"

    def read(self, number: int) -> NDArray[np.uint8]:
        """Read the encoded bytes of an image.

        Raises:
            OSError: If there is no such file, it is a pipe or a device, which might never end, or
                it is cut short or larger than any image.
        """
        path = self.paths[number]
        size = regular_size(path)
        start = 0
        if self.spans is not None:
            start, length = self.spans[number].tolist()
            if start + length > size:
                raise OSError(f"the archive has {size} bytes, of which {start + length} are wanted")
            size = length
        if size > _MAX_BYTES:
            raise OSError(f"it has {size} bytes, more than any image that is read")
        with open(path, "rb") as file:
            file.seek(start)
            return np.frombuffer(file.read(size), dtype=np.uint8)

    def take(self, numbers: Sequence[int]) -> "ImageIndex":
        """Return the index of some of the images; classes keep their labels."""
        rows = np.asarray(numbers, dtype=np.int64)
        return ImageIndex(
            [self.paths[number] for number in numbers],
            None if self.spans is None else self.spans[rows],
            None if self.keys is None else [self.keys[number] for number in numbers],
            None if self.labels is None else self.labels[torch.from_numpy(rows)],
            self.classes,
            self.left_out,
        )


def as_paths(name: str, value: PathLike | Sequence[PathLike]) -> list[Path]:
    """Return one path, or several, as a list.

    Raises:
        TypeError: If they are none.
        ValueError: If one has a character that no path has.
    """
    several = value if isinstance(value, list | tuple) else [value]
    return [as_path(name, path) for path in several]


def regular_size(path: PathLike) -> int:
    """Return the bytes of a file.

    Raises:
        OSError: If there is none, or it is a folder, a pipe, a socket or a device.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"it is no regular file: {os.fspath(path)}")
    return status.st_size


def is_passed_over(name: str) -> bool:
    """Tell whether an entry of a folder or archive is hidden, or of the system, by its name."""
    return name.startswith(".") or name.casefold() in SYSTEM_NAMES


def kind_of_file(name: str) -> str:
    """Return "" for an image by its suffix, else the reason to leave the file out."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in IMAGE_SUFFIXES:
        return ""
    return f"images in {suffix}" if suffix in _OTHER_IMAGES else OTHER_FILES


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """Say what was left out, and how many of each."""
    return ", ".join(f"{reason}: {count}" for reason, count in sorted(left_out.items()))


def warn_of_left_out(source: PathLike | Sequence[PathLike], left_out: Mapping[str, int]) -> None:
    """Warn if there is more to say than that hidden entries and other files were passed over."""
    worth = {reason: left_out[reason] for reason in left_out.keys() - _SAID_BY_COUNT_ALONE}
    if worth:
        warnings.warn(
            f"{source}: left out {describe_left_out(worth)}. Suffixes that are read: "
            f"{SUFFIXES_READ}",
            LeftOutWarning,
            stacklevel=4,
        )
