"""Objects as the networks see them: O-Voxels on a pyramid of grids, and conditioning pictures.

``build`` makes a sample from a family and a seed: mesh -> flexible dual grid and material of each voxel by o_voxel,
pictures by trellis2.render.  Everything follows from the seed; on a GPU the same steps run there.
"""

from __future__ import annotations

import json
import math
import threading
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from o_voxel.closest import Surface
from o_voxel.dual_grid import flexible_dual_grid_to_mesh
from o_voxel.voxelize import mesh_to_flexible_dual_grid
from PIL import Image
from torch import Tensor

from trellis2.environment import Environment, environment, prefilter
from trellis2.image import prepare
from trellis2.mesh import Asset, MaterialVoxels, Mesh
from trellis2.models.voxel_vae import DualGrid
from trellis2.options import ENVIRONMENTS
from trellis2.render import Camera, orbit_camera, render
from trellis2.voxels import Grid, Refinement

from .losses import quads
from .objects import HELD_OUT, SEEN, TESTED, WEIGHTS, Thing, make

SHARDS = 16
"""Parts of a folder of objects, by their numbers (``train.Pool``)."""
COARSE = 256
"""Resolution of objects for the structure flow alone: the same 64^3 cells as at 512, for a third of the work."""
PICTURE = 256
"""Side of a conditioning picture, in pixels."""
RENDERED = 512
MAP = 32
"""Side of the maps of what a picture shows."""
LEVELS = 4
"""Doublings between a latent and its voxels."""
BENT = 0.1
"""From this distance of the middles of a quad's diagonals on, in voxels, it matters which of them cuts the quad."""
LIGHTS = 12
"""Random environments beside the product's own."""
SPLITS = {"train": 0, "validation": 1 << 30, "test": 1 << 31}
"""First seed of each part of the data: no object is in two of them."""
TEST_OBJECTS = Path(__file__).with_name("test_objects.json")


@dataclass(frozen=True)
class View:
    """Angles in degrees; yaw 0 looks from the front, -y, and grows to the right. light: number of an environment."""

    yaw: float
    pitch: float
    fov: float
    distance: float  # against that at which the object's bounding ball touches the picture's edge
    light: int
    behind: float  # grey that shows through what is transparent


