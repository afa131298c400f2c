"""Where weights rest, and that memory comes back."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from trellis2 import memory
from trellis2.errors import CapacityError, InputError
from trellis2.memory import GIB, Residency, fits, memory_given_back, weight_bytes

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Network(nn.Module):
    """Has all that a segment may hold: nested modules, a module with own weights and children, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.first = nn.Linear(2, 64)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)) for _ in range(3))
        self.last = nn.Linear(64, 3).bfloat16()
        self.register_buffer("shift", torch.tensor([0.5]))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x * self.scale + self.shift)
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.last(h.bfloat16()).float()
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
    assert len(parts) == 6  # own weights, first, three blocks, last
    assert weight_bytes([model]) == 4 * (2 + 192 + 3 * (64 * 65 + 128) + 1) + 2 * 65 * 3


def test_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (23 * GIB, 24 * GIB))
    assert fits(15 * GIB, GPU, None)
    assert not fits(16 * GIB, GPU, None)
    assert not fits(15 * GIB, GPU, 16.0)
    assert fits(7 * GIB, GPU, 16.0)
    assert fits(99 * GIB, CPU, None)


class NoStream:
    """A stream of a CPU, where everything has happened when the call returns."""

    def wait_stream(self, other: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self) -> None: ...


@pytest.fixture(params=[CPU, pytest.param(GPU, marks=pytest.mark.gpu)], ids=["cpu", "cuda"])
def streaming(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Residency:
    """A policy that streams; on a CPU to other memory of the CPU."""
    device: torch.device = request.param
    if device == CPU:
        monkeypatch.setattr(memory, "_page_locked", lambda size: torch.empty(size, dtype=torch.uint8))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: NoStream())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: NoStream())
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    residency = Residency(GPU, resident=False)
    residency.device = device
    return residency


def test_streamed_weights_compute_the_same(small_segments: None, streaming: Residency) -> None:
    device, model = streaming.device, Network()
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).to(device)
    expected = model.to(device)(x)
    model.cpu()
    streaming.settle(model)
    resting = [t.data_ptr() for t in memory._tensors(model)]
    for _ in range(3):
        with torch.inference_mode(), streaming.resident(model):
            assert all(t.data_ptr() != at for t, at in zip(memory._tensors(model), resting, strict=True))
            assert torch.equal(model(x), expected)
            assert torch.equal(model(x), expected)
        assert [t.data_ptr() for t in memory._tensors(model)] == resting
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_streamed_weights_go_back_after_an_error(streaming: Residency) -> None:
    model = Network()
    streaming.settle(model)
    resting = [t.data_ptr() for t in memory._tensors(model)]
    wrong = torch.zeros(1, 3, device=streaming.device)
    with pytest.raises(RuntimeError, match="must match"), streaming.resident(model):
        model(wrong)
    assert [t.data_ptr() for t in memory._tensors(model)] == resting
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.cuda.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        RuntimeError("Failed to allocate 4096 bytes on device 'cuda:0'"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1099511627776 bytes."),
    ],
    ids=str,
)
def test_full_memory_is_told_from_other_errors(error: Exception) -> None:
    with pytest.raises(CapacityError, match="take less"), memory_given_back("take less"):
        raise error
    other = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="shapes"), memory_given_back("take less"):
        raise other


def test_what_failed_holds_nothing() -> None:
    def fail() -> None:
        large = Large()
        held.append(weakref.ref(large))
        raise InputError("stop")

    held: list[weakref.ref[Large]] = []
    with pytest.raises(InputError) as caught, memory_given_back("take less"):
        fail()
    assert caught.value.args == ("stop",)
    assert held[0]() is None


class Large:
    """Stands for a tensor."""


@pytest.mark.gpu
def test_resident_weights_stay() -> None:
    model = Network()
    residency = Residency(GPU, resident=True)
    residency.settle(model)
    with residency.resident(model):
        pass
    assert model.scale.is_cuda
