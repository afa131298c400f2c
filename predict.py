"""Cog predictor: one picture in; a cut-out PNG, a turntable MP4 and a textured GLB out.

``cog build`` reads the inputs below from this file's text, so every default, bound and description is a
literal.  They say what ``trellis2/options.py`` says; a test compares the two.

Settings of a deployment (environment):
    TRELLIS2_MODEL             checkpoint to serve: a folder, or the id of a repository on the hub
    TRELLIS2_MATTING           network that removes backgrounds: a folder, a hub id, or none
    TRELLIS2_GPU_MEMORY        GiB of GPU memory to stay within; empty takes what is free
    TRELLIS2_VIDEO_FRAMES      frames of the turntable (120)
    TRELLIS2_VIDEO_RESOLUTION  width and height of the turntable in pixels (1024)
    WARP_CACHE_PATH            where compiled kernels of Warp are kept, and
    TRITON_CACHE_DIR           those of Triton; the build of the image fills both

How it ends, as ``GET /health-check`` and the exit code of the server show it:
    setup failed    SETUP_FAILED, the reason in ``setup.logs``; predictions answer 503
    SIGTERM         the running prediction is finished and answered, then the server exits with 0
    worker killed   its prediction fails with "Worker crashed"; UNHEALTHY, and predictions answer 409 until the
                    server is started again
    server killed   the worker ends too
"""

from __future__ import annotations

import pathlib
import shutil
import tempfile
from typing import Optional

from cog import BaseModel, BasePredictor, Input, Path

from trellis2.errors import InputError
from trellis2.options import GenerateOptions, video_settings
from trellis2.pipeline import Pipeline
from trellis2.warmup import warm_up

# Where the server leaves answers that were too large for its pipe; it never deletes them.
SERVER_FILES = pathlib.Path("/tmp/coglet/predictions")


class Output(BaseModel):  # type: ignore[misc]
    """Files of one prediction; null where one was not asked for."""

    no_background_image: Optional[Path] = None  # noqa: UP045 (Cog's own form)
    video: Optional[Path] = None  # noqa: UP045
    model_file: Optional[Path] = None  # noqa: UP045


