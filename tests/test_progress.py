from __future__ import annotations

import pytest

from trellis2.errors import Cancelled
from trellis2.progress import Progress, ignore_step

WEIGHTS = {"one": 1.0, "two": 3.0}


def test_stages_share_the_whole_by_weight() -> None:
    calls: list[tuple[str, int, int, float]] = []
    progress = Progress(WEIGHTS, lambda *call: calls.append(call))
    for name in WEIGHTS:
        on_step = progress.stage(name)
        on_step(0, 2)
        on_step(1, 2)
        on_step(2, 2)
    assert calls == [
        ("one", 0, 2, 0.0),
        ("one", 1, 2, 0.125),
        ("one", 2, 2, 0.25),
        ("two", 0, 2, 0.25),
        ("two", 1, 2, 0.625),
        ("two", 2, 2, 1.0),
    ]


def test_fraction_never_falls_nor_exceeds_one() -> None:
    fractions: list[float] = []
    progress = Progress(WEIGHTS, lambda _name, _step, _steps, fraction: fractions.append(fraction))
    progress.stage("two")(1, 3)
    progress.stage("one")(0, 1)
    progress.stage("two")(5, 3)
    assert fractions == [0.5, 0.5, 1.0]


def test_a_stage_without_steps_is_done() -> None:
    fractions: list[float] = []
    progress = Progress(WEIGHTS, lambda _name, _step, _steps, fraction: fractions.append(fraction))
    progress.stage("one")(0, 0)
    assert fractions == [0.25]


def test_an_exception_passes_through_the_stage() -> None:
    def cancel(_name: str, step: int, _steps: int, _fraction: float) -> None:
        if step == 1:
            raise Cancelled("enough")

    on_step = Progress(WEIGHTS, cancel).stage("one")
    on_step(0, 2)
    with pytest.raises(Cancelled, match="enough"):
        on_step(1, 2)


def test_a_caller_who_does_not_listen() -> None:
    Progress(WEIGHTS).stage("one")(1, 1)
    ignore_step(1, 1)


def test_an_unknown_stage_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="three"):
        Progress(WEIGHTS).stage("three")
