"""The command line: train, compare, predict, preview, ablate, demo, bench, and what checks."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, cast, get_args

from gpu_mixmatch._extras import missing_package, need

try:
    import typer
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    raise SystemExit(str(missing_package(error, "typer", "the command line"))) from error

import torch

from gpu_mixmatch._ranks import is_launched
from gpu_mixmatch._version import __version__
from gpu_mixmatch.cli import bench, doctor
from gpu_mixmatch.cli.terminal import (
    Commands,
    choice,
    console,
    ended_in_order,
    exit_code,
    printable,
    progress,
    quiet_decoders,
    say,
    this_command,
)
from gpu_mixmatch.data import check_images
from gpu_mixmatch.data.check import DECODERS, Decoder
from gpu_mixmatch.data.datasets import load_dataset
from gpu_mixmatch.data.folder import OnError
from gpu_mixmatch.data.index import SUFFIXES_READ, describe_left_out
from gpu_mixmatch.recipes import ablate
from gpu_mixmatch.recipes import compare as comparison
from gpu_mixmatch.recipes.checkpoint import check_writable
from gpu_mixmatch.recipes.choices import (
    AUGMENTS,
    GUESSES,
    LOADERS,
    METHODS,
    PRESET_NAMES,
    choose_preset,
    make_augment,
    make_weak,
)
from gpu_mixmatch.recipes.dataset_preview import preview_dataset
from gpu_mixmatch.recipes.distributed import process_group
from gpu_mixmatch.recipes.models import MODEL_NAMES
from gpu_mixmatch.recipes.predict import predict, write_labels
from gpu_mixmatch.recipes.train import DivergenceError, TrainConfig, TrainRun, train

app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False)

DATASETS = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "folder")

DatasetOption = Annotated[str, choice(DATASETS, "The data set; digits come with scikit-learn.")]
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
    choice(
        AUGMENTS,
        "Engine of the preset's augmentation: this package's; that with FixMatch's operations and "
        "cutout behind it, scaled to images below 32 px; the policy of weak with other draws by "
        "Kornia; or weak's views by DALI.",
    ),
]
LoaderOption = Annotated[
    str,
    choice(
        LOADERS,
        "What batches come from: all images on the device, worker processes, or DALI, which "
        "decodes a folder's files.",
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
    int, typer.Option(help="Labelled images of a step and process; --ratio says how many others.")
]
RatioOption = Annotated[
    int | None,
    typer.Option(
        help="Unlabelled images per labelled one; default: the method's own, with fast at most 2."
    ),
]
ModelOption = Annotated[
    str, choice(MODEL_NAMES, "The network: the paper's, or a small and quick one.")
]
PresetOption = Annotated[
    str,
    choice(
        PRESET_NAMES,
        "Whose settings: the paper's in one forward pass, with one optimiser for all methods; the "
        "method's paper's, MixMatch with its separate guesses and interleaved forward; or those of "
        "a port of MixMatch.",
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(metavar="[auto|cpu|cuda|cuda:N]", help="auto takes cuda if it is there."),
]
SeedsOption = Annotated[str, typer.Option(help="Seeds, comma-separated.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gpu-mixmatch {__version__}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def gpu_mixmatch(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """MixMatch and its kin for PyTorch: train, compare methods, look at their batches."""


@app.command("train")
def train_command(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, metrics and curves.")],
    dataset: DatasetOption = "digits",
    root: RootOption = None,
    size: SizeOption = 32,
    labels: LabelsOption = None,
    steps: StepsOption = 800,
    batch_size: BatchOption = 64,
    method: Annotated[str, choice(METHODS, "The method.")] = "mixmatch",
    ratio: RatioOption = None,
    guess: Annotated[
        str | None,
        choice(
            GUESSES,
            "Guess before the pass that is trained, without gradients; or let the loss guess by "
            "that same pass. Default: as the method's reference does.",
        ),
    ] = None,
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
            help="Weight of the unlabelled loss; default: preset's, of a squared error less in a "
            "run below 32,768 steps."
        ),
    ] = None,
    rampup_steps: Annotated[
        int | None,
        typer.Option(help="Steps of the weight's ramp; default: preset's, at most half a run."),
    ] = None,
    eval_every: Annotated[
        int, typer.Option(help="Steps between evaluations; 0: a twentieth of the run.")
    ] = 0,
    on_error: Annotated[
        str,
        choice(
            get_args(OnError),
            "A folder's files that do not decode: stop at the first; or find all before the first "
            "step and leave them out, listed in skipped.txt.",
        ),
    ] = "raise",
    list_path: Annotated[
        Path | None,
        typer.Option("--list", help="List of a folder's files to read, of check-images --list."),
    ] = None,
) -> None:
    """Train a classifier with MixMatch or another method, or supervised only; draw its curves.

    Under torchrun, in several processes: torchrun --nproc-per-node=2 -m gpu_mixmatch.cli train ...

    With --resume, repeat the options of the run; --steps may be more, and --workers, --device,
    --eval-every and --root others.
    """
    config = TrainConfig(
        dataset=dataset,
        root=root,
        size=size,
        labels=_labels(dataset, labels),
        steps=steps,
        batch_size=batch_size,
        method=method,
        ratio=ratio,
        guess=guess,
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
        on_error=cast(OnError, on_error),
        list_path=None if list_path is None else str(list_path),
    )
    decoders = quiet_decoders() if loader == "dali" else nullcontext()
    with process_group(config.device), ended_in_order(), decoders:
        _train(config, out, resume)


@app.command("compare")
def compare_command(
    out: Annotated[
        Path, typer.Option(help="Folder for compare.json, compare.png and a folder of each run.")
    ],
    methods: Annotated[
        str | None,
        typer.Option(help=f"Of {', '.join(r.key for r in comparison.ROWS)}; default: all."),
    ] = None,
    dataset: DatasetOption = "digits",
    root: RootOption = None,
    size: SizeOption = 32,
    labels: LabelsOption = None,
    steps: StepsOption = 800,
    batch_size: BatchOption = 64,
    ratio: RatioOption = None,
    model: ModelOption = "cnn",
    preset: PresetOption = "fast",
    seeds: SeedsOption = "0,1,2",
    device: DeviceOption = "auto",
) -> None:
    """Train methods at equal labels, steps, network and seeds; draw their errors.

    A folder that has runs already is gone on with: repeat the options of the first command. Runs
    that have ended are not trained again, and --methods and --seeds may be others.
    """
    config = TrainConfig(
        dataset=dataset,
        root=root,
        size=size,
        labels=_labels(dataset, labels),
        steps=steps,
        batch_size=batch_size,
        ratio=ratio,
        model=model,
        preset=preset,
        device=_device(device),
    )
    rows = comparison.choose_methods(methods)
    _check_pictures(out)
    results = _compare(config, rows, seeds, out)
    path = comparison.save_comparison(
        results, config, _seeds(seeds), this_command(), out / "compare.json"
    )
    found = json.loads(path.read_text())["rows"]
    title = f"{dataset}, {_labels_text(config.labels)} labels, {model}, {len(_seeds(seeds))} seeds"
    picture = comparison.draw_comparison(found, title, out / "compare.png")
    say(f"wrote {picture} and compare.json")


@app.command("predict")
def predict_command(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or its checkpoint.")],
    folder: Annotated[Path, typer.Argument(help="Folder of images, looked through at any depth.")],
    out: Annotated[Path, typer.Option(help="CSV to write: file, label, confidence.")],
    batch_size: Annotated[int, typer.Option(help="Images that are classified at once.")] = 64,
    device: DeviceOption = "auto",
) -> None:
    """Label the images of a folder by a run's model; exit code 1 if any cannot be read."""
    if out.exists():
        raise ValueError(f"out must be a file that does not exist yet, got {out}")
    predictions = predict(run, folder, batch_size=batch_size, device=_device(device))
    with progress() as bars, ended_in_order():
        task = bars.add_task("predicting", total=len(predictions), note="")
        counts = write_labels(predictions, out, lambda seen: bars.update(task, completed=seen))
    for reason in predictions.unreadable.values():
        typer.echo(printable(reason), err=True)
    if predictions.left_out:
        say(f"left out: {describe_left_out(predictions.left_out)}")
    found = ", ".join(f"{label} {count}" for label, count in counts.most_common())
    say(
        f"wrote {out}: {counts.total()} images labelled, {len(predictions.unreadable)} not "
        f"readable; {found or 'no label'}"
    )
    if predictions.unreadable:
        raise typer.Exit(1)


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
    need("matplotlib.figure", "a preview")
    check_writable(out.parent)
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
    say(f"wrote {path}")


