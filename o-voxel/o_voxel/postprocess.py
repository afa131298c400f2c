"""From a surface and attributes of voxels around it to a textured mesh: clean, simplify, unwrap, bake."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checks import check_mesh
from .closest import Surface
from .fill import fill_gaps
from .groups import group_sums
from .nearest import VoxelTree
from .raster import rasterize_uv
from .remesh import remesh_narrow_band
from .repair import (
    components,
    fill_holes,
    manifold_edges,
    remove_degenerate_faces,
    remove_duplicate_faces,
    remove_small_components,
    repair_non_manifold_edges,
    unify_face_orientations,
)
from .sample import VoxelField
from .simplify import simplify
from .unwrap import unwrap
from .voxelize import bounds, make_grid

_HOLE_PERIMETER = 0.03
_CRUMB_AREA, _CRUMB_SHARE = 1e-5, 0.1
_CREASE_DEGREES = 40.0
_TEXELS_AT_ONCE = 1 << 19
_SHAPE_STEPS = 4
_CLUSTERING = {
    "mesh_cluster_threshold_cone_half_angle_rad": np.radians(90.0),
    "mesh_cluster_refine_iterations": 0,
    "mesh_cluster_global_iterations": 1,
    "mesh_cluster_smooth_strength": 1,
}
_CHANNELS = {"base_color": 3, "metallic": 1, "roughness": 1, "alpha": 1}


class NoSurfaceError(ValueError):
    """There is no triangle with an area, or no voxel."""


@dataclass(frozen=True)
class Volume:
    """Attributes of voxels: coords (N, 3) int, attrs (N, C) float, nominally in [0, 1].

    Voxel (i, j, k) spans [i, i+1) x ... in units of ``voxel_size``, a number or (3,), from ``origin``.
    """

    coords: Tensor
    attrs: Tensor
    voxel_size: float | Tensor
    origin: tuple[float, float, float]


@dataclass(frozen=True)
class Remeshing:
    """How to make the mesh anew, as ``remesh_narrow_band`` says."""

    cell: float
    anchor: Tensor
    band: float
    project: float


@dataclass(frozen=True)
class Baked:
    """A UV-mapped mesh with a texture.

    vertices (V, 3) float32; faces (F, 3) int32; normals (V, 3) float32, unit length; uvs (V, 2) float32 in [0, 1],
    (0, 0) at the outer corner of texel (0, 0). image (S, S, C) uint8: the attributes, 0..255 for 0..1, everywhere;
    sampled (S, S) bool: where they come from the volume, not from the nearest such texel. charts: how many.
    coverage: share of the texels inside charts that are sampled.
    """

    vertices: Tensor
    faces: Tensor
    normals: Tensor
    uvs: Tensor
    image: Tensor
    sampled: Tensor
    charts: int
    coverage: float


def bake_volume(
    vertices: Tensor,
    faces: Tensor,
    volume: Volume,
    *,
    decimation_target: int,
    texture_size: int,
    unit: float = 1.0,
    remeshing: Remeshing | None = None,
    on_step: Callable[[int, int], None] = lambda step, steps: None,
) -> Baked:
    """Make a UV-mapped mesh of at most ``decimation_target`` triangles with a square texture of ``texture_size``.

    vertices: (V, 3) float32. faces: (F, 3) int. Each texel shows the attributes at the point of the full surface that
    is closest to the texel's place on the simplified one: trilinear, or the nearest voxel's where none is near.
    unit: the size of things; holes up to 0.03 of it around are closed, pieces of less than 1e-5 of its square dropped.
    remeshing: make the mesh anew in place of cleaning it. on_step: called with (steps done, steps in all).
    The result lies on the device of ``vertices``; equal input gives equal bits on the same device.
    Raises NoSurfaceError, or ValueError naming the argument.
    """
    for name, value in (("decimation_target", decimation_target), ("texture_size", texture_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if not len(faces) or not len(volume.coords):
        raise NoSurfaceError("faces and coords must not be empty.")
    rows = max(1, _TEXELS_AT_ONCE // texture_size)
    steps = _SHAPE_STEPS + -(-texture_size // rows) + 1
    on_step(0, steps)

    full = fill_holes(vertices, faces, _HOLE_PERIMETER * unit)
    if remeshing is None:
        vertices, faces = _cleaned(*simplify(*full, 3 * decimation_target), unit)
    else:
        vertices, faces = remesh_narrow_band(*full, **vars(remeshing))
    on_step(1, steps)
    vertices, faces = repair_non_manifold_edges(*simplify(vertices, faces, decimation_target))
    if remeshing is None:  # a shell's inner side must keep facing inwards
        vertices, faces = unify_face_orientations(vertices, faces)
    on_step(2, steps)
    flat = unwrap(vertices, faces)
    if not len(flat.faces):
        raise NoSurfaceError("faces must hold a triangle with an area.")
    on_step(3, steps)
    face_id, barycentric = rasterize_uv(flat.uvs, flat.faces, texture_size)
    on_step(_SHAPE_STEPS, steps)

    corners = flat.vertex_map[flat.faces.long()]
    surface, field = Surface(*full), _Field(volume)
    shape = (texture_size, texture_size)
    image = torch.zeros((*shape, volume.attrs.shape[1]), dtype=torch.uint8, device=vertices.device)
    sampled = torch.zeros(shape, dtype=torch.bool, device=vertices.device)
    for number, first in enumerate(range(0, texture_size, rows)):
        block = slice(first, first + rows)
        inside = face_id[block] >= 0
        triangles = vertices[corners[face_id[block][inside].long()]]
        places = (triangles * barycentric[block][inside][:, :, None]).sum(1)
        values = field.at(surface.closest(places).points)
        image[block][inside] = (values.clamp(0, 1) * 255).round().to(torch.uint8)
        sampled[block][inside] = values.isfinite().all(1)
        on_step(_SHAPE_STEPS + number + 1, steps)
    inside = face_id >= 0
    coverage = float((sampled & inside).sum() / inside.sum())
    del face_id, barycentric

    image = fill_gaps(image, sampled)
    source, new_faces, normals = _with_normals(vertices, corners, flat.faces)
    baked = Baked(
        vertices=vertices[flat.vertex_map[source]],
        faces=new_faces,
        normals=normals,
        uvs=flat.uvs[source],
        image=image,
        sampled=sampled,
        charts=flat.charts,
        coverage=coverage,
    )
    on_step(steps, steps)
    return baked


def to_glb(
    vertices: Tensor,
    faces: Tensor,
    attr_volume: Tensor,
    coords: Tensor,
    attr_layout: Mapping[str, slice],
    aabb: Any,
    voxel_size: Any = None,
    grid_size: Any = None,
    decimation_target: int = 1000000,
    texture_size: int = 2048,
    remesh: bool = False,
    remesh_band: float = 1,
    remesh_project: float = 0.9,
    mesh_cluster_threshold_cone_half_angle_rad: float = _CLUSTERING["mesh_cluster_threshold_cone_half_angle_rad"],
    mesh_cluster_refine_iterations: int = 0,
    mesh_cluster_global_iterations: int = 1,
    mesh_cluster_smooth_strength: float = 1,
    verbose: bool = False,
    use_tqdm: bool = False,
) -> Any:
    """Make a textured trimesh.Trimesh, y up, whose ``export`` writes a GLB (o_voxel.postprocess.to_glb of TRELLIS.2).

    vertices: (V, 3) float. faces: (F, 3) int. attr_volume: (N, C) float in [0, 1] of voxels coords (N, 3) int.
    attr_layout: the channels of "base_color" (3), "metallic", "roughness" and "alpha" (1 each). aabb: [[x0, y0, z0],
    [x1, y1, z1]] of the grid; voxel_size (length) or grid_size (voxels), as one number or three; of both, voxel_size
    counts. decimation_target: triangles at most. texture_size: texels along a side.

    Without ``remesh`` holes are closed, repeated and non-manifold parts and crumbs removed, and windings unified; the
    material has two sides. With it the mesh is made anew as ``remesh_narrow_band`` does, on voxels of the longest side
    of ``aabb`` cut into the grid's longest side, remesh_band of which the shell is away before its vertices move the
    part remesh_project back to the surface; the material has one side. Holes up to 0.03 of that longest side around
    are closed, either way.
    The four mesh_cluster arguments steer charts of the original's unwrapping. Charts here are those of ``unwrap``,
    whose normals lie within 40 degrees (70 where a crumb joins) of their plane's; a value other than its default has
    no effect, and warns. verbose: write sizes and seconds to stdout. use_tqdm: show progress, by tqdm.

    Works on the device of ``vertices``. alphaMode is OPAQUE; alpha is in the base colour's texture all the same.
    Raises ValueError naming the argument, ImportError where trimesh, pillow or tqdm is missing.
    """
    try:
        import trimesh
        from PIL import Image
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("to_glb needs trimesh, pillow and tqdm: pip install 'o-voxel[mesh]'") from error
    start = time.perf_counter()
    given = (
        mesh_cluster_threshold_cone_half_angle_rad,
        mesh_cluster_refine_iterations,
        mesh_cluster_global_iterations,
        mesh_cluster_smooth_strength,
    )
    for (name, usual), value in zip(_CLUSTERING.items(), given, strict=True):
        if value != usual:
            warnings.warn(f"{name}={value} has no effect here: charts are cut by o_voxel.unwrap.", stacklevel=2)
    device = vertices.device
    check_mesh(vertices, faces)
    _check_volume(attr_volume, coords, attr_layout)
    if aabb is None:
        raise ValueError("aabb must be given.")
    grid = make_grid(
        bounds(torch.zeros((1, 3, 3), device=device)), voxel_size, grid_size if voxel_size is None else None, aabb
    )
    if bool(((coords < 0) | (coords >= torch.tensor(grid.shape, device=coords.device))).any()):
        raise ValueError(f"coords must lie in the grid of {' x '.join(map(str, grid.shape))} voxels.")
    unit = float((grid.box[1] - grid.box[0]).max())
    x, y, z = grid.box[0].tolist()
    channels = torch.cat([attr_volume[:, attr_layout[name]] for name in _CHANNELS], dim=1)
    volume = Volume(coords.to(device), channels.to(device), grid.size, (x, y, z))
    remeshing = None
    if remesh:
        cell = unit / max(grid.shape)
        anchor = grid.box.mean(0) - unit / 2
        remeshing = Remeshing(cell, anchor, float(remesh_band), float(remesh_project))

    if verbose:
        sys.stdout.write(f"to_glb: {len(vertices)} vertices, {len(faces)} faces, {len(coords)} voxels\n")
    with tqdm(desc="to_glb", disable=not use_tqdm) as bar:

        def on_step(step: int, steps: int) -> None:
            bar.total = steps
            bar.update(step - bar.n)

        baked = bake_volume(
            vertices.float(),
            faces.int(),
            volume,
            decimation_target=decimation_target,
            texture_size=texture_size,
            unit=unit,
            remeshing=remeshing,
            on_step=on_step,
        )
    if verbose:
        sys.stdout.write(
            f"to_glb: {len(baked.vertices)} vertices, {len(baked.faces)} faces, {baked.charts} charts "
            f"in {time.perf_counter() - start:.1f} s\n"
        )

    texture = baked.image.cpu().numpy()
    metallic, roughness = texture[..., 3], texture[..., 4]
    material = trimesh.visual.material.PBRMaterial(
        baseColorTexture=Image.fromarray(np.ascontiguousarray(texture[..., [0, 1, 2, 5]])),
        baseColorFactor=np.full(4, 255, dtype=np.uint8),
        metallicRoughnessTexture=Image.fromarray(np.stack([np.zeros_like(metallic), roughness, metallic], axis=-1)),
        metallicFactor=1.0,
        roughnessFactor=1.0,
        alphaMode="OPAQUE",
        doubleSided=not remesh,
    )
    # trimesh counts v from the bottom of the picture.
    uvs = baked.uvs.cpu().numpy() * np.array([1, -1], np.float32) + np.array([0, 1], np.float32)
    return trimesh.Trimesh(
        vertices=_y_up(baked.vertices),
        faces=baked.faces.cpu().numpy(),
        vertex_normals=_y_up(baked.normals),
        process=False,
        visual=trimesh.visual.TextureVisuals(uv=uvs, material=material),
    )


def _check_volume(attr_volume: Tensor, coords: Tensor, attr_layout: Mapping[str, slice]) -> None:
    if attr_volume.ndim != 2 or not attr_volume.is_floating_point():
        raise ValueError(
            f"attr_volume must be floats of shape (N, C), not {attr_volume.dtype} {tuple(attr_volume.shape)}."
        )
    if coords.shape != (len(attr_volume), 3) or coords.is_floating_point():
        raise ValueError(
            f"coords must be integers of shape ({len(attr_volume)}, 3), not {coords.dtype} {tuple(coords.shape)}."
        )
    if not bool(attr_volume.isfinite().all()):
        raise ValueError("attr_volume must be finite.")
    for name, width in _CHANNELS.items():
        if name not in attr_layout or attr_volume[:1, attr_layout[name]].shape[-1] != width:
            raise ValueError(f"attr_layout must give {width} of attr_volume's channels as {name!r}.")


def _y_up(vectors: Tensor) -> Any:
    """(N, 3) of a frame with z up in glTF's: (x, y, z) -> (x, z, -y)."""
    x, y, z = vectors.unbind(1)
    return torch.stack([x, z, 0.0 - y], 1).cpu().numpy()


