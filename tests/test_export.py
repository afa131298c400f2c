"""Files are what a viewer expects, the same for the same input, and whole or not there at all."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from validate_glb import validate

from trellis2.errors import Cancelled, CapacityError, InputError
from trellis2.export import read_glb, write_glb, write_png, write_video
from trellis2.mesh import MeshStatistics, TexturedMesh

CLEAN = {"errors": 0, "warnings": 0, "infos": 0, "hints": 0, "messages": []}


def patch(side: int = 8, size: int = 64, alpha_mode: str = "OPAQUE") -> TexturedMesh:
    """A curved sheet of side x side vertices over the whole texture, with smooth colours."""
    u, v = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="xy")
    vertices = torch.stack((u - 0.5, 0.1 * torch.sin(6 * u), 0.4 - 0.8 * v), -1).reshape(-1, 3)
    slope = torch.stack((-0.6 * torch.cos(6 * u), torch.ones_like(u), torch.zeros_like(u)), -1).reshape(-1, 3)
    corner = (torch.arange(side - 1)[:, None] * side + torch.arange(side - 1)).reshape(-1, 1)
    a, b, c, d = corner, corner + 1, corner + side, corner + side + 1
    faces = torch.cat((torch.cat((a, b, c), 1), torch.cat((b, d, c), 1))).int()
    ramp = torch.linspace(0, 255, size).round().byte()
    across, down = ramp.expand(size, size), ramp[:, None].expand(size, size)
    alpha = torch.full_like(across, 255) if alpha_mode == "OPAQUE" else across
    return TexturedMesh(
        vertices=vertices,
        faces=faces,
        normals=torch.nn.functional.normalize(slope, dim=-1),
        uvs=torch.stack((u, v), -1).reshape(-1, 2),
        base_color=torch.stack((across, down, 255 - across, alpha), -1),
        metallic_roughness=torch.stack((torch.zeros_like(across), down, across), -1),
        alpha_mode=alpha_mode,
        statistics=MeshStatistics(faces=len(faces), vertices=len(vertices), charts=1, texture_coverage=1.0),
    )


def accessor(document: dict[str, Any], binary: bytes, index: int) -> np.ndarray:
    entry = document["accessors"][index]
    view = document["bufferViews"][entry["bufferView"]]
    dtype = {5126: "<f4", 5125: "<u4", 5123: "<u2"}[entry["componentType"]]
    width = {"SCALAR": 1, "VEC2": 2, "VEC3": 3}[entry["type"]]
    values = np.frombuffer(binary, dtype, entry["count"] * width, view["byteOffset"])
    assert values.nbytes == view["byteLength"]
    return values.reshape(-1, width)


def picture(document: dict[str, Any], binary: bytes, index: int) -> Image.Image:
    view = document["bufferViews"][document["images"][index]["bufferView"]]
    return Image.open(io.BytesIO(binary[view["byteOffset"] : view["byteOffset"] + view["byteLength"]]))


@pytest.mark.parametrize("texture_format", ["webp", "png"])
@pytest.mark.parametrize("alpha_mode", ["OPAQUE", "MASK", "BLEND"])
def test_the_validator_finds_nothing(tmp_path: Path, texture_format: str, alpha_mode: str) -> None:
    path = tmp_path / "model.glb"
    write_glb(patch(alpha_mode=alpha_mode), path, texture_format=texture_format, extras={"note": "untrained"})
    assert validate(path) == CLEAN

    document, binary = read_glb(path)
    assert document["asset"]["extras"] == {"note": "untrained"}
    assert document["asset"]["generator"].startswith("trellis2 0.")
    material = document["materials"][0]
    assert material["alphaMode"] == alpha_mode
    assert material.get("alphaCutoff") == (0.5 if alpha_mode == "MASK" else None)
    assert material["doubleSided"] is True
    base_color, metallic_roughness = picture(document, binary, 0), picture(document, binary, 1)
    assert base_color.format == metallic_roughness.format == texture_format.upper()
    assert base_color.mode == ("RGB" if alpha_mode == "OPAQUE" else "RGBA")
    assert metallic_roughness.mode == "RGB"
    assert document.get("extensionsRequired", []) == (["EXT_texture_webp"] if texture_format == "webp" else [])


def test_the_validator_is_awake(tmp_path: Path) -> None:
    mesh = patch()
    path = tmp_path / "model.glb"
    write_glb(replace(mesh, faces=mesh.faces + 1000, normals=mesh.normals * 2), path)
    report = validate(path)
    assert report["errors"] > 0
    assert any("INDEX_OOB" in message for message in report["messages"])
    assert any("VECTOR3_NON_UNIT" in message for message in report["messages"])


def test_geometry_is_turned_to_y_up(tmp_path: Path) -> None:
    mesh = patch()
    write_glb(mesh, tmp_path / "model.glb")
    document, binary = read_glb(tmp_path / "model.glb")
    x, y, z = mesh.vertices.T.numpy()
    positions = accessor(document, binary, 0)
    np.testing.assert_array_equal(positions, np.stack((x, z, -y), 1))
    assert document["accessors"][0]["min"] == positions.min(0).tolist()
    assert document["accessors"][0]["max"] == positions.max(0).tolist()
    normals = accessor(document, binary, 1)
    np.testing.assert_array_equal(normals, mesh.normals.numpy()[:, [0, 2, 1]] * np.float32([1, 1, -1]))
    np.testing.assert_array_equal(accessor(document, binary, 2), mesh.uvs.numpy())
    np.testing.assert_array_equal(accessor(document, binary, 3).reshape(-1, 3), mesh.faces.numpy())
    # A rotation keeps the winding: triangles still turn counter-clockwise about the vertex normals.
    a, b, c = (positions[mesh.faces.numpy()[:, i]] for i in range(3))
    assert (np.sum(np.cross(b - a, c - a) * normals[mesh.faces.numpy()[:, 0]], axis=1) > 0).all()


def test_another_reader_sees_the_same_model(tmp_path: Path) -> None:
    mesh = patch(alpha_mode="BLEND")
    write_glb(mesh, tmp_path / "model.glb", texture_format="png")
    loaded = trimesh.load(tmp_path / "model.glb", force="mesh", process=False)
    assert loaded.faces.shape == (98, 3)
    np.testing.assert_allclose(loaded.vertices, mesh.vertices.numpy()[:, [0, 2, 1]] * [1, 1, -1])
    # trimesh counts v from the bottom.
    np.testing.assert_allclose(loaded.visual.uv, mesh.uvs.numpy() * [1, -1] + [0, 1], atol=1e-6)
    seen = np.asarray(loaded.visual.material.baseColorTexture)
    np.testing.assert_array_equal(seen, mesh.base_color.numpy())
    seen = np.asarray(loaded.visual.material.metallicRoughnessTexture)
    np.testing.assert_array_equal(seen[..., :3], mesh.metallic_roughness.numpy())


@pytest.mark.parametrize(("side", "component_type"), [(255, 5123), (257, 5125)])
def test_indices_are_as_narrow_as_they_can_be(tmp_path: Path, side: int, component_type: int) -> None:
    mesh = patch(side=side)
    write_glb(mesh, tmp_path / "model.glb")
    document, binary = read_glb(tmp_path / "model.glb")
    assert document["accessors"][3]["componentType"] == component_type
    np.testing.assert_array_equal(accessor(document, binary, 3).reshape(-1, 3), mesh.faces.numpy())
    assert validate(tmp_path / "model.glb") == CLEAN


def test_webp_keeps_materials_and_alpha(tmp_path: Path) -> None:
    mesh = patch(size=256, alpha_mode="BLEND")
    write_glb(mesh, tmp_path / "model.glb")
    document, binary = read_glb(tmp_path / "model.glb")
    base_color = np.asarray(picture(document, binary, 0)).astype(int)
    expected = mesh.base_color.numpy().astype(int)
    np.testing.assert_array_equal(base_color[..., 3], expected[..., 3])
    error = np.mean((base_color - expected)[..., :3] ** 2.0)
    assert 10 * np.log10(255**2 / error) > 38
    material = np.asarray(picture(document, binary, 1)).astype(int)
    expected = mesh.metallic_roughness.numpy().astype(int)
    assert np.abs(material - expected).max() <= 2
    for value in (0, 255):  # fully metallic stays fully metallic
        assert (material[expected == value] == value).all()


def test_the_same_mesh_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.glb", "b.glb"):
        write_glb(patch(alpha_mode="BLEND"), tmp_path / name, extras={"seed": 42})
    assert (tmp_path / "a.glb").read_bytes() == (tmp_path / "b.glb").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.glb", "b.glb"]


def glb(*chunks: tuple[int, bytes], version: int = 2, length: int | None = None) -> bytes:
    body = b"".join(struct.pack("<2I", len(data), kind) + data for kind, data in chunks)
    return struct.pack("<3I", 0x46546C67, version, len(body) + 12 if length is None else length) + body


JSON = 0x4E4F534A


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is not a GLB"),
        (b"\x89PNG\r\n\x1a\n and so on", "is not a GLB"),
        (glb((JSON, b"{}  "), version=1), "version 1"),
        (glb((JSON, b"{}  "), length=4000), "4000"),
        (glb((JSON, b"{}  ")) + b"more", "header"),
        (glb((JSON, b'{"as')), "JSON"),
        (glb((JSON, b"[]  ")), "holds no object"),
        (glb((0x004E4942, b"1234")), "JSON"),
        (glb(), "JSON"),
        (struct.pack("<5I", 0x46546C67, 2, 20, 4000, JSON), "past the end"),
        (struct.pack("<4I", 0x46546C67, 2, 16, 4), "past the end"),
    ],
)
def test_what_is_no_glb_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "model.glb"
    path.write_bytes(data)
    with pytest.raises(InputError, match=words) as raised:
        read_glb(path)
    assert str(path) in str(raised.value)


def test_a_glb_without_binary_chunk_and_one_with_foreign_chunks(tmp_path: Path) -> None:
    path = tmp_path / "model.glb"
    path.write_bytes(glb((JSON, b"{}  ")))
    assert read_glb(path) == ({}, b"")
    path.write_bytes(glb((JSON, b"{}  "), (0x004E4942, b"1234"), (1, b"extension")))
    assert read_glb(path) == ({}, b"1234")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.glb cannot be used: No such file"):
        read_glb(tmp_path / "nowhere.glb")


def test_png_keeps_every_pixel(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8))
    write_png(image, tmp_path / "cutout.png")
    with Image.open(tmp_path / "cutout.png") as seen:
        assert seen.format == "PNG"
        np.testing.assert_array_equal(np.asarray(seen), np.asarray(image))


def frames(count: int, width: int = 64, height: int = 48) -> Iterator[np.ndarray]:
    """Flat patches of pure colours, one of which moves."""
    for number in range(count):
        frame = np.full((height, width, 3), 255, np.uint8)
        frame[:24, :32] = (255, 0, 0)
        frame[24:, 32:] = (0, 0, 255)
        frame[24:32, number % 24 : number % 24 + 8] = (0, 255, 0)
        yield frame


def boxes(data: bytes) -> list[str]:
    """The top-level boxes of an MP4 file."""
    names, offset = [], 0
    while offset < len(data):
        size, name = struct.unpack_from(">I4s", data, offset)
        names.append(name.decode())
        offset += size
    return names


def test_video_is_what_browsers_play(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    assert write_video(frames(30), path) == 30
    data = path.read_bytes()
    order = boxes(data)
    assert order.index("moov") < order.index("mdat")
    assert b"colrnclx\x00\x01\x00\x01\x00\x01\x00" in data  # BT.709 thrice, limited range
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt, context.width, context.height) == ("h264", "yuv420p", 64, 48)
        assert (context.color_primaries, context.color_trc, context.colorspace) == (1, 1, 1)
        assert stream.average_rate == 15
        assert stream.frames == 30
        decoded = list(container.decode(video=0))
    assert len(decoded) == 30
    # ITU-R BT.709, limited range: red is Y 63, Cb 102, Cr 240; blue 32, 240, 118; white 235, 128, 128.
    for where, expected in (((8, 8), (63, 102, 240)), ((40, 56), (32, 240, 118)), ((8, 56), (235, 128, 128))):
        y, x = where
        planes = [np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size) for plane in decoded[0].planes]
        seen = (planes[0][y, x], planes[1][y // 2, x // 2], planes[2][y // 2, x // 2])
        assert np.abs(np.int16(seen) - np.int16(expected)).max() <= 3


@pytest.mark.parametrize(("fps", "rate"), [(24, "24"), (29.97002997, "30000/1001"), (12.5, "25/2")])
def test_video_frame_rate(tmp_path: Path, fps: float, rate: str) -> None:
    write_video(frames(5), tmp_path / "video.mp4", fps=fps)
    with av.open(str(tmp_path / "video.mp4")) as container:
        assert str(container.streams.video[0].average_rate) == rate


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    """Whatever was in memory before: with x264's macroblock tree a few runs of this size differ."""
    seen = set()
    for byte in range(12):
        dirt = [np.full(size, 21 * byte, np.uint8) for size in range(1000, 400_000, 2000)]
        del dirt
        write_video(frames(40, 320, 240), tmp_path / "video.mp4")
        seen.add((tmp_path / "video.mp4").read_bytes())
    assert len(seen) == 1


