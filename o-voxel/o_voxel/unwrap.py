"""UV unwrapping: nearly flat charts, laid out in a square.

Faces are clustered into charts that project onto a plane without folding; ``pack`` finds the charts their places.
All runs on the mesh's own device, but for the last merges of clusters and the choice of places: these go one by one,
on the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import check_mesh
from .groups import group_sums
from .launch import Floats, Ints, Vec2d, Vec3, Vec3s, func, kernel, launch, shared, wp
from .pack import extents, pack
from .repair import components, manifold_edges

wp.set_module_options({"cpu_compiler_flags": ""})  # also runs beside a GPU: for any processor, see prebuild

if TYPE_CHECKING:
    Vec2ds = Any
else:
    Vec2ds = wp.array(dtype=wp.vec2d)

# Normals of a chart lie within this angle of its plane's: lengths shrink by a quarter at most, and the two sides
# of a right-angled edge never share a chart.
_CONE = wp.constant(math.radians(40))
# Charts of less than this part of the whole area may join a neighbour up to the wider angle.
_CRUMB, _CRUMB_CONE = 1e-4, math.radians(70)
# In texels of a 2048 atlas: so charts stay apart down to a mip level of 256 texels, and a filtered look-up inside a
# chart meets none that lies nearer to another down to 1024. Few charts can have more, for two levels more.
_RESOLUTION, _PADDING, _AMPLE = 2048, 8, 16
_FILL = 0.85  # of the atlas, what charts and their padding cover
_FEW = 1000  # pairs that are merged sooner one by one than all at once, with the many rounds that follow
_LOOSE = wp.constant(math.radians(0.05))  # half of what a cluster's spread may be overrated by
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
    """Merge clusters that are each other's cheapest partner, until none may merge; ``clusters`` is spent.

    Normals ``unit`` (F, 3) stay within ``cone`` of their cluster's mean; of two that merge, one has an area below
    ``crumb``. All such pairs of a round merge at once while there are many; later ones mostly wait for one another,
    and merge one by one.
    """
    device = unit.device
    while True:
        label, u, v, count = clusters.label, clusters.u, clusters.v, len(clusters.area)
        # Bits of floats that are not negative have their order, and of integers GPUs find the largest far sooner.
        chord = (unit - _unit(clusters.normal)[label]).square().sum(1).view(torch.int32)
        widest = torch.zeros(count, dtype=torch.int32, device=device).scatter_reduce(0, label, chord, "amax")
        spread = 2 * (widest.view(torch.float32).sqrt() / 2).clamp_max(1).asin()
        cost = torch.empty_like(clusters.shared)
        launch(_find_costs, len(u), [_graph(clusters, spread, cost, cone, crumb)], device)
        rank = (cost.view(torch.int32).long() << 32) | torch.arange(len(u), device=device)
        best = torch.full((count,), torch.iinfo(torch.int64).max, device=device)
        best = best.scatter_reduce(0, u, rank, "amin").scatter_reduce(0, v, rank, "amin")
        agreed = torch.nonzero((cost < torch.inf) & (best[u] == rank) & (best[v] == rank))[:, 0]
        if not len(agreed):
            return clusters
        if len(agreed) < _FEW:
            return _merged_one_by_one(clusters, unit, spread, cost, cone, crumb)
        one, other = u[agreed], v[agreed]
        clusters.normal[one] += clusters.normal[other]
        clusters.area[one] += clusters.area[other]
        clusters.outline[one] += clusters.outline[other] - 2 * clusters.shared[agreed]
        into = torch.arange(count, device=device)
        into[other] = one
        clusters = _united(clusters, into)


def _merged_one_by_one(
    clusters: _Clusters, unit: Tensor, spread: Tensor, cost: Tensor, cone: float, crumb: float
) -> _Clusters:
    """As ``_merged``, on the host; ``spread`` (C,): the largest angle of a cluster's normals with their mean."""
    device, count = unit.device, len(spread)
    # Copies also where they are there already: the pairs' lengths are summed up anew in the end.
    host = _Clusters(**{name: tensor.to("cpu", copy=True) for name, tensor in vars(clusters).items()})
    graph = _graph(host, spread.cpu(), cost.cpu(), cone, crumb)
    begin = torch.zeros(count + 1, dtype=torch.int32, device=device)
    begin[1:] = torch.bincount(clusters.label, minlength=count).cumsum(0)
    faces = _Faces()
    faces.unit = shared(unit[torch.argsort(clusters.label, stable=True)].cpu(), wp.vec3)
    faces.begin = shared(begin.cpu(), wp.int32)
    faces.following = shared(torch.full((count,), -1, dtype=torch.int32), wp.int32)
    faces.last = shared(torch.arange(count, dtype=torch.int32), wp.int32)
    faces.centre = shared(_unit(host.normal), wp.vec3)
    faces.radius = shared(spread.to("cpu", copy=True), wp.float32)
    first, ahead = torch.full((count,), -1, dtype=torch.int32), torch.empty(2 * len(cost), dtype=torch.int32)
    known, into = torch.zeros_like(first), torch.arange(count, dtype=torch.int32)
    lists = [shared(tensor, wp.int32) for tensor in (first, ahead, known, into)]
    launch(_follow_chains, 1, [graph, faces, *lists], torch.device("cpu"))
    normal, area, outline = host.normal.to(device), host.area.to(device), host.outline.to(device)
    return _united(replace(clusters, normal=normal, area=area, outline=outline), into.long().to(device))


