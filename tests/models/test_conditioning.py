"""Image tokens against the recorded DINOv3 of the original."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from golden_cases import PILLOW_SIMD, golden_cases, load_golden, relative_l2, under
from PIL import Image
from safetensors.torch import save_file

from trellis2.models.conditioning import (
    ImageEncoder,
    SmallEncoderConfig,
    SmallImageEncoder,
    load_image_encoder,
)


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


SMALL = {"image_size": 32, "channels": 16, "depth": 1, "heads": 2, "mlp_ratio": 2.0, "stem": [4, 8, 8]}


def small_encoder(folder: Path) -> SmallImageEncoder:
    """Written to a folder in half precision."""
    torch.manual_seed(2)
    encoder = SmallImageEncoder(SmallEncoderConfig.of_json(SMALL)).eval()
    for parameter in encoder.parameters():
        parameter.normal_(0, 0.2)
    save_file({k: v.half() for k, v in encoder.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SMALL))
    return encoder


def test_small_encoder_comes_back(tmp_path: Path) -> None:
    encoder = small_encoder(tmp_path)
    image = Image.radial_gradient("L").convert("RGB")
    loaded = load_image_encoder("SmallImageEncoder", str(tmp_path))
    low, high = loaded.encode(image, 512), loaded.encode(image, 1024)
    assert low.shape == (1, 1 + 2 * 2, 16)
    torch.testing.assert_close(low, encoder.encode(image, 512), atol=1e-2, rtol=1e-2)
    assert not torch.equal(low, high)  # it says which size was asked for
    torch.testing.assert_close(low.mean(dim=2), torch.zeros(1, 5), atol=1e-5, rtol=0)
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(loaded(pixels, torch.tensor([False, True]))[1:], loaded(pixels[1:], True))


def test_small_encoder_is_loaded_strictly(tmp_path: Path) -> None:
    small_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "depth": 2}))
    with pytest.raises(ValueError, match=r"blocks\.1\.qkv\.weight"):
        load_image_encoder("SmallImageEncoder", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "window": 2}))
    with pytest.raises(ValueError, match="window"):
        load_image_encoder("SmallImageEncoder", str(tmp_path))


def test_unknown_encoder() -> None:
    with pytest.raises(KeyError):
        load_image_encoder("ClipFeatureExtractor", "x")
