"""The service's side of workers on other machines: sends them the jobs, hears from them, notices when one dies.

``broker`` tells what is kept where. One thread does all of it, a few times a second, so that what it finds in Redis and
what it writes to the store stay in one order.
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from kombu.exceptions import OperationalError
from redis import RedisError

from .broker import (
    ENDED,
    EVENTS,
    FORGET_SECONDS,
    QUEUE,
    QUEUE_AGAIN,
    RETURNED,
    STARTED,
    TASK,
    WORKERS,
    celery_app,
    connected,
    key,
)
from .capacity import Memory
from .jobs import RUNNING, Job, JobStore
from .runner import OUTCOME, Live
from .settings import Settings
from .storage import Storage
from .worker import HOUSEKEEPING_INTERVAL, RETRY_INTERVAL, Bell, Workforce

logger = logging.getLogger("trellis2.service")

LOOK_INTERVAL = 0.1  # seconds between two looks at what the workers say
WORKERS_INTERVAL = 1.0  # seconds between two looks at which workers there are
LOST_SECONDS = 5.0  # that a job may be neither in the queue nor with a worker
AT_ONCE = 100  # jobs sent, or events heard, in one go


class Cluster(Workforce):
    """Has the jobs run by the workers that are connected to the same Redis."""

    def __init__(self, settings: Settings, store: JobStore, storage: Storage, bell: Bell) -> None:
        super().__init__(settings, store, storage, bell)
        self._redis = connected(settings)
        self._celery = celery_app(settings)
        self._reached: bool | None = None
        self._workers: dict[str, Memory | None] = {}
        self._workers_seen = 0.0
        self._tidied = 0.0
        running = store.with_status(RUNNING)
        self._running = {job.id: job.attempt for job in running}
        self._unheld: dict[str, float] = {}  # jobs that run, but whose lease is gone, and since when
        self._empty_since: float | None = None  # when the queue was first seen to be empty
        self._cancelled = {job.id for job in running if job.cancelling}
        self._withdrawn: set[str] = set()

    @property
    def count(self) -> int:
        return len(self._workers)

    @property
    def loaded(self) -> bool:
        return bool(self._workers)

    @property
    def missing(self) -> str | None:
        if not self._reached:
            return "Redis is not reached; jobs wait until it is."
        return None if self._workers else "No worker is there; jobs wait until one is."

    def refusal(self, pipeline_type: str) -> str | None:
        # Any worker may get the job.
        refusals = (memory.refusal(pipeline_type) for memory in list(self._workers.values()) if memory is not None)
        return next((refusal for refusal in refusals if refusal is not None), None)

    def cancel(self, job: Job) -> None:
        (self._cancelled if job.status == RUNNING else self._withdrawn).add(job.id)
        self.wake()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._news.clear()
            try:
                self._look()
            except (RedisError, OperationalError, OSError) as error:
                self._set_reached(False, str(error))
                self._stopping.wait(RETRY_INTERVAL)
            except Exception:
                if not self._stopping.is_set():
                    logger.exception("Looking after the workers failed; trying again")
                self._stopping.wait(RETRY_INTERVAL)
            else:
                self._set_reached(True)
                self._news.wait(LOOK_INTERVAL)
        self._redis.close()
        self._celery.close()

    def _set_reached(self, reached: bool, why: str = "") -> None:
        if reached != self._reached:
            logger.log(
                logging.INFO if reached else logging.ERROR, "Redis is %sreached %s", "" if reached else "not ", why
            )
            self._reached = reached
            self._bell.ring()

    def _look(self) -> None:
        ids = list(self._running)
        # One transaction: a job is in the queue, or with a worker, or in the events.
        with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.lrange(EVENTS, 0, AT_ONCE - 1)
            pipeline.llen(QUEUE)
            pipeline.llen(QUEUE_AGAIN)
            # A name that is no job's, because there has to be one.
            pipeline.mget([key("lease", ""), *(key("lease", job_id) for job_id in ids)])
            pipeline.mget([key("live", ""), *(key("live", job_id) for job_id in ids)])
            events, waiting, waiting_again, (_, *leases), (_, *lives) = pipeline.execute()
        for event in events:
            try:
                self._handle(json.loads(event))
            except (ValueError, TypeError, KeyError):
                logger.exception("A worker said something that means nothing")  # its job's lease will expire
        if events:
            self._redis.ltrim(EVENTS, len(events), -1)
        now = time.monotonic()
        for job_id, lease, live in zip(ids, leases, lives, strict=True):
            if job_id in self._running:
                self._watch(job_id, lease is not None, live, now)
        self._find_lost(waiting + waiting_again, now)
        self._see_workers(now)
        self._tell()
        self._send()
        if events or now - self._tidied > HOUSEKEEPING_INTERVAL:
            self._tidied = now
            self._insist(self._tidy)

    def _handle(self, event: dict[str, Any]) -> None:
        job_id, attempt, kind = event["job_id"], event["attempt"], event["event"]
        job = self._insist(lambda: self._store.get(job_id))
        if job is None or not job.open:
            if kind == STARTED:
                self._cancelled.add(job_id)  # it was cancelled before that
            return
        if job.attempt != attempt:
            return
        if kind == STARTED:
            if self._insist(lambda: self._store.begin(job_id, attempt)) is not None:
                self._running[job_id] = attempt
                logger.info("Started", extra={"job_id": job_id})
        elif kind == RETURNED:
            self._insist(lambda: self._store.requeue(job_id))
            self._leave(job_id)
            logger.info("Given back by a worker that stops", extra={"job_id": job_id})
        elif kind == ENDED:
            # Of all that a worker of another version may tell.
            outcome = {name: event["outcome"][name] for name in OUTCOME if name in event["outcome"]}
            self._finish(job_id, outcome)
            self._leave(job_id)
            logger.info("Ended: %s", outcome.get("error") or outcome["status"], extra={"job_id": job_id})
        self._bell.ring()

    def _leave(self, job_id: str) -> None:
        """A job no longer runs."""
        self._running.pop(job_id, None)
        self._unheld.pop(job_id, None)
        self.live.pop(job_id, None)
        self._cancelled.discard(job_id)

    def _watch(self, job_id: str, held: bool, live: str | None, now: float) -> None:
        if live is not None:
            told = json.loads(live)
            before = self.live.get(job_id)
            if before is None or (before.stage, before.step) != (told["stage"], told["step"]):
                self.live[job_id] = Live(job_id, **told, since=now)
                self._bell.ring(job_id)
        if held:
            self._unheld.pop(job_id, None)
        elif now - self._unheld.setdefault(job_id, now) > self._settings.lease_seconds / 2:
            job = self._insist(lambda: self._store.interrupted(job_id))
            self._leave(job_id)
            if not job.open:
                self.ended[job.status] += 1
                self._withdrawn.add(job_id)
                self._discard(lambda: self._storage.close(job_id))
            logger.warning("%s, because its worker is not heard of", job.status, extra={"job_id": job_id})
            self._bell.ring()

    def _find_lost(self, waiting: int, now: float) -> None:
        """Send again what Redis lost, or what a worker took out of the queue and died before it said so."""
        if waiting:
            self._empty_since = None
        elif self._empty_since is None:
            self._empty_since = now
        elif now - self._empty_since > LOST_SECONDS:
            count = self._insist(lambda: self._store.dispatch_again(time.time() - LOST_SECONDS))
            if count:
                logger.warning("%d jobs are in no queue and with no worker; they are sent again", count)

    def _see_workers(self, now: float) -> None:
        if now - self._workers_seen < WORKERS_INTERVAL:
            return
        self._workers_seen = now
        names = list(self._redis.scan_iter(f"{WORKERS}*", count=1000))
        told = self._redis.mget(names) if names else []
        before = self._workers
        self._workers = {
            name: None if (memory := json.loads(text)["memory"]) is None else Memory(**memory)
            for name, text in zip(names, told, strict=True)
            if text is not None
        }
        if before.keys() != self._workers.keys():
            logger.info("Workers: %d", len(self._workers))
            self._bell.ring()

    def _tell(self) -> None:
        """Tell the workers what was cancelled."""
        cancelled, withdrawn = list(self._cancelled), list(self._withdrawn)
        if not cancelled and not withdrawn:
            return
        with self._redis.pipeline(transaction=False) as pipeline:
            for job_id in cancelled:
                pipeline.set(key("cancel", job_id), 1, ex=FORGET_SECONDS)
            for job_id in withdrawn:
                pipeline.set(key("attempt", job_id), "ended", ex=FORGET_SECONDS)
            pipeline.execute()
        self._cancelled.difference_update(cancelled)
        self._withdrawn.difference_update(withdrawn)

    def _send(self) -> None:
        for job in self._insist(lambda: self._store.to_dispatch(AT_ONCE)):
            attempt = job.attempt + 1
            self._redis.set(key("attempt", job.id), attempt)
            self._celery.send_task(
                TASK,
                [job.id, attempt, job.options, self._settings.job_seconds, job.trace],
                task_id=f"{job.id}.{attempt}",
                queue=QUEUE_AGAIN if job.attempt else QUEUE,
                retry=False,
            )
            self._insist(lambda job=job, attempt=attempt: self._store.dispatched(job.id, attempt))  # type: ignore[misc]
