"""Renderer: the original's recorded pictures, cameras, layers, occlusion, antialiasing, the turntable."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_cases import golden_cases, load_golden, under
from PIL import Image
from torch import Tensor

from trellis2 import render as renderer
from trellis2.environment import Environment, environment, lat_long_radiance, prefilter
from trellis2.errors import Cancelled, InputError
from trellis2.mesh import Asset, MaterialVoxels, Mesh
from trellis2.render import Camera, orbit_camera, render, turntable, turntable_camera

FRONT = orbit_camera(math.pi, 0.0, 2.0, 40.0)  # stands at -y


def material(color: tuple[float, float, float], metallic: float, roughness: float, alpha: float) -> MaterialVoxels:
    """The same everywhere: 4^3 voxels over the whole frame."""
    axis = torch.arange(4, dtype=torch.int32)
    coords = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(-1, 3)
    attributes = torch.tensor([*color, metallic, roughness, alpha], dtype=torch.float32).expand(len(coords), 6)
    return MaterialVoxels(coords, attributes.contiguous(), 0.25)


def quad(y: float, half: float = 0.4) -> tuple[Tensor, Tensor]:
    """A square across the y axis, facing -y."""
    corners = torch.tensor([[-half, y, -half], [half, y, -half], [half, y, half], [-half, y, half]])
    return corners, torch.tensor([[0, 1, 2], [0, 2, 3]], dtype=torch.int32)


def quads(*ys: float, half: float = 0.4) -> Mesh:
    pieces = [quad(y, half) for y in ys]
    faces = [f + 4 * i for i, (_, f) in enumerate(pieces)]
    return Mesh(torch.cat([v for v, _ in pieces]), torch.cat(faces))


def cube(half: float = 0.3) -> Mesh:
    corners = torch.tensor([[x, y, z] for x in (-half, half) for y in (-half, half) for z in (-half, half)])
    sides = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = [t for a, b, c, d in sides for t in ((a, b, c), (a, c, d))]
    return Mesh(corners, torch.tensor(faces, dtype=torch.int32))


def sphere(radius: float = 0.35, rings: int = 48) -> Mesh:
    polar = torch.linspace(0, math.pi, rings + 1)
    around = torch.arange(2 * rings) * math.pi / rings
    theta, phi = torch.meshgrid(polar, around, indexing="ij")
    vertices = torch.stack([theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos()], -1).view(-1, 3)
    i, j = torch.meshgrid(torch.arange(rings), torch.arange(2 * rings), indexing="ij")
    a, b = i * 2 * rings + j, i * 2 * rings + (j + 1) % (2 * rings)
    c, d = a + 2 * rings, b + 2 * rings
    faces = torch.cat([torch.stack([a, c, d], -1).view(-1, 3), torch.stack([a, d, b], -1).view(-1, 3)])
    return Mesh(vertices * radius, faces.int())


@pytest.fixture(scope="module")
def gradient() -> Environment:
    """Brighter above, so that shading depends on the normal."""
    return prefilter(lambda d: 0.6 + 0.4 * d[..., 2:3].expand_as(d))


@pytest.fixture(scope="module")
def uniform() -> Environment:
    return prefilter(lambda d: torch.full_like(d, 0.5))


def as_bytes(picture: Tensor) -> np.ndarray:
    values = picture.movedim(0, -1) if picture.ndim == 3 else picture
    return (values.clamp(0, 1) * 255 + 0.5).to(torch.uint8).numpy()


def smoothed(values: np.ndarray) -> np.ndarray:
    """Averages of 16 x 16 pixels, in which the random occlusion of the original has settled."""
    return values.reshape(values.shape[0] // 16, 16, values.shape[1] // 16, 16, -1).mean((1, 3))


@pytest.mark.parametrize("path", golden_cases("pbr_render"))
def test_pictures_of_the_original(path: Path) -> None:
    meta, tensors = load_golden(path)
    options, tolerance = meta["options"], meta["tol"]
    voxels = MaterialVoxels(tensors["coords"], tensors["attrs"], meta["voxel_size"], (meta["origin"],) * 3)
    asset = Asset(Mesh(tensors["vertices"], tensors["faces"]), voxels)
    lights = prefilter(lat_long_radiance(tensors["envmap"]))
    for view in range(len(tensors["extrinsics"])):
        expected = {
            name.split(".")[0]: np.asarray(Image.open(io.BytesIO(png.numpy().tobytes()))).astype(float)
            for name, png in under(tensors, f"view{view}.").items()
            if name.endswith("u8_png")
        }
        camera = Camera(tensors["extrinsics"][view], tensors["intrinsics"][view])
        size = {"resolution": options["resolution"], "supersampling": options["ssaa"], "layers": options["peel_layers"]}
        plain = render(asset, camera, lights, ambient_occlusion=False, **size)
        occluded = render(asset, camera, lights, **size)

        error = np.abs(as_bytes(plain["shaded"]) - expected["shaded_noao"]).mean()
        assert error <= tolerance["noao_u8_mean_abs"]
        for name in ("normal", "mask", "base_color", "metallic", "roughness", "alpha"):
            assert np.abs(as_bytes(plain[name]) - expected[name]).mean() <= tolerance["u8_mean_abs"], name
        # These two hold random samples in the original: the same in the mean, and after averaging over blocks.
        for name in ("shaded", "clay"):
            ours = as_bytes(occluded[name]).astype(float)
            assert abs(ours.mean() - expected[name].mean()) <= tolerance["u8_mean_abs"], name
            assert np.abs(smoothed(ours) - smoothed(expected[name])).mean() <= tolerance["u8_mean_abs"], name


def test_orbit_camera_axes() -> None:
    camera = orbit_camera(math.pi / 2, 0.0, 2.0, 90.0)  # stands at +x and looks along -x
    view = camera.world_to_camera
    torch.testing.assert_close(view @ torch.tensor([2.0, 0, 0, 1]), torch.tensor([0.0, 0, 0, 1]), rtol=0, atol=1e-6)
    torch.testing.assert_close(view[:3, :3] @ torch.tensor([0.0, 0, 1]), torch.tensor([0.0, -1, 0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(view[:3, :3] @ torch.tensor([0.0, 1, 0]), torch.tensor([1.0, 0, 0]), rtol=0, atol=1e-6)
    assert torch.linalg.det(view[:3, :3]).item() == pytest.approx(1.0, abs=1e-6)
    assert camera.intrinsics[0, 0].item() == pytest.approx(0.5)
    above = orbit_camera(0.3, 1.2, 2.0, 40.0).world_to_camera
    position = -above[:3, :3].T @ above[:3, 3]
    expected = [2 * math.sin(0.3) * math.cos(1.2), 2 * math.cos(0.3) * math.cos(1.2), 2 * math.sin(1.2)]
    torch.testing.assert_close(position, torch.tensor(expected), rtol=0, atol=1e-6)


def test_picture_is_upright_and_not_mirrored(uniform: Environment) -> None:
    """Seen from -y, +x is on the right and +z above."""
    vertices = torch.tensor([[0.1, 0.0, 0.1], [0.4, 0.0, 0.1], [0.4, 0.0, 0.4]])
    asset = Asset(Mesh(vertices, torch.tensor([[0, 1, 2]])), material((1, 1, 1), 0, 1, 1))
    mask = render(asset, FRONT, uniform, resolution=256)["mask"]
    rows, columns = mask.nonzero().T
    assert rows.max() < 128
    assert columns.min() >= 128
    # The triangle is 0.3 wide at distance 2, where a picture is 2 * 2 * tan(20 degrees) wide.
    assert len(rows) == pytest.approx(0.5 * (0.3 / (4 * math.tan(math.radians(20))) * 256) ** 2, rel=0.03)


@pytest.mark.parametrize("flip", [False, True])
def test_normals_of_a_cube(uniform: Environment, flip: bool) -> None:
    """From one diagonal: (1 - n) / 2 in the camera frame, towards the camera whatever way the faces wind."""
    mesh = cube()
    if flip:
        mesh = Mesh(mesh.vertices, mesh.faces.flip(1))
    camera = orbit_camera(math.pi / 4, 0.5, 2.0, 40.0)
    seen = render(Asset(mesh, material((1, 1, 1), 0, 1, 1)), camera, uniform, resolution=96)
    found = seen["normal"].permute(1, 2, 0)[seen["mask"] > 0].unique(dim=0)
    expected = 0.5 - 0.5 * torch.eye(3) @ camera.world_to_camera[:3, :3].T
    distance = torch.cdist(expected, found)
    assert distance.amin(1).max() < 1e-5  # +x, +y and +z are seen
    assert distance.amin(0).max() < 1e-5  # and nothing else
    assert (seen["normal"][:, 0, 0] == 0.5).all()


def test_furnace(uniform: Environment) -> None:
    """A white matt ball in uniform light is evenly lit, but for the reflection that grows towards its edge."""
    asset = Asset(sphere(), material((1, 1, 1), 0, 1, 1))
    seen = render(asset, FRONT, uniform, resolution=96, ambient_occlusion=False)
    shaded = seen["shaded"][:, seen["mask"] > 0]
    centre = seen["shaded"][:, 48, 48]
    assert (centre - centre[0]).abs().max() < 1e-5
    assert (shaded - centre[:, None]).abs().max() < 0.03
    expected = renderer._encoded(renderer._tone_mapped(torch.tensor(0.5 * 1.08)))
    assert centre[0].item() == pytest.approx(expected.item(), abs=0.03)


def test_mirror_ball_shows_the_sky_above_and_the_ground_below() -> None:
    def sky(directions: Tensor) -> Tensor:
        return torch.where(directions[..., 2:3] > 0, torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0]))

    seen = render(Asset(sphere(), material((1, 1, 1), 1, 0, 1)), FRONT, prefilter(sky), resolution=96)
    top, bottom = seen["shaded"][:, 40, 48], seen["shaded"][:, 56, 48]
    assert top[2] > 0.8
    assert top[0] < 0.05
    assert bottom[0] > 0.8
    assert bottom[2] < 0.05


def linear(mesh: Mesh, voxels: MaterialVoxels, lights: Environment, layers: int = 8) -> tuple[Tensor, Tensor]:
    """Premultiplied radiance and coverage at the centre of the picture."""
    scene = renderer._Scene(Asset(mesh, voxels))
    seen = renderer._trace(scene, FRONT, torch.tensor([[0.5, 0.5]]), lights, layers)
    return seen.shaded[0], seen.coverage[0, 0]


def test_two_layers_are_composited(gradient: Environment) -> None:
    """Front voxels red at alpha 0.6, back voxels green and opaque: 0.6 front + 0.4 back, in linear light."""
    voxels = material((0, 0, 0), 0, 1, 1)
    front = voxels.coords[:, 1] < 2
    attributes = voxels.attrs.clone()
    attributes[front] = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.6])
    attributes[~front] = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    voxels = MaterialVoxels(voxels.coords, attributes, voxels.voxel_size)
    near, near_coverage = linear(quads(-0.4), voxels, gradient)
    far, _ = linear(quads(0.4), voxels, gradient)
    both, coverage = linear(quads(-0.4, 0.4), voxels, gradient)
    assert near_coverage.item() == pytest.approx(0.6)
    assert coverage.item() == pytest.approx(1.0)
    torch.testing.assert_close(both, near + 0.4 * far, rtol=1e-5, atol=1e-6)
    only_first, _ = linear(quads(-0.4, 0.4), voxels, gradient, layers=1)
    torch.testing.assert_close(only_first, near)


def test_coverage_of_many_layers(gradient: Environment) -> None:
    mesh = quads(-0.3, -0.1, 0.1, 0.3)
    for layers, expected in ((1, 0.5), (2, 0.75), (3, 0.875), (8, 0.9375)):
        _, coverage = linear(mesh, material((1, 1, 1), 0, 1, 0.5), gradient, layers)
        assert coverage.item() == pytest.approx(expected, abs=1e-6)


def test_channels(uniform: Environment) -> None:
    seen = render(Asset(quads(0.0), material((0.2, 0.4, 0.6), 0.3, 0.7, 0.9)), FRONT, uniform, resolution=32)
    assert seen["shaded"].shape == seen["normal"].shape == seen["base_color"].shape == (3, 32, 32)
    torch.testing.assert_close(seen["base_color"][:, 16, 16], torch.tensor([0.2, 0.4, 0.6]))
    for name, value in {"metallic": 0.3, "roughness": 0.7, "alpha": 0.9, "mask": 1.0}.items():
        assert seen[name].shape == (32, 32)
        assert seen[name][16, 16].item() == pytest.approx(value, abs=1e-6)
    assert seen["depth"][16, 16].item() == pytest.approx(float(FRONT.world_to_camera[2, 3]), abs=1e-5)
    for name in ("shaded", "base_color", "metallic", "roughness", "alpha", "mask", "clay", "depth"):
        assert (seen[name][..., 0, 0] == 0).all(), name


def test_occlusion_darkens_corners_and_leaves_a_flat_wall(uniform: Environment) -> None:
    wall = Asset(quads(0.0), material((1, 1, 1), 0, 1, 1))
    assert render(wall, FRONT, uniform, resolution=128)["clay"][56:72, 56:72].min() > 0.99
    floor = torch.tensor([[-0.4, 0.0, 0.0], [-0.4, -0.8, 0.0], [0.4, -0.8, 0.0], [0.4, 0.0, 0.0]])
    vertices = torch.cat([wall.mesh.vertices, floor])
    faces = torch.cat([wall.mesh.faces, torch.tensor([[4, 5, 6], [4, 6, 7]], dtype=torch.int32)])
    corner = Asset(Mesh(vertices, faces), wall.material)
    clay = render(corner, orbit_camera(math.pi, 0.5, 2.0, 40.0), uniform, resolution=128)["clay"][:, 64]
    fold = clay[60:68].mean()  # it passes through the origin
    assert fold < 0.75
    assert clay[40] > fold + 0.1
    assert clay[96] > fold + 0.1


def test_supersampling_softens_edges_only(gradient: Environment) -> None:
    asset = Asset(cube(), material((0.8, 0.5, 0.2), 0, 0.6, 1))
    camera = orbit_camera(0.4, 0.3, 2.0, 40.0)
    hard, soft = (render(asset, camera, gradient, resolution=64, supersampling=s)["mask"] for s in (1, 4))
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    between = (soft > 0.05) & (soft < 0.95)
    assert 40 < int(between.sum()) < 400
    assert (hard - soft).abs()[~between].max() <= 0.05
    assert soft.mean().item() == pytest.approx(hard.mean().item(), abs=0.01)


def test_turntable_is_antialiased() -> None:
    """Nearer to a picture of 16 rays a pixel than one ray a pixel is."""
    blade = torch.tensor([[-0.4, 0.0, -0.35], [0.45, 0.0, -0.1], [0.1, 0.0, 0.42]])  # it occludes nothing
    asset = Asset(Mesh(blade, torch.tensor([[0, 1, 2]])), material((0.8, 0.3, 0.2), 0, 0.6, 1))
    scene, lights, camera = renderer._Scene(asset), environment("studio"), FRONT
    size, backdrop = 96, torch.tensor([[0.9]])

    def shot(pixels: int) -> Tensor:
        seen = renderer._trace(scene, camera, renderer._pixel_centres(pixels, scene.device), lights, 8)
        shown = renderer._developed(seen, torch.ones(1, 1), backdrop, False)
        return shown.T.reshape(1, 3, pixels, pixels)

    truth = F.avg_pool2d(shot(4 * size), 4)
    ours = renderer._antialiased(scene, camera, lights, size, backdrop.expand(size * size, 1), False)
    edges = (shot(size) - truth).abs().amax(1)[0] > 0.02
    assert edges.sum() > 100
    error_of_one = (shot(size) - truth).abs().mean(1)[0][edges].mean()
    error_of_ours = (ours.permute(2, 0, 1) - truth[0]).abs().mean(0)[edges].mean()
    assert error_of_ours < 0.4 * error_of_one


def test_turntable_frames() -> None:
    asset = Asset(cube(), material((0.8, 0.3, 0.2), 0, 0.6, 1))
    steps: list[tuple[int, int]] = []
    frames = list(turntable(asset, frames=4, resolution=48, on_step=lambda i, n: steps.append((i, n))))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [f.shape for f in frames] == [(48, 48, 3)] * 4
    assert all(f.dtype == np.uint8 for f in frames)
    assert all((a != b).any() for a, b in itertools.pairwise(frames))
    again = list(turntable(asset, frames=4, resolution=48))
    assert all((a == b).all() for a, b in zip(frames, again, strict=True))
    corner, middle = frames[0][0, 0].astype(int), frames[0][24, 24].astype(int)
    assert np.ptp(corner) == 0
    assert corner[0] > 150  # the backdrop is light grey
    assert middle[0] > middle[2] + 40  # the object is red


def test_the_turn_closes() -> None:
    first, last = turntable_camera(0, 24), turntable_camera(24, 24)
    torch.testing.assert_close(first.world_to_camera, last.world_to_camera, rtol=0, atol=1e-6)
    steps = [turntable_camera(i, 24).world_to_camera for i in range(25)]
    moves = torch.stack([(b - a).norm() for a, b in itertools.pairwise(steps)])
    assert moves.max() < 2.5 * moves.min()


@pytest.mark.parametrize("resolution", [64, 66])
def test_panels(resolution: int) -> None:
    asset = Asset(quads(0.0, half=0.45), material((0.2, 0.8, 0.2), 0.25, 0.75, 1.0))
    frame = next(turntable(asset, frames=8, resolution=resolution, panels=True))
    height, width, _ = frame.shape
    assert width == 2 * resolution
    assert height == resolution + resolution // 4 * 2
    assert height % 2 == 0
    frames = list(turntable(Asset(cube(0.35), asset.material), frames=2, resolution=resolution, panels=True))
    half = resolution // 2
    row = frames[0][resolution + half // 2]
    base, metallic, roughness, alpha = (row[half // 2 + half * i].astype(int) for i in range(4))
    assert base.tolist() == [51, 204, 51]
    assert metallic.tolist() == [64] * 3
    assert roughness.tolist() == [191] * 3
    assert alpha.tolist() == [255] * 3


def test_a_callback_can_stop_the_turntable() -> None:
    def stop(step: int, steps: int) -> None:
        raise Cancelled("stopped")

    frames = turntable(Asset(cube(), material((1, 1, 1), 0, 1, 1)), frames=3, resolution=32, on_step=stop)
    with pytest.raises(Cancelled):
        next(frames)


def test_a_mesh_without_faces_is_refused(uniform: Environment) -> None:
    nothing = Mesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int32))
    asset = Asset(nothing, material((1, 1, 1), 0, 1, 1))
    with pytest.raises(InputError, match="no faces"):
        turntable(asset)
    with pytest.raises(InputError, match="no faces"):
        render(asset, FRONT, uniform, resolution=16)


def test_an_unknown_environment_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="overcast"):
        turntable(Asset(cube(), material((1, 1, 1), 0, 1, 1)), environment="moon")
