"""Meshes from flexible dual grids.

Each active voxel carries one vertex and, for each axis, a flag: whether the surface crosses the voxel's edge
along that axis. Every crossed edge whose four voxels are all active becomes a quad of their vertices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .lookup import VoxelIndex

# The four voxels around that edge of a voxel along x, y, z which ends in its far corner, in winding order.
_AROUND = (
    ((0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 1, 0)),
    ((0, 0, 0), (1, 0, 0), (1, 0, 1), (0, 0, 1)),
    ((0, 0, 0), (0, 1, 0), (1, 1, 0), (1, 0, 0)),
)
_SPLIT_02 = (0, 1, 2, 0, 2, 3)
_SPLIT_13 = (0, 1, 3, 3, 1, 2)
_EDGES_AT_ONCE = 1 << 20
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

    coords: (N, 3) int, each voxel once. dual_vertices: (N, 3) float, in voxels from the voxel's corner.
    intersected_flag: (N, 3) bool. split_weight: (N, 1) float or None. aabb: [[x0, y0, z0], [x1, y1, z1]].
    voxel_size (length) or grid_size (voxels), as one number or three; of both, voxel_size counts.

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
    if not bool(dual_vertices.isfinite().all()):
        raise ValueError("dual_vertices must be finite, but hold NaN or infinity.")
    if train and split_weight is None:
        raise ValueError("split_weight must be given with train=True.")
    box = torch.as_tensor(aabb, dtype=torch.float32, device=device)
    if box.shape != (2, 3):
        raise ValueError(f"aabb must have shape (2, 3), not {tuple(box.shape)}.")
    size = _voxel_size(box, voxel_size, grid_size)

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
    """The rows (Q, 4) of the voxels around each flagged edge, of those edges where all four exist."""
    voxel, axis = torch.nonzero(intersected, as_tuple=True)
    around = torch.tensor(_AROUND, device=coords.device, dtype=coords.dtype)
    index = VoxelIndex(_with_batch(coords))
    quads = [coords.new_empty((0, 4), dtype=torch.int64)]
    for part, direction in zip(voxel.split(_EDGES_AT_ONCE), axis.split(_EDGES_AT_ONCE), strict=True):
        wanted = (coords[part][:, None] + around[direction]).reshape(-1, 3)
        rows = index.rows(_with_batch(wanted)).view(-1, 4)
        quads.append(rows[(rows >= 0).all(dim=1)])
    return torch.cat(quads)


def _with_batch(coords: Tensor) -> Tensor:
    return torch.nn.functional.pad(coords, (1, 0))


def _voxel_size(box: Tensor, voxel_size: Any, grid_size: Any) -> Tensor:
    if voxel_size is None and grid_size is None:
        raise ValueError("voxel_size or grid_size must be given.")
    name, value = ("grid_size", grid_size) if voxel_size is None else ("voxel_size", voxel_size)
    sizes = torch.as_tensor(value, dtype=torch.float32, device=box.device)
    if sizes.ndim > 1 or sizes.numel() not in (1, 3) or not bool((sizes > 0).all()):
        raise ValueError(f"{name}={value!r} must be one or three positive numbers.")
    sizes = sizes.expand(3)
    return (box[1] - box[0]) / sizes if voxel_size is None else sizes
