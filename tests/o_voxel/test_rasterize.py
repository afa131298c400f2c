from __future__ import annotations

import math

import pytest
import torch
from o_voxel.rasterize import VoxelRenderer, first_cubes_reference
from torch import Tensor
from torch.nn.functional import normalize

AHEAD = torch.eye(4)  # at the origin, along +z
SQUARE = torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])  # 90 degrees
ONE = torch.tensor([[0.0, 0.0, 3.0]])
RED = torch.tensor([[1.0, 0.25, 0.0]])


def look_at(eye: list[float], target: list[float], roll: float = 0.0) -> Tensor:
    """World to camera, +z forward and y down, with z up in the world."""
    place = torch.tensor(eye)
    forward = normalize(torch.tensor(target) - place, dim=0)
    right = normalize(torch.linalg.cross(forward, torch.tensor([0.0, 0.0, 1.0])), dim=0)
    down = torch.linalg.cross(forward, right)
    axes = torch.stack(
        [math.cos(roll) * right + math.sin(roll) * down, math.cos(roll) * down - math.sin(roll) * right, forward]
    )
    view = torch.eye(4)
    view[:3, :3], view[:3, 3] = axes, -axes @ place
    return view


def cloud(count: int, seed: int, steps: int = 16) -> Tensor:
    """Centres of distinct voxels of a steps^3 grid over [-0.5, 0.5]^3."""
    cells = torch.randperm(steps**3, generator=torch.Generator().manual_seed(seed))[:count]
    coords = torch.stack([cells // steps**2, cells // steps % steps, cells % steps], 1)
    return (coords + 0.5) / steps - 0.5


def rows(
    position: Tensor, size: float, view: Tensor, matrix: Tensor, side: int, **options: float
) -> tuple[Tensor, Tensor]:
    """(row or -1, depth) of each pixel, by rendering row numbers."""
    names = torch.arange(1, len(position) + 1)[:, None]
    picture = VoxelRenderer({"resolution": side, **options}).render(position, names, size, view, matrix)
    assert torch.equal(picture.alpha, (picture.attr[0] > 0).float())
    return picture.attr[0].long() - 1, picture.depth


def test_one_voxel_straight_ahead() -> None:
    picture = VoxelRenderer({"resolution": 8}).render(ONE, RED, 2.0, AHEAD, SQUARE)
    # The front side is 2 wide at depth 2 and the field of view 4: the middle half of the picture.
    expected = torch.zeros(8, 8)
    expected[2:6, 2:6] = 1
    assert torch.equal(picture.alpha, expected)
    assert torch.equal(picture.attr, expected * RED[0][:, None, None])
    step = (torch.arange(8) + 0.5) / 4 - 1
    along_ray = 2 * (step[:, None] ** 2 + step[None] ** 2 + 1).sqrt()
    torch.testing.assert_close(picture.depth, along_ray * expected)
    assert picture["depth"] is picture.depth


def test_right_is_x_and_down_is_y() -> None:
    found, _ = rows(torch.tensor([[1.0, 0.0, 3.0], [0.0, 1.0, 3.0]]), 0.5, AHEAD, SQUARE, 24)
    across, down = torch.nonzero(found == 0).float().mean(0), torch.nonzero(found == 1).float().mean(0)
    assert across[0] == 11.5
    assert across[1] > 13
    assert down[1] == 11.5
    assert down[0] > 13


def test_sides_are_seen_under_perspective() -> None:
    # The cube spans x from 1 to 3 and z from 3 to 5.
    _, depth = rows(torch.tensor([[2.0, 0.0, 4.0]]), 2.0, AHEAD, SQUARE, 256)
    middle = depth[128]
    columns = (torch.arange(256) + 0.5) / 128 - 1
    # x / z from 1/5 (far edge of the left side) to 1/3 (its near edge) is the side, up to 1 (right edge) the front.
    side = (columns > 1 / 5 + 0.01) & (columns < 1 / 3 - 0.01)
    front = columns > 1 / 3 + 0.01
    length = (columns**2 + 1 + (1 / 256) ** 2).sqrt()
    torch.testing.assert_close(middle[side], (length / columns)[side], rtol=1e-5, atol=0)
    torch.testing.assert_close(middle[front], (3 * length)[front], rtol=1e-5, atol=0)
    assert (middle[columns < 1 / 5] == 0).all()


@pytest.mark.parametrize("count", [1, 7, 300, 3000])
@pytest.mark.parametrize(
    ("view", "matrix"),
    [
        (
            look_at([1.2, 0.5, 1.2], [0.0, 0.0, 0.0]),
            SQUARE * torch.tensor([[2.4], [2.4], [1.0]])
            + torch.tensor([[0.0, 0.0, -0.7], [0.0, 0.0, -0.7], [0.0, 0.0, 0.0]]),
        ),
        (
            look_at([-0.9, 0.2, -0.4], [0.1, 0.0, 0.1], 0.7),
            torch.tensor([[0.9, 0.0, 0.3], [0.0, 0.6, 0.6], [0.0, 0.0, 1.0]]),
        ),
        (look_at([0.03, 0.01, 0.02], [0.2, 0.4, 0.1]), SQUARE),
    ],
    ids=["outside", "off centre", "inside"],
)
def test_equals_brute_force(count: int, view: Tensor, matrix: Tensor) -> None:
    position = cloud(count, count)
    found, depth = rows(position, 1 / 16, view, matrix, 40)
    expected, distance = first_cubes_reference(position, 1 / 16, view, matrix, 40, 0.1, 10.0)
    same = found == expected
    # Rays through an edge may pass on either side of it.
    assert (~same).sum() <= 2
    torch.testing.assert_close(depth[same], distance.float()[same], rtol=1e-5, atol=1e-6)
    assert count < 300 or (expected >= 0).float().mean() > 0.05


def test_cubes_off_any_grid_that_overlap() -> None:
    position = torch.rand((200, 3), generator=torch.Generator().manual_seed(3)) - 0.5
    view = look_at([1.5, -1.0, 0.7], [0.0, 0.0, 0.0])
    found, depth = rows(position, 0.13, view, SQUARE, 48)
    expected, distance = first_cubes_reference(position, 0.13, view, SQUARE, 48, 0.1, 10.0)
    assert (found != expected).sum() <= 2
    torch.testing.assert_close(depth[found == expected], distance.float()[found == expected], rtol=1e-5, atol=1e-6)


def test_near_and_far_cut() -> None:
    two = torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.0, 6.0]])
    assert rows(two, 1.0, AHEAD, SQUARE, 9)[0][4, 4] == 0
    found, depth = rows(two, 1.0, AHEAD, SQUARE, 9, near=2.0)
    assert found[4, 4] == 0
    assert depth[4, 4] == 2.0  # cut open
    found, depth = rows(two, 1.0, AHEAD, SQUARE, 9, near=2.6)
    assert found[4, 4] == 1
    assert depth[4, 4] == 5.5
    assert (rows(two, 1.0, AHEAD, SQUARE, 9, near=2.6, far=5.4)[0] == -1).all()
    # Planes, not spheres: the corners of the picture are farther than 5.6 along their rays.
    wide = torch.tensor([[0.0, 0.0, 10.0]])
    assert (rows(wide, 9.0, AHEAD, SQUARE, 9, far=5.6)[0][2:7, 2:7] == 0).all()


