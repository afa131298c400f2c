"""Damaged voxel files by the thousand:  python tests/fuzz_voxel_files.py [CASES] [SEED]

Each case damages a small good file: bytes anywhere, a truncation, a number or a word of the .vxz header, or the bytes
under a stream's compression.  The reader must return voxels that fit together, or raise ValueError with one sentence.
"""

from __future__ import annotations

import io
import json
import re
import struct
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from itertools import product
from typing import Any

import numpy as np
import torch
import zstandard
from o_voxel.io import read_npz, read_ply, read_vxz, write_npz, write_ply, write_vxz

LIMIT = 2**22  # of the readers, so that a case is quick
STARTS = ("Not a ", "A damaged .vxz file: ", "A .vxz file of version", "Too large a .vxz file: ")
WORDS: list[Any] = [
    *(None, True, False, "", "none", "all", "parent", "neighbor", "as_is", "lzma", "zstd", "deflate", "svo", "ptr"),
    *(0, 1, -1, 2, 3, 7, 255, 256, 1024, 2048, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, 10**400),
    *(0.5, -1.0, 1e308, float("nan"), float("inf"), [], [0], [0, 0], [0, 0, 0], [[]], {}, {"idx": [0, 0, 0]}),
]


def good_files() -> list[tuple[str, bytes]]:
    """A small file of every kind."""
    generator = torch.Generator().manual_seed(1)
    coord = torch.unique(torch.randint(0, 24, (150, 3), generator=generator), dim=0)
    attr = {
        "base_color": torch.randint(0, 256, (len(coord), 3), generator=generator).byte(),
        "rough": (coord[:, :1] * 10).byte(),
    }
    files: list[tuple[str, bytes]] = []
    for filter, compression, interleave in product(
        ("none", "parent", "neighbor"), ("none", "deflate", "lzma", "zstd"), ("none", "as_is", "all")
    ):
        level = 1 if compression != "none" else None  # lzma's windows of higher levels take their time
        out = io.BytesIO()
        write_vxz(out, coord, attr, 16, filter, compression, level, interleave)  # type: ignore[arg-type]
        files.append(("vxz", out.getvalue()))
    for compress in (False, True):
        out = io.BytesIO()
        write_npz(out, coord, attr, compress)
        files.append(("npz", out.getvalue()))
    out = io.BytesIO()
    write_ply(out, coord, attr)
    files.append(("ply", out.getvalue()))
    lines = [" ".join(map(str, row)) for row in torch.cat([coord, *attr.values()], dim=1).tolist()]
    text = out.getvalue().split(b"end_header\n")[0].replace(b"binary_little_endian", b"ascii") + b"end_header\n"
    files.append(("ply", text + "\n".join(lines).encode()))
    return files


def damage(kind: str, data: bytes, random: np.random.Generator) -> bytes:
    if kind == "vxz" and random.random() < 0.6:
        (start,) = struct.unpack(">I", data[4:8])
        header, body = json.loads(data[8:start]), data[start:]
        if random.random() < 0.5:
            damage_header(header, random)
        else:
            body = damage_stream(header, body, random)
        if random.random() < 0.8:
            header["compressed_size"] = len(body)
        text = json.dumps(header).encode()
        return data[:4] + struct.pack(">I", 8 + len(text)) + text + body
    return damage_bytes(data, random)


def damage_bytes(data: bytes, random: np.random.Generator) -> bytes:
    out = bytearray(data)
    for _ in range(random.integers(1, 6)):
        at = int(random.integers(0, len(out) + 1))
        length = int(random.integers(1, 9))
        choice = random.integers(0, 6)
        if choice == 0:
            del out[at:]
        elif choice == 1:
            del out[at : at + length]
        elif choice == 2:
            out[at:at] = random.bytes(length)
        elif choice == 3:
            out[at : at + length] = bytes([random.choice([0, 1, 48, 57, 127, 128, 255])]) * length
        elif choice == 4:
            out[at:at] = out[at : at + 8 * length]
        elif at < len(out):
            out[at] ^= 1 << int(random.integers(0, 8))
    return bytes(out)


