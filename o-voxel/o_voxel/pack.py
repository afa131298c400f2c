"""Packing charts into a square: outlines as bitmaps of coarse cells, each put where it ends lowest.

Bitmaps are made on the charts' own device. Placing them is one chain of decisions, which a single thread of the host
makes with whole words of bits at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .launch import Int64s, IntRows, Ints, Vec2s, func, kernel, launch, shared, wp

wp.set_module_options({"cpu_compiler_flags": ""})  # also runs beside a GPU: for any processor, see prebuild

if TYPE_CHECKING:
    Bytes = Any
else:
    Bytes = wp.array(dtype=wp.uint8)

_ANGLES, _FINER = 16, 6  # tried within a right angle, and then around the best of them
_DENSITY = 0.85  # of the first square that is tried: what charts and their padding cover
_TRIES = 3
_BUCKETS = 64
_STEPS = wp.constant(256)  # a chart higher than this many cells is tried at every second height, and so on


@dataclass(frozen=True)
class Placement:
    """For each of C charts, where a point goes: ``matrix`` (C, 2, 2) @ point + ``offset`` (C, 2), all float64."""

    matrix: Tensor
    offset: Tensor

    def __call__(self, points: Tensor, chart: Tensor) -> Tensor:
        """points (N, 2), chart (N,) -> (N, 2)"""
        return (self.matrix[chart] * points[:, None]).sum(2) + self.offset[chart]


@dataclass(frozen=True)
class _Shapes:
    """Charts of C, each in four turns: number quarters * C + chart. On the host, int32.

    size (4C, 2): cells across and up. first (4C + 1,): of the shape's runs of set cells, longest first.
    runs (R, 4): row, l, x, x': cells x to x' + 2^l - 1 of that row, from 2^l to 2^(l + 1) - 1 of them.
    """

    size: Tensor
    first: Tensor
    runs: Tensor


def pack(corners: Tensor, chart: Tensor, rim: Tensor, count: int, cell: float, gap: int) -> Placement:
    """Turn and move ``count`` charts into the unit square, all at one scale and ``gap`` cells apart.

    corners: (F, 3, 2) float64, counter-clockwise, no more than some thousand cells across. chart: (F,) int64.
    rim: indices of the half-edges 3 * face + corner whose beginnings hold each chart's convex hull.
    cell: edge of a square cell in units of ``corners``. Equal input gives equal bits.
    """
    cosine, sine = _upright(corners.reshape(-1, 2)[rim], chart[rim // 3], count)
    matrix = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1) / cell
    turned = torch.stack([(corners * row[chart][:, None]).sum(2) for row in matrix.unbind(1)], 2)
    low, high = extents(turned.reshape(-1, 2)[rim], chart[rim // 3], count)
    turned = (turned - low[chart][:, None]).float()
    size = (high - low).floor().long() + 1
    cells = _bitmaps(turned, chart, size)
    x, y, quarters, side = _arranged(_shapes(cells, size), gap)

    # A quarter turn of a box w x h takes (x, y) to (h - y, x).
    device = corners.device
    quarters, place = quarters.to(device), torch.stack([x, y], 1).to(device).double()
    width, height = size.double().unbind(1)
    offset = -low
    for quarter in (1, 2, 3):
        more = quarters >= quarter
        box = height if quarter % 2 else width
        matrix = torch.where(more[:, None, None], torch.stack([-matrix[:, 1], matrix[:, 0]], 1), matrix)
        moved = torch.stack([box - offset[:, 1], offset[:, 0]], 1)
        offset = torch.where(more[:, None], moved, offset)
    return Placement(matrix / side, (offset + place) / side)


def extents(points: Tensor, chart: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest coordinates (count, 2) of the points (N, 2) of each chart; inf, -inf where it has none."""
    index = chart[:, None].expand_as(points)
    low = torch.full((count, 2), torch.inf, dtype=points.dtype, device=points.device)
    return low.scatter_reduce(0, index, points, "amin"), (-low).scatter_reduce(0, index, points, "amax")


