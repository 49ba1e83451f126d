"""Bad input raises an exception that names the argument, what is wanted and what came."""

import re

import numpy as np
import pytest
import torch

from gpu_mixmatch import MixMatch, MixMatchBatch, MixMatchLoss, MixUpParams, WeakAugment
from gpu_mixmatch import functional as F
from gpu_mixmatch.sampling import draw_augment
from gpu_mixmatch.types import AugmentParams, Geometry, Scaling
from tests.factories import PooledNet, random_images

NUM_CLASSES = 5
B, M, K = 3, 4, 2


def builder_of(augment=None, **switches):
    return MixMatch(augment or WeakAugment(padding=1), NUM_CLASSES, **switches)


def net(num_classes=NUM_CLASSES):
    return PooledNet(num_classes)


def images_of(count, channels=3, height=6, width=6):
    return random_images(count, (channels, height, width), seed=count)


def labels_of(count):
    return torch.arange(count) % NUM_CLASSES


def says(text):
    return re.escape(text)


def raises(error, text):
    return pytest.raises(error, match=says(text))


# Switches


@pytest.mark.parametrize("num_augmentations", [0, -1, 2**70])
def test_num_augmentations_must_be_positive(num_augmentations):
    text = f"num_augmentations must be in 1 .. 2**16, got {num_augmentations}"
    with raises(ValueError, text):
        builder_of(num_augmentations=num_augmentations)


@pytest.mark.parametrize("value", [1.5, "2", None, True, torch.tensor(2), [2]], ids=str)
@pytest.mark.parametrize("name", ["num_augmentations", "num_classes", "seed"])
def test_a_count_must_be_an_integer(name, value):
    with pytest.raises(TypeError, match=f"^{name} must be an integer, got "):
        MixMatch(WeakAugment(), **{"num_classes": 5, name: value})


def test_integers_and_numbers_of_numpy_are_taken():
    builder = MixMatch(
        WeakAugment(),
        np.int64(5),
        num_augmentations=np.uint8(3),
        seed=np.int32(7),
        temperature=np.float32(0.5),
        alpha=np.float64(0.75),
    )
    assert (builder.num_classes, builder.num_augmentations, builder.seed) == (5, 3, 7)
    assert type(builder.seed) is int


@pytest.mark.parametrize("num_classes", [0, -3])
def test_num_classes_must_be_positive(num_classes):
    with raises(ValueError, f"num_classes must be in 1 .. 2**31 - 1, got {num_classes}"):
        MixMatch(WeakAugment(), num_classes)


def test_one_class_is_refused_with_the_reason():
    with raises(ValueError, "num_classes must be at least 2, got 1: of one class nothing is"):
        MixMatch(WeakAugment(), 1)


@pytest.mark.parametrize("temperature", [0, 0.0, -0.5, float("nan"), float("inf")])
def test_temperature_must_be_positive(temperature):
    text = f"temperature must be above 0 and finite, got {temperature}"
    with raises(ValueError, text):
        builder_of(temperature=temperature)
    with raises(ValueError, text):
        F.sharpen(torch.ones(2, 3) / 3, temperature)
    with raises(ValueError, text):
        F.guess_labels(torch.zeros(2, 3, 4), temperature)


@pytest.mark.parametrize("alpha", [0, -0.75, 0.01, 1001, 1e9, float("inf"), float("nan")])
def test_alpha_must_be_in_the_range_of_its_quantile(alpha):
    with raises(ValueError, f"alpha must be in [0.05, 1000], got {alpha}"):
        builder_of(alpha=alpha)


@pytest.mark.parametrize("switch", ["lam", "mix", "guess_bn", "guess_forward", "impl"])
@pytest.mark.parametrize("value", ["other", "", None, 1])
def test_unknown_switch_value_is_an_error_that_lists_the_known_ones(switch, value):
    known = {
        "lam": ["sample", "batch"],
        "mix": ["all", "separate", "labelled", "unlabelled", "none"],
        "guess_bn": ["batch", "update", "eval"],
        "guess_forward": ["joint", "separate"],
        "impl": ["auto", "eager", "numba", "triton"],
    }[switch]
    with raises(ValueError, f"{switch} must be one of {known}, got {value!r}"):
        builder_of(**{switch: value})


