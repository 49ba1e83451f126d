"""GuessWatch and TensorBoardInsight give right numbers, and disturb neither step nor weights."""

import pytest
import torch
from torch import nn

from gpu_mixmatch import MixMatch, MixMatchLoss, WeakAugment
from gpu_mixmatch.insight import GuessQuality, GuessWatch, TensorBoardInsight, draw_preview
from tests.digest import parameter_digest
from tests.factories import ConstantNet, ConvNet, random_data
from tests.no_sync import NoExport, NoSync, look_at_nothing
from tests.skips import skip_without

NUM_CLASSES = 5
NUM_UNLABELLED = 20
NUM_STEPS = 5


class Writer:
    """Keeps what it is given."""

    def __init__(self):
        self.scalars, self.images = [], []

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def add_image(self, name, image, step, dataformats):
        assert dataformats == "HWC"
        self.images.append((name, image, step))


def new_net():
    return ConvNet(NUM_CLASSES)


def data(device="cpu"):
    return random_data(num_classes=NUM_CLASSES, device=device)


def builder_of(**options):
    return MixMatch(WeakAugment(padding=1), NUM_CLASSES, **options)


def ids_of(step):
    return (torch.arange(6) * 7 + step) % NUM_UNLABELLED


def truth_of():
    return torch.randint(0, NUM_CLASSES, (NUM_UNLABELLED,), generator=torch.Generator())


