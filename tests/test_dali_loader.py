"""DaliLoader: a batch is a function of (seed, step), made of the images that its ids name."""

import json
import signal
import subprocess
import sys
import threading
import time
import warnings
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from gpu_mixmatch import MixMatch, WeakAugment, sampling
from gpu_mixmatch.augment.dali import DaliAugment
from gpu_mixmatch.data.dali import AugmentedBatch, DaliLoader, mixmatch_pipeline
from gpu_mixmatch.data.images import ImageIndex, image_folder
from gpu_mixmatch.types import SemiSupervisedBatch
from tests import image_files
from tests.image_files import decode, encode, tile
from tests.skips import skip_without

skip_without("nvidia.dali")


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

HEIGHT, WIDTH = 32, 40  # of the tiles


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """12 labelled and 60 unlabelled tiles in PNG, so that a decoded image is known exactly."""
    root = tmp_path_factory.mktemp("images")
    image_files.write_folder(root / "labelled", 4)
    image_files.write_folder(root / "unlabelled", 20)
    return root / "labelled", root / "unlabelled"


def loader_of(folders, **options):
    settings = {"batch_size": 3, "size": (HEIGHT, WIDTH), "ratio": 2, "seed": 4} | options
    return DaliLoader(*folders, **settings)


def batches_of(folders, **options):
    with loader_of(folders, **options) as loader:
        return list(loader)


def assert_same(batches, expected):
    assert len(batches) == len(expected) > 0
    for one, other in zip(batches, expected, strict=True):
        assert type(one) is type(other)
        for name, left, right in zip(one._fields, one, other, strict=True):
            assert torch.equal(left, right), name


def run_pipeline(contents, size, regions=None, **options):
    pipeline = mixmatch_pipeline(
        len(contents), size, random_crop=regions is not None, num_threads=1, **options
    )
    inputs = {"encoded": [np.frombuffer(content, dtype=np.uint8) for content in contents]}
    if regions is not None:
        inputs["region"] = np.array(regions, dtype=np.float32)
    (images,) = pipeline.run(**inputs)
    return np.asarray(images.as_cpu().as_tensor() if options else images.as_tensor())


def grey_levels_apart(image, expected):
    return np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int))


def assert_like_pil(image, expected):
    """Along the edges of an image DALI's filter repeats pixels, where PIL's is cut off."""
    apart = grey_levels_apart(image, expected)
    assert apart[1:-1, 1:-1].max() <= 1
    assert apart.max() <= 8
    assert apart.mean() < 0.5


# Pixels


@pytest.mark.parametrize("name", image_files.unusual_images())
def test_any_kind_of_image_decodes_as_pil_decodes_it(name):
    content = image_files.unusual_images()[name]
    expected = decode(content)
    (image,) = run_pipeline([content], expected.shape[:2])
    assert grey_levels_apart(image, expected).max() <= 1


def test_orientation_changes_what_is_seen():
    upright, turned = (
        decode(image_files.unusual_images()[f"orientation{value}.jpg"]) for value in (1, 6)
    )
    assert upright.shape == (HEIGHT, WIDTH, 3)
    assert turned.shape == (WIDTH, HEIGHT, 3)


@pytest.mark.parametrize("size", [(16, 20), (24, 24), (64, 50), (7, 31)], ids=str)
def test_the_largest_centred_window_is_resized_as_pil_resizes_it(size):
    images = [tile(number=1, width=90, height=60), tile("cat", 2, width=41, height=83)]
    results = run_pipeline([encode(image, "PNG") for image in images], size)
    for image, result in zip(images, results, strict=True):
        wide = min(image.width, image.height * size[1] / size[0])
        tall = min(image.height, image.width * size[0] / size[1])
        left, top = (image.width - wide) / 2, (image.height - tall) / 2
        box = (left, top, left + wide, top + tall)
        expected = image.resize(size[::-1], Image.Resampling.BILINEAR, box=box)
        assert_like_pil(result, expected)


def test_an_image_of_the_wanted_size_is_left_as_it_is():
    contents = [encode(tile(number=number), "PNG") for number in range(3)]
    results = run_pipeline(contents, (HEIGHT, WIDTH))
    assert np.array_equal(results, [decode(content) for content in contents])


