"""After warming up, a request finds everything loaded and gives what it gives without."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from subprocess import run

import torch

from trellis2.options import GenerateOptions
from trellis2.pipeline import Pipeline
from trellis2.warmup import _cube

PICTURE = Path(__file__).parents[1] / "assets" / "example_image" / "T.png"
SMALL = {
    "pipeline_type": "512",
    "texture_size": 1024,
    "decimation_target": 100_000,
    "video_frames": 2,
    "video_resolution": 64,
}
WARM = """
import json, sys
from o_voxel import prebuild
from o_voxel.launch import wp
from trellis2.options import GenerateOptions
from trellis2.pipeline import Pipeline
from trellis2.warmup import warm_up

def loaded():
    return [name for name in [*prebuild.own_modules(), "trellis2.environment"] if wp.get_module(name).execs]

model, picture, folder, small = sys.argv[1:]
pipeline = Pipeline.from_pretrained(model, device="cpu")
warm_up(pipeline)
before = loaded()
pipeline.run(picture, GenerateOptions(**json.loads(small)), folder)
print(json.dumps([before, loaded()]))
"""


def test_cube_is_closed_and_faces_outwards() -> None:
    mesh = _cube(torch.device("cpu")).mesh
    a, b, c = mesh.vertices[mesh.faces.long()].unbind(1)
    normals = torch.linalg.cross(b - a, c - a)
    assert ((normals * (a + b + c)).sum(1) > 0).all()
    assert torch.isclose((a * torch.linalg.cross(b, c)).sum() / 6, torch.tensor(0.125))


def test_nothing_is_loaded_afterwards_and_results_stay(checkpoint_folder: Path, tmp_path: Path) -> None:
    arguments = [str(checkpoint_folder), str(PICTURE), str(tmp_path / "warm"), json.dumps(SMALL)]
    done = run([sys.executable, "-c", WARM, *arguments], capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout.splitlines()[-1])
    assert len(before) > 5
    assert after == before
    Pipeline.from_pretrained(checkpoint_folder, device="cpu").run(PICTURE, GenerateOptions(**SMALL), tmp_path / "cold")
    for name in ("model.glb", "video.mp4"):
        assert (tmp_path / "warm" / name).read_bytes() == (tmp_path / "cold" / name).read_bytes()
