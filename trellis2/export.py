"""Files that leave the house: GLB, MP4 and PNG.

Each writer builds a temporary file beside its target and renames it when it is complete, so that a reader
never sees half a file and a failed write leaves what was there before.  A full disk raises CapacityError; any
other failure of the file system raises InputError; both name the path.  The same input gives the same bytes.

The GLB is written here and not by a library: it is one node, one mesh and two images, and a general exporter
costs a second copy of the geometry and leaves out buffer targets.  Format: Khronos glTF 2.0, sections 3 to 5,
and EXT_texture_webp.
"""

from __future__ import annotations

import errno
import io
import json
import os
import struct
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from .errors import CapacityError, InputError
from .mesh import TexturedMesh
from .version import VERSION

_MAGIC = 0x46546C67
_JSON_CHUNK = 0x4E4F534A
_BIN_CHUNK = 0x004E4942

_FLOAT, _UNSIGNED_SHORT, _UNSIGNED_INT = 5126, 5123, 5125
_ARRAY_BUFFER, _ELEMENT_ARRAY_BUFFER = 34962, 34963
_LINEAR, _LINEAR_MIPMAP_LINEAR, _REPEAT = 9729, 9987, 10497

_BT709 = 1  # in ITU-T H.273, of primaries, transfer and matrix

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_glb(
    mesh: TexturedMesh,
    path: Path,
    *,
    texture_format: str = "webp",
    extras: Mapping[str, Any] | None = None,
) -> None:
    """Write ``mesh`` as a binary glTF 2.0 file: y up, metres, right-handed.

    texture_format: "webp" (needs EXT_texture_webp of the reader, which is declared as required) or "png".
    extras: JSON values for ``asset.extras``.
    Raises InputError or CapacityError as the module says.
    """
    opaque = mesh.alpha_mode == "OPAQUE"
    base_color = mesh.base_color.cpu().numpy()
    metallic_roughness = mesh.metallic_roughness.cpu().numpy()
    # Both encoders release the interpreter lock, so the second image costs little time on two cores.
    with ThreadPoolExecutor(2) as pool:
        images = list(
            pool.map(
                lambda job: _encode(*job),
                (
                    (np.ascontiguousarray(base_color[..., : 3 if opaque else 4]), texture_format, False),
                    (metallic_roughness, texture_format, True),
                ),
            )
        )
    document, parts = _document(mesh, images, f"image/{texture_format}", extras)
    _write_parts(path, _container(document, parts))


def read_glb(path: str | Path) -> tuple[dict[str, Any], bytes]:
    """Return the JSON document and the binary chunk (empty if there is none) of a GLB file.

    Raises InputError where the file cannot be read, is not a GLB of version 2, or is shorter than it says.
    """
    with _file_system_errors(path):
        data = Path(path).read_bytes()
    if len(data) < 12 or struct.unpack_from("<I", data)[0] != _MAGIC:
        raise InputError(f"{path} is not a GLB file; give the path of a binary glTF 2.0 model.")
    _, version, length = struct.unpack_from("<3I", data)
    if version != 2:
        raise InputError(f"{path} is a GLB of version {version}; only version 2 can be read.")
    if length != len(data):
        raise InputError(f"{path} has {len(data)} bytes where its header says {length}; copy it again.")
    chunks: dict[int, bytes] = {}
    rest = memoryview(data)[12:]
    while rest:
        size, kind = struct.unpack_from("<2I", rest) if len(rest) >= 8 else (length, 0)
        if len(rest) < 8 + size:
            raise InputError(f"{path} is damaged: a chunk goes past the end of the file; copy it again.")
        chunks.setdefault(kind, bytes(rest[8 : 8 + size]))
        rest = rest[8 + size :]
    try:
        document = json.loads(chunks[_JSON_CHUNK])
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} is damaged: its JSON chunk cannot be read; copy it again.") from error
    if not isinstance(document, dict):
        raise InputError(f"{path} is not a glTF model: its JSON chunk holds no object.")
    return document, chunks.get(_BIN_CHUNK, b"")


