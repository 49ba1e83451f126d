"""Where the images of a folder, a list or archives lie."""

import errno
import os
import stat
import unicodedata
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from gpu_mixmatch._validation import as_flag, as_path
from gpu_mixmatch.data.archives import tfrecords, web_dataset
from gpu_mixmatch.data.index import (
    FOUND_BEFORE,
    HIDDEN,
    NOT_REGULAR,
    SUFFIXES_READ,
    ImageIndex,
    PathLike,
    as_paths,
    describe_left_out,
    is_passed_over,
    kind_of_file,
    regular_size,
    warn_of_left_out,
)

__all__ = ["ImageIndex", "file_list", "image_folder", "open_images", "tfrecords", "web_dataset"]

_MAX_LABEL = 2**63 - 1  # of int64

_Parts = tuple[str, ...]


def open_images(
    source: ImageIndex | PathLike | Sequence[PathLike], *, labelled: bool = False
) -> ImageIndex:
    """Find the images of a folder, a list, tars or TFRecords; the name tells which it is.

    Args:
        source: A folder (`image_folder`), a ``.txt`` list (`file_list`), one or several ``.tar``
            (`web_dataset`) or ``.tfrecord`` files (`tfrecords`), or an index, returned as it is.
        labelled: Whether labels are wanted.

    Raises:
        OSError: If a file is not there or cannot be read.
        TypeError: If the source is none of these.
        ValueError: If the source is of no known kind, holds no image, or no labels that are wanted.
    """
    labelled = as_flag("labelled", labelled)
    if isinstance(source, ImageIndex):
        index = source
    else:
        single = isinstance(source, str | os.PathLike)
        paths = as_paths("source", source)
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
        raise ValueError(
            f"source must hold at least one image, got none in {source}{_but(index.left_out)}"
        )
    if labelled and index.labels is None:
        raise ValueError(f"source must have labels, got none in {source}")
    return index


def image_folder(root: PathLike, *, labelled: bool = False) -> ImageIndex:
    """Find the images below a folder, at any depth, sorted by path.

    Where all of them lie in folders below it, the first such folder is the class of an image:
    labels number the sorted names of these folders.

    Passed over are entries that are hidden (their names begin with ".") or of the system
    (`index.SYSTEM_NAMES`, such as ``__MACOSX`` and ``lost+found``), files of suffixes other than
    `index.IMAGE_SUFFIXES`, and pipes, sockets and devices. Links are followed, and each real file
    and folder is taken once, by a path without links if it has one; hard links are one file.
    ``left_out`` of the result counts what was left out, and a warning names what looks like an
    image. A link to nothing counts as an image that cannot be read, if its name is one's.

    Names of classes are compared and given in Unicode's composed form (NFC), whichever form a disk
    has.

    Args:
        root: The folder.
        labelled: Whether labels are wanted. Without it, folders that cannot be numbered as classes
            give no labels.

    Raises:
        OSError: If a folder cannot be looked into.
        ValueError: If ``root`` is no folder. If labels are wanted: if an image lies in no class or,
            by links, in two, if a class has no image that is not empty, or two have one name.
    """
    labelled, root = as_flag("labelled", labelled), as_path("root", root)
    if not root.is_dir():
        raise ValueError(f"root must be a folder, got {root}")
    found = _Scan(root)
    files = sorted(found.unique(labelled), key=lambda file: file.order)
    left_out = dict(found.left_out)
    warn_of_left_out(root, left_out)
    paths = [str(root.joinpath(*file.parts)) for file in files]
    outside = next((file for file in files if len(file.parts) == 1), None)
    if outside is not None:
        if labelled:
            raise ValueError(
                "root must hold a folder of images per class, got the image "
                f"{outside.parts[0]} in {root}"
            )
        return ImageIndex(paths, left_out=left_out)
    trouble = _why_no_classes(root, found, files)
    if trouble:
        if labelled:
            raise ValueError(trouble)
        return ImageIndex(paths, left_out=left_out)
    classes = sorted({_composed(file.parts[0]) for file in files})
    numbers = {name: number for number, name in enumerate(classes)}
    labels = torch.tensor([numbers[_composed(file.parts[0])] for file in files], dtype=torch.int64)
    return ImageIndex(paths, labels=labels, classes=tuple(classes), left_out=left_out)


def file_list(path: PathLike, *, labelled: bool = False) -> ImageIndex:
    """Read a list of images: a path per line and, after a tab, its label.

    A path that is listed again, with the same label, is taken once.

    Args:
        path: A UTF-8 text file; relative paths in it begin at its folder.
        labelled: Whether a label is wanted. A space before it will then do, as in DALI's own lists.

    Raises:
        OSError: If ``path`` is no file.
        ValueError: If a label is wanted and missing, or given twice and not the same, or a listed
            path is no file.
    """
    labelled, path = as_flag("labelled", labelled), as_path("path", path)
    regular_size(path)
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    if "\0" in text:
        raise ValueError(f"path must be a list in UTF-8, got {path}, which has bytes of 0")
    lines: dict[str, tuple[int, int | None]] = {}  # number and label
    repeated = 0
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        name, *digits = line.rsplit("\t" if "\t" in line or not labelled else None, 1)
        label = _label(digits, number, line, path) if labelled else None
        name = os.path.join(path.parent, name)
        first, first_label = lines.setdefault(name, (number, label))
        if first_label != label:
            raise ValueError(
                f"path must list an image with one label, got {first_label} in line {first} and "
                f"{label} in line {number} of {path}: {name!r}"
            )
        repeated += first != number
    missing = [name for name in lines if not os.path.isfile(name)]
    if missing:
        raise ValueError(
            f"path must list files that exist, got line {lines[missing[0]][0]} of {path}: "
            f"{missing[0]!r}" + (f", and {len(missing) - 1} more" if missing[1:] else "")
        )
    left_out = {"lines that repeat another": repeated} if repeated else {}
    warn_of_left_out(path, left_out)
    labels = [label for _, label in lines.values() if label is not None]
    return ImageIndex(
        [*lines],
        labels=torch.tensor(labels, dtype=torch.int64) if labelled else None,
        left_out=left_out,
    )


