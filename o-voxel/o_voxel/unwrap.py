"""UV unwrapping: nearly flat charts, laid out in a square.

Faces are clustered into charts that project onto a plane without folding; ``pack`` finds the charts their places.
Everything but the last choice of places runs on the mesh's own device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import check_mesh
from .groups import group_sums
from .launch import Ints, Vec2d, func, kernel, launch, shared, wp
from .pack import extents, pack
from .repair import components, manifold_edges

if TYPE_CHECKING:
    Vec2ds = Any
else:
    Vec2ds = wp.array(dtype=wp.vec2d)

# Normals of a chart lie within this angle of its plane's: lengths shrink by a quarter at most, and the two sides
# of a right-angled edge never share a chart.
_CONE = math.radians(40)
# Charts of less than this part of the whole area may join a neighbour up to the wider angle.
_CRUMB, _CRUMB_CONE = 1e-4, math.radians(70)
# In texels of a 2048 atlas: so charts stay apart down to a mip level of 256 texels, and a filtered look-up inside a
# chart meets none that lies nearer to another down to 1024. Few charts can have more, for two levels more.
_RESOLUTION, _PADDING, _AMPLE = 2048, 8, 16
_FILL = 0.85  # of the atlas, what charts and their padding cover
_ONE = 1 << 30
_LONGEST = 1.6  # side of a chart, as a multiple of the square root of the whole area


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

    vertices: (V, 3) float. faces: (F, 3) int; neighbours wound alike share charts. Cannot be interrupted; equal
    input gives equal bits on the same device. Raises ValueError naming the argument.
    """
    check_mesh(vertices, faces)
    device = vertices.device
    points, triangles = vertices.double(), faces.long()
    a, b, c = points[triangles].unbind(1)
    normals = torch.linalg.cross(b - a, c - a)
    area = normals.norm(dim=1) / 2
    solid = torch.nonzero(area > 1e-14 * area.sum().clamp_min(1e-300))[:, 0]
    triangles, normals = triangles[solid], normals[solid]
    if not len(triangles):
        nothing = torch.zeros((0, 3), dtype=torch.int32, device=device)
        return Unwrapped(nothing[:, 0].long(), nothing, torch.zeros((0, 2), device=device), 0)
    half_edges = manifold_edges(triangles, len(points))
    start = triangles.reshape(-1)[half_edges]
    half_edges = half_edges[start[:, 0] != start[:, 1]]  # the others join faces of opposite windings
    label = _cluster(points, triangles, normals, half_edges)
    charts = _flatten(points, triangles, normals, half_edges, label)

    keys, number = _numbered(charts.label[:, None] * len(points) + triangles)
    source, chart = keys % len(points), keys // len(points)
    flat = (charts.axes[chart] * points[source][:, None]).sum(2)
    corners = flat[number]
    padding, texels = _scale(corners, charts)
    gap = (padding + 1) // 2
    place = pack(corners, charts.label, charts.rim, len(charts.axes), padding / gap / texels, gap)
    uvs = place(flat, chart).clamp(0, 1).float()
    return Unwrapped(source, number.int(), uvs, len(charts.axes))


@dataclass(frozen=True)
class _Clusters:
    """Of C clusters: normal (C, 3), their faces' normals by area; area (C,); outline (C,), its length. Of pairs that
    touch: u, v (E,), shared (E,) the length along which they do. label (F,): the cluster of each face. Lengths
    are in units of the square root of the whole area; float32."""

    label: Tensor
    normal: Tensor
    area: Tensor
    outline: Tensor
    u: Tensor
    v: Tensor
    shared: Tensor


