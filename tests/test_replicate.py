"""predict.py through Replicate's own Python client, and what one prediction may leave for the next: nothing."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import replicate
from cog_server import QUICK_INPUTS, ROOT, CogServer, cog_server
from pictures import object_colour, object_mask
from PIL import Image
from replicate.exceptions import ModelError, ReplicateError
from replicate.helpers import FileOutput
from replicate.webhook import WebhookSigningSecret
from replicate_shim import NAME, OWNER, TOKEN, ReplicateShim, replicate_shim

MODEL = f"{OWNER}/{NAME}"
STAGES = ["prepare", "condition", "structure", "shape", "texture", "decode", "model", "video"]
QUICK = QUICK_INPUTS | {"seed": 7}
EVERYTHING = QUICK | {"return_no_background": True, "generate_video": True, "generate_model": True}

# Python runs a sitecustomize by itself at its start.  This one makes the worker linger in the stage that the file
# ``linger`` names, right after it printed its first line, so that a test can act in the middle of that stage.
LINGER = """
import builtins, pathlib, time
_print, _file = builtins.print, pathlib.Path({file!r})

def _lingers(line):
    return _file.exists() and line.endswith(" " + _file.read_text())

def _lingering_print(*values, **keywords):
    if _lingers(str(values[0])):
        time.sleep(0.1)  # lines that come faster than coglet reports are reported with the next one
    _print(*values, **keywords)
    end = time.monotonic() + 30
    while _lingers(str(values[0])) and time.monotonic() < end:
        time.sleep(0.01)

builtins.print = _lingering_print
"""


def drawn(*, dark: bool = False) -> bytes:
    """A toy with a transparent background, as a PNG."""
    rgba = Image.fromarray((object_colour(96, dark=dark) * 255).astype("uint8"))
    rgba.putalpha(Image.fromarray((object_mask(96) * 255).astype("uint8")))
    file = io.BytesIO()
    rgba.save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


PICTURE = drawn()


@contextmanager
def running(folder: Path, model: Path) -> Iterator[CogServer]:
    """A server whose home cannot be written by anyone; ``folder`` holds the only places it may write to."""
    for name in ("work", "tmp", "site"):
        (folder / name).mkdir(parents=True)
    (folder / "site" / "sitecustomize.py").write_text(LINGER.format(file=str(folder / "linger")))
    environment = {
        "TRELLIS2_MODEL": str(model),
        "TRELLIS2_VIDEO_FRAMES": "2",
        "TRELLIS2_VIDEO_RESOLUTION": "64",
        "TMPDIR": str(folder / "tmp"),
        "HOME": os.devnull + "/nobody",
        "WARP_CACHE_PATH": os.environ.get("WARP_CACHE_PATH", str(Path.home() / ".cache" / "warp")),
        "PYTHONPATH": str(folder / "site"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "COG_THROTTLE_RESPONSE_INTERVAL": "0.01",
    }
    with cog_server(folder / "work", environment) as server:
        health = server.wait_while("STARTING")
        assert health["status"] == "READY", health
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("replicate")


@pytest.fixture(scope="module")
def shim(folder: Path, checkpoint_folder: Path) -> Iterator[ReplicateShim]:
    with running(folder, checkpoint_folder) as server, replicate_shim(server) as replica:
        yield replica


@pytest.fixture(scope="module")
def client(shim: ReplicateShim) -> Iterator[replicate.Client]:
    client = shim.client()
    yield client
    client._client.close()


@pytest.fixture(scope="module")
def expected(client: replicate.Client) -> dict[str, bytes]:
    """The three files of EVERYTHING."""
    return contents(client.run(MODEL, {"image": data_url(PICTURE)} | EVERYTHING))


def contents(output: dict[str, FileOutput | None]) -> dict[str, bytes]:
    return {name: file.read() for name, file in output.items() if file is not None}


def files_of(folder: Path) -> list[str]:
    """Files of predictions in ``folder``, with paths relative to it.

    Not among them are the server's log and what torch 2.6 writes once where it is imported.
    """
    own = {"work/server.log", "work/predict.py", "work/.cog/openapi_schema.json", "site/sitecustomize.py", "linger"}
    files = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if name not in own and not name.endswith("/_remote_module_non_scriptable.py"))


def outputs_in(folder: Path) -> list[str]:
    """Names of the files in the predictor's own temporary folder, which must be the only ones."""
    files = [Path(name) for name in files_of(folder)]
    assert all(path.parts[0] == "tmp" and path.parts[1].startswith("trellis2-") for path in files), files
    return [path.name for path in files]


