"""ICT: the batches of both definitions against the oracle, and what sets them apart."""

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from gpu_mixmatch import ICT, ConsistencyLoss, MixMatch, RandAugment, WeakAugment, sampling
from gpu_mixmatch.augment import keyed
from tests import oracle, oracle_mixing
from tests.factories import LinearNet, random_data
from tests.params import oracle_rows

NUM_CLASSES = 5
SHAPE = (3, 8, 8)
NUM_X, NUM_U = 4, 6
ERROR = 2e-5


class WritingNet(LinearNet):
    """Overwrites what it is given."""

    def forward(self, images):
        logits = super().forward(images)
        images.zero_()
        return logits


def data_of():
    return random_data(NUM_X, NUM_U, SHAPE, num_classes=NUM_CLASSES)


def engine_of(**fields):
    return WeakAugment(**{"padding": 2, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), **fields})


def teacher_of():
    return LinearNet(NUM_CLASSES, SHAPE, seed=4)


def builder_of(preset=ICT.reference, engine=None, **switches):
    teacher = switches.pop("teacher", None) or teacher_of()
    engine = engine or engine_of()
    return preset(engine, NUM_CLASSES, **{"seed": 5, "teacher": teacher, **switches})


def drawn(builder, step):
    """Views of x and u by the oracle, and MixUp's draws of the part that is mixed."""
    engine = builder.augment
    draws = engine.draw_batch(builder.seed, step, NUM_X, NUM_U, 1)
    mixup = sampling.draw_mixup(
        *(builder.seed, step, NUM_X, NUM_U),
        num_augmentations=1,
        alpha=builder.alpha,
        mix=builder.mix,
    )
    return draws, mixup.lam.double().numpy(), mixup.index.numpy()


def oracle_batch(builder, x, y, u, step):
    draws, lam, index = drawn(builder, step)
    views = oracle_rows(torch.cat([x, u]), draws, builder.augment)
    views_x, views_u = views[:NUM_X].numpy(), views[NUM_X:].numpy()
    labels = one_hot(y, NUM_CLASSES).double().numpy()
    logits = builder.teacher(views[NUM_X:].float()).detach().double().numpy()
    if builder.blend == "probs":
        return oracle_mixing.ict_of_fixmatch(views_x, labels, views_u, logits, lam[NUM_X:])
    lams = lam[0], lam[NUM_X]
    partners = index[:NUM_X], index[NUM_X:] - NUM_X
    return oracle_mixing.ict_of_its_authors(views_x, labels, views_u, logits, lams, partners)


def assert_near(actual, expected, error=ERROR):
    torch.testing.assert_close(actual.double(), torch.from_numpy(expected), rtol=0, atol=error)


@pytest.mark.usefixtures("each_cpu_impl")
@pytest.mark.parametrize("preset", [ICT.reference, ICT.fixmatch], ids=["reference", "fixmatch"])
def test_batches_of_several_steps_equal_the_oracle(preset):
    x, y, u = data_of()
    builder = builder_of(preset)
    for step in range(3):
        batch = builder(x, y, u)
        rows_x, targets_x, rows_u, targets_u = oracle_batch(builder, x, y, u, step)
        assert batch.num_labelled == NUM_X
        assert batch.step == step
        assert batch.num_weak == 0
        assert batch.weights.tolist() == [1] * (NUM_X + NUM_U)
        assert_near(batch.inputs, np.concatenate([rows_x, rows_u]))
        assert_near(batch.targets, np.concatenate([targets_x, targets_u]))


