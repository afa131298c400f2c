"""The same measurements of the original implementation, from a checkout of microsoft/TRELLIS.2.

    python -m benchmarks --original CHECKOUT[:FOLDER...] --json PATH

It runs in a process of its own, whose module path begins with the checkout and the given folders, because two of its
packages are named as ours.  Its dependencies are the user's to install, into this Python or into those folders:
flex_gemm, easydict, torchvision and its compiled o_voxel for everything, cumesh and nvdiffrast for the GLB, also
nvdiffrec_render, utils3d and imageio for the video.  What needs a missing one is left out and named in the result.
Where flash_attn is missing, torch's own FlashAttention-2 takes its place.

The original is imported, and its decisions are replaced by forward hooks as in ``benchmarks.forced``; its modules stay
as they are.  Differences from a plain use of it are listed under "deviations" of each result.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import torch
import torch.nn.functional as F
from torch import Tensor

from . import measure
from .measure import Gauge, Stopwatch, say, summary, synchronise
from .models import LATENT, SAMPLERS, SIGMA_MIN, configurations, image_encoder_config, randomise
from .scene import Scene, Subdivision, picture

REPOSITORY = Path(__file__).resolve().parents[1]
PRESETS = {  # side of the structure, resolution, whether a cascade
    "512": (32, 512, False),
    "1024": (64, 1024, False),
    "1024_cascade": (32, 1024, True),
    "1536_cascade": (32, 1536, True),
}
OPTIONAL = ("cumesh", "nvdiffrast.torch", "nvdiffrec_render.light", "utils3d", "imageio", "plyfile")
FOR_GLB = ("cumesh", "nvdiffrast.torch")
FOR_VIDEO = (*FOR_GLB, "nvdiffrec_render.light", "utils3d", "imageio")
DEVICE = torch.device("cuda")
BOX = [[-0.5, -0.5, -0.5], [0.5, 0.5, 0.5]]

Merge = Callable[[dict[str, Any], list[dict[str, Any]]], None]


def run(options: argparse.Namespace, merge: Merge) -> int:
    """Start the process of the original and merge what it measures."""
    folders = [str(Path(folder).resolve()) for folder in options.original.split(os.pathsep)]
    checkout = Path(folders[0])
    if not (checkout / "trellis2" / "pipelines").is_dir():
        say(f"{checkout} is no checkout of the original: it has no trellis2/pipelines.")
        return 2
    if any((checkout / "o-voxel" / "o_voxel").glob("_C*.so")):
        folders.append(str(checkout / "o-voxel"))
    environment = dict(os.environ)
    inherited = environment.get("PYTHONPATH", "").split(os.pathsep)
    environment["PYTHONPATH"] = os.pathsep.join([*folders, *filter(None, inherited)])
    environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as its example sets it
    program = f"import sys; sys.path.append({str(REPOSITORY)!r}); from benchmarks.original import worker; worker()"
    residencies = {"auto": ["resident", "moved"], "resident": ["resident"], "streamed": ["moved"]}[options.residency]
    if options.cap is not None:
        residencies = ["moved"]
    with tempfile.TemporaryDirectory() as folder, measure.balloon(options.cap) if options.cap else nullcontext():
        out = Path(folder) / "original.json"
        wishes = {
            "presets": options.presets,
            "residencies": residencies,
            "repeats": options.repeats,
            "files": not options.no_files,
            "cap": options.cap,
            "folder": str(Path(options.keep_files).resolve()) if options.keep_files else folder,
            "out": str(out),
        }
        process = subprocess.Popen([sys.executable, "-c", program, json.dumps(wishes)], cwd=folder, env=environment)
        code = None
        while code is None:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(10)
            if out.exists():  # whatever is there: its last part can outlast anybody's patience
                found = json.loads(out.read_text())
                merge(found["machine"], found["runs"])
    return code


def worker() -> None:
    """The process of the original.  Writes {"machine", "runs"} after every part of every preset."""
    wishes = json.loads(sys.argv[1])
    baseline = measure.device_baseline(wishes["cap"])
    deviations: list[str] = []
    missing = _imports(deviations)
    facts = {"original_" + key: value for key, value in measure.machine(DEVICE).items() if key in ("device", "torch")}
    facts["original_matmul_teraflops"] = measure.matmul_rate(DEVICE) / 1e12
    runs: list[dict[str, Any]] = []
    failed = False
    pipeline = _pipeline(deviations)

    def save() -> None:
        part = Path(wishes["out"]).with_suffix(".part")
        part.write_text(json.dumps({"machine": facts, "runs": runs}))
        part.rename(wishes["out"])

    for residency in wishes["residencies"]:
        _settle(pipeline, residency)
        for preset in wishes["presets"]:
            record: dict[str, Any] = {
                "implementation": "original",
                "preset": preset,
                "residency": residency,
                "cap_gib": wishes["cap"],
                "small": False,
                "matting": False,
                "run": "image to asset",
                "missing": missing,
                "deviations": deviations,
            }
            runs.append(record)
            # The files do not depend on where the networks rest.
            files = wishes["files"] and residency == wishes["residencies"][0]
            try:
                _measure(pipeline, preset, record, Path(wishes["folder"]), wishes["repeats"], files, baseline, save)
            except Exception as error:  # the other presets are still worth measuring
                traceback.print_exc()
                record["error"] = f"{type(error).__name__}: {error}"
                failed = True
            torch.cuda.empty_cache()
            save()
    sys.exit(1 if failed else 0)


def _imports(deviations: list[str]) -> list[str]:
    """Make the original importable; returns the optional modules that are missing.  Exits where it cannot be."""
    missing = []
    for name in OPTIONAL:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
            for part in (name.split(".")[0], name):
                if sys.modules.get(part) is None:
                    sys.modules[part] = MagicMock()
    try:
        importlib.import_module("flash_attn")
    except ImportError:
        sys.modules["flash_attn"] = _attention_stand_in()
        deviations.append("flash_attn is missing: torch's FlashAttention-2 kernels are used")
    problems = []
    # The compiled part tells the original's o_voxel from ours, whose conversions go by the same names.
    for name in ("flex_gemm", "o_voxel._C", "easydict", "trellis2.pipelines.trellis2_image_to_3d"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            problems.append(f"{name}: {error}")
    if problems:
        sys.exit("The original cannot be measured here.\n" + "\n".join(problems))
    if "cumesh" in missing:
        deviations.append("cumesh is missing: holes are not filled")
    return missing


def _attention_stand_in() -> Any:
    """The functions of flash_attn that the original calls, on torch's own FlashAttention-2 kernels."""

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        forward = torch.ops.aten._flash_attention_forward
        out: Tensor = forward(q, k, v, None, None, q.shape[1], k.shape[1], 0.0, False, False)[0]
        return out

    def packed(q: Tensor, k: Tensor, v: Tensor, *ends_and_longest: Any) -> Tensor:
        ends_q, ends_k, most_q, most_k = ends_and_longest
        forward = torch.ops.aten._flash_attention_forward
        out: Tensor = forward(q, k, v, ends_q.int(), ends_k.int(), most_q, most_k, 0.0, False, False)[0]
        return out

    module: Any = types.ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)  # transformers asks for it
    module.flash_attn_func = dense
    module.flash_attn_kvpacked_func = lambda q, kv: dense(q, *kv.unbind(2))
    module.flash_attn_qkvpacked_func = lambda qkv: dense(*qkv.unbind(2))
    module.flash_attn_varlen_func = packed
    module.flash_attn_varlen_kvpacked_func = lambda q, kv, *rest: packed(q, *kv.unbind(1), *rest)
    module.flash_attn_varlen_qkvpacked_func = lambda qkv, ends, most: packed(*qkv.unbind(1), ends, ends, most, most)
    return module


