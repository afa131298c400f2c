"""What a caller may ask for: the only table of names, defaults, ranges and descriptions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from .errors import InputError

PIPELINE_TYPES = ("512", "1024", "1024_cascade", "1536_cascade")
TEXTURE_FORMATS = ("webp", "png")
ALPHA_MODES = ("auto", "opaque", "mask", "blend")
ENVIRONMENTS = ("studio", "soft", "sunset", "overcast")

_SEED_BITS = 63


@dataclass(frozen=True)
class OptionSpec:
    """One row of the table. ``kind`` is bool, int, float, str, or "interval" (two floats in [0, 1])."""

    name: str
    kind: type | str
    default: Any
    description: str
    ge: float | None
    le: float | None
    choices: tuple[str, ...] | None
    documented: bool
    optional: bool


def _option(
    default: Any,
    kind: type | str,
    description: str,
    *,
    ge: float | None = None,
    le: float | None = None,
    choices: tuple[str, ...] | None = None,
    documented: bool = True,
) -> Any:
    metadata = {
        "kind": kind,
        "description": description,
        "ge": ge,
        "le": le,
        "choices": choices,
        "documented": documented,
    }
    return field(default=default, metadata=metadata)


def _extra(default: Any, kind: type | str, description: str, **limits: Any) -> Any:
    return _option(default, kind, description, documented=False, **limits)


_RESCALE = "Strength of guidance rescale in this stage; empty takes the checkpoint's."
_INTERVAL = "Times between which guidance acts in this stage; empty takes the checkpoint's."
_RESCALE_T = "Time shift of this stage's schedule; empty takes the checkpoint's."


@dataclass(frozen=True)
class GenerateOptions:
    """A caller's wishes, checked once.  Raises InputError naming the option, its value and what is allowed.

    The first block is the documented contract in its documented order; the second refines it.
    """

    seed: int = _option(42, int, "Random seed. The same picture, options and seed give the same asset.")
    randomize_seed: bool = _option(
        False, bool, "Ignore the seed above and draw a new one; it is reported back."
    )
    preprocess_image: bool = _option(
        True, bool, "Remove the background and crop to the object. Off: the picture is used as it is."
    )
    return_no_background: bool = _option(
        False, bool, "Also return the picture with its background removed, as a PNG with alpha."
    )
    generate_video: bool = _option(True, bool, "Render a turntable preview of the asset as an MP4.")
    generate_model: bool = _option(True, bool, "Export the textured model as a GLB.")
    pipeline_type: str = _option(
        "1024_cascade",
        str,
        "Quality preset: 512 is fastest, 1024 balanced, 1024_cascade good (recommended), 1536_cascade finest and slowest.",
        choices=PIPELINE_TYPES,
    )
    sparse_structure_steps: int = _option(
        12, int, "Sampling steps of the coarse structure. More is slower and slightly cleaner.", ge=1, le=50
    )
    sparse_structure_cfg: float = _option(
        7.5, float, "How strongly the coarse structure follows the picture.", ge=0.0, le=15.0
    )
    shape_slat_steps: int = _option(12, int, "Sampling steps of the detailed shape.", ge=1, le=50)
    shape_slat_cfg: float = _option(
        7.5, float, "How strongly the detailed shape follows the picture.", ge=0.0, le=15.0
    )
    tex_slat_steps: int = _option(12, int, "Sampling steps of the material.", ge=1, le=50)
    tex_slat_cfg: float = _option(
        7.5,
        float,
        "How strongly the material follows the picture. Lower it (1 to 3) if colours look oversaturated.",
        ge=0.0,
        le=15.0,
    )
    decimation_target: int = _option(
        1000000, int, "Triangles of the exported model, at most.", ge=100000, le=2000000
    )
    texture_size: int = _option(
        4096, int, "Width and height of the exported textures in pixels.", ge=1024, le=8192
    )

    texture_format: str = _extra("webp", str, "Format of the textures in the GLB.", choices=TEXTURE_FORMATS)
    alpha_mode: str = _extra(
        "auto", str, "glTF alpha mode of the model; auto decides from the baked alpha.", choices=ALPHA_MODES
    )
    video_resolution: int = _extra(
        1024, int, "Width and height of one video panel in pixels (even).", ge=64, le=2048
    )
    video_frames: int = _extra(
        120, int, "Frames of the turntable, which turns once at 15 frames a second.", ge=1, le=720
    )
    video_environment: str = _extra("studio", str, "Light of the turntable.", choices=ENVIRONMENTS)
    video_panels: bool = _extra(
        False, bool, "Show normal, base colour, metallic, roughness and alpha beside the shaded view."
    )
    max_num_tokens: int = _extra(
        49152,
        int,
        "Upper bound of tokens in a cascade; above it the resolution falls by 128 at a time.",
        ge=1024,
        le=1048576,
    )
    sparse_structure_guidance_rescale: float | None = _extra(None, float, _RESCALE, ge=0.0, le=1.0)
    sparse_structure_guidance_interval: tuple[float, float] | None = _extra(None, "interval", _INTERVAL)
    sparse_structure_rescale_t: float | None = _extra(None, float, _RESCALE_T, ge=1.0, le=10.0)
    shape_slat_guidance_rescale: float | None = _extra(None, float, _RESCALE, ge=0.0, le=1.0)
    shape_slat_guidance_interval: tuple[float, float] | None = _extra(None, "interval", _INTERVAL)
    shape_slat_rescale_t: float | None = _extra(None, float, _RESCALE_T, ge=1.0, le=10.0)
    tex_slat_guidance_rescale: float | None = _extra(None, float, _RESCALE, ge=0.0, le=1.0)
    tex_slat_guidance_interval: tuple[float, float] | None = _extra(None, "interval", _INTERVAL)
    tex_slat_rescale_t: float | None = _extra(None, float, _RESCALE_T, ge=1.0, le=10.0)

    def __post_init__(self) -> None:
        for spec in option_specs():
            object.__setattr__(self, spec.name, _checked(spec, getattr(self, spec.name)))
        if self.video_resolution % 2:
            raise InputError(
                f"video_resolution={self.video_resolution} must be even, because H.264 video in 4:2:0 needs it."
            )


def option_specs() -> tuple[OptionSpec, ...]:
    """All rows of the table, documented ones first, in the order of the documentation."""
    return tuple(
        OptionSpec(name=f.name, default=f.default, optional=f.default is None, **f.metadata)
        for f in fields(GenerateOptions)
        if f.default is not MISSING
    )


def _checked(spec: OptionSpec, value: Any) -> Any:
    """Return ``value`` in the option's type, or raise InputError."""
    if value is None and spec.optional:
        return None
    if spec.kind == "interval":
        return _checked_interval(spec, value)
    if spec.kind is bool:
        if not isinstance(value, bool):
            raise InputError(f"{spec.name}={value!r} must be true or false.")
        return value
    if spec.kind is str:
        if value not in (spec.choices or ()):
            raise InputError(f"{spec.name}={value!r} must be one of {', '.join(spec.choices or ())}.")
        return value
    return _checked_number(spec, value)


def _checked_number(spec: OptionSpec, value: Any) -> int | float:
    noun = "a whole number" if spec.kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{spec.name}={value!r} must be {noun}.")
    if spec.kind is int:
        if value != int(value):
            raise InputError(f"{spec.name}={value!r} must be a whole number.")
        value = int(value)
        if value.bit_length() > _SEED_BITS:
            raise InputError(f"{spec.name}={value!r} must fit in 64 bits.")
    else:
        value = float(value)
    if (spec.ge is not None and value < spec.ge) or (spec.le is not None and value > spec.le):
        raise InputError(f"{spec.name}={value} must be between {spec.ge} and {spec.le}.")
    return value


def _checked_interval(spec: OptionSpec, value: Any) -> tuple[float, float]:
    ok = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
    ok = ok and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
    if not ok or not 0.0 <= value[0] <= value[1] <= 1.0:
        raise InputError(f"{spec.name}={value!r} must be two numbers, 0 <= low <= high <= 1.")
    return float(value[0]), float(value[1])
