"""What the readers and writers of voxel files share."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

VoxelFile = str | os.PathLike[str] | BinaryIO

# What the voxels of one file may take unless the reader is called with another limit: 60 million with five channels.
MAX_RAW_SIZE = 2**30


def read_bytes(file: VoxelFile) -> bytes:
    """All of a file, given by its path or opened for reading bytes."""
    return Path(file).read_bytes() if isinstance(file, str | os.PathLike) else file.read()


def write_bytes(file: VoxelFile, *parts: bytes) -> None:
    """Write a file.  At a path it appears, or is replaced, only once it is complete."""
    if not isinstance(file, str | os.PathLike):
        for part in parts:
            file.write(part)
        return
    path = Path(file)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.writelines(parts)
        temporary.replace(path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def check_voxels(coord: Tensor, attr: Mapping[str, Tensor], limit: int) -> None:
    """Raise ValueError unless coord is (N, 3) integers in [0, limit) and every attribute has N rows."""
    whole = not (coord.is_floating_point() or coord.is_complex() or coord.dtype == torch.bool)
    if coord.ndim != 2 or coord.shape[1] != 3 or not whole:
        raise ValueError(f"coord must be integers of shape (N, 3), not {coord.dtype} {tuple(coord.shape)}.")
    if len(coord):
        low, high = int(coord.long().min()), int(coord.long().max())
        if low < 0 or high >= limit:
            raise ValueError(f"coord must be from 0 to {limit - 1} in this format, but reaches from {low} to {high}.")
    for name, value in attr.items():
        if value.ndim == 0 or len(value) != len(coord):
            raise ValueError(f"attr {name!r} must have one row for each of the {len(coord)} voxels.")
