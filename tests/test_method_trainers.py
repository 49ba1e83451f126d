"""Any method under any trainer: the steps of a plain loop, both orders of guessing, resumption."""

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
from itertools import islice
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gpu_mixmatch import (
    ICT,
    UDA,
    ConsistencyLoss,
    FixMatch,
    FlexMatch,
    FreeMatch,
    FreeThreshold,
    MeanTeacher,
    MixMatch,
    MixMatchLoss,
    RandAugment,
    ReMixMatch,
    ReMixMatchLoss,
    ResidentLoader,
    SemiSupervisedLoader,
    SoftMatch,
    WeakAugment,
)
from gpu_mixmatch.data import AugmentedBatch
from gpu_mixmatch.recipes.models import build_model
from tests.digest import parameter_digest
from tests.factories import random_images, random_labels
from tests.processes import environment
from tests.skips import skip_without

NUM_CLASSES, LABELLED, UNLABELLED, BATCH, RATIO = 5, 8, 31, 3, 3
STEPS, SAVED = 6, 4
TIME_LIMIT = 120  # seconds for a process


def strong_of(weak):
    return RandAugment.fixmatch(weak, cutout=3)


def method_of(kind, **options):
    """A builder, such that some guesses are kept and some are not, and its loss."""
    weak = WeakAugment.digits()
    engines = weak, strong_of(weak), NUM_CLASSES
    options = {"seed": 3, **options}
    if kind == "fixmatch":
        return FixMatch(*engines, threshold=0.3, **options), ConsistencyLoss(rampup_steps=3)
    if kind == "uda":
        loss = ConsistencyLoss(loss_u="kl", tsa="linear", tsa_steps=STEPS)
        return UDA(*engines, threshold=0.3, **options), loss
    if kind == "softmatch":
        return SoftMatch(*engines, **options), ConsistencyLoss()
    if kind == "freematch":
        threshold = FreeThreshold(momentum=0.5)
        return FreeMatch(*engines, threshold=threshold, **options), ConsistencyLoss(lambda_fair=0.1)
    if kind == "flexmatch":
        options = {"num_unlabelled": UNLABELLED, "threshold": 0.4, **options}
        return FlexMatch(*engines, **options), ConsistencyLoss()
    if kind == "pi":
        return MeanTeacher(weak, NUM_CLASSES, **options), ConsistencyLoss(50.0, loss_u="mse")
    if kind == "ict":
        return ICT.fixmatch(weak, NUM_CLASSES, **options), ConsistencyLoss(50.0, loss_u="mse")
    if kind == "remixmatch":
        options = {"num_strong": 2, "rotation": True, **options}
        return ReMixMatch(*engines, **options), ReMixMatchLoss(lambda_rot=0.5, rampup_steps=3)
    assert kind == "mixmatch"
    return MixMatch(weak, NUM_CLASSES, **options), MixMatchLoss(10.0, 3)


class TurnedNet(nn.Module):
    """Also tells by how many quarters an image was turned."""

    def __init__(self):
        super().__init__()
        self.net = build_model("cnn", NUM_CLASSES + 4, 1)

    def forward(self, images):
        logits = self.net(images)
        return logits[:, :NUM_CLASSES], logits[:, NUM_CLASSES:]


def network(seed=0, kind=None):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TurnedNet() if kind == "remixmatch" else build_model("cnn", NUM_CLASSES, 1)


def loader_of(kind=SemiSupervisedLoader, **options):
    images, labels = random_images(UNLABELLED, (1, 8, 8)), random_labels(UNLABELLED, NUM_CLASSES)
    options = {"ratio": RATIO, **options}
    if kind is ResidentLoader:
        return ResidentLoader(images, labels, BATCH, labelled_indices=range(LABELLED), **options)
    labelled = TensorDataset(images[:LABELLED], labels[:LABELLED])
    return SemiSupervisedLoader(labelled, TensorDataset(images), BATCH, **options)


def batches_of(loader, count):
    """Over as many epochs as it takes."""
    while count > 0:
        for batch in islice(loader, count):
            count -= 1
            yield batch


class Run(NamedTuple):
    model: nn.Module
    method: nn.Module
    outputs: list


