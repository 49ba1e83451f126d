"""Bad input of the methods that weigh guesses: errors that name the argument and what came."""

import re

import pytest
import torch

from gpu_mixmatch import (
    Consistency,
    DistributionAlignment,
    FixedThreshold,
    FixMatch,
    FlexThreshold,
    FreeMatch,
    FreeThreshold,
    RandAugment,
    SoftMatch,
    SoftThreshold,
    WeakAugment,
)
from tests.family import ADAPTIVE, ENGINES, NUM_CLASSES, B, M, data_of, labelled_batch, net

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
    "threshold", [True, "0.95", None, [0.95], DistributionAlignment(), FreeThreshold], ids=str
)
def test_a_threshold_is_a_number_or_an_object_that_weighs(threshold):
    text = "threshold must be a number in [0, 1] or an object such as FreeThreshold(), got "
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
    "strong", [RandAugment(WEAK, num_ops=0, cutout=2), RandAugment(WEAK, cutout=0)], ids=str
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
