"""The procedural data: equal seeds give equal objects, splits are disjoint, O-Voxels are what the networks take."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from training import shapes
from training.data import (
    COARSE,
    LEVELS,
    Sample,
    build,
    camera_of,
    cells_of,
    collate,
    draw,
    draw_view,
    join,
    objects_to_test,
    occupancy,
    ordered,
    pyramid,
    read_arrays,
    surface_of,
    voxelise,
    write_objects_to_test,
)
from training.losses import MAP_CHANNELS, MAP_WAVES, map_terms
from training.objects import FAMILIES, HELD_OUT, SEEN, make
from training.shapes import ball, box, cushion, cylinder, lathe, prism, tube


@pytest.mark.parametrize("family", FAMILIES)
def test_families_fit_their_cube(family: str) -> None:
    """Inside the cube, with sane materials, and the same from the same seed."""
    first = make(family, 3)
    again, other = (FAMILIES[family](np.random.default_rng(seed)) for seed in (3, 3))
    vertices, faces, owner = first.mesh()
    assert np.isfinite(vertices).all()
    assert np.abs(vertices).max() <= 0.451
    assert faces.max() < len(vertices)
    assert len(owner) == len(faces)
    for a, b in zip(again, other, strict=True):
        assert np.array_equal(a.solid.vertices, b.solid.vertices)
    centres = vertices[faces].mean(1).astype(float)
    material = first.material(centres, owner)
    assert material.min() >= 0
    assert material.max() <= 1
    assert (np.ptp(vertices, axis=0) > 0.02).all()


def test_families_are_many_and_two_are_never_drawn() -> None:
    assert len(SEEN) >= 15
    assert len(HELD_OUT) == 2
    drawn = {draw("train", index)[0] for index in range(400)}
    assert drawn == set(SEEN)
    seeds = [{draw(split, index)[1] for index in range(50)} for split in ("train", "validation", "test")]
    assert sum(len(part) for part in seeds) == len(set.union(*seeds))


def test_list_of_test_objects_is_the_one_that_the_code_writes(tmp_path: Path) -> None:
    write_objects_to_test(tmp_path / "list.json")
    kept = Path(inspect.getfile(make)).with_name("test_objects.json").read_text()
    assert (tmp_path / "list.json").read_text() == kept
    seen, held_out, validation = (objects_to_test(part) for part in ("seen", "held_out", "validation"))
    assert (len(seen), len(held_out), len(validation)) == (200, 20, 60)
    assert not {entry["seed"] for entry in validation} & {entry["seed"] for entry in seen + held_out}
    assert {entry["family"] for entry in held_out} == set(HELD_OUT)
    assert not {entry["family"] for entry in seen} & set(HELD_OUT)


@pytest.mark.parametrize(
    ("solid", "volume"),
    [
        (box((1, 2, 3)), 6.0),
        (box((1, 1, 1), bevel=0.1).moved(0.3, 0, 0), 1 - 0.06),
        (cylinder(0.5, 0, 2, segments=96), np.pi / 2),
        (ball((1, 0.5, 0.25), steps=48), np.pi / 6),
        (lathe([(0, 0), (1, 0), (1, 1), (0.5, 1), (0.5, 0.5), (0, 0.5)], 96), np.pi * (1 - 0.125)),
        (prism([(0, 0), (2, 0), (2, 2), (1, 0.5), (0, 2)], 0, 1), 2.5),
        (tube([(0, 0, 0), (0, 0, 2)], 0.5, segments=96), np.pi / 2),
        (cushion((1, 1, 1), square=1.0, steps=32), np.pi / 6),
        (box((1, 1, 2)).turned("x", 40).scaled(-1, 1, 1), 2.0),
    ],
)
def test_solids_are_closed_and_know_their_inside(solid: shapes.Solid, volume: float) -> None:
    """By the divergence theorem their faces enclose the right volume, outwards; by counting, so does ``inside``."""
    corners = solid.vertices[solid.faces]
    enclosed = np.einsum("ni,ni->n", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])).sum() / 6
    assert enclosed == pytest.approx(volume, rel=0.02)
    low, high = solid.vertices.min(0), solid.vertices.max(0)
    points = np.random.default_rng(0).uniform(low, high, (40000, 3))
    assert solid.inside(points).mean() * np.prod(high - low) == pytest.approx(volume, rel=0.05)


def test_buried_surface_is_left_out() -> None:
    """A stool's legs end in its seat: no voxel lies deep inside of the seat."""
    thing = make("stool", 5)
    sample = build("stool", 5, 128)
    points = (sample.coords.double() + sample.offsets.double() / 255) / 128 - 0.5
    nobody = np.full(len(points), -1)
    deep = thing.hidden(points.numpy(), nobody)
    for step in np.concatenate([np.eye(3), -np.eye(3)]) * 5 / 128:
        deep &= thing.hidden(points.numpy() + step, nobody)
    assert deep.mean() < 1e-3  # the ends of the legs alone would be ten times as many


def test_surface_that_can_be_seen_is_kept() -> None:
    """Every place of a teapot's outside, the flat end of its spout among them, is near a voxel that was kept."""
    thing = make("teapot", 6)
    vertices, faces, _ = thing.mesh()
    centres = vertices[faces].mean(1).astype(float)
    spout = thing.parts[3].solid.vertices * thing.scale + thing.shift
    end = spout[-14:].mean(0)  # the last ring of the tube
    coords = voxelise(thing, 128)[0].double().numpy()
    near = np.linalg.norm((coords + 0.5) / 128 - 0.5 - end, axis=1) < 1.5 / 128
    assert near.any()
    seen = centres[~thing.hidden(centres, np.full(len(centres), -1))]
    nearest = [np.linalg.norm((coords + 0.5) / 128 - 0.5 - p, axis=1).min() for p in seen[::20]]
    assert max(nearest) < 2 / 128


