"""Filling the gaps of an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .launch import Ints, func, kernel, launch, shared, wp

if TYPE_CHECKING:
    Bytes = Any
else:
    Bytes = wp.array(dtype=wp.uint8)

_STRIP = 64  # columns that one item of a CPU walks together: a cache line of rows at a time
_BLOCK = 1 << 24  # texels whose search is held in memory at once


def fill_gaps(image: Tensor, mask: Tensor) -> Tensor:
    """Give every texel outside ``mask`` the value of the nearest texel inside it.

    image: (H, W, C), any type. mask: (H, W) bool, both sides below 32768. Of several nearest texels the one in
    the leftmost column counts, of two in that column the upper one. Returns (H, W, C), a new tensor; where the
    mask is empty, a copy. Equal input gives equal bits on every device. Raises ValueError naming the argument.
    """
    if image.ndim != 3:
        raise ValueError(f"image must have shape (H, W, C), not {tuple(image.shape)}.")
    if mask.shape != image.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool of shape {tuple(image.shape[:2])}, not {tuple(mask.shape)}.")
    height, width = mask.shape
    if max(height, width) >= 1 << 15:
        raise ValueError(f"image must have sides below {1 << 15}, not {tuple(image.shape)}.")
    image, mask, device = image.contiguous(), mask.contiguous(), image.device
    filled = image.clone()
    size = image.shape[2] * image.element_size()
    if not bool(mask.any()):
        return filled
    # First the nearest row within each column, then along each row the lower envelope of the columns' parabolas
    # (A. Meijster et al., A general algorithm for computing distance transforms in linear time, 2000).
    rows = torch.arange(height, dtype=torch.int32, device=device)
    nearest = torch.where(mask, rows[:, None], -1)
    strip = 1 if image.is_cuda else _STRIP
    launch(_within_columns, -(-width // strip), [shared(nearest.view(-1), wp.int32), height, width, strip], device)
    pixels = [shared(part.view(-1).view(torch.uint8), wp.uint8) for part in (image, filled)]
    at_once = min(height, max(1, _BLOCK // width))
    scratch = torch.empty((3, at_once, width), dtype=torch.int32, device=device)
    for first in range(0, height, at_once):
        block = slice(first, min(first + at_once, height))
        count = block.stop - first
        arrays = [shared(part.view(-1), wp.int32) for part in (nearest[block], *scratch[:, :count])]
        launch(_along_rows, count, [*arrays, first, width], device)
        arrays = [shared(part.view(-1), wp.int32) for part in (nearest[block], scratch[2, :count])]
        launch(_copy, count * width, [*arrays, *pixels, first, width, size], device)
    return filled


@kernel
def _within_columns(first: int, nearest: Ints, height: int, width: int, strip: int) -> None:
    """Rows that are -1 become the nearest row of their column that is not."""
    left = (first + wp.tid()) * strip
    right = wp.min(left + strip, width)
    for row in range(1, height):
        for here in range(row * width + left, row * width + right):
            if nearest[here] < 0:
                nearest[here] = nearest[here - width]
    for step in range(1, height):
        row = height - 1 - step
        for here in range(row * width + left, row * width + right):
            # What is nearest to the row below serves this row only where it does not lie above.
            below = nearest[here + width]
            above = nearest[here]
            if below > row and (above < 0 or below - row < row - above):
                nearest[here] = below


@func
def _square(x: int, u: int, rise: int) -> int:
    """Squared distance from column ``x`` of a row to what lies ``rise`` rows away in column ``u``."""
    return (x - u) * (x - u) + rise * rise


@kernel
def _along_rows(first: int, nearest: Ints, stack: Ints, begin: Ints, column: Ints, top_row: int, width: int) -> None:
    """For each texel of a row the column that holds the nearest texel of all.

    ``stack`` holds the columns that are nearest somewhere, from left to right, and ``begin`` from where on.
    """
    i = first + wp.tid()
    row = top_row + i
    base = i * width
    top = wp.int32(-1)
    for u in range(width):
        found = nearest[base + u]
        if found >= 0:
            rise = row - found
            searching = wp.bool(True)
            start = wp.int32(0)
            while searching:
                if top < 0:
                    searching = False
                else:
                    s = stack[base + top]
                    t = begin[base + top]
                    rise_s = row - nearest[base + s]
                    if _square(t, s, rise_s) > _square(t, u, rise):
                        top -= 1
                    else:
                        # The last column where s is at least as near as u.
                        start = (u * u - s * s + rise * rise - rise_s * rise_s) // (2 * (u - s)) + 1
                        searching = False
            if start < width:
                top += 1
                stack[base + top] = u
                begin[base + top] = start
    for step in range(width):
        u = width - 1 - step
        column[base + u] = stack[base + top]
        if begin[base + top] == u:
            top -= 1


@kernel
def _copy(
    first: int, nearest: Ints, column: Ints, image: Bytes, filled: Bytes, top_row: int, width: int, size: int
) -> None:
    """Texel by texel, ``size`` bytes each, from where the search ended."""
    i = first + wp.tid()
    row = i // width
    if nearest[i] == top_row + row:
        return
    u = column[i]
    source = wp.int64(nearest[row * width + u] * width + u) * wp.int64(size)
    target = wp.int64(top_row * width + i) * wp.int64(size)
    for k in range(size):
        filled[target + wp.int64(k)] = image[source + wp.int64(k)]
