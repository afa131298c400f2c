"""What runs on a GPU gives what the CPU gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from o_voxel.closest import closest_point
from o_voxel.conv import SEGMENT, plan_conv, submanifold_conv3d, submanifold_conv3d_reference
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
from trellis2.layers import LayerNorm32, RMSNorm, add_and_norm, linear_gelu, normed_heads, rotary_phases
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
    empty = torch.zeros(0, 4, dtype=torch.int32, device="cuda")
    assert neighbor_map(empty).shape == (27, 0)
    out = submanifold_conv3d(empty[:, :2].float(), plan_conv(empty), *kernel(2, 3, torch.float32))
    assert out.shape == (0, 3)


def kernel(channels: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels)
    weight = torch.randn(outputs, 3, 3, 3, channels, generator=generator) / (27 * channels) ** 0.5
    return weight.to("cuda", dtype), torch.randn(outputs, generator=generator).to("cuda", dtype)


@pytest.mark.parametrize(
    ("channels", "outputs", "dtype"),
    [
        (6, 7, torch.float32),
        (64, 128, torch.float32),
        (6, 7, torch.float16),
        (64, 64, torch.float16),
        (128, 512, torch.float16),
        (1024, 1024, torch.float16),
        (96, 32, torch.bfloat16),
    ],
)
def test_convolution(asset: Asset, channels: int, outputs: int, dtype: torch.dtype) -> None:
    coords = batched(asset.material.coords).cuda()
    generator = torch.Generator().manual_seed(1)
    feats = torch.randn(len(coords), channels, generator=generator).to("cuda", dtype)
    weight, bias = kernel(channels, outputs, dtype)
    plan, neighbors = plan_conv(coords), neighbor_map(coords)
    out = submanifold_conv3d(feats, plan, weight, bias)
    some = torch.randperm(len(coords), generator=generator)[:500].cuda()
    wide = (feats.double(), neighbors[:, some], weight.double(), bias.double())
    expected = submanifold_conv3d_reference(*wide)
    plain = submanifold_conv3d_reference(feats, neighbors[:, some], weight, bias)
    error, plain_error = (float((x[:500].double() - expected).norm() / expected.norm()) for x in (out[some], plain))
    assert error <= max(2 * plain_error, 1e-6)
    assert torch.equal(out, submanifold_conv3d(feats, plan, weight, bias))


@torch.enable_grad()
def test_gradients_of_the_convolution() -> None:
    coords = batched((torch.rand(9, 9, 9, generator=torch.Generator().manual_seed(5)) < 0.4).nonzero())
    feats = torch.randn(len(coords), 6, generator=torch.Generator().manual_seed(6))
    weight, bias = (x.cpu() for x in kernel(6, 7, torch.float32))
    wanted = torch.randn(len(coords), 7, generator=torch.Generator().manual_seed(7))
    gradients = []
    for device in ("cpu", "cuda"):
        leaves = [x.detach().to(device).requires_grad_() for x in (feats, weight, bias)]
        out = submanifold_conv3d(leaves[0], plan_conv(coords.to(device)), *leaves[1:])
        gradients.append(torch.autograd.grad(out, leaves, wanted.to(device)))
    for ours, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_convolution_in_parts() -> None:
    n = 64
    coords = torch.cartesian_prod(torch.zeros(1), *[torch.arange(float(n))] * 3).int().cuda()
    coords = coords[torch.randperm(len(coords), generator=torch.Generator().manual_seed(3)).cuda()]
    assert len(coords) == 2 * SEGMENT
    feats = torch.randn(len(coords), 16, generator=torch.Generator().manual_seed(4)).cuda().half()
    weight, bias = kernel(16, 32, torch.float16)
    plan = plan_conv(coords)
    whole = submanifold_conv3d(feats, plan, weight, bias)
    for first in (0, SEGMENT):
        part = submanifold_conv3d(feats, plan, weight, bias, first, first + SEGMENT)
        assert torch.equal(part, whole[first : first + SEGMENT])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_in_one_kernel(dtype: torch.dtype) -> None:
    """No worse than plain torch, which rounds between its steps, against float64."""
    generator = torch.Generator().manual_seed(8)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def check(body: Callable[..., Tensor], *inputs: Tensor) -> None:
        exact = body(*(x.double() for x in inputs))
        plain, ours = body(*inputs), body(*(x.cuda() for x in inputs)).cpu()
        assert ours.dtype == plain.dtype
        assert ours.shape == plain.shape
        error, plain_error = (float((x.double() - exact).norm() / exact.norm()) for x in (ours, plain))
        assert error <= max(1.01 * plain_error, 1e-6)

    for channels in (24, 1536):
        norm, affine = LayerNorm32(channels, elementwise_affine=False), LayerNorm32(channels)
        torch.nn.init.normal_(affine.weight, generator=generator)
        torch.nn.init.normal_(affine.bias, generator=generator)

        def with_weights(x: Tensor, norm: LayerNorm32 = affine) -> Tensor:
            return norm.to(x.device, torch.float32)(x)

        check(norm, random(5, channels))
        check(norm, random(1, channels, 3, 5).permute(0, 2, 3, 1))
        check(norm, random(4, 2 * channels)[:, :channels])
        check(with_weights, random(5, channels))
        for rows in (1, 5):
            scale, shift = random(rows, 6 * channels).chunk(6, dim=1)[1:3]
            check(norm.modulated, random(5, channels), scale, shift)

        def added(part: int, norm: LayerNorm32, x: Tensor, *rest: Tensor) -> Tensor:
            return add_and_norm(x, rest[0], norm.to(x.device), *rest[1:])[part]

        for part, rows in product((0, 1), (1, 5)):
            gate, scale, shift = random(rows, 6 * channels).chunk(6, dim=1)[1:4]
            check(partial(added, part, affine), random(5, channels), random(rows, channels))
            check(partial(added, part, affine), random(5, channels), random(5, channels), gate)
            check(partial(added, part, norm), random(5, channels), random(5, channels), gate, scale, shift)

    for heads, size in ((2, 12), (12, 128)):
        norms = (RMSNorm(heads, size), RMSNorm(heads, size))
        for rms in norms:
            torch.nn.init.normal_(rms.gamma, generator=generator)
        turns = rotary_phases(torch.randint(0, 64, (5, 3), generator=generator), size, (1.0, 10000.0))

        def turned(x: Tensor, part: int, norms: tuple[RMSNorm, ...] = norms, turns: Tensor = turns) -> Tensor:
            return normed_heads(x.clone(), [n.to(x.device) for n in norms], turns.to(x.device))[part]

        for part in range(3):
            check(partial(turned, part=part), random(5, 3, heads, size))
        check(lambda x, n=norms[0]: normed_heads(x.clone(), [n.to(x.device)])[0], random(5, 2, heads, size))

    linear = torch.nn.Linear(48, 96)
    torch.nn.init.normal_(linear.weight, generator=generator)
    check(lambda x: linear_gelu(linear.to(x.device, x.dtype), x), random(40, 48))


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
    # Texels are of one size everywhere, so their mean is the surface's, whatever the layout.
    covered = [rasterize_uv(mesh.uvs, mesh.faces, 256)[0] >= 0 for mesh in (baked, expected)]
    colours = [
        mesh.base_color[inside].cpu().float().mean(dim=0)
        for mesh, inside in zip((baked, expected), covered, strict=True)
    ]
    torch.testing.assert_close(colours[0], colours[1], atol=2.0, rtol=0)


def test_render(asset: Asset) -> None:
    camera = turntable_camera(1, 8)
    expected = render(asset, camera, "studio", resolution=96)
    found = render(on_gpu(asset), camera, "studio", resolution=96)
    for name, picture in expected.items():
        assert (found[name].cpu() - picture).abs().mean() * 255 <= 0.5, name
    frames = [np.stack(list(turntable(a, frames=2, resolution=96))) for a in (asset, on_gpu(asset))]
    assert np.abs(frames[0].astype(int) - frames[1]).mean() <= 0.5
