"""Materials of textured meshes as attributes of voxels."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from golden_cases import golden_cases, load_golden, under
from o_voxel.attributes import (
    BLEND,
    CLAMP,
    MASK,
    MIRROR,
    OPAQUE,
    REPEAT,
    attributes_reference,
    attributes_warp,
    blender_dump_to_volumetric_attr,
    textured_mesh_to_volumetric_attr,
)
from o_voxel.voxelize import mesh_to_flexible_dual_grid
from PIL import Image
from surfaces import BOX, textured_bowl
from torch import Tensor
from trimesh.visual import ColorVisuals, TextureVisuals
from trimesh.visual.material import PBRMaterial

# A rectangle above z = 0, wider than the grid's outermost lines; its texture coordinates are x + 0.5, y + 0.5.
VERTICES = np.array([[-0.49, -0.49, 0.01], [0.49, -0.49, 0.01], [0.49, 0.48, 0.01], [-0.49, 0.48, 0.01]])
FACES = np.array([[0, 1, 2], [0, 2, 3]])
UV = VERTICES[:, :2] + 0.5
CHESS = np.array([[[250, 10, 40], [20, 200, 90]], [[60, 130, 240], [180, 70, 110]]], np.uint8)


def sheet(uv: Any = UV, **material: Any) -> trimesh.Trimesh:
    visual = TextureVisuals(uv=uv, material=PBRMaterial(**material))
    return trimesh.Trimesh(VERTICES.copy(), FACES, visual=visual, process=False)


def dump(texture: dict[str, Any] | None = None, uv: Any = UV, **material: Any) -> dict[str, Any]:
    white = {"baseColorFactor": [1, 1, 1, 1], "metallicFactor": 0.2, "roughnessFactor": 0.4, "alphaFactor": 1.0}
    none = dict.fromkeys(("metallicTexture", "roughnessTexture", "alphaTexture"))
    rest = {"alphaMode": "OPAQUE", "alphaCutoff": 0.5, "baseColorTexture": texture}
    normals = np.broadcast_to(np.array([0.0, 0.0, 1.0]), (2, 3, 3))
    item = {"vertices": VERTICES, "faces": FACES, "normals": normals, "uvs": uv[FACES], "mat_ids": np.zeros(2, int)}
    return {"objects": [item], "materials": [{**white, **none, **rest, **material}]}


def pack(image: np.ndarray, interpolation: str = "Closest", extension: str = "REPEAT") -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return {"image": buffer.getvalue(), "interpolation": interpolation, "extension": extension}


def at(coords: Tensor, values: Tensor, resolution: int) -> Tensor:
    """values as an image [y, x]; every voxel of the sheet's layer must be there."""
    image = torch.zeros((resolution, resolution, values.shape[1]), dtype=values.dtype)
    assert len(coords) == resolution**2
    image[coords[:, 1].long(), coords[:, 0].long()] = values
    return image


@pytest.mark.parametrize("path", golden_cases("vol_attr"))
def test_equals_the_original(path: Path, tmp_path: Path) -> None:
    meta, tensors = load_golden(path)
    file = tmp_path / "mesh.glb"
    file.write_bytes(tensors["glb_bytes"].numpy().tobytes())
    resolutions = [name.split(".")[0] for name in tensors if name.endswith(".coords")]
    assert resolutions
    for resolution in resolutions:
        expected = under(tensors, f"{resolution}.")
        coords, attributes = textured_mesh_to_volumetric_attr(str(file), grid_size=int(resolution[1:]), aabb=BOX)
        order = np.lexsort(expected["coords"].numpy().T[::-1])
        assert torch.equal(coords, expected["coords"][order])
        for name, value in attributes.items():
            assert value.dtype == torch.uint8
            error = (value.int() - expected[name][order].int()).abs().max()
            assert error <= meta["tol"]["max_abs_u8"], name


