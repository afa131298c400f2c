"""Meshes to flexible dual grids.

A voxel is active where the surface crosses one of its twelve edges.  Its vertex minimises a quadratic error within the
voxel: the squared distances to the planes of the triangles that cross its edges or touch it, to the lines of the open
borders in it, and, as a regularisation, to the crossing points themselves (dual contouring of Hermite data, Ju et al.
2002, with the terms of Trellis.2's O-Voxel).
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ._native import Native, library
from .checks import check_mesh

MAX_GRID = 1 << 20  # voxels along an axis: three of them fit one int64 key
# Where nothing else holds a vertex in some direction, this much of the regularisation does.
_LEAST_REGULARIZATION = 1e-6
_FAR = float(1 << 24)  # voxels from the grid's corner; beyond, float32 does not tell one from the next
_CHECKED = 1 << 16  # triangles looked at before the next ones are
_CHUNK = 1 << 21  # columns of voxels tested at a time
_SYMMETRIC = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))


@dataclass(frozen=True)
class Grid:
    """box: (2, 3) float32 corners. size: (3,) float32 of a voxel. shape: voxels along x, y, z."""

    box: Tensor
    size: Tensor
    shape: tuple[int, int, int]

    def keys(self, voxels: Tensor) -> Tensor:
        """One int64 per row of (N, 3) voxels of this grid, ordered as the rows are."""
        x, y, z = voxels.unbind(-1)
        return (x * self.shape[1] + y) * self.shape[2] + z

    def voxels(self, keys: Tensor) -> Tensor:
        plane = self.shape[1] * self.shape[2]
        return torch.stack([keys // plane, keys % plane // self.shape[2], keys % self.shape[2]], dim=-1)

    def contains(self, voxels: Tensor) -> Tensor:
        return ((voxels >= 0) & (voxels < torch.tensor(self.shape, device=voxels.device))).all(dim=-1)

    def far_side(self, cells: Tensor, axis: int | slice) -> Tensor:
        """Where cells end along an axis, rounded to float32 (voxels are told apart by these very numbers)."""
        return ((cells + 1).float() * self.size[axis]).double()

    def cells(self, positions: Tensor, axis: int) -> Tensor:
        """The cells of float64 positions along an axis, those outside moved to the first or last."""
        return (positions / self.size[axis].double()).trunc().clamp(0, self.shape[axis] - 1).long()


def mesh_to_flexible_dual_grid(
    vertices: Tensor,
    faces: Tensor,
    voxel_size: Any = None,
    grid_size: Any = None,
    aabb: Any = None,
    face_weight: float = 1.0,
    boundary_weight: float = 1.0,
    regularization_weight: float = 0.1,
    timing: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn a mesh into a flexible dual grid (o_voxel.convert.mesh_to_flexible_dual_grid of TRELLIS.2).

    vertices: (V, 3) float. faces: (F, 3) int; they may be open, non-manifold and intersect, and those without an area
    count for nothing. voxel_size (length) or grid_size (voxels, up to 2^20): one number or three. aabb: [[x0, y0, z0],
    [x1, y1, z1]]; without it, the bounds of the mesh and a margin. What lies outside is cut off.
    face_weight, boundary_weight, regularization_weight: of the triangles that touch a voxel, of open borders, and of
    the crossing points, against 1 for each crossing triangle's plane. timing: write the seconds taken to stdout.

    Returns (coords (N, 3) int32 in ascending order, dual_vertices (N, 3) float32 in the mesh's units from aabb[0],
    intersected (N, 3) bool: whether the surface crosses that edge along x, y, z which ends in the voxel's far corner).
    They are on the device of ``vertices``.  Raises ValueError naming the argument.
    """
    start = time.perf_counter()
    vertices = vertices.float()
    check_mesh(vertices, faces)
    for name, weight in (
        ("face_weight", face_weight),
        ("boundary_weight", boundary_weight),
        ("regularization_weight", regularization_weight),
    ):
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{name}={weight!r} must be a finite number of at least 0.")
    if not len(faces):
        raise ValueError("faces must hold at least one triangle.")
    faces = faces.long()
    corners = vertices[faces]
    extremes = bounds(corners)
    grid = make_grid(extremes, voxel_size, grid_size, aabb)
    corners -= grid.box[0]
    check_triangles(corners, extremes, grid)
    weights = (float(face_weight), float(boundary_weight), max(float(regularization_weight), _LEAST_REGULARIZATION))
    native = None if corners.is_cuda else library()
    if native is None:
        result = dual_grid_reference(corners, faces, grid, *weights)
    else:
        result = dual_grid_compiled(native, corners, faces, grid, *weights)
    if timing:
        if corners.is_cuda:
            torch.cuda.synchronize(corners.device)
        sys.stdout.write(f"mesh_to_flexible_dual_grid took {time.perf_counter() - start:.3f} s\n")
    return result


