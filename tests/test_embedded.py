"""The embedded checkpoint: small, described, the same asset for the same call; tests/training judges what it makes."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from trellis2.options import GenerateOptions
from trellis2.pipeline import EMBEDDED_MODEL, Pipeline

PICTURES = EMBEDDED_MODEL.parents[1] / "assets" / "example_image"


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.from_pretrained(EMBEDDED_MODEL, device="cpu")


def test_small_and_says_what_it_is() -> None:
    assert sum(path.stat().st_size for path in EMBEDDED_MODEL.rglob("*") if path.is_file()) < 24e6
    assert "untrained" not in json.loads((EMBEDDED_MODEL / "pipeline.json").read_text())
    card = (EMBEDDED_MODEL / "README.md").read_text()
    assert "## Measured" in card
    assert "## Limits" in card


@pytest.mark.slow
def test_same_call_same_asset_and_another_picture_another(pipeline: Pipeline) -> None:
    options = GenerateOptions(pipeline_type="512", seed=3)
    with Image.open(PICTURES / "lamp.png") as lamp, Image.open(PICTURES / "stool.png") as stool:
        first, again, other = (pipeline.generate(image, options).asset for image in (lamp, lamp, stool))
    assert torch.equal(first.mesh.vertices, again.mesh.vertices)
    assert torch.equal(first.mesh.faces, again.mesh.faces)
    assert torch.equal(first.material.attrs, again.material.attrs)
    assert first.mesh.faces.shape != other.mesh.faces.shape
    for asset in (first, other):
        used = asset.mesh.vertices[asset.mesh.faces.unique().long()]
        assert used.abs().max() <= 0.5
        assert (used.amax(dim=0) - used.amin(dim=0)).max() > 0.5
