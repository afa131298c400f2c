#!/usr/bin/env python3
"""Make the example pictures: python assets/make_examples.py [NAME ...]

Every object is a signed distance function written here, turned into a mesh with materials and rendered by this
project's own renderer; nothing is taken from anywhere else. Running it again gives the same bytes (with the same
versions of the libraries). Takes about half a minute a picture on two CPU cores.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from o_voxel.rays import RayMesh
from PIL import Image
from scipy.ndimage import gaussian_filter

from trellis2.mesh import Asset, MaterialVoxels, Mesh
from trellis2.render import Camera, orbit_camera, render

FOLDER = Path(__file__).parent / "example_image"
CELLS = 256  # of the grid on which a surface is looked for
VOXELS = 320  # of the material grid
SAMPLES = 3  # rendered pixels along each side of a final one

Array = np.ndarray
Distance = Callable[[Array], Array]
Color = Callable[[Array], Array]


# Distances (N,) of points (N, 3); negative inside.


def box(p: Array, center: tuple[float, ...], half: tuple[float, ...], rounding: float = 0.0) -> Array:
    q = np.abs(p - np.float32(center)) - (np.float32(half) - np.float32(rounding))
    return np.linalg.norm(np.maximum(q, 0), axis=1) + np.minimum(q.max(1), 0) - rounding


def ellipsoid(p: Array, center: tuple[float, ...], radii: tuple[float, ...]) -> Array:
    q = (p - np.float32(center)) / np.float32(radii)
    length, slope = np.linalg.norm(q, axis=1), np.linalg.norm(q / np.float32(radii), axis=1)
    return length * (length - 1) / np.maximum(slope, 1e-6)


def cylinder(p: Array, center: tuple[float, ...], radius: float, half: float, rounding: float = 0.0) -> Array:
    q = p - np.float32(center)
    d = np.stack([np.hypot(q[:, 0], q[:, 1]) - radius + rounding, np.abs(q[:, 2]) - half + rounding], 1)
    return np.linalg.norm(np.maximum(d, 0), axis=1) + np.minimum(d.max(1), 0) - rounding


def capsule(p: Array, a: tuple[float, ...], b: tuple[float, ...], radius_a: float, radius_b: float) -> Array:
    start, along = np.float32(a), np.float32(b) - np.float32(a)
    t = np.clip((p - start) @ along / (along @ along), 0, 1)
    return np.linalg.norm(p - start - t[:, None] * along, axis=1) - (radius_a + t * (radius_b - radius_a))


def torus(p: Array, center: tuple[float, ...], radius: float, tube: float) -> Array:
    """Around the z axis."""
    q = p - np.float32(center)
    return np.hypot(np.hypot(q[:, 0], q[:, 1]) - radius, q[:, 2]) - tube


def mirrored(p: Array) -> Array:
    """The same on both sides of x = 0."""
    return np.concatenate([np.abs(p[:, :1]), p[:, 1:]], 1)


def smooth_union(a: Array, b: Array, width: float) -> Array:
    h = np.clip(0.5 + 0.5 * (b - a) / width, 0, 1)
    return b + (a - b) * h - width * h * (1 - h)


# Surfaces.


@dataclass(frozen=True)
class Part:
    """A piece of one material. color: sRGB, constant or by point."""

    distance: Distance
    color: tuple[float, float, float] | Color
    metallic: float = 0.0
    roughness: float | Color = 0.5


def surface(distance: Distance) -> tuple[Array, Array]:
    """Vertices (V, 3) and triangles (F, 3) of the zero level in [-0.5, 0.5]^3, by surface nets on CELLS^3 cells."""
    axis = np.linspace(-0.5, 0.5, CELLS + 1, dtype=np.float32)
    slab = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    values = np.stack([distance(np.insert(slab, 0, x, axis=1)) for x in axis]).reshape((CELLS + 1,) * 3)
    inside = values < 0
    corners = [(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)]

    def at(grid: Array, corner: tuple[int, ...]) -> Array:
        return grid[tuple(slice(c, c + CELLS) for c in corner)]

    count = sum(at(inside, c).astype(np.int8) for c in corners)
    cells = np.argwhere((count > 0) & (count < 8))
    index = np.full((CELLS,) * 3, -1)
    index[tuple(cells.T)] = np.arange(len(cells))

    total, crossings = np.zeros((len(cells), 3)), np.zeros((len(cells), 1))
    for a in corners:
        for k in range(3):
            if a[k] == 1:
                continue
            b = tuple(1 if n == k else c for n, c in enumerate(a))
            low, high = values[tuple((cells + a).T)], values[tuple((cells + b).T)]
            cut = (low < 0) != (high < 0)
            t = np.where(cut, low / np.where(cut, low - high, 1), 0)
            total += cut[:, None] * (np.float64(a) + t[:, None] * (np.float64(b) - np.float64(a)))
            crossings += cut[:, None]
    vertices = ((cells + total / crossings) / CELLS - 0.5).astype(np.float32)

    faces = []
    for k in range(3):
        step = np.eye(3, dtype=int)[k]
        trimmed = tuple(slice(None, -1) if n == k else slice(1, -1) for n in range(3))
        ahead = tuple(slice(1, None) if n == k else slice(1, -1) for n in range(3))
        edges = np.argwhere(inside[trimmed] != inside[ahead]) + (1 - step)
        u, v = np.eye(3, dtype=int)[(k + 1) % 3], np.eye(3, dtype=int)[(k + 2) % 3]
        quad = np.stack([index[tuple((edges - o).T)] for o in (u + v, v, 0 * u, u)], 1)
        flip = ~inside[tuple(edges.T)]
        quad[flip] = quad[flip, ::-1]
        faces += [quad[:, [0, 1, 2]], quad[:, [0, 2, 3]]]

    for _ in range(3):  # pull the vertices onto the surface
        slope = (
            np.stack([distance(vertices + h) - distance(vertices - h) for h in np.eye(3, dtype=np.float32) * 1e-3], 1)
            / 2e-3
        )
        move = distance(vertices)[:, None] * slope / np.maximum((slope**2).sum(1, keepdims=True), 0.25)
        vertices = vertices - np.clip(move, -0.5 / CELLS, 0.5 / CELLS).astype(np.float32)
    return vertices, np.concatenate(faces).astype(np.int32)


def build(parts: list[Part]) -> Asset:
    vertices, faces = surface(lambda p: np.min([part.distance(p) for part in parts], axis=0))
    near = np.stack(np.meshgrid(*[np.arange(-1, 2)] * 3, indexing="ij"), -1).reshape(-1, 3)
    coords = np.floor((vertices + 0.5) * VOXELS).astype(np.int32)
    coords = np.unique((np.unique(coords, axis=0)[:, None] + near).reshape(-1, 3), axis=0)
    coords = coords[((coords >= 0) & (coords < VOXELS)).all(1)].astype(np.int32)
    points = ((coords + 0.5) / VOXELS - 0.5).astype(np.float32)
    nearest = np.argmin([part.distance(points) for part in parts], axis=0)
    attributes = np.ones((len(points), 6), np.float32)
    for i, part in enumerate(parts):
        own = nearest == i
        attributes[own, :3] = part.color(points[own]) if callable(part.color) else part.color
        attributes[own, 3] = part.metallic
        attributes[own, 4] = part.roughness(points[own]) if callable(part.roughness) else part.roughness
    mesh = Mesh(torch.from_numpy(vertices), torch.from_numpy(faces))
    return Asset(mesh, MaterialVoxels(torch.from_numpy(coords), torch.from_numpy(attributes), 1 / VOXELS))


def photograph(asset: Asset, camera: Camera, size: int, environment: str = "studio") -> tuple[Array, Array]:
    """Colours (size, size, 3) premultiplied by coverage (size, size, 1), in [0, 1]."""
    seen = render(asset, camera, environment, resolution=size * SAMPLES)

    def smaller(channel: torch.Tensor) -> Array:
        return torch.nn.functional.avg_pool2d(channel, SAMPLES).permute(1, 2, 0).numpy()

    return smaller(seen["shaded"] * seen["mask"]), smaller(seen["mask"][None])


def cut_out(asset: Asset, camera: Camera, size: int) -> Image.Image:
    """RGBA with straight alpha."""
    color, coverage = photograph(asset, camera, size)
    straight = np.concatenate([color / np.maximum(coverage, 1e-6), coverage], 2)
    return Image.fromarray((straight * 255 + 0.5).astype(np.uint8), "RGBA")


def studio_photo(asset: Asset, camera: Camera, size: int, wall: tuple[float, float, float]) -> Image.Image:
    """RGB on a seamless backdrop, with the soft shadow of an overhead lamp."""
    color, coverage = photograph(asset, camera, size)
    coarse = size // 2
    floor = float(asset.mesh.vertices[:, 2].min())
    rotation, focal = camera.world_to_camera[:3, :3], camera.intrinsics[0, 0]
    eye = -rotation.T @ camera.world_to_camera[:3, 3]
    axis = (torch.arange(coarse) + 0.5) / coarse - 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    rays = torch.stack([x / focal, y / focal, torch.ones_like(x)], -1).view(-1, 3) @ rotation
    distance = (floor - eye[2]) / rays[:, 2]
    on_floor = (rays[:, 2] < 0) & (distance < 6)
    points = (eye + rays * distance[:, None])[on_floor] + torch.tensor([0, 0, 1e-3])
    mesh, light = RayMesh(asset.mesh.vertices, asset.mesh.faces), torch.zeros(len(points))
    lamps = 48
    for i in range(lamps):  # an overhead soft box, and a share of the whole sky
        spread = 0.45 if i % 2 else 1.3
        turn, reach = 2 * math.pi * i * 0.618034, spread * math.sqrt((i + 0.5) / lamps)
        target = torch.tensor([0.5 + reach * math.cos(turn), -0.35 + reach * math.sin(turn), 1.3])
        towards = torch.nn.functional.normalize(target.expand_as(points), dim=-1)
        light += (mesh.first_hits(points, towards).faces < 0) / lamps
    shade = torch.ones(coarse * coarse)
    shade[on_floor] = light
    shade = gaussian_filter(shade.view(coarse, coarse).numpy(), 2.0)
    shade = np.asarray(Image.fromarray(shade).resize((size, size), Image.Resampling.BICUBIC))
    row = np.linspace(0, 1, size)[:, None]
    fall = 1.0 - 0.28 * (row - 0.62) ** 2 / 0.38 - 0.10 * (np.linspace(-1, 1, size)[None] ** 2)
    backdrop = np.float32(wall) * (fall * (0.30 + 0.70 * np.clip(shade, 0, 1)))[..., None]
    grain = np.random.default_rng(7).normal(0, 0.006, (size, size, 1))
    picture = np.clip(color + (1 - coverage) * backdrop + grain, 0, 1)
    return Image.fromarray((picture * 255 + 0.5).astype(np.uint8), "RGB")


# Colours.


def wavy(p: Array, scale: float) -> Array:
    """Smooth noise (N,) in about [-1, 1]."""
    x, y, z = (p * scale).T
    return (
        np.sin(1.7 * x + 2.3 * np.sin(0.9 * y + 1.1 * z))
        + 0.6 * np.sin(3.1 * y + 1.3 * np.sin(2.1 * x) + 0.7 * z)
        + 0.4 * np.sin(5.3 * z + 1.9 * np.sin(1.7 * y + x))
    ) / 2


def step(x: Array) -> Array:
    """0 below, 1 above 0, with a ramp of about a voxel."""
    return np.clip(x * VOXELS / 1.5 + 0.5, 0, 1)


def blend(a: tuple[float, ...] | Array, b: tuple[float, ...], t: Array) -> Array:
    return np.float32(a) + np.clip(t, 0, 1)[:, None].astype(np.float32) * (np.float32(b) - np.float32(a))


def wood(light: tuple[float, ...], dark: tuple[float, ...], along: int) -> Color:
    def color(p: Array) -> Array:
        stretched = p * np.where(np.arange(3) == along, 0.12, 1.0).astype(np.float32)
        rings = np.hypot(stretched[:, (along + 1) % 3] + 0.31, stretched[:, (along + 2) % 3] + 0.17)
        grain = 0.5 + 0.5 * np.sin(150 * rings + 2.2 * wavy(stretched, 14))
        fibre = 0.5 + 0.5 * wavy(stretched, 110)
        return blend(light, dark, 0.55 * grain**2 + 0.2 * fibre)

    return color


# Objects, standing upright, their front towards -y.


def letter() -> Image.Image:
    depth, bevel = 0.13, 0.022

    def flat(p: Array) -> Array:
        bar = np.abs(p[:, [0, 2]] - np.float32([0, 0.27])) - np.float32([0.36, 0.105])
        stem = np.abs(p[:, [0, 2]] - np.float32([0, -0.06])) - np.float32([0.115, 0.345])
        return np.minimum(*(np.linalg.norm(np.maximum(q, 0), axis=1) + np.minimum(q.max(1), 0) for q in (bar, stem)))

    def solid(p: Array) -> Array:
        q = np.stack([flat(p) + bevel, np.abs(p[:, 1]) - depth + bevel], 1)
        return np.linalg.norm(np.maximum(q, 0), axis=1) + np.minimum(q.max(1), 0) - bevel

    def inlay(p: Array) -> Array:
        q = np.stack([flat(p) + 0.042, np.abs(np.abs(p[:, 1]) - depth - 0.001) - 0.012], 1)
        return np.linalg.norm(np.maximum(q, 0), axis=1) + np.minimum(q.max(1), 0) - 0.003

    parts = [
        Part(solid, (0.93, 0.74, 0.42), 1.0, 0.26),
        Part(inlay, lambda p: blend((0.05, 0.32, 0.42), (0.03, 0.46, 0.50), p[:, 2] + 0.5), 0.0, 0.16),
    ]
    return cut_out(build(parts), orbit_camera(math.pi - 0.55, 0.24, 2.1, 32), 768)


def mug() -> Image.Image:
    def body(p: Array) -> Array:
        outer = cylinder(p, (-0.06, 0, 0), 0.27, 0.34, 0.035)
        hollow = cylinder(p, (-0.06, 0, 0.05), 0.235, 0.36, 0.05)
        upright = (p - np.float32([0.235, 0, 0]))[:, [0, 2, 1]] * np.float32([1, 0.86, 1])
        handle = torus(upright, (0, 0, 0), 0.15, 0.036)
        return np.maximum(smooth_union(outer, handle, 0.03), -hollow)

    def glaze(p: Array) -> Array:
        outside = step(np.hypot(p[:, 0] + 0.06, p[:, 1]) - 0.25)
        height = p[:, 2] + 0.010 * wavy(p, 7)
        color = blend((0.92, 0.88, 0.79), (0.10, 0.24, 0.40), outside * step(-0.02 - height))
        color = blend(color, (0.74, 0.34, 0.19), outside * step(0.014 - np.abs(height - 0.035)))
        return blend(color, (0.66, 0.53, 0.40), step(-0.322 - p[:, 2]))

    return cut_out(build([Part(body, glaze, 0.0, 0.22)]), orbit_camera(math.pi - 0.45, 0.42, 2.2, 30), 640)


def stool() -> Image.Image:
    timber = ((0.80, 0.60, 0.40), (0.55, 0.34, 0.18))
    corners = [(sx, sy) for sx in (-1, 1) for sy in (-1, 1)]

    def legs(p: Array) -> Array:
        feet = [((0.17 * x, 0.17 * y, 0.3), (0.28 * x, 0.28 * y, -0.45)) for x, y in corners]
        return np.min([capsule(p, top, foot, 0.036, 0.024) for top, foot in feet], axis=0)

    def rungs(p: Array) -> Array:
        """Two along x; swap the axes for the other two."""
        return np.min([capsule(p, (-0.246, y, -0.2), (0.246, y, -0.2), 0.017, 0.017) for y in (-0.246, 0.246)], axis=0)

    def seat(p: Array) -> Array:
        dish = ellipsoid(p, (0, 0, 0.52), (0.36, 0.36, 0.16))
        return np.maximum(cylinder(p, (0, 0, 0.34), 0.32, 0.045, 0.03), -dish)

    parts = [
        Part(seat, wood(*timber, 0), 0.0, 0.38),
        Part(legs, wood((0.72, 0.52, 0.33), (0.48, 0.29, 0.15), 2), 0.0, 0.42),
        Part(rungs, wood(*timber, 0), 0.0, 0.42),
        Part(lambda p: rungs(p[:, [1, 0, 2]]), wood(*timber, 1), 0.0, 0.42),
    ]
    return cut_out(build(parts), orbit_camera(math.pi - 0.62, 0.36, 2.5, 32), 640)


def house() -> Image.Image:
    def roof(p: Array) -> Array:
        slope = (np.abs(p[:, 0]) * 0.72 + (p[:, 2] - 0.40) * 0.86) / math.hypot(0.72, 0.86)
        slab = np.maximum(np.abs(slope + 0.02) - 0.024, np.abs(p[:, 1]) - 0.30)
        return np.maximum(slab, 0.02 - p[:, 2]) - 0.006

    def walls(p: Array) -> Array:
        slope = (np.abs(p[:, 0]) * 0.72 + (p[:, 2] - 0.385) * 0.86) / math.hypot(0.72, 0.86)
        return np.maximum(box(p, (0, 0, 0.035), (0.30, 0.25, 0.405), 0.01), slope)

    def windows(p: Array) -> Array:
        sides = [box(p, (s * 0.30, y, -0.06), (0.012, 0.062, 0.075), 0.005) for s in (-1, 1) for y in (-0.11, 0.12)]
        return np.min([*sides, box(p, (0.165, -0.25, -0.06), (0.062, 0.012, 0.075), 0.005)], axis=0)

    def frames(p: Array) -> Array:
        sides = [box(p, (s * 0.30, y, -0.06), (0.008, 0.080, 0.093), 0.005) for s in (-1, 1) for y in (-0.11, 0.12)]
        bars = [box(p, (s * 0.30, y, -0.06), (0.017, 0.007, 0.08)) for s in (-1, 1) for y in (-0.11, 0.12)]
        front = [
            box(p, (0.165, -0.25, -0.06), (0.08, 0.008, 0.093), 0.005),
            box(p, (0.165, -0.25, -0.06), (0.007, 0.017, 0.08)),
        ]
        gable = cylinder((p - np.float32([0, -0.25, 0.17]))[:, [0, 2, 1]], (0, 0, 0), 0.062, 0.014, 0.005)
        return np.min([*sides, *bars, *front, gable], axis=0)

    def tiles(p: Array) -> Array:
        along = np.abs(p[:, 0]) * 0.86 - p[:, 2] * 0.72
        joint = (np.mod(along, 0.055) < 0.008) | (np.mod(p[:, 1] + 0.02 * (np.floor(along / 0.055) % 2), 0.04) < 0.005)
        return blend((0.66, 0.22, 0.15), (0.36, 0.10, 0.07), joint * 0.8 + 0.15 * wavy(p, 25))

    parts = [
        Part(walls, lambda p: blend((0.88, 0.78, 0.58), (0.80, 0.68, 0.47), 0.5 + 0.5 * wavy(p, 18)), 0.0, 0.75),
        Part(roof, tiles, 0.0, 0.6),
        Part(frames, (0.95, 0.95, 0.93), 0.0, 0.4),
        Part(windows, (0.28, 0.48, 0.62), 0.0, 0.08),
        Part(lambda p: box(p, (-0.12, -0.25, -0.15), (0.075, 0.016, 0.16), 0.006), (0.20, 0.42, 0.36), 0.0, 0.35),
        Part(lambda p: ellipsoid(p, (-0.07, -0.272, -0.15), (0.014, 0.014, 0.014)), (0.95, 0.78, 0.4), 1.0, 0.2),
        Part(lambda p: box(p, (0.17, 0.1, 0.33), (0.05, 0.05, 0.13), 0.006), (0.63, 0.36, 0.28), 0.0, 0.8),
        Part(lambda p: box(p, (0.17, 0.1, 0.455), (0.062, 0.062, 0.016), 0.005), (0.80, 0.78, 0.74), 0.0, 0.7),
        Part(
            lambda p: box(p, (0, -0.03, -0.345), (0.44, 0.42, 0.035), 0.025),
            lambda p: blend((0.34, 0.50, 0.20), (0.22, 0.36, 0.13), 0.5 + 0.6 * wavy(p, 30)),
            0.0,
            0.9,
        ),
        Part(lambda p: box(p, (-0.12, -0.36, -0.318), (0.06, 0.09, 0.014), 0.008), (0.74, 0.70, 0.64), 0.0, 0.8),
        Part(
            lambda p: (
                np.min(
                    [
                        ellipsoid(p, c, r)
                        for c, r in (
                            ((0.31, -0.34, -0.24), (0.085, 0.085, 0.09)),
                            ((0.22, -0.36, -0.265), (0.06, 0.06, 0.06)),
                            ((-0.32, -0.33, -0.26), (0.075, 0.075, 0.07)),
                        )
                    ],
                    axis=0,
                )
                + 0.008 * wavy(p, 60)
            ),
            lambda p: blend((0.14, 0.32, 0.13), (0.26, 0.45, 0.18), 0.5 + 0.6 * wavy(p, 60)),
            0.0,
            0.9,
        ),
    ]
    return cut_out(build(parts), orbit_camera(math.pi - 0.6, 0.36, 2.85, 30), 640)


def vase() -> Image.Image:
    def profile(z: Array) -> Array:
        knots = [-0.47, -0.44, -0.36, -0.2, -0.02, 0.14, 0.27, 0.36, 0.43, 0.47]
        radii = [0.125, 0.13, 0.15, 0.235, 0.275, 0.22, 0.115, 0.085, 0.11, 0.15]
        t = np.clip((z + 0.47) / 0.94, 0, 1)
        table = gaussian_filter(np.interp(np.linspace(-0.47, 0.47, 400), knots, radii), 14, mode="nearest")
        return np.interp(t, np.linspace(0, 1, 400), table)

    def body(p: Array) -> Array:
        ring, z = np.hypot(p[:, 0], p[:, 1]), p[:, 2]
        slope = (profile(z + 1e-3) - profile(z - 1e-3)) / 2e-3
        angle = np.arctan2(p[:, 1], p[:, 0]) + 1.6 * z
        flutes = 0.007 * np.cos(16 * angle) * np.exp(-(((z + 0.04) / 0.2) ** 4))
        wall = (ring - profile(z) - flutes) / np.sqrt(1 + slope**2)
        shell = np.maximum(np.abs(wall + 0.013) - 0.013, np.abs(z + 0.01) - 0.46)
        bottom = np.maximum(wall, np.abs(z + 0.455) - 0.015)
        rim = torus(p, (0, 0, 0.452), float(profile(np.float32(0.452))) - 0.012, 0.018)
        return smooth_union(np.minimum(shell, bottom), rim, 0.012)

    def color(p: Array) -> Array:
        patina = np.clip(1.2 * wavy(p, 8) - 0.1 - 1.4 * np.abs(p[:, 2] + 0.05), 0, 1)
        return blend((0.95, 0.64, 0.50), (0.80, 0.50, 0.38), patina)

    def roughness(p: Array) -> Array:
        return 0.2 + 0.16 * np.clip(wavy(p, 7), 0, 1)

    return cut_out(build([Part(body, color, 1.0, roughness)]), orbit_camera(math.pi - 0.3, 0.26, 2.3, 32), 640)


def duck() -> Image.Image:
    def body(p: Array) -> Array:
        trunk = ellipsoid(p, (0, 0.04, -0.14), (0.245, 0.33, 0.21))
        tail = ellipsoid(p, (0, 0.33, 0.02), (0.10, 0.085, 0.105))
        head = ellipsoid(p, (0, -0.17, 0.20), (0.17, 0.175, 0.17))
        wings = ellipsoid(mirrored(p), (0.222, 0.08, -0.10), (0.045, 0.17, 0.10))
        duckling = smooth_union(smooth_union(trunk, head, 0.09), tail, 0.12)
        return np.maximum(smooth_union(duckling, wings, 0.035), -0.325 - p[:, 2])

    def beak(p: Array) -> Array:
        upper = ellipsoid(p, (0, -0.37, 0.185), (0.085, 0.085, 0.022))
        return np.minimum(upper, ellipsoid(p, (0, -0.355, 0.155), (0.068, 0.07, 0.018)))

    def eyes(p: Array) -> Array:
        return ellipsoid(mirrored(p), (0.085, -0.298, 0.265), (0.026, 0.02, 0.032))

    def glints(p: Array) -> Array:
        return ellipsoid(mirrored(p), (0.084, -0.314, 0.278), (0.009, 0.008, 0.01))

    parts = [
        Part(body, (0.93, 0.66, 0.06), 0.0, 0.34),
        Part(beak, (0.82, 0.28, 0.05), 0.0, 0.36),
        Part(eyes, (0.04, 0.04, 0.05), 0.0, 0.15),
        Part(glints, (0.97, 0.97, 0.97), 0.0, 0.2),
    ]
    return studio_photo(build(parts), orbit_camera(math.pi - 0.65, 0.28, 2.5, 32), 768, (0.80, 0.82, 0.84))


def chair() -> Image.Image:
    def frame(p: Array) -> Array:
        q = mirrored(p)
        front = capsule(q, (0.215, -0.215, -0.07), (0.235, -0.235, -0.47), 0.032, 0.022)
        back = capsule(q, (0.215, 0.215, -0.07), (0.235, 0.255, -0.47), 0.032, 0.022)
        post = capsule(q, (0.215, 0.215, -0.07), (0.215, 0.285, 0.45), 0.03, 0.024)
        rail = box(p, (0, 0, -0.085), (0.225, 0.225, 0.03), 0.01)
        return np.min([front, back, post, rail], axis=0)

    def slats(p: Array) -> Array:
        rows = [box(p, (0, 0.215 + 0.135 * (z + 0.07), z), (0.21, 0.014, 0.038), 0.012) for z in (0.15, 0.27, 0.39)]
        return np.min(rows, axis=0)

    def seat(p: Array) -> Array:
        dome = ellipsoid(p, (0, -0.01, -0.05), (0.5, 0.5, 0.07))
        return np.maximum(box(p, (0, -0.01, -0.03), (0.24, 0.24, 0.055), 0.04), dome)

    timber = ((0.62, 0.38, 0.20), (0.40, 0.21, 0.10))
    parts = [
        Part(frame, wood(*timber, 2), 0.0, 0.4),
        Part(slats, wood(*timber, 0), 0.0, 0.4),
        Part(seat, (0.12, 0.42, 0.46), 0.0, 0.75),
    ]
    return cut_out(build(parts), orbit_camera(math.pi - 0.6, 0.3, 2.5, 32), 640)


def lamp() -> Image.Image:
    def stand(p: Array) -> Array:
        foot = np.maximum(ellipsoid(p, (0, 0, -0.45), (0.2, 0.2, 0.07)), -0.45 - p[:, 2])
        knob = ellipsoid(p, (0, 0, -0.15), (0.06, 0.06, 0.085))
        stem = capsule(p, (0, 0, -0.43), (0, 0, 0.2), 0.018, 0.018)
        return smooth_union(smooth_union(foot, stem, 0.04), knob, 0.03)

    def shade(p: Array) -> Array:
        slope = 0.27
        wall = (np.hypot(p[:, 0], p[:, 1]) - 0.235 + slope * (p[:, 2] - 0.24)) / math.hypot(1, slope)
        return np.maximum(np.abs(wall) - 0.011, np.abs(p[:, 2] - 0.24) - 0.21)

    def cloth(p: Array) -> Array:
        return blend((0.88, 0.42, 0.30), (0.96, 0.92, 0.82), step(0.182 - np.abs(p[:, 2] - 0.24)))

    parts = [Part(stand, (0.86, 0.67, 0.36), 1.0, 0.24), Part(shade, cloth, 0.0, 0.8)]
    return cut_out(build(parts), orbit_camera(math.pi - 0.3, 0.2, 2.4, 32), 640)


def car() -> Image.Image:
    def wheel(p: Array, radius: float, half: float) -> Array:
        """All four, about axles along x."""
        q = mirrored(p)[:, [1, 2, 0]]
        return np.min([cylinder(q, (y, -0.13, 0.185), radius, half, 0.02) for y in (-0.27, 0.27)], axis=0)

    def body(p: Array) -> Array:
        hull = box(p, (0, 0, -0.06), (0.21, 0.46, 0.09), 0.06)
        cabin = box(p * np.float32([1, 1, 0.9]), (0, 0.07, 0.075), (0.18, 0.24, 0.12), 0.09)
        return np.maximum(smooth_union(hull, cabin, 0.05), -wheel(p, 0.135, 0.07))

    def paint(p: Array) -> Array:
        side = np.abs(p[:, 2] - 0.1) - 0.05
        pillars = np.maximum(np.abs(np.abs(p[:, 1] - 0.07) - 0.1) - 0.085, 0.14 - np.abs(p[:, 0]))
        screens = np.maximum(0.205 - np.abs(p[:, 1] - 0.07), np.abs(p[:, 0]) - 0.135)
        glass = step(-np.maximum(side, np.minimum(pillars, screens)))
        return blend((0.80, 0.10, 0.08), (0.05, 0.09, 0.14), glass)

    def lamps(p: Array) -> Array:
        return ellipsoid(mirrored(p), (0.13, -0.452, -0.045), (0.042, 0.022, 0.032))

    def bumpers(p: Array) -> Array:
        return np.min([box(p, (0, y, -0.12), (0.19, 0.02, 0.018), 0.012) for y in (-0.455, 0.455)], axis=0)

    parts = [
        Part(body, paint, 0.0, 0.2),
        Part(lambda p: wheel(p, 0.115, 0.045), (0.05, 0.05, 0.06), 0.0, 0.7),
        Part(lambda p: wheel(p, 0.07, 0.05), (0.82, 0.82, 0.84), 1.0, 0.25),
        Part(lamps, (0.98, 0.94, 0.76), 0.0, 0.15),
        Part(bumpers, (0.75, 0.75, 0.78), 1.0, 0.25),
    ]
    return cut_out(build(parts), orbit_camera(math.pi - 0.65, 0.32, 2.4, 32), 640)


EXAMPLES: dict[str, tuple[Callable[[], Image.Image], dict[str, object]]] = {
    "T.png": (letter, {"optimize": True}),
    "mug.png": (mug, {"optimize": True}),
    "stool.png": (stool, {"optimize": True}),
    "house.webp": (house, {"quality": 92, "method": 6}),
    "vase.png": (vase, {"optimize": True}),
    "duck.jpg": (duck, {"quality": 92}),
    "chair.png": (chair, {"optimize": True}),
    "lamp.png": (lamp, {"optimize": True}),
    "car.png": (car, {"optimize": True}),
}


def main(names: list[str]) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in names or list(EXAMPLES):
        make, options = EXAMPLES[name]
        make().save(FOLDER / name, **options)
        sys.stdout.write(f"{FOLDER / name}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
