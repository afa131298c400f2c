"""Voxel -> row, and the 3x3x3 neighbourhood of every voxel.

Coordinates are (N, 4) integers [batch, x, y, z], none negative and no row twice.  Rows are found through one
int64 key per voxel, which holds for grids of 2048^3 and more.
"""

from __future__ import annotations

import torch
from torch import Tensor


def voxel_rows(coords: Tensor, queries: Tensor) -> Tensor:
    """Row of each query in ``coords``.

    coords: (N, 4) int, unique rows. queries: (M, 4) int, any values.
    Returns (M,) int64: the row, or -1 where no voxel is.  Raises ValueError on other shapes or dtypes.
    """
    _check_coords("coords", coords)
    _check_coords("queries", queries)
    if not len(coords) or not len(queries):
        return torch.full((len(queries),), -1, dtype=torch.int64, device=queries.device)
    extent = coords.amax(dim=0).long() + 1
    inside = ((queries >= 0) & (queries < extent)).all(dim=1)
    keys, rows = torch.sort(_keys(coords.long(), extent))
    wanted = _keys(queries.long(), extent)
    found = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
    return torch.where(inside & (keys[found] == wanted), rows[found], -1)


def neighbor_map(coords: Tensor) -> Tensor:
    """Rows of the 27 neighbours of each voxel, itself included.

    coords: (N, 4) int, unique rows.  Returns (N, 27) int32; column 9 * (dx + 1) + 3 * (dy + 1) + (dz + 1) holds
    the row of the voxel at offset (dx, dy, dz) in the same batch item, -1 where there is none.
    """
    _check_coords("coords", coords)
    n = len(coords)
    neighbors = torch.full((n, 27), -1, dtype=torch.int32, device=coords.device)
    if not n:
        return neighbors
    # An empty layer around the grid, so that a step over its border never lands on a voxel.
    shifted = coords.long() + torch.tensor([0, 1, 1, 1], device=coords.device)
    extent = shifted.amax(dim=0) + 2
    keys, rows = torch.sort(_keys(shifted, extent))
    rows = rows.int()
    neighbors[:, 13] = torch.arange(n, dtype=torch.int32, device=coords.device)
    for column in range(14, 27):  # the other 13 are the same pairs seen from the far end
        step = torch.tensor([0, column // 9 - 1, column // 3 % 3 - 1, column % 3 - 1], device=coords.device)
        wanted = keys + _keys(step[None], extent)
        found = torch.searchsorted(keys, wanted).clamp_(max=n - 1)
        hit = keys[found] == wanted
        here, there = rows[hit].long(), rows[found[hit]]
        neighbors[here, column] = there
        neighbors[there.long(), 26 - column] = here.int()
    return neighbors


def _keys(coords: Tensor, extent: Tensor) -> Tensor:
    """One int64 per row of ``coords``, ordered as the rows are."""
    _, nx, ny, nz = extent.tolist()
    batch, x, y, z = coords.unbind(dim=1)
    return ((batch * nx + x) * ny + y) * nz + z


def _check_coords(name: str, coords: Tensor) -> None:
    if coords.ndim != 2 or coords.shape[1] != 4 or coords.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} must be (N, 4) int32 or int64 [batch, x, y, z], but is {tuple(coords.shape)} {coords.dtype}."
        )
