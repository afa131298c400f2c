"""Download the published checkpoint, and what it borrows, into one folder that is used without a network.

    python weights/fetch.py [--preset 512 ...] [--matting NAME|none] [FOLDER]
    python weights/fetch.py --offline-check [FOLDER]

What is fetched stands in manifest.json, at pinned revisions. Endpoint, token, addresses, answers about files, and the
transfer of bytes come from huggingface_hub. Its ``hf_hub_download`` is not used: it neither compares what arrived with
a hash nor goes on with a file that an earlier process began. Nothing that is fetched is run.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import logging
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit
from urllib.request import url2pathname

HERE = Path(__file__).resolve().parent
MANIFEST = HERE / "manifest.json"
FOLDER = HERE / "TRELLIS.2-4B"
ROOT_REPOSITORY = "microsoft/TRELLIS.2-4B"
PRESETS = ("512", "1024", "1024_cascade", "1536_cascade")
DEFAULT_MATTING = "ZhengPeng7/BiRefNet"
NO_MATTING = "none"
LEFT_OUT = "left_out.json"
"""Lists the networks of pipeline.json that were left out of the folder on purpose; ``load_checkpoint`` reads it."""

OK, FAILED, USAGE, NO_ACCESS, UNREACHABLE, DAMAGED, NO_SPACE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 130
ATTEMPTS = 6
BACKOFF = 1.0  # seconds before the second attempt; doubles with each
CHUNK = 1 << 20
REPORT_EVERY = 30.0  # seconds between lines about progress where there is no terminal
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}

logger = logging.getLogger("fetch")
T = TypeVar("T")

_EPILOG = f"""\
exit codes:
  {OK:>3}  the folder is complete
  {USAGE:>3}  the command line or the manifest is not usable
  {NO_ACCESS:>3}  a repository is gated: accept its terms, set HF_TOKEN
  {UNREACHABLE:>3}  the hub or the mirror cannot be reached, or lacks a file; run again to go on
  {DAMAGED:>3}  a file is missing, damaged or not the pinned one
  {NO_SPACE:>3}  not enough disk space
  {INTERRUPTED:>3}  interrupted; run again to go on
  {FAILED:>3}  anything else
"""


class FetchError(Exception):
    """What a user can do something about. ``code``: exit code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Stopped(Exception):
    """Another file failed, or the user interrupted; the part stays."""


@dataclass(frozen=True)
class Entry:
    """A line of the manifest.

    bytes, sha256: None where unknown. needed_for: values of pipeline_type, or "matting"; empty where nothing here
    needs it. network: its name in pipeline.json, None for what is no network of that file.
    """

    repository: str
    revision: str
    file: str
    licence: str
    gated: bool
    bytes: int | None
    sha256: str | None
    needed_for: tuple[str, ...]
    network: str | None

    @property
    def place(self) -> str:
        """Where in the folder ``load_checkpoint`` and ``load_matting`` look for it."""
        return self.file if self.repository == ROOT_REPOSITORY else f"{self.repository}/{self.file}"


