"""Train every method on small sets: ``python -m benchmarks.methods [SET...]``.

``digits`` is what ``gpu-mixmatch compare`` trains by default; ``fashion-mnist`` has 100 labels, and
its folder is ``--fashion``. Seconds are those of the CPU, so that other tenants of a machine count
less. No setting was chosen with the test images of these runs.

Runs lie in ``--runs`` and go on where they were: a killed command is given again. Results go to
``SET-compare--MACHINE.json``, with the kernels of this package that a step would launch on CUDA;
those of torch are not counted.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import schema
from benchmarks.common import RESULTS, ROOT, Skipped, commit, need
from benchmarks.launches import recording
from gpu_mixmatch.recipes import ablate, compare
from gpu_mixmatch.recipes.choices import choose_guess, choose_preset
from gpu_mixmatch.recipes.train import TrainConfig

SEEDS = (0, 1, 2)
SETS = {
    "digits": TrainConfig(steps=800),
    "fashion-mnist": TrainConfig(
        "fashion-mnist", labels=100, steps=800, batch_size=32, eval_every=80
    ),
}


def main() -> None:
    """Train what the command line names, and write its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="*", choices=[*SETS, []], help="default: both")
    parser.add_argument("--methods", help="comma-separated; default: all")
    parser.add_argument("--fashion", default="/usr/share/datasets/fashion-mnist", metavar="FOLDER")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "methods")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = compare.choose_methods(arguments.methods)
    for name in arguments.sets or SETS:
        print(f"wrote {train(name, rows, arguments.fashion, arguments.runs, arguments.out)}")


def train(name: str, rows: list[ablate.Row], fashion: str, runs: Path, out: Path) -> Path:
    """Train the rows on a set, or take what was trained, and write the results."""
    config, folder = SETS[name], runs / name
    if name == "fashion-mnist":
        config = TrainConfig(**{**vars(config), "root": fashion})
    results = ablate.compare(config, rows, SEEDS, out=folder, clock=time.process_time, on_run=tell)
    command = f"python -m benchmarks.methods {name}"
    path = compare.save_comparison(results, config, SEEDS, command, folder / "compare.json")
    content = schema.load(path) | {"commit": commit()}
    for row in content["rows"]:
        counted = None if row["key"] == ablate.SUPERVISED.key else kernels(row["key"])
        if counted is not None:
            row["kernels"] = list(counted)
    path = out / f"{name}-compare--{content['machine']}.json"
    schema.dump(content, path)
    return path


def kernels(method: str) -> tuple[int, int] | None:
    """How many kernels of ours a batch and its loss launch, forward and backward.

    Returns:
        The numbers, or None where Triton is not installed.
    """
    try:
        need("triton")
    except Skipped:
        return None
    preset = choose_preset("fast", "cifar10", method)
    num_x, num_u = 8, 8 * preset.ratio
    x, u = (torch.zeros(count, 3, 32, 32, dtype=torch.uint8) for count in (num_x, num_u))
    more = {"num_unlabelled": num_u} if method == "flexmatch" else {}

    def model(images: Tensor) -> Tensor:
        return torch.zeros(len(images), 10)

    with recording() as of_batch:
        builder = preset.build(10, weak=preset.augment(impl="triton"), impl="triton", **more)
        guesser = model if choose_guess(method, None) == "first" else None
        y, ids_u = torch.zeros(num_x, dtype=torch.int64), torch.arange(num_u)
        batch = builder(x, y, u, guesser, ids_u=ids_u)
    with recording() as of_loss:
        logits = model(batch.inputs).requires_grad_()
        preset.criterion(impl="triton")(logits, batch).loss.backward()
    return len(of_batch), len(of_loss)


def tell(row: ablate.Row, seed: int) -> None:
    """Say what is trained."""
    print(f"{row.label}, seed {seed}", flush=True)


if __name__ == "__main__":
    main()
