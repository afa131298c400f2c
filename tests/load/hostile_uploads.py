"""Ten thousand uploads that mean no good, with the real application and a stand-in for the model:

    python tests/load/hostile_uploads.py [--smoke]

Damaged pictures of every accepted format, pictures that claim or unpack to more than they are, files of two kinds,
forms and requests that are cut, mislabelled or misdeclared, and bodies that drip.  None may end the service, be
answered with a 5xx, take long, or leave memory behind.
"""

from __future__ import annotations

import io
import itertools
import json
import random
import socket
import struct
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from common import STUB, Running, figures, percentile, running, toy, verdict
from PIL import Image, PngImagePlugin

from client_examples import multipart

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
SLOWEST = 20.0  # seconds that an answer may take
PATIENCE = 1.0  # seconds for a request that may be waiting for its own end
MEMORY_LIMIT = 150.0  # MB by which the process may grow after the first tenth
THREADS = 8
DRIPS = 12

GOOD = {kind: toy(kind, side) for kind, side in zip(FORMATS, (64, 96, 80, 48, 56, 72), strict=True)}


def damaged(chance: random.Random) -> bytes:
    """A picture with bytes changed, cut, repeated or taken from another."""
    data = bytearray(GOOD[chance.choice(FORMATS)])
    for _ in range(chance.randint(1, 4)):
        at, length = chance.randrange(len(data)), chance.randint(1, 64)
        way = chance.randrange(6)
        if way == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif way == 1:
            data[at : at + length] = chance.randbytes(length)
        elif way == 2:
            del data[at:]
        elif way == 3:
            data[at:at] = data[at : at + length] * chance.randint(1, 50)
        elif way == 4:  # a number of the header
            at = chance.randrange(min(40, len(data)))
            data[at : at + 4] = chance.choice(
                [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"]
            )
        else:
            data[at:] = GOOD[chance.choice(FORMATS)][at:]
        if not data:
            break
    return bytes(data)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, packed: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", packed)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + data + chunk(b"IEND", b"")


def tiff(width: int, height: int, compression: int, data: bytes) -> bytes:
    entries = {256: width, 257: height, 258: 8, 259: compression, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    place = struct.pack("<I", 8 + len(data))
    return b"II*\0" + place + data + struct.pack("<H", len(entries)) + directory + b"\0\0\0\0"


def bombs() -> list[bytes]:
    """Small files that claim or unpack to a lot."""
    zeros = zlib.compress(bytes(30_000_000), 9)
    square = io.BytesIO()
    Image.new("1", (6300, 6300)).save(square, "PNG")  # just allowed
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "x" * 60_000_000, zip=True)
    described = io.BytesIO()
    Image.new("RGB", (32, 32)).save(described, "PNG", pnginfo=text)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("zeros", bytes(30_000_000))
    webp = bytearray(GOOD["WEBP"])
    webp[26:30] = b"\xff\x3f\xff\x3f"
    lossless = b"/" + struct.pack("<I", 0x3FFF | 0x3FFF << 14) + bytes(30)
    gif = bytearray(GOOD["GIF"])
    gif[6:10] = b"\xff" * 4
    bmp = bytearray(GOOD["BMP"])
    bmp[18:26] = struct.pack("<ii", 2**31 - 1, -(2**31))
    jpeg = bytearray(GOOD["JPEG"])
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = b"\xff" * 4
    return [
        *(png(side, side, packed=zeros) for side in (2**31 - 1, 60_000, 6400, 3162)),
        png(2**31 - 1, 1, packed=zeros),
        png(64, 64, chunk(b"iCCP", b"p\0\0" + zeros), packed=zlib.compress(bytes(64 * 193))),
        png(64, 64, chunk(b"zTXt", b"p\0\0" + zeros), packed=zeros),
        png(64, 64, chunk(b"iTXt", b"p\0\1\0\0\0" + zeros), packed=zeros),
        *(tiff(side, side, 8, zeros) for side in (2**31 - 1, 100_000, 6300)),
        *(tiff(2**16, 600, kind, bytes(200)) for kind in (1, 2, 5, 7, 8, 32773, 34676, 50000)),
        square.getvalue(),
        described.getvalue(),
        archive.getvalue(),
        b"RIFF" + struct.pack("<I", 12 + len(lossless)) + b"WEBPVP8L" + struct.pack("<I", len(lossless)) + lossless,
        *(bytes(data) for data in (webp, gif, bmp, jpeg)),
    ]


def polyglots() -> list[bytes]:
    """Files of two kinds, and of others than pictures."""
    script = b"<?php system($_GET['c']); ?><script>alert(1)</script>"
    archive = io.BytesIO(GOOD["PNG"])
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("../../etc/passwd", "x")
    entities = b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY a "aa">' + b"".join(
        b'<!ENTITY a%d "%s">' % (level, b"&a;" * 10) for level in range(9)
    )
    return [
        *(GOOD[kind] + script for kind in FORMATS),
        archive.getvalue(),
        b"GIF89a/*" + script + b"*/=1;" + bytes(64),
        b"BM" + script * 9,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(/etc/passwd) run\n",
        b"%PDF-1.7\n" + GOOD["JPEG"],
        entities + b"]><svg>&a8;</svg>",
        b"push graphic-context\nfill 'url(https://127.0.0.1/|id)'\n",
        b"glTF" + struct.pack("<II", 2, 2**32 - 1),
        b"\0\0\0\x18ftypheic" + bytes(64),
        b"8BPS\0\1" + bytes(6) + b"\xff" * 60,
        b"#!/bin/sh\nid\n",
        b"",
        b"\0" * 100_000,
    ]


