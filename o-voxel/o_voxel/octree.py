"""Sparse voxels as an octree, and attributes as differences along it: what a .vxz chunk is made of.

The octree is one byte per node, depth first; bit i says that child i is there.  Voxels are rows in the order of their
z-order codes (``serialize.encode_seq``).  Both filters of the format store for each voxel the difference from a
predecessor, modulo 256; they differ in which voxel that is, and in the order of the differences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

_CHILD_COUNT = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)

# Steps to the neighbours that a voxel may be predicted from, best first.
_NEIGHBORS = ((-1, -1, -1), (0, -1, -1), (-1, 0, -1), (-1, -1, 0), (0, 0, -1), (0, -1, 0), (-1, 0, 0))


@dataclass(frozen=True)
class _Level:
    """The n nodes of one level from left to right; their m children are the next level's nodes, or the voxels."""

    masks: Bytes  # (n,)
    first: Ints  # (n,) first child
    parents: Ints  # (m,) of each child
    positions: Ints  # (n,) in the octree


@dataclass(frozen=True)
class Prediction:
    """Which voxel each is predicted from, and where the difference stands."""

    predecessors: Ints  # (N,) row; N where there is none
    places: Ints | slice  # (N,) row among the differences


def encode_octree(codes: Ints, depth: int) -> Bytes:
    """The octree of voxels.

    codes: (N,) ascending z-order codes below 8**depth, none twice, N > 0.  Returns (M,) uint8.
    """
    levels = _levels(codes, depth)
    octree = np.empty(sum(len(level.masks) for level in levels), dtype=np.uint8)
    for level in levels:
        octree[level.positions] = level.masks
    return octree


def most_nodes(voxels: int, depth: int) -> int:
    """How many nodes the octree of so many voxels can have."""
    return sum(min(voxels, 8**level) for level in range(depth))


def voxel_count(octree: Bytes) -> int:
    """How many voxels an octree has, at little cost; any number if it is none."""
    return int(_CHILD_COUNT[octree].sum(dtype=np.int64)) - len(octree) + 1


def decode_octree(octree: Bytes, depth: int) -> Ints:
    """The voxels of an octree.

    octree: (M,) uint8, any bytes.  Returns (N,) ascending z-order codes.  Raises ValueError unless the bytes are
    exactly one octree of that depth.
    """
    size = len(octree)
    if not size or not octree.all():
        raise ValueError("the octree has an empty node")
    # Where does a node's subtree end?  Known for the bottom level, then for one level more at a time, for every byte as
    # if it were a node of that level.  Running over the end leads to size + 1.
    counts = _CHILD_COUNT[octree]
    ends = np.arange(1, size + 3, dtype=np.int32)
    ends[size:] = size + 1
    all_ends = [ends]
    with_child = [np.flatnonzero(counts > child).astype(np.int32) for child in range(8)]
    for _ in range(depth - 1):
        below, ends = ends, all_ends[0].copy()
        for rows in with_child:
            ends[rows] = below[ends[rows]]
        all_ends.append(ends)
    if ends[0] != size:
        raise ValueError("the octree does not end where its bytes do")

    positions = np.zeros(1, dtype=np.int64)
    codes = np.zeros(1, dtype=np.int64)
    for level in range(depth):
        present = np.unpackbits(octree[positions, None], axis=1, bitorder="little").view(bool)
        codes = (codes[:, None] << 3 | np.arange(8))[present]
        if level == depth - 1:
            break
        children = np.empty(present.shape, dtype=np.int64)
        following = positions + 1
        ends = all_ends[depth - 2 - level]
        for child in range(8):
            children[:, child] = following
            following = np.where(present[:, child], ends[following], following)
        positions = children[present]
    return codes


