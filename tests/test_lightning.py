"""MixMatch under Lightning's Trainer: learns, logs, resumes to the last bit, and runs as DDP."""

import csv
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gpu_mixmatch import MixMatch, MixMatchLoss, ResidentLoader, SemiSupervisedLoader, WeakAugment
from gpu_mixmatch.data import AugmentedBatch, SemiSupervisedBatch
from gpu_mixmatch.data.datasets import load_dataset
from gpu_mixmatch.integrations.lightning import MixMatchMixin, insight_callback
from gpu_mixmatch.recipes.models import build_model
from gpu_mixmatch.types import MixMatchBatch
from tests.digest import parameter_digest
from tests.factories import random_images, random_labels
from tests.processes import environment
from tests.skips import skip_without

L = skip_without("lightning")
CombinedLoader = skip_without("lightning.pytorch.utilities").CombinedLoader
callbacks = skip_without("lightning.pytorch.callbacks")

pytestmark = [
    # Lightning 2.6 with torch 2.13
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    # what Lightning advises: workers for 64 images, a logger interval of these short epochs
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    # what it notes of the mixin's hooks where there is a data module
    pytest.mark.filterwarnings("ignore:You have overridden `.*batch.*` in `LightningModule`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

NUM_CLASSES = 5
EPOCHS = 2
STEPS_PER_EPOCH = 4
TIME_LIMIT = 120  # seconds for a process


@pytest.fixture(autouse=True)
def quiet():
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


class Classifier(MixMatchMixin, L.LightningModule):
    """What a user writes."""

    def __init__(self, num_classes=NUM_CLASSES, lambda_u=10.0, rampup_steps=5, lr=2e-3, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = build_model("cnn", num_classes, 1)
        self.mixmatch = MixMatch(WeakAugment.digits(), num_classes, seed=seed)
        self.criterion = MixMatchLoss(lambda_u, rampup_steps)
        self.lr = lr

    def forward(self, images):
        return self.model(images)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(self.mixmatch.augment.normalize(x))
        self.log("error", 100 * (logits.argmax(dim=1) != y).float().mean())

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(self.mixmatch.augment.normalize(batch[0])).argmax(dim=1)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def images_and_labels():
    return random_images(64, (1, 8, 8)), random_labels(64, NUM_CLASSES)


def semi_supervised(**options):
    images, labels = images_and_labels()
    options = {"steps_per_epoch": STEPS_PER_EPOCH, **options}
    labelled = TensorDataset(images[:20], labels[:20])
    return SemiSupervisedLoader(labelled, TensorDataset(images), 8, **options)


def resident(**options):
    images, labels = images_and_labels()
    options = {"steps_per_epoch": STEPS_PER_EPOCH, **options}
    return ResidentLoader(images, labels, 8, labelled_indices=range(20), **options)


LOADERS = {"semi-supervised": semi_supervised, "resident": resident}


def evaluation_loader():
    return DataLoader(TensorDataset(*images_and_labels()), batch_size=32)


def trainer_of(**options):
    options = {"max_epochs": EPOCHS, "num_sanity_val_steps": 1, **options}
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=options.pop("logger", False),
        enable_checkpointing=any(
            isinstance(callback, callbacks.ModelCheckpoint)
            for callback in options.get("callbacks", [])
        ),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def fit(module, loader, ckpt_path=None, **options):
    trainer = trainer_of(**options)
    trainer.fit(module, loader, evaluation_loader(), ckpt_path=ckpt_path)
    return trainer


def plain_loop(module, loader, *, epochs=EPOCHS, accumulate=1, autocast=False):
    """The same training by hand; returns what every step's loss was."""
    optimizer, outputs = module.configure_optimizers(), []
    for _ in range(epochs):
        for number, batch in enumerate(loader):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                mixed = module.mixmatch(batch.x, batch.y, batch.u, module.model, ids_u=batch.ids_u)
                output = module.criterion(module.model(mixed.inputs), mixed)
            (output.loss / accumulate).backward()
            if (number + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
            outputs.append(output)
    return outputs


# The training step


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_trains_as_a_plain_loop_to_the_last_bit(loader, accumulate, precision):
    mine, plain = Classifier(), Classifier()
    trainer = fit(mine, LOADERS[loader](), precision=precision, accumulate_grad_batches=accumulate)
    plain_loop(plain, LOADERS[loader](), accumulate=accumulate, autocast="bf16" in precision)
    assert parameter_digest(mine.model) == parameter_digest(plain.model)
    assert parameter_digest(mine.model) != parameter_digest(Classifier().model)
    # batches, whatever the optimizer did
    assert int(mine.mixmatch.step) == EPOCHS * STEPS_PER_EPOCH
    assert trainer.global_step == EPOCHS * STEPS_PER_EPOCH // accumulate


def test_guess_runs_in_the_precision_of_the_training_step():
    module, dtypes = Classifier(), []
    module.model.register_forward_hook(
        lambda model, _inputs, logits: dtypes.append((torch.is_grad_enabled(), logits.dtype))
    )
    fit(module, semi_supervised(), precision="bf16-mixed", max_steps=1, limit_val_batches=0)
    assert dtypes == [(False, torch.bfloat16), (True, torch.bfloat16)]


def test_metrics_are_logged_by_name(tmp_path):
    module, plain = Classifier(), Classifier()
    logger = L.pytorch.loggers.CSVLogger(tmp_path)
    fit(module, resident(), logger=logger, log_every_n_steps=1)
    outputs = plain_loop(plain, resident())
    with open(Path(logger.log_dir, "metrics.csv")) as file:
        rows = [row for row in csv.DictReader(file) if row["loss_x"]]
    assert len(rows) == len(outputs) == EPOCHS * STEPS_PER_EPOCH
    for row, output in zip(rows, outputs, strict=True):
        for name, value in output._asdict().items():
            assert float(row[name]) == pytest.approx(value.item(), rel=1e-6), name
    weights = [float(row["weight_u"]) for row in rows]
    assert weights == pytest.approx([0, 2, 4, 6, 8] + [10] * 3)


def test_batches_of_validation_sanity_check_test_and_prediction_are_left_as_they_are():
    seen = []

    class Watched(Classifier):
        def _watch(self, batch):
            seen.append((self.trainer.state.stage.value, batch))

        def training_step(self, batch, batch_idx):
            self._watch(batch)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self._watch(batch)

        test_step = validation_step

        def predict_step(self, batch, batch_idx):
            self._watch(batch)
            return batch[1]

    module, wanted = Watched(), list(evaluation_loader())
    trainer = fit(module, semi_supervised(), max_epochs=1)
    trainer.test(module, evaluation_loader(), verbose=False)
    trainer.predict(module, evaluation_loader())
    stages = [stage for stage, _ in seen]
    assert (
        stages
        == ["sanity_check"] + ["train"] * 4 + ["validate"] * 2 + ["test"] * 2 + ["predict"] * 2
    )
    for stage in ("sanity_check", "validate", "test", "predict"):
        batches = [batch for where, batch in seen if where == stage]
        for (x, y), (wanted_x, wanted_y) in zip(batches, wanted, strict=False):
            assert torch.equal(x, wanted_x)
            assert torch.equal(y, wanted_y)
    assert all(isinstance(batch, MixMatchBatch) for stage, batch in seen if stage == "train")
    assert int(module.mixmatch.step) == STEPS_PER_EPOCH


def test_a_semi_supervised_batch_of_validation_is_left_alone_too():
    seen = []

    class Watched(Classifier):
        def validation_step(self, batch, batch_idx):
            seen.append(batch)

    module = Watched()
    trainer_of(max_epochs=1).fit(module, resident(), resident())
    assert {type(batch) for batch in seen} == {SemiSupervisedBatch}
    assert int(module.mixmatch.step) == STEPS_PER_EPOCH


def test_ids_stay_on_the_cpu():
    batch = next(iter(semi_supervised()))
    moved = Classifier().transfer_batch_to_device(batch, torch.device("meta"), 0)
    devices = {name: value.device.type for name, value in moved._asdict().items()}
    assert devices == {"x": "meta", "y": "meta", "u": "meta", "ids_x": "cpu", "ids_u": "cpu"}


def test_other_batches_move_as_lightning_moves_them():
    moved = Classifier().transfer_batch_to_device(
        {"labelled": [torch.zeros(2), torch.zeros(2)]}, torch.device("meta"), 0
    )
    assert [tensor.device.type for tensor in moved["labelled"]] == ["meta", "meta"]


def test_logits_getter_is_heeded():
    class Wrapped(Classifier):
        def __init__(self):
            super().__init__()
            self.mixmatch = MixMatch(
                WeakAugment.digits(), NUM_CLASSES, logits_getter=lambda output: output["logits"]
            )

        def forward(self, images):
            return {"logits": self.model(images)}

    wrapped, plain = Wrapped(), Classifier()
    fit(wrapped, resident(), limit_val_batches=0, num_sanity_val_steps=0)
    fit(plain, resident())
    assert parameter_digest(wrapped.model) == parameter_digest(plain.model)


# The two streams


def two_dataloaders():
    images, labels = images_and_labels()
    labelled = DataLoader(TensorDataset(images[:20], labels[:20]), batch_size=8)
    return labelled, DataLoader(images, batch_size=12)


@pytest.mark.parametrize("kind", ["dict", "list", "tuples of unlabelled"])
def test_combined_loader_gives_the_two_streams(kind):
    labelled, unlabelled = two_dataloaders()
    if kind == "tuples of unlabelled":
        unlabelled = DataLoader(TensorDataset(*images_and_labels()), batch_size=12)
    pair = {"labelled": labelled, "unlabelled": unlabelled}
    loader = CombinedLoader([labelled, unlabelled] if kind == "list" else pair, "max_size_cycle")
    module, plain = Classifier(), Classifier()
    fit(module, loader, max_epochs=1)

    optimizer = plain.configure_optimizers()
    first = list(labelled)
    for number, u in enumerate(two_dataloaders()[1]):
        x, y = first[number % len(first)]
        batch = plain.mixmatch(x, y, u, plain.model)
        plain.criterion(plain.model(batch.inputs), batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert number + 1 == 6
    assert parameter_digest(module.model) == parameter_digest(plain.model)


def test_views_that_a_loader_augmented_are_mixed():
    generator = torch.Generator().manual_seed(0)

    def batch():
        x = torch.rand(8, 1, 8, 8, generator=generator)
        y = torch.randint(0, NUM_CLASSES, (8,), generator=generator)
        views = torch.rand(2, 12, 1, 8, 8, generator=generator)
        ids_u = torch.randint(0, 1000, (12,), generator=generator)
        return AugmentedBatch(x, y, views, torch.arange(8), ids_u)

    given = [batch() for _ in range(3)]
    module, plain = Classifier(), Classifier()
    fit(module, DataLoader(given, batch_size=None), max_epochs=1)
    optimizer = plain.configure_optimizers()
    for batch in given:
        mixed = plain.mixmatch.from_views(
            batch.x, batch.y, batch.views, plain.model, ids_u=batch.ids_u
        )
        plain.criterion(plain.model(mixed.inputs), mixed).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert parameter_digest(module.model) == parameter_digest(plain.model)


@pytest.mark.parametrize("stream", [0, 1])
def test_one_stream_alone_is_refused(stream):
    with pytest.raises(TypeError, match=r"a training batch must be .* CombinedLoader"):
        fit(Classifier(), two_dataloaders()[stream], num_sanity_val_steps=0)


def test_bases_in_the_wrong_order_are_refused_where_the_class_is_made():
    message = r"Wrong must name MixMatchMixin before LightningModule .* got LightningModule, MixM"
    with pytest.raises(TypeError, match=message):
        type("Wrong", (L.LightningModule, MixMatchMixin), {})
    with pytest.raises(TypeError, match="Later must name MixMatchMixin before LightningModule"):
        type("Later", (type("Own", (L.LightningModule,), {}), MixMatchMixin), {})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "mixmatch",
            None,
            r"self\.mixmatch must be such as MixMatch.* of Classifier, got nothing",
        ),
        (
            "criterion",
            75.0,
            r"self\.criterion must be such as MixMatchLoss.* got 75\.0 of type",
        ),
    ],
)
def test_a_module_that_lacks_a_part_is_told_which(name, value, message):
    module = Classifier()
    delattr(module, name)
    if value is not None:
        setattr(module, name, value)
    with pytest.raises(TypeError, match=message):
        fit(module, semi_supervised(), num_sanity_val_steps=0)


def test_loader_of_another_rank_is_refused():
    with pytest.raises(RuntimeError, match="must be of rank 0 of 1 processes, got rank 1 of 2"):
        fit(Classifier(), semi_supervised(rank=1, world_size=2))


# Checkpoints


class Stop(L.Callback):
    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_end(self, trainer, module, *_):
        if int(module.mixmatch.step) == self.batches:
            trainer.should_stop = True


def keep_all(folder, **options):
    return callbacks.ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **options)


def test_checkpoint_holds_the_builders_seed_and_step(tmp_path):
    module = Classifier(seed=7)
    fit(module, resident(), callbacks=[keep_all(tmp_path, every_n_train_steps=3)])
    saved = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    assert int(saved["state_dict"]["mixmatch.seed"]) == 7
    assert int(saved["state_dict"]["mixmatch.step"]) == 6
    loaded = Classifier.load_from_checkpoint(tmp_path / "step=6.ckpt", weights_only=True)
    assert int(loaded.mixmatch.step) == 6


SAVING = {
    "in mid-epoch": {"every_n_train_steps": 3},
    "with an epoch's last batch": {"every_n_train_steps": STEPS_PER_EPOCH},
    "after validation": {"every_n_epochs": 1},
    # the mode tells it from the one before
    "at an epoch's end": {"every_n_epochs": 1, "save_on_train_epoch_end": True, "mode": "max"},
}
# Lightning's count of epochs is ahead by one where such a run resumes after an epoch
STEPS = {"max_steps": EPOCHS * STEPS_PER_EPOCH, "max_epochs": -1}
LENGTHS = {
    "epochs": {"max_epochs": EPOCHS},
    "steps": STEPS,
    "validation in mid-epoch": {"max_epochs": EPOCHS, "val_check_interval": 2},
    "epochs cut short": {"max_epochs": EPOCHS, "limit_train_batches": 3},
}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("loader", LOADERS)
def test_resumed_run_ends_with_the_same_weights_to_the_last_bit(tmp_path, loader, length):
    saving = [keep_all(tmp_path / name, **options) for name, options in SAVING.items()]
    whole = Classifier()
    fit(whole, LOADERS[loader](), callbacks=saving, **LENGTHS[length])
    checkpoints = [
        path
        for path in tmp_path.glob("*/*.ckpt")
        if f"step={EPOCHS * STEPS_PER_EPOCH}." not in path.name
    ]
    assert {path.parent.name for path in checkpoints} == set(SAVING)
    wrong = []
    for path in checkpoints:
        resumed = Classifier(seed=3)  # everything comes from the checkpoint
        fit(resumed, LOADERS[loader](seed=5), ckpt_path=path, **LENGTHS[length])
        if parameter_digest(resumed) != parameter_digest(whole):
            wrong.append(f"{path.parent.name}/{path.name}")
    assert wrong == []


@pytest.mark.parametrize("loader", LOADERS)
def test_run_resumes_again_and_again(tmp_path, loader):
    whole = Classifier()
    fit(whole, LOADERS[loader](), **STEPS)
    path = None
    for step in (4, 5, 6, 7):
        module = Classifier(seed=3 if path else 0)
        saving = keep_all(tmp_path, every_n_train_steps=1)
        fit(module, LOADERS[loader](), ckpt_path=path, callbacks=[saving], **STEPS)
        assert parameter_digest(module) == parameter_digest(whole), f"resumed from {path}"
        versions = tmp_path.glob(f"step={step}*.ckpt")
        path = max(versions, key=lambda path: path.stat().st_mtime_ns)


@pytest.mark.parametrize("stop", [3, 4])
@pytest.mark.parametrize("loader", LOADERS)
def test_run_that_was_stopped_in_good_order_resumes(tmp_path, loader, stop):
    whole, stopped, resumed = Classifier(), Classifier(), Classifier(seed=3)
    fit(whole, LOADERS[loader](), **STEPS)
    fit(stopped, LOADERS[loader](), callbacks=[Stop(stop)], **STEPS).save_checkpoint(
        tmp_path / "stopped.ckpt"
    )
    assert int(stopped.mixmatch.step) == stop
    fit(resumed, LOADERS[loader](), ckpt_path=tmp_path / "stopped.ckpt", **STEPS)
    assert parameter_digest(resumed) == parameter_digest(whole)


def test_run_with_averaged_weights_resumes_to_the_last_bit(tmp_path):
    def average():
        return callbacks.EMAWeightAveraging(decay=0.9)

    whole, resumed = Classifier(), Classifier(seed=3)
    saving = keep_all(tmp_path, every_n_train_steps=3)
    fit(whole, resident(), callbacks=[average(), saving])
    path = tmp_path / "step=3.ckpt"
    fit(resumed, resident(), ckpt_path=path, callbacks=[average()])
    assert parameter_digest(resumed.model) == parameter_digest(whole.model)
    plain = Classifier()
    fit(plain, resident())
    assert parameter_digest(plain.model) != parameter_digest(whole.model)


def test_run_with_accumulated_gradients_resumes_between_two_optimizer_steps(tmp_path):
    options = {"accumulate_grad_batches": 2}
    whole, resumed = Classifier(), Classifier(seed=3)
    saving = keep_all(tmp_path, every_n_train_steps=1)
    fit(whole, resident(), callbacks=[saving], **options)
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert int(saved["state_dict"]["mixmatch.step"]) == 6
    fit(resumed, resident(), ckpt_path=tmp_path / "step=3.ckpt", **options)
    assert parameter_digest(resumed) == parameter_digest(whole)


@pytest.mark.parametrize("loader", LOADERS)
def test_second_fit_begins_the_order_anew(loader):
    loader = LOADERS[loader]()
    fit(Classifier(), loader, max_epochs=1)
    again, fresh = Classifier(), Classifier()
    fit(again, loader)
    fit(fresh, resident())
    assert parameter_digest(again) == parameter_digest(fresh)


def test_epochs_that_are_cut_short_all_have_their_batches():
    for loader in LOADERS.values():
        seen = []

        class Watched(Classifier):
            def on_after_batch_transfer(self, batch, dataloader_idx):
                if self.trainer.training:
                    seen.append(batch.ids_u)  # noqa: B023
                return super().on_after_batch_transfer(batch, dataloader_idx)

        fit(Watched(), loader(), limit_train_batches=3)
        order = resident().order
        wanted = [order.indices_u(step)[0] for step in (0, 1, 2, 4, 5, 6)]
        assert torch.equal(torch.stack(seen), torch.stack(wanted))


# Several processes, and one that is killed

KILLED_RUN = """
import logging, sys, time, warnings
warnings.simplefilter("ignore")
from tests.test_lightning import Classifier, fit, keep_all, resident
from lightning.pytorch.callbacks import LambdaCallback
slow = LambdaCallback(on_train_batch_end=lambda *_: time.sleep(0.2))
fit(Classifier(), resident(), callbacks=[keep_all(sys.argv[1], every_n_train_steps=1), slow])
"""


def script_of(folder, source):
    path = folder / "script.py"
    path.write_text(source)
    return path


@pytest.mark.slow
def test_run_that_was_killed_resumes_to_the_last_bit(tmp_path):
    script, saved = script_of(tmp_path, KILLED_RUN), tmp_path / "saved"
    process = subprocess.Popen([sys.executable, script, saved], env=environment())
    try:
        deadline = time.monotonic() + TIME_LIMIT
        while time.monotonic() < deadline and process.poll() is None:
            if (saved / "step=3.ckpt").exists():
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        assert process.wait(timeout=TIME_LIMIT) == -signal.SIGKILL
    whole, resumed = Classifier(), Classifier(seed=3)
    fit(whole, resident())
    fit(resumed, resident(), ckpt_path=saved / "step=2.ckpt")
    assert parameter_digest(resumed) == parameter_digest(whole)


TWO_PROCESSES = """
import json, sys, warnings
warnings.simplefilter("ignore")
import lightning as L, torch
from pathlib import Path
from lightning.pytorch.utilities import CombinedLoader
from tests.test_lightning import LOADERS, Classifier, evaluation_loader, keep_all, two_dataloaders

out = Path(sys.argv[1])


class Data(L.LightningDataModule):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def train_dataloader(self):
        if self.kind == "combined":
            return CombinedLoader(list(two_dataloaders()), "max_size_cycle")
        return LOADERS[self.kind]()

    def val_dataloader(self):
        return evaluation_loader()


class Watched(Classifier):
    def __init__(self):
        super().__init__()
        self.lam, self.ids, self.images = [], [], []

    def on_after_batch_transfer(self, batch, dataloader_idx):
        built = super().on_after_batch_transfer(batch, dataloader_idx)
        if self.trainer.training:
            self.ids.append(getattr(batch, "ids_u", torch.empty(0)).tolist())
            self.images.append(batch[0][0].flatten(1).tolist())
            self.lam.append(built.params.lam.tolist())
        return built


def run(kind, ckpt_path=None, callbacks=()):
    module = Watched()
    trainer = L.Trainer(
        strategy="ddp", devices=2, accelerator="cpu", max_epochs=2, logger=False,
        enable_checkpointing=bool(callbacks), callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(module, datamodule=Data(kind), ckpt_path=ckpt_path)
    loader = trainer.train_dataloader
    loader = loader[1] if kind == "combined" else loader
    return trainer, {
        "weights": [p.flatten().tolist() for p in module.model.parameters()],
        "step": int(module.mixmatch.step),
        "lam": module.lam, "ids": module.ids, "images": module.images,
        "loader": type(loader).__name__,
        "sampler": type(getattr(loader, "sampler", None)).__name__,
    }


results = {}
for kind in ("semi-supervised", "resident", "combined"):
    saving = [keep_all(out / "saved", every_n_train_steps=3)] if kind == "resident" else []
    trainer, results[kind] = run(kind, callbacks=saving)
_, results["resumed"] = run("resident", out / "saved" / "step=3.ckpt")
(out / f"rank{trainer.global_rank}.json").write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    process = subprocess.Popen(
        [sys.executable, script_of(folder, TWO_PROCESSES), folder],
        env=environment(),
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    try:
        _, errors = process.communicate(timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # both ranks
        raise
    assert process.returncode == 0, errors
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*LOADERS, "combined"])
def test_ranks_draw_differently_and_end_with_the_same_weights(two_processes, kind):
    first, second = (result[kind] for result in two_processes)
    assert first["weights"] == second["weights"]
    assert first["step"] == second["step"] == len(first["lam"]) == len(second["lam"]) > 0
    for mine, other in zip(first["lam"], second["lam"], strict=True):
        assert not set(mine) & set(other)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOADERS)
def test_lightning_leaves_the_shards_of_our_loaders_alone(two_processes, kind):
    for rank, result in enumerate(two_processes):
        result = result[kind]
        order = LOADERS[kind](rank=rank, world_size=2).order
        steps = EPOCHS * STEPS_PER_EPOCH
        assert result["ids"] == [order.indices_u(step)[0].tolist() for step in range(steps)]
        assert result["loader"] == type(LOADERS[kind]()).__name__
        assert "Distributed" not in result["sampler"]


@pytest.mark.slow
def test_lightning_shards_the_dataloaders_of_a_combined_loader(two_processes):
    first, second = (result["combined"] for result in two_processes)
    assert first["sampler"] == second["sampler"] == "DistributedSampler"
    for mine, other in zip(first["images"], second["images"], strict=True):
        assert not {tuple(image) for image in mine} & {tuple(image) for image in other}


@pytest.mark.slow
def test_two_processes_take_the_step_of_their_mean_loss(two_processes):
    module = Classifier()
    optimizer = module.configure_optimizers()
    loaders = [resident(rank=rank, world_size=2) for rank in (0, 1)]
    for _ in range(EPOCHS):
        for batches in zip(*loaders, strict=True):
            step = module.mixmatch.step.clone()
            for rank, batch in enumerate(batches):
                module.mixmatch.step = step.clone()
                mixed = module.mixmatch(
                    batch.x,
                    batch.y,
                    batch.u,
                    module.model,
                    ids_x=8 * rank + torch.arange(8),
                    ids_u=batch.ids_u,
                )
                (module.criterion(module.model(mixed.inputs), mixed).loss / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
    wanted = torch.cat([p.detach().flatten() for p in module.model.parameters()])
    weights = two_processes[0]["resident"]["weights"]
    got = torch.cat([torch.tensor(values) for values in weights])
    # sums of gradients in another order, and Adam divides small ones by themselves
    assert (got - wanted).abs().max() < 1e-4
    initial = torch.cat([p.detach().flatten() for p in Classifier().model.parameters()])
    assert (initial - wanted).abs().max() > 1e-2


@pytest.mark.slow
def test_two_processes_resume_to_the_last_bit(two_processes):
    for result in two_processes:
        assert result["resumed"]["weights"] == result["resident"]["weights"]
        assert result["resumed"]["step"] == result["resident"]["step"]
        assert result["resumed"]["lam"] == result["resident"]["lam"][3:]


# On digits


class Digits(L.LightningDataModule):
    """What a user writes: loaders are made where the process group stands."""

    def __init__(self, steps, seed):
        super().__init__()
        self.steps, self.seed = steps, seed
        self.digits = load_dataset("digits")

    def train_dataloader(self):
        labelled, unlabelled = self.digits.split(40, self.seed)
        return SemiSupervisedLoader(
            labelled, unlabelled, batch_size=64, steps_per_epoch=self.steps, seed=self.seed
        )

    def test_dataloader(self):
        images = TensorDataset(self.digits.test_images, self.digits.test_labels)
        return DataLoader(images, batch_size=500)

    val_dataloader = test_dataloader


class SupervisedOnly(Classifier):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch

    def training_step(self, batch, batch_idx):
        augment = self.mixmatch.augment
        draws = augment.draw_batch(0, self.global_step, len(batch.x), 0, 1)
        logits = self(augment.build(batch.x, batch.x[:0], draws, 1))
        return nn.functional.cross_entropy(logits, batch.y)


def error_on_digits(kind, seed):
    steps = 200
    module = kind(num_classes=10, lambda_u=75.0, rampup_steps=steps // 2, seed=seed)
    average = callbacks.EMAWeightAveraging(decay=1 - 10 / steps)
    trainer = trainer_of(max_epochs=1, callbacks=[average])
    trainer.fit(module, datamodule=Digits(steps, seed))
    validated = trainer.callback_metrics["error"].item()
    (tested,) = trainer.test(module, datamodule=Digits(steps, seed), verbose=False)
    assert tested["error"] == pytest.approx(validated)
    return tested["error"]


@pytest.mark.slow
def test_lightning_learns_digits_with_half_the_error_of_supervised_only():
    seed = 1
    supervised = error_on_digits(SupervisedOnly, seed)
    assert 4 < supervised < 15
    assert error_on_digits(Classifier, seed) <= 0.5 * supervised


# Insight


def test_insight_callback_writes_to_tensorboard_and_leaves_training_alone(tmp_path):
    accumulator = skip_without("tensorboard.backend.event_processing.event_accumulator")
    skip_without("matplotlib")
    truth = images_and_labels()[1]
    with_it, without = Classifier(), Classifier()
    fit(without, resident())
    logger = L.pytorch.loggers.TensorBoardLogger(tmp_path)
    insight = insight_callback(every_n_steps=3, truth=truth, rows=1)
    fit(with_it, resident(), callbacks=[insight], logger=logger)
    assert parameter_digest(with_it) == parameter_digest(without)
    events = accumulator.EventAccumulator(logger.log_dir)
    events.Reload()
    assert [event.step for event in events.Images("mixmatch/preview")] == [0, 3, 6]
    for name in ("mixmatch/confidence", "mixmatch/accuracy"):
        values = events.Scalars(name)
        assert [event.step for event in values] == [3, 6, 8]
        assert all(0 < event.value < 1 for event in values)
    assert len(with_it.mixmatch._forward_hooks) == len(with_it.mixmatch._forward_pre_hooks) == 0


def test_insight_callback_without_tensorboard_logger_is_refused():
    with pytest.raises(ValueError, match="must have a TensorBoardLogger"):
        fit(Classifier(), resident(), callbacks=[insight_callback()])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every_n_steps": 0}, ValueError, "every_n_steps must be at least 1, got 0"),
        ({"every_n_steps": 1.5}, TypeError, "every_n_steps must be an integer, got 1.5"),
        ({"rows": True}, TypeError, "rows must be an integer, got True"),
        ({"truth": [0, 1]}, TypeError, r"truth must be a tensor or a numpy array .* got \[0, 1\]"),
        ({"truth": torch.rand(3)}, ValueError, r"truth must be \[n\] integers, got a tensor \[3\]"),
        ({"class_names": "abc"}, TypeError, "class_names must be a list of names, got 'abc'"),
    ],
)
def test_wrong_arguments_of_the_insight_callback_are_named_at_once(options, error, message):
    with pytest.raises(error, match=message):
        insight_callback(**options)


def test_insight_callback_without_lightning_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch.callbacks", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[lightning\]"'):
        insight_callback()


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_lightning_trains_on_a_gpu(precision):
    module = Classifier()
    initial = parameter_digest(module.model)
    trainer = L.Trainer(
        accelerator="gpu",
        devices=1,
        max_epochs=EPOCHS,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, semi_supervised(device="cuda"), evaluation_loader())
    assert module.mixmatch.device.type == "cuda"
    assert int(module.mixmatch.step) == EPOCHS * STEPS_PER_EPOCH
    assert parameter_digest(module.model) != initial
    assert all(p.isfinite().all() for p in module.parameters())
