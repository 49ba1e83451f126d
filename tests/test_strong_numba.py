"""Chains and cuts compiled for CPUs: eager's bytes to the last one, whatever layout and threads."""

import importlib

import numpy as np
import pytest
import torch

from gpu_mixmatch import ColorJitter, MixMatch, RandAugment, WeakAugment, functional
from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch._chain import entries
from gpu_mixmatch.impl import eager, implementation
from gpu_mixmatch.types import Chain, ChainParams, Geometry, Scaling
from tests.test_numba import params_for
from tests.test_strong import HUES, STILL, all_operations, by_pillow, images_of, wrong_bytes
from tests.tolerances import TOLERANCES

compiled = pytest.importorskip("gpu_mixmatch.impl.numba", reason="needs numba")
operations = importlib.import_module("gpu_mixmatch.impl.numba.operations")
threads = importlib.import_module("gpu_mixmatch.impl.numba.threads")

CPU = torch.device("cpu")
BYTES = Scaling(1.0, 1.0)  # a view is its bytes and one, so that a value of 0 is seen
SHAPES = [(3, 24, 30), (1, 24, 30), (4, 21, 33)]
GEOMETRIES = {
    "shift": {"padding": 4},
    "zeros": {"padding": 3, "padding_mode": "zeros"},
    "edge": {"padding": 3, "padding_mode": "edge"},
    "zoom": {"padding": 2, "zoom_px": (0, 5)},
    "crop": {"padding": 3, "size": (13, 11)},
    "small crop": {"padding": 4, "padding_mode": "zeros", "size": 3},
    "smaller": {"padding": 0, "size": (20, 17), "area": (0.1, 1.0)},
    "larger": {"padding": 3, "padding_mode": "edge", "size": (40, 37), "area": (0.05, 0.6)},
    "same": {"padding": 0, "area": (0.3, 1.0)},
}


def chained(weak, channels=3, **fields):
    """A strong engine of operations that images of any number of channels have."""
    names = ["rotate", "shear_x", "equalize", "sharpness", "solarize", "autocontrast", "identity"]
    names += ["color", "contrast"] if channels in (1, 3) else []
    return RandAugment(weak, 3, names, prob=0.8, **{"cutout": (0.0, 0.5), **fields})


def scaling_for(channels):
    generator = torch.Generator().manual_seed(channels)
    return Scaling(*(torch.rand(2, channels, generator=generator) + 0.1))


def both(images, params, geometry, scaling, **options):
    """Views of eager and of the compiled loops."""
    return [
        functional.augment(images, params, geometry, scaling, impl=impl, **options)
        for impl in ("eager", "numba")
    ]


def views_of_entries(chain, images, slots):
    """Views of eager and of the compiled loops that hold the entries ``[R, S]``."""
    zeros = torch.zeros(len(images), dtype=torch.int32)
    zoom, sigma = torch.zeros(len(images), 4, dtype=torch.int32), torch.zeros(len(images))
    params = ChainParams(zeros, zeros, zeros, zoom, sigma, slots.int())
    return both(images, params, Geometry(chain=chain), BYTES)


# Operations


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("size", [(32, 32), (33, 33), (96, 96), (37, 53), (2, 5)])
def test_every_operation_at_every_magnitude_makes_the_bytes_of_eager(size, channels):
    chain = all_operations()._replace(num_slots=1)
    listed = entries(chain)
    images = images_of(len(listed), *size, channels)
    slots = torch.arange(len(listed))[:, None]
    theirs, mine = views_of_entries(chain, images, slots)
    assert wrong_bytes(mine, theirs, listed) == {}


@pytest.mark.parametrize("outside", ["black", "mean"])
@pytest.mark.parametrize(("num_slots", "channels", "size"), [(2, 3, 32), (3, 3, 33), (3, 1, 32)])
def test_operations_behind_each_other_make_the_bytes_of_eager(num_slots, channels, size, outside):
    chain = all_operations()._replace(num_slots=num_slots, outside=outside)
    listed = entries(chain)
    images = images_of(len(listed), size, size, channels, seed=num_slots)
    generator = torch.Generator().manual_seed(num_slots)
    slots = torch.stack([torch.randperm(len(listed), generator=generator)] * num_slots, 1)
    slots = torch.stack([slots[:, n].roll(7 * n) for n in range(num_slots)], 1)
    theirs, mine = views_of_entries(chain, images, slots)
    programs = [[listed[entry] for entry in row] for row in slots.tolist()]
    assert wrong_bytes(mine, theirs, map(str, programs)) == {}
    if outside == "black":  # and of Pillow
        made = by_pillow(images, programs)
        assert wrong_bytes(mine.sub(1).byte(), made, map(str, programs)) == {}


