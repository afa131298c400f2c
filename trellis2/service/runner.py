"""One job after the other, run with the one model of this process, whoever hands the jobs out."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from trellis2.errors import Cancelled, CapacityError, CheckpointError, InputError, TrellisError
from trellis2.image import open_image
from trellis2.options import GenerateOptions
from trellis2.progress import OnProgress

from .capacity import Memory, free_memory, resident_memory
from .jobs import CANCELLED, COMPLETED, FAILED
from .logs import current_job
from .storage import Storage, StorageError
from .telemetry import job_spans

if TYPE_CHECKING:
    from trellis2.pipeline import Pipeline

logger = logging.getLogger("trellis2.service")

NAMES = {"video.mp4": "output.mp4", "model.glb": "output.glb", "no_background.png": "preview.png"}
"""What the pipeline calls its files, and what the documentation of the service does."""

ERROR_KINDS: dict[type[TrellisError], str] = {
    InputError: "input",
    CapacityError: "capacity",
    CheckpointError: "checkpoint",
}

NO_ROOM = "The service has no room left on its disk; try again later."
NO_ROOM_ERRORS = (errno.ENOSPC, errno.EDQUOT)
NO_STORE = "The store of the service's files does not answer; try again later."
UNEXPECTED = "The generation failed unexpectedly; the log of the service has the details under this job's id."

OUTCOME = ("status", "seed", "timings", "warnings", "files", "bytes", "error", "error_kind")
"""What there is to tell of a run that ended."""

CANCEL: Final = "cancel"
GIVE_BACK: Final = "give back"


@dataclass(frozen=True)
class Live:
    """Where a running job is. ``progress``: fraction of the whole in [0, 1]. ``since``: when its last step ended, on
    the monotonic clock."""

    job_id: str
    stage: str
    step: int
    steps: int
    progress: float
    since: float


@dataclass(frozen=True)
class Work:
    """What to do: a job's options, the seconds it may take, and where its request stands in a trace."""

    job_id: str
    options: Mapping[str, Any]
    seconds: float
    trace: str | None = None


class Runner:
    """Loads the model and runs jobs. ``problem``: why it could not be loaded, in a sentence."""

    def __init__(self, storage: Storage, video: Mapping[str, Any]) -> None:
        self.problem: str | None = None
        self.loaded = False
        self._resting = 0
        self._storage = storage
        self._video = video
        self._pipeline: Pipeline | None = None

    def load(self) -> bool:
        """Load the model; whether it went well."""
        start = time.perf_counter()
        # Read when torch is imported: threads that spin while they wait starve those that work.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        try:
            # Imported here, because torch takes seconds and the service should answer at once.
            from trellis2.pipeline import Pipeline

            pipeline = Pipeline.from_pretrained()
            if pipeline.device.type == "cuda":
                from trellis2.warmup import warm_up

                warm_up(pipeline)
            self._pipeline = pipeline
        except TrellisError as error:
            self.problem = str(error)
        except Exception:
            logger.exception("The model could not be loaded.")
            self.problem = "The model could not be loaded; the log of the service says why."
        if self._pipeline is None:
            logger.error("%s", self.problem)
            return False
        logger.info("Model %s loaded in %.1f s", self._pipeline.checkpoint.source, time.perf_counter() - start)
        self._resting = resident_memory()
        self.loaded = True
        return True

    def memory(self) -> Memory | None:
        """What a job can have; None where that is not known."""
        return free_memory(self._resting) if self.loaded else None

    def run(self, work: Work, stop: Callable[[], str | None], report: Callable[[Live], None]) -> dict[str, Any] | None:
        """Run a job; returns how it ended, those of ``OUTCOME`` that there are; None where it was given up.

        stop: asked at every step; CANCEL ends the job as cancelled, GIVE_BACK gives it up. report: called at every
        step, which it must not delay.
        """
        token = current_job.set(work.job_id)
        try:
            logger.info("Started")
            with job_spans(work.trace, job_id=work.job_id, pipeline_type=work.options["pipeline_type"]) as began:
                outcome = self._run(work, stop, report, began)
            if outcome is None:
                logger.info("Given back to the queue")
            else:
                logger.info("Ended: %s", outcome.get("error") or outcome["status"])
            return outcome
        finally:
            current_job.reset(token)

    def _run(
        self,
        work: Work,
        stop: Callable[[], str | None],
        report: Callable[[Live], None],
        began: Callable[[str], None],
    ) -> dict[str, Any] | None:
        assert self._pipeline is not None
        reason: str | None = None
        deadline = time.monotonic() + work.seconds

        def go_on() -> float:
            nonlocal reason
            reason, now = stop(), time.monotonic()
            if reason is not None or now > deadline:
                raise Cancelled
            return now

        def on_progress(stage: str, step: int, steps: int, fraction: float) -> None:
            now = go_on()
            began(stage)
            report(Live(work.job_id, stage, step, steps, round(fraction, 4), now))

        folder: Path | None = None
        try:
            folder = self._storage.work(work.job_id)
            return self._attempt(self._pipeline, work, folder, on_progress, go_on)
        except Cancelled:
            if reason == GIVE_BACK:
                return None
            if reason == CANCEL:
                return {"status": CANCELLED}
            text = f"The job took longer than the {work.seconds:g} seconds that are allowed; ask for less, "
            return _failed(text + "or raise TRELLIS2_JOB_SECONDS.", "timeout")
        except TrellisError as error:
            if folder is None or str(folder) not in str(error):
                return _failed(str(error), ERROR_KINDS[type(error)])
            # About the service's own files, whose place is nobody's business.
            logger.error("%s", error)
            return _failed(NO_ROOM, "capacity") if isinstance(error, CapacityError) else _failed(UNEXPECTED, "internal")
        except StorageError as error:
            logger.error("The files' store: %s", error)
            return _failed(NO_STORE, "capacity")
        except OSError as error:
            logger.exception("Failed unexpectedly")
            return _failed(NO_ROOM, "capacity") if error.errno in NO_ROOM_ERRORS else _failed(UNEXPECTED, "internal")
        except Exception:
            logger.exception("Failed unexpectedly")
            return _failed(UNEXPECTED, "internal")
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    def _attempt(
        self, pipeline: Pipeline, work: Work, folder: Path, on_progress: OnProgress, go_on: Callable[[], object]
    ) -> dict[str, Any]:
        options = GenerateOptions(**work.options, **self._video, return_no_background=True)
        picture = self._storage.upload(work.job_id)
        files = pipeline.run(picture, options, folder, on_progress)
        for name, documented in NAMES.items():
            if (folder / name).exists():
                (folder / name).rename(folder / documented)
        if not (folder / "preview.png").exists():  # used as it was, and without a visible object
            open_image(picture).save(folder / "preview.png")
        go_on()
        published = self._storage.publish(work.job_id, folder)
        return {
            "status": COMPLETED,
            "seed": files.seed,
            "timings": {stage: round(seconds, 3) for stage, seconds in files.timings.items()},
            "warnings": list(files.warnings),
            "files": list(published),
            "bytes": sum(published.values()),
        }


def _failed(error: str, kind: str) -> dict[str, Any]:
    return {"status": FAILED, "error": error, "error_kind": kind}
