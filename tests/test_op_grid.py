"""The page on operations: its picture has Pillow's bytes, and its tables are those of the code."""

from typing import get_args

import numpy as np
import pytest
from PIL import Image

from benchmarks import op_grid
from gpu_mixmatch import RandAugment
from gpu_mixmatch.types import OpName
from tests import pillow

GREY = 128  # 0 after normalisation by a mean of a half


@pytest.fixture(scope="module")
def committed():
    """The bytes of each tile of the committed picture."""
    sheet = np.asarray(Image.open(op_grid.PICTURE).convert("RGBA"))
    side = op_grid.SIDE
    found = []
    for tile in op_grid.tiles():
        part = sheet[tile.top : tile.top + side, tile.left : tile.left + side]
        assert (part[..., 3] == 255).all(), tile
        found.append((tile, part[..., :3]))
    return found


def test_every_tile_of_the_committed_picture_is_what_pillow_makes_of_the_photograph(committed):
    (_, original), *_ = committed
    for tile, came in committed:
        wanted, outside = pillow.changed(original, [(tile.op, tile.magnitude)], transparent=True)
        wanted = np.where(outside[..., None] & (tile.outside == "mean"), GREY, wanted)
        if tile.cutout:
            lines, places = np.nonzero((came != wanted).any(axis=2))
            hidden = slice(lines.min(), lines.max() + 1), slice(places.min(), places.max() + 1)
            assert max(part.stop - part.start for part in hidden) == tile.cutout
            assert (came[hidden] == GREY).all()
            wanted = wanted.copy()
            wanted[hidden] = GREY
        np.testing.assert_array_equal(came, wanted, err_msg=tile.caption)


def test_the_committed_photograph_is_that_of_the_command(committed):
    np.testing.assert_array_equal(committed[0][1], op_grid.photograph())


def test_a_tile_is_made_by_the_engine(committed):
    for tile, came in committed[-12:]:  # cutouts, and what comes in from outside
        np.testing.assert_array_equal(op_grid.made(tile, op_grid.photograph()), came)


def test_the_picture_shows_every_operation_and_is_small(committed):
    shown = [tile for tile, _ in committed if tile.caption != "original"]
    assert {tile.op for tile in shown} == set(get_args(OpName)) == set(op_grid.MEANINGS)
    signed = {tile.op for tile in shown if tile.magnitude < 0}
    assert signed >= {"hue", "rotate", "shear_x", "shear_y", "translate_x", "translate_y"}
    assert op_grid.PICTURE.stat().st_size < 400_000


def test_the_tables_are_those_of_the_presets():
    text = op_grid.PAGE.read_text()
    assert text == op_grid.rendered(text)
    assert "| `rotate` | ±3 .. 27 | ±3 .. 27 | ±3 .. 27 | up to ±29.9 | ±9 | up to ±135 |" in text
    assert len(op_grid.MARKED.findall(text)) == 2


@pytest.mark.parametrize(
    ("magnitudes", "text"),
    [
        ((), ""),
        ((0.0,), "yes"),
        ((7.0, 7.0), "7"),
        ((0.73, 1.27), "0.73, 1.27"),
        ((-9.0, 9.0), "±9"),
        ((3.0, -3.0, 27.0, -27.0), "±3 .. 27"),
        ((0.0, 0.0, 2.0, -2.0), "up to ±2"),
        ((4.0, 2.0, 1.0), "1 .. 4"),
        ((1.0, -3.0, 2.0), "-3 .. 2"),
    ],
)
def test_a_range_is_shown_as_it_is(magnitudes, text):
    assert op_grid.shown_range(magnitudes) == text


def test_a_changed_preset_changes_the_table(monkeypatch):
    mild = {"fixmatch": lambda: RandAugment(ops=["rotate"], levels=[1])}
    monkeypatch.setattr(op_grid, "PRESETS", mild)
    assert "| `rotate` | ±3 |" in op_grid.ranges_table()
