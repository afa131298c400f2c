"""Every trainer on a GPU: the first loss is that of the CPU, and bfloat16 learns too."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from o_voxel.conv import plan_conv, submanifold_conv3d, submanifold_conv3d_reference
from o_voxel.lookup import neighbor_map

from tests.training import toys
from training.data import build, collate, join, moved
from training.encode import encode
from training.optim import initialize
from training.train import Batches, Pool, Run
from trellis2.layers import item_of_tokens
from trellis2.models.flow import Flow, FlowConfig
from trellis2.voxels import grid_of_lengths

pytestmark = pytest.mark.gpu
VAES = ("structure_vae", "shape_vae", "texture_vae")


@pytest.fixture(autouse=True)
def _gradients() -> Iterator[None]:
    with torch.enable_grad():
        yield


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.write_objects(tmp_path_factory.mktemp("objects") / "npz")


def losses(name: str, data: Path, device: str, count: int, out: Path | None = None) -> list[float]:
    config = toys.config(name)
    config["trainer"]["args"]["optimizer"]["args"]["lr"] = 4e-3
    run = Run(config, data, torch.device(device, 0 if device == "cuda" else None))
    batches = Batches(run, Pool(data, run.objective.load, run.shards(), 100, len(toys.OBJECTS)))
    found = [float(run.train_step(next(batches))["loss"]) for _ in range(count)]
    batches.close()
    if out is not None:
        run.save_average(out / f"{name}.safetensors")
    return found


def test_trainers(objects: Path, tmp_path: Path) -> None:
    for name in VAES:
        found = losses(name, objects, "cuda", 40, tmp_path)
        assert found[0] == pytest.approx(losses(name, objects, "cpu", 1)[0], rel=0.03), name
        assert found[-1] < 0.6 * found[0], name
    arguments = argparse.Namespace(
        data=objects, vae=tmp_path, out=tmp_path / "latents", statistics=4, once=True, remove=False, minutes=None
    )
    encode(arguments, torch.device("cuda", 0))
    found = losses("flows", tmp_path / "latents", "cuda", 60)
    assert found[0] == pytest.approx(losses("flows", tmp_path / "latents", "cpu", 1)[0], rel=0.03)
    assert found[-1] < 0.8 * found[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 2), (16, 16), (20, 130), (64, 512)])
def test_convolution_has_the_gradients_of_its_definition(
    dtype: torch.dtype, tolerance: float, inputs: int, outputs: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    coords = torch.nn.functional.pad((torch.rand(24, 24, 24, generator=generator) < 0.4).nonzero(), (1, 0)).int().cuda()
    shapes = (len(coords), inputs), (outputs, 3, 3, 3, inputs), (outputs,)
    exact = [torch.randn(s, generator=generator).cuda().mul_(0.2).requires_grad_() for s in shapes]
    ours = [x.detach().to(dtype).requires_grad_() for x in exact]
    wanted = torch.randn(len(coords), outputs, generator=generator).cuda()
    feats, weight, bias = ours
    found = torch.autograd.grad(submanifold_conv3d(feats, plan_conv(coords), weight, bias), ours, wanted.to(dtype))
    feats, weight, bias = exact
    truth = submanifold_conv3d_reference(feats, neighbor_map(coords), weight, bias)
    for a, b in zip(found, torch.autograd.grad(truth, exact, wanted), strict=True):
        assert float((a.float() - b).norm() / b.norm()) < tolerance


def test_objects_are_the_same_as_on_a_cpu() -> None:
    ours, theirs = (build("mushroom", 2, 128, device=device) for device in ("cuda", "cpu"))
    a, b = (set(map(tuple, s.coords.tolist())) for s in (ours, theirs))
    assert len(a ^ b) < 0.01 * len(a)
    assert collate(moved(join([ours]), torch.device("cuda"))).attrs.is_cuda


def test_networks_have_the_gradients_of_their_definition() -> None:
    """Compiled norms and attention over ragged items in bfloat16, against float32 on a CPU, for several lengths."""
    config = FlowConfig(32, 16, 16, 64, 48, 2, 2, 3.0, "bfloat16", absolute_positions=True)
    flow = Flow(config).train()
    generator = torch.Generator().manual_seed(0)
    initialize(flow, generator)
    for parameter in flow.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    for lengths in ((50, 70, 33), (40, 91, 64, 30), (200, 1)):
        coords = torch.randint(0, 32, (sum(lengths), 3), generator=generator).int()
        owner = item_of_tokens(lengths, coords.device)
        inputs = [torch.randn(sum(lengths), 16, generator=generator), torch.rand(len(lengths), generator=generator)]
        inputs += [torch.randn(len(lengths), 17, 48, generator=generator)]
        found = {}
        for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
            flow.to(device).set_dtype(dtype)
            grid = grid_of_lengths(torch.cat([owner[:, None].int(), coords], dim=1).to(device), lengths)
            x, t, cond = (value.to(device) for value in inputs)
            out = flow(x, 1000 * t, cond, grid)
            parameters = [p for p in flow.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(out.square().mean(), parameters)
            found[device] = [value.float().cpu() for value in (out.detach(), *gradients)]
        for ours, exact in zip(found["cuda"], found["cpu"], strict=True):
            assert float((ours - exact).norm()) < 0.04 * float(exact.norm()) + 1e-6
