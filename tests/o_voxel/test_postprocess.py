from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from o_voxel.attributes import textured_mesh_to_volumetric_attr
from o_voxel.closest import Surface, closest_point
from o_voxel.dual_grid import flexible_dual_grid_to_mesh
from o_voxel.nearest import VoxelTree
from o_voxel.postprocess import NoSurfaceError, to_glb
from o_voxel.remesh import remesh_narrow_band
from o_voxel.voxelize import mesh_to_flexible_dual_grid
from PIL import Image
from torch import Tensor
from trimesh.visual import TextureVisuals
from trimesh.visual.material import PBRMaterial
from voxelise import bumpy_sphere, cube, surface_points, voxelise

from trellis2.mesh import Asset

BOX = [[-0.5, -0.5, -0.5], [0.5, 0.5, 0.5]]
LAYOUT = {"base_color": slice(0, 3), "metallic": slice(3, 4), "roughness": slice(4, 5), "alpha": slice(5, 6)}
TURNED = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])  # (x, y, z) -> (x, z, -y), for rows


@cache
def asset(resolution: int) -> Asset:
    return voxelise(bumpy_sphere(), resolution)


def arguments(of: Asset, **changed: Any) -> dict[str, Any]:
    return {
        "vertices": of.mesh.vertices,
        "faces": of.mesh.faces,
        "attr_volume": of.material.attrs,
        "coords": of.material.coords,
        "attr_layout": LAYOUT,
        "aabb": BOX,
        "voxel_size": of.material.voxel_size,
        "decimation_target": 4000,
        "texture_size": 512,
        **changed,
    }


def look_up(mesh: trimesh.Trimesh, count: int = 50_000) -> tuple[Tensor, Tensor, Tensor]:
    """(points in the object's frame, base colour and alpha, metallic-roughness) as a viewer filters them."""
    vertices, faces = torch.tensor(mesh.vertices).float(), torch.tensor(mesh.faces).long()
    face, weights = surface_points(vertices, faces, count)
    corners = faces[face]
    uv = (torch.tensor(mesh.visual.uv).float()[corners] * weights[..., None]).sum(1)
    # v counts from the bottom of the picture.
    place = torch.stack([uv[:, 0], 1 - uv[:, 1]], 1)[None, None] * 2 - 1
    found = []
    for picture in (mesh.visual.material.baseColorTexture, mesh.visual.material.metallicRoughnessTexture):
        image = torch.tensor(np.asarray(picture)).permute(2, 0, 1)[None].float() / 255
        found.append(
            torch.nn.functional.grid_sample(image, place, align_corners=False, padding_mode="border")[0, :, 0].T
        )
    return (vertices[corners] * weights[..., None]).sum(1) @ TURNED.T, found[0], found[1]


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * torch.log10(((a - b) ** 2).mean()))


@pytest.mark.parametrize("remesh", [False, True])
def test_a_sphere_comes_back(remesh: bool, tmp_path: Path) -> None:
    shape, of = bumpy_sphere(), asset(96)
    made = to_glb(**arguments(of, remesh=remesh, decimation_target=8000))
    assert isinstance(made, trimesh.Trimesh)
    assert 6000 < len(made.faces) <= 8000
    assert made.visual.material.doubleSided is not remesh
    made.export(tmp_path / "sphere.glb")
    (mesh,) = trimesh.load(tmp_path / "sphere.glb").geometry.values()
    points, color, rest = look_up(mesh)
    distance = closest_point(of.mesh.vertices, of.mesh.faces, points).distance * 96
    assert distance.max() < (1.0 if remesh else 0.5)
    expected = shape.material(shape.project(points))
    assert psnr(color[:, :3], expected[:, :3]) > 35
    assert (rest[:, 2] - expected[:, 3]).abs().max() < 0.01
    assert (rest[:, 1] - expected[:, 4]).abs().max() < 0.01
    assert mesh.visual.material.alphaMode in (None, "OPAQUE")
    # Vertex normals are turned with the vertices: outwards, but for a shell's inner side.
    outwards = (torch.tensor(np.array(made.vertex_normals)) * torch.tensor(np.array(made.vertices))).sum(1) > 0
    assert outwards.float().mean() > (0.4 if remesh else 0.999)