@pytest.mark.parametrize("label_smoothing", [1.0, 1.5, -0.1, float("nan"), float("inf")])
def test_label_smoothing_must_leave_some_of_the_label(label_smoothing):
    text = f"label_smoothing must be in [0, 1), got {label_smoothing}"
    with raises(ValueError, text):
        builder_of(label_smoothing=label_smoothing)
    with raises(ValueError, text):
        F.batch_targets(
            torch.tensor([1]), torch.zeros(1, 2, 3), 0.5, label_smoothing=label_smoothing
        )


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
def test_seed_must_be_below_two_to_the_63(seed):
    with raises(ValueError, f"seed must be in 0 .. 2**63 - 1, got {seed}"):
        builder_of(seed=seed)


@pytest.mark.parametrize("augment", ["cifar10", 3, None])
def test_augment_must_be_an_engine_or_a_callable(augment):
    with raises(TypeError, "augment must be an engine such as WeakAugment.cifar10()"):
        MixMatch(augment, NUM_CLASSES)


@pytest.mark.usefixtures("no_kernels_here")
def test_impl_triton_that_cannot_run_is_an_error_with_the_reason():
    params = MixUpParams(torch.ones(2), torch.arange(2))
    calls = [
        lambda: builder_of(impl="triton"),
        lambda: F.guess_labels(torch.zeros(2, 3, 4), 0.5, impl="triton"),
        lambda: F.mixup(torch.zeros(2, 3), torch.ones(2, 1), params, impl="triton"),
        lambda: F.mixmatch_loss(torch.zeros(2, 3), torch.zeros(2, 3), 1, 1.0, impl="triton"),
    ]
    for call in calls:
        with raises(RuntimeError, 'impl="triton" cannot run on cpu: '):
            call()


def test_unknown_impl_is_an_error_in_every_operation():
    params = MixUpParams(torch.ones(2), torch.arange(2))
    calls = [
        lambda: F.guess_labels(torch.zeros(2, 3, 4), 0.5, impl="cuda"),
        lambda: F.mixup(torch.zeros(2, 3), torch.ones(2, 1), params, impl="cuda"),
        lambda: F.mixmatch_loss(torch.zeros(2, 3), torch.zeros(2, 3), 1, 1.0, impl="cuda"),
    ]
    for call in calls:
        names = ["auto", "eager", "numba", "triton"]
        with raises(ValueError, f"impl must be one of {names}, got 'cuda'"):
            call()


# Labels


@pytest.mark.parametrize("wrong", [NUM_CLASSES, 100, -1])
def test_labels_out_of_range_are_an_error_on_the_cpu(wrong):
    y = torch.tensor([0, wrong, 4])
    text = f"y must be labels in 0 .. 4 (num_classes = 5), got {wrong}"
    with raises(ValueError, text):
        builder_of()(images_of(B), y, images_of(M), net())
    with raises(ValueError, text):
        builder_of().from_views(images_of(B) / 255, y, [images_of(M) / 255] * K, net())


