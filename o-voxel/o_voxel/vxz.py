"""The .vxz format: sparse voxels with 8-bit attributes, in compressed chunks.

"VXZ", a zero byte, the offset of the body (4 bytes, big endian), a JSON header up to there, the body.  A chunk is a
cube of ``chunk_size`` voxels a side: its voxels as an octree, its attributes as streams of bytes in the order of the
octree.  ``[offset, length]`` of a chunk ("ptr") counts from the body, that of a stream from its chunk.  The header and,
where nothing is compressed, the body are byte for byte those of the original's ``o_voxel.io.write_vxz``.

A reader trusts nothing: what a file announces is checked before it is inflated, and no stream is inflated
beyond what its voxels can need.
"""

from __future__ import annotations

import json
import lzma
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import zstandard
from torch import Tensor

from .files import MAX_RAW_SIZE, VoxelFile, check_voxels, read_bytes, write_bytes
from .octree import (
    Bytes,
    Ints,
    Prediction,
    decode_octree,
    differences,
    encode_octree,
    most_nodes,
    predict_from_neighbors,
    predict_from_parents,
    undo_differences,
    voxel_count,
)
from .serialize import decode_seq, encode_seq

Filter = Literal["none", "parent", "neighbor"]
Compression = Literal["none", "deflate", "lzma", "zstd"]
Interleave = Literal["none", "as_is", "all"]

_MAGIC = b"VXZ\0"
_FILTERS = ("none", "parent", "neighbor")
_INTERLEAVES = ("none", "as_is", "all")
_LEVELS = {"none": (0, 0), "deflate": (0, 9), "lzma": (0, 9), "zstd": (1, 22)}  # the best one is the default
_LZMA_WINDOWS = tuple(2**bits for bits in (18, 20, 21, 22, 22, 23, 23, 24, 25, 26))  # liblzma's presets
_CHUNK_SIZES = tuple(2**depth for depth in range(1, 11))
_COORD_LIMIT = 2**31
_CHANNEL_LIMIT = 2**16
_COORD_SIZE = 12  # bytes of one voxel's coordinates in "raw_size"
_NOT_ATTRIBUTES = ("idx", "ptr", "svo")
# The original's neighbour filter keeps a dense chunk, with a byte more than the channels, and counts it in 32 bits.
_DENSE_LIMIT = 2**31

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class _Chunk:
    idx: tuple[int, int, int]
    octree: memoryview
    streams: tuple[memoryview, ...]


@dataclass(frozen=True)
class _Layout:
    """A header that has been checked, and the parts of the body that it points at."""

    num_voxel: int
    depth: int
    filter: str
    compression: str
    level: int
    attr: dict[str, int]
    widths: tuple[int, ...]  # channels of each stream
    chunks: tuple[_Chunk, ...]


