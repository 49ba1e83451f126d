"""Bad input of the methods that weigh guesses: errors that name the argument and what came."""

import re

import pytest

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

NUM_CLASSES = 5
WEAK = WeakAugment(1)
STRONG = RandAugment.fixmatch(WEAK, cutout=2)
ENGINES = WEAK, STRONG, NUM_CLASSES


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
