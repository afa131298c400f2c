"""Python clients of the service, in one file that needs nothing but Python.

    python client_examples.py [URL [PICTURE]]

makes output.glb and output.mp4 in the current folder; start the service first: ``python api.py``.  If it asks for a
key, set TRELLIS2_API_KEY.  Ctrl-C cancels the job.

TRELLIS2Client waits, AsyncTRELLIS2Client has the same methods as coroutines.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import http.client
import json
import math
import mimetypes
import os
import random
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

EXAMPLE = Path(__file__).resolve().parent / "assets" / "example_image" / "T.png"
POLL_SECONDS = 0.5
QUIET_SECONDS = 20.0  # the service's event streams say every 15 seconds that they are still there
STREAMS = 3  # event streams in a row that bring nothing, before the client only polls
LONGEST_PAUSE = 120.0  # seconds between two attempts

OnProgress = Callable[[str, int, int, float], None]
"""Called with (stage, step, steps, fraction of the whole in [0, 1]). Stage "queued" has the place in the queue as
its steps; the last call is ("completed", 1, 1, 1.0)."""

T = TypeVar("T")


class TRELLIS2Error(Exception):
    """What went wrong, in the words of the service. ``status``: of HTTP, 0 where no answer came."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class BadRequest(TRELLIS2Error):
    """The picture or a parameter cannot be used, or the request does not fit the state of the job."""


class Unauthorized(TRELLIS2Error):
    """The key is missing or wrong."""


class NotFound(TRELLIS2Error):
    """There is no such job or file."""


class Busy(TRELLIS2Error):
    """As many jobs wait as may, even after the retries."""


class Unavailable(TRELLIS2Error):
    """The model is not loaded, or the service lacks something to work, even after the retries."""


class Unreachable(TRELLIS2Error):
    """No answer, even after the retries. A job that was accepted goes on."""


class ServiceFailed(TRELLIS2Error):
    """The service has a defect; its log has the details."""


class TookTooLong(TRELLIS2Error):
    """A job did not end within ``max_seconds``."""


