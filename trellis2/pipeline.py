"""The story: prepare -> condition -> structure -> shape -> texture -> decode -> files."""

from __future__ import annotations

import logging
import math
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from o_voxel.dual_grid import flexible_dual_grid_to_mesh
from o_voxel.repair import fill_holes
from PIL import Image
from torch import Tensor

from .bake import bake
from .checkpoint import DEFAULT_MATTING, Checkpoint, Normalization, load_checkpoint, load_matting
from .errors import CheckpointError, InputError
from .export import write_glb, write_png, write_video
from .image import ImageSource, open_image, prepare
from .memory import Residency, fits, limit_memory, memory_given_back, weight_bytes
from .mesh import Asset, MaterialVoxels, Mesh, MeshStatistics, TexturedMesh
from .models.flow import Flow
from .models.matting import BiRefNet
from .models.voxel_vae import dual_grid_fields
from .options import GenerateOptions
from .progress import OnProgress, OnStep, Progress, ignore_step
from .recording import recorded
from .render import turntable
from .sampling import SamplerOptions, euler
from .version import VERSION
from .voxels import Grid, Refinement, Voxels, full_grid

logger = logging.getLogger("trellis2")

PUBLISHED_MODEL = "microsoft/TRELLIS.2-4B"
EMBEDDED_MODEL = Path(__file__).resolve().parents[1] / "weights" / "embedded"
MODEL_VARIABLE = "TRELLIS2_MODEL"
MEMORY_VARIABLE = "TRELLIS2_GPU_MEMORY"
MATTING_VARIABLE = "TRELLIS2_MATTING"
NO_MATTING = "none"

LATENT_STRIDE = 16  # voxels of the surface per latent voxel, along each axis
CASCADE_START = 512  # resolution whose shape flow starts a cascade
CASCADE_FLOOR = 1024  # a cascade never falls below this resolution
CASCADE_STEP = 128
VIDEO_FPS = 15.0
RECORDED_TOKENS = 6144  # with more, a GPU takes longer for an evaluation than Python for its launches
HOLE_PERIMETER = 0.03  # of holes closed after decoding, in metres

_TOO_LARGE = "The networks do not fit into memory; leave low_vram on, or run on a machine with more memory."
_EMPTY = "The model made an empty surface of this picture; try another seed or a clearer picture."

# Expected share of the time of each stage; only for a bar that moves evenly.
STAGE_WEIGHTS = {
    "prepare": 1.0,
    "condition": 1.0,
    "structure": 6.0,
    "shape": 10.0,
    "texture": 8.0,
    "decode": 4.0,
    "model": 40.0,
    "video": 30.0,
}


@dataclass(frozen=True)
class Preset:
    """What a ``pipeline_type`` means: side of the structure grid, flows used, resolution of the surface."""

    structure: int
    flow: str
    resolution: int
    cascade: bool = False


PRESETS = {
    "512": Preset(structure=32, flow="512", resolution=512),
    "1024": Preset(structure=64, flow="1024", resolution=1024),
    "1024_cascade": Preset(structure=32, flow="1024", resolution=1024, cascade=True),
    "1536_cascade": Preset(structure=32, flow="1024", resolution=1536, cascade=True),
}


@dataclass(frozen=True)
class Generation:
    """A generated asset. ``seed``: the one used. ``timings``: seconds per stage."""

    asset: Asset
    cutout: Image.Image | None
    seed: int
    timings: dict[str, float]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Files:
    """The files of one run, None where not asked for. ``statistics``: of the exported model."""

    no_background_image: Path | None
    video: Path | None
    model_file: Path | None
    seed: int
    timings: dict[str, float]
    statistics: MeshStatistics | None
    warnings: tuple[str, ...]


