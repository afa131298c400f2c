"""Solids that the procedural objects are put together from: closed meshes that know what is inside of them.

Object frame as everywhere: z up, the front of an object towards -y.  Lengths have no unit before an object is scaled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

Array = np.ndarray
Point = tuple[float, float, float]


@dataclass(frozen=True)
class Solid:
    """vertices (V, 3) float64; faces (F, 3) int64, counter-clockwise from outside; inside: (P, 3) -> (P,) bool."""

    vertices: Array
    faces: Array
    inside: Callable[[Array], Array]

    def moved(self, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> Solid:
        step = np.array([x, y, z])
        return Solid(self.vertices + step, self.faces, lambda p: self.inside(p - step))

    def scaled(self, x: float, y: float | None = None, z: float | None = None) -> Solid:
        """About the origin; one number for all axes, or three."""
        factor = np.array([x, x if y is None else y, x if z is None else z])
        faces = self.faces if np.prod(factor) > 0 else self.faces[:, ::-1]
        return Solid(self.vertices * factor, faces, lambda p: self.inside(p / factor))

    def turned(self, axis: str, degrees: float) -> Solid:
        """About an axis through the origin, counter-clockwise seen from its tip."""
        turn = rotation(axis, degrees)
        return Solid(self.vertices @ turn.T, self.faces, lambda p: self.inside(p @ turn))

    def mirrored(self) -> Solid:
        """At the plane x = 0."""
        return self.scaled(-1, 1, 1)


def rotation(axis: str, degrees: float) -> Array:
    """(3, 3) matrix that turns column vectors about "x", "y" or "z"."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    turn = np.eye(3)
    turn[i, i], turn[i, j], turn[j, i], turn[j, j] = c, -s, s, c
    return turn


def box(size: Point, center: Point = (0, 0, 0), bevel: float = 0.0) -> Solid:
    """bevel: width of the cut edges, in units of length."""
    half = np.array(size) / 2
    bevel = min(bevel, 0.45 * 2 * float(half.min()))
    outline = [(-half[0], -half[1]), (half[0], -half[1]), (half[0], half[1]), (-half[0], half[1])]
    if bevel <= 0:
        return prism(outline, -half[2], half[2]).moved(*center)

    def ring(inset: float, z: float) -> Array:
        """An octagon: the rectangle with its corners cut, shrunk by ``inset``."""
        x, y, b = half[0] - inset, half[1] - inset, max(bevel - inset, 1e-4 * bevel)
        corners = [
            (x - b, -y), (x, b - y), (x, y - b), (x - b, y), (b - x, y), (-x, y - b), (-x, b - y), (b - x, -y),
        ]  # fmt: skip
        return np.array([(u, v, z) for u, v in corners])

    h = half[2]
    rings = [ring(bevel, -h), ring(0, bevel - h), ring(0, h - bevel), ring(bevel, h)]

    def inside(p: Array) -> Array:
        past = np.abs(p) - (half - bevel)
        pairs = np.maximum(past, 0) + np.maximum(np.roll(past, 1, axis=1), 0)
        return (past < bevel).all(1) & (pairs < bevel).all(1)

    return replace(loft(rings), inside=inside).moved(*center)


def lathe(profile: Sequence[tuple[float, float]], segments: int = 48) -> Solid:
    """A profile of (radius, height) turned about z; it starts and ends on the axis, going up along the outside."""
    outline = np.array(profile, dtype=float)
    angles = np.arange(segments) * 2 * math.pi / segments
    ring = np.stack([np.cos(angles), np.sin(angles), np.zeros(segments)], 1)
    up = np.array([0.0, 0.0, 1.0])
    vertices = (outline[:, None, :1] * ring[None] + outline[:, None, 1:] * up).reshape(-1, 3)
    faces = _bands(len(outline), segments)
    closed = np.concatenate([outline, [[0.0, outline[0, 1]]]])

    def inside(p: Array) -> Array:
        return in_polygon(closed, np.stack([np.hypot(p[:, 0], p[:, 1]), p[:, 2]], 1))

    return Solid(*_cleaned(vertices, faces), inside)


def cylinder(radius: float, z0: float, z1: float, top: float | None = None, segments: int = 40) -> Solid:
    """Upright; ``top``: radius at z1 where it is another."""
    r1 = radius if top is None else top
    return lathe([(0, z0), (radius, z0), (r1, z1), (0, z1)], segments)


