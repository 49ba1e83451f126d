"""The measurement of engines and loaders, its table, and the tiles that it trains on."""

import json
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import engines
from benchmarks.report import ROOT, speeds
from benchmarks.tiles import PER_CLASS, photographs, tiles, write_tiles
from gpu_mixmatch.data.datasets import load_dataset
from gpu_mixmatch.types import SemiSupervisedBatch


@pytest.mark.slow
def test_quick_measurement_writes_all_that_the_table_shows(tmp_path):
    path = tmp_path / "engines.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.engines", "--quick", "--out", str(path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
    )
    content = json.loads(path.read_text())
    assert [row["key"] for row in content["rows"]] == [
        *("weak", "dali", "kornia", "resident", "memory-0", "memory-2"),
        *("files-0", "files-2", "dali-loader"),
    ]
    for row in content["rows"]:
        for cell in row["cells"]:
            assert 0 < cell["low"] <= cell["median"] <= cell["high"]
    lines = speeds(content).splitlines()
    assert len(lines) == 2 + 9 + 2
    assert all(line.endswith("| not yet measured |") for line in lines[2:11])
    assert "1 thread," in lines[-1]


def test_rates_count_images_and_take_turns():
    calls = []

    def contender(key, images):
        return engines.Contender(key, key, "", images, lambda: calls.append(key))

    result = engines.rates([contender("a", 1), contender("b", 1000)], rounds=4, seconds=1e-4)
    assert {key: len(values) for key, values in result.items()} == {"a": 4, "b": 4}
    assert np.median(result["b"]) > 50 * np.median(result["a"])
    changes = sum(first != second for first, second in pairwise(calls))
    assert changes == 2 * 5 - 1  # the warm-up and four rounds, in turns


def test_loaders_that_differ_are_not_timed():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    numbers = torch.arange(2)
    good = SemiSupervisedBatch(images, numbers, images, numbers, numbers)
    keys = ("resident", "memory-0", "memory-2", "files-0", "files-2", "dali-loader")
    batches = dict.fromkeys(keys, good)
    engines.check_loaders(batches)
    with pytest.raises(AssertionError):
        engines.check_loaders({**batches, "memory-2": good._replace(u=images + 1)})
    with pytest.raises(AssertionError):
        engines.check_loaders({**batches, "files-2": good._replace(ids_u=numbers + 1)})
    with pytest.raises(RuntimeError, match="dali-loader must give PIL's images"):
        engines.check_loaders({**batches, "dali-loader": good._replace(u=images + 9)})


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