def plain_loop(kind, steps=STEPS, *, guess_first=None, with_ids=True, clip=False):
    """The training that all trainers must do."""
    model, (method, criterion) = network(kind=kind), method_of(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    if guess_first is None:
        guess_first = not method.guesses_in_loss
    outputs = []
    for x, y, u, _, ids_u in batches_of(loader_of(), steps):
        batch = method(x, y, u, model if guess_first else None, ids_u=ids_u if with_ids else None)
        outputs.append(criterion(method.for_loss(model(batch.inputs)), batch))
        outputs[-1].loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return Run(model, method, outputs)


def assert_same_state(method, other):
    wanted = other.state_dict()
    assert list(method.state_dict()) == list(wanted)
    for name, value in method.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_the_methods_keep_some_guesses_and_not_others():
    for kind in ("fixmatch", "freematch"):
        kept = torch.stack([output.kept for output in plain_loop(kind).outputs])
        assert 0.1 < kept.mean() < 0.95, (kind, kept)


# Lightning

L = skip_without("lightning")
integration = importlib.import_module("gpu_mixmatch.integrations.lightning")
callbacks = skip_without("lightning.pytorch.callbacks")

pytestmark = [
    # Lightning 2.6 with torch 2.13
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture(autouse=True)
def quiet():
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


class Classifier(integration.MixMatchMixin, L.LightningModule):
    """What a user writes."""

    def __init__(self, kind, *, guess_first=None, seed=0, **options):
        super().__init__()
        self.model = network(seed, kind)
        self.method, self.criterion = method_of(kind, **options)
        self.guess_first = guess_first

    def forward(self, images):
        return self.model(images)

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=0.05)


def fit(module, loader=None, ckpt_path=None, **options):
    saving = [c for c in options.get("callbacks", []) if isinstance(c, callbacks.ModelCheckpoint)]
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        max_epochs=-1,
        enable_checkpointing=bool(saving),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"devices": 1, "logger": False, **options},
    )
    trainer.fit(module, loader_of() if loader is None else loader, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize(
    ("kind", "guess_first"),
    [("fixmatch", None), ("fixmatch", True), ("uda", False), ("softmatch", True),
     ("freematch", None), ("flexmatch", None), ("flexmatch", True), ("pi", None), ("ict", None),
     ("remixmatch", None)],
)  # fmt: skip
def test_lightning_trains_by_any_method_as_a_plain_loop_to_the_last_bit(kind, guess_first):
    module, run = (
        Classifier(kind, guess_first=guess_first),
        plain_loop(kind, guess_first=guess_first),
    )
    trainer = fit(module)
    assert parameter_digest(module.model) == parameter_digest(run.model)
    assert parameter_digest(module.model) != parameter_digest(network())
    assert_same_state(module.method, run.method)
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    wanted = {name: value.item() for name, value in run.outputs[-1]._asdict().items()}
    assert logged == pytest.approx(wanted, rel=1e-6)
    parts = {"loss_kl", "loss_rot"} if kind == "remixmatch" else {"kept", "mean_weight"}
    assert {"loss_x", "loss_u", *parts} <= set(logged)


def test_orders_of_guessing_differ_where_there_is_batch_norm():
    first, later = (plain_loop("fixmatch", guess_first=order) for order in (True, False))
    assert parameter_digest(first.model) != parameter_digest(later.model)


@pytest.mark.parametrize("loader", [SemiSupervisedLoader, ResidentLoader])
@pytest.mark.parametrize("kind", ["flexmatch", "freematch"])
def test_lightning_resumes_what_was_learnt_of_guesses_to_the_last_bit(tmp_path, kind, loader):
    whole = Classifier(kind)
    saving = callbacks.ModelCheckpoint(
        tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=SAVED
    )
    fit(whole, loader_of(loader), callbacks=[saving])
    resumed = Classifier(kind, seed=5)
    fit(resumed, loader_of(loader, seed=9), ckpt_path=tmp_path / f"step={SAVED}.ckpt")
    assert parameter_digest(resumed.model) == parameter_digest(whole.model)
    assert_same_state(resumed.method, whole.method)
    fresh = method_of(kind)[0].state_dict()
    learnt = [name for name in fresh if name not in ("seed", "step")]
    assert learnt
    assert not any(torch.equal(whole.method.state_dict()[name], fresh[name]) for name in learnt)


def test_a_combined_loader_feeds_a_method_that_needs_no_ids():
    images, labels = random_images(24, (1, 8, 8)), random_labels(24, NUM_CLASSES)
    combined = skip_without("lightning.pytorch.utilities").CombinedLoader
    pair = [DataLoader(TensorDataset(images[:8], labels[:8]), 2), DataLoader(images, 6)]
    module = Classifier("fixmatch")
    fit(module, combined(pair, "max_size_cycle"))
    assert int(module.method.step) == STEPS
    with pytest.raises(ValueError, match="ids_u must be given"):
        fit(Classifier("flexmatch"), combined(pair, "max_size_cycle"))


def test_a_module_sets_one_builder_whose_batches_can_be_made_as_it_asks():
    with pytest.raises(ValueError, match="guess_first must be True or None for MixMatch"):
        fit(Classifier("mixmatch", guess_first=False))
    with pytest.raises(TypeError, match="guess_first must be True or False, got 'no'"):
        fit(Classifier("fixmatch", guess_first="no"))
    module = Classifier("fixmatch")
    module.mixmatch = method_of("mixmatch")[0]
    with pytest.raises(TypeError, match="and not both, got MixMatch and FixMatch"):
        fit(module)
    module = Classifier("fixmatch")
    module.criterion = MixMatchLoss()
    with pytest.raises(TypeError, match="batch must be a MixMatchBatch, got"):
        fit(module)


def test_views_that_a_loader_augmented_are_no_weak_and_strong_ones():
    x = torch.rand(2, 1, 8, 8)
    batch = AugmentedBatch(x, torch.zeros(2).long(), x[None], torch.arange(2), torch.arange(2))
    with pytest.raises(TypeError, match=r"of FixMatch must hold .* with augment=None"):
        fit(Classifier("fixmatch"), DataLoader([batch], batch_size=None))


TWO_PROCESSES = """
import json, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from tests.test_method_trainers import Classifier, fit, loader_of

class Sharded(Classifier):
    def train_dataloader(self):
        return loader_of()

import lightning as L
module = Sharded("flexmatch")
trainer = L.Trainer(accelerator="cpu", strategy="ddp", devices=2, max_steps=4, max_epochs=-1,
                    logger=False, enable_checkpointing=False, enable_progress_bar=False,
                    enable_model_summary=False)
trainer.fit(module)
state = {name: value.tolist() for name, value in module.method.state_dict().items()}
weights = [p.flatten().tolist() for p in module.model.parameters()]
Path(sys.argv[1], f"{trainer.global_rank}.json").write_text(json.dumps([state, weights]))
"""


@pytest.mark.slow
def test_two_ranks_remember_the_same_classes_and_end_with_the_same_weights(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    process = subprocess.Popen(
        [sys.executable, script, tmp_path],
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
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    seen = {
        number
        for rank in (0, 1)
        for batch in batches_of(loader_of(rank=rank, world_size=2), 4)
        for number in batch.ids_u.tolist()
    }
    classes = first[0]["threshold.classes"]
    known = {number for number, label in enumerate(classes) if label >= 0}
    assert known <= seen
    one = set(loader_of(rank=0, world_size=2).order.indices_u(0)[0].tolist())
    assert known - one  # the other rank's among them


# Accelerate


def test_accelerate_saves_and_resumes_what_was_learnt(tmp_path):
    accelerate, state = skip_without("accelerate"), skip_without("accelerate.state")

    def run(seed=0):
        accelerator = accelerate.Accelerator(cpu=True)
        model, (method, criterion), loader = network(seed), method_of("flexmatch"), loader_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        model, optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(method, loader)

        def train(steps):
            for x, y, u, _, ids_u in batches_of(loader, steps):
                batch = method(x, y, u, ids_u=ids_u)
                accelerator.backward(criterion(model(batch.inputs), batch).loss)
                optimizer.step()
                optimizer.zero_grad()

        return accelerator, model, method, train

    try:
        accelerator, model, method, train = run()
        train(SAVED)
        accelerator.save_state(str(tmp_path))
        train(STEPS - SAVED)
        again, other_model, other, train = run(seed=1)
        train(1)  # whatever has happened is forgotten
        again.load_state(str(tmp_path))
        train(STEPS - SAVED)
        wanted = plain_loop("flexmatch")
        for weights, builder in ((model, method), (other_model, other)):
            assert parameter_digest(weights) == parameter_digest(wanted.model)
            assert_same_state(builder, wanted.method)
    finally:  # Accelerate keeps its settings for the life of a process
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


# Hugging Face


@pytest.fixture
def trainer_class():
    skip_without("accelerate")
    skip_without("transformers")
    return importlib.import_module("gpu_mixmatch.integrations.transformers").MixMatchTrainer


class PixelNet(nn.Module):
    """Takes images by the name that Trainer has for them."""

    def __init__(self, seed=0):
        super().__init__()
        self.net = network(seed)

    def forward(self, pixel_values, labels=None):
        return {"logits": self.net(pixel_values)}


def huggingface(trainer_class, folder, kind, *, seed=0, steps=STEPS, save_steps=0, **own):
    images, labels = random_images(UNLABELLED, (1, 8, 8)), random_labels(UNLABELLED, NUM_CLASSES)
    method, criterion = method_of(kind, logits_getter=lambda output: output["logits"])
    arguments = importlib.import_module("transformers").TrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=0.05,
        optim="sgd",
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 500,
        data_seed=0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    return trainer_class(
        PixelNet(seed),
        arguments,
        method=method,
        criterion=criterion,
        train_dataset=TensorDataset(images[:LABELLED], labels[:LABELLED]),
        unlabelled_dataset=TensorDataset(images),
        ratio=RATIO,
        **own,
    )


@pytest.mark.parametrize(
    ("kind", "guess_first"), [("flexmatch", None), ("freematch", True), ("mixmatch", None)]
)
def test_hugging_face_trains_by_any_method_as_a_plain_loop(
    trainer_class, tmp_path, kind, guess_first
):
    trainer = huggingface(trainer_class, tmp_path, kind, guess_first=guess_first)
    trainer.train()
    # MixMatch draws by positions there
    run = plain_loop(kind, guess_first=guess_first, with_ids=kind != "mixmatch", clip=True)
    assert parameter_digest(trainer.model.net) == parameter_digest(run.model)
    assert_same_state(trainer.method, run.method)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, output in zip(logs, run.outputs, strict=True):
        for name, value in output._asdict().items():
            assert entry[name] == pytest.approx(value.item(), rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("kind", ["flexmatch", "freematch"])
def test_hugging_face_resumes_what_was_learnt_of_guesses_to_the_last_bit(
    trainer_class, tmp_path, kind
):
    whole = huggingface(trainer_class, tmp_path, kind, save_steps=SAVED)
    whole.train()
    resumed = huggingface(trainer_class, tmp_path, kind, seed=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))
    assert parameter_digest(resumed.model) == parameter_digest(whole.model)
    assert_same_state(resumed.method, whole.method)
    (tmp_path / f"checkpoint-{SAVED}" / "method.pt").unlink()
    with pytest.raises(ValueError, match=r"resume_from_checkpoint must hold method\.pt, what"):
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))


def test_hugging_face_keeps_no_file_of_a_method_that_learns_nothing(trainer_class, tmp_path):
    huggingface(trainer_class, tmp_path, "fixmatch", steps=1, save_steps=1).train()
    assert (tmp_path / "checkpoint-1").is_dir()
    assert not (tmp_path / "checkpoint-1" / "method.pt").exists()


def test_hugging_face_takes_one_builder(trainer_class, tmp_path):
    method, criterion = method_of("fixmatch")
    arguments = importlib.import_module("transformers").TrainingArguments
    given = {"args": arguments(str(tmp_path), remove_unused_columns=False)}
    mixmatch = method_of("mixmatch")[0]
    with pytest.raises(ValueError, match="method or mixmatch must be given, and not both"):
        trainer_class(None, **given, method=method, mixmatch=mixmatch, criterion=criterion)
    with pytest.raises(TypeError, match="method must be a builder such as FixMatch, got 3"):
        trainer_class(None, **given, method=3, criterion=criterion)
    with pytest.raises(ValueError, match="guess_first must be True or None for MixMatch"):
        trainer_class(None, **given, method=mixmatch, criterion=criterion, guess_first=False)
