"""Materials of textured meshes as attributes of voxels.

The voxels are those of ``mesh_to_flexible_dual_grid``.  Each takes the mean over the triangles that cross its edges, of
what their materials are at the point of the triangle's plane nearest to the voxel's centre.
"""

from __future__ import annotations

import io
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._native import Native, library
from .attributes_warp import voxel_attributes
from .checks import check_faces, check_points
from .voxelize import Grid, around, bounds, check_triangles, crossings, make_grid, segment_sum, unit_normals

REPEAT, CLAMP, MIRROR = 0, 1, 2
OPAQUE, MASK, BLEND = 0, 1, 2
WIDTHS = {"base_color": 3, "metallic": 1, "roughness": 1, "emissive": 3, "alpha": 1, "normal": 3}
_BLENDER_WRAP = {"REPEAT": REPEAT, "EXTEND": CLAMP, "CLIP": CLAMP, "MIRROR": MIRROR}
_BLENDER_LINEAR = {"Linear": True, "Closest": False, "Cubic": True, "Smart": True}
_LANCZOS = 1  # PIL.Image.Resampling
_CHUNK = 1 << 17  # triangles at a time
_LEAST_AREA = 1e-6  # of a triangle's texture coordinates, doubled
_LEAST_WEIGHT = 1e-3
_CUTOFF_SLACK = 1e-6  # a texel as great as the cutoff stays so, whatever the rounding of the filter


@dataclass(frozen=True)
class Texture:
    """texels: (T, C) uint8, the rows of a square image, then those of its halvings. size: its side, a power of two."""

    texels: Tensor
    size: int
    linear: bool = True
    wrap: int = REPEAT


@dataclass(frozen=True)
class Material:
    """glTF's metallic-roughness material; each texture is multiplied by its factor."""

    base_color: tuple[float, float, float] = (1.0, 1.0, 1.0)
    metallic: float = 1.0
    roughness: float = 1.0
    emissive: tuple[float, float, float] = (0.0, 0.0, 0.0)
    alpha: float = 1.0
    alpha_mode: int = OPAQUE
    alpha_cutoff: float = 0.5
    base_color_texture: Texture | None = None
    metallic_texture: Texture | None = None
    roughness_texture: Texture | None = None
    emissive_texture: Texture | None = None
    alpha_texture: Texture | None = None
    normal_texture: Texture | None = None


@dataclass(frozen=True)
class Surface:
    """Triangles by their corners: places, normals (F, 3, 3), uvs (F, 3, 2; v up), colors (F, 3, 4), material (F,)."""

    corners: Tensor
    normals: Tensor
    uvs: Tensor
    colors: Tensor
    material: Tensor


