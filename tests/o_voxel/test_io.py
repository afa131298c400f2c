"""Files of voxels: .vxz, .npz and .ply."""

from __future__ import annotations

import io
import json
import lzma
import re
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from fuzz_voxel_files import fuzz
from golden_cases import golden_cases, load_golden, under
from o_voxel.io import read, read_npz, read_ply, read_vxz, read_vxz_info, write, write_npz, write_ply, write_vxz
from o_voxel.octree import decode_octree, encode_octree
from torch import Tensor

README = Path(__file__).parents[2] / "o-voxel" / "README.md"
KINDS = list(product(("none", "parent", "neighbor"), ("none", "deflate", "lzma", "zstd"), ("none", "as_is", "all")))

Voxels = tuple[Tensor, dict[str, Tensor]]


def shell(count: int = 3000, size: int = 100) -> Voxels:
    """Voxels about a sphere, with smooth and with random attributes."""
    generator = torch.Generator().manual_seed(3)
    points = torch.randn(count, 3, generator=generator)
    coord = torch.unique((points / points.norm(dim=1, keepdim=True) * 0.49 + 0.5).mul(size).int(), dim=0)
    coord = coord[torch.randperm(len(coord), generator=generator)]
    return coord, {
        "base_color": (coord * 2).byte(),
        "metallic": torch.randint(0, 256, (len(coord), 1), generator=generator).byte(),
    }


