"""The service in this process, with the tiny checkpoint."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pictures import object_colour, object_mask
from PIL import Image
from service_client import StartService

from trellis2.service.app import create_app
from trellis2.service.settings import Settings


@pytest.fixture(scope="session")
def picture() -> bytes:
    """A toy with a transparent background, as PNG."""
    rgba = Image.fromarray((object_colour(96) * 255).astype("uint8"))
    rgba.putalpha(Image.fromarray((object_mask(96) * 255).astype("uint8")))
    file = io.BytesIO()
    rgba.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def start_service(checkpoint_folder: Path) -> StartService:
    """Start a service: ``with start_service(data, **settings) as client``; the model is loaded when it begins."""

    @contextmanager
    def start(data: Path, *, model: Path = checkpoint_folder, loaded: bool = True, **settings: Any) -> Iterator[Any]:
        video = {"video_frames": 4, "video_resolution": 64}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRELLIS2_MODEL", str(model))
            app = create_app(Settings(data=data, video=video, **settings))
            with TestClient(app, raise_server_exceptions=False) as client:
                while client.get("/health").json()["status"] == "loading":
                    time.sleep(0.05)
                assert client.get("/readyz").json()["ready"] is loaded
                yield client

    return start


@pytest.fixture(scope="module")
def service(start_service: StartService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """One service for the tests of a module that leave its queue empty."""
    with start_service(tmp_path_factory.mktemp("service")) as client:
        yield client
