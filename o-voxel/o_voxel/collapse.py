"""Edge collapse in parallel: many edges a round, none of them near another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .launch import Floats, Int64s, Ints, Triangles, Vec3i, func, kernel, launch, shared, wp

if TYPE_CHECKING:
    Vec3d = Any
    Vec4d = Any
    Vec3ds = Any
    Quadric = Any
    Quadrics = Any
else:
    Vec3d = wp.vec3d
    Vec4d = wp.vec4d
    Vec3ds = wp.array(dtype=wp.vec3d)
    # Of the symmetric matrix (A b; b c): A00 A01 A02 A11 A12 A22, b, c.
    Quadric = wp.types.vector(length=10, dtype=wp.float64)
    Quadrics = wp.array(dtype=Quadric)

# The part of all edges, the cheapest, that a round may take from: the fewer, the closer to one edge after another.
_SHARE = 0.1
_SAMPLE = 1 << 16  # costs that are sorted to find it
# Costs that differ only behind these bits count as equal, and a hash decides: where costs fall evenly over many
# edges, each edge would have to wait for the next one.
_COST_BITS = 22
_HASH = 2654435761  # odd, so that no two edges have the same
_NEVER = torch.iinfo(torch.int64).max
# Parts of the faces: where a round removes less, the next one takes from more edges, or, when it took from all
# already, rules go.
_FEW, _STALLED = 0.02, 1e-3

_SPREAD = wp.constant(wp.float64(1e-5))  # squared distance along the surface, against that across it
_RIM = wp.constant(wp.float64(1.0))  # weight of borders: a strip of face as wide as the edge is long
_TURN = wp.constant(wp.float64(0.7))  # cosine of how far a face may turn at once; turns add up
_SLIVER = wp.constant(wp.float64(0.1))  # faces of less than this shape (an equilateral one has 1) may not get worse
_FAN = wp.constant(32)  # faces at a vertex that others may be united with


def collapse_edges(vertices: Tensor, faces: Tensor, target_faces: int) -> tuple[Tensor, Tensor]:
    """Collapse edges by quadric error (Garland and Heckbert) until at most ``target_faces`` faces are left.

    vertices (V, 3) float32 finite, faces (F, 3) int. A collapse keeps the topology, turns no face over and makes no
    sliver worse; borders and creases stay in place. Where that does not reach the target, first the topology may
    change, then all these rules go, and even lone triangles vanish. The last round stops within the faces of one
    edge below the target. Vertices may be left that no face uses. Equal input gives equal bits on the same device.
    Needs about 170 bytes for each face beside the mesh.
    """
    low, high = vertices.amin(0).double(), vertices.amax(0).double()
    centre, extent = (low + high) / 2, (high - low).max().clamp_min(1e-30)
    mesh = _prepared(((vertices.double() - centre) / extent).contiguous(), faces.int())

    share, strict = _SHARE, 2
    while len(mesh.faces) > target_faces:
        edges, removed, cost = _independent_edges(mesh, share, strict)
        total, excess = int(removed.sum()), len(mesh.faces) - target_faces
        if total > excess:
            order = torch.argsort(cost, stable=True)
            needed = torch.searchsorted(torch.cumsum(removed[order], 0), excess) + 1
            edges = edges[order[: int(needed)]]
        if total:
            parts = _without(mesh, edges)
            del mesh  # its successor needs the memory to sort
            mesh = _Mesh(*parts, *_faces_around(parts[0], len(parts[1])))
        if total < _FEW * len(mesh.faces) and share < 1:
            share = min(1.0, 2 * share)
        elif strict and total <= _STALLED * len(mesh.faces):
            share, strict = _SHARE, strict - 1
        elif not total:
            break
    return (mesh.points * extent + centre).to(vertices.dtype), mesh.faces.to(faces.dtype)


@dataclass(frozen=True)
class _Mesh:
    """faces (F, 3) int32; points (V, 3) and quadrics (V, 10) float64; border (V,) int32, 1 on borders; the faces
    around vertex v are order[begin[v]:begin[v + 1]], both int32."""

    faces: Tensor
    points: Tensor
    quadrics: Tensor
    border: Tensor
    begin: Tensor
    order: Tensor

    def arrays(self) -> list[Any]:
        """What every kernel takes."""
        surface = shared(self.faces, wp.vec3i), shared(self.points, wp.vec3d)
        return [*surface, shared(self.quadrics, Quadric), shared(self.border, wp.int32)]

    def rings(self) -> list[Any]:
        return [shared(self.begin, wp.int32), shared(self.order, wp.int32)]


def _prepared(points: Tensor, faces: Tensor) -> _Mesh:
    faces = faces[(faces != faces[:, [1, 2, 0]]).all(dim=1)].contiguous()
    quadrics = torch.zeros((len(points), 10), dtype=torch.float64, device=points.device)
    border = torch.zeros(len(points), dtype=torch.int32, device=points.device)
    mesh = _Mesh(faces, points, quadrics, border, *_faces_around(faces, len(points)))
    launch(_first_quadrics, len(points), [*mesh.arrays(), *mesh.rings()], points.device)
    return mesh


def _independent_edges(mesh: _Mesh, share: float, strict: int) -> tuple[Tensor, Tensor, Tensor]:
    """Half-edges (E,) int32 to collapse at once, the faces that go with each (E,) int32, and costs (E,)."""
    flat, arrays, rings = mesh.faces.view(-1), mesh.arrays(), mesh.rings()
    cost = torch.empty(len(flat), dtype=torch.float32, device=flat.device)
    launch(_costs, len(flat), [*arrays, shared(cost, wp.float32)], flat.device)
    sample = cost[:: -(-len(cost) // _SAMPLE)].sort().values
    candidates = torch.nonzero(cost <= sample[int(share * (len(sample) - 1))])[:, 0].int()
    cost = cost[candidates]
    removed = torch.zeros_like(candidates)
    chosen = [shared(candidates, wp.int32), shared(removed, wp.int32)]
    launch(_check, len(candidates), [*arrays, *rings, strict, *chosen], flat.device)

    rank = (cost.view(torch.int32) >> _COST_BITS).long()
    key = torch.where(removed > 0, (rank << 32) | (candidates.long() * _HASH & 0xFFFFFFFF), _NEVER)
    lowest = torch.full((len(mesh.points),), _NEVER, device=flat.device)
    for ends in (candidates, candidates - candidates % 3 + (candidates + 1) % 3):
        lowest.scatter_reduce_(0, flat[ends].long(), key, "amin")
    keys = [shared(lowest, wp.int64), shared(key, wp.int64)]
    launch(_select, len(candidates), [arrays[0], *rings, *keys, *chosen], flat.device)
    found = torch.nonzero(removed)[:, 0]
    return candidates[found], removed[found], cost[found]


def _without(mesh: _Mesh, edges: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Faces, points, quadrics and border after the collapse of half-edges ``edges`` (E,); ``mesh`` is spent."""
    nodes = torch.arange(len(mesh.points), dtype=torch.int32, device=edges.device)
    target = nodes.clone()
    launch(_unite, len(edges), [*mesh.arrays(), shared(edges, wp.int32), shared(target, wp.int32)], edges.device)
    kept = target == nodes
    number = (torch.cumsum(kept, 0, dtype=torch.int32) - 1)[target]
    faces = torch.index_select(number, 0, mesh.faces.view(-1)).view(-1, 3)
    faces = faces[(faces != faces[:, [1, 2, 0]]).all(dim=1)]
    return faces, mesh.points[kept], mesh.quadrics[kept], mesh.border[kept]


