"""What each kind of run trains: its networks, and the loss of a batch.

An objective is a module whose ``forward(batch)`` returns named terms, "loss" among them; ``DistributedDataParallel``
wraps it as it is.  Names and arguments are those of the published training configs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trellis2.checkpoint import build_model
from trellis2.models.conditioning import SmallEncoderConfig, SmallImageEncoder, load_image_encoder
from trellis2.models.flow import Flow
from trellis2.voxels import Grid, Voxels, full_grid

from . import losses
from .data import Sample, collate, occupancy
from .optim import initialize

logger = logging.getLogger("training")

COMMON = {
    "max_steps", "batch_size_per_gpu", "batch_split", "optimizer", "ema_rate", "grad_clip", "i_log", "i_sample",
    "i_save", "warmup_steps", "seed", "finetune_ckpt",
}  # fmt: skip
LEFT_ASIDE = {
    "fp16_mode", "fp16_scale_growth", "mix_precision_mode", "mix_precision_dtype", "elastic", "snapshot_batch_size",
    "lambda_mask", "lambda_ssim", "lambda_lpips", "render_resolution", "camera_randomization_config",
}  # fmt: skip
"""Arguments of published configs that do nothing here: precision is bfloat16 with float32 masters, memory is kept by
``use_checkpoint`` and ``batch_split``, and the rendering losses have geometric stand-ins (``losses.shape_terms``)."""


@dataclass(frozen=True)
class Latents:
    """An object as the flows see it.

    coords (n, 3) uint8; structure (C, r, r, r), shape and texture (n, C) float16, as the encoders gave them; pictures
    (V, S, S, 3) uint8.
    """

    family: str
    seed: int
    resolution: int
    coords: Tensor
    structure: Tensor
    shape: Tensor
    texture: Tensor
    pictures: Tensor

    def save(self, path: Path) -> None:
        """Write to a file, which appears when it is whole."""
        part = path.with_suffix(".part")
        tensors = {name: getattr(self, name).numpy() for name in _LATENTS}
        with part.open("wb") as stream:
            np.savez(stream, family=self.family, seed=self.seed, resolution=self.resolution, **tensors)
        part.rename(path)

    @classmethod
    def load(cls, path: Path) -> Latents:
        with np.load(path) as file:
            tensors = {name: torch.from_numpy(file[name]) for name in _LATENTS}
            return cls(str(file["family"]), int(file["seed"]), int(file["resolution"]), **tensors)


_LATENTS = ("coords", "structure", "shape", "texture", "pictures")


class Objective(nn.Module):
    """models: the trained networks by name. args: of the trainer. resolution: of the dataset. item: what its data
    consists of. own: the arguments that only this trainer takes."""

    item: type[Sample] | type[Latents] = Sample
    own: frozenset[str] = frozenset()

    def __init__(self, models: Mapping[str, nn.Module], args: Mapping[str, Any], resolution: int = 64) -> None:
        super().__init__()
        self.models = nn.ModuleDict(models)
        self.args = dict(args)
        self.resolution = resolution

    def forward(self, items: Sequence[Any], generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Terms of a batch; one generator for the random numbers of each item."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def weight(self, name: str, default: float) -> float:
        return float(self.args.get(f"lambda_{name}", default))


def _noise(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """(B, *shape), each item from its own generator."""
    return torch.stack([torch.randn(*shape, generator=g) for g in generators])


def _rows_noise(lengths: Sequence[int], channels: int, generators: Sequence[torch.Generator]) -> Tensor:
    """(sum of lengths, channels), each item from its own generator."""
    return torch.cat([torch.randn(n, channels, generator=g) for n, g in zip(lengths, generators, strict=True)])


class StructureVae(Objective):
    """SparseStructureVaeTrainer: occupancy in, occupancy out."""

    own = frozenset({"lambda_bce", "lambda_dice", "lambda_kl", "loss_type"})

    def forward(self, items: Sequence[Sample], generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        target = occupancy(items, self.device, self.resolution)
        mean, log_variance = self.models["encoder"](target)
        noise = _noise(mean.shape[1:], generators).to(self.device)
        logits = self.models["decoder"](losses.sampled(mean, log_variance, noise))
        terms = losses.structure_terms(logits, target, mean, log_variance)
        kind = self.args.get("loss_type", "bce")
        bce = self.weight("bce", float(kind == "bce")) * terms["bce"]
        dice = self.weight("dice", float(kind == "dice")) * terms["dice"]
        return {"loss": bce + dice + self.weight("kl", 1e-6) * terms["kl"], **terms}


class ShapeVae(Objective):
    """ShapeVaeTrainer: flexible dual grid in, flexible dual grid and subdivisions out."""

    own = frozenset({f"lambda_{n}" for n in ("subdiv", "intersected", "vertice", "depth", "normal", "split", "kl")})

    def forward(self, items: Sequence[Sample], generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        batch = collate(items, self.device)
        features = torch.cat([batch.dual.offsets - 0.5, batch.dual.crossed.float() - 0.5], dim=1)
        latent, log_variance = self.models["encoder"](Voxels(features, batch.grid))
        noise = _rows_noise(latent.grid.lengths, latent.feats.shape[1], generators).to(self.device)
        z = Voxels(losses.sampled(latent.feats, log_variance, noise), latent.grid)
        decoder: Any = self.models["decoder"]
        feats, logits = losses.decode_guided(decoder, z, batch.steps)
        terms = losses.shape_terms(
            feats, logits, batch.steps, batch.dual, batch.splits, batch.resolutions, decoder.config.voxel_margin
        )
        owner = latent.grid.coords[:, 0].long()
        terms["kl"] = losses.object_mean(losses.kl_term(latent.feats, log_variance), owner, len(items))
        weights = {"intersected": 0.1, "vertice": 1e-2, "depth": 10.0, "normal": 1.0, "split": 0.01, "kl": 1e-6}
        loss = sum(self.weight(name, value) * terms[name] for name, value in weights.items())
        subdivision = sum(value for name, value in terms.items() if name.startswith("subdiv"))
        return {"loss": loss + self.weight("subdiv", 0.1) * subdivision, **terms}


class TextureVae(Objective):
    """PbrVaeTrainer: material in, material out, along the true subdivisions."""

    own = frozenset({"lambda_kl", "lambda_render", "loss_type"})

    def forward(self, items: Sequence[Sample], generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        batch = collate(items, self.device)
        latent, log_variance = self.models["encoder"](Voxels(batch.attrs, batch.grid))
        noise = _rows_noise(latent.grid.lengths, latent.feats.shape[1], generators).to(self.device)
        z = Voxels(losses.sampled(latent.feats, log_variance, noise), latent.grid)
        decoder: Any = self.models["decoder"]
        feats, _ = losses.decode_guided(decoder, z, batch.steps)
        terms = losses.material_terms(feats, batch.attrs, batch.grid)
        owner = latent.grid.coords[:, 0].long()
        terms["kl"] = losses.object_mean(losses.kl_term(latent.feats, log_variance), owner, len(items))
        return {"loss": terms["l1"] + self.weight("kl", 1e-6) * terms["kl"], **terms}


class Flows(Objective):
    """One flow, or all three of them with the image encoder that they share (JointFlowTrainer)."""

    item = Latents
    own = frozenset({"p_uncond", "sigma_min", "t_schedule", "image_cond_model"})

    def __init__(
        self, models: Mapping[str, nn.Module], args: Mapping[str, Any], statistics: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """models: flows by stage, "structure", "shape", "texture", and perhaps "image_encoder"; without it,
        ``args["image_cond_model"]`` names one, which stays as it is. statistics: mean and std of "shape" and
        "texture" by channel, and of "structure" one std for all."""
        super().__init__(models, args)
        self.stages = [name for name in ("structure", "shape", "texture") if name in models]
        for name, values in statistics.items():
            self.register_buffer(f"{name}_mean", torch.tensor(values["mean"], dtype=torch.float32), persistent=False)
            self.register_buffer(f"{name}_std", torch.tensor(values["std"], dtype=torch.float32), persistent=False)
        self.frozen: list[Any] = []  # in a list, or it would count as trained
        if "image_encoder" not in models:
            entry = args["image_cond_model"]
            encoder = load_image_encoder(entry["name"], entry["args"]["model_name"]).eval().requires_grad_(False)
            self.frozen = [encoder, int(entry["args"].get("image_size", 512))]

    def forward(self, items: Sequence[Latents], generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        cond = self.condition(items, generators)
        dropped = torch.cat([torch.rand(1, generator=g) for g in generators]) < float(self.args.get("p_uncond", 0.1))
        cond = torch.where(dropped.to(cond.device)[:, None, None], 0, cond)
        terms = {name: self._stage(name, items, cond, generators) for name in self.stages}
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}

    def condition(self, items: Sequence[Latents], generators: Sequence[torch.Generator]) -> Tensor:
        """Image tokens (B, L, C) of one picture of each item."""
        pictures = [
            item.pictures[int(torch.randint(len(item.pictures), (1,), generator=g))]
            for item, g in zip(items, generators, strict=True)
        ]
        pixels = torch.stack(pictures).to(self.device)
        pixels = pixels.permute(0, 3, 1, 2).float() / 255
        if self.frozen:
            encoder, side = self.frozen
            encoder.to(self.device)
            with torch.no_grad():
                tokens: Tensor = encoder(_resized(pixels, side))
            return tokens
        fine = torch.tensor([item.resolution > 512 for item in items])
        encoder = self.models["image_encoder"]
        pixels = _resized(pixels, encoder.config.image_size)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            tokens = encoder(pixels, fine)
        return tokens.float()

    def _stage(
        self, name: str, items: Sequence[Latents], cond: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        flow: Any = self.models[name]
        schedule = self.args["t_schedule"]
        times = losses.flow_times(schedule if "name" in schedule else schedule[name], generators).to(self.device)
        known = None
        if name == "structure":
            grid = full_grid(flow.config.resolution, len(items), self.device)
            x = torch.cat([item.structure.flatten(1).T for item in items]).to(self.device).float()
            x = x / self.structure_std if hasattr(self, "structure_std") else x
        else:
            grid = token_grid(items, self.device)
            x = self._normalised(name, items)
            if name == "texture":
                known = self._normalised("shape", items)
        noise = _rows_noise(grid.lengths, x.shape[1], generators).to(self.device)
        owner = grid.coords[:, 0].long()
        noisy, velocity = losses.noised(x, noise, times[owner], float(self.args.get("sigma_min", 1e-5)))
        inputs = noisy if known is None else torch.cat([noisy, known], dim=1)
        predicted = flow(inputs, times * 1000, cond, grid)
        return losses.object_mean((predicted - velocity).square(), owner, len(items))

    def _normalised(self, name: str, items: Sequence[Latents]) -> Tensor:
        x = torch.cat([getattr(item, name) for item in items]).to(self.device).float()
        return (x - getattr(self, f"{name}_mean")) / getattr(self, f"{name}_std")


def _resized(pixels: Tensor, side: int) -> Tensor:
    if pixels.shape[-1] == side:
        return pixels
    return F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


def token_grid(items: Sequence[Latents], device: torch.device) -> Grid:
    """The latents' voxels, packed."""
    coords = [F.pad(item.coords.int(), (1, 0), value=k) for k, item in enumerate(items)]
    return Grid(torch.cat(coords).to(device))


