"""Before the first request: load what a process otherwise loads while somebody waits."""

from __future__ import annotations

from contextlib import suppress

import torch
from PIL import Image

from .bake import bake
from .errors import InputError
from .memory import memory_given_back
from .mesh import MATERIAL_CHANNELS, Asset, MaterialVoxels, Mesh
from .options import GenerateOptions
from .pipeline import PRESETS, Pipeline
from .render import turntable
from .voxels import Grid

_OPTIONS = GenerateOptions(sparse_structure_steps=1, shape_slat_steps=1, tex_slat_steps=1)
_TOO_LITTLE = "Too little memory is free beside the networks; free some, or run on a machine with more memory."
_SIDE = 8  # voxels along an edge of the cube that is baked and rendered


def warm_up(pipeline: Pipeline) -> None:
    """Run every stage once with next to nothing in it, so that libraries and kernels are loaded.

    What removes backgrounds is left to the first picture that needs it.  Raises CapacityError as ``run`` does.
    """
    with torch.inference_mode(), memory_given_back(_TOO_LITTLE):
        noise = torch.Generator().manual_seed(0)
        cond = pipeline.condition(Image.new("RGB", (64, 64), (128, 128, 128)), 512)
        pipeline.decode_structure(pipeline.sample_structure(cond, _OPTIONS, noise))
        corners = torch.cartesian_prod(torch.tensor([0]), *[torch.arange(2)] * 3).int().to(pipeline.device)
        for size in sorted({preset.flow for preset in PRESETS.values()}):
            if f"tex_slat_flow_model_{size}" not in pipeline.checkpoint.models:
                continue
            shape = pipeline.sample_shape(cond, size, Grid(corners), _OPTIONS, noise)
            texture = pipeline.sample_texture(cond, size, shape, _OPTIONS, noise)
            with suppress(InputError):  # noise need not have a surface
                pipeline.decode(shape, texture, 32)
        cube = _cube(pipeline.device)
        bake(cube, decimation_target=1000, texture_size=64)
        for _ in turntable(cube, frames=1, resolution=64):
            pass


def _cube(device: torch.device) -> Asset:
    """A grey cube of half a metre."""
    corners = torch.cartesian_prod(*[torch.tensor([-0.25, 0.25])] * 3)
    quads = torch.tensor([[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]])
    faces = quads[:, [0, 1, 2, 0, 2, 3]].reshape(-1, 3).int()
    coords = torch.cartesian_prod(*[torch.arange(_SIDE)] * 3).int()
    attrs = torch.full((len(coords), MATERIAL_CHANNELS), 0.5)
    return Asset(
        Mesh(corners.to(device), faces.to(device)), MaterialVoxels(coords.to(device), attrs.to(device), 1 / _SIDE)
    )