def test_a_random_window_is_the_region_of_the_image_that_was_drawn():
    images = [tile(number=1, width=90, height=60), tile("cat", 2, width=41, height=83)]
    regions = [[0.3, 1.2, 0.0, 1.0], [0.9, 0.75, 0.4, 0.5]]
    results = run_pipeline([encode(image, "PNG") for image in images], 24, regions)
    for image, result, (share, aspect, down, across) in zip(images, results, regions, strict=True):
        area = share * image.width * image.height
        wide = min((area * aspect) ** 0.5, image.width)
        tall = min((area / aspect) ** 0.5, image.height)
        left, top = (image.width - wide) * across, (image.height - tall) * down
        box = (left, top, left + wide, top + tall)
        expected = image.resize((24, 24), Image.Resampling.BILINEAR, box=box)
        assert_like_pil(result, expected)


# Batches


def test_a_batch_holds_the_images_and_labels_that_its_ids_name(folders):
    labelled, unlabelled = (image_folder(folder) for folder in folders)
    batches = batches_of(folders)
    assert len(batches) == 10
    for batch in batches:
        assert type(batch) is SemiSupervisedBatch
        assert batch.x.shape == (3, 3, HEIGHT, WIDTH)
        assert batch.u.shape == (6, 3, HEIGHT, WIDTH)
        assert batch.x.dtype == torch.uint8
        assert batch.y.dtype == torch.int64
        assert torch.equal(batch.y, labelled.labels[batch.ids_x])
        for index, ids, images in (
            (labelled, batch.ids_x, batch.x),
            (unlabelled, batch.ids_u, batch.u),
        ):
            for number, image in zip(ids.tolist(), images, strict=True):
                expected = decode(index.read(number).tobytes())
                assert np.array_equal(image.permute(1, 2, 0), expected)


def test_classes_are_the_sorted_folders(folders):
    with loader_of(folders) as loader:
        assert loader.labelled.classes == ("astronaut", "cat", "china")
        assert loader.labelled.name(0).endswith("astronaut/000.png")
        assert "12 labelled, 60 unlabelled, batch_size=3, size=(32, 40)" in repr(loader)


def test_an_epoch_takes_every_unlabelled_image_once(folders):
    with loader_of(folders) as loader:
        for _ in range(2):
            ids = torch.cat([batch.ids_u for batch in loader])
            assert sorted(ids.tolist()) == list(range(60))
        assert loader.epoch == 2


def test_epochs_differ_in_order_and_set_epoch_goes_to_one(folders):
    with loader_of(folders) as loader:
        first, second = list(loader), list(loader)
        assert [b.ids_u.tolist() for b in first] != [b.ids_u.tolist() for b in second]
        loader.set_epoch(1)
        assert_same(list(loader), second)
        loader.set_epoch(0)
        assert_same(list(loader), first)


def test_steps_per_epoch_overrides_and_both_streams_repeat(folders):
    batches = batches_of(folders, steps_per_epoch=23)
    assert len(batches) == 23
    counts = torch.cat([batch.ids_u for batch in batches]).bincount()
    assert counts.min() >= 2
    assert torch.cat([batch.ids_x for batch in batches]).bincount(minlength=12).min() >= 5


