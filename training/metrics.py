"""How near a generated asset is to the true one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from o_voxel.closest import Surface
from torch import Tensor

from trellis2.mesh import Asset, Mesh
from trellis2.render import Camera, render

POINTS = 20000
VIEW = 256  # side of the pictures that are compared


@dataclass(frozen=True)
class Metrics:
    """f1, f5: F-score at 1% and 5% of the longest side of the true bounding box. silhouette: intersection over union
    of the masks in the input view. color: PSNR in dB of the base colour there, where both show a surface."""

    f1: float
    f5: float
    silhouette: float
    color: float


def compare(found: Asset, true: Asset, camera: Camera) -> Metrics:
    """Metrics of an asset against the true one; camera: the input view.  An asset without faces gets zeros."""
    if not len(found.mesh.faces):
        return Metrics(0.0, 0.0, 0.0, 0.0)
    vertices = true.mesh.vertices[true.mesh.faces.flatten().long()]
    longest = float((vertices.amax(0) - vertices.amin(0)).max())
    there = distances(found.mesh, true.mesh) / longest
    back = distances(true.mesh, found.mesh) / longest
    seen = [render(a, camera, "studio", resolution=VIEW, layers=1, ambient_occlusion=False) for a in (found, true)]
    masks = [s["mask"] > 0.5 for s in seen]
    both, either = masks[0] & masks[1], masks[0] | masks[1]
    error = (seen[0]["base_color"].clamp(0, 1) - seen[1]["base_color"].clamp(0, 1)).square().mean(0)[both]
    return Metrics(
        f1=f_score(there, back, 0.01),
        f5=f_score(there, back, 0.05),
        silhouette=float(both.sum() / either.sum().clamp_min(1)),
        color=psnr(float(error.mean())) if len(error) else 0.0,
    )


def f_score(there: Tensor, back: Tensor, threshold: float) -> float:
    """Harmonic mean of the shares of both sets of distances below the threshold."""
    precision, recall = float((there < threshold).float().mean()), float((back < threshold).float().mean())
    return 2 * precision * recall / max(precision + recall, 1e-9)


def psnr(mean_square: float) -> float:
    """Of values in [0, 1], at most 60 dB."""
    return -10 * math.log10(max(mean_square, 1e-6))


def distances(of: Mesh, to: Mesh) -> Tensor:
    """From points spread evenly over one surface to the other, (POINTS,)."""
    return Surface(to.vertices, to.faces).closest(surface_points(of)).distance


def surface_points(mesh: Mesh, count: int = POINTS, seed: int = 0) -> Tensor:
    """(count, 3), the same ones each time."""
    corners = mesh.vertices[mesh.faces.long()]
    area = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]).norm(dim=1).double()
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(count, generator=generator, dtype=torch.float64).to(area.device)
    face = torch.searchsorted(area.cumsum(0) / area.sum(), spread).clamp_max(len(area) - 1)
    u, v = (torch.rand(count, generator=generator).to(area.device) for _ in range(2))
    root = u.sqrt()
    weights = torch.stack([1 - root, root * (1 - v), root * v], 1)
    return (corners[face] * weights[:, :, None]).sum(1)
