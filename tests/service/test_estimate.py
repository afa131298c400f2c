"""How long a job still takes, with numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from trellis2.pipeline import STAGE_WEIGHTS
from trellis2.service.estimate import REMEMBERED, STAGES, History, seconds_left

STEPS = {"sparse_structure_steps": 10, "shape_slat_steps": 10, "tex_slat_steps": 10}
SECONDS = {"prepare": 1.0, "condition": 1.0, "structure": 10.0, "shape": 20.0, "texture": 5.0, "decode": 3.0}


def options(preset: str = "512", **other: Any) -> dict[str, Any]:
    return {"pipeline_type": preset, "generate_model": True, "generate_video": False} | STEPS | other


def test_the_stages_are_those_of_the_pipeline() -> None:
    assert list(STAGE_WEIGHTS) == list(STAGES)


def test_nothing_is_known_of_a_preset_or_a_stage_that_never_ran() -> None:
    history = History()
    assert history.expected(options()) is None
    history.add(options(), SECONDS | {"model": 40.0})
    assert history.expected(options("1024")) is None
    assert history.expected(options(generate_video=True)) is None
    assert history.expected(options()) == SECONDS | {"model": 40.0}
    assert history.expected(options(generate_model=False)) == SECONDS


def test_more_steps_take_longer() -> None:
    history = History()
    history.add(options(), SECONDS | {"model": 40.0})
    expected = history.expected(options(shape_slat_steps=25, generate_model=False))
    assert expected == SECONDS | {"shape": 50.0}


def test_one_slow_job_does_not_count_and_old_ones_are_forgotten() -> None:
    history = History()
    for seconds in (40.0, 900.0, 44.0):
        history.add(options(), SECONDS | {"model": seconds})
    assert (history.expected(options()) or {})["model"] == 44.0
    for _ in range(REMEMBERED):
        history.add(options(), SECONDS | {"model": 7.0})
    assert (history.expected(options()) or {})["model"] == 7.0


@pytest.mark.parametrize(
    ("stage", "step", "since", "left"),
    [
        ("prepare", 0, 0.0, 40.0),
        ("structure", 0, 0.0, 38.0),
        ("structure", 4, 0.0, 34.0),
        ("structure", 4, 0.5, 33.5),
        ("structure", 4, 9.0, 33.0),  # the step takes longer than expected: the estimate waits for it
        ("structure", 10, 9.0, 28.0),
        ("texture", 8, 0.0, 4.0),
        ("decode", 10, 9.0, 0.0),
        ("model", 0, 0.0, 0.0),  # not asked for when the estimate was made
    ],
)
def test_what_is_left_of_a_running_job(stage: str, step: int, since: float, left: float) -> None:
    assert seconds_left(SECONDS, stage, step, 10, since) == pytest.approx(left)


def test_it_never_rises_while_the_job_goes_on() -> None:
    moments = [(s, step, since) for s in STAGES for step in range(5) for since in (0.0, 0.3, 2.0, 30.0)]
    estimates = [seconds_left(SECONDS, s, step, 4, since) for s, step, since in moments]
    assert estimates == sorted(estimates, reverse=True)
    assert estimates[0] == 40.0
