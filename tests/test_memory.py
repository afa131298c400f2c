"""Where weights rest, and that memory comes back."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from trellis2 import memory
from trellis2.memory import GIB, Residency, fits, weight_bytes

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Network(nn.Module):
    """Has all that a segment may hold: nested modules, a module with own weights and children, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.first = nn.Linear(2, 64)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)) for _ in range(3))
        self.half = nn.Linear(64, 3).bfloat16()
        self.register_buffer("shift", torch.tensor([0.5]))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x * self.scale + self.shift)
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.half(h.bfloat16()).float()
        return out


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(memory, "_SEGMENT", 20_000)
    return


def test_nothing_moves_on_a_cpu() -> None:
    model = Network()
    before = [p.data_ptr() for p in model.parameters()]
    residency = Residency(CPU, resident=False)
    residency.settle(model)
    with residency.resident(model):
        assert [p.data_ptr() for p in model.parameters()] == before


def test_segments_hold_every_weight_once(small_segments: None) -> None:
    model = Network()
    parts = memory._split(model)
    tensors = [id(t) for part in parts for module in part for t in memory._own_tensors(module)]
    assert sorted(tensors) == sorted(id(t) for t in memory._tensors(model))
    assert len(parts) == 6  # own weights, first, three blocks, half
    assert weight_bytes([model]) == 4 * (2 + 192 + 3 * (64 * 65 + 128) + 1) + 2 * 65 * 3


def test_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (23 * GIB, 24 * GIB))
    assert fits(15 * GIB, GPU, None)
    assert not fits(16 * GIB, GPU, None)
    assert not fits(15 * GIB, GPU, 16.0)
    assert fits(7 * GIB, GPU, 16.0)
    assert fits(99 * GIB, CPU, None)


@pytest.mark.gpu
def test_streamed_weights_compute_the_same(small_segments: None) -> None:
    model = Network()
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    expected = model.cuda()(x.cuda())
    model.cpu()
    residency = Residency(GPU, resident=False)
    residency.settle(model)
    for _ in range(3):
        with torch.inference_mode(), residency.resident(model):
            assert torch.equal(model(x.cuda()), expected)
            assert torch.equal(model(x.cuda()), expected)
        assert not any(t.is_cuda for t in memory._tensors(model))
        assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.gpu
def test_streamed_weights_go_back_after_an_error() -> None:
    model = Network()
    residency = Residency(GPU, resident=False)
    residency.settle(model)
    before = torch.cuda.memory_allocated()
    wrong = torch.zeros(1, 3, device=GPU)
    with pytest.raises(RuntimeError, match="must match"), residency.resident(model):
        model(wrong)
    gc.collect()
    del wrong
    assert torch.cuda.memory_allocated() == before
    assert not any(t.is_cuda for t in memory._tensors(model))


@pytest.mark.gpu
def test_resident_weights_stay() -> None:
    model = Network()
    residency = Residency(GPU, resident=True)
    residency.settle(model)
    with residency.resident(model):
        pass
    assert model.scale.is_cuda
