"""The command line: train, preview, ablate, demo, bench, check-images and doctor."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from gpu_mixmatch._extras import missing_package

try:
    import typer
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    raise SystemExit(str(missing_package(error, "typer", "the command line"))) from error

import torch

from gpu_mixmatch._ranks import is_launched, rank
from gpu_mixmatch.cli import bench, doctor
from gpu_mixmatch.data import check_images
from gpu_mixmatch.data.datasets import load_dataset
from gpu_mixmatch.insight.dataset_preview import preview_dataset
from gpu_mixmatch.recipes import ablate
from gpu_mixmatch.recipes.choices import choose_filters, choose_preset, make_augment, make_weak
from gpu_mixmatch.recipes.distributed import process_group
from gpu_mixmatch.recipes.train import TrainConfig, train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="MixMatch batches for PyTorch: train, look at the batches, repeat the paper's ablation.",
)
console = Console()

DatasetOption = Annotated[
    str, typer.Option(help="digits, mnist, fashion-mnist, cifar10, cifar100 or folder.")
]
RootOption = Annotated[
    str | None,
    typer.Option(
        help="Folder of the data set's files; digits need none. For folder, it holds "
        "labelled/CLASS/, unlabelled/ and, to test on, test/CLASS/."
    ),
]
LabelsOption = Annotated[
    int | None,
    typer.Option(help="Labelled images, balanced over the classes; default: 40, of a folder all."),
]
SizeOption = Annotated[
    int, typer.Option(help="Height and width that a folder's images are brought to, in pixels.")
]
AugmentOption = Annotated[
    str,
    typer.Option(
        help="Engine of the preset's augmentation: weak (this package's), dali (the same views) "
        "or kornia (the same policy, other draws)."
    ),
]
LoaderOption = Annotated[
    str,
    typer.Option(
        help="resident (all images on the device), dataloader (worker processes) or dali (decodes "
        "a folder's files)."
    ),
]
FiltersOption = Annotated[
    int | None,
    typer.Option(
        help="Channels of the network's first stage; default: 32, or with wrn-28-2 the preset's, "
        "which for cifar100 is 135."
    ),
]
StepsOption = Annotated[int, typer.Option(help="Length of a run in batches.")]
BatchOption = Annotated[
    int, typer.Option(help="Labelled images of a step and process, and as many unlabelled ones.")
]
ModelOption = Annotated[str, typer.Option(help="cnn (small and quick) or wrn-28-2 (the paper's).")]
PresetOption = Annotated[
    str,
    typer.Option(
        help="fast (one forward pass), paper (its separate guesses and interleaved forward), "
        "yu1ut or usb."
    ),
]
DeviceOption = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1; auto takes cuda if it is there.")
]
SeedsOption = Annotated[str, typer.Option(help="Seeds, comma-separated.")]


@app.command("train")
def train_command(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, metrics and curves.")],
    dataset: DatasetOption = "digits",
    root: RootOption = None,
    size: SizeOption = 32,
    labels: LabelsOption = None,
    steps: StepsOption = 800,
    batch_size: BatchOption = 64,
    model: ModelOption = "cnn",
    filters: FiltersOption = None,
    preset: PresetOption = "fast",
    augment: AugmentOption = "weak",
    loader: LoaderOption = "resident",
    workers: Annotated[
        int, typer.Option(help="Processes of the dataloader, for each of its two data sets.")
    ] = 2,
    seed: Annotated[int, typer.Option(help="Of weights, labels, order and draws.")] = 0,
    device: DeviceOption = "auto",
    sync_batchnorm: Annotated[
        bool,
        typer.Option(
            "--sync-batchnorm", help="One BatchNorm over all processes of torchrun; on CUDA."
        ),
    ] = False,
    supervised: Annotated[
        bool, typer.Option("--supervised", help="Train on the labelled images alone.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the checkpoint in the folder.")
    ] = False,
    lambda_u: Annotated[
        float | None,
        typer.Option(
            help="Weight of the unlabelled loss; default: preset's, less in a run below 32,768."
        ),
    ] = None,
    rampup_steps: Annotated[
        int | None,
        typer.Option(help="Steps of the weight's ramp; default: preset's, at most half a run."),
    ] = None,
    eval_every: Annotated[
        int, typer.Option(help="Steps between evaluations; 0: a twentieth of the run.")
    ] = 0,
) -> None:
    """Train a classifier with MixMatch, or supervised only, and draw its curves.

    Under torchrun, in several processes: torchrun --nproc-per-node=2 -m gpu_mixmatch.cli train ...
    """
    config = TrainConfig(
        dataset=dataset,
        root=root,
        size=size,
        labels=_labels(dataset, labels),
        steps=steps,
        batch_size=batch_size,
        model=model,
        filters=filters,
        preset=preset,
        augment=augment,
        loader=loader,
        num_workers=workers,
        seed=seed,
        device=_device(device),
        sync_batchnorm=sync_batchnorm,
        supervised=supervised,
        lambda_u=lambda_u,
        rampup_steps=rampup_steps,
        eval_every=eval_every,
    )
    with process_group(config.device):
        console.quiet = rank() > 0
        _train(config, out, resume)


@app.command("preview")
def preview_command(
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("preview.png"),
    dataset: DatasetOption = "digits",
    root: RootOption = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    k: Annotated[int, typer.Option(help="Views per unlabelled image, K.")] = 2,
    labels: LabelsOption = None,
    size: SizeOption = 32,
    augment: AugmentOption = "weak",
) -> None:
    """Draw one batch: originals, views, guesses, and the mixed pairs with their weights."""
    config = TrainConfig(
        dataset=dataset, root=root, size=size, labels=_labels(dataset, labels), augment=augment
    )
    data = load_dataset(dataset, root, size)
    preset = choose_preset("paper", dataset)
    height, width = data.test_images.shape[2:]
    weak = make_weak(dataset, preset, height)
    path = preview_dataset(
        data,
        out,
        seed=seed,
        preset=preset,
        augment=make_augment(augment, weak, height, width),
        num_augmentations=k,
        labels=config.labels,
    )
    typer.echo(f"wrote {path}")


@app.command("check-images")
def check_images_command(
    folder: Annotated[Path, typer.Argument(help="Folder of images, looked through at any depth.")],
    list_path: Annotated[
        Path | None, typer.Option("--list", help="File to write that lists the good images.")
    ] = None,
) -> None:
    """Decode every image of a folder by DALI, and list those that fail; exit code 1 if any do."""
    with _progress() as progress:
        task = progress.add_task("decoding", total=None, note="")

        def on_images(seen: int, total: int) -> None:
            progress.update(task, completed=seen, total=total)

        checked = check_images(folder, list_path, progress=on_images)
    for path, reason in checked.bad.items():
        typer.echo(f"{path}: {reason}")
    typer.echo(f"{len(checked.good)} images decode, {len(checked.bad)} do not")
    if list_path is not None:
        typer.echo(f"wrote {list_path}")
    if checked.bad:
        raise typer.Exit(1)


@app.command("ablate")
def ablate_command(
    out: Annotated[Path, typer.Option(help="Folder for ablation.json and ablation.png.")],
    dataset: DatasetOption = "digits",
    root: RootOption = None,
    labels: LabelsOption = None,
    steps: StepsOption = 800,
    batch_size: BatchOption = 64,
    model: ModelOption = "cnn",
    preset: PresetOption = "fast",
    seeds: SeedsOption = "0,1,2",
    device: DeviceOption = "auto",
    rows: Annotated[
        str | None,
        typer.Option(help=f"Of {', '.join(r.key for r in ablate.ABLATION)}; default: all."),
    ] = None,
) -> None:
    """Repeat the paper's ablation on a data set, next to the paper's own column."""
    config = TrainConfig(
        dataset=dataset,
        root=root,
        labels=_labels(dataset, labels),
        steps=steps,
        batch_size=batch_size,
        model=model,
        preset=preset,
        device=_device(device),
    )
    chosen = ablate.choose_rows(rows)
    results = _compare(config, chosen, seeds)
    ablate.save_results(results, config, _seeds(seeds), _command_line(), out / "ablation.json")
    title = f"{dataset}, {_labels_text(config.labels)} labels, {model}, {len(_seeds(seeds))} seeds"
    picture = ablate.draw_bars(results, title, out / "ablation.png", with_paper=True)
    typer.echo(f"wrote {picture} and ablation.json")


@app.command("demo")
def demo_command(
    out: Annotated[
        Path | None, typer.Option(help="Folder for demo.json and demo.png; default: none.")
    ] = None,
    dataset: DatasetOption = "digits",
    root: RootOption = None,
    labels: LabelsOption = None,
    steps: StepsOption = 800,
    model: ModelOption = "cnn",
    seeds: SeedsOption = "0,1,2",
    device: DeviceOption = "auto",
) -> None:
    """Train with few labels, supervised only and with MixMatch, and print both errors."""
    config = TrainConfig(
        dataset=dataset,
        root=root,
        labels=_labels(dataset, labels),
        steps=steps,
        model=model,
        device=_device(device),
    )
    results = _compare(config, [ablate.SUPERVISED, ablate.FULL], seeds)
    supervised, mixmatch = (result.mean for result in results)
    console.print(f"MixMatch: {mixmatch / max(supervised, 1e-9):.2f} × the supervised error")
    if out:
        ablate.save_results(results, config, _seeds(seeds), _command_line(), out / "demo.json")
        title = f"{dataset}, {_labels_text(config.labels)} labels, {model}"
        ablate.draw_bars(results, title, out / "demo.png")
        typer.echo(f"wrote {out}/demo.json and demo.png")


@app.command("bench")
def bench_command(
    size: Annotated[int, typer.Option(help="Height and width of the images, in pixels.")] = 32,
    batch_size: Annotated[int, typer.Option(help="Labelled images, and as many unlabelled.")] = 64,
    k: Annotated[int, typer.Option("--k", help="Views of an unlabelled image.")] = 2,
    model: ModelOption = "wrn-28-2",
    device: DeviceOption = "auto",
) -> None:
    """Time the engines on this machine: what a batch costs, and its share of a training step."""
    with _progress() as progress:
        task = progress.add_task("bench", total=None, note="")
        result = bench.bench(
            size,
            batch_size,
            k,
            model,
            _device(device),
            on_part=lambda part: progress.update(task, note=part),
        )
    typer.echo(bench.as_text(result))


@app.command("doctor")
def doctor_command() -> None:
    """Show which engines and devices are usable here, and why the others are not."""
    table = Table(title="gpu-mixmatch doctor")
    for heading in ("", "what", "state", "remedy"):
        table.add_column(heading, overflow="fold")
    for finding in doctor.examine():
        mark = "[green]ok[/]" if finding.usable else "[yellow]no[/]"
        # Text: an extra's brackets are not markup
        table.add_row(mark, finding.name, Text(finding.detail), Text(finding.remedy or ""))
    console.print(table)


def main() -> None:
    """Run the command line; wrong input ends in one line and exit code 2."""
    try:
        app()
    except (ValueError, TypeError, ImportError, RuntimeError, OSError) as error:
        where = f" on rank {os.environ['RANK']}" if is_launched() else ""
        typer.echo(f"error{where}: {error}", err=True)
        sys.exit(2)


def _train(config: TrainConfig, out: Path, resume: bool) -> None:
    tested_on = "test" if _has_test(config.dataset, config.root) else "labelled"
    if tested_on == "labelled":
        console.print(f"There is no {config.root}/test: errors are those on the labelled images.")
    preset = choose_preset(config.preset, config.dataset)
    filters = choose_filters(config.model, config.filters, preset)
    if filters is not None:
        console.print(f"{config.model} with {filters} filters in its first stage")
    with _progress() as progress:
        task = progress.add_task("training", total=config.steps, note="")

        def on_step(step: int, metrics: dict[str, float]) -> None:
            note = f"error {metrics['error']:.2f} %" if metrics else ""
            progress.update(task, completed=step, note=note)

        summary = train(config, out, resume=resume, on_step=on_step)
    console.print(
        f"{tested_on} error {summary.error:.2f} %, median of the last 20 evaluations "
        f"{summary.median_error:.2f} %, {config.steps / max(summary.seconds, 1e-9):.1f} steps/s"
    )
    if rank() == 0:
        typer.echo(f"wrote {out}/curves.png, metrics.jsonl and checkpoint.pt")


def _compare(config: TrainConfig, rows: list[ablate.Row], seeds: str) -> list[ablate.Result]:
    numbers = _seeds(seeds)
    if not _has_test(config.dataset, config.root):
        raise ValueError(f"root must hold a folder test to compare on, got none in {config.root}")
    with _progress() as progress:
        total = progress.add_task(
            "all runs", total=len(rows) * len(numbers) * config.steps, note=""
        )
        task = progress.add_task("", total=config.steps, note="")

        def on_run(row: ablate.Row, seed: int) -> None:
            progress.update(task, completed=0, description=f"{row.label}, seed {seed}", note="")

        def on_step(step: int, metrics: dict[str, float]) -> None:
            note = f"error {metrics['error']:.2f} %" if metrics else ""
            progress.update(task, completed=step, note=note)
            progress.advance(total)

        results = ablate.compare(config, rows, numbers, on_run=on_run, on_step=on_step)
    table = Table(
        title=f"Test error in %, {config.dataset}, {_labels_text(config.labels)} labels, "
        f"{config.steps} steps"
    )
    table.add_column("")
    for seed in numbers:
        table.add_column(f"seed {seed}", justify="right")
    table.add_column("mean ± sd", justify="right")
    with_paper = len(rows) > 2
    if with_paper:
        table.add_column("paper, CIFAR-10, 250 / 4000", justify="right")
    for result in results:
        cells = [f"{error:.2f}" for error in result.errors]
        cells.append(f"{result.mean:.2f} ± {result.deviation:.2f}")
        if with_paper:
            paper = result.row.paper
            cells.append(f"{paper[0]:.2f} / {paper[1]:.2f}" if paper else "")
        table.add_row(result.row.label, *cells)
    console.print(table)
    return results


def _labels(dataset: str, labels: int | None) -> int | None:
    return 40 if labels is None and dataset != "folder" else labels


def _labels_text(labels: int | None) -> str:
    return "all" if labels is None else str(labels)


def _has_test(dataset: str, root: str | None) -> bool:
    return dataset != "folder" or root is None or Path(root, "test").expanduser().is_dir()


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ValueError(f"seeds must be integers, comma-separated, got {text!r}") from None


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(name).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be usable here, got {name!r}; see gpu-mixmatch doctor")
    return name


def _command_line() -> str:
    return " ".join(["gpu-mixmatch", *sys.argv[1:]])


@contextmanager
def _progress() -> Iterator[Progress]:
    columns: list[Any] = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    ]
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress
