"""Filling the gaps of an image."""

from __future__ import annotations

import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor


def fill_gaps(image: Tensor, mask: Tensor) -> Tensor:
    """Give every texel outside ``mask`` the value of the nearest texel inside it.

    image: (H, W, C), any type. mask: (H, W) bool. Returns (H, W, C), a new tensor; where the mask is empty, a
    copy. On a CPU by scipy's exact distance transform. Raises ValueError naming the argument.
    """
    if image.ndim != 3:
        raise ValueError(f"image must have shape (H, W, C), not {tuple(image.shape)}.")
    if mask.shape != image.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool of shape {tuple(image.shape[:2])}, not {tuple(mask.shape)}.")
    if not bool(mask.any()):
        return image.clone()
    nearest = distance_transform_edt(~mask.cpu().numpy(), return_distances=False, return_indices=True)
    row, column = torch.from_numpy(nearest[:, ~mask.cpu().numpy()]).to(image.device)
    filled = image.clone()
    filled[~mask] = image[row, column]
    return filled
