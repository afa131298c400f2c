"""The store of jobs and the folders of their files, without a model."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from trellis2.errors import InputError
from trellis2.service.jobs import (
    CANCELLED,
    COMPLETED,
    FAILED,
    MAX_INTERRUPTIONS,
    QUEUED,
    RUNNING,
    Job,
    JobStore,
    KeyReusedError,
    QueueFullError,
)
from trellis2.service.storage import Folder


def add(store: JobStore, *, key: str | None = None, fingerprint: str = "f", owner: str = "", limit: int = 99) -> Job:
    options = {"seed": 1}
    return store.submit(store.new_id(), owner, options, fingerprint, idempotency_key=key, queue_limit=limit)


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "jobs.sqlite3")


def reopened(store: JobStore, path: Path) -> JobStore:
    """As after the end of the process."""
    store.close()
    return JobStore(path / "jobs.sqlite3")


def test_jobs_are_claimed_in_their_order(store: JobStore) -> None:
    first, second = add(store), add(store)
    assert (store.position(first), store.position(second)) == (1, 2)
    claimed = store.claim()
    assert claimed is not None
    assert (claimed.id, claimed.status) == (first.id, RUNNING)
    assert store.position(claimed) is None
    assert store.position(second) == 1
    done = store.finish(first.id, COMPLETED, seed=3, timings={"shape": 1.5}, files=["output.glb"])
    assert (done.seed, done.timings, done.files, done.open) == (3, {"shape": 1.5}, ["output.glb"], False)
    assert store.usual_seconds() is not None
    assert store.claim() is not None
    assert store.claim() is None


def test_everything_survives_the_end_of_the_process(store: JobStore, tmp_path: Path) -> None:
    jobs = [add(store) for _ in range(3)]
    store.claim()
    before = [store.get(job.id) for job in jobs]
    store = reopened(store, tmp_path)
    assert [store.get(job.id) for job in jobs] == before


def test_an_interrupted_job_is_queued_again_in_its_place_but_not_for_ever(store: JobStore, tmp_path: Path) -> None:
    job, later = add(store), add(store)
    for count in range(1, MAX_INTERRUPTIONS):
        store.claim()
        store = reopened(store, tmp_path)
        (recovered,) = store.recover()
        assert (recovered.id, recovered.status, recovered.interruptions) == (job.id, QUEUED, count)
        assert store.position(recovered) == 1
    store.claim()
    store = reopened(store, tmp_path)
    (failed,) = store.recover()
    assert (failed.status, failed.error_kind) == (FAILED, "interrupted")
    assert failed.error == "The service was interrupted 3 times in the middle of this job; it is not tried again."
    assert store.position(later) == 1


def test_a_cancelled_job_is_not_run_after_a_restart(store: JobStore, tmp_path: Path) -> None:
    job = add(store)
    store.claim()
    assert store.cancel(job.id).cancelling
    store = reopened(store, tmp_path)
    assert [j.status for j in store.recover()] == [CANCELLED]
    assert store.claim() is None


def test_what_the_stopping_service_gives_back_is_not_an_interruption(store: JobStore) -> None:
    job = add(store)
    store.claim()
    store.requeue(job.id)
    back = store.claim()
    assert back is not None
    assert (back.id, back.interruptions) == (job.id, 0)


def test_a_file_of_the_first_version_is_brought_up_to_date(store: JobStore, tmp_path: Path) -> None:
    job = add(store)
    for name in ("webhook", "webhook_events", "trace"):
        store._db.execute(f"ALTER TABLE jobs DROP COLUMN {name}")
    store._db.execute("DROP TABLE deliveries")
    store._db.execute("DROP INDEX jobs_by_end")
    for name in ("attempt", "dispatched", "bytes"):
        store._db.execute(f"ALTER TABLE jobs DROP COLUMN {name}")
    store._db.execute("PRAGMA user_version = 1")
    store = reopened(store, tmp_path)
    assert store.get(job.id) == job
    assert store.deliveries_waiting() == 0
    store._db.execute("PRAGMA user_version = 99")
    with pytest.raises(InputError, match="was written by a newer version"):
        reopened(store, tmp_path)


def test_the_line_of_jobs_ahead(store: JobStore) -> None:
    first, second, third, fourth = (add(store) for _ in range(4))
    store.claim()
    store.cancel(second.id)
    assert [job.id for job in store.ahead(third)] == [first.id, third.id]
    assert [job.id for job in store.ahead(fourth)] == [first.id, third.id, fourth.id]


def test_keys_belong_to_owners(store: JobStore) -> None:
    mine, theirs = add(store, key="k", owner="a"), add(store, key="k", owner="b")
    assert mine.id != theirs.id
    assert add(store, key="k", owner="a", limit=0) == mine
    with pytest.raises(KeyReusedError):
        add(store, key="k", owner="a", fingerprint="other")
    assert [job.id for job in store.page("b", status=None, limit=9, before=None)] == [theirs.id]


def test_the_bound_of_the_queue_holds_for_many_threads(store: JobStore) -> None:
    refused = []

    def fill() -> None:
        for _ in range(10):
            try:
                add(store, limit=7)
            except QueueFullError:
                refused.append(1)

    threads = [threading.Thread(target=fill) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.count(QUEUED) == 7
    assert len(refused) == 33


def test_one_process_owns_the_file(store: JobStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stop the other service that uses it, or choose another folder"):
        JobStore(tmp_path / "jobs.sqlite3")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another with TRELLIS2_DATA"):
        Folder(tmp_path / "file" / "data")


def test_a_restart_removes_what_belongs_to_no_job_and_nothing_else(store: JobStore, tmp_path: Path) -> None:
    storage = Folder(tmp_path)
    waiting, running, done, stray = (store.new_id() for _ in range(4))
    for job_id in (waiting, running, stray):
        storage.keep_upload(job_id, b"picture")
    (storage.uploads / f"{waiting}.partial").write_bytes(b"pic")
    for job_id in (done, stray):
        folder = storage.work(job_id)
        (folder / "output.glb").write_bytes(b"glTF")
        assert storage.publish(job_id, folder) == {"output.glb": 4}
    kept = storage.work(running)
    (storage.work(waiting) / "model.glb").write_bytes(b"gl")
    (storage.outputs / "holiday").mkdir()
    storage.remove_strays({waiting}, {running}, {done})
    left = {
        path.relative_to(tmp_path).as_posix()
        for folder in (storage.uploads, storage.works, storage.outputs)
        for path in folder.iterdir()
    }
    assert left == {
        f"uploads/{waiting}",
        f"uploads/{running}",
        f"work/{kept.name}",
        f"outputs/{done}",
        "outputs/holiday",
    }
    assert storage.upload(waiting) == b"picture"
    assert storage.size(done) == 4
    storage.close(running)
    assert not kept.exists()


def ended(store: JobStore, size: int, finished: float) -> str:
    job = add(store)
    store.claim()
    store.finish(job.id, COMPLETED, files=["output.glb"], bytes=size)
    store._db.execute("UPDATE jobs SET finished = ? WHERE id = ?", (finished, job.id))
    return job.id


def test_the_oldest_are_forgotten_by_age_and_by_room(store: JobStore) -> None:
    assert store.to_forget(100.0, 0.0) == []
    ids = [ended(store, size, finished) for size, finished in ((10, 5.0), (20, 6.0), (30, 7.0), (40, 8.0))]
    waiting = add(store)
    assert store.to_forget(0.0, 100.0) == []
    assert store.to_forget(5.5, 100.0) == ids[:1]
    assert store.to_forget(0.0, 99.0) == ids[:1]
    assert store.to_forget(0.0, 70.0) == ids[:2]
    assert store.to_forget(0.0, 1.0) == ids[:3]  # the newest stays, whatever its size
    assert store.to_forget(9.0, 1.0) == ids
    store.forget_files(ids[3])
    assert store.to_forget(0.0, 60.0) == []
    assert store.get(waiting.id) == waiting


def test_looking_for_what_to_forget_reads_no_jobs(store: JobStore) -> None:
    """A service with many jobs looks after each one."""
    plan = store._db.execute("EXPLAIN QUERY PLAN SELECT sum(bytes) FROM jobs WHERE finished IS NOT NULL").fetchall()
    assert "COVERING INDEX jobs_by_end" in plan[0]["detail"]


def test_sizes_of_earlier_versions_are_asked_for(store: JobStore) -> None:
    job_id = ended(store, 0, 1.0)
    assert [job.id for job in store.unmeasured()] == [job_id]
    store.measured(job_id, 7)
    assert store.unmeasured() == []
    assert store.to_forget(0.0, 6.0) == []
    assert store.with_files() == {job_id}


def test_attempts(store: JobStore) -> None:
    first, second = add(store), add(store)
    assert [job.id for job in store.to_dispatch(9)] == [first.id, second.id]
    for job in (first, second):
        store.dispatched(job.id, 1)
    assert store.to_dispatch(9) == []
    assert store.begin(first.id, 2) is None
    begun = store.begin(first.id, 1)
    assert begun is not None
    assert begun.status == RUNNING
    assert store.begin(first.id, 1) is None
    assert store.dispatch_again(time.time() - 60) == 0
    assert store.dispatch_again(time.time() + 1) == 1  # a running job is with its worker
    assert [(job.id, job.attempt) for job in store.to_dispatch(9)] == [(second.id, 1)]
    back = store.interrupted(first.id)
    assert (back.status, back.interruptions, back.attempt) == (QUEUED, 1, 1)
    assert [job.id for job in store.to_dispatch(9)] == [first.id, second.id]