def test_ranks_share_a_step_and_have_as_many_steps(folders):
    alone = batches_of(folders, batch_size=6)
    ranks = [batches_of(folders, rank=rank, world_size=2) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == len(alone) == 5
    for whole, *parts in zip(alone, *ranks, strict=True):
        for field in ("x", "y", "u", "ids_x", "ids_u"):
            joined = torch.cat([getattr(part, field) for part in parts])
            assert torch.equal(joined, getattr(whole, field))


def test_sources_of_any_kind_give_the_same_batches(folders, tmp_path):
    labelled, unlabelled = (image_folder(folder) for folder in folders)
    sources = {"list": [], "tar": [], "tfrecord": [], "index": [labelled, unlabelled]}
    for name, index in (("x", labelled), ("u", unlabelled)):
        labels = index.labels.tolist() if name == "x" else [None] * len(index)
        contents = [index.read(number).tobytes() for number in range(len(index))]
        lines = [
            path if label is None else f"{path}\t{label}"
            for path, label in zip(index.paths, labels, strict=True)
        ]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
        sources["list"].append(tmp_path / f"{name}.txt")
        half = len(contents) // 2
        for kind, suffix in (("tar", "tar"), ("tfrecord", "tfrecord")):
            shards = [tmp_path / f"{name}{number}.{suffix}" for number in (0, 1)]
            for shard, part in zip(shards, (slice(half), slice(half, None)), strict=True):
                samples = list(zip(contents[part], labels[part], strict=True))
                if kind == "tar":
                    image_files.write_tar(shard, [(c, "png", label) for c, label in samples])
                else:
                    image_files.write_tfrecord(shard, samples)
            sources[kind].append(shards)
    expected = batches_of(folders)
    for source in sources.values():
        assert_same(batches_of(source), expected)


def test_numbers_of_threads_change_nothing(folders):
    assert_same(batches_of(folders, num_threads=5), batches_of(folders, num_threads=1))


# Views


def augmented(folders, **options):
    return batches_of(folders, augment=DaliAugment(WeakAugment(4)), **options)


def test_views_are_those_that_mixmatch_would_build(folders):
    augment = DaliAugment(WeakAugment(4))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * HEIGHT * WIDTH, 3))
    fused, from_views = (MixMatch(augment, 3, seed=4) for _ in range(2))
    for batch, views in zip(batches_of(folders), augmented(folders), strict=True):
        assert type(views) is AugmentedBatch
        assert views.views.shape == (2, 6, 3, HEIGHT, WIDTH)
        ids = {"ids_x": batch.ids_x, "ids_u": batch.ids_u}
        expected = fused(batch.x, batch.y, batch.u, model, **ids)
        result = from_views.from_views(views.x, views.y, views.views, model, **ids)
        assert torch.equal(result.inputs, expected.inputs)
        assert torch.equal(result.targets, expected.targets)


def test_any_engine_may_make_the_views(folders):
    weak = batches_of(folders, augment=WeakAugment(4), num_augmentations=3)
    dali = augmented(folders, num_augmentations=3)
    for one, other in zip(weak, dali, strict=True):
        assert one.views.shape == (3, 6, 3, HEIGHT, WIDTH)
        assert torch.allclose(one.x, other.x, atol=1e-5)
        assert torch.allclose(one.views, other.views, atol=1e-5)


# State


def take(loader, count):
    """The next batches, of as many epochs as it needs."""
    epochs = (batch for _ in range(count) for batch in loader)
    return list(islice(epochs, count))


@pytest.mark.parametrize("stop", [1, 9, 10, 13])
def test_a_run_resumes_bit_for_bit_in_mid_epoch(folders, stop):
    options = {"crop_area": (0.2, 1.0), "augment": DaliAugment(WeakAugment(4)), "size": 24}
    with loader_of(folders, **options) as loader:
        expected = take(loader, 20)
    with loader_of(folders, **options) as loader:
        batches = take(loader, stop)
        state = json.dumps(loader.state_dict())
    assert len(state) < 300
    with loader_of(folders, **options, seed=99) as loader:
        loader.load_state_dict(json.loads(state))
        batches += take(loader, 20 - stop)
    assert_same(batches, expected)


def test_a_loop_that_is_left_goes_on_with_the_rest_of_its_epoch(folders):
    expected = batches_of(folders)
    with loader_of(folders) as loader:
        first = [batch for batch, _ in zip(loader, range(3), strict=False)]
        taken = loader.state_dict()["step"]
        rest = list(loader)
    assert_same([*expected[:taken], *rest], expected)
    assert_same(first, expected[:3])


def wait_until(happened, seconds=20.0):
    """Wait for what a thread does; whether it came is for the caller to assert."""
    stop = time.monotonic() + seconds
    while not happened() and time.monotonic() < stop:
        time.sleep(0.01)


