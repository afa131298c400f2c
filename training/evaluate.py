"""Evaluate: python -m training.evaluate --model FOLDER --out FOLDER [--vae FOLDER] [--count N]

On the fixed list of test objects (test_objects.json), seed 0, default options at preset 512: metrics.json, rows.csv and
contact sheets with the input, four views of what was generated and, below, of the truth.  With --vae, the averages of
the VAE runs, reconstructions too.  Under torchrun each process takes every n-th object.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from trellis2.errors import InputError
from trellis2.mesh import Asset
from trellis2.models.voxel_vae import dual_grid_fields
from trellis2.options import ENVIRONMENTS, GenerateOptions
from trellis2.pipeline import Pipeline
from trellis2.voxels import Voxels

from .data import (
    Batch,
    Sample,
    asset_of,
    build,
    camera_of,
    collate,
    cutout,
    join,
    moved,
    objects_to_test,
    surface_of,
    truth,
)
from .encode import Encoders, load_network
from .export import favour_voxels
from .metrics import Metrics, compare
from .objects import make
from .sheets import looks, sheet

logger = logging.getLogger("training")

TARGETS = {"f5": 0.80, "silhouette": 0.85, "color": 20.0}
RECONSTRUCTION_TARGETS = {"f1": 0.98, "color": 30.0}
QUICK_TARGETS = {"f5": 0.75, "silhouette": 0.75, "color": 17.0}
"""Of the mean over eight objects, whose spread is larger."""
SHEET_ROWS = 8
STUDIO = sorted(ENVIRONMENTS).index("studio")


def generate(pipeline: Pipeline, image: Image.Image, wishes: Mapping[str, Any]) -> Asset:
    """What a user would get at preset 512 with seed 0 and ``wishes``, options of ``GenerateOptions``."""
    return pipeline.generate(image, GenerateOptions(**{"pipeline_type": "512", "seed": 0, **wishes})).asset


class Reconstruction:
    """Encoders and decoders of the VAE runs."""

    def __init__(self, vae: Path, device: torch.device) -> None:
        self.encoders = Encoders(vae, device)
        self.shape = load_network(vae / "shape_vae.safetensors", "decoder").to(device)
        favour_voxels(self.shape.named_parameters())
        self.texture = load_network(vae / "texture_vae.safetensors", "decoder").to(device)

    def __call__(self, sample: Sample) -> Asset:
        batch = collate(moved(join([sample]), self.encoders.device))
        latents = self.encoders(sample)
        return decoded(self.shape, self.texture, batch, latents.shape.float(), latents.texture.float())


@torch.no_grad()
def decoded(shape: Any, texture: Any, batch: Batch, z_shape: Tensor, z_texture: Tensor) -> Asset:
    """An asset from latents on a batch of one object, by the decoders' own subdivisions."""
    grid, device = batch.steps[0].coarse, batch.attrs.device
    out, steps = shape(Voxels(z_shape.to(device), grid))
    dual = dual_grid_fields(out, shape.config.voxel_margin)
    material, _ = texture(Voxels(z_texture.to(device), grid), steps)
    attrs = (material.feats * 0.5 + 0.5).clamp(0, 1)
    return asset_of(dual.grid.coords[:, 1:], dual.offsets, dual.crossed, dual.split_weight, attrs, batch.resolutions[0])


