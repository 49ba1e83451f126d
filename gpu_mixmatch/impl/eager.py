"""The operations in plain torch: the readable specification, and fast enough for a CPU.

Nothing here reads a value back from the device or branches on one, so that all of it runs on CUDA
without a synchronisation. Arguments arrive validated from `gpu_mixmatch.functional`.
"""

from collections.abc import Callable
from functools import lru_cache, reduce
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_mixmatch import sampling
from gpu_mixmatch._buffers import Workspace
from gpu_mixmatch.types import (
    AugmentParams,
    AugmentPolicy,
    LamMode,
    LossOutput,
    MixMode,
    MixUpParams,
    PaddingMode,
)

P = ParamSpec("P")
T = TypeVar("T")

# Values per chunk of a pass that runs several times over its output: 2 MB of float32 stay in cache.
_CHUNK = 2**19
# Up to this length an axis is blurred by one square matrix, beyond it in tiles of half of it.
_WHOLE_AXIS = 64


def _constant(function: Callable[P, T]) -> Callable[P, T]:
    """Keep what ``function`` returns for the same arguments, as ordinary tensors."""
    made_outside: Callable[P, T] = torch.inference_mode(False)(function)
    return lru_cache(maxsize=32)(made_outside)  # type: ignore[return-value]


def sharpen(probs: Tensor, temperature: float) -> Tensor:
    # p^(1/T) / Σ p^(1/T) = softmax(log p / T): no power to underflow
    return F.softmax(_wide(probs).log() / temperature, dim=-1).to(probs.dtype)


def guess_labels(logits: Tensor, temperature: float) -> Tensor:
    # Σ_k softmax, not its mean: the factor 1/K cancels in the sharpening
    log_sum = reduce(torch.logaddexp, F.log_softmax(_wide(logits), dim=-1).unbind())
    return F.softmax(log_sum / temperature, dim=-1).float()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def draw_batch(
    key: tuple[int, int],
    ids_x: Tensor | int,
    ids_u: Tensor | int,
    *,
    num_augmentations: int,
    policy: AugmentPolicy | None,
    alpha: float,
    lam: LamMode,
    mix: MixMode,
    device: torch.device,
) -> Tensor:
    draws = sampling.draw_batch(
        *key,
        ids_x,
        ids_u,
        num_augmentations=num_augmentations,
        policy=policy,
        alpha=alpha,
        lam=lam,
        mix=mix,
    )
    return sampling.to_device(sampling.pack(*draws), device)


def batch_targets(
    y: Tensor,
    logits: Tensor,
    temperature: float,
    label_smoothing: float,
    mixup: MixUpParams | None,
    out: Tensor,
) -> None:
    num_views, num_images, num_classes = logits.shape
    targets = torch.empty_like(out) if mixup else out
    known, guessed = targets[: len(y)], targets[len(y) :]
    if y.dim() == 1:
        torch.eq(y[:, None], _classes(num_classes, y.device), out=known)
    else:
        known.copy_(y)
    if label_smoothing:
        known.mul_(1 - label_smoothing).add_(label_smoothing / num_classes)
    guessed.view(num_views, num_images, num_classes).copy_(guess_labels(logits, temperature))
    if mixup:
        _blend(targets, mixup, out)


@_constant
def _classes(num_classes: int, device: torch.device) -> Tensor:
    return torch.arange(num_classes, device=device)


def mixup(
    inputs: Tensor,
    targets: Tensor,
    params: MixUpParams,
    out: Tensor,
    mixed_targets: Tensor,
    order: Tensor | None = None,
) -> None:
    _blend(targets, params, mixed_targets)
    _blend(_dense_rows(inputs), params, _dense_rows(out), order)


def _blend(rows: Tensor, params: MixUpParams, out: Tensor, order: Tensor | None = None) -> None:
    """Write λ'·row + (1 - λ')·row[index] of ``[N, values]``, in the given order of rows."""
    lam, index = params.lam[:, None], params.index
    mine = rows
    if order is not None:
        mine, lam, index = rows.index_select(0, order), lam[order], index[order]
    # lerp: partner + λ'·(row - partner)
    if rows.dtype == torch.float32:
        torch.index_select(rows, 0, index, out=out).lerp_(mine, lam)
        return
    for chunk in _chunks(rows):
        partners = rows.index_select(0, index[chunk]).float()
        out[chunk] = partners.lerp_(mine[chunk].float(), lam[chunk])


