"""Pictures of how a run is doing: what went in beside what comes out, with the averaged weights."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from trellis2.errors import InputError
from trellis2.models.voxel_vae import dual_grid_fields
from trellis2.render import orbit_camera, render
from trellis2.voxels import Voxels

from .data import Sample, asset_of, collate, join, moved, occupancy
from .sheets import looks, sheet
from .trainers import Flows, Objective, ShapeVae, StructureVae, TextureVae, shape_features

if TYPE_CHECKING:
    from .train import Pool, Run

COUNT = 6
SIDE = 256


def preview(run: Run, pool: Pool, path: Path, vae: Path | None = None) -> None:
    """Write one sheet of a few objects of the pool, the same ones each time."""
    items = [pool.pick(k % run.batch, torch.Generator().manual_seed(k)) for k in range(0, COUNT * run.world, run.world)]
    with run.averaged() as objective, torch.no_grad():
        if isinstance(objective, Flows):
            if vae is None:
                return
            rows = _generated(run, items, vae)
        else:
            rows = _reconstructed(objective, items)
    sheet(rows, [f"{item.family} {item.seed}" for item in items], SIDE).save(path, quality=88)


def _reconstructed(objective: Objective, items: Sequence[Any]) -> list[list[Image.Image]]:
    """Truth, then reconstruction, of each object."""
    rows = []
    for item in items:
        if isinstance(objective, StructureVae):
            target = occupancy(item.cells[None].to(objective.device), objective.resolution)
            mean, _ = objective.models["encoder"](target)
            rows.append([*_shadows(target[0, 0]), *_shadows(objective.models["decoder"](mean)[0, 0] > 0)])
        elif isinstance(objective, (ShapeVae, TextureVae)):
            rows.append(_surfaces(objective, item))
    return rows


def _surfaces(objective: Objective, item: Sample) -> list[Image.Image]:
    batch = collate(moved(join([item]), objective.device))
    encoder, decoder = objective.models["encoder"], objective.models["decoder"]
    dual, attrs = batch.dual, batch.attrs * 0.5 + 0.5
    coords = batch.grid.coords[:, 1:]
    true = asset_of(coords, dual.offsets, dual.crossed, None, attrs, item.resolution)
    if isinstance(objective, ShapeVae):
        z, _ = encoder(Voxels(shape_features(dual), batch.grid))
        out, _ = decoder(z)
        found = dual_grid_fields(out, decoder.config.voxel_margin)
        place = found.grid.coords[:, 1:]
        grey = torch.full((len(place), 6), 0.6, device=place.device)
        grey[:, 5] = 1
        assets = [true, asset_of(place, found.offsets, found.crossed, found.split_weight, grey, item.resolution)]
    else:
        z, _ = encoder(Voxels(batch.attrs, batch.grid))
        out, _ = decoder(z, batch.steps)
        feats = (out.feats * 0.5 + 0.5).clamp(0, 1)
        assets = [true, asset_of(coords, dual.offsets, dual.crossed, None, feats, item.resolution)]
    channel = "normal" if isinstance(objective, ShapeVae) else "base_color"
    pictures = []
    for turn in (2.7, -0.6):
        for asset in assets:
            if not len(asset.mesh.faces):
                pictures.append(Image.new("RGB", (SIDE, SIDE)))
                continue
            seen = render(asset, orbit_camera(turn, 0.35, 2.0, 34.0), "studio", resolution=SIDE, layers=1)
            pictures.append(_image(seen[channel]))
    return pictures


def _generated(run: Run, items: Sequence[Any], vae: Path) -> list[list[Image.Image]]:
    """Picture, then four views of what the whole pipeline makes of it."""
    # Here, because they need packages that training does not: a video encoder and what bakes textures.
    from trellis2.pipeline import Pipeline

    from .evaluate import generate
    from .export import RUNS, export

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run.save_average(folder / "flows.safetensors")
        paths = {k: [(folder if k == "flows" else vae) / f"{k}.safetensors"] for k in RUNS}
        export(paths, folder / "checkpoint")
        pipeline = Pipeline.from_pretrained(folder / "checkpoint", device=run.device)
        for item in items:
            picture = Image.fromarray(item.pictures[0].numpy())
            solid = picture.convert("L").point(lambda v: 255 if v > 2 else 0)
            picture.putalpha(solid)
            try:
                pictures = looks(generate(pipeline, picture, {}), SIDE)
            except InputError:  # nothing is there yet
                pictures = []
            rows.append([picture, *pictures])
    return rows


def _shadows(occupied: Tensor) -> list[Image.Image]:
    """A grid (R, R, R) seen from the front and from above."""
    front, above = occupied.float().amax(1).T.flip(0), occupied.float().amax(2).T.flip(0)
    return [_image(view.expand(3, -1, -1)) for view in (front, above)]


def _image(channels: Tensor) -> Image.Image:
    return Image.fromarray((channels.clamp(0, 1).permute(1, 2, 0) * 255 + 0.5).to(torch.uint8).cpu().numpy())
