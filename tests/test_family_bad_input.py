"""Bad input of the methods that weigh guesses: errors that name the argument and what came."""

import re

import numpy as np
import pytest
import torch

from gpu_mixmatch import (
    UDA,
    Consistency,
    ConsistencyLoss,
    DistributionAlignment,
    FixedThreshold,
    FixMatch,
    FlexMatch,
    FlexThreshold,
    FreeMatch,
    FreeThreshold,
    MeanTeacher,
    MixMatch,
    MixMatchLoss,
    RandAugment,
    SoftMatch,
    SoftThreshold,
    WeakAugment,
    functional,
)
from gpu_mixmatch.types import Weighting
from tests.family import (
    ADAPTIVE,
    ENGINES,
    NUM_CLASSES,
    SAMPLES,
    B,
    M,
    data_of,
    labelled_batch,
    net,
)

WEAK, STRONG, _ = ENGINES


def raises(error, text):
    return pytest.raises(error, match=re.escape(text))


# What weighs guesses


@pytest.mark.parametrize("threshold", [0.95, "soft", FreeThreshold(), True], ids=str)
def test_softmatch_takes_no_other_threshold(threshold):
    with raises(TypeError, "threshold must be a SoftThreshold or None, got "):
        SoftMatch(*ENGINES, threshold=threshold)


@pytest.mark.parametrize("threshold", [0.95, SoftThreshold(), SoftThreshold], ids=str)
def test_freematch_takes_no_other_threshold(threshold):
    with raises(TypeError, "threshold must be a FreeThreshold or None, got "):
        FreeMatch(*ENGINES, threshold=threshold)


@pytest.mark.parametrize(
    "threshold", [True, "0.95", [0.95], DistributionAlignment(), FreeThreshold], ids=str
)
def test_a_threshold_is_a_number_or_an_object_that_weighs(threshold):
    text = "threshold must be a number in (0, 1], an object such as FreeThreshold(), or None, got "
    for method in (FixMatch, Consistency):
        with raises(TypeError, text):
            method(*ENGINES, threshold=threshold)


@pytest.mark.parametrize("uniform", [1, "yes", None])
def test_whether_guesses_are_aligned_is_a_switch(uniform):
    with raises(TypeError, f"uniform must be True or False, got {uniform!r}"):
        SoftThreshold(uniform=uniform)


@pytest.mark.parametrize("threshold", [SoftThreshold, FreeThreshold, lambda: FlexThreshold(9)])
def test_two_methods_do_not_share_a_threshold_that_remembers(threshold):
    threshold = threshold()
    FixMatch(*ENGINES, threshold=threshold)
    with raises(ValueError, "threshold must be a new object for every method, since it remembers"):
        FixMatch(*ENGINES, threshold=threshold)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_two_methods_do_not_share_an_alignment(momentum):
    alignment = DistributionAlignment(momentum=momentum)
    FixMatch(*ENGINES, alignment=alignment)
    with raises(ValueError, "alignment must be a new object for every method, since it remembers"):
        FixMatch(*ENGINES, alignment=alignment)


def test_two_methods_may_share_what_remembers_nothing():
    threshold = FixedThreshold(0.9)
    assert FixMatch(*ENGINES, threshold=threshold).threshold is threshold
    assert FixMatch(*ENGINES, threshold=threshold).threshold is threshold


# Engines


def weak_engines():
    return {
        "weak": WEAK,
        "another weak one": WeakAugment(4),
        "no operations": RandAugment(WEAK, num_ops=0, cutout=0),
        "never applied": RandAugment(WEAK, prob=0.0, cutout=0),
        "identity": RandAugment(WEAK, ops=["identity"], cutout=(0, 0)),
    }


@pytest.mark.parametrize("name", weak_engines())
@pytest.mark.parametrize("method", [FixMatch, SoftMatch, FreeMatch])
def test_a_strong_engine_that_is_weak_is_refused(method, name):
    with raises(ValueError, "strong must change images more than weak does, as RandAugment."):
        method(WEAK, weak_engines()[name], NUM_CLASSES)


def test_engines_the_wrong_way_round_and_one_for_both_are_refused():
    for weak, strong in ((STRONG, WEAK), (STRONG, STRONG)):
        with raises(ValueError, "strong must change images more than weak does, as RandAugment."):
            FixMatch(weak, strong, NUM_CLASSES)


