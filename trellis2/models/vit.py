"""The vision transformers DINOv2 and DINOv3, as their weights are published on the hub.

Sources: Dosovitskiy et al. 2021 (ViT), Touvron et al. 2021 (layer scale), Oquab et al. 2023 (DINOv2), Darcet et al.
2023 (registers), Siméoni et al. 2025 (DINOv3: rotary positions instead of learned ones).  Attribute names are those
of DINOv3's files; ``file_state`` gives DINOv2's the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "silu": nn.SiLU}


@dataclass(frozen=True)
class VitConfig:
    """Facts of a checkpoint.

    hidden: of the feed-forward network, which is gated or not. registers: how many. learned: patches for which there
    are learned positions; 0 for rotary ones of base ``rope_theta``.
    """

    channels: int
    depth: int
    heads: int
    hidden: int
    patch: int
    registers: int
    activation: str
    gated: bool
    eps: float
    key_bias: bool
    learned: int = 0
    rope_theta: float = 100.0

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> VitConfig:
        """From a ``config.json`` of the hub.  Raises KeyError on missing keys and ValueError on another model."""
        kind = value["model_type"]
        channels = int(value["hidden_size"])
        common = {
            "channels": channels,
            "depth": int(value["num_hidden_layers"]),
            "heads": int(value["num_attention_heads"]),
            "patch": int(value["patch_size"]),
            "registers": int(value.get("num_register_tokens", 0)),
        }
        if kind == "dinov3_vit":
            activation = value.get("hidden_act", "gelu")
            if activation not in _ACTIVATIONS:
                raise ValueError(f"hidden_act {activation!r} is not one of {', '.join(_ACTIVATIONS)}")
            return cls(
                **common,
                hidden=int(value["intermediate_size"]),
                activation=activation,
                gated=bool(value.get("use_gated_mlp", False)),
                eps=float(value.get("layer_norm_eps", 1e-5)),
                key_bias=bool(value.get("key_bias", False)),
                rope_theta=float(value.get("rope_theta", 100.0)),
            )
        if kind in ("dinov2", "dinov2_with_registers"):
            hidden = int(channels * value.get("mlp_ratio", 4))
            gated = bool(value.get("use_swiglu_ffn", False))
            return cls(
                **common,
                hidden=(hidden * 2 // 3 + 7) // 8 * 8 if gated else hidden,
                activation="silu" if gated else "gelu",
                gated=gated,
                eps=float(value.get("layer_norm_eps", 1e-6)),
                key_bias=True,
                learned=(int(value["image_size"]) // common["patch"]) ** 2,
            )
        raise ValueError(f"model_type {kind!r} is neither DINOv2 nor DINOv3")


class VisionTransformer(nn.Module):
    """Pictures -> the last block's tokens, before the norm that ends the published networks."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        self.layer = nn.ModuleList(_Layer(config) for _ in range(config.depth))

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (B, 3, H, W) float32, normalised; sides are multiples of the patch's.

        Returns (B, 1 + registers + patches, channels): class token, registers, patches row by row.
        """
        config = self.config
        x = self.embeddings(pixels)
        turns = None
        if not config.learned:
            rows, columns = (side // config.patch for side in pixels.shape[2:])
            turns = _turns(rows, columns, config.channels // config.heads, config.rope_theta, pixels.device)
        for layer in self.layer:
            x = layer(x, turns)
        return x


class _Embeddings(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.channels))
        if config.registers:
            self.register_tokens = nn.Parameter(torch.empty(1, config.registers, config.channels))
        if config.learned:
            self.position_embeddings = nn.Parameter(torch.empty(1, 1 + config.learned, config.channels))
        self.patch_embeddings = nn.Conv2d(3, config.channels, config.patch, stride=config.patch)
        self.config = config

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embeddings(pixels).flatten(2).transpose(1, 2)
        first: Tensor = self.cls_token
        if self.config.learned:  # registers have none
            first = first + self.position_embeddings[:, :1]
            patches = patches + self.position_embeddings[:, 1:]
        parts = [first.expand(len(pixels), -1, -1), patches]
        if self.config.registers:
            parts.insert(1, self.register_tokens.expand(len(pixels), -1, -1))
        return torch.cat(parts, dim=1)


class _Layer(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.channels, eps=config.eps)
        self.attention = _Attention(config)
        self.layer_scale1 = _LayerScale(config.channels)
        self.norm2 = nn.LayerNorm(config.channels, eps=config.eps)
        self.mlp = _FeedForward(config)
        self.layer_scale2 = _LayerScale(config.channels)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.layer_scale1(self.attention(self.norm1(x), turns))
        out: Tensor = x + self.layer_scale2(self.mlp(self.norm2(x)))
        return out


class _LayerScale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1


class _Attention(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.channels, config.channels)
        self.k_proj = nn.Linear(config.channels, config.channels, bias=config.key_bias)
        self.v_proj = nn.Linear(config.channels, config.channels)
        self.o_proj = nn.Linear(config.channels, config.channels)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = (
            linear(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        if turns is not None:
            q, k = _turned(q, *turns), _turned(k, *turns)
        out: Tensor = self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class _FeedForward(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[config.activation]()
        if config.gated:
            self.gate_proj = nn.Linear(config.channels, config.hidden)
        self.up_proj = nn.Linear(config.channels, config.hidden)
        self.down_proj = nn.Linear(config.hidden, config.channels)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "gate_proj"):
            hidden = self.activation(self.gate_proj(x)) * self.up_proj(x)
        else:
            hidden = self.activation(self.up_proj(x))
        out: Tensor = self.down_proj(hidden)
        return out


def _turns(rows: int, columns: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (patches, head_dim / 2): a quarter of the channels' pairs turns with the row of a patch, then
    as many with its column, both from -1 to 1 over the picture."""
    y, x = ((torch.arange(count, device=device) + 0.5) / count * 2 - 1 for count in (rows, columns))
    place = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=2).view(-1, 2, 1)
    frequency = 2 * math.pi * theta ** -torch.arange(0, 1, 4 / head_dim, device=device)
    angles = (place * frequency).flatten(1)
    return angles.cos(), angles.sin()


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate channel i with channel i + D / 2 of the patches' (B, heads, T, D); the tokens before them stay."""
    before = x.shape[2] - len(cosine)
    first, second = x[:, :, before:].chunk(2, dim=3)
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=3)
    return torch.cat([x[:, :, :before], turned], dim=2)


_RENAMED = (
    (r"^(?:model|encoder)\.layer\.", "layer."),
    (r"^embeddings\.patch_embeddings\.projection\.", "embeddings.patch_embeddings."),
    (r"\.attention\.attention\.(query|key|value)\.", lambda found: f".attention.{found[1][0]}_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.mlp\.fc1\.", ".mlp.up_proj."),
    (r"\.mlp\.fc2\.", ".mlp.down_proj."),
    (r"\.mlp\.weights_out\.", ".mlp.down_proj."),
)
_UNUSED = re.compile(r"^(?:embeddings\.mask_token|(?:norm|layernorm)\.(?:weight|bias))$")


def file_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published file's tensors by the names of ``VisionTransformer``, in float32, without those that it does not
    have: the mask that training needs, and the norm at the end."""
    state = {}
    for name, tensor in tensors.items():
        for pattern, new in _RENAMED:
            name = re.sub(pattern, new, name)
        if _UNUSED.match(name):
            continue
        if ".mlp.weights_in." in name:
            for part, half in zip(("gate_proj", "up_proj"), tensor.float().chunk(2), strict=True):
                state[name.replace("weights_in", part)] = half
        else:
            state[name] = tensor.float()
    return state
