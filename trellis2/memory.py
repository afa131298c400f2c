"""Where weights live.  The only place that moves them between host and device."""

from __future__ import annotations

import itertools
import logging
import traceback
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from .errors import CapacityError

logger = logging.getLogger("trellis2")

GIB = 2**30
WORKING_SPACE = 8 * GIB
"""What the largest preset needs beside the weights, in bytes."""
OUTSIDE_TORCH = int(0.75 * GIB)
"""What the driver, the compiled kernels and Warp take of a GPU, in bytes."""

_SEGMENT = 128 * 2**20  # bytes that are copied in one go; a block of the published flows has 85 MB
_ALIGNMENT = 512
_MOVERS = 4  # threads
# How torch, cuBLAS, cuDNN and Warp say that a GPU, or the host, is full.
_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "ailed to allocate", "not enough memory", "can't allocate memory")


class Residency:
    """One policy for all networks.

    resident: they stay on ``device``.  Otherwise they rest in page-locked host memory, and the one that computes is
    copied to the device, block after block, while its first blocks compute already; nothing is ever copied back.
    On a CPU both are the same and nothing moves.
    """

    def __init__(self, device: torch.device, *, resident: bool = True) -> None:
        self.device = device
        self.resident_weights = resident or device.type == "cpu"
        self._streamed: weakref.WeakKeyDictionary[nn.Module, list[_Segment]] = weakref.WeakKeyDictionary()
        self._copies = None if self.resident_weights else torch.cuda.Stream(device)

    def settle(self, *models: nn.Module) -> None:
        """Put freshly loaded networks where they rest, several at a time: one thread cannot keep up with the memory."""
        prepare = None
        if self.device.type == "cuda":  # which GPU is the current one, each thread decides for itself
            prepare = partial(torch.cuda.set_device, torch.cuda.current_device())
        with ThreadPoolExecutor(_MOVERS, initializer=prepare) as movers:
            list(movers.map(self._settle, models))

    def _settle(self, model: nn.Module) -> None:
        if self.resident_weights:
            model.to(self.device)
        else:
            self._streamed[model] = [_Segment(part) for part in _split(model)]

    @contextmanager
    def resident(self, model: nn.Module) -> Iterator[None]:
        """Have ``model`` on the device inside the block, and back at rest after it, errors included."""
        if self._copies is None:
            yield
            return
        segments = self._streamed[model]
        compute = torch.cuda.current_stream(self.device)
        try:
            # What is given out now may still be read by kernels that were started before.
            self._copies.wait_stream(compute)
            for segment in segments:
                segment.load(self.device, self._copies)
            yield
        finally:
            compute.wait_stream(self._copies)
            for segment in segments:
                segment.release()
            # So that blocks of the next network's sizes, and memory outside torch, find room.
            torch.cuda.empty_cache()


@contextmanager
def memory_given_back(remedy: str) -> Iterator[None]:
    """Free what a failed or cancelled block holds.  Raises CapacityError(remedy) where memory ran out in it."""
    try:
        yield
    except Exception as error:
        # The frames that failed would hold their tensors as long as the caller holds the error.
        traceback.clear_frames(error.__traceback__)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        full = isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or (
            isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)
        )
        if not full:
            raise
        raise CapacityError(remedy) from error


def fits(weights: int, device: torch.device, gpu_memory: float | None) -> bool:
    """Whether ``weights`` bytes can stay on ``device`` beside what generation needs.

    gpu_memory: GiB that may be used at most, None for what is free.
    """
    if device.type == "cpu":
        return True
    free = torch.cuda.mem_get_info(device)[0]
    if gpu_memory is not None:
        free = min(free, int(gpu_memory * GIB) - OUTSIDE_TORCH)
    return weights + WORKING_SPACE <= free


def limit_memory(device: torch.device, gpu_memory: float) -> None:
    """Keep this process within ``gpu_memory`` GiB of the GPU, what is outside torch included."""
    index = torch.cuda.current_device() if device.index is None else device.index
    total = torch.cuda.get_device_properties(index).total_memory
    share = (gpu_memory * GIB - OUTSIDE_TORCH) / total
    torch.cuda.set_per_process_memory_fraction(min(max(share, 0.0), 1.0), index)


def weight_bytes(models: Iterable[nn.Module]) -> int:
    """Size of all weights together."""
    return sum(tensor.nbytes for model in models for tensor in _tensors(model))


class _Segment:
    """Weights that travel together, at rest in one page-locked buffer."""

    def __init__(self, modules: list[nn.Module]) -> None:
        """modules: those whose own tensors belong here."""
        self._modules = modules
        self._tensors = [tensor for module in modules for tensor in _own_tensors(module)]
        sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in self._tensors]
        self._offsets = [0, *itertools.accumulate(sizes)]
        self._host = _page_locked(self._offsets[-1])
        for resting, tensor in zip(self._views(self._host), self._tensors, strict=True):
            resting.copy_(tensor)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._rest()

    def load(self, device: torch.device, copies: torch.cuda.Stream) -> None:
        """Begin to copy; whoever calls one of the modules waits for it, on the device."""
        with torch.inference_mode(False):  # a parameter cannot change between normal and inference memory
            buffer = torch.empty(len(self._host), dtype=torch.uint8, device=device)
            with torch.cuda.stream(copies):
                buffer.copy_(self._host, non_blocking=True)
                arrived = copies.record_event()
            for tensor, view in zip(self._tensors, self._views(buffer), strict=True):
                tensor.data = view

        def wait(*_: object) -> None:
            torch.cuda.current_stream(device).wait_event(arrived)
            self._remove_hooks()

        self._hooks = [module.register_forward_pre_hook(wait) for module in self._modules]

    def release(self) -> None:
        self._remove_hooks()
        self._rest()

    def _rest(self) -> None:
        with torch.inference_mode(False):
            for tensor, view in zip(self._tensors, self._views(self._host), strict=True):
                tensor.data = view

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _views(self, buffer: Tensor) -> list[Tensor]:
        return [
            buffer[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for begin, tensor in zip(self._offsets, self._tensors, strict=False)
        ]


def _split(model: nn.Module) -> list[list[nn.Module]]:
    """Groups of modules of about ``_SEGMENT`` bytes, in the order in which they were made."""
    if weight_bytes([model]) <= _SEGMENT:
        return [[module for module in model.modules() if _own_tensors(module)]]
    parts = [[model]] if _own_tensors(model) else []
    for child in model.children():
        parts += _split(child)
    return [part for part in parts if part]


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _page_locked(size: int) -> Tensor:
    """Host memory that a GPU reads at full speed.  torch's own allocator would round up to a power of two."""
    buffer = torch.empty(size, dtype=torch.uint8)
    if size and int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0)) == 0:
        weakref.finalize(buffer, torch.cuda.cudart().cudaHostUnregister, buffer.data_ptr()).atexit = False
    elif size:
        logger.warning("%d MB of host memory cannot be page-locked; weights travel more slowly.", size >> 20)
    return buffer
