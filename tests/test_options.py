"""The table of options against the user's documentation, whose facts stand here as literals."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest

from trellis2.errors import InputError
from trellis2.options import ENVIRONMENTS, PIPELINE_TYPES, GenerateOptions, option_specs

# Name, type, default and range, in the documented order.
DOCUMENTED: list[tuple[str, type, Any, tuple[float, float] | None]] = [
    ("seed", int, 42, None),
    ("randomize_seed", bool, False, None),
    ("preprocess_image", bool, True, None),
    ("return_no_background", bool, False, None),
    ("generate_video", bool, True, None),
    ("generate_model", bool, True, None),
    ("pipeline_type", str, "1024_cascade", None),
    ("sparse_structure_steps", int, 12, (1, 50)),
    ("sparse_structure_cfg", float, 7.5, (0, 15)),
    ("shape_slat_steps", int, 12, (1, 50)),
    ("shape_slat_cfg", float, 7.5, (0, 15)),
    ("tex_slat_steps", int, 12, (1, 50)),
    ("tex_slat_cfg", float, 7.5, (0, 15)),
    ("decimation_target", int, 1000000, (100000, 2000000)),
    ("texture_size", int, 4096, (1024, 8192)),
]
BY_NAME = {spec.name: spec for spec in option_specs()}
RANGED = [spec for spec in option_specs() if spec.kind in (int, float) and spec.ge is not None]
EXTRA_DEFAULTS = {
    "texture_format": "webp",
    "alpha_mode": "auto",
    "video_resolution": 1024,
    "video_frames": 120,
    "video_environment": "studio",
    "video_panels": False,
    "max_num_tokens": 49152,
}


def test_documented_options_stand_first_and_in_order() -> None:
    names = [spec.name for spec in option_specs()]
    assert names[: len(DOCUMENTED)] == [row[0] for row in DOCUMENTED]
    assert [spec.documented for spec in option_specs()] == [i < len(DOCUMENTED) for i in range(len(option_specs()))]


@pytest.mark.parametrize(("name", "kind", "default", "limits"), DOCUMENTED, ids=[row[0] for row in DOCUMENTED])
def test_documented_row(name: str, kind: type, default: Any, limits: tuple[float, float] | None) -> None:
    spec = BY_NAME[name]
    assert spec.kind is kind
    assert spec.default == default
    assert type(spec.default) is kind
    assert (spec.ge, spec.le) == (limits or (None, None))
    assert not spec.optional


def test_documented_pipeline_types() -> None:
    assert PIPELINE_TYPES == ("512", "1024", "1024_cascade", "1536_cascade")
    assert BY_NAME["pipeline_type"].choices == PIPELINE_TYPES


def test_defaults_are_valid_and_refinements_are_left_to_the_checkpoint() -> None:
    options = GenerateOptions()
    for spec in option_specs():
        assert getattr(options, spec.name) == spec.default
        if not spec.documented:
            assert spec.default == EXTRA_DEFAULTS.get(spec.name)
        assert spec.optional == (spec.default is None)


def test_every_option_is_described_in_sentences() -> None:
    for spec in option_specs():
        assert spec.description[0].isupper(), spec.name
        assert spec.description.endswith("."), spec.name


@pytest.mark.parametrize("spec", RANGED, ids=lambda spec: spec.name)
def test_range_is_inclusive_and_named_in_the_error(spec: Any) -> None:
    step = 2 if spec.name == "video_resolution" else 1
    for value in (spec.ge, spec.le):
        assert getattr(GenerateOptions(**{spec.name: value}), spec.name) == value
    for value in (spec.ge - step, spec.le + step):
        with pytest.raises(InputError) as caught:
            GenerateOptions(**{spec.name: value})
        noun = "a whole number" if spec.kind is int else "a number"
        assert str(caught.value) == f"{spec.name}={value} must be {noun} from {int(spec.ge)} to {int(spec.le)}."


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("sparse_structure_steps", 12.0, 12),
        ("sparse_structure_steps", np.int64(20), 20),
        ("seed", -1, -1),
        ("seed", 2**63 - 1, 2**63 - 1),
        ("sparse_structure_cfg", 3, 3.0),
        ("sparse_structure_cfg", np.float32(2.5), 2.5),
        ("texture_size", 2048.0, 2048),
        ("shape_slat_guidance_interval", [0, 1], (0.0, 1.0)),
        ("shape_slat_guidance_interval", (0.5, 0.5), (0.5, 0.5)),
        ("tex_slat_rescale_t", None, None),
        ("tex_slat_rescale_t", 3, 3.0),
    ],
)
def test_accepted_values_get_the_type_of_the_option(name: str, value: Any, expected: Any) -> None:
    result = getattr(GenerateOptions(**{name: value}), name)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sparse_structure_steps", 12.5, "sparse_structure_steps=12.5 must be a whole number from 1 to 50."),
        ("sparse_structure_steps", "12", "sparse_structure_steps='12' must be a whole number from 1 to 50."),
        ("sparse_structure_steps", True, "sparse_structure_steps=True must be a whole number from 1 to 50."),
        ("sparse_structure_steps", None, "sparse_structure_steps=None must be a whole number from 1 to 50."),
        ("sparse_structure_steps", math.nan, "sparse_structure_steps=nan must be a whole number from 1 to 50."),
        ("texture_size", math.inf, "texture_size=inf must be a whole number from 1024 to 8192."),
        (
            "decimation_target",
            10**400,
            f"decimation_target={10**400} must be a whole number from 100000 to 2000000.",
        ),
        ("shape_slat_cfg", math.nan, "shape_slat_cfg=nan must be a number from 0 to 15."),
        ("shape_slat_cfg", -math.inf, "shape_slat_cfg=-inf must be a number from 0 to 15."),
        ("shape_slat_cfg", 10**400, f"shape_slat_cfg={10**400} must be a number from 0 to 15."),
        ("shape_slat_cfg", "7.5", "shape_slat_cfg='7.5' must be a number from 0 to 15."),
        ("shape_slat_cfg", False, "shape_slat_cfg=False must be a number from 0 to 15."),
        ("seed", 2**63, f"seed={2**63} must be a whole number of at most 63 bits."),
        ("seed", 1.5, "seed=1.5 must be a whole number of at most 63 bits."),
        ("generate_video", 1, "generate_video=1 must be true or false."),
        ("generate_video", "false", "generate_video='false' must be true or false."),
        ("generate_video", None, "generate_video=None must be true or false."),
        (
            "pipeline_type",
            "2048",
            "pipeline_type='2048' must be one of '512', '1024', '1024_cascade', '1536_cascade'.",
        ),
        (
            "pipeline_type",
            512,
            "pipeline_type=512 must be one of '512', '1024', '1024_cascade', '1536_cascade'.",
        ),
        ("texture_format", "jpeg", "texture_format='jpeg' must be one of 'webp', 'png'."),
        ("alpha_mode", None, "alpha_mode=None must be one of 'auto', 'opaque', 'mask', 'blend'."),
        ("tex_slat_rescale_t", 0.5, "tex_slat_rescale_t=0.5 must be a number from 1 to 10."),
        (
            "video_resolution",
            1023,
            "video_resolution=1023 must be even, because H.264 video in 4:2:0 needs it.",
        ),
    ],
)
def test_refused_values_are_named_with_what_is_allowed(name: str, value: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        GenerateOptions(**{name: value})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "value", [(0.6,), (0.9, 0.6), (-0.1, 1), (0, 1.1), ("0", "1"), "01", 0.5, (0, math.nan), (0, True)]
)
def test_refused_intervals(value: Any) -> None:
    with pytest.raises(InputError) as caught:
        GenerateOptions(shape_slat_guidance_interval=value)
    assert str(caught.value) == f"shape_slat_guidance_interval={value!r} must be two numbers, 0 <= low <= high <= 1."


def test_options_cannot_be_changed_unchecked() -> None:
    options = GenerateOptions()
    with pytest.raises(FrozenInstanceError):
        options.seed = 1  # type: ignore[misc]
    with pytest.raises(InputError):
        replace(options, sparse_structure_steps=0)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environments_are_accepted(name: str) -> None:
    assert GenerateOptions(video_environment=name).video_environment == name
