"""Submanifold sparse convolution (Graham and van der Maaten 2017): outputs only where inputs are."""

from __future__ import annotations

import torch
from torch import Tensor


def submanifold_conv3d(feats: Tensor, neighbors: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """3x3x3 convolution over active voxels; missing neighbours count as zero.

    feats: (N, Ci). neighbors: (N, 27) int32 from ``lookup.neighbor_map``. weight: (Co, 3, 3, 3, Ci), kernel axes
    x, y, z. bias: (Co,).  Returns (N, Co) in the dtype of ``feats``.  Raises ValueError on shapes that do not fit.
    """
    _check(feats, neighbors, weight, bias)
    kernel = weight.flatten(1, 3).permute(1, 2, 0)  # (27, Ci, Co)
    out = torch.addmm(bias, feats, kernel[13])
    for column in range(27):
        if column != 13:
            rows = (neighbors[:, column] >= 0).nonzero().squeeze(1)
            # A column names each output row at most once, so this sum has one order on every device.
            out[rows] += feats[neighbors[rows, column].long()] @ kernel[column]
    return out


def submanifold_conv3d_reference(feats: Tensor, neighbors: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same by gathering all 27 neighbours of every voxel at once: the definition, 27 times the memory."""
    padded = torch.cat([feats, feats.new_zeros(1, feats.shape[1])])  # row -1 is empty space
    return torch.einsum("nki,oki->no", padded[neighbors.long()], weight.flatten(1, 3)) + bias


def _check(feats: Tensor, neighbors: Tensor, weight: Tensor, bias: Tensor) -> None:
    if feats.ndim != 2:
        raise ValueError(f"feats must be (N, Ci), but is {tuple(feats.shape)}.")
    if neighbors.shape != (len(feats), 27):
        raise ValueError(f"neighbors must be ({len(feats)}, 27), but is {tuple(neighbors.shape)}.")
    if weight.ndim != 5 or weight.shape[1:] != (3, 3, 3, feats.shape[1]):
        raise ValueError(f"weight must be (Co, 3, 3, 3, {feats.shape[1]}), but is {tuple(weight.shape)}.")
    if bias.shape != (len(weight),):
        raise ValueError(f"bias must be ({len(weight)},), but is {tuple(bias.shape)}.")
