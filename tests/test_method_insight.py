"""What is seen of methods that weigh guesses: how many are kept and right, and their views."""

from pathlib import Path

import pytest
import torch
from torch import nn

from gpu_mixmatch import (
    ConsistencyLoss,
    FixMatch,
    FlexMatch,
    FreeMatch,
    MeanTeacher,
    RandAugment,
    ReMixMatch,
    SoftMatch,
    WeakAugment,
)
from gpu_mixmatch.insight import (
    GuessQuality,
    GuessWatch,
    TensorBoardInsight,
    WeighedGuessQuality,
    draw_preview,
)
from gpu_mixmatch.insight.next_step import next_views
from tests.digest import parameter_digest
from tests.factories import ConvNet, LinearNet, random_data
from tests.no_sync import NoExport, NoSync, look_at_nothing
from tests.skips import skip_without

NUM_CLASSES, NUM_UNLABELLED, M = 5, 20, 6
ORDERS = pytest.mark.parametrize("guess_first", [True, False], ids=["guess first", "one pass"])


def engines():
    weak = WeakAugment(padding=1)
    return weak, RandAugment.fixmatch(weak, cutout=4)


def builder_of(kind=FixMatch, **options):
    if kind is FlexMatch:
        options = {"num_unlabelled": NUM_UNLABELLED, "threshold": 0.3, **options}
    if kind is FixMatch:
        options = {"threshold": 0.27, **options}
    if kind is MeanTeacher:
        return MeanTeacher(engines()[0], NUM_CLASSES, **options)
    return kind(*engines(), NUM_CLASSES, **options)


def data():
    return random_data(num_classes=NUM_CLASSES)


def ids_of(step):
    return (torch.arange(M) * 7 + step) % NUM_UNLABELLED


def truth_of():
    return torch.randint(0, NUM_CLASSES, (NUM_UNLABELLED,), generator=torch.Generator())


class Writer:
    """Keeps what it is given."""

    def __init__(self):
        self.scalars, self.images = {}, []

    def add_scalar(self, name, value, step):
        self.scalars[name, step] = value

    def add_image(self, name, image, step, dataformats):
        self.images.append((name, step, image))


