"""Replicate's HTTP interface in front of a real coglet server, as far as the ``replicate`` client speaks it.

What Replicate adds to Cog is here: addresses, tokens, models and versions, uploads, a queue, waiting, output files
as addresses, lists in pages, signed webhooks.  Validation, running, logs, metrics, cancelling and errors are coglet's;
its own webhooks carry them here.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import mimetypes
import re
import threading
import time
import urllib.request
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import replicate
from cog_server import ROOT, CogServer

API = "https://api.replicate.com"
DELIVERY = "https://replicate.delivery"
OWNER, NAME = "somebody", "trellis2"
TOKEN = "r8_of_a_test"
PAGE = 10  # predictions in one page of the list
MOST_WAIT = 60.0  # seconds that "Prefer: wait" holds a request
ENDED = ("succeeded", "failed", "canceled")
SECRET = b"secret of the webhooks of a test"


class Refused(Exception):
    """Becomes an answer with this status and a problem description."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


@dataclass
class Prediction:
    """``asked``: the body of the request.  ``state``: what coglet said last; its statuses only go forward."""

    asked: dict[str, Any]
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:26])
    created_at: str = field(default_factory=lambda: now())
    started_at: str | None = None
    completed_at: str | None = None
    state: dict[str, Any] = field(default_factory=lambda: {"status": "starting"})

    @property
    def ended(self) -> bool:
        return self.state["status"] in ENDED


