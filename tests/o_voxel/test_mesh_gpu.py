"""Cleaning, simplifying and filling on a GPU: the same in every run, and what the same code gives on a CPU."""

from __future__ import annotations

import time

import pytest
import torch
from o_voxel.closest import closest_point
from o_voxel.fill import fill_gaps
from o_voxel.repair import (
    _spanning_trees,
    components,
    fill_holes,
    manifold_edges,
    remove_degenerate_faces,
    remove_duplicate_faces,
    remove_small_components,
    repair_non_manifold_edges,
    unify_face_orientations,
)
from o_voxel.simplify import simplify
from torch import Tensor
from voxelise import bumpy_sphere, voxelise

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def mesh() -> tuple[Tensor, Tensor]:
    """A bumpy sphere of mixed winding, with holes, a crumb and a fin along an edge."""
    mesh = voxelise(bumpy_sphere(), 96).mesh
    generator = torch.Generator().manual_seed(0)
    faces = mesh.faces[torch.rand(len(mesh.faces), generator=generator) > 1e-3]
    flip = torch.rand(len(faces), generator=generator) < 0.5
    faces = torch.where(flip[:, None], faces[:, [0, 2, 1]], faces)
    count = len(mesh.vertices)
    more = torch.tensor([[0.0, 0, 0], [0.01, 0, 0], [0, 0.01, 0], [0.4, 0.4, 0.4]])
    fin = torch.cat([faces[0, :2], torch.tensor([count + 3], dtype=torch.int32)])
    crumb = torch.tensor([count, count + 1, count + 2], dtype=torch.int32)
    return torch.cat([mesh.vertices, more]), torch.cat([faces, torch.stack([fin, crumb])])


@pytest.mark.parametrize("shape", [(300, 200), (1, 500), (500, 1), (1024, 1024)])
@pytest.mark.parametrize("share", [1e-4, 0.05, 0.9])
def test_gaps(shape: tuple[int, int], share: float) -> None:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(shape, generator=generator) < share
    mask[0, 0] = True
    image = torch.randint(0, 255, (*shape, 6), generator=generator, dtype=torch.uint8)
    assert torch.equal(fill_gaps(image.cuda(), mask.cuda()).cpu(), fill_gaps(image, mask))


@pytest.mark.parametrize("pairs_per_node", [0.0, 0.3, 0.5, 1.5])
def test_components(pairs_per_node: float) -> None:
    generator = torch.Generator().manual_seed(2)
    count = 100_000
    pairs = torch.randint(0, count, (int(pairs_per_node * count), 2), generator=generator)
    expected, label = components(pairs, count)
    found, numbers = components(pairs.cuda(), count)
    assert found == expected
    assert torch.equal(numbers.cpu(), label)
    odd = torch.rand(len(pairs), generator=generator) < 0.5
    trees = _spanning_trees(pairs.cuda(), odd.cuda(), count)
    assert torch.equal(trees.cpu(), _spanning_trees(pairs, odd, count))
    path = torch.randperm(count, generator=generator).unfold(0, 2, 1)
    assert components(path.cuda(), count)[0] == 1


def test_repair(mesh: tuple[Tensor, Tensor]) -> None:
    """Step by step as in the baking of an asset."""
    steps = (
        lambda v, f: fill_holes(v, f, 0.1),
        remove_degenerate_faces,
        remove_duplicate_faces,
        repair_non_manifold_edges,
        lambda v, f: remove_small_components(v, f, 1e-4),
        unify_face_orientations,
    )
    for step in steps:
        expected, found, again = step(*mesh), step(*(x.cuda() for x in mesh)), step(*(x.cuda() for x in mesh))
        assert torch.equal(found[1].cpu(), expected[1])
        torch.testing.assert_close(found[0].cpu(), expected[0], rtol=0, atol=1e-7)
        assert torch.equal(found[0], again[0])
        assert torch.equal(found[1], again[1])
        mesh = expected


@pytest.mark.parametrize("share", [0.4, 0.1])
def test_simplify(mesh: tuple[Tensor, Tensor], share: float) -> None:
    vertices, faces = (x.cuda() for x in mesh)
    target = int(share * len(faces))
    fewer, again = (simplify(vertices, faces, target) for _ in range(2))
    assert torch.equal(fewer[0], again[0])
    assert torch.equal(fewer[1], again[1])
    assert 0.98 * target <= len(fewer[1]) <= target
    on_cpu = simplify(*mesh, target)
    for there, back in (((vertices, faces), fewer), (fewer, (vertices, faces))):
        error = closest_point(*back, there[0]).distance.double().square().mean().sqrt()
        back_on_cpu = on_cpu if back is fewer else mesh
        from_cpu = on_cpu[0] if there is fewer else mesh[0]
        assert error <= 1.1 * closest_point(*back_on_cpu, from_cpu).distance.double().square().mean().sqrt() + 1e-5


def test_time_and_memory() -> None:
    """A million faces: printed, with bounds that only a loop on the host would break."""
    steps = torch.linspace(-0.4, 0.4, 1000, device="cuda")
    x, y = torch.meshgrid(steps, steps, indexing="ij")
    vertices = torch.stack([x, y, 0.05 * torch.sin(30 * x) * torch.cos(25 * y)], -1).reshape(-1, 3).contiguous()
    corner = torch.arange(999 * 1000, device="cuda").view(999, 1000)[:, :-1].reshape(-1)
    below, above = [corner, corner + 1000, corner + 1001], [corner, corner + 1001, corner + 1]
    faces = torch.cat([torch.stack(below, 1), torch.stack(above, 1)]).int()
    texture = torch.rand((4096, 4096), device="cuda")
    image = torch.zeros((4096, 4096, 6), dtype=torch.uint8, device="cuda")
    pairs = manifold_edges(faces, len(vertices)) // 3
    runs = {
        "simplify to a fifth": lambda: simplify(vertices, faces, len(faces) // 5),
        "unify_face_orientations": lambda: unify_face_orientations(vertices, faces),
        "repair_non_manifold_edges": lambda: repair_non_manifold_edges(vertices, faces),
        "fill_holes": lambda: fill_holes(vertices, faces),
        "components": lambda: components(pairs, len(faces)),
        "fill_gaps 4096": lambda: fill_gaps(image, texture < 0.7),
        "fill_gaps 4096, nearly empty": lambda: fill_gaps(image, texture < 1e-6),
    }
    for name, run in runs.items():
        run()  # compiles
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated() - before
        print(f"{name}: {1000 * seconds:.1f} ms, {peak / 2**20:.0f} MiB for {len(faces)} faces")  # noqa: T201
        assert seconds < 2, name
        assert peak < 400 * len(faces) if "fill_gaps" not in name else peak < 2**30, name