def test_two_batches_are_made_while_another_is_worked_on(folders, monkeypatch):
    read, original = [], ImageIndex.read
    monkeypatch.setattr(
        ImageIndex, "read", lambda self, number: (read.append(number), original(self, number))[1]
    )
    with loader_of(folders) as loader:
        batches = iter(loader)
        next(batches)
        wait_until(lambda: len(read) >= 3 * 9)
        time.sleep(0.1)
        assert len(read) == 3 * 9
        assert loader.state_dict()["step"] == 1


# Images that do not decode


@pytest.fixture
def damaged(tmp_path):
    """The folders of 12 and 60 tiles, with 2 and 6 of them broken, and the broken paths."""
    image_files.write_folder(tmp_path / "labelled", 4)
    written = image_files.write_folder(tmp_path / "unlabelled", 20)
    broken = [tmp_path / "labelled" / "cat" / f"00{number}.png" for number in (0, 3)]
    broken += [written[number][0] for number in (0, 7, 8, 31, 45, 59)]
    for path, content in zip(broken, [*image_files.broken_images().values()] * 2, strict=False):
        path.write_bytes(content)
    return (tmp_path / "labelled", tmp_path / "unlabelled"), {str(path) for path in broken}


def names_of(loader, batch):
    return [
        *map(loader.labelled.name, batch.ids_x.tolist()),
        *map(loader.unlabelled.name, batch.ids_u.tolist()),
    ]


def test_raise_names_the_image_that_does_not_decode(damaged):
    folders, broken = damaged
    with loader_of(folders) as loader:
        for _ in range(2):  # and says so again
            with pytest.raises(
                ValueError, match='images do not decode, which on_error="skip"'
            ) as e:
                list(loader)
            named = {path for path in broken if path in str(e.value)}
            step = loader.state_dict()["step"]
            batch = SemiSupervisedBatch(
                *[None] * 3, loader.order.indices_x(step)[0], loader.order.indices_u(step)[0]
            )
            assert named == broken.intersection(names_of(loader, batch))
            assert named


def test_skip_leaves_out_what_does_not_decode_and_nothing_else(damaged):
    folders, broken = damaged
    with loader_of(folders, on_error="skip") as loader:
        with pytest.warns(UserWarning, match="is left out: ") as warned:
            batches = list(loader)
        seen = [name for batch in batches for name in names_of(loader, batch)]
        assert all(batch.x.shape[0] == 3 and batch.u.shape[0] == 6 for batch in batches)
        assert len(batches) == 10
        assert broken.isdisjoint(seen)
        good = {loader.unlabelled.name(number) for number in range(60)} - broken
        assert good <= set(seen)
        assert set(loader.skipped) == broken
        assert len(loader.skipped) == len(warned) == len(broken)
        for batch in batches:
            for number, image in zip(batch.ids_u.tolist(), batch.u, strict=True):
                expected = decode(loader.unlabelled.read(number).tobytes())
                assert np.array_equal(image.permute(1, 2, 0), expected)
            assert torch.equal(batch.y, loader.labelled.labels[batch.ids_x])
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once for each
            list(loader)


@pytest.mark.filterwarnings("ignore:.* is left out")
def test_skip_fills_a_place_with_the_next_sample_that_decodes_and_moves_no_other(damaged):
    folders, broken = damaged
    with loader_of(folders, on_error="skip") as loader:
        replaced = 0
        for step, batch in enumerate(loader):
            order = loader.order.indices_u(step, 3).tolist()
            spares = [n for n in order[1] + order[2] if loader.unlabelled.name(n) not in broken]
            bad = [loader.unlabelled.name(number) in broken for number in order[0]]
            expected = [
                spares.pop(0) if is_bad else number
                for number, is_bad in zip(order[0], bad, strict=True)
            ]
            assert batch.ids_u.tolist() == expected
            replaced += sum(bad)
        assert replaced == 6


@pytest.mark.filterwarnings("ignore:.* is left out")
def test_skip_resumes_bit_for_bit_whatever_was_known_before(damaged):
    folders, _ = damaged
    options = {"on_error": "skip", "crop_area": (0.3, 1.0), "num_threads": 3}
    with loader_of(folders, **options) as loader:
        expected = list(loader)
        loader.set_epoch(0)
        assert_same(list(loader), expected)  # with all of them known
    for stop in (2, 5):
        with loader_of(folders, **options) as loader:
            loader.load_state_dict({**loader.state_dict(), "step": stop})
            assert_same(list(loader), expected[stop:])