class ReplicateShim:
    """One model with one version; ``url`` is where it listens in plain HTTP."""

    def __init__(self, cog: CogServer) -> None:
        self.cog = cog
        self.version = hashlib.sha256((ROOT / "predict.py").read_bytes()).hexdigest()
        self.predictions: dict[str, Prediction] = {}
        self.files: dict[str, dict[str, Any]] = {}
        self.contents: dict[str, tuple[str, bytes]] = {}  # path -> type and bytes of what can be downloaded
        self.queue: deque[Prediction] = deque()
        self.running: Prediction | None = None
        self.changed = threading.Condition()
        self.reporting = threading.Lock()
        self.url = ""

    def client(self, token: str = TOKEN) -> replicate.Client:
        """The real client; whatever address it asks for, it reaches this server."""
        client = replicate.Client(api_token=token, transport=_ToShim(self.url))
        client.poll_interval = 0.05
        return client

    def async_client(self, token: str = TOKEN) -> replicate.Client:
        client = replicate.Client(api_token=token, transport=_AsyncToShim(self.url))
        client.poll_interval = 0.05
        return client

    # models

    def version_json(self) -> dict[str, Any]:
        return {
            "id": self.version,
            "created_at": "2026-01-01T00:00:00Z",
            "cog_version": "0.23.1",
            "openapi_schema": self.cog.request("GET", "/openapi.json")[1],
        }

    def model(self, owner: str, name: str) -> dict[str, Any]:
        if (owner, name) != (OWNER, NAME):
            raise Refused(404, "The requested resource could not be found.")
        return {
            "url": f"https://replicate.com/{owner}/{name}",
            "owner": owner,
            "name": name,
            "description": None,
            "visibility": "private",
            "run_count": len(self.predictions),
            "latest_version": self.version_json(),
        }

    # predictions

    def create(self, asked: dict[str, Any], wait: float | None) -> dict[str, Any]:
        """Start or queue a prediction and hold the answer for ``wait`` seconds, or until it has ended."""
        if asked.get("version", self.version) != self.version:
            raise Refused(422, "Invalid version or not permitted.")
        prediction = Prediction(asked)
        with self.changed:
            if self.running is None:
                status, answer = self.submit(prediction, until_free=True)
            else:  # it cannot run yet, but coglet validates first
                status, answer = self.submit(prediction, until_free=False)
            if status == 422:
                raise Refused(422, "; ".join(f"input.{d['loc'][-1]}: {d['msg']}" for d in answer["detail"]))
            if status not in (202, 409):
                raise Refused(status, str(answer))
            self.predictions[prediction.id] = prediction
            if status == 202:
                self.running = prediction
            else:
                self.queue.append(prediction)
            if wait is not None:
                self.changed.wait_for(lambda: prediction.ended, wait)
            return self.shown(prediction)

    def submit(self, prediction: Prediction, *, until_free: bool) -> tuple[int, Any]:
        inputs = {name: self.reachable(value) for name, value in prediction.asked.get("input", {}).items()}
        body = {"input": inputs, "webhook": f"{self.url}/coglet/{prediction.id}"}
        deadline = time.monotonic() + 10
        while True:
            answer = self.cog.request("PUT", f"/predictions/{prediction.id}", body, {"Prefer": "respond-async"})
            # coglet reports the end of a prediction a moment before it is free for the next
            if answer[0] != 409 or not until_free or time.monotonic() > deadline:
                return answer
            time.sleep(0.01)

    def reachable(self, value: Any) -> Any:
        """Uploads are read from this server; every other input goes to coglet as it is."""
        upload = f"{API}/v1/files/"
        if isinstance(value, str) and value.startswith(upload):
            return f"{self.url}/uploads/{value.removeprefix(upload)}"
        return value

    def report(self, prediction_id: str, body: dict[str, Any]) -> None:
        """Take one webhook of coglet and pass it on in its turn.  A late one undoes nothing."""
        with self.reporting:
            prediction = self._report(prediction_id, body)
        if prediction.ended:
            self.start_next()

    def _report(self, prediction_id: str, body: dict[str, Any]) -> Prediction:
        with self.changed:
            prediction = self.predictions[prediction_id]
            late = len(body.get("logs") or "") < len(prediction.state.get("logs") or "")
            if prediction.ended or (late and body["status"] not in ENDED):
                return prediction
            before, state = prediction.state, dict(body)
            prediction.started_at = prediction.started_at or now()
            if state["status"] in ENDED:
                prediction.completed_at = now()
                self.store_outputs(prediction.id, state.get("output"))
                if self.running is prediction:
                    self.running = None
            else:
                state.pop("output", None)  # an unfinished one is a list of what was yielded so far
            prediction.state = state  # whole, for whoever reads it meanwhile
            self.changed.notify_all()
            shown = self.shown(prediction)
        event = "completed" if prediction.ended else "start" if before["status"] == "starting" else "logs"
        self.send_webhook(prediction, event, shown)
        return prediction

    def start_next(self) -> None:
        with self.changed:
            if self.running is None and self.queue:
                prediction = self.queue.popleft()
                status, answer = self.submit(prediction, until_free=True)
                if status == 202:
                    self.running = prediction
                else:
                    prediction.state = {"status": "failed", "error": str(answer)}
                    self.changed.notify_all()

    def store_outputs(self, prediction_id: str, output: dict[str, Any] | None) -> None:
        for name, value in (output or {}).items():
            if value is not None:
                head, _, text = value.partition(";base64,")
                kind = head.removeprefix("data:")
                ending = {"model/gltf-binary": ".glb"}.get(kind) or mimetypes.guess_extension(kind)
                path = f"/delivery/{prediction_id}/{name}{ending}"
                self.contents[path] = (kind, base64.b64decode(text, validate=True))
                output[name] = DELIVERY + path

    def cancel(self, prediction_id: str) -> dict[str, Any]:
        with self.changed:
            prediction = self.found(prediction_id)
            if prediction in self.queue:
                self.queue.remove(prediction)
                prediction.state = {"status": "canceled"}
                prediction.completed_at = now()
            elif not prediction.ended:
                self.cog.request("POST", f"/predictions/{prediction_id}/cancel")
            return self.shown(prediction)

    def found(self, prediction_id: str) -> Prediction:
        if prediction_id not in self.predictions:
            raise Refused(404, "The requested resource could not be found.")
        return self.predictions[prediction_id]

    def shown(self, prediction: Prediction) -> dict[str, Any]:
        address = f"{API}/v1/predictions/{prediction.id}"
        return {
            "id": prediction.id,
            "model": f"{OWNER}/{NAME}",
            "version": self.version,
            "input": prediction.asked.get("input", {}),
            "output": None,
            "logs": "",
            "error": None,
            "metrics": {},
            **{key: prediction.state[key] for key in prediction.state.keys() & SHOWN},
            "created_at": prediction.created_at,
            "started_at": prediction.started_at,
            "completed_at": prediction.completed_at,
            "urls": {"get": address, "cancel": f"{address}/cancel"},
        }

    def page(self, start: int) -> dict[str, Any]:
        newest_first = list(reversed(self.predictions.values()))
        more = start + PAGE < len(newest_first)
        return {
            "previous": None,
            "next": f"{API}/v1/predictions?cursor={start + PAGE}" if more else None,
            "results": [self.shown(prediction) for prediction in newest_first[start : start + PAGE]],
        }

    def send_webhook(self, prediction: Prediction, event: str, shown: dict[str, Any]) -> None:
        address = prediction.asked.get("webhook")
        if address is None or event not in prediction.asked.get("webhook_events_filter", [event]):
            return
        body = json.dumps(shown)
        name, timestamp = f"msg_{uuid.uuid4().hex}", str(int(time.time()))
        digest = hmac.new(SECRET, f"{name}.{timestamp}.{body}".encode(), hashlib.sha256).digest()
        headers = {
            "Content-Type": "application/json",
            "Webhook-Id": name,
            "Webhook-Timestamp": timestamp,
            "Webhook-Signature": "v1," + base64.b64encode(digest).decode(),
        }
        urllib.request.urlopen(urllib.request.Request(address, body.encode(), headers), timeout=10).close()

    # files

    def upload(self, content_type: str, body: bytes) -> dict[str, Any]:
        """Take the one part of a multipart/form-data body that is a file."""
        boundary = content_type.partition("boundary=")[2].encode()
        for part in body.split(b"--" + boundary):
            head, _, content = part.partition(b"\r\n\r\n")
            name = re.search(rb'filename="([^"]*)"', head)
            kind = re.search(rb"(?i)content-type: *([^\r]+)", head)
            if name and kind:
                return self.add_file(name[1].decode(), kind[1].decode(), content.removesuffix(b"\r\n"))
        raise Refused(422, "content: this field is required.")

    def add_file(self, name: str, kind: str, content: bytes) -> dict[str, Any]:
        file_id = uuid.uuid4().hex
        digest = hashlib.sha256(content).hexdigest()
        self.contents[f"/uploads/{file_id}"] = (kind, content)
        self.files[file_id] = {
            "id": file_id,
            "name": name,
            "content_type": kind,
            "size": len(content),
            "etag": digest,
            "checksums": {"sha256": digest},
            "metadata": {},
            "created_at": now(),
            "expires_at": None,
            "urls": {"get": f"{API}/v1/files/{file_id}"},
        }
        return self.files[file_id]


