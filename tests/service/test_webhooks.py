"""Webhooks: what is refused, what is signed, and what a receiver in this process hears."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from service_client import LONG, StartService, job_after, submit

from trellis2.errors import InputError
from trellis2.service import webhooks
from trellis2.service.jobs import COMPLETED, Job, JobStore
from trellis2.service.settings import Settings
from trellis2.service.webhooks import WebhookError, Webhooks, checked_url, delay, post, signed_headers

SECRET = b"012345678901234567890123"
OPEN = Settings(webhook_secrets=(SECRET,))
LOCAL = Settings(webhook_secrets=(SECRET,), webhook_private=True)


@dataclass
class Receiver:
    """A server at this machine. ``answers``: statuses to give, the last one for ever."""

    port: int = 0
    answers: list[int] = field(default_factory=lambda: [204])
    heard: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook?token=1"

    def wait(self, count: int) -> list[tuple[dict[str, str], bytes]]:
        until(lambda: len(self.heard) >= count)
        return self.heard


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def receiving(tls: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            heard = {name.lower(): value for name, value in self.headers.items()}
            receiver.heard.append((heard | {":path": self.path}, body))
            self.send_response(receiver.answers.pop(0) if len(receiver.answers) > 1 else receiver.answers[0])
            for name, value in receiver.headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            pass  # callers who do not trust us hang up

    server = Server(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    receiver.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=[0.05])
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "jobs.sqlite3")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "FIRST_DELAY", 0.01)


def resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[str]:
    """Let every name have these addresses; returns the names that are asked for."""
    asked: list[str] = []

    def getaddrinfo(host: str, port: int, **_: Any) -> Any:
        asked.append(host)
        families = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(families[":" in address], socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


# Addresses


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://example.com/", "must begin with https://"),
        ("https://example.com:8443/", "must use port 443 or 80"),
        ("https://me:secret@example.com/", "without a name and password"),
        ("https://example.com\\@127.0.0.1/", "must be an address such as"),
        ("https://example.com/a b", "must be an address such as"),
        ("https://example.com/\r\nX: y", "must be an address such as"),
        ("https://exämple.com/", "must be an address such as"),
        ("https://example.com:99999/", "must be an address such as"),
        ("https://example.com:0/", "must be an address such as"),
        ("https://[::1/", "must be an address such as"),
        ("https:///x", "must be an address such as"),
        ("file:///etc/passwd", "must be an address such as"),
        ("gopher://example.com/", "must be an address such as"),
        ("https://example.com/" + "a" * 1000, "must be an address such as"),
        ("https://127.0.0.1/", "must not be an address of a private network"),
        ("https://[::ffff:10.0.0.1]/", "must not be an address of a private network"),
    ],
)
def test_an_address_that_is_not_allowed_is_named(url: str, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        checked_url(url, OPEN)
    assert repr(url)[:40] in str(caught.value)
    assert sentence in str(caught.value)


def test_addresses_that_are_allowed() -> None:
    for url in ("https://example.com/hook?a=b%20c", "https://example.com:443", "https://[2606:4700::1111]/"):
        assert checked_url(url, OPEN) == url
    assert checked_url("http://10.1.2.3:8080/x", LOCAL)


def test_the_list_of_hosts() -> None:
    listed = Settings(webhook_secrets=(SECRET,), webhook_hosts=("hooks.example", "other.example:8443"))
    assert checked_url("https://HOOKS.example/x", listed)
    assert checked_url("https://other.example:8443/x", listed)
    for url in ("https://other.example/", "https://evil.example/", "https://hooks.example.evil.example/"):
        with pytest.raises(InputError, match="not among those in TRELLIS2_WEBHOOK_HOSTS"):
            checked_url(url, listed)
    with pytest.raises(InputError, match="must use port 443 or 80"):
        checked_url("https://hooks.example:22/", listed)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "172.16.5.4",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.1.1",
        "255.255.255.255",
        "240.0.0.1",
        "198.18.0.1",
        "192.0.2.1",
        "::1",
        "::",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "::7f00:1",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "fd00:ec2::254",
        "ff02::1",
        "2002:7f00:1::",
        "2002:808:808::1",
        "2001:0:7f00:1::1",
        "2001:db8::1",
        "64:ff9b::a00:1",
        "64:ff9b:1::808:808",
    ],
)
def test_no_call_goes_to_an_address_that_is_not_public(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    connections: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, to: connections.append(to))
    for addresses in ([address], ["93.184.215.14", address]):
        resolve_to(monkeypatch, *addresses)
        with pytest.raises(WebhookError, match="the host is in a private network"):
            post("https://example.com/", b"", {}, private=False, tls=ssl.create_default_context())
    assert connections == []


@pytest.mark.parametrize("address", ["169.254.169.254", "::ffff:169.254.169.254", "fe80::1", "0.0.0.0", "ff02::1"])
def test_not_even_a_private_service_calls_what_tells_secrets(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    resolve_to(monkeypatch, address)
    with pytest.raises(WebhookError, match="the host is in a private network"):
        post("http://example.com/", b"", {}, private=True, tls=ssl.create_default_context())


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"])
def test_public_addresses_are_connected_to_as_they_were_resolved(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    connections: list[Any] = []

    def connect(_: socket.socket, to: Any) -> None:
        connections.append(to[:2])
        raise ConnectionRefusedError

    monkeypatch.setattr(socket.socket, "connect", connect)
    asked = resolve_to(monkeypatch, address)
    with pytest.raises(WebhookError, match=r"it was not reached \(ConnectionRefusedError\)"):
        post("https://example.com/", b"", {}, private=False, tls=ssl.create_default_context())
    assert connections == [(address, 443)]
    assert asked == ["example.com"]  # once: a second answer could be another


@pytest.mark.parametrize("host", ["2130706433", "0x7f.1", "017700000001", "127.1"])
def test_odd_spellings_of_this_machine(host: str) -> None:
    with pytest.raises(WebhookError, match=r"private network|not found"):
        post(f"https://{host}/", b"", {}, private=False, tls=ssl.create_default_context())


# The call


def test_the_signature() -> None:
    # The example of the specification.
    secret = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = signed_headers([secret], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert headers["webhook-id"] == "msg_p5jXN8AQM9LWM0D4loKWxJek"
    assert headers["webhook-timestamp"] == "1614265330"
    two = signed_headers([secret, SECRET], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert two["webhook-signature"].split()[0] == headers["webhook-signature"]
    assert len(two["webhook-signature"].split()) == 2


def test_the_delays() -> None:
    plan = [delay(attempts, 0.5) for attempts in range(1, 9)]
    assert plan == pytest.approx([0.01, 0.04, 0.16, 0.64, 2.56, 10.24, 40.96, None])
    assert delay(3, 0.0) == pytest.approx(0.08)
    assert delay(3, 1.0) == pytest.approx(0.24)


def test_the_longest_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "FIRST_DELAY", 5.0)
    assert [delay(attempts, 0.5) for attempts in (1, 2, 7, 8)] == [5.0, 20.0, 20480.0, None]
    monkeypatch.setattr(webhooks, "FIRST_DELAY", 10.0)
    assert delay(7, 0.5) == 6 * 3600


@pytest.mark.parametrize("status", [301, 302, 307, 404, 500])
def test_only_2xx_takes_a_call_and_redirects_are_not_followed(receiver: Receiver, status: int) -> None:
    with receiving() as other:
        receiver.answers, receiver.headers = [status], {"Location": other.url}
        with pytest.raises(WebhookError, match=f"it answered {status}"):
            post(receiver.url, b"{}", {}, private=True, tls=ssl.create_default_context())
        assert (len(receiver.heard), len(other.heard)) == (1, 0)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n", b"H"])
def test_a_receiver_that_trickles_is_left(monkeypatch: pytest.MonkeyPatch, answer: bytes) -> None:
    monkeypatch.setattr(webhooks, "ATTEMPT_SECONDS", 0.5)
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def trickle() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(answer)
                while not stop.wait(0.1):
                    try:
                        connection.sendall(b"x" if answer else b"")
                    except OSError:
                        return

        thread = threading.Thread(target=trickle)
        thread.start()
        start = time.monotonic()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        with pytest.raises(WebhookError, match="it took too long"):
            post(url, b"{}", {}, private=True, tls=ssl.create_default_context())
        assert time.monotonic() - start < 2
        stop.set()
        thread.join()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of hooks.example, signed by itself."""
    folder = tmp_path_factory.mktemp("certificate")
    key, crt = folder / "key.pem", folder / "crt.pem"
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    words += ["-keyout", str(key), "-out", str(crt), "-days", "2", "-subj", "/CN=hooks.example"]
    words += ["-addext", "subjectAltName=DNS:hooks.example"]
    subprocess.run(words, check=True, capture_output=True)
    return key, crt