def _pipeline(deviations: list[str]) -> Any:
    """The original's pipeline with random weights, all on the device."""
    models: Any = importlib.import_module("trellis2.models")
    samplers: Any = importlib.import_module("trellis2.pipelines.samplers")
    features: Any = importlib.import_module("trellis2.modules.image_feature_extractor")
    kind: Any = importlib.import_module("trellis2.pipelines.trellis2_image_to_3d").Trellis2ImageTo3DPipeline
    networks = {}
    for number, (name, (network, args)) in enumerate(configurations().items()):
        with torch.device(DEVICE):
            model = getattr(models, network)(**args)
        randomise(model.named_parameters(), number)
        networks[name] = model.eval().requires_grad_(False)
    with torch.device(DEVICE):
        sizes = {name: value for name, value in image_encoder_config().items() if name != "model_type"}
        encoder = features.DINOv3ViTModel(features.DINOv3ViTModel.config_class(**sizes)).eval().requires_grad_(False)
    randomise(encoder.named_parameters())
    with patch.object(features.DINOv3ViTModel, "from_pretrained", lambda *_: encoder):
        extractor = features.DinoV3FeatureExtractor("random")
    if not hasattr(encoder, "layer"):
        type(encoder).layer = property(lambda self: self.model.layer)
        deviations.append("DINOv3's blocks are looked up where transformers 5 keeps them")
    normalization = {"mean": [0.0] * LATENT, "std": [2.0] * LATENT}
    sampler = samplers.FlowEulerGuidanceIntervalSampler
    settings = {f"{stage}_sampler": sampler(sigma_min=SIGMA_MIN) for stage in SAMPLERS}
    settings |= {f"{stage}_sampler_params": dict(values) for stage, values in SAMPLERS.items()}
    pipeline = kind(
        models=networks,
        shape_slat_normalization=normalization,
        tex_slat_normalization=normalization,
        image_cond_model=extractor,
        rembg_model=None,
        low_vram=False,
        **settings,
    )
    pipeline.to(DEVICE)
    return pipeline