def _dense_rows(tensor: Tensor) -> Tensor:
    """View contiguous or channels_last ``[N, ...]`` as ``[N, values]``, in memory order."""
    if not tensor.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.view(len(tensor), tensor[:1].numel() if len(tensor) else 0)


def interleave(rows: Tensor, num_groups: int) -> Tensor:
    index = interleave_index(len(rows), num_groups, rows.device)
    # index_select copies whole rows, rows[index] goes value by value on a CPU, but keeps the layout
    if rows.dim() == 4 and rows.is_contiguous(memory_format=torch.channels_last):
        return rows.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return rows.index_select(0, index)


@_constant
def interleave_index(length: int, num_groups: int, device: torch.device) -> Tensor:
    index = torch.arange(length)
    groups = index.tensor_split(num_groups)  # views: writing to them writes the index
    smallest = len(groups[-1])
    width, extra = divmod(smallest, num_groups)
    start = width
    for number, group in enumerate(groups[1:], 1):
        stop = start + width + (1 if number >= num_groups - extra else 0)
        mine, theirs = groups[0][start:stop], group[start:stop]
        mine[:], theirs[:] = theirs.clone(), mine.clone()
        start = stop
    return index.to(device)


def linear_rampup(step: Tensor, rampup_steps: int) -> Tensor:
    if rampup_steps == 0:
        return torch.ones_like(step, dtype=torch.float32)
    return (step / rampup_steps).clamp(0.0, 1.0)


def mixmatch_loss(
    logits: Tensor, targets: Tensor, num_labelled: int, weight_u: Tensor
) -> LossOutput:
    log_probs = F.log_softmax(_wide(logits[:num_labelled]), dim=-1)
    probs = F.softmax(_wide(logits[num_labelled:]), dim=-1)
    targets_x, targets_u = targets[:num_labelled], targets[num_labelled:]
    loss_x = -(targets_x * log_probs).sum() / max(len(targets_x), 1)
    loss_u = (probs - targets_u).square().sum() / max(targets_u.numel(), 1)
    return LossOutput(loss_x + weight_u * loss_u, loss_x, loss_u, weight_u)


def mixmatch_loss_backward(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    logits: Tensor,
    targets: Tensor,
    num_labelled: int,
    weight_u: Tensor,
) -> Tensor:
    grad_loss, grad_x, grad_u = (0.0 if grad is None else grad for grad in grads)
    probs = F.softmax(_wide(logits), dim=-1)
    (probs_x, probs_u), (targets_x, targets_u) = (
        (rows[:num_labelled], rows[num_labelled:]) for rows in (probs, targets)
    )
    of_x = probs_x * targets_x.sum(dim=1, keepdim=True) - targets_x
    missed = probs_u - targets_u
    of_u = 2 * probs_u * (missed - (missed * probs_u).sum(dim=1, keepdim=True))
    of_x = of_x * ((grad_loss + grad_x) / max(len(targets_x), 1))
    of_u = of_u * ((weight_u * grad_loss + grad_u) / max(targets_u.numel(), 1))
    return torch.cat([of_x, of_u]).to(logits.dtype)


