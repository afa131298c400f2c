"""The client files against a service that runs, and against one that misbehaves."""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from service_client import PICTURE, ROOT, Running, started

import client_examples
from client_examples import (
    AsyncTRELLIS2Client,
    BadRequest,
    Busy,
    JobCancelled,
    JobFailed,
    NotFound,
    ServiceFailed,
    TookTooLong,
    TRELLIS2Client,
    TRELLIS2Error,
    Unauthorized,
    Unavailable,
    Unreachable,
)
from trellis2.export import read_glb

SMALL: dict[str, Any] = {
    "pipeline_type": "512",
    "sparse_structure_steps": 1,
    "shape_slat_steps": 1,
    "tex_slat_steps": 1,
    "generate_video": False,
    "decimation_target": 100_000,
    "texture_size": 1024,
}
QUICK = SMALL | {"generate_model": False}
SLOW = QUICK | {"sparse_structure_steps": 50, "shape_slat_steps": 50, "tex_slat_steps": 50}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with started(tmp_path_factory.mktemp("clients"), ROOT / "weights" / "embedded", "api.py") as running:
        yield running


def newest(client: TRELLIS2Client) -> Any:
    return client._json("GET", "/api/v1/jobs?limit=1")["jobs"][0]


# With the service


def test_progress_comes_through_the_event_stream(
    service: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    polls: list[str] = []
    ask = TRELLIS2Client.job
    monkeypatch.setattr(TRELLIS2Client, "job", lambda self, job_id: polls.append(job_id) or ask(self, job_id))
    seen: list[tuple[str, int, int, float]] = []
    result = service.client.image_to_3d(PICTURE, on_progress=lambda *now: seen.append(now), seed=5, **SMALL)
    assert seen[0][0] in ("queued", "started", "prepare")
    assert seen[-1] == ("completed", 1, 1, 1.0)
    assert {"shape", "texture", "model"} <= {stage for stage, *_ in seen}
    assert [fraction for *_, fraction in seen] == sorted(fraction for *_, fraction in seen)
    assert polls == []
    assert service.client.download_file(result["model_url"], tmp_path / "a.glb") == tmp_path / "a.glb"
    assert read_glb(tmp_path / "a.glb")[0]["asset"]["extras"]["seed"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["a.glb"]


def test_polling_where_streams_do_not_come_through(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: TRELLIS2Client, job_id: str, quiet: float) -> Iterator[None]:
        raise ConnectionResetError
        yield

    monkeypatch.setattr(TRELLIS2Client, "_events", broken)
    monkeypatch.setattr(client_examples, "POLL_SECONDS", 0.02)
    seen: list[str] = []
    wishes = SLOW | {"shape_slat_steps": 1, "tex_slat_steps": 1}
    service.client.image_to_3d(PICTURE, on_progress=lambda *now: seen.append(now[0]), **wishes)
    assert "structure" in seen
    assert seen[-1] == "completed"


def test_what_on_progress_raises_cancels_the_job(service: Running) -> None:
    def interrupt(stage: str, step: int, steps: int, fraction: float) -> None:
        if stage == "structure":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        service.client.image_to_3d(PICTURE, on_progress=interrupt, **SLOW)
    with pytest.raises(JobCancelled, match="3D generation cancelled"):
        service.client.wait(newest(service.client))


def test_a_job_that_takes_too_long_is_cancelled(service: Running) -> None:
    with pytest.raises(TookTooLong, match=r"The job is (queued|running) after 0\.3 seconds\."):
        service.client.image_to_3d(PICTURE, max_seconds=0.3, **SLOW)
    with pytest.raises(JobCancelled):
        service.client.wait(newest(service.client))


def test_the_same_key_gets_the_same_job(service: Running) -> None:
    jobs = [service.client.submit(PICTURE, idempotency_key="mine", **QUICK) for _ in range(2)]
    assert jobs[0]["job_id"] == jobs[1]["job_id"]
    assert service.client.wait(jobs[0])["status"] == "completed"
    with pytest.raises(BadRequest, match="Idempotency-Key came with another request"):
        service.client.submit(PICTURE, idempotency_key="mine", seed=9, **QUICK)


def test_errors_have_types_and_the_sentences_of_the_service(service: Running, tmp_path: Path) -> None:
    client = service.client
    with pytest.raises(BadRequest, match=r"texture_size=7 must be a whole number from 1024 to 8192\.") as caught:
        client.submit(PICTURE, texture_size=7)
    assert caught.value.status == 422
    with pytest.raises(NotFound, match="There is no such job"):
        client.cancel("none")
    with pytest.raises(TRELLIS2Error, match="cannot be written: No such file or directory"):
        client.download_file("/health", tmp_path / "missing" / "a.glb")
    with pytest.raises(FileNotFoundError):
        client.image_to_3d(tmp_path / "none.png")
    job = client.image_to_3d(PICTURE, **QUICK)
    client.delete_outputs(job["job_id"])
    with pytest.raises(NotFound, match="The job has no such file"):
        client.download_file(job["preview_image_url"], tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_asyncio(service: Running, tmp_path: Path) -> None:
    async def use() -> None:
        client = AsyncTRELLIS2Client(service.client.base_url)
        assert (await client.health())["model_loaded"]
        loop_thread, seen = threading.get_ident(), []
        results = await asyncio.gather(
            *(
                client.image_to_3d(
                    PICTURE, seed=seed, on_progress=lambda *now: seen.append((threading.get_ident(), *now)), **QUICK
                )
                for seed in (1, 2)
            )
        )
        assert {thread for thread, *_ in seen} == {loop_thread}
        assert seen[-1][1:] == ("completed", 1, 1, 1.0)
        assert [result["seed"] for result in results] == [1, 2]
        path = await client.download_file(results[1]["preview_image_url"], tmp_path / "b.png")
        assert path.read_bytes().startswith(b"\x89PNG")
        await client.delete_outputs(results[0]["job_id"])
        assert (await client.job(results[0]["job_id"]))["preview_image_url"] is None
        with pytest.raises(NotFound):
            await client.cancel("none")
        with pytest.raises(BadRequest, match="texture_size"):
            await client.image_to_3d(PICTURE, texture_size=7)
        with pytest.raises(ZeroDivisionError):
            await client.image_to_3d(PICTURE, on_progress=lambda *now: 1 // 0, **SLOW)
        with pytest.raises(JobCancelled):
            await client.wait(newest(service.client))

    asyncio.run(use())


@pytest.mark.parametrize("seconds", [0.001, 0.5], ids=["while it is sent", "while it runs"])
def test_cancelling_a_task_cancels_its_job(service: Running, seconds: float) -> None:
    async def use() -> None:
        client = AsyncTRELLIS2Client(service.client.base_url)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(client.image_to_3d(PICTURE, seed=77, **SLOW), seconds)

    asyncio.run(use())
    job = newest(service.client)
    assert job["options"]["seed"] == 77
    with pytest.raises(JobCancelled):
        service.client.wait(job)


# With a service that misbehaves


JOB = {"job_id": "j", "status": "completed", "message": "done", "progress": 1.0, "error": None}
RUNNING = JOB | {"status": "running", "stage": "shape", "step": 1, "steps": 2, "progress": 0.5}

Answer = Callable[[Any], None]


def answers(status: int, body: Any, **headers: str) -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in ({"Content_Length": str(len(content))} | headers).items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def hangs_up(handler: Any) -> None:
    handler.close_connection = True


def keeps_silent(handler: Any) -> None:
    time.sleep(1)
    handler.close_connection = True


@contextmanager
def stub(*script: Answer) -> Iterator[tuple[str, list[Any]]]:
    """A service that gives these answers, one per request; yields its address and the requests."""
    requests: list[Any] = []
    left = list(script)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            requests.append((f"{self.command} {self.path}", dict(self.headers)))
            left.pop(0)(self)
            self.close_connection = True

        do_POST = do_GET

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", requests
        finally:
            server.shutdown()
            thread.join()
    assert left == []


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that the client makes, none of which it makes."""
    made: list[float] = []
    monkeypatch.setattr(
        client_examples,
        "time",
        type(
            "Time",
            (),
            {"sleep": made.append, **{name: staticmethod(getattr(time, name)) for name in ("time", "monotonic")}},
        ),
    )
    return made


def test_a_submission_is_retried_with_one_key(pauses: list[float]) -> None:
    script = [hangs_up, answers(503, {"detail": "no room"}), answers(429, {"detail": "full"}, Retry_After="7")]
    with stub(*script, answers(202, JOB)) as (url, requests):
        assert TRELLIS2Client(url, "secret").submit(PICTURE) == JOB
    assert [line for line, _ in requests] == ["POST /api/v1/image-to-3d"] * 4
    assert len({headers["Idempotency-Key"] for _, headers in requests}) == 1
    assert {headers["Authorization"] for _, headers in requests} == {"Bearer secret"}
    assert 0.5 <= pauses[0] <= 1
    assert 1 <= pauses[1] <= 2
    assert pauses[2] == 7


def test_a_retry_after_may_be_a_date_and_is_bounded(pauses: list[float]) -> None:
    date = formatdate(time.time() + 30, usegmt=True)
    script = [answers(429, {}, Retry_After=date), answers(429, {}, Retry_After="9999")]
    script += [answers(503, {}, Retry_After="soon"), answers(200, {})]
    with stub(*script) as (url, _):
        TRELLIS2Client(url).health()
    assert 27 <= pauses[0] <= 30
    assert pauses[1] == client_examples.LONGEST_PAUSE
    assert 2 <= pauses[2] <= 4


@pytest.mark.parametrize(
    ("answer", "kind", "sentence", "requests_made"),
    [
        (answers(429, {"detail": "16 jobs wait already"}), Busy, "16 jobs wait already", 3),
        (answers(503, {"status": "unhealthy", "message": "No model."}), Unavailable, "No model.", 3),
        (answers(502, b"<html>"), Unavailable, "502 Bad Gateway", 3),
        (hangs_up, Unreachable, "does not answer: ", 3),
        (keeps_silent, Unreachable, "does not answer: timed out", 3),
        (answers(200, b'{"status": ', Content_Length="99"), Unreachable, "does not answer: IncompleteRead", 3),
        (answers(401, {"detail": "Send a valid key"}), Unauthorized, "Send a valid key", 1),
        (answers(403, {"detail": "Pages of other sites"}), Unauthorized, "Pages of other sites", 1),
        (answers(404, {"detail": "Not Found"}), NotFound, "Not Found", 1),
        (answers(413, {"detail": "too large"}), BadRequest, "too large", 1),
        (answers(500, {"detail": "failed unexpectedly"}), ServiceFailed, "failed unexpectedly", 1),
        (answers(301, b"", Location="https://there"), BadRequest, "301 .*; the service is at https://there", 1),
        (answers(200, b"<html>"), ServiceFailed, "answers what is not JSON", 1),
    ],
)
def test_every_answer_has_its_error(
    pauses: list[float], answer: Answer, kind: type[TRELLIS2Error], sentence: str, requests_made: int
) -> None:
    with stub(*[answer] * requests_made) as (url, requests):
        with pytest.raises(kind, match=sentence) as caught:
            TRELLIS2Client(url, retries=2, timeout=0.2).health()
        assert type(caught.value) is kind
        assert len(requests) == requests_made
    assert len(pauses) == requests_made - 1


def test_a_large_picture_does_not_hide_the_refusal(tmp_path: Path) -> None:
    def refuse(handler: Any) -> None:
        answers(401, {"detail": "Send a valid key"})(handler)

    picture = tmp_path / "large.png"
    picture.write_bytes(bytes(20_000_000))
    with stub(refuse) as (url, _), pytest.raises(Unauthorized, match="Send a valid key"):
        TRELLIS2Client(url, retries=0).submit(picture)


def test_a_download_that_breaks_off_is_made_again(pauses: list[float], tmp_path: Path) -> None:
    with stub(answers(200, b"hal", Content_Length="8"), hangs_up, answers(200, b"the file")) as (url, _):
        path = TRELLIS2Client(url).download_file("/api/v1/outputs/j/output.glb", tmp_path / "a.glb")
    assert path.read_bytes() == b"the file"
    with stub(answers(200, b"hal", Content_Length="8")) as (url, _), pytest.raises(Unreachable, match="IncompleteRead"):
        TRELLIS2Client(url, retries=0).download_file("/x", tmp_path / "b.glb")
    assert [path.name for path in tmp_path.iterdir()] == ["a.glb"]


def events(*jobs: dict[str, Any]) -> Answer:
    text = "".join(f": still there\n\nid: 1\nevent: job\ndata: {json.dumps(job)}\n\n" for job in jobs)
    return answers(200, text.encode(), Content_Type="text/event-stream")


@pytest.mark.parametrize("stream", [answers(404, {}), answers(200, b"<html>", Content_Type="text/html"), hangs_up])
def test_without_event_streams_the_client_polls(pauses: list[float], stream: Answer) -> None:
    polled = [answer for _ in range(3) for answer in (stream, answers(200, RUNNING))]
    with stub(*polled, answers(200, RUNNING), answers(200, JOB)) as (url, requests):
        assert TRELLIS2Client(url).wait(RUNNING) == JOB
    assert [line for line, _ in requests[-2:]] == ["GET /api/v1/jobs/j"] * 2


def test_a_stream_that_breaks_off_is_opened_again(pauses: list[float]) -> None:
    seen: list[float] = []
    later = RUNNING | {"progress": 0.75}
    script = [events(RUNNING), answers(200, RUNNING), events(RUNNING, later), answers(200, later), events(JOB)]
    with stub(*script) as (url, _):
        assert TRELLIS2Client(url).wait(RUNNING, on_progress=lambda *now: seen.append(now[-1])) == JOB
    assert seen == [0.5, 0.75, 1.0]


def test_a_failed_job_raises_with_its_reason() -> None:
    failed = JOB | {"status": "failed", "error": "The picture shows a single colour."}
    with (
        stub(events(failed)) as (url, _),
        pytest.raises(JobFailed, match=r"^The picture shows a single colour\.$") as e,
    ):
        TRELLIS2Client(url).wait(RUNNING)
    assert type(e.value) is JobFailed
    assert e.value.job == failed


# The shell


def shell(url: str, cwd: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [ROOT / "client_examples.sh", url, *arguments],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def words(parameters: dict[str, Any]) -> list[str]:
    return [f"{name}={str(value).lower()}" for name, value in parameters.items()]


def test_the_shell_takes_parameters(service: Running, tmp_path: Path) -> None:
    script = shell(service.client.base_url, tmp_path, str(PICTURE), *words(SMALL), "seed=9")
    out, err = script.communicate(timeout=60)
    assert script.returncode == 0, out + err
    assert "100% 3D generation completed successfully" in out
    assert read_glb(tmp_path / "output.glb")[0]["asset"]["extras"]["seed"] == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output.glb", "preview.png"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_shell_cancels_when_it_is_interrupted(
    service: Running, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    script = shell(service.client.base_url, tmp_path, str(PICTURE), *words(SLOW))
    assert script.stdout is not None
    while "running: structure" not in script.stdout.readline():
        assert script.poll() is None
    script.send_signal(number)
    _, err = script.communicate(timeout=20)
    assert script.returncode == code
    job_id = re.search("Cancelled (.*)\\.", err)
    assert job_id is not None, err
    with pytest.raises(JobCancelled):
        service.client.wait(service.client.job(job_id.group(1)))


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["texture_size=7"], 2, "422: texture_size=7 must be a whole number from 1024 to 8192."),
        (["texture_size"], 64, "texture_size is not of the form NAME=VALUE"),
    ],
)
def test_the_shell_says_what_is_wrong(
    service: Running, tmp_path: Path, arguments: list[str], code: int, sentence: str
) -> None:
    script = shell(service.client.base_url, tmp_path, str(PICTURE), *arguments)
    _, err = script.communicate(timeout=20)
    assert (script.returncode, err) == (code, f"client_examples.sh: {sentence}\n")


def test_the_shell_tells_a_failed_job_from_a_cancelled_one(service: Running, tmp_path: Path) -> None:
    for status, code in (("failed", 1), ("cancelled", 4)):
        job = JOB | {"status": status, "message": f"3D generation {status}"}
        with stub(answers(200, {}), answers(202, RUNNING), events(job), answers(200, job)) as (url, _):
            script = shell(url, tmp_path, str(PICTURE))
            _, err = script.communicate(timeout=20)
        assert (script.returncode, err) == (code, f"client_examples.sh: 3D generation {status}\n")


def test_the_shell_tries_again(tmp_path: Path) -> None:
    busy = answers(429, {"detail": "full"}, Retry_After="1")
    refused = answers(401, {"detail": "Send a valid key"})
    with stub(busy, answers(200, {}), busy, refused) as (url, requests):
        script = shell(url, tmp_path, str(PICTURE), TRELLIS2_API_KEY="k y")
        _, err = script.communicate(timeout=20)
    assert (script.returncode, err) == (2, "client_examples.sh: 401: Send a valid key\n")
    assert {headers["Authorization"] for _, headers in requests} == {"Bearer k y"}
    assert requests[2][1]["Idempotency-Key"] == requests[3][1]["Idempotency-Key"]


def test_python_says_what_is_wrong(tmp_path: Path) -> None:
    with stub(answers(401, {"detail": "Send a valid key"})) as (url, _):
        command = [sys.executable, ROOT / "client_examples.py", url, PICTURE]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stderr) == (1, "client_examples.py: Send a valid key\n")
