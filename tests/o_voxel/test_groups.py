from __future__ import annotations

import math

import pytest
import torch
from o_voxel.groups import group_sums


def test_hand_written_sums() -> None:
    values = torch.tensor([[1.0, -2.0], [0.5, 4.0], [0.25, 8.0], [-3.0, 0.0]])
    sums = group_sums(values, torch.tensor([2, 0, 2, 0]), 4)
    assert sums.dtype == torch.float32
    assert sums.tolist() == [[-2.5, 4.0], [0.0, 0.0], [1.25, 6.0], [0.0, 0.0]]


def test_shapes_and_nothing() -> None:
    group = torch.tensor([1, 1, 0])
    assert group_sums(torch.tensor([1.0, 2, 3]).double(), group, 2).tolist() == [3.0, 3.0]
    assert torch.equal(group_sums(torch.ones(3, 2, 5), group, 3)[:, 1, 4], torch.tensor([1.0, 2, 0]))
    assert group_sums(torch.zeros(0, 3), group[:0], 2).tolist() == [[0.0] * 3] * 2
    assert group_sums(torch.ones(3, 0), group, 2).shape == (2, 0)


def test_order_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn((10_000, 3), generator=generator).double()
    values *= torch.exp(8 * torch.randn((10_000, 1), generator=generator))
    group = torch.randint(7, (10_000,), generator=generator)
    shuffled = torch.randperm(10_000, generator=generator)
    sums = group_sums(values, group, 7)
    assert torch.equal(sums, group_sums(values[shuffled], group[shuffled], 7))
    assert torch.equal(sums, -group_sums(-values, group, 7))


@pytest.mark.parametrize("scale", [1e-280, 1e-30, 1.0, 1e30, 1e290])
def test_small_next_to_large(scale: float) -> None:
    """Each group as exact as if it were alone, far below the rounding of one running sum over all."""
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(4000, generator=generator).double() * scale
    values[::2] *= 1e-8
    group = torch.arange(4000) % 2
    sums = group_sums(values, group, 2).tolist()
    for i in (0, 1):
        assert sums[i] == pytest.approx(math.fsum(values[i::2].tolist()), rel=3e-16)


def test_largest_sums() -> None:
    ones = torch.full((5000,), 3e38)
    assert float(group_sums(-ones.double(), torch.zeros(5000).long(), 1)) == pytest.approx(-1.5e42, rel=1e-6)
    assert float(group_sums(torch.full((3,), 1.9999999), torch.zeros(3).long(), 1)) == pytest.approx(5.9999997)


@pytest.mark.gpu
def test_cuda_equals_cpu() -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn((300_000, 4), generator=generator)
    group = (torch.rand(300_000, generator=generator) ** 3 * 1000).long()
    expected = group_sums(values, group, 1000)
    for _ in range(3):
        assert torch.equal(group_sums(values.cuda(), group.cuda(), 1000).cpu(), expected)
