"""Kernels compiled ahead of time: all of them, as the container does it, and found again where they are launched."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from o_voxel import prebuild

ROOT = Path(__file__).resolve().parent.parent
TRITON = importlib.util.find_spec("triton") is not None
LINKED = TRITON and (ctypes.util.find_library("cuda") or os.environ.get("TRITON_LIBCUDA_PATH"))


def python(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a fresh process that imports from ``folder`` first."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
    )


def caches(folder: Path) -> dict[str, str]:
    return {"WARP_CACHE_PATH": str(folder / "warp"), "TRITON_CACHE_DIR": str(folder / "triton")}


def files_in(folder: Path) -> dict[str, int]:
    """Every file and when it was written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheels of cog.yaml alone, installed; the rest of the repository is not there yet."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--target", folder, *(ROOT / "o-voxel" / "wheel").glob("*.whl")], check=True)
    return folder


@pytest.fixture(scope="module")
def prebuilt(site: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The caches after the container's run step, for two generations of GPUs, and how the step ended."""
    folder = tmp_path_factory.mktemp("caches")
    return folder, python(site, "-m", "trellis2.prebuild", TORCH_CUDA_ARCH_LIST="8.0;9.0", **caches(folder))


def modules_with(decorator: str) -> set[str]:
    """Modules with kernels."""
    sources = {
        f"{package.name}.{'.'.join(path.relative_to(package).with_suffix('').parts)}": path.read_text()
        for package in (ROOT / "trellis2", ROOT / "o-voxel" / "o_voxel")
        for path in package.rglob("*.py")
    }
    return {name for name, source in sources.items() if re.search(rf"^@{decorator}\b", source, re.MULTILINE)}


def test_no_module_is_forgotten() -> None:
    assert modules_with("jit") == {"o_voxel.conv_triton", "trellis2.fused"}
    assert modules_with("kernel") == {*prebuild.own_modules(), "trellis2.environment", "trellis2.occlusion"}


def test_every_warp_module_is_compiled_for_every_gpu(prebuilt: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = prebuilt
    binaries = sorted(path.name for path in (folder / "warp").rglob("*.cubin"))
    wanted = sorted(modules_with("kernel"))
    for name in ("sm80", "sm90"):
        assert [re.sub(r"^wp_(.*)_[0-9a-f]{7}\..*", r"\1", file) for file in binaries if f".{name}." in file] == wanted
    assert all(path.read_bytes()[:4] == b"\x7fELF" for path in (folder / "warp").rglob("*.cubin"))
    # And what a GPU's host runs itself, whatever processor it has: the name would say if it were for this one alone.
    objects = sorted(path.name for path in (folder / "warp").rglob("*.o"))
    assert [re.sub(r"_[0-9a-f]{7}\.cpu[^.]*\.o$", "", file) for file in objects] == [
        "wp_o_voxel.pack",
        "wp_o_voxel.unwrap",
    ]
    if not LINKED:
        assert done.returncode == 1
        assert re.fullmatch(
            r"(Triton is needed|Found neither CUDA's toolkit nor).*\.\n", done.stderr.splitlines(True)[-1]
        )


def test_the_repository_asks_for_what_the_wheels_compiled(
    site: Path, prebuilt: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    before = files_in(prebuilt[0])
    again = "import sys; from o_voxel import prebuild as p; p.warp_kernels(sys.argv[1:], [80, 90])"
    done = python(ROOT, "-c", again, *sorted(modules_with("kernel")), **caches(prebuilt[0]))
    assert done.returncode == 0, done.stderr
    assert files_in(prebuilt[0]) == before


@pytest.mark.skipif(not LINKED, reason="no Triton, or no libcuda to link with")
def test_the_kernels_of_triton(site: Path, prebuilt: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = prebuilt
    assert done.returncode == 0, done.stderr
    kernels = list((folder / "triton").rglob("*.cubin"))
    assert {path.stem for path in kernels} == {"_add_and_norm", "_convolve", "_layer_norm", "_rms_rotate"}
    assert done.stdout.endswith(f" {len(kernels)} kernels of Triton\n")
    before = files_in(folder)
    assert python(site, "-m", "trellis2.prebuild", "8.0", "9.0", **caches(folder)).returncode == 0
    assert files_in(folder) == before


@pytest.mark.gpu
def test_a_gpu_finds_everything(site: Path, tmp_path: Path) -> None:
    """What is launched on this GPU after its kernels were compiled without it adds no file to the caches."""
    import torch

    number = "{}.{}".format(*torch.cuda.get_device_capability())
    hidden = python(site, "-m", "trellis2.prebuild", number, CUDA_VISIBLE_DEVICES="", **caches(tmp_path))
    assert hidden.returncode == 0, hidden.stderr
    before = files_in(tmp_path)
    launch = """
import torch
from o_voxel import launch, prebuild
from trellis2.prebuild import norms
torch.set_default_device("cuda")
with torch.no_grad():
    prebuild.convolutions()
    norms()
for name in [*prebuild.own_modules(), "trellis2.environment", "trellis2.occlusion"]:
    __import__(name)
    launch.wp.get_module(name).load("cuda")
torch.cuda.synchronize()
"""
    done = python(ROOT, "-c", launch, **caches(tmp_path))
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "number"), [("8.0", 80), ("8.6+PTX", 86), ("9.0a", 90), ("89", 89), ("10.0", 100), (" 9.0 ", 90)]
)
def test_capabilities(text: str, number: int) -> None:
    assert prebuild.capability(text) == number


@pytest.mark.parametrize("text", ["", "Hopper", "8", "8.0.0"])
def test_what_is_no_capability_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        prebuild.run([text])
    assert end.value.code == 2
    assert f"{text!r} is not a compute capability such as 8.6." in capsys.readouterr().err


def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    without = {name: value for name, value in os.environ.items() if name not in ("WARP_CACHE_PATH", "XDG_CACHE_HOME")}
    code = "from o_voxel.launch import wp; import os; assert os.path.isdir(wp.config.kernel_cache_dir)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**without, "HOME": "/dev/null/nobody", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"/dev/null/nobody/\S+ cannot be written, .*; set WARP_CACHE_PATH to a folder\.\n", done.stderr)
    assert list(tmp_path.iterdir()) == []
