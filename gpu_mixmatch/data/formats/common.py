"""What readers share: a data set in memory, its split, and how files are read and refused."""

import errno
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from gpu_mixmatch.sampling import split_order

Bytes = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Batch = tuple[Bytes, Labels]


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
    for class_index in split_order(seed, num_classes, 1)[:remainder].tolist():
        quotas[class_index] += 1

    order = split_order(seed, len(labels), 0)
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


def image_data(name: str, num_classes: int, train: Batch, test: Batch) -> ImageData:
    """Make the tensors of a data set of the arrays of its two parts."""
    (train_images, train_labels), (test_images, test_labels) = train, test
    return ImageData(
        train_images=torch.from_numpy(np.ascontiguousarray(train_images)),
        train_labels=torch.from_numpy(train_labels),
        test_images=torch.from_numpy(np.ascontiguousarray(test_images)),
        test_labels=torch.from_numpy(test_labels),
        num_classes=num_classes,
        name=name,
    )


def check_labels(labels: npt.NDArray[Any], num_classes: int, source: str | Path) -> Labels:
    """Return labels as int64; raise a ValueError if one is out of range."""
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"{source} must hold labels in [0, {num_classes}), got {labels.min()} to {labels.max()}"
        )
    return labels.astype(np.int64)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read, unpacking it if its name ends in ``.gz``.

    Raises:
        ValueError: If it is no regular file, or while it is read, if it is no whole gzip file.
    """
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no regular file", str(path))
    if path.suffix != ".gz":
        with open(path, "rb") as file:
            yield file
        return
    try:
        with gzip.open(path) as stream:
            yield cast(BinaryIO, stream)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} must be a whole gzip file, got: {error}") from error


def missing(name: str, root: Path, contents: str, detail: str = "") -> FileNotFoundError:
    """Return the error that says what ``root`` must hold, and what it does hold."""
    if detail:
        found = detail
    elif root.is_dir():
        entries = sorted(entry.name for entry in root.iterdir())
        found = f"a folder with {', '.join(entries[:8]) or 'nothing'}"
        found += f" and {len(entries) - 8} more" if len(entries) > 8 else ""
    else:
        found = "a path that is no folder"
    return FileNotFoundError(
        f"root must be a folder with {contents} for {name}, got {root}: {found}"
    )
