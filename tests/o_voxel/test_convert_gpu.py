"""Meshes to voxels and back on a GPU: what a CPU gives, in grids of 2048^3 too, and the same in every run."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from o_voxel import attributes, convert, serialize
from o_voxel.sample import VoxelField
from PIL import Image
from surfaces import BOX, bowl, textured_bowl
from torch import Tensor
from trimesh.visual import ColorVisuals, TextureVisuals
from trimesh.visual.material import PBRMaterial

pytestmark = pytest.mark.gpu

FINEST = 2048


def on_gpu(item: Any) -> Any:
    """A dataclass with its tensors, and those of its dataclasses, on the GPU."""
    changed = {}
    for field in fields(item):
        value = getattr(item, field.name)
        changed[field.name] = value.cuda() if isinstance(value, Tensor) else value
        if isinstance(value, attributes.Texture):
            changed[field.name] = on_gpu(value)
    return type(item)(**changed)


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert found[0].is_cuda
    assert found[1].is_cuda
    assert found[0].dtype == expected[0].dtype
    assert torch.equal(found[0].cpu(), expected[0])
    assert (found[1].cpu().int() - expected[1].int()).abs().max() <= 1
    assert float((found[1].cpu() != expected[1]).float().mean()) <= 1e-4


def as_table(result: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    assert list(result[1]) == list(attributes.WIDTHS)
    return result[0], torch.cat(list(result[1].values()), dim=1)


def far_bowl() -> tuple[Tensor, Tensor]:
    """A small bowl in the far corner of the box, where keys of voxels are greatest."""
    vertices, faces = bowl()
    return vertices * 0.06 + 0.47, faces


def textured(vertices: Tensor, faces: Tensor, **material: Any) -> trimesh.Trimesh:
    """With random texture coordinates, vertex colours and all textures."""
    random = np.random.default_rng(0)

    def image(channels: int) -> Image.Image:
        return Image.fromarray(random.integers(0, 256, (64, 64, channels), np.uint8))

    visual = TextureVisuals(
        uv=random.random((len(vertices), 2)) * 3 - 1,
        material=PBRMaterial(
            baseColorTexture=image(4),
            baseColorFactor=[200, 100, 255, 250],
            metallicRoughnessTexture=image(3),
            emissiveTexture=image(3),
            emissiveFactor=[0.4, 1.0, 0.7],
            normalTexture=image(3),
            **material,
        ),
    )
    return trimesh.Trimesh(vertices.double().numpy(), faces.numpy(), visual=visual, process=False)


@pytest.mark.parametrize("wrap", [attributes.REPEAT, attributes.CLAMP, attributes.MIRROR])
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("mode", [attributes.OPAQUE, attributes.MASK, attributes.BLEND])
@pytest.mark.parametrize("offset", [0.0, 2.5])
def test_attributes(wrap: int, linear: bool, mode: int, offset: float) -> None:
    surface, materials, grid = textured_bowl(wrap, linear, mode)
    expected = attributes.attributes_reference(surface, materials, grid, offset)
    given = on_gpu(surface), [on_gpu(material) for material in materials], on_gpu(grid), offset
    found, again = attributes.attributes_warp(*given), attributes.attributes_warp(*given)
    assert_same(found, expected)
    assert torch.equal(found[1], again[1])


@pytest.mark.parametrize("mode", ["OPAQUE", "MASK", "BLEND"])
@pytest.mark.parametrize("size", [60, [90, 33, 60]])
def test_textured_mesh(mode: str, size: Any) -> None:
    mesh = textured(*bowl(), alphaMode=mode, alphaCutoff=0.45)
    bare = trimesh.creation.box((0.3, 0.2, 0.1))
    bare.visual = ColorVisuals(bare, face_colors=np.random.default_rng(1).integers(0, 256, (12, 4), np.uint8))
    scene = trimesh.Scene([mesh, bare])
    results = [
        convert.textured_mesh_to_volumetric_attr(scene, grid_size=size, aabb=BOX, device=device)
        for device in ("cuda", "cpu")
    ]
    assert_same(as_table(results[0]), as_table(results[1]))


def test_blender_dump() -> None:
    vertices, faces = bowl()
    random = np.random.default_rng(0)
    item = {
        "vertices": vertices.numpy(),
        "faces": faces.numpy(),
        "normals": random.random((len(faces), 3, 3)),
        "uvs": random.random((len(faces), 3, 2)),
        "mat_ids": np.zeros(len(faces), int),
    }
    material = {
        "baseColorFactor": [1, 0.5, 1, 1],
        "metallicFactor": 0.2,
        "roughnessFactor": 0.4,
        "alphaFactor": 0.5,
        "alphaMode": "BLEND",
        "alphaCutoff": 0.5,
        **dict.fromkeys(("baseColorTexture", "metallicTexture", "roughnessTexture", "alphaTexture")),
    }
    dump = {"objects": [item], "materials": [material]}
    results = [
        convert.blender_dump_to_volumetric_attr(dump, grid_size=40, aabb=BOX, device=device)
        for device in ("cuda", "cpu")
    ]
    assert_same(as_table(results[0]), as_table(results[1]))


def test_the_finest_grid() -> None:
    vertices, faces = far_bowl()
    coords, dual, crossed = convert.mesh_to_flexible_dual_grid(vertices, faces, grid_size=FINEST, aabb=BOX)
    assert int(coords.min()) > 1800
    on_device = convert.mesh_to_flexible_dual_grid(vertices.cuda(), faces.cuda(), grid_size=FINEST, aabb=BOX)
    assert torch.equal(on_device[0].cpu(), coords)
    assert torch.equal(on_device[2].cpu(), crossed)
    assert (on_device[1].cpu() - dual).abs().max() <= 1e-4 / FINEST * 10

    mesh = textured(vertices, faces)
    expected = as_table(convert.textured_mesh_to_volumetric_attr(mesh, grid_size=FINEST, aabb=BOX))
    found = as_table(convert.textured_mesh_to_volumetric_attr(mesh, grid_size=FINEST, aabb=BOX, device="cuda"))
    assert torch.equal(expected[0], coords)
    assert_same(found, expected)

    offsets = dual * FINEST - coords
    weights = torch.rand((len(coords), 1), generator=torch.Generator().manual_seed(0)) + 0.1
    for split, train in ((None, False), (weights, False), (weights, True)):
        given = [coords, offsets, crossed, split]
        host = convert.flexible_dual_grid_to_mesh(*given, aabb=BOX, grid_size=FINEST, train=train)
        given = [None if value is None else value.cuda() for value in given]
        back = convert.flexible_dual_grid_to_mesh(*given, aabb=BOX, grid_size=FINEST, train=train)
        assert len(host[1]) > 1000
        assert torch.equal(back[1].cpu(), host[1])
        assert (back[0].cpu() - host[0]).abs().max() <= 1e-6

    for mode in ("z_order", "hilbert"):
        for permute in ((0, 1, 2), (2, 0, 1), (1, 0, 2)):
            codes = serialize.encode_seq(coords, permute, mode)
            assert torch.equal(serialize.encode_seq(coords.cuda(), permute, mode).cpu(), codes)
            assert torch.equal(serialize.decode_seq(codes.cuda(), permute, mode).cpu(), coords)

    batched = torch.nn.functional.pad(coords, (1, 0))
    points = (coords[:1000] + 0.7)[None]
    shape = (1, 12, FINEST, FINEST, FINEST)
    on_host = VoxelField(expected[1].float(), batched, shape).sample(points)
    sampled = VoxelField(expected[1].float().cuda(), batched.cuda(), shape).sample(points.cuda())
    torch.testing.assert_close(sampled.cpu(), on_host, rtol=1e-5, atol=1e-3)


def test_a_whole_ball_in_the_finest_grid() -> None:
    """Sixteen million voxels: the surface is closed, and where it should be."""
    ball = trimesh.creation.icosphere(6, 0.49)
    vertices, faces = torch.tensor(ball.vertices).float().cuda(), torch.tensor(ball.faces).cuda()
    coords, dual, crossed = convert.mesh_to_flexible_dual_grid(vertices, faces, grid_size=FINEST, aabb=BOX)
    assert len(coords) > 10_000_000
    keys = (coords.long() * torch.tensor([FINEST**2, FINEST, 1], device="cuda")).sum(1)
    assert bool((keys.diff() > 0).all())
    assert ((dual - 0.5).norm(dim=1) - 0.49).abs().max() < 2 / FINEST
    _, triangles = convert.flexible_dual_grid_to_mesh(
        coords, dual * FINEST - coords, crossed, None, aabb=BOX, grid_size=FINEST
    )
    assert len(torch.unique(triangles)) - len(triangles) // 2 == 2  # Euler's number of a closed ball
    ball.visual = TextureVisuals(material=PBRMaterial(baseColorFactor=[10, 200, 30, 255]))
    also, values = convert.textured_mesh_to_volumetric_attr(ball, grid_size=FINEST, aabb=BOX, device="cuda")
    assert torch.equal(also, coords)
    assert torch.unique(values["base_color"], dim=0).tolist() == [[10, 200, 30]]


def test_gradients() -> None:
    vertices, faces = bowl()
    coords, dual, crossed = convert.mesh_to_flexible_dual_grid(vertices, faces, grid_size=40, aabb=BOX)
    results = []
    for device in ("cpu", "cuda"):
        offsets = (dual * 40 - coords).to(device).requires_grad_()
        weights = torch.linspace(0.5, 2, len(coords), device=device)[:, None].requires_grad_()
        with torch.enable_grad():
            made, _ = convert.flexible_dual_grid_to_mesh(
                coords.to(device), offsets, crossed.to(device), weights, aabb=BOX, grid_size=40, train=True
            )
            (made**2).sum().backward()
        assert offsets.grad is not None
        assert weights.grad is not None
        results.append((offsets.grad.cpu(), weights.grad.cpu()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_nothing_in_nothing_out() -> None:
    speck = trimesh.Trimesh(bowl()[0].numpy() * 0.001 + 0.06, bowl()[1].numpy(), process=False)
    coords, values = convert.textured_mesh_to_volumetric_attr(speck, grid_size=8, aabb=BOX, device="cuda")
    assert coords.shape == (0, 3)
    assert all(value.is_cuda and value.shape == (0, attributes.WIDTHS[name]) for name, value in values.items())
    vertices, faces = torch.tensor(speck.vertices).float().cuda(), torch.tensor(speck.faces).cuda()
    grid = convert.mesh_to_flexible_dual_grid(vertices, faces, grid_size=8, aabb=BOX)
    assert [value.shape for value in grid] == [(0, 3)] * 3
    made = convert.flexible_dual_grid_to_mesh(*grid, None, aabb=BOX, grid_size=8)
    assert [value.shape for value in made] == [(0, 3)] * 2
    codes = serialize.encode_seq(coords)
    assert codes.shape == (0,)
    assert serialize.decode_seq(codes).shape == (0, 3)
    with pytest.raises(ValueError, match="at least one triangle"):
        convert.mesh_to_flexible_dual_grid(vertices, faces[:0], grid_size=8, aabb=BOX)
