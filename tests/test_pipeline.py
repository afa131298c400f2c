"""The whole pipeline on the tiny random checkpoint: real networks, real files."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from trellis2.errors import Cancelled, CapacityError, CheckpointError, InputError
from trellis2.models import matting
from trellis2.models.matting import BiRefNet, MattingConfig
from trellis2.options import GenerateOptions
from trellis2.pipeline import PRESETS, Files, Generation, Pipeline, structure_grid
from trellis2.voxels import Grid, Voxels

QUICK = {"sparse_structure_steps": 2, "shape_slat_steps": 2, "tex_slat_steps": 2}


def picture(colour: str = "orange") -> Image.Image:
    image = Image.new("RGBA", (96, 80), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((20, 10, 70, 70), fill=colour)
    return image


@pytest.fixture(scope="module")
def pipeline(checkpoint_folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(checkpoint_folder, device="cpu")


def options(**wishes: object) -> GenerateOptions:
    return GenerateOptions(**{"pipeline_type": "512", **QUICK, **wishes})  # type: ignore[arg-type]


def run(pipeline: Pipeline, folder: Path, **wishes: object) -> Files:
    small = {"video_frames": 2, "video_resolution": 64, "decimation_target": 100000, "texture_size": 1024}
    return pipeline.run(picture(), options(**{**small, **wishes}), folder)


def same(a: Generation, b: Generation) -> bool:
    return torch.equal(a.asset.mesh.vertices, b.asset.mesh.vertices) and torch.equal(
        a.asset.material.attrs, b.asset.material.attrs
    )


def test_same_seed_same_asset_other_seed_other_asset(pipeline: Pipeline) -> None:
    state = torch.random.get_rng_state()
    first = pipeline.generate(picture(), options(seed=1))
    assert same(first, pipeline.generate(picture(), options(seed=1)))
    assert not same(first, pipeline.generate(picture(), options(seed=2)))
    assert not same(first, pipeline.generate(picture("blue"), options(seed=1)))
    assert first.seed == 1
    assert torch.equal(state, torch.random.get_rng_state())  # the caller's generator is left alone


def test_random_seed_is_reported_and_reproduces(pipeline: Pipeline) -> None:
    drawn = pipeline.generate(picture(), options(randomize_seed=True))
    again = pipeline.generate(picture(), options(seed=drawn.seed))
    assert same(drawn, again)


@pytest.mark.parametrize(
    "wish",
    [
        {"sparse_structure_steps": 3},
        {"sparse_structure_cfg": 2.0},
        {"shape_slat_steps": 3},
        {"shape_slat_cfg": 2.0},
        {"tex_slat_steps": 3},
        {"tex_slat_cfg": 1.0},
        {"sparse_structure_guidance_rescale": 0.0},
        {"sparse_structure_guidance_interval": (0.0, 0.5)},
        {"sparse_structure_rescale_t": 1.0},
        {"shape_slat_guidance_rescale": 0.0},
        {"shape_slat_guidance_interval": (0.0, 0.5)},
        {"shape_slat_rescale_t": 1.0},
        {"tex_slat_guidance_rescale": 0.5},
        {"tex_slat_guidance_interval": (0.0, 0.3)},
        {"tex_slat_rescale_t": 1.0},
        {"preprocess_image": False},
    ],
    ids=lambda wish: next(iter(wish)),
)
def test_every_sampling_option_changes_the_asset(pipeline: Pipeline, wish: dict[str, object]) -> None:
    plain = pipeline.generate(picture(), options())
    assert not same(plain, pipeline.generate(picture(), options(**wish)))


@pytest.mark.parametrize("pipeline_type", list(PRESETS))
def test_presets_mean_what_they_say(pipeline: Pipeline, pipeline_type: str) -> None:
    generation = pipeline.generate(picture(), options(pipeline_type=pipeline_type, seed=5))
    material = generation.asset.material
    resolution = round(1 / material.voxel_size)
    assert resolution == PRESETS[pipeline_type].resolution
    assert material.coords.amax() < resolution
    vertices = generation.asset.mesh.vertices
    assert vertices.abs().max() <= 0.5 + 1 / resolution
    assert list(generation.timings) == ["prepare", "condition", "structure", "shape", "texture", "decode"]


def test_cascade_falls_to_the_resolution_that_fits(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    coarse = torch.cartesian_prod(*[torch.arange(12)] * 3) + 8
    grid = Grid(torch.cat([torch.zeros(len(coarse), 1), coarse], dim=1).int())
    feats = torch.randn(len(grid), 8, generator=torch.Generator().manual_seed(0))
    sizes = {r: len(pipeline.refine_grid(Voxels(feats, grid), r, 10**9)[0]) for r in (1536, 1408, 1280, 1024)}
    assert sizes[1536] > sizes[1408] > sizes[1280] > sizes[1024]
    assert not caplog.records
    # Below the limit means strictly below it; the floor is taken whatever it needs.
    for limit, resolution in ((sizes[1536] + 1, 1536), (sizes[1536], 1408), (sizes[1280] + 1, 1280), (1, 1024)):
        fitted, chosen = pipeline.refine_grid(Voxels(feats, grid), 1536, limit)
        assert chosen == resolution
        assert len(fitted) == sizes[resolution]
    assert "generated at 1024 instead" in caplog.text


def test_progress_grows_to_one_through_all_stages(pipeline: Pipeline, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int, float]] = []
    small = options(video_frames=2, video_resolution=64, decimation_target=100000, texture_size=1024)
    pipeline.run(picture(), small, tmp_path, lambda *report: seen.append(report))
    fractions = [fraction for *_, fraction in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    stages = list(dict.fromkeys(stage for stage, *_ in seen))
    assert stages == ["prepare", "condition", "structure", "shape", "texture", "decode", "model", "video"]
    assert all(0 <= step <= steps for _, step, steps, _ in seen)
    assert sum(stage == "structure" for stage, *_ in seen) == 3


@pytest.mark.parametrize("stage", ["prepare", "condition", "structure", "shape", "texture", "decode", "model", "video"])
def test_cancel_in_every_stage_leaves_the_pipeline_ready(pipeline: Pipeline, tmp_path: Path, stage: str) -> None:
    def stop(name: str, step: int, steps: int, fraction: float) -> None:
        if name == stage and (step > 0 or steps == 1):
            raise Cancelled("stop")

    small = options(video_frames=2, video_resolution=64, decimation_target=100000, texture_size=1024)
    with pytest.raises(Cancelled):
        pipeline.run(picture(), small, tmp_path, stop)
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= ({"model.glb"} if stage == "video" else set())
    assert len(pipeline.generate(picture(), options()).asset.mesh.faces)


def test_files_are_written_as_asked(pipeline: Pipeline, tmp_path: Path) -> None:
    files = run(pipeline, tmp_path / "new" / "folder", return_no_background=True)
    assert files.no_background_image is not None
    assert files.video is not None
    assert files.model_file is not None
    with Image.open(files.no_background_image) as cutout:
        assert cutout.mode == "RGBA"
    assert files.model_file.read_bytes()[:4] == b"glTF"
    assert b"ftyp" in files.video.read_bytes()[:12]
    assert files.statistics is not None
    assert 0 < files.statistics.faces <= 100000
    assert files.statistics.texture_coverage == 1.0
    assert {"model", "video"} <= set(files.timings)


def test_what_is_not_asked_for_is_not_made(pipeline: Pipeline, tmp_path: Path) -> None:
    files = run(pipeline, tmp_path, generate_video=False, generate_model=False)
    assert list(tmp_path.iterdir()) == []
    assert files.video is None
    assert files.model_file is None
    assert files.statistics is None


def test_same_call_same_bytes(pipeline: Pipeline, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(pipeline, tmp_path / name, return_no_background=True)
    for name in ("model.glb", "no_background.png", "video.mp4"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_callers_picture_is_left_alone(pipeline: Pipeline) -> None:
    image = picture()
    before = np.array(image)
    pipeline.generate(image, options())
    assert np.array_equal(np.array(image), before)
    assert image.mode == "RGBA"


def test_preset_without_its_networks(pipeline: Pipeline) -> None:
    models = {k: v for k, v in pipeline.checkpoint.models.items() if not k.endswith("1024")}
    partial = Pipeline(dataclasses.replace(pipeline.checkpoint, models=models), torch.device("cpu"))
    with pytest.raises(CheckpointError, match=r"has no shape_slat_flow_model_1024.*choose another pipeline_type"):
        partial.generate(picture(), options(pipeline_type="1024"))
    assert len(partial.generate(picture(), options()).asset.mesh.faces)


def test_empty_structure_says_what_to_do() -> None:
    with pytest.raises(InputError, match="another seed"):
        structure_grid(torch.full((1, 1, 64, 64, 64), -1.0), 32)


def test_structure_is_pooled_to_the_preset() -> None:
    logits = torch.full((1, 1, 64, 64, 64), -1.0)
    logits[0, 0, 5, 6, 63] = 1.0
    assert structure_grid(logits, 32).coords.tolist() == [[0, 2, 3, 31]]
    assert structure_grid(logits, 64).coords.tolist() == [[0, 5, 6, 63]]


def test_output_folder_that_cannot_be_made(pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        pipeline.run(picture(), options(), tmp_path / "file" / "folder")


def test_out_of_memory_names_the_smaller_choice(pipeline: Pipeline) -> None:
    def exhaust(*_: object) -> None:
        raise MemoryError

    with pytest.raises(CapacityError, match=r"pipeline_type='512'.*choose a smaller"):
        pipeline.generate(picture(), options(), exhaust)


def test_matting_network_is_loaded_when_a_picture_needs_it(
    checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny_matting()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setenv("TRELLIS2_MATTING", str(tmp_path))
    monkeypatch.setattr(matting, "SIDE", 128)
    pipeline = Pipeline.from_pretrained(checkpoint_folder, device="cpu")
    pipeline.generate(picture(), options())
    assert pipeline._matting is None
    opaque = Image.new("RGB", (96, 64), (240, 240, 240))
    ImageDraw.Draw(opaque).ellipse((20, 10, 70, 50), fill=(200, 30, 40))
    for _ in range(2):
        found = pipeline.generate(opaque, options(preprocess_image=False, return_no_background=True))
        assert found.cutout is not None
        alpha = np.asarray(found.cutout.getchannel("A"))
        assert np.array_equal(alpha, np.asarray(network.matte(opaque)))
        assert alpha.std() > 0
    assert pipeline.generate(opaque, options(preprocess_image=False)).cutout is None
    by_colour = Pipeline.from_pretrained(checkpoint_folder, device="cpu", matting="none")
    by_colour.load_matting()
    assert by_colour.generate(opaque, options()).cutout is not None
    assert by_colour._matting is None
    early = Pipeline.from_pretrained(checkpoint_folder, device="cpu")
    early.load_matting()
    loaded = early._matting
    assert loaded is not None
    early.generate(opaque, options())
    assert early._matting is loaded


def tiny_matting() -> BiRefNet:
    torch.manual_seed(0)
    network = BiRefNet(MattingConfig(embed_dim=16, depths=(2, 2, 4, 2), heads=(1, 2, 4, 8), window=5)).eval()
    for name, value in network.state_dict().items():
        value.normal_(0.0, 0.1)
        if name.endswith("running_var") or ("norm" in name and name.endswith("weight")):
            value.fill_(1.0)
    network.state_dict()["decoder.conv_out1.0.bias"].fill_(3.0)  # most of it is object
    return network.requires_grad_(False)


@pytest.mark.parametrize("value", ["plenty", "1.5", "inf", "nan"])
def test_gpu_memory_that_is_no_use(checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TRELLIS2_GPU_MEMORY", value)
    with pytest.raises(InputError, match="GiB"):
        Pipeline.from_pretrained(checkpoint_folder, device="cpu")
    assert Pipeline.from_pretrained(checkpoint_folder, device="cpu", gpu_memory=8).device.type == "cpu"


def test_model_is_chosen_by_argument_then_environment(
    checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRELLIS2_MODEL", str(checkpoint_folder))
    with caplog.at_level(logging.WARNING):
        assert Pipeline.from_pretrained(device="cpu").checkpoint.source == str(checkpoint_folder)
    assert "untrained" in caplog.text
    with pytest.raises(CheckpointError, match="neither a folder"):
        Pipeline.from_pretrained("nowhere", device="cpu")
