"""Ray hits: hand-written answers, brute force, layers, determinism."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from o_voxel.rays import RayMesh, ray_hits_reference

# Two parallel triangles that face each other along z, at z = 0 and z = -1.
VERTICES = torch.tensor(
    [[-1.0, -1.0, 0.0], [1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [-1.0, -1.0, -1.0], [1.0, -1.0, -1.0], [-1.0, 1.0, -1.0]]
)
FACES = torch.tensor([[0, 1, 2], [3, 5, 4]], dtype=torch.int32)


def soup(triangles: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(triangles * 3, 3, generator=generator) - 0.5
    return corners, torch.arange(triangles * 3, dtype=torch.int32).view(-1, 3)


def rays(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    origins = torch.tensor([[0.0, 0.0, 2.0]]) + 0.1 * torch.randn(count, 3, generator=generator)
    targets = torch.rand(count, 3, generator=generator) - 0.5
    return origins, F.normalize(targets - origins, dim=-1)


def test_two_triangles_by_hand() -> None:
    mesh = RayMesh(VERTICES, FACES)
    origins = torch.tensor([[-0.5, -0.5, 2.0], [0.9, 0.9, 2.0], [-0.5, -0.5, -3.0], [-0.5, -0.5, -0.25]])
    directions = torch.tensor([[0.0, 0.0, -1.0], [0.0, 0.0, -1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    hits = mesh.first_hits(origins, directions)
    assert hits.faces.tolist() == [0, -1, 1, 0]
    assert hits.t.tolist() == [2.0, torch.inf, 2.0, 0.25]
    expected = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 0.0], [0.5, 0.25, 0.25], [0.5, 0.25, 0.25]])
    torch.testing.assert_close(hits.barycentric, expected, rtol=0, atol=1e-6)


def test_next_hits_go_from_layer_to_layer() -> None:
    mesh = RayMesh(VERTICES, FACES)
    origins, directions = torch.tensor([[-0.5, -0.5, 2.0]]), torch.tensor([[0.0, 0.0, -1.0]])
    first = mesh.first_hits(origins, directions)
    second = mesh.next_hits(origins, directions, first)
    third = mesh.next_hits(origins, directions, second)
    assert (first.faces.item(), second.faces.item(), third.faces.item()) == (0, 1, -1)
    assert second.t.item() == pytest.approx(3.0, abs=1e-6)


def test_coincident_faces_are_one_layer() -> None:
    mesh = RayMesh(VERTICES, torch.tensor([[0, 1, 2], [0, 1, 2], [3, 5, 4]]))
    origins, directions = torch.tensor([[-0.5, -0.5, 2.0]]), torch.tensor([[0.0, 0.0, -1.0]])
    second = mesh.next_hits(origins, directions, mesh.first_hits(origins, directions))
    assert second.faces.item() == 2


def test_layers_match_brute_force() -> None:
    vertices, faces = soup(60, 0)
    origins, directions = rays(6000, 1)
    mesh = RayMesh(vertices, faces)
    layers = ray_hits_reference(vertices, faces, origins, directions, 5)
    hits = mesh.first_hits(origins, directions)
    seen = 0
    for depth, expected in enumerate(layers):
        if depth:
            kept = hits.faces >= 0
            hits = type(hits)(hits.faces[kept], hits.barycentric[kept], hits.t[kept])
            origins, directions = origins[kept], directions[kept]
            layers = [type(e)(e.faces[kept], e.barycentric[kept], e.t[kept]) for e in layers]
            hits = mesh.next_hits(origins, directions, hits)
            expected = layers[depth]
        same = hits.faces == expected.faces
        # Rays along an edge and crossings nearer than float32 tells apart may differ.
        assert (~same).sum() <= 0.001 * len(same)
        both = same & (hits.faces >= 0)
        seen += int(both.sum())
        torch.testing.assert_close(hits.t[both], expected.t[both], rtol=0, atol=2e-5)
        torch.testing.assert_close(hits.barycentric[both], expected.barycentric[both], rtol=0, atol=2e-5)
    assert seen > 10000


def test_grazing_rays_do_not_find_the_same_face_again() -> None:
    origins = torch.tensor([[-3.0, -0.9, 1e-4]]).repeat(500, 1)
    targets = torch.stack([torch.linspace(-0.9, 0.7, 500), torch.full((500,), -0.9), torch.zeros(500)], -1)
    directions = F.normalize(targets - origins, dim=-1)
    mesh = RayMesh(VERTICES, FACES[:1])
    first = mesh.first_hits(origins, directions)
    assert (first.faces == 0).all()
    assert (mesh.next_hits(origins, directions, first).faces == -1).all()


def test_equal_calls_give_equal_bits() -> None:
    vertices, faces = soup(300, 3)
    origins, directions = rays(20000, 4)
    first, again = (RayMesh(vertices, faces).first_hits(origins, directions) for _ in range(2))
    assert torch.equal(first.faces, again.faces)
    assert torch.equal(first.t, again.t)
    assert torch.equal(first.barycentric, again.barycentric)


def test_no_rays() -> None:
    hits = RayMesh(VERTICES, FACES).first_hits(torch.zeros(0, 3), torch.zeros(0, 3))
    assert hits.faces.shape == (0,)
    assert hits.barycentric.shape == (0, 3)


@pytest.mark.parametrize(
    ("vertices", "faces", "named"),
    [
        (torch.zeros(3, 2), FACES[:1], "vertices"),
        (VERTICES, torch.zeros(0, 3, dtype=torch.int32), "faces"),
        (VERTICES, torch.zeros(2, 4, dtype=torch.int32), "faces"),
    ],
)
def test_wrong_shapes_are_named(vertices: torch.Tensor, faces: torch.Tensor, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RayMesh(vertices, faces)