@pytest.mark.parametrize(
    ("y", "shown"),
    [
        (torch.zeros(B, 1, dtype=torch.int64), "[3, 1] int64"),  # as DALI gives them
        (torch.zeros(B, NUM_CLASSES, dtype=torch.int64), "[3, 5] int64"),
        (torch.zeros(B), "[3] float32"),
        (torch.full((B, 4), 0.25), "[3, 4] float32"),
        (torch.full((B, NUM_CLASSES, 1), 0.2), "[3, 5, 1] float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_labels_of_the_wrong_shape_or_dtype_are_an_error(y, shown):
    text = f"y must be integer labels [B] or soft labels [B, L] with L = 5, got {shown}"
    with raises(ValueError, text):
        builder_of()(images_of(B), y, images_of(M), net())


def test_draws_on_another_device_than_the_images_are_an_error():
    params = draw_augment(0, 0, 2, 1, padding=1)
    elsewhere = type(params)(*(tensor.to("meta") for tensor in params))
    with raises(ValueError, "params.top must be on cpu like images, got it on meta"):
        F.augment(
            torch.zeros(2, 3, 8, 8), elsewhere, Geometry(1), Scaling(torch.ones(3), torch.zeros(3))
        )


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_labels_must_be_as_many_as_images(count):
    text = f"y must have a label per image of x, 3, got {count}"
    with raises(ValueError, text):
        builder_of()(images_of(B), labels_of(count), images_of(M), net())


def test_a_label_without_an_axis_is_an_error_that_names_y():
    with pytest.raises(ValueError, match=r"^y must "):
        builder_of()(images_of(1), torch.tensor(2), images_of(M), net())


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ([0.5, 0.5, 0.5, 0.0, 0.0], "row 1 with the sum 1.5 and the least entry 0"),
        ([0.2, 0.2, 0.2, 0.2, 0.0], "row 1 with the sum 0.8 and the least entry 0"),
        ([1.5, -0.5, 0.0, 0.0, 0.0], "row 1 with the sum 1 and the least entry -0.5"),
        ([float("nan"), 1.0, 0.0, 0.0, 0.0], "row 1 with the sum nan"),
    ],
    ids=["above one", "below one", "negative", "nan"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_soft_labels_must_be_distributions(dtype, row, shown):
    y = torch.full((B, NUM_CLASSES), 0.2)
    y[1] = torch.tensor(row)
    text = "y must be soft labels that are not negative and sum to 1 in every row, got "
    if dtype == torch.float16:
        shown = shown.split(" with")[0]  # 0.8 is not a half
    with raises(ValueError, text + shown):
        builder_of()(images_of(B), y.to(dtype), images_of(M), net())


# Images


ENGINES = {"WeakAugment": WeakAugment(padding=1), "callable": lambda images: images * 2 - 1}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", [(M, 1, 6, 6), (M, 3, 7, 6), (M, 3, 6, 5)], ids=str)
def test_x_and_u_of_different_sizes_are_an_error(shape, engine):
    u = torch.zeros(shape, dtype=torch.uint8)
    with pytest.raises(ValueError, match=re.escape(str(list(shape)))):
        builder_of(ENGINES[engine])(images_of(B), labels_of(B), u, net())


def test_x_and_u_of_different_dtypes_or_layouts_are_an_error():
    text = r"^x and u must have the same .*, got \[3, 3, 6, 6\] (torch\.)?uint8 and "
    with pytest.raises(ValueError, match=text + r"\[4, 3, 6, 6\] (torch\.)?float32$"):
        builder_of()(images_of(B), labels_of(B), images_of(M) / 255, net())
    with pytest.raises(ValueError, match=text + r"\[4, 6, 6, 3\] (torch\.)?uint8$"):
        builder_of()(images_of(B), labels_of(B), images_of(M).permute(0, 2, 3, 1), net())


@pytest.mark.parametrize(("num_labelled", "num_unlabelled"), [(0, M), (B, 0), (0, 0)])
def test_empty_batches_are_an_error(num_labelled, num_unlabelled):
    name, shape = ("x", [0, 3, 6, 6]) if num_labelled == 0 else ("u", [0, 3, 6, 6])
    x, u = images_of(num_labelled), images_of(num_unlabelled)
    with raises(ValueError, f"{name} must hold at least one image, got {shape}"):
        builder_of()(x, labels_of(num_labelled), u, net())
    with pytest.raises(ValueError, match="must hold at least one image"):
        builder_of().from_views(x / 255, labels_of(num_labelled), [u / 255] * K, net())


@pytest.mark.parametrize("shape", [(3, 6, 6), (3, 108), (3, 1, 3, 6, 6)], ids=str)
def test_images_must_have_four_axes(shape):
    images = torch.zeros(shape, dtype=torch.uint8)
    with raises(ValueError, f"must be [M, C, H, W] or [M, H, W, C], got {list(shape)}"):
        builder_of()(images, labels_of(3), images, net())


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64], ids=str)
def test_images_must_be_bytes_or_floats(dtype):
    name = str(dtype).removeprefix("torch.")
    text = f"must be uint8 or one of float32, float16, bfloat16, got {name}"
    with raises(ValueError, text):
        builder_of()(
            torch.zeros(B, 3, 6, 6, dtype=dtype),
            labels_of(B),
            torch.zeros(M, 3, 6, 6, dtype=dtype),
            net(),
        )


@pytest.mark.parametrize("name", ["x", "u"])
def test_images_on_another_device_are_an_error(name):
    images = {"x": images_of(B), "u": images_of(M)}
    images[name] = images[name].to("meta")
    with raises(
        ValueError, f"{name} must be on the CPU or on cpu like this module, got it on meta"
    ):
        builder_of()(images["x"], labels_of(B), images["u"], net())


# Ids


@pytest.mark.parametrize(
    ("ids", "shown"),
    [
        (torch.arange(2), "[2] torch.int64"),
        (torch.arange(9), "[9] torch.int64"),
        (torch.arange(0), "[0] torch.int64"),
        (torch.zeros(1, 3, dtype=torch.int64), "[1, 3] torch.int64"),
        (torch.arange(3, dtype=torch.int32), "[3] torch.int32"),
        (torch.arange(3.0), "[3] torch.float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("name", ["ids_x", "ids_u"])
def test_ids_must_be_one_int64_per_image(name, ids, shown):
    x = u = images_of(3)
    text = f"{name} must be [3] int64, one per image, got {shown}"
    with raises(ValueError, text):
        builder_of()(x, labels_of(3), u, net(), **{name: ids})
    with raises(ValueError, text):
        builder_of().from_views(x / 255, labels_of(3), [u / 255] * K, net(), **{name: ids})


# from_views


def views_of(count=K, **size):
    return [images_of(M, **size) / 255 for _ in range(count)]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_from_views_must_get_k_views(count):
    text = f"views must hold num_augmentations = 2 views, got {count}"
    views = views_of(count)
    with raises(ValueError, text):
        builder_of().from_views(images_of(B) / 255, labels_of(B), views, net())
    if count:
        with raises(ValueError, text):
            builder_of().from_views(images_of(B) / 255, labels_of(B), torch.stack(views), net())


@pytest.mark.parametrize("size", [{"channels": 1}, {"height": 5}, {"width": 7}], ids=str)
def test_from_views_must_get_views_of_the_size_of_x(size):
    views = views_of(**size)
    shape = list(views[0].shape)
    text = f"views must each be [M, C, H, W] with [3, 6, 6] like x, got {[shape, shape]}"
    with raises(ValueError, text):
        builder_of().from_views(images_of(B) / 255, labels_of(B), views, net())


def test_from_views_must_get_views_of_one_size():
    views = [images_of(M) / 255, images_of(M + 1) / 255]
    text = "got [[4, 3, 6, 6], [5, 3, 6, 6]]"
    with raises(ValueError, text):
        builder_of().from_views(images_of(B) / 255, labels_of(B), views, net())


def test_from_views_must_get_one_floating_point_dtype():
    text = "x and views must be of one floating point dtype, got "
    x, (view, _) = images_of(B) / 255, views_of()
    with raises(ValueError, text + "torch.float32 and torch.float16"):
        builder_of().from_views(x, labels_of(B), [view, view.half()], net())
    with raises(ValueError, text + "torch.uint8 and torch.uint8"):
        builder_of().from_views(images_of(B), labels_of(B), [images_of(M)] * K, net())


# The model


@pytest.mark.parametrize("guess_forward", ["joint", "separate"])
@pytest.mark.parametrize("num_classes", [1, 4, 6])
def test_logits_of_the_wrong_number_of_classes_are_an_error(num_classes, guess_forward):
    text = f"model must return logits [8, 5] (num_classes = 5), got [8, {num_classes}]"
    with raises(ValueError, text):
        builder_of(guess_forward=guess_forward)(
            images_of(B), labels_of(B), images_of(M), net(num_classes)
        )


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (lambda logits: logits[:-1], [7, 5]),
        (lambda logits: logits[..., None], [8, 5, 1]),
        (lambda logits: logits.flatten(), [40]),
    ],
)
def test_logits_of_the_wrong_shape_are_an_error(change, shape):
    model = net()
    text = f"model must return logits [8, 5] (num_classes = 5), got {shape}"
    with raises(ValueError, text):
        builder_of()(images_of(B), labels_of(B), images_of(M), lambda images: change(model(images)))


@pytest.mark.parametrize(
    ("output", "kind"),
    [({"logits": torch.zeros(8, 5)}, "dict"), ((torch.zeros(8, 5),), "tuple"), (None, "NoneType")],
    ids=["dict", "tuple", "None"],
)
def test_a_model_that_does_not_return_a_tensor_is_an_error_that_names_logits_getter(output, kind):
    text = f"model must return a tensor of logits, got {kind}; pass logits_getter="
    with raises(TypeError, text):
        builder_of()(images_of(B), labels_of(B), images_of(M), lambda images: output)


def test_logits_must_be_floating_point():
    with pytest.raises(TypeError, match="model must return a tensor of logits"):
        builder_of()(
            images_of(B), labels_of(B), images_of(M), lambda images: torch.zeros(8, 5).long()
        )


class NanNet(PooledNet):
    """NaN logits for the unlabelled image number 2, whatever its view."""

    def forward(self, images):
        logits = super().forward(images)
        logits.view(-1, M, NUM_CLASSES)[:, 2] = torch.nan
        return logits


@pytest.mark.parametrize("guess_forward", ["joint", "separate"])
def test_nan_logits_do_not_raise_until_check_says_which_rows(guess_forward):
    batch = builder_of(mix="none", guess_forward=guess_forward)(
        images_of(B), labels_of(B), images_of(M), NanNet(NUM_CLASSES)
    )
    text = (
        "targets must be finite and sum to 1 in every row, got rows [5, 9] with sums [nan, nan]. "
        "Bad before mixing: rows [5, 9] (rows below 3 are labelled, the others guessed)"
    )
    with raises(ValueError, text):
        batch.check()


def test_nan_logits_reach_the_rows_that_were_mixed_with_them_and_no_others():
    batch = builder_of()(images_of(B), labels_of(B), images_of(M), NanNet(NUM_CLASSES))
    origins = {5, 9}
    partners = batch.params.index.tolist()
    expected = [row for row in range(11) if row in origins or partners[row] in origins]
    rows = batch.targets.isnan().any(dim=1).nonzero().flatten().tolist()
    assert rows == expected
    with raises(ValueError, f"got rows {expected} with sums") as caught:
        batch.check()
    named = re.search(r"Bad before mixing: rows \[([\d, ]*)\]", str(caught.value)).group(1)
    assert origins <= set(map(int, named.split(", ")))


def test_check_shows_the_first_eight_rows():
    targets = torch.zeros(20, 3)
    params = MixUpParams(torch.ones(20), torch.arange(20))
    batch = MixMatchBatch(torch.zeros(20, 1), targets, 4, torch.tensor(0), params)
    with raises(ValueError, "got rows [0, 1, 2, 3, 4, 5, 6, 7, ...] with sums [0.0"):
        batch.check()


def test_infinite_targets_are_found_by_check():
    targets = torch.tensor([[1.0, 0.0], [torch.inf, 0.0], [0.5, 0.5]])
    params = MixUpParams(torch.ones(3), torch.arange(3))
    batch = MixMatchBatch(torch.zeros(3, 1), targets, 1, torch.tensor(0), params)
    with raises(ValueError, "got rows [1] with sums [inf]"):
        batch.check()


# The operations


def test_sharpen_must_get_floating_point():
    with raises(ValueError, "probs must be floating point, got int64"):
        F.sharpen(torch.ones(2, 3, dtype=torch.int64), 0.5)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4, 1), (0, 3, 4), (4,)], ids=str)
