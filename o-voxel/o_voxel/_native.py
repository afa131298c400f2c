"""The compiled part of o_voxel, ``o_voxel._C``, or an explanation of what is missing.

Nothing is imported before an op asks, so that everything else works where nothing has been compiled.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.util import find_spec
from types import ModuleType

BUILD_COMMAND = "python -m o_voxel.build"


@cache
def ops() -> ModuleType:
    """The compiled ops.  Raises RuntimeError naming the command that makes them."""
    import torch  # noqa: F401  (its libraries have to be loaded first)

    try:
        return importlib.import_module("o_voxel._C")
    except ImportError as error:
        if find_spec("o_voxel._C") is None:
            raise RuntimeError(f"o_voxel has not been compiled here; run: {BUILD_COMMAND}") from None
        raise RuntimeError(
            f"o_voxel was compiled for another torch or Python than the installed one ({error}); "
            f"run again: {BUILD_COMMAND}"
        ) from error


@cache
def cuda_ops() -> ModuleType:
    """The compiled ops with their CUDA bodies.  Raises RuntimeError naming the command that makes them."""
    module = ops()
    if not module.has_cuda:
        raise RuntimeError(
            "o_voxel was compiled without its CUDA part; where a CUDA toolkit is installed, "
            f"run: {BUILD_COMMAND} --cuda"
        )
    return module