def write_vxz(
    file: VoxelFile,
    coord: Tensor,
    attr: Mapping[str, Tensor],
    chunk_size: int = 256,
    filter: Filter = "none",
    compression: Compression = "lzma",
    compression_level: int | None = None,
    attr_interleave: Interleave = "as_is",
    num_threads: int = -1,
) -> None:
    """Write voxels as .vxz; a file at a path appears only once it is complete.

    file: path, or a file opened for writing bytes. coord: (N, 3) integers from 0 to 2**31 - 1, no voxel twice.
    attr: name -> (N, C) uint8, at least one. chunk_size: power of two from 2 to 1024.
    filter: what to store of the attributes: "none" themselves; "parent", "neighbor" differences, which compress better.
    compression_level: 0-9 (deflate, lzma) or 1-22 (zstd); None is the highest.
    attr_interleave: one stream per channel ("none"), per attribute ("as_is") or for all of them ("all").
    num_threads: chunks worked on at a time; all cores if not positive.
    The voxels are written chunk by chunk, in z-order within each.  Raises ValueError naming the argument.
    """
    _check_options(chunk_size, filter, compression, compression_level, attr_interleave)
    check_voxels(coord, attr, _COORD_LIMIT)
    channels = _check_attributes(attr)
    total = sum(channels.values())
    if filter == "neighbor" and chunk_size**3 * (total + 1) > _DENSE_LIMIT:
        raise ValueError(f"chunk_size must be below {chunk_size} for filter 'neighbor' with {total} channels.")
    level = _LEVELS[compression][1] if compression_level is None else compression_level
    depth = chunk_size.bit_length() - 1
    widths = _stream_widths(channels, attr_interleave)
    names = _stream_names(channels, attr_interleave)

    positions = coord.cpu().long()
    indices = (positions >> depth).numpy()
    inside = positions & chunk_size - 1
    codes = encode_seq(inside).long().numpy()
    order = np.lexsort((codes, *indices.T[::-1]))
    indices, codes = indices[order], codes[order]
    values = np.concatenate([value.cpu().numpy() for value in attr.values()], axis=1)[order]
    inside_sorted = inside.numpy()[order]
    new_chunk = (indices[1:] != indices[:-1]).any(axis=1)
    if bool((~new_chunk & (codes[1:] == codes[:-1])).any()):
        raise ValueError("coord must not hold a voxel twice.")
    borders = [0, *(np.flatnonzero(new_chunk) + 1).tolist(), len(codes)] if len(codes) else []

    def pack(rows: tuple[int, int]) -> tuple[dict[str, Any], bytes]:
        part = slice(*rows)
        prediction = _predict(filter, codes[part], inside_sorted[part], depth)
        stored = values[part] if prediction is None else differences(values[part], prediction)
        streams = [encode_octree(codes[part], depth), *np.split(stored, np.cumsum(widths)[:-1], axis=1)]
        info: dict[str, Any] = {"idx": indices[rows[0]].tolist()}
        packed = b""
        for name, stream in zip(("svo", *names), streams, strict=True):
            data = _compress(stream.tobytes(), compression, level)
            info[name] = [len(packed), len(data)]
            packed += data
        return info, packed

    chunks: list[dict[str, Any]] = []
    parts: list[bytes] = []
    size = 0
    for info, packed in _each(pack, list(pairwise(borders)), num_threads):
        chunks.append({**info, "ptr": [size, len(packed)]})
        parts.append(packed)
        size += len(packed)
    raw_size = len(coord) * (_COORD_SIZE + total)
    header = {
        "num_voxel": len(coord),
        "chunk_size": chunk_size,
        "filter": filter,
        "compression": compression,
        "compression_level": level,
        "raw_size": raw_size,
        "compressed_size": size,
        "compress_ratio": raw_size / size if size else 0.0,
        "attr_interleave": attr_interleave,
        "attr": [[name, count] for name, count in channels.items()],
        "chunks": chunks,
    }
    text = json.dumps(header).encode()
    write_bytes(file, _MAGIC, struct.pack(">I", len(_MAGIC) + 4 + len(text)), text, *parts)


def read_vxz_info(file: VoxelFile) -> dict[str, Any]:
    """The header of a .vxz file as it stands there: num_voxel, chunk_size, filter, attr and so on.

    file: path, or a file opened for reading bytes.  Raises ValueError if it is no .vxz file.
    """
    return _header(read_bytes(file))[0]


