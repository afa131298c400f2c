"""The routes. None of them computes: what waits for the disk or decodes a picture runs in the thread pool."""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import hmac
import json
import math
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from trellis2.image import open_image

from .capacity import trim_memory
from .downloads import download
from .estimate import seconds_left
from .forms import Wish, form_schema, read_form
from .jobs import CANCELLED, COMPLETED, FAILED, QUEUED, RUNNING, Job, JobStore, KeyReusedError, QueueFullError, Status
from .settings import Settings
from .storage import FILES, Storage
from .telemetry import current_trace
from .views import Deleted, Health, JobPage, JobView, Problem, Readiness, job_view
from .webhooks import DELIVERED, GIVEN_UP, POSTPONED, Webhooks, checked_url
from .worker import Bell, Workforce

KEEP_ALIVE = 15.0  # seconds after which an event stream says that it is still there
LOOK_FOR_CALLER = 1.0  # seconds between two looks whether somebody still waits for the answer
USUAL_SECONDS = 60.0  # of a job, while none has been completed
DECODERS = 2  # threads that check pictures; each check may take some 300 MB

FAILURES = {"input": 422, "capacity": 503, "checkpoint": 503, "timeout": 504, "interrupted": 500, "internal": 500}
"""HTTP status of a synchronous request whose job failed."""


@dataclass
class Service:
    """What a running service consists of. ``stopping``: it was told to end, and nobody should wait any longer."""

    settings: Settings
    store: JobStore
    storage: Storage
    bell: Bell
    worker: Workforce
    webhooks: Webhooks
    stopping: bool = False
    decoders: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(DECODERS, "trellis2-decoder"))

    def view(self, job: Job) -> JobView:
        return job_view(
            job,
            self.store.position(job),
            self.worker.live.get(job.id),
            seconds_left=self._seconds_left(job),
            delivery=self.store.delivery(job.id, "completed") if job.webhook else None,
        )

    def _seconds_left(self, job: Job) -> float | None:
        """Until the job has ended, those before it included; None where that is not known."""
        if not job.open:
            return None
        end = 0.0
        free_at = [0.0] * max(1, self.worker.count)  # of each worker; the next job goes to the first that is free
        for one in [job] if job.status == RUNNING else self.store.ahead(job):
            expected, live = self.worker.history.expected(one.options), self.worker.live.get(one.id)
            if expected is None:
                return None
            if live is not None:
                seconds = seconds_left(expected, live.stage, live.step, live.steps, time.monotonic() - live.since)
            else:
                seconds = sum(expected.values())
            end = heapq.heappop(free_at) + seconds
            heapq.heappush(free_at, end)
        return end


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Running = Annotated[Service, Depends(_service)]
_bearer = HTTPBearer(auto_error=False, description="One of the keys in TRELLIS2_API_KEYS, where that is set.")


def _owner(service: Running, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> str:
    """Who calls: a digest of the key, or nobody in particular where no keys are set."""
    keys = service.settings.api_keys
    if not keys:
        return ""
    given = (credentials.credentials if credentials else "").encode("latin-1")  # the bytes as they were sent
    # All are compared, so that the time tells nothing.
    matches = [key for key in keys if hmac.compare_digest(key.encode(), given)]
    if not matches:
        raise HTTPException(401, "Send a valid key: Authorization: Bearer KEY.", {"WWW-Authenticate": "Bearer"})
    return hashlib.sha256(matches[0].encode()).hexdigest()


Owner = Annotated[str, Depends(_owner)]


async def _job(service: Running, owner: Owner, job_id: str) -> Job:
    """The caller's job; somebody else's is as unknown as one that never was."""
    job = await run_in_threadpool(service.store.get, job_id)
    if job is None or job.owner != owner:
        raise HTTPException(404, "There is no such job; it may have been removed because of its age.")
    return job


Known = Annotated[Job, Depends(_job)]


def _problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": Problem} for code in codes}


router = APIRouter(responses=_problems(422))


@router.get("/health", response_model=Health, responses={503: {"model": Health}})
async def health(service: Running, response: Response) -> Health:
    """Whether the model is loaded; 503 while it is not."""
    missing = service.worker.missing
    if missing is None:
        return Health(status="healthy", message="Model loaded and ready", model_loaded=True)
    response.status_code = 503
    return Health(
        status="loading" if service.worker.loading else "unhealthy",
        message=missing,
        model_loaded=service.worker.loaded,
    )


@router.get("/livez", response_class=PlainTextResponse, responses={503: {"description": "The worker died."}})
async def livez(service: Running) -> PlainTextResponse:
    """Whether the process should be left alone; 503 asks for a restart."""
    if service.worker.alive:
        return PlainTextResponse("alive\n")
    return PlainTextResponse("the worker died\n", 503)


@router.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness}})
async def readyz(service: Running, response: Response) -> Readiness:
    """Whether requests can be sent here; names what is missing."""
    missing = [] if service.worker.missing is None else [service.worker.missing]
    if service.stopping:
        missing.append("The service is stopping.")
    response.status_code = 503 if missing else 200
    return Readiness(ready=not missing, missing=missing)


