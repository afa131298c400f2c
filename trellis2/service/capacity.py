"""Whether the machine has the memory that a preset needs, told before a job is accepted."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trellis2.options import PIPELINE_TYPES

_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # glibc's alone

GB = 10**9
GIB = 2**30

# In GB, as memory of GPUs is sold: what an 8 GB card has is less than 8 GiB.
GPU_NEEDS = {"512": 4 * GB, "1024": 4 * GB, "1024_cascade": 8 * GB, "1536_cascade": 16 * GB}
"""GPU memory that each preset needs, in bytes: the requirements in the documentation of the presets."""
HOST_NEEDS = {"512": 1 * GB, "1024": 2 * GB, "1024_cascade": 2 * GB, "1536_cascade": 4 * GB}
"""Without a GPU: memory beside the loaded networks, in bytes. The embedded model takes 1.2 GB at 1024_cascade."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a job can have; ``gpu``: of a GPU's memory."""

    available: int
    gpu: bool

    def refusal(self, pipeline_type: str) -> str | None:
        """Why a preset cannot run; None where it can."""
        needs, kind = (GPU_NEEDS, "GPU memory") if self.gpu else (HOST_NEEDS, "memory")
        return refusal(pipeline_type, self.available, needs, kind)


def free_memory(resting: int) -> Memory | None:
    """What this machine has for a job; None where it does not tell. resting: see ``host_memory``."""
    limit = os.environ.get("TRELLIS2_GPU_MEMORY")  # the pipeline has checked it
    available = gpu_memory(float(limit) if limit else None)
    if available is not None:
        return Memory(available, gpu=True)
    available = host_memory(resting)
    return None if available is None else Memory(available, gpu=False)


def refusal(pipeline_type: str, available: int, needs: Mapping[str, int], kind: str) -> str | None:
    """Why a preset cannot run in ``available`` bytes, and the largest smaller one that can; None where it can.

    kind: of memory, in words.
    """
    if available >= needs[pipeline_type]:
        return None
    smaller = PIPELINE_TYPES[: PIPELINE_TYPES.index(pipeline_type)]
    fitting = [name for name in smaller if available >= needs[name]]
    remedy = f"choose pipeline_type={fitting[-1]!r}" if fitting else "no preset fits, use another machine"
    need, there = needs[pipeline_type] / GB, available / GB
    return f"pipeline_type={pipeline_type!r} needs {need:.1f} GB of {kind}, and there are {there:.1f}; {remedy}."


def gpu_memory(limit: float | None) -> int | None:
    """Bytes of the GPU that this process has or can have; None where there is none.

    limit: GiB to stay within. Asks only a torch that has been imported and has begun to use the GPU.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    free, _ = torch.cuda.mem_get_info()
    # What this process holds serves the next job as well: networks at rest leave when another job's need the room.
    available = int(free) + int(torch.cuda.memory_reserved())
    return available if limit is None else min(available, int(limit * GIB))


def host_memory(resting: int, root: Path = Path("/")) -> int | None:
    """Bytes that a job can have beside what the process has at rest; None where the system does not tell.

    resting: bytes of the process with its networks loaded. What it holds now beyond these will be free again.
    """
    try:
        table = _table(root / "proc/meminfo")
        free = table["MemAvailable"] * 1024
        used = resident_memory(root) - resting
    except (OSError, KeyError, ValueError):
        return None
    return max(0, min(free, _container_memory(root)) + max(0, used))


def resident_memory(root: Path = Path("/")) -> int:
    """Bytes of RAM that this process holds, 0 where the system does not tell."""
    try:
        return _table(root / "proc/self/status")["VmRSS"] * 1024
    except (OSError, KeyError, ValueError):
        return 0


def trim_memory() -> None:
    """Give the system back what the C library holds free: it keeps the parts of large pictures for the next ones."""
    if _malloc_trim is not None:
        _malloc_trim(0)


def _container_memory(root: Path) -> int:
    """Bytes that the container (both generations of control groups) lets its processes have yet."""
    groups = root / "sys/fs/cgroup"
    left = [sys.maxsize]
    for limit, statistics, key in (
        (groups / "memory.max", groups / "memory.stat", "anon"),
        (groups / "memory/memory.limit_in_bytes", groups / "memory/memory.stat", "total_rss"),
    ):
        try:
            left.append(int(limit.read_text()) - _table(statistics)[key])
        except (OSError, KeyError, ValueError):
            continue  # not there, or without a limit
    return min(left)


def _table(path: Path) -> dict[str, int]:
    """Lines such as "VmRSS: 12 kB" or "anon 12"; others are left out."""
    rows = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdecimal()}
