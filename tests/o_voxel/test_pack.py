from __future__ import annotations

import math

import pytest
import torch
from o_voxel.pack import Placement, extents, pack
from torch import Tensor


def boxes(sizes: list[tuple[float, float]], angle: float = 0.0) -> tuple[Tensor, Tensor]:
    """(corners (2N, 3, 2), chart (2N,)) of rectangles, all turned by ``angle`` about their own corners."""
    cosine, sine = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float64)
    square = torch.tensor([[[0.0, 0], [1, 0], [1, 1]], [[0, 0], [1, 1], [0, 1]]], dtype=torch.float64)
    corners = torch.stack([square * torch.tensor(size).double() @ turn.T + 7 * i for i, size in enumerate(sizes)])
    return corners.reshape(-1, 3, 2), torch.arange(len(sizes)).repeat_interleave(2)


def packed(corners: Tensor, chart: Tensor, cell: float, gap: int) -> tuple[Placement, Tensor]:
    place = pack(corners, chart, torch.arange(3 * len(chart)), int(chart.max()) + 1, cell, gap)
    moved = place(corners.reshape(-1, 2), chart.repeat_interleave(3))
    return place, moved.view(corners.shape)


def scale_of(place: Placement) -> float:
    """The one scale of all charts, which are turned and not mirrored."""
    squared = torch.linalg.det(place.matrix)
    assert torch.allclose(place.matrix @ place.matrix.mT, squared[:, None, None] * torch.eye(2).double(), atol=1e-12)
    assert torch.allclose(squared, squared[0].expand_as(squared))
    return float(squared[0].sqrt())


def test_four_squares_make_a_square() -> None:
    corners, chart = boxes([(29.5, 29.5)] * 4)
    place, moved = packed(corners, chart, 1.0, 2)
    # 30 cells each, with 2 on either side.
    assert scale_of(place) == pytest.approx(1 / 66)
    low, high = extents(moved.reshape(-1, 2), chart.repeat_interleave(3), 4)
    assert sorted((low * 66).round(decimals=9).tolist()) == [[2, 2], [2, 34], [34, 2], [34, 34]]
    assert torch.allclose((high - low) * 66, torch.tensor(29.5).double())


def test_boxes_are_turned_upright() -> None:
    corners, chart = boxes([(80.0, 20.0), (40, 10), (15, 60)], angle=0.4)
    _, moved = packed(corners, chart, 1.0, 1)
    low, high = extents(moved.reshape(-1, 2), chart.repeat_interleave(3), 3)
    area = torch.tensor([1600.0, 400, 900]).double()
    box = (high - low).prod(1)
    assert torch.allclose(box / box[0], area / area[0], rtol=0.03)


def test_gap_between_all_charts() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.randn((80, 3, 2), generator=generator).double() * 12
    a, b, c = corners.unbind(1)
    clockwise = (b - a)[:, 0] * (c - a)[:, 1] < (b - a)[:, 1] * (c - a)[:, 0]
    corners[clockwise] = corners[clockwise].flip(1)
    place, moved = packed(corners, torch.arange(80), 0.5, 3)
    gap = 3 * 0.5 * scale_of(place)
    # Points along all sides, each against those of every other triangle.
    t = torch.linspace(0, 1, 40).double()[:, None, None]
    sides = (moved * (1 - t)[..., None] + moved.roll(-1, 1) * t[..., None]).permute(1, 0, 2, 3).reshape(80, -1, 2)
    apart = torch.stack([torch.cdist(side, sides).amin((1, 2)) for side in sides])
    apart.fill_diagonal_(1)
    assert apart.min() >= 0.999 * gap
    assert moved.min() > 0
    assert moved.max() < 1


def test_triangles_share_their_boxes() -> None:
    """Bitmaps and half turns: right-angled halves of squares lie in pairs, which alone would cover less than half."""
    half = torch.tensor([[[0.0, 0], [60, 0], [0, 60]]]).double()
    corners = half.expand(32, 3, 2).contiguous()
    place, _ = packed(corners, torch.arange(32), 1.0, 1)
    assert 32 * 60 * 60 / 2 * scale_of(place) ** 2 > 0.6


def test_more_rows_than_expected() -> None:
    """Rings leave most of their boxes empty: the strip ends far higher than their cells suggest."""
    angle = torch.arange(65).double() / 64 * 2 * torch.pi
    rim = torch.stack([angle.cos(), angle.sin()], 1)
    inner, outer = 99.5 * rim, 100 * rim
    faces = torch.cat(
        [torch.stack([outer[:-1], outer[1:], inner[1:]], 1), torch.stack([outer[:-1], inner[1:], inner[:-1]], 1)]
    )
    chart = torch.arange(20).repeat_interleave(len(faces))
    place, moved = packed(faces.repeat(20, 1, 1), chart, 1.0, 2)
    low, high = extents(moved.reshape(-1, 2), chart.repeat_interleave(3), 20)
    assert torch.allclose(high - low, torch.tensor(200 * scale_of(place)).double(), rtol=0.01)
    assert moved.min() > 0
    assert moved.max() < 1
    assert len(torch.unique(low.round(decimals=6), dim=0)) == 20


def test_equal_input_gives_equal_bits() -> None:
    corners, chart = boxes([(3.0 + i % 7, 2.0 + i % 5) for i in range(60)], angle=0.3)
    first, second = packed(corners, chart, 0.25, 2)[0], packed(corners, chart, 0.25, 2)[0]
    assert torch.equal(first.matrix, second.matrix)
    assert torch.equal(first.offset, second.offset)