def wait_for_stage(prediction: Any, stage: str) -> None:
    deadline = time.monotonic() + 60
    while not (prediction.logs or "").rstrip().endswith(f" {stage}"):
        assert prediction.status in ("starting", "processing"), prediction
        assert time.monotonic() < deadline, prediction.logs
        time.sleep(0.02)
        prediction.reload()


# What the client is for


def test_the_three_files(expected: dict[str, bytes]) -> None:
    assert set(expected) == {"no_background_image", "video", "model_file"}
    Image.open(io.BytesIO(expected["no_background_image"])).verify()
    assert expected["video"][4:8] == b"ftyp"
    assert expected["model_file"][:4] == b"glTF"
    assert int.from_bytes(expected["model_file"][8:12], "little") == len(expected["model_file"])


@pytest.mark.parametrize("form", ["handle", "path", "base64", "address", "version"])
def test_every_form_of_a_picture_gives_the_same_bytes(
    form: str, shim: ReplicateShim, client: replicate.Client, expected: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "toy.png"
    path.write_bytes(PICTURE)
    inputs = EVERYTHING | {"generate_video": False}
    if form == "handle":
        with path.open("rb") as file:
            output = client.run(MODEL, {"image": file} | inputs)
        upload = client.files.list()[-1]
        assert (upload.name, upload.content_type, upload.size) == ("toy.png", "image/png", len(PICTURE))
        assert client.files.delete(upload.id)
    elif form == "path":
        output = client.run(MODEL, {"image": path} | inputs)
    elif form == "base64":
        output = client.run(MODEL, {"image": path} | inputs, file_encoding_strategy="base64")
    elif form == "address":
        upload_id = shim.add_file("toy.png", "image/png", PICTURE)["id"]
        output = client.run(MODEL, {"image": f"{shim.url}/uploads/{upload_id}"} | inputs)
    else:
        version = client.models.get(MODEL).latest_version
        assert list(version.openapi_schema["components"]["schemas"]["Input"]["properties"])
        output = client.run(f"{MODEL}:{version.id}", {"image": data_url(PICTURE)} | inputs)
    assert output["video"] is None
    assert contents(output) == {name: data for name, data in expected.items() if name != "video"}
    assert b"".join(output["model_file"]) == expected["model_file"]


def test_asyncio(shim: ReplicateShim, expected: dict[str, bytes]) -> None:
    async def run() -> bytes:
        client = shim.async_client()
        output = await client.async_run(MODEL, {"image": data_url(PICTURE)} | QUICK | {"generate_model": True})
        data = await output["model_file"].aread()
        await client._async_client.aclose()
        return data

    assert asyncio.run(run()) == expected["model_file"]


def test_create_poll_and_progress(client: replicate.Client) -> None:
    prediction = client.predictions.create(model=MODEL, input={"image": data_url(PICTURE)} | EVERYTHING)
    with pytest.raises(ReplicateError, match="does not support streaming"):
        next(prediction.stream())
    statuses, fractions = [prediction.status], []
    while prediction.status not in ("succeeded", "failed", "canceled"):
        time.sleep(0.01)
        prediction.reload()
        statuses.append(prediction.status)
        if prediction.progress is not None:
            fractions.append(prediction.progress.percentage)
            assert 0 <= prediction.progress.current <= prediction.progress.total
    assert statuses == sorted(statuses, key=["starting", "processing", "succeeded"].index)
    assert "processing" in statuses
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] < fractions[-1] == 1.0
    assert len(set(fractions)) > 3
    assert prediction.created_at <= prediction.started_at <= prediction.completed_at
    assert prediction.metrics["seed"] == 7
    assert prediction.error is None
    assert client.predictions.get(prediction.id).output == prediction.output


def test_a_wait_that_ends_too_early_gives_nothing_and_the_prediction_goes_on(
    folder: Path, client: replicate.Client, expected: dict[str, bytes]
) -> None:
    (folder / "linger").write_text("model")
    inputs = {"image": data_url(PICTURE)} | QUICK | {"generate_model": True}
    assert client.run(MODEL, inputs, wait=1) is None
    prediction = client.predictions.list()[0]
    assert prediction.status == "processing"
    (folder / "linger").unlink()
    prediction.wait()
    assert prediction.output["model_file"].startswith("https://")
    assert FileOutput(prediction.output["model_file"], client).read() == expected["model_file"]


