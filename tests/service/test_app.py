"""The documented contract and what goes beyond it, through the real application with the tiny checkpoint."""

from __future__ import annotations

import io
import json
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from service_client import LONG, StartService, job_after, submit

from trellis2.export import read_glb
from trellis2.image import MAX_BYTES
from trellis2.options import option_specs

DOCUMENTED_ANSWER = ["job_id", "status", "message", "video_url", "model_url", "preview_image_url"]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def uploads(client: TestClient) -> list[str]:
    return [path.name for path in client.app.state.settings.data.glob("uploads/*")]  # type: ignore[attr-defined]


# The documented contract


def test_health(service: TestClient) -> None:
    answer = service.get("/health")
    assert answer.status_code == 200
    assert answer.json() == {"status": "healthy", "message": "Model loaded and ready", "model_loaded": True}


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_the_pages_of_the_documentation(service: TestClient, path: str) -> None:
    page = service.get(path)
    assert page.status_code == 200
    assert "openapi.json" in page.text


def test_the_parameters_are_the_table_of_options(service: TestClient) -> None:
    document = service.get("/openapi.json").json()
    body = document["paths"]["/api/v1/image-to-3d"]["post"]["requestBody"]
    fields = body["content"]["multipart/form-data"]["schema"]["properties"]
    specs = {s.name: s for s in option_specs() if s.documented and s.name != "return_no_background"}
    assert list(fields) == ["image", *specs, "wait", "webhook", "webhook_events"]
    assert len(specs) + 1 == 15
    assert "securitySchemes" not in document["components"]
    for name, spec in specs.items():
        assert fields[name]["default"] == spec.default
        low, high = (-(2**63) + 1, 2**63 - 1) if name == "seed" else (spec.ge, spec.le)
        assert fields[name].get("minimum") == low
        assert fields[name].get("maximum") == high
        assert tuple(fields[name].get("enum", ())) == (spec.choices or ())


@pytest.fixture(scope="module")
def everything(service: TestClient, picture: bytes) -> Any:
    answer = submit(service, picture, generate_video="true", generate_model="true", seed="7")
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_documented_answer(everything: Any) -> None:
    assert list(everything)[:6] == DOCUMENTED_ANSWER
    job_id = everything["job_id"]
    assert str(uuid.UUID(job_id)) == job_id
    assert everything["status"] == "completed"
    assert everything["message"] == "3D generation completed successfully"
    assert everything["video_url"] == f"/api/v1/outputs/{job_id}/output.mp4"
    assert everything["model_url"] == f"/api/v1/outputs/{job_id}/output.glb"
    assert everything["preview_image_url"] == f"/api/v1/outputs/{job_id}/preview.png"
    assert everything["seed"] == 7
    assert {"structure", "shape", "texture", "model", "video"} <= everything["timings"].keys()


def test_the_files(service: TestClient, everything: Any, tmp_path: Path) -> None:
    model = service.get(everything["model_url"])
    assert model.headers["content-type"] == "model/gltf-binary"
    (tmp_path / "output.glb").write_bytes(model.content)
    assert read_glb(tmp_path / "output.glb")[0]["asset"]["extras"]["seed"] == 7
    video = service.get(everything["video_url"])
    assert video.headers["content-type"] == "video/mp4"
    with av.open(io.BytesIO(video.content)) as container:
        assert len(list(container.decode(video=0))) == 4
    preview = service.get(everything["preview_image_url"])
    assert preview.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(preview.content)).mode == "RGBA"
    part = service.get(everything["video_url"], headers={"Range": "bytes=0-3"})
    assert (part.status_code, part.content) == (206, video.content[:4])
    assert uploads(service) == []


def test_delete(service: TestClient, picture: bytes) -> None:
    job = submit(service, picture).json()
    assert (job["video_url"], job["model_url"]) == (None, None)
    assert service.get(job["preview_image_url"]).status_code == 200
    answer = service.delete(f"/api/v1/outputs/{job['job_id']}")
    assert answer.json() == {"job_id": job["job_id"], "message": "All output files of the job are deleted"}
    assert service.get(job["preview_image_url"]).status_code == 404
    assert service.get(f"/api/v1/jobs/{job['job_id']}").json()["preview_image_url"] is None
    data: Path = service.app.state.settings.data  # type: ignore[attr-defined]
    assert not (data / "outputs" / job["job_id"]).exists()


