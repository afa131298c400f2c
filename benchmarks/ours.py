"""What is measured of this repository's pipeline."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import av
import torch
from o_voxel import postprocess
from o_voxel.closest import Surface
from o_voxel.repair import fill_holes
from PIL import Image

import trellis2.bake
import trellis2.pipeline
from trellis2.checkpoint import Checkpoint
from trellis2.export import write_glb, write_video
from trellis2.image import prepare
from trellis2.inspect import describe_glb
from trellis2.mesh import Asset, Mesh
from trellis2.options import GenerateOptions
from trellis2.pipeline import PRESETS, Pipeline
from trellis2.render import turntable

from .forced import forced, injection_seconds
from .measure import Gauge, Stopwatch, summary, synchronise
from .models import configurations, evaluations, flow_flops
from .scene import Scene, picture

RESIDENCIES = ("auto", "resident", "streamed")
PUBLISHED_TEXTURE_CFG = 1.0
IMAGE_TOKENS = {512: 1029, 1024: 4101}

# Steps of the bake, by the names under which o_voxel.postprocess calls them; one that is gone is left out.
BAKE_STEPS = (
    "fill_holes",
    "_cleaned",
    "simplify",
    "repair_non_manifold_edges",
    "unify_face_orientations",
    "unwrap",
    "rasterize_uv",
    "Surface",
    "_Field",
    "fill_gaps",
    "_with_normals",
)


def make_pipeline(
    checkpoint: Checkpoint, device: torch.device, residency: str, cap: float | None, matting: bool = False
) -> Pipeline:
    """residency: one of ``RESIDENCIES``. cap: GiB of GPU memory to stay within, None for all.

    matting: with a network that removes backgrounds, which ``forced`` makes when the first picture needs it.
    """
    remover = {"matting": "random"} if matting else {}
    with ExitStack() as stack:
        if residency == "streamed":
            stack.enter_context(patch.object(trellis2.pipeline, "fits", lambda *_: False))
        return Pipeline(checkpoint, device, low_vram=residency != "resident", gpu_memory=cap, **remover)


def small_options() -> dict[str, Any]:
    steps = {f"{stage}_steps": 2 for stage in ("sparse_structure", "shape_slat", "tex_slat")}
    return {**steps, "decimation_target": 100_000, "texture_size": 1024, "video_frames": 2, "video_resolution": 64}


def measure(
    pipeline: Pipeline,
    scene: Scene,
    options: GenerateOptions,
    folder: Path,
    *,
    repeats: int,
    stages: bool,
    files: bool,
    rate: float,
    baseline: int,
    small: bool,
) -> dict[str, Any]:
    """Everything about one preset: one run cold, ``repeats`` warm, and the stages one by one as often.

    rate: FLOP/s of a matrix product. baseline: bytes of the GPU in use by others.
    """
    preset = PRESETS[options.pipeline_type]
    record: dict[str, Any] = {"preset": options.pipeline_type}
    with forced(scene, preset):
        record["injected_mib"] = scene.device_bytes / 2**20
        record["injection_seconds"] = injection_seconds(scene)
        record |= _whole(pipeline, options, folder, repeats, files, baseline)
        if stages:
            record |= _stages(pipeline, options, folder, repeats, files)
    resolution = scene.resolution
    record["tokens"] = {
        "coarse": len(scene.grid(preset.structure)),
        "fine": len(scene.grid(resolution // trellis2.pipeline.LATENT_STRIDE)),
    }
    record |= floor(record["tokens"], options, rate, small)
    return record


def floor(tokens: dict[str, int], options: GenerateOptions, rate: float, small: bool) -> dict[str, Any]:
    """The least time that the matrix products and attention of all flows can take at ``rate`` FLOP/s."""
    preset = PRESETS[options.pipeline_type]
    flows = configurations(small)
    structure = flows["sparse_structure_flow_model"][1]
    calls = {
        "structure": ("sparse_structure", structure, structure["resolution"] ** 3, 512),
        "shape": ("shape_slat", flows["shape_slat_flow_model_1024"][1], tokens["fine"], int(preset.flow)),
        "texture": ("tex_slat", flows["tex_slat_flow_model_1024"][1], tokens["fine"], int(preset.flow)),
    }
    if preset.cascade:
        coarse = flows["shape_slat_flow_model_512"][1]
        calls["coarse shape"] = ("shape_slat", coarse, tokens["coarse"], 512)
    flops = {}
    for name, (stage, args, count, side) in calls.items():
        times = evaluations(stage, getattr(options, f"{stage}_cfg"), getattr(options, f"{stage}_steps"))
        flops[name] = {"evaluations": times, "teraflop_each": flow_flops(count, IMAGE_TOKENS[side], args) / 1e12}
    total = sum(f["evaluations"] * f["teraflop_each"] for f in flops.values())
    return {"flops": flops, "floor_seconds": total * 1e12 / rate}


def _whole(
    pipeline: Pipeline, options: GenerateOptions, folder: Path, repeats: int, files: bool, baseline: int
) -> dict[str, Any]:
    image = _picture(pipeline)
    seconds, parts = [], []
    with Gauge(baseline) as gauge:
        for _ in range(repeats + 1):
            synchronise()
            start = time.perf_counter()
            if files:
                result: Any = pipeline.run(image, options, folder)
            else:
                result = pipeline.generate(image, options)
            synchronise()
            seconds.append(time.perf_counter() - start)
            parts.append(result.timings)
            if not files:
                counts = {"voxels": len(result.asset.material.coords), "faces": len(result.asset.mesh.faces)}
                result = None  # or the next run has it beside its own
    record: dict[str, Any] = {
        "run": "image to files" if files else "image to asset",
        "cold_seconds": seconds[0],
        "run_seconds": summary(seconds[1:] or seconds),
        "run_parts": {name: summary([p[name] for p in parts[1:] or parts]) for name in parts[0]},
        **gauge.report(),
    }
    record |= _checked_files(result, options) if files else counts
    return record


def _checked_files(files: Any, options: GenerateOptions) -> dict[str, Any]:
    """Read back what was written.  Raises AssertionError where it is not what was asked for."""
    facts = describe_glb(files.model_file)
    assert 0 < facts["triangles"] <= options.decimation_target
    assert all(t["size"] == [options.texture_size] * 2 for t in facts["textures"])
    with av.open(str(files.video)) as video:
        frames = [(f.width, f.height) for f in video.decode(video=0)]
    assert frames == [(options.video_resolution,) * 2] * options.video_frames
    return {
        "model": {key: facts[key] for key in ("bytes", "triangles", "vertices")}
        | {"charts": files.statistics.charts, "texture_coverage": files.statistics.texture_coverage},
        "video": {"frames": len(frames), "bytes": files.video.stat().st_size},
    }


def _stages(pipeline: Pipeline, options: GenerateOptions, folder: Path, repeats: int, files: bool) -> dict[str, Any]:
    watch = Stopwatch()
    bake_watch = Stopwatch()
    for number in range(repeats + 1):
        watch.new_round()
        bake_watch.new_round()
        with torch.inference_mode():
            asset = _generate(pipeline, options, watch)
            counts = {"voxels": len(asset.material.coords), "faces": len(asset.mesh.faces)}
            if files:
                with _bake_steps(bake_watch), watch("bake"):
                    model = trellis2.bake.bake(
                        asset, decimation_target=options.decimation_target, texture_size=options.texture_size
                    )
                with watch("write GLB"):
                    write_glb(model, folder / "model.glb")
                del model
                _video(asset, options, folder, watch)
            del asset
        if number == 0:  # warm-up
            watch.rounds.clear()
            bake_watch.rounds.clear()
    return {**counts, "stages": watch.summary(), "bake_steps": bake_watch.summary()}


def _remover(pipeline: Pipeline) -> Any:
    """The pipeline's background removal by a network, None where it has none."""
    return pipeline._matte if getattr(pipeline, "_matting_source", None) else None


