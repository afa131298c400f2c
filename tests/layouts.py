"""What a layout of charts has to be, for tests of unwrapping."""

from __future__ import annotations

import numpy as np
import torch
from o_voxel.raster import rasterize_uv
from o_voxel.repair import unify_face_orientations
from o_voxel.unwrap import Unwrapped
from scipy.ndimage import grey_dilation, grey_erosion
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from voxelise import bumpy_sphere, voxelise


def ball(resolution: int) -> tuple[Tensor, Tensor]:
    mesh = voxelise(bumpy_sphere(), resolution).mesh
    return unify_face_orientations(mesh.vertices, mesh.faces)


def chart_of_face(flat: Unwrapped) -> np.ndarray:
    edges = flat.faces[:, [0, 1, 1, 2]].reshape(-1, 2).numpy()
    count = len(flat.vertex_map)
    graph = coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1][flat.faces[:, 0].numpy()]


def check_layout(vertices: Tensor, flat: Unwrapped) -> None:
    """No overlap, no fold, room between the charts, one scale."""
    size = 2048
    assert float(flat.uvs.min()) >= 0
    assert float(flat.uvs.max()) <= 1
    a, b, c = flat.uvs.double()[flat.faces.long()].unbind(1)
    areas = ((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]).abs() / 2 * size**2
    face_id, weights = rasterize_uv(flat.uvs, flat.faces, size)
    held = (face_id >= 0) & (weights > 0).all(-1)
    # Of faces that overlap, the first wins: whichever way they are numbered, each texel must name the same.
    reverse_id, _ = rasterize_uv(flat.uvs, flat.faces.flip(0), size)
    reverse_id = len(flat.faces) - 1 - reverse_id
    assert torch.equal(reverse_id[held], face_id[held])
    assert held.sum() > 0.15 * size**2

    chart = chart_of_face(flat)
    assert len(np.unique(chart)) == flat.charts
    image = np.where(held, chart[face_id.clamp_min(0)], -1)
    highest = grey_dilation(image, size=(5, 5))
    lowest = grey_erosion(np.where(image < 0, 10**9, image), size=(5, 5))
    assert not ((image >= 0) & (highest != lowest)).any()

    corners = vertices.double()[flat.vertex_map][flat.faces.long()]
    solid = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]).norm(dim=1) / 2
    # Charts of a texel or two are rounded up to whole ones: the rest is foreshortened by 70 degrees at most.
    scale = (areas / solid)[solid > solid.median() / 10]
    low, middle, high = torch.quantile(scale, torch.tensor([0.01, 0.5, 0.99]).double()).tolist()
    assert low > middle / 2.5
    assert high < middle * 1.5