def test_a_picture_without_an_object_previews_as_it_is(service: TestClient) -> None:
    stripes = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    answer = submit(service, png(stripes), preprocess_image="false")
    assert answer.status_code == 200, answer.text
    preview = service.get(answer.json()["preview_image_url"])
    assert Image.open(io.BytesIO(preview.content)).size == (64, 64)


def test_a_random_seed_is_reported(service: TestClient, picture: bytes) -> None:
    seeds = {submit(service, picture, randomize_seed="true").json()["seed"] for _ in range(2)}
    assert len(seeds) == 2


# What cannot be used


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"texture_size": "100"}, "texture_size=100 must be a whole number from 1024 to 8192."),
        ({"shape_slat_cfg": "nan"}, "shape_slat_cfg='nan' must be a number from 0 to 15."),
        ({"shape_slat_cfg": "1e999"}, "shape_slat_cfg=inf must be a number from 0 to 15."),
        ({"seed": "seven"}, "seed='seven' must be a whole number"),
        ({"seed": ""}, "seed='' must be a whole number"),
        ({"seed": "1_000"}, "seed='1_000' must be a whole number"),
        ({"pipeline_type": ""}, "pipeline_type='' must be one of '512'"),
        ({"pipeline_type": "2048"}, "pipeline_type='2048' must be one of '512'"),
        ({"generate_video": "perhaps"}, "generate_video='perhaps' must be true or false."),
        ({"wait": "perhaps"}, "wait='perhaps' must be true or false."),
        ({"textur_size": "1024"}, "'textur_size' is not a parameter; they are image, seed,"),
    ],
)
def test_a_wrong_parameter_is_named(service: TestClient, picture: bytes, fields: dict[str, str], sentence: str) -> None:
    answer = submit(service, picture, **fields)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(sentence)


def test_a_missing_picture(service: TestClient) -> None:
    answer = service.post("/api/v1/image-to-3d", files={"seed": (None, "1")})
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("image is missing;")


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ([("image", ("a.png", b"no picture"))], "The picture is a text, not a PNG,"),
        ([("image", ("a.png", b""))], "The picture is empty;"),
        ([("seed", ("a.png", b"1")), ("image", (None, b"1"))], "seed is a file;"),
        ([("seed", (None, b"1")), ("seed", (None, b"2"))], "seed is given twice;"),
        ([("image", (None, b"text"))], "image is missing;"),
    ],
)
def test_a_wrong_form(service: TestClient, files: Any, sentence: str) -> None:
    answer = service.post("/api/v1/image-to-3d", files=files)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(sentence)
    assert uploads(service) == []


def test_too_many_pixels(service: TestClient) -> None:
    answer = submit(service, png(Image.new("1", (8000, 6000))))
    assert answer.status_code == 422
    assert "8000 x 6000 pixels, 48 megapixels" in answer.json()["detail"]


def test_too_many_bytes(service: TestClient) -> None:
    large = bytes(MAX_BYTES + 2**21)
    answer = service.post("/api/v1/image-to-3d", files={"image": ("a.png", large)})
    assert answer.status_code == 413
    assert "more than the 51 MB" in answer.json()["detail"]

    def chunks() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        yield from (large[i : i + 2**20] for i in range(0, len(large), 2**20))

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    unannounced = service.post("/api/v1/image-to-3d", content=chunks(), headers=headers)
    assert unannounced.status_code == 413
    slightly = service.post("/api/v1/image-to-3d", files={"image": ("a.png", large[: MAX_BYTES + 1])})
    assert slightly.status_code == 413
    assert slightly.json()["detail"].startswith("The picture has more than the 50 MB")


@pytest.mark.parametrize("kind", ["application/json", "application/x-www-form-urlencoded"])
def test_only_multipart_is_read(service: TestClient, kind: str) -> None:
    answer = service.post("/api/v1/image-to-3d", content=b"{}", headers={"Content-Type": kind})
    assert answer.status_code == 415
    assert kind in answer.json()["detail"]


def test_a_picture_of_nothing_fails_the_job(service: TestClient) -> None:
    answer = submit(service, png(Image.new("RGB", (64, 64), "red")))
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("The picture shows a single colour;")
    job = service.get(f"/api/v1/jobs/{answer.json()['job_id']}").json()
    assert (job["status"], job["error"]) == ("failed", answer.json()["detail"])


# Jobs


