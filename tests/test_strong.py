"""RandAugment, ColorJitter and cuts: to the last bit Pillow's, drawn per view by sample id."""

import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn.functional import interpolate, pad

from gpu_mixmatch import ColorJitter, MixMatch, RandAugment, WeakAugment, sampling
from gpu_mixmatch._chain import columns, entries, slots_of
from gpu_mixmatch.impl.eager.chain import run_slots
from gpu_mixmatch.impl.tables import chain_tables
from gpu_mixmatch.types import AugmentParams, Chain, ChainParams, Cut, DrawPlan, Op
from tests import pillow
from tests.factories import random_images
from tests.no_sync import look_for_no_rows
from tests.test_sampling import LEAST_P, assert_same, p_uniform, rows_of, slow_words

CPU = torch.device("cpu")
PLAIN = {"mean": 0.0, "std": 1.0}
STILL = WeakAugment(0, flip=0.0)
PRESETS = ("fixmatch", "uda", "kekmodel", "usb", "torchvision", "trivial")
# Magnitudes at which a rule has an end, a tie or a path of its own in Pillow
EDGES = (
    Op("rotate", (0.0, 90.0, 180.0, 270.0, -90.0, 13.37, -128.7)),
    Op("shear_x", (2.5, -0.004)),
    Op("translate_x", (2.5, -2.5, 3.49, -1000.0)),
    Op("translate_y", (0.5, -0.5)),
    Op("solarize", (0.0, 178.5, 256.0)),
    Op("posterize", tuple(map(float, range(1, 9)))),
    *(Op(name, (0.0, 1.0, 1.9, 7.0)) for name in ("brightness", "color", "contrast", "sharpness")),
)
HUES = Op("hue", (-0.5, -0.21, 0.0, 0.002, 0.1, 0.5))


def all_operations():
    """Every operation and magnitude of the presets, and some more; USB's at a few of its levels."""
    ops = [op for preset in PRESETS for op in getattr(RandAugment, preset)().chain.ops]
    kept = {Op(name, values if len(values) < 100 else values[::37]) for name, values in ops}
    return Chain((*sorted(kept), *EDGES))


def held(params, engine):
    """The operations and magnitudes that each row's slots hold, in order."""
    listed = entries(engine.chain)
    slots = params.chain[:, columns(engine.policy.cut, engine.chain).slots]
    return [[listed[entry] for entry in row if entry] for row in slots.tolist()]


def changed_by(chain, images, slots):
    size = images.shape[2:]
    return run_slots(images.clone(), slots, chain_tables(chain, *size, CPU))[0]


def by_pillow(images, programs):
    found = [
        pillow.changed(image.permute(1, 2, 0).numpy(), program)[0]
        for image, program in zip(images, programs, strict=True)
    ]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)


def wrong_bytes(mine, theirs, names):
    """How many bytes differ, by what was done."""
    counts = (mine != theirs).flatten(1).sum(1).tolist()
    return {name: count for name, count in zip(names, counts, strict=True) if count}


def images_of(count, height, width, channels=3, seed=0):
    pixels = torch.from_numpy(pillow.pictures(count, height, width, channels, seed))
    return pixels.permute(0, 3, 1, 2).contiguous()