OBJECTIVES: dict[str, type[Objective]] = {
    "SparseStructureVaeTrainer": StructureVae,
    "ShapeVaeTrainer": ShapeVae,
    "PbrVaeTrainer": TextureVae,
    "JointFlowTrainer": Flows,
    "ImageConditionedFlowMatchingCFGTrainer": Flows,
    "ImageConditionedSparseFlowMatchingCFGTrainer": Flows,
}
_STAGE_OF = {
    "ImageConditionedSparseStructureLatent": "structure",
    "ImageConditionedSLatShape": "shape",
    "ImageConditionedSLatPbr": "texture",
}


def build_networks(models: Mapping[str, Any], seed: int | None) -> dict[str, nn.Module]:
    """The networks of a config's "models", with first weights; seed None leaves them on the meta device."""
    networks: dict[str, nn.Module] = {}
    for index, (name, entry) in enumerate(models.items()):
        if entry["name"] == "SmallImageEncoder":
            with torch.device("meta"):
                network: nn.Module = SmallImageEncoder(SmallEncoderConfig.of_json(entry["args"]))
        else:
            network = build_model(entry["name"], entry["args"])
            network.set_dtype(torch.float32)
        if seed is not None:
            initialize(network, torch.Generator().manual_seed(1000 * seed + index))
        recompute(network, entry["args"])
        networks[name] = network.train().requires_grad_(True)
    return networks


