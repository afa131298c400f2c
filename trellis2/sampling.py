"""Flow-matching Euler sampling with classifier-free guidance, as functions.

Time runs from 1 (noise) to 0 (data); a model predicts the velocity noise - data (Lipman et al. 2023, Liu et al. 2023).
Guidance acts inside an interval of time (Kynkaanniemi et al. 2024) and can be rescaled to the spread of the
conditional prediction (Lin et al. 2024).  Tensors are packed tokens (T, C) as everywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, bool], Tensor]
"""(tokens (T, C), 1000 * time (B,), whether under the condition) -> velocity (T, C)."""


@dataclass(frozen=True)
class SamplerOptions:
    """How one stage is sampled. ``sigma_min``: noise left at time 0."""

    steps: int
    guidance_strength: float
    guidance_rescale: float
    guidance_interval: tuple[float, float]
    rescale_t: float
    sigma_min: float = 1e-5


def schedule(steps: int, rescale_t: float) -> list[float]:
    """``steps`` + 1 times from 1 to 0; ``rescale_t`` > 1 spends more steps near the noise."""
    # numpy's spacing, to the last bit: it decides on which side of an interval's end a step falls.
    uniform = np.linspace(1, 0, steps + 1)
    return [float(t) for t in rescale_t * uniform / (1 + (rescale_t - 1) * uniform)]


def euler(
    velocity: Velocity,
    noise: Tensor,
    lengths: Sequence[int],
    options: SamplerOptions,
) -> Iterator[Tensor]:
    """Integrate from noise to data, yielding the tokens after every step.

    noise: (T, C) float32 of B items with ``lengths`` tokens.
    """
    x = noise
    times = schedule(options.steps, options.rescale_t)
    for t, t_next in itertools.pairwise(times):
        x = x - (t - t_next) * _guided(velocity, x, t, lengths, options)
        yield x


def _guided(velocity: Velocity, x: Tensor, t: float, lengths: Sequence[int], options: SamplerOptions) -> Tensor:
    low, high = options.guidance_interval
    # A step at the very end of the interval is inside or not as floating point has it, as in the original.
    strength = options.guidance_strength if low <= t <= high else 1.0
    model_t = torch.full((len(lengths),), 1000 * t, dtype=torch.float32, device=x.device)
    if strength == 0:
        return velocity(x, model_t, False)
    conditional = velocity(x, model_t, True)
    if strength == 1:
        return conditional
    unconditional = velocity(x, model_t, False)
    guided = strength * conditional + (1 - strength) * unconditional
    if options.guidance_rescale == 0:
        return guided
    return _rescaled(x, t, conditional, guided, lengths, options)


def _rescaled(
    x: Tensor, t: float, conditional: Tensor, guided: Tensor, lengths: Sequence[int], options: SamplerOptions
) -> Tensor:
    """Give the guided prediction of the data the spread that the conditional one has, in part."""
    sigma = options.sigma_min + (1 - options.sigma_min) * t
    scaled = (1 - options.sigma_min) * x
    data = scaled - sigma * guided
    ratio = _spread(scaled - sigma * conditional, lengths) / _spread(data, lengths)
    data = options.guidance_rescale * (data * ratio) + (1 - options.guidance_rescale) * data
    return (scaled - data) / sigma


def _spread(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Standard deviation of each batch item over tokens and channels, (T, 1) or (1, 1).

    Only ratios of two spreads of equal count are used, so biased or not makes no difference.
    """
    if len(lengths) == 1:
        return x.std(correction=0).reshape(1, 1)
    spreads = [item.std(correction=0) for item in x.split(list(lengths))]
    return torch.cat([s.expand(n) for s, n in zip(spreads, lengths, strict=True)])[:, None]
