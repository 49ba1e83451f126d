"""ReMixMatch: its batches and its loss against the oracle, and mistakes that ports make."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from gpu_mixmatch import (
    DistributionAlignment,
    RandAugment,
    ReMixMatch,
    ReMixMatchBatch,
    ReMixMatchLoss,
    WeakAugment,
    interleaved_forward,
    sampling,
)
from gpu_mixmatch.types import DrawPlan, MixUpParams
from tests import oracle, oracle_mixing
from tests.factories import ConstantNet, LinearNet, random_data, random_images
from tests.params import oracle_rows

NUM_CLASSES = 5
SHAPE = (3, 8, 8)
NUM_X, NUM_U = 3, 5
# Largest absolute error against float64: guesses are of sums of 192 products, sharpened by 1/T = 2.
ERROR = 3e-5


class PairNet(nn.Module):
    """Logits of classes and of quarter turns."""

    def __init__(self):
        super().__init__()
        self.classes = LinearNet(NUM_CLASSES, SHAPE, seed=1)
        self.turns = LinearNet(4, SHAPE, seed=2)

    def forward(self, images):
        return self.classes(images), self.turns(images)


class WritingNet(LinearNet):
    """Overwrites what it is given."""

    def forward(self, images):
        logits = super().forward(images)
        images.zero_()
        return logits


def data_of(shape=SHAPE):
    return random_data(NUM_X, NUM_U, shape, num_classes=NUM_CLASSES)


def weak_engine(**fields):
    return WeakAugment(**{"padding": 2, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), **fields})


def builder_of(strong=None, **switches):
    weak = weak_engine()
    strong = weak if strong is None else strong
    return ReMixMatch(weak, strong, NUM_CLASSES, **{"num_strong": 1, "seed": 7, **switches})


def drawn(builder, step, num_x=NUM_X, num_u=NUM_U):
    """What the builder is to draw: parameters of all views, and MixUp's."""
    plan = DrawPlan(
        builder.num_strong + 1,
        builder.strong.policy,
        builder.alpha,
        builder.lam,
        "all",
        weak_views=int(builder.strong is not builder.weak),
    )
    return sampling.draw_batch(builder.seed, step, num_x, num_u, plan)


def oracle_views(builder, x, u, draws):
    """Views by the oracle, where there is one engine; else those that the engine makes alone."""
    if builder.strong is builder.weak:
        rows = torch.cat([x, u.repeat(builder.num_strong + 1, 1, 1, 1)])
        return oracle_rows(rows, draws, builder.weak).numpy()
    return builder.strong.apply((x, u), draws).double().numpy()


def split_views(views, num_strong, num_x=NUM_X):
    rest = views[num_x:].reshape(num_strong + 1, -1, *views.shape[1:])
    return views[:num_x], rest[:-1], rest[-1]


def logits_of(model, images):
    return model(torch.from_numpy(images).float()).detach().double().numpy()


def assert_near(actual, expected, error=ERROR):
    expected = torch.from_numpy(np.asarray(expected, dtype=np.float64))
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=error)


# Batches


@pytest.mark.usefixtures("each_cpu_impl")
@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("num_strong", [1, 2])
@pytest.mark.parametrize("kind", ["weak", "strong"])
def test_batches_of_several_steps_equal_the_oracle(kind, num_strong, rotation):
    x, y, u = data_of()
    strong = RandAugment(weak_engine(), cutout=3) if kind == "strong" else None
    window = DistributionAlignment(window=3)
    builder = builder_of(strong, num_strong=num_strong, rotation=rotation, alignment=window)
    model = LinearNet(NUM_CLASSES, SHAPE)
    labels = one_hot(y, NUM_CLASSES).double().numpy()
    state = oracle_mixing.AlignedGuesses(NUM_CLASSES, window=3)
    for step in range(5):  # past the window's length
        batch = builder(x, y, u, model)
        draws, mixup = drawn(builder, step)
        views = split_views(oracle_views(builder, x, u, draws), num_strong)
        guesses = state.guess(logits_of(model, views[2]), labels, 0.5)
        lam, index = mixup.lam.double().numpy(), mixup.index.numpy()
        expected = oracle_mixing.remixmatch(views[0], labels, *views[1:], guesses, lam, index)
        mixed = NUM_X + (num_strong + 1) * NUM_U
        assert batch.num_labelled == NUM_X
        assert batch.num_mixed == mixed
        assert batch.step == step
        assert_near(batch.inputs[:mixed], expected["mixed"])
        assert_near(batch.inputs[mixed : mixed + NUM_U], expected["first"])
        assert_near(batch.targets[:mixed], expected["mixed_targets"])
        assert_near(batch.targets[mixed:], expected["first_targets"])
        assert batch.weights.tolist() == [1] * (mixed + NUM_U)
        if rotation:
            assert batch.rotations.tolist() == expected["rotations"]
            assert_near(batch.inputs[mixed + NUM_U :], expected["turned"])
        else:
            assert batch.rotations is None
            assert len(batch.inputs) == mixed + NUM_U
    assert_near(window.labels, state.labels)
    assert_near(window.guesses.mean(dim=0), np.mean(state.means, axis=0))


