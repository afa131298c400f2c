"""Contact sheets: pictures side by side, to be looked at.

python -m training.sheets objects FOLDER [FAMILY ...]     what the families look like
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

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
