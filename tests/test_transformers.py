"""MixMatchTrainer: two training sets, resumption to the last bit, evaluation, logs and errors."""

import importlib
import itertools
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gpu_mixmatch import MixMatch, MixMatchLoss, SemiSupervisedLoader, WeakAugment, collate
from gpu_mixmatch.data.datasets import load_dataset
from gpu_mixmatch.data.formats.common import split_labels
from tests.processes import printed_by
from tests.skips import skip_without

datasets = pytest.importorskip("datasets")
pil = skip_without("PIL.Image")
skip_without("accelerate")
transformers = skip_without("transformers")
MixMatchTrainer = importlib.import_module("gpu_mixmatch.integrations.transformers").MixMatchTrainer

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LABELLED, UNLABELLED, BATCH = 6, 22, 4  # 5 steps in an epoch
STEPS = 250  # of the run that learns
LOSSES = ("loss_x", "loss_u", "weight_u")


def resnet(seed=0, **fields):
    torch.manual_seed(seed)
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], **fields}
    config = transformers.ResNetConfig(num_channels=1, layer_type="basic", num_labels=10, **sizes)
    return transformers.ResNetForImageClassification(config)


def images_and_labels(images, labels):
    """A data set as the Hub has them: encoded images and labels, and a column that is neither."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(num_classes=10),
            "name": datasets.Value("string"),
        }
    )
    columns = {
        "image": [pil.fromarray(image) for image in np.asarray(images)],
        "label": np.asarray(labels).tolist(),
        "name": [f"image {number}" for number in range(len(images))],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def noise(length, seed):
    generator = np.random.default_rng(seed)
    return images_and_labels(
        generator.integers(0, 256, (length, 16, 16), dtype=np.uint8), np.arange(length) % 10
    )


def labelled_noise():
    return noise(LABELLED, 1)


def unlabelled_noise():
    return noise(UNLABELLED, 2)


labelled = pytest.fixture(scope="module")(labelled_noise)
unlabelled = pytest.fixture(scope="module")(unlabelled_noise)


def arguments(folder, **options):
    return transformers.TrainingArguments(
        str(folder),
        **{
            "per_device_train_batch_size": BATCH,
            "max_steps": 8,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "remove_unused_columns": False,
            **options,
        },
    )


def builder(**options):
    fields = {"seed": 7, "logits_getter": lambda output: output.logits, **options}
    return MixMatch(WeakAugment.digits(), 10, **fields)


def trainer_of(folder, labelled, unlabelled, *, model=None, mixmatch=None, **options):
    own = {
        name: options.pop(name)
        for name in ("ratio", "eval_dataset", "compute_metrics", "data_collator", "image")
        if name in options
    }
    return MixMatchTrainer(
        model or resnet(),
        arguments(folder, **options),
        mixmatch=mixmatch or builder(),
        criterion=MixMatchLoss(lambda_u=20.0, rampup_steps=4),
        train_dataset=labelled,
        unlabelled_dataset=unlabelled,
        **own,
    )


def weights(trainer):
    return torch.cat([value.double().flatten() for value in trainer.model.state_dict().values()])


def training_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def error_rate(prediction):
    wrong = prediction.predictions.argmax(1) != prediction.label_ids
    return {"error": float(wrong.mean())}


def test_steps_are_those_of_a_plain_loop(tmp_path, labelled, unlabelled):
    trainer = trainer_of(
        tmp_path, labelled, unlabelled, optim="sgd", lr_scheduler_type="constant", seed=3, ratio=2
    )
    trainer.train()

    model, mixmatch, criterion = resnet(), builder(), MixMatchLoss(20.0, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    loader = SemiSupervisedLoader(labelled, unlabelled, BATCH, ratio=2, seed=3)
    losses = []
    model.train()
    while len(losses) < 8:
        for batch in loader:
            mixed = mixmatch(batch.x, batch.y, batch.u, model)
            losses.append(criterion(model(mixed.inputs).logits, mixed))
            losses[-1].loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if len(losses) == 8:
                break

    logs = training_logs(trainer)
    assert [entry["step"] for entry in logs] == list(range(1, 9))
    for entry, loss in zip(logs, losses, strict=True):
        for name in ("loss", *LOSSES):
            assert entry[name] == pytest.approx(getattr(loss, name).item(), rel=1e-6), name
    assert logs[0]["weight_u"] == 0
    assert logs[-1]["weight_u"] == 20
    mine = torch.cat([value.double().flatten() for value in model.state_dict().values()])
    assert torch.equal(weights(trainer), mine)


def test_an_epoch_is_one_pass_over_the_unlabelled_images(tmp_path, labelled, unlabelled):
    trainer = trainer_of(tmp_path, labelled, unlabelled, max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 2 * (UNLABELLED // BATCH)
    assert trainer.state.epoch == 2
    assert int(trainer.mixmatch.step) == 10


# 3 is within the first epoch of 5 batches, 5 at its end, 7 within the second
@pytest.mark.parametrize("saved", [3, 5, 7])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, labelled, unlabelled, saved):
    whole = trainer_of(tmp_path / "whole", labelled, unlabelled, max_steps=9)
    whole.train()

    # the schedule of the learning rate is that of 9 steps in both
    first = trainer_of(
        tmp_path / "parts",
        labelled,
        unlabelled,
        max_steps=9,
        save_strategy="steps",
        save_steps=saved,
        save_total_limit=None,
    )
    first.train()
    second = trainer_of(tmp_path / "parts", labelled, unlabelled, max_steps=9, model=resnet(1))
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / f"checkpoint-{saved}"))
    assert second.state.global_step == 9
    assert second.state.epoch == whole.state.epoch
    assert torch.equal(weights(second), weights(whole))
    for mine, other in zip(
        training_logs(second)[saved:], training_logs(whole)[saved:], strict=True
    ):
        assert mine == other


def test_resumption_is_exact_under_gradient_accumulation(tmp_path, labelled, unlabelled):
    options = {"max_steps": 8, "gradient_accumulation_steps": 2}  # 3 updates in an epoch of 5
    saving = {"save_strategy": "steps", "save_steps": 5}
    whole = trainer_of(tmp_path, labelled, unlabelled, **options, **saving)
    whole.train()
    part = trainer_of(tmp_path, labelled, unlabelled, **options, model=resnet(1))
    part.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert torch.equal(weights(part), weights(whole))
    assert int(part.mixmatch.step) == int(whole.mixmatch.step) == 2 * 5 + 4


def test_no_batch_that_a_resumed_run_skips_is_fetched(tmp_path, labelled, unlabelled):
    trainer_of(
        tmp_path, labelled, unlabelled, max_steps=4, save_strategy="steps", save_steps=4
    ).train()
    fetched = []

    class Watched:
        def __len__(self):
            return len(unlabelled)

        def __getitem__(self, index):
            fetched.append(index)
            return unlabelled[index]

    trainer = trainer_of(tmp_path, labelled, Watched(), max_steps=5)
    trainer.train(resume_from_checkpoint=True)
    order = SemiSupervisedLoader(labelled, unlabelled, BATCH, seed=trainer.args.seed).order
    assert fetched == order.indices_u(4)[0].tolist()


def test_accumulated_gradients_are_those_of_the_mean_loss(tmp_path, labelled, unlabelled):
    gradients = []

    class Watched(MixMatchTrainer):
        def _clip_grad_norm(self, model):
            gradients.append([p.grad.clone() for p in model.parameters()])
            return super()._clip_grad_norm(model)

    trainer = Watched(
        resnet(),
        arguments(tmp_path, max_steps=1, gradient_accumulation_steps=3),
        mixmatch=builder(),
        criterion=MixMatchLoss(lambda_u=20.0, rampup_steps=4),
        train_dataset=labelled,
        unlabelled_dataset=unlabelled,
    )
    trainer.train()

    model, mixmatch, criterion = resnet(), builder(), MixMatchLoss(20.0, 4)
    loader = iter(SemiSupervisedLoader(labelled, unlabelled, BATCH, seed=trainer.args.seed))
    losses = []
    model.train()
    for _ in range(3):
        batch = next(loader)
        mixed = mixmatch(batch.x, batch.y, batch.u, model)
        losses.append(criterion(model(mixed.inputs).logits, mixed))
        (losses[-1].loss / 3).backward()
    for mine, parameter in zip(gradients[0], model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad)
    (entry,) = training_logs(trainer)
    for name in ("loss", *LOSSES):
        mean = sum(getattr(loss, name).item() for loss in losses) / 3
        assert entry[name] == pytest.approx(mean, rel=1e-5), name


def test_logged_losses_are_means_since_they_were_last_logged(tmp_path, labelled, unlabelled):
    every = trainer_of(tmp_path, labelled, unlabelled)
    every.train()
    rare = trainer_of(tmp_path, labelled, unlabelled, logging_steps=4)
    rare.train()
    singles = training_logs(every)
    for number, entry in enumerate(training_logs(rare)):
        part = singles[4 * number : 4 * number + 4]
        for name in ("loss", *LOSSES):
            assert entry[name] == pytest.approx(np.mean([one[name] for one in part]), rel=1e-5)


def test_worker_processes_change_no_batch(tmp_path, labelled, unlabelled):
    alone = trainer_of(tmp_path, labelled, unlabelled, max_steps=6)
    alone.train()
    helped = trainer_of(tmp_path, labelled, unlabelled, max_steps=6, dataloader_num_workers=1)
    helped.train()
    assert torch.equal(weights(alone), weights(helped))


def test_evaluation_normalises_without_augmenting(tmp_path, labelled, unlabelled):
    trainer = trainer_of(
        tmp_path, labelled, unlabelled, eval_dataset=labelled, compute_metrics=error_rate
    )
    metrics = trainer.evaluate()
    batch = collate([labelled[index] for index in range(LABELLED)])
    with torch.no_grad():
        logits = trainer.model(trainer.mixmatch.augment.normalize(batch["image"])).logits
    expected = F.cross_entropy(logits, batch["label"])
    assert metrics["eval_loss"] == pytest.approx(float(expected), rel=1e-6)
    wrong = (logits.argmax(1) != batch["label"]).float().mean()
    assert metrics["eval_error"] == pytest.approx(float(wrong))
    prediction = trainer.predict(labelled.remove_columns("label"))
    np.testing.assert_allclose(prediction.predictions, logits.numpy(), rtol=1e-5, atol=1e-6)


def test_evaluation_between_steps_changes_no_step(tmp_path, labelled, unlabelled):
    plain = trainer_of(tmp_path, labelled, unlabelled)
    plain.train()
    watched = trainer_of(
        tmp_path,
        labelled,
        unlabelled,
        eval_dataset=labelled,
        eval_strategy="steps",
        eval_steps=3,
        logging_steps=4,
    )
    watched.train()
    assert torch.equal(weights(plain), weights(watched))
    evaluated = [entry for entry in watched.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [3, 6, 8]
    assert not any(name in entry for entry in evaluated for name in LOSSES)
    assert [entry["step"] for entry in training_logs(watched)] == [4, 8]


def test_float_images_of_a_collator_are_evaluated_as_they_are(tmp_path, labelled, unlabelled):
    def zeros(samples):
        return {"pixel_values": torch.zeros(len(samples), 1, 16, 16), "labels": torch.arange(6)}

    trainer = trainer_of(tmp_path, labelled, unlabelled, eval_dataset=labelled, data_collator=zeros)
    with torch.no_grad():
        logits = trainer.model.eval()(torch.zeros(6, 1, 16, 16)).logits
    expected = F.cross_entropy(logits, torch.arange(6))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-6)


def test_bfloat16_trains_close_to_float32(tmp_path, labelled, unlabelled):
    full = trainer_of(tmp_path, labelled, unlabelled, max_steps=2)
    full.train()
    half = trainer_of(tmp_path, labelled, unlabelled, max_steps=2, bf16=True)
    half.train()
    for one, other in zip(training_logs(full), training_logs(half), strict=True):
        assert one["loss_x"] != other["loss_x"]
        assert one["loss_x"] == pytest.approx(other["loss_x"], rel=0.05)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mixmatch": None}, TypeError, "mixmatch must be a MixMatch, or .* got None"),
        (
            {"criterion": F.cross_entropy},
            TypeError,
            "criterion must be a loss of batches such as MixMatchLoss",
        ),
        ({"ratio": 1.5}, TypeError, "ratio must be an integer, got 1.5"),
        ({"ratio": 0}, ValueError, "ratio must be in 1 .*, got 0"),
        ({"image": 0}, TypeError, "image must be a text, got 0"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(tmp_path, options, error, message):
    given = {"mixmatch": builder(), "criterion": MixMatchLoss(), **options}
    with pytest.raises(error, match=message):
        MixMatchTrainer(None, arguments(tmp_path), **given)
    with pytest.raises(TypeError, match="args must be TrainingArguments, got None"):
        MixMatchTrainer(None, None, **given)


def test_unused_columns_must_be_kept(tmp_path, labelled, unlabelled):
    with pytest.raises(ValueError, match=r"args.remove_unused_columns must be False, .* got True"):
        trainer_of(tmp_path, labelled, unlabelled, remove_unused_columns=True)


def test_arguments_that_would_be_ignored_are_refused(tmp_path, labelled, unlabelled):
    with pytest.raises(ValueError, match=r"label_smoothing_factor must be 0, got 0.1: pass MixM"):
        trainer_of(tmp_path, labelled, unlabelled, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"ignore_data_skip must be False, .* got True"):
        trainer_of(tmp_path, labelled, unlabelled, ignore_data_skip=True)
    with pytest.raises(ValueError, match="compute_loss_func must be None"):
        MixMatchTrainer(
            resnet(),
            arguments(tmp_path),
            mixmatch=builder(),
            criterion=MixMatchLoss(),
            compute_loss_func=lambda *_: None,
        )


def test_a_missing_training_set_is_named(tmp_path, labelled, unlabelled):
    with pytest.raises(ValueError, match=r"unlabelled_dataset must be a data set .* got None"):
        trainer_of(tmp_path, labelled, None).train()
    with pytest.raises(ValueError, match=r"train_dataset must be a data set .* got None"):
        trainer_of(tmp_path, None, unlabelled).train()


def test_a_wrong_name_of_the_image_is_named(tmp_path, labelled, unlabelled):
    trainer = trainer_of(tmp_path, labelled, unlabelled, eval_dataset=labelled, image="picture")
    with pytest.raises(ValueError, match=r"'picture', got \['image', 'label', 'name'\]: say"):
        trainer.evaluate()
    with pytest.raises(ValueError, match="labelled samples must have a field 'picture'"):
        trainer.train()


def test_an_engine_that_cannot_normalise_asks_for_a_collator(tmp_path, labelled, unlabelled):
    mixmatch = MixMatch(lambda images: images, 10, logits_getter=lambda output: output.logits)
    trainer = trainer_of(tmp_path, labelled, unlabelled, mixmatch=mixmatch, eval_dataset=labelled)
    with pytest.raises(ValueError, match="pixel_values must be normalised by a data_collator"):
        trainer.evaluate()


def test_a_missing_logits_getter_is_explained(tmp_path, labelled, unlabelled):
    mixmatch = MixMatch(WeakAugment.digits(), 10)
    with pytest.raises(TypeError, match=r"logits_getter=lambda output: output.logits"):
        trainer_of(tmp_path, labelled, unlabelled, mixmatch=mixmatch).train()


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "gpu_mixmatch.integrations.transformers")
    with pytest.raises(ImportError, match=r'pip install -e "\.\[transformers\]"'):
        importlib.import_module("gpu_mixmatch.integrations.transformers")


TWO_RANKS = """
    import os

    import torch
    from torch import distributed

    from gpu_mixmatch import SemiSupervisedLoader
    from tests.test_transformers import builder, labelled_noise, trainer_of
    from tests.test_transformers import training_logs, unlabelled_noise, weights

    def gathered(tensor):
        parts = [torch.empty_like(tensor) for _ in range(2)]
        distributed.all_gather(parts, tensor)
        return parts

    labelled, unlabelled = labelled_noise(), unlabelled_noise()
    seen, losses = [], []

    def run(folder, checkpoint=None, **options):
        mixmatch = builder(mix="none")
        mixmatch.register_forward_hook(lambda module, args, batch: seen.append((args, batch)))
        trainer = trainer_of(folder, labelled, unlabelled, mixmatch=mixmatch, max_steps=4,
                             per_device_train_batch_size=2, gradient_accumulation_steps=2,
                             ddp_backend="gloo", **options)
        trainer.criterion.register_forward_hook(lambda *call: losses.append(call[-1].loss_x))
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    whole = run("out", save_strategy="steps", save_steps=2)
    ours, theirs = gathered(weights(whole))
    assert not torch.equal(ours, weights(trainer_of("out", labelled, unlabelled)))  # it trained

    # without BatchNorm's running statistics, which DDP takes from rank 0 before a forward pass
    learnt = torch.cat([p.detach().flatten() for p in whole.model.parameters()])
    assert torch.equal(*gathered(learnt))

    logged = [entry["loss_x"] for entry in training_logs(whole)]
    parts = torch.cat(gathered(torch.stack(losses).detach())).view(2, 7).mean(dim=0)
    updates = torch.stack([part.mean() for part in parts.split([2, 2, 1, 2])])
    torch.testing.assert_close(torch.tensor(logged), updates)

    # one process with the global batch draws what two draw with its halves
    order = iter(SemiSupervisedLoader(labelled, unlabelled, 4, steps_per_epoch=9,
                                      seed=whole.args.seed, rank=0, world_size=1))
    reference = builder(mix="none")
    for step, ((x, y, u, _), batch) in enumerate(seen):
        wanted = next(order)
        assert torch.equal(torch.cat(gathered(x)), wanted.x)
        assert torch.equal(torch.cat(gathered(u)), wanted.u)
        ids = torch.arange(4)
        views = reference(wanted.x, wanted.y, wanted.u, whole.model, ids_x=ids, ids_u=ids)
        assert torch.equal(torch.cat(gathered(batch.inputs_x.contiguous())), views.inputs_x)
        parts = [part.unflatten(0, (2, -1)) for part in gathered(batch.inputs_u.contiguous())]
        assert torch.equal(torch.cat(parts, dim=1).flatten(0, 1), views.inputs_u)
    assert step == 6  # 5 batches in an epoch, the last of whose 3 updates has one

    again = run("out", "out/checkpoint-2")
    assert torch.equal(weights(again), weights(whole))
    print("done", flush=True)
    distributed.destroy_process_group()
    os._exit(0)  # torch's threads have been seen to abort an interpreter that was ending
