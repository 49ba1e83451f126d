"""capture of methods that weigh guesses: graphs are recorded, see tests/recorded_graphs.py."""

from copy import deepcopy

import pytest
import torch

from gpu_mixmatch import (
    UDA,
    ConsistencyBatch,
    ConsistencyLoss,
    DistributionAlignment,
    FixMatch,
    FlexMatch,
    FreeMatch,
    FreeThreshold,
    MeanTeacher,
    MixMatch,
    RandAugment,
    ReMixMatch,
    SoftMatch,
    WeakAugment,
    capture,
)
from gpu_mixmatch.capture import check_capturable
from tests.factories import ConvNet, random_data
from tests.no_sync import look_for_no_rows
from tests.recorded_graphs import record_graphs

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
NUM_CLASSES, NUM_UNLABELLED, B, M = 5, 40, 3, 6
ORDERS = pytest.mark.parametrize("guess_first", [True, False], ids=["guess first", "one pass"])


def data(b=B, m=M, seed=0):
    return random_data(b, m, num_classes=NUM_CLASSES, device=DEVICE, seed=seed)


def ids_of(step, m=M):
    return (torch.arange(m) * 5 + step) % NUM_UNLABELLED


def net():
    return ConvNet(NUM_CLASSES).to(DEVICE)


def builder_of(kind=FixMatch, **options):
    impl = "auto" if CUDA else "eager"
    weak = WeakAugment(padding=2, impl=impl)
    strong = RandAugment.fixmatch(weak, cutout=4)
    if kind is MeanTeacher:
        return MeanTeacher(weak, NUM_CLASSES, seed=2**61 + 7, impl=impl).to(DEVICE)
    if kind is FlexMatch:
        options = {"num_unlabelled": NUM_UNLABELLED, "threshold": 0.24}
    if kind is FreeMatch:
        options = {"threshold": FreeThreshold(momentum=0.5)}
    if kind is UDA:
        options = {"threshold": 0.25, "alignment": DistributionAlignment(window=3)}
    if kind is FixMatch:
        options = {"threshold": 0.27, **options}
    return kind(weak, strong, NUM_CLASSES, seed=2**61 + 7, impl=impl, **options).to(DEVICE)


@pytest.fixture
def captured(monkeypatch):
    """Captures a builder, without CUDA by a recording of what is done on the CPU."""
    builders = []
    if not CUDA:
        look_for_no_rows(monkeypatch)
        record_graphs(monkeypatch, lambda: [builder.step for builder in builders])

    def captured(builder, model, batch=None):
        builders.append(builder)
        return capture(builder, model, *(batch or data(seed=9)))

    return captured


def assert_same(batch, expected):
    for name, value in expected._asdict().items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(getattr(batch, name), value, msg=name)


def assert_same_state(builder, other):
    state, wanted = builder.state_dict(), other.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in state)


@ORDERS
@pytest.mark.parametrize("kind", [FixMatch, UDA, SoftMatch, FreeMatch, FlexMatch, MeanTeacher])
def test_every_replay_equals_the_eager_call_and_learns_as_it_does(captured, kind, guess_first):
    model, mine, theirs = net(), builder_of(kind), builder_of(kind)
    fresh = deepcopy(mine.state_dict())
    build = captured(mine, model if guess_first else None)
    assert all(torch.equal(value, fresh[name]) for name, value in mine.state_dict().items())
    for step in range(4):
        b, m = (2, 4) if step == 2 else (B, M)  # a smaller batch, without the graph
        x, y, u = data(b, m, seed=step)
        ids = {"ids_u": ids_of(step, m)}
        batch = build(x, y, u, **ids)
        expected = theirs(x, y, u, model if guess_first else None, **ids)
        assert isinstance(batch, ConsistencyBatch)
        logits = model(expected.inputs)
        (_, batch), (_, expected) = batch.complete(logits), expected.complete(logits)
        assert_same(batch, expected)
        assert_same_state(mine, theirs)
    if kind is not MeanTeacher and kind is not FixMatch:
        assert any(not torch.equal(value, fresh[name]) for name, value in mine.state_dict().items()
                   if name not in ("seed", "step"))  # fmt: skip


