"""What a chain's entries do to images of one size, as tables of whole numbers.

They are made once, in float64 and by Pillow's own order of operations, so that no implementation
needs a sine, a double or a second opinion.
"""

import math
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu_mixmatch._chain import entries
from gpu_mixmatch.impl.constants import constant
from gpu_mixmatch.types import Chain, OpName

Matrix = tuple[float, float, float, float, float, float]


class Kind(IntEnum):
    """What is done for an entry: column 0 of `ChainTables.records`."""

    NOTHING = 0
    WARP = 1  # columns 2 .. 7: a0 .. a5; pixel (x, y) is read at (a0·x + a1·y + a2) >> 16 and
    # (a3·x + a4·y + a5) >> 16, and is outside where nothing is there
    BYTES = 2  # column 2: the row of `ChainTables.bytes` that every byte is looked up in
    COLOR = 3  # column 2: the bits of a float32 factor, as of the next two
    CONTRAST = 4
    SHARPNESS = 5
    AUTOCONTRAST = 6
    EQUALIZE = 7
    HUE = 8  # column 2: what is added to a hue of a byte; column 3: the row of `whole_hues`


class ChainTables(NamedTuple):
    """What implementations read for a chain and a size of views.

    Attributes:
        records: ``[E, 8]`` int32, a row per entry: its `Kind`; 1 where outside pixels become pixels
            as any other; up to six arguments.
        bytes: ``[B, 256]`` uint8, at least one row.
    """

    records: Tensor
    bytes: Tensor


@constant
def chain_tables(chain: Chain, height: int, width: int, device: torch.device) -> ChainTables:
    """Make the tables of a chain for views of a size.

    Raises:
        ValueError: If views are too large for an operation's coordinates to fit into 16 bits.
    """
    of_entries = entries(chain)
    records = np.zeros((len(of_entries), 8), dtype=np.int32)
    rows: dict[bytes, int] = {}
    for record, (name, magnitude) in zip(records, of_entries, strict=True):
        record[0] = kind_of(name)
        record[1] = name in _NEW_COLORS
        if record[0] == Kind.WARP:
            record[2:] = _warp(name, magnitude, height, width)
        elif record[0] == Kind.BYTES:
            table = byte_table(name, magnitude).tobytes()
            record[2] = rows.setdefault(table, len(rows))
        elif record[0] == Kind.HUE:
            record[2] = int(magnitude * 255) % 256
            record[3] = rows.setdefault(whole_hues().tobytes(), len(rows))
        else:
            record[2] = np.float32(magnitude).view(np.int32)
    tables = np.frombuffer(b"".join(rows) or bytes(256), dtype=np.uint8).reshape(-1, 256).copy()
    return ChainTables(torch.from_numpy(records).to(device), torch.from_numpy(tables).to(device))


def root_of_area(height: int, width: int) -> int:
    """The side of a square of as many pixels, in 2^-8 of a pixel: the unit of a drawn cut."""
    return round(256 * math.sqrt(height * width))


_KINDS: dict[OpName, Kind] = {
    **dict.fromkeys(("invert", "posterize", "solarize", "brightness"), Kind.BYTES),
    "color": Kind.COLOR,
    "contrast": Kind.CONTRAST,
    "sharpness": Kind.SHARPNESS,
    "autocontrast": Kind.AUTOCONTRAST,
    "equalize": Kind.EQUALIZE,
    "hue": Kind.HUE,
    **dict.fromkeys(("rotate", "shear_x", "shear_y", "translate_x", "translate_y"), Kind.WARP),
    **dict.fromkeys(("translate_x_rel", "translate_y_rel"), Kind.WARP),
}


def kind_of(name: OpName) -> Kind:
    """Return the kind of an operation's entries."""
    return _KINDS.get(name, Kind.NOTHING)


@lru_cache(maxsize=64)
def kinds_of(chain: Chain) -> frozenset[Kind]:
    """List the kinds that the entries of a chain have."""
    return frozenset(kind_of(name) for name, _ in entries(chain))


# Operations that FixMatch runs without the transparency of what lies outside
_NEW_COLORS = ("autocontrast", "equalize", "invert", "posterize", "solarize")


def _warp(name: OpName, magnitude: float, height: int, width: int) -> list[int]:
    """Pillow's 16.16 coefficients of a nearest affine map."""
    if name.startswith("translate"):
        along = width if name.startswith("translate_x") else height
        pixels = int(magnitude * along) if name.endswith("_rel") else magnitude
        # Pillow's own rule where nothing turns; beyond the image all is outside
        shift = 65536 * max(-along, min(along, math.floor(pixels + 0.5))) + 32768
        across, down = (shift, 32768) if name.startswith("translate_x") else (32768, shift)
        return [65536, 0, across, 0, 65536, down]
    if name == "rotate":
        matrix = _rotation(magnitude, height, width)
    elif name == "shear_x":
        matrix = (1.0, magnitude, 0.0, 0.0, 1.0, 0.0)
    else:
        matrix = (1.0, 0.0, 0.0, magnitude, 1.0, 0.0)
    a, b, c, d, e, f = matrix
    for x, y in ((0, 0), (width, 0), (0, height), (width, height)):
        if max(abs(a * x + b * y + c), abs(d * x + e * y + f)) >= 2**15:
            raise ValueError(
                f"images must be small enough for {name} by {magnitude:g}, whose coordinates have "
                f"16 bits, got {height} x {width} pixels"
            )
    centred = (a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5)
    return [math.floor(value * 65536.0 + 0.5) for value in centred]


def _rotation(degrees: float, height: int, width: int) -> Matrix:
    """The matrix of Pillow's ``rotate``, about the centre, counterclockwise."""
    angle = -math.radians(degrees % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    minus_sin = round(-math.sin(angle), 15)
    x, y = width / 2, height / 2
    return (
        *(cos, sin, cos * -x + sin * -y + 0.0 + x),
        *(minus_sin, cos, minus_sin * -x + cos * -y + 0.0 + y),
    )


def byte_table(name: OpName, magnitude: float) -> NDArray[np.uint8]:
    """What each byte becomes."""
    byte = np.arange(256)
    if name == "invert":
        new = 255 - byte
    elif name == "solarize":
        new = np.where(byte < magnitude, byte, 255 - byte)
    elif name == "posterize":
        new = byte & (256 - 2 ** (8 - int(magnitude)))
    else:  # a blend with black: one product, clipped and cut
        new = np.minimum(np.float32(magnitude) * byte.astype(np.float32), 255)
    return new.astype(np.uint8)


def whole_hues() -> NDArray[np.uint8]:
    """What Pillow makes of a hue that is a whole number of 1/255, by its floats: it, or one less.

    All other hues are rounded down as they are: of whole numbers they are nowhere near.
    """
    around = 2 * np.arange(256)  # in 1/510 of the circle
    dark = [abs(around - 255) - 85, 170 - abs(around - 170), 170 - abs(around - 340)]
    red, green, blue = (
        (85 - channel.clip(0, 85)).astype(np.float32) / np.float32(85) for channel in dark
    )
    sixths = np.where(
        red == 0,
        blue - green,
        np.where(
            green == 0,
            (2.0 + red.astype(np.float64) - blue).astype(np.float32),
            (4.0 + green.astype(np.float64) - red).astype(np.float32),
        ),
    )
    hue = np.fmod(sixths.astype(np.float64) / 6.0 + 1.0, 1.0).astype(np.float32)
    return (hue.astype(np.float64) * 255.0).astype(np.uint8)
