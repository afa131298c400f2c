"""The sparse U-Net VAEs of shape and material.

Residual autoencoding in the manner of DC-AE (Chen et al. 2024) on sparse voxels: ConvNeXt blocks at each resolution;
between resolutions eight children become eight channel groups (spatial to channel) and back.  Attribute names are
those of the published checkpoints (FlexiDualGridVae*, SparseUnetVae*).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trellis2.layers import LayerNorm32, SparseConv3d, by_parts, parts, set_torso_dtype
from trellis2.voxels import Grid, Refinement, Voxels


@dataclass(frozen=True)
class VoxelVaeConfig:
    """Facts of a checkpoint. ``io_channels``: of the voxels; ``model_channels``, ``num_blocks``: per resolution."""

    io_channels: int
    latent_channels: int
    model_channels: tuple[int, ...]
    num_blocks: tuple[int, ...]
    use_fp16: bool = False
    pred_subdiv: bool = True
    voxel_margin: float = 0.5


@dataclass(frozen=True)
class DualGrid:
    """A flexible dual grid: one dual vertex per voxel and the edges that the surface crosses.

    offsets: (N, 3) float32, dual vertex relative to the voxel's low corner in voxel units.
    crossed: (N, 3) bool, whether the voxel's x, y, z edge crosses the surface.
    split_weight: (N, 1) float32 > 0, which diagonal splits a quad.
    """

    grid: Grid
    offsets: Tensor
    crossed: Tensor
    split_weight: Tensor


class ConvNeXtBlock(nn.Module):
    """Residual block: convolution, norm, two-layer MLP (Liu et al. 2022)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = LayerNorm32(channels, eps=1e-6)
        self.conv = SparseConv3d(channels, channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.SiLU(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return by_parts(lambda part: x[part] + self.mlp(self.norm(self.conv(x, grid.plan, part))), len(x))


class DownBlock(nn.Module):
    """Halves the resolution: children become channels (SparseResBlockS2C3d)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.norm1 = LayerNorm32(channels, eps=1e-6)
        self.norm2 = LayerNorm32(out_channels, eps=1e-6, elementwise_affine=False)
        self.conv1 = SparseConv3d(channels, out_channels // 8)
        self.conv2 = SparseConv3d(out_channels, out_channels)

    def forward(self, x: Tensor, step: Refinement) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)), step.fine.plan)
        h = self.conv2(F.silu(self.norm2(step.to_coarse(h))), step.coarse.plan)
        skip = step.to_coarse(x).unflatten(1, (self.out_channels, -1)).mean(dim=2)
        out: Tensor = h + skip
        return out


class UpBlock(nn.Module):
    """Doubles the resolution: channels become children, where the subdivision says so (SparseResBlockC2S3d)."""

    def __init__(self, channels: int, out_channels: int, pred_subdiv: bool) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.repeats = out_channels // (channels // 8)
        self.norm1 = LayerNorm32(channels, eps=1e-6)
        self.norm2 = LayerNorm32(out_channels, eps=1e-6, elementwise_affine=False)
        self.conv1 = SparseConv3d(channels, 8 * out_channels)
        self.conv2 = SparseConv3d(out_channels, out_channels)
        if pred_subdiv:
            self.to_subdiv = nn.Linear(channels, 8)

    def forward(self, x: Tensor, step: Refinement) -> Tensor:
        h = by_parts(lambda part: F.silu(self.norm1(x[part])), len(x))
        fine = x.new_empty(len(step.fine), self.out_channels)
        for part in parts(len(x)):
            # Channels for all eight children of a voxel, most of which do not exist, are there for one part only.
            children = step.pick_children(self.conv1(h, step.coarse.plan, part), part)
            fine[step.children(part)] = F.silu(self.norm2(children))
        del h

        def with_skip(part: slice) -> Tensor:
            return self.conv2(fine, step.fine.plan, part) + step.to_fine(x, part).repeat_interleave(self.repeats, dim=1)

        return by_parts(with_skip, len(fine))


class VoxelEncoder(nn.Module):
    """Voxels -> latent at 1 / 2^levels of the resolution (SparseUnetVaeEncoder, FlexiDualGridVaeEncoder)."""

    def __init__(self, config: VoxelVaeConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.model_channels
        self.input_layer = nn.Linear(config.io_channels, channels[0])
        self.blocks = _levels(config, DownBlock)
        self.to_latent = nn.Linear(channels[-1], 2 * config.latent_channels)
        self.set_dtype(torch.float16 if config.use_fp16 else torch.float32)

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Compute the blocks in ``dtype``; the first and last layer stay float32."""
        self.dtype = dtype
        set_torso_dtype(self.blocks, dtype)

    def forward(self, x: Voxels) -> tuple[Voxels, Tensor]:
        """x: feats (N, io_channels) float32.  Returns the mean on the coarse grid and the log variance (n, latent)."""
        grid = x.grid
        h = self.input_layer(x.feats).to(self.dtype)
        for blocks in self.blocks:
            for block in blocks:  # type: ignore[attr-defined]
                if isinstance(block, DownBlock):
                    h = block(h, grid.coarser)
                    grid = grid.coarser.coarse
                else:
                    h = block(h, grid)
        h = self.to_latent(_plain_norm(h.to(x.feats.dtype)))
        mean, log_variance = h.chunk(2, dim=1)
        return Voxels(mean, grid), log_variance


class VoxelDecoder(nn.Module):
    """Latent -> voxels.

    A decoder with ``pred_subdiv`` decides itself which children exist (shape); one without follows the refinements
    of another (material).
    """

    def __init__(self, config: VoxelVaeConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.model_channels
        self.from_latent = nn.Linear(config.latent_channels, channels[0])
        self.blocks = _levels(config, partial(UpBlock, pred_subdiv=config.pred_subdiv))
        self.output_layer = nn.Linear(channels[-1], config.io_channels)
        self.set_dtype(torch.float16 if config.use_fp16 else torch.float32)

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Compute the blocks in ``dtype``; the first and last layer stay float32."""
        self.dtype = dtype
        set_torso_dtype(self.blocks, dtype)

    def forward(self, latent: Voxels, guide: Sequence[Refinement] | None = None) -> tuple[Voxels, list[Refinement]]:
        """latent: feats (n, latent) float32. guide: the refinements of another decoder, coarse to fine.

        Returns feats (N, io_channels) float32 on the finest grid, and the refinements that led there.
        """
        h, steps = self._refine(latent, None, guide)
        grid = steps[-1].fine if steps else latent.grid
        wide = latent.feats.dtype
        feats = by_parts(lambda part: self.output_layer(_plain_norm(h[part].to(wide))), len(h))
        return Voxels(feats, grid), steps

    def upsample(self, latent: Voxels, times: int) -> Grid:
        """The grid after ``times`` doublings of the resolution, without computing the features on it."""
        steps = self._refine(latent, times, None)[1]
        return steps[-1].fine

    def _refine(
        self, latent: Voxels, doublings: int | None, guide: Sequence[Refinement] | None
    ) -> tuple[Tensor, list[Refinement]]:
        steps: list[Refinement] = []
        grid = latent.grid
        h = self.from_latent(latent.feats).to(self.dtype)
        for level, blocks in enumerate(self.blocks):
            for block in blocks:  # type: ignore[attr-defined]
                if isinstance(block, UpBlock):
                    step = guide[level] if guide is not None else grid.subdivide(block.to_subdiv(h) > 0)
                    grid = step.fine
                    steps.append(step)
                    if len(steps) == doublings:
                        return h, steps
                    h = block(h, step)
                else:
                    h = block(h, grid)
        return h, steps


def dual_grid_features(dual: DualGrid) -> Voxels:
    """Input of the shape encoder: offsets and crossed edges, centred on zero, (N, 6) float32."""
    return Voxels(torch.cat([dual.offsets - 0.5, dual.crossed.float() - 0.5], dim=1), dual.grid)


def dual_grid_fields(decoded: Voxels, margin: float) -> DualGrid:
    """Read the seven output channels of the shape decoder; ``margin``: how far vertices may leave their voxel."""
    vertex, edge, split = decoded.feats.split([3, 3, 1], dim=1)
    offsets = (1 + 2 * margin) * vertex.sigmoid() - margin
    return DualGrid(decoded.grid, offsets, edge > 0, F.softplus(split))


def _levels(config: VoxelVaeConfig, step: Callable[[int, int], nn.Module]) -> nn.ModuleList:
    """The blocks of each resolution; ``step`` (from channels, to channels) leads from each to the next."""
    channels = config.model_channels
    levels = []
    for level, count in enumerate(config.num_blocks):
        blocks: list[nn.Module] = [ConvNeXtBlock(channels[level]) for _ in range(count)]
        if level + 1 < len(channels):
            blocks.append(step(channels[level], channels[level + 1]))
        levels.append(nn.ModuleList(blocks))
    return nn.ModuleList(levels)


def _plain_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])
