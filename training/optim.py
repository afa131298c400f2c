"""Float32 masters of half-precision weights, gradient clipping, moving averages."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trellis2.layers import SparseConv3d
from trellis2.models.structure_vae import StructureEncoder
from trellis2.models.voxel_vae import DownBlock, UpBlock, VoxelDecoder, VoxelEncoder

QUIET = -4.0  # log variance of a latent before training
LOUD = 4.0  # the last convolution of a block that changes the resolution, against its shortcut


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


class MuonAdamW:
    """Muon (Jordan et al. 2024) for matrices, those of convolutions flattened to (outputs, rest); AdamW for vectors.

    Muon's steps are as large in all directions of a matrix.  Where Adam learns the brightness of a material first and
    its hue a thousand steps later, this learns both.  Matrices of one shape are treated together: one by one, as
    ``torch.optim.Muon`` has them, launching their kernels takes the host longer than a step of small networks.
    """

    def __init__(
        self,
        masters: Mapping[str, nn.Parameter],
        lr: float,
        vector_lr: float,
        betas: Sequence[float],
        momentum: float = 0.95,
    ) -> None:
        self.alike: dict[tuple[int, int], list[nn.Parameter]] = {}
        for master in masters.values():
            if master.ndim > 1:
                self.alike.setdefault((len(master), master[0].numel()), []).append(master)
        self.momentum = momentum
        self.velocities = {
            shape: torch.zeros(len(group), *shape, device=group[0].device) for shape, group in self.alike.items()
        }
        vectors = [m for m in masters.values() if m.ndim <= 1]
        self.adamw = torch.optim.AdamW(vectors, lr=vector_lr, betas=tuple(betas), weight_decay=0.0)
        self.muon: dict[str, Any] = {"lr": lr}
        self.param_groups = [self.muon, *self.adamw.param_groups]

    @torch.no_grad()
    def step(self) -> None:
        """Matrices without a gradient count as those of gradient zero."""
        for shape, group in self.alike.items():
            gradients = torch.stack([torch.zeros_like(m) if m.grad is None else m.grad for m in group]).flatten(2)
            velocity = self.velocities[shape].lerp_(gradients, 1 - self.momentum)
            update = orthogonalized(gradients.lerp(velocity, self.momentum))  # Nesterov's
            rate = self.muon["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
            for master, change in zip(group, update.float(), strict=True):
                master.sub_(change.view_as(master), alpha=rate)
        self.adamw.step()

    def state_dict(self) -> dict[str, Any]:
        return {"velocities": list(self.velocities.values()), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for mine, theirs in zip(self.velocities.values(), state["velocities"], strict=True):
            mine.copy_(theirs)
        self.adamw.load_state_dict(state["adamw"])
        self.param_groups = [self.muon, *self.adamw.param_groups]


def orthogonalized(matrices: Tensor) -> Tensor:
    """(N, A, B) bfloat16: ``matrices`` (N, A, B) with singular values near one (Jordan et al. 2024).

    Five steps of an odd quintic polynomial of the matrix with their coefficients, which bring small singular values up
    fast and leave all of them between 0.7 and 1.2.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if wide else x.mT


def optimizer_of(config: Mapping[str, Any], masters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer | MuonAdamW:
    """{"name": "AdamW" or "Muon", "args"}; with AdamW vectors (norms, biases, modulation) do not decay."""
    if config["name"] == "Muon":
        return MuonAdamW(masters, **config["args"])
    if config["name"] != "AdamW":
        raise ValueError(f"optimizer {config['name']!r} must be AdamW or Muon.")
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
    if isinstance(model, (VoxelEncoder, VoxelDecoder)):
        _start_pointwise(model, generator)
    # Latents start with little noise, or decoders first learn to hear nothing.
    if isinstance(model, VoxelEncoder):
        model.to_latent.bias[model.config.latent_channels :] = QUIET
    if isinstance(model, StructureEncoder):
        model.out_layer[2].bias[model.config.latent_channels :] = QUIET


def _start_pointwise(model: VoxelEncoder | VoxelDecoder, generator: torch.Generator) -> None:
    """Let what a voxel says reach its latent and come back.

    The shortcuts of these networks average channels on the way down and repeat single ones on the way up: a colour is
    lost on them after two levels.  So branches begin louder than shortcuts; convolutions look at the voxel itself and
    keep all directions apart (delta-orthogonal, Xiao et al. 2018); and the eight children of a voxel are treated alike,
    as sub-pixels are by Aitken et al. 2017.
    """
    for module in model.modules():
        if isinstance(module, SparseConv3d):
            _delta_orthogonal(module.weight, 1.0, generator)
            module.bias *= 0.1
    for module in model.modules():
        if isinstance(module, UpBlock):
            weight, bias = module.conv1.weight, module.conv1.bias
            first = _delta_orthogonal(weight[: len(weight) // 8], 1.0, generator)
            weight.copy_(first.repeat(8, 1, 1, 1, 1))
            bias.copy_(bias[: len(bias) // 8].repeat(8))
            _delta_orthogonal(module.conv2.weight, LOUD, generator)
        if isinstance(module, DownBlock):
            weight = module.conv2.weight
            first = _delta_orthogonal(weight[..., : weight.shape[-1] // 8], LOUD * 8**-0.5, generator)
            weight.copy_(first.repeat(1, 1, 1, 1, 8))


def _delta_orthogonal(weight: Tensor, gain: float, generator: torch.Generator) -> Tensor:
    """Fill and return the weight of a sparse convolution; each output is ``gain`` times as large as its inputs."""
    outputs, inputs = len(weight), weight.shape[-1]
    # In double precision, whose last bits, which differ from run to run, are then rounded away.
    draw = torch.randn(max(outputs, inputs), min(outputs, inputs), generator=generator, dtype=torch.float64)
    square, _ = torch.linalg.qr(draw)
    weight.zero_()
    weight[:, 1, 1, 1] = (square if outputs >= inputs else square.T) * gain * max(outputs / inputs, 1.0) ** 0.5
    return weight


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
    space = math.prod(parameter.shape[2:])
    fan_in, fan_out = parameter.shape[1] * space, parameter.shape[0] * space
    bound = math.sqrt(6 / (fan_in + fan_out)) if parameter.ndim == 2 else math.sqrt(3 / fan_in)
    return torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