@app.command("check-images")
def check_images_command(
    folder: Annotated[Path, typer.Argument(help="Folder of images, looked through at any depth.")],
    list_path: Annotated[
        Path | None, typer.Option("--list", help="File to write that lists the good images.")
    ] = None,
    decoder: Annotated[
        str,
        choice(DECODERS, "Pillow, as --loader resident and dataloader decode, or DALI, as dali."),
    ] = "pil",
) -> None:
    """Decode every image of a folder, and show those that fail.

    Exit code 0 if all decode, 1 if some do not or the list cannot name all, 2 if there are none.
    """
    with progress() as bars, quiet_decoders():
        task = bars.add_task("decoding", total=None, note="")

        def on_images(seen: int, total: int) -> None:
            bars.update(task, completed=seen, total=total)

        judge = cast(Decoder, decoder)
        checked = check_images(folder, list_path, decoder=judge, progress=on_images)
    for path, reason in checked.bad.items():
        say(f"{path}: {reason}")
    if checked.left_out:
        say(f"left out: {describe_left_out(checked.left_out)}")
    if not checked.good and not checked.bad:
        raise ValueError(
            f"folder must hold at least one image, got none in {folder}. Suffixes that are read: "
            f"{SUFFIXES_READ}"
        )
    say(f"{len(checked.good)} images decode, {len(checked.bad)} do not")
    if list_path is not None and checked.good:
        say(f"wrote {list_path}")
        if checked.unlisted:
            say(
                f"it lacks {len(checked.unlisted)} good images, whose names have a tab or a line "
                f"end: {', '.join(checked.unlisted[:3])}"
            )
    if checked.bad or checked.unlisted:
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
    _check_pictures(out)
    results = _compare(config, chosen, seeds)
    ablate.save_results(results, config, _seeds(seeds), this_command(), out / "ablation.json")
    title = f"{dataset}, {_labels_text(config.labels)} labels, {model}, {len(_seeds(seeds))} seeds"
    picture = ablate.draw_bars(results, title, out / "ablation.png", with_paper=True)
    say(f"wrote {picture} and ablation.json")


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
    _check_pictures(out)
    results = _compare(config, [ablate.SUPERVISED, ablate.FULL], seeds)
    supervised, mixmatch = (result.mean for result in results)
    say(f"MixMatch: {mixmatch / max(supervised, 1e-9):.2f} × the supervised error")
    if out:
        ablate.save_results(results, config, _seeds(seeds), this_command(), out / "demo.json")
        title = f"{dataset}, {_labels_text(config.labels)} labels, {model}"
        ablate.draw_bars(results, title, out / "demo.png")
        say(f"wrote {out}/demo.json and demo.png")


