"""Meshes to flexible dual grids."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import golden_cases, load_golden, under
from o_voxel import attributes, convert
from o_voxel._native import Native
from o_voxel.build import build
from o_voxel.closest import closest_point
from o_voxel.dual_grid import flexible_dual_grid_to_mesh
from o_voxel.voxelize import dual_grid_compiled, dual_grid_reference, make_grid, mesh_to_flexible_dual_grid
from surfaces import BOX, bowl, textured_bowl
from torch import Tensor
from voxelise import surface_points

CUBE_FACES = [[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1], [2, 3, 7], [2, 7, 6], [0, 2, 6],
              [0, 6, 4], [1, 5, 7], [1, 7, 3]]  # fmt: skip


def cube(half: float = 0.31) -> tuple[Tensor, Tensor]:
    corners = torch.tensor([[i & 4, i & 2, i & 1] for i in range(8)]).bool()
    return torch.where(corners, half, -half), torch.tensor(CUBE_FACES)


def square(z: float = 0.01, half: float = 0.3) -> tuple[Tensor, Tensor]:
    # Not quite a square, so that its diagonal meets no corner of the grid.
    vertices = torch.tensor([[-half, -half, z], [half, -half, z], [half, 1.01 * half, z], [-half, half, z]])
    return vertices, torch.tensor([[0, 1, 2], [0, 2, 3]])


def fins() -> tuple[Tensor, Tensor]:
    """Three sheets that meet in one edge."""
    along = torch.tensor([0.31, 0.2, 0.25])
    start = torch.tensor([-0.2, -0.1, -0.15])
    tips = [torch.tensor(t) for t in ([-0.1, 0.3, -0.05], [0.21, -0.2, 0.1], [-0.25, -0.1, 0.3])]
    return torch.stack([start, along, *tips]), torch.tensor([[0, 1, 2], [0, 1, 3], [0, 1, 4]])


def back_to_mesh(grid: tuple[Tensor, Tensor, Tensor], resolution: int) -> tuple[Tensor, Tensor]:
    coords, dual_vertices, intersected = grid
    offsets = dual_vertices * resolution - coords
    return flexible_dual_grid_to_mesh(coords, offsets, intersected, None, BOX, grid_size=resolution)


@pytest.mark.parametrize("path", golden_cases("mesh_to_fdg"))
def test_equals_the_original(path: Path) -> None:
    meta, tensors = load_golden(path)
    names = {name.split(".")[0] for name in tensors if name.endswith(".vertices")}
    assert names
    for name in names:
        case = under(tensors, f"{name}.")
        sizes = {key: meta[key] for key in ("grid_size", "voxel_size") if key in meta}
        coords, dual_vertices, intersected = mesh_to_flexible_dual_grid(
            case["vertices"], case["faces"], aabb=meta["aabb"], **sizes, **meta["kwargs"]
        )
        assert (coords.dtype, dual_vertices.dtype, intersected.dtype) == (torch.int32, torch.float32, torch.bool)
        order = np.lexsort(case["coords"].numpy().T[::-1])
        torch.testing.assert_close(coords, case["coords"][order], rtol=0, atol=0)
        assert torch.equal(intersected, case["intersected"][order])
        extent = torch.tensor(meta["aabb"][1]) - torch.tensor(meta["aabb"][0])
        voxel = extent / torch.tensor(meta["grid_size"])
        error = ((dual_vertices - case["dual_vertices"][order]) / voxel).abs().max()
        assert error <= meta["tol"]["max_abs_offset"]


def test_a_flat_square_by_hand() -> None:
    coords, dual_vertices, intersected = mesh_to_flexible_dual_grid(*square(z=0.1, half=0.3), grid_size=4, aabb=BOX)
    # Lines of the grid at -0.25, 0, 0.25 in x and y; the plane is 0.1 above 0, in the third layer of voxels.
    assert coords.tolist() == [[x, y, 2] for x in range(4) for y in range(4)]
    assert intersected.tolist() == [[False, False, x < 3 and y < 3] for x in range(4) for y in range(4)]
    assert torch.allclose(dual_vertices[:, 2], torch.tensor(0.6), atol=1e-6)
    inner = (coords[:, :2] > 0).all(dim=1) & (coords[:, :2] < 3).all(dim=1)
    assert torch.allclose(dual_vertices[inner, :2], (coords[inner, :2] + 0.5) / 4, atol=1e-6)


def test_a_sharp_corner_is_kept() -> None:
    coords, dual_vertices, _ = mesh_to_flexible_dual_grid(*cube(0.31), grid_size=16, aabb=BOX, regularization_weight=0)
    corner = (dual_vertices - 0.5).abs().amin(dim=1) > 0.3
    assert int(corner.sum()) == 8
    assert torch.allclose((dual_vertices[corner] - 0.5).abs(), torch.tensor(0.31), atol=1e-4)
    assert ((dual_vertices * 16 - coords) >= -1e-5).all()
    assert ((dual_vertices * 16 - coords) <= 1 + 1e-5).all()


def test_borders_pull_vertices_to_them() -> None:
    mesh = square(z=0.01, half=0.3)
    rim = []
    for weight in (0.0, 10.0):
        coords, dual_vertices, _ = mesh_to_flexible_dual_grid(*mesh, grid_size=16, aabb=BOX, boundary_weight=weight)
        outer = (coords[:, 0] == coords[:, 0].max()) & (coords[:, 1] == 8)
        rim.append(float(dual_vertices[outer, 0] - 0.5))
    assert abs(rim[1] - 0.3) < 1e-3 < abs(rim[0] - 0.3)


def test_face_weight_counts() -> None:
    """The plane of a roof's other side, whose triangles cross no edge of the voxel, pulls by its weight."""
    vertices, faces = cube(0.31)
    results = [mesh_to_flexible_dual_grid(vertices, faces, grid_size=16, aabb=BOX, face_weight=w) for w in (0, 1, 50)]
    assert all(torch.equal(coords, results[0][0]) for coords, _, _ in results)
    sharp = [float(((d - 0.5).abs() - 0.31).abs().amin(dim=1).max()) for _, d, _ in results]
    assert not torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[1][1], results[2][1])
    assert sharp[2] <= sharp[0]


