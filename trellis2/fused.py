"""Norms of the networks, and what stands beside them, as single GPU kernels that compute in float32 whatever comes in.

For inference: no gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    # Type checkers cannot follow Triton's kernel language: to them it is all Any.
    _Function = TypeVar("_Function")

    def jit(body: _Function) -> Any: ...

    tl: Any
    triton: Any
else:
    import triton
    import triton.language as tl
    from triton import jit


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, around_one: bool = False
) -> Tensor:
    """Layer norm over the last axis, times ``weight`` (plus one with ``around_one``), plus ``bias``.

    x: (..., C). weight, bias: both (C,), (1, C) or (rows of x, C), or both None.  Returns the shape and dtype of x.
    """
    channels = x.shape[-1]
    rows = x.reshape(-1, channels).contiguous()  # a transposed tensor would still be a view
    out = torch.empty_like(rows)
    if not len(rows):
        return out.view(x.shape)
    with torch.cuda.device(x.device):
        _layer_norm[(len(rows),)](
            rows,
            weight,
            bias,
            out,
            channels,
            _row_step(weight),
            eps,
            WIDTH=triton.next_power_of_2(channels),
            AFFINE=weight is not None,
            AROUND_ONE=around_one,
        )
    return out.view(x.shape)


def add_and_norm(
    x: Tensor,
    update: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    around_one: bool = False,
) -> tuple[Tensor, Tensor]:
    """``x + update * gate``, rounded to the dtype of x, and its ``layer_norm``; both (T, C).

    x: (T, C). update, gate: (T, C) or (1, C); gate None for ones. weight, bias: as for ``layer_norm``.
    """
    channels = x.shape[-1]
    x, update = x.contiguous(), update.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    if not len(x):
        return total, out
    with torch.cuda.device(x.device):
        _add_and_norm[(len(x),)](
            x,
            update,
            gate,
            weight,
            bias,
            total,
            out,
            channels,
            _row_step(update),
            _row_step(gate),
            _row_step(weight),
            eps,
            WIDTH=triton.next_power_of_2(channels),
            GATED=gate is not None,
            AFFINE=weight is not None,
            AROUND_ONE=around_one,
        )
    return total, out


def rms_rotate_(x: Tensor, gammas: Sequence[Tensor], phases: Tensor | None) -> None:
    """Replace the first one or two parts of ``x`` by ``RMSNorm`` of their heads, turned as ``rotate`` does.

    x: (T, P, H, D), the parts of one token contiguous. gammas: (H, D) for each part that is to be normed.
    phases: (T, D / 2) complex64, None to turn nothing.
    """
    tokens, _, heads, size = x.shape
    if not tokens:
        return
    angles = x if phases is None else torch.view_as_real(phases)
    with torch.cuda.device(x.device):
        _rms_rotate[(tokens, len(gammas))](
            x,
            gammas[0],
            gammas[-1],
            angles,
            x.stride(0),
            heads,
            size,
            HEADS=triton.next_power_of_2(heads),
            SIZE=triton.next_power_of_2(size),
            ROTATE=phases is not None,
        )


def _row_step(x: Tensor | None) -> int:
    """How far apart the rows of ``x`` lie, 0 where one row serves all."""
    return x.stride(0) if x is not None and x.ndim == 2 and len(x) > 1 else 0


@jit
def _normed(  # type: ignore[no-untyped-def]  # Triton compiles annotations as well
    value,
    inside,
    weight,
    bias,
    channels,
    eps,
    WIDTH: tl.constexpr,
    AFFINE: tl.constexpr,
    AROUND_ONE: tl.constexpr,
):
    channel = tl.arange(0, WIDTH)
    mean = tl.sum(value) / channels
    centred = tl.where(inside, value - mean, 0.0)
    value = centred * tl.rsqrt(tl.sum(centred * centred) / channels + eps)
    if AFFINE:
        factor = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        if AROUND_ONE:
            factor += 1.0
        value = value * factor + tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    return value


@jit
def _layer_norm(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    out,
    channels,
    step,
    eps,
    WIDTH: tl.constexpr,
    AFFINE: tl.constexpr,
    AROUND_ONE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    inside = channel < channels
    value = tl.load(x + row * channels + channel, mask=inside, other=0.0).to(tl.float32)
    if AFFINE:
        weight += row * step
        bias += row * step
    value = _normed(value, inside, weight, bias, channels, eps, WIDTH, AFFINE, AROUND_ONE)
    tl.store(out + row * channels + channel, value.to(out.dtype.element_ty), mask=inside)


@jit
def _add_and_norm(  # type: ignore[no-untyped-def]
    x,
    update,
    gate,
    weight,
    bias,
    total,
    out,
    channels,
    update_step,
    gate_step,
    step,
    eps,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    AFFINE: tl.constexpr,
    AROUND_ONE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    inside = channel < channels
    value = tl.load(x + row * channels + channel, mask=inside, other=0.0).to(tl.float32)
    change = tl.load(update + row * update_step + channel, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        change *= tl.load(gate + row * gate_step + channel, mask=inside, other=0.0).to(tl.float32)
    value = (value + change).to(total.dtype.element_ty)
    tl.store(total + row * channels + channel, value, mask=inside)
    if AFFINE:
        weight += row * step
        bias += row * step
    value = _normed(value.to(tl.float32), inside, weight, bias, channels, eps, WIDTH, AFFINE, AROUND_ONE)
    tl.store(out + row * channels + channel, value.to(out.dtype.element_ty), mask=inside)


@jit
def _rms_rotate(  # type: ignore[no-untyped-def]
    x,
    gamma,
    other_gamma,
    angles,
    stride,
    heads,
    size,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    ROTATE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    head = tl.arange(0, HEADS)[:, None]
    channel = tl.arange(0, SIZE)[None, :]
    inside = (head < heads) & (channel < size)
    place = head * size + channel
    own = x + token * stride + part * heads * size + place
    value = tl.load(own, mask=inside, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(value * value, axis=1))[:, None]
    if part == 1:
        gamma = other_gamma
    scale = tl.load(gamma + place, mask=inside, other=0.0).to(tl.float32) * tl.sqrt(size.to(tl.float32))
    value = value / tl.maximum(length, 1e-12) * scale
    if ROTATE:
        # As torch does it: the norm's result is rounded to the dtype before it is turned.
        value = value.to(x.dtype.element_ty).to(tl.float32)
        real, imaginary = tl.split(tl.reshape(value, (HEADS, SIZE // 2, 2)))
        angle = tl.load(angles + token * size + channel, mask=channel < size, other=0.0)
        cosine, sine = tl.split(tl.reshape(angle, (1, SIZE // 2, 2)))
        turned = tl.join(real * cosine - imaginary * sine, real * sine + imaginary * cosine)
        value = tl.reshape(turned, (HEADS, SIZE))
    tl.store(own, value.to(x.dtype.element_ty), mask=inside)