def test_a_file_that_has_gone_counts_as_one_that_does_not_decode(damaged, recwarn):
    folders, _ = damaged
    with loader_of(folders, on_error="skip") as loader:
        gone = loader.unlabelled.name(20)
        (folders[1] / "cat" / "000.png").unlink()
        list(loader)
        assert gone in loader.skipped
    (message,) = [str(w.message) for w in recwarn if gone in str(w.message)]
    assert "No such file" in message


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.filterwarnings("ignore:.* is left out")
def test_a_source_without_a_single_good_image_ends_in_an_error(tmp_path, folders, on_error):
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(b"nothing")
    with (
        loader_of((folders[0], tmp_path), ratio=1, on_error=on_error) as loader,
        pytest.raises(ValueError, match=r"no image decodes, of 4|3 of 6 images do not decode"),
    ):
        next(iter(loader))


# Closing

SCRIPT = """
import sys, threading, time
from gpu_mixmatch.data.dali import DaliLoader
labelled, unlabelled, how = sys.argv[1:]
def train(loader):
    for step, batch in enumerate(loader):
        if step == 2:
            print("training", flush=True)
            if how == "exception":
                raise ZeroDivisionError
            if how == "break":
                break
            while how.startswith("interrupt"):
                time.sleep(0.01)
loader = DaliLoader(labelled, unlabelled, 3, 32, ratio=2)
if how in ("exception", "interrupt in with"):
    with loader:
        train(loader)
else:
    train(loader)
print("done", flush=True)
"""


@pytest.mark.parametrize(
    ("how", "end"),
    [
        ("to the end", "done"),
        ("break", "done"),
        ("exception", "ZeroDivisionError"),
        ("interrupt", "KeyboardInterrupt"),
        ("interrupt in with", "KeyboardInterrupt"),
    ],
)
def test_the_interpreter_ends_at_once(folders, how, end):
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, folders), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            if how.startswith("interrupt"):
                assert process.stdout.readline() == "training\n"
                process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert end in output + errors
    assert (process.returncode == 0) == (end == "done")


def test_close_ends_all_threads_and_leaves_batches_alone(folders):
    before = set(threading.enumerate())
    with loader_of(folders) as loader:
        batch = next(iter(loader))
        kept = batch.u.clone()
        assert len(threading.enumerate()) > len(before)
    assert set(threading.enumerate()) <= before
    loader.close()  # once more does no harm
    with loader_of(folders) as another:
        list(another)
    assert torch.equal(batch.u, kept)
    with pytest.raises(RuntimeError, match="this DaliLoader is closed"):
        iter(loader)


def fail_in_the_loop(folders):
    with loader_of(folders) as loader:
        for _ in loader:
            raise ZeroDivisionError


def test_an_exception_in_the_loop_closes_the_loader(folders):
    before = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError):
        fail_in_the_loop(folders)
    assert set(threading.enumerate()) <= before


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "ignore"}, r"on_error must be one of \['raise', 'skip'\], got 'ignore'"),
        ({"crop_area": (0.0, 1.0)}, r"crop_area\[0\] must be in \(0, 1\], got 0.0"),
        ({"crop_area": (0.5, 1.5)}, r"crop_area\[1\] must be .* got 1.5"),
        ({"num_threads": 0}, "num_threads must be in 1 .. 4096, got 0"),
        ({"num_augmentations": 0}, "num_augmentations must be in 1 .*, got 0"),
        ({"size": 0}, "size must be in 1 .. 32768, got 0"),
        ({"size": (2, 3, 4)}, r"size must be one or two integers of at least 1, got \(2, 3, 4\)"),
        ({"batch_size": 0}, "batch_size must be in 1 .*, got 0"),
    ],
)
def test_options_out_of_range_are_refused(folders, options, message):
    with pytest.raises(ValueError, match=message):
        loader_of(folders, **options)


