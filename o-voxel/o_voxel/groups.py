"""Sums over groups of rows."""

from __future__ import annotations

import torch
from torch import Tensor


def sums_by_group(values: Tensor, group: Tensor, count: int) -> Tensor:
    """Sums (count, ...) of those rows of ``values`` (N, ...) that have the same ``group`` (N,) int64 in [0, count).

    Neighbouring rows of a group are added in pairs, then neighbouring sums, and so on: the order hangs on nothing
    but the rows, so that equal input gives equal bits on every device, unlike the atomic additions of index_add_.
    """
    group, order = torch.sort(group, stable=True)
    values, sizes = values[order], torch.bincount(group, minlength=count)
    while True:
        rank = torch.arange(len(group), device=group.device) - (torch.cumsum(sizes, 0) - sizes)[group]
        left = torch.nonzero(rank % 2 == 0)[:, 0]
        if len(left) == len(group):
            break
        right = (left + 1).clamp_max(len(group) - 1)
        alone = (rank[right] == 0) | (right == left)
        total = values[left] + values[right]
        values = torch.where(alone.view(-1, *[1] * (values.ndim - 1)), values[left], total)
        group, sizes = group[left], (sizes + 1) // 2
    sums = torch.zeros((count, *values.shape[1:]), dtype=values.dtype, device=values.device)
    sums[group] = values
    return sums
