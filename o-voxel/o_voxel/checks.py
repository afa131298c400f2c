"""What every mesh op asks of its mesh."""

from __future__ import annotations

import torch
from torch import Tensor


def check_mesh(vertices: Tensor, faces: Tensor) -> None:
    """Raise ValueError unless vertices are (V, 3) finite floats and faces (F, 3) integers in [0, V)."""
    check_points("vertices", vertices)
    check_faces(faces, len(vertices))


def check_points(name: str, points: Tensor, width: int = 3) -> None:
    """Raise ValueError unless ``points`` are (N, width) finite floats."""
    if points.ndim != 2 or points.shape[1] != width or not points.is_floating_point():
        raise ValueError(f"{name} must be floats of shape (N, {width}), not {points.dtype} {tuple(points.shape)}.")
    if not bool(points.isfinite().all()):
        raise ValueError(f"{name} must be finite, but hold NaN or infinity.")


def check_faces(faces: Tensor, count: int) -> None:
    """Raise ValueError unless ``faces`` are (F, 3) integers in [0, count)."""
    if faces.ndim != 2 or faces.shape[1] != 3 or faces.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"faces must be integers of shape (F, 3), not {faces.dtype} {tuple(faces.shape)}.")
    if len(faces) and (int(faces.min()) < 0 or int(faces.max()) >= count):
        raise ValueError(f"faces must hold indices from 0 to {count - 1}.")
