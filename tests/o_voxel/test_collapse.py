from __future__ import annotations

import pytest
import torch
from o_voxel.closest import Surface
from o_voxel.collapse import collapse_edges
from o_voxel.repair import (
    components,
    manifold_edges,
    remove_degenerate_faces,
    remove_duplicate_faces,
    unify_face_orientations,
)
from o_voxel.simplify import simplify
from torch import Tensor
from voxelise import bumpy_sphere, surface_points, voxelise

Pair = tuple[Tensor, Tensor]


def sheet(n: int, bend: float = 0.0) -> Pair:
    """A square of side 0.8 with n x n vertices and, for a ``bend``, waves."""
    t = torch.linspace(-0.4, 0.4, n)
    x, y = torch.meshgrid(t, t, indexing="ij")
    vertices = torch.stack([x, y, bend * torch.sin(9 * x) * torch.cos(7 * y)], -1).reshape(-1, 3)
    i, j = torch.meshgrid(torch.arange(n - 1), torch.arange(n - 1), indexing="ij")
    a, b, c, d = (k.reshape(-1) for k in (i * n + j, i * n + n + j, i * n + n + j + 1, i * n + j + 1))
    return vertices, torch.cat([torch.stack([a, b, c], 1), torch.stack([a, c, d], 1)]).int()


def box(n: int, thickness: float = 0.7) -> Pair:
    """A closed box of 6 sheets of n x n vertices, wound outwards."""
    flat, square = sheet(n)
    vertices, faces = [], []
    for axis in range(3):
        for side in (-1, 1):
            place = torch.full_like(flat, float(side))
            place[:, (axis + 1) % 3], place[:, (axis + 2) % 3] = flat[:, 0] / 0.4, flat[:, 1] / 0.4
            faces.append((square if side > 0 else square[:, [0, 2, 1]]) + len(flat) * len(vertices))
            vertices.append(place)
    places, number = torch.unique((torch.cat(vertices) * 1e4).round().long(), dim=0, return_inverse=True)
    size = torch.tensor([0.4, 0.35, thickness / 2])
    return places / 1e4 * size, number[torch.cat(faces).long()].int()


def torus(around: int, across: int) -> Pair:
    u, v = torch.arange(around) * 2 * torch.pi / around, torch.arange(across) * 2 * torch.pi / across
    u, v = torch.meshgrid(u, v, indexing="ij")
    radius = 0.12 + 0.02 * torch.sin(7 * u) * torch.sin(5 * v)
    ring = 0.35 + radius * v.cos()
    vertices = torch.stack([ring * u.cos(), ring * u.sin(), radius * v.sin()], -1).reshape(-1, 3)
    i, j = torch.meshgrid(torch.arange(around), torch.arange(across), indexing="ij")
    i2, j2 = (i + 1) % around, (j + 1) % across
    a, b, c, d = ((p * across + q).reshape(-1) for p, q in ((i, j), (i2, j), (i2, j2), (i, j2)))
    return vertices, torch.cat([torch.stack([a, b, c], 1), torch.stack([a, c, d], 1)]).int()


def bumpy() -> Pair:
    mesh = voxelise(bumpy_sphere(), 80).mesh
    return unify_face_orientations(mesh.vertices, mesh.faces)


def shells() -> Pair:
    outer, inner = bumpy(), voxelise(bumpy_sphere(0.25, 0.02), 64).mesh
    both = torch.cat([outer[0], inner.vertices]), torch.cat([outer[1], inner.faces + len(outer[0])])
    return unify_face_orientations(*both)


def fan(n: int) -> Pair:
    """A double cone: two vertices with n faces each."""
    turn = torch.arange(n) * 2 * torch.pi / n
    rim = torch.stack([turn.cos(), turn.sin(), torch.zeros(n)], 1)
    i, j = torch.arange(n), (torch.arange(n) + 1) % n
    top, bottom = torch.full_like(i, n), torch.full_like(i, n + 1)
    faces = torch.cat([torch.stack([i, j, top], 1), torch.stack([j, i, bottom], 1)])
    return torch.cat([rim, torch.tensor([[0.0, 0, 1], [0, 0, -1]])]), faces.int()


def distances(one: Pair, other: Pair) -> Tensor:
    """From vertices and even points of one surface to the other."""
    face, weights = surface_points(*one, 50000)
    points = (one[0][one[1][face].long()] * weights[:, :, None]).sum(1)
    return Surface(*other).closest(torch.cat([points, one[0][one[1].unique().long()]])).distance.double()


def errors(one: Pair, other: Pair) -> Tensor:
    """[root mean square, largest] of the distances both ways."""
    there, back = distances(one, other), distances(other, one)
    return torch.stack([t for d in (there, back) for t in (d.square().mean().sqrt(), d.max())])


def normals(vertices: Tensor, faces: Tensor) -> Tensor:
    a, b, c = vertices.double()[faces.long()].unbind(1)
    return torch.linalg.cross(b - a, c - a)


def euler(faces: Tensor) -> int:
    """V - E + F of a closed surface, which must be one."""
    assert len(manifold_edges(faces, int(faces.max()) + 1)) * 2 == 3 * len(faces)
    return len(faces.unique()) - 3 * len(faces) // 2 + len(faces)


MESHES = {
    "bumpy": bumpy,
    "torus": lambda: torus(240, 120),
    "box": lambda: box(60),
    "sheet": lambda: sheet(150, 0.05),
    "shells": shells,
}


