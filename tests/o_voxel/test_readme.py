"""The examples of o_voxel's README run, in their order, and its table names what is there."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image
from trimesh.visual import TextureVisuals
from trimesh.visual.material import PBRMaterial

README = (Path(__file__).parents[2] / "o-voxel" / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SMALLER = {"RES = 256": "RES = 48", "=100_000": "=2000", "=2048": "=256", '"resolution": 512': '"resolution": 96'}
ORANGE = (230, 120, 40)
PRINTED = """
print(len(coords), len(glb.faces), tuple(pixels.shape), pixels[48, 48].tolist(), pixels[0, 0].tolist())
"""


def write_model(path: Path) -> None:
    """An orange ball of radius 3, textured, away from the origin."""
    ball = trimesh.creation.uv_sphere(radius=3.0)
    ball.apply_translation([5.0, 0.0, 1.0])
    uv = np.random.default_rng(0).random((len(ball.vertices), 2))
    material = PBRMaterial(baseColorTexture=Image.new("RGB", (8, 8), ORANGE), metallicFactor=0.0, roughnessFactor=0.5)
    ball.visual = TextureVisuals(uv=uv, material=material)
    trimesh.Scene(ball).export(path)


def test_the_examples_run(tmp_path: Path) -> None:
    assert len(EXAMPLES) == 4
    script = "".join(EXAMPLES)
    for large, small in SMALLER.items():
        assert script.count(large) == 1, large
        script = script.replace(large, small)
    write_model(tmp_path / "model.glb")
    # In a Python of its own: in here the folder of these tests is a package o_voxel as well.
    command = [sys.executable, "-W", "error", "-c", script + PRINTED]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    count, faces, *_ = result.stdout.split()
    assert 6000 < int(count) < 15_000
    assert 1000 < int(faces) <= 2000
    assert f"(96, 96, 3) {list(ORANGE)} [0, 0, 0]" in result.stdout

    (rebuilt,) = trimesh.load(tmp_path / "rebuilt.glb").geometry.values()
    assert abs(np.linalg.norm(rebuilt.vertices, axis=1) - 0.5).max() < 0.5 / 48
    texture = np.asarray(rebuilt.visual.material.baseColorTexture)
    assert (abs(texture[..., :3].astype(int) - ORANGE) <= 1).all()


def named_in_the_table() -> set[str]:
    section = README[README.index("## All public functions") :]
    rows = re.findall(r"^\| (`.*?) \|", section[: section.index("\n## ")], re.MULTILINE)
    return set(re.findall(r"`(\w+\.\w+)`", " ".join(rows)))


def test_the_table_names_every_public_function() -> None:
    named = named_in_the_table()
    for name in named:
        module, function = name.split(".")
        assert callable(getattr(importlib.import_module(f"o_voxel.{module}"), function))
    for module in ("convert", "io"):
        there = importlib.import_module(f"o_voxel.{module}").__all__
        assert {f"{module}.{function}" for function in there} <= named
    assert {"serialize.encode_seq", "serialize.decode_seq", "rasterize.VoxelRenderer", "postprocess.to_glb"} <= named


def test_the_reference_is_up_to_date_and_whole(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "document_o_voxel"
    subprocess.run([sys.executable, script, tmp_path / "page.md"], check=True, capture_output=True)
    page = (tmp_path / "page.md").read_text()
    kept = (Path(__file__).parents[2] / "docs" / "o-voxel.md").read_text()
    assert kept == page, "a docstring or signature has changed; run scripts/document_o_voxel"
    for name in named_in_the_table():
        assert f"### o_voxel.{name}\n" in page


@pytest.mark.parametrize("name", re.findall(r"`(\w+\.py)`", README[: README.index("Every op")]))
def test_the_files_it_lists_are_there(name: str) -> None:
    assert (Path(__file__).parents[2] / "o-voxel" / "o_voxel" / name).exists()
