"""What the page on operations shows: ``python -m benchmarks.op_grid``.

Draws a photograph through `RandAugment`, one operation at one magnitude a tile, into
``docs/operations.png``, and writes the tables of ``docs/operations.md``: what each operation does,
and which preset draws which magnitudes. The photograph comes with scikit-image.
"""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch

from benchmarks.common import ROOT
from benchmarks.tables import markdown
from gpu_mixmatch import ColorJitter, RandAugment, WeakAugment
from gpu_mixmatch._validation import MAGNITUDES
from gpu_mixmatch.recipes import plots
from gpu_mixmatch.types import Chain, OpName, Outside

PICTURE = ROOT / "docs" / "operations.png"
PAGE = ROOT / "docs" / "operations.md"
MARKED = re.compile(r"(<!-- (?P<name>operations|ranges) -->\n).*?(<!-- /(?P=name) -->)", re.DOTALL)

SIDE = 64  # of a tile, in pixels
ACROSS, DOWN = 92, 102  # from tile to tile, of which captions take the rest
LINES = (12, 25)  # middles of a caption's lines, below the tile
COLUMNS, ROWS = 4, 11  # tiles of a row, and rows of a block; two blocks stand beside each other
BETWEEN, MARGIN = 20, 8  # blocks, and above them
BLOCK = COLUMNS * ACROSS + BETWEEN

LEVELS = (3, 6, 9)  # FixMatch's; of signed magnitudes the second has a minus
FACTOR_LEVELS = (1, 7, 9)  # those that are farther from 1, which changes nothing
SHOWN: dict[OpName, tuple[float, ...]] = {  # of operations that FixMatch has not
    "hue": (0.1, -0.25, 0.5),
    "translate_x_rel": (0.1, -0.2, 0.3),
    "translate_y_rel": (0.1, -0.2, 0.3),
}
MOVED: dict[OpName, float] = {"rotate": 27.0, "shear_x": -0.27, "translate_y": 18.0}
CUTOUTS = (16, 32, 48)  # sides in pixels
CUTOUT_ID = 9  # of an image whose cutout lies near the middle, so that the largest meets a border


class Meaning(NamedTuple):
    """What is said of an operation.

    Attributes:
        does: What it does.
        magnitude: What its magnitude is; empty where it has none.
        shown: A magnitude as a format.
    """

    does: str
    magnitude: str = ""
    shown: str = ""


MEANINGS: dict[OpName, Meaning] = {
    "identity": Meaning("nothing"),
    "autocontrast": Meaning("stretches each channel from its darkest to its brightest byte"),
    "equalize": Meaning("makes the bytes of each channel about equally frequent"),
    "invert": Meaning("makes a negative"),
    "posterize": Meaning("keeps the highest bits of each byte", "bits", "{:g} bits"),
    "solarize": Meaning("makes a negative of bright bytes", "the first of them", "from {:g}"),
    "brightness": Meaning("blends with black", "a factor; 0 is black", "× {:.3g}"),
    "color": Meaning("blends with its grey picture", "a factor; 0 is grey", "× {:.3g}"),
    "contrast": Meaning("blends with its mean grey", "a factor; 0 is that grey", "× {:.3g}"),
    "sharpness": Meaning("blends with a smoothed picture", "a factor; 0 is smooth", "× {:.3g}"),
    "hue": Meaning("turns the hues", "a share of their circle", "{:+g}"),
    "rotate": Meaning("turns about the centre", "degrees, counter-clockwise", "{:+g}°"),
    "shear_x": Meaning("moves lines", "pixels to the left per line from the top", "{:+.2g}"),
    "shear_y": Meaning("moves columns", "pixels up per column from the left", "{:+.2g}"),
    "translate_x": Meaning("moves all", "pixels to the left", "{:+g} px"),
    "translate_y": Meaning("moves all", "pixels up", "{:+g} px"),
    "translate_x_rel": Meaning(
        "moves all by whole pixels", "a share of the width, to the left", "{:+g}"
    ),
    "translate_y_rel": Meaning("moves all by whole pixels", "a share of the height, up", "{:+g}"),
}

