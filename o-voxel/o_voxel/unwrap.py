"""UV unwrapping: nearly flat charts of our own, packed by xatlas.

xatlas's own charting takes 12 to 45 s for 100k faces on two cores, and minutes for a million; its packing takes
well under a second. So faces are clustered here, into charts that project onto a plane without folding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xatlas
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from .checks import check_mesh
from .repair import manifold_edges

Integers = NDArray[Any]
Reals = NDArray[np.float64]

# Normals of a chart lie within this angle of its plane's: lengths shrink by a quarter at most, and the two sides
# of a right-angled edge never share a chart.
_CONE = float(np.radians(40))
# Charts of less than this part of the whole area may join a neighbour up to the wider angle.
_CRUMB, _CRUMB_CONE = 1e-4, float(np.radians(70))
# In texels of a 2048 atlas: so charts stay apart down to a mip level of 512 texels.
_RESOLUTION, _PADDING = 2048, 4
_NO_AREA = 1e-5  # of a face twice over, in texels of that atlas; xatlas ignores what is below 1.2e-7
_FILL = 0.7  # of the atlas, what charts and their padding cover


@dataclass(frozen=True)
class Unwrapped:
    """vertex_map (V2,) int64: the vertex that each new vertex copies; faces (F2, 3) int32 of new vertices, in the
    old order; uvs (V2, 2) float32 in [0, 1]; charts: how many. Faces without area have no place in it."""

    vertex_map: Tensor
    faces: Tensor
    uvs: Tensor
    charts: int


def unwrap(vertices: Tensor, faces: Tensor) -> Unwrapped:
    """Cut the mesh into charts and lay them out without overlap, all at one scale.

    vertices: (V, 3) float. faces: (F, 3) int; neighbours wound alike share charts. Works on the CPU and cannot
    be interrupted; equal input gives equal bits. Raises ValueError naming the argument.
    """
    check_mesh(vertices, faces)
    device = vertices.device
    points, triangles = vertices.double().cpu().numpy(), faces.long().cpu().numpy()
    a, b, c = points[triangles].transpose(1, 0, 2)
    normals = np.cross(b - a, c - a)
    area = np.linalg.norm(normals, axis=1) / 2
    solid = area > 1e-14 * max(float(area.sum()), 1e-300)
    triangles, normals = triangles[solid], normals[solid]
    if not len(triangles):
        nothing = torch.zeros((0, 3), dtype=torch.int32, device=device)
        return Unwrapped(nothing[:, 0].long(), nothing, torch.zeros((0, 2), device=device), 0)
    half_edges = manifold_edges(torch.from_numpy(triangles), len(points)).numpy()
    label = _cluster(points, triangles, normals, half_edges)
    label, uvs = _flatten(points, triangles, normals, half_edges, label)
    vertex_map, new_faces, packed = _pack(triangles, label, uvs, len(points))
    return Unwrapped(
        torch.from_numpy(vertex_map).to(device),
        torch.from_numpy(new_faces).int().to(device),
        torch.from_numpy(packed).to(device),
        int(label.max()) + 1,
    )


def _cluster(points: Reals, triangles: Integers, normals: Reals, half_edges: Integers) -> Integers:
    """A label for each face; faces of one label are connected and face the same way."""
    corners = points[triangles]
    sides = np.linalg.norm(corners - np.roll(corners, -1, axis=1), axis=2)
    u, v = half_edges.T // 3
    shared = sides.reshape(-1)[half_edges[:, 0]]
    label = np.arange(len(triangles))
    rim = sides.sum(1)
    label, u, v, shared, rim = _merge(label, normals, u, v, shared, rim, _CONE, np.inf)
    crumb = _CRUMB * float(np.linalg.norm(normals, axis=1).sum()) / 2
    return _merge(label, normals, u, v, shared, rim, _CRUMB_CONE, crumb)[0]


def _merge(
    label: Integers,
    normals: Reals,
    u: Integers,
    v: Integers,
    shared: Reals,
    rim: Reals,
    cone: float,
    crumb: float,
) -> tuple[Integers, Integers, Integers, Reals, Reals]:
    """Merge clusters, in each round all pairs that are each other's cheapest partner.

    u, v, shared: which clusters touch, along what length. rim: length of each cluster's outline. Normals stay
    within ``cone`` of their cluster's mean; of two that merge, one has an area below ``crumb``.
    Returns label, u, v, shared and rim of the clusters that remain.
    """
    unit = _unit(normals)
    generator = np.random.default_rng(0)
    while True:
        count = len(rim)
        total = np.stack([np.bincount(label, normals[:, i], count) for i in range(3)], axis=1) / 2
        axis = _unit(total)
        area = np.bincount(label, np.linalg.norm(normals, axis=1) / 2, count)
        spread = np.zeros(count)
        np.maximum.at(spread, label, _angle(unit, axis[label]))

        middle = _unit(total[u] + total[v])
        turned = np.maximum(spread[u] + _angle(axis[u], middle), spread[v] + _angle(axis[v], middle))
        outline = rim[u] + rim[v] - 2 * shared
        # Flat and round charts first; a little noise, for equal costs would pair few of a regular grid's faces.
        cost = turned / _CONE + 0.2 * outline / np.sqrt(4 * np.pi * (area[u] + area[v]))
        cost *= 1 + 0.05 * generator.random(len(cost))
        allowed = (turned <= cone) & (np.minimum(area[u], area[v]) < crumb)
        candidates = np.nonzero(allowed)[0]
        if not len(candidates):
            return label, u, v, shared, rim
        dear_first = candidates[np.argsort(cost[candidates], kind="stable")[::-1]]
        best = np.full(count, -1)
        # The last write stays, which is the cheapest edge of each cluster.
        best[np.stack([u[dear_first], v[dear_first]], axis=1).reshape(-1)] = np.repeat(dear_first, 2)
        agreed = candidates[(best[u[candidates]] == candidates) & (best[v[candidates]] == candidates)]

        into = np.arange(count)
        into[v[agreed]] = u[agreed]
        rim = rim.copy()
        rim[u[agreed]] = outline[agreed]
        remaining, number = np.unique(into, return_inverse=True)
        rim, label = rim[remaining], number[label]
        u, v, shared = _touching(number[u], number[v], shared, len(remaining))


def _touching(u: Integers, v: Integers, shared: Reals, count: int) -> tuple[Integers, Integers, Reals]:
    """Each pair of different clusters once, with all the length that it shares."""
    apart = u != v
    u, v, shared = u[apart], v[apart], shared[apart]
    keys, number = np.unique(np.minimum(u, v) * count + np.maximum(u, v), return_inverse=True)
    return keys // count, keys % count, np.bincount(number, shared, len(keys)).astype(np.float64)


def _flatten(
    points: Reals, triangles: Integers, normals: Reals, half_edges: Integers, label: Integers
) -> tuple[Integers, Reals]:
    """Project each chart along its mean normal, and halve charts until none lies over itself.

    Returns (label (F,), uvs (F, 3, 2) in units of length).
    """
    faces = half_edges // 3
    while True:
        count = int(label.max()) + 1
        axis = _unit(np.stack([np.bincount(label, normals[:, i], count) for i in range(3)], axis=1))
        helper = np.eye(3)[np.abs(axis).argmin(axis=1)]
        right = _unit(np.cross(helper, axis))
        up = np.cross(axis, right)
        corners = points[triangles]
        uvs = np.stack(
            [np.einsum("fki,fi->fk", corners, right[label]), np.einsum("fki,fi->fk", corners, up[label])], axis=2
        )
        folded = (normals * axis[label]).sum(axis=1) <= 0
        inner = np.zeros(3 * len(triangles), dtype=bool)
        inner[half_edges[label[faces[:, 0]] == label[faces[:, 1]]]] = True
        rim = np.nonzero(~inner)[0]
        start = uvs.reshape(-1, 2)[rim]
        end = np.roll(uvs, -1, axis=1).reshape(-1, 2)[rim]
        bad = np.zeros(count, dtype=bool)
        bad[_crossing(start, end, label[rim // 3])] = True
        bad[label[folded]] = True
        bad[_overfull(uvs, label[:, None] * len(points) + triangles, rim) // len(points)] = True
        bad &= np.bincount(label, minlength=count) > 1
        if not bad.any():
            return label, uvs
        # Cut at the middle of the longer side.
        low = np.full((count, 2), np.inf)
        high = np.full((count, 2), -np.inf)
        centre = uvs.mean(axis=1)
        np.minimum.at(low, label, centre)
        np.maximum.at(high, label, centre)
        longer = (high - low).argmax(axis=1)
        position = np.take_along_axis(centre, longer[label][:, None], axis=1)[:, 0]
        beyond = position > ((low + high) / 2)[np.arange(count), longer][label]
        label = _connected(label * 2 + (beyond & bad[label]), faces)


def _overfull(uvs: Reals, keys: Integers, rim: Integers) -> Integers:
    """Of the vertices ``keys`` (F, 3), those where faces go round more than once or several fans meet."""
    ahead, back = np.roll(uvs, -1, axis=1) - uvs, np.roll(uvs, 1, axis=1) - uvs
    sine = ahead[..., 0] * back[..., 1] - ahead[..., 1] * back[..., 0]
    angle = np.arctan2(np.abs(sine), (ahead * back).sum(axis=2))
    vertex, number = np.unique(keys.reshape(-1), return_inverse=True)
    turn = np.bincount(number, angle.reshape(-1), len(vertex))
    fans = np.bincount(number[rim], minlength=len(vertex))
    return np.asarray(vertex[(turn > 2 * np.pi + 1e-6) | (fans > 1)])


def _connected(label: Integers, faces: Integers) -> Integers:
    """Labels of the connected parts of each label."""
    same = faces[label[faces[:, 0]] == label[faces[:, 1]]]
    graph = coo_array((np.ones(len(same), dtype=np.int8), (same[:, 0], same[:, 1])), shape=(len(label),) * 2)
    parts: Integers = connected_components(graph.tocsr(), directed=False)[1]
    first = np.unique(parts, return_index=True)[1]
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[parts]


def _crossing(start: Reals, end: Reals, group: Integers) -> Integers:
    """Groups in which two segments cross."""
    low, high = np.minimum(start, end), np.maximum(start, end)
    # Groups side by side on one axis: then a sweep compares segments of one group only.
    width = 2 * float((high[:, 0] - low[:, 0].min()).max()) + 1
    left, right = low[:, 0] + group * width, high[:, 0] + group * width
    order = np.argsort(left, kind="stable")
    reach = np.searchsorted(left[order], right[order], side="left")
    found = []
    counts = np.maximum(reach - np.arange(len(order)) - 1, 0)
    for first, last in _batches(counts, 4_000_000):
        ahead = counts[first:last]
        i = np.repeat(np.arange(first, last), ahead)
        j = i + 1 + np.arange(len(i)) - np.repeat(np.cumsum(ahead) - ahead, ahead)
        i, j = order[i], order[j]
        meet = (group[i] == group[j]) & (low[i, 1] <= high[j, 1]) & (low[j, 1] <= high[i, 1])
        i, j = i[meet], j[meet]
        a, b, c, d = start[i], end[i], start[j], end[j]
        cross = (_turn(a, b, c) * _turn(a, b, d) < 0) & (_turn(c, d, a) * _turn(c, d, b) < 0)
        found.append(np.unique(group[i[cross]]))
    return np.concatenate([np.zeros(0, dtype=np.int64), *found])


def _batches(counts: Integers, limit: int) -> list[tuple[int, int]]:
    """Ranges of items whose counts add up to about ``limit`` at most."""
    batch = np.cumsum(counts) // limit
    bounds = np.concatenate([[0], np.nonzero(np.diff(batch))[0] + 1, [len(counts)]])
    return list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))


def _turn(a: Reals, b: Reals, c: Reals) -> Reals:
    return np.asarray((b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0]))


def _pack(
    triangles: Integers, label: Integers, uvs: Reals, count: int
) -> tuple[Integers, Integers, NDArray[np.float32]]:
    """Return (vertex_map, faces, uvs in [0, 1]) with a copy of each vertex for each chart that it is in."""
    keys, first, number = np.unique(label[:, None] * count + triangles, return_index=True, return_inverse=True)
    source, flat = keys % count, number.reshape(-1, 3)
    place = uvs.reshape(-1, 2)[first]
    chart = keys // count
    corner = np.full((int(label.max()) + 1, 2), np.inf)
    np.minimum.at(corner, chart, place)
    # In texels from each chart's corner: xatlas takes areas below a fixed epsilon for nothing, and float32 is finest
    # near zero.
    padding, texels = _scale(uvs, label)
    place = ((place - corner[chart]) * texels).astype(np.float32)

    # xatlas moves charts by their vertices, so what a face without area held together must not share any.
    a, b, c = place[flat].transpose(1, 0, 2)
    flat = flat[np.abs(_turn(a, b, c)) > _NO_AREA]
    part = _edge_connected(flat)
    used, number = np.unique(part[:, None] * len(place) + flat, return_inverse=True)
    source, place, flat = source[used % len(place)], place[used % len(place)], number.reshape(-1, 3)

    atlas = xatlas.Atlas()
    atlas.add_uv_mesh(place, flat.astype(np.uint32), part[:, None].astype(np.uint32))
    options = xatlas.PackOptions()
    options.padding, options.texels_per_unit = padding, 1.0
    atlas.generate(pack_options=options)
    order, packed_faces, packed = atlas.get_mesh(0)
    # Faces that lost their area in float32 are in no chart.
    placed = (atlas.get_mesh_vertex_assignment(0)[0] == 0)[packed_faces].all(axis=1)
    return source[order], packed_faces[placed].astype(np.int64), np.clip(packed, 0, 1)


def _edge_connected(faces: Integers) -> Integers:
    """A label for each of ``faces`` (F, 3): those that are connected over common edges have the same."""
    count = int(faces.max()) + 1
    ends = np.sort(np.stack([faces, np.roll(faces, -1, axis=1)], axis=2).reshape(-1, 2), axis=1)
    edge = np.unique(ends[:, 0] * count + ends[:, 1], return_inverse=True)[1]
    face = np.repeat(np.arange(len(faces)), 3)
    graph = coo_array(
        (np.ones(len(face), dtype=np.int8), (face, len(faces) + edge)), shape=(len(faces) + edge.max() + 1,) * 2
    )
    parts: Integers = connected_components(graph.tocsr(), directed=False)[1][: len(faces)]
    return np.unique(parts, return_inverse=True)[1]


def _scale(uvs: Reals, label: Integers) -> tuple[int, float]:
    """Padding in texels, and the texels in a unit of length with which an atlas comes out near ``_RESOLUTION``.

    Left to itself, xatlas takes the coordinates of such a mesh for those of a unit square.
    """
    a, b, c = uvs.transpose(1, 0, 2)
    area = float(np.abs(_turn(a, b, c)).sum()) / 2
    # Charts are about as round as a square.
    sizes = np.sqrt(np.bincount(label, np.abs(_turn(a, b, c)) / 2))
    room = _FILL * _RESOLUTION**2
    padding = int(np.clip(np.sqrt(0.3 * room / (4 * len(sizes))), 1, _PADDING))
    # area * t^2 + border * t + corners = room
    border, corners = 4 * padding * float(sizes.sum()), 4 * padding**2 * len(sizes)
    spare = max(room - corners, 0.1 * room)
    return padding, (np.sqrt(border**2 + 4 * area * spare) - border) / (2 * area)


def _unit(vectors: Reals) -> Reals:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-300))


def _angle(a: Reals, b: Reals) -> Reals:
    return np.asarray(np.arccos(np.clip((a * b).sum(axis=-1), -1, 1)))
