"""Image tokens against the recorded DINOv3 of the original."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from golden_cases import PILLOW_SIMD, golden_cases, load_golden, relative_l2, under
from PIL import Image

from trellis2.models.conditioning import ImageEncoder, load_image_encoder


def renamed(weights: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """transformers 4 keeps the blocks in ``layer``, 5 in ``model.layer``."""
    if any(key.startswith("model.layer.") for key in model.state_dict()):
        return weights
    return {key.removeprefix("model."): value for key, value in weights.items()}


@pytest.mark.parametrize("path", golden_cases("dino"))
def test_dinov3_golden(path: Path) -> None:
    meta, tensors = load_golden(path)
    backbone = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**meta["dino_config"]))
    backbone.load_state_dict(renamed(under(tensors, "weights."), backbone))
    encoder = ImageEncoder(backbone).eval()
    with torch.no_grad():
        features = encoder(tensors["tensor_in"])
        assert relative_l2(features, tensors["tensor_features"]) <= meta["tol"]["rel_l2"]
        for index in range(2):
            image = Image.fromarray(tensors[f"image{index}"].numpy())
            tokens = encoder.encode(image, meta["image_size"])
            tolerance = 2e-3 if PILLOW_SIMD and image.size != (64, 64) else meta["tol"]["rel_l2"]
            assert relative_l2(tokens[0], tensors["features"][index]) <= tolerance


def test_dinov2_runs_at_its_own_size(tmp_path: Path) -> None:
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=14, image_size=518
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    encoder = load_image_encoder("DinoV2FeatureExtractor", str(tmp_path)).eval()
    with torch.no_grad():
        tokens = encoder.encode(Image.new("RGB", (40, 30), "red"), 512)
    assert tokens.shape == (1, 1 + 37 * 37, 16)
    torch.testing.assert_close(tokens.mean(dim=2), torch.zeros(1, 1370), atol=1e-5, rtol=0)


def test_unknown_encoder() -> None:
    with pytest.raises(KeyError):
        load_image_encoder("ClipFeatureExtractor", "x")