PRESETS: dict[str, Callable[[], RandAugment | ColorJitter]] = {
    "fixmatch": RandAugment.fixmatch,
    "uda": RandAugment.uda,
    "kekmodel": RandAugment.kekmodel,
    "usb": RandAugment.usb,
    "torchvision": RandAugment.torchvision,
    "trivial": RandAugment.trivial,
    "ColorJitter": ColorJitter,
}


class Tile(NamedTuple):
    """One image of the picture.

    Attributes:
        caption: What stands below it, in one line or two.
        left: Its first column in the picture.
        top: Its first row.
        op: The operation.
        magnitude: Its magnitude.
        outside: What comes in where the image moves.
        cutout: Side of the square that is painted over.
    """

    caption: str
    left: int
    top: int
    op: OpName = "identity"
    magnitude: float = 0.0
    outside: Outside = "black"
    cutout: int = 0


def photograph() -> Any:
    """A cup of coffee from above, ``[SIDE, SIDE, 3]`` uint8.

    It is a little flat, so that autocontrast has something to stretch, and has multiples of 4 alone
    which an eye does not miss, so that the file is small.
    """
    from skimage import data

    part = data.coffee()[:384, 112:496].astype(int)
    side = len(part) // SIDE
    means = part.reshape(SIDE, side, SIDE, side, 3).sum((1, 3)) // side**2
    return ((24 + means * 3 // 4) // 4 * 4).astype(np.uint8)


def magnitudes_of(name: OpName) -> tuple[float, ...]:
    """The magnitudes at which an operation is shown."""
    if name not in MAGNITUDES:
        return (0.0,)
    if name in SHOWN:
        return SHOWN[name]
    levels = FACTOR_LEVELS if "factor" in MEANINGS[name].magnitude else LEVELS
    # of a signed one FixMatch has both signs at each level
    found = (RandAugment(ops=[name], levels=[level]).chain.ops[0].magnitudes for level in levels)
    return tuple(each[number % len(each)] for number, each in enumerate(found))


def caption_of(name: OpName, magnitude: float) -> str:
    """The operation, and its magnitude with its unit."""
    shown = MEANINGS[name].shown.format(magnitude).replace("-", "\N{MINUS SIGN}")
    return f"{name}\n{shown.replace('1 bits', '1 bit')}"


def shown_rows() -> Iterator[list[Tile]]:
    """What stands beside the original in each row, all of it in the corner still."""
    corner = (0, 0)
    for name in get_args(OpName):
        shown = [(caption_of(name, magnitude), magnitude) for magnitude in magnitudes_of(name)]
        yield [Tile(caption, *corner, name, magnitude) for caption, magnitude in shown]
    yield [Tile(f"cutout\n{side} px", *corner, cutout=side) for side in CUTOUTS]
    for outside in get_args(Outside):
        yield [
            Tile(f"{caption}\noutside {outside}", *corner, name, magnitude, outside)
            for name, magnitude in MOVED.items()
            for caption in [caption_of(name, magnitude).replace("\n", " ").removesuffix(" px")]
        ]


def tiles() -> Iterator[Tile]:
    """All tiles at their places, a row's original first."""
    for number, shown in enumerate(shown_rows()):
        block, row = divmod(number, ROWS)
        for place, tile in enumerate([Tile("original", 0, 0), *shown]):
            left = block * BLOCK + place * ACROSS + (ACROSS - SIDE) // 2
            yield tile._replace(left=left, top=row * DOWN + MARGIN)


def made(tile: Tile, image: Any) -> Any:
    """The bytes of a tile, by the engine."""
    weak = WeakAugment(padding=0, flip=0.0, mean=0.5, std=0.5, impl="eager")
    engine = RandAugment(
        weak,
        num_ops=1,
        ops={tile.op: [tile.magnitude]},
        prob=1.0,
        cutout=tile.cutout,
        outside=tile.outside,
    )
    images = torch.from_numpy(image).permute(2, 0, 1)[None]
    view = engine(images, ids=torch.tensor([CUTOUT_ID]))[0]
    return ((view + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(np.uint8)


def draw(path: Path) -> None:
    """Write the picture."""
    import matplotlib
    from PIL import Image, ImageColor, ImageDraw, ImageFont

    # a ground without opacity, in the colour of the text, so that the edges of letters have it too
    ink = ImageColor.getrgb(plots.INK)
    sheet = Image.new("RGBA", (2 * BLOCK - BETWEEN, ROWS * DOWN + MARGIN), (*ink, 0))
    pen = ImageDraw.Draw(sheet)
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    font = ImageFont.truetype(str(file), 11)
    image = photograph()
    for tile in tiles():
        sheet.paste(Image.fromarray(made(tile, image)), (tile.left, tile.top))
        for line, below in zip(tile.caption.splitlines(), LINES, strict=False):
            place = (tile.left + SIDE // 2, tile.top + SIDE + below)
            pen.text(place, line, ink, font, anchor="mm")
    sheet.save(path, optimize=True)


# Tables


def meanings_table() -> str:
    """What each operation does, and what its magnitude is."""
    rows = []
    for name, meaning in MEANINGS.items():
        least, most = MAGNITUDES.get(name, (0, 0))
        allowed = f"{least:g} .. {most:g}" if name in MAGNITUDES else ""
        rows.append([f"`{name}`", meaning.does, meaning.magnitude, allowed])
    return markdown(["operation", "does", "magnitude", "allowed"], rows)


def ranges_table() -> str:
    """What each preset draws."""
    chains = {name: make().chain for name, make in PRESETS.items()}
    rows: list[list[str]] = [
        ["operations per view", *map(_number_of_ops, chains.values())],
        ["each applied with p", *(f"{chain.prob:g}" for chain in chains.values())],
        ["cutout", *map(_cutout, chains.values())],
        ["outside", *(chain.outside for chain in chains.values())],
    ]
    for name in get_args(OpName):
        cells = [
            shown_range([*next((op.magnitudes for op in chain.ops if op.name == name), ())])
            for chain in chains.values()
        ]
        rows.append([f"`{name}`", *cells])
    return markdown(["", *(f"`{name}`" for name in chains)], rows)


def shown_range(magnitudes: Sequence[float]) -> str:
    """Magnitudes as least and most, or both of two; with ± where each has either sign."""
    values = sorted(set(magnitudes))
    if not values:
        return ""
    if values == [0]:
        return "yes"
    mirrored = [-value for value in reversed(values)]
    if len(values) > 1 and np.allclose(values, mirrored):
        values = [value for value in values if value >= 0]
        least, most = values[0], values[-1]
        if least == most:
            return f"±{most:.3g}"
        return f"up to ±{most:.3g}" if least < 0.01 * most else f"±{least:.3g} .. {most:.3g}"
    if len(values) <= 2:
        return ", ".join(f"{value:.3g}" for value in values)
    return f"{values[0]:.3g} .. {values[-1]:.3g}"


def _number_of_ops(chain: Chain) -> str:
    return f"all {len(chain.ops)}, shuffled" if chain.shuffled else f"{chain.num_slots}"


def _cutout(chain: Chain) -> str:
    if not chain.cutout:
        return "none"
    if isinstance(chain.cutout, tuple):
        size = f"{chain.cutout[0]:g} .. {chain.cutout[1]:g} of the width"
    else:
        size = f"{chain.cutout} px"
    colour = "/".join(map(str, chain.cutout_color)) if chain.cutout_color else "mean"
    return f"{size}, {colour}"


def rendered(text: str) -> str:
    """The page with its tables written anew."""
    made_of = {"operations": meanings_table, "ranges": ranges_table}
    return MARKED.sub(lambda match: match[1] + made_of[match["name"]]() + match[3], text)


def main() -> None:
    """Draw the picture and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    draw(PICTURE)
    PAGE.write_text(rendered(PAGE.read_text()))
    print(f"wrote {PICTURE.relative_to(ROOT)} and the tables of {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