def train(mixmatch, model, steps=NUM_STEPS):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        x, y, u = data()
        batch = mixmatch(x, y, u, model, ids_u=ids_of(int(mixmatch.step)))
        MixMatchLoss(1.0, 0)(model(batch.inputs), batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def guesses_by_hand(mixmatch, model):
    """Largest probability and class of each guess of the next step, from the views themselves."""
    x, _, u = data()
    step, ids = int(mixmatch.step), ids_of(int(mixmatch.step))
    draws = mixmatch.augment.draw_batch(mixmatch.seed, step, len(x), ids, 2)
    views = mixmatch.augment.build(x, u, draws, 2)[len(x) :]
    twin = new_net()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits = twin.train()(views).view(2, len(u), NUM_CLASSES)
    probs = logits.softmax(dim=-1).mean(dim=0)
    return probs.max(dim=-1)


def test_quality_is_that_of_the_guesses():
    mixmatch, model, truth = builder_of(guess_forward="joint"), new_net(), truth_of()
    watch = GuessWatch(mixmatch, truth)
    confidences, rights = [], []
    for _ in range(3):
        ids = ids_of(int(mixmatch.step))
        confidence, guess = guesses_by_hand(mixmatch, model)
        confidences.append(confidence)
        rights.append(guess == truth[ids])
        train(mixmatch, model, steps=1)
    quality = watch.read()
    assert quality.num_guesses == 18
    assert quality.confidence == pytest.approx(torch.cat(confidences).mean().item(), rel=1e-5)
    assert quality.accuracy == pytest.approx(torch.cat(rights).float().mean().item())
    assert 0 < quality.accuracy < 1


def test_joint_and_separate_guesses_have_the_same_quality_without_batch_norm():
    qualities = []
    for guess_forward in ("joint", "separate"):
        mixmatch, model = builder_of(guess_forward=guess_forward), new_net()
        model.norm = nn.Identity()
        watch = GuessWatch(mixmatch, truth_of())
        train(mixmatch, model)
        qualities.append(watch.read())
    assert qualities[0].confidence == pytest.approx(qualities[1].confidence, rel=1e-5)
    assert qualities[0].accuracy == qualities[1].accuracy


class Oracle(nn.Module):
    """Reads the class off the brightness of an image, whatever was done to it."""

    def forward(self, images):
        level = (images.mean(dim=(1, 2, 3)) + 1) / 2 * (NUM_CLASSES - 1)
        return -10 * (level[:, None] - torch.arange(NUM_CLASSES)).abs()


def test_guesses_of_a_model_that_knows_are_all_right():
    labels = torch.arange(10) % NUM_CLASSES
    images = (labels * 255 // (NUM_CLASSES - 1)).to(torch.uint8)[:, None, None, None]
    images = images.expand(10, 3, 8, 8).contiguous()
    mixmatch = builder_of()
    watch = GuessWatch(mixmatch, labels)
    ids = torch.tensor([3, 1, 4, 0, 9, 7])
    mixmatch(images, labels, images[ids], Oracle(), ids_u=ids)
    right = watch.read()
    assert right.accuracy == 1.0
    assert right.confidence > 0.99
    mixmatch(images, labels, images[ids], Oracle(), ids_u=(ids + 1) % 10)
    assert watch.read().accuracy == 0.0


def test_without_the_truth_there_is_confidence_alone_and_no_need_for_ids():
    mixmatch, (x, y, u) = builder_of(), data()
    watch = GuessWatch(mixmatch)
    mixmatch(x, y, u, new_net())
    quality = watch.read()
    assert quality.accuracy is None
    assert 1 / NUM_CLASSES < quality.confidence < 1


def test_reading_begins_anew():
    mixmatch, model = builder_of(), new_net()
    watch = GuessWatch(mixmatch, truth_of())
    assert watch.read() is None
    train(mixmatch, model, steps=2)
    assert watch.read().num_guesses == 12
    assert watch.read() is None
    train(mixmatch, model, steps=1)
    assert watch.read().num_guesses == 6


def test_the_teacher_is_watched_where_there_is_one():
    teacher = new_net()
    with torch.no_grad():
        teacher.dense.bias[2] += 100  # it always says 2, and is sure
    mixmatch, model = builder_of(teacher=teacher), new_net()
    watch = GuessWatch(mixmatch, torch.full((NUM_UNLABELLED,), 2))
    train(mixmatch, model)
    assert watch.read() == (pytest.approx(1.0), 1.0, 6 * NUM_STEPS)


def test_compiled_model_is_watched_as_the_model_itself():
    torch._dynamo.reset()
    builders, model = (builder_of(), builder_of()), new_net()
    watches = [GuessWatch(builder, truth_of()) for builder in builders]
    for builder, guesser in zip(
        builders, (model, torch.compile(model, backend="eager")), strict=True
    ):
        x, y, u = data()
        builder(x, y, u, guesser, ids_u=ids_of(0))
    first, second = (watch.read() for watch in watches)
    assert second.num_guesses == first.num_guesses == 6
    assert second.confidence == pytest.approx(first.confidence, rel=1e-5)
    assert second.accuracy == first.accuracy
    torch._dynamo.reset()


def test_logits_are_taken_by_the_logits_getter():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = new_net()

        def forward(self, images):
            return {"logits": self.net(images)}

    wanted, got = builder_of(), builder_of(logits_getter=lambda output: output["logits"])
    watches = GuessWatch(wanted, truth_of()), GuessWatch(got, truth_of())
    x, y, u = data()
    wanted(x, y, u, new_net(), ids_u=ids_of(0))
    got(x, y, u, Wrapped(), ids_u=ids_of(0))
    assert watches[0].read() == watches[1].read()


@pytest.mark.parametrize("with_truth", [False, True])
def test_watching_reads_nothing_back_in_the_step(monkeypatch, with_truth):
    look_at_nothing(monkeypatch)
    mixmatch, model = builder_of(), new_net()
    watch = GuessWatch(mixmatch, truth_of() if with_truth else None)
    x, y, u = data()
    ids_u = ids_of(0)
    with NoSync(mixmatch.step) as mode:
        for _ in range(2):
            batch = mixmatch(x, y, u, model, ids_u=ids_u)
            MixMatchLoss()(model(batch.inputs), batch).loss.backward()
    assert mode.calls > 0
    with NoSync(), pytest.raises(AssertionError, match="waits for the device"):
        watch.read()
    hook = next(iter(mixmatch._forward_hooks.values()))
    pre_hook = next(iter(mixmatch._forward_pre_hooks.values()))
    kwargs = {"ids_u": ids_u}
    with NoExport(), NoSync(mixmatch.step):  # the draws of the eager CPU builder do export ids
        pre_hook(mixmatch, (x, y, u, model), kwargs)
        for look in mixmatch._guess_hooks.values():
            look(torch.rand(2, 6, NUM_CLASSES))
        hook(mixmatch, (x, y, u, model), kwargs, object())


def test_watching_takes_a_few_small_operations_and_no_second_guess(monkeypatch):
    look_at_nothing(monkeypatch)
    mixmatch, model, (x, y, u) = builder_of(), new_net(), data()
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    counts = []
    for watched in (False, True):
        if watched:
            GuessWatch(mixmatch)
        with NoSync(mixmatch.step) as mode, torch.no_grad():
            mixmatch(x, y, u, model)
        counts.append(mode.calls)
    assert len(passes) == 2
    assert counts[1] - counts[0] <= 6


def test_watch_without_the_truth_keeps_one_number_however_long_it_is_not_read():
    mixmatch, model = builder_of(), new_net()
    watch = GuessWatch(mixmatch)
    train(mixmatch, model)
    kept = [value for value in vars(watch).values() if isinstance(value, torch.Tensor | list)]
    tensors = [value for value in kept if isinstance(value, torch.Tensor)]
    assert [tensor.numel() for tensor in tensors] == [1]
    assert not any(value for value in kept if isinstance(value, list) and value != watch._handles)


def watch_of(confidence, truth=None):
    """A watch of three steps whose guesses are so sure of the last class, and their builder."""
    # a softmax over one odd logit z has the share e^z / (e^z + L - 1)
    odd = torch.tensor(confidence * (NUM_CLASSES - 1) / (1 - confidence)).log().item()
    mixmatch, model = builder_of(), ConstantNet([0.0] * (NUM_CLASSES - 1) + [odd])
    watch = GuessWatch(mixmatch, truth)
    for step in range(3):
        x, y, u = data()
        mixmatch(x, y, u, model, ids_u=ids_of(step))
    return watch


def test_gap_is_confidence_less_accuracy():
    assert GuessQuality(0.75, None, 8).gap(0.5) == 0.25
    assert GuessQuality(0.75, None, 8).gap(1) == -0.25
    assert GuessQuality(0.75, 0.5, 8).gap() == 0.25
    assert GuessQuality(0.75, 0.5, 8).gap(0.25) == 0.5  # held labels come first


@pytest.mark.parametrize("with_truth", [False, True])
def test_overconfident_guesses_are_warned_of_once_with_both_numbers(with_truth):
    truth = torch.arange(NUM_UNLABELLED) % 2 * (NUM_CLASSES - 1)
    watch = watch_of(0.93, truth if with_truth else None)
    images = "unlabelled" if with_truth else "held"
    text = rf"0\.93 sure .* gets 0\.50 of the {images} images right: .*docs/losing\.md"
    with pytest.warns(UserWarning, match=text) as caught:
        quality = watch.compare(None if with_truth else 0.5)
    assert caught[0].filename == __file__
    assert quality == (pytest.approx(0.93), 0.5 if with_truth else None, 18)
    x, y, u = data()
    watch.mixmatch(x, y, u, ConstantNet([0.0, 0.0, 0.0, 0.0, 9.0]), ids_u=ids_of(0))
    assert watch.compare(0.5).num_guesses == 6  # no second warning
    assert watch.compare(0.5) is None


@pytest.mark.parametrize(
    ("confidence", "accuracy", "most"), [(0.93, 0.84, 0.1), (0.6, 0.95, 0.1), (0.93, 0.5, 0.45)]
)
def test_guesses_that_are_about_as_right_as_sure_are_not_warned_of(confidence, accuracy, most):
    assert watch_of(confidence).compare(accuracy, most=most).confidence == pytest.approx(confidence)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((86.5,), {}, ValueError, r"held_accuracy must be in \[0, 1\], got 86\.5"),
        ((float("nan"),), {}, ValueError, r"held_accuracy must be in \[0, 1\], got nan"),
        (("0.9",), {}, TypeError, "held_accuracy must be a number, got '0.9'"),
        ((), {}, ValueError, "held_accuracy must be given where the truth .* got None"),
        ((0.9,), {"most": 10}, ValueError, r"most must be in \[0, 1\], got 10"),
    ],
)
def test_accuracy_that_is_no_share_is_refused_and_the_guesses_are_kept(
    arguments, options, error, message
):
    watch = watch_of(0.93)
    with pytest.raises(error, match=message):
        watch.compare(*arguments, **options)
    if not options:
        with pytest.raises(error, match=message):
            GuessQuality(0.5, None, 8).gap(*arguments)
    assert watch.read().num_guesses == 18


