"""The losses, as functions from predictions and targets to named terms.

Terms are means over the objects of a batch of means within each object, so that a batch spread over several processes
gives the gradients of the whole.  Sources: "Native and Compact Structured Latents for 3D Generation" (TRELLIS.2, 2025)
and its published configs for the terms and their default weights; Kingma and Welling 2014 (KL); Lipman et al. 2023 and
Liu et al. 2023 (flow matching); Ho and Salimans 2022 (dropping conditions).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from o_voxel.lookup import voxel_rows
from torch import Tensor, nn

from trellis2.models.voxel_vae import DualGrid, UpBlock, VoxelDecoder
from trellis2.voxels import Grid, Refinement, Voxels

_AROUND = (
    ((0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 1, 0)),
    ((0, 0, 0), (1, 0, 0), (1, 0, 1), (0, 0, 1)),
    ((0, 0, 0), (0, 1, 0), (1, 1, 0), (1, 0, 0)),
)
"""The voxels around that edge of a voxel along x, y, z which ends in its far corner, as o_voxel.dual_grid has them."""
MAP_WAVES = (0.5, 1.0, 2.0, 4.0)
"""Periods in the unit cube of the waves by which a patch tells its place."""
MAP_CHANNELS = 6 * len(MAP_WAVES) + 4 * (3 + 1)


def object_mean(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """Mean over ``count`` objects of the mean over each one's rows; values (N, ...), owner (N,).

    An object without rows counts as zero.
    """
    rows = values.flatten(1).mean(dim=1) if values.ndim > 1 else values
    # Not by index_add: where many rows are added up to few sums, a GPU adds them one by one.
    sizes = (owner == torch.arange(count, device=owner.device)[:, None]).sum(dim=1)
    return (rows / sizes[owner]).sum() / count


def kl_term(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Against the unit Gaussian, per element (Kingma and Welling 2014)."""
    return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1)