@pytest.mark.parametrize("rotation", [False, True])
def test_views_that_are_mixed_and_turned_are_replayed_too(captured, rotation):
    weak = WeakAugment(padding=2, impl="auto" if CUDA else "eager")
    strong = RandAugment.fixmatch(weak, cutout=4)

    def model(images):
        logits = net_of_all(images)
        return (logits, logits[:, :4]) if rotation else logits

    net_of_all = net()
    mine, theirs = (
        ReMixMatch(weak, strong, NUM_CLASSES, num_strong=1, rotation=rotation, impl=weak.impl)
        for _ in range(2)
    )
    mine, theirs = mine.to(DEVICE), theirs.to(DEVICE)
    build = captured(mine, model)
    for step in range(2):
        x, y, u = data(seed=step)
        assert_same(build(x, y, u), theirs(x, y, u, model))
    assert_same_state(mine, theirs)


@pytest.mark.parametrize("kind", [FreeMatch, FlexMatch])
def test_a_state_that_is_loaded_is_the_one_that_replays_go_on_from(captured, kind):
    model, (mine, theirs) = net(), (builder_of(kind), builder_of(kind))
    build = captured(mine, model)
    for step in range(2):
        x, y, u = data(seed=step)
        theirs(x, y, u, model, ids_u=ids_of(step))
    mine.load_state_dict(theirs.state_dict())
    x, y, u = data(seed=2)
    assert_same(build(x, y, u, ids_u=ids_of(2)), theirs(x, y, u, model, ids_u=ids_of(2)))
    assert_same_state(mine, theirs)


def test_a_backward_pass_after_the_next_replay_raises_and_one_before_is_right(captured):
    model, criterion = net(), ConsistencyLoss(lambda_fair=0.1, impl="eager")
    build, twin = captured(builder_of(FreeMatch), model), builder_of(FreeMatch)
    batch = build(*data(seed=1))
    criterion(model(batch.inputs), batch).loss.backward()
    mine = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    batch = twin(*data(seed=1), model)
    criterion(model(batch.inputs), batch).loss.backward()
    for got, weight in zip(mine, model.parameters(), strict=True):
        torch.testing.assert_close(got, weight.grad)
    late = build(*data(seed=2))
    loss = criterion(model(late.inputs), late).loss
    build(*data(seed=3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_guess_that_waits_is_not_made_of_the_next_batch_s_labels(captured):
    build, model = captured(builder_of(), None), net()
    late = build(*data(seed=1))
    logits = model(late.inputs)
    batch = build(*data(seed=2))
    with pytest.raises(RuntimeError, match="labels and ids are there, got ones that were overw"):
        late.complete(logits)
    logits, batch = batch.complete(model(batch.inputs))
    assert torch.equal(batch.targets[:B].argmax(dim=1), data(seed=2)[1])


def test_ids_that_are_remembered_are_asked_for_and_looked_at(captured):
    builder = builder_of(FlexMatch)
    build = captured(builder, net())
    with pytest.raises(ValueError, match="ids_u must be given where guesses are remembered"):
        build(*data())
    with pytest.raises(ValueError, match=r"ids_u must be in 0 \.\. num_unlabelled - 1 = 39"):
        build(*data(), ids_u=torch.arange(M) + 35)
    assert int(builder.step) == 0
    assert (builder.threshold.classes == -1).all()
    build(*data(), ids_u=ids_of(0))
    assert (builder.threshold.classes >= 0).any()


def test_a_state_that_moved_away_is_refused(captured):
    builder = builder_of(FreeMatch)
    build = captured(builder, net())
    builder.threshold.averages = builder.threshold.averages.clone()
    with pytest.raises(RuntimeError, match="averages of the builder is not where it was"):
        build(*data())


def test_without_a_model_a_mixmatch_is_not_captured():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module or a function .* got None"):
        capture(MixMatch(WeakAugment(), NUM_CLASSES), None, *data())
    with pytest.raises(TypeError, match="mixmatch must be a builder such as MixMatch or FixMatch"):
        capture(net(), net(), *data())


def test_capture_wants_all_draws_on_the_device(monkeypatch):
    with pytest.raises(RuntimeError, match="capture needs CUDA, got a FixMatch on cpu"):
        check_capturable(builder_of().cpu())
    monkeypatch.setattr(FixMatch, "device", property(lambda self: torch.device("cuda", 0)))
    monkeypatch.setattr(FixMatch, "_prepare", lambda self: None)  # nothing is sent to that device
    apart = FixMatch(
        WeakAugment(1), RandAugment.fixmatch(WeakAugment(2)), NUM_CLASSES, impl="triton"
    )
    words = r"as RandAugment\.fixmatch\(weak\) .* got WeakAugment and RandAugment"
    with pytest.raises(TypeError, match=words):
        check_capturable(apart)
    weak = WeakAugment(1)
    check_capturable(FixMatch(weak, RandAugment.fixmatch(weak), NUM_CLASSES, impl="triton"))
