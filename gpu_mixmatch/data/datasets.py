"""The data sets of the command line, read from local files. Nothing is ever downloaded."""

import codecs
import gzip
import io
import math
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from gpu_mixmatch.data.collate import collate
from gpu_mixmatch.data.images import ImageIndex, open_images
from gpu_mixmatch.sampling import epoch_order

# A view that no loader draws with, so that a split and an epoch of the same seed are unrelated.
_SPLIT_VIEW = 65_535

_Bytes = npt.NDArray[np.uint8]
_Labels = npt.NDArray[np.int64]
_Batch = tuple[_Bytes, _Labels]


class ImageData(NamedTuple):
    """Images and labels of one data set, whole and in memory.

    Attributes:
        train_images: ``[N, C, H, W]`` uint8, contiguous.
        train_labels: ``[N]`` int64 in ``[0, num_classes)``.
        test_images: ``[M, C, H, W]`` uint8, contiguous.
        test_labels: ``[M]`` int64 in ``[0, num_classes)``.
        num_classes: Number of classes.
        name: The name given to `load_dataset`.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    name: str

    def split(self, num_labels: int | None, seed: int) -> tuple[TensorDataset, TensorDataset]:
        """Return the labelled and the unlabelled part; the latter is all of it, as in the paper.

        Args:
            num_labels: Labelled images, balanced over the classes; None takes all.
            seed: Key of the choice.

        Raises:
            ValueError: If there are not so many labels; see `split_labels`.
        """
        images, labels = self.train_images, self.train_labels
        if num_labels is not None:
            chosen = split_labels(labels, num_labels, seed, self.num_classes)
            images, labels = images[chosen], labels[chosen]
        return TensorDataset(images, labels), TensorDataset(self.train_images)


class ImageFiles(Dataset[Any]):
    """Encoded images as a map-style data set: PIL decodes those that are asked for.

    A sample is (image, label), or the image alone where the index has no labels. Images are upright
    RGB; the largest centred square is resized, bilinear and antialiased, as `DaliLoader` does it.

    Args:
        index: Where the images lie.
        size: Height and width of the samples, in pixels.

    Raises:
        ImportError: If Pillow is not installed.
        ValueError: If ``size`` is below 1.
    """

    def __init__(self, index: ImageIndex, size: int) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise ImportError(
                'decoding images needs Pillow: pip install "gpu-mixmatch[cli]"'
            ) from error
        self.index = index
        self.size = size

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> Any:
        image = self._decoded(number)
        return image if self.index.labels is None else (image, int(self.index.labels[number]))

    def load(self, numbers: Sequence[int] | None = None) -> Tensor:
        """Decode some images, or all of them, ``[n, 3, size, size]`` uint8."""
        numbers = range(len(self)) if numbers is None else numbers
        images: Tensor = collate([self._decoded(number) for number in numbers])
        return images

    def _decoded(self, number: int) -> Any:
        from PIL import Image, ImageOps

        try:
            with Image.open(io.BytesIO(self.index.read(number).data)) as encoded:
                if encoded.mode == "F" or encoded.mode.startswith("I"):
                    raise ValueError(f"it has more than 8 bits per channel, mode {encoded.mode}")
                image = ImageOps.exif_transpose(encoded)
                # PIL warns of the direct way from a palette with transparency to RGB
                image = image.convert("RGBA") if image.mode == "P" else image
                image = image.convert("RGB")
        # A damaged PNG raises SyntaxError, other formats what their decoder stumbles over.
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise ValueError(
                f"{self.index.name(number)} must be an image that decodes, got: {error}. "
                "gpu-mixmatch check-images lists all that do not"
            ) from error
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        return image.resize(
            (self.size, self.size),
            Image.Resampling.BILINEAR,
            box=(left, top, left + side, top + side),
        )


class FolderData(NamedTuple):
    """A folder with the parts of a data set, of which only the test images are in memory.

    Attributes:
        labelled: Images of ``labelled/CLASS/``, with labels.
        unlabelled: Images of ``unlabelled/``, at any depth.
        test_images: ``[M, 3, H, W]`` uint8, of ``test/CLASS/``; the labelled images where there is
            no such folder.
        test_labels: ``[M]`` int64 in ``[0, num_classes)``.
        class_names: Names of the class folders, in the order of their labels.
        has_test: Whether there is a folder ``test``.
        name: "folder".
    """

    labelled: ImageFiles
    unlabelled: ImageFiles
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    has_test: bool
    name: str

    @property
    def num_classes(self) -> int:
        """Number of class folders."""
        return len(self.class_names)

    def split(self, num_labels: int | None, seed: int) -> tuple[ImageFiles, ImageFiles]:
        """Return the labelled and the unlabelled part; see `ImageData.split`."""
        if num_labels is None:
            return self.labelled, self.unlabelled
        index = self.labelled.index
        chosen = split_labels(_labels_of(index), num_labels, seed, self.num_classes)
        paths = [index.paths[number] for number in chosen.tolist()]
        part = ImageIndex(paths, labels=_labels_of(index)[chosen], classes=index.classes)
        return ImageFiles(part, self.labelled.size), self.unlabelled


def load_dataset(
    name: str, root: str | Path | None = None, size: int = 32
) -> ImageData | FolderData:
    """Load a data set from local files.

    - ``digits`` comes with scikit-learn: 8x8 grey images, 1297 to train and 500 to test. The rows
      were written by 13 people, one after another, so the last rows would test on writers never
      seen in training, and on three or four of them only. The test rows are spread evenly over
      each class instead: both parts hold every writer and, as nearly as 500 allows, the same share
      of each class. Accuracy on it therefore says nothing about new writers.
    - ``mnist`` and ``fashion-mnist`` are four IDX files, plain or ``.gz``, in ``root``,
      ``root/raw``, or ``root/MNIST/raw`` (``root/FashionMNIST/raw``). Debian's package
      ``dataset-fashion-mnist`` puts them in ``/usr/share/datasets/fashion-mnist``.
    - ``cifar10`` and ``cifar100`` (fine labels) are the binary or the python version, extracted
      (``root`` is the folder or its parent) or as the original ``.tar.gz`` in ``root``. Where
      several are there, extracted comes before archive and binary before python.
    - ``folder`` is a folder of JPEG, PNG or WebP files: ``root/labelled/CLASS/``,
      ``root/unlabelled/`` and, to test on, ``root/test/CLASS/``. They are decoded when they are
      asked for, but for the test images.

    Args:
        name: One of ``digits``, ``mnist``, ``fashion-mnist``, ``cifar10``, ``cifar100``,
            ``folder``.
        root: Folder that holds the files; not used for ``digits``.
        size: Height and width that the images of a ``folder`` are brought to, in pixels.

    Returns:
        Images as given in the files, in file order.

    Raises:
        ValueError: If the name is unknown, ``root`` is missing, or a file is damaged.
        FileNotFoundError: If ``root`` does not hold the files.
        ImportError: If ``digits`` is asked for and scikit-learn is not installed.
    """
    if name == "digits":
        return _load_digits()
    if name not in _CONTENTS:
        names = ", ".join(["digits", *_CONTENTS])
        raise ValueError(f"name must be one of {names}, got {name!r}")
    if root is None:
        raise ValueError(
            f"root must be a folder with {_CONTENTS[name]} for {name}, got None; "
            "nothing is downloaded"
        )
    root = Path(root).expanduser()
    if name == "folder":
        return _open_folder(root, size)
    return _load_cifar(name, root) if name in _CIFAR_LAYOUTS else _load_mnist(name, root)


def read_idx(path: str | Path, *, dimensions: int | None = None) -> npt.NDArray[np.uint8]:
    """Read an IDX file of uint8 values, the format of MNIST.

    Args:
        path: The file; gzip if its name ends in ``.gz``.
        dimensions: Number of dimensions wanted: 1 for labels, 3 for images. None takes 1 to 3.

    Returns:
        A writable array with the shape that the file declares.

    Raises:
        ValueError: If the file is not IDX, holds another type or number of dimensions, or is
            shorter or longer than its header says.
    """
    path = Path(path)
    content = _read_bytes(path)
    if len(content) < 4 or content[:2] != b"\0\0":
        found = content[:4].hex(" ") or "an empty file"
        raise ValueError(f"{path} must begin with an IDX magic number (00 00 08 ..), got {found}")
    type_code, num_dimensions = content[2], content[3]
    if type_code != 0x08:
        raise ValueError(f"{path} must hold uint8 values (IDX type 08), got type {type_code:02x}")
    if num_dimensions not in ((1, 2, 3) if dimensions is None else (dimensions,)):
        wanted = "1 to 3" if dimensions is None else dimensions
        raise ValueError(f"{path} must have {wanted} dimension(s), got {num_dimensions}")
    header_size = 4 + 4 * num_dimensions
    if len(content) < header_size:
        raise ValueError(f"{path} must have a header of {header_size} bytes, got {len(content)}")
    shape = struct.unpack_from(f">{num_dimensions}I", content, 4)
    if 0 in shape:
        raise ValueError(f"{path} must have sizes above 0, got {list(shape)}")
    size = header_size + math.prod(shape)
    if len(content) != size:
        raise ValueError(f"{path} must be {size} bytes for {list(shape)}, got {len(content)}")
    return np.frombuffer(content, dtype=np.uint8, offset=header_size).reshape(shape).copy()


def split_labels(labels: Tensor, num_labels: int, seed: int, num_classes: int) -> Tensor:
    """Choose the samples whose labels a semi-supervised run may see, balanced over classes.

    Each class gives ``num_labels // num_classes`` samples; the remainder comes one each from
    classes drawn with the seed. The choice depends on nothing but the arguments.

    Args:
        labels: ``[N]`` integers in ``[0, num_classes)``.
        num_labels: Number of samples to choose, from ``num_classes`` to ``N``.
        seed: Key of the draw.
        num_classes: Number of classes.

    Returns:
        ``[num_labels]`` int64 indices into ``labels``, ascending, on the CPU.

    Raises:
        ValueError: If ``labels`` is not as above, ``num_labels`` is out of range, or a class has
            fewer samples than it must give.
    """
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be [N] integers, got {list(labels.shape)} of {labels.dtype}")
    labels = labels.cpu().long()
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if num_labels < num_classes:
        raise ValueError(
            f"num_labels must be at least num_classes = {num_classes}, got {num_labels}"
        )
    if num_labels > len(labels):
        raise ValueError(
            f"num_labels must be at most len(labels) = {len(labels)}, got {num_labels}"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels must be in [0, num_classes = {num_classes}), "
            f"got {labels.min().item()} to {labels.max().item()}"
        )

    per_class, remainder = divmod(num_labels, num_classes)
    quotas = [per_class] * num_classes
    for class_index in epoch_order(seed, 1, num_classes, view=_SPLIT_VIEW)[:remainder].tolist():
        quotas[class_index] += 1

    order = epoch_order(seed, 0, len(labels), view=_SPLIT_VIEW)
    shuffled_labels = labels[order]
    chosen = []
    for class_index, quota in enumerate(quotas):
        members = order[shuffled_labels == class_index]
        if len(members) < quota:
            raise ValueError(
                f"labels must hold at least {quota} samples of class {class_index} for "
                f"num_labels = {num_labels}, got {len(members)}"
            )
        chosen.append(members[:quota])
    return torch.cat(chosen).sort().values


def _image_data(name: str, num_classes: int, train: _Batch, test: _Batch) -> ImageData:
    (train_images, train_labels), (test_images, test_labels) = train, test
    return ImageData(
        train_images=torch.from_numpy(np.ascontiguousarray(train_images)),
        train_labels=torch.from_numpy(train_labels),
        test_images=torch.from_numpy(np.ascontiguousarray(test_images)),
        test_labels=torch.from_numpy(test_labels),
        num_classes=num_classes,
        name=name,
    )


def _check_labels(labels: npt.NDArray[Any], num_classes: int, source: str | Path) -> _Labels:
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"{source} must hold labels in [0, {num_classes}), got {labels.min()} to {labels.max()}"
        )
    return labels.astype(np.int64)


def _read_bytes(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as stream:
            return stream.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} must be a whole gzip file, got: {error}") from error


def _missing(name: str, root: Path, detail: str = "") -> FileNotFoundError:
    if detail:
        found = detail
    elif root.is_dir():
        entries = sorted(entry.name for entry in root.iterdir())
        found = f"a folder with {', '.join(entries[:8]) or 'nothing'}"
        found += f" and {len(entries) - 8} more" if len(entries) > 8 else ""
    else:
        found = "a path that is no folder"
    return FileNotFoundError(
        f"root must be a folder with {_CONTENTS[name]} for {name}, got {root}: {found}"
    )


def _load_digits() -> ImageData:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            'the digits data set needs scikit-learn: pip install "gpu-mixmatch[cli]"'
        ) from error
    digits: Any = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]  # [1797, 1, 8, 8]
    labels = digits.target.astype(np.int64)
    is_test = _spread_test_rows(labels, num_classes=10, num_test=500)
    train = images[~is_test], labels[~is_test]
    return _image_data("digits", 10, train, (images[is_test], labels[is_test]))


def _spread_test_rows(labels: _Labels, num_classes: int, num_test: int) -> npt.NDArray[np.bool_]:
    shares = np.bincount(labels, minlength=num_classes) * num_test
    quotas = shares // len(labels)
    largest_remainders = np.argsort(-(shares % len(labels)), kind="stable")
    quotas[largest_remainders[: num_test - quotas.sum()]] += 1
    is_test = np.zeros(len(labels), dtype=np.bool_)
    for class_index, quota in enumerate(quotas):
        rows = np.flatnonzero(labels == class_index)
        steps = np.arange(len(rows) + 1) * quota // len(rows)  # rises from 0 to quota
        is_test[rows[np.diff(steps) == 1]] = True
    return is_test


_MNIST_FOLDERS = {
    "mnist": ("", "raw", "MNIST/raw"),
    "fashion-mnist": ("", "raw", "FashionMNIST/raw"),
}
_IDX_PARTS = ("train", "t10k")


def _load_mnist(name: str, root: Path) -> ImageData:
    folders = [root / sub_folder for sub_folder in _MNIST_FOLDERS[name]]
    # The first folder with any of the four: a file missing beside it is an error, not a reason
    # to mix folders.
    folder = next((folder for folder in folders if any(map(_idx_file, _idx_paths(folder)))), None)
    if folder is None:
        raise _missing(name, root)
    files = []
    for path in _idx_paths(folder):
        file = _idx_file(path)
        if file is None:
            raise _missing(name, root, f"no {path.name} or {path.name}.gz in {folder}")
        files.append(file)
    train = _read_idx_pair(files[0], files[1])
    test = _read_idx_pair(files[2], files[3])
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ValueError(
            f"{files[2]} must hold images of {list(train[0].shape[2:])} like {files[0]}, "
            f"got {list(test[0].shape[2:])}"
        )
    return _image_data(name, 10, train, test)


def _idx_paths(folder: Path) -> list[Path]:
    kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
    return [folder / f"{part}-{kind}" for part in _IDX_PARTS for kind in kinds]


def _idx_file(path: Path) -> Path | None:
    candidates = (path, path.with_name(path.name + ".gz"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _read_idx_pair(images_path: Path, labels_path: Path) -> _Batch:
    images = read_idx(images_path, dimensions=3)
    labels = read_idx(labels_path, dimensions=1)
    if len(labels) != len(images):
        raise ValueError(
            f"{labels_path} must hold {len(images)} labels like {images_path}, got {len(labels)}"
        )
    return images[:, None], _check_labels(labels, 10, labels_path)


class _CifarLayout(NamedTuple):
    folder: str
    archive: str
    train_files: tuple[str, ...]
    test_file: str
    parse: Callable[[bytes, str], _Batch]


# All that a CIFAR batch needs. `_reconstruct` goes by its numpy 1 and numpy 2 names and is taken
# from an array, so that nothing private is imported; `encode` is how Python 3 writes bytes in
# protocol 2.
_ALLOWED_GLOBALS = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("_codecs", "encode"): codecs.encode,
}


class _CifarUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in _ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"the global {module_name}.{global_name}, refused")
        return _ALLOWED_GLOBALS[module_name, global_name]


def _parse_binary(content: bytes, source: str, *, label_bytes: int, num_classes: int) -> _Batch:
    record_size = label_bytes + 3072
    if not content or len(content) % record_size:
        raise ValueError(
            f"{source} must be a multiple of {record_size} bytes, one record per image, "
            f"got {len(content)}"
        )
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, record_size)
    # CIFAR-100 writes the coarse label first; the fine one stands right before the pixels.
    labels = _check_labels(records[:, label_bytes - 1], num_classes, source)
    return records[:, label_bytes:].reshape(-1, 3, 32, 32), labels


def _parse_pickle(content: bytes, source: str, *, label_key: bytes, num_classes: int) -> _Batch:
    stream = io.BytesIO(content)
    try:
        batch = _CifarUnpickler(stream, encoding="bytes").load()
    # A damaged pickle can raise nearly anything.
    except Exception as error:
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
    return images.reshape(-1, 3, 32, 32), _check_labels(np.array(labels), num_classes, source)


_CIFAR10_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_CIFAR_LAYOUTS = {
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


def _load_cifar(name: str, root: Path) -> ImageData:
    layout, place = _find_cifar(name, root)
    names = (*layout.train_files, layout.test_file)
    files = _folder_files(place, names) if place.is_dir() else _archive_files(place, layout, names)
    batches = {file: layout.parse(content, source) for file, source, content in files}
    absent = [file for file in names if file not in batches]
    if absent:
        raise _missing(name, root, f"no {', '.join(absent)} in {place}")
    images, labels = zip(*(batches[file] for file in layout.train_files), strict=True)
    train = np.concatenate(images), np.concatenate(labels)
    return _image_data(name, _CIFAR_CLASSES[name], train, batches[layout.test_file])


def _find_cifar(name: str, root: Path) -> tuple[_CifarLayout, Path]:
    layouts = _CIFAR_LAYOUTS[name]
    for layout in layouts:
        for folder in (root, root / layout.folder):
            if any((folder / file).is_file() for file in (*layout.train_files, layout.test_file)):
                return layout, folder
    for layout in layouts:
        if (root / layout.archive).is_file():
            return layout, root / layout.archive
    raise _missing(name, root)


def _folder_files(folder: Path, names: tuple[str, ...]) -> Iterator[tuple[str, str, bytes]]:
    for name in names:
        if (folder / name).is_file():
            yield name, str(folder / name), (folder / name).read_bytes()


def _archive_files(
    path: Path, layout: _CifarLayout, names: tuple[str, ...]
) -> Iterator[tuple[str, str, bytes]]:
    wanted = {PurePosixPath(layout.folder, name): name for name in names}
    try:
        # One pass, in the archive's order: a gzip stream only seeks forward cheaply.
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                name = wanted.get(PurePosixPath(member.name))
                content = archive.extractfile(member) if name else None
                if name and content:
                    yield name, f"{path}:{member.name}", content.read()
            # The checksum stands after the last member.
            while stream.read(1 << 20):
                pass
    except (EOFError, gzip.BadGzipFile, zlib.error, tarfile.TarError) as error:
        raise ValueError(f"{path} must be a whole .tar.gz file, got: {error}") from error


def _open_folder(root: Path, size: int) -> FolderData:
    for part in ("labelled", "unlabelled"):
        if not (root / part).is_dir():
            raise _missing("folder", root)
    labelled = open_images(root / "labelled", labelled=True)
    unlabelled = replace(open_images(root / "unlabelled"), labels=None, classes=())
    has_test = (root / "test").is_dir()
    test = open_images(root / "test", labelled=True) if has_test else labelled
    if test.classes != labelled.classes:
        raise ValueError(
            f"root must have the same classes in test as in labelled, {list(labelled.classes)}, "
            f"got {list(test.classes)}"
        )
    return FolderData(
        labelled=ImageFiles(labelled, size),
        unlabelled=ImageFiles(unlabelled, size),
        test_images=ImageFiles(test, size).load(),
        test_labels=_labels_of(test),
        class_names=labelled.classes,
        has_test=has_test,
        name="folder",
    )


def _labels_of(index: ImageIndex) -> Tensor:
    assert index.labels is not None  # open_images sees to it
    return index.labels


_IDX_CONTENTS = "{train,t10k}-{images-idx3,labels-idx1}-ubyte, plain or .gz,"
_CONTENTS = (
    dict.fromkeys(_MNIST_FOLDERS, _IDX_CONTENTS)
    | {
        name: " or ".join(f"{layout.folder}/ or {layout.archive}" for layout in layouts)
        for name, layouts in _CIFAR_LAYOUTS.items()
    }
    | {"folder": "labelled/CLASS/ and unlabelled/"}
)