def _label(digits: list[str], number: int, line: str, path: Path) -> int:
    text = digits[0].strip() if digits else ""
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) <= _MAX_LABEL):
        raise ValueError(
            "path must list an image and its label, an integer from 0, in every line, got line "
            f"{number} of {path}: {line[:200]!r}"
        )
    return int(text)


class _File(NamedTuple):
    """A file with the name of an image.

    Attributes:
        parts: Its path below the root.
        is_linked: Whether it was reached through a link.
        identity: What tells real files apart; None where there is none.
        size: In bytes; 0 where it cannot be told.
    """

    parts: _Parts
    is_linked: bool
    identity: tuple[int, ...] | None
    size: int

    @property
    def order(self) -> tuple[_Parts, _Parts]:
        """What files are sorted by: the same on disks of either Unicode form."""
        return tuple(map(_composed, self.parts)), self.parts


class _Scan:
    """What lies below a folder; each real folder is looked into once, so that loops end.

    Attributes:
        files: Files with names of images, some of them by several paths.
        folders: The folders right below the root, which may be classes.
        left_out: How many entries are not in ``files``, by the reason.
    """

    def __init__(self, root: Path) -> None:
        self.files: list[_File] = []
        self.folders: list[str] = []
        self.left_out: Counter[str] = Counter()
        self._root = root
        # with the folders above: a link to one of them leads back here, past all its other folders
        above = root.resolve().parents
        self._seen = {_identity(place.stat()) for place in (root, *above)}
        self._waiting: deque[tuple[_Parts, bool]] = deque([((), False)])
        self._links: deque[_Parts] = deque()  # to folders: looked into after all without links
        while self._waiting or self._links:
            if self._waiting:
                self._look_into(*self._waiting.popleft())
            else:
                parts = self._links.popleft()
                if self._is_new(root.joinpath(*parts).stat()):
                    self._look_into(parts, True)

    def unique(self, labelled: bool) -> Iterator[_File]:
        """Yield each real file once; with labels, raise where it lies in two classes."""
        first: dict[tuple[int, ...], _File] = {}
        for file in sorted(self.files, key=lambda file: (file.is_linked, file.order)):
            known = first.setdefault(file.identity, file) if file.identity else file
            if known is file:
                yield file
                continue
            self.left_out[FOUND_BEFORE] += 1
            if labelled and _composed(known.parts[0]) != _composed(file.parts[0]):
                one, other = ("/".join(same.parts) for same in (known, file))
                raise ValueError(
                    f"root must hold an image in one class, got {one} and {other}, which are one "
                    f"file, in {self._root}"
                )

    def _look_into(self, parts: _Parts, is_linked: bool) -> None:
        with os.scandir(self._root.joinpath(*parts)) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                self._see(entry, (*parts, entry.name), is_linked)

    def _see(self, entry: os.DirEntry[str], parts: _Parts, is_linked: bool) -> None:
        if is_passed_over(entry.name):
            self.left_out[HIDDEN] += 1
            return
        is_link = entry.is_symlink()
        try:
            status = entry.stat()
        except OSError as error:
            if not is_link or error.errno not in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
                raise
            status = None  # a link to nothing
        if status and stat.S_ISDIR(status.st_mode):
            if len(parts) == 1:
                self.folders.append(entry.name)
            if is_link:
                self._links.append(parts)
            elif self._is_new(status):
                self._waiting.append((parts, is_linked))
        elif status and not stat.S_ISREG(status.st_mode):
            self.left_out[NOT_REGULAR] += 1
        elif reason := kind_of_file(entry.name):
            self.left_out[reason] += 1
        else:
            size = status.st_size if status else 0
            # size and time, for disks that give one inode to several files
            identity = (*_identity(status), size, status.st_mtime_ns) if status else None
            self.files.append(_File(parts, is_linked or is_link, identity, size))

    def _is_new(self, status: os.stat_result) -> bool:
        identity = _identity(status)
        if identity in self._seen:
            self.left_out[FOUND_BEFORE] += 1
            return False
        self._seen.add(identity)
        return True


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _why_no_classes(root: Path, found: _Scan, files: list[_File]) -> str:
    """Say why the folders right below a root cannot be numbered as classes, or ""."""
    folders: dict[str, str] = {}
    for name in found.folders:
        twin = folders.setdefault(_composed(name), name)
        if twin != name:
            return (
                "root must hold class folders of different names, got one name in two Unicode "
                f"forms, {twin!a} and {name!a}, in {root}"
            )
    filled = {_composed(file.parts[0]) for file in files if file.size}
    if empty := sorted(folders.keys() - filled):
        return (
            "root must hold an image that is not empty in every class folder, got none in "
            f"{', '.join(empty)} in {root}{_but(found.left_out)}. Suffixes that are read: "
            f"{SUFFIXES_READ}"
        )
    return ""


def _but(left_out: Mapping[str, int]) -> str:
    return f"; left out {describe_left_out(left_out)}" if left_out else ""
