"""Which presets fit, with made-up machines."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from trellis2.options import PIPELINE_TYPES
from trellis2.service.capacity import GB, GPU_NEEDS, HOST_NEEDS, gpu_memory, host_memory, refusal, resident_memory


@pytest.mark.parametrize(
    ("preset", "available", "remedy"),
    [
        ("512", 4.0, None),
        ("1024_cascade", 8.0, None),
        ("1024_cascade", 7.9, "choose pipeline_type='1024'"),
        ("1536_cascade", 15.9, "choose pipeline_type='1024_cascade'"),
        ("1536_cascade", 7.9, "choose pipeline_type='1024'"),
        ("512", 3.9, "no preset fits, use another machine"),
        ("1536_cascade", 3.9, "no preset fits, use another machine"),
    ],
)
def test_the_largest_smaller_preset_is_named(preset: str, available: float, remedy: str | None) -> None:
    sentence = refusal(preset, int(available * GB), GPU_NEEDS, "GPU memory")
    if remedy is None:
        assert sentence is None
    else:
        assert sentence is not None
        assert sentence.startswith(f"pipeline_type='{preset}' needs {GPU_NEEDS[preset] // GB}.0 GB of GPU memory, and")
        assert sentence.endswith(f"there are {available}; {remedy}.")


def test_every_preset_has_its_needs() -> None:
    for needs in (GPU_NEEDS, HOST_NEEDS):
        assert tuple(needs) == PIPELINE_TYPES
        assert list(needs.values()) == sorted(needs.values())


def test_gpu_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(
        is_initialized=lambda: True, mem_get_info=lambda: (6 * 2**30, 24 * 2**30), memory_reserved=lambda: 10 * 2**30
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert gpu_memory(None) == 16 * 2**30
    assert gpu_memory(8.0) == 8 * 2**30
    assert gpu_memory(40.0) == 16 * 2**30
    cuda.is_initialized = lambda: False
    assert gpu_memory(None) is None


def machine(root: Path, **files: str) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:  2000 kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_host_memory(tmp_path: Path) -> None:
    assert host_memory(0, tmp_path) is None
    root = machine(tmp_path, **{"proc/self/status": "Name:\tpython\nVmRSS:\t  700 kB\n"})
    assert resident_memory(root) == 700 * 1024
    assert host_memory(700 * 1024, root) == 2000 * 1024
    assert host_memory(900 * 1024, root) == 2000 * 1024
    assert host_memory(400 * 1024, root) == 2300 * 1024  # what the running job holds will be free again


@pytest.mark.parametrize(
    ("limit", "statistics", "key"),
    [
        ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.stat", "anon"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.stat", "total_rss"),
    ],
)
def test_the_memory_of_a_container(tmp_path: Path, limit: str, statistics: str, key: str) -> None:
    root = machine(tmp_path, **{"proc/self/status": "VmRSS: 0 kB\n", limit: "1000000\n", statistics: f"{key} 400000\n"})
    assert host_memory(0, root) == 600000
    (root / limit).write_text("max\n")
    assert host_memory(0, root) == 2000 * 1024