def _cleaned(vertices: Tensor, faces: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """Without degenerate or double faces, non-manifold edges, crumbs and small holes."""
    mesh = remove_duplicate_faces(*remove_degenerate_faces(vertices, faces))
    mesh = repair_non_manifold_edges(*mesh)
    without_crumbs = remove_small_components(*mesh, _CRUMB_AREA * unit**2)
    # Where crumbs are a good part of the surface, they are no crumbs.
    crumbs = 1 - _area(*without_crumbs) / max(_area(*mesh), 1e-300)
    return fill_holes(*(without_crumbs if crumbs < _CRUMB_SHARE else mesh), _HOLE_PERIMETER * unit)


def _area(vertices: Tensor, faces: Tensor) -> float:
    a, b, c = vertices.double()[faces.long()].unbind(1)
    return float(torch.linalg.cross(b - a, c - a).norm(dim=1).sum()) / 2


class _Field:
    """The attributes at points: trilinear, or the nearest voxel's where none is near."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._origin = torch.tensor(volume.origin, device=volume.coords.device)
        # The last channel tells where there was anything to sample.
        attrs = volume.attrs.float()
        self._feats = torch.cat([attrs, torch.ones_like(attrs[:, :1])], dim=1)
        shape = (1, self._feats.shape[1], *(int(v) + 1 for v in volume.coords.amax(0)))
        self._field = VoxelField(self._feats, torch.nn.functional.pad(volume.coords.int(), (1, 0)), shape)
        self._tree: VoxelTree | None = None

    def at(self, points: Tensor) -> Tensor:
        """(P, C) attributes at points (P, 3)."""
        grid = (points - self._origin) / self._volume.voxel_size
        values = self._field.sample(grid[None])[0]
        lost = values[:, -1] < 0.5
        if bool(lost.any()):
            if self._tree is None:
                self._tree = VoxelTree(self._volume.coords)
            values[lost] = self._feats[self._tree.nearest(grid[lost])]
        return values[:, :-1]


def _with_normals(vertices: Tensor, corners: Tensor, faces: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Smooth normals that break at creases.

    corners (F, 3): the vertex of each corner, the same on both sides of a UV seam; faces (F, 3): its UV vertex.
    Returns (source (V2,) int64: the UV vertex that each new vertex copies, faces (F, 3) int32, normals (V2, 3)).
    """
    points = vertices.double()[corners]
    ahead = torch.nn.functional.normalize(points.roll(-1, 1) - points, dim=2)
    back = torch.nn.functional.normalize(points.roll(1, 1) - points, dim=2)
    unit = torch.nn.functional.normalize(
        torch.linalg.cross(points[:, 1] - points[:, 0], points[:, 2] - points[:, 0]), dim=1, eps=1e-300
    )
    angle = torch.acos((ahead * back).sum(2).clamp(-1, 1))

    one, other = manifold_edges(corners, len(vertices)).unbind(1)
    alike = (unit[one // 3] * unit[other // 3]).sum(1) > torch.cos(torch.deg2rad(torch.tensor(_CREASE_DEGREES)))
    flat = corners.reshape(-1)
    # Neighbours wound alike run along their edge in opposite directions.
    alike &= flat[one] != flat[other]
    one, other = one[alike], other[alike]
    one_end, other_end = one - one % 3 + (one + 1) % 3, other - other % 3 + (other + 1) % 3
    pairs = torch.cat([torch.stack([one, other_end], 1), torch.stack([one_end, other], 1)])
    count, group = components(pairs, len(flat))
    total = group_sums((unit[:, None] * angle[:, :, None]).reshape(-1, 3), group, count)
    normals = torch.nn.functional.normalize(total, dim=1)
    normals[normals.norm(dim=1) < 0.5] = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64, device=vertices.device)

    keys, number = torch.unique(faces.reshape(-1).long() * count + group, return_inverse=True)
    return keys // count, number.view(-1, 3).int(), normals[keys % count].float()
