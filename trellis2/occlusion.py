"""Screen-space ambient occlusion: how much of the light from all around the nearby surface keeps away."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from o_voxel.launch import Floats, Vec3, Vec3s, func, kernel, launch, shared, wp
from torch import Tensor

NO_DEPTH = 1e10
"""Depth of a pixel that sees nothing."""

_RADIUS = 0.1
_INTENSITY = 1.5
_SAMPLES = 16  # of each pixel; every pixel of a tile has its own
_TILE = 4
# The same for kernels.
_NOWHERE = wp.constant(NO_DEPTH)
_REACH = wp.constant(_RADIUS)
_NEAREST = wp.constant(1e-6)
_SIDE = wp.constant(_TILE)


def screen_occlusion(depth: Tensor, normal: Tensor, intrinsics: Tensor) -> Tensor:
    """Occlusion (H, W) in [0, 1], 1 where nothing is seen.

    depth: (H, W) float32, ``NO_DEPTH`` where nothing is seen. normal: (H, W, 3) float32 in the camera frame.
    intrinsics: (3, 3), in units of the picture's sides.

    The estimate of the original (points of a hemisphere, nearer ones more often, that lie behind the picture's surface,
    times 1.5) with a fixed pattern instead of random points: few for each pixel, others for its neighbours in a tile,
    then an average over the tile that does not cross steps in depth.
    """
    height, width = depth.shape
    pixels = depth.numel()
    depth, normal = depth.contiguous(), normal.contiguous()
    share, occlusion = torch.empty_like(depth), torch.empty_like(depth)
    focal_x, focal_y, centre_x, centre_y = (float(intrinsics[i, j]) for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    picture = [height, width, shared(depth.view(-1), wp.float32)]
    pattern = _pattern(depth.device)
    arguments = [
        *picture,
        wp.vec4(focal_x, focal_y, centre_x, centre_y),
        shared(normal.view(-1, 3), wp.vec3),
        len(pattern) // _TILE**2,
        shared(pattern, wp.vec3),
        shared(share.view(-1), wp.float32),
    ]
    launch(_count_hidden, pixels, arguments, depth.device)
    arguments = [*picture, _INTENSITY, shared(share.view(-1), wp.float32), shared(occlusion.view(-1), wp.float32)]
    launch(_average_tile, pixels, arguments, depth.device)
    return occlusion


@lru_cache(maxsize=8)
def _pattern(device: torch.device) -> Tensor:
    """Points (samples * tile cells, 3) of the unit ball, even in direction, with radius u^2 for an even u."""
    # An additive sequence in three dimensions (Roberts' R3), even over all and over every tile cell.
    root = 1.2207440846057596
    index = torch.arange(_SAMPLES * _TILE**2, dtype=torch.float64) + 0.5
    turn, height, scale = ((index / root**k) % 1 for k in (1, 2, 3))
    z = 2 * height - 1
    ring = (1 - z * z).sqrt()
    angle = 2 * math.pi * turn
    points = torch.stack([ring * angle.cos(), ring * angle.sin(), z], -1) * (scale**2)[:, None]
    return points.float().contiguous().to(device)


@func
def _place(along: float, focal: float, centre: float, size: int) -> int:
    """The pixel in which a point at ``along`` / depth is seen, or the nearest one of the picture."""
    return int(wp.clamp((along * focal + centre) * float(size), 0.0, float(size - 1)))


@kernel
def _count_hidden(
    first: int,
    height: int,
    width: int,
    depth: Floats,
    lens: wp.vec4,
    normal: Vec3s,
    samples: int,
    pattern: Vec3s,
    share: Floats,
) -> None:
    """The share of a pixel's points that lie behind what the picture shows, though not far."""
    i = first + wp.tid()
    far = depth[i]
    hidden = float(0)
    if far < _NOWHERE:
        row = i // width
        column = i % width
        x = ((float(column) + 0.5) / float(width) - lens[2]) / lens[0] * far
        y = ((float(row) + 0.5) / float(height) - lens[3]) / lens[1] * far
        cell = row % _SIDE * _SIDE + column % _SIDE
        for sample in range(samples):
            offset = pattern[sample * _SIDE * _SIDE + cell]
            side = wp.dot(offset, normal[i])
            if side < 0.0:
                offset = -offset
            point = Vec3(x, y, far) + offset * _REACH
            inverse = 1.0 / wp.max(point[2], 1.0e-5)
            u = _place(point[0] * inverse, lens[0], lens[2], width)
            v = _place(point[1] * inverse, lens[1], lens[3], height)
            gap = point[2] - depth[v * width + u]
            if gap >= _NEAREST and gap < _REACH:
                hidden += 1.0
    share[i] = hidden / float(samples)


@kernel
def _average_tile(
    first: int, height: int, width: int, depth: Floats, intensity: float, share: Floats, occlusion: Floats
) -> None:
    i = first + wp.tid()
    if depth[i] >= _NOWHERE:
        occlusion[i] = 1.0
        return
    top = i // width - _SIDE // 2
    left = i % width - _SIDE // 2
    total = float(0)
    weight = float(0)
    for row in range(wp.max(top, 0), wp.min(top + _SIDE, height)):
        for column in range(wp.max(left, 0), wp.min(left + _SIDE, width)):
            j = row * width + column
            if wp.abs(depth[j] - depth[i]) < 0.25 * _REACH:
                total += share[j]
                weight += 1.0
    occlusion[i] = wp.min(total / weight * intensity, 1.0)
