"""MixUp: rows blended with their partners, images and targets alike."""

import torch
from torch import Tensor

from gpu_mixmatch import _validation
from gpu_mixmatch.types import MixUpParams

# Values that are blended at once in half precision: 2 MB of float32 stay in a CPU's cache.
_CHUNK = 2**19


def mixup(
    inputs: Tensor, targets: Tensor, params: MixUpParams, out: Tensor, mixed_targets: Tensor
) -> None:
    blend(targets, params, mixed_targets)
    blend(dense_rows(inputs), params, dense_rows(out))


def blend(rows: Tensor, params: MixUpParams, out: Tensor) -> None:
    """Write λ'·row + (1 - λ')·row[index] of ``[N, values]``."""
    _validation.check_mixup_values(params)
    lam, index = params.lam[:, None], params.index
    # lerp: partner + λ'·(row - partner)
    if rows.dtype == torch.float32:
        torch.index_select(rows, 0, index, out=out).lerp_(rows, lam)
        return
    size = max(1, _CHUNK * len(rows) // max(1, rows.numel()))
    for start in range(0, len(rows), size):
        chunk = slice(start, start + size)
        partners = rows.index_select(0, index[chunk]).float()
        out[chunk] = partners.lerp_(rows[chunk].float(), lam[chunk])


def dense_rows(tensor: Tensor) -> Tensor:
    """View contiguous or channels_last ``[N, ...]`` as ``[N, values]``, in memory order."""
    if not tensor.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.view(len(tensor), tensor[:1].numel() if len(tensor) else 0)