def test_behind_the_camera_and_nothing_at_all() -> None:
    for position in (-ONE, torch.zeros(0, 3)):
        picture = VoxelRenderer({"resolution": 6}).render(position, torch.ones(len(position), 3), 2.0, AHEAD, SQUARE)
        assert picture.attr.shape == (3, 6, 6)
        for layer in picture.values():
            assert (layer == 0).all()


@pytest.mark.parametrize("channels", [0, 1, 3, 6])
def test_attributes_of_any_width_and_type(channels: int) -> None:
    position = cloud(500, 5)
    view = look_at([1.2, 0.5, 1.2], [0.0, 0.0, 0.0])
    attrs = torch.randint(0, 255, (500, channels), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found, _ = rows(position, 1 / 16, view, SQUARE, 32)
    picture = VoxelRenderer({"resolution": 32}).render(position, attrs, 1 / 16, view, SQUARE)
    expected = torch.where(found[..., None] >= 0, attrs.float()[found.clamp_min(0)], 0.0)
    assert picture.attr.dtype == torch.float32
    assert torch.equal(picture.attr, expected.permute(2, 0, 1))


def test_ssaa_averages_more_rays() -> None:
    renderer = VoxelRenderer({"resolution": 16})
    renderer.rendering_options.ssaa = 3
    fine = VoxelRenderer({"resolution": 48}).render(ONE, RED, 1.7, AHEAD, SQUARE)
    picture = renderer.render(ONE, RED, 1.7, AHEAD, SQUARE)
    assert picture.attr.shape == (3, 16, 16)
    assert picture.alpha.unique().numel() > 2
    assert abs(float(picture.alpha.mean() - fine.alpha.mean())) < 1e-3
    torch.testing.assert_close(picture.attr[1], picture.alpha * 0.25)


def test_same_bits_every_time() -> None:
    position = cloud(3000, 1)
    view = look_at([1.2, 0.5, 1.2], [0.0, 0.0, 0.0])
    first, again = (rows(position, 1 / 16, view, SQUARE, 100) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@pytest.mark.gpu
def test_a_gpu_sees_the_same() -> None:
    position = cloud(3000, 1)
    view = look_at([1.2, 0.5, 1.2], [0.0, 0.0, 0.0])
    found, depth = rows(position.cuda(), 1 / 16, view.cuda(), SQUARE.cuda(), 200)
    expected, distance = rows(position, 1 / 16, view, SQUARE, 200)
    same = found.cpu() == expected
    assert (~same).float().mean() < 1e-4
    torch.testing.assert_close(depth.cpu()[same], distance[same], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"options": {}}, "resolution"),
        ({"options": {"resolution": 8, "ssaa": 0}}, "ssaa"),
        ({"options": {"resolution": 8, "near": 2.0, "far": 1.0}}, "near"),
        ({"position": torch.zeros(1, 2)}, "position"),
        ({"attrs": torch.ones(2, 3)}, "attrs"),
        ({"voxel_size": 0.0}, "voxel_size"),
        ({"extrinsics": torch.eye(3)}, "extrinsics"),
        ({"extrinsics": torch.zeros(4, 4)}, "extrinsics"),
        ({"intrinsics": torch.zeros(3, 3)}, "intrinsics"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], named: str) -> None:
    arguments = {"position": ONE, "attrs": RED, "voxel_size": 1.0, "extrinsics": AHEAD, "intrinsics": SQUARE, **change}
    renderer = VoxelRenderer(arguments.pop("options", {"resolution": 8}))
    with pytest.raises(ValueError, match=named):
        renderer.render(**arguments)
    with pytest.raises(AttributeError, match="colour"):
        _ = renderer.rendering_options.colour
