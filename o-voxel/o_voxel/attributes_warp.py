"""Material of voxels as Warp kernels: on a GPU, and on a CPU where nothing has been compiled.

One thread takes all triangles of one voxel, in their order, so the sums are the same in every run.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .launch import Int64s, Ints, Vec2s, Vec3, Vec3s, func, kernel, launch, shared, wp

if TYPE_CHECKING:
    TextureView = Any
    TextureViews = Any
    Bytes = Any
    ByteRows = Any
    Doubles = Any
    DoubleRows = Any
    Vec4s = Any
    Vec2d = Any
    Vec3d = Any
    Sums = Any
else:
    Bytes = wp.array(dtype=wp.uint8)
    ByteRows = wp.array2d(dtype=wp.uint8)
    DoubleRows = wp.array2d(dtype=wp.float64)
    Vec4s = wp.array(dtype=wp.vec4)
    Vec2d = wp.vec2d
    Vec3d = wp.vec3d
    Sums = wp.types.vector(length=12, dtype=wp.float64)

    @wp.struct
    class TextureView:
        """channels: 0 where there is no texture. last: the last level of detail."""

        texels: Bytes
        channels: int
        side: int
        last: int
        linear: int
        wrap: int

    TextureViews = wp.array(dtype=TextureView)

# With products and sums rounded one by one, as in C++ and torch, a CPU and a GPU decide alike.
wp.set_module_options({"fuse_fp": False})

_MOST_TEXELS = 1 << 31
_CLAMP, _MIRROR = wp.constant(1), wp.constant(2)  # attributes.CLAMP, attributes.MIRROR
_MASK = wp.constant(wp.float64(1.0))  # attributes.MASK


def voxel_attributes(
    pairs: tuple[Tensor, Tensor, Tensor],
    surface: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    factors: Tensor,
    textures: list[Tensor],
    layout: Tensor,
    size: Tensor,
    shape: tuple[int, int, int],
    mip_level_offset: float,
) -> Tensor:
    """(N, 12) uint8 of voxels; the arguments are those of the compiled op but for pairs.

    pairs: keys (N,) int64 of the voxels, ends (N,) int64 of their runs of triangles, and triangles (P,) int32.
    """
    keys, ends, triangles = pairs
    corners, normals, uvs, colors, material = surface
    values = torch.empty((len(keys), 12), dtype=torch.uint8, device=keys.device)
    views = []
    for texels, (channels, side, linear, wrap) in zip(textures, layout.tolist(), strict=True):
        if texels.numel() >= _MOST_TEXELS:
            raise ValueError(f"A texture has {side} texels along a side, but at most 16384 are possible.")
        view = TextureView()
        view.texels = shared(texels.contiguous().flatten(), wp.uint8)
        view.channels, view.side, view.last = channels, side, max(side.bit_length() - 1, 0)
        view.linear, view.wrap = linear, wrap
        views.append(view)
    # On torch's stream, so that the kernel finds it there.
    stream = None if not keys.is_cuda else torch.cuda.current_stream(keys.device)
    with nullcontext() if stream is None else wp.ScopedStream(wp.stream_from_torch(stream)):
        all_views = wp.array(views, dtype=TextureView, device=wp.device_from_torch(keys.device))
    arguments = [
        shared(keys, wp.int64),
        shared(ends, wp.int64),
        shared(triangles, wp.int32),
        shared(corners.reshape(-1, 3).contiguous(), wp.vec3),
        shared(normals.reshape(-1, 3).contiguous(), wp.vec3),
        shared(uvs.reshape(-1, 2).contiguous(), wp.vec2),
        shared(colors.reshape(-1, 4).contiguous(), wp.vec4),
        shared(material.int(), wp.int32),
        shared(factors.to(keys.device), wp.float64),
        all_views,
        wp.vec3(*size.tolist()),
        shape[1],
        shape[2],
        mip_level_offset,
        shared(values, wp.uint8),
    ]
    launch(_average, len(keys), arguments, keys.device)
    if stream is not None:
        stream.synchronize()  # only then may the memory of the views be used again
    return values


@func
def _wrapped(place: wp.float64, side: int, wrap: int) -> int:
    limit = wp.float64(1.0e15)  # beyond, texels cannot be told apart
    at = wp.int64(wp.clamp(place, -limit, limit))
    end = wp.int64(side)
    if wrap == _CLAMP:
        return int(wp.clamp(at, wp.int64(0), end - wp.int64(1)))
    if wrap == _MIRROR:
        within = at & (end + end - wp.int64(1))  # sides are powers of two
        return int(wp.min(within, end + end - wp.int64(1) - within))
    return int(at & (end - wp.int64(1)))


@func
def _texel(texture: TextureView, place: int) -> Vec3d:
    at = place * texture.channels
    first = wp.float64(texture.texels[at])
    if texture.channels == 1:
        return Vec3d(first, first, first)
    return Vec3d(first, wp.float64(texture.texels[at + 1]), wp.float64(texture.texels[at + 2]))


@func
def _bilinear(texture: TextureView, uv: Vec2d, level: int) -> Vec3d:
    one = wp.float64(1.0)
    side = texture.side >> level
    # All levels before it, of 4 ** -n times the texels each.
    before = wp.int64(texture.side) * wp.int64(texture.side) - wp.int64(side) * wp.int64(side)
    begin = int(before * wp.int64(4) / wp.int64(3))
    x = uv[0] * wp.float64(side) - wp.float64(0.5)
    y = (one - uv[1]) * wp.float64(side) - wp.float64(0.5)
    x0, y0 = wp.floor(x), wp.floor(y)
    right, down = x - x0, y - y0
    left_column = _wrapped(x0, side, texture.wrap)
    right_column = _wrapped(x0 + one, side, texture.wrap)
    top_row = begin + _wrapped(y0, side, texture.wrap) * side
    bottom_row = begin + _wrapped(y0 + one, side, texture.wrap) * side
    a, b = _texel(texture, top_row + left_column), _texel(texture, top_row + right_column)
    c, d = _texel(texture, bottom_row + left_column), _texel(texture, bottom_row + right_column)
    top = (one - right) * a + right * b
    bottom = (one - right) * c + right * d
    return ((one - down) * top + down * bottom) / wp.float64(255.0)


@func
def _sample(texture: TextureView, uv: Vec2d, log_footprint: wp.float64, offset: wp.float64) -> Vec3d:
    """The texture, ones where there is none; log_footprint: of how much of its side one sample covers."""
    one = wp.float64(1.0)
    if texture.channels == 0:
        return Vec3d(one, one, one)
    if texture.linear == 0:
        x = _wrapped(wp.floor(uv[0] * wp.float64(texture.side)), texture.side, texture.wrap)
        y = _wrapped(wp.floor((one - uv[1]) * wp.float64(texture.side)), texture.side, texture.wrap)
        return _texel(texture, y * texture.side + x) / wp.float64(255.0)
    level = log_footprint + wp.float64(texture.last) + offset
    if wp.isfinite(level):
        level = wp.clamp(level, wp.float64(0.0), wp.float64(texture.last))
    else:
        level = wp.float64(0.0)
    lower = int(level)
    share = level - wp.float64(lower)
    value = _bilinear(texture, uv, lower)
    if share > wp.float64(0.0):
        value = (one - share) * value + share * _bilinear(texture, uv, lower + 1)
    return value


@func
def _double(v: Vec3) -> Vec3d:
    return Vec3d(wp.float64(v[0]), wp.float64(v[1]), wp.float64(v[2]))


@func
def _dot(a: Vec3d, b: Vec3d) -> wp.float64:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@func
def _length(v: Vec3) -> float:
    return wp.sqrt(v[0] * v[0] + (v[1] * v[1] + v[2] * v[2]))


@func
def _unit_normal(a: Vec3, b: Vec3, c: Vec3) -> Vec3:
    n = wp.cross(b - a, c - b)
    length = _length(n)
    if length > 0.0:
        return n / length
    return Vec3(0.0, 0.0, 0.0)


@kernel
def _average(
    first: int,
    keys: Int64s,
    ends: Int64s,
    triangles: Ints,
    corners: Vec3s,
    normals: Vec3s,
    uvs: Vec2s,
    colors: Vec4s,
    material: Ints,
    factors: DoubleRows,
    textures: TextureViews,
    size: Vec3,
    height: int,
    depth: int,
    offset: wp.float64,
    values: ByteRows,
) -> None:
    i = first + wp.tid()
    zero, half, one = wp.float64(0.0), wp.float64(0.5), wp.float64(1.0)
    z = keys[i] % wp.int64(depth)
    xy = keys[i] / wp.int64(depth)
    y = xy % wp.int64(height)
    x = xy / wp.int64(height)
    cell = _double(size)
    centre = Vec3d((wp.float64(x) + half) * cell[0], (wp.float64(y) + half) * cell[1], (wp.float64(z) + half) * cell[2])
    largest = wp.max(size[0], wp.max(size[1], size[2]))
    sums = Sums()
    total = wp.float64(0.0)
    begin = wp.int32(0)
    if i > 0:
        begin = int(ends[i - 1])
    for pair in range(begin, int(ends[i])):
        f = triangles[pair]
        p0, p1, p2 = corners[3 * f], corners[3 * f + 1], corners[3 * f + 2]
        uv0, uv1, uv2 = uvs[3 * f], uvs[3 * f + 1], uvs[3 * f + 2]
        # Where the triangle's plane is nearest.
        ab = _double(p1) - _double(p0)
        ac = _double(p2) - _double(p0)
        ap = centre - _double(p0)
        d00, d01, d11 = _dot(ab, ab), _dot(ab, ac), _dot(ac, ac)
        d20, d21 = _dot(ap, ab), _dot(ap, ac)
        area = d00 * d11 - d01 * d01
        at_a, at_b, at_c = one, zero, zero
        if area > zero:
            at_b = (d11 * d20 - d01 * d21) / area
            at_c = (d00 * d21 - d01 * d20) / area
            at_a = one - at_b - at_c
        uv = Vec2d(
            at_a * wp.float64(uv0[0]) + at_b * wp.float64(uv1[0]) + at_c * wp.float64(uv2[0]),
            at_a * wp.float64(uv0[1]) + at_b * wp.float64(uv1[1]) + at_c * wp.float64(uv2[1]),
        )
        normal = (
            at_a * _double(normals[3 * f]) + at_b * _double(normals[3 * f + 1]) + at_c * _double(normals[3 * f + 2])
        )
        # Directions of the texture's sides in space, and how much of it a voxel covers.
        e1, e2 = p1 - p0, p2 - p0
        d1, d2 = uv1 - uv0, uv2 - uv0
        uv_area = d1[0] * d2[1] - d1[1] * d2[0]
        tangent, bitangent = Vec3(1.0, 0.0, 0.0), Vec3(0.0, 1.0, 0.0)
        log_footprint = -wp.float64(wp.inf)
        if wp.abs(uv_area) >= 1.0e-6:
            t = d2[1] * e1 - d1[1] * e2
            b = d1[0] * e2 - d2[0] * e1
            t_length, b_length = _length(t), _length(b)
            tangent = t / t_length
            bitangent = b / b_length
            stretch = wp.sqrt(t_length / uv_area * (b_length / uv_area))
            log_footprint = wp.float64(wp.log2(largest / stretch))

        m = material[f]
        color = Vec3d(zero, zero, zero)
        color_alpha = zero
        for channel in range(4):
            shade = (
                at_a * wp.float64(colors[3 * f][channel])
                + at_b * wp.float64(colors[3 * f + 1][channel])
                + at_c * wp.float64(colors[3 * f + 2][channel])
            )
            shade = wp.clamp(shade, zero, one)
            if channel < 3:
                color[channel] = shade
            else:
                color_alpha = shade
        base = _sample(textures[6 * m], uv, log_footprint, offset)
        metallic = _sample(textures[6 * m + 1], uv, log_footprint, offset)[0] * factors[m, 3]
        roughness = _sample(textures[6 * m + 2], uv, log_footprint, offset)[0] * factors[m, 4]
        emissive = _sample(textures[6 * m + 3], uv, log_footprint, offset)
        alpha = wp.float64(1.0)
        if factors[m, 9] != zero:
            alpha = _sample(textures[6 * m + 4], uv, log_footprint, offset)[0] * (factors[m, 8] * color_alpha)
            if factors[m, 9] == _MASK:
                alpha = wp.where(alpha >= factors[m, 10], one, zero)
        if textures[6 * m + 5].channels > 0:
            mapped = wp.float64(2.0) * _sample(textures[6 * m + 5], uv, log_footprint, offset) - Vec3d(one, one, one)
            normal = mapped[0] * _double(tangent) + mapped[1] * _double(bitangent) + mapped[2] * normal
            normal = normal / wp.max(wp.sqrt(_dot(normal, normal)), wp.float64(1.0e-12))
        weight = wp.max(one - _dot(ap, _double(_unit_normal(p0, p1, p2))), wp.float64(1.0e-3))
        total += weight
        for k in range(3):
            sums[k] += weight * (base[k] * (factors[m, k] * color[k]))
            sums[5 + k] += weight * (emissive[k] * factors[m, 5 + k])
            sums[9 + k] += weight * normal[k]
        sums[3] += weight * metallic
        sums[4] += weight * roughness
        sums[8] += weight * alpha
    for k in range(12):
        value = sums[k] / total
        if k >= 9:
            value = value * half + half
        # Whole numbers stay what they are, whatever the rounding of the mean.
        values[i, k] = wp.uint8(wp.clamp(value * wp.float64(255.0) + wp.float64(1.0e-3), zero, wp.float64(255.0)))
