"""Our configs and the published ones make the networks that they should."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.training import toys
from training.trainers import Flows, ShapeVae, TextureVae, build_networks, build_objective
from trellis2.voxels import full_grid

TRAINER: dict[str, Any] = {
    "max_steps": 1000000,
    "batch_size_per_gpu": 8,
    "batch_split": 2,
    "optimizer": {"name": "AdamW", "args": {"lr": 1e-4, "weight_decay": 0.0}},
    "ema_rate": [0.9999],
    "grad_clip": {"name": "AdaptiveGradClipper", "args": {"max_norm": 1.0, "clip_percentile": 95}},
    "i_log": 500,
    "i_sample": 10000,
    "i_save": 10000,
}
VAE_TRAINER = {**TRAINER, "fp16_mode": "inflat_all", "fp16_scale_growth": 0.001, "lambda_kl": 1e-6}
FLOW_TRAINER = {
    **TRAINER,
    "mix_precision_mode": "amp",
    "mix_precision_dtype": "bfloat16",
    "p_uncond": 0.1,
    "sigma_min": 1e-5,
    "elastic": {"name": "LinearMemoryController", "args": {"target_ratio": 0.75}},
}
LATENT = {"mean": [0.1] * 32, "std": [2.0] * 32}


def vae(encoder: str, decoder: str, encoder_args: dict[str, Any], decoder_args: dict[str, Any]) -> dict[str, Any]:
    """The "models" of a published VAE config, at its real size."""
    common: dict[str, Any] = {
        "latent_channels": 32,
        "block_type": ["SparseConvNeXtBlock3d"] * 5,
        "block_args": [{"use_checkpoint": level < 2} for level in range(5)],
        "use_fp16": True,
    }
    down = {"down_block_type": ["SparseResBlockS2C3d"] * 4, "model_channels": [64, 128, 256, 512, 1024]}
    up = {"up_block_type": ["SparseResBlockC2S3d"] * 4, "model_channels": [1024, 512, 256, 128, 64]}
    return {
        "encoder": {"name": encoder, "args": {**common, **down, "num_blocks": [0, 4, 8, 16, 4], **encoder_args}},
        "decoder": {"name": decoder, "args": {**common, **up, "num_blocks": [4, 16, 8, 4, 0], **decoder_args}},
    }


def flow(name: str, resolution: int, in_channels: int, out_channels: int, **sizes: Any) -> dict[str, Any]:
    args = {
        "resolution": resolution,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "model_channels": 1536,
        "cond_channels": 1024,
        "num_blocks": 30,
        "num_heads": 12,
        "mlp_ratio": 5.3334,
        "pe_mode": "rope",
        "share_mod": True,
        "initialization": "scaled",
        "qk_rms_norm": True,
        "qk_rms_norm_cross": True,
        **sizes,
    }
    return {"denoiser": {"name": name, "args": args}}


SHAPE = {
    "models": vae("FlexiDualGridVaeEncoder", "FlexiDualGridVaeDecoder", {}, {"resolution": 256}),
    "dataset": {"name": "FlexiDualGridDataset", "args": {"resolution": 256, "max_active_voxels": 1000000}},
    "trainer": {
        "name": "ShapeVaeTrainer",
        "args": {
            **VAE_TRAINER,
            **{"lambda_subdiv": 0.1, "lambda_intersected": 0.1, "lambda_vertice": 1e-2, "lambda_mask": 1},
            **{"lambda_depth": 10, "lambda_normal": 1, "lambda_ssim": 0.2, "lambda_lpips": 0.2},
            "camera_randomization_config": {"radius_range": [2, 100]},
        },
    },
}
TEXTURE = {
    "models": vae(
        "SparseUnetVaeEncoder", "SparseUnetVaeDecoder", {"in_channels": 6}, {"out_channels": 6, "pred_subdiv": False}
    ),
    "dataset": {"name": "SparseVoxelPbrDataset", "args": {"resolution": 256}},
    "trainer": {"name": "PbrVaeTrainer", "args": {**VAE_TRAINER, "loss_type": "l1", "lambda_render": 0.0}},
}


def test_published_vaes_at_their_size() -> None:
    """On the meta device: half a billion parameters each way, without memory."""
    shape, texture = (build_objective(config, None, seed=None) for config in (SHAPE, TEXTURE))
    assert isinstance(shape, ShapeVae)
    assert isinstance(texture, TextureVae)
    for objective in (shape, texture):
        sizes = [sum(p.numel() for p in network.parameters()) for network in objective.models.values()]
        assert all(3e8 < size < 5e8 for size in sizes)
        assert all(p.is_meta and p.requires_grad for p in objective.parameters())
    assert shape.weight("depth", 0) == 10


@pytest.mark.parametrize(
    ("dataset", "stage", "name", "resolution", "channels"),
    [
        ("ImageConditionedSparseStructureLatent", "structure", "SparseStructureFlowModel", 16, (8, 8)),
        ("ImageConditionedSLatShape", "shape", "ElasticSLatFlowModel", 32, (32, 32)),
        ("ImageConditionedSLatPbr", "texture", "ElasticSLatFlowModel", 64, (64, 32)),
    ],
)
def test_published_flows_at_their_size(
    dataset: str,
    stage: str,
    name: str,
    resolution: int,
    channels: tuple[int, int],
    checkpoint_folder: Any,
) -> None:
    kind = (
        "ImageConditionedSparseFlowMatchingCFGTrainer"
        if stage != "structure"
        else "ImageConditionedFlowMatchingCFGTrainer"
    )
    statistics = {
        "structure": {},
        "shape": {"normalization": LATENT},
        "texture": {"shape_slat_normalization": LATENT, "pbr_slat_normalization": LATENT},
    }[stage]
    encoder = {
        "name": "DinoV3FeatureExtractor",
        "args": {"model_name": str(checkpoint_folder / "dinov3"), "image_size": 512},
    }
    config = {
        "models": flow(name, resolution, *channels),
        "dataset": {"name": dataset, "args": {"resolution": 512, "image_size": 512, "max_tokens": 8192, **statistics}},
        "trainer": {
            "name": kind,
            "args": {**FLOW_TRAINER, "t_schedule": {"name": "uniform", "args": {}}, "image_cond_model": encoder},
        },
    }
    objective = build_objective(config, None, seed=None)
    assert isinstance(objective, Flows)
    assert objective.stages == [stage]
    assert 1.2e9 < sum(p.numel() for p in objective.parameters()) < 1.4e9
    assert len(objective.frozen) == 2
    if stage == "texture":
        assert objective.texture_std.tolist() == LATENT["std"]


def test_unknown_names_are_refused() -> None:
    for change, message in (
        ({"name": "GanTrainer"}, "GanTrainer"),
        ({"args": {**SHAPE["trainer"]["args"], "lambda_beauty": 1}}, "lambda_beauty"),
    ):
        with pytest.raises(ValueError, match=message):
            build_objective({**SHAPE, "trainer": {**SHAPE["trainer"], **change}}, None, seed=None)
    for change in ({"lambda_render": 1.0}, {"loss_type": "l3"}):
        trainer = {**TEXTURE["trainer"], "args": {**VAE_TRAINER, **change}}
        with pytest.raises(ValueError, match="lambda_render"):
            build_objective({**TEXTURE, "trainer": trainer}, None, seed=None)


def test_our_networks_fit_their_budget() -> None:
    """What the checkpoint holds has at most 12 million parameters: 24 MB in half precision."""
    total = 0
    for name, kept in (
        ("structure_vae", ["decoder"]),
        ("shape_vae", ["decoder"]),
        ("texture_vae", ["decoder"]),
        ("flows", ["structure", "shape", "texture", "image_encoder"]),
    ):
        config = json.loads((toys.CONFIGS / f"{name}.json").read_text())
        if name == "flows":
            config["dataset"]["args"]["normalization"] = LATENT
        networks = build_objective(config, None, seed=None).models
        total += sum(p.numel() for key in kept for p in networks[key].parameters())
    assert total == 11_932_110


def test_recomputed_blocks_give_the_same_gradients() -> None:
    """use_checkpoint saves memory and changes nothing."""
    with torch.enable_grad():
        gradients = []
        for recomputed in (False, True):
            entry = toys.config("flows")["models"]["shape"]
            entry["args"]["use_checkpoint"] = recomputed
            network: Any = build_networks({"denoiser": entry}, 3)["denoiser"]
            torch.nn.init.normal_(network.out_layer.weight, generator=torch.Generator().manual_seed(1))
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(2))
            out = network(x, torch.tensor([500.0, 20.0]), torch.ones(2, 3, 32), full_grid(2, 2, torch.device("cpu")))
            out.square().mean().backward()
            gradients.append(network.blocks[0].cross_attn.to_out.weight.grad)
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)
