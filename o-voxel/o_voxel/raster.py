"""Rasterising a mesh into its own texture."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_faces, check_points
from .launch import Int64s, Ints, Triangles, Vec2d, Vec2s, Vec3s, func, kernel, launch, shared, wp

# Corners are snapped to 1/256 texel, as GPUs do: then all tests of inside and outside are exact in float64, and
# faces that share an edge leave no gap between them.
_SNAP = 256.0
_BAND = 256  # rows; faces are visited once for each band of rows they might touch
_NEAR = 2.0**20  # steps of squared distance that tell apart the faces next to a texel


def rasterize_uv(uvs: Tensor, faces: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Which face each texel of a ``size`` x ``size`` texture shows, and where on that face.

    uvs: (V, 2) float in [0, 1], (0, 0) at the outer corner of texel (0, 0); row 0 is v = 0. faces: (F, 3) int.
    A texel belongs to the face that holds its centre, edges included; of several, to the one with the smallest
    index. A texel whose centre no face holds, but some face passes within one texel, belongs to the nearest such
    face: so bilinear look-ups inside a chart meet only texels of that surface, and a face too thin to hold any
    centre still gets texels.
    Returns (face_id (S, S) int32, -1 where no face is near; barycentric (S, S, 3) float32: the weights of the
    face's corners at the centre of the texel or, for a nearby face, at its closest point; 0 where none).
    Equal input gives equal bits. Raises ValueError naming the argument.
    """
    _check(uvs, faces, size)
    device = uvs.device
    face_id = torch.empty(size * size, dtype=torch.int32, device=device)
    barycentric = torch.zeros((size * size, 3), dtype=torch.float32, device=device)
    corners = shared(uvs.float().contiguous(), wp.vec2)
    triangles = shared(faces.int().contiguous(), wp.vec3i)
    best = torch.full((size * size,), torch.iinfo(torch.int64).max, dtype=torch.int64, device=device)
    keys = shared(best, wp.int64)
    count = len(faces)
    bands = -(-size // _BAND)
    # A band stays in one thread: minima are atomic on a GPU only.
    launch(_cover, bands * count, [corners, triangles, count, size, keys], device, together=max(count, 1))
    results = [shared(face_id, wp.int32), shared(barycentric, wp.vec3)]
    launch(_locate, size * size, [corners, triangles, size, keys, *results], device)
    return face_id.view(size, size), barycentric.view(size, size, 3)


def rasterize_uv_reference(uvs: Tensor, faces: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """``rasterize_uv`` by comparing every texel with every face in torch: for tests."""
    _check(uvs, faces, size)
    corners = (uvs.double() * size * _SNAP).round() / _SNAP - 0.5
    v, u = torch.meshgrid(torch.arange(size).double(), torch.arange(size).double(), indexing="ij")
    texel = torch.stack([u, v], -1).reshape(-1, 1, 2)
    a, b, c = corners[faces.long()].unbind(1)

    def turn(p: Tensor, q: Tensor, r: Tensor) -> Tensor:
        return (q[..., 0] - p[..., 0]) * (r[..., 1] - p[..., 1]) - (q[..., 1] - p[..., 1]) * (r[..., 0] - p[..., 0])

    area = turn(a, b, c)
    sides = torch.stack([turn(b, c, texel), turn(c, a, texel), turn(a, b, texel)], -1) * area.sign()[:, None]
    inside = (sides >= 0).all(-1) & (area != 0)
    weights = sides / area.abs().clamp_min(1e-300)[:, None]
    nearest = torch.full(inside.shape, torch.inf, dtype=torch.float64)
    for first, (p, q) in enumerate(((a, b), (b, c), (c, a))):
        along = q - p
        t = (((texel - p) * along).sum(-1) / (along * along).sum(-1).clamp_min(1e-300)).clamp(0, 1)
        distance = ((texel - p - t[..., None] * along) ** 2).sum(-1)
        edge = torch.stack([1 - t, t, torch.zeros_like(t)], -1).roll(first, -1)
        closer = ~inside & (distance < nearest)
        nearest = torch.where(closer, distance, nearest)
        weights = torch.where(closer[..., None], edge, weights)
    key = torch.where(inside, 0, (nearest * _NEAR).floor() + 1)
    key = torch.where(inside | (nearest <= 1), key, torch.inf)
    lowest, face = key.min(dim=1)
    found = lowest.isfinite()
    chosen = weights[torch.arange(len(face)), face] * found[:, None]
    face_id = torch.where(found, face, -1).int()
    return face_id.view(size, size), chosen.float().view(size, size, 3)


def _check(uvs: Tensor, faces: Tensor, size: int) -> None:
    check_points("uvs", uvs, width=2)
    check_faces(faces, len(uvs))
    if size < 1:
        raise ValueError(f"size={size} must be positive.")
    if len(uvs) and (float(uvs.min()) < 0 or float(uvs.max()) > 1):
        raise ValueError("uvs must lie in [0, 1].")


@func
def _corner(uvs: Vec2s, index: int, size: int) -> Vec2d:
    """In texels, so that centres have whole coordinates."""
    scale = wp.float64(size) * wp.float64(_SNAP)
    half = wp.float64(0.5)
    u = wp.rint(wp.float64(uvs[index][0]) * scale) / wp.float64(_SNAP) - half
    v = wp.rint(wp.float64(uvs[index][1]) * scale) / wp.float64(_SNAP) - half
    return wp.vec2d(u, v)


@func
def _turn(a: Vec2d, b: Vec2d, c: Vec2d) -> wp.float64:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


@func
def _inside(a: Vec2d, b: Vec2d, c: Vec2d, p: Vec2d) -> bool:
    area = _turn(a, b, c)
    zero = wp.float64(0.0)
    if area == zero:
        return False
    if area < zero:
        return _turn(b, c, p) <= zero and _turn(c, a, p) <= zero and _turn(a, b, p) <= zero
    return _turn(b, c, p) >= zero and _turn(c, a, p) >= zero and _turn(a, b, p) >= zero


@func
def _on_segment(a: Vec2d, b: Vec2d, p: Vec2d) -> Vec2d:
    """(share of b, squared distance) of the point of segment a-b that is closest to p."""
    along = b - a
    length = wp.max(wp.dot(along, along), wp.float64(1.0e-300))
    t = wp.clamp(wp.dot(p - a, along) / length, wp.float64(0.0), wp.float64(1.0))
    away = p - a - along * t
    return wp.vec2d(t, wp.dot(away, away))


@kernel
def _cover(first: int, uvs: Vec2s, faces: Triangles, count: int, size: int, best: Int64s) -> None:
    i = first + wp.tid()
    face = i % count
    band = i // count
    a = _corner(uvs, faces[face][0], size)
    b = _corner(uvs, faces[face][1], size)
    c = _corner(uvs, faces[face][2], size)
    one = wp.float64(1.0)
    low = wp.min(wp.min(a, b), c)
    high = wp.max(wp.max(a, b), c)
    left = wp.max(int(wp.ceil(low[0] - one)), 0)
    right = wp.min(int(wp.floor(high[0] + one)), size - 1)
    top = wp.max(int(wp.ceil(low[1] - one)), band * _BAND)
    bottom = wp.min(wp.min(int(wp.floor(high[1] + one)), size - 1), band * _BAND + _BAND - 1)
    for row in range(top, bottom + 1):
        for column in range(left, right + 1):
            p = wp.vec2d(wp.float64(column), wp.float64(row))
            rank = wp.int64(0)
            if not _inside(a, b, c, p):
                ab = _on_segment(a, b, p)
                bc = _on_segment(b, c, p)
                ca = _on_segment(c, a, p)
                distance = wp.min(wp.min(ab[1], bc[1]), ca[1])
                rank = wp.int64(-1)
                if distance <= one:
                    rank = wp.int64(distance * wp.float64(_NEAR)) + wp.int64(1)
            if rank >= wp.int64(0):
                wp.atomic_min(best, row * size + column, rank * wp.int64(4294967296) + wp.int64(face))


@kernel
def _locate(first: int, uvs: Vec2s, faces: Triangles, size: int, best: Int64s, face_id: Ints, weights: Vec3s) -> None:
    i = first + wp.tid()
    key = best[i]
    if key == wp.int64(9223372036854775807):
        face_id[i] = -1
        return
    face = int(key % wp.int64(4294967296))
    face_id[i] = face
    a = _corner(uvs, faces[face][0], size)
    b = _corner(uvs, faces[face][1], size)
    c = _corner(uvs, faces[face][2], size)
    p = wp.vec2d(wp.float64(i % size), wp.float64(i // size))
    if key < wp.int64(4294967296):
        area = _turn(a, b, c)
        weights[i] = wp.vec3(
            wp.float32(_turn(b, c, p) / area),
            wp.float32(_turn(c, a, p) / area),
            wp.float32(_turn(a, b, p) / area),
        )
        return
    ab = _on_segment(a, b, p)
    bc = _on_segment(b, c, p)
    ca = _on_segment(c, a, p)
    if ab[1] <= bc[1] and ab[1] <= ca[1]:
        weights[i] = wp.vec3(1.0 - wp.float32(ab[0]), wp.float32(ab[0]), 0.0)
    elif bc[1] <= ca[1]:
        weights[i] = wp.vec3(0.0, 1.0 - wp.float32(bc[0]), wp.float32(bc[0]))
    else:
        weights[i] = wp.vec3(wp.float32(ca[0]), 0.0, 1.0 - wp.float32(ca[0]))
