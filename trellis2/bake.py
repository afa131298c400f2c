"""From a generated asset to a textured mesh: clean, simplify, unwrap, bake."""

from __future__ import annotations

import torch
from o_voxel.closest import Surface
from o_voxel.fill import fill_gaps
from o_voxel.groups import group_sums
from o_voxel.lookup import neighbor_map
from o_voxel.raster import rasterize_uv
from o_voxel.repair import (
    components,
    fill_holes,
    manifold_edges,
    remove_degenerate_faces,
    remove_duplicate_faces,
    remove_small_components,
    repair_non_manifold_edges,
    unify_face_orientations,
)
from o_voxel.sample import VoxelField
from o_voxel.simplify import simplify
from o_voxel.unwrap import unwrap
from scipy.spatial import cKDTree
from torch import Tensor

from .errors import InputError
from .mesh import (
    ALPHA,
    BASE_COLOR,
    MATERIAL_CHANNELS,
    METALLIC,
    ROUGHNESS,
    Asset,
    MaterialVoxels,
    MeshStatistics,
    TexturedMesh,
)
from .options import ALPHA_MODES
from .progress import OnStep, ignore_step

_EMPTY = "The model produced an empty surface: try another seed or picture."
_HOLE_PERIMETER = 0.03
_CRUMB_AREA, _CRUMB_SHARE = 1e-5, 0.1
_CREASE_DEGREES = 40.0
_TEXELS_AT_ONCE = 1 << 19
_OPAQUE = 0.98  # alpha from which a texel counts as solid
_SHAPE_STEPS = 4