def augment(
    sources: tuple[Tensor, ...],
    params: AugmentParams,
    scale: Tensor | float,
    bias: Tensor | float,
    *,
    padding: int,
    padding_mode: PaddingMode,
    zoom: bool,
    blur_radius: int,
    channels_last_in: bool,
    out: Tensor,
    workspace: Workspace | None,
    mixup: MixUpParams | None = None,
) -> None:
    """Write every view of every source image into ``out``.

    Shift, flip and every channel's bytes are settled by where a row of pixels starts: images are
    widened once into rows that hold the image and its mirror with their padding, and each output
    row is one window of such a row. What remains is to convert, zoom, blur and scale in chunks.

    Args:
        sources: Images, ``[M_i, C, H, W]`` or ``[M_i, H, W, C]``; the first is drawn once, the
            second as often as rows remain; a single one fills all rows.
        params: Draws of R rows.
        scale, bias: A number or one per channel, ``[C]`` float32: value·scale + bias.
        padding: Pixels that the image is padded by before the crop.
        padding_mode: What the padding repeats.
        zoom: Whether ``params.zoom`` is to be used.
        blur_radius: Radius of the sampled Gaussian in pixels; 0 leaves ``params.sigma`` unused.
        channels_last_in: Whether sources are NHWC.
        out: ``[R, C, H, W]``, contiguous or channels_last.
        workspace: Where scratch memory comes from.
        mixup: What to blend the views by while they are written; None is not at all.
    """
    if mixup is not None:
        views = torch.empty_like(out)
        augment(
            sources,
            params,
            scale,
            bias,
            padding=padding,
            padding_mode=padding_mode,
            zoom=zoom,
            blur_radius=blur_radius,
            channels_last_in=channels_last_in,
            out=views,
            workspace=workspace,
        )
        _blend(_dense_rows(views), mixup, _dense_rows(out))
        return
    if out.device.type != "cpu":
        layout = (padding, padding_mode, zoom, blur_radius, channels_last_in)
        _augment_in_few_launches(sources, params, scale, bias, *layout, out=out)
        return
    num_rows, channels, height, width = out.shape
    channels_last = not out.is_contiguous()
    pixels = out.permute(0, 2, 3, 1) if channels_last else out
    # planes of rows of pixels: C planes of 1-value pixels, or 1 plane of C-value pixels
    planes, values = (1, channels) if channels_last else (channels, 1)
    workspace = workspace or Workspace()

    wide, starts = line_windows(
        sources,
        params,
        height,
        width,
        planes,
        values,
        padding,
        padding_mode,
        channels_last_in,
        workspace,
    )
    windows = wide.view(-1).as_strided((wide.numel() - width * values + 1, width * values), (1, 1))
    scale, bias = (
        # one factor per value of a row of pixels, or one per plane
        (factor.repeat(width) if channels_last else factor[:, None])
        if isinstance(factor, Tensor)
        else factor
        for factor in (scale, bias)
    )
    flat = pixels.view(num_rows, planes, height, width * values) if channels_last else pixels
    # on a long axis a full matrix is mostly zeros: blur it tile by tile
    tiled = blur_radius > 0 and min(height, width) > max(_WHOLE_AXIS, blur_radius)
    matrices = _axis_matrices(params, height, width, zoom, 0 if tiled else blur_radius, workspace)
    in_place = out.dtype == torch.float32
    chunks = _chunks(out)
    size = min(chunks[0].stop, num_rows) if chunks else 0
    lines = (size, *flat.shape[1:])
    gathered = workspace.empty("gathered", lines, wide.dtype, wide.device)
    scratch = gathered if in_place else workspace.empty("scratch", lines, torch.float32, out.device)
    for rows in chunks:
        target = flat[rows]
        count = target.shape[0]
        found = gathered[:count]
        torch.index_select(windows, 0, starts[rows].view(-1), out=found.view(-1, width * values))
        block = target if in_place else scratch[:count]
        block.copy_(found)
        if matrices is not None:
            _apply_matrices(block, matrices, rows, values, workspace)
        if tiled:
            _blur_tiled(block, params.sigma[rows], blur_radius, values)
        # [count, planes, H·W] or [count, H, W·C]
        channelwise = block.squeeze(1) if channels_last else block.flatten(2)
        channelwise.mul_(scale).add_(bias)
        if not in_place:
            target.copy_(block)