def train(builder, model, steps, *, guess_first, seen=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    x, y, u = data()
    for _ in range(steps):
        ids = ids_of(int(builder.step))
        batch = builder(x, y, u, model if guess_first else None, ids_u=ids)
        logits = model(batch.inputs)
        rows = slice(len(logits) - batch.num_weak, None)
        if seen is not None:
            first = [] if guess_first else [logits[rows].detach().softmax(dim=-1)]
        logits, batch = batch.complete(logits)
        ConsistencyLoss()(logits, batch).loss.backward()
        if seen is not None:
            seen.append((ids, batch.weights[-M:], batch.targets[-M:], *first))
        optimizer.step()
        optimizer.zero_grad()


# GuessWatch


@ORDERS
@pytest.mark.parametrize("kind", [FixMatch, SoftMatch, FlexMatch])
def test_quality_counts_what_is_kept_and_what_of_it_is_right(kind, guess_first):
    builder, truth, seen = builder_of(kind, num_strong=2), truth_of(), []
    watch = GuessWatch(builder, truth)
    train(builder, ConvNet(NUM_CLASSES), 4, guess_first=guess_first, seen=seen)
    quality = watch.read()
    ids, weights, targets, *probs = (torch.cat(parts) for parts in zip(*seen, strict=True))
    guessed, kept = targets.argmax(dim=1), weights > 0
    right = guessed == truth[ids]
    assert quality.num_guesses == 4 * M
    assert quality.accuracy == pytest.approx(right.float().mean().item())
    assert quality.kept == pytest.approx(kept.float().mean().item())
    assert quality.mean_weight == pytest.approx(weights.mean().item())
    assert quality.kept_accuracy == pytest.approx(right[kept].float().mean().item())
    for counts, of in (
        (quality.of_classes, guessed),
        (quality.kept_of_classes, guessed[kept]),
        (quality.right_of_classes, guessed[right & kept]),
    ):
        assert torch.equal(counts, torch.bincount(of, minlength=NUM_CLASSES))
    if probs:
        assert quality.confidence == pytest.approx(probs[0].max(dim=1)[0].mean().item(), rel=1e-5)
    if kind is FixMatch:
        assert 0 < quality.kept < 1
        assert quality.gap() == quality.confidence - quality.accuracy
    assert watch.read() is None


@ORDERS
def test_without_the_truth_what_is_kept_is_counted_all_the_same(guess_first):
    builder = builder_of(threshold=1.0)
    watch = GuessWatch(builder)
    x, y, u = data()
    batch = builder(x, y, u, ConvNet(NUM_CLASSES) if guess_first else None)
    if not guess_first:
        assert watch.read() is None  # not yet
        batch.complete(ConvNet(NUM_CLASSES)(batch.inputs))
    quality = watch.read()
    assert isinstance(quality, WeighedGuessQuality)
    assert (quality.kept, quality.mean_weight, quality.kept_accuracy) == (0, 0, None)
    assert quality.accuracy is quality.right_of_classes is None
    assert int(quality.of_classes.sum()) == M
    builder(x, y, u, ConvNet(NUM_CLASSES))
    with pytest.warns(UserWarning, match=r"guesses are 0\.\d\d sure"):
        watch.compare(0.0)


def test_batches_that_wait_for_the_loss_are_taken_in_with_their_own_ids():
    builder, (x, y, u) = builder_of(), data()
    truth = torch.arange(NUM_UNLABELLED) % NUM_CLASSES
    watch = GuessWatch(builder, truth)
    both = [torch.arange(M), torch.arange(M) + 6]
    batches = [builder(x, y, u, ids_u=ids) for ids in both]
    for batch, ids in reversed(list(zip(batches, both, strict=True))):
        logits = torch.zeros(len(batch.inputs), NUM_CLASSES)
        logits[torch.arange(M) - M, truth[ids]] = 9.0
        batch.complete(logits)
    quality = watch.read()
    assert (quality.accuracy, quality.kept_accuracy, quality.num_guesses) == (1.0, 1.0, 2 * M)


@ORDERS
def test_watching_reads_nothing_back_in_the_step(monkeypatch, guess_first):
    look_at_nothing(monkeypatch)
    model, (x, y, u) = ConvNet(NUM_CLASSES), data()
    builder = builder_of(FreeMatch)
    watch = GuessWatch(builder, truth_of())
    train(builder, model, 1, guess_first=guess_first)  # makes the constants
    watch.read()
    batch = builder(x, y, u, ids_u=ids_of(0))
    logits = model(batch.inputs)
    with NoSync(builder.step), NoExport():
        batch.complete(logits)
        confidence, guess = logits[-M:].softmax(dim=-1).max(dim=-1)
        watch._take((confidence, guess), torch.rand(4 + M), ids_of(0))
    assert watch.read().num_guesses == 2 * M


@ORDERS
@pytest.mark.parametrize("kind", [FreeMatch, FlexMatch])
def test_training_goes_on_as_without_insight_to_the_last_bit(kind, guess_first):
    skip_without("matplotlib")
    runs = []
    for watched in (False, True):
        builder, model = builder_of(kind), ConvNet(NUM_CLASSES)
        if watched:
            writer = Writer()
            insight = TensorBoardInsight(builder, writer, 2, truth=truth_of(), rows=1, model=model)
        train(builder, model, 3, guess_first=guess_first)
        state = [value.clone() for value in builder.state_dict().values()]
        runs.append((parameter_digest(model), state))
    insight.close()
    assert runs[0][0] == runs[1][0]
    assert all(map(torch.equal, runs[0][1], runs[1][1]))
    tag = kind.__name__.lower()
    assert [(name, step) for name, step, _ in writer.images] == [
        (f"{tag}/preview", 0), (f"{tag}/preview", 2)
    ]  # fmt: skip
    for name in ("confidence", "accuracy", "kept", "mean_weight", "kept_accuracy"):
        assert [step for written, step in writer.scalars if written == f"{tag}/{name}"] == [2, 3]


def test_of_a_method_that_mixes_weak_and_strong_views_the_guesses_are_watched_alone():
    builder, writer = ReMixMatch(*engines(), NUM_CLASSES, num_strong=1), Writer()
    insight = TensorBoardInsight(builder, writer, 1, truth=truth_of())
    x, y, u = data()
    for step in range(2):
        builder(x, y, u, ConvNet(NUM_CLASSES), ids_u=ids_of(step))
    insight.close()
    assert not writer.images
    assert list(writer.scalars) == [
        (f"remixmatch/{name}", step) for step in (1, 2) for name in ("confidence", "accuracy")
    ]


def test_a_preview_in_one_pass_needs_a_model():
    builder, (x, y, u) = builder_of(), data()
    TensorBoardInsight(builder, Writer(), 1)
    with pytest.raises(ValueError, match="model must be given to TensorBoardInsight where"):
        builder(x, y, u)


def test_only_builders_are_watched():
    with pytest.raises(TypeError, match="mixmatch must be a builder such as MixMatch or FixMatch"):
        GuessWatch(nn.Identity())
    assert not hasattr(GuessQuality(0.5, None, 3), "kept")


# Previews


@ORDERS
@pytest.mark.parametrize("kind", [FixMatch, FlexMatch, MeanTeacher])
def test_next_views_are_those_of_the_batch_that_follows(kind, guess_first):
    builder, model, (x, y, u) = builder_of(kind, num_strong=2), ConvNet(NUM_CLASSES), data()
    train(builder, ConvNet(NUM_CLASSES, seed=1), 2, guess_first=True)
    before = [value.clone() for value in (*builder.state_dict().values(), *model.buffers())]
    ids = ids_of(2)
    views = next_views(builder, x, y, u, model, None, ids, one_pass=not guess_first)
    after = [*builder.state_dict().values(), *model.buffers()]
    assert all(map(torch.equal, before, after))
    batch = builder(x, y, u, model if guess_first else None, ids_u=ids)
    weak = builder.weak(u, builder.seed, 2, 3, ids=ids)
    assert torch.equal(views.images, torch.cat((batch.inputs[: 4 + 2 * M], weak)))
    _, batch = batch.complete(model(batch.inputs))
    torch.testing.assert_close(views.targets, batch.targets)
    torch.testing.assert_close(views.weights, batch.weights)
    torch.testing.assert_close(views.guesses.sum(dim=1), torch.ones(M))
    assert views.step == 2


def test_an_engine_that_draws_anew_for_the_same_step_is_found_out():
    calls = iter(range(100))
    builder = FixMatch(WeakAugment(1), lambda images: images + next(calls), NUM_CLASSES)
    x, y, u = data()
    with pytest.raises(RuntimeError, match=r"batch\.inputs must be what its views and guesses"):
        next_views(builder, x, y, u, ConvNet(NUM_CLASSES), None, None)
    assert int(builder.step) == 0


@pytest.mark.parametrize("num_strong", [1, 7])
def test_a_preview_says_which_guesses_are_left_out_and_no_texts_meet(
    tmp_path, monkeypatch, num_strong
):
    skip_without("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: saved.append(self))
    builder, (x, y, u) = builder_of(num_strong=num_strong, threshold=0.5), data()
    model = LinearNet(NUM_CLASSES, (3, 12, 12))
    draw_preview(builder, x, y, u, model, tmp_path / "preview.png", rows=6)
    weights = builder(x, y, u, model).weights[-M:]
    (figure,) = saved
    FigureCanvasAgg(figure).draw()
    texts = [text.get_text() for text in figure.texts]
    said = [text for text in texts if text.startswith(("weight 1.00", "left out"))]
    assert [text == "weight 1.00" for text in said] == [bool(weight) for weight in weights]
    assert 0 < len([weight for weight in weights if weight]) < M
    assert "How FixMatch makes its next batch" in texts
    assert any(f"4 labelled + {num_strong} × 6 strong" in text for text in texts)
    boxes = [(t.get_text(), t.get_window_extent()) for t in figure.texts if t.get_text()]
    pictures = [("picture", axes.get_window_extent()) for axes in figure.axes if axes.images]
    assert len(pictures) == 6 * (min(num_strong + 1, 6) + 1) + 2 * 4
    for number, (name, box) in enumerate(boxes):
        assert figure.bbox.padded(-10).containsx(box.x1), name
        for other, taken in [*boxes[:number], *pictures]:
            apart = box.x0 >= taken.x1 or taken.x0 >= box.x1
            apart = apart or box.y0 + 2 >= taken.y1 or taken.y0 + 2 >= box.y1
            assert apart, (name, other)


def test_a_preview_is_written_and_mixmatch_has_no_one_pass(tmp_path: Path):
    skip_without("matplotlib")
    from gpu_mixmatch import MixMatch

    x, y, u = data()
    path = draw_preview(
        builder_of(FreeMatch), x, y, u, ConvNet(NUM_CLASSES), tmp_path / "a.png", one_pass=True
    )
    assert path.stat().st_size > 10_000
    with pytest.raises(ValueError, match="one_pass must be False for MixMatch"):
        draw_preview(
            MixMatch(WeakAugment(1), NUM_CLASSES), x, y, u, ConvNet(NUM_CLASSES), path,
            one_pass=True,
        )  # fmt: skip