@pytest.mark.parametrize("insight", ["watch", "tensorboard"])
def test_training_goes_on_as_without_it_to_the_last_bit(insight):
    plain, watched = new_net(), new_net()
    train(builder_of(), plain)
    mixmatch = builder_of()
    if insight == "tensorboard":
        skip_without("matplotlib")
        TensorBoardInsight(mixmatch, Writer(), 2, truth=truth_of(), rows=1)
    else:
        GuessWatch(mixmatch, truth_of())
    train(mixmatch, watched)
    assert parameter_digest(watched) == parameter_digest(plain)
    assert parameter_digest(plain) != parameter_digest(new_net())
    assert int(mixmatch.step) == NUM_STEPS
    assert not watched._forward_hooks


def test_closing_ends_the_watch():
    mixmatch, model = builder_of(), new_net()
    watch = GuessWatch(mixmatch, truth_of())
    watch.close()
    train(mixmatch, model, steps=1)
    assert watch.read() is None


def test_error_in_a_step_leaves_the_model_as_it_came_and_the_watch_intact():
    mixmatch, model, (x, y, u) = builder_of(), new_net(), data()
    watch = GuessWatch(mixmatch, truth_of())
    train(mixmatch, model, steps=1)
    with pytest.raises(ValueError, match="y must have a label per image"):
        mixmatch(x, y[:2], u, model, ids_u=ids_of(1))
    with pytest.raises(ValueError, match="model must return logits"):
        mixmatch(x, y, u, nn.Sequential(model, nn.Linear(5, 3)), ids_u=ids_of(1))
    assert not mixmatch._guess_hooks
    train(mixmatch, model, steps=1)
    assert watch.read().num_guesses == 12


