"""weights/fetch.py against a server that plays the hub; then the folder is used with the network cut off."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from tiny import MODELS

from trellis2.checkpoint import LEFT_OUT, load_checkpoint, load_matting
from trellis2.errors import CheckpointError
from trellis2.models.matting import BiRefNet, MattingConfig
from trellis2.options import GenerateOptions
from trellis2.pipeline import PRESETS, Pipeline

SCRIPT = Path(__file__).parents[1] / "weights" / "fetch.py"
MAIN, LARGE = "microsoft/TRELLIS.2-4B", "microsoft/TRELLIS-image-large"
DINO, MATTING = "facebook/dinov3-vitl16-pretrain-lvd1689m", "ZhengPeng7/BiRefNet"
TOKEN = "hf_allowed"
CHUNK = 4096
FLOW = "ckpts/shape_slat_flow_model_1024.safetensors"


@pytest.fixture(scope="module")
def fetch() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


HUB_BEFORE_1 = huggingface_hub.__version__.startswith("0.")


class Hub(ThreadingHTTPServer):
    """Repositories as files, with the hub's headers; large files are redirected to another host name."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files  # "owner/name/path" -> content
        self.gated = {DINO}
        self.log: list[tuple[str, str, str | None, str | None]] = []  # method, path, range, authorization
        self.fault: Callable[[str, int, bytes], bytes | int] | None = None
        """(file, how often it was asked for, what is to be sent) -> what is sent instead, or a status."""
        self.counts: Counter[str] = Counter()
        self.pause = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def gets(self, name: str) -> list[str | None]:
        """The ranges that were asked for of a file."""
        return [r for m, path, r, _ in self.log if m == "GET" and path.endswith(name)]


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub, token = self.server, self.headers.get("Authorization")
        hub.log.append((self.command, self.path, self.headers.get("Range"), token))
        cdn = self.path.startswith("/cdn/")
        owner, name, *rest = self.path.removeprefix("/cdn/").strip("/").split("/")
        repository, path = f"{owner}/{name}", "/".join(rest if cdn else rest[2:])
        content = hub.files.get(f"{repository}/{path}")
        if not cdn and repository in hub.gated and token != f"Bearer {TOKEN}":
            return self._status(401 if token is None else 403, {"X-Error-Code": "GatedRepo"})
        if content is None:
            return self._status(404, {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": "0" * 40, "Accept-Ranges": "bytes"}
        if path.endswith(".safetensors") and not cdn:
            headers["X-Linked-Size"] = str(len(content))
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            headers["Location"] = f"http://localhost:{hub.server_port}/cdn/{repository}/{path}"
            return self._status(302, headers)
        headers["ETag"] = '"' + hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() + '"'
        start, status = 0, 200
        if (asked := self.headers.get("Range")) is not None:
            start, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        piece = content[start:]
        sent: bytes | int = piece
        if body:
            hub.counts[path] += 1
            if hub.fault is not None:
                sent = hub.fault(path, hub.counts[path], piece)
        if isinstance(sent, int):
            return self._status(sent, {})
        headers["Content-Length"] = str(len(piece))
        self._status(status, headers, body=True)
        if body:
            try:
                for at in range(0, len(sent), 1 << 14) if hub.pause else (0,):
                    self.wfile.write(sent[at : at + (1 << 14)] if hub.pause else sent)
                    time.sleep(hub.pause)
            except OSError:
                pass
        self.close_connection = True
        return None

    def _status(self, status: int, headers: dict[str, str], body: bool = False) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if not body:
            self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture(scope="module")
def published(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The tiny checkpoint, spread over repositories as the published one is."""
    files: dict[str, bytes] = {}
    for path in checkpoint_folder.rglob("*"):
        place = path.relative_to(checkpoint_folder).as_posix()
        if path.is_dir():
            continue
        repository, name = MAIN, place
        if "sparse_structure_decoder" in place:
            repository = LARGE
        elif place.startswith("dinov3/"):
            repository, name = DINO, path.name
        files[f"{repository}/{name}"] = path.read_bytes()
    config = json.loads(files[f"{MAIN}/pipeline.json"])
    config["args"]["models"]["sparse_structure_decoder"] = f"{LARGE}/ckpts/sparse_structure_decoder"
    config["args"]["image_cond_model"]["args"]["model_name"] = DINO
    config["args"]["rembg_model"] = {"name": "BiRefNet", "args": {"model_name": "briaai/RMBG-2.0"}}
    files[f"{MAIN}/pipeline.json"] = json.dumps(config).encode()
    with torch.device("meta"):
        network = BiRefNet(MattingConfig(embed_dim=8, depths=(2, 2, 1, 2), heads=(1, 2, 4, 8), window=3))
    path = tmp_path_factory.mktemp("matting") / "model.safetensors"
    state = {key: torch.full(value.shape, 0.01, dtype=torch.float16) for key, value in network.state_dict().items()}
    save_file(state, path)
    files[f"{MATTING}/model.safetensors"] = path.read_bytes()
    return files


@pytest.fixture
def manifest(published: dict[str, bytes], tmp_path: Path) -> Path:
    """A manifest that knows neither sizes nor hashes."""
    files = []
    for full in published:
        owner, name, file = full.split("/", 2)
        repository, network = f"{owner}/{name}", Path(file).stem
        needed = list(PRESETS)
        if "_flow_model_512" in file:
            needed = ["512"] if "tex" in file else ["512", "1024_cascade", "1536_cascade"]
        elif "_flow_model_1024" in file:
            needed = ["1024", "1024_cascade", "1536_cascade"]
        files.append(
            {
                "repository": repository,
                "revision": "0" * 40,
                "file": file,
                "licence": "MIT",
                "gated": repository == DINO,
                "bytes": None,
                "sha256": None,
                "needed_for": ["matting"] if repository == MATTING else needed,
                "network": network if network in MODELS else None,
            }
        )
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"files": files}))
    return path


@pytest.fixture
def hub(published: dict[str, bytes], fetch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(dict(published))
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)  # what is lost when a connection breaks
    monkeypatch.setattr(fetch, "BACKOFF", 0.01)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: threading.Event().wait(0.001))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
    if HUB_BEFORE_1:
        huggingface_hub.utils.reset_sessions()
    else:
        huggingface_hub.close_session()


@pytest.fixture
def run(fetch: ModuleType, hub: Hub, manifest: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Any:
    """The command line; returns exit code and log."""
    caplog.set_level(logging.INFO, "fetch")

    def call(*arguments: str, endpoint: str | None = None) -> tuple[int, str]:
        caplog.clear()
        options = ["--manifest", str(manifest), "--endpoint", endpoint or hub.url]
        code = fetch.main([str(tmp_path / "model"), *options, *arguments])
        return code, caplog.text

    return call


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every attempt to reach anything ends in an error, and is noted."""
    tried: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        tried.append(arguments)
        raise OSError("the network is cut off")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    return tried


def parts(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.part"))


def test_everything_arrives_and_is_used_without_a_network(
    run: Any, hub: Hub, published: dict[str, bytes], tmp_path: Path, request: Any
) -> None:
    code, log = run()
    assert code == 0, log
    folder = tmp_path / "model"
    for name, content in published.items():
        assert (folder / name.removeprefix(f"{MAIN}/")).read_bytes() == content
    assert not parts(folder)
    assert not (folder / LEFT_OUT).exists()
    assert "free on disk" in log
    # The token goes to the hub, not to where it redirects.
    assert {token for _, path, _, token in hub.log if path.startswith("/cdn/")} == {None}
    assert {token for _, path, _, token in hub.log if not path.startswith("/cdn/")} == {f"Bearer {TOKEN}"}

    asked = len(hub.log)
    tried = request.getfixturevalue("no_network")
    # Offline mode would hide attempts: they are to be made, and counted.
    assert constants.HF_HUB_OFFLINE is False
    checkpoint = load_checkpoint(folder, dtype=torch.float32)
    assert set(checkpoint.models) == set(MODELS)
    assert checkpoint.removes_background
    pipeline = Pipeline(checkpoint, torch.device("cpu"))
    options = GenerateOptions(
        pipeline_type="512",
        preprocess_image=False,
        sparse_structure_steps=1,
        shape_slat_steps=1,
        tex_slat_steps=1,
    )
    picture = Image.effect_noise((64, 64), 60).convert("RGB")
    pipeline.generate(picture, options)
    assert load_matting(checkpoint=checkpoint.source).config.embed_dim == 8
    assert tried == []
    assert len(hub.log) == asked


def test_a_second_run_verifies_and_mends(run: Any, hub: Hub, tmp_path: Path) -> None:
    assert run()[0] == 0
    hub.log.clear()
    assert run()[0] == 0
    assert not [entry for entry in hub.log if entry[0] == "GET"]
    path = tmp_path / "model" / FLOW
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    code, log = run()
    assert code == 0
    assert f"{FLOW} is damaged (sha256" in log
    assert path.read_bytes() == good
    assert [entry[1] for entry in hub.log if entry[0] == "GET"] == [f"/cdn/{MAIN}/{FLOW}"]


def test_only_what_a_preset_needs(run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert run("--preset", "512", "--matting", "none")[0] == 0
    absent = ["shape_slat_flow_model_1024", "tex_slat_flow_model_1024"]
    assert json.loads((folder / LEFT_OUT).read_text()) == absent
    assert not any((folder / f"ckpts/{name}.safetensors").exists() for name in absent)
    assert not (folder / MATTING).exists()
    assert set(load_checkpoint(folder).models) == set(MODELS) - set(absent)
    (folder / "ckpts/tex_slat_flow_model_512.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"tex_slat_flow_model_512\.safetensors is missing"):
        load_checkpoint(folder)
    assert run()[0] == 0
    assert set(load_checkpoint(folder).models) == set(MODELS)


@pytest.mark.parametrize(("token", "told"), [(None, "no token was found"), ("hf_stranger", "has no access")])
def test_gated_repositories_are_asked_for_before_anything_is_fetched(
    run: Any, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, told: str
) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    code, log = run()
    assert code == 3
    assert f"Accept its terms at {hub.url}/{DINO}; " in log
    assert told in log
    assert "HF_TOKEN" in log
    assert "Nothing was downloaded." in log
    assert {(method, path.split("/")[1]) for method, path, _, _ in hub.log} == {("HEAD", "facebook")}
    assert [p.name for p in (tmp_path / "model").iterdir() if p.suffix != ".lock"] == []


def test_a_broken_connection_is_taken_up_where_it_broke(run: Any, hub: Hub, tmp_path: Path) -> None:
    half = 8 * CHUNK
    hub.fault = lambda path, count, data: data[:half] if path == FLOW and count == 1 else data
    assert run()[0] == 0
    assert hub.gets(FLOW) == [None, f"bytes={half}-"]


def test_a_busy_server_is_asked_again(run: Any, hub: Hub) -> None:
    hub.fault = lambda path, count, data: 503 if path == FLOW and count <= 2 else data
    code, log = run()
    assert code == 0
    assert HUB_BEFORE_1 or "attempt 3 of 6" in log  # the older one asks again by itself
    assert len(hub.gets(FLOW)) == 3


def test_a_run_that_was_cut_off_goes_on(run: Any, hub: Hub, tmp_path: Path, fetch: ModuleType) -> None:
    half = 8 * CHUNK
    hub.fault = lambda path, count, data: (data[:half] if count == 1 else 500) if path == FLOW else data
    code, log = run("--jobs", "1")
    assert code == 4
    assert "run again to go on" in log
    # Others may have begun as well.
    (part,) = (part for part in parts(tmp_path / "model") if part.name.startswith(Path(FLOW).name))
    assert part.stat().st_size == half
    assert not (tmp_path / "model" / FLOW).exists()
    hub.fault = None
    hub.log.clear()
    assert run()[0] == 0
    assert hub.gets(FLOW) == [f"bytes={half}-"]
    assert not parts(tmp_path / "model")


def test_ctrl_c_keeps_what_has_arrived(
    run: Any, hub: Hub, tmp_path: Path, fetch: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.pause = 0.002

    def interrupted(*_: Any, **__: Any) -> Any:
        while not any(part.stat().st_size for part in parts(tmp_path / "model")):
            threading.Event().wait(0.001)
        raise KeyboardInterrupt

    real = fetch.wait
    calls: list[int] = []
    monkeypatch.setattr(
        fetch, "wait", lambda *a, **k: (calls.append(1), (interrupted if len(calls) == 3 else real)(*a, **k))
    )
    code, log = run()
    assert code == 130
    assert "run the same command to go on" in log
    assert parts(tmp_path / "model")
    assert not (tmp_path / "model" / FLOW).exists()
    monkeypatch.setattr(fetch, "wait", real)
    hub.pause = 0.0
    assert run()[0] == 0


def test_damage_on_the_way_is_fetched_once_more_then_refused(run: Any, hub: Hub, tmp_path: Path) -> None:
    def flip(data: bytes) -> bytes:
        return data[:-1] + bytes([data[-1] ^ 1])

    hub.fault = lambda path, count, data: flip(data) if path == FLOW and count == 1 else data
    code, log = run()
    assert code == 0
    assert f"{FLOW} arrived damaged (sha256" in log
    (tmp_path / "model" / FLOW).unlink()
    config = "ckpts/shape_slat_flow_model_1024.json"
    (tmp_path / "model" / config).unlink()
    hub.fault = lambda path, count, data: flip(data) if path in (FLOW, config) else data
    code, log = run("--jobs", "1")
    assert code == 5
    assert f"{FLOW} arrived damaged twice (sha256" in log
    assert not (tmp_path / "model" / FLOW).exists()
    hub.fault = lambda path, count, data: flip(data) if path == config else data
    code, log = run("--jobs", "1")
    assert code == 5
    assert f"{config} arrived damaged twice (git blob" in log


def test_a_stalled_connection_is_given_up(run: Any, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)

    def stall(path: str, count: int, data: bytes) -> bytes:
        if path == FLOW and count == 1:
            threading.Event().wait(0.6)
        return data

    hub.fault = stall
    assert run()[0] == 0
    assert len(hub.gets(FLOW)) == 2


def test_the_hub_has_to_agree_with_the_manifest(run: Any, hub: Hub, manifest: Path, tmp_path: Path) -> None:
    content = json.loads(manifest.read_text())
    entry = next(f for f in content["files"] if f["file"] == FLOW)
    for key, value in (("sha256", "0" * 64), ("bytes", 7)):
        changed = json.dumps(content).replace(json.dumps(entry), json.dumps(entry | {key: value}))
        manifest.write_text(changed)
        code, log = run()
        assert code == 5
        assert f"{FLOW}: {key} is {value} in the manifest and" in log
    assert not [entry for entry in hub.log if entry[0] == "GET"]


def test_a_full_disk_is_noticed_before(run: Any, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    code, log = run()
    assert code == 6
    assert "1.0 kB are free" in log
    assert not [entry for entry in hub.log if entry[0] == "GET"]


def test_record_completes_the_manifest(run: Any, manifest: Path, published: dict[str, bytes]) -> None:
    assert run("--record")[0] == 0
    for file in json.loads(manifest.read_text())["files"]:
        content = published[f"{file['repository']}/{file['file']}"]
        assert file["bytes"] == len(content)
        assert file["sha256"] == hashlib.sha256(content).hexdigest()


def test_a_folder_is_a_mirror(run: Any, tmp_path: Path, published: dict[str, bytes], request: Any) -> None:
    assert run("--record")[0] == 0
    mirror = (tmp_path / "model").rename(tmp_path / "a mirror")
    assert not request.getfixturevalue("no_network")
    for endpoint in (str(mirror), mirror.as_uri()):
        assert run(endpoint=endpoint)[0] == 0
        assert (tmp_path / "model" / FLOW).read_bytes() == published[f"{MAIN}/{FLOW}"]
        shutil.rmtree(tmp_path / "model")
    good = (mirror / FLOW).read_bytes()
    (mirror / FLOW).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert run(endpoint=str(mirror))[0] == 5
    (mirror / FLOW).unlink()
    code, log = run(endpoint=str(mirror))
    assert code == 4
    assert f"has no {FLOW}" in log


def test_offline_check_names_what_is_wrong(run: Any, hub: Hub, tmp_path: Path, request: Any) -> None:
    folder = tmp_path / "model"
    assert run()[0] == 0
    tried = request.getfixturevalue("no_network")
    code, log = run("--offline-check")
    assert code == 0
    assert "have no known sha256" in log
    path = folder / FLOW
    good = path.read_bytes()
    path.write_bytes(good[:-4])
    (folder / DINO / "config.json").write_text("{")
    (folder / "ckpts/tex_slat_decoder.json").unlink()
    (folder / MATTING / "model.safetensors").write_bytes(b"<html>not a file</html>")
    code, log = run("--offline-check")
    assert code == 5
    assert f"{FLOW}: {len(good) - 4} bytes instead of the {len(good)} of its header" in log
    assert f"{DINO}/config.json: Expecting property name" in log
    assert "ckpts/tex_slat_decoder.json: missing" in log
    assert f"{MATTING}/model.safetensors: not a safetensors file" in log
    assert tried == []


def test_offline_check_knows_the_hashes(run: Any, tmp_path: Path) -> None:
    assert run("--record")[0] == 0
    code, log = run("--offline-check")
    assert code == 0
    assert "no known sha256" not in log
    path = tmp_path / "model" / FLOW
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    code, log = run("--offline-check")
    assert code == 5
    assert f"{FLOW}: sha256 " in log


def test_wrong_use(run: Any, tmp_path: Path, manifest: Path) -> None:
    assert run("--matting", "owner/unknown")[0] == 2
    assert run("--jobs", "0")[0] == 2
    assert run(endpoint=str(tmp_path / "nowhere"))[0] == 2
    for text in ("{", "[]", '{"files": [{}]}'):
        manifest.write_text(text)
        assert run()[0] == 2


def test_no_file_of_a_manifest_leaves_the_folder(run: Any, manifest: Path) -> None:
    manifest.write_text(manifest.read_text().replace(FLOW, "../../outside.json"))
    code, log = run()
    assert code == 2
    assert "outside of the folder" in log


def test_the_manifest_of_the_repository(fetch: ModuleType) -> None:
    entries = fetch.read_manifest(fetch.MANIFEST)
    assert len({e.place for e in entries}) == len(entries)
    for entry in entries:
        assert len(entry.revision) == 40
        assert entry.sha256 is None or len(bytes.fromhex(entry.sha256)) == 32
        assert entry.gated == (entry.repository in (DINO, "briaai/RMBG-2.0"))
    for preset, spec in PRESETS.items():
        chosen, left_out = fetch.select(entries, [preset], "none")
        networks = {e.network for e in chosen} - {None}
        wanted = {"sparse_structure_flow_model", "sparse_structure_decoder", "shape_slat_decoder", "tex_slat_decoder"}
        wanted |= {f"{stage}_slat_flow_model_{spec.flow}" for stage in ("shape", "tex")}
        wanted |= {"shape_slat_flow_model_512"} if spec.cascade else set()
        assert networks == wanted
        assert set(left_out) == set(MODELS) - wanted
        for name in networks:
            assert len([e for e in chosen if e.network == name]) == 2


def test_it_starts_without_torch() -> None:
    code = f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_commands_of_the_readme_are_understood(fetch: ModuleType) -> None:
    (block,) = re.findall(r"```bash\n(.*?)```", (SCRIPT.parent / "README.md").read_text(), re.DOTALL)
    commands = [line.split("#")[0].split() for line in block.splitlines() if "weights/fetch.py" in line]
    assert len(commands) == 2
    for command in commands:
        assert fetch._parser().parse_args(command[2:]).folder == SCRIPT.parent / "TRELLIS.2-4B"
