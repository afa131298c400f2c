"""What each kind of run trains: its networks, and the loss of a batch.

An objective is a module whose ``forward(batch)`` returns named terms, "loss" among them; ``DistributedDataParallel``
wraps it as it is.  Names and arguments are those of the published training configs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trellis2.checkpoint import build_model, load_image_encoder
from trellis2.layers import item_of_tokens
from trellis2.models.conditioning import SmallEncoderConfig, SmallImageEncoder
from trellis2.models.flow import Flow
from trellis2.models.voxel_vae import DownBlock, DualGrid, UpBlock
from trellis2.voxels import Grid, Voxels, full_grid, grid_of_lengths

from . import losses
from .data import Batch, Joined, Sample, cells_of, collate, join, occupancy, read_arrays
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
    (V, S, S, 3) and maps (V, M, M, 7) uint8, see ``Sample``. Without coords, only the structure is known, and mirrored
    (1, C, r, r, r) is that of the mirrored object; else it is empty.
    """

    family: str
    seed: int
    resolution: int
    coords: Tensor
    structure: Tensor
    mirrored: Tensor
    shape: Tensor
    texture: Tensor
    pictures: Tensor
    maps: Tensor

    def one_view(self, generator: torch.Generator) -> Latents:
        """With one of the pictures; half of those that can be are mirrored at the plane x = 0, picture and all."""
        k = int(torch.randint(len(self.pictures), (1,), generator=generator))
        pictures, maps = self.pictures[k : k + 1], self.maps[k : k + 1]
        if not len(self.mirrored) or float(torch.rand(1, generator=generator)) < 0.5:
            return replace(self, pictures=pictures, maps=maps)
        maps = maps.flip(2)
        maps[..., 0] = (maps[..., 6].int() - maps[..., 0]).clamp(min=0).to(torch.uint8)  # x where covered becomes 1 - x
        return replace(self, structure=self.mirrored[0], pictures=pictures.flip(2), maps=maps)

    def save(self, path: Path) -> None:
        """Write to a file, which appears when it is whole."""
        part = path.with_suffix(".part")
        tensors = {name: getattr(self, name).numpy() for name in _LATENTS}
        with part.open("wb") as stream:
            np.savez(stream, family=self.family, seed=self.seed, resolution=self.resolution, **tensors)
        part.rename(path)

    @classmethod
    def load(cls, path: Path) -> Latents:
        arrays = read_arrays(path, ("family", "seed", "resolution", *_LATENTS))
        tensors = {name: torch.from_numpy(arrays[name]) for name in _LATENTS}
        return cls(str(arrays["family"]), int(arrays["seed"]), int(arrays["resolution"]), **tensors)


_LATENTS = ("coords", "structure", "mirrored", "shape", "texture", "pictures", "maps")


@dataclass(frozen=True)
class Cells:
    """An object as the structure VAE sees it: cells (side^3 / 8,) uint8, see ``data.cells_of``."""

    family: str
    seed: int
    cells: Tensor


