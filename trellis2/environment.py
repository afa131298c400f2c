"""Image-based light: split-sum shading from a prefiltered cubemap, and the product's own environments.

The scheme is the one of the original's renderer (nvdiffrec's light): a cubemap of 512 texels a side, one diffuse
map, six GGX-filtered levels and a table for the Fresnel and masking term (Karis 2013, height-correlated Smith).
Directions are in the object frame: z is up. A lat-long image has +z at its top row and -y in its middle column.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from o_voxel.launch import Floats, Ints, Vec3, Vec3s, func, kernel, launch, shared, wp
from torch import Tensor

from .errors import InputError
from .options import ENVIRONMENTS

_BASE_SIZE = 512
_DIFFUSE_SIZE = 16
_MIN_ROUGHNESS, _KNEE_ROUGHNESS = 0.08, 0.5  # of level 0 and of the last but one; the last is roughness 1
# Side lengths of the filtered levels and of the maps they are filtered from. Every lobe is at least two texels
# wide at half height, so that finer ones would only cost time.
_LEVEL_SIZES = (256, 128, 64, 32, 16, 16)
_SOURCE_SIZES = (512, 128, 64, 32, 16, 16)
_LEVELS = len(_LEVEL_SIZES)
_LOBE_SHARE = 0.99
# The original weights texels with areas that sum to 1.08 of the sphere; its look is kept, without the unevenness.
_DIFFUSE_GAIN = 1.08
_TABLE_SIZE = 64

Radiance = Callable[[Tensor], Tensor]
"""Maps unit directions (..., 3) to linear RGB radiance (..., 3)."""

_Colour = tuple[float, float, float]


@dataclass(frozen=True)
class _Cubemaps:
    """Levels of a cubemap, each with a border of one texel so that bilinear reads are seamless, in one table.

    texels (T, 3) float32; starts and sizes (levels,) int32: first row and inner side length of each level.
    """

    texels: Tensor
    starts: Tensor
    sizes: Tensor

    def sample(self, directions: Tensor, levels: Tensor) -> Tensor:
        """Values (P, 3) in directions (P, 3), bilinear, and linear between the levels around levels (P,)."""
        directions = directions.contiguous()
        values = torch.empty_like(directions)
        arguments = [
            shared(directions, wp.vec3),
            shared(levels.contiguous(), wp.float32),
            shared(self.texels, wp.vec3),
            shared(self.starts, wp.int32),
            shared(self.sizes, wp.int32),
            shared(values, wp.vec3),
        ]
        launch(_sample_cubemaps, len(directions), arguments, directions.device)
        return values


@dataclass(frozen=True)
class Environment:
    """Light from all around, ready to shade with. Made by ``environment`` or ``prefilter``."""

    _diffuse: _Cubemaps
    _specular: _Cubemaps
    _table: Tensor

    def shade(
        self, normals: Tensor, to_camera: Tensor, base_color: Tensor, metallic: Tensor, roughness: Tensor
    ) -> Tensor:
        """Linear radiance (P, 3) towards the camera. normals and to_camera (P, 3) of unit length; base_color
        (P, 3) linear; metallic and roughness (P, 1) in [0, 1]."""
        toward = (to_camera * normals).sum(-1, keepdim=True)
        mirrored = 2 * toward * normals - to_camera
        specular_color = (1 - metallic) * 0.04 + base_color * metallic
        diffuse = self._diffuse.sample(normals, torch.zeros_like(roughness[:, 0]))
        specular = self._specular.sample(mirrored, _level_of(roughness[:, 0]))
        scale, bias = self._reflectance(toward.clamp_min(1e-4), roughness)
        return diffuse * base_color * (1 - metallic) + specular * (specular_color * scale + bias)

    def _reflectance(self, cosine: Tensor, roughness: Tensor) -> tuple[Tensor, Tensor]:
        where = torch.cat([cosine, roughness], -1)[None, None] * 2 - 1
        both = F.grid_sample(self._table[None], where, mode="bilinear", padding_mode="border", align_corners=False)
        return both[0, 0, 0][:, None], both[0, 1, 0][:, None]


def environment(name: str, device: torch.device | str = "cpu") -> Environment:
    """The product's environment ``name``, one of ``options.ENVIRONMENTS``; built once in a process.

    Raises InputError for another name.
    """
    if name not in ENVIRONMENTS:
        raise InputError(f"environment={name!r} must be one of {', '.join(ENVIRONMENTS)}.")
    return _cached_environment(name, torch.device(device))


@lru_cache(maxsize=8)
def _cached_environment(name: str, device: torch.device) -> Environment:
    return prefilter(_RADIANCE[name], device)


def lat_long_radiance(image: Tensor) -> Radiance:
    """The radiance that a lat-long image (H, W, 3) shows, read bilinearly."""
    # A border: columns go round, rows stop at the poles.
    bordered = F.pad(image.permute(2, 0, 1)[None], (1, 1, 0, 0), mode="circular")
    bordered = F.pad(bordered, (0, 0, 1, 1), mode="replicate")
    height, width = image.shape[:2]

    def radiance(directions: Tensor) -> Tensor:
        flat = directions.reshape(-1, 3)
        column = (torch.atan2(flat[:, 0], -flat[:, 1]) / (2 * math.pi) + 0.5) * width + 1
        row = torch.acos(flat[:, 2].clamp(-1, 1)) / math.pi * height + 1
        where = torch.stack([column / (width + 2), row / (height + 2)], -1) * 2 - 1
        values = F.grid_sample(bordered, where[None, None], mode="bilinear", padding_mode="border", align_corners=False)
        return values[0, :, 0].T.reshape(directions.shape)

    return radiance


def prefilter(radiance: Radiance, device: torch.device | str = "cpu") -> Environment:
    """Filter ``radiance`` for shading (about 1.5 s on two CPU cores)."""
    device = torch.device(device)
    level = radiance(_texel_directions(_BASE_SIZE, device)).float().contiguous()
    pyramid = {_BASE_SIZE: level}
    for size in (256, 128, 64, 32, 16):
        level = F.avg_pool2d(level.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1).contiguous()
        pyramid[size] = level
    diffuse = _filter_diffuse(pyramid[_DIFFUSE_SIZE])
    step = (_KNEE_ROUGHNESS - _MIN_ROUGHNESS) / (_LEVELS - 2)
    roughness = [_MIN_ROUGHNESS + step * i for i in range(_LEVELS - 1)] + [1.0]
    specular = [
        _filter_ggx(pyramid[source], size, r)
        for source, size, r in zip(_SOURCE_SIZES, _LEVEL_SIZES, roughness, strict=True)
    ]
    return Environment(_joined([diffuse]), _joined(specular), _reflectance_table(_TABLE_SIZE).to(device))


def _level_of(roughness: Tensor) -> Tensor:
    """Level of the filtered maps, 0 to ``_LEVELS - 1``, whose lobe fits ``roughness``."""
    knee = _LEVELS - 2
    fine = (roughness.clamp_min(_MIN_ROUGHNESS) - _MIN_ROUGHNESS) / (_KNEE_ROUGHNESS - _MIN_ROUGHNESS) * knee
    coarse = (roughness - _KNEE_ROUGHNESS) / (1 - _KNEE_ROUGHNESS) + knee
    return torch.where(roughness < _KNEE_ROUGHNESS, fine, coarse)


# Cubemap layout: face f looks along axis f // 2, towards its positive end where f is even. Its texel at (u, v) in
# [-1, 1] shows the direction forward + u * right + v * down; the three vectors of each face, as in OpenGL:
_FORWARD = ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))
_RIGHT = ((0, 0, -1), (0, 0, 1), (1, 0, 0), (1, 0, 0), (1, 0, 0), (-1, 0, 0))
_DOWN = ((0, -1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1), (0, -1, 0), (0, -1, 0))


def _texel_directions(size: int, device: torch.device, border: int = 0) -> Tensor:
    """Unit directions (6, size + 2 border, size + 2 border, 3) of texel centres."""
    centres = (torch.arange(-border, size + border, device=device) + 0.5) * 2 / size - 1
    forward, right, down = (
        torch.tensor(rows, dtype=torch.float32, device=device)[:, None, None] for rows in (_FORWARD, _RIGHT, _DOWN)
    )
    return F.normalize(forward + centres[None, None, :, None] * right + centres[None, :, None, None] * down, dim=-1)


def _face_coordinates(directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cubemap face (P,) of directions (P, 3) and the position (u, v) on it, in [-1, 1]."""
    axis = directions.abs().argmax(-1)
    along = directions.gather(-1, axis[:, None])[:, 0]
    face = axis * 2 + (along < 0)
    scale = 1 / along.abs().clamp_min(1e-20)
    x, y, z = directions.unbind(-1)
    sign = torch.where(along < 0, -1.0, 1.0)
    u = torch.where(axis == 0, -z * sign, torch.where(axis == 1, x, x * sign))
    v = torch.where(axis == 1, z * sign, -y)
    return face, u * scale, v * scale


