"""A surface that takes the place of what random weights would decode, so that all counts are those of a real asset.

The scene is a union of solids, given by signed distances.  A voxel is active where the signs at its eight corners
differ; a coarse voxel is active where it holds an active one of the finest resolution.  The mesh of the finest
voxels is therefore closed.  Layers run at full cost: only their decisions are replaced.

This module imports nothing of the product, so that the process of the original can use it too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from PIL import Image, ImageDraw
from torch import Tensor

SIZE = 0.883
"""Scale of the whole scene, which sets all counts at once."""

# kind, centre, angles about x, y, z in radians, and lengths, all in a cube of side 1 around the origin:
# torus (ring, tube), ball (radius, height and frequency of bumps), box (half sides)
SOLIDS: tuple[tuple[str, tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]], ...] = (
    ("torus", (0.00, 0.00, -0.10), (0.00, 0.00, 0.00), (0.300, 0.055, 0.0)),
    ("torus", (0.05, 0.00, 0.10), (1.25, 0.35, 0.00), (0.220, 0.040, 0.0)),
    ("torus", (-0.06, 0.02, 0.12), (1.45, -0.80, 0.30), (0.190, 0.030, 0.0)),
    ("ball", (0.00, 0.00, 0.08), (0.00, 0.00, 0.00), (0.120, 0.008, 55.0)),
    ("ball", (-0.26, -0.24, 0.16), (0.00, 0.00, 0.00), (0.085, 0.005, 80.0)),
    ("ball", (0.27, 0.25, 0.20), (0.00, 0.00, 0.00), (0.070, 0.004, 95.0)),
    ("box", (0.00, 0.00, -0.32), (0.00, 0.00, 0.40), (0.260, 0.180, 0.030)),
    ("box", (0.28, -0.25, 0.02), (0.30, 0.50, 0.20), (0.050, 0.050, 0.140)),
    ("box", (-0.28, 0.26, 0.05), (-0.40, 0.20, 0.60), (0.070, 0.040, 0.100)),
)

_STEEPEST = 2.0  # no distance below changes faster than this per unit of way
_ROWS = 1 << 18  # voxels whose corners are evaluated at once
_CORNERS = [(c & 1, c >> 1 & 1, c >> 2) for c in range(8)]
_EDGES = [(a, a | 1 << axis, axis) for axis in range(3) for a in range(8) if not a >> axis & 1]
_FAR_EDGES = ((6, 7), (5, 7), (3, 7))  # along x, y, z, to the voxel's far corner


def distance(points: Tensor) -> Tensor:
    """Signed distance, or a bound of it, of points (N, 3) float64 in [-0.5, 0.5]^3: (N,), negative inside."""
    nearest = points.new_full((len(points),), 1e9)
    # Double precision, so that no rounding can give one corner two signs.
    for kind, centre, angles, lengths in SOLIDS:
        x, y, z = _local(points / SIZE, centre, angles)
        a, b, c = lengths
        if kind == "torus":
            inner = torch.hypot(torch.hypot(x, y) - a, z) - b
        elif kind == "ball":
            bumps = (c * x).sin() * (c * y).sin() * (c * z).sin()
            inner = torch.hypot(torch.hypot(x, y), z) - a - b * bumps
        else:
            dx, dy, dz = x.abs() - a, y.abs() - b, z.abs() - c
            outside = torch.hypot(torch.hypot(dx.clamp_min(0), dy.clamp_min(0)), dz.clamp_min(0))
            inner = outside + torch.maximum(torch.maximum(dx, dy), dz).clamp_max(0)
        nearest = torch.minimum(nearest, inner)
    return nearest * SIZE


def picture() -> Image.Image:
    """An object with transparency around it, so that no background has to be removed."""
    image = Image.new("RGBA", (1024, 1024), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    draw.ellipse((150, 100, 870, 920), fill=(200, 120, 40, 255))
    draw.rectangle((420, 300, 700, 640), fill=(40, 90, 180, 255))
    return image


class Scene:
    """The surface at one resolution: voxels of all coarser grids, subdivisions, dual vertices and material."""

    def __init__(self, resolution: int, device: torch.device) -> None:
        """resolution: of the finest voxels, a power of two times at most 15."""
        self.resolution = resolution
        self.device = device
        self._finest = _active(resolution, device)
        self._grids: dict[int, Tensor] = {}
        self._keeps: dict[tuple[int, int], Tensor] = {}
        self._fields: dict[int, Fields] = {}

    def grid(self, side: int) -> Tensor:
        """Active voxels (N, 3) int32 of the grid of side^3 in lexicographic order; ``side`` divides the resolution."""
        if side not in self._grids:
            keys = _keys(self._finest // (self.resolution // side), side).unique()
            self._grids[side] = torch.stack([keys // side**2, keys // side % side, keys % side], dim=1).int()
        return self._grids[side]

    def keep(self, start: int, side: int) -> Tensor:
        """Which children of the voxels of ``side``^3 are active, (N, 8) bool, child x + 2y + 4z.

        Rows are in the order in which subdivision reaches them from the grid of ``start``^3.
        """
        if (start, side) not in self._keeps:
            self._keeps[start, side] = self._children(self.ordered(start, side), side)
        return self._keeps[start, side]

    def ordered(self, start: int, side: int) -> Tensor:
        """The voxels of ``side``^3, (N, 3) int32, in the order of a subdivision from ``start``^3."""
        coords = self.grid(start)
        for level in _doublings(start, side):
            parent, child = self.keep(start, level).nonzero().unbind(dim=1)
            coords = coords[parent] * 2 + torch.tensor(_CORNERS, dtype=torch.int32, device=self.device)[child]
        return coords

    def fields(self, start: int) -> Fields:
        """What stands on the finest voxels, in the order of a subdivision from ``start``^3."""
        if start not in self._fields:
            self._fields[start] = Fields(self.ordered(start, self.resolution), self.resolution)
        return self._fields[start]

    @property
    def device_bytes(self) -> int:
        """Memory that the scene holds, beside what the networks' decisions would take anyway."""
        kept = [self._finest, *self._grids.values(), *self._keeps.values()]
        kept += [t for f in self._fields.values() for t in (f.offsets, f.crossed, f.material)]
        return sum(t.nbytes for t in kept)

    def _children(self, coords: Tensor, side: int) -> Tensor:
        fine = self.grid(2 * side)
        keys, rows = _keys(coords, side).sort()
        parent = rows[torch.searchsorted(keys, _keys(fine // 2, side))]
        keep = torch.zeros((len(coords), 8), dtype=torch.bool, device=self.device)
        keep[parent, (fine % 2 * torch.tensor([1, 2, 4], device=self.device)).sum(dim=1)] = True
        return keep


class Fields:
    """Dual vertices, crossed edges and material of the finest voxels, in few bytes.

    offsets: (N, 3) float16 from the voxel's low corner, in voxels. crossed: (N, 3) bool.
    material: (N, 6) uint8: base colour, metallic, roughness, alpha (opaque everywhere).
    """

    def __init__(self, coords: Tensor, resolution: int) -> None:
        parts = [_fields(part, resolution) for part in coords.split(_ROWS)]
        self.offsets, self.crossed, self.material = (torch.cat(column) for column in zip(*parts, strict=True))


class Subdivision:
    """Follows one decoding: gives each subdivision in turn the scene's decision."""

    def __init__(self, scene: Scene, start: int) -> None:
        self.scene, self.start, self.side = scene, start, start

    def next(self) -> Tensor:
        keep = self.scene.keep(self.start, self.side)
        self.side *= 2
        return keep


def _active(resolution: int, device: torch.device) -> Tensor:
    """All voxels (N, 3) int32 whose corners lie on both sides of the surface, in lexicographic order."""
    side = resolution
    while side > 63 and side % 2 == 0:
        side //= 2
    coords = torch.cartesian_prod(*[torch.arange(side, dtype=torch.int32, device=device)] * 3)
    children = torch.tensor(_CORNERS, dtype=torch.int32, device=device)
    while True:
        reach = _STEEPEST * math.sqrt(3) / 2 / side
        near = [part[distance((part.double() + 0.5) / side - 0.5).abs() <= reach] for part in coords.split(_ROWS)]
        coords = torch.cat(near)
        if side == resolution:
            break
        coords = (coords[:, None] * 2 + children).reshape(-1, 3)
        side *= 2
    mixed = []
    for part in coords.split(_ROWS):
        inside = _corner_distances(part, resolution) < 0
        mixed.append(part[inside.any(dim=1) & ~inside.all(dim=1)])
    coords = torch.cat(mixed)
    return coords[_keys(coords, resolution).argsort()]


def _fields(coords: Tensor, resolution: int) -> tuple[Tensor, Tensor, Tensor]:
    values = _corner_distances(coords, resolution)
    inside = values < 0
    total = values.new_zeros((len(coords), 3))
    count = values.new_zeros((len(coords), 1))
    for a, b, axis in _EDGES:
        crossing = (inside[:, a] != inside[:, b]).double()
        share = values[:, a] / (values[:, a] - values[:, b]).where(crossing > 0, 1.0)
        place = values.new_tensor(_CORNERS[a]).repeat(len(coords), 1)
        place[:, axis] = share
        total += crossing[:, None] * place
        count += crossing[:, None]
    crossed = torch.stack([inside[:, a] != inside[:, b] for a, b in _FAR_EDGES], dim=1)
    return (total / count).half(), crossed, _material((coords.float() + 0.5) / resolution - 0.5)


def _material(points: Tensor) -> Tensor:
    x, y, z = points.unbind(dim=1)
    colour = [0.5 + 0.45 * (k * x + 11 * y + m * z).sin() for k, m in ((9, 17), (14, 5), (6, 23))]
    metallic = ((20 * z).sin() > 0.6).float()
    roughness = 0.25 + 0.6 * (0.5 + 0.5 * (13 * x - 7 * z).cos())
    attrs = torch.stack([*colour, metallic, roughness, torch.ones_like(x)], dim=1)
    return (attrs.clamp(0, 1) * 255).round().to(torch.uint8)


def _corner_distances(coords: Tensor, resolution: int) -> Tensor:
    corners = coords[:, None] + torch.tensor(_CORNERS, dtype=torch.int32, device=coords.device)
    return distance(corners.reshape(-1, 3).double() / resolution - 0.5).view(-1, 8)


def _local(
    points: Tensor, centre: tuple[float, float, float], angles: tuple[float, float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates in the frame of a solid, turned about x, then y, then z."""
    x, y, z = (points[:, axis] - centre[axis] for axis in range(3))
    for angle, axis in zip(angles, range(3), strict=True):
        if angle:
            c, s = math.cos(angle), math.sin(angle)
            if axis == 0:
                y, z = c * y - s * z, s * y + c * z
            elif axis == 1:
                z, x = c * z - s * x, s * z + c * x
            else:
                x, y = c * x - s * y, s * x + c * y
    return x, y, z


def _keys(coords: Tensor, side: int) -> Tensor:
    x, y, z = coords.long().unbind(dim=1)
    return (x * side + y) * side + z


def _doublings(start: int, side: int) -> Iterator[int]:
    while start < side:
        yield start
        start *= 2
