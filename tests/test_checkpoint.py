"""A published-shaped checkpoint loads; everything else is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tiny import MODELS

from trellis2.checkpoint import DEFAULT_MATTING, LEFT_OUT, MODEL_NAMES, build_model, load_checkpoint, load_matting
from trellis2.errors import CheckpointError
from trellis2.layers import SparseConv3d
from trellis2.models.matting import BiRefNet, MattingConfig


@pytest.fixture
def folder(checkpoint_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(checkpoint_folder, tmp_path / "checkpoint"))


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def retensor(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(path)
    state = {key: value.clone() for key, value in state.items()}
    change(state)
    save_file(state, path)


def test_loads_all_networks_with_their_settings(checkpoint_folder: Path) -> None:
    checkpoint = load_checkpoint(checkpoint_folder)
    assert set(checkpoint.models) == set(MODEL_NAMES)
    assert checkpoint.untrained
    assert checkpoint.structure_sampler.rescale_t == 5.0
    assert checkpoint.texture_sampler.guidance_interval == (0.6, 0.9)
    assert checkpoint.shape_normalization.std.shape == (1, 8)
    for model in checkpoint.models.values():
        assert not any(p.is_meta or p.requires_grad for p in model.parameters())


def test_torso_precision_follows_the_file_or_the_caller(checkpoint_folder: Path) -> None:
    def torso(dtype: torch.dtype | None) -> set[torch.dtype]:
        decoder = load_checkpoint(checkpoint_folder, dtype=dtype).models["shape_slat_decoder"]
        assert decoder.from_latent.weight.dtype == torch.float32
        assert all(
            m.weight.dtype == torch.float32
            for m in decoder.modules()
            if "Norm" in type(m).__name__ and m.weight is not None
        )
        return {m.weight.dtype for m in decoder.blocks.modules() if isinstance(m, (torch.nn.Linear, SparseConv3d))}

    assert torso(None) == {torch.float16}
    assert torso(torch.float32) == {torch.float32}


def test_building_takes_no_memory() -> None:
    model = build_model("SLatFlowModel", {**MODELS["shape_slat_flow_model_512"][1], "model_channels": 1536})
    assert all(p.is_meta for p in model.parameters())


# What the published files hold: the names a checkpoint must keep for ever.
FLOW_KEYS = [
    "adaLN_modulation.1.bias",
    "adaLN_modulation.1.weight",
    "blocks.0.cross_attn.k_rms_norm.gamma",
    "blocks.0.cross_attn.q_rms_norm.gamma",
    "blocks.0.cross_attn.to_kv.bias",
    "blocks.0.cross_attn.to_kv.weight",
    "blocks.0.cross_attn.to_out.bias",
    "blocks.0.cross_attn.to_out.weight",
    "blocks.0.cross_attn.to_q.bias",
    "blocks.0.cross_attn.to_q.weight",
    "blocks.0.mlp.mlp.0.bias",
    "blocks.0.mlp.mlp.0.weight",
    "blocks.0.mlp.mlp.2.bias",
    "blocks.0.mlp.mlp.2.weight",
    "blocks.0.modulation",
    "blocks.0.norm2.bias",
    "blocks.0.norm2.weight",
    "blocks.0.self_attn.k_rms_norm.gamma",
    "blocks.0.self_attn.q_rms_norm.gamma",
    "blocks.0.self_attn.to_out.bias",
    "blocks.0.self_attn.to_out.weight",
    "blocks.0.self_attn.to_qkv.bias",
    "blocks.0.self_attn.to_qkv.weight",
    "input_layer.bias",
    "input_layer.weight",
    "out_layer.bias",
    "out_layer.weight",
    "t_embedder.mlp.0.bias",
    "t_embedder.mlp.0.weight",
    "t_embedder.mlp.2.bias",
    "t_embedder.mlp.2.weight",
]


def test_parameter_names_are_frozen() -> None:
    for name in ("sparse_structure_flow_model", "tex_slat_flow_model_1024"):
        assert sorted(build_model(*MODELS[name]).state_dict()) == FLOW_KEYS
    shape = set(build_model(*MODELS["shape_slat_decoder"]).state_dict())
    texture = set(build_model(*MODELS["tex_slat_decoder"]).state_dict())
    assert {key for key in shape - texture if "to_subdiv" not in key} == set()
    assert {"blocks.0.0.conv.weight", "blocks.0.1.norm1.weight", "blocks.0.1.to_subdiv.bias"} <= shape
    structure = build_model(*MODELS["sparse_structure_decoder"]).state_dict()
    assert {"input_layer.weight", "middle_block.0.norm1.weight", "blocks.1.conv.weight", "out_layer.2.bias"} <= set(
        structure
    )


def test_published_sizes() -> None:
    """Parameter counts of the published files, from their real configurations."""
    flow = {
        "resolution": 16,
        "in_channels": 8,
        "out_channels": 8,
        "model_channels": 1536,
        "cond_channels": 1024,
        "num_blocks": 30,
        "num_heads": 12,
        "mlp_ratio": 5.3334,
        "pe_mode": "rope",
        "share_mod": True,
        "initialization": "scaled",
        "qk_rms_norm": True,
        "qk_rms_norm_cross": True,
        "dtype": "bfloat16",
    }
    decoder = {
        "model_channels": [1024, 512, 256, 128, 64],
        "latent_channels": 32,
        "num_blocks": [4, 16, 8, 4, 0],
        "block_type": ["SparseConvNeXtBlock3d"] * 5,
        "up_block_type": ["SparseResBlockC2S3d"] * 4,
        "block_args": [{}] * 5,
        "use_fp16": True,
    }
    structure = {"out_channels": 1, "latent_channels": 8, "num_res_blocks": 2, "num_res_blocks_middle": 2}
    models = [
        ("SparseStructureFlowModel", flow, 1292.2, 640),
        ("FlexiDualGridVaeDecoder", {**decoder, "resolution": 256}, 474.2, 292),
        ("SparseUnetVaeDecoder", {**decoder, "out_channels": 6, "pred_subdiv": False}, 474.2, 284),
        ("SparseStructureDecoder", {**structure, "channels": [512, 128, 32], "use_fp16": True}, 73.7, 74),
    ]
    for name, args, millions, tensors in models:
        state = build_model(name, args).state_dict()
        assert sum(v.numel() for v in state.values()) / 1e6 == pytest.approx(millions, abs=0.06), name
        assert len(state) == tensors, name


Damage = Callable[[Path], None]


def _truncate(folder: Path) -> None:
    path = folder / "ckpts/tex_slat_decoder.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _drop_tensor(folder: Path) -> None:
    retensor(folder / "ckpts/shape_slat_decoder.safetensors", lambda s: s.pop("from_latent.bias"))


def _add_tensor(folder: Path) -> None:
    retensor(folder / "ckpts/shape_slat_decoder.safetensors", lambda s: s.update(surprise=torch.zeros(1)))


def _reshape_tensor(folder: Path) -> None:
    retensor(folder / "ckpts/shape_slat_decoder.safetensors", lambda s: s.update({"from_latent.bias": torch.zeros(3)}))


def _unknown_class(folder: Path) -> None:
    edit(folder / "ckpts/tex_slat_decoder.json", lambda c: c.update(name="SparseUnetVaeDecoderV9"))


def _unknown_argument(folder: Path) -> None:
    edit(folder / "ckpts/tex_slat_decoder.json", lambda c: c["args"].update(window_size=8))


def _other_positions(folder: Path) -> None:
    edit(folder / "ckpts/shape_slat_flow_model_512.json", lambda c: c["args"].update(pe_mode="ape"))


def _no_width(folder: Path) -> None:
    edit(folder / "ckpts/shape_slat_flow_model_512.json", lambda c: c["args"].pop("model_channels"))


DAMAGES: dict[str, tuple[Damage, str]] = {
    "no pipeline.json": (lambda f: (f / "pipeline.json").unlink(), r"pipeline\.json is missing; .* fetch it again"),
    "not json": (lambda f: (f / "pipeline.json").write_text("{"), r"pipeline\.json cannot be read as JSON"),
    "json list": (lambda f: (f / "pipeline.json").write_text("[]"), "must hold a JSON object"),
    "other pipeline": (lambda f: edit(f / "pipeline.json", lambda c: c.update(name="X")), "is for 'X'"),
    "no samplers": (
        lambda f: edit(f / "pipeline.json", lambda c: c["args"].pop("tex_slat_sampler")),
        "KeyError: 'tex_slat_sampler'",
    ),
    "unknown sampler": (
        lambda f: edit(f / "pipeline.json", lambda c: c["args"]["tex_slat_sampler"].update(name="Heun")),
        "unknown sampler 'Heun'",
    ),
    "zero std": (
        lambda f: edit(f / "pipeline.json", lambda c: c["args"]["tex_slat_normalization"].update(std=[0.0] * 8)),
        "standard deviations",
    ),
    "no weights": (
        lambda f: (f / "ckpts/tex_slat_decoder.safetensors").unlink(),
        r"tex_slat_decoder\.safetensors is missing",
    ),
    "no config": (
        lambda f: (f / "ckpts/tex_slat_decoder.json").unlink(),
        r"tex_slat_decoder\.json is missing",
    ),
    "truncated": (_truncate, r"tex_slat_decoder\.safetensors is damaged"),
    "missing tensor": (_drop_tensor, r"shape_slat_decoder\.safetensors does not fit .*: missing from_latent\.bias"),
    "extra tensor": (_add_tensor, "unknown surprise"),
    "wrong shape": (_reshape_tensor, r"from_latent\.bias is \(3,\) instead of \(16,\)"),
    "unknown class": (_unknown_class, "unknown class 'SparseUnetVaeDecoderV9'"),
    "unknown argument": (_unknown_argument, "window_size"),
    "absolute positions": (_other_positions, "pe_mode='ape' is not supported"),
    "missing argument": (_no_width, "model_channels"),
    "no image encoder": (lambda f: shutil.rmtree(f / "dinov3"), "image encoder 'dinov3' cannot be loaded"),
    "damaged image encoder": (
        lambda f: (f / "dinov3/model.safetensors").write_bytes(b"x"),
        r"image encoder 'dinov3' cannot be loaded: .*dinov3/model\.safetensors is damaged",
    ),
    "unfit image encoder": (
        lambda f: edit(f / "dinov3/config.json", lambda c: c.update(num_hidden_layers=2)),
        r"dinov3/model\.safetensors does not fit config\.json: missing layer\.1",
    ),
    "other image encoder": (
        lambda f: edit(f / "dinov3/config.json", lambda c: c.update(model_type="vit")),
        r"dinov3/config\.json is not of a DinoV3FeatureExtractor: model_type 'vit'",
    ),
    "unknown image encoder": (
        lambda f: edit(f / "pipeline.json", lambda c: c["args"]["image_cond_model"].update(name="Clip")),
        "image encoder 'dinov3' cannot be loaded: 'Clip' is not a known kind",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint(folder: Path, damage: str) -> None:
    spoil, message = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_networks_left_out_on_purpose(folder: Path) -> None:
    for suffix in ("json", "safetensors"):
        (folder / f"ckpts/tex_slat_decoder.{suffix}").unlink()
    (folder / LEFT_OUT).write_text('["tex_slat_decoder"]')
    assert set(load_checkpoint(folder).models) == set(MODEL_NAMES) - {"tex_slat_decoder"}
    for text, problem in (("{", "cannot be read as JSON"), ('["another"]', "must be a list"), ("{}", "must be a list")):
        (folder / LEFT_OUT).write_text(text)
        with pytest.raises(CheckpointError, match=rf"left_out\.json {problem}"):
            load_checkpoint(folder)


def test_derived_rope_phases_are_tolerated(folder: Path) -> None:
    path = folder / "ckpts/sparse_structure_flow_model.safetensors"
    retensor(path, lambda s: s.update(rope_phases=torch.zeros(512, 6, 2)))
    load_checkpoint(folder)


@pytest.mark.parametrize("name", ["no/such/folder/here", "nowhere", "./nowhere", "/nowhere/at/all"])
def test_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        load_checkpoint(name)


def fake_hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Serve hub downloads from ``root/owner/name``; returns the list of what was asked for."""
    asked: list[tuple[str, str]] = []

    def download(repository: str, path: str) -> str:
        asked.append((repository, path))
        if not (root / repository).is_dir():
            raise LocalEntryNotFoundError("offline")
        if not (root / repository / path).is_file():
            raise EntryNotFoundError("404")
        return str(root / repository / path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_hub_repository_with_a_network_in_another_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published pipeline.json keeps its structure decoder in another repository."""
    hub = tmp_path / "hub"
    (hub / "old/image").mkdir(parents=True)
    (hub / "new").mkdir()
    for suffix in ("json", "safetensors"):
        (folder / f"ckpts/sparse_structure_decoder.{suffix}").rename(hub / f"old/image/ss_dec.{suffix}")
    encoder = str(shutil.move(folder / "dinov3", tmp_path / "dinov3"))

    def point(config: dict[str, Any]) -> None:
        config["args"]["models"]["sparse_structure_decoder"] = "old/image/ss_dec"
        config["args"]["image_cond_model"]["args"]["model_name"] = encoder

    edit(folder / "pipeline.json", point)
    shutil.move(folder, hub / "new/model")
    asked = fake_hub(hub, monkeypatch)
    for source in ("new/model", hub / "new/model"):  # the hub id and a folder resolve alike
        assert set(load_checkpoint(source).models) == set(MODEL_NAMES)
    assert ("old/image", "ss_dec.safetensors") in asked


def test_unreachable_hub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(tmp_path, monkeypatch)
    with pytest.raises(CheckpointError, match=r"owner/name .*cannot be reached"):
        load_checkpoint("owner/name")


# --- matting ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def matting_state() -> dict[str, torch.Tensor]:
    """What a published file holds, at toy size: float16 weights, and what only training needs."""
    with torch.device("meta"):
        model = BiRefNet(MattingConfig(embed_dim=8, depths=(2, 2, 1, 2), heads=(1, 2, 4, 8), window=3))
    state = {key: torch.full(value.shape, 0.1, dtype=torch.float16) for key, value in model.state_dict().items()}
    return state | {key: torch.ones(1, dtype=torch.int64) for key in model.unused_keys()}


def write_matting(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors")
    return folder


def test_matting_network(tmp_path: Path, matting_state: dict[str, torch.Tensor]) -> None:
    folder = write_matting(tmp_path / "BiRefNet", matting_state)
    network = load_matting(folder)
    assert network.config == MattingConfig(embed_dim=8, depths=(2, 2, 1, 2), heads=(1, 2, 4, 8), window=3)
    assert not network.training
    for name, value in network.state_dict().items():
        assert torch.equal(value, matting_state[name].float()), name
    assert not any(p.is_meta or p.requires_grad for p in network.parameters())
    half = load_matting(folder, dtype=torch.float16)
    assert half.decoder.conv_out1[0].weight.dtype == torch.float16  # type: ignore[union-attr]
    assert half.squeeze_module[0].bn_in.running_var.dtype == torch.float32  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("folder", "by_column"),
    [
        ("BiRefNet", False),
        ("RMBG-2.0", True),
        ("rmbg-2.0", True),
        ("models--briaai--RMBG-2.0/snapshots/5df4c9c", True),
        ("models--ZhengPeng7--BiRefNet/snapshots/e2bf8e4", False),
        ("RMBG-2.0/and/BiRefNet", False),
    ],
)
def test_order_of_tiles_follows_the_repository(
    tmp_path: Path, matting_state: dict[str, torch.Tensor], folder: str, by_column: bool
) -> None:
    network = load_matting(write_matting(tmp_path / folder, matting_state))
    assert network.decoder.tiles_by_column == by_column


@pytest.mark.parametrize("name", [DEFAULT_MATTING, "briaai/RMBG-2.0"])
def test_matting_network_in_the_folder_of_the_checkpoint(
    tmp_path: Path, matting_state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked = fake_hub(tmp_path / "hub", monkeypatch)
    write_matting(tmp_path / "checkpoint" / name, matting_state)
    network = load_matting(name, checkpoint=tmp_path / "checkpoint")
    assert network.config.tiles_by_column == (name == "briaai/RMBG-2.0")
    assert asked == []
    with pytest.raises(CheckpointError, match="cannot be reached"):
        load_matting(name, checkpoint=tmp_path)
    assert asked == [(name, "model.safetensors")]
    chosen = write_matting(tmp_path / "mine", matting_state)  # a folder that exists is what was meant
    assert not load_matting(chosen, checkpoint=tmp_path / "checkpoint").config.tiles_by_column
    (tmp_path / "checkpoint" / name / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing; .* fetch it again"):
        load_matting(name, checkpoint=tmp_path / "checkpoint")


@pytest.mark.parametrize("name", [DEFAULT_MATTING, "briaai/RMBG-2.0"])
def test_matting_network_from_the_hub(
    tmp_path: Path, matting_state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_matting(tmp_path / name, matting_state)
    asked = fake_hub(tmp_path, monkeypatch)
    assert load_matting(name).config.tiles_by_column == (name == "briaai/RMBG-2.0")
    assert asked == [(name, "model.safetensors")]  # no code, no configuration


def _without(*keys: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda state: [state.pop(key) for key in keys]


TABLE = "bb.layers.2.blocks.0.attn.relative_position_bias_table"
MATTING_DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (_without("decoder.conv_out1.0.bias"), r"missing decoder\.conv_out1\.0\.bias"),
    "extra": (lambda s: s.update(surprise=torch.zeros(1)), "unknown surprise"),
    "extra like a known one": (
        lambda s: s.update({"decoder.conv_ms_spvn_5.weight": torch.zeros(1)}),
        r"unknown decoder\.conv_ms_spvn_5\.weight",
    ),
    "shape": (
        lambda s: s.update({"squeeze_module.0.bn_in.bias": torch.zeros(3)}),
        r"squeeze_module\.0\.bn_in\.bias is \(3,\) instead of \(64,\)",
    ),
    "no stage": (_without(TABLE), f"missing '{TABLE}'"),
    "flat table": (lambda s: s.update({TABLE: torch.zeros(25)}), "out of range"),
    "another network": (lambda s: [s.clear(), s.update(a=torch.zeros(1))], r"missing 'bb\.layers\.0"),
}


@pytest.mark.parametrize("damage", MATTING_DAMAGES)
def test_damaged_matting_network(tmp_path: Path, matting_state: dict[str, torch.Tensor], damage: str) -> None:
    change, problem = MATTING_DAMAGES[damage]
    state = dict(matting_state)
    change(state)
    path = write_matting(tmp_path / "model", state)
    with pytest.raises(
        CheckpointError,
        match=rf"model\.safetensors is not a BiRefNet: .*{problem}.*; use that of ZhengPeng7/BiRefNet\.",
    ):
        load_matting(path)


def test_matting_network_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing; .* fetch it again"):
        load_matting(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged .*; fetch it again"):
        load_matting(tmp_path)
    with pytest.raises(CheckpointError, match=r"neither a folder nor a hub id .* holds model\.safetensors\."):
        load_matting("nowhere")
    fake_hub(tmp_path, monkeypatch)
    with pytest.raises(
        CheckpointError, match=r"ZhengPeng7/BiRefNet has no model\.safetensors, or it cannot be reached"
    ):
        load_matting()


def test_matting_network_whose_terms_are_not_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(repository: str, path: str) -> str:
        response: Any = SimpleNamespace(headers={}, request=None, status_code=403)
        raise GatedRepoError("403", response=response)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(CheckpointError, match=r"briaai/RMBG-2\.0 is gated; accept its terms .* token\."):
        load_matting("briaai/RMBG-2.0")
