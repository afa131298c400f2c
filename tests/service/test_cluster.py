"""Workers on other machines: the lease of a job, the choice of a GPU, and the whole way through Redis and S3."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from redis import Redis
from redis_server import RedisServer, redis_server
from service_client import LONG, PICTURE, QUICK, ROOT, StartService, job_after, started, submit

from client_examples import JobFailed, TRELLIS2Client, TRELLIS2Error
from trellis2.errors import CapacityError, InputError
from trellis2.export import read_glb
from trellis2.service.broker import ENDED, EVENTS, Lease, connected, key
from trellis2.service.jobs import JobStore
from trellis2.service.remote_worker import take_gpu
from trellis2.service.settings import Settings
from trellis2.service.storage import FILES, Folder, ObjectStore, StorageError, open_storage

JOB = "6f0e1fd0-22a8-4f8c-9d3c-0a5f9a3f0f11"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def redis(server: RedisServer) -> Iterator[Redis]:
    with connected(Settings(redis=server.url)) as client:
        client.flushdb()
        yield client


def events(redis: Redis) -> list[tuple[str, int]]:
    return [(event["event"], event["attempt"]) for event in map(json.loads, redis.lrange(EVENTS, 0, -1))]


# The lease


def test_one_worker_has_a_job(redis: Redis) -> None:
    first, second = (Lease(redis, name, JOB, 1, 60) for name in ("first", "second"))
    assert not first.claim()  # nobody sent it
    redis.set(key("attempt", JOB), 1)
    assert first.claim()
    assert not second.claim()
    assert not first.claim()  # the same message, delivered again
    assert events(redis) == [("started", 1)]
    assert first.renew('{"stage": "shape"}') == "held"
    assert redis.get(key("live", JOB)) == '{"stage": "shape"}'
    redis.set(key("cancel", JOB), 1)
    assert first.renew("") == "cancel"
    assert first.report(ENDED, outcome={"status": "cancelled"})
    assert events(redis) == [("started", 1), ("ended", 1)]
    assert first.renew("") == "lost"
    redis.delete(key("lease", JOB))
    assert not second.claim()  # it has ended


def test_who_was_thought_dead_can_neither_go_on_nor_report(redis: Redis) -> None:
    old, new = (Lease(redis, name, JOB, attempt, 60) for name, attempt in (("old", 1), ("new", 2)))
    redis.set(key("attempt", JOB), 1)
    assert old.claim()
    redis.delete(key("lease", JOB))  # it expired
    redis.set(key("attempt", JOB), 2)
    assert old.renew("") == "lost"
    assert new.claim()
    assert old.renew("") == "lost"
    assert not old.report(ENDED, outcome={})
    assert new.renew("") == "held"
    assert events(redis) == [("started", 1), ("started", 2)]


def test_a_lease_expires(redis: Redis) -> None:
    redis.set(key("attempt", JOB), 1)
    assert Lease(redis, "first", JOB, 1, 0.05).claim()
    time.sleep(0.1)
    assert Lease(redis, "second", JOB, 1, 60).claim()


def test_a_redis_that_lost_everything_is_told_again(redis: Redis) -> None:
    lease = Lease(redis, "first", JOB, 3, 60)
    redis.set(key("attempt", JOB), 3)
    assert lease.claim()
    redis.flushdb()
    assert lease.renew("") == "held"
    assert redis.get(key("attempt", JOB)) == "3"
    assert not Lease(redis, "second", JOB, 3, 60).claim()
    redis.flushdb()
    assert lease.report(ENDED, outcome={})
    assert events(redis) == [("ended", 3)]


# The GPU


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        "echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aa11)'\n"
        "echo 'GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bb22)'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # restored afterwards
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")


@pytest.mark.usefixtures("machine")
def test_each_worker_takes_a_gpu_of_its_own(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name in ("first", "second"):
        taken.append(take_gpu(redis, name, 60))
        assert os.environ["CUDA_VISIBLE_DEVICES"] == taken[-1]
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert taken == ["GPU-aa11", "GPU-bb22"]
    redis.pexpire("trellis2:gpu:GPU-bb22", 300)  # its worker was killed
    assert take_gpu(redis, "third", 60) == "GPU-bb22"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(CapacityError, match=r"Each of the 2 GPUs of this machine has a worker;"):
        take_gpu(redis, "fourth", 0.01)


@pytest.mark.usefixtures("machine")
def test_a_gpu_that_was_chosen_is_used(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert take_gpu(redis, "first", 60) is None
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert redis.keys() == []


# The store of files


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address in a stand-in for S3; the environment tells where that is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("s3") / "log").open("wb")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=log, stderr=log)
    log.close()
    address = f"http://127.0.0.1:{port}"
    try:
        request = urllib.request.Request(f"{address}/bucket", method="PUT")
        while True:
            assert process.poll() is None
            try:
                urllib.request.urlopen(request).close()
                break
            except OSError:
                time.sleep(0.05)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", address)
            patch.setenv("AWS_ACCESS_KEY_ID", "key")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            yield "s3://bucket/some/folder"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    address = "memory://files" if request.param == "memory" else request.getfixturevalue("bucket")
    found = open_storage(tmp_path, address)
    assert isinstance(found, ObjectStore)
    return found


def test_an_object_store_has_the_files_of_jobs(store: ObjectStore) -> None:
    waiting, running, done, stray = (f"{JOB[:-1]}{digit}" for digit in "2345")
    for job_id in (waiting, running, stray):
        store.keep_upload(job_id, b"picture")
    for job_id in (done, stray):
        folder = store.work(job_id)
        (folder / "output.glb").write_bytes(b"glTF 123")
        (folder / "notes.txt").write_bytes(b"not published")
        assert store.publish(job_id, folder) == {"output.glb": 8}
        assert not folder.exists()
    assert store.upload(waiting) == b"picture"
    assert (store.size(done), store.output_size(done, "output.glb")) == (8, 8)
    assert store.read(done, "output.glb", 5, 7) == b"12"
    kept = store.work(running)
    store.work(waiting)
    store.remove_strays({waiting}, {running}, {done})
    assert sorted(store._names("uploads")) == [waiting, running]
    assert [path for path in store.works.iterdir()] == [kept]
    assert (store.size(done), store.size(stray)) == (8, 0)
    store.close(running)
    store.delete_outputs(done)
    store.delete_outputs(done)
    assert store.size(done) == 0
    with pytest.raises(FileNotFoundError):
        store.output_size(done, "output.glb")
    with pytest.raises(FileNotFoundError):
        store.upload(running)


def test_a_store_that_cannot_be_written_is_named(bucket: str, tmp_path: Path) -> None:
    for address in ("s3://no-such-bucket-here/folder", "unknown://somewhere"):
        with pytest.raises(InputError, match="cannot be written"):
            open_storage(tmp_path, address)


def test_a_store_that_fails_says_so_without_a_name(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the bucket is gone\nand more")

    monkeypatch.setattr(store._fs, "pipe_file", fail)
    with pytest.raises(StorageError, match=r"^the bucket is gone$"):
        store.keep_upload(JOB, b"picture")


# The service


def test_what_workers_did_while_the_service_was_away_counts(
    server: RedisServer, redis: Redis, start_service: StartService, tmp_path: Path
) -> None:
    """As after a kill: the store says that two jobs wait, yet one of them has ended, and the other one runs."""
    store, storage = JobStore(tmp_path / "jobs.sqlite3"), Folder(tmp_path)
    ids = [store.new_id() for _ in range(2)]
    for job_id in ids:
        storage.keep_upload(job_id, b"picture")
        store.submit(job_id, "", {"pipeline_type": "512"}, "f", idempotency_key=None, queue_limit=9)
        store.dispatched(job_id, 1)
        redis.set(key("attempt", job_id), 1)
    store.close()
    done, running = (Lease(redis, "worker", job_id, 1, 60) for job_id in ids)
    assert done.claim()
    assert running.claim()
    folders = [storage.work(job_id) for job_id in ids]
    (folders[0] / "preview.png").write_bytes(b"PNG")
    storage.publish(ids[0], folders[0])
    outcome = {"status": "completed", "seed": 1, "timings": {}, "warnings": [], "files": ["preview.png"], "bytes": 3}
    redis.rpush(EVENTS, "no JSON", "[]", '{"event": "started"}')
    assert done.report(ENDED, outcome=outcome | {"of_a_later_version": 1})
    with start_service(tmp_path, loaded=False, redis=server.url) as client:
        job = job_after(client, ids[0], "completed")
        assert client.get(job["preview_image_url"]).content == b"PNG"
        assert job_after(client, ids[1], "running")["interruptions"] == 0
        assert folders[1].exists()
        assert running.renew('{"stage": "shape", "step": 3, "steps": 12, "progress": 0.5}') == "held"
        while (seen := client.get(f"/api/v1/jobs/{ids[1]}").json())["step"] is None:
            time.sleep(0.01)
        assert (seen["stage"], seen["step"], seen["progress"]) == ("shape", 3, 0.5)
        client.post(f"/api/v1/jobs/{ids[1]}/cancel")
        while running.renew("") != "cancel":
            time.sleep(0.01)
        assert running.report(ENDED, outcome={"status": "cancelled"})
        job_after(client, ids[1], "cancelled")
        while folders[1].exists():
            time.sleep(0.01)
        while redis.llen(EVENTS):  # taken out once it is dealt with
            time.sleep(0.01)


def test_a_silent_worker_costs_an_interruption_and_the_third_one_the_job(
    server: RedisServer, redis: Redis, start_service: StartService, tmp_path: Path, picture: bytes
) -> None:
    with start_service(tmp_path, loaded=False, redis=server.url, lease_seconds=1.0) as client:
        while client.get("/readyz").json()["missing"] != ["No worker is there; jobs wait until one is."]:
            time.sleep(0.01)  # Redis is being reached
        job_id = submit(client, picture, wait="false").json()["job_id"]
        for attempt in (1, 2, 3):
            lease = Lease(redis, "worker", job_id, attempt, 0.05)
            while not lease.claim():
                time.sleep(0.01)
        failed = job_after(client, job_id, "failed")
        assert failed["error"] == (
            "The service was interrupted 3 times in the middle of this job; it is not tried again."
        )
        while uploads(client) or lease.renew("") != "lost":
            time.sleep(0.01)


def test_memory_of_the_workers(
    server: RedisServer, redis: Redis, start_service: StartService, tmp_path: Path, picture: bytes
) -> None:
    with start_service(tmp_path, loaded=False, redis=server.url) as client:
        for name, gigabytes in (("large", 80), ("small", 9)):
            memory = {"available": gigabytes * 10**9, "gpu": True}
            redis.set(f"trellis2:worker:{name}", json.dumps({"memory": memory}))
        while "trellis2_workers 2\n" not in client.get("/metrics").text:
            time.sleep(0.01)
        assert client.get("/health").json()["model_loaded"]
        answer = submit(client, picture, pipeline_type="1536_cascade", wait="false")
        assert answer.status_code == 503
        assert answer.json()["detail"] == (
            "pipeline_type='1536_cascade' needs 16.0 GB of GPU memory, and there are 9.0; "
            "choose pipeline_type='1024_cascade'."
        )


def test_a_redis_that_is_not_there_is_named_and_waited_for(
    start_service: StartService, tmp_path: Path, picture: bytes
) -> None:
    with start_service(tmp_path, loaded=False, redis="redis://127.0.0.1:9/0") as client:
        assert client.get("/readyz").json()["missing"] == ["Redis is not reached; jobs wait until it is."]
        assert client.get("/livez").status_code == 200
        job = submit(client, picture, wait="false").json()
        assert job["status"] == "queued"
        assert client.post(f"/api/v1/jobs/{job['job_id']}/cancel").json()["status"] == "cancelled"


def uploads(client: TestClient) -> list[Path]:
    storage: Folder = client.app.state.service.storage  # type: ignore[attr-defined]
    return list(storage.uploads.iterdir())


# The whole


@contextmanager
def a_worker(folder: Path, checkpoint: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | {
        "TRELLIS2_MODEL": str(checkpoint),
        "TRELLIS2_DATA": str(folder),
        "TRELLIS2_VIDEO_FRAMES": "4",
        "TRELLIS2_VIDEO_RESOLUTION": "64",
    }
    folder.mkdir()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "worker.py"], cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_service_whose_worker_is_elsewhere(
    server: RedisServer, bucket: str, tmp_path: Path, checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but Redis and S3 connects the two: they have no folder in common."""
    monkeypatch.setenv("TRELLIS2_REDIS", server.url)
    monkeypatch.setenv("TRELLIS2_STORAGE", bucket)
    flat = tmp_path / "flat.png"
    Image.new("RGB", (64, 64), "red").save(flat)
    with a_worker(tmp_path / "there", checkpoint_folder), started(tmp_path, checkpoint_folder, "api.py") as service:
        client: TRELLIS2Client = service.client
        stages = []
        job = client.image_to_3d(
            PICTURE,
            on_progress=lambda *state: stages.append(state[0]),
            **QUICK | {"generate_model": True, "sparse_structure_steps": 50, "shape_slat_steps": 50},
        )
        assert {"structure", "shape"} & set(stages)
        assert job["timings"]["shape"] > 0
        for name, kind in (("model_url", "output.glb"), ("preview_image_url", "preview.png")):
            path = client.download_file(job[name], tmp_path / kind)
            assert path.stat().st_size > 0
            address = f"http://localhost:{service.port}{job[name]}"
            ranged = urllib.request.Request(address, headers={"Range": "bytes=3-10"})
            with urllib.request.urlopen(ranged) as answer:
                assert (answer.status, answer.headers["Content-Type"]) == (206, FILES[kind])
                assert answer.headers["Content-Range"] == f"bytes 3-10/{path.stat().st_size}"
                assert answer.read() == path.read_bytes()[3:11]
            beyond = urllib.request.Request(address, headers={"Range": f"bytes={path.stat().st_size}-"})
            with pytest.raises(urllib.error.HTTPError, match="416"):
                urllib.request.urlopen(beyond)
        assert read_glb(tmp_path / "output.glb")
        with pytest.raises(TRELLIS2Error, match="The picture shows a single colour;") as caught:
            client.image_to_3d(flat, **QUICK)
        assert isinstance(caught.value, JobFailed)
        running = client.submit(PICTURE, **LONG)
        while client.job(running["job_id"])["step"] is None:
            time.sleep(0.02)
        client.cancel(running["job_id"])
        with pytest.raises(TRELLIS2Error, match="cancelled"):
            client.wait(running)
        client.delete_outputs(job["job_id"])
        with pytest.raises(TRELLIS2Error, match="no such file"):
            client.download_file(job["model_url"], tmp_path / "gone")
    assert not (tmp_path / "data" / "outputs").exists()
    assert list((tmp_path / "there" / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({}, "worker.py: TRELLIS2_REDIS is not set; give the address of the service's Redis."),
        ({"TRELLIS2_REDIS": "localhost"}, "worker.py: TRELLIS2_REDIS must be an address such as redis://host:6379/0"),
    ],
)
def test_a_worker_says_what_it_lacks(environment: dict[str, str], sentence: str) -> None:
    result = subprocess.run(
        [sys.executable, "worker.py"], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert result.stderr.startswith(sentence)
    assert len(result.stderr.splitlines()) == 1


def test_a_worker_without_its_model_ends(server: RedisServer, tmp_path: Path) -> None:
    environment = {"TRELLIS2_REDIS": server.url, "TRELLIS2_DATA": str(tmp_path), "TRELLIS2_MODEL": str(tmp_path / "no")}
    result = subprocess.run(
        [sys.executable, "worker.py"], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert str(tmp_path / "no") in result.stderr