@dataclass(frozen=True)
class Sample:
    """An object at rest, small enough to keep thousands of.

    coords (N, 3) int16, in the order of ``ordered``; offsets (N, 3) uint8, 255 is a whole voxel; crossed (N,) uint8,
    bits x, y, z; splits (N,) uint8, bits 0-2: whether the diagonal of the quad at that edge matters, bits 3-5: whether
    it is 0-2; attrs (N, 6) uint8; pictures (V, 256, 256, 3) uint8, as ``trellis2.image.prepare`` makes them; maps (V,
    32, 32, 7) uint8 of what they show: place in the unit cube and base colour, both times coverage, and coverage.
    """

    family: str
    seed: int
    resolution: int
    coords: Tensor
    offsets: Tensor
    crossed: Tensor
    splits: Tensor
    attrs: Tensor
    pictures: Tensor
    maps: Tensor

    def save(self, path: Path, compress: bool = True) -> None:
        """Write to a file, which appears when it is whole."""
        part = path.with_suffix(".part")
        write = np.savez_compressed if compress else np.savez
        with part.open("wb") as stream:
            write(
                stream,
                family=self.family,
                seed=self.seed,
                resolution=self.resolution,
                **{name: getattr(self, name).numpy() for name in _TENSORS},
            )
        part.rename(path)

    @classmethod
    def load(cls, path: Path) -> Sample:
        arrays = read_arrays(path, ("family", "seed", "resolution", *_TENSORS))
        tensors = {name: torch.from_numpy(arrays[name]) for name in _TENSORS}
        return cls(str(arrays["family"]), int(arrays["seed"]), int(arrays["resolution"]), **tensors)


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays of a file of ``np.savez`` by name, as ``np.load`` gives them, from any thread.

    numpy reads headers by Python's parser, which until 3.11.7 fails at times when two threads are in it.
    """
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for name in names:
            with archive.open(f"{name}.npy") as stream:
                np.lib.format.read_magic(stream)
                with _parsing:
                    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
                values = np.frombuffer(bytearray(stream.read()), dtype)
                arrays[name] = values.reshape(shape, order="F" if fortran else "C")
    return arrays


_parsing = threading.Lock()
_TENSORS = ("coords", "offsets", "crossed", "splits", "attrs", "pictures", "maps")


@dataclass(frozen=True)
class Batch:
    """Voxels of several objects.

    steps: the refinements from latents to voxels, coarse to fine; their grids know each other as ``coarser``.
    dual: targets on the finest grid; splits: (N, 3) bool each, see ``Sample``; attrs (N, 6) float32 in [-1, 1] there.
    resolutions: of each object.
    """

    steps: list[Refinement]
    dual: DualGrid
    splits: tuple[Tensor, Tensor]
    attrs: Tensor
    resolutions: list[int]

    @property
    def grid(self) -> Grid:
        return self.steps[-1].fine


# ---------------------------------------------------------------------------------------------------------------
# drawing


def draw(split: str, index: int) -> tuple[str, int]:
    """Family and seed of an object; equal numbers give equal objects."""
    seed = SPLITS[split] + index
    rng = np.random.default_rng([seed, 7])
    weights = np.array([WEIGHTS.get(name, 1.0) for name in SEEN])
    return SEEN[rng.choice(len(SEEN), p=weights / weights.sum())], seed


def draw_view(rng: np.random.Generator) -> View:
    """From the front half, mostly from a little above."""
    return View(
        yaw=float(np.clip(rng.normal(0, 45), -110, 110)),
        pitch=float(np.clip(rng.normal(18, 13), -8, 55)),
        fov=float(rng.uniform(18, 55)),
        distance=float(rng.uniform(1.0, 1.2)),
        light=int(rng.integers(LIGHTS + len(ENVIRONMENTS))),
        behind=float(rng.uniform(0.1, 0.9)),
    )


def objects_to_test(part: str) -> list[dict[str, Any]]:
    """The fixed list for evaluation: family, seed, view. part: "seen" (200), "held_out" (20), or
    "validation" (60 of seen families, to choose settings by)."""
    entries: list[dict[str, Any]] = json.loads(TEST_OBJECTS.read_text(encoding="utf-8"))[part]
    return [{**entry, "view": View(**entry["view"])} for entry in entries]


def write_objects_to_test(path: Path = TEST_OBJECTS) -> None:
    """Write the lists, each of its families in turn."""
    lists: dict[str, list[dict[str, Any]]] = {}
    for part, families, count in (("seen", TESTED, 200), ("held_out", HELD_OUT, 20), ("validation", TESTED, 60)):
        rows = []
        for k in range(count):
            seed = SPLITS["validation" if part == "validation" else "test"] + k
            view = draw_view(np.random.default_rng([seed, 3]))
            rounded = {key: round(value, 3) for key, value in vars(view).items()}
            rows.append({"family": families[k % len(families)], "seed": seed, "view": rounded})
        lists[part] = rows
    lines = [f'"{part}": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]" for part, rows in lists.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------
# building


def build(
    family: str,
    seed: int,
    resolution: int = 512,
    views: Sequence[View] = (),
    device: torch.device | str = "cpu",
    side: int = PICTURE,
    with_splits: bool = True,
) -> Sample:
    """Make one sample; its pictures, ``side`` pixels square, show ``views``. Without splits, no diagonal matters."""
    thing = make(family, seed)
    coords, offsets, crossed, splits, attrs = voxelise(thing, resolution, device, with_splits)
    asset = surface_of(thing, coords, attrs, resolution, device)
    pictures, maps = zip(*[picture(asset, view, side) for view in views], strict=True) if views else ((), ())
    order = ordered(coords, LEVELS)
    return Sample(
        family=family,
        seed=seed,
        resolution=resolution,
        coords=coords[order].short().cpu(),
        offsets=(offsets[order] * 255 + 0.5).to(torch.uint8).cpu(),
        crossed=_packed(crossed)[order].cpu(),
        splits=_packed(splits)[order].cpu(),
        attrs=(attrs[order] * 255 + 0.5).to(torch.uint8).cpu(),
        pictures=torch.from_numpy(np.array(pictures, np.uint8).reshape(len(views), side, side, 3)),
        maps=torch.from_numpy(np.array(maps, np.uint8).reshape(len(views), MAP, MAP, 7)),
    )


def voxelise(
    thing: Thing, resolution: int, device: torch.device | str = "cpu", with_splits: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The visible surface of an object as O-Voxel.

    Returns coords (N, 3) int32; offsets (N, 3) float32 of the dual vertices from their voxels' corners, in voxels;
    crossed (N, 3) bool; splits (N, 6) bool, see ``Sample``; attrs (N, 6) float32 in [0, 1].
    """
    vertices, faces, owner = thing.mesh()
    v, f = torch.from_numpy(vertices).to(device), torch.from_numpy(faces).to(device)
    box = [[-0.5] * 3, [0.5] * 3]
    coords, dual, crossed = mesh_to_flexible_dual_grid(v, f, grid_size=resolution, aabb=box)
    surface = Surface(v, f)
    nearest = surface.closest(dual - 0.5)
    points, part = nearest.points.double().cpu().numpy(), owner[nearest.faces.cpu().numpy()]
    keep = ~buried(thing, points, part, 1 / resolution)
    attrs = torch.from_numpy(thing.material(points[keep], part[keep])).to(coords.device)
    mask = torch.from_numpy(keep).to(coords.device)
    coords, dual, crossed = coords[mask], dual[mask], crossed[mask]
    offsets = (dual * resolution - coords).clamp(0, 1)
    splits = torch.zeros(len(coords), 6, dtype=torch.bool, device=coords.device)
    if with_splits:
        splits = diagonals(surface, coords, offsets, crossed, resolution)
    return coords, offsets, crossed, splits, attrs