@pytest.mark.parametrize(("width", "height"), [(63, 48), (64, 47)])
def test_an_odd_size_is_refused(tmp_path: Path, width: int, height: int) -> None:
    with pytest.raises(InputError, match=f"{width} x {height}"):
        write_video(frames(3, width, height), tmp_path / "video.mp4")
    assert list(tmp_path.iterdir()) == []


def test_no_frames_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no frame"):
        write_video([], tmp_path / "video.mp4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [Cancelled("stop"), OSError(28, "elsewhere"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 1, 100])
def test_what_the_frames_raise_passes_through(tmp_path: Path, error: BaseException, after: int) -> None:
    def stopped() -> Iterator[np.ndarray]:
        yield from frames(after)
        raise error

    (tmp_path / "video.mp4").write_bytes(b"before")
    with pytest.raises(type(error)) as raised:
        write_video(stopped(), tmp_path / "video.mp4")
    assert raised.value is error
    assert [p.name for p in tmp_path.iterdir()] == ["video.mp4"]
    assert (tmp_path / "video.mp4").read_bytes() == b"before"


def test_frames_are_encoded_as_they_come(tmp_path: Path) -> None:
    """While the last frame is made, most of the others are already in the file."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 64, 64, 3), dtype=np.uint8)
    written = 0

    def watched() -> Iterator[np.ndarray]:
        nonlocal written
        yield from noise
        written = max(p.stat().st_size for p in tmp_path.iterdir())

    write_video(watched(), tmp_path / "video.mp4")
    assert written > 0.5 * (tmp_path / "video.mp4").stat().st_size


WRITERS = {
    "model.glb": "write_glb(patch(side=100), path, texture_format='png')",
    "cutout.png": "write_png(Image.effect_noise((512, 512), 80), path)",
    "video.mp4": "write_video(np.random.default_rng(0).integers(0, 256, (80, 64, 64, 3), np.uint8), path)",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="file size limits are POSIX")
@pytest.mark.parametrize("limit", [0, 20_000, 100_000])
@pytest.mark.parametrize("name", list(WRITERS))
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, name: str, limit: int) -> None:
    """The kernel refuses every byte past ``limit``, as a full disk does."""
    (tmp_path / name).write_bytes(b"before")
    program = f"""
import resource, sys
from pathlib import Path
import numpy as np
from PIL import Image
from test_export import patch, write_glb, write_png, write_video
from trellis2.errors import CapacityError
path = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    {WRITERS[name]}
except CapacityError as error:
    sys.stdout.write(str(error))
"""
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / name)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert result.stdout.startswith(f"{tmp_path / name} could not be written: ")
    assert "free disk space" in result.stdout
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"before"


@pytest.mark.parametrize("name", list(WRITERS))
def test_a_folder_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "missing" / name
    with pytest.raises(InputError, match="No such file or directory") as raised:
        write(name, path)
    assert str(path) in str(raised.value)


def test_a_folder_that_is_not_there_is_noticed_before_the_first_frame(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file or directory"):
        write_video(map(pytest.fail, ["rendered for nothing"]), tmp_path / "missing" / "video.mp4")


@pytest.mark.parametrize("name", list(WRITERS))
def test_a_target_that_is_a_folder_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="Is a directory"):
        write(name, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def write(name: str, path: Path) -> None:
    if name == "model.glb":
        write_glb(patch(), path)
    elif name == "cutout.png":
        write_png(Image.new("RGBA", (4, 4)), path)
    else:
        write_video(frames(3), path)


def test_extras_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_glb(patch(), tmp_path / "model.glb", extras={"bad": float("nan")})
    assert list(tmp_path.iterdir()) == []
    write_glb(patch(), tmp_path / "model.glb", extras={"name": "Bürste"})
    assert json.loads(json.dumps(read_glb(tmp_path / "model.glb")[0]))["asset"]["extras"] == {"name": "Bürste"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux")
def test_a_device_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full answers every write with "no space left"; the message still names the target."""
    monkeypatch.setattr(Path, "open", lambda self, mode: open("/dev/full", "wb"))  # noqa: SIM115
    with pytest.raises(CapacityError, match=r"cutout\.png could not be written: No space left"):
        write_png(Image.new("RGBA", (64, 64)), tmp_path / "cutout.png")
    assert list(tmp_path.iterdir()) == []
