"""IDX files: MNIST and Fashion-MNIST."""

import math
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from gpu_mixmatch._validation import as_integer, as_path
from gpu_mixmatch.data.formats.common import (
    Batch,
    ImageData,
    check_labels,
    image_data,
    missing,
    opened,
)

MNIST_FOLDERS = {
    "mnist": ("", "raw", "MNIST/raw"),
    "fashion-mnist": ("", "raw", "FashionMNIST/raw"),
}
_IDX_PARTS = ("train", "t10k")
_MOST_UNPACKED = 1032  # bytes that deflate makes of one
CONTENTS = "{train,t10k}-{images-idx3,labels-idx1}-ubyte, plain or .gz,"


def read_idx(path: str | Path, *, dimensions: int | None = None) -> npt.NDArray[np.uint8]:
    """Read an IDX file of uint8 values, the format of MNIST.

    No more is read than the header says, and that must fit the file.

    Args:
        path: The file; gzip if its name ends in ``.gz``.
        dimensions: Number of dimensions wanted: 1 for labels, 3 for images. None takes 1 to 3.

    Returns:
        A writable array with the shape that the file declares.

    Raises:
        ValueError: If the file is not IDX, holds another type or number of dimensions, or is
            shorter or longer than its header says.
    """
    path = as_path("path", path)
    if dimensions is not None:
        dimensions = as_integer("dimensions", dimensions, least=1, most=3)
    with opened(path) as file:
        shape = _idx_shape(file, path, dimensions)
        header_size = 4 + 4 * len(shape)
        size = header_size + math.prod(shape)
        wanted = f"{path} must be {size} bytes for {list(shape)}"
        packed_size = path.stat().st_size
        if path.suffix != ".gz" and packed_size != size:
            raise ValueError(f"{wanted}, got {packed_size}")
        if size > packed_size * _MOST_UNPACKED:
            raise ValueError(f"{wanted}, got {packed_size}, which do not unpack to so many")
        # one more: it tells a longer file, and makes gzip look at its checksum
        values = file.read(size - header_size + 1)
    read = header_size + len(values)
    if read != size:
        raise ValueError(f"{wanted}, got {read}{' or more' * (read > size)}")
    return np.frombuffer(values, dtype=np.uint8).reshape(shape).copy()


def _idx_shape(file: BinaryIO, path: Path, dimensions: int | None) -> tuple[int, ...]:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        found = magic.hex(" ") or "an empty file"
        raise ValueError(f"{path} must begin with an IDX magic number (00 00 08 ..), got {found}")
    type_code, num_dimensions = magic[2], magic[3]
    if type_code != 0x08:
        raise ValueError(f"{path} must hold uint8 values (IDX type 08), got type {type_code:02x}")
    if num_dimensions not in ((1, 2, 3) if dimensions is None else (dimensions,)):
        wanted = "1 to 3" if dimensions is None else dimensions
        raise ValueError(f"{path} must have {wanted} dimension(s), got {num_dimensions}")
    sizes = file.read(4 * num_dimensions)
    if len(sizes) < 4 * num_dimensions:
        raise ValueError(
            f"{path} must have a header of {4 + 4 * num_dimensions} bytes, got {4 + len(sizes)}"
        )
    shape: tuple[int, ...] = struct.unpack(f">{num_dimensions}I", sizes)
    if 0 in shape:
        raise ValueError(f"{path} must have sizes above 0, got {list(shape)}")
    return shape


def load_mnist(name: str, root: Path) -> ImageData:
    """Read the four IDX files of ``name`` below ``root``."""
    folders = [root / sub_folder for sub_folder in MNIST_FOLDERS[name]]
    # the first folder with any of the four files: a missing one is an error, and is not taken from
    # another folder
    folder = next((folder for folder in folders if any(map(_idx_file, _idx_paths(folder)))), None)
    if folder is None:
        raise missing(name, root, CONTENTS)
    files = []
    for path in _idx_paths(folder):
        file = _idx_file(path)
        if file is None:
            raise missing(name, root, CONTENTS, f"no {path.name} or {path.name}.gz in {folder}")
        files.append(file)
    train = _read_idx_pair(files[0], files[1])
    test = _read_idx_pair(files[2], files[3])
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ValueError(
            f"{files[2]} must hold images of {list(train[0].shape[2:])} like {files[0]}, "
            f"got {list(test[0].shape[2:])}"
        )
    return image_data(name, 10, train, test)


def _idx_paths(folder: Path) -> list[Path]:
    kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
    return [folder / f"{part}-{kind}" for part in _IDX_PARTS for kind in kinds]


def _idx_file(path: Path) -> Path | None:
    candidates = (path, path.with_name(path.name + ".gz"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _read_idx_pair(images_path: Path, labels_path: Path) -> Batch:
    images = read_idx(images_path, dimensions=3)
    labels = read_idx(labels_path, dimensions=1)
    if len(labels) != len(images):
        raise ValueError(
            f"{labels_path} must hold {len(images)} labels like {images_path}, got {len(labels)}"
        )
    return images[:, None], check_labels(labels, 10, labels_path)
