"""Neighbour lookup and submanifold convolution against dense truth and recorded tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden_cases import golden_cases, load_golden, relative_l2
from o_voxel import conv
from o_voxel.conv import (
    ConvPlan,
    plan_conv,
    submanifold_conv3d,
    submanifold_conv3d_reference,
)
from o_voxel.lookup import neighbor_map, voxel_rows
from torch import Tensor


def random_coords(seed: int, size: int = 6, batch: int = 2, density: float = 0.4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, size, size, size, generator=generator) < density).nonzero().int()


def test_rows_of_known_voxels() -> None:
    coords = torch.tensor([[0, 5, 0, 2], [1, 0, 0, 0], [0, 5, 1, 2]], dtype=torch.int32)
    queries = torch.tensor([[0, 5, 1, 2], [0, 0, 0, 0], [1, 0, 0, 0], [0, 5, -1, 2], [0, 5, 0, 99]])
    assert voxel_rows(coords, queries).tolist() == [2, -1, 1, -1, -1]


def test_rows_do_not_overflow_at_2048() -> None:
    coords = torch.tensor([[7, 2047, 2047, 2047], [0, 0, 0, 0]], dtype=torch.int32)
    assert voxel_rows(coords, coords).tolist() == [0, 1]
    assert neighbor_map(coords)[13].tolist() == [0, 1]
    assert (neighbor_map(coords) >= 0).sum() == 2


@pytest.mark.parametrize("seed", range(3))
def test_neighbor_map_equals_lookup_of_each_offset(seed: int) -> None:
    coords = random_coords(seed)
    neighbors = neighbor_map(coords)
    for column in range(27):
        step = torch.tensor([0, column // 9 - 1, column // 3 % 3 - 1, column % 3 - 1], dtype=torch.int32)
        assert torch.equal(neighbors[column].long(), voxel_rows(coords, coords + step))


def test_empty_grid() -> None:
    coords = torch.zeros(0, 4, dtype=torch.int32)
    assert neighbor_map(coords).shape == (27, 0)
    assert voxel_rows(coords, torch.zeros(2, 4, dtype=torch.int32)).tolist() == [-1, -1]
    out = submanifold_conv3d(torch.zeros(0, 2), plan_conv(coords), torch.zeros(3, 3, 3, 3, 2), torch.zeros(3))
    assert out.shape == (0, 3)


@pytest.mark.parametrize("channels", [3, 80], ids=["gathered", "by tap"])
def test_convolution_equals_dense(channels: int) -> None:
    generator = torch.Generator().manual_seed(1)
    coords = random_coords(4)
    feats = torch.randn(len(coords), channels, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 3, 3, 3, channels, generator=generator, dtype=torch.float64)
    bias = torch.randn(5, generator=generator, dtype=torch.float64)
    dense = torch.zeros(2, channels, 6, 6, 6, dtype=torch.float64)
    b, x, y, z = coords.long().unbind(1)
    dense[b, :, x, y, z] = feats
    expected = F.conv3d(dense, weight.permute(0, 4, 1, 2, 3), bias, padding=1)[b, :, x, y, z]
    torch.testing.assert_close(submanifold_conv3d(feats, plan_conv(coords), weight, bias), expected)
    torch.testing.assert_close(submanifold_conv3d_reference(feats, neighbor_map(coords), weight, bias), expected)


@torch.enable_grad()
@pytest.mark.parametrize("channels", [3, 80], ids=["gathered", "by tap"])
def test_gradients(channels: int) -> None:
    generator = torch.Generator().manual_seed(3)
    coords = random_coords(7, size=4)
    shapes = ((len(coords), channels), (2, 3, 3, 3, channels), (2,))
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    wanted = torch.randn(len(coords), 2, generator=generator, dtype=torch.float64)
    ours = submanifold_conv3d(leaves[0], plan_conv(coords), *leaves[1:])
    reference = submanifold_conv3d_reference(leaves[0], neighbor_map(coords), *leaves[1:])
    for a, b in zip(*(torch.autograd.grad(out, leaves, wanted) for out in (ours, reference)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("channels", [3, 80], ids=["gathered", "by tap"])
def test_parts_are_parts_of_the_whole(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "SEGMENT", 32)
    generator = torch.Generator().manual_seed(2)
    coords = random_coords(5)
    feats = torch.randn(len(coords), channels, generator=generator)
    weight, bias = torch.randn(5, 3, 3, 3, channels, generator=generator), torch.randn(5, generator=generator)
    plan = plan_conv(coords)
    whole = submanifold_conv3d(feats, plan, weight, bias)
    for first, last in ((0, 32), (32, 96), (64, None)):
        torch.testing.assert_close(submanifold_conv3d(feats, plan, weight, bias, first, last), whole[first:last])
    for first, last in ((1, 32), (0, 33), (64, 32), (0, 2 * len(feats))):
        with pytest.raises(ValueError, match="multiples of 32"):
            submanifold_conv3d(feats, plan, weight, bias, first, last)


def test_sorted_plan_holds_every_neighbour_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "SEGMENT", 256)
    coords = random_coords(6, size=9)
    neighbors = neighbor_map(coords)
    plan = conv._sorted_plan(neighbors.clone())
    assert torch.equal(plan.order.sort().values, torch.arange(len(coords)).int())
    assert torch.equal(plan.order // 256, torch.arange(len(coords)) // 256)  # segments stay
    assert torch.equal(plan.neighbors, neighbors[:, plan.order.long()])
    for tile, (taps, count) in enumerate(zip(plan.taps.tolist(), plan.tap_counts.tolist(), strict=True)):
        part = plan.neighbors[:, tile * conv.TILE : (tile + 1) * conv.TILE]
        assert taps[:count] == (part >= 0).any(dim=1).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("path", golden_cases("sparse_conv"))
def test_convolution_golden(path: Path) -> None:
    meta, tensors = load_golden(path)
    out = submanifold_conv3d(tensors["x"], plan_conv(tensors["coords"]), tensors["weight"], tensors["bias"])
    assert relative_l2(out, tensors["out"]) <= meta["tol"]["rel_l2"]


def test_bad_shapes_are_named() -> None:
    coords = torch.zeros(1, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="coords must be"):
        neighbor_map(torch.zeros(1, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="queries must be"):
        voxel_rows(coords, torch.zeros(1, 4))
    good = (torch.zeros(1, 2), plan_conv(coords), torch.zeros(3, 3, 3, 3, 2), torch.zeros(3))
    for index, name in enumerate(("feats", "plan", "weight", "bias")):
        bad = list(good)
        bad[index] = ConvPlan(torch.zeros(27, 2)) if name == "plan" else torch.zeros(2, 2, 2)
        with pytest.raises(ValueError, match=f"{name} must be"):
            submanifold_conv3d(*bad)