def ball(radii: Point, center: Point = (0, 0, 0), steps: int = 24) -> Solid:
    """An ellipsoid."""
    angles = np.linspace(-math.pi / 2, math.pi / 2, steps + 1)
    unit = lathe([(max(math.cos(a), 0.0), math.sin(a)) for a in angles], 2 * steps)
    unit = replace(unit, inside=lambda p: (p * p).sum(1) < 1)
    return unit.scaled(*radii).moved(*center)


def cushion(size: Point, center: Point = (0, 0, 0), square: float = 0.35, steps: int = 20) -> Solid:
    """A superellipsoid: a box whose roundness grows with ``square`` from 0 (box) to 1 (ellipsoid)."""

    def power(x: Array) -> Array:
        return np.sign(x) * np.abs(x) ** square

    # Latitudes and longitudes denser where the curve turns.
    turn = np.linspace(-1, 1, 2 * steps + 1)
    latitude = turn * math.pi / 2
    longitude = np.arange(4 * steps) * 2 * math.pi / (4 * steps)
    c, s = power(np.cos(latitude)), power(np.sin(latitude))
    c[[0, -1]] = 0
    x = c[:, None] * power(np.cos(longitude))
    y = c[:, None] * power(np.sin(longitude))
    z = np.repeat(s[:, None], len(longitude), 1)
    vertices = np.stack([x, y, z], -1).reshape(-1, 3)
    faces = _bands(len(latitude), len(longitude))
    unit = Solid(*_cleaned(vertices, faces), lambda p: (np.abs(p) ** (2 / square)).sum(1) < 1)
    return unit.scaled(*(s / 2 for s in size)).moved(*center)


def prism(outline: Sequence[tuple[float, float]], z0: float, z1: float) -> Solid:
    """A polygon without holes (x, y), counter-clockwise, from z0 up to z1."""
    polygon = np.array(outline, dtype=float)
    if _area(polygon) < 0:
        polygon = polygon[::-1]
    n = len(polygon)
    low = np.concatenate([polygon, np.full((n, 1), z0)], 1)
    high = np.concatenate([polygon, np.full((n, 1), z1)], 1)
    flat = _triangulated(polygon)
    i = np.arange(n)
    j = (i + 1) % n
    sides = np.concatenate([np.stack([i, j, j + n], 1), np.stack([i, j + n, i + n], 1)])
    faces = np.concatenate([flat[:, ::-1], flat + n, sides])

    def inside(p: Array) -> Array:
        within = (p[:, 2] > z0) & (p[:, 2] < z1)
        within[within] = in_polygon(polygon, p[within, :2])
        return within

    return Solid(np.concatenate([low, high]), faces, inside)


def tube(path: Sequence[Point], radius: float | Sequence[float], closed: bool = False, segments: int = 14) -> Solid:
    """A round rod along a polyline, of one radius or one at each point, with flat ends."""
    points = np.array(path, dtype=float)
    n = len(points)
    radii = np.full(n, radius, dtype=float) if isinstance(radius, (int, float)) else np.array(radius, dtype=float)
    ahead = np.roll(points, -1, 0) - points
    behind = points - np.roll(points, 1, 0)
    if not closed:
        ahead[-1], behind[0] = behind[-1], ahead[0]
    along = _unit(_unit(ahead) + _unit(behind))
    side = np.zeros_like(points)
    start = np.eye(3)[np.abs(along[0]).argmin()]
    for k in range(n):  # carry one direction along the path without twisting it
        start = start - along[k] * (start @ along[k])
        start = start / np.linalg.norm(start)
        side[k] = start
    up = np.cross(along, side)
    angles = np.arange(segments) * 2 * math.pi / segments
    rings = points[:, None] + radii[:, None, None] * (
        np.cos(angles)[None, :, None] * side[:, None] + np.sin(angles)[None, :, None] * up[:, None]
    )

    def inside(p: Array) -> Array:
        result = np.zeros(len(p), bool)
        near = ((p > points.min(0) - radii.max()) & (p < points.max(0) + radii.max())).all(1)
        q = p[near]
        hit = np.zeros(len(q), bool)
        for k in range(n if closed else n - 1):
            a, b = points[k], points[(k + 1) % n]
            raw = (q - a) @ (b - a) / max(float((b - a) @ (b - a)), 1e-12)
            t = np.clip(raw, 0, 1)
            r = radii[k] + t * (radii[(k + 1) % n] - radii[k])
            close = np.linalg.norm(q - a - t[:, None] * (b - a), axis=1) < r
            if not closed:  # joints are round, ends are flat
                close &= (raw >= 0) | (k > 0)
                close &= (raw <= 1) | (k < n - 2)
            hit |= close
        result[near] = hit
        return result

    if not closed:
        return replace(loft(list(rings)), inside=inside)
    vertices = rings.reshape(-1, 3)
    faces = _bands(n, segments)
    i = np.arange(segments)
    j = (i + 1) % segments
    a, b = (n - 1) * segments, 0
    seam = np.concatenate([np.stack([a + i, a + j, b + j], 1), np.stack([a + i, b + j, b + i], 1)])
    return Solid(vertices, np.concatenate([faces, seam]), inside)


