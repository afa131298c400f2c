"""A thousand requests over fifty connections at once, of all kinds, with a stand-in for the model:

    python tests/load/many_requests.py [--smoke]

No accepted job may be lost, no answer may be a 5xx, every file must be the one that was asked for, memory must stay.
"""

from __future__ import annotations

import http.client
import json
import random
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from common import STUB, Running, figures, percentile, running, toy, verdict
from stub_service import contents

from client_examples import TRELLIS2Error, multipart

MEMORY_LIMIT = 100.0  # MB by which the process may grow
MIX = {"submit": 30, "submit_again": 5, "wait": 5, "poll": 25, "events": 10, "download": 10, "delete": 5, "bad": 10}


@dataclass
class Load:
    """What the connections share. ``jobs``: accepted ones by id, with their seeds."""

    service: Running
    left: int
    random: random.Random = field(default_factory=lambda: random.Random(1))
    lock: threading.Lock = field(default_factory=threading.Lock)
    jobs: dict[str, int] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    statuses: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    wrong: list[str] = field(default_factory=list)

    def next(self) -> tuple[str, int] | None:
        """What to do, and a seed for it; None when it is enough."""
        with self.lock:
            if not self.left:
                return None
            self.left -= 1
            kind = self.random.choices(list(MIX), list(MIX.values()))[0]
            return (kind if self.jobs else "submit"), self.random.randrange(2**31)


