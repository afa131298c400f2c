"""What the flow transformer need not compute twice, or at all."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from trellis2.models.flow import Flow, FlowConfig
from trellis2.recording import recorded
from trellis2.voxels import Grid

CONFIG = FlowConfig(8, 6, 6, model_channels=48, cond_channels=20, num_blocks=3, num_heads=2)


@pytest.fixture
def flow() -> Flow:
    generator = torch.Generator().manual_seed(1)
    flow = Flow(CONFIG).requires_grad_(False)
    for parameter in flow.parameters():
        parameter.normal_(0, 0.2, generator=generator)
    return flow


def inputs(items: int) -> tuple[Tensor, Tensor, Tensor, Grid]:
    generator = torch.Generator().manual_seed(2)
    coords = torch.randint(0, 8, (items * 9, 4), generator=generator, dtype=torch.int32)
    coords[:, 0] = torch.arange(items).repeat_interleave(9)
    x = torch.randn(len(coords), 6, generator=generator)
    t = 1000 * torch.rand(items, generator=generator)
    return x, t, torch.randn(items, 7, 20, generator=generator), Grid(coords)


@pytest.mark.parametrize("items", [1, 2])
def test_no_condition_is_one_of_zeros(flow: Flow, items: int) -> None:
    x, t, cond, grid = inputs(items)
    zeros = flow(x, t, torch.zeros_like(cond), grid)
    torch.testing.assert_close(flow(x, t, None, grid), zeros, rtol=1e-5, atol=1e-5)
    assert (flow(x, t, cond, grid) - zeros).abs().max() > 0.01


@pytest.mark.parametrize("items", [1, 2])
def test_keys_and_values_of_a_condition_serve_every_step(flow: Flow, items: int) -> None:
    x, t, cond, grid = inputs(items)
    known = flow.keys_and_values(cond)
    for time in (t, 0.5 * t):
        assert torch.equal(flow(x, time, cond, grid, known), flow(x, time, cond, grid))
    assert not torch.equal(flow(x, t, cond, grid, flow.keys_and_values(2 * cond)), flow(x, t, cond, grid))


def test_items_of_a_batch_do_not_see_each_other(flow: Flow) -> None:
    """Three of different lengths at once, the shorter ones padded inside, give what each gives alone."""
    x, t, cond, grid = inputs(3)
    kept = torch.cat([torch.arange(9), torch.arange(9, 11), torch.arange(18, 25)])
    x, coords = x[kept], grid.coords[kept]
    together = flow(x, t, cond, Grid(coords)).split([9, 2, 7])
    for item, (part, alone) in enumerate(zip(x.split([9, 2, 7]), coords.split([9, 2, 7]), strict=True)):
        place = Grid(alone * torch.tensor([0, 1, 1, 1], dtype=torch.int32))
        one = flow(part, t[item : item + 1], cond[item : item + 1], place)
        torch.testing.assert_close(together[item], one, rtol=1e-4, atol=1e-5)


def test_only_absolute_positions_see_where_the_grid_is(flow: Flow) -> None:
    x, t, cond, grid = inputs(1)
    moved = Grid(grid.coords + torch.tensor([0, 3, 0, 1], dtype=torch.int32))
    torch.testing.assert_close(flow(x, t, cond, moved), flow(x, t, cond, grid), rtol=1e-3, atol=1e-4)
    absolute = Flow(replace(CONFIG, absolute_positions=True)).requires_grad_(False)
    absolute.load_state_dict(flow.state_dict())
    assert (absolute(x, t, cond, moved) - absolute(x, t, cond, grid)).abs().max() > 0.01


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replayed_evaluations_are_the_recorded_ones(flow: Flow, dtype: torch.dtype) -> None:
    flow.set_dtype(dtype)
    flow.cuda()
    x, t, cond, grid = inputs(1)
    x, t, cond, grid = x.cuda(), t.cuda(), cond.cuda(), Grid(grid.coords.cuda())
    assert grid.lengths == (9,)

    def evaluate(x: Tensor, t: Tensor, conditional: bool) -> Tensor:
        velocity: Tensor = flow(x, t, cond if conditional else None, grid)
        return velocity

    replayed = recorded(evaluate)
    results = []
    for step, conditional in product(range(3), (True, False)):
        other = x * (1 + step), t / (1 + step)
        results.append((replayed(*other, conditional), evaluate(*other, conditional)))
    # Compared at the end: what was given out stays as it was.
    for ours, expected in results:
        assert torch.equal(ours, expected)