def read_vxz(
    file: VoxelFile, num_threads: int = -1, *, max_raw_size: int = MAX_RAW_SIZE
) -> tuple[Tensor, dict[str, Tensor]]:
    """Read voxels from a .vxz file.

    file: path, or a file opened for reading bytes. num_threads: chunks worked on at a time; all cores if not positive.
    max_raw_size: bytes that the voxels may take, at 12 for the coordinates and one per channel.
    Returns coord (N, 3) int32 and name -> (N, C) uint8, in the order of the file, on the CPU.
    Raises ValueError saying what is wrong with the file.
    """
    layout = _layout(*_header(read_bytes(file)), max_raw_size)

    # First all octrees, which tell how many voxels there are, so that the expensive part cannot exceed what the header
    # announces.
    octrees: list[Bytes] = []
    count = 0
    for octree in _each(lambda chunk: _octree(chunk, layout), layout.chunks, num_threads):
        octrees.append(octree)
        count += voxel_count(octree)
        if count > layout.num_voxel:
            raise _broken(f"it announces {layout.num_voxel} voxels, but its chunks hold more")
    if count < layout.num_voxel:
        raise _broken(f"it announces {layout.num_voxel} voxels, but its chunks hold {count}")
    coords, values = [torch.empty(0, 3, dtype=torch.int32)], [np.empty((0, sum(layout.widths)), dtype=np.uint8)]
    jobs = list(zip(layout.chunks, octrees, strict=True))
    for coord, value in _each(lambda job: _unpack(*job, layout), jobs, num_threads):
        coords.append(coord)
        values.append(value)
    together = torch.from_numpy(np.concatenate(values))
    columns = together.split(list(layout.attr.values()), dim=1)
    return torch.cat(coords), {name: column.contiguous() for name, column in zip(layout.attr, columns, strict=True)}


def _octree(chunk: _Chunk, layout: _Layout) -> Bytes:
    most = most_nodes(layout.num_voxel, layout.depth)
    octree = _decompress(chunk.octree, layout.compression, layout.level, most)
    if len(octree) > most_nodes(max(0, voxel_count(octree)), layout.depth):
        raise _broken("an octree has more nodes than its voxels need")
    return octree


def _unpack(chunk: _Chunk, octree: Bytes, layout: _Layout) -> tuple[Tensor, Bytes]:
    try:
        codes = decode_octree(octree, layout.depth)
    except ValueError as error:
        raise _broken(str(error)) from None
    count = len(codes)
    columns = []
    for stream, width in zip(chunk.streams, layout.widths, strict=True):
        data = _decompress(stream, layout.compression, layout.level, count * width)
        if len(data) != count * width:
            raise _broken(f"an attribute has {len(data)} bytes for {count} voxels of {width} channels")
        columns.append(data.reshape(count, width))
    values = np.concatenate(columns, axis=1)
    coord = decode_seq(torch.from_numpy(codes))
    prediction = _predict(layout.filter, codes, coord.numpy(), layout.depth)
    if prediction is not None:
        values = undo_differences(values, prediction)
    return coord + (torch.tensor(chunk.idx) << layout.depth).int(), values


def _predict(filter: str, codes: Ints, coords: np.ndarray, depth: int) -> Prediction | None:
    if filter == "parent":
        return predict_from_parents(codes, depth)
    return predict_from_neighbors(coords, 2**depth) if filter == "neighbor" else None


def _each(work: Callable[[_Item], _Result], items: Iterable[_Item], num_threads: int) -> Iterator[_Result]:
    """``work`` on each item, results in order; given up, it starts no more."""
    if num_threads == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(num_threads if num_threads > 0 else os.cpu_count()) as pool:
        yield from pool.map(work, items)


# -------------------------------------------------------------------------------------------------- the header


