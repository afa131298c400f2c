"""The trainers' configs at toy size, and a few objects at resolution 32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from training.data import build

CONFIGS = Path(__file__).resolve().parents[2] / "training" / "configs"
OBJECTS = (("mug", 3), ("stool", 1), ("glyph", 2), ("lamp", 5))
RESOLUTION = 32
CHANNELS = [16, 16, 16, 16, 16]


def config(name: str, **trainer: Any) -> dict[str, Any]:
    """A config of training/configs with small networks."""
    value: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    for entry in value["models"].values():
        args = entry["args"]
        if name == "structure_vae":
            value["dataset"]["args"]["resolution"] = 16
            args["channels"] = [8, 8, 8, 16] if "in_channels" in args else [16, 8, 8, 8]
        elif "num_blocks" in args and isinstance(args["num_blocks"], list):
            args.update(model_channels=CHANNELS, num_blocks=[0, 0, 0, 0, 1], latent_channels=8)
            if "Decoder" in entry["name"]:
                args["num_blocks"] = [1, 0, 0, 0, 0]
        elif "model_channels" in args:
            args.update(model_channels=48, num_blocks=2, num_heads=2, cond_channels=32, mlp_ratio=2.0, dtype="float32")
        else:
            args.update(image_size=32, channels=32, depth=1, heads=2, stem=[8, 8, 16])
    if name == "flows":
        value["models"]["structure"]["args"]["resolution"] = 2
        for stage, channels in (("shape", 8), ("texture", 16)):
            value["models"][stage]["args"].update(in_channels=channels, out_channels=8)
    value["trainer"]["args"].update(
        batch_size_per_gpu=4, warmup_steps=1, i_sample=10**9, i_log=10**9, grad_clip=1.0, ema_rate=[0.5], **trainer
    )
    return value


def write_objects(folder: Path) -> Path:
    """The toy objects as .npz; their pictures are flat colours, as real ones take seconds."""
    folder.mkdir(parents=True)
    for index, (family, seed) in enumerate(OBJECTS):
        sample = build(family, seed, RESOLUTION)
        picture = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
        picture[:, 8:24, 8:24] = torch.randint(0, 255, (3,), generator=torch.Generator().manual_seed(seed))
        maps = torch.nn.functional.pad(picture, (0, 4), value=200)
        object.__setattr__(sample, "pictures", picture)
        object.__setattr__(sample, "maps", maps)
        sample.save(folder / f"{index:07d}.npz")
    return folder
