"""Surfaces with materials, for tests of what makes voxels of them."""

from __future__ import annotations

import math

import torch
from o_voxel import attributes
from o_voxel.voxelize import Grid, make_grid
from torch import Tensor

BOX = [[-0.5] * 3, [0.5] * 3]


def bowl(rings: int = 40, around: int = 60) -> tuple[Tensor, Tensor]:
    """An open, curved surface with a wavy rim."""
    r, a = torch.meshgrid(torch.linspace(0.02, 1, rings), torch.arange(around) * (2 * math.pi / around), indexing="ij")
    x, y = 0.42 * r * a.cos(), 0.42 * r * a.sin()
    z = 0.5 * r**2 - 0.3 + 0.05 * r * (3 * a).sin()
    i, j = torch.meshgrid(torch.arange(rings - 1), torch.arange(around), indexing="ij")
    here, right = i * around + j, i * around + (j + 1) % around
    faces = torch.stack([here, here + around, right, right, here + around, right + around], dim=-1)
    return torch.stack([x, y, z], dim=-1).reshape(-1, 3), faces.reshape(-1, 3)


def textured_bowl(
    wrap: int, linear: bool, alpha_mode: int, size: object = (50, 40, 30)
) -> tuple[attributes.Surface, list[attributes.Material], Grid]:
    """The bowl in a grid: half of its triangles without textures, half with all of them, everything else at random."""
    vertices, faces = bowl()
    grid = make_grid(vertices[:2], None, size, BOX)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    def texture(channels: int, side: int) -> attributes.Texture:
        return attributes.make_texture((random(side, side, channels) * 256).byte(), linear, wrap)

    factors = {"base_color": (0.5, 0.6, 0.7), "metallic": 0.8, "roughness": 0.9, "emissive": (0.1, 0.2, 0.3)}
    plain = attributes.Material(**factors, alpha=0.4, alpha_mode=attributes.BLEND)
    full = attributes.Material(
        **factors,
        alpha=0.9,
        alpha_mode=alpha_mode,
        alpha_cutoff=0.45,
        base_color_texture=texture(3, 64),
        metallic_texture=texture(1, 32),
        roughness_texture=texture(1, 32),
        emissive_texture=texture(3, 1),
        alpha_texture=texture(1, 16),
        normal_texture=texture(3, 64),
    )
    corners = (vertices - grid.box[0])[faces]
    surface = attributes.Surface(
        corners,
        random(len(faces), 3, 3) - 0.5,
        3 * corners[:, :, :2] - 1,
        random(len(faces), 3, 4),
        (random(len(faces)) * 2).long(),
    )
    return surface, [plain, full], grid