def packed(voxels: Voxels, *arguments: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    write_vxz(out, *voxels, *arguments, **options)
    return out.getvalue()


def ordered(voxels: Voxels) -> Voxels:
    """By x, y and z."""
    coord, attr = voxels
    rows = torch.from_numpy(np.lexsort(coord.T.flip(0).numpy()))
    return coord[rows], {name: value[rows] for name, value in attr.items()}


def assert_same(one: Voxels, other: Voxels) -> None:
    assert torch.equal(one[0].long(), other[0].long())
    assert list(one[1]) == list(other[1])
    for name, value in one[1].items():
        assert value.dtype == other[1][name].dtype
        assert torch.equal(value, other[1][name]), name


def with_header(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    (start,) = struct.unpack(">I", data[4:8])
    header = json.loads(data[8:start])
    change(header)
    text = json.dumps(header).encode()
    return data[:4] + struct.pack(">I", 8 + len(text)) + text + data[start:]


def streams(data: bytes) -> list[tuple[str, bytes]]:
    """All streams of a file, inflated by nothing of ours."""
    (start,) = struct.unpack(">I", data[4:8])
    header = json.loads(data[8:start])
    inflate = {
        "none": bytes,
        "deflate": lambda stream: zlib.decompress(stream, -15),
        "zstd": lambda stream: zstandard.ZstdDecompressor().decompress(stream),
        "lzma": lambda stream: lzma.decompress(
            stream, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": header["compression_level"]}]
        ),
    }[header["compression"]]
    found = []
    for chunk in header["chunks"]:
        for name in chunk.keys() - {"idx", "ptr"}:
            offset, length = chunk[name]
            found.append((name, inflate(data[start + chunk["ptr"][0] + offset :][:length])))
    return sorted(found)


@pytest.mark.parametrize("path", golden_cases("vxz"))
def test_as_the_original(path: Path) -> None:
    meta, tensors = load_golden(path)
    coord, attr = tensors["coords"], under(tensors, "attr.")
    for i, options in enumerate(meta["options"]):
        theirs = tensors[f"file{i}"].numpy().tobytes()
        voxels = read_vxz(io.BytesIO(theirs))
        assert voxels[0].dtype == torch.int32
        assert_same(ordered(voxels), ordered((coord, attr)))
        if f"read{i}.coords" in tensors:
            expected = under(tensors, f"read{i}.")
            assert_same(voxels, (expected.pop("coords"), expected))
        ours = packed((coord, attr), **options)
        assert streams(ours) == streams(theirs)
        if options["compression"] == "none":
            assert ours == theirs
        sizes = {"chunks", "compressed_size", "compress_ratio"}
        headers = [read_vxz_info(io.BytesIO(data)) for data in (ours, theirs)]
        one, other = ({k: v for k, v in header.items() if k not in sizes} for header in headers)
        assert one == other
        assert [c["idx"] for c in headers[0]["chunks"]] == [c["idx"] for c in headers[1]["chunks"]]


@pytest.mark.parametrize(("filter", "compression", "interleave"), KINDS)
def test_there_and_back(filter: str, compression: str, interleave: str) -> None:
    voxels = shell()
    level = 1 if compression == "lzma" else None
    data = packed(voxels, 32, filter, compression, level, interleave)
    assert_same(ordered(read_vxz(io.BytesIO(data))), ordered(voxels))
    assert_same(read_vxz(io.BytesIO(data)), read_vxz(io.BytesIO(data), num_threads=1))
    assert packed(voxels, 32, filter, compression, level, interleave, num_threads=1) == data


@pytest.mark.parametrize("chunk_size", [2, 4, 1024])
@pytest.mark.parametrize("filter", ["none", "parent", "neighbor"])
def test_sizes_of_chunks(chunk_size: int, filter: str) -> None:
    if chunk_size == 1024 and filter == "neighbor":  # the original counts the dense chunk in 32 bits
        with pytest.raises(ValueError, match=r"^chunk_size must be below 1024 for filter 'neighbor'"):
            packed(shell(300), chunk_size, filter)
        return
    coord, attr = shell(300)
    far = coord * 21 + 3  # up to 2102
    data = packed((far, attr), chunk_size, filter, "deflate")
    assert_same(ordered(read_vxz(io.BytesIO(data), 1)), ordered((far, attr)))


def test_the_largest_coordinates() -> None:
    coord = torch.tensor([[2**31 - 1, 0, 2**31 - 1], [0, 2**31 - 1, 1]])
    attr = {"a": torch.tensor([[1], [2]]).byte()}
    assert_same(ordered(read_vxz(io.BytesIO(packed((coord, attr))))), ordered((coord, attr)))


def test_an_octree_by_hand() -> None:
    # Voxels (0,0,0) and (0,0,1) of the first octant, (3,3,3) the last of the last.
    codes = np.array([0, 1, 63])
    octree = encode_octree(codes, 2)
    assert octree.tolist() == [0b10000001, 0b00000011, 0b10000000]
    assert decode_octree(octree, 2).tolist() == [0, 1, 63]
    solid = np.arange(8**4)
    assert encode_octree(solid, 4).tolist() == [255] * (1 + 8 + 64 + 512)
    assert np.array_equal(decode_octree(np.full(585, 255, dtype=np.uint8), 4), solid)


@pytest.mark.parametrize("octree", [[], [0], [1], [1, 0], [1, 1, 1], [3, 1], [255, 255, 255]])
def test_what_is_no_octree(octree: list[int]) -> None:
    with pytest.raises(ValueError, match="octree"):
        decode_octree(np.array(octree, dtype=np.uint8), 2)


def test_differences_by_hand() -> None:
    # (0,0,0) (0,0,1) (1,1,1) and, beyond a gap, (3,3,3); x, y, z; parents' order is that of the octree.
    coord = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 1, 1], [3, 3, 3]])
    attr = {"a": torch.tensor([[10], [13], [9], [200]]).byte()}
    files = {f: streams(packed((coord, attr), 4, f, "none"))[0][1] for f in ("none", "parent", "neighbor")}
    assert list(files["none"]) == [10, 13, 9, 200]
    # first voxel; last octant from the first; then within the first octant
    assert list(files["parent"]) == [10, 190, 3, 256 - 4]
    # (1,1,1) has a neighbour along all three axes, (0,0,1) along z, the others none
    assert list(files["neighbor"]) == [10, 3, 256 - 1, 200]


@pytest.mark.parametrize("level", range(10))
def test_a_window_of_lzma_suits_the_level(level: int) -> None:
    # Bytes that repeat at a distance beyond the smallest window.
    coord = torch.cartesian_prod(torch.arange(2), torch.arange(512), torch.arange(512))
    noise = torch.randint(0, 256, (2**18, 1), generator=torch.Generator().manual_seed(0)).byte()
    data = packed((coord, {"a": torch.cat([noise, noise])}), 512, "none", "lzma", level, "as_is")
    assert len(streams(data)) == 2
    assert_same(ordered(read_vxz(io.BytesIO(data))), (coord, {"a": torch.cat([noise, noise])}))


def test_no_voxels(tmp_path: Path) -> None:
    voxels = (torch.empty(0, 3, dtype=torch.int32), {"a": torch.empty(0, 2, dtype=torch.uint8)})
    for name in ("a.vxz", "a.npz", "a.ply"):
        write(tmp_path / name, *voxels)
        assert_same(read(tmp_path / name), voxels)