def test_guess_labels_must_get_views_images_and_classes(shape):
    with raises(ValueError, f"logits must be [K, M, L] with K >= 1, got {list(shape)}"):
        F.guess_labels(torch.zeros(shape), 0.5)


def test_guess_labels_must_get_floating_point():
    with raises(ValueError, "logits must be floating point, got int32"):
        F.guess_labels(torch.zeros(2, 3, 4, dtype=torch.int32), 0.5)


def mixup_of(**changes):
    arguments = {
        "inputs": torch.zeros(4, 3, 2, 2),
        "targets": torch.zeros(4, 5),
        "lam": torch.ones(4),
        "index": torch.arange(4),
        "out": None,
        **changes,
    }
    params = MixUpParams(arguments["lam"], arguments["index"])
    return F.mixup(arguments["inputs"], arguments["targets"], params, out=arguments["out"])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"inputs": torch.zeros(4, 3, 2, 2).byte()}, "inputs must be floating point, got uint8"),
        (
            {"targets": torch.zeros(3, 5)},
            "targets must be [N, L] with N = 4 like inputs, got [3, 5]",
        ),
        ({"targets": torch.zeros(4)}, "targets must be [N, L] with N = 4 like inputs, got [4]"),
        ({"targets": torch.zeros(4, 5).half()}, "targets must be float32, got float16"),
        ({"targets": torch.zeros(4, 5).long()}, "targets must be float32, got int64"),
        ({"lam": torch.ones(3)}, "params.lam must be [N] float32 with N = 4 like inputs, got [3]"),
        (
            {"lam": torch.ones(4, 1)},
            "params.lam must be [N] float32 with N = 4 like inputs, got [4, 1]",
        ),
        (
            {"lam": torch.tensor(0.5)},
            "params.lam must be [N] float32 with N = 4 like inputs, got []",
        ),
        (
            {"index": torch.arange(5)},
            "params.index must be [N] int64 with N = 4 like inputs, got [5]",
        ),
        (
            {"inputs": torch.zeros(4, 3, 2, 4)[..., ::2]},
            "inputs must be contiguous or channels_last",
        ),
        ({"targets": torch.zeros(4, 5, device="meta")}, "targets must be on cpu like inputs"),
        ({"out": torch.zeros(3, 3, 2, 2)}, "out must be [4, 3, 2, 2] float32 with strides"),
        ({"out": torch.zeros(4, 3, 2, 2).half()}, "out must be [4, 3, 2, 2] float32 with strides"),
        (
            {"out": torch.zeros(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)},
            "out must be [4, 3, 2, 2] float32 with strides [12, 4, 2, 1] like inputs",
        ),
    ],
)
def test_mixup_arguments_must_fit_each_other(changes, text):
    with raises(ValueError, text):
        mixup_of(**changes)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"lam": torch.ones(4, dtype=torch.float64)}, "params.lam"),
        ({"lam": torch.ones(4, dtype=torch.int64)}, "params.lam"),
        ({"index": torch.zeros(4)}, "params.index"),
        ({"index": torch.ones(4, dtype=torch.bool)}, "params.index"),
    ],
)
def test_mixup_params_must_have_the_dtypes_that_they_are_drawn_in(changes, name):
    with pytest.raises(ValueError, match=f"^{re.escape(name)} must be"):
        mixup_of(**changes)


