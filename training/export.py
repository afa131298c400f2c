"""Write a checkpoint in the published layout from the averages of the four runs.

    python -m training.export --runs FOLDER [FOLDER ...] --out weights/embedded [--facts FILE]

The folders hold structure_vae.safetensors, shape_vae.safetensors, texture_vae.safetensors and flows.safetensors. Where
several hold the same one, the mean of their weights is taken ("Model soups", Wortsman et al. 2022).
facts: JSON with what the model card says about training and metrics, see ``card``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .objects import SEEN
from .train import read_average

RUNS = ("structure_vae", "shape_vae", "texture_vae", "flows")
MODELS = {
    "sparse_structure_flow_model": ("flows", "structure"),
    "sparse_structure_decoder": ("structure_vae", "decoder"),
    "shape_slat_flow_model_512": ("flows", "shape"),
    "shape_slat_flow_model_1024": ("flows", "shape"),
    "shape_slat_decoder": ("shape_vae", "decoder"),
    "tex_slat_flow_model_512": ("flows", "texture"),
    "tex_slat_flow_model_1024": ("flows", "texture"),
    "tex_slat_decoder": ("texture_vae", "decoder"),
}
"""Name in pipeline.json: run and network.  One flow serves both resolutions: the files are there once."""
ENCODER = "image_encoder"
# Guidance strength, rescale, interval, rescale_t.  Callers ask for a strength, 7.5 if they say nothing; the intervals
# are those in which that strength does a small network good.
SAMPLERS = {
    "sparse_structure": (7.5, 0.7, (0.7, 1.0), 3.0),
    "shape_slat": (7.5, 0.7, (0.98, 1.0), 3.0),
    "tex_slat": (1.0, 1.0, (0.8, 1.0), 10.0),
}
STEPS = 12
VOXEL_BIAS = 1.0
"""Added to what the shape decoder says for a child of a voxel: see ``favour_voxels``."""


def export(runs: Mapping[str, Sequence[Path]], out: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write the checkpoint. runs: files with averages, by the names of ``RUNS``; of several, the mean. facts: for the
    model card, which needs them.

    Raises FileNotFoundError where a run has no file, KeyError where a network is missing.
    """
    loaded = {name: mean_of(runs[name]) for name in RUNS}
    configs = {name: json.loads(metadata["config"])["models"] for name, (_, metadata) in loaded.items()}
    (out / "ckpts").mkdir(parents=True, exist_ok=True)
    normalization = json.loads(loaded["flows"][1]["normalization"])
    if "structure" in normalization:  # the flow's latents are smaller or larger than the decoder's by this factor
        loaded["structure_vae"][0]["decoder.input_layer.weight"] *= normalization["structure"]["std"][0]
    favour_voxels(loaded["shape_vae"][0].items())
    paths = {}
    for name, (run, network) in MODELS.items():
        stem = f"{run}_{network}" if run != "flows" else f"{network}_flow"
        paths[name] = f"ckpts/{stem}"
        entry = configs[run][network]
        _write_json(out / f"ckpts/{stem}.json", {"name": entry["name"], "args": entry["args"]})
        save_file(_network(loaded[run][0], network), out / f"ckpts/{stem}.safetensors")
    (out / ENCODER).mkdir(exist_ok=True)
    _write_json(out / ENCODER / "config.json", configs["flows"][ENCODER]["args"])
    save_file(_network(loaded["flows"][0], ENCODER), out / ENCODER / "model.safetensors")
    _write_json(out / "pipeline.json", pipeline(paths, normalization))
    if facts is not None:
        (out / "README.md").write_text(card(facts, size(out)), encoding="utf-8")