def form(picture: bytes, chance: random.Random) -> bytes:
    """An honest request with a hostile picture."""
    kind, body = multipart(f"a.{chance.choice(FORMATS).lower()}", picture, {"wait": False})
    return request(kind, body)


def request(kind: str, body: bytes, *lines: str, length: int | None = None) -> bytes:
    head = [
        "POST /api/v1/image-to-3d HTTP/1.1",
        "Host: localhost",
        "Connection: close",
        f"Content-Type: {kind}",
        *([] if length == -1 else [f"Content-Length: {len(body) if length is None else length}"]),
        *lines,
    ]
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body


def crooked(chance: random.Random) -> bytes:
    """A request that is wrong in itself."""
    kind, body = multipart("a.png", GOOD["PNG"], {"wait": False, "seed": chance.randrange(9)})
    boundary = kind.partition("=")[2].encode()
    head = b"--" + boundary + b"\r\nContent-Disposition: form-data; "
    ways: list[Callable[[], bytes]] = [
        lambda: request(kind, body, length=len(body) + chance.randint(1, 10**6)),
        lambda: request(kind, body, length=chance.randrange(len(body))),
        lambda: request(kind, body, length=chance.choice([10**9, 2**63, 10**30])),
        lambda: request(kind, body, "Content-Length: 7"),
        lambda: request(kind, body[: chance.randrange(len(body))]),
        lambda: request(kind + "x", body),
        lambda: request("multipart/form-data", body),
        lambda: request(f"multipart/form-data; boundary={'x' * chance.choice([0, 71, 5000])}", body),
        lambda: request(chance.choice(["image/png", "text/plain", "application/json", "multipart/mixed", ""]), body),
        lambda: request("application/x-www-form-urlencoded", b"image=" + chance.randbytes(500)),
        lambda: request(kind, body.replace(b'name="seed"', chance.randbytes(20).replace(b"\r", b""))),
        lambda: request(
            kind, body.replace(b'name="seed"', b'name="' + b"s" * chance.choice([10, 10**4, 10**6]) + b'"')
        ),
        lambda: request(kind, body.replace(b'name="image"', b'name="seed"')),
        lambda: request(kind, body.replace(b'"picture"', b'"../../../etc/passwd\0.png"')),
        lambda: request(kind, body.replace(b"\r\n\r\n", b"\n\n")),
        lambda: request(kind, (head + b'name="seed"\r\n\r\n1\r\n') * 1000 + body),
        lambda: request(kind, (head + b'name="image"; filename="a"\r\n\r\nx\r\n') * 50 + body),
        lambda: request(kind, head + b'name="seed"\r\n' + b"X: y\r\n" * 5000 + b"\r\n1\r\n" + body),
        lambda: request(kind, head + b'name="seed"\r\n\r\n' + b"1" * 3_000_000 + b"\r\n" + body),
        lambda: request(kind, body, "Transfer-Encoding: chunked"),
        lambda: request(kind, b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n", "Transfer-Encoding: chunked", length=-1),
        lambda: request(kind, b"ffffffffffffffff\r\n" + body, "Transfer-Encoding: chunked", length=-1),
        lambda: request(kind, b"-5\r\n" + body, "Transfer-Encoding: chunked", length=-1),
        lambda: request(kind, body, "X: " + "y" * 200_000),
        lambda: request(kind, body, *(f"X{n}: y" for n in range(500))),
        lambda: request(kind, body, "Idempotency-Key: \xff\xfe", "Prefer: respond-async\x01"),
        lambda: request(kind, body, "Expect: 100-continue", "Content-Encoding: gzip"),
        lambda: chance.randbytes(chance.randint(1, 2000)) + b"\r\n\r\n",
    ]
    return chance.choice(ways)()


class Uploads:
    """All threads' requests and what came of them."""

    def __init__(self, service: Running, count: int) -> None:
        self.service = service
        self.chance = random.Random(3)
        self.numbers = iter(range(count))
        self.rare = itertools.cycle(bombs() + polyglots())
        self.lock = threading.Lock()
        self.kinds: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.seconds: list[float] = []
        self.slowest = (0.0, "")
        self.wrong: list[str] = []

    def run(self) -> None:
        while True:
            with self.lock:
                if next(self.numbers, None) is None:
                    return
                chance = random.Random(self.chance.randrange(2**62))
                kind = chance.choices(["damaged", "rare", "crooked"], [70, 10, 20])[0]
                self.kinds[kind] += 1
                rare = next(self.rare) if kind == "rare" else b""
            if kind == "crooked":
                message = crooked(chance)
            else:
                message = form(damaged(chance) if kind == "damaged" else rare, chance)
            start = time.perf_counter()
            status = self.answer(message, PATIENCE if kind == "crooked" else SLOWEST)
            seconds = time.perf_counter() - start
            with self.lock:
                self.statuses[status] += 1
                if status:
                    self.seconds.append(seconds)
                self.slowest = max(self.slowest, (seconds, kind))
                if status >= 500 or seconds > SLOWEST:
                    self.wrong.append(f"{status} after {seconds:.1f} s: {kind} {message[:300]!r}")

    def answer(self, message: bytes, patience: float) -> int:
        """The status of the answer; 0 where the service hung up without one, or waits for the rest of the request."""
        received = b""
        with socket.create_connection(("127.0.0.1", self.service.port), timeout=patience) as connection:
            try:
                connection.sendall(message)
                while b"\r\n" not in received and (piece := connection.recv(2**16)):
                    received += piece
            except ConnectionError:
                pass  # refused in the middle of the body
            except TimeoutError:
                return 0 if patience < SLOWEST else 599
        return int(received.split()[1]) if received.startswith(b"HTTP/1.1 ") else 0


def drip(service: Running, stop: threading.Event) -> None:
    """A body that comes byte by byte and never ends."""
    kind, body = multipart("a.png", GOOD["PNG"], {"wait": False})
    with socket.create_connection(("127.0.0.1", service.port), timeout=SLOWEST) as connection:
        connection.sendall(request(kind, b"", length=len(body) + 10**6))
        for value in itertools.cycle(body):
            if stop.wait(0.05):
                return
            try:
                connection.sendall(bytes([value]))
            except OSError:
                return


def load(service: Running, count: int) -> Uploads:
    uploads = Uploads(service, count)
    threads = [threading.Thread(target=uploads.run) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return uploads


def main() -> None:
    smoke = "--smoke" in sys.argv[1:]
    count = 150 if smoke else 10_000
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder) / "data", STUB, STUB_SECONDS="0", TRELLIS2_QUEUE="100000") as service,
    ):
        stop = threading.Event()
        drips = [threading.Thread(target=drip, args=(service, stop)) for _ in range(DRIPS)]
        for thread in drips:
            thread.start()
        start = time.monotonic()
        warm = load(service, count // 10)
        before = service.memory()
        uploads = load(service, count - count // 10)
        seconds = time.monotonic() - start
        stop.set()
        for thread in drips:
            thread.join()
        wrong = warm.wrong + uploads.wrong
        if service.process.poll() is not None:
            verdict([*wrong, f"the service died:\n{service.log.read_text()[-3000:]}"])
        start = time.monotonic()
        health = service.client.health()["status"]
        while service.client._json("GET", "/api/v1/jobs?status=queued&limit=1")["jobs"]:
            time.sleep(0.1)
        queue_seconds = time.monotonic() - start
        time.sleep(1)
        after = service.memory()
        everything = warm.seconds + uploads.seconds
        figures(
            uploads=count,
            of_kinds=dict(warm.kinds + uploads.kinds),
            slow_bodies_meanwhile=DRIPS,
            statuses=dict(sorted((warm.statuses + uploads.statuses).items())),
            seconds=seconds,
            seconds_until_the_queue_was_empty=queue_seconds,
            **{f"ms_of_{p}_percent": f"{1000 * percentile(everything, p):.0f}" for p in (50, 95, 99, 100)},
            slowest=max(warm.slowest, uploads.slowest)[1],
            memory_before_and_after_in_MB=f"{before:.0f}, {after:.0f} (peak {service.memory('VmHWM'):.0f})",
            open_files=service.open_files(),
            health_after=health,
        )
        errors = [json.loads(line) for line in service.log.read_text().splitlines() if '"level": "error"' in line]
        wrong += [f"the log has: {e['message'][:300]}" for e in errors if not e["logger"].startswith("PIL.")]
        if after - before > MEMORY_LIMIT:
            wrong.append(f"the process grew by {after - before:.0f} MB")
    verdict(wrong)


if __name__ == "__main__":
    main()
