"""Known textured shapes and their voxels, for tests of everything behind the decoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from o_voxel.dual_grid import flexible_dual_grid_to_mesh
from torch import Tensor

from trellis2.mesh import Asset, MaterialVoxels, Mesh

Points = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """A solid in the object frame, all functions on (N, 3) points.

    inside -> (N,) bool; project -> (N, 3) closest point of the surface, or near it; material -> (N, 6).
    """

    inside: Points
    project: Points
    material: Points


def cube(resolution: int, half: float = 0.43) -> Shape:
    """An axis-aligned cube with one colour per face, its planes through the centres of voxels."""
    half = (int(half * resolution) + 0.5) / resolution
    colours = torch.tensor(
        [
            [0.70, 0.35, 0.35, 0.0, 0.5, 1.0],  # -x
            [0.35, 0.65, 0.40, 0.1, 0.6, 1.0],
            [0.35, 0.45, 0.75, 0.2, 0.7, 1.0],
            [0.65, 0.60, 0.30, 0.3, 0.4, 1.0],
            [0.60, 0.40, 0.65, 0.4, 0.3, 1.0],
            [0.40, 0.60, 0.60, 0.5, 0.8, 1.0],
        ]
    )

    def project(points: Tensor) -> Tensor:
        # A coordinate within the voxel of a face plane goes onto it: edges and corners stay sharp.
        near = (points.abs() - half).abs() < 0.6 / resolution
        return torch.where(near, points.sign() * half, points).clamp(-half, half)

    def material(points: Tensor) -> Tensor:
        axis = points.abs().argmax(dim=1)
        side = torch.gather(points, 1, axis[:, None])[:, 0] > 0
        return colours[2 * axis + side]

    return Shape(lambda p: (p.abs() < half).all(dim=1), project, material)


def bumpy_sphere(radius: float = 0.36, bump: float = 0.03) -> Shape:
    """A sphere with bumps and a smooth colour pattern."""

    def height(points: Tensor) -> Tensor:
        d = torch.nn.functional.normalize(points, dim=1)
        return radius + bump * torch.sin(7 * d[:, 0] + 1) * torch.sin(6 * d[:, 1]) * torch.cos(5 * d[:, 2])

    def material(points: Tensor) -> Tensor:
        d = torch.nn.functional.normalize(points, dim=1)
        waves = torch.stack([torch.sin(5 * d[:, 0]), torch.sin(4 * d[:, 1] + 1), torch.cos(6 * d[:, 2])], 1)
        rest = torch.tensor([0.25, 0.6, 1.0]).expand(len(points), 3)
        return torch.cat([0.5 + 0.35 * waves, rest], dim=1)

    return Shape(
        lambda p: p.norm(dim=1) < height(p),
        lambda p: torch.nn.functional.normalize(p, dim=1) * height(p)[:, None],
        material,
    )


def voxelise(shape: Shape, resolution: int) -> Asset:
    """The shape as the model would give it: a dual-grid mesh, and material on the same active voxels."""
    n = resolution
    steps = torch.arange(n + 1) / n - 0.5
    corners = torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij"), -1)
    inside = torch.cat([shape.inside(part.reshape(-1, 3)) for part in corners.split(16)]).view([n + 1] * 3)
    flags = torch.zeros((n, n, n, 3), dtype=torch.bool)
    # A voxel's flag speaks of its edge that ends in its far corner.
    far = slice(1, n + 1)
    flags[..., 0] = inside[:-1, far, far] != inside[far, far, far]
    flags[..., 1] = inside[far, :-1, far] != inside[far, far, far]
    flags[..., 2] = inside[far, far, :-1] != inside[far, far, far]

    crossing = torch.zeros((n, n, n, 3))
    count = torch.zeros((n, n, n, 1))
    active = torch.nonzero(flags)
    voxel, axis = active[:, :3], active[:, 3]
    middle = (voxel + 1).float() - 0.5 * torch.eye(3)[axis]
    for i in (0, 1):
        for j in (0, 1):
            step = torch.zeros_like(voxel)
            step.scatter_(1, (axis[:, None] + 1) % 3, i)
            step.scatter_(1, (axis[:, None] + 2) % 3, j)
            cell = tuple((voxel + step).T)
            crossing.index_put_(cell, middle, accumulate=True)
            count.index_put_(cell, torch.ones(len(voxel), 1), accumulate=True)
    coords = torch.nonzero(count[..., 0])
    where = tuple(coords.T)
    mean = crossing[where] / count[where]
    vertices = (shape.project(mean / n - 0.5) + 0.5) * n
    offsets = (vertices - coords).clamp(0, 1)
    mesh = flexible_dual_grid_to_mesh(coords.int(), offsets, flags[where], None, [[-0.5] * 3, [0.5] * 3], grid_size=n)
    attributes = shape.material(shape.project((coords + 0.5) / n - 0.5))
    return Asset(Mesh(*mesh), MaterialVoxels(coords.int(), attributes, 1.0 / n))


def surface_points(vertices: Tensor, faces: Tensor, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(face (P,), weights of its corners (P, 3)) of points spread evenly over the surface."""
    generator = torch.Generator().manual_seed(seed)
    a, b, c = vertices[faces.long()].unbind(1)
    area = torch.linalg.cross(b - a, c - a).norm(dim=1).double()
    face = torch.searchsorted(area.cumsum(0) / area.sum(), torch.rand(count, generator=generator).double())
    face = face.clamp_max(len(faces) - 1)
    root, t = torch.rand(count, generator=generator).sqrt(), torch.rand(count, generator=generator)
    return face, torch.stack([1 - root, root * (1 - t), root * t], dim=1)
