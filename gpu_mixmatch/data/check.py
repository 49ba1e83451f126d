"""Which images on disk do not decode, and why."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpu_mixmatch._extras import import_dali
from gpu_mixmatch.data.images import ImageIndex, PathLike, image_folder

_CHECKED_AT_ONCE = 8  # photographs of 12 megapixels decode to 36 MB each
_UNKNOWN_FORMAT = "nvImageCodec failure: '#4'"


class CheckedImages(NamedTuple):
    """What `check_images` found.

    Attributes:
        good: Paths of the images that decode, sorted.
        bad: Path of each image that does not, and why.
    """

    good: list[str]
    bad: dict[str, str]


def check_images(
    root: PathLike,
    list_path: PathLike | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    num_threads: int = 4,
) -> CheckedImages:
    """Decode every image below a folder, on the CPU, with the decoder that `DaliLoader` uses.

    Args:
        root: The folder; see `image_folder`.
        list_path: Where to write a list of the good images, for `file_list` to read; None does not.
            Where every image lies in a folder of its class, the list has their labels.
        progress: Called with the number of images seen so far and of all images.
        num_threads: Threads that read files.

    Returns:
        The paths of good and bad images.

    Raises:
        ImportError: If DALI is not installed.
        ValueError: If ``root`` is no folder, or the name of an image cannot stand in a list.
    """
    images = image_folder(root)
    reasons: dict[int, str] = {}
    with ThreadPoolExecutor(num_threads) as readers:
        for start in range(0, len(images), _CHECKED_AT_ONCE):
            numbers = range(start, min(start + _CHECKED_AT_ONCE, len(images)))
            encoded = list(readers.map(partial(read_or_error, images), numbers))
            reasons |= {numbers[row]: why for row, why in undecodable(encoded).items()}
            if progress:
                progress(numbers.stop, len(images))
    good = [number for number in range(len(images)) if number not in reasons]
    if list_path is not None:
        _write_list(Path(list_path), images, good)
    return CheckedImages(
        [images.paths[number] for number in good],
        {images.paths[number]: why for number, why in reasons.items()},
    )


def _write_list(path: Path, images: ImageIndex, numbers: Sequence[int]) -> None:
    folder = path.absolute().parent
    lines = []
    for number in numbers:
        place = Path(images.paths[number]).absolute()
        name = str(place.relative_to(folder) if place.is_relative_to(folder) else place)
        if any(character in name for character in "\t\r\n"):
            raise ValueError(f"root must hold no names with a tab or a line end, got {name!r}")
        label = "" if images.labels is None else f"\t{int(images.labels[number])}"
        lines.append(f"{name}{label}\n")
    path.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")


def read_or_error(images: ImageIndex, number: int) -> NDArray[np.uint8] | OSError:
    """Read an image, or return why it cannot be read."""
    try:
        return images.read(number)
    except OSError as error:
        return error


def undecodable(
    encoded: Sequence[NDArray[np.uint8] | OSError], device: str = "cpu"
) -> dict[int, str]:
    """Find the images of a batch that do not decode; DALI itself fails without naming them.

    Args:
        encoded: Bytes of images, or why they could not be read.
        device: Where to decode, "cpu" or "gpu:0".

    Returns:
        The reason for each row that fails.
    """
    reasons = {row: str(item) for row, item in enumerate(encoded) if isinstance(item, OSError)}
    readable = {row: item for row, item in enumerate(encoded) if not isinstance(item, OSError)}
    if not readable or not _decode_error(list(readable.values()), device):
        return reasons
    for row, item in readable.items():
        if error := _decode_error([item], device):
            reasons[row] = "the file is empty" if len(item) == 0 else error
    return reasons


def _decode_error(encoded: list[NDArray[np.uint8]], device: str) -> str:
    """Decode a batch; return why DALI cannot, or an empty text if it can."""
    ndd = import_dali("experimental.dynamic")
    try:
        with ndd.EvalMode.sync_full:
            ndd.decoders.image(ndd.as_batch(encoded), device=device)
    except RuntimeError as error:
        detail = str(error).strip().rstrip(": ")
        if _UNKNOWN_FORMAT in detail:
            return f"it is in no image format that DALI reads ({detail})"
        return f"it is damaged, cut short, or of a kind that DALI does not read ({detail})"
    return ""