def _joined(levels: list[Tensor]) -> _Cubemaps:
    """Give each cubemap (6, S, S, 3) a border of the neighbouring faces' texels and join them."""
    device = levels[0].device
    sizes = [texels.shape[1] for texels in levels]
    tables = []
    for texels, size in zip(levels, sizes, strict=True):
        face, u, v = _face_coordinates(_texel_directions(size, device, border=1).reshape(-1, 3))
        x, y = (((c + 1) * 0.5 * size).long().clamp(0, size - 1) for c in (u, v))
        tables.append(texels[face, y, x])
    starts = [sum(len(table) for table in tables[:i]) for i in range(len(tables))]
    return _Cubemaps(
        torch.cat(tables).contiguous(),
        torch.tensor(starts, dtype=torch.int32, device=device),
        torch.tensor(sizes, dtype=torch.int32, device=device),
    )


def _filter_diffuse(texels: Tensor) -> Tensor:
    """Irradiance over pi (6, 16, 16, 3), times the gain: the light that a white Lambertian surface sends out."""
    directions = _texel_directions(_DIFFUSE_SIZE, texels.device).reshape(-1, 3)
    weights = (directions @ directions.T).clamp_min(0) * _solid_angles(_DIFFUSE_SIZE, texels.device)
    return (weights @ texels.reshape(-1, 3) * (_DIFFUSE_GAIN / math.pi)).reshape(texels.shape)


