"""Jobs in SQLite: what was accepted is never lost, whatever happens to the process.

One process owns the file (it is locked while open).  Where jobs run on other machines (``cluster``), this file is still
the only place that says how they stand; each time a job is sent out counts as an attempt.  All calls are quick, lock
for themselves and may come from any thread; the event loop makes them through its thread pool, because a commit waits
for the disk.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal

from trellis2.errors import InputError

Status = Literal["queued", "running", "completed", "failed", "cancelled"]
QUEUED: Final = "queued"
RUNNING: Final = "running"
COMPLETED: Final = "completed"
FAILED: Final = "failed"
CANCELLED: Final = "cancelled"
OPEN: tuple[Status, ...] = (QUEUED, RUNNING)

MAX_INTERRUPTIONS = 3
"""A job whose process died this often in the middle of it is failed: it may be what kills the process."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    idempotency_key TEXT,
    fingerprint TEXT NOT NULL,
    options TEXT NOT NULL,
    status TEXT NOT NULL,
    created REAL NOT NULL,
    started REAL,
    finished REAL,
    interruptions INTEGER NOT NULL DEFAULT 0,
    cancelling INTEGER NOT NULL DEFAULT 0,
    seed INTEGER,
    timings TEXT NOT NULL DEFAULT '{}',
    warnings TEXT NOT NULL DEFAULT '[]',
    files TEXT NOT NULL DEFAULT '[]',
    error TEXT,
    error_kind TEXT,
    UNIQUE (owner, idempotency_key)
);
CREATE INDEX IF NOT EXISTS jobs_by_status ON jobs (status, number);
"""
_SECOND = """
ALTER TABLE jobs ADD COLUMN webhook TEXT;
ALTER TABLE jobs ADD COLUMN webhook_events TEXT NOT NULL DEFAULT '[]';
ALTER TABLE jobs ADD COLUMN trace TEXT;
CREATE TABLE deliveries (
    id TEXT PRIMARY KEY,
    job_id TEXT NOT NULL,
    event TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    next_attempt REAL,
    delivered REAL,
    error TEXT,
    UNIQUE (job_id, event)
);
CREATE INDEX deliveries_by_time ON deliveries (next_attempt);
"""
_THIRD = """
ALTER TABLE jobs ADD COLUMN attempt INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN dispatched REAL;
ALTER TABLE jobs ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;
CREATE INDEX jobs_by_end ON jobs (finished, bytes);
"""
_VERSIONS = (_SCHEMA, _SECOND, _THIRD)
"""What makes each version of the file out of the one before; a new file runs through all."""

_JSON = {"options", "timings", "warnings", "files", "webhook_events"}


@dataclass(frozen=True)
class Job:
    """One row. Times: seconds since 1970. ``files``: names of the outputs that exist, ``bytes``: their size together.
    ``number`` gives the order. ``trace``: where the request stands in a trace, as a traceparent. ``attempt``: how often
    the job was sent to the workers of other machines, ``dispatched``: when last, None while it is yet to be sent."""

    number: int
    id: str
    owner: str
    fingerprint: str
    options: dict[str, Any]
    status: Status
    created: float
    started: float | None
    finished: float | None
    interruptions: int
    cancelling: bool
    seed: int | None
    timings: dict[str, float]
    warnings: list[str]
    files: list[str]
    error: str | None
    error_kind: str | None
    webhook: str | None
    webhook_events: list[str]
    trace: str | None
    attempt: int
    dispatched: float | None
    bytes: int

    @property
    def open(self) -> bool:
        return self.status in OPEN


@dataclass(frozen=True)
class Delivery:
    """One webhook call to be made. ``next_attempt``: None when no further one follows; ``error``: of the last one."""

    id: str
    job_id: str
    event: str
    attempts: int
    next_attempt: float | None
    delivered: float | None
    error: str | None


class QueueFullError(Exception):
    """As many jobs wait as may."""


class KeyReusedError(Exception):
    """An idempotency key came again with another request."""


class JobStore:
    """The table of jobs, and the one of webhook calls. Raises InputError where another process has them open.

    ``announced`` is called, in no transaction, after a change that a webhook has to tell.
    """

    def __init__(self, path: Path) -> None:
        self.announced: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, timeout=1.0)
        self._db.row_factory = sqlite3.Row
        try:
            # The lock is taken by the first write below and held until the process ends, however it ends.
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._upgrade(path)
        except sqlite3.OperationalError as error:
            self._db.close()
            raise InputError(
                f"{path} cannot be opened ({error}); stop the other service that uses it, or choose another "
                "folder with TRELLIS2_DATA."
            ) from error

    def _upgrade(self, path: Path) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > len(_VERSIONS):
            self._db.close()
            raise InputError(f"{path} was written by a newer version; choose another folder with TRELLIS2_DATA.")
        if version == len(_VERSIONS):
            # Nothing else would be written, and so the lock not be taken, before the first job.
            self._db.executescript(f"BEGIN IMMEDIATE; PRAGMA user_version = {version}; COMMIT;")
        for number, script in enumerate(_VERSIONS[version:], version + 1):
            self._db.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;")

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def new_id(self) -> str:
        return str(uuid.uuid4())  # 122 bits of the system's randomness: not to be guessed

    def submit(
        self,
        job_id: str,
        owner: str,
        options: Mapping[str, Any],
        fingerprint: str,
        *,
        idempotency_key: str | None,
        queue_limit: int,
        webhook: str | None = None,
        webhook_events: Sequence[str] = (),
        trace: str | None = None,
    ) -> Job:
        """Add a job to the queue, or return the one that was added with the same key.

        webhook: address that hears of the ``webhook_events``, which are of "start" and "completed".

        Raises KeyReusedError where that one has another fingerprint, and QueueFullError.
        """
        with self._lock, self._db:
            if idempotency_key is not None:
                known = self._one("owner = ? AND idempotency_key = ?", owner, idempotency_key)
                if known is not None:
                    if known.fingerprint != fingerprint:
                        raise KeyReusedError
                    return known
            if self._count("status = ?", QUEUED) >= queue_limit:
                raise QueueFullError
            row = {
                "id": job_id,
                "owner": owner,
                "idempotency_key": idempotency_key,
                "fingerprint": fingerprint,
                "options": json.dumps(dict(options)),
                "status": QUEUED,
                "created": time.time(),
                "webhook": webhook,
                "webhook_events": json.dumps(list(webhook_events)),
                "trace": trace,
            }
            marks = ", ".join("?" * len(row))
            self._db.execute(f"INSERT INTO jobs ({', '.join(row)}) VALUES ({marks})", tuple(row.values()))
            return self._get(job_id)

    def with_key(self, owner: str, idempotency_key: str) -> Job | None:
        with self._lock:
            return self._one("owner = ? AND idempotency_key = ?", owner, idempotency_key)

    def get(self, job_id: str) -> Job | None:
        with self._lock:
            return self._one("id = ?", job_id)

    def page(self, owner: str, *, status: Status | None, limit: int, before: int | None) -> list[Job]:
        """Jobs of an owner, newest first; ``before``: only those with a smaller number."""
        query = "SELECT * FROM jobs WHERE owner = ? AND number < ? AND (? IS NULL OR status = ?) "
        query += "ORDER BY number DESC LIMIT ?"
        with self._lock:
            rows = self._db.execute(query, (owner, 2**62 if before is None else before, status, status, limit))
            return [_job(row) for row in rows]

    def position(self, job: Job) -> int | None:
        """1 for the job that is next, None for one that does not wait."""
        with self._lock:
            ahead = self._count("status = ? AND number <= ?", QUEUED, job.number)
        return ahead if job.status == QUEUED and ahead else None

    def ahead(self, job: Job) -> list[Job]:
        """The running job and those that wait, in their order, up to and with ``job``, which is open."""
        query = "SELECT * FROM jobs WHERE status = ? OR (status = ? AND number <= ?) ORDER BY status = ?, number"
        with self._lock:
            rows = self._db.execute(query, (RUNNING, QUEUED, job.number, QUEUED))
            return [_job(row) for row in rows]

    def count(self, status: Status) -> int:
        with self._lock:
            return self._count("status = ?", status)

    def last_completed(self, count: int) -> list[Job]:
        """The jobs that were completed last, oldest of them first."""
        query = "SELECT * FROM jobs WHERE status = ? ORDER BY number DESC LIMIT ?"
        with self._lock:
            return [_job(row) for row in self._db.execute(query, (COMPLETED, count))][::-1]

    def with_files(self) -> set[str]:
        """Ids of the jobs that have files."""
        with self._lock:
            return {row["id"] for row in self._db.execute("SELECT id FROM jobs WHERE files != '[]'")}

    def with_status(self, *statuses: Status) -> list[Job]:
        """All jobs in any of these states, oldest first."""
        marks = ", ".join("?" * len(statuses))
        with self._lock:
            rows = self._db.execute(f"SELECT * FROM jobs WHERE status IN ({marks}) ORDER BY number", statuses)
            return [_job(row) for row in rows]

    def claim(self) -> Job | None:
        """Mark the oldest waiting job as running and return it."""
        with self._lock, self._db:
            job = self._one("status = ? ORDER BY number", QUEUED)
            if job is None:
                return None
            job = self._update(job.id, status=RUNNING, started=time.time())
        self._tell(job)
        return job

    def finish(self, job_id: str, status: Status, **facts: Any) -> Job:
        """End a job. facts: seed, timings, warnings, files, bytes, error, error_kind."""
        with self._lock, self._db:
            job = self._update(job_id, status=status, finished=time.time(), **facts)
        self._tell(job)
        return job

    def cancel(self, job_id: str) -> Job:
        """End a waiting job, and mark a running one for the worker; an ended one stays as it is."""
        with self._lock, self._db:
            job = self._get(job_id)
            if job.status == QUEUED:
                job = self._update(job_id, status=CANCELLED, finished=time.time(), cancelling=1)
            elif job.open:
                job = self._update(job_id, cancelling=1)
        self._tell(job)
        return job

    def requeue(self, job_id: str) -> None:
        """Put a job back that its worker gave up because it stops."""
        with self._lock, self._db:
            self._update(job_id, status=QUEUED, started=None, dispatched=None)

    def to_dispatch(self, limit: int) -> list[Job]:
        """Waiting jobs that are yet to be sent to a worker, oldest first."""
        query = "SELECT * FROM jobs WHERE status = ? AND dispatched IS NULL ORDER BY number LIMIT ?"
        with self._lock:
            return [_job(row) for row in self._db.execute(query, (QUEUED, limit))]

    def dispatched(self, job_id: str, attempt: int) -> None:
        """Note that a job was sent to the workers."""
        with self._lock, self._db:
            self._update(job_id, attempt=attempt, dispatched=time.time())

    def dispatch_again(self, before: float) -> int:
        """Let all jobs that wait and were sent before this time be sent again; returns how many these are."""
        query = "UPDATE jobs SET dispatched = NULL WHERE status = ? AND dispatched < ?"
        with self._lock, self._db:
            return self._db.execute(query, (QUEUED, before)).rowcount

    def begin(self, job_id: str, attempt: int) -> Job | None:
        """Mark a job as running, since a worker says so; None where this attempt is not the one that counts."""
        with self._lock, self._db:
            job = self._one("id = ? AND status = ? AND attempt = ?", job_id, QUEUED, attempt)
            if job is None:
                return None
            job = self._update(job_id, status=RUNNING, started=time.time())
        self._tell(job)
        return job

    def interrupted(self, job_id: str) -> Job:
        """Queue again, cancel or fail a job whose worker died."""
        with self._lock, self._db:
            job = self._recover(self._get(job_id))
        self._tell(job)
        return job

    def recover(self) -> list[Job]:
        """Queue again, cancel or fail what a killed process was running; returns these jobs."""
        with self._lock, self._db:
            interrupted = [_job(row) for row in self._db.execute("SELECT * FROM jobs WHERE status = ?", (RUNNING,))]
            return [self._recover(job) for job in interrupted]

    def _recover(self, job: Job) -> Job:
        count = job.interruptions + 1
        if job.cancelling:
            return self._update(job.id, status=CANCELLED, finished=time.time())
        if count < MAX_INTERRUPTIONS:
            return self._update(job.id, status=QUEUED, started=None, dispatched=None, interruptions=count)
        error = f"The service was interrupted {count} times in the middle of this job; it is not tried again."
        return self._update(
            job.id, status=FAILED, finished=time.time(), interruptions=count, error=error, error_kind="interrupted"
        )

    def forget_files(self, job_id: str) -> Job:
        with self._lock, self._db:
            return self._update(job_id, files=[], bytes=0)

    def measured(self, job_id: str, size: int) -> None:
        """Note the bytes of a job's files."""
        with self._lock, self._db:
            self._update(job_id, bytes=size)

    def unmeasured(self) -> list[Job]:
        """Jobs with files whose size nobody noted: earlier versions did not."""
        with self._lock:
            rows = self._db.execute("SELECT * FROM jobs WHERE bytes = 0 AND files != '[]'")
            return [_job(row) for row in rows]

    def to_forget(self, before: float, room: float) -> list[str]:
        """Ids of ended jobs to remove, oldest first: those that ended before a time, and as many more as it takes for
        the files of the others to fit into ``room`` bytes; the one that ended last stays. Reads an index alone."""
        with self._lock:
            (total,) = self._db.execute("SELECT sum(bytes) FROM jobs WHERE finished IS NOT NULL").fetchone()
            over, found = (total or 0) - room, []
            query = "SELECT id, finished, bytes FROM jobs WHERE finished IS NOT NULL ORDER BY finished"
            rows = self._db.execute(query)
            row = rows.fetchone()
            while row is not None:
                following = rows.fetchone()
                if row["finished"] >= before and (over <= 0 or following is None):
                    break
                over -= row["bytes"]
                found.append(row["id"])
                row = following
            rows.close()
        return found

    def delete(self, job_id: str) -> None:
        with self._lock, self._db:
            self._db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
            self._db.execute("DELETE FROM deliveries WHERE job_id = ?", (job_id,))

    def due(self, now: float) -> list[Delivery]:
        """Webhook calls whose time has come, those that wait longest first."""
        query = "SELECT * FROM deliveries WHERE next_attempt <= ? ORDER BY next_attempt LIMIT 100"
        with self._lock:
            return [_delivery(row) for row in self._db.execute(query, (now,))]

    def next_due(self, after: float) -> float | None:
        """When the first webhook call later than ``after`` is to be made."""
        query = "SELECT min(next_attempt) FROM deliveries WHERE next_attempt > ?"
        with self._lock:
            (first,) = self._db.execute(query, (after,)).fetchone()
        return first

    def attempted(self, delivery_id: str, error: str | None, next_attempt: float | None) -> None:
        """Note an attempt of a webhook call. error: None where it arrived. next_attempt: None for no further one."""
        query = "UPDATE deliveries SET attempts = attempts + 1, error = ?, next_attempt = ?, delivered = ? WHERE id = ?"
        delivered = time.time() if error is None else None
        with self._lock, self._db:
            self._db.execute(query, (error, next_attempt, delivered, delivery_id))

    def delivery(self, job_id: str, event: str) -> Delivery | None:
        """The webhook call that tells this event of a job, once it has happened."""
        with self._lock:
            query = "SELECT * FROM deliveries WHERE job_id = ? AND event = ?"
            row = self._db.execute(query, (job_id, event)).fetchone()
        return None if row is None else _delivery(row)

    def deliveries_waiting(self) -> int:
        with self._lock:
            (count,) = self._db.execute("SELECT count(*) FROM deliveries WHERE next_attempt IS NOT NULL").fetchone()
        return int(count)

    def usual_seconds(self) -> float | None:
        """Mean time of the last ten completed jobs."""
        query = "SELECT avg(d) FROM (SELECT finished - started AS d FROM jobs WHERE status = ? ORDER BY number DESC "
        with self._lock:
            (mean,) = self._db.execute(query + "LIMIT 10)", (COMPLETED,)).fetchone()
        return mean

    def _one(self, where: str, *values: Any) -> Job | None:
        row = self._db.execute(f"SELECT * FROM jobs WHERE {where} LIMIT 1", values).fetchone()
        return None if row is None else _job(row)

    def _get(self, job_id: str) -> Job:
        job = self._one("id = ?", job_id)
        assert job is not None
        return job

    def _count(self, where: str, *values: Any) -> int:
        (count,) = self._db.execute(f"SELECT count(*) FROM jobs WHERE {where}", values).fetchone()
        return int(count)

    def _update(self, job_id: str, **values: Any) -> Job:
        columns = ", ".join(f"{name} = ?" for name in values)
        encoded = [json.dumps(value) if name in _JSON else value for name, value in values.items()]
        self._db.execute(f"UPDATE jobs SET {columns} WHERE id = ?", (*encoded, job_id))
        job = self._get(job_id)
        if "status" in values and (event := _event(job)) is not None:
            # In the transaction that changes the job: neither is there without the other after a crash.
            self._db.execute(
                "INSERT OR IGNORE INTO deliveries (id, job_id, event, next_attempt) VALUES (?, ?, ?, ?)",
                (f"msg_{uuid.uuid4().hex}", job_id, event, time.time()),
            )
        return job

    def _tell(self, job: Job) -> None:
        if job.webhook is not None:
            self.announced()


def _event(job: Job) -> str | None:
    """What a webhook has to tell of a job that has come to its status, if its caller asked for that."""
    event = "start" if job.status == RUNNING else "completed" if not job.open else None
    return event if job.webhook is not None and event in job.webhook_events else None


def _delivery(row: sqlite3.Row) -> Delivery:
    return Delivery(**{field.name: row[field.name] for field in fields(Delivery)})


def _job(row: sqlite3.Row) -> Job:
    values = {field.name: row[field.name] for field in fields(Job)}
    values |= {name: json.loads(values[name]) for name in _JSON}
    values["cancelling"] = bool(values["cancelling"])
    return Job(**values)
