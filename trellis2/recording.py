"""Evaluations of a network as CUDA graphs: recorded once, then launched as one."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from .sampling import Velocity


def recorded(velocity: Velocity) -> Velocity:
    """``velocity``, whose launches are recorded at its first calls, with and without condition, and then replayed.

    Two calls differ in the values of tokens and time alone; the tensors that ``velocity`` uses beside them must stay
    where they are.  The memory of an evaluation is held as long as the result lives.
    """
    recordings: dict[bool, _Recording] = {}
    memory = torch.cuda.graph_pool_handle()  # of both, as one is replayed after the other

    def replay(x: Tensor, t: Tensor, conditional: bool) -> Tensor:
        if conditional not in recordings:
            recordings[conditional] = _Recording(velocity, x, t, conditional, memory)
        return recordings[conditional](x, t)

    return replay


class _Recording:
    def __init__(self, velocity: Velocity, x: Tensor, t: Tensor, conditional: bool, memory: Any) -> None:
        self._x, self._t = x.clone(), t.clone()
        record = partial(self._record, velocity, conditional, memory)
        try:
            self.graph, self._out = record()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()  # recordings do not take memory that is kept for reuse
            self.graph, self._out = record()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self._x.copy_(x)
        self._t.copy_(t)
        self.graph.replay()
        return self._out.clone()  # the next call writes over it

    def _record(self, velocity: Velocity, conditional: bool, memory: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph would first wait for the GPU, which can replay the other recording meanwhile.
        with torch.cuda.stream(_stream(self._x.device)):
            # Other threads go on using the GPU, and libraries load their kernels at the first launch.
            graph.capture_begin(pool=memory, capture_error_mode="relaxed")
            try:
                out = velocity(self._x, self._t, conditional)
            finally:
                graph.capture_end()
        return graph, out


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """What all recordings are made on: libraries keep their workspace for each stream."""
    return torch.cuda.Stream(device)