def make_grid(extremes: Tensor, voxel_size: Any, grid_size: Any, aabb: Any) -> Grid:
    """The grid that the arguments of the same names describe; bounds: (2, 3) of the mesh.  Raises ValueError."""
    if voxel_size is None and grid_size is None:
        raise ValueError("voxel_size or grid_size must be given.")
    device = extremes.device
    size = None if voxel_size is None else _three("voxel_size", voxel_size).to(device, torch.float32)
    shape = None
    if grid_size is not None:
        shape = _three("grid_size", grid_size).to(device)
        if bool((shape != shape.round()).any()):
            raise ValueError(f"grid_size={grid_size!r} must be whole numbers.")
    if aabb is None:
        low, high = extremes
        extent = high - low
        if size is not None:
            margin = torch.ceil(extent / size) * size - extent
            low, high = low - margin * 0.5, high + margin * 0.5
        if shape is not None:
            margin = (high - low) / (shape - 1).float()
            low, high = low - margin * 0.5, high + margin * 0.5
        box = torch.stack([low, high])
        remedy = "The mesh is flat, or grid_size is 1; give aabb."
    else:
        box = torch.as_tensor(aabb).to(device, torch.float32)
        if box.shape != (2, 3):
            raise ValueError(f"aabb must have shape (2, 3), not {tuple(box.shape)}.")
        remedy = "aabb must be two finite corners, the second greater along every axis."
    if not bool(box.isfinite().all()) or not bool((box[1] > box[0]).all()):
        raise ValueError(remedy)
    if size is None:
        assert shape is not None
        size = (box[1] - box[0]) / shape.float()
    if shape is None:
        shape = ((box[1] - box[0]) / size).round()
    if not bool((shape >= 1).all()) or not bool((shape <= MAX_GRID).all()):
        raise ValueError(f"The grid would have {shape.tolist()} voxels; it must have 1 to {MAX_GRID} along each axis.")
    x, y, z = (int(n) for n in shape.tolist())
    return Grid(box, size.contiguous(), (x, y, z))


def bounds(corners: Tensor) -> Tensor:
    """(2, 3) least and greatest coordinates of (F, 3, 3) triangles."""
    return torch.stack(corners.reshape(-1, 3).aminmax(dim=0))


def check_triangles(corners: Tensor, extremes: Tensor, grid: Grid) -> None:
    """Raise ValueError unless some triangle has an area and some lies in the grid, and none far from it.

    corners: (F, 3, 3) from the grid's first corner. extremes: (2, 3), the bounds of the mesh.
    """
    if bool(((extremes - grid.box[0]).abs() > _FAR * grid.size).any()):
        raise ValueError(f"vertices must lie within {_FAR:.0f} voxels of aabb.")
    end = torch.tensor(grid.shape, device=corners.device) * grid.size
    chunks = corners.split(_CHECKED)
    if all(bool(((c.amax(dim=1) < 0) | (c.amin(dim=1) > end)).any(dim=1).all()) for c in chunks):
        raise ValueError("aabb must hold some of the mesh, but every triangle lies outside of it.")
    if not any(bool((unit_normals(chunk) != 0).any()) for chunk in chunks):
        raise ValueError("faces must hold a triangle with an area, but all are degenerate.")


