"""Float32 masters of half-precision weights, gradient clipping, moving averages."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trellis2.layers import SparseConv3d
from trellis2.models.structure_vae import StructureEncoder
from trellis2.models.voxel_vae import VoxelEncoder

QUIET = -4.0  # log variance of a latent before training


class MasterWeights:
    """A float32 copy of every trained parameter: what the optimiser moves, and what the networks are filled from.

    The networks compute in their own precision (``set_dtype``), as they do in inference.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.masters = {name: nn.Parameter(p.detach().float().clone()) for name, p in self.parameters.items()}

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Move the networks' gradients to the masters."""
        found = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        for name, parameter in self.parameters.items():
            self.masters[name].grad = torch.empty_like(self.masters[name]) if name in found else None
            parameter.grad = None
        torch._foreach_copy_([self.masters[name].grad for name in found], list(found.values()))

    @torch.no_grad()
    def fill(self) -> None:
        """Give the networks the masters' values."""
        torch._foreach_copy_(list(self.parameters.values()), list(self.masters.values()))

    def state_dict(self) -> dict[str, Tensor]:
        return {name: master.detach() for name, master in self.masters.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises KeyError and RuntimeError where tensors are missing or of another shape."""
        for name, master in self.masters.items():
            master.copy_(state[name])
        self.fill()


class MovingAverage:
    """Exponential moving average of the masters; young averages forget faster."""

    def __init__(self, masters: Mapping[str, Tensor], rate: float) -> None:
        self.rate = rate
        self.values = {name: value.detach().clone() for name, value in masters.items()}

    @torch.no_grad()
    def update(self, masters: Mapping[str, Tensor], step: int) -> None:
        """step: number of updates of the masters so far."""
        rate = min(self.rate, (1 + step) / (10 + step))
        names = list(self.values)
        values, news = [self.values[n] for n in names], [masters[n].detach() for n in names]
        torch._foreach_lerp_(values, news, 1 - rate)


class GradientClipper:
    """Clips the norm of all gradients at ``max_norm`` or, once there are enough, at a percentile of recent norms."""

    def __init__(self, max_norm: float, clip_percentile: float | None = None, window: int = 1000) -> None:
        self.max_norm = max_norm
        self.percentile = clip_percentile
        self.norms: deque[float] = deque(maxlen=window)

    def __call__(self, parameters: Iterable[nn.Parameter]) -> float:
        """Clip, and return the norm that was there."""
        limit = self.max_norm
        if self.percentile is not None and len(self.norms) >= 100:
            ranked = sorted(self.norms)
            limit = min(limit, ranked[min(len(ranked) - 1, int(len(ranked) * self.percentile / 100))])
        norm = float(nn.utils.clip_grad_norm_(list(parameters), limit))
        if math.isfinite(norm):
            self.norms.append(norm)
        return norm


def clipper_of(config: float | Mapping[str, Any]) -> GradientClipper:
    """grad_clip of a trainer's arguments: a norm, or {"name": "AdaptiveGradClipper", "args"}."""
    if isinstance(config, (int, float)):
        return GradientClipper(float(config))
    if config["name"] != "AdaptiveGradClipper":
        raise ValueError(f"grad_clip {config['name']!r} must be a number or an AdaptiveGradClipper.")
    return GradientClipper(**config["args"])


def optimizer_of(config: Mapping[str, Any], masters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over the masters; vectors (norms, biases, modulation) do not decay."""
    if config["name"] != "AdamW":
        raise ValueError(f"optimizer {config['name']!r} must be AdamW.")
    args = dict(config["args"])
    decay = args.pop("weight_decay", 0.01)
    if "betas" in args:
        args["betas"] = tuple(args["betas"])
    matrices = [m for m in masters.values() if m.ndim > 1]
    vectors = [m for m in masters.values() if m.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, fused=matrices[0].is_cuda, **args)


# ---------------------------------------------------------------------------------------------------------------
# first weights


@torch.no_grad()
def initialize(model: nn.Module, generator: torch.Generator) -> None:
    """Fill a network from ``build_model`` with first weights.

    Matrices by the size of their input and output (Glorot and Bengio 2010); what modulates a block or ends a network is
    zero, so that blocks start as the identity (Peebles and Xie 2023).
    """
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        parameter.copy_(_first(name, parameter, generator).to(parameter.dtype))
    for module in model.modules():
        # Empty space is the same in all channels but for biases, and a layer norm over equal channels is a cliff.
        if isinstance(module, (nn.Conv3d, SparseConv3d)) and module.bias is not None:
            bound = math.prod(module.weight.shape[1:]) ** -0.5
            module.bias.copy_(torch.empty(module.bias.shape).uniform_(-bound, bound, generator=generator))
    # Latents start with little noise, or decoders first learn to hear nothing.
    if isinstance(model, VoxelEncoder):
        model.to_latent.bias[model.config.latent_channels :] = QUIET
    if isinstance(model, StructureEncoder):
        model.out_layer[2].bias[model.config.latent_channels :] = QUIET


_ONES = ("gamma",)
_ZERO = ("adaLN_modulation.1.weight", "out_layer.weight", "to_subdiv.weight")
_BRANCH_ENDS = (".mlp.2.weight", "conv2.weight", ".out.weight")


def _first(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    zeros = torch.zeros(parameter.shape)
    if name.endswith(_ONES) or (name.endswith("weight") and parameter.ndim == 1):
        return zeros + 1
    if parameter.ndim == 1 or name.endswith(_ZERO):
        return zeros
    if name.endswith(("positions", "class_tokens", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight")):
        return zeros.normal_(0, 0.02, generator=generator)
    if name.endswith(_BRANCH_ENDS):
        # Not quite zero: a quarter of the usual size, so that deep stacks of convolutions start to learn at once.
        return _uniform(parameter, generator) * 0.25
    return _uniform(parameter, generator)


def _uniform(parameter: Tensor, generator: torch.Generator) -> Tensor:
    if parameter.ndim == 5 and parameter.shape[1:4] == (3, 3, 3):  # sparse: (out, 3, 3, 3, in), about a third is there
        fan_in, fan_out = 9 * parameter.shape[4], 9 * parameter.shape[0]
    else:
        space = math.prod(parameter.shape[2:])
        fan_in, fan_out = parameter.shape[1] * space, parameter.shape[0] * space
    bound = math.sqrt(6 / (fan_in + fan_out)) if parameter.ndim == 2 else math.sqrt(3 / fan_in)
    return torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
