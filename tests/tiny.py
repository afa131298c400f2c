"""The real classes at toy size: a whole checkpoint in the published layout, random weights, a second to write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from trellis2.checkpoint import build_model
from trellis2.models.vit import VisionTransformer, VitConfig

LATENT = 8
COND = 16


def flow_args(resolution: int, in_channels: int) -> dict[str, Any]:
    return {
        "resolution": resolution,
        "in_channels": in_channels,
        "out_channels": LATENT,
        "model_channels": 24,
        "cond_channels": COND,
        "num_blocks": 1,
        "num_heads": 2,
        "mlp_ratio": 2,
        "pe_mode": "rope",
        "share_mod": True,
        "initialization": "scaled",
        "qk_rms_norm": True,
        "qk_rms_norm_cross": True,
    }


def decoder_args(**extra: Any) -> dict[str, Any]:
    return {
        "model_channels": [16, 16, 8, 8, 8],
        "latent_channels": LATENT,
        "num_blocks": [1, 0, 0, 0, 0],
        "block_type": ["SparseConvNeXtBlock3d"] * 5,
        "up_block_type": ["SparseResBlockC2S3d"] * 4,
        "block_args": [{}] * 5,
        "use_fp16": True,
        **extra,
    }


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "sparse_structure_flow_model": ("SparseStructureFlowModel", flow_args(8, LATENT)),
    "sparse_structure_decoder": (
        "SparseStructureDecoder",
        {
            "out_channels": 1,
            "latent_channels": LATENT,
            "num_res_blocks": 1,
            "num_res_blocks_middle": 1,
            "channels": [16, 8, 8, 4],
            "use_fp16": True,
        },
    ),
    "shape_slat_flow_model_512": ("SLatFlowModel", flow_args(32, LATENT)),
    "shape_slat_flow_model_1024": ("SLatFlowModel", flow_args(64, LATENT)),
    "shape_slat_decoder": ("FlexiDualGridVaeDecoder", decoder_args(resolution=256)),
    "tex_slat_flow_model_512": ("SLatFlowModel", flow_args(32, 2 * LATENT)),
    "tex_slat_flow_model_1024": ("ElasticSLatFlowModel", flow_args(64, 2 * LATENT)),
    "tex_slat_decoder": ("SparseUnetVaeDecoder", decoder_args(out_channels=6, pred_subdiv=False)),
}


def sampler(strength: float, rescale: float, interval: tuple[float, float], rescale_t: float) -> dict[str, Any]:
    return {
        "name": "FlowEulerGuidanceIntervalSampler",
        "args": {"sigma_min": 1e-5},
        "params": {
            "steps": 12,
            "guidance_strength": strength,
            "guidance_rescale": rescale,
            "guidance_interval": list(interval),
            "rescale_t": rescale_t,
        },
    }


def tiny_checkpoint(folder: Path) -> Path:
    """Write the checkpoint into ``folder`` (made if need be) and return it."""
    generator = torch.Generator().manual_seed(7)
    (folder / "ckpts").mkdir(parents=True)
    for name, (kind, args) in MODELS.items():
        state = {
            key: _random(key, value, generator).to(value.dtype).contiguous()
            for key, value in build_model(kind, args).state_dict().items()
        }
        save_file(state, folder / "ckpts" / f"{name}.safetensors")
        (folder / "ckpts" / f"{name}.json").write_text(json.dumps({"name": kind, "args": args}))
    (folder / "dinov3").mkdir()
    config = {
        "model_type": "dinov3_vit",
        "hidden_size": COND,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_register_tokens": 4,
        "patch_size": 64,
    }
    (folder / "dinov3" / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        wanted = VisionTransformer(VitConfig.of_json(config)).state_dict()
    state = {key: _random(key, value, generator) for key, value in wanted.items()}
    save_file(state, folder / "dinov3" / "model.safetensors")
    normalization = {"mean": [0.1] * LATENT, "std": [1.5] * LATENT}
    pipeline = {
        "name": "Trellis2ImageTo3DPipeline",
        "args": {
            "models": {name: f"ckpts/{name}" for name in MODELS},
            "sparse_structure_sampler": sampler(7.5, 0.7, (0.6, 1.0), 5.0),
            "shape_slat_sampler": sampler(7.5, 0.5, (0.6, 1.0), 3.0),
            "tex_slat_sampler": sampler(1.0, 0.0, (0.6, 0.9), 3.0),
            "shape_slat_normalization": normalization,
            "tex_slat_normalization": normalization,
            "image_cond_model": {"name": "DinoV3FeatureExtractor", "args": {"model_name": "dinov3"}},
            "default_pipeline_type": "1024_cascade",
        },
        "untrained": True,
    }
    (folder / "pipeline.json").write_text(json.dumps(pipeline))
    return folder


def _random(key: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if key.endswith("gamma") or ("norm" in key and key.endswith("weight")):
        return torch.ones(value.shape)
    fan_in = value[0].numel() if value.ndim > 1 else value.numel()
    out = torch.randn(value.shape, generator=generator) / fan_in**0.5
    if "to_subdiv.bias" in key:
        out -= 1.3  # about one child in five, or the grid would explode
    if key == "out_layer.2.bias":
        out -= 1.7  # a few hundred occupied cells
    return out
