"""What runs on a GPU gives what the CPU gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from o_voxel.closest import closest_point
from o_voxel.conv import submanifold_conv3d
from o_voxel.dual_grid import flexible_dual_grid_to_mesh
from o_voxel.fill import fill_gaps
from o_voxel.lookup import neighbor_map, voxel_rows
from o_voxel.raster import rasterize_uv
from o_voxel.rays import RayMesh
from o_voxel.repair import fill_holes, unify_face_orientations
from o_voxel.sample import grid_sample_3d
from torch import Tensor
from voxelise import bumpy_sphere, voxelise

from trellis2.bake import bake
from trellis2.mesh import Asset, MaterialVoxels, Mesh
from trellis2.render import render, turntable, turntable_camera

pytestmark = pytest.mark.gpu

RESOLUTION = 64


@pytest.fixture(scope="module")
def asset() -> Asset:
    return voxelise(bumpy_sphere(), RESOLUTION)


def on_gpu(asset: Asset) -> Asset:
    material: MaterialVoxels = replace(
        asset.material, coords=asset.material.coords.cuda(), attrs=asset.material.attrs.cuda()
    )
    return Asset(Mesh(asset.mesh.vertices.cuda(), asset.mesh.faces.cuda()), material)


def batched(coords: Tensor) -> Tensor:
    return torch.nn.functional.pad(coords.int(), (1, 0))


def test_lookup_and_convolution(asset: Asset) -> None:
    coords = batched(asset.material.coords)
    neighbors = neighbor_map(coords)
    assert torch.equal(neighbor_map(coords.cuda()).cpu(), neighbors)
    queries = coords + torch.tensor([0, 1, 0, -1], dtype=torch.int32)
    assert torch.equal(voxel_rows(coords.cuda(), queries.cuda()).cpu(), voxel_rows(coords, queries))
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(7, 3, 3, 3, 6, generator=generator), torch.randn(7, generator=generator)
    arguments = (asset.material.attrs, neighbors, weight, bias)
    expected = submanifold_conv3d(*(a.double() if a.is_floating_point() else a for a in arguments))
    out = submanifold_conv3d(*(a.cuda() for a in arguments)).cpu()
    assert (out - expected).norm() <= 1e-3 * expected.norm()  # TF32 may be on


def test_dual_grid() -> None:
    generator = torch.Generator().manual_seed(1)
    coords = (torch.rand(9, 9, 9, generator=generator) < 0.6).nonzero().int()
    fields = (
        torch.rand(len(coords), 3, generator=generator),
        torch.rand(len(coords), 3, generator=generator) < 0.5,
        torch.rand(len(coords), 1, generator=generator) + 0.1,
    )
    box = [[-0.5, -0.5, -0.5], [0.5, 0.5, 0.5]]
    vertices, faces = flexible_dual_grid_to_mesh(coords, *fields, box, grid_size=9)
    ours = flexible_dual_grid_to_mesh(coords.cuda(), *(f.cuda() for f in fields), box, grid_size=9)
    torch.testing.assert_close(ours[0].cpu(), vertices)
    assert torch.equal(ours[1].cpu(), faces)


def test_sampling_and_closest_points(asset: Asset) -> None:
    generator = torch.Generator().manual_seed(2)
    points = torch.rand(5000, 3, generator=generator) * 1.2 - 0.6
    grid = ((points + 0.5) * RESOLUTION)[None]
    shape = (1, 6, *[RESOLUTION] * 3)
    arguments = (asset.material.attrs, batched(asset.material.coords))
    for mode in ("trilinear", "nearest"):
        expected = grid_sample_3d(*arguments, shape, grid, mode)
        out = grid_sample_3d(*(a.cuda() for a in arguments), shape, grid.cuda(), mode)
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-4, atol=1e-5)
    mesh = asset.mesh
    expected_points = closest_point(mesh.vertices, mesh.faces, points)
    found = closest_point(mesh.vertices.cuda(), mesh.faces.cuda(), points.cuda())
    torch.testing.assert_close(found.distance.cpu(), expected_points.distance, rtol=1e-4, atol=1e-6)


def test_rays(asset: Asset) -> None:
    mesh = asset.mesh
    generator = torch.Generator().manual_seed(3)
    directions = torch.nn.functional.normalize(torch.randn(5000, 3, generator=generator), dim=1)
    origins = -2 * directions + torch.rand(5000, 3, generator=generator) * 0.2
    expected = RayMesh(mesh.vertices, mesh.faces).first_hits(origins, directions)
    found = RayMesh(mesh.vertices.cuda(), mesh.faces.cuda()).first_hits(origins.cuda(), directions.cuda())
    same = found.faces.cpu() == expected.faces
    assert same.float().mean() > 0.999  # rays through an edge may take either side
    torch.testing.assert_close(found.t.cpu()[same], expected.t[same], rtol=1e-4, atol=1e-5)


def test_raster_and_gaps() -> None:
    generator = torch.Generator().manual_seed(4)
    uvs = torch.rand(300, 2, generator=generator)
    faces = torch.arange(300).view(100, 3).int()
    expected = rasterize_uv(uvs, faces, 128)
    found = rasterize_uv(uvs.cuda(), faces.cuda(), 128)
    assert torch.equal(found[0].cpu(), expected[0])
    torch.testing.assert_close(found[1].cpu(), expected[1], rtol=1e-3, atol=1e-4)
    mask = torch.rand(64, 64, generator=generator) < 0.1
    image = torch.randint(0, 255, (64, 64, 3), generator=generator, dtype=torch.uint8)
    assert torch.equal(fill_gaps(image.cuda(), mask.cuda()).cpu(), fill_gaps(image, mask))


def test_repair(asset: Asset) -> None:
    kept = asset.mesh.faces[torch.arange(len(asset.mesh.faces)) % 499 != 7]
    for op in (lambda v, f: fill_holes(v, f, 0.3), unify_face_orientations):
        expected = op(asset.mesh.vertices, kept)
        found = op(asset.mesh.vertices.cuda(), kept.cuda())
        assert found[0].is_cuda
        torch.testing.assert_close(found[0].cpu(), expected[0])
        assert torch.equal(found[1].cpu(), expected[1])


def test_bake(asset: Asset) -> None:
    expected = bake(asset, decimation_target=3000, texture_size=256)
    baked = bake(on_gpu(asset), decimation_target=3000, texture_size=256)
    again = bake(on_gpu(asset), decimation_target=3000, texture_size=256)
    assert baked.statistics.texture_coverage == 1.0
    assert abs(baked.statistics.faces - expected.statistics.faces) <= 30
    for name in ("vertices", "faces", "uvs", "normals", "base_color", "metallic_roughness"):
        assert torch.equal(getattr(baked, name), getattr(again, name)), name
    colours = [mesh.base_color.cpu().float().mean(dim=(0, 1)) for mesh in (baked, expected)]
    torch.testing.assert_close(colours[0], colours[1], atol=2.0, rtol=0)


def test_render(asset: Asset) -> None:
    camera = turntable_camera(1, 8)
    expected = render(asset, camera, "studio", resolution=96)
    found = render(on_gpu(asset), camera, "studio", resolution=96)
    for name, picture in expected.items():
        assert (found[name].cpu() - picture).abs().mean() * 255 <= 0.5, name
    frames = [np.stack(list(turntable(a, frames=2, resolution=96))) for a in (asset, on_gpu(asset))]
    assert np.abs(frames[0].astype(int) - frames[1]).mean() <= 0.5