@pytest.mark.parametrize(("num_rows", "num_groups"), [(6, 0), (6, 7), (6, -1), (1, 2), (0, 2)])
def test_interleave_groups_must_not_outnumber_rows(num_rows, num_groups):
    text = f"num_groups must be in 1 .. N = {num_rows}, got {num_groups}"
    with raises(ValueError, text):
        F.interleave(torch.zeros(num_rows, 2), num_groups)


@pytest.mark.parametrize("num_labelled", [-1, 5, 100])
def test_num_labelled_must_be_within_the_batch(num_labelled):
    with pytest.raises(
        ValueError, match=rf"^num_labelled must be in 0 \.\. .*, got {num_labelled}$"
    ):
        F.mixmatch_loss(torch.zeros(4, 3), torch.zeros(4, 3), num_labelled, 1.0)


@pytest.mark.parametrize("shape", [(4, 2), (3, 3), (4,), (4, 3, 1)], ids=str)
def test_loss_logits_must_be_shaped_like_targets(shape):
    text = f"logits must be [N, L] = [4, 3] like targets, got {list(shape)}"
    with raises(ValueError, text):
        F.mixmatch_loss(torch.zeros(shape), torch.zeros(4, 3), 2, 1.0)


def test_loss_logits_must_be_floating_point():
    with raises(ValueError, "logits must be floating point, got int64"):
        F.mixmatch_loss(torch.zeros(4, 3).long(), torch.zeros(4, 3), 2, 1.0)