@dataclass(frozen=True)
class Facts:
    """What a file should be. sha256, blob: its hash, as such and as git names files; None where unknown."""

    size: int
    sha256: str | None
    blob: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; usage errors and help end in SystemExit."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    try:
        _run(arguments)
    except FetchError as error:
        logger.error("error: %s", error)
        return error.code
    except KeyboardInterrupt:
        logger.error("interrupted; what has arrived is kept, run the same command to go on")
        return INTERRUPTED
    except OSError as error:
        logger.error("error: %s", error)
        return NO_SPACE if error.errno in _NO_ROOM else FAILED
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fetch.py",
        description="Download the published checkpoint at pinned revisions into one folder, verified, to be used "
        "without a network. A run that was cut off goes on where it stopped.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="default: weights/TRELLIS.2-4B")
    parser.add_argument(
        "--preset",
        action="append",
        choices=PRESETS,
        help="only what this pipeline_type needs; may be given again (default: all of them)",
    )
    parser.add_argument(
        "--matting",
        default=DEFAULT_MATTING,
        metavar="NAME",
        help=f"network that removes backgrounds: a repository of the manifest, or none (default: {DEFAULT_MATTING})",
    )
    parser.add_argument(
        "--endpoint",
        metavar="URL|DIR",
        help="where to fetch from: address of a hub, or a folder that this command filled, as a path or file:// "
        "(default: $HF_ENDPOINT, else the public hub)",
    )
    parser.add_argument("--jobs", type=int, default=4, metavar="N", help="files at a time (default: 4)")
    parser.add_argument("--manifest", type=Path, default=MANIFEST, help="default: weights/manifest.json")
    parser.add_argument("--record", action="store_true", help="write sizes and hashes that it lacks into the manifest")
    parser.add_argument("--offline-check", action="store_true", help="say what the folder lacks; uses no network")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    if arguments.jobs < 1:
        raise FetchError(USAGE, f"--jobs is {arguments.jobs}; give 1 or more.")
    manifest = read_manifest(arguments.manifest)
    entries, left_out = select(manifest, arguments.preset or PRESETS, arguments.matting)
    folder: Path = arguments.folder
    if arguments.offline_check:
        check_offline(folder, entries, left_out)
        return
    mirror = open_mirror(arguments.endpoint)
    folder.mkdir(parents=True, exist_ok=True)
    from huggingface_hub.utils import WeakFileLock

    with WeakFileLock(folder / ".fetch.lock"):  # a second process waits, then finds everything there
        facts = fetch(folder, entries, mirror, arguments.jobs)
        _write_left_out(folder, left_out)
    problems = structure_problems(folder, entries) + unresolved(folder)
    if problems:
        raise FetchError(DAMAGED, _listed("The folder is not usable", problems))
    if arguments.record:
        record(arguments.manifest, folder, facts)
    logger.info("complete: %s; use it with --model %s or TRELLIS2_MODEL=%s", folder, folder, folder)


# --- the manifest ------------------------------------------------------------------------------------------------