@pytest.mark.gpu
@pytest.mark.parametrize("remesh", [False, True])
def test_a_gpu_makes_the_same_sphere_every_time(remesh: bool) -> None:
    shape, of = bumpy_sphere(), asset(96)
    given = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in arguments(of, remesh=remesh).items()}
    made, again = to_glb(**given), to_glb(**given)
    assert np.array_equal(made.vertices, again.vertices)
    pictures = [np.asarray(m.visual.material.baseColorTexture) for m in (made, again)]
    assert np.array_equal(*pictures)
    points, color, _ = look_up(made)
    assert closest_point(of.mesh.vertices, of.mesh.faces, points).distance.max() < 1 / 96
    assert psnr(color[:, :3], shape.material(shape.project(points))[:, :3]) > 35


@pytest.mark.gpu
def test_a_gpu_finds_the_same_nearest_voxels() -> None:
    generator = torch.Generator().manual_seed(0)
    coords = torch.unique(torch.randint(0, 40, (500, 3), generator=generator), dim=0)
    points = torch.rand((3000, 3), generator=generator) * 120 - 40
    assert torch.equal(VoxelTree(coords.cuda()).nearest(points.cuda()).cpu(), VoxelTree(coords).nearest(points))


def test_the_frame_is_the_originals() -> None:
    mesh = to_glb(**arguments(voxelise(cube(32), 32), texture_size=256))
    points, color, _ = look_up(mesh)
    top = torch.tensor(mesh.vertices)[:, 1].max()
    # The +z side of the object is up in the file.
    on_top = points[:, 2] > float(top) - 1e-4
    inner = on_top & (points[:, :2].abs() < 0.37).all(1)
    assert inner.sum() > 1000
    assert (color[inner, :3] - torch.tensor([0.40, 0.60, 0.60])).abs().max() < 0.01


def test_layout_and_box_are_obeyed(capfd: pytest.CaptureFixture[str]) -> None:
    of = asset(32)
    usual = to_glb(**arguments(of, decimation_target=1000, texture_size=128))
    assert capfd.readouterr() == ("", "")
    order = [5, 3, 0, 1, 2, 4]
    layout = {"alpha": slice(0, 1), "metallic": slice(1, 2), "base_color": slice(2, 5), "roughness": slice(5, 6)}
    stretch = torch.tensor([2.0, 2.0, 2.0])
    other = to_glb(
        **arguments(
            of,
            attr_volume=of.material.attrs[:, order],
            attr_layout=layout,
            vertices=of.mesh.vertices * stretch + 3,
            aabb=np.array(BOX) * 2 + 3,
            voxel_size=None,
            grid_size=[32, 32, 32],
            decimation_target=1000,
            texture_size=128,
            verbose=True,
            use_tqdm=True,
        )
    )
    out, err = capfd.readouterr()
    assert f"to_glb: {len(of.mesh.vertices)} vertices, {len(of.mesh.faces)} faces" in out
    assert f"{len(other.faces)} faces" in out
    assert "100%" in err
    shape = bumpy_sphere()
    for mesh, back in ((usual, lambda p: p), (other, lambda p: (p - 3) / 2)):
        points, color, _ = look_up(mesh, 5000)
        assert psnr(color[:, :3], shape.material(shape.project(back(points)))[:, :3]) > 28
        assert (color[:, 3] - 1).abs().max() < 1e-5


def test_steering_the_originals_charts_is_refused_aloud() -> None:
    few = arguments(asset(32), decimation_target=200, texture_size=32)
    with pytest.warns(UserWarning, match="mesh_cluster_refine_iterations=3 has no effect"):
        to_glb(**few, mesh_cluster_refine_iterations=3)
    to_glb(**few, mesh_cluster_threshold_cone_half_angle_rad=np.radians(90.0))


def helmet_like() -> trimesh.Trimesh:
    """A textured ball with an open collar: smooth colours, so that only the chain can lose any."""
    sphere = trimesh.creation.uv_sphere(radius=0.45, count=[48, 96])
    kept = (sphere.triangles[:, :, 2] > -0.3).all(1)
    faces = sphere.faces[kept]
    d = sphere.vertices / 0.45
    uv = np.stack([0.5 + 0.45 * d[:, 0], 0.5 + 0.45 * d[:, 1]], 1)
    t = np.linspace(0, 1, 256)
    red, green = np.meshgrid(0.5 + 0.4 * np.sin(7 * t), 0.5 + 0.4 * np.cos(5 * t))
    image = (np.stack([red, green, 0.5 * red + 0.4 * green], -1) * 255).round().astype(np.uint8)
    material = PBRMaterial(baseColorTexture=Image.fromarray(image), metallicFactor=0.2, roughnessFactor=0.7)
    return trimesh.Trimesh(sphere.vertices, faces, visual=TextureVisuals(uv=uv, material=material), process=False)


