"""How long /health takes to answer while the embedded model works:

    python tests/load/health.py [--smoke]

One request after the other, twenty a second, over a connection that stays open, while a job with the default preset
runs and others wait. 99 of 100 answers must take at most 50 ms; the figures depend on what else the machine does.
"""

from __future__ import annotations

import http.client
import os
import sys
import tempfile
import time
from pathlib import Path

from common import REAL, STUB, figures, percentile, running, toy, verdict

LIMIT = 0.050  # seconds
SMOKE_LIMIT = 0.500  # of a busy machine that is tested on
REQUESTS = 1000


def main() -> None:
    smoke = "--smoke" in sys.argv[1:]
    wrong, seconds = [], []
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder) / "data", STUB if smoke else REAL, STUB_SECONDS="5") as service,
    ):
        picture = Path(folder) / "toy.png"
        picture.write_bytes(toy(side=512))
        client = service.client
        options = {"sparse_structure_steps": 50, "shape_slat_steps": 50, "tex_slat_steps": 50}
        ids = [client.submit(picture, seed=seed, **options)["job_id"] for seed in range(2)]
        while client.job(ids[0])["step"] is None:
            time.sleep(0.02)
        connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
        count = 50 if smoke else REQUESTS
        for _ in range(count):
            if all(client.job(job_id)["status"] == "completed" for job_id in ids[-1:]):
                ids.append(client.submit(picture, seed=len(ids), **options)["job_id"])
            start = time.perf_counter()
            connection.request("GET", "/health")
            answer = connection.getresponse()
            answer.read()
            seconds.append(time.perf_counter() - start)
            if answer.status != 200:
                wrong.append(f"/health answered {answer.status}")
            time.sleep(0.05)
        ends = {client.job(job_id)["status"] for job_id in ids}
        wrong += [f"a job {end}" for end in ends if end in ("failed", "cancelled")]
        connection.close()
    figures(
        requests=count,
        jobs=len(ids),
        load_of_the_machine=round(os.getloadavg()[0], 1),
        **{f"ms_of_{p}_percent": 1000 * percentile(seconds, p) for p in (50, 95, 99, 100)},
    )
    limit = SMOKE_LIMIT if smoke else LIMIT
    if (slowest := percentile(seconds, 99)) > limit:
        wrong.append(f"99 of 100 answers took up to {1000 * slowest:.0f} ms, where {1000 * limit:.0f} are allowed")
    verdict(wrong)


if __name__ == "__main__":
    main()
