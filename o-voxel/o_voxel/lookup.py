"""Voxel -> row, and the 3x3x3 neighbourhood of every voxel.

Coordinates are (N, 4) integers [batch, x, y, z], none negative and no row twice.  Rows are found through one
int64 key per voxel, which holds for grids of 2048^3 and more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import Int64s, IntRows, Vec4l, Vec4ls, func, kernel, launch, shared, wp


def voxel_rows(coords: Tensor, queries: Tensor) -> Tensor:
    """Row of each query in ``coords``.

    coords: (N, 4) int, unique rows. queries: (M, 4) int, any values.
    Returns (M,) int64: the row, or -1 where no voxel is.  Raises ValueError on other shapes or dtypes.
    """
    return VoxelIndex(coords).rows(queries)


class VoxelIndex:
    """Voxels sorted once to be looked up many times.  Arguments and errors as for ``voxel_rows``."""

    def __init__(self, coords: Tensor) -> None:
        _check_coords("coords", coords)
        self._count = len(coords)
        self._extent = (coords.amax(dim=0) + 1).tolist() if len(coords) else [0] * 4
        self._keys, self._rows = torch.sort(_keys(coords.long(), self._extent))

    def rows(self, queries: Tensor) -> Tensor:
        """(M,) int64 rows of ``queries`` (M, 4), -1 where no voxel is."""
        _check_coords("queries", queries)
        found = torch.full((len(queries),), -1, dtype=torch.int64, device=queries.device)
        if not self._count:
            return found
        arguments = [
            shared(self._keys, wp.int64),
            shared(self._rows, wp.int64),
            self._count,
            Vec4l(*self._extent),
            shared(queries.long().contiguous(), Vec4l),
            shared(found, wp.int64),
        ]
        launch(_find_rows, len(queries), arguments, queries.device)
        return found


def neighbor_map(coords: Tensor) -> Tensor:
    """Rows of the 27 neighbours of each voxel, itself included.

    coords: (N, 4) int, unique rows.  Returns (27, N) int32; row 9 * (dx + 1) + 3 * (dy + 1) + (dz + 1) holds
    the rows of the voxels at offset (dx, dy, dz) in the same batch item, -1 where there is none.
    """
    _check_coords("coords", coords)
    n = len(coords)
    neighbors = torch.empty((27, n), dtype=torch.int32, device=coords.device)
    if not n:
        return neighbors
    # An empty layer around the grid, so that a step over its border never lands on a voxel.
    shifted = coords.long() + torch.tensor([0, 1, 1, 1], device=coords.device)
    extent = (shifted.amax(dim=0) + 2).tolist()
    keys, rows = torch.sort(_keys(shifted, extent))
    steps = extent[2] * extent[3], extent[3]
    arguments = [shared(keys, wp.int64), shared(rows, wp.int64), n, *steps, shared(neighbors, wp.int32)]
    launch(_find_neighbors, n, arguments, coords.device)
    return neighbors


def _keys(coords: Tensor, extent: list[int]) -> Tensor:
    """One int64 per row of ``coords`` int64, ordered as the rows are."""
    batch, x, y, z = coords.unbind(dim=1)
    return ((batch * extent[1] + x) * extent[2] + y) * extent[3] + z


def _check_coords(name: str, coords: Tensor) -> None:
    if coords.ndim != 2 or coords.shape[1] != 4 or coords.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} must be (N, 4) int32 or int64 [batch, x, y, z], but is {tuple(coords.shape)} {coords.dtype}."
        )


@func
def first_not_below(keys: Int64s, begin: int, end: int, wanted: wp.int64) -> int:
    """The first of the ascending keys[begin:end] that is not below ``wanted``, ``end`` if all are."""
    low = int(begin)
    high = int(end)
    while low < high:
        middle = (low + high) // 2
        if keys[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low


@kernel
def _find_rows(
    first: int, keys: Int64s, rows: Int64s, count: int, extent: Vec4l, queries: Vec4ls, found: Int64s
) -> None:
    i = first + wp.tid()
    q = queries[i]
    for axis in range(4):
        if q[axis] < wp.int64(0) or q[axis] >= extent[axis]:
            return
    wanted = ((q[0] * extent[1] + q[1]) * extent[2] + q[2]) * extent[3] + q[3]
    j = wp.min(first_not_below(keys, 0, count, wanted), count - 1)
    if keys[j] == wanted:
        found[i] = rows[j]


@kernel
def _find_neighbors(
    first: int, keys: Int64s, rows: Int64s, count: int, step_x: wp.int64, step_y: wp.int64, neighbors: IntRows
) -> None:
    i = first + wp.tid()
    row = int(rows[i])
    for line in range(9):
        # Neighbours along z have keys in a row: one search finds all three.
        wanted = keys[i] + wp.int64(line // 3 - 1) * step_x + wp.int64(line % 3 - 1) * step_y - wp.int64(1)
        j = first_not_below(keys, 0, count, wanted)
        for dz in range(3):
            found = wp.int32(-1)
            if keys[wp.min(j, count - 1)] == wanted:
                found = int(rows[j])
                j += 1
            neighbors[line * 3 + dz, row] = found
            wanted += wp.int64(1)