def _solid_angles(size: int, device: torch.device) -> Tensor:
    """Exact solid angle of every texel of a cubemap, (6 size^2,)."""
    edges = torch.linspace(-1, 1, size + 1, dtype=torch.float64, device=device)
    x, y = edges[:, None], edges[None]
    corner = torch.atan2(x * y, (x * x + y * y + 1).sqrt())
    area = corner[1:, 1:] - corner[:-1, 1:] - corner[1:, :-1] + corner[:-1, :-1]
    return area.float().reshape(-1).repeat(6)


def _lobe_cosine(roughness: float) -> float:
    """Cosine of the angle that holds ``_LOBE_SHARE`` of the GGX distribution, summed over angles."""
    cosines = torch.linspace(0, math.pi / 2, 100_001, dtype=torch.float64).cos()
    density = (1 + cosines**2 * (roughness**4 - 1)) ** -2
    share = density.cumsum(0) / density.sum()
    return float(cosines[int((share >= _LOBE_SHARE).nonzero()[0])])


def _filter_ggx(texels: Tensor, size: int, roughness: float) -> Tensor:
    """Average of a cubemap over the GGX lobe around each texel of a cubemap (6, size, size, 3), seen from its axis."""
    directions = _texel_directions(size, texels.device).reshape(-1, 3).contiguous()
    filtered = torch.empty_like(directions)
    arguments = [
        6,
        texels.shape[1],
        _lobe_cosine(roughness),
        roughness**4,
        shared(texels.reshape(-1, 3), wp.vec3),
        shared(directions, wp.vec3),
        shared(filtered, wp.vec3),
    ]
    launch(_average_lobe, len(directions), arguments, texels.device)
    return filtered.reshape(6, size, size, 3)


