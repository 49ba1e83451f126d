"""What a batch launches, recorded with the arguments, and the bytes that each launch moves.

`launches_of` lets `MixMatch` and the loss launch all their kernels on CPU tensors, with the launch
replaced; on a CUDA device they run as well. Nothing is drawn where nothing runs, but for the
operations of a view, which decide what its programs do: those are the host's draws.

Bytes: each value that a launch reads or writes counts once for that launch, and a view's pixel once
for each view that is made of it. Caches do not enter.
"""

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from gpu_mixmatch import MixMatch, RandAugment, WeakAugment, functional, impl, sampling
from gpu_mixmatch.augment.keyed import KeyedAugment
from gpu_mixmatch.impl.tables import Kind
from gpu_mixmatch.types import DrawPlan

CPU = torch.device("cpu")
NUM_AUGMENTATIONS = 2
DRAWS = "draw_kernel"
BATCH_SIZE = 64
EFFECTS: dict[str, dict[str, Any]] = {
    "shift": {"padding": 4},
    "zoom": {"padding": 4, "zoom_px": (0, 16)},
    "zoom and blur": {"padding": 4, "zoom_px": (0, 16), "blur_sigma": (0.0, 3.0)},
}
OPERATIONS = "RandAugment"  # FixMatch's, after a shift


class Regime(NamedTuple):
    """A size of batches.

    Attributes:
        size: Height and width of the images in pixels.
        dtype: Of the views.
        channels_last: Their memory format.
        num_classes: L.
    """

    size: int
    dtype: torch.dtype
    channels_last: bool
    num_classes: int

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"{self.size} px {str(self.dtype).removeprefix('torch.')} {layout}"


REGIMES = (
    Regime(32, torch.float32, False, 10),
    Regime(96, torch.float32, False, 10),
    Regime(224, torch.float32, False, 1000),
    Regime(224, torch.bfloat16, True, 1000),
)


def engine_of(effects: str, regime: Regime) -> KeyedAugment:
    """The engine of a name in `EFFECTS`, or of `OPERATIONS`."""
    weak = WeakAugment(
        **EFFECTS["shift" if effects == OPERATIONS else effects],
        dtype=regime.dtype,
        channels_last=regime.channels_last,
        impl="triton",
    )
    return RandAugment.fixmatch(weak) if effects == OPERATIONS else weak


class Launch(NamedTuple):
    """A kernel that would have run, and with what."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__)

    @property
    def named(self) -> dict[str, Any]:
        """The arguments by name, those of named tuples by the names of their fields."""
        return named_arguments(self.kernel.arg_names, self.arguments)

    @property
    def mixes(self) -> bool:
        """Whether it blends rows with their partners, which the draw only names."""
        return self.named.get("index_ptr") is not None and self.name != DRAWS


def named_arguments(names: Iterable[str], arguments: Iterable[Any]) -> dict[str, Any]:
    """Arguments by name; a named tuple's fields stand for themselves, however deep they lie."""
    found: dict[str, Any] = {}
    for name, argument in zip(names, arguments, strict=False):
        fields = getattr(argument, "_fields", None)
        found |= named_arguments(fields, argument) if fields else {name: argument}
    return found


def launches_of(
    regime: Regime,
    effects: str,
    num_x: int = BATCH_SIZE,
    num_u: int = BATCH_SIZE,
    start: int = 0,
    device: torch.device = CPU,
) -> tuple[list[Launch], list[Launch]]:
    """What one batch launches, and what the loss launches, forward and backward.

    Images, labels and ids begin ``start`` values behind an aligned address.
    """
    generator = torch.Generator().manual_seed(0)

    def sliced(*shape: int, dtype: torch.dtype) -> Tensor:
        length = start + math.prod(shape)
        if device == CPU:  # nothing is read
            return torch.empty(length, dtype=dtype)[start:].view(shape)
        values = torch.randint(0, 256, (length,), generator=generator, dtype=dtype)
        return values.to(device)[start:].view(shape)

    x, u = (
        sliced(count, 3, regime.size, regime.size, dtype=torch.uint8) for count in (num_x, num_u)
    )
    y, ids_x, ids_u = (sliced(count, dtype=torch.int64).zero_() for count in (num_x, num_x, num_u))
    ids = {"ids_x": ids_x, "ids_u": ids_u} if start else {}

    def model(views: Tensor) -> Tensor:
        if device == CPU:
            return torch.zeros(len(views), regime.num_classes, dtype=views.dtype)
        logits = torch.randn(len(views), regime.num_classes, generator=generator)
        return logits.to(views)

    with recording(device) as launches:
        mixmatch = MixMatch(
            engine_of(effects, regime),
            regime.num_classes,
            num_augmentations=NUM_AUGMENTATIONS,
            impl="triton",
        ).to(device)
        batch = mixmatch(x, y, u, model, **ids)
    with recording(device) as of_loss:
        logits = model(batch.inputs).requires_grad_()
        losses = functional.mixmatch_loss(logits, batch.targets, num_x, 75.0, impl="triton")
        losses.loss.backward()
    return launches, of_loss


