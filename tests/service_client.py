"""Talking to the service in tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from fastapi.testclient import TestClient

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
