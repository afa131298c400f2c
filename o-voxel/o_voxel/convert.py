"""The conversions between meshes and O-Voxel, under the name of the original package."""

from __future__ import annotations

from .attributes import blender_dump_to_volumetric_attr, textured_mesh_to_volumetric_attr
from .dual_grid import flexible_dual_grid_to_mesh
from .voxelize import mesh_to_flexible_dual_grid

__all__ = [
    "blender_dump_to_volumetric_attr",
    "flexible_dual_grid_to_mesh",
    "mesh_to_flexible_dual_grid",
    "textured_mesh_to_volumetric_attr",
]
