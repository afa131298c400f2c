from __future__ import annotations

import pytest
import torch
from layouts import ball, check_layout
from o_voxel import unwrap as unwrapping
from o_voxel.groups import group_sums
from o_voxel.repair import components, manifold_edges
from o_voxel.unwrap import unwrap
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


@pytest.mark.parametrize("few", [1, 1 << 30])
def test_merged_all_at_once_or_one_by_one(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vertices, faces = ball(32)
    vertices += 0.2 / 32 * torch.randn(vertices.shape, generator=torch.Generator().manual_seed(0))
    usual = unwrap(vertices, faces)
    monkeypatch.setattr(unwrapping, "_FEW", few)
    flat = unwrap(vertices, faces)
    check_layout(vertices, flat)
    assert 0.9 * usual.charts <= flat.charts <= 1.1 * usual.charts

    a, b, c = vertices.double()[faces.long()].unbind(1)
    normals = torch.linalg.cross(b - a, c - a)
    half_edges = manifold_edges(faces.long(), len(vertices))
    pairs = half_edges // 3
    for crumb, cone in ((0, 40), (1e-4, 70)):
        monkeypatch.setattr(unwrapping, "_CRUMB", crumb)
        label = unwrapping._cluster(vertices.double(), faces.long(), normals, half_edges)
        count = int(label.max()) + 1
        mean = group_sums(normals, label, count)
        angle = torch.rad2deg(torch.acos(torch.cosine_similarity(normals, mean[label]).clamp(-1, 1)))
        assert cone - 2 < angle.max() <= cone + 0.01
        assert components(pairs[label[pairs[:, 0]] == label[pairs[:, 1]]], len(faces))[0] == count


@pytest.mark.parametrize("few", [1, 1 << 30])
def test_what_merged_clusters_share_is_what_their_faces_share(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unwrapping, "_FEW", few)
    merged, checks = unwrapping._merged, []

    def checked(clusters: unwrapping._Clusters, *limits: Tensor | float) -> unwrapping._Clusters:
        before = clusters.label.clone(), clusters.u.clone(), clusters.v.clone(), clusters.shared.clone()
        after = merged(clusters, *limits)
        label, u, v, shared = before
        now = torch.empty(int(label.max()) + 1, dtype=torch.int64).scatter_(0, label, after.label)
        checks.append((after.shared.double().sum(), shared[now[u] != now[v]].double().sum()))
        return after

    monkeypatch.setattr(unwrapping, "_merged", checked)
    vertices, faces = ball(32)
    unwrap(vertices + 0.2 / 32 * torch.randn(vertices.shape, generator=torch.Generator().manual_seed(0)), faces)
    assert len(checks) == 2
    for found, wanted in checks:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


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


def test_faces_on_each_other_are_charts_of_their_own() -> None:
    vertices = torch.eye(3)
    for faces in ([[0, 1, 2], [0, 1, 2]], [[0, 1, 2], [0, 2, 1]], [[0, 1, 2], [0, 1, 2], [1, 2, 0]]):
        flat = unwrap(vertices, torch.tensor(faces))
        assert flat.charts == len(faces)
        check_layout(vertices, flat)


def test_many_faces_at_one_edge() -> None:
    angle = torch.arange(12) / 12 * 2 * torch.pi
    pages = torch.stack([angle.cos(), angle.sin(), torch.full((12,), 0.5)], 1)
    vertices = torch.cat([torch.tensor([[0.0, 0, 0], [0, 0, 1]]), pages])
    faces = torch.tensor([[0, 1, i + 2] for i in range(12)])
    flat = unwrap(vertices, faces)
    assert flat.charts == 12
    check_layout(vertices, flat)


@pytest.mark.parametrize("coplanar", [False, True])
def test_soup(coplanar: bool) -> None:
    """Faces across each other at random, on shared vertices."""
    generator = torch.Generator().manual_seed(0)
    vertices = torch.rand((40, 3), generator=generator) * torch.tensor([1, 1, 0 if coplanar else 1])
    faces = torch.combinations(torch.arange(40), 3)
    faces = faces[torch.randperm(len(faces), generator=generator)[:1500]].int()
    if coplanar:
        normals = torch.linalg.cross(*(vertices[faces[:, i]] - vertices[faces[:, 0]] for i in (1, 2)))
        faces = torch.where(normals[:, 2:] < 0, faces[:, [0, 2, 1]], faces)
    flat = unwrap(vertices, faces)
    assert len(flat.faces) == len(faces)
    check_layout(vertices, flat)


def test_double_fan() -> None:
    """A fan that goes round its middle twice is locally flat everywhere, and lies over itself."""
    angle = torch.arange(65) / 64 * 4 * torch.pi
    vertices = torch.cat([torch.zeros(1, 3), torch.stack([angle.cos(), angle.sin(), 1e-3 * angle], 1)])
    i = torch.arange(64)
    flat = unwrap(vertices, torch.stack([torch.zeros_like(i), i + 1, i + 2], 1))
    assert 2 <= flat.charts <= 4
    check_layout(vertices, flat)


def test_thousands_of_pieces() -> None:
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    generator = torch.Generator().manual_seed(0)
    vertices = (torch.rand((3000, 1, 3), generator=generator) + 0.002 * corners).reshape(-1, 3)
    sides = torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
    flat = unwrap(vertices, (sides + 4 * torch.arange(3000)[:, None, None]).reshape(-1, 3))
    assert flat.charts == 9000  # the crumbs at each corner have joined a neighbour
    check_layout(vertices, flat)


def test_slivers() -> None:
    x = torch.rand((500, 1), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([[0.0, 0, 0], [0, 1, 0], [1e-5, 0.5, 0.02]])
    vertices = (x[:, :, None] * torch.tensor([1.0, 0, 0]) + ends).reshape(-1, 3)
    flat = unwrap(vertices, torch.arange(1500).reshape(-1, 3))
    assert flat.charts == 500
    check_layout(vertices, flat)


def test_a_long_strip_is_cut() -> None:
    """Whole, ten metres by a millimetre would leave the atlas empty."""
    i = torch.arange(4000)
    vertices = torch.stack([(i // 2) * 0.005, (i % 2) * 0.001, torch.zeros(4000)], 1)
    i, odd = i[:-2], i[:-2] % 2 == 1
    faces = torch.stack([i, torch.where(odd, i + 1, i + 2), torch.where(odd, i + 2, i + 1)], 1)
    flat = unwrap(vertices, faces)
    assert 8 <= flat.charts <= 128
    check_layout(vertices, flat)


@pytest.mark.parametrize("scale", [1e-15, 1e18])
def test_size_and_place_do_not_matter(scale: float) -> None:
    vertices, faces = ball(32)
    flat = unwrap((vertices.double() + 1e3) * scale, faces)
    assert flat.charts <= 100
    assert len(flat.faces) == len(faces)
    check_layout(vertices, flat)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"^vertices"):
        unwrap(torch.full((3, 3), float("nan")), torch.tensor([[0, 1, 2]]))
    with pytest.raises(ValueError, match=r"^faces"):
        unwrap(torch.rand(3, 3), torch.tensor([[0, 1, 3]]))


def test_tiny_faces_keep_their_place() -> None:
    """Packing once took small areas for nothing, and moved what such faces joined by half."""
    mesh = voxelise(bumpy_sphere(), 64).mesh
    vertices = mesh.vertices * 0.01
    flat = unwrap(vertices, mesh.faces)
    assert len(flat.faces) == len(mesh.faces)
    uvs, points = flat.uvs[flat.faces.long()], vertices[flat.vertex_map][flat.faces.long()]
    stretch = (uvs - uvs.roll(1, 1)).norm(dim=2) / (points - points.roll(1, 1)).norm(dim=2)
    assert stretch.max() <= 2 * stretch.median()