def _united(clusters: _Clusters, into: Tensor) -> _Clusters:
    """Each cluster as a part of the one that ``into`` (C,) names, whose sums are up to date."""
    remains = into == torch.arange(len(into), device=into.device)
    number = (remains.cumsum(0) - 1)[into]
    left = torch.nonzero(remains)[:, 0]
    pairs = _touching(number[clusters.u], number[clusters.v], clusters.shared, len(left))
    normal, area, outline = clusters.normal[left], clusters.area[left], clusters.outline[left]
    return _Clusters(number[clusters.label], normal, area, outline, *pairs)


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


@wp.struct
class _Graph:
    """The limits; of clusters normal, area, outline and spread; of pairs that touch their shared length and cost.
    Pair i has the ends 2i and 2i + 1, each at a cluster, or at -1 where another pair took its place."""

    cone: float
    crumb: float
    normal: Vec3s
    area: Floats
    outline: Floats
    spread: Floats
    ends: Ints
    length: Floats
    cost: Floats


def _graph(clusters: _Clusters, spread: Tensor, cost: Tensor, cone: float, crumb: float) -> Any:
    graph = _Graph()
    graph.cone, graph.crumb = cone, crumb
    graph.normal = shared(clusters.normal, wp.vec3)
    graph.area = shared(clusters.area, wp.float32)
    graph.outline = shared(clusters.outline, wp.float32)
    graph.spread = shared(spread, wp.float32)
    graph.ends = shared(torch.stack([clusters.u, clusters.v], 1).int().view(-1), wp.int32)
    graph.length = shared(clusters.shared, wp.float32)
    graph.cost = shared(cost, wp.float32)
    return graph


@func
def _angle(apart: float) -> float:
    """Between unit vectors that far apart. Small angles are exact, too: many of them are added up."""
    return 2.0 * wp.asin(wp.min(apart / 2.0, 1.0))


@func
def _cost(graph: _Graph, i: int) -> float:
    """Of uniting the clusters of pair i; infinite where they may not unite."""
    a = graph.ends[2 * i]
    b = graph.ends[2 * i + 1]
    middle = wp.normalize(graph.normal[a] + graph.normal[b])
    turned_a = graph.spread[a] + _angle(wp.length(wp.normalize(graph.normal[a]) - middle))
    turned_b = graph.spread[b] + _angle(wp.length(wp.normalize(graph.normal[b]) - middle))
    turned = wp.max(turned_a, turned_b)
    if turned > graph.cone or wp.min(graph.area[a], graph.area[b]) >= graph.crumb:
        return wp.inf
    # Flat and round charts first; a little noise, for equal costs would pair few of a regular grid's faces.
    outline = wp.max(graph.outline[a] + graph.outline[b] - 2.0 * graph.length[i], 0.0)
    cost = turned / _CONE + 0.2 * outline / wp.sqrt(4.0 * wp.pi * (graph.area[a] + graph.area[b]))
    return cost * (1.0 + 0.05 * wp.randf(wp.rand_init(0, i)))


@kernel
def _find_costs(first: int, graph: _Graph) -> None:
    i = first + wp.tid()
    graph.cost[i] = _cost(graph, i)


@wp.struct
class _Faces:
    """Cluster c, as it was, had the normals ``unit`` from begin[c] to begin[c + 1]. Of those that it has united with
    since, the next is following[c], or -1, and the last last[c]. All its normals are within radius[c] of centre[c]."""

    unit: Vec3s
    begin: Ints
    following: Ints
    last: Ints
    centre: Vec3s
    radius: Floats


@func
def _radius(axis: Vec3, c: int, faces: _Faces) -> float:
    """The largest angle of a cluster's normals with ``axis``."""
    widest = wp.float32(0.0)
    part = wp.int32(c)
    while part >= 0:
        for i in range(faces.begin[part], faces.begin[part + 1]):
            widest = wp.max(widest, wp.length(faces.unit[i] - axis))
        part = faces.following[part]
    return _angle(widest)


