"""The real service with a stand-in for the model, for load that is about the service:

    TRELLIS2_DATA=FOLDER TRELLIS2_PORT=8001 STUB_SECONDS=0.05 python tests/load/stub_service.py

The stand-in takes STUB_SECONDS per job, in ten steps that can be cancelled, and writes the files that were asked for.
"""

from __future__ import annotations

import os
import random
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import uvicorn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from trellis2.options import GenerateOptions
from trellis2.service.app import create_app
from trellis2.service.logs import log_as_json
from trellis2.service.settings import settings_from_environment

STEPS = 10
SECONDS = float(os.environ.get("STUB_SECONDS", "0.05"))
FILES = {"model.glb": 200_000, "video.mp4": 100_000, "no_background.png": 50_000}


def contents(seed: int, name: str) -> bytes:
    """What a file has in it, so that a download can be checked."""
    return random.Random(f"{seed} {name}").randbytes(FILES[name])


class StubPipeline:
    checkpoint = SimpleNamespace(source="stand-in")
    device = SimpleNamespace(type="cpu")

    @classmethod
    def from_pretrained(cls) -> StubPipeline:
        return cls()

    def run(
        self, image: bytes, options: GenerateOptions, out_dir: Path, on_progress: Callable[[str, int, int, float], None]
    ) -> SimpleNamespace:
        for step in range(1, STEPS + 1):
            time.sleep(SECONDS / STEPS)
            on_progress("shape", step, STEPS, step / STEPS)
        wanted = {"model.glb": options.generate_model, "video.mp4": options.generate_video, "no_background.png": True}
        for name in FILES:
            if wanted[name]:
                (out_dir / name).write_bytes(contents(options.seed, name))
        return SimpleNamespace(seed=options.seed, timings={"shape": SECONDS}, warnings=())


def stand_in() -> None:
    """Be the pipeline, before anybody imports it, and torch with it."""
    module = types.ModuleType("trellis2.pipeline")
    module.Pipeline = StubPipeline  # type: ignore[attr-defined]
    sys.modules["trellis2.pipeline"] = module


def main() -> None:
    stand_in()
    settings = settings_from_environment()
    log_as_json()
    uvicorn.run(create_app(settings), host=settings.host, port=settings.port, log_config=None)


if __name__ == "__main__":
    main()
