"""Which encoded images are read, by what their headers say; and how Pillow and DALI decode them.

Two decoders read the same files here. What they read differently, and what would ask for too much
memory, is refused by its header before either sees it.
"""

import io
import struct
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpu_mixmatch._extras import import_dali, need

MAX_PIXELS = 178_956_970  # where Pillow, too, speaks of a decompression bomb

_FORMATS = "JPEG, PNG, WebP, BMP or TIFF"
_OTHERS = {
    b"GIF8": "a GIF",
    b"\0\0\0\x0cjP": "a JPEG 2000",
    b"\0\0\0\x0cJXL": "a JPEG XL",
    b"\xff\x0a": "a JPEG XL",
    b"8BPS": "a Photoshop file",
    b"%PDF": "a PDF",
    b"%!PS": "PostScript",
    b"<": "text such as HTML or SVG",
    b"\0\x05\x16\x07": "an AppleDouble file, which holds attributes of another",
}
_MOST_STEPS = 65_536  # through the segments of a JPEG
_MOST_TAGS = 4096  # of a TIFF
_UNKNOWN_FORMAT = "nvImageCodec failure: '#4'"
_warnings_lock = threading.Lock()

Encoded = NDArray[np.uint8]


class UndecodableError(ValueError):
    """An image that is no image, is damaged, or is of a kind that is not read; it names the file.

    What a worker process of a `DataLoader` raises, torch raises again with the whole traceback for
    its message. `reason` is the message that it began with.
    """

    @property
    def reason(self) -> str:
        """The message, without a traceback of a worker."""
        name = f"{type(self).__module__}.{type(self).__qualname__}: "
        return str(self).rpartition(name)[2].strip()


class _Header(NamedTuple):
    """What the header of an image says.

    Attributes:
        kind: The format, as Pillow names it.
        width: In pixels.
        height: In pixels.
        bits: Most bits of a channel.
        oddity: What the decoders read differently, or "".
    """

    kind: str
    width: int
    height: int
    bits: int = 8
    oddity: str = ""


def why_refused(encoded: Encoded) -> str:
    """Say why an encoded image is not read, as far as its header tells; "" if it is.

    It must be a JPEG, PNG, WebP, BMP or TIFF by its content, whatever its name, of at most 8 bits
    per channel and at most `MAX_PIXELS` pixels.
    """
    try:
        header = _read_header(encoded)
    except ValueError as error:
        return str(error)
    if header.bits > 8:
        return f"it has more than 8 bits per channel, {header.bits}: scale it to 8 bits"
    if header.oddity:
        return header.oddity
    if header.width * header.height > MAX_PIXELS:
        return (
            f"it has {header.width} x {header.height} pixels, more than the {MAX_PIXELS} that are "
            "read: make it smaller"
        )
    return ""


def decode_by_pil(encoded: Encoded) -> Any:
    """Decode an image by Pillow to an upright PIL image in RGB.

    Raises:
        ValueError: If it does not decode; the message is the reason, and names no file.
    """
    image_module, ops = need("PIL.Image", "decoding images"), need("PIL.ImageOps")
    if reason := why_refused(encoded):
        raise ValueError(reason)
    header = _read_header(encoded)
    try:
        with (
            _without_size_warning(image_module, header),
            # a format by name: Pillow would try others, PostScript among them, which runs a program
            image_module.open(io.BytesIO(encoded.data), formats=[header.kind]) as file,
        ):
            image = ops.exif_transpose(file)
            # from a palette with transparency straight to RGB, PIL would warn
            image = image.convert("RGBA") if image.mode == "P" else image
            return image.convert("RGB")
    except Exception as error:  # a decoder trips over damage in its own way, by any exception
        said = str(error) or type(error).__name__
        raise ValueError(f"it is damaged or cut short ({said})") from error


def pil_error(encoded: Encoded) -> str:
    """Decode an image by Pillow; return why that fails, or ""."""
    try:
        decode_by_pil(encoded)
    except ValueError as error:
        return str(error)
    return ""


def dali_error(encoded: Sequence[Encoded], device: str = "cpu") -> str:
    """Decode a batch by DALI; return why it cannot, or "". DALI itself names no image.

    Args:
        encoded: Bytes of images that are not refused.
        device: Where to decode, "cpu" or "gpu:0".
    """
    ndd = import_dali("experimental.dynamic")
    try:
        with ndd.EvalMode.sync_full:
            ndd.decoders.image(ndd.as_batch(list(encoded)), device=device)
    except Exception as error:
        detail = str(error).strip().rstrip(": ") or type(error).__name__
        if _UNKNOWN_FORMAT in detail:
            return f"it is in no image format that DALI reads ({detail})"
        return f"it is damaged, cut short, or of a kind that DALI does not read ({detail})"
    return ""


@contextmanager
def _without_size_warning(image_module: Any, header: _Header) -> Iterator[None]:
    """Let Pillow open a large image that is within our limit; it warns from half of it on."""
    limit = image_module.MAX_IMAGE_PIXELS
    if limit is None or header.width * header.height <= limit:
        yield
        return
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", image_module.DecompressionBombWarning)
        yield


