"""Pictures with a known object mask, drawn without any file."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

_SUPERSAMPLING = 4


def object_mask(size: int, *, margin: float = 0.15) -> NDArray[np.float32]:
    """(size, size) coverage in [0, 1] of a toy: round body, spikes, a ring to see through and a thin antenna."""
    side = size * _SUPERSAMPLING
    image = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(image)

    def at(x: float, y: float) -> tuple[float, float]:
        scale = 1 - 2 * margin
        return (margin + x * scale) * side, (margin + y * scale) * side

    draw.ellipse([*at(0.15, 0.3), *at(0.75, 0.9)], fill=255)
    for angle in np.linspace(0, 2 * np.pi, 7, endpoint=False):
        tip = at(0.45 + 0.45 * np.cos(angle), 0.6 + 0.39 * np.sin(angle))
        sides = [at(0.45 + 0.2 * np.cos(angle + d), 0.6 + 0.2 * np.sin(angle + d)) for d in (-0.4, 0.4)]
        draw.polygon([tip, *sides], fill=255)
    draw.ellipse([*at(0.6, 0.0), *at(0.98, 0.38)], fill=255)
    draw.ellipse([*at(0.7, 0.1), *at(0.88, 0.28)], fill=0)
    draw.line([at(0.3, 0.4), at(0.12, 0.02)], fill=255, width=max(1, round(0.012 * side)))
    small = image.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255


def object_colour(size: int, *, dark: bool = False) -> NDArray[np.float32]:
    """(size, size, 3) in [0, 1]: red, blue and grey stripes, shaded, with one almost white highlight."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    shade = 0.7 + 0.3 * np.cos(3 * (x - 0.3)) * np.cos(3 * (y - 0.35))
    paint = np.array([[0.75, 0.2, 0.12], [0.15, 0.35, 0.6], [0.6, 0.6, 0.62]], np.float32)
    colour = paint[np.floor(x * 14).astype(int) % 3] * shade[..., None]
    highlight = np.exp(-((x - 0.42) ** 2 + (y - 0.5) ** 2) / 0.002)[..., None]
    colour = colour + (0.98 - colour) * highlight
    return (colour * 0.5 if dark else colour).astype(np.float32)


def background(kind: str, size: int, mask: NDArray[np.float32]) -> NDArray[np.float32]:
    """(size, size, 3) in [0, 1]; kind is white, grey, gradient (with a soft shadow of the mask), dark or busy."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    ones = np.ones((size, size, 3), np.float32)
    if kind == "white":
        return ones
    if kind == "grey":
        return ones * np.float32([0.5, 0.55, 0.45])
    if kind == "dark":
        return ones * np.float32([0.04, 0.045, 0.05])
    if kind == "gradient":
        field = 0.95 - 0.3 * y - 0.1 * (x - 0.5) ** 2
        shadow = Image.fromarray((mask * 255).astype(np.uint8)).resize((size, size // 4))
        canvas = Image.new("L", (size, size), 0)
        canvas.paste(shadow, (round(size * 0.03), round(size * 0.68)))
        small = canvas.resize((32, 32), Image.Resampling.BOX).resize((size, size), Image.Resampling.BICUBIC)
        field = field * (1 - 0.35 * np.asarray(small, np.float32) / 255)
        return np.stack([field, field * 0.97, field * 0.92], axis=-1)
    assert kind == "busy"
    noise = np.random.default_rng(7).random((24, 24, 3))
    tiles = Image.fromarray((noise * 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(tiles, dtype=np.float32) / 255


def scene(kind: str, size: int, *, margin: float = 0.15) -> tuple[Image.Image, NDArray[np.float32]]:
    """Return the RGB picture of the toy on ``background(kind)`` with a little sensor noise, and its mask."""
    mask = object_mask(size, margin=margin)
    behind = background(kind, size, mask)
    picture = object_colour(size, dark=kind == "dark") * mask[..., None] + behind * (1 - mask[..., None])
    picture = picture + np.random.default_rng(1).normal(0, 0.006, picture.shape)
    return Image.fromarray((picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)), mask


def intersection_over_union(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Of the sets where two coverages exceed one half."""
    a, b = first > 0.5, second > 0.5
    return float((a & b).sum() / (a | b).sum())
