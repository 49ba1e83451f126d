"""Accelerate: no glue is needed behind ``prepare``, in two processes, or to resume."""

import sys
import textwrap
from itertools import islice

import pytest
import torch
from torch.nn import functional as F

from gpu_mixmatch import MixMatch, MixMatchLoss, ResidentLoader, SemiSupervisedLoader, WeakAugment
from gpu_mixmatch.data.datasets import load_dataset
from gpu_mixmatch.recipes.models import SmallCNN
from tests.factories import random_images
from tests.processes import printed_by
from tests.skips import skip_without

accelerate = skip_without("accelerate")
state = skip_without("accelerate.state")

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LABELLED, UNLABELLED, BATCH = 6, 22, 4  # 5 steps in an epoch
STEPS = 250  # of the run that learns


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its settings for the life of a process."""
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


def noise(length, seed):
    images = random_images(length, (1, 8, 8), seed=seed)
    return torch.utils.data.TensorDataset(images, torch.arange(length) % 10)


def loader_of(**options):
    return SemiSupervisedLoader(
        noise(LABELLED, 1), noise(UNLABELLED, 2), **{"batch_size": BATCH, "seed": 5, **options}
    )


def builder(**options):
    return MixMatch(WeakAugment.digits(), 10, **{"seed": 7, **options})


class Run:
    """What a user of Accelerate writes: all of a training run, and its step."""

    def __init__(self, *, seed=0, prepare_builder=False, cpu=True, **options):
        torch.manual_seed(seed)
        self.accelerator = accelerate.Accelerator(cpu=cpu, **options)
        model = SmallCNN(10, filters=4)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
        self.mixmatch = builder().to(self.accelerator.device)
        self.loader = loader_of(device=self.accelerator.device)
        self.criterion = MixMatchLoss(lambda_u=20.0, rampup_steps=4)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(
            model, optimizer, scheduler
        )
        if prepare_builder:
            self.mixmatch = self.accelerator.prepare(self.mixmatch)
            self.accelerator.register_for_checkpointing(self.loader)
        else:
            self.accelerator.register_for_checkpointing(self.mixmatch, self.loader)

    def batches(self, count):
        while count > 0:
            for batch in self.loader:
                yield batch
                count -= 1
                if count == 0:
                    break

    def train(self, count):
        losses = []
        self.model.train()
        for batch in self.batches(count):
            with self.accelerator.accumulate(self.model):
                mixed = self.mixmatch(batch.x, batch.y, batch.u, self.model)
                losses.append(self.criterion(self.model(mixed.inputs), mixed))
                self.accelerator.backward(losses[-1].loss)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
        return [loss.loss.item() for loss in losses]


def weights(model):
    return torch.cat([value.double().flatten() for value in model.state_dict().values()])


def plain_loop(count, accumulation=1):
    """The same without Accelerate; the losses, and the model."""
    torch.manual_seed(0)
    model = SmallCNN(10, filters=4)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
    mixmatch, criterion = builder(), MixMatchLoss(20.0, 4)
    losses = []
    for batch in islice(loader_of(steps_per_epoch=count), count):
        mixed = mixmatch(batch.x, batch.y, batch.u, model)
        loss = criterion(model(mixed.inputs), mixed).loss
        (loss / accumulation).backward()
        losses.append(loss.item())
        if len(losses) % accumulation == 0:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return losses, model


def test_steps_are_those_of_a_plain_loop():
    run = Run()
    losses, model = plain_loop(7)
    assert run.train(7) == losses
    assert torch.equal(weights(run.model), weights(model))


def test_steps_under_gradient_accumulation_are_those_of_a_plain_loop():
    run = Run(gradient_accumulation_steps=2)
    losses, model = plain_loop(8, accumulation=2)
    assert run.train(8) == losses
    assert torch.equal(weights(run.model), weights(model))


def test_bfloat16_trains_close_to_float32_with_targets_in_float32():
    run = Run(mixed_precision="bf16")
    dtypes = []
    run.model.conv1.register_forward_hook(lambda *call: dtypes.append(call[-1].dtype))
    built = []
    run.mixmatch.register_forward_hook(lambda *call: built.append(call[-1]))
    losses, _ = plain_loop(4)
    ours = run.train(4)
    assert set(dtypes) == {torch.bfloat16}  # the guess as well as the step
    assert len(dtypes) == 8
    for batch in built:
        assert batch.targets.dtype == batch.inputs.dtype == torch.float32
        batch.check()
    assert ours != losses
    assert ours == pytest.approx(losses, rel=0.05)


# 3 is within the first epoch of 5 steps, 5 at its end, 7 within the second
@pytest.mark.parametrize("prepare_builder", [False, True])
@pytest.mark.parametrize("saved", [3, 5, 7])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, saved, prepare_builder):
    first = Run(prepare_builder=prepare_builder)
    first.train(saved)
    first.accelerator.save_state(str(tmp_path))
    losses = first.train(10 - saved)

    second = Run(seed=1, prepare_builder=prepare_builder)
    second.train(1)  # whatever has happened is forgotten
    second.accelerator.load_state(str(tmp_path))
    assert int(second.mixmatch.step) == saved
    assert second.train(10 - saved) == losses
    assert torch.equal(weights(second.model), weights(first.model))


@pytest.mark.parametrize("kind", ["semi-supervised", "resident"])
def test_prepare_leaves_our_loaders_as_they_are(kind):
    loader = loader_of()
    if kind == "resident":
        loader = ResidentLoader(*noise(UNLABELLED, 2).tensors, BATCH)
    assert accelerate.Accelerator(cpu=True).prepare(loader) is loader


def test_prepare_data_loader_refuses_our_loader():
    with pytest.raises(AttributeError, match="drop_last"):
        accelerate.Accelerator(cpu=True).prepare_data_loader(loader_of())


TWO_RANKS = """
    import os

    import accelerate
    import torch
    from accelerate.utils import gather, set_seed, synchronize_rng_states

    from tests.test_accelerate import Run, builder, loader_of, weights

    run = Run()
    accelerator = run.accelerator
    assert accelerator.num_processes == 2
    assert accelerator.prepare(run.loader) is run.loader

    # one process with the global batch draws what two draw with its halves
    set_seed(3)
    synchronize_rng_states(["torch"])
    states = gather(torch.get_rng_state()[None])
    assert torch.equal(states[0], states[1])
    whole = loader_of(rank=0, world_size=1, batch_size=8)
    ours, reference = builder(mix="none"), builder(mix="none")
    for batch, wanted in zip(run.loader, whole, strict=True):
        assert torch.equal(gather(batch.x), wanted.x)
        assert torch.equal(gather(batch.u), wanted.u)
        same = batch.x[:1].expand(4, -1, -1, -1), batch.u[:1].expand(4, -1, -1, -1)
        x, u = (accelerate.utils.broadcast(part.contiguous()) for part in same)
        drawn = ours(x, batch.y, u, run.model)
        ids = torch.arange(8)
        both = reference(x.repeat(2, 1, 1, 1), gather(batch.y), u.repeat(2, 1, 1, 1), run.model,
                         ids_x=ids, ids_u=ids)
        assert torch.equal(gather(drawn.inputs_x), both.inputs_x)
        views = gather(drawn.inputs_u[None]).unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2)
        assert torch.equal(views, both.inputs_u)
        first, second = gather(drawn.inputs[None])
        assert not torch.equal(first, second)  # of the same images
    run.loader.set_epoch(0)

    losses = run.train(3)
    learnt = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    first, second = gather(learnt[None])
    assert torch.equal(first, second)
    first, second = gather(torch.tensor(losses)[None])
    assert not torch.equal(first, second)

    accelerator.save_state("out")
    losses = run.train(4)
    again = Run(seed=1)
    again.accelerator.load_state("out")
    assert int(again.mixmatch.step) == again.loader.state_dict()["step"] == 3
    assert again.train(4) == losses
    assert torch.equal(weights(again.model), weights(run.model))
    print("done", flush=True)
    accelerator.end_training()
    os._exit(0)  # torch's threads have been seen to abort an interpreter that was ending
