"""The published configurations as data, and random weights for them.

Sizes and settings are those of microsoft/TRELLIS.2-4B, of the structure decoder of microsoft/TRELLIS-image-large and of
DINOv3 ViT-L/16.  Random weights cost what the real ones cost at equal counts of tokens and voxels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trellis2.checkpoint import Checkpoint
    from trellis2.models.vit import VisionTransformer

LATENT = 32


def _flow(resolution: int, in_channels: int, out_channels: int, small: bool) -> dict[str, Any]:
    width = 48 if small else 1536
    return {
        "resolution": 4 if small and resolution == 16 else resolution,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "model_channels": width,
        "cond_channels": 32 if small else 1024,
        "num_blocks": 2 if small else 30,
        "num_heads": 2 if small else 12,
        "mlp_ratio": 5.3334,
        "pe_mode": "rope",
        "share_mod": True,
        "initialization": "scaled",
        "qk_rms_norm": True,
        "qk_rms_norm_cross": True,
        "dtype": "float32" if small else "bfloat16",
    }


def _decoder(small: bool, **extra: Any) -> dict[str, Any]:
    return {
        "model_channels": [16, 16, 8, 8, 8] if small else [1024, 512, 256, 128, 64],
        "latent_channels": LATENT,
        "num_blocks": [1, 1, 1, 1, 0] if small else [4, 16, 8, 4, 0],
        "block_type": ["SparseConvNeXtBlock3d"] * 5,
        "up_block_type": ["SparseResBlockC2S3d"] * 4,
        "block_args": [{}] * 5,
        "use_fp16": not small,
        **extra,
    }


def configurations(small: bool = False) -> dict[str, tuple[str, dict[str, Any]]]:
    """Class and arguments of every network; ``small``: the same classes in float32 for a quick run on a CPU."""
    structure_decoder = {
        "out_channels": 1,
        "latent_channels": 8,
        "num_res_blocks": 1 if small else 2,
        "num_res_blocks_middle": 1 if small else 2,
        "channels": [16, 8] if small else [512, 128, 32],
        "use_fp16": not small,
    }
    return {
        "sparse_structure_flow_model": ("SparseStructureFlowModel", _flow(16, 8, 8, small)),
        "sparse_structure_decoder": ("SparseStructureDecoder", structure_decoder),
        "shape_slat_flow_model_512": ("SLatFlowModel", _flow(32, LATENT, LATENT, small)),
        "shape_slat_flow_model_1024": ("SLatFlowModel", _flow(64, LATENT, LATENT, small)),
        "shape_slat_decoder": ("FlexiDualGridVaeDecoder", _decoder(small, resolution=256)),
        "tex_slat_flow_model_512": ("SLatFlowModel", _flow(32, 2 * LATENT, LATENT, small)),
        "tex_slat_flow_model_1024": ("SLatFlowModel", _flow(64, 2 * LATENT, LATENT, small)),
        "tex_slat_decoder": ("SparseUnetVaeDecoder", _decoder(small, out_channels=6, pred_subdiv=False)),
    }


def _sampler(strength: float, rescale: float, low: float, high: float, rescale_t: float) -> dict[str, Any]:
    return {
        "steps": 12,
        "guidance_strength": strength,
        "guidance_rescale": rescale,
        "guidance_interval": (low, high),
        "rescale_t": rescale_t,
    }


SAMPLERS = {
    "sparse_structure": _sampler(7.5, 0.7, 0.6, 1.0, 5.0),
    "shape_slat": _sampler(7.5, 0.5, 0.6, 1.0, 3.0),
    "tex_slat": _sampler(1.0, 0.0, 0.6, 0.9, 3.0),
}
SIGMA_MIN = 1e-5


def image_encoder_config(small: bool = False) -> dict[str, Any]:
    """The config.json of a DINOv3 of the published size."""
    return {
        "model_type": "dinov3_vit",
        "hidden_size": 32 if small else 1024,
        "num_hidden_layers": 1 if small else 24,
        "num_attention_heads": 2 if small else 16,
        "intermediate_size": 64 if small else 4096,
        "num_register_tokens": 4,
        "patch_size": 64 if small else 16,
    }


def randomise(tensors: Iterable[tuple[str, Tensor]], seed: int = 0) -> None:
    """Fill parameters in place, where they are: nothing is zero, and activations keep about their size."""
    generator: dict[torch.device, torch.Generator] = {}
    with torch.no_grad():
        for name, tensor in tensors:
            device = tensor.device
            if device not in generator:
                generator[device] = torch.Generator(device).manual_seed(seed)
            if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
                tensor.normal_(1.0, 0.02, generator=generator[device])
            else:
                fan_in = tensor[0].numel() if tensor.ndim > 1 else tensor.numel()
                tensor.normal_(0.0, fan_in**-0.5, generator=generator[device])


def random_image_encoder(device: torch.device, small: bool = False) -> VisionTransformer:
    """A DINOv3 of the published size with random weights, on ``device``."""
    from trellis2.models.vit import VisionTransformer, VitConfig  # the original's process has another trellis2

    with torch.device("meta"):
        backbone = VisionTransformer(VitConfig.of_json(image_encoder_config(small)))
    backbone = backbone.to_empty(device=device)
    randomise(backbone.named_parameters())
    return backbone.eval().requires_grad_(False)


def random_checkpoint(device: torch.device, small: bool = False) -> Checkpoint:
    """The product's networks with random weights made on ``device``, in host memory as after loading."""
    from trellis2.checkpoint import Checkpoint, Normalization, build_model
    from trellis2.models.conditioning import ImageEncoder
    from trellis2.sampling import SamplerOptions

    models = {}
    for number, (name, (kind, args)) in enumerate(configurations(small).items()):
        model = build_model(kind, args).to_empty(device=device)
        randomise(model.named_parameters(), number)
        models[name] = model.to("cpu")
    if small:  # the pipeline names the first flow of a cascade by its resolution, an eighth of the published one
        models["shape_slat_flow_model_64"] = models["shape_slat_flow_model_512"]
    encoder = ImageEncoder(random_image_encoder(device, small)).eval().requires_grad_(False).to("cpu")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    samplers = {stage: SamplerOptions(**values, sigma_min=SIGMA_MIN) for stage, values in SAMPLERS.items()}
    normalization = Normalization(torch.zeros(1, LATENT), torch.full((1, LATENT), 2.0))
    return Checkpoint(
        source="random",
        models=models,
        image_encoder=encoder,
        structure_sampler=samplers["sparse_structure"],
        shape_sampler=samplers["shape_slat"],
        texture_sampler=samplers["tex_slat"],
        shape_normalization=normalization,
        texture_normalization=normalization,
        removes_background=False,
        untrained=True,
    )


