"""Many runs in a row: memory, descriptors and results must stay as they are.

    python -m benchmarks.leaks --runs 50

Mostly the smallest preset, others mixed in, with few texels and frames.  After each run it prints GPU memory that torch
holds and that the driver counts, resident host memory, open descriptors, and hashes of the GLB and the MP4.  It fails
where memory or descriptors grow once every request has been seen twice, or where one request gives two results.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from trellis2.options import GenerateOptions
from trellis2.pipeline import PRESETS

from . import measure, ours
from .forced import forced, reduced
from .measure import say
from .models import random_checkpoint
from .scene import Scene, picture

MIB = 2**20
GPU_SLACK, HOST_SLACK = 16 * MIB, 256 * MIB
DESCRIPTOR_SLACK = 2


@dataclass(frozen=True)
class State:
    """After one run; bytes, and hashes of its files."""

    request: tuple[str, int]
    allocated: int
    device: int
    host: int
    descriptors: int
    files: tuple[str, str]

    def __str__(self) -> str:
        sizes = f"{self.allocated / MIB:>10.1f} {self.device / MIB:>10.1f} {self.host / MIB:>9.1f}"
        return f"{sizes} {self.descriptors:>4}  {', '.join(self.files)}"


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    states: list[State] = []
    with ExitStack() as stack:
        if options.small:
            stack.enter_context(reduced())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = random_checkpoint(device, options.small)
        pipeline = ours.make_pipeline(checkpoint, device, options.residency, options.cap)
        scenes = {preset: Scene(PRESETS[preset].resolution, device) for preset in options.presets}
        say("run preset        seed      s  torch MiB device MiB  host MiB open  GLB, MP4")
        for number in range(options.runs):
            preset, seed = request(number, options.presets)
            wishes = {**ours.small_options(), "pipeline_type": preset, "seed": seed}
            if not options.small:
                wishes |= {"video_frames": 8, "video_resolution": 256}
                wishes |= {f"{stage}_steps": options.steps for stage in ("sparse_structure", "shape_slat", "tex_slat")}
            start = time.perf_counter()
            with forced(scenes[preset], PRESETS[preset]):
                files = pipeline.run(picture(), GenerateOptions(**wishes), folder)
            seconds = time.perf_counter() - start
            hashes = [hashlib.sha256(p.read_bytes()).hexdigest()[:12] for p in (files.model_file, files.video) if p]
            states.append(_state((preset, seed), hashes))
            say(f"{number:>3} {preset:<13} {seed:>4} {seconds:>6.1f} {states[-1]}")
    found = problems(states)
    for problem in found:
        say(f"FAILED: {problem}")
    if not found:
        say("Nothing grows, and equal requests gave equal files.")
    return 1 if found else 0


def request(number: int, presets: list[str]) -> tuple[str, int]:
    """Preset and seed of one run: the first preset mostly, each other one in turn at every fourth run."""
    others = presets[1:]
    if others and number % 4 == 3:
        return others[number // 4 % len(others)], 1
    return presets[0], 1 + number % 2


def problems(states: list[State]) -> list[str]:
    """What is wrong with a series of runs, in sentences."""
    found = []
    results: dict[tuple[str, int], set[tuple[str, str]]] = {}
    for state in states:
        results.setdefault(state.request, set()).add(state.files)
    for (preset, seed), files in results.items():
        if len(files) > 1:
            found.append(f"{preset} with seed {seed} gave {len(files)} different results.")
    # Until every request has been seen twice, caches may fill.
    seen = {key: [i for i, s in enumerate(states) if s.request == key] for key in results}
    begin = max(where[min(1, len(where) - 1)] for where in seen.values())
    steady = states[begin:]
    for name, slack, unit in (
        ("allocated", 0, MIB),
        ("device", GPU_SLACK, MIB),
        ("host", HOST_SLACK, MIB),
        ("descriptors", DESCRIPTOR_SLACK, 1),
    ):
        values = [getattr(state, name) for state in steady]
        third = max(len(values) // 3, 1)
        before, after = max(values[:third]), max(values[-third:])
        if after > before + slack:
            found.append(f"{name} grew from {before / unit:.1f} to {after / unit:.1f} in {len(values)} runs.")
    return found


def _state(key: tuple[str, int], hashes: Iterable[str]) -> State:
    allocated = device = 0
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        allocated = torch.cuda.memory_allocated()
        used = measure.device_used()
        device = used[0] if used else 0
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    glb, mp4 = hashes
    return State(key, allocated, device, resident, len(os.listdir("/proc/self/fd")), (glb, mp4))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.leaks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=list(PRESETS), help="the first mostly")
    parser.add_argument("--steps", type=int, default=12, help="of every stage")
    parser.add_argument("--residency", choices=ours.RESIDENCIES, default="auto")
    parser.add_argument("--cap", type=float, metavar="GIB", help="of GPU memory that the pipeline may use")
    parser.add_argument("--small", action="store_true", help="toy sizes")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