@pytest.mark.parametrize("shape", [cube, square, bowl, fins])
@pytest.mark.parametrize("resolution", [24, 64])
def test_there_and_back(shape: object, resolution: int) -> None:
    assert callable(shape)
    vertices, faces = shape()
    again, triangles = back_to_mesh(
        mesh_to_flexible_dual_grid(vertices, faces, grid_size=resolution, aabb=BOX), resolution
    )
    face, weights = surface_points(vertices, faces, 20_000)
    points = (vertices[faces[face]] * weights[:, :, None]).sum(dim=1)
    distance = closest_point(again, triangles, points).distance
    assert float((distance <= 1 / resolution).float().mean()) >= 0.999
    face, weights = surface_points(again, triangles, 20_000)
    points = (again[triangles[face].long()] * weights[:, :, None]).sum(dim=1)
    assert float(closest_point(vertices, faces.int(), points).distance.max()) <= 1.5 / resolution


def test_slabs_of_a_mesh_beyond_the_box_are_cut_off() -> None:
    vertices, faces = bowl()
    whole = mesh_to_flexible_dual_grid(vertices, faces, grid_size=32, aabb=BOX)
    lower = mesh_to_flexible_dual_grid(vertices, faces, voxel_size=1 / 32, aabb=[[-0.5] * 3, [0.5, 0.5, 0.0]])
    kept = whole[0][:, 2] < 15
    below = lower[0][:, 2] < 15
    assert 0 < int(kept.sum()) < len(kept)
    assert torch.equal(whole[0][kept], lower[0][below])
    assert torch.equal(whole[2][kept], lower[2][below])
    torch.testing.assert_close(whole[1][kept], lower[1][below], rtol=0, atol=1e-6)


def test_far_vertices_take_no_time() -> None:
    vertices = torch.tensor([[-1e6, 0.01, 0.02], [1e6, 0.01, 0.02], [0.0, 1e6, 0.02]])
    coords, dual_vertices, _ = mesh_to_flexible_dual_grid(vertices, torch.tensor([[0, 1, 2]]), grid_size=8, aabb=BOX)
    assert len(coords)
    assert bool(dual_vertices.isfinite().all())
    with pytest.raises(ValueError, match="within 16777216 voxels"):
        mesh_to_flexible_dual_grid(vertices * 1e24, torch.tensor([[0, 1, 2]]), grid_size=8, aabb=BOX)


def test_the_box_of_its_own() -> None:
    vertices, faces = cube(0.3)
    coords, dual_vertices, _ = mesh_to_flexible_dual_grid(vertices, faces, grid_size=13)
    assert coords.min() == 0
    assert coords.max() == 12
    # A margin of half a voxel on every side: 0.6 are 12 voxels of 0.05.
    assert torch.allclose(dual_vertices.amin(dim=0), torch.tensor(0.025), atol=1e-3)
    by_size = mesh_to_flexible_dual_grid(vertices, faces, voxel_size=0.07)
    assert by_size[0].max() == 8  # 0.6 / 0.07 = 8.6, so 9 voxels
    flat, triangles = square()
    with pytest.raises(ValueError, match="flat"):
        mesh_to_flexible_dual_grid(flat, triangles, grid_size=8)


