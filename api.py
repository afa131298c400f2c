"""HTTP service: ``python api.py``, or ``uvicorn api:app --host 0.0.0.0 --port 8000``; /docs shows its routes.

Settings of a deployment (environment):
    TRELLIS2_MODEL             checkpoint to serve: a folder, or the id of a repository on the hub
    TRELLIS2_MATTING           network that removes backgrounds: a folder, a hub id, or none
    TRELLIS2_GPU_MEMORY        GiB of GPU memory to stay within; empty takes what is free
    TRELLIS2_DATA              folder of jobs, uploads and outputs (out/service); one process uses it at a time
    TRELLIS2_STORAGE           another folder, or an address such as s3://bucket/folder, of uploads and outputs
    TRELLIS2_REDIS             Redis, such as redis://host:6379/0, whose workers (``worker.py``) run the jobs on this
                               machine and others; unset: this process runs them
    TRELLIS2_LEASE_SECONDS     time after which such a worker that is not heard of counts as dead (20)
    TRELLIS2_HOST              address that ``python api.py`` listens at (127.0.0.1: this machine alone)
    TRELLIS2_PORT              port that ``python api.py`` listens at (8000)
    TRELLIS2_API_KEYS          keys, separated by commas, of which a caller has to send one; unset: anybody may call
    TRELLIS2_CORS_ORIGINS      origins, separated by commas, whose pages may call from a browser; unset: none
    TRELLIS2_QUEUE             jobs that may wait; more are answered with 429 (16)
    TRELLIS2_JOB_SECONDS       time a job may take before it is stopped and fails (3600)
    TRELLIS2_KEEP_HOURS        age at which a job and its files are removed (168)
    TRELLIS2_KEEP_GB           room for the files of all jobs; the oldest are removed first (20)
    TRELLIS2_WEBHOOK_SECRET    signs webhooks: whsec_ and base64, such as whsec_$(openssl rand -base64 32); while one
                               takes over from another, both, separated by a comma; unset: webhooks are refused
    TRELLIS2_WEBHOOK_HOSTS     hosts (name or name:port), separated by commas, that webhooks may go to; unset: any
    TRELLIS2_WEBHOOK_PRIVATE   true lets webhooks go to private networks, by http, to any port; for receivers beside
                               the service, with TRELLIS2_WEBHOOK_HOSTS naming them (false)
    TRELLIS2_VIDEO_FRAMES      frames of the turntable (120)
    TRELLIS2_VIDEO_RESOLUTION  width and height of the turntable in pixels (1024)

With the extra ``telemetry`` installed, requests, jobs and their stages are traced to OTEL_EXPORTER_OTLP_ENDPOINT.
"""

from __future__ import annotations

import sys

import uvicorn

from trellis2.errors import InputError
from trellis2.service.app import create_app
from trellis2.service.logs import log_as_json
from trellis2.service.settings import settings_from_environment

try:
    settings = settings_from_environment()
except InputError as error:
    sys.exit(f"api.py: {error}")
log_as_json()
app = create_app(settings)

if __name__ == "__main__":
    uvicorn.run(app, host=settings.host, port=settings.port, log_config=None, server_header=False)