def diagonals(surface: Surface, coords: Tensor, offsets: Tensor, crossed: Tensor, resolution: int) -> Tensor:
    """(N, 6) bool: whether the diagonal of the quad at each edge matters, and whether it is 0-2.

    It matters where the middles of the two lie apart; right is the one nearer to the surface.
    """
    grid = Grid(torch.nn.functional.pad(coords, (1, 0)))
    rows, voxel, axis = quads(grid, crossed)
    corners = (coords + offsets)[rows]
    middles = torch.stack([corners[:, 0] + corners[:, 2], corners[:, 1] + corners[:, 3]], dim=1) / 2
    bent = (middles[:, 0] - middles[:, 1]).norm(dim=1) > BENT
    middles, voxel, axis = middles[bent], voxel[bent], axis[bent]
    out = torch.zeros(len(coords), 6, dtype=torch.bool, device=coords.device)
    if len(middles):
        distance = surface.closest(middles.reshape(-1, 3) / resolution - 0.5).distance.view(-1, 2)
        out[voxel, axis] = True
        out[voxel, 3 + axis] = distance[:, 0] <= distance[:, 1]
    return out


def buried(thing: Thing, points: np.ndarray, owner: np.ndarray, voxel: float) -> np.ndarray:
    """Whether points (P, 3) of the surface cannot be seen: a voxel deep in another part, or between two that touch."""
    inside_another = thing.hidden(points, owner)
    between = np.ones(len(points), bool)
    nobody = np.full(len(points), -1)
    for step in np.concatenate([np.eye(3), -np.eye(3)]):
        rows = np.flatnonzero(inside_another)
        inside_another[rows] = thing.hidden(points[rows] + step * voxel, owner[rows])
        rows = np.flatnonzero(between)
        between[rows] = thing.hidden(points[rows] + step * voxel * 3, nobody[rows])
    return inside_another | between