@pytest.mark.parametrize("preset", [ICT.reference, ICT.fixmatch], ids=["reference", "fixmatch"])
def test_views_that_are_mixed_from_bytes_make_the_same_batch(preset, monkeypatch):
    # Numba builds large batches anew while it mixes; eager never does
    pytest.importorskip("numba")
    monkeypatch.setattr(keyed, "_LEAST_TO_MIX_BYTES", 0)
    x, y, u = data_of()
    batches = []
    for impl in ("eager", "numba"):
        engine = engine_of(impl=impl)
        assert engine.remixes_from_bytes(u, NUM_X + NUM_U) == (impl == "numba")
        batches.append(builder_of(preset, engine, impl=impl)(x, y, u))
    torch.testing.assert_close(batches[0].inputs, batches[1].inputs, rtol=0, atol=1e-5)
    torch.testing.assert_close(batches[0].targets, batches[1].targets, rtol=0, atol=1e-5)


def test_presets_are_what_their_authors_ran():
    theirs = {"alpha": 1.0, "lam": "batch", "mix": "separate", "partner": "shuffled"}
    fixmatch = {"alpha": 0.5, "lam": "sample", "mix": "unlabelled", "partner": "reversed"}
    for preset, blend, switches in (
        (ICT.reference, "logits", theirs),
        (ICT, "logits", theirs),
        (ICT.fixmatch, "probs", fixmatch),
    ):
        builder = preset(engine_of(), NUM_CLASSES)
        assert {name: getattr(builder, name) for name in switches} == switches
        assert builder.blend == blend
    assert ICT.fixmatch(engine_of(), NUM_CLASSES, alpha=2.0).alpha == 2


def test_a_lambda_of_the_batch_is_one_for_x_and_another_for_u_at_every_step():
    x, y, u = data_of()
    still = engine_of(padding=0, flip=0.0, mean=0.0, std=1.0)
    builder = builder_of(engine=still, mix="separate")
    found = set()
    for step in range(8):
        lam = drawn(builder, step)[1]
        batch = builder(x, y, u)
        rows = torch.cat([x, u]).double() / 255
        index = drawn(builder, step)[2]
        for part, weight in ((slice(NUM_X), lam[0]), (slice(NUM_X, None), lam[NUM_X])):
            mixed = weight * rows[part] + (1 - weight) * rows[index[part]]
            assert_near(batch.inputs[part], mixed.numpy(), 1e-6)
            found.add(float(weight))
    assert len(found) == 16


def test_labelled_rows_are_mixed_by_its_authors_and_not_by_fixmatchs():
    x, y, u = data_of()
    whole = one_hot(y, NUM_CLASSES).float()
    assert torch.equal(builder_of(ICT.fixmatch)(x, y, u).targets[:NUM_X], whole)
    mixed = torch.cat([builder_of(seed=seed)(x, y, u).targets[:NUM_X] for seed in range(4)])
    assert ((mixed > 0).sum(dim=1) > 1).any()


def test_partners_of_rows_are_the_rows_from_the_last_on_in_each_part():
    x, y, u = data_of()
    still = engine_of(padding=0, flip=0.0, mean=0.0, std=1.0)
    builder = builder_of(engine=still, partner="reversed", alpha=1000.0)  # λ near a half
    lam = drawn(builder, 0)[1]
    batch = builder(x, y, u)
    for rows, part, weight in ((x, slice(NUM_X), lam[0]), (u, slice(NUM_X, None), lam[NUM_X])):
        rows = rows.double() / 255
        wanted = weight * rows + (1 - weight) * rows.flip(0)
        assert_near(batch.inputs[part], wanted.numpy(), 1e-6)
    # a row that is not mixed is its own partner: what is wrong with another does not spoil it
    params = sampling.draw_mixup(5, 0, NUM_X, NUM_U, num_augmentations=1, mix="unlabelled")
    index = builder_of(ICT.fixmatch)._params(params, NUM_X).index.tolist()
    assert index == [*range(NUM_X), *reversed(range(NUM_X, NUM_X + NUM_U))]


