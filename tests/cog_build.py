"""Do what ``cog build`` does, as far as a machine without Docker and without a GPU can, in a clean environment.

    python tests/cog_build.py [-f cog-commercial.yaml] --python python3.10 --into /tmp/image [--cuda] [--tests]
        [--without flash-attn] [--set MAX_JOBS=2]

In the order of the Dockerfile that Cog 0.23.1 writes: system packages (looked for, not installed), requirements under
Cog's compiler flags, Cog itself, the run steps with the variables of the file, the copied repository.  Then one
prediction by Cog's own server, with the embedded model, and with ``--tests`` the whole test suite.

What differs from a container: a virtual environment instead of the image, /var/cache/kernels lies beside it, and torch
comes from PyPI.  Steps that compile CUDA run with ``--cuda`` only, which wants nvcc of the version in the file.  Steps
whose git host cannot be reached are not run.  Each step says whether it ran, and the exit code is 0 if none failed.  It
takes 10 GB of disk and 15 minutes or more.
"""

from __future__ import annotations

import argparse
import base64
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from cog_server import QUICK_INPUTS, ROOT, cog_server

COG_FLAGS = "-O3 -funroll-loops -fno-strict-aliasing -flto -S"
CACHE = "/var/cache/kernels"


def show(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class Image:
    """The environment that is built, and a line for each step."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder, self.config = folder, config
        self.root = folder / "root"  # where the run steps start: nothing is there
        self.variables = {**os.environ, "PATH": f"{folder / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        for line in config["environment"]:
            name, _, value = line.partition("=")
            self.variables[name] = self.here(value)
        self.failed = False

    def here(self, text: str) -> str:
        return text.replace(CACHE, str(self.folder / "kernels"))

    def step(self, command: str, *, title: str = "", variables: Mapping[str, str] | None = None) -> None:
        began = time.monotonic()
        show(f"\n>>> {command}")
        done = subprocess.run(["sh", "-c", command], cwd=self.root, env={**self.variables, **(variables or {})})
        self.failed = self.failed or done.returncode != 0
        state = "ran" if done.returncode == 0 else f"FAILED with {done.returncode}"
        self.say(f"{state} in {time.monotonic() - began:.0f} s", title or command)

    def say(self, state: str, title: str) -> None:
        line = f"{state}: {title}"
        show(f"=== {line}")
        with (self.folder / "steps.txt").open("a") as file:
            file.write(line + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-f", "--file", default="cog.yaml")
    parser.add_argument("--python", default="python3.10", help="of the file's python_version")
    parser.add_argument("--into", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--cuda", action="store_true", help="compile the CUDA extensions too")
    parser.add_argument("--tests", action="store_true", help="run the test suite at the end")
    parser.add_argument("--without", action="append", default=[], metavar="WORD", help="leave out steps with this word")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="instead of the file's value")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    config = yaml.safe_load((ROOT / arguments.file).read_text())
    folder: Path = arguments.into.resolve()
    version = config["build"]["python_version"]
    found = subprocess.run([arguments.python, "--version"], capture_output=True, text=True).stdout.split()
    if not found or not found[1].startswith(f"{version}."):
        sys.exit(f"--python {arguments.python} is not Python {version}")
    folder.mkdir(parents=True)
    config["environment"] = [*config.get("environment", []), *arguments.set]
    image = Image(folder, config)
    image.root.mkdir()

    for package in config["build"].get("system_packages", []):
        there = subprocess.run(["dpkg", "-s", package], capture_output=True).returncode == 0
        image.say("there" if there else "MISSING", f"system package {package}")
        image.failed = image.failed or not there
    image.step(f"{arguments.python} -m venv {folder / 'venv'}")
    image.step(
        f"python -m pip install --no-cache-dir -r {staged_requirements(folder, config)}",
        title=f"pip install -r {config['build']['python_requirements']}, under Cog's flags",
        variables={"CFLAGS": COG_FLAGS},
    )
    cog = f"cog=={config['build']['sdk_version']}"
    image.step(f"python -m pip install --no-cache-dir {cog}", variables={"CFLAGS": COG_FLAGS})
    if arguments.tests:
        image.step(f"python -m pip install --no-cache-dir -r {test_requirements(folder)}", title="what the tests need")
    for command in config["build"]["run"]:
        if any(word in command for word in arguments.without):
            image.say("not run, left out by --without", command.strip())
        else:
            run_step(image, image.here(command.strip()), cuda=arguments.cuda)
    if image.failed:
        return 1
    predict(image)
    if arguments.tests:
        run_tests(image)
    show("\n" + (folder / "steps.txt").read_text())
    return int(image.failed)


def staged_requirements(folder: Path, config: dict[str, Any]) -> Path:
    """The requirements with the wheels of the repository copied to another place, as Cog does it."""
    lines = []
    for line in (ROOT / config["build"]["python_requirements"]).read_text().splitlines():
        if line.endswith(".whl"):
            (folder / "artifacts").mkdir(exist_ok=True)
            line = shutil.copy(ROOT / line, folder / "artifacts")
        lines.append(line)
    file = folder / "requirements.txt"
    file.write_text("\n".join(lines))
    return file


def run_step(image: Image, command: str, *, cuda: bool) -> None:
    address = re.search(r"git\+(https://\S+?)@", command)
    variables: dict[str, str] = {}
    if "--no-build-isolation" in command and not cuda:
        image.say("not run, needs nvcc", command)
        return
    if address and subprocess.run(["git", "ls-remote", address[1], "HEAD"], capture_output=True).returncode:
        image.say("not run, its repository cannot be reached", command)
        return
    if "trellis2.prebuild" in command and not cuda:
        variables = {"TRITON_LIBCUDA_PATH": str(stub_of_the_driver(image.folder))}
    image.step(command, variables=variables)


def stub_of_the_driver(folder: Path) -> Path:
    """An empty libcuda.so, for Triton to link with; the toolkit of the image has one."""
    stubs = folder / "stubs"
    stubs.mkdir()
    command = ["cc", "-shared", "-x", "c", os.devnull, "-Wl,-soname,libcuda.so.1", "-o", stubs / "libcuda.so"]
    subprocess.run(command, check=True)
    return stubs


def predict(image: Image) -> None:
    """One prediction by Cog's own server, in a copy of what ``COPY . /src`` would copy."""
    source = image.folder / "src"
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
        if not any(ignores(pattern, name) for pattern in ignored):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    picture = base64.b64encode((ROOT / "assets" / "example_image" / "T.png").read_bytes()).decode()
    inputs = QUICK_INPUTS | {
        "image": f"data:image/png;base64,{picture}",
        "generate_video": True,
        "generate_model": True,
    }
    began = time.monotonic()
    variables = {
        **image.variables,
        "TRELLIS2_MODEL": str(source / "weights" / "embedded"),
        "TRELLIS2_VIDEO_FRAMES": "8",
        "TRELLIS2_VIDEO_RESOLUTION": "256",
    }
    with cog_server(source, variables, python=image.folder / "venv" / "bin" / "python") as server:
        ready = server.wait_while("STARTING", seconds=600)
        status, answer = server.predict(**inputs) if ready["status"] == "READY" else (0, ready)
    good = status == 200 and answer["status"] == "succeeded" and answer["output"]["model_file"] is not None
    image.failed = image.failed or not good
    image.say(f"ran in {time.monotonic() - began:.0f} s" if good else f"FAILED {answer}", "predict.py in Cog's server")


def ignores(pattern: str, name: str) -> bool:
    """Whether this line of .dockerignore leaves out the file ``name``, by itself or through a folder above."""
    parents = [name, *map(str, Path(name).parents)]
    patterns = [pattern, pattern.removeprefix("**/")] if pattern.startswith("**/") else [pattern]
    return any(fnmatch.fnmatchcase(parent, each) for parent in parents for each in patterns)


def test_requirements(folder: Path) -> Path:
    """What pyproject.toml's extra ``test`` names, with the versions of the image for what both have.

    It goes in before the run steps, as it brings pillow.
    """
    extra = re.search(r"^test = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert extra
    file = folder / "tests.txt"
    file.write_text((folder / "requirements.txt").read_text() + "\n" + "\n".join(re.findall(r'"(.*)"', extra[1])))
    return file


def run_tests(image: Image) -> None:
    image.step(f"python -m pip install --no-deps --no-build-isolation -e {ROOT}", title="trellis2 for the tests")
    image.step(
        f"cd {ROOT} && python -m pytest --numprocesses 2 --dist worksteal -q -p no:cacheprovider",
        title="the test suite",
        variables={"OMP_NUM_THREADS": "1"},
    )


if __name__ == "__main__":
    sys.exit(main())
