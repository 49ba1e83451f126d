"""Views with a chain of operations: each is built from bytes in the cache and written once."""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch._chain import columns, entries
from gpu_mixmatch.impl.constants import constant
from gpu_mixmatch.impl.eager.cut import regions_of
from gpu_mixmatch.impl.numba.operations import BRIGHTNESS, INVERT, MASK, Program, run_views
from gpu_mixmatch.impl.numba.rows import (
    blur_scratch,
    blur_tables,
    half_kernels,
    line_tables,
    shares,
    stacked,
)
from gpu_mixmatch.impl.numba.threads import in_threads, threads_for
from gpu_mixmatch.impl.tables import Kind, chain_tables, whole_hues
from gpu_mixmatch.types import Chain, Cut, Draws, Geometry, Scaling

# What a chain of a value costs, in values that are only moved.
_COST = 4
_PAD = 64  # bytes behind a plane: at least one, and the next plane begins in a cache line


class ChainTask(NamedTuple):
    """What the loops read, as numpy's arrays."""

    images: tuple[tuple[Any, tuple[int, int, int]], ...]  # flat, and steps to plane, line, pixel
    draws: tuple[Any, ...]  # the fields of ChainParams
    regions: Any  # what is cut out of each window, [R, 4] or [0, 4]
    tables: tuple[Any, ...]
    taps: Any  # of a blur, [R, 1 + its reach]
    factors: tuple[Any, ...]  # scale, bias and the cutout's value per channel
    program: Program


def chain_task(
    sources: tuple[Tensor, ...],
    params: Draws,
    geometry: Geometry,
    scaling: Scaling,
    channels_last_in: bool,
    out_shape: tuple[int, ...],
    together: bool,
) -> ChainTask:
    """Lay out what the loops read.

    Args:
        sources: As for `Implementation.augment`, like the next four.
        params: See there.
        geometry: See there; with a chain.
        scaling: See there.
        channels_last_in: See there.
        out_shape: Of the views.
        together: Whether the values of a pixel lie together in what is written.
    """
    chain, cut, radius = geometry.chain, geometry.cut, geometry.blur_radius
    assert chain is not None
    _, channels, tall, wide = out_shape
    height, width = sources[0].shape[1:3] if channels_last_in else sources[0].shape[2:]
    of_columns = columns(cut, chain)
    program = Program(
        channels,
        height,
        width,
        tall,
        wide,
        geometry.padding,
        pitch=(tall * wide // _PAD + 1) * _PAD,
        marks=int(chain.outside == "mean"),
        resizes=geometry.zoom or (cut is not None and cut.area is not None),
        first_slot=of_columns.slots.start,
        slots=of_columns.slots.stop - of_columns.slots.start,
        cutout=of_columns.cutout.start if chain.cutout else -1,
        shares=not isinstance(chain.cutout, int),
        together=together,
    )
    lines = line_tables(height, width, geometry.padding, geometry.padding_mode)
    near = blur_tables(tall, wide, radius)
    return ChainTask(
        tuple(_flat(source, channels_last_in) for source in sources),
        tuple(draw.numpy() for draw in params),
        stacked(regions_of(params, geometry, (height, width), (tall, wide))),
        (*lines, *near, *(table.numpy() for table in _tables(chain, tall, wide))),
        half_kernels(params.sigma, radius).numpy(),
        _factors(scaling, chain, channels),
        program,
    )


@lru_cache(maxsize=64)
def most_drawn(cut: Cut | None, chain: Chain | None) -> Any:
    """The greatest number of each column of `ChainParams.chain` that loops may be given."""
    of_cut, of_slots, of_cutout = columns(cut, chain)
    most = np.full(of_cutout.stop, 2**31 - 1, np.int32)
    most[of_cut][2:] = most[of_cutout][:2] = 2**24 - 1
    most[of_slots] = len(entries(chain)) - 1 if chain else 0
    return most


def write_chains(task: ChainTask, target: Tensor, workspace: Workspace) -> None:
    """Write every view of every image; a thread has a share of the images of every source."""
    program, out = task.program, target.numpy()
    num_threads = threads_for(target.numel() * _COST)
    image_size = program.channels * program.height * program.width
    view_planes = 2 * (program.channels + program.marks) * program.pitch
    size = view_planes + (image_size if program.resizes else 0)
    device = target.device
    planes = workspace.empty("planes of bytes", (num_threads, size), torch.uint8, device).numpy()
    radius = task.taps.shape[1] - 1
    size = blur_scratch(program.view_height, program.view_width, radius) if radius else 0
    floats = workspace.empty("plane", (num_threads, size), torch.float32, device).numpy()
    counts = [len(flat) // image_size for flat, _ in task.images]

    def work(part: int) -> None:
        found = shares(counts, len(task.draws[0]), part, num_threads)
        for row, num_views, number, share in found:
            run_views(
                *(out, row, num_views, *task.images[number], task.draws, task.regions),
                *(task.tables, task.taps, task.factors, program),
                *((planes[part], floats[part]), *share),
            )

    in_threads(work, num_threads)


def _flat(source: Tensor, channels_last: bool) -> tuple[Any, tuple[int, int, int]]:
    """The bytes of images as they lie, and the steps to the next plane, line and pixel."""
    images = source.permute(0, 3, 1, 2) if channels_last else source
    _, channels, height, width = images.shape
    last = images.permute(0, 2, 3, 1)
    if last.is_contiguous() and not images.is_contiguous():
        return last.view(-1).numpy(), (1, width * channels, channels)
    return images.contiguous().view(-1).numpy(), (height * width, width, 1)


def _factors(scaling: Scaling, chain: Chain, channels: int) -> tuple[Any, Any, Any]:
    scale, bias = (
        factor.detach().float().contiguous().numpy()
        if isinstance(factor, Tensor)
        else np.full(channels, factor, np.float32)
        for factor in scaling
    )
    if chain.cutout_color is None:
        return scale, bias, np.zeros(channels, np.float32)
    return scale, bias, np.array(chain.cutout_color, np.float32) * scale + bias


@constant
def _tables(chain: Chain, height: int, width: int) -> tuple[Tensor, ...]:
    """Records, their factors, and the whole hues that Pillow's floats take one off.

    The last are 256 bits, the first of them the lowest of the first number.
    """
    records, byte_tables = (
        table.clone() for table in chain_tables(chain, height, width, torch.device("cpu"))
    )
    for record, (name, magnitude) in zip(records.numpy(), entries(chain), strict=True):
        if record[0] != Kind.BYTES:
            continue
        table = byte_tables[record[2]].numpy()
        if name == "brightness":
            record[[0, 2]] = BRIGHTNESS, np.float32(magnitude).view(np.int32)
        elif name == "posterize":
            record[[0, 2]] = MASK, table[255]
        else:
            record[[0, 2]] = INVERT, (table == np.arange(256)).sum()
    loses = np.packbits(whole_hues() != np.arange(256), bitorder="little").view("<u8")
    ends = torch.from_numpy(loses.astype(np.uint64))
    return records, records[:, 2].clone().view(torch.float32), ends
