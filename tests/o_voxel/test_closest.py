from __future__ import annotations

import pytest
import torch
from o_voxel.closest import Surface, closest_point, closest_point_reference

VERTICES = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
FACES = torch.tensor([[0, 2, 1], [0, 1, 3]], dtype=torch.int32)


def test_by_hand() -> None:
    found = closest_point(VERTICES, FACES, torch.tensor([[0.25, 0.5, -2.0], [3.0, -1.0, 0.0], [0.2, -0.5, 0.3]]))
    assert found.points.flatten().tolist() == pytest.approx([0.25, 0.5, 0, 1, 0, 0, 0.2, 0, 0.3], abs=1e-6)
    assert found.distance.tolist() == pytest.approx([2.0, 5**0.5, 0.5], abs=1e-6)
    assert found.faces[[0, 2]].tolist() == [0, 1]
    assert found.faces.dtype == torch.int64
    assert found.barycentric[0].tolist() == pytest.approx([0.25, 0.5, 0.25], abs=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_equals_reference(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vertices = torch.rand((90, 3), generator=generator) - 0.5
    faces = torch.randint(0, 90, (150, 3), generator=generator, dtype=torch.int32)
    faces = faces[(faces != faces[:, [1, 2, 0]]).all(1)]
    points = (torch.rand((2500, 3), generator=generator) - 0.5) * 1.5
    found = closest_point(vertices, faces, points)
    expected = closest_point_reference(vertices, faces, points)
    assert (found.distance - expected.distance).abs().max() <= 2e-6
    on_face = (vertices[faces[found.faces].long()] * found.barycentric[:, :, None]).sum(1)
    assert (on_face - found.points).abs().max() <= 1e-6
    assert found.barycentric.min() >= -1e-6
    assert (found.barycentric.sum(1) - 1).abs().max() <= 1e-6


def test_same_query_same_bits_and_any_split() -> None:
    generator = torch.Generator().manual_seed(3)
    vertices = torch.rand((300, 3), generator=generator)
    faces = torch.randint(0, 300, (500, 3), generator=generator)
    points = torch.rand((9000, 3), generator=generator)
    surface = Surface(vertices, faces)
    whole, again = surface.closest(points), closest_point(vertices, faces, points)
    parts = [surface.closest(part).barycentric for part in points.split(1000)]
    assert torch.equal(whole.barycentric, again.barycentric)
    assert torch.equal(whole.barycentric, torch.cat(parts))


def test_bad_input() -> None:
    assert len(closest_point(VERTICES, FACES, torch.zeros(0, 3)).faces) == 0
    with pytest.raises(ValueError, match=r"^faces must hold at least one"):
        Surface(VERTICES, FACES[:0])
    with pytest.raises(ValueError, match=r"^faces"):
        Surface(VERTICES, FACES + 2)
    with pytest.raises(ValueError, match=r"^vertices"):
        Surface(VERTICES * float("inf"), FACES)
    with pytest.raises(ValueError, match=r"^points"):
        closest_point(VERTICES, FACES, torch.tensor([[float("nan")] * 3]))
    with pytest.raises(ValueError, match=r"^points"):
        closest_point(VERTICES, FACES, torch.zeros(3))