def _picture(pipeline: Pipeline) -> Image.Image:
    """A picture with transparency, or one whose background is still to be removed."""
    image = picture()
    if _remover(pipeline) is None:
        return image
    background = Image.new("RGB", image.size, (120, 140, 110))
    background.paste(image, mask=image.getchannel("A"))
    return background


def _generate(pipeline: Pipeline, options: GenerateOptions, watch: Stopwatch) -> Asset:
    """The pipeline's story, each stage timed."""
    preset = PRESETS[options.pipeline_type]
    noise = torch.Generator().manual_seed(options.seed)
    with watch("prepare"):
        rgb = prepare(_picture(pipeline), matting=_remover(pipeline)).rgb
    with watch("condition 512"):
        low = high = pipeline.condition(rgb, 512)
    if options.pipeline_type != "512":
        with watch("condition 1024"):
            high = pipeline.condition(rgb, 1024)
    with watch("structure flow"):
        latent = pipeline.sample_structure(low, options, noise)
    with watch("structure decoder"):
        grid = trellis2.pipeline.structure_grid(pipeline.decode_structure(latent), preset.structure)
    resolution = preset.resolution
    if preset.cascade:
        with watch("coarse shape flow"):
            coarse = pipeline.sample_shape(low, "512", grid, options, noise)
        with watch("upsample"):
            grid, resolution = pipeline.refine_grid(coarse, preset.resolution, options.max_num_tokens)
    with watch("shape flow"):
        shape = pipeline.sample_shape(high, preset.flow, grid, options, noise)
    published = GenerateOptions(
        pipeline_type=options.pipeline_type, tex_slat_cfg=PUBLISHED_TEXTURE_CFG, tex_slat_steps=options.tex_slat_steps
    )
    with watch(f"texture flow, cfg {PUBLISHED_TEXTURE_CFG:g}"):
        pipeline.sample_texture(high, preset.flow, shape, published, noise)
    with watch(f"texture flow, cfg {options.tex_slat_cfg:g}"):
        texture = pipeline.sample_texture(high, preset.flow, shape, options, noise)
    with watch("decode shape"):
        mesh, guide = pipeline.decode_shape(shape, resolution)
    with watch("decode texture"):
        material = pipeline.decode_texture(texture, guide, resolution)
    del guide
    with watch("fill holes"):
        mesh = Mesh(*fill_holes(mesh.vertices, mesh.faces, max_hole_perimeter=trellis2.pipeline.HOLE_PERIMETER))
    return Asset(mesh, material)


def _video(asset: Asset, options: GenerateOptions, folder: Path, watch: Stopwatch) -> None:
    with watch("video"):
        frames = turntable(asset, frames=options.video_frames, resolution=options.video_resolution)
        write_video(frames, folder / "video.mp4")


@contextmanager
def _bake_steps(watch: Stopwatch) -> Iterator[None]:
    """Time what o_voxel.postprocess calls; the rest of the bake is what is left of its time."""
    module: Any = postprocess
    methods = [(Surface, "closest", "closest points")]
    if hasattr(module, "_Field"):
        methods.append((module._Field, "at", "material at points"))
    with ExitStack() as stack:
        for owner, name, label in methods:
            stack.enter_context(patch.object(owner, name, watch.wrap(label, getattr(owner, name))))
        for name in BAKE_STEPS:
            if hasattr(module, name):
                stack.enter_context(patch.object(module, name, watch.wrap(name.strip("_"), getattr(module, name))))
        yield
