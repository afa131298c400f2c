"""Sums over groups of rows, with the same bits however a device orders its additions."""

from __future__ import annotations

import torch
from torch import Tensor

_EXPONENT = 52  # the bit where the exponent of a float64 begins


def group_sums(values: Tensor, group: Tensor, count: int) -> Tensor:
    """Sum the rows of each of ``count`` groups: (count, ...), in the dtype of ``values``.

    values: (N, ...) finite floats. group: (N,) int64 in [0, count). Sums of parts that are exact to about 2^-80 of
    the largest value of their column, so equal input gives equal bits on every device. Nothing waits for the GPU.
    """
    shape = values.shape[1:]
    columns = values.double().reshape(len(values), shape.numel())
    totals = torch.zeros((count, columns.shape[1]), dtype=torch.int64, device=values.device)
    if not columns.numel():
        return totals.to(values.dtype).reshape(count, *shape)
    # Fixed point: integers add up to the same in any order. Sums of N parts below 2^bits stay below 2^62.
    bits = 62 - len(values).bit_length()
    largest = columns.abs().amax(dim=0).view(torch.int64) >> _EXPONENT
    exponent = 2045 + bits - largest.clamp_min(bits)
    scale = (exponent << _EXPONENT).view(torch.float64)
    unscale = ((2046 - exponent) << _EXPONENT).view(torch.float64)

    index = group[:, None].expand_as(columns)
    scaled = columns * scale
    whole = scaled.trunc()
    # What is left of each value gets integers of its own.
    rest = ((scaled - whole) * 2.0**bits).long()
    sums = totals.scatter_add(0, index, whole.long()).double() * unscale
    sums += totals.scatter_add_(0, index, rest).double() * (unscale * 2.0**-bits)
    return sums.to(values.dtype).reshape(count, *shape)