def test_voxels_that_are_no_cubes() -> None:
    vertices, faces = bowl()
    size = [1 / 20, 1 / 30, 1 / 40]
    coords, dual_vertices, intersected = mesh_to_flexible_dual_grid(vertices, faces, voxel_size=size, aabb=BOX)
    same = mesh_to_flexible_dual_grid(vertices, faces, grid_size=[20, 30, 40], aabb=np.array(BOX))
    assert torch.equal(coords, same[0])
    offsets = dual_vertices / torch.tensor(size) - coords
    assert offsets.min() >= -1e-4
    assert offsets.max() <= 1 + 1e-4
    again, _ = flexible_dual_grid_to_mesh(coords, offsets, intersected, None, BOX, grid_size=[20, 30, 40])
    assert float(closest_point(vertices, faces.int(), again).distance.max()) <= 1 / 20


def test_faces_without_an_area_count_for_nothing() -> None:
    vertices, faces = cube()
    extra = torch.cat([faces, torch.tensor([[0, 0, 1], [5, 5, 5]])])
    whole, more = (mesh_to_flexible_dual_grid(vertices, f, grid_size=16, aabb=BOX) for f in (faces, extra))
    assert all(torch.equal(a, b) for a, b in zip(whole, more, strict=True))


def test_the_same_input_gives_the_same_bytes() -> None:
    vertices, faces = bowl()
    first, second = (mesh_to_flexible_dual_grid(vertices, faces, grid_size=40, aabb=BOX) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    keys = first[0].long() @ torch.tensor([1600, 40, 1])
    assert (keys.diff() > 0).all()


def test_a_mesh_within_one_voxel_has_none() -> None:
    vertices, faces = cube(0.01)
    coords, dual_vertices, intersected = mesh_to_flexible_dual_grid(vertices + 0.06, faces, grid_size=8, aabb=BOX)
    assert coords.shape == dual_vertices.shape == intersected.shape == (0, 3)


def test_the_names_of_the_original() -> None:
    names = ("blender_dump_to_volumetric_attr", "flexible_dual_grid_to_mesh", "textured_mesh_to_volumetric_attr")
    assert set(convert.__all__) == {*names, "mesh_to_flexible_dual_grid"}
    assert convert.mesh_to_flexible_dual_grid is mesh_to_flexible_dual_grid


def test_timing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    mesh_to_flexible_dual_grid(*cube(), grid_size=8, aabb=BOX, timing=True)
    assert capsys.readouterr().out.startswith("mesh_to_flexible_dual_grid took 0.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vertices": torch.full((8, 3), math.nan)}, "vertices must be finite"),
        ({"vertices": torch.full((8, 3), math.inf)}, "vertices must be finite"),
        ({"vertices": torch.zeros(8, 2)}, "vertices must be floats of shape"),
        ({"vertices": torch.zeros(8, 3)}, "all are degenerate"),
        ({"vertices": cube()[0] + 5}, "every triangle lies outside"),
        ({"faces": torch.zeros((0, 3), dtype=torch.int32)}, "at least one triangle"),
        ({"faces": torch.tensor([[0, 1, 8]])}, "indices from 0 to 7"),
        ({"faces": torch.tensor([[0, 1, -1]])}, "indices from 0 to 7"),
        ({"faces": torch.tensor([[0, 1, 2, 3]])}, "faces must be integers of shape"),
        ({"faces": torch.tensor([[0, 0, 1]])}, "all are degenerate"),
        ({"grid_size": None}, "voxel_size or grid_size must be given"),
        ({"grid_size": 0}, "grid_size=0 must be"),
        ({"grid_size": 2.5}, "whole numbers"),
        ({"grid_size": [4, 4]}, "one or three"),
        ({"grid_size": 1 << 21}, "must have 1 to 1048576"),
        ({"grid_size": None, "voxel_size": -1.0}, "voxel_size=-1.0 must be"),
        ({"grid_size": None, "voxel_size": math.nan}, "voxel_size=nan must be"),
        ({"grid_size": None, "voxel_size": 1e-12}, "must have 1 to 1048576"),
        ({"aabb": [[0, 0, 0], [1, 1, 0]]}, "second greater along every axis"),
        ({"aabb": [0, 1]}, r"aabb must have shape \(2, 3\)"),
        ({"face_weight": -1.0}, "face_weight=-1.0"),
        ({"boundary_weight": math.nan}, "boundary_weight=nan"),
        ({"regularization_weight": math.inf}, "regularization_weight=inf"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    vertices, faces = cube()
    arguments = {"vertices": vertices, "faces": faces, "grid_size": 8, "aabb": BOX, **change}
    with pytest.raises(ValueError, match=message):
        mesh_to_flexible_dual_grid(**arguments)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [cube, square, bowl, fins])