def _cluster(points: Tensor, triangles: Tensor, normals: Tensor, half_edges: Tensor) -> Tensor:
    """A label for each face; faces of one label are connected and face the same way."""
    corners = points[triangles]
    area = normals.norm(dim=1) / 2
    total = area.sum()
    sides = ((corners - corners.roll(-1, 1)).norm(dim=2) / total.sqrt()).float()
    u, v = (half_edges // 3).unbind(1)
    u, v, shared = _touching(u, v, sides.reshape(-1)[half_edges[:, 0]], len(triangles))
    clusters = _Clusters(
        torch.arange(len(triangles), device=points.device),
        (normals / (2 * total)).float(),
        (area / total).float(),
        sides.sum(1),
        u,
        v,
        shared,
    )
    unit = _unit(normals).float()
    return _merged(_merged(clusters, unit, _CONE, math.inf), unit, _CRUMB_CONE, _CRUMB).label


def _merged(clusters: _Clusters, unit: Tensor, cone: float, crumb: float) -> _Clusters:
    """Merge clusters, in each round all pairs that are each other's cheapest partner.

    Normals ``unit`` (F, 3) stay within ``cone`` of their cluster's mean; of two that merge, one has an area below
    ``crumb``.
    """
    label, normal, area, rim = clusters.label, clusters.normal, clusters.area, clusters.outline
    u, v, shared = clusters.u, clusters.v, clusters.shared
    never = torch.iinfo(torch.int64).max
    while True:
        count = len(area)
        axis = _unit(normal)
        # As integers, of which GPUs find the smallest of many far sooner.
        aligned = ((unit * axis[label]).sum(1).clamp(-1, 1) * _ONE).int()
        widest = torch.full((count,), _ONE, dtype=torch.int32, device=u.device)
        spread = (widest.scatter_reduce(0, label, aligned, "amin").float() / _ONE).acos()
        middle = _unit(normal[u] + normal[v])
        turned = torch.maximum(spread[u] + _angle(axis[u], middle), spread[v] + _angle(axis[v], middle))
        outline = (rim[u] + rim[v] - 2 * shared).clamp_min(0)
        # Flat and round charts first; a little noise, for equal costs would pair few of a regular grid's faces.
        cost = turned / _CONE + 0.2 * outline / (4 * math.pi * (area[u] + area[v])).sqrt()
        edge = torch.arange(len(u), device=u.device)
        cost *= 1 + 0.05 * _noise(edge)
        allowed = (turned <= cone) & (torch.minimum(area[u], area[v]) < crumb)
        # Costs are not negative, so their bits have their order.
        rank = torch.where(allowed, (cost.view(torch.int32).long() << 32) | edge, never)
        best = torch.full((count,), never, device=u.device)
        best = best.scatter_reduce(0, u, rank, "amin").scatter_reduce(0, v, rank, "amin")
        agreed = torch.nonzero(allowed & (best[u] == rank) & (best[v] == rank))[:, 0]
        if not len(agreed):
            return _Clusters(label, normal, area, rim, u, v, shared)

        one, other = u[agreed], v[agreed]
        normal, area, rim = normal.clone(), area.clone(), rim.clone()
        normal[one] += normal[other]
        area[one] += area[other]
        rim[one] = outline[agreed]
        remains = torch.ones(count, dtype=torch.bool, device=u.device)
        remains[other] = False
        number = remains.cumsum(0) - 1
        number[other] = number[one]
        remaining = torch.nonzero(remains)[:, 0]
        normal, area, rim, label = normal[remaining], area[remaining], rim[remaining], number[label]
        u, v, shared = _touching(number[u], number[v], shared, len(remaining))


def _touching(u: Tensor, v: Tensor, shared: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each pair of different clusters once, with all the length that it shares."""
    apart = torch.nonzero(u != v)[:, 0]
    u, v = u[apart], v[apart]
    keys, number = _numbered(torch.minimum(u, v) * count + torch.maximum(u, v))
    return keys // count, keys % count, group_sums(shared[apart], number, len(keys))


def _numbered(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(the different ``keys`` in ascending order, for each key its index among them)."""
    ascending, order = torch.sort(keys.reshape(-1), stable=True)
    new = torch.ones(len(ascending), dtype=torch.bool, device=keys.device)
    new[1:] = ascending[1:] != ascending[:-1]
    number = torch.empty_like(order)
    number[order] = new.cumsum(0) - 1
    return ascending[new], number.view(keys.shape)


def _noise(index: Tensor) -> Tensor:
    """Float32 in [0, 1) that looks random."""
    mixed = (index * 0x9E3779B1) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 0x85EBCA6B) & 0xFFFFFFFF
    return ((mixed ^ (mixed >> 13)) & 0xFFFFFF).float() / 2.0**24


@dataclass(frozen=True)
class _Charts:
    """label (F,): the chart of each face; axes (C, 2, 3) float64: its plane's; rim: half-edges at charts' borders."""

    label: Tensor
    axes: Tensor
    rim: Tensor


def _flatten(points: Tensor, triangles: Tensor, normals: Tensor, half_edges: Tensor, label: Tensor) -> _Charts:
    """Project each chart along its mean normal.  Where one lies over itself, those faces are cut off; one that is too
    long, or of which little would be left, is halved; until all are in order."""
    device = points.device
    final = torch.empty_like(label)
    axes: list[Tensor] = []
    rims: list[Tensor] = []
    charts, count = 0, int(label.max()) + 1
    longest = _LONGEST * (normals.norm(dim=1).sum() / 2).sqrt()
    faces = torch.arange(len(triangles), device=device)  # those whose charts are not final
    while True:
        axis = _unit(group_sums(normals, label, count))
        plane = _plane(axis)
        uvs = torch.stack([(points[triangles] * side[label][:, None]).sum(2) for side in plane.unbind(1)], 2)
        half_edges = half_edges[label[half_edges[:, 0] // 3] == label[half_edges[:, 1] // 3]]
        outer = torch.ones(3 * len(triangles), dtype=torch.bool, device=device)
        outer[half_edges.reshape(-1)] = False
        rim = torch.nonzero(outer)[:, 0]
        cut = _overlaid(uvs, triangles, label, rim) | ((normals * axis[label]).sum(1) <= 0)
        size, cuts = (torch.bincount(each, minlength=count) for each in (label, label[cut]))
        low, high = extents(uvs.reshape(-1, 2)[rim], label[rim // 3], count)
        long = (high - low).amax(1) > longest
        bad = ((cuts > 0) | long) & (size > 1)

        good = torch.nonzero(~bad)[:, 0]
        number = charts + (~bad).cumsum(0) - 1
        final[faces] = number[label]  # of the bad ones too, until they have been cut
        axes.append(plane[good])
        rim = rim[~bad[label[rim // 3]]]
        rims.append(3 * faces[rim // 3] + rim % 3)
        charts += len(good)
        if len(good) == count:
            return _Charts(final, torch.cat(axes), torch.cat(rims))

        kept = torch.nonzero(bad[label])[:, 0]
        place = torch.full_like(label, -1)
        place[kept] = torch.arange(len(kept), device=device)
        half_edges = half_edges[bad[label[half_edges[:, 0] // 3]]]
        half_edges = 3 * place[half_edges // 3] + half_edges % 3
        faces, triangles, normals, label = faces[kept], triangles[kept], normals[kept], label[kept]
        halved = (long | (2 * cuts >= size))[label]
        label = 2 * label + torch.where(halved, _beyond_middle(uvs[kept].mean(1), label, count), cut[kept])
        pairs = half_edges // 3
        count, label = components(pairs[label[pairs[:, 0]] == label[pairs[:, 1]]], len(faces))


def _plane(axis: Tensor) -> Tensor:
    """Two axes (C, 2, 3) at right angles to ``axis`` (C, 3) and to each other."""
    helper = torch.eye(3, dtype=axis.dtype, device=axis.device)[axis.abs().argmin(1)]
    right = _unit(torch.linalg.cross(helper, axis))
    return torch.stack([right, torch.linalg.cross(axis, right)], 1)


def _beyond_middle(centre: Tensor, label: Tensor, count: int) -> Tensor:
    """Which items to cut off their group: those beyond the middle of its longer side, or else its first."""
    low, high = extents(centre, label, count)
    upright = (high - low).diff(dim=1)[:, 0] > 0
    position = torch.where(upright[label], centre[:, 1], centre[:, 0])
    middle = torch.where(upright, (low + high)[:, 1], (low + high)[:, 0]) / 2
    beyond = position > middle[label]
    parted = torch.zeros(count, dtype=torch.bool, device=label.device)
    parted[label[beyond]] = True
    item = torch.arange(len(label), device=label.device)
    first = torch.full((count,), len(label), device=label.device).scatter_reduce(0, label, item, "amin")
    return beyond | (~parted[label] & (first[label] == item))


def _overlaid(uvs: Tensor, triangles: Tensor, label: Tensor, rim: Tensor) -> Tensor:
    """Faces (F,) with an edge of their chart's rim that crosses another, or a vertex that the chart's faces go round
    more than once or where several of its fans meet."""
    overlaid = torch.zeros(len(triangles), dtype=torch.bool, device=uvs.device)
    overlaid[_crossing(uvs, rim, label) // 3] = True
    ahead, back = uvs.roll(-1, 1) - uvs, uvs.roll(1, 1) - uvs
    sine = ahead[..., 0] * back[..., 1] - ahead[..., 1] * back[..., 0]
    angle = torch.atan2(sine.abs(), (ahead * back).sum(2))
    keys, number = _numbered(label[:, None] * (triangles.max() + 1) + triangles)
    turn = group_sums(angle.reshape(-1), number.reshape(-1), len(keys))
    fans = torch.bincount(number.reshape(-1)[rim], minlength=len(keys))
    return overlaid | ((turn > 2 * math.pi + 1e-6) | (fans > 1))[number].any(1)


def _crossing(uvs: Tensor, rim: Tensor, label: Tensor) -> Tensor:
    """Those half-edges of ``rim`` that cross another of the same chart."""
    start, end = uvs.reshape(-1, 2)[rim], uvs.roll(-1, 1).reshape(-1, 2)[rim]
    chart = label[rim // 3]
    # From left to right, chart by chart.
    order = torch.argsort(torch.minimum(start, end)[:, 0], stable=True)
    order = order[torch.argsort(chart[order], stable=True)]
    found = torch.zeros(len(rim), dtype=torch.int32, device=uvs.device)
    ends = [shared(tensor[order].contiguous(), wp.vec2d) for tensor in (start, end)]
    groups = shared(chart[order].int(), wp.int32)
    launch(_sweep, len(order), [*ends, groups, len(order), shared(found, wp.int32)], uvs.device)
    return rim[order[found != 0]]


@func
def _turn(a: Vec2d, b: Vec2d, c: Vec2d) -> wp.float64:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


@func
def _cross(a: Vec2d, b: Vec2d, c: Vec2d, d: Vec2d) -> bool:
    zero = wp.float64(0.0)
    if wp.min(c[1], d[1]) > wp.max(a[1], b[1]) or wp.max(c[1], d[1]) < wp.min(a[1], b[1]):
        return False
    return _turn(a, b, c) * _turn(a, b, d) < zero and _turn(c, d, a) * _turn(c, d, b) < zero


@kernel
def _sweep(first: int, start: Vec2ds, end: Vec2ds, group: Ints, count: int, found: Ints) -> None:
    i = first + wp.tid()
    a = start[i]
    b = end[i]
    right = wp.max(a[0], b[0])
    j = int(i + 1)
    while j < count and group[j] == group[i] and wp.min(start[j][0], end[j][0]) < right:
        if _cross(a, b, start[j], end[j]):  # whoever finds a crossing, the answer is the same
            found[i] = 1
            found[j] = 1
        j += 1


def _scale(corners: Tensor, charts: _Charts) -> tuple[int, float]:
    """Padding in texels, and texels in a unit of length with which the atlas comes out near ``_RESOLUTION``."""
    a, b, c = corners.unbind(1)
    area = float(((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]).sum()) / 2
    outline = float((corners - corners.roll(-1, 1)).norm(dim=2).reshape(-1)[charts.rim].sum())
    count = len(charts.axes)
    room = _FILL * _RESOLUTION**2
    affordable = math.sqrt(0.3 * room / (4 * count))
    padding = max(1, int(min(affordable, _PADDING)), int(min(affordable / 6, _AMPLE)))
    # Half the padding around each chart, and half a cell on the average: area * t^2 + border * t + rest = room.
    border, rest = 0.75 * padding * outline, padding**2 * count
    spare = max(room - rest, 0.1 * room)
    texels = (math.sqrt(border**2 + 4 * area * spare) - border) / (2 * area)
    # One long face makes the atlas larger than that, within reason.
    low, high = extents(corners.reshape(-1, 2)[charts.rim], charts.label[charts.rim // 3], count)
    return padding, min(texels, 2 * _RESOLUTION / float((high - low).norm(dim=1).max()))


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)


def _angle(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1).clamp(-1, 1).acos()
