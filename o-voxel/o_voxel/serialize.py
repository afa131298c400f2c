"""Voxels on a line: z-order and Hilbert codes of coordinates, and back.

One code is read three bits at a time, the top level of the grid first; of each three bits the first axis has the
highest.  Coordinates below 1024 give 30-bit codes in int32, as the original's ``o_voxel.serialize``; larger ones, up to
2**19 - 1, give 57-bit codes in int64.  Both are parts of one curve: a voxel's code does not depend on its company.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["z_order", "hilbert"]

# Every level of zeros turns the Hilbert curve's axes round once, three levels bring them back: hence 10 + 3 k levels.
_SHORT, _LONG = 10, 19

# The bits of a coordinate drawn apart in steps: how far the upper half moves, and the bits in use afterwards.
_SPREAD = (
    (32, 0x001F00000000FFFF),
    (16, 0x001F0000FF0000FF),
    (8, 0x100F00F00F00F00F),
    (4, 0x10C30C30C30C30C3),
    (2, 0x1249249249249249),
)
_TOGETHER = 0x1FFFFF


def encode_seq(coords: Tensor, permute: Sequence[int] = (0, 1, 2), mode: Mode = "z_order") -> Tensor:
    """Code of each voxel along the curve.

    coords: (N, 3) integers from 0 to 2**19 - 1. permute: which column comes first, second and third.
    Returns (N,): int32 if all coordinates are below 1024, else int64; on the device of ``coords``.
    Raises ValueError naming the argument.
    """
    _check_mode(mode)
    order = _axis_order(permute)
    if coords.ndim != 2 or coords.shape[1] != 3 or not _is_integer(coords):
        raise ValueError(f"coords must be integers of shape (N, 3), not {coords.dtype} {tuple(coords.shape)}.")
    coords = coords.long()
    largest = int(coords.max()) if len(coords) else 0
    if largest >> _LONG or (len(coords) and int(coords.min()) < 0):
        raise ValueError(f"coords must be from 0 to {2**_LONG - 1}, but reach from {int(coords.min())} to {largest}.")
    levels = _LONG if largest >> _SHORT else _SHORT
    first, second, third = (_spread(coords[:, axis]) for axis in order)
    codes = first << 2 | second << 1 | third
    if mode == "hilbert":
        codes = _walk(codes, _hilbert_tables()[0], levels)
    return codes if levels == _LONG else codes.int()


def decode_seq(code: Tensor, permute: Sequence[int] = (0, 1, 2), mode: Mode = "z_order") -> Tensor:
    """Coordinates of each code; the inverse of ``encode_seq`` with the same ``permute`` and ``mode``.

    code: (N,) int32 or int64, from 0 to 2**57 - 1.  Returns (N, 3) int32 on the device of ``code``.
    Raises ValueError naming the argument.
    """
    _check_mode(mode)
    order = _axis_order(permute)
    if code.ndim != 1 or code.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"code must be int32 or int64 of shape (N,), not {code.dtype} {tuple(code.shape)}.")
    codes = code.long()
    largest = int(codes.max()) if len(codes) else 0
    if largest >> 3 * _LONG or (len(codes) and int(codes.min()) < 0):
        raise ValueError(f"code must be from 0 to {2 ** (3 * _LONG) - 1}.")
    if mode == "hilbert":
        codes = _walk(codes, _hilbert_tables()[1], _LONG if largest >> 3 * _SHORT else _SHORT)
    columns = (_gather(codes >> 2), _gather(codes >> 1), _gather(codes))
    return torch.stack([columns[order.index(axis)] for axis in range(3)], dim=1).int()


def _spread(values: Tensor) -> Tensor:
    """Bit i of each value to bit 3 i."""
    for step, mask in _SPREAD:
        values = (values | values << step) & mask
    return values


def _gather(values: Tensor) -> Tensor:
    """Bit 3 i of each value to bit i."""
    values = values & _SPREAD[-1][1]
    for (step, _), mask in zip(reversed(_SPREAD), [m for _, m in reversed(_SPREAD[:-1])] + [_TOGETHER], strict=True):
        values = (values | values >> step) & mask
    return values


def _walk(codes: Tensor, table: list[int], levels: int) -> Tensor:
    """Replace three bits at a time, from the top, each by the table of the state that the ones before led to."""
    steps = torch.tensor(table, device=codes.device)
    state = torch.zeros_like(codes)
    walked = torch.zeros_like(codes)
    for level in reversed(range(levels)):
        entry = steps[state | (codes >> 3 * level & 7)]
        walked = walked << 3 | entry & 7
        state = entry & ~7
    return walked


@cache
def _hilbert_tables() -> tuple[list[int], list[int]]:
    """Steps from z-order to Hilbert digits and back: entry 8 * state + digit holds 8 * next state + new digit.

    J. Skilling, Programming the Hilbert curve, AIP Conf. Proc. 707 (2004), whose loop over all bits below becomes a
    state here: which axis stands where, which of them run backwards, and whether the digits are complemented.
    """
    states = [((0, 1, 2), (0, 0, 0), 0)]
    there: list[int] = []
    for axes, flips, odd in states:  # grows while it is read
        for digit in range(8):
            bits = [digit >> 2 - axis & 1 ^ flip for axis, flip in zip(axes, flips, strict=True)]
            first = bits[0]
            second = first ^ bits[1]
            third = second ^ bits[2]
            below = list(zip(axes, flips, strict=True))
            for i, bit in enumerate(bits):
                if bit:
                    below[0] = (below[0][0], 1 - below[0][1])
                else:
                    below[0], below[i] = below[i], below[0]
            (a, f), (b, g), (c, h) = below
            following = ((a, b, c), (f, g, h), odd ^ third)
            if following not in states:
                states.append(following)
            there.append(8 * states.index(following) | (first << 2 | second << 1 | third) ^ 7 * odd)
    back = [0] * len(there)
    for row, entry in enumerate(there):
        back[row & ~7 | entry & 7] = entry & ~7 | row & 7
    return there, back


def _axis_order(permute: Sequence[int]) -> list[int]:
    order = list(permute)
    if sorted(order) != [0, 1, 2]:
        raise ValueError(f"permute must hold 0, 1 and 2 in some order, not {order}.")
    return order


def _check_mode(mode: str) -> None:
    if mode not in ("z_order", "hilbert"):
        raise ValueError(f"mode must be 'z_order' or 'hilbert', not {mode!r}.")


def _is_integer(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
