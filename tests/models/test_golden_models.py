"""Every network family against tensors recorded from the original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import golden_cases, load_golden, relative_l2, under
from o_voxel.dual_grid import flexible_dual_grid_to_mesh
from torch import Tensor

from trellis2.checkpoint import build_model, fill_model
from trellis2.models.voxel_vae import DualGrid, dual_grid_features, dual_grid_fields
from trellis2.voxels import Grid, Refinement, Voxels, full_grid

DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]
on_every_device = pytest.mark.parametrize("device", DEVICES, ids=["cpu", "cuda"])
Case = tuple[dict[str, Any], dict[str, Tensor]]


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def case(path: Path, device: torch.device) -> Case:
    meta, tensors = load_golden(path)
    return meta, {name: value.to(device) for name, value in tensors.items()}


def load(name: str, args: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Any:
    model: Any = build_model(name, args)
    model.set_dtype(dtype)
    fill_model(model, weights)
    return model


def assert_close(value: Tensor, expected: Tensor, tol: dict[str, float]) -> None:
    assert value.shape == expected.shape
    assert relative_l2(value, expected) <= tol["rel_l2"]
    assert (value - expected).abs().max() <= tol["max_abs"]


@on_every_device
@pytest.mark.parametrize("path", golden_cases("ss_flow"))
def test_structure_flow(path: Path, device: torch.device) -> None:
    meta, tensors = case(path, device)
    model = load(meta["model"], meta["args"], under(tensors, "weights."))
    x = tensors["x"]
    grid = full_grid(x.shape[2], len(x), x.device)
    out = model(x.flatten(2).transpose(1, 2).flatten(0, 1), tensors["t"], tensors["cond"], grid)
    dense = out.unflatten(0, (len(x), -1)).transpose(1, 2).reshape(tensors["out"].shape)
    assert_close(dense, tensors["out"], meta["tol"])


@on_every_device
@pytest.mark.parametrize("path", golden_cases("slat_flow"))
def test_latent_flow(path: Path, device: torch.device) -> None:
    meta, tensors = case(path, device)
    model = load(meta["model"], meta["args"], under(tensors, "weights."))
    x = torch.cat([tensors["x"], *([tensors["concat_cond"]] if "concat_cond" in tensors else [])], dim=1)
    out = model(x, tensors["t"], tensors["cond"], Grid(tensors["coords"]))
    assert_close(out, tensors["out"], meta["tol"])


@pytest.mark.gpu
@pytest.mark.parametrize("path", golden_cases("slat_flow"))
def test_latent_flow_in_bfloat16(path: Path) -> None:
    meta, tensors = case(path, torch.device("cuda"))
    model = load(meta["model"], meta["args"], under(tensors, "weights."), torch.bfloat16)
    x = torch.cat([tensors["x"], *([tensors["concat_cond"]] if "concat_cond" in tensors else [])], dim=1)
    error = relative_l2(model(x, tensors["t"], tensors["cond"], Grid(tensors["coords"])), tensors["out"])
    assert error <= meta["tol_bf16"]["rel_l2"]
    assert error <= 2 * relative_l2(tensors["out_bf16_cuda_fa2"], tensors["out"])


@on_every_device
@pytest.mark.parametrize("path", golden_cases("ss_vae"))
def test_structure_vae(path: Path, device: torch.device) -> None:
    meta, tensors = case(path, device)
    encoder = load("SparseStructureEncoder", meta["enc_args"], under(tensors, "enc."))
    decoder = load("SparseStructureDecoder", meta["dec_args"], under(tensors, "dec."))
    mean, log_variance = encoder(tensors["x"])
    assert_close(mean, tensors["mean"], meta["tol"])
    assert_close(mean, tensors["z"], meta["tol"])
    assert_close(log_variance, tensors["logvar"], meta["tol"])
    assert_close(decoder(tensors["dec_in"]), tensors["dec_out"], meta["tol"])


def coordinate_order(coords: Tensor) -> Tensor:
    """Permutation that sorts coordinates, so that two orders of one set can be compared."""
    keys = coords.long()
    scale = int(keys.max()) + 1
    packed = ((keys[:, 0] * scale + keys[:, 1]) * scale + keys[:, 2]) * scale + keys[:, 3]
    return packed.argsort()


@on_every_device
@pytest.mark.parametrize("path", golden_cases("fdg_dec"))
def test_shape_decoder(path: Path, device: torch.device) -> None:
    meta, tensors = case(path, device)
    model = load(meta["model"], meta["args"], under(tensors, "weights."))
    latent = Voxels(tensors["x"], Grid(tensors["coords"]))
    decoded, steps = model(latent)
    for level, step in enumerate(steps):
        assert torch.equal(step.coarse.coords, tensors[f"sub{level}_coords"])
        kept = torch.zeros_like(tensors[f"sub{level}_feats"], dtype=torch.bool)
        kept[step.parent, step.child] = True
        assert torch.equal(kept, tensors[f"sub{level}_feats"] > 0)
        assert torch.equal(model.upsample(latent, level + 1).coords, tensors[f"upsample{level + 1}_coords"])
    assert torch.equal(decoded.grid.coords, tensors["h_coords"])
    assert_close(decoded.feats, tensors["h"], meta["tol"])

    dual = dual_grid_fields(decoded, model.config.voxel_margin)
    aabb = [[-0.5, -0.5, -0.5], [0.5, 0.5, 0.5]]
    for item in range(len(decoded.grid.lengths)):
        rows = decoded.grid.item(item)
        fields = (dual.grid.coords[rows, 1:], dual.offsets[rows], dual.crossed[rows], dual.split_weight[rows])
        vertices, faces = flexible_dual_grid_to_mesh(*fields, aabb, grid_size=meta["args"]["resolution"])
        expected = tensors[f"mesh{item}_vertices"]
        assert (vertices - expected).abs().max() <= meta["tol"]["max_abs"] / meta["args"]["resolution"]
        assert torch.equal(faces.long(), tensors[f"mesh{item}_faces"].long())


@on_every_device
@pytest.mark.parametrize("path", golden_cases("fdg_enc"))
def test_shape_encoder(path: Path, device: torch.device) -> None:
    meta, tensors = case(path, device)
    model = load(meta["model"], meta["args"], under(tensors, "weights."))
    dual = DualGrid(Grid(tensors["coords"]), tensors["vertices"], tensors["intersected"], tensors["vertices"][:, :1])
    check_encoder(model, dual_grid_features(dual), tensors, meta["tol"])


@on_every_device
@pytest.mark.parametrize("path", golden_cases("tex_enc"))
def test_material_encoder(path: Path, device: torch.device) -> None:
    meta, tensors = case(path, device)
    model = load(meta["model"], meta["args"], under(tensors, "weights."))
    check_encoder(model, Voxels(tensors["x"], Grid(tensors["coords"])), tensors, meta["tol"])


def check_encoder(model: Any, x: Voxels, tensors: dict[str, Tensor], tol: dict[str, float]) -> None:
    mean, log_variance = model(x)
    ours, theirs = coordinate_order(mean.grid.coords), coordinate_order(tensors["z_coords"])
    assert torch.equal(mean.grid.coords[ours], tensors["z_coords"][theirs])
    assert_close(mean.feats[ours], tensors["mean"][theirs], tol)
    assert_close(mean.feats[ours], tensors["z"][theirs], tol)
    assert_close(log_variance[ours], tensors["logvar"][theirs], tol)


@on_every_device
@pytest.mark.parametrize("path", golden_cases("tex_dec"))
def test_material_decoder(path: Path, device: torch.device) -> None:
    meta, tensors = case(path, device)
    assert_close(decode_material(meta, tensors, torch.float32), tensors["out"], meta["tol"])


@pytest.mark.gpu
@pytest.mark.parametrize("path", golden_cases("tex_dec"))
def test_material_decoder_in_float16(path: Path) -> None:
    """No worse than twice the error of the same network in plain torch on a CPU at that precision."""
    meta, tensors = load_golden(path)
    plain = relative_l2(decode_material(meta, tensors, torch.float16), tensors["out"])
    out = decode_material(meta, case(path, torch.device("cuda"))[1], torch.float16)
    assert relative_l2(out.cpu(), tensors["out"]) <= 2 * plain


def decode_material(meta: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    model = load(meta["model"], meta["args"], under(tensors, "weights."), dtype)
    grid = Grid(tensors["coords"])
    guide: list[Refinement] = []
    while f"sub{len(guide)}_feats" in tensors:
        level = len(guide)
        coarse = guide[-1].fine if guide else grid
        assert torch.equal(coarse.coords, tensors[f"sub{level}_coords"])
        guide.append(coarse.subdivide(tensors[f"sub{level}_feats"] > 0))
    decoded, _ = model(Voxels(tensors["x"], grid), guide)
    assert torch.equal(decoded.grid.coords, tensors["out_coords"])
    out: Tensor = decoded.feats
    return out