def test_logits_are_mixed_before_the_softmax_and_probabilities_after_it():
    x, y, u = data_of()
    by_logits, by_probs = (builder_of(blend=blend)(x, y, u) for blend in ("logits", "probs"))
    assert torch.equal(by_logits.inputs, by_probs.inputs)
    assert torch.equal(by_logits.targets[:NUM_X], by_probs.targets[:NUM_X])
    assert (by_logits.targets[NUM_X:] - by_probs.targets[NUM_X:]).abs().max() > 0.01
    # a mixture of probabilities is at least as uncertain: its entropy is concave
    entropies = [-(t * t.clamp(min=1e-9).log()).sum(dim=1) for t in (by_logits[1], by_probs[1])]
    assert entropies[0][NUM_X:].mean() < entropies[1][NUM_X:].mean()


def test_draws_of_mixmatch_are_those_of_ict():
    x, y, u = data_of()
    ict = builder_of(ICT.fixmatch, partner="shuffled", alpha=0.75)
    mixmatch = MixMatch(
        engine_of(), NUM_CLASSES, num_augmentations=1, temperature=1.0, mix="unlabelled", seed=5
    )
    one, other = ict(x, y, u), mixmatch(x, y, u, ict.teacher)
    torch.testing.assert_close(one.inputs, other.inputs, rtol=0, atol=1e-6)
    torch.testing.assert_close(one.targets, other.targets, rtol=0, atol=1e-6)


def test_the_loss_has_a_gradient_of_mixed_rows_and_none_through_the_teacher():
    x, y, u = data_of()
    teacher, model = teacher_of(), LinearNet(NUM_CLASSES, SHAPE)
    batch = builder_of(teacher=teacher)(x, y, u, model)
    criterion = ConsistencyLoss(lambda_u=100.0, loss_u="mse")
    output = criterion(model(batch.inputs), batch)
    output.loss_u.backward()
    assert model.dense.weight.grad.abs().sum() > 0
    assert teacher.dense.weight.grad is None
    logits = model(batch.inputs).detach().double().numpy()
    targets = batch.targets.double().numpy()
    assert output.loss.item() == pytest.approx(
        oracle.mixmatch_loss(logits, targets, NUM_X, 100.0)[0], rel=1e-5
    )


def test_what_the_teacher_writes_into_its_views_is_in_no_batch():
    x, y, u = data_of()
    teachers = [net(NUM_CLASSES, SHAPE, seed=4) for net in (LinearNet, WritingNet)]
    one, other = (builder_of(teacher=teacher)(x, y, u) for teacher in teachers)
    assert torch.equal(one.inputs, other.inputs)
    assert torch.equal(one.targets, other.targets)


def test_reused_buffers_hold_the_same_batches():
    x, y, u = data_of()
    fresh, reusing = (builder_of(reuse_buffers=reuse) for reuse in (False, True))
    places = set()
    for _ in range(4):
        batch = reusing(x, y, u)
        assert torch.equal(fresh(x, y, u).inputs, batch.inputs)
        places.add(batch.inputs.data_ptr())
    assert len(places) == 2


def test_a_strong_engine_and_any_function_make_views():
    x, y, u = data_of()
    for engine in (RandAugment(engine_of(), cutout=3), lambda images: images * 2):
        batch = builder_of(engine=engine)(x, y, u)
        assert batch.inputs.shape == (NUM_X + NUM_U, *SHAPE)


def test_a_method_that_guesses_first_says_that_it_has_nothing_to_guess_with():
    x, y, u = data_of()
    builder = ICT(engine_of(), NUM_CLASSES)
    with pytest.raises(TypeError, match="model must be given, since ICT guesses before it mixes"):
        builder(x, y, u)
    assert builder.step == 0
    model = teacher_of()
    wanted = builder_of(teacher=model, seed=0)(x, y, u)
    assert torch.equal(builder(x, y, u, model).targets, wanted.targets)


@pytest.mark.parametrize(
    ("switch", "value"),
    [("lam", "row"), ("mix", "all"), ("partner", "next"), ("blend", "both"), ("alpha", 0.0)],
)
def test_a_switch_out_of_its_range_is_named(switch, value):
    with pytest.raises(ValueError, match=f"{switch} must be"):
        ICT(engine_of(), NUM_CLASSES, **{switch: value})