def truth(thing: Thing, resolution: int, device: torch.device | str) -> Asset:
    """The object as a perfect model would give it: its O-Voxel's own surface and material."""
    coords, offsets, crossed, _, attrs = voxelise(thing, resolution, device, with_splits=False)
    return asset_of(coords, offsets, crossed, None, attrs, resolution)


def asset_of(
    coords: Tensor, offsets: Tensor, crossed: Tensor, weights: Tensor | None, attrs: Tensor, resolution: int
) -> Asset:
    """coords (N, 3), offsets (N, 3) in voxels, crossed (N, 3), weights (N, 1), attrs (N, 6) in [0, 1]."""
    box = [[-0.5] * 3, [0.5] * 3]
    mesh = flexible_dual_grid_to_mesh(coords, offsets, crossed, weights, aabb=box, grid_size=resolution)
    return Asset(Mesh(*mesh), MaterialVoxels(coords, attrs, 1 / resolution))


def surface_of(thing: Thing, coords: Tensor, attrs: Tensor, resolution: int, device: torch.device | str) -> Asset:
    """The object's own mesh with the materials of its voxels, to look at."""
    vertices, faces, _ = thing.mesh()
    mesh = Mesh(torch.from_numpy(vertices).to(device), torch.from_numpy(faces).to(device))
    return Asset(mesh, MaterialVoxels(coords, attrs, 1 / resolution))


def picture(asset: Asset, view: View, side: int = PICTURE) -> tuple[np.ndarray, np.ndarray]:
    """What the image encoder sees of a rendered RGBA picture, (side, side, 3) uint8, and what that shows, see
    ``Sample.maps``."""
    out = seen(asset, view)
    place = points_of(out["depth"], camera_of(asset, view)) + 0.5
    rgb = _prepared(_rgba(_shown(out, view), out), side, Image.Resampling.LANCZOS)
    maps = [_prepared(_rgba(c, out), MAP, Image.Resampling.BOX) for c in (place, out["base_color"], out["mask"])]
    return rgb, np.concatenate([maps[0], maps[1], maps[2][..., :1]], axis=2)


def cutout(asset: Asset, view: View, size: int = RENDERED) -> Image.Image:
    """RGBA picture of an object."""
    out = seen(asset, view, size)
    return _rgba(_shown(out, view), out)


def seen(asset: Asset, view: View, size: int = RENDERED) -> dict[str, Tensor]:
    """What ``trellis2.render.render`` gives."""
    return render(asset, camera_of(asset, view), lights(view.light, str(asset.mesh.vertices.device)), resolution=size)


def points_of(depth: Tensor, camera: Camera) -> Tensor:
    """(3, H, W), the points at ``depth`` (H, W) along the camera's axis."""
    view, intrinsics = camera.world_to_camera.to(depth.device), camera.intrinsics.to(depth.device)
    y, x = ((torch.arange(n, device=depth.device) + 0.5) / n for n in depth.shape)
    focal, centre = intrinsics.diagonal(), intrinsics[:, 2]
    grid = torch.meshgrid((y - centre[1]) / focal[1], (x - centre[0]) / focal[0], indexing="ij")
    rays = torch.stack([grid[1], grid[0], torch.ones_like(depth)])
    return torch.einsum("ji,jhw->ihw", view[:3, :3], rays * depth - view[:3, 3, None, None])


def _shown(out: dict[str, Tensor], view: View) -> Tensor:
    seen_through = (1 - out["alpha"]).square() * out["mask"]
    return out["shaded"] + seen_through * view.behind


