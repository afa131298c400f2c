"""Rays against a triangle mesh: first hits and the layers behind them.

One Warp kernel for CPU and CUDA (BVH traversal by Warp's ``Mesh``), and a brute-force reference in torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .launch import Floats, Ints, MeshId, Vec3s, kernel, launch, shared, wp


@dataclass(frozen=True)
class Hits:
    """Where rays meet the mesh, one row a ray.

    faces (R,) int32, -1 for a miss; barycentric (R, 3) float32, weights of the face's three corners in their
    order, 0 for a miss; t (R,) float32, distance along the (unit) direction, infinity for a miss.
    """

    faces: Tensor
    barycentric: Tensor
    t: Tensor


class RayMesh:
    """The acceleration structure of a mesh: build once, cast many times.

    vertices (V, 3) float32 and faces (F, 3) integer on one device, F > 0.
    Raises ValueError where a shape is wrong or there is no face.
    """

    def __init__(self, vertices: Tensor, faces: Tensor) -> None:
        if vertices.ndim != 2 or vertices.shape[1] != 3:
            raise ValueError(f"vertices must have shape (V, 3), not {tuple(vertices.shape)}.")
        if faces.ndim != 2 or faces.shape[1] != 3 or faces.shape[0] == 0:
            raise ValueError(f"faces must have shape (F, 3) with F > 0, not {tuple(faces.shape)}.")
        self.device = vertices.device
        self._points = vertices.detach().float().contiguous()
        self._indices = faces.detach().to(torch.int32).reshape(-1).contiguous()
        self._mesh = wp.Mesh(points=shared(self._points, wp.vec3), indices=shared(self._indices, wp.int32))

    def first_hits(self, origins: Tensor, directions: Tensor) -> Hits:
        """Nearest hit of each ray. origins, directions (R, 3) float32; directions of unit length.

        Both sides of a face are hit. Equal calls give equal bits.
        """
        return self._cast(origins, directions, None)

    def next_hits(self, origins: Tensor, directions: Tensor, previous: Hits) -> Hits:
        """Nearest hit strictly behind ``previous``, which holds a hit for each of the same rays."""
        return self._cast(origins, directions, previous)

    def _cast(self, origins: Tensor, directions: Tensor, previous: Hits | None) -> Hits:
        rays = len(origins)
        origins, directions = origins.float().contiguous(), directions.float().contiguous()
        if previous is None:
            start = torch.zeros(rays, device=self.device)
            skipped = torch.full((rays,), -1, dtype=torch.int32, device=self.device)
        else:
            start, skipped = previous.t.contiguous(), previous.faces.contiguous()
        faces = torch.empty(rays, dtype=torch.int32, device=self.device)
        barycentric = torch.empty(rays, 3, device=self.device)
        t = torch.empty(rays, device=self.device)
        arguments = [
            wp.uint64(self._mesh.id),
            shared(origins, wp.vec3),
            shared(directions, wp.vec3),
            shared(start, wp.float32),
            shared(skipped, wp.int32),
            shared(faces, wp.int32),
            shared(barycentric, wp.vec3),
            shared(t, wp.float32),
        ]
        launch(_cast_rays, rays, arguments, self.device)
        return Hits(faces, barycentric, t)


@kernel
def _cast_rays(
    first: int,
    mesh: MeshId,
    origins: Vec3s,
    directions: Vec3s,
    start: Floats,
    skipped: Ints,
    faces: Ints,
    barycentric: Vec3s,
    t: Floats,
) -> None:
    i = first + wp.tid()
    direction = directions[i]
    faces[i] = -1
    barycentric[i] = wp.vec3(0.0, 0.0, 0.0)
    t[i] = wp.inf
    # A few float32 steps: rounding must not find the previous face again. Grazing rays need more than one.
    step = wp.max(start[i], 1.0) * 1.0e-6
    travelled = float(start[i])
    if skipped[i] >= 0:
        travelled += step
    query = wp.mesh_query_ray(mesh, origins[i] + direction * travelled, direction, 1.0e10)
    while query.result and query.face == skipped[i]:
        step *= 2.0
        travelled += step
        query = wp.mesh_query_ray(mesh, origins[i] + direction * travelled, direction, 1.0e10)
    if query.result:
        faces[i] = query.face
        barycentric[i] = wp.vec3(query.u, query.v, 1.0 - query.u - query.v)
        t[i] = travelled + query.t


def ray_hits_reference(vertices: Tensor, faces: Tensor, origins: Tensor, directions: Tensor, layers: int) -> list[Hits]:
    """Layers of hits from near to far, by testing every ray with every face in float64 (Möller-Trumbore)."""
    a, b, c = (vertices.double()[faces[:, k].long()] for k in range(3))
    origin, direction = origins.double()[:, None], directions.double()[:, None]
    normal_v = torch.linalg.cross(direction, (c - a)[None], dim=-1)
    determinant = ((b - a)[None] * normal_v).sum(-1)
    safe = torch.where(determinant.abs() < 1e-300, torch.ones_like(determinant), determinant)
    offset = origin - a[None]
    weight_b = (offset * normal_v).sum(-1) / safe
    normal_u = torch.linalg.cross(offset, (b - a)[None].expand_as(offset), dim=-1)
    weight_c = (direction * normal_u).sum(-1) / safe
    t = ((c - a)[None] * normal_u).sum(-1) / safe
    inside = (weight_b >= 0) & (weight_c >= 0) & (weight_b + weight_c <= 1) & (t >= 0)
    t = torch.where(inside & (determinant.abs() >= 1e-300), t, torch.inf)
    order = t.argsort(dim=1, stable=True)
    result = []
    for layer in range(min(layers, len(faces))):
        index = order[:, layer : layer + 1]
        distance = t.gather(1, index)[:, 0]
        hit = distance.isfinite()
        weights = [weight_b.gather(1, index)[:, 0], weight_c.gather(1, index)[:, 0]]
        barycentric = torch.stack([1 - weights[0] - weights[1], *weights], -1).float()
        result.append(
            Hits(
                torch.where(hit, index[:, 0], -1).int(),
                torch.where(hit[:, None], barycentric, 0.0),
                distance.float(),
            )
        )
    return result