def _upright(points: Tensor, chart: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the turn that gives each chart its smallest box."""
    best = torch.zeros(count, dtype=torch.float64, device=points.device)
    smallest = torch.full_like(best, torch.inf)
    step = math.pi / 2 / _ANGLES
    for steps in (range(_ANGLES), [i / _FINER for i in range(1 - _FINER, _FINER)]):
        around = best.clone()
        for i in steps:
            angle = around + step * i
            cosine, sine = angle.cos()[chart], angle.sin()[chart]
            x, y = points.unbind(1)
            low, high = extents(torch.stack([cosine * x - sine * y, sine * x + cosine * y], 1), chart, count)
            area = (high - low).prod(1)
            better = area < smallest * (1 - 1e-6)  # not by rounding only
            smallest, best = torch.where(better, area, smallest), torch.where(better, angle, best)
    return best.cos(), best.sin()


def _bitmaps(corners: Tensor, chart: Tensor, size: Tensor) -> Tensor:
    """Cells (one byte each, charts one after the other, rows of ``size`` (C, 2) from below) that a face touches."""
    area = size.prod(1)
    cells = torch.zeros(int(area.sum()), dtype=torch.uint8, device=corners.device)
    box = torch.stack([area.cumsum(0) - area, size[:, 0], size[:, 1]], 1).int()
    arguments = [shared(corners.reshape(-1, 2).contiguous(), wp.vec2), shared(chart.int(), wp.int32)]
    launch(_touch, len(chart), [*arguments, shared(box, wp.int32), shared(cells, wp.uint8)], corners.device)
    return cells


def _quarter_turned(cells: Tensor, size: Tensor) -> Tensor:
    area = size.prod(1)
    first = area.cumsum(0) - area
    chart = torch.repeat_interleave(torch.arange(len(size), device=cells.device), area)
    place = torch.arange(len(cells), device=cells.device) - first[chart]
    width, height = size[chart].unbind(1)
    # Rows of the new box are the old columns.
    return cells[first[chart] + (height - 1 - place % height) * width + place // height]


def _shapes(cells: Tensor, size: Tensor) -> _Shapes:
    sizes = [size, size.flip(1)] * 2
    parts = []
    for quarter in (0, 1):
        count, row, begin, length = _runs(cells if quarter == 0 else _quarter_turned(cells, size), sizes[quarter])
        chart = torch.repeat_interleave(torch.arange(len(size), device=cells.device), count)
        width, height = sizes[quarter][chart].unbind(1)
        number = quarter * len(size) + chart
        parts.append(torch.stack([number, row, begin, length], 1))
        parts.append(torch.stack([number + 2 * len(size), height - 1 - row, width - begin - length, length], 1))
    runs = torch.cat(parts)
    number, length = runs[:, 0], runs[:, 3]
    # Long runs first: where one fits nowhere, its shape need not be looked at any further.
    runs = runs[torch.argsort(number * (int(size.max()) + 1) - length, stable=True)]
    counts = torch.bincount(number, minlength=4 * len(size))
    first = torch.cat([torch.zeros_like(counts[:1]), counts.cumsum(0)])
    _, row, begin, length = runs.unbind(1)
    level = torch.frexp(length.float()).exponent.long() - 1
    spans = torch.stack([row, level, begin, begin + length - (1 << level)], 1)
    return _Shapes(torch.cat(sizes).int().cpu(), first.int().cpu(), spans.int().cpu())


def _runs(cells: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs of set cells: (how many in each chart, row, first cell in the row, cells)."""
    chart_of_row = torch.repeat_interleave(torch.arange(len(size), device=cells.device), size[:, 1])
    width = size[:, 0][chart_of_row]
    row_end = width.cumsum(0)
    taken = torch.zeros(len(cells) + 2, dtype=torch.bool, device=cells.device)
    taken[1:-1] = cells != 0
    border = torch.zeros(len(cells) + 1, dtype=torch.bool, device=cells.device)
    border[row_end] = True
    begin = torch.nonzero(taken[1:-1] & (~taken[:-2] | border[:-1]))[:, 0]
    end = torch.nonzero(taken[1:-1] & (~taken[2:] | border[1:]))[:, 0] + 1
    row = torch.searchsorted(row_end, begin, right=True)
    chart = chart_of_row[row]
    first_row = size[:, 1].cumsum(0) - size[:, 1]
    counts = torch.bincount(chart, minlength=len(size))
    return counts, row - first_row[chart], begin - (row_end - width)[row], end - begin


def _arranged(shapes: _Shapes, gap: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Cell of each chart's box, its quarter turns, and the side of the square that holds them all."""
    size = shapes.size[: len(shapes.size) // 4].long()
    order = torch.argsort(size.sum(1), descending=True, stable=True).int()
    widest, smallest = int(size.max()), int(size.amin(1).max()) + 2 * gap
    _, level, begin, rest = shapes.runs.long().unbind(1)
    covered = float((rest + (1 << level) - begin + gap).sum()) / 4 + gap * float(size[:, 0].sum())
    width = max(int(math.sqrt(covered / _DENSITY)), smallest)
    found: tuple[Tensor, Tensor, Tensor, int] | None = None
    for _ in range(_TRIES):
        x, y, quarters, height = _place(shapes, order, width, 2 * (width + widest), gap)
        side = max(width, height)
        if found is None or side < found[3]:
            found = x, y, quarters, side
        better = max(int(math.sqrt(width * height)), smallest)
        if abs(better - width) <= 0.005 * width:
            break
        width = better
    assert found is not None
    return found


def _place(shapes: _Shapes, order: Tensor, width: int, rows: int, gap: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Put shapes into a strip of at least ``rows``: (x, y, quarter turns, height that they need)."""
    levels = int(shapes.size.max()).bit_length()
    stride = width // 64 + 3
    space = torch.zeros(levels * rows * stride, dtype=torch.int64)
    blocked = torch.zeros(stride, dtype=torch.int64)
    start = torch.zeros(_BUCKETS * _BUCKETS, dtype=torch.int32)
    result = torch.zeros((len(order), 3), dtype=torch.int32)
    height = torch.zeros(1, dtype=torch.int32)
    arguments: list[Any] = [shared(tensor, wp.int32) for tensor in (order, shapes.size, shapes.first, shapes.runs)]
    arguments += [len(order), width, rows, stride, levels, gap, shared(space, wp.int64), shared(blocked, wp.int64)]
    arguments += [shared(tensor, wp.int32) for tensor in (start, result, height)]
    launch(_fill, 1, arguments, torch.device("cpu"))
    if int(height) > rows:
        return _place(shapes, order, width, 2 * rows, gap)
    x, y, quarters = result.unbind(1)
    return x, y, quarters, int(height)


@kernel
def _touch(first: int, corners: Vec2s, chart: Ints, box: IntRows, cells: Bytes) -> None:
    i = first + wp.tid()
    a = corners[3 * i]
    b = corners[3 * i + 1]
    c = corners[3 * i + 2]
    offset = box[chart[i], 0]
    width = box[chart[i], 1]
    height = box[chart[i], 2]
    low = wp.min(wp.min(a, b), c)
    high = wp.max(wp.max(a, b), c)
    left = wp.max(int(wp.floor(low[0])), 0)
    right = wp.min(int(wp.floor(high[0])), width - 1)
    bottom = wp.max(int(wp.floor(low[1])), 0)
    top = wp.min(int(wp.floor(high[1])), height - 1)
    for y in range(bottom, top + 1):
        for x in range(left, right + 1):
            p = wp.vec2(float(x), float(y))
            if _reaches(a, b, p) and _reaches(b, c, p) and _reaches(c, a, p):
                cells[offset + y * width + x] = wp.uint8(1)


@func
def _reaches(a: wp.vec2, b: wp.vec2, p: wp.vec2) -> bool:
    """Whether some corner of the cell at p lies left of a-b, or nearly so."""
    along = b - a
    x = p[0] - a[0]
    y = p[1] - a[1]
    if along[1] < 0.0:
        x += 1.0
    if along[0] > 0.0:
        y += 1.0
    return along[0] * y - along[1] * x > -1.0e-3


@func
def _shifted(space: Int64s, base: int, shift: int) -> wp.uint64:
    """64 cells from ``shift`` cells after word ``base``."""
    at = base + shift // 64
    by = wp.uint64(shift % 64)
    word = wp.uint64(space[at]) >> by
    if by != wp.uint64(0):
        word = word | (wp.uint64(space[at + 1]) << (wp.uint64(64) - by))
    return word


@func
def _bucket(width: int, height: int) -> int:
    """Boxes whose sides differ by less than a fifth or so."""
    a = wp.min(int(wp.log2(float(width)) * 4.0), 63)
    b = wp.min(int(wp.log2(float(height)) * 4.0), 63)
    return a * 64 + b


@func
def _free_place(
    shape: int,
    y: int,
    room: int,
    gap: int,
    first: Ints,
    runs: IntRows,
    plane: int,
    stride: int,
    space: Int64s,
    blocked: Int64s,
) -> int:
    """The leftmost x in gap ... room where the shape fits at height y, or -1."""
    full = ~wp.uint64(0)
    words = room // 64 + 1
    for k in range(words):
        blocked[k] = wp.int64(0)
    blocked[0] = wp.int64((wp.uint64(1) << wp.uint64(gap)) - wp.uint64(1))
    if room % 64 != 63:
        blocked[words - 1] = blocked[words - 1] | wp.int64(full << wp.uint64(room % 64 + 1))
    for i in range(first[shape], first[shape + 1]):
        base = runs[i, 1] * plane + (y + runs[i, 0]) * stride
        free = wp.uint64(0)
        for k in range(words):
            if wp.uint64(blocked[k]) != full:
                word = wp.uint64(blocked[k]) | _shifted(space, base + k, runs[i, 2])
                word = word | _shifted(space, base + k, runs[i, 3])
                blocked[k] = wp.int64(word)
                free = free | ~word
        if free == wp.uint64(0):
            return -1
    for x in range(gap, room + 1):
        if ((wp.uint64(blocked[x // 64]) >> wp.uint64(x % 64)) & wp.uint64(1)) == wp.uint64(0):
            return x
    return -1


@func
def _take(
    shape: int,
    x: int,
    y: int,
    gap: int,
    size: IntRows,
    first: Ints,
    runs: IntRows,
    plane: int,
    stride: int,
    levels: int,
    space: Int64s,
) -> None:
    full = ~wp.uint64(0)
    for i in range(first[shape], first[shape + 1]):
        left = x + runs[i, 2] - gap
        right = x + runs[i, 3] + (1 << runs[i, 1]) + gap
        for row in range(y + runs[i, 0] - gap, y + runs[i, 0] + gap + 1):
            for k in range(left // 64, (right - 1) // 64 + 1):
                low = wp.uint64(wp.max(left - 64 * k, 0))
                high = wp.uint64(wp.max(64 * k + 64 - right, 0))
                mask = ((full << low) << high) >> high
                at = row * stride + k
                space[at] = space[at] | wp.int64(mask)
    for row in range(y - gap, y + size[shape, 1] + gap):
        for level in range(1, levels):
            reach = 1 << (level - 1)
            below = (level - 1) * plane + row * stride
            for k in range(wp.max(x - gap - 2 * reach, 0) // 64, (x + size[shape, 0] + gap - 1) // 64 + 1):
                word = wp.uint64(space[below + k]) | _shifted(space, below + k, reach)
                space[below + plane + k] = wp.int64(word)


@kernel
def _fill(
    nothing: int,
    order: Ints,
    size: IntRows,
    first: Ints,
    runs: IntRows,
    count: int,
    width: int,
    rows: int,
    stride: int,
    levels: int,
    gap: int,
    space: Int64s,
    blocked: Int64s,
    start: Ints,
    result: IntRows,
    height: Ints,
) -> None:
    """Level l of ``space`` says of each cell whether any of the 2^l cells of its row from it on is taken."""
    plane = rows * stride
    for rank in range(count):
        chart = order[rank]
        best_top = int(rows)
        for quarter in range(4):
            shape = quarter * count + chart
            w = size[shape, 0]
            h = size[shape, 1]
            bucket = _bucket(w, h)
            room = width - gap - w
            y = int(wp.max(start[bucket], gap))
            while room >= gap and y + h + gap <= best_top:
                x = _free_place(shape, y, room, gap, first, runs, plane, stride, space, blocked)
                if x >= 0 and (y + h + gap < best_top or x < result[chart, 0]):
                    best_top = y + h + gap
                    result[chart, 0] = x
                    result[chart, 1] = y
                    result[chart, 2] = quarter
                    start[bucket] = y
                y += 1 + h // _STEPS
        if best_top == rows:
            height[0] = rows + 1
            return
        _take(
            result[chart, 2] * count + chart,
            result[chart, 0],
            result[chart, 1],
            gap,
            size,
            first,
            runs,
            plane,
            stride,
            levels,
            space,
        )
        height[0] = wp.max(height[0], best_top)
