"""A textured mesh to voxels, a file, a mesh and a GLB with the installed o_voxel: scripts/test_wheels runs it.

Its argument is True or False: whether the compiled part should be there.
"""

import platform
import sys
import tempfile
from pathlib import Path

import numpy as np
import o_voxel
import torch
import trimesh
from o_voxel._native import library
from PIL import Image
from trimesh.visual import TextureVisuals
from trimesh.visual.material import PBRMaterial

BOX = [[-0.5] * 3, [0.5] * 3]
RESOLUTION = 48

assert (library() is not None) == (sys.argv[1] == "True"), library()
ball = trimesh.creation.icosphere(4, 0.4)
material = PBRMaterial(baseColorTexture=Image.new("RGB", (8, 8), (230, 120, 40)), roughnessFactor=0.5)
ball.visual = TextureVisuals(uv=np.zeros((len(ball.vertices), 2)), material=material)
coords, dual, crossed = o_voxel.convert.mesh_to_flexible_dual_grid(
    torch.tensor(ball.vertices), torch.tensor(ball.faces), grid_size=RESOLUTION, aabb=BOX
)
also, attributes = o_voxel.convert.textured_mesh_to_volumetric_attr(ball, grid_size=RESOLUTION, aabb=BOX)
assert torch.equal(coords, also)
assert attributes["base_color"].unique(dim=0).tolist() == [[230, 120, 40]]
with tempfile.TemporaryDirectory() as folder:
    o_voxel.io.write(f"{folder}/ball.vxz", coords, attributes)
    again, read = o_voxel.io.read(f"{folder}/ball.vxz")
    codes = [o_voxel.serialize.encode_seq(c, mode="hilbert").sort().values for c in (coords, again)]
    assert torch.equal(*codes)
    assert sorted(read) == sorted(attributes)
    vertices, faces = o_voxel.convert.flexible_dual_grid_to_mesh(
        coords, dual * RESOLUTION - coords, crossed, None, BOX, grid_size=RESOLUTION
    )
    assert len(torch.unique(faces)) - len(faces) // 2 == 2  # Euler's number of a closed ball
    assert ((vertices.norm(dim=1) - 0.4).abs() < 0.5 / RESOLUTION).all()
    volume = torch.cat([attributes[name] for name in ("base_color", "metallic", "roughness", "alpha")], dim=1) / 255
    layout = {"base_color": slice(0, 3), "metallic": slice(3, 4), "roughness": slice(4, 5), "alpha": slice(5, 6)}
    sizes = {"grid_size": RESOLUTION, "decimation_target": 2000, "texture_size": 256}
    glb = o_voxel.postprocess.to_glb(vertices, faces, volume, coords, layout, BOX, **sizes)
    glb.export(f"{folder}/ball.glb")
    assert Path(f"{folder}/ball.glb").read_bytes()[:4] == b"glTF"
sys.stdout.write(
    f"Python {platform.python_version()}, torch {torch.__version__}, compiled part {library() is not None}: works\n"
)
