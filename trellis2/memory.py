"""Where weights live.  The only place that moves them between host and device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Residency:
    """One policy for all networks.

    low_vram: keep weights in host memory and bring each network to ``device`` only while it computes.  Otherwise they
    stay on the device.  On a CPU both are the same and nothing moves.
    """

    device: torch.device
    low_vram: bool

    @property
    def swaps(self) -> bool:
        return self.low_vram and self.device.type != "cpu"

    def settle(self, model: nn.Module) -> None:
        """Put a freshly loaded network where it rests."""
        if not self.swaps:
            model.to(self.device)

    @contextmanager
    def resident(self, model: nn.Module) -> Iterator[None]:
        """Have ``model`` on the device inside the block, and back at rest after it, errors included."""
        if not self.swaps:
            yield
            return
        model.to(self.device)
        try:
            yield
        finally:
            model.to("cpu")
