from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_cases import golden_cases, load_golden
from o_voxel.sample import grid_sample_3d, grid_sample_3d_reference

COORDS = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.int32)
FEATS = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
SHAPE = (1, 2, 4, 4, 4)


def sample(points: list[list[float]], mode: str = "trilinear") -> list[list[float]]:
    return grid_sample_3d(FEATS, COORDS, SHAPE, torch.tensor([points]), mode)[0].tolist()


@pytest.mark.parametrize("path", golden_cases("grid_sample"))
@pytest.mark.parametrize("mode", ["trilinear", "nearest"])
def test_golden(path: Path, mode: str) -> None:
    meta, tensors = load_golden(path)
    for function in (grid_sample_3d, grid_sample_3d_reference):
        out = function(tensors["feats"], tensors["coords"], meta["shape"], tensors["grid"], mode)
        assert (out - tensors[mode]).abs().max() <= meta["tol"]["max_abs"]


def test_trilinear_by_hand() -> None:
    assert sample([[0.5, 0.5, 0.5], [1.5, 0.5, 0.5], [1.0, 0.5, 0.5]]) == [[1, 10], [3, 30], [2, 20]]
    # Half the weight falls on voxels that do not exist: what is left counts in full.
    assert sample([[1.0, 1.0, 0.5], [2.25, 0.5, 0.5], [-0.25, 0.5, 0.5]]) == [[2, 20], [3, 30], [1, 10]]
    assert sample([[3.5, 3.5, 3.5], [-5.0, 0.5, 0.5], [1e9, 0.5, 0.5]]) == [[0, 0]] * 3


def test_nearest_by_hand() -> None:
    assert sample([[0.9, 0.1, 0.1], [1.0, 0.99, 0.0], [2.0, 0.5, 0.5]], "nearest") == [
        [1, 10],
        [3, 30],
        [0, 0],
    ]
    # Truncation towards zero lets the first voxel reach one unit beyond the grid, as in the original.
    assert sample([[-0.5, 0.5, 0.5], [-1.0, 0.5, 0.5]], "nearest") == [[1, 10], [0, 0]]


@pytest.mark.parametrize("mode", ["trilinear", "nearest"])
def test_equals_reference(mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    coords = torch.nonzero(torch.rand((2, 19, 33, 8), generator=generator) < 0.3).int()
    coords = coords[torch.randperm(len(coords), generator=generator)]
    feats = torch.randn((len(coords), 5), generator=generator)
    grid = torch.rand((2, 9000, 3), generator=generator) * torch.tensor([23.0, 37.0, 12.0]) - 2
    out = grid_sample_3d(feats, coords, (2, 5, 19, 33, 8), grid, mode)
    expected = grid_sample_3d_reference(feats, coords, (2, 5, 19, 33, 8), grid, mode)
    assert (out - expected).abs().max() <= 2e-6
    assert (expected != 0).any(-1).float().mean() > 0.15


def test_empty_and_dtype() -> None:
    none = grid_sample_3d(FEATS[:0], COORDS[:0], SHAPE, torch.rand(1, 3, 3))
    assert none.tolist() == [[[0.0, 0.0]] * 3]
    assert grid_sample_3d(FEATS, COORDS, SHAPE, torch.zeros(1, 0, 3)).shape == (1, 0, 2)
    assert grid_sample_3d(FEATS.half(), COORDS, SHAPE, torch.full((1, 1, 3), 0.5)).dtype == torch.float16


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((FEATS[0], COORDS, SHAPE, torch.zeros(1, 1, 3)), "feats"),
        ((FEATS, COORDS[:1], SHAPE, torch.zeros(1, 1, 3)), "coords"),
        ((FEATS, COORDS + 4, SHAPE, torch.zeros(1, 1, 3)), "coords"),
        ((FEATS, COORDS - 1, SHAPE, torch.zeros(1, 1, 3)), "coords"),
        ((FEATS, COORDS, (1, 3, 4, 4, 4), torch.zeros(1, 1, 3)), "shape"),
        ((FEATS, COORDS, SHAPE, torch.zeros(2, 1, 3)), "grid"),
        ((FEATS, COORDS, SHAPE, torch.zeros(1, 1, 3), "cubic"), "mode"),
    ],
)
def test_bad_input(arguments: tuple[object, ...], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}"):
        grid_sample_3d(*arguments)  # type: ignore[arg-type]
