"""The files of jobs: uploads while a job is open, a work folder while it runs, outputs when it is completed.

All paths are made of job ids that this service drew and of names in ``FILES``, never of a caller's text.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from trellis2.errors import InputError

FILES = {
    "output.mp4": "video/mp4",
    "output.glb": "model/gltf-binary",
    "preview.png": "image/png",
}
_JOB_FILE = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}(\.partial)?")


class Storage:
    """Folders below ``root``. Whatever has a final name is complete: files appear by renaming.

    Raises InputError where the folders cannot be made.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uploads, self.works, self.outputs = (root / name for name in ("uploads", "work", "outputs"))
        try:
            for folder in (self.uploads, self.works, self.outputs):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"The folder {root} cannot be made ({error.strerror}); choose another with TRELLIS2_DATA."
            ) from error

    def keep_upload(self, job_id: str, picture: bytes) -> None:
        """Store the picture so that it survives a crash. Raises OSError and leaves nothing where the disk is full."""
        path = self.uploads / job_id
        partial = path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                file.write(picture)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def upload(self, job_id: str) -> bytes:
        return (self.uploads / job_id).read_bytes()

    def work(self, job_id: str) -> Path:
        """An empty folder for the run of a job."""
        folder = self.works / job_id
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def publish(self, job_id: str) -> tuple[str, ...]:
        """Make the work folder of a job its outputs, all at once; returns the names of the files."""
        target = self.outputs / job_id
        shutil.rmtree(target, ignore_errors=True)  # of a run that was killed before its job was marked completed
        (self.works / job_id).rename(target)
        return tuple(name for name in FILES if (target / name).exists())

    def close(self, job_id: str) -> None:
        """Remove what only an open job needs."""
        (self.uploads / job_id).unlink(missing_ok=True)
        shutil.rmtree(self.works / job_id, ignore_errors=True)

    def output(self, job_id: str, name: str) -> Path:
        return self.outputs / job_id / name

    def delete_outputs(self, job_id: str) -> None:
        shutil.rmtree(self.outputs / job_id, ignore_errors=True)

    def size(self, job_id: str) -> int:
        """Bytes of the outputs of a job."""
        return sum(path.stat().st_size for path in (self.outputs / job_id).glob("*"))

    def remove_strays(self, open_jobs: Collection[str], completed: Collection[str]) -> None:
        """Remove files of jobs that a killed process left behind; what is not named like a job stays."""
        for folder, wanted in ((self.uploads, open_jobs), (self.works, ()), (self.outputs, completed)):
            for path in folder.iterdir():
                if _JOB_FILE.fullmatch(path.name) and path.name not in wanted:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
