"""Unwrapping on a GPU: run with -s to see where the time goes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layouts import ball, check_layout
from o_voxel import pack as packing
from o_voxel import unwrap as unwrapping
from o_voxel.repair import unify_face_orientations
from o_voxel.unwrap import unwrap
from torch import Tensor
from voxelise import bumpy_sphere, voxelise

pytestmark = pytest.mark.gpu


def rough(resolution: int) -> tuple[Tensor, Tensor]:
    vertices, faces = ball(resolution)
    noise = torch.randn(vertices.shape, generator=torch.Generator().manual_seed(0))
    return vertices + noise * 0.1 / resolution, faces


@pytest.mark.parametrize("make", [ball, rough])
def test_valid_and_the_same_bits_again(make: Callable[[int], tuple[Tensor, Tensor]]) -> None:
    vertices, faces = make(64)
    runs = [unwrap(vertices.cuda(), faces.cuda()) for _ in range(3)]
    for name in ("vertex_map", "faces", "uvs"):
        first, *others = (getattr(run, name) for run in runs)
        assert first.is_cuda
        assert all(torch.equal(first, other) for other in others)
    flat = runs[0]
    flat = unwrapping.Unwrapped(flat.vertex_map.cpu(), flat.faces.cpu(), flat.uvs.cpu(), flat.charts)
    assert torch.equal(flat.vertex_map[flat.faces.long()], faces.long())
    check_layout(vertices, flat)
    on_host = unwrap(vertices, faces)
    assert 0.8 * on_host.charts <= flat.charts <= 1.25 * on_host.charts + 5


def test_nothing() -> None:
    flat = unwrap(torch.zeros((3, 3)).cuda(), torch.tensor([[0, 1, 2]]).cuda())
    assert flat.charts == 0
    assert flat.uvs.is_cuda
    assert unwrap(torch.eye(3).cuda(), torch.tensor([[0, 1, 2]]).cuda()).faces.tolist() == [[0, 1, 2]]


def timed(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, spent: dict[str, float]) -> None:
    body = getattr(module, name)

    def measured(*arguments: Any) -> Any:
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = body(*arguments)
        torch.cuda.synchronize()
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
        return result

    monkeypatch.setattr(module, name, measured)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_million_faces(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    asset = voxelise(bumpy_sphere(), 448).mesh
    vertices, faces = unify_face_orientations(asset.vertices, asset.faces)
    assert len(faces) > 1_000_000
    vertices += noise / 448 * torch.randn(vertices.shape, generator=torch.Generator().manual_seed(0))
    vertices, faces = vertices.cuda(), faces.cuda()
    unwrap(vertices[:, [1, 2, 0]].contiguous(), faces)  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    flat = unwrap(vertices, faces)
    torch.cuda.synchronize()
    seconds, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated() - before
    assert len(flat.faces) == len(faces)

    spent: dict[str, float] = {}
    for name in ("manifold_edges", "_cluster", "_flatten", "_overlaid", "components", "_numbered", "pack"):
        timed(monkeypatch, unwrapping, name, spent)
    for name in ("_upright", "_bitmaps", "_shapes", "_arranged"):
        timed(monkeypatch, packing, name, spent)
    again = unwrap(vertices, faces)
    assert torch.equal(again.uvs, flat.uvs)
    parts = ", ".join(f"{name} {value:.3f}" for name, value in spent.items())
    sys.stdout.write(f"\n{len(faces)} faces, {flat.charts} charts: {seconds:.3f} s, {peak / 2**20:.0f} MiB; {parts}\n")
    assert peak < 1 << 30
    assert seconds < 2
