from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import golden_cases, load_golden, under
from o_voxel.dual_grid import flexible_dual_grid_to_mesh

BOX = [[0.0, 0.0, 0.0], [4.0, 4.0, 4.0]]
# The four voxels around one edge along z, and the flag of that edge.
COORDS = torch.tensor([[1, 1, 0], [1, 2, 0], [2, 2, 0], [2, 1, 0]], dtype=torch.int32)
FLAGS = torch.tensor([[False, False, True]] + [[False] * 3] * 3)
HALVES = torch.full((4, 3), 0.5)


@pytest.mark.parametrize("path", golden_cases("fdg_to_mesh"))
def test_golden(path: Path) -> None:
    meta, tensors = load_golden(path)
    for shape in sorted({name.split(".")[0] for name in tensors}):
        case = under(tensors, f"{shape}.")
        for mode in ("nosplit", "split", "train"):
            vertices, faces = flexible_dual_grid_to_mesh(
                case["coords"],
                case["offsets"],
                case["intersected"],
                None if mode == "nosplit" else case["split_weight"],
                meta["aabb"],
                grid_size=meta["grid_size"],
                train=mode == "train",
            )
            expected = under(case, f"{mode}.")
            assert vertices.shape == expected["vertices"].shape
            assert (vertices - expected["vertices"]).abs().max() <= meta["tol"]["vertices_max_abs"]
            assert faces.dtype == expected["faces"].dtype
            assert torch.equal(faces, expected["faces"])


def test_one_quad() -> None:
    vertices, faces = flexible_dual_grid_to_mesh(COORDS, HALVES, FLAGS, None, BOX, voxel_size=2.0)
    assert vertices.tolist() == [[3, 3, 1], [3, 5, 1], [5, 5, 1], [5, 3, 1]]
    assert faces.tolist() == [[0, 1, 2], [0, 2, 3]]


def test_split_follows_the_greater_product() -> None:
    weights = torch.tensor([[1.0], [2.0], [1.0], [2.0]])
    _, faces = flexible_dual_grid_to_mesh(COORDS, HALVES, FLAGS, weights, BOX, grid_size=4)
    assert faces.tolist() == [[0, 1, 3], [3, 1, 2]]
    _, faces = flexible_dual_grid_to_mesh(COORDS, HALVES, FLAGS, weights.flip(0), BOX, grid_size=4)
    assert faces.tolist() == [[0, 1, 2], [0, 2, 3]]


def test_without_weights_an_empty_triangle_turns_the_diagonal() -> None:
    offsets = HALVES.clone()
    offsets[1] = torch.tensor([0.5, -0.5, 0.5])  # vertex 1 falls on vertex 0
    _, faces = flexible_dual_grid_to_mesh(COORDS, offsets, FLAGS, None, BOX, grid_size=4)
    assert faces.tolist() == [[0, 1, 3], [3, 1, 2]]


def test_missing_voxel_gives_no_quad() -> None:
    vertices, faces = flexible_dual_grid_to_mesh(COORDS[:3], HALVES[:3], FLAGS[:3], None, BOX, grid_size=4)
    assert len(vertices) == 3
    assert faces.shape == (0, 3)
    vertices, faces = flexible_dual_grid_to_mesh(COORDS[:0], HALVES[:0], FLAGS[:0], None, BOX, grid_size=4)
    assert vertices.shape == faces.shape == (0, 3)


@pytest.mark.parametrize("seed", range(5))
def test_quads_of_random_voxels(seed: int) -> None:
    """Each quad by asking for its four voxels one by one."""
    generator = torch.Generator().manual_seed(seed)
    side = 2 + 3 * seed
    coords = torch.nonzero(torch.rand((side, side, side), generator=generator) < 0.6)
    coords = coords[torch.randperm(len(coords), generator=generator)].int() + 2048 * (seed % 2)
    flags = torch.rand((len(coords), 3), generator=generator) < 0.5
    rows = {tuple(voxel): row for row, voxel in enumerate(coords.tolist())}
    expected = []
    for (x, y, z), crossed in zip(coords.tolist(), flags.tolist(), strict=True):
        around = (
            ((x, y, z), (x, y, z + 1), (x, y + 1, z + 1), (x, y + 1, z)),
            ((x, y, z), (x + 1, y, z), (x + 1, y, z + 1), (x, y, z + 1)),
            ((x, y, z), (x, y + 1, z), (x + 1, y + 1, z), (x + 1, y, z)),
        )
        for axis in range(3):
            if crossed[axis] and all(voxel in rows for voxel in around[axis]):
                a, b, c, d = (rows[voxel] for voxel in around[axis])
                expected += [[a, b, c], [a, c, d]]
    offsets = torch.rand((len(coords), 3), generator=generator)
    _, faces = flexible_dual_grid_to_mesh(coords, offsets, flags, None, [[0] * 3, [1] * 3], voxel_size=1 / 4096)
    assert faces.tolist() == expected
    assert expected or seed == 0


