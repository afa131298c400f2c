"""From a generated asset to a textured mesh: ``o_voxel.postprocess`` with the rules for materials."""

from __future__ import annotations

import torch
from o_voxel.lookup import neighbor_map
from o_voxel.postprocess import NoSurfaceError, Volume, bake_volume
from torch import Tensor

from .errors import InputError
from .mesh import ALPHA, BASE_COLOR, METALLIC, ROUGHNESS, Asset, MeshStatistics, TexturedMesh
from .options import ALPHA_MODES
from .progress import OnStep, ignore_step

_EMPTY = "The model produced an empty surface: try another seed or picture."
_OPAQUE = 0.98  # alpha from which a texel counts as solid


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
    voxels = asset.material
    try:
        baked = bake_volume(
            asset.mesh.vertices,
            asset.mesh.faces,
            Volume(voxels.coords, _without_stray_holes(voxels.coords, voxels.attrs), voxels.voxel_size, voxels.origin),
            decimation_target=decimation_target,
            texture_size=texture_size,
            on_step=on_step,
        )
    except NoSurfaceError:
        raise InputError(_EMPTY) from None

    image = baked.image
    alpha = image[..., ALPHA][baked.sampled][:, 0]
    mode = _alpha_mode(alpha) if alpha_mode == "auto" else alpha_mode.upper()
    if mode == "OPAQUE":
        image[..., ALPHA] = 255
    else:
        image[..., ALPHA][image[..., ALPHA] >= _OPAQUE * 255] = 255
    return TexturedMesh(
        vertices=baked.vertices,
        faces=baked.faces,
        normals=baked.normals,
        uvs=baked.uvs,
        base_color=torch.cat([image[..., BASE_COLOR], image[..., ALPHA]], dim=-1),
        metallic_roughness=torch.cat(
            [torch.zeros_like(image[..., ALPHA]), image[..., ROUGHNESS], image[..., METALLIC]], dim=-1
        ),
        alpha_mode=mode,
        statistics=MeshStatistics(
            faces=len(baked.faces), vertices=len(baked.vertices), charts=baked.charts, texture_coverage=baked.coverage
        ),
    )


def _without_stray_holes(coords: Tensor, attrs: Tensor) -> Tensor:
    """Close see-through specks and rims thinner than three voxels, which viewers show as flashing dots.

    Returns new attributes (N, 6).
    """
    attrs = attrs.float().clone()
    alpha = attrs[:, ALPHA]
    if bool((alpha >= _OPAQUE).all()):
        return attrs
    neighbours = neighbor_map(torch.nn.functional.pad(coords.int(), (1, 0)))

    def extreme(values: Tensor, sign: float) -> Tensor:
        most = sign * values[:, 0]
        for row in neighbours:
            most = torch.maximum(most, torch.where(row >= 0, sign * values[row.clamp_min(0), 0], -torch.inf))
        return sign * most[:, None]

    attrs[:, ALPHA] = extreme(extreme(alpha, 1.0), -1.0)
    return attrs


def _alpha_mode(alpha: Tensor) -> str:
    """The glTF alpha mode that the baked ``alpha`` (T,) uint8 asks for."""
    solid = alpha >= _OPAQUE * 255
    seen_through = int((~solid).sum())
    if seen_through <= 0.002 * len(alpha):
        return "OPAQUE"
    # Cut-outs are all or nothing, but for the blur of their edges.
    empty = int((alpha < 0.1 * 255).sum())
    return "MASK" if empty >= 0.7 * seen_through else "BLEND"
