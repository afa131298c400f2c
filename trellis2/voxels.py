"""Sparse voxels: where they are (Grid) and what they carry (Voxels).

What can be derived from the coordinates alone is computed once per Grid and kept with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from o_voxel.conv import SEGMENT, ConvPlan, plan_conv
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Grid:
    """Active voxels of a batch. ``coords`` (N, 4) int32 [batch, x, y, z], sorted by batch, no row twice."""

    coords: Tensor

    def __len__(self) -> int:
        return len(self.coords)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Number of voxels of each batch item."""
        if not len(self):
            return ()
        return tuple(torch.bincount(self.coords[:, 0]).tolist())

    @cached_property
    def plan(self) -> ConvPlan:
        """How convolutions go over these voxels."""
        return plan_conv(self.coords)

    def item(self, batch: int) -> slice:
        """Rows of one batch item."""
        start = sum(self.lengths[:batch])
        return slice(start, start + self.lengths[batch])

    def subdivide(self, keep: Tensor) -> Refinement:
        """Split voxels in two along each axis.

        keep: (N, 8) bool, child x + 2y + 4z of each voxel.  Children stand in the order of their parents.
        """
        parent, child = keep.nonzero().unbind(dim=1)
        coords = self.coords[parent]
        coords[:, 1:] = coords[:, 1:] * 2 + _child_offsets(child)
        return Refinement(self, Grid(coords), parent, child)

    @cached_property
    def coarser(self) -> Refinement:
        """The grid of half the resolution that covers this one, its rows in lexicographic order."""
        halved = self.coords.long()
        child = (halved[:, 1:] % 2 * torch.tensor([1, 2, 4], device=halved.device)).sum(dim=1)
        halved[:, 1:] //= 2
        extent = (halved.amax(dim=0) + 1).tolist() if len(self) else [1] * 4
        keys = halved[:, 0]
        for axis in (1, 2, 3):
            keys = keys * extent[axis] + halved[:, axis]
        keys, parent = keys.unique(return_inverse=True)
        columns = []
        for axis in (3, 2, 1):
            columns.append(keys % extent[axis])
            keys = keys // extent[axis]
        coords = torch.stack([keys, *reversed(columns)], dim=1).int()
        return Refinement(Grid(coords), self, parent, child)


@dataclass(frozen=True, eq=False)
class Refinement:
    """One step between two resolutions: fine voxel i is child ``child[i]`` of coarse voxel ``parent[i]``."""

    coarse: Grid
    fine: Grid
    parent: Tensor  # (N fine,) int64
    child: Tensor  # (N fine,) int64, x + 2y + 4z

    def to_fine(self, feats: Tensor, part: slice = slice(None)) -> Tensor:
        """(N coarse, 8 C) -> (N fine, C), or a part of it: each child takes its share of its parent's channels."""
        return _shares(feats)[self.parent[part] * 8 + self.child[part]]

    def children(self, part: slice) -> slice:
        """The rows of ``fine`` that belong to a part of ``coarse``, one of ``layers.parts``.

        Only for a ``Grid.subdivide``, whose children stand in the order of their parents.
        """
        return slice(self._bounds[part.start // SEGMENT], self._bounds[-(-part.stop // SEGMENT)])

    def pick_children(self, feats: Tensor, part: slice) -> Tensor:
        """``to_fine`` of a part of ``coarse`` alone: feats (its rows, 8 C) -> (its children, C)."""
        rows = self.children(part)
        return _shares(feats)[(self.parent[rows] - part.start) * 8 + self.child[rows]]

    @cached_property
    def _bounds(self) -> list[int]:
        """Where in ``fine`` the children of each ``SEGMENT`` of ``coarse`` begin, and the end."""
        starts = torch.arange(0, len(self.coarse) + SEGMENT, SEGMENT, device=self.parent.device)
        return torch.searchsorted(self.parent, starts).tolist()

    def to_coarse(self, feats: Tensor) -> Tensor:
        """(N fine, C) -> (N coarse, 8 C): children side by side, zeros for missing ones."""
        out = feats.new_zeros(len(self.coarse) * 8, feats.shape[1])
        out[self.parent * 8 + self.child] = feats
        return out.reshape(len(self.coarse), -1)


@dataclass(frozen=True, eq=False)
class Voxels:
    """Features on a grid. ``feats`` (N, C)."""

    feats: Tensor
    grid: Grid


def full_grid(resolution: int, batch: int, device: torch.device) -> Grid:
    """All voxels of ``batch`` cubes of ``resolution``^3, z fastest."""
    axes = [torch.arange(n, dtype=torch.int32, device=device) for n in (batch, *[resolution] * 3)]
    return grid_of_lengths(torch.cartesian_prod(*axes), (resolution**3,) * batch)


def grid_of_lengths(coords: Tensor, lengths: tuple[int, ...]) -> Grid:
    """A grid of which is known what ``Grid.lengths`` would ask the device for."""
    grid = Grid(coords)
    grid.__dict__["lengths"] = lengths
    return grid


def _shares(feats: Tensor) -> Tensor:
    """(N, 8 C) -> (8 N, C)"""
    return feats.reshape(8 * len(feats), feats.shape[1] // 8)


def _child_offsets(child: Tensor) -> Tensor:
    return torch.stack([child & 1, child >> 1 & 1, child >> 2], dim=1).int()
