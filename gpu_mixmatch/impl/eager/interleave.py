"""The reference's interleaving of groups of rows."""

import torch
from torch import Tensor

from gpu_mixmatch.impl.constants import constant


def interleave(rows: Tensor, num_groups: int) -> Tensor:
    index = _interleaved(len(rows), num_groups, rows.device)
    # index_select copies whole rows, rows[index] goes value by value on a CPU, but keeps the layout
    if rows.dim() == 4 and rows.is_contiguous(memory_format=torch.channels_last):
        return rows.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return rows.index_select(0, index)


@constant
def _interleaved(length: int, num_groups: int, device: torch.device) -> Tensor:
    index = torch.arange(length, device="cpu")
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
