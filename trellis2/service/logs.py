"""One JSON object per line on standard error, with the id of the job that a line is about."""

from __future__ import annotations

import json
import logging
import os
import re
from contextvars import ContextVar
from datetime import datetime, timezone

current_job: ContextVar[str | None] = ContextVar("current_job", default=None)
"""Id of the job that this thread or task works on; what the pipeline logs meanwhile carries it."""


# The server logs the whole traceback where we say, in a sentence, why the service cannot start.
_OURS = re.compile(r"\ATraceback .*\ntrellis2\.errors\.\w+: ", re.DOTALL)


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _OURS.sub("", record.getMessage()),
        }
        if (job_id := getattr(record, "job_id", None) or current_job.get()) is not None:
            line["job_id"] = job_id
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def log_as_json() -> None:
    """Set up the whole process: our lines, the server's, and warnings of libraries."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when the libraries that load weights are imported
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    for name in ("trellis2", "uvicorn", "uvicorn.access", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = []
        logger.propagate = True
        logger.setLevel(logging.INFO)
    logging.captureWarnings(True)
