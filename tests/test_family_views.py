"""Weak and strong views of the methods that weigh guesses: who makes them, from which draws."""

import pytest
import torch

from gpu_mixmatch import FixMatch, MeanTeacher, RandAugment, WeakAugment
from tests.family import NUM_CLASSES, B, M, data_of, net


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


# Two engines and one


def engines(**changed):
    weak = WeakAugment(2, mean=(0.4, 0.5, 0.6), **changed)
    return weak, RandAugment.fixmatch(WeakAugment(2, mean=(0.4, 0.5, 0.6)), cutout=3)


@pytest.mark.parametrize("num_strong", [1, 3])
@pytest.mark.parametrize("with_ids", [True, False])
def test_two_engines_make_the_views_that_one_makes(num_strong, with_ids):
    options = {"num_strong": num_strong, "seed": 5}
    joint = FixMatch(*engines(), NUM_CLASSES, **options)
    apart = FixMatch(*engines(impl="eager"), NUM_CLASSES, **options)
    assert joint._views.joint is joint.strong
    assert apart._views.joint is None
    for step in range(3):
        x, y, u, ids_u = data_of(step)
        ids = {"ids_x": torch.tensor([9, 2**40, 0]), "ids_u": ids_u} if with_ids else {}
        assert torch.equal(joint(x, y, u, **ids).inputs, apart(x, y, u, **ids).inputs)


def test_one_engine_for_all_makes_what_two_of_it_make():
    one = MeanTeacher(WeakAugment(2), NUM_CLASSES, num_strong=2)
    assert one._views.joint is one.weak
    x, y, u, ids_u = data_of()
    expected = [
        one.weak.apply(x, one.weak.draw(0, 0, 3, 0)),
        one.weak.apply(u, one.weak.draw(0, 0, ids_u, (1, 2, 3))),
    ]
    assert torch.equal(one(x, y, u, ids_u=ids_u).inputs, torch.cat(expected))


@pytest.mark.parametrize(
    "changed",
    [
        {"weak": WeakAugment(1)},
        {"weak": WeakAugment(2, mean=0.4)},
        {"weak": WeakAugment(2, flip=0.0)},
        {"weak": WeakAugment(2, padding_mode="edge")},
        {"weak": WeakAugment(2, layout="NCHW")},
    ],
    ids=str,
)
def test_engines_of_other_weak_views_make_views_by_themselves(changed):
    strong = RandAugment.fixmatch(WeakAugment(2), cutout=3)
    builder = FixMatch(changed["weak"], strong, NUM_CLASSES)
    assert builder._views.joint is None
    x, y, u, ids_u = data_of()
    first, strong_u, weak_u = builder(x, y, u, ids_u=ids_u).inputs.split([B, M, M])
    weak = changed["weak"]
    assert torch.equal(first, weak.apply(x, weak.draw(0, 0, 3, 0)))
    assert torch.equal(strong_u, strong.apply(u, strong.draw(0, 0, ids_u, 1)))
    assert torch.equal(weak_u, weak.apply(u, weak.draw(0, 0, ids_u, 2)))


def test_engines_whose_views_do_not_fit_are_refused():
    x, y, u, _ = data_of()
    strong = RandAugment.fixmatch(WeakAugment(1), cutout=2)
    for weak, shown in (
        (WeakAugment(1, dtype=torch.float16), r"\[3, 6, 6\] torch.float16 and \[3, 6, 6\] torch"),
        (WeakAugment(1, size=4), r"\[3, 4, 4\] torch.float32 and \[3, 6, 6\] torch.float32"),
    ):
        text = "weak and strong must make views of one size and dtype, got " + shown
        with pytest.raises(ValueError, match=text):
            FixMatch(weak, strong, NUM_CLASSES)(x, y, u)


# Ids


@pytest.mark.parametrize("impl", ["auto", "eager"])
def test_the_views_of_a_sample_do_not_depend_on_the_batch_it_is_in(impl):
    weak = WeakAugment(2, impl=impl)
    x, y, u, _ = data_of()
    ids_x, ids_u = torch.tensor([4, 1, 2**41]), torch.tensor([3, 2**40, 0, 8, 5, 1])

    def rows(order_x, order_u):
        strong = RandAugment.fixmatch(WeakAugment(2), cutout=3)
        builder = FixMatch(weak, strong, NUM_CLASSES, num_strong=2, seed=3)
        ids = {"ids_x": ids_x[order_x], "ids_u": ids_u[order_u]}
        inputs = builder(x[order_x], y[order_x], u[order_u], **ids).inputs
        count = len(order_u)
        return inputs.split([len(order_x), count, count, count])

    whole = rows(torch.arange(B), torch.arange(M))
    order_x, order_u = torch.tensor([2, 0]), torch.tensor([5, 1, 3])
    for part, all_rows in zip(rows(order_x, order_u), whole, strict=True):
        order = order_x if len(all_rows) == B else order_u
        assert torch.equal(part, all_rows[order])
    first, second, last = whole[1:]
    assert not torch.equal(first, second)
    assert not torch.equal(second, last)


def test_strong_views_are_moved_by_draws_of_their_own():
    # USB and the reference draw the weak part anew; a port used one crop for both
    weak, strong = WeakAugment(2), RandAugment(WeakAugment(2), 0, cutout=1)
    x, y, u, ids_u = data_of()
    _, strong_u, weak_u = FixMatch(weak, strong, NUM_CLASSES)(x, y, u, ids_u=ids_u).inputs.split(
        [B, M, M]
    )
    changed = (strong_u != weak_u).flatten(1).sum(dim=1)
    assert (changed > 3).sum() >= M - 1  # more than a cutout of one pixel


def test_a_batch_of_reused_buffers_is_overwritten_two_calls_later_and_autograd_is_told():
    builder = FixMatch(*engines(), NUM_CLASSES, reuse_buffers=True)
    twin = FixMatch(*engines(), NUM_CLASSES)
    x, y, u, _ = data_of()
    scale = torch.ones((), requires_grad=True)
    first = builder(x, y, u, net())
    lost = (first.inputs * scale).sum()
    kept = first.inputs.clone()
    second = builder(x, y, u, net())
    assert torch.equal(first.inputs, kept)
    assert second.inputs.data_ptr() != first.inputs.data_ptr()
    third = builder(x, y, u, net())
    assert third.inputs.data_ptr() == first.inputs.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        lost.backward()
    expected = [twin(x, y, u, net()).inputs for _ in range(3)]
    assert torch.equal(kept, expected[0])
    assert torch.equal(second.inputs, expected[1])
    assert torch.equal(third.inputs, expected[2])
