"""The files of jobs: uploads while a job is open, a work folder while it runs, outputs when it is completed.

They are in folders below one root, which several machines may share, or in an object store, such as S3, that fsspec
knows.  All paths are made of job ids that this service drew and of names in ``FILES``, never of a caller's text.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from trellis2.errors import InputError

FILES = {
    "output.mp4": "video/mp4",
    "output.glb": "model/gltf-binary",
    "preview.png": "image/png",
}
_JOB_FILE = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(\.\w+)?")


class StorageError(Exception):
    """The object store did not do what it was asked for."""


class Storage(Protocol):
    """Whatever has a final name is complete."""

    def keep_upload(self, job_id: str, picture: bytes) -> None:
        """Store the picture so that it survives a crash. Raises OSError or StorageError and leaves nothing then."""

    def upload(self, job_id: str) -> bytes: ...

    def work(self, job_id: str) -> Path:
        """A new, empty folder for a run of a job."""

    def publish(self, job_id: str, folder: Path) -> dict[str, int]:
        """Make the files in a work folder the outputs of a job; returns their names and bytes."""

    def close(self, job_id: str) -> None:
        """Remove what only an open job needs."""

    def delete_outputs(self, job_id: str) -> None: ...

    def size(self, job_id: str) -> int:
        """Bytes of the outputs of a job."""

    def remove_strays(self, waiting: Collection[str], running: Collection[str], completed: Collection[str]) -> None:
        """Remove files of jobs that a killed process left behind; what is not named like a job stays.

        waiting, running, completed: ids of the jobs whose uploads, whose uploads and work folders, and whose outputs
        are needed.
        """


def open_storage(data: Path, address: str | None) -> Storage:
    """Files below ``data``, or, with an address, below that: another folder, or such as s3://bucket/folder.

    Raises InputError where nothing can be stored there.
    """
    if address is None:
        return Folder(data)
    _make(data, "TRELLIS2_DATA")
    return ObjectStore(address, data / "work") if "://" in address else Folder(Path(address), "TRELLIS2_STORAGE")


def _make(folder: Path, variable: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"The folder {folder} cannot be made ({error.strerror}); choose another with {variable}."
        ) from error


class Folder:
    """Folders below ``root``. Files appear by renaming. Raises InputError, which names the variable, where the folders
    cannot be made."""

    def __init__(self, root: Path, variable: str = "TRELLIS2_DATA") -> None:
        self.root = root
        self.uploads, self.works, self.outputs = (root / name for name in ("uploads", "work", "outputs"))
        for folder in (self.uploads, self.works, self.outputs):
            _make(folder, variable)

    def keep_upload(self, job_id: str, picture: bytes) -> None:
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
        # Another machine that was thought dead may still write to the folder of its own run.
        folder = self.works / f"{job_id}.{uuid.uuid4().hex}"
        folder.mkdir()
        return folder

    def publish(self, job_id: str, folder: Path) -> dict[str, int]:
        target = self.outputs / job_id
        shutil.rmtree(target, ignore_errors=True)  # of a run that was killed before its job was marked completed
        folder.rename(target)
        return {name: (target / name).stat().st_size for name in FILES if (target / name).exists()}

    def close(self, job_id: str) -> None:
        (self.uploads / job_id).unlink(missing_ok=True)
        for folder in self.works.glob(f"{job_id}.*"):
            shutil.rmtree(folder, ignore_errors=True)

    def output(self, job_id: str, name: str) -> Path:
        return self.outputs / job_id / name

    def delete_outputs(self, job_id: str) -> None:
        shutil.rmtree(self.outputs / job_id, ignore_errors=True)

    def size(self, job_id: str) -> int:
        return sum(path.stat().st_size for path in (self.outputs / job_id).glob("*"))

    def remove_strays(self, waiting: Collection[str], running: Collection[str], completed: Collection[str]) -> None:
        for folder, wanted in (
            (self.uploads, {*waiting, *running}),
            (self.works, running),
            (self.outputs, {*completed, *running}),
        ):
            for path in folder.iterdir():
                named = _JOB_FILE.fullmatch(path.name)
                if named and (named[1] not in wanted or path.suffix == ".partial"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


class ObjectStore:
    """Objects below an address such as s3://bucket/folder, each of which is there as a whole or not at all.

    Work folders are local, below ``works``. Where and as whom to connect is told as the store's own library has it:
    for S3 in AWS_* and FSSPEC_S3_* of the environment. Raises InputError where nothing can be stored.
    """

    def __init__(self, address: str, works: Path) -> None:
        from fsspec.core import url_to_fs

        try:
            self._fs, self._root = url_to_fs(address, use_listings_cache=False)
            self._fs.pipe_file(f"{self._root}/check", b"")
            self._fs.rm_file(f"{self._root}/check")
        except Exception as error:  # each store's library has errors of its own
            raise InputError(
                f"TRELLIS2_STORAGE={address!r} cannot be written ({_first_line(error)}); give a folder, or an address "
                "such as s3://bucket/folder whose library (for S3: pip install s3fs) is installed."
            ) from error
        _make(works, "TRELLIS2_DATA")
        self.works = works

    def keep_upload(self, job_id: str, picture: bytes) -> None:
        with _store_errors():
            self._fs.pipe_file(self._upload(job_id), picture)

    def upload(self, job_id: str) -> bytes:
        with _store_errors():
            content: bytes = self._fs.cat_file(self._upload(job_id))
            return content

    def work(self, job_id: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{job_id}.", dir=self.works))

    def publish(self, job_id: str, folder: Path) -> dict[str, int]:
        found = {}
        with _store_errors():
            for name in FILES:
                if (path := folder / name).exists():
                    self._fs.put_file(str(path), self._output(job_id, name))
                    found[name] = path.stat().st_size
        shutil.rmtree(folder)
        return found

    def close(self, job_id: str) -> None:
        self._remove(self._upload(job_id))
        for folder in self.works.glob(f"{job_id}.*"):
            shutil.rmtree(folder, ignore_errors=True)

    def delete_outputs(self, job_id: str) -> None:
        for name in FILES:
            self._remove(self._output(job_id, name))

    def size(self, job_id: str) -> int:
        total = 0
        for name in FILES:
            with suppress(FileNotFoundError), _store_errors():
                total += int(self._fs.info(self._output(job_id, name))["size"])
        return total

    def output_size(self, job_id: str, name: str) -> int:
        """Bytes of an output. Raises FileNotFoundError."""
        with _store_errors():
            return int(self._fs.info(self._output(job_id, name))["size"])

    def read(self, job_id: str, name: str, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` (not with it) of an output."""
        with _store_errors():
            content: bytes = self._fs.cat_file(self._output(job_id, name), start=start, end=stop)
            return content

    def remove_strays(self, waiting: Collection[str], running: Collection[str], completed: Collection[str]) -> None:
        for folder, wanted in (("uploads", {*waiting, *running}), ("outputs", {*completed, *running})):
            for name in self._names(folder):
                if _JOB_FILE.fullmatch(name) and name not in wanted:
                    self._remove(self._upload(name)) if folder == "uploads" else self.delete_outputs(name)
        for path in self.works.iterdir():
            named = _JOB_FILE.fullmatch(path.name)
            if named and named[1] not in running:
                shutil.rmtree(path)

    def _upload(self, job_id: str) -> str:
        return f"{self._root}/uploads/{job_id}"

    def _output(self, job_id: str, name: str) -> str:
        return f"{self._root}/outputs/{job_id}/{name}"

    def _names(self, folder: str) -> list[str]:
        with suppress(FileNotFoundError), _store_errors():
            return [path.rpartition("/")[2] for path in self._fs.ls(f"{self._root}/{folder}", detail=False)]
        return []

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError), _store_errors():
            self._fs.rm_file(path)


@contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # each store's library has errors of its own
        raise StorageError(_first_line(error)) from error


def _first_line(error: BaseException) -> Any:
    return (str(error).splitlines() or [type(error).__name__])[0]
