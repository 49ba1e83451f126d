"""RandAugment, ColorJitter and cuts: to the last bit Pillow's, drawn per view by sample id."""

from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn.functional import interpolate, pad

from gpu_mixmatch import ColorJitter, MixMatch, RandAugment, WeakAugment, sampling
from gpu_mixmatch._chain import columns, entries, slots_of
from gpu_mixmatch.impl.eager import chain as chain_module
from gpu_mixmatch.impl.eager.chain import run_slots
from gpu_mixmatch.impl.tables import chain_tables
from gpu_mixmatch.insight.page import _draws_in_words
from gpu_mixmatch.types import AugmentParams, Chain, ChainParams, Cut, DrawPlan, Op
from tests import pillow
from tests.factories import random_images
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

    def all_rows(records, kind):  # as on a device, where looking is waiting
        return torch.arange(len(records))

    monkeypatch.setattr(chain_module, "_rows", all_rows)
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


def test_both_signs_are_drawn_of_whatever_has_one():
    signed = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
    for preset in PRESETS:
        engine = getattr(RandAugment, preset)()
        drawn = [entry for row in held(engine.draw(0, 0, 20_000), engine) for entry in row]
        for name in signed:
            of_name = [size for op, size in drawn if op.removesuffix("_rel") == name and size]
            assert stats.binomtest(sum(size > 0 for size in of_name), len(of_name)).pvalue > LEAST_P


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


@pytest.mark.parametrize(("preset", "side"), [("fixmatch", 16), ("uda", 16), ("kekmodel", 17)])
def test_a_cutout_hides_as_many_pixels_as_it_says(preset, side):
    engine = getattr(RandAugment, preset)(WeakAugment(0, flip=0.0, **PLAIN), num_ops=0)
    images = torch.full((2000, 3, 48, 48), 200, dtype=torch.uint8)
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


def test_a_cutout_of_a_share_is_at_most_that_of_the_width():
    engine = RandAugment.usb(WeakAugment(0, flip=0.0, **PLAIN), num_ops=0)
    images = torch.full((500, 3, 40, 40), 255, dtype=torch.uint8)
    hidden = engine(images)[:, 0] != 1
    sides = hidden.any(2).sum(1)
    assert 16 <= int(sides.max()) <= 20
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
    with pytest.raises(ValueError, match="size must be at most that of the images, 12 x 15"):
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


def test_a_preview_names_the_operations_of_a_view():
    engine = RandAugment(STILL, ops={"rotate": [-9], "equalize": [0]}, prob=1.0, cutout=0)
    params = engine.draw(0, 0, 20)
    words = {_draws_in_words(params, row, engine) for row in range(20)}
    space = "\N{NO-BREAK SPACE}"
    assert f"rotate{space}-9, equalize" in words
    assert f"rotate{space}-9, rotate{space}-9" in words
    assert len(words) == 4


BAD = {
    "unknown op": (lambda: RandAugment(ops=["rotate", "spin"]), ValueError, "ops must be one of"),
    "level": (lambda: RandAugment(levels=[11]), ValueError, r"levels\[0\] must be in 0 .. 10"),
    "no level": (lambda: RandAugment(levels=[]), TypeError, "levels must be"),
    "levels twice": (lambda: RandAugment(ops={"rotate": [1]}, levels=[1]), ValueError, "levels"),
    "no magnitude": (lambda: RandAugment(ops=["hue"]), ValueError, "gives hue its magnitudes"),
    "angle": (lambda: RandAugment(ops={"rotate": [400]}), ValueError, "magnitude of rotate"),
    "half a bit": (lambda: RandAugment(ops={"posterize": [1.5]}), ValueError, "whole bits"),
    "slots": (lambda: RandAugment(num_ops=17), ValueError, "num_ops must be in 0 .. 16"),
    "probability": (lambda: RandAugment(prob=1.5), ValueError, "prob must be"),
    "cutout": (lambda: RandAugment(cutout=(0.5, 0.1)), ValueError, "cutout must be"),
    "weak": (lambda: RandAugment(RandAugment()), TypeError, "weak must be a WeakAugment"),
    "hue": (lambda: ColorJitter(hue=0.6), ValueError, "hue must be"),
    "area": (lambda: WeakAugment(area=(0.5, 1.5)), ValueError, "area"),
    "area and zoom": (lambda: WeakAugment(zoom_px=(0, 2), area=(0.5, 1)), ValueError, "zoom_px"),
    "no size": (lambda: WeakAugment(size=0), ValueError, r"size\[0\] must be in 1"),
    "large size": (
        lambda: WeakAugment(0, size=9)(images_of(2, 8, 8)),
        ValueError,
        "size must be at most that of the images, 8 x 8",
    ),
    "large cutout": (
        lambda: RandAugment.fixmatch()(images_of(2, 12, 40)),
        ValueError,
        "cutout must be at most the smaller side of a view, 12 pixels, got 16",
    ),
    "floats": (
        lambda: RandAugment.fixmatch()(torch.rand(2, 3, 32, 32)),
        ValueError,
        "images must be uint8 where operations such as equalize follow",
    ),
    "two channels": (
        lambda: RandAugment.fixmatch()(images_of(2, 32, 32, 2)),
        ValueError,
        "images must have 1 or 3 channels for color",
    ),
    "ids": (
        lambda: RandAugment.fixmatch()(images_of(2, 32, 32), ids=torch.arange(3)),
        ValueError,
        "ids must be .M. with M = 2 like images, got 3",
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


def test_engines_that_cannot_cut_refuse_to():
    from gpu_mixmatch import DaliAugment

    with pytest.raises(ValueError, match="weak must have neither size nor area here"):
        DaliAugment(WeakAugment.imagenet())


def test_a_cut_of_nothing_and_draws_of_a_chain_are_tuples():
    assert isinstance(RandAugment().draw(0, 0, 2), ChainParams)
    with pytest.raises(ValueError, match="cut must have a size or an area"):
        sampling.draw_augment(0, 0, 1, 0, cut=Cut())