# Operations


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("size", [(32, 32), (33, 33), (37, 53), (96, 96), (2, 5), (224, 224)])
def test_every_operation_at_every_magnitude_is_pillows(size, channels):
    chain = all_operations()
    if size == (224, 224):  # the ends and the middle are enough of large ones
        ops = {Op(op.name, op.magnitudes[:: max(1, len(op.magnitudes) // 2)]) for op in chain.ops}
        chain = Chain(tuple(sorted(ops)))
    listed = entries(chain)
    images = images_of(len(listed), *size, channels)
    slots = torch.arange(len(listed), dtype=torch.int32)[:, None]
    theirs = by_pillow(images, [[entry] for entry in listed])
    assert wrong_bytes(changed_by(chain, images, slots), theirs, listed) == {}


def test_a_turned_hue_is_pillows_for_every_kind_of_colour():
    values = torch.tensor([0, 1, 2, 5, 16, 31, 50, 84, 85, 90, 127, 128, 170, 200, 254, 255])
    colors = torch.cartesian_prod(values, values, values).to(torch.uint8).T.reshape(3, 64, 64)
    chain = Chain((HUES,))
    images = torch.stack([colors] * (1 + len(HUES.magnitudes)))
    slots = torch.arange(len(images), dtype=torch.int32)[:, None]
    theirs = by_pillow(images, [[entry] for entry in entries(chain)])
    assert wrong_bytes(changed_by(chain, images, slots), theirs, entries(chain)) == {}


def test_where_draws_cannot_be_looked_at_views_are_the_same(monkeypatch):
    weak = WeakAugment(impl="eager")
    engines = RandAugment(weak), RandAugment(weak, prob=1.0), ColorJitter(weak, gray=0.5)
    images = images_of(60, 32, 32)
    seen = [engine(images) for engine in engines]
    look_for_no_rows(monkeypatch)
    for engine, views in zip(engines, seen, strict=True):
        assert torch.equal(engine(images), views)


def test_a_wrong_byte_would_be_seen():
    chain = Chain((Op("brightness", (1.3,)), Op("rotate", (9.0,))))
    images = images_of(2, 32, 32)
    nearly = Chain((Op("brightness", (1.302,)), Op("rotate", (9.2,))))
    slots = torch.tensor([[1], [2]], dtype=torch.int32)
    theirs = by_pillow(images, [[entry] for entry in entries(nearly)[1:]])
    assert len(wrong_bytes(changed_by(chain, images, slots), theirs, ("one", "other"))) == 2


@pytest.fixture(params=["eager", "numba"])
def impl(request):
    """What runs chains on a CPU, if it is there."""
    if request.param == "numba":
        pytest.importorskip("numba")
    return request.param


@pytest.mark.parametrize("num_ops", [2, 3])
@pytest.mark.parametrize("outside", ["black", "mean"])
def test_chains_with_shift_flip_and_cutout_are_pillows(outside, num_ops, impl):
    count, (height, width) = 300, (32, 32) if num_ops == 2 else (37, 30)
    weak = WeakAugment(4, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25), impl=impl)
    engine = RandAugment(weak, num_ops, prob=1.0, outside=outside)
    images = images_of(count, height, width, seed=num_ops)
    params = engine.draw(3, 1, count)
    scale, bias = (factor.numpy() for factor in weak.scaling_of(images, 3))
    views = engine.apply(images, params).permute(0, 2, 3, 1).numpy()
    wide = pad(images.float(), [4] * 4, mode="reflect").byte().permute(0, 2, 3, 1).numpy()
    for row, program in enumerate(held(params, engine)):
        assert len(program) == num_ops
        top, left = int(params.top[row]), int(params.left[row])
        window = wide[row, top : top + height, left : left + width]
        window = window[:, ::-1] if params.flip[row] else window
        pixels, beyond = pillow.changed(window.copy(), program, transparent=outside == "mean")
        wanted = pixels.astype(np.float32) * scale
        wanted += bias
        if outside == "mean":
            wanted[beyond] = 0
        down, across, side = params.chain[row, -3:].tolist()
        assert side == 16
        y, x = (down * height) >> 24, (across * width) >> 24
        wanted[max(y - 8, 0) : y + 8, max(x - 8, 0) : x + 8] = 0
        np.testing.assert_array_equal(views[row], wanted, err_msg=str(program))


@pytest.mark.parametrize("gray", [0.0, 0.5])
def test_a_jitter_is_pillows_in_every_order(gray, impl):
    weak = WeakAugment(0, flip=0.0, impl=impl, **PLAIN)
    engine = ColorJitter(weak, 0.4, 0.6, 0.5, 0.2, gray=gray)
    images = images_of(200, 16, 16)
    params = engine.draw(0, 0, 200)
    programs = held(params, engine)
    orders = {tuple(name for name, _ in program[:4]) for program in programs}
    assert len(orders) == 24
    assert {len(program) for program in programs} == ({4} if not gray else {4, 5})
    mine = (engine.apply(images, params) * 255).round().byte()
    assert wrong_bytes(mine, by_pillow(images, programs), range(200)) == {}


def test_without_operations_and_cutout_a_strong_view_is_the_weak_one():
    weak = WeakAugment(3, flip=0.5, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25), impl="eager")
    images = random_images(6, (3, 12, 9), seed=1)
    for engine in (RandAugment(weak, 0, cutout=0), RandAugment(weak, 2, prob=0.0, cutout=0)):
        assert torch.equal(engine(images, 5, 7), weak(images, 5, 7))


def test_a_view_is_the_same_in_every_layout_and_rounded_in_half_precision():
    images = images_of(20, 20, 24)
    fields = {"padding": 2, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}
    plain = RandAugment.fixmatch(WeakAugment(**fields))(images)
    nhwc = RandAugment.fixmatch(WeakAugment(**fields, layout="NHWC", channels_last=True))
    views = nhwc(images.permute(0, 2, 3, 1))
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(views, plain)
    half = RandAugment.fixmatch(WeakAugment(**fields, dtype=torch.bfloat16))(images)
    assert torch.equal(half, plain.bfloat16())


def test_blur_follows_the_operations_and_a_cutout_follows_the_blur():
    weak = WeakAugment(0, flip=0.0, blur_sigma=(1.0, 1.0), impl="eager")
    engine = RandAugment(weak, 1, {"invert": [0]}, prob=1.0, cutout=4)
    images = images_of(5, 16, 16)
    params = engine.draw(0, 0, 5)
    mine = engine.apply(images, params)
    theirs = weak.apply(255 - images, AugmentParams(*params[:5]))
    hidden = mine != theirs
    assert torch.equal(mine[hidden], torch.zeros(int(hidden.sum())))
    assert all(0 < int(row.sum()) <= 3 * 16 for row in hidden)


# The mistakes of ports


def drawn_of(engine):
    """How often 20,000 views of an engine get each operation's magnitudes, by its name."""
    params = engine.draw(0, 0, 20_000)
    slots = params.chain[:, columns(engine.policy.cut, engine.chain).slots]
    found = {}
    for (name, size), count in zip(
        entries(engine.chain), torch.bincount(slots.flatten()).tolist(), strict=True
    ):
        found.setdefault(name.removesuffix("_rel"), Counter())[round(size, 9)] += count
    return found


def assert_both_ways(counts, middle=0):
    ways = {
        way: sum(n for size, n in counts.items() if way * (size - middle) > 0) for way in (1, -1)
    }
    assert stats.binomtest(ways[1], sum(ways.values())).pvalue > LEAST_P
    assert {round(2 * middle - size, 9) for size in counts} == set(counts)


def test_both_signs_are_drawn_of_whatever_has_one():
    for preset in PRESETS:
        drawn = drawn_of(getattr(RandAugment, preset)())
        for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y"):
            assert_both_ways(drawn[name])
    assert_both_ways(drawn_of(ColorJitter())["hue"])


@pytest.mark.parametrize("preset", ["fixmatch", "uda", "torchvision", "trivial", "jitter"])
def test_factors_go_both_ways_from_one_as_often(preset):
    drawn = drawn_of(ColorJitter() if preset == "jitter" else getattr(RandAugment, preset)())
    for name in ("brightness", "color", "contrast"):
        assert_both_ways(drawn[name], middle=1)


def test_a_translation_moves_by_its_pixels():
    images = torch.arange(1, 101, dtype=torch.uint8).view(1, 1, 10, 10)
    for pixels in (3, -3):
        chain = Chain((Op("translate_x", (float(pixels),)), Op("translate_y_rel", (pixels / 10,))))
        moved = [changed_by(chain, images, torch.tensor([[n]], dtype=torch.int32)) for n in (1, 2)]
        kept, empty = (
            (slice(3, None), slice(-3, None))
            if pixels > 0
            else (
                slice(None, -3),
                slice(None, 3),
            )
        )
        put = slice(None, -3) if pixels > 0 else slice(3, None)
        assert torch.equal(moved[0][..., put], images[..., kept])
        assert not moved[0][..., empty].any()
        assert torch.equal(moved[1][..., put, :], images[..., kept, :])
        assert not moved[1][..., empty, :].any()


def test_posterize_keeps_bits_and_is_never_black():
    for preset in PRESETS:
        (op,) = [op for op in getattr(RandAugment, preset)().chain.ops if op.name == "posterize"]
        assert min(op.magnitudes) >= 1
    with pytest.raises(ValueError, match="posterize must be in"):
        RandAugment(ops={"posterize": [0]})
    with pytest.raises(ValueError, match="which would keep no bit"):
        RandAugment(levels=[10])
    bytes_of = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    chain = Chain((Op("posterize", tuple(map(float, range(1, 9)))),))
    slots = torch.arange(1, 9, dtype=torch.int32)[:, None]
    for bits, kept in enumerate(changed_by(chain, bytes_of.expand(8, -1, -1, -1), slots), 1):
        lost = 2 ** (8 - bits)
        assert torch.equal(kept.flatten().int(), torch.arange(256).int() // lost * lost)


@pytest.mark.parametrize(("preset", "side"), [("fixmatch", 16), ("uda", 16), ("kekmodel", 17)])
def test_a_cutout_hides_as_many_pixels_as_it_says(preset, side, impl):
    still = WeakAugment(0, flip=0.0, impl=impl, **PLAIN)
    engine = getattr(RandAugment, preset)(still, num_ops=0)
    images = torch.full((800, 3, 48, 48), 200, dtype=torch.uint8)
    hidden = engine(images)[:, 0] != 200 * torch.tensor(1 / 255)
    counts = Counter(hidden.flatten(1).sum(1).tolist())
    assert max(counts) == side * side
    assert counts.most_common(1)[0][0] == side * side
    assert hidden.float().mean(0).min() > 0  # it reaches the corners
    if preset == "kekmodel":
        assert torch.equal(
            engine(images)[hidden[:, None].expand(-1, 3, -1, -1)].unique(),
            127 * torch.tensor([1 / 255]),
        )


def test_a_cutout_of_a_share_is_at_most_that_of_the_width(impl):
    engine = RandAugment.usb(WeakAugment(0, flip=0.0, impl=impl, **PLAIN), num_ops=0)
    images = torch.full((500, 3, 40, 40), 255, dtype=torch.uint8)
    hidden = engine(images)[:, 0] != 1
    sides = hidden.any(2).sum(1)
    assert 18 <= int(sides.max()) <= 20
    assert int(sides.min()) == 0


# Cuts


@pytest.mark.parametrize("size", [(8, 11), (24, 24)])
def test_a_resized_cut_equals_the_interpolation_of_the_cut(size, impl):
    images = images_of(40, 20, 30)
    fields = {"aspect": (0.5, 2.0), "flip": 0.5, "impl": impl, **PLAIN}
    weak = WeakAugment(0, size=size, area=(0.1, 1.0), **fields)
    params = weak.draw(0, 0, 40)
    wanted = []
    root = round(256 * (20 * 30) ** 0.5)
    for row, (tall, wide, down, across) in enumerate(params.chain.tolist()):
        height, width = (
            min(max((side * root + 2**23) >> 24, 1), most)
            for side, most in ((tall, 20), (wide, 30))
        )
        top, left = (down * (21 - height)) >> 24, (across * (31 - width)) >> 24
        part = images[row : row + 1, :, top : top + height, left : left + width].float()
        view = interpolate(part, size=size, mode="bilinear", align_corners=False)[0]
        wanted.append(view.flip(2) if params.flip[row] else view)
    wanted = torch.stack(wanted)
    torch.testing.assert_close(weak.apply(images, params) * 255, wanted, atol=2e-3, rtol=0)
    # in front of operations it is bytes, with weights in 1/2048
    strong = RandAugment(weak, 0, cutout=0)
    mine = strong.apply(images, params) * 255
    torch.testing.assert_close(mine, mine.round(), atol=1e-4, rtol=0)
    assert float((mine - wanted).abs().max()) < 0.65


def test_a_cut_covers_the_area_and_has_the_aspect_that_were_asked_for():
    params = WeakAugment.imagenet().draw(0, 0, 20_000)
    tall, wide, down, across = params.chain.double().T / torch.tensor(
        [[2.0**16], [2.0**16], [2.0**24], [2.0**24]]
    )
    area, aspect = tall * wide, wide / tall
    assert float(area.min()) > 0.079
    assert float(area.max()) <= 1
    assert stats.kstest(area, stats.uniform(0.08, 0.92).cdf).pvalue > LEAST_P
    log_aspect = aspect.log() / np.log(4 / 3)
    assert stats.kstest(log_aspect, stats.uniform(-1, 2).cdf).pvalue > LEAST_P
    for place in (down, across):
        assert stats.kstest(place, "uniform").pvalue > LEAST_P
    assert (
        abs(np.corrcoef(np.stack([area, aspect, down, across]))[~np.eye(4, dtype=bool)]).max()
        < 0.03
    )


def test_a_crop_of_a_size_is_a_part_of_the_image_and_reaches_every_place():
    images = images_of(1, 9, 8).expand(2000, -1, -1, -1)
    weak = WeakAugment(0, flip=0.0, size=(6, 7), **PLAIN)
    views = (weak(images) * 255).round().byte()
    places = Counter()
    parts = {(y, x): images[0, :, y : y + 6, x : x + 7] for y in range(4) for x in range(2)}
    for view in views[:400]:
        places[next(place for place, part in parts.items() if torch.equal(part, view))] += 1
    assert len(places) == 8
    assert stats.chisquare(list(places.values())).pvalue > LEAST_P


def test_a_cut_works_on_floats_and_follows_the_shift(impl):
    images = images_of(6, 12, 12)
    weak = WeakAugment(2, size=5, flip=0.5, impl=impl, **PLAIN)
    params = weak.draw(1, 2, 6)
    of_bytes, of_floats = weak.apply(images, params), weak.apply(images.float() / 255, params)
    torch.testing.assert_close(of_bytes, of_floats)
    wide = pad(images.float(), [2] * 4, mode="reflect")
    for row in range(6):
        down, across = ((int(place) * 8) >> 24 for place in params.chain[row, 2:])
        top, left = int(params.top[row]) + down, int(params.left[row]) + across
        part = wide[row, :, top : top + 5, left : left + 5] / 255
        wanted = part.flip(2) if params.flip[row] else part
        torch.testing.assert_close(of_bytes[row], wanted)


def test_evaluation_sees_the_centre_of_an_image():
    images = images_of(3, 12, 15)
    for weak in (WeakAugment.imagenet(8), WeakAugment(0, size=8), WeakAugment(0, size=8, **PLAIN)):
        whole = WeakAugment(0, mean=weak.mean, std=weak.std).normalize(images)
        assert torch.equal(weak.normalize(images), whole[..., 2:10, 3:11])
        assert torch.equal(RandAugment.fixmatch(weak).normalize(images), whole[..., 2:10, 3:11])
    with pytest.raises(
        ValueError, match="images must be at least as large as views, 13 x 13 pixels"
    ):
        WeakAugment.imagenet(13).normalize(images)


# Draws


def chain_of(engine, ids, views=1, seed=3, step=5):
    return engine.draw(seed, step, ids, views)


def test_slots_are_predicted_by_the_counter_layout():
    engine = RandAugment.fixmatch(WeakAugment(size=24))
    ids = torch.tensor([0, 5, 2**32 + 7, 2**63 - 1])
    params = chain_of(engine, ids, (2,))
    listed = entries(engine.chain)
    for row, sample_id in enumerate(ids.tolist()):
        drawn = params.chain[row].tolist()
        cut = slow_words(3, 5, sample_id, 2, 7)
        assert drawn[:4] == [0, 0, cut[2] >> 8, cut[3] >> 8]
        for slot in (0, 1):
            op, applied, level, _ = slow_words(3, 5, sample_id, 2, 16 + slot)
            name, magnitudes = engine.chain.ops[(op * 14) >> 32]
            wanted = name, magnitudes[(level * len(magnitudes)) >> 32]
            entry = drawn[4 + slot]
            assert entry == 0 if applied >> 31 else listed[entry] == wanted
        down, across, _, _ = slow_words(3, 5, sample_id, 2, 8)
        assert drawn[6:] == [down >> 8, across >> 8, 16]


def test_areas_and_shuffled_operations_are_predicted_by_the_counter_layout():
    weak = WeakAugment(area=(0.2, 0.7), aspect=(0.5, 1.5))
    engine = ColorJitter(weak, gray=0.3, prob=0.6)
    params = chain_of(engine, torch.tensor([4, 9]), (1,))
    listed = entries(engine.chain)
    for row, sample_id in enumerate((4, 9)):
        area, aspect, *_ = slow_words(3, 5, sample_id, 1, 7)
        least, most = round(0.2 * 2**24), round(0.7 * 2**24)
        share = (least + ((area * (most - least + 1)) >> 32)) / 2**24
        ratio = 0.5 * 3 ** ((((aspect * 1024) >> 32) + 0.5) / 1024)
        assert params.chain[row, 0] == pytest.approx(65536 * (share / ratio) ** 0.5, abs=1)
        assert params.chain[row, 1] == pytest.approx(65536 * (share * ratio) ** 0.5, abs=1)
        levels = slow_words(3, 5, sample_id, 1, 9)
        order, applied, gray, _ = slow_words(3, 5, sample_id, 1, 10)
        slots = params.chain[row, 4:].tolist()
        if applied / 2**32 < 0.6:
            magnitudes = dict(listed[entry] for entry in slots[:4])
            for (name, values), level in zip(engine.chain.ops, levels, strict=True):
                assert magnitudes[name] == values[level >> 24]
            left, number = ["brightness", "contrast", "color", "hue"], (order * 24) >> 32
            for entry, size in zip(slots[:4], (6, 2, 1, 1), strict=True):  # as one counts orders
                assert listed[entry][0] == left.pop(number // size)
                number %= size
        else:
            assert slots[:4] == [0] * 4
        assert slots[4] == (len(listed) - 1 if gray / 2**32 < 0.3 else 0)


def test_draws_of_a_chain_do_not_depend_on_batch_order_or_company():
    engine = RandAugment.usb(WeakAugment.imagenet(24))
    ids = torch.tensor([5, 0, 2**40, 77])
    whole = chain_of(engine, ids, (0, 2))
    order = torch.tensor([2, 3, 1, 0])
    assert_same(chain_of(engine, ids[order], (2,)), rows_of(whole, 4 + order))
    # two ranks see what one would
    parts = [chain_of(engine, ids[rank::2], (0,)) for rank in (0, 1)]
    for rank, part in enumerate(parts):
        assert_same(part, rows_of(whole, torch.arange(rank, 4, 2)))
    batch, _ = sampling.draw_batch(3, 5, ids, ids, DrawPlan(2, engine.policy))
    assert_same(rows_of(batch, slice(8, 12)), rows_of(whole, slice(4, 8)))


def test_a_chain_leaves_all_other_draws_as_they_are():
    weak = WeakAugment(4, zoom_px=(0, 3), blur_sigma=(0.1, 1.0))
    strong = RandAugment.fixmatch(weak)
    assert_same(AugmentParams(*chain_of(strong, 50)[:5]), chain_of(weak, 50))
    plans = [DrawPlan(2, engine.policy) for engine in (weak, strong)]
    assert_same(*(sampling.draw_batch(1, 2, 4, 5, plan)[1] for plan in plans))


@pytest.mark.parametrize("preset", ["fixmatch", "usb", "trivial"])
def test_operations_and_their_magnitudes_come_equally_often(preset):
    engine = getattr(RandAugment, preset)()
    rows = held(chain_of(engine, 40_000), engine)
    slots, prob = slots_of(engine.chain), engine.chain.prob
    applied = sum(map(len, rows))
    assert stats.binomtest(applied, 40_000 * slots, prob).pvalue > LEAST_P
    drawn = Counter(entry for row in rows for entry in row)
    by_name = Counter()
    for (name, _), count in drawn.items():
        by_name[name] += count
    assert len(by_name) == len(engine.chain.ops)
    assert stats.chisquare(list(by_name.values())).pvalue > LEAST_P
    for name, magnitudes in engine.chain.ops:
        weights = Counter(magnitudes)  # 0 and -0 are one
        if len(weights) == 1:
            continue
        counts = [drawn[name, size] for size in weights]
        expected = np.array(list(weights.values())) / len(magnitudes) * sum(counts)
        assert stats.chisquare(counts, expected).pvalue > LEAST_P, name


@pytest.mark.parametrize("axis", ["slot", "view", "step", "seed", "id"])
def test_operations_of_neighbouring_keys_are_independent(axis):
    engine = RandAugment(num_ops=2, ops={"rotate": [1, 2, 3], "shear_x": [1, 2], "equalize": [0]})
    ids = torch.arange(30_000)
    one = chain_of(engine, ids).chain[:, 0]
    other = chain_of(
        engine,
        ids + (axis == "id"),
        2 if axis == "view" else 1,
        seed=4 if axis == "seed" else 3,
        step=6 if axis == "step" else 5,
    ).chain[:, int(axis == "slot")]
    table = np.zeros((7, 7))
    np.add.at(table, (one.numpy(), other.numpy()), 1)
    assert stats.chi2_contingency(table).pvalue > LEAST_P


def test_a_cutout_lies_anywhere_and_apart_from_the_operations():
    engine = RandAugment.fixmatch()
    params = chain_of(engine, 30_000)
    down, across = ((params.chain[:, column] * 9) >> 24 for column in (-3, -2))
    assert p_uniform(down * 9 + across, 81) > LEAST_P
    empty = params.chain[:, 0] == 0
    assert stats.ks_2samp(params.chain[empty, -3], params.chain[~empty, -3]).pvalue > LEAST_P


def test_draws_of_a_chain_survive_packing():
    plan = DrawPlan(2, RandAugment.usb(WeakAugment.imagenet(24)).policy)
    augment, mixup = sampling.draw_batch(1, 2, 3, 4, plan)
    packed = sampling.pack(augment, mixup)
    assert len(packed) == 11 * sampling.words_per_row(with_augment=True, chain_columns=10)
    again, _ = sampling.unpack(packed, 11, with_augment=True, chain_columns=10)
    assert_same(again, augment)
    # today's words come first: kernels that read them find them where they were
    assert torch.equal(packed[: 11 * 11], sampling.pack(AugmentParams(*augment[:5]), mixup))


# Engines


def test_a_strong_engine_builds_the_batches_of_mixmatch():
    x, u = images_of(3, 16, 16), images_of(4, 16, 16, seed=1)
    engine = RandAugment.fixmatch(cutout=6)
    mixmatch = MixMatch(engine, 3, mix="none", seed=2)
    batch = mixmatch(x, torch.arange(3), u, lambda images: images[:, :, 0, 0])
    wanted = [engine(x, 2, 0, 0), engine(u, 2, 0, 1), engine(u, 2, 0, 2)]
    assert torch.equal(batch.inputs, torch.cat(wanted))
    assert not torch.equal(wanted[1], wanted[2])


def test_ids_and_steps_key_the_views_of_an_engine_alone():
    engine, images = RandAugment.fixmatch(), images_of(6, 32, 32)
    ids = torch.tensor([9, 3, 2**40, 1, 0, 5])
    views = engine(images, ids=ids, step=4)
    order = torch.tensor([5, 3, 0, 1, 2, 4])
    assert torch.equal(engine(images[order], ids=ids[order], step=4), views[order])
    assert not torch.equal(engine(images, ids=ids, step=5), views)
    assert torch.equal(engine(images), engine(images, ids=torch.arange(6)))


def test_repr_shows_the_whole_policy():
    text = repr(RandAugment.kekmodel(cutout=5))
    for part in ("rotate -27 .. 27 (18 levels)", "num_ops=2", "prob=0.5", "cutout=5", "(127,)"):
        assert part in text
    assert "outside='black'" in text
    assert "padding=4" in text
    assert "gray=0.2" in repr(ColorJitter(gray=0.2))


def with_ids(ids, count=2):
    return RandAugment.fixmatch()(images_of(count, 32, 32), ids=ids)


BAD = {
    "unknown op": (
        lambda: RandAugment(ops=["rotate", "spin"]),
        ValueError,
        r"ops must be one of \['identity', .*\], got 'spin'",
    ),
    "unknown op with magnitudes": (
        lambda: RandAugment(ops={"spin": [1]}),
        ValueError,
        r"ops must be one of .*, got 'spin'",
    ),
    "a text": (lambda: RandAugment(ops="rotate"), TypeError, "ops must be names, .* got 'rotate'"),
    "no op": (lambda: RandAugment(ops=[]), ValueError, "ops must hold at least one"),
    "no op with magnitudes": (lambda: RandAugment(ops={}), ValueError, "ops must hold at least"),
    "level": (
        lambda: RandAugment(levels=[11]),
        ValueError,
        r"levels\[0\] must be in 0 .. 10, got 11",
    ),
    "low level": (lambda: RandAugment(levels=[1, -1]), ValueError, r"levels\[1\] must .* got -1"),
    "half a level": (
        lambda: RandAugment(levels=[1.5]),
        TypeError,
        r"levels\[0\] must be an integer, got 1.5",
    ),
    "true for a level": (
        lambda: RandAugment(levels=[True]),
        TypeError,
        r"levels\[0\] must be an integer, got True of type bool",
    ),
    "no level": (lambda: RandAugment(levels=[]), ValueError, "levels must be .* at least one"),
    "one level": (
        lambda: RandAugment(levels=5),
        TypeError,
        r"levels must be a list of integers in 0 .. 10, got 5 of type int",
    ),
    "levels twice": (
        lambda: RandAugment(ops={"rotate": [1]}, levels=[1]),
        ValueError,
        r"levels must be None where ops has magnitudes, got \[1\]",
    ),
    "no magnitude": (lambda: RandAugment(ops=["hue"]), ValueError, "gives hue its magnitudes"),
    "empty magnitudes": (
        lambda: RandAugment(ops={"rotate": []}),
        ValueError,
        "the magnitudes of rotate must be a list of numbers, at least one, got none",
    ),
    "a number for magnitudes": (
        lambda: RandAugment(ops={"rotate": 9}),
        TypeError,
        "the magnitudes of rotate must be a list of numbers, got 9 of type int",
    ),
    "true for a magnitude": (
        lambda: RandAugment(ops={"rotate": [True]}),
        TypeError,
        "the magnitude of rotate must be a number, got True",
    ),
    "NaN": (
        lambda: RandAugment(ops={"rotate": [1, float("nan"), 2]}),
        ValueError,
        "the magnitude of rotate must be finite, got nan",
    ),
    "NaN of a chain": (
        lambda: sampling.draw_augment(
            0, 0, 1, 0, chain=Chain((Op("hue", (0.1, float("nan"), 0)),))
        ),
        ValueError,
        r"the magnitude of hue must be in \[-0.5, 0.5\], got nan",
    ),
    "angle": (
        lambda: RandAugment(ops={"rotate": [400]}),
        ValueError,
        r"the magnitude of rotate must be in \[-360, 360\], got 400",
    ),
    "factor": (
        lambda: RandAugment(ops={"sharpness": [-1]}),
        ValueError,
        r"the magnitude of sharpness must be in \[0, 100\], got -1",
    ),
    "share of a side": (
        lambda: RandAugment(ops={"translate_y_rel": [9]}),
        ValueError,
        r"the magnitude of translate_y_rel must be in \[-1, 1\], got 9",
    ),
    "a magnitude of none": (
        lambda: RandAugment(ops={"equalize": [1]}),
        ValueError,
        r"the magnitude of equalize must be in \[0, 0\], got 1",
    ),
    "half a bit": (
        lambda: RandAugment(ops={"posterize": [1.5]}),
        ValueError,
        "the magnitude of posterize must be whole bits, got 1.5",
    ),
    "slots": (lambda: RandAugment(num_ops=17), ValueError, "num_ops must be in 0 .. 16, got 17"),
    "true for slots": (
        lambda: RandAugment(num_ops=True),
        TypeError,
        "num_ops must be an integer, got True",
    ),
    "probability": (
        lambda: RandAugment(prob=1.5),
        ValueError,
        r"prob must be in \[0, 1\], got 1.5",
    ),
    "NaN for a probability": (
        lambda: RandAugment(prob=float("nan")),
        ValueError,
        r"prob must be in \[0, 1\], got nan",
    ),
    "true for a probability": (
        lambda: RandAugment(prob=True),
        TypeError,
        "prob must be a number, got True",
    ),
    "cutout": (
        lambda: RandAugment(cutout=(0.5, 0.1)),
        ValueError,
        r"cutout must be two numbers, least <= most, got \(0.5, 0.1\)",
    ),
    "one share for a cutout": (
        lambda: RandAugment(cutout=0.5),
        TypeError,
        "cutout must be an integer, got 0.5",
    ),
    "colour of a cutout": (
        lambda: RandAugment(cutout_color=(0, 256)),
        ValueError,
        r"cutout_color\[1\] must be in 0 .. 255, got 256",
    ),
    "two bytes for three channels": (
        lambda: RandAugment(cutout_color=(1, 2))(images_of(2, 32, 32)),
        ValueError,
        r"cutout_color must have one byte or one per channel, 3, got \(1, 2\)",
    ),
    "outside": (
        lambda: RandAugment(outside="grey"),
        ValueError,
        r"outside must be one of \['mean', 'black'\], got 'grey'",
    ),
    "weak": (
        lambda: RandAugment(RandAugment()),
        TypeError,
        r"weak must be a WeakAugment such as WeakAugment.cifar10\(\), got RandAugment\( ops=",
    ),
    "bin": (
        lambda: RandAugment.torchvision(magnitude=31),
        ValueError,
        "magnitude must be in 0 .. 30, got 31",
    ),
    "hue": (lambda: ColorJitter(hue=0.6), ValueError, r"hue must be in \[0, 0.5\], got 0.6"),
    "brightness": (
        lambda: ColorJitter(brightness=(0.5, 1.5)),
        TypeError,
        r"brightness must be a number, got \(0.5, 1.5\) of type tuple",
    ),
    "gray": (lambda: ColorJitter(gray=2), ValueError, r"gray must be in \[0, 1\], got 2"),
    "area": (
        lambda: WeakAugment(area=(0.5, 1.5)),
        ValueError,
        r"area\[1\] must be in \(0, 1\], got 1.5",
    ),
    "area and zoom": (lambda: WeakAugment(zoom_px=(0, 2), area=(0.5, 1)), ValueError, "zoom_px"),
    "aspect": (
        lambda: WeakAugment(area=(0.5, 1), aspect=(0, 1)),
        ValueError,
        r"aspect\[0\] must be in \[0.001, 1000\], got 0",
    ),
    "no size": (lambda: WeakAugment(size=0), ValueError, r"size\[0\] must be in 1 .. 32768, got 0"),
    "half a size": (
        lambda: WeakAugment(size=(8, 2.5)),
        TypeError,
        r"size\[1\] must be an integer, got 2.5",
    ),
    "three sizes": (
        lambda: WeakAugment(size=(1, 2, 3)),
        TypeError,
        r"size must be two integers, height and width, got \(1, 2, 3\)",
    ),
    "large size": (
        lambda: WeakAugment(0, size=9)(images_of(2, 8, 8)),
        ValueError,
        "size must be at most that of the images, 8 x 8 pixels, .* got 9 x 9",
    ),
    "large size before operations": (
        lambda: RandAugment(WeakAugment(0, size=(8, 9)))(images_of(2, 8, 8)),
        ValueError,
        "size must be at most that of the images, 8 x 8 pixels, .* got 8 x 9",
    ),
    "large cutout": (
        lambda: RandAugment.fixmatch()(images_of(2, 12, 40)),
        ValueError,
        "cutout must be at most the smaller side of a view, 12 pixels, got 16",
    ),
    "large cutout after a cut": (
        lambda: RandAugment.fixmatch(WeakAugment.imagenet((40, 15)))(images_of(2, 32, 32)),
        ValueError,
        "cutout must be at most the smaller side of a view, 15 pixels, got 16",
    ),
    "floats": (
        lambda: RandAugment.fixmatch()(torch.rand(2, 3, 32, 32)),
        ValueError,
        r"images must be uint8 where operations .* got float32: images.byte\(\) makes them",
    ),
    "floats that want a gradient": (
        lambda: RandAugment.fixmatch()(torch.rand(2, 3, 32, 32, requires_grad=True)),
        ValueError,
        "images must be uint8 where operations such as equalize follow",
    ),
    "floats on meta": (
        lambda: RandAugment.fixmatch()(torch.rand(2, 3, 32, 32, device="meta")),
        ValueError,
        "images must be uint8 where operations such as equalize follow",
    ),
    "an array": (
        lambda: RandAugment.fixmatch()(images_of(2, 32, 32).numpy()),
        TypeError,
        "images must be a tensor, got a numpy array .* torch.from_numpy makes one",
    ),
    "an image alone": (
        lambda: RandAugment.fixmatch()(images_of(1, 32, 32)[0]),
        ValueError,
        r"images must be \[M, C, H, W\] or \[M, H, W, C\], got \[3, 32, 32\]",
    ),
    "two channels": (
        lambda: RandAugment.fixmatch()(images_of(2, 32, 32, 2)),
        ValueError,
        "images must have 1 or 3 channels for color, which reads colours, got 2",
    ),
    "four channels made grey": (
        lambda: ColorJitter(contrast=0, saturation=0, hue=0, gray=0.5)(images_of(2, 32, 32, 4)),
        ValueError,
        "images must have 1 or 3 channels for gray, which reads colours, got 4",
    ),
    "ids": (
        lambda: with_ids(torch.arange(3)),
        ValueError,
        r"ids must be \[M\] with M = 2 like images, got 3",
    ),
    "ids of another dtype": (
        lambda: with_ids(torch.arange(2, dtype=torch.int32)),
        ValueError,
        r"ids must be \[M\] int64, got \[2\] int32",
    ),
    "ids of floats": (
        lambda: with_ids(torch.arange(2.0)),
        ValueError,
        r"ids must be \[M\] int64, got \[2\] float32",
    ),
    "ids in a table": (
        lambda: with_ids(torch.arange(2)[None]),
        ValueError,
        r"ids must be \[M\] int64, got \[1, 2\] int64",
    ),
    "a list of ids": (
        lambda: with_ids([0, 1]),
        TypeError,
        r"ids must be a tensor of 2 ids or None, got \[0, 1\] of type list",
    ),
    "a number of ids": (
        lambda: with_ids(2),
        TypeError,
        "ids must be a tensor of 2 ids or None, got 2 of type int",
    ),
    "ids on meta": (
        lambda: with_ids(torch.arange(2, device="meta")),
        ValueError,
        "ids must be on a device that holds values, got it on meta",
    ),
    "view": (
        lambda: RandAugment.fixmatch()(images_of(2, 32, 32), view=-1),
        ValueError,
        r"view must be in 0 .. 2\*\*16, got -1",
    ),
    "step": (
        lambda: RandAugment.fixmatch()(images_of(2, 32, 32), step=-1),
        ValueError,
        r"step must be in 0 .. 2\*\*32 - 1, got -1",
    ),
    "floats of a batch": (
        lambda: MixMatch(RandAugment.fixmatch(), 3)(
            torch.rand(2, 3, 32, 32), torch.arange(2), torch.rand(2, 3, 32, 32), lambda u: u
        ),
        ValueError,
        r"x must be uint8 where operations .* got float32: x.byte\(\) makes them",
    ),
    "two channels of a batch": (
        lambda: MixMatch(RandAugment.fixmatch(), 3)(
            images_of(2, 32, 32, 2), torch.arange(2), images_of(2, 32, 32, 2), lambda u: u
        ),
        ValueError,
        "x must have 1 or 3 channels for color, which reads colours, got 2",
    ),
    "coordinates": (
        lambda: RandAugment(STILL, 1, {"shear_x": [10]}, cutout=0)(images_of(1, 4000, 16)),
        ValueError,
        "images must be small enough for shear_x by 10, whose coordinates have 16 bits",
    ),
    "draws of weak": (
        lambda: RandAugment.fixmatch().apply(images_of(2, 32, 32), STILL.draw(0, 0, 2)),
        ValueError,
        "params must be ChainParams for this geometry, got AugmentParams",
    ),
    "draws of strong": (
        lambda: STILL.apply(images_of(2, 32, 32), RandAugment().draw(0, 0, 2)),
        ValueError,
        "params must be AugmentParams for this geometry, got ChainParams",
    ),
    "draws of another": (
        lambda: RandAugment.usb().apply(images_of(2, 32, 32), RandAugment().draw(0, 0, 2)),
        ValueError,
        "params.chain must have 6 columns for this geometry, got 5",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused_by_its_name(kind):
    call, error, message = BAD[kind]
    with pytest.raises(error, match=message):
        call()


def test_entries_that_a_chain_does_not_have_are_refused(impl):
    engine = RandAugment.fixmatch(WeakAugment(0, impl=impl))
    params = engine.draw(0, 0, 2)
    for column, value in ((0, 10**6), (0, -1), (2, 2**24)):
        chain = params.chain.clone()
        chain[1, column] = value
        with pytest.raises(ValueError, match=r"params.chain must hold"):
            engine.apply(images_of(2, 32, 32), params._replace(chain=chain))


def test_numbers_of_numpy_are_numbers():
    by_numpy = RandAugment(
        num_ops=np.int64(1), levels=np.arange(1, 4), prob=np.float32(0.5), cutout=np.int32(4)
    )
    assert by_numpy.chain == RandAugment(num_ops=1, levels=[1, 2, 3], cutout=4).chain
    ops = {"rotate": np.linspace(-30, 30, 5), "solarize": [np.int16(7), np.float64(9)]}
    wanted = {"rotate": [-30, -15, 0, 15, 30], "solarize": [7, 9]}
    chain = RandAugment(ops=ops).chain
    assert chain == RandAugment(ops=wanted).chain
    assert {type(number) for op in chain.ops for number in op.magnitudes} == {float}
    assert WeakAugment(size=np.int64(8)).size == (8, 8)
    images = images_of(3, 32, 32)
    views = by_numpy(images, np.int64(1), np.int32(2), np.int8(1), ids=np.arange(3, dtype="uint8"))
    assert torch.equal(views, by_numpy(images, 1, 2, 1, ids=torch.arange(3)))
    with pytest.raises(TypeError, match="the magnitude of rotate must be a number, got True"):
        RandAugment(ops={"rotate": np.array([True])})


def test_images_come_as_they_lie(impl):
    """Of any strides, repeated, read-only and none: with the views of their copies."""
    engine = RandAugment.fixmatch(WeakAugment(2, layout="NCHW", impl=impl), cutout=6)
    images = images_of(6, 40, 36)
    array = images.numpy().copy()
    array.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of memory that it must not write to
        read_only = torch.from_numpy(array)
    for lying in (
        images.transpose(2, 3),
        images[:, :, ::2, 1::3],
        images.contiguous(memory_format=torch.channels_last),
        images[:1].expand(4, -1, -1, -1),
        images[4:2],
        read_only,
    ):
        before = lying.clone()
        views = engine(lying)
        assert views.shape == lying.shape
        assert torch.equal(views, engine(lying.clone(memory_format=torch.contiguous_format)))
        assert torch.equal(lying, before)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 2)])
def test_the_smallest_images_have_views_of_every_operation(size, impl):
    for make in (RandAugment.usb, RandAugment.uda, RandAugment.trivial):
        engine = make(WeakAugment(0, layout="NCHW", impl=impl, **PLAIN), cutout=0, outside="black")
        images = images_of(60, *size)
        params = engine.draw(0, 0, 60)
        mirrored = torch.where(params.flip.bool()[:, None, None, None], images.flip(3), images)
        wanted = by_pillow(mirrored, held(params, engine))
        assert (
            wrong_bytes((engine.apply(images, params) * 255).round().byte(), wanted, range(60))
            == {}
        )
    assert RandAugment(WeakAugment(0, layout="NCHW"), cutout=1)(images_of(2, 1, 1)).shape[2:] == (
        1,
        1,
    )


def test_images_on_meta_have_views_there():
    images = images_of(3, 32, 32).to("meta")
    for engine in (RandAugment.fixmatch(), ColorJitter(), RandAugment(WeakAugment.imagenet(20))):
        wanted = engine(images_of(3, 32, 32)).shape
        views = engine.to("meta")(images, ids=torch.arange(3))
        assert (views.device.type, views.dtype) == ("meta", torch.float32)
        assert views.shape == wanted


def test_engines_that_cannot_cut_refuse_to():
    from gpu_mixmatch import DaliAugment

    with pytest.raises(ValueError, match="weak must have neither size nor area here"):
        DaliAugment(WeakAugment.imagenet())


def test_a_cut_of_nothing_and_draws_of_a_chain_are_tuples():
    assert isinstance(RandAugment().draw(0, 0, 2), ChainParams)
    with pytest.raises(ValueError, match="cut must have a size or an area"):
        sampling.draw_augment(0, 0, 1, 0, cut=Cut())
