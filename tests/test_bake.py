from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from o_voxel.closest import closest_point
from o_voxel.raster import rasterize_uv
from torch import Tensor
from voxelise import Shape, bumpy_sphere, cube, surface_points, voxelise

from trellis2.bake import bake
from trellis2.errors import Cancelled, InputError
from trellis2.mesh import Asset, Mesh, TexturedMesh


def look_up(mesh: TexturedMesh, count: int = 100_000) -> tuple[Tensor, Tensor, Tensor]:
    """(points (P, 3), texture (P, 7), normals (P, 3)) at random places of the surface, filtered as viewers do."""
    face, weights = surface_points(mesh.vertices, mesh.faces, count)
    corners = mesh.faces[face].long()

    def between(values: Tensor) -> Tensor:
        return (values[corners] * weights[:, :, None]).sum(1)

    image = torch.cat([mesh.base_color, mesh.metallic_roughness], -1).permute(2, 0, 1)[None].float() / 255
    place = between(mesh.uvs)[None, None] * 2 - 1
    texture = torch.nn.functional.grid_sample(image, place, align_corners=False, padding_mode="border")
    return between(mesh.vertices), texture[0, :, 0].T, torch.nn.functional.normalize(between(mesh.normals), dim=1)


def psnr(shape: Shape, mesh: TexturedMesh) -> float:
    points, texture, _ = look_up(mesh)
    expected = shape.material(shape.project(points))
    return float(-10 * torch.log10(((texture[:, :3] - expected[:, :3]) ** 2).mean()))


def hausdorff(asset: Asset, mesh: TexturedMesh) -> float:
    """Greatest distance either way, in voxels."""
    points, _, _ = look_up(mesh)
    there = closest_point(asset.mesh.vertices, asset.mesh.faces, points).distance.max()
    back = closest_point(mesh.vertices, mesh.faces, asset.mesh.vertices).distance.max()
    return float(max(there, back)) / asset.material.voxel_size


def check_sound(mesh: TexturedMesh, texture_size: int) -> None:
    assert mesh.base_color.shape == (texture_size, texture_size, 4)
    assert mesh.metallic_roughness.shape == (texture_size, texture_size, 3)
    assert mesh.base_color.dtype == mesh.metallic_roughness.dtype == torch.uint8
    assert mesh.faces.dtype == torch.int32
    assert len(mesh.vertices) == len(mesh.normals) == len(mesh.uvs) == mesh.statistics.vertices
    assert len(mesh.faces) == mesh.statistics.faces
    assert int(mesh.faces.max()) == len(mesh.vertices) - 1
    assert (mesh.normals.norm(dim=1) - 1).abs().max() < 1e-5
    assert float(mesh.uvs.min()) >= 0
    assert float(mesh.uvs.max()) <= 1
    assert mesh.statistics.texture_coverage == 1.0
    # Of faces that overlap in the texture, the first wins: numbered backwards, each texel must name the same.
    face_id, weights = rasterize_uv(mesh.uvs, mesh.faces, texture_size)
    held = (face_id >= 0) & (weights > 0).all(-1)
    backwards = len(mesh.faces) - 1 - rasterize_uv(mesh.uvs, mesh.faces.flip(0), texture_size)[0]
    assert torch.equal(face_id[held], backwards[held])


def test_cube_stays_a_cube() -> None:
    shape = cube(128)
    asset = voxelise(shape, 128)
    mesh = bake(asset, decimation_target=2000, texture_size=1024)
    check_sound(mesh, 1024)
    assert 12 <= len(mesh.faces) <= 2000
    assert mesh.statistics.charts == 6
    assert mesh.alpha_mode == "OPAQUE"
    assert psnr(shape, mesh) >= 35
    assert hausdorff(asset, mesh) <= 0.1
    points, texture, normals = look_up(mesh)
    # Flat faces, sharp edges: each normal is that of its face, pointing outwards.
    axis = points.abs().argmax(dim=1)
    outwards = torch.nn.functional.one_hot(axis, 3) * points.sign()
    clear = points.abs().sort(dim=1).values.diff(dim=1)[:, 1] > 1 / 128
    assert ((normals * outwards).sum(1)[clear] > 0.999).all()
    expected = shape.material(points)
    assert (texture[:, 5] - expected[:, 4])[clear].abs().mean() < 0.01
    assert (texture[:, 6] - expected[:, 3])[clear].abs().mean() < 0.01
    assert (mesh.base_color[..., 3] == 255).all()
    assert (mesh.metallic_roughness[..., 0] == 0).all()


