"""Image tokens against the recorded DINOv3 of the original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from golden_cases import PILLOW_SIMD, golden_cases, load_golden, relative_l2, under
from PIL import Image
from safetensors.torch import save_file

from trellis2.checkpoint import load_image_encoder
from trellis2.errors import CheckpointError
from trellis2.models.conditioning import ImageEncoder, SmallEncoderConfig, SmallImageEncoder
from trellis2.models.vit import VisionTransformer, VitConfig, file_state


@pytest.mark.parametrize("path", golden_cases("dino"))
def test_dinov3_golden(path: Path) -> None:
    meta, tensors = load_golden(path)
    backbone = VisionTransformer(VitConfig.of_json({"model_type": "dinov3_vit", **meta["dino_config"]}))
    backbone.load_state_dict(file_state(under(tensors, "weights.")))
    encoder = ImageEncoder(backbone).eval()
    with torch.no_grad():
        features = encoder(tensors["tensor_in"])
        assert relative_l2(features, tensors["tensor_features"]) <= meta["tol"]["rel_l2"]
        for index in range(2):
            image = Image.fromarray(tensors[f"image{index}"].numpy())
            tokens = encoder.encode(image, meta["image_size"])
            tolerance = 2e-3 if PILLOW_SIMD and image.size != (64, 64) else meta["tol"]["rel_l2"]
            assert relative_l2(tokens[0], tensors["features"][index]) <= tolerance


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
V3 = {**SIZES, "intermediate_size": 48, "patch_size": 16, "num_register_tokens": 4, "rope_theta": 50.0}
V2 = {**SIZES, "patch_size": 14, "image_size": 518}


@pytest.mark.parametrize(
    ("name", "config", "registers"),
    [
        ("DINOv3ViT", V3, 4),
        ("DINOv3ViT", {**V3, "use_gated_mlp": True, "hidden_act": "silu", "layer_norm_eps": 1e-3, "key_bias": True}, 4),
        ("Dinov2", V2, 0),
        ("Dinov2", {**V2, "use_swiglu_ffn": True}, 0),
        ("Dinov2WithRegisters", {**V2, "num_register_tokens": 3}, 3),
    ],
)
def test_same_as_transformers(name: str, config: dict[str, Any], registers: int, tmp_path: Path) -> None:
    """From the files that the library writes, weights of all kinds among them, on a picture that is not square."""
    torch.manual_seed(1)
    theirs = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config)).eval()
    for parameter in theirs.parameters():
        parameter.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path)
    kind = "DinoV3FeatureExtractor" if name == "DINOv3ViT" else "DinoV2FeatureExtractor"
    encoder = load_image_encoder(kind, str(tmp_path))
    assert isinstance(encoder, ImageEncoder)
    height, width = (64, 96) if name == "DINOv3ViT" else (518, 518)
    pixels = torch.rand(2, 3, height, width)
    last = next(module for key, module in theirs.named_modules() if key in ("norm", "layernorm"))
    seen: list[torch.Tensor] = []
    last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    theirs(pixels)
    ours = encoder.backbone(pixels)
    assert ours.shape == (2, 1 + registers + (height // config["patch_size"]) * (width // config["patch_size"]), 32)
    assert relative_l2(ours, seen[0]) < 1e-5
    side = 518 if kind.startswith("DinoV2") else 512
    tokens = encoder.encode(Image.new("RGB", (40, 30), "red"), 512)
    assert tokens.shape == (1, 1 + registers + (side // config["patch_size"]) ** 2, 32)
    torch.testing.assert_close(tokens.mean(dim=2), torch.zeros(tokens.shape[:2]), atol=1e-5, rtol=0)


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
    with pytest.raises(CheckpointError, match=r"missing blocks\.1\.mlp\.0\.bias"):
        load_image_encoder("SmallImageEncoder", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "window": 2}))
    with pytest.raises(CheckpointError, match="window"):
        load_image_encoder("SmallImageEncoder", str(tmp_path))


def test_unknown_encoder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="'ClipFeatureExtractor' is not a known kind"):
        load_image_encoder("ClipFeatureExtractor", str(tmp_path))
