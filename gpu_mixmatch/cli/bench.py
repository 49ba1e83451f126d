"""What a MixMatch batch costs on this machine, at your shapes: what ``gpu-mixmatch bench`` shows.

The engines take turns building whole batches from uint8 images that lie on the device, with the
model's forward pass replaced by fixed logits; then whole training steps of a model are timed. This
is a quick look: for numbers to publish see ``python -m benchmarks.batch`` in the repository.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gpu_mixmatch._timing import fixed_logits, in_turns, time_training_step
from gpu_mixmatch._validation import check_choice
from gpu_mixmatch.augment import WeakAugment
from gpu_mixmatch.impl import implementation
from gpu_mixmatch.losses import MixMatchLoss
from gpu_mixmatch.methods.mixmatch import MixMatch
from gpu_mixmatch.recipes.choices import FIXMATCH_SIDE, make_augment
from gpu_mixmatch.recipes.models import build_model
from gpu_mixmatch.types import Impl

NUM_CLASSES = 10
Views = Literal["weak", "strong"]


class EngineCost(NamedTuple):
    """What one engine costs.

    Attributes:
        engine: Its name, as the table shows it.
        build_ms: Median time of a batch beside the model, in milliseconds; None if it cannot run.
        share: Of a training step, 0 .. 1; None if it cannot run.
        images_per_second: Views built per second; None if it cannot run.
        detail: How to choose it, or why it cannot run.
    """

    engine: str
    build_ms: float | None
    share: float | None
    images_per_second: float | None
    detail: str


class BenchResult(NamedTuple):
    """What `bench` found.

    Attributes:
        title: Shapes, model, device and threads.
        model_ms: Median time of a training step beside the builder, in milliseconds.
        rows: Costs by engine, the cheapest first, those that cannot run last.
        advice: Which engine to choose.
    """

    title: str
    model_ms: float
    rows: list[EngineCost]
    advice: str


def bench(
    size: int = 32,
    batch_size: int = 64,
    num_augmentations: int = 2,
    model: str = "wrn-28-2",
    device: torch.device | str = "cpu",
    *,
    augment: Views = "weak",
    on_part: Callable[[str], None] | None = None,
) -> BenchResult:
    """Time all engines that can run here, and a training step of a model.

    Args:
        size: Height and width of the images, in pixels.
        batch_size: B, and M = B.
        num_augmentations: K.
        model: A name that `build_model` knows.
        device: Where to build and train.
        augment: "weak" times all engines of such views, "strong" this package's implementations
            of `make_strong`.
        on_part: Called with what is done next, for a progress bar.

    Raises:
        ValueError: If a number is below 1, or ``model`` or ``augment`` is unknown.
    """
    for name, value in (
        ("size", size),
        ("batch_size", batch_size),
        ("num_augmentations", num_augmentations),
    ):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    check_choice("augment", augment, Views)
    network = build_model(model, NUM_CLASSES, 3)  # raises now if the name is unknown
    device = torch.device(device)
    tell = on_part or (lambda _: None)
    tell("setting up")
    generator = torch.Generator().manual_seed(0)
    x, u = (
        torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8, generator=generator)
        for _ in range(2)
    )
    data = x.to(device), (torch.arange(batch_size) % NUM_CLASSES).to(device), u.to(device)
    builders, missing = _builders(augment, size, num_augmentations, device)
    guess = fixed_logits(num_augmentations * batch_size, NUM_CLASSES, device)
    tell("engines")
    with torch.random.fork_rng(devices=[]):
        timings = in_turns(
            {name: _build_call(mixmatch, data, guess) for name, (mixmatch, _) in builders.items()},
            device,
        )
    costs = {name: timing.median_ms for name, timing in timings.items()}
    best = min(costs, key=lambda name: costs[name])
    tell(f"training steps of {model}")
    mixmatch, _ = builders[best]
    step = time_training_step(
        network, lambda model: mixmatch(*data, model), MixMatchLoss(), mixmatch.device
    )
    model_ms = max(step.median_ms - costs[best], 0.0)
    views = batch_size * (1 + num_augmentations)
    rows = [
        EngineCost(name, cost, cost / (model_ms + cost), 1e3 * views / cost, builders[name][1])
        for name, cost in sorted(costs.items(), key=lambda item: item[1])
    ]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    title = (
        f"{batch_size} + {batch_size} images of {size} px, K = {num_augmentations}, {model}, "
        f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    missing_rows = [EngineCost(name, None, None, None, why) for name, why in missing.items()]
    return BenchResult(title, model_ms, rows + missing_rows, _advice(rows, model_ms))


def as_text(result: BenchResult) -> str:
    """Lay a result out as a table for a terminal."""
    width = max(len(row.engine) for row in result.rows)
    lines = [
        result.title,
        f"{'engine':<{width}}  {'ms/batch':>9}  {'views/s':>9}  {'of a step':>9}",
    ]
    for row in result.rows:
        cells = ["-"] * 3
        if row.build_ms is not None and row.share is not None and row.images_per_second is not None:
            share = f"{100 * row.share:.1f} %"
            cells = [f"{row.build_ms:.3f}", f"{row.images_per_second:,.0f}", share]
        numbers = "  ".join(f"{cell:>9}" for cell in cells)
        lines.append(f"{row.engine:<{width}}  {numbers}  {row.detail}")
    lines.append(f"the model's part of a step: {result.model_ms:.1f} ms")
    return "\n".join([*lines, result.advice])


def _builders(
    views: str, size: int, num_augmentations: int, device: torch.device
) -> tuple[dict[str, tuple[MixMatch, str]], dict[str, str]]:
    """Return what can build here, with how to choose it, and why the others cannot."""
    padding = min(max(1, size // 8), size - 1)
    code = f"WeakAugment(padding={padding})"
    chosen = code
    if views == "strong":
        whole = size >= FIXMATCH_SIDE
        chosen = (
            f"RandAugment.fixmatch({code})" if whole else f"make_strong({code}, {size}, {size})"
        )
    builders: dict[str, tuple[MixMatch, str]] = {}
    missing: dict[str, str] = {}

    def add(name: str, augment: Any, impl: Any, detail: str) -> None:
        mixmatch = MixMatch(
            augment,
            NUM_CLASSES,
            num_augmentations=num_augmentations,
            reuse_buffers=True,
            impl=impl,
        )
        builders[name] = mixmatch.to(device), detail

    for impl in get_args(Impl):
        if impl == "auto":
            continue
        try:
            if impl == "triton" and device.type != "cuda":
                raise RuntimeError("its kernels run on CUDA devices")
            implementation(impl, device)
        except (RuntimeError, ImportError) as error:
            missing[f"{views}, {impl}"] = str(error)
            continue
        weak = WeakAugment(padding, impl=impl)
        detail = f'MixMatch({chosen}, ..., impl="{impl}")'
        add(f"{views}, {impl}", make_augment(views, weak, size, size), impl, detail)
    if views == "strong":  # which no other engine has
        return builders, missing
    for engine, detail in (
        ("kornia", "MixMatch(KorniaAugment(module, ...), ...)"),
        ("dali", f"MixMatch(DaliAugment({code}), ...)"),
    ):
        try:
            augment = make_augment(engine, WeakAugment(padding), size, size)
        except ImportError as error:
            missing[engine] = str(error)
            continue
        add(engine, augment, "auto", detail)
    return builders, missing


def _build_call(
    mixmatch: MixMatch, data: tuple[Tensor, Tensor, Tensor], guess: Callable[[Tensor], Any]
) -> Callable[[], Any]:
    return lambda: mixmatch(*data, guess)


def _advice(rows: list[EngineCost], model_ms: float) -> str:
    best, *others = rows
    cost = f"{best.build_ms:.2f} ms a batch, {100 * (best.share or 0):.1f} % of a step"
    lines = [f"Choose {best.engine}: {best.detail}, with reuse_buffers=True: {cost}."]
    slow = [row.engine for row in others if row.share is not None and row.share > 0.1]
    if slow:
        lines.append(f"More than a tenth of a step goes into the batch with {', '.join(slow)}.")
    return "\n".join(lines)