@pytest.mark.parametrize("how", [{"wait": "false"}, {"headers": {"Prefer": "respond-async"}}])
def test_a_job_goes_on_by_itself(service: TestClient, picture: bytes, how: Any) -> None:
    answer = submit(service, picture, **how)
    assert answer.status_code == 202
    assert answer.headers.get("Preference-Applied") == ("respond-async" if "headers" in how else None)
    assert answer.headers["Location"] == f"/api/v1/jobs/{answer.json()['job_id']}"
    job = job_after(service, answer.json()["job_id"], "completed")
    assert job["progress"] == 1.0
    assert job["created_at"] <= job["started_at"] <= job["finished_at"]


def test_events_tell_the_progress(service: TestClient, picture: bytes) -> None:
    fields = LONG | {"generate_model": "true", "wait": "false"}
    job_id = submit(service, picture, **fields).json()["job_id"]
    stream = service.get(f"/api/v1/jobs/{job_id}/events")
    assert stream.headers["content-type"].startswith("text/event-stream")
    events = [dict(line.split(": ", 1) for line in text.splitlines()) for text in stream.text.split("\n\n") if text]
    assert {event["event"] for event in events} == {"job"}
    jobs = [json.loads(event["data"]) for event in events]
    progress = [job["progress"] for job in jobs]
    assert progress == sorted(progress)
    assert jobs[-1]["status"] == "completed"
    running = [job for job in jobs if job["stage"] is not None]
    assert len({job["stage"] for job in running}) >= 2
    assert len(running) >= 4
    assert all(0 <= job["step"] <= job["steps"] for job in running)
    again = service.get(f"/api/v1/jobs/{job_id}/events", headers={"Last-Event-ID": events[-1]["id"]})
    assert again.status_code == 204


def test_cancel_and_the_queue(service: TestClient, picture: bytes) -> None:
    running, second, third = (submit(service, picture, **(LONG | {"wait": "false"})).json()["job_id"] for _ in range(3))
    while service.get(f"/api/v1/jobs/{running}").json()["stage"] != "structure":
        time.sleep(0.01)
    assert service.get(f"/api/v1/jobs/{third}").json()["queue_position"] == 2
    cancelled = service.post(f"/api/v1/jobs/{second}/cancel").json()
    assert (cancelled["status"], cancelled["queue_position"]) == ("cancelled", None)
    assert service.get(f"/api/v1/jobs/{third}").json()["queue_position"] == 1
    assert service.delete(f"/api/v1/outputs/{running}").status_code == 409
    assert service.post(f"/api/v1/jobs/{running}/cancel").json()["cancelling"] is True
    start = time.monotonic()
    job_after(service, running, "cancelled")
    assert time.monotonic() - start < 2  # it had 150 steps to go
    assert service.post(f"/api/v1/jobs/{running}/cancel").json()["status"] == "cancelled"
    service.post(f"/api/v1/jobs/{third}/cancel")
    job_after(service, third, "cancelled")
    assert submit(service, picture).json()["status"] == "completed"
    assert uploads(service) == []


def test_who_waits_for_a_cancelled_job_hears_of_it(service: TestClient, picture: bytes) -> None:
    key = {"Idempotency-Key": "waits"}
    job_id = submit(service, picture, headers=key, **(LONG | {"wait": "false"})).json()["job_id"]
    service.post(f"/api/v1/jobs/{job_id}/cancel")
    answer = submit(service, picture, headers=key, **LONG)
    assert (answer.status_code, answer.json()) == (409, {"detail": "The job was cancelled.", "job_id": job_id})


def test_a_key_makes_a_request_safe_to_repeat(service: TestClient, picture: bytes) -> None:
    key = {"Idempotency-Key": "once"}
    first, second = (submit(service, picture, headers=key).json() for _ in range(2))
    assert first == second
    other = submit(service, picture, headers=key, seed="8")
    assert other.status_code == 422
    assert "Idempotency-Key" in other.json()["detail"]
    assert uploads(service) == []


def test_the_list(service: TestClient, picture: bytes) -> None:
    newest = [submit(service, picture).json()["job_id"] for _ in range(2)][::-1]
    pages = []
    address: str | None = "/api/v1/jobs?limit=1&status=completed"
    while address is not None and len(pages) < 2:
        page = service.get(address).json()
        pages += [job["job_id"] for job in page["jobs"]]
        address = page["next"]
    assert pages == newest
    everything = service.get("/api/v1/jobs?limit=100").json()
    assert everything["next"] is None
    assert {"completed", "failed", "cancelled"} >= {job["status"] for job in everything["jobs"]}
    assert service.get("/api/v1/jobs?limit=1000").json()["detail"].startswith("limit: ")