@app.command("bench")
def bench_command(
    size: Annotated[int, typer.Option(help="Height and width of the images, in pixels.")] = 32,
    batch_size: Annotated[int, typer.Option(help="Labelled images, and as many unlabelled.")] = 64,
    k: Annotated[int, typer.Option("--k", help="Views of an unlabelled image.")] = 2,
    model: ModelOption = "wrn-28-2",
    device: DeviceOption = "auto",
    augment: Annotated[
        str,
        choice(
            get_args(bench.Views),
            "Views of the preset's kind, by all engines that make them; or strong ones, by each "
            "implementation.",
        ),
    ] = "weak",
) -> None:
    """Time the engines on this machine: what a batch costs, and its share of a training step."""
    with progress() as bars:
        task = bars.add_task("bench", total=None, note="")
        result = bench.bench(
            size,
            batch_size,
            k,
            model,
            _device(device),
            augment=cast(bench.Views, augment),
            on_part=lambda part: bars.update(task, note=part),
        )
    typer.echo(bench.as_text(result))


@app.command("doctor")
def doctor_command() -> None:
    """Show what is usable here, why the rest is not, and what one is ready for.

    Exit code 1 if something is missing that everyone needs.
    """
    findings = doctor.examine()
    table = Table(title="gpu-mixmatch doctor")
    for heading in ("", "what", "state", "remedy"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        absent = "[dim]optional[/]" if doctor.is_optional(finding) else "[yellow]no[/]"
        mark = "[green]ok[/]" if finding.usable else absent
        # Text: an extra's brackets are not markup
        table.add_row(mark, finding.name, Text(finding.detail), Text(finding.remedy or ""))
    console.print(table)
    verdicts = doctor.conclude(findings)
    for verdict in verdicts:
        say(str(verdict))
    if any(verdict.missing and not verdict.optional for verdict in verdicts):
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; `terminal.Commands` says how it ends."""
    app()


def _train(config: TrainConfig, out: Path, resume: bool) -> None:
    latest: dict[str, float] = {}  # of the last evaluation, which the checkpoint is of
    now = 0
    tested_on = ""
    with progress() as bars:
        task = bars.add_task("training", total=config.steps, note="")
        skipped: Mapping[str, str] = {}

        def on_check(seen: int, total: int) -> None:
            bars.update(task, description="decoding", completed=seen, total=total)

        def on_start(run: TrainRun) -> None:
            nonlocal latest, now, tested_on, skipped
            bars.update(task, description="training", completed=run.step, total=config.steps)
            skipped = run.skipped
            now, tested_on = run.step, run.tested_on
            latest = run.metrics[-1] if run.metrics else {}
            for line in _about(run):
                say(line)

        def on_step(step: int, metrics: dict[str, float]) -> None:
            nonlocal latest, now
            now = step
            note = f"error {metrics['error']:.2f} %" if metrics else ""
            if "confidence" in metrics:
                note += f", guesses {metrics['confidence']:.2f} sure"
            if "kept" in metrics:
                note += f", {metrics['kept']:.0%} kept"
            bars.update(task, completed=step, note=note)
            if metrics.get("step") == step and not console.is_terminal:
                say(_evaluation(metrics, latest, config.steps))
            latest = metrics

        try:
            summary = train(
                config, out, resume=resume, on_check=on_check, on_start=on_start, on_step=on_step
            )
        except KeyboardInterrupt as interrupt:
            bars.stop()
            _say_how_to_go_on(out, now, latest)
            raise typer.Exit(exit_code(interrupt)) from interrupt
        except DivergenceError:
            raise
        except (OSError, RuntimeError) as error:
            if latest:
                error.add_note(f"{out}/checkpoint.pt of step {int(latest['step'])} is whole")
            raise
    say(
        f"{tested_on} error {summary.error:.2f} %, median of the last 20 evaluations "
        f"{summary.median_error:.2f} %, {now / max(summary.seconds, 1e-9):.1f} steps/s"
    )
    if summary.confidence is not None:
        say(_compared(summary.confidence, summary.error, tested_on))
    listed = f", skipped.txt ({len(skipped)} files)" if skipped else ""
    say(f"wrote {out}/curves.png, metrics.jsonl{listed} and checkpoint.pt")


def _compared(confidence: float, error: float, tested_on: str) -> str:
    """Set the confidence of guesses beside the accuracy that it should not exceed by far."""
    text = f"guesses {confidence:.2f} sure, {tested_on} accuracy {1 - error / 100:.2f}"
    if tested_on == "labelled":
        text += ", which says little of the guesses: the labelled images are trained on"
    return text


def _about(run: TrainRun) -> list[str]:
    """Say what a user may not expect of a run, before its first step."""
    config, order = run.config, run.loader.order
    lines = []
    if run.step:
        lines.append(f"going on after step {run.step} of {config.steps}")
    if run.left_out:
        lines.append(f"left out: {describe_left_out(run.left_out)}")
    if run.tested_on == "labelled":
        lines.append(f"There is no {config.root}/test: errors are those on the labelled images.")
    if config.filters is not None:
        lines.append(f"{config.model} with {config.filters} filters in its first stage")
    per_step = order.world_size * order.ratio * order.batch_size
    if per_step > order.num_unlabelled and not config.supervised:
        lines.append(
            f"A step takes {per_step} unlabelled images and there are {order.num_unlabelled}, so "
            f"that each comes {per_step / order.num_unlabelled:.1f} times in it; a --batch-size of "
            f"{max(1, order.num_unlabelled // (order.world_size * order.ratio))} takes each once."
        )
    return lines


def _evaluation(metrics: dict[str, float], before: dict[str, float], steps: int) -> str:
    """Return the line of an evaluation, for logs."""
    taken = metrics["step"] - before.get("step", 0)
    seconds = metrics["seconds"] - before.get("seconds", 0.0)
    guesses = f"guesses {metrics['confidence']:.2f} sure  " if "confidence" in metrics else ""
    guesses += f"kept {metrics['kept']:.2f}  " if "kept" in metrics else ""
    return (
        f"step {int(metrics['step'])}/{steps}  error {metrics['error']:.2f} %  {guesses}"
        f"loss {metrics['loss']:.4g}  {taken / max(seconds, 1e-9):.1f} steps/s"
    )


def _say_how_to_go_on(out: Path, step: int, latest: dict[str, float]) -> None:
    again = f"Go on with: {this_command('--resume')}"
    if is_launched():
        again = "Go on with the same torchrun command and --resume"
    if not latest:
        say(f"stopped after step {step}, before the first checkpoint. {again}")
        return
    say(f"stopped after step {step}; {out}/checkpoint.pt is of step {int(latest['step'])}. {again}")


def _compare(
    config: TrainConfig, rows: list[ablate.Row], seeds: str, out: Path | None = None
) -> list[ablate.Result]:
    numbers = _seeds(seeds)
    if not _has_test(config.dataset, config.root):
        raise ValueError(f"root must hold a folder test to compare on, got none in {config.root}")
    with progress() as bars, ended_in_order():
        total = bars.add_task("all runs", total=len(rows) * len(numbers) * config.steps, note="")
        task = bars.add_task("", total=config.steps, note="")
        running = [""]

        def on_run(row: ablate.Row, seed: int) -> None:
            running[0] = f"{row.label}, seed {seed}"
            bars.update(task, completed=0, description=running[0], note="")

        def on_start(run: TrainRun) -> None:
            bars.update(task, completed=run.step)
            bars.advance(total, run.step)
            if run.step and not console.is_terminal:
                say(f"{running[0]}: {run.step} steps were taken before")

        def on_step(step: int, metrics: dict[str, float]) -> None:
            note = f"error {metrics['error']:.2f} %" if metrics else ""
            bars.update(task, completed=step, note=note)
            bars.advance(total)
            if step == config.steps and not console.is_terminal:
                say(f"{running[0]}: {note} after {step} steps")

        try:
            results = ablate.compare(
                *(config, rows, numbers),
                out=out,
                on_run=on_run,
                on_start=on_start,
                on_step=on_step,
            )
        except KeyboardInterrupt as interrupt:
            if out is None:
                raise
            bars.stop()
            say(f"stopped in {running[0]}. Go on with: {this_command()}")
            raise typer.Exit(exit_code(interrupt)) from interrupt
    table = Table(
        title=f"Test error in %, {config.dataset}, {_labels_text(config.labels)} labels, "
        f"{config.steps} steps"
    )
    table.add_column("")
    for seed in numbers:
        table.add_column(f"seed {seed}", justify="right")
    table.add_column("mean ± sd", justify="right")
    with_paper = any(row.paper for row in rows) and len(rows) > 2
    if with_paper:
        table.add_column("paper, CIFAR-10, 250 / 4000", justify="right")
    if out is not None:
        table.add_column("seconds", justify="right")
    for result in results:
        cells = [f"{error:.2f}" for error in result.errors]
        cells.append(f"{result.mean:.2f} ± {result.deviation:.2f}")
        if with_paper:
            paper = result.row.paper
            cells.append(f"{paper[0]:.2f} / {paper[1]:.2f}" if paper else "")
        if out is not None:
            cells.append(f"{comparison.mean_seconds(result):.0f}")
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
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type != "cpu" and (device.type != "cuda" or (device.index or 0) >= count):
        raise ValueError(f"device must be usable here, got {name!r}; see gpu-mixmatch doctor")
    return name


def _check_pictures(out: Path | None) -> None:
    """Raise now if what a comparison ends with cannot be drawn or written."""
    if out is not None:
        need("matplotlib.figure", "a chart of the errors")
        check_writable(out)
