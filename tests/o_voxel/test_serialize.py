"""Voxels on a line: z-order and Hilbert."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
import torch
from golden_cases import golden_cases, load_golden
from o_voxel.serialize import Mode, decode_seq, encode_seq
from torch import Tensor

MODES: list[Mode] = ["z_order", "hilbert"]


def random_coords(count: int, below: int) -> Tensor:
    return torch.randint(0, below, (count, 3), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("path", golden_cases("serialize"))
def test_as_the_original(path: Path) -> None:
    _, tensors = load_golden(path)
    coords = tensors.pop("coords")
    assert tensors
    for name, codes in tensors.items():
        mode, digits = name.split(".")
        permute = [int(digit) for digit in digits]
        ours = encode_seq(coords, permute, mode)  # type: ignore[arg-type]
        assert ours.dtype == codes.dtype
        assert torch.equal(ours, codes), name
        assert torch.equal(decode_seq(codes, permute, mode), coords), name  # type: ignore[arg-type]


def test_z_order_by_hand() -> None:
    coords = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], [3, 0, 1], [2047, 2047, 2047]])
    assert encode_seq(coords[:-1]).tolist() == [0, 1, 2, 4, 0b100101]
    assert encode_seq(coords[:-1], [2, 0, 1]).tolist() == [0, 4, 1, 2, 0b010110]
    assert encode_seq(coords).tolist() == [0, 1, 2, 4, 0b100101, 2**33 - 1]


@pytest.mark.parametrize("permute", list(permutations(range(3))))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("below", [1024, 2048, 2**19])
def test_there_and_back(mode: Mode, permute: tuple[int, int, int], below: int) -> None:
    coords = random_coords(500, below).int()
    codes = encode_seq(coords, permute, mode)
    assert codes.dtype == (torch.int32 if below == 1024 else torch.int64)
    assert torch.equal(decode_seq(codes, permute, mode), coords)


@pytest.mark.parametrize("start", [0, 2**30 - 3000, 2**33 - 6000])
def test_the_hilbert_curve_walks_from_voxel_to_voxel(start: int) -> None:
    coords = decode_seq(torch.arange(start, start + 6000), mode="hilbert")
    assert (coords.diff(dim=0).abs().sum(dim=1) == 1).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_code_does_not_depend_on_the_company(mode: Mode) -> None:
    coords = random_coords(500, 1024)
    alone = encode_seq(coords, mode=mode)
    together = encode_seq(torch.cat([coords, torch.tensor([[2**19 - 1, 0, 5]])]), mode=mode)
    assert torch.equal(alone.long(), together[:-1])
    assert torch.equal(decode_seq(alone.long(), mode=mode), coords)


@pytest.mark.parametrize("mode", MODES)
def test_no_voxels(mode: Mode) -> None:
    codes = encode_seq(torch.empty(0, 3, dtype=torch.int32), mode=mode)
    assert codes.shape == (0,)
    assert decode_seq(codes, mode=mode).shape == (0, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_a_gpu_gives_the_same(mode: Mode) -> None:
    coords = random_coords(5000, 2048)
    codes = encode_seq(coords.cuda(), mode=mode)
    assert torch.equal(codes.cpu(), encode_seq(coords, mode=mode))
    assert torch.equal(decode_seq(codes, mode=mode).cpu(), coords)


def test_wrong_arguments_are_named() -> None:
    coords, codes = torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    for wrong in (coords[0], coords[:, :2], coords.float(), coords.bool(), coords - 1, coords.long() + 2**19):
        with pytest.raises(ValueError, match=r"^coords must be"):
            encode_seq(wrong)
    for wrong in (coords, codes.float(), codes - 1, codes.long() + 2**57):
        with pytest.raises(ValueError, match=r"^code must be"):
            decode_seq(wrong)
    for permute in ([0, 1], [0, 1, 1], [1, 2, 3]):
        with pytest.raises(ValueError, match=r"^permute must"):
            encode_seq(coords, permute)
        with pytest.raises(ValueError, match=r"^permute must"):
            decode_seq(codes, permute)
    with pytest.raises(ValueError, match=r"^mode must be"):
        encode_seq(coords, mode="peano")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^mode must be"):
        decode_seq(codes, mode="peano")  # type: ignore[arg-type]