def _rgba(color: Tensor, out: dict[str, Tensor]) -> Image.Image:
    """color: (3, H, W), or (H, W) for grey."""
    rgba = torch.cat([color.expand(3, *out["mask"].shape).clamp(0, 1), out["mask"][None]]).permute(1, 2, 0)
    return Image.fromarray((rgba * 255 + 0.5).to(torch.uint8).cpu().numpy())


def _prepared(rgba: Image.Image, side: int, resample: Image.Resampling) -> np.ndarray:
    return np.asarray(prepare(rgba, cutout=False).rgb.resize((side, side), resample))


def camera_of(asset: Asset, view: View) -> Camera:
    used = asset.mesh.vertices[asset.mesh.faces.flatten().long()]
    radius = float(used.norm(dim=1).max())
    away = radius / math.sin(math.radians(view.fov) / 2) * view.distance
    return orbit_camera(math.pi - math.radians(view.yaw), math.radians(view.pitch), away, view.fov)


def lights(number: int, device: str) -> Environment:
    """The product's environments, then random ones: a sky, a ground and a few soft lamps."""
    if (number, device) not in _lights:
        _lights[number, device] = _light(number, device)
    return _lights[number, device]


def save_light(folder: Path, number: int, device: str) -> None:
    """Make one of them, which takes two seconds of a core, and keep it in a file."""
    torch.save(lights(number, device), folder / f"{number}.light")


def load_lights(folder: Path, device: str) -> None:
    """Have those of a folder at hand; only of one's own, since any object is loaded."""
    for path in folder.glob("*.light"):
        _lights[int(path.stem), device] = torch.load(path, map_location=device, weights_only=False)


_lights: dict[tuple[int, str], Environment] = {}


def _light(number: int, device: str) -> Environment:
    if number < len(ENVIRONMENTS):
        return environment(sorted(ENVIRONMENTS)[number], device)
    rng = np.random.default_rng([number, 11])
    sky, ground = rng.uniform(0.35, 1.1), rng.uniform(0.15, 0.6)
    tint = 1 + rng.normal(0, 0.06, (2, 3))
    lamps = []
    for _ in range(rng.integers(1, 4)):
        yaw, pitch = rng.uniform(0, 2 * math.pi), rng.uniform(0.1, 1.3)
        toward = [math.sin(yaw) * math.cos(pitch), -math.cos(yaw) * math.cos(pitch), math.sin(pitch)]
        lamps.append((toward, float(rng.uniform(8, 60)), float(rng.uniform(2, 7)), 1 + rng.normal(0, 0.05, 3)))

    def radiance(directions: Tensor) -> Tensor:
        mix = directions[..., 2:] * 0.5 + 0.5
        light = mix * sky * directions.new_tensor(tint[0]) + (1 - mix) * ground * directions.new_tensor(tint[1])
        for toward, sharp, power, color in lamps:
            cosine = (directions * directions.new_tensor(toward)).sum(-1, keepdim=True)
            light = light + power * torch.exp(sharp * (cosine - 1)) * directions.new_tensor(color)
        return light.clamp_min(0)

    return prefilter(radiance, device)


# ---------------------------------------------------------------------------------------------------------------
# grids


def ordered(coords: Tensor, levels: int) -> Tensor:
    """Rows of ``coords`` (N, 3) so that voxels of one coarser voxel stand together, at each of ``levels`` doublings."""
    return torch.argsort(_keys(torch.nn.functional.pad(coords, (1, 0)), levels))


def _keys(coords: Tensor, levels: int) -> Tensor:
    """[batch, coarse x, y, z, child at each level], one int64 a row of (N, 4); ``>> 3`` goes one level up."""
    batch, *place = coords.long().unbind(dim=1)
    key = batch
    for axis in place:
        key = (key << 8) | (axis >> levels)
    for level in reversed(range(levels)):
        child = sum((axis >> level & 1) << k for k, axis in enumerate(place))
        key = (key << 3) | child
    return key


