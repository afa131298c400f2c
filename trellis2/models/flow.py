"""The flow-matching transformer behind all three stages: structure, shape and texture.

A DiT (Peebles and Xie 2023) over packed tokens with modulation shared by all blocks, rotary positions, RMS-normed
queries and keys, and cross-attention to the image.  The dense structure stage is the same network on the full
grid.  Attribute names are those of the published checkpoints (SparseStructureFlowModel, SLatFlowModel).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trellis2.layers import (
    LayerNorm32,
    RMSNorm,
    add_and_norm,
    attention,
    fast_attention,
    linear_gelu,
    normed_heads,
    rotary_phases,
    rows_of_items,
    set_torso_dtype,
)
from trellis2.voxels import Grid

TIMESTEP_CHANNELS = 256
TIMESTEP_PERIOD = 10000.0
POSITION_PERIOD = 100.0  # of absolute positions: grids have at most 96 tokens along an axis


@dataclass(frozen=True)
class FlowConfig:
    """Facts of a checkpoint. ``resolution`` is that of the token grid.

    ``absolute_positions``: add waves of the coordinates to the tokens, beside rotary positions. The published
    checkpoints do without; small networks learn much faster with them.
    """

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
    absolute_positions: bool = False


class SelfAttention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.q_rms_norm = RMSNorm(heads, channels // heads)
        self.k_rms_norm = RMSNorm(heads, channels // heads)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, phases: Tensor, lengths: Sequence[int]) -> Tensor:
        qkv = self.to_qkv(x).unflatten(1, (3, self.heads, -1))
        q, k, v = normed_heads(qkv, (self.q_rms_norm, self.k_rms_norm), phases)
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

    def forward(
        self, x: Tensor, cond: Tensor | None, lengths: Sequence[int], known: tuple[Tensor, ...] | None
    ) -> Tensor:
        """(T, C), or one row (1, C) that holds for every token.  known: ``keys_and_values(cond)``, if at hand."""
        if cond is None:
            # Tokens of zeros have equal keys and equal values, so that attention gives their value: the bias.
            return self.to_out(self.to_kv.bias[None, self.to_out.in_features :])
        (q,) = normed_heads(self.to_q(x).unflatten(1, (1, self.heads, -1)), (self.q_rms_norm,))
        k, v = known or self.keys_and_values(cond)
        return self.to_out(attention(q, k, v, lengths, [cond.shape[1]] * len(cond)).flatten(1))

    def keys_and_values(self, cond: Tensor) -> tuple[Tensor, ...]:
        """Each (B * L, heads, head_dim), of image tokens (B, L, cond_channels)."""
        return normed_heads(self.to_kv(cond.flatten(0, 1)).unflatten(1, (2, self.heads, -1)), (self.k_rms_norm,))


class FeedForward(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        first, _, last = self.mlp
        assert isinstance(first, nn.Linear)
        out: Tensor = last(linear_gelu(first, x))
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

    def forward(
        self,
        x: Tensor,
        change: tuple[Tensor, Tensor] | None,
        modulation: Tensor,
        cond: Tensor | None,
        phases: Tensor,
        lengths: Sequence[int],
        known: tuple[Tensor, ...] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """change: (update, gate), whose product is still to be added to ``x``.  modulation: (B, 6 C), of this block.
        Returns the first two, one block on."""
        shift1, scale1, gate1, shift2, scale2, gate2 = rows_of_items(modulation, lengths).chunk(6, dim=1)
        if change is None:
            h = self.norm1.modulated(x, scale1, shift1)
        else:
            x, h = add_and_norm(x, change[0], self.norm1, change[1], scale1, shift1)
        x, h = add_and_norm(x, self.self_attn(h, phases, lengths), self.norm2, gate1)
        x, h = add_and_norm(x, self.cross_attn(h, cond, lengths, known), self.norm3, None, scale2, shift2)
        return x, (self.mlp(h), gate2)


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

    def keys_and_values(self, cond: Tensor) -> list[tuple[Tensor, ...]]:
        """What every block makes of the image tokens (B, L, cond_channels), the same at every step."""
        cond = cond.to(self.dtype)
        attentions: Any = [block.cross_attn for block in self.blocks]
        return [attention.keys_and_values(cond) for attention in attentions]

    def _modulation(self, t: Tensor) -> Tensor:
        """Shifts, scales and gates of every block, (blocks, B, 6 C)."""
        shared = self.adaLN_modulation(self.t_embedder(t)).to(self.dtype)
        own: list[Any] = [block.modulation for block in self.blocks]
        return (torch.stack(own)[:, None] + shared).to(self.dtype)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Tensor | None,
        grid: Grid,
        known: Sequence[tuple[Tensor, ...]] | None = None,
    ) -> Tensor:
        """Velocity of each token.

        x: (T, in_channels) float32 on the voxels of ``grid`` (B items). t: (B,), 1000 times the flow time.
        cond: (B, L, cond_channels) image tokens; None for zeros in all of them.
        known: ``keys_and_values(cond)``, where that is at hand.  Returns (T, out_channels) float32.
        """
        head_dim = self.config.model_channels // self.config.num_heads
        phases = rotary_phases(grid.coords[:, 1:], head_dim, self.config.rope_freq)
        modulation = self._modulation(t)
        h = self.input_layer(x)
        if self.config.absolute_positions:
            h = h + position_waves(grid.coords[:, 1:], h.shape[1])
        h = h.to(self.dtype)
        cond = None if cond is None else cond.to(self.dtype)
        change = None
        with fast_attention(h.device):
            for block, own, keys_and_values in zip(self.blocks, modulation, known or itertools.repeat(None)):  # noqa: B905
                h, change = block(h, change, own, cond, phases, grid.lengths, keys_and_values)
        if change is not None:
            h = torch.addcmul(h, *change)
        out: Tensor = self.out_layer(F.layer_norm(h.to(x.dtype), h.shape[-1:]))
        return out


def position_waves(coords: Tensor, channels: int) -> Tensor:
    """Sines and cosines of coordinates (T, 3), a third of the channels for each axis (Vaswani et al. 2017).

    Returns (T, channels) float32; channels that are left over are zero.
    """
    waves = channels // 6
    scale = torch.arange(waves, dtype=torch.float32, device=coords.device) / waves
    angles = coords.float()[:, :, None] * POSITION_PERIOD**-scale
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1), (0, channels - 6 * waves))
