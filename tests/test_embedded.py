"""The embedded checkpoint: reproducible, small, and good for a closed body whatever the picture and the seed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from o_voxel.lookup import voxel_rows
from PIL import Image, ImageDraw
from safetensors import safe_open
from torch import Tensor

from trellis2.models.voxel_vae import VoxelDecoder, dual_grid_fields
from trellis2.options import GenerateOptions
from trellis2.pipeline import EMBEDDED_MODEL, Generation, Pipeline
from trellis2.voxels import Grid, Voxels

SCRIPT = EMBEDDED_MODEL.parent / "make_untrained.py"


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.from_pretrained(EMBEDDED_MODEL, device="cpu")


def picture(kind: str) -> Image.Image:
    image = Image.new("RGBA", (160, 160))
    draw = ImageDraw.Draw(image)
    if kind == "disc":
        draw.ellipse((20, 20, 140, 140), fill=(220, 40, 30, 255))
    elif kind == "bar":
        draw.rectangle((60, 10, 100, 150), fill=(30, 90, 220, 255))
    else:
        noise = np.random.default_rng(4).integers(0, 256, (160, 160, 3), dtype=np.uint8)
        image = Image.fromarray(np.dstack([noise, np.full((160, 160), 255, np.uint8)]))
    return image


def generate(pipeline: Pipeline, kind: str, **wishes: object) -> Generation:
    options = GenerateOptions(**{"pipeline_type": "512", "preprocess_image": kind != "noise", **wishes})
    return pipeline.generate(picture(kind), options)


def faces_per_edge(faces: Tensor) -> Tensor:
    edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).sort(dim=1).values
    return edges.unique(dim=0, return_counts=True)[1]


def check_asset(generation: Generation) -> None:
    """Closed, inside its cube away from the border, of some size, opaque, with sane materials."""
    mesh, material = generation.asset.mesh, generation.asset.material
    assert (faces_per_edge(mesh.faces.long()) == 2).all()
    used = mesh.vertices[mesh.faces.unique().long()]
    size = used.amax(dim=0) - used.amin(dim=0)
    assert used.abs().max() < 0.45
    assert size.min() > 0.05
    assert size.max() > 0.15
    assert (material.attrs[:, 5] == 1).all()
    assert material.attrs[:, :5].min() > -0.15
    assert material.attrs[:, :5].max() < 1
    assert material.attrs[:, 3].max() < 0.3


def test_script_writes_the_same_bytes(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_untrained", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.write(tmp_path)
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    kept = {path.relative_to(EMBEDDED_MODEL) for path in EMBEDDED_MODEL.rglob("*") if path.is_file()}
    assert kept - made == {Path("README.md")}
    assert not made - kept
    for path in made:
        assert (tmp_path / path).read_bytes() == (EMBEDDED_MODEL / path).read_bytes(), path


def test_small_and_says_what_it_is() -> None:
    assert sum(path.stat().st_size for path in EMBEDDED_MODEL.rglob("*") if path.is_file()) < 3e6
    assert json.loads((EMBEDDED_MODEL / "pipeline.json").read_text())["untrained"] is True
    assert "untrained" in (EMBEDDED_MODEL / "README.md").read_text().lower()


def test_image_encoder_has_the_hubs_names() -> None:
    """Old and new ``transformers`` both read this layout, but only the old one writes it so."""
    with safe_open(EMBEDDED_MODEL / "dinov3" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "layer.0.attention.q_proj.weight" in names
    assert not [name for name in names if name.startswith("model.")]


@pytest.mark.parametrize(
    ("kind", "wishes"),
    [
        ("disc", {"seed": 1}),
        ("bar", {"seed": 104}),
        ("noise", {"seed": 131}),
        ("disc", {"seed": 4, "sparse_structure_steps": 1, "shape_slat_steps": 1, "tex_slat_steps": 1}),
        ("bar", {"seed": 108, "sparse_structure_cfg": 15.0, "shape_slat_cfg": 15.0, "tex_slat_cfg": 15.0}),
    ],
)
def test_asset_is_closed(pipeline: Pipeline, kind: str, wishes: dict[str, object]) -> None:
    check_asset(generate(pipeline, kind, **wishes))


@pytest.mark.slow
@pytest.mark.parametrize("pipeline_type", ["1024", "1024_cascade", "1536_cascade"])
def test_fine_asset_is_closed(pipeline: Pipeline, pipeline_type: str) -> None:
    check_asset(generate(pipeline, "bar", seed=108, pipeline_type=pipeline_type))


def test_same_call_same_asset_and_another_picture_another(pipeline: Pipeline) -> None:
    first, again = (generate(pipeline, "disc", seed=131).asset for _ in range(2))
    other = generate(pipeline, "bar", seed=131).asset
    assert torch.equal(first.mesh.vertices, again.mesh.vertices)
    assert torch.equal(first.mesh.faces, again.mesh.faces)
    assert torch.equal(first.material.attrs, again.material.attrs)
    assert first.mesh.faces.shape != other.mesh.faces.shape or not torch.equal(first.mesh.faces, other.mesh.faces)
    red, blue = (asset.material.attrs[:, :3].mean(dim=0) for asset in (first, other))
    assert red[0] > red[2]  # the disc is red, the bar is blue
    assert blue[2] > blue[0]


@pytest.fixture(scope="module")
def shape_decoder(pipeline: Pipeline) -> VoxelDecoder:
    decoder = pipeline.checkpoint.models["shape_slat_decoder"]
    assert isinstance(decoder, VoxelDecoder)
    return decoder


def ball(radius: float, side: int) -> Grid:
    axes = torch.arange(side) - side / 2 + 0.5
    x, y, z = torch.meshgrid(axes, axes, axes, indexing="ij")
    return Grid((x**2 + y**2 + z**2 < radius**2)[None].nonzero().int())


def test_crossed_edges_are_those_whose_corners_differ_in_sign(shape_decoder: VoxelDecoder) -> None:
    """The claim behind closedness: none missed, none extra, and no sign left to rounding."""
    grid = ball(3.5, 32)
    latent = torch.randn(len(grid), 8, generator=torch.Generator().manual_seed(2))
    seen = []
    hook = shape_decoder.blocks[4][1].register_forward_pre_hook(lambda _, args: seen.append(args))
    decoded, _ = shape_decoder(Voxels(latent, grid))
    hook.remove()
    x, fine = seen[0]
    corner = x[:, 2] + x[:, 4]
    assert corner.abs().min() > 0.1 * x[:, 4].mean()
    crossed = dual_grid_fields(decoded, 0.5).crossed
    for axis in range(3):
        lower = fine.coords.clone()
        lower[:, 1 + axis] -= 1
        row = voxel_rows(fine.coords, lower)
        differs = (row >= 0) & (corner.sign() != corner[row].sign())
        assert torch.equal(crossed[:, axis], differs)


@pytest.mark.parametrize("side", [64, 72, 80, 88, 96])
def test_body_stays_solid_for_a_cascade(shape_decoder: VoxelDecoder, side: int) -> None:
    """Every token of the finer grid inside the body holds a voxel, so that counting neighbours finds no caves."""
    grid = ball(4.5, 32)
    fine = shape_decoder.upsample(Voxels(torch.zeros(len(grid), 8), grid), 4)
    tokens = torch.zeros(side, side, side, dtype=torch.bool)
    tokens[((fine.coords[:, 1:] + 0.5) / 512 * side).long().unbind(dim=1)] = True
    assert tokens[ball(2.6 / 32 * side, side).coords[:, 1:].long().unbind(dim=1)].all()
    assert int(tokens.sum()) < len(ball(4.5 / 32 * side, side))