def test_sphere_is_smooth() -> None:
    shape = bumpy_sphere()
    asset = voxelise(shape, 128)
    mesh = bake(asset, decimation_target=20_000, texture_size=1024)
    check_sound(mesh, 1024)
    assert 19_000 <= len(mesh.faces) <= 20_000
    assert psnr(shape, mesh) >= 35
    assert hausdorff(asset, mesh) <= 0.5
    points, _, normals = look_up(mesh)
    assert ((torch.nn.functional.normalize(points, dim=1) * normals).sum(1) > 0.7).all()
    # Smooth everywhere: vertices are split along UV seams only, so that all copies agree.
    _, place = torch.unique(mesh.vertices, dim=0, return_inverse=True)
    mean = torch.zeros(int(place.max()) + 1, 3).index_add_(0, place, mesh.normals)
    assert ((torch.nn.functional.normalize(mean, dim=1)[place] * mesh.normals).sum(1) > 0.99).float().mean() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cube", "sphere"])
def test_quality_at_100k_faces(name: str) -> None:
    shape = cube(256) if name == "cube" else bumpy_sphere()
    asset = voxelise(shape, 256)
    mesh = bake(asset, decimation_target=100_000, texture_size=2048)
    check_sound(mesh, 2048)
    assert 99_000 <= len(mesh.faces) <= 100_000
    assert psnr(shape, mesh) >= 35
    assert hausdorff(asset, mesh) <= 1.5


def test_same_asset_same_bytes_and_targets_obeyed() -> None:
    asset = voxelise(bumpy_sphere(), 48)
    for target, size in ((500, 64), (3000, 300)):
        first, second = (bake(asset, decimation_target=target, texture_size=size) for _ in range(2))
        check_sound(first, size)
        assert len(first.faces) <= target
        for name in ("vertices", "faces", "normals", "uvs", "base_color", "metallic_roughness"):
            assert torch.equal(getattr(first, name), getattr(second, name))


def test_holes_are_closed_and_windings_unified() -> None:
    asset = voxelise(bumpy_sphere(), 128)
    generator = torch.Generator().manual_seed(0)
    kept = asset.mesh.faces[torch.arange(len(asset.mesh.faces)) % 499 != 7]
    flip = torch.rand(len(kept), generator=generator) < 0.3
    mixed = torch.where(flip[:, None], kept[:, [0, 2, 1]], kept)
    holey = replace(asset, mesh=Mesh(asset.mesh.vertices, mixed))
    mesh = bake(holey, decimation_target=4000, texture_size=128)
    _, place = torch.unique(mesh.vertices, dim=0, return_inverse=True)
    edges = {tuple(e) for e in place[mesh.faces[:, [0, 1, 1, 2, 2, 0]].long()].reshape(-1, 2).tolist()}
    assert {(b, a) for a, b in edges} == edges
    a, b, c = mesh.vertices[mesh.faces.long()].unbind(1)
    assert (a * torch.linalg.cross(b, c)).sum() > 0


def test_material_is_found_where_no_voxel_is_near() -> None:
    asset = voxelise(bumpy_sphere(), 48)
    half = asset.material.coords[:, 0] < 24
    material = replace(asset.material, coords=asset.material.coords[half], attrs=asset.material.attrs[half])
    mesh = bake(replace(asset, material=material), decimation_target=2000, texture_size=256)
    assert mesh.statistics.texture_coverage == 1.0
    _, texture, _ = look_up(mesh, 5000)
    assert (texture[:, :3].amax(1) > 0.1).all()


