from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden_cases import golden_cases, load_golden
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
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

TETRAHEDRON = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
OUTWARD = torch.tensor([[0, 2, 1], [0, 1, 3], [1, 2, 3], [0, 3, 2]], dtype=torch.int32)


def sphere(rows: int = 12, columns: int = 24) -> tuple[Tensor, Tensor]:
    """A closed sphere of radius 1, wound outwards."""
    theta = torch.pi * torch.arange(1, rows) / rows
    phi = 2 * torch.pi * torch.arange(columns) / columns
    t, p = torch.meshgrid(theta, phi, indexing="ij")
    ring = torch.stack([t.sin() * p.cos(), t.sin() * p.sin(), t.cos()], -1).reshape(-1, 3)
    vertices = torch.cat([ring, torch.tensor([[0.0, 0, 1], [0, 0, -1]])])
    faces, top, bottom = [], len(ring), len(ring) + 1
    for j in range(columns):
        k = (j + 1) % columns
        faces.append([top, j, k])
        faces.append([bottom, (rows - 2) * columns + k, (rows - 2) * columns + j])
        for i in range(rows - 2):
            a, b, c, d = i * columns + j, i * columns + k, (i + 1) * columns + k, (i + 1) * columns + j
            faces += [[a, d, c], [a, c, b]]
    return vertices, torch.tensor(faces, dtype=torch.int32)


def directed(faces: Tensor) -> list[tuple[int, int]]:
    return [(f[i], f[(i + 1) % 3]) for f in faces.tolist() for i in range(3)]


def is_closed_and_consistent(faces: Tensor) -> bool:
    edges = directed(faces)
    return len(set(edges)) == len(edges) and {(b, a) for a, b in edges} == set(edges)


def volume(vertices: Tensor, faces: Tensor) -> float:
    a, b, c = vertices[faces.long()].unbind(1)
    return float((a * torch.linalg.cross(b, c)).sum() / 6)


@pytest.mark.parametrize("path", golden_cases("e2e"))
@pytest.mark.parametrize("preset", ["512", "1024_cascade"])
def test_holes_as_in_the_original(path: Path, preset: str) -> None:
    _, tensors = load_golden(path)
    vertices, faces = fill_holes(tensors[f"{preset}.raw_vertices"], tensors[f"{preset}.raw_faces"])
    expected_vertices, expected_faces = (tensors[f"{preset}.final_{x}"] for x in ("vertices", "faces"))
    assert vertices.shape == expected_vertices.shape
    assert (vertices - expected_vertices).abs().max() <= 1e-6
    # Winding aside: the original winds its fans by vertex number, this one like their neighbours.
    assert torch.equal(faces.sort(1).values, expected_faces.sort(1).values)


def test_fill_one_hole_by_hand() -> None:
    vertices, faces = fill_holes(TETRAHEDRON, OUTWARD[[0, 1, 3]], max_hole_perimeter=5.0)
    assert vertices[4].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert faces.dtype == torch.int32
    assert sorted(sorted(f) for f in faces[3:].tolist()) == [[1, 2, 4], [1, 3, 4], [2, 3, 4]]
    assert is_closed_and_consistent(faces)


def test_long_holes_and_open_chains_stay() -> None:
    rim = 3 * 2**0.5
    assert len(fill_holes(TETRAHEDRON, OUTWARD[[0, 1, 3]], max_hole_perimeter=rim - 1e-3)[1]) == 3
    # Edge 0-1 has three faces, so that the rim is broken at vertices 0 and 1 into chains that are not closed.
    vertices = torch.tensor([[0.0, 0, 0], [0.1, 0, 0], [0, 0.1, 0], [0, -0.1, 0], [0, 0, 0.1]])
    book = torch.tensor([[0, 1, 2], [0, 1, 3], [0, 1, 4]], dtype=torch.int32)
    assert len(fill_holes(vertices, book, max_hole_perimeter=100.0)[1]) == 3


def test_two_holes_get_a_vertex_each() -> None:
    vertices, faces = sphere()
    opened = faces[~((faces == len(vertices) - 1) | (faces == len(vertices) - 2)).any(1)]
    filled_vertices, filled = fill_holes(vertices, opened, max_hole_perimeter=2.0)
    assert len(filled_vertices) == len(vertices) + 2
    assert len(filled) == len(faces)
    assert is_closed_and_consistent(filled)
    assert filled_vertices[-2:, 2].tolist() == pytest.approx([0.9659, -0.9659], abs=1e-4)


