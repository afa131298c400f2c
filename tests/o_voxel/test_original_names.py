"""Scripts written for the original package run: its public names, with their arguments and defaults, are all there.

The table was read off microsoft/TRELLIS.2 at 5565d24 (o-voxel/o_voxel).
"""

from __future__ import annotations

import importlib
import inspect
import math
from typing import Any

import pytest
import torch
from o_voxel.rasterize import intrinsics_to_projection

NEEDED = object()
GRID = {"voxel_size": None, "grid_size": None}
ORIGINAL: dict[str, dict[str, Any]] = {
    "convert.mesh_to_flexible_dual_grid": {
        "vertices": NEEDED,
        "faces": NEEDED,
        **GRID,
        "aabb": None,
        "face_weight": 1.0,
        "boundary_weight": 1.0,
        "regularization_weight": 0.1,
        "timing": False,
    },
    "convert.flexible_dual_grid_to_mesh": {
        "coords": NEEDED,
        "dual_vertices": NEEDED,
        "intersected_flag": NEEDED,
        "split_weight": NEEDED,
        "aabb": NEEDED,
        **GRID,
        "train": False,
    },
    "convert.textured_mesh_to_volumetric_attr": {
        "mesh": NEEDED,
        **GRID,
        "aabb": None,
        "mip_level_offset": 0.0,
        "verbose": False,
        "timing": False,
    },
    "convert.blender_dump_to_volumetric_attr": {
        "dump": NEEDED,
        **GRID,
        "aabb": None,
        "mip_level_offset": 0.0,
        "verbose": False,
        "timing": False,
    },
    "io.read": {"file_path": NEEDED},
    "io.write": {"file_path": NEEDED, "coord": NEEDED, "attr": NEEDED},
    "io.read_npz": {"file": NEEDED},
    "io.write_npz": {"file": NEEDED, "coord": NEEDED, "attr": NEEDED, "compress": True},
    "io.read_ply": {"file": NEEDED},
    "io.write_ply": {"file": NEEDED, "coord": NEEDED, "attr": NEEDED},
    "io.read_vxz_info": {"file": NEEDED},
    "io.read_vxz": {"file": NEEDED, "num_threads": -1},
    "io.write_vxz": {
        "file": NEEDED,
        "coord": NEEDED,
        "attr": NEEDED,
        "chunk_size": 256,
        "filter": "none",
        "compression": "lzma",
        "compression_level": None,
        "attr_interleave": "as_is",
        "num_threads": -1,
    },
    "postprocess.to_glb": {
        "vertices": NEEDED,
        "faces": NEEDED,
        "attr_volume": NEEDED,
        "coords": NEEDED,
        "attr_layout": NEEDED,
        "aabb": NEEDED,
        **GRID,
        "decimation_target": 1_000_000,
        "texture_size": 2048,
        "remesh": False,
        "remesh_band": 1,
        "remesh_project": 0.9,
        "mesh_cluster_threshold_cone_half_angle_rad": math.pi / 2,
        "mesh_cluster_refine_iterations": 0,
        "mesh_cluster_global_iterations": 1,
        "mesh_cluster_smooth_strength": 1,
        "verbose": False,
        "use_tqdm": False,
    },
    "rasterize.intrinsics_to_projection": {"intrinsics": NEEDED, "near": NEEDED, "far": NEEDED},
    "rasterize.VoxelRenderer": {"rendering_options": {}},
    "rasterize.VoxelRenderer.render": {
        "self": NEEDED,
        "position": NEEDED,
        "attrs": NEEDED,
        "voxel_size": NEEDED,
        "extrinsics": NEEDED,
        "intrinsics": NEEDED,
    },
    "serialize.encode_seq": {"coords": NEEDED, "permute": [0, 1, 2], "mode": "z_order"},
    "serialize.decode_seq": {"code": NEEDED, "permute": [0, 1, 2], "mode": "z_order"},
}


@pytest.mark.parametrize("name", ORIGINAL)
def test_the_arguments_are_those_of_the_original(name: str) -> None:
    module, *rest = name.split(".")
    function: Any = importlib.import_module(f"o_voxel.{module}")
    for part in rest:
        function = getattr(function, part)
    assert callable(function)
    ours = list(inspect.signature(function).parameters.values())
    for mine, (argument, default) in zip(ours, ORIGINAL[name].items(), strict=False):
        assert mine.name == argument
        assert mine.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        if default is NEEDED:
            assert mine.default is inspect.Parameter.empty
        else:
            # Sequences may be of another kind, and nothing may stand for an empty dictionary.
            same = list(default) if isinstance(default, list) else default
            found = list(mine.default) if isinstance(mine.default, tuple) else mine.default
            assert found == same or (default == {} and found is None)
    # What we have beside those has a default.
    assert len(ours) >= len(ORIGINAL[name])
    for more in ours[len(ORIGINAL[name]) :]:
        assert more.kind is inspect.Parameter.VAR_KEYWORD or more.default is not inspect.Parameter.empty


@pytest.mark.parametrize("module", ["convert", "io"])
def test_a_star_import_gives_the_same_names(module: str) -> None:
    there = set(importlib.import_module(f"o_voxel.{module}").__all__)
    assert there == {name.split(".")[1] for name in ORIGINAL if name.startswith(f"{module}.")}


def test_projection_of_intrinsics() -> None:
    intrinsics = torch.tensor([[1.2, 0.0, 0.5], [0.0, 0.9, 0.4], [0.0, 0.0, 1.0]], dtype=torch.float64)
    projection = intrinsics_to_projection(intrinsics, 0.5, 8.0)
    points = torch.tensor([[0.3, -0.2, 0.5, 1.0], [1.0, 2.0, 8.0, 1.0]], dtype=torch.float64)
    x, y, z, w = (points @ projection.T).T
    assert torch.equal(w, points[:, 2])
    assert torch.allclose(z / w, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert torch.allclose(x / w, 2 * (1.2 * points[:, 0] / points[:, 2] + 0.5) - 1)
    assert torch.allclose(y / w, 2 * (0.9 * points[:, 1] / points[:, 2]) + 1 - 2 * 0.4)
    with pytest.raises(ValueError, match=r"intrinsics must be floats of shape \(3, 3\)"):
        intrinsics_to_projection(torch.eye(4), 0.5, 8.0)
    with pytest.raises(ValueError, match="far the greater"):
        intrinsics_to_projection(torch.eye(3), 8.0, 0.5)