def _faces_around(faces: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(where the faces of each of ``count`` vertices begin (count + 1,), faces by vertex (3F,)), both int32."""
    vertex, corner = torch.sort(faces.view(-1), stable=True)
    bounds = torch.arange(count + 1, dtype=torch.int32, device=faces.device)
    return torch.searchsorted(vertex, bounds, out_int32=True), (corner // 3).int()


@func
def _with_plane(q: Quadric, normal: Vec3d, point: Vec3d, weight: wp.float64) -> Quadric:
    d = -wp.dot(normal, point)
    q[0] += weight * normal[0] * normal[0]
    q[1] += weight * normal[0] * normal[1]
    q[2] += weight * normal[0] * normal[2]
    q[3] += weight * normal[1] * normal[1]
    q[4] += weight * normal[1] * normal[2]
    q[5] += weight * normal[2] * normal[2]
    q[6] += weight * normal[0] * d
    q[7] += weight * normal[1] * d
    q[8] += weight * normal[2] * d
    q[9] += weight * d * d
    return q


@func
def _with_point(q: Quadric, point: Vec3d, weight: wp.float64) -> Quadric:
    q[0] += weight
    q[3] += weight
    q[5] += weight
    q[6] -= weight * point[0]
    q[7] -= weight * point[1]
    q[8] -= weight * point[2]
    q[9] += weight * wp.dot(point, point)
    return q


@func
def _error(q: Quadric, p: Vec3d) -> wp.float64:
    two = wp.float64(2.0)
    x = q[0] * p[0] + two * (q[1] * p[1] + q[2] * p[2] + q[6])
    y = q[3] * p[1] + two * (q[4] * p[2] + q[7])
    z = q[5] * p[2] + two * q[8]
    return x * p[0] + y * p[1] + z * p[2] + q[9]


@func
def _best_place(q: Quadric, one: Vec3d, other: Vec3d) -> Vec4d:
    """Where the ends of an edge meet with the least error, and that error."""
    middle = (one + other) * wp.float64(0.5)
    gx = q[0] * middle[0] + q[1] * middle[1] + q[2] * middle[2] + q[6]
    gy = q[1] * middle[0] + q[3] * middle[1] + q[4] * middle[2] + q[7]
    gz = q[2] * middle[0] + q[4] * middle[1] + q[5] * middle[2] + q[8]
    # The inverse by cofactors.
    xx = q[3] * q[5] - q[4] * q[4]
    xy = q[2] * q[4] - q[1] * q[5]
    xz = q[1] * q[4] - q[2] * q[3]
    yy = q[0] * q[5] - q[2] * q[2]
    yz = q[1] * q[2] - q[0] * q[4]
    zz = q[0] * q[3] - q[1] * q[1]
    determinant = q[0] * xx + q[1] * xy + q[2] * xz
    best = middle
    error = _error(q, middle)
    if determinant > wp.float64(0.0):
        step = wp.vec3d(xx * gx + xy * gy + xz * gz, xy * gx + yy * gy + yz * gz, xz * gx + yz * gy + zz * gz)
        place = middle - step / determinant
        away = place - middle
        along = other - one
        found = _error(q, place)
        if found < error and wp.dot(away, away) < wp.float64(4.0) * wp.dot(along, along):
            best = place
            error = found
    found_one = _error(q, one)
    if found_one < error:
        best = one
        error = found_one
    found_other = _error(q, other)
    if found_other < error:
        best = other
        error = found_other
    return wp.vec4d(best[0], best[1], best[2], wp.max(error, wp.float64(0.0)))


@func
def _has(face: Vec3i, vertex: int) -> bool:
    return face[0] == vertex or face[1] == vertex or face[2] == vertex


@kernel
def _first_quadrics(
    first: int, faces: Triangles, points: Vec3ds, quadrics: Quadrics, border: Ints, begin: Ints, order: Ints
) -> None:
    """Squared distances from the planes of the faces at a vertex, weighted by area, and from its borders."""
    v = first + wp.tid()
    here = points[v]
    q = Quadric()
    for k in range(begin[v], begin[v + 1]):
        face = faces[order[k]]
        a = points[face[0]]
        normal = wp.cross(points[face[1]] - a, points[face[2]] - a)
        double_area = wp.length(normal)
        if double_area > wp.float64(0.0):
            normal = normal / double_area
            area = wp.float64(0.5) * double_area
            q = _with_plane(q, normal, a, area)
            q = _with_point(q, here, area * _SPREAD)
            for corner in range(3):
                end = face[corner]
                if end != v:
                    count = wp.int32(0)
                    for m in range(begin[v], begin[v + 1]):
                        if _has(faces[order[m]], end):
                            count += 1
                    if count == 1:
                        border[v] = 1
                        along = points[end] - here
                        side = wp.cross(along, normal)
                        q = _with_plane(q, wp.normalize(side), here, _RIM * wp.dot(along, along))
    quadrics[v] = q


@kernel
def _costs(first: int, faces: Triangles, points: Vec3ds, quadrics: Quadrics, border: Ints, cost: Floats) -> None:
    half = first + wp.tid()
    face = faces[half // 3]
    a = face[half % 3]
    b = face[(half + 1) % 3]
    cost[half] = wp.float32(_best_place(quadrics[a] + quadrics[b], points[a], points[b])[3])


@func
def _pinches(a: int, b: int, faces: Triangles, begin: Ints, order: Ints) -> bool:
    """Whether a and b meet in more than the faces between them: uniting them would glue surfaces together."""
    for k in range(begin[a], begin[a + 1]):
        face = faces[order[k]]
        if not _has(face, b):
            x = face[0]
            y = face[1]
            if x == a:
                x = face[2]
            elif y == a:
                y = face[2]
            x_meets = wp.int32(0)
            y_meets = wp.int32(0)
            for m in range(begin[b], begin[b + 1]):
                other = faces[order[m]]
                with_x = _has(other, x)
                with_y = _has(other, y)
                if with_x and with_y:
                    return True
                if _has(other, a):
                    if with_x:
                        x_meets = 2
                    if with_y:
                        y_meets = 2
                else:
                    if with_x and x_meets == 0:
                        x_meets = 1
                    if with_y and y_meets == 0:
                        y_meets = 1
            if x_meets == 1 or y_meets == 1:
                return True
    return False


@func
def _shape(double_area: wp.float64, a: Vec3d, b: Vec3d, c: Vec3d) -> wp.float64:
    """1 for an equilateral triangle, 0 for one without area."""
    sides = wp.dot(b - a, b - a) + wp.dot(c - b, c - b) + wp.dot(a - c, a - c)
    return wp.float64(3.4641016151377544) * double_area / wp.max(sides, wp.float64(1.0e-300))


@func
def _spoils(a: int, b: int, place: Vec3d, faces: Triangles, points: Vec3ds, begin: Ints, order: Ints) -> bool:
    """Whether moving a to ``place`` turns over a face that b has no part in, or makes a sliver of it."""
    for k in range(begin[a], begin[a + 1]):
        face = faces[order[k]]
        if not _has(face, b):
            # Turned so that a comes first.
            x = face[1]
            y = face[2]
            if face[1] == a:
                x = face[2]
                y = face[0]
            elif face[2] == a:
                x = face[0]
                y = face[1]
            p = points[x]
            q = points[y]
            old = wp.cross(p - points[a], q - points[a])
            new = wp.cross(p - place, q - place)
            old_length = wp.length(old)
            new_length = wp.length(new)
            if wp.dot(old, new) < _TURN * old_length * new_length:
                return True
            shape = _shape(new_length, place, p, q)
            if shape < _SLIVER and shape <= _shape(old_length, points[a], p, q):
                return True
    return False


@kernel
def _check(
    first: int,
    faces: Triangles,
    points: Vec3ds,
    quadrics: Quadrics,
    border: Ints,
    begin: Ints,
    order: Ints,
    strict: int,
    candidates: Ints,
    removed: Ints,
) -> None:
    """How many faces go with each candidate; 0 where it may not go, or stands for the same edge as another one."""
    i = first + wp.tid()
    half = candidates[i]
    mine = half // 3
    a = faces[mine][half % 3]
    b = faces[mine][(half + 1) % 3]
    between = wp.int32(0)
    for k in range(begin[a], begin[a + 1]):
        if _has(faces[order[k]], b):
            if order[k] < mine:
                return
            between += 1
    if strict == 2:
        # An edge from border to border across the surface.
        if between > 1 and border[a] != 0 and border[b] != 0:
            return
        if _pinches(a, b, faces, begin, order):
            return
    if strict > 0:
        one = begin[a + 1] - begin[a]
        other = begin[b + 1] - begin[b]
        if one + other - 2 * between > wp.max(_FAN, wp.max(one, other)):
            return
        found = _best_place(quadrics[a] + quadrics[b], points[a], points[b])
        place = wp.vec3d(found[0], found[1], found[2])
        if _spoils(a, b, place, faces, points, begin, order) or _spoils(b, a, place, faces, points, begin, order):
            return
    removed[i] = between


@func
def _is_lowest(v: int, key: wp.int64, faces: Triangles, begin: Ints, order: Ints, lowest: Int64s) -> bool:
    for k in range(begin[v], begin[v + 1]):
        face = faces[order[k]]
        for corner in range(3):
            if lowest[face[corner]] < key:
                return False
    return True


@kernel
def _select(
    first: int,
    faces: Triangles,
    begin: Ints,
    order: Ints,
    lowest: Int64s,
    keys: Int64s,
    candidates: Ints,
    removed: Ints,
) -> None:
    """Only those edges stay that come before all others at their ends and at the neighbours of these."""
    i = first + wp.tid()
    if removed[i] != 0:
        half = candidates[i]
        face = faces[half // 3]
        a = face[half % 3]
        b = face[(half + 1) % 3]
        alone = _is_lowest(a, keys[i], faces, begin, order, lowest)
        if not (alone and _is_lowest(b, keys[i], faces, begin, order, lowest)):
            removed[i] = 0


@kernel
def _unite(
    first: int, faces: Triangles, points: Vec3ds, quadrics: Quadrics, border: Ints, edges: Ints, target: Ints
) -> None:
    half = edges[first + wp.tid()]
    face = faces[half // 3]
    a = face[half % 3]
    b = face[(half + 1) % 3]
    q = quadrics[a] + quadrics[b]
    found = _best_place(q, points[a], points[b])
    points[a] = wp.vec3d(found[0], found[1], found[2])
    quadrics[a] = q
    border[a] = wp.max(border[a], border[b])
    target[b] = a
