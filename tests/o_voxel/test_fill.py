from __future__ import annotations

import pytest
import torch
from o_voxel.fill import fill_gaps


def test_by_hand() -> None:
    image = torch.tensor([[1, 0, 0, 0, 2]])[..., None]
    mask = torch.tensor([[True, False, False, False, True]])
    filled = fill_gaps(image, mask)[0, :, 0].tolist()
    assert filled[:2] == [1, 1]
    assert filled[3:] == [2, 2]
    assert image[0, :, 0].tolist() == [1, 0, 0, 0, 2]


def test_equals_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand((23, 31), generator=generator) < 0.03
    row, column = torch.meshgrid(torch.arange(23), torch.arange(31), indexing="ij")
    place = torch.stack([row, column], -1)
    filled = fill_gaps(place, mask)
    assert mask[filled[..., 0], filled[..., 1]].all()
    distance = (filled - place).float().norm(dim=-1)
    every = (place[:, :, None] - place[mask]).float().norm(dim=-1).amin(-1)
    assert torch.equal(distance, every)


def test_nothing_to_take_and_bad_input() -> None:
    image = torch.arange(12.0).reshape(2, 2, 3)
    assert torch.equal(fill_gaps(image, torch.zeros(2, 2, dtype=torch.bool)), image)
    assert torch.equal(fill_gaps(image, torch.ones(2, 2, dtype=torch.bool)), image)
    with pytest.raises(ValueError, match=r"^mask"):
        fill_gaps(image, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"^mask"):
        fill_gaps(image, torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"^image"):
        fill_gaps(image[0], torch.ones(2, dtype=torch.bool))
