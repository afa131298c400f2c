"""Eight test objects through the whole pipeline: what it makes has to look like what went in.

That the measure notices a pipeline that is subtly wrong is proved with a perfect model, which knows the objects, and
again with the embedded one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from PIL import Image

import trellis2.pipeline
from training.data import objects_to_test, truth
from training.evaluate import failures, quick
from training.metrics import Metrics
from training.objects import make
from trellis2.mesh import Asset, Mesh
from trellis2.options import GenerateOptions
from trellis2.pipeline import EMBEDDED_MODEL, Pipeline

FEW = range(2)  # objects for the proofs
EASY = (3, 5)  # a bench and a lamp, which the embedded model can do
REACHED = {"f5": 0.89, "silhouette": 0.71, "color": 18.8}
"""The embedded model made 0.932, 0.750 and 20.0 of the eight objects when it was put here; ``QUICK_TARGETS`` is what it
should make."""


@dataclass
class Answer:
    asset: Asset


class PerfectModel:
    """Stands in for the pipeline: answers the test objects in their order, at half the truth's resolution."""

    def __init__(self, damage: Callable[[Asset], Asset] = lambda asset: asset) -> None:
        self.damage = damage
        self.entries = iter(objects_to_test("seen"))

    def generate(self, image: Image.Image, options: GenerateOptions) -> Answer:
        assert image.mode == "RGBA"
        assert options.pipeline_type == "512"
        entry = next(self.entries)
        return Answer(self.damage(truth(make(entry["family"], entry["seed"]), 64, "cpu")))


def swapped_axes(asset: Asset) -> Asset:
    """y and z, as a file for another convention has them."""
    order = [0, 2, 1]
    material = replace(asset.material, coords=asset.material.coords[:, order].contiguous())
    return Asset(Mesh(asset.mesh.vertices[:, order].contiguous(), asset.mesh.faces), material)


def wrong_scale(asset: Asset) -> Asset:
    """As latents that are not denormalised would make it: too small, in the right place."""
    voxels = asset.material
    small = replace(voxels, voxel_size=0.8 * voxels.voxel_size, origin=(-0.4, -0.4, -0.4))
    return Asset(Mesh(asset.mesh.vertices * 0.8, asset.mesh.faces), small)


def wrong_range(asset: Asset) -> Asset:
    """Colours left in [-1, 1]."""
    return Asset(asset.mesh, replace(asset.material, attrs=asset.material.attrs * 2 - 1))


def shuffled_channels(asset: Asset) -> Asset:
    return Asset(asset.mesh, replace(asset.material, attrs=asset.material.attrs[:, [2, 0, 1, 3, 4, 5]].contiguous()))


def test_perfect_model_passes() -> None:
    metrics = quick(PerfectModel(), FEW)
    assert not failures(metrics)
    assert metrics.f1 > 0.95
    assert metrics.f5 > 0.97
    assert metrics.silhouette > 0.9


@pytest.mark.parametrize("damage", [swapped_axes, wrong_scale, wrong_range, shuffled_channels])
def test_damage_is_noticed(damage: Callable[[Asset], Asset]) -> None:
    assert failures(quick(PerfectModel(damage), FEW))


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.from_pretrained(EMBEDDED_MODEL, device="cpu")


@pytest.fixture(scope="module")
def sound(pipeline: Pipeline) -> Metrics:
    return quick(pipeline, EASY)


@pytest.mark.slow
def test_embedded_model_makes_what_it_sees(pipeline: Pipeline) -> None:
    assert not failures(quick(pipeline), REACHED)


def _swap_structure(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = pipeline.sample_structure
    monkeypatch.setattr(pipeline, "sample_structure", lambda *a, **k: sample(*a, **k).transpose(2, 4))


def _exchange_statistics(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean for deviation and the other way around.  (To forget both shows little: decoders begin with a layer norm.)"""
    monkeypatch.setattr(trellis2.pipeline, "_denormalise", lambda x, n: x * n.mean.to(x.device) + n.std.to(x.device))


def _shuffle_material(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = pipeline.decode_texture

    def shuffled(*args: Any) -> Any:
        material = decode(*args)
        return replace(material, attrs=material.attrs[:, [2, 0, 1, 3, 4, 5]])

    monkeypatch.setattr(pipeline, "decode_texture", shuffled)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [_swap_structure, _exchange_statistics, _shuffle_material])
def test_embedded_model_shows_damage(
    damage: Callable[[Pipeline, pytest.MonkeyPatch], None],
    sound: Metrics,
    pipeline: Pipeline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tenth below what the same objects give without it: more than another machine's rounding does."""
    damage(pipeline, monkeypatch)
    assert failures(quick(pipeline, EASY), {name: 0.9 * getattr(sound, name) for name in REACHED})
