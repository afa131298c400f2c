"""Rules of the house that no other test sees."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
TREE_LIMIT = 50_000_000

# Spelt in pieces, so that this file does not contain them.
HOSTS = [
    "py" + "pi.org",
    "python" + "hosted.org",
    "npm" + "js.org",
    "npm" + "js.com",
    "debian" + ".org",
    "download." + "pytorch",
    "/work" + "/",
    "/opt" + "/pypi",
    "/opt" + "/wheels",
]

GPU_MODULES = {"flash_attn", "flex_gemm", "cumesh", "nvdiffrast", "utils3d"}
O_VOXEL_MAY_IMPORT = {"torch", "numpy", "warp", "fast_simplification", "zstandard", "o_voxel"}


def tracked() -> list[Path]:
    command = ["git", "ls-files", "-z"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in result.stdout.split("\0") if name and (ROOT / name).exists()]


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Absolute names of the modules that a file imports; of its own package with the leading dots resolved."""
    tree = ast.parse(path.read_text())
    package = path.relative_to(ROOT).parent.parts
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*base, *(node.module or "").split("."))).strip(".")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_no_file_names_a_registry_or_a_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in tracked()
        for word in HOSTS
        if word.encode() in path.read_bytes()
    ]
    assert found == []


def test_the_tree_stays_small() -> None:
    sizes = {path: path.stat().st_size for path in tracked()}
    largest = sorted(sizes, key=lambda path: -sizes[path])[:5]
    assert sum(sizes.values()) < TREE_LIMIT, largest


def test_the_two_commands_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    first = re.search(r"```bash\n(.*?)```", readme, re.DOTALL)
    assert first is not None
    commands = [line.split()[0] for line in first[1].splitlines()]
    assert commands == ["scripts/demo", "scripts/test"]
    for command in [*commands, ".ci/run"]:
        assert (ROOT / command).stat().st_mode & 0o111, f"{command} is not executable"
        subprocess.run(["bash", "-n", command], cwd=ROOT, check=True)
    for name in re.findall(r"`((?:assets|weights|tests|trellis2|o-voxel)/[\w./-]+)`", readme):
        assert (ROOT / name).exists(), name


def test_o_voxel_stands_alone() -> None:
    for path in (ROOT / "o-voxel" / "o_voxel").rglob("*.py"):
        outside = {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names
        outside -= {"o-voxel"}  # its own folder, from relative imports
        outside -= {"setuptools"} if path.name == "build.py" else set()  # the compiler's driver
        outside -= {"triton"} if path.name in ("conv_triton.py", "prebuild.py") else set()  # comes with torch for CUDA
        outside -= {"trimesh", "PIL"} if path.name == "attributes.py" else set()  # readers of meshes and pictures
        outside -= {"trimesh", "PIL", "tqdm"} if path.name == "postprocess.py" else set()  # what to_glb returns, shows
        assert outside <= O_VOXEL_MAY_IMPORT | GPU_MODULES, path


@pytest.mark.parametrize("path", sorted((ROOT / "trellis2" / "models").glob("*.py")), ids=lambda p: p.stem)
def test_models_know_neither_each_other_nor_meshes(path: Path) -> None:
    others = {p.stem for p in path.parent.glob("*.py")} - {path.stem, "__init__"}
    forbidden = {f"trellis2.models.{name}" for name in others}
    forbidden |= {f"trellis2.{name}" for name in ("mesh", "bake", "export", "render", "pipeline")}
    assert not forbidden & set(imports(path))


def test_no_module_of_trellis2_imports_itself_in_a_circle() -> None:
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "trellis2").rglob("*.py")
    }
    edges = {name: {n for n in imports(path) if n in paths} - {name} for name, path in paths.items()}
    while free := [name for name, needs in edges.items() if not needs]:
        edges = {name: needs - set(free) for name, needs in edges.items() if name not in free}
    assert edges == {}


def test_gpu_libraries_are_imported_late_and_in_one_place() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        ruff = tomllib.load(file)["tool"]["ruff"]["lint"]
    assert set(ruff["flake8-tidy-imports"]["banned-api"]) == GPU_MODULES
    places: dict[str, list[Path]] = {}
    for path in [*(ROOT / "trellis2").rglob("*.py"), *(ROOT / "o-voxel" / "o_voxel").rglob("*.py")]:
        used = GPU_MODULES & {name.split(".")[0] for name in imports(path)}
        assert not used & {name.split(".")[0] for name in imports(path, top_level=True)}, path
        for name in used:
            places.setdefault(name, []).append(path)
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


@pytest.mark.parametrize("package", ["trellis2", "o_voxel"])
def test_public_names_are_sorted_and_there(package: str) -> None:
    module = importlib.import_module(package)
    names = getattr(module, "__all__", [])
    assert list(names) == sorted(names)
    for name in names:
        getattr(module, name)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
def test_constraints_pin_what_the_projects_need(python: str) -> None:
    pins: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        pin = Requirement(line)
        (specifier,) = pin.specifier
        assert specifier.operator == "==", line
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            assert pin.name not in pins, line
            pins[pin.name] = specifier.version
    for project in ("pyproject.toml", "o-voxel/pyproject.toml"):
        with (ROOT / project).open("rb") as file:
            data = tomllib.load(file)["project"]
        wanted = [*data["dependencies"], *chain.from_iterable(data.get("optional-dependencies", {}).values())]
        for need in map(Requirement, wanted):
            name = need.name.lower().replace("_", "-")
            if name != "o-voxel":
                assert need.specifier.contains(pins[name]), f"{need} against {pins[name]}"


def test_the_lock_file_names_no_addresses() -> None:
    packages = json.loads((ROOT / "tests" / "package-lock.json").read_text())["packages"]
    assert packages
    for name, package in packages.items():
        assert "resolved" not in package, name
        assert not name or package["integrity"].startswith("sha512-")
