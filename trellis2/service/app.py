"""The application: the routes, what starts and stops with them, and what holds for every answer."""

from __future__ import annotations

import asyncio
import logging
import signal
import sqlite3
import threading
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trellis2.errors import InputError
from trellis2.version import VERSION

from .forms import FORM_BYTES, webhook_schema
from .jobs import QUEUED, RUNNING, JobStore
from .page import add_page
from .routes import SUBMIT, Service, router
from .runner import NO_ROOM, NO_ROOM_ERRORS, NO_STORE
from .settings import Settings
from .storage import Storage, StorageError, open_storage
from .telemetry import fastapi_settings
from .webhooks import Webhooks
from .worker import Bell, Worker, Workforce

logger = logging.getLogger("trellis2.service")

DATABASE = "jobs.sqlite3"

_DOCUMENTATION = ("/docs", "/redoc")
_DOCUMENTATION_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' https://cdn.jsdelivr.net; "
    "style-src 'unsafe-inline' https://cdn.jsdelivr.net https://fonts.googleapis.com; "
    "font-src https://fonts.gstatic.com; img-src 'self' data: https://fastapi.tiangolo.com https://cdn.redoc.ly; "
    "connect-src 'self'; worker-src blob:; base-uri 'none'; frame-ancestors 'none'"
)
"""These pages load their scripts from where FastAPI says."""
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_POLICY = "default-src 'none'; frame-ancestors 'none'"

_TOO_LARGE = f"The request has more than the {FORM_BYTES // 2**20} MB that are allowed; send a smaller picture."


def create_app(settings: Settings) -> FastAPI:
    """The service as an ASGI application; it opens its files and loads the model when it is started."""
    app = FastAPI(
        title="TRELLIS.2",
        version=VERSION,
        description="One picture in; a textured GLB, a turntable MP4 and a cut-out PNG out.",
        lifespan=_lifespan,
        telemetry=fastapi_settings(),
    )
    app.state.settings = settings
    app.include_router(router)
    add_page(app, settings)
    app.add_exception_handler(InputError, _input_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(ClientDisconnect, _disconnected)
    app.add_exception_handler(sqlite3.OperationalError, _full)
    app.add_exception_handler(OSError, _full)
    app.add_exception_handler(StorageError, _no_store)
    app.add_exception_handler(Exception, _unexpected)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Idempotency-Key", "Prefer"],
            expose_headers=["Location", "Retry-After"],
        )
    app.add_middleware(Guard, origins=settings.cors_origins)
    document = app.openapi()
    form = document["paths"][SUBMIT]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    form["properties"]["webhook"] = webhook_schema(settings)
    if not settings.api_keys:
        _without_keys(document)
    return app


def _without_keys(document: dict[str, Any]) -> None:
    """Let the description of the service ask for no key, where none is needed."""
    del document["components"]["securitySchemes"]
    for path in document["paths"].values():
        for operation in path.values():
            operation.pop("security", None)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    storage = open_storage(settings.data, settings.storage)
    store = JobStore(settings.data / DATABASE)
    bell = Bell(asyncio.get_running_loop())
    worker = _workforce(settings, store, storage, bell)
    waiting, running = ({job.id for job in store.with_status(status)} for status in (QUEUED, RUNNING))
    if settings.redis is not None:  # a worker may have begun, and even ended, what waited when we were last here
        waiting, running = set(), waiting | running
    storage.remove_strays(waiting, running, store.with_files())
    for job in store.unmeasured():
        store.measured(job.id, storage.size(job.id))
    webhooks = Webhooks(settings, store, lambda job: service.view(job).model_dump_json().encode())
    app.state.service = service = Service(settings, store, storage, bell, worker, webhooks)
    webhooks.start()
    worker.start()
    with _told_to_stop(service):
        yield
    service.stopping = True
    await asyncio.to_thread(worker.stop)
    await asyncio.to_thread(webhooks.stop)
    service.decoders.shutdown()
    store.close()


def _workforce(settings: Settings, store: JobStore, storage: Storage, bell: Bell) -> Workforce:
    """Who runs the jobs: this process, or workers that a Redis connects."""
    if settings.redis is not None:
        try:
            from .cluster import Cluster
        except ImportError as error:
            raise InputError(
                f"TRELLIS2_REDIS needs the packages of the extra cluster ({error}): pip install '.[service,cluster]'"
            ) from error
        return Cluster(settings, store, storage, bell)
    for job in store.recover():
        logger.warning("%s after an interruption", job.status, extra={"job_id": job.id})
    return Worker(settings, store, storage, bell)


@contextmanager
def _told_to_stop(service: Service) -> Iterator[None]:
    """Let those who wait go as soon as the process is told to end: the server waits for them before it tells us."""
    if threading.current_thread() is not threading.main_thread():
        yield  # embedded in a program that has its own ways
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: Any) -> None:
        service.stopping = True
        service.bell.ring()
        then = before[signal.Signals(number)]
        if callable(then):
            then(number, frame)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Guard:
    """Refuses, before they are read, bodies that are too large and what other sites' pages send; adds the headers.

    Browsers let any page post a form here and only hide the answer, which is no help to who pays for the jobs.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        self.app = app
        self.origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > FORM_BYTES:
                raise HTTPException(413, _TOO_LARGE)
            return message

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                policy = _DOCUMENTATION_POLICY if scope["path"] in _DOCUMENTATION else _POLICY
                headers.setdefault("Content-Security-Policy", policy)
            await send(message)

        if (refusal := self._refusal(scope["method"], Headers(scope=scope))) is not None:
            await refusal(scope, receive, secured)
        else:
            await self.app(scope, limited, secured)

    def _refusal(self, method: str, headers: Headers) -> Response | None:
        foreign = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if method in ("POST", "DELETE") and foreign and headers.get("origin") not in self.origins:
            detail = "Pages of other sites may not call this service; TRELLIS2_CORS_ORIGINS allows them to."
            return JSONResponse({"detail": detail}, 403)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > FORM_BYTES:
            return JSONResponse({"detail": _TOO_LARGE}, 413)
        return None


def _input_error(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": str(error)}, 422)


def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    sentences = [f"{wrong['loc'][-1]}: {wrong['msg']}" for wrong in error.errors()]
    return JSONResponse({"detail": "; ".join(sentences)}, 422)


def _disconnected(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody reads it


def _full(request: Request, error: Exception) -> Response:
    if isinstance(error, OSError) and error.errno not in NO_ROOM_ERRORS:
        raise error
    logger.error("Cannot store: %s", error)
    return JSONResponse({"detail": NO_ROOM}, 503)


def _no_store(request: Request, error: Exception) -> Response:
    logger.error("The files' store: %s", error)
    return JSONResponse({"detail": NO_STORE}, 503)


def _unexpected(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": "The service failed unexpectedly; its log has the details."}, 500)