def evaluate(
    entries: Sequence[dict[str, Any]],
    pipeline: Pipeline | None,
    reconstruct: Reconstruction | None,
    device: torch.device,
    pages: Path | None = None,
    resolution: int = 512,
    wishes: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Rows of metrics; pages: folder for contact sheets. resolution: of the truth. wishes: see ``generate``."""
    rows, shown = [], []
    for number, entry in enumerate(entries):
        thing, view = make(entry["family"], entry["seed"]), entry["view"]
        true = truth(thing, resolution, device)
        seen = surface_of(thing, true.material.coords, true.material.attrs, resolution, device)
        image = cutout(seen, view)
        camera = camera_of(seen, view)
        row: dict[str, Any] = {"family": entry["family"], "seed": entry["seed"]}
        if reconstruct is not None:
            sample = build(entry["family"], entry["seed"], resolution, [], device)
            row |= {f"reconstruction_{k}": v for k, v in asdict(compare(reconstruct(sample), true, camera)).items()}
        if pipeline is not None:
            found = _generated(pipeline, image, wishes or {})
            row |= asdict(Metrics(0.0, 0.0, 0.0, 0.0) if found is None else compare(found, true, camera))
            if pages is not None:
                shown += [
                    [image, *([] if found is None else looks(found))],
                    [Image.new("RGB", (8, 8), (228, 228, 228)), *looks(true)],
                ]
                if len(shown) == 2 * SHEET_ROWS or number + 1 == len(entries):
                    labels = [text for r in [*rows, row][-len(shown) // 2 :] for text in (label(r), "truth")]
                    sheet(shown, labels).save(pages / f"sheet_{number // SHEET_ROWS:02d}.jpg", quality=90)
                    shown = []
        rows.append(row)
        logger.info("%s", {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    return rows


def _generated(pipeline: Pipeline, image: Image.Image, wishes: Mapping[str, Any]) -> Asset | None:
    """None where the pipeline found nothing."""
    try:
        return generate(pipeline, image, wishes)
    except InputError as error:
        logger.warning("%s", error)
        return None


def label(row: dict[str, Any]) -> str:
    return f"{row['family']} F5 {row['f5']:.2f} IoU {row['silhouette']:.2f} {row['color']:.0f} dB"


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means of all metrics."""
    names = [name for name in rows[0] if isinstance(rows[0][name], float)] if rows else []
    return {name: statistics.fmean(row[name] for row in rows) for name in names}


def card_rows(result: Mapping[str, Mapping[str, float]]) -> list[dict[str, str]]:
    """What the model card shows of metrics.json: see ``export.card``."""
    names = {
        "reconstruction_f1": "reconstruction, F-score at 1%",
        "reconstruction_color": "reconstruction, base colour in dB",
        "f5": "image to 3D, F-score at 5%",
        "silhouette": "image to 3D, silhouette IoU in the input view",
        "color": "image to 3D, base colour in the input view in dB",
    }
    targets = {**TARGETS, **{f"reconstruction_{name}": value for name, value in RECONSTRUCTION_TARGETS.items()}}
    rows = []
    for key, name in names.items():
        if key in result.get("seen", {}):
            found = {part: f"{result[part][key]:.3g}" for part in ("seen", "held_out") if part in result}
            rows.append({"name": name, "target": f"{targets[key]:.3g}", "held_out": "", **found})
    return rows


def quick(pipeline: Any, numbers: Sequence[int] = range(8), resolution: int = 128) -> Metrics:
    """Mean metrics on a few of the test objects, all in the studio's light: fast enough for a test.

    pipeline: has ``generate(image, options)``. numbers: of the objects in their list. resolution: of the truth.
    """
    objects = objects_to_test("seen")
    entries = [{**objects[n], "view": replace(objects[n]["view"], light=STUDIO)} for n in numbers]
    means = summary(evaluate(entries, pipeline, None, torch.device("cpu"), resolution=resolution))
    return Metrics(**{name: means[name] for name in ("f1", "f5", "silhouette", "color")})


def failures(metrics: Metrics, targets: Mapping[str, float] = QUICK_TARGETS) -> list[str]:
    """The metrics that miss their targets."""
    return [name for name, target in targets.items() if getattr(metrics, name) < target]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="training.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="a checkpoint, from training.export")
    parser.add_argument("--vae", type=Path, help="folder of the VAEs' averages, for reconstructions")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200, help="of objects of seen families")
    parser.add_argument("--held-out", type=int, default=20, help="of objects of families held out")
    parser.add_argument("--validation", type=int, default=0, help="of validation objects, in place of all others")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON of generation options, to compare some")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if world > 1:
        dist.init_process_group("gloo")
    args.out.mkdir(parents=True, exist_ok=True)
    pipeline = None if args.model is None else Pipeline.from_pretrained(args.model, device=device)
    reconstruct = None if args.vae is None else Reconstruction(args.vae, device)
    result = {}
    parts = {"seen": args.count, "held_out": args.held_out}
    for part, count in ({"validation": args.validation} if args.validation else parts).items():
        pages = args.out / part
        pages.mkdir(exist_ok=True)
        mine = objects_to_test(part)[:count][rank::world]
        rows = evaluate(mine, pipeline, reconstruct, device, pages if rank == 0 else None, wishes=args.options)
        if world > 1:
            gathered: list[Any] = [None] * world
            dist.all_gather_object(gathered, rows)
            rows = [row for part_rows in gathered for row in part_rows]
        if rank == 0 and rows:
            with (args.out / f"{part}.csv").open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, rows[0])
                writer.writeheader()
                writer.writerows(rows)
            result[part] = summary(rows)
    if rank == 0:
        (args.out / "metrics.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (args.out / "card.json").write_text(json.dumps(card_rows(result), indent=1) + "\n", encoding="utf-8")
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