def test_the_certificate_is_checked_against_the_name(
    monkeypatch: pytest.MonkeyPatch, certificate: tuple[Path, Path]
) -> None:
    key, crt = certificate
    names: list[str | None] = []
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(crt, key)
    server.sni_callback = lambda _, name, __: names.append(name)
    trusting = ssl.create_default_context(cafile=crt)
    resolve_to(monkeypatch, "127.0.0.1")
    with receiving(server) as receiver:
        address = f"https://hooks.example:{receiver.port}/hook"
        post(address, b"{}", {}, private=True, tls=trusting)
        assert names == ["hooks.example"]
        assert receiver.heard[0][0]["host"] == f"hooks.example:{receiver.port}"
        for url, tls in (
            (address.replace("hooks", "other"), trusting),
            (address, ssl.create_default_context()),
        ):
            with pytest.raises(WebhookError, match="its certificate was not accepted"):
                post(url, b"{}", {}, private=True, tls=tls)
        assert len(receiver.heard) == 1


# The store and the thread


def add(store: JobStore, url: str, *events: str) -> Job:
    return store.submit(
        store.new_id(),
        "",
        {},
        "f",
        idempotency_key=None,
        queue_limit=9,
        webhook=url,
        webhook_events=events or ("completed",),
    )


@contextmanager
def sending(store: JobStore, settings: Settings = LOCAL) -> Iterator[Webhooks]:
    found = Webhooks(settings, store, lambda job: job.status.encode())
    found.start()
    try:
        yield found
    finally:
        found.stop()