@pytest.mark.parametrize("wrap", [REPEAT, CLAMP, MIRROR])
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("mode", [OPAQUE, MASK, BLEND])
@pytest.mark.parametrize("offset", [0.0, 2.5])
def test_the_kernel_gives_what_torch_gives(wrap: int, linear: bool, mode: int, offset: float) -> None:
    surface, materials, grid = textured_bowl(wrap, linear, mode)
    coords, values = attributes_warp(surface, materials, grid, offset)
    expected = attributes_reference(surface, materials, grid, offset)
    assert torch.equal(coords, expected[0])
    assert (values.int() - expected[1].int()).abs().max() <= 1
    assert float((values != expected[1]).float().mean()) <= 1e-4


def test_voxels_are_those_of_the_dual_grid() -> None:
    ball = trimesh.creation.icosphere(3, 0.4)
    ball.visual = TextureVisuals(material=PBRMaterial())
    coords, _ = textured_mesh_to_volumetric_attr(ball, grid_size=20, aabb=BOX)
    same = mesh_to_flexible_dual_grid(torch.tensor(ball.vertices), torch.tensor(ball.faces), grid_size=20, aabb=BOX)
    assert torch.equal(coords, same[0])


def test_factors_without_textures() -> None:
    factors = {"baseColorFactor": [102, 51, 204, 128], "metallicFactor": 0.2, "roughnessFactor": 0.6}
    mesh = sheet(**factors, emissiveFactor=[0.4, 0.8, 1.0], alphaMode="BLEND")
    _, attributes = textured_mesh_to_volumetric_attr(mesh, grid_size=8, aabb=BOX)
    found = {name: value.unique(dim=0).tolist() for name, value in attributes.items()}
    assert found == {
        "base_color": [[102, 51, 204]],
        "metallic": [[51]],
        "roughness": [[153]],
        "emissive": [[102, 204, 255]],
        "alpha": [[128]],
        "normal": [[127, 127, 255]],
    }


@pytest.mark.parametrize(
    ("mode", "cutoff", "alpha"),
    [("OPAQUE", 0.5, 255), ("MASK", 0.4, 255), ("MASK", 127 / 255, 255), ("MASK", 0.6, 0), ("BLEND", 0.5, 127)],
)
def test_alpha_modes(mode: str, cutoff: float, alpha: int) -> None:
    image = Image.new("RGBA", (4, 4), (127,) * 4)
    mesh = sheet(baseColorTexture=image, alphaMode=mode, alphaCutoff=cutoff)
    _, attributes = textured_mesh_to_volumetric_attr(mesh, grid_size=8, aabb=BOX)
    assert attributes["alpha"].unique().tolist() == [alpha]
    assert attributes["base_color"].unique().tolist() == [127]


@pytest.mark.parametrize(
    ("extension", "quarters"),
    [("REPEAT", [0, 1, 0, 1]), ("EXTEND", [0, 1, 1, 1]), ("CLIP", [0, 1, 1, 1]), ("MIRROR", [0, 1, 1, 0])],
)
def test_wrap_modes(extension: str, quarters: list[int]) -> None:
    """Two rounds of a 2 x 2 texture along x and y, nearest texel."""
    scene = dump(pack(CHESS, extension=extension), uv=2 * UV)
    coords, attributes = blender_dump_to_volumetric_attr(scene, grid_size=8, aabb=BOX)
    image = at(coords, attributes["base_color"], 8)[::2, ::2]
    assert torch.equal(image, torch.from_numpy(CHESS)[quarters][:, quarters])


def test_linear_filter_by_hand() -> None:
    ramp = np.zeros((2, 2, 3), np.uint8)
    ramp[:, 1] = 200
    scene = dump(pack(ramp, "Linear", "EXTEND"))
    coords, attributes = blender_dump_to_volumetric_attr(scene, grid_size=8, aabb=BOX)
    row = at(coords, attributes["base_color"], 8)[3, :, 0]
    # Texel centres at 1/4 and 3/4, voxel centres at (i + 1/2) / 8.
    expected = [200 * min(max(2 * (i + 0.5) / 8 - 0.5, 0), 1) for i in range(8)]
    assert (row - torch.tensor(expected)).abs().max() <= 1


