"""The compiled part of o_voxel: a plain C library, called through ctypes (csrc/o_voxel.h says what its functions take).

It knows neither Python nor torch, so that one library serves all releases of both.  Where it is missing, the same is
computed by Warp and torch, more slowly.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BUILD_COMMAND = "python -m o_voxel.build"
LIBRARY = (
    "libo_voxel.dylib" if sys.platform == "darwin" else "libo_voxel.so"
)  # as in build.py, which goes without torch
_INTERFACE = 1  # o_voxel_interface of csrc


@cache
def library() -> Native | None:
    """The compiled ops, None where nothing has been compiled.  Raises RuntimeError where they are of other sources."""
    path = Path(__file__).with_name(LIBRARY)
    return Native(path) if path.exists() else None


class Native:
    """The library at a path.  Its functions work on CPU tensors; their callers have checked the arguments."""

    def __init__(self, path: Path) -> None:
        try:
            self._c = ctypes.CDLL(str(path))
            known = int(self._c.o_voxel_interface()) == _INTERFACE
        except (OSError, AttributeError) as error:
            raise RuntimeError(f"{path} cannot be loaded ({error}); make it again: {BUILD_COMMAND}") from error
        if not known:
            raise RuntimeError(f"{path} was compiled from the sources of another o_voxel; run: {BUILD_COMMAND}")
        for name in ("open_sides", "dual_grid", "attributes"):
            getattr(self._c, f"o_voxel_{name}").restype = ctypes.c_void_p

    def open_sides(self, faces: Tensor) -> Tensor:
        """(B,) int64: the sides that only one of (F, 3) int64 triangles has."""
        faces = faces.contiguous()
        with self._result("open_sides", _at(faces), _int(len(faces))) as (count, copy):
            sides = torch.empty(count, dtype=torch.int64)
            copy(_at(sides))
        return sides

    def dual_grid(
        self,
        corners: Tensor,
        open_start: Tensor,
        open_end: Tensor,
        size: Tensor,
        shape: tuple[int, int, int],
        face_weight: float,
        boundary_weight: float,
        regularization: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """voxelize.dual_grid_reference of (F, 3, 3) float32 triangles and the (B, 3) ends of their open borders."""
        corners, open_start, open_end = corners.contiguous(), open_start.contiguous(), open_end.contiguous()
        with self._result(
            "dual_grid",
            _at(corners),
            _int(len(corners)),
            _at(open_start),
            _at(open_end),
            _int(len(open_start)),
            *_grid(size, shape),
            *(ctypes.c_double(weight) for weight in (face_weight, boundary_weight, regularization)),
            _int(torch.get_num_threads()),
        ) as (count, copy):
            coords = torch.empty((count, 3), dtype=torch.int32)
            vertices = torch.empty((count, 3), dtype=torch.float32)
            flags = torch.empty((count, 3), dtype=torch.bool)
            copy(_at(coords), _at(vertices), _at(flags))
        return coords, vertices, flags

    def attributes(
        self,
        surface: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        factors: Tensor,
        textures: list[Tensor],
        layout: Tensor,
        size: Tensor,
        shape: tuple[int, int, int],
        mip_level_offset: float,
    ) -> tuple[Tensor, Tensor]:
        """attributes.attributes_reference; the arguments are made there."""
        surface_in = [part.contiguous() for part in surface]
        texels = [texture.contiguous() for texture in textures]
        pointers = (ctypes.c_void_p * len(texels))(*(t.data_ptr() if t.numel() else None for t in texels))
        with self._result(
            "attributes",
            *(_at(part) for part in surface_in),
            _int(len(surface_in[0])),
            _at(factors),
            pointers,
            _at(layout),
            _int(len(factors)),
            *_grid(size, shape),
            ctypes.c_double(mip_level_offset),
            _int(torch.get_num_threads()),
        ) as (count, copy):
            coords = torch.empty((count, 3), dtype=torch.int32)
            values = torch.empty((count, 12), dtype=torch.uint8)
            copy(_at(coords), _at(values))
        return coords, values

    @contextmanager
    def _result(self, name: str, *arguments: Any) -> Iterator[tuple[int, Callable[..., None]]]:
        """Compute; gives how many rows there are, and what copies them into arrays."""
        count = ctypes.c_int64()
        handle = getattr(self._c, f"o_voxel_{name}")(*arguments, ctypes.byref(count))
        if handle is None:
            raise MemoryError(f"Not enough memory for {name}.")
        result = ctypes.c_void_p(handle)
        try:
            yield count.value, lambda *arrays: getattr(self._c, f"o_voxel_{name}_copy")(result, *arrays)
        finally:
            getattr(self._c, f"o_voxel_{name}_free")(result)


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _int(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def _grid(size: Tensor, shape: tuple[int, int, int]) -> tuple[Any, Any]:
    return (ctypes.c_float * 3)(*size.tolist()), (ctypes.c_int64 * 3)(*shape)