@pytest.mark.slow
@pytest.mark.parametrize("remesh", [False, True])
def test_there_and_back_at_256(remesh: bool) -> None:
    source = helmet_like()
    vertices, faces = torch.tensor(source.vertices).float(), torch.tensor(source.faces).long()
    coords, dual, crossed = mesh_to_flexible_dual_grid(
        vertices, faces, grid_size=256, aabb=BOX, face_weight=1.0, boundary_weight=0.2, regularization_weight=1e-2
    )
    coords_mat, attr = textured_mesh_to_volumetric_attr(source, grid_size=256, aabb=BOX)
    assert torch.equal(coords, coords_mat)
    mesh = flexible_dual_grid_to_mesh(coords, dual * 256 - coords, crossed, None, BOX, grid_size=256)
    volume = torch.cat([attr[name] for name in LAYOUT], dim=1) / 255
    made = to_glb(
        *mesh, volume, coords, LAYOUT, BOX, grid_size=256, decimation_target=50_000, texture_size=1024, remesh=remesh
    )
    points, color, rest = look_up(made)
    near = Surface(vertices, faces).closest(points)
    assert (near.distance < 1 / 256).float().mean() >= 0.999
    # And nothing of the source is missing.
    own, weights = surface_points(vertices, faces, 50_000)
    places = (vertices[faces[own]] * weights[..., None]).sum(1)
    turned = torch.tensor(made.vertices).float() @ TURNED.T
    back = closest_point(turned, torch.tensor(made.faces), places).distance
    # A dual grid ends at the middles of its last voxels: only along the open collar may a rim be lost.
    assert (back < 1 / 256).float().mean() >= (0.999 if remesh else 0.998)
    collar = places[:, 2] < places[:, 2].min() + 2 / 256
    assert (back < 1 / 256)[~collar].float().mean() >= 0.999
    assert back.max() < 2 / 256
    uv = (torch.tensor(source.visual.uv).float()[faces[near.faces]] * near.barycentric[..., None]).sum(1)
    image = torch.tensor(np.asarray(source.visual.material.baseColorTexture)).permute(2, 0, 1)[None].float() / 255
    place = torch.stack([uv[:, 0], 1 - uv[:, 1]], 1)[None, None] * 2 - 1
    expected = torch.nn.functional.grid_sample(image, place, align_corners=False, padding_mode="border")[0, :, 0].T
    assert psnr(color[:, :3], expected) >= 38
    assert (rest[:, 1] - 0.7).abs().max() < 0.01
    assert (rest[:, 2] - 0.2).abs().max() < 0.01


def directed_edges(faces: Tensor) -> Counter[tuple[int, int]]:
    return Counter((a, b) for a, b in faces.long()[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2).tolist())


def closed_and_wound_alike(faces: Tensor, manifold: bool = True) -> bool:
    edges = directed_edges(faces)
    once = all(count == 1 for count in edges.values())
    return (once or not manifold) and all(edges[b, a] == count for (a, b), count in list(edges.items()))


def volume(vertices: Tensor, faces: Tensor) -> float:
    a, b, c = vertices.double()[faces.long()].unbind(1)
    return float((a * torch.linalg.cross(b, c)).sum() / 6)


def test_shell_of_one_triangle() -> None:
    triangle = torch.tensor([[0.1, 0.2, 0.0], [0.9, 0.1, 0.0], [0.3, 0.8, 0.0]])
    faces = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    vertices, made = remesh_narrow_band(triangle, faces, cell=0.005, anchor=torch.zeros(3), band=4.0, project=0.0)
    # Sharp tips are thinner than a voxel, where one vertex serves two sheets.
    assert closed_and_wound_alike(made, manifold=False)
    assert sum(count - 1 for count in directed_edges(made).values()) < 10
    distance = closest_point(triangle, faces, vertices).distance
    assert (distance - 0.02).abs().max() < 0.002
    # Of all that is within r of a triangle: a prism, a half cylinder along each side, and a ball at the corners.
    sides = sum(float((triangle[i] - triangle[i - 1]).norm()) for i in range(3))
    area, r = float(torch.linalg.cross(triangle[1] - triangle[0], triangle[2] - triangle[0]).norm()) / 2, 0.02
    expected = 2 * r * area + math.pi * r**2 / 2 * sides + 4 / 3 * math.pi * r**3
    assert volume(vertices, made) == pytest.approx(expected, rel=0.01)
    drawn, same = remesh_narrow_band(triangle, faces, cell=0.005, anchor=torch.zeros(3), band=4.0, project=0.75)
    assert len(same) == len(made)
    assert closest_point(triangle, faces, drawn).distance.max() == pytest.approx(0.005, abs=5e-4)


