"""Cut photographs that come with scikit-image and scikit-learn into a folder of JPEG tiles.

``python -m benchmarks.tiles FOLDER`` writes ``labelled/CLASS/``, ``unlabelled/`` and
``test/CLASS/``, as ``gpu-mixmatch train --dataset folder`` reads them. The class of a tile is the
photograph that it was cut from. Tiles do not overlap, and which of them form a part is a keyed
draw; names in ``unlabelled/`` say nothing about the class.

Six colour photographs of things are hard classes: a tile of sky or of shadow could be of several.
``--textures`` cuts grey photographs of seven textures instead, at most 256 tiles of each; a tile
looks like most others of its class.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpu_mixmatch.sampling import epoch_order

SIDE = 32  # of a tile, in pixels
PER_CLASS = {"labelled": 10, "test": 30}  # the others are unlabelled
MOST_TEXTURE_TILES = 256  # of a class: all of a photograph of 512 x 512
QUALITY = 90


def photographs() -> dict[str, Any]:
    """The photographs by class, ``[H, W, 3]`` uint8."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    return {
        "astronaut": data.astronaut(),
        "cat": data.cat(),
        "coffee": data.coffee(),
        "rocket": data.rocket(),
        "temple": load_sample_image("china.jpg"),
        "flower": load_sample_image("flower.jpg"),
    }


def textures() -> dict[str, Any]:
    """The textures by class, ``[H, W]`` uint8; all of them lie in scikit-image's package."""
    from skimage import color, data

    found = {
        "brick": data.brick(),
        "coins": data.coins(),
        "grass": data.grass(),
        "gravel": data.gravel(),
        "moon": data.moon(),
        "stars": data.hubble_deep_field(),
        "tissue": data.immunohistochemistry(),
    }
    grey = {name: color.rgb2gray(image) * 255 for name, image in found.items() if image.ndim == 3}
    return found | {name: np.round(image).astype(np.uint8) for name, image in grey.items()}


def tiles(photograph: Any) -> list[Any]:
    """All tiles of a photograph, row by row."""
    rows, columns = (length // SIDE for length in photograph.shape[:2])
    return [
        photograph[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
        for row in range(rows)
        for column in range(columns)
    ]


def shuffled_tiles(
    sources: Mapping[str, Any], most: int | None = None
) -> list[tuple[str, list[Any]]]:
    """The tiles of each photograph in a keyed order, at most so many of one."""
    chosen = []
    for label, (name, photograph) in enumerate(sources.items()):
        pieces = tiles(photograph)
        order = epoch_order(label, 0, len(pieces)).tolist()[:most]
        chosen.append((name, [pieces[number] for number in order]))
    return chosen


def write_tiles(
    root: Path, sources: Mapping[str, Any] | None = None, most: int | None = None
) -> dict[str, int]:
    """Write the folder, and return the number of images of each part.

    Args:
        root: The folder.
        sources: Photographs by class; None takes `photographs`.
        most: Tiles of a class, at most; None takes all.
    """
    from PIL import Image

    written = dict.fromkeys((*PER_CLASS, "unlabelled"), 0)
    sources = photographs() if sources is None else sources
    for name, pieces in shuffled_tiles(sources, most):
        parts = [part for part, count in PER_CLASS.items() for _ in range(count)]
        parts += ["unlabelled"] * (len(pieces) - len(parts))
        for piece, part in zip(pieces, parts, strict=True):
            folder = root / part if part == "unlabelled" else root / part / name
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{written[part]:04d}.jpg"
            Image.fromarray(np.ascontiguousarray(piece)).save(path, quality=QUALITY)
            written[part] += 1
    return written


def main() -> None:
    """Write the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--textures", action="store_true", help="grey textures in place of things")
    arguments = parser.parse_args()
    folder = arguments.folder
    if folder.exists():
        parser.error(f"folder must not exist yet, got {folder}")
    if arguments.textures:
        written = write_tiles(folder, textures(), MOST_TEXTURE_TILES)
    else:
        written = write_tiles(folder)
    print(", ".join(f"{count} {part}" for part, count in written.items()), f"in {folder}")


if __name__ == "__main__":
    main()
