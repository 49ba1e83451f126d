"""The data sets of the command line, read from local files. Nothing is ever downloaded."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from gpu_mixmatch._extras import need
from gpu_mixmatch.data.collate import collate
from gpu_mixmatch.data.formats import cifar, digits, mnist
from gpu_mixmatch.data.formats.common import ImageData, missing, split_labels
from gpu_mixmatch.data.images import ImageIndex, open_images


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
        return digits.load_digits_data()
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
    return cifar.load_cifar(name, root) if name in cifar.CONTENTS else mnist.load_mnist(name, root)


def _open_folder(root: Path, size: int) -> FolderData:
    for part in ("labelled", "unlabelled"):
        if not (root / part).is_dir():
            raise missing("folder", root, _CONTENTS["folder"])
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


_CONTENTS = {
    **dict.fromkeys(mnist.MNIST_FOLDERS, mnist.CONTENTS),
    **cifar.CONTENTS,
    "folder": "labelled/CLASS/ and unlabelled/",
}