def test_x_and_the_first_view_are_strong_and_the_last_view_of_u_is_weak():
    x, y, u = data_of()
    weak = weak_engine(padding=0, flip=0.0, mean=0.0, std=1.0)
    black = RandAugment(weak, 1, {"brightness": [0.0]}, prob=1.0, cutout=0)
    builder = ReMixMatch(weak, black, NUM_CLASSES, num_strong=2)
    assert builder._views.joint is not None
    seen = []
    images, _ = builder._build(x, u, (NUM_X, NUM_U), None)
    builder(x, y, u, lambda images: seen.append(images) or torch.zeros(NUM_U, NUM_CLASSES))
    torch.testing.assert_close(seen[0], u / 255)
    assert not images[:-NUM_U].any()


def test_engines_that_draw_for_themselves_give_as_many_rows_mixed_by_the_same_draws():
    x, y, u = data_of()
    halved = ReMixMatch(lambda images: images, lambda images: images / 2, NUM_CLASSES, num_strong=2)
    batch = halved(x, y, u, LinearNet(NUM_CLASSES, SHAPE))
    plan = DrawPlan(3, None, mix="all")
    _, mixup = sampling.draw_batch(0, 0, NUM_X, NUM_U, plan)
    rows = torch.cat([x / 2, u / 2, u / 2, u]) / 255
    lam = mixup.lam[:, None, None, None]
    torch.testing.assert_close(
        batch.mixed.inputs, lam * rows + (1 - lam) * rows[mixup.index], rtol=0, atol=1e-6
    )
    torch.testing.assert_close(batch.inputs[batch.num_mixed :], u / 510)


def test_what_the_model_writes_into_its_views_is_in_no_batch():
    x, y, u = data_of()
    batches = [builder_of()(x, y, u, net(NUM_CLASSES, SHAPE)) for net in (LinearNet, WritingNet)]
    assert torch.equal(batches[0].inputs, batches[1].inputs)
    assert torch.equal(batches[0].targets, batches[1].targets)


@pytest.mark.parametrize("channels_last", [False, True])
def test_reused_buffers_hold_the_same_batches_in_the_same_layout(channels_last):
    x, y, u = data_of()
    weak = weak_engine(channels_last=channels_last)
    fresh, reusing = (
        ReMixMatch(weak, weak, NUM_CLASSES, num_strong=1, rotation=True, reuse_buffers=reuse)
        for reuse in (False, True)
    )
    model = LinearNet(NUM_CLASSES, SHAPE)
    places = set()
    for _ in range(4):
        one, other = fresh(x, y, u, model), reusing(x, y, u, model)
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.targets, other.targets)
        assert one.inputs.stride() == other.inputs.stride()
        assert one.inputs[:1].is_contiguous(memory_format=torch.channels_last) == channels_last
        places.add(other.inputs.data_ptr())
    assert len(places) == 2


def test_a_run_that_is_resumed_makes_the_same_batches():
    x, y, u = data_of()
    model = LinearNet(NUM_CLASSES, SHAPE)
    whole, first, second = (builder_of(num_strong=2) for _ in range(3))
    wanted = [whole(x, y, u, model) for _ in range(4)][2:]
    for _ in range(2):
        first(x, y, u, model)
    second.load_state_dict(first.state_dict())
    for batch in wanted:
        resumed = second(x, y, u, model)
        assert torch.equal(batch.inputs, resumed.inputs)
        assert torch.equal(batch.targets, resumed.targets)


