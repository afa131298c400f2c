"""Spans of OpenTelemetry: FastAPI makes those of requests, this those of jobs and their stages.

They go to OTEL_EXPORTER_OTLP_ENDPOINT, where that is set and the extra ``telemetry`` is installed; else nothing
happens, whether the API of OpenTelemetry is there or not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

_INSTALLED = find_spec("opentelemetry") is not None  # newer FastAPIs bring its API along

QUIET = ("/health", "/livez", "/readyz", "/metrics")
"""Paths asked for every few seconds, which nobody wants to see in a trace."""


def fastapi_settings() -> Any:
    """What FastAPI is told about its own spans: its ``TelemetryConfig``, which older ones do not have."""
    return {
        "auto_configure": bool(os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")),
        "tracing": True,
        "metrics": False,
        "logs": False,
        "operation_spans": False,
        "exclude": lambda scope: scope.get("path") in QUIET,
    }


def trace_worker() -> None:
    """Send the spans of a process without FastAPI, which sees to its own, to OTEL_EXPORTER_OTLP_ENDPOINT."""
    if not _INSTALLED or not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        return  # the extra telemetry is not installed
    provider = TracerProvider()  # OTEL_SERVICE_NAME and the like are read here
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


def current_trace() -> str | None:
    """Where we are in a trace, as a traceparent; None where nobody traces."""
    if not _INSTALLED:
        return None
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier.get("traceparent")


@contextmanager
def job_spans(parent: str | None, **attributes: Any) -> Iterator[Callable[[str], None]]:
    """A span of a job inside the block; call what it gives with the name of each stage that begins.

    parent: what ``current_trace`` gave in the request.
    """
    if not _INSTALLED:
        yield lambda stage: None
        return
    from opentelemetry import propagate, trace

    tracer = trace.get_tracer("trellis2")
    context = propagate.extract({"traceparent": parent} if parent else {})
    stages: list[trace.Span] = []
    begun = ""

    def stage(name: str) -> None:
        nonlocal begun
        if name != begun:
            begun = name
            if stages:
                stages.pop().end()
            stages.append(tracer.start_span(f"stage {name}"))

    with tracer.start_as_current_span("job", context=context, attributes=attributes):
        try:
            yield stage
        finally:
            for span in stages:
                span.end()
