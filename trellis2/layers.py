"""What several model families share: norms in float32, rotary positions, attention over packed tokens.

Tokens are packed: all tokens of a batch stand in one (T, C) tensor, ``lengths`` says how many belong to each item.
Parameters keep the names and layouts of the published checkpoints.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar, cast

import torch
import torch.nn.functional as F
from o_voxel.conv import SEGMENT, ConvPlan, submanifold_conv3d
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _compiled_in_training(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """On a GPU with gradients, where the kernels of ``fused`` do not serve, PyTorch compiles ``function`` into few.

    Compiled once for each shape but for the first axis, which may have any length.
    """

    @lru_cache(maxsize=1)
    def compiled() -> Callable[_Arguments, _Result]:
        # Never dynamic by itself: then other widths, too, would become variables, and norms two passes.
        return torch.compile(function, dynamic=False)

    @wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if not _trains_on_gpu(args[0]):
            return function(*args, **kwargs)
        for value in args:
            if isinstance(value, Tensor):
                torch._dynamo.maybe_mark_dynamic(value, 0)
        return compiled()(*args, **kwargs)

    return call


class LayerNorm32(nn.LayerNorm):
    """Layer norm computed in float32, whatever comes in."""

    def forward(self, input: Tensor) -> Tensor:
        if _fusible(input):
            from .fused import layer_norm

            return layer_norm(input, self.weight, self.bias, self.eps)
        return _norm(input, self.weight, self.bias, self.eps)

    def modulated(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """norm(x) * (1 + scale) + shift of a norm without weights.  x: (T, C). scale, shift: (1, C) or (T, C)."""
        if _fusible(x):
            from .fused import layer_norm

            return layer_norm(x, scale, shift, self.eps, around_one=True)
        return _modulated(x, scale, shift, self.eps)


def _float32_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)


_norm = _compiled_in_training(_float32_norm)


@_compiled_in_training
def _modulated(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return _float32_norm(x, None, None, eps) * (1 + scale) + shift


class RMSNorm(nn.Module):
    """Per-head norm of queries and keys: unit length times sqrt(head_dim) times ``gamma`` (heads, head_dim)."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(heads, head_dim))

    def forward(self, x: Tensor, phases: Tensor | None = None) -> Tensor:
        """x: (T, heads, head_dim). phases: turn the result by these, see ``rotate``."""
        normed = _rms_norm(x, self.gamma)
        return normed if phases is None else rotate(normed, phases)


def _rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    return (F.normalize(x.float(), dim=-1) * gamma * x.shape[-1] ** 0.5).to(x.dtype)


def normed_heads(x: Tensor, norms: Sequence[RMSNorm], phases: Tensor | None = None) -> tuple[Tensor, ...]:
    """The parts of ``x`` (T, P, heads, head_dim), the first of them through ``norms`` (one or two).

    On a GPU without gradients ``x`` is overwritten.
    """
    if _fusible(x):
        from .fused import rms_rotate_

        rms_rotate_(x, [norm.gamma for norm in norms], phases)
        return x.unbind(1)
    if _trains_on_gpu(x):
        turns = None if phases is None else torch.view_as_real(phases)
        return _normed_parts(x, turns, *(norm.gamma for norm in norms))
    parts = x.unbind(1)
    return (*(norm(part, phases) for norm, part in zip(norms, parts, strict=False)), *parts[len(norms) :])


@_compiled_in_training
def _normed_parts(x: Tensor, turns: Tensor | None, *gammas: Tensor) -> tuple[Tensor, ...]:
    """``normed_heads`` for a compiler that knows no complex numbers; ``turns`` (T, head_dim / 2, 2)."""
    out = []
    for part, gamma in itertools.zip_longest(x.unbind(1), gammas):
        if gamma is None:
            out.append(part.clone())  # as a view it would have its gradient added in a pass of its own
            continue
        normed = _rms_norm(part, gamma)
        if turns is not None:
            (a, b), (c, d) = normed.float().unflatten(-1, (-1, 2)).unbind(-1), turns[:, None].unbind(-1)
            normed = torch.stack([a * c - b * d, a * d + b * c], dim=-1).flatten(-2).to(x.dtype)
        out.append(normed)
    return tuple(out)