def test_duplicates() -> None:
    vertices = torch.cat([TETRAHEDRON, torch.ones(1, 3)])
    faces = torch.tensor([[1, 2, 3], [3, 2, 1], [0, 1, 2], [1, 2, 3], [2, 3, 1]], dtype=torch.int32)
    kept_vertices, kept = remove_duplicate_faces(vertices, faces)
    assert kept.tolist() == [[1, 2, 3], [0, 1, 2]]
    assert len(kept_vertices) == 4


def test_degenerate() -> None:
    vertices = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [0, 1e-4, 0]])
    faces = torch.tensor([[0, 1, 2], [0, 0, 3], [0, 1, 3]], dtype=torch.int32)
    kept_vertices, kept = remove_degenerate_faces(vertices, faces)
    assert kept_vertices.tolist() == vertices[[0, 1, 3]].tolist()
    assert kept.tolist() == [[0, 1, 2]]


def test_non_manifold() -> None:
    # Two tetrahedra that share edge 0-1, and a third that touches the first at vertex 2.
    vertices = torch.cat([TETRAHEDRON, -TETRAHEDRON[2:], TETRAHEDRON[1:] + TETRAHEDRON[2]])
    second = torch.tensor([0, 1, 4, 5], dtype=torch.int32)[OUTWARD.long()]
    third = torch.tensor([2, 6, 7, 8], dtype=torch.int32)[OUTWARD.long()]
    faces = torch.cat([OUTWARD, second, third])
    split_vertices, split = repair_non_manifold_edges(vertices, faces)
    assert len(split_vertices) == 12
    assert torch.equal(split_vertices[split.long()], vertices[faces.long()])
    assert is_closed_and_consistent(split)
    # A healthy mesh keeps its size, whatever its winding.
    good_vertices, good = sphere()
    good[::3] = good[::3, [0, 2, 1]]
    assert len(repair_non_manifold_edges(good_vertices, good)[0]) == len(good_vertices)


def test_small_components() -> None:
    vertices, faces = sphere()
    both = torch.cat([vertices, TETRAHEDRON * 0.1 + 2]), torch.cat([faces, OUTWARD + len(vertices)])
    kept_vertices, kept = remove_small_components(*both, min_area=0.1)
    assert torch.equal(kept_vertices, vertices)
    assert torch.equal(kept, faces)
    assert len(remove_small_components(*both, min_area=0.02)[1]) == len(faces) + 4
    assert len(remove_small_components(*both, min_area=100.0)[1]) == 0


def test_orientation() -> None:
    vertices, faces = sphere()
    generator = torch.Generator().manual_seed(0)
    both = torch.cat([vertices, TETRAHEDRON + 2])
    right = torch.cat([faces, OUTWARD + len(vertices)])
    flip = torch.rand(len(right), generator=generator) < 0.7
    mixed = torch.where(flip[:, None], right[:, [0, 2, 1]], right)
    _, unified = unify_face_orientations(both, mixed)
    assert torch.equal(unified.sort(1).values, right.sort(1).values)
    assert is_closed_and_consistent(unified)
    assert volume(both, unified) == pytest.approx(volume(both, right), rel=1e-5)


def test_orientation_of_a_sheet_follows_its_majority() -> None:
    vertices = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0.5, 2, 0]])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3], [2, 3, 4]], dtype=torch.int32)  # the last one is upside down
    _, unified = unify_face_orientations(vertices, faces)
    assert unified.tolist() == [[0, 1, 2], [0, 2, 3], [2, 4, 3]]


def test_orientation_of_two_sheets() -> None:
    # Two flat sheets, each with one face upside down.
    flat = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [2, 0, 0], [2, 1, 0]])
    strip = torch.tensor([[0, 1, 2], [0, 3, 2], [1, 4, 5], [1, 5, 2]], dtype=torch.int32)
    vertices = torch.cat([flat, flat + 5])
    faces = torch.cat([strip, strip[:, [0, 2, 1]] + 6])
    _, unified = unify_face_orientations(vertices, faces)
    assert unified.tolist() == [
        *([0, 1, 2], [0, 2, 3], [1, 4, 5], [1, 5, 2]),
        *([6, 8, 7], [6, 9, 8], [7, 11, 10], [7, 8, 11]),
    ]