def test_small_details_fade_in_coarse_grids() -> None:
    checker = np.indices((64, 64)).sum(0)[:, :, None] % 2 * np.full(3, 255)
    mesh = sheet(baseColorTexture=Image.fromarray(checker.astype(np.uint8)))
    _, attributes = textured_mesh_to_volumetric_attr(mesh, grid_size=8, aabb=BOX)
    assert (attributes["base_color"].int() - 127).abs().max() <= 1
    _, attributes = textured_mesh_to_volumetric_attr(mesh, grid_size=10, aabb=BOX, mip_level_offset=-6)
    assert (attributes["base_color"].int() - 127).abs().max() > 50


def test_textures_multiply_factors() -> None:
    orm = Image.new("RGB", (4, 4), (0, 100, 200))
    glow = Image.new("RGB", (4, 4), (250, 100, 50))
    mesh = sheet(
        metallicRoughnessTexture=orm,
        metallicFactor=0.5,
        roughnessFactor=0.25,
        emissiveTexture=glow,
        emissiveFactor=[1.0, 0.5, 0.0],
    )
    _, attributes = textured_mesh_to_volumetric_attr(mesh, grid_size=8, aabb=BOX)
    expected = {"metallic": [100], "roughness": [25], "emissive": [250, 50, 0]}
    for name, value in expected.items():
        assert (attributes[name].int() - torch.tensor(value)).abs().max() <= 1, name


def test_normal_maps_turn_normals() -> None:
    flat = textured_mesh_to_volumetric_attr(
        sheet(normalTexture=Image.new("RGB", (4, 4), (128, 128, 255))), grid_size=8, aabb=BOX
    )[1]["normal"]
    assert (flat.int() - torch.tensor([128, 128, 255])).abs().max() <= 1
    leaning = textured_mesh_to_volumetric_attr(
        sheet(normalTexture=Image.new("RGB", (4, 4), (255, 128, 128))), grid_size=8, aabb=BOX
    )[1]["normal"]
    assert (leaning.int() - torch.tensor([255, 128, 128])).abs().max() <= 1


def test_vertex_colours() -> None:
    colors = np.array([[255, 0, 0, 255], [0, 255, 0, 255], [0, 255, 0, 255], [255, 0, 0, 255]], np.uint8)
    mesh = trimesh.Trimesh(VERTICES.copy(), FACES, process=False)
    mesh.visual = ColorVisuals(mesh, vertex_colors=colors)
    coords, attributes = textured_mesh_to_volumetric_attr(mesh, grid_size=8, aabb=BOX)
    row = at(coords, attributes["base_color"], 8)[4]
    share = (torch.arange(8) + 0.5) / 8
    assert (row[:, 1] - 255 * ((share - 0.01) / 0.98)).abs().max() <= 1
    assert (row[:, 0].int() + row[:, 1].int() - 254).abs().max() <= 1
    assert row[:, 2].max() == 0


def test_scenes_with_two_materials_and_any_picture() -> None:
    left, right = sheet(baseColorFactor=[255, 0, 0, 255]), sheet(baseColorTexture=Image.new("P", (50, 20), 0))
    left.apply_translation([0, 0, -0.3])
    coords, attributes = textured_mesh_to_volumetric_attr(trimesh.Scene([left, right]), grid_size=8, aabb=BOX)
    lower = coords[:, 2] < 4
    assert attributes["base_color"][lower].unique(dim=0).tolist() == [[255, 0, 0]]
    assert attributes["base_color"][~lower].unique(dim=0).tolist() == [[0, 0, 0]]


