"""Run every preset at its real size with random weights and report times, memory and counts.

    python -m benchmarks --stages --json benchmarks/results.json
    python -m benchmarks --presets 512 1024 --cap 4 --json benchmarks/results.json
    python -m benchmarks --original CHECKOUT --json benchmarks/results.json
    python -m benchmarks --small                 # toy sizes, runs on a CPU
    python -m benchmarks.leaks                   # fifty runs in a row
    python -m benchmarks.report                  # the README's section from benchmarks/results.json

Results are merged into the JSON file: a run takes the place of an earlier one of the same kind.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from trellis2.options import GenerateOptions
from trellis2.pipeline import PRESETS

from . import measure, original, ours, report
from .forced import reduced
from .measure import say
from .models import random_checkpoint
from .scene import Scene


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    results = _read(options.json)
    if options.original:
        return original.run(options, lambda facts, runs: _merge(options.json, results, facts, runs))
    if options.cap is not None and not options.inside:
        return _capped(options)
    baseline = measure.device_baseline(options.cap if options.inside else None)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    facts = measure.machine(device)
    rate = measure.matmul_rate(device)
    facts["matmul_teraflops"] = rate / 1e12
    say(f"{facts['device']}, torch {facts['torch']}, {facts['date']}: matrix products {rate / 1e12:.1f} TFLOP/s")
    failures = 0
    with ExitStack() as stack:
        if options.small:
            stack.enter_context(reduced())
        folder = Path(options.keep_files or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = random_checkpoint(device, options.small)
        pipeline = ours.make_pipeline(checkpoint, device, options.residency, options.cap, options.matting)
        for preset in options.presets:
            run = _one(pipeline, preset, options, folder, rate, baseline)
            failures += "error" in run
            _merge(options.json, results, facts, [run])
            say(report.text(run))
    return 1 if failures else 0


def _one(
    pipeline: Any, preset: str, options: argparse.Namespace, folder: Path, rate: float, baseline: int
) -> dict[str, Any]:
    run: dict[str, Any] = {
        "implementation": "ours",
        "preset": preset,
        "residency": "resident" if pipeline.residency.resident_weights else "streamed",
        "cap_gib": options.cap,
        "small": options.small,
        "matting": options.matting,
    }
    wishes = {**(ours.small_options() if options.small else {}), "pipeline_type": preset}
    try:
        scene = Scene(PRESETS[preset].resolution, pipeline.device)
        run |= ours.measure(
            pipeline,
            scene,
            GenerateOptions(**wishes),
            folder,
            repeats=options.repeats,
            stages=options.stages,
            files=not options.no_files,
            rate=rate,
            baseline=baseline,
            small=options.small,
        )
        if options.cap is not None:
            run["within_cap"] = run["peak_device_gib"] <= options.cap
    except Exception as error:  # the other presets are still worth measuring
        traceback.print_exc()
        run["error"] = f"{type(error).__name__}: {error}"
        if pipeline.device.type == "cuda":
            torch.cuda.empty_cache()
    return run


def _capped(options: argparse.Namespace) -> int:
    """Each preset in a process of its own, beside another one that leaves it ``--cap`` GiB of the GPU."""
    failures = 0
    for preset in options.presets:
        command = [sys.executable, "-m", "benchmarks", "--presets", preset, "--inside", "--cap", str(options.cap)]
        command += ["--repeats", str(options.repeats), "--residency", options.residency]
        command += [f"--{name}" for name in ("stages", "small", "matting") if getattr(options, name)]
        command += ["--no-files"] if options.no_files else []
        command += ["--json", str(options.json)] if options.json else []
        command += ["--device", options.device] if options.device else []
        with ExitStack() as stack:
            if torch.cuda.device_count():  # which makes no context here
                stack.enter_context(measure.balloon(options.cap))
            failures += subprocess.run(command, check=False).returncode != 0
    return 1 if failures else 0


def _read(path: Path | None) -> dict[str, Any]:
    if path is not None and path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    return {"machine": {}, "runs": []}


def _merge(path: Path | None, results: dict[str, Any], facts: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    def kind(run: dict[str, Any]) -> tuple[Any, ...]:
        keys = ("implementation", "preset", "residency", "cap_gib", "small", "matting", "run")
        return tuple(run.get(key) for key in keys)

    results["machine"] |= facts
    known = {kind(run): run for run in results["runs"]}
    known |= {kind(run): run for run in runs}
    results["runs"] = list(known.values())
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    presets = list(PRESETS)
    parser.add_argument("--presets", nargs="+", default=presets, choices=presets)
    parser.add_argument("--repeats", type=int, default=3, help="runs that count, after one to warm up")
    parser.add_argument("--residency", choices=ours.RESIDENCIES, default="auto", help="where weights rest")
    parser.add_argument("--cap", type=float, metavar="GIB", help="let the whole process use only this much of the GPU")
    parser.add_argument("--json", type=Path, metavar="PATH", help="merge the results into this file")
    parser.add_argument("--stages", action="store_true", help="also time every stage alone")
    parser.add_argument("--no-files", action="store_true", help="without GLB and video")
    parser.add_argument("--matting", action="store_true", help="with a picture whose background a network removes")
    parser.add_argument("--keep-files", metavar="FOLDER", help="where GLB and video stay")
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--device", help="cuda or cpu")
    parser.add_argument(
        "--original", metavar="CHECKOUT", help="measure the original instead; see benchmarks/original.py"
    )
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