@pytest.mark.parametrize("name", MESHES)
def test_as_good_as_one_after_another(name: str) -> None:
    mesh = MESHES[name]()
    target = len(mesh[1]) // 10
    ours = collapse_edges(*mesh, target)
    assert target - 1 <= len(ours[1]) <= target
    assert ours[0].isfinite().all()
    clean = remove_duplicate_faces(*remove_degenerate_faces(*ours))
    assert len(clean[1]) == len(ours[1])
    # Where both are next to exact, a hundredth of a voxel of 1/1024.
    allowed = errors(simplify(*mesh, target), mesh) * torch.tensor([1.02, 1.2, 1.02, 1.2]) + 1e-5
    found = errors(ours, mesh)
    assert (found <= allowed).all(), (found, allowed)
    # No face looks away from the surface that it stands for.
    middle = ours[0][ours[1].long()].mean(1)
    facing = normals(*mesh)[Surface(*mesh).closest(middle).faces]
    assert ((normals(*ours) * facing).sum(1) > 0).all()


@pytest.mark.parametrize(("name", "holes"), [("torus", 1), ("bumpy", 0), ("box", 0)])
def test_topology_stays(name: str, holes: int) -> None:
    vertices, faces = MESHES[name]()
    _, fewer = collapse_edges(vertices, faces, 300)
    assert len(fewer) <= 300
    assert euler(faces) == euler(fewer) == 2 - 2 * holes
    count, _ = components(manifold_edges(fewer, int(fewer.max()) + 1) // 3, len(fewer))
    assert count == 1


def test_a_box_ends_as_twelve_faces_between_its_corners() -> None:
    vertices, faces = collapse_edges(*box(12), 12)
    assert len(faces) == 12
    assert euler(faces) == 2
    corners = torch.tensor([[x, y, z] for x in (-0.4, 0.4) for y in (-0.35, 0.35) for z in (-0.35, 0.35)])
    distance = torch.cdist(vertices[faces.unique().long()], corners)
    assert distance.amin(0).max() < 1e-4
    assert distance.amin(1).max() < 1e-4
    volume = (vertices[faces[:, 0].long()] * normals(vertices, faces)).sum() / 6
    assert float(volume) == pytest.approx(0.8 * 0.7 * 0.7, rel=1e-3)


def test_a_square_ends_as_two_faces_between_its_corners() -> None:
    vertices, faces = collapse_edges(*sheet(12), 2)
    assert len(faces) == 2
    corners = torch.tensor([[x, y, 0.0] for x in (-0.4, 0.4) for y in (-0.4, 0.4)])
    assert torch.cdist(vertices[faces.unique().long()], corners).amin(0).max() < 1e-4


def test_a_thin_plate_stays_two_walls() -> None:
    plate = box(60, thickness=0.008)
    vertices, faces = collapse_edges(*plate, len(plate[1]) // 10)
    assert euler(faces) == 2
    assert errors((vertices, faces), plate)[[1, 3]].max() < 0.001


def test_vertices_with_many_faces() -> None:
    vertices, faces = collapse_edges(*fan(2000), 400)
    assert 399 <= len(faces) <= 400
    assert errors((vertices, faces), fan(2000)).max() < 5e-4


def test_nothing_moves_that_need_not() -> None:
    vertices, faces = bumpy()
    kept = collapse_edges(vertices, faces, len(faces))
    assert torch.equal(kept[0], vertices)
    assert torch.equal(kept[1], faces)
    fewer, _ = collapse_edges(vertices, faces, len(faces) - 2)
    before, after = ({tuple(v) for v in points.tolist()} for points in (vertices, fewer))
    assert len(fewer) == len(vertices) - 1
    assert len(after - before) == 1


def test_far_away_and_in_other_units() -> None:
    vertices, faces = sheet(40, 0.05)
    expected = collapse_edges(vertices, faces, 300)
    large = collapse_edges(vertices * 4096, faces, 300)
    assert torch.equal(large[1], expected[1])
    torch.testing.assert_close(large[0] / 4096, expected[0], rtol=0, atol=1e-6)
    far = collapse_edges(vertices + 8, faces, 300)
    assert errors((far[0] - 8, far[1]), (vertices, faces)).max() < 2 * errors(expected, (vertices, faces)).max()


def test_meshes_that_are_none() -> None:
    generator = torch.Generator().manual_seed(0)
    # Any three of 200 vertices: edges of many faces, faces twice, vertices twice in a face.
    faces = torch.randint(0, 200, (3000, 3), generator=generator)
    vertices = torch.rand((200, 3), generator=generator)
    fewer_vertices, fewer = collapse_edges(vertices, faces, 700)
    assert 0 < len(fewer) <= 700
    assert fewer.dtype == torch.int64
    assert (fewer != fewer[:, [1, 2, 0]]).all()
    assert fewer_vertices.isfinite().all()
    # Faces that share nothing vanish one by one, the smallest first.
    size = torch.rand((500, 1, 1), generator=generator) + 0.1
    lone = 0.01 * size * torch.eye(3) + 4 * torch.rand((500, 1, 3), generator=generator)
    kept_vertices, kept = collapse_edges(lone.reshape(-1, 3), torch.arange(1500).reshape(-1, 3).int(), 100)
    assert len(kept) == 100
    area = normals(kept_vertices, kept).norm(dim=1).sort().values
    largest = normals(lone.reshape(-1, 3), torch.arange(1500).reshape(-1, 3)).norm(dim=1).sort().values[-100:]
    assert area.mean() > 0.9 * largest.mean()
    # Points without any extent.
    assert len(collapse_edges(torch.ones(4, 3), torch.tensor([[0, 1, 2], [1, 2, 3]]), 1)[1]) <= 1


def test_equal_bits() -> None:
    mesh = bumpy()
    one, other = (collapse_edges(*mesh, 3000) for _ in range(2))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
