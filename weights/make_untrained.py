"""Write the embedded checkpoint: the real classes, tiny, with weights that nobody trained.

    python weights/make_untrained.py [FOLDER]

Random decoders make dust. So the decoders are set by hand to make one smooth closed body, and the flows and the image
encoder are random but for the parts that keep their output bounded and smooth. All random numbers come from the raw
bits of a seeded PCG64 and are scaled by plain IEEE arithmetic: every machine writes the same bytes.

Three tricks carry the hand-set parts.

- ``silu(u) - silu(-u) = u`` passes a number through a nonlinearity unchanged, and ``f(u) = silu(u) + silu(-u)``
  = ``u tanh(u / 2)`` is a smooth absolute value. Signals therefore travel as pairs of channels (u, -u).
- A layer norm over such pairs and a much larger constant pair (m, -m) has mean zero and a nearly constant scale. If
  the constant comes out of the same convolution as the signal, the norm divides by the weight of the neighbours
  that exist, which is the right interpolation at the border of the active voxels.
- An edge of the lattice crosses the surface when the signs at its two corners a and b differ, and
  ``f(a - b) - f(a + b)`` is above zero exactly then. Each voxel owns one corner, so all edges at a corner read the
  same number, and a surface made from the signs of corners is closed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from trellis2.checkpoint import build_model

State = dict[str, np.ndarray]
Kernel = np.ndarray  # (27,), column 9 * (dx + 1) + 3 * (dy + 1) + (dz + 1)

LATENT = 8
COND = 32
CENTRE = 13

# ---------------------------------------------------------------------------------------------------------------
# small helpers


class Random:
    """Uniform numbers of 24 bits in [-1, 1), the same on every machine."""

    def __init__(self, seed: int) -> None:
        self.bits = np.random.PCG64(seed)

    def __call__(self, *shape: int) -> np.ndarray:
        raw = self.bits.random_raw(int(np.prod(shape))).reshape(shape) >> np.uint64(40)
        return raw.astype(np.float64) / 2**23 - 1.0


def empty_state(kind: str, args: Mapping[str, Any]) -> State:
    """All tensors of a network, zero."""
    return {key: np.zeros(tuple(value.shape)) for key, value in build_model(kind, args).state_dict().items()}


def box(*axes: int) -> Kernel:
    """Mean of three neighbours along each of the given axes."""
    kernel = np.ones(1)
    for axis in range(3):
        kernel = np.multiply.outer(kernel, [1 / 3, 1 / 3, 1 / 3] if axis in axes else [0, 1, 0])
    return kernel.reshape(27)


def point(dx: int = 0, dy: int = 0, dz: int = 0) -> Kernel:
    """One neighbour."""
    kernel = np.zeros(27)
    kernel[9 * (dx + 1) + 3 * (dy + 1) + dz + 1] = 1
    return kernel


def child_kernel(child: int, low: tuple[float, ...], high: tuple[float, ...]) -> Kernel:
    """Product of one stencil per axis: ``low`` for the lower child, ``high`` for the upper one."""
    kernel = np.ones(1)
    for axis in range(3):
        kernel = np.multiply.outer(kernel, high if child >> axis & 1 else low)
    return kernel.reshape(27)


# A quadratic B-spline at the centre of a child (Chaikin's corner cutting) and at its upper corner.
AT_CENTRE = ((0.25, 0.75, 0.0), (0.0, 0.75, 0.25))
AT_CORNER = ((0.125, 0.75, 0.125), (0.0, 0.5, 0.5))


def f(u: float) -> float:
    """What silu(u) + silu(-u) gives."""
    return float(u * np.tanh(u / 2))


# ---------------------------------------------------------------------------------------------------------------
# structure: latent 8^3 -> logits 64^3, a rounded body about the centre with bumps from the latent

STRUCTURE_DECODER = {
    "out_channels": 1,
    "latent_channels": LATENT,
    "num_res_blocks": 0,
    "num_res_blocks_middle": 5,
    "channels": [16, 8, 8, 8],
    "use_fp16": False,
}
AXIS_WEIGHTS = (1.3, 1.3, 0.5)  # of the fall along x, y, z: taller than wide
STRUCTURE_LEVEL = 2.732  # of the sum of the three profiles; more is smaller
STRUCTURE_BUMPS = 0.11


def structure_decoder() -> State:
    state = empty_state("SparseStructureDecoder", STRUCTURE_DECODER)
    rng = Random(11)
    m = 4.0

    def conv(name: str, out: int, terms: Mapping[int, float], kernel: Kernel) -> None:
        for channel, factor in terms.items():
            state[f"{name}.weight"][out, channel] += factor * kernel.reshape(3, 3, 3)

    # Channels: profiles along x, y, z at 0..2 and their negatives at 3..5, constant pair 6, 7, raw bumps pair 8, 9,
    # bounded bumps 10.  Latents enter through kernels without a mean: one that is the same everywhere makes no bump.
    state["input_layer.bias"][:8] = [1, 1, 1, -1, -1, -1, m, -m]
    for channel in range(LATENT):
        kernel = rng(27)
        conv("input_layer", 8, {channel: 0.05}, kernel - kernel.mean())
        conv("input_layer", 9, {channel: -0.05}, kernel - kernel.mean())

    # Four blocks that blur each profile along its axis, twice each.  Outside the grid are zeros, so a profile falls
    # towards the borders and becomes a cosine.
    one = ((2 * (3 * 0.6 + m * m)) / 16) ** 0.5  # of a layer norm over three profiles and the constant
    two = ((2 * (6 * 0.6 + m * m)) / 16) ** 0.5  # the same over six
    for block in range(4):
        name = f"middle_block.{block}"
        state[f"{name}.norm1.weight"][:] = 1
        state[f"{name}.norm2.weight"][:] = 1
        state[f"{name}.conv1.bias"][6:8] = [m, -m]
        for axis in range(3):
            for sign, out in ((1, axis), (-1, axis + 3)):
                conv(f"{name}.conv1", out, {axis: sign * one, axis + 3: -sign * one}, box(axis))
                conv(f"{name}.conv1", out + 8, {axis: sign * one, axis + 3: -sign * one}, point())
                conv(f"{name}.conv2", out, {axis: sign * two, axis + 3: -sign * two}, box(axis))
                conv(f"{name}.conv2", out, {axis + 8: -sign * two, axis + 11: sign * two}, point())

    # One block that bounds the bumps: the layer norm over (p, -p, m, -m) keeps them below sqrt(8).
    name = "middle_block.4"
    state[f"{name}.norm1.weight"][:] = 1
    state[f"{name}.norm2.weight"][:] = 1
    state[f"{name}.conv1.bias"][2:4] = [m, -m]
    conv(f"{name}.conv1", 0, {8: 24 * one, 9: -24 * one}, point())
    conv(f"{name}.conv1", 1, {8: -24 * one, 9: 24 * one}, point())
    size = STRUCTURE_BUMPS / 8**0.5
    conv(f"{name}.conv2", 10, {0: size, 1: -size}, point() - 0.9 * box(0, 1, 2))  # without their mean: the size stays

    # Three doublings that carry the field (q, -q) and a constant pair.
    for step in range(3):
        name = f"blocks.{step}.conv"
        for child in range(8):
            order = 4 * (child & 1) + 2 * (child >> 1 & 1) + (child >> 2)  # z changes fastest here
            kernel = child_kernel(child, *AT_CENTRE)
            for sign, out in ((1, 0), (-1, 8)):
                if step == 0:
                    terms = {axis: sign * AXIS_WEIGHTS[axis] for axis in range(3)} | {10: float(sign)}
                    state[f"{name}.bias"][out + order] = -sign * STRUCTURE_LEVEL
                else:
                    terms = {0: float(sign)}
                conv(name, out + order, terms, kernel)
            state[f"{name}.bias"][16 + order] = m
            state[f"{name}.bias"][24 + order] = -m
    state["out_layer.0.weight"][:] = 1
    conv("out_layer.2", 0, {0: 16.0, 1: -16.0}, point())
    return state


# ---------------------------------------------------------------------------------------------------------------
# what both sparse decoders do: doubling by interpolation


def carry(state: State, level: int, signals: int, gain: float, weight: float) -> None:
    """Set an up block so that it interpolates ``signals`` pairs of channels.

    Signal i is the pair (2 i, 2 i + 1) and a constant pair comes last. Out of the block come ``gain`` times
    (weight * s, -weight * s) and ``gain`` times (1, -1), with s normalised to [-sqrt(8), sqrt(8)] or so. The gain keeps
    the block's skip connection, which hands out channels without regard to their meaning, below 1 / gain.
    """
    name = _up(state, level)
    constant = len(state[f"{name}.norm1.bias"]) - 1
    state[f"{name}.norm1.weight"][: 2 * signals] = 1
    state[f"{name}.norm1.bias"][constant] = 1
    out_channels = len(state[f"{name}.conv2.bias"])
    for child in range(8):
        base = child * out_channels
        kernel = child_kernel(child, *AT_CENTRE)
        for signal in range(signals):
            sparse_pair(state, f"{name}.conv1", base + 2 * signal, 2 * signal, kernel, 1.0)
        presence(state, f"{name}.conv1", base + 2 * signals, constant, kernel)
    for signal in range(signals):
        sparse_pair(state, f"{name}.conv2", 2 * signal, 2 * signal, point(), gain * weight)
    state[f"{name}.conv2.bias"][2 * signals : 2 * signals + 2] = [gain, -gain]


def sparse_pair(state: State, name: str, out: int, channel: int, kernel: Kernel, factor: float) -> None:
    """Channels ``out``, ``out`` + 1 = +- factor * kernel * (channel - next channel), after a silu of a pair."""
    weight = state[f"{name}.weight"].reshape(-1, 27, state[f"{name}.weight"].shape[-1])
    for sign, row in ((1, out), (-1, out + 1)):
        weight[row, :, channel] += sign * factor * kernel
        weight[row, :, channel + 1] -= sign * factor * kernel


def presence(state: State, name: str, out: int, channel: int, kernel: Kernel) -> None:
    """Channels ``out``, ``out`` + 1 = +- PRESENCE times the part of the kernel that stands on active voxels."""
    weight = state[f"{name}.weight"].reshape(-1, 27, state[f"{name}.weight"].shape[-1])
    silu_of_one = 1 / (1 + np.exp(-1))
    weight[out, :, channel] += PRESENCE / silu_of_one * kernel
    weight[out + 1, :, channel] -= PRESENCE / silu_of_one * kernel


def _up(state: State, level: int) -> str:
    return next(key for key in state if key.startswith(f"blocks.{level}.") and key.endswith("conv1.bias"))[:-11]


# ---------------------------------------------------------------------------------------------------------------
# shape: tokens -> signed field -> thin shell of fine voxels -> dual grid

PRESENCE = 2.0
GAIN = 64.0
SHAPE_DECODER = {
    "resolution": 256,
    "model_channels": [16, 16, 16, 16, 16],
    "latent_channels": LATENT,
    "num_blocks": [4, 0, 0, 1, 2],
    "block_type": ["SparseConvNeXtBlock3d"] * 5,
    "up_block_type": ["SparseResBlockC2S3d"] * 4,
    "block_args": [{"use_checkpoint": False}] * 5,
    "use_fp16": False,
}
DEPTH = 0.74  # blurred presence where the surface lies, about one token below the outermost tokens' outer faces
LATENT_MEAN = (0.5, -0.25, 0.0, 0.25, -0.5, 0.125, -0.125, 0.0)
LATENT_STD = (2.0, 1.5, 1.0, 2.5, 2.0, 1.5, 1.25, 1.75)
SHAPE_BUMPS = 0.1
SLOPE = 0.24  # of the normalised field per voxel near the surface, at every level
SHELL = (1.0, 1.4, 1.5, 1.9)  # half thickness of what is kept, in voxels of that level, the last in finest ones

# Scale of the finest level. A step of the quantised corner values must exceed what the skip connection
# adds; the field falls by FINE per voxel; ORIGIN is so large that adding it rounds to such steps.
STEP = 2.0**21
FINE = 2.0**27
ORIGIN = 1.5 * 2.0**44


def shape_decoder() -> State:
    state = empty_state("FlexiDualGridVaeDecoder", SHAPE_DECODER)
    rng = Random(12)
    _latent_channels(state)
    m = 4.0

    # Coarsest channels: field pair 0, 1; bump pair 2, 3; constant pair 4, 5; presence 6 and 7; latents 8..15.
    state["from_latent.bias"][4:7] = [2, -2, 1]
    bump = rng(LATENT)
    scale = (2 * (0.8 + m * m) / 16) ** 0.5
    for block in range(4):
        name = f"blocks.0.{block}"
        weight = state[f"{name}.conv.weight"].reshape(16, 27, 16)
        hidden, out = state[f"{name}.mlp.0.weight"], state[f"{name}.mlp.2.weight"]
        state[f"{name}.conv.bias"][4:6] = [m, -m]
        state[f"{name}.norm.weight"][:] = 1
        if block == 0:
            # Bumps from the latents, kept below SHAPE_BUMPS by the norm.
            for channel in range(LATENT):
                weight[0, :, 8 + channel] = 8 * m * bump[channel] * box(0, 1, 2)
            weight[1] = -weight[0]
            hidden[:2, 0] = [1, -1]
            out[2, :2] = [SHAPE_BUMPS / 8**0.5, -SHAPE_BUMPS / 8**0.5]
            out[3] = -out[2]
            continue
        # Three blurs of presence: neighbours that are missing count as zero, so it falls towards the border.
        source, target = (7, 6) if block == 2 else (6, 7)
        weight[0, :, source] = box(0, 1, 2)
        weight[1] = -weight[0]
        if block < 3:
            hidden[:2, 0] = [1, -1]
            out[target, :2] = [scale, -scale]
            state[f"{name}.mlp.2.bias"][target] = 1 - block  # over the one that stood there
            continue
        weight[2, :, 2] = box(0, 1, 2)
        weight[3] = -weight[2]
        for row, sign in ((0, 1), (1, -1)):
            hidden[row, [0, 2]] = sign * scale
            state[f"{name}.mlp.0.bias"][row] = -sign * DEPTH
        out[0, :2], out[1, :2] = [1, -1], [-1, 1]

    # Down to voxels. The field is the one signal; at the coarsest level its constant pair stands elsewhere than
    # ``carry`` thinks, which does no harm, as only the norm reads it.
    for level in range(4):
        carry(state, level, 1, GAIN ** (level + 1), 0.5)
    for level, tau in ((0, SHELL[0] / 3), (1, 0.5 * SHELL[1] * SLOPE)):
        # Everything but the outside.
        subdiv, bias = (state[f"{_up(state, level)}.to_subdiv.{part}"] for part in ("weight", "bias"))
        subdiv[:, :2] = 0.5 / GAIN**level, -0.5 / GAIN**level
        bias[:] = tau
    # Then the shell, by |s| in the pair 4, 5.  Inside, the first child stays alone: one voxel in every 4^3 of the
    # finest, so that the body is solid where a cascade looks at it.
    weight = state[f"{_up(state, 1)}.conv2.weight"].reshape(16, 27, 16)
    weight[4, CENTRE, :2] = GAIN**2
    weight[5, CENTRE, :2] = -(GAIN**2)
    tau = SHELL[2] * SLOPE
    subdiv, bias = (state[f"{_up(state, 2)}.to_subdiv.{part}"] for part in ("weight", "bias"))
    subdiv[0, :2], bias[0] = [1 / GAIN**2, -1 / GAIN**2], tau
    subdiv[1:, 4:6], bias[1:] = [-0.5 / GAIN**2, 0.5 / GAIN**2], f(tau)
    _choose_children(state)
    _corner_values(state)
    _surface(state)
    return state


def _latent_channels(state: State) -> None:
    """Latents, normalised, in the channels 8..15."""
    for channel in range(LATENT):
        state["from_latent.weight"][8 + channel, channel] = 0.125 / LATENT_STD[channel]
        state["from_latent.bias"][8 + channel] = -0.125 * LATENT_MEAN[channel] / LATENT_STD[channel]


def _choose_children(state: State) -> None:
    """Before the last doubling: channel 4 + c says whether child c lies near the surface, by the field at the child."""
    name, size = "blocks.3.0", GAIN**3
    weight = state[f"{name}.conv.weight"].reshape(16, 27, 16)
    for child in range(8):
        weight[child, :, 0] = 0.5 * child_kernel(child, *AT_CENTRE)
        weight[child, :, 1] = -0.5 * child_kernel(child, *AT_CENTRE)
    weight[8, CENTRE, :2] = 0.5, -0.5  # the voxel's own, for those that stand alone
    weight[9] = -weight[:9].sum(axis=0)
    state[f"{name}.conv.bias"][10:12] = [4 * size, -4 * size]
    state[f"{name}.norm.weight"][:] = 1
    unit = 0.5 * SLOPE / 2 / (4 * (2 / 16) ** 0.5)  # of the normalised field per child's voxel
    steep, width, mark = 8.0 / unit, 4.0, 0.1
    hidden, bias, out = (state[f"{name}.mlp.{part}"] for part in ("0.weight", "0.bias", "2.weight"))
    row = 0
    for child in range(8):
        # silu(u + w / 2) - silu(u - w / 2) climbs from 0 to w at u = 0. Up at -SHELL, down at +SHELL; the first child
        # comes back deeper inside.
        climbs = [(child, -SHELL[3], 1), (child, SHELL[3], -1), (8, 1.4 * SHELL[3], 1)]
        for channel, edge, sign in climbs[: 3 if child == 0 else 2]:
            for side in (1, -1):
                hidden[row, channel] = steep
                bias[row] = -steep * edge * unit + side * width / 2
                out[4 + child, row] = sign * side * mark * size / width
                row += 1
    state["blocks.3.1.to_subdiv.weight"][:, 4:12] = np.eye(8) / (mark * size)
    state["blocks.3.1.to_subdiv.bias"][:] = -0.5


def _corner_values(state: State) -> None:
    """The last doubling: field pair 0, 1; corner value 2; half a step 4; minus the corner value 5.

    The corner value of a voxel is the field at its upper corner. The up block adds ORIGIN to it, which rounds it to
    whole steps, and the next block takes ORIGIN away. Plus half a step it is never so small that rounding could
    change its sign, and every voxel that reads it gets the same number in whatever order it adds.
    """
    name = _up(state, 3)
    for child in range(8):
        sparse_pair(state, f"{name}.conv1", child * 16 + 4, 0, child_kernel(child, *AT_CORNER), 1.0)
    state[f"{name}.conv2.weight"][:] = 0
    state[f"{name}.conv2.bias"][:] = 0
    weight = state[f"{name}.conv2.weight"].reshape(16, 27, 16)
    unit = FINE / SLOPE
    weight[0, CENTRE, 0:2] = unit, -unit
    weight[1, CENTRE, 0:2] = -unit, unit
    weight[2, CENTRE, 4:6] = unit, -unit
    weight[5, CENTRE, 4:6] = -unit, unit
    state[f"{name}.conv2.bias"][2] = ORIGIN
    state[f"{name}.conv2.bias"][4] = STEP / 2
    state["blocks.4.0.mlp.2.bias"][2] = -ORIGIN


def _surface(state: State) -> None:
    """The last block: crossed edges from the signs of corners, vertices moved along the gradient onto the surface."""
    name = "blocks.4.1"
    weight = state[f"{name}.conv.weight"].reshape(16, 27, 16)
    # Corner values of this voxel and of its lower neighbours along x, y, z at 0..3, their negatives at 4..7: each
    # exactly the other's negative, because nothing but the quantised channels goes into them.
    for row, step in enumerate(((0, 0, 0), (-1, 0, 0), (0, -1, 0), (0, 0, -1))):
        for channel in (2, 4):
            weight[row, :, channel] = point(*step)
            weight[row + 4, :, channel] = -point(*step)
    # Differences of the field along x, y, z as pairs at 8..13, so large that the norm divides by the length of the
    # gradient: the field, at 14 and negative at 15, becomes a distance.
    for channel, sign in ((0, 0.5), (1, -0.5)):
        for axis in range(3):
            step = np.eye(3, dtype=int)[axis]
            weight[8 + 2 * axis, :, channel] = sign * GRADIENT / 2 * (point(*step) - point(*-step))
            weight[9 + 2 * axis, :, channel] = -weight[8 + 2 * axis, :, channel]
        weight[14, :, channel] = sign * point()
        weight[15, :, channel] = -sign * point()
    state[f"{name}.norm.weight"][:] = 1

    # Crossed edges as pairs at 6..11, since what the skip connection left shifts the mean; vertices at 3, 12, 13.
    hidden, out, bias = state[f"{name}.mlp.0.weight"], state[f"{name}.mlp.2.weight"], state[f"{name}.mlp.2.bias"]
    vertex = (3, 12, 13)
    near, along = 0.5 * GRADIENT / 8**0.5, 0.56 / 8**0.5  # of the distance in voxels and of the unit gradient
    row = 0
    for axis in range(3):
        edge = (6 + 2 * axis, 1), (7 + 2 * axis, -1)
        pull = ((vertex[axis], 1),)
        for a, b, size_a, size_b, targets in ((0, 1 + axis, 2.5, 2.5, edge), (14, 8 + 2 * axis, near, along, pull)):
            # f(a - b) - f(a + b)
            for sign_b, factor in ((-1, 1), (1, -1)):
                for sign in (1, -1):
                    hidden[row, a], hidden[row, b] = sign * size_a, sign * sign_b * size_b
                    for target, side in targets:
                        out[target, row] = 4 * FINE * factor * side
                    row += 1
    bias[14:16] = [32 * FINE, -32 * FINE]

    spread = 32 * FINE * (2 / 16) ** 0.5  # of the last layer norm
    final, final_bias = state["output_layer.weight"], state["output_layer.bias"]
    for axis in range(3):
        final[axis, vertex[axis]] = spread / FINE
        for other in vertex:  # the vertices' own share of the mean that the norm takes away
            final[axis, other] += spread / FINE / 13
        final[3 + axis, 6 + 2 * axis : 8 + 2 * axis] = [1, -1]
        final_bias[3 + axis] = -EDGE_MARGIN


GRADIENT = 8.0
EDGE_MARGIN = 2e-5  # above the rounding at missing neighbours, below the smallest crossing


# ---------------------------------------------------------------------------------------------------------------
# material: tokens -> base colour, metallic, roughness, alpha

MATERIAL_DECODER = {
    **SHAPE_DECODER,
    "model_channels": [16, 8, 8, 8, 8],
    "num_blocks": [0, 0, 0, 0, 0],
    "out_channels": 6,
    "pred_subdiv": False,
}
MATERIAL_MEAN = (0.25, -0.25, 0.5, 0.125, 0.0, -0.5, -0.125, 0.25)
MATERIAL_STD = (1.5, 2.0, 1.25, 1.75, 1.0, 2.5, 1.5, 2.0)
SIGNALS = 3  # red, green, blue; roughness and metal are mixed from them


def material_decoder() -> State:
    state = empty_state("SparseUnetVaeDecoder", MATERIAL_DECODER)
    for signal in range(SIGNALS):
        for row, sign in ((2 * signal, 1), (2 * signal + 1, -1)):
            state["from_latent.weight"][row, signal] = sign * 1.5 / MATERIAL_STD[signal]
            state["from_latent.bias"][row] = -sign * 1.5 * MATERIAL_MEAN[signal] / MATERIAL_STD[signal]
    state["from_latent.bias"][2 * SIGNALS : 2 * SIGNALS + 2] = [2, -2]
    for level in range(4):
        carry(state, level, SIGNALS, GAIN ** (level + 1), 0.5)
    # Base colour about a dark grey, little metal, roughness in the middle, alpha exactly one. Four doublings hold a
    # normalised signal below 2 / 3 and its pair below 4 / 3, so colours stay in [-0.125, 0.875].
    weight, bias = state["output_layer.weight"], state["output_layer.bias"]
    bias[:5] = [-0.25, -0.25, -0.25, -0.85, 0.0]
    for row, mix in enumerate(((0.75, 0, 0), (0, 0.75, 0), (0, 0, 0.75), (0.1, 0, -0.1), (-0.2, 0.4, -0.2))):
        for signal in range(SIGNALS):
            weight[row, 2 * signal : 2 * signal + 2] = [mix[signal], -mix[signal]]
    bias[5] = 1
    return state


# ---------------------------------------------------------------------------------------------------------------
# flows: velocity = RATE * (x - target), the target smooth over the tokens and dependent on the picture

WIDTH = 64
HEADS = 2
RATE = 4.0


def flow_args(resolution: int, in_channels: int) -> dict[str, Any]:
    return {
        "resolution": resolution,
        "in_channels": in_channels,
        "out_channels": LATENT,
        "model_channels": WIDTH,
        "cond_channels": COND,
        "num_blocks": 1,
        "num_heads": HEADS,
        "mlp_ratio": 2,
        "pe_mode": "rope",
        "share_mod": True,
        "initialization": "scaled",
        "qk_rms_norm": True,
        "qk_rms_norm_cross": True,
        "dtype": "float32",
    }


def flow(args: Mapping[str, Any], seed: int, reach: float, growth: float, colour: bool) -> State:
    """A flow whose target is a smooth random field.

    reach: of the smoothing, in tokens. growth: how strongly the smoothed noise feeds the target. colour: let the
    first three latents follow the colours of the picture.

    Channels: x 0..7 and -x 8..15, target 16..23 and its negative 24..31, random features 32..61, constant pair 62, 63.
    """
    state = empty_state("SLatFlowModel", args)
    rng = Random(seed)
    for key, value in state.items():
        if key.endswith("weight") and value.ndim == 2:
            value[:] = rng(*value.shape) / value.shape[1] ** 0.5
        if key.endswith("gamma") or key == "blocks.0.norm2.weight":
            value[:] = 1
    state["adaLN_modulation.1.weight"] *= 0.02
    state["blocks.0.modulation"].reshape(6, WIDTH)[[2, 5]] = 1  # the gates

    constant = 8.0
    scale = (2 * constant**2 / WIDTH) ** 0.5  # of a layer norm over all channels
    weight = state["input_layer.weight"]
    weight[:LATENT, :] = np.eye(LATENT, weight.shape[1])
    weight[LATENT : 2 * LATENT] = -weight[:LATENT]
    weight[2 * LATENT : 4 * LATENT] = 0
    weight[-2:] = 0
    state["input_layer.bias"][-2:] = [constant, -constant]

    # Head 0 of the self-attention looks at positions only: equal queries and keys, turned by the rotary phases,
    # weigh tokens by exp(sum of cosines of the distance), a blur.  Head 1 has no queries and takes the mean.  Their
    # difference grows into waves without a mean.
    dim = WIDTH // HEADS
    qkv, bias = (
        state["blocks.0.self_attn.to_qkv.weight"].reshape(3, WIDTH, WIDTH),
        state["blocks.0.self_attn.to_qkv.bias"],
    )
    qkv[:2] = 0
    pairs = dim // 6
    for axis in range(3):
        for part in (0, WIDTH):
            bias[part + 2 * (axis * pairs + 1)] = 1
    frequency = 10000.0 ** (-1 / pairs)
    sharpness = 3 / (frequency * reach) ** 2  # of the attention's logits
    for norm in ("q_rms_norm", "k_rms_norm"):
        state[f"blocks.0.self_attn.{norm}.gamma"][0] = (sharpness / dim**0.5) ** 0.5
    for head in range(HEADS):
        qkv[2, head * dim : head * dim + LATENT] = scale * np.eye(LATENT, WIDTH)

    def to_target(name: str, factor: float) -> np.ndarray:
        """Let a layer write to the target (and its negative), and nothing else but random features."""
        out = state[f"{name}.weight"]
        out[: 4 * LATENT] = 0
        out[2 * LATENT : 3 * LATENT] = factor * rng(LATENT, out.shape[1]) / out.shape[1] ** 0.5
        out[-2:] = 0
        return out

    out = to_target("blocks.0.self_attn.to_out", 0.3)
    out[2 * LATENT : 3 * LATENT, :LATENT] = growth * np.eye(LATENT)
    out[2 * LATENT : 3 * LATENT, dim : dim + LATENT] = -growth * np.eye(LATENT)
    cross = to_target("blocks.0.cross_attn.to_out", 0.8)
    mlp = to_target("blocks.0.mlp.mlp.2", 0.5)
    if colour:
        _follow_colours(state, cross, dim)
    for layer in (out, cross, mlp):
        layer[3 * LATENT : 4 * LATENT] = -layer[2 * LATENT : 3 * LATENT]

    final = state["out_layer.weight"]
    final[:] = 0
    for channel in range(LATENT):
        for part, sign in ((0, 1), (1, -1), (2, -1), (3, 1)):
            final[channel, part * LATENT + channel] = sign * RATE * scale / 2
    return state


def _follow_colours(state: State, cross: np.ndarray, dim: int) -> None:
    """Head 0 of the cross-attention looks at what is not dark and takes its colour to the first three targets."""
    name = "blocks.0.cross_attn"
    state[f"{name}.to_q.weight"][:dim] = 0
    state[f"{name}.to_q.bias"][0] = 1
    kv = state[f"{name}.to_kv.weight"]
    kv[:dim] = 0
    kv[0, :3] = 1
    state[f"{name}.to_kv.bias"][1] = 1
    kv[WIDTH : WIDTH + 3] = np.eye(3, COND)
    cross[2 * LATENT : 2 * LATENT + 3] = 0
    cross[2 * LATENT : 2 * LATENT + 3, :3] = COLOUR * np.eye(3)


COLOUR = 0.45

# ---------------------------------------------------------------------------------------------------------------
# image encoder

IMAGE_ENCODER = {
    "architectures": ["DINOv3ViTModel"],
    "model_type": "dinov3_vit",
    "hidden_size": COND,
    "intermediate_size": 2 * COND,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_register_tokens": 4,
    "patch_size": 16,
    "image_size": 512,
    "dtype": "float32",
}


def image_encoder() -> State:
    """Tensors of a DINOv3 in the hub's names; its first three channels are a patch's mean colour."""
    rng = Random(13)
    c, wide, patch = COND, 2 * COND, 16
    state: State = {
        "embeddings.cls_token": rng(1, 1, c),
        "embeddings.mask_token": np.zeros((1, 1, c)),
        "embeddings.register_tokens": rng(1, 4, c),
        "embeddings.patch_embeddings.weight": rng(c, 3, patch, patch) / patch,
        "embeddings.patch_embeddings.bias": np.zeros(c),
        "norm.weight": np.ones(c),
        "norm.bias": np.zeros(c),
    }
    shapes = {
        "attention.k_proj": (c, c), "attention.v_proj": (c, c), "attention.q_proj": (c, c), "attention.o_proj": (c, c),
        "mlp.up_proj": (wide, c), "mlp.down_proj": (c, wide),
    }  # fmt: skip
    for name, shape in shapes.items():
        state[f"layer.0.{name}.weight"] = rng(*shape) / shape[1] ** 0.5
        if name != "attention.k_proj":
            state[f"layer.0.{name}.bias"] = np.zeros(shape[0])
    for norm in ("norm1", "norm2"):
        state[f"layer.0.{norm}.weight"], state[f"layer.0.{norm}.bias"] = np.ones(c), np.zeros(c)
    for part in ("layer_scale1", "layer_scale2"):
        scale = np.full(c, 0.5)
        scale[:6] = scale[-2:] = 0  # colours and constants pass through
        state[f"layer.0.{part}.lambda1"] = scale
    weight = state["embeddings.patch_embeddings.weight"]
    weight[:6] = weight[-2:] = 0
    for channel in range(3):
        weight[channel, channel] = 1 / patch**2
        weight[3 + channel, channel] = -1 / patch**2
    state["embeddings.patch_embeddings.bias"][-2:] = [4, -4]
    for tokens in ("cls_token", "register_tokens"):
        state[f"embeddings.{tokens}"][..., :6] = 0
        state[f"embeddings.{tokens}"][..., -2:] = [4, -4]
    return state


# ---------------------------------------------------------------------------------------------------------------
# the checkpoint

# name in pipeline.json: class, arguments, tensors
FLOWS = {
    "sparse_structure_flow_model": ("SparseStructureFlowModel", flow_args(8, LATENT), 21, 0.75, 3.0, False),
    "shape_slat_flow_model_512": ("SLatFlowModel", flow_args(32, LATENT), 22, 1.5, 2.4, False),
    "shape_slat_flow_model_1024": ("SLatFlowModel", flow_args(64, LATENT), 23, 2.5, 2.4, False),
    "tex_slat_flow_model_512": ("SLatFlowModel", flow_args(32, 2 * LATENT), 24, 2.5, 2.5, True),
    "tex_slat_flow_model_1024": ("SLatFlowModel", flow_args(64, 2 * LATENT), 25, 5.0, 2.5, True),
}


def networks() -> dict[str, tuple[str, Mapping[str, Any], State]]:
    """Class, arguments and tensors of every network, by the name that pipeline.json gives it."""
    made: dict[str, tuple[str, Mapping[str, Any], State]] = {
        "sparse_structure_decoder": ("SparseStructureDecoder", STRUCTURE_DECODER, structure_decoder()),
        "shape_slat_decoder": ("FlexiDualGridVaeDecoder", SHAPE_DECODER, shape_decoder()),
        "tex_slat_decoder": ("SparseUnetVaeDecoder", MATERIAL_DECODER, material_decoder()),
    }
    for name, (kind, args, seed, reach, growth, colour) in FLOWS.items():
        made[name] = (kind, args, flow(args, seed, reach, growth, colour))
    return made


def sampler(strength: float, rescale: float, end: float, rescale_t: float) -> dict[str, Any]:
    params = {
        "steps": 12,
        "guidance_strength": strength,
        "guidance_rescale": rescale,
        "guidance_interval": [0.6, end],
        "rescale_t": rescale_t,
    }
    return {"name": "FlowEulerGuidanceIntervalSampler", "args": {"sigma_min": 1e-5}, "params": params}


def pipeline(names: list[str]) -> dict[str, Any]:
    """pipeline.json, in the published layout."""
    return {
        "name": "Trellis2ImageTo3DPipeline",
        "untrained": True,
        "args": {
            "models": {name: f"ckpts/{name}" for name in names},
            "sparse_structure_sampler": sampler(7.5, 0.7, 1.0, 5.0),
            "shape_slat_sampler": sampler(7.5, 0.5, 1.0, 3.0),
            "tex_slat_sampler": sampler(1.0, 0.0, 0.9, 3.0),
            "shape_slat_normalization": {"mean": LATENT_MEAN, "std": LATENT_STD},
            "tex_slat_normalization": {"mean": MATERIAL_MEAN, "std": MATERIAL_STD},
            "image_cond_model": {"name": "DinoV3FeatureExtractor", "args": {"model_name": "dinov3"}},
            "default_pipeline_type": "1024_cascade",
        },
    }


def stored(value: np.ndarray) -> np.ndarray:
    """The tensor in half precision where its range fits, else in single precision."""
    half = np.abs(value).max(initial=0) <= 65504
    return np.ascontiguousarray(value.astype(np.float16 if half else np.float32))


def write(folder: Path) -> None:
    """Write the checkpoint into ``folder``."""
    made = networks()
    (folder / "ckpts").mkdir(parents=True, exist_ok=True)
    (folder / "dinov3").mkdir(exist_ok=True)
    for name, (kind, args, state) in made.items():
        _write_json(folder / "ckpts" / f"{name}.json", {"name": kind, "args": args})
        save_file({key: stored(state[key]) for key in sorted(state)}, folder / "ckpts" / f"{name}.safetensors")
    _write_json(folder / "dinov3" / "config.json", IMAGE_ENCODER)
    encoder = {key: value.astype(np.float32) for key, value in sorted(image_encoder().items())}
    save_file(encoder, folder / "dinov3" / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "pipeline.json", pipeline(sorted(made)))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "embedded")
