"""Recorded cases of the original implementation: ``<prefix>_<n>.json`` beside ``<prefix>_<n>.safetensors``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import PIL
import pytest
import torch
from safetensors.torch import load_file

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent / "golden")
PILLOW_SIMD = ".post" in PIL.__version__
"""The recordings were made with Pillow.  pillow-simd's Lanczos is up to two of 255 levels off (measured, in one of 100
pixels), which moves the tokens of the recorded pictures by up to 1.2e-3 (relative L2)."""
_MODEL_PREFIXES = ("weights.", "enc.", "dec.", "models.")


def golden_cases(prefix: str) -> list[Any]:
    """One pytest parameter per case of ``prefix``; each loads as (meta, tensors) with ``load_golden``."""
    paths = sorted(p for p in GOLDEN_DIR.glob(f"{prefix}_*.json") if p.stem[len(prefix) + 1 :].isdigit())
    return [pytest.param(p, id=p.stem, marks=pytest.mark.golden) for p in paths]


def load_golden(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return (json, tensors). Model weights stored as float16 are widened to float32, which is exact."""
    tensors = load_file(path.with_suffix(".safetensors"))
    for name, value in tensors.items():
        if value.dtype == torch.float16 and name.startswith(_MODEL_PREFIXES):
            tensors[name] = value.float()
    return json.loads(path.read_text()), tensors


def under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose name begins with ``prefix``, without it."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def relative_l2(value: torch.Tensor, expected: torch.Tensor) -> float:
    """||value - expected|| / ||expected||, in float64."""
    value, expected = value.double(), expected.double()
    return float((value - expected).norm() / expected.norm())