def write_png(image: Image.Image, path: Path) -> None:
    """Write ``image`` as PNG.  Raises InputError or CapacityError as the module says."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    _write_parts(path, [buffer.getvalue()])


def write_video(frames: Iterable[np.ndarray], path: Path, *, fps: float = 15.0) -> int:
    """Encode ``frames`` as H.264 in MP4 and return how many there were.

    Each frame is (H, W, 3) uint8 sRGB, H and W even.  The file is 4:2:0, BT.709, limited range, with the
    index in front, which browsers play while they load it.  One frame is encoded while the next is made.
    What the iterable raises passes through and leaves no file.
    Raises InputError for an odd size or no frame at all, else as the module says.
    """
    count = 0
    with _replacing(path) as part, ThreadPoolExecutor(1) as encoder:
        with _file_system_errors(path):
            part.touch()  # the container opens its file late, after many frames were rendered for nothing
            container = av.open(str(part.absolute()), "w", format="mp4", options={"movflags": "faststart"})
        try:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))

            def encode(frame: np.ndarray) -> None:
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                    format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
                )
                container.mux(stream.encode(picture))

            encoded: Future[None] | None = None
            for frame in frames:
                if encoded is None:
                    _open_stream(stream, frame)
                else:
                    with _file_system_errors(path):
                        encoded.result()
                encoded = encoder.submit(encode, frame)
                count += 1
            if encoded is None:
                raise InputError(f"{path} was not written, because the video has no frame.")
            with _file_system_errors(path):
                encoded.result()
                container.mux(stream.encode(None))
                container.close()
        except BaseException:
            encoder.shutdown()  # it may still be at work on the last frame
            with suppress(OSError):  # what happened first is what the caller must hear
                container.close()
            raise
    return count


def _open_stream(stream: av.VideoStream, frame: np.ndarray) -> None:
    height, width = frame.shape[:2]
    if height % 2 or width % 2:
        raise InputError(f"A video frame of {width} x {height} pixels must have even sides for H.264 in 4:2:0.")
    context = stream.codec_context
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    # Measured on 1024 x 1024 frames on two cores: 12 ms each; "medium" takes 26 ms for 6% fewer bytes.  x264's
    # macroblock tree reads memory that nobody wrote (widths that 128 does not divide) and so gives other bytes
    # from run to run; without it, 21 looks like 18 with it.  The result also depends on the number of threads,
    # which must not be the machine's.
    stream.options = {"preset": "veryfast", "crf": "21", "mbtree": "0"}
    context.thread_count = 4
    context.color_primaries = context.color_trc = context.colorspace = _BT709
    context.color_range = ColorRange.MPEG


def _encode(pixels: np.ndarray, texture_format: str, data: bool) -> bytes:
    """Encode (S, S, 3 or 4) uint8.  ``data``: the channels are numbers, not a colour that an eye judges.

    Measured on 4096 x 4096 textures, one thread: lossy WebP of quality 90 takes 0.5 s, lossless alpha 0.8 s
    more.  Lossy WebP stores colour at half resolution, so that metalness (the blue channel) comes back with
    28 dB; six bits of each number kept without loss take 0.9 s and come back with 46 dB.  Slower settings of
    the encoder gain under 0.2 dB.
    """
    buffer = io.BytesIO()
    if texture_format == "png":
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    elif data:
        rounded = np.minimum((pixels.astype(np.uint16) + 2) // 4 * 4, 255).astype(np.uint8)
        Image.fromarray(rounded).save(buffer, "WEBP", lossless=True, quality=0, method=0)
    else:
        # exact: colours under transparent texels are blended in by the texture filter of a viewer.
        Image.fromarray(pixels).save(buffer, "WEBP", quality=90, method=1, alpha_quality=100, exact=True)
    return buffer.getvalue()


def _document(
    mesh: TexturedMesh, images: Sequence[bytes], mime_type: str, extras: Mapping[str, Any] | None
) -> tuple[dict[str, Any], list[bytes]]:
    """Return the glTF document and what its buffer views hold, in their order."""
    positions, normals = _y_up(mesh.vertices.cpu().numpy()), _y_up(mesh.normals.cpu().numpy())
    uvs = mesh.uvs.cpu().numpy().astype("<f4")
    # 65535 is reserved in 16-bit indices.
    short = len(positions) <= 65535
    indices = mesh.faces.cpu().numpy().reshape(-1).astype("<u2" if short else "<u4")
    arrays = (positions, normals, uvs, indices)
    parts = [array.tobytes() for array in arrays] + list(images)

    views: list[dict[str, Any]] = []
    offset = 0
    for number, part in enumerate(parts):
        view = {"buffer": 0, "byteOffset": offset, "byteLength": len(part)}
        if number < len(arrays):
            view["target"] = _ELEMENT_ARRAY_BUFFER if number == 3 else _ARRAY_BUFFER
        views.append(view)
        offset += _aligned(len(part))

    vertices = {"componentType": _FLOAT, "count": len(positions)}
    texture = {"sampler": 0}
    webp = mime_type == "image/webp"
    material: dict[str, Any] = {
        "name": "object",
        "pbrMetallicRoughness": {
            "baseColorTexture": {"index": 0},
            "metallicRoughnessTexture": {"index": 1},
        },
        "alphaMode": mesh.alpha_mode,
        # Generated surfaces have open sheets and holes too wide to fill, which vanish from behind if
        # single-sided.
        "doubleSided": True,
    }
    if mesh.alpha_mode == "MASK":
        material["alphaCutoff"] = 0.5
    asset: dict[str, Any] = {"version": "2.0", "generator": f"trellis2 {VERSION}"}
    if extras:
        asset["extras"] = dict(extras)
    document: dict[str, Any] = {
        "asset": asset,
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"name": "object", "mesh": 0}],
        "meshes": [
            {
                "name": "object",
                "primitives": [
                    {
                        "attributes": {"POSITION": 0, "NORMAL": 1, "TEXCOORD_0": 2},
                        "indices": 3,
                        "material": 0,
                    }
                ],
            }
        ],
        "materials": [material],
        "textures": [
            {**texture, "extensions": {"EXT_texture_webp": {"source": i}}} if webp else {**texture, "source": i}
            for i in range(2)
        ],
        "images": [
            {"name": name, "bufferView": 4 + i, "mimeType": mime_type}
            for i, name in enumerate(("base_color", "metallic_roughness"))
        ],
        "samplers": [
            {
                "magFilter": _LINEAR,
                "minFilter": _LINEAR_MIPMAP_LINEAR,
                "wrapS": _REPEAT,
                "wrapT": _REPEAT,
            }
        ],
        "accessors": [
            {
                **vertices,
                "bufferView": 0,
                "type": "VEC3",
                "min": positions.min(axis=0).tolist(),
                "max": positions.max(axis=0).tolist(),
            },
            {**vertices, "bufferView": 1, "type": "VEC3"},
            {**vertices, "bufferView": 2, "type": "VEC2"},
            {
                "bufferView": 3,
                "componentType": _UNSIGNED_SHORT if short else _UNSIGNED_INT,
                "count": len(indices),
                "type": "SCALAR",
            },
        ],
        "bufferViews": views,
        "buffers": [{"byteLength": offset}],
    }
    if webp:
        document["extensionsUsed"] = document["extensionsRequired"] = ["EXT_texture_webp"]
    return document, parts


def _y_up(vectors: np.ndarray) -> np.ndarray:
    """(N, 3) of the object frame (z up) in glTF's frame: (x, y, z) -> (x, z, -y)."""
    x, y, z = vectors.T
    return np.stack((x, z, 0.0 - y), axis=1).astype("<f4")