def test_orientation_of_a_moebius_strip() -> None:
    steps = 40
    turn = 2 * torch.pi * torch.arange(steps) / steps
    across = torch.stack([(turn / 2).cos() * turn.cos(), (turn / 2).cos() * turn.sin(), (turn / 2).sin()], 1)
    ring = torch.stack([turn.cos(), turn.sin(), torch.zeros(steps)], 1)
    vertices = torch.stack([ring + across * 0.3, ring - across * 0.3], 1).reshape(-1, 3)
    i = torch.arange(steps)
    # One round later top is bottom.
    ahead = torch.where(i == steps - 1, 1, 2 * i + 2)
    beside = torch.where(i == steps - 1, 0, 2 * i + 3)
    faces = torch.cat([torch.stack([2 * i, 2 * i + 1, beside], 1), torch.stack([2 * i, beside, ahead], 1)]).int()
    generator = torch.Generator().manual_seed(0)
    flip = torch.rand(len(faces), generator=generator) < 0.5
    _, unified = unify_face_orientations(vertices, torch.where(flip[:, None], faces[:, [0, 2, 1]], faces))
    one, other = manifold_edges(unified, len(vertices)).unbind(1)
    flat = unified.reshape(-1)
    assert int((flat[one] == flat[other]).sum()) == 1  # one seam, and no less is possible


def chains(name: str, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    nodes = torch.arange(count)
    shuffled = torch.randperm(count, generator=generator)
    zigzag = torch.stack([nodes, count - 1 - nodes], 1).reshape(-1)[:count]
    path = torch.stack([nodes[:-1], nodes[1:]], 1)
    return {
        "path": path,
        "path backwards": count - 1 - path,
        "shuffled path": shuffled[path],
        "zigzag": zigzag[path],
        "star": torch.stack([torch.full_like(nodes, count - 1), nodes], 1),
        "shuffled star": shuffled[torch.stack([torch.zeros_like(nodes), nodes], 1)],
        "sparse": torch.randint(0, count, (count // 2, 2), generator=generator),
        "dense": torch.randint(0, count, (3 * count, 2), generator=generator),
        "repeated": path[::3].repeat(3, 1),
        "none": path[:0],
    }[name]


CHAINS = ["path", "path backwards", "shuffled path", "zigzag", "star", "shuffled star", "sparse", "dense", "repeated"]


@pytest.mark.parametrize("name", [*CHAINS, "none"])
def test_spanning_trees(name: str) -> None:
    count = 3000
    pairs = chains(name, count)
    graph = coo_array((torch.ones(len(pairs)), tuple(pairs.T.numpy())), shape=(count, count))
    number, label = connected_components(graph.tocsr(), directed=False)
    label = torch.from_numpy(label).long()
    generator = torch.Generator().manual_seed(4)
    side = torch.rand(count, generator=generator) < 0.5
    trees = _spanning_trees(pairs, side[pairs[:, 0]] != side[pairs[:, 1]], count)
    root = trees // 2
    smallest = torch.full((count,), count).scatter_reduce_(0, label, torch.arange(count), "amin")
    assert torch.equal(root, smallest[label])
    found, numbers = components(pairs, count)
    assert found == number
    assert torch.equal(smallest.sort().values[numbers], root)
    assert torch.equal(trees % 2 == 1, side != side[root])


def test_components_by_hand() -> None:
    count, label = components(torch.tensor([[5, 1], [4, 2], [2, 2]]), 6)
    assert count == 4
    assert label.tolist() == [0, 1, 2, 3, 2, 1]
    assert components(torch.zeros(0, 2, dtype=torch.int64), 0)[0] == 0
    assert components(torch.zeros(0, 2, dtype=torch.int64), 2)[1].tolist() == [0, 1]


OPS: list[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = [
    fill_holes,
    remove_degenerate_faces,
    remove_duplicate_faces,
    repair_non_manifold_edges,
    unify_face_orientations,
    lambda v, f: remove_small_components(v, f, 1e-5),
]


@pytest.mark.parametrize("op", OPS)
def test_empty_and_bad_meshes(op: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    vertices, faces = op(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int32))
    assert vertices.shape == faces.shape == (0, 3)
    assert faces.dtype == torch.int32
    with pytest.raises(ValueError, match=r"^vertices"):
        op(TETRAHEDRON * float("nan"), OUTWARD)
    with pytest.raises(ValueError, match=r"^vertices"):
        op(TETRAHEDRON[:, :2], OUTWARD)
    with pytest.raises(ValueError, match=r"^faces"):
        op(TETRAHEDRON, OUTWARD + 1)
    with pytest.raises(ValueError, match=r"^faces"):
        op(TETRAHEDRON, OUTWARD.float())
