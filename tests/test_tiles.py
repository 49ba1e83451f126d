"""The JPEG tiles of photographs that the suites read and the folder examples train on."""

import numpy as np
import pytest
from PIL import Image

from benchmarks.tiles import (
    MOST_TEXTURE_TILES,
    PER_CLASS,
    photographs,
    textures,
    tiles,
    write_tiles,
)
from gpu_mixmatch.data.datasets import load_dataset

SETS = {"photographs": (photographs, None), "textures": (textures, MOST_TEXTURE_TILES)}


@pytest.mark.parametrize("name", SETS)
def test_tiles_do_not_overlap_and_each_is_in_one_part(tmp_path, name):
    sources, most = SETS[name][0](), SETS[name][1]
    written = write_tiles(tmp_path, sources, most)
    data = load_dataset("folder", tmp_path, 32)
    counts = {part: count * len(sources) for part, count in PER_CLASS.items()}
    assert {**counts, "unlabelled": written["unlabelled"]} == written
    available = [len(tiles(photo)[:most]) for photo in sources.values()]
    assert sum(written.values()) == sum(available)
    assert min(available) > 2 * sum(PER_CLASS.values())
    assert (len(data.labelled), len(data.test_images)) == (counts["labelled"], counts["test"])
    assert data.class_names == tuple(sorted(sources))
    # each file is a tile of its class: the nearest one is near, and no tile has two files
    name = data.class_names[1]
    pieces = np.stack(tiles(sources[name])).astype(float)
    found = []
    for path in sorted(tmp_path.glob(f"*/{name}/*.jpg")):
        differences = np.abs(pieces - np.asarray(Image.open(path), float))
        differences = differences.reshape(len(pieces), -1).mean(axis=1)
        assert differences.min() < 8
        found.append(int(differences.argmin()))
    assert len(set(found)) == len(found) == sum(PER_CLASS.values())


def test_textures_are_grey_and_photographs_are_in_colour():
    assert {photo.shape[2:] for photo in photographs().values()} == {(3,)}
    for texture in textures().values():
        assert (texture.dtype, texture.ndim) == (np.uint8, 2)
        assert texture.std() > 5
