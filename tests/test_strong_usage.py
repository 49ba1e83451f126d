"""Strong engines wherever engines go: batches are made of the views that they make alone."""

import copy
import importlib
import pickle
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from gpu_mixmatch import (
    ColorJitter,
    MixMatch,
    MixMatchLoss,
    RandAugment,
    ResidentLoader,
    SemiSupervisedLoader,
    WeakAugment,
    functional,
)
from tests.factories import ConvNet, random_data, random_images, random_labels
from tests.image_files import write_folder
from tests.no_sync import look_for_no_rows
from tests.recorded_graphs import record_graphs
from tests.skips import skip_without

NUM_CLASSES = 5
SEED = 2**40 + 7
ENGINES = {
    "operations": lambda weak: RandAugment.fixmatch(weak, cutout=4),
    "jitter": lambda weak: ColorJitter(weak, gray=0.3),
}


def strong_engine(name="operations", **fields):
    return ENGINES[name](WeakAugment(padding=1, **fields))


def builder(engine=None, **switches):
    engine = strong_engine() if engine is None else engine
    return MixMatch(engine, NUM_CLASSES, **{"seed": SEED, **switches})


def alone(engine, images, step, view, ids):
    """The view that the engine makes without a builder."""
    return engine(images, SEED, step, view, ids=ids)


def hold(mixmatch):
    """Hold each batch to the views that its engine makes alone, mixed; count the batches."""
    held = []

    def look(module, arguments, options, batch):
        x, _, u, *_ = arguments
        ids = [options.get(name) for name in ("ids_x", "ids_u")]
        engine, step = module.augment, int(batch.step)
        views = [alone(engine, x, step, 0, ids[0])]
        for view in range(1, 1 + module.num_augmentations):
            views.append(alone(engine, u, step, view, ids[1]))
        rows, targets = torch.cat(views), torch.zeros(len(batch.inputs), NUM_CLASSES)
        wanted, _ = functional.mixup(rows, targets, batch.params)
        assert torch.equal(batch.inputs, wanted)
        assert batch.inputs.stride() == wanted.stride()
        assert not torch.equal(rows, torch.cat([module.augment.normalize(x), *views[1:]]))
        held.append(step)

    mixmatch.register_forward_hook(look, with_kwargs=True)
    return held


def grey_data(count=24):
    return random_images(count, (1, 8, 8)), random_labels(count, NUM_CLASSES)


# The builder


@pytest.mark.parametrize(
    ("name", "fields", "switches"),
    [
        ("operations", {}, {}),
        ("operations", {"channels_last": True, "dtype": torch.bfloat16}, {"reuse_buffers": True}),
        ("operations", {"dtype": torch.float16, "layout": "NHWC"}, {"mix": "separate"}),
        ("operations", {"impl": "eager", "layout": "NHWC"}, {"reuse_buffers": True}),
        ("jitter", {"channels_last": True}, {"lam": "batch", "reuse_buffers": True}),
        ("jitter", {"size": 9, "mean": (0.5, 0.4, 0.3)}, {"num_augmentations": 3}),
    ],
)
def test_a_batch_is_made_of_the_views_that_the_engine_makes_alone(name, fields, switches):
    mixmatch = builder(strong_engine(name, **fields), **switches)
    held = hold(mixmatch)
    model = ConvNet(NUM_CLASSES).to(fields.get("dtype", torch.float32))
    for step in range(3):
        x, y, u = random_data(num_classes=NUM_CLASSES, seed=step)
        if fields.get("layout") == "NHWC":
            x, u = (images.permute(0, 2, 3, 1) for images in (x, u))
            u = u.contiguous()  # x is a view of other strides
        ids = {"ids_x": torch.arange(4) * 2**33, "ids_u": torch.arange(6) + step}
        mixmatch(x, y, u, model, **ids if step else {})
    assert held == [0, 1, 2]