def test_the_same_input_gives_the_same_bytes() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    first, second = (
        textured_mesh_to_volumetric_attr(sheet(baseColorTexture=image), grid_size=30, aabb=BOX)[1] for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_settings_and_time_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    textured_mesh_to_volumetric_attr(sheet(), grid_size=8, aabb=BOX, verbose=True, timing=True)
    settings, seconds = capsys.readouterr().out.splitlines()
    assert settings.startswith("grid (8, 8, 8), voxel [0.125")
    assert seconds.startswith("voxel attributes took 0.")


@pytest.mark.parametrize("content", [b"", b"glTF" + bytes(20), b"glTF\2\0\0\0\x30\0\0\0\x10\0\0\0JSON{"])
def test_files_that_cannot_be_read_are_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "mesh.glb"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"mesh '.*mesh\.glb' cannot be read: "):
        textured_mesh_to_volumetric_attr(file, grid_size=8)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="mesh must be triangles"):
        textured_mesh_to_volumetric_attr(trimesh.Scene(), grid_size=8)
    with pytest.raises(ValueError, match="mesh must be triangles"):
        textured_mesh_to_volumetric_attr(trimesh.PointCloud(VERTICES), grid_size=8)
    with pytest.raises(ValueError, match=r"mesh '/no/such\.glb' cannot be read: "):
        textured_mesh_to_volumetric_attr("/no/such.glb", grid_size=8)
    with pytest.raises(ValueError, match="voxel_size or grid_size"):
        textured_mesh_to_volumetric_attr(sheet())
    bad = sheet()
    bad.vertices[0] = math.nan
    with pytest.raises(ValueError, match="mesh vertices must be finite"):
        textured_mesh_to_volumetric_attr(bad, grid_size=8, aabb=BOX)
    with pytest.raises(ValueError, match="mesh texture coordinates must be finite"):
        textured_mesh_to_volumetric_attr(sheet(uv=UV * math.inf), grid_size=8, aabb=BOX)
    with pytest.raises(ValueError, match="mip_level_offset=nan"):
        textured_mesh_to_volumetric_attr(sheet(), grid_size=8, aabb=BOX, mip_level_offset=math.nan)
    with pytest.raises(ValueError, match="every triangle lies outside"):
        textured_mesh_to_volumetric_attr(sheet(), grid_size=8, aabb=[[2, 2, 2], [3, 3, 3]])
    with pytest.raises(ValueError, match="device='mps' must be 'cpu' or a GPU"):
        textured_mesh_to_volumetric_attr(sheet(), grid_size=8, aabb=BOX, device="mps")
    with pytest.raises(ValueError, match="device='cuda:77' must be 'cpu' or a GPU"):
        blender_dump_to_volumetric_attr(dump(), grid_size=8, aabb=BOX, device="cuda:77")
    with pytest.raises(ValueError, match="device='no such' must be 'cpu' or a GPU"):
        blender_dump_to_volumetric_attr(dump(), grid_size=8, aabb=BOX, device="no such")
    with pytest.raises(ValueError, match=r"mesh texture coordinates must be one per vertex \(4\), not 3"):
        textured_mesh_to_volumetric_attr(sheet(uv=UV[:3]), grid_size=8, aabb=BOX)
    bad = sheet()
    bad.faces = FACES + 2
    with pytest.raises(ValueError, match="faces must hold indices from 0 to 3"):
        textured_mesh_to_volumetric_attr(bad, grid_size=8, aabb=BOX)
    with pytest.raises(ValueError, match="extension of REPEAT"):
        blender_dump_to_volumetric_attr(dump(pack(CHESS, extension="TILE")), grid_size=8, aabb=BOX)
    with pytest.raises(ValueError, match="alphaMode of OPAQUE"):
        blender_dump_to_volumetric_attr(dump(alphaMode="HASHED"), grid_size=8, aabb=BOX)
    scene = dump()
    scene["objects"][0]["mat_ids"] = np.ones(2, int)
    with pytest.raises(ValueError, match="mat_ids from 0 to 0"):
        blender_dump_to_volumetric_attr(scene, grid_size=8, aabb=BOX)
    scene["objects"][0]["faces"] = FACES + 2
    with pytest.raises(ValueError, match="indices from 0 to 3"):
        blender_dump_to_volumetric_attr(scene, grid_size=8, aabb=BOX)
    with pytest.raises(ValueError, match="at least one object"):
        blender_dump_to_volumetric_attr({"objects": [], "materials": []}, grid_size=8, aabb=BOX)
