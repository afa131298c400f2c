"""Separates an object from a plain background without a neural network.

A smooth colour surface is fitted to the border of the picture (a studio backdrop with its gradient and vignette),
what deviates from it seeds GrabCut (Rother et al., SIGGRAPH 2004; OpenCV's implementation), and a band of a few
pixels around the contour gets fractional coverage from the colours on its two sides. Good on plain backgrounds;
on busy ones it says that it is unsure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

Array = NDArray[Any]

WORK_SIDE = 512
"""Longest side, in pixels, at which the object is segmented; only the contour is computed at full size."""

_GRABCUT_ROUNDS = 3
_SEED = 20
# Smallest standard deviations of a backdrop in CIE L*, a*, b*: below them lies the noise of 8 bits and of JPEG.
_NOISE_FLOOR = np.array([1.5, 1.2, 1.2], np.float32)
_SOFT_SLOPE = 2.5  # CIE Lab units per pixel
# The dark middle of a shadow is steeper; it has the backdrop's hue (CIE a*, b*) and is so few pixels away.
_SHADOW_SLOPE, _SHADOW_HUE, _SHADOW_STEP = 5.0, 6.0, 12
_SAME, _ALIKE, _DIFFERENT = 3.0, 5.0, 9.0  # distances to the backdrop in standard deviations


@dataclass(frozen=True)
class Matte:
    """An object without its background.

    alpha: (H, W) float32 in [0, 1]. colour: (H, W, 3) uint8, free of the background's colour where alpha is
    fractional. warnings: sentences for the user, empty where the result can be trusted.
    """

    alpha: Array
    colour: Array
    warnings: tuple[str, ...]


def separate(image: Image.Image) -> Matte:
    """Find the object in an RGB picture. The same picture gives the same bytes on any number of threads."""
    colour = np.asarray(image)
    height, width = colour.shape[:2]
    scale = min(1.0, WORK_SIDE / max(width, height))
    small_size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(colour, small_size, interpolation=cv2.INTER_AREA)
    lab = cv2.cvtColor(small.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    distance, busy = _distance_to_backdrop(lab)
    outside = _joined_to_border(distance < _SAME)
    reach = _smooth_reach(lab, outside)
    trimap = _seeds_by_colour(lab) if busy else _seeds_by_distance(distance, outside, reach)
    mask = _without_specks(_segment(small, trimap))
    alpha, clean = _soften(colour, mask)
    return Matte(alpha, clean, _doubts(mask, distance, reach, busy))


def _border(height: int, width: int, share: float = 0.025) -> Array:
    """(height, width) bool, true in a frame along the edges."""
    band = max(2, round(share * max(height, width)))
    border = np.ones((height, width), bool)
    border[band:-band, band:-band] = False
    return border


def _distance_to_backdrop(lab: Array) -> tuple[Array, bool]:
    """(H, W) float32 distance of each pixel to the fitted backdrop in standard deviations, and whether it is busy.

    The surface is a quadric per channel, fitted to the border, then to all that looks like it and hangs
    together with the border; each fit leaves out what is far off, such as an object that is cut by the border.
    """
    height, width = lab.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    basis = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)
    border = _border(height, width)
    support, busy = border, False
    for fit in range(3):
        keep = support
        for _ in range(4):
            surface, *_ = np.linalg.lstsq(basis[keep].astype(np.float64), lab[keep], rcond=None)
            residual = lab - (basis @ surface.astype(np.float32))
            spread = np.maximum(1.4826 * np.median(np.abs(residual[keep]), axis=0), _NOISE_FLOOR)
            distance = np.linalg.norm(residual / spread, axis=-1)
            keep = support & (distance < _SAME)
        if fit == 0:
            busy = bool(np.linalg.norm(spread) > 12 or (distance[border] < _ALIKE).mean() < 0.7)
        support = _joined_to_border(distance < _SAME) | keep
    return distance.astype(np.float32), busy


def _joined_to_border(region: Array) -> Array:
    """The part of ``region`` (H, W) bool whose components touch the edge of the picture."""
    _, labels = cv2.connectedComponents(region.astype(np.uint8), connectivity=4)
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    return np.asarray(np.isin(labels, np.unique(edge[edge > 0])))


def _smooth_reach(lab: Array, start: Array) -> Array:
    """What can be reached from ``start`` without crossing an edge: soft shadows on the backdrop, and then their dark
    middles."""
    soft = cv2.GaussianBlur(lab, (0, 0), 1.0)
    slopes = [cv2.Sobel(soft, cv2.CV_32F, *axis, scale=1 / 8) for axis in ((1, 0), (0, 1))]
    slope = np.linalg.norm(np.concatenate(slopes, axis=-1), axis=-1)
    calm = (slope < _SOFT_SLOPE) | start
    # Narrow passages are leaks into the object where its colour happens to be that of the shadow.
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (9, 9))
    wide = cv2.erode(calm.astype(np.uint8), kernel)
    _, labels = cv2.connectedComponents(wide, connectivity=4)
    reached = np.isin(labels, np.unique(labels[start & (wide > 0)])) & (wide > 0)
    reached = cv2.dilate(reached.astype(np.uint8), kernel).astype(bool) & calm
    shadow = (slope < _SHADOW_SLOPE) & _shaded(lab, start)
    return np.asarray(ndimage.binary_dilation(reached, np.ones((3, 3)), iterations=_SHADOW_STEP, mask=shadow))


def _shaded(lab: Array, backdrop: Array) -> Array:
    """Where (H, W) the colour could be that of the region ``backdrop`` in less light."""
    if not backdrop.any():
        return backdrop
    usual = np.median(lab[backdrop], axis=0)
    # Less light scales L* + 16, a* and b* alike: all three are linear in cube roots.
    expected = usual[1:] * (lab[..., :1] + 16) / (usual[0] + 16)
    return np.asarray((lab[..., 0] < usual[0]) & (np.linalg.norm(lab[..., 1:] - expected, axis=-1) < _SHADOW_HUE))


def _see_through(distance: Array, outside: Array) -> Array:
    """Backdrop seen through holes of the object: enclosed, of the backdrop's colour, and sharply bounded.

    A highlight of the same colour fades out softly, so that it grows when the threshold is loosened.
    """
    holes = np.zeros_like(outside)
    count, labels = cv2.connectedComponents(((distance < _SAME) & ~outside).astype(np.uint8), connectivity=4)
    loose = distance < 2 * _DIFFERENT
    for label in range(1, count):
        hole = labels == label
        if hole.sum() < 12:
            continue
        rim = cv2.dilate(hole.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool) & ~hole
        if (loose & rim).sum() < 0.5 * rim.sum():
            holes |= hole
    return holes


def _segment(small: Array, trimap: Array) -> Array:
    """(H, W) uint8, 1 where the object is; ``trimap`` is changed."""
    found = (trimap == cv2.GC_FGD) | (trimap == cv2.GC_PR_FGD)
    if not found.any():
        return found.astype(np.uint8)
    cv2.setRNGSeed(_SEED)
    cv2.grabCut(small, trimap, None, np.zeros((1, 65)), np.zeros((1, 65)), _GRABCUT_ROUNDS, cv2.GC_INIT_WITH_MASK)
    return ((trimap == cv2.GC_FGD) | (trimap == cv2.GC_PR_FGD)).astype(np.uint8)


def _seeds_by_distance(distance: Array, outside: Array, reach: Array) -> Array:
    """GrabCut's mask (H, W) uint8 for a plain backdrop. reach: see ``_smooth_reach``, from ``outside`` on."""
    sure = outside | _see_through(distance, outside)
    shadow = reach & ~sure
    trimap = np.full(distance.shape, cv2.GC_PR_FGD, np.uint8)
    trimap[(distance < _ALIKE) | shadow] = cv2.GC_PR_BGD
    core = cv2.erode((~sure & ~shadow).astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    trimap[core & (distance > _DIFFERENT)] = cv2.GC_FGD
    trimap[sure] = cv2.GC_BGD
    return trimap


def _seeds_by_colour(lab: Array) -> Array:
    """GrabCut's mask (H, W) uint8 for a busy backdrop: colours that are commoner in the middle than at the border."""
    height, width = lab.shape[:2]
    bins = (np.clip((lab + np.array([0, 100, 100])) / np.array([100, 200, 200]), 0, 0.999) * 16).astype(int)
    index = np.ravel_multi_index(tuple(np.moveaxis(bins, -1, 0)), (16, 16, 16))
    border = _border(height, width, 0.08)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    middle = x * x + y * y < 0.4

    def frequency(region: Array) -> Array:
        cube = np.bincount(index[region], minlength=16**3).astype(np.float64).reshape(16, 16, 16)
        smooth = ndimage.gaussian_filter(cube, 0.7) / region.sum()
        return np.asarray(smooth.reshape(-1)[index])

    likely = frequency(middle) > 1.5 * frequency(border) + 1e-4
    trimap = np.where(likely, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    trimap[_border(height, width)] = cv2.GC_BGD
    return trimap


def _without_specks(mask: Array) -> Array:
    """Drop components below one hundredth of the largest one, and fill pinholes."""
    for value, least in ((1, 0.01), (0, 0.0)):
        count, labels, stats, _ = cv2.connectedComponentsWithStats((mask == value).astype(np.uint8), connectivity=4)
        areas = stats[1:, cv2.CC_STAT_AREA]
        if count > 1:
            small = np.flatnonzero(areas < max(12, least * areas.max())) + 1
            mask = np.where(np.isin(labels, small), 1 - value, mask).astype(np.uint8)
    return mask


def _soften(colour: Array, mask: Array) -> tuple[Array, Array]:
    """Coverage and clean colour at full size from the segmentation ``mask`` (h, w) of the reduced picture.

    In a band around the contour a pixel is taken as a blend of the mean colours on its two sides.
    """
    height, width = colour.shape[:2]
    if mask.shape != (height, width):
        field = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
        mask = (field > 0.5).astype(np.uint8)
    radius = 2 + round(max(width, height) / WORK_SIDE)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius - 1, 2 * radius - 1))
    inside, reach = cv2.erode(mask, kernel), cv2.dilate(mask, kernel)
    band = (reach > 0) & (inside == 0)
    window = (4 * radius + 1, 4 * radius + 1)
    picture = colour.astype(np.float32)

    def mean(weight: Array) -> tuple[Array, Array]:
        total = cv2.boxFilter(weight, -1, window, normalize=False)
        summed = cv2.boxFilter(picture * weight[..., None], -1, window, normalize=False)
        return summed / np.maximum(total, 1e-3)[..., None], total

    behind, _ = mean((reach == 0).astype(np.float32))
    contrast = np.linalg.norm(picture - behind, axis=-1)
    front, _ = mean(mask * (contrast**2 + 1))
    axis = front - behind
    length = (axis**2).sum(-1)
    blend = ((picture - behind) * axis).sum(-1) / np.maximum(length, 1)
    blend = np.clip((blend - 0.04) / 0.88, 0, 1)
    fallback = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 0.7)
    trust = np.clip((np.sqrt(length) - 10) / 20, 0, 1)
    alpha = np.where(band, trust * blend + (1 - trust) * fallback, mask.astype(np.float32))
    alpha = np.ascontiguousarray(alpha, np.float32)
    pure = (picture - (1 - alpha[..., None]) * behind) / np.maximum(alpha, 0.1)[..., None]
    clean = np.where((band & (alpha < 1))[..., None], pure, picture)
    return alpha, np.clip(clean + 0.5, 0, 255).astype(np.uint8)


