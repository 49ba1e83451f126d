"""Each operation by itself: ``python -m benchmarks.ops [--quick] [--device cuda]``.

Drawing, augmenting, targets (guess and sharpen), MixUp and the loss, by each implementation and by
``torch.compile`` of the plain one where that compiles. Every result is held to the plain one first.
A row states the least bytes that the operation must move, and their rate as a share of the rate at
which ``copy_`` moves as many, measured in the same turns. On CUDA the goals of the fused path are
measured too: a captured batch, the host's part of an eager one, and bandwidth at 224 px in bf16.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.augment import draw_batch, draws_of, make_images, policy_for, weak
from benchmarks.batch import first_logits
from benchmarks.common import (
    Contender,
    Row,
    Settings,
    Skipped,
    Tell,
    cpu_threads,
    goal_row,
    implementations,
    main,
    skipped_row,
    timed_rows,
    torch_compiled,
)
from benchmarks.peers import NUM_VIEWS, Images
from gpu_mixmatch import MixMatch, capture, functional
from gpu_mixmatch._timing import in_turns
from gpu_mixmatch.impl import eager
from gpu_mixmatch.types import MixUpParams

NUM_CLASSES = 10
GOALS = {
    "captured batch, replay alone, us": 20.0,
    "captured batch, whole call, us": 20.0,
    "host time of an eager batch, us": 80.0,
    "augment, share of copy, %": 85.0,
    "mixup, share of copy, %": 85.0,
}


class Operation(NamedTuple):
    """One operation on prepared arguments.

    Attributes:
        name: As tables show it.
        call: Takes the name of an implementation and does the work.
        plain: The plain implementation, to be compiled; None where there is nothing to compile.
        least_bytes: That must be read and written.
        tolerance: Between implementations.
    """

    name: str
    call: Callable[[str], Any]
    plain: Callable[[], Any] | None
    least_bytes: int
    tolerance: float = 1e-5


def image_operations(images: Images, effects: str, dtype: torch.dtype) -> list[Operation]:
    """Drawing, augmenting and mixing: what depends on the images."""
    device, size = images.x.device, images.size
    policy = policy_for(effects, size)
    engines = {impl: weak(policy, impl, dtype).to(device) for impl in implementations(device)}
    plain = engines["eager"]
    draws = draws_of(plain, images, 0)
    mixup = mixup_params(images)
    generator = torch.Generator().manual_seed(0)
    shape = (images.num_rows, 3, size, size)
    rows = torch.randn(shape, generator=generator).to(device, dtype)
    targets = torch.rand(len(rows), NUM_CLASSES, generator=generator).to(device)
    out, mixed_targets = torch.empty_like(rows), torch.empty_like(targets)
    num_bytes = rows.numel() * rows.element_size()
    target_bytes = targets.numel() * 4

    def draw(impl: str) -> Any:
        return draw_batch(images, 5, policy, impl)

    def augment(impl: str) -> Tensor:
        return engines[impl].apply(tuple(images), draws, out=out)

    def mix(impl: str) -> Any:
        return functional.mixup(rows, targets, mixup, out=out, impl=impl)  # type: ignore[arg-type]

    def augment_and_mix(impl: str) -> Tensor:
        return engines[impl].apply(tuple(images), draws, mixup=mixup, out=out)

    def plain_mix() -> Any:
        eager.mixup(rows, targets, mixup, out, mixed_targets)
        return out, mixed_targets

    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    return [
        Operation("draw", draw, None, 44 * len(rows)),
        Operation(
            "augment", augment, lambda: augment("eager"), rows.numel() + num_bytes, tolerance
        ),
        # two rows read and one written
        Operation("mixup", mix, plain_mix, 3 * (num_bytes + target_bytes), tolerance),
        Operation("augment, mixed", augment_and_mix, None, 2 * rows.numel() + num_bytes, tolerance),
    ]


def class_operations(batch: int, num_classes: int, device: torch.device) -> list[Operation]:
    """Sharpening, targets and the loss: what depends on the classes."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(NUM_VIEWS, batch, num_classes, generator=generator).to(device)
    probs = logits[0].softmax(dim=1)
    y = (torch.arange(batch) % num_classes).to(device)
    rows = torch.randn((1 + NUM_VIEWS) * batch, num_classes, generator=generator).to(device)
    rows.requires_grad_()
    targets = functional.batch_targets(y, logits, 0.5, impl="eager")
    weight = torch.tensor(75.0, device=device)
    target_bytes = targets.numel() * 4

    def guess(impl: str) -> Tensor:
        return functional.batch_targets(y, logits, 0.5, impl=impl)  # type: ignore[arg-type]

    def loss(impl: str) -> Tensor:
        with torch.no_grad():
            return functional.mixmatch_loss(rows, targets, batch, weight, impl=impl).loss  # type: ignore[arg-type]

    def loss_and_back(impl: str) -> Tensor:
        value = functional.mixmatch_loss(rows, targets, batch, weight, impl=impl).loss  # type: ignore[arg-type]
        return torch.autograd.grad(value, rows)[0]

    def plain_guess() -> Tensor:
        out = torch.empty_like(targets)
        eager.batch_targets(y, logits, 0.5, 0.0, None, out)
        return out

    return [
        Operation(
            "sharpen",
            lambda impl: functional.sharpen(probs, 0.5),
            lambda: eager.sharpen(probs, 0.5),
            2 * probs.numel() * 4,
        ),
        Operation("targets", guess, plain_guess, logits.numel() * 4 + 8 * batch + target_bytes),
        Operation(
            "loss",
            loss,
            lambda: eager.mixmatch_losses(rows.detach(), targets, batch, weight).loss,
            2 * target_bytes,
            1e-4,
        ),
        Operation("loss and gradient", loss_and_back, None, 5 * target_bytes, 1e-4),
    ]