def mean_of(paths: Sequence[Path]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What ``read_average`` gives, as the mean of those files that exist; the metadata of the last one.

    Raises FileNotFoundError where none does.
    """
    found = [read_average(path) for path in paths if path.is_file()]
    if not found:
        raise FileNotFoundError(paths[0])
    mean = {name: torch.stack([state[name] for state, _ in found]).mean(0) for name in found[0][0]}
    return mean, found[-1][1]


def favour_voxels(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Let the shape decoder with these named tensors keep a child of a voxel from a probability of 0.27 on.

    One that is missing is a hole; one too many is a face that hardly shows.  Training with the former counted e times
    as much as the latter would end there.
    """
    for name, value in tensors:
        if name.endswith("to_subdiv.bias"):
            value += VOXEL_BIAS


def _network(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    found = {k[len(name) + 1 :]: v.to(torch.float16) for k, v in state.items() if k.startswith(f"{name}.")}
    if not found:
        raise KeyError(name)
    return found


def pipeline(paths: Mapping[str, str], normalization: Mapping[str, Any]) -> dict[str, Any]:
    """pipeline.json"""
    args: dict[str, Any] = {"models": dict(paths)}
    for stage, (strength, rescale, interval, rescale_t) in SAMPLERS.items():
        params = {
            "steps": STEPS,
            "guidance_strength": strength,
            "guidance_rescale": rescale,
            "guidance_interval": list(interval),
            "rescale_t": rescale_t,
        }
        args[f"{stage}_sampler"] = {
            "name": "FlowEulerGuidanceIntervalSampler",
            "args": {"sigma_min": 1e-5},
            "params": params,
        }
    args["shape_slat_normalization"] = normalization["shape"]
    args["tex_slat_normalization"] = normalization["texture"]
    args["image_cond_model"] = {"name": "SmallImageEncoder", "args": {"model_name": ENCODER}}
    args["default_pipeline_type"] = "512"
    return {"name": "Trellis2ImageTo3DPipeline", "args": args}


def size(folder: Path) -> float:
    """Megabytes of a checkpoint's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def card(facts: Mapping[str, Any], megabytes: float) -> str:
    """The model card.

    facts: "cost" (a sentence: hardware, hours, date), "steps" ({run: steps}), "objects" (how many were "seen" and
    "held_out"), "metrics" (rows of name, target, seen, held_out) as ``training.evaluate`` writes them, and "limits"
    (sentences).
    """
    seen, held_out = facts["objects"]["seen"], facts["objects"]["held_out"]
    rows = "\n".join(f"| {m['name']} | {m['target']} | {m['seen']} | {m['held_out']} |" for m in facts["metrics"])
    steps = ", ".join(f"{run} {count:,}" for run, count in facts["steps"].items())
    limits = "\n".join(f"- {text}" for text in facts["limits"])
    return f"""# Embedded checkpoint

A small TRELLIS.2 that this project trained from nothing ({megabytes:.1f} MB), so that everybody sees the whole chain
work on a CPU. Its classes, its layout and the code that runs it are those of the published model
(`microsoft/TRELLIS.2-4B`), but it is hundreds of times smaller and knows toys, furniture, vessels, vehicles and
letters, not the world. For pictures of real things use the published model.

| | |
|---|---|
| Data | procedural objects in {len(SEEN)} families (`training/objects.py`), from seeds; no other data, no other model |
| Training | {facts["cost"]} |
| Steps | {steps} |
| Input | one picture of one object; the image encoder sees 256 x 256 pixels |
| Presets | `512` (made for it), `1024`, `1024_cascade`, `1536_cascade` |
| Precision | float16 files; float32 on a CPU |
| Licence | that of this repository |

## Measured

{seen} test objects of seen families and {held_out} of two families that training never saw (the first of
`training/test_objects.json`), preset 512, default options, seed 0.

| | target | seen families | held-out families |
|---|---|---|---|
{rows}

## Limits

{limits}

`training/README.md` says how it was made and how to make it again.
"""


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="training.export", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--runs", type=Path, required=True, nargs="+", metavar="FOLDER", help="of a run in several of them, the mean"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--facts", type=Path)
    args = parser.parse_args(argv)
    for folder in args.runs:
        if not folder.is_dir():
            parser.error(f"{folder} is not a folder")
    facts = None if args.facts is None else json.loads(args.facts.read_text(encoding="utf-8"))
    export({name: [folder / f"{name}.safetensors" for folder in args.runs] for name in RUNS}, args.out, facts)
    sys.stdout.write(f"{args.out}: {size(args.out):.1f} MB\n")


if __name__ == "__main__":
    main(sys.argv[1:])
