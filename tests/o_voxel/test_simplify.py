from __future__ import annotations

import pytest
import torch
from o_voxel.closest import closest_point
from o_voxel.simplify import simplify
from torch import Tensor
from voxelise import bumpy_sphere, cube, surface_points, voxelise


def cloud_of_triangles(count: int) -> tuple[Tensor, Tensor]:
    """Triangles that share nothing: no edge of them can be collapsed usefully."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand((count, 1, 3), generator=generator) - 0.5
    corners = centres + 0.01 * torch.randn((count, 3, 3), generator=generator)
    return corners.reshape(-1, 3), torch.arange(3 * count, dtype=torch.int32).reshape(-1, 3)


def test_cube_needs_few_faces() -> None:
    mesh = voxelise(cube(48), 48).mesh
    vertices, faces = simplify(mesh.vertices, mesh.faces, 300)
    assert 12 <= len(faces) <= 300
    assert vertices.dtype == torch.float32
    assert faces.dtype == torch.int32
    assert closest_point(vertices, faces, mesh.vertices).distance.max() * 48 < 0.01


def test_distance_stays_small_both_ways() -> None:
    mesh = voxelise(bumpy_sphere(), 96).mesh
    vertices, faces = simplify(mesh.vertices, mesh.faces, len(mesh.faces) // 8)
    assert len(faces) <= len(mesh.faces) // 8
    face, weights = surface_points(vertices, faces, 20000)
    points = (vertices[faces[face].long()] * weights[:, :, None]).sum(1)
    assert closest_point(mesh.vertices, mesh.faces, points).distance.max() * 96 < 0.5
    assert closest_point(vertices, faces, mesh.vertices).distance.max() * 96 < 0.5
    again = simplify(mesh.vertices, mesh.faces, len(mesh.faces) // 8)
    assert torch.equal(again[0], vertices)
    assert torch.equal(again[1], faces)


@pytest.mark.parametrize("target", [1500, 100, 1])
def test_target_holds_where_nothing_collapses(target: int) -> None:
    vertices, faces = simplify(*cloud_of_triangles(3000), target)
    assert len(faces) <= target
    assert (faces < len(vertices)).all()
    if target > 1:
        assert len(faces) > target / 4


def test_small_empty_and_bad_meshes() -> None:
    vertices, faces = cloud_of_triangles(5)
    kept = simplify(vertices, faces, 5)
    assert torch.equal(kept[0], vertices)
    assert torch.equal(kept[1], faces)
    assert len(simplify(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int32), 5)[1]) == 0
    with pytest.raises(ValueError, match=r"^target_faces"):
        simplify(vertices, faces, 0)
    with pytest.raises(ValueError, match=r"^vertices"):
        simplify(vertices * float("nan"), faces, 1)
    with pytest.raises(ValueError, match=r"^faces"):
        simplify(vertices, faces + 1, 1)
