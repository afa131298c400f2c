"""Grids, refinements and the layers on packed tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from o_voxel import conv
from tiny import LATENT, MODELS

from trellis2 import layers, voxels
from trellis2.checkpoint import build_model, fill_model
from trellis2.layers import attention, rotary_phases, rotate
from trellis2.models.flow import Flow
from trellis2.voxels import Grid, Voxels, full_grid


def test_children_stand_in_the_order_of_their_parents() -> None:
    grid = Grid(torch.tensor([[0, 1, 0, 2], [1, 0, 0, 0]], dtype=torch.int32))
    keep = torch.zeros(2, 8, dtype=torch.bool)
    keep[0, [1, 6]] = True  # (1, 0, 0) and (0, 1, 1)
    keep[1, 0] = True
    step = grid.subdivide(keep)
    assert step.fine.coords.tolist() == [[0, 3, 0, 4], [0, 2, 1, 5], [1, 0, 0, 0]]
    assert step.parent.tolist() == [0, 0, 1]
    assert grid.lengths == (1, 1)
    assert step.fine.lengths == (2, 1)
    assert step.fine.item(1) == slice(2, 3)


def test_coarser_inverts_subdivide() -> None:
    coarse = Grid(torch.tensor([[0, 0, 3, 1], [0, 2, 0, 0], [1, 1, 1, 1]], dtype=torch.int32))
    fine = coarse.subdivide(torch.ones(3, 8, dtype=torch.bool)).fine
    shuffled = Grid(fine.coords)
    back = shuffled.coarser
    assert torch.equal(back.coarse.coords, coarse.coords)
    feats = torch.arange(24.0)[:, None]
    assert torch.equal(back.to_fine(back.to_coarse(feats)), feats)
    assert back.coarse.coords.dtype == torch.int32


def test_missing_children_are_zero() -> None:
    grid = Grid(torch.tensor([[0, 3, 0, 0]], dtype=torch.int32))
    step = grid.coarser
    assert step.coarse.coords.tolist() == [[0, 1, 0, 0]]
    assert step.to_coarse(torch.tensor([[5.0, 6.0]])).tolist() == [[0, 0, 5, 6] + [0] * 12]


def test_full_grid_runs_z_fastest() -> None:
    grid = full_grid(2, 2, torch.device("cpu"))
    assert grid.coords[:3].tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
    assert grid.lengths == (8, 8)


@pytest.mark.parametrize(
    ("q_lengths", "k_lengths"),
    [((3, 4), (5, 2)), ((2, 9, 5, 1, 4), (3, 3, 3, 3, 3)), ((4, 4), (4, 4)), ((20, 1), (1, 20))],
)
def test_attention_stays_inside_its_item(q_lengths: tuple[int, ...], k_lengths: tuple[int, ...]) -> None:
    """So do its gradients, however the items are padded and grouped."""
    generator = torch.Generator().manual_seed(0)
    rows = (sum(q_lengths), sum(k_lengths), sum(k_lengths))
    with torch.enable_grad():
        q, k, v = (torch.randn(n, 2, 4, generator=generator).requires_grad_() for n in rows)
        together = attention(q, k, v, q_lengths, k_lengths)
        alone = []
        pieces = (x.split(n) for x, n in ((q, q_lengths), (k, k_lengths), (v, k_lengths)))
        for a, b, c in zip(*pieces, strict=True):
            scores = torch.einsum("qhd,khd->hqk", a, b) / 2
            alone.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=2), c))
        torch.testing.assert_close(together, torch.cat(alone))
        weight = torch.randn(together.shape, generator=generator)
        found = torch.autograd.grad((together * weight).sum(), (q, k, v))
        wanted = torch.autograd.grad((torch.cat(alone) * weight).sum(), (q, k, v))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_rotation_keeps_length_and_depends_on_distance_only() -> None:
    x = torch.randn(1, 1, 12, generator=torch.Generator().manual_seed(1))
    coords = torch.tensor([[0, 0, 0], [1, 2, 3], [5, 5, 5], [6, 7, 8]])
    turned = rotate(x.expand(4, 1, 12), rotary_phases(coords, 12, (1.0, 10000.0)))
    torch.testing.assert_close(turned.norm(dim=2), x.norm().expand(4, 1))
    torch.testing.assert_close(turned[0], x[0])
    torch.testing.assert_close((turned[0] * turned[1]).sum(), (turned[2] * turned[3]).sum())


def test_batch_of_two_equals_two_batches_of_one() -> None:
    flow = build_model(*MODELS["shape_slat_flow_model_512"])
    assert isinstance(flow, Flow)
    flow.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(2)
    for parameter in flow.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    coords = [torch.randint(0, 9, (n, 3), generator=generator).unique(dim=0) for n in (20, 31)]
    grids = [torch.cat([torch.full_like(c[:, :1], b), c], dim=1).int() for b, c in enumerate(coords)]
    x = [torch.randn(len(g), 8, generator=generator) for g in grids]
    t = torch.tensor([300.0, 900.0])
    cond = torch.randn(2, 5, 16, generator=generator)
    both = flow(torch.cat(x), t, cond, Grid(torch.cat(grids)))
    alone = []
    for b in range(2):
        grid = Grid(grids[b] * torch.tensor([0, 1, 1, 1], dtype=torch.int32))
        alone.append(flow(x[b], t[b : b + 1], cond[b : b + 1], grid))
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_nothing_refines_to_nothing() -> None:
    step = Grid(torch.tensor([[0, 1, 0, 2]], dtype=torch.int32)).subdivide(torch.zeros(1, 8, dtype=torch.bool))
    assert len(step.fine) == 0
    assert step.to_fine(torch.zeros(1, 16)).shape == (0, 2)
    nothing = step.fine.subdivide(torch.zeros(0, 8, dtype=torch.bool))
    assert nothing.to_fine(torch.zeros(0, 16)).shape == (0, 2)


@pytest.mark.parametrize("decoder", ["shape_slat_decoder", "tex_slat_decoder"])
def test_decoding_in_parts_changes_nothing(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    models = {name: filled(*MODELS[name], generator) for name in ("shape_slat_decoder", decoder)}
    coords = (torch.rand(4, 4, 4, generator=generator) < 0.4).nonzero().int()
    grid = Grid(torch.nn.functional.pad(coords, (1, 0)))
    latent = Voxels(torch.randn(len(grid), LATENT, generator=generator), grid)
    guide = models["shape_slat_decoder"](latent)[1] if decoder == "tex_slat_decoder" else None
    whole, steps = models[decoder](latent, guide)
    assert len(whole.grid) > 500
    for module in (conv, layers, voxels):
        monkeypatch.setattr(module, "SEGMENT", 64)
    fresh = Voxels(latent.feats, Grid(grid.coords))
    if guide is not None:
        guide = models["shape_slat_decoder"](fresh)[1]
    in_parts, _ = models[decoder](fresh, guide)
    assert torch.equal(in_parts.grid.coords, whole.grid.coords)
    torch.testing.assert_close(in_parts.feats, whole.feats)
    assert [len(step.fine) for step in steps] == sorted(len(step.fine) for step in steps)


def filled(name: str, args: dict[str, Any], generator: torch.Generator) -> Any:
    model: Any = build_model(name, args)
    model.set_dtype(torch.float32)
    state = {k: torch.randn(v.shape, generator=generator) / 4 for k, v in model.state_dict().items()}
    fill_model(model, state)
    return model