def damage_header(header: dict[str, Any], random: np.random.Generator) -> None:
    """Put something else at a few places of a JSON value, or take them away."""
    for _ in range(random.integers(1, 4)):
        node: Any = header
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = keys[random.integers(0, len(keys))]
            if isinstance(node[key], dict | list) and random.random() < 0.85:
                node = node[key]
                continue
            choice = random.random()
            if choice < 0.2:
                del node[key]
            elif choice < 0.3 and isinstance(node, list):
                node.append(deepcopy(node[key]))
            elif choice < 0.6 and type(node[key]) is int:
                node[key] += int(random.integers(-3, 4))
            else:
                node[key] = deepcopy(WORDS[random.integers(0, len(WORDS))])
            break


def damage_stream(header: dict[str, Any], body: bytes, random: np.random.Generator) -> bytes:
    """Damage a stream of one chunk beneath its compression, and put it at the end of the body."""
    chunk = header["chunks"][random.integers(0, len(header["chunks"]))]
    name = str(random.choice([key for key in chunk if key not in ("idx", "ptr")]))
    offset, length = chunk[name]
    stream = body[chunk["ptr"][0] + offset :][:length]
    if header["compression"] == "deflate":
        deflate = zlib.compressobj(1, wbits=-15)
        stream = deflate.compress(damage_bytes(zlib.decompress(stream, -15), random)) + deflate.flush()
    elif header["compression"] == "zstd":
        announce = bool(random.integers(0, 2))
        plain = damage_bytes(zstandard.ZstdDecompressor().decompress(stream), random)
        stream = zstandard.ZstdCompressor(level=1, write_content_size=announce).compress(plain)
    else:
        stream = damage_bytes(stream, random)
    chunk["ptr"][1] = len(body) - chunk["ptr"][0] + len(stream)
    chunk[name] = [len(body) - chunk["ptr"][0], len(stream)]
    return body + stream


READERS: dict[str, Callable[[io.BytesIO], Any]] = {
    "vxz": lambda file: read_vxz(file, 1, max_raw_size=LIMIT),
    "npz": lambda file: read_npz(file, max_raw_size=LIMIT),
    "ply": read_ply,
}


def outcome(kind: str, data: bytes) -> str:
    """What the reader makes of a file: "read", or the beginning of its sentence.  Anything else is raised."""
    try:
        coord, attr = READERS[kind](io.BytesIO(data))
    except ValueError as error:
        sentence = str(error)
        if not (sentence.startswith(STARTS) and sentence.endswith(".") and "\n" not in sentence):
            raise AssertionError(f"no clear sentence: {sentence!r}") from error
        return re.sub(r"\d+", "#", sentence)[:70]
    assert coord.ndim == 2
    assert coord.shape[1] == 3
    assert not len(coord) or int(coord.min()) >= 0
    assert all(len(value) == len(coord) for value in attr.values())
    if kind == "vxz":
        assert len(torch.unique(coord, dim=0)) == len(coord)
    return "read"


def fuzz(cases: int, seed: int) -> Counter[str]:
    """Run so many cases, the same for the same seed; count the outcomes.  Raises what a reader should not have."""
    random = np.random.default_rng(seed)
    files = good_files()
    assert {outcome(*file) for file in files} == {"read"}
    counts: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for case in range(cases):
            kind, data = files[case % len(files)]
            broken = damage(kind, data, random)
            try:
                counts[f"{kind}: {outcome(kind, broken)}"] += 1
            except Exception as error:
                raise AssertionError(f"case {case} of seed {seed}, {kind}: {broken!r}") from error
    return counts


if __name__ == "__main__":
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    began = time.perf_counter()
    result = fuzz(number, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    for name, count in result.most_common():
        sys.stdout.write(f"{count:8d}  {name}\n")
    sys.stdout.write(f"{number} cases in {time.perf_counter() - began:.0f} s, nothing but clean errors\n")
