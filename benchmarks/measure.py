"""Clocks, memory gauges and facts about the machine.  Imports nothing of the product."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

GIB = 2**30
_SAMPLE_SECONDS = 0.005


def synchronise() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Stopwatch:
    """Seconds by name, the device's work included; repeated names in one round add up."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, float]] = []
        self._open: list[str] = []

    def new_round(self) -> None:
        self.rounds.append(defaultdict(float))

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        synchronise()
        start = time.perf_counter()
        yield
        synchronise()
        self.rounds[-1][name] += time.perf_counter() - start

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, timed; calls inside other wrapped ones count for those."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._open:
                return function(*args, **kwargs)
            self._open.append(name)
            try:
                with self(name):
                    return function(*args, **kwargs)
            finally:
                self._open.pop()

        return timed

    def summary(self) -> dict[str, dict[str, Any]]:
        """{name: {median, all}} in seconds, names in the order of the first round."""
        names = list(dict.fromkeys(name for one in self.rounds for name in one))
        return {name: summary([one[name] for one in self.rounds if name in one]) for name in names}


def summary(seconds: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(seconds), "all": [round(s, 6) for s in seconds]}


def device_used() -> tuple[int, str] | None:
    """Bytes in use on the first GPU as its driver counts them, and by which means; None without one."""
    with suppress(Exception):  # not installed, no driver, or no permission: then the next means
        import pynvml

        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetMemoryInfo(_nvml_handle()).used), "NVML"
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return total - free, "cudaMemGetInfo"
    return None


def device_baseline(cap_gib: float | None) -> int:
    """Bytes of the GPU that belong to others: to be asked before torch makes its own context there.

    cap_gib: what a ``balloon`` leaves, where there is one.
    """
    with suppress(ImportError):
        import pynvml  # noqa: F401

        used = device_used()
        if used is not None and used[1] == "NVML":
            return used[0]
    if cap_gib is not None and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1] - int(cap_gib * GIB)
    return 0


def _nvml_handle() -> Any:
    """NVML counts all GPUs of the machine, whatever CUDA_VISIBLE_DEVICES says; ask by the visible one's identity."""
    import pynvml

    if not _HANDLE:
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        if pynvml.nvmlDeviceGetCount() > 1:
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(0).uuid}".encode())
        _HANDLE.append(handle)
    return _HANDLE[0]


_HANDLE: list[Any] = []


class Gauge:
    """Peak of the GPU memory inside the block: torch's own, and the whole device above ``baseline`` bytes.

    A thread asks the driver every 5 ms; what comes and goes between two questions is not seen.
    """

    def __init__(self, baseline: int) -> None:
        self.baseline = baseline
        self.torch_peak = 0
        self.device_peak = 0
        self.means = "none"
        self._stop = threading.Event()

    def __enter__(self) -> Gauge:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if torch.cuda.is_available():
            self.torch_peak = torch.cuda.max_memory_allocated()

    def report(self) -> dict[str, Any]:
        return {
            "peak_torch_gib": self.torch_peak / GIB,
            "peak_device_gib": max(self.device_peak - self.baseline, 0) / GIB,
            "device_memory_by": f"{self.means}, device in use less {self.baseline / GIB:.2f} GiB at the start",
        }

    def _sample(self) -> None:
        while True:
            found = device_used()
            if found is None:
                return
            self.device_peak, self.means = max(self.device_peak, found[0]), found[1]
            if self._stop.wait(_SAMPLE_SECONDS):
                return


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a bfloat16 matrix product of 8192^3 on a GPU (float32, 1024^3 on a CPU), the best of several."""
    on_gpu = device.type == "cuda"
    side = 8192 if on_gpu else 1024
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    out = torch.empty_like(a)
    best = float("inf")
    for _ in range(10 if on_gpu else 3):
        synchronise()
        start = time.perf_counter()
        for _ in range(10 if on_gpu else 1):
            torch.mm(a, a, out=out)
        synchronise()
        best = min(best, (time.perf_counter() - start) / (10 if on_gpu else 1))
    del a, out
    if on_gpu:
        torch.cuda.empty_cache()
    return 2 * side**3 / best


def machine(device: torch.device) -> dict[str, Any]:
    """Date, device and versions."""
    versions = {}
    for package in ("numpy", "transformers", "warp-lang", "triton", "flash-attn", "av", "nvidia-cudnn-cu13"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "device": "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": versions,
    }
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts["device_memory_gib"] = torch.cuda.get_device_properties(device).total_memory / GIB
        with suppress(OSError, subprocess.CalledProcessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            facts["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    return facts


@contextmanager
def balloon(free_gib: float) -> Iterator[None]:
    """Let another process hold all GPU memory but ``free_gib`` GiB while the block runs.

    Unlike a limit inside torch this also binds what is outside its allocator: contexts, libraries, Warp.
    """
    command = [sys.executable, "-m", "benchmarks.measure", str(free_gib)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        answer = process.stdout.readline()
        if not answer.startswith("free"):
            raise RuntimeError("The process that should fill the GPU ended early.")
        say(f"Another process leaves {answer.split()[1]} GiB of the GPU.")
        yield
    finally:
        process.communicate("")


def _inflate(free_gib: float) -> None:
    """Take memory until ``free_gib`` GiB are free, say so, and hold it until standard input ends."""
    held = [torch.empty(1, device="cuda")]
    while True:
        excess = torch.cuda.mem_get_info()[0] - int(free_gib * GIB)
        if excess < 2 * 2**20:
            break
        held.append(torch.empty(excess // 2**21 * 2**21, dtype=torch.uint8, device="cuda"))
    sys.stdout.write(f"free {torch.cuda.mem_get_info()[0] / GIB:.3f}\n")
    sys.stdout.flush()
    sys.stdin.read()


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _inflate(float(sys.argv[1]))