@func
def _on_face(direction: Vec3, face: int) -> Vec3:
    """A direction in the frame of a cubemap face: right, down, forward."""
    sign = 1.0 - 2.0 * float(face % 2)
    if face // 2 == 0:
        return Vec3(-direction[2] * sign, -direction[1], direction[0] * sign)
    if face // 2 == 1:
        return Vec3(direction[0], direction[2] * sign, direction[1] * sign)
    return Vec3(direction[0] * sign, -direction[1], direction[2] * sign)


@func
def _bilinear(direction: Vec3, level: int, texels: Vec3s, starts: Ints, sizes: Ints) -> Vec3:
    x = wp.abs(direction[0])
    y = wp.abs(direction[1])
    z = wp.abs(direction[2])
    axis = 0
    if y > x:
        axis = 1
    if z > wp.max(x, y):
        axis = 2
    face = axis * 2
    if direction[axis] < 0.0:
        face += 1
    local = _on_face(direction, face)
    size = sizes[level]
    # Row and column 0 are the border: the centre of inner texel i lies at i + 1.
    column = (local[0] / local[2] + 1.0) * 0.5 * float(size) + 0.5
    row = (local[1] / local[2] + 1.0) * 0.5 * float(size) + 0.5
    x0 = wp.clamp(int(column), 0, size)
    y0 = wp.clamp(int(row), 0, size)
    fx = column - float(x0)
    fy = row - float(y0)
    corner = starts[level] + (face * (size + 2) + y0) * (size + 2) + x0
    top = texels[corner] * (1.0 - fx) + texels[corner + 1] * fx
    bottom = texels[corner + size + 2] * (1.0 - fx) + texels[corner + size + 3] * fx
    return top * (1.0 - fy) + bottom * fy


@kernel
def _sample_cubemaps(
    first: int,
    directions: Vec3s,
    levels: Floats,
    texels: Vec3s,
    starts: Ints,
    sizes: Ints,
    values: Vec3s,
) -> None:
    i = first + wp.tid()
    level = int(levels[i])
    between = levels[i] - float(level)
    value = _bilinear(directions[i], level, texels, starts, sizes)
    if between > 0.0:
        value = value * (1.0 - between) + _bilinear(directions[i], level + 1, texels, starts, sizes) * between
    values[i] = value