def test_the_same_on_a_gpu(shape: object) -> None:
    assert callable(shape)
    vertices, faces = shape()
    grid = make_grid(vertices[:2], None, 60, BOX)
    expected = dual_grid_reference((vertices - grid.box[0])[faces], faces, grid, 1.0, 1.0, 0.1)
    found = mesh_to_flexible_dual_grid(vertices.cuda(), faces.cuda(), grid_size=60, aabb=BOX)
    again = mesh_to_flexible_dual_grid(vertices.cuda(), faces.cuda(), grid_size=60, aabb=BOX)
    assert all(value.is_cuda for value in found)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert torch.equal(found[0].cpu(), expected[0])
    assert torch.equal(found[2].cpu(), expected[2])
    torch.testing.assert_close(found[1].cpu(), expected[1], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Native:
    """The compiled ops."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    return Native(build(tmp_path_factory.mktemp("native")))


@pytest.mark.parametrize("shape", [cube, square, bowl, fins])
@pytest.mark.parametrize("size", [7, 40, [90, 33, 60]])
def test_compiled_equals_torch(native: Native, shape: object, size: object) -> None:
    assert callable(shape)
    vertices, faces = shape()
    grid = make_grid(vertices[:2], None, size, BOX)
    corners = (vertices - grid.box[0])[faces]
    corners[0] += 0.2  # out of the box in part
    for weights in ((1.0, 1.0, 0.1), (0.0, 0.0, 1.0), (3.0, 0.2, 0.01)):
        coords, dual_vertices, intersected = dual_grid_compiled(native, corners, faces, grid, *weights)
        expected = dual_grid_reference(corners, faces, grid, *weights)
        assert torch.equal(coords, expected[0])
        assert torch.equal(intersected, expected[2])
        assert ((dual_vertices - expected[1]) / grid.size).abs().max() <= 1e-4


def test_compiled_gives_the_same_bytes_with_any_threads(native: Native) -> None:
    vertices, faces = bowl()
    grid = make_grid(vertices[:2], None, 100, BOX)
    corners = (vertices - grid.box[0])[faces]
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(dual_grid_compiled(native, corners, faces, grid, 1.0, 1.0, 0.1))
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("path", golden_cases("mesh_to_fdg"))
def test_compiled_equals_the_original(native: Native, path: Path) -> None:
    meta, tensors = load_golden(path)
    for name in {name.split(".")[0] for name in tensors if name.endswith(".vertices")}:
        case = under(tensors, f"{name}.")
        grid = make_grid(case["vertices"][:2], meta.get("voxel_size"), meta.get("grid_size"), meta["aabb"])
        corners = (case["vertices"] - grid.box[0])[case["faces"].long()]
        options = {"face_weight": 1.0, "boundary_weight": 1.0, "regularization_weight": 0.1, **meta["kwargs"]}
        options["regularization"] = options.pop("regularization_weight")
        coords, dual_vertices, intersected = dual_grid_compiled(native, corners, case["faces"].long(), grid, **options)
        order = np.lexsort(case["coords"].numpy().T[::-1])
        assert torch.equal(coords, case["coords"][order])
        assert torch.equal(intersected, case["intersected"][order])
        error = ((dual_vertices - case["dual_vertices"][order]) / grid.size).abs().max()
        assert error <= meta["tol"]["max_abs_offset"]


@pytest.mark.parametrize("wrap", [attributes.REPEAT, attributes.CLAMP, attributes.MIRROR])
@pytest.mark.parametrize("linear", [True, False])
def test_compiled_attributes_equal_torch(native: Native, wrap: int, linear: bool) -> None:
    for mode in (attributes.OPAQUE, attributes.MASK, attributes.BLEND):
        surface, materials, grid = textured_bowl(wrap, linear, mode)
        for offset in (0.0, 2.5):
            coords, values = attributes.attributes_compiled(native, surface, materials, grid, offset)
            expected = attributes.attributes_reference(surface, materials, grid, offset)
            assert torch.equal(coords, expected[0])
            assert (values.int() - expected[1].int()).abs().max() <= 1
            assert float((values != expected[1]).float().mean()) <= 1e-4
