"""docs/scaling.md, compose.yaml and the Dockerfile: what can be checked without Docker, and the program in the text."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from cog_server import QUICK_INPUTS, ROOT, cog_server
from redis import Redis
from redis_server import redis_server

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from trellis2.options import VIDEO_VARIABLES
from trellis2.service.settings import _VARIABLES

GUIDE = (ROOT / "docs" / "scaling.md").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()
OURS = {*_VARIABLES, *VIDEO_VARIABLES, "TRELLIS2_MODEL", "TRELLIS2_MATTING", "TRELLIS2_GPU_MEMORY"}
PLACES = {"TRELLIS2_DATA", "TRELLIS2_HOST", "TRELLIS2_PORT"}  # as the image has them


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


def given(service: str) -> set[str]:
    return {name for name in COMPOSE["services"][service]["environment"] if name.startswith("TRELLIS2_")}


def test_compose_passes_all_settings_on() -> None:
    assert given("api") | given("worker") | PLACES == OURS
    for service in ("api", "worker", "worker-cpu"):
        one = COMPOSE["services"][service]
        assert one["environment"]["TRELLIS2_REDIS"] == "redis://redis:6379/0"
        assert "data:/data" in one["volumes"]
        assert (ROOT / one.get("command", ["python", "api.py"])[1]).exists()
    assert "profiles" not in COMPOSE["services"]["worker"]
    assert COMPOSE["services"]["worker-cpu"]["profiles"] == ["cpu"]
    assert "deploy" not in COMPOSE["services"]["worker-cpu"]


def test_the_image_has_what_it_runs() -> None:
    copied = [word for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert {"api.py", "worker.py", "trellis2", "assets", "weights/embedded"} <= set(copied)
    allowed = re.findall(r"^!(.*)$", (ROOT / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    for name in copied:
        assert any(fnmatch(name, pattern) or name.startswith(f"{pattern}/") for pattern in allowed), name
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (wanted,) = re.findall(r"'\.\[(.*)\]'", DOCKERFILE)
    assert set(wanted.split(",")) <= extras.keys()


def test_the_examples_for_kubernetes_are_yaml() -> None:
    deployment, scaled, probe = (yaml.safe_load(block) for block in blocks("yaml"))
    pod = deployment["spec"]["template"]
    assert deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    assert pod["spec"]["containers"][0]["command"] == ["python", "worker.py"]
    assert scaled["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    metrics = re.findall(r"trellis2_\w+", scaled["spec"]["triggers"][0]["metadata"]["query"])
    assert all(f"# TYPE {name} gauge" in (ROOT / "trellis2/service/routes.py").read_text() for name in metrics)
    command = probe["readinessProbe"]["exec"]["command"][-1]
    assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0


@pytest.mark.slow
def test_the_consumer_beside_a_cog_container(tmp_path: Path, checkpoint_folder: Path) -> None:
    (program,) = (block for block in blocks("python") if block.startswith("# consumer.py"))
    (tmp_path / "consumer.py").write_text(program)
    probe = yaml.safe_load(blocks("yaml")[2])["readinessProbe"]["exec"]["command"]
    settings = {"TRELLIS2_MODEL": str(checkpoint_folder), "TRELLIS2_VIDEO_FRAMES": "4"}
    settings["TRELLIS2_VIDEO_RESOLUTION"] = "64"
    (tmp_path / "cog").mkdir()
    with (
        redis_server(tmp_path / "redis") as server,
        cog_server(tmp_path / "cog", settings) as cog,
        Redis.from_url(server.url, decode_responses=True) as redis,
    ):
        environment = {"REDIS_URL": server.url, "COG_URL": cog.url, "RESULTS": str(tmp_path / "results")}
        consumer = subprocess.Popen([sys.executable, "consumer.py"], cwd=tmp_path, env=os.environ | environment)
        try:
            picture = "data:image/png;base64," + subprocess.check_output(
                ["base64", "-w0", ROOT / "assets" / "example_image" / "T.png"], text=True
            )
            inputs = QUICK_INPUTS | {"image": picture, "generate_model": True, "return_no_background": True}
            good = redis.xadd("predictions", {"input": json.dumps(inputs)})
            bad = redis.xadd("predictions", {"input": json.dumps(inputs | {"texture_size": 1})})
            deadline = time.monotonic() + 120
            while (text := redis.get(f"prediction:{bad}")) is None:
                assert consumer.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert json.loads(text)["status"] == "failed"
            assert "texture_size" in json.loads(text)["error"]
            made = json.loads(redis.get(f"prediction:{good}") or "")
            assert (made["status"], made["error"]) == ("succeeded", None)
            assert sorted(made["files"]) == ["model_file", "no_background_image"]
            assert Path(made["files"]["model_file"]).read_bytes()[:4] == b"glTF"
            assert redis.xlen("predictions") == 0
            port = cog.url.rpartition(":")[2]
            ready = [word.replace("localhost:5000", f"localhost:{port}") for word in probe]
            assert subprocess.run(ready, check=False).returncode == 0
        finally:
            consumer.kill()
            consumer.wait()