def pyramid(coords: Tensor, levels: int = LEVELS) -> list[Refinement]:
    """The refinements that lead to ``coords`` (N, 4) [batch, x, y, z], in the order of ``ordered``; coarse to fine.

    The grids are joined as ``Grid.coarser`` and ``Grid.subdivide`` would: an encoder and a decoder go over the same
    ones, so that each convolution is planned once.
    """
    keys = _keys(coords, levels)
    fine = Grid(coords.int().contiguous())
    steps = []
    for _ in range(levels):
        parents, parent = torch.unique_consecutive(keys >> 3, return_inverse=True)
        first = torch.zeros(len(parents), dtype=torch.int64, device=keys.device)
        first[parent.flip(0)] = torch.arange(len(keys) - 1, -1, -1, device=keys.device)
        above = fine.coords[first].clone()
        above[:, 1:] >>= 1
        step = Refinement(Grid(above), fine, parent, keys & 7)
        fine.__dict__["coarser"] = step  # what the cached property would hold, but for the order of its rows
        steps.append(step)
        fine, keys = step.coarse, parents
    return steps[::-1]


@dataclass(frozen=True)
class Joined:
    """Samples one after the other, with what they hold: coords (N, 4) int16 [batch, x, y, z] and resolutions."""

    coords: Tensor
    offsets: Tensor
    crossed: Tensor
    splits: Tensor
    attrs: Tensor
    resolutions: list[int]


def join(samples: Sequence[Sample]) -> Joined:
    coords = [torch.nn.functional.pad(s.coords, (1, 0), value=k) for k, s in enumerate(samples)]
    rest = [torch.cat([getattr(s, name) for s in samples]) for name in ("offsets", "crossed", "splits", "attrs")]
    return Joined(torch.cat(coords), *rest, [s.resolution for s in samples])


def moved(batch: Any, device: torch.device) -> Any:
    """A dataclass, with its tensors on a device."""
    return with_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


def with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A dataclass, with each tensor in it, in its dicts and in its dataclasses changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: with_tensors(item, change) for name, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: with_tensors(getattr(value, f.name), change) for f in fields(value)})
    return value


def collate(samples: Joined) -> Batch:
    """What the networks see of joined samples, on the device where these are."""
    steps = pyramid(samples.coords.int())
    offsets = samples.offsets.float() / 255
    dual = DualGrid(steps[-1].fine, offsets, _unpacked(samples.crossed)[:, :3], torch.ones_like(offsets[:, :1]))
    flags = _unpacked(samples.splits)
    return Batch(steps, dual, (flags[:, :3], flags[:, 3:6]), samples.attrs.float() / 127.5 - 1, samples.resolutions)


def cells_of(coords: Tensor, resolution: int, side: int) -> Tensor:
    """Which cells of a grid of ``side`` hold voxels (N, 3) of a grid of ``resolution``: (side^3 / 8,) uint8, the first
    of eight cells, z fastest, in the lowest bit."""
    cells = torch.zeros(side, side, side, dtype=torch.bool, device=coords.device)
    cells[tuple((coords.long() * side // resolution).unbind(1))] = True
    return _packed(cells.view(-1, 8))


def occupancy(cells: Tensor, side: int) -> Tensor:
    """(B, side^3 / 8) uint8, from ``cells_of`` -> (B, 1, side, side, side) float32."""
    return _unpacked(cells.flatten()).float().view(len(cells), 1, side, side, side)


def _packed(flags: Tensor) -> Tensor:
    """(N, up to 8) bool -> (N,) uint8, the first flag in the lowest bit."""
    return (flags.int() << torch.arange(flags.shape[1], device=flags.device, dtype=torch.int32)).sum(1).to(torch.uint8)


def _unpacked(packed: Tensor) -> Tensor:
    """(N,) uint8 -> (N, 8) bool"""
    return (packed.int()[:, None] >> torch.arange(8, device=packed.device, dtype=torch.int32) & 1).bool()
