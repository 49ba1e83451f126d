"""A data set that is a folder of image files, decoded by Pillow when they are asked for."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from gpu_mixmatch._extras import need
from gpu_mixmatch.data.collate import collate
from gpu_mixmatch.data.formats.common import missing, split_labels
from gpu_mixmatch.data.images import ImageIndex, open_images

CONTENTS = "labelled/CLASS/ and unlabelled/"


class ImageFiles(Dataset[Any]):
    """Image files as a map-style data set: Pillow decodes a sample when it is asked for.

    A sample is (image, label), or the image alone where the index has no labels. Images are upright
    RGB. As in `DaliLoader`, the largest centred square is resized, bilinear and antialiased.

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
        need("PIL.Image", "decoding images")
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
                # from a palette with transparency straight to RGB, PIL would warn
                image = image.convert("RGBA") if image.mode == "P" else image
                image = image.convert("RGB")
        # a damaged PNG raises SyntaxError, other formats whatever their decoder trips over
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
    """The parts of a data set in a folder; only the test images are in memory.

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


def load_folder(root: Path, size: int) -> FolderData:
    """Find the images of ``root`` and decode those to test on; see `data.datasets.load_dataset`."""
    for part in ("labelled", "unlabelled"):
        if not (root / part).is_dir():
            raise missing("folder", root, CONTENTS)
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
