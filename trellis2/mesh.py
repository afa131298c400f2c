"""Plain data that the stages hand to each other.

Object frame: right-handed, z up, the object inside [-0.5, 0.5]^3, one unit is one metre in the GLB.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

BASE_COLOR = slice(0, 3)
METALLIC = slice(3, 4)
ROUGHNESS = slice(4, 5)
ALPHA = slice(5, 6)
MATERIAL_CHANNELS = 6


@dataclass(frozen=True)
class Mesh:
    """Triangles. ``vertices`` (V, 3) float32 in the object frame, ``faces`` (F, 3) int32, counter-clockwise."""

    vertices: Tensor
    faces: Tensor


@dataclass(frozen=True)
class MaterialVoxels:
    """PBR attributes on active voxels.

    coords: (N, 3) int32, voxel (i, j, k) spans [i, i+1) x ... in units of ``voxel_size`` from ``origin``.
    attrs: (N, 6) float32: base colour 0:3 (sRGB-encoded), metallic 3, roughness 4, alpha 5; nominally in [0, 1].
    """

    coords: Tensor
    attrs: Tensor
    voxel_size: float
    origin: tuple[float, float, float] = (-0.5, -0.5, -0.5)


@dataclass(frozen=True)
class Asset:
    """What the model generates: a surface and the material around it, both on one device."""

    mesh: Mesh
    material: MaterialVoxels


@dataclass(frozen=True)
class MeshStatistics:
    """What the bake did. ``texture_coverage``: share of the texels inside charts that got a sampled value."""

    faces: int
    vertices: int
    charts: int
    texture_coverage: float


@dataclass(frozen=True)
class TexturedMesh:
    """A UV-mapped mesh with PBR textures, still in the object frame.

    vertices (V, 3) float32; faces (F, 3) int32; normals (V, 3) float32, unit length;
    uvs (V, 2) float32 in [0, 1], origin at the top left of the image (glTF).
    base_color (S, S, 4) uint8: sRGB and linear alpha. metallic_roughness (S, S, 3) uint8: 0, roughness, metallic.
    alpha_mode: "OPAQUE", "MASK" or "BLEND" as in glTF.
    """

    vertices: Tensor
    faces: Tensor
    normals: Tensor
    uvs: Tensor
    base_color: Tensor
    metallic_roughness: Tensor
    alpha_mode: str
    statistics: MeshStatistics

    def cpu(self) -> TexturedMesh:
        """The same in host memory."""
        return TexturedMesh(
            vertices=self.vertices.cpu(),
            faces=self.faces.cpu(),
            normals=self.normals.cpu(),
            uvs=self.uvs.cpu(),
            base_color=self.base_color.cpu(),
            metallic_roughness=self.metallic_roughness.cpu(),
            alpha_mode=self.alpha_mode,
            statistics=self.statistics,
        )