@torch.enable_grad()
def test_train_adds_the_weighted_middle_and_carries_gradients() -> None:
    offsets = HALVES.clone().requires_grad_()
    weights = torch.tensor([[3.0], [1.0], [1.0], [1.0]], requires_grad=True)
    lifted = offsets + torch.tensor([[0.0, 0.0, 1.0], [0, 0, 0], [0, 0, 1], [0, 0, 0]])
    vertices, faces = flexible_dual_grid_to_mesh(COORDS, lifted, FLAGS, weights, BOX, grid_size=4, train=True)
    assert vertices[4].tolist() == pytest.approx([2.0, 2.0, 1.25])  # height 3/4 of the way to diagonal 0-2
    assert faces.tolist() == [[0, 1, 4], [1, 2, 4], [2, 3, 4], [3, 0, 4]]
    vertices[4, 2].backward()
    assert offsets.grad is not None
    assert offsets.grad[:, 2].tolist() == pytest.approx([0.375, 0.125, 0.375, 0.125])
    assert weights.grad is not None
    assert weights.grad[0] > 0


@pytest.mark.parametrize(
    "size",
    [
        {"voxel_size": 1.0},
        {"voxel_size": (1.0, 1.0, 1.0)},
        {"grid_size": np.array([4, 4, 4])},
        {"grid_size": torch.tensor([4, 4, 4])},
        {"grid_size": 4},
    ],
)
def test_sizes_as_the_original_takes_them(size: dict[str, Any]) -> None:
    vertices, _ = flexible_dual_grid_to_mesh(COORDS, HALVES, FLAGS, None, np.array(BOX), **size)
    assert torch.equal(vertices, COORDS + 0.5)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"coords": COORDS[:, :2]}, "coords"),
        ({"dual_vertices": HALVES[:2]}, "dual_vertices"),
        ({"dual_vertices": HALVES * float("nan")}, "dual_vertices"),
        ({"intersected_flag": FLAGS[:2]}, "intersected_flag"),
        ({"split_weight": torch.ones(4)}, "split_weight"),
        ({"split_weight": torch.full((4, 1), float("inf"))}, "split_weight must be finite"),
        ({"coords": COORDS.float()}, "coords must be int32 or int64"),
        ({"coords": COORDS - 2}, "coords must be from 0 to 1048575, but reach from -2"),
        ({"grid_size": (4, 2, 4)}, r"coords must be below grid_size \[4, 2, 4\], but reach \[2, 2, 0\]"),
        ({"train": True}, "split_weight"),
        ({"aabb": [0, 1]}, "aabb"),
        ({"grid_size": None}, "voxel_size or grid_size"),
        ({"grid_size": (4, 4)}, "grid_size"),
        ({"coords": COORDS.long() + 2**40}, "coords must be from 0 to 1048575"),
        ({"aabb": [[0.0] * 3, [float("nan"), 1, 1]]}, "aabb must be two finite corners"),
        ({"aabb": [[0.0] * 3, [float("inf"), 1, 1]]}, "aabb must be two finite corners"),
        ({"aabb": [[0.0] * 3, [1, 1, -1]]}, "aabb must be two finite corners"),
        ({"grid_size": float("inf")}, "grid_size"),
        ({"voxel_size": float("inf")}, "voxel_size"),
        ({"voxel_size": 0.0}, "voxel_size"),
    ],
)
def test_bad_input(change: dict[str, Any], name: str) -> None:
    arguments: dict[str, Any] = {
        "coords": COORDS,
        "dual_vertices": HALVES,
        "intersected_flag": FLAGS,
        "split_weight": None,
        "aabb": BOX,
        "grid_size": 4,
    }
    with pytest.raises(ValueError, match=f"^{name}"):
        flexible_dual_grid_to_mesh(**(arguments | change))