def textured_mesh_to_volumetric_attr(
    mesh: Any,
    voxel_size: Any = None,
    grid_size: Any = None,
    aabb: Any = None,
    mip_level_offset: float = 0.0,
    verbose: bool = False,
    timing: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Turn a textured mesh into voxel attributes (o_voxel.convert.textured_mesh_to_volumetric_attr of TRELLIS.2).

    mesh: path of a .glb or of another file that trimesh reads, trimesh.Scene, or trimesh.Trimesh. Vertex colours
    multiply the base colour. Textures are repeated and filtered linearly, between sizes too; one that is not square
    with a power of two as its side is resized to that. voxel_size, grid_size, aabb: as in mesh_to_flexible_dual_grid.
    mip_level_offset: added to the level of detail. verbose, timing: write the grid and the seconds taken to stdout.
    device: where the work is done, a CPU or a GPU, and where the results are.

    Returns (coords (N, 3) int32 in ascending order, attributes: "base_color" (N, 3), "metallic" (N, 1), "roughness"
    (N, 1), "emissive" (N, 3), "alpha" (N, 1), "normal" (N, 3), all uint8; 0..255 is 0..1, for normals -1..1).
    Raises ValueError naming the argument, ImportError where trimesh is missing.
    """
    try:
        import trimesh
    except ImportError as error:
        raise ImportError("textured_mesh_to_volumetric_attr needs trimesh: pip install trimesh pillow") from error
    start = time.perf_counter()
    place = _place(device)
    if isinstance(mesh, (str, Path)):
        path = mesh
        try:
            mesh = trimesh.load(path)
        except Exception as error:  # readers fail in many ways, and all of them are the file's fault
            raise ValueError(f"mesh {str(path)!r} cannot be read: {error}") from error
    parts = mesh.dump() if isinstance(mesh, trimesh.Scene) else [mesh]
    if not parts or not all(isinstance(part, trimesh.Trimesh) and len(part.faces) for part in parts):
        raise ValueError("mesh must be triangles, a scene of them, or the path of a file with nothing else.")
    surfaces, materials = [], []
    for index, part in enumerate(parts):
        surfaces.append(_trimesh_surface(part, index, place))
        materials.append(_trimesh_material(part, place))
    return _voxelise(
        surfaces, materials, voxel_size, grid_size, aabb, mip_level_offset, start if timing else None, verbose
    )


def blender_dump_to_volumetric_attr(
    dump: dict[str, Any],
    voxel_size: Any = None,
    grid_size: Any = None,
    aabb: Any = None,
    mip_level_offset: float = 0.0,
    verbose: bool = False,
    timing: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Turn a scene dumped from Blender into voxel attributes (o_voxel.convert.blender_dump_to_volumetric_attr).

    dump["objects"]: dicts of arrays vertices (V, 3), faces (F, 3), normals (F, 3, 3), uvs (F, 3, 2) or None, mat_ids
    (F,). dump["materials"]: dicts of baseColorFactor, metallicFactor, roughnessFactor, alphaFactor, alphaMode
    ("OPAQUE", "MASK", "BLEND"), alphaCutoff, emissiveFactor (may be missing), and for each factor, and for normal, a
    texture (baseColorTexture, ...) or None: {"image": bytes of a PNG, "interpolation": "Linear", "Closest", "Cubic" or
    "Smart", "extension": "REPEAT", "EXTEND", "CLIP" or "MIRROR"}.
    """
    start = time.perf_counter()
    place = _place(device)
    materials = [_blender_material(material, place) for material in dump["materials"]]
    surfaces = [_blender_surface(item, place) for item in dump["objects"]]
    if not surfaces:
        raise ValueError("dump['objects'] must hold at least one object.")
    return _voxelise(
        surfaces, materials, voxel_size, grid_size, aabb, mip_level_offset, start if timing else None, verbose
    )


def make_texture(image: Tensor, linear: bool = True, wrap: int = REPEAT) -> Texture:
    """The texture of an (S, S, C) uint8 image; the halvings are means of four, rounded down."""
    size = len(image)
    levels = [image]
    while linear and len(levels[-1]) > 1:
        rows = levels[-1].short()
        rows = rows[::2] + rows[1::2]
        levels.append((rows[:, ::2] + rows[:, 1::2] >> 2).byte())
    return Texture(torch.cat([level.reshape(-1, image.shape[2]) for level in levels]), size, linear, wrap)


def attributes_reference(
    surface: Surface, materials: list[Material], grid: Grid, mip_level_offset: float
) -> tuple[Tensor, Tensor]:
    """(coords (N, 3) int32, (N, 12) uint8 attributes in the order of WIDTHS), in torch."""
    parts: list[tuple[Tensor, Tensor]] = []
    for index, material in enumerate(materials):
        for chosen in torch.nonzero(surface.material == index)[:, 0].split(_CHUNK):
            corners = surface.corners[chosen]
            triangle, keys = _pairs(corners, grid)
            weight, values = _evaluate(surface, chosen, triangle, grid.voxels(keys), material, grid, mip_level_offset)
            parts.append(_total(keys, torch.cat([values * weight[:, None], weight[:, None]], dim=1)))
    keys, sums = _total(torch.cat([keys for keys, _ in parts]), torch.cat([sums for _, sums in parts]))
    values = sums[:, :-1] / sums[:, -1:]
    values[:, 9:] = values[:, 9:] * 0.5 + 0.5
    # Whole numbers stay what they are, whatever the rounding of the mean.
    return grid.voxels(keys).int(), (values * 255 + 1e-3).clamp(0, 255).byte()


def attributes_compiled(
    native: Native, surface: Surface, materials: list[Material], grid: Grid, mip_level_offset: float
) -> tuple[Tensor, Tensor]:
    """attributes_reference by the compiled op, on a CPU."""
    return native.attributes(_parts(surface), *_packed(materials), grid.size, grid.shape, mip_level_offset)


def attributes_warp(
    surface: Surface, materials: list[Material], grid: Grid, mip_level_offset: float
) -> tuple[Tensor, Tensor]:
    """attributes_reference by a Warp kernel, on any device."""
    triangles, keys = _pairs(surface.corners, grid)
    keys, counts = torch.unique_consecutive(keys, return_counts=True)
    values = voxel_attributes(
        (keys, counts.cumsum(0), triangles.int()),
        _parts(surface),
        *_packed(materials),
        grid.size,
        grid.shape,
        mip_level_offset,
    )
    return grid.voxels(keys).int(), values


def _parts(surface: Surface) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return surface.corners, surface.normals, surface.uvs, surface.colors, surface.material


def _packed(materials: list[Material]) -> tuple[Tensor, list[Tensor], Tensor]:
    """(factors (M, 11) float64, texels of the textures (6 M), their (channels, size, linear, wrap) (6 M, 4))."""
    factors, textures, layout = [], [], []
    for m in materials:
        cutoff = m.alpha_cutoff - _CUTOFF_SLACK
        factors.append([*m.base_color, m.metallic, m.roughness, *m.emissive, m.alpha, float(m.alpha_mode), cutoff])
        for texture in (
            m.base_color_texture,
            m.metallic_texture,
            m.roughness_texture,
            m.emissive_texture,
            m.alpha_texture,
            m.normal_texture,
        ):
            textures.append(torch.empty((0, 1), dtype=torch.uint8) if texture is None else texture.texels)
            if texture is None:
                layout.append([0, 0, 0, 0])
            else:
                layout.append([texture.texels.shape[1], texture.size, int(texture.linear), texture.wrap])
    return torch.tensor(factors, dtype=torch.float64), textures, torch.tensor(layout)


def _place(device: torch.device | str) -> torch.device:
    """Raises ValueError where it is no CPU or GPU of this machine."""
    try:
        place = torch.device(device)
    except RuntimeError:
        place = torch.device("meta")
    if place.type == "cpu" or (place.type == "cuda" and (place.index or 0) < torch.cuda.device_count()):
        return place
    raise ValueError(f"device={str(device)!r} must be 'cpu' or a GPU of this machine, such as 'cuda'.")


def _voxelise(
    surfaces: list[Surface],
    materials: list[Material],
    voxel_size: Any,
    grid_size: Any,
    aabb: Any,
    mip_level_offset: float,
    start: float | None,
    verbose: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    names = ("corners", "normals", "uvs", "colors", "material")
    whole = surfaces[0]
    if len(surfaces) > 1:
        whole = Surface(*(torch.cat([getattr(surface, name) for surface in surfaces]) for name in names))
    if not math.isfinite(mip_level_offset):
        raise ValueError(f"mip_level_offset={mip_level_offset!r} must be finite.")
    if bool((whole.material < 0).any()) or bool((whole.material >= len(materials)).any()):
        raise ValueError(f"dump['objects'] must hold mat_ids from 0 to {len(materials) - 1}.")
    extremes = bounds(whole.corners)
    grid = make_grid(extremes, voxel_size, grid_size, aabb)
    if verbose:
        sys.stdout.write(f"grid {grid.shape}, voxel {grid.size.tolist()}, aabb {grid.box.tolist()}\n")
    whole = Surface(whole.corners - grid.box[0], whole.normals, whole.uvs, whole.colors, whole.material)
    check_triangles(whole.corners, extremes, grid)
    native = None if whole.corners.is_cuda else library()
    if native is None:
        coords, values = attributes_warp(whole, materials, grid, mip_level_offset)
    else:
        coords, values = attributes_compiled(native, whole, materials, grid, mip_level_offset)
    attributes = dict(zip(WIDTHS, values.split(list(WIDTHS.values()), dim=1), strict=True))
    if start is not None:
        if coords.is_cuda:
            torch.cuda.synchronize(coords.device)
        sys.stdout.write(f"voxel attributes took {time.perf_counter() - start:.3f} s\n")
    return coords, {name: value.contiguous() for name, value in attributes.items()}


def _pairs(corners: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """(triangle, key of a voxel with an edge that it crosses), each pair once, by voxel and triangle."""
    triangles, keys = [], []
    for axis in range(3):
        triangle, voxel, _ = crossings(corners, axis, grid)
        keys.append(grid.keys(voxel[:, None] + around(axis, corners.device)).flatten())
        triangles.append(triangle.repeat_interleave(4))
    # The voxels' places in their order instead of their keys, which would leave no room for the triangle.
    unique, places = torch.unique(torch.cat(keys), return_inverse=True)
    pairs = torch.unique(places.mul_(len(corners)).add_(torch.cat(triangles)))
    return pairs % len(corners), unique[pairs // len(corners)]


def _evaluate(
    surface: Surface, chosen: Tensor, triangle: Tensor, voxels: Tensor, material: Material, grid: Grid, offset: float
) -> tuple[Tensor, Tensor]:
    """(weight (P,), attributes (P, 12)) of the triangles ``chosen[triangle]`` at the centres of voxels."""
    corners, uvs = surface.corners[chosen], surface.uvs[chosen]
    face_normals = unit_normals(corners).double()
    tangent, bitangent, footprint = _tangents(corners, uvs, grid)
    a, b, c = corners[triangle].double().unbind(1)
    centres = (voxels + 0.5) * grid.size.double()
    height = ((centres - a) * face_normals[triangle]).sum(dim=1)
    ab, ac, ap = b - a, c - a, centres - a
    d00, d01, d11 = (ab * ab).sum(1), (ab * ac).sum(1), (ac * ac).sum(1)
    d20, d21 = (ap * ab).sum(1), (ap * ac).sum(1)
    area = d00 * d11 - d01 * d01
    flat = area <= 0
    area = torch.where(flat, 1, area)
    at_b = torch.where(flat, 0, (d11 * d20 - d01 * d21) / area)
    at_c = torch.where(flat, 0, (d00 * d21 - d01 * d20) / area)
    shares = torch.stack([1 - at_b - at_c, at_b, at_c], dim=1)[:, :, None]
    row = chosen[triangle]
    uv = (surface.uvs[row] * shares).sum(dim=1)
    color = (surface.colors[row] * shares).sum(dim=1).clamp(0, 1)
    normal = (surface.normals[row] * shares).sum(dim=1)

    def sample(texture: Texture | None, width: int) -> Tensor:
        if texture is None:
            return torch.ones((len(uv), width), dtype=torch.float64)
        return _sample(texture, uv, footprint[triangle], offset)

    base = sample(material.base_color_texture, 3) * torch.tensor(material.base_color) * color[:, :3]
    metallic = sample(material.metallic_texture, 1) * material.metallic
    roughness = sample(material.roughness_texture, 1) * material.roughness
    emissive = sample(material.emissive_texture, 3) * torch.tensor(material.emissive)
    alpha = torch.ones_like(metallic)
    if material.alpha_mode != OPAQUE:
        alpha = sample(material.alpha_texture, 1) * material.alpha * color[:, 3:]
        if material.alpha_mode == MASK:
            alpha = (alpha >= material.alpha_cutoff - _CUTOFF_SLACK).double()
    if material.normal_texture is not None:
        x, y, z = (sample(material.normal_texture, 3) * 2 - 1)[:, :, None].unbind(1)
        normal = x * tangent[triangle] + y * bitangent[triangle] + z * normal
        normal = torch.nn.functional.normalize(normal, dim=1)
    weight = (1 - height).clamp_min(_LEAST_WEIGHT)
    return weight, torch.cat([base, metallic, roughness, emissive, alpha, normal], dim=1)


def _tangents(corners: Tensor, uvs: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """(tangent (F, 3), bitangent (F, 3), texture coordinates per voxel (F,)) of triangles."""
    e1, e2 = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    d1, d2 = uvs[:, 1] - uvs[:, 0], uvs[:, 2] - uvs[:, 0]
    area = d1[:, 0] * d2[:, 1] - d1[:, 1] * d2[:, 0]
    tangent = d2[:, 1:] * e1 - d1[:, 1:] * e2
    bitangent = d1[:, :1] * e2 - d2[:, :1] * e1
    tangent_length, bitangent_length = tangent.norm(dim=1), bitangent.norm(dim=1)
    stretch = (tangent_length / area * (bitangent_length / area)).sqrt()
    small = area.abs() < _LEAST_AREA
    axes = torch.eye(3, dtype=corners.dtype)
    tangent = torch.where(small[:, None], axes[0], tangent / tangent_length[:, None])
    bitangent = torch.where(small[:, None], axes[1], bitangent / bitangent_length[:, None])
    footprint = torch.where(small, 0, grid.size.max() / stretch)
    return tangent.double(), bitangent.double(), footprint


def _sample(texture: Texture, uv: Tensor, footprint: Tensor, offset: float) -> Tensor:
    """(P, C) in 0..1 at (P, 2) coordinates; footprint: (P,) how much of the texture's side one sample covers."""
    if not texture.linear:
        place = [(uv[:, 0] * texture.size).floor(), ((1 - uv[:, 1]) * texture.size).floor()]
        x, y = (_wrap(p.long(), torch.tensor(texture.size), texture.wrap) for p in place)
        return texture.texels[y * texture.size + x].double() / 255
    last = texture.size.bit_length() - 1
    level = torch.log2(footprint * texture.size) + offset
    level = torch.where(level.isfinite(), level, 0).clamp(0, last)
    lower = level.floor().long()
    share = (level - lower)[:, None]
    return (1 - share) * _linear(texture, uv, lower) + share * _linear(texture, uv, (lower + 1).clamp_max(last))


def _linear(texture: Texture, uv: Tensor, level: Tensor) -> Tensor:
    size = texture.size >> level
    # All levels before it, of 4 ** -n times the texels each.
    begin = (texture.size**2 - size**2) * 4 // 3
    x, y = uv[:, 0] * size - 0.5, (1 - uv[:, 1]) * size - 0.5
    x0, y0 = x.floor(), y.floor()
    right, down = (x - x0)[:, None], (y - y0)[:, None]
    columns = [_wrap(x0.long() + i, size, texture.wrap) for i in (0, 1)]
    rows = [_wrap(y0.long() + i, size, texture.wrap) * size + begin for i in (0, 1)]
    top, bottom = (
        (1 - right) * texture.texels[row + columns[0]] + right * texture.texels[row + columns[1]] for row in rows
    )
    return ((1 - down) * top + down * bottom) / 255


def _wrap(place: Tensor, size: Tensor, wrap: int) -> Tensor:
    if wrap == CLAMP:
        return torch.minimum(place.clamp_min(0), size - 1)
    if wrap == MIRROR:
        place = place % (2 * size)
        return torch.minimum(place, 2 * size - 1 - place)
    return place % size


def _total(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(ascending keys, sums of their rows)."""
    keys, order = torch.sort(keys, stable=True)
    keys, counts = torch.unique_consecutive(keys, return_counts=True)
    return keys, segment_sum(values[order], counts)


def _trimesh_surface(part: Any, index: int, device: torch.device) -> Surface:
    def on_device(values: Any, dtype: Any = np.float32) -> Tensor:
        return torch.from_numpy(np.array(values, dtype=dtype)).to(device)

    faces = on_device(part.faces, np.int64)
    check_faces(faces, len(part.vertices))
    uv = getattr(part.visual, "uv", None)
    colors = part.vertex_attributes.get("color")
    if part.visual.kind == "vertex":
        colors = part.visual.vertex_colors
    elif part.visual.kind == "face":
        colors = np.repeat(part.visual.face_colors[:, None], 3, axis=1)
    for name, values in (("texture coordinates", uv), ("colors", colors)):
        if values is not None and values.ndim == 2 and len(values) != len(part.vertices):
            raise ValueError(f"mesh {name} must be one per vertex ({len(part.vertices)}), not {len(values)}.")
    corner_colors = torch.ones((len(faces), 3, 4), device=device)
    if colors is not None:
        scale = np.iinfo(colors.dtype).max if np.issubdtype(colors.dtype, np.integer) else 1
        each = on_device(np.asarray(colors, dtype=np.float64) / scale)
        corner_colors[:, :, : each.shape[-1]] = each if each.ndim == 3 else each[faces]
    vertices, normals = on_device(part.vertices), on_device(part.vertex_normals)
    uvs = torch.zeros((len(vertices), 2), device=device) if uv is None else on_device(uv)
    _check_finite(vertices, normals, uvs)
    material = torch.full((len(faces),), index, device=device)
    return Surface(vertices[faces], normals[faces], uvs[faces], corner_colors, material)


def _check_finite(vertices: Tensor, normals: Tensor, uvs: Tensor) -> None:
    check_points("mesh vertices", vertices)
    check_points("mesh normals", normals)
    check_points("mesh texture coordinates", uvs, 2)


def _trimesh_material(part: Any, device: torch.device) -> Material:
    material = getattr(part.visual, "material", None)
    if material is None:
        return Material()
    if hasattr(material, "to_pbr"):
        material = material.to_pbr()
    images: dict[int, Tensor] = {}

    def texture(image: Any, channels: slice) -> Texture | None:
        if image is None:
            return None
        if id(image) not in images:
            pixels = _pixels(image, "RGB" if image.mode == "RGB" else "RGBA").to(device)
            images[id(image)] = pixels if pixels.shape[2] == 4 else torch.nn.functional.pad(pixels, (0, 1), value=255)
        return make_texture(images[id(image)][:, :, channels])

    factor = material.baseColorFactor
    factor = np.ones(4) if factor is None else np.append(np.asarray(factor, dtype=np.float64), 255)[:4] / 255
    mode = {"MASK": MASK, "BLEND": BLEND}.get(material.alphaMode, OPAQUE)
    red, green, blue, alpha = (float(value) for value in factor)
    return Material(
        base_color=(red, green, blue),
        metallic=_number(material.metallicFactor, 1.0),
        roughness=_number(material.roughnessFactor, 1.0),
        emissive=_three(material.emissiveFactor, 0.0),
        alpha=alpha,
        alpha_mode=mode,
        alpha_cutoff=_number(material.alphaCutoff, 0.5),
        base_color_texture=texture(material.baseColorTexture, slice(0, 3)),
        metallic_texture=texture(material.metallicRoughnessTexture, slice(2, 3)),
        roughness_texture=texture(material.metallicRoughnessTexture, slice(1, 2)),
        emissive_texture=texture(material.emissiveTexture, slice(0, 3)),
        alpha_texture=None if mode == OPAQUE else texture(material.baseColorTexture, slice(3, 4)),
        normal_texture=texture(material.normalTexture, slice(0, 3)),
    )


def _blender_surface(item: dict[str, Any], device: torch.device) -> Surface:
    vertices, faces = np.asarray(item["vertices"]), np.asarray(item["faces"])
    if not len(faces) or faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(f"dump['objects'] must hold faces of indices from 0 to {len(vertices) - 1}.")
    uvs = torch.zeros((len(faces), 3, 2))
    if item["uvs"] is not None:
        uvs = torch.tensor(np.asarray(item["uvs"]), dtype=torch.float32).reshape(-1, 3, 2).clone()
    uvs[:, :, 1] = 1 - uvs[:, :, 1]
    corners = torch.tensor(vertices[faces], dtype=torch.float32).reshape(-1, 3, 3)
    normals = torch.tensor(np.asarray(item["normals"]), dtype=torch.float32).reshape(-1, 3, 3)
    _check_finite(corners.reshape(-1, 3), normals.reshape(-1, 3), uvs.reshape(-1, 2))
    return Surface(
        corners.to(device),
        normals.to(device),
        uvs.to(device),
        torch.ones((len(faces), 3, 4), device=device),
        torch.tensor(np.asarray(item["mat_ids"]), dtype=torch.int64).reshape(-1).to(device),
    )


def _blender_material(material: dict[str, Any], device: torch.device) -> Material:
    def texture(name: str, mode: str) -> Texture | None:
        pack = material.get(name)
        if pack is None:
            return None
        try:
            from PIL import Image
        except ImportError as error:
            raise ImportError("blender_dump_to_volumetric_attr needs Pillow: pip install pillow") from error
        wrap, linear = _BLENDER_WRAP.get(pack["extension"]), _BLENDER_LINEAR.get(pack["interpolation"])
        if wrap is None or linear is None:
            raise ValueError(
                f"{name} of dump['materials'] must have an extension of {', '.join(_BLENDER_WRAP)} and an "
                f"interpolation of {', '.join(_BLENDER_LINEAR)}."
            )
        with Image.open(io.BytesIO(pack["image"])) as image:
            return make_texture(_pixels(image, mode).to(device), linear, wrap)

    modes = {"OPAQUE": OPAQUE, "MASK": MASK, "BLEND": BLEND}
    if material["alphaMode"] not in modes:
        raise ValueError(f"dump['materials'] must have an alphaMode of {', '.join(modes)}.")
    return Material(
        base_color=_three(material["baseColorFactor"], 1.0),
        metallic=float(material["metallicFactor"]),
        roughness=float(material["roughnessFactor"]),
        emissive=_three(material.get("emissiveFactor"), 0.0),
        alpha=float(material["alphaFactor"]),
        alpha_mode=modes[material["alphaMode"]],
        alpha_cutoff=float(material["alphaCutoff"]),
        base_color_texture=texture("baseColorTexture", "RGB"),
        metallic_texture=texture("metallicTexture", "L"),
        roughness_texture=texture("roughnessTexture", "L"),
        emissive_texture=texture("emissiveTexture", "RGB"),
        alpha_texture=texture("alphaTexture", "L"),
        normal_texture=texture("normalTexture", "RGB"),
    )


def _pixels(image: Any, mode: str) -> Tensor:
    """(S, S, C) uint8 of a PIL image, S a power of two: the one nearest to its longer side, of two the greater."""
    image = image.convert(mode)
    longer = max(image.size)
    size = 1 << (longer.bit_length() - 1)
    if longer - size >= 2 * size - longer:
        size *= 2
    if image.size != (size, size):
        image = image.resize((size, size), _LANCZOS)
    pixels = torch.from_numpy(np.array(image))
    return pixels.reshape(size, size, -1)


def _number(value: Any, default: float) -> float:
    return default if value is None else float(value)


def _three(value: Any, default: float) -> tuple[float, float, float]:
    if value is None:
        return (default, default, default)
    red, green, blue = (float(number) for number in value[:3])
    return red, green, blue