"""


def test_two_processes_draw_apart_and_resume_exactly(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(TWO_RANKS))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    options = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    # two processes are launched by --multi_gpu also where there is none, and --cpu launches one
    port = ["--multi_gpu", "--main_process_port", "0"]
    printed = printed_by([*launcher, *options, *port, str(script)], tmp_path)
    assert printed.count("done") == 2


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_steps_on_cuda_begin_like_those_on_the_cpu(monkeypatch, precision):
    losses, _ = plain_loop(5)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    run = Run(cpu=False, mixed_precision=precision)
    assert run.accelerator.device.type == "cuda"
    ours = run.train(5)
    assert ours[0] == pytest.approx(losses[0], rel=0.05 if precision == "bf16" else 0.01)
    assert all(torch.tensor(ours).isfinite())


@pytest.mark.slow
def test_it_learns_digits_with_40_labels_at_half_the_error_of_labels_alone():
    errors = {}
    for supervised in (True, False):
        accelerator = accelerate.Accelerator(cpu=True)
        data = load_dataset("digits")
        labelled, unlabelled = data.split(40, seed=0)
        loader = ResidentLoader(
            *labelled.tensors, 64, unlabelled=unlabelled.tensors[0], steps_per_epoch=STEPS
        )
        torch.manual_seed(0)
        model = SmallCNN(10)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, STEPS)
        augment = WeakAugment.digits()
        mixmatch = MixMatch(augment, 10)
        criterion = MixMatchLoss(lambda_u=75.0, rampup_steps=STEPS // 2)
        model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
        for step, batch in enumerate(loader):
            if supervised:
                loss = F.cross_entropy(model(augment(batch.x, 0, step)), batch.y)
            else:
                mixed = mixmatch(batch.x, batch.y, batch.u, model)
                loss = criterion(model(mixed.inputs), mixed).loss
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            guessed = model(augment.normalize(data.test_images)).argmax(dim=1)
        errors[supervised] = (guessed != data.test_labels).float().mean().item()
    assert errors[False] <= 0.5 * errors[True], errors