def with_alpha(asset: Asset, alpha: Tensor) -> Asset:
    attrs = asset.material.attrs.clone()
    attrs[:, 5] = alpha
    return replace(asset, material=replace(asset.material, attrs=attrs))


def test_alpha_mode() -> None:
    asset = voxelise(bumpy_sphere(), 40)
    coords = asset.material.coords
    generator = torch.Generator().manual_seed(0)
    one = torch.ones(len(coords))
    stray = torch.where(torch.rand(len(coords), generator=generator) < 0.02, 0.1, 0.99)
    window = torch.where(coords[:, 2] > 25, 0.0, 1.0)
    glass = torch.where(coords[:, 2] > 25, 0.4, 1.0)

    def baked(alpha: Tensor, mode: str = "auto") -> TexturedMesh:
        return bake(with_alpha(asset, alpha), decimation_target=2000, texture_size=256, alpha_mode=mode)

    assert baked(one).alpha_mode == "OPAQUE"
    cleaned = baked(stray)
    assert cleaned.alpha_mode == "OPAQUE"
    assert (cleaned.base_color[..., 3] == 255).all()
    cut = baked(window)
    assert cut.alpha_mode == "MASK"
    points, texture, _ = look_up(cut, 20_000)
    height = (points[:, 2] + 0.5) * 40
    assert (texture[height > 27, 3] < 0.1).all()
    assert (texture[height < 24, 3] > 0.999).all()
    see_through = baked(glass)
    assert see_through.alpha_mode == "BLEND"
    points, texture, _ = look_up(see_through, 20_000)
    assert (texture[(points[:, 2] + 0.5) * 40 > 27, 3] - 0.4).abs().max() < 0.01
    assert baked(glass, "mask").alpha_mode == "MASK"
    assert baked(one, "blend").alpha_mode == "BLEND"
    forced = baked(glass, "opaque")
    assert forced.alpha_mode == "OPAQUE"
    assert (forced.base_color[..., 3] == 255).all()


def test_progress_and_cancel() -> None:
    asset = voxelise(bumpy_sphere(), 32)
    seen: list[tuple[int, int]] = []
    bake(asset, decimation_target=500, texture_size=1024, on_step=lambda step, steps: seen.append((step, steps)))
    done, totals = zip(*seen, strict=True)
    assert len(set(totals)) == 1
    assert list(done) == list(range(totals[0] + 1))

    def stop(step: int, steps: int) -> None:
        if step == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        bake(asset, decimation_target=500, texture_size=64, on_step=stop)


def test_a_few_loose_faces_are_an_asset_too() -> None:
    asset = voxelise(bumpy_sphere(), 32)
    few = replace(asset, mesh=Mesh(asset.mesh.vertices, asset.mesh.faces[::400]))
    mesh = bake(few, decimation_target=1000, texture_size=64)
    assert len(mesh.faces) >= len(few.mesh.faces)
    check_sound(mesh, 64)


def test_bad_input() -> None:
    asset = voxelise(bumpy_sphere(), 24)
    empty = replace(asset, mesh=Mesh(asset.mesh.vertices, asset.mesh.faces[:0]))
    with pytest.raises(InputError, match="empty surface: try another seed or picture"):
        bake(empty, decimation_target=100, texture_size=64)
    point = replace(asset, mesh=Mesh(asset.mesh.vertices, torch.zeros((5, 3), dtype=torch.int32)))
    with pytest.raises(InputError, match="empty surface"):
        bake(point, decimation_target=100, texture_size=64)
    with pytest.raises(InputError, match="decimation_target=0"):
        bake(asset, decimation_target=0, texture_size=64)
    with pytest.raises(InputError, match="texture_size=0"):
        bake(asset, decimation_target=100, texture_size=0)
    with pytest.raises(InputError, match="alpha_mode='dither'"):
        bake(asset, decimation_target=100, texture_size=64, alpha_mode="dither")