def _aligned(size: int) -> int:
    return (size + 3) & ~3


def _container(document: Mapping[str, Any], parts: Sequence[bytes]) -> Iterator[bytes]:
    """Yield the bytes of a GLB whose buffer views hold ``parts``, each at the next multiple of four."""
    text = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
    text = text.ljust(_aligned(len(text)))
    size = sum(_aligned(len(part)) for part in parts)
    yield struct.pack("<3I", _MAGIC, 2, 12 + 8 + len(text) + 8 + size)
    yield struct.pack("<2I", len(text), _JSON_CHUNK) + text
    yield struct.pack("<2I", size, _BIN_CHUNK)
    for part in parts:
        yield part
        yield bytes(_aligned(len(part)) - len(part))


def _write_parts(path: Path, parts: Iterable[bytes]) -> None:
    with _replacing(path) as part, _file_system_errors(path), part.open("xb") as file:
        file.writelines(parts)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a new name beside ``path``; rename it to ``path`` at the end, remove it if anything is raised."""
    part = Path(path).with_name(f".{Path(path).name}.{uuid.uuid4().hex}.part")
    try:
        yield part
        with _file_system_errors(path):
            os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def _file_system_errors(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _NO_ROOM:
            raise CapacityError(
                f"{path} could not be written: {reason}; free disk space or choose another folder."
            ) from error
        raise InputError(f"{path} cannot be used: {reason}; check the folder and its permissions.") from error
