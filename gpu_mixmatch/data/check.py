"""Which images on disk do not decode, and why."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from gpu_mixmatch._extras import import_dali, need
from gpu_mixmatch._validation import as_integer, as_path, check_callable, check_choice
from gpu_mixmatch.data.decoding import Encoded, dali_error, pil_error, why_refused
from gpu_mixmatch.data.images import image_folder
from gpu_mixmatch.data.index import ImageIndex, LeftOutWarning, PathLike

Decoder = Literal["pil", "dali"]
DECODERS = get_args(Decoder)

_CHECKED_AT_ONCE = 8  # photographs of 12 megapixels decode to 36 MB each


class CheckedImages(NamedTuple):
    """What `check_images` found.

    Attributes:
        good: Paths of the images that decode, sorted.
        bad: Path of each image that does not, and why.
        left_out: How many entries were not looked at, by the reason; see `images.image_folder`.
        unlisted: Good images that a list cannot name, and does not.
    """

    good: list[str]
    bad: dict[str, str]
    left_out: Mapping[str, int]
    unlisted: list[str]


def check_images(
    root: PathLike,
    list_path: PathLike | None = None,
    *,
    decoder: Decoder = "pil",
    progress: Callable[[int, int], None] | None = None,
    num_threads: int = 4,
) -> CheckedImages:
    """Decode every image below a folder, on the CPU, with the decoder that a loader uses.

    Args:
        root: The folder; see `images.image_folder`.
        list_path: Where to write a list of the good images, for `images.file_list` to read; None
            does not. Where every image lies in a folder of its class, the list has their labels. A
            name with a tab or a line end cannot stand in it.
        decoder: "pil", Pillow's, which `ImageFiles` uses, or "dali", which `DaliLoader` uses. Both
            read the same formats; of a damaged file one may read what the other does not.
        progress: Called with the number of images seen so far and of all images.
        num_threads: Threads that read files and, by Pillow, decode them.

    Returns:
        The paths of good and bad images, and what was left out.

    Raises:
        ImportError: If the decoder is not installed.
        OSError: If a folder cannot be looked into, or the list not be written.
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``root`` is no folder, or an argument out of its range.
    """
    list_path = None if list_path is None else as_path("list_path", list_path)
    if list_path and (list_path.is_dir() or not list_path.absolute().parent.is_dir()):
        raise ValueError(f"list_path must be a file in a folder that exists, got {list_path}")
    _check_options(decoder, progress, num_threads)
    images = image_folder(root)
    reasons = undecodable_images(images, decoder, progress=progress, num_threads=num_threads)
    good = [number for number in range(len(images)) if number not in reasons]
    unlisted: list[int] = []
    if list_path is not None and good:
        unlisted = _write_list(list_path, images, good)
    return CheckedImages(
        [images.paths[number] for number in good],
        {images.paths[number]: why for number, why in reasons.items()},
        images.left_out,
        [images.paths[number] for number in unlisted],
    )


def undecodable_images(
    images: ImageIndex,
    decoder: Decoder,
    *,
    progress: Callable[[int, int], None] | None = None,
    num_threads: int = 4,
) -> dict[int, str]:
    """Decode the images of an index; return the number of each that fails, and why.

    Args:
        images: Where they lie.
        decoder: "pil" or "dali".
        progress: Called with the number of images seen so far and of all images.
        num_threads: Threads that read files and, by Pillow, decode them.

    Raises:
        ImportError: If the decoder is not installed.
    """
    _check_options(decoder, progress, num_threads)
    if decoder == "pil":
        need("PIL.Image", "decoding images")
    else:
        import_dali("experimental.dynamic")
    reasons: dict[int, str] = {}
    with ThreadPoolExecutor(num_threads) as threads:
        for start in range(0, len(images), _CHECKED_AT_ONCE):
            numbers = range(start, min(start + _CHECKED_AT_ONCE, len(images)))
            if decoder == "pil":
                found = dict(enumerate(threads.map(partial(_pil_reason, images), numbers)))
            else:
                found = undecodable([*threads.map(partial(read_or_error, images), numbers)])
            reasons |= {numbers[row]: why for row, why in sorted(found.items()) if why}
            if progress:
                progress(numbers.stop, len(images))
    return reasons


def _check_options(decoder: Any, progress: Any, num_threads: Any) -> None:
    check_choice("decoder", decoder, Decoder)
    as_integer("num_threads", num_threads, least=1, most=2**12)
    if progress is not None:
        check_callable("progress", progress, "a function of two numbers or None")


def read_or_error(images: ImageIndex, number: int) -> Encoded | Exception:
    """Read an image, or return why it cannot be read or is refused."""
    try:
        encoded = images.read(number)
    except OSError as error:
        return error
    reason = why_refused(encoded)
    return ValueError(reason) if reason else encoded


def undecodable(encoded: Sequence[Encoded | Exception], device: str = "cpu") -> dict[int, str]:
    """Find the images of a batch that DALI does not decode, which it does not name.

    Args:
        encoded: Bytes of images, or why they could not be read.
        device: Where to decode, "cpu" or "gpu:0".

    Returns:
        The reason for each row that fails.
    """
    reasons = {row: str(item) for row, item in enumerate(encoded) if isinstance(item, Exception)}
    readable = {row: item for row, item in enumerate(encoded) if not isinstance(item, Exception)}
    if readable and dali_error([*readable.values()], device):
        errors = {row: dali_error([item], device) for row, item in readable.items()}
        reasons |= {row: error for row, error in errors.items() if error}
    return reasons


def _pil_reason(images: ImageIndex, number: int) -> str:
    encoded = read_or_error(images, number)
    return str(encoded) if isinstance(encoded, Exception) else pil_error(encoded)


def _write_list(path: Path, images: ImageIndex, numbers: Sequence[int]) -> list[int]:
    """Write the list of some images; return those that it cannot name."""
    folder = path.absolute().parent
    lines, unlisted = [], []
    for number in numbers:
        place = Path(images.paths[number]).absolute()
        name = str(place.relative_to(folder) if place.is_relative_to(folder) else place)
        if any(character in name for character in "\t\r\n"):
            unlisted.append(number)
            continue
        label = "" if images.labels is None else f"\t{int(images.labels[number])}"
        lines.append(f"{name}{label}\n")
    path.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
    _warn_of_lost_classes(path, images, set(numbers) - set(unlisted))
    return unlisted


def _warn_of_lost_classes(path: Path, images: ImageIndex, listed: set[int]) -> None:
    """Warn of labels that a list then lacks."""
    if images.labels is None:
        return
    kept = {int(images.labels[number]) for number in listed}
    lost = [f"{label} ({name})" for label, name in enumerate(images.classes) if label not in kept]
    if lost:
        warnings.warn(
            f"{path} has no image of the label {', '.join(lost)}: none of them decodes",
            LeftOutWarning,
            stacklevel=4,
        )
