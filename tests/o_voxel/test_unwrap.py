from __future__ import annotations

import numpy as np
import pytest
import torch
from o_voxel.raster import rasterize_uv
from o_voxel.repair import unify_face_orientations
from o_voxel.unwrap import Unwrapped, unwrap
from scipy.ndimage import grey_dilation, grey_erosion
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from voxelise import bumpy_sphere, cube, voxelise


def spiral() -> tuple[Tensor, Tensor]:
    """A ramp that turns three times about z: all normals agree, yet its turns lie above each other."""
    angle = torch.arange(97) / 16 * torch.pi
    rims = [
        torch.stack([r * angle.cos(), r * angle.sin(), 0.05 * angle], 1) for r in (torch.tensor(0.2), torch.tensor(0.5))
    ]
    i = torch.arange(96)
    faces = torch.cat([torch.stack([i, i + 97, i + 98], 1), torch.stack([i, i + 98, i + 1], 1)])
    return torch.cat(rims), faces.int()


def ball(resolution: int) -> tuple[Tensor, Tensor]:
    mesh = voxelise(bumpy_sphere(), resolution).mesh
    return unify_face_orientations(mesh.vertices, mesh.faces)


def chart_of_face(flat: Unwrapped) -> np.ndarray:
    edges = flat.faces[:, [0, 1, 1, 2]].reshape(-1, 2).numpy()
    count = len(flat.vertex_map)
    graph = coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1][flat.faces[:, 0].numpy()]


def check_layout(vertices: Tensor, flat: Unwrapped) -> None:
    """No overlap, no fold, room between the charts, one scale."""
    size = 2048
    assert float(flat.uvs.min()) >= 0
    assert float(flat.uvs.max()) <= 1
    a, b, c = flat.uvs.double()[flat.faces.long()].unbind(1)
    areas = ((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]).abs() / 2 * size**2
    face_id, weights = rasterize_uv(flat.uvs, flat.faces, size)
    held = (face_id >= 0) & (weights > 0).all(-1)
    # Of faces that overlap, the first wins: whichever way they are numbered, each texel must name the same.
    reverse_id, _ = rasterize_uv(flat.uvs, flat.faces.flip(0), size)
    reverse_id = len(flat.faces) - 1 - reverse_id
    assert torch.equal(reverse_id[held], face_id[held])
    assert held.sum() > 0.15 * size**2

    chart = chart_of_face(flat)
    assert len(np.unique(chart)) == flat.charts
    image = np.where(held, chart[face_id.clamp_min(0)], -1)
    highest = grey_dilation(image, size=(5, 5))
    lowest = grey_erosion(np.where(image < 0, 10**9, image), size=(5, 5))
    assert not ((image >= 0) & (highest != lowest)).any()

    corners = vertices.double()[flat.vertex_map][flat.faces.long()]
    solid = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]).norm(dim=1) / 2
    # Charts of a texel or two are rounded up to whole ones: the rest is foreshortened by 70 degrees at most.
    scale = (areas / solid)[solid > solid.median() / 10]
    low, middle, high = torch.quantile(scale, torch.tensor([0.01, 0.5, 0.99]).double()).tolist()
    assert low > middle / 2.5
    assert high < middle * 1.5


def test_cube_has_six_charts() -> None:
    mesh = voxelise(cube(32), 32).mesh
    flat = unwrap(mesh.vertices, mesh.faces)
    assert flat.charts == 6
    assert torch.equal(flat.vertex_map[flat.faces.long()], mesh.faces.long())
    check_layout(mesh.vertices, flat)


def test_sphere() -> None:
    vertices, faces = ball(64)
    flat = unwrap(vertices, faces)
    assert 6 <= flat.charts <= 100
    check_layout(vertices, flat)
    again = unwrap(vertices, faces)
    assert torch.equal(flat.uvs, again.uvs)
    assert torch.equal(flat.faces, again.faces)


def test_charts_that_would_lie_over_themselves_are_cut() -> None:
    vertices, faces = spiral()
    flat = unwrap(vertices, faces)
    assert 3 <= flat.charts <= 24
    check_layout(vertices, flat)


def test_rough_surface() -> None:
    vertices, faces = ball(48)
    noise = torch.randn(vertices.shape, generator=torch.Generator().manual_seed(0))
    vertices = vertices + noise * 0.2 / 48
    flat = unwrap(vertices, faces)
    assert torch.equal(flat.vertex_map[flat.faces.long()], faces.long())
    check_layout(vertices, flat)


def test_loose_triangles() -> None:
    generator = torch.Generator().manual_seed(0)
    vertices = torch.rand((900, 3), generator=generator)
    faces = torch.arange(900, dtype=torch.int32).reshape(-1, 3)
    flat = unwrap(vertices, faces)
    assert flat.charts == 300
    check_layout(vertices, flat)


def test_faces_without_area_are_left_out() -> None:
    vertices = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0.5, 0, 0], [2, 2, 2]])
    faces = torch.tensor([[0, 1, 2], [0, 1, 3], [4, 4, 4], [4, 4, 0]], dtype=torch.int32)
    flat = unwrap(vertices, faces)
    assert flat.vertex_map[flat.faces.long()].tolist() == [[0, 1, 2]]
    assert flat.charts == 1
    nothing = unwrap(vertices, faces[2:])
    assert nothing.charts == 0
    assert nothing.faces.shape == (0, 3)
    assert len(unwrap(vertices[:0], faces[:0]).uvs) == 0


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"^vertices"):
        unwrap(torch.full((3, 3), float("nan")), torch.tensor([[0, 1, 2]]))
    with pytest.raises(ValueError, match=r"^faces"):
        unwrap(torch.rand(3, 3), torch.tensor([[0, 1, 3]]))


def test_tiny_faces_keep_their_place() -> None:
    """xatlas takes small areas for nothing, and once moved what such faces joined by half."""
    mesh = voxelise(bumpy_sphere(), 64).mesh
    vertices = mesh.vertices * 0.01
    flat = unwrap(vertices, mesh.faces)
    assert len(flat.faces) == len(mesh.faces)
    uvs, points = flat.uvs[flat.faces.long()], vertices[flat.vertex_map][flat.faces.long()]
    stretch = (uvs - uvs.roll(1, 1)).norm(dim=2) / (points - points.roll(1, 1)).norm(dim=2)
    assert stretch.max() <= 2 * stretch.median()