def sampled(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    return mean + (0.5 * log_variance).exp() * noise


def structure_terms(logits: Tensor, occupancy: Tensor, mean: Tensor, log_variance: Tensor) -> dict[str, Tensor]:
    """logits, occupancy (B, 1, R, R, R); mean, log_variance (B, C, r, r, r)."""
    probability = logits.sigmoid().flatten(1)
    target = occupancy.flatten(1)
    overlap = 2 * (probability * target).sum(1) + 1
    return {
        "bce": F.binary_cross_entropy_with_logits(logits, occupancy),
        "dice": (1 - overlap / (probability.sum(1) + target.sum(1) + 1)).mean(),
        "kl": kl_term(mean, log_variance).mean(),
    }


def decode_guided(decoder: VoxelDecoder, latent: Voxels, steps: Sequence[Refinement]) -> tuple[Tensor, list[Tensor]]:
    """Run a decoder along known refinements, and collect what it would have decided itself.

    Returns feats (N, io_channels) float32 on the finest grid and, for a decoder that predicts subdivisions, its
    logits (n, 8) at each level.
    """
    logits: list[Tensor] = []
    hooks = []
    for block in decoder.modules():
        if isinstance(block, UpBlock) and hasattr(block, "to_subdiv"):
            hooks.append(block.register_forward_pre_hook(_Asks(logits)))
    try:
        decoded, _ = decoder(latent, steps)
    finally:
        for hook in hooks:
            hook.remove()
    return decoded.feats, logits


class _Asks:
    """Before an up block runs, keep what its ``to_subdiv`` says."""

    def __init__(self, logits: list[Tensor]) -> None:
        self.logits = logits

    def __call__(self, block: nn.Module, inputs: tuple[Tensor, Refinement]) -> None:
        self.logits.append(block.to_subdiv(inputs[0]).float())


def subdivision_target(step: Refinement) -> Tensor:
    """(n, 8) float32: which children of each coarse voxel exist."""
    target = torch.zeros(len(step.coarse) * 8, device=step.parent.device)
    target[step.parent * 8 + step.child] = 1
    return target.view(-1, 8)


def shape_terms(
    feats: Tensor,
    subdivisions: Sequence[Tensor],
    steps: Sequence[Refinement],
    target: DualGrid,
    splits: tuple[Tensor, Tensor],
    resolutions: Sequence[int],
    margin: float,
) -> dict[str, Tensor]:
    """Terms of the shape decoder's seven output channels and of its subdivisions.

    splits: (N, 3) bool each, whether the diagonal of the quad at a voxel's edge matters, and whether it is 0-2.
    resolutions: of each object.  vertice: squared error of dual vertices, in voxels. intersected: of edge flags.
    depth: distance of predicted vertices from the planes of the true quads around them, in units of the cube. normal:
    of quads, |difference|. split: of the diagonals. The last three stand in for the published rendering losses.
    """
    count = len(target.grid.lengths)
    owner = target.grid.coords[:, 0].long()
    offsets = (1 + 2 * margin) * feats[:, :3].sigmoid() - margin
    terms = {
        "intersected": object_mean(
            F.binary_cross_entropy_with_logits(feats[:, 3:6], target.crossed.float(), reduction="none"), owner, count
        ),
        "vertice": object_mean((offsets - target.offsets).square(), owner, count),
    }
    subdivision = [
        object_mean(
            F.binary_cross_entropy_with_logits(logits, subdivision_target(step), reduction="none"),
            step.coarse.coords[:, 0].long(),
            count,
        )
        for logits, step in zip(subdivisions, steps, strict=True)
    ]
    terms |= {f"subdiv{level}": value for level, value in enumerate(subdivision)}

    rows, voxel, axis = quads(target.grid, target.crossed)
    whose = owner[voxel]
    place = target.grid.coords[:, 1:].float()
    true, guess = (place + target.offsets)[rows], (place + offsets)[rows]
    true_normal, guess_normal = quad_normals(true), quad_normals(guess)
    unit = torch.tensor([1 / r for r in resolutions], device=feats.device)[whose]
    distance = ((guess - true) * true_normal[:, None]).sum(-1).abs().mean(1) * unit
    terms["depth"] = object_mean(distance, whose, count)
    terms["normal"] = object_mean((guess_normal - true_normal).abs(), whose, count)

    matters, along_02 = (part[voxel, axis] for part in splits)
    weight = F.softplus(feats[:, 6]).clamp_min(1e-6).log()[rows[matters]]
    logit = weight[:, 0] + weight[:, 2] - weight[:, 1] - weight[:, 3]
    loss = F.binary_cross_entropy_with_logits(logit, along_02[matters].float(), reduction="none")
    terms["split"] = object_mean(loss, whose[matters], count)
    return terms


def quads(grid: Grid, crossed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Voxels around each crossed edge where all four exist: rows (Q, 4), and the edge's voxel (Q,) and axis (Q,)."""
    voxel, axis = crossed.nonzero(as_tuple=True)
    around = F.pad(torch.tensor(_AROUND, device=crossed.device, dtype=grid.coords.dtype), (1, 0))
    wanted = (grid.coords[voxel][:, None] + around[axis]).reshape(-1, 4)
    rows = voxel_rows(grid.coords, wanted).view(-1, 4)
    whole = (rows >= 0).all(dim=1)
    return rows[whole], voxel[whole], axis[whole]


def quad_normals(corners: Tensor) -> Tensor:
    """(Q, 4, 3) -> (Q, 3), of unit length."""
    a, b, c, d = corners.unbind(1)
    return F.normalize(torch.linalg.cross(c - a, d - b, dim=-1), dim=-1, eps=1e-6)


def material_error(feats: Tensor, target: Tensor, grid: Grid, kind: str) -> Tensor:
    """feats, target (N, 6) in [-1, 1]; kind "l1" or "l2": absolute or squared."""
    error = feats - target
    each = error.abs() if kind == "l1" else error.square()
    return object_mean(each, grid.coords[:, 0].long(), len(grid.lengths))


@contextmanager
def outputs_of(kinds: tuple[type[nn.Module], ...], network: nn.Module) -> Iterator[list[Tensor]]:
    """What the modules of some kinds give as long as the block lasts, in their order."""
    found: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, __, out: found.append(out))
        for module in network.modules()
        if isinstance(module, kinds)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def coarse_means(attrs: Tensor, steps: Sequence[Refinement]) -> list[Tensor]:
    """Means of ``attrs`` (N, C) over the voxels of each grid above the finest, coarse to fine like ``steps``."""
    means = []
    for step in reversed(steps):
        sums = attrs.new_zeros(len(step.coarse), attrs.shape[1] + 1)
        sums.index_add_(0, step.parent, F.pad(attrs, (0, 1), value=1.0))
        attrs = sums[:, :-1] / sums[:, -1:]
        means.append(attrs)
    return means[::-1]


def map_terms(read: Tensor, maps: Tensor) -> dict[str, Tensor]:
    """What is read off the patches of pictures, against what they show.

    read (B, S^2, MAP_CHANNELS): waves of the place, then base colour and coverage of the patch's four quarters. maps
    (B, M, M, 7) uint8, see ``data.Sample``.  Squared errors: place, of the waves, and color, of the base colour, ten
    times, both over what is covered; coverage.
    """
    side = math.isqrt(read.shape[1])
    small = F.adaptive_avg_pool2d(maps.permute(0, 3, 1, 2).float() / 255, 2 * side)
    quarters = small.unflatten(3, (side, 2)).unflatten(2, (side, 2)).permute(0, 2, 4, 3, 5, 1)
    quarters = quarters.reshape(len(maps), side * side, 4, 7)
    covered = quarters[..., 6:]
    place, color = (quarters[..., :6] / covered.clamp_min(1 / 255)).split(3, dim=-1)
    angles = (place - 0.5)[..., None] * (2 * math.pi * torch.tensor(MAP_WAVES, device=maps.device))
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)
    whole = covered.sum(2)
    waves = (waves * covered).sum(2) / whole.clamp_min(1 / 255)
    found, found_color, found_cover = read.float().split([waves.shape[-1], 12, 4], dim=-1)
    place_error = ((found - waves).square() * whole).mean((1, 2))
    color_error = ((found_color.unflatten(-1, (4, 3)) - color).square() * covered).mean((1, 2, 3))
    share = covered.mean((1, 2, 3)).clamp_min(1 / 255)
    return {
        "place": (place_error / share / 4).mean(),
        "color": (10 * color_error / share).mean(),
        "coverage": (found_cover - covered[..., 0]).square().mean(),
    }


def flow_times(schedule: dict[str, object], generators: Sequence[torch.Generator]) -> Tensor:
    """One time in (0, 1) for each generator. schedule: {"name": "uniform" | "logitNormal", "args": {mean, std}}."""
    if schedule["name"] == "uniform":
        return torch.cat([torch.rand(1, generator=g) for g in generators])
    if schedule["name"] == "logitNormal":
        args = schedule["args"]
        normal = torch.cat([torch.randn(1, generator=g) for g in generators])
        return torch.sigmoid(normal * float(args["std"]) + float(args["mean"]))
    raise ValueError(f"t_schedule {schedule['name']!r} must be uniform or logitNormal.")


def noised(x: Tensor, noise: Tensor, t: Tensor, sigma_min: float) -> tuple[Tensor, Tensor]:
    """Tokens at time t (one for each row) and the velocity that leads there; see ``trellis2.sampling``."""
    t = t[:, None]
    return (1 - t) * x + (sigma_min + (1 - sigma_min) * t) * noise, (1 - sigma_min) * noise - x