def test_truth_without_ids_is_refused():
    mixmatch, (x, y, u) = builder_of(), data()
    GuessWatch(mixmatch, truth_of())
    with pytest.raises(ValueError, match="ids_u must be passed"):
        mixmatch(x, y, u, new_net())


@pytest.mark.parametrize("truth", [torch.zeros(4), torch.zeros(4, 2, dtype=torch.int64)])
def test_truth_that_is_not_one_row_of_integers_is_refused(truth):
    with pytest.raises(ValueError, match=r"truth must be \[n\] integers"):
        GuessWatch(builder_of(), truth)


def test_function_for_a_model_is_watched_as_the_model_itself():
    model, (x, y, u) = new_net(), data()
    qualities = []
    for guesser in (model, lambda images: model(images)):
        mixmatch = builder_of()
        watch = GuessWatch(mixmatch)
        mixmatch(x, y, u, guesser)
        qualities.append(watch.read())
    assert qualities[0] == qualities[1]


def test_watch_keeps_copies_of_what_others_overwrite():
    memory, ids = torch.empty(6, NUM_CLASSES), torch.arange(6)
    model = new_net().eval()

    def static(images):  # as a captured graph: every pass overwrites the logits of the one before
        return [memory.copy_(model(images))]

    options = {"guess_forward": "separate", "guess_bn": "eval"}
    wanted = builder_of(**options)
    got = builder_of(**options, logits_getter=list.pop)  # which cannot be called twice
    watches = [GuessWatch(builder, truth_of()) for builder in (wanted, got)]
    for builder, guesser in ((wanted, model), (got, static)):
        ids.copy_(torch.arange(6))
        builder(*data(), guesser, ids_u=ids)
        ids.add_(7)
    assert watches[0].read() == watches[1].read()


def test_interval_below_one_is_refused():
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        TensorBoardInsight(builder_of(), Writer(), 0)


def test_previews_and_quality_come_every_n_steps(tmp_path):
    imread = skip_without("matplotlib.image").imread
    mixmatch, model, writer = builder_of(), new_net(), Writer()
    insight = TensorBoardInsight(mixmatch, writer, 2, truth=truth_of(), rows=1)
    train(mixmatch, model)
    insight.close()
    assert [(name, step) for name, _, step in writer.images] == [
        ("mixmatch/preview", step) for step in (0, 2, 4)
    ]
    assert [step for name, _, step in writer.scalars if name == "mixmatch/accuracy"] == [2, 4, 5]

    twin, other = builder_of(), new_net()
    watch = GuessWatch(twin, truth_of())
    for number, (steps, at) in enumerate(((2, 2), (2, 4), (1, 5))):
        watch.paused = True
        path = tmp_path / "preview.png"
        draw_preview(twin, *data(), other, path, ids_u=ids_of(int(twin.step)), rows=1)
        watch.paused = False
        assert (writer.images[number][1] == imread(path)).all()
        train(twin, other, steps)  # the previews' own guesses are not counted
        quality = watch.read()
        assert ("mixmatch/confidence", quality.confidence, at) in writer.scalars
        assert ("mixmatch/accuracy", quality.accuracy, at) in writer.scalars
    train(mixmatch, model, steps=2)
    assert len(writer.images) == 3  # it was closed


def test_events_are_those_that_tensorboard_reads(tmp_path):
    skip_without("matplotlib")
    accumulator = skip_without("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    mixmatch, writer = builder_of(), SummaryWriter(str(tmp_path))
    insight = TensorBoardInsight(mixmatch, writer, 3, truth=truth_of(), rows=1)
    train(mixmatch, new_net())
    insight.close()
    writer.close()
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    images = events.Images("mixmatch/preview")
    assert [image.step for image in images] == [0, 3]
    assert images[0].encoded_image_string.startswith(b"\x89PNG")
    assert [event.step for event in events.Scalars("mixmatch/accuracy")] == [3, 5]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_watching_does_not_synchronise_on_a_gpu():
    mixmatch, model = builder_of().to("cuda"), new_net().to("cuda")
    watch = GuessWatch(mixmatch, truth_of())
    x, y, u = data("cuda")
    mixmatch(x, y, u, model, ids_u=ids_of(0).pin_memory())
    torch.cuda.set_sync_debug_mode("error")
    try:
        mixmatch(x, y, u, model, ids_u=ids_of(1).pin_memory())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    quality = watch.read()
    assert quality.num_guesses == 12
    assert 0 <= quality.accuracy <= 1
