"""Reading and writing sparse voxels: .vxz (see vxz.py), .npz and .ply.

Readers return the coordinates and a dictionary of attributes, as CPU tensors in the order of the file.  Whatever the
bytes of a file are, a reader returns voxels or raises ValueError saying what is wrong.  Names, arguments and formats
are those of the original's ``o_voxel.io``.
"""

from __future__ import annotations

import io
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .files import MAX_RAW_SIZE, VoxelFile, check_voxels, read_bytes, write_bytes
from .vxz import read_vxz, read_vxz_info, write_vxz

__all__ = ["read", "read_npz", "read_ply", "read_vxz", "read_vxz_info", "write", "write_npz", "write_ply", "write_vxz"]

_NPZ_LIMIT = 2**16  # coordinates are stored as uint16
_PLY_LIMIT = 2**24  # as float32
_LIMIT = 2**31

_PLY_TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"float": "f4", "double": "f8"},
    **{"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"},
    **{"float32": "f4", "float64": "f8"},
}
_PLY_NAMES = {np.dtype(code): name for name, code in reversed(_PLY_TYPES.items())}
_PLY_ORDERS = {"ascii": "=", "binary_little_endian": "<", "binary_big_endian": ">"}
_PLY_HEADER_LIMIT = 2**16

# As NumPy writes it; what else Python's parser would take is not worth its risks.
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<>|][biufc]\d{1,2})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,15}, ?)*\d{0,15})\), \}\s*"
)


