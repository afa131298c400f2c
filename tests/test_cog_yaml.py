"""cog.yaml against Cog's own schema, and against the rules that the schema does not know."""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = json.loads((ROOT / "tests/third_party/cog/config_schema_v1.0.json").read_text())

# Names that Cog keeps for itself; a trailing * stands for any ending.
REFUSED_VARIABLES = [
    *("PATH", "LD_LIBRARY_PATH", "LIBRARY_PATH", "PYTHONPATH", "PYTHONUNBUFFERED", "VIRTUAL_ENV"),
    *("HF_ENDPOINT", "HF_HUB_ENABLE_HF_TRANSFER", "CUDA_*", "NVIDIA_*", "NV_*", "KUBERNETES_*", "PGET_*"),
    *("R8_*", "REPLICATE_*", "COG_OBSERVABILITY_*", "COG_TRACE_*", "OTEL_*"),
]
ARCHIVES = (".whl", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def problems(root: Path, name: str = "cog.yaml") -> list[str]:
    """What Cog would refuse, or would build into a broken image without a word."""
    config = yaml.safe_load((root / name).read_text())
    found = [error.message for error in jsonschema.Draft7Validator(SCHEMA).iter_errors(config)]
    found += environment_problems(config.get("environment") or [])
    found += predictor_problems(root, config)
    found += run_problems(config["build"].get("run") or [])
    requirements = config["build"].get("python_requirements")
    if requirements is None or not (root / requirements).is_file():
        return [*found, f"requirements file {requirements} does not exist"]
    return found + requirements_problems(root, root / requirements)


def environment_problems(lines: list[str]) -> list[str]:
    found = []
    names = [line.partition("=")[0] for line in lines]
    for line, name in zip(lines, names, strict=True):
        refused = (p for p in REFUSED_VARIABLES if name == p or (p[-1] == "*" and name.startswith(p[:-1])))
        if next(refused, None):
            found.append(f"variable {name} is reserved")
        if names.count(name) > 1:
            found.append(f"variable {name} is set twice")
        if re.search(r"[\s\"'$#\\]", line):
            found.append(f"variable {name} would be split or expanded in the Dockerfile")
    return found


def predictor_problems(root: Path, config: dict[str, Any]) -> list[str]:
    file, separator, name = config.get("predict", "").partition(".py:")
    if not separator or not name:
        return ["predict is not file.py:Class"]
    if not (root / f"{file}.py").is_file():
        return [f"{file}.py does not exist"]
    tree = ast.parse((root / f"{file}.py").read_text())
    if name not in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}:
        return [f"{file}.py has no class {name}"]
    return []


def run_problems(steps: list[Any]) -> list[str]:
    found = []
    commands = [(step if isinstance(step, str) else step["command"]).strip() for step in steps]
    for command in commands:
        if "\n" in command:
            found.append("a run step has a newline")
        if re.search(r"/src\b|(^|\s)(\.{0,2}/)?(o-voxel|trellis2|weights|scripts)(/|\s|$)", command):
            found.append("a run step wants the repository, which is not there yet")
        if " pip install " in command and not re.search(r"==\d|\.git@[0-9a-f]{40}$", command):
            found.append(f"not pinned: {command}")
    installs = [command for command in commands if " pip install " in command]
    if not installs or "pillow-simd" not in installs[-1]:
        found.append("pillow-simd is not installed last")
    return found


def requirements_problems(root: Path, file: Path) -> list[str]:
    lines = [line.partition("#")[0].strip() for line in file.read_text().splitlines()]
    lines = [line for line in lines if line]
    found = [] if "--only-binary :all:" in lines else ["requirements may compile: no --only-binary :all:"]
    for line in lines:
        if line.startswith("-"):
            if line != "--only-binary :all:":
                found.append(f"option {line} in the requirements")
        elif line.endswith(ARCHIVES) and "://" not in line:
            if not line.endswith(".whl"):
                found.append(f"{line} would be compiled")
            if not (file.parent / line).resolve().is_relative_to(root.resolve()):
                found.append(f"{line} is outside the repository")
            elif not (file.parent / line).is_file():
                found.append(f"{line} does not exist")
        elif line.startswith((".", "/", "file:")) or "@" in line or "://" in line:
            found.append(f"{line} is a folder or an address")
        elif not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line):
            found.append(f"{line} is not pinned")
        elif line.partition("==")[0] in ("cog", "coglet"):
            found.append(f"{line}: Cog installs itself")
    return found


