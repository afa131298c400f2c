"""A picture -> image tokens, by a DINOv3 or DINOv2 vision transformer from ``transformers``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DINOV2_SIZE = 518  # DINOv2 was trained at 37 patches of 14 pixels

# The names under which the original loads DINOv2, and the same weights for ``transformers``.
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

    def __init__(self, backbone: Any, fixed_size: int | None = None) -> None:
        """backbone: a ``transformers`` DINO model. fixed_size: picture side to use whatever is asked for."""
        super().__init__()
        norm = "norm" if hasattr(backbone, "norm") else "layernorm"
        setattr(backbone, norm, nn.LayerNorm(backbone.config.hidden_size, elementwise_affine=False))
        self.backbone = backbone
        self.fixed_size = fixed_size

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (B, 3, S, S) float32 in [0, 1].  Returns (B, L, C) float32."""
        mean, std = (pixels.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        tokens: Tensor = self.backbone((pixels - mean) / std).last_hidden_state
        return tokens

    def encode(self, image: Image.Image, size: int) -> Tensor:
        """Tokens (1, L, C) of an RGB picture, resized to ``size`` pixels square (Lanczos)."""
        side = self.fixed_size or size
        resized = image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255).permute(2, 0, 1)[None]
        out: Tensor = self(pixels.to(next(self.parameters()).device))
        return out


def load_image_encoder(kind: str, source: str) -> ImageEncoder:
    """Load the encoder that pipeline.json names.

    kind: "DinoV3FeatureExtractor" or "DinoV2FeatureExtractor". source: a folder or a hub id.  Raises KeyError on
    another kind, and what ``transformers`` raises (OSError, ValueError) when the files are missing or damaged.
    """
    import transformers

    if Path(source).is_dir():  # nothing to wait for, and two bars on one terminal cross each other
        transformers.utils.logging.disable_progress_bar()
    if kind == "DinoV3FeatureExtractor":
        return ImageEncoder(transformers.DINOv3ViTModel.from_pretrained(source))
    if kind == "DinoV2FeatureExtractor":
        return ImageEncoder(transformers.AutoModel.from_pretrained(source), DINOV2_SIZE)
    raise KeyError(kind)