def mixup_params(images: Images) -> MixUpParams:
    """λ' and partners of a batch."""
    return draw_batch(images, 0, None, "eager")[1]


def check_equal(operation: Operation, call: Callable[[], Any]) -> None:
    """Raise if a way to do an operation does not give what the plain one gives."""
    wanted = _copied(operation.call("eager"))
    torch.testing.assert_close(
        _copied(call()), wanted, atol=operation.tolerance, rtol=operation.tolerance
    )


def _copied(result: Any) -> Any:
    """Tensors of a result as float64, apart from buffers that the next call writes to."""
    if isinstance(result, Tensor):
        return result.detach().double().clone()
    return [_copied(part) for part in result if part is not None]


def copying(num_bytes: int, device: torch.device) -> Callable[[], Any]:
    """Return what reads and writes ``num_bytes`` together, by ``copy_``."""
    source = torch.zeros(max(1, num_bytes // 8), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def operation_rows(
    operation: Operation, case: str, settings: Settings, threads: int, *, compile_it: bool
) -> list[Row]:
    """Check and time all ways to do an operation, beside a copy of as many bytes."""
    rows: list[Row] = []
    contenders = []
    names = implementations(settings.device)
    if operation.name == "sharpen":
        names = ["eager"]  # it has no other
    for impl in names:
        call = partial(operation.call, impl)
        check_equal(operation, call)
        contenders.append(Contender(impl, call))
    if operation.plain and compile_it:
        try:
            contenders.append(Contender("eager, compiled", _compiled_call(operation)))
        except Skipped as reason:
            rows.append(skipped_row(case, "eager, compiled", threads, str(reason)))
    contenders.append(
        Contender(
            "copy_", copying(operation.least_bytes, settings.device), "the rate to compare with"
        )
    )
    timed = timed_rows(case, contenders, settings, threads, least_bytes=operation.least_bytes)
    copy_ms = timed[-1]["median_ms"]
    for row in timed:
        row["gb_per_s"] = round(operation.least_bytes / row["median_ms"] / 1e6, 3)
        row["copy_percent"] = round(100 * copy_ms / row["median_ms"], 1)
    return timed + rows


def _compiled_call(operation: Operation) -> Callable[[], Any]:
    assert operation.plain is not None
    torch.compiler.reset()
    call = torch_compiled(operation.plain)
    try:
        check_equal(operation, call)
    except AssertionError as error:
        raise Skipped(f"compiled, it differs: {str(error).splitlines()[0]}") from error
    except Exception as error:  # of the compiler: anything
        raise Skipped(f"does not compile: {type(error).__name__}") from error
    return call


# Goals of the fused path, on CUDA


def goal_rows(settings: Settings, tell: Tell) -> list[Row]:
    """Measure what the fused path is meant to reach, next to the goal."""
    threads = settings.threads[-1]
    batch = 8 if settings.quick else 64
    values: dict[str, tuple[float, ...]] = {}  # low, median and high
    tell("captured batch")
    images = make_images(32, batch, settings.device)
    mixmatch = MixMatch(weak(policy_for("shift, flip", 32), "auto"), NUM_CLASSES).to(
        settings.device
    )
    y = torch.arange(batch, device=settings.device) % NUM_CLASSES
    data = images.x, y, images.u
    captured = capture(mixmatch, first_logits, *data)
    replay = captured._graph.replay
    for name, call, calls_per_block in (
        ("captured batch, replay alone, us", replay, None),
        ("captured batch, whole call, us", lambda: captured(*data), None),
        # of the host alone: few enough calls that the device's queue does not fill
        ("host time of an eager batch, us", lambda: mixmatch(*data, first_logits), 20),
    ):
        timing = in_turns(
            {name: call},
            settings.device,
            block_seconds=settings.block_seconds,
            calls_per_block=calls_per_block,
            host_only=calls_per_block is not None,
        )[name]
        values[name] = tuple(1e3 * value for value in timing[:3])
    tell("bandwidth at 224 px, bf16")
    large = make_images(224, batch, settings.device)
    for operation in image_operations(large, "shift, flip", torch.bfloat16):
        name = f"{operation.name}, share of copy, %"
        if name in GOALS:
            rows = operation_rows(operation, name, settings, threads, compile_it=False)
            (share,) = (row["copy_percent"] for row in rows if row["contender"] == "triton")
            values[name] = (share,) * 3
    case = "goals of the fused path"
    return [goal_row(case, name, value, threads, GOALS[name]) for name, value in values.items()]


def cases(settings: Settings) -> list[tuple[int, int, str, torch.dtype]]:
    """Size, images per part, effects and dtype of each case."""
    if settings.quick:
        return [(32, 8, "shift, flip", torch.float32)]
    last = 64 if settings.is_cuda else 16
    sizes = [(32, 64), (96, 64), (224, last)]
    found = [(size, batch, "shift, flip", torch.float32) for size, batch in sizes]
    found += [(size, batch, "shift, flip, blur", torch.float32) for size, batch in sizes]
    if settings.is_cuda:
        found += [(224, last, "shift, flip", torch.bfloat16)]
    return found


def run(settings: Settings, tell: Tell) -> list[Row]:
    """Check and time all operations."""
    rows: list[Row] = []
    for threads in settings.threads:
        with cpu_threads(threads):
            for size, batch, effects, dtype in cases(settings):
                shapes = f"{effects}, {size} px, {batch} + {batch}, {str(dtype)[6:]}"
                images = make_images(size, batch, settings.device)
                # compiling takes seconds: one case will do
                compile_it = effects == "shift, flip" and not settings.quick
                for operation in image_operations(images, effects, dtype):
                    if "blur" in effects and operation.name in ("draw", "mixup"):
                        continue  # as without
                    case = f"{operation.name}: {shapes}"
                    tell(f"{case}, {threads} threads")
                    rows += operation_rows(
                        operation, case, settings, threads, compile_it=compile_it
                    )
            batch = 8 if settings.quick else 64
            for classes in (10,) if settings.quick else (10, 1000):
                for operation in class_operations(batch, classes, settings.device):
                    case = f"{operation.name}: {batch} + {batch}, {classes} classes"
                    tell(f"{case}, {threads} threads")
                    first = classes == 10
                    compile_it = first and (not settings.quick or operation.name == "sharpen")
                    rows += operation_rows(
                        operation, case, settings, threads, compile_it=compile_it
                    )
    if settings.is_cuda:
        rows += goal_rows(settings, tell)
    return rows


if __name__ == "__main__":
    main("ops", run, __doc__)
