"""A picture -> image tokens, by a DINOv3 or DINOv2 vision transformer, or by a small network that is trained with the
flows."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DINOV2_SIZE = 518  # DINOv2 was trained at 37 patches of 14 pixels

# The names under which the original loads DINOv2, and where the hub has the same weights.
DINOV2_REPOSITORIES = {
    f"dinov2_{short}{suffix}": f"facebook/dinov2-{'with-registers-' if suffix else ''}{name}"
    for short, name in (("vits14", "small"), ("vitb14", "base"), ("vitl14", "large"), ("vitg14", "giant"))
    for suffix in ("", "_reg")
}


class ImageEncoder(nn.Module):
    """Turns a picture into tokens: class token, registers, patches, in this order.

    The tokens are the last hidden state through a layer norm without weights, not through the one that the backbone
    was trained with (the original does the same).
    """

    def __init__(self, backbone: nn.Module, fixed_size: int | None = None) -> None:
        """backbone: a ``vit.VisionTransformer``. fixed_size: picture side to use whatever is asked for."""
        super().__init__()
        self.backbone = backbone
        self.fixed_size = fixed_size

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (B, 3, S, S) float32 in [0, 1].  Returns (B, L, C) float32."""
        mean, std = (pixels.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        tokens: Tensor = self.backbone((pixels - mean) / std)
        return F.layer_norm(tokens, tokens.shape[-1:])

    def encode(self, image: Image.Image, size: int) -> Tensor:
        """Tokens (1, L, C) of an RGB picture, resized to ``size`` pixels square (Lanczos)."""
        side = self.fixed_size or size
        resized = image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255).permute(2, 0, 1)[None]
        out: Tensor = self(pixels.to(next(self.parameters()).device))
        return out


@dataclass(frozen=True)
class SmallEncoderConfig:
    """Facts of a checkpoint. image_size: side in pixels, a multiple of 16; stem: channels of the first convolutions."""

    image_size: int
    channels: int
    depth: int
    heads: int
    mlp_ratio: float
    stem: tuple[int, int, int]

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> SmallEncoderConfig:
        """Raises KeyError and TypeError where keys are missing or unknown."""
        return cls(**{**value, "stem": tuple(value["stem"])})


class SmallImageEncoder(nn.Module):
    """Convolutions down to 1/16 of the side, then a small transformer (after Xiao et al. 2021).

    The tokens are a class token, which also says which size the caller asked for, and the patches; they leave through
    a layer norm without weights, as those of ``ImageEncoder`` do.
    """

    def __init__(self, config: SmallEncoderConfig) -> None:
        super().__init__()
        self.config = config
        widths = (3, *config.stem, config.channels)
        stem: list[nn.Module] = []
        for first, second in itertools.pairwise(widths):
            stem += [nn.Conv2d(first, second, 3, stride=2, padding=1), nn.GroupNorm(1, second), nn.GELU()]
        self.stem = nn.Sequential(*stem[:-1])
        side = config.image_size // 16
        self.positions = nn.Parameter(torch.zeros(1, side * side, config.channels))
        self.class_tokens = nn.Parameter(torch.zeros(2, config.channels))  # for 512 pixels and for more
        self.blocks = nn.ModuleList(
            _EncoderBlock(config.channels, config.heads, config.mlp_ratio) for _ in range(config.depth)
        )

    def forward(self, pixels: Tensor, fine: bool | Tensor = False) -> Tensor:
        """pixels: (B, 3, S, S) float32 in [0, 1]; fine: the caller asked for more than 512 pixels, for all or each of
        the pictures.  Returns (B, 1 + (S / 16)^2, C) float32."""
        mean, std = (pixels.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        patches = self.stem((pixels - mean) / std).flatten(2).transpose(1, 2) + self.positions
        which = torch.as_tensor(fine, device=pixels.device).long().expand(len(pixels))
        x = torch.cat([self.class_tokens[which][:, None], patches], dim=1)
        for block in self.blocks:
            x = block(x)
        return F.layer_norm(x, x.shape[-1:])

    def encode(self, image: Image.Image, size: int) -> Tensor:
        """Tokens (1, L, C) of an RGB picture; of ``size``, only whether it is above 512 counts."""
        side = self.config.image_size
        resized = image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255).permute(2, 0, 1)[None]
        out: Tensor = self(pixels.to(self.positions.device), size > 512)
        return out


class _EncoderBlock(nn.Module):
    def __init__(self, channels: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        hidden = int(channels * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out
