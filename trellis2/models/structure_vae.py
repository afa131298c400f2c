"""The dense VAE of the occupancy grid (SparseStructureEncoder and SparseStructureDecoder of the checkpoints)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trellis2.layers import LayerNorm32, set_torso_dtype


@dataclass(frozen=True)
class StructureVaeConfig:
    """Facts of a checkpoint. ``io_channels``: of the occupancy; ``channels``: per resolution, in order of use."""

    io_channels: int
    latent_channels: int
    num_res_blocks: int
    channels: tuple[int, ...]
    num_res_blocks_middle: int = 2
    use_fp16: bool = False


class ChannelNorm(LayerNorm32):
    """Layer norm over the channels of (B, C, X, Y, Z)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1).contiguous()


class ResBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(channels)
        self.norm2 = ChannelNorm(channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = x + h
        return out


class Downsample(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, out_channels, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class Upsample(nn.Module):
    """Doubles the resolution by moving eight channel groups to the eight children (3D pixel shuffle)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, 8 * out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).unflatten(1, (-1, 2, 2, 2))  # (B, C, dx, dy, dz, X, Y, Z)
        h = h.permute(0, 1, 5, 2, 6, 3, 7, 4)
        out: Tensor = h.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return out


class _StructureVae(nn.Module):
    """What encoder and decoder share: an input layer, a torso in low precision, an output layer."""

    def __init__(self, config: StructureVaeConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.config = config
        first, last = config.channels[0], config.channels[-1]
        self.input_layer = nn.Conv3d(in_channels, first, 3, padding=1)
        self.out_layer = nn.Sequential(ChannelNorm(last), nn.SiLU(), nn.Conv3d(last, out_channels, 3, padding=1))

    def _torso(self, step: type[Downsample] | type[Upsample], middle: int) -> None:
        config = self.config
        blocks: list[nn.Module] = []
        for level, channels in enumerate(config.channels):
            blocks += [ResBlock(channels) for _ in range(config.num_res_blocks)]
            if level + 1 < len(config.channels):
                blocks.append(step(channels, config.channels[level + 1]))
        self.blocks = nn.ModuleList(blocks)
        self.middle_block = nn.Sequential(*[ResBlock(middle) for _ in range(config.num_res_blocks_middle)])
        self.set_dtype(torch.float16 if config.use_fp16 else torch.float32)

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Compute the torso in ``dtype``; the first and last layer stay float32."""
        self.dtype = dtype
        set_torso_dtype(self.blocks, dtype)
        set_torso_dtype(self.middle_block, dtype)


class StructureEncoder(_StructureVae):
    """Occupancy -> latent."""

    def __init__(self, config: StructureVaeConfig) -> None:
        super().__init__(config, config.io_channels, 2 * config.latent_channels)
        self._torso(Downsample, config.channels[-1])

    def forward(self, occupancy: Tensor) -> tuple[Tensor, Tensor]:
        """occupancy: (B, 1, R, R, R) float32.  Returns mean and log variance (B, latent, r, r, r) float32."""
        h = self.input_layer(occupancy).to(self.dtype)
        for block in self.blocks:
            h = block(h)
        h = self.out_layer(self.middle_block(h).to(occupancy.dtype))
        mean, log_variance = h.chunk(2, dim=1)
        return mean, log_variance


class StructureDecoder(_StructureVae):
    """Latent -> occupancy logits."""

    def __init__(self, config: StructureVaeConfig) -> None:
        super().__init__(config, config.latent_channels, config.io_channels)
        self._torso(Upsample, config.channels[0])

    def forward(self, latent: Tensor) -> Tensor:
        """latent: (B, latent, r, r, r) float32.  Returns logits (B, 1, R, R, R) float32; occupied where > 0."""
        h = self.middle_block(self.input_layer(latent).to(self.dtype))
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.out_layer(h.to(latent.dtype))
        return out
