from __future__ import annotations

import pytest
import torch
from o_voxel.raster import rasterize_uv, rasterize_uv_reference
from torch import Tensor


def test_one_triangle_by_hand() -> None:
    # Its slanted edge passes through the centres of texels (row, column) = (0, 2), (1, 1), (2, 0).
    uvs = torch.tensor([[0.0, 0.0], [0.375, 0.0], [0.0, 0.375]])
    face_id, weights = rasterize_uv(uvs, torch.tensor([[0, 1, 2]]), 8)
    near = [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert (face_id[:4, :4] == 0).int().tolist() == near
    assert (face_id == 0).sum() == sum(map(sum, near))
    assert weights[0, 0].tolist() == pytest.approx([2 / 3, 1 / 6, 1 / 6])
    assert weights[1, 1].tolist() == pytest.approx([0.0, 0.5, 0.5], abs=1e-6)
    assert weights[0, 3].tolist() == pytest.approx([0.0, 1.0, 0.0])  # beyond the corner: clamped to it
    assert weights[7, 7].tolist() == [0, 0, 0]


def grid_mesh(cells: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A jittered grid over most of the unit square: faces abut and never overlap."""
    steps = torch.arange(cells + 1) / cells
    v, u = torch.meshgrid(steps, steps, indexing="ij")
    uvs = torch.stack([u, v], -1).reshape(-1, 2) * 0.75 + 0.125
    uvs += (torch.rand(uvs.shape, generator=generator) - 0.5) * 0.2 / cells
    i, j = (x.reshape(-1) for x in torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij"))
    a = i * (cells + 1) + j
    quads = torch.stack([a, a + 1, a + cells + 2, a + cells + 1], 1)
    return uvs, torch.cat([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]]).int()


@pytest.mark.parametrize("size", [1, 37, 64])
@pytest.mark.parametrize("overlap", [False, True])
def test_equals_reference(size: int, overlap: bool) -> None:
    generator = torch.Generator().manual_seed(size)
    if overlap:
        uvs = torch.rand((60, 2), generator=generator)
        faces = torch.randint(0, 60, (40, 3), generator=generator)  # some without area
    else:
        uvs, faces = grid_mesh(6, generator)
    face_id, weights = rasterize_uv(uvs, faces, size)
    expected_id, expected = rasterize_uv_reference(uvs, faces, size)
    assert torch.equal(face_id, expected_id)
    assert (weights - expected).abs().max() <= 1e-6
    assert (weights.sum(-1)[face_id >= 0] - 1).abs().max() <= 1e-6


def test_abutting_faces_leave_no_gap_over_several_bands() -> None:
    size = 600
    uvs, faces = grid_mesh(12, torch.Generator().manual_seed(5))
    face_id, weights = rasterize_uv(uvs, faces, size)
    assert (face_id[90:510, 90:510] >= 0).all()
    position = (uvs[faces[face_id.clamp_min(0)].long()] * weights[..., None]).sum(-2)
    v, u = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    error = (position - torch.stack([u, v], -1) / size)[90:510, 90:510].abs().max()
    assert error <= 0.01 / size


def test_a_face_too_thin_for_any_centre_still_gets_texels() -> None:
    uvs = torch.tensor([[0.26, 0.1], [0.262, 0.1], [0.261, 0.9]])
    face_id, weights = rasterize_uv(uvs, torch.tensor([[0, 1, 2]]), 16)
    assert (face_id[2:14, 3:5] == 0).all()
    assert weights[8, 4, 2] == pytest.approx((8.5 / 16 - 0.1) / 0.8, abs=0.01)


def test_same_input_same_bits() -> None:
    generator = torch.Generator().manual_seed(1)
    uvs = torch.rand((3000, 2), generator=generator)
    faces = torch.arange(3000).reshape(-1, 3)
    uvs[1::3] = (uvs[::3] + 0.03).clamp(0, 1)
    uvs[2::3] = (uvs[::3] + torch.tensor([0.0, 0.03])).clamp(0, 1)
    first, second = rasterize_uv(uvs, faces, 700), rasterize_uv(uvs, faces, 700)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_empty_and_bad_input() -> None:
    uvs, faces = torch.rand(3, 2), torch.tensor([[0, 1, 2]])
    face_id, weights = rasterize_uv(uvs[:0], faces[:0], 4)
    assert (face_id == -1).all()
    assert (weights == 0).all()
    for bad, name in (
        ((uvs + 1, faces, 4), "uvs"),
        ((uvs * float("nan"), faces, 4), "uvs"),
        ((uvs[:, :1], faces, 4), "uvs"),
        ((uvs, faces + 1, 4), "faces"),
        ((uvs, faces, 0), "size"),
    ):
        with pytest.raises(ValueError, match=f"^{name}"):
            rasterize_uv(*bad)