def test_attempts_go_on_after_a_restart_with_the_same_id(store: JobStore, receiver: Receiver, tmp_path: Path) -> None:
    receiver.answers = [500]
    job = add(store, receiver.url)
    store.claim()
    assert store.deliveries_waiting() == 0  # the start was not asked for
    with sending(store) as first:
        store.finish(job.id, COMPLETED)
        receiver.wait(2)
    assert first.attempts["postponed"] >= 2
    store.close()
    store = JobStore(tmp_path / "jobs.sqlite3")
    kept = store.delivery(job.id, "completed")
    assert kept is not None
    assert kept.attempts == first.attempts["postponed"]
    assert (kept.error, kept.delivered) == ("it answered 500", None)
    receiver.answers = [204]
    with sending(store):
        until(lambda: not store.deliveries_waiting())
    ended = store.delivery(job.id, "completed")
    assert ended is not None
    assert ended.attempts == kept.attempts + 1
    assert ended.delivered is not None
    assert ended.error is None
    assert len({headers["webhook-id"] for headers, _ in receiver.heard}) == 1
    with sending(store):
        time.sleep(0.1)
    assert len(receiver.heard) == ended.attempts  # and not again


def test_attempts_end(store: JobStore, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "FIRST_DELAY", 1e-5)
    receiver.answers = [500]
    store.cancel(add(store, receiver.url).id)
    with sending(store) as sender:
        until(lambda: sender.attempts["given_up"])
    assert len(receiver.heard) == webhooks.MAX_ATTEMPTS
    assert store.deliveries_waiting() == 0


def test_a_receiver_that_is_gone_is_not_called_again(store: JobStore, receiver: Receiver) -> None:
    receiver.answers = [410]
    store.cancel(add(store, receiver.url).id)
    with sending(store) as sender:
        until(lambda: sender.attempts["given_up"])
        assert len(receiver.heard) == 1


def test_start_and_end(store: JobStore, receiver: Receiver) -> None:
    job = add(store, receiver.url, "start", "completed")
    with sending(store):
        store.claim()
        receiver.wait(1)
        store.requeue(job.id)
        store.claim()  # again: told once
        store.finish(job.id, COMPLETED)
        receiver.wait(2)
    assert [body for _, body in receiver.heard] == [b"running", b"completed"]


