"""Two processes: they draw, average and end as one process would, and resume to the last bit.

What needs a process group runs in one launch of two ranks, which save what they found.
"""

import json
import signal
import subprocess
import sys
import textwrap
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn

from gpu_mixmatch import MixMatch, MixMatchLoss, ResidentLoader, WeakAugment
from gpu_mixmatch.recipes.distributed import current_device, process_group
from gpu_mixmatch.recipes.train import TrainConfig, TrainRun
from tests.factories import random_images
from tests.processes import environment

BATCH = 4  # of each rank
CLASSES = 3
RUN = TrainConfig(steps=60, batch_size=16, eval_every=4)
RUN_OPTIONS = ("--steps", "60", "--batch-size", "16", "--eval-every", "4")
KILLED_AT = 11  # steps taken by the rank that is killed: the last checkpoint is of step 8


class Recording(MixMatch):
    """Keeps what it drew last."""

    def _draw(self, *arguments):
        self.drawn = super()._draw(*arguments)
        return self.drawn


def builder(**switches) -> Recording:
    augment = WeakAugment(padding=1, zoom_px=(0, 1), flip=0.5, blur_sigma=(0.2, 1.0))
    return Recording(augment, CLASSES, seed=3, **switches)


def noise(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return random_images(count, (1, 8, 8), seed=seed), torch.arange(count) % CLASSES


def loader_of(batch_size: int) -> ResidentLoader:
    """Of a process with the global batch, or of each of two with a half."""
    unlabelled, _ = noise(32, 2)
    return ResidentLoader(*noise(16, 1), batch_size, unlabelled=unlabelled, steps_per_epoch=5)


def plain_model() -> nn.Module:
    """Without BatchNorm: what it says of a row does not depend on the others."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, CLASSES, bias=True)
    )


def batches(batch_size: int, count: int) -> list:
    return list(islice(loader_of(batch_size), count))


def draws(batch_size: int, *, by_id: bool) -> list[dict[str, torch.Tensor]]:
    """All that four steps draw, by name, a row per view."""
    mixmatch, model = builder(), plain_model()
    steps = []
    for batch in batches(batch_size, 4):
        ids = {"ids_x": batch.ids_x, "ids_u": batch.ids_u} if by_id else {}
        mixmatch(batch.x, batch.y, batch.u, model, **ids)
        augment, mixup = mixmatch.drawn
        steps.append({**augment._asdict(), **mixup._asdict()})
    return steps


def loss_of(network: nn.Module, guesser: nn.Module, batch, mixmatch: MixMatch) -> torch.Tensor:
    mixed = mixmatch(batch.x, batch.y, batch.u, guesser, ids_x=batch.ids_x, ids_u=batch.ids_u)
    return MixMatchLoss(lambda_u=75.0, rampup_steps=0)(network(mixed.inputs), mixed).loss


def gradient(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def weights(model: nn.Module) -> torch.Tensor:
    whole = (getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters())
    return torch.cat([parameter.detach().flatten() for parameter in whole])


def of_rank(rows: torch.Tensor, rank: int) -> torch.Tensor:
    """Rows of the global batch that rank has: its part of x and of each view of u."""
    return torch.cat([part.chunk(2)[rank] for part in rows.chunk(3)])


RANKS = """
    import os
    import sys
    from pathlib import Path

    import pytest
    import torch
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from gpu_mixmatch import MixMatch
    from gpu_mixmatch.data.datasets import load_dataset
    from gpu_mixmatch.recipes.distributed import process_group, rank, replicate, world_size
    from gpu_mixmatch.recipes.train import TrainConfig, TrainRun, train
    from tests.digest import parameter_digest
    from tests.test_distributed import BATCH, RUN, batches, builder, draws, gradient, loader_of
    from tests.test_distributed import loss_of, noise, plain_model, weights

    folder = Path(sys.argv[1])
    found = {}
    with process_group("cpu"):
        assert world_size() == 2
        found["order"] = [(batch.ids_x, batch.ids_u) for batch in loader_of(BATCH)]
        found["draws"] = {by_id: draws(BATCH, by_id=by_id) for by_id in (True, False)}

        first, second = batches(BATCH, 2)
        model = plain_model()
        network = replicate(model, torch.device("cpu"))
        loss_of(network, model, first, builder(mix="none")).backward()
        found["gradient"] = gradient(model)

        model, mixmatch = plain_model(), builder(mix="none")
        network = DistributedDataParallel(model)
        with network.no_sync():
            loss_of(network, network, first, mixmatch).backward()
        found["own gradient"] = gradient(model)
        loss_of(network, network, second, mixmatch).backward()
        found["accumulated"] = gradient(model)

        model, mixmatch = plain_model(), builder(mix="none")
        fully_shard(model[0])
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        assert isinstance(model, FSDPModule)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for batch in (first, second):
            loss_of(model, model, batch, mixmatch).backward()
            optimizer.step()
            optimizer.zero_grad()
        found["sharded"] = weights(model)

        data = load_dataset("digits")
        found["digests"] = {}
        for preset in ("fast", "paper", "yu1ut"):
            run = TrainRun(TrainConfig(steps=3, batch_size=4, preset=preset), data)
            for step, batch in enumerate(run.loader):
                if rank() == step % 2:  # a guess that nobody else makes
                    guess = MixMatch(run.augment, 10)(batch.x, batch.y, batch.u, run.network)
                    guess.check()
                run.train_step(batch)
            found["digests"][preset] = parameter_digest(run.model), parameter_digest(run.ema)

        for method in ("fixmatch", "freematch", "flexmatch", "ict", "remixmatch"):
            changes = {"threshold": 0.2} if method == "flexmatch" else {}
            config = TrainConfig(steps=3, batch_size=4, method=method, builder=changes)
            run = TrainRun(config, data)
            for batch in run.loader:
                run.train_step(batch)
            learnt = [value.double().sum() for value in run.builder.state_dict().values()]
            found["digests"][method] = (
                *(parameter_digest(run.model), parameter_digest(run.ema)),
                [float(value) for value in learnt],
            )

        run = TrainRun(TrainConfig(batch_size=4, supervised=True), data)
        images, labels = noise(8, 4)
        losses = run.train_step(first._replace(x=images, y=labels))
        found["loss of the same images"] = float(losses["loss"])

        out = folder / f"run-{rank()}"
        found["summary"] = train(RUN, out, data=data)._asdict()
        found["resumed summary"] = train(RUN, out, data=data, resume=True)._asdict()
        with pytest.raises(ValueError, match="out must be a folder that does not exist yet"):
            train(RUN, out, data=data)
        torch.save(found, folder / f"found-{rank()}.pt")
    os._exit(0)  # torch's threads have been seen to abort an interpreter that was ending
"""

# the command line, in which rank 1 is killed before a step
KILLED = """
    import os
    import signal

    from gpu_mixmatch.cli import app as cli
    from gpu_mixmatch.recipes.distributed import rank
    from gpu_mixmatch.recipes.train import TrainRun
    from tests.test_distributed import KILLED_AT

    train_step = TrainRun.train_step

    def dying(run, batch):
        if rank() == 1 and run.step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(run, batch)

    TrainRun.train_step = dying
    cli.main()
"""


def torchrun(*arguments: object, processes: int = 2, limit: float = 120) -> tuple[int, str]:
    """Launch; return the exit code and all that was printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc-per-node={processes}", *map(str, arguments)]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            printed, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # upon which it ends its workers
            printed, _ = process.communicate(timeout=60)
            pytest.fail(f"it took more than {limit} s:\n{printed[-4000:]}")
    return process.returncode, printed


def write_script(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def found(folder):
    """What each of two ranks found."""
    code, printed = torchrun(write_script(folder / "ranks.py", RANKS), folder)
    assert code == 0, printed[-4000:]
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def killed(folder):
    """The folder, exit code and words of a run of which a rank was killed."""
    out = folder / "killed"
    script = write_script(folder / "killed.py", KILLED)
    return out, *torchrun(script, "train", "--out", out, *RUN_OPTIONS, limit=60)


def test_ranks_take_their_parts_of_the_same_global_batches(found):
    whole = [(batch.ids_x, batch.ids_u) for batch in loader_of(2 * BATCH)]
    assert len(whole) == 5
    for rank in range(2):
        assert len(found[rank]["order"]) == 5
        for mine, both in zip(found[rank]["order"], whole, strict=True):
            for part, ids in zip(mine, both, strict=True):
                assert torch.equal(part, ids.chunk(2)[rank])


@pytest.mark.parametrize("by_id", [True, False])
def test_two_processes_draw_for_every_sample_what_one_draws(found, by_id):
    whole = draws(2 * BATCH, by_id=by_id)
    for rank in range(2):
        for mine, both in zip(found[rank]["draws"][by_id], whole, strict=True):
            for name in ("top", "left", "flip", "zoom", "sigma", "lam"):
                assert torch.equal(mine[name], of_rank(both[name], rank)), name
            # partners are not those of one process: a rank mixes its own rows
            assert mine["index"].sort().values.tolist() == list(range(3 * BATCH))


@pytest.mark.parametrize("by_id", [True, False])
def test_ranks_draw_apart(found, by_id):
    for first, second in zip(*(found[rank]["draws"][by_id] for rank in range(2)), strict=True):
        assert (first["lam"] != second["lam"]).all()
        assert (first["sigma"] != second["sigma"]).all()


def test_ranks_draw_apart_in_supervised_training(found):
    assert found[0]["loss of the same images"] != found[1]["loss of the same images"]


def test_averaged_gradient_is_that_of_one_process(found):
    model = plain_model()
    (batch,) = batches(2 * BATCH, 1)
    loss_of(model, model, batch, builder(mix="none")).backward()
    assert torch.equal(found[0]["gradient"], found[1]["gradient"])
    torch.testing.assert_close(found[0]["gradient"], gradient(model), rtol=1e-5, atol=1e-6)


def test_no_sync_accumulates_the_gradient_of_one_process(found):
    model, mixmatch = plain_model(), builder(mix="none")
    for batch in batches(2 * BATCH, 2):
        loss_of(model, model, batch, mixmatch).backward()
    assert not torch.allclose(found[0]["own gradient"], found[1]["own gradient"], rtol=0.01)
    assert torch.equal(found[0]["accumulated"], found[1]["accumulated"])
    torch.testing.assert_close(found[0]["accumulated"], gradient(model), rtol=1e-5, atol=1e-6)


def test_sharded_model_guesses_and_trains_as_one_process(found):
    model, mixmatch = plain_model(), builder(mix="none")
    before = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for batch in batches(2 * BATCH, 2):
        loss_of(model, model, batch, mixmatch).backward()
        optimizer.step()
        optimizer.zero_grad()
    for rank in range(2):
        torch.testing.assert_close(found[rank]["sharded"], weights(model), rtol=1e-5, atol=1e-6)
    assert (weights(model) - before).abs().max() > 0.01


@pytest.mark.parametrize(
    "name",
    [
        *("fast", "paper", "yu1ut"),  # of MixMatch
        *("fixmatch", "freematch", "flexmatch", "ict", "remixmatch"),
    ],
)
def test_ranks_end_with_equal_weights_statistics_and_what_is_learnt_of_guesses(found, name):
    first, second = (found[rank]["digests"][name] for rank in range(2))
    assert first == second


def test_two_processes_learn(found):
    assert found[0]["summary"]["error"] < 20  # %; a guess at random has 90
    for name in ("error", "median_error", "best_error"):
        assert found[0]["summary"][name] == found[1]["summary"][name]


def test_rank_0_alone_reads_and_writes_files(folder, found):
    assert {path.name.split(".")[0] for path in (folder / "run-0").iterdir()} == {
        "checkpoint",
        "config",
        "curves",
        "events",
        "metrics",
    }
    assert not (folder / "run-1").exists()
    for rank in range(2):
        of_rank_0 = {name: found[0]["summary"][name] for name in ("seconds", "metrics")}
        expected = {**found[rank]["summary"], **of_rank_0}
        assert found[rank]["resumed summary"] == expected


def test_a_killed_rank_ends_the_job_with_an_error(killed):
    out, code, printed = killed
    assert code != 0
    assert "Signal 9 (SIGKILL)" in printed  # torchrun's words
    assert "local_rank: 1" in printed
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 8


def test_a_killed_job_resumes_to_the_last_bit(folder, found, killed):
    out, _, _ = killed
    module = ("-m", "gpu_mixmatch.cli")
    code, printed = torchrun(*module, "train", "--out", out, *RUN_OPTIONS, "--resume")
    assert code == 0, printed[-4000:]
    whole, resumed = (
        torch.load(path / "checkpoint.pt", weights_only=True) for path in (folder / "run-0", out)
    )
    assert whole["config"] == resumed["config"]
    assert whole["loader"] == resumed["loader"]
    assert resumed["loader"]["step"] == 60
    for part in ("model", "ema"):
        assert whole[part].keys() == resumed[part].keys()
        for name, value in whole[part].items():
            assert torch.equal(resumed[part][name], value), name
    for mine, theirs in zip(resumed["metrics"], whole["metrics"], strict=True):
        assert {**mine, "seconds": 0} == {**theirs, "seconds": 0}
    # one of the two ranks reports
    assert printed.count(f"test error {whole['metrics'][-1]['error']:.2f} %") == 1
    assert printed.count("wrote ") == 1


def test_checkpoint_of_two_processes_is_refused_by_one(folder, found):
    state = torch.load(folder / "run-0" / "checkpoint.pt", weights_only=True)
    with pytest.raises(ValueError, match=r"got world_size: 2 in the checkpoint, 1 now"):
        TrainRun(RUN).load_state_dict(state)


def test_sync_batchnorm_is_refused_on_a_cpu():
    with pytest.raises(ValueError, match=r"sync_batchnorm must be off where .* got device 'cpu'"):
        TrainConfig(sync_batchnorm=True)


def test_one_process_needs_no_group():
    with process_group("cpu"):
        assert not torch.distributed.is_initialized()
        run = TrainRun(TrainConfig(steps=1, batch_size=4))
        assert run.network is run.model
    assert current_device("cpu") == torch.device("cpu")


def test_one_gpu_for_all_ranks_is_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with (
        pytest.raises(ValueError, match=r"device must be 'cuda' under torchrun.*got 'cuda:1'"),
        process_group("cuda:1"),
    ):
        pass


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with (
        pytest.raises(ValueError, match=r"--nproc-per-node must be at most 3, .* got 4"),
        process_group("cuda"),
    ):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [(), ("--sync-batchnorm",)])
def test_gpus_train_and_resume(tmp_path, options):
    out = tmp_path / "run"
    command = ("-m", "gpu_mixmatch.cli", "train", "--out", out, "--device", "cuda", *options)
    processes = min(2, torch.cuda.device_count())
    for resume in ((), ("--resume",)):
        code, printed = torchrun(*command, *RUN_OPTIONS, *resume, processes=processes)
        assert code == 0, printed[-4000:]
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == list(range(4, 61, 4))
    assert entries[-1]["error"] < 20