SHOWN = {"status", "output", "logs", "error", "metrics"}


def now() -> str:
    return datetime.now(timezone.utc).isoformat()


def wanted_seconds(prefer: str) -> float | None:
    """Of a ``Prefer`` header: None where the answer is not to be held."""
    match = re.fullmatch(r"wait(?:=(\d+))?", prefer)
    if match is None:
        return None
    return min(float(match[1] or MOST_WAIT), MOST_WAIT)


@contextmanager
def replicate_shim(cog: CogServer) -> Iterator[ReplicateShim]:
    """Serve it on a free port of this machine."""
    shim = ReplicateShim(cog)
    handler = type("Handler", (_Handler,), {"shim": shim})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    shim.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield shim
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    shim: ReplicateShim

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_DELETE(self) -> None:
        self.answer()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        address = urlsplit(self.path)
        try:
            if address.path in self.shim.contents:
                self.reply(200, *self.shim.contents[address.path])
                return
            if address.path.startswith("/coglet/"):
                self.shim.report(address.path.removeprefix("/coglet/"), json.loads(body))
                self.reply(200, "application/json", b"{}")
                return
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Refused(401, "You did not pass a valid authentication token")
            status, answer = self.route(address.path, parse_qs(address.query), body)
        except Refused as refused:
            status, answer = refused.status, {"title": "Refused", "detail": str(refused), "status": refused.status}
        self.reply(status, "application/json", b"" if status == 204 else json.dumps(answer).encode())

    def route(self, path: str, query: Mapping[str, list[str]], body: bytes) -> tuple[int, Any]:
        shim = self.shim
        match [self.command, *path.removeprefix("/v1").strip("/").split("/")]:
            case ["GET", "models", owner, name]:
                return 200, shim.model(owner, name)
            case ["GET", "models", owner, name, "versions"]:
                return 200, {"results": [shim.model(owner, name)["latest_version"]]}
            case ["GET", "models", owner, name, "versions", shim.version]:
                return 200, shim.model(owner, name)["latest_version"]
            case ["POST", "models", owner, name, "predictions"]:
                shim.model(owner, name)
                return 201, shim.create(json.loads(body), wanted_seconds(self.headers.get("Prefer", "")))
            case ["POST", "predictions"]:
                return 201, shim.create(json.loads(body), wanted_seconds(self.headers.get("Prefer", "")))
            case ["GET", "predictions"]:
                return 200, shim.page(int(query.get("cursor", ["0"])[0]))
            case ["GET", "predictions", prediction_id]:
                return 200, shim.shown(shim.found(prediction_id))
            case ["POST", "predictions", prediction_id, "cancel"]:
                return 200, shim.cancel(prediction_id)
            case ["POST", "files"]:
                return 201, shim.upload(self.headers["Content-Type"], body)
            case ["GET", "files"]:
                return 200, {"results": list(shim.files.values())}
            case ["GET", "files", file_id] if file_id in shim.files:
                return 200, shim.files[file_id]
            case ["DELETE", "files", file_id] if file_id in shim.files:
                del shim.files[file_id], shim.contents[f"/uploads/{file_id}"]
                return 204, None
            case ["GET", "webhooks", "default", "secret"]:
                return 200, {"key": "whsec_" + base64.b64encode(SECRET).decode()}
        raise Refused(404, "The requested resource could not be found.")

    def reply(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class _ToShim(httpx.HTTPTransport):
    """Leads every request to the shim: the client makes files only of https addresses."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.shim = httpx.URL(url)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.url = request.url.copy_with(scheme="http", host=self.shim.host, port=self.shim.port)
        return super().handle_request(request)


class _AsyncToShim(httpx.AsyncHTTPTransport):
    def __init__(self, url: str) -> None:
        super().__init__()
        self.shim = httpx.URL(url)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request.url = request.url.copy_with(scheme="http", host=self.shim.host, port=self.shim.port)
        return await super().handle_async_request(request)
