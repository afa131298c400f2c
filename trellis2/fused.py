"""Norms of the networks as single GPU kernels, computed in float32 whatever comes in.  For inference: no gradients."""

from __future__ import annotations

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
    step = weight.stride(0) if weight is not None and weight.ndim == 2 and len(weight) > 1 else 0
    with torch.cuda.device(x.device):
        _layer_norm[(len(rows),)](
            rows,
            weight,
            bias,
            out,
            channels,
            step,
            eps,
            WIDTH=triton.next_power_of_2(channels),
            AFFINE=weight is not None,
            AROUND_ONE=around_one,
        )
    return out.view(x.shape)


def rms_rotate(x: Tensor, gamma: Tensor, phases: Tensor | None) -> Tensor:
    """``RMSNorm`` of every head, then ``rotate``; without ``phases`` the norm alone.

    x: (T, H, D), heads of one token contiguous. gamma: (H, D). phases: (T, D / 2) complex64.
    Returns (T, H, D), contiguous, in the dtype of x.
    """
    tokens, heads, size = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    angles = gamma if phases is None else torch.view_as_real(phases)
    with torch.cuda.device(x.device):
        _rms_rotate[(tokens,)](
            x,
            gamma,
            angles,
            out,
            x.stride(0),
            heads,
            size,
            HEADS=triton.next_power_of_2(heads),
            SIZE=triton.next_power_of_2(size),
            ROTATE=phases is not None,
        )
    return out


@jit
def _layer_norm(  # type: ignore[no-untyped-def]  # Triton compiles annotations as well
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
    mean = tl.sum(value) / channels
    centred = tl.where(inside, value - mean, 0.0)
    value = centred * tl.rsqrt(tl.sum(centred * centred) / channels + eps)
    if AFFINE:
        factor = tl.load(weight + row * step + channel, mask=inside, other=0.0).to(tl.float32)
        if AROUND_ONE:
            factor += 1.0
        value = value * factor + tl.load(bias + row * step + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * channels + channel, value.to(out.dtype.element_ty), mask=inside)


@jit
def _rms_rotate(  # type: ignore[no-untyped-def]
    x,
    gamma,
    angles,
    out,
    stride,
    heads,
    size,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    ROTATE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    channel = tl.arange(0, SIZE)[None, :]
    inside = (head < heads) & (channel < size)
    place = head * size + channel
    value = tl.load(x + token * stride + place, mask=inside, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(value * value, axis=1))[:, None]
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
    tl.store(out + token * heads * size + place, value.to(out.dtype.element_ty), mask=inside)
