"""The GPU's body of ``o_voxel.conv``: gather and multiply in one kernel, without the 27-fold copy of the input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .conv import ConvPlan

    # Type checkers cannot follow Triton's kernel language: to them it is all Any.
    _Function = TypeVar("_Function")

    def jit(body: _Function) -> Any: ...

    tl: Any
else:
    try:
        import triton.language as tl
        from triton import jit
    except ImportError as error:
        raise RuntimeError(
            "Convolutions on a GPU need Triton, which comes with torch for CUDA on Linux; "
            "on Windows run: pip install triton-windows"
        ) from error


_ROWS = 128  # that the gradient of a weight multiplies at once
_PARTIAL_SUMS = 1 << 24  # values that it holds before they are added


class Convolution(torch.autograd.Function):
    """``convolve`` with gradients for features, weight and bias."""

    @staticmethod
    def forward(ctx: Any, feats: Tensor, plan: ConvPlan, weight: Tensor, bias: Tensor, first: int, last: int) -> Tensor:
        ctx.save_for_backward(feats, weight)
        ctx.plan, ctx.first, ctx.last = plan, first, last
        return convolve(feats, plan, weight, bias, first, last)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        feats, weight = ctx.saved_tensors
        plan = ctx.plan
        whole = gradient.new_zeros(len(feats), len(weight))
        whole[ctx.first : ctx.last] = gradient
        # Being a neighbour is mutual: what came in through a tap goes back through the opposite one.
        back = weight.flip(1, 2, 3).permute(4, 1, 2, 3, 0)
        to_feats = convolve(whole, plan, back, weight.new_zeros(len(back)), 0, len(feats))
        to_weight = weight_gradient(whole, feats, plan).view_as(weight).to(weight.dtype)
        return to_feats, None, to_weight, gradient.sum(dim=0), None, None


def convolve(feats: Tensor, plan: ConvPlan, weight: Tensor, bias: Tensor, first: int, last: int) -> Tensor:
    """``submanifold_conv3d`` of rows ``first`` to ``last``, whose arguments have been checked; without gradients.

    Half precision is multiplied on tensor cores and summed in float32; float32 is multiplied in TF32 where
    ``torch.backends.cuda.matmul.allow_tf32`` is set.  Other dtypes do not compile.
    """
    from .conv import TILE

    assert plan.order is not None
    channels, outputs = feats.shape[1], len(weight)
    out = feats.new_empty(last - first, outputs)
    if not out.numel():
        return out
    columns = min(128, max(16, 1 << (outputs - 1).bit_length()))
    depth = min(64, max(16, 1 << (channels - 1).bit_length())) if feats.itemsize == 2 else 16
    tiles = -(-last // TILE) - first // TILE
    with torch.cuda.device(feats.device):
        _convolve[(tiles * -(-outputs // columns),)](
            feats.contiguous(),
            weight.contiguous(),
            bias.contiguous(),
            plan.neighbors,
            plan.order,
            plan.taps,
            plan.tap_counts,
            out,
            first,
            last,
            len(feats),
            channels,
            outputs,
            TILE=TILE,
            COLUMNS=columns,
            DEPTH=depth,
            WHOLE=channels % depth == 0,
            PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
            num_warps=8 if columns == 128 else 4,
            num_stages=3 if feats.itemsize == 2 else 2,
        )
    return out


def weight_gradient(gradient: Tensor, feats: Tensor, plan: ConvPlan) -> Tensor:
    """Gradient of a convolution's weight, (Co, 27 Ci) float32; its sums have one order.

    gradient: (N, Co), of all rows of the output. feats: (N, Ci). plan: of the N voxels.
    """
    assert plan.order is not None
    count, channels = feats.shape
    outputs = gradient.shape[1]
    total = feats.new_zeros(outputs, 27, channels, dtype=torch.float32)
    if not count or not total.numel():
        return total.flatten(1)
    columns, depth = (min(64, max(16, 1 << (n - 1).bit_length())) for n in (outputs, channels))
    # Pieces of the sum keep all of a GPU busy; there are fewer where each result is large.
    pieces = min(64, max(1, _PARTIAL_SUMS // total.numel()), -(-count // _ROWS))
    piece = -(-count // (pieces * _ROWS)) * _ROWS
    partial = total.new_empty(-(-count // piece), *total.shape)
    with torch.cuda.device(feats.device):
        _weigh[(27 * -(-outputs // columns) * -(-channels // depth), len(partial))](
            gradient[plan.order],
            feats.contiguous(),
            plan.neighbors,
            partial,
            count,
            piece,
            channels,
            outputs,
            ROWS=_ROWS,
            COLUMNS=columns,
            DEPTH=depth,
            PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
            num_warps=4,
            num_stages=3 if feats.itemsize == 2 else 2,
        )
    return partial.sum(dim=0).flatten(1)


@jit
def _weigh(  # type: ignore[no-untyped-def]  # Triton compiles annotations as well
    gradient,  # (N, outputs), in the order of the plan
    feats,  # (N, channels)
    neighbors,  # (27, N)
    partial,  # (pieces, outputs, 27, channels)
    count,
    piece,
    channels,
    outputs,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The taps of one block run side by side and share what they gather in the cache.
    tap = tl.program_id(0) % 27
    block = tl.program_id(0) // 27
    across = tl.cdiv(channels, DEPTH)
    output = block // across * COLUMNS + tl.arange(0, COLUMNS)
    channel = block % across * DEPTH + tl.arange(0, DEPTH)
    first = tl.program_id(1) * piece
    sums = tl.zeros((COLUMNS, DEPTH), tl.float32)
    for start in range(first, tl.minimum(first + piece, count), ROWS):
        place = start + tl.arange(0, ROWS)
        here = place < count
        row = tl.where(here, tl.load(neighbors + tap.to(tl.int64) * count + place, mask=here, other=0), -1)
        left = gradient + place[:, None].to(tl.int64) * outputs + output[None, :]
        right = feats + row[:, None].to(tl.int64) * channels + channel[None, :]
        a = tl.load(left, mask=here[:, None] & (output < outputs)[None, :], other=0.0)
        b = tl.load(right, mask=(row >= 0)[:, None] & (channel < channels)[None, :], other=0.0)
        sums = tl.dot(tl.trans(a), b, sums, input_precision=PRECISION)
    target = partial + ((tl.program_id(1) * outputs + output[:, None]) * 27 + tap) * channels + channel[None, :]
    tl.store(target, sums, mask=(output < outputs)[:, None] & (channel < channels)[None, :])


@jit
def _convolve(  # type: ignore[no-untyped-def]  # Triton compiles annotations as well
    feats,  # (N, channels)
    weight,  # (outputs, 27, channels)
    bias,
    neighbors,  # (27, N)
    order,
    taps,  # (tiles, 27)
    tap_counts,
    out,  # (last - first, outputs)
    first,
    last,
    count,
    channels,
    outputs,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The blocks of one tile run side by side and share what they gather in the cache.
    blocks = tl.cdiv(outputs, COLUMNS)
    tile = first // TILE + tl.program_id(0) // blocks
    places = tile * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    here, wanted = places < last, column < outputs
    sums = tl.zeros((TILE, COLUMNS), tl.float32)
    steps = tl.cdiv(channels, DEPTH)
    # One flat loop over taps and channels, so that the next loads always overlap the product.
    for step in range(tl.load(tap_counts + tile) * steps):
        tap = tl.load(taps + tile * 27 + step // steps)
        channel = step % steps * DEPTH + tl.arange(0, DEPTH)
        # Not other=-1, which Triton 3.2 (torch 2.6) cannot compile in a loop whose loads overlap.
        row = tl.where(here, tl.load(neighbors + tap.to(tl.int64) * count + places, mask=here, other=0), -1)
        left = feats + row[:, None].to(tl.int64) * channels + channel[None, :]
        right = weight + (column[None, :] * 27 + tap) * channels + channel[:, None]
        if WHOLE:
            a = tl.load(left, mask=(row >= 0)[:, None], other=0.0)
            b = tl.load(right, mask=wanted[None, :], other=0.0)
        else:
            a = tl.load(left, mask=(row >= 0)[:, None] & (channel < channels)[None, :], other=0.0)
            b = tl.load(right, mask=wanted[None, :] & (channel < channels)[:, None], other=0.0)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    sums += tl.load(bias + column, mask=wanted, other=0.0).to(tl.float32)[None, :]
    row = tl.load(order + places, mask=here, other=0) - first
    target = out + row[:, None].to(tl.int64) * outputs + column[None, :]
    tl.store(target, sums.to(out.dtype.element_ty), mask=here[:, None] & wanted[None, :])
