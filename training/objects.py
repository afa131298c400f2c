"""The procedural objects: families of things, each drawn from a seed.

A family is a function of a random generator that returns parts.  Parts of one object are in the family's own units, z
up, front towards -y; ``make`` centres them and scales them into the cube of the pipeline.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .materials import (
    Material,
    any_color,
    bright,
    dark,
    dots,
    glass,
    gradient,
    green,
    grey,
    metal,
    pale,
    patterned,
    plain,
    stripes,
    wood,
)
from .shapes import Array, Solid, arc, ball, box, curve, cushion, cylinder, in_polygon, lathe, loft, prism, rod, tube

Rng = np.random.Generator


@dataclass(frozen=True)
class Part:
    solid: Solid
    material: Material


@dataclass(frozen=True)
class Thing:
    """An object in the frame of the pipeline, inside [-0.5, 0.5]^3.

    scale, shift: what took its parts there, p * scale + shift; materials are functions of p / size, in its own units.
    """

    family: str
    seed: int
    parts: list[Part]
    scale: float
    shift: Array
    size: float

    def mesh(self) -> tuple[Array, Array, Array]:
        """vertices (V, 3) float32, faces (F, 3) int32, part of each face (F,)."""
        vertices, faces, owner, start = [], [], [], 0
        for index, part in enumerate(self.parts):
            vertices.append(part.solid.vertices * self.scale + self.shift)
            faces.append(part.solid.faces + start)
            owner.append(np.full(len(part.solid.faces), index))
            start += len(part.solid.vertices)
        return (
            np.concatenate(vertices).astype(np.float32),
            np.concatenate(faces).astype(np.int32),
            np.concatenate(owner),
        )

    def hidden(self, points: Array, owner: Array) -> Array:
        """Whether points (P, 3) lie inside of an opaque part other than ``owner`` (P,), which may be -1 for none."""
        local = (points - self.shift) / self.scale
        columns = np.ascontiguousarray(local.T)
        result = np.zeros(len(points), bool)
        for index, part in enumerate(self.parts):
            if part.material.alpha < 1:
                continue
            within = owner != index
            box = part.solid.vertices.min(0), part.solid.vertices.max(0)
            for x, low, high in zip(columns, *box, strict=True):
                within &= (x > low) & (x < high)
            near = np.flatnonzero(within & ~result)
            result[near] = part.solid.inside(local[near])
        return result

    def material(self, points: Array, owner: Array) -> Array:
        """(P, 6) of points on the surface of parts ``owner`` (P,)."""
        local = (points - self.shift) / self.scale / self.size
        out = np.empty((len(points), 6), np.float32)
        for index in np.unique(owner):
            rows = owner == index
            out[rows] = self.parts[index].material.at(local[rows])
        return np.clip(out, 0, 1)


def make(family: str, seed: int, extent: float = 0.9, cells: int = 1450) -> Thing:
    """Draw an object.

    extent: of the longest side of its box. cells: it is made smaller until its surface touches no more than about
    this many of 32^3 cells, which are the tokens of the flows.
    """
    rng = np.random.default_rng([seed, _index(family)])
    parts = FAMILIES[family](rng)
    corners = np.concatenate([part.solid.vertices for part in parts])
    low, high = corners.min(0), corners.max(0)
    size = float((high - low).max())
    shift = -(low + high) / 2
    thing = Thing(family, seed, parts, 1.0, np.zeros(3), size)
    samples = _visible_samples(thing, np.random.default_rng(seed))
    scale = extent / size
    for _ in range(12):
        places = np.floor(((samples + shift) * scale + 0.5) * 32).astype(int)
        count = len(np.unique(places @ np.array([1, 64, 4096])))
        if count <= cells:
            break
        scale *= max((cells / count) ** 0.5, 0.8)
    return Thing(family, seed, parts, scale, shift * scale, size)


def _visible_samples(thing: Thing, rng: Rng) -> Array:
    vertices, faces, owner = thing.mesh()
    corners = vertices[faces].astype(float)
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    face = rng.choice(len(faces), 30000, p=area / area.sum())
    u, v = np.sqrt(rng.random(30000)), rng.random(30000)
    weights = np.stack([1 - u, u * (1 - v), u * v], 1)
    points = (corners[face] * weights[:, :, None]).sum(1)
    return points[~thing.hidden(points, owner[face])]


def _index(family: str) -> int:
    return sum(ord(c) * 131**i for i, c in enumerate(family)) % 2**31


# ---------------------------------------------------------------------------------------------------------------
# furniture


def _frame_material(rng: Rng) -> Material:
    return (wood, wood, metal, plain)[rng.integers(4)](rng)


def _legs(rng: Rng, width: float, depth: float, height: float, material: Material, splay: float = 0.0) -> list[Part]:
    """Four legs below z = height, at the corners of a rectangle."""
    thick = rng.uniform(0.03, 0.055)
    square = rng.random() < 0.5
    parts = []
    for sx in (-1, 1):
        for sy in (-1, 1):
            top = (sx * (width / 2 - thick), sy * (depth / 2 - thick), height)
            foot = (top[0] + sx * splay, top[1] + sy * splay, 0.0)
            if square and splay == 0:
                solid = box((2 * thick, 2 * thick, height), (top[0], top[1], height / 2))
            else:
                solid = rod(foot, top, thick * 0.7, thick)
            parts.append(Part(solid, material))
    return parts


def chair(rng: Rng) -> list[Part]:
    frame = _frame_material(rng)
    seat_material = frame if rng.random() < 0.4 else patterned(rng)
    width, depth, height = rng.uniform(0.75, 1.0), rng.uniform(0.75, 0.95), rng.uniform(0.75, 1.0)
    thick = rng.uniform(0.07, 0.12)
    parts = _legs(rng, width, depth, height, frame, rng.choice([0.0, 0.0, 0.08]))
    if rng.random() < 0.5:
        parts.append(Part(box((width, depth, thick), (0, 0, height), 0.02), seat_material))
    else:
        parts.append(Part(cushion((width, depth, thick * 1.6), (0, 0, height)), seat_material))
    tall = rng.uniform(0.8, 1.15)
    lean = rng.uniform(0.02, 0.15)
    back = depth / 2 - 0.05
    kind = rng.integers(4)
    if kind == 0:  # one panel
        solid = box((width, 0.08, tall), (0, 0, tall / 2), 0.02).turned("x", -math.degrees(lean))
        parts.append(Part(solid.moved(0, back, height), seat_material))
    else:
        for sx in (-1, 1):
            x = sx * (width / 2 - 0.05)
            parts.append(Part(rod((x, back, height - 0.05), (x, back + lean * tall, height + tall), 0.045), frame))
        top = box((width, 0.07, 0.16), (0, back + lean * tall * 0.93, height + tall * 0.93), 0.02)
        parts.append(Part(top, frame if kind == 1 else seat_material))
        if kind == 1:  # slats across
            for t in np.linspace(0.3, 0.7, rng.integers(1, 4)):
                parts.append(Part(box((width - 0.1, 0.05, 0.1), (0, back + lean * tall * t, height + tall * t)), frame))
        elif kind == 2:  # spindles
            for x in np.linspace(-width / 2 + 0.18, width / 2 - 0.18, rng.integers(3, 6)):
                parts.append(
                    Part(rod((x, back, height), (x, back + lean * tall * 0.9, height + tall * 0.9), 0.025), frame)
                )
        else:  # upholstered
            solid = cushion((width - 0.1, 0.12, tall * 0.6), (0, 0, 0)).turned("x", -math.degrees(lean))
            parts.append(Part(solid.moved(0, back + lean * tall * 0.55, height + tall * 0.55), seat_material))
    if rng.random() < 0.3:  # arms
        for sx in (-1, 1):
            x, z = sx * (width / 2), height + rng.uniform(0.3, 0.4)
            parts.append(Part(box((0.09, depth, 0.06), (x, 0, z), 0.015), frame))
            parts.append(Part(rod((x, -depth / 2 + 0.08, height), (x, -depth / 2 + 0.08, z), 0.035), frame))
    return parts


def stool(rng: Rng) -> list[Part]:
    frame = _frame_material(rng)
    seat = frame if rng.random() < 0.3 else patterned(rng)
    height, radius = rng.uniform(0.8, 1.5), rng.uniform(0.38, 0.5)
    thick = rng.uniform(0.08, 0.16)
    parts = [
        Part(
            lathe([(0, 0), (radius, 0), (radius * 1.03, thick / 2), (radius * 0.97, thick), (0, thick)]).moved(
                z=height
            ),
            seat,
        )
    ]
    count = rng.integers(3, 5)
    if rng.random() < 0.25:  # one column
        parts.append(Part(cylinder(0.07, 0.05, height), frame))
        parts.append(Part(cylinder(radius, 0, 0.08, radius * 0.9), frame))
        return parts
    reach, thin = rng.uniform(0.85, 1.15) * radius, rng.uniform(0.035, 0.055)
    ring = rng.random() < 0.7
    for k in range(count):
        a = 2 * math.pi * (k + 0.5) / count - math.pi / 2
        top = (0.7 * radius * math.cos(a), 0.7 * radius * math.sin(a), height)
        parts.append(Part(rod((reach * math.cos(a), reach * math.sin(a), 0), top, thin), frame))
    if ring:
        r, z = reach + (0.7 * radius - reach) * 0.35, height * 0.35
        parts.append(Part(tube([(x, y, z) for x, y in arc(r, 0, 345, 23)], 0.025, closed=True), frame))
    return parts


def table(rng: Rng) -> list[Part]:
    frame = _frame_material(rng)
    top = frame if rng.random() < 0.5 else (patterned(rng) if rng.random() < 0.8 else glass(rng))
    width, depth, height = rng.uniform(1.1, 1.8), rng.uniform(0.8, 1.1), rng.uniform(0.6, 0.95)
    thick = rng.uniform(0.06, 0.1)
    if rng.random() < 0.4:  # round
        radius = depth / 2 + 0.1
        parts = [Part(cylinder(radius, height, height + thick), top)]
        if rng.random() < 0.6:
            parts += [Part(cylinder(0.08, 0.04, height), frame), Part(cylinder(radius * 0.6, 0, 0.07, 0.1), frame)]
        else:
            parts += _legs(rng, 1.3 * radius, 1.3 * radius, height, frame, 0.06)
        return parts
    parts = [Part(box((width, depth, thick), (0, 0, height + thick / 2), 0.015), top)]
    parts += _legs(rng, width - 0.08, depth - 0.08, height, frame, rng.choice([0.0, 0.0, 0.07]))
    if rng.random() < 0.5:
        parts.append(Part(box((width - 0.2, depth - 0.2, 0.12), (0, 0, height - 0.06)), frame))
    if rng.random() < 0.3:
        parts.append(Part(box((width - 0.1, depth - 0.1, 0.05), (0, 0, height * 0.25)), frame))
    return parts


def bench(rng: Rng) -> list[Part]:
    boards, frame = wood(rng) if rng.random() < 0.6 else patterned(rng), _frame_material(rng)
    width, depth, height = rng.uniform(1.6, 2.2), rng.uniform(0.5, 0.6), rng.uniform(0.45, 0.55)
    count = rng.integers(3, 5)
    parts = []
    for y in np.linspace(-depth / 2, depth / 2, count):
        parts.append(Part(box((width, depth / count * 0.75, 0.06), (0, y, height), 0.01), boards))
    for sx in (-1, 1):
        x = sx * width * 0.38
        parts.append(Part(box((0.09, depth, 0.07), (x, 0, height - 0.06)), frame))
        for y in (-depth / 2 + 0.05, depth / 2 - 0.05):
            parts.append(Part(box((0.09, 0.09, height), (x, y, height / 2)), frame))
    if rng.random() < 0.7:
        tall = rng.uniform(0.45, 0.6)
        for sx in (-1, 1):
            parts.append(Part(box((0.08, 0.08, tall), (sx * width * 0.38, depth / 2 + 0.06, height + tall / 2)), frame))
        for t in np.linspace(0.4, 0.9, rng.integers(2, 4)):
            parts.append(Part(box((width, 0.05, 0.11), (0, depth / 2 + 0.01, height + tall * t), 0.01), boards))
    return parts


def shelf(rng: Rng) -> list[Part]:
    case = wood(rng) if rng.random() < 0.6 else plain(rng)
    width, depth, height = rng.uniform(0.8, 1.2), rng.uniform(0.3, 0.45), rng.uniform(1.1, 1.8)
    rows = int(rng.integers(2, 5))
    t = 0.05
    parts = [Part(box((t, depth, height), (s * (width - t) / 2, 0, height / 2)), case) for s in (-1, 1)]
    levels = np.linspace(t / 2 + 0.05, height - t / 2, rows + 1)
    parts += [Part(box((width - t, depth, t), (0, 0, z)), case) for z in levels]
    if rng.random() < 0.7:
        parts.append(Part(box((width - t, 0.03, height - 0.06), (0, depth / 2 - 0.02, height / 2)), case))
    for z, above in itertools.pairwise(levels):
        x, gap = -width / 2 + t, above - z - t
        x += rng.uniform(0, 0.2)
        while rng.random() < 0.85:  # books
            w, h = rng.uniform(0.06, 0.12), gap * rng.uniform(0.55, 0.9)
            if x + w > width / 2 - t:
                break
            parts.append(
                Part(box((w * 0.96, depth * 0.75, h), (x + w / 2, -0.01, z + t / 2 + h / 2)), plain(rng, bright(rng)))
            )
            x += w
    return parts


def lamp(rng: Rng) -> list[Part]:
    stand = (metal, wood, plain)[rng.integers(3)](rng)
    shade = patterned(rng, pale(rng) if rng.random() < 0.6 else None)
    height, radius = rng.uniform(0.5, 1.3), rng.uniform(0.28, 0.45)
    parts = [Part(lathe([(0, 0), (rng.uniform(0.2, 0.3), 0), (0.2, 0.05), (0.05, 0.08), (0, 0.08)]), stand)]
    if rng.random() < 0.4:  # a bellied foot
        belly = rng.uniform(0.12, 0.2)
        profile = curve([(0.08, 0.05), (belly, 0.05 + 0.25 * height), (0.06, 0.6 * height), (0.03, height)])
        parts.append(Part(lathe([(0, 0.05), *profile, (0, height)]), stand))
    else:
        parts.append(Part(cylinder(rng.uniform(0.025, 0.045), 0.05, height + 0.05), stand))
    top = radius * rng.uniform(0.45, 1.0)
    tall = rng.uniform(0.35, 0.55)
    wall = 0.03
    ring = [(radius - wall, height), (radius, height), (top, height + tall), (top - wall, height + tall)]
    parts.append(Part(_turned_ring(ring), shade))
    parts.append(
        Part(ball((0.09, 0.09, 0.11), (0, 0, height + tall * 0.45)), Material((1.0, 0.95, 0.8), roughness=0.3))
    )
    parts.append(Part(rod((0, 0, height), (0, 0, height + tall * 0.4), 0.025), stand))
    return parts


def _turned_ring(outline: list[tuple[float, float]], segments: int = 48) -> Solid:
    """A closed outline (radius, height), up along its outside, turned about z."""
    closed = [*outline, outline[0]]
    solid = lathe(closed, segments)
    polygon = np.array(outline)
    return replace(solid, inside=lambda p: in_polygon(polygon, np.stack([np.hypot(p[:, 0], p[:, 1]), p[:, 2]], 1)))


# ---------------------------------------------------------------------------------------------------------------
# vessels


def _ceramic(rng: Rng) -> Material:
    return (patterned, patterned, patterned, metal)[rng.integers(4)](rng)


def _hollow(outer: list[tuple[float, float]], wall: float, floor: float) -> list[tuple[float, float]]:
    """Profile of a vessel from that of its outside (upwards), with walls of about ``wall``."""
    inner = [(max(r - wall, 0.01), z) for r, z in outer if z > floor]
    return [(0, outer[0][1]), *outer, *reversed(inner), (inner[0][0], floor), (0, floor)]


def mug(rng: Rng) -> list[Part]:
    material = _ceramic(rng)
    height, radius = rng.uniform(0.8, 1.15), rng.uniform(0.36, 0.5)
    waist = rng.uniform(-0.05, 0.06)
    base = radius * rng.uniform(0.75, 1.0)
    outer = curve([(base, 0.0), ((base + radius) / 2 + waist, height / 2), (radius, height)])
    parts = [Part(lathe(_hollow(outer, 0.05, 0.07)), material)]
    reach, thick = rng.uniform(0.22, 0.32), rng.uniform(0.04, 0.065)
    low, high = 0.2 * height, 0.82 * height
    if rng.random() < 0.7:
        path = [
            (radius - 0.04, 0, high),
            (radius + reach * 0.8, 0, high),
            (radius + reach, 0, (low + high) / 2),
            (radius + reach * 0.6, 0, low),
            (base - 0.02, 0, low),
        ]
        handle = tube(curve(path), thick)
    else:
        c, r = (low + high) / 2, (high - low) / 2
        handle = tube([(radius - 0.03 + 0.9 * reach / r * x, 0, c + z) for x, z in arc(r, -90, 90, 16)], thick)
    side = rng.choice([0.0, 180.0, 0.0, 180.0, rng.uniform(-60, 240)])
    other = material if rng.random() < 0.6 else plain(rng)
    parts.append(Part(handle.turned("z", side), other))
    if rng.random() < 0.4:  # something to drink
        drink = Material([(0.2, 0.1, 0.05), (0.55, 0.35, 0.2), (0.6, 0.75, 0.4)][rng.integers(3)], roughness=0.2)
        parts.append(Part(cylinder(min(base, radius) - 0.045, 0.75 * height, 0.78 * height), drink))
    return parts


def bottle(rng: Rng) -> list[Part]:
    clear = rng.random() < 0.35
    body = glass(rng) if clear else patterned(rng)
    height, radius = rng.uniform(1.0, 1.3), rng.uniform(0.24, 0.36)
    neck, shoulder = rng.uniform(0.08, 0.13), rng.uniform(0.5, 0.7)
    round_ = rng.uniform(0.02, 0.06)
    outer = [(radius - round_, 0.0), (radius, round_), (radius, shoulder * height)]
    outer += curve(
        [(radius, shoulder * height), (radius * 0.75, (shoulder + 0.12) * height), (neck, (shoulder + 0.22) * height)]
    )[1:]
    outer += [(neck, height)]
    profile = _hollow(outer, 0.03, 0.06) if clear else [(0, 0), *outer, (0, height)]
    parts = [Part(lathe(profile), body)]
    parts.append(Part(cylinder(neck * 1.2, height - 0.02, height + rng.uniform(0.06, 0.12)), plain(rng, bright(rng))))
    if rng.random() < 0.6:
        low, high = rng.uniform(0.1, 0.2), rng.uniform(0.35, 0.48)
        ring = [(radius - 0.01, low), (radius + 0.012, low), (radius + 0.012, high), (radius - 0.01, high)]
        parts.append(Part(_turned_ring(ring), patterned(rng, pale(rng))))
    return parts


def vase(rng: Rng) -> list[Part]:
    height = rng.uniform(0.9, 1.3)
    radii = rng.uniform([0.18, 0.25, 0.12, 0.16], [0.3, 0.45, 0.3, 0.32])
    outer = curve(list(zip(radii, np.array([0.0, 0.4, 0.82, 1.0]) * height, strict=True)), 12)
    parts = [Part(lathe(_hollow(outer, 0.035, 0.06)), _ceramic(rng))]
    if rng.random() < 0.35:  # flowers
        for _ in range(rng.integers(2, 6)):
            a, reach = rng.uniform(0, 2 * math.pi), rng.uniform(0.1, 0.35)
            tip = (reach * math.cos(a), reach * math.sin(a), height + rng.uniform(0.2, 0.55))
            stem = curve([(0, 0, 0.3), (0.2 * tip[0], 0.2 * tip[1], height), tip])
            parts.append(Part(tube(stem, 0.018, segments=8), plain(rng, green(rng))))
            parts.append(Part(ball((0.09, 0.09, 0.06), tip), plain(rng, bright(rng))))
    return parts


def bowl(rng: Rng) -> list[Part]:
    radius, height = rng.uniform(0.5, 0.65), rng.uniform(0.28, 0.48)
    foot = rng.uniform(0.18, 0.28)
    outer = curve([(foot, 0.0), (foot + 0.6 * (radius - foot), 0.28 * height), (radius, height)], 12)
    parts = [Part(lathe(_hollow(outer, 0.04, 0.06), 64), _ceramic(rng))]
    if rng.random() < 0.45:  # fruit
        color = bright(rng)
        for _ in range(rng.integers(3, 7)):
            a, r, s = rng.uniform(0, 2 * math.pi), rng.uniform(0.05, 0.25), rng.uniform(0.12, 0.16)
            parts.append(
                Part(
                    ball((s, s, s), (r * math.cos(a), r * math.sin(a), height * 0.75 + rng.uniform(0, 0.1))),
                    plain(rng, color),
                )
            )
            color = color if rng.random() < 0.5 else bright(rng)
    return parts


# ---------------------------------------------------------------------------------------------------------------
# boxes and signs


def crate(rng: Rng) -> list[Part]:
    size = rng.uniform([0.7, 0.6, 0.5], [1.2, 1.0, 1.0])
    x, y, z = size
    kind = rng.integers(3)
    if kind == 0:  # a wooden crate
        body, bars = wood(rng), wood(rng)
        parts = [Part(box((x, y, z)), body)]
        t = 0.09
        for sx in (-1, 1):
            for sy in (-1, 1):
                parts.append(Part(box((t, t, z + 0.04), (sx * (x - t + 0.05) / 2, sy * (y - t + 0.05) / 2, 0)), bars))
                parts.append(Part(box((x + 0.04, t, t), (0, sx * (y - t + 0.05) / 2, sy * (z - t + 0.05) / 2)), bars))
                parts.append(Part(box((t, y + 0.04, t), (sx * (x - t + 0.05) / 2, 0, sy * (z - t + 0.05) / 2)), bars))
        return parts
    if kind == 1:  # a parcel or present
        ribbon = plain(rng, bright(rng))
        parts = [Part(box((x, y, z)), patterned(rng))]
        w = rng.uniform(0.08, 0.16)
        parts.append(Part(box((w, y + 0.03, z + 0.03)), ribbon))
        if rng.random() < 0.7:
            parts.append(Part(box((x + 0.03, w, z + 0.03)), ribbon))
            for s in (-1, 1):
                loop = [
                    (
                        s * (0.02 + 0.16 * (1 - math.cos(a)) / 2 * 1.6),
                        0.0,
                        z / 2 + 0.02 + 0.1 * math.sin(a) + 0.06 * (1 - math.cos(a)) / 2,
                    )
                    for a in np.linspace(0, 2 * math.pi, 17)[:-1]
                ]
                parts.append(Part(tube(loop, 0.03, closed=True, segments=8), ribbon))
        return parts
    lid = patterned(rng)  # a chest
    body = patterned(rng)
    parts = [Part(box((x, y, z * 0.65), (0, 0, -z * 0.175), 0.02), body)]
    half = prism([(u, v) for u, v in arc(y / 2 + 0.01, 0, 180, 20)], -x / 2 - 0.01, x / 2 + 0.01)
    half = half.turned("x", 90).turned("z", 90).scaled(1, 1, z * 0.7 / y)
    parts.append(Part(half.moved(z=z * 0.15), lid))
    parts.append(Part(box((0.13, 0.05, 0.16), (0, -y / 2 - 0.02, z * 0.15), 0.01), metal(rng)))
    return parts


# Strokes of letters and digits in a box of 0.7 by 1: straight lines, and arcs as (centre, radii, degrees).
def _bow(
    x: float, y: float, rx: float, ry: float, start: float, stop: float, steps: int = 14
) -> list[tuple[float, float]]:
    return [(x + rx * u, y + ry * v) for u, v in arc(1.0, start, stop, steps)]


_STROKES = {
    "A": [[(0, 0), (0.35, 1), (0.7, 0)], [(0.14, 0.36), (0.56, 0.36)]],
    "B": [
        [(0, 0), (0, 1)],
        [(0, 1), *_bow(0.35, 0.77, 0.25, 0.23, 90, -90), (0, 0.54)],
        [(0, 0.54), *_bow(0.38, 0.27, 0.3, 0.27, 90, -90), (0, 0)],
    ],
    "C": [_bow(0.38, 0.5, 0.36, 0.5, 50, 310, 22)],
    "D": [[(0, 0), (0, 1), *_bow(0.28, 0.5, 0.42, 0.5, 90, -90, 20), (0, 0)]],
    "E": [[(0.6, 1), (0, 1), (0, 0), (0.6, 0)], [(0, 0.52), (0.5, 0.52)]],
    "F": [[(0.6, 1), (0, 1), (0, 0)], [(0, 0.52), (0.5, 0.52)]],
    "G": [[*_bow(0.38, 0.5, 0.36, 0.5, 50, 330, 22), (0.7, 0.45), (0.42, 0.45)]],
    "H": [[(0, 0), (0, 1)], [(0.65, 0), (0.65, 1)], [(0, 0.5), (0.65, 0.5)]],
    "I": [[(0, 0), (0, 1)]],
    "J": [[(0.5, 1), (0.5, 0.27), *_bow(0.25, 0.27, 0.25, 0.27, 0, -170)]],
    "K": [[(0, 0), (0, 1)], [(0.62, 1), (0.02, 0.42)], [(0.2, 0.58), (0.65, 0)]],
    "L": [[(0, 1), (0, 0), (0.58, 0)]],
    "M": [[(0, 0), (0.05, 1), (0.4, 0.3), (0.75, 1), (0.8, 0)]],
    "N": [[(0, 0), (0, 1), (0.65, 0), (0.65, 1)]],
    "O": [_bow(0.38, 0.5, 0.38, 0.5, 0, 360, 28)],
    "P": [[(0, 0), (0, 1), *_bow(0.33, 0.74, 0.28, 0.26, 90, -90), (0, 0.48)]],
    "R": [[(0, 0), (0, 1), *_bow(0.33, 0.74, 0.28, 0.26, 90, -90), (0, 0.48)], [(0.28, 0.48), (0.63, 0)]],
    "S": [[*_bow(0.32, 0.75, 0.29, 0.25, 30, 270), *_bow(0.32, 0.25, 0.31, 0.25, 90, -150)]],
    "T": [[(0, 1), (0.75, 1)], [(0.375, 1), (0.375, 0)]],
    "U": [[(0, 1), (0, 0.33), *_bow(0.33, 0.33, 0.33, 0.33, 180, 360), (0.66, 1)]],
    "V": [[(0, 1), (0.35, 0), (0.7, 1)]],
    "W": [[(0, 1), (0.22, 0), (0.45, 0.75), (0.68, 0), (0.9, 1)]],
    "X": [[(0, 0), (0.68, 1)], [(0, 1), (0.68, 0)]],
    "Y": [[(0, 1), (0.35, 0.5), (0.7, 1)], [(0.35, 0.5), (0.35, 0)]],
    "Z": [[(0, 1), (0.65, 1), (0, 0), (0.65, 0)]],
    "0": [_bow(0.33, 0.5, 0.32, 0.5, 0, 360, 28)],
    "1": [[(0.05, 0.78), (0.32, 1), (0.32, 0)], [(0.08, 0), (0.56, 0)]],
    "2": [[*_bow(0.31, 0.7, 0.3, 0.3, 160, -35), (0.02, 0), (0.64, 0)]],
    "3": [[*_bow(0.3, 0.75, 0.28, 0.25, 150, -90), *_bow(0.3, 0.26, 0.31, 0.26, 90, -150)]],
    "4": [[(0.5, 0), (0.5, 1), (0, 0.32), (0.68, 0.32)]],
    "5": [[(0.58, 1), (0.08, 1), (0.04, 0.55), *_bow(0.3, 0.32, 0.31, 0.32, 105, -145)]],
    "6": [[(0.52, 1), *_bow(0.55, 0.35, 0.53, 0.55, 118, 178, 8), *_bow(0.33, 0.31, 0.31, 0.31, 180, 540, 24)]],
    "7": [[(0, 1), (0.62, 1), (0.2, 0)]],
    "8": [_bow(0.32, 0.76, 0.26, 0.24, 0, 360, 24), _bow(0.32, 0.27, 0.31, 0.27, 0, 360, 24)],
    "9": [[(0.12, 0), *_bow(0.09, 0.65, 0.53, 0.55, -62, -2, 8), *_bow(0.31, 0.69, 0.31, 0.31, 0, 360, 24)]],
}  # fmt: skip


def glyph(rng: Rng) -> list[Part]:
    """A letter or digit, standing."""
    strokes = _strokes(rng)
    material = (patterned, plain, metal, wood)[rng.integers(4)](rng)
    thick, deep = rng.uniform(0.15, 0.21), rng.uniform(0.16, 0.3)
    parts = [Part(_ribbon(points, thick, deep), material) for points in strokes]
    if rng.random() < 0.2:
        low = (
            min(part.solid.vertices[:, 0].min() for part in parts),
            max(part.solid.vertices[:, 0].max() for part in parts),
        )
        parts.append(
            Part(box((low[1] - low[0] + 0.1, deep + 0.15, 0.1), ((low[0] + low[1]) / 2, 0, -thick / 2)), plain(rng))
        )
    return parts


def inlaid_glyph(rng: Rng) -> list[Part]:
    """A letter or digit, standing, its front and back of another material but for a rim."""
    strokes = _strokes(rng)
    rim, face = ((metal, plain, wood)[rng.integers(3)](rng) for _ in range(2))
    wide = rng.uniform(0.9, 1.3)
    strokes = [points * (wide, 1) for points in strokes]
    thick, deep = rng.uniform(0.18, 0.3), rng.uniform(0.16, 0.5)
    edge, raised = thick * rng.uniform(0.12, 0.22), rng.uniform(0.01, 0.03)
    parts = []
    for points in strokes:
        parts.append(Part(_ribbon(points, thick, deep), rim))
        inner = points.copy()
        if not _closed(points):  # open strokes end before the rim does
            for end, next_to_it in ((0, 1), (-1, -2)):
                along = points[next_to_it] - points[end]
                inner[end] += edge * along / np.linalg.norm(along)
        parts.append(Part(_ribbon(inner, thick - 2 * edge, deep + 2 * raised), face))
    return parts


def _strokes(rng: Rng) -> list[Array]:
    """Lines (n, 2) of a letter or digit."""
    strokes = []
    for stroke in _STROKES[list(_STROKES)[rng.integers(len(_STROKES))]]:
        points = np.array(stroke, dtype=float)
        if len(points) > 12:
            keep = [0, *(k for k in range(1, len(points)) if np.linalg.norm(points[k] - points[k - 1]) > 1e-6)]
            points = points[keep]
        strokes.append(points)
    return strokes


def _closed(points: Array) -> bool:
    """Whether a line ends where it begins."""
    return bool(np.linalg.norm(points[0] - points[-1]) < 1e-6)


def _ribbon(points: Array, thick: float, deep: float) -> Solid:
    """A stroke of width ``thick`` in the plane of x and z, ``deep`` along y, with mitred corners."""
    closed = _closed(points)
    if closed:
        points = points[:-1]
    ahead = np.roll(points, -1, 0) - points
    behind = points - np.roll(points, 1, 0)
    if not closed:
        ahead[-1], behind[0] = behind[-1], ahead[0]
    ahead /= np.linalg.norm(ahead, axis=1, keepdims=True)
    behind /= np.linalg.norm(behind, axis=1, keepdims=True)
    normal = np.stack([-(ahead + behind)[:, 1], (ahead + behind)[:, 0]], 1)
    length = np.linalg.norm(normal, axis=1, keepdims=True)
    normal /= length
    half = thick / 2 * np.minimum(2 / length, 2.2)
    if not closed:
        points = points.copy()
        points[0] -= ahead[0] * thick / 2
        points[-1] += behind[-1] * thick / 2
    left, right = points + normal * half, points - normal * half
    rings = []
    for a, b in zip(left, right, strict=True):
        rings.append(
            np.array([(b[0], -deep / 2, b[1]), (b[0], deep / 2, b[1]), (a[0], deep / 2, a[1]), (a[0], -deep / 2, a[1])])
        )
    if closed:
        rings.append(rings[0])
    solid = loft(rings)
    starts, stops = points, np.roll(points, -1, 0)
    if not closed:
        starts, stops = starts[:-1], stops[:-1]

    def inside(p: Array) -> Array:
        hit = np.zeros(len(p), bool)
        flat = p[:, [0, 2]]
        for a, b in zip(starts, stops, strict=True):
            along = (b - a) / max(float(np.linalg.norm(b - a)), 1e-9)
            t = (flat - a) @ along
            across = np.abs((flat - a) @ np.array([-along[1], along[0]]))
            hit |= (t > 0) & (t < np.linalg.norm(b - a)) & (across < thick / 2 * 0.98)
        return hit & (np.abs(p[:, 1]) < deep / 2 * 0.999)

    return Solid(solid.vertices, solid.faces, inside)


# ---------------------------------------------------------------------------------------------------------------
# buildings, vehicles


def house(rng: Rng) -> list[Part]:
    x, y, z = rng.uniform(0.9, 1.4), rng.uniform(0.8, 1.1), rng.uniform(0.55, 0.9)
    walls = patterned(rng, pale(rng)) if rng.random() < 0.5 else plain(rng)
    tall = rng.uniform(0.35, 0.65)
    over = rng.uniform(0.06, 0.12)
    roof_color = [(0.6, 0.22, 0.15), (0.35, 0.3, 0.3), (0.25, 0.35, 0.5), bright(rng)][rng.integers(4)]
    roof = Material(roof_color, tuple(0.75 * c for c in roof_color), stripes(rng, 2, 14), roughness=0.8)
    parts = [Part(box((x, y, z), (0, 0, z / 2)), walls)]
    along = rng.random() < 0.5  # the ridge runs from side to side
    a, b = (y, x) if along else (x, y)
    gable = prism([(-a / 2 - over, 0), (a / 2 + over, 0), (0, tall)], -b / 2 - over, b / 2 + over).turned("x", 90)
    gable = gable.turned("z", 90) if along else gable
    parts.append(Part(gable.moved(z=z), roof))
    door = plain(rng)
    dx = rng.uniform(-0.2, 0.2) * x
    parts.append(Part(box((0.2, 0.04, 0.4), (dx, -y / 2, 0.2)), door))
    parts.append(Part(ball((0.018, 0.018, 0.018), (dx + 0.06, -y / 2 - 0.03, 0.2)), metal(rng)))
    pane, frame = Material((0.55, 0.75, 0.9), roughness=0.15), plain(rng, (0.95, 0.95, 0.93))
    for wx in (-0.33 * x, 0.33 * x):
        if abs(wx - dx) > 0.22:
            parts.append(Part(box((0.24, 0.03, 0.24), (wx, -y / 2, z * 0.55)), frame))
            parts.append(Part(box((0.18, 0.05, 0.18), (wx, -y / 2, z * 0.55)), pane))
    for s in (-1, 1):
        if rng.random() < 0.7:
            parts.append(Part(box((0.03, 0.26, 0.24), (s * x / 2, 0, z * 0.55)), frame))
            parts.append(Part(box((0.05, 0.2, 0.18), (s * x / 2, 0, z * 0.55)), pane))
    if rng.random() < 0.6:
        parts.append(Part(box((0.14, 0.14, 0.4), (0.28 * x, 0.15 * y, z + tall * 0.7)), plain(rng, (0.55, 0.3, 0.25))))
    return parts


def _wheel(radius: float, width: float, rim: Material, tyre: Material) -> list[Part]:
    """About the x axis, at the origin."""
    w = width / 2
    outer = lathe([(0, -w), (radius * 0.85, -w), (radius, -w * 0.6), (radius, w * 0.6), (radius * 0.85, w), (0, w)], 32)
    hub = cylinder(radius * 0.55, -w * 1.08, w * 1.08, segments=24)
    return [Part(outer.turned("y", 90), tyre), Part(hub.turned("y", 90), rim)]


def _moved(parts: list[Part], x: float, y: float, z: float) -> list[Part]:
    return [Part(part.solid.moved(x, y, z), part.material) for part in parts]


def car(rng: Rng) -> list[Part]:
    """Its nose points to the front, -y."""
    paint = plain(rng, bright(rng) if rng.random() < 0.75 else grey(rng))
    window = Material((0.15, 0.2, 0.27), roughness=0.1)
    tyre, rim = Material((0.07, 0.07, 0.08), roughness=0.9), metal(rng)
    length, width, low = rng.uniform(1.6, 2.0), rng.uniform(0.75, 0.9), rng.uniform(0.3, 0.38)
    r = rng.uniform(0.17, 0.22)
    kind = rng.integers(4)
    body_z = r * 0.75
    parts = [Part(cushion((width, length, low), (0, 0, body_z + low / 2), 0.22), paint)]
    top = body_z + low * 0.85
    if kind == 3:  # a truck
        tall = rng.uniform(0.4, 0.5)
        parts.append(
            Part(box((width * 0.94, length * 0.3, tall), (0, -length * 0.28, top + tall / 2 - 0.02), 0.04), paint)
        )
        parts.append(Part(box((width * 0.8, 0.04, tall * 0.45), (0, -length * 0.43, top + tall * 0.55)), window))
        for s in (-1, 1):
            parts.append(
                Part(
                    box((0.04, length * 0.18, tall * 0.45), (s * width * 0.46, -length * 0.29, top + tall * 0.55)),
                    window,
                )
            )
        parts.append(
            Part(
                box((width * 0.98, length * 0.55, tall * rng.uniform(0.6, 1.2)), (0, length * 0.18, top + tall * 0.4)),
                patterned(rng),
            )
        )
    else:
        tall = rng.uniform(0.26, 0.36)
        start, stop = [(-0.22, 0.36), (-0.28, 0.47), (-0.12, 0.3)][kind]
        y0, y1 = start * length, stop * length
        slope0, slope1 = rng.uniform(0.15, 0.25), rng.uniform(0.05, 0.22)
        outline = [(y0, 0), (y1, 0), (y1 - slope1, tall), (y0 + slope0, tall)]
        cabin = _side(outline, width * 0.8)
        parts.append(Part(cabin.moved(z=top - 0.02), window))
        roof = _side(
            [
                (y0 + slope0 * 0.9, tall * 0.9),
                (y1 - slope1 * 0.9, tall * 0.9),
                (y1 - slope1, tall + 0.025),
                (y0 + slope0, tall + 0.025),
            ],
            width * 0.83,
        )
        parts.append(Part(roof.moved(z=top - 0.02), paint))
        middle = (y0 + y1) / 2 + 0.03
        parts.append(Part(box((width * 0.82, 0.06, tall * 0.96), (0, middle, top + tall / 2 - 0.02)), paint))
    for y in (-length * 0.31, length * 0.3):
        for s in (-1, 1):
            parts += _moved(_wheel(r, 0.17, rim, tyre), s * (width / 2 - 0.06), y, r)
    for s in (-1, 1):
        parts.append(
            Part(
                ball((0.07, 0.04, 0.055), (s * width * 0.32, -length * 0.485, body_z + low * 0.55)),
                Material((1, 0.97, 0.8), roughness=0.2),
            )
        )
        parts.append(
            Part(
                box((0.13, 0.05, 0.06), (s * width * 0.3, length * 0.48, body_z + low * 0.55)),
                Material((0.8, 0.08, 0.06), roughness=0.3),
            )
        )
    return parts


def _side(outline: list[tuple[float, float]], width: float) -> Solid:
    """An outline (y, z), seen from the side, ``width`` wide along x."""
    return prism(outline, -width / 2, width / 2).turned("x", 90).turned("z", 90)


def plane(rng: Rng) -> list[Part]:
    paint, accent = plain(rng, pale(rng) if rng.random() < 0.5 else bright(rng)), plain(rng, bright(rng))
    length, radius = rng.uniform(1.6, 2.0), rng.uniform(0.13, 0.19)
    profile = curve(
        [
            (0.0, -length / 2),
            (radius * 0.75, -length * 0.44),
            (radius, -length * 0.3),
            (radius, length * 0.1),
            (radius * 0.35, length * 0.45),
            (0.0, length * 0.5),
        ],
        8,
    )
    profile = [(max(r, 0.0), h) for r, h in profile]
    parts = [Part(lathe(profile).turned("x", -90), paint)]
    span, chord, sweep = rng.uniform(0.75, 1.0), rng.uniform(0.28, 0.4), rng.uniform(0.0, 0.35)
    high = rng.choice([-0.3, 0.0, 0.7]) * radius
    for s in (1, -1):
        wing = _wing(
            (0.0, -0.12 * length, high),
            (span, -0.12 * length + sweep, high + 0.06),
            chord,
            chord * rng.uniform(0.5, 0.8),
            0.06,
        )
        parts.append(Part(wing if s > 0 else wing.mirrored(), accent if s and rng.random() < 0 else paint))
        tail = _wing(
            (0.0, length * 0.36, 0.02),
            (span * 0.38, length * 0.36 + sweep * 0.3, 0.04),
            chord * 0.5,
            chord * 0.35,
            0.04,
        )
        parts.append(Part(tail if s > 0 else tail.mirrored(), accent))
    fin = _wing((0.0, length * 0.34, 0.0), (span * 0.38, length * 0.42, 0.0), chord * 0.6, chord * 0.35, 0.045)
    parts.append(Part(fin.turned("y", -90), accent))
    parts.append(
        Part(
            ball((radius * 0.6, 0.2, radius * 0.5), (0, -length * 0.3, radius * 0.75)),
            Material((0.2, 0.3, 0.4), roughness=0.1),
        )
    )
    if rng.random() < 0.5:  # a propeller
        parts.append(Part(ball((0.05, 0.07, 0.05), (0, -length / 2, 0)), accent))
        blade = box((0.07, 0.02, 0.62), (0, -length / 2 - 0.02, 0)).turned("y", 0)
        parts.append(Part(blade, plain(rng, dark(rng))))
    else:
        for s in (-1, 1):
            engine = lathe([(0, -0.17), (0.07, -0.17), (0.085, 0), (0.05, 0.17), (0, 0.17)]).turned("x", -90)
            parts.append(Part(engine.moved(s * span * 0.42, -0.1 * length + sweep * 0.4, high - 0.09), accent))
    return parts


def _wing(
    root: tuple[float, float, float], tip: tuple[float, float, float], chord: float, end: float, thick: float
) -> Solid:
    """A wing out along x; chords along y, leading edge towards -y."""
    section = np.array([(-0.5, 0.0), (-0.3, -0.45), (0.2, -0.4), (0.5, 0.0), (0.2, 0.4), (-0.3, 0.5)])
    rings = []
    for (x, y, z), c in ((root, chord), (tip, end)):
        rings.append(np.stack([np.full(6, x), y + section[:, 0] * c, z + section[:, 1] * thick * c / chord], 1))
    return loft(rings)


def boat(rng: Rng) -> list[Part]:
    hull = plain(rng, bright(rng)) if rng.random() < 0.6 else wood(rng)
    length, width, deep = rng.uniform(1.5, 1.9), rng.uniform(0.5, 0.68), rng.uniform(0.28, 0.38)
    rings = []
    for t in np.linspace(0, 1, 13):
        y = length * (t - 0.5)
        w = (
            width
            / 2
            * (0.04 + 0.96 * math.sin(math.pi * min(0.5, t * 0.85)) if t < 0.588 else 1.0 - 0.25 * (t - 0.588))
        )
        d = deep * (0.55 + 0.45 * math.sin(math.pi * min(0.5, t * 0.9)))
        lift = 0.12 * (1 - t) ** 2
        section = [
            (w, lift),
            (w, lift - 0.04),
            (w * 0.8, -d * 0.6),
            (0, -d),
            (-w * 0.8, -d * 0.6),
            (-w, lift - 0.04),
            (-w, lift),
        ]
        rings.append(np.array([(x, y, z) for x, z in section])[::-1])
    parts = [Part(loft(rings), hull)]
    if rng.random() < 0.5:  # a sail
        mast = wood(rng)
        tall = rng.uniform(1.0, 1.4)
        parts.append(Part(rod((0, -0.1, -0.05), (0, -0.1, tall), 0.03), mast))
        parts.append(Part(rod((0, -0.1, 0.18), (0, length * 0.42, 0.18), 0.022), mast))
        sail = patterned(rng, pale(rng))
        parts.append(Part(_side([(-0.06, 0.2), (length * 0.4, 0.2), (-0.06, tall * 0.95)], 0.03), sail))
        if rng.random() < 0.6:
            parts.append(Part(_side([(-0.14, 0.25), (-0.14, tall * 0.8), (-length * 0.45, 0.2)], 0.03), sail))
    else:
        cabin = plain(rng, pale(rng))
        parts.append(Part(box((width * 0.6, length * 0.3, 0.3), (0, 0.05, 0.12), 0.02), cabin))
        parts.append(
            Part(box((width * 0.62, length * 0.22, 0.09), (0, 0.05, 0.17)), Material((0.2, 0.3, 0.42), roughness=0.1))
        )
        parts.append(Part(cylinder(0.07, 0.2, 0.5).moved(0, 0.12, 0), plain(rng, bright(rng))))
    return parts


def train(rng: Rng) -> list[Part]:
    """A steam engine, its boiler to the front."""
    paint, accent, dark_paint = plain(rng, bright(rng)), plain(rng, bright(rng)), plain(rng, dark(rng))
    length, width, r = rng.uniform(1.4, 1.8), rng.uniform(0.5, 0.6), rng.uniform(0.2, 0.26)
    wheel = rng.uniform(0.14, 0.18)
    parts = [Part(box((width, length, 0.12), (0, 0, wheel * 1.5), 0.01), dark_paint)]
    z = wheel * 1.5 + 0.05 + r
    parts.append(Part(cylinder(r, -length * 0.48, length * 0.12).turned("x", -90).moved(0, 0, z), paint))
    parts.append(Part(cylinder(r * 1.05, -length * 0.5, -length * 0.44).turned("x", -90).moved(0, 0, z), accent))
    tall = rng.uniform(0.55, 0.7)
    parts.append(Part(box((width, length * 0.34, tall), (0, length * 0.29, z - r + tall / 2), 0.01), paint))
    parts.append(Part(box((width + 0.12, length * 0.42, 0.06), (0, length * 0.29, z - r + tall), 0.01), accent))
    for s in (-1, 1):
        parts.append(
            Part(
                box((0.04, length * 0.18, tall * 0.35), (s * width / 2, length * 0.29, z - r + tall * 0.68)),
                Material((0.25, 0.35, 0.45), roughness=0.1),
            )
        )
    top = z + r
    parts.append(Part(cylinder(0.06, top - 0.05, top + 0.3, 0.1).moved(0, -length * 0.35, 0), dark_paint))
    parts.append(Part(ball((0.09, 0.09, 0.1), (0, -length * 0.08, top)), metal(rng)))
    for y in np.linspace(-length * 0.36, length * 0.36, rng.integers(2, 4)):
        for s in (-1, 1):
            parts += _moved(_wheel(wheel, 0.1, accent, dark_paint), s * width / 2, y, wheel)
    return parts


# ---------------------------------------------------------------------------------------------------------------
# plants, figures


def tree(rng: Rng) -> list[Part]:
    bark = wood(rng)
    leaf = (
        green(rng)
        if rng.random() < 0.75
        else [(0.85, 0.5, 0.15), (0.8, 0.25, 0.15), (0.95, 0.65, 0.75)][rng.integers(3)]
    )
    leaves = Material(leaf, tuple(0.7 * c for c in leaf), gradient(rng), roughness=0.9)
    trunk = rng.uniform(0.4, 0.7)
    parts = [Part(cylinder(rng.uniform(0.09, 0.13), 0, trunk + 0.2, 0.06), bark)]
    if rng.random() < 0.5:  # a conifer
        count = int(rng.integers(2, 5))
        radius, step = rng.uniform(0.42, 0.55), rng.uniform(0.34, 0.42)
        for k in range(count):
            r = radius * (1 - 0.65 * k / count)
            z = trunk * 0.7 + k * step * 0.75
            parts.append(Part(lathe([(0, z + 0.04), (r, z), (0, z + step * 1.5)]), leaves))
    else:
        count = int(rng.integers(1, 6))
        main = rng.uniform(0.38, 0.5)
        parts.append(Part(ball((main, main, main * rng.uniform(0.8, 1.2)), (0, 0, trunk + main * 0.8)), leaves))
        for _ in range(count - 1):
            a, s = rng.uniform(0, 2 * math.pi), rng.uniform(0.22, 0.32)
            parts.append(
                Part(
                    ball(
                        (s, s, s),
                        (main * 0.8 * math.cos(a), main * 0.8 * math.sin(a), trunk + rng.uniform(0.1, 1.0) * main),
                    ),
                    leaves,
                )
            )
        if rng.random() < 0.3:
            fruit = plain(rng, bright(rng))
            for _ in range(8):
                d = rng.normal(size=3)
                d = d / np.linalg.norm(d) * main
                parts.append(Part(ball((0.06, 0.06, 0.06), (d[0], d[1], trunk + main * 0.8 + d[2] * 0.9)), fruit))
    return parts


def cactus(rng: Rng) -> list[Part]:
    skin = green(rng)
    body = Material(skin, tuple(0.7 * c for c in skin), stripes(rng, 0, 12), roughness=0.7)
    pot = patterned(rng, [(0.72, 0.38, 0.25), bright(rng)][rng.integers(2)])
    parts = [Part(lathe([(0, 0), (0.22, 0), (0.3, 0.32), (0.33, 0.32), (0.33, 0.4), (0, 0.4)]), pot)]
    if rng.random() < 0.4:
        r = rng.uniform(0.24, 0.32)
        parts.append(Part(ball((r, r, r * rng.uniform(0.9, 1.3)), (0, 0, 0.4 + r * 0.75)), body))
        parts.append(Part(ball((0.08, 0.08, 0.06), (0, 0, 0.4 + r * 1.75)), plain(rng, bright(rng))))
        return parts
    tall, r = rng.uniform(0.7, 1.1), rng.uniform(0.12, 0.16)
    parts += [Part(cylinder(r, 0.35, 0.4 + tall), body), Part(ball((r, r, r), (0, 0, 0.4 + tall)), body)]
    for s in (-1, 1):
        if rng.random() < 0.8:
            z, up, out, thin = (
                0.4 + tall * rng.uniform(0.25, 0.55),
                rng.uniform(0.2, 0.4),
                rng.uniform(0.26, 0.36),
                r * 0.7,
            )
            parts.append(
                Part(
                    tube(curve([(0, 0, z), (s * out * 0.8, 0, z), (s * out, 0, z + 0.1), (s * out, 0, z + up)]), thin),
                    body,
                )
            )
            parts.append(Part(ball((thin, thin, thin), (s * out, 0, z + up)), body))
    return parts


def mushroom(rng: Rng) -> list[Part]:
    cap = Material(bright(rng), (0.97, 0.96, 0.92), dots(rng), roughness=0.5)
    stem = plain(rng, (0.93, 0.88, 0.78))
    height, r = rng.uniform(0.5, 0.8), rng.uniform(0.4, 0.6)
    waist = rng.uniform(0.1, 0.16)
    profile = curve([(waist * 1.5, 0.0), (waist, height * 0.5), (waist * 0.9, height + 0.05)])
    parts = [Part(lathe([(0, 0), *profile, (0, height + 0.05)]), stem)]
    tall = rng.uniform(0.25, 0.5)
    dome = [(r * math.cos(a), height + tall * math.sin(a)) for a in np.linspace(0, math.pi / 2, 16)]
    dome[-1] = (0.0, height + tall)
    parts.append(Part(lathe([(0, height + 0.05), (r * 0.9, height - 0.03), *dome]), cap))
    return parts


def snowman(rng: Rng) -> list[Part]:
    snow = Material((0.93, 0.95, 0.98), roughness=0.8)
    coal = Material((0.06, 0.06, 0.07), roughness=0.7)
    radii = rng.uniform([0.42, 0.3, 0.2], [0.5, 0.36, 0.25])
    z = np.array([radii[0] * 0.92, radii[0] * 1.7 + radii[1] * 0.75, radii[0] * 1.7 + radii[1] * 1.5 + radii[2] * 0.75])
    parts = [Part(ball((r, r, r * 0.95), (0, 0, h)), snow) for r, h in zip(radii, z, strict=True)]
    r, h = radii[2], z[2]
    for s in (-1, 1):
        parts.append(Part(ball((0.032, 0.032, 0.032), (s * 0.38 * r, -0.85 * r, h + 0.3 * r)), coal))
        arm = curve(
            [
                (s * radii[1] * 0.8, 0, z[1] + 0.05),
                (s * radii[1] * 1.5, -0.08, z[1] + 0.15),
                (s * radii[1] * 2.0, -0.1, z[1] + rng.uniform(0.1, 0.4)),
            ]
        )
        parts.append(Part(tube(arm, 0.028, segments=8), wood(rng)))
    parts.append(
        Part(
            rod((0, -0.85 * r, h), (0, -0.85 * r - 0.25, h - 0.03), 0.05, 0.008),
            Material((0.95, 0.5, 0.1), roughness=0.7),
        )
    )
    for t in (0.5, 0.05, -0.4):
        parts.append(
            Part(ball((0.035, 0.035, 0.035), (0, -radii[1] * math.cos(t), z[1] + radii[1] * math.sin(t))), coal)
        )
    if rng.random() < 0.75:
        hat = plain(rng, dark(rng) if rng.random() < 0.6 else bright(rng))
        top = h + r * 0.75
        parts += [
            Part(cylinder(r * 1.15, top, top + 0.045), hat),
            Part(cylinder(r * 0.75, top, top + rng.uniform(0.2, 0.34)), hat),
        ]
    if rng.random() < 0.7:
        scarf = patterned(rng, bright(rng))
        neck = h - r * 0.72
        parts.append(Part(tube([(x, y, neck) for x, y in arc(r * 0.88, 0, 345, 23)], 0.06, closed=True), scarf))
        parts.append(Part(box((0.11, 0.06, 0.34), (r * 0.45, -r * 0.95, neck - 0.17), 0.02), scarf))
    return parts


def figure(rng: Rng) -> list[Part]:
    """A toy person or robot."""
    robot = rng.random() < 0.4
    skin = (
        metal(rng)
        if robot
        else plain(rng, [(0.95, 0.78, 0.62), (0.75, 0.52, 0.36), (0.42, 0.28, 0.2), (0.98, 0.84, 0.2)][rng.integers(4)])
    )
    shirt, trousers, shoe = patterned(rng, bright(rng)), plain(rng), plain(rng, dark(rng))
    leg, torso, head = rng.uniform(0.4, 0.55), rng.uniform(0.42, 0.55), rng.uniform(0.18, 0.24)
    wide = rng.uniform(0.36, 0.48)
    parts = []
    for s in (-1, 1):
        x = s * wide * 0.27
        if robot:
            parts.append(Part(box((0.15, 0.17, leg), (x, 0, leg / 2 + 0.05), 0.02), trousers))
        else:
            parts.append(Part(rod((x, 0, 0.05), (x, 0, leg + 0.08), 0.075, 0.095), trousers))
        parts.append(Part(cushion((0.17, 0.28, 0.12), (x, -0.05, 0.06), 0.5), shoe))
        swing, out = rng.uniform(-0.2, 0.25), rng.uniform(0.1, 0.25)
        raised = rng.random() < 0.2
        shoulder = (s * (wide / 2 + 0.02), 0.0, leg + torso)
        hand = (s * (wide / 2 + out), -swing, leg + torso + (0.35 if raised else -rng.uniform(0.34, 0.42)))
        parts.append(Part(rod(shoulder, hand, 0.075, 0.06), shirt if not robot else skin))
        parts.append(Part(ball((0.075, 0.075, 0.075), shoulder), shirt))
        parts.append(Part(ball((0.075, 0.075, 0.075), hand), skin))
    z = leg + torso / 2 + 0.06
    body = box((wide, 0.26, torso), (0, 0, z), 0.03) if robot else cushion((wide, 0.28, torso + 0.06), (0, 0, z), 0.45)
    parts.append(Part(body, shirt))
    top = leg + torso + 0.08 + head
    parts.append(Part(rod((0, 0, leg + torso), (0, 0, top), 0.07), skin))
    if robot:
        parts.append(Part(box((head * 2, head * 1.6, head * 1.7), (0, 0, top), 0.03), skin))
        parts += [
            Part(rod((0, 0, top + head * 0.8), (0, 0, top + head * 1.5), 0.018), shoe),
            Part(ball((0.045, 0.045, 0.045), (0, 0, top + head * 1.5)), plain(rng, bright(rng))),
        ]
    else:
        parts.append(Part(ball((head * 0.95, head * 0.95, head * 1.08), (0, 0, top)), skin))
        hair = plain(rng, [(0.15, 0.1, 0.07), (0.45, 0.27, 0.12), (0.85, 0.65, 0.3), (0.6, 0.2, 0.1)][rng.integers(4)])
        parts.append(Part(ball((head * 1.0, head * 0.95, head * 0.95), (0, head * 0.18, top + head * 0.3)), hair))
    front = -head * (0.8 if robot else 0.88)
    for s in (-1, 1):
        parts.append(
            Part(
                ball((0.036, 0.03, 0.036), (s * head * 0.38, front, top + 0.02)),
                Material((0.05, 0.05, 0.06), roughness=0.2),
            )
        )
    return parts


def animal(rng: Rng) -> list[Part]:
    """A four-legged toy, its head to the front."""
    coat = patterned(
        rng,
        [(0.85, 0.65, 0.4), (0.4, 0.26, 0.16), (0.93, 0.9, 0.86), (0.5, 0.5, 0.52), (0.95, 0.65, 0.7)][rng.integers(5)],
    )
    dark_part = Material((0.06, 0.05, 0.05), roughness=0.4)
    length, r = rng.uniform(0.7, 0.95), rng.uniform(0.2, 0.27)
    leg = rng.uniform(0.25, 0.5)
    z = leg + r * 0.8
    parts = [Part(cushion((2 * r, length, 2 * r), (0, 0, z), 0.7), coat)]
    for s in (-1, 1):
        for y in (-length * 0.34, length * 0.34):
            parts.append(Part(rod((s * r * 0.6, y, 0), (s * r * 0.6, y, z), 0.07, 0.085), coat))
    head, lift = rng.uniform(0.17, 0.22), rng.uniform(0.1, 0.4)
    hy, hz = -length / 2 - 0.08, z + r * 0.4 + lift
    parts.append(Part(rod((0, -length * 0.33, z), (0, hy, hz), r * 0.7, head * 0.65), coat))
    parts.append(Part(ball((head, head, head), (0, hy, hz)), coat))
    snout = rng.uniform(0.08, 0.2)
    parts.append(Part(ball((head * 0.55, head * 0.5 + snout, head * 0.5), (0, hy - head * 0.6, hz - 0.05)), coat))
    parts.append(Part(ball((0.045, 0.04, 0.035), (0, hy - head * 1.1 - snout, hz - 0.03)), dark_part))
    kind = rng.integers(3)
    for s in (-1, 1):
        parts.append(Part(ball((0.03, 0.03, 0.03), (s * head * 0.45, hy - head * 0.82, hz + head * 0.35)), dark_part))
        if kind == 0:
            parts.append(
                Part(
                    rod((s * head * 0.6, hy, hz + head * 0.6), (s * head * 0.8, hy, hz + head * 1.6), 0.075, 0.01), coat
                )
            )
        elif kind == 1:
            parts.append(Part(ball((0.05, 0.07, 0.24), (s * head * 0.55, hy + 0.02, hz + head * 1.4)), coat))
        else:
            parts.append(Part(ball((0.05, 0.09, 0.14), (s * head * 1.0, hy + 0.02, hz + 0.02)), coat))
    tail = curve(
        [
            (0, length * 0.44, z),
            (0, length * 0.6, z + 0.1),
            (0, length * rng.uniform(0.6, 0.75), z + rng.uniform(0.1, 0.4)),
        ]
    )
    parts.append(Part(tube(tail, 0.045), coat))
    return parts


def bird(rng: Rng) -> list[Part]:
    """A toy bird, sitting or on two legs, its head to the front."""
    coat = plain(rng, bright(rng)) if rng.random() < 0.6 else patterned(rng)
    black, horn = Material((0.05, 0.05, 0.05), roughness=0.3), plain(rng, bright(rng))
    width, length, height = rng.uniform(0.26, 0.36), rng.uniform(0.38, 0.5), rng.uniform(0.24, 0.34)
    leg = rng.uniform(0.15, 0.35) if rng.random() < 0.4 else 0.0
    z = height * 0.9 + leg
    parts = [Part(ball((width, length, height), (0, 0, z)), coat)]
    head = rng.uniform(0.17, 0.26)
    hy, hz = -length * rng.uniform(0.45, 0.75), z + height * 0.6 + head * rng.uniform(0.5, 1.3)
    parts.append(Part(rod((0, -length * 0.35, z), (0, hy, hz), width * 0.65, head * 0.75), coat))
    parts.append(Part(ball((head, head, head), (0, hy, hz)), coat))
    beak = rng.uniform(0.1, 0.2)
    if rng.random() < 0.6:  # flat, a duck's
        parts.append(Part(ball((head * 0.5, beak, head * 0.15), (0, hy - head * 0.95, hz - 0.03)), horn))
    else:
        parts.append(Part(rod((0, hy - head * 0.85, hz), (0, hy - head - beak, hz - 0.04), head * 0.3, 0.01), horn))
    wing = coat if rng.random() < 0.6 else plain(rng)
    eye = head * rng.uniform(0.14, 0.2)
    for s in (-1, 1):
        parts.append(Part(ball((eye, eye, eye), (s * head * 0.55, hy - head * 0.75, hz + head * 0.3)), black))
        parts.append(Part(ball((0.06, length * 0.55, height * 0.5), (s * width * 0.9, 0.06, z + 0.03)), wing))
        if leg:
            parts.append(Part(rod((s * width * 0.4, 0, 0), (s * width * 0.4, 0, z), 0.035), horn))
            parts.append(Part(cushion((0.14, 0.22, 0.05), (s * width * 0.4, -0.05, 0.025)), horn))
    tip = (0, length * rng.uniform(1.0, 1.3), z + rng.uniform(0.05, 0.3))
    parts.append(Part(rod((0, length * 0.6, z), tip, height * 0.5, height * rng.uniform(0.1, 0.5)), coat))
    return parts


# ---------------------------------------------------------------------------------------------------------------
# tools and small things


def hammer(rng: Rng) -> list[Part]:
    handle = wood(rng) if rng.random() < 0.6 else plain(rng, bright(rng))
    head = metal(rng) if rng.random() < 0.7 else plain(rng, dark(rng))
    length, thick = rng.uniform(1.1, 1.4), rng.uniform(0.055, 0.075)
    parts = [
        Part(
            tube(
                [(0, 0, 0), (0, 0, length * 0.3), (0, 0, length * 0.6), (0, 0, length)],
                [thick * 1.1, thick * 1.2, thick * 0.85, thick],
            ),
            handle,
        )
    ]
    kind = rng.integers(3)
    if kind == 0:  # mallet
        parts.append(Part(cylinder(0.17, -0.3, 0.3).turned("y", 90).moved(z=length), head))
    elif kind == 1:  # claw or pick
        parts.append(Part(box((0.24, 0.18, 0.18), (0, 0, length), 0.02), head))
        parts.append(Part(cylinder(0.1, -0.32, -0.1, 0.085).turned("y", 90).moved(z=length), head))
        parts.append(
            Part(
                tube(
                    curve([(0.1, 0, length), (0.28, 0, length + 0.01), (0.42, 0, length - 0.1)]),
                    [0.09] * 8 + [0.05] * 9,
                ),
                head,
            )
        )
    else:  # axe
        blade = prism(
            [(-0.05, -0.12), (0.1, -0.12), (0.36, -0.28), (0.41, 0.0), (0.36, 0.28), (0.1, 0.12), (-0.05, 0.12)],
            -0.045,
            0.045,
        )
        parts.append(Part(blade.turned("x", 90).moved(z=length - 0.06), head))
        parts.append(Part(box((0.2, 0.16, 0.22), (-0.03, 0, length - 0.06), 0.02), head))
    return parts


def sword(rng: Rng) -> list[Part]:
    blade, grip, gold = metal(rng), plain(rng), metal(rng)
    length, width = rng.uniform(1.1, 1.4), rng.uniform(0.07, 0.12)
    rings = []
    for z, w in ((0.0, width), (length * 0.85, width * rng.uniform(0.7, 1.0)), (length, 0.01)):
        rings.append(np.array([(w, 0, z), (0, 0.28 * w + 0.01, z), (-w, 0, z), (0, -0.28 * w - 0.01, z)]))
    parts = [Part(loft(rings), blade)]
    parts.append(Part(box((rng.uniform(0.36, 0.55), 0.09, 0.07), (0, 0, 0), 0.02), gold))
    parts.append(Part(cylinder(0.045, -0.32, 0.0), grip))
    parts.append(Part(ball((0.075, 0.075, 0.075), (0, 0, -0.34)), gold))
    return parts


def spoon(rng: Rng) -> list[Part]:
    """A spoon or spatula, standing."""
    material = (metal, wood, plain)[rng.integers(3)](rng)
    length = rng.uniform(0.9, 1.2)
    parts = [Part(tube([(0, 0, 0), (0, 0, length * 0.5), (0, 0.02, length)], [0.05, 0.035, 0.04]), material)]
    w, h = rng.uniform(0.16, 0.24), rng.uniform(0.24, 0.32)
    if rng.random() < 0.6:
        bowl_ = lathe([(0, -1), (0.5, -0.87), (0.87, -0.5), (1, 0), (0.86, 0), (0.74, -0.4), (0.42, -0.72), (0, -0.84)])
        parts.append(Part(bowl_.scaled(w, h, 0.13).turned("x", 90).moved(0, 0.02, length + h * 0.85), material))
    else:
        parts.append(Part(box((2 * w, 0.05, 1.6 * h), (0, 0.02, length + h * 0.7), 0.02), material))
    return parts


def clock(rng: Rng) -> list[Part]:
    case = (wood, metal, plain)[rng.integers(3)](rng)
    face = plain(rng, (0.96, 0.95, 0.9))
    hand = Material((0.08, 0.08, 0.1), roughness=0.4)
    r, deep = 0.5, rng.uniform(0.14, 0.24)
    body = (
        cylinder(r, -deep / 2, deep / 2, segments=56).turned("x", 90)
        if rng.random() < 0.6
        else box((1.0, deep, 1.0), (0, 0, 0), 0.03)
    )
    parts = [Part(body, case), Part(cylinder(r * 0.86, 0, deep / 2 + 0.015, segments=56).turned("x", 90), face)]
    front = -deep / 2 - 0.02
    for k in range(12):
        mark = box((0.03, 0.03, 0.09 if k % 3 == 0 else 0.05), (0, front, r * 0.74)).turned("y", 30 * k)
        parts.append(Part(mark, hand))
    hour = rng.uniform(0, 12)
    for length, angle, w in ((0.24, hour * 30, 0.05), (0.36, hour * 360, 0.035)):
        parts.append(Part(box((w, 0.035, length), (0, front, length / 2 - 0.02)).turned("y", angle), hand))
    parts.append(Part(ball((0.045, 0.04, 0.045), (0, front, 0)), metal(rng)))
    for s in (-1, 1):
        parts.append(Part(rod((s * 0.3, 0, -0.42), (s * 0.38, 0, -0.58), 0.045), case))
    if rng.random() < 0.4:
        for s in (-1, 1):
            parts.append(Part(ball((0.16, 0.12, 0.12), (s * 0.27, 0, 0.52)), metal(rng)))
    return parts


def dumbbell(rng: Rng) -> list[Part]:
    bar, weights = metal(rng), patterned(rng)
    half = rng.uniform(0.28, 0.42)
    parts = [Part(rod((-half - 0.2, 0, 0), (half + 0.2, 0, 0), 0.055), bar)]
    for s in (-1, 1):
        if rng.random() < 0.0 or half > 0.36:
            for k, r in enumerate((0.26, 0.2)):
                plate = cylinder(r, -0.06, 0.06, segments=36).turned("y", 90)
                parts.append(Part(plate.moved(s * (half + 0.02 + 0.12 * k)), weights))
        else:
            parts.append(Part(ball((0.22, 0.24, 0.24), (s * half, 0, 0)), weights))
    return parts


def umbrella(rng: Rng) -> list[Part]:
    count = 8
    cloth = Material(
        bright(rng),
        any_color(rng),
        lambda p: np.floor((np.arctan2(p[:, 1], p[:, 0]) / (2 * math.pi) + 0.5) * count) % 2,
        roughness=0.8,
    )
    stick = wood(rng)
    r, tall = 0.65, rng.uniform(0.22, 0.34)
    height = rng.uniform(0.9, 1.1)
    dome = [(r * math.sin(a), height + tall * math.cos(a)) for a in np.linspace(math.pi / 2, 0, 14)]
    dome[-1] = (0.0, height + tall)
    under = [(max(x - 0.02, 0.0), z - 0.03) for x, z in reversed(dome)]
    under[0], under[-1] = (0.0, height + tall - 0.035), (r - 0.03, height)
    profile = [*dome]
    shell = lathe([(0.0, height + tall - 0.035), *under[1:], *profile])
    parts = [Part(shell, cloth), Part(rod((0, 0, 0), (0, 0, height + tall + 0.1), 0.025), stick)]
    hook = [(0.1 + 0.1 * math.cos(a), 0.0, 0.1 * math.sin(a)) for a in np.linspace(math.pi, 2 * math.pi, 10)]
    parts.append(Part(tube(hook, 0.035, segments=10), stick))
    return parts


def assembly(rng: Rng) -> list[Part]:
    """Whatever: a few solids stuck together."""
    parts = []
    place = np.zeros(3)
    for _ in range(rng.integers(2, 7)):
        size = rng.uniform(0.25, 0.7, 3)
        kind = rng.integers(6)
        if kind == 0:
            solid = box(tuple(size), bevel=rng.choice([0.0, 0.03]))
        elif kind == 1:
            solid = ball(tuple(size / 2))
        elif kind == 2:
            solid = cylinder(size[0] / 2, -size[2] / 2, size[2] / 2, size[1] / 2 * rng.choice([0.05, 1.0]))
        elif kind == 3:
            r = size[0] / 2 + 0.1
            solid = tube([(x, y, 0) for x, y in arc(r, 0, 345, 23)], r * rng.uniform(0.2, 0.4), closed=True)
        elif kind == 4:
            solid = cushion(tuple(size), square=rng.uniform(0.3, 0.8))
        else:
            n = int(rng.integers(3, 7))
            solid = prism(arc(size[0] / 2, 0, 360 - 360 / n, n - 1), -size[2] / 2, size[2] / 2)
        for axis in "xyz":
            if rng.random() < 0.3:
                solid = solid.turned(axis, rng.choice([90, 45, rng.uniform(0, 360)]))
        material = (patterned, patterned, plain, metal, wood)[rng.integers(5)](rng)
        if rng.random() < 0.07:
            material = glass(rng)
        parts.append(Part(solid.moved(*place), material))
        step = rng.normal(size=3)
        place = place + step / np.linalg.norm(step) * rng.uniform(0.2, 0.45)
    return parts


# ---------------------------------------------------------------------------------------------------------------
# held out


def teapot(rng: Rng) -> list[Part]:
    material = _ceramic(rng)
    r, h = rng.uniform(0.38, 0.48), rng.uniform(0.55, 0.7)
    outer = curve([(r * 0.6, 0.0), (r, h * 0.45), (r * 0.55, h)], 10)
    parts = [Part(lathe([(0, 0), *outer, (0, h)]), material)]
    lid = material if rng.random() < 0.5 else plain(rng)
    parts += [
        Part(lathe([(0, h - 0.02), (r * 0.58, h - 0.02), (r * 0.5, h + 0.05), (0, h + 0.1)]), lid),
        Part(ball((0.06, 0.06, 0.06), (0, 0, h + 0.13)), lid),
    ]
    spout = curve([(r * 0.8, 0, h * 0.3), (r * 1.3, 0, h * 0.5), (r * 1.45, 0, h * 0.8), (r * 1.7, 0, h * 0.95)])
    parts.append(Part(tube(spout, list(np.linspace(0.11, 0.05, len(spout)))), material))
    handle = curve([(-r * 0.65, 0, h * 0.88), (-r * 1.4, 0, h * 0.9), (-r * 1.55, 0, h * 0.5), (-r * 0.9, 0, h * 0.25)])
    parts.append(Part(tube(handle, 0.045), material))
    return parts


def rocket(rng: Rng) -> list[Part]:
    body, accent = patterned(rng, pale(rng)), plain(rng, bright(rng))
    height, r = rng.uniform(1.1, 1.5), rng.uniform(0.18, 0.26)
    outer = curve([(r * 0.7, 0.1), (r, height * 0.4), (r * 0.8, height * 0.7), (r * 0.4, height * 0.9)])
    nose = curve([(r * 0.4, height * 0.9), (r * 0.2, height * 0.97), (0.0, height * 1.03)])
    parts = [
        Part(lathe([(0, 0.1), *outer, (0, height * 0.9)]), body),
        Part(lathe([(0, height * 0.89), *((max(a, 0.0), b) for a, b in nose)]), accent),
    ]
    parts.append(Part(cylinder(r * 0.5, 0.0, 0.12, r * 0.35), metal(rng)))
    count = int(rng.integers(3, 5))
    fin = prism([(r * 0.5, 0.12), (r * 2.0, -0.1), (r * 2.1, 0.1), (r * 0.8, height * 0.4)], -0.03, 0.03).turned(
        "x", 90
    )
    for k in range(count):
        parts.append(Part(fin.turned("z", 360 * k / count + 90), accent))
    parts.append(Part(cylinder(r * 0.42, 0, r * 1.03).turned("x", 90).moved(z=height * 0.58), metal(rng)))
    parts.append(
        Part(
            cylinder(r * 0.32, 0, r * 1.07).turned("x", 90).moved(z=height * 0.58),
            Material((0.3, 0.5, 0.7), roughness=0.1),
        )
    )
    return parts


FAMILIES: dict[str, Callable[[Rng], list[Part]]] = {
    family.__name__: family
    for family in (
        chair, stool, table, bench, shelf, lamp, mug, bottle, vase, bowl, crate, glyph, house, car, plane, boat, train,
        tree, cactus, mushroom, snowman, figure, animal, hammer, sword, spoon, clock, dumbbell, umbrella, assembly,
        teapot, rocket, bird, inlaid_glyph,
    )
}  # fmt: skip
HELD_OUT = ("teapot", "rocket")
"""Families that no training ever sees."""
SEEN = tuple(name for name in FAMILIES if name not in HELD_OUT)
TESTED = tuple(name for name in SEEN if name not in ("bird", "inlaid_glyph"))
"""Those of the list of test objects, which was there before the others."""
WEIGHTS = {
    "assembly": 3.0, "chair": 2.0, "table": 2.0, "bench": 2.0, "boat": 1.5, "glyph": 3.0, "inlaid_glyph": 5.0,
    "bird": 4.0,
}  # fmt: skip
"""How often families are drawn, against 1."""