def test_a_strong_engine_that_becomes_weak_is_refused():
    builder = FixMatch(*ENGINES)
    builder.strong = WeakAugment(2)
    with raises(ValueError, "strong must change images more than weak does, as RandAugment."):
        labelled_batch(builder)


@pytest.mark.parametrize(
    "strong",
    [RandAugment(WEAK, num_ops=0, cutout=2), RandAugment(WEAK, cutout=0)],
    ids=["cutout", "operations"],
)
def test_a_cutout_or_an_operation_alone_is_strong(strong):
    assert len(labelled_batch(FixMatch(WEAK, strong, NUM_CLASSES)).inputs) == B + M


@pytest.mark.parametrize("engine", ["strong", None, 3], ids=str)
@pytest.mark.parametrize("name", ["weak", "strong"])
def test_engines_are_engines_or_callables(name, engine):
    engines = {"weak": WEAK, "strong": STRONG, name: engine}
    with raises(TypeError, "must be an engine such as WeakAugment.cifar10()"):
        FixMatch(**engines, num_classes=NUM_CLASSES)


# Switches that are set later


@pytest.mark.parametrize(
    ("switch", "value", "text"),
    [
        ("temperature", 0, "temperature must be above 0 and finite, got 0"),
        ("temperature", -0.5, "temperature must be above 0 and finite, got -0.5"),
        ("label_smoothing", 1.0, "label_smoothing must be in [0, 1), got 1.0"),
        ("num_strong", 0, "num_strong must be in 1 .. "),
    ],
)
@pytest.mark.parametrize("order", ["first", "one pass"])
def test_a_switch_that_is_set_later_is_looked_at(switch, value, text, order):
    builder = FixMatch(*ENGINES)
    setattr(builder, switch, value)
    with raises(ValueError, text):
        labelled_batch(builder, order=order)


# The guess that the loss makes


def test_a_guess_that_failed_may_be_made_again():
    builder, twin = ADAPTIVE["FreeMatch"](), ADAPTIVE["FreeMatch"]()
    x, y, u, _ = data_of()
    batch = builder(x, y, u)
    with raises(ValueError, f"model must return logits [{M}, {NUM_CLASSES}] (num_classes = "):
        batch.complete(torch.zeros(B + 2 * M, NUM_CLASSES + 1))
    logits = net()(batch.inputs).detach()
    expected = labelled_batch(twin, order="one pass")
    assert torch.equal(batch.complete(logits)[1].weights, expected.weights)
    with raises(RuntimeError, "a guess must be made once, since thresholds and alignments take it"):
        batch.complete(logits)


# Numbers


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01, 95, NAN, INF])
def test_a_threshold_is_a_probability_above_zero(threshold):
    text = f"threshold must be in (0, 1], got {threshold}"
    for method in (FixMatch, UDA):
        with raises(ValueError, text):
            method(*ENGINES, threshold=threshold)
    with raises(ValueError, text):
        MeanTeacher(WEAK, NUM_CLASSES, threshold=threshold)


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01, NAN])
def test_flexmatchs_threshold_is_above_zero(threshold):
    with raises(ValueError, f"threshold must be in (0, 1], got {threshold}"):
        FlexMatch(*ENGINES, num_unlabelled=SAMPLES, threshold=threshold)


@pytest.mark.parametrize("threshold", [True, None, "0.95", FreeThreshold()], ids=str)
def test_flexmatchs_threshold_is_a_number(threshold):
    with raises(TypeError, "threshold must be a number, got "):
        FlexMatch(*ENGINES, num_unlabelled=SAMPLES, threshold=threshold)


@pytest.mark.parametrize("temperature", [0, 0.0, -1, NAN, INF])
def test_a_temperature_is_above_zero(temperature):
    text = f"temperature must be above 0 and finite, got {temperature}"
    for method in (FixMatch, UDA):
        with raises(ValueError, text):
            method(*ENGINES, temperature=temperature)
    with raises(ValueError, text):
        MeanTeacher(WEAK, NUM_CLASSES, temperature=temperature)


