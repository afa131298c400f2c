"""The service, killed twenty times at moments that nobody chose, with the embedded model:

    python tests/load/kill_nine.py [--smoke]

Before each kill jobs are submitted, one of them while the kill comes.  In the end every accepted job must have
completed, or failed with a reason, and every file must be whole.
"""

from __future__ import annotations

import io
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import av
from common import REAL, STUB, Running, figures, running, toy, verdict
from PIL import Image

from client_examples import TRELLIS2Client, TRELLIS2Error
from trellis2.export import read_glb

QUICK = {
    "pipeline_type": "512",
    "sparse_structure_steps": 2,
    "shape_slat_steps": 2,
    "tex_slat_steps": 2,
    "decimation_target": 100_000,
    "texture_size": 1024,
}


class Submitted:
    """Jobs that the service said it accepted."""

    def __init__(self, picture: Path) -> None:
        self.picture = picture
        self.ids: list[str] = []

    def add(self, client: TRELLIS2Client) -> None:
        with suppress(TRELLIS2Error):  # killed before it answered
            self.ids.append(client.submit(self.picture, seed=len(self.ids), **QUICK)["job_id"])


def whole(name: str, content: bytes, folder: Path) -> None:
    """Raises whatever a reader of a damaged file raises."""
    if name == "output.glb":
        path = folder / name
        path.write_bytes(content)
        read_glb(path)
    elif name == "output.mp4":
        with av.open(io.BytesIO(content)) as video:
            assert len(list(video.decode(video=0))) == 4
    else:
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()


def check(service: Running, ids: list[str], folder: Path, read: bool) -> tuple[list[str], Counter[str], float]:
    """What is wrong with the jobs, how they ended, and how long the longest took."""
    client, wrong, ends, longest = service.client, [], Counter[str](), 0.0
    for job_id in ids:
        job = client.job(job_id)
        while job["status"] in ("queued", "running"):
            time.sleep(0.1)
            job = client.job(job_id)
        ends[f"{job['status']}, interrupted {job['interruptions']} times"] += 1
        longest = max(longest, sum(job["timings"].values()))
        if job["status"] == "failed" and not re.search("interrupted 3 times", job["error"] or ""):
            wrong.append(f"{job_id} failed: {job['error']}")
        if job["status"] == "cancelled":
            wrong.append(f"{job_id} was cancelled, by nobody")
        if job["status"] == "completed":
            for kind in ("model_url", "video_url", "preview_image_url"):
                if job[kind] is None:
                    wrong.append(f"{job_id} has no {kind}")
                    continue
                path = client.download_file(job[kind], folder / "download")
                try:
                    if read:
                        whole(job[kind].rpartition("/")[2], path.read_bytes(), folder)
                except Exception as error:
                    wrong.append(f"{job[kind]} is damaged: {error!r}")
    return wrong, ends, longest


def left_behind(data: Path, ids: list[str]) -> list[str]:
    """Files of no job, or of finished jobs, which go a moment after these are finished."""
    for _ in range(50):
        strays = [*(data / "uploads").iterdir(), *(data / "work").iterdir()]
        strays += [path for path in (data / "outputs").iterdir() if path.name not in ids]
        if not strays:
            break
        time.sleep(0.1)
    return [f"{path} was left behind" for path in strays]


def main() -> None:
    smoke = "--smoke" in sys.argv[1:]
    kills, command = (3, STUB) if smoke else (20, REAL)
    chance = random.Random()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        picture, data = Path(folder) / "toy.png", Path(folder) / "data"
        picture.write_bytes(toy())
        submitted = Submitted(picture)
        moments = []
        usual = 0.5
        started = time.monotonic()
        with running(data, command, STUB_SECONDS="0.3") as service:
            submitted.add(service.client)
            first, ends, _ = check(service, submitted.ids, Path(folder), not smoke)
            wrong += first
            job = service.client.job(submitted.ids[0])
            usual = max(usual, sum(job["timings"].values()))
        for _ in range(kills):
            with running(data, command, STUB_SECONDS="0.3") as service:
                submitted.add(service.client)
                moment = chance.uniform(0, 1.2 * usual)
                moments.append(round(moment, 2))
                time.sleep(moment)
                # Another is on its way when the kill comes.
                thread = threading.Thread(target=submitted.add, args=(service.client,))
                thread.start()
                time.sleep(chance.uniform(0, 0.03))
                service.kill()
                thread.join()
        with running(data, command, STUB_SECONDS="0.3") as service:
            # Those of which no answer came are jobs too.
            listed = [job["job_id"] for job in service.client._json("GET", "/api/v1/jobs?limit=100")["jobs"]]
            wrong += [f"{job_id} was lost" for job_id in set(submitted.ids) - set(listed)]
            last, ends, longest = check(service, listed, Path(folder), not smoke)
            wrong += last
            wrong += left_behind(data, listed)
        figures(
            kills=kills,
            seconds_after_a_submission=sorted(moments),
            accepted_jobs=len(submitted.ids),
            jobs_without_an_answer=len(listed) - len(submitted.ids),
            ends=dict(ends),
            longest_job_in_s=longest,
            seconds=round(time.monotonic() - started),
        )
    verdict(wrong)


if __name__ == "__main__":
    main()
