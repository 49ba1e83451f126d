"""collate: default_collate's structure, the pixels as they are, errors that name the sample."""

import collections.abc
import io

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from gpu_mixmatch import FlexMatch, RandAugment, WeakAugment
from gpu_mixmatch.data.collate import Indexed, collate
from tests.skips import skip_without

PIL = skip_without("PIL.Image")

Pair = collections.namedtuple("Pair", ["image", "label"])
COUNT = 5
# workers are forked from a process that has threads, of which Python 3.12 and later warn
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def pixels(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def to_tensor(array):
    """What torchvision's ToTensor does to an array HWC; of a PIL image it makes a copy first."""
    return torch.from_numpy(array.transpose(2, 0, 1)).contiguous().to(torch.float32).div(255)


class Rows(Dataset):
    """A map-style data set over a list."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class BatchedRows(Rows):
    """The same, for which only whole batches can be fetched."""

    def __getitem__(self, index):
        raise AssertionError("fetched one by one")

    def __getitems__(self, indices):
        return [self.rows[index] for index in indices]


def refuse_cuda(*args, **kwargs):
    raise AssertionError("a worker must not touch CUDA")


def forbid_cuda(worker_id):
    torch.cuda._lazy_init = refuse_cuda
    torch.Tensor.pin_memory = refuse_cuda


# Pixels


@pytest.mark.parametrize(
    "shape", [(32, 32, 3), (3, 9, 7), (7, 5, 1), (1, 4, 4), (1, 1, 3)], ids=str
)
@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_uint8_images_are_stacked_in_their_own_layout(kind, shape):
    arrays = pixels(COUNT, *shape)
    samples = list(arrays) if kind == "array" else list(torch.from_numpy(arrays))
    batch = collate(samples)
    assert batch.dtype == torch.uint8
    assert torch.equal(batch, torch.from_numpy(arrays))


@pytest.mark.parametrize("kind", ["array", "tensor", "PIL"])
def test_grey_images_get_a_channel_axis(kind):
    arrays = pixels(COUNT, 6, 5)
    make = {"array": np.asarray, "tensor": torch.from_numpy, "PIL": PIL.fromarray}[kind]
    batch = collate([make(array) for array in arrays])
    assert torch.equal(batch, torch.from_numpy(arrays)[:, None])


def test_strided_arrays_are_stacked_as_they_look():
    arrays = pixels(COUNT, 8, 6, 3)
    batch = collate([array[::-1, ::2].transpose(2, 0, 1) for array in arrays])
    assert torch.equal(batch, torch.from_numpy(arrays[:, ::-1, ::2].transpose(0, 3, 1, 2).copy()))


def test_read_only_arrays_are_stacked_into_memory_of_their_own():
    array = pixels(1, 4, 4, 3)[0]
    array.setflags(write=False)
    batch = collate([array, array])
    batch[0] = 0
    assert torch.equal(batch[1], torch.from_numpy(array.copy()))


def test_pil_images_are_nchw_in_channels_last_memory():
    arrays = pixels(COUNT, 6, 4, 3)
    batch = collate([PIL.fromarray(array) for array in arrays])
    assert torch.equal(batch, torch.from_numpy(arrays).permute(0, 3, 1, 2))
    assert batch.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La"])
def test_grey_pil_modes_give_one_channel(mode):
    image = PIL.fromarray(pixels(1, 6, 4)[0])
    image = image.convert("LA").convert(mode) if mode == "La" else image.convert(mode)
    batch = collate([image] * 2)
    assert list(batch.shape) == [2, 1, 6, 4]
    expected = image.convert("LA").convert("L") if mode == "La" else image.convert("L")
    assert torch.equal(batch[1, 0], torch.from_numpy(np.array(expected)))


@pytest.mark.parametrize(
    "mode", ["RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_other_pil_modes_of_eight_bits_give_rgb(mode):
    source = PIL.fromarray(pixels(1, 6, 4, 3)[0])
    steps = {"RGBa": ["RGBA", "RGBa"], "PA": ["P", "PA"]}
    image = source
    for step in steps.get(mode, [mode]):
        if step == "LAB":  # PIL makes these from files only
            image = PIL.frombytes("LAB", (4, 6), pixels(1, 6 * 4 * 3).tobytes())
        else:
            image = image.convert(step)
    assert image.mode == mode
    batch = collate([image] * 2)
    assert list(batch.shape) == [2, 3, 6, 4]
    assert torch.equal(batch[0], torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))


def test_transparency_is_dropped_and_not_blended():
    rgba = pixels(1, 6, 4, 4)[0]
    batch = collate([PIL.fromarray(rgba)])
    assert torch.equal(batch[0], torch.from_numpy(rgba[:, :, :3].copy()).permute(2, 0, 1))


def test_a_palette_with_transparency_gives_its_colours_without_a_warning():
    image = PIL.fromarray(pixels(1, 6, 4, 3)[0]).convert("P")
    expected = np.array(image.convert("RGB"))
    image.info["transparency"] = bytes(range(256))
    with pytest.warns(UserWarning, match="Transparency"):
        image.convert("RGB")  # the plain way, which collate must not go
    assert torch.equal(collate([image])[0], torch.from_numpy(expected).permute(2, 0, 1))


def test_a_lazily_opened_file_is_read():
    array = pixels(1, 6, 4, 3)[0]
    file = io.BytesIO()
    PIL.fromarray(array).save(file, "png")
    batch = collate([PIL.open(file)])
    assert torch.equal(batch[0], torch.from_numpy(array).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["I", "F", "I;16", "I;16B", "I;16L"])
def test_pil_modes_of_more_bits_are_refused(mode):
    good, wide = PIL.new("L", (4, 6)), PIL.new(mode, (4, 6))
    with pytest.raises(ValueError, match=rf"samples\[1\]\[0\] must be .* 8 bits.* got mode {mode}"):
        collate([(good, 0), (wide, 1)])


def test_float_images_are_stacked_as_they_are():
    images = torch.rand(COUNT, 3, 4, 4)
    assert torch.equal(collate(list(images)), images)
    halves = images.numpy().astype(np.float16)
    assert torch.equal(collate(list(halves)), torch.from_numpy(halves))


# Labels and other leaves


@pytest.mark.parametrize(
    "labels",
    [
        [3, 1, 2],
        [np.uint8(3), np.uint8(1), np.uint8(2)],
        [np.int32(3), 1, np.int64(2)],
        list(np.array([3, 1, 2], dtype=np.int16)[:, None].reshape(3, 1)[:, 0]),
        [np.array(3), np.array(1), np.array(2)],
        list(torch.tensor([3, 1, 2], dtype=torch.int32)),
        list(torch.tensor([3, 1, 2], dtype=torch.uint8)),
    ],
    ids=["int", "numpy uint8", "mixed", "numpy int16", "0-d array", "0-d tensor", "0-d uint8"],
)
def test_labels_become_int64(labels):
    batch = collate(labels)
    assert batch.dtype == torch.int64
    assert batch.tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    "values",
    [
        [0.5, 1.5],
        [np.float32(0.5), np.float32(1.5)],
        [True, False],
        [torch.tensor([0.25, 0.75]), torch.tensor([1.0, 0.0])],
        [np.array([1, 2]), np.array([3, 4])],
        [np.array([1, 2], dtype=np.uint8), np.array([3, 4], dtype=np.uint8)],
        [torch.tensor(True), torch.tensor(False)],
    ],
    ids=[
        "float",
        "numpy float",
        "bool",
        "soft labels",
        "int vector",
        "uint8 vector",
        "bool tensor",
    ],
)
def test_other_numbers_are_as_default_collate_gives_them(values):
    batch, expected = collate(values), default_collate(values)
    assert batch.dtype == expected.dtype
    assert torch.equal(batch, expected)


def test_big_endian_arrays_keep_their_values():
    assert collate([np.array([1, 256], dtype=">i4")] * 2).tolist() == [[1, 256]] * 2


@pytest.mark.parametrize(
    "extras",
    [
        ["a.png", "b.png"],
        [b"a", b"b"],
        [None, None],
        [object(), object()],
        [np.str_("a"), np.str_("b")],
        [np.array(["a", "bc"]), np.array(["d", "e"])],
        ["a", None],
    ],
    ids=["str", "bytes", "None", "object", "numpy str", "array of str", "mixed"],
)
def test_extra_leaves_are_passed_through_as_a_list(extras):
    batch = collate(list(zip([1, 2], extras, strict=True)))
    assert batch[0].tolist() == [1, 2]
    assert type(batch[1]) is list
    assert all(kept is extra for kept, extra in zip(batch[1], extras, strict=True))


# Structure


def structure(value):
    if isinstance(value, collections.abc.Mapping):
        return type(value), {key: structure(value[key]) for key in value}
    if isinstance(value, list | tuple):
        return type(value), [structure(item) for item in value]
    return type(value)


def wrapped(kind, image, label):
    return {
        "bare": lambda: image,
        "tuple": lambda: (image, label),
        "list": lambda: [image, label],
        "dict": lambda: {"image": image, "label": label},
        "named tuple": lambda: Pair(image, label),
        "OrderedDict": lambda: collections.OrderedDict(image=image, label=label),
        "defaultdict": lambda: collections.defaultdict(int, image=image, label=label),
        "UserDict": lambda: collections.UserDict(image=image, label=label),
        "nested": lambda: ({"pair": Pair(image, [label, (label,)])}, label),
        "1-tuple": lambda: (image,),
    }[kind]()


KINDS = [
    "bare",
    "tuple",
    "list",
    "dict",
    "named tuple",
    "OrderedDict",
    "defaultdict",
    "UserDict",
    "nested",
    "1-tuple",
]


@pytest.mark.parametrize("kind", KINDS)
def test_structure_is_that_of_default_collate(kind):
    samples = [wrapped(kind, array, label) for label, array in enumerate(pixels(COUNT, 4, 4, 3))]
    batch, expected = collate(samples), default_collate(samples)
    assert structure(batch) == structure(expected)
    torch.testing.assert_close(
        *(
            list(v.values()) if isinstance(v, collections.UserDict) else v
            for v in (batch, expected)
        ),
        rtol=0,
        atol=0,
    )


def test_the_samples_themselves_are_left_alone():
    samples = [{"image": array, "label": 1} for array in pixels(2, 4, 4, 3)]
    collate(samples)
    assert all(isinstance(sample["image"], np.ndarray) for sample in samples)


# Errors


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "samples must hold at least one sample"),
        (
            [(np.zeros((4, 4, 3), np.uint8), 0)] * 2 + [(np.zeros((5, 4, 3), np.uint8), 0)],
            r"samples\[2\]\[0\] must be an array \[4, 4, 3\] uint8 like samples\[0\]\[0\], "
            r"got an array \[5, 4, 3\] uint8; bring all images to one size",
        ),
        (
            [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)],
            r"samples\[1\] must be an array \[4, 4, 3\] uint8 .* got an array \[4, 4\] uint8",
        ),
        (
            [{"x": torch.zeros(3, 4, 4)}, {"x": torch.zeros(3, 4, 4, dtype=torch.uint8)}],
            r"samples\[1\]\['x'\] must be a tensor \[3, 4, 4\] float32 .* got .* uint8",
        ),
        (
            [PIL.new("RGB", (4, 6)), PIL.new("RGB", (6, 4))],
            r"samples\[1\] must be a PIL image of 6 x 4 pixels in mode RGB .* got .* 4 x 6 pixels",
        ),
        (
            [PIL.new("RGB", (4, 6)), PIL.new("L", (4, 6))],
            r"samples\[1\] must be .* mode RGB .* got .* mode L; convert all images",
        ),
        (
            [PIL.new("L", (4, 6)), np.zeros((6, 4), np.uint8)],
            r"samples\[1\] must be a PIL image .* got an array \[6, 4\]",
        ),
        ([np.zeros((6, 4)), None], r"samples\[1\] must be an array .* got None of type NoneType"),
        ([(0, 3), (0, None)], r"samples\[1\]\[1\] must be 3 of type int .* got None"),
        ([(0, 3), (0, 3, 4)], r"samples\[1\] must be a tuple of 2 .* got a tuple of 3"),
        ([(0, 3), [0, 3]], r"samples\[1\] must be a tuple of 2 .* got a list of 2"),
        ([{"a": 1}, {"b": 1}], r"samples\[1\] must be a dict with keys \['a'\] .* keys \['b'\]"),
        ([2**63, 2**63], r"samples\[i\] must be at most 2\*\*63 - 1, got 9223372036854775808"),
        ([1, 2**65], r"samples\[i\] must be at most 2\*\*63 - 1, got 36893488147419103232"),
    ],
    ids=lambda value: None if not isinstance(value, str) else value[:30],
)
def test_an_error_names_the_sample_and_what_is_wanted(samples, message):
    with pytest.raises(ValueError, match=message):
        collate(samples)


# In a DataLoader


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    "make", [np.asarray, torch.from_numpy, PIL.fromarray], ids=lambda f: f.__name__
)
def test_batches_are_the_same_from_a_worker(make, num_workers):
    arrays = pixels(8, 6, 4, 3)
    rows = Rows([(make(array), label, f"{label}.png") for label, array in enumerate(arrays)])
    loader = DataLoader(
        rows,
        batch_size=4,
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=forbid_cuda if num_workers else None,
    )
    for number, (x, y, names) in enumerate(loader):
        expected = torch.from_numpy(arrays[4 * number : 4 * number + 4])
        if make is PIL.fromarray:
            expected = expected.permute(0, 3, 1, 2)
        assert torch.equal(x, expected)
        assert x.stride() == expected.stride()
        assert y.tolist() == list(range(4 * number, 4 * number + 4))
        assert names == [f"{label}.png" for label in y.tolist()]
        assert x.is_shared() == bool(num_workers)
    assert number == 1


class ShareCounter:
    """A collate_fn that tells, from inside the worker, whether images are in shared memory."""

    def __call__(self, samples):
        x, _ = collate(samples)
        return torch.tensor(x.is_shared())


@pytest.mark.parametrize(
    "make", [np.asarray, torch.from_numpy, PIL.fromarray], ids=lambda f: f.__name__
)
def test_a_worker_writes_images_straight_to_shared_memory(make):
    rows = Rows([(make(array), 0) for array in pixels(4, 6, 4, 3)])
    assert not ShareCounter()(rows.rows)
    (is_shared,) = DataLoader(rows, batch_size=4, collate_fn=ShareCounter(), num_workers=1)
    assert is_shared


@pytest.mark.parametrize("base", [Rows, BatchedRows])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_indexed_samples_bring_their_ids(base, num_workers):
    arrays = pixels(9, 4, 4, 3)
    dataset = Indexed(base([(array, label % 3) for label, array in enumerate(arrays)]))
    loader = DataLoader(
        dataset, batch_size=4, shuffle=True, collate_fn=collate, num_workers=num_workers
    )
    assert len(dataset) == 9
    seen = []
    for (x, y), ids_x in loader:
        assert ids_x.dtype == torch.int64
        assert torch.equal(x, torch.from_numpy(arrays)[ids_x])
        assert torch.equal(y, ids_x % 3)
        seen += ids_x.tolist()
    assert sorted(seen) == list(range(9))


def test_indexed_takes_tensor_data_sets():
    images = torch.from_numpy(pixels(6, 3, 4, 4))
    loader = DataLoader(Indexed(TensorDataset(images)), batch_size=3, collate_fn=collate)
    (first, second) = loader
    assert torch.equal(torch.cat([first[0][0], second[0][0]]), images)
    assert second[1].tolist() == [3, 4, 5]


def test_hugging_face_rows_are_collated():
    datasets = pytest.importorskip("datasets", reason="needs Hugging Face's datasets")
    arrays = pixels(6, 6, 4, 3)
    rows = {"image": [PIL.fromarray(array) for array in arrays], "label": list(range(6))}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    dataset = datasets.Dataset.from_dict(rows, features=features)
    for batch, ids in DataLoader(Indexed(dataset), batch_size=3, shuffle=True, collate_fn=collate):
        assert torch.equal(batch["image"], torch.from_numpy(arrays).permute(0, 3, 1, 2)[ids])
        assert torch.equal(batch["label"], ids)


@needs_cuda
@pytest.mark.gpu
def test_batches_can_be_pinned():
    arrays = pixels(4, 6, 4, 3)
    rows = Rows([(PIL.fromarray(array), label) for label, array in enumerate(arrays)])
    for num_workers in (0, 1):
        loader = DataLoader(
            rows, batch_size=4, collate_fn=collate, pin_memory=True, num_workers=num_workers
        )
        ((x, y),) = loader
        assert x.is_pinned()
        assert torch.equal(x, torch.from_numpy(arrays).permute(0, 3, 1, 2))
        assert y.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["array", "tensor", "PIL"])
def test_collate_keeps_the_pixels_that_default_collate_after_to_tensor_has(kind):
    arrays = pixels(64, 32, 32, 3)
    images = {
        "array": list(arrays),
        "tensor": list(torch.from_numpy(arrays)),
        "PIL": [PIL.fromarray(array) for array in arrays],
    }[kind]
    as_array = np.array if kind == "PIL" else np.asarray
    rows = list(zip(images, range(64), strict=True))
    expected, labels = default_collate([(to_tensor(as_array(i)), label) for i, label in rows])
    x, y = collate(rows)
    x = x if kind == "PIL" else x.permute(0, 3, 1, 2)
    torch.testing.assert_close(x.float() / 255, expected)
    assert torch.equal(y, labels)


# What data sets hold, and read again


class Record(collections.abc.MutableMapping):
    """A mapping whose shallow copy shares its fields."""

    def __init__(self, **fields):
        self.fields = fields

    def __getitem__(self, key):
        return self.fields[key]

    def __setitem__(self, key, value):
        self.fields[key] = value

    def __delitem__(self, key):
        del self.fields[key]

    def __iter__(self):
        return iter(self.fields)

    def __len__(self):
        return len(self.fields)


def test_samples_of_a_data_set_are_left_as_they_are():
    samples = [Record(image=np.full((2, 2, 3), value, np.uint8), label=value) for value in (3, 5)]
    for _ in range(2):  # the first sample is still one image
        batch = collate(samples)
        assert batch["image"].shape == (2, 2, 2, 3)
        assert batch["label"].tolist() == [3, 5]
    assert samples[0]["label"] == 3
    rows = [torch.zeros(2, 2), torch.ones(2, 2)]
    collate(rows).fill_(7)
    assert rows[1].max() == 1


def test_indices_stay_with_their_samples_whatever_a_data_set_does_to_its_list():
    class Sorting(Rows):
        def __getitems__(self, indices):
            order = sorted(range(len(indices)), key=indices.__getitem__)
            indices.sort()  # reads go forwards
            found = {place: self.rows[index] for place, index in zip(order, indices, strict=True)}
            return [found[place] for place in range(len(indices))]

    assert Indexed(Sorting([10, 11, 12, 13])).__getitems__([3, 0, 2]) == [(13, 3), (10, 0), (12, 2)]


def test_two_loaders_of_one_to_seven_give_a_method_its_ids():
    weak = WeakAugment.digits()
    flexmatch = FlexMatch(weak, RandAugment.fixmatch(weak, cutout=3), 3, num_unlabelled=28)
    images = torch.from_numpy(pixels(28, 8, 8))
    labelled = DataLoader(
        TensorDataset(images[:8], torch.arange(8) % 3), batch_size=2, collate_fn=collate
    )
    unlabelled = DataLoader(Indexed(images), batch_size=14, shuffle=True, collate_fn=collate)
    seen = []
    for (x, y), (u, ids_u) in zip(labelled, unlabelled, strict=False):
        assert (len(x), len(u)) == (2, 14)
        batch = flexmatch(x, y, u, lambda images: 50 * images[:, 0, 3, 3:6], ids_u=ids_u)
        seen += ids_u.tolist()
    assert len(batch.weights) == 16
    assert sorted(seen) == list(range(28))
    assert (flexmatch.threshold.classes >= 0).sum() > 14
