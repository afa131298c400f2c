"""A worker on whatever machine: takes one job after the other from Celery's queue and runs it on its GPU."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar
from uuid import UUID

from celery import Celery, signals
from redis import Redis, RedisError

from trellis2.errors import CapacityError, TrellisError

from .broker import ENDED, GPUS, RETURNED, TASK, WORKERS, Lease, celery_app, connected
from .logs import log_as_json
from .runner import CANCEL, GIVE_BACK, Live, Runner, Work
from .settings import Settings
from .storage import open_storage
from .telemetry import trace_worker

T = TypeVar("T")

logger = logging.getLogger("trellis2.service")

BEAT_INTERVAL = 0.1  # seconds between two renewals of a lease
PRESENCE_INTERVAL = 1.0  # seconds between two signs of life
RETRY_INTERVAL = 1.0  # seconds between two attempts to reach Redis


def worker_app(settings: Settings) -> Celery:
    """The Celery application of a worker; when it starts, it takes a GPU and loads the model."""
    app = celery_app(settings)
    worker = RemoteWorker(settings)

    @app.task(name=TASK)  # type: ignore[untyped-decorator]
    def generate(job_id: str, attempt: int, options: dict[str, Any], seconds: float, trace: str | None) -> None:
        # Paths are made of it, and what is in Redis is only as safe as Redis is.
        worker.work(Work(str(UUID(job_id)), options, seconds, trace), attempt)

    # Kept by reference: Celery would forget them.
    signals.setup_logging.connect(_log, weak=False)
    signals.worker_init.connect(lambda **_: worker.start(), weak=False)
    signals.worker_shutting_down.connect(lambda **_: worker.tell_to_stop(), weak=False)
    signals.worker_shutdown.connect(lambda **_: worker.stop(), weak=False)
    return app


def _log(**_: Any) -> None:
    log_as_json()


class Hold:
    """A job that this worker runs. ``live``: where it is; ``reason``: to stop it."""

    def __init__(self, lease: Lease, seconds: float) -> None:
        self.live: Live | None = None
        self.reason: str | None = None
        self._lease = lease
        self._seconds = seconds
        self._renewed = time.monotonic()

    def renew(self) -> None:
        live = {} if self.live is None else asdict(self.live)
        told = {name: live[name] for name in ("stage", "step", "steps", "progress") if name in live}
        answer = self._lease.renew(json.dumps(told) if told else "")
        self._renewed = time.monotonic()
        self.reason = {"cancel": CANCEL, "lost": GIVE_BACK, "held": None}[answer]

    @property
    def expired(self) -> bool:
        """Whether the job may run elsewhere by now."""
        return time.monotonic() - self._renewed > self._seconds


class RemoteWorker:
    """Has the model and, while it runs a job, the job's lease."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._redis = connected(settings)
        self._gpu: str | None = None
        self._hold: Hold | None = None
        self._stopping = threading.Event()
        self._gone = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="trellis2-beat", daemon=True)

    def start(self) -> None:
        """Take a GPU and load the model; ends the process, with a sentence in the log, where that is not possible."""
        trace_worker()
        try:
            self._storage = open_storage(self._settings.data, self._settings.storage)
            self._gpu = take_gpu(self._redis, self._name, self._settings.lease_seconds)
        except (TrellisError, RedisError) as error:
            logger.error("%s", error)
            sys.exit(1)
        self._runner = Runner(self._storage, self._settings.video)
        # Before the model is there, which takes longer than a lease of the GPU.
        self._beats.start()
        if not self._runner.load():
            sys.exit(1)
        logger.info("Worker %s waits for jobs", self._name)

    def tell_to_stop(self) -> None:
        """Give the running job back within a step."""
        self._stopping.set()

    def stop(self) -> None:
        """Leave at once, instead of by silence."""
        self._gone.set()
        if self._beats.is_alive():
            self._beats.join()
        try:
            self._redis.delete(WORKERS + self._name, *([GPUS + self._gpu] if self._gpu else []))
        except RedisError as error:
            logger.warning("Redis is not reached: %s", error)

    def work(self, work: Work, attempt: int) -> None:
        """Run a job, unless another worker has it, or it was sent again meanwhile."""
        lease = Lease(self._redis, self._name, work.job_id, attempt, self._settings.lease_seconds)
        if self._stopping.is_set() or not self._insist(lease.claim):
            return  # it is sent again, should it be nobody's
        self._hold = hold = Hold(lease, self._settings.lease_seconds)

        def stop() -> str | None:
            if hold.expired:
                return GIVE_BACK
            return hold.reason or (GIVE_BACK if self._stopping.is_set() else None)

        def report(live: Live) -> None:
            hold.live = live

        try:
            outcome = self._runner.run(work, stop, report)
            if outcome is not None:
                self._insist(lambda: lease.report(ENDED, outcome=outcome))
            elif self._stopping.is_set():
                self._insist(lambda: lease.report(RETURNED))
        finally:
            self._hold = None

    def _beat(self) -> None:
        present = 0.0
        while not self._gone.wait(BEAT_INTERVAL):
            try:
                if time.monotonic() - present > PRESENCE_INTERVAL:
                    self._show_presence()
                    present = time.monotonic()
                if (hold := self._hold) is not None:
                    hold.renew()
            except RedisError as error:
                logger.warning("Redis is not reached: %s", error)
                self._gone.wait(RETRY_INTERVAL)

    def _show_presence(self) -> None:
        milliseconds = int(1000 * self._settings.lease_seconds)
        if self._gpu is not None:
            self._redis.set(GPUS + self._gpu, self._name, px=milliseconds)
        if self._runner.loaded:
            memory = self._runner.memory()
            told = {"memory": None if memory is None else asdict(memory)}
            self._redis.set(WORKERS + self._name, json.dumps(told), px=milliseconds)

    def _insist(self, do: Callable[[], T]) -> T:
        """Speak with Redis, again and again while it does not answer; while the worker stops, only once."""
        while True:
            try:
                return do()
            except RedisError as error:
                if self._stopping.is_set():
                    raise
                logger.warning("Redis is not reached: %s", error)
                self._stopping.wait(RETRY_INTERVAL)


def take_gpu(redis: Redis, worker: str, seconds: float) -> str | None:
    """Take a GPU of this machine that no other worker has, and let this process see no other; None where there is none,
    or where CUDA_VISIBLE_DEVICES says already which to use.

    Waits as long as a dead worker may be thought alive. Raises CapacityError where all have a worker.
    """
    if "CUDA_VISIBLE_DEVICES" in os.environ or not (gpus := _gpus()):
        return None
    deadline = time.monotonic() + seconds + 1
    while True:
        for gpu in gpus:
            if redis.set(GPUS + gpu, worker, nx=True, px=int(1000 * seconds)):
                os.environ["CUDA_VISIBLE_DEVICES"] = gpu
                return gpu
        if time.monotonic() > deadline:
            raise CapacityError(f"Each of the {len(gpus)} GPUs of this machine has a worker; start no more here.")
        time.sleep(0.5)


def _gpus() -> list[str]:
    """Identifiers of the GPUs of this machine."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"\(UUID: (GPU-[0-9a-f-]+)\)", listed)
