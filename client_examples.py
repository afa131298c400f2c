"""Python client of the service, in one file that needs nothing but Python.

    python client_examples.py [URL [PICTURE]]

makes output.glb and output.mp4 in the current folder; start the service first: ``python api.py``.  If it asks for a
key, set TRELLIS2_API_KEY.
"""

from __future__ import annotations

import json
import mimetypes
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).resolve().parent / "assets" / "example_image" / "T.png"
POLL_SECONDS = 0.5

OnProgress = Callable[[dict[str, Any]], None]


class TRELLIS2Error(Exception):
    """The service refused a request or a job failed. ``status``: of HTTP, 0 where the service was not reached."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class TRELLIS2Client:
    """Calls the service at ``base_url``. All methods raise TRELLIS2Error.

    timeout: seconds without a sign of life. retries: further attempts where the service is not reached or busy; none
    of them makes a second asset.
    """

    def __init__(
        self,
        base_url: str = "http://localhost:8000",
        api_key: str | None = None,
        *,
        timeout: float = 60.0,
        retries: int = 5,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.timeout = timeout
        self.retries = retries

    def image_to_3d(
        self,
        image_path: str | os.PathLike[str],
        *,
        on_progress: OnProgress | None = None,
        **parameters: Any,
    ) -> dict[str, Any]:
        """Make an asset and return its job, with video_url, model_url and preview_image_url.

        parameters: seed, pipeline_type, generate_video, ... as documented. on_progress: called with the job (status,
        stage, progress, queue_position, ...) while it goes on.
        """
        return self.wait(self.submit(image_path, **parameters), on_progress=on_progress)

    def submit(self, image_path: str | os.PathLike[str], **parameters: Any) -> dict[str, Any]:
        """Start a job and return it without waiting for its end."""
        path = Path(image_path)
        kind, body = multipart(path.name, path.read_bytes(), {**parameters, "wait": False})
        # The key makes it safe to send the request again: the service answers with the same job.
        headers = {"Content-Type": kind, "Idempotency-Key": str(uuid.uuid4())}
        return self._json("POST", "/api/v1/image-to-3d", body, headers)

    def wait(self, job: dict[str, Any], *, on_progress: OnProgress | None = None) -> dict[str, Any]:
        """Return a job once it is completed; raises where it failed or was cancelled."""
        while job["status"] in ("queued", "running"):
            if on_progress is not None:
                on_progress(job)
            time.sleep(POLL_SECONDS)
            job = self.job(job["job_id"])
        if job["status"] != "completed":
            raise TRELLIS2Error(200, job["error"] or job["message"])
        return job

    def job(self, job_id: str) -> dict[str, Any]:
        """The state of a job."""
        return self._json("GET", f"/api/v1/jobs/{job_id}")

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Stop a job."""
        return self._json("POST", f"/api/v1/jobs/{job_id}/cancel")

    def download_file(self, url: str, output_path: str | os.PathLike[str]) -> Path:
        """Save a file of a job; ``url`` is its model_url, video_url or preview_image_url."""
        target = Path(output_path)
        partial = target.with_name(target.name + ".partial")
        with self._open("GET", url) as response, partial.open("wb") as file:
            shutil.copyfileobj(response, file)
        return partial.replace(target)

    def delete_outputs(self, job_id: str) -> None:
        """Delete the files of a job."""
        self._json("DELETE", f"/api/v1/outputs/{job_id}")

    def health(self) -> dict[str, Any]:
        """Whether the model is loaded; raises where it is not."""
        return self._json("GET", "/health")

    def _json(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> dict[str, Any]:
        with self._open(method, path, body, headers) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def _open(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Any:
        request = urllib.request.Request(self.base_url + path, body, {**self.headers, **(headers or {})}, method=method)
        for attempt in range(self.retries + 1):
            try:
                return urllib.request.urlopen(request, timeout=self.timeout)
            except urllib.error.HTTPError as error:
                if error.code not in (429, 503) or attempt == self.retries:
                    raise TRELLIS2Error(error.code, _detail(error)) from error
                pause = float(error.headers.get("Retry-After", 2**attempt))
            except OSError as error:
                if attempt == self.retries:
                    raise TRELLIS2Error(0, f"{self.base_url} does not answer: {error}") from error
                pause = 2.0**attempt
            time.sleep(min(pause, 30.0))
        raise AssertionError("the last attempt returns or raises")


def multipart(filename: str, picture: bytes, parameters: dict[str, Any]) -> tuple[str, bytes]:
    """Content type and body of a form with the picture and the parameters."""
    boundary = uuid.uuid4().hex
    parts = []
    for name, value in parameters.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        parts.append(f'Content-Disposition: form-data; name="{name}"\r\n\r\n{text}'.encode())
    kind = mimetypes.guess_type(filename)[0] or "application/octet-stream"
    head = f'Content-Disposition: form-data; name="image"; filename="picture"\r\nContent-Type: {kind}\r\n\r\n'
    parts.append(head.encode() + picture)
    edge = f"--{boundary}".encode()
    body = b"".join(edge + b"\r\n" + part + b"\r\n" for part in parts) + edge + b"--\r\n"
    return f"multipart/form-data; boundary={boundary}", body


def _detail(error: urllib.error.HTTPError) -> str:
    """The sentence of the service, or what HTTP calls the status."""
    try:
        answer = json.load(error)
        return str(answer.get("detail") or answer["message"])
    except (ValueError, KeyError, AttributeError):
        return f"{error.code} {error.reason}"


def show(job: dict[str, Any]) -> None:
    sys.stderr.write(f"\r{job['progress']:4.0%} {job['message']:<50}")


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000"
    picture = sys.argv[2] if len(sys.argv) > 2 else EXAMPLE
    client = TRELLIS2Client(url, os.environ.get("TRELLIS2_API_KEY"))
    try:
        result = client.image_to_3d(picture, on_progress=show, seed=42, pipeline_type="512", texture_size=1024)
        sys.stderr.write("\n")
        for address, name in ((result["model_url"], "output.glb"), (result["video_url"], "output.mp4")):
            sys.stdout.write(f"{client.download_file(address, name)}\n")
    except TRELLIS2Error as error:
        sys.exit(f"client_examples.py: {error}")


if __name__ == "__main__":
    main()
