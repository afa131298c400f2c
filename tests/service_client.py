"""Talking to the service in tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from client_examples import TRELLIS2Client, TRELLIS2Error

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "assets" / "example_image" / "T.png"
QUICK = {
    "pipeline_type": "512",
    "sparse_structure_steps": "1",
    "shape_slat_steps": "1",
    "tex_slat_steps": "1",
    "decimation_target": "100000",
    "texture_size": "1024",
    "generate_video": "false",
    "generate_model": "false",
}
LONG = QUICK | {"sparse_structure_steps": "50", "shape_slat_steps": "50", "tex_slat_steps": "50"}

StartService = Callable[..., AbstractContextManager[TestClient]]

# As the documentation has it.
DOCUMENTED_JAVASCRIPT = """
async function generateModel(imageFile) {
  const formData = new FormData();
  formData.append('image', imageFile);
  formData.append('seed', '42');
  formData.append('pipeline_type', '1024_cascade');
  formData.append('generate_video', 'true');
  formData.append('generate_model', 'true');

  const response = await fetch('http://localhost:8000/api/v1/image-to-3d', {
    method: 'POST',
    body: formData
  });

  const result = await response.json();
  console.log('Job ID:', result.job_id);

  // Download model
  const modelBlob = await fetch(`http://localhost:8000${result.model_url}`)
    .then(r => r.blob());

  return modelBlob;
}
"""


def submit(client: TestClient, picture: bytes, *, headers: dict[str, str] | None = None, **fields: str) -> Any:
    """POST the picture; returns the response."""
    form = QUICK | fields
    return client.post("/api/v1/image-to-3d", data=form, files={"image": ("toy.png", picture)}, headers=headers)


def job_after(client: TestClient, job_id: str, status: str, *, headers: dict[str, str] | None = None) -> Any:
    """Wait until a job has a status; returns the job."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        job = client.get(f"/api/v1/jobs/{job_id}", headers=headers).json()
        if job["status"] == status:
            return job
        assert job["status"] in ("queued", "running"), job
        time.sleep(0.02)
    raise AssertionError(f"{job_id} is still {job['status']}")


@dataclass
class Running:
    """A service in a process of its own."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def client(self) -> TRELLIS2Client:
        return TRELLIS2Client(f"http://localhost:{self.port}", retries=0)


@contextmanager
def started(folder: Path, checkpoint: Path, *command: str) -> Iterator[Running]:
    """Start the service, with its files in ``folder``; it is killed in the end if it is still there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "TRELLIS2_MODEL": str(checkpoint),
        "TRELLIS2_DATA": str(folder / "data"),
        "TRELLIS2_PORT": str(port),
        "TRELLIS2_VIDEO_FRAMES": "4",
        "TRELLIS2_VIDEO_RESOLUTION": "64",
    }
    log = folder / "log"
    with log.open("ab") as file:
        words = [sys.executable, *(word.format(port=port) for word in command)]
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=file, stderr=file)
    running = Running(process, port, log)
    try:
        while True:
            assert process.poll() is None, log.read_text()
            try:
                running.client.health()
                break
            except TRELLIS2Error as error:
                if error.status not in (0, 503):
                    raise
                time.sleep(0.1)
        yield running
    finally:
        process.kill()
        process.wait()
