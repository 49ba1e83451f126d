"""How anything here is timed: in turns, by blocks of calls, as medians and quartiles.

Contenders take turns in one process, so that a busy machine disturbs all of them alike: a round
gives each a block of calls, long enough for caches to settle, and its time is the block's divided
by the calls. On CUDA a block lies between two events, and the device is waited for.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CPU = torch.device("cpu")
_STEP_SECONDS = 10.0  # training steps are repeated for as long, but at most _STEPS times
_STEPS = 7


class Timing(NamedTuple):
    """Time per call over some blocks, in milliseconds: the quartiles and the median."""

    low_ms: float
    median_ms: float
    high_ms: float
    blocks: int


def in_turns(
    calls: Mapping[str, Callable[[], Any]],
    device: torch.device = CPU,
    *,
    rounds: int = 7,
    block_seconds: float = 0.05,
    calls_per_block: int | None = None,
    before_block: Mapping[str, Callable[[], Any]] | None = None,
    most_seconds: float = float("inf"),
    host_only: bool = False,
) -> dict[str, Timing]:
    """Time calls in turns: warm-up, then rounds of a block each, there and back.

    Args:
        calls: What to time, by name.
        device: Where the calls work; on CUDA events take the time.
        rounds: Blocks per call.
        block_seconds: Length of a block, at least one call.
        calls_per_block: The number of calls of each block, in place of ``block_seconds``.
        before_block: By name, what is called before each block, outside of its time.
        most_seconds: No round begins when rounds have taken longer than this.
        host_only: Time what the host does, while the device's queue is not full.
    """
    before = before_block or {}

    def block(name: str, count: int) -> float:
        if name in before:
            before[name]()
        return seconds_of(calls[name], count, device, host_only=host_only)

    counts = {}
    for name in calls:
        block(name, calls_per_block or 2)  # warm-up
        counts[name] = calls_per_block or max(
            1, round(block_seconds / max(block(name, 2) / 2, 1e-7))
        )
    times: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for number in range(rounds):
        if number and time.perf_counter() - began > most_seconds:
            break
        for name in calls if number % 2 == 0 else reversed(list(calls)):
            times[name].append(1e3 * block(name, counts[name]) / counts[name])
    return {name: quartiles(values) for name, values in times.items()}


def quartiles(milliseconds: Sequence[float]) -> Timing:
    """Return the quartiles of times per call."""
    if len(milliseconds) == 1:
        return Timing(milliseconds[0], milliseconds[0], milliseconds[0], 1)
    low, median, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
    return Timing(low, median, high, len(milliseconds))


def seconds_of(
    call: Callable[[], Any], count: int, device: torch.device = CPU, *, host_only: bool = False
) -> float:
    """Return the seconds that some calls take, on the device or of the host alone."""
    if device.type != "cuda":
        return _host_seconds(call, count)
    torch.cuda.synchronize(device)
    if host_only:
        return _host_seconds(call, count)
    begin: Any
    end: Any
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        begin.record()
        for _ in range(count):
            call()
        end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) / 1e3


def _host_seconds(call: Callable[[], Any], count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - began


def fixed_logits(num_rows: int, num_classes: int, device: torch.device) -> Callable[[Tensor], Any]:
    """Return a model that costs nothing: it answers any images with the same logits."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_rows, num_classes, generator=generator).to(device)
    return lambda images: logits[: len(images)]


def time_training_step(
    model: nn.Module,
    build: Callable[[nn.Module], Any],
    criterion: Callable[[Tensor, Any], Any],
    device: torch.device,
) -> Timing:
    """Time whole training steps: build the batch, forward, backward, update.

    Args:
        model: Trained in place by Adam, in channels_last.
        build: Builds a batch of ``inputs`` with the model's guesses.
        criterion: Takes logits and batch, and returns what has a ``loss``.
        device: Where to train.
    """
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)

    def step() -> None:
        batch = build(model)
        loss = criterion(model(batch.inputs), batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    timings = in_turns(
        {"step": step}, device, rounds=_STEPS, calls_per_block=1, most_seconds=_STEP_SECONDS
    )
    return timings["step"]
