"""A data set that is a folder of image files, decoded by Pillow when they are asked for."""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from gpu_mixmatch._extras import need
from gpu_mixmatch._validation import MOST_PADDING, as_flag, as_integer
from gpu_mixmatch.data.check import Decoder, undecodable_images
from gpu_mixmatch.data.collate import collate
from gpu_mixmatch.data.decoding import UndecodableError, decode_by_pil
from gpu_mixmatch.data.formats.common import missing, split_labels
from gpu_mixmatch.data.images import file_list, open_images
from gpu_mixmatch.data.index import ImageIndex, LeftOutWarning, PathLike

CONTENTS = "labelled/CLASS/ and unlabelled/"

OnError = Literal["raise", "skip"]
Progress = Callable[[int, int], None]


class ImageFiles(Dataset[Any]):
    """Image files as a map-style data set: Pillow decodes a sample when it is asked for.

    A sample is (image, label), or the image alone where there are no labels. Images are upright RGB
    of one size: as in `DaliLoader`, the largest centred square is resized, bilinear and
    antialiased. Files are JPEG, PNG, WebP, BMP or TIFF of 8 bits per channel and at most 179
    megapixels.

    Args:
        source: A folder, a ``.txt`` list, ``.tar`` or ``.tfrecord`` files, or an index of images;
            see `images.open_images`.
        size: Height and width of the samples, in pixels.
        labelled: Whether samples have labels, in a folder the numbers of its class folders. An
            index has them or not.

    Raises:
        ImportError: If Pillow is not installed.
        OSError: If a file or folder of the source cannot be read.
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``size`` is below 1 or above 32,768, or the source holds no images, or no
            labels that are wanted.

    Example:
        >>> labelled = ImageFiles("photos/labelled", 96, labelled=True)
        >>> loader = SemiSupervisedLoader(labelled, ImageFiles("photos/unlabelled", 96), 64)
    """

    def __init__(
        self,
        source: ImageIndex | PathLike | Sequence[PathLike],
        size: int,
        *,
        labelled: bool = False,
    ) -> None:
        self.size = as_integer("size", size, least=1, most=MOST_PADDING)
        labelled = as_flag("labelled", labelled)
        need("PIL.Image", "decoding images")
        index = open_images(source, labelled=labelled)
        is_index = isinstance(source, ImageIndex)
        self.index = index if labelled or is_index else _without_labels(index)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> Any:
        image = self._decoded(number)
        return image if self.index.labels is None else (image, int(self.index.labels[number]))

    def __repr__(self) -> str:
        labels = "no labels" if self.index.labels is None else f"classes {self.index.classes}"
        return f"ImageFiles({len(self)} images, size={self.size}, {labels})"

    def load(self, numbers: Sequence[int] | None = None) -> Tensor:
        """Decode some images, or all of them, ``[n, 3, size, size]`` uint8."""
        numbers = range(len(self)) if numbers is None else numbers
        images: Tensor = collate([self._decoded(number) for number in numbers])
        return images

    def _decoded(self, number: int) -> Any:
        from PIL import Image

        try:
            image = decode_by_pil(self.index.read(number))
            side = min(image.size)
            left, top = (image.width - side) / 2, (image.height - side) / 2
            return image.resize(
                (self.size, self.size),
                Image.Resampling.BILINEAR,
                box=(left, top, left + side, top + side),
            )
        except (OSError, ValueError, MemoryError) as error:
            raise UndecodableError(
                f"{self.index.name(number)} must be an image that decodes, got: "
                f"{error or type(error).__name__}. gpu-mixmatch check-images lists all that do "
                "not, and train --on-error skip leaves them out"
            ) from error


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
        left_out: How many entries of the folders are not among the images, by the reason; see
            `images.image_folder`.
        skipped: Path of each image that does not decode and was left out, and why.
    """

    labelled: ImageFiles
    unlabelled: ImageFiles
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    has_test: bool
    name: str
    left_out: Mapping[str, int]
    skipped: Mapping[str, str]

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
        return ImageFiles(index.take(chosen.tolist()), self.labelled.size), self.unlabelled


def load_folder(
    root: Path,
    size: int,
    *,
    on_error: OnError = "raise",
    list_path: PathLike | None = None,
    decoder: Decoder = "pil",
    progress: Progress | None = None,
) -> FolderData:
    """Find the images of ``root`` and decode those to test on; see `data.datasets.load_dataset`."""
    for part in ("labelled", "unlabelled"):
        if not (root / part).is_dir():
            raise missing("folder", root, CONTENTS)
    parts = {
        "labelled": open_images(root / "labelled", labelled=True),
        "unlabelled": _without_labels(open_images(root / "unlabelled")),
    }
    has_test = (root / "test").is_dir()
    if has_test:
        parts["test"] = open_images(root / "test", labelled=True)
    left_out = sum((Counter(index.left_out) for index in parts.values()), Counter[str]())
    if list_path is not None:
        parts = _listed(parts, root, list_path)
    skipped: dict[str, str] = {}
    if on_error == "skip":
        skipped = _undecodable_files(parts, decoder, progress)
        parts = {part: _without_skipped(part, index, skipped) for part, index in parts.items()}
    labelled, test = parts["labelled"], parts.get("test", parts["labelled"])
    if test.classes != labelled.classes:
        raise ValueError(
            f"root must have the same classes in test as in labelled, {list(labelled.classes)}, "
            f"got {list(test.classes)}"
        )
    return FolderData(
        labelled=ImageFiles(labelled, size),
        unlabelled=ImageFiles(parts["unlabelled"], size),
        test_images=ImageFiles(test, size).load(),
        test_labels=_labels_of(test),
        class_names=labelled.classes,
        has_test=has_test,
        name="folder",
        left_out=left_out,
        skipped=skipped,
    )


def _listed(
    parts: Mapping[str, ImageIndex], root: Path, list_path: PathLike
) -> dict[str, ImageIndex]:
    """Restrict the parts of a folder to the images of a list, by where they really lie."""
    wanted = set(map(os.path.realpath, file_list(list_path).paths))
    chosen = {}
    for part, index in parts.items():
        places = map(os.path.realpath, index.paths)
        numbers = [number for number, place in enumerate(places) if place in wanted]
        if not numbers:
            raise ValueError(
                f"list_path must name images of {root / part}, got none in {list_path}; "
                f"gpu-mixmatch check-images {root} --list FILE writes one of all parts"
            )
        chosen[part] = index.take(numbers)
        if lost := _lost_classes(chosen[part]):
            raise ValueError(
                f"list_path must name an image of every class of {root / part}, got none of "
                f"{', '.join(lost)} in {list_path}"
            )
    return chosen


def _undecodable_files(
    parts: Mapping[str, ImageIndex], decoder: Decoder, progress: Progress | None
) -> dict[str, str]:
    """Decode all images by what will decode them in training and in tests; return the bad ones."""
    tested = "test" if "test" in parts else "labelled"  # Pillow decodes what is tested on
    checks = [(part, decoder) for part in parts if part != "test"]
    checks += [(tested, "pil")] if tested == "test" or decoder != "pil" else []
    total = sum(len(parts[part]) for part, _ in checks)
    skipped: dict[str, str] = {}
    seen = 0
    for part, judge in checks:
        index = parts[part]
        report = partial(_report, progress, seen, total) if progress else None
        reasons = undecodable_images(index, judge, progress=report)
        skipped |= {index.name(number): why for number, why in reasons.items()}
        seen += len(index)
    if skipped:
        first = "; ".join(f"{name}: {why}" for name, why in [*skipped.items()][:3])
        rest = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        warnings.warn(
            f"{len(skipped)} of {sum(map(len, parts.values()))} images do not decode and are left "
            f"out: {first}{rest}",
            LeftOutWarning,
            stacklevel=4,
        )
    return skipped


def _report(progress: Progress, before: int, total: int, seen: int, _: int) -> None:
    progress(before + seen, total)


def _without_skipped(part: str, index: ImageIndex, skipped: Mapping[str, str]) -> ImageIndex:
    names = [index.name(number) for number in range(len(index))]
    kept = index.take([number for number, name in enumerate(names) if name not in skipped])
    lost = _lost_classes(kept)
    if lost or len(kept) == 0:
        of_class = f"class {lost[0]} of " if lost else ""
        number = 0 if not lost else _labels_of(index).tolist().index(index.classes.index(lost[0]))
        raise ValueError(
            f"root must hold an image that decodes in {of_class}{part}, got none: {names[number]}: "
            f"{skipped[names[number]]}"
        )
    return kept


def _lost_classes(index: ImageIndex) -> list[str]:
    kept = set() if index.labels is None else set(index.labels.tolist())
    return [name for label, name in enumerate(index.classes) if label not in kept]


def _without_labels(index: ImageIndex) -> ImageIndex:
    return replace(index, labels=None, classes=())


def _labels_of(index: ImageIndex) -> Tensor:
    assert index.labels is not None  # open_images sees to it
    return index.labels