def read_manifest(path: Path) -> list[Entry]:
    """Raises FetchError where it is not usable."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        entries = []
        for file in files:
            known: dict[str, Any] = {name: file[name] for name in Entry.__dataclass_fields__}
            entries.append(Entry(**known | {"needed_for": tuple(file["needed_for"])}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FetchError(USAGE, f"{path} is not a usable manifest ({type(error).__name__}: {error}).") from error
    for entry in entries:
        if Path(entry.place).is_absolute() or ".." in Path(entry.place).parts:
            raise FetchError(USAGE, f"{path} names {entry.place}, which is outside of the folder.")
    return entries


def select(entries: Sequence[Entry], presets: Collection[str], matting: str) -> tuple[list[Entry], list[str]]:
    """The files for these presets and this matting network, and the networks of pipeline.json that are left out.

    Raises FetchError on an unknown matting network.
    """
    known = sorted({e.repository for e in entries if "matting" in e.needed_for})
    if matting not in [*known, NO_MATTING]:
        raise FetchError(USAGE, f"--matting {matting} is not in the manifest; choose {', '.join(known)} or none.")
    chosen = [
        e
        for e in entries
        if set(presets) & set(e.needed_for) or ("matting" in e.needed_for and e.repository == matting)
    ]
    needed = {e.network for e in entries if set(PRESETS) & set(e.needed_for)}
    return chosen, sorted(n for n in needed - {e.network for e in chosen} if n is not None)


def record(path: Path, folder: Path, facts: Mapping[str, Facts]) -> None:
    """Write sizes and hashes into the manifest where it has null; what it has was compared and stays."""
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for file in manifest["files"]:
        place = file["file"] if file["repository"] == ROOT_REPOSITORY else f"{file['repository']}/{file['file']}"
        if place not in facts:
            continue
        if file["bytes"] is None:
            file["bytes"] = facts[place].size
        if file["sha256"] is None:
            file["sha256"] = facts[place].sha256 or file_hash(folder / place, hashlib.sha256())
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)
    logger.info("recorded in %s", path)


def _write_left_out(folder: Path, names: Sequence[str]) -> None:
    """Names whose files are there from an earlier run are not left out."""
    config = json.loads((folder / "pipeline.json").read_text(encoding="utf-8"))
    models = config["args"]["models"]
    absent = [n for n in names if n in models and not (folder / f"{models[n]}.safetensors").is_file()]
    path = folder / LEFT_OUT
    if absent:
        path.write_text(json.dumps(absent) + "\n", encoding="utf-8")
    else:
        path.unlink(missing_ok=True)


# --- where files come from ---------------------------------------------------------------------------------------


class Hub:
    """A hub, or a server that answers like one."""

    def __init__(self, endpoint: str) -> None:
        from huggingface_hub import get_token
        from huggingface_hub.utils import build_hf_headers, disable_progress_bars
        from huggingface_hub.utils import logging as hub_logging

        self.endpoint = endpoint.rstrip("/")
        self.token = get_token()
        self.headers = build_hf_headers(token=self.token or False) | {"Accept-Encoding": "identity"}
        disable_progress_bars("huggingface_hub.http_get")  # one bar for all files is shown instead
        hub_logging.set_verbosity_error()

    def facts(self, entry: Entry) -> Facts:
        """What the hub says of a file.  Raises FetchError without access, and what huggingface_hub raises."""
        meta = self._ask(entry)
        if meta.size is None:
            raise FetchError(UNREACHABLE, f"{self.endpoint} does not tell the size of {entry.place}.")
        etag = (meta.etag or "").lower()
        is_hash = bool(etag) and set(etag) <= set("0123456789abcdef")
        return Facts(
            meta.size,
            etag if is_hash and len(etag) == 64 else None,  # large files: their sha256
            etag if is_hash and len(etag) == 40 else None,  # small ones: the name that git gives them
        )

    def append(self, entry: Entry, sink: BinaryIO, start: int, size: int) -> None:
        """Write the bytes from ``start`` on; starts over by itself where the server cannot go on."""
        from huggingface_hub.file_download import http_get

        location = self._ask(entry).location  # signed addresses expire, so that each attempt asks anew
        headers = dict(self.headers)
        if urlsplit(location).netloc != urlsplit(self.endpoint).netloc:
            headers = {k: v for k, v in headers.items() if k.lower() != "authorization"}
        http_get(location, sink, resume_size=start, headers=headers, expected_size=size)

    def _ask(self, entry: Entry) -> Any:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled

        url = hf_hub_url(entry.repository, entry.file, revision=entry.revision, endpoint=self.endpoint)
        try:
            return get_hf_file_metadata(url, token=self.token or False)
        except OfflineModeIsEnabled as error:
            raise FetchError(UNREACHABLE, "HF_HUB_OFFLINE is set; unset it, or use --offline-check.") from error
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else None
            if status in (401, 403):
                raise FetchError(NO_ACCESS, self._refusal(entry)) from error
            if status == 404 or isinstance(error, EntryNotFoundError):
                where = f"{entry.repository} at {entry.revision}"
                raise FetchError(UNREACHABLE, f"{self.endpoint} has no {entry.file} of {where}.") from error
            raise

    def _refusal(self, entry: Entry) -> str:
        page = f"{self.endpoint}/{entry.repository}"
        token = (
            "the token in HF_TOKEN (or of `hf auth login`) has no access: the terms are not accepted with its account, "
            "the request is not granted yet, or the token may not read gated repositories"
            if self.token
            else "no token was found: make one in the account that accepted the terms and set HF_TOKEN to it"
        )
        terms = f" ({entry.licence})" if entry.gated else ""
        return f"{entry.repository} is not open to you{terms}. Accept its terms at {page}; {token}."


class Directory:
    """A folder that an earlier run filled, or one with owner/repository/file in it."""

    def __init__(self, folder: Path) -> None:
        self.endpoint = str(folder)
        self.folder = folder

    def facts(self, entry: Entry) -> Facts:
        """The size; hashes are those of the manifest."""
        return Facts(self._path(entry).stat().st_size, None)

    def append(self, entry: Entry, sink: BinaryIO, start: int, size: int) -> None:
        """Write the bytes from ``start`` on."""
        with self._path(entry).open("rb") as source:
            source.seek(start)
            shutil.copyfileobj(source, sink, CHUNK)

    def _path(self, entry: Entry) -> Path:
        for place in (entry.place, f"{entry.repository}/{entry.file}"):
            if (self.folder / place).is_file():
                return self.folder / place
        raise FetchError(UNREACHABLE, f"{self.folder} has no {entry.place}.")


def open_mirror(endpoint: str | None) -> Hub | Directory:
    """endpoint: address, file:// address or folder; None for what huggingface_hub takes.  Raises FetchError."""
    from huggingface_hub import constants

    chosen = endpoint or constants.ENDPOINT
    scheme = urlsplit(chosen).scheme
    if scheme in ("http", "https"):
        return Hub(chosen)
    folder = Path(url2pathname(urlsplit(chosen).path) if scheme == "file" else chosen)
    if not folder.is_dir():
        raise FetchError(USAGE, f"--endpoint {chosen} is neither an http(s) address nor a folder.")
    return Directory(folder)