def add_and_norm(
    x: Tensor,
    update: Tensor,
    norm: LayerNorm32,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``x + update * gate``, and its norm, modulated where ``scale`` and ``shift`` are given; both (T, C).

    x: (T, C). update, gate, scale, shift: (T, C), or (1, C) for all tokens.
    """
    if _fusible(x):
        from .fused import add_and_norm as fused

        modulated = scale is not None
        weight, bias = (scale, shift) if modulated else (norm.weight, norm.bias)
        return fused(x, update, gate, weight, bias, norm.eps, around_one=modulated)
    return _add_and_norm(x, update, gate, norm.weight, norm.bias, scale, shift, norm.eps)


@_compiled_in_training
def _add_and_norm(
    x: Tensor,
    update: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    x = x + update if gate is None else torch.addcmul(x, update, gate)
    h = _float32_norm(x, weight, bias, eps)
    return x, h if scale is None or shift is None else h * (1 + scale) + shift


def linear_gelu(linear: nn.Linear, x: Tensor) -> Tensor:
    """``linear``, then GELU in its tanh form."""
    if _fusible(x):
        # In one kernel.  Only on a GPU is this function's GELU the tanh form.
        return torch._addmm_activation(linear.bias, x, linear.weight.t(), use_gelu=True)
    return F.gelu(linear(x), approximate="tanh")


class SparseConv3d(nn.Module):
    """Submanifold 3x3x3 convolution. ``weight`` (out, 3, 3, 3, in), ``bias`` (out,)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, 3, 3, 3, channels))
        self.bias = nn.Parameter(torch.empty(out_channels))

    def forward(self, feats: Tensor, plan: ConvPlan, part: slice | None = None) -> Tensor:
        first, last = (0, None) if part is None else (part.start, part.stop)
        return submanifold_conv3d(feats, plan, self.weight, self.bias, first, last)


def parts(count: int) -> list[slice]:
    """Cut ``range(count)`` at multiples of ``SEGMENT``, whatever memory there is: results do not depend on it.

    With gradients there is one part: everything is kept for them in any case, and each part's would cost as much.
    """
    if torch.is_grad_enabled():
        return [slice(0, count)] if count else []
    return [slice(first, min(first + SEGMENT, count)) for first in range(0, count, SEGMENT)]


def by_parts(body: Callable[[slice], Tensor], count: int) -> Tensor:
    """Join ``body``'s rows of each of ``parts(count)``, so that what it makes on the way stays small."""
    if count <= SEGMENT or torch.is_grad_enabled():
        return body(slice(0, count))
    first, *others = parts(count)
    rows = body(first)
    out = rows.new_empty(count, *rows.shape[1:])
    out[first] = rows
    for part in others:
        out[part] = body(part)
    return out