def test_metrics(service: TestClient, picture: bytes) -> None:
    def completed() -> int:
        found = re.search(r'^trellis2_jobs_total\{status="completed"\} (\d+)$', service.get("/metrics").text, re.M)
        assert found is not None
        return int(found[1])

    before = completed()
    submit(service, picture)
    assert completed() == before + 1


def test_an_unexpected_error_tells_nothing(service: TestClient, picture: bytes) -> None:
    blocker = submit(service, picture, **(LONG | {"wait": "false"})).json()["job_id"]
    job_id = submit(service, picture, wait="false").json()["job_id"]
    data: Path = service.app.state.settings.data  # type: ignore[attr-defined]
    (data / "uploads" / job_id).unlink()
    service.post(f"/api/v1/jobs/{blocker}/cancel")
    error = job_after(service, job_id, "failed")["error"]
    assert error == "The generation failed unexpectedly; the log of the service has the details under this job's id."


# Security


@pytest.mark.parametrize(
    "path", ["../../jobs.sqlite3", "..%2f..%2fjobs.sqlite3", "%2e%2e/%2e%2e/jobs.sqlite3", "output.glb%00", "x"]
)
def test_only_files_of_the_job_are_given(service: TestClient, everything: Any, path: str) -> None:
    assert service.get(f"/api/v1/outputs/{everything['job_id']}/{path}").status_code == 404
    assert service.get(f"/api/v1/outputs/{path}/output.glb").status_code == 404


def test_every_answer_has_the_security_headers(service: TestClient) -> None:
    for path in ("/health", "/api/v1/jobs/x", "/docs"):
        headers = service.get(path, headers={"Origin": "https://elsewhere.example"}).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'")
        assert ("script-src" in policy) == (path == "/docs")
        assert "frame-ancestors 'none'" in policy
        assert not any(name.startswith("access-control") for name in headers)


def test_keys_and_origins(start_service: StartService, tmp_path: Path, picture: bytes) -> None:
    keys = {"api_keys": ("first", "zweiter-schlüssel"), "cors_origins": ("https://page.example",)}
    first, second = ({"Authorization": f"Bearer {key}".encode()} for key in keys["api_keys"])
    with start_service(tmp_path, **keys) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first"}):
            for answer in (submit(client, picture, headers=headers), client.get("/api/v1/jobs", headers=headers)):
                assert answer.status_code == 401
                assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert client.get("/metrics").status_code == 401
        assert client.get("/openapi.json").json()["paths"]["/metrics"]["get"]["security"]
        job = submit(client, picture, headers=first).json()  # type: ignore[arg-type]
        assert job["status"] == "completed"
        for path in (f"/api/v1/jobs/{job['job_id']}", job["preview_image_url"]):
            assert client.get(path, headers=first).status_code == 200
            assert client.get(path, headers=second).status_code == 404
            assert client.get(path).status_code == 401
        assert client.get("/api/v1/jobs", headers=second).json() == {"jobs": [], "next": None}
        page = {"Origin": "https://page.example", "Sec-Fetch-Site": "cross-site"}
        assert client.get("/health", headers=page).headers["Access-Control-Allow-Origin"] == "https://page.example"
        assert submit(client, picture, headers=page).status_code == 401
        other = {"Origin": "https://other.example", "Sec-Fetch-Site": "cross-site"}
        assert submit(client, picture, headers=other).status_code == 403


def test_pages_of_other_sites_may_not_use_it(service: TestClient, picture: bytes) -> None:
    for site, code in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
        answer = submit(service, picture, headers={"Sec-Fetch-Site": site, "Origin": "https://x.example"})
        assert answer.status_code == code


# Bounds


def test_the_queue_is_bounded(start_service: StartService, tmp_path: Path, picture: bytes) -> None:
    long = LONG | {"wait": "false"}
    with start_service(tmp_path, queue_limit=1) as client:
        running = submit(client, picture, **long).json()["job_id"]
        job_after(client, running, "running")
        key = {"Idempotency-Key": "a"}
        waiting = submit(client, picture, headers=key, **long).json()
        assert waiting["status"] == "queued"
        for headers in ({}, {"Idempotency-Key": "b"}):
            refused = submit(client, picture, headers=headers, **long)
            assert refused.status_code == 429
            assert int(refused.headers["Retry-After"]) > 0
        assert submit(client, picture, headers=key, **long).json()["job_id"] == waiting["job_id"]
        assert set(uploads(client)) == {running, waiting["job_id"]}