"""


def test_two_processes_share_the_order_and_the_draws_of_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(TWO_RANKS))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    printed = printed_by([*launcher, "--nproc-per-node=2", str(script)], tmp_path)
    assert printed.count("done") == 2


@pytest.mark.gpu
@needs_cuda
def test_a_step_on_cuda_has_the_losses_of_one_on_the_cpu(tmp_path, labelled, unlabelled):
    runs = []
    for use_cpu in (True, False):
        model = resnet()
        trainer = trainer_of(
            tmp_path,
            labelled,
            unlabelled,
            model=model,
            use_cpu=use_cpu,
            max_steps=6,
            eval_dataset=labelled,
            compute_metrics=error_rate,
        )
        trainer.train()
        assert next(model.parameters()).is_cuda is not use_cpu
        assert 0 <= trainer.evaluate()["eval_error"] <= 1
        runs.append(training_logs(trainer))
    on_cpu, on_cuda = runs
    assert on_cuda[0]["loss_x"] == pytest.approx(on_cpu[0]["loss_x"], rel=1e-2)
    assert [entry["weight_u"] for entry in on_cuda] == [entry["weight_u"] for entry in on_cpu]
    assert all(np.isfinite(entry["loss"]) for entry in on_cuda)


@pytest.mark.slow
def test_it_learns_digits_with_40_labels_at_half_the_error_of_labels_alone(tmp_path):
    data = load_dataset("digits")

    def doubled(images):  # 16 px, of which the stem of a ResNet leaves 4
        return images[:, 0].repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)

    chosen = split_labels(data.train_labels, 40, 0, 10)
    everything = images_and_labels(doubled(data.train_images), data.train_labels)
    labelled = everything.select(chosen.tolist())
    augment = WeakAugment(padding=2, padding_mode="zeros", flip=0.0)
    sizes = {"embedding_size": 16, "hidden_sizes": [32, 64]}
    options = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 64,
        "learning_rate": 4e-3,
        "logging_steps": STEPS,
    }
    trainer = MixMatchTrainer(
        resnet(**sizes),
        arguments(tmp_path, per_device_eval_batch_size=250, **options),
        mixmatch=MixMatch(augment, 10, logits_getter=lambda output: output.logits),
        criterion=MixMatchLoss(lambda_u=75.0, rampup_steps=STEPS // 2),
        train_dataset=labelled,
        unlabelled_dataset=everything.remove_columns("label"),
        eval_dataset=images_and_labels(doubled(data.test_images), data.test_labels),
        compute_metrics=error_rate,
    )
    trainer.train()
    error = trainer.evaluate()["eval_error"]

    steps = itertools.count()

    def augmented(samples):
        batch = collate(samples)
        return {"pixel_values": augment(batch["image"], 0, next(steps)), "labels": batch["label"]}

    alone = transformers.Trainer(
        resnet(**sizes),
        arguments(tmp_path, **options),
        data_collator=augmented,
        train_dataset=labelled.select([number % 40 for number in range(64)]),
    )
    alone.train()
    trainer.model.load_state_dict(alone.model.state_dict())
    supervised = trainer.evaluate()["eval_error"]
    assert error <= 0.5 * supervised, (error, supervised)
