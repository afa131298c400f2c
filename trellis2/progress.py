"""Progress of a run as one number that only grows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

OnProgress = Callable[[str, int, int, float], None]
"""Called with (stage, step, steps, fraction of the whole run in [0, 1])."""

OnStep = Callable[[int, int], None]
"""Called by a stage with (steps done, steps in all)."""


def ignore_step(step: int, steps: int) -> None:
    """The ``OnStep`` of a caller who does not want to know."""


@dataclass
class Progress:
    """Maps the steps of each stage to a fraction of the whole.

    ``weights`` gives the stages in order with their expected share of the time (any unit).  Whatever
    ``on_progress`` raises passes through the stage that reported, which is how a run is cancelled.
    """

    weights: Mapping[str, float]
    on_progress: OnProgress | None = None
    _fraction: float = field(default=0.0, init=False)

    def stage(self, name: str) -> OnStep:
        """Return the ``OnStep`` of stage ``name`` (a key of ``weights``)."""
        names = list(self.weights)
        total = sum(self.weights.values())
        start = sum(self.weights[n] for n in names[: names.index(name)]) / total
        share = self.weights[name] / total

        def on_step(step: int, steps: int) -> None:
            done = start + share * (step / steps if steps else 1.0)
            self._fraction = min(1.0, max(self._fraction, done))
            if self.on_progress is not None:
                self.on_progress(name, step, steps, self._fraction)

        return on_step