def test_a_queue_and_its_list(folder: Path, client: replicate.Client) -> None:
    (folder / "linger").write_text("structure")
    inputs = {"image": data_url(PICTURE)} | QUICK
    first, second, third = (client.predictions.create(model=MODEL, input=inputs | {"seed": n}) for n in range(3))
    with pytest.raises(ReplicateError, match=r"input\.seed"):
        client.predictions.create(model=MODEL, input=inputs | {"seed": "x"})
    wait_for_stage(first, "structure")
    assert (second.status, third.status) == ("starting", "starting")
    second.cancel()
    assert second.status == "canceled"
    (folder / "linger").unlink()
    third.wait()
    first.reload()
    assert (first.status, third.status) == ("succeeded", "succeeded")
    assert (first.metrics["seed"], third.metrics["seed"]) == (0, 2)
    assert first.completed_at <= third.started_at
    assert [p.id for p in client.predictions.list()][:3] == [third.id, second.id, first.id]


@pytest.mark.parametrize("stage", STAGES)
def test_cancel_in_the_middle_of(stage: str, folder: Path, client: replicate.Client) -> None:
    (folder / "linger").write_text(stage)
    try:
        prediction = client.predictions.create(model=MODEL, input={"image": data_url(PICTURE)} | EVERYTHING)
        wait_for_stage(prediction, stage)
        prediction.cancel()
        prediction.wait()
    finally:
        (folder / "linger").unlink()
    assert (prediction.status, prediction.output, prediction.error) == ("canceled", None, None)
    assert prediction.logs.rstrip().endswith(f" {stage}")
    assert prediction.progress.percentage < 1
    assert outputs_in(folder) == []


def test_after_a_cancel_all_is_as_before(folder: Path, client: replicate.Client, expected: dict[str, bytes]) -> None:
    (folder / "linger").write_text("texture")
    prediction = client.predictions.create(model=MODEL, input={"image": data_url(drawn(dark=True))} | EVERYTHING)
    wait_for_stage(prediction, "texture")
    prediction.cancel()
    prediction.wait()
    (folder / "linger").unlink()
    assert contents(client.run(MODEL, {"image": data_url(PICTURE)} | EVERYTHING)) == expected


