"""Pictures of sparse voxels: a ray through each pixel, the first cube that it meets.

One Warp kernel for CPU and CUDA, which finds the cubes along a ray in a bounding volume hierarchy, and a brute-force
reference in torch.  Cubes may lie anywhere, on a grid or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .checks import check_points
from .launch import Floats, Ints, MeshId, Vec3, Vec3s, kernel, launch, shared, wp

_LEAST = 1e-20  # of a direction's components, so that none divides by zero


class Fields(dict[str, Any]):
    """A dictionary whose entries are attributes as well."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


def intrinsics_to_projection(intrinsics: Tensor, near: float, far: float) -> Tensor:
    """The projection (4, 4) of a camera that looks along +z, in the dtype and on the device of ``intrinsics``.

    intrinsics: (3, 3) float in units of the picture's side. near, far: depths that become 0 and 1.  Points (x, y, z, 1)
    in the camera's frame go to homogeneous ones whose x and y are -1 and 1 at the picture's borders, if the camera's
    middle is the picture's.  Raises ValueError.
    """
    if intrinsics.shape != (3, 3) or not intrinsics.is_floating_point():
        raise ValueError(
            f"intrinsics must be floats of shape (3, 3), not {intrinsics.dtype} {tuple(intrinsics.shape)}."
        )
    if not 0 < near < far < float("inf"):
        raise ValueError(f"near={near!r} and far={far!r} must be positive, far the greater.")
    (fx, _, cx), (_, fy, cy), _ = intrinsics
    none, one = torch.zeros_like(fx), torch.ones_like(fx)
    slope = one * (far / (far - near))
    rows = (
        (2 * fx, none, 2 * cx - 1, none),
        (none, 2 * fy, 1 - 2 * cy, none),
        (none, none, slope, -near * slope),
        (none, none, one, none),
    )
    return torch.stack([torch.stack(row) for row in rows])


class VoxelRenderer:
    """Renders voxels as cubes (o_voxel.rasterize.VoxelRenderer of TRELLIS.2).

    rendering_options: "resolution", the side of the square picture in pixels, which must be given; "near" and "far",
    between which depths along the camera's axis cubes are seen (0.1 and 10); "ssaa", how many rays a pixel gets along
    each side (1).  They stay in ``rendering_options``, where they may be changed as attributes or entries.
    """

    def __init__(self, rendering_options: Mapping[str, Any] | None = None) -> None:
        self.rendering_options = Fields(resolution=None, near=0.1, far=10.0, ssaa=1)
        self.rendering_options.update(rendering_options or {})

    def render(
        self, position: Tensor, attrs: Tensor, voxel_size: float, extrinsics: Tensor, intrinsics: Tensor
    ) -> Fields:
        """Render N cubes of side ``voxel_size`` about ``position``.

        position: (N, 3) centres in the world. attrs: (N, C) numbers. extrinsics: (4, 4), world to camera, which looks
        along +z with y down (OpenCV). intrinsics: (3, 3) in units of the picture's side, (0, 0) its upper left corner.

        Returns, as attributes and entries, float32 on the device of ``position``: "attr" (C, H, W), of the cube that
        each ray meets first; "depth" (H, W), the distance along the ray from the camera to where it enters that cube,
        or to the near plane if that lies within; "alpha" (H, W), 1 where there is a cube.  All are 0 elsewhere, and
        with ssaa averaged over the rays about a pixel.  Of cubes entered together the first row counts; equal input
        gives equal bits.  Raises ValueError naming the argument.
        """
        options = self.rendering_options
        _check(options, position, attrs, voxel_size, extrinsics, intrinsics)
        resolution, ssaa = int(options.resolution), int(options.ssaa)
        side = resolution * ssaa
        eye, forward, directions = _rays(extrinsics, intrinsics, side)
        rows, depth = _first_cubes(
            position.detach().float().contiguous(),
            float(voxel_size),
            eye,
            forward,
            directions.to(position.device),
            float(options.near),
            float(options.far),
        )
        hit = rows >= 0
        image = torch.zeros((side * side, attrs.shape[1]), device=position.device)
        image[hit] = attrs.detach().to(position.device, torch.float32)[rows[hit].long()]
        layers = torch.cat([image, depth[:, None], hit.float()[:, None]], dim=1).T.reshape(1, -1, side, side)
        if ssaa > 1:
            layers = torch.nn.functional.interpolate(
                layers, (resolution, resolution), mode="bilinear", align_corners=False, antialias=True
            )
        return Fields(attr=layers[0, :-2], depth=layers[0, -2], alpha=layers[0, -1])


def first_cubes_reference(
    position: Tensor, voxel_size: float, extrinsics: Tensor, intrinsics: Tensor, side: int, near: float, far: float
) -> tuple[Tensor, Tensor]:
    """(row of the first cube or -1, distance or 0), (side, side) each, by testing every ray with every cube in float64.

    For tests: ``VoxelRenderer.render`` before colours and averages.
    """
    view, matrix = extrinsics.double(), intrinsics.double()
    step = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    v, u = torch.meshgrid(step, step, indexing="ij")
    in_camera = torch.stack(
        [(u - matrix[0, 2]) / matrix[0, 0], (v - matrix[1, 2]) / matrix[1, 1], torch.ones_like(u)], -1
    )
    # One unit along these rays is one of depth.
    rays = in_camera.reshape(-1, 1, 3) @ view[:3, :3]
    eye = -view[:3, 3] @ view[:3, :3]
    ends = [(position.double() + sign * 0.5 * voxel_size - eye)[None] / rays for sign in (-1, 1)]
    enter = torch.minimum(*ends).nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(2).clamp_min(near)
    leave = torch.maximum(*ends).nan_to_num(torch.inf, torch.inf, -torch.inf).amin(2).clamp_max(far)
    depth, row = torch.where(leave > enter, enter, torch.inf).min(dim=1)
    hit = depth.isfinite()
    distance = torch.where(hit, depth, 0.0) * rays[:, 0].norm(dim=1)
    return torch.where(hit, row, -1).view(side, side), distance.view(side, side)


