"""The wheel of o_voxel, and compiling the sources that it carries."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from o_voxel.lookup import voxel_rows

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / "o-voxel" / "wheel"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed, as ``cog build`` does it, nothing compiled."""
    folder = tmp_path_factory.mktemp("site")
    (wheel,) = WHEELS.glob("o_voxel-*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--target", str(folder), str(wheel)], check=True)
    return folder


@pytest.fixture(scope="module")
def built(installed: Path) -> Path:
    """The same with its C++ compiled, CUDA left out."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    done = python(installed, "-m", "o_voxel.build", CUDA_HOME="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(installed / "o_voxel" / "_C."))
    return installed


@pytest.fixture(scope="module")
def native(built: Path) -> ModuleType:
    (library,) = (built / "o_voxel").glob("_C.*")
    spec = importlib.util.spec_from_file_location("_C", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(site: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a fresh process that finds o_voxel in ``site``."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=site,
        env={**os.environ, "PYTHONPATH": str(site), **environment},
        capture_output=True,
        text=True,
    )


def test_the_wheels_are_up_to_date(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "build_wheel", tmp_path], check=True, capture_output=True)
    fresh, kept = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (tmp_path, WHEELS))
    assert fresh.keys() == kept.keys()
    for name in fresh:
        assert kept[name] == fresh[name], f"what {name} is made of has changed; run scripts/build_wheel"


def test_the_wheel_installs_python_and_sources(installed: Path) -> None:
    files = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    assert {
        "o_voxel/build.py",
        "o_voxel/py.typed",
        "o_voxel/csrc/bindings.cpp",
        "o_voxel/csrc/lookup/lookup.cu",
    } <= files
    (metadata,) = importlib.metadata.distributions(name="o-voxel", path=[str(installed)])
    assert metadata.version == "0.1.0"
    assert any(line.startswith("warp-lang") for line in metadata.requires or [])


def test_nothing_compiled_is_explained_at_the_moment_of_use(installed: Path, tmp_path: Path) -> None:
    shutil.copytree(installed, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("_C.*"))
    done = python(tmp_path, "-c", "from o_voxel import _native; _native.ops()")
    assert "RuntimeError: o_voxel has not been compiled here; run: python -m o_voxel.build" in done.stderr
    (tmp_path / "o_voxel" / "_C.abi3.so").write_bytes(b"of another torch")
    done = python(tmp_path, "-c", "from o_voxel import _native; _native.ops()")
    assert "RuntimeError: o_voxel was compiled for another torch" in done.stderr


def test_a_build_that_cannot_work_says_why(installed: Path, tmp_path: Path) -> None:
    done = python(installed, "-m", "o_voxel.build", "--into", str(tmp_path), PATH=str(tmp_path), CUDA_HOME="")
    assert done.returncode == 1
    assert "The compiler failed:" in done.stderr
    assert "g++" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch")
def test_cuda_is_refused_without_a_cuda_torch(installed: Path, tmp_path: Path) -> None:
    done = python(installed, "-m", "o_voxel.build", "--cuda", "--into", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch.\n"


@pytest.mark.slow
def test_without_the_cuda_part(built: Path, native: ModuleType) -> None:
    assert native.has_cuda is False
    done = python(built, "-c", "from o_voxel import _native; _native.ops(); _native.cuda_ops()")
    assert "RuntimeError: o_voxel was compiled without its CUDA part;" in done.stderr
    assert "python -m o_voxel.build --cuda" in done.stderr


@pytest.mark.slow
def test_rows_by_hand(native: ModuleType) -> None:
    coords = torch.tensor([[0, 1, 2, 3], [1, 1, 2, 3], [0, 3, 2, 1], [0, 0, 0, 0]], dtype=torch.int32)
    queries = torch.tensor(
        [[0, 0, 0, 0], [1, 1, 2, 3], [0, 1, 2, 4], [0, 1, 2, 3], [-1, 1, 2, 3], [0, 3, 2, 1]], dtype=torch.int32
    )
    rows = native.voxel_rows(native.voxel_table(coords), coords, queries)
    assert rows.dtype == torch.int64
    assert rows.tolist() == [3, 1, -1, 0, -1, 2]


@pytest.mark.slow
def test_rows_equal_the_reference(native: ModuleType) -> None:
    generator = torch.Generator().manual_seed(1)
    extent = torch.tensor([3, 2048, 2048, 2048])
    coords = (torch.rand(50_000, 4, generator=generator) * extent).int().unique(dim=0)
    coords = coords[torch.randperm(len(coords), generator=generator)]
    near = coords[: len(coords) // 2] + torch.tensor([0, 0, 0, 1], dtype=torch.int32)
    far = torch.randint(-(2**31), 2**31 - 1, (20_000, 4), generator=generator).int()
    queries = torch.cat([coords, near, far])
    rows = native.voxel_rows(native.voxel_table(coords), coords, queries)
    assert torch.equal(rows, voxel_rows(coords, queries))
    assert torch.equal(rows[: len(coords)], torch.arange(len(coords)))


@pytest.mark.slow
def test_no_coordinate_is_taken_for_another(native: ModuleType) -> None:
    """Where packed keys of b * 2048^3 + ... would coincide or overflow."""
    big = 2**31 - 1
    coords = torch.tensor(
        [[0, 0, 1, 0], [0, 0, 0, 2048], [0, 1, 0, 0], [0, 0, 2048, 0], [1, 0, 0, 0], [0, 2048, 0, 0], [big] * 4],
        dtype=torch.int32,
    )
    table = native.voxel_table(coords)
    assert native.voxel_rows(table, coords, coords).tolist() == list(range(7))
    absent = [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 2048, 2048], [1, 0, 0, 1], [big, big, big, big - 1], [-1] * 4]
    assert native.voxel_rows(table, coords, torch.tensor(absent, dtype=torch.int32)).tolist() == [-1] * 6


@pytest.mark.slow
def test_empty_unaligned_and_strided(native: ModuleType) -> None:
    coords = torch.arange(400, dtype=torch.int32).view(100, 4)
    shifted = torch.cat([torch.zeros(1, dtype=torch.int32), coords.flatten()])[1:].view(100, 4)
    wide = torch.cat([coords, coords], dim=1)[:, :4]
    table = native.voxel_table(coords)
    for same in (shifted, wide):
        assert torch.equal(native.voxel_table(same), table)
        assert torch.equal(native.voxel_rows(table, same, same), torch.arange(100))
    nothing = coords[:0]
    assert native.voxel_rows(table, coords, nothing).shape == (0,)
    assert native.voxel_rows(native.voxel_table(nothing), nothing, coords[:3]).tolist() == [-1] * 3


@pytest.mark.slow
def test_wrong_arguments_are_named(native: ModuleType) -> None:
    coords = torch.arange(400, dtype=torch.int32).view(100, 4)
    table = native.voxel_table(coords)
    with pytest.raises(RuntimeError, match="coords must be Int, not Long"):
        native.voxel_table(coords.long())
    with pytest.raises(RuntimeError, match=r"coords must have shape \(N, 4\), not \[100, 3\]"):
        native.voxel_table(coords[:, :3])
    with pytest.raises(RuntimeError, match=r"queries must have shape \(N, 4\)"):
        native.voxel_rows(table, coords, coords[0])
    with pytest.raises(RuntimeError, match="table is not the table of coords"):
        native.voxel_rows(table[:16], coords, coords)
    with pytest.raises(RuntimeError, match="voxel_table has no compiled body for meta"):
        native.voxel_table(coords.to("meta"))
