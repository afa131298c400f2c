"""Pictures of an asset: ray-cast depth layers, materials from voxels, image-based light.

Takes the place of the original's ``PbrMeshRenderer`` and ``render_video``, with the same meaning of every channel.
Cameras follow OpenCV: x right, y down, z forward; intrinsics are in units of the picture's width and height.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from o_voxel.rays import Hits, RayMesh
from o_voxel.sample import VoxelField
from torch import Tensor

from . import environment as light
from .environment import Environment
from .errors import InputError
from .mesh import ALPHA, BASE_COLOR, MATERIAL_CHANNELS, METALLIC, ROUGHNESS, Asset
from .occlusion import NO_DEPTH, screen_occlusion
from .progress import OnStep, ignore_step

_OPAQUE = 1 - 1 / 512  # what lies behind this much coverage is lost in 8 bits
_LAYERS = 8

_ORBIT_RADIUS, _ORBIT_FOV = 2.0, 40.0
_CONTRAST = 10 / 255  # neighbours that differ by more are edges to smooth
_SUBPIXELS = ((-1 / 8, -3 / 8), (3 / 8, -1 / 8), (1 / 8, 3 / 8), (-3 / 8, 1 / 8))  # a rotated grid
_BACKDROP = (0.93, 0.72)  # grey of the turntable's background at the middle and in the corners


@dataclass(frozen=True)
class Camera:
    """world_to_camera (4, 4) float32; intrinsics (3, 3) float32, normalised: the centre of the picture is 0.5."""

    world_to_camera: Tensor
    intrinsics: Tensor


def orbit_camera(yaw: float, pitch: float, radius: float, fov_degrees: float) -> Camera:
    """Camera at ``radius`` from the origin that looks at it with z up; angles in radians.

    It stands at (sin yaw cos pitch, cos yaw cos pitch, sin pitch) * radius, as in the original. The field of
    view is that of the full width and height. |pitch| must stay below pi / 2.
    """
    backward = [math.sin(yaw) * math.cos(pitch), math.cos(yaw) * math.cos(pitch), math.sin(pitch)]
    forward = -torch.tensor(backward, dtype=torch.float64)
    right = torch.linalg.cross(forward, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    right = right / right.norm()
    world_to_camera = torch.eye(4, dtype=torch.float64)
    world_to_camera[:3, :3] = torch.stack([right, torch.linalg.cross(forward, right), forward])
    world_to_camera[2, 3] = radius
    focal = 0.5 / math.tan(math.radians(fov_degrees) / 2)
    intrinsics = torch.tensor([[focal, 0.0, 0.5], [0.0, focal, 0.5], [0.0, 0.0, 1.0]])
    return Camera(world_to_camera.float(), intrinsics)


def turntable_camera(frame: int, frames: int) -> Camera:
    """The original's camera path, but from the front (-y): one turn at distance 2 with a wave in pitch.

    Frame ``frames`` is frame 0 again.
    """
    turn = 2 * math.pi * frame / frames
    return orbit_camera(math.pi - turn, 0.25 + 0.5 * math.sin(turn), _ORBIT_RADIUS, _ORBIT_FOV)


def render(
    asset: Asset,
    camera: Camera,
    environment: Environment | str,
    *,
    resolution: int,
    supersampling: int = 1,
    layers: int = _LAYERS,
    ambient_occlusion: bool = True,
) -> dict[str, Tensor]:
    """Render one square picture.

    Up to ``layers`` surfaces are composited along each ray, fewer where those in front are opaque.
    ``supersampling`` renders that many times larger and filters down.
    Returns float32 tensors in [0, 1] on the asset's device, black where nothing is seen: shaded (3, H, W),
    tone-mapped (ACES) and gamma-encoded; normal (3, H, W) as (1 - n) / 2 in the camera frame, 0.5 where nothing
    is seen; base_color (3, H, W), metallic, roughness, alpha and mask (H, W), all of the first surface; clay
    (H, W), one minus the ambient occlusion; and depth (H, W) of the surface that contributes most, along the camera's
    axis and in units of the mesh.
    Raises InputError where the mesh has no faces.
    """
    scene = _Scene(asset)
    if isinstance(environment, str):
        environment = light.environment(environment, scene.device)
    size = resolution * supersampling
    seen = _trace(scene, camera, _pixel_centres(size, scene.device), environment, layers)
    clay = seen.hit.float().view(size, size)
    if ambient_occlusion:
        clay = 1 - screen_occlusion(seen.depth.view(size, size), seen.facing.view(size, size, 3), camera.intrinsics)
    channels = {
        "shaded": seen.shaded * clay.view(-1, 1),
        "normal": 0.5 - 0.5 * seen.normal,
        "mask": seen.hit[:, None].float(),
        "base_color": seen.material[:, BASE_COLOR],
        "metallic": seen.material[:, METALLIC],
        "roughness": seen.material[:, ROUGHNESS],
        "alpha": seen.material[:, ALPHA],
        "clay": clay.view(-1, 1),
        "depth": torch.where(seen.depth < NO_DEPTH, seen.depth, 0)[:, None],
    }
    result = {}
    for name, values in channels.items():
        picture = values.T.reshape(1, -1, size, size)
        if supersampling > 1:
            picture = F.interpolate(
                picture, (resolution, resolution), mode="bilinear", align_corners=False, antialias=True
            )
        result[name] = picture[0] if picture.shape[1] == 3 else picture[0, 0]
    result["shaded"] = _encoded(_tone_mapped(result["shaded"]))
    return result


def turntable(
    asset: Asset,
    *,
    frames: int = 120,
    resolution: int = 1024,
    environment: str = "studio",
    panels: bool = False,
    on_step: OnStep = ignore_step,
) -> Iterator[np.ndarray]:
    """One full turn around the asset, antialiased, over a light grey backdrop; the last frame leads to the first.

    Yields ``frames`` pictures (H, W, 3) uint8: ``resolution`` square, or with ``panels`` twice as wide and one and
    a half times as high, shaded view and normals above base colour, metallic, roughness and alpha. Sizes are even when
    ``resolution`` is. ``on_step(frame, frames)`` is called after each frame.
    Raises InputError where the mesh has no faces or ``environment`` is not one of ``options.ENVIRONMENTS``.
    """
    scene = _Scene(asset)
    lights = light.environment(environment, scene.device)
    return _frames(scene, lights, frames, resolution, panels, on_step)


def _frames(
    scene: _Scene, lights: Environment, frames: int, resolution: int, panels: bool, on_step: OnStep
) -> Iterator[np.ndarray]:
    backdrop = _backdrop(resolution, scene.device)
    for frame in range(frames):
        picture = _antialiased(scene, turntable_camera(frame, frames), lights, resolution, backdrop, panels)
        if panels:
            picture = _laid_out(picture)
        pixels = (picture * 255 + 0.5).to(torch.uint8).cpu().numpy()
        on_step(frame + 1, frames)
        yield pixels


def _antialiased(
    scene: _Scene, camera: Camera, lights: Environment, size: int, backdrop: Tensor, panels: bool
) -> Tensor:
    """Channels (size, size, 3) of one frame over the backdrop (size^2, 1); with ``panels`` twelve, see ``_developed``.

    One ray through each pixel; where the result differs from a neighbour's, the average of four more instead.
    """
    centres = _pixel_centres(size, scene.device)
    seen = _trace(scene, camera, centres, lights, _LAYERS)
    clay = 1 - screen_occlusion(seen.depth.view(size, size), seen.facing.view(size, size, 3), camera.intrinsics)
    picture = _developed(seen, clay.view(-1, 1), backdrop, panels)
    edges = _edges(picture.view(size, size, -1)).view(-1).nonzero()[:, 0]
    if len(edges) > 0:
        # Occlusion is smooth: more rays take their pixel's, or its neighbours' where the pixel sees nothing.
        solid = (seen.depth < NO_DEPTH).float().view(1, 1, size, size)
        nearby = F.avg_pool2d(clay * solid, 3, 1, 1) / F.avg_pool2d(solid, 3, 1, 1).clamp_min(1e-6)
        clay = torch.where(solid > 0, clay, nearby).view(-1, 1)
        shifts = torch.tensor(_SUBPIXELS, device=scene.device) / size
        positions = (centres[edges] + shifts[:, None]).view(-1, 2)
        repeated = edges.repeat(len(_SUBPIXELS))
        seen = _trace(scene, camera, positions, lights, _LAYERS)
        finer = _developed(seen, clay[repeated], backdrop[repeated], panels)
        picture[edges] = finer.view(len(_SUBPIXELS), len(edges), -1).mean(0)
    return picture.view(size, size, -1)


def _developed(seen: _Seen, clay: Tensor, backdrop: Tensor, panels: bool) -> Tensor:
    """Display channels over the backdrop: shaded (R, 3); with ``panels`` also normal 3:6, base colour 6:9,
    metallic 9, roughness 10 and alpha 11."""
    color = _encoded(_tone_mapped(seen.shaded / seen.coverage.clamp_min(1e-6) * clay))
    shaded = torch.lerp(backdrop, color, seen.coverage)
    if not panels:
        return shaded
    surface = torch.cat([0.5 - 0.5 * seen.normal, seen.material.clamp(0, 1)], -1)
    return torch.cat([shaded, torch.where(seen.hit[:, None], surface, backdrop)], -1)


def _edges(picture: Tensor) -> Tensor:
    """Pixels (H, W) bool of a picture (H, W, C) that differ from one of their four neighbours."""
    down = (picture[1:] - picture[:-1]).abs().amax(-1) > _CONTRAST
    across = (picture[:, 1:] - picture[:, :-1]).abs().amax(-1) > _CONTRAST
    marked = torch.zeros(picture.shape[:2], dtype=torch.bool, device=picture.device)
    marked[1:] |= down
    marked[:-1] |= down
    marked[:, 1:] |= across
    marked[:, :-1] |= across
    return marked


def _backdrop(size: int, device: torch.device) -> Tensor:
    """Grey (size^2, 1) that falls off from the middle towards the corners."""
    distance = (_pixel_centres(size, device) - 0.5).square().sum(-1, keepdim=True) * 2
    middle, corner = _BACKDROP
    return middle + (corner - middle) * distance


def _laid_out(channels: Tensor) -> Tensor:
    """The panels (H, W, 3) from the channels (size, size, 12) of ``_developed``."""
    size = channels.shape[0]
    surface = channels[..., 6:].permute(2, 0, 1)[None]
    small = F.interpolate(surface, (size // 2, size // 2), mode="area")[0].permute(1, 2, 0)
    grey = [small[..., k : k + 1].expand(-1, -1, 3) for k in (3, 4, 5)]
    bottom = torch.cat([small[..., :3], *grey], 1)[: size // 4 * 2]  # an even height, which video needs
    top = torch.cat([channels[..., :3], channels[..., 3:6]], 1)
    return torch.cat([top, bottom])


class _Scene:
    """What does not depend on the camera, built once for many pictures."""

    def __init__(self, asset: Asset) -> None:
        if len(asset.mesh.faces) == 0:
            raise InputError("The mesh has no faces, so there is nothing to render; generate it with another seed.")
        self.vertices = asset.mesh.vertices.float()
        self.device = self.vertices.device
        self.corners = self.vertices[asset.mesh.faces.long()]
        edges = self.corners[:, 1:] - self.corners[:, :1]
        self.normals = F.normalize(torch.linalg.cross(edges[:, 0], edges[:, 1], dim=-1), dim=-1)
        self.rays = RayMesh(self.vertices, asset.mesh.faces)
        voxels = asset.material
        shape = [1, MATERIAL_CHANNELS, *(int(n) + 1 for n in voxels.coords.amax(0))]
        self.field = VoxelField(voxels.attrs.float(), F.pad(voxels.coords, (1, 0)), shape)
        self.origin = torch.tensor(voxels.origin, device=self.device)
        self.voxel_size = voxels.voxel_size

    def points(self, hits: Hits) -> Tensor:
        return (self.corners[hits.faces.long()] * hits.barycentric[..., None]).sum(1)

    def material(self, points: Tensor) -> Tensor:
        """Attributes (P, 6) at points (P, 3)."""
        where = (points - self.origin) / self.voxel_size
        return self.field.sample(where[None])[0]


@dataclass(frozen=True)
class _Seen:
    """What R rays see.

    shaded (R, 3) is linear and premultiplied by coverage (R, 1). hit (R,), normal (R, 3), in the camera frame and
    towards the camera, and material (R, 6) belong to the first surface; depth (R,) and facing (R, 3), a normal as
    well, to the surface that contributes most.
    """

    shaded: Tensor
    coverage: Tensor
    hit: Tensor
    normal: Tensor
    material: Tensor
    depth: Tensor
    facing: Tensor


def _pixel_centres(size: int, device: torch.device) -> Tensor:
    """Picture positions (size^2, 2) as (x, y) in [0, 1], row by row."""
    centres = (torch.arange(size, device=device) + 0.5) / size
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x, y], -1).view(-1, 2)


def _trace(scene: _Scene, camera: Camera, positions: Tensor, environment: Environment, layers: int) -> _Seen:
    """Follow the rays through ``positions`` (R, 2) from surface to surface and composite them."""
    device = scene.device
    view, intrinsics = camera.world_to_camera.to(device), camera.intrinsics.to(device)
    rotation = view[:3, :3]
    eye = -rotation.T @ view[:3, 3]
    focal, centre = intrinsics.diagonal()[:2], intrinsics[:2, 2]
    toward = F.pad((positions - centre) / focal, (0, 1), value=1.0) @ rotation
    directions = F.normalize(toward, dim=-1)
    rays = len(positions)
    seen = _Seen(
        shaded=torch.zeros(rays, 3, device=device),
        coverage=torch.zeros(rays, 1, device=device),
        hit=torch.zeros(rays, dtype=torch.bool, device=device),
        normal=torch.zeros(rays, 3, device=device),
        material=torch.zeros(rays, MATERIAL_CHANNELS, device=device),
        depth=torch.full((rays,), NO_DEPTH, device=device),
        facing=torch.zeros(rays, 3, device=device),
    )
    heaviest = torch.zeros(rays, 1, device=device)
    origins = eye.expand(rays, 3)
    hits = scene.rays.first_hits(origins, directions)
    active = torch.arange(rays, device=device)
    for layer in range(layers):
        kept = (hits.faces >= 0).nonzero()[:, 0]
        active, hits = active[kept], Hits(hits.faces[kept], hits.barycentric[kept], hits.t[kept])
        if len(active) == 0:
            break
        back = -directions[active]
        normals = scene.normals[hits.faces.long()]
        normals = torch.where((normals * back).sum(-1, keepdim=True) < 0, -normals, normals)
        material = scene.material(scene.points(hits))
        if layer == 0:
            seen.hit[active] = True
            seen.normal[active] = normals @ rotation.T
            seen.material[active] = material
        clamped = material.clamp(0, 1)
        color = environment.shade(
            normals, back, clamped[:, BASE_COLOR] ** 2.2, clamped[:, METALLIC], clamped[:, ROUGHNESS]
        )
        weight = (1 - seen.coverage[active]) * clamped[:, ALPHA]
        nearest = (weight > heaviest[active])[:, 0]
        chosen = active[nearest]
        heaviest[chosen] = weight[nearest]
        seen.facing[chosen] = normals[nearest] @ rotation.T
        seen.depth[chosen] = hits.t[nearest] * -(back[nearest] @ rotation[2])
        seen.shaded[active] += weight * color
        seen.coverage[active] += weight
        if layer + 1 < layers:
            open_rays = (seen.coverage[active, 0] < _OPAQUE).nonzero()[:, 0]
            active = active[open_rays]
            hits = Hits(hits.faces[open_rays], hits.barycentric[open_rays], hits.t[open_rays])
            hits = scene.rays.next_hits(origins[active], directions[active], hits)
    return seen


def _tone_mapped(radiance: Tensor) -> Tensor:
    """ACES curve in Narkowicz' fit, from linear radiance to linear [0, 1]."""
    return (radiance * (2.51 * radiance + 0.03) / (radiance * (2.43 * radiance + 0.59) + 0.14)).clamp(0, 1)


def _encoded(linear: Tensor) -> Tensor:
    return linear.clamp(0, 1) ** (1 / 2.2)
