"""How long a job will still take, from what earlier ones with the same preset took."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from statistics import median
from typing import Any

STAGES = ("prepare", "condition", "structure", "shape", "texture", "decode", "model", "video")
"""In their order."""

REMEMBERED = 10  # completed jobs of each preset

_STEPS = {"structure": "sparse_structure_steps", "shape": "shape_slat_steps", "texture": "tex_slat_steps"}
"""Stages whose time grows with an option."""
_WISHES = {"model": "generate_model", "video": "generate_video"}
"""Stages that run only with an option."""


class History:
    """Timings of the last completed jobs, by preset. Read and written from several threads."""

    def __init__(self) -> None:
        self._runs: dict[str, deque[dict[str, float]]] = defaultdict(lambda: deque(maxlen=REMEMBERED))

    def add(self, options: Mapping[str, Any], timings: Mapping[str, float]) -> None:
        """options: of the job. timings: its seconds per stage."""
        run = {stage: seconds / _steps(stage, options) for stage, seconds in timings.items() if stage in STAGES}
        self._runs[options["pipeline_type"]].append(run)

    def expected(self, options: Mapping[str, Any]) -> dict[str, float] | None:
        """Seconds per stage of a job, medians of the jobs before it; None where one of its stages was never seen."""
        runs = list(self._runs.get(options["pipeline_type"], ()))
        seconds: dict[str, float] = {}
        for stage in STAGES:
            if not options.get(_WISHES.get(stage, ""), True):
                continue
            known = [run[stage] for run in runs if stage in run]
            if not known:
                return None
            seconds[stage] = median(known) * _steps(stage, options)
        return seconds


def seconds_left(expected: Mapping[str, float], stage: str, step: int, steps: int, since: float) -> float:
    """Of a running job: the stages to come, and of the one it is in the steps to come.

    since: seconds since the last step ended; they count for at most one step, so that the estimate never rises.
    """
    later = sum(expected.get(name, 0.0) for name in STAGES[STAGES.index(stage) + 1 :])
    one = expected.get(stage, 0.0) / max(steps, 1)
    return later + max(0.0, one * (steps - step) - min(since, one))


def _steps(stage: str, options: Mapping[str, Any]) -> int:
    return int(options.get(_STEPS.get(stage, ""), 1))
