"""What is in a GLB file or in a checkpoint, told without loading a network."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .checkpoint import PIPELINE_NAME, read_json
from .errors import CheckpointError, InputError
from .export import read_glb

_TRIANGLES = 4
_STAGES = ("sparse_structure", "shape_slat", "tex_slat")


def describe(path: str | Path) -> dict[str, Any]:
    """Facts about a GLB file, or about a checkpoint folder (or its pipeline.json), as JSON values.

    Raises InputError for a missing or damaged GLB, CheckpointError for a checkpoint that cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return describe_checkpoint(path)
    if path.name == "pipeline.json":
        return describe_checkpoint(path.parent)
    if not path.exists():
        raise InputError(f"{path} does not exist; give a GLB file or a folder with pipeline.json.")
    return describe_glb(path)


def describe_glb(path: Path) -> dict[str, Any]:
    """Facts about a binary glTF file; ``bounds`` in metres, of the default scene, y up."""
    document, binary = read_glb(path)
    try:
        return _glb_facts(path, document, binary)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} is a damaged glTF model ({type(error).__name__}: {error}); export it again."
        ) from error


def _glb_facts(path: Path, document: Mapping[str, Any], binary: bytes) -> dict[str, Any]:
    accessors = document.get("accessors", [])
    meshes = document.get("meshes", [])
    triangles, positions = 0, set()
    for primitive in (p for mesh in meshes for p in mesh["primitives"]):
        position = primitive["attributes"]["POSITION"]
        positions.add(position)
        if primitive.get("mode", _TRIANGLES) == _TRIANGLES:
            triangles += accessors[primitive.get("indices", position)]["count"] // 3
    asset = document["asset"]
    return {
        "kind": "glb",
        "path": str(path),
        "bytes": path.stat().st_size,
        "version": asset["version"],
        "generator": asset.get("generator"),
        "extras": asset.get("extras", {}),
        "extensions": document.get("extensionsUsed", []),
        "meshes": len(meshes),
        "triangles": triangles,
        "vertices": sum(accessors[index]["count"] for index in positions),
        "bounds": _bounds(document),
        "materials": [_material(material) for material in document.get("materials", [])],
        "textures": [_texture(image, document, binary) for image in document.get("images", [])],
    }


def _bounds(document: Mapping[str, Any]) -> dict[str, list[float]] | None:
    """Box around the boxes of all meshes that the default scene shows, through the nodes' transforms."""
    nodes, corners = document.get("nodes", []), []
    pending = [
        (index, np.eye(4))
        for scene in document.get("scenes", [])[document.get("scene", 0) :][:1]
        for index in scene.get("nodes", [])
    ]
    while pending:
        index, parent = pending.pop()
        matrix = parent @ _transform(nodes[index])
        pending += [(child, matrix) for child in nodes[index].get("children", [])]
        if "mesh" in nodes[index]:
            for primitive in document["meshes"][nodes[index]["mesh"]]["primitives"]:
                accessor = document["accessors"][primitive["attributes"]["POSITION"]]
                box = np.array([accessor["min"], accessor["max"]], dtype=np.float64)
                grid = np.stack(np.meshgrid(*box.T, indexing="ij"), axis=-1).reshape(8, 3)
                corners.append(grid @ matrix[:3, :3].T + matrix[:3, 3])
    if not corners:
        return None
    points = np.concatenate(corners)
    return {"min": points.min(axis=0).tolist(), "max": points.max(axis=0).tolist()}


def _transform(node: Mapping[str, Any]) -> NDArray[np.float64]:
    """(4, 4) of a glTF node: its column-major matrix, or translation @ rotation @ scale."""
    if "matrix" in node:
        return np.array(node["matrix"], dtype=np.float64).reshape(4, 4).T
    x, y, z, w = node.get("rotation", (0, 0, 0, 1))
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    matrix = np.eye(4)
    matrix[:3, :3] = rotation * np.array(node.get("scale", (1, 1, 1)), dtype=np.float64)
    matrix[:3, 3] = node.get("translation", (0, 0, 0))
    return matrix


def _material(material: Mapping[str, Any]) -> dict[str, Any]:
    surface = material.get("pbrMetallicRoughness", {})
    maps = [name for name in (*surface, *material) if name.endswith("Texture")]
    return {
        "name": material.get("name"),
        "alpha_mode": material.get("alphaMode", "OPAQUE"),
        "double_sided": material.get("doubleSided", False),
        "maps": [name.removesuffix("Texture") for name in maps],
    }


def _texture(image: Mapping[str, Any], document: Mapping[str, Any], binary: bytes) -> dict[str, Any]:
    if "bufferView" not in image:
        return {"name": image.get("name"), "format": None, "size": None, "bytes": None, "uri": image["uri"][:80]}
    view = document["bufferViews"][image["bufferView"]]
    start = view.get("byteOffset", 0)
    data = binary[start : start + view["byteLength"]]
    with Image.open(io.BytesIO(data)) as picture:
        size = list(picture.size)
    return {"name": image.get("name"), "format": image["mimeType"], "size": size, "bytes": len(data)}