class Objective(nn.Module):
    """models: the trained networks by name. args: of the trainer. resolution: of the dataset. own: the arguments that
    only this trainer takes.

    ``load`` reads an item and ``prepare`` makes a batch of some, both on the CPU, in another thread than the rest.
    """

    own: frozenset[str] = frozenset()

    def __init__(self, models: Mapping[str, nn.Module], args: Mapping[str, Any], resolution: int = 64) -> None:
        super().__init__()
        self.models = nn.ModuleDict(models)
        self.args = dict(args)
        self.resolution = resolution

    def load(self, path: Path) -> Any:
        """An item from a file of make_data or encode."""
        raise NotImplementedError

    def prepare(self, items: Sequence[Any], generators: Sequence[torch.Generator]) -> Any:
        """A batch, a dataclass; one generator for the random numbers of each item."""
        raise NotImplementedError

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """Terms of a batch that is on the networks' device."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def weight(self, name: str, default: float) -> float:
        return float(self.args.get(f"lambda_{name}", default))


@dataclass(frozen=True)
class StructureBatch:
    """cells (B, side^3 / 8) uint8; noise for the latents (B, C, r, r, r)."""

    cells: Tensor
    noise: Tensor


class StructureVae(Objective):
    """SparseStructureVaeTrainer: occupancy in, occupancy out."""

    own = frozenset({"lambda_bce", "lambda_dice", "lambda_kl", "loss_type"})

    def load(self, path: Path) -> Cells:
        arrays = read_arrays(path, ("family", "seed", "resolution", "coords"))
        cells = cells_of(torch.from_numpy(arrays["coords"]), int(arrays["resolution"]), self.resolution)
        return Cells(str(arrays["family"]), int(arrays["seed"]), cells)

    def prepare(self, items: Sequence[Cells], generators: Sequence[torch.Generator]) -> StructureBatch:
        config: Any = self.models["decoder"].config
        side = self.resolution >> (len(config.channels) - 1)
        shape = (config.latent_channels, side, side, side)
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        return StructureBatch(torch.stack([item.cells for item in items]), noise)

    def forward(self, batch: StructureBatch) -> dict[str, Tensor]:
        target = occupancy(batch.cells, self.resolution)
        mean, log_variance = self.models["encoder"](target)
        logits = self.models["decoder"](losses.sampled(mean, log_variance, batch.noise))
        terms = losses.structure_terms(logits, target, mean, log_variance)
        kind = self.args.get("loss_type", "bce")
        bce = self.weight("bce", float(kind == "bce")) * terms["bce"]
        dice = self.weight("dice", float(kind == "dice")) * terms["dice"]
        return {"loss": bce + dice + self.weight("kl", 1e-6) * terms["kl"], **terms}


@dataclass(frozen=True)
class VoxelBatch:
    """Objects, and where the random numbers for the latents of each come from."""

    samples: Joined
    generators: Sequence[torch.Generator]


class VoxelVae(Objective):
    """What shape and texture have in common."""

    def load(self, path: Path) -> Sample:
        return Sample.load(path)

    def prepare(self, items: Sequence[Sample], generators: Sequence[torch.Generator]) -> VoxelBatch:
        return VoxelBatch(join(items), generators)

    def latents(self, features: Tensor, grid: Grid, batch: VoxelBatch) -> tuple[Voxels, Tensor]:
        """Drawn latents of what ``features`` say on the finest grid, and the KL term."""
        mean, log_variance = self.models["encoder"](Voxels(features, grid))
        coarse: Grid = mean.grid
        noise = _rows_noise(coarse.lengths, mean.feats.shape[1], batch.generators).to(self.device)
        kl = losses.kl_term(mean.feats, log_variance)
        kl = losses.object_mean(kl, coarse.coords[:, 0].long(), len(batch.generators))
        return Voxels(losses.sampled(mean.feats, log_variance, noise), coarse), kl


class ShapeVae(VoxelVae):
    """ShapeVaeTrainer: flexible dual grid in, flexible dual grid and subdivisions out."""

    own = frozenset({f"lambda_{n}" for n in ("subdiv", "intersected", "vertice", "depth", "normal", "split", "kl")})

    def forward(self, batch: VoxelBatch) -> dict[str, Tensor]:
        truth = collate(batch.samples)
        z, kl = self.latents(shape_features(truth.dual), truth.grid, batch)
        decoder: Any = self.models["decoder"]
        feats, logits = losses.decode_guided(decoder, z, truth.steps)
        terms = losses.shape_terms(
            feats, logits, truth.steps, truth.dual, truth.splits, truth.resolutions, decoder.config.voxel_margin
        )
        terms["kl"] = kl
        weights = {"intersected": 0.1, "vertice": 1e-2, "depth": 10.0, "normal": 1.0, "split": 0.01, "kl": 1e-6}
        loss = sum(self.weight(name, value) * terms[name] for name, value in weights.items())
        subdivision = sum(value for name, value in terms.items() if name.startswith("subdiv"))
        return {"loss": loss + self.weight("subdiv", 0.1) * subdivision, **terms}


class TextureVae(VoxelVae):
    """PbrVaeTrainer: material in, material out, along the true subdivisions.

    lambda_coarse: of what linear layers, which only training has, read of the mean material off each resolution on the
    way to the latent and back (deep supervision, Lee et al. 2015), so that every block has its share of the work from
    the first step on.
    """

    own = frozenset({"lambda_kl", "lambda_render", "lambda_coarse", "loss_type"})

    def __init__(self, models: Mapping[str, nn.Module], args: Mapping[str, Any], resolution: int = 64) -> None:
        super().__init__(models, args, resolution)
        if self.weight("coarse", 0.0) > 0:
            encoder, decoder = (self.models[name].config for name in ("encoder", "decoder"))
            widths = (*encoder.model_channels[1:], *decoder.model_channels[1:-1])
            self.models["readers"] = nn.ModuleList(nn.Linear(width, encoder.io_channels) for width in widths)
            for reader in self.models["readers"]:
                nn.init.zeros_(reader.weight)
                nn.init.zeros_(reader.bias)

    def forward(self, batch: VoxelBatch) -> dict[str, Tensor]:
        truth = collate(batch.samples)
        decoder: Any = self.models["decoder"]
        with losses.outputs_of((DownBlock, UpBlock), self.models) as seen:
            z, kl = self.latents(truth.attrs, truth.grid, batch)
            feats, _ = losses.decode_guided(decoder, z, truth.steps)
        kind = self.args.get("loss_type", "l1")
        terms = {kind: losses.material_error(feats, truth.attrs, truth.grid, kind), "kl": kl}
        loss = terms[kind] + self.weight("kl", 1e-6) * kl
        if "readers" in self.models:
            terms["coarse"] = self._coarse(seen, truth)
            loss = loss + self.weight("coarse", 0.0) * terms["coarse"]
        return {"loss": loss, **terms}

    def _coarse(self, seen: Sequence[Tensor], truth: Batch) -> Tensor:
        """Sum over the resolutions."""
        means = list(zip(losses.coarse_means(truth.attrs, truth.steps), truth.steps, strict=True))
        total = seen[0].new_zeros((), dtype=torch.float32)
        # The encoder goes from fine to coarse; the decoder's last resolution is that of the material itself.
        for reader, feats, (mean, step) in zip(self.models["readers"], seen, means[::-1] + means[1:], strict=False):
            feats = F.layer_norm(feats.float(), feats.shape[-1:])
            total = total + losses.material_error(reader(feats), mean, step.coarse, "l1")
        return total


def shape_features(dual: DualGrid) -> Tensor:
    """(N, 6) float32: what the shape encoder sees of each voxel."""
    return torch.cat([dual.offsets - 0.5, dual.crossed.float() - 0.5], dim=1)


def _rows_noise(lengths: Sequence[int], channels: int, generators: Sequence[torch.Generator]) -> Tensor:
    """(sum of lengths, channels), each item from its own generator."""
    return torch.cat([torch.randn(n, channels, generator=g) for n, g in zip(lengths, generators, strict=True)])


@dataclass(frozen=True)
class FlowBatch:
    """B objects, and T tokens of those W among them of which more than the structure is known.

    pictures (B, S, S, 3) and maps (B, M, M, 7) uint8, see ``Sample``; fine (B,) bool: of a resolution above 512;
    dropped (B,) bool: without condition.
    whole (W,) int64: which ones; coords (T, 4) int32 [0 to W - 1, x, y, z], W lengths. Of "structure" (B r^3, C) and of
    "shape" and "texture" (T, C): latents float16 as encoded, noise float32, times (B,) and (W,).
    """

    pictures: Tensor
    maps: Tensor
    fine: Tensor
    dropped: Tensor
    whole: Tensor
    coords: Tensor
    lengths: tuple[int, ...]
    latents: dict[str, Tensor]
    noise: dict[str, Tensor]
    times: dict[str, Tensor]


class Flows(Objective):
    """One flow, or all three of them with the image encoder that they share (JointFlowTrainer).

    lambda_maps: of what a linear layer, which only training has, reads off each token of that encoder: where in the
    unit cube its patch's surface lies, and its base colour. Attention is linear in the tokens too, so what this layer
    cannot read, no flow can ask for.
    """

    item = Latents
    own = frozenset({"p_uncond", "sigma_min", "t_schedule", "image_cond_model", "lambda_maps"})

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
        if self.weight("maps", 0.0) > 0:
            if "image_encoder" not in models:
                raise ValueError("lambda_maps is for an image encoder that is trained: models names none.")
            reader = nn.Linear(models["image_encoder"].config.channels, losses.MAP_CHANNELS)
            nn.init.zeros_(reader.weight)
            nn.init.zeros_(reader.bias)
            self.models["reader"] = reader
        self.frozen: list[Any] = []  # in a list, or it would count as trained
        if "image_encoder" not in models:
            entry = args["image_cond_model"]
            encoder = load_image_encoder(entry["name"], entry["args"]["model_name"])
            self.frozen = [encoder, int(entry["args"].get("image_size", 512))]

    def load(self, path: Path) -> Latents:
        return Latents.load(path)

    def prepare(self, items: Sequence[Latents], generators: Sequence[torch.Generator]) -> FlowBatch:
        items = [item.one_view(g) for item, g in zip(items, generators, strict=True)]
        chance = float(self.args.get("p_uncond", 0.1))
        dropped = torch.cat([torch.rand(1, generator=g) for g in generators]) < chance
        whole = [k for k, item in enumerate(items) if len(item.coords)]
        if not whole and self.stages != ["structure"]:
            raise ValueError("Of no object in the batch more than the structure is known: take larger batches.")
        coords = [F.pad(items[k].coords.int(), (1, 0), value=row) for row, k in enumerate(whole)]
        latents, noise, times = {}, {}, {}
        schedule = self.args["t_schedule"]
        for name in self.stages:
            rows = [item.structure.flatten(1).T if name == "structure" else getattr(item, name) for item in items]
            latents[name] = torch.cat(rows)
            if name == "texture":
                latents["shape"] = torch.cat([item.shape for item in items])
            drawn = losses.flow_times(schedule if "name" in schedule else schedule[name], generators)
            times[name] = drawn if name == "structure" else drawn[whole]
            noise[name] = _rows_noise([len(r) for r in rows], rows[0].shape[1], generators)
        return FlowBatch(
            torch.cat([item.pictures for item in items]),
            torch.cat([item.maps for item in items]),
            torch.tensor([item.resolution > 512 for item in items]),
            dropped,
            torch.tensor(whole, dtype=torch.int64),
            torch.cat(coords) if coords else torch.empty(0, 4, dtype=torch.int32),
            tuple(len(items[k].coords) for k in whole),
            latents,
            noise,
            times,
        )

    def forward(self, batch: FlowBatch) -> dict[str, Tensor]:
        tokens = self.condition(batch)
        cond = tokens.masked_fill(batch.dropped[:, None, None], 0)
        grid = grid_of_lengths(batch.coords, batch.lengths)
        terms = {name: self._stage(name, batch, grid, cond) for name in self.stages}
        loss = torch.stack(list(terms.values())).sum()
        if "reader" in self.models:
            seen = losses.map_terms(self.models["reader"](tokens[:, 1:]), batch.maps)
            loss = loss + self.weight("maps", 0.0) * torch.stack(list(seen.values())).sum()
            terms |= seen
        return {"loss": loss, **terms}

    def condition(self, batch: FlowBatch) -> Tensor:
        """Image tokens (B, L, C)."""
        pixels = batch.pictures.permute(0, 3, 1, 2).float() / 255
        if self.frozen:
            encoder, side = self.frozen
            encoder.to(self.device)
            with torch.no_grad():
                tokens: Tensor = encoder(_resized(pixels, side))
            return tokens
        encoder = self.models["image_encoder"]
        pixels = _resized(pixels, encoder.config.image_size)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            tokens = encoder(pixels, batch.fine)
        return tokens.float()

    def _stage(self, name: str, batch: FlowBatch, grid: Grid, cond: Tensor) -> Tensor:
        flow: Any = self.models[name]
        known = None
        if name == "structure":
            grid = full_grid(flow.config.resolution, len(cond), self.device)
        else:
            cond = cond.index_select(0, batch.whole)
        if name == "texture":
            known = self._normalised("shape", batch)
        count = len(cond)
        x = self._normalised(name, batch)
        owner = item_of_tokens(grid.lengths, self.device)
        noisy, velocity = losses.noised(
            x, batch.noise[name], batch.times[name][owner], float(self.args.get("sigma_min", 1e-5))
        )
        inputs = noisy if known is None else torch.cat([noisy, known], dim=1)
        predicted = flow(inputs, batch.times[name] * 1000, cond, grid)
        return losses.object_mean((predicted - velocity).square(), owner, count)

    def _normalised(self, name: str, batch: FlowBatch) -> Tensor:
        x = batch.latents[name].float()
        if not hasattr(self, f"{name}_std"):  # structure latents as published
            return x
        return (x - getattr(self, f"{name}_mean")) / getattr(self, f"{name}_std")


def _resized(pixels: Tensor, side: int) -> Tensor:
    if pixels.shape[-1] == side:
        return pixels
    return F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


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
    if kind is TextureVae and (
        float(args.get("lambda_render", 0)) > 0 or args.get("loss_type", "l1") not in ("l1", "l2")
    ):
        raise ValueError("PbrVaeTrainer trains on voxels alone: set lambda_render to 0 and loss_type to l1 or l2.")
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