# --- fetching ----------------------------------------------------------------------------------------------------


def fetch(folder: Path, entries: Sequence[Entry], mirror: Hub | Directory, jobs: int) -> dict[str, Facts]:
    """Bring all files into the folder, verified.  Returns what each is, by its place.

    Access is asked for and the disk is measured before anything is fetched.  Raises FetchError, KeyboardInterrupt.
    """
    _require_access(entries, mirror, folder)
    logger.info("asking %s for %d files", mirror.endpoint, len(entries))
    facts = dict(_parallel(jobs, entries, lambda e, stop: (e.place, _agreed(e, _retried(stop, mirror.facts, e)))))
    there = [e for e in entries if (folder / e.place).is_file()]
    if there:
        logger.info("verifying %d files that are there", len(there))
    damage = _parallel(jobs, there, lambda e, stop: damage_of(folder / e.place, facts[e.place], stop))
    for entry, problem in zip(there, damage, strict=True):
        if problem:
            logger.warning("%s is damaged (%s); it is fetched again", entry.place, problem)
            (folder / entry.place).unlink()
    missing = [e for e in entries if not (folder / e.place).is_file()]
    total = sum(facts[e.place].size for e in missing)
    begun = sum(min(_size(_part(folder, e)), facts[e.place].size) for e in missing)
    free = shutil.disk_usage(folder).free
    logger.info(
        "%s in %d files, to fetch: %s in %d files, of which %s is there; free on disk: %s",
        _amount(sum(f.size for f in facts.values())),
        len(entries),
        _amount(total),
        len(missing),
        _amount(begun),
        _amount(free),
    )
    if total - begun > free:
        raise FetchError(NO_SPACE, f"{_amount(total - begun)} are to be written to {folder}, {_amount(free)} are free.")
    # Largest first, so that the last file to arrive is a small one.
    missing.sort(key=lambda e: -facts[e.place].size)
    with _progress(total, begun) as advance:
        _parallel(jobs, missing, lambda e, stop: _fetch_file(folder, e, facts[e.place], mirror, stop, advance))
    return facts


def _require_access(entries: Sequence[Entry], mirror: Hub | Directory, folder: Path) -> None:
    first = {e.repository: e for e in entries if e.gated and not (folder / e.place).is_file()}
    refused = []
    for entry in first.values():
        try:
            _retried(Event(), mirror.facts, entry)
        except FetchError as error:
            if error.code != NO_ACCESS:
                raise
            refused.append(str(error))
    if refused:
        raise FetchError(NO_ACCESS, "\n  ".join([*refused, "Nothing was downloaded."]))


def _agreed(entry: Entry, told: Facts) -> Facts:
    """What manifest and hub say together.  Raises FetchError where they contradict each other."""
    for name, ours, theirs in (("bytes", entry.bytes, told.size), ("sha256", entry.sha256, told.sha256)):
        if ours is not None and theirs is not None and ours != theirs:
            raise FetchError(
                DAMAGED, f"{entry.place}: {name} is {ours} in the manifest and {theirs} at the source; not fetched."
            )
    return Facts(told.size, entry.sha256 or told.sha256, told.blob)


