"""Augmentation in one pass over the output: every view is written once, from bytes in the cache."""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch._validation import MOST_PADDING, draws_error, flip_error, sigma_error, zoom_error
from gpu_mixmatch.impl.constants import constant
from gpu_mixmatch.impl.eager.filters import gaussian
from gpu_mixmatch.impl.numba.loops import (
    Shape,
    filter_views,
    lie_within,
    lines_at_once,
    mix_views,
    widen,
    write_views,
)
from gpu_mixmatch.impl.numba.mixup import blend, check_mixed
from gpu_mixmatch.impl.numba.threads import in_threads, threads_for
from gpu_mixmatch.types import Draws, Geometry, MixUpParams, PaddingMode, Scaling

# What zoom and blur of a value cost, in values that are only moved.
_FILTER_COST = 8
_MOST_FLOAT = np.finfo(np.float32).max


class _Task(NamedTuple):
    """What the loops read, as numpy's arrays."""

    images: tuple[Any, ...]  # flat, in the order of Shape
    draws: tuple[Any, ...]  # the fields of AugmentParams
    factors: tuple[Any, ...]  # scale and bias per plane, or per value of a line
    tables: tuple[Any, ...]  # of _line_tables
    shape: Shape


def augment(
    sources: tuple[Tensor, ...],
    params: Draws,
    geometry: Geometry,
    scaling: Scaling,
    *,
    channels_last_in: bool,
    out: Tensor,
    workspace: Workspace | None,
    mixup: MixUpParams | None = None,
) -> None:
    if out.numel() == 0:
        return
    workspace = workspace or Workspace()
    num_rows, channels, height, width = out.shape
    channels_last = not out.is_contiguous()
    padding, padding_mode, zoom, blur_radius = geometry[:4]
    filters = zoom or blur_radius > 0
    # a filter runs along planes; where pixels are only moved, their values stay together
    values = channels if channels_last and not filters else 1
    shape = Shape(
        channels // values,
        height,
        width,
        values,
        padding,
        repeat=1 if padding_mode == "reflect" else 0,
        fill=["reflect", "edge", "zeros"].index(padding_mode),
    )
    images = tuple(_lines_of(source, channels_last_in, values).numpy() for source in sources)
    factors = tuple(_per_value(factor, shape).detach().numpy() for factor in scaling)
    draws = tuple(draw.detach().contiguous().numpy() for draw in params)
    _check_draws(draws, 2 * padding)
    taps = _half_kernels(params.sigma.detach(), blur_radius).numpy() if filters else None
    tables = _line_tables(height, width, padding, padding_mode, blur_radius)
    task = _Task(images, draws, factors, tables, shape)

    in_order = out.permute(0, 2, 3, 1) if channels_last else out
    direct = out.dtype == torch.float32 and channels_last == (values > 1)
    target = in_order.view(-1) if direct else _floats("views", out, workspace)
    if mixup is None:
        _write_all(task, target, taps, workspace)
    elif filters:
        views = _floats("unmixed", out, workspace)
        _write_all(task, views, taps, workspace)
        blend(views.view(num_rows, -1), mixup, target.view(num_rows, -1))
    else:
        _mix_all(task, target, mixup, workspace)
    if not direct:
        written = target.view(num_rows, shape.planes, height, width, values)
        out.copy_(written.permute(0, 1, 4, 2, 3).flatten(1, 2))


