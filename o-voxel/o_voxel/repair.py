"""Cleaning of triangle meshes.

Every function takes vertices (V, 3) float32 and faces (F, 3) int32 and returns such a pair, on the same device.
Bad meshes (NaN, indices out of range, wrong shapes) raise ValueError naming the argument.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_mesh
from .groups import group_sums

# A component whose volume is this small a part of area^1.5 has no inside (a sphere has 0.094).
_FLAT = 1e-3


def fill_holes(vertices: Tensor, faces: Tensor, max_hole_perimeter: float = 0.03) -> tuple[Tensor, Tensor]:
    """Close boundary loops shorter than ``max_hole_perimeter`` with a fan around their centre.

    Which loops count is as in CuMesh.fill_holes: edges of one face, chained over the vertices that have two of
    them and touch no edge of three or more faces; a chain is a loop if it is closed. New vertices (the mean of
    the edges' midpoints) and faces are appended in the order of the loops' smallest edges. Unlike there, each
    new face is wound like its neighbour.
    """
    check_mesh(vertices, faces)
    edges = _edges(faces, len(vertices))
    rim = torch.nonzero(edges.counts == 1)[:, 0]
    half = edges.order[edges.offsets[rim]]
    start, end = faces.reshape(-1)[half].long(), faces[:, [1, 2, 0]].reshape(-1)[half].long()

    ends = torch.cat([start, end])
    owner = torch.arange(len(rim), device=faces.device).repeat(2)
    simple = torch.bincount(ends, minlength=len(vertices)) == 2
    crowded = edges.keys[edges.counts > 2]
    simple[crowded // len(vertices)] = simple[crowded % len(vertices)] = False
    by_vertex = torch.argsort(ends, stable=True)
    pairs = owner[by_vertex[simple[ends[by_vertex]]]].reshape(-1, 2)
    loops, loop = components(pairs, len(rim))

    # A closed chain meets each of its vertices at least twice.
    visits = torch.unique(ends * loops + loop.repeat(2), return_counts=True)
    closed = torch.ones(loops, dtype=torch.bool, device=faces.device)
    closed[visits[0][visits[1] < 2] % max(loops, 1)] = False
    length = (vertices[end] - vertices[start]).norm(dim=1).double()
    chosen = closed & (group_sums(length, loop, loops) < max_hole_perimeter)

    number = torch.cumsum(chosen, 0) - 1
    used = chosen[loop]
    start, end, loop = start[used], end[used], number[loop[used]]
    count = int(chosen.sum())
    centres = group_sums((vertices[start] + vertices[end]).double() / 2, loop, count)
    centres /= torch.bincount(loop, minlength=count)[:, None]
    by_loop = torch.argsort(loop, stable=True)
    fans = torch.stack([end, start, loop + len(vertices)], dim=1)[by_loop]
    return torch.cat([vertices, centres.to(vertices.dtype)]), torch.cat([faces, fans.to(faces.dtype)])


def remove_duplicate_faces(vertices: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the first of all faces on the same three vertices, whatever their winding; drop unused vertices."""
    check_mesh(vertices, faces)
    low, middle, high = torch.sort(faces.long(), dim=1).values.unbind(1)
    order = torch.argsort(high, stable=True)
    key = (low * len(vertices) + middle)[order]
    by_key = torch.argsort(key, stable=True)
    order, key = order[by_key], key[by_key]
    repeated = torch.zeros(len(faces), dtype=torch.bool, device=faces.device)
    repeated[order[1:]] = (key[1:] == key[:-1]) & (high[order[1:]] == high[order[:-1]])
    return _compact(vertices, faces[~repeated])


def remove_degenerate_faces(vertices: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
    """Drop faces that use a vertex twice or have no area (below 1e-12 of the longest edge squared)."""
    check_mesh(vertices, faces)
    a, b, c = vertices.double()[faces.long()].unbind(1)
    longest = torch.stack([((p - q) ** 2).sum(1) for p, q in ((a, b), (b, c), (c, a))]).amax(0)
    area = torch.linalg.cross(b - a, c - a).norm(dim=1) / 2
    distinct = (faces != faces[:, [1, 2, 0]]).all(dim=1)
    return _compact(vertices, faces[distinct & (area > 1e-12 * longest)])


def repair_non_manifold_edges(vertices: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
    """Cut the mesh open along edges of three or more faces and at vertices where fans of faces merely touch.

    Corners stay one vertex where faces are joined by an edge of exactly two faces; every other meeting gets its
    own copy of the vertex, as in CuMesh.repair_non_manifold_edges.
    """
    check_mesh(vertices, faces)
    flat = faces.reshape(-1).long()
    one, other = manifold_edges(faces, len(vertices)).unbind(1)
    aligned = flat[one] == flat[other]
    one_end, other_end = _next_corner(one), _next_corner(other)
    pairs = torch.cat(
        [
            torch.stack([one, torch.where(aligned, other, other_end)], 1),
            torch.stack([one_end, torch.where(aligned, other_end, other)], 1),
        ]
    )
    count, label = components(pairs, len(flat))
    source = torch.empty(count, dtype=torch.int64, device=faces.device)
    source[label] = flat
    return vertices[source], label.reshape(-1, 3).to(faces.dtype)


def remove_small_components(vertices: Tensor, faces: Tensor, min_area: float) -> tuple[Tensor, Tensor]:
    """Drop pieces (faces joined by edges of exactly two faces) whose area is below ``min_area``."""
    check_mesh(vertices, faces)
    count, piece = components(manifold_edges(faces, len(vertices)) // 3, len(faces))
    areas = group_sums(_normals(vertices, faces).norm(dim=1).double() / 2, piece, count)
    return _compact(vertices, faces[areas[piece] >= min_area])


def unify_face_orientations(vertices: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
    """Wind all faces of a piece alike, outwards: so that its signed volume is positive.

    Pieces that enclose nothing keep the winding that most of their area has. Pieces with one side only, on which
    no winding is right everywhere, are wound alike along a tree that spans them.
    """
    check_mesh(vertices, faces)
    if not len(faces):
        return vertices, faces
    half_edges = manifold_edges(faces, len(vertices))
    flat = faces.reshape(-1)
    # Neighbours wound alike run along their edge in opposite directions.
    odd = flat[half_edges[:, 0]] == flat[half_edges[:, 1]]
    trees = _spanning_trees(half_edges // 3, odd, len(faces))
    count, piece = _numbered(trees >> 1)
    flipped = trees & 1 == 1
    normals = _normals(vertices, faces).double()
    normals[flipped] *= -1
    corners = vertices.double()[faces.long()]
    area = normals.norm(dim=1) / 2

    middle = corners.mean(dim=1)
    kept = torch.where(flipped, -area, area)
    totals = group_sums(torch.cat([torch.stack([area, kept], 1), middle * area[:, None]], dim=1), piece, count)
    piece_area, kept_area = totals[:, 0], totals[:, 1]
    centre = totals[:, 2:] / piece_area.clamp_min(1e-300)[:, None]
    volume = group_sums(((middle - centre[piece]) * normals).sum(1), piece, count) / 6
    hollow = volume.abs() < _FLAT * piece_area**1.5
    inside_out = torch.where(hollow, kept_area < 0, volume < 0)
    flipped = flipped ^ inside_out[piece]
    return vertices, torch.where(flipped[:, None], faces[:, [0, 2, 1]], faces)


def manifold_edges(faces: Tensor, vertex_count: int) -> Tensor:
    """Both half-edges (M, 2), numbered 3 * face + corner, of each edge that has exactly two."""
    edges = _edges(faces, vertex_count)
    begin = edges.offsets[edges.counts == 2]
    return torch.stack([edges.order[begin], edges.order[begin + 1]], dim=1)


@dataclass(frozen=True)
class _Edges:
    """Undirected edges in the order of (smaller vertex, larger vertex).

    keys (E,): smaller * vertex count + larger; counts (E,): faces at each; order (3F,): half-edges
    3 * face + corner grouped by edge; offsets (E,): where an edge's group begins.
    """

    keys: Tensor
    counts: Tensor
    order: Tensor
    offsets: Tensor


def _edges(faces: Tensor, vertex_count: int) -> _Edges:
    start, end = faces.reshape(-1).long(), faces[:, [1, 2, 0]].reshape(-1).long()
    keys, order = torch.sort(torch.minimum(start, end) * vertex_count + torch.maximum(start, end), stable=True)
    keys, counts = torch.unique_consecutive(keys, return_counts=True)
    return _Edges(keys, counts, order, torch.cumsum(counts, 0) - counts)


def _next_corner(half_edge: Tensor) -> Tensor:
    return half_edge - half_edge % 3 + (half_edge + 1) % 3


def components(pairs: Tensor, count: int) -> tuple[int, Tensor]:
    """Connected components of ``count`` nodes, numbered by their smallest node: (how many, label of each node).

    pairs: (P, 2) int64, the nodes that are joined.
    """
    return _numbered(_spanning_trees(pairs, torch.zeros_like(pairs[:, 0]), count) >> 1)


def _numbered(root: Tensor) -> tuple[int, Tensor]:
    """How many different nodes are ``root`` (N,) of some node, and which of these each node has."""
    first = root == torch.arange(len(root), device=root.device)
    return int(first.sum()), (torch.cumsum(first, 0) - 1)[root]


def _spanning_trees(pairs: Tensor, odd: Tensor, count: int) -> Tensor:
    """A tree over each component: for each node (count,) int64 twice the component's smallest node, plus 1 where
    the tree's path from there to the node crosses an odd number of ``odd`` pairs (P,).

    Each root hooks onto its smallest neighbour below itself; the paths of these roots are halved until they are
    one step long, and pairs are replaced by the roots of their ends, until none are left (S. Liu and R. Tarjan,
    Simple concurrent labeling algorithms for connected components, 2019: O(log^2 n) steps).
    """
    link = 2 * torch.arange(count, device=pairs.device)
    one, other = (2 * pairs + torch.stack([torch.zeros_like(odd), odd], dim=1)).unbind(1)
    while True:
        joining = one >> 1 != other >> 1
        one, other = one[joining], other[joining]
        if not len(one):
            break
        low, high = torch.minimum(one, other), torch.maximum(one, other)
        link.scatter_reduce_(0, high >> 1, low ^ (high & 1), "amin")
        hooked = torch.zeros(count, dtype=torch.bool, device=pairs.device)
        hooked[high >> 1] = True
        _shorten(link, torch.nonzero(hooked)[:, 0])
        one, other = link[low >> 1] ^ (low & 1), link[high >> 1] ^ (high & 1)
    _shorten(link, torch.arange(count, device=pairs.device))
    return link


def _shorten(link: Tensor, nodes: Tensor) -> None:
    """Let each of ``nodes`` point to its root; between them must lie nothing but ``nodes``."""
    while True:
        ahead = link[nodes]
        further = link[ahead >> 1] ^ (ahead & 1)
        if torch.equal(ahead, further):
            return
        link[nodes] = further


def _normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Face normals, twice as long as the face's area."""
    a, b, c = vertices[faces.long()].unbind(1)
    return torch.linalg.cross(b - a, c - a)


def _compact(vertices: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
    """The same mesh without vertices that no face uses."""
    used = torch.zeros(len(vertices), dtype=torch.bool, device=vertices.device)
    used[faces.reshape(-1).long()] = True
    number = torch.cumsum(used, 0) - 1
    return vertices[used], number[faces.long()].to(faces.dtype)