class Predictor(BasePredictor):  # type: ignore[misc]
    """Loads the model once and answers one prediction at a time."""

    def setup(self) -> None:
        self.video = video_settings()
        self.outputs = pathlib.Path(tempfile.mkdtemp(prefix="trellis2-"))
        self.pipeline = Pipeline.from_pretrained()
        self.pipeline.load_matting()  # so that no prediction has to wait for it, or for a network
        if self.pipeline.device.type == "cuda":
            warm_up(self.pipeline)

    def predict(
        self,
        image: Path = Input(  # noqa: B008 (Cog's own form)
            description="Picture of one object, with or without a transparent background.",
            accept="image/*",
        ),
        seed: int = Input(
            description="Random seed. The same picture, options and seed give the same asset.",
            default=42,
        ),
        randomize_seed: bool = Input(
            description="Ignore the seed above and draw a new one; it is reported back.",
            default=False,
        ),
        preprocess_image: bool = Input(
            description="Remove the background and crop to the object. Off: the picture is used as it is.",
            default=True,
        ),
        return_no_background: bool = Input(
            description="Also return the picture with its background removed, as a PNG with alpha.",
            default=False,
        ),
        generate_video: bool = Input(
            description="Render a turntable preview of the asset as an MP4.",
            default=True,
        ),
        generate_model: bool = Input(
            description="Export the textured model as a GLB.",
            default=True,
        ),
        pipeline_type: str = Input(
            description="Quality preset: 512 is fastest, 1024 balanced, 1024_cascade good (recommended), 1536_cascade finest and slowest.",  # noqa: E501
            default="1024_cascade",
            choices=["512", "1024", "1024_cascade", "1536_cascade"],
        ),
        sparse_structure_steps: int = Input(
            description="Sampling steps of the coarse structure. More is slower and slightly cleaner.",
            default=12,
            ge=1,
            le=50,
        ),
        sparse_structure_cfg: float = Input(
            description="How strongly the coarse structure follows the picture.",
            default=7.5,
            ge=0.0,
            le=15.0,
        ),
        shape_slat_steps: int = Input(
            description="Sampling steps of the detailed shape.",
            default=12,
            ge=1,
            le=50,
        ),
        shape_slat_cfg: float = Input(
            description="How strongly the detailed shape follows the picture.",
            default=7.5,
            ge=0.0,
            le=15.0,
        ),
        tex_slat_steps: int = Input(
            description="Sampling steps of the material.",
            default=12,
            ge=1,
            le=50,
        ),
        tex_slat_cfg: float = Input(
            description="How strongly the material follows the picture. Lower it (1 to 3) if colours look oversaturated.",  # noqa: E501
            default=7.5,
            ge=0.0,
            le=15.0,
        ),
        decimation_target: int = Input(
            description="Triangles of the exported model, at most.",
            default=1000000,
            ge=100000,
            le=2000000,
        ),
        texture_size: int = Input(
            description="Width and height of the exported textures in pixels.",
            default=4096,
            ge=1024,
            le=8192,
        ),
    ) -> Output:
        self.delete_outputs()
        options = GenerateOptions(
            seed=seed,
            randomize_seed=randomize_seed,
            preprocess_image=preprocess_image,
            return_no_background=return_no_background,
            generate_video=generate_video,
            generate_model=generate_model,
            pipeline_type=pipeline_type,
            sparse_structure_steps=sparse_structure_steps,
            sparse_structure_cfg=sparse_structure_cfg,
            shape_slat_steps=shape_slat_steps,
            shape_slat_cfg=shape_slat_cfg,
            tex_slat_steps=tex_slat_steps,
            tex_slat_cfg=tex_slat_cfg,
            decimation_target=decimation_target,
            texture_size=texture_size,
            **self.video,
        )
        try:
            # As a stream, so that messages do not name the temporary file that the picture arrived in.
            with checked_image(image).open("rb") as picture:
                files = self.pipeline.run(picture, options, self.outputs, ProgressLines())
        except BaseException:  # a cancelled prediction (CancelationException) leaves no files either
            self.delete_outputs()
            raise
        self.record_metric("seed", files.seed)
        for stage, seconds in files.timings.items():
            self.record_metric(f"timings.{stage}", round(seconds, 3))
        if files.statistics is not None:
            self.record_metric("faces", files.statistics.faces)
        return Output(
            no_background_image=cog_path(files.no_background_image),
            video=cog_path(files.video),
            model_file=cog_path(files.model_file),
        )

    def delete_outputs(self) -> None:
        """Delete what the previous prediction left; Cog itself deletes none of it."""
        shutil.rmtree(self.outputs, ignore_errors=True)
        self.outputs.mkdir(parents=True)
        for left_over in SERVER_FILES.glob("*/outputs/spill_*.json"):
            left_over.unlink(missing_ok=True)


class ProgressLines:
    """Prints lines such as `` 40%|####      | 2/5 shape``, which the replicate client reads as progress.

    The percentage is of the whole run and only grows; the counts are those of the stage.
    """

    def __init__(self) -> None:
        self.last = (-1, "")

    def __call__(self, stage: str, step: int, steps: int, fraction: float) -> None:
        percent = int(100 * fraction)
        if (percent, stage) != self.last:
            self.last = (percent, stage)
            line = f"{percent:3d}%|{'#' * (percent // 10):<10}| {step}/{steps} {stage}"
            print(line, flush=True)  # noqa: T201 (what is printed is the prediction's log)


def checked_image(image: object) -> pathlib.Path:
    """Return the picture's file, or raise InputError for what Cog lets through."""
    if not isinstance(image, pathlib.Path):
        raise InputError(f"image={str(image)[:80]!r} is not a picture: upload a file, or give an http(s) or data URL.")
    if image.stat().st_size == 0:
        raise InputError("image is empty: upload a picture, or check the base64 text of its data URL.")
    return image


def cog_path(path: pathlib.Path | None) -> Path | None:
    return None if path is None else Path(path)