@pytest.mark.parametrize("num_strong", [0, -1, 2**16])
def test_there_is_a_strong_view(num_strong):
    with raises(ValueError, f"num_strong must be in 1 .. 65535, got {num_strong}"):
        FixMatch(*ENGINES, num_strong=num_strong)


@pytest.mark.parametrize("num_unlabelled", [0, -3, 2**31])
def test_there_is_an_unlabelled_image(num_unlabelled):
    text = f"num_unlabelled must be in 1 .. 2**31 - 1, got {num_unlabelled}"
    with raises(ValueError, text):
        FlexMatch(*ENGINES, num_unlabelled=num_unlabelled)


@pytest.mark.parametrize("value", [True, 1.5, "2", None])
def test_counts_are_integers(value):
    calls = {
        "num_strong": lambda: FixMatch(*ENGINES, num_strong=value),
        "num_unlabelled": lambda: FlexMatch(*ENGINES, num_unlabelled=value),
        "window": lambda: DistributionAlignment(value),
    }
    for name, call in calls.items():
        with raises(TypeError, f"{name} must be an integer, got "):
            call()


def test_flexmatch_has_classes_of_16_bits():
    text = "num_classes must be at most 32767 for a FlexThreshold, which remembers classes in 16 "
    with raises(ValueError, text):
        FlexMatch(WEAK, STRONG, 2**15, num_unlabelled=SAMPLES)


@pytest.mark.parametrize("momentum", [1, 1.5, -0.1, NAN, True, "0.9"], ids=str)
@pytest.mark.parametrize(
    "kind",
    [SoftThreshold, FreeThreshold, lambda momentum: DistributionAlignment(momentum=momentum)],
)
def test_a_momentum_is_below_one(kind, momentum):
    error = TypeError if isinstance(momentum, bool | str) else ValueError
    wanted = "a number" if error is TypeError else "in [0, 1)"
    with raises(error, f"momentum must be {wanted}, got "):
        kind(momentum)


@pytest.mark.parametrize("spread", [0, -1, NAN, 1e200])
def test_a_spread_is_above_zero(spread):
    with raises(ValueError, f"spread must be in (0, 1000], got {spread}"):
        SoftThreshold(spread=spread)


# Alignment


@pytest.mark.parametrize("window", [0, -1, 2**20])
def test_a_window_has_a_batch(window):
    with raises(ValueError, f"window must be in 1 .. 2**16, got {window}"):
        DistributionAlignment(window)


@pytest.mark.parametrize(
    ("target", "error", "text"),
    [
        (
            "class",
            ValueError,
            "target must be 'labels', 'uniform' or a list of shares, got 'class'",
        ),
        (None, TypeError, "target must be 'labels', 'uniform' or a list of shares, got None"),
        (torch.ones(4) / 4, TypeError, "or a list of shares, got a tensor [4] float32"),
        ((0.5, 0.6), ValueError, "target must sum to 1, got 1.1"),
        ((), ValueError, "target must sum to 1, got 0"),
        ((-0.1, 1.1), ValueError, "target[0] must be in [0, 1], got -0.1"),
        ((0.5, NAN), ValueError, "target[1] must be in [0, 1], got nan"),
        ((0.0, True), TypeError, "target[1] must be a number, got True of type bool"),
    ],
    ids=str,
)
def test_what_an_alignment_wants_is_shares_of_classes(target, error, text):
    with raises(error, text):
        DistributionAlignment(target=target)


def test_an_alignment_has_a_share_for_each_class():
    with raises(ValueError, "target must have a share for each of 4 classes, got 2"):
        FixMatch(*ENGINES, alignment=DistributionAlignment(target=(0.5, 0.5)))


@pytest.mark.parametrize("alignment", [DistributionAlignment, 128, "labels", True], ids=str)
def test_an_alignment_is_an_object(alignment):
    with raises(TypeError, "alignment must be a DistributionAlignment or None, got "):
        FixMatch(*ENGINES, alignment=alignment)


def test_softmatch_takes_no_alignment_beside_its_own():
    text = "alignment must be None for a threshold that aligns guesses itself, got Distribution"
    with raises(ValueError, text):
        SoftMatch(*ENGINES, alignment=DistributionAlignment())
    threshold = SoftThreshold(uniform=False)
    batch = labelled_batch(
        SoftMatch(*ENGINES, threshold=threshold, alignment=DistributionAlignment())
    )
    assert batch.weights.isfinite().all()


