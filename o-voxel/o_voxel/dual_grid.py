"""Meshes from flexible dual grids.

Each active voxel carries one vertex and, for each axis, a flag: whether the surface crosses the voxel's edge
along that axis. Every crossed edge whose four voxels are all active becomes a quad of their vertices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .launch import Int64s, Ints, func, kernel, launch, shared, wp
from .lookup import first_not_below

_MOST = 1 << 20  # voxels along an axis: three of them fit one int64 key
_SPLIT_02 = (0, 1, 2, 0, 2, 3)
_SPLIT_13 = (0, 1, 3, 3, 1, 2)
_SPLIT_CENTRE = (0, 1, 4, 1, 2, 4, 2, 3, 4, 3, 0, 4)


def flexible_dual_grid_to_mesh(
    coords: Tensor,
    dual_vertices: Tensor,
    intersected_flag: Tensor,
    split_weight: Tensor | None,
    aabb: Any,
    voxel_size: Any = None,
    grid_size: Any = None,
    train: bool = False,
) -> tuple[Tensor, Tensor]:
    """Extract the mesh of a flexible dual grid (o_voxel.convert.flexible_dual_grid_to_mesh of TRELLIS.2).

    coords: (N, 3) int32 or int64, each voxel of the grid once. dual_vertices: (N, 3) float, in voxels from the
    voxel's corner. intersected_flag: (N, 3) bool. split_weight: (N, 1) float or None. aabb: [[x0, y0, z0],
    [x1, y1, z1]]. voxel_size (length) or grid_size (voxels), as one number or three; of both, voxel_size counts.

    A quad is cut along the diagonal whose ends have the greater product of weights; without weights along the
    diagonal 0-2, unless triangle 0-1-2 has no area. ``train`` adds a vertex in the middle of each quad, the
    weighted mean of both diagonals' midpoints, and makes four triangles; there gradients flow to
    ``dual_vertices`` and ``split_weight``.
    Quads come in the order of the flags, row by row; triangles are (F, 3) int32, or int64 with ``train``.
    Returns (vertices (N or N + quads, 3) float32, faces (F, 3)). Raises ValueError naming the argument.
    """
    count, device = len(coords), coords.device
    for name, value, width in (
        ("coords", coords, 3),
        ("dual_vertices", dual_vertices, 3),
        ("intersected_flag", intersected_flag, 3),
        ("split_weight", split_weight, 1),
    ):
        if value is not None and value.shape != (count, width):
            raise ValueError(f"{name} must have shape ({count}, {width}), not {tuple(value.shape)}.")
    for name, value in (("dual_vertices", dual_vertices), ("split_weight", split_weight)):
        if value is not None and not bool(value.isfinite().all()):
            raise ValueError(f"{name} must be finite, but hold NaN or infinity.")
    if train and split_weight is None:
        raise ValueError("split_weight must be given with train=True.")
    box = torch.as_tensor(aabb, dtype=torch.float32, device=device)
    if box.shape != (2, 3):
        raise ValueError(f"aabb must have shape (2, 3), not {tuple(box.shape)}.")
    if not bool((box.isfinite() & (box[1] > box[0])).all()):
        raise ValueError("aabb must be two finite corners, the second greater along every axis.")
    size = _voxel_size(box, voxel_size, grid_size)
    _check_coords(coords, grid_size if voxel_size is None else None)

    vertices = (coords.float() + dual_vertices.float()) * size + box[0]
    quads = _quads(coords, intersected_flag.bool())
    if train:
        assert split_weight is not None
        weights = split_weight[quads]
        along_02, along_13 = weights[:, 0] * weights[:, 2], weights[:, 1] * weights[:, 3]
        corners = vertices[quads]
        middle_02, middle_13 = (corners[:, 0] + corners[:, 2]) / 2, (corners[:, 1] + corners[:, 3]) / 2
        centres = (along_02 * middle_02 + along_13 * middle_13) / (along_02 + along_13)
        centre_rows = torch.arange(count, count + len(quads), device=device)[:, None]
        fans = torch.cat([quads, centre_rows], dim=1)[:, _SPLIT_CENTRE]
        return torch.cat([vertices, centres]), fans.reshape(-1, 3)

    if split_weight is None:
        a, b, c = vertices[quads[:, :3]].unbind(1)
        split_02 = (torch.linalg.cross(b - a, c - a) ** 2).sum(-1, keepdim=True) > 0
    else:
        weights = split_weight[quads]
        split_02 = weights[:, 0] * weights[:, 2] > weights[:, 1] * weights[:, 3]
    faces = torch.where(split_02, quads[:, _SPLIT_02], quads[:, _SPLIT_13])
    return vertices, faces.reshape(-1, 3).int()


def _quads(coords: Tensor, intersected: Tensor) -> Tensor:
    """The rows (Q, 4) of the voxels around each flagged edge, in winding order, where all four exist."""
    voxel, axis = (part.int() for part in torch.nonzero(intersected, as_tuple=True))
    quads = torch.full((len(voxel), 4), -1, dtype=torch.int32, device=coords.device)
    if not len(voxel):
        return quads.long()
    # An empty layer behind the grid, so that a step over its border never lands on a voxel.
    _, height, depth = (coords.amax(dim=0).long() + 2).tolist()
    x, y, z = coords.long().unbind(dim=1)
    keys, rows = torch.sort((x * height + y) * depth + z)
    places = torch.empty_like(rows, dtype=torch.int32)
    places[rows] = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    arguments = [
        shared(keys, wp.int64),
        shared(rows.int(), wp.int32),
        len(keys),
        shared(places, wp.int32),
        height * depth,
        depth,
        shared(voxel, wp.int32),
        shared(axis, wp.int32),
        shared(quads.view(-1), wp.int32),
    ]
    launch(_find_quads, len(voxel), arguments, coords.device)
    return quads[(quads >= 0).all(dim=1)].long()


@func
def _row_at(keys: Int64s, rows: Ints, count: int, place: int, wanted: wp.int64) -> int:
    """The row of the voxel at a place in the order of the keys, -1 unless that is the wanted one."""
    at = wp.min(place, count - 1)
    if keys[at] == wanted:
        return rows[at]
    return -1


@kernel
def _find_quads(
    first: int,
    keys: Int64s,
    rows: Ints,
    count: int,
    places: Ints,
    step_x: wp.int64,
    step_y: wp.int64,
    voxel: Ints,
    axis: Ints,
    quads: Ints,
) -> None:
    i = first + wp.tid()
    row = voxel[i]
    place = places[row]
    key = keys[place]
    # Neighbours along z have keys in a row: one search finds both.
    near, far, across = step_x, wp.int64(1), step_x + wp.int64(1)
    if axis[i] == 0:
        near = step_y
        across = step_y + wp.int64(1)
    if axis[i] == 2:
        far = step_y
        across = step_x + step_y
    near_place = first_not_below(keys, place + 1, count, key + near)
    far_place = int(place + 1)
    across_place = int(near_place + 1)
    if axis[i] == 2:
        far_place = first_not_below(keys, place + 1, near_place, key + far)
        across_place = first_not_below(keys, near_place, count, key + across)
    else:
        if keys[wp.min(near_place, count - 1)] != key + near:
            across_place = near_place
    near_row = _row_at(keys, rows, count, near_place, key + near)
    far_row = _row_at(keys, rows, count, far_place, key + far)
    quads[4 * i] = row
    quads[4 * i + 2] = _row_at(keys, rows, count, across_place, key + across)
    # Seen along x and z the far one comes first, along y the near one.
    if axis[i] == 1:
        quads[4 * i + 1] = near_row
        quads[4 * i + 3] = far_row
    else:
        quads[4 * i + 1] = far_row
        quads[4 * i + 3] = near_row


def _voxel_size(box: Tensor, voxel_size: Any, grid_size: Any) -> Tensor:
    if voxel_size is None and grid_size is None:
        raise ValueError("voxel_size or grid_size must be given.")
    name, value = ("grid_size", grid_size) if voxel_size is None else ("voxel_size", voxel_size)
    sizes = torch.as_tensor(value, dtype=torch.float32, device=box.device)
    if sizes.ndim > 1 or sizes.numel() not in (1, 3) or not bool(((sizes > 0) & sizes.isfinite()).all()):
        raise ValueError(f"{name}={value!r} must be one or three positive numbers.")
    sizes = sizes.expand(3)
    return (box[1] - box[0]) / sizes if voxel_size is None else sizes


def _check_coords(coords: Tensor, grid_size: Any) -> None:
    """Raise ValueError unless they are integers from 0 up, within the grid where its size is given."""
    if coords.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"coords must be int32 or int64, not {coords.dtype}.")
    if not len(coords):
        return
    least, greatest = (extreme.tolist() for extreme in coords.aminmax(dim=0))
    if min(least) < 0 or max(greatest) >= _MOST:
        raise ValueError(f"coords must be from 0 to {_MOST - 1}, but reach from {min(least)} to {max(greatest)}.")
    if grid_size is not None:
        limits = torch.as_tensor(grid_size).expand(3).tolist()
        if any(value >= limit for value, limit in zip(greatest, limits, strict=True)):
            raise ValueError(f"coords must be below grid_size {limits}, but reach {greatest}.")
