"""MixUp of images and targets in one launch: reads each row and its partner, writes the blend."""

from math import prod

import triton
import triton.language as tl
from torch import Tensor

from gpu_mixmatch.impl.triton.launch import blocks, launch
from gpu_mixmatch.types import MixUpParams

_BLOCK = 2048  # values per program: 16 per thread
_CLASSES = 128  # targets per turn of the first program of a row


@triton.jit
def _blend(out_ptr, rows_ptr, row, partner, lam, length, offs):
    mask = offs < length
    mine = tl.load(rows_ptr + row * length + offs, mask=mask, other=0.0).to(tl.float32)
    theirs = tl.load(rows_ptr + partner * length + offs, mask=mask, other=0.0).to(tl.float32)
    mixed = theirs + lam * (mine - theirs)
    tl.store(out_ptr + row * length + offs, mixed.to(out_ptr.dtype.element_ty), mask=mask)


# The draws may begin anywhere. The length of a row stays: it says whether rows begin at 16 bytes.
@triton.jit(
    do_not_specialize=["num_classes"], do_not_specialize_on_alignment=["lam_ptr", "index_ptr"]
)
def mixup_kernel(
    out_ptr,
    mixed_targets_ptr,
    inputs_ptr,
    targets_ptr,
    lam_ptr,
    index_ptr,
    num_values,
    num_classes,
    BLOCK: tl.constexpr,
    CLASSES: tl.constexpr,
):
    program = tl.program_id(0)
    num_blocks = tl.maximum(tl.cdiv(num_values, BLOCK), 1)
    row = (program // num_blocks).to(tl.int64)
    block = program % num_blocks
    lam = tl.load(lam_ptr + row)
    partner = tl.load(index_ptr + row)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    _blend(out_ptr, inputs_ptr, row, partner, lam, num_values, offs)
    if targets_ptr is not None and block == 0:
        for start in range(0, num_classes, CLASSES):
            cls = start + tl.arange(0, CLASSES)
            _blend(mixed_targets_ptr, targets_ptr, row, partner, lam, num_classes, cls)


def mixup(
    inputs: Tensor, targets: Tensor, params: MixUpParams, out: Tensor, mixed_targets: Tensor
) -> None:
    _mix(inputs, targets, params, out, mixed_targets)


def blend(rows: Tensor, params: MixUpParams, out: Tensor) -> None:
    """Write λ'·row + (1 - λ')·row[index] of rows that lie in memory as ``out`` does."""
    _mix(rows, None, params, out, None)


def _mix(
    inputs: Tensor,
    targets: Tensor | None,
    params: MixUpParams,
    out: Tensor,
    mixed_targets: Tensor | None,
) -> None:
    num_rows, *shape = inputs.shape
    num_values = prod(shape)
    launch(
        mixup_kernel,
        num_rows * max(blocks(num_values, _BLOCK), 1),
        inputs.device,
        out,
        mixed_targets,
        inputs,
        targets,
        params.lam,
        params.index,
        num_values,
        0 if targets is None else targets.shape[1],
        BLOCK=_BLOCK,
        CLASSES=_CLASSES,
        num_warps=4,
    )