@kernel
def _average_lobe(
    first: int,
    faces: int,  # a parameter, because Warp would unroll a loop over a constant range
    size: int,
    lobe_cosine: float,
    alpha2: float,
    texels: Vec3s,
    directions: Vec3s,
    filtered: Vec3s,
) -> None:
    i = first + wp.tid()
    axis = directions[i]
    lobe_sine = wp.sqrt(1.0 - lobe_cosine * lobe_cosine)
    step = 2.0 / float(size)
    total = wp.vec3(0.0, 0.0, 0.0)
    weights = float(0)
    for face in range(faces):
        local = _on_face(axis, face)
        # Within the plane of (right, forward) a cone spans angles within asin(sine / length) of its axis.
        span = wp.vec2(wp.length(wp.vec2(local[0], local[2])), wp.length(wp.vec2(local[1], local[2])))
        angle = wp.vec2(wp.atan2(local[0], local[2]), wp.atan2(local[1], local[2]))
        reach = wp.vec2(7.0, 7.0)  # more than a full turn
        if lobe_sine < span[0]:
            reach[0] = wp.asin(lobe_sine / span[0])
        if lobe_sine < span[1]:
            reach[1] = wp.asin(lobe_sine / span[1])
        quarter = wp.PI / 4.0
        u0 = wp.tan(wp.clamp(angle[0] - reach[0], -quarter, quarter))
        u1 = wp.tan(wp.clamp(angle[0] + reach[0], -quarter, quarter))
        v0 = wp.tan(wp.clamp(angle[1] - reach[1], -quarter, quarter))
        v1 = wp.tan(wp.clamp(angle[1] + reach[1], -quarter, quarter))
        x0 = wp.max(int(wp.ceil((u0 + 1.0) / step - 0.5)), 0)
        x1 = wp.min(int(wp.floor((u1 + 1.0) / step - 0.5)) + 1, size)
        y0 = wp.max(int(wp.ceil((v0 + 1.0) / step - 0.5)), 0)
        y1 = wp.min(int(wp.floor((v1 + 1.0) / step - 0.5)) + 1, size)
        if u1 <= u0 or v1 <= v0:
            x1 = x0
        for y in range(y0, y1):
            v = (float(y) + 0.5) * step - 1.0
            for x in range(x0, x1):
                u = (float(x) + 0.5) * step - 1.0
                shrink = 1.0 / wp.sqrt(1.0 + u * u + v * v)
                cosine = (local[0] * u + local[1] * v + local[2]) * shrink
                if cosine >= lobe_cosine:
                    # Half vector: its cosine squared is (1 + cosine) / 2. A texel's solid angle goes as shrink^3.
                    spread = 1.0 + (0.5 + 0.5 * cosine) * (alpha2 - 1.0)
                    weight = cosine * shrink * shrink * shrink / (spread * spread)
                    total += texels[(face * size + y) * size + x] * weight
                    weights += weight
    filtered[i] = total / weights


@lru_cache(maxsize=1)
def _reflectance_table(size: int) -> Tensor:
    """Split-sum table (2, size, size): scale and bias of the specular colour; rows roughness, columns cosine.

    Importance sampling of the GGX half vector on a regular 32 x 32 pattern, height-correlated Smith masking,
    Schlick's Fresnel.
    """
    samples = 32
    centres = (torch.arange(size) + 0.5) / size
    cosine, roughness = centres[None, :, None], centres[:, None, None]
    pattern = (torch.arange(samples) + 0.5) / samples
    share, turn = pattern.repeat_interleave(samples), pattern.repeat(samples) * 2 * math.pi
    alpha2 = roughness**4
    half_z = ((1 - share) / (1 + (alpha2 - 1) * share)).sqrt()
    half_x = (1 - half_z**2).clamp_min(0).sqrt() * turn.cos()
    half_view = (1 - cosine**2).sqrt() * half_x + cosine * half_z
    light_z = (2 * half_view * half_z - cosine).clamp_min(0)

    def smith(own: Tensor, other: Tensor) -> Tensor:
        return other * (alpha2 + (1 - alpha2) * own**2).sqrt()

    masking = 2 * light_z * cosine / (smith(cosine, light_z) + smith(light_z, cosine)).clamp_min(1e-12)
    visible = masking * half_view.clamp_min(0) / (half_z * cosine)
    fresnel = (1 - half_view.clamp(0, 1)) ** 5
    return torch.stack([((1 - fresnel) * visible).mean(-1), (fresnel * visible).mean(-1)])


def _glow(directions: Tensor, towards: _Colour, spread: float) -> Tensor:
    """A round lobe (..., 1) of height 1 about ``towards``; ``spread`` is its width in radians."""
    axis = F.normalize(torch.tensor(towards, device=directions.device), dim=0)
    return ((directions @ axis - 1) / (spread * spread)).exp()[..., None]