def _doubts(mask: Array, distance: Array, reach: Array, busy: bool) -> tuple[str, ...]:
    """One sentence with every reason to distrust ``mask`` (H, W), or nothing."""
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    areas = np.sort(stats[1:, cv2.CC_STAT_AREA])[::-1]
    cover = float(mask.mean())
    inside = mask > 0
    shadow = reach & ~inside & (distance > _DIFFERENT)
    contrary = (inside & (distance < _SAME)) | (~inside & ~shadow & (distance > _DIFFERENT))
    contrary &= cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) == 0  # blended pixels
    edge = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    found = {
        "the background is not plain": busy,
        "the object touches the edge of the picture": bool(edge.mean() > 0.01),
        "it is in several pieces": len(areas) > 6 or (len(areas) > 1 and areas[0] < 0.8 * areas.sum()),
        "the object is very small": 0 < cover < 0.01,
        "the object fills nearly all of the picture": cover > 0.8,
        "the object and the background have similar colours": not busy and contrary.mean() > 0.03 * cover,
        "the background has a strong shadow": not busy and shadow.mean() > 0.2 * cover,
    }
    reasons = [reason for reason, holds in found.items() if holds]
    if not reasons:
        return ()
    return (
        f"The background was removed by colour and may be wrong, because {' and '.join(reasons)}; "
        "give a PNG with a transparent background for a sure result.",
    )
