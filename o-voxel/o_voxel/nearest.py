"""The voxel nearest to a point."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_points
from .launch import Ints, MeshId, Vec3s, kernel, launch, shared, wp

_REACH = 2.0  # voxels to look around a point at first


class VoxelTree:
    """The search tree of voxels: build once, query many times.

    coords: (N, 3) integers below 2^23, N > 0.  Raises ValueError naming the argument.
    """

    def __init__(self, coords: Tensor) -> None:
        if coords.ndim != 2 or coords.shape[1] != 3 or not len(coords) or coords.is_floating_point():
            raise ValueError(
                f"coords must be integers of shape (N, 3), N > 0, not {coords.dtype} {tuple(coords.shape)}."
            )
        # Warp does not own this memory: it has to live as long as the tree.
        self._centres = (coords + 0.5).float().contiguous()
        centres = shared(self._centres, wp.vec3)
        self._tree = wp.Bvh(centres, centres)

    def nearest(self, points: Tensor) -> Tensor:
        """(P,) int64 row of the voxel whose centre is nearest to each of ``points`` (P, 3), in units of voxels.

        Of several the first row.  Equal input gives equal bits on every device.
        """
        check_points("points", points)
        points = points.float().contiguous()
        found = torch.empty(len(points), dtype=torch.int32, device=points.device)
        arguments = [
            self._tree.id,
            shared(self._centres, wp.vec3),
            shared(points, wp.vec3),
            _REACH,
            shared(found, wp.int32),
        ]
        launch(_find_nearest, len(points), arguments, points.device)
        return found.long()


@kernel
def _find_nearest(first: int, tree: MeshId, centres: Vec3s, points: Vec3s, reach: float, found: Ints) -> None:
    i = first + wp.tid()
    p = points[i]
    radius = float(reach)
    distance = wp.float64(wp.inf)
    nearest = wp.int32(-1)
    j = wp.int32(0)
    searching = wp.bool(True)
    while searching:
        around = wp.vec3(radius, radius, radius)
        query = wp.bvh_query_aabb(tree, p - around, p + around)
        while wp.bvh_query_next(query, j):
            c = centres[j]
            x = wp.float64(c[0]) - wp.float64(p[0])
            y = wp.float64(c[1]) - wp.float64(p[1])
            z = wp.float64(c[2]) - wp.float64(p[2])
            to_c = x * x + y * y + z * z
            if to_c < distance or (to_c == distance and j < nearest):
                distance = to_c
                nearest = j
        if nearest < 0:
            radius *= 2.0
        elif float(wp.sqrt(distance)) > radius:
            # It was in a corner of the box: something nearer may be just beyond a side.
            radius = float(wp.sqrt(distance)) * 1.0001
        else:
            searching = False
    found[i] = nearest