def predict_from_parents(codes: Ints, depth: int) -> Prediction:
    """The filter "parent": a node has the value of its first voxel, and is predicted from the node on its left.

    A node's differences stand together, nodes in the order of the octree, after the value of the first voxel.
    """
    levels = _levels(codes, depth)
    count = len(codes)
    more = np.empty(sum(len(level.masks) for level in levels), dtype=np.int64)
    for level in levels:
        more[level.positions] = _CHILD_COUNT[level.masks]
    more -= 1
    start = 1 + np.cumsum(more) - more
    predecessors = np.full(count, count)
    places = np.zeros(count, dtype=np.int64)
    voxels = np.arange(count)  # the first of each child
    for level in reversed(levels):
        order = np.arange(len(voxels)) - level.first[level.parents]
        later = np.flatnonzero(order)
        predecessors[voxels[later]] = voxels[later - 1]
        places[voxels[later]] = start[level.positions[level.parents[later]]] + order[later] - 1
        voxels = voxels[level.first]
    return Prediction(predecessors, places)


def predict_from_neighbors(coords: npt.NDArray[Any], resolution: int) -> Prediction:
    """The filter "neighbor": from the voxel one step back along z, y and x, or along fewer of them.

    coords: (N, 3) integers in [0, resolution), none twice.
    """
    count = len(coords)
    side = resolution + 1  # an empty layer, so that no step back leads to the far side of another row
    x, y, z = coords.astype(np.int64).T
    keys = (z * side + y) * side + x
    rows = np.argsort(keys)
    keys = keys[rows]
    predecessors = np.full(count, count)
    open_ = np.arange(count)
    for dx, dy, dz in _NEIGHBORS:
        wanted = keys[open_] + (dz * side + dy) * side + dx
        found = np.searchsorted(keys, wanted)
        hit = keys[found] == wanted  # no step goes forward, so none is past the last
        predecessors[open_[hit]] = rows[found[hit]]
        open_ = open_[~hit]
    unsorted = np.empty_like(predecessors)
    unsorted[rows] = predecessors
    return Prediction(unsorted, slice(None))


def differences(values: Bytes, prediction: Prediction) -> Bytes:
    """(N, C) values of the voxels -> (N, C) differences as they are stored."""
    padded = np.concatenate([values, np.zeros_like(values, shape=(1, values.shape[1]))])
    stored = np.empty_like(values)
    stored[prediction.places] = values - padded[prediction.predecessors]
    return stored


def undo_differences(stored: Bytes, prediction: Prediction) -> Bytes:
    """The inverse of ``differences``, by doubling: after k rounds a voxel has the sum of 2**k steps."""
    none = len(stored)
    values = np.concatenate([stored[prediction.places], np.zeros_like(stored, shape=(1, stored.shape[1]))])
    pointers = np.append(prediction.predecessors, none)
    while len(moving := np.flatnonzero(pointers != none)):
        values[moving] += values[pointers[moving]]
        pointers[moving] = pointers[pointers[moving]]
    return values[:none]


def _levels(codes: Ints, depth: int) -> list[_Level]:
    """The levels of the octree, root first."""
    found: list[tuple[Bytes, Ints, Ints, Ints]] = []
    sizes = np.zeros(len(codes), dtype=np.int64)  # nodes under each child, itself included; a voxel is no node
    for _ in range(depth):
        above = codes >> 3
        starts = np.append(True, above[1:] != above[:-1])
        first = np.flatnonzero(starts)
        masks = np.bitwise_or.reduceat(np.left_shift(1, codes & 7).astype(np.uint8), first)
        found.append((masks, first, np.cumsum(starts) - 1, sizes))
        codes, sizes = above[first], 1 + np.add.reduceat(sizes, first)
    levels: list[_Level] = []
    positions = np.zeros(1, dtype=np.int64)
    for masks, first, parents, sizes in reversed(found):
        levels.append(_Level(masks, first, parents, positions))
        before = np.cumsum(sizes) - sizes
        positions = positions[parents] + 1 + before - before[first][parents]
    return levels