SUBMIT = "/api/v1/image-to-3d"


@router.post(
    SUBMIT,
    response_model=JobView,
    responses={
        202: {"model": JobView, "description": "The job goes on by itself; Location names it."},
        **_problems(400, 401, 409, 413, 415, 429, 500, 503, 504),
    },
    openapi_extra={"requestBody": form_schema()},
)
async def image_to_3d(
    service: Running,
    owner: Owner,
    request: Request,
    response: Response,
    prefer: Annotated[str, Header(description="respond-async: the same as wait=false.")] = "",
    idempotency_key: Annotated[
        str | None,
        Header(
            description="Any text. A request that comes again with it gets the same job.", min_length=1, max_length=255
        ),
    ] = None,
) -> Any:
    """Make a 3D asset from a picture.

    Answers when the job has ended, or at once with wait=false. A caller who waits, leaves and gave no
    Idempotency-Key cancels the job.
    """
    if service.worker.problem is not None:
        raise HTTPException(503, service.worker.problem)
    # Before the picture is read; a key may belong to a job that is there already.
    if idempotency_key is None and await run_in_threadpool(service.store.count, QUEUED) >= service.settings.queue_limit:
        raise await _queue_full(service)
    wish = await read_form(request)
    if wish.webhook is not None:
        checked_url(wish.webhook, service.settings)
    known = None
    if idempotency_key is not None:
        known = await run_in_threadpool(service.store.with_key, owner, idempotency_key)
    reason = None if known else await run_in_threadpool(service.worker.refusal, wish.options["pipeline_type"])
    if reason is not None:
        raise HTTPException(503, reason)
    job = await _accept(service, owner, wish, idempotency_key)
    if wish.wait and "respond-async" not in prefer.lower():
        return await _ended(service, job, request, leave_cancels=idempotency_key is None)
    response.status_code = 202
    response.headers["Location"] = f"/api/v1/jobs/{job.id}"
    if "respond-async" in prefer.lower():
        response.headers["Preference-Applied"] = "respond-async"
    return await run_in_threadpool(service.view, job)


async def _accept(service: Service, owner: str, wish: Wish, idempotency_key: str | None) -> Job:
    """Store a job, so that it is never lost from here on. Raises InputError for a picture that cannot be used."""
    webhook = {"webhook": wish.webhook, "webhook_events": wish.webhook_events} if wish.webhook is not None else {}
    digest = hashlib.sha256(json.dumps(wish.options | webhook, sort_keys=True).encode())
    await asyncio.get_running_loop().run_in_executor(service.decoders, _check, wish.picture)
    await run_in_threadpool(digest.update, wish.picture)
    job_id = service.store.new_id()
    await run_in_threadpool(service.storage.keep_upload, job_id, wish.picture)
    submit = partial(
        service.store.submit,
        idempotency_key=idempotency_key,
        queue_limit=service.settings.queue_limit,
        webhook=wish.webhook,
        webhook_events=wish.webhook_events,
        trace=current_trace(),
    )
    job = None
    try:
        job = await run_in_threadpool(submit, job_id, owner, wish.options, digest.hexdigest())
    except QueueFullError:
        raise await _queue_full(service) from None
    except KeyReusedError:
        raise HTTPException(422, "This Idempotency-Key came with another request before; use a new one.") from None
    finally:
        if job is None or job.id != job_id:
            await run_in_threadpool(service.storage.close, job_id)
    service.worker.wake()
    return job