@pytest.mark.parametrize("suffix", [".vxz", ".npz", ".ply"])
def test_a_file_appears_whole_or_not_at_all(suffix: str, tmp_path: Path) -> None:
    coord, attr = shell(300)
    path = tmp_path / f"voxels{suffix}"
    write(str(path), coord, attr)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"^coord must"):
        write(path, coord - 1000, attr)
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "none" / path.name, coord, attr)
    path.with_suffix(".dir" + suffix).mkdir()
    with pytest.raises(OSError, match=r"dir"):
        write(path.with_suffix(".dir" + suffix), coord, attr)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"voxels.dir{suffix}", path.name]
    assert_same(ordered(read(path)), ordered((coord, attr)))


def test_names_of_files() -> None:
    for call in (lambda: read("a.obj"), lambda: write("a.obj", *shell(10))):
        with pytest.raises(ValueError, match=r"^file_path must end with"):
            call()
    with pytest.raises(FileNotFoundError):
        read("nowhere.vxz")


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    coord, attr = torch.tensor([[0, 0, 0], [1, 2, 3]]), {"a": torch.zeros(2, 1, dtype=torch.uint8)}
    out = io.BytesIO()
    for wrong in (coord.float(), coord[0], coord[:, :2], coord - 1, coord + 2**31):
        for writer in (write_vxz, write_npz, write_ply):
            with pytest.raises(ValueError, match=r"^coord must"):
                writer(out, wrong, attr)
    with pytest.raises(ValueError, match=r"^coord must not hold a voxel twice"):
        write_vxz(out, coord * 0, attr)
    for writer in (write_vxz, write_npz, write_ply):
        with pytest.raises(ValueError, match=r"^attr 'a' must have one row"):
            writer(out, coord, {"a": attr["a"][:1]})
    with pytest.raises(ValueError, match=r"^coord must be from 0 to 65535"):
        write_npz(out, coord + 65535, attr)
    with pytest.raises(ValueError, match=r"^coord must be from 0 to 16777215"):
        write_ply(out, coord + 2**24, attr)
    for wrong in (attr["a"].int(), attr["a"][:, 0], attr["a"][:, :0]):
        with pytest.raises(ValueError, match=r"^attr 'a' must be uint8"):
            write_vxz(out, coord, {"a": wrong})
    for name in ("svo", "idx", "ptr"):
        with pytest.raises(ValueError, match=r"^attr must not be named"):
            write_vxz(out, coord, {name: attr["a"]})
    with pytest.raises(ValueError, match=r"^attr must have between 1 and"):
        write_vxz(out, coord, {})
    with pytest.raises(ValueError, match=r"^attr must not be named 'coord'"):
        write_npz(out, coord, {"coord": attr["a"]})
    with pytest.raises(ValueError, match=r"^attr 'a' has a name or a type"):
        write_npz(out, coord, {"a": attr["a"].bfloat16()})
    for wrong in (attr["a"].long(), attr["a"].bool(), attr["a"][:, 0]):
        with pytest.raises(ValueError, match=r"^attr 'a' must be"):
            write_ply(out, coord, {"a": wrong})
    with pytest.raises(ValueError, match=r"^attr must have names"):
        write_ply(out, coord, {"a b": attr["a"]})
    for options, name in (
        *(({"chunk_size": size}, "chunk_size") for size in (0, 1, 3, 2048)),
        ({"filter": "left"}, "filter"),
        ({"compression": "zip"}, "compression"),
        ({"attr_interleave": "some"}, "attr_interleave"),
        *(({"compression": c, "compression_level": n}, "compression_level") for c, n in (("zstd", 23), ("lzma", -1))),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            write_vxz(out, coord, attr, **options)  # type: ignore[arg-type]
    assert out.getvalue() == b""


# ---------------------------------------------------------------------------------------------- hostile .vxz files


@pytest.mark.parametrize("compression", ["none", "deflate", "lzma", "zstd"])
def test_every_truncation(compression: str) -> None:
    data = packed(shell(40, 12), 8, "parent", compression, 1 if compression != "none" else None)
    for length in range(len(data)):
        with pytest.raises(ValueError, match=r"^(Not a|A damaged) \.vxz file: [^\n]*\.$"):
            read_vxz(io.BytesIO(data[:length]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda h: h.update(num_voxel=h["num_voxel"] + 1, raw_size=h["raw_size"] + 16), "its chunks hold"),
        (lambda h: h.update(num_voxel=h["num_voxel"] - 1, raw_size=h["raw_size"] - 16), "its chunks hold more"),
        (lambda h: h.update(raw_size=1), "raw_size"),
        (lambda h: h.update(num_voxel=10**12), "max_raw_size"),
        (lambda h: h.update(num_voxel=True), "a number from 0"),
        (lambda h: h.update(compressed_size=1), "compressed_size"),
        (lambda h: h.update(chunk_size=48), "chunk_size"),
        (lambda h: h.update(chunk_size=2**40), "chunk_size"),
        (lambda h: h.update(filter="both"), "filter"),
        (lambda h: h.update(compression=["zstd"]), "compression"),
        (lambda h: h.update(attr_interleave=None), "attr_interleave"),
        (lambda h: h.update(attr=[]), "channels"),
        (lambda h: h.update(attr=[["base_color", 3], ["base_color", 1]]), "name is taken"),
        (lambda h: h["attr"].append(["svo", 1]), "name is taken"),
        (lambda h: h["attr"][0].append(1), "name, channels"),
        (lambda h: h.pop("chunks"), "chunks is not a list"),
        (lambda h: h["chunks"].append(h["chunks"][0]), "numbers of its own"),
        (lambda h: h["chunks"][0].update(idx=[0, 0]), "numbers of its own"),
        (lambda h: h["chunks"][0].update(idx=[-1, 0, 0]), "a number from 0"),
        (lambda h: h["chunks"][0].update(idx=[2**31 // 32, 0, 0]), "a number from 0"),
        (lambda h: h["chunks"][0].update(ptr=[0, 10**9]), "are not within"),
        (lambda h: h["chunks"][0]["svo"].reverse(), "its chunks hold"),
        (lambda h: h["chunks"][0].pop("metallic"), "lacks an"),
        (lambda h: h["chunks"][0]["metallic"].__setitem__(1, 5), "bytes for"),
        (lambda h: h["chunks"].pop(), "its chunks hold"),
    ],
)
def test_headers_that_lie(change: Callable[[dict[str, Any]], object], reason: str) -> None:
    good = packed(shell(), 32, "neighbor", "none")
    with pytest.raises(ValueError, match=reason) as caught:
        read_vxz(io.BytesIO(with_header(good, change)))
    assert re.fullmatch(r"(A damaged|Too large a) \.vxz file: [^\n]*\.", str(caught.value))


def test_headers_that_are_none() -> None:
    def file(text: bytes, version: int = 0) -> io.BytesIO:
        return io.BytesIO(b"VXZ" + bytes([version]) + struct.pack(">I", 8 + len(text)) + text)

    for data, reason in (
        (io.BytesIO(b"PK\3\4" + bytes(100)), "does not begin with VXZ"),
        (file(b"{}", 1), "only version 0 is known"),
        (file(b"{"), "is not JSON"),
        (file(b"[" * 100_000), "is not JSON"),
        (file(b"\xff\xfe\xfa"), "is not JSON"),
        (file(b"9" * 100_000), "is not"),
        (file(b"[]"), "not a JSON object"),
        (io.BytesIO(b"VXZ\0\xff\xff\xff\xff{}"), "its header would end"),
        (io.BytesIO(b"VXZ\0\0\0\0\0{}"), "its header would end"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_vxz(data)
        data.seek(0)
        with pytest.raises(ValueError, match=reason):
            read_vxz_info(data)


def deflated(data: bytes) -> bytes:
    deflate = zlib.compressobj(1, wbits=-15)
    return deflate.compress(data) + deflate.flush()


@pytest.mark.parametrize("compression", ["deflate", "lzma", "zstd", "zstd without its size"])
@pytest.mark.parametrize("stream", ["svo", "a"])
def test_a_bomb_is_not_inflated(stream: str, compression: str) -> None:
    good = packed((torch.tensor([[1, 2, 3]]), {"a": torch.tensor([[9]]).byte()}), compression=compression.split()[0])
    zeros = bytes([255]) * 2**26
    bomb = {
        "deflate": lambda: deflated(zeros),
        "lzma": lambda: lzma.compress(zeros, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 0}]),
        "zstd": lambda: zstandard.ZstdCompressor(1).compress(zeros),
        "zstd without its size": lambda: zstandard.ZstdCompressor(1, write_content_size=False).compress(zeros),
    }[compression]()

    def plant(header: dict[str, Any]) -> None:
        (chunk,) = header["chunks"]
        chunk[stream] = [header["compressed_size"], len(bomb)]
        header["compressed_size"] += len(bomb)
        chunk["ptr"][1] = header["compressed_size"]

    data = with_header(good, plant) + bomb
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"^A damaged \.vxz file: a stream "):
        read_vxz(io.BytesIO(data), 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * len(data) + 2**20


def test_many_chunks_from_one_stream_stop_early() -> None:
    # 1000 chunks that all point at one solid octree of 2 million voxels; the header admits to few.
    solid = torch.cartesian_prod(*[torch.arange(128)] * 3)
    good = packed((solid, {"a": torch.zeros(len(solid), 1, dtype=torch.uint8)}), 128, "none", "zstd", 1)

    def plant(header: dict[str, Any]) -> None:
        (chunk,) = header["chunks"]
        header["chunks"] = [{**chunk, "idx": [i, 0, 0]} for i in range(1000)]

    tracemalloc.start()
    with pytest.raises(ValueError, match="its chunks hold more"):
        read_vxz(io.BytesIO(with_header(good, plant)), 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**26


def test_a_limit_of_the_caller() -> None:
    data = packed(shell())
    size = read_vxz_info(io.BytesIO(data))["raw_size"]
    assert len(read_vxz(io.BytesIO(data), max_raw_size=size)[0])
    with pytest.raises(ValueError, match=rf"^Too large a .vxz file: .* {size} bytes; max_raw_size is {size - 1}\.$"):
        read_vxz(io.BytesIO(data), max_raw_size=size - 1)


def test_damaged_files() -> None:
    """More cases: python tests/fuzz_voxel_files.py 100000."""
    counts = fuzz(3000, seed=20)
    assert sum(counts.values()) == 3000
    assert {name.split(":")[0] for name in counts} == {"vxz", "npz", "ply"}
    assert 100 < sum(count for name, count in counts.items() if name.endswith(": read")) < 1500


# --------------------------------------------------------------------------------------------------- .npz and .ply


@pytest.mark.parametrize("compress", [True, False])
def test_npz(compress: bool, tmp_path: Path) -> None:
    coord, attr = shell(300)
    attr |= {"normal": torch.randn(len(coord), 3).double(), "file": torch.ones(len(coord), dtype=torch.bool)}
    write_npz(str(tmp_path / "a.npz"), coord, attr, compress=compress)
    with np.load(tmp_path / "a.npz") as theirs:
        assert theirs["coord"].dtype == np.uint16
        assert sorted(theirs) == ["base_color", "coord", "file", "metallic", "normal"]
        assert np.array_equal(theirs["normal"], attr["normal"].numpy())
    assert_same(read_npz(tmp_path / "a.npz"), (coord, attr))
    out = io.BytesIO()
    write_npz(out, coord, attr, compress)
    assert out.getvalue() == (tmp_path / "a.npz").read_bytes()
    np.savez(tmp_path / "b.npz", coord=coord.numpy().astype(">u2"), a=np.asfortranarray(attr["base_color"].numpy()))
    assert_same(read(tmp_path / "b.npz"), (coord, {"a": attr["base_color"]}))


def test_npz_that_lie() -> None:
    coord = np.zeros((2, 3), dtype=np.uint16)

    def file(**arrays: np.ndarray) -> io.BytesIO:
        out = io.BytesIO()
        np.savez(out, **arrays)
        out.seek(0)
        return out

    def member(data: bytes) -> io.BytesIO:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("coord.npy", data)
        out.seek(0)
        return out

    header = b"{'descr': '<u2', 'fortran_order': False, 'shape': (%s), }\n"
    for data, reason in (
        (io.BytesIO(b"PK\3\4"), "zip"),
        (file(a=coord), "no array 'coord'"),
        (file(coord=coord.astype(float)), "coord must be integers"),
        (file(coord=coord.astype(np.int32) - 1), "coord must be from 0"),
        (file(coord=coord, a=coord[:1]), "attr 'a' must have one row"),
        (file(coord=coord, a=np.array(["a", "b"])), "another header"),
        (file(coord=coord, a=np.array([{}, {}])), "another header"),
        (member(b"nothing"), "no array"),
        (member(b"\x93NUMPY\1\0\xff\xff" + header % b"1, 3"), "shape that it"),
        (member(b"\x93NUMPY\1\0\4\0" + header % b"1, 3"), "another header"),
        (member(b"\x93NUMPY\1\0" + bytes([len(header % b"999999, 3"), 0]) + header % b"999999, 3"), "shape that it"),
        (file(coord=np.zeros((5000, 3), dtype=np.uint16)), "max_raw_size"),
    ):
        with pytest.raises(ValueError, match=reason) as caught:
            read_npz(data, max_raw_size=20_000)
        assert re.fullmatch(r"Not a readable \.npz file of voxels: [^\n]*\.", str(caught.value))


def test_ply_by_hand() -> None:
    out = io.BytesIO()
    attr = {"rough_ness": torch.tensor([[255, 7]]).byte(), "id": torch.tensor([[2**31 - 1]]).int()}
    write_ply(out, torch.tensor([[1, 2, 700]]), attr)
    assert out.getvalue() == (
        b"ply\nformat binary_little_endian 1.0\nelement vertex 1\n"
        b"property float x\nproperty float y\nproperty float z\n"
        b"property uchar rough_ness_0\nproperty uchar rough_ness_1\nproperty int id_0\nend_header\n"
    ) + struct.pack("<fffBBi", 1, 2, 700, 255, 7, 2**31 - 1)
    out.seek(0)
    assert_same(read_ply(out), (torch.tensor([[1, 2, 700]]), attr))


def test_ply_of_others() -> None:
    rows = [(1, 2, 3, 200, -0.5), (4, 5, 6, 100, 0.25)]
    types = "property double x\r\nproperty int y\r\nproperty float32 z\r\nproperty uint8 a_0\r\nproperty float b_0\r\n"
    head = "ply\r\nformat {} 1.0\r\ncomment by hand\r\nelement vertex 2\r\n" + types + "element face 0\r\n"
    head += "property list uchar int vertex_index\r\nend_header\r\n"
    expected = (
        torch.tensor([[1, 2, 3], [4, 5, 6]]),
        {"a": torch.tensor([[200], [100]]).byte(), "b": torch.tensor([[-0.5], [0.25]])},
    )
    for name, body in (
        ("ascii", "\r\n".join(" ".join(map(str, row)) for row in rows).encode()),
        ("binary_big_endian", b"".join(struct.pack(">difBf", *row) for row in rows)),
        ("binary_little_endian", b"".join(struct.pack("<difBf", *row) for row in rows) + b"more"),
    ):
        assert_same(read_ply(io.BytesIO(head.format(name).encode() + body)), expected)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("ply\n", "plyx\n", "header"),
        ("ply\n", "pl\n", "header"),
        ("ascii", "text", "header has a line"),
        ("end_header", "end", "header"),
        ("element vertex 1", "element vertex 999999999999", "cut off"),
        ("element vertex 1", "element vertex 2", "cut off"),
        ("element vertex 1", "element vertex -1", "header has a line"),
        ("uchar a_0", "list uchar int a_0", "is no number"),
        ("uchar a_0", "uchar x", "one twice"),
        ("uchar a_0", "uchar a", "ATTRIBUTE_NUMBER"),
        ("uchar a_0", "uchar a_1", "not all there"),
        ("float z", "float w_0", "no x, y and z"),
        ("1 2 3", "1 2 nan", "coordinates are not"),
        ("1 2 3", "1 2 -1", "coordinates are not"),
        ("1 2 3", "1 2 3e9", "coordinates are not"),
        ("1 2 3", "1 2 z", "a number belongs"),
        ("3 255", "3 256", "too large"),
    ],
)
def test_ply_that_lie(old: str, new: str, reason: str) -> None:
    text = "ply\nformat ascii 1.0\nelement vertex 1\n"
    text += "".join(f"property {p}\n" for p in ("float x", "float y", "float z", "uchar a_0"))
    text += "end_header\n1 2 3 255\n"
    assert read_ply(io.BytesIO(text.encode()))[0].tolist() == [[1, 2, 3]]
    assert old in text
    with pytest.raises(ValueError, match=reason) as caught:
        read_ply(io.BytesIO(text.replace(old, new).encode()))
    assert re.fullmatch(r"Not a readable \.ply file of voxels: [^\n]*\.", str(caught.value))