def test_what_a_killed_process_left_is_told(store: JobStore, receiver: Receiver, tmp_path: Path) -> None:
    job = add(store, receiver.url)
    store.claim()
    store.cancel(job.id)
    store.close()
    store = JobStore(tmp_path / "jobs.sqlite3")
    store.recover()
    with sending(store):
        assert receiver.wait(1)[0][1] == b"cancelled"


def test_a_slow_receiver_does_not_hold_up_others(store: JobStore, receiver: Receiver) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, sending(store) as sender:
        store.cancel(add(store, f"http://127.0.0.1:{silent.getsockname()[1]}/").id)
        until(lambda: sender._busy)
        store.cancel(add(store, receiver.url).id)
        receiver.wait(1)
        silent.accept()[0].close()


def test_deleted_jobs_are_not_told(store: JobStore, receiver: Receiver) -> None:
    job = add(store, receiver.url)
    store.cancel(job.id)
    store.delete(job.id)
    assert store.deliveries_waiting() == 0


# The whole service


@pytest.fixture(scope="module")
def calling(start_service: StartService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("webhooks")
    with start_service(folder, webhook_secrets=(SECRET,), webhook_private=True) as client:
        yield client


def test_the_end_of_a_job_is_told(calling: TestClient, picture: bytes, receiver: Receiver) -> None:
    job = submit(calling, picture, webhook=receiver.url).json()
    assert job["status"] == "completed"
    headers, body = receiver.wait(1)[0]
    content = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    digest = base64.b64encode(hmac.digest(SECRET, content, hashlib.sha256)).decode()
    assert headers["webhook-signature"] == f"v1,{digest}"
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 10
    assert headers["content-type"] == "application/json"
    assert (headers[":path"], headers["host"]) == ("/hook?token=1", f"127.0.0.1:{receiver.port}")
    address = f"/api/v1/jobs/{job['job_id']}"
    until(lambda: calling.get(address).json()["webhook"]["delivered_at"])
    view = calling.get(address).json()
    assert view["webhook"]["attempts"] == 1
    assert view["webhook"]["next_attempt_at"] is None
    told = json.loads(body)
    told.pop("webhook"), view.pop("webhook")
    assert told == view
    assert 'trellis2_webhook_attempts_total{result="delivered"} 1' in calling.get("/metrics").text


def test_a_failed_and_a_cancelled_job_are_told(calling: TestClient, picture: bytes, receiver: Receiver) -> None:
    fields = LONG | {"wait": "false", "webhook": receiver.url, "webhook_events": "start, completed"}
    job_id = submit(calling, picture, **fields).json()["job_id"]
    assert json.loads(receiver.wait(1)[0][1])["status"] == "running"
    calling.post(f"/api/v1/jobs/{job_id}/cancel")
    job_after(calling, job_id, "cancelled")
    assert json.loads(receiver.wait(2)[1][1])["status"] == "cancelled"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"webhook": "ftp://example.com/"}, "webhook='ftp://example.com/' must be an address such as"),
        ({"webhook": "http://a.example/", "webhook_events": "end"}, "webhook_events='end' must be start, completed,"),
        ({"webhook_events": "end"}, "webhook_events='end' must be start, completed,"),
    ],
)
def test_a_wrong_wish_is_refused(calling: TestClient, picture: bytes, fields: dict[str, str], sentence: str) -> None:
    answer = submit(calling, picture, **fields)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(sentence)


def test_without_a_secret_there_are_none(service: TestClient, picture: bytes) -> None:
    answer = submit(service, picture, webhook="https://example.com/")
    assert answer.status_code == 422
    assert "TRELLIS2_WEBHOOK_SECRET is not set; leave webhook out." in answer.json()["detail"]


def test_the_key_of_a_request_covers_its_webhook(calling: TestClient, picture: bytes, receiver: Receiver) -> None:
    key = {"Idempotency-Key": "hook"}
    first = submit(calling, picture, headers=key, webhook=receiver.url).json()
    assert submit(calling, picture, headers=key, webhook=receiver.url).json()["job_id"] == first["job_id"]
    assert submit(calling, picture, headers=key).status_code == 422
    time.sleep(0.1)
    assert len(receiver.heard) == 1