def test_a_callable_augments_as_in_the_builder(folders):
    with loader_of(folders) as plain, loader_of(folders, augment=lambda x: x * 2 - 1) as loader:
        (x, y, u, *_), (views_x, views_y, views, *_) = next(iter(plain)), next(iter(loader))
    assert torch.equal(views_x, x.float() / 255 * 2 - 1)
    assert torch.equal(views_y, y)
    assert torch.equal(views, (u.float() / 255 * 2 - 1).expand(2, -1, -1, -1, -1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": "cifar10"}, "augment must be an engine such as .* got 'cifar10'"),
        ({"augment": DaliAugment}, "augment must be an engine such as .* got the class DaliAug"),
        ({"size": (2, 3.0)}, "size must be an integer, got 3.0"),
        ({"crop_area": 0.5}, "crop_area must be two numbers, least and most, got 0.5"),
        ({"num_threads": True}, "num_threads must be an integer, got True"),
        ({"device_id": "cuda"}, "device_id must be an integer, got 'cuda'"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
    ],
)
def test_options_of_the_wrong_kind_are_refused(folders, options, message):
    with pytest.raises(TypeError, match=message):
        loader_of(folders, **options)


def test_labels_are_wanted_of_the_labelled_source_alone(folders, tmp_path):
    (tmp_path / "0.png").write_bytes(encode(tile(), "PNG"))
    with pytest.raises(ValueError, match=r"root must hold a folder of images per class, .* 0\.png"):
        loader_of((tmp_path, folders[1]))
    index = image_folder(tmp_path)
    with pytest.raises(ValueError, match="source must have labels, got none"):
        loader_of((index, folders[1]))
    assert len(batches_of((folders[0], tmp_path), ratio=1, steps_per_epoch=1)) == 1


def test_seven_unlabelled_images_come_with_each_labelled_one_and_no_more_than_there_are(folders):
    (batch,) = batches_of(folders, ratio=7, steps_per_epoch=1)
    assert list(batch.u.shape) == [21, 3, HEIGHT, WIDTH]
    twins = sampling.epoch_order(4, 0, 60, view=1)[:21]
    assert torch.equal(batch.ids_u, twins)
    with pytest.raises(ValueError, match="ratio must be at most 20 for batch_size = 3"):
        loader_of(folders, ratio=21)


# CUDA


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("crop_area", [None, (0.2, 1.0)], ids=["centred", "random"])
def test_the_gpu_makes_the_batches_of_the_cpu(folders, crop_area):
    options = {"crop_area": crop_area, "size": 24}
    expected = batches_of(folders, **options)
    batches = batches_of(folders, device_id=0, **options)
    for one, other in zip(batches, expected, strict=True):
        assert one.x.is_cuda
        assert torch.equal(one.ids_u, other.ids_u)
        assert torch.equal(one.y, other.y)
        for images, reference in ((one.x, other.x), (one.u, other.u)):
            apart = (images.cpu().int() - reference.int()).abs()
            assert apart.max() <= 2
            assert apart.float().mean() < 0.5


@needs_cuda
@pytest.mark.gpu
def test_the_gpu_decodes_jpegs_as_pil_does():
    contents = [encode(tile(number=number)) for number in range(4)]
    results = run_pipeline(contents, (HEIGHT, WIDTH), device_id=0)
    for content, result in zip(contents, results, strict=True):
        assert grey_levels_apart(result, decode(content)).mean() < 2


@needs_cuda
@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.* is left out")
def test_the_gpu_leaves_out_what_does_not_decode(damaged):
    folders, broken = damaged
    with loader_of(folders, device_id=0, on_error="skip") as loader:
        assert len(list(loader)) == 10
        assert set(loader.skipped) == broken


@needs_cuda
@pytest.mark.gpu
def test_views_are_made_on_the_gpu(folders):
    augment = DaliAugment(WeakAugment(4))
    expected = batches_of(folders, augment=augment)
    for one, other in zip(batches_of(folders, augment=augment, device_id=0), expected, strict=True):
        assert one.views.is_cuda
        assert (one.views.cpu() - other.views).abs().mean() < 0.01
