"""Submanifold sparse convolution (Graham and van der Maaten 2017): outputs only where inputs are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .lookup import neighbor_map

SEGMENT = 1 << 17
"""Rows that ``ConvPlan`` keeps together; parts of a convolution begin at multiples of it."""
TILE = 128  # rows that one block of the GPU computes

# Up to this many channels a CPU is faster when it gathers all neighbours first and multiplies once.
_GATHER_CHANNELS = 64
_GATHER_ROWS = 4096


@dataclass(frozen=True, eq=False)
class ConvPlan:
    """Which rows a 3x3x3 convolution multiplies with which part of its kernel; made once for a grid.

    neighbors: (27, N) int32 as from ``lookup.neighbor_map``, on a GPU with its columns in the order of ``order``.
    On a GPU alone (after the implicit GEMM of Tang et al., TorchSparse++, 2023):
    order: (N,) int32, the rows sorted by which neighbours they have, inside segments of ``SEGMENT`` rows.
    taps: (tiles, 27) int32, for each ``TILE`` of that order the parts of the kernel that any of its rows needs.
    tap_counts: (tiles,) int32, how many those are.
    """

    neighbors: Tensor
    order: Tensor | None = None
    taps: Tensor | None = None
    tap_counts: Tensor | None = None


def plan_conv(coords: Tensor) -> ConvPlan:
    """Plan convolutions over the voxels ``coords`` (N, 4) int [batch, x, y, z], no row twice."""
    neighbors = neighbor_map(coords)
    return _sorted_plan(neighbors) if coords.is_cuda else ConvPlan(neighbors)


def submanifold_conv3d(
    feats: Tensor, plan: ConvPlan, weight: Tensor, bias: Tensor, first: int = 0, last: int | None = None
) -> Tensor:
    """3x3x3 convolution over active voxels; missing neighbours count as zero.

    feats: (N, Ci). plan: of the N voxels. weight: (Co, 3, 3, 3, Ci), kernel axes x, y, z. bias: (Co,).
    first, last: compute only these rows; ``first`` and ``last`` are multiples of SEGMENT, or ``last`` is the end.
    On a GPU sums are float32 and have one order, whatever rows are asked for.
    Returns (last - first, Co) in the dtype of ``feats``.  Raises ValueError on arguments that do not fit.
    """
    count = len(feats)
    last = count if last is None else last
    _check(feats, plan, weight, bias)
    if not 0 <= first <= last <= count or first % SEGMENT or (last % SEGMENT and last != count):
        raise ValueError(f"first={first} and last={last} must be multiples of {SEGMENT} in 0..{count}, or the end.")
    if feats.is_cuda:
        from .conv_triton import Convolution  # Triton comes with torch for CUDA only

        out: Tensor = Convolution.apply(feats, plan, weight, bias, first, last)
        return out
    if feats.shape[1] <= _GATHER_CHANNELS:
        return _convolve_gathered(feats, plan.neighbors[:, first:last], weight, bias)
    return _convolve_by_tap(feats, plan.neighbors[:, first:last], weight, bias, first)


def submanifold_conv3d_reference(feats: Tensor, neighbors: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same from ``neighbor_map``'s (27, N) rows, by gathering all of every voxel at once: the definition."""
    padded = torch.cat([feats, feats.new_zeros(1, feats.shape[1])])  # row -1 is empty space
    return torch.einsum("kni,oki->no", padded[neighbors.long()], weight.flatten(1, 3)) + bias


def _sorted_plan(neighbors: Tensor) -> ConvPlan:
    """The plan for a GPU.  Takes ``neighbors`` (27, N) as its own."""
    count = neighbors.shape[1]
    key = torch.arange(count, device=neighbors.device) // SEGMENT
    for row in neighbors:
        key = key * 2 + (row >= 0)
    order = torch.argsort(key, stable=True)
    for row in neighbors:  # one at a time, to need little memory
        row.copy_(row[order])
    tiles = -(-count // TILE)
    needed = torch.zeros((27, tiles * TILE), dtype=torch.bool, device=neighbors.device)
    needed[:, :count] = neighbors >= 0
    needed = needed.view(27, tiles, TILE).any(dim=2).T
    taps = torch.argsort(needed.to(torch.int8), dim=1, descending=True, stable=True)
    return ConvPlan(neighbors, order.int(), taps.int().contiguous(), needed.sum(dim=1, dtype=torch.int32))


def _convolve_gathered(feats: Tensor, neighbors: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    padded = torch.cat([feats, feats.new_zeros(1, feats.shape[1])])
    kernel = weight.flatten(1).T.contiguous()  # (27 Ci, Co)
    out = []
    for columns in neighbors.split(_GATHER_ROWS, dim=1):
        rows = torch.where(columns < 0, len(feats), columns).T
        gathered = padded.index_select(0, rows.reshape(-1)).view(len(rows), len(kernel))
        out.append(torch.addmm(bias, gathered, kernel))
    return torch.cat(out)


def _convolve_by_tap(feats: Tensor, neighbors: Tensor, weight: Tensor, bias: Tensor, first: int) -> Tensor:
    kernel = weight.flatten(1, 3).permute(1, 2, 0)  # (27, Ci, Co)
    out = torch.addmm(bias, feats[first : first + neighbors.shape[1]], kernel[13])
    for tap, row in enumerate(neighbors):
        if tap != 13:
            hit = (row >= 0).nonzero().squeeze(1)
            out[hit] += feats[row[hit].long()] @ kernel[tap]
    return out


def _check(feats: Tensor, plan: ConvPlan, weight: Tensor, bias: Tensor) -> None:
    if feats.ndim != 2:
        raise ValueError(f"feats must be (N, Ci), but is {tuple(feats.shape)}.")
    if plan.neighbors.shape != (27, len(feats)):
        raise ValueError(f"plan must be of {len(feats)} voxels, but is of {plan.neighbors.shape[-1]}.")
    if weight.ndim != 5 or weight.shape[1:] != (3, 3, 3, feats.shape[1]):
        raise ValueError(f"weight must be (Co, 3, 3, 3, {feats.shape[1]}), but is {tuple(weight.shape)}.")
    if bias.shape != (len(weight),):
        raise ValueError(f"bias must be ({len(weight)},), but is {tuple(bias.shape)}.")
