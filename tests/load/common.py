"""What the programs of this folder share: a service in a process of its own, its memory, figures, the verdict."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from client_examples import TRELLIS2Client, TRELLIS2Error  # noqa: E402

STUB = ("tests/load/stub_service.py",)
REAL = ("api.py",)
EMBEDDED = ROOT / "weights" / "embedded"
START_SECONDS = 120


@dataclass
class Running:
    """A service in a process of its own."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def client(self) -> TRELLIS2Client:
        return TRELLIS2Client(f"http://127.0.0.1:{self.port}", retries=0)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def memory(self, field: str = "VmRSS") -> float:
        """MB that the process has in memory; VmHWM: the most that it ever had."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
        raise AssertionError(field)

    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


def environment_of(data: Path, port: int) -> dict[str, str]:
    return os.environ | {
        "TRELLIS2_MODEL": str(EMBEDDED),
        "TRELLIS2_DATA": str(data),
        "TRELLIS2_PORT": str(port),
        "TRELLIS2_VIDEO_FRAMES": "4",
        "TRELLIS2_VIDEO_RESOLUTION": "64",
        "HF_HUB_OFFLINE": "1",
    }


@contextmanager
def running(data: Path, command: tuple[str, ...], *, until_ready: bool = True, **environment: str) -> Iterator[Running]:
    """Start a service with its files in ``data``, wait for it and for its model, and kill it in the end."""
    data.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = data.with_name(data.name + ".log")
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment_of(data, port) | environment, stdout=file, stderr=file
        )
    service = Running(process, port, log)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"The service did not start:\n{log.read_text()[-4000:]}")
            try:
                service.client.health()
                break
            except TRELLIS2Error as error:
                if error.status == 503 and not until_ready:
                    break
                time.sleep(0.05)
        yield service
    finally:
        process.kill()
        process.wait()


def toy(kind: str = "PNG", side: int = 96) -> bytes:
    """A picture of a disc and a bar on white."""
    picture = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((side // 8, side // 8, side * 3 // 4, side * 3 // 4), fill=(200, 60, 30))
    draw.rectangle((side // 3, side // 2, side * 7 // 8, side * 5 // 8), fill=(30, 90, 200))
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def figures(**values: object) -> None:
    for name, value in values.items():
        shown = f"{value:.3f}" if isinstance(value, float) else str(value)
        sys.stdout.write(f"{name.replace('_', ' '):<36} {shown}\n")
    sys.stdout.flush()


def verdict(wrong: list[str]) -> None:
    """End the program: with 1 where anything is wrong."""
    for sentence in wrong[:20]:
        sys.stdout.write(f"WRONG: {sentence}\n")
    sys.exit(1 if wrong else 0)