def _augment_in_few_launches(
    sources: tuple[Tensor, ...],
    params: AugmentParams,
    scale: Tensor | float,
    bias: Tensor | float,
    padding: int,
    padding_mode: PaddingMode,
    zoom: bool,
    blur_radius: int,
    channels_last_in: bool,
    *,
    out: Tensor,
) -> None:
    """The same where launches cost more than bytes: normalise and widen all, cut windows out.

    Every operation runs over the whole batch. Images are normalised first, which zoom and blur do
    not mind, being linear and of weights that sum to one.
    """
    num_rows, channels, height, width = out.shape
    device = out.device
    counts = tuple(source.shape[0] for source in sources)
    scale, bias = (
        (factor if isinstance(factor, Tensor) else _number(factor, device)).view(-1, 1, 1)
        for factor in (scale, bias)
    )
    border = int(padding_mode == "zeros")  # a line and a column of black, which padding repeats
    images = torch.empty(
        (sum(counts), channels, height + border, width + border), dtype=torch.float32, device=device
    )
    if border:
        images.copy_(bias)
    for source, part in zip(sources, torch.split(images, list(counts)), strict=True):
        pixels = source.permute(0, 3, 1, 2) if channels_last_in else source
        torch.addcmul(bias, pixels, scale, out=part[:, :, :height, :width])
    lines, columns = _wide_index(height, width, padding, padding_mode, device)
    wide = images[:, :, lines[:, None], columns]  # [M, C, H + 2·padding, 2 · (W + 2·padding)]

    _, _, tall, pitch = wide.shape
    _, image_starts = _image_starts(counts, num_rows, channels, tall, pitch, device)
    # left in the image, 2·padding - left in its mirror image, which lies behind it
    column = params.left.sub(params.flip, alpha=2 * padding).abs_()
    starts = image_starts.add(params.top, alpha=pitch).add_(column)
    starts.add_(params.flip, alpha=pitch // 2)
    reach = (channels - 1) * tall * pitch + (height - 1) * pitch + width
    windows = wide.view(-1).as_strided(
        (max(wide.numel() - reach + 1, 0), channels, height, width), (1, tall * pitch, pitch, 1)
    )
    matrices = _axis_matrices(params, height, width, zoom, blur_radius, Workspace())
    if matrices is None and out.dtype == torch.float32 and out.is_contiguous():
        torch.index_select(windows, 0, starts, out=out)
        return
    views = windows.index_select(0, starts)
    if matrices is not None:
        down, across = matrices
        # across · Xᵀ is [R, W, C·H], and its rows, as C lines of H, times downᵀ
        turned = torch.bmm(across, views.view(num_rows, channels * height, width).mT)
        turned = torch.bmm(turned.view(num_rows, width * channels, height), down.mT)
        views = turned.view(num_rows, width, channels, height).permute(0, 2, 3, 1)
    out.copy_(views)


@_constant
def _number(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, device=device)


@_constant
def _wide_index(
    height: int, width: int, padding: int, padding_mode: PaddingMode, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Lines and columns of a padded image and, behind it, of its mirror image."""

    def padded(size: int) -> Tensor:
        position = torch.arange(-padding, size + padding)
        if padding_mode == "reflect":
            return (size - 1) - ((size - 1) - position.abs()).abs()
        if padding_mode == "edge":
            return position.clamp(0, size - 1)
        return position.where((position >= 0) & (position < size), size)

    columns = padded(width)
    return padded(height).to(device), torch.cat([columns, columns.flip(0)]).to(device)


def _chunks(rows: Tensor) -> list[slice]:
    length = rows.shape[0]
    size = max(1, _CHUNK * length // max(1, rows.numel()))
    return [slice(start, start + size) for start in range(0, length, size)]


def line_windows(
    sources: tuple[Tensor, ...],
    params: AugmentParams,
    height: int,
    width: int,
    planes: int,
    values: int,
    padding: int,
    padding_mode: PaddingMode,
    channels_last_in: bool,
    workspace: Workspace,
) -> tuple[Tensor, Tensor]:
    """Widen the lines of all images, and say where in them each line of a view begins.

    Returns:
        Lines with padding and mirror image, and starts in them, ``[R, planes, H]`` int64.
    """
    wide, image_at = _widen_rows(
        sources, height, width, planes, values, padding, padding_mode, channels_last_in, workspace
    )
    starts = _row_starts(
        params, sources, planes, height, padding, padding_mode, wide, image_at, values, workspace
    )
    return wide, starts


def _widen_rows(
    sources: tuple[Tensor, ...],
    height: int,
    width: int,
    planes: int,
    values: int,
    padding: int,
    padding_mode: PaddingMode,
    channels_last_in: bool,
    workspace: Workspace,
) -> tuple[Tensor, int]:
    """Write each row of pixels as [padding, mirror, (padding), image, padding].

    With reflection the mirror runs into the image without repeating the edge. A row of zeros
    follows the last image, for what zeros padding puts above and below.

    Returns:
        The rows, ``[M·planes·H + 1, pitch]``, and the pixel at which the padded image begins.
    """
    reflect = padding_mode == "reflect"
    image_at = width - 1 if reflect else width + padding
    pitch = image_at + width + 2 * padding
    stacked = sources[0]
    if len(sources) > 1:
        shape = (sum(source.shape[0] for source in sources), *stacked.shape[1:])
        stacked = workspace.empty("stacked", shape, stacked.dtype, stacked.device)
        torch.cat(sources, out=stacked)
    count = stacked.shape[0]
    wide = workspace.empty(
        "wide", (count * planes * height + 1, pitch * values), stacked.dtype, stacked.device
    )
    if padding_mode == "zeros":
        wide.zero_()
    # [M, planes, H, W, values], whatever the layouts
    image = stacked if channels_last_in else stacked.permute(0, 2, 3, 1)  # [M, H, W, C]
    image = image[:, None] if planes == 1 else image.permute(0, 3, 1, 2)[..., None]
    rows = wide[:-1].view(count, planes, height, pitch, values)
    mirror = image.flip(3)
    rows[..., padding : padding + width, :] = mirror
    if reflect:
        # from the mirror's last pixel on, which is the image's first: whole rows copy faster
        rows[..., padding + width - 1 : padding + 2 * width - 1, :] = image
        if padding:
            rows[..., :padding, :] = image[..., width - 1 - padding : width - 1, :]
            rows[..., pitch - padding :, :] = mirror[..., 1 : padding + 1, :]
    else:
        rows[..., image_at + padding : image_at + padding + width, :] = image
        if padding_mode == "edge" and padding:
            first, last = image[..., :1, :], image[..., -1:, :]
            rows[..., :padding, :] = last
            rows[..., padding + width : image_at + padding, :] = first
            rows[..., pitch - padding :, :] = last
    return wide, image_at


def _row_starts(
    params: AugmentParams,
    sources: tuple[Tensor, ...],
    planes: int,
    height: int,
    padding: int,
    padding_mode: PaddingMode,
    wide: Tensor,
    image_at: int,
    values: int,
    workspace: Workspace,
) -> Tensor:
    """Where each output row begins in ``wide``, ``[R, planes, H]`` int64."""
    pitch = wide.shape[1]
    line_starts, column_starts = _window_starts(
        height, padding, padding_mode, pitch, image_at, values, wide.device
    )
    plane_starts, image_starts = _image_starts(
        tuple(source.shape[0] for source in sources),
        params.top.shape[0],
        planes,
        height,
        pitch,
        wide.device,
    )
    column = torch.add(params.left, params.flip, alpha=2 * padding + 1)  # [R], of column_starts
    offset = column_starts.index_select(0, column) + image_starts
    lines = line_starts.index_select(0, params.top)  # [R, H]
    shape = (len(lines), planes, height)
    starts = workspace.empty("starts", shape, torch.int64, wide.device)
    torch.add((lines + offset[:, None])[:, None, :], plane_starts[:, None], out=starts)
    if padding_mode != "zeros":
        return starts
    # rows above and below the image: the row of zeros at the end, whatever the column
    return torch.where((lines < 0)[:, None, :], wide.numel() - pitch, starts)


@_constant
def _window_starts(
    height: int,
    padding: int,
    padding_mode: PaddingMode,
    pitch: int,
    image_at: int,
    values: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Where a window's lines and columns begin in a plane of wide rows.

    Returns:
        For each top, the start of the lines, ``[2·padding + 1, H]`` int64, negative for a line of
        zeros; for each left, then again for each left of a mirror image, the start of the columns.
    """
    line = torch.arange(-padding, height + padding)
    if padding_mode == "reflect":
        line = (height - 1) - ((height - 1) - line.abs()).abs()
    elif padding_mode == "edge":
        line = line.clamp(0, height - 1)
    else:
        line = line.where((line >= 0) & (line < height), -(2**40))
    lines = (line * pitch).unfold(0, height, 1).contiguous()
    left = torch.arange(2 * padding + 1)
    columns = torch.cat([image_at + left, 2 * padding - left]) * values
    return lines.to(device), columns.to(device)


@_constant
def _image_starts(
    counts: tuple[int, ...],
    num_rows: int,
    planes: int,
    height: int,
    pitch: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Start of each plane in its image, ``[planes]``, and of each row's image, ``[R]``."""
    *once, last = counts
    first = sum(once)
    views = (num_rows - first) // max(last, 1)
    image = torch.cat([torch.arange(first), torch.arange(first, first + last).repeat(views)])
    plane = torch.arange(planes)
    return (plane * (height * pitch)).to(device), (image * (planes * height * pitch)).to(device)


def _axis_matrices(
    params: AugmentParams,
    height: int,
    width: int,
    zoom: bool,
    blur_radius: int,
    workspace: Workspace,
) -> tuple[Tensor, Tensor] | None:
    """Zoom and blur as one linear map per axis: ``[R, H, H]`` and ``[R, W, W]``, or None."""
    if not zoom and not blur_radius:
        return None
    num_rows, device = len(params.sigma), params.sigma.device

    def scratch(name: str, size: int) -> Tensor:
        return workspace.empty(name, (num_rows, size, size), torch.float32, device)

    def blur(name: str, size: int) -> Tensor:
        return _blur_matrix(params.sigma, blur_radius, out=scratch(f"blur {name}", size))

    if not zoom:
        down = blur("down", height)
        return down, (down if height == width else blur("across", width))
    top, bottom, left, right = params.zoom.unbind(1)
    top, bottom = _cuts(top, bottom, height)
    left, right = _cuts(left, right, width)
    # the image is mirrored already, and so is what is cut off it
    flipped = params.flip > 0
    left, right = torch.where(flipped, right, left), torch.where(flipped, left, right)

    def matrix(name: str, before: Tensor, after: Tensor, size: int) -> Tensor:
        zoomed = _zoom_matrix(before, after, out=scratch(f"zoom {name}", size))
        if not blur_radius:
            return zoomed
        return torch.bmm(blur(name, size), zoomed, out=scratch(f"zoom and blur {name}", size))

    return matrix("down", top, bottom, height), matrix("across", left, right, width)


def _apply_matrices(
    block: Tensor, matrices: tuple[Tensor, Tensor], rows: slice, values: int, workspace: Workspace
) -> None:
    """Replace each image X of ``block`` by down · X · acrossᵀ."""
    down, across = matrices[0][rows], matrices[1][rows]
    count, _, height, row_values = block.shape
    between = workspace.empty("between", tuple(block.shape), block.dtype, block.device)
    if values > 1:  # [count, 1, H, W·C]: down first, its columns are W·C values
        torch.bmm(down, block.squeeze(1), out=between.squeeze(1))
        pixels = (count, height, row_values // values, values)
        # channels apart: a product with 3 columns is slow
        lines = between.view(pixels).permute(0, 3, 1, 2).flatten(1, 2)
        lines = torch.bmm(lines, across.mT).view(count, values, height, -1)
        block.view(pixels).copy_(lines.permute(0, 2, 3, 1))
        return
    torch.bmm(block.flatten(1, 2), across.mT, out=between.flatten(1, 2))
    torch.matmul(down[:, None], between, out=block)


def _cuts(before: Tensor, after: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Clamp what is cut off an axis: at least one pixel is left."""
    before = before.clamp_max(size - 1)
    return before, torch.minimum(after, size - 1 - before)


def _zoom_matrix(before: Tensor, after: Tensor, out: Tensor) -> Tensor:
    """Cut ``before`` and ``after`` pixels off an axis and resize back, bilinear, ``[R, n, n]``.

    Half-pixel centres without antialiasing, as ``F.interpolate(align_corners=False)``: the weight
    of a source pixel falls linearly with its distance from the position read.
    """
    size = out.shape[1]
    grid = torch.arange(size, dtype=torch.float32, device=before.device)
    kept = (size - before - after).float()[:, None]
    # (grid + 1/2) · kept / size - 1/2, with whole numbers as far as they go
    read = (((2 * grid + 1) * kept - size) / (2 * size)).clamp_min(0).minimum(kept - 1)
    read = read + before.float()[:, None]
    distance = torch.sub(read[:, :, None], grid, out=out).abs_()
    return distance.neg_().add_(1).clamp_min_(0)


def _blur_matrix(sigma: Tensor, radius: int, out: Tensor) -> Tensor:
    """Convolve an axis with the sampled Gaussian, reflecting at the ends, ``[R, n, n]``."""
    taps = _gaussian(sigma, radius)
    torch.mm(taps, _reflected_taps(out.shape[1], radius, sigma.device), out=out.flatten(1))
    return out


def _blur_tiled(block: Tensor, sigma: Tensor, radius: int, values: int) -> None:
    """Blur ``[n, planes, H, W·values]`` in place, each axis as products with narrow bands."""
    count, planes, height, row_values = block.shape
    width = row_values // values
    images = block.view(count, planes, height, width, values).permute(0, 1, 4, 2, 3)
    tile, reach = _WHOLE_AXIS // 2, 2 * radius
    band = F.pad(_gaussian(sigma, radius), (0, 1))[:, _band_taps(tile, radius, sigma.device)]

    wide = F.pad(images.flatten(1, 2), (radius, radius, 0, 0), mode="reflect").flatten(1, 2)
    across = [
        torch.bmm(wide[:, :, start : stop + reach], band[:, : stop - start + reach, : stop - start])
        for start, stop in _tiles(width, tile)
    ]  # of [n, C·H, tile]
    lines = torch.cat(across, dim=2).view(count, planes * values, height, width)
    tall = F.pad(lines, (0, 0, radius, radius), mode="reflect")
    down = [
        band.mT[:, None, : stop - start, : stop - start + reach] @ tall[:, :, start : stop + reach]
        for start, stop in _tiles(height, tile)
    ]  # of [n, C, tile, W]
    images.copy_(torch.cat(down, dim=2).view(images.shape))


def _tiles(size: int, tile: int) -> list[tuple[int, int]]:
    return [(start, min(start + tile, size)) for start in range(0, size, tile)]


@_constant
def _band_taps(tile: int, radius: int, device: torch.device) -> Tensor:
    """The tap by which output j reads input i, or the tap after the last, ``[i, j]``."""
    tap = torch.arange(tile + 2 * radius)[:, None] - torch.arange(tile)
    return tap.where((tap >= 0) & (tap <= 2 * radius), 2 * radius + 1).to(device)


def _gaussian(sigma: Tensor, radius: int) -> Tensor:
    """exp(-d² / 2σ²) at d = -radius .. radius, normalised, ``[R, 2·radius + 1]``."""
    # below 0.01 px the taps beside the centre are zero in float32
    variance = sigma.clamp_min(0.01).square()[:, None]
    return F.softmax(_half_squares(radius, sigma.device) / variance, dim=1)


@_constant
def _half_squares(radius: int, device: torch.device) -> Tensor:
    distance = torch.arange(-radius, radius + 1, dtype=torch.float32)
    return (-0.5 * distance.square()).to(device)


@_constant
def _reflected_taps(size: int, radius: int, device: torch.device) -> Tensor:
    """1 where tap d of output i reads input j, ``[2·radius + 1, n·n]``."""
    position = torch.arange(size) + torch.arange(-radius, radius + 1)[:, None]  # [taps, n]
    period = max(2 * (size - 1), 1)
    position = position.remainder(period)
    position = torch.minimum(position, period - position).clamp_max(size - 1)
    return F.one_hot(position, size).float().flatten(1).to(device)
