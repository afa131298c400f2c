"""Running Warp kernels on torch tensors: one kernel source for CPU and CUDA.

A launch on the CPU runs in one thread but releases the interpreter lock, so the work is split over as many
Python threads as torch uses. Kernels therefore take the index of their first item, and write only to what
belongs to their own items.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

# Type checkers cannot follow Warp's kernel language: to them it is all Any.
if TYPE_CHECKING:
    _Function = TypeVar("_Function")

    def kernel(body: _Function) -> _Function: ...
    def func(body: _Function) -> _Function: ...

    wp: Any
    Ints = Any
    IntRows = Any
    Int64s = Any
    Floats = Any
    Vec2s = Any
    Vec3s = Any
    Triangles = Any
    Vec2d = Any
    Vec3 = Any
    Vec3i = Any
    Vec4l = Any
    Vec4ls = Any
    MeshId = Any
else:
    import warp as wp

    kernel = wp.kernel
    func = wp.func
    Vec2d = wp.vec2d
    Vec3 = wp.vec3
    Vec3i = wp.vec3i
    Vec4l = wp.types.vector(length=4, dtype=wp.int64)
    MeshId = wp.uint64
    Ints = wp.array(dtype=wp.int32)
    IntRows = wp.array2d(dtype=wp.int32)
    Int64s = wp.array(dtype=wp.int64)
    Floats = wp.array(dtype=wp.float32)
    Vec2s = wp.array(dtype=wp.vec2)
    Vec3s = wp.array(dtype=wp.vec3)
    Triangles = wp.array(dtype=wp.vec3i)
    Vec4ls = wp.array(dtype=Vec4l)

if hasattr(wp.config, "log_level"):
    wp.config.log_level = wp.LOG_WARNING
else:  # Warp before 1.19
    wp.config.quiet = True
wp.config.enable_backward = False
wp.config.cuda_output = "cubin"  # the GPU's own code: the driver need not compile it again when it is loaded


def _initialise() -> None:
    """Start Warp; on a machine without a GPU, without its native code's remark that there is no driver."""
    if torch.cuda.is_available():
        wp.init()
        return
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        wp.init()
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _initialise_with_cache() -> None:
    """Start Warp; where the user's cache folder cannot be made, with one that lasts as long as this process."""
    try:
        _initialise()
    except OSError:
        if "WARP_CACHE_PATH" in os.environ:
            raise
        logging.getLogger(__name__).warning(
            "%s cannot be written, so kernels are compiled anew each time; set WARP_CACHE_PATH to a folder.",
            wp.config.kernel_cache_dir,
        )
        wp.config.kernel_cache_dir = tempfile.mkdtemp(prefix="warp-")
        atexit.register(shutil.rmtree, wp.config.kernel_cache_dir, ignore_errors=True)
        _initialise()


_initialise_with_cache()

_SMALLEST_SHARE = 2048


def shared(tensor: Tensor, dtype: Any) -> Any:
    """The contiguous ``tensor`` as a Warp array of ``dtype`` over the same memory."""
    return wp.from_torch(tensor, dtype=dtype)


def launch(body: Any, count: int, arguments: list[Any], device: torch.device, *, together: int = 1) -> None:
    """Run kernel ``body(first, *arguments)`` for ``count`` items; an item's index is ``first + wp.tid()``.

    On a CPU, ``together`` items in a row (from a multiple of it) run one after the other in one thread.
    """
    if count == 0:
        return
    target = wp.device_from_torch(device)
    if device.type == "cuda":
        with wp.ScopedStream(wp.stream_from_torch(torch.cuda.current_stream(device))):
            wp.launch(body, dim=count, inputs=[0, *arguments], device=target)
        return

    # Only the launches run side by side: compiling is for one thread.
    body.module.load(target)

    def run(first: int, last: int) -> None:
        first, last = first * together, min(last * together, count)
        wp.launch(body, dim=last - first, inputs=[first, *arguments], device=target)

    split_over_threads(run, -(-count // together), smallest=-(-_SMALLEST_SHARE // together))


def split_over_threads(body: Callable[[int, int], Any], count: int, *, smallest: int = 1) -> None:
    """Call ``body(first, last)`` on parts of ``range(count)`` side by side, each of ``smallest`` or more."""
    threads = max(1, min(torch.get_num_threads(), count // smallest))
    if threads == 1:
        body(0, count)
        return
    bounds = [count * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(body, a, b) for a, b in itertools.pairwise(bounds)]:
            future.result()