@pytest.mark.parametrize("events", [None, ["completed"]])
def test_webhooks(events: list[str] | None, client: replicate.Client) -> None:
    received: list[tuple[dict[str, str], str]] = []
    done = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()
            received.append((dict(self.headers), body))
            if json.loads(body)["status"] == "succeeded":
                done.set()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        wanted = {} if events is None else {"webhook_events_filter": events}
        address = f"http://127.0.0.1:{server.server_port}/"
        inputs = {"image": data_url(PICTURE)} | QUICK | {"return_no_background": True}
        prediction = client.predictions.create(model=MODEL, input=inputs, webhook=address, **wanted)
        assert done.wait(60)
        server.shutdown()
    secret = client.webhooks.default.secret()
    for headers, body in received:
        client.webhooks.validate(headers=headers, body=body, secret=secret, tolerance=60)
    other = WebhookSigningSecret(key="whsec_" + base64.b64encode(b"another").decode())
    with pytest.raises(ValueError, match="signature is invalid"):
        client.webhooks.validate(headers=received[-1][0], body=received[-1][1], secret=other)
    states = [json.loads(body) for _, body in received]
    assert {state["id"] for state in states} == {prediction.id}
    assert states[-1]["output"]["no_background_image"].startswith("https://")
    if events is None:
        assert [state["status"] for state in states] == ["processing"] * (len(states) - 1) + ["succeeded"]
        assert len(states) > 2
        assert all(after["logs"].startswith(before["logs"]) for before, after in pairwise(states))
    else:
        assert len(states) == 1


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (data_url(b"not a picture at all"), "The picture is a text, not a PNG"),
        ("data:image/png;base64,====", "image is empty: upload a picture, or check the base64 text of its data URL."),
        ("a red chair", "image='a red chair' is not a picture: upload a file, or give an http(s) or data URL."),
        (data_url(PICTURE[: len(PICTURE) // 2]), "The picture"),
    ],
)
def test_a_model_error_is_our_sentence(image: str, sentence: str, folder: Path, client: replicate.Client) -> None:
    with pytest.raises(ModelError) as caught:
        client.run(MODEL, {"image": image} | QUICK)
    text = str(caught.value)
    assert f"InputError: {sentence}" in text
    assert text.endswith(".")
    assert "\n" not in text
    assert "Traceback" not in text + caught.value.prediction.logs
    assert caught.value.prediction.status == "failed"
    assert outputs_in(folder) == []


def test_what_replicate_refuses_before_it_runs(shim: ReplicateShim, client: replicate.Client) -> None:
    with pytest.raises(ReplicateError) as caught:
        client.run(MODEL, {"pipeline_type": "2048", "texture_size": 16})
    assert caught.value.status == 422
    named = {part.partition(":")[0] for part in caught.value.detail.split("; ")}
    assert named == {"input.image", "input.pipeline_type", "input.texture_size"}
    for wrong, status in (
        (lambda: client.run(f"{OWNER}/another", {}), 404),
        (lambda: client.run(f"{MODEL}:0123", {}), 422),
        (lambda: client.predictions.get("nobody"), 404),
        (lambda: client.predictions.cancel("nobody"), 404),
    ):
        with pytest.raises(ReplicateError) as refused:
            wrong()
        assert refused.value.status == status
    stranger = shim.client("r8_wrong")
    with pytest.raises(ReplicateError, match="token"):
        stranger.models.get(MODEL)
    stranger._client.close()


# What docs/cog.md says


def guide(language: str) -> list[str]:
    """The guide's blocks in ``language``, with the name that the model has here."""
    text = (ROOT / "docs" / "cog.md").read_text().replace("your-name/trellis2", MODEL)
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def with_a_chair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chair.png").write_bytes(PICTURE)
    return tmp_path


def test_the_python_lines_of_the_guide(
    with_a_chair: Path, client: replicate.Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = client.predictions
    create = predictions.create
    quick = QUICK | {"generate_model": True}
    monkeypatch.setattr(predictions, "create", lambda model, input: create(model=model, input=quick | input))
    monkeypatch.setattr(replicate, "run", lambda model, input: client.run(model, quick | input))
    monkeypatch.setattr(replicate, "predictions", predictions)
    opened: list[Any] = []  # the lines leave it to Python to close what they open
    keep = lambda *where: opened.append(open(*where)) or opened[-1]  # noqa: E731, SIM115
    exec("\n".join(guide("python")), {"open": keep})
    for file in opened:
        file.close()
    assert (with_a_chair / "chair.glb").read_bytes()[:4] == b"glTF"
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[-1] == "succeeded 1.0"
    assert re.match(r"\{.*'model_file': '(https://|data:).*\} None \{.*'seed': 7", last)


def test_the_javascript_lines_of_the_guide(with_a_chair: Path, shim: ReplicateShim) -> None:
    (lines,) = guide("javascript")
    assert "{ input: { image:" in lines
    quick = json.dumps(QUICK | {"generate_model": True})
    (with_a_chair / "lines.mjs").write_text(lines.replace("{ input: { image:", f"{{ input: {{ ...{quick}, image:"))
    (with_a_chair / "node_modules").symlink_to(ROOT / "tests" / "node_modules")
    # Whatever address of Replicate it asks for, it reaches the stand-in.
    (with_a_chair / "here.mjs").write_text(
        f"""const elsewhere = globalThis.fetch;
        const here = (url) => String(url).replace(/^https:\\/\\/(api\\.)?replicate\\.(com|delivery)/, "{shim.url}");
        globalThis.fetch = (url, options) => elsewhere(here(url), options);"""
    )
    environment = os.environ | {"REPLICATE_API_TOKEN": TOKEN}
    command = ["node", "--import", "./here.mjs", "lines.mjs"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (with_a_chair / "chair.glb").read_bytes()[:4] == b"glTF"


def test_the_curl_lines_of_the_guide(shim: ReplicateShim) -> None:
    (block,) = (block for block in guide("bash") if "/health-check" in block)
    picture = f"{shim.url}/uploads/{shim.add_file('chair.png', 'image/png', PICTURE)['id']}"
    start, *lines = block.replace("\\\n", "").splitlines()
    assert start.startswith("docker run ")
    quick = json.dumps(QUICK | {"return_no_background": True})[1:-1]
    answers = []
    for line in lines:
        assert "http://localhost:5000/" in line
        line = line.replace("http://localhost:5000", shim.cog.url).replace("https://example.com/chair.png", picture)
        line = line.replace('"pipeline_type": "512"', quick)
        answers.append(json.loads(subprocess.check_output(["bash", "-c", line], stderr=subprocess.DEVNULL)))
    assert answers[0]["status"] == "READY"
    assert answers[1]["status"] == "succeeded", answers[1]
    assert answers[1]["output"]["no_background_image"].startswith("data:image/png;base64,")


# One prediction and the next


@pytest.mark.slow
def test_twenty_in_any_order_give_the_same_bytes_and_leave_no_file(folder: Path, client: replicate.Client) -> None:
    wishes = [
        {"image": data_url(PICTURE), "return_no_background": True},
        {"image": data_url(PICTURE), "generate_model": True},
        {"image": data_url(drawn(dark=True)), "generate_model": True, "seed": 8},
        {"image": data_url(drawn(dark=True)), "return_no_background": True, "preprocess_image": False},
        {"image": "a red chair"},
    ]

    def result(wish: dict[str, Any]) -> dict[str, bytes] | str:
        try:
            return contents(client.run(MODEL, QUICK | wish))
        except ModelError as error:
            return str(error)

    first = [result(wish) for wish in wishes]
    assert len({repr(answer) for answer in first}) == len(wishes)
    order = list(range(len(wishes))) * 3
    random.Random(5).shuffle(order)
    for index in order:
        assert result(wishes[index]) == first[index], index
        assert outputs_in(folder) == sorted(
            {"no_background_image": "no_background.png", "model_file": "model.glb"}[name]
            for name in (first[index] if isinstance(first[index], dict) else ())
        )
    result(wishes[-1])
    assert outputs_in(folder) == []
    for prediction in replicate_ids(client):
        left = Path("/tmp/coglet/predictions", prediction).rglob("*")
        assert [path for path in left if path.is_file()] == []


def replicate_ids(client: replicate.Client) -> Iterator[str]:
    """Ids of all predictions, over all pages of the list."""
    for page in replicate.pagination.paginate(client.predictions.list):
        yield from (prediction.id for prediction in page)


def worker_of(server: CogServer) -> int:
    """Process id of the only child."""
    (worker,) = subprocess.check_output(["pgrep", "-P", str(server.process.pid)], text=True).split()
    return int(worker)


def gone(process: int, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while Path(f"/proc/{process}/cmdline").exists() and Path(f"/proc/{process}/cmdline").read_bytes():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_sigterm_finishes_the_prediction_then_ends_with_zero(tmp_path: Path, checkpoint_folder: Path) -> None:
    with running(tmp_path, checkpoint_folder) as server:
        worker = worker_of(server)
        (tmp_path / "linger").write_text("model")
        answers: list[tuple[int, Any]] = []
        body = {"input": {"image": data_url(PICTURE)} | QUICK | {"generate_model": True}}
        asking = threading.Thread(target=lambda: answers.append(server.request("POST", "/predictions", body)))
        asking.start()
        deadline = time.monotonic() + 60
        while not re.search(r"\d model", server.log.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(1)
        (tmp_path / "linger").unlink()
        asking.join(60)
        assert server.process.wait(30) == 0
        ((status, answer),) = answers
        assert (status, answer["status"]) == (200, "succeeded")
        model = base64.b64decode(answer["output"]["model_file"].partition(",")[2])
        assert int.from_bytes(model[8:12], "little") == len(model)
        assert gone(worker)
        assert outputs_in(tmp_path) == ["model.glb"]
        (left,) = (tmp_path / "tmp").glob("trellis2-*/model.glb")
        assert left.read_bytes() == model


def test_a_killed_worker_fails_its_prediction_and_the_server_is_unhealthy(
    tmp_path: Path, checkpoint_folder: Path
) -> None:
    with running(tmp_path, checkpoint_folder) as server, replicate_shim(server) as shim:
        client = shim.client()
        (tmp_path / "linger").write_text("video")
        prediction = client.predictions.create(model=MODEL, input={"image": data_url(PICTURE)} | EVERYTHING)
        wait_for_stage(prediction, "video")
        os.kill(worker_of(server), signal.SIGKILL)
        prediction.wait()
        assert (prediction.status, prediction.output, prediction.error) == ("failed", None, "Worker crashed")
        client._client.close()
        assert server.wait_while("BUSY")["status"] == "UNHEALTHY"
        status, answer = server.predict(image=data_url(PICTURE), **QUICK)
        assert (status, answer["status"]) == (409, "failed")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        # a kill leaves the unfinished video under a hidden name only
        names = {path.name for path in (tmp_path / "tmp").glob("trellis2-*/*")}
        assert {name for name in names if not name.startswith(".")} == {"no_background.png", "model.glb"}


def test_the_worker_ends_with_a_killed_server(tmp_path: Path, checkpoint_folder: Path) -> None:
    with running(tmp_path, checkpoint_folder) as server:
        worker = worker_of(server)
        server.process.kill()
        server.process.wait()
        assert gone(worker)


def test_the_embedded_model(tmp_path: Path) -> None:
    """The model that lies in the repository, from a photograph to a GLB."""
    picture = ROOT / "assets" / "example_image" / "T.png"
    with running(tmp_path, ROOT / "weights" / "embedded") as server, replicate_shim(server) as shim:
        client = shim.client()
        model = client.run(MODEL, {"image": picture} | QUICK | {"generate_model": True})["model_file"].read()
        client._client.close()
    assert model[:4] == b"glTF"
    assert int.from_bytes(model[8:12], "little") == len(model) > 100_000
