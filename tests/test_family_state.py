"""What methods learn of guesses: dtypes, copies, checkpoints, and processes that share it."""

import copy
import pickle
import re

import pytest
import torch

from gpu_mixmatch import UDA, ConsistencyLoss, DistributionAlignment, FixMatch, FlexMatch, FreeMatch
from tests.family import (
    ADAPTIVE,
    ENGINES,
    NUM_CLASSES,
    SAMPLES,
    assert_equal_batches,
    assert_equal_states,
    buffers_of,
    data_of,
    labelled_batch,
    net,
)

each_adaptive = pytest.mark.parametrize("method", ADAPTIVE)


# Dtypes


@pytest.fixture
def doubles_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@each_adaptive
@pytest.mark.usefixtures("doubles_by_default")
def test_state_is_float32_whatever_torchs_default_is(method):
    for buffer in buffers_of(ADAPTIVE[method]()):
        assert buffer.dtype != torch.float64


CASTS = {
    "half": lambda builder: builder.half(),
    "bfloat16": lambda builder: builder.to(torch.bfloat16),
    "double": lambda builder: builder.double(),
    "type": lambda builder: builder.type(torch.float16),
    "deepcopy": copy.deepcopy,
    "pickle": lambda builder: pickle.loads(pickle.dumps(builder)),
    "to": lambda builder: builder.to("cpu"),
}


@pytest.mark.parametrize("cast", CASTS)
@each_adaptive
def test_a_cast_or_a_copy_keeps_the_state_and_the_batches(method, cast):
    builder, twin = ADAPTIVE[method](), ADAPTIVE[method]()
    for step in range(2):
        labelled_batch(builder, step)
        labelled_batch(twin, step)
    moved = CASTS[cast](builder)
    assert_equal_states(moved, twin)
    assert_equal_batches(labelled_batch(moved, 2), labelled_batch(twin, 2))
    assert_equal_states(moved, twin)


@each_adaptive
def test_a_deep_copy_learns_by_itself(method):
    builder = ADAPTIVE[method]()
    twin = copy.deepcopy(builder)
    labelled_batch(builder, 0)
    with pytest.raises(AssertionError):
        assert_equal_states(builder, twin)
    assert_equal_states(twin, ADAPTIVE[method]())


# Checkpoints


@pytest.mark.parametrize("order", ["first", "one pass"])
@each_adaptive
def test_a_saved_state_resumes_to_the_last_bit(method, order, tmp_path):
    whole, first = ADAPTIVE[method](), ADAPTIVE[method]()
    for step in range(3):
        labelled_batch(whole, step, order=order)
        labelled_batch(first, step, order=order)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    resumed = ADAPTIVE[method](seed=5)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_equal_states(resumed, whole)
    for step in range(3, 6):
        expected = labelled_batch(whole, step, order=order)
        assert_equal_batches(labelled_batch(resumed, step, order=order), expected)
    assert_equal_states(resumed, whole)


@each_adaptive
def test_a_state_is_a_copy(method):
    builder = ADAPTIVE[method]()
    state = copy.deepcopy(builder.state_dict())
    labelled_batch(builder, 0)
    builder.load_state_dict(state)
    assert_equal_states(builder, ADAPTIVE[method]())
    assert int(builder.step) == 0


def test_the_state_of_fixmatch_is_two_integers():
    assert {
        name: int(value) for name, value in FixMatch(*ENGINES, seed=7).state_dict().items()
    } == {
        "seed": 7,
        "step": 0,
    }


@pytest.mark.parametrize(
    ("saved", "loading", "text"),
    [
        ("FreeMatch", lambda: FixMatch(*ENGINES), "Unexpected key(s) in state_dict: "),
        ("window", lambda: UDA(*ENGINES), 'Unexpected key(s) in state_dict: "alignment.guesses"'),
        ("FlexMatch", ADAPTIVE["FreeMatch"], 'Missing key(s) in state_dict: "threshold.averages"'),
        (
            "window",
            lambda: UDA(*ENGINES, alignment=DistributionAlignment(4)),
            "size mismatch for alignment.guesses",
        ),
        (
            "FreeMatch",
            lambda: FreeMatch(*ENGINES[:2], NUM_CLASSES + 1),
            "size mismatch for threshold.averages",
        ),
        (
            "FlexMatch",
            lambda: FlexMatch(*ENGINES, num_unlabelled=SAMPLES + 1),
            "size mismatch for threshold.classes",
        ),
    ],
)
def test_a_state_of_another_method_or_size_is_refused(saved, loading, text):
    state = ADAPTIVE[saved]().state_dict()
    builder = loading()
    with pytest.raises(RuntimeError, match=re.escape(text)):
        builder.load_state_dict(state)


@pytest.mark.parametrize("wrong", [NUM_CLASSES, -2])
def test_classes_of_samples_that_there_are_not_are_refused(wrong):
    # a table has as many rows for any number of classes
    builder = ADAPTIVE["FlexMatch"]()
    state = builder.state_dict()
    state["threshold.classes"] = torch.full((SAMPLES,), -1, dtype=torch.int16)
    state["threshold.classes"][3] = wrong
    text = f"threshold.classes must be in -1 .. num_classes - 1 = 3, got {min(wrong, -1)} .. "
    with pytest.raises(RuntimeError, match=re.escape(text)):
        builder.load_state_dict(state)
    assert_equal_states(builder, ADAPTIVE["FlexMatch"]())


# Compiled


@pytest.fixture
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def trained(builder, order, backend):
    """Losses, weights and parameters of some steps, built and trained on."""
    model = net()
    criterion = ConsistencyLoss(2.0, 3, lambda_fair=float(isinstance(builder, FreeMatch)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step(x, y, u, ids_u):
        batch = builder(x, y, u, model if order == "first" else None, ids_u=ids_u)
        output = criterion(model(batch.inputs), batch)
        return output.loss, output.kept, output.loss_fair

    if backend:
        step = torch.compile(step, fullgraph=True, backend=backend)
    history = []
    for number in range(3):
        parts = step(*data_of(number))
        parts[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(torch.stack(parts).detach())
    return torch.stack(history), model.dense.weight.detach()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("method", "order"),
    [
        ("FixMatch", "first"),
        ("FixMatch", "one pass"),
        ("FreeMatch", "first"),
        ("FreeMatch", "one pass"),
        ("FlexMatch", "one pass"),
        ("window", "one pass"),
    ],
)
def test_a_step_is_one_graph(method, order):
    build = ADAPTIVE.get(method, lambda: FixMatch(*ENGINES, threshold=0.4))
    plain, compiled = build(), build()
    expected = trained(plain, order, None)
    found = trained(compiled, order, "aot_eager")
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert int(compiled.step) == 3
    if method != "FixMatch":
        for mine, theirs in zip(buffers_of(compiled), buffers_of(plain), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