def rotary_phases(coords: Tensor, head_dim: int, freq: tuple[float, float]) -> Tensor:
    """Rotary position phases in three dimensions (RoFormer, Su et al. 2021).

    coords: (T, 3). A third of the head's channel pairs turns with each axis; what is left over does not turn.
    ``freq``: (highest frequency, ratio of highest to lowest).  Returns (T, head_dim / 2) complex64.
    """
    pairs = head_dim // 2 // 3
    scale = torch.arange(pairs, dtype=torch.float32, device=coords.device) / pairs
    frequencies = freq[0] / freq[1] ** scale
    angles = (coords.float()[:, :, None] * frequencies).flatten(1)
    angles = F.pad(angles, (0, head_dim // 2 - angles.shape[1]))
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, phases: Tensor) -> Tensor:
    """Turn neighbouring channel pairs of ``x`` (T, H, D) by ``phases`` (T, D / 2), in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * phases[:, None]).flatten(-2).to(x.dtype)


_FASTEST_EXACT = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def fast_attention(device: torch.device) -> AbstractContextManager[None]:
    """Inside the block, ``attention`` takes the fastest exact kernel: cuDNN's on a GPU, where it has one.

    On an H100, bfloat16 with heads of 128, cuDNN reaches 600 TFLOP/s and FlashAttention-2 360.  With gradients
    PyTorch's own order stands.
    """
    if device.type == "cpu" or torch.is_grad_enabled():
        return nullcontext()
    return sdpa_kernel(_FASTEST_EXACT, set_priority=True)


def attention(q: Tensor, k: Tensor, v: Tensor, q_lengths: Sequence[int], k_lengths: Sequence[int]) -> Tensor:
    """Full softmax attention inside each batch item.

    q: (Tq, H, D); k, v: (Tk, H, D), packed with the given lengths.  Returns (Tq, H, D).
    """
    if len(q_lengths) == 1:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)
    if _trains_on_gpu(q) and q.dtype != torch.float32:
        from torch.nn.attention.varlen import varlen_attn

        first_q, first_k = (_first_tokens(tuple(lengths), q.device) for lengths in (q_lengths, k_lengths))
        out = varlen_attn(q, k, v, first_q, first_k, max(q_lengths), max(k_lengths))
        return cast(Tensor, out)
    groups, order = _padded(tuple(q_lengths), tuple(k_lengths), q.device)
    outs = []
    for q_rows, k_rows, beyond in groups:
        queries, keys, values = (
            x.index_select(0, rows.flatten()).unflatten(0, rows.shape).transpose(1, 2)
            for x, rows in ((q, q_rows), (k, k_rows), (v, k_rows))
        )
        mask = None
        if beyond is not None:  # one row for all queries, never written out
            mask = q.new_zeros(beyond.shape).masked_fill(beyond, float("-inf"))
            mask = mask[:, None, None].expand(-1, 1, q_rows.shape[1], -1)
        outs.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).transpose(1, 2).flatten(0, 1))
    return torch.cat(outs).index_select(0, order)


@lru_cache(maxsize=16)
def _padded(
    q_lengths: tuple[int, ...], k_lengths: tuple[int, ...], device: torch.device
) -> tuple[list[tuple[Tensor, Tensor, Tensor | None]], Tensor]:
    """Groups of items of about one length, in which the shorter ones repeat their last row.

    Returns for each group rows of the queries (B, L), of the keys (B, M), and which of these are repeated (B, M) if any
    are; and for each query its place in the joined results (Tq,).  Few groups, little padding: no item is less than
    half as long as the longest of its group.
    """
    members: list[list[int]] = []
    for item in sorted(range(len(q_lengths)), key=lambda item: -q_lengths[item]):
        if not members or 2 * q_lengths[item] < q_lengths[members[-1][0]]:
            members.append([])
        members[-1].append(item)
    groups: list[tuple[Tensor, Tensor, Tensor | None]] = []
    order = torch.empty(sum(q_lengths), dtype=torch.int64)
    filled = 0
    for group in members:
        (q_rows, q_beyond), (k_rows, k_beyond) = (_rows_of(group, lengths) for lengths in (q_lengths, k_lengths))
        order[q_rows[~q_beyond]] = filled + torch.nonzero(~q_beyond.flatten())[:, 0]
        filled += q_rows.numel()
        groups.append((q_rows.to(device), k_rows.to(device), k_beyond.to(device) if k_beyond.any() else None))
    return groups, order.to(device)


def _rows_of(group: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows (B, L) of items among all packed ones, and which of them are repeated (B, L)."""
    first = torch.tensor(list(itertools.accumulate(lengths, initial=0)))[list(group)][:, None]
    length = torch.tensor(lengths)[list(group)][:, None]
    longest, shortest = int(length.max()), int(length.min())
    # Kernels read a mask as it is where its length is a multiple of eight.
    step = torch.arange(longest if longest == shortest else -(-longest // 8) * 8)[None]
    return first + torch.minimum(step, length - 1), step >= length


@lru_cache(maxsize=16)
def _first_tokens(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """(B + 1,) int32: where each item starts among the packed tokens, and where the last one ends."""
    return torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32).to(device)


def rows_of_items(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """What belongs to items, for each of their packed tokens: (B, C) -> (T, C); (1, C) stays and broadcasts."""
    if len(rows) == 1:
        return rows
    owner = item_of_tokens(tuple(lengths), rows.device)
    if _trains_on_gpu(rows) and rows.dtype != torch.float32:
        # As exact, but its gradients are summed in float32, and not one after the other in ``rows.dtype``.
        return F.one_hot(owner, len(rows)).to(rows.dtype) @ rows
    return rows.index_select(0, owner)


@lru_cache(maxsize=16)
def item_of_tokens(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """(T,) int64: the batch item of each packed token."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)


def _fusible(x: Tensor) -> bool:
    """Whether the kernels of ``fused`` serve: they are for GPUs and keep no gradients."""
    return x.is_cuda and not torch.is_grad_enabled()


def _trains_on_gpu(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_cuda and torch.is_grad_enabled()


def set_torso_dtype(torso: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of all matrix products under ``torso``; norms and modulation stay float32."""
    for module in torso.modules():
        if isinstance(module, (nn.Linear, nn.Conv3d, SparseConv3d)):
            module.to(dtype)