# Sample ids


BAD_IDS = {
    "too few": (
        torch.arange(M - 1),
        ValueError,
        "ids_u must be [6] int64, one per image, got [5]",
    ),
    "int32": (torch.arange(M).int(), ValueError, "one per image, got [6] torch.int32"),
    "floats": (torch.arange(float(M)), ValueError, "one per image, got [6] torch.float32"),
    "two axes": (torch.arange(M)[None], ValueError, "one per image, got [1, 6] torch.int64"),
    "numpy floats": (np.ones(M), ValueError, "one per image, got [6] torch.float64"),
    "a list": ([1] * M, TypeError, "ids_u must be a tensor or a numpy array of numbers, got [1, 1"),
    "a number": (M, TypeError, "ids_u must be a tensor or a numpy array of numbers, got 6 of type"),
    "beyond": (
        torch.arange(M) + SAMPLES - M + 1,
        ValueError,
        "ids_u must be in 0 .. num_unlabelled - 1 = 11, got 7 .. 12",
    ),
    "negative": (
        torch.arange(M) - 1,
        ValueError,
        "ids_u must be in 0 .. num_unlabelled - 1 = 11, got -1 .. 4",
    ),
    "none": (
        None,
        ValueError,
        "ids_u must be given where guesses are remembered by sample ids, got",
    ),
}


@pytest.mark.parametrize("name", BAD_IDS)
@pytest.mark.parametrize("call", ["forward", "from_views"])
def test_flexmatch_needs_an_id_of_its_table_for_each_image(call, name):
    ids, error, text = BAD_IDS[name]
    builder = ADAPTIVE["FlexMatch"]()
    x, y, u, _ = data_of()
    with raises(error, text):
        if call == "forward":
            builder(x, y, u, net(), ids_u=ids)
        else:
            builder.from_views(x / 255, y, u / 255, u / 255, net(), ids_u=ids)
    assert builder.threshold.classes.eq(-1).all()
    assert int(builder.step) == 0


# The loss


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"tsa": "exp"}, ValueError, "tsa_steps must be given with tsa, the length of the run in "),
        ({"tsa_steps": 9}, ValueError, "and only then, got tsa=None and tsa_steps=9"),
        (
            {"tsa": "cosine", "tsa_steps": 9},
            ValueError,
            "tsa must be one of ['linear', 'exp', 'log'], got 'cosine'",
        ),
        ({"tsa": "exp", "tsa_steps": 0}, ValueError, "tsa_steps must be in 1 .. 2**32 - 1, got 0"),
        ({"tsa": "exp", "tsa_steps": True}, TypeError, "tsa_steps must be an integer, got True"),
        ({"lambda_u": -1}, ValueError, "lambda_u must be at least 0 and finite, got -1"),
        ({"lambda_u": NAN}, ValueError, "lambda_u must be at least 0 and finite, got nan"),
        ({"lambda_fair": INF}, ValueError, "lambda_fair must be at least 0 and finite, got inf"),
        ({"lambda_fair": True}, TypeError, "lambda_fair must be a number, got True"),
        ({"loss_u": "l2"}, ValueError, "loss_u must be one of ['ce', 'kl', 'mse'], got 'l2'"),
        ({"rampup_steps": -1}, ValueError, "rampup_steps must be in 0 .. 2**32 - 1, got -1"),
        ({"impl": "cuda"}, ValueError, "impl must be one of ['auto', 'eager', 'numba', 'triton']"),
    ],
    ids=str,
)
def test_options_of_the_loss_are_looked_at(options, error, text):
    with raises(error, text):
        ConsistencyLoss(**options)


@pytest.mark.parametrize("order", ["first", "one pass"])
@pytest.mark.parametrize("method", ["SoftMatch", "FlexMatch", "window"])
def test_fairness_is_freematchs(method, order):
    x, y, u, ids_u = data_of()
    batch = ADAPTIVE[method]()(x, y, u, net() if order == "first" else None, ids_u=ids_u)
    text = "batch.fairness must be given for lambda_fair > 0, as FreeMatch gives it, got None"
    with raises(ValueError, text):
        ConsistencyLoss(lambda_fair=0.01)(net()(batch.inputs), batch)


