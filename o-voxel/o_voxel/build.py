"""Compile csrc into the installed package: ``python -m o_voxel.build [--into FOLDER]``.

That takes a C++17 compiler and nothing else: the one that CXX names, or else c++, g++ or clang++.  ``pip install`` of
the sources does it too where a compiler is there.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
SOURCES = PACKAGE / "csrc"
LIBRARY = "libo_voxel.dylib" if sys.platform == "darwin" else "libo_voxel.so"
# A product and a sum are rounded one by one, as in torch.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden")
# The C++ runtime goes in where it can (some systems have it in a package of its own), so that an older one serves.
RUNTIME = () if sys.platform == "darwin" else ("-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL")
LOG_LINES = 60


class BuildError(Exception):
    """The native part cannot be built; the text says why and what to do."""


def build(destination: Path = PACKAGE) -> Path:
    """Compile csrc and put the library into ``destination``; returns its path.  Raises BuildError."""
    if sys.platform == "win32":
        raise BuildError("The compiled part is for Linux and macOS; on Windows Warp and torch do its work.")
    named = shlex.split(os.environ.get("CXX", ""))
    compiler = named or [found for found in map(shutil.which, ("c++", "g++", "clang++")) if found][:1]
    if not compiler:
        raise BuildError("No C++ compiler found (c++, g++, clang++); install one, or name it in CXX.")
    with tempfile.TemporaryDirectory(prefix="o-voxel-") as work:
        made = Path(work) / LIBRARY
        sources = sorted(str(path) for path in SOURCES.glob("*.cpp"))
        for runtime in (RUNTIME, ()):
            command = [*compiler, *FLAGS, *runtime, *sources, "-o", str(made)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            except OSError as error:
                raise BuildError(f"The compiler cannot be started: {error}") from error
            if done.returncode == 0:
                break
        else:
            tail = "\n".join(done.stderr.splitlines()[-LOG_LINES:])
            raise BuildError(f"{tail}\nThe compiler failed: {shlex.join(command)}")
        destination.mkdir(parents=True, exist_ok=True)
        target = destination / LIBRARY
        # A new file, so that a process that has the old one open keeps it.
        copy = target.with_name(f".{target.name}.{os.getpid()}")
        copy.write_bytes(made.read_bytes())
        copy.chmod(0o755)
        copy.replace(target)
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m o_voxel.build", description="Compile the native part of o_voxel.")
    parser.add_argument("--into", type=Path, default=PACKAGE, metavar="FOLDER", help="default: the installed package")
    chosen = parser.parse_args(arguments)
    try:
        target = build(chosen.into)
    except BuildError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{target}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