@func
def _spread_together(a: int, b: int, graph: _Graph, faces: _Faces) -> float:
    """The largest angle of two clusters' normals with their mean, or a little more."""
    large = a
    small = b
    if graph.area[a] < graph.area[b]:
        large = b
        small = a
    axis = wp.normalize(graph.normal[a] + graph.normal[b])
    centre = faces.centre[large]
    radius = faces.radius[large]
    # To look at all normals of a large cluster whenever it grows would take long.
    if _angle(wp.length(axis - centre)) > _LOOSE:
        centre = axis
        radius = _radius(axis, large, faces)
    faces.centre[a] = centre
    faces.radius[a] = wp.max(radius, _radius(centre, small, faces))
    return faces.radius[a] + _angle(wp.length(axis - centre))


@func
def _cheapest(c: int, graph: _Graph, first: Ints, ahead: Ints) -> int:
    """The end at cluster c of its cheapest pair, or -1 if none may unite."""
    best = wp.int32(-1)
    lowest = wp.float32(wp.inf)
    end = first[c]
    while end >= 0:
        if graph.ends[end] == c:
            cost = graph.cost[end // 2]
            if cost < lowest or (cost == lowest and end // 2 < best // 2):
                lowest = cost
                best = end
        end = ahead[end]
    return best


@func
def _relink(c: int, a: int, head: int, graph: _Graph, first: Ints, ahead: Ints, known: Ints) -> int:
    """Make the ends at cluster c ends at a, in front of those from ``head`` on: the first of all.

    known[n] is the end at a of its pair with n, if there is such a pair; a second one adds its length and goes.
    """
    end = wp.int32(first[c])
    while end >= 0:
        behind = ahead[end]
        if graph.ends[end] == c:
            neighbour = graph.ends[end ^ 1]
            twin = known[neighbour]
            if twin != end and graph.ends[twin] == a and graph.ends[twin ^ 1] == neighbour:
                graph.length[twin // 2] = graph.length[twin // 2] + graph.length[end // 2]
                graph.ends[end] = -1
                graph.ends[end ^ 1] = -1
            else:
                graph.ends[end] = a
                known[neighbour] = end
                ahead[end] = head
                head = end
        end = behind
    return head


@func
def _unite(a: int, b: int, i: int, graph: _Graph, faces: _Faces, first: Ints, ahead: Ints, known: Ints) -> None:
    """Make clusters a and b of pair i one cluster, a."""
    graph.spread[a] = _spread_together(a, b, graph, faces)
    faces.following[faces.last[a]] = b
    faces.last[a] = faces.last[b]
    graph.normal[a] = graph.normal[a] + graph.normal[b]
    graph.area[a] = graph.area[a] + graph.area[b]
    graph.outline[a] = graph.outline[a] + graph.outline[b] - 2.0 * graph.length[i]
    graph.ends[2 * i] = -1
    graph.ends[2 * i + 1] = -1
    first[a] = _relink(a, a, -1, graph, first, ahead, known)
    first[a] = _relink(b, a, first[a], graph, first, ahead, known)
    end = first[a]
    while end >= 0:
        graph.cost[end // 2] = _cost(graph, end // 2)
        end = ahead[end]


@kernel
def _follow_chains(
    nothing: int, graph: _Graph, faces: _Faces, first: Ints, ahead: Ints, known: Ints, into: Ints
) -> None:
    """Nearest-neighbour chains: from a cluster to its cheapest partner, to that one's and so on costs fall, until
    two are each other's. Ends at cluster c are first[c], ahead[first[c]] and so on, some of them gone."""
    for end in range(graph.ends.shape[0]):
        ahead[end] = first[graph.ends[end]]
        first[graph.ends[end]] = end
    merging = wp.int32(1)
    while merging != 0:
        merging = wp.int32(0)
        for start in range(into.shape[0]):
            here = wp.int32(-1)
            if into[start] == start:
                here = _cheapest(start, graph, first, ahead)
            while here >= 0:
                a = graph.ends[here]
                b = graph.ends[here ^ 1]
                there = _cheapest(b, graph, first, ahead)
                if there == (here ^ 1):
                    _unite(a, b, here // 2, graph, faces, first, ahead, known)
                    into[b] = a
                    merging = wp.int32(1)
                    there = _cheapest(a, graph, first, ahead)
                here = there
    for c in range(into.shape[0]):
        if into[c] == c:
            part = faces.following[c]
            while part >= 0:
                into[part] = c
                part = faces.following[part]


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