def _check(picture: bytes) -> None:
    """Raises InputError for a picture that cannot be used."""
    try:
        open_image(picture)
    finally:
        trim_memory()


async def _ended(service: Service, job: Job, request: Request, *, leave_cancels: bool) -> Any:
    """Wait for the end of a job and answer with it."""
    found: Job | None = job
    with service.bell.listen(job.id) as news:
        while found is not None and found.open and not service.stopping and service.worker.problem is None:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(news.wait(), LOOK_FOR_CALLER)
            news.clear()
            if leave_cancels and await request.is_disconnected():
                await _cancel(service, job.id)
                return Response(status_code=499)  # nobody reads it
            found = await run_in_threadpool(service.store.get, job.id)
    if found is None:
        return _failure(404, "The job was removed.", job)
    if found.status == COMPLETED:
        return await run_in_threadpool(service.view, found)
    if found.status == FAILED:
        return _failure(FAILURES[found.error_kind or "internal"], found.error or "", job)
    if not found.open:
        return _failure(409, "The job was cancelled.", job)
    reason = (
        service.worker.problem or "The service is stopping; the job stays in the queue and goes on after the restart."
    )
    return _failure(503, reason, job)


def _failure(code: int, detail: str, job: Job) -> JSONResponse:
    return JSONResponse({"detail": detail, "job_id": job.id}, code)


async def _queue_full(service: Service) -> HTTPException:
    seconds = await run_in_threadpool(service.store.usual_seconds) or USUAL_SECONDS
    headers = {"Retry-After": str(math.ceil(seconds / max(1, service.worker.count)))}
    return HTTPException(429, f"{service.settings.queue_limit} jobs wait already; try again later.", headers)


@router.get("/api/v1/jobs", response_model=JobPage, responses=_problems(401))
async def list_jobs(
    service: Running,
    owner: Owner,
    status: Annotated[Status | None, Query()] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    before: Annotated[int | None, Query(ge=1, le=2**62, description="Taken from the address in next.")] = None,
) -> JobPage:
    """The caller's jobs, newest first."""
    found = await run_in_threadpool(service.store.page, owner, status=status, limit=limit + 1, before=before)
    jobs = [await run_in_threadpool(service.view, job) for job in found[:limit]]
    following = None
    if len(found) > limit:
        following = f"/api/v1/jobs?limit={limit}&before={found[limit - 1].number}"
        following += f"&status={status}" if status else ""
    return JobPage(jobs=jobs, next=following)


@router.get("/api/v1/jobs/{job_id}", response_model=JobView, responses=_problems(401, 404))
async def get_job(service: Running, job: Known) -> JobView:
    """Where a job is, and what came of it."""
    return await run_in_threadpool(service.view, job)


@router.get(
    "/api/v1/jobs/{job_id}/events",
    response_class=StreamingResponse,
    responses={
        200: {
            "content": {"text/event-stream": {}},
            "description": "An event named job at every change.",
        },
        204: {"description": "The job has ended, and the caller has seen it."},
        **_problems(401, 404),
    },
)
async def job_events(service: Running, job: Known, last_event_id: Annotated[str | None, Header()] = None) -> Response:
    """The job as server-sent events; each one's data is what GET of the job answers."""
    if not job.open and last_event_id is not None:
        return Response(status_code=204)  # browsers come back for ever, unless they are told not to
    return StreamingResponse(_events(service, job), media_type="text/event-stream")


async def _events(service: Service, job: Job) -> AsyncIterator[str]:
    found: Job | None = job
    before, number = "", 0
    with service.bell.listen(job.id) as news:
        while found is not None:
            text = (await run_in_threadpool(service.view, found)).model_dump_json()
            if text != before:
                before, number = text, number + 1
                yield f"id: {number}\nevent: job\ndata: {text}\n\n"
            if not found.open or service.stopping:
                return
            try:
                await asyncio.wait_for(news.wait(), KEEP_ALIVE)
            except asyncio.TimeoutError:
                yield ": still there\n\n"
            news.clear()
            found = await run_in_threadpool(service.store.get, job.id)