@pytest.fixture(scope="module")
def sample() -> Sample:
    return build("mushroom", 2, 64)


@pytest.mark.parametrize(("family", "seed"), [("chair", 31), ("shelf", 40)])
def test_coarse_objects_have_the_same_structure(family: str, seed: int) -> None:
    cells = [
        occupancy(cells_of(sample.coords.int(), sample.resolution, 64)[None], 64) > 0.5
        for sample in (build(family, seed, resolution, with_splits=False) for resolution in (512, COARSE))
    ]
    assert (cells[0] ^ cells[1]).sum() < 0.015 * cells[0].sum()


def test_maps_say_what_a_picture_shows() -> None:
    """Where and of which colour its surface is; reading just that costs nothing."""
    view = replace(draw_view(np.random.default_rng(1)), light=0)
    sample = build("assembly", 4, 128, [view], side=64)
    place, color, covered = (sample.maps[0].float() / 255).split([3, 3, 1], dim=-1)
    lit = sample.pictures[0].amax(-1) > 40
    assert (lit.view(32, 2, 32, 2).any(3).any(1) <= (covered[..., 0] > 0)).float().mean() > 0.98
    full = covered[..., 0] == 1
    assert full.sum() > 100
    distance = torch.cdist(place[full], (sample.coords + 0.5) / 128)
    nearest, voxel = distance.min(1)
    assert nearest.median() < 0.01
    assert (color[full] - sample.attrs[voxel, :3] / 255).abs().mean(1).median() < 0.03
    # A place within the front half is nearer to the camera than the middle is.
    camera = camera_of(surface_of(make("assembly", 4), sample.coords, sample.attrs / 255, 128, "cpu"), view)
    assert ((place[full] - 0.5) @ camera.world_to_camera[2, :3]).mean() < 0


def test_reading_a_map_right_costs_nothing() -> None:
    maps = torch.empty(2, 32, 32, 7, dtype=torch.uint8)
    maps[0], maps[1] = torch.tensor([51, 102, 204, 255, 0, 51, 255]), torch.tensor([10, 20, 30, 40, 50, 60, 102])
    right = []
    for cell in maps[:, 0, 0].double():
        place, color, cover = cell[:3] / cell[6] - 0.5, cell[3:6] / cell[6], cell[6:] / 255
        angles = 2 * np.pi * place[:, None] * torch.tensor(MAP_WAVES)
        waves = torch.cat([angles.sin(), angles.cos()], dim=1).flatten()
        right.append(torch.cat([waves, color.repeat(4), cover.repeat(4)]))
    read = torch.stack(right)[:, None].expand(2, 16, MAP_CHANNELS)
    assert all(float(term) < 1e-9 for term in map_terms(read, maps).values())
    for channel, name in ((0, "place"), (24, "color"), (36, "coverage")):
        wrong = read.clone()
        wrong[..., channel] += 0.5
        assert [key for key, term in map_terms(wrong, maps).items() if term > 1e-3] == [name]


def test_pyramid_is_what_grids_do_themselves(sample: Sample) -> None:
    """Its steps are those of ``Grid.subdivide`` and, up to the order of rows, of ``Grid.coarser``."""
    coords = torch.nn.functional.pad(sample.coords.int(), (1, 0))
    steps = pyramid(coords)
    assert len(steps) == LEVELS
    for step in steps:
        keep = torch.zeros(len(step.coarse), 8, dtype=torch.bool)
        keep[step.parent, step.child] = True
        assert torch.equal(step.coarse.subdivide(keep).fine.coords, step.fine.coords)
        assert step.fine.coarser is step
        plain = type(step.fine)(step.fine.coords).coarser
        assert torch.equal(plain.coarse.coords[plain.parent], step.coarse.coords[step.parent])
        assert torch.equal(plain.child, step.child)
    assert torch.equal(steps[-1].fine.coords, coords)
    assert torch.equal(ordered(sample.coords, LEVELS), torch.arange(len(coords)))


def test_samples_come_back_and_join(sample: Sample, tmp_path: Path) -> None:
    sample.save(tmp_path / "0.npz")
    loaded = Sample.load(tmp_path / "0.npz")
    for name in ("coords", "offsets", "crossed", "splits", "attrs", "pictures", "maps"):
        assert torch.equal(getattr(loaded, name), getattr(sample, name)), name
    np.savez(tmp_path / "1.npz", turned=np.arange(6, dtype="<i2").reshape(2, 3).T, none=np.empty((0, 4)), word="mug")
    arrays = read_arrays(tmp_path / "1.npz", ("turned", "none", "word"))
    assert arrays["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert arrays["none"].shape == (0, 4)
    assert str(arrays["word"]) == "mug"
    batch = collate(join([sample, loaded]))
    assert batch.grid.lengths == (len(sample.coords),) * 2
    assert batch.dual.offsets.min() >= 0
    assert batch.dual.offsets.max() <= 1
    assert batch.dual.crossed.any(dim=0).all()
    matters, _ = batch.splits
    assert 0 < matters.float().mean() < 0.9
    assert torch.equal(batch.attrs[: len(sample.coords)], batch.attrs[len(sample.coords) :])
