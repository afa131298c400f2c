"""What the service and its workers on other machines agree upon: the queue, and the few keys beside it in Redis.

Celery carries jobs from the service to one worker each.  It acknowledges late, so that what a dead worker had is
delivered again; it cannot tell a dead worker from a slow one, though.  Hence every job also has a *lease*: a key that
its worker renews several times a second and that vanishes with the worker.  A job is sent again under a new number, its
*attempt*, and only the attempt that counts may take the lease or report.  However often Celery delivers a message, a
job runs once at a time.

Redis may lose everything: the service has the jobs in its own file and sends again what is missing here.

    trellis2, trellis2-again    Celery's queues; the second, for what was interrupted, is served first
    trellis2:attempt:JOB        the attempt that counts, or "ended"
    trellis2:lease:JOB          worker and attempt that hold the job; expires
    trellis2:live:JOB           where it is, as JSON; expires
    trellis2:cancel:JOB         somebody cancelled it
    trellis2:events             list of what began and ended, as JSON, until the service has noted it
    trellis2:worker:ID          a worker that has the model, as JSON; expires
    trellis2:gpu:UUID           the worker that has a GPU; expires
"""

from __future__ import annotations

import json
from typing import Any

from celery import Celery
from kombu import Queue
from redis import Redis

from .settings import Settings

QUEUE = "trellis2"
QUEUE_AGAIN = "trellis2-again"
TASK = "trellis2.generate"

EVENTS = "trellis2:events"
WORKERS = "trellis2:worker:"
GPUS = "trellis2:gpu:"
STARTED, ENDED, RETURNED = "started", "ended", "returned"

FORGET_SECONDS = 86400  # after which keys of ended jobs go
ANSWER_SECONDS = 5.0  # that Redis may take to answer

_CLAIM = """
if redis.call('get', KEYS[1]) ~= ARGV[1] then return 0 end
if not redis.call('set', KEYS[2], ARGV[2], 'NX', 'PX', ARGV[3]) then return 0 end
redis.call('rpush', KEYS[3], ARGV[4])
return 1
"""
# A Redis that lost its data has neither key; the worker that is at the job then puts them back.
_RENEW = """
local attempt, holder = redis.call('get', KEYS[1]), redis.call('get', KEYS[2])
if attempt and attempt ~= ARGV[1] or holder and holder ~= ARGV[2] then return 'lost' end
redis.call('set', KEYS[1], ARGV[1])
redis.call('set', KEYS[2], ARGV[2], 'PX', ARGV[3])
if ARGV[4] ~= '' then redis.call('set', KEYS[3], ARGV[4], 'PX', ARGV[3]) end
return redis.call('exists', KEYS[4]) == 1 and 'cancel' or 'held'
"""
_REPORT = """
local attempt = redis.call('get', KEYS[1])
if attempt and attempt ~= ARGV[1] then return 0 end
redis.call('set', KEYS[1], 'ended', 'EX', ARGV[2])
redis.call('del', KEYS[3])
redis.call('rpush', KEYS[4], ARGV[3])
return 1
"""


def celery_app(settings: Settings) -> Celery:
    """Celery over the Redis of the settings: for the service to send jobs, for a worker to take them one by one."""
    app = Celery("trellis2", broker=settings.redis)
    app.conf.update(
        accept_content=["json"],
        broker_connection_max_retries=None,
        broker_connection_retry_on_startup=True,
        broker_transport_options={
            "health_check_interval": 10,
            "queue_order_strategy": "priority",
            "socket_connect_timeout": ANSWER_SECONDS,
            "socket_keepalive": True,
            # Only when leases have failed; a message that is delivered while its job runs is dropped.
            "visibility_timeout": settings.job_seconds + 600,
        },
        task_acks_late=True,
        task_default_queue=QUEUE,
        task_ignore_result=True,
        task_queues=[Queue(QUEUE_AGAIN), Queue(QUEUE)],
        task_reject_on_worker_lost=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_concurrency=1,
        worker_hijack_root_logger=False,
        worker_pool="threads",
        worker_prefetch_multiplier=1,
    )
    return app


def connected(settings: Settings) -> Redis:
    """The Redis of the settings, which is connected to at the first command."""
    assert settings.redis is not None
    client: Redis = Redis.from_url(
        settings.redis,
        decode_responses=True,
        health_check_interval=10,
        socket_connect_timeout=ANSWER_SECONDS,
        socket_timeout=ANSWER_SECONDS,
    )
    return client


def key(kind: str, job_id: str) -> str:
    """kind: attempt, lease, live or cancel."""
    return f"trellis2:{kind}:{job_id}"


class Lease:
    """A worker's hold of an attempt of a job."""

    def __init__(self, redis: Redis, worker: str, job_id: str, attempt: int, seconds: float) -> None:
        self._job_id = job_id
        self._attempt = attempt
        self._token = f"{worker} {attempt}"
        self._milliseconds = int(1000 * seconds)
        self._claim = redis.register_script(_CLAIM)
        self._renew = redis.register_script(_RENEW)
        self._report = redis.register_script(_REPORT)

    def claim(self) -> bool:
        """Take the job; False where another has it, or this attempt no longer counts."""
        keys = [key("attempt", self._job_id), key("lease", self._job_id), EVENTS]
        return bool(self._claim(keys, [self._attempt, self._token, self._milliseconds, self._event(STARTED)]))

    def renew(self, live: str) -> str:
        """Hold on, and tell where the job is, as JSON; answers "held", "cancel" or "lost"."""
        keys = [key(kind, self._job_id) for kind in ("attempt", "lease", "live", "cancel")]
        return str(self._renew(keys, [self._attempt, self._token, self._milliseconds, live]))

    def report(self, kind: str, **facts: Any) -> bool:
        """Tell how the attempt ended; False where it no longer counts."""
        keys = [key(kind, self._job_id) for kind in ("attempt", "lease", "live")]
        return bool(self._report([*keys, EVENTS], [self._attempt, FORGET_SECONDS, self._event(kind, **facts)]))

    def _event(self, kind: str, **facts: Any) -> str:
        return json.dumps({"event": kind, "job_id": self._job_id, "attempt": self._attempt, **facts})
