"""Spans of a job, where the SDK of OpenTelemetry is installed; that nothing happens where nobody traces."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from trellis2.service import telemetry
from trellis2.service.telemetry import current_trace, fastapi_settings, job_spans

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_nothing_happens_where_nobody_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert fastapi_settings()["auto_configure"] is False
    assert current_trace() is None
    with job_spans(None, job_id="a") as began:
        began("shape")
    monkeypatch.setattr(telemetry, "_INSTALLED", False)
    assert current_trace() is None
    with job_spans(PARENT, job_id="a") as began:
        began("shape")


def test_an_endpoint_turns_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    assert fastapi_settings()["auto_configure"] is True


def test_the_spans_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    spans = memory.InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(spans))
    monkeypatch.setattr("opentelemetry.trace.get_tracer", provider.get_tracer)
    with job_spans(PARENT, job_id="a", pipeline_type="512") as began:
        for stage in ("shape", "shape", "texture"):
            began(stage)
        inside = current_trace()
    shape, texture, job = spans.get_finished_spans()
    assert (shape.name, texture.name, job.name) == ("stage shape", "stage texture", "job")
    assert job.attributes == {"job_id": "a", "pipeline_type": "512"}
    assert f"{job.context.trace_id:032x}-{job.parent.span_id:016x}" == PARENT[3:-3]
    assert {shape.parent.span_id, texture.parent.span_id} == {job.context.span_id}
    assert shape.end_time <= texture.start_time
    assert inside is not None
    assert f"{job.context.span_id:016x}" in inside


def test_a_worker_sends_its_spans() -> None:
    """In a process of its own, because a tracer is set once."""
    heard: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        program = (
            "from trellis2.service.telemetry import job_spans, trace_worker\n"
            "trace_worker()\n"
            f"with job_spans({PARENT!r}, job_id='a-job') as began:\n"
            "    began('shape')\n"
        )
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
        }
        subprocess.run([sys.executable, "-c", program], env=os.environ | environment, check=True, timeout=120)
        server.shutdown()
        thread.join()
    assert {path for path, _ in heard} == {"/v1/traces"}
    body = b"".join(body for _, body in heard)
    assert b"a-job" in body
    assert b"stage shape" in body