def test_a_turned_hue_is_eagers_for_every_kind_of_colour():
    values = torch.arange(0, 256, 3)
    colors = torch.cartesian_prod(values, values, values).to(torch.uint8)
    images = colors.T.reshape(1, 3, 86, -1)
    chain = Chain((HUES,), 1)
    count = len(entries(chain))
    theirs, mine = views_of_entries(
        chain, images.expand(count, -1, -1, -1), torch.arange(count)[:, None]
    )
    assert wrong_bytes(mine, theirs, entries(chain)) == {}


def test_a_product_is_rounded_before_it_is_added_to():
    first, second = np.divmod(np.arange(65536, dtype=np.int32), 256)
    fused = 0
    for level in range(1, 10):
        factor = np.float32(level * 1.8 / 10 + 0.1)
        product = factor * (second - first).astype(np.float32)
        wanted = (first.astype(np.float32) + product).clip(0, 255).astype(np.uint8)
        # in float64 nothing is lost: rounded once, as by a fused multiply and add
        exact = first + np.float64(factor) * (second - first)
        fused += (exact.astype(np.float32).clip(0, 255).astype(np.uint8) != wanted).sum()
        for value in range(0, 256, 5):  # a blend with the mean, of all values and many of one
            mine = np.concatenate([np.arange(256), np.full(256, value)]).astype(np.uint8)
            mean = (2 * int(mine.sum(dtype=int)) + 512) // 1024
            operations.contrast(mine, factor, 512, 512, 1)
            assert (mine[:256] == wanted[first == mean]).all()
    assert fused == 404  # so many bytes would be wrong


# Geometry, layouts, dtypes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_chains_behind_any_geometry_equal_eager_to_the_last_bit(name, shape):
    channels = shape[0]
    for outside, fields in (("mean", {}), ("black", {"cutout_color": (9,)})):
        engine = chained(WeakAugment(**GEOMETRIES[name]), channels, outside=outside, **fields)
        x, u = images_of(9, *shape[1:], channels), images_of(8, *shape[1:], channels, seed=1)
        params = engine.draw(1, 2, 25)
        theirs, mine = both((x, u), params, engine.geometry, scaling_for(channels))
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_cuts_without_a_chain_equal_eager(name):
    engine = WeakAugment(**GEOMETRIES[name])
    images = images_of(5, 24, 30), images_of(6, 24, 30, seed=1)
    params = engine.draw(1, 2, 17)
    for sources, scaling in (
        (images, Scaling(scaling_for(3).scale / 255, scaling_for(3).bias)),
        (tuple(image / 255 for image in images), scaling_for(3)),
    ):
        for mixup in (None, params_for(17)):
            options = {"mixup": mixup, "channels_last": mixup is None}
            theirs, mine = both(sources, params, engine.geometry, scaling, **options)
            if mixup is None and ("crop" in name or name in ("shift", "zeros", "edge")):
                assert torch.equal(mine, theirs)
            torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCES[torch.float32])


def test_a_cut_is_blurred_as_eager_blurs_it():
    for fields in ({"size": 12}, {"size": 20, "area": (0.2, 1.0)}, {"area": (0.2, 1.0)}):
        engine = WeakAugment(2, blur_sigma=(0.0, 1.5), **fields)
        images = images_of(20, 17, 24)
        theirs, mine = both(images, engine.draw(0, 0, 20), engine.geometry, BYTES)
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=0)