def test_losses_take_batches_of_their_own_kind():
    x, y, u, _ = data_of()
    mixed, weighed = MixMatch(WEAK, NUM_CLASSES)(x, y, u, net()), labelled_batch(FixMatch(*ENGINES))
    with raises(TypeError, "batch must be a ConsistencyBatch, got a MixMatchBatch"):
        ConsistencyLoss()(net()(mixed.inputs), mixed)
    with raises(TypeError, "batch must be a MixMatchBatch, got a ConsistencyBatch"):
        MixMatchLoss()(net()(weighed.inputs), weighed)
    with raises(TypeError, "batch must be a ConsistencyBatch, got a tensor [9, 4] float32"):
        ConsistencyLoss()(weighed, net()(weighed.inputs))
    with raises(TypeError, "batch must be a ConsistencyBatch, got a tuple"):
        ConsistencyLoss()(net()(weighed.inputs), tuple(weighed))


LOGITS = {
    "no weak views": (torch.zeros(B + M, NUM_CLASSES), "logits must be [15, L], a row for each of"),
    "one less": (torch.zeros(B + 2 * M - 1, NUM_CLASSES), "batch.inputs, got [14, 4]"),
    "one axis": (torch.zeros(B + 2 * M), "batch.inputs, got [15]"),
    "three axes": (torch.zeros(B + 2 * M, NUM_CLASSES, 1), "batch.inputs, got [15, 4, 1]"),
    "a class more": (
        torch.zeros(B + 2 * M, NUM_CLASSES + 1),
        "model must return logits [6, 4] (num_classes = 4), got [6, 5]",
    ),
    "integers": (
        torch.zeros(B + 2 * M, NUM_CLASSES, dtype=torch.int64),
        "logits must be floating point, got int64",
    ),
    "elsewhere": (
        torch.zeros(B + 2 * M, NUM_CLASSES, device="meta"),
        "y must be on meta like logi",
    ),
}


@pytest.mark.parametrize("name", LOGITS)
def test_logits_of_one_pass_fit_the_batch(name):
    logits, text = LOGITS[name]
    x, y, u, _ = data_of()
    batch = FreeMatch(*ENGINES)(x, y, u)
    for call in (lambda: ConsistencyLoss()(logits, batch), lambda: batch.complete(logits)):
        with raises(ValueError, text):
            call()
    batch.complete(net()(batch.inputs))  # nothing was learnt of these


@pytest.mark.parametrize("logits", [None, [1.0], np.zeros((B + 2 * M, NUM_CLASSES))], ids=str)
def test_logits_are_a_tensor(logits):
    x, y, u, _ = data_of()
    batch = FixMatch(*ENGINES)(x, y, u)
    with raises(TypeError, "logits must be a tensor, got "):
        ConsistencyLoss()(logits, batch)
    with raises(TypeError, "logits must be a tensor, got "):
        batch.complete(logits)


def test_logits_of_a_labelled_batch_fit_it():
    batch = labelled_batch(FixMatch(*ENGINES))
    for rows, classes in ((15, 4), (9, 5)):
        text = f"logits must be [N, L] = [9, 4] like targets, got [{rows}, {classes}]"
        with raises(ValueError, text):
            ConsistencyLoss()(torch.zeros(rows, classes), batch)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_the_loss_is_called_once_where_guesses_are_learnt_of(method):
    x, y, u, ids_u = data_of()
    builder, criterion = ADAPTIVE[method](), ConsistencyLoss()
    batch = builder(x, y, u, ids_u=ids_u)
    logits = net()(batch.inputs)
    criterion(logits, batch)
    before = [buffer.clone() for part in builder.children() for buffer in part.buffers()]
    with raises(RuntimeError, "a guess must be made once, since thresholds and alignments take"):
        criterion(logits, batch)
    after = [buffer for part in builder.children() for buffer in part.buffers()]
    assert all(map(torch.equal, before, after))


