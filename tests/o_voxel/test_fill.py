from __future__ import annotations

import o_voxel.fill
import pytest
import torch
from o_voxel.fill import fill_gaps
from scipy.ndimage import distance_transform_edt
from torch import Tensor


def places(height: int, width: int) -> Tensor:
    """An image of each texel's own (row, column): filled, it tells where each value came from."""
    return torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1)


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
    place = places(23, 31)
    filled = fill_gaps(place, mask)
    assert mask[filled[..., 0], filled[..., 1]].all()
    distance = (filled - place).float().norm(dim=-1)
    every = (place[:, :, None] - place[mask]).float().norm(dim=-1).amin(-1)
    assert torch.equal(distance, every)


def test_ties_go_left_then_up() -> None:
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[0, 2] = mask[2, 0] = mask[0, 0] = mask[2, 2] = True
    filled = fill_gaps(places(3, 3), mask).tolist()
    assert filled[1] == [[0, 0], [0, 0], [0, 2]]
    assert filled[0][1] == [0, 0]
    assert filled[2][1] == [2, 0]


@pytest.mark.parametrize("share", [2e-5, 1e-3, 0.5, 0.999])
@pytest.mark.parametrize("block", [1, 1000, 1 << 24])
def test_as_near_as_scipy(share: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(o_voxel.fill, "_BLOCK", block)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand((170, 301), generator=generator) < share
    mask[100, 7] = True
    # A disc without any: here the nearest texels lie on a circle, far away.
    mask &= (places(170, 301) - torch.tensor([80, 200])).float().norm(dim=-1) > 60
    before = mask.clone()
    place = places(170, 301)
    filled = fill_gaps(place, mask)
    assert torch.equal(mask, before)
    assert torch.equal(filled[mask], place[mask])
    assert mask[filled[..., 0], filled[..., 1]].all()
    found = ((filled - place) ** 2).sum(-1)
    assert torch.equal(found, torch.from_numpy(distance_transform_edt(~mask.numpy()) ** 2).round().long())


def test_any_type_and_layout() -> None:
    generator = torch.Generator().manual_seed(2)
    image = torch.rand((40, 30, 6), generator=generator)
    mask = torch.rand((40, 30), generator=generator) < 0.1
    expected = fill_gaps(image, mask)
    assert expected.dtype == torch.float32
    turned = fill_gaps(image.transpose(0, 1).contiguous().transpose(0, 1), mask.T.contiguous().T)
    assert torch.equal(turned, expected)
    whole = (image * 255).to(torch.uint8)
    assert torch.equal(fill_gaps(whole, mask), (expected * 255).to(torch.uint8))


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
    with pytest.raises(ValueError, match=r"^image"):
        fill_gaps(torch.zeros(1, 1 << 15, 1), torch.ones(1, 1 << 15, dtype=torch.bool))
