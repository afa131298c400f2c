"""The service as people run it: started with uvicorn, used by the client files, told to stop, killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from service_client import DOCUMENTED_JAVASCRIPT, LONG, PICTURE, ROOT, Running, started

from client_examples import TRELLIS2Client, TRELLIS2Error
from trellis2.export import read_glb

# From the documentation, with the address of the test's service.
DOCUMENTED_PYTHON = """
from client_examples import TRELLIS2Client

client = TRELLIS2Client("http://localhost:8000")

# Generate 3D from image
result = client.image_to_3d(
    image_path="assets/example_image/T.png",
    seed=42,
    pipeline_type="1024_cascade",
    generate_video=True,
    generate_model=True
)

# Download results
client.download_file(result['model_url'], "output.glb")
client.download_file(result['video_url'], "output.mp4")
"""
DOCUMENTED_CURL = """
curl -X POST http://localhost:8000/api/v1/image-to-3d \\
  -F "image=@assets/example_image/T.png" \\
  -F "seed=42" \\
  -F "pipeline_type=1024_cascade" \\
  -F "generate_video=true" \\
  -F "generate_model=true"
"""
DOCUMENTED_DOWNLOAD = "curl -o output.glb http://localhost:8000/api/v1/outputs/{job_id}/output.glb"

CALL_IN_NODE = """
const { openAsBlob, writeFileSync } = require('node:fs');
openAsBlob('assets/example_image/T.png')
  .then(generateModel)
  .then(async blob => writeFileSync('output.glb', Buffer.from(await blob.arrayBuffer())));
"""


UVICORN = ("-m", "uvicorn", "api:app", "--host", "127.0.0.1", "--port", "{port}")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, checkpoint_folder: Path) -> Iterator[Running]:
    with started(tmp_path_factory.mktemp("process"), checkpoint_folder, "api.py") as running:
        yield running


def run(*command: str | Path, service: Running, cwd: Path) -> str:
    address = f"http://localhost:{service.port}"
    environment = os.environ | {"TRELLIS2_URL": address, "PYTHONPATH": str(ROOT)}
    words = [str(word).replace("http://localhost:8000", address) for word in command]
    result = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def wait_until_running(client: TRELLIS2Client, job_id: str) -> None:
    while (job := client.job(job_id))["stage"] not in ("structure", "shape", "texture"):
        assert job["status"] in ("queued", "running"), job
        time.sleep(0.01)


# The clients


def test_client_examples(service: Running, tmp_path: Path) -> None:
    printed = run(sys.executable, ROOT / "client_examples.py", "http://localhost:8000", service=service, cwd=tmp_path)
    assert printed.splitlines() == ["output.glb", "output.mp4"]
    assert read_glb(tmp_path / "output.glb")[0]["asset"]["extras"]["seed"] == 42


def test_sync_client_examples(service: Running, tmp_path: Path) -> None:
    script = ROOT / "sync_client_examples.py"
    printed = run(sys.executable, script, "model_only", "cancelled", "refused", service=service, cwd=tmp_path)
    assert printed.splitlines() == [
        "model_only.glb",
        "3D generation cancelled",
        "422: texture_size=100 must be a whole number from 1024 to 8192.",
    ]
    assert read_glb(tmp_path / "model_only.glb")


def test_the_shell_examples(service: Running, tmp_path: Path) -> None:
    printed = run(ROOT / "client_examples.sh", "http://localhost:8000", service=service, cwd=tmp_path)
    assert "100% 3D generation completed successfully" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output.glb", "output.mp4", "preview.png"]


@pytest.mark.slow
def test_every_command_of_the_readme(service: Running, tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().split("## Service\n")[1].split("\n## ")[0]
    for name in ("assets", "client_examples.py", "sync_client_examples.py", "client_examples.sh"):
        (tmp_path / name).symlink_to(ROOT / name)
    first, *blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    assert [line.split()[:2] for line in first.splitlines()] == [["pip", "install"], ["python", "api.py"]]
    printed = ""
    for block in blocks:
        block = block.replace("python ", f"{sys.executable} ")
        block = re.sub(
            r"^(\S+ client_examples.py|./client_examples.sh)", r"\1 http://localhost:8000", block, flags=re.M
        )
        printed += run("bash", "-euo", "pipefail", "-c", block, service=service, cwd=tmp_path)
        if "output.glb" in block:
            assert read_glb(tmp_path / "output.glb")
    assert printed.count('"status":"completed"') >= 3
    assert "All output files of the job are deleted" in printed
    (program,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "output.mp4").unlink()
    assert "100% completed" in run(sys.executable, "-c", program, service=service, cwd=tmp_path)
    assert (tmp_path / "output.mp4").exists()


@pytest.mark.slow
def test_the_documented_python_example(service: Running, tmp_path: Path) -> None:
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    run(sys.executable, "-c", DOCUMENTED_PYTHON, service=service, cwd=tmp_path)
    assert read_glb(tmp_path / "output.glb")
    assert (tmp_path / "output.mp4").stat().st_size > 0


@pytest.mark.slow
def test_the_documented_curl_lines(service: Running, tmp_path: Path) -> None:
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    answer = json.loads(run("bash", "-c", DOCUMENTED_CURL, service=service, cwd=tmp_path))
    assert answer["status"] == "completed"
    download = DOCUMENTED_DOWNLOAD.replace("{job_id}", answer["job_id"])
    run("bash", "-c", download, service=service, cwd=tmp_path)
    assert read_glb(tmp_path / "output.glb")


@pytest.mark.slow
def test_the_documented_javascript_example(service: Running, tmp_path: Path) -> None:
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    printed = run("node", "--no-warnings", "-e", DOCUMENTED_JAVASCRIPT + CALL_IN_NODE, service=service, cwd=tmp_path)
    assert printed.startswith("Job ID: ")
    assert read_glb(tmp_path / "output.glb")


def test_the_client_names_what_is_wrong(service: Running, tmp_path: Path) -> None:
    flat = tmp_path / "flat.png"
    Image.new("RGB", (64, 64), "red").save(flat)
    with pytest.raises(TRELLIS2Error, match="The picture shows a single colour;"):
        service.client.image_to_3d(flat)
    with pytest.raises(TRELLIS2Error, match="There is no such job;") as caught:
        service.client.job("nothing")
    assert caught.value.status == 404
    with pytest.raises(TRELLIS2Error, match="does not answer:"):
        TRELLIS2Client("http://localhost:9", retries=0).health()


# Leaving, stopping, dying


def test_who_leaves_cancels(service: Running) -> None:
    client = service.client
    command = ["curl", "-s", f"http://localhost:{service.port}/api/v1/image-to-3d", "-F", f"image=@{PICTURE}"]
    for name, value in LONG.items():
        command += ["-F", f"{name}={value}"]
    caller = subprocess.Popen(command)
    while not (jobs := client._json("GET", "/api/v1/jobs?status=running")["jobs"]):
        time.sleep(0.01)
    caller.kill()
    caller.wait()
    with pytest.raises(TRELLIS2Error, match="3D generation cancelled"):
        client.wait(jobs[0])


def test_health_answers_quickly_while_the_model_works(service: Running) -> None:
    client = service.client
    job = client.submit(PICTURE, **LONG)
    wait_until_running(client, job["job_id"])
    times = []
    for _ in range(40):
        start = time.perf_counter()
        client.health()
        times.append(time.perf_counter() - start)
    client.cancel(job["job_id"])
    assert sorted(times)[len(times) // 2] < 0.05


def test_the_log_is_json_and_names_the_jobs(service: Running) -> None:
    job = service.client.image_to_3d(PICTURE, **(LONG | {"sparse_structure_steps": 1}))
    lines = [json.loads(line) for line in service.log.read_text().splitlines()]
    about = [line["message"] for line in lines if line.get("job_id") == job["job_id"]]
    assert about[0] == "Started"
    assert about[-1] == "Ended: completed"


def test_a_second_service_is_refused(service: Running) -> None:
    environment = os.environ | {"TRELLIS2_DATA": str(service.log.parent / "data")}
    words = [sys.executable, "-m", "uvicorn", "api:app", "--port", "0"]
    result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert "stop the other service that uses it" in result.stderr
    assert "Traceback" not in result.stderr


EMBEDDED = """
import sys
sys.modules.update(celery=None, kombu=None, redis=None, s3fs=None)
import asyncio, pathlib
from trellis2.service.app import create_app
from trellis2.service.settings import Settings