def _check(
    options: Fields, position: Tensor, attrs: Tensor, voxel_size: float, extrinsics: Tensor, intrinsics: Tensor
) -> None:
    for name in ("resolution", "ssaa"):
        if not isinstance(options[name], int) or options[name] < 1:
            raise ValueError(f"rendering_options[{name!r}]={options[name]!r} must be an integer of at least 1.")
    if not 0 < options.near < options.far:
        raise ValueError(f"rendering_options: near={options.near} and far={options.far} must be 0 < near < far.")
    check_points("position", position)
    if attrs.ndim != 2 or len(attrs) != len(position):
        raise ValueError(f"attrs must have shape ({len(position)}, C), not {tuple(attrs.shape)}.")
    if not 0 < float(voxel_size) < float("inf"):
        raise ValueError(f"voxel_size={voxel_size!r} must be a positive number.")
    for name, matrix, width in (("extrinsics", extrinsics, 4), ("intrinsics", intrinsics, 3)):
        if matrix.shape != (width, width) or not bool(matrix.isfinite().all()):
            raise ValueError(f"{name} must be finite numbers of shape ({width}, {width}), not {tuple(matrix.shape)}.")
    if (
        float(intrinsics[0, 0]) == 0
        or float(intrinsics[1, 1]) == 0
        or float(torch.linalg.det(extrinsics.double())) == 0
    ):
        raise ValueError("extrinsics must have an inverse, and intrinsics focal lengths that are not 0.")


def _rays(extrinsics: Tensor, intrinsics: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """The camera's place (3,) and axis (3,), and the unit direction (side * side, 3) through each pixel's centre."""
    to_world = torch.linalg.inv(extrinsics.detach().double().cpu())
    (fx, _, cx), (_, fy, cy), _ = intrinsics.detach().double().cpu().tolist()
    step = (torch.arange(side, dtype=torch.float64, device=intrinsics.device) + 0.5) / side
    v, u = torch.meshgrid((step - cy) / fy, (step - cx) / fx, indexing="ij")
    axes = to_world[:3, :3].to(step.device)
    directions = torch.stack([u, v, torch.ones_like(u)], -1).reshape(-1, 3) @ axes.T
    return (
        to_world[:3, 3],
        torch.nn.functional.normalize(extrinsics.detach().double().cpu()[2, :3], dim=0),
        torch.nn.functional.normalize(directions, dim=1).float(),
    )


def _first_cubes(
    position: Tensor, voxel_size: float, eye: Tensor, forward: Tensor, directions: Tensor, near: float, far: float
) -> tuple[Tensor, Tensor]:
    """(row of the first cube or -1, distance or 0), (R,) each."""
    device = position.device
    rows = torch.full((len(directions),), -1, dtype=torch.int32, device=device)
    depth = torch.zeros(len(directions), device=device)
    if not len(position):
        return rows, depth
    # The tree only proposes cubes, with some margin for its own rounding.
    reach = 0.5 * voxel_size * 1.001
    low, high = position - reach, position + reach
    tree = wp.Bvh(shared(low, wp.vec3), shared(high, wp.vec3))
    arguments = [
        tree.id,
        shared(position, wp.vec3),
        0.5 * voxel_size,
        wp.vec3(*eye.tolist()),
        wp.vec3(*forward.tolist()),
        shared(directions.contiguous(), wp.vec3),
        near,
        far,
        shared(rows, wp.int32),
        shared(depth, wp.float32),
    ]
    launch(_cast, len(directions), arguments, device)
    return rows, depth


@kernel
def _cast(
    first: int,
    tree: MeshId,
    position: Vec3s,
    half: float,
    eye: Vec3,
    forward: Vec3,
    directions: Vec3s,
    near: float,
    far: float,
    rows: Ints,
    depth: Floats,
) -> None:
    i = first + wp.tid()
    ray = directions[i]
    for axis in range(3):
        if wp.abs(ray[axis]) < _LEAST:
            ray[axis] = _LEAST
    along = wp.dot(ray, forward)
    side = wp.vec3(half, half, half)
    nearest = float(wp.inf)
    row = wp.int32(-1)
    j = wp.int32(0)
    query = wp.bvh_query_ray(tree, eye, ray)
    while wp.bvh_query_next(query, j):
        one = wp.cw_div(position[j] - side - eye, ray)
        other = wp.cw_div(position[j] + side - eye, ray)
        enter = wp.max(wp.max(wp.min(one, other)), near / along)
        leave = wp.min(wp.min(wp.max(one, other)), far / along)
        if leave > enter and (enter < nearest or (enter == nearest and j < row)):
            nearest = enter
            row = j
    rows[i] = row
    if row >= 0:
        depth[i] = nearest