def read(file_path: str | os.PathLike[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Read a .vxz, .npz or .ply file, chosen by the end of its name, with the defaults of its reader."""
    name = os.fspath(file_path)
    if name.endswith(".vxz"):
        return read_vxz(name)
    if name.endswith(".npz"):
        return read_npz(name)
    if name.endswith(".ply"):
        return read_ply(name)
    raise ValueError(f"file_path must end with .vxz, .npz or .ply, not {name!r}.")


def write(file_path: str | os.PathLike[str], coord: Tensor, attr: Mapping[str, Tensor], **kwargs: Any) -> None:
    """Write a .vxz, .npz or .ply file, chosen by the end of its name; further arguments are those of its writer."""
    name = os.fspath(file_path)
    if name.endswith(".vxz"):
        write_vxz(name, coord, attr, **kwargs)
    elif name.endswith(".npz"):
        write_npz(name, coord, attr, **kwargs)
    elif name.endswith(".ply"):
        write_ply(name, coord, attr, **kwargs)
    else:
        raise ValueError(f"file_path must end with .vxz, .npz or .ply, not {name!r}.")


def read_npz(file: VoxelFile, *, max_raw_size: int = MAX_RAW_SIZE) -> tuple[Tensor, dict[str, Tensor]]:
    """Read voxels from NumPy's .npz format.

    file: path, or a file opened for reading bytes. max_raw_size: bytes that its arrays may take.
    Returns coord (N, 3) int32 and name -> (N, ...) of the stored type.  Raises ValueError.
    """
    data = read_bytes(file)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            if size > max_raw_size:
                raise ValueError(f"its arrays take {size} bytes; max_raw_size is {max_raw_size}")
            arrays = {entry.filename.removesuffix(".npy"): _array(archive, entry) for entry in archive.infolist()}
        coord = arrays.pop("coord", None)
        if coord is None:
            raise ValueError("it has no array 'coord'")
        check_voxels(coord, arrays, _LIMIT)
    except (ValueError, OSError, EOFError, RuntimeError, struct.error, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"Not a readable .npz file of voxels: {str(error).rstrip('.')}.") from None
    return coord.int(), arrays


def write_npz(file: VoxelFile, coord: Tensor, attr: Mapping[str, Tensor], compress: bool = True) -> None:
    """Write voxels as NumPy's .npz; a file at a path appears only once it is complete.

    file: path, or a file opened for writing bytes. coord: (N, 3) integers from 0 to 65535.
    attr: name -> (N, ...) of any type that NumPy has, none named "coord".  Raises ValueError.
    """
    check_voxels(coord, attr, _NPZ_LIMIT)
    if "coord" in attr:
        raise ValueError("attr must not be named 'coord', which the format uses itself.")
    arrays = {"coord": coord.cpu().numpy().astype(np.uint16)}
    for name, value in attr.items():
        if value.dtype == torch.bfloat16 or "/" in name or not name:
            raise ValueError(f"attr {name!r} has a name or a type ({value.dtype}) that .npz cannot hold.")
        arrays[name] = value.cpu().numpy()
    # Not np.savez, whose own arguments are names that an attribute could not have.
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    write_bytes(file, packed.getvalue())


def read_ply(file: VoxelFile) -> tuple[Tensor, dict[str, Tensor]]:
    """Read voxels from a PLY file, ASCII or binary of either byte order.

    file: path, or a file opened for reading bytes.  Its first element has the properties x, y and z, which are rounded,
    and ``NAME_0``, ``NAME_1``... of one type for each attribute.
    Returns coord (N, 3) int64 and name -> (N, C) of the stored type.  Raises ValueError.
    """
    data = read_bytes(file)
    try:
        rows = _ply_rows(data)
        names = rows.dtype.names or ()
        if not {"x", "y", "z"} <= set(names):
            raise ValueError("its first element has no x, y and z")
        with np.errstate(invalid="ignore"):  # NaN, which are found below
            position = np.stack([rows[axis].astype(np.float64) for axis in "xyz"], axis=1)
        if not ((position >= -0.5) & (position <= _LIMIT - 1)).all():
            raise ValueError(f"its coordinates are not from 0 to {_LIMIT - 1}")
        channels: dict[str, list[int]] = {}
        for name in names:
            if name not in ("x", "y", "z"):
                stem, _, number = name.rpartition("_")
                if not stem or not number.isdecimal():
                    raise ValueError(f"its property {name!r} is not named as ATTRIBUTE_NUMBER")
                channels.setdefault(stem, []).append(int(number))
        attr = {}
        for stem, numbers in channels.items():
            columns = [rows[f"{stem}_{i}"] for i in range(len(numbers)) if f"{stem}_{i}" in names]
            if len(columns) != len(numbers) or len({column.dtype for column in columns}) != 1:
                raise ValueError(f"its properties {stem}_0 to {stem}_{len(numbers) - 1} are not all there, of one type")
            attr[stem] = torch.from_numpy(np.stack(columns, axis=1))
    except ValueError as error:
        raise ValueError(f"Not a readable .ply file of voxels: {error}.") from None
    return torch.from_numpy(np.rint(position).astype(np.int64)), attr


def write_ply(file: VoxelFile, coord: Tensor, attr: Mapping[str, Tensor]) -> None:
    """Write voxels as binary PLY, which mesh viewers show as points; a file at a path appears only once it is complete.

    file: path, or a file opened for writing bytes. coord: (N, 3) integers from 0 to 2**24 - 1.
    attr: name -> (N, C) integers of 8, 16 or 32 bits or floats of 32 or 64.  Raises ValueError.
    """
    check_voxels(coord, attr, _PLY_LIMIT)
    columns: dict[str, npt.NDArray[Any]] = {
        axis: column for axis, column in zip("xyz", coord.cpu().numpy().astype(np.float32).T, strict=True)
    }
    for name, value in attr.items():
        if not name or any(c.isspace() or not c.isascii() for c in name):
            raise ValueError(f"attr must have names of ASCII letters without spaces in this format, not {name!r}.")
        array = value.cpu().numpy()
        if array.ndim != 2 or array.dtype not in _PLY_NAMES:
            raise ValueError(
                f"attr {name!r} must be (N, C) integers of 8 to 32 bits or floats of 32 or 64, "
                f"not {value.dtype} {tuple(value.shape)}."
            )
        columns.update({f"{name}_{i}": column for i, column in enumerate(array.T)})
    rows = np.empty(len(coord), dtype=[(name, column.dtype.newbyteorder("<")) for name, column in columns.items()])
    for name, column in columns.items():
        rows[name] = column
    properties = [f"property {_PLY_NAMES[column.dtype]} {name}" for name, column in columns.items()]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}", *properties, "end_header", ""]
    write_bytes(file, "\n".join(header).encode(), rows.tobytes())


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Tensor:
    """One array of an .npz, whose header must fit the bytes that follow it."""
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{entry.filename!r} is compressed as no .npz is")
    data = archive.read(entry)
    if len(data) < 10 or data[:6] != b"\x93NUMPY" or data[6:8] != b"\1\0":
        raise ValueError(f"{entry.filename!r} is no array of NumPy's format 1.0")
    start = 10 + int.from_bytes(data[8:10], "little")
    header = _NPY_HEADER.fullmatch(data[10:start])
    if header is None:
        raise ValueError(f"{entry.filename!r} has another header than NumPy writes")
    shape = tuple(int(length) for length in re.findall(rb"\d+", header[3]))
    try:
        dtype = np.dtype(header[1].decode())
        torch.from_numpy(np.empty(0, dtype.newbyteorder("=")))
    except TypeError:
        raise ValueError(f"{entry.filename!r} is of a type that torch has not") from None
    if prod(shape) * dtype.itemsize != len(data) - start:
        raise ValueError(f"{entry.filename!r} is not of the shape that it announces")
    array = np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if header[2] == b"True" else "C")
    return torch.from_numpy(array.astype(dtype.newbyteorder("="), order="C"))


def _ply_rows(data: bytes) -> npt.NDArray[Any]:
    """The rows of the first element."""
    lines: list[str] = []
    start = 0
    while not lines or lines[-1] != "end_header":
        end = data.find(b"\n", start, _PLY_HEADER_LIMIT)
        if end < 0 or not data.startswith((b"ply\n", b"ply\r\n")):
            raise ValueError("it does not begin with a header of PLY")
        lines.append(data[start:end].decode("ascii", "replace").strip())
        start = end + 1
    order, count, fields = "", -1, []
    elements = 0
    for line in lines[1:-1]:
        words = line.split()
        if words[:1] == ["format"] and len(words) == 3 and words[1] in _PLY_ORDERS:
            order = words[1]
        elif words[:1] == ["element"] and len(words) == 3 and words[2].isdecimal() and len(words[2]) < 16:
            elements += 1
            count = int(words[2]) if elements == 1 else count
        elif words[:1] == ["property"]:
            if elements == 1:
                if len(words) != 3 or words[1] not in _PLY_TYPES:
                    raise ValueError("its first element has a property that is no number")
                fields.append((words[2], _PLY_TYPES[words[1]]))
        elif words[:1] not in (["comment"], ["obj_info"], []):
            raise ValueError(f"its header has a line {line[:40]!r}")
    if not order or not fields or len(dict(fields)) != len(fields):
        raise ValueError("its header lacks a format or the properties of an element, or has one twice")
    if order == "ascii":
        return _ply_text(data[start:], count, np.dtype(fields))
    dtype = np.dtype([(name, _PLY_ORDERS[order] + code) for name, code in fields])
    if count * dtype.itemsize > len(data) - start:
        raise ValueError(f"it is cut off within its {count} voxels")
    return np.frombuffer(data, dtype, count, start).astype(dtype.newbyteorder("="))


def _ply_text(text: bytes, count: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    names = dtype.names or ()
    if count * len(names) > len(text):
        raise ValueError(f"it is cut off within its {count} voxels")
    words = text.split(maxsplit=count * len(names))[: count * len(names)]
    if len(words) < count * len(names):
        raise ValueError(f"it is cut off within its {count} voxels")
    try:
        table = np.array([float(word) for word in words]).reshape(count, len(names))
    except ValueError:
        raise ValueError("it has something else where a number belongs") from None
    rows = np.empty(count, dtype)
    for name, column in zip(names, table.T, strict=True):
        if dtype[name].kind != "f":
            limits = np.iinfo(dtype[name])
            if not ((column >= limits.min) & (column <= limits.max)).all():
                raise ValueError(f"its property {name!r} has a number too large for its type")
        with np.errstate(over="ignore"):  # a float too large is infinite
            rows[name] = column
    return rows
