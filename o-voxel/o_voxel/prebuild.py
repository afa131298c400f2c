"""Compile the kernels for GPUs ahead of time, on a machine that has none: ``python -m o_voxel.prebuild 8.0 9.0``.

For images: what was compiled lies in the caches of Warp and Triton (``WARP_CACHE_PATH``, ``TRITON_CACHE_DIR``), where
processes on a GPU of these compute capabilities find it.  The default is what ``TORCH_CUDA_ARCH_LIST`` names.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.cpp_extension import CUDA_HOME

from .conv import TILE, ConvPlan
from .launch import wp


def capability(text: str) -> int:
    """``8.6``, ``8.6+PTX``, ``9.0a`` or ``86`` as 86.  Raises ValueError."""
    found = re.fullmatch(r"(\d+)\.?(\d)a?(\+PTX)?", text.strip())
    if not found:
        raise ValueError(f"{text!r} is not a compute capability such as 8.6.")
    return int(found[1] + found[2])


def warp_kernels(modules: Iterable[str], capabilities: Sequence[int]) -> list[Path]:
    """Compile the Warp kernels of these Python modules, for the processor too where they are for any.  Returns the
    files."""
    files: list[Path] = []
    for name in modules:
        module = importlib.import_module(name)
        files += wp.compile_aot_module(module, arch=capabilities, use_ptx=False)
        if wp.get_module(name).options["cpu_compiler_flags"] == "":
            files += wp.compile_aot_module(module, device="cpu")
    return files


def triton_kernels(launches: Callable[[], Any], capabilities: Sequence[int]) -> int:
    """Compile what ``launches()`` would launch if its tensors, which lie on the CPU, lay on a GPU.

    Nothing is launched, and from then on this process can launch nothing else.  Returns the number of kernels.
    Raises RuntimeError where there is no Triton.
    """
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
        from triton.runtime.jit import JITFunction
    except ImportError as error:
        raise RuntimeError("Triton is needed, which comes with torch for CUDA on Linux.") from error

    # What calls the kernels is C that Triton links with the driver, or with what stands for it in CUDA's toolkit.
    stub = Path(CUDA_HOME or "", "lib64", "stubs")
    if (stub / "libcuda.so").exists():
        os.environ.setdefault("TRITON_LIBCUDA_PATH", str(stub))

    original = JITFunction.run
    compiled = set()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = original(self, *args, grid=grid, warmup=True, **options)
        compiled.add(kernel.hash)
        with suppress(ImportError):  # it is compiled and kept; only to load it takes a driver
            CudaLauncher(kernel.src, kernel.metadata)

    class Driver:
        """Stands for a GPU that is not there."""

        def __init__(self, number: int) -> None:
            self.number = number

        def get_current_device(self) -> int:
            return self.number

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", self.number, 32)

    try:
        CudaUtils()
    except ImportError:  # likewise
        pass
    except AssertionError as error:
        raise RuntimeError(
            "Found neither CUDA's toolkit nor libcuda.so.1; install the toolkit, or set CUDA_HOME."
        ) from error
    with (
        patch.object(JITFunction, "run", compile_only),
        patch.object(torch.cuda, "device", lambda _: nullcontext()),
    ):
        for number in capabilities:
            triton.runtime.driver.set_active(Driver(number))
            launches()
    return len(compiled)


def convolutions() -> None:
    """Launch the convolution in every form that the published decoders use (float16, multiples of 64 channels)."""
    from .conv_triton import convolve

    # Triton compiles another form where a number or an address is not a multiple of 16.
    for count, last in ((TILE, TILE), (TILE + 1, TILE + 1), (TILE + 1, TILE)):
        plan = ConvPlan(*(torch.zeros(shape, dtype=torch.int32) for shape in ((27, count), count, (2, 27), 2)))
        for outputs in (64, 128):
            feats = torch.zeros(count, 64, dtype=torch.float16)
            weight = torch.zeros(outputs, 3, 3, 3, 64, dtype=torch.float16)
            convolve(feats, plan, weight, torch.zeros(outputs, dtype=torch.float16), 0, last)


def run(
    arguments: Sequence[str] | None, modules: Sequence[str] = (), launches: Sequence[Callable[[], Any]] = ()
) -> int:
    """The command line, for the kernels of this package, ``modules`` and ``launches``.  Returns the exit code."""
    parser = argparse.ArgumentParser(description="Compile GPU kernels ahead of time; no GPU is needed.")
    parser.add_argument("capability", nargs="*", help="such as 8.0 9.0; default: those of TORCH_CUDA_ARCH_LIST")
    texts = parser.parse_args(arguments).capability or re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    try:
        capabilities = sorted({capability(text) for text in texts})
    except ValueError as error:
        parser.error(str(error))
    try:
        files = warp_kernels([*own_modules(), *modules], capabilities)
        kernels = [triton_kernels(launch, capabilities) for launch in (convolutions, *launches)]
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(
        f"{len(files)} modules of Warp in {wp.config.kernel_cache_dir}, {sum(kernels)} kernels of Triton\n"
    )
    return 0


def own_modules() -> list[str]:
    """Names of the modules beside this one that hold Warp kernels."""
    folder = Path(__file__).parent
    return [f"{__package__}.{path.stem}" for path in sorted(folder.glob("*.py")) if "\n@kernel\n" in path.read_text()]


if __name__ == "__main__":
    sys.exit(run(None))
