"""The one thread that owns the model, and how the rest hears from it."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from trellis2.errors import Cancelled, CapacityError, CheckpointError, InputError, TrellisError
from trellis2.image import open_image
from trellis2.options import GenerateOptions
from trellis2.progress import OnProgress

from .capacity import resident_memory
from .estimate import History
from .jobs import CANCELLED, COMPLETED, FAILED, Job, JobStore
from .logs import current_job
from .settings import Settings
from .storage import Storage
from .telemetry import job_spans

if TYPE_CHECKING:
    from trellis2.pipeline import Pipeline

T = TypeVar("T")

logger = logging.getLogger("trellis2.service")

NEWS_INTERVAL = 0.2  # seconds between two reports of progress within a stage, at least
HOUSEKEEPING_INTERVAL = 600.0  # seconds between two looks at the age of files while nothing else happens
RETRY_INTERVAL = 1.0  # seconds between two attempts to write to the database when the disk is full

NAMES = {"video.mp4": "output.mp4", "model.glb": "output.glb", "no_background.png": "preview.png"}
"""What the pipeline calls its files, and what the documentation of the service does."""

ERROR_KINDS: dict[type[TrellisError], str] = {
    InputError: "input",
    CapacityError: "capacity",
    CheckpointError: "checkpoint",
}


@dataclass(frozen=True)
class Live:
    """Where the running job is. ``progress``: fraction of the whole in [0, 1]. ``since``: when its last step ended, on
    the monotonic clock."""

    job_id: str
    stage: str
    step: int
    steps: int
    progress: float
    since: float


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


class Worker:
    """Loads the model, then runs the jobs of the store one after the other.

    ``loaded`` and ``problem`` (a sentence) say how loading went. ``ended`` and ``stage_seconds`` count since the start.
    ``history``: what jobs took, those before the start included. ``resting``: bytes of RAM after loading.
    """

    def __init__(self, settings: Settings, store: JobStore, storage: Storage, bell: Bell) -> None:
        self.live: Live | None = None
        self.loaded = False
        self.problem: str | None = None
        self.ended: Counter[str] = Counter()
        self.stage_seconds: Counter[str] = Counter()
        self.resting = 0
        self.history = History()
        for job in store.with_status(COMPLETED):
            self.history.add(job.options, job.timings)
        self._settings = settings
        self._store = store
        self._storage = storage
        self._bell = bell
        self._news = threading.Event()
        self._stopping = threading.Event()
        self._cancelled: str | None = None
        self._reported = 0.0
        self._thread = threading.Thread(target=self._run, name="trellis2-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Give the running job back to the queue within a step, and end."""
        self._stopping.set()
        self._news.set()
        if self.loaded:  # a download of the model would be waited for in vain
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread is there, or ended because the model could not be loaded."""
        return self._thread.is_alive() or self.problem is not None

    def wake(self) -> None:
        """A job was added."""
        self._news.set()

    def cancel(self, job_id: str) -> None:
        """Stop this job within a step, should it be the running one."""
        self._cancelled = job_id

    def _run(self) -> None:
        pipeline = self._load()
        if not self._stopping.is_set():
            self._bell.ring()
        while pipeline is not None and not self._stopping.is_set():
            self._news.clear()
            job = self._insist(self._store.claim)
            if job is not None:
                self._work(pipeline, job)
            self._insist(self._tidy)
            if job is None:
                self._news.wait(HOUSEKEEPING_INTERVAL)

    def _load(self) -> Pipeline | None:
        start = time.perf_counter()
        try:
            # Imported here, because torch takes seconds and the service should answer at once.
            from trellis2.pipeline import Pipeline

            pipeline = Pipeline.from_pretrained()
        except TrellisError as error:
            self.problem = str(error)
        except Exception:
            logger.exception("The model could not be loaded.")
            self.problem = "The model could not be loaded; the log of the service says why."
        if self.problem is not None:
            logger.error("%s", self.problem)
            return None
        logger.info("Model %s loaded in %.1f s", pipeline.checkpoint.source, time.perf_counter() - start)
        self.resting = resident_memory()
        self.loaded = True
        return pipeline

    def _work(self, pipeline: Pipeline, job: Job) -> None:
        token = current_job.set(job.id)
        logger.info("Started")
        self._bell.ring()
        with job_spans(job.trace, job_id=job.id, pipeline_type=job.options["pipeline_type"]) as began:
            outcome = self._attempt(pipeline, job, began)
        if outcome is None:
            self._insist(lambda: self._store.requeue(job.id))
            logger.info("Back in the queue, because the service stops")
        else:
            ended = self._insist(lambda: self._store.finish(job.id, **outcome))
            self._storage.close(job.id)
            self.ended[ended.status] += 1
            logger.info("Ended: %s", ended.error or ended.status)
        self.live = None
        self._bell.ring()
        current_job.reset(token)

    def _attempt(self, pipeline: Pipeline, job: Job, began: Callable[[str], None]) -> dict[str, Any] | None:
        """Run a job; returns what is to be stored, or None where it was given up because the service stops.

        began: called with each stage.
        """
        deadline = time.monotonic() + self._settings.job_seconds
        try:
            options = GenerateOptions(**job.options, **self._settings.video, return_no_background=True)
            picture = self._storage.upload(job.id)
            files = pipeline.run(picture, options, self._storage.work(job.id), self._reporter(job.id, deadline, began))
            names = self._publish(job.id, picture)
        except Cancelled:
            if self._cancelled == job.id:
                return {"status": CANCELLED}
            if self._stopping.is_set():
                return None
            text = (
                f"The job took longer than the {self._settings.job_seconds:g} seconds that are allowed; ask for less, "
            )
            text += "or raise TRELLIS2_JOB_SECONDS."
            return {"status": FAILED, "error": text, "error_kind": "timeout"}
        except TrellisError as error:
            return {"status": FAILED, "error": str(error), "error_kind": ERROR_KINDS[type(error)]}
        except Exception:
            logger.exception("Failed unexpectedly")
            text = "The generation failed unexpectedly; the log of the service has the details under this job's id."
            return {"status": FAILED, "error": text, "error_kind": "internal"}
        self.stage_seconds.update(files.timings)
        self.history.add(job.options, files.timings)
        return {
            "status": COMPLETED,
            "seed": files.seed,
            "timings": {stage: round(seconds, 3) for stage, seconds in files.timings.items()},
            "warnings": list(files.warnings),
            "files": list(names),
        }

    def _reporter(self, job_id: str, deadline: float, began: Callable[[str], None]) -> OnProgress:
        def on_progress(stage: str, step: int, steps: int, fraction: float) -> None:
            now = time.monotonic()
            if self._stopping.is_set() or self._cancelled == job_id or now > deadline:
                raise Cancelled
            began(stage)
            before, self.live = self.live, Live(job_id, stage, step, steps, round(fraction, 4), now)
            if before is None or before.stage != stage or now - self._reported >= NEWS_INTERVAL:
                self._reported = now
                self._bell.ring(job_id)

        return on_progress

    def _publish(self, job_id: str, picture: bytes) -> tuple[str, ...]:
        """Give the files of a run their documented names and their place."""
        folder = self._storage.works / job_id
        for name, documented in NAMES.items():
            if (folder / name).exists():
                (folder / name).rename(folder / documented)
        if not (folder / "preview.png").exists():  # used as it was, and without a visible object
            open_image(picture).save(folder / "preview.png")
        return self._storage.publish(job_id)

    def _tidy(self) -> None:
        """Forget the oldest ended jobs, by age and by the room that their files take; the newest stays."""
        too_old = time.time() - 3600 * self._settings.keep_hours
        room = 1e9 * self._settings.keep_gigabytes
        for age, job in enumerate(reversed(self._store.with_status(COMPLETED, FAILED, CANCELLED))):
            assert job.finished is not None
            room -= self._storage.size(job.id) if job.files else 0
            if job.finished < too_old or (room < 0 and age > 0):
                self._store.delete(job.id)
                self._storage.delete_outputs(job.id)

    def _insist(self, write: Callable[[], T]) -> T:
        """Write to the database, again and again while the disk is full: the loss would be a job's."""
        while True:
            try:
                return write()
            except sqlite3.OperationalError as error:
                if self._stopping.is_set():
                    raise
                logger.error("The database of jobs cannot be written (%s); trying again", error)
                self._stopping.wait(RETRY_INTERVAL)