def _fetch_file(
    folder: Path,
    entry: Entry,
    facts: Facts,
    mirror: Hub | Directory,
    stop: Event,
    advance: Callable[[int], None],
) -> None:
    part = _part(folder, entry)
    part.parent.mkdir(parents=True, exist_ok=True)
    if _size(part) > facts.size:
        part.unlink()

    def transfer() -> None:
        with _Sink(part, stop, advance) as sink:
            mirror.append(entry, cast(BinaryIO, sink), _size(part), facts.size)

    for last in (False, True):
        _retried(stop, transfer)
        problem = damage_of(part, facts, stop)
        if problem is None:
            break
        advance(-_size(part))
        part.unlink()
        if last:
            raise FetchError(DAMAGED, f"{entry.place} arrived damaged twice ({problem}); it was not kept.")
        logger.warning("%s arrived damaged (%s); once more from the start", entry.place, problem)
    os.replace(part, folder / entry.place)
    logger.info("%s: %s, %s", entry.place, _amount(facts.size), "verified" if _checkable(facts) else "size checked")


class _Sink:
    """The end of a part file, as ``http_get`` writes it: counts, and stops when asked to."""

    def __init__(self, path: Path, stop: Event, advance: Callable[[int], None]) -> None:
        self._file = path.open("ab", buffering=0)
        self._stop, self._advance = stop, advance

    def __enter__(self) -> _Sink:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> int:
        if self._stop.is_set():
            raise Stopped
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        self._advance(len(data))
        return len(data)

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int) -> int:
        return self._file.seek(offset)

    def truncate(self) -> int:
        end = self._file.tell()
        self._advance(end - os.fstat(self._file.fileno()).st_size)
        return self._file.truncate(end)


def _retried(stop: Event, work: Callable[..., T], *arguments: Any) -> T:
    """``work``, again after a growing pause while what failed may be a matter of the network."""
    for attempt in range(ATTEMPTS):
        if stop.is_set():
            raise Stopped
        try:
            return work(*arguments)
        except (FetchError, Stopped):
            raise
        # huggingface_hub lets the errors of its HTTP library through, and which library that is depends on its version.
        except Exception as error:
            response = getattr(error, "response", None)
            status = None if response is None else response.status_code
            if getattr(error, "errno", None) in _NO_ROOM | {errno.EACCES, errno.EROFS}:
                raise
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
            if attempt == ATTEMPTS - 1 or (status is not None and status < 500 and status not in (408, 416, 429)):
                raise FetchError(UNREACHABLE, f"{reason}. What has arrived is kept; run again to go on.") from error
            pause = BACKOFF * 2**attempt * random.uniform(0.75, 1.25)
            logger.warning("%s; attempt %d of %d in %.0f s", reason, attempt + 2, ATTEMPTS, pause)
            stop.wait(pause)
    raise AssertionError


def _parallel(jobs: int, items: Sequence[Entry], work: Callable[[Entry, Event], T]) -> list[T]:
    """``work`` on every item, ``jobs`` at a time; the first error stops the others and is raised."""
    stop = Event()
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(work, item, stop) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            for future in futures:
                future.cancel()
    errors = [e for f in futures if not f.cancelled() and (e := f.exception()) is not None]
    for error in sorted(errors, key=lambda e: isinstance(e, Stopped)):
        raise error
    return [future.result() for future in futures]


