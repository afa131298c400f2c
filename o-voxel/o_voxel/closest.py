"""Closest points on a triangle mesh."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_mesh, check_points
from .launch import Ints, MeshId, Vec3s, kernel, launch, shared, wp


@dataclass(frozen=True)
class ClosestPoints:
    """One row a query: points (P, 3) float32 on the mesh; faces (P,) int64 that hold them; barycentric (P, 3)
    float32, the weights of that face's corners; distance (P,) float32 from query to point."""

    points: Tensor
    faces: Tensor
    barycentric: Tensor
    distance: Tensor


class Surface:
    """The search tree of a mesh: build once, query many times.

    vertices (V, 3) float, faces (F, 3) integer, F > 0; raises ValueError naming the argument otherwise.
    Queries run where the mesh lies, on a CPU with a Warp kernel over all of torch's threads.
    """

    def __init__(self, vertices: Tensor, faces: Tensor) -> None:
        check_mesh(vertices, faces)
        if not len(faces):
            raise ValueError("faces must hold at least one face.")
        # Warp does not own this memory: it has to live as long as the tree.
        self._vertices = vertices.detach().float().contiguous()
        self._indices = faces.detach().int().reshape(-1).contiguous()
        self._mesh = wp.Mesh(points=shared(self._vertices, wp.vec3), indices=shared(self._indices, wp.int32))

    def closest(self, points: Tensor) -> ClosestPoints:
        """The closest point of the surface to each of ``points`` (P, 3), to float32 precision.

        Faces without area may be passed over.
        """
        check_points("points", points)
        count, device = len(points), self._vertices.device
        queries = points.detach().float().contiguous()
        face = torch.zeros(count, dtype=torch.int32, device=device)
        weights = torch.zeros((count, 3), dtype=torch.float32, device=device)
        arguments = [
            self._mesh.id,
            shared(queries, wp.vec3),
            shared(face, wp.int32),
            shared(weights, wp.vec3),
        ]
        launch(_closest, count, arguments, device)
        corners = self._vertices[self._indices.view(-1, 3)[face.long()].long()]
        found = (corners * weights[:, :, None]).sum(1)
        return ClosestPoints(found, face.long(), weights, (found - queries).norm(dim=1))


def closest_point(vertices: Tensor, faces: Tensor, points: Tensor) -> ClosestPoints:
    """``Surface(vertices, faces).closest(points)``, for one batch of queries."""
    return Surface(vertices, faces).closest(points)


def closest_point_reference(vertices: Tensor, faces: Tensor, points: Tensor) -> ClosestPoints:
    """``closest_point`` by comparing every point with every face, in float64: for tests."""
    check_mesh(vertices, faces)
    a, b, c = vertices.double()[faces.long()][None].unbind(2)
    p = points.double()[:, None]
    candidates = [_on_plane(a, b, c, p), _on_edge(a, b, p, 0), _on_edge(b, c, p, 1), _on_edge(c, a, p, 2)]
    weights = torch.stack([w.expand(len(points), len(faces), 3) for w in candidates], 2)
    corners = torch.stack([a, b, c], 2)[:, :, None]
    distance = ((weights[..., None] * corners).sum(3) - p[:, :, None]).norm(dim=-1)
    distance = torch.where((weights >= 0).all(-1), distance, torch.inf)
    best, index = distance.flatten(1).min(dim=1)
    face, chosen = index // 4, weights.flatten(1, 2)[torch.arange(len(points)), index]
    found = (chosen[:, :, None] * vertices.double()[faces.long()[face]]).sum(1)
    return ClosestPoints(found.float(), face, chosen.float(), best.float())


def _on_plane(a: Tensor, b: Tensor, c: Tensor, p: Tensor) -> Tensor:
    """Weights of p's foot on the plane of each triangle; some are negative where it falls outside."""
    u, v, w = b - a, c - a, p - a
    uu, uv, vv = (u * u).sum(-1), (u * v).sum(-1), (v * v).sum(-1)
    wu, wv = (w * u).sum(-1), (w * v).sum(-1)
    scale = uu * vv - uv * uv
    second, third = (vv * wu - uv * wv) / scale, (uu * wv - uv * wu) / scale
    return torch.stack([1 - second - third, second, third], -1).nan_to_num(-1.0, -1.0, -1.0)


def _on_edge(a: Tensor, b: Tensor, p: Tensor, first: int) -> Tensor:
    """Weights of the point closest to p on the edge from corner ``first`` to the next."""
    u = b - a
    t = (((p - a) * u).sum(-1) / (u * u).sum(-1).clamp_min(1e-300)).clamp(0, 1)
    return torch.stack([1 - t, t, torch.zeros_like(t)], -1).roll(first, -1)


@kernel
def _closest(first: int, mesh: MeshId, points: Vec3s, faces: Ints, weights: Vec3s) -> None:
    i = first + wp.tid()
    query = wp.mesh_query_point_no_sign(mesh, points[i], 1.0e30)
    faces[i] = query.face
    weights[i] = wp.vec3(query.u, query.v, 1.0 - query.u - query.v)