def _write_all(task: _Task, target: Tensor, taps: Any, workspace: Workspace) -> None:
    """Write every view of every image; a thread has a share of the images of every source."""
    images, draws, factors, tables, shape = task
    image_lines, pitch = shape.planes * shape.height, shape.pitch
    image_size = image_lines * shape.width * shape.values
    num_threads = threads_for(target.numel() * (1 if taps is None else _FILTER_COST))
    dtype = torch.uint8 if images[0].dtype == np.uint8 else torch.float32
    # an image and a line of zeros for each thread
    widened = workspace.empty(
        "widened image", (num_threads, (image_lines + 1) * pitch), dtype, target.device
    )
    widened[:, image_lines * pitch :] = 0
    wide, out = widened.numpy(), target.numpy()
    counts = [len(source) // image_size for source in images]
    scratch: Any = None
    if taps is not None:
        reach = 2 * (taps.shape[1] - 1)
        lines = lines_at_once(shape.height, shape.width)
        size = (shape.height + reach + 1 + lines) * shape.width + 2 * lines * (shape.width + reach)
        scratch = workspace.empty("plane", (num_threads, size), torch.float32, target.device)
        scratch = scratch.numpy()

    def work(part: int) -> None:
        row = 0
        for number, (source, count) in enumerate(zip(images, counts, strict=True), 1):
            is_last = number == len(images)
            num_views = (len(draws[0]) - row) // max(count, 1) if is_last else 1
            share = count * part // num_threads, count * (part + 1) // num_threads
            where = out, row, num_views, source, wide[part], draws
            if scratch is None:
                write_views(*where, factors, tables, shape, pitch, *share)
            else:
                filter_views(*where, taps, factors, tables, shape, pitch, scratch[part], *share)
            row += num_views * count

    in_threads(work, num_threads)


def _mix_all(task: _Task, target: Tensor, mixup: MixUpParams, workspace: Workspace) -> None:
    """Widen all images, then write every blend of two views."""
    images, draws, factors, tables, shape = task
    pitch, num_rows = shape.pitch, len(draws[0])
    line = shape.width * shape.values
    num_lines = [len(source) // line for source in images]
    total = sum(num_lines)
    dtype = torch.uint8 if images[0].dtype == np.uint8 else torch.float32
    widened = workspace.empty("widened", ((total + 1) * pitch,), dtype, target.device)
    widened[total * pitch :] = 0
    wide, out = widened.numpy(), target.numpy()
    num_threads = threads_for(target.numel())
    mixed = tuple(draw.detach().contiguous().numpy() for draw in mixup)
    check_mixed(*mixed)
    # a single source is drawn as often as there are rows
    num_x = 0 if len(images) == 1 else num_lines[0] // (shape.planes * shape.height)
    num_u = num_lines[-1] // (shape.planes * shape.height)

    def widen_part(part: int) -> None:
        before = 0
        for source, count in zip(images, num_lines, strict=True):
            first, last = count * part // num_threads, count * (part + 1) // num_threads
            start = (before + first) * pitch
            widen(wide, start, source, first * line, last - first, shape, pitch)
            before += count

    def mix_part(part: int) -> None:
        share = num_rows * part // num_threads, num_rows * (part + 1) // num_threads
        mix_views(out, num_x, num_u, wide, draws, *mixed, factors, tables, shape, pitch, *share)

    in_threads(widen_part, num_threads)
    in_threads(mix_part, num_threads)


def _check_draws(draws: tuple[Any, ...], most: int) -> None:
    """Raise before a compiled loop, which checks nothing, reads beyond an image."""
    top, left, flip, zoom, sigma = draws
    if not (lie_within(top, most) and lie_within(left, most)):
        offsets = np.concatenate([top, left])
        raise draws_error(most, offsets.min(), offsets.max())
    if not lie_within(zoom.reshape(-1), MOST_PADDING):
        raise zoom_error(zoom.min(), zoom.max())
    if not lie_within(flip, 1):
        raise flip_error(flip.min(), flip.max())
    if not lie_within(sigma, _MOST_FLOAT):
        raise sigma_error(sigma.min(), sigma.max())


def _floats(name: str, like: Tensor, workspace: Workspace) -> Tensor:
    return workspace.empty(f"{name} as floats", (like.numel(),), torch.float32, like.device)


def _lines_of(source: Tensor, channels_last: bool, values: int) -> Tensor:
    """Images as lines of pixels, flat: NHWC where a pixel's values stay together, else NCHW."""
    if channels_last != (values > 1):
        source = source.permute(0, 2, 3, 1) if values > 1 else source.permute(0, 3, 1, 2)
    source = source if source.dtype == torch.uint8 else source.detach().float()
    return source.contiguous().view(-1)


def _per_value(factor: Tensor | float, shape: Shape) -> Tensor:
    """A factor per plane, ``[planes, 1]``, or per value of a line, ``[1, W·values]``."""
    if not isinstance(factor, Tensor):
        return _filled(factor, shape.planes, shape.width * shape.values if shape.values > 1 else 1)
    factor = factor.float()
    return factor.repeat(shape.width)[None] if shape.values > 1 else factor[:, None].contiguous()


def _half_kernels(sigma: Tensor, radius: int) -> Tensor:
    """Taps at distance 0, 1, .. of each row's blur."""
    return gaussian(sigma, radius)[:, radius:].contiguous()


@constant
def _filled(value: float, *shape: int) -> Tensor:
    return torch.full(shape, value, dtype=torch.float32, device="cpu")


@lru_cache(maxsize=32)
def _line_tables(
    height: int, width: int, padding: int, padding_mode: PaddingMode, radius: int
) -> tuple[Any, Any, Any]:
    """Lines of the padded image, ``[H + 2·padding]``, -1 for zeros; lines and columns of a blur.

    The latter are those of an axis that is reflected at both ends, ``[n + 2·radius]``.
    """
    line = np.arange(-padding, height + padding)
    if padding_mode == "reflect":
        line = _reflected(height, padding).astype(np.int64)
    elif padding_mode == "edge":
        line = line.clip(0, height - 1)
    else:
        line = np.where((line >= 0) & (line < height), line, -1)
    return line, _reflected(height, radius), _reflected(width, radius)


def _reflected(size: int, beyond: int) -> Any:
    """The pixel that lies at -beyond .. size - 1 + beyond, the edge not repeated."""
    period = max(2 * (size - 1), 1)
    position = np.arange(-beyond, size + beyond) % period
    return np.minimum(position, period - position).clip(0, size - 1).astype(np.uint64)