def test_a_model_that_writes_into_its_strong_views_changes_no_batch():
    x, y, u = random_data(num_classes=NUM_CLASSES)
    model = ConvNet(NUM_CLASSES)
    for reuse_buffers in (False, True):
        mixmatch = builder(reuse_buffers=reuse_buffers)
        held = hold(mixmatch)
        for _ in range(3):
            mixmatch(x, y, u, lambda images: model(images.mul_(2)))
        assert held == [0, 1, 2]


def test_a_teacher_is_shown_strong_views():
    x, y, u = random_data(num_classes=NUM_CLASSES)
    shown = []
    teacher = ConvNet(NUM_CLASSES)
    teacher.register_forward_pre_hook(lambda _, arguments: shown.append(arguments[0].clone()))
    mixmatch = builder(teacher=teacher)
    mixmatch(x, y, u, ConvNet(NUM_CLASSES))
    views = [alone(mixmatch.augment, u, 0, view, None) for view in (1, 2)]
    assert torch.equal(torch.cat(shown), torch.cat(views))


def test_views_of_a_strong_engine_go_through_from_views():
    x, y, u = random_data(num_classes=NUM_CLASSES)
    model, engine = ConvNet(NUM_CLASSES), strong_engine()
    views = [alone(engine, u, 0, view, None) for view in (1, 2)]
    mine = builder().from_views(alone(engine, x, 0, 0, None), y, views, model)
    theirs = builder()(x, y, u, model)
    assert torch.equal(mine.inputs, theirs.inputs)
    assert torch.equal(mine.targets, theirs.targets)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_of_a_strong_engine_and_of_its_builder_draws_the_same(name, copied):
    engine = strong_engine(name, mean=(0.5, 0.4, 0.3))
    twin = copied(engine)
    assert repr(twin) == repr(engine)
    assert twin.chain == engine.chain
    assert not list(engine.state_dict())
    x, y, u = random_data(num_classes=NUM_CLASSES)
    assert torch.equal(twin(u, 3, 4), engine(u, 3, 4))
    mixmatch, model = builder(engine, reuse_buffers=True), ConvNet(NUM_CLASSES)
    mixmatch(x, y, u, model)
    mine, theirs = copied(mixmatch)(x, y, u, model), mixmatch(x, y, u, model)
    assert int(mine.step) == 1
    assert torch.equal(mine.inputs, theirs.inputs)


@pytest.mark.parametrize("cast", [torch.nn.Module.half, torch.nn.Module.double])
def test_a_cast_of_a_strong_engine_changes_no_view(cast):
    _, _, u = random_data(num_classes=NUM_CLASSES)
    engine = strong_engine(mean=(0.5, 0.4, 0.3))
    before = engine(u)
    assert torch.equal(cast(engine)(u), before)


# Loaders


def file_loader(folder, **options):
    skip_without("nvidia.dali")
    dali = importlib.import_module("gpu_mixmatch.data.dali")
    write_folder(folder / "labelled", 2)
    write_folder(folder / "unlabelled", 4)
    return dali.DaliLoader(folder / "labelled", folder / "unlabelled", 3, 16, **options)


def test_files_that_dali_decodes_get_the_views_that_the_engine_makes_alone(tmp_path):
    mixmatch = builder()
    held, model = hold(mixmatch), ConvNet(NUM_CLASSES)
    with file_loader(tmp_path, seed=4) as loader:
        for batch in islice(loader, 2):
            mixmatch(batch.x, batch.y, batch.u, model, ids_x=batch.ids_x, ids_u=batch.ids_u)
    assert held == [0, 1]


def test_dali_s_loader_augments_by_a_strong_engine(tmp_path):
    engine = strong_engine()
    with file_loader(tmp_path, seed=SEED, augment=engine) as augmented:
        mine = list(islice(augmented, 2))
    with file_loader(tmp_path / "again", seed=SEED) as loader:
        theirs = list(islice(loader, 2))
    for step, (batch, raw) in enumerate(zip(mine, theirs, strict=True)):
        assert torch.equal(batch.x, alone(engine, raw.x, step, 0, raw.ids_x))
        for view in (1, 2):
            wanted = alone(engine, raw.u, step, view, raw.ids_u)
            assert torch.equal(batch.views[view - 1], wanted)


