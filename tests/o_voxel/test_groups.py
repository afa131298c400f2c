from __future__ import annotations

import pytest
import torch
from o_voxel.groups import sums_by_group


def test_by_hand() -> None:
    values = torch.tensor([1.0, 10, 2, 3, 20, 4])
    group = torch.tensor([2, 0, 2, 2, 0, 2])
    assert sums_by_group(values, group, 4).tolist() == [30, 0, 10, 0]
    assert sums_by_group(torch.stack([values, -values], 1), group, 3).tolist() == [[30, -30], [0, 0], [10, -10]]


def test_added_in_pairs() -> None:
    # In float32 1e8 + 1 is 1e8: only in pairs of neighbours do the ones survive.
    values = torch.tensor([1e8, -1e8, 1.0, 1.0, 1.0])
    assert sums_by_group(values, torch.zeros(5, dtype=torch.int64), 1).tolist() == [3]
    assert sums_by_group(values[[0, 2, 1, 3, 4]], torch.zeros(5, dtype=torch.int64), 1).tolist() == [1]


@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (1000, 1), (1000, 7), (1000, 5000), (4097, 600)])
def test_equals_index_add(rows: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    values = torch.rand((rows, 3), generator=generator, dtype=torch.float64) - 0.5
    # Squared: some groups are large, many are empty.
    group = (torch.rand(rows, generator=generator) ** 2 * groups).long()
    expected = torch.zeros((groups, 3), dtype=torch.float64).index_add_(0, group, values)
    torch.testing.assert_close(sums_by_group(values, group, groups), expected, rtol=0, atol=1e-12)


def test_empty() -> None:
    assert sums_by_group(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 2).tolist() == [[0, 0, 0]] * 2
    assert sums_by_group(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0).shape == (0,)
