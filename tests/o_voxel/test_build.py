"""The wheel of o_voxel, compiling the sources that it carries, and what is made of the sources by pip."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ROOT / "o-voxel"
WHEELS = PROJECT / "wheel"
SOURCES = {
    "o_voxel/csrc/attributes.cpp",
    "o_voxel/csrc/dual_grid.cpp",
    "o_voxel/csrc/o_voxel.h",
    "o_voxel/csrc/slabs.h",
}
# A cube in a grid of 8^3, with its material; says whether the compiled part did it.
CUBE = """
import torch, trimesh
from o_voxel._native import library
from o_voxel.convert import mesh_to_flexible_dual_grid, textured_mesh_to_volumetric_attr
box = trimesh.creation.box((0.6, 0.6, 0.6))
grid = {"grid_size": 8, "aabb": [[-0.5] * 3, [0.5] * 3]}
coords, _, _ = mesh_to_flexible_dual_grid(torch.tensor(box.vertices), torch.tensor(box.faces), **grid)
also, values = textured_mesh_to_volumetric_attr(box, **grid)
print(library() is not None, len(coords), torch.equal(coords, also), values["alpha"].unique().tolist())
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed, as ``cog build`` does it, nothing compiled."""
    folder = tmp_path_factory.mktemp("site")
    (wheel,) = WHEELS.glob("o_voxel-*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--target", str(folder), str(wheel)], check=True)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of o-voxel, so that building leaves nothing in the repository."""
    folder = tmp_path_factory.mktemp("source") / "o-voxel"
    unwanted = shutil.ignore_patterns("build", "dist", "wheel", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(PROJECT, folder, ignore=unwanted)
    return folder


def python(site: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a fresh process that finds o_voxel in ``site``."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=site,
        env={**os.environ, "PYTHONPATH": str(site), **environment},
        capture_output=True,
        text=True,
    )


def make_wheel(project: Path, folder: Path, **environment: str) -> Path:
    """What pip makes of the sources."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = python(folder, *pip[1:], "--wheel-dir", str(folder), str(project), **environment)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpacked(wheel: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(wheel.parent / "site")
    return wheel.parent / "site"


def needs_compiler() -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")


def test_the_wheels_are_up_to_date(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "build_wheel", tmp_path], check=True, capture_output=True)
    fresh, kept = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (tmp_path, WHEELS))
    assert fresh.keys() == kept.keys()
    for name in fresh:
        assert kept[name] == fresh[name], f"what {name} is made of has changed; run scripts/build_wheel"


def test_the_wheel_installs_python_and_sources(installed: Path) -> None:
    files = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    assert {"o_voxel/build.py", "o_voxel/py.typed", *SOURCES} <= files
    (metadata,) = importlib.metadata.distributions(name="o-voxel", path=[str(installed)])
    assert metadata.version == "0.1.0"
    assert any(line.startswith("warp-lang") for line in metadata.requires or [])


def test_it_runs_before_and_after_compiling(installed: Path, tmp_path: Path) -> None:
    needs_compiler()
    site = tmp_path / "site"
    shutil.copytree(installed, site)
    before = python(site, "-c", CUBE)
    done = python(site, "-m", "o_voxel.build")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{site / 'o_voxel' / 'libo_voxel.so'}\n"
    after = python(site, "-c", CUBE)
    assert before.stdout.startswith("False "), before.stderr
    assert after.stdout.startswith("True "), after.stderr
    assert before.stdout.split()[1:] == after.stdout.split()[1:]
    assert after.stdout.endswith(" True [255]\n")


def test_a_library_that_does_not_fit_says_what_to_do(installed: Path, tmp_path: Path) -> None:
    needs_compiler()
    shutil.copytree(installed / "o_voxel", tmp_path / "o_voxel")
    library = tmp_path / "o_voxel" / "libo_voxel.so"
    library.write_bytes(b"nothing that can be loaded")
    done = python(tmp_path, "-c", CUBE)
    assert f"RuntimeError: {library} cannot be loaded" in done.stderr
    assert "make it again: python -m o_voxel.build" in done.stderr
    source = 'extern "C" long long o_voxel_interface() { return 0; }'
    command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
    subprocess.run(command, input=source, text=True, check=True)
    done = python(tmp_path, "-c", CUBE)
    assert "was compiled from the sources of another o_voxel; run: python -m o_voxel.build" in done.stderr


def test_a_build_that_cannot_work_says_why(installed: Path, tmp_path: Path) -> None:
    build = ["-m", "o_voxel.build", "--into", str(tmp_path / "out")]
    done = python(installed, *build, PATH=str(tmp_path), CXX="")
    assert done.returncode == 1
    assert done.stderr == "No C++ compiler found (c++, g++, clang++); install one, or name it in CXX.\n"
    done = python(installed, *build, CXX=str(tmp_path / "c++"))
    assert done.returncode == 1
    assert done.stderr.startswith("The compiler cannot be started: ")
    done = python(installed, *build, CXX=f"{sys.executable} --no-such-option")
    assert done.returncode == 1
    assert "The compiler failed: " in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_system_without_the_static_runtime_compiles_too(installed: Path, tmp_path: Path) -> None:
    needs_compiler()
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-static-*) exit 1;; esac\nexec g++ -O0 "$@" -O0\n')
    compiler.chmod(0o755)
    done = python(installed, "-m", "o_voxel.build", "--into", str(tmp_path), CXX=str(compiler))
    assert done.stdout == f"{tmp_path / 'libo_voxel.so'}\n", done.stderr


def test_pip_compiles_where_it_can(project: Path, tmp_path: Path) -> None:
    needs_compiler()
    wheel = make_wheel(project, tmp_path)
    # One for all releases of Python.
    assert wheel.name.startswith("o_voxel-0.1.0-py3-none-")
    assert not wheel.name.endswith("-any.whl")
    done = python(unpacked(wheel), "-c", CUBE)
    assert done.stdout.startswith("True "), done.stderr


def test_pip_goes_without_a_compiler(project: Path, tmp_path: Path) -> None:
    wheel = make_wheel(project, tmp_path, CXX="/no/such/compiler")
    assert wheel.name == "o_voxel-0.1.0-py3-none-any.whl"
    done = python(unpacked(wheel), "-c", CUBE)
    assert done.stdout.startswith("False "), done.stderr


def test_the_source_distribution_is_whole(project: Path, tmp_path: Path) -> None:
    script = f"from setuptools.build_meta import build_sdist; print(build_sdist({str(tmp_path)!r}))"
    done = python(project, "-c", script)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / done.stdout.split()[-1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "o_voxel/attributes_warp.py", *SOURCES} <= names