def test_the_loss_may_be_called_again_where_nothing_is_learnt():
    x, y, u, _ = data_of()
    batch = FixMatch(*ENGINES)(x, y, u)
    logits, criterion = net()(batch.inputs), ConsistencyLoss()
    assert torch.equal(criterion(logits, batch).loss, criterion(logits, batch).loss)
    kept = labelled_batch(ADAPTIVE["FreeMatch"]())
    logits = net()(kept.inputs)
    assert torch.equal(criterion(logits, kept).loss, criterion(logits, kept).loss)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"num_labelled": -1}, ValueError, "batch.num_labelled must be at least 0, got -1"),
        ({"num_labelled": True}, TypeError, "batch.num_labelled must be an integer, got True"),
        ({"num_weak": 0}, ValueError, "batch.num_weak must be in 1 .. 15, got 0"),
        ({"num_weak": 99}, ValueError, "batch.num_weak must be in 1 .. 15, got 99"),
        ({"guess": None}, TypeError, "batch.weights must be a tensor, got None"),
        ({"guess": 3}, TypeError, "batch.guess must be what labels a batch, or None, got 3"),
        ({"step": 0}, TypeError, "batch.step must be a tensor, got 0"),
        ({"inputs": None}, TypeError, "batch.inputs must be a tensor, got None"),
    ],
    ids=str,
)
def test_parts_of_a_batch_are_looked_at(change, error, text):
    x, y, u, _ = data_of()
    batch = FixMatch(*ENGINES)(x, y, u)
    with raises(error, text):
        ConsistencyLoss()(net()(batch.inputs), batch._replace(**change))


# Labels, models and views


@pytest.mark.parametrize(
    ("y", "error", "text"),
    [
        (torch.arange(2), ValueError, "y must have a label per image of x, 3, got 2"),
        (
            torch.tensor([0, 4, 1]),
            ValueError,
            "y must be labels in 0 .. 3 (num_classes = 4), got 4",
        ),
        (torch.tensor([0, -1, 1]), ValueError, "labels in 0 .. 3 (num_classes = 4), got -1"),
        (
            torch.zeros(3),
            ValueError,
            "y must be integer labels [B] or soft labels [B, L] with L = 4",
        ),
        (torch.ones(3, 4), ValueError, "y must be soft labels that are not negative and sum to 1"),
        ([0, 1, 2], TypeError, "y must be a tensor or a numpy array of numbers, got [0, 1, 2]"),
    ],
    ids=str,
)
@pytest.mark.parametrize("order", ["first", "one pass"])
def test_labels_are_looked_at_before_the_guess(order, y, error, text):
    x, _, u, _ = data_of()
    model = net() if order == "first" else None
    builder = FreeMatch(*ENGINES)
    with raises(error, text):
        builder(x, y, u, model)
    with raises(error, text):
        builder.from_views(x / 255, y, u / 255, u / 255, model)
    assert builder.threshold.averages.eq(1 / NUM_CLASSES).all()


@pytest.mark.parametrize(
    ("model", "error", "text"),
    [
        (3, TypeError, "model must be an nn.Module or a function from images to logits, got 3"),
        (torch.nn.Linear, TypeError, "function from images to logits, got the class Linear"),
        (lambda images: net()(images)[:-1], ValueError, "model must return logits [6, 4] (num_cl"),
        (lambda images: net()(images)[:, :3], ValueError, "(num_classes = 4), got [6, 3]"),
        (
            lambda images: (net()(images),),
            TypeError,
            "model must return a tensor of logits, got tup",
        ),
    ],
    ids=str,
)
def test_models_give_logits_of_the_weak_views(model, error, text):
    x, y, u, _ = data_of()
    with raises(error, text):
        FixMatch(*ENGINES)(x, y, u, model)


def test_mixmatch_must_guess_first():
    x, y, u, _ = data_of()
    with raises(
        TypeError, "model must be an nn.Module or a function from images to logits, got No"
    ):
        MixMatch(WEAK, NUM_CLASSES)(x, y, u, None)


