"""Evaluations of a network as CUDA graphs: recorded once, then launched as one."""

from __future__ import annotations

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
        self.graph = torch.cuda.CUDAGraph()
        self._x, self._t = x.clone(), t.clone()
        # Other threads go on using the GPU meanwhile, and libraries load their kernels at the first launch.
        with torch.cuda.graph(self.graph, pool=memory, capture_error_mode="relaxed"):
            self._out = velocity(self._x, self._t, conditional)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self._x.copy_(x)
        self._t.copy_(t)
        self.graph.replay()
        return self._out.clone()  # the next call writes over it