def random_matting(device: torch.device) -> Any:
    """A BiRefNet of the published size with random weights made on ``device``, in host memory as after loading."""
    from trellis2.models.matting import BiRefNet, MattingConfig

    with torch.device("meta"):
        network = BiRefNet(MattingConfig()).eval().requires_grad_(False)
    network.set_dtype(torch.float32 if device.type == "cpu" else torch.float16)
    network.to_empty(device=device)
    randomise(network.named_parameters())
    for name, buffer in network.named_buffers():
        buffer.fill_(1.0 if name.endswith("var") else 0.0)
    return network.to("cpu")


def flow_flops(tokens: int, image_tokens: int, args: Mapping[str, Any]) -> float:
    """Floating point operations of one evaluation of a flow: its blocks' matrix products and attention."""
    width, hidden = args["model_channels"], int(args["model_channels"] * args["mlp_ratio"])
    own = 2 * tokens * width * 4 * width + 4 * tokens**2 * width
    cross = 2 * tokens * width * 2 * width + 2 * image_tokens * args["cond_channels"] * 2 * width
    cross += 4 * tokens * image_tokens * width
    mlp = 2 * 2 * tokens * width * hidden
    return float(args["num_blocks"] * (own + cross + mlp))


def evaluations(stage: str, cfg: float, steps: int = 12) -> int:
    """How often a stage calls its flow: twice per step where guidance acts."""
    sampler = SAMPLERS[stage]
    low, high = sampler["guidance_interval"]
    count = 0
    for step in range(steps):
        t = 1 - step / steps
        t = sampler["rescale_t"] * t / (1 + (sampler["rescale_t"] - 1) * t)
        count += 2 if low <= t <= high and cfg not in (0.0, 1.0) else 1
    return count