def loaders():
    images, labels = grey_data()
    pairs = TensorDataset(images[:8], labels[:8])
    return {
        "resident": ResidentLoader(images, labels, 4, labelled_indices=range(8)),
        "semi-supervised": SemiSupervisedLoader(pairs, images, 4),
        "plain": zip(
            DataLoader(TensorDataset(images, labels), batch_size=4),
            DataLoader(images, batch_size=4),
            strict=True,
        ),
    }


@pytest.mark.parametrize("kind", ["resident", "semi-supervised", "plain"])
def test_a_loop_over_any_loader_trains_on_strong_views(kind):
    mixmatch, criterion = builder(), MixMatchLoss(10.0, 4)
    held, model = hold(mixmatch), ConvNet(NUM_CLASSES, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for batch in islice(loaders()[kind], 3):
        if kind == "plain":
            (x, y), u = batch
            ids = {}
        else:
            x, y, u, ids_x, ids_u = batch
            ids = {"ids_x": ids_x, "ids_u": ids_u}
        mixed = mixmatch(x, y, u, model, **ids)
        loss = criterion(model(mixed.inputs), mixed).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert held == [0, 1, 2]
    assert all(np.isfinite(losses))


def test_two_ranks_build_the_strong_views_that_one_would():
    images, labels = grey_data()
    model = ConvNet(NUM_CLASSES, 1)

    def batches(size, **place):
        loader = ResidentLoader(images, labels, size, seed=1, **place)
        mixmatch = builder(mix="none")
        return [
            (
                batch,
                mixmatch(batch.x, batch.y, batch.u, model, ids_x=batch.ids_x, ids_u=batch.ids_u),
            )
            for batch in islice(loader, 2)
        ]

    ranks = [batches(4, rank=rank, world_size=2) for rank in (0, 1)]
    for step, (whole, mixed) in enumerate(batches(8, rank=0, world_size=1)):
        parts = [rank[step] for rank in ranks]
        for name, blocks, num_blocks in (("ids_x", 1, 3), ("ids_u", 2, 3)):
            ids = torch.cat([getattr(batch, name) for batch, _ in parts])
            order = [getattr(whole, name).tolist().index(sample) for sample in ids.tolist()]
            first = 0 if name == "ids_x" else 1
            for block in range(first, first + blocks):
                mine = torch.cat([part.inputs.chunk(num_blocks)[block] for _, part in parts])
                assert torch.equal(mine, mixed.inputs.chunk(num_blocks)[block][order])


# Trainers


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_lightning_trains_on_strong_views():
    lightning = skip_without("lightning")
    mixin = importlib.import_module("gpu_mixmatch.integrations.lightning").MixMatchMixin

    class Classifier(mixin, lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = ConvNet(NUM_CLASSES, 1)
            self.mixmatch = builder()
            self.criterion = MixMatchLoss(10.0, 4)

        def forward(self, images):
            return self.model(images)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Classifier()
    held = hold(module.mixmatch)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=3, enable_model_summary=False, **quiet
    )
    trainer.fit(module, loaders()["semi-supervised"])
    assert held == [0, 1, 2]


@pytest.fixture
def accelerator():
    accelerate = skip_without("accelerate")
    state = skip_without("accelerate.state")
    yield accelerate.Accelerator(cpu=True)
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


def test_accelerate_trains_on_strong_views(accelerator):
    model = ConvNet(NUM_CLASSES, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    mixmatch, criterion = builder().to(accelerator.device), MixMatchLoss(10.0, 4)
    held = hold(mixmatch)
    for batch in islice(loaders()["semi-supervised"], 2):
        mixed = mixmatch(batch.x, batch.y, batch.u, model)
        accelerator.backward(criterion(model(mixed.inputs), mixed).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert held == [0, 1]


def test_transformers_trains_on_strong_views(tmp_path):
    transformers = skip_without("transformers")
    skip_without("accelerate")
    trainers = importlib.import_module("gpu_mixmatch.integrations.transformers")
    images, labels = grey_data()

    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return len(images)

        def __getitem__(self, place):
            return {"image": images[place], "label": labels[place]}

    mixmatch = builder()
    held = hold(mixmatch)
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=2,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    trainer = trainers.MixMatchTrainer(
        ConvNet(NUM_CLASSES, 1),
        arguments,
        mixmatch=mixmatch,
        criterion=MixMatchLoss(10.0, 4),
        train_dataset=Pairs(),
        unlabelled_dataset=Pairs(),
    )
    trainer.train()
    assert held == [0, 1]


# One graph


def test_a_training_step_on_strong_views_is_one_graph():
    x, y, u = random_data(num_classes=NUM_CLASSES)
    model, criterion = ConvNet(NUM_CLASSES), MixMatchLoss(75.0, rampup_steps=3)

    def steps(compiled):
        mixmatch = builder(strong_engine(impl="eager"), impl="eager", reuse_buffers=True)

        def step(x, y, u):
            batch = mixmatch(x, y, u, model)
            return batch, criterion(model(batch.inputs), batch).loss

        step = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
        return [(batch.inputs.clone(), loss) for batch, loss in (step(x, y, u) for _ in range(2))]

    torch.compiler.reset()
    mine = steps(True)
    torch.compiler.reset()
    for (inputs, loss), (wanted, plain) in zip(mine, steps(False), strict=True):
        assert torch.equal(inputs, wanted)
        torch.testing.assert_close(loss, plain)


@pytest.mark.parametrize(
    ("name", "impl"), [("operations", "eager"), ("jitter", "eager"), ("operations", "triton")]
)
def test_every_replay_of_a_graph_builds_new_strong_views(monkeypatch, name, impl):
    if torch.cuda.is_available():
        pytest.skip("a real graph is captured on CUDA")
    if impl == "triton":
        skip_without("triton")
    look_for_no_rows(monkeypatch)
    capture = importlib.import_module("gpu_mixmatch.capture").capture
    small = {"num_augmentations": 1, "mix": "none"} if impl == "triton" else {}
    mine, theirs = (builder(strong_engine(name, impl=impl), impl=impl, **small) for _ in range(2))
    model, sizes = ConvNet(NUM_CLASSES), (1, 2) if small else (3, 4)
    batch = random_data(*sizes, num_classes=NUM_CLASSES)
    record_graphs(monkeypatch, lambda: [mine.step])
    build = capture(mine, model, *batch)
    seen = []
    for step in range(3):
        x, y, u = random_data(*sizes, num_classes=NUM_CLASSES, seed=step)
        ids = {"ids_u": torch.arange(sizes[1]) * 7} if step == 2 else {}
        replayed, wanted = build(x, y, u, **ids), theirs(x, y, u, model, **ids)
        assert torch.equal(replayed.inputs, wanted.inputs)
        seen.append(replayed.inputs.clone())
    assert not torch.equal(seen[0], seen[1])


def test_strong_engines_are_ready_for_a_graph_and_say_what_of_them_is_not(monkeypatch):
    check = importlib.import_module("gpu_mixmatch.capture").check_capturable
    skip_without("triton")
    monkeypatch.setattr(MixMatch, "device", property(lambda self: torch.device("cuda", 0)))
    monkeypatch.setattr(MixMatch, "_prepare", lambda self: None)  # nothing is sent to that device
    for engine in (
        RandAugment.fixmatch(),
        ColorJitter(),
        RandAugment.fixmatch(WeakAugment.imagenet(8)),
        WeakAugment.imagenet(8),  # plain torch, but its draws are made on the device
        RandAugment(WeakAugment(blur_sigma=(0, 1))),
    ):
        check(builder(engine))
