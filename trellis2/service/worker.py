"""Who runs the jobs of the store: here the one thread that owns the model; ``cluster`` has workers elsewhere."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from .estimate import REMEMBERED, History
from .jobs import COMPLETED, RUNNING, Job, JobStore
from .runner import CANCEL, GIVE_BACK, Live, Runner, Work
from .settings import Settings
from .storage import Storage, StorageError

T = TypeVar("T")

logger = logging.getLogger("trellis2.service")

NEWS_INTERVAL = 0.2  # seconds between two reports of progress within a stage, at least
HOUSEKEEPING_INTERVAL = 600.0  # seconds between two looks at the age of files while nothing else happens
RETRY_INTERVAL = 1.0  # seconds between two attempts to write to the database when the disk is full


class Bell:
    """Tells coroutines that there is news of a job; may be rung from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._listeners: dict[str, set[asyncio.Event]] = defaultdict(set)

    def ring(self, job_id: str | None = None) -> None:
        """News of this job, or, without an id, of all: their places in the queue may have changed."""
        self._loop.call_soon_threadsafe(self._wake, job_id)

    def _wake(self, job_id: str | None) -> None:
        for key in [job_id] if job_id is not None else list(self._listeners):
            for event in self._listeners.get(key, ()):
                event.set()

    @contextmanager
    def listen(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever there is news."""
        event = asyncio.Event()
        self._listeners[job_id].add(event)
        try:
            yield event
        finally:
            self._listeners[job_id].discard(event)
            if not self._listeners[job_id]:
                del self._listeners[job_id]


class Workforce:
    """A thread that has the jobs of the store run.

    ``problem``: why none can ever be run, in a sentence. ``ended`` and ``stage_seconds`` count since the start.
    ``history``: what jobs took, those before the start included. ``live``: where the running jobs are, by id.
    """

    def __init__(self, settings: Settings, store: JobStore, storage: Storage, bell: Bell) -> None:
        self.ended: Counter[str] = Counter()
        self.stage_seconds: Counter[str] = Counter()
        self.live: dict[str, Live] = {}
        self.history = History()
        for job in store.last_completed(4 * REMEMBERED):
            self.history.add(job.options, job.timings)
        self._settings = settings
        self._store = store
        self._storage = storage
        self._bell = bell
        self._news = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trellis2-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End; what runs here goes back to the queue within a step."""
        self._stopping.set()
        self._news.set()
        if self.stoppable:
            self._thread.join()

    def wake(self) -> None:
        """A job was added."""
        self._news.set()

    @property
    def problem(self) -> str | None:
        return None

    @property
    def alive(self) -> bool:
        """Whether the thread is there."""
        return self._thread.is_alive()

    @property
    def stoppable(self) -> bool:
        """Whether the thread ends soon after it is told to."""
        return self._thread.is_alive()

    @property
    def count(self) -> int:
        """How many jobs can run at the same time."""
        return 1

    @property
    def loaded(self) -> bool:
        """Whether somebody has the model."""
        raise NotImplementedError

    @property
    def loading(self) -> bool:
        """Whether the model is about to be there."""
        return False

    @property
    def missing(self) -> str | None:
        """What has to come before jobs are run, in a sentence."""
        raise NotImplementedError

    def refusal(self, pipeline_type: str) -> str | None:
        """Why the memory is not enough for a preset; None where it is, or where that is not known."""
        raise NotImplementedError

    def cancel(self, job: Job) -> None:
        """Stop a running job within a step, or forget one that was cancelled while it waited."""
        raise NotImplementedError

    def _run(self) -> None:
        raise NotImplementedError

    def _finish(self, job_id: str, outcome: Mapping[str, Any]) -> None:
        """Note how a job ended."""
        ended = self._insist(lambda: self._store.finish(job_id, **outcome))
        self._discard(lambda: self._storage.close(job_id))
        self.ended[ended.status] += 1
        if ended.status == COMPLETED:
            self.stage_seconds.update(ended.timings)
            self.history.add(ended.options, ended.timings)

    def _tidy(self) -> None:
        """Forget the oldest ended jobs, by age and by the room that their files take; the newest stays."""
        too_old = time.time() - 3600 * self._settings.keep_hours
        for job_id in self._store.to_forget(too_old, 1e9 * self._settings.keep_gigabytes):
            self._store.delete(job_id)
            self._discard(partial(self._storage.delete_outputs, job_id))

    def _discard(self, remove: Callable[[], None]) -> None:
        """Remove files; what stays is removed at the next start."""
        try:
            remove()
        except (OSError, StorageError) as error:
            logger.error("Files of a job could not be removed: %s", error)

    def _insist(self, do: Callable[[], T]) -> T:
        """Write to the database, again and again while the disk is full: the loss would be a job's."""
        while True:
            try:
                return do()
            except sqlite3.OperationalError as error:
                if self._stopping.is_set():
                    raise
                logger.error("The database of jobs cannot be written (%s); trying again", error)
                self._stopping.wait(RETRY_INTERVAL)


class Worker(Workforce):
    """Loads the model in this process, then runs the jobs one after the other."""

    def __init__(self, settings: Settings, store: JobStore, storage: Storage, bell: Bell) -> None:
        super().__init__(settings, store, storage, bell)
        self._runner = Runner(storage, settings.video)
        self._cancelled: str | None = None
        self._reported = 0.0

    @property
    def problem(self) -> str | None:
        return self._runner.problem

    @property
    def alive(self) -> bool:
        """Whether the thread is there, or ended because the model could not be loaded."""
        return self._thread.is_alive() or self.problem is not None

    @property
    def stoppable(self) -> bool:
        return self.loaded  # a download of the model would be waited for in vain

    @property
    def loaded(self) -> bool:
        return self._runner.loaded

    @property
    def loading(self) -> bool:
        return not self.loaded and self.problem is None

    @property
    def missing(self) -> str | None:
        return "The model is being loaded." if self.loading else self.problem

    def refusal(self, pipeline_type: str) -> str | None:
        memory = self._runner.memory()
        return None if memory is None else memory.refusal(pipeline_type)

    def cancel(self, job: Job) -> None:
        if job.status == RUNNING:
            self._cancelled = job.id

    def _run(self) -> None:
        loaded = self._runner.load()
        if not self._stopping.is_set():
            self._bell.ring()
        while loaded and not self._stopping.is_set():
            self._news.clear()
            job = self._insist(self._store.claim)
            if job is not None:
                self._work(job)
            self._insist(self._tidy)
            if job is None:
                self._news.wait(HOUSEKEEPING_INTERVAL)

    def _work(self, job: Job) -> None:
        def stop() -> str | None:
            return CANCEL if self._cancelled == job.id else GIVE_BACK if self._stopping.is_set() else None

        self._bell.ring()
        outcome = self._runner.run(Work(job.id, job.options, self._settings.job_seconds, job.trace), stop, self._report)
        if outcome is None:
            self._insist(lambda: self._store.requeue(job.id))
        else:
            self._finish(job.id, outcome)
        self.live = {}
        self._bell.ring()

    def _report(self, live: Live) -> None:
        before, self.live = self.live.get(live.job_id), {live.job_id: live}
        if before is None or before.stage != live.stage or live.since - self._reported >= NEWS_INTERVAL:
            self._reported = live.since
            self._bell.ring(live.job_id)