# Mistakes of ports


def test_guesses_are_aligned_before_they_are_sharpened():
    x, y, u = data_of()
    builder = builder_of(alignment=DistributionAlignment(window=1), alpha=0.05)
    model = ConstantNet([2.0, 0.0, 0.0, 0.0, 0.0])
    probs = oracle.softmax([2.0, 0, 0, 0, 0])
    builder(x, y, u, model)  # the window now holds these guesses alone
    labels = 0.999 / NUM_CLASSES + 0.001 * one_hot(y, NUM_CLASSES).double().mean(dim=0).numpy()
    aligned = probs * (1e-6 + labels) / (1e-6 + probs)
    aligned /= aligned.sum()
    plain = builder(x, y, u, model).targets[-1]
    assert_near(plain, oracle.sharpen(aligned, 0.5))  # nearly uniform
    sharpened = oracle.sharpen(probs, 0.5) * (1e-6 + labels) / (1e-6 + probs)
    assert np.abs(sharpened / sharpened.sum() - plain.numpy()).max() > 0.2


def test_alignment_is_by_a_window_that_is_read_before_the_batch_is_in_it():
    x, y, u = data_of()
    builder = builder_of()
    assert builder.alignment.window == 128
    model = ConstantNet([3.0, 0.0, 0.0, 0.0, 0.0])
    probs = oracle.softmax([3.0, 0, 0, 0, 0])
    # of the first batch both sides are uniform: nothing is aligned
    assert_near(builder(x, y, u, model).targets[-1], oracle.sharpen(probs, 0.5))
    # one of 128 is this guess, in float64 exactly; an average with 0.999 would have 0.001 of it
    builder(x, y, u, model)
    uniform = np.full(NUM_CLASSES, 1 / NUM_CLASSES)
    assert_near(builder.alignment.guesses.mean(dim=0), (126 * uniform + 2 * probs) / 128, 1e-7)


def test_lambda_is_of_each_row_and_favours_it():
    x, y, u = data_of()
    lam = builder_of()(x, y, u, LinearNet(NUM_CLASSES, SHAPE)).params.lam
    assert len(lam.unique()) == len(lam)
    assert lam.min() >= 0.5
    lam = builder_of(lam="batch")(x, y, u, LinearNet(NUM_CLASSES, SHAPE)).params.lam
    assert len(lam.unique()) == 1


def test_partners_come_from_x_and_all_views_alike():
    x, y, u = data_of()
    builder = builder_of(num_strong=2)
    met = set()
    for _ in range(60):
        index = builder(x, y, u, LinearNet(NUM_CLASSES, SHAPE)).params.index
        assert sorted(index.tolist()) == list(range(len(index)))
        met |= {(row >= NUM_X, partner >= NUM_X) for row, partner in enumerate(index.tolist())}
    assert met == {(False, False), (False, True), (True, False), (True, True)}