def bake(
    asset: Asset,
    *,
    decimation_target: int,
    texture_size: int,
    alpha_mode: str = "auto",
    on_step: OnStep = ignore_step,
) -> TexturedMesh:
    """Make a UV-mapped mesh of at most ``decimation_target`` triangles with square textures of ``texture_size``.

    Each texel shows the material at the point of the full surface that is closest to the texel's place on the
    simplified one. ``alpha_mode``: "opaque", "mask", "blend", or "auto", which decides from the baked alpha.
    The result lies on the asset's device; the same asset gives the same bytes.
    Raises InputError where the asset has no surface or an argument is out of range.
    """
    if decimation_target < 1:
        raise InputError(f"decimation_target={decimation_target} must be at least 1.")
    if texture_size < 1:
        raise InputError(f"texture_size={texture_size} must be at least 1.")
    if alpha_mode not in ALPHA_MODES:
        raise InputError(f"alpha_mode={alpha_mode!r} must be one of {', '.join(ALPHA_MODES)}.")
    if not len(asset.mesh.faces) or not len(asset.material.coords):
        raise InputError(_EMPTY)
    rows = max(1, _TEXELS_AT_ONCE // texture_size)
    steps = _SHAPE_STEPS + -(-texture_size // rows) + 1
    on_step(0, steps)

    full = fill_holes(asset.mesh.vertices, asset.mesh.faces, _HOLE_PERIMETER)
    vertices, faces = _cleaned(*simplify(*full, 3 * decimation_target))
    on_step(1, steps)
    vertices, faces = simplify(vertices, faces, decimation_target)
    vertices, faces = unify_face_orientations(*repair_non_manifold_edges(vertices, faces))
    on_step(2, steps)
    flat = unwrap(vertices, faces)
    if not len(flat.faces):
        raise InputError(_EMPTY)
    on_step(3, steps)
    face_id, barycentric = rasterize_uv(flat.uvs, flat.faces, texture_size)
    on_step(_SHAPE_STEPS, steps)

    corners = flat.vertex_map[flat.faces.long()]
    surface, material = Surface(*full), _Material(asset.material)
    image = torch.zeros((texture_size, texture_size, MATERIAL_CHANNELS), dtype=torch.uint8, device=vertices.device)
    sampled = torch.zeros((texture_size, texture_size), dtype=torch.bool, device=vertices.device)
    for number, first in enumerate(range(0, texture_size, rows)):
        block = slice(first, first + rows)
        inside = face_id[block] >= 0
        triangles = vertices[corners[face_id[block][inside].long()]]
        places = (triangles * barycentric[block][inside][:, :, None]).sum(1)
        values = material.at(surface.closest(places).points)
        image[block][inside] = (values.clamp(0, 1) * 255).round().to(torch.uint8)
        sampled[block][inside] = values.isfinite().all(1)
        on_step(_SHAPE_STEPS + number + 1, steps)
    inside = face_id >= 0
    coverage = float((sampled & inside).sum() / inside.sum())
    del face_id, barycentric

    alpha = image[..., ALPHA][sampled][:, 0]
    mode = _alpha_mode(alpha) if alpha_mode == "auto" else alpha_mode.upper()
    image = fill_gaps(image, sampled)
    if mode == "OPAQUE":
        image[..., ALPHA] = 255
    else:
        image[..., ALPHA][image[..., ALPHA] >= _OPAQUE * 255] = 255
    source, new_faces, normals = _with_normals(vertices, corners, flat.faces)
    vertex_map = flat.vertex_map[source]
    on_step(steps, steps)
    return TexturedMesh(
        vertices=vertices[vertex_map],
        faces=new_faces,
        normals=normals,
        uvs=flat.uvs[source],
        base_color=torch.cat([image[..., BASE_COLOR], image[..., ALPHA]], dim=-1),
        metallic_roughness=torch.cat(
            [torch.zeros_like(image[..., ALPHA]), image[..., ROUGHNESS], image[..., METALLIC]], dim=-1
        ),
        alpha_mode=mode,
        statistics=MeshStatistics(
            faces=len(new_faces), vertices=len(vertex_map), charts=flat.charts, texture_coverage=coverage
        ),
    )


def _cleaned(vertices: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
    """Without degenerate or double faces, non-manifold edges, crumbs and small holes."""
    mesh = remove_duplicate_faces(*remove_degenerate_faces(vertices, faces))
    mesh = repair_non_manifold_edges(*mesh)
    without_crumbs = remove_small_components(*mesh, _CRUMB_AREA)
    # Where crumbs are a good part of the surface, they are no crumbs.
    crumbs = 1 - _area(*without_crumbs) / max(_area(*mesh), 1e-300)
    return fill_holes(*(without_crumbs if crumbs < _CRUMB_SHARE else mesh), _HOLE_PERIMETER)


def _area(vertices: Tensor, faces: Tensor) -> float:
    a, b, c = vertices.double()[faces.long()].unbind(1)
    return float(torch.linalg.cross(b - a, c - a).norm(dim=1).sum()) / 2


class _Material:
    """The material at points of the object frame: trilinear, or the nearest voxel's where none is near."""

    def __init__(self, voxels: MaterialVoxels) -> None:
        self._voxels = voxels
        coords = torch.nn.functional.pad(voxels.coords.int(), (1, 0))
        attrs = voxels.attrs.float().clone()
        attrs[:, ALPHA] = _without_stray_holes(coords, attrs[:, ALPHA])
        # The last channel tells where there was anything to sample.
        self._feats = torch.cat([attrs, torch.ones_like(attrs[:, :1])], dim=1)
        shape = (1, self._feats.shape[1], *(int(v) + 1 for v in voxels.coords.amax(0)))
        self._field = VoxelField(self._feats, coords, shape)
        self._tree: cKDTree | None = None

    def at(self, points: Tensor) -> Tensor:
        """(P, 6) attributes at points (P, 3)."""
        origin = torch.tensor(self._voxels.origin, device=points.device)
        grid = (points - origin) / self._voxels.voxel_size
        values = self._field.sample(grid[None])[0]
        lost = values[:, -1] < 0.5
        if bool(lost.any()):
            if self._tree is None:
                self._tree = cKDTree((self._voxels.coords + 0.5).cpu().numpy())
            nearest = torch.from_numpy(self._tree.query(grid[lost].cpu().numpy())[1]).to(points.device)
            values[lost] = self._feats[nearest]
        return values[:, :-1]


def _without_stray_holes(coords: Tensor, alpha: Tensor) -> Tensor:
    """Close see-through specks and rims thinner than three voxels, which viewers show as flashing dots."""
    if bool((alpha >= _OPAQUE).all()):
        return alpha
    neighbours = neighbor_map(coords)

    def extreme(values: Tensor, sign: float) -> Tensor:
        most = sign * values[:, 0]
        for row in neighbours:
            most = torch.maximum(most, torch.where(row >= 0, sign * values[row.clamp_min(0), 0], -torch.inf))
        return sign * most[:, None]

    return extreme(extreme(alpha, 1.0), -1.0)


def _alpha_mode(alpha: Tensor) -> str:
    """The glTF alpha mode that the baked ``alpha`` (T,) uint8 asks for."""
    solid = alpha >= _OPAQUE * 255
    seen_through = int((~solid).sum())
    if seen_through <= 0.002 * len(alpha):
        return "OPAQUE"
    # Cut-outs are all or nothing, but for the blur of their edges.
    empty = int((alpha < 0.1 * 255).sum())
    return "MASK" if empty >= 0.7 * seen_through else "BLEND"


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