def _read_header(encoded: Encoded) -> _Header:
    """Read format, size and bits of an image.

    Raises:
        ValueError: If they cannot be told; the message is the reason.
    """
    if len(encoded) == 0:
        raise ValueError("the file is empty")
    first = encoded[:16].tobytes()
    readers = [read for signature, read in _READERS.items() if first.startswith(signature)]
    if not readers:
        raise ValueError(f"it is no {_FORMATS}{_other_kind(first)}")
    try:
        header = readers[0](encoded.data)
    except (struct.error, IndexError) as error:
        raise ValueError("it is damaged or cut short in its header") from error
    if header.width < 1 or header.height < 1:
        raise ValueError(f"it has {header.width} x {header.height} pixels")
    return header


def _other_kind(first: bytes) -> str:
    if first[4:8] == b"ftyp":
        return f", but an AVIF, HEIF or video file ({first[8:12].decode('latin1').strip()!r})"
    kinds = [kind for signature, kind in _OTHERS.items() if first.startswith(signature)]
    return f", but {kinds[0]}" if kinds else ""


def _jpeg_header(data: memoryview) -> _Header:
    at = 2
    for _ in range(_MOST_STEPS):
        marker = data[at + 1] if data[at] == 0xFF else 0xFF
        if marker == 0xFF:  # a byte that fills
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a length
            at += 2
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, height, width = struct.unpack_from(">BHH", data, at + 4)
            return _Header("JPEG", width, height, bits)
        elif marker in (0xD9, 0xDA):
            break
        else:
            at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    raise ValueError("it is damaged: a JPEG without a frame")


def _png_header(data: memoryview) -> _Header:
    kind, width, height, bits = struct.unpack_from(">4sIIB", data, 12)
    if kind != b"IHDR":
        raise ValueError("it is damaged: a PNG that does not begin with its header")
    return _Header("PNG", width, height, bits)


def _webp_header(data: memoryview) -> _Header:
    kind = bytes(data[8:16])
    if kind == b"WEBPVP8X":
        width, height = (
            1 + int.from_bytes(data[start : start + 3], "little") for start in (24, 27)
        )
        data[29]  # the header is whole
    elif kind == b"WEBPVP8L":
        (packed,) = struct.unpack_from("<I", data, 21)
        width, height = 1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF)
    elif kind == b"WEBPVP8 ":
        width, height = (size & 0x3FFF for size in struct.unpack_from("<HH", data, 26))
    else:
        raise ValueError(f"it is no {_FORMATS}, but another file in RIFF")
    return _Header("WEBP", width, height)


def _bmp_header(data: memoryview) -> _Header:
    (size,) = struct.unpack_from("<I", data, 14)
    if size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
    else:
        width, height, _, bits = struct.unpack_from("<iiHH", data, 18)
    return _Header("BMP", width, abs(height), 16 if bits > 32 else 8)


def _tiff_header(data: memoryview) -> _Header:
    order = "<" if data[0] == ord("I") else ">"
    big = 43 in (data[2], data[3])
    (start,) = struct.unpack_from(f"{order}Q" if big else f"{order}I", data, 8 if big else 4)
    (count,) = struct.unpack_from(f"{order}Q" if big else f"{order}H", data, start)
    start += 8 if big else 2
    if count > _MOST_TAGS:
        raise ValueError("it is damaged or cut short in its header")
    tags: dict[int, tuple[int, ...]] = {}
    for at in range(start, start + count * (20 if big else 12), 20 if big else 12):
        tag, kind, length = struct.unpack_from(f"{order}HHQ" if big else f"{order}HHI", data, at)
        code = {1: "B", 3: "H", 4: "I", 16: "Q"}.get(kind)
        if tag not in (256, 257, 258, 262, 277, 339) or code is None or length == 0:
            continue
        if tag in tags:
            raise ValueError("it is damaged: a TIFF that gives its size or kind twice")
        values = f"{order}{min(length, 16)}{code}"
        value_at, room = (at + 12, 8) if big else (at + 8, 4)
        if length * struct.calcsize(code) > room:
            (value_at,) = struct.unpack_from(f"{order}Q" if big else f"{order}I", data, value_at)
        tags[tag] = struct.unpack_from(values, data, value_at)
    (width,), (height,) = tags.get(256, (0,))[:1], tags.get(257, (0,))[:1]
    samples, colours = tags.get(277, (1,))[0], tags.get(262, (1,))[0]
    bits, numbers = max(tags.get(258, (1,))), set(tags.get(339, (1,)))
    oddity = ""
    if not numbers <= {1, 4}:
        oddity = "it holds signed or floating-point numbers: scale it to 8 bits"
    elif samples not in (1, 3, 4) or colours not in (0, 1, 2, 3, 5, 6):
        oddity = (
            f"it is a TIFF of {samples} channels and photometric interpretation {colours}, which "
            "decoders read differently: save it as RGB"
        )
    return _Header("TIFF", width, height, bits, oddity)


_READERS: dict[bytes, Callable[[memoryview], _Header]] = {
    b"\xff\xd8\xff": _jpeg_header,
    b"\x89PNG\r\n\x1a\n": _png_header,
    b"RIFF": _webp_header,
    b"BM": _bmp_header,
    b"II*\0": _tiff_header,
    b"MM\0*": _tiff_header,
    b"II+\0": _tiff_header,
    b"MM\0+": _tiff_header,
}
