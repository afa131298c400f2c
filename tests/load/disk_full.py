"""The service on a disk of a few megabytes that fills up, with the embedded model:

    python tests/load/disk_full.py [--smoke]

The disk is a tmpfs in a mount namespace of its own, which Linux gives to everybody or to root, depending on how it is
set up; exit code 77: neither.  A submission and a job that find no room must end with a sentence; the service must
live, and work again once there is room.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import REAL, STUB, Running, figures, running, toy, verdict

from client_examples import JobFailed, TRELLIS2Error
from trellis2.export import read_glb

NO_NAMESPACE = 77
MEGABYTES = 16
QUICK: dict[str, Any] = {
    "pipeline_type": "512",
    "sparse_structure_steps": 1,
    "shape_slat_steps": 1,
    "tex_slat_steps": 1,
    "decimation_target": 100_000,
    "texture_size": 1024,
}


def fill(disk: Path, leave: int) -> Path:
    """Take all room but this many bytes."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    free = os.statvfs(disk)
    size = free.f_bavail * free.f_frsize - leave
    with filler.open("wb") as file:
        for at in range(0, size, 65536):
            file.write(bytes(min(65536, size - at)))
    return filler


def outcome(service: Running, picture: Path, seed: int) -> str:
    """How a submission or its job ends, in a sentence."""
    try:
        job = service.client.image_to_3d(picture, seed=seed, max_seconds=120, **QUICK)
    except JobFailed as error:
        return f"the job failed: {error}"
    except TRELLIS2Error as error:
        return f"{error.status}: {error}"
    return f"the job {job['status']}"


def main() -> None:
    inside = "--inside" in sys.argv[1:]
    if not inside:
        command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, *sys.argv, "--inside"]
        if subprocess.run([*command[:4], "true"], capture_output=True).returncode:
            sys.exit(NO_NAMESPACE)
        sys.exit(subprocess.run(command).returncode)
    # Free room at the time of each job, and what its end must say.
    cases = [
        ("all", None, "the job completed"),
        ("none", 0, "503: The service has no room left on its disk"),
        ("for_the_picture_alone", 60_000, "the job failed: "),
        ("for_a_part_of_the_model", 400_000, "the job failed: "),
        ("all_again", None, "the job completed"),
    ]
    smoke = "--smoke" in sys.argv[1:]
    if smoke:  # with a stand-in, which leaves it open what a job says that finds no room
        cases = [cases[1], cases[4]]
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        disk, picture = Path(folder) / "disk", Path(folder) / "toy.png"
        disk.mkdir()
        picture.write_bytes(toy())
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", str(disk)], check=True)
        try:
            with running(disk / "data", STUB if smoke else REAL) as service:
                for seed, (name, leave, expected) in enumerate(cases):
                    filler = None if leave is None else fill(disk, leave)
                    start = time.monotonic()
                    result = outcome(service, picture, seed)
                    if service.process.poll() is not None:
                        verdict([*wrong, f"{name}: the service died:\n{service.log.read_text()[-3000:]}"])
                    figures(**{f"room: {name}": f"{result} ({time.monotonic() - start:.1f} s)"})
                    if not result.startswith(expected) or "unexpectedly" in result:
                        wrong.append(f"{name}: {result}")
                    if service.client.health()["status"] != "healthy":
                        wrong.append(f"{name}: the service is not healthy")
                    for kind in ("uploads", "work"):
                        wrong += [f"{name}: {path} was left behind" for path in (disk / "data" / kind).iterdir()]
                    if filler is not None:
                        filler.unlink()
                for job in service.client._json("GET", "/api/v1/jobs")["jobs"]:
                    if job["status"] == "completed" and not smoke:
                        read_glb(service.client.download_file(job["model_url"], Path(folder) / "output.glb"))
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=False)
    verdict(wrong)


if __name__ == "__main__":
    main()