@contextmanager
def _progress(total: int, begun: int) -> Iterator[Callable[[int], None]]:
    """Yields what to call with the number of bytes that arrived."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    terminal = sys.stderr.isatty()
    done, shown, lock = begun, time.monotonic(), Lock()
    bar = tqdm(total=total, initial=begun, unit="B", unit_scale=True, disable=not terminal or not total)

    def advance(count: int) -> None:
        nonlocal done, shown
        with lock:
            done += count
            bar.update(count)
            if not terminal and time.monotonic() - shown >= REPORT_EVERY:
                shown = time.monotonic()
                logger.info("%s of %s", _amount(done), _amount(total))

    with bar, logging_redirect_tqdm() if terminal else nullcontext():
        yield advance


def _part(folder: Path, entry: Entry) -> Path:
    path = folder / entry.place
    return path.with_name(f"{path.name}.{entry.revision[:8]}.part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _amount(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if abs(count) >= 1e7 else f"{count / 1e3:.1f} kB"


def _listed(title: str, problems: Sequence[str]) -> str:
    return "\n  ".join([f"{title}:", *problems])


# --- checking ----------------------------------------------------------------------------------------------------


def check_offline(folder: Path, entries: Sequence[Entry], left_out: Collection[str]) -> None:
    """Compare the folder with the manifest without a network.  Raises FetchError naming all that is wrong."""
    problems, unknown = [], 0
    for entry in entries:
        path = folder / entry.place
        if not path.is_file():
            part = _size(_part(folder, entry))
            problems.append(f"{entry.place}: missing" + (f" ({_amount(part)} of it have arrived)" if part else ""))
            continue
        size = entry.bytes if entry.bytes is not None else _size(path)
        problem = damage_of(path, Facts(size, entry.sha256))
        unknown += entry.sha256 is None
        if problem:
            problems.append(f"{entry.place}: {problem}")
    problems += structure_problems(folder, entries)
    if not problems:
        problems = unresolved(folder)
    if problems:
        raise FetchError(DAMAGED, _listed(f"{folder} is not complete", problems))
    logger.info("complete: %d files in %s", len(entries), folder)
    if unknown:
        logger.info("%d of them have no known sha256 and were only read for their structure", unknown)
    if left_out:
        logger.info("not asked for: %s", ", ".join(left_out))


def damage_of(path: Path, facts: Facts, stop: Event | None = None) -> str | None:
    """What differs from ``facts``, None where nothing does.  Raises Stopped."""
    size = path.stat().st_size
    if size != facts.size:
        return f"{size} bytes instead of {facts.size}"
    if facts.sha256 is not None:
        found = file_hash(path, hashlib.sha256(), stop)
        return None if found == facts.sha256 else f"sha256 {found} instead of {facts.sha256}"
    if facts.blob is not None:
        found = file_hash(path, hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), stop)
        return None if found == facts.blob else f"git blob {found} instead of {facts.blob}"
    return None


def _checkable(facts: Facts) -> bool:
    return facts.sha256 is not None or facts.blob is not None


def file_hash(path: Path, digest: Any, stop: Event | None = None) -> str:
    """The hexadecimal digest after all bytes of the file.  Raises Stopped."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            if stop is not None and stop.is_set():
                raise Stopped
            digest.update(chunk)
    return str(digest.hexdigest())


def structure_problems(folder: Path, entries: Sequence[Entry]) -> list[str]:
    """Files of the folder that are no JSON object or no whole safetensors file, and why; absent ones are skipped."""
    problems = []
    for entry in entries:
        path = folder / entry.place
        if not path.is_file():
            continue
        try:
            if path.suffix == ".json":
                _json_object(path.read_bytes())
            elif path.suffix == ".safetensors":
                _check_safetensors(path)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{entry.place}: {error}")
    return problems


def _json_object(text: bytes) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _check_safetensors(path: Path) -> None:
    """The file is as long as its header says: 8 bytes of length, JSON, tensors without gaps."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ValueError("not a safetensors file, or cut off within its header")
        header = _json_object(file.read(length))
    header.pop("__metadata__", None)
    end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if 8 + length + end != size:
        raise ValueError(f"{size} bytes instead of the {8 + length + end} of its header")


def unresolved(folder: Path) -> list[str]:
    """What pipeline.json names and ``load_checkpoint`` would not find in the folder."""
    try:
        args = _json_object((folder / "pipeline.json").read_bytes())["args"]
        absent = json.loads((folder / LEFT_OUT).read_text()) if (folder / LEFT_OUT).is_file() else []
        wanted = [
            f"{value}.{suffix}"
            for name, value in args["models"].items()
            if name not in absent
            for suffix in ("json", "safetensors")
        ]
        wanted.append(f"{args['image_cond_model']['args']['model_name']}/config.json")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"pipeline.json: {type(error).__name__}: {error}"]
    return [f"{path}: named by pipeline.json and missing" for path in wanted if not (folder / path).is_file()]


if __name__ == "__main__":
    sys.exit(main())
