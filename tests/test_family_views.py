"""Weak and strong views of the methods that weigh guesses: who makes them, from which draws."""

import pytest
import torch

from gpu_mixmatch import FixMatch, MeanTeacher, RandAugment, WeakAugment
from tests.family import NUM_CLASSES, B, M, data_of


class NoisyWeak(WeakAugment):
    """A class of the user's, whose views are not those of its policy."""

    def build(self, *args, **options):
        return super().build(*args, **options) + 1


class NoisyStrong(RandAugment):
    def build(self, *args, **options):
        return super().build(*args, **options) - 1


def rows_of(builder):
    x, y, u, ids_u = data_of()
    inputs = builder(x, y, u, ids_u=ids_u).inputs
    return inputs.split([B, builder.num_strong * M, M])


@pytest.mark.parametrize("noisy", ["weak", "strong", "both"])
def test_what_a_class_of_the_users_adds_to_its_views_stays(noisy):
    still = {"padding": 0, "flip": 0.0}
    weak = WeakAugment(**still) if noisy == "strong" else NoisyWeak(**still)
    strong = (RandAugment if noisy == "weak" else NoisyStrong)(WeakAugment(**still), 0, cutout=2)
    plain = rows_of(
        FixMatch(WeakAugment(**still), RandAugment(WeakAugment(**still), 0, cutout=2), NUM_CLASSES)
    )
    x, strong_u, weak_u = rows_of(FixMatch(weak, strong, NUM_CLASSES))
    shift = 0 if noisy == "strong" else 1
    assert torch.equal(x, plain[0] + shift)
    assert torch.equal(weak_u, plain[2] + shift)
    # of a cutout at another place the least and the greatest value are as likely the same
    moved = strong_u.amax(dim=(1, 2, 3)) - plain[1].amax(dim=(1, 2, 3))
    torch.testing.assert_close(moved, torch.full((M,), -float(noisy != "weak")), rtol=0, atol=0.1)


def test_both_views_of_a_class_of_the_users_differ():
    class Shifted(WeakAugment):
        def build(self, *args, **options):
            return super().build(*args, **options) + 1

    x, strong, weak = rows_of(MeanTeacher(Shifted(2), NUM_CLASSES))
    assert min(part.amin() for part in (x, strong, weak)) >= 0
    assert (strong != weak).flatten(1).any(dim=1).all()