def _header(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """The JSON object of the header, unchecked, and the body."""
    if data[:3] != _MAGIC[:3]:
        raise ValueError("Not a .vxz file: it does not begin with VXZ.")
    if len(data) < 8:
        raise _broken("it ends within the first 8 bytes")
    if data[3] != 0:
        raise ValueError(f"A .vxz file of version {data[3]}; only version 0 is known.")
    (start,) = struct.unpack(">I", data[4:8])
    if not 8 <= start <= len(data):
        raise _broken(f"its header would end at byte {start} of {len(data)}")
    try:
        header = json.loads(data[8:start])
    except (ValueError, RecursionError):
        raise _broken("its header is not JSON") from None
    if not isinstance(header, dict):
        raise _broken("its header is not a JSON object")
    return header, memoryview(data)[start:]


def _layout(header: dict[str, Any], body: memoryview, max_raw_size: int) -> _Layout:
    """Check everything that the header says, before anything is inflated."""
    chunk_size = header.get("chunk_size")
    if type(chunk_size) is not int or chunk_size not in _CHUNK_SIZES:
        raise _broken("chunk_size is not a power of two from 2 to 1024")
    filter, compression = header.get("filter"), header.get("compression")
    interleave = header.get("attr_interleave")
    if filter not in _FILTERS:
        raise _broken("its filter is unknown")
    if not isinstance(compression, str) or compression not in _LEVELS:
        raise _broken("its compression is unknown")
    if interleave not in _INTERLEAVES:
        raise _broken("its attr_interleave is unknown")
    # Of all readers only that of lzma needs the level, which stands for the size of its window.
    level = _whole(header.get("compression_level"), 9) if compression == "lzma" else 0

    attr: dict[str, int] = {}
    for entry in _list(header.get("attr"), "attr"):
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise _broken("an attribute is not [name, channels]")
        if entry[0] in attr or entry[0] in _NOT_ATTRIBUTES:
            raise _broken("an attribute's name is taken")
        attr[entry[0]] = _whole(entry[1], _CHANNEL_LIMIT)
    total = sum(attr.values())
    if not attr or min(attr.values()) == 0 or total > _CHANNEL_LIMIT:
        raise _broken(f"its attributes have not between 1 and {_CHANNEL_LIMIT} channels")

    num_voxel = _whole(header.get("num_voxel"))
    raw_size = num_voxel * (_COORD_SIZE + total)
    if raw_size > max_raw_size:
        raise ValueError(f"Too large a .vxz file: its voxels take {raw_size} bytes; max_raw_size is {max_raw_size}.")
    if _whole(header.get("raw_size")) != raw_size:
        raise _broken("raw_size does not fit num_voxel and attr")
    if _whole(header.get("compressed_size")) != len(body):
        raise _broken(f"{len(body)} bytes follow the header, but compressed_size is another")

    names = _stream_names(attr, interleave)
    chunks: dict[tuple[int, ...], _Chunk] = {}
    for entry in _list(header.get("chunks"), "chunks"):
        if not isinstance(entry, dict):
            raise _broken("a chunk is not a JSON object")
        idx = tuple(_whole(i, _COORD_LIMIT // chunk_size - 1) for i in _list(entry.get("idx"), "idx"))
        if len(idx) != 3 or idx in chunks:
            raise _broken("the idx of a chunk is not three numbers of its own")
        part = _slice(body, entry.get("ptr"))
        streams = tuple(_slice(part, entry.get(name)) for name in names)
        chunks[idx] = _Chunk(idx, _slice(part, entry.get("svo")), streams)
    if len(chunks) > num_voxel:
        raise _broken("it has more chunks than voxels")
    return _Layout(
        num_voxel=num_voxel,
        depth=chunk_size.bit_length() - 1,
        filter=filter,
        compression=compression,
        level=level,
        attr=attr,
        widths=_stream_widths(attr, interleave),
        chunks=tuple(chunks.values()),
    )


def _stream_names(channels: Mapping[str, int], interleave: str) -> tuple[str, ...]:
    if interleave == "all":
        return ("attr",)
    if interleave == "as_is":
        return tuple(channels)
    return tuple(f"{name}_{i}" for name, count in channels.items() for i in range(count))


def _stream_widths(channels: Mapping[str, int], interleave: str) -> tuple[int, ...]:
    total = sum(channels.values())
    if interleave == "all":
        return (total,)
    return tuple(channels.values()) if interleave == "as_is" else (1,) * total


def _whole(value: object, most: int = 2**53) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise _broken(f"its header has something else where a number from 0 to {most} belongs")
    return value


def _list(value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise _broken(f"{name} is not a list")
    return value


def _slice(data: memoryview, pointer: object) -> memoryview:
    if not isinstance(pointer, list) or len(pointer) != 2:
        raise _broken("a chunk lacks an [offset, length]")
    offset, length = _whole(pointer[0]), _whole(pointer[1])
    if offset + length > len(data):
        raise _broken(f"{length} bytes at {offset} are not within the {len(data)} that there are")
    return data[offset : offset + length]


def _broken(reason: str) -> ValueError:
    return ValueError(f"A damaged .vxz file: {reason}.")


# --------------------------------------------------------------------------------------------- what a caller says


def _check_options(chunk_size: int, filter: str, compression: str, level: int | None, interleave: str) -> None:
    if chunk_size not in _CHUNK_SIZES:
        raise ValueError(f"chunk_size must be a power of two from 2 to 1024, not {chunk_size}.")
    for name, value, known in (
        ("filter", filter, _FILTERS),
        ("compression", compression, tuple(_LEVELS)),
        ("attr_interleave", interleave, _INTERLEAVES),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}.")
    low, high = _LEVELS[compression]
    if level is not None and not low <= level <= high:
        raise ValueError(f"compression_level must be from {low} to {high} for {compression}, not {level}.")


def _check_attributes(attr: Mapping[str, Tensor]) -> dict[str, int]:
    """Channels of each attribute."""
    for name, value in attr.items():
        if value.dtype != torch.uint8 or value.ndim != 2 or not value.shape[1]:
            raise ValueError(f"attr {name!r} must be uint8 of shape (N, C), not {value.dtype} {tuple(value.shape)}.")
        if name in _NOT_ATTRIBUTES:
            raise ValueError(f"attr must not be named {name!r}, which the format uses itself.")
    channels = {name: value.shape[1] for name, value in attr.items()}
    if not 0 < sum(channels.values()) <= _CHANNEL_LIMIT:
        raise ValueError(f"attr must have between 1 and {_CHANNEL_LIMIT} channels in all.")
    return channels


# ------------------------------------------------------------------------------------------------- compression


def _compress(data: bytes, compression: str, level: int) -> bytes:
    if compression == "deflate":
        deflate = zlib.compressobj(level, wbits=-zlib.MAX_WBITS)
        return deflate.compress(data) + deflate.flush()
    if compression == "lzma":
        xz = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=[_lzma(level, len(data))])
        return xz.compress(data) + xz.flush()
    if compression == "zstd":
        return zstandard.ZstdCompressor(level=level).compress(data)
    return data


def _decompress(data: memoryview, compression: str, level: int, most: int) -> Bytes:
    """Inflate a stream, which must be whole and give no more than ``most`` bytes."""
    try:
        if compression == "deflate":
            deflate = zlib.decompressobj(-zlib.MAX_WBITS)
            plain, whole = deflate.decompress(data, most + 1), deflate.eof
        elif compression == "lzma":
            xz = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[_lzma(level, most)])
            plain, whole = xz.decompress(data, most + 1), xz.eof
        elif compression == "zstd":
            announced = zstandard.get_frame_parameters(data).content_size
            if most < announced != zstandard.CONTENTSIZE_UNKNOWN:
                raise _broken("a stream is longer than its voxels")
            plain, whole = zstandard.ZstdDecompressor().decompress(data, max_output_size=most + 1), True
        else:
            plain, whole = bytes(data), True
    except (zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError) as error:
        raise _broken(f"a stream of {compression} does not open ({error})") from None
    if len(plain) > most:
        raise _broken("a stream is longer than its voxels")
    if not whole:
        raise _broken(f"a stream of {compression} is cut off")
    return np.frombuffer(plain, dtype=np.uint8)


def _lzma(level: int, length: int) -> dict[str, int]:
    # A window larger than the data costs time and memory and gains nothing; every reader allows for that of the level.
    return {"id": lzma.FILTER_LZMA2, "preset": level, "dict_size": max(4096, min(length, _LZMA_WINDOWS[level]))}
