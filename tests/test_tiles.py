"""The JPEG tiles of photographs that the suites read and the folder example trains on."""

import numpy as np
from PIL import Image

from benchmarks.tiles import PER_CLASS, photographs, tiles, write_tiles
from gpu_mixmatch.data.datasets import load_dataset


def test_tiles_do_not_overlap_and_each_is_in_one_part(tmp_path):
    written = write_tiles(tmp_path)
    data = load_dataset("folder", tmp_path, 32)
    counts = {part: count * len(photographs()) for part, count in PER_CLASS.items()}
    assert {**counts, "unlabelled": written["unlabelled"]} == written
    assert sum(written.values()) == sum(len(tiles(photo)) for photo in photographs().values())
    assert (len(data.labelled), len(data.test_images)) == (counts["labelled"], counts["test"])
    assert data.class_names == tuple(sorted(photographs()))
    # each file is a tile of its class: the nearest one is near, and no tile has two files
    name = data.class_names[1]
    pieces = np.stack(tiles(photographs()[name])).astype(float)
    found = []
    for path in sorted(tmp_path.glob(f"*/{name}/*.jpg")):
        differences = np.abs(pieces - np.asarray(Image.open(path), float)).mean(axis=(1, 2, 3))
        assert differences.min() < 8
        found.append(int(differences.argmin()))
    assert len(set(found)) == len(found) == sum(PER_CLASS.values())
