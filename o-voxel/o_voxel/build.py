"""Compile csrc into the installed package: ``python -m o_voxel.build [--cuda] [--verbose]``.

The C++ bodies are always built; the CUDA bodies where torch is a CUDA build and its toolkit is found (``nvcc`` on the
PATH, or CUDA_HOME), for the architectures in TORCH_CUDA_ARCH_LIST, or for the GPUs of this machine.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
SOURCES = PACKAGE / "csrc"
LOG_LINES = 60


class BuildError(Exception):
    """The native part cannot be built; the text says why and what to do."""


def build(destination: Path = PACKAGE, *, cuda: bool = False, verbose: bool = False) -> Path:
    """Compile csrc and put ``_C.<tag>.so`` into ``destination``; returns its path.

    cuda: fail where the CUDA part cannot be built, instead of leaving it out. verbose: show the compiler's output,
    which otherwise is shown only when it fails.  Raises BuildError.
    """
    try:
        from setuptools import Distribution  # type: ignore[import-untyped, unused-ignore]
        from torch.utils import cpp_extension
    except ImportError as error:
        raise BuildError(f"{error.name} is needed to compile: pip install torch setuptools ninja") from error

    missing = cuda_missing()
    if cuda and missing:
        raise BuildError(missing)
    with tempfile.TemporaryDirectory(prefix="o-voxel-") as work:
        csrc = Path(shutil.copytree(SOURCES, Path(work) / "csrc"))
        for path in csrc.rglob("*.cu"):  # lookup.cpp and lookup.cu would both become lookup.o
            path.rename(path.with_stem(f"{path.stem}_cuda"))
        flags = ["/O2"] if sys.platform == "win32" else ["-O3", "-g0", "-ffp-contract=off"]
        kind = cpp_extension.CppExtension if missing else cpp_extension.CUDAExtension
        extension = kind(
            name="_C",
            sources=sorted(str(path) for path in csrc.rglob("*.cpp" if missing else "*.c[pu]*")),
            include_dirs=[str(csrc)],
            define_macros=[] if missing else [("O_VOXEL_WITH_CUDA", None)],
            extra_compile_args={"cxx": flags, "nvcc": ["-O3"]},
        )
        command = cpp_extension.BuildExtension(
            Distribution({"name": "o_voxel", "ext_modules": [extension]}),
            use_ninja=cpp_extension.is_ninja_available(),
        )
        command.build_lib = str(Path(work) / "lib")
        command.build_temp = str(Path(work) / "objects")
        log = Path(work) / "log.txt"
        try:
            with _output_to(None if verbose else log):
                command.ensure_finalized()
                command.run()
        except Exception as error:  # compilers fail in many ways, and all of them end the build
            tail = "" if verbose else "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
            raise BuildError(f"{tail}\nThe compiler failed: {error}") from error
        (built,) = Path(command.build_lib).glob("_C*")
        target = destination / built.name
        # A new file, so that a process that has the old one open keeps it.
        copy = target.with_name(f".{target.name}.{os.getpid()}")
        copy.write_bytes(built.read_bytes())
        copy.chmod(0o755)
        copy.replace(target)
    return target


def cuda_missing() -> str:
    """Why the CUDA part cannot be built here; empty where it can."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch."
    if CUDA_HOME is None:
        return f"No CUDA toolkit found; install {torch.version.cuda}, or set CUDA_HOME to its folder."
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        return "No GPU is visible; set TORCH_CUDA_ARCH_LIST to the architectures to build for, such as 8.0;9.0."
    return ""


@contextmanager
def _output_to(log: Path | None) -> Iterator[None]:
    """Send what this process and its children print to a file; None leaves it where it goes."""
    if log is None:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for saved, stream in zip(kept, (1, 2), strict=True):
                os.dup2(saved, stream)
                os.close(saved)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m o_voxel.build", description="Compile the native part of o_voxel.")
    parser.add_argument("--cuda", action="store_true", help="fail where the CUDA part cannot be built")
    parser.add_argument("--verbose", action="store_true", help="show the compiler's output")
    parser.add_argument("--into", type=Path, default=PACKAGE, metavar="FOLDER", help="default: the installed package")
    chosen = parser.parse_args(arguments)
    try:
        target = build(chosen.into, cuda=chosen.cuda, verbose=chosen.verbose)
        left_out = cuda_missing()
    except BuildError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{target}\n")
    if left_out:
        sys.stdout.write(f"without the CUDA part: {left_out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