class JobFailed(TRELLIS2Error):
    """The job ended without an asset. ``job``: its last state."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__(200, job["error"] or job["message"])
        self.job = job


class JobCancelled(JobFailed):
    """Somebody cancelled the job."""


_BY_STATUS = {
    401: Unauthorized,
    403: Unauthorized,
    404: NotFound,
    429: Busy,
    **dict.fromkeys((502, 503, 504), Unavailable),
}
_WORTH_ANOTHER_TRY = (Busy, Unavailable, Unreachable)
_BROKEN = (OSError, http.client.HTTPException)  # what a lost connection raises


class TRELLIS2Client:
    """Calls the service at ``base_url``. All methods raise TRELLIS2Error.

    timeout: seconds without a sign of life. retries: further attempts where the service is not reached, busy or
    unavailable, with growing pauses or those that it asks for; none of them makes a second asset.
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
        max_seconds: float | None = None,
        idempotency_key: str | None = None,
        **parameters: Any,
    ) -> dict[str, Any]:
        """Make an asset and return its job, with video_url, model_url and preview_image_url.

        on_progress: see OnProgress. max_seconds: see ``wait``. idempotency_key: see ``submit``. parameters: seed,
        pipeline_type, generate_video, ... as documented. Where nobody waits any longer, because of Ctrl-C, what
        on_progress raised or max_seconds, the job is cancelled.
        """
        job = self.submit(image_path, idempotency_key=idempotency_key, **parameters)
        try:
            return self.wait(job, on_progress=on_progress, max_seconds=max_seconds)
        except BaseException as error:
            if isinstance(error, TookTooLong) or not isinstance(error, TRELLIS2Error):
                with suppress(TRELLIS2Error):
                    self.cancel(job["job_id"])
            raise

    def submit(
        self, image_path: str | os.PathLike[str], *, idempotency_key: str | None = None, **parameters: Any
    ) -> dict[str, Any]:
        """Start a job and return it without waiting for its end.

        idempotency_key: any text; the same request with the same key gets the same job, even from another process.
        None draws one, so that no retry makes a second job.
        """
        path = Path(image_path)
        kind, body = multipart(path.name, path.read_bytes(), {**parameters, "wait": False})
        headers = {"Content-Type": kind, "Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return self._json("POST", "/api/v1/image-to-3d", body, headers)

    def wait(
        self, job: dict[str, Any], *, on_progress: OnProgress | None = None, max_seconds: float | None = None
    ) -> dict[str, Any]:
        """Return a job once it is completed; raises JobFailed, JobCancelled, and TookTooLong after ``max_seconds``."""
        end = math.inf if max_seconds is None else time.monotonic() + max_seconds
        before = None
        for state in self._states(job, end):
            job = state
            if on_progress is not None and (now := _progress(job)) != before:
                before = now
                on_progress(*now)
            if job["status"] in ("queued", "running") and time.monotonic() > end:
                raise TookTooLong(0, f"The job is {job['status']} after {max_seconds:g} seconds.")
        if job["status"] == "cancelled":
            raise JobCancelled(job)
        if job["status"] == "failed":
            raise JobFailed(job)
        return job

    def job(self, job_id: str) -> dict[str, Any]:
        """The state of a job."""
        return self._json("GET", f"/api/v1/jobs/{job_id}")

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Stop a job; one that has ended stays as it is."""
        return self._json("POST", f"/api/v1/jobs/{job_id}/cancel")

    def download_file(self, url: str, output_path: str | os.PathLike[str]) -> Path:
        """Save a file of a job; ``url`` is its model_url, video_url or preview_image_url. No half file is left."""
        target = Path(output_path)
        unfinished = target.with_name(target.name + ".partial")

        def save(response: http.client.HTTPResponse) -> None:
            length = response.length
            file.seek(0)
            file.truncate()
            while piece := response.read(2**16):
                with _local(target):
                    file.write(piece)
            if length is not None and file.tell() != length:  # to Python the end of a connection is the end of a file
                raise http.client.IncompleteRead(b"", length - file.tell())

        try:
            with _local(target):
                file = unfinished.open("wb")
            with file:
                self._insist("GET", url, save)
            with _local(target):
                return unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)

    def delete_outputs(self, job_id: str) -> None:
        """Delete the files of a job."""
        self._json("DELETE", f"/api/v1/outputs/{job_id}")

    def health(self) -> dict[str, Any]:
        """Whether the model is loaded; raises Unavailable where it is not."""
        return self._json("GET", "/health")

    def _states(self, job: dict[str, Any], end: float) -> Iterator[dict[str, Any]]:
        """The job at every change up to its end: from event streams, by asking where they do not come through."""
        yield job
        streams = STREAMS
        while job["status"] in ("queued", "running"):
            if streams:
                streams -= 1
                with suppress(*_BROKEN, ValueError):
                    for event in self._events(job["job_id"], min(QUIET_SECONDS, max(0.1, end - time.monotonic()))):
                        job, streams = event or job, STREAMS
                        yield job
            if job["status"] in ("queued", "running"):
                time.sleep(POLL_SECONDS)
                job = self.job(job["job_id"])
                yield job

    def _events(self, job_id: str, quiet: float) -> Iterator[dict[str, Any] | None]:
        """What an event stream tells of a job, None for its signs of life. quiet: seconds without any."""
        with closing(self._connection(quiet)) as connection:
            response = self._answer(connection, "GET", f"/api/v1/jobs/{job_id}/events", None, {})
            if response.status != 200 or response.headers.get_content_type() != "text/event-stream":
                return
            for line in response:
                if line.startswith(b"data:"):
                    yield json.loads(line[5:])
                elif line.startswith(b":"):
                    yield None

    def _json(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> dict[str, Any]:
        def read(response: http.client.HTTPResponse) -> dict[str, Any]:
            answer: dict[str, Any] = json.loads(response.read())
            return answer

        return self._insist(method, path, read, body, headers)

    def _insist(
        self,
        method: str,
        path: str,
        read: Callable[[http.client.HTTPResponse], T],
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> T:
        """Send a request until it is answered, and return what ``read`` makes of the answer."""
        for attempt in range(self.retries + 1):
            pause = 2**attempt * random.uniform(0.5, 1)  # not all at once after the service was away
            error: TRELLIS2Error
            try:
                with closing(self._connection(self.timeout)) as connection:
                    response = self._answer(connection, method, path, body, headers or {})
                    if response.status < 300:
                        return read(response)
                    error = _refusal(response)
                    pause = _asked_pause(response.headers.get("Retry-After"), pause)
            except _BROKEN as broken:
                error = Unreachable(0, f"{self.base_url} does not answer: {broken or type(broken).__name__}")
                error.__cause__ = broken
            except ValueError as wrong:
                raise ServiceFailed(0, f"{self.base_url} answers what is not JSON: {wrong}") from wrong
            if attempt == self.retries or not isinstance(error, _WORTH_ANOTHER_TRY):
                raise error
            time.sleep(min(pause, LONGEST_PAUSE))
        raise AssertionError("the last attempt returns or raises")

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        parts = urlsplit(self.base_url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.netloc, timeout=timeout)

    def _answer(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: bytes | None,
        headers: dict[str, str],
    ) -> http.client.HTTPResponse:
        # Whoever says "Connection: close", as urllib does, and is refused in the middle of a large picture, meets a
        # reset connection and never reads why.
        connection.request(method, urlsplit(self.base_url).path + path, body, {**self.headers, **headers})
        return connection.getresponse()


class AsyncTRELLIS2Client:
    """TRELLIS2Client for asyncio: the same arguments and methods, to be awaited.

    Every call has a thread while it lasts. on_progress is called in the event loop. Cancelling the task of
    ``image_to_3d`` cancels its job.
    """

    def __init__(
        self,
        base_url: str = "http://localhost:8000",
        api_key: str | None = None,
        *,
        timeout: float = 60.0,
        retries: int = 5,
    ) -> None:
        self._client = TRELLIS2Client(base_url, api_key, timeout=timeout, retries=retries)

    async def image_to_3d(
        self,
        image_path: str | os.PathLike[str],
        *,
        on_progress: OnProgress | None = None,
        max_seconds: float | None = None,
        idempotency_key: str | None = None,
        **parameters: Any,
    ) -> dict[str, Any]:
        submitting = asyncio.ensure_future(self.submit(image_path, idempotency_key=idempotency_key, **parameters))
        try:
            job = await asyncio.shield(submitting)
            return await self.wait(job, on_progress=on_progress, max_seconds=max_seconds)
        except BaseException as error:
            if isinstance(error, TookTooLong) or not isinstance(error, TRELLIS2Error):
                with suppress(TRELLIS2Error):
                    await self.cancel((await submitting)["job_id"])
            raise

    async def submit(
        self, image_path: str | os.PathLike[str], *, idempotency_key: str | None = None, **parameters: Any
    ) -> dict[str, Any]:
        return await _in_thread(partial(self._client.submit, image_path, idempotency_key=idempotency_key, **parameters))

    async def wait(
        self, job: dict[str, Any], *, on_progress: OnProgress | None = None, max_seconds: float | None = None
    ) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        left = False

        def relay(*progress: Any) -> None:
            done: concurrent.futures.Future[None] = concurrent.futures.Future()

            def call() -> None:
                try:
                    if on_progress is not None and not left:
                        on_progress(*progress)
                except BaseException as error:
                    done.set_exception(error)
                else:
                    done.set_result(None)

            loop.call_soon_threadsafe(call)
            done.result()
            if left:
                raise concurrent.futures.CancelledError  # ends the thread

        try:
            return await _in_thread(partial(self._client.wait, job, on_progress=relay, max_seconds=max_seconds))
        finally:
            left = True

    async def job(self, job_id: str) -> dict[str, Any]:
        return await _in_thread(partial(self._client.job, job_id))

    async def cancel(self, job_id: str) -> dict[str, Any]:
        return await _in_thread(partial(self._client.cancel, job_id))

    async def download_file(self, url: str, output_path: str | os.PathLike[str]) -> Path:
        return await _in_thread(partial(self._client.download_file, url, output_path))

    async def delete_outputs(self, job_id: str) -> None:
        await _in_thread(partial(self._client.delete_outputs, job_id))

    async def health(self) -> dict[str, Any]:
        return await _in_thread(self._client.health)


async def _in_thread(call: Callable[[], T]) -> T:
    """Await a call that blocks. Unlike asyncio's pool, any number go on at once, and none keeps the program alive."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def tell(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        def set_unless_cancelled() -> None:
            if not future.done():
                set_outcome(outcome)

        with suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(set_unless_cancelled)

    def run() -> None:
        try:
            tell(future.set_result, call())
        except BaseException as error:
            tell(future.set_exception, error)

    threading.Thread(target=run, daemon=True).start()
    return await future


@contextmanager
def _local(target: Path) -> Iterator[None]:
    """Keep what is wrong with a file of the caller apart from what is wrong with the connection."""
    try:
        yield
    except OSError as error:
        raise TRELLIS2Error(0, f"{target} cannot be written: {error.strerror}") from error


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


def _progress(job: dict[str, Any]) -> tuple[str, int, int, float]:
    if job["status"] == "running":
        return job["stage"] or "started", job["step"] or 0, job["steps"] or 0, job["progress"]
    if job["status"] == "queued":
        return "queued", 0, job["queue_position"] or 0, 0.0
    return job["status"], 1, 1, job["progress"]


def _refusal(response: http.client.HTTPResponse) -> TRELLIS2Error:
    """The error that an answer means, with the sentence of the service, or what HTTP calls the status."""
    default = BadRequest if response.status < 500 else ServiceFailed
    detail = f"{response.status} {response.reason}"
    if 300 <= response.status < 400:
        detail += f"; the service is at {response.headers.get('Location')}"
    with suppress(ValueError, KeyError, AttributeError):
        answer = json.loads(response.read())
        detail = str(answer.get("detail") or answer["message"])
    return _BY_STATUS.get(response.status, default)(response.status, detail)


def _asked_pause(retry_after: str | None, default: float) -> float:
    """Seconds that a Retry-After asks for: a number, or a date."""
    if retry_after is None:
        return default
    if retry_after.isdecimal():
        return float(retry_after)
    with suppress(ValueError):
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    return default


def show(stage: str, step: int, steps: int, fraction: float) -> None:
    place = f"place {steps}" if stage == "queued" else f"{step}/{steps}"
    sys.stderr.write(f"\r{fraction:4.0%} {f'{stage} {place}':<30}")


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000"
    picture = sys.argv[2] if len(sys.argv) > 2 else EXAMPLE
    client = TRELLIS2Client(url, os.environ.get("TRELLIS2_API_KEY"))
    try:
        result = client.image_to_3d(picture, on_progress=show, seed=42, pipeline_type="512", texture_size=1024)
        sys.stderr.write("\n")
        for address, name in ((result["model_url"], "output.glb"), (result["video_url"], "output.mp4")):
            sys.stdout.write(f"{client.download_file(address, name)}\n")
    except (TRELLIS2Error, OSError) as error:
        sys.exit(f"client_examples.py: {error}")
    except KeyboardInterrupt:
        sys.stderr.write("\ncancelled\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