class Pipeline:
    """A loaded checkpoint, ready to generate.  One call at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        *,
        low_vram: bool = True,
        gpu_memory: float | None = None,
        matting: str | Path | None = None,
    ) -> None:
        """See ``from_pretrained`` for the arguments; matting: None for none."""
        self.checkpoint = checkpoint
        self.device = device
        self._matting_source = matting
        self._matting: BiRefNet | None = None
        models = [*checkpoint.models.values(), checkpoint.image_encoder]
        self.residency = Residency(device, resident=not low_vram or fits(weight_bytes(models), device, gpu_memory))
        if gpu_memory is not None and device.type != "cpu":
            limit_memory(device, gpu_memory)
        with memory_given_back(_TOO_LARGE):
            self.residency.settle(*models)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        low_vram: bool = True,
        gpu_memory: float | None = None,
        matting: str | Path | None = None,
    ) -> Pipeline:
        """Load a checkpoint.

        model: folder or hub id; None takes the environment's TRELLIS2_MODEL, else the published model where a GPU is
        found and the embedded one where not. device: None takes the GPU where there is one.
        low_vram: where not all networks fit on the GPU at once, keep them in host memory and copy each there while it
        computes; False keeps all of them there, fit or not. gpu_memory: GiB of GPU memory to stay within; None takes
        the environment's TRELLIS2_GPU_MEMORY, else all that is free.
        matting: folder or hub id of the network that removes backgrounds, loaded when the first picture needs it:
        ZhengPeng7/BiRefNet or one of its kin, briaai/RMBG-2.0, or "none" to remove them by colour. None takes the
        environment's TRELLIS2_MATTING, else the first of these, or none where the checkpoint has none. A hub id is
        looked for in the checkpoint's folder first.
        Raises CheckpointError, InputError and CapacityError.
        """
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        chosen = model or os.environ.get(MODEL_VARIABLE)
        if not chosen:
            chosen = PUBLISHED_MODEL if target.type == "cuda" else EMBEDDED_MODEL
        limit = _gpu_memory(gpu_memory)
        # Half precision is many times slower than float32 on a CPU.
        checkpoint = load_checkpoint(chosen, dtype=torch.float32 if target.type == "cpu" else None)
        if checkpoint.untrained:
            logger.warning(
                "The model %s is untrained: it shows that the chain works, its shapes mean nothing. "
                "Choose another with --model or %s.",
                checkpoint.source,
                MODEL_VARIABLE,
            )
        remover = matting or os.environ.get(MATTING_VARIABLE)
        if not remover:
            remover = DEFAULT_MATTING if checkpoint.removes_background else NO_MATTING
        return cls(
            checkpoint,
            target,
            low_vram=low_vram,
            gpu_memory=limit,
            matting=None if remover == NO_MATTING else remover,
        )

    def run(
        self,
        image: ImageSource,
        options: GenerateOptions,
        out_dir: str | Path,
        on_progress: OnProgress | None = None,
    ) -> Files:
        """Picture in, files out: no_background.png, model.glb and video.mp4 in ``out_dir``, as the options ask.

        image: see ``trellis2.image.open_image``. on_progress: called with (stage, step, steps, fraction); raise
        ``Cancelled`` from it to stop.  Raises InputError, CheckpointError, CapacityError.
        """
        folder = Path(out_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"Output folder {folder} cannot be made ({error.strerror}); choose another.") from error
        skipped = {"model"} if not options.generate_model else set()
        skipped |= {"video"} if not options.generate_video else set()
        progress = Progress({k: v for k, v in STAGE_WEIGHTS.items() if k not in skipped}, on_progress)
        png, glb, mp4 = (folder / name for name in ("no_background.png", "model.glb", "video.mp4"))
        with torch.inference_mode(), memory_given_back(_smaller(options)):
            return self._run(image, options, progress, png, glb, mp4)

    def generate(
        self, image: ImageSource, options: GenerateOptions, on_progress: OnProgress | None = None
    ) -> Generation:
        """Picture in, asset out; no files.  Arguments and errors as for ``run``."""
        stages = {k: v for k, v in STAGE_WEIGHTS.items() if k not in ("model", "video")}
        with torch.inference_mode(), memory_given_back(_smaller(options)):
            return self._generate(image, options, Progress(stages, on_progress))

    def _run(
        self, image: ImageSource, options: GenerateOptions, progress: Progress, png: Path, glb: Path, mp4: Path
    ) -> Files:
        generation = self._generate(image, options, progress)
        timings = dict(generation.timings)
        cutout = generation.cutout if options.return_no_background else None
        statistics = None
        # Files are packed and written by another thread, while the GPU goes on with the next one.
        with ThreadPoolExecutor(1) as writer:
            written = [] if cutout is None else [writer.submit(write_png, cutout, png)]
            if options.generate_model:
                with _timed(timings, "model"):
                    textured = self._bake(generation, options, progress.stage("model"))
                    statistics = textured.statistics
                    extras = self._extras(options, generation.seed)
                    written.append(
                        writer.submit(write_glb, textured, glb, texture_format=options.texture_format, extras=extras)
                    )
            if options.generate_video:
                with _timed(timings, "video"):
                    frames = turntable(
                        generation.asset,
                        frames=options.video_frames,
                        resolution=options.video_resolution,
                        environment=options.video_environment,
                        panels=options.video_panels,
                        on_step=progress.stage("video"),
                    )
                    write_video(frames, mp4, fps=VIDEO_FPS)
            if written:
                with _timed(timings, "write"):
                    for one in written:
                        one.result()
        return Files(
            no_background_image=png if cutout is not None else None,
            video=mp4 if options.generate_video else None,
            model_file=glb if options.generate_model else None,
            seed=generation.seed,
            timings=timings,
            statistics=statistics,
            warnings=generation.warnings,
        )

    def _bake(self, generation: Generation, options: GenerateOptions, on_step: OnStep) -> TexturedMesh:
        """The model, in host memory."""
        textured = bake(
            generation.asset,
            decimation_target=options.decimation_target,
            texture_size=options.texture_size,
            alpha_mode=options.alpha_mode,
            on_step=on_step,
        )
        return textured.cpu()

    def _generate(self, image: ImageSource, options: GenerateOptions, progress: Progress) -> Generation:
        preset = PRESETS[options.pipeline_type]
        self._require_models(options.pipeline_type)
        seed = secrets.randbelow(2**31) if options.randomize_seed else options.seed
        noise = torch.Generator().manual_seed(seed)
        timings: dict[str, float] = {}

        with _timed(timings, "prepare"):
            on_step = progress.stage("prepare")
            on_step(0, 1)
            prepared = prepare(
                open_image(image),
                preprocess=options.preprocess_image,
                cutout=options.return_no_background,
                matting=None if self._matting_source is None else self._matte,
            )
            on_step(1, 1)
        for warning in prepared.warnings:
            logger.warning("%s", warning)

        with _timed(timings, "condition"):
            on_step = progress.stage("condition")
            low = self.condition(prepared.rgb, 512)
            on_step(1, 2)
            high = low if options.pipeline_type == "512" else self.condition(prepared.rgb, 1024)
            on_step(2, 2)

        with _timed(timings, "structure"):
            latent = self.sample_structure(low, options, noise, progress.stage("structure"))
            grid = structure_grid(self.decode_structure(latent), preset.structure)

        with _timed(timings, "shape"):
            on_step = progress.stage("shape")
            resolution = preset.resolution
            if preset.cascade:
                halves = _halves(on_step)
                coarse = self.sample_shape(low, str(CASCADE_START), grid, options, noise, halves[0])
                grid, resolution = self.refine_grid(coarse, preset.resolution, options.max_num_tokens)
                on_step = halves[1]
            shape = self.sample_shape(high, preset.flow, grid, options, noise, on_step)

        with _timed(timings, "texture"):
            texture = self.sample_texture(high, preset.flow, shape, options, noise, progress.stage("texture"))

        with _timed(timings, "decode"):
            asset = self.decode(shape, texture, resolution, progress.stage("decode"))
        return Generation(asset, prepared.cutout, seed, timings, prepared.warnings)

    def load_matting(self) -> None:
        """Load the network that removes backgrounds, if there is one, now and not with the first picture.

        Raises CheckpointError and CapacityError.
        """
        if self._matting_source is not None and self._matting is None:
            dtype = torch.float32 if self.device.type == "cpu" else torch.float16
            with torch.inference_mode(False):  # weights are to outlive this call
                network = load_matting(self._matting_source, checkpoint=self.checkpoint.source, dtype=dtype)
                with memory_given_back(_TOO_LARGE):
                    self.residency.settle(network)
            self._matting = network

    def _matte(self, image: Image.Image) -> Image.Image:
        """What is the object in an RGB picture, mode L."""
        self.load_matting()
        assert self._matting is not None
        with self.residency.resident(self._matting):
            return self._matting.matte(image)

    def condition(self, image: Image.Image, size: int) -> Tensor:
        """Image tokens (1, L, C) float32 of a square RGB picture at ``size`` pixels."""
        encoder = self.checkpoint.image_encoder
        with self.residency.resident(encoder):
            return encoder.encode(image, size)

    def sample_structure(
        self, cond: Tensor, options: GenerateOptions, noise: torch.Generator, on_step: OnStep = ignore_step
    ) -> Tensor:
        """Latent of the occupancy, (1, C, r, r, r) float32."""
        flow = self._model("sparse_structure_flow_model")
        side, channels = flow.config.resolution, flow.config.in_channels
        start = torch.randn(channels, side**3, generator=noise).T.contiguous().to(self.device)
        sampler = _override(self.checkpoint.structure_sampler, options, "sparse_structure")
        grid = full_grid(side, 1, self.device)
        x = self._sample(flow, start, cond, grid, sampler, on_step)
        return x.T.reshape(1, channels, side, side, side)

    def decode_structure(self, latent: Tensor) -> Tensor:
        """Occupancy logits (1, 1, R, R, R) float32."""
        decoder = self._model("sparse_structure_decoder")
        with self.residency.resident(decoder):
            logits: Tensor = decoder(latent)
        return logits

    def sample_shape(
        self,
        cond: Tensor,
        flow_size: str,
        grid: Grid,
        options: GenerateOptions,
        noise: torch.Generator,
        on_step: OnStep = ignore_step,
    ) -> Voxels:
        """Shape latent on ``grid``, not normalised."""
        flow = self._model(f"shape_slat_flow_model_{flow_size}")
        start = torch.randn(len(grid), flow.config.in_channels, generator=noise).to(self.device)
        sampler = _override(self.checkpoint.shape_sampler, options, "shape_slat")
        x = self._sample(flow, start, cond, grid, sampler, on_step)
        return Voxels(_denormalise(x, self.checkpoint.shape_normalization), grid)

    def refine_grid(self, shape: Voxels, resolution: int, max_num_tokens: int) -> tuple[Grid, int]:
        """Where the fine stage of a cascade has its tokens, and the resolution that they fit.

        The surface that ``shape`` decodes to is quantised to latent voxels of ``resolution``; while that gives
        ``max_num_tokens`` or more, the resolution falls.
        """
        decoder = self._model("shape_slat_decoder")
        with self.residency.resident(decoder):
            surface = decoder.upsample(shape, 4).coords
        for chosen in range(resolution, CASCADE_FLOOR - 1, -CASCADE_STEP):
            scaled = (surface[:, 1:] + 0.5) / CASCADE_START * (chosen // LATENT_STRIDE)
            coords = torch.cat([surface[:, :1], scaled.int()], dim=1).unique(dim=0)
            if len(coords) < max_num_tokens:
                break
        if not len(coords):
            raise InputError(_EMPTY)
        if chosen != resolution:
            logger.warning("The object needs too many tokens at %d; generated at %d instead.", resolution, chosen)
        return Grid(coords), chosen

    def sample_texture(
        self,
        cond: Tensor,
        flow_size: str,
        shape: Voxels,
        options: GenerateOptions,
        noise: torch.Generator,
        on_step: OnStep = ignore_step,
    ) -> Voxels:
        """Material latent on the grid of ``shape``, not normalised."""
        flow = self._model(f"tex_slat_flow_model_{flow_size}")
        known = _normalise(shape.feats, self.checkpoint.shape_normalization)
        channels = flow.config.in_channels - known.shape[1]
        start = torch.randn(len(shape.grid), channels, generator=noise).to(self.device)
        sampler = _override(self.checkpoint.texture_sampler, options, "tex_slat")
        x = self._sample(flow, start, cond, shape.grid, sampler, on_step, known)
        return Voxels(_denormalise(x, self.checkpoint.texture_normalization), shape.grid)

    def decode_shape(self, shape: Voxels, resolution: int) -> tuple[Mesh, list[Refinement]]:
        """The surface as decoded, holes and all, and the refinements that the material follows."""
        decoder = self._model("shape_slat_decoder")
        with self.residency.resident(decoder):
            decoded, steps = decoder(shape)
        dual = dual_grid_fields(decoded, decoder.config.voxel_margin)
        vertices, faces = flexible_dual_grid_to_mesh(
            dual.grid.coords[:, 1:],
            dual.offsets,
            dual.crossed,
            dual.split_weight,
            aabb=[[-0.5, -0.5, -0.5], [0.5, 0.5, 0.5]],
            grid_size=resolution,
        )
        return Mesh(vertices, faces), steps

    def decode_texture(self, texture: Voxels, guide: list[Refinement], resolution: int) -> MaterialVoxels:
        """Material on the voxels of the surface."""
        decoder = self._model("tex_slat_decoder")
        with self.residency.resident(decoder):
            decoded, _ = decoder(texture, guide)
        return MaterialVoxels(decoded.grid.coords[:, 1:], decoded.feats * 0.5 + 0.5, 1 / resolution)

    def decode(self, shape: Voxels, texture: Voxels, resolution: int, on_step: OnStep = ignore_step) -> Asset:
        """Latents -> surface with its small holes closed, and material."""
        on_step(0, 3)
        mesh, guide = self.decode_shape(shape, resolution)
        on_step(1, 3)
        material = self.decode_texture(texture, guide, resolution)
        del guide  # it holds the plans of all convolutions
        on_step(2, 3)
        mesh = Mesh(*fill_holes(mesh.vertices, mesh.faces, max_hole_perimeter=HOLE_PERIMETER))
        if not len(mesh.faces):
            raise InputError(_EMPTY)
        on_step(3, 3)
        return Asset(mesh, material)

    def _sample(
        self,
        flow: Flow,
        start: Tensor,
        cond: Tensor,
        grid: Grid,
        sampler: SamplerOptions,
        on_step: OnStep,
        known: Tensor | None = None,
    ) -> Tensor:
        """Run one flow from noise; ``known``: channels that every call sees beside the noisy ones."""
        on_step(0, sampler.steps)
        x = start
        with self.residency.resident(flow):
            # Copied weights come one after the other, and with little room beside them.
            resting = self.residency.resident_weights
            keys_and_values = flow.keys_and_values(cond) if resting else None

            def evaluate(x: Tensor, t: Tensor, conditional: bool) -> Tensor:
                x = x if known is None else torch.cat([x, known], dim=1)
                velocity: Tensor = flow(x, t, cond, grid, keys_and_values) if conditional else flow(x, t, None, grid)
                return velocity

            short = start.is_cuda and len(start) <= RECORDED_TOKENS
            velocity = recorded(evaluate) if resting and short else evaluate
            for step, x in enumerate(euler(velocity, start, grid.lengths, sampler), 1):  # noqa: B007
                on_step(step, sampler.steps)
        return x

    def _model(self, name: str) -> Any:
        return self.checkpoint.models[name]

    def _require_models(self, pipeline_type: str) -> None:
        preset = PRESETS[pipeline_type]
        names = ["sparse_structure_flow_model", "sparse_structure_decoder", "shape_slat_decoder"]
        names += [
            "tex_slat_decoder",
            f"shape_slat_flow_model_{preset.flow}",
            f"tex_slat_flow_model_{preset.flow}",
        ]
        if preset.cascade:
            names.append(f"shape_slat_flow_model_{CASCADE_START}")
        missing = [name for name in names if name not in self.checkpoint.models]
        if missing:
            raise CheckpointError(
                f"{self.checkpoint.source} has no {', '.join(missing)}, which pipeline_type={pipeline_type!r} needs; "
                "choose another pipeline_type or another checkpoint."
            )

    def _extras(self, options: GenerateOptions, seed: int) -> dict[str, Any]:
        """What the GLB says about its making."""
        extras: dict[str, Any] = {
            "trellis2": VERSION,
            "model": Path(self.checkpoint.source).name,
            "pipeline_type": options.pipeline_type,
            "seed": seed,
        }
        if self.checkpoint.untrained:
            extras["untrained"] = True
        return extras


def _gpu_memory(wish: float | None) -> float | None:
    """The caller's GiB, else the environment's.  Raises InputError where that is too little to start with."""
    value = os.environ.get(MEMORY_VARIABLE) or None if wish is None else wish
    if value is None:
        return None
    try:
        limit = float(value)
    except ValueError as error:
        raise InputError(f"{MEMORY_VARIABLE}={value!r} must be a number of GiB, for example 8.") from error
    if not 2 <= limit < math.inf:
        raise InputError(f"{limit:g} GiB of GPU memory is not enough to start with; allow at least 2.")
    return limit


def structure_grid(logits: Tensor, side: int) -> Grid:
    """Occupied cells of a structure at ``side``^3: logits (1, 1, R, R, R) > 0, pooled where R is finer.

    Raises InputError when nothing is occupied.
    """
    occupied = logits > 0
    ratio = occupied.shape[2] // side
    if ratio > 1:
        occupied = F.max_pool3d(occupied.float(), ratio) > 0.5
    coords = occupied[:, 0].nonzero().int()
    if not len(coords):
        raise InputError(
            "The model found no object in this picture; try another seed, or a picture with one clear object."
        )
    return Grid(coords)


def _override(sampler: SamplerOptions, options: GenerateOptions, stage: str) -> SamplerOptions:
    """The checkpoint's sampler with the caller's wishes for one stage."""
    wishes: Mapping[str, Any] = {
        "steps": getattr(options, f"{stage}_steps"),
        "guidance_strength": getattr(options, f"{stage}_cfg"),
        "guidance_rescale": getattr(options, f"{stage}_guidance_rescale"),
        "guidance_interval": getattr(options, f"{stage}_guidance_interval"),
        "rescale_t": getattr(options, f"{stage}_rescale_t"),
    }
    return replace(sampler, **{key: value for key, value in wishes.items() if value is not None})


def _normalise(x: Tensor, normalization: Normalization) -> Tensor:
    return (x - normalization.mean.to(x.device)) / normalization.std.to(x.device)


def _denormalise(x: Tensor, normalization: Normalization) -> Tensor:
    return x * normalization.std.to(x.device) + normalization.mean.to(x.device)


def _halves(on_step: OnStep) -> tuple[OnStep, OnStep]:
    """Two stages of equal steps that report as one."""
    return (
        lambda step, steps: on_step(step, 2 * steps),
        lambda step, steps: on_step(steps + step, 2 * steps),
    )


@contextmanager
def _timed(timings: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[name] = time.perf_counter() - start


def _smaller(options: GenerateOptions) -> str:
    """What to say where memory runs out."""
    return (
        f"Out of memory at pipeline_type={options.pipeline_type!r}, texture_size={options.texture_size}; "
        "choose a smaller pipeline_type ('512' is the smallest) or texture_size."
    )