def test_shell_of_a_ball_has_two_sides() -> None:
    mesh = asset(32).mesh
    vertices, faces = remesh_narrow_band(mesh.vertices, mesh.faces, cell=1 / 32, anchor=torch.full((3,), -0.5))
    assert closed_and_wound_alike(faces)
    out, own = vertices.norm(dim=1), closest_point(mesh.vertices, mesh.faces, vertices).points.norm(dim=1)
    assert 0.4 < (out > own).float().mean() < 0.6
    assert (out - own).abs().max() < 0.15 / 32


def test_shell_does_not_depend_on_what_lies_outside_the_box() -> None:
    mesh = asset(32).mesh
    moved = mesh.vertices + 10
    first = remesh_narrow_band(mesh.vertices, mesh.faces, cell=1 / 32, anchor=torch.full((3,), -0.5))
    again = remesh_narrow_band(moved, mesh.faces, cell=1 / 32, anchor=torch.full((3,), -0.5))
    assert abs(len(first[1]) - len(again[1])) < 0.01 * len(first[1])
    assert closed_and_wound_alike(again[1])


def test_nearest_voxel_equals_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    coords = torch.unique(torch.randint(0, 40, (500, 3), generator=generator), dim=0)
    points = torch.rand((3000, 3), generator=generator) * 120 - 40
    points = torch.cat([points, coords[:50].float(), coords[:50] + 0.5])  # ties, and centres themselves
    distance = ((points[:, None].double() - (coords + 0.5)[None].double()) ** 2).sum(2)
    found = VoxelTree(coords).nearest(points)
    assert torch.equal(found, distance.argmin(dim=1))
    with pytest.raises(ValueError, match="coords"):
        VoxelTree(coords[:0])
    with pytest.raises(ValueError, match="points"):
        VoxelTree(coords).nearest(torch.full((1, 3), torch.nan))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda of: {"attr_volume": of.material.attrs.byte()}, "attr_volume"),
        (lambda of: {"coords": of.material.coords[1:]}, "coords"),
        (lambda of: {"attr_volume": of.material.attrs * torch.nan}, "attr_volume must be finite"),
        (lambda of: {"coords": of.material.coords + 32}, "coords must lie in the grid of 32 x 32 x 32"),
        (lambda of: {"coords": of.material.coords - 32}, "coords must lie in the grid of 32 x 32 x 32"),
        (lambda of: {"attr_layout": {"base_color": slice(0, 3)}}, "attr_layout.*'metallic'"),
        (lambda of: {"attr_layout": {**LAYOUT, "alpha": slice(6, 7)}}, "attr_layout.*'alpha'"),
        (lambda of: {"aabb": None}, "aabb"),
        (lambda of: {"aabb": [[0.0] * 3] * 2}, "aabb"),
        (lambda of: {"voxel_size": None}, "voxel_size or grid_size"),
        (lambda of: {"decimation_target": 0}, "decimation_target"),
        (lambda of: {"texture_size": 0}, "texture_size"),
        (lambda of: {"remesh": True, "remesh_band": 0.0}, "band"),
        (lambda of: {"remesh": True, "remesh_project": 2.0}, "project"),
        (lambda of: {"vertices": of.mesh.vertices[:, :2]}, "vertices"),
    ],
)
def test_wrong_arguments_are_named(change: Callable[[Asset], dict[str, Any]], named: str) -> None:
    of = asset(32)
    with pytest.raises(ValueError, match=named):
        to_glb(**arguments(of, **change(of)))


def test_no_surface() -> None:
    of = asset(32)
    with pytest.raises(NoSurfaceError):
        to_glb(**arguments(of, faces=of.mesh.faces[:0]))
    with pytest.raises(NoSurfaceError):
        to_glb(**arguments(of, coords=of.material.coords[:0], attr_volume=of.material.attrs[:0]))
    with pytest.raises(NoSurfaceError):
        to_glb(**arguments(of, faces=torch.zeros((5, 3), dtype=torch.int32)))


def test_without_trimesh_the_rest_works_and_the_error_names_the_extra() -> None:
    script = """
import sys
sys.modules.update(trimesh=None, PIL=None, tqdm=None)
import torch, o_voxel
try:
    o_voxel.postprocess.to_glb(*[torch.zeros(0, 3)] * 4, {}, None)
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "to_glb needs trimesh, pillow and tqdm: pip install 'o-voxel[mesh]'\n"