def pins(root: Path) -> dict[str, str]:
    """Name -> version of everything pinned in the requirements and in the run steps."""
    config = yaml.safe_load((root / "cog.yaml").read_text())
    text = (root / config["build"]["python_requirements"]).read_text() + "\n".join(config["build"]["run"])
    return dict(re.findall(r"^(?:.* )?([A-Za-z0-9_-]+)==([0-9][A-Za-z0-9.]*)\s*$", text, flags=re.MULTILINE))


def dependencies(file: Path) -> list[Requirement]:
    return [Requirement(text) for text in tomllib.loads(file.read_text())["project"]["dependencies"]]


@pytest.mark.parametrize("name", ["cog.yaml", "cog-commercial.yaml"])
def test_no_problems(name: str) -> None:
    assert problems(ROOT, name) == []


def test_the_commercial_image_lacks_what_nothing_imports_and_nothing_else() -> None:
    whole, commercial = (yaml.safe_load((ROOT / name).read_text()) for name in ("cog.yaml", "cog-commercial.yaml"))
    steps = whole["build"].pop("run")
    kept = commercial["build"].pop("run")
    assert whole == commercial
    assert steps[-len(kept) :] == kept
    left_out = steps[: -len(kept)]
    names = ["flash-attn", "nvdiffrast", "nvdiffrec", "CuMesh", "FlexGEMM", "utils3d"]
    assert [name for step, name in zip(left_out, names, strict=True) if name in step] == names
    imported = {"flash_attn", "nvdiffrast", "nvdiffrec_render", "cumesh", "flex_gemm", "utils3d"}
    for path in (*ROOT.glob("*.py"), *(ROOT / "trellis2").rglob("*.py"), *(ROOT / "o-voxel").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert imported.isdisjoint(module.partition(".")[0] for module in modules), path


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        ("cog.yaml", "gpu: true", 'gpu: "yes"', "'yes' is not of type 'boolean'"),
        ("cog.yaml", "gpu: true", "gpus: true", "'gpus' was unexpected"),
        ("cog.yaml", '  python_version: "3.10"\n', "", "'python_version' is a required property"),
        ("cog.yaml", "predict: predict.py", "run: predict.py:Predictor\npredict: predict.py", "should not be valid"),
        ("cog.yaml", "predict.py:Predictor", "predict:Predictor", "predict is not file.py:Class"),
        ("cog.yaml", "predict.py:Predictor", "predictor.py:Predictor", "predictor.py does not exist"),
        ("cog.yaml", "predict.py:Predictor", "predict.py:Model", "predict.py has no class Model"),
        ("cog.yaml", "- MAX_JOBS=8", "- CUDA_HOME=/usr/local/cuda", "variable CUDA_HOME is reserved"),
        ("cog.yaml", "- MAX_JOBS=8", "- HF_ENDPOINT=x", "variable HF_ENDPOINT is reserved"),
        ("cog.yaml", "- MAX_JOBS=8", "- MAX_JOBS", "'MAX_JOBS' does not match"),
        ("cog.yaml", "- MAX_JOBS=8", "- MAX_JOBS=8 9", "variable MAX_JOBS would be split"),
        ("cog.yaml", "- MAX_JOBS=8", "- MAX_JOBS=8\n  - MAX_JOBS=9", "variable MAX_JOBS is set twice"),
        ("cog.yaml", "- >-\n      python -c", "- |-\n      python -c", "a run step has a newline"),
        ("cog.yaml", "python -m o_voxel.build", "python -m pip install ./o-voxel", "wants the repository"),
        ("cog.yaml", "python -m trellis2.prebuild", "python -m trellis2 generate", "wants the repository"),
        ("cog.yaml", "flash-attn==2.7.3", "flash-attn", "not pinned"),
        ("cog.yaml", "@9a4eb15e4021b67b12c460c7057d642626897ec8", "@main", "not pinned"),
        ("cog.yaml", "  python_requirements: requirements-cog.txt\n", "", "requirements file None does not exist"),
        ("cog.yaml", "requirements-cog.txt", "requirements.txt", "requirements.txt does not exist"),
        ("requirements-cog.txt", "--only-binary :all:", "", "requirements may compile"),
        ("requirements-cog.txt", "--only-binary :all:", "--no-binary :all:", "option --no-binary :all:"),
        ("requirements-cog.txt", "./o-voxel/wheel/", "./o-voxel/wheels/", "does not exist"),
        ("requirements-cog.txt", "./o-voxel/wheel/", "../", "is outside the repository"),
        ("requirements-cog.txt", "./o-voxel/wheel/o_voxel", "./o-voxel #", "./o-voxel is a folder"),
        ("requirements-cog.txt", "scipy==1.15.3", "-e .", "option -e ."),
        ("requirements-cog.txt", "scipy==1.15.3", "scipy>=1.15", "scipy>=1.15 is not pinned"),
        ("requirements-cog.txt", "scipy==1.15.3", "x @ git+https://h/x", "is a folder or an address"),
        ("requirements-cog.txt", "scipy==1.15.3", "cog==0.23.1", "Cog installs itself"),
    ],
)
def test_each_problem_is_found(tmp_path: Path, file: str, old: str, new: str, problem: str) -> None:
    for name in ("cog.yaml", "predict.py", "requirements-cog.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "o-voxel" / "wheel", tmp_path / "o-voxel" / "wheel")
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1))
    found = problems(tmp_path)
    assert any(problem in text for text in found), found


