"""MixUp in one pass: reads each row and its partner, writes the blend."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu_mixmatch._validation import mixup_error
from gpu_mixmatch.impl import eager
from gpu_mixmatch.impl.eager.mixup import dense_rows
from gpu_mixmatch.impl.numba.loops import lie_within, mix_rows
from gpu_mixmatch.impl.numba.threads import in_threads, threads_for
from gpu_mixmatch.types import MixUpParams

_ONE = np.float32(1)


def mixup(
    inputs: Tensor, targets: Tensor, params: MixUpParams, out: Tensor, mixed_targets: Tensor
) -> None:
    if inputs.dtype != torch.float32 or inputs.numel() == 0:
        eager.mixup(inputs, targets, params, out, mixed_targets)
        return
    blend(dense_rows(inputs), params, dense_rows(out))
    blend(targets, params, mixed_targets)


def blend(rows: Tensor, params: MixUpParams, out: Tensor) -> None:
    """Write λ'·row + (1 - λ')·row[index] of ``[N, values]`` float32."""
    num_threads = threads_for(rows.numel())
    arrays = [tensor.detach().contiguous().numpy() for tensor in (rows, *params)]
    check_mixed(*arrays[1:])
    written = out.numpy()

    def work(part: int) -> None:
        share = (len(rows) * edge // num_threads for edge in (part, part + 1))
        mix_rows(written, *arrays, *share)

    in_threads(work, num_threads)


def check_mixed(lam: Any, index: Any) -> None:
    """Raise before a compiled loop, which checks nothing, reads beyond the batch."""
    if not (lie_within(index, len(index) - 1) and lie_within(lam, _ONE)):
        raise mixup_error(len(index), lam.min(), lam.max(), index.min(), index.max())
