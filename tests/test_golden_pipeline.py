"""The whole pipeline against a recorded run of the original: same picture, seed and weights, stage by stage."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import PILLOW_SIMD, golden_cases, load_golden, relative_l2, under
from o_voxel.repair import fill_holes
from o_voxel.sample import grid_sample_3d
from PIL import Image
from torch import Tensor

from trellis2.checkpoint import Checkpoint, Normalization, build_model, fill_model
from trellis2.image import prepare
from trellis2.models.conditioning import ImageEncoder
from trellis2.models.vit import VisionTransformer, VitConfig, file_state
from trellis2.options import GenerateOptions
from trellis2.pipeline import HOLE_PERIMETER, PRESETS, Pipeline, structure_grid
from trellis2.sampling import SamplerOptions

CLASSES = {
    "sparse_structure_flow_model": "SparseStructureFlowModel",
    "sparse_structure_decoder": "SparseStructureDecoder",
    "shape_slat_decoder": "FlexiDualGridVaeDecoder",
    "tex_slat_decoder": "SparseUnetVaeDecoder",
}


def recorded_pipeline(meta: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> Pipeline:
    models = {}
    for name, args in meta["model_args"].items():
        models[name] = build_model(CLASSES.get(name, "SLatFlowModel"), args)
        fill_model(models[name], under(tensors, f"models.{name}."))
    backbone = VisionTransformer(VitConfig.of_json({"model_type": "dinov3_vit", **meta["dino_config"]}))
    backbone.load_state_dict(file_state(under(tensors, "models.dino.")))

    def sampler(stage: str) -> SamplerOptions:
        params = {**meta["sampler_params"][stage], "sigma_min": meta["sigma_min"]}
        return SamplerOptions(**{**params, "guidance_interval": tuple(params["guidance_interval"])})

    def normalization(stage: str) -> Normalization:
        entry = meta[f"{stage}_slat_normalization"]
        return Normalization(torch.tensor(entry["mean"])[None], torch.tensor(entry["std"])[None])

    checkpoint = Checkpoint(
        source="recorded",
        models=models,
        image_encoder=ImageEncoder(backbone).eval(),
        structure_sampler=sampler("ss"),
        shape_sampler=sampler("shape"),
        texture_sampler=sampler("tex"),
        shape_normalization=normalization("shape"),
        texture_normalization=normalization("tex"),
        removes_background=False,
        untrained=True,
    )
    return Pipeline(checkpoint, device, low_vram=False)


def recorded_options(meta: dict[str, Any], pipeline_type: str) -> GenerateOptions:
    stages = {"sparse_structure": "ss", "shape_slat": "shape", "tex_slat": "tex"}
    wishes = {}
    for ours, theirs in stages.items():
        wishes[f"{ours}_steps"] = meta["sampler_params"][theirs]["steps"]
        wishes[f"{ours}_cfg"] = meta["sampler_params"][theirs]["guidance_strength"]
    return GenerateOptions(seed=meta["seed"], pipeline_type=pipeline_type, **wishes)


def picture(data: Tensor) -> Image.Image:
    return Image.open(io.BytesIO(data.numpy().tobytes()))


def keys(coords: Tensor) -> Tensor:
    return ((coords[:, 0].long() * 4096 + coords[:, 1]) * 4096 + coords[:, 2]) * 4096 + coords[:, 3]


def assert_same_voxels(ours: Tensor, theirs: Tensor, iou: float) -> None:
    a, b = set(keys(ours.cpu()).tolist()), set(keys(theirs).tolist())
    assert len(a & b) / len(a | b) >= iou


def with_batch(coords: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(coords[:, :1]), coords], dim=1)


DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES, ids=["cpu", "cuda"])
@pytest.mark.parametrize("pipeline_type", ["512", "1024_cascade"])
@pytest.mark.parametrize("path", golden_cases("e2e"))
def test_recorded_run(path: Path, pipeline_type: str, device: torch.device) -> None:
    meta, tensors = load_golden(path)
    tol = meta["tol"]
    recorded = under(tensors, f"{pipeline_type}.")
    pipeline = recorded_pipeline(meta, tensors, device)
    options = recorded_options(meta, pipeline_type)
    preset = PRESETS[pipeline_type]
    noise = torch.Generator().manual_seed(options.seed)

    def close(ours: Tensor, name: str) -> None:
        assert relative_l2(ours.cpu(), recorded[name]) <= tol["latents_rel_l2"], name

    image = prepare(picture(tensors["rgba_png"])).rgb
    theirs = np.asarray(picture(tensors["preprocessed_png"]).convert("RGB")).astype(int)
    assert np.abs(np.asarray(image).astype(int) - theirs).max() <= 1

    low = pipeline.condition(image, 512)
    close(low, "cond_512")
    high = low
    if "cond_1024" in recorded:
        high = pipeline.condition(image, 1024)
        close(high, "cond_1024")
    if PILLOW_SIMD:  # the rest is compared as strictly as ever, from the tokens of Pillow's pictures
        low, high = (recorded[name].to(device) for name in ("cond_512", "cond_1024" if preset.cascade else "cond_512"))

    latent = pipeline.sample_structure(low, options, noise)
    close(latent, "z_s")
    grid = structure_grid(pipeline.decode_structure(latent), preset.structure)
    assert torch.equal(grid.coords.cpu(), recorded["coords"])

    resolution = preset.resolution
    if preset.cascade:
        coarse = pipeline.sample_shape(low, "512", grid, options, noise)
        close(coarse.feats, "lr_slat")
        upsampled = pipeline.checkpoint.models["shape_slat_decoder"].upsample(coarse, 4)
        assert_same_voxels(upsampled.coords, recorded["upsampled_coords"], tol["coords_iou"])
        grid, resolution = pipeline.refine_grid(coarse, preset.resolution, options.max_num_tokens)
    assert resolution == int(recorded["res"])
    shape = pipeline.sample_shape(high, preset.flow, grid, options, noise)
    assert torch.equal(shape.grid.coords.cpu(), recorded["shape_slat_coords"])
    close(shape.feats, "shape_slat")
    texture = pipeline.sample_texture(high, preset.flow, shape, options, noise)
    close(texture.feats, "tex_slat")

    mesh, guide = pipeline.decode_shape(shape, resolution)
    assert mesh.vertices.shape == recorded["raw_vertices"].shape
    voxel = 1 / resolution
    assert (mesh.vertices.cpu() - recorded["raw_vertices"]).abs().max() <= 0.01 * voxel
    assert torch.equal(mesh.faces.cpu().long(), recorded["raw_faces"].long())

    material = pipeline.decode_texture(texture, guide, resolution)
    assert_same_voxels(with_batch(material.coords), with_batch(recorded["attr_coords"]), tol["coords_iou"])
    order = keys(with_batch(material.coords.cpu())).argsort()
    expected = keys(with_batch(recorded["attr_coords"])).argsort()
    assert (material.attrs.cpu()[order] - recorded["attrs"][expected]).abs().max() <= tol["attrs_max_abs"]

    # Which diagonal closes a hole is a matter of taste, so the repaired mesh is compared by its statistics.
    vertices, faces = fill_holes(mesh.vertices, mesh.faces, max_hole_perimeter=HOLE_PERIMETER)
    assert len(vertices) == pytest.approx(len(recorded["final_vertices"]), rel=0.01)
    assert len(faces) == pytest.approx(len(recorded["final_faces"]), rel=0.01)
    assert area(vertices.cpu(), faces.cpu()) == pytest.approx(
        area(recorded["final_vertices"], recorded["final_faces"]), rel=0.01
    )
    at_vertices = grid_sample_3d(
        material.attrs,
        with_batch(material.coords),
        (1, 6, *[resolution] * 3),
        ((recorded["final_vertices"].to(device) + 0.5) * resolution)[None],
    )[0]
    assert (at_vertices.cpu() - recorded["vertex_attrs"]).abs().max() <= tol["attrs_max_abs"]


def area(vertices: Tensor, faces: Tensor) -> float:
    a, b, c = vertices[faces.long()].unbind(dim=1)
    return float(torch.linalg.cross(b - a, c - a).norm(dim=1).sum() / 2)
