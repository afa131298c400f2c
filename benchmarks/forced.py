"""The scene in place of the decisions of random networks, while the product runs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import trellis2.pipeline
from trellis2.errors import InputError
from trellis2.mesh import MaterialVoxels
from trellis2.models.matting import BiRefNet
from trellis2.models.voxel_vae import DualGrid
from trellis2.pipeline import PRESETS, Pipeline, Preset
from trellis2.voxels import Grid, Refinement, Voxels

from .measure import synchronise
from .models import random_matting
from .scene import Scene, Subdivision, picture

SMALLER = 8
"""By how much ``--small`` reduces all resolutions."""


@contextmanager
def reduced() -> Iterator[None]:
    """All presets at an eighth of their resolution, for a run on a CPU."""
    smaller = {
        name: dataclasses.replace(p, structure=p.structure // SMALLER, resolution=p.resolution // SMALLER)
        for name, p in PRESETS.items()
    }
    with ExitStack() as stack:
        stack.enter_context(patch.dict(PRESETS, smaller))
        for name in ("CASCADE_START", "CASCADE_FLOOR", "CASCADE_STEP"):
            value = getattr(trellis2.pipeline, name) // SMALLER
            stack.enter_context(patch.object(trellis2.pipeline, name, value))
        yield


@contextmanager
def forced(scene: Scene, preset: Preset) -> Iterator[None]:
    """Let every pipeline decide as the scene does while the block runs.

    All networks run in full and their answers are thrown away.  What replaces them is computed before (see
    ``_prepare``) and costs copies of a few bytes per voxel.
    """
    _prepare(scene, preset)
    module: Any = trellis2.pipeline
    structure_grid, dual_grid_fields = module.structure_grid, module.dual_grid_fields
    refine_grid, decode_texture, subdivide = Pipeline.refine_grid, Pipeline.decode_texture, Grid.subdivide

    def scene_structure(logits: Tensor, side: int) -> Grid:
        with suppress(InputError):  # random weights may leave it empty
            structure_grid(logits, side)
        return _begin(scene, side)

    def scene_subdivide(self: Grid, keep: Tensor) -> Refinement:
        following: Subdivision = self.__dict__["_scene"]
        refinement = subdivide(self, following.next())
        refinement.fine.__dict__["_scene"] = following
        return refinement

    def scene_refine(self: Pipeline, shape: Voxels, resolution: int, max_num_tokens: int) -> tuple[Grid, int]:
        _restart(scene, shape.grid)
        found, chosen = refine_grid(self, shape, resolution, max_num_tokens)
        grid = _begin(scene, chosen // module.LATENT_STRIDE)
        # Cells at whose very edge the surface is may differ.
        assert abs(len(found) - len(grid)) <= 0.05 * len(grid), (len(found), len(grid))
        return grid, chosen

    def scene_fields(decoded: Voxels, margin: float) -> DualGrid:
        dual = dual_grid_fields(decoded, margin)
        wanted = scene.fields(_start(decoded.grid))
        dual.offsets.copy_(wanted.offsets)
        dual.crossed.copy_(wanted.crossed)
        return dual

    def scene_shape(self: Pipeline, shape: Voxels, resolution: int) -> Any:
        _restart(scene, shape.grid)
        return decode_shape(self, shape, resolution)

    def scene_texture(self: Pipeline, texture: Voxels, guide: list[Refinement], resolution: int) -> MaterialVoxels:
        material = decode_texture(self, texture, guide, resolution)
        wanted = scene.fields(_start(texture.grid)).material
        material.attrs.copy_(wanted).div_(255)
        return material

    def known_matte(self: BiRefNet, image: Image.Image) -> Image.Image:
        matte(self, image)
        return picture().getchannel("A").resize(image.size)

    decode_shape, matte = Pipeline.decode_shape, BiRefNet.matte
    with ExitStack() as stack:
        for owner, name, value in (
            (module, "structure_grid", scene_structure),
            (module, "dual_grid_fields", scene_fields),
            (Pipeline, "refine_grid", scene_refine),
            (Pipeline, "decode_shape", scene_shape),
            (Pipeline, "decode_texture", scene_texture),
            (Grid, "subdivide", scene_subdivide),
            (BiRefNet, "matte", known_matte),
            (module, "load_matting", lambda *_, **__: random_matting(scene.device)),
        ):
            stack.enter_context(patch.object(owner, name, value))
        yield


def injection_seconds(scene: Scene) -> float:
    """What the copies of one decoding take that the networks alone would not."""
    fields = scene.fields(scene.resolution // trellis2.pipeline.LATENT_STRIDE)
    targets = [fields.offsets.float(), fields.crossed.clone(), fields.material.float()]
    synchronise()
    start = time.perf_counter()
    for target, source in zip(targets, (fields.offsets, fields.crossed, fields.material), strict=True):
        target.copy_(source)
    targets[2].div_(255)
    synchronise()
    return time.perf_counter() - start


def _prepare(scene: Scene, preset: Preset) -> None:
    """Compute beforehand all that will be asked for."""
    scene.fields(scene.resolution // trellis2.pipeline.LATENT_STRIDE)
    if preset.cascade:
        side = preset.structure
        while side < trellis2.pipeline.CASCADE_START:
            scene.keep(preset.structure, side)
            side *= 2
    if scene.device.type == "cuda":
        torch.cuda.empty_cache()


def _begin(scene: Scene, side: int) -> Grid:
    grid = Grid(F.pad(scene.grid(side), (1, 0)))
    _restart(scene, grid, side)
    return grid


def _restart(scene: Scene, grid: Grid, side: int | None = None) -> None:
    """Decode from ``grid`` anew."""
    grid.__dict__["_scene"] = Subdivision(scene, side or _start(grid))


def _start(grid: Grid) -> int:
    following: Subdivision = grid.__dict__["_scene"]
    return following.start