@router.post("/api/v1/jobs/{job_id}/cancel", response_model=JobView, responses=_problems(401, 404))
async def cancel_job(service: Running, job: Known) -> JobView:
    """Take a job out of the queue, or stop it within a sampling step. One that has ended stays as it is."""
    return await run_in_threadpool(service.view, await _cancel(service, job.id))


async def _cancel(service: Service, job_id: str) -> Job:
    job = await run_in_threadpool(service.store.cancel, job_id)
    service.worker.cancel(job)
    if job.status == CANCELLED:
        await run_in_threadpool(service.storage.close, job_id)
    service.bell.ring()
    return job


@router.get(
    "/api/v1/outputs/{job_id}/{filename}",
    response_class=Response,
    responses={
        200: {"content": {kind: {} for kind in FILES.values()}, "description": "The file; ranges are served."},
        **_problems(401, 404),
    },
)
async def get_output(service: Running, job: Known, filename: str, request: Request) -> Response:
    """output.mp4, output.glb or preview.png of a job."""
    if filename not in job.files:
        raise HTTPException(404, f"The job has no such file; it has {', '.join(job.files) or 'none'}.")
    return await download(service.storage, job.id, filename, request.headers)


@router.delete("/api/v1/outputs/{job_id}", response_model=Deleted, responses=_problems(401, 404, 409))
async def delete_outputs(service: Running, job: Known) -> Deleted:
    """Delete all files of a job that has ended."""
    if job.open:
        raise HTTPException(409, f"The job is {job.status}; cancel it first: POST /api/v1/jobs/{job.id}/cancel")
    await run_in_threadpool(service.store.forget_files, job.id)
    await run_in_threadpool(service.storage.delete_outputs, job.id)
    return Deleted(job_id=job.id, message="All output files of the job are deleted")


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}, "description": "The figures."}, **_problems(401)},
    dependencies=[Depends(_owner)],
)
async def metrics(service: Running) -> PlainTextResponse:
    """Figures in Prometheus' text format, counted since the start of the service."""
    waiting = await run_in_threadpool(service.store.count, QUEUED)
    running = await run_in_threadpool(service.store.count, RUNNING)
    calls = await run_in_threadpool(service.store.deliveries_waiting)
    made = service.webhooks.attempts
    worker = service.worker
    lines = [
        "# HELP trellis2_jobs_total Jobs that ended.",
        "# TYPE trellis2_jobs_total counter",
        *(f'trellis2_jobs_total{{status="{s}"}} {worker.ended[s]}' for s in (COMPLETED, FAILED, CANCELLED)),
        "# HELP trellis2_stage_seconds_total Time that completed jobs spent in each stage.",
        "# TYPE trellis2_stage_seconds_total counter",
        *(f'trellis2_stage_seconds_total{{stage="{s}"}} {v:.3f}' for s, v in sorted(worker.stage_seconds.items())),
        "# HELP trellis2_jobs_waiting Jobs in the queue.",
        "# TYPE trellis2_jobs_waiting gauge",
        f"trellis2_jobs_waiting {waiting}",
        "# HELP trellis2_jobs_running Jobs that the model works on.",
        "# TYPE trellis2_jobs_running gauge",
        f"trellis2_jobs_running {running}",
        "# HELP trellis2_workers Workers that have the model.",
        "# TYPE trellis2_workers gauge",
        f"trellis2_workers {worker.count if worker.loaded else 0}",
        "# HELP trellis2_webhook_attempts_total Calls of webhooks by what came of them.",
        "# TYPE trellis2_webhook_attempts_total counter",
        *(f'trellis2_webhook_attempts_total{{result="{r}"}} {made[r]}' for r in (DELIVERED, POSTPONED, GIVEN_UP)),
        "# HELP trellis2_webhooks_waiting Calls of webhooks that are to be made.",
        "# TYPE trellis2_webhooks_waiting gauge",
        f"trellis2_webhooks_waiting {calls}",
        "# HELP trellis2_model_loaded Whether the model is loaded.",
        "# TYPE trellis2_model_loaded gauge",
        f"trellis2_model_loaded {int(worker.loaded)}",
    ]
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")