def _soft_box(directions: Tensor, yaw: float, pitch: float, width: float, height: float, edge: float = 0.06) -> Tensor:
    """A rectangular light (..., 1) of height 1 whose centre is at ``yaw`` (from +x towards +y) and ``pitch``;
    sizes are half angles as tangents, all angles in radians."""
    forward = torch.tensor(
        [math.cos(yaw) * math.cos(pitch), math.sin(yaw) * math.cos(pitch), math.sin(pitch)],
        device=directions.device,
    )
    right = torch.tensor([-math.sin(yaw), math.cos(yaw), 0.0], device=directions.device)
    up = torch.linalg.cross(forward, right)
    depth = directions @ forward
    x, y = (directions @ right) / depth.clamp_min(1e-3), (directions @ up) / depth.clamp_min(1e-3)
    inside = torch.sigmoid((width - x.abs()) / (edge * 0.25)) * torch.sigmoid((height - y.abs()) / (edge * 0.25))
    return (inside * (depth > 0))[..., None]


def _sky(directions: Tensor, ground: _Colour, horizon: _Colour, zenith: _Colour) -> Tensor:
    """A vertical gradient, smooth across the horizon."""
    below, middle, above = (torch.tensor(colour, device=directions.device) for colour in (ground, horizon, zenith))
    height = directions[..., 2:3]
    upper = torch.lerp(middle, above, height.clamp_min(0).sqrt())
    lower = torch.lerp(middle, below, (-height).clamp_min(0).sqrt())
    return torch.lerp(lower, upper, torch.sigmoid(height * 40))


def _studio(directions: Tensor) -> Tensor:
    """A grey room: soft boxes overhead, left and right, two upright strips between them, a dim floor."""
    light = _sky(directions, (0.22, 0.215, 0.21), (0.18, 0.18, 0.185), (0.30, 0.30, 0.31))
    light = light + 1.7 * _soft_box(directions, 0.0, 1.45, 0.60, 0.60)
    light = light + _tinted(_soft_box(directions, -2.3, 0.65, 0.45, 0.45), (5.4, 5.25, 5.0))
    light = light + _tinted(_soft_box(directions, 0.75, 0.60, 0.42, 0.42), (3.7, 3.8, 3.95))
    light = light + 1.8 * _soft_box(directions, -0.75, 0.25, 0.16, 0.70)
    return light + 1.8 * _soft_box(directions, 2.4, 0.25, 0.16, 0.70)


def _soft(directions: Tensor) -> Tensor:
    """A white tent: hardly any shadow side, broad highlights."""
    light = _sky(directions, (0.50, 0.49, 0.48), (0.68, 0.68, 0.69), (0.95, 0.95, 0.97))
    return light + 0.9 * _glow(directions, (-0.4, -0.5, 0.8), 0.5) + 0.5 * _glow(directions, (0.6, 0.5, 0.5), 0.6)


def _sunset(directions: Tensor) -> Tensor:
    """A low sun, a warm horizon around it and a blue sky opposite."""
    toward_sun = _glow(directions, (-0.75, -0.6, 0.12), 1.1)
    light = _sky(directions, (0.20, 0.18, 0.17), (0.46, 0.42, 0.43), (0.30, 0.38, 0.56))
    light = light + _tinted(toward_sun, (0.55, 0.34, 0.20))
    light = light + _tinted(_glow(directions, (-0.75, -0.6, 0.22), 0.28), (4.0, 2.7, 1.6))
    return light + _tinted(_glow(directions, (-0.75, -0.6, 0.28), 0.09), (48.0, 36.0, 24.0))


def _overcast(directions: Tensor) -> Tensor:
    """A cloudy sky, three times brighter at the zenith than at the horizon (CIE), over dark ground."""
    light = _sky(directions, (0.22, 0.22, 0.20), (0.45, 0.47, 0.50), (1.35, 1.38, 1.42))
    return light + 0.5 * _glow(directions, (-0.3, -0.5, 0.8), 0.45)


def _tinted(shape: Tensor, color: _Colour) -> Tensor:
    return shape * torch.tensor(color, device=shape.device)


_RADIANCE: dict[str, Radiance] = {
    "studio": _studio,
    "soft": _soft,
    "sunset": _sunset,
    "overcast": _overcast,
}
