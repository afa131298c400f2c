"""Compile all kernels for GPUs ahead of time: ``python -m trellis2.prebuild 8.0 9.0``; see ``o_voxel.prebuild``.

For images: needs no GPU, and of this package only ``environment``, ``fused`` and ``occlusion``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from o_voxel import prebuild

# Channels of the published networks' layer norms.
FLOW = 1536
STRUCTURE_DECODER = (512, 128, 32)
VOXEL_DECODERS = (1024, 512, 256, 128, 64)
MATTING = (192, 384, 768, 1536, 3072)
HEADS, HEAD_SIZE = 12, 128


def norms() -> None:
    """Launch the norms of ``fused`` in every form that the published networks use."""
    from .fused import add_and_norm, layer_norm, rms_rotate_

    def norm(
        channels: int, dtype: torch.dtype, weight: torch.dtype | None = torch.float32, *, around_one: bool = False
    ) -> None:
        factor = None if weight is None else torch.zeros(1, channels, dtype=weight)
        layer_norm(torch.zeros(1, channels, dtype=dtype), factor, factor, 1e-6, around_one=around_one)

    norm(FLOW, torch.bfloat16, torch.bfloat16, around_one=True)
    for channels in {*STRUCTURE_DECODER, *VOXEL_DECODERS, *MATTING}:
        norm(channels, torch.float16)
    norm(STRUCTURE_DECODER[-1], torch.float32)
    for channels in VOXEL_DECODERS[1:]:
        norm(channels, torch.float16, None)

    tokens = torch.zeros(1, FLOW, dtype=torch.bfloat16)
    weights = torch.zeros(FLOW)
    add_and_norm(tokens, tokens, tokens, weights, weights, 1e-6)
    for gate in (tokens, None):
        add_and_norm(tokens, tokens, gate, tokens, tokens, 1e-6, around_one=True)

    heads = torch.zeros(1, 3, HEADS, HEAD_SIZE, dtype=torch.bfloat16)
    gamma = torch.zeros(HEADS, HEAD_SIZE)
    rms_rotate_(heads, [gamma], None)
    rms_rotate_(heads, [gamma, gamma], torch.zeros(1, HEAD_SIZE // 2, dtype=torch.complex64))


def main(arguments: Sequence[str] | None = None) -> int:
    return prebuild.run(arguments, ["trellis2.environment", "trellis2.occlusion"], [norms])


if __name__ == "__main__":
    sys.exit(main())
