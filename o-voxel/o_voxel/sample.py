"""Sampling of features that live on sparse voxels.

Voxel (i, j, k) spans [i, i+1) x [j, j+1) x [k, k+1); its feature sits at its centre.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .launch import Floats, Ints, Vec3i, Vec3s, func, kernel, launch, shared, wp

# Voxels are found through bricks of 8^3: a dense table of bricks over the whole grid, then a dense table in
# each brick. Two reads find a voxel, and memory stays near 2 KB for each brick that holds any.
_BRICK = wp.constant(8)
_CELLS = 8**3


class VoxelField:
    """Features on sparse voxels, indexed once to be sampled many times.

    feats: (N, C) float. coords: (N, 4) int [batch, x, y, z], each once. shape: (B, C, X, Y, Z).
    Raises ValueError on wrong shapes or coordinates outside ``shape``.
    """

    def __init__(self, feats: Tensor, coords: Tensor, shape: Sequence[int]) -> None:
        _check_voxels(feats, coords, shape)
        self._shape = [int(v) for v in shape]
        self._dtype = feats.dtype
        self._feats = feats.detach().float().contiguous()
        self._table, self._bricks, self._size = _brick_table(coords, self._shape[0], self._shape[2:])

    def sample(self, grid: Tensor, mode: str = "trilinear") -> Tensor:
        """(B, P, C) features at ``grid`` (B, P, 3); see ``grid_sample_3d``."""
        _check_grid(grid, self._shape, mode)
        points = grid.detach().float().contiguous().view(-1, 3)
        channels = self._feats.shape[1]
        out = torch.zeros((len(points), channels), dtype=torch.float32, device=points.device)
        arguments = [
            shared(points, wp.vec3),
            shared(self._feats.view(-1), wp.float32),
            shared(self._table, wp.int32),
            shared(self._bricks, wp.int32),
            wp.vec3i(*self._size),
            wp.vec3i(*self._shape[2:]),
            grid.shape[1],
            channels,
            shared(out.view(-1), wp.float32),
        ]
        launch(_trilinear if mode == "trilinear" else _nearest, len(points), arguments, points.device)
        return out.view(grid.shape[0], -1, channels).to(self._dtype)


def grid_sample_3d(
    feats: Tensor, coords: Tensor, shape: Sequence[int], grid: Tensor, mode: str = "trilinear"
) -> Tensor:
    """Sample voxel features at points. Meaning of FlexGEMM's function of the same name; not differentiable.

    feats: (N, C) float. coords: (N, 4) int [batch, x, y, z], each once. shape: (B, C, X, Y, Z).
    grid: (B, P, 3) float, in units of voxels, so that the centre of voxel (0, 0, 0) is (0.5, 0.5, 0.5).
    mode: "trilinear" weights those of the 8 nearest centres whose voxel exists, and divides by the sum of
    the weights; "nearest" takes the voxel that holds the point (coordinates are truncated towards zero).
    Returns (B, P, C) in the type of ``feats``; zero where no voxel is near.
    Raises ValueError on wrong shapes or coordinates outside ``shape``.
    """
    return VoxelField(feats, coords, shape).sample(grid, mode)


def grid_sample_3d_reference(
    feats: Tensor, coords: Tensor, shape: Sequence[int], grid: Tensor, mode: str = "trilinear"
) -> Tensor:
    """``grid_sample_3d`` in plain torch, through a dense volume: for tests, and for small grids only."""
    _check_voxels(feats, coords, shape)
    _check_grid(grid, shape, mode)
    extent = torch.tensor(shape[2:], device=grid.device)
    rows = torch.full((int(shape[0]), *map(int, shape[2:])), -1, device=coords.device)
    rows[tuple(coords.long().T)] = torch.arange(len(coords), device=coords.device)
    batch = torch.arange(grid.shape[0], device=grid.device)[:, None].expand(grid.shape[:2])
    total = torch.zeros((*grid.shape[:2], feats.shape[1]), device=feats.device)
    weights = torch.zeros((*grid.shape[:2], 1), device=feats.device)
    corners = [(0, 0, 0)] if mode == "nearest" else [(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)]
    for corner in corners:
        if mode == "nearest":
            voxel = grid.trunc().long()
            weight = torch.ones_like(weights)
        else:
            voxel = (grid - 0.5).floor().long() + torch.tensor(corner, device=grid.device)
            weight = (1 - (grid - voxel - 0.5).abs()).prod(-1, keepdim=True)
        inside = ((voxel >= 0) & (voxel < extent)).all(-1)
        clamped = voxel.clamp_min(0).minimum(extent - 1)
        row = torch.where(inside, rows[batch, clamped[..., 0], clamped[..., 1], clamped[..., 2]], -1)
        weight = weight * (row >= 0)[..., None]
        total += weight * feats[row.clamp_min(0)]
        weights += weight
    return (total / weights.clamp_min(1e-12)).to(feats.dtype)


def _check_voxels(feats: Tensor, coords: Tensor, shape: Sequence[int]) -> None:
    if feats.ndim != 2 or not feats.is_floating_point():
        raise ValueError(f"feats must be floating point of shape (N, C), not {tuple(feats.shape)}.")
    if coords.shape != (len(feats), 4):
        raise ValueError(f"coords must have shape ({len(feats)}, 4), not {tuple(coords.shape)}.")
    if len(shape) != 5 or int(shape[1]) != feats.shape[1]:
        raise ValueError(f"shape must be (B, {feats.shape[1]}, X, Y, Z), not {tuple(shape)}.")
    if len(coords):
        limit = torch.tensor([shape[0], *shape[2:]], device=coords.device)
        if bool((coords < 0).any()) or bool((coords >= limit).any()):
            raise ValueError(f"coords must lie inside shape={tuple(shape)}.")


def _check_grid(grid: Tensor, shape: Sequence[int], mode: str) -> None:
    if grid.ndim != 3 or grid.shape[0] != shape[0] or grid.shape[2] != 3:
        raise ValueError(f"grid must have shape ({shape[0]}, P, 3), not {tuple(grid.shape)}.")
    if mode not in ("trilinear", "nearest"):
        raise ValueError(f"mode={mode!r} must be 'trilinear' or 'nearest'.")


def _brick_table(coords: Tensor, batches: int, extent: list[int]) -> tuple[Tensor, Tensor, list[int]]:
    """Return the brick of each block of the grid or -1, the row of each cell of each brick or -1, and how
    many blocks lie along each axis."""
    size = [-(-v // 8) for v in extent]
    batch, x, y, z = coords.long().unbind(1)
    block = ((batch * size[0] + x // 8) * size[1] + y // 8) * size[2] + z // 8
    used, brick = torch.unique(block, return_inverse=True)
    table = torch.full((batches * size[0] * size[1] * size[2],), -1, dtype=torch.int32, device=coords.device)
    table[used] = torch.arange(len(used), dtype=torch.int32, device=coords.device)
    bricks = torch.full((len(used) * _CELLS,), -1, dtype=torch.int32, device=coords.device)
    cell = brick * _CELLS + (x % 8) * 64 + (y % 8) * 8 + z % 8
    bricks[cell] = torch.arange(len(coords), dtype=torch.int32, device=coords.device)
    return table, bricks, size


@func
def _row(batch: int, x: int, y: int, z: int, table: Ints, bricks: Ints, size: Vec3i, extent: Vec3i) -> int:
    if x < 0 or y < 0 or z < 0 or x >= extent[0] or y >= extent[1] or z >= extent[2]:
        return -1
    block = ((batch * size[0] + x // _BRICK) * size[1] + y // _BRICK) * size[2] + z // _BRICK
    brick = table[block]
    if brick < 0:
        return -1
    cell = ((x % _BRICK) * _BRICK + y % _BRICK) * _BRICK + z % _BRICK
    return int(bricks[brick * _BRICK * _BRICK * _BRICK + cell])


@kernel
def _nearest(
    first: int,
    points: Vec3s,
    feats: Floats,
    table: Ints,
    bricks: Ints,
    size: Vec3i,
    extent: Vec3i,
    per_batch: int,
    channels: int,
    out: Floats,
) -> None:
    i = first + wp.tid()
    p = points[i]
    row = _row(i // per_batch, int(p[0]), int(p[1]), int(p[2]), table, bricks, size, extent)
    if row >= 0:
        for c in range(channels):
            out[i * channels + c] = feats[row * channels + c]


@kernel
def _trilinear(
    first: int,
    points: Vec3s,
    feats: Floats,
    table: Ints,
    bricks: Ints,
    size: Vec3i,
    extent: Vec3i,
    per_batch: int,
    channels: int,
    out: Floats,
) -> None:
    i = first + wp.tid()
    p = points[i]
    x0 = int(wp.floor(p[0] - 0.5))
    y0 = int(wp.floor(p[1] - 0.5))
    z0 = int(wp.floor(p[2] - 0.5))
    total = float(0)
    for corner in range(8):
        x = x0 + (corner & 1)
        y = y0 + ((corner >> 1) & 1)
        z = z0 + ((corner >> 2) & 1)
        row = _row(i // per_batch, x, y, z, table, bricks, size, extent)
        if row >= 0:
            weight = (
                (1.0 - wp.abs(p[0] - float(x) - 0.5))
                * (1.0 - wp.abs(p[1] - float(y) - 0.5))
                * (1.0 - wp.abs(p[2] - float(z) - 0.5))
            )
            total += weight
            for c in range(channels):
                out[i * channels + c] += weight * feats[row * channels + c]
    scale = 1.0 / wp.max(total, 1.0e-12)
    for c in range(channels):
        out[i * channels + c] *= scale
