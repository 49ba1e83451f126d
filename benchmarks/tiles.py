"""Cut photographs that come with scikit-image and scikit-learn into a folder of JPEG tiles.

``python -m benchmarks.tiles FOLDER`` writes ``labelled/CLASS/``, ``unlabelled/`` and
``test/CLASS/``, as ``gpu-mixmatch train --dataset folder`` reads them. The class of a tile is the
photograph that it was cut from. Tiles do not overlap, and which of them form a part is a keyed
draw; names in ``unlabelled/`` say nothing about the class.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from gpu_mixmatch.sampling import epoch_order

SIDE = 32  # of a tile, in pixels
PER_CLASS = {"labelled": 10, "test": 30}  # the others are unlabelled
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


def tiles(photograph: Any) -> list[Any]:
    """All tiles of a photograph, row by row."""
    rows, columns = (length // SIDE for length in photograph.shape[:2])
    return [
        photograph[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
        for row in range(rows)
        for column in range(columns)
    ]


def write_tiles(root: Path) -> dict[str, int]:
    """Write the folder, and return the number of images of each part."""
    from PIL import Image

    written = dict.fromkeys((*PER_CLASS, "unlabelled"), 0)
    for label, (name, photograph) in enumerate(photographs().items()):
        pieces = tiles(photograph)
        parts = [part for part, count in PER_CLASS.items() for _ in range(count)]
        parts += ["unlabelled"] * (len(pieces) - len(parts))
        for number, part in zip(epoch_order(label, 0, len(pieces)).tolist(), parts, strict=True):
            folder = root / part if part == "unlabelled" else root / part / name
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{written[part]:04d}.jpg"
            Image.fromarray(np.ascontiguousarray(pieces[number])).save(path, quality=QUALITY)
            written[part] += 1
    return written


def main() -> None:
    """Write the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder that does not exist yet")
    folder = parser.parse_args().folder
    if folder.exists():
        parser.error(f"folder must not exist yet, got {folder}")
    written = write_tiles(folder)
    print(", ".join(f"{count} {part}" for part, count in written.items()), f"in {folder}")


if __name__ == "__main__":
    main()