def loft(rings: Sequence[Array]) -> Solid:
    """A skin over rings (n, 3) with equally many points, each counter-clockwise seen from the last ring; flat ends.

    Its ``inside`` says no everywhere; callers who know better replace it.
    """
    n = len(rings[0])
    vertices = np.concatenate(list(rings))
    caps = []
    for ring, flip in ((0, True), (len(rings) - 1, False)):
        first = ring * n
        fan = np.stack([np.full(n - 2, first), first + np.arange(1, n - 1), first + np.arange(2, n)], 1)
        caps.append(fan[:, ::-1] if flip else fan)
    return Solid(*_cleaned(vertices, np.concatenate([_bands(len(rings), n), *caps])), lambda p: np.zeros(len(p), bool))


def rod(a: Point, b: Point, radius: float, end: float | None = None, segments: int = 14) -> Solid:
    """A straight round rod from a to b; ``end``: radius at b where it is another."""
    return tube([a, b], [radius, radius if end is None else end], segments=segments)


def arc(radius: float, start: float, stop: float, steps: int = 20) -> list[tuple[float, float]]:
    """Points (x, y) on a circle about the origin, angles in degrees."""
    return [(radius * math.cos(a), radius * math.sin(a)) for a in np.radians(np.linspace(start, stop, steps + 1))]


def curve(points: Sequence[tuple[float, ...]], steps: int = 8) -> list[tuple[float, ...]]:
    """A smooth line through points (Catmull and Rom 1974), ``steps`` pieces between neighbours."""
    p = np.array(points, dtype=float)
    p = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    out = []
    for k in range(1, len(p) - 2):
        a, b, c, d = p[k - 1 : k + 3]
        for t in np.arange(steps) / steps:
            out.append(
                0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
            )
    out.append(p[-2])
    return [tuple(float(v) for v in row) for row in out]


def in_polygon(polygon: Array, points: Array) -> Array:
    """Whether points (P, 2) lie inside of a polygon (n, 2), by the even-odd rule."""
    result = np.zeros(len(points), bool)
    x, y = points[:, 0], points[:, 1]
    for a, b in zip(polygon, np.roll(polygon, -1, 0), strict=True):
        if a[1] == b[1]:
            continue
        crosses = (a[1] > y) != (b[1] > y)
        result ^= crosses & (x < a[0] + (y - a[1]) / (b[1] - a[1]) * (b[0] - a[0]))
    return result


def _bands(rings: int, points: int) -> Array:
    """Faces between neighbouring closed rings of ``points`` vertices."""
    i = np.arange(points)
    j = (i + 1) % points
    faces = []
    for k in range(rings - 1):
        a, b = k * points, (k + 1) * points
        faces += [np.stack([a + i, a + j, b + j], 1), np.stack([a + i, b + j, b + i], 1)]
    return np.concatenate(faces)


def _cleaned(vertices: Array, faces: Array) -> tuple[Array, Array]:
    """Drop the faces that have no area: where a ring is a point."""
    corners = vertices[faces]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    return vertices, faces[area > 1e-12]


def _area(polygon: Array) -> float:
    x, y = polygon.T
    return 0.5 * float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum())


def _triangulated(polygon: Array) -> Array:
    """Triangles (n - 2, 3) of a simple counter-clockwise polygon, by cutting ears."""
    left = list(range(len(polygon)))
    faces = []

    def cross(a: int, b: int, c: int) -> float:
        u, v = polygon[b] - polygon[a], polygon[c] - polygon[b]
        return float(u[0] * v[1] - u[1] * v[0])

    while len(left) > 3:
        for k in range(len(left)):
            a, b, c = left[k - 1], left[k], left[(k + 1) % len(left)]
            if cross(a, b, c) <= 1e-14:
                continue
            others = [i for i in left if i not in (a, b, c)]
            if not any(cross(a, b, i) >= 0 and cross(b, c, i) >= 0 and cross(c, a, i) >= 0 for i in others):
                break
        else:
            k = 0  # only collinear points are left
            a, b, c = left[-1], left[0], left[1]
        faces.append((a, b, c))
        left.pop(k)
    return np.array([*faces, tuple(left)])


def _unit(vectors: Array) -> Array:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