VIEWS = {
    "too few": ((M, M - 1), "strong must be [S, M, C, H, W] with S = 1 and [6, 3, 6, 6] like weak"),
    "two of one": ((M, 2, M), "like weak, got [2, 6, 3, 6, 6]"),
    "none": ((0, 0), "weak must hold at least one image, got [0, 3, 6, 6]"),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_made_elsewhere_fit_each_other(name):
    (count, *counts), text = VIEWS[name]
    x, y, _, _ = data_of()
    weak, strong = torch.zeros(count, 3, 6, 6), torch.zeros(*counts, 3, 6, 6)
    with raises(ValueError, text):
        FixMatch(*ENGINES).from_views(x / 255, y, weak, strong, net())


def test_views_made_elsewhere_are_finite_floats_of_one_dtype():
    x, y, u, _ = data_of()
    x, floats = x / 255, u / 255
    builder = FixMatch(*ENGINES)
    with raises(ValueError, "weak must be floating point, got torch.uint8"):
        builder.from_views(x, y, u, floats)
    with raises(
        ValueError, "x, weak and strong must be of one dtype, got torch.float32, torch.flo"
    ):
        builder.from_views(x, y, floats, floats.half())
    with raises(ValueError, "strong must be finite, got values in nan .. nan"):
        builder.from_views(x, y, floats, floats * NAN)


# The operations


def weighting_calls():
    y, logits = torch.tensor([0, 1]), torch.zeros(3, 4)
    targets, weights, rows = torch.full((5, 4), 0.25), torch.ones(5), torch.zeros(5, 4)

    def targets_of(**fields):
        return functional.consistency_targets(y, logits, Weighting(**fields))

    def loss_of(weights=weights, **options):
        return functional.consistency_loss(rows, targets, weights, 2, 1.0, **options)

    def fairness_of(fairness):
        return functional.fairness_loss(rows, weights, fairness)

    return [
        (lambda: functional.consistency_targets(y, logits, None), "weighting must be a Weighting"),
        (lambda: targets_of(rule="hard"), "rule must be one of ['fixed', 'soft', 'free', 'flex']"),
        (lambda: targets_of(rule="free"), "state must be a tensor, got None"),
        (
            lambda: targets_of(rule="soft", state=torch.ones(3)),
            "state must be [14] for 'soft', got",
        ),
        (
            lambda: targets_of(rule="flex", state=torch.ones(5)),
            "state must be int32 for 'flex', got float32",
        ),
        (lambda: targets_of(ratio=torch.ones(3)), "ratio must be [4] for 'fixed', got [3]"),
        (
            lambda: targets_of(ratio=torch.ones(4).double()),
            "ratio must be float32 for 'fixed', got",
        ),
        (lambda: targets_of(threshold=1.5), "threshold must be in [0, 1], got 1.5"),
        (lambda: targets_of(temperature=-1.0), "temperature must be at least 0 and finite, got -1"),
        (lambda: loss_of(weights[:2]), "weights must be [N] = [5] like logits, got [2]"),
        (lambda: loss_of(weights.int()), "weights must be floating point, got int32"),
        (lambda: loss_of(num_u=4), "num_u must be in 0 .. 3, got 4"),
        (lambda: loss_of(share_v=-1.0), "share_v must be at least 0 and finite, got -1"),
        (lambda: loss_of(tsa=0.5), "tsa must be a tensor, got 0.5"),
        (
            lambda: loss_of(tsa=torch.ones(2)),
            "tsa must be a 0-d floating point tensor, got a tensor",
        ),
        (lambda: loss_of(tsa=torch.tensor(1)), "floating point tensor, got a tensor [] int64"),
        (
            lambda: fairness_of(torch.ones(3)),
            "fairness must be [L] like logits [N, L], got [3] and",
        ),
        (lambda: fairness_of(torch.ones(4).int()), "fairness must be floating point, got int32"),
        (lambda: fairness_of(torch.ones(4, device="meta")), "fairness must be on cpu like logits"),
    ]


@pytest.mark.parametrize("number", range(len(weighting_calls())))
def test_operations_look_at_their_arguments(number):
    call, text = weighting_calls()[number]
    with pytest.raises((TypeError, ValueError), match=re.escape(text)):
        call()


def test_targets_of_no_guesses_are_the_labels():
    y, logits = torch.tensor([0, 1]), torch.zeros(0, 4)
    targets, weights = functional.consistency_targets(y, logits, Weighting(), num_strong=2)
    assert torch.equal(targets, torch.eye(4)[:2])
    assert torch.equal(weights, torch.ones(2))