def build_objective(config: Mapping[str, Any], folder: Path | None, seed: int | None = 0) -> Objective:
    """The objective of a training config.

    config: "models", "dataset" and "trainer" in the published layout. folder: where a normalisation that the config
    names as a file is. seed: of the first weights, None to build without memory on the meta device.
    Raises ValueError on names and arguments that are not known.
    """
    trainer = config["trainer"]
    name, args = trainer["name"], trainer["args"]
    if name not in OBJECTIVES:
        raise ValueError(f"trainer {name!r} is not one of {', '.join(OBJECTIVES)}.")
    kind = OBJECTIVES[name]
    unknown = args.keys() - COMMON - LEFT_ASIDE - kind.own
    if unknown:
        raise ValueError(f"{name} has no argument {', '.join(sorted(unknown))}.")
    aside = sorted(args.keys() & LEFT_ASIDE)
    if aside:
        logger.info("%s: left aside: %s", name, ", ".join(aside))
    if kind is TextureVae and (float(args.get("lambda_render", 0)) > 0 or args.get("loss_type", "l1") != "l1"):
        raise ValueError("PbrVaeTrainer trains on the l1 of voxels alone: set lambda_render to 0 and loss_type to l1.")
    networks = build_networks(config["models"], seed)
    dataset = config["dataset"]
    if kind is not Flows:
        return kind(networks, args, int(dataset.get("args", {}).get("resolution", 64)))
    if "denoiser" in networks:
        networks[_STAGE_OF[dataset["name"]]] = networks.pop("denoiser")
    statistics = _statistics(dataset.get("args", {}), folder)
    return Flows(networks, args, statistics)


def _statistics(args: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    found = args.get("normalization")
    if isinstance(found, str):
        path = (folder or Path()) / found
        if not path.is_file():
            raise ValueError(f"{path} is missing; run training.encode first.")
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return values
    statistics = {"shape": args.get("shape_slat_normalization", found), "texture": args.get("pbr_slat_normalization")}
    return {name: value for name, value in statistics.items() if value is not None}


def recompute(network: nn.Module, args: Mapping[str, Any]) -> None:
    """Save memory: recompute blocks in the backward pass where ``args`` ask for it (use_checkpoint)."""
    chosen: list[nn.Module] = []
    if isinstance(network, Flow) and args.get("use_checkpoint"):
        chosen = list(network.blocks)
    for level, options in enumerate(args.get("block_args", [])):
        if options.get("use_checkpoint"):
            chosen += list(network.blocks[level])
    for block in chosen:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
