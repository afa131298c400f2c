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
from training.train import Batches, Pool, Run

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
