"""The flow-matching transformer behind all three stages: structure, shape and texture.

A DiT (Peebles and Xie 2023) over packed tokens with modulation shared by all blocks, rotary positions, RMS-normed
queries and keys, and cross-attention to the image.  The dense structure stage is the same network on the full
grid.  Attribute names are those of the published checkpoints (SparseStructureFlowModel, SLatFlowModel).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trellis2.layers import LayerNorm32, RMSNorm, attention, fast_attention, rotary_phases, set_torso_dtype
from trellis2.voxels import Grid

TIMESTEP_CHANNELS = 256
TIMESTEP_PERIOD = 10000.0


@dataclass(frozen=True)
class FlowConfig:
    """Facts of a checkpoint. ``resolution`` is that of the token grid."""

    resolution: int
    in_channels: int
    out_channels: int
    model_channels: int
    cond_channels: int
    num_blocks: int
    num_heads: int
    mlp_ratio: float = 4.0
    dtype: str = "float32"
    rope_freq: tuple[float, float] = (1.0, 10000.0)


class SelfAttention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.q_rms_norm = RMSNorm(heads, channels // heads)
        self.k_rms_norm = RMSNorm(heads, channels // heads)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, phases: Tensor, lengths: Sequence[int]) -> Tensor:
        q, k, v = self.to_qkv(x).unflatten(1, (3, self.heads, -1)).unbind(dim=1)
        q, k = self.q_rms_norm(q, phases), self.k_rms_norm(k, phases)
        return self.to_out(attention(q, k, v, lengths, lengths).flatten(1))


class CrossAttention(nn.Module):
    def __init__(self, channels: int, cond_channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels)
        self.to_kv = nn.Linear(cond_channels, 2 * channels)
        self.q_rms_norm = RMSNorm(heads, channels // heads)
        self.k_rms_norm = RMSNorm(heads, channels // heads)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, cond: Tensor, lengths: Sequence[int]) -> Tensor:
        q = self.q_rms_norm(self.to_q(x).unflatten(1, (self.heads, -1)))
        k, v = self.to_kv(cond.flatten(0, 1)).unflatten(1, (2, self.heads, -1)).unbind(dim=1)
        out = attention(q, self.k_rms_norm(k), v, lengths, [cond.shape[1]] * len(cond))
        return self.to_out(out.flatten(1))


class FeedForward(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        h = self.mlp[0](x)
        # In place where no gradient needs what was there: the hidden layer is the largest tensor of all.
        h = self.mlp[1](h) if torch.is_grad_enabled() else torch.ops.aten.gelu_(h, approximate="tanh")
        out: Tensor = self.mlp[2](h)
        return out


class Block(nn.Module):
    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        channels = config.model_channels
        self.norm1 = LayerNorm32(channels, eps=1e-6, elementwise_affine=False)
        self.norm2 = LayerNorm32(channels, eps=1e-6)
        self.norm3 = LayerNorm32(channels, eps=1e-6, elementwise_affine=False)
        self.self_attn = SelfAttention(channels, config.num_heads)
        self.cross_attn = CrossAttention(channels, config.cond_channels, config.num_heads)
        self.mlp = FeedForward(channels, int(channels * config.mlp_ratio))
        self.modulation = nn.Parameter(torch.empty(6 * channels))

    def forward(self, x: Tensor, modulation: Tensor, cond: Tensor, phases: Tensor, lengths: Sequence[int]) -> Tensor:
        mixed = (self.modulation + modulation).to(modulation.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = _per_token(mixed, lengths).chunk(6, dim=1)
        x = torch.addcmul(x, self.self_attn(self.norm1.modulated(x, scale1, shift1), phases, lengths), gate1)
        x = x + self.cross_attn(self.norm2(x), cond, lengths)
        return torch.addcmul(x, self.mlp(self.norm3.modulated(x, scale2, shift2)), gate2)


class TimestepEmbedder(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIMESTEP_CHANNELS, channels), nn.SiLU(), nn.Linear(channels, channels))

    def forward(self, t: Tensor) -> Tensor:
        half = TIMESTEP_CHANNELS // 2
        exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t.float()[:, None] * torch.exp(-math.log(TIMESTEP_PERIOD) * exponent)
        out: Tensor = self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))
        return out


class Flow(nn.Module):
    """Predicts the velocity of noisy tokens."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.model_channels
        self.t_embedder = TimestepEmbedder(channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))
        self.input_layer = nn.Linear(config.in_channels, channels)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.out_layer = nn.Linear(channels, config.out_channels)
        self.set_dtype(getattr(torch, config.dtype))

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Compute the blocks in ``dtype``; what surrounds them stays float32."""
        self.dtype = dtype
        set_torso_dtype(self.blocks, dtype)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, grid: Grid) -> Tensor:
        """Velocity of each token.

        x: (T, in_channels) float32 on the voxels of ``grid`` (B items). t: (B,), 1000 times the flow time.
        cond: (B, L, cond_channels) image tokens.  Returns (T, out_channels) float32.
        """
        head_dim = self.config.model_channels // self.config.num_heads
        phases = rotary_phases(grid.coords[:, 1:], head_dim, self.config.rope_freq)
        modulation = self.adaLN_modulation(self.t_embedder(t)).to(self.dtype)
        h = self.input_layer(x).to(self.dtype)
        cond = cond.to(self.dtype)
        with fast_attention(h.device):
            for block in self.blocks:
                h = block(h, modulation, cond, phases, grid.lengths)
        out: Tensor = self.out_layer(F.layer_norm(h.to(x.dtype), h.shape[-1:]))
        return out


def _per_token(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """(B, C) -> (T, C); a single row stays one and broadcasts."""
    if len(rows) == 1:
        return rows
    return torch.cat([row.expand(n, -1) for row, n in zip(rows, lengths, strict=True)])