def describe_checkpoint(folder: Path) -> dict[str, Any]:
    """Facts about a checkpoint in the published layout; only headers are read.

    Networks that pipeline.json takes from another repository are listed with their reference alone.
    """
    path = folder / "pipeline.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; give a GLB file or a folder with pipeline.json.")
    config = read_json(path)
    try:
        if config["name"] != PIPELINE_NAME:
            raise CheckpointError(f"{path} is for {config['name']!r}, not {PIPELINE_NAME}.")
        args = config["args"]
        return {
            "kind": "checkpoint",
            "path": str(folder),
            "name": config["name"],
            "untrained": bool(config.get("untrained", False)),
            "models": {name: _model(folder, value) for name, value in args["models"].items()},
            "image_encoder": args["image_cond_model"]["args"]["model_name"],
            "default_pipeline_type": args.get("default_pipeline_type"),
            "samplers": {stage: args[f"{stage}_sampler"]["params"] for stage in _STAGES},
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not usable: {type(error).__name__}: {error}.") from error


def _model(folder: Path, reference: str) -> dict[str, Any]:
    """Class, size and types of one network, from its two files' headers."""
    config, weights = folder / f"{reference}.json", folder / f"{reference}.safetensors"
    if not config.is_file() and reference.count("/") >= 2:
        return {"reference": reference, "class": None, "parameters": None, "dtypes": [], "bytes": None}
    for file in (config, weights):
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; the checkpoint is incomplete, fetch it again.")
    tensors = _tensors(weights)
    return {
        "reference": reference,
        "class": read_json(config)["name"],
        "parameters": sum(int(np.prod(t["shape"], dtype=np.int64)) for t in tensors),
        "dtypes": sorted({t["dtype"] for t in tensors}),
        "bytes": weights.stat().st_size,
    }


def _tensors(path: Path) -> list[dict[str, Any]]:
    """The header of a safetensors file: 8 bytes of length, then JSON, then data to exactly the file's end."""
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            size = path.stat().st_size
            header: dict[str, Any] = json.loads(stream.read(min(length, size)))
        tensors = [value for name, value in header.items() if name != "__metadata__"]
        complete = size == 8 + length + max((t["data_offsets"][1] for t in tensors), default=0)
    except (struct.error, ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a safetensors file; fetch it again.") from error
    if not complete:
        raise CheckpointError(f"{path} is cut short; fetch it again.")
    return tensors


def as_text(facts: Mapping[str, Any]) -> str:
    """The facts for people."""
    return "\n".join(_glb_lines(facts) if facts["kind"] == "glb" else _checkpoint_lines(facts))


def _glb_lines(facts: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{facts['path']}: glTF {facts['version']}, {_size(facts['bytes'])}",
        f"generator   {facts['generator'] or 'unknown'}",
    ]
    lines += [f"extras      {name}: {value}" for name, value in facts["extras"].items()]
    lines += [f"extensions  {', '.join(facts['extensions'])}"] if facts["extensions"] else []
    lines.append(
        f"geometry    {facts['meshes']} mesh(es), {facts['triangles']:,} triangles, {facts['vertices']:,} vertices"
    )
    if facts["bounds"]:
        low, high = facts["bounds"]["min"], facts["bounds"]["max"]
        extent = " x ".join(f"{b - a:.3f}" for a, b in zip(low, high, strict=True))
        corners = " to ".join("(" + ", ".join(f"{v:.3f}" for v in corner) + ")" for corner in (low, high))
        lines.append(f"bounds      {extent} m, {corners}")
    for material in facts["materials"]:
        sides = ", double-sided" if material["double_sided"] else ""
        maps = f" ({', '.join(material['maps'])})" if material["maps"] else ""
        lines.append(f"material    {material['name'] or 'unnamed'}: {material['alpha_mode']}{sides}{maps}")
    for texture in facts["textures"]:
        name = texture["name"] or "unnamed"
        if texture["size"] is None:
            lines.append(f"texture     {name}: {texture['uri']}")
        else:
            width, height = texture["size"]
            lines.append(f"texture     {name}: {width} x {height}, {texture['format']}, {_size(texture['bytes'])}")
    return lines


def _checkpoint_lines(facts: Mapping[str, Any]) -> list[str]:
    lines = [f"{facts['path']}: {facts['name']}{', UNTRAINED' if facts['untrained'] else ''}"]
    for name, model in facts["models"].items():
        if model["class"] is None:
            lines.append(f"{name:<28}{model['reference']} (in another repository)")
            continue
        dtypes = "/".join(model["dtypes"])
        count = model["parameters"]
        parameters = f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,}"
        lines.append(f"{name:<28}{model['class']:<26}{parameters:>12}  {dtypes:<9}{_size(model['bytes'])}")
    lines.append(f"{'image encoder':<28}{facts['image_encoder']}")
    for stage, params in facts["samplers"].items():
        lines.append(f"{stage + ' sampler':<28}{', '.join(f'{name} {value}' for name, value in params.items())}")
    if facts["default_pipeline_type"]:
        lines.append(f"{'default preset':<28}{facts['default_pipeline_type']}")
    return lines


def _size(count: int) -> str:
    """Bytes for people, in powers of ten."""
    amount, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} bytes" if unit == "bytes" else f"{amount:.1f} {unit}"
