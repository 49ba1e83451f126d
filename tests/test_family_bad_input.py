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
    SoftMatch,
    SoftThreshold,
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
