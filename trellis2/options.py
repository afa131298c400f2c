"""What a caller may ask for: the only table of names, defaults, ranges and descriptions."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from numbers import Real
from typing import Any

from .errors import InputError

PIPELINE_TYPES = ("512", "1024", "1024_cascade", "1536_cascade")
TEXTURE_FORMATS = ("webp", "png")
ALPHA_MODES = ("auto", "opaque", "mask", "blend")
ENVIRONMENTS = ("studio", "soft", "sunset", "overcast")

VIDEO_VARIABLES = {
    "TRELLIS2_VIDEO_FRAMES": "video_frames",
    "TRELLIS2_VIDEO_RESOLUTION": "video_resolution",
}

SEED_BITS = 63


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

    @property
    def allowed(self) -> str:
        """What the option takes, to follow "must be" in a sentence."""
        if self.kind is bool:
            return "true or false"
        if self.kind == "interval":
            return "two numbers, 0 <= low <= high <= 1"
        if self.kind is str:
            return f"one of {', '.join(repr(c) for c in self.choices or ())}"
        noun = "a whole number" if self.kind is int else "a number"
        if self.ge is None or self.le is None:
            return f"{noun} of at most {SEED_BITS} bits"
        return f"{noun} from {self.ge:.15g} to {self.le:.15g}"


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
    randomize_seed: bool = _option(False, bool, "Ignore the seed above and draw a new one; it is reported back.")
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
        "Quality preset: 512 is fastest, 1024 balanced, 1024_cascade good (recommended), "
        "1536_cascade finest and slowest.",
        choices=PIPELINE_TYPES,
    )
    sparse_structure_steps: int = _option(
        12, int, "Sampling steps of the coarse structure. More is slower and slightly cleaner.", ge=1, le=50
    )
    sparse_structure_cfg: float = _option(
        7.5, float, "How strongly the coarse structure follows the picture.", ge=0.0, le=15.0
    )
    shape_slat_steps: int = _option(12, int, "Sampling steps of the detailed shape.", ge=1, le=50)
    shape_slat_cfg: float = _option(7.5, float, "How strongly the detailed shape follows the picture.", ge=0.0, le=15.0)
    tex_slat_steps: int = _option(12, int, "Sampling steps of the material.", ge=1, le=50)
    tex_slat_cfg: float = _option(
        7.5,
        float,
        "How strongly the material follows the picture. Lower it (1 to 3) if colours look oversaturated.",
        ge=0.0,
        le=15.0,
    )
    decimation_target: int = _option(1000000, int, "Triangles of the exported model, at most.", ge=100000, le=2000000)
    texture_size: int = _option(4096, int, "Width and height of the exported textures in pixels.", ge=1024, le=8192)

    texture_format: str = _extra("webp", str, "Format of the textures in the GLB.", choices=TEXTURE_FORMATS)
    alpha_mode: str = _extra(
        "auto", str, "The alphaMode of the GLB; auto decides from the baked alpha.", choices=ALPHA_MODES
    )
    video_resolution: int = _extra(1024, int, "Width and height of one video panel in pixels (even).", ge=64, le=2048)
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


def video_settings() -> dict[str, Any]:
    """Options of the turntable that a deployment sets in its environment; raises InputError naming the variable."""
    sizes: dict[str, Any] = {}
    for variable, option in VIDEO_VARIABLES.items():
        if variable in os.environ:
            text = os.environ[variable]
            if not text.isdecimal():
                raise InputError(f"{variable}={text!r} must be a whole number.")
            sizes[option] = int(text)
    GenerateOptions(**sizes)
    return sizes


def _checked(spec: OptionSpec, value: Any) -> Any:
    """Return ``value`` in the option's type, or raise InputError."""
    if value is None and spec.optional:
        return None
    checked = _CHECKS[spec.kind](spec, value)
    if checked is None:
        raise InputError(f"{spec.name}={value!r} must be {spec.allowed}.")
    return checked


def _checked_bool(spec: OptionSpec, value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _checked_choice(spec: OptionSpec, value: Any) -> str | None:
    return value if isinstance(value, str) and value in (spec.choices or ()) else None


def _checked_int(spec: OptionSpec, value: Any) -> int | None:
    if not _is_real(value) or value != int(value) or int(value).bit_length() > SEED_BITS:
        return None
    return int(value) if _within(spec, value) else None


def _checked_float(spec: OptionSpec, value: Any) -> float | None:
    return float(value) if _is_real(value) and _within(spec, value) else None


def _checked_interval(spec: OptionSpec, value: Any) -> tuple[float, float] | None:
    if not isinstance(value, Sequence) or len(value) != 2 or not all(_is_real(v) for v in value):
        return None
    low, high = (float(v) for v in value)
    return (low, high) if 0.0 <= low <= high <= 1.0 else None


_CHECKS: dict[type | str, Callable[[OptionSpec, Any], Any]] = {
    bool: _checked_bool,
    int: _checked_int,
    float: _checked_float,
    str: _checked_choice,
    "interval": _checked_interval,
}


def _is_real(value: Any) -> bool:
    """A finite number of any library; truth values and numerals in strings are none."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and bool(-math.inf < value < math.inf)


def _within(spec: OptionSpec, value: Any) -> bool:
    return (spec.ge is None or value >= spec.ge) and (spec.le is None or value <= spec.le)
