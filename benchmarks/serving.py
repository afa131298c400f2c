"""What a service feels: the start of a process, its first predictions, and several GPUs of one host side by side.

    python -m benchmarks.serving FOLDER --json benchmarks/results.json
    python -m benchmarks.serving FOLDER --gpus 2 --json benchmarks/results.json

FOLDER holds a checkpoint in the published layout; where it is empty, one of the published sizes with random weights is
written there first (16 GB).  The first start is not counted: it compiles kernels, which an image holds already, and
brings the files into the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from trellis2.checkpoint import build_model
from trellis2.options import GenerateOptions
from trellis2.pipeline import PRESETS, Pipeline
from trellis2.warmup import warm_up

from . import measure, ours
from .forced import forced, reduced
from .measure import say, summary
from .models import (
    LATENT,
    SAMPLERS,
    SIGMA_MIN,
    configurations,
    image_encoder_config,
    random_image_encoder,
    randomise,
)
from .scene import Scene, picture

SEEN = "1024_cascade"
UNSEEN = "512"
"""Its counts of tokens are new to a process that has made assets of the other preset."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, metavar="PATH", help="merge the results into this file")
    parser.add_argument("--gpus", type=int, default=1, help="how many to use at once")
    parser.add_argument("--assets", type=int, default=8, help="how many each GPU makes")
    parser.add_argument("--small", action="store_true", help="toy sizes, for a CPU")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        _worker(options)
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not (options.folder / "pipeline.json").exists():
        write_checkpoint(options.folder, device, options.small)
    _start(options, 0).communicate("")  # not counted
    found = measure.machine(device)
    if options.gpus == 1:
        found |= _one(options)
    else:
        found |= _several(options)
    say(json.dumps(found, indent=1))
    if options.json:
        results = json.loads(options.json.read_text()) if options.json.exists() else {"machine": {}, "runs": []}
        results["throughput" if options.gpus > 1 else "start"] = found
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def write_checkpoint(folder: Path, device: torch.device, small: bool) -> None:
    """Random weights in the published layout."""
    (folder / "ckpts").mkdir(parents=True, exist_ok=True)
    models = configurations(small)
    if small:
        models["shape_slat_flow_model_64"] = models["shape_slat_flow_model_512"]
    for number, (name, (kind, args)) in enumerate(models.items()):
        model = build_model(kind, args).to_empty(device=device)
        randomise(model.named_parameters(), number)
        save_file(model.state_dict(), folder / "ckpts" / f"{name}.safetensors")
        (folder / "ckpts" / f"{name}.json").write_text(json.dumps({"name": kind, "args": args}))
    (folder / "encoder").mkdir(exist_ok=True)
    save_file(random_image_encoder(device, small).state_dict(), folder / "encoder" / "model.safetensors")
    (folder / "encoder" / "config.json").write_text(json.dumps(image_encoder_config(small)))
    normalization = {"mean": [0.0] * LATENT, "std": [2.0] * LATENT}
    args = {
        "models": {name: f"ckpts/{name}" for name in models},
        "shape_slat_normalization": normalization,
        "tex_slat_normalization": normalization,
        "image_cond_model": {"name": "DinoV3FeatureExtractor", "args": {"model_name": "encoder"}},
        "default_pipeline_type": SEEN,
    }
    for stage, params in SAMPLERS.items():
        sampler = {"name": "FlowEulerGuidanceIntervalSampler", "args": {"sigma_min": SIGMA_MIN}, "params": params}
        args[f"{stage}_sampler"] = sampler
    content = {"name": "Trellis2ImageTo3DPipeline", "args": args, "untrained": True}
    (folder / "pipeline.json").write_text(json.dumps(content))


def _start(options: argparse.Namespace, gpu: int, assets: int = 1) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.serving", str(options.folder), "--worker", "--assets", str(assets)]
    command += ["--small"] if options.small else []
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu), "STARTED": repr(time.time())}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _worker(options: argparse.Namespace) -> None:
    """Load; say so; wait for a line; make assets and say how long each took."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.small:
        reduced().__enter__()
    pipeline = Pipeline.from_pretrained(options.folder, device=device)
    if device.type == "cuda":  # as the predictor and the service do
        warm_up(pipeline)
    measure.synchronise()
    say(json.dumps({"ready": time.time() - float(os.environ["STARTED"])}))
    wishes = ours.small_options() if options.small else {}
    seconds: dict[str, list[float]] = {}
    if options.assets > 1:
        presets = [SEEN] * options.assets
    else:
        presets = [UNSEEN] if options.small else [SEEN] * 3 + [UNSEEN] * 3
    scenes = {preset: Scene(PRESETS[preset].resolution, device) for preset in set(presets)}
    with tempfile.TemporaryDirectory() as folder:
        for number, preset in enumerate(presets):
            with forced(scenes[preset], PRESETS[preset]):
                if number == 0 and options.assets > 1:
                    say("waiting")
                    sys.stdin.readline()
                measure.synchronise()
                start = time.perf_counter()
                pipeline.run(picture(), GenerateOptions(**{**wishes, "pipeline_type": preset}), folder)
                seconds.setdefault(preset, []).append(time.perf_counter() - start)
    say(json.dumps(seconds))


def _one(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds from the start of a process until its networks are loaded, and of its first and third predictions."""
    starts, seconds = [], []
    for _ in range(3):
        ready, runs = map(json.loads, _start(options, 0).communicate("")[0].splitlines())
        starts.append(ready["ready"])
        seconds.append(runs)
    return {
        "ready_seconds": summary(starts),
        **{
            preset: {
                "first_seconds": summary([runs[preset][0] for runs in seconds]),
                "warm_seconds": summary([runs[preset][-1] for runs in seconds]),
            }
            for preset in seconds[0]
        },
    }


def _several(options: argparse.Namespace) -> dict[str, Any]:
    """Assets a minute of one GPU, and of several at once, each with a process of its own."""
    rates = {}
    for gpus in (1, options.gpus):
        workers = [_start(options, gpu, options.assets + 1) for gpu in range(gpus)]
        for worker in workers:
            assert worker.stdout is not None
            while worker.stdout.readline().strip() != "waiting":
                pass
        outputs = []
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        for worker in workers:
            outputs.append(json.loads(worker.communicate()[0].splitlines()[-1])[SEEN][1:])  # the first warms up
        rates[gpus] = sum(60 * len(seconds) / sum(seconds) for seconds in outputs)
    return {
        "preset": SEEN,
        "gpus": options.gpus,
        "assets_a_minute": {"one": rates[1], "all": rates[options.gpus]},
        "share_of_ideal": rates[options.gpus] / (options.gpus * rates[1]),
    }


if __name__ == "__main__":
    raise SystemExit(main())
