"""What the service answers, as JSON."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any, Literal

from pydantic import BaseModel, Field

from .jobs import CANCELLED, COMPLETED, FAILED, QUEUED, RUNNING, Delivery, Job, Status
from .runner import Live


class Health(BaseModel):
    status: Literal["healthy", "loading", "unhealthy"]
    message: str
    model_loaded: bool


class Readiness(BaseModel):
    ready: bool
    missing: list[str] = Field(description="One sentence for each thing that is missing.")


class Problem(BaseModel):
    detail: str = Field(description="What is wrong and what to do, in one sentence.")
    job_id: str | None = None


class Deleted(BaseModel):
    job_id: str
    message: str


class WebhookView(BaseModel):
    """The call that tells the end of the job."""

    url: str
    events: list[str]
    attempts: int
    next_attempt_at: datetime | None = Field(description="Null: no attempt follows, or the job has not ended.")
    delivered_at: datetime | None
    error: str | None = Field(description="What was wrong with the last attempt.")


class JobView(BaseModel):
    """A job. An address is null where its file was not asked for, is not there yet, or was deleted."""

    job_id: str
    status: Status
    message: str
    video_url: str | None
    model_url: str | None
    preview_image_url: str | None
    progress: float = Field(description="Fraction of the whole, from 0 to 1.")
    stage: str | None = Field(description="What is being done, while the job runs.")
    step: int | None
    steps: int | None
    queue_position: int | None = Field(description="1: the next one. Null: the job does not wait.")
    estimated_seconds_left: float | None = Field(
        description="From what earlier jobs took, the wait included. Null: none like it was made yet, or it has ended."
    )
    cancelling: bool = Field(description="Somebody asked to cancel the job.")
    interruptions: int = Field(description="How often the service died during the job, which then starts anew.")
    seed: int | None = Field(description="The seed that was used.")
    timings: dict[str, float] = Field(description="Seconds per stage.")
    warnings: list[str]
    error: str | None
    options: dict[str, Any]
    webhook: WebhookView | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class JobPage(BaseModel):
    jobs: list[JobView]
    next: str | None = Field(description="Address of the next page; null on the last one.")


def job_view(
    job: Job,
    position: int | None,
    live: Live | None,
    *,
    seconds_left: float | None = None,
    delivery: Delivery | None = None,
) -> JobView:
    """position: in the queue. live: where the job is, if it runs. delivery: call that tells the end."""
    running = live if job.status == RUNNING else None
    return JobView(
        job_id=job.id,
        status=job.status,
        message=_message(job, position, running),
        video_url=_address(job, "output.mp4"),
        model_url=_address(job, "output.glb"),
        preview_image_url=_address(job, "preview.png"),
        progress=1.0 if job.status == COMPLETED else running.progress if running else 0.0,
        stage=running.stage if running else None,
        step=running.step if running else None,
        steps=running.steps if running else None,
        queue_position=position,
        estimated_seconds_left=None if seconds_left is None else round(seconds_left, 1),
        cancelling=job.cancelling,
        interruptions=job.interruptions,
        seed=job.seed,
        timings=job.timings,
        warnings=job.warnings,
        error=job.error,
        options=job.options,
        webhook=_webhook(job, delivery),
        created_at=_date(job.created),
        started_at=_date(job.started) if job.started else None,
        finished_at=_date(job.finished) if job.finished else None,
    )


def _message(job: Job, position: int | None, live: Live | None) -> str:
    if job.status == COMPLETED:
        return "3D generation completed successfully" if job.files else "3D generation completed; its files are deleted"
    if job.status == QUEUED:
        again = "queued again, because the service was interrupted" if job.interruptions else "queued"
        return f"3D generation {again}; position {position}"
    if job.status == RUNNING:
        return f"3D generation running: {live.stage}" if live else "3D generation started"
    return {FAILED: "3D generation failed", CANCELLED: "3D generation cancelled"}[job.status]


def _webhook(job: Job, delivery: Delivery | None) -> WebhookView | None:
    if job.webhook is None:
        return None
    following, delivered = (delivery.next_attempt, delivery.delivered) if delivery else (None, None)
    return WebhookView(
        url=job.webhook,
        events=job.webhook_events,
        attempts=delivery.attempts if delivery else 0,
        next_attempt_at=_date(following) if following else None,
        delivered_at=_date(delivered) if delivered else None,
        error=delivery.error if delivery else None,
    )


def _address(job: Job, name: str) -> str | None:
    return f"/api/v1/outputs/{job.id}/{name}" if name in job.files else None


def _date(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)