class Connection:
    """One of the fifty; stays open, as long as the service leaves it open."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.http = http.client.HTTPConnection("127.0.0.1", load.service.port, timeout=60)

    def run(self) -> None:
        while (task := self.load.next()) is not None:
            kind, seed = task
            start = time.perf_counter()
            try:
                getattr(self, kind)(random.Random(seed))
            except (OSError, http.client.HTTPException) as error:
                self.load.wrong.append(f"{kind}: the connection broke: {error!r}")
                self.http.close()
            with self.load.lock:
                self.load.seconds[kind].append(time.perf_counter() - start)

    def ask(
        self, method: str, path: str, expected: tuple[int, ...], body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes]:
        self.http.request(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()})
        response = self.http.getresponse()
        content = response.read()
        with self.load.lock:
            self.load.statuses[response.status] += 1
            if response.status not in expected:
                self.load.wrong.append(f"{method} {path}: {response.status} {content[:200]!r}")
        return response.status, content

    def post(self, seed: int, expected: tuple[int, ...], wait: bool, **headers: str) -> str | None:
        kind, body = multipart("toy.png", toy(), {"seed": seed, "wait": wait})
        status, content = self.ask("POST", "/api/v1/image-to-3d", expected, body, Content_Type=kind, **headers)
        if status not in (200, 202):
            return None
        job = json.loads(content)
        with self.load.lock:
            self.load.jobs[job["job_id"]] = seed
        return str(job["job_id"])

    def any_job(self, chance: random.Random) -> str:
        with self.load.lock:
            return chance.choice(list(self.load.jobs))

    def submit(self, chance: random.Random) -> None:
        self.post(chance.randrange(1000), (202,), wait=False)

    def submit_again(self, chance: random.Random) -> None:
        seed, key = chance.randrange(1000), f"key {chance.random()}"
        ids = {self.post(seed, (202,), wait=False, Idempotency_Key=key) for _ in range(3)}
        if len(ids) != 1:
            self.load.wrong.append(f"one key made the jobs {ids}")

    def wait(self, chance: random.Random) -> None:
        self.post(chance.randrange(1000), (200,), wait=True, Idempotency_Key=f"waits {chance.random()}")

    def poll(self, chance: random.Random) -> None:
        path = f"/api/v1/jobs/{self.any_job(chance)}"
        self.ask("GET", chance.choice([path, path, "/api/v1/jobs?limit=5", "/health", "/metrics"]), (200,))

    def events(self, chance: random.Random) -> None:
        _, content = self.ask("GET", f"/api/v1/jobs/{self.any_job(chance)}/events", (200,))
        last = json.loads(content.split(b"data: ")[-1])
        if last["status"] != "completed":
            self.load.wrong.append(f"an event stream ended with {last['status']}")

    def download(self, chance: random.Random) -> None:
        job_id = self.any_job(chance)
        seed = self.load.jobs[job_id]
        status, content = self.ask("GET", f"/api/v1/outputs/{job_id}/output.glb", (200, 404))
        if status == 200 and content != contents(seed, "model.glb"):
            self.load.wrong.append(f"{job_id}: not the file that was made")

    def delete(self, chance: random.Random) -> None:
        job_id = self.any_job(chance)
        status, _ = self.ask("DELETE", f"/api/v1/outputs/{job_id}", (200, 409))
        if status == 200:
            with self.load.lock:
                self.load.deleted.add(job_id)

    def bad(self, chance: random.Random) -> None:
        kind, body = multipart("toy.png", toy()[: chance.randrange(300)], {"seed": chance.choice(["x", "1", "-1e9"])})
        paths = ["/api/v1/jobs/none", "/api/v1/outputs/none/output.glb", "/api/v1/outputs/..%2f..%2fjobs.sqlite3/x"]
        if chance.random() < 0.5:
            self.ask("GET", chance.choice(paths), (404,))
        else:
            self.ask("POST", "/api/v1/image-to-3d", (422,), body, Content_Type=kind)


def check_jobs(load: Load) -> None:
    """All accepted jobs have completed, and no others are there."""
    client = load.service.client
    listed, path = set(), "/api/v1/jobs?limit=100"
    while path is not None:
        page = client._json("GET", path)
        listed |= {job["job_id"] for job in page["jobs"]}
        path = page["next"]
    if listed != load.jobs.keys():
        load.wrong.append(f"{len(load.jobs.keys() - listed)} jobs were lost, {len(listed - load.jobs.keys())} appeared")
    for job_id in load.jobs:
        try:
            job = client.wait(client.job(job_id), max_seconds=120)
        except TRELLIS2Error as error:
            load.wrong.append(f"{job_id}: {error}")
            continue
        if (job["model_url"] is None) != (job_id in load.deleted):
            load.wrong.append(f"{job_id}: deleted {job_id in load.deleted}, but its address is {job['model_url']}")


def main() -> None:
    smoke = "--smoke" in sys.argv[1:]
    requests, connections = (150, 10) if smoke else (1000, 50)
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder) / "data", STUB, STUB_SECONDS="0.02", TRELLIS2_QUEUE="1000") as service,
    ):
        warm = Load(service, 40)
        Connection(warm).run()
        before, files = service.memory(), service.open_files()
        load = Load(service, requests, jobs=dict(warm.jobs), deleted=set(warm.deleted))
        start = time.monotonic()
        threads = [threading.Thread(target=Connection(load).run) for _ in range(connections)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - start
        load.wrong += warm.wrong
        if service.process.poll() is None:
            check_jobs(load)
        else:
            load.wrong.append("the service died")
        time.sleep(1)
        after = service.memory()
        grown = after - before
        everything = [value for values in load.seconds.values() for value in values]
        figures(
            requests=sum(load.statuses.values()),
            connections=connections,
            seconds=seconds,
            jobs=len(load.jobs),
            statuses=dict(sorted(load.statuses.items())),
            memory_before_and_after_in_MB=f"{before:.0f}, {after:.0f} (peak {service.memory('VmHWM'):.0f})",
            open_files_before_and_after=f"{files}, {service.open_files()}",
        )
        for kind, values in [*sorted(load.seconds.items()), ("all", everything)]:
            shown = ", ".join(f"{1000 * percentile(values, p):.0f}" for p in (50, 95, 99, 100))
            figures(**{f"ms_{kind} (50, 95, 99, 100 %)": shown})
        load.wrong += [f"{count} answers of {status}" for status, count in load.statuses.items() if status >= 500]
        if grown > MEMORY_LIMIT:
            load.wrong.append(f"the process grew by {grown:.0f} MB")
    verdict(load.wrong)


if __name__ == "__main__":
    main()