def test_a_job_that_takes_too_long_is_stopped(start_service: StartService, tmp_path: Path, picture: bytes) -> None:
    with start_service(tmp_path, job_seconds=0.3) as client:
        start = time.monotonic()
        answer = submit(client, picture, **LONG)
        assert time.monotonic() - start < 3
        assert answer.status_code == 504
        assert answer.json()["detail"].startswith("The job took longer than the 0.3 seconds that are allowed;")
        job = client.get(f"/api/v1/jobs/{answer.json()['job_id']}").json()
        assert (job["status"], job["error"]) == ("failed", answer.json()["detail"])
        assert uploads(client) == []


def test_a_preset_that_does_not_fit_is_refused(
    service: TestClient, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = {"Idempotency-Key": "fits"}
    job = submit(service, picture, headers=key).json()
    monkeypatch.setattr("trellis2.service.capacity.host_memory", lambda _: 3 * 10**9)
    answer = submit(service, picture, pipeline_type="1536_cascade")
    assert answer.status_code == 503
    assert answer.json()["detail"] == (
        "pipeline_type='1536_cascade' needs 4.0 GB of memory, and there are 3.0; choose pipeline_type='1024_cascade'."
    )
    monkeypatch.setattr("trellis2.service.capacity.host_memory", lambda _: 0)
    assert submit(service, picture, headers=key).json()["job_id"] == job["job_id"]
    assert submit(service, picture).status_code == 503


def test_the_time_left(start_service: StartService, tmp_path: Path, picture: bytes) -> None:
    fields = LONG | {"wait": "false"}
    for _ in range(2):  # a restart forgets nothing
        with start_service(tmp_path) as client:
            first = submit(client, picture, **fields).json()
            if not client.get("/api/v1/jobs?status=completed").json()["jobs"]:
                assert first["estimated_seconds_left"] is None
                job_after(client, first["job_id"], "completed")
                continue
            second = submit(client, picture, **fields).json()
            unlike = submit(client, picture, **(fields | {"pipeline_type": "1024"})).json()
            assert 0 < first["estimated_seconds_left"] < second["estimated_seconds_left"]
            assert unlike["estimated_seconds_left"] is None
            ended = job_after(client, first["job_id"], "completed")
            assert ended["estimated_seconds_left"] is None


def test_old_files_are_removed(start_service: StartService, tmp_path: Path, picture: bytes) -> None:
    with start_service(tmp_path, keep_gigabytes=1e-9) as client:
        first, second, newest = (submit(client, picture).json() for _ in range(3))
        assert client.get(f"/api/v1/jobs/{first['job_id']}").status_code == 404
        assert client.get(first["preview_image_url"]).status_code == 404
        while client.get(second["preview_image_url"]).status_code != 404:
            time.sleep(0.01)  # just after the newest has ended
        assert client.get(newest["preview_image_url"]).status_code == 200
        assert [path.name for path in (tmp_path / "outputs").iterdir()] == [newest["job_id"]]


def test_a_full_disk_is_said_and_survived(start_service: StartService, tmp_path: Path, picture: bytes) -> None:
    with start_service(tmp_path, queue_limit=1000) as client:
        store = client.app.state.service.store  # type: ignore[attr-defined]
        (pages,) = store._db.execute("PRAGMA page_count").fetchone()
        store._db.execute(f"PRAGMA max_page_count = {pages}")  # what SQLite says then is what it says of a full disk
        accepted = []
        while (answer := submit(client, picture, wait="false")).status_code == 202:
            accepted.append(answer.json()["job_id"])
        assert answer.status_code == 503
        assert answer.json() == {"detail": "The service has no room left on its disk; try again later."}
        assert client.get("/livez").status_code == 200
        store._db.execute("PRAGMA max_page_count = 1000000")
        for job_id in accepted:
            job_after(client, job_id, "completed")
        assert submit(client, picture).status_code == 200
        assert uploads(client) == []


def test_a_model_that_is_missing_is_named(start_service: StartService, tmp_path: Path, picture: bytes) -> None:
    nowhere = tmp_path / "nowhere"
    with start_service(tmp_path / "data", model=nowhere, loaded=False) as client:
        health = client.get("/health")
        assert health.status_code == 503
        assert health.json()["status"] == "unhealthy"
        ready = client.get("/readyz")
        assert ready.status_code == 503
        assert str(nowhere) in ready.json()["missing"][0]
        assert client.get("/livez").status_code == 200
        answer = submit(client, picture)
        assert (answer.status_code, answer.json()["detail"]) == (503, ready.json()["missing"][0])
