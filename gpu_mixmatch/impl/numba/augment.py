"""Augmentation in one pass over the output: every view is written once, from bytes in the cache."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch._validation import (
    MOST_PADDING,
    check_chain_draws,
    draws_error,
    flip_error,
    sigma_error,
    zoom_error,
)
from gpu_mixmatch.impl.constants import constant
from gpu_mixmatch.impl.eager.cut import regions_of
from gpu_mixmatch.impl.numba.chain import ChainTask, chain_task, most_drawn, write_chains
from gpu_mixmatch.impl.numba.loops import (
    Shape,
    filter_views,
    lie_within,
    mix_views,
    rows_lie_within,
    widen,
    write_views,
)
from gpu_mixmatch.impl.numba.mixup import blend, check_mixed
from gpu_mixmatch.impl.numba.rows import (
    blur_scratch,
    blur_tables,
    half_kernels,
    line_tables,
    shares,
    stacked,
)
from gpu_mixmatch.impl.numba.threads import in_threads, threads_for
from gpu_mixmatch.types import ChainParams, Draws, Geometry, MixUpParams, Scaling

# What zoom and blur of a value cost, in values that are only moved.
_FILTER_COST = 8
_MOST_FLOAT = np.finfo(np.float32).max


class _Task(NamedTuple):
    """What the loops read, as numpy's arrays."""

    images: tuple[Any, ...]  # flat, in the order of Shape
    draws: tuple[Any, ...]  # the fields of AugmentParams
    regions: Any  # what is resized of each window, [R, 4] or [0, 4]
    taps: Any  # of a blur, [R, 1 + its reach]
    factors: tuple[Any, ...]  # scale and bias per plane, or per value of a line
    tables: tuple[Any, ...]  # lines of the padded image, lines and columns of a blur
    shape: Shape

    @property
    def filters(self) -> bool:
        """Whether pixels are more than moved."""
        return len(self.regions) > 0 or self.taps.shape[1] > 1


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
    channels_last = not out.is_contiguous()
    resizes = geometry.zoom or (geometry.cut is not None and geometry.cut.area is not None)
    filters = geometry.blur_radius > 0 or (resizes and geometry.chain is None)
    # a filter runs along planes; where pixels are only moved, their values stay together
    values = out.shape[1] if channels_last and not filters else 1
    params = type(params)(*(draw.detach().contiguous() for draw in params))
    _check_draws(params, 2 * geometry.padding)
    if isinstance(params, ChainParams):
        most = most_drawn(geometry.cut, geometry.chain)
        if not rows_lie_within(params.chain.numpy(), most):
            check_chain_draws(params, geometry.cut, geometry.chain)  # which raises

    in_order = out.permute(0, 2, 3, 1) if channels_last else out
    direct = out.dtype == torch.float32 and channels_last == (values > 1)
    target = in_order.view(-1) if direct else _floats("views", out, workspace)
    described = sources, params, geometry, scaling, channels_last_in, out.shape
    task = chain_task(*described, values > 1) if geometry.chain else _task(*described, values)
    if mixup is None:
        _write_all(task, target, workspace)
    elif isinstance(task, _Task) and not task.filters:
        _mix_all(task, target, mixup, workspace)
    else:
        views = _floats("unmixed", out, workspace)
        _write_all(task, views, workspace)
        blend(views.view(len(out), -1), mixup, target.view(len(out), -1))
    if not direct:
        num_rows, channels, height, width = out.shape
        written = target.view(num_rows, channels // values, height, width, values)
        out.copy_(written.permute(0, 1, 4, 2, 3).flatten(1, 2))


def _task(
    sources: tuple[Tensor, ...],
    params: Draws,
    geometry: Geometry,
    scaling: Scaling,
    channels_last_in: bool,
    out_shape: tuple[int, ...],
    values: int,
) -> _Task:
    """Lay out what the loops read where there is no chain."""
    _, channels, view_height, view_width = out_shape
    height, width = sources[0].shape[1:3] if channels_last_in else sources[0].shape[2:]
    padding, padding_mode, radius = geometry.padding, geometry.padding_mode, geometry.blur_radius
    shape = Shape(
        channels // values,
        height,
        width,
        view_height,
        view_width,
        values,
        padding,
        repeat=1 if padding_mode == "reflect" else 0,
        fill=["reflect", "edge", "zeros"].index(padding_mode),
    )
    top, left, flip, zoom, sigma = params[:5]
    regions = regions_of(params, geometry, (height, width), (view_height, view_width))
    if regions and geometry.cut and geometry.cut.area is None:  # another window, of fewer pixels
        top = (top + regions.top).int()
        left = (left + torch.where(flip > 0, -regions.left, regions.left)).int()
        regions = None
    lines, _ = line_tables(height, width, padding, padding_mode)
    return _Task(
        tuple(_lines_of(source, channels_last_in, values).numpy() for source in sources),
        tuple(draw.numpy() for draw in (top, left, flip, zoom, sigma)),
        stacked(regions),
        half_kernels(sigma, radius).numpy(),
        tuple(_per_value(factor, shape).detach().numpy() for factor in scaling),
        (lines, *blur_tables(view_height, view_width, radius)),
        shape,
    )


def _write_all(task: _Task | ChainTask, target: Tensor, workspace: Workspace) -> None:
    """Write every view of every image; a thread has a share of the images of every source."""
    if isinstance(task, ChainTask):
        write_chains(task, target, workspace)
        return
    images, draws, regions, taps, factors, tables, shape = task
    image_lines, pitch = shape.planes * shape.height, shape.pitch
    image_size = image_lines * shape.width * shape.values
    num_threads = threads_for(target.numel() * (_FILTER_COST if task.filters else 1))
    dtype = torch.uint8 if images[0].dtype == np.uint8 else torch.float32
    # an image and a line of zeros for each thread
    widened = workspace.empty(
        "widened image", (num_threads, (image_lines + 1) * pitch), dtype, target.device
    )
    widened[:, image_lines * pitch :] = 0
    wide, out = widened.numpy(), target.numpy()
    counts = [len(source) // image_size for source in images]
    scratch: Any = None
    if task.filters:
        height, width = shape.view_height, shape.view_width
        size = blur_scratch(height, width, taps.shape[1] - 1) + shape.width
        scratch = workspace.empty("plane", (num_threads, size), torch.float32, target.device)
        scratch = scratch.numpy()

    def work(part: int) -> None:
        for row, num_views, number, share in shares(counts, len(draws[0]), part, num_threads):
            where = out, row, num_views, images[number], wide[part], draws
            if scratch is None:
                write_views(*where, factors, tables, shape, pitch, *share)
            else:
                more = regions, taps, factors, tables, shape, pitch, scratch[part]
                filter_views(*where, *more, *share)

    in_threads(work, num_threads)


def _mix_all(task: _Task, target: Tensor, mixup: MixUpParams, workspace: Workspace) -> None:
    """Widen all images, then write every blend of two views."""
    images, draws, _, _, factors, tables, shape = task
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


def _check_draws(params: Draws, most: int) -> None:
    """Raise before a compiled loop, which checks nothing, reads beyond an image."""
    top, left, flip, zoom, sigma = (draw.numpy() for draw in params[:5])
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
    length = shape.view_width * shape.values if shape.values > 1 else 1
    if not isinstance(factor, Tensor):
        return _filled(factor, shape.planes, length)
    factor = factor.float()
    return factor.repeat(shape.view_width)[None] if length > 1 else factor[:, None].contiguous()


@constant
def _filled(value: float, *shape: int) -> Tensor:
    return torch.full(shape, value, dtype=torch.float32, device="cpu")
