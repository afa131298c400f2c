"""Outputs of jobs as answers, from a folder or from an object store."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response, StreamingResponse

from .storage import FILES, Folder, ObjectStore, Storage

PIECE = 2**20  # bytes read from an object store at a time

_CACHED = {"Cache-Control": "private"}


async def download(storage: Storage, job_id: str, name: str, headers: Headers) -> Response:
    """One of ``FILES``, or the range of it that the request's headers ask for.

    Raises HTTPException 404 where it was deleted meanwhile, and 416 for a range beyond its end.
    """
    if isinstance(storage, Folder):
        path = storage.output(job_id, name)
        if not await run_in_threadpool(path.exists):
            raise _gone()
        return FileResponse(path, media_type=FILES[name], headers=_CACHED)
    assert isinstance(storage, ObjectStore)
    try:
        size = await run_in_threadpool(storage.output_size, job_id, name)
    except FileNotFoundError:
        raise _gone() from None
    # Of one range; more at once are seldom asked for, and may be answered with the whole.
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("range", "").replace(" ", ""))
    start, stop, code, extra = 0, size, 200, {}
    if asked and asked.group() != "bytes=-":
        first, last = asked.groups()
        start = int(first) if first else max(0, size - int(last))
        stop = min(size, int(last) + 1) if first and last else size
        if start >= stop:
            raise HTTPException(416, f"The file has {size} bytes.", {"Content-Range": f"bytes */{size}"})
        code, extra = 206, {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
    return StreamingResponse(
        _pieces(storage, job_id, name, start, stop),
        code,
        {"Content-Length": str(stop - start), "Accept-Ranges": "bytes", **extra, **_CACHED},
        FILES[name],
    )


async def _pieces(storage: ObjectStore, job_id: str, name: str, start: int, stop: int) -> AsyncIterator[bytes]:
    for at in range(start, stop, PIECE):
        yield await run_in_threadpool(storage.read, job_id, name, at, min(at + PIECE, stop))


def _gone() -> HTTPException:
    return HTTPException(404, "The file was deleted.")