def _settle(pipeline: Any, residency: str) -> None:
    for model in (*pipeline.models.values(), pipeline.image_cond_model):
        model.to(DEVICE if residency == "resident" else torch.device("cpu"))
    pipeline.low_vram = residency != "resident"
    pipeline._device = DEVICE
    torch.cuda.empty_cache()


def _measure(
    pipeline: Any,
    preset: str,
    record: dict[str, Any],
    folder: Path,
    repeats: int,
    files: bool,
    baseline: int,
    save: Callable[[], None],
) -> None:
    scene = Scene(PRESETS[preset][1], DEVICE)
    watch, published = Stopwatch(), Stopwatch()
    seconds = []
    asset = None
    with _forced(pipeline, scene, preset, record["missing"]):
        # The documented default guides the texture too, which the checkpoint does not.
        wishes = {"pipeline_type": preset, "tex_slat_sampler_params": {"guidance_strength": 7.5}}
        with _timed(pipeline, preset, watch, "7.5"), Gauge(baseline) as gauge:
            for _ in range(repeats + 1):
                asset = None  # or the next run has it beside its own
                watch.new_round()
                synchronise()
                start = time.perf_counter()
                (asset,) = pipeline.run(picture(), **wishes)
                synchronise()
                seconds.append(time.perf_counter() - start)
        with _timed(pipeline, preset, published, "1"):
            published.new_round()
            pipeline.run(picture(), pipeline_type=preset)
    watch.rounds = watch.rounds[1:] or watch.rounds
    name = "texture flow, cfg 1"
    record |= {
        "cold_seconds": seconds[0],
        "run_seconds": summary(seconds[1:] or seconds),
        "stages": watch.summary() | {name: published.summary()[name]},
        "voxels": len(asset.coords),
        "faces": len(asset.faces),
        **gauge.report(),
    }
    record["tokens"] = {"coarse": len(scene.grid(PRESETS[preset][0])), "fine": len(scene.grid(scene.resolution // 16))}
    if files:
        for needs, part in ((FOR_VIDEO, _video), (FOR_GLB, _model)):
            lacking = [name for name in needs if name in record["missing"]]
            if lacking:
                record["deviations"] = [*record["deviations"], f"{part.__name__[1:]} not made without {lacking}"]
                continue
            save()
            try:
                with Gauge(baseline) as gauge:
                    part(asset, record, folder)
                record[f"{part.__name__[1:]}_memory"] = gauge.report()
            except Exception as error:  # one part may fail on this machine and the other not
                traceback.print_exc()
                record[f"{part.__name__[1:]}_error"] = f"{type(error).__name__}: {error}"


@contextmanager
def _forced(pipeline: Any, scene: Scene, preset: str, missing: list[str]) -> Iterator[None]:
    """The scene's decisions in place of the networks', whose layers still run."""
    structure, resolution, cascade = PRESETS[preset]
    fine = resolution // 16
    scene.fields(fine)
    torch.cuda.empty_cache()
    shape, texture = pipeline.models["shape_slat_decoder"], pipeline.models["tex_slat_decoder"]
    sample_structure, upsample = pipeline.sample_sparse_structure, shape.upsample
    following = [Subdivision(scene, fine)]

    def scene_structure(*args: Any, **kwargs: Any) -> Tensor:
        sample_structure(*args, **kwargs)
        return F.pad(scene.grid(structure), (1, 0))

    def scene_upsample(slat: Any, upsample_times: int) -> Tensor:
        following[0] = Subdivision(scene, structure)
        upsample(slat, upsample_times)
        # The pipeline quantises these voxels of the coarse resolution to tokens: one in each token will do.
        inside = ((scene.grid(fine).double() + 0.5) / fine * 16 * structure).floor().int()
        return F.pad(inside, (1, 0))

    def begin(*_: Any) -> None:
        following[0] = Subdivision(scene, fine)

    def subdivide(_: Any, __: Any, logits: Any) -> Any:
        return logits.replace(following[0].next().to(logits.feats.dtype) * 2 - 1)

    def surface(_: Any, __: Any, out: Any) -> None:
        fields = scene.fields(fine)
        margin = shape.voxel_margin
        out.feats[:, :3] = ((fields.offsets.float() + margin) / (1 + 2 * margin)).clamp(1e-4, 1 - 1e-4).logit()
        out.feats[:, 3:6] = fields.crossed.float() * 2 - 1

    def material(_: Any, __: Any, out: Any) -> None:
        out.feats.copy_(scene.fields(fine).material).div_(127.5).sub_(1)

    with ExitStack() as stack:
        hooks = [
            shape.register_forward_pre_hook(begin),
            shape.output_layer.register_forward_hook(surface),
            texture.register_forward_hook(material),
        ]
        hooks += [m.register_forward_hook(subdivide) for name, m in shape.named_modules() if name.endswith("to_subdiv")]
        for hook in hooks:
            stack.callback(hook.remove)
        stack.enter_context(patch.object(pipeline, "sample_sparse_structure", scene_structure))
        if cascade:
            stack.enter_context(patch.object(shape, "upsample", scene_upsample))
        if "cumesh" in missing:
            meshes: Any = importlib.import_module("trellis2.representations.mesh.base")
            stack.enter_context(patch.object(meshes.Mesh, "fill_holes", lambda *_: None))
        yield


@contextmanager
def _timed(pipeline: Any, preset: str, watch: Stopwatch, cfg: str) -> Iterator[None]:
    """Time the parts of a run under the names that ``benchmarks.ours`` uses.

    With weights that are moved, the moves are part of the whole run and of no stage, but for the encoder.
    """
    flows = {
        "sparse_structure_flow_model": "structure flow",
        "shape_slat_flow_model_1024": "shape flow",
        "shape_slat_flow_model_512": "coarse shape flow" if PRESETS[preset][2] else "shape flow",
        "tex_slat_flow_model_512": f"texture flow, cfg {cfg}",
        "tex_slat_flow_model_1024": f"texture flow, cfg {cfg}",
    }
    names = {id(pipeline.models[model]): name for model, name in flows.items()}
    condition = pipeline.get_cond
    meshes: Any = importlib.import_module("trellis2.representations.mesh.base")

    def timed_condition(images: Any, resolution: int, *args: Any) -> Any:
        with watch(f"condition {resolution}"):
            return condition(images, resolution, *args)

    def timed_sampler(sample: Callable[..., Any]) -> Callable[..., Any]:
        def timed(model: Any, *args: Any, **kwargs: Any) -> Any:
            with watch(names[id(model)]):
                return sample(model, *args, **{**kwargs, "verbose": False})

        return timed

    with ExitStack() as stack:
        stack.enter_context(patch.object(pipeline, "get_cond", timed_condition))
        for stage in SAMPLERS:
            sampler = getattr(pipeline, f"{stage}_sampler")
            stack.enter_context(patch.object(sampler, "sample", timed_sampler(sampler.sample)))
        for model, name in (
            ("sparse_structure_decoder", "structure decoder"),
            ("shape_slat_decoder", "decode shape"),
            ("tex_slat_decoder", "decode texture"),
        ):
            decoder = pipeline.models[model]
            stack.enter_context(patch.object(decoder, "forward", watch.wrap(name, decoder.forward)))
        upsample = pipeline.models["shape_slat_decoder"].upsample
        stack.enter_context(
            patch.object(pipeline.models["shape_slat_decoder"], "upsample", watch.wrap("upsample", upsample))
        )
        fill = watch.wrap("fill holes", meshes.Mesh.fill_holes)
        stack.enter_context(patch.object(meshes.Mesh, "fill_holes", fill))
        yield


def _model(asset: Any, record: dict[str, Any], folder: Path) -> None:
    """The GLB as the original's example makes it; once, for it takes minutes."""
    postprocess: Any = importlib.import_module("o_voxel.postprocess")
    cumesh: Any = importlib.import_module("cumesh")
    watch, steps = Stopwatch(), Stopwatch()
    watch.new_round()
    steps.new_round()
    with ExitStack() as stack:
        for owner, name, label in (
            (cumesh.CuMesh, "fill_holes", "fill_holes"),
            (cumesh.CuMesh, "simplify", "simplify"),
            (cumesh.CuMesh, "uv_unwrap", "unwrap"),
            (cumesh, "cuBVH", "Surface"),
            (getattr(cumesh, "remeshing", None), "remesh_narrow_band_dc", "remesh"),
            (postprocess, "grid_sample_3d", "material at points"),
            (postprocess.cv2, "inpaint", "fill_gaps"),
        ):
            if hasattr(owner, name):
                stack.enter_context(patch.object(owner, name, steps.wrap(label, getattr(owner, name))))
        with watch("bake"):
            model = postprocess.to_glb(
                vertices=asset.vertices,
                faces=asset.faces,
                attr_volume=asset.attrs,
                coords=asset.coords,
                attr_layout=asset.layout,
                voxel_size=asset.voxel_size,
                aabb=BOX,
                decimation_target=1_000_000,
                texture_size=4096,
                remesh=True,
                remesh_band=1,
                remesh_project=0,
            )
    with watch("write GLB"):
        model.export(str(folder / "original.glb"), extension_webp=True)
    record["stages"] |= watch.summary()
    record["bake_steps"] = steps.summary()
    record["model"] = {"bytes": (folder / "original.glb").stat().st_size, "triangles": len(model.faces)}


def _video(asset: Any, record: dict[str, Any], folder: Path) -> None:
    """The turntable as the original's example makes it, under a procedural sky; once."""
    renderers: Any = importlib.import_module("trellis2.renderers")
    utilities: Any = importlib.import_module("trellis2.utils.render_utils")
    imageio: Any = importlib.import_module("imageio")
    height = torch.linspace(0, 1, 256, device=DEVICE)[:, None, None].expand(256, 512, 3)
    watch = Stopwatch()
    watch.new_round()
    with suppress(AttributeError):
        asset.simplify(16_777_216)  # the most that its rasteriser takes
    with watch("video"):
        sky = renderers.EnvMap((0.2 + 1.5 * (1 - height)).contiguous())
        frames = utilities.render_video(asset, envmap=sky, resolution=1024, num_frames=120)
        imageio.mimsave(str(folder / "original.mp4"), utilities.make_pbr_vis_frames(frames), fps=15)
    record["stages"] |= watch.summary()
