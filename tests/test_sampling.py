"""Sampling against closed forms and recorded runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_cases import golden_cases, load_golden, relative_l2
from torch import Tensor

from trellis2.sampling import SamplerOptions, euler, schedule

PLAIN = SamplerOptions(steps=10, guidance_strength=1.0, guidance_rescale=0.0, guidance_interval=(0, 1), rescale_t=1)


def test_schedule_runs_from_one_to_zero_and_favours_noise() -> None:
    assert schedule(4, 1.0) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert schedule(2, 3.0) == [1.0, 0.75, 0.0]


def test_constant_velocity_is_integrated_exactly() -> None:
    noise = torch.zeros(3, 2)
    steps = list(euler(lambda x, t, c: torch.ones_like(x), noise, [3], PLAIN))
    assert len(steps) == 10
    torch.testing.assert_close(steps[-1], -torch.ones(3, 2))


def test_guidance_acts_only_inside_its_interval() -> None:
    options = SamplerOptions(12, 7.5, 0.5, (0.6, 1.0), 3.0)
    calls = []

    def velocity(x: Tensor, t: Tensor, conditional: bool) -> Tensor:
        calls.append((float(t), conditional))
        return x

    list(euler(velocity, torch.randn(8, 2), [8], options))
    # Nine of the twelve steps begin at 0.6 or later, one of them at 0.6 to the bit.
    assert len(calls) == 21
    assert min(t for t, conditional in calls if not conditional) == 600


@pytest.mark.parametrize("path", golden_cases("samplers"))
@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_golden(path: Path, layout: str) -> None:
    meta, tensors = load_golden(path)
    for name, params in meta["settings"].items():
        key = f"{name}.{layout}."
        noise, cond = tensors[key + "noise"], tensors[key + "cond"].flatten()
        if layout == "dense":
            lengths = [noise[0, 0].numel()] * len(noise)
            packed = noise.flatten(2).transpose(1, 2).flatten(0, 1)
        else:
            lengths = torch.bincount(tensors[key + "coords"][:, 0]).tolist()
            packed = noise
        calls = []

        def toy(
            x: Tensor,
            t: Tensor,
            conditional: bool,
            cond: Tensor = cond,
            lengths: list[int] = lengths,
            calls: list[float] = calls,
        ) -> Tensor:
            calls.append(float(t[0]))
            values = cond if conditional else torch.zeros_like(cond)
            per_token = torch.cat([v.expand(n) for v, n in zip(values, lengths, strict=True)])[:, None]
            time = torch.cat([v.expand(n) for v, n in zip(t, lengths, strict=True)])[:, None] / 1000
            return torch.sin(1.7 * x + per_token) + 0.3 * x * time + 0.1 * per_token

        options = SamplerOptions(**{**params, "guidance_interval": tuple(params["guidance_interval"])})
        steps = list(euler(toy, packed, lengths, options))
        for ours, theirs in zip(steps, tensors[key + "pred_x_t"], strict=True):
            if layout == "dense":
                theirs = theirs.flatten(2).transpose(1, 2).flatten(0, 1)
            assert relative_l2(ours, theirs) <= meta["tol"]["rel_l2"]
        assert schedule(options.steps, options.rescale_t) == tensors[f"{name}.t_seq"].tolist()
        torch.testing.assert_close(
            torch.tensor(calls, dtype=torch.float64), tensors[key + "model_t_calls"], rtol=1e-6, atol=1e-4
        )
