"""Worker of the service on this machine or another: ``python worker.py``, or ``celery --app worker worker``.

It needs the extra ``cluster``, takes a GPU that no other worker has, loads the model, and runs the jobs of the service
(``python api.py`` with the same TRELLIS2_REDIS) one after the other. SIGTERM gives the running job back to the queue.

Settings (environment), those of ``api.py`` that are about jobs:
    TRELLIS2_REDIS             Redis that connects service and workers, such as redis://host:6379/0
    TRELLIS2_STORAGE           folder or address (s3://bucket/folder) of uploads and outputs, the same for all
    TRELLIS2_DATA              folder on this machine; it is also the storage where TRELLIS2_STORAGE is not set
    TRELLIS2_LEASE_SECONDS     time after which a worker that is not heard of counts as dead, the same for all (20)
    TRELLIS2_MODEL, TRELLIS2_MATTING, TRELLIS2_GPU_MEMORY, TRELLIS2_VIDEO_FRAMES, TRELLIS2_VIDEO_RESOLUTION
                               as in ``api.py``
    CUDA_VISIBLE_DEVICES       the GPU to use; unset: one that has no worker yet
"""

from __future__ import annotations

import sys

from trellis2.errors import InputError
from trellis2.service.settings import settings_from_environment

try:
    settings = settings_from_environment()
    if settings.redis is None:
        raise InputError("TRELLIS2_REDIS is not set; give the address of the service's Redis.")
    from trellis2.service.remote_worker import worker_app
except InputError as error:
    sys.exit(f"worker.py: {error}")
except ImportError as error:
    sys.exit(f"worker.py: the packages of the extra cluster are missing ({error}): pip install '.[cluster]'")
app = worker_app(settings)

if __name__ == "__main__":
    app.worker_main(["--quiet", "worker", "--without-gossip", "--without-mingle", "--without-heartbeat"])