@pytest.mark.parametrize("nhwc", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [3, 1, 4])
def test_layouts_of_a_chain_equal_eager_to_the_last_bit(channels, channels_last, nhwc):
    images = images_of(30, 20, 24, channels)
    strided = images.to(memory_format=torch.channels_last)
    for cut in ({}, {"size": (15, 9), "area": (0.1, 0.8)}):
        engine = chained(WeakAugment(3, **cut), channels)
        params = engine.draw(1, 2, 60)
        options = {"channels_last": channels_last, "layout": "NHWC" if nhwc else "NCHW"}
        for source in (images, strided, images[:, :, :, :]):
            given = source.permute(0, 2, 3, 1) if nhwc else source
            theirs, mine = both(given, params, engine.geometry, scaling_for(channels), **options)
            assert mine.stride() == theirs.stride()
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_dtypes_of_a_chain_equal_eager(channels_last, dtype):
    images = images_of(5, 16, 17), images_of(6, 16, 17, seed=1)
    for weak in (WeakAugment(2), WeakAugment(2, blur_sigma=(0.0, 1.0))):
        engine = chained(weak)
        params, scaling = engine.draw(1, 2, 17), Scaling(1 / 127.5, -1.0)
        options = {"dtype": dtype, "channels_last": channels_last}
        for mixup in (None, params_for(17)):
            theirs, mine = both(images, params, engine.geometry, scaling, mixup=mixup, **options)
            assert mine.stride() == theirs.stride()
            torch.testing.assert_close(mine, theirs, atol=TOLERANCES[dtype], rtol=0)
            if mixup is None and not weak.blur_sigma:
                assert torch.equal(mine, theirs)


def test_a_blur_follows_the_operations_and_what_is_hidden_stays_hidden():
    engine = chained(WeakAugment(0, blur_sigma=(0.0, 2.0)), cutout=6)
    images = images_of(60, 16, 19)
    theirs, mine = both(images, engine.draw(0, 0, 60), engine.geometry, BYTES)
    assert torch.equal(mine == 0, theirs == 0)
    assert 0.02 < float((mine == 0).float().mean()) < 0.5
    torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=0)


def test_threads_and_a_workspace_change_no_bit(monkeypatch):
    images = images_of(5, 24, 30), images_of(7, 24, 30, seed=1)
    workspace = Workspace()
    engines = [
        chained(WeakAugment(2)),
        chained(WeakAugment(0, size=20, area=(0.2, 1.0), blur_sigma=(0.0, 1.0))),
        WeakAugment.imagenet(20),
    ]
    for engine in engines:
        params = engine.draw(0, 0, 19)
        alone = engine.apply(images, params)
        with monkeypatch.context() as patched:
            patched.setattr(threads, "_LEAST_PER_THREAD", 1)
            patched.setattr(torch, "get_num_threads", lambda: 3)
            for _ in range(2):
                assert torch.equal(engine.apply(images, params, workspace=workspace), alone)


def test_no_rows_and_no_labelled_images_are_no_trouble():
    engine = chained(WeakAugment(2))
    for count_x, count_u in ((0, 0), (0, 3)):
        images = images_of(count_x, 16, 16), images_of(count_u, 16, 16)
        theirs, mine = both(images, engine.draw(0, 0, 2 * count_u), engine.geometry, BYTES)
        assert torch.equal(mine, theirs)


# The choice


def test_auto_takes_the_loops_on_a_cpu(monkeypatch):
    for engine in (RandAugment.fixmatch(), ColorJitter(), WeakAugment.imagenet()):
        assert implementation(engine.impl, CPU) is compiled
    monkeypatch.setattr(eager, "augment", None)
    assert RandAugment.fixmatch(STILL)(images_of(2, 20, 20)).shape == (2, 3, 20, 20)


def test_batches_equal_those_of_eager():
    x, u = images_of(4, 20, 20), images_of(6, 20, 20, seed=1)
    batches = [
        MixMatch(chained(WeakAugment(2, impl=impl), cutout=7), 3, seed=2, impl=impl)(
            x, torch.arange(4) % 3, u, lambda images: images[:, :, 0, 0]
        )
        for impl in ("eager", "numba")
    ]
    assert torch.equal(batches[0].params.index, batches[1].params.index)
    torch.testing.assert_close(batches[1].inputs, batches[0].inputs, atol=4e-6, rtol=0)