def test_pillow_simd_is_the_last_thing_installed(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "cog.yaml").read_text())
    steps = config["build"]["run"]
    assert run_problems(steps) == []
    assert "pillow-simd is not installed last" in run_problems([*steps, "python -m pip install x==1"])


def test_the_documented_versions() -> None:
    config = yaml.safe_load((ROOT / "cog.yaml").read_text())
    assert config["build"]["gpu"] is True
    assert config["build"]["cuda"] == "12.4"
    assert config["predict"] == "predict.py:Predictor"
    pinned = pins(ROOT)
    assert (pinned["torch"], pinned["torchvision"], pinned["flash-attn"]) == ("2.6.0", "0.21.0", "2.7.3")
    assert {"transformers", "pillow-simd", "imageio", "opencv-python"} <= set(pinned)
    steps = "\n".join(config["build"]["run"])
    for extension in ("nvdiffrast", "nvdiffrec", "CuMesh", "FlexGEMM", "utils3d", "o_voxel.build"):
        assert extension in steps
    assert "TORCH_CUDA_ARCH_LIST=8.0;8.6;8.9;9.0" in config["environment"]


def test_kernels_are_compiled_into_folders_that_stay_in_the_image() -> None:
    config = yaml.safe_load((ROOT / "cog.yaml").read_text())
    variables = dict(line.split("=", 1) for line in config["environment"])
    step = next(step for step in config["build"]["run"] if "trellis2.prebuild" in step)
    (shared,) = re.findall(r"chmod -R a\+rwX (\S+)", step)
    assert {str(Path(variables[name]).parent) for name in ("WARP_CACHE_PATH", "TRITON_CACHE_DIR")} == {shared}
    # Any other variable of Triton is part of what its cache is asked by, so it has to be there at both times.
    assert not [name for name in variables if name.startswith("TRITON_") and name != "TRITON_CACHE_DIR"]


def test_the_pins_satisfy_both_packages() -> None:
    pinned = pins(ROOT)
    instead = {"opencv-python-headless": "opencv-python", "pillow": "pillow-simd"}
    wanted = dependencies(ROOT / "pyproject.toml") + dependencies(ROOT / "o-voxel" / "pyproject.toml")
    for requirement in wanted:
        if requirement.name != "o-voxel":
            version = pinned[instead.get(requirement.name, requirement.name)]
            assert requirement.specifier.contains(version, prereleases=True), (str(requirement), version)


def test_the_server_of_the_tests_is_the_one_in_the_container() -> None:
    config = yaml.safe_load((ROOT / "cog.yaml").read_text())
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"cog=={config['build']['sdk_version']}" in extras["cog"]
