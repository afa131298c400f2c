"""Contact sheets: pictures side by side, to be looked at.

python -m training.sheets objects FOLDER [FAMILY ...]     what the families look like
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from trellis2.mesh import Asset
from trellis2.render import orbit_camera, render

from .data import View, cutout, draw_view, surface_of, voxelise
from .objects import FAMILIES, make

COLUMNS = 8
TILE = 192


def sheet(rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], tile: int = TILE) -> Image.Image:
    """One row of square pictures after the other, each with its label at the left; RGBA goes onto light grey."""
    width = max(len(row) for row in rows)
    page = Image.new("RGB", (width * tile, len(rows) * tile), (228, 228, 228))
    draw = ImageDraw.Draw(page)
    for y, (row, label) in enumerate(zip(rows, labels, strict=True)):
        for x, image in enumerate(row):
            small = image.resize((tile, tile), Image.Resampling.LANCZOS)
            page.paste(small, (x * tile, y * tile), small if small.mode == "RGBA" else None)
        draw.text((4, y * tile + 2), label, fill=(20, 20, 20))
    return page


def looks(asset: Asset, size: int = 256) -> list[Image.Image]:
    """Four views around an asset: front, right, back, left, a little from above."""
    pictures = []
    for turn in (0.35, 0.35 + 1.571, 0.35 + 3.142, 0.35 + 4.712):
        out = render(asset, orbit_camera(3.1416 - turn, 0.3, 2.0, 36.0), "studio", resolution=size, supersampling=2)
        rgba = torch.cat([out["shaded"], out["mask"][None]]).clamp(0, 1).permute(1, 2, 0)
        pictures.append(Image.fromarray((rgba * 255 + 0.5).to(torch.uint8).cpu().numpy()))
    return pictures


def objects(folder: Path, families: Sequence[str]) -> None:
    """One sheet for every four families: eight seeds each, from the views that training draws."""
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(families), 4):
        names = families[first : first + 4]
        rows = [[_look(name, seed) for seed in range(COLUMNS)] for name in names]
        sheet(rows, names).save(folder / f"{'_'.join(names)}.png")


def _look(family: str, seed: int) -> Image.Image:
    thing = make(family, seed)
    coords, *_, attrs = voxelise(thing, 256)
    view = draw_view(np.random.default_rng(seed))
    return cutout(surface_of(thing, coords, attrs, 256, "cpu"), View(**{**vars(view), "light": seed % 4}), 2 * TILE)


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] != "objects":
        sys.exit(__doc__)
    objects(Path(sys.argv[2]), sys.argv[3:] or list(FAMILIES))
