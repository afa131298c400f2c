"""A Redis of the tests' own."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from redis import Redis, RedisError


class RedisServer:
    """A redis-server that can be killed and started again, without its data unless ``keep_data`` was called."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self._durable = False
        self.start()

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder)]
        command += ["--save", "", "--appendonly", "yes" if self._durable else "no", "--logfile", "redis.log"]
        self._process = subprocess.Popen(command)
        with Redis(port=self.port) as client:
            deadline = time.monotonic() + 60
            while True:
                try:
                    client.ping()
                    return
                except RedisError:
                    assert time.monotonic() < deadline, "redis-server did not start"
                    time.sleep(0.02)

    def keep_data(self) -> None:
        self._durable = True
        with Redis(port=self.port, decode_responses=True) as client:
            client.config_set("appendonly", "yes")
            client.config_set("appendfsync", "always")
            while client.info("persistence")["aof_rewrite_in_progress"]:
                time.sleep(0.02)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def redis_server(folder: Path) -> Iterator[RedisServer]:
    folder.mkdir(parents=True, exist_ok=True)
    server = RedisServer(folder)
    try:
        yield server
    finally:
        server.kill()
