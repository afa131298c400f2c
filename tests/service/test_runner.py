"""How a run that goes wrong is told, with a pipeline that does as the test says."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trellis2.errors import CapacityError, InputError
from trellis2.service.runner import CANCEL, GIVE_BACK, NO_ROOM, NO_STORE, UNEXPECTED, Runner, Work
from trellis2.service.storage import Folder, StorageError

JOB = "6f0e1fd0-22a8-4f8c-9d3c-0a5f9a3f0f11"
WORK = Work(JOB, {"pipeline_type": "512"}, seconds=60)

Run = Callable[[bytes, Any, Path, Any], Any]


def outcome(tmp_path: Path, run: Run, *, work: Work = WORK, stop: str | None = None) -> dict[str, Any] | None:
    storage = Folder(tmp_path)
    storage.keep_upload(JOB, b"picture")
    runner = Runner(storage, {})
    runner._pipeline = SimpleNamespace(run=run)  # type: ignore[assignment]
    try:
        return runner.run(work, lambda: stop, lambda live: None)
    finally:
        assert list(storage.works.iterdir()) == []  # whatever happened


def raises(make: Callable[[Path], Exception]) -> Run:
    def run(picture: bytes, options: Any, folder: Path, on_progress: Any) -> None:
        (folder / ".model.glb.part").write_bytes(b"half")
        raise make(folder)

    return run


@pytest.mark.parametrize(
    ("make", "error", "kind"),
    [
        (
            lambda folder: InputError("The picture shows a single colour."),
            "The picture shows a single colour.",
            "input",
        ),
        (lambda folder: CapacityError(f"{folder}/model.glb could not be written: No space left."), NO_ROOM, "capacity"),
        (lambda folder: InputError(f"{folder}/model.glb cannot be used: Permission denied."), UNEXPECTED, "internal"),
        (lambda folder: OSError(errno.ENOSPC, "No space left on device", str(folder)), NO_ROOM, "capacity"),
        (lambda folder: OSError(errno.EACCES, "Permission denied", str(folder)), UNEXPECTED, "internal"),
        (lambda folder: StorageError("bucket.example.com does not answer"), NO_STORE, "capacity"),
        (lambda folder: KeyError(str(folder)), UNEXPECTED, "internal"),
    ],
)
def test_an_error_tells_nothing_of_the_machine(
    tmp_path: Path, make: Callable[[Path], Exception], error: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "trellis2.service"):
        assert outcome(tmp_path, raises(make)) == {"status": "failed", "error": error, "error_kind": kind}
    assert str(tmp_path) not in error
    if kind != "input":  # who runs the service finds the reason in the log
        assert caplog.records


def test_stops(tmp_path: Path) -> None:
    def run(picture: bytes, options: Any, folder: Path, on_progress: Any) -> None:
        on_progress("shape", 1, 12, 0.1)
        raise AssertionError("it went on")

    assert outcome(tmp_path, run, stop=CANCEL) == {"status": "cancelled"}
    assert outcome(tmp_path, run, stop=GIVE_BACK) is None
    late = outcome(tmp_path, run, work=Work(JOB, WORK.options, seconds=-1))
    assert late is not None
    assert late["error_kind"] == "timeout"


def test_nothing_is_published_by_who_no_longer_has_the_job(tmp_path: Path) -> None:
    def run(picture: bytes, options: Any, folder: Path, on_progress: Any) -> Any:
        (folder / "no_background.png").write_bytes(b"PNG")
        return SimpleNamespace(seed=1, timings={}, warnings=())

    assert outcome(tmp_path, run, stop=GIVE_BACK) is None
    assert list((tmp_path / "outputs").iterdir()) == []
    made = outcome(tmp_path, run)
    assert made is not None
    assert (made["status"], made["files"], made["bytes"]) == ("completed", ["preview.png"], 3)