async def start(**settings):
    app = create_app(Settings(data=pathlib.Path("data"), **settings))
    async with app.router.lifespan_context(app):
        print("started")

asyncio.run(start())
asyncio.run(start(redis="redis://localhost"))
"""


def test_the_default_needs_neither_celery_nor_redis(tmp_path: Path, checkpoint_folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRELLIS2_MODEL": str(checkpoint_folder)}
    command = [sys.executable, "-c", EMBEDDED]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.stdout == "started\n"
    assert "TRELLIS2_REDIS needs the packages of the extra cluster" in result.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_killed_service_goes_on_where_it_was(tmp_path: Path, checkpoint_folder: Path) -> None:
    with started(tmp_path, checkpoint_folder, *UVICORN) as first:
        jobs = [first.client.submit(PICTURE, **(LONG | {"generate_model": model})) for model in (True, False)]
        wait_until_running(first.client, jobs[0]["job_id"])
        first.process.kill()
        first.process.wait()
    with started(tmp_path, checkpoint_folder, *UVICORN) as second:
        ended = [second.client.wait(second.client.job(job["job_id"])) for job in jobs]
        assert [job["interruptions"] for job in ended] == [1, 0]
        second.client.download_file(ended[0]["model_url"], tmp_path / "output.glb")
        assert read_glb(tmp_path / "output.glb")
        assert list((tmp_path / "data" / "work").iterdir()) == list((tmp_path / "data" / "uploads").iterdir()) == []
        assert "queued after an interruption" in second.log.read_text()


def test_a_stopped_service_lets_everybody_go_and_goes_on_later(tmp_path: Path, checkpoint_folder: Path) -> None:
    with started(tmp_path, checkpoint_folder, *UVICORN) as first:
        job = first.client.submit(PICTURE, **LONG)
        wait_until_running(first.client, job["job_id"])
        url = f"http://localhost:{first.port}/api/v1/jobs/{job['job_id']}/events"
        with urllib.request.urlopen(url) as events:  # somebody who listens does not keep it alive
            events.readline()
            start = time.monotonic()
            first.process.send_signal(signal.SIGTERM)
            first.process.wait(timeout=20)
        assert time.monotonic() - start < 5
    with started(tmp_path, checkpoint_folder, *UVICORN) as second:
        assert second.client.wait(second.client.job(job["job_id"]))["interruptions"] == 0
