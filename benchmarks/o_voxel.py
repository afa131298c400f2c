"""Time the o_voxel package on a textured mesh, and how much of the mesh comes back.

    python -m benchmarks.o_voxel                          # 1.25M faces, 1024^3, on the GPU if there is one
    python -m benchmarks.o_voxel --device cpu --repeat 5
    python -m benchmarks.o_voxel --resolution 512 --json o_voxel.json

Compile the C++ part first (python -m o_voxel.build); the first line says whether it is there.  A ball with bumps, a
seam and a texture of many wavelengths goes to voxels, into a .vxz file, out of it and back to a mesh.  What a step
takes includes the transfers between host and device.  Seconds are the least of the runs after the first, which also
compiles and loads kernels (files are written and read once); CPU seconds are those of all threads.  Tests for a GPU:

    python -m pytest -m gpu tests/o_voxel tests/test_gpu.py
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from o_voxel import convert, io
from o_voxel._native import library
from o_voxel.closest import closest_point
from o_voxel.sample import VoxelField
from PIL import Image
from torch import Tensor
from trimesh.visual import TextureVisuals
from trimesh.visual.material import PBRMaterial

from .measure import machine, say, synchronise

BOX = [[-0.5, -0.5, -0.5], [0.5, 0.5, 0.5]]
SAMPLES = 500_000


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    facts = machine(device) | {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "compiled": library() is not None,
        "trimesh": trimesh.__version__,
    }
    say(
        f"{facts['device']}, {facts['processor']}, {facts['threads']} threads, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}; torch {facts['torch']}, Warp {facts['versions'].get('warp-lang')}, trimesh "
        f"{facts['trimesh']}, Python {facts['python']}, compiled part: {facts['compiled']}; {facts['date']}"
    )
    source = textured_ball(options.faces, options.texture)
    results = run(source, options.resolution, device, options.repeat)
    results |= {"faces": len(source.faces), "resolution": options.resolution, "texture": options.texture}
    if options.json:
        options.json.write_text(json.dumps({"facts": facts, "results": results}, indent=1) + "\n")
    return 0


def run(source: trimesh.Trimesh, resolution: int, device: torch.device, repeat: int) -> dict[str, Any]:
    """Every step of the way there and back, each timed ``repeat`` times and once before; says and returns results."""
    say(f"{len(source.faces):,} faces, {len(source.vertices):,} vertices, grid {resolution}^3, seconds:")
    seconds: dict[str, dict[str, float]] = {}

    def timed(name: str, step: Callable[[], Any], runs: int = repeat + 1) -> Any:
        walls, works = [], []
        for _ in range(runs):
            synchronise()
            wall, work = time.perf_counter(), time.process_time()
            made = step()
            synchronise()
            walls.append(time.perf_counter() - wall)
            works.append(time.process_time() - work)
        wall, work = min(walls[1:] or walls), min(works[1:] or works)
        seconds[name] = {"wall": wall, "cpu": work, "first": walls[0]}
        say(f"  {name:34}{wall:9.4f}  (CPU {work:.4f}, first {walls[0]:.3f})")
        return made

    coords, dual, crossed = timed("mesh -> dual grid", lambda: geometry(source, resolution, device))
    also, attributes = timed(
        "mesh -> attributes",
        lambda: convert.textured_mesh_to_volumetric_attr(source, grid_size=resolution, aabb=BOX, device=device),
    )
    if not torch.equal(coords, also):
        raise RuntimeError("Geometry and attributes have other voxels.")
    total = seconds["mesh -> dual grid"]["wall"] + seconds["mesh -> attributes"]["wall"]
    say(f"  {'both':34}{total:9.4f}  ({len(coords):,} voxels)")

    # A converter keeps eight bits of each offset.
    attributes["dual_vertices"] = ((dual * resolution - coords).clamp(0, 1) * 255).round().byte()
    attributes["intersected"] = (crossed * torch.tensor([1, 2, 4], device=device)).sum(1, keepdim=True).byte()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "asset.vxz"
        on_host = coords.cpu(), {name: value.cpu() for name, value in attributes.items()}
        timed("write .vxz", lambda: io.write_vxz(str(file), *on_host), runs=1)
        megabytes = file.stat().st_size / 1e6
        coords, attributes = timed("read .vxz", lambda: io.read_vxz(str(file)), runs=1)
    say(f"  {'size of the file, MB':34}{megabytes:9.1f}")
    coords = coords.to(device)
    attributes = {name: value.to(device) for name, value in attributes.items()}
    offsets = attributes["dual_vertices"] / 255
    flags = torch.cat([attributes["intersected"] // bit % 2 for bit in (1, 2, 4)], dim=1).bool()
    weights = torch.ones((len(coords), 1), device=device)

    def mesh(split_weight: Tensor | None, train: bool = False) -> tuple[Tensor, Tensor]:
        return convert.flexible_dual_grid_to_mesh(
            coords, offsets, flags, split_weight, aabb=BOX, grid_size=resolution, train=train
        )

    vertices, faces = timed("dual grid -> mesh", lambda: mesh(None))
    timed("dual grid -> mesh, split weights", lambda: mesh(weights))
    timed("dual grid -> mesh, training", lambda: mesh(weights, train=True))
    quality = round_trip(source, vertices, faces, coords, attributes["base_color"], resolution)
    say(
        f"  {len(faces):,} faces back; within one voxel: {quality['recall']:.5f} of the source's surface, "
        f"{quality['precision']:.5f} of the result's, F {quality['f']:.5f}; base colour {quality['psnr']:.2f} dB"
    )
    return {"seconds": seconds, "voxels": len(coords), "vxz_megabytes": megabytes, "round_trip": quality}


def geometry(source: trimesh.Trimesh, resolution: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    vertices = torch.from_numpy(np.array(source.vertices, dtype=np.float32)).to(device)
    faces = torch.from_numpy(np.array(source.faces)).to(device)
    made: tuple[Tensor, Tensor, Tensor] = convert.mesh_to_flexible_dual_grid(
        vertices, faces, grid_size=resolution, aabb=BOX, boundary_weight=0.2, regularization_weight=1e-2
    )
    return made


def round_trip(
    source: trimesh.Trimesh, vertices: Tensor, faces: Tensor, coords: Tensor, colors: Tensor, resolution: int
) -> dict[str, float]:
    """Shares of either surface within one voxel of the other, and the PSNR of base colours in dB.

    Colours are compared at points of the source: its texture there, filtered linearly, and the voxels' between centres.
    """
    device = vertices.device
    own_vertices = torch.tensor(np.asarray(source.vertices)).to(device).float()
    own_faces = torch.tensor(np.asarray(source.faces)).to(device)
    face, weights = _spread(own_vertices, own_faces)
    points = (own_vertices[own_faces[face]] * weights[..., None]).sum(1)
    recall = (closest_point(vertices, faces, points).distance <= 1 / resolution).float().mean()
    back, shares = _spread(vertices, faces)
    others = (vertices[faces[back].long()] * shares[..., None]).sum(1)
    precision = (closest_point(own_vertices, own_faces, others).distance <= 1 / resolution).float().mean()

    uv = torch.tensor(np.asarray(source.visual.uv)).to(device).float()[own_faces[face]]
    uv = (uv * weights[..., None]).sum(1)
    place = torch.stack([uv[:, 0], 1 - uv[:, 1]], 1)[None, None] * 2 - 1
    image = torch.tensor(np.asarray(source.visual.material.baseColorTexture)).to(device).permute(2, 0, 1)[None] / 255
    expected = torch.nn.functional.grid_sample(image, place, align_corners=False, padding_mode="border")[0, :, 0].T
    batched = torch.nn.functional.pad(coords, (1, 0))
    field = VoxelField(colors / 255, batched, (1, 3, resolution, resolution, resolution))
    found = field.sample(((points + 0.5) * resolution)[None])[0]
    error = float(((found - expected).double() ** 2).mean())
    return {
        "recall": float(recall),
        "precision": float(precision),
        "f": float(2 * recall * precision / (recall + precision)),
        "psnr": -10 * math.log10(error),
    }


def textured_ball(faces: int, side: int) -> trimesh.Trimesh:
    """A ball with bumps of about as many faces, a seam where its texture of side x side texels meets itself."""
    rows = max(round(math.sqrt(faces / 4)), 3)
    columns = 2 * rows
    latitude, longitude = np.meshgrid(
        np.linspace(0, math.pi, rows + 1), np.linspace(0, 2 * math.pi, columns + 1), indexing="ij"
    )
    longitude[:, -1] = 0  # the same place, and other texture coordinates
    radius = 0.43 + 0.03 * np.sin(9 * latitude) ** 2 * np.sin(7 * longitude)
    place = np.stack([np.sin(latitude) * np.cos(longitude), np.sin(latitude) * np.sin(longitude), np.cos(latitude)], -1)
    u, v = np.meshgrid(np.linspace(0, 1, rows + 1), np.linspace(0, 1, columns + 1), indexing="ij")
    i, j = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    a = i * (columns + 1) + j
    b, c, d = a + columns + 1, a + 1, a + columns + 2
    upper = np.stack([a, b, c], -1)[1:]  # but for those without an area at the poles
    lower = np.stack([c, b, d], -1)[:-1]
    vertices = (radius[..., None] * place).reshape(-1, 3)
    triangles = np.concatenate([upper.reshape(-1, 3), lower.reshape(-1, 3)])
    t = np.linspace(0, 2 * math.pi, side, endpoint=False)
    x, y = np.meshgrid(t, t)
    waves = [0.25 * np.sin(3 * x + 2 * y) + 0.15 * np.sin(17 * x - 9 * y) + 0.08 * np.cos(48 * x + k) for k in range(3)]
    image = ((0.5 + np.stack(waves, -1)) * 255).round().astype(np.uint8)
    rest = np.stack([np.zeros_like(x), 0.5 + 0.4 * np.sin(5 * y), 0.5 + 0.4 * np.cos(4 * x)], -1)
    material = PBRMaterial(
        baseColorTexture=Image.fromarray(image),
        metallicRoughnessTexture=Image.fromarray((rest * 255).astype(np.uint8)),
        metallicFactor=1.0,
        roughnessFactor=1.0,
    )
    # Normals come with the mesh, as in most files.
    return trimesh.Trimesh(
        vertices,
        triangles,
        vertex_normals=place.reshape(-1, 3),
        visual=TextureVisuals(uv=np.stack([v, 1 - u], -1).reshape(-1, 2), material=material),
        process=False,
    )


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown processor"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def _spread(vertices: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
    """(face (P,), weights of its corners (P, 3)) of points spread evenly over a surface."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = vertices[faces.long()].unbind(1)
    area = torch.linalg.cross(b - a, c - a).norm(dim=1).double()
    choice, u, t = torch.rand((3, SAMPLES), generator=generator, dtype=torch.float64).to(vertices.device)
    face = torch.searchsorted(area.cumsum(0) / area.sum(), choice).clamp_max(len(faces) - 1)
    root = u.sqrt()
    return face, torch.stack([1 - root, root * (1 - t), root * t], dim=1).float()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.o_voxel", description="Time the o_voxel package.")
    parser.add_argument("--resolution", type=int, default=1024, help="voxels along an axis, default 1024")
    parser.add_argument("--faces", type=int, default=1_250_000, help="of the mesh, about; default 1250000")
    parser.add_argument("--texture", type=int, default=2048, help="texels along a side, default 2048")
    parser.add_argument("--device", help="cpu or cuda; default: the GPU if there is one")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--repeat", type=int, default=3, help="runs after the first, default 3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