def test_loss_targets_must_be_on_the_device_of_logits():
    with raises(ValueError, "targets must be on cpu like logits, got it on meta"):
        F.mixmatch_loss(torch.zeros(4, 3), torch.zeros(4, 3, device="meta"), 2, 1.0)


@pytest.mark.parametrize("rampup_steps", [-1, -16_384])
def test_rampup_must_not_be_negative(rampup_steps):
    text = f"rampup_steps must be in 0 .. 2**32 - 1, got {rampup_steps}"
    with raises(ValueError, text):
        F.linear_rampup(3, rampup_steps)
    with raises(ValueError, text):
        MixMatchLoss(rampup_steps=rampup_steps)


@pytest.mark.parametrize("lambda_u", [-1, -0.5, float("nan"), float("inf")])
def test_lambda_must_be_neither_negative_nor_infinite(lambda_u):
    with raises(ValueError, f"lambda_u must be at least 0 and finite, got {lambda_u}"):
        MixMatchLoss(lambda_u)


def test_augment_pair_must_fit_the_draws():
    params = AugmentParams(
        *(torch.zeros(7, dtype=torch.int32) for _ in range(3)),
        torch.zeros(7, 4, dtype=torch.int32),
        torch.zeros(7),
    )
    with raises(ValueError, "params must have a row per view of [3, 3] images, got 7"):
        F.augment((images_of(3), images_of(3)), params, Geometry(), Scaling(1.0, 0.0))