@contextmanager
def recording(device: torch.device = CPU) -> Iterator[list[Launch]]:
    """Take down what is launched on CUDA, or would be; let the launchers have CPU tensors."""
    from gpu_mixmatch.impl import triton as kernels
    from gpu_mixmatch.impl.triton import launch

    launches: list[Launch] = []
    run = launch.run

    def take_down(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
        launches.append(Launch(kernel, programs, arguments, options))
        if device != CPU:
            run(kernel, programs, *arguments, **options)

    draw_batch = kernels.draw_batch

    def draw_too(key: Any, ids_x: Any, ids_u: Any, plan: DrawPlan, out: Tensor) -> None:
        draw_batch(key, ids_x, ids_u, plan, out)
        if plan.policy and plan.policy.chain:
            counts = (ids if isinstance(ids, int) else len(ids) for ids in (ids_x, ids_u))
            out.copy_(sampling.pack(*sampling.draw_batch(0, 0, *counts, plan)))

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(launch, "run", take_down))
        if device == CPU:
            patches.enter_context(mock.patch.object(kernels, "draw_batch", draw_too))
            for name, answer in (("implementation", kernels), ("resolve_impl", "triton")):
                for module in _holders(name):
                    patches.enter_context(mock.patch.object(module, name, return_value=answer))
        yield launches


def _holders(name: str) -> list[ModuleType]:
    """The package's modules that look for their implementation by a function of this name."""
    function = getattr(impl, name, None)
    modules = [m for key, m in sys.modules.items() if key.startswith("gpu_mixmatch")]
    return [m for m in modules if function is not None and getattr(m, name, None) is function]


# Bytes


class Traffic(NamedTuple):
    """Bytes of a launch.

    Attributes:
        moved: Read and written, a pixel once for each view that is made of it.
        distinct: The same, with what is read several times counted once.
    """

    moved: int
    distinct: int


def traffic(launch: Launch) -> Traffic:
    """The bytes that a launch reads and writes."""
    named = launch.named
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    total = distinct = 0
    rows_per_row = 2 if launch.mixes else 1
    of_images = sum(tensors[name].nbytes for name in ("x_ptr", "u_ptr") if name in tensors)
    pixels = tensors["out_ptr"].numel() * rows_per_row if of_images and "out_ptr" in tensors else 0
    if "records_ptr" in tensors:
        pixels, total = _of_chain(launch)
        distinct = total
    for name, tensor in tensors.items():
        if name in ("x_ptr", "u_ptr", "made_ptr", "stage_ptr", "counts_ptr"):
            continue
        touched = _words_of_draws(launch) * 4 if name == "draws_ptr" else tensor.nbytes
        read_in_pairs = name in ("inputs_ptr", "targets_ptr", "logits_ptr", "y_ptr")
        total += touched * (rows_per_row if read_in_pairs else 1)
        distinct += touched
    # bytes, though kernels may read them as words
    return Traffic(total + pixels, distinct + min(of_images, pixels))


def _of_chain(launch: Launch) -> tuple[int, int]:
    """The bytes of images that a launch for a chain reads, and those of what events leave."""
    named = launch.named | launch.options
    first, channels, count = (named[name] for name in ("FIRST_SLOT", "CHANNELS", "HEIGHT"))
    count *= named["WIDTH"]
    slots = named["chain_ptr"][:, first : first + named["SLOTS"]]
    kinds = named["records_ptr"][:, 0][slots.long()]
    sharp = kinds == Kind.SHARPNESS
    events = (kinds >= Kind.CONTRAST) & (kinds <= Kind.EQUALIZE)
    numbers = events.cumsum(1) - 1
    tables, stage = 256 * channels, 4 * count
    if launch.name == "event_kernel":
        now = events & (numbers == named["number"])
        staged = (sharp & (numbers < named["number"])).any(1)
        sharp_now, has = (now & sharp).any(1), now.any(1)
        counts = 2 * 4 * (tables + 1)  # added to, and read by who adds last
        left = int((has & staged).sum() + sharp_now.sum()) * stage
        left += int((has & ~sharp_now).sum()) * (tables + counts)
        return int((has & ~staged).sum()) * channels * count, left
    passes = 2 if named["EVENTS"] else 1  # written, too, where a program has a view to itself
    left = passes * (int(sharp.any(1).sum()) * stage + int((events & ~sharp).sum()) * tables)
    reads_image = len(kinds) if named["EVENTS"] else int((~sharp.any(1)).sum())
    return reads_image * channels * count, left


def _words_of_draws(launch: Launch) -> int:
    """The words that a launch reads of the packed draws: those of its policy, of each row."""
    named = launch.named | launch.options
    written = ("out_ptr", "table_ptr", "counts_ptr")
    rows = next(named[name].shape[0] for name in written if name in named)
    blurs = any(named.get(name) for name in ("BLUR_RADIUS", "RADIUS"))
    zooms = named.get("ZOOM") or named.get("CUT") == 3
    return int(rows) * (3 + 4 * bool(zooms) + blurs)


def moved(launch: Launch) -> int:
    """The bytes that a launch reads and writes."""
    return traffic(launch).moved


def least(regime: Regime) -> int:
    """The bytes that no batch can do without.

    The views of u are made of bytes and written for the guess. Then each value of the batch is read
    as two bytes, its own and its partner's, and written; and so are logits and targets.
    """
    rows_u = NUM_AUGMENTATIONS * BATCH_SIZE
    rows = BATCH_SIZE + rows_u
    pixels, itemsize = 3 * regime.size**2, regime.dtype.itemsize
    views = rows_u * pixels * (1 + itemsize)
    mixed = rows * pixels * (2 + itemsize)
    return views + mixed + regime.num_classes * (rows_u * itemsize + rows * 4)