@pytest.mark.parametrize("count", [1, 2, 4, 7, 8])
def test_a_quarter_of_the_rows_is_turned_by_each_angle_by_position(count):
    x, y, _ = data_of()
    u = random_images(count, SHAPE, seed=3)
    batch = builder_of(rotation=True)(x, y, u, LinearNet(NUM_CLASSES, SHAPE))
    turns = batch.rotations.tolist()
    assert turns == sorted(turns)
    assert max(turns.count(turn) for turn in range(4)) <= -(-count // 4)
    first, turned = batch.inputs[batch.num_mixed :].chunk(2)
    for plain, other, turn in zip(first, turned, turns, strict=True):
        assert_near(other, oracle_mixing.rotate(plain.numpy(), turn), 0)


def test_a_quarter_turn_brings_the_right_edge_to_the_top():
    image = np.arange(4.0).reshape(1, 2, 2)
    assert oracle_mixing.rotate(image, 1).tolist() == [[[1, 3], [0, 2]]]


def test_no_gradient_flows_through_targets_or_the_guess():
    x, y, u = data_of()
    model = LinearNet(NUM_CLASSES, SHAPE)
    batch = builder_of()(x, y, u, model)
    assert not batch.targets.requires_grad
    assert not batch.inputs.requires_grad
    targets = batch.targets.clone().requires_grad_()
    loss = ReMixMatchLoss(rampup_steps=0)(model(batch.inputs), batch._replace(targets=targets)).loss
    loss.backward()
    assert targets.grad is None
    assert model.dense.weight.grad.abs().sum() > 0


# The loss


def loss_batch(num_u=6, rotation=True, step=3, seed=0):
    """A batch of random targets, and random float64 outputs of a model."""
    generator = torch.Generator().manual_seed(seed)
    num_mixed = NUM_X + 2 * num_u
    rows = num_mixed + num_u
    total = rows + num_u * rotation
    targets = torch.randn(rows, NUM_CLASSES, generator=generator).softmax(dim=1)
    logits = 2 * torch.randn(total, NUM_CLASSES, generator=generator, dtype=torch.float64)
    turns = 2 * torch.randn(total, 4, generator=generator, dtype=torch.float64)
    batch = ReMixMatchBatch(
        *(torch.zeros(total, 1, 2, 2), targets, torch.ones(rows), NUM_X, num_mixed),
        *(torch.tensor(step), MixUpParams(torch.ones(num_mixed), torch.arange(num_mixed))),
        torch.arange(num_u) * 4 // num_u if rotation else None,
    )
    return batch, logits, turns


def oracle_loss(batch, logits, turns, ramp, weights):
    rows = len(batch.targets)
    return oracle_mixing.remixmatch_loss(
        *(logits[:rows].numpy(), batch.targets.double().numpy(), NUM_X, batch.num_mixed, ramp),
        weights,
        turns[rows:].numpy() if weights[2] else None,
        batch.rotations if weights[2] else (),
    )


WEIGHTS = [(1.5, 0.5, 0.5), (1.5, 0.5, 0.0), (0.0, 0.5, 2.0), (1.0, 0.0, 0.0)]


@pytest.mark.parametrize("rampup_steps", [0, 12])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_loss_and_its_parts_equal_the_oracle(weights, rampup_steps):
    batch, logits, turns = loss_batch()
    criterion = ReMixMatchLoss(*weights, rampup_steps=rampup_steps, impl="eager")
    output = criterion((logits, turns), batch)
    ramp = 0.25 if rampup_steps else 1.0
    expected = oracle_loss(batch, logits, turns, ramp, weights)
    for value, wanted in zip(output[:5], expected, strict=True):
        assert value.item() == pytest.approx(wanted, rel=1e-6)
    assert output.weight_u.item() == pytest.approx(ramp * weights[0])
    assert output.weight_kl.item() == pytest.approx(ramp * weights[1])


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_gradient_equals_differences_of_the_oracle(weights):
    batch, logits, turns = loss_batch(num_u=2)
    logits.requires_grad_()
    turns.requires_grad_()
    ReMixMatchLoss(*weights, rampup_steps=6, impl="eager")((logits, turns), batch).loss.backward()
    step = 1e-5
    for tensor in (logits, turns) if weights[2] else (logits,):
        found = torch.zeros_like(tensor)
        for place in range(tensor.numel()):
            ends = []
            for sign in (1, -1):
                moved = [part.detach().clone() for part in (logits, turns)]
                moved[tensor is turns].view(-1)[place] += sign * step
                ends.append(oracle_loss(batch, *moved, 0.5, weights)[0])
            found.view(-1)[place] = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(tensor.grad, found, rtol=1e-4, atol=1e-7)


def test_turned_rows_have_no_part_in_the_loss_of_classes():
    batch, logits, turns = loss_batch()
    other = logits.clone()
    other[len(batch.targets) :] += 5
    criterion = ReMixMatchLoss(lambda_rot=1.0)
    assert criterion((logits, turns), batch).loss == criterion((other, turns), batch).loss


def test_turns_count_from_the_first_step_and_the_rest_does_not():
    batch, logits, turns = loss_batch(step=0)
    output = ReMixMatchLoss(lambda_rot=0.5)((logits, turns), batch)
    assert output.loss.item() == pytest.approx((output.loss_x + 0.5 * output.loss_rot).item())
    assert output.loss_rot > 0
    assert output.weight_u == output.weight_kl == 0


def test_a_pair_goes_from_the_model_to_the_loss_in_one_pass_and_interleaved():
    x, y, u = data_of()
    builder = builder_of(num_strong=2, rotation=True)
    model = PairNet()
    batch = builder(x, y, u, model)
    criterion = ReMixMatchLoss(lambda_rot=0.5, rampup_steps=0)
    loss = criterion(model(batch.inputs), batch).loss
    other = criterion(interleaved_forward(model, batch, 4, running_stats="last"), batch).loss
    torch.testing.assert_close(loss, other)
    loss.backward()
    assert model.turns.dense.weight.grad.abs().sum() > 0


def test_what_takes_a_pair_out_of_outputs_serves_the_guess_and_the_loss():
    class DictNet(PairNet):
        def forward(self, images):
            return {"both": super().forward(images)}

    x, y, u = data_of()
    builder = builder_of(rotation=True, logits_getter=lambda output: output["both"])
    model = DictNet()
    batch = builder(x, y, u, model)
    assert torch.equal(batch.targets, builder_of(rotation=True)(x, y, u, PairNet()).targets)
    pair = builder.for_loss(model(batch.inputs))
    assert ReMixMatchLoss(lambda_rot=0.5)(pair, batch).loss_rot > 0
    plain = builder_of(logits_getter=lambda output: output["both"][0])
    assert plain.for_loss(model(batch.inputs)).shape == pair[0].shape


# Bad input


def test_a_method_that_guesses_first_says_that_it_has_nothing_to_guess_with():
    x, y, u = data_of()
    with pytest.raises(TypeError, match="model must be given, since ReMixMatch guesses before"):
        builder_of()(x, y, u)


def test_a_teacher_guesses_in_place_of_the_model():
    x, y, u = data_of()
    teacher = LinearNet(NUM_CLASSES, SHAPE, seed=3)
    taught = builder_of(teacher=teacher)(x, y, u)
    assert torch.equal(taught.targets, builder_of()(x, y, u, teacher).targets)


def test_turned_rows_need_a_model_with_logits_of_them():
    batch, logits, turns = loss_batch()
    criterion = ReMixMatchLoss(lambda_rot=0.5)
    with pytest.raises(TypeError, match=r"must return a pair for lambda_rot > 0.*got logits alone"):
        criterion(logits, batch)
    with pytest.raises(ValueError, match=r"rotation logits must be \[27, 4\].* got \[27, 3\]"):
        criterion((logits, turns[:, :3]), batch)
    with pytest.raises(ValueError, match=r"batch.rotations must be given for lambda_rot > 0"):
        criterion((logits[:21], turns[:21]), loss_batch(rotation=False)[0])
    with pytest.raises(ValueError, match=r"logits must be \[27, L\].*got \[21, 5\]"):
        criterion(logits[:21], batch)


def test_rotation_needs_square_views():
    x, y, u = data_of((3, 8, 10))
    builder = builder_of(rotation=True)
    with pytest.raises(ValueError, match="rotation must be off where views are not"):
        builder(x, y, u, LinearNet(NUM_CLASSES, (3, 8, 10)))


@pytest.mark.parametrize(
    ("switches", "error"),
    [
        ({"alignment": "momentum"}, "alignment must be"),
        ({"alpha": 0.0}, "alpha must be"),
        ({"lam": "view"}, "lam must be"),
        ({"num_strong": 0}, "num_strong must be"),
        ({"temperature": 0.0}, "temperature must be"),
    ],
    ids=str,
)
def test_a_switch_out_of_its_range_is_named(switches, error):
    with pytest.raises(ValueError, match=error):
        builder_of(**switches)


def test_a_batch_with_a_bad_row_says_so():
    x, y, u = data_of()
    batch = builder_of()(x, y, u, LinearNet(NUM_CLASSES, SHAPE))
    batch.check()
    with pytest.raises(ValueError, match="targets must be finite and sum to 1"):
        batch._replace(targets=batch.targets * torch.nan).check()
