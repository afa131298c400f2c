"""A new mesh around a surface: the shell at a small distance from it, drawn back towards it.

Whatever the surface is made of (open sheets, loose faces, pieces that cross each other), the shell is closed and has
an inside; edges of four faces occur where a voxel holds two of its sheets.  It is the level set of the distance to the
surface, by dual contouring on voxels near it (Ju et al. 2002, with the mean of the crossings for a vertex).  Both sides
of the surface get a sheet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .closest import Surface
from .dual_grid import _quads

_COARSEST = 32  # cells along the longest side, to begin with
_HALF_DIAGONAL = 0.8661  # of a cell; the level set leaves no cell whose centre is farther from it than that
_AT_ONCE = 1 << 22
# Cells by which the shell is farther out: a flat side on the grid would put it just through corners of voxels, which
# rounding then calls inside or outside at random.
_OFF_GRID = 1e-3
# Corner k of a voxel is at (k & 1, k >> 1 & 1, k >> 2): twelve edges, and the three that end in the far corner.
_CORNERS = [(k & 1, k >> 1 & 1, k >> 2) for k in range(8)]
_EDGES = [(k, k | bit) for bit in (1, 2, 4) for k in range(8) if not k & bit]
_FAR_EDGES = (6, 5, 3)


def remesh_narrow_band(
    vertices: Tensor, faces: Tensor, *, cell: float, anchor: Tensor, band: float = 1.0, project: float = 0.9
) -> tuple[Tensor, Tensor]:
    """The surface's shell at a distance of ``band`` cells, wound outwards.

    vertices: (V, 3) float. faces: (F, 3) int, F > 0. cell: side of a voxel. anchor: (3,), a corner of the voxels.
    band: below 1, the shell may have gaps where no corner of a voxel lies in it. project: how far the vertices move
    back to the closest point of the surface, 0 not at all, 1 onto it.
    Returns (vertices (V2, 3) float32, faces (F2, 3) int32), perhaps none.  Raises ValueError naming the argument.
    """
    if not 0 < cell < float("inf") or not 0 < band < float("inf") or not 0 <= project <= 1:
        raise ValueError(f"cell={cell} and band={band} must be positive, project={project} between 0 and 1.")
    surface = Surface(vertices, faces)
    device, offset = vertices.device, (band + _OFF_GRID) * cell
    used = vertices[faces.long()].reshape(-1, 3).float()
    anchor = anchor.to(device, torch.float32)
    low = ((used.amin(0) - offset - anchor) / cell).floor() - 1
    extent = ((used.amax(0) + offset - anchor) / cell).ceil() + 1 - low
    corner = anchor + low * cell

    coords = _near_cells(surface, corner, extent.long(), cell, offset)
    places, rows = _shared_corners(coords)
    value = torch.cat([_distance(surface, part, corner, cell) - offset for part in places.split(_AT_ONCE)])
    inside = value < 0
    mixed = inside[rows].any(1) & ~inside[rows].all(1)
    coords, rows = coords[mixed], rows[mixed]
    if not len(coords):
        return torch.zeros((0, 3), device=device), torch.zeros((0, 3), dtype=torch.int32, device=device)
    dual = torch.cat([_dual_vertices(value[part]) for part in rows.split(_AT_ONCE // 8)])
    start, end = inside[rows[:, list(_FAR_EDGES)]], inside[rows[:, 7:]]
    quads = torch.cat([_quads(coords, start & ~end).flip(1), _quads(coords, ~start & end)])

    shell = corner + (coords + dual) * cell
    shell = torch.cat([p + project * (surface.closest(p).points - p) for p in shell.split(_AT_ONCE)])
    a, b, c, d = shell[quads].unbind(1)
    along_ac = ((a - c).norm(dim=1) <= (b - d).norm(dim=1))[:, None]
    triangles = torch.where(along_ac, quads[:, [0, 1, 2, 0, 2, 3]], quads[:, [0, 1, 3, 3, 1, 2]])
    return shell, triangles.reshape(-1, 3).int()


def _distance(surface: Surface, places: Tensor, corner: Tensor, cell: float) -> Tensor:
    return surface.closest(corner + places * cell).distance


def _near_cells(surface: Surface, corner: Tensor, extent: Tensor, cell: float, offset: float) -> Tensor:
    """(N, 3) int64: every voxel that the level set may pass, found from coarse to fine."""
    size = 1
    while int(extent.max()) > _COARSEST * size:
        size *= 2
    coarse = [torch.arange(-(-int(n) // size), device=corner.device) for n in extent]
    coords = torch.cartesian_prod(*coarse)
    children = torch.tensor(_CORNERS, device=corner.device)
    while True:
        reach = _HALF_DIAGONAL * size * cell
        near = [
            part[(_distance(surface, (part + 0.5) * size, corner, cell) - offset).abs() <= reach]
            for part in coords.split(_AT_ONCE)
        ]
        coords = torch.cat(near)
        if size == 1:
            return coords
        size //= 2
        coords = (2 * coords[:, None] + children).reshape(-1, 3)


def _shared_corners(coords: Tensor) -> tuple[Tensor, Tensor]:
    """(P, 3) corners of the voxels, each once, and (N, 8) the rows of every voxel's."""
    corners = coords[:, None] + torch.tensor(_CORNERS, device=coords.device)
    _, height, depth = (int(n) + 2 for n in coords.amax(0)) if len(coords) else (1, 1, 1)
    keys, rows = torch.unique(
        (corners[..., 0] * height + corners[..., 1]) * depth + corners[..., 2], return_inverse=True
    )
    return torch.stack([keys // (height * depth), keys // depth % height, keys % depth], 1), rows


def _dual_vertices(value: Tensor) -> Tensor:
    """(N, 3) in [0, 1]: the mean of the points where the level set crosses a voxel's edges. value: (N, 8)."""
    corners = torch.tensor(_CORNERS, dtype=torch.float32, device=value.device)
    first, second = torch.tensor(_EDGES, device=value.device).T
    one, other = value[:, first], value[:, second]
    crossed = (one < 0) != (other < 0)
    part = torch.where(crossed, one / torch.where(crossed, one - other, 1.0), 0.0)
    points = corners[first] + part[:, :, None] * (corners[second] - corners[first])
    return (points * crossed[:, :, None]).sum(1) / crossed.sum(1, keepdim=True)