def dual_grid_compiled(
    native: Native,
    corners: Tensor,
    faces: Tensor,
    grid: Grid,
    face_weight: float,
    boundary_weight: float,
    regularization: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dual_grid_reference by the compiled op, on a CPU."""
    start = end = corners[:0, 0]
    if boundary_weight > 0:
        start, end = open_edges(corners, faces, native.open_sides(faces))
    return native.dual_grid(corners, start, end, grid.size, grid.shape, face_weight, boundary_weight, regularization)


def dual_grid_reference(
    corners: Tensor, faces: Tensor, grid: Grid, face_weight: float, boundary_weight: float, regularization: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole of mesh_to_flexible_dual_grid in torch; corners: (F, 3, 3) float32 from the grid's first corner."""
    normals = unit_normals(corners).double()
    planes = _plane_terms(normals, corners[:, 0].double())

    # Crossings of one edge are summed first: its four voxels all take the same sum.
    edges, edge_sums = [], []
    for axis in range(3):
        triangle, voxel, point = crossings(corners, axis, grid)
        keys, order = torch.sort(grid.keys(voxel), stable=True)
        keys, counts = torch.unique_consecutive(keys, return_counts=True)
        terms = torch.cat([planes[triangle], point, torch.ones_like(point[:, :1])], dim=1)
        edges.append(keys)
        edge_sums.append(segment_sum(terms[order], counts))
    steps = [around(axis, corners.device) for axis in range(3)]
    keys = torch.cat([grid.keys(grid.voxels(edges[axis])[:, None] + steps[axis]).flatten() for axis in range(3)])
    keys = torch.unique(keys)
    coords = grid.voxels(keys)

    sums = torch.zeros((len(keys), 13), dtype=torch.float64, device=corners.device)
    intersected = torch.zeros((len(keys), 3), dtype=torch.bool, device=corners.device)
    for axis in range(3):
        for step in steps[axis]:  # no voxel twice in one step
            rows = torch.searchsorted(keys, grid.keys(grid.voxels(edges[axis]) + step))
            sums[rows] += edge_sums[axis]
            if not bool(step.any()):
                intersected[rows, axis] = True
    if face_weight > 0:
        for triangle, rows in _touched(corners, keys, grid):
            _add(sums, rows, planes[triangle] * face_weight)
    if boundary_weight > 0:
        start, end = open_edges(corners, faces, open_sides(faces))
        segment, rows = _passed(start, end, keys, grid)
        _add(sums, rows, _line_terms(start, end)[segment] * boundary_weight)

    # Voxel by voxel from its own corner, which keeps all digits however fine the grid.
    matrix = sums[:, :6].clone()
    count = sums[:, 12:]
    matrix[:, [0, 3, 5]] += regularization * count
    target = sums[:, 6:9] + regularization * sums[:, 9:12]
    size = grid.size.double()
    corner = coords.double() * size
    local = _minimise(matrix, target - _apply(matrix, corner), size)
    return coords.int(), (corner + local).float(), intersected


def crossings(corners: Tensor, axis: int, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Where triangles cross the inner lines of the grid along an axis.

    corners: (F, 3, 3) float32.  Returns (triangle (M,), voxel (M, 3) whose far edge along the axis is crossed, point
    (M, 3) float64), by triangle, row and column.
    """
    u, v = (axis + 1) % 3, (axis + 2) % 3
    c = corners[:, :, [u, v, axis]].double()
    order = torch.argsort(c[:, :, 1], dim=1, stable=True)
    low, middle, high = torch.gather(c, 1, order[:, :, None].expand(-1, -1, 3)).unbind(1)
    first, turn, last = (grid.cells(p[:, 1], v) for p in (low, middle, high))
    triangle, row = _spread(first, last)
    # Each row's line cuts the long side, and one of the short ones; both are followed from their common corner.
    upper = (row >= turn[triangle])[:, None]
    low, middle, high = low[triangle], middle[triangle], high[triangle]
    apex, foot = torch.where(upper, high, low), torch.where(upper, low, high)
    y = grid.far_side(row, v)
    short, long = _cut(apex, middle, y), _cut(apex, foot, y)
    swap = (short[:, 0] > long[:, 0])[:, None]
    left, right = torch.where(swap, long, short), torch.where(swap, short, long)
    span, column = _spread(grid.cells(left[:, 0], u), grid.cells(right[:, 0], u))
    left, right, triangle, row, y = left[span], right[span], triangle[span], row[span], y[span]
    x = grid.far_side(column, u)
    z = _mix(left[:, 0], right[:, 0], x, left[:, 1], right[:, 1])
    depth = (z / grid.size[axis].double()).trunc()
    keep = (depth >= 0) & (depth < grid.shape[axis])
    back = [(axis_out - axis - 1) % 3 for axis_out in range(3)]  # from (u, v, axis) to (x, y, z)
    voxel = torch.stack([column, row, depth.long()], dim=1)[:, back]
    return triangle[keep], voxel[keep], torch.stack([x, y, z], dim=1)[:, back][keep]


def _touched(corners: Tensor, keys: Tensor, grid: Grid) -> Any:
    """Yield (triangle, row in the sorted keys) of all voxels that triangles touch, in chunks.

    The separating-axis test (Akenine-Moller 2001; Schwarz and Seidel 2010) in float32: plane, then the three views.
    A triangle is followed column by column along the greatest axis of its normal.
    """
    normals = unit_normals(corners)
    size = grid.size
    shape = torch.tensor(grid.shape, device=corners.device)
    low = (corners.amin(dim=1) / size).trunc().clamp(torch.zeros_like(size), shape).long()
    high = (corners.amax(dim=1) / size + 1).trunc().clamp(torch.zeros_like(size), shape).long()
    extent = (high - low).clamp_min(0)
    main = normals.abs().argmax(dim=1)
    for axis in range(3):
        u, v = (axis + 1) % 3, (axis + 2) % 3
        chosen = torch.nonzero((main == axis) & (extent > 0).all(dim=1) & (normals != 0).any(dim=1))[:, 0]
        columns = (extent[chosen, u] * extent[chosen, v]).cumsum(0)
        begin, total = 0, 0
        while begin < len(chosen):
            stop = max(begin + 1, int(torch.searchsorted(columns, total + _CHUNK, right=True)))
            part = chosen[begin:stop]
            begin, total = stop, int(columns[stop - 1])
            of, i = _spread(low[part, u], high[part, u])
            of_row, j = _spread(low[part, v][of], high[part, v][of])
            of, i = of[of_row], i[of_row]
            # The plane's range within the column, a cell wider on both sides; the test itself decides.
            n, a = normals[part].double()[of], corners[part, 0].double()[of]
            near_u, near_v = i * size[u].double() - a[:, u], j * size[v].double() - a[:, v]
            at_corner = a[:, axis] - (n[:, u] * near_u + n[:, v] * near_v) / n[:, axis]
            slope_u, slope_v = -n[:, u] / n[:, axis] * size[u].double(), -n[:, v] / n[:, axis] * size[v].double()
            bottom = at_corner + slope_u.clamp_max(0) + slope_v.clamp_max(0)
            top = at_corner + slope_u.clamp_min(0) + slope_v.clamp_min(0)
            depth = size[axis].double()
            k0 = torch.maximum((bottom / depth).floor().long() - 1, low[part, axis][of])
            k1 = torch.minimum((top / depth).floor().long() + 2, high[part, axis][of])
            of_column, k = _spread(k0, torch.maximum(k0, k1))
            voxel = torch.empty((len(k), 3), dtype=torch.int64, device=k.device)
            voxel[:, axis], voxel[:, u], voxel[:, v] = k, i[of_column], j[of_column]
            triangle = part[of[of_column]]
            rows, active = _find(keys, grid.keys(voxel))
            triangle, voxel, rows = triangle[active], voxel[active], rows[active]
            touch = _touches(corners[triangle], normals[triangle], voxel.float() * size, size)
            yield triangle[touch], rows[touch]


def _touches(corners: Tensor, normals: Tensor, origin: Tensor, size: Tensor) -> Tensor:
    """Whether each triangle touches its box [origin, origin + size]; (N, 3, 3), (N, 3), (N, 3), (3,) -> (N,)."""
    v = corners.unbind(1)
    far = torch.where(normals > 0, size, 0)
    at = _dot(normals, origin)
    result = (at + _dot(normals, far - v[0])) * (at + _dot(normals, size - far - v[0])) <= 0
    for axis in range(3):
        first, second = ((0, 1), (1, 2), (2, 0))[(axis + 1) % 3]
        sign = torch.where(normals[:, axis] < 0, -1.0, 1.0)
        for i in range(3):
            side = v[(i + 1) % 3] - v[i]
            inward = (-sign * side[:, second], sign * side[:, first])
            offset = -(inward[0] * v[i][:, first] + inward[1] * v[i][:, second]) + (
                inward[0].clamp_min(0) * size[first] + inward[1].clamp_min(0) * size[second]
            )
            result &= inward[0] * origin[:, first] + inward[1] * origin[:, second] + offset >= 0
    return result


def open_sides(faces: Tensor) -> Tensor:
    """(B,) int64: those of the 3 F sides that no other triangle has, in the order of their lower and higher vertex."""
    sides = faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2)
    keys, order = torch.sort(sides.amin(dim=1) * (faces.max() + 1) + sides.amax(dim=1), stable=True)
    alone = torch.ones_like(keys, dtype=torch.bool)
    alone[1:] &= keys[1:] != keys[:-1]
    alone[:-1] &= keys[1:] != keys[:-1]
    return order[alone]


def open_edges(corners: Tensor, faces: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
    """Both ends (B, 3) float32 of sides, from the lower vertex to the higher; those of no length are left out."""
    face, first, second = sides // 3, sides % 3, (sides + 1) % 3
    flip = (faces[face, first] > faces[face, second])[:, None]
    a, b = corners[face, first], corners[face, second]
    start, end = torch.where(flip, b, a), torch.where(flip, a, b)
    long = (end - start).double().norm(dim=1) >= 1e-6
    return start[long], end[long]


def _passed(start: Tensor, end: Tensor, keys: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """(segment, row in the sorted keys) of the voxels that segments pass through (Amanatides and Woo 1987)."""
    along = (end - start).double()
    length = along.norm(dim=1)
    direction = along / length[:, None]
    voxel = (start / grid.size).floor().long()
    step = torch.where(direction > 0, 1, -1)
    side = grid.size * (voxel + (step > 0)).float()
    infinite = torch.full_like(direction, float("inf"))
    still = direction == 0
    reach = torch.where(still, infinite, (side - start).double() / direction)
    stride = torch.where(still, infinite, grid.size.double() / direction.abs())
    # Straight to where a segment enters the grid, and no farther than where it leaves it.
    end_of_grid = grid.far_side(torch.tensor(grid.shape, device=start.device) - 1, slice(None))
    margin = grid.size.double()
    enter, leave = (
        (torch.where(step > 0, wall, other) - start) / direction
        for wall, other in ((-margin, end_of_grid + margin), (end_of_grid + margin, -margin))
    )
    enter = torch.where(still, -infinite, enter).amax(dim=1, keepdim=True)
    length = torch.minimum(length, torch.where(still, infinite, leave).amin(dim=1))
    skipped = torch.where(still, 0, ((enter - reach) / stride).ceil().clamp_min(0))
    voxel, reach = voxel + step * skipped.long(), torch.where(still, infinite, reach + skipped * stride)
    segment = torch.arange(len(start), device=start.device)
    segments, rows = [], []
    while len(segment):
        inside = grid.contains(voxel)
        found, active = _find(keys, grid.keys(voxel))
        active &= inside
        segments.append(segment[active])
        rows.append(found[active])
        # The nearest side, of equals the last.
        x, y, z = reach.unbind(1)
        axis = torch.where(x < y, torch.where(x < z, 0, 2), torch.where(y < z, 1, 2))[:, None]
        go = (torch.gather(reach, 1, axis) <= length[:, None])[:, 0]
        axis, segment, length = axis[go], segment[go], length[go]
        step, stride = step[go], stride[go]
        voxel = voxel[go].scatter_add(1, axis, torch.gather(step, 1, axis))
        reach = reach[go].scatter_add(1, axis, torch.gather(stride, 1, axis))
    if not segments:
        return segment, segment
    return torch.cat(segments), torch.cat(rows)


def _minimise(matrix: Tensor, target: Tensor, size: Tensor) -> Tensor:
    """argmin of x'Ax - 2 b'x over the box [0, size], in float64.

    matrix: (N, 6), the upper triangle of A row by row, positive definite. target: (N, 3) b.  The least of the face,
    edge and corner minima is the minimum of the box wherever the free one lies outside, since the error is convex.
    """
    best = _solve(matrix, target, (None, None, None), size)
    outside = torch.nonzero(~((best >= 0) & (best <= size)).all(dim=1))[:, 0]
    matrix, target = matrix[outside], target[outside]
    winner = torch.zeros_like(target)
    least = torch.full_like(target[:, 0], float("inf"))
    for fixed in product((None, 0, 1), repeat=3):
        if fixed == (None, None, None):
            continue
        point = _solve(matrix, target, fixed, size)
        error = (point * (_apply(matrix, point) - 2 * target)).sum(dim=1)
        better = ((point >= 0) & (point <= size)).all(dim=1) & (error < least)
        winner[better], least[better] = point[better], error[better]
    best[outside] = winner
    return best


def _solve(matrix: Tensor, target: Tensor, fixed: tuple[int | None, ...], size: Tensor) -> Tensor:
    """The minimum where each axis is free (None) or fixed to the box's lower (0) or upper (1) side."""
    a = {}
    for column, (i, j) in enumerate(_SYMMETRIC):
        a[i, j] = a[j, i] = matrix[:, column]
    x = [
        torch.zeros_like(target[:, 0]) if side is None else (size[i] * side).expand(len(target))
        for i, side in enumerate(fixed)
    ]
    free = [i for i in range(3) if fixed[i] is None]
    b = {i: target[:, i] - sum(a[i, j] * x[j] for j in range(3) if j not in free) for i in free}
    pivots: dict[int, Tensor] = {}
    for place, i in enumerate(free):  # Gauss without pivoting: the matrix is positive definite
        pivots[i] = a[i, i]
        for j in free[place + 1 :]:
            ratio = a[j, i] / a[i, i]
            for k in free[place + 1 :]:
                a[j, k] = a[j, k] - ratio * a[i, k]
            b[j] = b[j] - ratio * b[i]
    for i in reversed(free):
        x[i] = (b[i] - sum(a[i, j] * x[j] for j in free if j > i)) / pivots[i]
    return torch.stack(x, dim=1)


def _apply(matrix: Tensor, x: Tensor) -> Tensor:
    xx, xy, xz, yy, yz, zz = matrix.unbind(1)
    a, b, c = x.unbind(1)
    return torch.stack([xx * a + xy * b + xz * c, xy * a + yy * b + yz * c, xz * a + yz * b + zz * c], dim=1)


def _plane_terms(normals: Tensor, points: Tensor) -> Tensor:
    """(F, 9): upper triangle of n n', and n n' p."""
    return torch.cat([_upper(normals, normals), normals * (normals * points).sum(dim=1, keepdim=True)], dim=1)


def _line_terms(start: Tensor, end: Tensor) -> Tensor:
    """(B, 9): upper triangle of P = I - d d', and P p, of the line through each segment."""
    along = (end - start).double()
    direction = along / along.norm(dim=1, keepdim=True)
    point = start.double()
    across = torch.eye(3, dtype=torch.float64, device=start.device)[[0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]]
    foot = point - direction * (direction * point).sum(dim=1, keepdim=True)
    return torch.cat([across - _upper(direction, direction), foot], dim=1)


def _upper(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a[:, i] * b[:, j] for i, j in _SYMMETRIC], dim=1)


def unit_normals(corners: Tensor) -> Tensor:
    """Unit normals (F, 3) of triangles, zero where there is no area; float32 throughout."""
    a, b = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 1]
    parts = [a[:, i - 2] * b[:, i - 1] - a[:, i - 1] * b[:, i - 2] for i in range(3)]
    n = torch.stack(parts, dim=1)
    length = _dot(n, n).sqrt()[:, None]
    return torch.where(length > 0, n / length, 0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Written out, since the order of the sums decides on which side of a voxel a touching triangle falls."""
    return a[..., 0] * b[..., 0] + (a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2])


def _cut(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """(x, z) of the sides from a to b, both (N, 3), at y."""
    return torch.stack([_mix(a[:, 1], b[:, 1], y, a[:, i], b[:, i]) for i in (0, 2)], dim=1)


def _mix(a: Tensor, b: Tensor, at: Tensor, value_a: Tensor, value_b: Tensor) -> Tensor:
    """The line through (a, value_a) and (b, value_b), at ``at``; value_a where a = b."""
    share = (at - a) / (b - a)
    return torch.where(a == b, value_a, (1 - share) * value_a + share * value_b)


def _spread(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """All integers of the ranges [first, last): (index of the range, integer)."""
    counts = last - first
    index = torch.repeat_interleave(counts)
    starts = counts.cumsum(0) - counts
    return index, torch.arange(len(index), device=first.device) - starts[index] + first[index]


def _find(keys: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(row of each wanted key in the sorted keys, whether it is there)."""
    rows = torch.searchsorted(keys, wanted)
    if not len(keys):
        return rows, torch.zeros_like(wanted, dtype=torch.bool)
    rows.clamp_(max=len(keys) - 1)
    return rows, keys[rows] == wanted


def around(axis: int, device: torch.device) -> Tensor:
    """Steps (4, 3) from a voxel to those around its far edge along an axis, itself first."""
    steps = torch.zeros((4, 3), dtype=torch.int64, device=device)
    steps[:, (axis + 1) % 3] = torch.tensor([0, 0, 1, 1])
    steps[:, (axis + 2) % 3] = torch.tensor([0, 1, 0, 1])
    return steps


def segment_sum(values: Tensor, counts: Tensor) -> Tensor:
    """Sums over runs of rows, in their order."""
    if not len(counts):
        return values
    return torch.segment_reduce(values, "sum", lengths=counts)


def _add(sums: Tensor, rows: Tensor, terms: Tensor) -> None:
    """Add (M, C) terms to the first C columns of the given rows, in one order everywhere."""
    rows, order = torch.sort(rows, stable=True)
    rows, counts = torch.unique_consecutive(rows, return_counts=True)
    sums[rows, : terms.shape[1]] += segment_sum(terms[order], counts)


def _three(name: str, value: Any) -> Tensor:
    """(3,) float64 from one or three positive numbers.  Raises ValueError."""
    numbers = torch.as_tensor(value, dtype=torch.float64)
    if numbers.ndim > 1 or numbers.numel() not in (1, 3) or not bool(((numbers > 0) & numbers.isfinite()).all()):
        raise ValueError(f"{name}={value!r} must be one or three positive numbers.")
    return numbers.expand(3)
