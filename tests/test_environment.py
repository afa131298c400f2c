"""Image-based light: energy, mirrors, orientation, filters against brute force, the named environments."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trellis2 import environment as light
from trellis2.environment import Environment, environment, lat_long_radiance, prefilter
from trellis2.errors import InputError
from trellis2.options import ENVIRONMENTS


def directions(count: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)), dim=-1)


def uniform(value: float) -> Environment:
    return prefilter(lambda d: torch.full_like(d, value))


@pytest.fixture(scope="module")
def white() -> Environment:
    return uniform(1.0)


def shade(
    lights: Environment, normals: Tensor, view: Tensor, color: float, metallic: float, roughness: float
) -> Tensor:
    column = torch.ones(len(normals), 1)
    return lights.shade(normals, view, column.expand(-1, 3) * color, column * metallic, column * roughness)


def test_white_furnace(white: Environment) -> None:
    """In uniform light the diffuse part is the same for all normals: the gain that the original has, no more."""
    normals = directions(5000)
    lit = shade(white, normals, normals, 1.0, 0.0, 1.0) - shade(white, normals, normals, 0.0, 0.0, 1.0)
    torch.testing.assert_close(lit, torch.full_like(lit, 1.08), rtol=2e-3, atol=0)


def test_metal_in_the_furnace_reflects_everything_but_masking(white: Environment) -> None:
    normals = directions(2000)
    for roughness in (0.0, 0.2, 0.5):
        lit = shade(white, normals, normals, 1.0, 1.0, roughness)
        assert (lit <= 1.001).all()
        assert (lit >= 0.85).all()
    assert shade(white, normals, normals, 1.0, 1.0, 0.0).mean() > 0.998


def test_light_is_linear(white: Environment) -> None:
    normals, view = directions(500), directions(500, 1)
    view = torch.where((normals * view).sum(-1, keepdim=True) < 0, -view, view)
    torch.testing.assert_close(
        shade(uniform(3.0), normals, view, 0.5, 0.3, 0.4), 3 * shade(white, normals, view, 0.5, 0.3, 0.4)
    )


def test_a_mirror_shows_the_environment() -> None:
    """A smooth metal returns what lies in the mirrored direction, also across the cubemap's seams."""

    def radiance(d: Tensor) -> Tensor:
        return 1 + 0.5 * d + 0.2 * d.roll(1, -1) ** 2

    lights = prefilter(radiance)
    normals = directions(4000)
    view = F.normalize(normals + 0.4 * directions(4000, 1), dim=-1)
    mirrored = 2 * (normals * view).sum(-1, keepdim=True) * normals - view
    torch.testing.assert_close(shade(lights, normals, view, 1.0, 1.0, 0.0), radiance(mirrored), rtol=0.01, atol=0)


@pytest.mark.parametrize("roughness", [0.29, 0.395, 0.5, 1.0])
def test_specular_filter_matches_a_dense_sum(roughness: float) -> None:
    generator = torch.Generator().manual_seed(2)
    texels = torch.rand(6, 16, 16, 3, generator=generator)
    filtered = light._filter_ggx(texels, 16, roughness).reshape(-1, 3)
    centres = light._texel_directions(16, torch.device("cpu")).reshape(-1, 3).double()
    cosine = (centres @ centres.T).clamp(-1, 1)
    # The same integral from its definition: GGX of the half vector, solid angle, cosine, and the cut of the lobe.
    half = ((1 + cosine) / 2).sqrt()
    density = 1 / ((half**2 * (roughness**4 - 1) + 1) ** 2)
    edge = centres.abs().amax(-1) ** 3  # solid angle of a texel, up to a factor
    weights = torch.where(cosine >= light._lobe_cosine(roughness), cosine * density * edge, 0.0)
    expected = weights @ texels.reshape(-1, 3).double() / weights.sum(1, keepdim=True)
    assert (filtered - expected).abs().max() < 5e-6


def test_lat_long_orientation() -> None:
    """+z is the top row, -y the middle column, +x a quarter to the right of it."""
    image = torch.zeros(64, 128, 3)
    image[:8, :, 0] = 1
    image[28:36, 60:68, 1] = 1
    image[28:36, 92:100, 2] = 1
    seen = lat_long_radiance(image)(
        torch.tensor([[0.0, 0.0, 1.0], [0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
    )
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-5)


def test_reflectance_table() -> None:
    """Limits known in closed form: a smooth surface reflects with Schlick's Fresnel term."""
    size = 64
    table = light._reflectance_table(size)
    cosine = (torch.arange(size) + 0.5) / size
    fresnel = (1 - cosine) ** 5
    torch.testing.assert_close(table[0, 0], 1 - fresnel, rtol=0, atol=1e-3)
    torch.testing.assert_close(table[1, 0], fresnel, rtol=0, atol=1e-3)
    assert (table.sum(0) <= 1.0 + 1e-4).all()


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_named_environments_are_usable_light(name: str) -> None:
    """A matt grey ball is neither dark nor burnt out, and close to neutral."""
    lights = environment(name)
    normals = directions(4000)
    lit = shade(lights, normals, normals, 0.5, 0.0, 0.8)
    assert torch.isfinite(lit).all()
    assert 0.25 < lit.mean() < 0.8
    assert lit.amin() > 0.03
    tint = lit.mean(0)
    assert tint.max() / tint.min() < (1.6 if name == "sunset" else 1.1)
    assert environment(name) is lights


def test_environments_differ() -> None:
    normals = directions(200)
    balls = torch.stack([shade(environment(name), normals, normals, 0.5, 0.0, 0.5) for name in ENVIRONMENTS])
    distances = torch.cdist(balls.flatten(1), balls.flatten(1)) / math.sqrt(600)
    assert (distances + torch.eye(len(ENVIRONMENTS))).min() > 0.04


def test_prefilter_is_deterministic() -> None:
    first, second = (prefilter(light._RADIANCE["studio"]) for _ in range(2))
    assert torch.equal(first._specular.texels, second._specular.texels)
    assert torch.equal(first._diffuse.texels, second._diffuse.texels)


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(InputError, match="studio"):
        environment("moon")
