"""Procedural materials: a point in space -> base colour, metallic, roughness, alpha."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Color = tuple[float, float, float]
Pattern = Callable[[Array], Array]
"""Points (P, 3) in the object's own units, about one unit large -> weights (P,) in [0, 1] of the second colour."""


@dataclass(frozen=True)
class Material:
    """colors: sRGB in [0, 1], the second one where ``pattern`` says so. metallic, roughness, alpha in [0, 1]."""

    color: Color
    other: Color | None = None
    pattern: Pattern | None = None
    metallic: float = 0.0
    roughness: float = 0.6
    alpha: float = 1.0

    def at(self, points: Array) -> Array:
        """(P, 6): base colour, metallic, roughness, alpha."""
        out = np.empty((len(points), 6), np.float32)
        out[:, :3] = self.color
        if self.other is not None and self.pattern is not None:
            weight = self.pattern(points)[:, None]
            out[:, :3] += weight * (np.array(self.other) - np.array(self.color))
        out[:, 3:] = self.metallic, self.roughness, self.alpha
        return out


def bright(rng: np.random.Generator) -> Color:
    """A saturated colour."""
    return colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.55, 0.95), rng.uniform(0.6, 0.95))


def pale(rng: np.random.Generator) -> Color:
    return colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.05, 0.35), rng.uniform(0.8, 0.95))


def dark(rng: np.random.Generator) -> Color:
    return colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.1, 0.6), rng.uniform(0.1, 0.3))


def grey(rng: np.random.Generator, low: float = 0.1, high: float = 0.9) -> Color:
    value = rng.uniform(low, high)
    return (value, value, value)


def wood_color(rng: np.random.Generator) -> Color:
    return colorsys.hsv_to_rgb(rng.uniform(0.05, 0.1), rng.uniform(0.4, 0.75), rng.uniform(0.35, 0.8))


def green(rng: np.random.Generator) -> Color:
    return colorsys.hsv_to_rgb(rng.uniform(0.23, 0.4), rng.uniform(0.45, 0.8), rng.uniform(0.3, 0.65))


def any_color(rng: np.random.Generator) -> Color:
    return (bright, bright, bright, pale, dark, wood_color)[rng.integers(6)](rng)


def wood(rng: np.random.Generator, color: Color | None = None) -> Material:
    """Grain along one axis."""
    base = color or wood_color(rng)
    other = tuple(c * rng.uniform(0.65, 0.85) for c in base)
    axis, scale, phase = rng.integers(3), rng.uniform(9, 16), rng.uniform(0, 6, 3)

    def grain(p: Array) -> Array:
        across = np.delete(p, axis, axis=1)
        wave = across @ np.array([scale, 0.7 * scale]) + 0.8 * np.sin(3 * p[:, axis] + phase[0])
        return 0.5 + 0.5 * np.sin(2 * wave + np.sin(2.3 * wave + phase[1]) + phase[2])

    return Material(base, other, grain, roughness=rng.uniform(0.45, 0.8))


def metal(rng: np.random.Generator) -> Material:
    colors = [(0.9, 0.9, 0.92), (0.76, 0.77, 0.79), (1.0, 0.84, 0.42), (0.94, 0.63, 0.45), (0.83, 0.69, 0.42)]
    return Material(colors[rng.integers(len(colors))], metallic=1.0, roughness=rng.uniform(0.15, 0.5))


def glass(rng: np.random.Generator) -> Material:
    return Material(pale(rng), roughness=rng.uniform(0.05, 0.2), alpha=rng.uniform(0.3, 0.55))


def plain(rng: np.random.Generator, color: Color | None = None) -> Material:
    return Material(color or any_color(rng), roughness=rng.uniform(0.25, 0.9))


def patterned(rng: np.random.Generator, color: Color | None = None) -> Material:
    """One colour, or two in stripes, checks, dots, rings, a gradient or clouds."""
    base = color or any_color(rng)
    if rng.random() < 0.45:
        return plain(rng, base)
    other = any_color(rng)
    while sum(abs(a - b) for a, b in zip(base, other, strict=True)) < 0.5:
        other = any_color(rng)
    kind = (stripes, checks, dots, gradient, clouds)[rng.integers(5)]
    return Material(base, other, kind(rng), roughness=rng.uniform(0.25, 0.9))


def stripes(rng: np.random.Generator, axis: int | None = None, count: float | None = None) -> Pattern:
    """``count``: pairs of stripes to a unit of length."""
    along = rng.integers(3) if axis is None else axis
    period = rng.uniform(4, 9) if count is None else count
    phase, share = rng.random(), rng.uniform(0.3, 0.6)
    return lambda p: ((p[:, along] * period + phase) % 1 < share).astype(float)


def checks(rng: np.random.Generator) -> Pattern:
    scale, phase = rng.uniform(4, 8), rng.random(3)
    return lambda p: np.floor(p * scale + phase).sum(1) % 2


def dots(rng: np.random.Generator) -> Pattern:
    scale, phase, radius = rng.uniform(5, 9), rng.random(3), rng.uniform(0.3, 0.42)
    return lambda p: (np.linalg.norm((p * scale + phase) % 1 - 0.5, axis=1) < radius).astype(float)


def gradient(rng: np.random.Generator, axis: int = 2) -> Pattern:
    """From one colour to the other over the middle of a unit of length."""
    return lambda p: np.clip(p[:, axis] * 1.2 + 0.5, 0, 1)


def clouds(rng: np.random.Generator) -> Pattern:
    waves, phases = rng.normal(0, 9, (5, 3)), rng.uniform(0, 2 * math.pi, 5)
    return lambda p: np.clip(0.5 + 0.45 * np.sin(p @ waves.T + phases).sum(1) / 1.5, 0, 1)
