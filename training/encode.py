"""Encode objects for the flows: python -m training.encode --data FOLDER --vae FOLDER --out FOLDER

Turns .npz files of make_data into latents by the averages of the three VAEs, as they come, until stopped (or with
--once, those that are there).  After the first ``--statistics`` objects it writes normalization.json, the mean and
standard deviation of every channel, and keeps them.  Under torchrun each process encodes every n-th object on its GPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trellis2.voxels import Voxels

from .data import COARSE, Sample, cells_of, collate, join, moved, occupancy
from .train import read_average
from .trainers import Latents, build_networks, shape_features

logger = logging.getLogger("training")


class Encoders:
    """The three encoders, ready to run."""

    def __init__(self, vae: Path, device: torch.device) -> None:
        self.device = device
        self.structure, self.shape, self.texture = (
            load_network(vae / f"{name}.safetensors", "encoder").to(device)
            for name in ("structure_vae", "shape_vae", "texture_vae")
        )
        config = json.loads(read_average(vae / "structure_vae.safetensors")[1]["config"])
        self.side = int(config["dataset"]["args"]["resolution"])
        if device.type == "cuda":
            for network in (self.structure, self.shape, self.texture):
                network.set_dtype(torch.bfloat16)

    @torch.no_grad()
    def __call__(self, sample: Sample) -> Latents:
        cells = cells_of(sample.coords.to(self.device), sample.resolution, self.side)
        filled = occupancy(cells[None], self.side)
        if sample.resolution == COARSE:
            filled = torch.cat([filled, filled.flip(2)])
        structure, _ = self.structure(filled)
        coords = torch.empty(0, 3)
        shape, texture = (torch.empty(0, network.config.latent_channels) for network in (self.shape, self.texture))
        if sample.resolution != COARSE:
            batch = collate(moved(join([sample]), self.device))
            encoded, _ = self.shape(Voxels(shape_features(batch.dual), batch.grid))
            coords, shape = encoded.grid.coords[:, 1:], encoded.feats
            texture = self.texture(Voxels(batch.attrs, batch.grid))[0].feats
        return Latents(
            sample.family,
            sample.seed,
            sample.resolution,
            coords.to(torch.uint8).cpu(),
            structure[0].half().cpu(),
            structure[1:].half().cpu(),
            shape.half().cpu(),
            texture.half().cpu(),
            sample.pictures,
            sample.maps,
        )


def load_network(path: Path, name: str) -> nn.Module:
    """One network of a run's averages, in float32, for inference."""
    state, metadata = read_average(path)
    entry = json.loads(metadata["config"])["models"][name]
    network = build_networks({name: entry}, None)[name].to_empty(device="cpu")
    network.load_state_dict({k[len(name) + 1 :]: v for k, v in state.items() if k.startswith(f"{name}.")})
    return network.eval().requires_grad_(False)


def statistics(latents: Sequence[Latents]) -> dict[str, dict[str, list[float]]]:
    """Mean and standard deviation of every channel of shape and texture, over all tokens; of structure one spread.

    The pipeline does not normalise structure latents: ``export`` lets the decoder's first layer do it, which is exact
    for a factor, but not for a mean where the grid ends.
    """
    structure = torch.stack([item.structure for item in latents]).double()
    result = {"structure": {"mean": [0.0], "std": [float(structure.square().mean().sqrt().clamp_min(1e-4))]}}
    for name in ("shape", "texture"):
        values: Tensor = torch.cat([getattr(item, name) for item in latents if len(item.coords)]).double()
        result[name] = {"mean": values.mean(0).tolist(), "std": values.std(0).clamp_min(1e-4).tolist()}
    return result


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="training.encode", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--statistics", type=int, default=256, help="objects for normalization.json")
    parser.add_argument("--minutes", type=float, help="stop after this many minutes")
    parser.add_argument("--once", action="store_true", help="stop when all files that are there are done")
    parser.add_argument("--remove", action="store_true", help="delete files that are done, to save disk")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    encode(args, device, rank, world)


def encode(args: argparse.Namespace, device: torch.device, rank: int = 0, world: int = 1) -> None:
    encoders = Encoders(args.vae, device)
    args.out.mkdir(parents=True, exist_ok=True)
    table = args.out / "normalization.json"
    started = time.monotonic()
    done: set[Path] = set()
    kept: list[Latents] = []
    while True:
        new = [p for p in sorted(args.data.glob("*.npz")) if p not in done and int(p.stem) % world == rank]
        for path in new:
            if args.minutes is not None and time.monotonic() - started > 60 * args.minutes:
                return
            done.add(path)
            target = args.out / path.name
            if target.exists():
                continue
            latents = encoders(Sample.load(path))
            latents.save(target)
            if args.remove:
                path.unlink()
            if rank == 0 and not table.exists():
                kept.append(latents)
                if len(kept) == args.statistics:
                    write_statistics(kept, table)
        if args.once:
            if rank == 0 and kept and not table.exists():
                write_statistics(kept, table)
            return
        if args.minutes is not None and time.monotonic() - started > 60 * args.minutes:
            return
        time.sleep(0 if new else 2)


def write_statistics(latents: Sequence[Latents], path: Path) -> dict[str, Any]:
    """normalization.json"""
    values = statistics(latents)
    logger.info("structure latents have a spread of %.3f", values["structure"]["std"][0])
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return values


if __name__ == "__main__":
    main(sys.argv[1:])
